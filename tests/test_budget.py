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


def attempts(seed: int) -> Callable[[], Energies]:
    """The energies of one attempt after another; an early look foretells the last one."""
    rng = random.Random(seed)

    def attempt() -> Energies:
        seen = rng.gauss(0, 1)
        return Energies(seen + rng.gauss(0, 1), seen)

    return attempt


def sampled(count: int, seed: int) -> tuple[Energies, ...]:
    attempt = attempts(seed)
    return tuple(attempt() for _ in range(count))


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
    attempt = attempts(2)
    found = mean(cost_of(attempt, limits, WAY, CAP) for _ in range(4000))
    thresholds.cache_clear()
    assert found == pytest.approx(asked, rel=0.05)


@pytest.mark.parametrize("likeness", [0.1, 0.4, 0.7])
def test_the_expected_cost_is_that_of_pictures_played_out(
    likeness: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of pictures of different hardness: the chances of a picture are drawn once."""
    monkeypatch.setattr(budget, "LIKENESS", likeness)
    promising, good, weight = 0.7, 0.6, 1 / likeness - 1
    rng = random.Random(7)

    def picture() -> Callable[[], Energies]:
        chance = rng.betavariate(good * weight, (1 - good) * weight)
        left = (1 - promising) / (1 - good)

        def attempt() -> Energies:
            if rng.random() < chance:
                return Energies(0, 0)
            return Energies(1, 1) if rng.random() < left else Energies(0, 1)

        return attempt

    found = mean(cost_of(picture(), Energies(0, 0), WAY, CAP) for _ in range(8000))
    assert expected_cost(promising, good, WAY, CAP) == pytest.approx(found, abs=0.04)


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
    """60 % are good at once, for 20; 30 % fail early, 10 % late."""
    # Room for 6 more: those that failed early have one round, and all of them cost 26 then.
    assert expected_cost(0.7, 0.6, WAY, 26 / 20) == pytest.approx(0.7 + 0.3 * 26 / 20)
    # Room for 12 more: another one for those that fail early again; one for those that came late.
    chance = 0.6 / (1 + budget.LIKENESS / (1 - budget.LIKENESS))
    early = chance * 26 + (1 - chance) * (0.75 * 32 + 0.25 * 26)
    late = chance * 32 + (1 - chance) * (0.75 * 23 + 0.25 * 32)
    found = expected_cost(0.7, 0.6, WAY, 32 / 20)
    assert found == pytest.approx((0.6 * 20 + 0.3 * early + 0.1 * late) / 20)


def test_no_cap_and_no_way_back_are_counted_too() -> None:
    assert expected_cost(0.5, 0.4, WAY, 1e9) < 1e3
    nowhere = Way(start=(6, 9), again=(0, 0), back=(0, 0), end=5)
    assert expected_cost(0.5, 0.4, nowhere, CAP) == 1


def test_without_a_sample_there_are_thresholds_of_the_pocket() -> None:
    limits = thresholds(UNCALIBRATED, WAY, 1.3, CAP)
    good = shares(UNCALIBRATED, limits)[1]
    assert 0.5 < good < 1
