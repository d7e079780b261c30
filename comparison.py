"""Plain against tempered over a prompt set: a table a subset and in all, for every kind of reader.

What the judges say of the pictures comes first, then CLIPSeg's figures, then what it cost. The
figures are metrics.py's; this file says which of them an evaluation has, and how they are told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

import numpy as np

import judges
from judges import Verdict
from metrics import METRICS, Column, Paired, PictureMetrics, compared, figure_columns
from prompts import UNNAMED

ALL = "all"  # the subsets together
ALL_OK = "all_ok"
UNDEFINED = "-"


@dataclass(frozen=True)
class Pair:
    """What an evaluation knows of one cycle: the pictures of one prompt and seed."""

    prompt: int  # its number in the set, from 1
    subset: str
    seed: int
    plain: PictureMetrics
    tempered: PictureMetrics
    plain_calls: int | None  # U-Net calls of either picture alone; None in old evaluations
    tempered_calls: int | None
    seconds: float  # both pictures
    said: Mapping[str, tuple[Verdict, Verdict]] = field(default_factory=dict)  # by judge


@dataclass(frozen=True)
class Cost:
    """U-Net calls of a picture; both halves of guidance count as one."""

    plain: float
    tempered: float  # mean
    tempered_median: float
    tempered_p95: float  # 95th percentile
    tempered_most: float

    @property
    def times(self) -> float:
        return self.tempered / self.plain


@dataclass(frozen=True)
class Comparison:
    """Plain and tempered on one subset, or on all of them.

    `measures` are of metrics.METRICS by their keys, and of each judge as "judge/all_ok",
    "judge/<fault>" and "judge/<figure>".
    """

    subset: str
    prompts: int
    measures: Mapping[str, Paired]
    cost: Cost | None

    @property
    def pairs(self) -> int:
        return next(iter(self.measures.values())).cycles


def compare(pairs: Sequence[Pair]) -> list[Comparison]:
    """The comparison on each subset in the order of the set, then on all, where there are several.

    Only judges that saw every picture are told.
    """
    named = list(dict.fromkeys(pair.subset for pair in pairs))
    told = judges_of(pairs)
    pooled = comparison(ALL, pairs, told)
    if named == [UNNAMED]:
        return [pooled]
    parts = [[pair for pair in pairs if pair.subset == subset] for subset in named]
    subsets = [comparison(subset, part, told) for subset, part in zip(named, parts, strict=True)]
    return [*subsets, pooled] if len(subsets) > 1 else subsets


def judges_of(pairs: Iterable[Pair]) -> list[str]:
    """The judges that saw all of the pictures."""
    sets = [pair.said.keys() for pair in pairs]
    return [judge for judge in judges.FAULTS if all(judge in each for each in sets)]


def comparison(subset: str, pairs: Sequence[Pair], told: Sequence[str]) -> Comparison:
    groups = np.array([pair.prompt for pair in pairs])
    columns = dict(chain.from_iterable(judge_columns(judge, pairs).items() for judge in told))
    columns |= figure_columns([pair.plain for pair in pairs], [pair.tempered for pair in pairs])
    return Comparison(
        subset, len(set(groups.tolist())), compared(columns, groups=groups), cost_of(pairs)
    )


def judge_columns(judge: str, pairs: Sequence[Pair]) -> dict[str, Column]:
    """What one judge says of each picture: all OK, each fault, its own figures."""

    def column(of: Callable[[Verdict], float], **kind: bool) -> Column:
        plain, tempered = zip(*(map(of, pair.said[judge]) for pair in pairs), strict=True)
        return Column(plain, tempered, **kind)

    columns = {f"{judge}/{ALL_OK}": column(lambda verdict: verdict.all_ok, share=True)}
    for fault in judges.FAULTS[judge]:
        has = partial(has_fault, fault=fault)
        columns[f"{judge}/{fault}"] = column(has, share=True, higher_is_better=False)
    for name in judges.FIGURES[judge]:
        columns[f"{judge}/{name}"] = column(partial(figure_of, name=name))
    return columns


def has_fault(verdict: Verdict, fault: str) -> bool:
    return fault in verdict.faults


def figure_of(verdict: Verdict, name: str) -> float:
    return verdict.figures[name]


def cost_of(pairs: Sequence[Pair]) -> Cost | None:
    plain = [pair.plain_calls for pair in pairs if pair.plain_calls is not None]
    tempered = [pair.tempered_calls for pair in pairs if pair.tempered_calls is not None]
    if not len(plain) == len(tempered) == len(pairs):
        return None
    median, p95, most = np.percentile(tempered, [50, 95, 100]).tolist()
    return Cost(float(np.mean(plain)), float(np.mean(tempered)), median, p95, most)


# --- For the reader.


@dataclass(frozen=True)
class Table:
    """A table of texts: names to the left, figures to the right."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    words: int = 1  # columns of names; the others are figures

    def text(self) -> str:
        """For a terminal: ASCII where its cells are, no newline at the end."""
        table = [self.head, *self.rows]
        widths = [max(len(row[i]) for row in table) for i in range(len(self.head))]
        rule = tuple("-" * width for width in widths)
        lines = ["  ".join(self._cells(row, widths)) for row in (self.head, rule, *self.rows)]
        return "\n".join([self.title, *lines, *([self.note] if self.note else [])])

    def _cells(self, row: Sequence[str], widths: Sequence[int]) -> list[str]:
        return [
            cell.ljust(width) if i < self.words else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]

    def markdown(self) -> str:
        note = ["", self.note] if self.note else []
        return "\n".join([f"**{self.title}**", "", markdown([self.head, *self.rows]), *note])


def markdown(rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """A Markdown table; the first row is its head, and all columns but `words` are figures."""
    head, *body = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    marks = [*["---"] * words, *["---:"] * (len(head) - words)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, marks, *body))


def tables(comparisons: Sequence[Comparison], seconds: Mapping[str, float]) -> list[Table]:
    """All tables of an evaluation; `seconds` of a pair by subset, where they were taken."""
    told = [judge for judge in judges.FAULTS if f"{judge}/{ALL_OK}" in comparisons[0].measures]
    found = [rate_table(judge, comparisons) for judge in told]
    found += [fault_table(judge, comparisons) for judge in told]
    return [*found, figure_table(comparisons), cost_table(comparisons, seconds)]


def rate_table(judge: str, comparisons: Sequence[Comparison]) -> Table:
    """How often a judge finds a picture all OK."""
    rows = []
    for each in comparisons:
        rate = each.measures[f"{judge}/{ALL_OK}"]
        rows.append(
            (
                each.subset,
                str(each.pairs),
                percent(rate.plain_mean),
                percent(rate.tempered_mean),
                between(rate.difference_mean, rate.low, rate.high, points),
                p_text(rate.p),
                between(rate.failures_cut, rate.cut_low, rate.cut_high, percent),
                str(rate.better),
                str(rate.worse),
            )
        )
    prompts = max(each.prompts for each in comparisons)
    drawn = f"{prompts} prompts" if prompts > 1 else "the seeds of one prompt"
    return Table(
        f"all OK, says {judge}",
        (
            *("subset", "pairs", "plain", "tempered", "difference (95 %)", "McNemar p"),
            *("failures cut (95 %)", "rescued", "spoiled"),
        ),
        tuple(rows),
        f"95 %: bootstrap over {drawn}; difference in percentage points",
    )


def fault_table(judge: str, comparisons: Sequence[Comparison]) -> Table:
    """What a judge finds wrong, as shares of all pictures."""
    faults = judges.FAULTS[judge]
    rows = []
    for each in comparisons:
        found = [each.measures[f"{judge}/{fault}"] for fault in faults]
        changes = (f"{percent(f.plain_mean)} -> {percent(f.tempered_mean)}" for f in found)
        rows.append((each.subset, *changes))
    return Table(f"faults, says {judge} (plain -> tempered)", ("subset", *faults), tuple(rows))


def figure_table(comparisons: Sequence[Comparison]) -> Table:
    """Figures of pictures: CLIPSeg's, and those that a judge's recipe reports."""
    rows = [
        (
            *([each.subset] if len(comparisons) > 1 else []),
            name,
            better,
            f"{found.plain_mean:.4f}",
            f"{found.tempered_mean:.4f}",
            between(found.difference_mean, found.low, found.high, signed),
            p_text(found.p),
            percent(found.improved),
        )
        for each in comparisons
        for name, better, found in figures_of(each)
    ]
    cycles = comparisons[-1].pairs
    subset = ["subset"] if len(comparisons) > 1 else []
    return Table(
        "figures",
        (
            *(*subset, "metric", "better", "plain", "tempered"),
            *("difference (95 %)", "Wilcoxon p", "improved"),
        ),
        tuple(rows),
        f"{cycles} {'cycle' if cycles == 1 else 'cycles'}; difference = tempered - plain; PPV, NPV "
        "and JS are as CLIPSeg sees it, which steered",
        words=len(subset) + 2,
    )


def figures_of(each: Comparison) -> Iterable[tuple[str, str, Paired]]:
    """Name, better direction and statistics of every figure."""
    for key, metric in METRICS.items():
        yield metric.name, metric.better, each.measures[key]
    for judge, names in judges.FIGURES.items():
        for key, name in names.items():
            if f"{judge}/{key}" in each.measures:
                yield name, "higher", each.measures[f"{judge}/{key}"]


def cost_table(comparisons: Sequence[Comparison], seconds: Mapping[str, float]) -> Table:
    """What a picture costs."""
    rows = []
    for each in comparisons:
        cost = each.cost
        calls = [UNDEFINED] * 6
        if cost:
            spread = cost.tempered_median, cost.tempered_p95, cost.tempered_most
            calls = [f"{cost.plain:.1f}", f"{cost.tempered:.1f}", *(f"{n:.0f}" for n in spread)]
            calls.append(f"{cost.times:.2f}")
        taken = seconds.get(each.subset)
        rows.append((each.subset, *calls, UNDEFINED if taken is None else f"{taken:.2f}"))
    return Table(
        "cost: U-Net calls of a picture, seconds of a pair",
        (
            *("subset", "plain", "tempered", "median", "95th percentile", "most"),
            *("tempered / plain", "s"),
        ),
        tuple(rows),
    )


def percent(share: float) -> str:
    return f"{100 * share + 0.0:.1f} %"


def points(difference: float) -> str:
    """A difference of shares in percentage points."""
    return f"{round(100 * difference, 1) + 0.0:+.1f}"  # + 0.0 turns -0.0 into 0.0


def signed(value: float) -> str:
    return f"{round(value, 4) + 0.0:+.4f}"


def between(
    value: float | None, low: float | None, high: float | None, shown: Callable[[float], str]
) -> str:
    """A figure with its interval; of a single picture without."""
    if value is None:
        return UNDEFINED
    if low is None or high is None:
        return shown(value)
    return f"{shown(value)} ({shown(low)} to {shown(high)})"


def p_text(p: float | None) -> str:
    if p is None:
        return UNDEFINED
    return "<0.0001" if p < 0.0001 else f"{p:.4f}"
