"""The one place that writes to disk: run folders, file names, PNG text, JSON, CSV.

A whole file is written under a temporary name beside its own and renamed, so that a reader, or a
run that is killed, never meets half of one. Whatever the disk refuses becomes one line of
errors.ResourceError. Pillow and matplotlib are imported where they are needed: main.py asks
`check_writable` before it imports anything heavy.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from io import BytesIO, StringIO
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errors import InputError, ResourceError

if TYPE_CHECKING:
    from datetime import datetime

    from matplotlib.figure import Figure
    from PIL.Image import Image

WINDOWS_RESERVED = re.compile(r"con|prn|aux|nul|(com|lpt)[0-9]")

BLOCK = 65_536  # bytes that are read at once
LARGEST_JSON = 10_000_000  # bytes; a run.json has some thousand


def check_writable(folder: Path) -> None:
    """Raise InputError where run folders could not be made in `folder`, which need not exist yet.

    Tries it with an empty folder in the nearest existing parent, gone again on return: permission
    bits alone know neither read-only mounts nor Windows.
    """
    absolute = folder.absolute()
    ancestors = (absolute, *absolute.parents)
    # Even the root may be missing: a drive letter without a drive.
    nearest = next((path for path in ancestors if os.path.lexists(path)), absolute.parents[-1])
    if not nearest.is_dir():
        raise InputError(
            f"the output folder must be a folder: {_line(folder)} ({_line(nearest)} is not one)"
        )
    probe = nearest / _temporary_name()
    try:
        with suppress(FileNotFoundError):
            os.lstat(absolute)  # meets a name that is too long, which is not merely missing
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        reason = _line(error.strerror or error)
        raise InputError(
            f"the output folder must be writable: {_line(folder)} ({reason})"
        ) from error


def slug(text: str, limit: int = 40) -> str:
    """Return a file-name part for any text: 1 to `limit` characters of a-z, 0-9 and inner dashes.

    Accents are folded (á -> a), everything else becomes a dash. What is empty then, or a device
    name on Windows, is called "picture".
    """
    folded = unicodedata.normalize("NFKD", text).casefold()
    letters = "".join(char for char in folded if not unicodedata.combining(char))
    name = re.sub(r"[^a-z0-9]+", "-", letters).strip("-")[:limit].rstrip("-")
    return "picture"[:limit] if not name or WINDOWS_RESERVED.fullmatch(name) else name


def new_run_folder(parent: Path, text: str, now: datetime) -> Path:
    """Make and return `<parent>/<YYYYMMDD>-<HHMMSS>-<slug of text>`, with -2, -3 ... if taken.

    Processes that ask at the same time get different folders: mkdir decides. Raises ResourceError.
    """
    name = f"{now:%Y%m%d-%H%M%S}-{slug(text)}"
    with _disk_errors(parent / name, "nothing was written"):
        parent.mkdir(parents=True, exist_ok=True)
        folder, number = parent / name, 1
        while True:
            with suppress(FileExistsError):
                folder.mkdir()
                return folder
            number += 1
            folder = parent / f"{name}-{number}"


def make_folder(folder: Path) -> None:
    """Make a folder in an existing one, where it is not there yet. Raises ResourceError."""
    with _disk_errors(folder, "the files before it are kept"):
        folder.mkdir(exist_ok=True)


def parameters_text(
    *,
    prompt: str,
    negative_prompt: str | None,
    steps: int,
    sampler: str,
    guidance_scale: float,
    seed: int,
    width: int,
    height: int,
    model: str,
    extra: Mapping[str, object],
) -> str:
    """Return what AUTOMATIC1111 keeps in a PNG's `parameters`, so that its readers understand it.

    Prompt, then `Negative prompt: ...` where there is one, then one line of `Key: value` pairs:
    the fixed ones and, after them, those of `extra` that are not None.
    """
    fixed = {
        "Steps": steps,
        "Sampler": sampler,
        "CFG scale": str(guidance_scale).removesuffix(".0"),
        "Seed": seed,
        "Size": f"{width}x{height}",
        "Model": model,
    }
    pairs = chain(fixed.items(), extra.items())
    settings = ", ".join(f"{key}: {_quoted(value)}" for key, value in pairs if value is not None)
    negative = f"Negative prompt: {negative_prompt}\n" if (negative_prompt or "").strip() else ""
    return f"{prompt}\n{negative}{settings}".strip()


def save_image(path: Path, image: Image, parameters: str | None = None) -> None:
    """Write a PNG; `parameters` becomes its text chunk of that name (tEXt, or iTXt beyond Latin-1).

    Same image and text, same bytes. Raises ResourceError.
    """
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    if parameters is not None:
        info.add_text("parameters", encodable(parameters))
    encoded = BytesIO()
    image.save(encoded, format="PNG", pnginfo=info)
    _write(path, encoded.getvalue())


def save_figure(path: Path, figure: Figure) -> None:
    """Write a matplotlib figure as a PNG of 150 dpi that names no program version.

    Raises ResourceError.
    """
    encoded = BytesIO()
    figure.savefig(encoded, format="png", dpi=150, metadata={"Software": None})
    _write(path, encoded.getvalue())


def save_text(path: Path, text: str) -> None:
    """Write UTF-8 text. Raises ResourceError."""
    _write(path, _utf8(text))


def save_json(path: Path, value: object) -> None:
    """Write indented UTF-8 JSON with its keys in the order given; NaN and infinities become null.

    Takes dataclasses, paths, dates, numpy scalars and arrays too; another type is a TypeError.
    Raises ResourceError.
    """
    _write(path, _utf8(_json(_plain(value), indent=2) + "\n"))


def save_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write UTF-8 CSV; the columns are the rows' keys in order of first appearance.

    What a row lacks, None and NaN are empty cells; lists and mappings are JSON. Raises
    ResourceError.
    """
    import csv

    text = StringIO(newline="")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = csv.DictWriter(text, columns, lineterminator="\n")
    if columns:
        table.writeheader()
    table.writerows({key: _cell(value) for key, value in row.items()} for row in rows)
    _write(path, _utf8(text.getvalue()))


def append_json_line(path: Path, value: object) -> None:
    """Append one line of JSON, converted as by `save_json`; on return it is on the disk.

    Half a line, left by a killed run, is cut off first. Raises ResourceError.
    """
    line = _utf8(_json(_plain(value)) + "\n")
    with _disk_errors(path, "the lines before it are kept"):
        if path.is_fifo():  # it would be waited for
            raise OSError(errno.EINVAL, "it is a pipe")
        start = _unfinished(path)
        with path.open("ab") as file:
            if start is not None:
                file.truncate(start)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def locked(path: Path, taken: str) -> Iterator[None]:
    """Hold a lock file while the block runs, or until this process is killed; then it is removed.

    Raises ResourceError, which says `taken`, where another process holds it.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path, timeout=0)
    with _disk_errors(path, "nothing was changed"):
        try:
            lock.acquire()
        except Timeout as error:
            raise ResourceError(f"{taken} ({_line(path)} is locked)") from error
        except (
            NotImplementedError
        ):  # some network file systems have no locks: as if there were none
            pass
    try:
        yield
    finally:
        with suppress(OSError):
            lock.release()
            path.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that killed runs have left in `folder` and in those in it.

    Raises ResourceError where it can not be read.
    """
    with _disk_errors(folder, "nothing was changed", "read"):
        places = [folder, *(path for path in folder.iterdir() if path.is_dir())]
    for path in chain.from_iterable(place.glob(".*.tmp") for place in places):
        if re.fullmatch(r"\.[0-9a-f]{16}\.tmp", path.name):
            remove = path.rmdir if path.is_dir() else path.unlink
            with suppress(OSError):
                remove()


def _unfinished(path: Path) -> int | None:
    """Where half a line begins at the end of a JSON-lines file, None where there is none."""
    if not path.is_file():
        return None
    with path.open("rb") as file:  # from its end: a long run appends often
        start = size = file.seek(0, os.SEEK_END)
        while start:
            start = max(0, start - BLOCK)
            file.seek(start)
            newline = file.read(min(BLOCK, size - start)).rfind(b"\n")
            if newline >= 0:
                start += newline + 1
                break
    return start if start < size else None


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of at most LARGEST_JSON bytes.

    Raises InputError, at once, for what is no such file: a pipe or a device is not even opened. Its
    text gives the reason and leaves it to the caller to name the file.
    """
    try:
        if not path.is_file():
            raise ValueError("it is not a file" if path.exists() else "it does not exist")
        with path.open("rb") as file:
            data = file.read(LARGEST_JSON + 1)
        if len(data) > LARGEST_JSON:
            raise ValueError(f"it has more than {LARGEST_JSON:,} bytes")
        value = json.loads(data.decode("utf-8-sig"))  # Notepad begins files with a mark
        if not isinstance(value, dict):
            raise ValueError("it holds no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"it can not be read as JSON ({_line(reason)})") from error
    return value


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON-lines file, oldest first; none where there is no file.

    A last line without its end was cut off by a kill or a full disk: it is skipped, and the next
    `append_json_line` replaces it. So is a line that is no object. Raises ResourceError.
    """
    return list(each_json_line(path))


def each_json_line(path: Path) -> Iterator[dict[str, Any]]:
    """The same one by one, so that a long file does not have to be in memory."""
    with _disk_errors(path, "nothing was changed", "read"):
        if not path.exists():
            return
        with path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    return
                with suppress(ValueError, RecursionError):
                    value = json.loads(line)
                    if isinstance(value, dict):
                        yield value


# How values become text, and text files.


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r'[,:\n\r"]', text) else text


def _plain(value: object) -> Any:
    """Return what `json` can write, without its NaN and Infinity, which no other reader takes."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "isoformat"):  # dates and times
        return value.isoformat()
    if hasattr(value, "tolist"):  # numpy's scalars and arrays, without an import of numpy
        return _plain(value.tolist())
    raise TypeError(f"must be of a type that JSON can hold: {type(value).__name__}")


def _json(plain: object, indent: int | None = None) -> str:
    return json.dumps(plain, indent=indent, ensure_ascii=False, allow_nan=False)


def _cell(value: object) -> object:
    plain = _plain(value)
    return _json(plain) if isinstance(plain, (list, dict)) else plain


def _utf8(text: str) -> bytes:
    # A path or argument that was not UTF-8 holds lone surrogates; so they are JSON's own escapes.
    return text.encode("utf-8", "backslashreplace")


def encodable(text: str) -> str:
    """The text with a question mark for whatever was not UTF-8 in a path or an argument."""
    return text.encode("utf-8", "replace").decode()


def _write(path: Path, data: bytes) -> None:
    """Write a whole file or leave what was there."""
    kept = "the earlier one is kept" if os.path.lexists(path) else "the files before it are kept"
    temporary = path.with_name(_temporary_name())
    with _disk_errors(path, kept):
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())  # some disks say only now that they are full
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise


@contextmanager
def _disk_errors(path: Path, kept: str, verb: str = "write") -> Iterator[None]:
    """Turn whatever the disk refuses into one line that says what became of the files."""
    try:
        yield
    except OSError as error:
        full = "disk full: " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        reason = "" if full else f" ({_line(error.strerror or error)})"
        raise ResourceError(f"{full}can not {verb} {_line(path)}{reason}; {kept}") from error


def _temporary_name() -> str:
    return f".{os.urandom(8).hex()}.tmp"


def _line(value: object) -> str:
    return str(value).replace("\n", " ")
