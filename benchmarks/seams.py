"""Whether a picture of regions is one picture: how its background jumps where regions meet.

    python -m benchmarks.seams [--pictures N] [--subjects N] [--harmonise N]

Of every picture the mean difference between neighbouring pixels of the background (no class, by
CLIPSeg) across the borders of its regions, over that elsewhere: 1 where nothing is to be seen. The
yardstick are plain pictures of the same prompts with the same borders laid over them. Prints both
with a 95 % bootstrap interval and writes benchmarks/results/seams.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import outputs
from benchmarks.crowds import FIRST_SEED, SUBJECTS
from benchmarks.prompts import crowd
from benchmarks.quality import BATCH, RESULTS, models_and_judge
from benchmarks.roster import paying
from layouts import Box
from metrics import bootstrap_interval
from pocket.images import as_tensor
from regions import masks_of
from segmentation import NONE, View
from tempering import Painter

BUDGET = 3.0


def main(argv: Sequence[str] | None = None) -> int:
    """Paint, measure, write, print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.seams",
        description="Measure how the background jumps where regions meet.",
        allow_abbrev=False,
    )
    parser.add_argument("--pictures", type=int, default=100, metavar="N")
    parser.add_argument("--subjects", type=int, choices=SUBJECTS, default=4)
    parser.add_argument("--harmonise", type=int, default=0, metavar="N")
    args = parser.parse_args(argv)
    if args.pictures < 1:
        parser.error(f"--pictures must be at least 1, got {args.pictures}")
    found = measured(args.pictures, args.subjects, args.harmonise)
    outputs.save_json(RESULTS / "seams.json", {"arguments": vars(args), **found})
    for name, row in found.items():
        print(f"{name}: {row['mean']:.2f} ({row['low']:.2f} to {row['high']:.2f})")
    return 0


def measured(count: int, subjects: int, harmonise: int) -> dict[str, dict[str, float | None]]:
    """Seams of pictures by regions and of plain ones, with their intervals."""
    models, _ = models_and_judge()
    texts = crowd(subjects, seed=0)
    settings = replace(
        paying(BUDGET), layout="regions", harmonise=harmonise, joiner=texts[0].joiner
    )
    seams: dict[str, list[float]] = {"regions": [], "plain": []}
    for start in range(0, count, BATCH):
        numbers = range(start, min(start + BATCH, count))
        prompts = [texts[i % len(texts)].phrases for i in numbers]
        painter = Painter(models.pipe, models.clipseg, prompts, settings)
        results = painter.temper([FIRST_SEED + i for i in numbers], compare=True)
        for name, images in (
            ("regions", [result.image for result in results]),
            ("plain", [result.plain for result in results if result.plain]),
        ):
            views = painter.look(images)
            for view, result in zip(views, results, strict=True):
                boxes = tuple(box for box in result.regions if box)
                value = seam(view, boxes)
                seams[name] += [] if value is None else [value]
    return {name: summary(values) for name, values in seams.items()}


def summary(values: Sequence[float]) -> dict[str, float | None]:
    low, high = bootstrap_interval(np.array(values))
    return {"n": len(values), "mean": fmean(values), "low": low, "high": high}


def seam(view: View, boxes: Sequence[Box]) -> float | None:
    """How much steeper the background is across the borders of `boxes` than elsewhere.

    None where no background is to be seen at a border, or it is flat.
    """
    pixels = as_tensor(np.array(view.image)[None])[0]  # (3, H, W)
    size = (pixels.shape[-2], pixels.shape[-1])
    labels = torch.zeros(size, dtype=torch.int64)
    for number, mask in enumerate(masks_of(tuple(boxes), len(boxes), size), start=1):
        labels[mask[0] > 0] = number
    empty = F.interpolate((view.labels == NONE)[None, None].float(), size=size)[0, 0] > 0.5
    across, elsewhere = [], []
    for dim in (-2, -1):
        steep = pixels.diff(dim=dim).abs().mean(dim=0)
        border = labels.diff(dim=dim) != 0
        free = both(empty, dim)
        across.append(steep[border & free])
        elsewhere.append(steep[~border & free])
    there, rest = torch.cat(across), torch.cat(elsewhere)
    if not len(there) or not len(rest) or not rest.mean():
        return None
    return float(there.mean() / rest.mean())


def both(there: Tensor, dim: int) -> Tensor:
    """Whether a pixel and its next one along `dim` are `there` (H, W) bool."""
    length = there.shape[dim]
    return there.narrow(dim, 0, length - 1) & there.narrow(dim, 1, length - 1)


if __name__ == "__main__":
    sys.exit(main())
