"""The one place that writes to disk: run folders, file names, PNG text, JSON, CSV, contact sheets.

A whole file is written under a temporary name beside its own and renamed, so that a reader, or a
run that is killed, never meets half of one. Whatever the disk refuses becomes one line of
errors.ResourceError. Pillow, numpy and matplotlib are imported where they are needed: main.py asks
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
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from io import BytesIO, StringIO
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errors import InputError, ResourceError

if TYPE_CHECKING:
    from datetime import datetime

    import numpy as np
    from matplotlib.figure import Figure
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont

Colour = tuple[int, int, int]

# Okabe and Ito, "Color Universal Design" (2008), without black; ordered so that neighbours in the
# list differ in lightness as well as in hue.
OKABE_ITO: tuple[Colour, ...] = (
    (230, 159, 0),  # orange
    (0, 114, 178),  # blue
    (0, 158, 115),  # bluish green
    (204, 121, 167),  # reddish purple
    (86, 180, 233),  # sky blue
    (213, 94, 0),  # vermillion
    (240, 228, 66),  # yellow
)
WINDOWS_RESERVED = re.compile(r"con|prn|aux|nul|(com|lpt)[0-9]")

INK, FAINT, PAPER = (28, 28, 30), (205, 205, 208), (255, 255, 255)
SMALLEST, LARGEST = 256, 384  # pixels of a picture's longer side on a sheet
COLUMNS = 4
MARGIN, GAP, PAD = 28, 24, 10  # pixels: round the sheet, between panels, between picture and text
HAIRLINE = 1
OVERHANG = 3  # pixels that a glyph may reach beyond its advance, such as the hook of a j
LARGEST_JSON = 10_000_000  # bytes; a run.json has some thousand
NARROWEST = 2 * SMALLEST + GAP  # so that one small picture still leaves room for its title


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
        info.add_text("parameters", _encodable(parameters))
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
    """Remove the temporary files that a killed run has left in `folder`."""
    for path in folder.glob(".*.tmp"):
        if re.fullmatch(r"\.[0-9a-f]{16}\.tmp", path.name):
            remove = path.rmdir if path.is_dir() else path.unlink
            with suppress(OSError):
                remove()


def _unfinished(path: Path) -> int | None:
    """Where half a line begins at the end of a JSON-lines file, None where there is none."""
    data = path.read_bytes() if path.is_file() else b""
    last = data[data.rfind(b"\n") + 1 :]
    return len(data) - len(last) if last else None


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of at most LARGEST_JSON bytes.

    Raises InputError, at once, for what is no such file: a pipe or a device is not even opened.
    """
    try:
        if not path.is_file():
            raise ValueError("is not a file" if path.exists() else "does not exist")
        with path.open("rb") as file:
            data = file.read(LARGEST_JSON + 1)
        if len(data) > LARGEST_JSON:
            raise ValueError(f"has more than {LARGEST_JSON:,} bytes")
        value = json.loads(data.decode("utf-8-sig"))  # Notepad begins files with a mark
        if not isinstance(value, dict):
            raise ValueError("holds no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{_line(path)} can not be read as JSON: {_line(error)}") from error
    return value


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON-lines file, oldest first; none where there is no file.

    A last line without its end was cut off by a kill or a full disk: it is skipped, and the next
    `append_json_line` replaces it. So is a line that is no object. Raises ResourceError.
    """
    with _disk_errors(path, "nothing was changed", "read"):
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    found = []
    for line in lines:
        with suppress(ValueError):
            found.append(json.loads(line.decode()))
    return [value for value in found if isinstance(value, dict)]


@dataclass(frozen=True)
class Panel:
    """One picture of a sheet: its title above it, its figures, one a line, under it."""

    title: str
    image: Image
    lines: tuple[str, ...] = ()


def class_colours(n: int) -> list[Colour]:
    """Return `n` colours, RGB in 0..255: Okabe and Ito's seven, then darker rounds of the same."""
    colours: list[Colour] = []
    for index in range(n):
        darkness, place = divmod(index, len(OKABE_ITO))
        red, green, blue = (round(part * 0.6**darkness) for part in OKABE_ITO[place])
        colours.append((red, green, blue))
    return colours


def class_overlay(image: Image, labels: np.ndarray) -> Image:
    """Return the picture in light grey with every class tinted and outlined in its own colour.

    `labels`: (height, width) of the picture, integers: the class of every pixel, -1 for none; such
    pixels stay grey. Class i has colour i of `class_colours`. Raises ValueError.
    """
    import numpy as np
    from PIL.Image import fromarray
    from PIL.ImageFilter import MaxFilter, MinFilter

    if labels.shape != (image.height, image.width):
        raise ValueError(
            f"labels must have the picture's shape {(image.height, image.width)}: {labels.shape}"
        )
    grey = np.asarray(image.convert("L"), dtype=np.float64)[..., None]  # (H, W, 1)
    light = 120 + grey * (135 / 255)
    # One entry more than there are classes: label -1 picks the last, whose weight below is 0.
    colours = np.array([*class_colours(int(labels.max()) + 1), PAPER], dtype=np.float64)
    near = 2 * max(1, round(max(image.size) / SMALLEST)) + 1  # seen when a sheet reduces it, too
    numbers = fromarray(labels.astype(np.int32))
    largest, least = (np.asarray(numbers.filter(kind(near))) for kind in (MaxFilter, MinFilter))
    weight = np.where(largest != least, 1.0, 0.5) * (labels >= 0)
    blended = light + weight[..., None] * (colours[labels] - light)
    return fromarray(blended.round().astype(np.uint8))


def sheet(panels: Sequence[Panel], title: str, legend: Sequence[tuple[str, Colour]] = ()) -> Image:
    """Return one RGB picture that shows all panels side by side, in rows of at most 4.

    A small picture is enlarged by a whole factor to 256 pixels or more, a large one is reduced to
    384 on its longer side. `legend`: names and colours, under the title. Texts too long for their
    place are wrapped and end in an ellipsis. Raises ValueError without panels.
    """
    if not panels:
        raise ValueError("a sheet must have at least one panel: 0")
    rows = math.ceil(len(panels) / COLUMNS)
    columns = math.ceil(len(panels) / rows)  # 5 panels: 3 and 2 rather than 4 and 1
    shown = [(panel, _display(panel.image)) for panel in panels]
    cell = max(SMALLEST + 2 * HAIRLINE, *(picture.width for _, picture in shown))
    width = max(columns * cell + (columns - 1) * GAP, NARROWEST)
    blocks = [_text([title], _font(24, bold=True), width, wrap=3)]
    blocks += [_legend(legend, width)] if legend else []
    blocks += [_row(shown[at : at + columns], cell) for at in range(0, len(shown), columns)]
    return _stack(blocks, width)


# How a sheet is laid out: every part is a picture on white, and the sheet is their stack.


def _display(image: Image) -> Image:
    """Return the picture at its size on a sheet, in a hairline: a white one would have no edge."""
    from PIL import ImageOps
    from PIL.Image import Resampling

    side = max(image.size)
    scale: float = math.ceil(SMALLEST / side) if side < SMALLEST else min(1, LARGEST / side)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    method = Resampling.NEAREST if scale >= 1 else Resampling.LANCZOS
    return ImageOps.expand(image.convert("RGB").resize(size, method), HAIRLINE, FAINT)


def _row(shown: Sequence[tuple[Panel, Image]], cell: int) -> Image:
    heads = [_text([panel.title], _font(16, bold=True), cell, wrap=2) for panel, _ in shown]
    feet = [_text(panel.lines, _font(15), cell, wrap=2) for panel, _ in shown]
    top = max(head.height for head in heads) + PAD
    bottom = top + max(picture.height for _, picture in shown) + PAD
    row = _blank(len(shown) * (cell + GAP) - GAP, bottom + max(foot.height for foot in feet))
    for index, (head, (_, picture), foot) in enumerate(zip(heads, shown, feet, strict=True)):
        left = index * (cell + GAP)
        row.paste(head, (left, top - PAD - head.height))
        row.paste(picture, (left, top))
        row.paste(foot, (left, bottom))
    return row


def _legend(legend: Sequence[tuple[str, Colour]], width: int) -> Image:
    swatch, font = 16, _font(15)
    indent = swatch + PAD
    names = [_text([name], font, width - indent, wrap=2) for name, _ in legend]
    places, left, top, line = [], 0, 0, 0  # line: the height of the line being filled
    for name in names:
        if left and left + indent + name.width > width:
            left, top, line = 0, top + line + PAD, 0
        places.append((left, top))
        left, line = left + indent + name.width + GAP, max(line, name.height, swatch)
    block = _blank(width, top + line)
    for (left, top), name, (_, colour) in zip(places, names, legend, strict=True):
        block.paste(colour, (left, top + 3, left + swatch, top + 3 + swatch))
        block.paste(name, (left + indent, top))
    return block


def _stack(blocks: Sequence[Image], width: int) -> Image:
    height = sum(block.height for block in blocks) + GAP * (len(blocks) - 1)
    page = _blank(width + 2 * MARGIN, height + 2 * MARGIN)
    top = MARGIN
    for block in blocks:
        page.paste(block, (MARGIN, top))
        top += block.height + GAP
    return page


def _text(texts: Sequence[str], font: FreeTypeFont, width: int, wrap: int) -> Image:
    """Return the texts as a picture, each on at most `wrap` lines of at most `width` pixels."""
    from PIL import ImageDraw

    lines = [line for text in texts for line in _wrapped(text, font, width - 2 * OVERHANG, wrap)]
    boxes = [font.getbbox(line, anchor="ls") for line in lines]
    starts = [max(0, -math.floor(box[0])) for box in boxes]
    ends = [start + math.ceil(box[2]) for start, box in zip(starts, boxes, strict=True)]
    pitch, baseline = round(font.size * 1.4), round(font.size * 1.1)
    block = _blank(max([1, *ends]), pitch * len(lines))
    draw = ImageDraw.Draw(block)
    for index, (start, line) in enumerate(zip(starts, lines, strict=True)):
        draw.text((start, pitch * index + baseline), line, fill=INK, font=font, anchor="ls")
    return block


def _wrapped(text: str, font: FreeTypeFont, width: int, limit: int) -> list[str]:
    # NFC: the font has letters with their accents on, and draws loose accents badly.
    words = unicodedata.normalize("NFC", _encodable(text)).split()
    lines = [""]
    for word in words:
        rest = "".join(filter(str.isprintable, word))
        while rest and len(lines) <= limit:
            joined = f"{lines[-1]} {rest}".strip()
            if font.getlength(joined) <= width:
                lines[-1], rest = joined, ""
            elif lines[-1]:
                lines.append("")
            else:  # a word wider than the line
                fits = next(n for n in count(1) if font.getlength(rest[: n + 1]) > width)
                lines[-1], rest = rest[:fits], rest[fits:]
    if len(lines) <= limit:
        return lines
    last = lines[limit - 1]
    while last and font.getlength(last + "…") > width:
        last = last[:-1]
    return [*lines[: limit - 1], last.rstrip(" ,.;:") + "…"]


@cache
def _font(size: int, bold: bool = False) -> FreeTypeFont:
    import matplotlib
    from PIL import ImageFont

    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")  # the same font on every machine
    return ImageFont.truetype(str(folder / f"DejaVuSans{'-Bold' if bold else ''}.ttf"), size)


def _blank(width: int, height: int) -> Image:
    from PIL.Image import new

    return new("RGB", (width, height), PAPER)


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


def _encodable(text: str) -> str:
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
