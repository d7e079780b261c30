"""Where subjects go: boxes, their parts of the latents' grid, and the windows that are painted.

A region is a part of the picture that one subject's prompt paints alone. Of it the denoiser sees a
window: the region and as much around it as makes a picture of a size that it knows. Everything here
is pure; what is painted in regions is in mosaics.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from layouts import Box, Labels

Size = tuple[int, int]  # height and width


class Window(NamedTuple):
    """A rectangle of the latents' grid."""

    top: int
    left: int
    height: int
    width: int

    def of(self, tensor: Tensor) -> Tensor:
        """What of `tensor` (..., h, w) lies in it: a view."""
        rows = slice(self.top, self.top + self.height)
        return tensor[..., rows, self.left : self.left + self.width]

    def share(self, size: Size) -> float:
        """How much of a grid of `size` it is; an evaluation of it costs as much of a whole one."""
        return self.height * self.width / math.prod(size)


@dataclass(frozen=True, eq=False)
class Region:
    """One subject's part of the picture, and the window in which it is painted."""

    mask: Tensor  # (1, 1, h, w) float32, 1 in its part, 0 elsewhere
    window: Window

    @property
    def inside(self) -> Tensor:
        """Its part as the window shows it, (1, 1, height, width)."""
        return self.window.of(self.mask)

    @property
    def box(self) -> Box:
        """The smallest that it fits into."""
        top, bottom = extent(self.mask, -2)
        left, right = extent(self.mask, -1)
        height, width = self.mask.shape[-2:]
        return Box(left / width, top / height, right / width, bottom / height)

    def without(self, taken: Tensor) -> Region:
        """The same but for what is `taken` (1, 1, h, w), unless nothing would be left."""
        left = self.mask * (1 - taken)
        return Region(left if left.any() else self.mask, self.window)


def tiles(count: int, size: Size, draw: Random) -> list[Box]:
    """`count` boxes, as square as they can be, that cover a picture of `size`, in random order.

    They stand in rows or in columns, of lengths that differ by one at most; among ways that are as
    good as each other one is drawn.
    """
    ways = [(rows, turned) for rows in range(1, count + 1) for turned in (False, True)]
    best = min(_stretch(count, size, *way) for way in ways)
    rows, turned = draw.choice(
        [way for way in ways if math.isclose(_stretch(count, size, *way), best)]
    )
    lengths = _lengths(count, rows)
    draw.shuffle(lengths)
    boxes = []
    for row, length in enumerate(lengths):
        top, bottom = row / rows, (row + 1) / rows
        for place in range(length):
            left, right = place / length, (place + 1) / length
            boxes.append(Box(top, left, bottom, right) if turned else Box(left, top, right, bottom))
    draw.shuffle(boxes)
    return boxes


def _lengths(count: int, rows: int) -> list[int]:
    return [count // rows + (row < count % rows) for row in range(rows)]


def _stretch(count: int, size: Size, rows: int, turned: bool) -> float:
    """How far from a square the worst tile is: the logarithm of its sides' ratio."""
    height, width = reversed(size) if turned else size
    return max(abs(math.log(width / length / (height / rows))) for length in _lengths(count, rows))


def masks_of(regions: Sequence[Box] | Labels, count: int, size: Size) -> Tensor:
    """The parts (C, 1, h, w) of the grid that `count` regions cover: 1 or 0.

    Where boxes overlap, the later one is in front.
    """
    if isinstance(regions, Labels):
        return masks_of_labels(torch.tensor(regions.rows), count, size)
    boxes = regions
    height, width = size
    labels = torch.zeros(size, dtype=torch.int64)
    for number, box in enumerate(boxes, start=1):
        top, bottom = _span(box.top, box.bottom, height)
        left, right = _span(box.left, box.right, width)
        labels[top:bottom, left:right] = number
    return masks_of_labels(labels, count, size)


def _span(low: float, high: float, length: int) -> tuple[int, int]:
    """The cells of a side from `low` to `high` (fractions): one at least."""
    first = min(round(low * length), length - 1)
    return first, max(first + 1, round(high * length))


def masks_of_labels(labels: Tensor, count: int, size: Size) -> Tensor:
    """The same of a map (H, W) int64: i + 1 where subject i is to be, 0 where none is."""
    each = torch.stack([(labels == number + 1).float() for number in range(count)])[:, None]
    covered = F.adaptive_avg_pool2d(each, size)
    most = covered.amax(dim=0, keepdim=True)
    return ((covered == most) & (most >= 0.5)).float()


def window_of(mask: Tensor, least: float, multiple: int) -> Window:
    """The window around a part (1, 1, h, w): of `least` the grid's sides, or more if it needs more.

    Its sides are multiples of `multiple`, which the denoiser's own shrinking asks for, or the whole
    grid's; it stands as nearly around the middle of the part as the grid allows.
    """
    spans = []
    for dim in (-2, -1):
        length = mask.shape[dim]
        low, high = extent(mask, dim)
        side = multiple * math.ceil(max(high - low, least * length) / multiple)
        side = min(side, length)
        start = min(max(0, round((low + high - side) / 2)), length - side)
        spans.append((start, side))
    (top, height), (left, width) = spans
    return Window(top, left, height, width)


def extent(mask: Tensor, dim: int) -> tuple[int, int]:
    """From where to where a part (1, 1, h, w) goes along its height (-2) or its width (-1)."""
    there = mask[0, 0].amax(dim=-3 - dim).nonzero().flatten()
    return int(there.min()), int(there.max()) + 1


def seats(seen: Tensor, masks: Tensor, found: Sequence[bool]) -> list[int]:
    """Which of the `masks` (C, 1, h, w) each subject gets, each one a different one.

    A subject that was `found` gets the part where most of it is: of what is `seen` of it (C, h, w).
    The others share what is left, where least of the found ones is. The assignment problem, by
    scipy (Crouse 2016).
    """
    parts = masks.flatten(1)  # (C, h * w)
    here = torch.tensor(list(found), dtype=seen.dtype)[:, None]
    mass = (seen.flatten(1) * here) @ parts.T.to(seen.dtype)  # (C, C): of subject i in part j
    mass = mass / mass.sum(dim=1, keepdim=True).clamp(min=1e-9)
    crowded = mass.sum(dim=0, keepdim=True) * (1 - here) / len(parts)
    _, columns = linear_sum_assignment((crowded - mass).numpy())
    return [int(column) for column in columns]


def compose(base: Tensor, regions: Sequence[Region], parts: Sequence[Tensor]) -> Tensor:
    """`base` (1, channels, h, w) with `parts`, windows' contents, in their regions."""
    whole = base.clone()
    for region, part in zip(regions, parts, strict=True):
        there = region.window.of(whole)
        there.copy_(torch.where(region.inside.to(part.device) > 0, part.to(there), there))
    return whole
