"""Scenes of recoloured emoji on light backgrounds, with the exact mask of every subject.

A scene is drawn from a seeded generator and an index, so any picture can be made again alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from pocket.images import Pixels
from pocket.world import COLOUR_NAMES, COLOURS, SUBJECTS, Noun, caption, seen_pairs
from recipe.packages import STYLES, drawings

SIZE = 64  # pixels
PICTURES = 100_000  # of the training distribution
# Sizes and places are multiples of two latents: a drawing then has the same latents wherever it
# stands, and the U-Net has a fraction of the patterns to learn.
GRID = 8  # pixels
# Range of the longer side of a subject in pixels, by the number of subjects in the picture.
SUBJECT_SIZES = {1: (24, 56), 2: (24, 32), 3: (24, 24)}
# Share of pictures with one, two and three subjects, as in web pictures: most show one.
SUBJECT_COUNTS = {1: 0.70, 2: 0.27, 3: 0.03}
# In the pictures that CLIPSeg learns from: it has to tell apart what stands together.
CROWDED_COUNTS = {1: 0.25, 2: 0.45, 3: 0.30}
UNCOLOURED = (
    0.3  # share of subjects that keep their natural colours, with a caption that names none
)
MAX_OVERLAP = 0.1  # of the smaller bounding box


@dataclass(frozen=True)
class Placed:
    """A subject in a scene: what, in which style, and its box (left, top, longer side), pixels."""

    noun: Noun
    style: str
    mirrored: bool
    left: int
    top: int
    size: int


@dataclass(frozen=True)
class Scene:
    """What a picture shows, and its caption; `top` and `bottom` are the background's colours."""

    placed: tuple[Placed, ...]
    caption: str
    top: tuple[int, ...]
    bottom: tuple[int, ...]


@dataclass(frozen=True)
class Pictures:
    """Rendered scenes: `images` (N, 64, 64, 3) uint8 and `slots` (N, 64, 64) uint8.

    A slot is the number (from 1) of the scene's subject that shows at a pixel, 0 the background.
    """

    scenes: list[Scene]
    images: Pixels
    slots: Pixels


class Studio:
    """Draws subjects in any colour, from the emoji packages in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._drawings = drawings(folder)
        self.sprite = lru_cache(maxsize=None)(self._sprite)

    def _sprite(self, noun: Noun, style: str, mirrored: bool) -> Image.Image:
        image = self._drawings[noun.subject, style]
        if noun.colour:
            image = recolour(image, COLOURS[noun.colour])
        image = image.crop(image.getbbox())
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image

    def cut(self, placed: Placed) -> Image.Image:
        """The subject alone, RGBA, its longer side `placed.size` pixels."""
        sprite = self.sprite(placed.noun, placed.style, placed.mirrored)
        scale = placed.size / max(sprite.size)
        width, height = (max(1, round(side * scale)) for side in sprite.size)
        # Premultiplied resampling keeps transparent pixels' colour out of the edges.
        small = sprite.convert("RGBa").resize((width, height), Image.Resampling.LANCZOS)
        return small.convert("RGBA")

    def render(self, scene: Scene) -> tuple[Pixels, Pixels]:
        """The scene as image (64, 64, 3) and slots (64, 64), both uint8."""
        image = backdrop(scene)
        slots = np.zeros((SIZE, SIZE), np.uint8)
        for slot, placed in enumerate(scene.placed, start=1):
            cut = self.cut(placed)
            image.paste(cut, (placed.left, placed.top), cut)
            alpha = Image.new("L", (SIZE, SIZE))
            alpha.paste(cut.getchannel("A"), (placed.left, placed.top))
            slots[np.asarray(alpha) > 127] = slot
        return np.asarray(image), slots


def recolour(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """Replace the hue of an RGBA drawing: its median luminance becomes `colour`.

    Darker parts go towards a shade of the colour, lighter parts towards a tint, so that the
    drawing stays readable and its mean colour stays nameable.
    """
    pixels = np.asarray(image, np.float32)
    luminance = pixels[..., :3] @ np.array([0.2126, 0.7152, 0.0722], np.float32) / 255  # Rec. 709
    inside = luminance[pixels[..., 3] > 127]
    low, middle, high = np.percentile(inside, [5, 50, 95])
    reach = max(high - middle, middle - low, 0.1)
    ramp = np.clip((luminance - middle) / reach, -1, 1)[..., None]
    target = np.array(colour, np.float32)
    shade, tint = target * 0.55, target + (255 - target) * 0.35
    painted = np.where(ramp < 0, target + ramp * (target - shade), target + ramp * (tint - target))
    return Image.fromarray(
        np.concatenate([painted, pixels[..., 3:]], axis=-1).round().astype(np.uint8), "RGBA"
    )


def backdrop(scene: Scene) -> Image.Image:
    """The light background: a vertical gradient between two near colours."""
    ends = np.array([scene.top, scene.bottom], np.float32)
    ramp = np.linspace(0, 1, SIZE, dtype=np.float32)[:, None]
    rows = (1 - ramp) * ends[0] + ramp * ends[1]
    pixels = np.repeat(rows[:, None, :], SIZE, axis=1)
    return Image.fromarray(pixels.round().astype(np.uint8), "RGB")


def background(rng: random.Random) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two near light colours; light enough for black, tinted enough for white."""
    base = [rng.randint(190, 232) for _ in range(3)]
    return tuple(base), tuple(max(0, value - rng.randint(0, 20)) for value in base)


def training_scene(rng: random.Random) -> Scene:
    """A scene of the training distribution: pairs of subjects come from `seen_pairs` only."""
    count = rng.choices(list(SUBJECT_COUNTS), list(SUBJECT_COUNTS.values()))[0]
    return scene_of([random_noun(subject, rng) for subject in seen_subjects(count, rng)], rng)


def crowded_scene(rng: random.Random) -> Scene:
    """A scene of several subjects: CLIPSeg is not confined to the pairs that the U-Net saw."""
    count = rng.choices(list(CROWDED_COUNTS), list(CROWDED_COUNTS.values()))[0]
    return scene_of([random_noun(subject, rng) for subject in rng.sample(SUBJECTS, count)], rng)


def seen_subjects(count: int, rng: random.Random) -> list[str]:
    """`count` subjects all of whose pairs are seen ones, in random order."""
    pairs = seen_pairs()
    while True:
        chosen = rng.sample(SUBJECTS, count)
        if all(frozenset((a, b)) in pairs for a in chosen for b in chosen if a != b):
            return chosen


def random_noun(subject: str, rng: random.Random) -> Noun:
    return Noun(subject, None if rng.random() < UNCOLOURED else rng.choice(COLOUR_NAMES))


def scene_of(nouns: list[Noun], rng: random.Random) -> Scene:
    """Place `nouns` at random sizes and places that hardly overlap."""
    boxes = place(len(nouns), rng)
    placed = tuple(
        Placed(noun, rng.choice(STYLES), rng.random() < 0.5, *box)
        for noun, box in zip(nouns, boxes, strict=True)
    )
    return Scene(placed, caption(nouns, rng), *background(rng))


def place(count: int, rng: random.Random) -> list[tuple[int, int, int]]:
    """`count` boxes (left, top, side) on the grid inside the picture with little overlap."""
    while True:
        boxes: list[tuple[int, int, int]] = []
        for _ in range(count):
            side = on_grid(*SUBJECT_SIZES[count], rng)
            boxes.append((on_grid(0, SIZE - side, rng), on_grid(0, SIZE - side, rng), side))
        pairs = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i]]
        if all(_overlap(a, b) <= MAX_OVERLAP for a, b in pairs):
            return boxes


def on_grid(low: int, high: int, rng: random.Random) -> int:
    """A multiple of `GRID` from `low` to `high`, both multiples themselves."""
    return GRID * rng.randint(low // GRID, high // GRID)


def _overlap(a: tuple[int, int, int], b: tuple[int, int, int]) -> float:
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[2], b[1] + b[2]) - max(a[1], b[1])
    return max(0, width) * max(0, height) / min(a[2], b[2]) ** 2


def pictures(
    studio: Studio, folder: Path, name: str, count: int, draw: Callable[[random.Random], Scene]
) -> Pictures:
    """Render `count` scenes once into `folder`; scene i depends on `name` and i alone."""
    scenes = [draw(random.Random(f"{name}/{i}")) for i in range(count)]
    path = folder / f"{name}-{count}.npz"
    if not path.exists():
        rendered = [studio.render(scene) for scene in tqdm(scenes, f"render {name}")]
        images, slots = (np.stack(column) for column in zip(*rendered, strict=True))
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, images=images, slots=slots)
        partial.rename(path)
    stored = np.load(path)
    return Pictures(scenes, stored["images"], stored["slots"])
