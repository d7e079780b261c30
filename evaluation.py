"""The flow of `--evaluate`: plain against tempered over many seeds, kept cycle by cycle.

Several processes (`accelerate launch main.py --evaluate ...`) share the cycles by striding: each
writes a file of its own, none waits for another, and whoever finishes last finds all cycles there
and writes the summary.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
import time
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from PIL import Image
from tqdm import tqdm

import cycles
import outputs
from cycles import Row
from errors import InputError, TemperingError
from loaders import pick_device
from metrics import PictureMetrics, picture_metrics, scatter, summarise, summary_table
from session import Session, open_session, say
from settings import FREE_ON_RESUME, Request
from sheets import Panel, sheet
from tempering import View

ON_SHEET = 8  # cycles; more would be a poster


def run(request: Request) -> None:
    """Run the cycles that are not yet on disk, then the summary; both go to stdout too."""
    state = shared_state(request)
    rank, processes = (state.process_index, state.num_processes) if state else (0, 1)
    session = open_session(request, device=str(state.device) if state else None)
    folder = first_decides(state, lambda: run_folder(request))
    seeds = range(request.seed, request.seed + request.cycles)
    with cycles.claimed(folder, rank):
        done = finished_cycles(folder, session)
        with last_words(folder, seeds):
            facts = {**session.facts(), **earlier_notice(folder)}
            if rank == 0:
                outputs.save_json(folder / "run.json", facts)
            missing = [seed for seed in seeds[rank::processes] if seed not in done]
            for row in paint(session, folder, missing):
                outputs.append_json_line(cycles.rows_file(folder, rank), row)
                tqdm.write(cycle_line(row))
            conclude(session, folder, seeds, facts)


def conclude(session: Session, folder: Path, seeds: range, facts: Row) -> None:
    """The summary, where no other process still has cycles to paint."""
    done = finished_cycles(folder, session)
    if all(seed in done for seed in seeds):
        summarise_run(session, folder, [done[seed] for seed in seeds], facts)
    else:
        say(
            f"{count(done, seeds)} are finished, other processes paint the rest; if one of them is "
            f"gone, go on with: {command('--resume', folder)}"
        )


@contextmanager
def last_words(folder: Path, seeds: range) -> Iterator[None]:
    """Whatever ends the run early: its last words say what is kept, and how to go on."""
    try:
        yield
    except BaseException:
        kept = count(cycles.finished(folder), seeds)
        say(f"kept {kept}; go on with: {command('--resume', folder)}")
        raise


def count(done: Container[int], seeds: range) -> str:
    return f"{sum(seed in done for seed in seeds)} of {len(seeds)} cycles"


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


def first_decides(state: PartialState | None, decide: Callable[[], Path]) -> Path:
    """What the first process decides, for all processes; what it can not do, none can."""
    if state is None:
        return decide()
    told: list[Path | TemperingError | None] = [None]
    if state.is_main_process:
        try:
            told = [decide()]
        except TemperingError as error:
            told = [error]
    try:
        broadcast_object_list(told)
    except RuntimeError as error:  # torch.distributed's, where a process is gone
        raise TemperingError(
            "another process of this run ended before all were ready, its own words say why: start "
            "all of them again"
        ) from error
    if isinstance(told[0], TemperingError):
        raise told[0]
    assert told[0] is not None
    return told[0]


def run_folder(request: Request) -> Path:
    """The folder to resume, without what killed runs have left in it, or a new one."""
    if not request.resume:
        return outputs.new_run_folder(request.output, request.prompt, request.begun)
    cycles.prepare(request.resume)
    return request.resume


def earlier_notice(folder: Path) -> Row:
    """What stood in for what when the run in `folder` began, where its run.json tells."""
    try:
        return {"notice": outputs.read_json(folder / "run.json").get("notice")}
    except InputError:  # new, or damaged
        return {}


def finished_cycles(folder: Path, session: Session) -> dict[int, Row]:
    """The finished cycles by seed. Raises InputError for those of another experiment than this."""
    done, mine = cycles.finished(folder), made_by(session)
    for row in done.values():
        theirs = {name: row.get(name, value) for name, value in mine.items()}
        if (theirs["model"], theirs["dtype"]) != (mine["model"], mine["dtype"]):
            raise InputError(
                f"all cycles of {folder} must come from one model in one dtype; there is "
                f"{theirs['model']} in {theirs['dtype']}, this process has {mine['model']} in "
                f"{mine['dtype']}"
            )
        if session.request.blind and theirs["flags"] != mine["flags"]:
            raise InputError(
                f"the run.json of {folder} is damaged, so --resume needs all flags of its first "
                "call again; its cycles were made by others than these"
            )
    return done


def made_by(session: Session) -> Row:
    """What all cycles of one experiment have in common, for their rows."""
    arguments = session.facts()["arguments"]
    flags = {name: value for name, value in arguments.items() if name not in FREE_ON_RESUME}
    digest = hashlib.sha256(json.dumps(flags, sort_keys=True).encode()).hexdigest()
    return {"model": session.model, "dtype": session.dtype, "flags": digest[:12]}


def paint(session: Session, folder: Path, seeds: list[int]) -> Iterator[Row]:
    """Paint each seed plain and tempered from one shared prefix; yields a row a cycle."""
    calls, origin = session.painter.unet_calls(compare=True), made_by(session)
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
                outputs.save_image(cycles.picture_file(folder, seed, name), view.image, text)
            yield {
                "cycle": seed - session.request.seed + 1,
                "seed": seed,
                **origin,
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
    plain, tempered = ([metrics(row[name]) for row in finished] for name in cycles.PICTURES)
    summary = summarise(plain, tempered)
    print(summary_table(summary), flush=True)  # before any file: what a full disk refuses is here
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
    print(folder)


def draw_sheet(folder: Path, shown: list[Row], title: str) -> Image.Image:
    """The plain and the tempered picture of each cycle side by side with their figures."""
    panels = []
    for row in shown:
        for name in cycles.PICTURES:
            with Image.open(cycles.picture_file(folder, row["seed"], name)) as picture:
                panel = Panel(f"{row['seed']} {name}", picture.copy(), (str(metrics(row[name])),))
            panels.append(panel)
    return sheet(panels, title)


def metrics(figures: Row) -> PictureMetrics:
    return PictureMetrics(figures["ppv"], figures["npv"], figures["js"])


def cycle_line(row: Row) -> str:
    """One cycle for the terminal."""
    parts = [f"{name} {metrics(row[name])}" for name in cycles.PICTURES]
    return f"cycle {row['cycle']}  seed {row['seed']}  {'  |  '.join(parts)}"
