"""The pocket's own calibration: energies of its plain pictures, for single pictures of the pocket.

    python -m benchmarks.calibrate [--pictures 32]

Prompts and seeds are those on which settings are chosen. Writes pocket/calibration.json, and prints
what a budget buys with it. To be run again when the pocket's weights or the looks change.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from tqdm import tqdm

import calibration
from benchmarks.methods import FIRST_SAMPLED, SAMPLE
from benchmarks.prompts import development
from budget import Energies, expected_cost, shares
from main import parse, to_request
from session import POCKETS_OWN, Session, open_session

BUDGETS = (1.1, 1.3, 1.5, 2.0, 3.0)


def main(argv: Sequence[str] | None = None) -> int:
    """Paint, look, write, print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.calibrate",
        description="Take the sample of energies that ships with the pocket.",
        allow_abbrev=False,
    )
    parser.add_argument("--pictures", type=int, default=SAMPLE, metavar="N", help="a subset")
    args = parser.parse_args(argv)
    words = ["--tempered_inference", "--model", "pocket", "--device", "cpu", "--offline"]
    session = open_session(to_request(parse(words)))
    sample = calibration.Sample(session.origin, tuple(energies(session, args.pictures)))
    calibration.save(POCKETS_OWN, sample)
    for budget in BUDGETS:
        print(bought(session, sample, budget))
    return 0


def energies(session: Session, count: int) -> list[Energies]:
    """Energies of `count` plain pictures of each subset of the development prompts."""
    found: list[Energies] = []
    for number, prompts in enumerate(tqdm(development().values(), "subsets", disable=None)):
        phrases = [prompt.phrases for prompt in prompts[:count]]
        painter = session.painter_of(phrases, prompts[0].joiner)
        first = FIRST_SAMPLED + number * SAMPLE
        found += map(painter.energies, painter.watch(range(first, first + len(phrases))))
    return found


def bought(session: Session, sample: calibration.Sample, budget: float) -> str:
    """Thresholds of a budget, and how many plain pictures of the sample pass them."""
    way, most = session.painter.way, session.painter.settings.max_cost
    limits = session.painter.sought(sample.energies, budget)
    promising, good = shares(sample.energies, limits)
    return (
        f"budget {budget:g}: early_accept {limits.early:.3f} passes {promising:.0%}, "
        f"accept {limits.last:.3f} {good:.0%}, cost {expected_cost(promising, good, way, most):.2f}"
    )


if __name__ == "__main__":
    sys.exit(main())
