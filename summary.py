"""What an evaluation comes to: figures on the terminal, in files for every reader, and a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from PIL import Image

import outputs
from comparison import Comparison, Pair, Table, compare, tables
from cycles import PICTURES, Key, Records, Row, picture
from judges import REMARKS, Calibration
from judging import Judged
from metrics import METRICS, PictureMetrics, scatter
from report import Report, render
from settings import FREE_ON_RESUME
from sheets import Panel, sheet

ON_SHEET = 8  # cycles; more would be a poster
# Of the facts, what may differ between processes and calls that make the same pictures.
OF_THE_CALL = ("device", "started")


def summarise(
    records: Records, rows: Mapping[Key, Row], judged: Judged, title: str, facts: Row
) -> None:
    """Print the tables of all cycles, and write them as files, plots, sheet and page.

    The summary's files do not depend on how many processes have painted, or when: what differs
    from run to run, such as seconds, is on the terminal and on the page alone.
    """
    pairs = pairs_of(records, rows, judged)
    comparisons = compare(pairs)
    timed = tables(comparisons, seconds_of(comparisons, pairs))
    # Before any file: what a full disk refuses is here.
    print("\n\n".join(table.text() for table in timed), flush=True)
    folder, told = records.folder, tables(comparisons, {})
    outputs.save_json(folder / "summary.json", as_json(comparisons, judged, pairs, rows, facts))
    outputs.save_csv(folder / "summary.csv", as_rows(comparisons))
    outputs.save_text(folder / "summary.md", as_markdown(told, title, facts, judged))
    heading = f"{title} ({facts['model']})"
    sides = [pair.plain for pair in pairs], [pair.tempered for pair in pairs]
    outputs.save_figure(folder / "scatter.png", scatter(*sides, heading))
    outputs.save_image(folder / "sheet.png", draw_sheet(records, rows, heading))
    page = Report(
        title=title,
        folder=folder,
        prompts=records.prompts,
        pairs=pairs,
        picture_file=lambda pair, name: records.picture_file((pair.prompt, pair.seed), name),
        comparisons=comparisons,
        tables=timed,
        facts=facts,
        remarks=remarks(judged),
    )
    outputs.save_text(folder / "report.html", render(page))
    print(folder)


def pairs_of(records: Records, rows: Mapping[Key, Row], judged: Judged) -> list[Pair]:
    """Every cycle with its figures and verdicts, in the order of the set."""
    return [
        Pair(
            prompt=key[0],
            subset=records.prompt(key).subset,
            seed=key[1],
            plain=metrics(rows[key]["plain"]),
            tempered=metrics(rows[key]["tempered"]),
            plain_calls=rows[key].get("plain_calls"),
            tempered_calls=rows[key].get("tempered_calls"),
            seconds=rows[key].get("seconds", 0.0),
            said={name: said[key] for name, said in judged.said.items()},
        )
        for key in records.keys
    ]


def metrics(figures: Row) -> PictureMetrics:
    return PictureMetrics(figures["ppv"], figures["npv"], figures["js"])


def seconds_of(comparisons: Sequence[Comparison], pairs: Sequence[Pair]) -> dict[str, float]:
    """Seconds of a pair by subset, on average."""
    pooled = comparisons[-1].subset
    taken: dict[str, list[float]] = {}
    for pair in pairs:
        for subset in {pair.subset, pooled}:
            taken.setdefault(subset, []).append(pair.seconds)
    return {subset: sum(values) / len(values) for subset, values in taken.items()}


# --- As files.


def as_json(
    comparisons: Sequence[Comparison],
    judged: Judged,
    pairs: Sequence[Pair],
    rows: Mapping[Key, Row],
    facts: Row,
) -> Row:
    """All figures of all subsets; `metrics` are CLIPSeg's, of all cycles together."""
    pooled = comparisons[-1]
    lasting = {name: value for name, value in facts.items() if name not in OF_THE_CALL}
    free = set(FREE_ON_RESUME) - {"cycles"}
    arguments = {name: value for name, value in facts["arguments"].items() if name not in free}
    return {
        "cycles": len(pairs),
        "prompts": pooled.prompts,
        "unet_calls": sum(rows[pair.prompt, pair.seed]["unet_calls"] for pair in pairs),
        "metrics": {key: pooled.measures[key] for key in METRICS},
        "judges": list(judged.said),
        "calibration": judged.calibration,
        "subsets": [
            {
                "subset": each.subset,
                "prompts": each.prompts,
                "cycles": each.pairs,
                "cost": each.cost,
                "measures": each.measures,
            }
            for each in comparisons
        ],
        **lasting,
        "arguments": arguments,
    }


def as_rows(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """A row a subset and measure."""
    return [
        {"subset": each.subset, "metric": name, "prompts": each.prompts, **asdict(found)}
        for each in comparisons
        for name, found in each.measures.items()
    ]


def as_markdown(told: Sequence[Table], title: str, facts: Row, judged: Judged) -> str:
    head = f"# {title}\n\n{facts['model']}, {facts['dtype']}, {facts['scheduler']}"
    notes = "\n".join(f"- {remark}" for remark in remarks(judged))
    return "\n\n".join([head, *(table.markdown() for table in told), notes]).rstrip() + "\n"


def remarks(judged: Judged) -> list[str]:
    """What a reader must know of the judges."""
    found = [f"{name}: {REMARKS[name]}" for name in judged.said]
    return found + ([calibrated(judged.calibration)] if judged.calibration else [])


def calibrated(calibration: Calibration) -> str:
    """How sure OWLv2 had to be."""
    threshold = f"owlv2: something is there from a score of {calibration.threshold:.2f} on"
    if calibration.found is None or calibration.invented is None:
        return f"{threshold}, the recipe's: there were too few pictures to calibrate it"
    return (
        f"{threshold}: of {calibration.pictures} subjects painted alone by the same model it finds "
        f"{calibration.found:.0%} there, and {calibration.invented:.0%} of those that were not "
        "painted"
    )


def draw_sheet(records: Records, rows: Mapping[Key, Row], title: str) -> Image.Image:
    """The plain and the tempered picture of the first cycles side by side with their figures."""
    panels = []
    for key in records.keys[:ON_SHEET]:
        for name in PICTURES:
            figures = str(metrics(rows[key][name]))
            image = picture(records.picture_file(key, name))
            panels.append(Panel(f"{key[1]} {name}", image, (figures,)))
    return sheet(panels, title)
