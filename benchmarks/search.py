"""The search for settings: each topic varies one thing, on prompts and seeds that are not reported.

    python -m benchmarks.search [TOPIC ...] [--pictures 60]

Prints a table a topic and writes benchmarks/results/search.json. What it finds belongs in
`settings.Tempering` (the defaults) and in `benchmarks.roster` (the other methods).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import outputs
from benchmarks.methods import (
    Method,
    attend_and_excite,
    best_of_n,
    composable,
    plain,
    restart,
    tempered,
)
from benchmarks.peers import depth_first, over_paths, particles
from benchmarks.prompts import development
from benchmarks.quality import POOLED, RESULTS, drawn, judged, rounded, summarise, table
from benchmarks.roster import ANNEALED, BARE, NEVER, PLAIN, SEEDS_OWN
from kinds import TAESD
from settings import Tempering

FIRST_SEED = 900_000
Topic = dict[str, Method]


def varied(**changes: Sequence[Any]) -> Topic:
    """`ANNEALED` with one setting, or several that go together, at other values."""
    names = list(changes)
    return {
        " ".join(f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
                 for name, value in zip(names, values, strict=True)): partial(
            tempered, settings=replace(ANNEALED, **dict(zip(names, values, strict=True)))
        )
        for values in zip(*changes.values(), strict=True)
    }  # fmt: skip


def of(method: Callable[..., Any], settings: Tempering = BARE, **options: Sequence[Any]) -> Topic:
    """A method at several values of its own options."""
    names = list(options)
    return {
        " ".join(f"{name}={value}" for name, value in zip(names, values, strict=True)): partial(
            method, settings=settings, **dict(zip(names, values, strict=True))
        )
        for values in zip(*options.values(), strict=True)
    }


def guided(method: Callable[..., Any], settings: Tempering, name: str) -> Topic:
    """A method at several weights of classifier-free guidance."""
    return {
        f"{name} guidance_scale={scale:g}": partial(
            method, settings=replace(settings, guidance_scale=scale)
        )
        for scale in (2.0, 3.0, 4.0, 5.0, 7.5)
    }


RESTARTS = ((15, 5, 2), (12, 4, 2), (10, 5, 2), (10, 8, 1), (6, 5, 2), (6, 5, 4), (4, 3, 4))
ONCE = (  # stoptime, backsteps, k, background
    (15, 5, 1.0, 0.0), (15, 5, 4.0, 0.0), (15, 5, 20.0, 0.0), (15, 5, 4.0, 1.0), (15, 5, 1e6, 1.0),
    (15, 10, 4.0, 1.0), (10, 8, 4.0, 1.0),
)  # fmt: skip
TAESD_OF_THE_POCKET = ["taesd"] * TAESD.pocket.is_dir()  # once the recipe has made the pocket one
TOPICS: dict[str, Topic] = {
    "seed's tempering": {
        f"stoptime={stop} backsteps={back} k={k:g} background={background:g}": partial(
            tempered,
            settings=replace(
                SEEDS_OWN, stoptime=stop, backsteps=back, k=k, background=background
            ),
        )
        for stop, back, k, background in ONCE
    },
    "guidance": {**guided(plain, BARE, "plain"), **guided(tempered, ANNEALED, "annealed")},
    "where to look": varied(stoptime=(8, 10, 12, 15, 18), backsteps=(8, 10, 12, 12, 12)),
    "early look": varied(early_look=(0, 4, 5, 6, 8)),
    "mirror": varied(mirror=(True, False)),
    "preview": varied(preview=(*TAESD_OF_THE_POCKET, "vae", "half", "linear")),
    "look guidance": varied(look_guidance=(1.0, 2.0, 3.0, 7.5)),
    "how far back": varied(backsteps=(5, 8, 10, 12, 15)),
    "k": varied(k=(0.25, 0.5, 1.0, 2.0, 4.0, 1e6)),
    "background": varied(background=(0.0, 0.3, 1.0)),
    "uncertainty": varied(uncertainty=("class", "pixel")),
    "budget": varied(budget=(1.1, 1.3, 1.5, 2.0, 3.0), max_cost=(3.3, 3.9, 4.5, 6.0, 9.0)),
    "most": varied(max_cost=(2.0, 3.0, 4.0, 6.0, 9.0)),
    "temperature": varied(temperature=(0.0, 0.1, 0.3)),
    "cooling": varied(cooling=(1.0, 0.8, 0.6)),
    "candidates": varied(candidates=(1, 2, 3)),
    "cfg_rescale": varied(cfg_rescale=(9.0, 10.0, 11.0)),
    "best_of_n": of(best_of_n, n=(2, 3, 4, 12), accept=(NEVER, NEVER, None, None)),
    "FK steering": of(particles, count=(2,) * 3, strength=(5.0, 10.0, 20.0), growth=(0.0,) * 3),
    "BFS": of(particles, count=(2,) * 3, strength=(2.0, 5.0, 5.0), growth=(0.5, 0.5, 1.0)),
    "DFS": of(depth_first, ANNEALED, backtracks=(2, 4, 8, 16)),
    "search over paths": of(over_paths, paths=(1, 1, 2), copies=(1, 2, 1), times=(1, 1, 1)),
    "composable": of(composable, weight=(1.0, 1.5, 2.0, 3.0, 4.0)),
    "composable with the whole": of(
        composable, weight=(0.25, 0.5, 1.0, 1.0, 2.0), joined=(4.0, 4.0, 4.0, 2.0, 2.0)
    ),
    "attend_and_excite": of(attend_and_excite, scale_factor=(0.6, 1.2, 2.5, 5.0, 10.0, 20.0)),
    "restart": {
        f"stoptime={stop} backsteps={back} times={times}": partial(
            restart, settings=replace(BARE, stoptime=stop, backsteps=back), times=times
        )
        for stop, back, times in RESTARTS
    },
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Try the topics' variants, print and write what came of them."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.search",
        description="Try settings on prompts and seeds that are not reported.",
        allow_abbrev=False,
    )
    parser.add_argument("topics", nargs="*", metavar="TOPIC", help=f"from {', '.join(TOPICS)}")
    parser.add_argument("--pictures", type=int, default=60, metavar="N", help="a subset")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), metavar="N")
    args = parser.parse_args(argv)
    unknown = [name for name in args.topics if name not in TOPICS]
    if unknown:
        parser.error(f"topics must be from {', '.join(TOPICS)}, got {unknown[0]}")
    cases = drawn(development(), args.pictures, FIRST_SEED)
    path = RESULTS / "search.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name in args.topics or TOPICS:
        methods: dict[str, Method] = {PLAIN: partial(plain, settings=BARE), **TOPICS[name]}
        summaries = summarise(judged(methods, cases, args.processes))
        print(f"\n{name}\n\n{table(summaries)}", flush=True)
        found[name] = {method: rounded(row[POOLED]) for method, row in summaries.items()}
        outputs.save_json(path, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
