"""The judge's pictures, with what goes wrong in pictures drawn on purpose, and its training.

It belongs to the laboratory, not to the pocket model: pictures of its own, of all pairs of
subjects. The label of every pixel is known, and what a right verdict says:
    whole       a subject as drawn, or put together from two drawings of that same subject.
    touching    two whole subjects that hide at most a quarter of each other: nothing is fused.
    fused       half this and half that, this with a patch of that, two that shine through one
                another, a smear in which no subject can be recognised: `HYBRID` all over.
    two colours at least a third of a whole subject has another colour: its colour is wrong.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from pocket.images import Pixels, as_pixels, as_tensor
from pocket.judge import (
    BACKGROUND,
    HYBRID,
    NATURAL,
    NO_COLOUR,
    WEIGHTS,
    Judge,
    Verdict,
    label_of,
    verdict,
)
from pocket.judgenet import SUBJECT_LABELS, JudgeNet
from pocket.world import COLOUR_NAMES, SUBJECTS, Noun
from recipe.augment import between, worn
from recipe.data import (
    SIZE,
    SUBJECT_SIZES,
    Placed,
    Scene,
    Studio,
    backdrop,
    background,
    place,
    random_noun,
)
from recipe.packages import STYLES
from recipe.training import Plan, bf16, first_alone, fit

PLAN = Plan(steps=16_000, batch=64, lr=2e-3, ema=0.995, seed=4)
PICTURES = 40_000
# Nine cells in ten are background; at full weight the subjects are never learnt.
BACKGROUND_WEIGHT = 0.15

TOUCHING = (0.02, 0.25)  # share of the smaller subject's pixels that both subjects cover
OVERLAPPED = (0.5, 0.9)  # the same for two that shine through one another
MINOR_SHARE = 1 / 3  # what the smaller part of a thing of two parts covers at least
# Mean difference (of 255) up to which a natural drawing may as well be called a recoloured one.
SAME_COLOUR = 36

Floats = NDArray[np.floating[Any]]
Mask = NDArray[np.bool_]
# A round trip of images (N, 3, 64, 64) in -1..1 through the networks that paint them.
Degrade = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Truth:
    """What a right verdict says; None is not counted."""

    missing: bool | None = False
    wrong_colour: bool | None = False
    fused: bool | None = False

    def agrees(self, said: Verdict) -> bool:
        return all(
            getattr(self, field.name) in (None, getattr(said, field.name)) for field in fields(self)
        )


OK = Truth()
MISSING = Truth(missing=True)
WRONG_COLOUR = Truth(wrong_colour=True)
# Of fused subjects nobody can say whether they are there, nor in which colour.
FUSED = Truth(missing=None, wrong_colour=None, fused=True)


@dataclass(frozen=True)
class Piece:
    """Something to paste: an RGBA cut and the labels of its pixels, (h, w) uint8 each."""

    cut: Image.Image
    subject: Pixels
    colour: Pixels


@dataclass(frozen=True)
class Render:
    """A picture (64, 64, 3), its label maps (64, 64), what was asked of it, and the truth."""

    image: Pixels
    subject: Pixels
    colour: Pixels
    nouns: tuple[Noun, ...]
    truth: Truth


Maker = Callable[[int], Piece]  # of a piece whose longer side is at most so many pixels
# The second part's share, 0..1, at each pixel of a box (h, w).
Shares = Callable[[tuple[int, int], random.Random], Floats]


def compose(
    pieces: Sequence[tuple[Piece, int, int]],
    nouns: Sequence[Noun],
    truth: Truth,
    rng: random.Random,
) -> Render:
    """Paste pieces at (left, top) in order; later ones hide earlier ones."""
    image = backdrop(Scene((), "", *background(rng)))
    subject = np.full((SIZE, SIZE), BACKGROUND, np.uint8)
    colour = np.full((SIZE, SIZE), NO_COLOUR, np.uint8)
    for piece, left, top in pieces:
        image.paste(piece.cut, (left, top), piece.cut)
        inside = solid(piece.cut)
        height, width = inside.shape
        window = np.s_[top : top + height, left : left + width]
        subject[window][inside] = piece.subject[inside]
        colour[window][inside] = piece.colour[inside]
    return Render(np.asarray(image), subject, colour, tuple(nouns), truth)


def spread(
    makers: Sequence[Maker], nouns: Sequence[Noun], truth: Truth, rng: random.Random
) -> Render:
    """A picture of pieces that hardly overlap, of the sizes that the pocket model was shown."""
    boxes = place(len(makers), rng)
    pieces = [
        (make(side), left, top) for make, (left, top, side) in zip(makers, boxes, strict=True)
    ]
    return compose(pieces, nouns, truth, rng)


def solid(cut: Image.Image) -> Mask:
    """The pixels that count as the cut's own, as in `Studio.render`."""
    return np.asarray(cut.getchannel("A")) > 127


def uniform(cut: Image.Image, subject: int, colour: int) -> Piece:
    """A piece that has one label all over."""
    shape = cut.height, cut.width
    return Piece(cut, np.full(shape, subject, np.uint8), np.full(shape, colour, np.uint8))


# --- Subjects as they should be.


def random_nouns(count: int, rng: random.Random) -> list[Noun]:
    return [random_noun(subject, rng) for subject in rng.sample(SUBJECTS, count)]


def posed(noun: Noun, side: int, rng: random.Random) -> Placed:
    """The noun in a random style, facing a random way."""
    return Placed(noun, rng.choice(STYLES), rng.random() < 0.5, 0, 0, side)


def whole(studio: Studio, noun: Noun, rng: random.Random) -> Maker:
    """The noun as it is drawn."""

    def make(side: int) -> Piece:
        look = posed(noun, side, rng)
        return uniform(studio.cut(look), label_of(noun.subject), colour_label(studio, look))

    return make


def colour_label(studio: Studio, look: Placed) -> int:
    if look.noun.colour is None:
        return natural_label(studio, look.noun.subject, look.style)
    return COLOUR_NAMES.index(look.noun.colour)


@functools.cache
def natural_label(studio: Studio, subject: str, style: str) -> int:
    """`NATURAL`, or `NO_COLOUR` for a drawing that some colour hardly changes: a red apple.

    What can not be told apart is not taught: such a drawing passes for either.
    """
    natural = studio.sprite(Noun(subject), style, False)
    pixels = np.asarray(natural, np.float32)[solid(natural), :3]
    for colour in COLOUR_NAMES:
        painted = studio.sprite(Noun(subject, colour), style, False)
        change = np.abs(np.asarray(painted, np.float32)[solid(natural), :3] - pixels)
        if change.mean() < SAME_COLOUR:
            return NO_COLOUR
    return NATURAL


def several(count: int, studio: Studio, rng: random.Random) -> Render:
    nouns = random_nouns(count, rng)
    return spread([whole(studio, noun, rng) for noun in nouns], nouns, OK, rng)


def touching(studio: Studio, rng: random.Random) -> Render:
    """Two subjects, one a little in front of the other."""
    nouns = random_nouns(2, rng)
    sides = [rng.randint(*SUBJECT_SIZES[2]) for _ in nouns]
    pieces = [whole(studio, noun, rng)(side) for noun, side in zip(nouns, sides, strict=True)]
    places = overlapping([solid(piece.cut) for piece in pieces], SIZE, TOUCHING, rng)
    if places is None:
        return touching(studio, rng)
    return compose([(piece, *at) for piece, at in zip(pieces, places, strict=True)], nouns, OK, rng)


def overlapping(
    masks: Sequence[Mask], side: int, share: tuple[float, float], rng: random.Random
) -> list[tuple[int, int]] | None:
    """Two places (left, top) in a square where the smaller mask is covered by `share`, if found."""
    for _ in range(100):
        places = [
            (rng.randint(0, side - mask.shape[1]), rng.randint(0, side - mask.shape[0]))
            for mask in masks
        ]
        covered = np.zeros((side, side), np.uint8)
        for mask, (left, top) in zip(masks, places, strict=True):
            covered[top : top + mask.shape[0], left : left + mask.shape[1]] += mask
        both = (covered == 2).sum() / min(mask.sum() for mask in masks)
        if share[0] <= both <= share[1]:
            return places
    return None


def extra(studio: Studio, rng: random.Random) -> Render:
    """One subject more than was asked for."""
    nouns = random_nouns(rng.choice((2, 3)), rng)
    return spread([whole(studio, noun, rng) for noun in nouns], nouns[:-1], OK, rng)


def two_styles(studio: Studio, rng: random.Random) -> Render:
    """A subject put together from two drawings of it: a generative model mixes styles freely."""
    noun, other = random_nouns(2, rng)

    def make(side: int) -> Piece:
        mirrored = rng.random() < 0.5
        looks = [Placed(noun, style, mirrored, 0, 0, side) for style in rng.sample(STYLES, 2)]
        cut, _ = mixed(studio, looks, rng.choice((halves, veil)), rng)
        labels = {colour_label(studio, look) for look in looks}
        colour = labels.pop() if len(labels) == 1 else NO_COLOUR
        return uniform(cut, label_of(noun.subject), colour)

    makers = [make, whole(studio, other, rng)]
    return spread(makers, [noun, other], OK, rng)


# --- Subjects that are not there, or not in their colour.


def missing(studio: Studio, rng: random.Random) -> Render:
    """Of two subjects only one is there: alone, twice, or beside a stranger."""
    asked, neglected, stranger = random_nouns(3, rng)
    shown = rng.choice(([asked], [asked, asked], [asked, stranger]))
    makers = [whole(studio, noun, rng) for noun in shown]
    return spread(makers, [asked, neglected], MISSING, rng)


def wrong_colour(studio: Studio, rng: random.Random) -> Render:
    """Two subjects have exchanged their colours, or one has lent its colour to the other."""
    names = rng.sample(SUBJECTS, 2)
    first, second = rng.sample(COLOUR_NAMES, 2)
    shown = rng.choice(((second, first), (first, first), (second, second)))
    makers = [whole(studio, Noun(*pair), rng) for pair in zip(names, shown, strict=True)]
    asked = [Noun(names[0], first), Noun(names[1], second)]
    return spread(makers, asked, WRONG_COLOUR, rng)


def two_colours(studio: Studio, rng: random.Random) -> Render:
    """A subject that has its colour only in part, alone or beside another."""
    noun, other = random_nouns(2, rng)
    ours, theirs = rng.sample(COLOUR_NAMES, 2)

    def make(side: int) -> Piece:
        look = posed(Noun(noun.subject, ours), side, rng)
        twin = Placed(Noun(noun.subject, theirs), look.style, look.mirrored, 0, 0, side)
        cut, share = mixed(studio, (look, twin), rng.choice((halves, blotches)), rng)
        piece = uniform(cut, label_of(noun.subject), COLOUR_NAMES.index(ours))
        piece.colour[share > 0.5] = COLOUR_NAMES.index(theirs)
        return piece

    beside = rng.choice(([], [other]))
    makers = [make, *(whole(studio, noun, rng) for noun in beside)]
    return spread(makers, [Noun(noun.subject, ours), *beside], WRONG_COLOUR, rng)


# --- Things that are no one subject.


def fused(
    hybrid: Callable[[Studio, Noun, Noun, random.Random], Maker], studio: Studio, rng: random.Random
) -> Render:
    """A thing made of two subjects, alone, beside one of the two, or beside a stranger."""
    first, second, stranger = random_nouns(3, rng)
    if first.colour and rng.random() < 0.3:  # often the colour leaks as well
        second = Noun(second.subject, first.colour)
    beside = rng.choice(([], [], [first], [stranger]))
    makers = [hybrid(studio, first, second, rng), *(whole(studio, noun, rng) for noun in beside)]
    return spread(makers, [first, second], FUSED, rng)


def blend_of(
    share: Shares,
    studio: Studio,
    first: Noun,
    second: Noun,
    rng: random.Random,
) -> Maker:
    """Two subjects in one outline: `share` of the second at each pixel."""

    def make(side: int) -> Piece:
        looks = posed(first, side, rng), posed(second, side, rng)
        cut, _ = mixed(studio, looks, share, rng)
        return uniform(cut, HYBRID, NO_COLOUR)

    return make


def mixed(
    studio: Studio, looks: Sequence[Placed], share: Shares, rng: random.Random
) -> tuple[Image.Image, Floats]:
    """Two drawings stretched to one box and mixed; also the second's share at each pixel."""
    sprites = [studio.sprite(look.noun, look.style, look.mirrored) for look in looks]
    # Each with its longer side 1; the box has their mean proportions.
    sides = np.mean([np.divide(sprite.size, max(sprite.size)) for sprite in sprites], axis=0)
    width, height = (max(1, round(side)) for side in sides / sides.max() * looks[0].size)
    a, b = (stretched(sprite, width, height) for sprite in sprites)
    while True:
        weights = share((height, width), rng)
        cut = to_cut(a + (b - a) * weights[..., None])
        part = (weights[solid(cut)] > 0.5).mean()
        if np.ptp(weights) == 0 or MINOR_SHARE <= part <= 1 - MINOR_SHARE:
            return cut, weights


def stretched(sprite: Image.Image, width: int, height: int) -> Floats:
    """The sprite as premultiplied RGBA (h, w, 4), 0..255: colours that can be mixed."""
    small = sprite.convert("RGBa").resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(small, np.float32)


def to_cut(premultiplied: Floats) -> Image.Image:
    height, width, _ = premultiplied.shape
    pixels = premultiplied.round().astype(np.uint8)
    return Image.frombytes("RGBa", (width, height), pixels.tobytes()).convert("RGBA")


def halves(shape: tuple[int, int], rng: random.Random) -> Floats:
    """1 on one side of a line near the middle, 0 on the other, with a hard or a soft seam."""
    y, x = coordinates(shape)
    angle = rng.uniform(0, 2 * math.pi)
    distance = x * math.cos(angle) + y * math.sin(angle) - rng.uniform(-0.25, 0.25)
    return seam(distance, rng)


def blotches(shape: tuple[int, int], rng: random.Random) -> Floats:
    """1 in the large blotches of a smooth random field, 0 elsewhere."""
    coarse = np.random.default_rng(rng.getrandbits(64)).standard_normal((4, 4), np.float32)
    field = Image.fromarray(coarse).resize(shape[::-1], Image.Resampling.BICUBIC)
    return seam(np.asarray(field), rng)


def patch(shape: tuple[int, int], rng: random.Random) -> Floats:
    """1 in an ellipse that covers about half of the box, 0 outside."""
    y, x = coordinates(shape)
    x, y = ((axis - rng.uniform(-0.3, 0.3)) / rng.uniform(0.6, 0.9) for axis in (x, y))
    return seam(1 - np.hypot(x, y), rng)


def veil(shape: tuple[int, int], rng: random.Random) -> Floats:
    """The same share everywhere: one drawing shines through the other."""
    return np.full(shape, rng.uniform(0.35, 0.65))


def coordinates(shape: tuple[int, int]) -> tuple[Floats, Floats]:
    """y and x of the pixels, -1..1."""
    height, width = shape
    y, x = np.ogrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    return y, x


def seam(distance: Floats, rng: random.Random) -> Floats:
    """0..1 across the zero of `distance`; at most a third of the box is transition."""
    width = rng.uniform(0.05, 0.6)
    return np.asarray(np.clip(0.5 + distance / width, 0, 1))


def grown_together(studio: Studio, first: Noun, second: Noun, rng: random.Random) -> Maker:
    """Two outlines that cover each other by half or more, the front one translucent there."""

    def make(side: int) -> Piece:
        while True:
            cuts = [studio.cut(posed(n, round(0.85 * side), rng)) for n in (first, second)]
            places = overlapping([solid(cut) for cut in cuts], side, OVERLAPPED, rng)
            if places is not None:
                break
        behind, front = (np.zeros((side, side, 4), np.float32) for _ in cuts)
        for layer, cut, (left, top) in zip((behind, front), cuts, places, strict=True):
            layer[top : top + cut.height, left : left + cut.width] = np.asarray(cut.convert("RGBa"))
        opacity = 1 - rng.uniform(0.3, 0.6) * behind[..., 3:] / 255
        front *= opacity
        return uniform(to_cut(front + behind * (1 - front[..., 3:] / 255)), HYBRID, NO_COLOUR)

    return make


def smear(studio: Studio, first: Noun, second: Noun, rng: random.Random) -> Maker:
    """A shapeless thing with the subjects' colours and scraps of them in no order."""

    def make(side: int) -> Piece:
        looks = posed(first, side, rng), posed(second, side, rng)
        cut, _ = mixed(studio, looks, rng.choice((halves, blotches, patch)), rng)
        texture = Image.new("RGB", cut.size, mean_colour(cut))
        texture.paste(cut, mask=cut)
        texture = shuffled(texture, rng).filter(ImageFilter.GaussianBlur(rng.uniform(1, 3)))
        outline = Image.fromarray((blob(texture.size[::-1], rng) * 255).astype(np.uint8))
        texture.putalpha(outline)
        return uniform(texture, HYBRID, NO_COLOUR)

    return make


def mean_colour(cut: Image.Image) -> tuple[int, ...]:
    return tuple(np.asarray(cut)[solid(cut), :3].mean(axis=0).astype(int).tolist())


def shuffled(image: Image.Image, rng: random.Random) -> Image.Image:
    """The image with its 3x3 tiles in another order."""
    width, height = (side // 3 for side in image.size)
    corners = [(x * width, y * height) for x in range(3) for y in range(3)]
    result = image.copy()
    for corner, (left, top) in zip(corners, rng.sample(corners, len(corners)), strict=True):
        result.paste(image.crop((left, top, left + width, top + height)), corner)
    return result


def blob(shape: tuple[int, int], rng: random.Random) -> Floats:
    """1 inside a random smooth outline around the middle, 0 outside."""
    y, x = coordinates(shape)
    angle = np.arctan2(y, x)
    radius = 0.7 + sum(
        rng.uniform(0, 0.3 / waves) * np.cos(waves * angle + rng.uniform(0, 2 * math.pi))
        for waves in (2, 3, 4, 5)
    )
    return np.clip(0.5 + (radius - np.hypot(x, y)) / rng.uniform(0.1, 0.4), 0, 1)


# --- The pictures to train on.

Kind = Callable[[Studio, random.Random], Render]
# Name of a kind of picture -> its share of the training pictures, and how to draw one.
KINDS: dict[str, tuple[float, Kind]] = {
    "one subject": (0.10, functools.partial(several, 1)),
    "two subjects": (0.17, functools.partial(several, 2)),
    "three subjects": (0.06, functools.partial(several, 3)),
    "touching": (0.12, touching),
    "two styles": (0.07, two_styles),
    "extra subject": (0.02, extra),
    "missing subject": (0.04, missing),
    "wrong colour": (0.04, wrong_colour),
    "two colours": (0.11, two_colours),
    "halves": (0.07, functools.partial(fused, functools.partial(blend_of, halves))),
    "blotches": (0.04, functools.partial(fused, functools.partial(blend_of, blotches))),
    "patch": (0.04, functools.partial(fused, functools.partial(blend_of, patch))),
    "ghost": (0.04, functools.partial(fused, functools.partial(blend_of, veil))),
    "grown together": (0.05, functools.partial(fused, grown_together)),
    "smear": (0.03, functools.partial(fused, smear)),
}


@dataclass(frozen=True)
class Lessons:
    """Rendered pictures (N, 64, 64, 3) and their label maps (N, 64, 64), all uint8."""

    images: Pixels
    subject: Pixels
    colour: Pixels


def lessons(
    studio: Studio, folder: Path, name: str, count: int, degrade: Degrade | None = None
) -> Lessons:
    """Render `count` pictures once into `folder`; every other one goes through `degrade`."""
    path = folder / f"{name}-{count}{'-repainted' if degrade else ''}.npz"
    if not path.exists():
        renders = [
            training_render(studio, random.Random(f"{name}/{i}"))
            for i in tqdm(range(count), f"render {name}")
        ]
        images = np.stack([render.image for render in renders])
        if degrade:
            images[1::2] = round_trip(images[1::2], degrade)
        partial = path.with_suffix(".partial.npz")
        np.savez(
            partial,
            images=images,
            subject=np.stack([render.subject for render in renders]),
            colour=np.stack([render.colour for render in renders]),
        )
        partial.rename(path)
    stored = np.load(path)
    return Lessons(stored["images"], stored["subject"], stored["colour"])


def training_render(studio: Studio, rng: random.Random) -> Render:
    shares, draws = zip(*KINDS.values(), strict=True)
    draw: Kind = rng.choices(draws, shares)[0]
    return draw(studio, rng)


def round_trip(images: Pixels, degrade: Degrade, batch: int = 50) -> Pixels:
    """The images after `degrade`."""
    parts = []
    for start in tqdm(range(0, len(images), batch), "degrade"):
        with torch.no_grad():
            parts.append(as_pixels(degrade(as_tensor(images[start : start + batch]))))
    return np.concatenate(parts)


# --- Training.


def train_judge(
    studio: Studio, work: Path, plan: Plan = PLAN, degrade: Degrade | None = None
) -> JudgeNet:
    """Train from nothing on pictures rendered into `work`; a later call goes on where it ended."""
    data = first_alone(lambda: lessons(studio, work, "judge", PICTURES, degrade))
    weights = torch.ones(SUBJECT_LABELS)
    weights[BACKGROUND] = BACKGROUND_WEIGHT

    def loss(net: nn.Module, rng: torch.Generator) -> Tensor:
        picks = torch.randint(len(data.images), (plan.share,), generator=rng).numpy()
        x, subject, colour = augmented(
            as_tensor(data.images[picks]),
            torch.from_numpy(data.subject[picks]),
            torch.from_numpy(data.colour[picks]),
            rng,
        )
        with bf16():
            subject_logits, colour_logits = net(x.contiguous(memory_format=torch.channels_last))
        return F.cross_entropy(subject_logits.float(), subject, weights) + F.cross_entropy(
            colour_logits.float(), colour, ignore_index=NO_COLOUR
        )

    net = fit("judge", JudgeNet(), loss, plan, work)
    assert isinstance(net, JudgeNet)
    return net


def augmented(
    images: Tensor, subject: Tensor, colour: Tensor, rng: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """A batch warped, softened, recast and noisy; its labels on the judge's grid, int64."""
    grid = warp(len(images), rng)  # (B, 64, 64, 2)
    x = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    maps = torch.stack([subject, colour], dim=1).float()  # (B, 2, 64, 64)
    cells = F.avg_pool2d(grid.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)  # (B, 32, 32, 2)
    labels = F.grid_sample(
        maps, cells, mode="nearest", padding_mode="border", align_corners=False
    ).long()
    return worn(x, rng), labels[:, 0], labels[:, 1]


def warp(count: int, rng: torch.Generator) -> Tensor:
    """Where each pixel looks: mirrored, turned, scaled, shifted, and bent a little."""
    mirror = torch.randint(2, (count,), generator=rng) * 2.0 - 1
    turn = between(-0.15, 0.15, (count,), rng)  # radians
    scale = between(0.9, 1.1, (count, 1, 1), rng)
    axes = torch.stack([turn.cos(), -turn.sin(), turn.sin(), turn.cos()], dim=1)
    matrix = axes.view(count, 2, 2) * scale
    matrix[:, 0] = matrix[:, 0] * mirror[:, None]
    shift = between(-0.1, 0.1, (count, 2, 1), rng)
    grid = F.affine_grid(
        torch.cat([matrix, shift], dim=2), [count, 3, SIZE, SIZE], align_corners=False
    )
    bend = torch.randn(count, 2, 5, 5, generator=rng) * between(0, 0.05, (count, 1, 1, 1), rng)
    bend = F.interpolate(bend, size=(SIZE, SIZE), mode="bicubic", align_corners=True)
    return grid + bend.permute(0, 2, 3, 1)


def export_judge(net: JudgeNet, path: Path = WEIGHTS) -> None:
    """Write the weights as fp16 safetensors, where `load_judge` finds them."""
    state = {
        name: (value.half() if value.is_floating_point() else value).contiguous()
        for name, value in net.state_dict().items()
    }
    save_file(state, path)


# --- How well it judges.


def measure_judge(
    judge: Judge, studio: Studio, count: int, seed: int, degrade: Degrade | None = None
) -> dict[str, object]:
    """Judge about `count` held-out pictures, equally many of each kind.

    right: share of pictures whose verdict is right in every part; `right_by_kind` likewise.
    confusion: pictures by what they show (rows) and by the verdict (columns).
    subject_cells, colour_cells: share of the subjects' cells whose label is right.
    """
    each = max(1, count // len(KINDS))
    renders = [
        (kind, draw(studio, random.Random(f"judge-held-out/{seed}/{kind}/{i}")))
        for kind, (_, draw) in KINDS.items()
        for i in range(each)
    ]
    images = np.stack([render.image for _, render in renders])
    if degrade:
        images = round_trip(images, degrade)
    labels = judge.label(images)
    right: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    confusion = {row: dict.fromkeys(CATEGORIES, 0) for row in CATEGORIES}
    for (kind, render), seen, painted in zip(renders, labels.subject, labels.colour, strict=True):
        said = verdict(seen, painted, render.nouns)
        right[kind].append(render.truth.agrees(said))
        confusion[category(render.truth)][category(said)] += 1
    # A cell is 2x2 pixels; its lower right one stands for it.
    subject = np.stack([render.subject[1::2, 1::2] for _, render in renders])
    colour = np.stack([render.colour[1::2, 1::2] for _, render in renders])
    return {
        "pictures": len(renders),
        "right": float(np.mean(list(right.values()))),
        "right_by_kind": {kind: float(np.mean(row)) for kind, row in right.items()},
        "confusion": confusion,
        "subject_cells": agreement(subject, labels.subject, subject != BACKGROUND),
        "colour_cells": agreement(colour, labels.colour, colour != NO_COLOUR),
    }


CATEGORIES = ("ok", "missing", "wrong colour", "fused")


def category(found: Truth | Verdict) -> str:
    """The gravest fault: what is fused can not be found, what is missing has no colour."""
    if found.fused:
        return "fused"
    if found.missing:
        return "missing"
    return "wrong colour" if found.wrong_colour else "ok"


def agreement(truth: Pixels, found: Pixels, where: Mask) -> float:
    return float((truth == found)[where].mean())
