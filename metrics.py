"""How well each subject of a picture is itself and not its neighbour; statistics over cycles.

| here                       | symbol      | meaning                                              |
|----------------------------|-------------|------------------------------------------------------|
| `classes`                  | C           | number of classes (= prompts)                        |
| `matrix`                   | M (C, C)    | M[i, j]: mean probability of class j, in 0..1, over  |
|                            |             | the pixels of class i; a row of 0 where i has none   |
| `matrix.sum(axis=1)`       | sum_j M[ij] | row sum; 0 marks a missing class                     |
| `true_negative`            | TN_i        | sum over j != i of 1 - M[j, i]                       |
| `false_negative`           | FN_i        | sum over j != i of M[j, i]                           |
| `ppv(matrix)`              | PPV_i       | M[i, i] / sum_j M[i, j]                              |
| `npv(matrix)`              | NPV_i       | TN_i / (TN_i + FN_i)                                 |
| `js_distance(matrix)`      | d_i         | sqrt(JSD(e_i, M[i] / sum_j M[i, j])), base 2         |
| `cycles`                   | N           | pairs of a plain and a tempered picture of one seed  |
| `differences`              | D (N,)      | tempered - plain, one for each cycle                 |
| `groups`                   | P           | prompts: cycles of one prompt belong together        |

Everything is float64 and pure: no model, no torch, no file. scipy, a tenth of what a start would
spend on imports, is imported where it is used: after the pictures.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = NDArray[np.float64]
Groups = Sequence[object] | NDArray[Any]  # a name a cycle, of the prompt that it is of

RESAMPLES = 10_000  # another seed moves an interval's ends by about 1 % of its length (at N = 20)
CONFIDENCE = 0.95
DECIMALS = 12  # differences below 1e-12 are the rounding of float64 sums, not an effect


class Metric(NamedTuple):
    """What a reader needs to know of a metric to read its figures."""

    name: str
    higher_is_better: bool

    @property
    def better(self) -> str:
        return "higher" if self.higher_is_better else "lower"


METRICS = {
    "ppv": Metric("PPV", higher_is_better=True),
    "npv": Metric("NPV", higher_is_better=True),
    "js": Metric("JS distance", higher_is_better=False),
}


# ---- One picture ----


def ppv(matrix: ArrayLike) -> Array:
    """Positive predictive value (precision) of each class: M[i, i] / sum_j M[i, j].

    matrix: (C, C), in 0..1. Returns (C,) float64 in 0..1, higher is better, 0 for a missing class.
    Raises InputError for a matrix that is not square, empty, not finite or not in 0..1.
    """
    checked = _class_matrix(matrix)
    total = checked.sum(axis=1)  # (C,)
    precision = np.zeros(len(checked))
    np.divide(checked.diagonal(), total, out=precision, where=total > 0)
    return precision


def npv(matrix: ArrayLike) -> Array:
    """Negative predictive value of each class: TN / (TN + FN), over the pixels of the others.

    TN_i = sum over j != i of 1 - M[j, i], FN_i = sum over j != i of M[j, i]. A missing class is
    scored like any other: its own row does not enter, and its row of 0 does not blame the others.
    A class alone (C = 1) has no negatives and 0 / 0 is not a score: 1 if present, 0 if missing.

    matrix: (C, C), in 0..1. Returns (C,) float64 in 0..1, higher is better.
    Raises InputError for a matrix that is not square, empty, not finite or not in 0..1.
    """
    checked = _class_matrix(matrix)
    if len(checked) == 1:
        return np.where(checked[0] > 0, 1.0, 0.0)
    others = ~np.eye(len(checked), dtype=bool)  # (C, C)
    true_negative: Array = (1 - checked).sum(axis=0, where=others)  # (C,)
    false_negative: Array = checked.sum(axis=0, where=others)  # (C,)
    return true_negative / (true_negative + false_negative)  # the denominator is C - 1


def js_distance(matrix: ArrayLike) -> Array:
    """Jensen-Shannon distance of each class from its ideal, the one-hot distribution of the class.

    d_i = sqrt(JSD(e_i, M[i] / sum_j M[i, j])) with logarithms of base 2: the square root of the
    divergence of Lin 1991, a metric by Endres and Schindelin 2003.

    matrix: (C, C), in 0..1. Returns (C,) float64 in 0..1, lower is better, 1 for a missing class.
    Raises InputError for a matrix that is not square, empty, not finite or not in 0..1.
    """
    from scipy.spatial.distance import jensenshannon

    checked = _class_matrix(matrix)
    present = checked.sum(axis=1) > 0  # (C,)
    distance = np.ones(len(checked))
    if present.any():
        ideal = np.eye(len(checked))[present]  # (present, C)
        # So close to the ideal that rounding takes the divergence below 0, its root is NaN.
        with np.errstate(invalid="ignore"):
            found = jensenshannon(ideal, checked[present], base=2, axis=1)  # normalises the rows
        distance[present] = np.nan_to_num(found, nan=0.0)
    return distance


@dataclass(frozen=True)
class PictureMetrics:
    """The figures of one picture: means over its classes of PPV, NPV and JS distance, in 0..1."""

    ppv: float
    npv: float
    js: float

    def __str__(self) -> str:
        return f"PPV {self.ppv:.3f}  NPV {self.npv:.3f}  JS {self.js:.3f}"


def picture_metrics(matrix: ArrayLike) -> PictureMetrics:
    """The figures of the picture that has this class matrix.

    matrix: (C, C), in 0..1; see `ppv`, `npv` and `js_distance` for the values and the errors.
    """
    return PictureMetrics(
        ppv=float(ppv(matrix).mean()),
        npv=float(npv(matrix).mean()),
        js=float(js_distance(matrix).mean()),
    )


def _class_matrix(matrix: ArrayLike) -> Array:
    """The matrix as (C, C) float64, or InputError."""
    checked = _numbers(matrix, "The class matrix")
    if checked.ndim != 2 or checked.shape[0] != checked.shape[1] or checked.size == 0:
        raise InputError(
            f"The class matrix must be square, (C, C) with C >= 1; got shape {checked.shape}."
        )
    wrong = ~((checked >= 0) & (checked <= 1))  # NaN compares false, so it is wrong too
    if wrong.any():
        row, column = (int(index) for index in np.argwhere(wrong)[0])
        raise InputError(
            "The class matrix must hold finite probabilities in 0..1; "
            f"got {checked[row, column]} at row {row}, column {column}."
        )
    return checked


def _numbers(values: ArrayLike, what: str) -> Array:
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        received = textwrap.shorten(repr(values), 60, placeholder=" ...")
        raise InputError(f"{what} must be an array of real numbers; got {received}.") from error


# ---- Many pictures ----


@dataclass(frozen=True)
class Paired:
    """One measure over cycles, each a plain and a tempered picture of the same prompt and seed.

    `difference_mean`, `low` and `high` are tempered - plain, so their sign does not say better or
    worse; `improved` does. None is undefined, never NaN.
    """

    plain_mean: float
    tempered_mean: float
    plain_median: float
    tempered_median: float
    difference_mean: float
    low: float | None  # bootstrap 95 % interval of difference_mean; None for a single cycle
    high: float | None
    # Wilcoxon's of a figure, McNemar's of a share; two-sided, 0..1; None where no cycle differs.
    p: float | None
    improved: float  # share of cycles strictly better, 0..1; an equal cycle did not improve
    cycles: int
    better: int  # cycles strictly better: of a share, the pictures that were rescued
    worse: int  # and strictly worse: those that were spoiled
    # Of a share: the part of plain's failures that tempering has less, with its 95 % interval.
    failures_cut: float | None = None  # None where plain fails nowhere
    cut_low: float | None = None
    cut_high: float | None = None

    @property
    def interval(self) -> tuple[float, float] | None:
        return None if self.low is None or self.high is None else (self.low, self.high)


class Column(NamedTuple):
    """One measure of both pictures of N cycles: a figure, or as a share 1 and 0 for yes and no."""

    plain: ArrayLike
    tempered: ArrayLike
    higher_is_better: bool = True
    share: bool = False


def compared(
    columns: Mapping[str, Column],
    *,
    groups: Groups | None = None,
    seed: int = 0,
) -> dict[str, Paired]:
    """Statistics of each measure: means, medians, bootstrap interval, p, improved share.

    The interval is the percentile bootstrap of the mean difference (Efron and Tibshirani 1993,
    chapter 13) of 10,000 resamples, the same for the same seed. With a handful of cycles it is
    rather too narrow. `groups` (N,) says which cycles belong together, as the seeds of one prompt
    do: then whole groups are drawn (Davison and Hinkley 1997, section 3.8). Where all cycles are
    of one group, or without `groups`, cycles are.

    p of a figure is Wilcoxon's (1945): cycles without a difference are dropped, and with N others
    it can not be below 2 / 2**N, so fewer than 6 cycles never reach 0.05. p of a share is
    McNemar's (1947), exact: of the cycles that differ, how likely so many go the same way by
    chance. Both take cycles for independent.

    Raises InputError for values that are empty, not of equal length or not finite, and for a seed
    that is not an integer of 0 or more.
    """
    pairs = {name: _pairs(column.plain, column.tempered) for name, column in columns.items()}
    values = np.stack([side for pair in pairs.values() for side in pair], axis=1)  # (N, 2 K)
    means = resampled_means(values, groups, seed)
    return {
        name: _paired(columns[name], *pair, None if means is None else means[:, 2 * k : 2 * k + 2])
        for k, (name, pair) in enumerate(pairs.items())
    }


def _paired(column: Column, before: Array, after: Array, means: Array | None) -> Paired:
    differences = np.round(after - before, DECIMALS)  # (N,); so that equal ones tie in the ranks
    gains = differences if column.higher_is_better else -differences
    better, worse = int((gains > 0).sum()), int((gains < 0).sum())
    low, high = _interval(None if means is None else means[:, 1] - means[:, 0])
    can_fail = column.share and column.higher_is_better
    return Paired(
        plain_mean=float(before.mean()),
        tempered_mean=float(after.mean()),
        plain_median=float(np.median(before)),
        tempered_median=float(np.median(after)),
        difference_mean=float(differences.mean()),
        low=low,
        high=high,
        p=mcnemar_p(better, worse) if column.share else _wilcoxon_p(differences),
        improved=float((gains > 0).mean()),
        cycles=len(differences),
        better=better,
        worse=worse,
        **(_failures(before, after, means) if can_fail else {}),
    )


def _failures(before: Array, after: Array, means: Array | None) -> dict[str, float | None]:
    """The part of plain's failures that tempering has less, 1 - (1 - tempered) / (1 - plain)."""
    failing = 1 - before.mean()
    if failing == 0:
        return {}
    low, high = None, None
    if means is not None:
        some = means[:, 0] < 1  # a resample may have no failure of plain's
        low, high = _interval(1 - (1 - means[some, 1]) / (1 - means[some, 0]))
    cut = float(1 - (1 - after.mean()) / failing)
    return {"failures_cut": cut, "cut_low": low, "cut_high": high}


def paired(
    plain: Sequence[float] | Array,
    tempered: Sequence[float] | Array,
    *,
    higher_is_better: bool,
    seed: int = 0,
) -> Paired:
    """Statistics of the paired figures of one measure; see `compared` for what and the errors.

    plain, tempered: (N,) each, N >= 1, cycle n of one belongs to cycle n of the other.
    """
    column = Column(plain, tempered, higher_is_better)
    return compared({"": column}, seed=seed)[""]


def summarise(
    plain: Sequence[PictureMetrics],
    tempered: Sequence[PictureMetrics],
    groups: Groups | None = None,
) -> dict[str, Paired]:
    """The statistics of every metric over cycles, with the keys "ppv", "npv" and "js".

    plain, tempered: N pictures each, N >= 1, in the same order of cycles; `groups` as in
    `compared`, which also says what is raised.
    """
    return compared(figure_columns(plain, tempered), groups=groups)


def figure_columns(
    plain: Sequence[PictureMetrics], tempered: Sequence[PictureMetrics]
) -> dict[str, Column]:
    """The metrics of N pictures each as columns of `compared`."""
    return {
        key: Column(
            [getattr(picture, key) for picture in plain],
            [getattr(picture, key) for picture in tempered],
            metric.higher_is_better,
        )
        for key, metric in METRICS.items()
    }


def _pairs(plain: ArrayLike, tempered: ArrayLike) -> tuple[Array, Array]:
    """Both as (N,) float64, or InputError."""
    before = _numbers(plain, "The plain figures")
    after = _numbers(tempered, "The tempered figures")
    if before.ndim != 1 or before.shape != after.shape or before.size == 0:
        raise InputError(
            "Plain and tempered must be one figure a cycle each, at least one and as many of both; "
            f"got shapes {before.shape} and {after.shape}."
        )
    for name, values in (("plain", before), ("tempered", after)):
        wrong = np.flatnonzero(~np.isfinite(values))
        if wrong.size:
            raise InputError(
                f"Every figure must be finite; got {values[wrong[0]]} in {name} cycle {wrong[0]}."
            )
    return before, after


def bootstrap_interval(values: Array, seed: int = 0) -> tuple[float | None, float | None]:
    """The percentile bootstrap 95 % interval of the mean of `values` (N,); None for a single one.

    Efron and Tibshirani 1993, chapter 13; 10,000 resamples, the same for the same seed. Raises
    InputError for a seed that is not an integer of 0 or more.
    """
    means = resampled_means(np.asarray(values, dtype=np.float64)[:, None], None, seed)
    return _interval(None if means is None else means[:, 0])


def resampled_means(values: Array, groups: Groups | None = None, seed: int = 0) -> Array | None:
    """Column means (10,000, K) of bootstrap resamples of `values` (N, K); None where N is 1.

    As many groups are drawn, with replacement, as there are, and each comes with all its rows.
    """
    if not isinstance(seed, int | np.integer) or seed < 0:
        raise InputError(f"The bootstrap's seed must be an integer of 0 or more; got {seed!r}.")
    if len(values) == 1:
        return None  # one value says nothing of its spread
    alone = groups is None or len(set(groups)) == 1
    members = np.arange(len(values)) if alone else np.asarray(groups)
    _, group_of = np.unique(members, return_inverse=True)
    count = int(group_of.max()) + 1
    sums = np.stack([np.bincount(group_of, column) for column in values.T], axis=1)  # (P, K)
    sizes = np.bincount(group_of).astype(np.float64)  # (P,)
    rng = np.random.default_rng(seed)
    batch = max(1, 1_000_000 // count)  # 8 MB at a time, for any number of groups
    parts = []
    for start in range(0, RESAMPLES, batch):
        rows = min(batch, RESAMPLES - start)
        draws = rng.integers(0, count, (rows, count)) + count * np.arange(rows)[:, None]
        times = np.bincount(draws.ravel(), minlength=rows * count).reshape(rows, count)
        parts.append((times @ sums) / (times @ sizes)[:, None])
    return np.concatenate(parts)


def _interval(resampled: Array | None) -> tuple[float | None, float | None]:
    """The ends between which `CONFIDENCE` of the resampled values lie."""
    if resampled is None or not len(resampled):
        return None, None
    tail = (1 - CONFIDENCE) / 2
    low, high = np.round(np.quantile(resampled, (tail, 1 - tail)), DECIMALS)
    return float(low), float(high)


def mcnemar_p(better: int, worse: int) -> float | None:
    """McNemar's exact two-sided p from the pairs that differ; None where none does."""
    from scipy import stats

    changed = better + worse
    return float(stats.binomtest(better, changed, 0.5).pvalue) if changed else None


def _wilcoxon_p(differences: Array) -> float | None:
    from scipy import stats

    # Dropping zeros is what scipy does too, but only without them does it take the exact test.
    changed = differences[differences != 0]
    return float(stats.wilcoxon(changed).pvalue) if changed.size else None


# ---- For the reader ----

# Blue and vermillion of Okabe and Ito's palette for colour-blind readers (jfly.uni-koeln.de/color).
# Shape tells them apart as well: a ring and a smaller diamond, so that both show on one spot.
PLAIN_MARK: dict[str, Any] = {"marker": "o", "facecolors": "white", "edgecolors": "#0072B2"}
TEMPERED_MARK: dict[str, Any] = {"marker": "D", "facecolors": "#D55E00", "edgecolors": "black"}
NARROWEST = 0.04  # of an axis: a single cycle is not blown up until its rounding shows


def scatter(
    plain: Sequence[PictureMetrics], tempered: Sequence[PictureMetrics], title: str
) -> Figure:
    """NPV on x, PPV on y, an arrow from each plain picture to its tempered one, means larger.

    From two cycles on, a larger pair of marks and a bolder arrow show the means.

    plain, tempered: N pictures each, N >= 1, in the same order. title: plain text, wrapped.
    Returns a figure of its own, unknown to pyplot, for `figure.savefig`.
    Raises InputError for pictures that are none, not as many of both, or not finite.
    """
    from matplotlib.figure import Figure

    npv_pairs = _pairs([picture.npv for picture in plain], [picture.npv for picture in tempered])
    ppv_pairs = _pairs([picture.ppv for picture in plain], [picture.ppv for picture in tempered])
    points = np.stack([npv_pairs, ppv_pairs], axis=-1)  # (plain or tempered, N, x or y)

    figure = Figure(figsize=(6.4, 6.0), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    _frame(axes, points, title)
    _draw_cycles(axes, points)
    if points.shape[1] > 1:  # the mean of a single cycle is the cycle
        _draw_means(axes, points.mean(axis=1, keepdims=True))
    # Outside the axes, where it can not cover a point.
    legend = figure.legend(loc="outside lower center", ncols=4, frameon=False)
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_alpha(1)
    return figure


def _frame(axes: Axes, points: Array, title: str) -> None:
    axes.set_title(textwrap.fill(title, 60), parse_math=False)  # a prompt may hold a dollar sign
    axes.set_xlabel("NPV (higher is better)")
    axes.set_ylabel("PPV (higher is better)")
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    low, high = points.min(axis=(0, 1)), points.max(axis=(0, 1))  # (x, y) each
    reach = np.maximum(high - low, NARROWEST) * 0.6  # a tenth of air on each side, for the marks
    starts, ends = (low + high) / 2 - reach, (low + high) / 2 + reach
    axes.set(xlim=(starts[0], ends[0]), ylim=(starts[1], ends[1]))
    for axis, start, end in zip((axes.xaxis, axes.yaxis), starts, ends, strict=True):
        ticks = axis.get_ticklocs()
        # The air may lie beyond 0 or 1, where no figure can be; ticks beyond the limits move them.
        axis.set_ticks(ticks[(ticks >= max(start, -1e-9)) & (ticks <= min(end, 1 + 1e-9))])


def _draw_cycles(axes: Axes, points: Array) -> None:
    crowd = min(1.0, 2 / np.sqrt(points.shape[1]))  # 1 up to 4 cycles, then smaller and fainter
    _arrows(axes, points, width=0.008 + 0.012 * crowd, color="0.35", alpha=0.25 + 0.75 * crowd)
    shared = {"alpha": 0.5 + 0.5 * crowd, "zorder": 3}
    plain = PLAIN_MARK | shared | {"s": 18 + 82 * crowd, "linewidths": 0.8 + 1.2 * crowd}
    tempered = TEMPERED_MARK | shared | {"s": 10 + 30 * crowd, "linewidths": 0}
    axes.scatter(*points[0].T, label="plain", **plain)
    axes.scatter(*points[1].T, label="tempered", **tempered)


def _draw_means(axes: Axes, means: Array) -> None:
    _arrows(axes, means, width=0.03, color="0.1", alpha=1.0, zorder=4)
    plain = PLAIN_MARK | {"s": 240, "linewidths": 3.5, "zorder": 5}
    tempered = TEMPERED_MARK | {"s": 100, "linewidths": 1.2, "zorder": 5}
    axes.scatter(*means[0].T, label="plain mean", **plain)
    axes.scatter(*means[1].T, label="tempered mean", **tempered)


def _arrows(axes: Axes, points: Array, *, width: float, zorder: float = 2, **style: Any) -> None:
    """From points[0] to points[1], both (N, x or y) in data coordinates; width in inches."""
    axes.quiver(
        *points[0].T,
        *(points[1] - points[0]).T,
        angles="xy",
        scale_units="xy",
        scale=1,
        units="inches",
        width=width,
        zorder=zorder,
        headwidth=6,
        headlength=9,  # times the width: the head shows from under a diamond
        headaxislength=8,
        **style,
    )
