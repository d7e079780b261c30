"""Which methods the laboratory compares, with what settings.

`name@budget` is a method with more or less to spend, as a multiple of the plain sampler's U-Net
calls, as the laboratory measured it. The settings are the best of `benchmarks.search`; they were
found on prompts and seeds that are not reported.
"""

from __future__ import annotations

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
from settings import Tempering

PLAIN = "plain"
# The same for all: about the best for the plain sampler on the pocket.
BARE = Tempering(guidance_scale=4.0)
ANNEALED = Tempering(guidance_scale=4.0)
# Choosier at the early look, where a new start is cheap: for more to spend.
STRICT = replace(ANNEALED, early_accept=1.0)
# The seed's method: back once, no look at what came of it.
SEEDS_OWN = Tempering(guidance_scale=4.0, stoptime=15, backsteps=5, rounds=1)
NEVER = -1.0  # no energy is as low: all candidates are painted

ROSTER: dict[str, Method] = {
    PLAIN: partial(plain, settings=BARE),
    "ddim": partial(ddim, settings=BARE),
    "tempered": partial(tempered, settings=SEEDS_OWN),
    "annealed@1.2x": partial(tempered, settings=replace(ANNEALED, rounds=3)),
    "annealed": partial(tempered, settings=ANNEALED),
    "annealed@1.6x": partial(tempered, settings=replace(STRICT, accept=0.03)),
    "annealed@2x": partial(tempered, settings=replace(STRICT, rounds=24, accept=0.02)),
    "best_of_n_early@1.4x": partial(best_of_n, settings=BARE, n=4, accept=ANNEALED.accept),
    "best_of_n_early@2.5x": partial(best_of_n, settings=BARE, n=13, accept=0.02),
    "best_of_n": partial(best_of_n, settings=BARE, n=2, accept=NEVER),
    "composable": partial(composable, settings=BARE, weight=0.25, joined=4.0),
    "attend_and_excite": partial(attend_and_excite, settings=BARE, scale_factor=2.5),
    "restart": partial(restart, settings=replace(BARE, stoptime=6, backsteps=5), times=2),
}
