"""The pocket's own calibration: a sample of its pictures, for single pictures of the pocket.

    python -m benchmarks.calibrate [--pictures 32]

Prompts and seeds are those on which settings are chosen. Writes pocket/calibration.json, and prints
what a budget buys with it. To be run again when the pocket's weights, the looks or the rounds
change.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import calibration
from benchmarks.methods import FIRST_SAMPLED, SAMPLE
from benchmarks.prompts import development
from budget import Sample, descend, passing
from calibration import POCKETS_OWN, Calibration
from main import parse, to_request
from session import Session, open_session
from settings import DEFAULT_MOST
from tempering import Painter, Watched, walked

BUDGETS = (1.1, 1.3, 1.5, 2.0, 3.0)  # the last is how far the sample walks


def main(argv: Sequence[str] | None = None) -> int:
    """Paint, look, walk, write, print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.calibrate",
        description="Take the sample of energies that ships with the pocket.",
        allow_abbrev=False,
    )
    parser.add_argument("--pictures", type=int, default=SAMPLE, metavar="N", help="a subset")
    args = parser.parse_args(argv)
    if not 1 <= args.pictures <= SAMPLE:
        parser.error(f"--pictures must be in 1..{SAMPLE}, got {args.pictures}")
    budget = f"--budget={BUDGETS[-1]}"
    words = ["--tempered_inference", "--model", "pocket", "--device", "cpu", "--offline", budget]
    session = open_session(to_request(parse(words)))
    sample = walked(watched(session, args.pictures))
    calibration.save(POCKETS_OWN, Calibration(session.origin, sample))
    for each in BUDGETS:
        print(bought(sample, each))
    return 0


def watched(session: Session, count: int) -> list[tuple[Painter, Watched]]:
    """`count` plain pictures of each subset of the development prompts, with their painters."""
    found: list[tuple[Painter, Watched]] = []
    for number, prompts in enumerate(development().values()):
        phrases = [prompt.phrases for prompt in prompts[:count]]
        painter = session.painter_of(phrases, prompts[0].joiner)
        first = FIRST_SAMPLED + number * SAMPLE
        seeds = range(first, first + len(phrases))
        found += [(painter, each) for each in painter.watch(seeds)]
    return found


def bought(sample: Sample, budget: float) -> str:
    """Thresholds of a budget, and how many plain pictures of the sample pass them."""
    limits = descend(sample, budget, DEFAULT_MOST * budget).limits
    return (
        f"budget {budget:g}: early_accept {limits.early:.3f}, accept {limits.last:.3f}; "
        f"{passing(sample, limits):.0%} pass both"
    )


if __name__ == "__main__":
    sys.exit(main())
