"""The laboratory: how often a picture shows what was asked for, method by method.

    python -m benchmarks.quality [--quick | --pictures N] [--methods NAME ...]

Methods x prompts x seeds on the pocket model, all from the same initial latents, judged by a
network that no method sees. Pictures that were judged already are not painted again, so a run that
was stopped goes on. Writes quality.csv, quality.json and quality.png to benchmarks/results, and
prints a table; quick ones, and those of another number of pictures, get names of their own.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib.metadata import version
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

import outputs
from benchmarks.methods import Case, Method, Models
from benchmarks.prompts import Prompt, laboratory
from benchmarks.roster import BARE, PLAIN, ROSTER
from comparison import markdown
from loaders import load_clipseg, load_pipeline
from metrics import Paired, bootstrap_interval, paired, picture_metrics
from pocket.judge import WEIGHTS, Judge, load_judge
from sheets import class_colours

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HERE = Path(__file__).parent
RESULTS = HERE / "results"
WORK = HERE / "work"  # every judged picture's row; git ignores it
POCKET = HERE.parent / "pocket" / "weights"
# What decides what a picture is and how it is judged.
SOURCES = (
    "annealing.py",
    "benchmarks/methods.py",
    "benchmarks/peers.py",
    "benchmarks/prompts.py",
    "budget.py",
    "calibration.py",
    "families.py",
    "metrics.py",
    "pocket/calibration.json",
    "pocket/judge.py",
    "pocket/judgenet.py",
    "sampling.py",
    "segmentation.py",
    "settings.py",
    "tempering.py",
)
LIBRARIES = ("torch", "diffusers", "transformers")
DTYPE = "bf16"  # on CPUs with AMX more than twice as fast as fp32
FIRST_SEED = 500_000
SEEDS_A_SUBSET = 10_000
TIMED = 3
FULL, QUICK = 250, 24  # pictures a method and subset
BATCH = 25
FAULTS = ("missing", "wrong_colour", "fused")
FIGURES = ("ppv", "npv", "js")
POOLED = "all"  # the subsets together

Row = dict[str, Any]


@dataclass(frozen=True)
class Batch:
    """Cases of one subset that a method paints at once."""

    method: str
    subset: str
    cases: tuple[Case, ...]


@dataclass(frozen=True)
class Summary:
    """The figures of one method on one subset; shares are 0..1, intervals 95 % bootstrap."""

    n: int
    all_ok: float
    low: float | None
    high: float | None
    missing: float
    wrong_colour: float
    fused: float
    ppv: float
    npv: float
    js: float
    unet_calls_mean: float
    unet_calls_max: float
    seconds: float | None  # of one picture painted alone
    # Paired with the plain picture of the same prompt and seed; None for plain itself.
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    p: float | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Paint, judge, write the results, print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description="Compare methods on the pocket model, as a judge sees their pictures.",
        allow_abbrev=False,
    )
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument(
        "--quick", dest="pictures", action="store_const", const=QUICK,
        help=f"{QUICK} pictures a subset",
    )  # fmt: skip
    amount.add_argument(
        "--pictures", type=int, metavar="N", help="a method and subset (default: %(default)s)"
    )
    parser.set_defaults(pictures=FULL)
    parser.add_argument(
        "--methods", nargs="+", metavar="NAME", default=list(ROSTER),
        help=f"from {', '.join(ROSTER)} (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count(), metavar="N",
        help="painting at once, a thread each (default: %(default)s)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    unknown = [name for name in args.methods if name not in ROSTER]
    if unknown:
        parser.error(f"--methods must be from {', '.join(ROSTER)}, got {unknown[0]}")
    if not 1 <= args.pictures <= SEEDS_A_SUBSET:
        parser.error(f"--pictures must be in 1..{SEEDS_A_SUBSET}, got {args.pictures}")
    if args.processes < 1:
        parser.error(f"--processes must be at least 1, got {args.processes}")
    cases = drawn(laboratory(), args.pictures, FIRST_SEED)
    methods = {name: ROSTER[name] for name in dict.fromkeys([PLAIN, *args.methods])}
    judged(methods, cases, args.processes)
    # What was painted before belongs to the results, too.
    finished = {name: method for name, method in ROSTER.items() if complete(method, cases)}
    summaries = summarise(judged(finished, cases, args.processes), alone(finished))
    names = {FULL: "quality", QUICK: "quality-quick"}
    write(summaries, names.get(args.pictures, f"quality-{args.pictures}"))
    print(table(summaries))
    return 0


Cases = Mapping[str, Sequence[Case]]  # by subset
Key = tuple[str, str, int]


def drawn(prompts: Mapping[str, Sequence[Prompt]], count: int, first_seed: int) -> Cases:
    """`count` cases a subset: its prompts over and over, each case with a seed of its own."""
    return {
        subset: [
            Case(texts[i % len(texts)], first_seed + number * SEEDS_A_SUBSET + i)
            for i in range(count)
        ]
        for number, (subset, texts) in enumerate(prompts.items())
    }


def judged(methods: Mapping[str, Method], cases: Cases, processes: int) -> list[Row]:
    """The rows of all cases for each method, painted where they are not on disk."""
    known = {name: stored(method) for name, method in methods.items()}
    waiting = [
        batch
        for name in methods
        for subset, row in cases.items()
        for batch in batches(name, subset, row, known[name])
    ]
    if waiting:
        folder().mkdir(parents=True, exist_ok=True)
        for batch, rows in painted(methods, waiting, processes):
            for row in rows:
                outputs.append_json_line(file_of(methods[batch.method]), row)
                known[batch.method][key(row)] = row
    wanted = keys(cases)
    return [{**known[name][each], "method": name} for name in methods for each in wanted]


def painted(
    methods: Mapping[str, Method], waiting: Sequence[Batch], processes: int
) -> Iterator[tuple[Batch, list[Row]]]:
    """The batches as they finish, with a bar over the pictures."""
    total = sum(len(batch.cases) for batch in waiting)
    with (
        ProcessPoolExecutor(processes, get_context("spawn"), one_thread) as pool,
        tqdm(total=total, desc="pictures", unit="picture", disable=None) as bar,
    ):
        futures = {pool.submit(paint_and_judge, methods[b.method], b): b for b in waiting}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
                bar.update(len(futures[future].cases))
        finally:  # where one fails, or the user stops: nobody would write the others down
            pool.shutdown(cancel_futures=True)


def complete(method: Method, cases: Cases) -> bool:
    """Whether all cases are on disk."""
    return stored(method).keys() >= set(keys(cases))


@cache
def folder() -> Path:
    """Where rows are kept: another one for other weights, code of the algorithm or libraries."""
    digest = hashlib.sha256(" ".join([DTYPE, *map(version, LIBRARIES)]).encode())
    sources = [HERE.parent / name for name in SOURCES]
    for file in [*sorted(path for path in POCKET.rglob("*") if path.is_file()), WEIGHTS, *sources]:
        digest.update(file.read_bytes())
    return WORK / digest.hexdigest()[:12]


def described(method: Method) -> str:
    """A method's function and all its settings, as text."""
    assert isinstance(method, partial)
    settings = ", ".join(f"{name}={value!r}" for name, value in method.keywords.items())
    return f"{method.func.__name__}({settings})"


def file_of(method: Method) -> Path:
    """Where the rows of a method are kept; another setting has another file."""
    text = described(method)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return folder() / f"{text.partition('(')[0]}-{digest}.jsonl"


def stored(method: Method) -> dict[Key, Row]:
    return {key(row): row for row in outputs.read_json_lines(file_of(method))}


def key(row: Row) -> Key:
    return row["subset"], row["prompt"], row["seed"]


def key_of(subset: str, case: Case) -> Key:
    return subset, case.prompt.text, case.seed


def keys(cases: Cases) -> list[Key]:
    return [key_of(subset, case) for subset, row in cases.items() for case in row]


def batches(
    name: str, subset: str, cases: Sequence[Case], known: Mapping[Key, Row]
) -> Iterator[Batch]:
    """The cases that are not known yet, in batches that share a joiner."""
    missing = [case for case in cases if key_of(subset, case) not in known]
    missing.sort(key=lambda case: case.prompt.joiner)
    for _, group in groupby(missing, key=lambda case: case.prompt.joiner):
        row = list(group)
        for start in range(0, len(row), BATCH):
            yield Batch(name, subset, tuple(row[start : start + BATCH]))


# --- In a process of its own.

_loaded: tuple[Models, Judge] | None = None


def one_thread() -> None:
    """As many processes as cores, a thread each, paint more than one process with all threads."""
    torch.set_num_threads(1)


def models_and_judge() -> tuple[Models, Judge]:
    """Loaded once a process."""
    global _loaded
    if _loaded is None:
        pipe = load_pipeline("pocket", device="cpu", dtype=DTYPE)
        pipe.set_progress_bar_config(disable=True)
        clipseg = load_clipseg("pocket", device="cpu", dtype=DTYPE)
        _loaded = Models(pipe, clipseg), load_judge()
    return _loaded


def paint_and_judge(method: Method, batch: Batch) -> list[Row]:
    """The rows of one batch."""
    models, judge = models_and_judge()
    found = method(models, batch.cases)
    images = [each.image for each in found]
    nouns = [case.prompt.nouns for case in batch.cases]
    verdicts = judge.judge(np.stack([np.asarray(image) for image in images]), nouns)
    views = models.painter(batch.cases, BARE).look(images)
    return [
        {
            "subset": batch.subset,
            "prompt": case.prompt.text,
            "seed": case.seed,
            "all_ok": verdict.all_ok,
            **asdict(verdict),
            **asdict(picture_metrics(view.matrix.numpy())),
            "unet_calls": each.unet_calls,
        }
        for case, each, verdict, view in zip(batch.cases, found, verdicts, views, strict=True)
    ]


# --- Figures.


def alone(methods: Mapping[str, Method]) -> dict[str, float]:
    """Seconds of one picture painted alone, with all cores: the median of `TIMED` cases.

    In batches a method that paints a picture at a time would look slow.
    """
    models, _ = models_and_judge()
    cases = [Case(prompt, FIRST_SEED) for prompt in laboratory()["animal_object"][:TIMED]]
    return {
        name: median(timed(method, models, case) for case in cases)
        for name, method in methods.items()
    }


def timed(method: Method, models: Models, case: Case) -> float:
    begun = time.perf_counter()
    method(models, [case])
    return time.perf_counter() - begun


def summarise(
    rows: Sequence[Row], seconds: Mapping[str, float] | None = None
) -> dict[str, dict[str, Summary]]:
    """The figures by method and subset, and of all subsets together under `POOLED`.

    `seconds` of a picture by method, where they were taken.
    """
    methods = list(dict.fromkeys(row["method"] for row in rows))
    subsets = list(dict.fromkeys(row["subset"] for row in rows))
    return {
        method: {
            subset: summary(
                chosen(rows, method, subset),
                chosen(rows, PLAIN, subset),
                (seconds or {}).get(method),
            )
            for subset in (*subsets, POOLED)
        }
        for method in methods
    }


def chosen(rows: Sequence[Row], method: str, subset: str) -> list[Row]:
    return [row for row in rows if row["method"] == method and subset in (row["subset"], POOLED)]


def summary(rows: Sequence[Row], plain: Sequence[Row], seconds: float | None) -> Summary:
    """The figures of `rows`, paired with `plain`: the same prompts and seeds in the same order."""
    all_ok = column(rows, "all_ok")
    low, high = bootstrap_interval(all_ok)
    return Summary(
        n=len(rows),
        all_ok=float(all_ok.mean()),
        low=low,
        high=high,
        **{name: float(column(rows, name).mean()) for name in (*FAULTS, *FIGURES)},
        unet_calls_mean=float(column(rows, "unet_calls").mean()),
        unet_calls_max=float(column(rows, "unet_calls").max()),
        seconds=seconds,
        **against(column(plain, "all_ok"), all_ok, own=rows[0]["method"] == PLAIN),
    )


def column(rows: Sequence[Row], name: str) -> np.ndarray:
    return np.array([row[name] for row in rows], dtype=np.float64)


def against(plain: np.ndarray, ours: np.ndarray, *, own: bool) -> dict[str, Any]:
    """The paired difference of two rates."""
    if own:
        return {}
    found: Paired = paired(plain, ours, higher_is_better=True)
    return {
        "difference": found.difference_mean,
        "difference_low": found.low,
        "difference_high": found.high,
        "p": found.p,
    }


# --- For the reader.


def write(summaries: Mapping[str, Mapping[str, Summary]], name: str) -> None:
    """The results as JSON, CSV and a plot."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    by_subset = {
        method: {subset: rounded(each) for subset, each in row.items() if subset != POOLED}
        for method, row in summaries.items()
    }
    outputs.save_json(RESULTS / f"{name}.json", by_subset)
    outputs.save_csv(
        RESULTS / f"{name}.csv",
        [
            {"method": method, "subset": subset, **rounded(each)}
            for method, row in summaries.items()
            for subset, each in row.items()
        ],
    )
    pooled = {method: row[POOLED] for method, row in summaries.items()}
    outputs.save_figure(RESULTS / f"{name}.png", plot(pooled))


def rounded(each: Summary) -> Row:
    return {
        name: round(value, 4) if isinstance(value, float) else value
        for name, value in asdict(each).items()
    }


def table(summaries: Mapping[str, Mapping[str, Summary]]) -> str:
    """A Markdown table, a row a method: all-OK rates by subset, then everything together."""
    subsets = list(next(iter(summaries.values())))
    head = ["method", *subsets, "against plain", *FAULTS, "PPV", "NPV", "JS", "calls", "s"]
    lines = [head]
    for method, row in summaries.items():
        pooled = row[POOLED]
        lines.append(
            [
                method.replace("_", " "),
                *(percent(row[subset]) for subset in subsets),
                gain(pooled),
                *(f"{getattr(pooled, fault):.1%}" for fault in FAULTS),
                *(f"{getattr(pooled, figure):.3f}" for figure in FIGURES),
                f"{pooled.unet_calls_mean:.1f} ({pooled.unet_calls_max:g})",
                "-" if pooled.seconds is None else f"{pooled.seconds:.2f}",
            ]
        )
    return markdown([[cell.replace("_", " ") for cell in line] for line in lines])


def percent(each: Summary) -> str:
    low, high = interval(each)
    return f"{each.all_ok:.1%} ({low:.0%} to {high:.0%})"


def interval(each: Summary) -> tuple[float, float]:
    """The rate's interval; of a single picture the rate itself."""
    if each.low is None or each.high is None:
        return each.all_ok, each.all_ok
    return each.low, each.high


def gain(each: Summary) -> str:
    """The paired difference in percentage points."""
    if each.difference is None or each.difference_low is None or each.difference_high is None:
        return "-"
    mean, low, high = (
        f"{100 * value:+.1f}"
        for value in (each.difference, each.difference_low, each.difference_high)
    )
    return f"{mean} ({low} to {high})"


# A marker a curve, so that none is told by its colour alone.
MARKS = "osD^vPX*<>hdp8Hx1+"


def plot(pooled: Mapping[str, Summary]) -> Figure:
    """All-OK rate against mean U-Net calls, a curve a method over its budgets, with intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.add_subplot()
    colours = [tuple(part / 255 for part in each) for each in class_colours(len(MARKS))]
    families: dict[str, list[Summary]] = {}
    for name, each in pooled.items():
        families.setdefault(name.partition("@")[0], []).append(each)
    styles = zip(families.items(), MARKS, colours, range(len(MARKS), 0, -1), strict=False)
    for (family, points), mark, colour, above in styles:
        points.sort(key=lambda each: each.unet_calls_mean)
        rates = np.array([each.all_ok for each in points])
        ends = np.array([interval(each) for each in points]).T
        axes.errorbar(
            [each.unet_calls_mean for each in points],
            100 * rates,
            yerr=100 * np.abs(ends - rates),
            marker=mark,
            color=colour,
            capsize=3,
            zorder=above,  # where two meet, the one that the legend names first is on top
            label=family.replace("_", " "),
        )
    axes.set_xlabel("U-Net calls a picture, mean (both halves of guidance are one)")
    axes.set_ylabel("pictures that are all OK, % (95 % interval)")
    axes.set_title(
        f"The pocket model, all subsets, {next(iter(pooled.values())).n} pictures a method"
    )
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False)
    return figure


if __name__ == "__main__":
    sys.exit(main())
