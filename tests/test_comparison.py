"""Comparisons over prompt sets, worked by hand, and the tables that tell of them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import numpy as np
import pytest

import comparison
from comparison import Comparison, Cost, Pair, Table, compare, markdown, tables
from judges import Verdict
from metrics import METRICS, Paired, PictureMetrics, summarise

GOOD, LOST = Verdict(()), Verdict(("missing",))
BOTH = Verdict(("missing", "fused"))
POOR, FINE = PictureMetrics(0.5, 0.6, 0.7), PictureMetrics(0.8, 0.9, 0.2)


def pair(
    prompt: int,
    seed: int,
    plain: Verdict,
    tempered: Verdict,
    subset: str = "others",
    calls: int = 30,
) -> Pair:
    return Pair(prompt, subset, seed, POOR, FINE, 20, calls, 1.5, {"pocket": (plain, tempered)})


TWO_SUBSETS = [
    pair(1, 1, GOOD, GOOD, "animals", 20),
    pair(1, 2, LOST, GOOD, "animals", 40),
    pair(2, 1, BOTH, LOST, "animals", 100),
    pair(3, 1, LOST, GOOD, "things", 20),
    pair(3, 2, GOOD, LOST, "things", 20),
]


def rate(each: Comparison) -> Paired:
    return each.measures["pocket/all_ok"]


def test_each_subset_and_all_of_them_by_hand() -> None:
    animals, things, everything = compare(TWO_SUBSETS)
    assert [each.subset for each in (animals, things, everything)] == ["animals", "things", "all"]
    assert [(each.prompts, each.pairs) for each in (animals, things, everything)] == [
        (2, 3),
        (1, 2),
        (3, 5),
    ]
    assert (rate(animals).plain_mean, rate(animals).tempered_mean) == pytest.approx((1 / 3, 2 / 3))
    assert (rate(things).plain_mean, rate(things).tempered_mean) == (0.5, 0.5)
    assert (rate(everything).better, rate(everything).worse) == (2, 1)
    assert rate(everything).failures_cut == pytest.approx(1 / 3)  # of three failures two are left
    assert rate(everything).p == pytest.approx(1.0)  # two of three


def test_faults_and_figures_are_compared_too() -> None:
    everything = compare(TWO_SUBSETS)[-1]
    missing, fused = (everything.measures[f"pocket/{name}"] for name in ("missing", "fused"))
    assert (missing.plain_mean, missing.tempered_mean) == (3 / 5, 2 / 5)
    assert (fused.plain_mean, fused.tempered_mean) == (1 / 5, 0)
    assert (missing.better, missing.failures_cut) == (2, None)  # fewer faults are better
    for key in METRICS:
        figures = everything.measures[key]
        assert figures.difference_mean == pytest.approx(getattr(FINE, key) - getattr(POOR, key))
        assert figures.improved == 1


def test_a_judges_own_figures_are_compared() -> None:
    said = [(Verdict((), figures={"vqa_score": x}), Verdict((), figures={"vqa_score": 1 - x}))
            for x in (0.1, 0.3)]  # fmt: skip
    pairs = [
        Pair(n, "others", 1, POOR, FINE, 20, 20, 1.0, {"blip-vqa": each})
        for n, each in enumerate(said)
    ]
    (only,) = compare(pairs)
    score = only.measures["blip-vqa/vqa_score"]
    assert (score.plain_mean, score.tempered_mean) == pytest.approx((0.2, 0.8))
    table = tables([only], {})[2].text()
    assert re.search(r"^VQA score +higher +0.2000 +0.8000 ", table, re.MULTILINE)


def test_the_cost_by_hand() -> None:
    everything = compare(TWO_SUBSETS)[-1]
    assert everything.cost == Cost(20, 40, 20, np.percentile([20, 40, 100, 20, 20], 95), 100)
    assert everything.cost.times == 2
    old = [dataclasses.replace(each, tempered_calls=None) for each in TWO_SUBSETS]
    assert compare(old)[-1].cost is None  # rows of evaluations that did not note it


def test_one_subset_is_told_once() -> None:
    assert [each.subset for each in compare(TWO_SUBSETS[:3])] == ["animals"]
    assert [each.subset for each in compare([pair(1, 1, GOOD, GOOD)])] == ["all"]


def test_a_judge_that_has_not_seen_all_is_not_told() -> None:
    blind = dataclasses.replace(TWO_SUBSETS[0], said={})
    assert comparison.judges_of([blind, *TWO_SUBSETS[1:]]) == []
    assert "pocket/all_ok" not in compare([blind, *TWO_SUBSETS[1:]])[-1].measures
    assert [table.title for table in tables(compare([blind]), {})] == [
        "figures",
        "cost: U-Net calls of a picture, seconds of a pair",
    ]


def test_without_judges_the_figures_are_those_of_metrics() -> None:
    generator = np.random.default_rng(0)
    plain, tempered = ([PictureMetrics(*row) for row in generator.random((6, 3))] for _ in range(2))
    groups = [1, 1, 1, 2, 2, 2]
    pairs = [
        Pair(prompt, "others", seed, before, after, 20, 20, 1.0)
        for prompt, seed, before, after in zip(groups, range(6), plain, tempered, strict=True)
    ]
    assert compare(pairs)[0].measures == summarise(plain, tempered, groups)


# --- Tables.


def cells(line: str) -> list[str]:
    return re.split(r" {2,}", line.strip())


def lines_of(table: Table) -> list[list[str]]:
    return [cells(line) for line in table.text().splitlines()]


def test_the_table_of_rates_tells_everything_a_paper_prints() -> None:
    table = tables(compare(TWO_SUBSETS), {})[0]
    title, head, _, animals, things, everything, note = lines_of(table)
    assert title == ["all OK, says pocket"]
    assert head == list(table.head)
    assert animals[:4] == ["animals", "3", "33.3 %", "66.7 %"]
    assert animals[4].startswith("+33.3 (")
    assert things[:4] == ["things", "2", "50.0 %", "50.0 %"]
    assert everything[:4] == ["all", "5", "40.0 %", "60.0 %"]
    assert everything[5] == "1.0000"
    assert everything[6].startswith("33.3 % (")
    assert everything[7:] == ["2", "1"]
    assert note[0].startswith("95 %: bootstrap over 3 prompts")


def test_the_interval_of_one_prompt_is_said_to_be_over_its_seeds() -> None:
    pairs = [pair(1, seed, LOST, GOOD) for seed in range(4)]
    assert "bootstrap over the seeds of one prompt" in tables(compare(pairs), {})[0].note


def test_every_table_is_aligned_ascii_and_fits_a_wide_terminal() -> None:
    pairs = [
        pair(n, seed, LOST, (GOOD, LOST)[n % 3 == 0], ("animal-animal", "object-object")[n % 2])
        for n in range(500)
        for seed in range(2)
    ]
    for table in tables(compare(pairs), {"all": 12.5}):
        title, *lines = table.text().splitlines()
        body = lines[: len(table.rows) + 2]
        assert len({len(line) for line in body}) == 1, title
        assert len(body[0]) <= 132
        assert table.text().isascii()  # a console of any encoding can print it


def figures_row(figures: Paired) -> list[str]:
    only = Comparison("all", 1, dict.fromkeys(METRICS, figures), None)
    return lines_of(comparison.figure_table([only]))[3]


SOME = compare(TWO_SUBSETS)[-1].measures["ppv"]


def test_what_is_undefined_is_marked() -> None:
    alone = summarise([POOR], [POOR])["ppv"]
    assert figures_row(alone) == ["PPV", "higher", "0.5000", "0.5000", "+0.0000", "-", "0.0 %"]
    (only,) = compare([pair(1, 1, GOOD, GOOD)])
    row = lines_of(comparison.rate_table("pocket", [only]))[3]
    assert row == ["all", "1", "100.0 %", "100.0 %", "+0.0", "-", "-", "0", "0"]


@pytest.mark.parametrize(
    ("p", "text"), [(0.0, "<0.0001"), (0.00009, "<0.0001"), (0.0001, "0.0001"), (1.0, "1.0000")]
)
def test_p_is_never_rounded_to_nothing(p: float, text: str) -> None:
    assert figures_row(dataclasses.replace(SOME, p=p))[-2] == text


def test_there_is_no_negative_zero() -> None:
    tiny = dataclasses.replace(SOME, difference_mean=-1e-9, low=-1e-8, high=1e-8)
    assert figures_row(tiny)[4] == "+0.0000 (+0.0000 to +0.0000)"
    assert comparison.points(-1e-9) == "+0.0"


def test_each_metric_names_its_better_direction() -> None:
    rows = lines_of(comparison.figure_table(compare([pair(1, 1, GOOD, GOOD)])))
    assert [row[:2] for row in rows[3:6]] == [
        ["PPV", "higher"],
        ["NPV", "higher"],
        ["JS distance", "lower"],
    ]


def test_seconds_stand_where_they_were_taken() -> None:
    rows = lines_of(tables(compare(TWO_SUBSETS), {"animals": 1.25, "all": 2})[-1])
    assert [row[-1] for row in rows[3:]] == ["1.25", "-", "2.00"]
    assert rows[-1][1:7] == ["20.0", "40.0", "20", "88", "100", "2.00"]


@pytest.mark.parametrize("rows", [[("a", "b"), ("x|y", "1")], [("a",), ("1",)]])
def test_markdown_keeps_its_columns(rows: Sequence[Sequence[str]]) -> None:
    lines = markdown(rows).splitlines()
    assert len(lines) == len(rows) + 1
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {len(rows[0]) + 1}


def test_a_tables_markdown_has_the_same_cells() -> None:
    for table in tables(compare(TWO_SUBSETS), {}):
        lines = [line for line in table.markdown().splitlines() if line.startswith("|")]
        found = [tuple(cell.strip() for cell in line.strip("|").split(" | ")) for line in lines]
        assert [found[0], *found[2:]] == [table.head, *table.rows]
