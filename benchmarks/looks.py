"""When CLIPSeg can tell: how well the energy at a look foretells the judge's verdict.

    python -m benchmarks.looks [--pictures 60]

Plain pictures of the prompts and seeds on which settings are chosen. At several steps CLIPSeg looks
at x0 at several guidance scales; the area under the ROC curve (AUC) is the probability that a
picture which will be spoiled has the higher energy there than one which will be all OK. Prints a
table and writes benchmarks/results/looks.json.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import chain
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from scipy.stats import mannwhitneyu

import outputs
from benchmarks.methods import Case, paint, seeds
from benchmarks.prompts import development
from benchmarks.quality import BATCH, RESULTS, drawn, models_and_judge, one_thread
from benchmarks.roster import BARE

FIRST_SEED = 950_000
STEPS = (2, 4, 6, 8, 10, 12, 15, 18)
LOOKS = (1.0, 2.0, 3.0, 5.0, 7.5)  # guidance of the x0 that CLIPSeg sees, up to the sampler's own
SAMPLERS = (7.5, BARE.guidance_scale)

Watched = tuple[dict[str, float], bool]  # energies by "look/step", and whether it is spoiled


def main(argv: Sequence[str] | None = None) -> int:
    """Paint, look, judge, write, print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.looks",
        description="How well the energy at a look foretells whether a picture will be all OK.",
        allow_abbrev=False,
    )
    parser.add_argument("--pictures", type=int, default=60, metavar="N", help="a subset")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), metavar="N")
    args = parser.parse_args(argv)
    cases = drawn(development(), args.pictures, FIRST_SEED)
    batches = [row[i : i + BATCH] for row in cases.values() for i in range(0, len(row), BATCH)]
    found: dict[str, Any] = {}
    with ProcessPoolExecutor(args.processes, get_context("spawn"), one_thread) as pool:
        for scale in SAMPLERS:
            parts = pool.map(watched, batches, [scale] * len(batches))
            rows = list(chain.from_iterable(parts))
            areas = foretold(rows)
            print(f"\nguidance {scale:g}, {len(rows)} pictures\n\n{table(areas)}", flush=True)
            found[f"{scale:g}"] = areas
    outputs.save_json(RESULTS / "looks.json", found)
    return 0


@torch.no_grad()
def watched(cases: Sequence[Case], scale: float) -> list[Watched]:
    """The energies of each case at every look, and whether the judge finds it spoiled."""
    models, judge = models_and_judge()
    energies: list[dict[str, float]] = [{} for _ in cases]
    painter = models.painter(cases, replace(BARE, guidance_scale=scale))
    branches = painter.sampler.start(seeds(cases))
    for step in STEPS:
        painter.sampler.denoise(branches, step)
        for look in [each for each in LOOKS if each <= scale]:
            for seen, view in zip(energies, painter.glance(branches, look), strict=True):
                seen[f"{look:g}/{step}"] = view.energy
    images = paint(painter.sampler, branches)
    pixels = np.stack([np.asarray(image) for image in images])
    verdicts = judge.judge(pixels, [case.prompt.nouns for case in cases])
    return [(seen, not each.all_ok) for seen, each in zip(energies, verdicts, strict=True)]


def foretold(rows: Sequence[Watched]) -> dict[str, dict[str, float]]:
    """AUC by guidance of the look and step."""
    bad = np.array([spoiled for _, spoiled in rows])
    areas: dict[str, dict[str, float]] = {}
    for name in rows[0][0]:
        look, step = name.split("/")
        values = np.array([energies[name] for energies, _ in rows])
        areas.setdefault(look, {})[step] = round(auc(values[bad], values[~bad]), 3)
    return areas


def auc(high: np.ndarray, low: np.ndarray) -> float:
    """Probability that a value of `high` exceeds one of `low`; ties count half."""
    return float(mannwhitneyu(high, low).statistic) / (len(high) * len(low))


def table(areas: dict[str, dict[str, float]]) -> str:
    """A row a guidance of the look, a column a step."""
    rows = [["look at", *(f"step {step}" for step in STEPS)]]
    rows += [[look, *(f"{area:.2f}" for area in row.values())] for look, row in areas.items()]
    return "\n".join("".join(f"{cell:>9}" for cell in row) for row in rows)


if __name__ == "__main__":
    sys.exit(main())
