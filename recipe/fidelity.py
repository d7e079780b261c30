"""Whether subjects are drawn whole: precision and recall of single subjects against renders.

Kynkäänniemi et al. 2019, arXiv:1904.06991. Around each render lies a ball that reaches to its third
nearest neighbour among the renders; precision is the share of the pictures that lie in any of these
balls, recall the share of renders that lie in a ball round any picture. Features are the judge's
at 4x4, of the subject cut out and brought to one size: where and how large it stands does not
count. The judge's labels do not say whether a cat has one head; where its features lie does.
"""

from __future__ import annotations

import random

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.spatial.distance import cdist

from pocket.images import Pixels, as_tensor
from pocket.judge import BACKGROUND, Judge
from pocket.world import COLOUR_NAMES, Noun
from recipe.data import SIZE, Scene, Studio, scene_of

NEIGHBOURS = 3
MARGIN = 1 / 8  # of the cut-out's side, round the subject
BATCH = 64
Features = NDArray[np.float64]


def precision_recall(renders: Features, pictures: Features) -> tuple[float, float]:
    """Precision and recall, 0..1, of `pictures` (N, D) against `renders` (M, D)."""
    return covered(pictures, renders), covered(renders, pictures)


def covered(points: Features, centres: Features) -> float:
    """Share of `points` (N, D) in a ball round one of `centres` (M, D), M above `NEIGHBOURS`."""
    # Every centre is its own nearest neighbour.
    radii = np.sort(cdist(centres, centres), axis=1)[:, NEIGHBOURS]
    return float((cdist(points, centres) <= radii).any(axis=1).mean())


def features(judge: Judge, images: Pixels) -> Features:
    """Features (N, 2048) of the subjects of `images` (N, 64, 64, 3) uint8."""
    shown = judge.label(images).subject != BACKGROUND  # (N, 32, 32)
    cuts = np.stack([cut_out(*pair) for pair in zip(images, shown, strict=True)])
    parts = [judge.features(as_tensor(cuts[i : i + BATCH])) for i in range(0, len(cuts), BATCH)]
    return torch.cat(parts).flatten(1).double().numpy()


def cut_out(image: Pixels, shown: NDArray[np.bool_]) -> Pixels:
    """The square round the cells of `shown` (32, 32), with a margin, as a picture (64, 64, 3)."""
    rows, columns = (np.flatnonzero(shown.any(axis=axis)) for axis in (1, 0))
    if not len(rows):
        return image
    pixels = SIZE // len(shown)
    low = pixels * np.array([columns[0], rows[0]])
    high = pixels * np.array([columns[-1] + 1, rows[-1] + 1])
    reach = (high - low).max() * (0.5 + MARGIN)
    left, top = np.round((low + high) / 2 - reach).astype(int)
    side = round(2 * reach)
    # A subject at the edge has no margin there: the edge goes on.
    wide = np.pad(image, ((SIZE, SIZE), (SIZE, SIZE), (0, 0)), mode="edge")
    window = wide[SIZE + top : SIZE + top + side, SIZE + left : SIZE + left + side]
    return np.asarray(Image.fromarray(window).resize((SIZE, SIZE), Image.Resampling.BILINEAR))


def single_renders(studio: Studio, subject: str, count: int, name: str) -> Pixels:
    """Renders (count, 64, 64, 3) of the subject in all colours, which no stage trained on."""
    return np.stack(
        [
            studio.render(single_scene(subject, random.Random(f"{name}/{subject}/{i}")))[0]
            for i in range(count)
        ]
    )


def single_scene(subject: str, rng: random.Random) -> Scene:
    return scene_of([Noun(subject, rng.choice(COLOUR_NAMES))], rng)
