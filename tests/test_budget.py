"""The mathematics of a budget, held against pictures that are played out one by one."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from statistics import mean

import pytest

import budget
from budget import UNCALIBRATED, Energies, Way, expected_cost, shares, thresholds

WAY = Way(start=(6, 9), again=(6, 9), back=(3, 9), end=5)  # 20 steps: looks at 6 and 15, 12 back
CAP = 4.0


def drawn(count: int, seed: int, alike: float = 0.0) -> list[Callable[[], Energies]]:
    """Pictures of different hardness: each gives the energies of one attempt after another."""
    rng = random.Random(seed)

    def picture() -> Callable[[], Energies]:
        own = rng.gauss(0, 1)

        def attempt() -> Energies:
            seen = math.sqrt(alike) * own + math.sqrt(1 - alike) * rng.gauss(0, 1)
            return Energies(seen + rng.gauss(0, 1), seen)

        return attempt

    return [picture() for _ in range(count)]


def sampled(count: int, seed: int, alike: float = 0.0) -> tuple[Energies, ...]:
    return tuple(picture() for picture in drawn(count, seed, alike))


def cost_of(attempt: Callable[[], Energies], limits: Energies, way: Way, most: float) -> float:
    """One picture through the rounds, as `Painter.anneal` does it; in plain pictures."""
    spent, came = 0, False
    while True:
        first, second = (way.back if came else way.again) if spent else way.start
        if spent and spent + first + second + way.end > most * way.plain:
            return (spent + way.end + (0 if came else way.start[1])) / way.plain
        energies = attempt()
        spent += first
        if energies.early <= limits.early:
            spent, came = spent + second, True
            if energies.last <= limits.last:
                return (spent + way.end) / way.plain


@pytest.mark.parametrize("asked", [1.1, 1.3, 2.0, 3.0])
def test_pictures_cost_their_budget(asked: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of attempts that are independent, as the mathematics then takes them to be."""
    monkeypatch.setattr(budget, "LIKENESS", 0.0)
    thresholds.cache_clear()
    limits = thresholds(sampled(1000, 1), WAY, asked, CAP)
    found = mean(cost_of(picture, limits, WAY, CAP) for picture in drawn(4000, 2))
    thresholds.cache_clear()
    assert found == pytest.approx(asked, rel=0.05)


@pytest.mark.parametrize("asked", [1.3, 2.0])
@pytest.mark.parametrize("alike", [0.0, 0.2, 0.4])
def test_pictures_of_different_hardness_cost_about_their_budget(alike: float, asked: float) -> None:
    limits = thresholds(sampled(1000, 1, alike), WAY, asked, CAP)
    found = mean(cost_of(picture, limits, WAY, CAP) for picture in drawn(4000, 2, alike))
    assert found == pytest.approx(asked, rel=0.1)


@pytest.mark.parametrize(
    "transformed",
    [lambda e: 0.01 * e - 7, lambda e: math.exp(3 * e), lambda e: 100 * e**3 + e],
    ids=["scaled", "exponential", "cubic"],
)
def test_thresholds_are_ranks(transformed: Callable[[float], float]) -> None:
    """Whatever monotone function of the energies is seen, the same pictures pass."""
    sample = sampled(128, 3)
    other = tuple(Energies(*map(transformed, energies)) for energies in sample)
    for asked in (1.1, 1.3, 2.0):
        limits = thresholds(sample, WAY, asked, CAP)
        assert thresholds(other, WAY, asked, CAP) == Energies(*map(transformed, limits))


def test_a_higher_budget_never_asks_for_less() -> None:
    sample = sampled(128, 4)
    found = [thresholds(sample, WAY, asked, CAP).last for asked in (1, 1.1, 1.3, 1.6, 2, 3, 4)]
    assert found == sorted(found, reverse=True)


def test_a_budget_of_one_is_content_with_every_picture_of_the_sample() -> None:
    sample = sampled(64, 5)
    assert shares(sample, thresholds(sample, WAY, 1.0, CAP)) == (1, 1)


def test_the_expected_cost_by_hand() -> None:
    """Room for one round: of those that fail early it costs 6 or 15, of the others 3 or 12."""
    # 60 % good at once (20), 30 % fail early, 10 % late; the cap leaves room for 20 calls more.
    two = expected_cost(0.7, 0.6, WAY, 36 / 20)
    chance = 0.6 / (1 + budget.LIKENESS / (1 - budget.LIKENESS))
    early = chance * 26 + (1 - chance) * (0.75 * 26 + 0.25 * 26)
    late = chance * 32 + (1 - chance) * (0.75 * 23 + 0.25 * 32)
    assert two == pytest.approx((0.6 * 20 + 0.3 * early + 0.1 * late) / 20, rel=0.05)


def test_no_cap_and_no_way_back_are_counted_too() -> None:
    assert expected_cost(0.5, 0.4, WAY, 1e9) < 1e3
    nowhere = Way(start=(6, 9), again=(0, 0), back=(0, 0), end=5)
    assert expected_cost(0.5, 0.4, nowhere, CAP) == 1


def test_without_a_sample_there_are_thresholds_of_the_pocket() -> None:
    limits = thresholds(UNCALIBRATED, WAY, 1.3, CAP)
    good = shares(UNCALIBRATED, limits)[1]
    assert 0.5 < good < 1
