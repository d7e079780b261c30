"""The page of an evaluation: one file that needs nothing else, the pictures' originals beside it.

Python decides what is shown and where the marks of the plots are; page/report.html is how it looks
(page/report.css) and what its buttons do (page/report.js). Whatever comes from a prompt is escaped
by jinja2; the page forbids itself any request but for the pictures beside it.
"""

from __future__ import annotations

import base64
import hashlib
import math
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

import judges
from comparison import ALL_OK, Comparison, Pair, Table, figures_of, percent, points
from judges import Verdict
from metrics import PictureMetrics
from prompts import Prompt

PAGE = Path(__file__).with_name("page")
INSIDE = 300  # pairs whose thumbnails are in the page; of more, some spread evenly over them
SIDES = ("plain", "tempered")
THUMB, QUALITY = 128, 50  # pixels of a thumbnail's longer side, of WebP
ARROWS = 2000  # of the scatter plot, likewise
BARS = 24  # of the histogram, at most

Json = dict[str, Any]


@dataclass(frozen=True)
class Frame:
    """Where a plot's axes are, in the units of its viewBox: about a phone's pixels."""

    bottom: float
    left: float = 46
    top: float = 14
    width: float = 400

    @property
    def right(self) -> float:
        return self.width - 14

    @property
    def height(self) -> float:
        return self.bottom + 34


@dataclass(frozen=True)
class Report:
    """What a page tells of an evaluation.

    `picture_file` finds the "plain" or "tempered" picture of a pair, below `folder`, where the page
    will be. `remarks` is what a reader must know of the judges. `facts` are those of run.json.
    """

    title: str
    folder: Path
    prompts: Sequence[Prompt]
    pairs: Sequence[Pair]
    picture_file: Callable[[Pair, str], Path]
    comparisons: Sequence[Comparison]
    tables: Sequence[Table]
    facts: Mapping[str, Any]
    remarks: Sequence[str] = ()


def render(report: Report) -> str:
    """The page as HTML."""
    environment = Environment(
        loader=FileSystemLoader(PAGE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (PAGE / "report.js").read_text(encoding="utf-8")
    pooled = report.comparisons[-1]
    return environment.get_template("report.html").render(
        title=report.title,
        facts=report.facts,
        remarks=report.remarks,
        tables=report.tables,
        pooled=pooled,
        headlines=headlines(pooled),
        rates=[rate_plot(judge, report.comparisons) for judge in told_by(pooled)],
        scatter=scatter_plot(report.pairs),
        cost=cost_plot(report.pairs),
        inside=min(INSIDE, len(report.pairs)),
        data=data_of(report),
        style=(PAGE / "report.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def told_by(comparison: Comparison) -> list[str]:
    """The judges that have their say."""
    return [judge for judge in judges.FAULTS if f"{judge}/{ALL_OK}" in comparison.measures]


def headlines(pooled: Comparison) -> list[Json]:
    """The figures that come first: a judge's rates each, in words and numbers."""
    found = []
    for judge in told_by(pooled):
        rate = pooled.measures[f"{judge}/{ALL_OK}"]
        ends = rate.interval
        found.append(
            {
                "judge": judge,
                "plain": percent(rate.plain_mean),
                "tempered": percent(rate.tempered_mean),
                "difference": points(rate.difference_mean),
                "interval": ends and f"{points(ends[0])} to {points(ends[1])}",
                "cut": None if rate.failures_cut is None else percent(rate.failures_cut),
                "rescued": rate.better,
                "spoiled": rate.worse,
            }
        )
    return found


# --- The pairs.


def data_of(report: Report) -> Json:
    """What the page's script shows: prompts, and pairs with their figures, verdicts, pictures."""
    told = told_by(report.comparisons[-1])
    thumbs = thumbnails(report)
    width = len(str(len(report.prompts)))
    repeated = ["python", "init.py", "--tempered_inference", "--compare"]
    repeated += ["--repeat", str(report.folder / "run.json")]
    return {
        "judges": told,
        "figures": [name for name, *_ in figures_of(report.comparisons[-1])][:3],
        "prompts": [
            {
                "text": prompt.text,
                "subjects": prompt.subjects,
                "subset": prompt.subset,
                "number": f"{number:0{width}}",
                "again": shlex.join(
                    [*repeated, "--joiner", prompt.joiner, "--prompts", *prompt.subjects]
                ),
            }
            for number, prompt in enumerate(report.prompts, start=1)
        ],
        "pairs": [
            {
                "prompt": pair.prompt - 1,
                "seed": pair.seed,
                "calls": pair.tempered_calls,
                "plain": shown(report, pair, "plain", told, thumbs),
                "tempered": shown(report, pair, "tempered", told, thumbs),
            }
            for pair in report.pairs
        ],
    }


def shown(
    report: Report, pair: Pair, name: str, told: Sequence[str], thumbs: Mapping[Path, str | None]
) -> Json:
    """One picture of a pair."""
    file = report.picture_file(pair, name)
    seen: PictureMetrics = getattr(pair, name)
    thumb = thumbs.get(file)
    return {
        "file": file.relative_to(report.folder).as_posix(),
        **({"thumb": thumb} if thumb else {}),
        "figures": [round(value, 3) for value in (seen.ppv, seen.npv, seen.js)],
        "said": [told_of(pair.said[judge][name == "tempered"]) for judge in told],
    }


def told_of(verdict: Verdict) -> Json:
    return {"faults": verdict.faults, "notes": verdict.notes}


def thumbnails(report: Report) -> dict[Path, str | None]:
    """Thumbnails as data URIs of pictures that are spread evenly over all; None if unreadable."""
    files = [
        report.picture_file(pair, name) for pair in spread(report.pairs, INSIDE) for name in SIDES
    ]
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside Python's lock
        return dict(zip(files, pool.map(thumbnail, files), strict=True))


def thumbnail(file: Path) -> str | None:
    try:
        with Image.open(file, formats=["PNG"]) as picture:
            small = picture.convert("RGB")
    except Exception:  # Pillow's own have no family: OSError, SyntaxError, a bomb's
        return None
    small.thumbnail((THUMB, THUMB), Image.Resampling.LANCZOS)
    encoded = BytesIO()
    small.save(encoded, "WEBP", quality=QUALITY, method=2)
    return f"data:image/webp;base64,{base64.b64encode(encoded.getvalue()).decode()}"


def spread(values: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the values, at even distances and in their order."""
    if len(values) <= count:
        return list(values)
    return [values[i * len(values) // count] for i in range(count)]


# --- The plots: where everything stands, in the units of their viewBox.


def rate_plot(judge: str, comparisons: Sequence[Comparison]) -> Json:
    """All-OK rates, a row a subset: plain, tempered, the interval of their difference."""
    height = 34  # of a row
    frame = Frame(bottom=14 + height * len(comparisons), left=104)
    x = Axis(0, 1, frame.left, frame.right)
    rows = []
    for number, each in enumerate(comparisons):
        rate = each.measures[f"{judge}/{ALL_OK}"]
        plain, tempered = rate.plain_mean, rate.tempered_mean
        ends = rate.interval
        rows.append(
            {
                "name": each.subset,
                "y": frame.top + height * (number + 0.5),
                "plain": x.place(plain),
                "tempered": x.place(tempered),
                "ends": ends and [x.place(min(1, max(0, plain + end))) for end in ends],
                "text": f"{each.subset}: plain {percent(plain)}, tempered {percent(tempered)}",
            }
        )
    ticks = [{"at": x.place(share / 4), "text": f"{25 * share} %"} for share in range(5)]
    return {"judge": judge, "frame": frame, "rows": rows, "ticks": ticks}


def scatter_plot(pairs: Sequence[Pair]) -> Json:
    """NPV on x, PPV on y, an arrow from each plain picture to its tempered one, and the means."""
    some = spread(pairs, ARROWS)
    frame = Frame(bottom=266)
    shown = [picture for pair in some for picture in (pair.plain, pair.tempered)]
    x = axis([picture.npv for picture in shown], frame.left, frame.right)
    y = axis([picture.ppv for picture in shown], frame.bottom, frame.top)
    plain = [(x.place(pair.plain.npv), y.place(pair.plain.ppv)) for pair in some]
    tempered = [(x.place(pair.tempered.npv), y.place(pair.tempered.ppv)) for pair in some]
    sides = [[pair.plain for pair in pairs], [pair.tempered for pair in pairs]]
    return {
        "frame": frame,
        "x": x.ticks,
        "y": y.ticks,
        "plain": dots(plain),
        "tempered": dots(tempered),
        "lines": "".join(
            f"M{a} {b}L{c} {d}" for (a, b), (c, d) in zip(plain, tempered, strict=True)
        ),
        "means": [
            (x.place(mean([p.npv for p in side])), y.place(mean([p.ppv for p in side])))
            for side in sides
        ],
        "shown": len(some),
    }


def dots(points: Sequence[tuple[float, float]]) -> str:
    """One path of zero-length strokes with round ends: small in the file, however many."""
    return "".join(f"M{x} {y}h0" for x, y in points)


def cost_plot(pairs: Sequence[Pair]) -> Json | None:
    """How many tempered pictures cost how many U-Net calls; None where it was not noted."""
    known = [pair for pair in pairs if pair.tempered_calls is not None]
    calls = [pair.tempered_calls or 0 for pair in known]
    if not calls:
        return None
    plain = mean([pair.plain_calls or 0 for pair in known])
    most = math.ceil(max(*calls, plain))
    step = max(1, math.ceil(most / BARS))
    counts = Counter(int(value // step) for value in calls)
    frame = Frame(bottom=266)
    x = Axis(0, most + step, frame.left, frame.right)
    y = Axis(0, max(counts.values()), frame.bottom, frame.top + 16)
    return {
        "frame": frame,
        "x": x.ticks,
        "y": y.ticks,
        "bars": [
            {
                "x": x.place(bin * step),
                "width": max(1.0, round(x.place((bin + 1) * step) - x.place(bin * step) - 1, 1)),
                "y": y.place(count),
                "height": round(frame.bottom - y.place(count), 1),
                "text": f"{bin * step}{f' to {(bin + 1) * step - 1}' if step > 1 else ''} calls: "
                f"{count} {'picture' if count == 1 else 'pictures'}",
            }
            for bin, count in sorted(counts.items())
        ],
        "plain": x.place(plain),
        "mean": x.place(mean(calls)),
        "text": f"plain {plain:.1f}, tempered {mean(calls):.1f} on average",
    }


@dataclass(frozen=True)
class Axis:
    """Values on a line from pixel `start` to pixel `end`."""

    low: float
    high: float
    start: float
    end: float

    def place(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

    @property
    def ticks(self) -> list[Json]:
        """About five round values."""
        rough = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * times for times in (1, 2, 5, 10) if power * times >= rough)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        places = max(0, -math.floor(math.log10(step) + 1e-9))
        return [
            {"at": self.place(number * step), "text": f"{number * step:.{places}f}"}
            for number in range(first, last + 1)
        ]


def axis(values: Sequence[float], start: float, end: float) -> Axis:
    """An axis on which all values fit, with some air on both sides."""
    low, high = min(values), max(values)
    air = 0.06 * max(high - low, 0.04)
    return Axis(low - air, high + air, start, end)


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
