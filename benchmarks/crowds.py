"""How many subjects a picture can have: all OK over their number, method by method.

    python -m benchmarks.crowds [--pictures N] [--subjects N ...] [--methods NAME ...]

The laboratory's pictures and judge (quality.py) on prompts of two to six coloured subjects. Writes
crowds.csv, crowds.json and crowds.png to benchmarks/results, and prints a table.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

import outputs
from benchmarks.methods import Case, Method, attend_and_excite, best_of_n, plain, tempered
from benchmarks.parted import attention_couple, multidiffusion
from benchmarks.prompts import crowd
from benchmarks.quality import (
    MARKS,
    POOLED,
    RESULTS,
    Summary,
    drawn,
    interval,
    judged,
    rounded,
    summarise,
    table,
)
from benchmarks.roster import BARE, NEVER, PLAIN, Roster, named, paying
from sheets import class_colours

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUBJECTS = (2, 3, 4, 5, 6)
PICTURES = 200
FIRST_SEED = 600_000
BUDGETS = (2.0, 3.0, 4.0)


def laid(budget: float, layout: str) -> Method:
    """This program by a layout."""
    return partial(tempered, settings=replace(paying(budget), layout=layout))


METHODS: Roster = {
    PLAIN: partial(plain, settings=BARE),
    "best_of_n": partial(best_of_n, settings=BARE, n=3, accept=NEVER),
    **named("joint", lambda b: laid(b, "joint"), BUDGETS),
    **named("auto", lambda b: laid(b, "auto"), BUDGETS),
    **named("regions", lambda b: laid(b, "regions"), BUDGETS),
    "attend_and_excite": partial(attend_and_excite, settings=BARE, scale_factor=2.5),
    "MultiDiffusion": partial(multidiffusion, settings=BARE, bootstrap=0.2),
    "MultiDiffusion, all steps shown": partial(multidiffusion, settings=BARE, bootstrap=1.0),
    "attention couple": partial(attention_couple, settings=BARE),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Paint, judge, write the results, print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.crowds",
        description="Compare methods on pictures of ever more subjects.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--pictures", type=int, default=PICTURES, metavar="N", help="a method and number"
    )
    parser.add_argument("--subjects", nargs="+", type=int, choices=SUBJECTS, default=SUBJECTS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--processes", type=int, default=os.cpu_count(), metavar="N")
    args = parser.parse_args(argv)
    for name in ("pictures", "processes"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    cases = crowded(args.pictures, args.subjects)
    methods = {name: METHODS[name] for name in dict.fromkeys([PLAIN, *args.methods])}
    summaries = summarise(judged(methods, cases, args.processes))
    write(summaries)
    print(table(summaries))
    return 0


def crowded(count: int, subjects: Sequence[int]) -> Mapping[str, Sequence[Case]]:
    """`count` cases of each number of subjects; the seeds of a number are always the same."""
    everything = drawn({str(n): crowd(n, seed=0) for n in SUBJECTS}, count, FIRST_SEED)
    return {str(n): everything[str(n)] for n in subjects}


def write(summaries: Mapping[str, Mapping[str, Summary]]) -> None:
    """The results as JSON, CSV and a plot."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    rows = {
        method: {number: rounded(each) for number, each in row.items() if number != POOLED}
        for method, row in summaries.items()
    }
    outputs.save_json(RESULTS / "crowds.json", rows)
    outputs.save_csv(
        RESULTS / "crowds.csv",
        [
            {"method": method, "subjects": number, **each}
            for method, row in rows.items()
            for number, each in row.items()
        ],
    )
    outputs.save_figure(RESULTS / "crowds.png", plot(summaries))


def plot(summaries: Mapping[str, Mapping[str, Summary]]) -> Figure:
    """All-OK rate against the number of subjects, a curve a method, with intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.add_subplot()
    colours = [tuple(part / 255 for part in each) for each in class_colours(len(summaries))]
    for (method, row), colour, mark in zip(summaries.items(), colours, MARKS, strict=False):
        numbers = [int(number) for number in row if number != POOLED]
        points = [row[str(number)] for number in numbers]
        rates = np.array([each.all_ok for each in points])
        ends = np.array([interval(each) for each in points]).T
        axes.errorbar(
            numbers,
            100 * rates,
            yerr=100 * np.abs(ends - rates),
            marker=mark,
            color=colour,
            capsize=3,
            label=method.replace("_", " "),
        )
    axes.set_xticks(SUBJECTS)
    axes.set_xlabel("subjects in the picture")
    axes.set_ylabel("pictures that are all OK, % (95 % interval)")
    count = next(iter(next(iter(summaries.values())).values())).n
    axes.set_title(f"The pocket model, {count} pictures a method and number")
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False)
    return figure


if __name__ == "__main__":
    sys.exit(main())
