"""How the spread of pictures is measured, worked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import diversity
from benchmarks.diversity import compared, distances, spread
from benchmarks.quality import models_and_judge
from benchmarks.roster import PLAIN, ROSTER

SQUARE = np.array([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]])


def test_distances_are_euclidean_per_root_of_the_dimensions() -> None:
    gaps = distances(SQUARE) * np.sqrt(2)
    assert gaps == pytest.approx(np.array([[0, 5, 0], [5, 0, 5], [0, 5, 0]]))


def test_a_picture_drawn_twice_is_no_pair() -> None:
    gaps = np.array([[0.0, 5.0], [5.0, 0.0]])
    assert spread(gaps, np.array([0, 1])) == 5
    assert spread(gaps, np.array([0, 0, 1])) == 5


def test_pictures_half_as_far_apart_have_half_the_spread() -> None:
    gaps = distances(np.random.default_rng(0).normal(size=(30, 8)))
    found = compared(gaps, gaps / 2)
    assert [found[name] for name in ("ratio", "low", "high")] == pytest.approx([0.5] * 3)
    assert found["spread"] == pytest.approx(found["ratio"] * compared(gaps, gaps)["spread"])


def test_latents_are_those_of_different_seeds() -> None:
    models, _ = models_and_judge()
    points = diversity.latents(models, ROSTER[PLAIN], 2)
    assert points.shape == (2, 4 * 16 * 16)
    assert distances(points)[0, 1] > 0.1
