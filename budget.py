"""The mathematics of a budget: at which energies to stop, so that a picture costs so much.

An energy means something only beside other energies of the same model, CLIPSeg and sampler. So
thresholds come from a sample of plain pictures. They walk on: always the worst one goes a round
further, until together they have spent the budget. What the worst is then, is good enough: with
that for a threshold the sample costs its budget, hard pictures and the cap included, and every
picture has gone exactly as far as it has to. Only ranks decide: what follows stays the same under
every monotone transformation of the energies.

Costs are evaluations of the denoiser; a budget is in plain pictures. Everything here is pure.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heapreplace
from statistics import fmean
from typing import NamedTuple

THRESHOLDS = ("accept", "early_accept")  # the settings that follow from a budget
ALWAYS = 0.0  # as an energy at the early look where there is none: everything passes it
LOWEST = 0.0  # no energy is lower, so a picture that has it goes no further
# The share of plain pictures that passes the early look. On the pocket an attempt at a good picture
# then costs the least, or within 5 % of it, be 30 or 90 % of them good at the last look.
PROMISING = 0.75
# Who has no sample of their own, doubts these thresholds when attempts fail that together are as
# unlikely to.
DOUBT = 0.05


class Energies(NamedTuple):
    """Energies at the early look and at the last one: of a plain picture, or as thresholds."""

    early: float
    last: float


class Stop(NamedTuple):
    """Where a picture stands after a round, or before the first."""

    late: bool  # whether it has come to the last look; else it was left at the early one
    energy: float  # there
    cost: float  # of the picture, if it is finished from here
    most: float | None  # what it could be after another round, at most; None: no round is left


class Sampled(NamedTuple):
    """A picture of a sample, as far as it has walked."""

    looks: tuple[Stop, ...]  # the plain one at each look, whatever it shows
    rounds: tuple[Stop, ...]  # after each round

    @property
    def plain(self) -> Energies:
        early = self.looks[0].energy if len(self.looks) > 1 else ALWAYS
        return Energies(early, self.looks[-1].energy)

    def way(self, early: float) -> tuple[Stop, ...]:
        """All stops, from the look at which it is left above the energy `early`."""
        return (self.looks[0 if self.plain.early > early else -1], *self.rounds)


@dataclass(frozen=True)
class Sample:
    """Pictures that walk on from plain ones."""

    plain: int  # what a plain one costs
    early: float  # above this energy they were left at the early look
    pictures: tuple[Sampled, ...]
    cap: float = math.inf  # the `max_cost` by which they walked: who is there has no way to go

    @property
    def energies(self) -> list[Energies]:
        """Of the plain pictures."""
        return [picture.plain for picture in self.pictures]


class Descent(NamedTuple):
    """How far down a sample gets."""

    limits: Energies
    missing: int | None  # the number of the picture whose next round must be known to go on


def promising(energies: Sequence[Energies]) -> float:
    """The energy at the early look that `PROMISING` of these plain pictures have, or less."""
    return sorted(each.early for each in energies)[math.ceil(PROMISING * len(energies)) - 1]


def descend(sample: Sample, budget: float, max_cost: float) -> Descent:
    """Let the worst picture go its next round, until all have spent `budget` plain ones on average.

    No round begins that could take a picture past `max_cost` plain ones. Who was left at the early
    look is worse than all others. The last to go is followed until it gets better, or can not go
    on: else its rounds were in vain. A lower budget or `max_cost` asks for the first part of the
    way only, so a sample serves all of them.
    """
    ways = [picture.way(sample.early) for picture in sample.pictures]
    cap = max_cost * sample.plain
    purse = budget * sample.plain * len(ways) - sum(stops[0].cost for stops in ways)
    at = [0] * len(ways)
    hot = [(rank(stops[0]), i) for i, stops in enumerate(ways) if may_go_on(stops[0], cap)]
    heapify(hot)
    while hot:
        i = hot[0][1]
        now = ways[i][at[i]]
        moved = at[i] == 0 or rank(now) != rank(ways[i][at[i] - 1])
        if purse <= 0 and moved:
            return Descent(limits_at(sample, now), None)
        if at[i] + 1 == len(ways[i]):
            return Descent(limits_at(sample, now), i)
        at[i] += 1
        ahead = ways[i][at[i]]
        purse -= ahead.cost - now.cost
        if may_go_on(ahead, cap):
            heapreplace(hot, (rank(ahead), i))
        else:
            heappop(hot)
    return Descent(Energies(sample.early, LOWEST), None)


def rank(stop: Stop) -> tuple[bool, float]:
    """Ascending from the worst."""
    return stop.late, -stop.energy


def may_go_on(stop: Stop, cap: float) -> bool:
    """Whether another round could help, and can not take the picture past the cap."""
    better = stop.energy > LOWEST or not stop.late
    return better and stop.most is not None and stop.most <= cap


def limits_at(sample: Sample, worst: Stop) -> Energies:
    """The thresholds by which no picture is worse than `worst`."""
    if worst.late:
        return Energies(sample.early, worst.energy)
    stops = (stop for picture in sample.pictures for stop in (*picture.looks, *picture.rounds))
    return Energies(worst.energy, max(stop.energy for stop in stops if stop.late))


def end_of(stops: Sequence[Stop], limits: Energies, cap: float) -> int | None:
    """The number of the stop at which a picture ends; None where it was not walked so far."""
    for number, stop in enumerate(stops):
        good = stop.energy <= (limits.last if stop.late else limits.early)
        if good or not may_go_on(stop, cap):
            return number
    return None


def cut(sample: Sample, limits: Energies, cap: float) -> Sample:
    """The same sample without what its pictures have walked further than the thresholds ask."""
    ends = (end_of(each.way(sample.early), limits, cap) for each in sample.pictures)
    pictures = zip(sample.pictures, ends, strict=True)
    return replace(
        sample, pictures=tuple(each._replace(rounds=each.rounds[:end]) for each, end in pictures)
    )


def thresholds(sample: Sample, budget: float, max_cost: float, known: Sample) -> Energies:
    """The energies to ask for, so that pictures like those of the sample cost `budget` plain ones.

    Where the sample was not walked so far, from there on as many fewer of its plain pictures pass
    as do of `known`, another sample, for the same money. Nobody knows what becomes of a picture
    beyond the cap by which it walked.
    """
    limits, missing = descend(sample, budget, min(max_cost, sample.cap))
    if missing is None:
        return limits
    spent = fmean(each.way(sample.early)[-1].cost for each in sample.pictures) / sample.plain
    now, then = (
        passing(
            known, Energies(math.inf, descend(known, each, min(max_cost, known.cap)).limits.last)
        )
        for each in (spent, budget)
    )
    own = sorted(each.last for each in sample.energies)
    number = bisect_right(own, limits.last) - math.ceil((now - then) * len(own))
    return Energies(sample.early, min(limits.last, own[max(0, number - 1)]))


def passing(sample: Sample, limits: Energies) -> float:
    """The share of the sample's plain pictures that passes both looks."""
    good = [e for e in sample.energies if e.early <= limits.early and e.last <= limits.last]
    return len(good) / len(sample.pictures)


def patience(sample: Sample, limits: Energies) -> int:
    """How many attempts at one picture may fail, before thresholds of others' pictures are doubted.

    Were the pictures like those of the sample, a good one would have come with a probability of
    1 - DOUBT.
    """
    good = passing(sample, limits)
    return math.ceil(math.log(DOUBT) / math.log(1 - good)) if 0 < good < 1 else 1
