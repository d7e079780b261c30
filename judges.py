"""Other eyes than CLIPSeg's: judges of finished pictures, for evaluations alone.

The tempering never sees a judge, and a judge never steers. It notes what it sees in a picture, as
JSON keeps it; fixed rules read the verdict off its notes. So a threshold can be set when all
pictures were seen, and the rules need no model.

| judge      | is asked                                     | a picture is all OK if               |
|------------|----------------------------------------------|--------------------------------------|
| `owlv2`    | where each subject is (OWLv2), in which      | every subject has a thing of its     |
|            | colour (CLIP on the thing's crop)            | own, in its colour                   |
| `blip-vqa` | "a black dog?", of each subject (BLIP)       | yes is likelier than no for each     |
| `pocket`   | which cells show what (the pocket's judge)   | every subject is there, in its       |
|            |                                              | colour, and nothing is fused         |

owlv2: boxes of OWLv2 (Minderer et al. 2023, arXiv:2306.09683) as GenEval takes them of a detector
of 80 classes, and its rule for colours (Ghosh et al. 2023, arXiv:2310.11513), on the whole crop:
boxes have no outline whose outside could be greyed. GenEval asks for one class after the other, so
what is half dog and half robot passes for both; here subjects and things are matched one to one.
blip-vqa: T2I-CompBench's attribute binding (Huang et al. 2023, arXiv:2307.06350).
CLIP's text-image similarities, of the whole prompt and of its worst part, are told as in
Attend-and-Excite (Chefer et al. 2023, arXiv:2301.13826); with another CLIP, so that only their
differences compare.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from errors import InputError, ModelError
from pocket import judge as pocket
from pocket.world import parse
from prompts import Prompt

Array = NDArray[np.float64]
Notes = Mapping[str, Any]  # what a judge saw in one picture, as JSON keeps it

COLOURS = (
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "gray", "black", "white",
)  # fmt: skip  # of the Attend-and-Excite benchmark: GenEval's ten and gray
COLOUR_TEMPLATES = (
    "a photo of a {c} {n}",
    "a photo of a {c}-colored {n}",
    "a photo of a {c} object",
)
SAME_BOX = 0.5  # IoU above which two boxes of one query are one
SAME_THING = 0.7  # IoU above which boxes of different queries are one thing
# A subject has no claim to a thing that OWLv2 finds more than twice as much like something else:
# on the second of two dogs "a cat" fires as well.
RIVAL = 0.5
FAINTEST = 0.05  # boxes that OWLv2 gives less to no subject are not noted: no threshold is lower
THRESHOLD = 0.2  # of OWLv2, where there are too few pictures to calibrate it
MOST_THINGS = 12
MOST_RIVALS = 24  # further nouns of the set that OWLv2 is asked for besides a prompt's own
FEWEST_SINGLES = 10  # pictures of a single subject to calibrate on
YES = 0.5


@dataclass(frozen=True)
class Subject:
    """A subject as detectors take it; `colour` is None where its prompt begins with none."""

    noun: str
    colour: str | None


@dataclass(frozen=True)
class Verdict:
    """What a judge says of one picture.

    `faults` are from the judge's own `FAULTS`; `notes` say why, a text a subject, where the judge
    can tell; `figures` are what its recipe reports besides, from its own `FIGURES`.
    """

    faults: tuple[str, ...]
    notes: tuple[str, ...] = ()
    figures: Mapping[str, float] = field(default_factory=dict)

    @property
    def all_ok(self) -> bool:
        return not self.faults


MISSING, WRONG_COLOUR, FUSED, DOUBTED = "missing", "wrong colour", "fused", "not confirmed"
FAULTS = {
    "owlv2": (MISSING, WRONG_COLOUR, FUSED),
    "blip-vqa": (DOUBTED,),
    "pocket": (MISSING, WRONG_COLOUR, FUSED),
}
# What a figure is called; all are better where they are higher.
FIGURES = {
    "owlv2": {"clip_whole": "CLIP, whole prompt", "clip_worst": "CLIP, worst subject"},
    "blip-vqa": {"vqa_score": "VQA score"},
    "pocket": {},
}

_UNTRIED = (
    "its rules were tried on boxes and answers made by hand, and with small random models; how it "
    "agrees with people was not measured here"
)
REMARKS = {  # what a reader of its verdicts must know
    "owlv2": "OWLv2 finds subjects, CLIP their colours on whole crops, backgrounds included; "
    f"{_UNTRIED}",
    "blip-vqa": "a picture is all OK if yes is likelier than no for every subject; BLIP judges "
    f"colours better than shapes; {_UNTRIED}",
    "pocket": "a small network that was trained on drawings with known faults; it judges the "
    "pocket's pictures alone, and its own errors are in the pocket's model card",
}


def subject_of(prompt: str) -> Subject:
    """Read a subject's prompt: "a black dog" is a dog, and black; "a toy robot" has no colour."""
    bare = re.sub(r"^(an?|the|one)\s+", "", prompt.strip(), flags=re.IGNORECASE)
    first, _, rest = bare.partition(" ")
    colour = first.lower().replace("grey", "gray")
    return (
        Subject(rest.strip(), colour) if colour in COLOURS and rest.strip() else Subject(bare, None)
    )


def verdict(judge: str, notes: Notes, prompt: Prompt, threshold: float = THRESHOLD) -> Verdict:
    """What the judge of that name says of a picture of `prompt` in which it noted `notes`.

    `threshold` is OWLv2's: from which score on something is there.
    """
    if judge == "owlv2":
        return _owlv2_verdict(notes, prompt, threshold)
    return _blip_verdict(notes, prompt) if judge == "blip-vqa" else _pocket_verdict(notes)


# --- OWLv2: the rules.


def _owlv2_verdict(notes: Notes, prompt: Prompt, threshold: float) -> Verdict:
    subjects = [subject_of(each) for each in prompt.subjects]
    things = notes["things"]
    scores = np.array([thing["scores"] for thing in things]).reshape(len(things), len(subjects)).T
    best = np.array([thing["best"] for thing in things])
    colours = [[thing["colours"][i] for thing in things] for i in range(len(subjects))]
    right = np.array(
        [
            [s.colour in (None, seen) for seen in row]
            for s, row in zip(subjects, colours, strict=True)
        ]
    )
    claims = (scores >= threshold) & (scores >= RIVAL * best)  # (C, things)
    owned = assign(np.where(claims, scores, 0), right)
    states = [
        (FUSED if claims[i].any() else MISSING, scores[i].max(initial=0), None)
        if thing is None
        else (None if right[i, thing] else WRONG_COLOUR, scores[i, thing], colours[i][thing])
        for i, thing in enumerate(owned)
    ]
    return Verdict(
        faults=tuple(fault for fault in FAULTS["owlv2"] if fault in [state[0] for state in states]),
        notes=tuple(
            f"{subject}: {fault or 'there'} ({score:.2f}{f', {colour}' if colour else ''})"
            for subject, (fault, score, colour) in zip(prompt.subjects, states, strict=True)
        ),
        figures=notes["clip"],
    )


def assign(scores: ArrayLike, right: ArrayLike) -> list[int | None]:
    """Which thing each subject has for its own, None for none; no thing is two subjects'.

    As many subjects as possible have one, then as many as possible in their colour, then by the
    highest sum of scores (Kuhn 1955, Munkres 1957).

    scores: (C, T) in 0..1, 0 where a subject has no claim. right: (C, T), whether the thing has
    the subject's colour.
    """
    given = np.asarray(scores, dtype=np.float64)
    most = len(given) + 1  # more than all scores together
    value = (given > 0) * (most**2 + most * np.asarray(right, dtype=np.float64) + given)
    own: list[int | None] = [None] * len(given)
    for subject, thing in zip(*linear_sum_assignment(value, maximize=True), strict=True):
        own[int(subject)] = int(thing) if given[subject, thing] > 0 else None
    return own


def things_of(boxes: ArrayLike, scores: ArrayLike) -> tuple[Array, Array]:
    """The things that boxes show: their boxes (T, 4) and scores (T, Q), the surest first.

    Of boxes that one query finds at one place the surest remains; boxes of different queries at
    one place are one thing, which has the highest score of each.

    boxes: (N, 4) as left, top, right, bottom. scores: (N, Q) in 0..1, of each of the Q queries.
    """
    places = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    given = np.array(scores, dtype=np.float64)
    overlaps = ious(places)
    for query in range(given.shape[1]):
        given[suppressed(overlaps, given[:, query]), query] = 0
    kept: list[int] = []
    for i in map(int, np.argsort(-given.max(axis=1, initial=0), kind="stable")):
        home = next((k for k in kept if overlaps[k, i] > SAME_THING), None)
        if home is not None:
            given[home] = np.maximum(given[home], given[i])
        elif given[i].max() > 0:
            kept.append(i)
    return places[kept], given[kept]


def suppressed(overlaps: Array, scores: Array) -> list[int]:
    """Which boxes lie on a surer one: scores (N,), and the boxes' IoU with each other (N, N)."""
    kept: list[int] = []
    hidden: list[int] = []
    for i in map(int, np.argsort(-scores, kind="stable")):
        (hidden if (overlaps[i, kept] > SAME_BOX).any() else kept).append(i)
    return hidden


def ious(boxes: Array) -> Array:
    """Intersection over union (N, N) of boxes (N, 4): left, top, right, bottom."""
    low, high = boxes[:, :2], boxes[:, 2:]
    sides = np.minimum(high[:, None], high) - np.maximum(low[:, None], low)  # (N, N, 2)
    shared = sides.clip(min=0).prod(axis=-1)
    areas = (high - low).prod(axis=-1)
    return shared / (areas[:, None] + areas - shared).clip(min=1e-12)


@dataclass(frozen=True)
class Calibration:
    """A threshold, and what it was found on: pictures of a single subject each.

    found: share of the painted subjects that it finds. invented: share of the nouns that were not
    painted but are found nevertheless. Both None where there were too few pictures.
    """

    threshold: float
    pictures: int
    found: float | None = None
    invented: float | None = None


def calibrate(singles: Sequence[Notes]) -> Calibration:
    """The threshold that best tells what is in pictures of one subject each from what is not.

    It maximises found - invented (Youden 1950). A model that paints a single subject wrongly now
    and then lowers `found`; the threshold hardly moves.
    """
    painted = np.array(
        [max((t["scores"][0] for t in each["things"]), default=0) for each in singles]
    )
    others = np.array([score for each in singles for score in each["others"]])
    if len(painted) < FEWEST_SINGLES or not len(others):
        return Calibration(THRESHOLD, len(painted))
    levels = np.unique(np.concatenate([painted, others]).clip(min=FAINTEST))
    found = (painted >= levels[:, None]).mean(axis=1)
    invented = (others >= levels[:, None]).mean(axis=1)
    best = int(np.argmax(found - invented))
    # Half way to what it must not find, not at the very edge of what it must.
    threshold = float((levels[best] + levels[max(0, best - 1)]) / 2)
    return Calibration(
        round(threshold, 4),
        len(painted),
        found=float((painted >= threshold).mean()),
        invented=float((others >= threshold).mean()),
    )


# --- BLIP and the pocket: the rules.


def _blip_verdict(notes: Notes, prompt: Prompt) -> Verdict:
    answers = notes["yes"]
    told = [f"{s}? {yes:.2f}" for s, yes in zip(prompt.subjects, answers, strict=True)]
    doubted = min(answers) <= YES
    return Verdict((DOUBTED,) * doubted, tuple(told), {"vqa_score": float(np.prod(answers))})


def _pocket_verdict(notes: Notes) -> Verdict:
    return Verdict(tuple(fault for fault in FAULTS["pocket"] if notes[fault.replace(" ", "_")]))


# --- The eyes.


@dataclass(frozen=True)
class Eye:
    """A model of transformers with the processor of its own checkpoint."""

    model: Any
    processor: Any

    @property
    def device(self) -> torch.device:
        return self.model.device

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        found = self.processor.image_processor(list(images), return_tensors="pt").pixel_values
        return found.to(self.device, self.model.dtype)

    def tokens(self, texts: Sequence[str], **options: Any) -> dict[str, Tensor]:
        """Token ids and attention mask; a text over the model's length is cut."""
        found = self.processor.tokenizer(
            list(texts), padding=True, truncation=True, return_tensors="pt", **options
        )
        return {name: found[name].to(self.device) for name in ("input_ids", "attention_mask")}


class Judge(ABC):
    """Looks at one finished picture at a time."""

    name: ClassVar[str]

    @abstractmethod
    def see(self, image: Image.Image, prompt: Prompt) -> Notes:
        """What the judge sees in a picture that `prompt` asked for."""


class Clip:
    """Similarities of pictures and texts (Radford et al. 2021, arXiv:2103.00020)."""

    def __init__(self, eye: Eye) -> None:
        self.eye = eye
        self.text = cache(self._text)  # the same few colours and prompts come again and again

    def pictures(self, images: Sequence[Image.Image]) -> Tensor:
        """Embeddings (B, D) of length 1."""
        found = self.eye.model.get_image_features(pixel_values=self.eye.pixels(images))
        return F.normalize(found.pooler_output.float(), dim=-1)

    def _text(self, *texts: str) -> Tensor:
        """The mean embedding (D,), of length 1, of several ways to say the same."""
        length = self.eye.model.config.text_config.max_position_embeddings
        tokens = self.eye.tokens(texts, max_length=length)
        found = F.normalize(
            self.eye.model.get_text_features(**tokens).pooler_output.float(), dim=-1
        )
        return F.normalize(found.mean(dim=0), dim=-1)

    def colour(self, crop: Tensor, noun: str) -> str:
        """The colour of the `noun` on a crop of embedding (D,)."""
        ways = [[way.format(c=c, n=noun) for way in COLOUR_TEMPLATES] for c in COLOURS]
        similarities = torch.stack([self.text(*each) for each in ways]) @ crop
        return COLOURS[int(similarities.argmax())]

    def scores(self, image: Image.Image, prompt: Prompt) -> dict[str, float]:
        """Cosine of picture and whole prompt, and of the part that is least in the picture."""
        picture = self.pictures([image])[0]
        parts = [float(self.text(part) @ picture) for part in prompt.subjects]
        whole = float(self.text(prompt.text) @ picture)
        return {"clip_whole": round(whole, 4), "clip_worst": round(min(parts), 4)}


class Owlv2Judge(Judge):
    """OWLv2 finds the subjects, CLIP their colours.

    `nouns` are those of all prompts: a thing that is much more like another of them is no subject.
    """

    name = "owlv2"

    def __init__(self, owlv2: Eye, clip: Eye, nouns: Sequence[str]) -> None:
        self.eye = owlv2
        self.clip = Clip(clip)
        self.nouns = list(dict.fromkeys(nouns))

    @torch.inference_mode()
    def see(self, image: Image.Image, prompt: Prompt) -> Notes:
        subjects = [subject_of(each) for each in prompt.subjects]
        own = [subject.noun for subject in subjects]
        others = [noun for noun in self.nouns if noun not in own][:MOST_RIVALS]
        boxes, scores = things_of(*self.detect(image, [*own, *others]))
        asked = scores[:, : len(own)].max(axis=1, initial=0) >= FAINTEST
        boxes, noted = boxes[asked][:MOST_THINGS], scores[asked][:MOST_THINGS]
        return {
            "things": [
                {
                    "box": [round(value) for value in box],
                    "scores": [round(value, 4) for value in row[: len(own)].tolist()],
                    "best": round(float(row.max()), 4),
                    "colours": colours,
                }
                for box, row, colours in zip(
                    boxes.tolist(), noted, self.colours(image, boxes, subjects), strict=True
                )
            ],
            "others": [round(v, 4) for v in scores[:, len(own) :].max(axis=0, initial=0).tolist()],
            "clip": self.clip.scores(image, prompt),
        }

    def detect(self, image: Image.Image, nouns: Sequence[str]) -> tuple[Array, Array]:
        """Boxes (N, 4) in pixels and their scores (N, nouns), those that are not too faint."""
        length = self.eye.model.config.text_config.max_position_embeddings
        tokens = self.eye.tokens([f"a photo of a {noun}" for noun in nouns], max_length=length)
        found = self.eye.model(pixel_values=self.eye.pixels([image]), **tokens)
        scores = found.logits[0].float().sigmoid()  # (N, nouns)
        centre, size = found.pred_boxes[0].float().split(2, dim=-1)
        # OWLv2 sees the picture as the upper left part of a square.
        boxes = torch.cat([centre - size / 2, centre + size / 2], dim=-1) * max(image.size)
        limits = boxes.new_tensor([*image.size, *image.size])
        boxes = boxes.clamp(min=0).minimum(limits)
        # A box without a pixel, beyond the picture's edge, shows nothing.
        inside = (boxes[:, 2:] - boxes[:, :2]).amin(dim=-1) >= 1
        sure = inside & (scores.amax(dim=-1) >= FAINTEST)
        return boxes[sure].double().cpu().numpy(), scores[sure].double().cpu().numpy()

    def colours(
        self, image: Image.Image, boxes: Array, subjects: Sequence[Subject]
    ) -> list[list[str | None]]:
        """Of each thing its colour as each subject; None for a subject of no certain colour."""
        if not len(boxes) or not any(subject.colour for subject in subjects):
            return [[None] * len(subjects)] * len(boxes)
        crops = self.clip.pictures([image.crop(crop_of(box, image.size)) for box in boxes])
        return [
            [self.clip.colour(crop, s.noun) if s.colour else None for s in subjects]
            for crop in crops
        ]


def crop_of(box: Array, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """A box in whole pixels, of at least one, inside a picture of that size."""
    left, top = (min(int(v), side - 1) for v, side in zip(box[:2], size, strict=True))
    return left, top, max(left + 1, round(box[2])), max(top + 1, round(box[3]))


class BlipVqaJudge(Judge):
    """BLIP (Li et al. 2022, arXiv:2201.12086) is asked for each subject; its first word counts."""

    name = "blip-vqa"

    def __init__(self, blip: Eye) -> None:
        self.eye = blip
        tokenizer = blip.processor.tokenizer
        self.words = tokenizer.convert_tokens_to_ids(["yes", "no"])
        if tokenizer.unk_token_id in self.words:
            raise ModelError("BLIP's vocabulary must have the words yes and no, and it has not")

    @torch.inference_mode()
    def see(self, image: Image.Image, prompt: Prompt) -> Notes:
        questions = [f"{subject}?" for subject in prompt.subjects]
        length = self.eye.model.config.text_config.max_position_embeddings
        found = self.eye.model.generate(
            **self.eye.tokens(questions, max_length=length),
            pixel_values=self.eye.pixels([image]).expand(len(questions), -1, -1, -1),
            max_new_tokens=1,
            output_scores=True,
            return_dict_in_generate=True,
        )
        logits = found.scores[0][:, self.words].float()  # (C, yes or no)
        return {"yes": [round(p, 4) for p in logits.softmax(dim=-1)[:, 0].tolist()]}


class PocketJudge(Judge):
    """The judge of the pocket's pictures; it knows the pocket's world and nothing else."""

    name = "pocket"

    def __init__(self, judge: pocket.Judge) -> None:
        self.judge = judge

    def see(self, image: Image.Image, prompt: Prompt) -> Notes:
        pixels = np.array(image.convert("RGB"))[None]
        (said,) = self.judge.judge(pixels, [[parse(each) for each in prompt.subjects]])
        return asdict(said)


def check_pocket(prompts: Sequence[Prompt], sizes: Sequence[int | None]) -> None:
    """Raise InputError for what the pocket's judge does not know: other subjects, other `sizes`."""
    if any(size not in (None, pocket.SIDE) for size in sizes):
        raise InputError(
            f"--judge pocket needs pictures of {pocket.SIDE} pixels, the pocket's size, got "
            f"{' and '.join(map(str, sizes))}"
        )
    for prompt in prompts:
        try:
            nouns = [parse(each) for each in prompt.subjects]
        except ValueError as error:
            raise InputError(
                f"--judge pocket knows the pocket's subjects alone: {error}"
            ) from error
        if len({noun.subject for noun in nouns}) < len(nouns):
            raise InputError(
                f"--judge pocket needs different subjects in a prompt, got {prompt.text!r}"
            )
