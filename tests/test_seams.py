"""The measure of seams, on pictures made by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.seams import seam
from layouts import Box
from segmentation import NONE, View

HALVES = (Box(0, 0, 0.5, 1), Box(0.5, 0, 1, 1))


def view(pixels: np.ndarray, labels: torch.Tensor) -> View:
    image = Image.fromarray(pixels.astype(np.uint8)).convert("RGB")
    return View(image, torch.zeros(1, 8, 8), labels, torch.eye(1), torch.zeros(1))


def test_a_jump_at_the_border_is_a_seam_and_a_slope_is_none() -> None:
    empty = torch.full((8, 8), NONE)
    slope = np.tile(np.arange(0, 64, 8), (8, 1))
    flat = seam(view(slope, empty), HALVES)
    # 8 across the border; elsewhere 8 in 6 steps of a row, 0 in 7 steps of a column.
    assert flat == pytest.approx(8 / (6 * 8 / (6 + 7)))
    jump = slope + 80 * (np.arange(8) >= 4)
    assert seam(view(jump, empty), HALVES) == pytest.approx(11 * 13 / 6)


def test_only_the_background_counts() -> None:
    labels = torch.full((8, 8), NONE)
    labels[:, 3:5] = 0
    jump = np.tile(200.0 * (np.arange(8) >= 4), (8, 1))
    assert seam(view(jump, labels), HALVES) is None
