"""An evaluation on disk: which cycles are finished, who judged them, which run may go on there.

A cycle is one prompt of the set and one seed: a plain and a tempered picture. Several processes
paint in one folder. Each appends its rows to a file of its own (`cycles.jsonl`, `cycles-1.jsonl`,
...), what judges note likewise (`notes-owlv2.jsonl`, ...), and holds a lock beside them for as long
as it lives: a kill ends it, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from PIL import Image

import calibration
import outputs
from budget import Stop
from errors import InputError, ResourceError, one_line
from prompts import Prompt

Row = dict[str, Any]
Key = tuple[int, int]  # of a cycle: its prompt's number in the set, from 1, and its seed
PICTURES = ("plain", "tempered")  # of a cycle, and where their figures stand in its row
FIGURES = ("ppv", "npv", "js")
OTHER_CALLS = ("plain_calls", "tempered_calls")  # which not all rows tell of
MOST = 2**53  # no number of a row is as large: float64 holds smaller ones exactly
PNG_END = b"\0\0\0\0IEND\xae\x42\x60\x82"  # the last chunk, whose frame Pillow does not look at
SAMPLE = 128  # of the plain pictures, whose energies tell what the budget pays for
TAKEN = "another run paints cycles in this folder: wait for its end, or end it first"


@dataclass(frozen=True)
class Records:
    """The cycles of an evaluation: its prompts times its seeds, in a folder."""

    folder: Path
    prompts: Sequence[Prompt]
    seeds: range

    @cached_property
    def keys(self) -> list[Key]:
        """All cycles, prompt by prompt."""
        return [(n, seed) for n in range(1, len(self.prompts) + 1) for seed in self.seeds]

    def prompt(self, key: Key) -> Prompt:
        return self.prompts[key[0] - 1]

    def picture_file(self, key: Key, name: str) -> Path:
        """Where a picture of a cycle is: each of several prompts has a folder of its own."""
        number, seed = key
        return self.folder / self._places[number - 1] / f"{seed}-{name}.png"

    @cached_property
    def _places(self) -> list[str]:
        if len(self.prompts) == 1:
            return [""]
        width = len(str(len(self.prompts)))
        return [
            f"{number:0{width}}-{outputs.slug(prompt.text)}"
            for number, prompt in enumerate(self.prompts, start=1)
        ]

    def rows_file(self, rank: int) -> Path:
        """Where the process of this rank keeps the rows of its cycles."""
        return self.folder / f"cycles{suffix(rank)}.jsonl"

    def rows(self) -> Iterator[tuple[Key, Row]]:
        """All whole rows of this evaluation's cycles, in no order; of a cycle the last counts."""
        mine = set(self.keys)
        return ((key, row) for key, row in self.all_rows() if key in mine)

    def all_rows(self) -> Iterator[tuple[Key, Row]]:
        """The same with those of other seeds and prompts."""
        for file in _files(self.folder, "cycles"):
            for row in outputs.each_json_line(file):
                if is_whole(row):
                    yield key_of(row), row

    def is_painted(self, key: Key) -> bool:
        """Whether both pictures of a cycle are there and sound."""
        return all(is_sound(self.picture_file(key, name)) for name in PICTURES)

    def has_files(self, key: Key) -> bool:
        """Whether both pictures are there; whoever painted them knows whether they are sound."""
        return all(self.picture_file(key, name).is_file() for name in PICTURES)

    @property
    def sample(self) -> list[Key]:
        """The cycles whose plain pictures tell which energies there are, from all over the plan."""
        count = min(len(self.keys), SAMPLE)
        return [self.keys[i * len(self.keys) // count] for i in range(count)]

    def energies_file(self, rank: int) -> Path:
        """Where the process of this rank keeps the energies of the sample, and how it walks."""
        return self.folder / f"energies{suffix(rank)}.jsonl"

    def energies(self) -> dict[Key, tuple[Stop, ...]]:
        """The plain pictures of the sample at each look; of one that two have seen, the first."""
        found: dict[Key, tuple[Stop, ...]] = {}
        for row in self._energies_rows():
            with suppress(InputError, KeyError, TypeError):
                found.setdefault(key_of(row), tuple(map(calibration.stop, row["looks"])))
        return found

    def stops(self) -> dict[Key, tuple[Stop, ...]]:
        """Where pictures of the sample stood after round 1, 2, ..., as far as that is known."""
        found: dict[Key, dict[int, Stop]] = {}
        for row in self._energies_rows():
            with suppress(InputError, KeyError, TypeError):
                rounds = found.setdefault(key_of(row), {})
                rounds.setdefault(row["round"], calibration.stop(row["stop"]))
        return {key: tuple(in_order(rounds)) for key, rounds in found.items()}

    def _energies_rows(self) -> Iterator[Row]:
        for file in _files(self.folder, "energies"):
            yield from outputs.each_json_line(file)

    def notes_file(self, judge: str, rank: int) -> Path:
        """Where the process of this rank keeps what a judge notes."""
        return self.folder / f"notes-{judge}{suffix(rank)}.jsonl"

    def notes(self, judge: str) -> Iterator[Row]:
        """What a judge noted of cycles (with their keys) and of single subjects."""
        for file in _files(self.folder, f"notes-{judge}"):
            yield from outputs.each_json_line(file)


def in_order(rounds: Mapping[int, Stop]) -> Iterator[Stop]:
    """Round 1, 2, ... up to the first that is missing."""
    return (rounds[number] for number in takewhile(rounds.__contains__, count(1)))


def suffix(rank: int) -> str:
    return f"-{rank}" if rank else ""


def _files(folder: Path, stem: str) -> Iterable[Path]:
    """The files of all ranks."""
    found = [*folder.glob(f"{stem}.jsonl"), *folder.glob(f"{stem}-[0-9]*.jsonl")]
    return sorted(path for path in found if path.is_file())


def key_of(row: Row) -> Key:
    """Evaluations of one prompt have not always told its number."""
    return row.get("prompt", 1), row["seed"]


def is_whole(row: Row) -> bool:
    """Whether a row holds all that a summary takes from it."""
    try:
        figures = [row[name][figure] for name in PICTURES for figure in FIGURES]
        calls = [row["unet_calls"], *(row[n] for n in OTHER_CALLS if n in row)]
        origin = [row["model"], row["dtype"], row.get("flags", "")]
        return (
            all(-MOST < number < MOST for number in (*figures, row.get("seconds", 0)))
            and all(type(number) is int for number in key_of(row))
            and all(type(number) in (int, float) and 0 <= number < MOST for number in calls)
            and all(isinstance(text, str) for text in origin)
        )
    except (KeyError, TypeError):
        return False


def is_sound(file: Path) -> bool:
    """Whether a PNG is complete and agrees with its checksums; a pipe is not even opened."""
    try:
        data = file.read_bytes() if file.is_file() else b""
        with Image.open(BytesIO(data), formats=["PNG"]) as picture:
            picture.verify()
    except Exception:  # Pillow's own have no family: OSError, SyntaxError, a bomb's
        return False
    return data.endswith(PNG_END)


def picture(file: Path) -> Image.Image:
    """A picture from disk, in RGB. Raises ResourceError, which says what helps."""
    try:
        with Image.open(file, formats=["PNG"]) as opened:
            return opened.convert("RGB")
    except Exception as error:  # as above
        text = f"can not read {file} ({one_line(error)}): delete it, and --resume paints it again"
        raise ResourceError(text) from error


def prepare(folder: Path) -> None:
    """Make `folder` ready for a run that goes on there: what killed runs have left is removed.

    Raises ResourceError where another run still paints in it, and where it can not be read.
    """
    for lock in folder.glob(_lock_file(folder, "*").name):
        with outputs.locked(lock, TAKEN):
            pass
    outputs.remove_leftovers(folder)


@contextmanager
def claimed(folder: Path, rank: int) -> Iterator[None]:
    """Keep other runs from painting this process's cycles too. Raises ResourceError if one does."""
    with outputs.locked(_lock_file(folder, rank), TAKEN):
        yield


def _lock_file(folder: Path, rank: int | str) -> Path:
    return folder / f".cycles-{rank}.lock"
