"""The mathematics of annealing, worked out by hand."""

from __future__ import annotations

import math
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from annealing import cooled_depth, cooled_temperature, depths, gamma_map, keeps, mix_noise
from segmentation import NONE, View


def view(labels: list[list[int]], u: list[float], probabilities: Tensor | None = None) -> View:
    shape = torch.tensor(labels).shape
    return View(
        image=Image.new("RGB", (shape[1], shape[0])),
        probabilities=torch.zeros(len(u), *shape) if probabilities is None else probabilities,
        labels=torch.tensor(labels),
        matrix=torch.eye(len(u), dtype=torch.float64),
        uncertainty=torch.tensor(u, dtype=torch.float64),
    )


def test_mixed_noise_keeps_unit_variance_for_every_gamma() -> None:
    rng = torch.Generator().manual_seed(1)
    eps, fresh = torch.randn(2, 1_000_000, generator=rng)
    for gamma in (0.0, 0.1, 0.5, 0.9, 1.0):
        mixed = mix_noise(eps, fresh, torch.tensor(gamma))
        assert mixed.var().item() == pytest.approx(1, rel=0.01)
    assert torch.equal(mix_noise(eps, fresh, torch.tensor(0.0)), eps)
    assert torch.equal(mix_noise(eps, fresh, torch.tensor(1.0)), fresh)


@pytest.mark.parametrize("background", [0.0, 0.5, 1.0])
def test_gamma_follows_the_uncertainty_of_each_class_and_the_worst_of_them_elsewhere(
    background: float,
) -> None:
    seen = view([[0, 0, 1, 1], [0, 0, 1, 1], [NONE] * 4, [NONE] * 4], [0.5, 2.0])
    found = gamma_map(seen, (2, 2), k=1.5, background=background, by_pixel=False)
    expected = [
        [1 - math.exp(-0.75), 1 - math.exp(-3.0)],
        [1 - math.exp(-3.0 * background)] * 2,
    ]
    assert found.shape == (1, 1, 2, 2)
    np.testing.assert_allclose(found[0, 0], expected, rtol=1e-6)


def test_gamma_by_pixel_follows_each_pixels_own_probabilities() -> None:
    probabilities = torch.tensor([[[0.9, 0.2]], [[0.1, 0.6]]])  # (2, 1, 2)
    seen = view([[0, 1]], [0.0, 0.0], probabilities)
    found = gamma_map(seen, (1, 2), k=2, background=0, by_pixel=True)
    # 1 - exp(-2 u) with u = -log(p (1 - q)) is 1 - (p (1 - q))^2
    np.testing.assert_allclose(found[0, 0], [[1 - 0.81**2, 1 - 0.48**2]], rtol=1e-6)


def test_the_temperature_falls_to_zero_in_the_last_round() -> None:
    assert [cooled_temperature(0.6, number, 4) for number in (1, 2, 3, 4)] == pytest.approx(
        [0.6, 0.4, 0.2, 0]
    )
    assert cooled_temperature(0.6, 1, 1) == 0


def test_rounds_go_back_less_and_less_but_by_a_step_at_least() -> None:
    assert [cooled_depth(8, 0.5, number) for number in (1, 2, 3, 4, 5)] == [8, 4, 2, 1, 1]
    assert [cooled_depth(8, 1.0, number) for number in (1, 2, 3)] == [8, 8, 8]
    assert cooled_depth(0, 1.0, 1) == 0


def test_at_temperature_zero_only_a_lower_energy_is_kept() -> None:
    assert keeps(0.4, 0.5, temperature=0, draw=0.999)
    assert not keeps(0.5, 0.5, temperature=0, draw=0)
    assert not keeps(0.6, 0.5, temperature=0, draw=0)


def test_a_worse_energy_is_kept_as_often_as_metropolis_says() -> None:
    draws = np.random.default_rng(0).random(100_000)
    kept = np.mean([keeps(0.8, 0.5, temperature=0.2, draw=draw) for draw in draws])
    assert kept == pytest.approx(math.exp(-1.5), abs=0.005)  # standard error 0.0013


@pytest.mark.parametrize("backsteps", [0, 1, 7, 12])
@pytest.mark.parametrize("cooling", [0.0, 0.3, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("rounds", [1, 2, 50])
def test_depths_count_every_round_once(backsteps: int, cooling: float, rounds: int) -> None:
    numbers = range(1, rounds + 1)
    one_by_one = Counter(cooled_depth(backsteps, cooling, number) for number in numbers)
    assert dict(depths(backsteps, cooling, rounds)) == one_by_one


def test_as_many_rounds_as_a_number_can_hold_are_counted() -> None:
    found = dict(depths(12, 0.999999, sys.maxsize))
    assert sum(found.values()) == sys.maxsize
    assert list(found) == list(range(12, 0, -1))
