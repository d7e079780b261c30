"""The mathematics of a budget, held against pictures that are played out one by one."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import mean

import pytest

from budget import (
    Energies,
    Sample,
    Sampled,
    Stop,
    cut,
    descend,
    end_of,
    passing,
    patience,
    promising,
    thresholds,
)

PLAIN, EARLY, LATE, BACK = 20, 6, 15, 12  # 20 steps: looks at 6 and 15, 12 back
CAP = 4.0
Attempt = Callable[[], Energies]


def picture(seed: int) -> Attempt:
    """The energies of one attempt after another: some pictures are hard, early looks foretell."""
    rng = random.Random(seed)
    hardness = rng.gauss(0, 1)

    def attempt() -> Energies:
        seen = hardness + rng.gauss(0, 1)
        return Energies(math.exp(seen + rng.gauss(0, 1)), math.exp(seen))

    return attempt


def walk(attempt: Attempt, early: float) -> Iterator[Stop]:
    """A picture's stops, from one round to the next, as `Painter.round` comes to them."""
    seen = attempt()
    late, energy = seen.early <= early, seen.last if seen.early <= early else seen.early
    spent = LATE if late else EARLY
    while True:
        step = (LATE if late else EARLY) - BACK if late else 0
        rest = PLAIN - (LATE if late else EARLY)
        dearest = spent + max(PLAIN - step, (LATE if late else EARLY) - step + rest)
        yield Stop(late, energy, spent + rest, dearest)
        seen = attempt()
        if seen.early > early:
            spent += EARLY - step
            energy = energy if late else min(energy, seen.early)
        else:
            spent += LATE - step
            energy = min(energy, seen.last) if late else seen.last
            late = True


def sampled(count: int, first: int = 0, transformed: Callable[[float], float] = float) -> Growing:
    return Growing([picture(first + i) for i in range(count)], transformed)


class Growing:
    """A sample whose pictures walk as far as they are asked to."""

    def __init__(self, attempts: list[Attempt], transformed: Callable[[float], float]) -> None:
        def seen(attempt: Attempt) -> Attempt:
            return lambda: Energies(*map(transformed, attempt()))

        attempts = [seen(attempt) for attempt in attempts]
        firsts = [attempt() for attempt in attempts]
        self.early = promising(firsts)
        self.looks = [
            (Stop(False, first.early, PLAIN, 26), Stop(True, first.last, PLAIN, 32))
            for first in firsts
        ]
        self.walks = [
            walk(replayed(first, attempt), self.early)
            for first, attempt in zip(firsts, attempts, strict=True)
        ]
        self.stops = [[next(walk)] for walk in self.walks]

    @property
    def sample(self) -> Sample:
        pictures = (
            Sampled(looks, tuple(stops[1:]))
            for looks, stops in zip(self.looks, self.stops, strict=True)
        )
        return Sample(PLAIN, self.early, tuple(pictures))

    def walked_to_the_cap(self) -> Sample:
        for walk, stops in zip(self.walks, self.stops, strict=True):
            while stops[-1].most is not None and stops[-1].most <= CAP * PLAIN:
                stops.append(next(walk))
        return self.sample

    def walked(self, budget: float, cap: float = CAP) -> Sample:
        while (i := descend(self.sample, budget, cap).missing) is not None:
            self.stops[i].append(next(self.walks[i]))
        return self.sample


def replayed(first: Energies, attempt: Attempt) -> Attempt:
    known = [first]
    return lambda: known.pop() if known else attempt()


def cost_of(attempt: Attempt, limits: Energies) -> float:
    """One picture by these thresholds, as `Painter.anneal` paints it."""
    for stop in walk(attempt, limits.early):
        good = stop.late and stop.energy <= limits.last
        if good or stop.most is None or stop.most > CAP * PLAIN:
            return stop.cost
    raise AssertionError


@pytest.mark.parametrize("budget", [1.02, 1.1, 1.3, 2.0, 3.0])
def test_the_pictures_of_a_sample_cost_their_budget(budget: float) -> None:
    limits = descend(sampled(64).walked(budget), budget, CAP).limits
    costs = [cost_of(picture(i), limits) for i in range(64)]
    assert max(costs) <= CAP * PLAIN
    more = sum(costs) - budget * PLAIN * 64
    assert 0 <= more <= (CAP - 1) * PLAIN  # to the way of the last one


@pytest.mark.parametrize("budget", [1.1, 1.3, 2.0, 3.0])
def test_others_like_them_cost_it_on_average(budget: float) -> None:
    limits = descend(sampled(2000).walked_to_the_cap(), budget, CAP).limits
    found = mean(cost_of(picture(i), limits) for i in range(5000, 9000)) / PLAIN
    assert found == pytest.approx(budget, rel=0.05)


@pytest.mark.parametrize("budget", [1.02, 1.1, 1.3, 2.0, 3.0])
def test_nobody_walks_further_than_the_thresholds_take_him(budget: float) -> None:
    growing = sampled(64)
    sample = growing.walked(budget)
    limits = descend(sample, budget, CAP).limits
    for each in sample.pictures:
        assert end_of(each.way(sample.early), limits, CAP * PLAIN) == len(each.rounds)


@pytest.mark.parametrize(
    "transformed",
    [lambda e: 0.01 * e, lambda e: e**3, lambda e: e / (1 + e)],
    ids=["scaled", "cubed", "bounded"],
)
def test_thresholds_are_ranks(transformed: Callable[[float], float]) -> None:
    """Whatever monotone function of the energies is seen, the same pictures pass."""
    for asked in (1.05, 1.3, 2.0):
        limits = descend(sampled(64).walked(asked), asked, CAP).limits
        other = descend(sampled(64, 0, transformed).walked(asked), asked, CAP).limits
        assert other == Energies(*map(transformed, limits))


def test_a_sample_tells_of_lower_budgets_and_caps_what_it_would_have_told_then() -> None:
    far = sampled(64).walked(3.0)
    for budget, cap in ((1.05, CAP), (1.3, CAP), (2.0, CAP), (1.3, 2.0)):
        near = descend(sampled(64).walked(budget, cap), budget, cap)
        assert descend(far, budget, cap) == near


def test_a_higher_budget_never_asks_for_less() -> None:
    growing = sampled(64)
    budgets = (1, 1.01, 1.05, 1.1, 1.3, 1.6, 2, 3, 4)
    found = [descend(growing.walked(asked), asked, CAP).limits for asked in budgets]
    assert [each.early for each in found] == sorted((each.early for each in found), reverse=True)
    assert [each.last for each in found] == sorted((each.last for each in found), reverse=True)
    assert found[-1].last == 0  # more than all can spend below the cap: nothing is good enough


def test_a_budget_of_one_is_content_with_every_picture_of_the_sample() -> None:
    sample = sampled(64).sample
    assert passing(sample, descend(sample, 1.0, CAP).limits) == 1


def test_pictures_that_have_nothing_to_gain_are_left_alone() -> None:
    """As those of a single subject, whose energy is 0."""
    still = Sampled((Stop(True, 0.0, PLAIN, 32),), ())
    assert descend(Sample(PLAIN, 0.0, (still,) * 16), 2.0, CAP).missing is None


def test_by_hand() -> None:
    """Two pictures, 10 each; a round costs 4."""
    good = Sampled((Stop(True, 0.2, 10, 14),), (Stop(True, 0.1, 14, 18),))
    bad = Sampled((Stop(True, 0.9, 10, 14),), (Stop(True, 0.5, 14, 18), Stop(True, 0.3, 18, 22)))
    sample = Sample(10, 0.0, (good, bad))
    assert descend(sample, 1.0, 9) == (Energies(0.0, 0.9), None)
    assert descend(sample, 1.2, 9) == (Energies(0.0, 0.5), None)
    assert descend(sample, 1.4, 9) == (Energies(0.0, 0.3), None)
    assert descend(sample, 1.5, 9) == (Energies(0.0, 0.3), 1)  # what becomes of it is not known
    assert descend(sample, 1.5, 2.0) == (Energies(0.0, 0.1), None)  # the bad one stops before 22
    assert descend(sample, 1.7, 2.0) == (Energies(0.0, 0.1), 0)


def test_a_budget_that_was_not_walked_follows_the_ranks_of_another_sample() -> None:
    growing, other = sampled(64), sampled(64, 500).walked(3.0)
    near = growing.walked(1.3)
    reached = descend(near, 1.3, CAP).limits
    assert thresholds(near, 1.3, CAP, other) == reached
    found = [thresholds(near, asked, CAP, other).last for asked in (1.3, 1.6, 2.0, 3.0)]
    assert found == sorted(set(found), reverse=True)
    # What they cost is a guess, but a fair one.
    far = Energies(near.early, found[2])
    costs = [cost_of(picture(i), far) for i in range(64)]
    assert mean(costs) / PLAIN == pytest.approx(2.0, rel=0.2)


def test_who_stopped_at_the_cap_says_nothing_of_a_higher_one() -> None:
    """A higher budget has a higher cap; it must not ask for less because of that."""
    own = replace(sampled(64).walked(3.0, 3.0), cap=3.0)
    found = [thresholds(own, asked, 3 * asked, own).last for asked in (1.3, 1.5, 2.0, 3.0, 4.0)]
    assert found == sorted(found, reverse=True)
    assert found[0] > found[1] > found[2]


def test_what_was_walked_too_far_is_cut_and_the_thresholds_stay() -> None:
    far, near = sampled(64).walked(3.0), sampled(64).walked(1.3)
    limits = descend(near, 1.3, CAP).limits
    assert cut(far, limits, CAP * PLAIN) == near
    assert descend(near, 1.3, CAP) == (limits, None)


def test_patience() -> None:
    """Of pictures that pass by three in four, two in a row fail once in 16 times, three in 64."""
    looks = [(Stop(False, 0.1, 20, 26), Stop(True, i / 4, 20, 32)) for i in range(1, 5)]
    sample = Sample(PLAIN, 1.0, tuple(Sampled(each, ()) for each in looks))
    assert patience(sample, Energies(1.0, 0.75)) == 3
    assert patience(sample, Energies(1.0, 1.0)) == patience(sample, Energies(1.0, 0.0)) == 1
