"""Metrics against matrices worked out by hand, statistics against samples counted by hand."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.quiver import Quiver
from scipy.spatial.distance import jensenshannon

import metrics
from errors import InputError
from metrics import (
    Column,
    Paired,
    PictureMetrics,
    compared,
    js_distance,
    mcnemar_p,
    npv,
    paired,
    picture_metrics,
    ppv,
    scatter,
    summarise,
)

pytestmark = pytest.mark.filterwarnings("error")  # nothing here may warn its user

# PPV: 0.6 / (0.6 + 0.2) = 0.75 and 0.5 / (0.3 + 0.5) = 0.625.
# NPV: of class 0 from M[1, 0], (1 - 0.3) / 1 = 0.7; of class 1 from M[0, 1], (1 - 0.2) / 1 = 0.8.
TWO = [[0.6, 0.2], [0.3, 0.5]]

# PPV: 0.8 / 1.0 = 0.8, 0.6 / 1.0 = 0.6, 0.5 / 1.0 = 0.5.
# NPV, down each column: (0.7 + 0.9) / 2 = 0.8, (0.9 + 0.6) / 2 = 0.75, (0.9 + 0.9) / 2 = 0.9.
THREE = [[0.8, 0.1, 0.1], [0.3, 0.6, 0.1], [0.1, 0.4, 0.5]]

# Class 1 has no pixel. PPV: 0.6 / 0.8 = 0.75, then 0 by definition.
# NPV: of class 0, (1 - 0) / 1 = 1; of class 1, (1 - 0.2) / 1 = 0.8.
MISSING = [[0.6, 0.2], [0.0, 0.0]]


def closed_form(own: float) -> float:
    """The distance of (1, 0) from (own, 1 - own); with m = ((1 + own) / 2, (1 - own) / 2).

    JSD = KL((1, 0), m) / 2 + KL((own, 1 - own), m) / 2, where the second term of the second KL is
    (1 - own) log2(2) = 1 - own.
    """
    ideal = math.log2(2 / (1 + own))
    actual = own * math.log2(2 * own / (1 + own)) + 1 - own
    return math.sqrt((ideal + actual) / 2)


# ---- One picture ----


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        (TWO, [0.75, 0.625]),
        (THREE, [0.8, 0.6, 0.5]),
        (MISSING, [0.75, 0.0]),
        (np.eye(3), [1.0, 1.0, 1.0]),
        ([[0.3, 0.0], [0.0, 0.01]], [1.0, 1.0]),  # a faint class without others is still pure
        ([[0.0, 0.4], [0.4, 0.0]], [0.0, 0.0]),  # swapped: nothing of a class is on its pixels
        ([[0.7]], [1.0]),  # 0.7 / 0.7
        ([[0.0]], [0.0]),  # alone and missing
        (np.zeros((2, 2)), [0.0, 0.0]),
    ],
)
def test_ppv_by_hand(matrix: Any, expected: list[float]) -> None:
    assert ppv(matrix) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        (TWO, [0.7, 0.8]),
        (THREE, [0.8, 0.75, 0.9]),
        (MISSING, [1.0, 0.8]),
        (np.eye(3), [1.0, 1.0, 1.0]),
        ([[1.0, 1.0], [1.0, 1.0]], [0.0, 0.0]),  # each class is everywhere on the other
        ([[0.7]], [1.0]),  # no negatives: present
        ([[0.0]], [0.0]),  # no negatives: missing, never a perfect score
        (np.zeros((2, 2)), [1.0, 1.0]),  # as defined: rows of 0 hold no false negatives
    ],
)
def test_npv_by_hand(matrix: Any, expected: list[float]) -> None:
    assert npv(matrix) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        # own = PPV: log2(2 / 1.75) = 0.1926451, 0.75 log2(1.5 / 1.75) + 0.25 = 0.0832057,
        # sqrt(0.2758508 / 2) = 0.3713831; and for own = 0.625: log2(2 / 1.625) = 0.2995603,
        # 0.625 log2(1.25 / 1.625) + 0.375 = 0.1384302, sqrt(0.4379905 / 2) = 0.4679693.
        (TWO, [0.3713831, 0.4679693]),
        (MISSING, [0.3713831, 1.0]),
        (np.eye(3), [0.0, 0.0, 0.0]),
        ([[0.0, 0.4], [0.4, 0.0]], [1.0, 1.0]),  # disjoint distributions: one bit
        ([[0.7]], [0.0]),  # (0.7) / 0.7 is the ideal itself
        ([[0.0]], [1.0]),  # alone and missing
        (np.zeros((2, 2)), [1.0, 1.0]),
    ],
)
def test_js_by_hand(matrix: Any, expected: list[float]) -> None:
    assert js_distance(matrix) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("own", [0.01, 0.25, 0.5, 0.9, 0.999])
def test_js_is_the_closed_form_for_two_classes(own: float) -> None:
    matrix = [[own, 1 - own], [0.4 * (1 - own), 0.4 * own]]  # the scale of a row does not count
    assert js_distance(matrix) == pytest.approx([closed_form(own)] * 2, abs=1e-12)


def test_js_is_scipys_row_by_row() -> None:
    matrix = np.random.default_rng(0).random((5, 5))
    by_row = [jensenshannon(np.eye(5)[i], matrix[i] / matrix[i].sum(), base=2) for i in range(5)]
    assert js_distance(matrix) == pytest.approx(by_row, abs=1e-12)


def test_js_close_to_the_ideal_is_zero_and_not_nan() -> None:
    row = np.array([0.379618095, 4.62908678e-17])
    with np.errstate(invalid="ignore"):
        assert np.isnan(jensenshannon([1, 0], row, base=2))  # what scipy alone makes of it
    assert js_distance([row, row[::-1]]) == pytest.approx([0, 0], abs=1e-7)


@pytest.mark.parametrize("metric", [ppv, npv, js_distance])
def test_every_class_keeps_its_range_shape_and_dtype(metric: Callable[..., Any]) -> None:
    generator = np.random.default_rng(1)
    for classes in range(1, 7):
        # Powers down to 1e-300 reach every kind of rounding; some rows are missing.
        scale = 10.0 ** -generator.integers(0, 300, (200, classes, 1))
        matrices = generator.random((200, classes, classes)) * scale
        matrices[generator.random((200, classes)) < 0.2] = 0
        for matrix in matrices:
            value = metric(matrix)
            assert value.shape == (classes,)
            assert value.dtype == np.float64
            assert ((value >= 0) & (value <= 1)).all()


@pytest.mark.parametrize("metric", [ppv, npv, js_distance])
def test_metrics_follow_the_classes_when_these_change_places(metric: Callable[..., Any]) -> None:
    matrix, order = np.random.default_rng(2).random((4, 4)), [2, 0, 3, 1]
    swapped = metric(matrix[np.ix_(order, order)])
    assert swapped == pytest.approx(metric(matrix)[order], abs=1e-14)


def test_float32_is_computed_in_float64() -> None:
    matrix = np.array(TWO, dtype=np.float32)
    assert (ppv(matrix) == ppv(matrix.astype(np.float64))).all()


@pytest.mark.parametrize("metric", [ppv, npv, js_distance, picture_metrics])
def test_the_matrix_is_left_as_it_was(metric: Callable[..., Any]) -> None:
    matrix = np.array(MISSING)
    metric(matrix)
    assert matrix.tolist() == MISSING


def test_a_picture_is_the_mean_over_its_classes() -> None:
    # (0.75 + 0.625) / 2 = 0.6875, (0.7 + 0.8) / 2 = 0.75, (0.3713831 + 0.4679693) / 2 = 0.4196762
    figures = picture_metrics(TWO)
    assert dataclasses.astuple(figures) == pytest.approx((0.6875, 0.75, 0.4196762), abs=1e-7)
    # (0.8 + 0.6 + 0.5) / 3 = 0.6333, (0.8 + 0.75 + 0.9) / 3 = 0.8167
    three = picture_metrics(THREE)
    assert (three.ppv, three.npv) == pytest.approx((19 / 30, 49 / 60))


def test_a_missing_subject_is_never_a_perfect_picture() -> None:
    # One of two pure classes is missing: PPV (1 + 0) / 2, distance (0 + 1) / 2.
    figures = picture_metrics([[1.0, 0.0], [0.0, 0.0]])
    assert (figures.ppv, figures.js) == (0.5, 0.5)
    assert picture_metrics([[0.0]]) == PictureMetrics(ppv=0.0, npv=0.0, js=1.0)
    assert picture_metrics(np.eye(2)) == PictureMetrics(ppv=1.0, npv=1.0, js=0.0)


def test_figures_are_frozen_and_ready_for_json() -> None:
    figures = picture_metrics(TWO)
    assert json.loads(json.dumps(dataclasses.asdict(figures)))["ppv"] == pytest.approx(0.6875)
    with pytest.raises(dataclasses.FrozenInstanceError):
        figures.ppv = 1.0  # type: ignore[misc]


@pytest.mark.parametrize("metric", [ppv, npv, js_distance, picture_metrics])
@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        ([[0.1, 0.2]], r"square, \(C, C\).*got shape \(1, 2\)"),
        ([0.1, 0.2], r"square.*got shape \(2,\)"),
        (0.5, r"square.*got shape \(\)"),
        (np.zeros((2, 2, 2)), r"square.*got shape \(2, 2, 2\)"),
        (np.zeros((0, 0)), r"C >= 1; got shape \(0, 0\)"),
        ([[0.1, math.nan], [0.1, 0.1]], r"finite.*got nan at row 0, column 1"),
        ([[0.1, 0.1], [math.inf, 0.1]], r"finite.*got inf at row 1, column 0"),
        ([[0.1, 0.1], [0.1, 1.5]], r"0\.\.1; got 1\.5 at row 1, column 1"),
        ([[-0.25, 0.1], [0.1, 0.5]], r"0\.\.1; got -0\.25 at row 0, column 0"),
        ([[0.1, 0.2], [0.3]], r"array of real numbers; got \[\[0\.1, 0\.2\], \[0\.3\]\]"),
        ("dog", r"array of real numbers; got 'dog'"),
    ],
)
def test_an_unusable_matrix_is_told(metric: Callable[..., Any], matrix: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        metric(matrix)
    assert "\n" not in str(caught.value)


# ---- Many pictures ----

PLAIN = [0.50, 0.40, 0.60, 0.70, 0.30]
TEMPERED = [0.60, 0.60, 0.60, 0.65, 0.60]
# Differences: +0.1, +0.2, 0, -0.05, +0.3; mean 0.55 / 5 = 0.11; three of five up, one down.
# Means 2.5 / 5 = 0.5 and 3.05 / 5 = 0.61; medians 0.5 and 0.6.
# Ranks without the 0: 0.05 -> 1, 0.1 -> 2, 0.2 -> 3, 0.3 -> 4. The minus ranks sum to 1. Of the 16
# ways to give four ranks a sign, two (none; 1 alone) have a sum of 1 or less: p = 2 * 2 / 16.


def test_paired_by_hand() -> None:
    figures = paired(PLAIN, TEMPERED, higher_is_better=True)
    assert figures.plain_mean == pytest.approx(0.5)
    assert figures.tempered_mean == pytest.approx(0.61)
    assert figures.plain_median == 0.5
    assert figures.tempered_median == 0.6
    assert figures.difference_mean == pytest.approx(0.11)
    assert figures.p == pytest.approx(0.25)
    assert figures.improved == pytest.approx(3 / 5)
    assert figures.cycles == 5
    assert json.loads(json.dumps(dataclasses.asdict(figures)))["cycles"] == 5


def test_improved_respects_the_direction() -> None:
    higher = paired(PLAIN, TEMPERED, higher_is_better=True)
    lower = paired(PLAIN, TEMPERED, higher_is_better=False)
    assert (higher.improved, lower.improved) == (3 / 5, 1 / 5)  # the equal cycle is in neither
    assert (higher.better, higher.worse, lower.better, lower.worse) == (3, 1, 1, 3)
    turned = dataclasses.replace(lower, improved=higher.improved, better=3, worse=1)
    assert turned == higher  # and nothing else does


def test_exchanging_plain_and_tempered_turns_the_difference() -> None:
    there = paired(PLAIN, TEMPERED, higher_is_better=True)
    back = paired(TEMPERED, PLAIN, higher_is_better=True)
    assert there.difference_mean == -back.difference_mean
    assert (there.plain_mean, there.tempered_median) == (back.tempered_mean, back.plain_median)
    assert there.p == back.p


def test_the_interval_is_reproducible_and_follows_its_seed() -> None:
    generator = np.random.default_rng(3)
    plain, tempered = generator.random(30), generator.random(30)
    first, again = (paired(plain, tempered, higher_is_better=True, seed=7) for _ in range(2))
    other = paired(plain, tempered, higher_is_better=True, seed=8)
    assert first == again
    assert (first.low, first.high) != (other.low, other.high)


def test_the_interval_does_not_touch_the_global_generator() -> None:
    np.random.seed(11)
    paired(PLAIN, TEMPERED, higher_is_better=True)
    assert np.random.random() == np.random.RandomState(11).random()


def test_the_interval_of_two_cycles_by_hand() -> None:
    # Differences 0 and 1: a resample's mean is 0, 0.5 or 1 with 1/4, 1/2, 1/4. The 2.5 % and
    # 97.5 % points of that are its ends.
    figures = paired([0.0, 0.0], [0.0, 1.0], higher_is_better=True)
    assert (figures.low, figures.high) == (0.0, 1.0)


def test_the_interval_of_many_cycles_is_the_normal_one() -> None:
    # A mean of 400 is normal to high accuracy: mean -+ 1.96 s / sqrt(400), s with divisor N.
    differences = np.random.default_rng(4).normal(0.05, 0.1, 400)
    figures = paired(np.zeros(400), differences, higher_is_better=True)
    reach = 1.959964 * differences.std() / 20
    assert figures.low == pytest.approx(differences.mean() - reach, abs=0.06 * reach)
    assert figures.high == pytest.approx(differences.mean() + reach, abs=0.06 * reach)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    # 200 experiments of 25 cycles with a true difference of 0.1. The percentile interval is a
    # little narrow, about 93 %; the standard error of the share is 1.8 %.
    generator = np.random.default_rng(5)
    covered = 0
    for differences in generator.normal(0.1, 0.2, (200, 25)):
        figures = paired(np.zeros(25), differences, higher_is_better=True)
        assert figures.low is not None
        assert figures.high is not None
        covered += figures.low <= 0.1 <= figures.high
    assert 0.87 <= covered / 200 <= 0.98


def test_a_single_cycle_has_no_interval() -> None:
    figures = paired([0.4], [0.6], higher_is_better=True)
    assert (figures.low, figures.high) == (None, None)
    assert figures.difference_mean == pytest.approx(0.2)
    assert figures.p == 1.0  # both signs of one rank are as extreme: 2 / 2
    assert (figures.improved, figures.cycles) == (1.0, 1)


@pytest.mark.parametrize("cycles", [1, 2, 4, 60])
def test_no_difference_at_all(cycles: int) -> None:
    figures = paired([0.3] * cycles, [0.3] * cycles, higher_is_better=False)
    assert figures.p is None
    assert (figures.difference_mean, figures.improved) == (0.0, 0.0)
    assert (figures.low, figures.high) == ((None, None) if cycles == 1 else (0.0, 0.0))


@pytest.mark.parametrize(("cycles", "p"), [(2, 0.5), (4, 0.125), (6, 0.03125)])  # 2 / 2**N
def test_equal_differences(cycles: int, p: float) -> None:
    # The same 0.2 everywhere, though not to the last bit: 0.3 - 0.1 != 0.4 - 0.2 in float64.
    plain = [0.1, 0.2, 0.5, 0.7, 0.45, 0.05][:cycles]
    figures = paired(plain, [value + 0.2 for value in plain], higher_is_better=True)
    assert figures.p == pytest.approx(p)
    assert (figures.low, figures.high) == pytest.approx((0.2, 0.2))


def test_many_equal_differences_do_not_warn() -> None:
    figures = paired([0.25] * 60, [0.5] * 60, higher_is_better=True)
    assert figures.p is not None
    assert figures.p < 1e-9
    assert (figures.low, figures.high, figures.improved) == (0.25, 0.25, 1.0)


def test_rounding_is_not_an_improvement() -> None:
    figures = paired([0.3, 0.5], [0.1 + 0.2, 0.5], higher_is_better=True)  # 0.30000000000000004
    assert (figures.improved, figures.p) == (0.0, None)


def test_zeros_do_not_cost_the_exact_test() -> None:
    # 20 gains of different sizes and 5 cycles without any: exactly 2 / 2**20.
    gains = np.concatenate([np.arange(1, 21) / 100, np.zeros(5)])
    assert paired(np.zeros(25), gains, higher_is_better=True).p == pytest.approx(2 / 2**20)


@pytest.mark.parametrize(
    ("plain", "tempered", "message"),
    [
        ([], [], r"at least one.*shapes \(0,\) and \(0,\)"),
        ([0.1], [0.1, 0.2], r"as many of both; got shapes \(1,\) and \(2,\)"),
        ([[0.1]], [[0.1]], r"one figure a cycle.*shapes \(1, 1\)"),
        ([0.1, math.nan], [0.1, 0.2], r"finite; got nan in plain cycle 1"),
        ([0.1, 0.2], [-math.inf, 0.2], r"finite; got -inf in tempered cycle 0"),
        (["a"], [0.1], r"plain figures must be an array of real numbers; got \['a'\]"),
    ],
)
def test_unusable_figures_are_told(plain: Any, tempered: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        paired(plain, tempered, higher_is_better=True)


@pytest.mark.parametrize("seed", [-1, 0.5, None])
def test_an_unusable_seed_is_told(seed: Any) -> None:
    with pytest.raises(InputError, match=rf"integer of 0 or more; got {seed}"):
        paired(PLAIN, TEMPERED, higher_is_better=True, seed=seed)


BEFORE = [PictureMetrics(0.50, 0.70, 0.50), PictureMetrics(0.60, 0.80, 0.40)]
AFTER = [PictureMetrics(0.75, 0.65, 0.30), PictureMetrics(0.85, 0.85, 0.35)]


def test_summarise_pairs_each_metric_in_its_direction() -> None:
    summary = summarise(BEFORE, AFTER)
    assert list(summary) == ["ppv", "npv", "js"]
    assert summary["ppv"].difference_mean == pytest.approx(0.25)  # (0.25 + 0.25) / 2
    assert summary["npv"].difference_mean == pytest.approx(0.0)  # (-0.05 + 0.05) / 2
    assert summary["js"].difference_mean == pytest.approx(-0.125)  # (-0.2 - 0.05) / 2
    assert summary["ppv"].improved == 1.0
    assert summary["npv"].improved == 0.5
    assert summary["js"].improved == 1.0  # both fell, and lower is better


def test_summarise_wants_pairs() -> None:
    with pytest.raises(InputError, match=r"shapes \(2,\) and \(1,\)"):
        summarise(BEFORE, AFTER[:1])
    with pytest.raises(InputError, match="at least one"):
        summarise([], [])


# ---- Shares, and prompts of several seeds ----


def share(plain: Sequence[int], tempered: Sequence[int], **options: Any) -> Paired:
    return compared({"ok": Column(plain, tempered, share=True)}, **options)["ok"]


def test_a_share_by_hand() -> None:
    # Of ten pictures plain fails 6; tempering rescues 4 of them and spoils 1 of the other 4.
    figures = share([1, 1, 1, 1, 0, 0, 0, 0, 0, 0], [1, 1, 1, 0, 1, 1, 1, 1, 0, 0])
    assert (figures.plain_mean, figures.tempered_mean) == (0.4, 0.7)
    assert (figures.better, figures.worse) == (4, 1)
    # Of the five that differ one goes the other way: 2 (1 + 5) / 2**5.
    assert figures.p == pytest.approx(0.375)
    assert figures.failures_cut == pytest.approx(0.5)  # 3 of 6 are left
    assert figures.cut_low is not None
    assert figures.cut_high is not None
    assert figures.cut_low < 0.5 < figures.cut_high


def test_where_nothing_fails_there_is_nothing_to_cut() -> None:
    figures = share([1, 1, 1], [1, 1, 0])
    assert figures.failures_cut is None
    assert (share([0, 0], [0, 0]).p, share([0, 0], [1, 1]).failures_cut) == (None, 1.0)
    assert share([0, 0], [1, 1]).p == pytest.approx(0.5)


def test_a_figure_has_no_failures() -> None:
    assert paired([0.0, 1.0], [1.0, 1.0], higher_is_better=True).failures_cut is None


def test_seeds_of_one_prompt_do_not_count_as_so_many_prompts() -> None:
    """Each prompt either gains with all its seeds or with none: only prompts tell anything."""
    gains = np.random.default_rng(6).integers(0, 2, 40)
    by_prompt = share([0] * 40, gains.tolist())
    seeds = np.repeat(gains, 25)
    groups = np.repeat(np.arange(40), 25)
    clustered = share([0] * 1000, seeds.tolist(), groups=groups)
    naive = share([0] * 1000, seeds.tolist())
    assert None not in (clustered.low, clustered.high, by_prompt.low, by_prompt.high)
    assert (clustered.low, clustered.high) == (by_prompt.low, by_prompt.high)
    assert spread(naive) == pytest.approx(spread(clustered) / 5, rel=0.1)  # sqrt(25) too narrow


def spread(figures: Paired) -> float:
    assert figures.low is not None
    assert figures.high is not None
    return figures.high - figures.low


def test_the_clustered_interval_covers_the_truth_as_often_as_it_says() -> None:
    # 80 experiments of 30 prompts with 4 seeds; prompts differ as much as their seeds do.
    generator = np.random.default_rng(7)
    groups = np.repeat(np.arange(30), 4)
    covered = {"prompts": 0, "pictures": 0}
    for _ in range(80):
        values = 0.1 + generator.normal(0, 0.2, 30)[groups] + generator.normal(0, 0.2, 120)
        for name, of in (("prompts", groups), ("pictures", None)):
            figures = compared({"": Column(np.zeros(120), values)}, groups=of)[""]
            assert figures.low is not None
            assert figures.high is not None
            covered[name] += figures.low <= 0.1 <= figures.high
    assert 0.88 <= covered["prompts"] / 80 <= 0.99
    assert covered["pictures"] / 80 < 0.85


def test_prompts_of_unequal_numbers_of_seeds_count_by_their_seeds() -> None:
    # Two groups of 1 and 3 cycles: a resample is both of one (mean 1 or 0) or one of each (1 / 4).
    figures = share([0] * 4, [1, 0, 0, 0], groups=["a", "b", "b", "b"])
    assert figures.difference_mean == 0.25
    assert (figures.low, figures.high) == (0.0, 1.0)


def test_one_prompt_has_only_its_seeds_to_tell_of() -> None:
    generator = np.random.default_rng(8)
    column = Column(generator.random(20), generator.random(20))
    alone = compared({"": column}, groups=["a prompt"] * 20)
    assert alone == compared({"": column})


def test_measures_that_are_compared_together_have_the_figures_of_each_alone() -> None:
    generator = np.random.default_rng(9)
    columns = {
        "ok": Column(generator.integers(0, 2, 30), generator.integers(0, 2, 30), share=True),
        "js": Column(generator.random(30), generator.random(30), higher_is_better=False),
    }
    groups = np.repeat(np.arange(10), 3)
    together = compared(columns, groups=groups)
    for name, column in columns.items():
        assert together[name] == compared({name: column}, groups=groups)[name]


def test_mcnemar_by_hand() -> None:
    assert mcnemar_p(0, 0) is None
    assert mcnemar_p(5, 5) == pytest.approx(1.0)
    assert mcnemar_p(8, 1) == pytest.approx(2 * (1 + 9) / 2**9)
    assert mcnemar_p(1, 8) == mcnemar_p(8, 1)


# ---- For the reader ----


def pictures(cycles: int, seed: int) -> list[PictureMetrics]:
    return [PictureMetrics(*row) for row in np.random.default_rng(seed).random((cycles, 3))]


def of_kind(figure: Figure, kind: type) -> dict[str, Any]:
    """The artists of a kind by their label; arrows have none, so their number is their key."""
    artists = [artist for artist in figure.axes[0].get_children() if isinstance(artist, kind)]
    if kind is Quiver:
        return {str(number): artist for number, artist in enumerate(artists)}
    return {str(artist.get_label()): artist for artist in artists}


def spots(some: Sequence[PictureMetrics]) -> np.ndarray[Any, Any]:
    return np.array([(picture.npv, picture.ppv) for picture in some])


@pytest.mark.parametrize("cycles", [1, 4, 200])
def test_scatter_shows_each_picture_at_npv_and_ppv(cycles: int) -> None:
    plain, tempered = pictures(cycles, 1), pictures(cycles, 2)
    marks = of_kind(scatter(plain, tempered, "title"), PathCollection)
    assert np.asarray(marks["plain"].get_offsets()) == pytest.approx(spots(plain))
    assert np.asarray(marks["tempered"].get_offsets()) == pytest.approx(spots(tempered))


@pytest.mark.parametrize("cycles", [1, 4, 200])
def test_scatter_has_an_arrow_from_each_plain_to_its_tempered(cycles: int) -> None:
    plain, tempered = pictures(cycles, 1), pictures(cycles, 2)
    arrows = of_kind(scatter(plain, tempered, "title"), Quiver)["0"]
    assert len(arrows.U) == cycles
    starts = np.column_stack([arrows.X, arrows.Y])
    assert starts == pytest.approx(spots(plain))
    assert starts + np.column_stack([arrows.U, arrows.V]) == pytest.approx(spots(tempered))
    # Only in data coordinates and unscaled do they end at these points.
    assert (arrows.angles, arrows.scale_units, arrows.scale) == ("xy", "xy", 1)


@pytest.mark.parametrize("cycles", [2, 4, 200])
def test_scatter_marks_the_means_larger(cycles: int) -> None:
    plain, tempered = pictures(cycles, 1), pictures(cycles, 2)
    figure = scatter(plain, tempered, "title")
    marks, arrows = of_kind(figure, PathCollection), of_kind(figure, Quiver)
    for name, some in (("plain", plain), ("tempered", tempered)):
        mean = marks[f"{name} mean"]
        centre = spots(some).mean(axis=0, keepdims=True)
        assert np.asarray(mean.get_offsets()) == pytest.approx(centre)
        assert mean.get_sizes()[0] > 2 * marks[name].get_sizes()[0]
    assert [len(arrow.U) for arrow in arrows.values()] == [cycles, 1]


def test_scatter_of_one_cycle_shows_no_mean() -> None:
    figure = scatter(pictures(1, 1), pictures(1, 2), "title")
    assert set(of_kind(figure, PathCollection)) == {"plain", "tempered"}
    assert len(of_kind(figure, Quiver)) == 1


def test_scatter_names_its_axes_title_and_colours() -> None:
    figure = scatter(pictures(4, 1), pictures(4, 2), "a dog for $5 or 6$")
    axes = figure.axes[0]
    assert axes.get_xlabel() == "NPV (higher is better)"
    assert axes.get_ylabel() == "PPV (higher is better)"
    assert axes.get_title() == "a dog for $5 or 6$"
    assert not axes.title.get_parse_math()  # or the dollar signs would be formula marks
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["plain", "tempered", "plain mean", "tempered mean"]
    marks = of_kind(figure, PathCollection)
    assert not np.allclose(marks["plain"].get_edgecolor(), marks["tempered"].get_facecolor())


SAME = pictures(5, 3)
WORST, BEST = [PictureMetrics(0.0, 0.0, 1.0)] * 3, [PictureMetrics(1.0, 1.0, 0.0)] * 3


@pytest.mark.parametrize(
    ("plain", "tempered"),
    [
        (pictures(1, 1), pictures(1, 2)),
        (pictures(4, 1), pictures(4, 2)),
        (pictures(200, 1), pictures(200, 2)),
        (SAME, SAME),
        (SAME[:1], SAME[:1]),
        (WORST, WORST),
        (BEST, BEST),
        (WORST, BEST),
    ],
    ids=["one", "four", "many", "same", "same one", "worst", "best", "span"],
)
def test_scatter_draws_without_a_warning_and_cuts_no_mark(
    plain: list[PictureMetrics], tempered: list[PictureMetrics]
) -> None:
    figure = scatter(plain, tempered, "title")
    target = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(target, format="png")
    assert target.getvalue().startswith(b"\x89PNG")

    axes = figure.axes[0]
    frame = axes.get_window_extent()
    for marks in of_kind(figure, PathCollection).values():
        # In pixels, as drawn: the centre, and around it the mark's radius and half its outline.
        centres = axes.transData.transform(marks.get_offsets())
        points = math.sqrt(marks.get_sizes()[0] / 2) + marks.get_linewidths()[0] / 2
        radius = points * figure.dpi / 72
        assert (centres - radius >= [frame.x0, frame.y0]).all()
        assert (centres + radius <= [frame.x1, frame.y1]).all()


@pytest.mark.parametrize("some", [WORST, BEST, pictures(200, 1)])
def test_scatter_ticks_only_where_figures_can_be(some: list[PictureMetrics]) -> None:
    axes = scatter(some, some, "title").axes[0]
    for axis in (axes.xaxis, axes.yaxis):
        ticks, limits = axis.get_ticklocs(), axis.get_view_interval()
        assert len(ticks) >= 2
        assert min(ticks) >= max(limits[0], -1e-9)
        assert max(ticks) <= min(limits[1], 1 + 1e-9)


def test_scatter_wants_finite_pairs() -> None:
    with pytest.raises(InputError, match="at least one"):
        scatter([], [], "title")
    with pytest.raises(InputError, match=r"shapes \(1,\) and \(2,\)"):
        scatter(SAME[:1], SAME[:2], "title")
    with pytest.raises(InputError, match="got nan in tempered cycle 0"):
        scatter(SAME[:1], [PictureMetrics(math.nan, 0.5, 0.5)], "title")


def test_metrics_load_no_model_library_and_plot_without_pyplot() -> None:
    program = """
import sys, metrics
heavy = {"torch", "diffusers", "transformers", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
some = [metrics.PictureMetrics(0.5, 0.5, 0.5)]
metrics.scatter(some, some, "title").savefig(sys.stdout.buffer, format="png")
assert "matplotlib.pyplot" not in sys.modules
"""
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(metrics.__file__).parent, capture_output=True
    )
    assert (ran.returncode, ran.stderr.decode()) == (0, "")
    assert ran.stdout.startswith(b"\x89PNG")
