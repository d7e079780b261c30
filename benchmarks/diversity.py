"""Whether a method still paints as many different pictures: the spread over seeds of one prompt.

    python -m benchmarks.diversity [--methods NAME ...] [--seeds 200]

Prints the mean distance between the VAE latents of any two pictures, and its ratio to plain's with
a 95 % bootstrap interval over seeds. Writes benchmarks/results/diversity.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial.distance import pdist, squareform
from tqdm import tqdm

import outputs
from benchmarks.methods import Case, Method, Models
from benchmarks.prompts import Prompt
from benchmarks.quality import BATCH, RESULTS, models_and_judge
from benchmarks.roster import PLAIN, ROSTER
from pocket.images import as_tensor
from pocket.world import Noun

PROMPT = Prompt((Noun("dog", "black"), Noun("toy robot")), " next to ")  # the README's
FIRST_SEED = 800_000
RESAMPLES = 2000
FEWEST = 10  # seeds: a resample of fewer may hold one picture alone, which has no spread


def main(argv: Sequence[str] | None = None) -> int:
    """Paint, measure, write, print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.diversity",
        description="Compare the spread of methods' pictures over seeds with the plain sampler's.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--methods", nargs="+", metavar="NAME", choices=list(ROSTER), default=["annealed@1.3x"]
    )
    parser.add_argument("--seeds", type=int, default=200, metavar="N")
    args = parser.parse_args(argv)
    if args.seeds < FEWEST:
        parser.error(f"--seeds must be at least {FEWEST}, got {args.seeds}")
    models, _ = models_and_judge()
    spreads = {
        name: distances(latents(models, ROSTER[name], args.seeds))
        for name in dict.fromkeys([PLAIN, *args.methods])
    }
    found = {name: compared(spreads[PLAIN], each) for name, each in spreads.items()}
    outputs.save_json(RESULTS / "diversity.json", {"prompt": PROMPT.text, "methods": found})
    for name, row in found.items():
        print(f"{name}: spread {row['spread']:.3f}, {row['ratio']:.3f} of plain's "
              f"({row['low']:.3f} to {row['high']:.3f})")  # fmt: skip
    return 0


@torch.no_grad()
def latents(models: Models, method: Method, count: int) -> NDArray[np.float64]:
    """VAE latents (count, values) of the pictures of `count` seeds, scaled as the U-Net's are."""
    vae = models.pipe.vae
    rows = []
    for first in tqdm(range(0, count, BATCH), disable=None):
        cases = [Case(PROMPT, FIRST_SEED + i) for i in range(first, min(first + BATCH, count))]
        images = np.stack([np.asarray(each.image) for each in method(models, cases)])
        mean = vae.encode(as_tensor(images).to(vae.dtype)).latent_dist.mean
        rows.append((mean * vae.config.scaling_factor).flatten(1).double().numpy())
    return np.concatenate(rows)


def distances(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Euclidean distances (N, N) between `points` (N, D), per root of the dimensions."""
    return squareform(pdist(points)) / np.sqrt(points.shape[1])


def spread(gaps: NDArray[np.float64], picks: NDArray[np.int64]) -> float:
    """Mean distance between two different pictures of `picks`, which may hold a picture twice."""
    chosen = gaps[np.ix_(picks, picks)]
    return float(chosen[picks[:, None] != picks[None]].mean())


def compared(plain: NDArray[np.float64], ours: NDArray[np.float64]) -> dict[str, float]:
    """The spread of `ours`, and its ratio to `plain`'s of the same seeds with its interval."""
    count = len(plain)
    everything = np.arange(count)
    rng = np.random.default_rng(0)
    draws = [rng.integers(0, count, count) for _ in range(RESAMPLES)]
    ratios = [spread(ours, draw) / spread(plain, draw) for draw in draws]
    low, high = np.quantile(ratios, (0.025, 0.975))
    own = spread(ours, everything)
    ratio = own / spread(plain, everything)
    return {"spread": own, "ratio": ratio, "low": float(low), "high": float(high)}


if __name__ == "__main__":
    sys.exit(main())
