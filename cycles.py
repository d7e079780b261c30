"""The cycles of an evaluation on disk: which are finished, and which run may paint the others.

Several processes paint in one folder. Each appends its rows to a file of its own (`cycles.jsonl`,
`cycles-1.jsonl`, ...) and holds a lock beside it for as long as it lives: a kill ends it, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

import outputs

Row = dict[str, Any]
PICTURES = ("plain", "tempered")  # of a cycle, and where their figures stand in its row
FIGURES = ("ppv", "npv", "js")
PNG_END = b"IEND\xae\x42\x60\x82"  # the last chunk, of which Pillow does not ask for the checksum
TAKEN = "another run paints cycles in this folder: wait for its end, or end it first"


def rows_file(folder: Path, rank: int) -> Path:
    """Where the process of this rank keeps the rows of its cycles."""
    return folder / f"cycles{f'-{rank}' if rank else ''}.jsonl"


def picture_file(folder: Path, seed: int, name: str) -> Path:
    """Where the plain or the tempered picture of a cycle is."""
    return folder / f"{seed}-{name}.png"


def finished(folder: Path) -> dict[int, Row]:
    """The row of every finished cycle by its seed: a row and both its pictures, all of them whole.

    What is lost or damaged is no finished cycle, so it is painted again; of several rows of a seed
    the last whole one counts.
    """
    files = sorted(path for path in folder.glob("cycles*.jsonl") if path.is_file())
    rows = [row for file in files for row in outputs.read_json_lines(file) if is_whole(row)]
    return {row["seed"]: row for row in rows if has_pictures(folder, row["seed"])}


def is_whole(row: Row) -> bool:
    """Whether a row holds all that a summary takes from it."""
    try:
        figures = [row[name][figure] for name in PICTURES for figure in FIGURES]
        finite = all(math.isfinite(number) for number in (*figures, row["unet_calls"]))
        return finite and type(row["seed"]) is int and {"model", "dtype"} <= row.keys()
    except (KeyError, TypeError, OverflowError):
        return False


def has_pictures(folder: Path, seed: int) -> bool:
    """Whether both pictures of a cycle are there and sound."""
    try:
        files = [picture_file(folder, seed, name) for name in PICTURES]
        return all(file.is_file() and is_sound(file, file.stat().st_mtime_ns) for file in files)
    except OSError:
        return False


@cache
def is_sound(file: Path, modified: int) -> bool:
    """Whether a PNG, as of its last change, is complete and agrees with its checksums."""
    try:
        data = file.read_bytes()
        with Image.open(BytesIO(data), formats=["PNG"]) as picture:
            picture.verify()
    except Exception:  # Pillow's own have no family: OSError, SyntaxError, a bomb's
        return False
    return data.endswith(PNG_END)


def prepare(folder: Path) -> None:
    """Make `folder` ready for a run that goes on there: what killed runs have left is removed.

    Raises ResourceError where another run still paints in it.
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
