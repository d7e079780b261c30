"""The mathematics of a budget: at which energies to stop, so that a picture costs so much.

An energy means something only beside other energies of the same model, CLIPSeg and sampler. So a
threshold is a rank: an energy of a sample of plain pictures. What follows from it stays the same
under every monotone transformation of the energies.

| symbol | name here | meaning                                                             |
|--------|-----------|---------------------------------------------------------------------|
| a      | promising | share of the sample that passes the early look                      |
| s      | good      | share that passes it, and is good enough at the last look           |
| rho    | LIKENESS  | how much alike the attempts at one picture are, 0..1                |

Costs are evaluations of the denoiser; a budget is in plain pictures. Everything here is pure.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple


class Energies(NamedTuple):
    """Energies at the early look and at the last one: of a plain picture, or as thresholds."""

    early: float
    last: float


# Pictures differ in how hard they are: of one that has failed the next attempt is likelier to fail,
# too. Correlation of two attempts at one picture, as measured on the pocket.
LIKENESS = 0.4
ALWAYS = 0.0  # as an energy at the early look where there is none: everything passes it
# Where there is no sample: plain pictures of the pocket (guidance 4). The energy has no scale, so
# other models' are not quite different.
_POCKETS = (
    (0.09, 0.03), (0.28, 0.05), (0.13, 0.05), (0.18, 0.06), (0.04, 0.06), (0.04, 0.06),
    (0.24, 0.07), (0.12, 0.07), (0.14, 0.07), (0.27, 0.08), (0.16, 0.08), (0.14, 0.09),
    (0.32, 0.09), (0.65, 0.10), (0.97, 0.10), (0.11, 0.11), (0.22, 0.11), (0.15, 0.12),
    (0.30, 0.12), (0.41, 0.13), (0.40, 0.14), (0.15, 0.15), (0.28, 0.17), (0.65, 0.18),
    (0.19, 0.29), (0.78, 0.36), (0.84, 0.45), (0.82, 0.72), (0.78, 0.77), (0.89, 0.79),
    (0.72, 0.84), (0.93, 0.89),
)  # fmt: skip
UNCALIBRATED = tuple(Energies(*each) for each in _POCKETS)
# Who has no sample of their own, doubts these when attempts fail that together are as unlikely to.
DOUBT = 0.05
CHOICES = 32  # of early thresholds that are tried
MOST_ROUNDS = 64  # that are foretold: few pictures are left by then


THRESHOLDS = ("accept", "early_accept")  # the settings that follow from a budget


@dataclass(frozen=True)
class Way:
    """What the stretches of a picture's way cost, in evaluations of the denoiser.

    Each is to the early look, and from there to the last one: of the plain picture, of a round of a
    picture that was left at the early look, and of one that came to the last.
    """

    start: tuple[int, int]
    again: tuple[int, int]
    back: tuple[int, int]
    end: int  # from the last look to the finished picture

    @property
    def plain(self) -> int:
        return sum(self.start) + self.end


@lru_cache
def thresholds(sample: tuple[Energies, ...], way: Way, budget: float, max_cost: float) -> Energies:
    """The lowest energies to ask for, so that a picture costs `budget` plain ones on average.

    No picture costs more than `max_cost` plain ones. Of all early thresholds each last one has that
    which makes it cheapest; of all last ones the lowest is taken that the budget pays for.
    """
    early = sorted({energies.early for energies in sample})
    early = early[len(early) - 1 :: -max(1, len(early) // CHOICES)]  # the highest first

    def cheapest(last: float) -> tuple[float, Energies]:
        tried = [Energies(each, last) for each in early]
        costs = [expected_cost(*shares(sample, each), way, max_cost) for each in tried]
        best = min(range(len(tried)), key=costs.__getitem__)
        return costs[best], tried[best]

    last = sorted({energies.last for energies in sample})
    # The more is asked for, the more it costs: bisection finds what the budget still pays for.
    number = bisect_left(last[:-1], -budget, key=lambda each: -cheapest(each)[0])
    return cheapest(last[number])[1]


def shares(sample: Sequence[Energies], limits: Energies) -> tuple[float, float]:
    """Of a sample the share that passes the early look, and the share that passes both."""
    promising = [energies for energies in sample if energies.early <= limits.early]
    good = sum(energies.last <= limits.last for energies in promising)
    return len(promising) / len(sample), good / len(sample)


def patience(limits: Energies) -> int:
    """How many attempts at one picture may fail, before thresholds without a sample are doubted.

    Were the pictures like the pocket's, a good one would have come with a probability of 1 - DOUBT.
    """
    good = shares(UNCALIBRATED, limits)[1]
    return math.ceil(math.log(DOUBT) / math.log(1 - good)) if 0 < good < 1 else 1


def expected_cost(promising: float, good: float, way: Way, max_cost: float) -> float:
    """What a picture costs on average, in plain ones.

    Every round is an attempt like the plain picture's own; attempts at one picture are alike: their
    chances are spread over the pictures as a beta distribution, of mean `good` and correlation
    `LIKENESS` (Weinberg & Gladen 1986, the beta-geometric distribution).
    """
    if good == 1 or not (way.again[0] and way.back[0]):  # going back by no step is no round
        return 1.0
    cap = max_cost * way.plain
    left, late = (1 - promising) / (1 - good), (promising - good) / (1 - good)
    likeness = LIKENESS / (1 - LIKENESS)
    total = good * way.plain
    # The share of the pictures that are not good yet, by whether they came to the last look and
    # what they have cost.
    waiting = {(False, way.start[0]): 1 - promising, (True, sum(way.start)): promising - good}
    for failures in range(1, MOST_ROUNDS + 1):
        chance = good / (1 + failures * likeness)
        ahead: defaultdict[tuple[bool, int], float] = defaultdict(float)
        for (came, spent), share in waiting.items():
            first, second = way.back if came else way.again
            if spent + first + second + way.end > cap or failures == MOST_ROUNDS:
                total += share * (spent + way.end + (0 if came else way.start[1]))
                continue
            total += share * chance * (spent + first + second + way.end)
            ahead[came, spent + first] += share * (1 - chance) * left
            ahead[True, spent + first + second] += share * (1 - chance) * late
        waiting = ahead
    return total / way.plain
