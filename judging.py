"""Judging: finished pictures are shown to judges, and what these note is kept on disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

import outputs
from cycles import PICTURES, Key, Records, Row, picture
from errors import InputError, blaming
from hub import POCKET
from judges import (
    FAULTS,
    Calibration,
    Judge,
    Notes,
    Verdict,
    calibrate,
    check_pocket,
    subject_of,
    verdict,
)
from prompts import Prompt
from settings import NOBODY, Request

SINGLES = 48  # pictures of one subject each that OWLv2 is calibrated on
FOLDER = "singles"  # where they are

NoteKey = tuple[int | str, int]  # of a cycle as in Records, of a single subject: its noun, seed


@dataclass(frozen=True)
class Single:
    """A plain picture of one subject alone, which shows what a detector makes of it."""

    noun: str
    seed: int
    file: Path

    @property
    def prompt(self) -> Prompt:
        return Prompt((f"a {self.noun}",), "")

    @property
    def key(self) -> NoteKey:
        return self.noun, self.seed


def check(request: Request) -> None:
    """Raise InputError for what a judge who was asked for can not judge."""
    if "pocket" in (request.judges or ()):
        check_pocket(request.all_prompts, sizes(request))


def chosen(request: Request, model: str) -> list[str]:
    """The judges of an evaluation; by itself the pocket's, where all it shows is the pocket's."""
    if request.judges is not None:
        return [name for name in request.judges if name != NOBODY]
    try:
        check_pocket(request.all_prompts, sizes(request))
    except InputError:
        return []
    return ["pocket"] if model == POCKET else []


def sizes(request: Request) -> tuple[int | None, int | None]:
    return request.settings.height, request.settings.width


def singles(records: Records, judges: Sequence[str]) -> list[Single]:
    """What is to be painted so that OWLv2's threshold is that of this model's pictures.

    Every noun of the set in turn, each time with another seed; nothing for a small evaluation,
    which it would cost too much.
    """
    if "owlv2" not in judges or len(records.keys) < SINGLES:
        return []
    subjects = (subject for prompt in records.prompts for subject in prompt.subjects)
    nouns = list(dict.fromkeys(subject_of(subject).noun for subject in subjects))
    every = max(1, len(nouns) // SINGLES)  # of very many nouns some, from all over the set
    taken = nouns[::every]
    found = []
    for i in range(SINGLES):
        noun, seed = taken[i % len(taken)], records.seeds[0] + i // len(taken)
        name = f"{i + 1:02}-{outputs.slug(noun)}-{seed}.png"
        found.append(Single(noun, seed, records.folder / FOLDER / name))
    return found


def judge_all(
    judge: Judge, records: Records, rank: int, work: Sequence[Key], alone: Sequence[Single]
) -> None:
    """Show a judge the pictures of cycles and of single subjects; each note is on disk at once."""
    file = records.notes_file(judge.name, rank)
    total = len(work) + len(alone)
    for row in tqdm(
        _rows(judge, records, work, alone), judge.name, total, unit="cycle", disable=None
    ):
        outputs.append_json_line(file, row)


def _rows(
    judge: Judge, records: Records, work: Sequence[Key], alone: Sequence[Single]
) -> Iterator[Row]:
    for single in alone:
        notes = _seen(judge, single.file, single.prompt)
        yield {"single": single.noun, "seed": single.seed, "notes": notes}
    for key in work:
        prompt = records.prompt(key)
        seen = {name: _seen(judge, records.picture_file(key, name), prompt) for name in PICTURES}
        yield {"prompt": key[0], "seed": key[1], **seen}


def _seen(judge: Judge, file: Path, prompt: Prompt) -> Notes:
    image = picture(file)
    with blaming(f"the judge {judge.name}"):
        return judge.see(image, prompt)


def noted(records: Records, judge: str) -> dict[NoteKey, Row]:
    """What a judge noted of this evaluation's cycles and of single subjects; the last counts."""
    found: dict[NoteKey, Row] = {}
    for row in records.notes(judge):
        of_single = "single" in row
        name, seed = row["single"] if of_single else row.get("prompt", 1), row.get("seed")
        told = row.keys() >= ({"notes"} if of_single else set(PICTURES))
        if told and isinstance(name, (int, str)) and isinstance(seed, int):
            found[name, seed] = row
    return found


@dataclass(frozen=True)
class Judged:
    """What the judges say of all pictures, and how OWLv2 was calibrated for it."""

    said: dict[str, dict[Key, tuple[Verdict, Verdict]]]  # by judge and cycle
    calibration: Calibration | None


def verdicts(records: Records) -> Judged:
    """The verdicts of every judge whose notes are on disk; of judges that saw all cycles.

    Raises InputError for notes from which no verdict can be read.
    """
    said: dict[str, dict[Key, tuple[Verdict, Verdict]]] = {}
    calibration = None
    for name in FAULTS:
        notes = noted(records, name)
        if not all(key in notes for key in records.keys):
            continue
        try:
            if name == "owlv2":
                calibration = calibrate([row["notes"] for row in notes.values() if "single" in row])
            threshold = calibration.threshold if calibration else 0
            said[name] = {
                key: _both(name, records, key, notes[key], threshold) for key in records.keys
            }
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise InputError(
                f"what {name} has noted can not be read: delete {records.notes_file(name, 0)} "
                "and the like, and let it judge again"
            ) from error
    return Judged(said, calibration)


def _both(
    name: str, records: Records, key: Key, row: Row, threshold: float
) -> tuple[Verdict, Verdict]:
    prompt = records.prompt(key)
    plain, tempered = (verdict(name, row[side], prompt, threshold) for side in PICTURES)
    return plain, tempered
