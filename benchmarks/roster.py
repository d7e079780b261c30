"""Which methods the laboratory compares, with what settings.

First guesses: `benchmarks.search` is there to choose better ones, and they belong here.
`name@budget` is a method with more or less to spend, as a multiple of the plain sampler's U-Net
calls.
"""

from __future__ import annotations

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
from settings import Tempering

PLAIN = "plain"
BARE = Tempering()
ANNEALED = Tempering(rounds=4, stoptime=15, backsteps=12, k=1.0, background=1.0, accept=0.4)
NEVER = -1.0  # no energy is as low: all candidates are painted

ROSTER: dict[str, Method] = {
    PLAIN: partial(plain, settings=BARE),
    "ddim": partial(ddim, settings=BARE),
    "tempered": partial(tempered, settings=Tempering(rounds=1)),
    "annealed": partial(tempered, settings=ANNEALED),
    "best_of_n": partial(best_of_n, settings=BARE, n=2, accept=NEVER),
    "composable": partial(composable, settings=BARE, weight=5.0),
    "attend_and_excite": partial(attend_and_excite, settings=BARE, scale_factor=20),
    "restart": partial(restart, settings=Tempering(stoptime=12, backsteps=4), times=2),
}
