"""The flow of `--evaluate`: plain against tempered over prompts and seeds, kept cycle by cycle.

Several processes (`accelerate launch main.py --evaluate ...`) share the cycles by striding: each
writes files of its own, none waits for another once they know where, and whoever finishes last
finds all there and writes the summary. Judges look at pictures that are on disk, when the model
that painted them has left the memory; one judge is there at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

import calibration
import cycles
import judging
import outputs
import prompts
from calibrating import take_sample
from cycles import PICTURES, Key, Records, Row
from errors import InputError, TemperingError, one_line
from judging import NoteKey, Single
from loaders import load_judge, pick_device
from memory import free_memory
from painting import Batch, OnTheWay, paint, plain
from session import Session, open_session, say
from settings import FREE_ON_RESUME, JUDGES, Request
from summary import metrics, summarise

Decided = TypeVar("Decided")
# What run.json tells of a run that can not be known without its models, and its flags.
OF_MODELS = {
    **dict.fromkeys(("model", "dtype", "device", "scheduler", "started"), str),
    **dict.fromkeys(("versions", "arguments"), dict),
}


@dataclass(frozen=True)
class Begun:
    """What the first process finds, for all of them: the folder, and what is done there."""

    folder: Path
    painted: tuple[Key, ...] = ()  # cycles that have a row, in the order of the set
    origins: tuple[tuple[str, str, str | None], ...] = ()  # of all rows: model, dtype, flags
    noted: tuple[frozenset[NoteKey], ...] = (frozenset(),) * len(JUDGES)  # by each of JUDGES


class Models:
    """The models of this process, loaded when they are needed for the first time."""

    def __init__(self, request: Request, device: str | None) -> None:
        self.request = request
        self.device = device
        self.session: Session | None = None

    def open(self) -> Session:
        if self.session is None:
            self.session = open_session(self.request, self.device)
        return self.session

    def close(self) -> None:
        """Leave the memory to others."""
        self.session = None
        free_memory(pick_device(self.device or self.request.models.device))


def run(request: Request) -> None:
    """Paint and judge what is not yet on disk, then the summary; it goes to stdout too."""
    judging.check(request)
    state = shared_state(request)
    rank, processes = (state.process_index, state.num_processes) if state else (0, 1)
    share = slice(rank, None, processes)
    models = Models(request, str(state.device) if state else None)
    if not request.resume or request.blind:
        models.open()  # what can not be loaded leaves no folder behind
    begun = first_decides(state, lambda: begin(request))
    records = Records(begun.folder, request.all_prompts, seeds_of(request))
    with cycles.claimed(records.folder, rank):
        lost = [key for key in begun.painted[share] if not records.is_painted(key)]
        done = set(begun.painted)
        mine = sorted([*[key for key in records.keys if key not in done][share], *lost])
        facts = facts_of(models, records, begun, needed=bool(mine))
        with last_words(records):
            if rank == 0:
                outputs.save_json(records.folder / "run.json", facts)
                if request.prompt_set:
                    text = prompts.write(request.prompt_set, request.settings.joiner)
                    outputs.save_text(records.folder / prompts.KEPT, text)
            names = judging.chosen(request, facts["model"])
            facts = {**facts, "thresholds": paint_all(models, records, rank, mine, facts)}
            alone = judging.singles(records, names)
            paint_singles(models, alone[share])
            models.close()
            seen = list(dict.fromkeys([*begun.painted[share], *mine]))
            judge_all(models, records, rank, names, begun, seen, alone[share])
            expected = len(alone) if processes > 1 else 0
            conclude(records, names, expected, request.title, facts)


def seeds_of(request: Request) -> range:
    return range(request.seed, request.seed + request.cycles)


# --- Together with other processes.


def shared_state(request: Request) -> PartialState | None:
    """accelerate's state where a launcher started several processes.

    Raises InputError where it was told to, and has started one: without a GPU it knows no better;
    and for an environment that no launcher has made.
    """
    if "WORLD_SIZE" in os.environ:
        # Without a GPU accelerate looks at the launcher's variables only when told to use the CPU.
        on_cpu = pick_device(request.models.device).type == "cpu"
        try:
            check_rank()
            return PartialState(cpu=on_cpu)
        except (KeyError, ValueError) as error:
            raise InputError(
                "WORLD_SIZE must be unset, or stand beside all else that a launcher sets, got "
                f"{os.environ['WORLD_SIZE']!r} ({one_line(error)})"
            ) from error
        except RuntimeError as error:  # torch.distributed's
            raise TemperingError(
                f"the processes of this run do not find each other ({one_line(error)}): start all "
                "of them again"
            ) from error
    # What `accelerate launch --num_processes 2` leaves in the environment of its only process.
    if {"MASTER_ADDR", "ACCELERATE_MIXED_PRECISION"} <= os.environ.keys():
        again = shlex.join(["main.py", *sys.argv[1:]])
        raise InputError(
            "accelerate launch must have a GPU for each of --num_processes, here it has started "
            f"one process alone; what starts N on CPUs: torchrun --nproc_per_node N {again}"
        )
    return None


def check_rank() -> None:
    """Raise ValueError for a process that is not one of WORLD_SIZE: they would wait for ever."""
    rank, size = (int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE"))
    if not 0 <= rank < size:
        raise ValueError(f"RANK is {rank}")


def first_decides(state: PartialState | None, decide: Callable[[], Decided]) -> Decided:
    """What the first process decides, for all processes; what it can not do, none can."""
    if state is None:
        return decide()
    told: list[Decided | TemperingError | None] = [None]
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


def begin(request: Request) -> Begun:
    """A new folder; or the one to resume, without what killed runs have left, and what is there."""
    if not request.resume:
        return Begun(outputs.new_run_folder(request.output, request.title, request.begun))
    cycles.prepare(request.resume)
    records = Records(request.resume, request.all_prompts, seeds_of(request))
    found = {key: origin_of(row) for key, row in records.all_rows()}
    return Begun(
        records.folder,
        painted=tuple(key for key in records.keys if key in found),
        origins=tuple(dict.fromkeys(found.values())),
        noted=tuple(frozenset(judging.noted(records, judge)) for judge in JUDGES),
    )


def origin_of(row: Row) -> tuple[str, str, str | None]:
    return str(row["model"]), str(row["dtype"]), row.get("flags")


# --- What all cycles have in common.


def facts_of(models: Models, records: Records, begun: Begun, *, needed: bool) -> Row:
    """What run.json says of the run; its models are opened where pictures `needed` are missing."""
    try:
        earlier = outputs.read_json(records.folder / "run.json")
    except InputError:  # new, or damaged
        earlier = {}
    known = all(isinstance(earlier.get(name), kind) for name, kind in OF_MODELS.items())
    if known and not needed and models.session is None:
        free = {name: models.request.arguments[name] for name in FREE_ON_RESUME}
        return {**earlier, "arguments": {**earlier["arguments"], **free}}
    session = models.open()
    check_origins(session, begun, models.request)
    notice = {"notice": earlier["notice"]} if "notice" in earlier else {}
    return {**session.facts(), **notice}


def check_origins(session: Session, begun: Begun, request: Request) -> None:
    """Raise InputError for cycles of another experiment than this."""
    mine = made_by(session)
    for model, dtype, flags in begun.origins:
        check_one_model(begun.folder, (model, dtype), (mine["model"], mine["dtype"]))
        if request.blind and flags not in (None, mine["flags"]):
            raise InputError(
                f"the run.json of {begun.folder} is damaged, so --resume needs all flags of its "
                "first call again; its cycles were made by others than these"
            )


def check_one_model(folder: Path, theirs: tuple[str, str], mine: tuple[str, str]) -> None:
    """Raise InputError where cycles come from several models or precisions."""
    if theirs != mine:
        raise InputError(
            f"all cycles of {folder} must come from one model in one dtype; there is "
            f"{' in '.join(theirs)}, this process has {' in '.join(mine)}"
        )


def made_by(session: Session) -> Row:
    """What all cycles of one experiment have in common, for their rows."""
    arguments = session.facts()["arguments"]
    flags = {name: value for name, value in arguments.items() if name not in FREE_ON_RESUME}
    if session.request.prompt_set:  # its text, which may change while its name does not
        flags["prompts_file"] = prompts.write(session.request.prompt_set, "")
    digest = hashlib.sha256(json.dumps(flags, sort_keys=True).encode()).hexdigest()
    return {"model": session.model, "dtype": session.dtype, "flags": digest[:12]}


# --- Painting and judging.


def paint_all(models: Models, records: Records, rank: int, mine: Sequence[Key], facts: Row) -> Row:
    """Paint this process's cycles; a row each, as it finishes. The thresholds of all of them."""
    if not mine:
        return facts.get("thresholds", {})
    session = models.open()
    batch = Batch(models.request.batch, session.painter.sampler.family.device)
    begun: dict[Key, OnTheWay] = {}
    if needs_sample(session, records):
        sample, begun = take_sample(session, records, rank, mine, batch)
        session = session.calibrated(sample)
    thresholds = session.thresholds
    if rank == 0 and thresholds != facts.get("thresholds"):
        outputs.save_json(records.folder / "run.json", {**facts, "thresholds": thresholds})
    origin = made_by(session)
    for row in paint(session, records, mine, batch, begun):
        outputs.append_json_line(records.rows_file(rank), {**row, **origin})
        tqdm.write(cycle_line(row))
    return thresholds


def needs_sample(session: Session, records: Records) -> bool:
    """Whether an evaluation must find its own thresholds, and has the pictures for it."""
    request, settings = session.request, session.painter.settings
    given = request.limits or request.calibration
    by_hand = None not in (request.settings.accept, request.settings.early_accept)
    enough = len(records.keys) >= calibration.FEWEST
    return settings.annealed and enough and not given and not by_hand


def paint_singles(models: Models, alone: Sequence[Single]) -> None:
    """Paint the pictures of single subjects that are not there yet.

    Where the model can not be had any more, an old evaluation is judged without them.
    """
    missing = [single for single in alone if not cycles.is_sound(single.file)]
    if not missing:
        return
    try:
        session = models.open()
    except TemperingError as error:
        say(f"owlv2 is not calibrated on pictures of single subjects: {error}")
        return
    for single in tqdm(missing, "single subjects", unit="picture", disable=None):
        outputs.make_folder(single.file.parent)
        outputs.save_image(single.file, plain(session, single.prompt.text, single.seed))


def judge_all(
    models: Models,
    records: Records,
    rank: int,
    names: Sequence[str],
    begun: Begun,
    seen: Sequence[Key],
    alone: Sequence[Single],
) -> None:
    """Let every judge in turn see what it has not seen of this process's pictures."""
    for name in names:
        noted = begun.noted[JUDGES.index(name)]
        work = [key for key in seen if key not in noted]
        singles = [
            single
            for single in (alone if name == "owlv2" else [])
            if single.key not in noted and single.file.is_file()
        ]
        if work or singles:
            judge = load_judge(
                name,
                records.prompts,
                device=models.device or models.request.models.device,
                offline=models.request.models.offline,
            )
            judging.judge_all(judge, records, rank, work, singles)
            del judge
            models.close()


# --- The end.


def conclude(records: Records, names: Sequence[str], singles: int, title: str, facts: Row) -> None:
    """The summary, where no other process still has cycles to paint or to judge.

    `singles` is how many pictures of single subjects other processes, too, will have noted then.
    """
    rows = dict(records.rows())
    for row in rows.values():
        check_one_model(records.folder, origin_of(row)[:2], (facts["model"], facts["dtype"]))
    painted = [key for key in records.keys if key in rows and records.has_files(key)]
    if len(painted) == len(records.keys):
        judged = judging.verdicts(records)
        calibrated = judged.calibration.pictures if judged.calibration else 0
        if set(names) <= judged.said.keys() and calibrated >= singles:
            summarise(records, rows, judged, title, facts)
            return
    say(
        f"{count(painted, records)} are finished, other processes paint or judge the rest; if one "
        f"of them is gone, go on with: {command('--resume', records.folder)}"
    )


@contextmanager
def last_words(records: Records) -> Iterator[None]:
    """Whatever ends the run early: its last words say what is kept, and how to go on."""
    try:
        yield
    except BaseException:
        kept = count({key for key, _ in records.rows()}, records)
        say(f"kept {kept}; go on with: {command('--resume', records.folder)}")
        raise


def count(done: Container[Key], records: Records) -> str:
    return f"{sum(key in done for key in records.keys)} of {len(records.keys)} cycles"


def command(flag: str, folder: Path) -> str:
    """A command line that can be pasted into the shell of this system."""
    words = ["python", "init.py", flag, str(folder)]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def cycle_line(row: Row) -> str:
    """One cycle for the terminal."""
    parts = [f"{name} {metrics(row[name])}" for name in PICTURES]
    prompt = f"{row['text']}  " if "text" in row else ""
    return f"{prompt}cycle {row['cycle']}  seed {row['seed']}  {'  |  '.join(parts)}"
