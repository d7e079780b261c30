"""How long a start takes: seconds from the command to the first call of the denoiser.

    python -m benchmarks.startup [--model pocket] [--clipseg pocket] [--starts 3]

Each start is a process of its own, which ends at that call. What imports take is Python's own
account (`-X importtime`), by package; it makes a start a little slower. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

REPOSITORY = Path(__file__).parents[1]
BEGUN = "TEMPERING_BENCHMARK_BEGUN"  # when the command was given, in seconds of time.time
CHILD = "from benchmarks.startup import child; child()"
OURS = "this program"
SHOWN = (OURS, "torch", "transformers", "diffusers", "peft", "accelerate", "scipy", "matplotlib")
OTHERS = "other packages"
PARTS = ("until the models load", "model", "CLIPSeg", "text and noise")

Seconds = dict[str, float]


def start(model: str, clipseg: str) -> tuple[Seconds, Seconds]:
    """Seconds of one start's parts, imports included, and of its imports by package."""
    with tempfile.TemporaryDirectory() as output:
        words = ["--model", model, "--clipseg", clipseg, "--offline", "--output", output]
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-c", CHILD, "--tempered_inference", *words],
            cwd=REPOSITORY,
            env={**os.environ, BEGUN: repr(time.time())},
            capture_output=True,
            text=True,
            check=True,
        )
    marks = [0.0, *json.loads(done.stdout.splitlines()[-1])]
    parts = dict(zip(PARTS, (after - before for before, after in pairwise(marks)), strict=True))
    return parts, imports(done.stderr)


def imports(account: str) -> Seconds:
    """Seconds by package of what `-X importtime` says."""
    own = {path.stem for path in REPOSITORY.glob("*.py")} | {"benchmarks", "pocket"}
    found: Counter[str] = Counter()
    for line in re.finditer(r"^import time:\s+(\d+) \|\s+\d+ \|\s+([^.\s]+)", account, re.M):
        package = OURS if line[2] in own else line[2]
        found[package if package in SHOWN else OTHERS] += int(line[1])
    return {name: microseconds / 1e6 for name, microseconds in found.items()}


def child() -> None:
    """Start as main.py does, up to the first call of the denoiser; prints when what was reached."""
    marks: list[float] = []

    def mark(*_: Any, **__: Any) -> None:
        marks.append(time.time() - float(os.environ[BEGUN]))

    def reached(*_: Any, **__: Any) -> None:
        mark()
        print(json.dumps(marks), flush=True)
        os._exit(0)

    import loaders
    import main

    load_pipeline, load_clipseg = loaders.load_pipeline, loaders.load_clipseg

    def watched_pipeline(*args: Any, **kwargs: Any) -> Any:
        mark()
        pipe = load_pipeline(*args, **kwargs)
        mark()
        from families import family_of

        family_of(pipe).denoiser.forward = reached
        return pipe

    def watched_clipseg(*args: Any, **kwargs: Any) -> Any:
        clipseg = load_clipseg(*args, **kwargs)
        mark()
        return clipseg

    loaders.load_pipeline, loaders.load_clipseg = watched_pipeline, watched_clipseg
    sys.exit(main.main(sys.argv[1:]))


def table(starts: Sequence[tuple[Seconds, Seconds]]) -> str:
    """Medians of all starts, as Markdown."""
    rows = [["all", median(sum(parts.values()) for parts, _ in starts)]]
    rows += [[name, median(parts[name] for parts, _ in starts)] for name in PARTS]
    rows += [["all imports", median(sum(packages.values()) for _, packages in starts)]]
    for name in (*SHOWN, OTHERS):
        rows += [[f"imports of {name}", median(each.get(name, 0.0) for _, each in starts)]]
    lines = [["", "s"], ["---", "---:"], *([str(name), f"{s:.2f}"] for name, s in rows)]
    return "\n".join(f"| {name} | {seconds} |" for name, seconds in lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Start some times, print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", allow_abbrev=False)
    parser.add_argument("--model", default="pocket", metavar="NAME", help="default: pocket")
    parser.add_argument("--clipseg", default="pocket", metavar="NAME", help="default: pocket")
    parser.add_argument("--starts", type=int, default=3, metavar="N", help="default: 3")
    args = parser.parse_args(argv)
    start(args.model, args.clipseg)  # brings the files into memory
    print(table([start(args.model, args.clipseg) for _ in range(args.starts)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
