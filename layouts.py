"""Where subjects are to be, as a user says it: boxes in fractions, or a map of labels.

Light to import: what is wrong with a layout is told before any model is loaded.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

from errors import InputError, one_line

LAYOUTS = ("auto", "joint", "regions")
LARGEST = 4096  # pixels of a side of a map of labels


class Box(NamedTuple):
    """A part of the picture, in fractions of its width and height, 0..1."""

    left: float
    top: float
    right: float
    bottom: float


def read_box(text: str) -> Box:
    """A box from LEFT,TOP,RIGHT,BOTTOM. Raises InputError."""
    try:
        box = Box(*map(float, text.split(",")))
    except (TypeError, ValueError):
        box = Box(math.nan, 0, 0, 0)
    if not (0 <= box.left < box.right <= 1 and 0 <= box.top < box.bottom <= 1):
        raise InputError(
            "a region must be LEFT,TOP,RIGHT,BOTTOM in fractions of the picture, 0 <= LEFT < RIGHT "
            f"<= 1 and 0 <= TOP < BOTTOM <= 1, got {text!r}"
        )
    return box


def is_map(texts: tuple[str, ...]) -> bool:
    """Whether regions are told by a picture's name, and not by boxes."""
    return len(texts) == 1 and Path(texts[0]).suffix.lower() == ".png"


def read_labels(file: Path, count: int) -> list[list[int]]:
    """The rows of a map of labels: a grey or palette PNG, 0 for no subject, i for the i-th.

    Raises InputError.
    """
    from PIL import Image

    try:
        with Image.open(file, formats=["PNG"]) as image:
            if image.mode not in ("1", "L", "P"):
                raise ValueError(f"its pixels are {image.mode}")
            if max(image.size) > LARGEST:
                raise ValueError(f"it has {image.width}x{image.height} pixels")
            width, values = image.width, list(image.getdata())
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(
            f"regions must be boxes or a grey or palette PNG of at most {LARGEST} pixels a side, "
            f"got {file} ({one_line(error)})"
        ) from error
    missing = sorted(set(range(1, count + 1)) - set(values))
    if missing or max(values) > count:
        raise InputError(
            f"a map of labels must have the values 1 to {count}, one a prompt, and 0 where none is "
            f"to be; {file} has {', '.join(map(str, sorted(set(values))[:12]))}"
        )
    return [values[i : i + width] for i in range(0, len(values), width)]
