"""The page of an evaluation: what is in the file, and how it behaves in a real browser."""

from __future__ import annotations

import dataclasses
import html
import json
import re
import time
from collections import Counter
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import chromium
import numpy as np
import pytest
from chromium import Chromium
from PIL import Image

import report
from comparison import Pair, compare, tables
from judges import Verdict
from metrics import PictureMetrics
from prompts import Prompt
from report import Report, render, spread

needs_browser = pytest.mark.skipif(chromium.missing() is not None, reason=str(chromium.missing()))

# What a stranger's prompt file may hold.
EVIL = Prompt(
    ('</script><script>document.title="taken"</script>', "<img src=x onerror=alert(1)>"),
    " & \"quotes' {{ 7 * 7 }} ",
    "<b>bold</b>",
)
SET = [
    Prompt(("a cat", "a dog"), " and ", "animals"),
    Prompt(("a dog", "a red car"), " and ", "mixed"),
    EVIL,
]
OK, LOST = Verdict((), ("a note",)), Verdict(("missing",), ("a cat: missing (0.02)",))
SAID = {
    "rescued": (LOST, OK),
    "spoiled": (OK, LOST),
    "both good": (OK, OK),
    "both bad": (LOST, LOST),
}
FACTS = {
    "model": "pocket",
    "started": "2025-01-31T12:00:00",
    "device": "cpu",
    "dtype": "float32",
    "arguments": {"steps": 20, "negative_prompt": "", "prompts_file": "mine.txt"},
    "versions": {"torch": "2"},
}


def evaluation(folder: Path, count: int, *, judged: bool = True, side: int = 64) -> Report:
    """`count` pairs of pictures over the prompts of SET, with every outcome in turn."""
    pictures = [picture(side, number) for number in range(8)]
    generator = np.random.default_rng(0)
    pairs = []
    for index in range(count):
        seed = 2024 + index // len(SET)
        for place, name in enumerate(report.SIDES):
            file = folder / f"{index % len(SET)}-{seed}-{name}.png"
            file.write_bytes(pictures[(2 * index + place) % 8])
        pairs.append(pair(index, seed, generator.random(6), judged))
    return page_of(folder, pairs)


def picture(side: int, number: int) -> bytes:
    """A PNG whose spectrum falls with the frequency, as that of photographs (Field 1987).

    Its three colours know nothing of each other: harder to compress than any photograph.
    """
    noise = np.random.default_rng(number).normal(size=(3, side, side))
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side)))
    waves = np.fft.fft2(noise) / frequency.clip(min=1 / side)
    values = np.fft.ifft2(waves).real
    pixels = (128 + 50 * values / values.std()).clip(0, 255).astype(np.uint8)
    encoded = BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(encoded, "PNG")
    return encoded.getvalue()


def pair(index: int, seed: int, figures: Any, judged: bool) -> Pair:
    prompt = index % len(SET)
    said = {"pocket": list(SAID.values())[index % 4], "blip-vqa": blip(index)} if judged else {}
    before, after = PictureMetrics(*figures[:3]), PictureMetrics(*figures[3:])
    subset = SET[prompt].subset
    return Pair(prompt + 1, subset, seed, before, after, 20, 20 + index % 50, 1.0, said)


def blip(index: int) -> tuple[Verdict, Verdict]:
    """Another judge, of another mind: it finds everything all OK."""
    verdict = Verdict((), (f"a cat? 0.{index % 90 + 10}",), {"vqa_score": 0.5})
    return verdict, verdict


def page_of(folder: Path, pairs: list[Pair]) -> Report:
    comparisons = compare(pairs)
    return Report(
        title="mine.txt <i>",
        folder=folder,
        prompts=SET,
        pairs=pairs,
        picture_file=lambda each, name: folder / f"{each.prompt - 1}-{each.seed}-{name}.png",
        comparisons=comparisons,
        tables=tables(comparisons, {}),
        facts=FACTS,
        remarks=["a remark <about> it"],
    )


def data_in(page: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


# --- The file.


def test_the_page_holds_every_pair_with_its_figures_and_verdicts(tmp_path: Path) -> None:
    told = evaluation(tmp_path, 12)
    data = data_in(render(told))
    assert data["judges"] == ["blip-vqa", "pocket"]
    assert [prompt["text"] for prompt in data["prompts"]] == [prompt.text for prompt in SET]
    assert len(data["pairs"]) == 12
    for row, each in zip(data["pairs"], told.pairs, strict=True):
        assert (row["prompt"], row["seed"], row["calls"]) == (
            each.prompt - 1,
            each.seed,
            each.tempered_calls,
        )
        for name in ("plain", "tempered"):
            picture, figures = row[name], getattr(each, name)
            assert (tmp_path / picture["file"]).is_file()
            assert picture["figures"] == pytest.approx(
                [figures.ppv, figures.npv, figures.js], abs=5e-4
            )
            verdict = each.said["pocket"][name == "tempered"]
            assert picture["said"][1] == {
                "faults": list(verdict.faults),
                "notes": list(verdict.notes),
            }


def test_the_tables_of_the_page_are_those_of_the_terminal(tmp_path: Path) -> None:
    told = evaluation(tmp_path, 12)
    page = render(told)
    found = re.findall(r"<t[hd](?: [^>]*)?>(.*?)</t[hd]>", page)
    assert [html.unescape(cell) for cell in found] == [
        cell for table in told.tables for row in (table.head, *table.rows) for cell in row
    ]


def test_whatever_comes_from_a_prompt_is_escaped(tmp_path: Path) -> None:
    page = render(evaluation(tmp_path, 6))
    for text in (*EVIL.subjects, EVIL.subset, "mine.txt <i>", "<about>"):
        assert text not in page
    assert page.count("<script") == page.count("</script>") == 2
    assert "49" not in data_in(page)["prompts"][2]["text"]  # no template in a template


def test_the_page_names_no_other_place(tmp_path: Path) -> None:
    page = render(evaluation(tmp_path, 6))
    assert re.findall(r"https?://|//[a-z]|@import|url\(", re.sub(r"base64,[^\"]+", "", page)) == []
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)
    assert policy
    assert policy[1].startswith("default-src 'none'; img-src data: file: 'self'; ")


@pytest.mark.parametrize("side", [64, 512])
def test_three_hundred_pairs_are_a_few_megabytes(side: int, tmp_path: Path) -> None:
    told = evaluation(tmp_path, 300, side=side)
    page = render(told)
    assert len(page) <= 5_000_000
    assert all("thumb" in row[name] for row in data_in(page)["pairs"] for name in report.SIDES)


def test_more_pairs_have_thumbnails_spread_evenly(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(report, "INSIDE", 10)
    data = data_in(render(evaluation(tmp_path, 30)))
    inside = [i for i, row in enumerate(data["pairs"]) if "thumb" in row["plain"]]
    assert inside == list(range(0, 30, 3))
    assert len(data["pairs"]) == 30
    assert spread(range(7), 7) == spread(range(7), 9) == list(range(7))


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n", None], ids=["empty", "cut off", "gone"])
def test_a_picture_that_can_not_be_read_leaves_the_others(
    content: bytes | None, tmp_path: Path
) -> None:
    told = evaluation(tmp_path, 3)
    path = tmp_path / "0-2024-plain.png"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    pairs = data_in(render(told))["pairs"]
    assert ["thumb" in row[name] for row in pairs for name in report.SIDES] == [False] + [True] * 5


def test_without_a_judge_the_page_says_so_and_what_to_do(tmp_path: Path) -> None:
    page = render(evaluation(tmp_path, 3, judged=False))
    assert "No judge has seen these pictures" in page
    assert "--judge owlv2" in page


@pytest.mark.parametrize("count", [1, 2])
def test_the_smallest_evaluations_have_a_page(count: int, tmp_path: Path) -> None:
    told = evaluation(tmp_path, count)
    old = dataclasses.replace(
        told, pairs=[dataclasses.replace(p, tempered_calls=None) for p in told.pairs]
    )
    for each in (told, old):
        page = render(each)
        assert len(data_in(page)["pairs"]) == count
        assert "nan" not in re.sub(r"base64,[^\"]+", "", page)


def test_marks_stand_where_their_figures_are(tmp_path: Path) -> None:
    """Against the axes' own ticks: a plot that lies by a scale is worse than none."""
    told = evaluation(tmp_path, 12)
    plot = report.scatter_plot(told.pairs)
    place = {
        name: np.polyfit(
            [float(tick["text"]) for tick in plot[name]], [tick["at"] for tick in plot[name]], 1
        )
        for name in ("x", "y")
    }
    marks = re.findall(r"M([-\d.]+) ([-\d.]+)h0", plot["plain"])
    for (x, y), each in zip(marks, told.pairs, strict=True):
        assert float(x) == pytest.approx(np.polyval(place["x"], each.plain.npv), abs=0.5)
        assert float(y) == pytest.approx(np.polyval(place["y"], each.plain.ppv), abs=0.5)
    row = report.rate_plot("pocket", told.comparisons)["rows"][-1]
    left, right = (report.rate_plot("pocket", told.comparisons)["ticks"][i]["at"] for i in (0, -1))
    rate = told.comparisons[-1].measures["pocket/all_ok"].plain_mean
    assert row["plain"] == pytest.approx(left + rate * (right - left), abs=0.2)


def test_the_histogram_counts_every_picture(tmp_path: Path) -> None:
    told = evaluation(tmp_path, 60)
    plot = report.cost_plot(told.pairs)
    assert plot is not None
    assert sum(int(bar["text"].split()[-2]) for bar in plot["bars"]) == 60


@pytest.mark.parametrize("count", [10_000])
def test_ten_thousand_pairs_take_seconds(count: int, tmp_path: Path) -> None:
    """Pictures beside the page are not read but for the thumbnails inside."""
    few = evaluation(tmp_path, 300).pairs
    pairs = [dataclasses.replace(few[i % 300], seed=few[i % 300].seed) for i in range(count)]
    begun = time.process_time()
    told = page_of(tmp_path, pairs)
    page = render(told)
    assert time.process_time() - begun < 10
    assert len(page) < 15_000_000


# --- In a browser.


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("a page #1 & more?")
    path = folder / "report.html"
    path.write_text(render(evaluation(folder, 60)), encoding="utf-8")
    return path


@pytest.fixture(
    scope="module", params=[(1280, False), (390, True)], ids=["wide, light", "narrow, dark"]
)
def browser(request: pytest.FixtureRequest) -> Iterator[Chromium]:
    width, dark = request.param
    with Chromium(width=width, dark=dark) as running:
        yield running


@pytest.fixture
def page(path: Path, browser: Chromium) -> Iterator[Chromium]:
    """The page, opened anew; its browser takes longer to start than a test."""
    browser.console.clear()
    browser.requests.clear()
    browser.open(path)
    yield browser
    assert browser.console == []
    requests = [url for url in browser.requests if not url.startswith(("file://", "data:"))]
    assert requests == []
    browser.close()


def texts(page: Chromium, selector: str) -> list[str]:
    script = f"[...document.querySelectorAll({json.dumps(selector)})].map((e) => e.textContent)"
    found: list[str] = page.evaluate(script)
    return found


def choose(page: Chromium, name: str, value: str) -> None:
    page.evaluate(
        f"(() => {{ const e = document.getElementById({json.dumps(name)}); e.value ="
        f" {json.dumps(value)}; e.dispatchEvent(new Event('change', {{bubbles: true}})) }})()"
    )


def cards(page: Chromium) -> list[str]:
    """The outcome of each card that is shown, after a walk to the end of the page."""
    page.evaluate(
        "(async () => { for (let i = 0; i < 20; i++) {"
        "scrollTo({top: 1e7, behavior: 'instant'});"
        "await new Promise((done) => setTimeout(done, 30)); } })()"
    )
    return texts(page, ".pair .chip")


@needs_browser
def test_it_opens_from_disk_and_fits(page: Chromium) -> None:
    assert page.evaluate("document.title") == "mine.txt <i>: plain and tempered"  # and not "taken"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate("document.querySelectorAll('svg').length") == 4
    assert texts(page, "#count") == ["60 of 60 pairs"]
    assert len(cards(page)) == 60
    page.wait("[...document.querySelectorAll('.pair img')].slice(-8).every((i) => i.naturalWidth)")


@needs_browser
def test_it_is_light_or_dark_as_the_reader_has_it_and_turns(page: Chromium) -> None:
    shade = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0] < 128"
    dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    assert page.evaluate(shade) == dark
    page.evaluate("document.getElementById('theme').click()")
    assert page.evaluate(shade) != dark


@needs_browser
def test_filters_show_what_they_say(page: Chromium) -> None:
    choose(page, "judge", "pocket")
    counts = dict(text.rsplit(" ", 1) for text in texts(page, "#outcomes button"))
    assert counts == dict.fromkeys(SAID, "15")
    for name in ("both good", "both bad"):
        page.evaluate(
            f"[...document.querySelectorAll('#outcomes button')].find((b) => b.textContent"
            f".startsWith('{name}')).click()"
        )
    assert Counter(cards(page)) == {"rescued": 15, "spoiled": 15}
    assert texts(page, "#count") == ["30 of 60 pairs"]
    choose(page, "subject", "a cat")
    assert Counter(cards(page)) == {"rescued": 5, "spoiled": 5}
    assert all("a cat and a dog" in text for text in texts(page, ".pair .words"))
    choose(page, "subject", EVIL.subjects[1])
    assert all(EVIL.text in text for text in texts(page, ".pair .words"))
    choose(page, "subject", "")
    choose(page, "subset", "mixed")
    assert all("a dog and a red car" in text for text in texts(page, ".pair .words"))


@needs_browser
def test_another_judge_has_another_view(page: Chromium) -> None:
    choose(page, "judge", "blip-vqa")
    assert set(cards(page)) == {"both good"}


@needs_browser
def test_the_order_can_be_changed(page: Chromium) -> None:
    choose(page, "order", "dear")
    cards(page)
    calls = [int(text.split()[0]) for text in texts(page, ".pair .chips span:last-child")]
    assert calls == sorted(calls, reverse=True)
    assert len(calls) == 60


@needs_browser
def test_keys_walk_open_turn_pages_swap_and_close(page: Chromium) -> None:
    page.evaluate("document.querySelector('.pair').focus()")
    page.press("ArrowRight", "ArrowRight", "ArrowLeft")
    second = "[...document.querySelectorAll('.pair')].indexOf(document.activeElement)"
    assert page.evaluate(second) == 1
    page.press("Enter")
    page.wait("document.getElementById('viewer').open")
    assert texts(page, "#viewer-title") == ["a dog and a red car · seed 2024"]
    page.wait("[...document.querySelectorAll('#stage img')].every((i) => i.naturalWidth === 64)")
    page.press("ArrowRight")
    assert texts(page, "#viewer-title") == [f"{EVIL.text} · seed 2024"]
    assert len(texts(page, "#stage figure")) == 2
    shown = "[...document.querySelectorAll('#stage figure')].filter((f) => f.offsetWidth).map((f) => f.querySelector('figcaption').textContent)"  # noqa: E501
    assert page.evaluate(shown) == ["plain", "tempered"]
    page.press(" ")
    assert page.evaluate(shown) == ["tempered"]
    page.press(" ")
    assert page.evaluate(shown) == ["plain"]
    page.press("Escape")
    page.wait("!document.getElementById('viewer').open")
    page.wait(f"{second} === 2")  # where the reader was, also after turning pages
    page.press("ArrowDown")
    assert page.evaluate(second) > 2


@needs_browser
def test_the_viewer_tells_all_verdicts_and_how_to_make_the_pair_again(page: Chromium) -> None:
    page.evaluate("document.querySelector('.pair').click()")
    told = " ".join(texts(page, "#told li"))
    assert "pocket: missing" in told
    assert "a cat: missing (0.02)" in told
    assert "blip-vqa: all OK" in told
    again = texts(page, "#again")[0]
    assert again.startswith("python init.py --tempered_inference --compare --repeat ")
    assert again.endswith("--joiner ' and ' --prompts 'a cat' 'a dog' --seed 2024")


@needs_browser
def test_a_page_that_was_mailed_alone_still_shows_its_thumbnails(
    path: Path, tmp_path: Path
) -> None:
    alone = tmp_path / "mailed.html"
    alone.write_bytes(path.read_bytes())
    with Chromium() as browser:
        browser.open(alone)
        browser.evaluate("document.querySelector('.pair').click()")
        browser.wait("[...document.querySelectorAll('#stage img')].every((i) => i.naturalWidth)")


@needs_browser
def test_a_page_of_ten_thousand_pairs_is_ready_soon(tmp_path: Path) -> None:
    few = evaluation(tmp_path, 300).pairs
    path = tmp_path / "report.html"
    path.write_text(render(page_of(tmp_path, [few[i % 300] for i in range(10_000)])), "utf-8")
    with Chromium() as browser:
        browser.open(path)
        browser.wait("document.querySelectorAll('.pair').length > 0")
        assert browser.evaluate("performance.now()") < 20_000
        assert browser.evaluate("document.querySelectorAll('.pair').length") < 500
        assert texts(browser, "#count") == ["10000 of 10000 pairs"]
