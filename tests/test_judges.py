"""Judges: their rules on boxes, answers and cells made by hand, and tiny random models at work.

No weights of OWLv2, CLIP or BLIP are to be had here: what is held is that the models are asked as
their makers ask them, and that the verdicts follow from what they answer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_judges
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import (
    BlipForQuestionAnswering,
    BlipProcessor,
    CLIPModel,
    CLIPProcessor,
    Owlv2ForObjectDetection,
    Owlv2Processor,
)

import judges
from errors import InputError, ModelError
from judges import (
    COLOURS,
    THRESHOLD,
    BlipVqaJudge,
    Eye,
    Owlv2Judge,
    PocketJudge,
    Subject,
    Verdict,
    assign,
    calibrate,
    check_pocket,
    ious,
    subject_of,
    things_of,
    verdict,
)
from pocket.judge import load_judge
from prompts import Prompt
from settings import JUDGES

PAIR = Prompt(("a black dog", "a toy robot"), " and ")
CATS = Prompt(("a cat", "a dog"), " and ")
LEFT, RIGHT, TOP = [0, 0, 40, 100], [60, 0, 100, 100], [0, 0, 40, 10]


# --- Subjects.


@pytest.mark.parametrize(
    ("prompt", "noun", "colour"),
    [
        ("a black dog", "dog", "black"),
        ("a toy robot", "toy robot", None),
        ("An orange", "orange", None),  # the fruit
        ("an Orange cat", "cat", "orange"),
        ("one grey wolf", "wolf", "gray"),
        ("the red fire engine", "fire engine", "red"),
        ("a big black dog", "big black dog", None),  # the words before a colour go to the detector
        ("blackbird", "blackbird", None),
    ],
)
def test_a_prompt_is_read_as_a_noun_and_a_colour(
    prompt: str, noun: str, colour: str | None
) -> None:
    assert subject_of(prompt) == Subject(noun, colour)


# --- Boxes into things.


def test_iou_by_hand() -> None:
    boxes = np.array([[0, 0, 4, 4], [2, 2, 6, 6], [4, 0, 8, 4], [0, 0, 4, 2]], dtype=float)
    # The first two share 4 of 16 + 16 - 4; the last is half of the first; others only touch.
    assert ious(boxes)[0] == pytest.approx([1, 4 / 28, 0, 0.5])
    assert ious(boxes) == pytest.approx(ious(boxes).T)


def test_boxes_of_one_query_at_one_place_are_one_and_the_surest_stays() -> None:
    shifted = [2, 0, 42, 100]  # IoU 38 / 42
    boxes, scores = things_of([LEFT, shifted, RIGHT], [[0.5], [0.8], [0.6]])
    assert boxes.tolist() == [shifted, RIGHT]
    assert scores.tolist() == [[0.8], [0.6]]


def test_boxes_of_two_queries_at_one_place_are_one_thing_with_both_scores() -> None:
    shifted = [2, 0, 42, 100]
    boxes, scores = things_of([LEFT, shifted], [[0.8, 0.1], [0.1, 0.7]])
    assert boxes.tolist() == [LEFT]
    assert scores.tolist() == [[0.8, 0.7]]


def test_what_is_worn_is_a_thing_of_its_own() -> None:
    boxes, scores = things_of([LEFT, TOP], [[0.8, 0.0], [0.0, 0.7]])
    assert boxes.tolist() == [LEFT, TOP]
    assert scores.tolist() == [[0.8, 0.0], [0.0, 0.7]]


def test_queries_that_overlap_by_less_than_a_thing_stay_two() -> None:
    lower = [0, 25, 40, 125]  # IoU 75 / 125 = 0.6: more than one query's, less than one thing's
    assert len(things_of([LEFT, lower], [[0.8, 0], [0, 0.7]])[0]) == 2
    assert len(things_of([LEFT, lower], [[0.8], [0.7]])[0]) == 1


def test_no_box_is_no_thing() -> None:
    boxes, scores = things_of(np.zeros((0, 4)), np.zeros((0, 3)))
    assert (boxes.shape, scores.shape) == ((0, 4), (0, 3))


# --- Things to subjects.

YES2 = np.ones((2, 2), bool)


def test_each_subject_has_the_thing_that_looks_most_like_it() -> None:
    assert assign([[0.9, 0.3], [0.3, 0.9]], YES2) == [0, 1]
    assert assign([[0.3, 0.9], [0.9, 0.3]], YES2) == [1, 0]


def test_as_many_subjects_as_possible_have_a_thing() -> None:
    # Greedily the first subject would take thing 0 (0.9) and leave the second with nothing.
    assert assign([[0.9, 0.3], [0.8, 0.0]], YES2) == [1, 0]


def test_one_thing_is_not_two_subjects() -> None:
    assert assign([[0.9], [0.8]], np.ones((2, 1), bool)) == [0, None]
    assert assign([[0.8], [0.9]], np.ones((2, 1), bool)) == [None, 0]


def test_a_subject_without_a_claim_has_none_and_takes_none() -> None:
    assert assign([[0.0, 0.0], [0.5, 0.4]], YES2) == [None, 0]
    assert assign(np.zeros((2, 0)), np.zeros((2, 0), bool)) == [None, None]


def test_two_of_a_kind_are_told_apart_by_their_colours() -> None:
    cars = [[0.9, 0.5], [0.9, 0.5]]  # a red car and a blue car: OWLv2 is asked for cars
    assert assign(cars, [[False, True], [True, False]]) == [1, 0]
    assert assign(cars, [[True, False], [True, False]]) in (
        [0, 1],
        [1, 0],
    )  # both red: one is wrong


def test_having_a_thing_goes_before_its_colour() -> None:
    assert assign([[0.9, 0.9], [0.9, 0.0]], [[True, False], [True, True]]) == [1, 0]


# --- OWLv2's verdict.


def thing(
    *scores: float, best: float | None = None, colours: Sequence[str | None] = (None, None)
) -> dict[str, Any]:
    return {"scores": list(scores), "best": max(best or 0, *scores), "colours": list(colours)}


def seen(*things: dict[str, Any]) -> dict[str, Any]:
    return {"things": list(things), "others": [], "clip": {}}


DOG, ROBOT = (
    thing(0.8, 0.02, colours=("black", None)),
    thing(0.02, 0.7, colours=("brown", None)),
)


def test_two_things_in_their_colours_are_all_ok() -> None:
    said = verdict("owlv2", seen(DOG, ROBOT), PAIR)
    assert said.all_ok
    assert said.notes == ("a black dog: there (0.80, black)", "a toy robot: there (0.70)")
    assert said == verdict("owlv2", seen(ROBOT, DOG), PAIR)


def test_what_is_not_seen_is_missing() -> None:
    assert verdict("owlv2", seen(DOG), PAIR).faults == ("missing",)
    assert verdict("owlv2", seen(), PAIR) == Verdict(
        ("missing",), ("a black dog: missing (0.00)", "a toy robot: missing (0.00)")
    )


def test_a_chimera_is_fused_though_each_class_fires() -> None:
    """GenEval's rule, one class after the other, would find a dog and a robot there."""
    chimera = thing(0.6, 0.5, colours=("black", None))
    assert verdict("owlv2", seen(chimera), PAIR).faults == ("fused",)
    assert verdict("owlv2", seen(chimera, ROBOT), PAIR).all_ok  # a robot stands beside it
    assert verdict("owlv2", seen(chimera, DOG), PAIR).all_ok  # and so may the dog


def test_the_threshold_decides_what_is_there() -> None:
    faint = thing(0.02, 0.25, colours=("brown", None))
    assert verdict("owlv2", seen(DOG, faint), PAIR, threshold=0.2).all_ok
    assert verdict("owlv2", seen(DOG, faint), PAIR, threshold=0.3).faults == ("missing",)
    # A chimera whose second half is under the threshold is one thing, and the other is missing.
    assert verdict("owlv2", seen(thing(0.8, 0.25)), CATS, threshold=0.3).faults == ("missing",)


def test_the_second_of_two_dogs_is_no_cat() -> None:
    """Two of one kind is how a subject is most often lost; a detector fires for its like, too."""
    dogs = seen(thing(0.05, 0.8), thing(0.3, 0.75))
    assert verdict("owlv2", dogs, CATS).faults == ("missing",)
    unsure = seen(thing(0.05, 0.8), thing(0.4, 0.45))  # as much a cat as a dog
    assert verdict("owlv2", unsure, CATS).all_ok


def test_what_is_much_more_like_something_else_is_no_subject() -> None:
    assert verdict("owlv2", seen(thing(0.3, 0, best=0.9), thing(0, 0.8)), CATS).faults == (
        "missing",
    )


def test_a_wrong_colour_is_told_and_only_where_one_was_asked_for() -> None:
    brown = thing(0.8, 0.02, colours=("brown", None))
    said = verdict("owlv2", seen(brown, ROBOT), PAIR)
    assert said.faults == ("wrong colour",)
    assert said.notes[0] == "a black dog: wrong colour (0.80, brown)"


def test_colours_that_changed_places_are_wrong_and_told_once() -> None:
    prompt = Prompt(("a red car", "a blue bird"), " and ")
    car, bird = (
        thing(0.8, 0, colours=("blue", "blue")),
        thing(0, 0.8, colours=("red", "red")),
    )
    assert verdict("owlv2", seen(car, bird), prompt).faults == ("wrong colour",)


def test_all_faults_of_a_picture_are_told() -> None:
    prompt = Prompt(("a red car", "a cat", "a dog", "a bird"), " and ")
    none = (None,) * 3
    car = thing(0.9, 0, 0, 0, colours=("blue", *none))
    chimera = thing(0, 0.7, 0.6, 0, colours=("red", *none))
    said = verdict("owlv2", seen(car, chimera), prompt)
    assert said.faults == ("missing", "wrong colour", "fused")


def test_three_subjects_need_three_things() -> None:
    prompt = Prompt(("a cat", "a dog", "a bird"), " and ")
    three = [thing(*row, colours=(None,) * 3) for row in 0.8 * np.eye(3)]
    assert verdict("owlv2", seen(*three), prompt).all_ok
    assert verdict("owlv2", seen(*three[:2]), prompt).faults == ("missing",)


# --- Its threshold.


def single(painted: float, *others: float) -> dict[str, Any]:
    return {"things": [{"scores": [painted]}] if painted else [], "others": list(others)}


def test_the_threshold_lies_between_what_was_painted_and_what_was_not() -> None:
    found = calibrate([single(0.6, 0.1, 0.2)] * 6 + [single(0.4, 0.05, 0.3)] * 6)
    assert found.threshold == pytest.approx((0.4 + 0.3) / 2)
    assert (found.pictures, found.found, found.invented) == (12, 1.0, 0.0)


def test_the_threshold_is_where_most_are_told_right() -> None:
    # Of 10 painted one is not recognised; of 40 that were not, one is seen strongly.
    singles = [single(0.5, *[0.1] * 4)] * 9 + [single(0.0, 0.1, 0.1, 0.1, 0.9)]
    found = calibrate(singles)
    assert found.threshold == pytest.approx((0.5 + 0.1) / 2)
    assert (found.found, found.invented) == (0.9, 1 / 40)


def test_a_threshold_is_not_taken_from_a_handful() -> None:
    assert calibrate([single(0.9, 0.1)] * 9).threshold == THRESHOLD
    assert calibrate([single(0.9)] * 20).threshold == THRESHOLD  # nothing to tell it from
    assert calibrate([]).pictures == 0


# --- BLIP's and the pocket's verdicts.


def test_blip_must_say_yes_to_every_subject() -> None:
    assert verdict("blip-vqa", {"yes": [0.9, 0.6]}, PAIR) == Verdict(
        (), ("a black dog? 0.90", "a toy robot? 0.60"), {"vqa_score": 0.9 * 0.6}
    )
    doubted = verdict("blip-vqa", {"yes": [0.9, 0.4]}, PAIR)
    assert doubted.faults == ("not confirmed",)
    assert doubted.figures["vqa_score"] == pytest.approx(0.36)  # T2I-CompBench's score: the product
    assert not verdict("blip-vqa", {"yes": [0.5, 0.9]}, PAIR).all_ok


@pytest.mark.parametrize("fault", ["missing", "wrong_colour", "fused"])
def test_the_pockets_faults_are_told_by_name(fault: str) -> None:
    notes = {**dict.fromkeys(("missing", "wrong_colour", "fused"), False), "extra": True}
    assert verdict("pocket", notes, PAIR).all_ok
    said = verdict("pocket", {**notes, fault: True}, PAIR)
    assert said.faults == (fault.replace("_", " "),)


@pytest.mark.parametrize(
    ("subjects", "fault"),
    [
        (("a black dog", "a zebra"), "knows the pocket's subjects alone: .*'a zebra'"),
        (
            ("a black dog", "a red dog"),
            "needs different subjects in a prompt, got 'a black dog and",
        ),
    ],
)
def test_the_pockets_judge_refuses_what_it_does_not_know(
    subjects: tuple[str, ...], fault: str
) -> None:
    check_pocket([PAIR], (None, 64))
    with pytest.raises(InputError, match=fault):
        check_pocket([PAIR, Prompt(subjects, " and ")], (None, None))
    with pytest.raises(InputError, match=r"needs pictures of 64 pixels, .* got 64 and 96"):
        check_pocket([PAIR], (64, 96))


def test_every_judge_that_can_be_asked_for_has_its_words() -> None:
    assert set(JUDGES) == set(judges.FAULTS) == set(judges.FIGURES) == set(judges.REMARKS)


# --- The eyes: models as their makers ask them.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, make in tiny_judges.REPOSITORIES.items():
        make(folder / name.partition("/")[2])
    return folder


def eye(folder: Path, name: str, model: Any, processor: Any) -> Eye:
    source = folder / name
    return Eye(model.from_pretrained(source).eval(), processor.from_pretrained(source))


@pytest.fixture(scope="module")
def owlv2(folder: Path) -> Eye:
    return eye(folder, "owlv2-base-patch16-ensemble", Owlv2ForObjectDetection, Owlv2Processor)


@pytest.fixture(scope="module")
def clip(folder: Path) -> Eye:
    return eye(folder, "clip-vit-large-patch14", CLIPModel, CLIPProcessor)


@pytest.fixture(scope="module")
def blip(folder: Path) -> Eye:
    return eye(folder, "blip-vqa-base", BlipForQuestionAnswering, BlipProcessor)


@pytest.fixture(scope="module", params=[(96, 64), (64, 96), (64, 64)], ids=str)
def picture(request: pytest.FixtureRequest) -> Image.Image:
    width, height = request.param
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@torch.no_grad()
def test_boxes_are_those_of_transformers_own_postprocessing(
    owlv2: Eye, clip: Eye, picture: Image.Image
) -> None:
    nouns = ["dog", "toy robot", "cat"]
    boxes, scores = Owlv2Judge(owlv2, clip, nouns).detect(picture, nouns)
    texts = [[f"a photo of a {noun}" for noun in nouns]]
    inputs = owlv2.processor(text=texts, images=picture, return_tensors="pt")
    found = owlv2.processor.post_process_grounded_object_detection(
        owlv2.model(**inputs),
        target_sizes=torch.tensor([(picture.height, picture.width)]),
        threshold=judges.FAINTEST,
    )[0]
    limits = torch.tensor([*picture.size, *picture.size])
    inside = found["boxes"].clamp(min=0).minimum(limits)
    visible = (inside[:, 2:] - inside[:, :2]).amin(dim=1) >= 1
    assert visible.sum() > 0
    np.testing.assert_allclose(boxes, inside[visible], atol=1e-3)
    labels = found["labels"][visible].tolist()  # of the likeliest query
    np.testing.assert_allclose(scores.max(axis=1), found["scores"][visible], atol=1e-5)
    np.testing.assert_allclose(scores[range(len(labels)), labels], scores.max(axis=1), atol=1e-6)


@torch.no_grad()
def test_a_crops_colour_is_that_of_the_nearest_mean_text(clip: Eye, picture: Image.Image) -> None:
    """GenEval's classifier: each colour's templates averaged, then the highest cosine."""
    similarities = []
    for colour in COLOURS:
        texts = [
            f"a photo of a {colour} dog",
            f"a photo of a {colour}-colored dog",
            f"a photo of a {colour} object",
        ]
        found = clip.model(
            **clip.processor(text=texts, images=picture, return_tensors="pt", padding=True)
        )
        mean = F.normalize(found.text_embeds, dim=-1).mean(dim=0)
        similarities.append(F.cosine_similarity(mean, found.image_embeds[0], dim=0))
    expected = COLOURS[int(torch.stack(similarities).argmax())]
    ours = judges.Clip(clip)
    assert ours.colour(ours.pictures([picture])[0], "dog") == expected


@torch.no_grad()
def test_clip_scores_are_of_the_whole_prompt_and_of_its_worst_part(
    clip: Eye, picture: Image.Image
) -> None:
    texts = [PAIR.text, *PAIR.subjects]
    inputs = clip.processor(text=texts, images=picture, return_tensors="pt", padding=True)
    cosines = clip.model(**inputs).logits_per_image[0] / clip.model.logit_scale.exp()
    found = judges.Clip(clip).scores(picture, PAIR)
    assert found["clip_whole"] == pytest.approx(float(cosines[0]), abs=1e-4)
    assert found["clip_worst"] == pytest.approx(float(cosines[1:].min()), abs=1e-4)


@torch.no_grad()
def test_blips_yes_is_that_of_the_first_word_it_would_say(blip: Eye, picture: Image.Image) -> None:
    found = BlipVqaJudge(blip).see(picture, PAIR)["yes"]
    vocabulary = blip.processor.tokenizer.get_vocab()
    for subject, yes in zip(PAIR.subjects, found, strict=True):
        inputs = blip.processor(images=picture, text=f"{subject}?", return_tensors="pt")
        first = torch.tensor([[blip.model.decoder_start_token_id]])
        model = blip.model
        vision = model.vision_model(inputs.pixel_values).last_hidden_state
        asked = model.text_encoder(
            input_ids=inputs.input_ids, encoder_hidden_states=vision
        ).last_hidden_state
        logits = model.text_decoder(input_ids=first, encoder_hidden_states=asked).logits[0, -1]
        pair = logits[[vocabulary["yes"], vocabulary["no"]]]
        assert yes == pytest.approx(float(pair.softmax(dim=0)[0]), abs=1e-4)


def test_a_blip_without_yes_and_no_is_refused(blip: Eye, owlv2: Eye) -> None:
    with pytest.raises(ModelError, match="words yes and no"):
        BlipVqaJudge(Eye(blip.model, owlv2.processor))


def test_notes_survive_json_and_a_verdict_follows_from_them(
    owlv2: Eye, clip: Eye, blip: Eye, picture: Image.Image
) -> None:
    judge = Owlv2Judge(owlv2, clip, ["dog", "toy robot", "cat", "bird"])
    for each in (judge, BlipVqaJudge(blip)):
        notes = each.see(picture, PAIR)
        again = json.loads(json.dumps(notes))
        assert again == notes
        assert verdict(each.name, again, PAIR) == verdict(each.name, notes, PAIR)
        said = verdict(each.name, notes, PAIR)
        assert len(said.notes) == len(PAIR.subjects)
        assert said.figures.keys() == judges.FIGURES[each.name].keys()
    assert len(judge.see(picture, PAIR)["others"]) == 2  # of the nouns that PAIR does not name


def test_the_pockets_judge_sees_what_it_always_saw() -> None:
    pixels = np.full((64, 64, 3), 240, np.uint8)
    notes = PocketJudge(load_judge()).see(Image.fromarray(pixels), PAIR)
    assert verdict("pocket", notes, PAIR).faults == ("missing",)
