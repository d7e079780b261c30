"""The flow of `--evaluate`: plain against tempered over many seeds, kept cycle by cycle.

Several processes (`accelerate launch main.py --evaluate ...`) share the cycles by striding: each
writes a file of its own, none waits for another, and whoever finishes last finds all cycles there
and writes the summary.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from PIL import Image
from tqdm import tqdm

import outputs
from errors import InputError
from loaders import pick_device
from metrics import PictureMetrics, picture_metrics, scatter, summarise, summary_table
from session import Session, open_session, say
from settings import Request
from sheets import Panel, sheet
from tempering import View

Row = dict[str, Any]
ON_SHEET = 8  # cycles; more would be a poster


def run(request: Request) -> None:
    """Run the cycles that are not yet on disk, then the summary; both go to stdout too."""
    state = shared_state(request)
    rank, processes = (state.process_index, state.num_processes) if state else (0, 1)
    session = open_session(request, device=str(state.device) if state else None)
    folder = agree_on_folder(request, state)
    facts = {**session.facts(), **({"notice": notice(folder)} if request.resume else {})}
    seeds = range(request.seed, request.seed + request.cycles)
    done = finished_cycles(folder, session)
    if rank == 0:
        outputs.save_json(folder / "run.json", facts)
    try:
        for row in cycles(session, folder, [s for s in seeds[rank::processes] if s not in done]):
            outputs.append_json_line(folder / f"cycles{f'-{rank}' if rank else ''}.jsonl", row)
            tqdm.write(cycle_line(row))
    except BaseException:
        kept = len(seeds_done(seeds, finished_cycles(folder, session)))
        say(f"kept {kept} of {len(seeds)} cycles; go on with: {command('--resume', folder)}")
        raise
    finished = seeds_done(seeds, finished_cycles(folder, session))
    if len(finished) == len(seeds):
        summarise_run(session, folder, finished, facts)


def command(flag: str, folder: Path) -> str:
    """A command line that can be pasted into the shell of this system."""
    words = ["python", "init.py", flag, str(folder)]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def shared_state(request: Request) -> PartialState | None:
    """accelerate's state where a launcher started several processes."""
    if "WORLD_SIZE" not in os.environ:
        return None
    # Without a GPU accelerate looks at the launcher's variables only when told to use the CPU.
    return PartialState(cpu=pick_device(request.models.device).type == "cpu")


def notice(folder: Path) -> object:
    """What stood in for what when the run in `folder` began."""
    return json.loads((folder / "run.json").read_text(encoding="utf-8")).get("notice")


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


def finished_cycles(folder: Path, session: Session) -> dict[int, Row]:
    """The cycles on disk by seed. Raises InputError where another model or precision made one."""
    found: dict[int, Row] = {}
    for file in folder.glob("cycles*.jsonl"):
        for row in outputs.read_json_lines(file):
            made_by, this_run = (row.get("model"), row.get("dtype")), (session.model, session.dtype)
            if made_by != this_run:
                raise InputError(
                    f"all cycles of {folder} must come from one model in one dtype; there is "
                    f"{' in '.join(map(str, made_by))}, this process has {' in '.join(this_run)}"
                )
            found[row["seed"]] = row
    return found


def seeds_done(seeds: Iterable[int], done: Mapping[int, Row]) -> list[Row]:
    return [done[seed] for seed in seeds if seed in done]


def cycles(session: Session, folder: Path, seeds: list[int]) -> Iterator[Row]:
    """Paint each seed plain and tempered from one shared prefix; yields a row a cycle."""
    calls = session.painter.unet_calls(compare=True)
    with tqdm(total=calls * len(seeds), desc="U-Net", unit="call", disable=None) as bar:
        for seed in seeds:
            begun = time.perf_counter()
            result = session.painter.temper([seed], compare=True, progress=bar.update)[0]
            assert result.plain is not None
            bar.total -= calls - result.unet_calls  # rounds that were not needed
            pictures = {"plain": result.plain, "tempered": result.image}
            views = {name: session.painter.look([image])[0] for name, image in pictures.items()}
            for name, view in views.items():
                text = session.parameters(view.image, seed, name)
                outputs.save_image(folder / f"{seed}-{name}.png", view.image, text)
            yield {
                "cycle": seed - session.request.seed + 1,
                "seed": seed,
                "model": session.model,
                "dtype": session.dtype,
                "unet_calls": result.unet_calls,
                "rounds": len(result.rounds),
                "seconds": round(time.perf_counter() - begun, 3),
                **{name: figures(view) for name, view in views.items()},
            }


def figures(view: View) -> Row:
    matrix = view.matrix.numpy()
    return {**asdict(picture_metrics(matrix)), "class_matrix": matrix.tolist()}


def summarise_run(session: Session, folder: Path, finished: list[Row], facts: Row) -> None:
    """Write and print the summary of all cycles."""
    plain, tempered = ([metrics(row[name]) for row in finished] for name in ("plain", "tempered"))
    summary = summarise(plain, tempered)
    outputs.save_json(
        folder / "summary.json",
        {
            "cycles": len(finished),
            "unet_calls": sum(row["unet_calls"] for row in finished),
            "metrics": summary,
            **facts,
        },
    )
    outputs.save_csv(
        folder / "summary.csv", [{"metric": name, **asdict(row)} for name, row in summary.items()]
    )
    title = f"{session.request.prompt} ({session.model})"
    outputs.save_figure(folder / "scatter.png", scatter(plain, tempered, title))
    outputs.save_image(folder / "sheet.png", draw_sheet(folder, finished[:ON_SHEET], title))
    print(summary_table(summary))
    print(folder)


def draw_sheet(folder: Path, shown: list[Row], title: str) -> Image.Image:
    """The plain and the tempered picture of each cycle side by side with their figures."""
    panels = []
    for row in shown:
        for name in ("plain", "tempered"):
            with Image.open(folder / f"{row['seed']}-{name}.png") as picture:
                panel = Panel(f"{row['seed']} {name}", picture.copy(), (str(metrics(row[name])),))
            panels.append(panel)
    return sheet(panels, title)


def metrics(figures: Row) -> PictureMetrics:
    return PictureMetrics(figures["ppv"], figures["npv"], figures["js"])


def cycle_line(row: Row) -> str:
    """One cycle for the terminal."""
    parts = [f"{name} {metrics(row[name])}" for name in ("plain", "tempered")]
    return f"cycle {row['cycle']}  seed {row['seed']}  {'  |  '.join(parts)}"
