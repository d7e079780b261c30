"""Which methods the laboratory compares, with what settings.

`name@budget` is a method with more or less to spend, as a multiple of the plain sampler's U-Net
calls, as the laboratory measured it. The settings are the best of `benchmarks.search`; they were
found on prompts and seeds that are not reported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from benchmarks.methods import (
    Method,
    attend_and_excite,
    best_of_n,
    composable,
    ddim,
    plain,
    restart,
    tempered,
)
from benchmarks.peers import (
    attend_and_temper,
    depth_first,
    over_paths,
    particles,
    reseeded,
)
from settings import DEFAULT_MOST, Tempering

PLAIN = "plain"
# The same for all: about the best for the plain sampler on the pocket.
BARE = Tempering(guidance_scale=4.0)
ANNEALED = Tempering(guidance_scale=4.0)
# The seed's method: back once, no look at what came of it.
SEEDS_OWN = Tempering(guidance_scale=4.0, stoptime=15, backsteps=5, rounds=1)
NEVER = -1.0  # no energy is as low: all candidates are painted
BUDGETS = (1.3, 2.0, 3.0, 4.5)


def paying(budget: float) -> Tempering:
    """Our settings at another budget."""
    return replace(ANNEALED, budget=budget, max_cost=DEFAULT_MOST * budget)


Roster = dict[str, Method]


def named(name: str, method: Callable[[float], Method], budgets: Sequence[float]) -> Roster:
    """A method at several budgets."""
    return {f"{name}@{budget:g}x": method(budget) for budget in budgets}


ROSTER: Roster = {
    PLAIN: partial(plain, settings=BARE),
    "ddim": partial(ddim, settings=BARE),
    "tempered": partial(tempered, settings=SEEDS_OWN),
    **named("annealed", lambda b: partial(tempered, settings=paying(b)), (1.1, *BUDGETS)),
    **named(
        "uncalibrated",
        lambda b: partial(tempered, settings=paying(b), calibrated=False),
        BUDGETS[:2],
    ),
    **named("best of N, early look", lambda b: partial(reseeded, settings=paying(b)), BUDGETS),
    "best_of_n_early@1.4x": partial(best_of_n, settings=BARE, n=4),
    "best_of_n": partial(best_of_n, settings=BARE, n=2, accept=NEVER),
    **{
        f"FK steering@{n}x": partial(particles, settings=BARE, count=n, strength=10.0, growth=0.0)
        for n in (2, 3, 4)
    },
    **{
        f"BFS@{n}x": partial(particles, settings=BARE, count=n, strength=5.0, growth=0.5)
        for n in (2, 3, 4)
    },
    **named("DFS", lambda b: partial(depth_first, settings=paying(b), backtracks=8), BUDGETS),
    **{
        f"search over paths@{0.9 * n + 0.8 * n * m:.1f}x": partial(
            over_paths, settings=BARE, paths=n, copies=m, times=1
        )
        for n, m in ((1, 1), (1, 2), (2, 1))
    },
    "composable": partial(composable, settings=BARE, weight=0.25, joined=4.0),
    "attend_and_excite": partial(attend_and_excite, settings=BARE, scale_factor=2.5),
    **named(
        "attend and excite, our rounds",
        lambda b: partial(attend_and_temper, settings=paying(b), scale_factor=2.5),
        BUDGETS[:2],
    ),
    "restart": partial(restart, settings=replace(BARE, stoptime=6, backsteps=5), times=2),
}
