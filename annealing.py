"""The mathematics of annealing: where noise goes, how it is mixed, what a round may keep.

| symbol | name here   | meaning                                                                |
|--------|-------------|------------------------------------------------------------------------|
| u      | uncertainty | of a class or of a pixel, -log(p (1 - q)) (segmentation.py)            |
| gamma  | gamma       | share of fresh noise in eps, per pixel: 1 - exp(-k u)                  |
| E      | energy      | of a picture: what its worst class lacks to stand out (segmentation.py)|
| T      | temperature | what an increase of the energy may cost and still be kept now and then |
| b      | backsteps   | how many steps a round goes back: its depth                            |

Simulated annealing: Kirkpatrick, Gelatt, Vecchi 1983. Everything here is pure.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from segmentation import NONE, SMALLEST, View


def gamma_map(
    view: View, size: tuple[int, int], *, k: float, background: float, by_pixel: bool
) -> Tensor:
    """Share of fresh noise (1, 1, h, w), float32 in 0..1, on the latents' grid `size`.

    gamma = 1 - exp(-k u), with u from `class_uncertainty` or `pixel_uncertainty`. Pixels of no
    class have `background` times the uncertainty of the most uncertain class: where a subject is
    missing, that is where it could be.
    """
    u = pixel_uncertainty(view) if by_pixel else class_uncertainty(view)  # (H, W)
    u = torch.where(view.labels == NONE, background * view.uncertainty.max(), u)
    gamma = 1 - (-k * u).exp()
    return F.adaptive_avg_pool2d(gamma.float()[None, None], size)


def class_uncertainty(view: View) -> Tensor:
    """(H, W) float64: u_i on the pixels of class i; any value on pixels of no class."""
    return view.uncertainty[view.labels.clamp(min=0)]


def pixel_uncertainty(view: View) -> Tensor:
    """(H, W) float64: u of each pixel by itself, p of the likeliest class, q the others' mean."""
    probabilities = view.probabilities.double()  # (C, H, W)
    p = probabilities.amax(dim=0)
    q = (probabilities.sum(dim=0) - p) / max(1, len(probabilities) - 1)
    return -(p * (1 - q)).clamp(min=SMALLEST).log()


def mix_noise(eps: Tensor, fresh: Tensor, gamma: Tensor, scale: float = 1.0) -> Tensor:
    """sqrt(1 - gamma) eps + sqrt(gamma) scale fresh: unit variance for every gamma at scale 1.

    For independent eps and fresh noise of unit variance; as in Noise Diffusion (arXiv:2411.16503).
    """
    return (1 - gamma).sqrt() * eps + gamma.sqrt() * scale * fresh


def cooled_temperature(temperature: float, number: int, rounds: int) -> float:
    """T of round `number`, 1..rounds: falls on a line to 0 in the last one."""
    return temperature * (rounds - number) / max(1, rounds - 1)


def cooled_depth(backsteps: int, cooling: float, number: int) -> int:
    """b of round `number`, 1 or more: each goes back `cooling` times as far as the last."""
    return max(min(1, backsteps), round(backsteps * cooling ** (number - 1)))


def depths(backsteps: int, cooling: float, rounds: int) -> Iterator[tuple[int, int]]:
    """The depths of all rounds, deepest first, each with how many rounds go back so far.

    Depths only ever fall, so bisection finds where; a million rounds are counted in no time.
    """
    numbers, counted = range(1, rounds + 1), 0
    for depth in range(backsteps, -1, -1):
        reached = bisect_right(numbers, -depth, key=lambda n: -cooled_depth(backsteps, cooling, n))
        if reached > counted:
            yield depth, reached - counted
        counted = reached


def keeps(proposed: float, kept: float, temperature: float, draw: float) -> bool:
    """Whether a round's result of energy `proposed` takes the place of one of energy `kept`.

    `draw` is uniform in 0..1. The rule of Metropolis et al. 1953; at temperature 0 only a lower
    energy is kept.
    """
    if proposed < kept:
        return True
    return temperature > 0 and draw < math.exp((kept - proposed) / temperature)
