"""The flow of `--evaluate`: plain against tempered over many seeds, kept cycle by cycle.

Several processes (`accelerate launch main.py --evaluate ...`) share the cycles by striding: each
writes a file of its own, none waits for another, and whoever finishes last finds all cycles there
and writes the summary.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

import outputs
from metrics import PictureMetrics, picture_metrics, scatter, summarise, summary_table
from session import Session, open_session, say
from settings import Request
from tempering import View

Row = dict[str, Any]


def run(request: Request) -> None:
    """Run the cycles that are not yet on disk, then the summary; both go to stdout too."""
    state = PartialState() if "WORLD_SIZE" in os.environ else None
    rank, processes = (state.process_index, state.num_processes) if state else (0, 1)
    session = open_session(request, device=str(state.device) if state else None)
    folder = agree_on_folder(request, state)
    if rank == 0:
        outputs.save_json(folder / "run.json", session.facts())
    seeds = range(request.seed, request.seed + request.cycles)
    done = {row["seed"] for row in rows(folder)}
    mine = [seed for seed in seeds[rank::processes] if seed not in done]
    try:
        for row in cycles(session, folder, mine):
            outputs.append_json_line(folder / f"cycles{f'-{rank}' if rank else ''}.jsonl", row)
            print(cycle_line(row))
    except KeyboardInterrupt:
        kept = len(rows(folder))
        say(f"kept {kept} of {len(seeds)} cycles; go on with: python main.py --resume {folder}")
        raise
    finished = [row for row in rows(folder) if row["seed"] in seeds]
    if len(finished) == len(seeds):
        summarise_run(session, folder, finished)


def agree_on_folder(request: Request, state: PartialState | None) -> Path:
    """The run folder: the one to resume, or a new one, the same for all processes."""
    if request.resume:
        return request.resume
    if state is None:
        return outputs.new_run_folder(request.output, request.prompt, request.begun)
    agreed: list[Path | None] = [None]
    if state.is_main_process:
        agreed = [outputs.new_run_folder(request.output, request.prompt, request.begun)]
    broadcast_object_list(agreed)
    assert agreed[0] is not None
    return agreed[0]


def rows(folder: Path) -> list[Row]:
    """The finished cycles of a run folder, by seed."""
    found = [row for file in folder.glob("cycles*.jsonl") for row in outputs.read_json_lines(file)]
    return sorted(found, key=lambda row: row["seed"])


def cycles(session: Session, folder: Path, seeds: list[int]) -> Iterator[Row]:
    """Paint each seed plain and tempered from one shared prefix; yields a row a cycle."""
    calls = session.painter.unet_calls(compare=True)
    with tqdm(total=calls * len(seeds), desc="U-Net", unit="call", disable=None) as bar:
        for seed in seeds:
            begun = time.perf_counter()
            result = session.painter.temper([seed], compare=True, progress=bar.update)[0]
            assert result.plain is not None
            pictures = {"plain": result.plain, "tempered": result.image}
            views = {name: session.painter.look([image])[0] for name, image in pictures.items()}
            for name, view in views.items():
                text = session.parameters(view.image, seed, tempered=name == "tempered")
                outputs.save_image(folder / f"{seed}-{name}.png", view.image, text)
            yield {
                "cycle": seed - session.request.seed + 1,
                "seed": seed,
                "unet_calls": result.unet_calls,
                "seconds": round(time.perf_counter() - begun, 3),
                **{name: figures(view) for name, view in views.items()},
            }


def figures(view: View) -> Row:
    matrix = view.matrix.numpy()
    return {**asdict(picture_metrics(matrix)), "class_matrix": matrix.tolist()}


def summarise_run(session: Session, folder: Path, finished: list[Row]) -> None:
    """Write and print the summary of all cycles."""
    plain, tempered = ([metrics(row[name]) for row in finished] for name in ("plain", "tempered"))
    summary = summarise(plain, tempered)
    outputs.save_json(
        folder / "summary.json",
        {
            "cycles": len(finished),
            "unet_calls": sum(row["unet_calls"] for row in finished),
            "metrics": summary,
            **session.facts(),
        },
    )
    outputs.save_csv(
        folder / "summary.csv", [{"metric": name, **asdict(row)} for name, row in summary.items()]
    )
    title = f"{session.request.prompt} ({session.model})"
    outputs.save_figure(folder / "scatter.png", scatter(plain, tempered, title))
    print(summary_table(summary))
    print(folder)


def metrics(figures: Row) -> PictureMetrics:
    return PictureMetrics(figures["ppv"], figures["npv"], figures["js"])


def cycle_line(row: Row) -> str:
    """One cycle for the terminal."""
    parts = [
        f"{name} PPV {row[name]['ppv']:.3f} NPV {row[name]['npv']:.3f} JS {row[name]['js']:.3f}"
        for name in ("plain", "tempered")
    ]
    return f"cycle {row['cycle']}  seed {row['seed']}  {'  |  '.join(parts)}"
