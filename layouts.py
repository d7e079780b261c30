"""Where subjects are to be, as a user says it: boxes in fractions, or a map of labels.

Light to import: what is wrong with a layout is told before any model is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

from errors import InputError, one_line

LAYOUTS = ("auto", "joint", "regions")
LARGEST = 4096  # pixels of a side of a map of labels


class Box(NamedTuple):
    """A part of the picture, in fractions of its width and height, 0..1."""

    left: float
    top: float
    right: float
    bottom: float

    def covers(self, other: Box) -> bool:
        """Whether nothing of `other` is outside of it."""
        near = self.left <= other.left and self.top <= other.top
        return near and other.right <= self.right and other.bottom <= self.bottom


@dataclass(frozen=True)
class Labels:
    """A map of labels: which subject each of its pixels belongs to, from 1; 0 to none."""

    rows: tuple[tuple[int, ...], ...]

    @property
    def values(self) -> set[int]:
        return {value for row in self.rows for value in row}


def check(regions: tuple[Box, ...] | Labels | None, count: int) -> None:
    """Raise InputError for regions that are not as many as `count` subjects, or lie hidden."""
    if isinstance(regions, Labels):
        if regions.values | {0} != set(range(count + 1)):
            raise InputError(
                f"a map of regions must have the values 1 to {count}, one a prompt, and 0 where "
                f"none is to be, got {', '.join(map(str, sorted(regions.values)[:12]))}"
            )
    elif regions is not None:
        if len(regions) != count:
            raise InputError(f"regions must be as many as prompts, {count}, got {len(regions)}")
        for number, box in enumerate(regions[:-1]):
            if any(other.covers(box) for other in regions[number + 1 :]):
                text = ",".join(f"{side:g}" for side in box)
                raise InputError(f"a region must not be hidden by later ones, got {text}")


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


def told(regions: tuple[Box, ...] | Labels | None) -> list[str] | None:
    """Regions in a few words that are the same for the same regions."""
    if isinstance(regions, Labels):
        return [f"map {crc32(repr(regions.rows).encode()):08x}"]
    if regions is None:
        return None
    return [",".join(f"{side:g}" for side in box) for box in regions]


def read(texts: Sequence[str]) -> tuple[Box, ...] | Labels:
    """Regions as they are typed: a box each, or the name of one map. Raises InputError."""
    return (
        read_labels(Path(texts[0]).expanduser()) if is_map(texts) else tuple(map(read_box, texts))
    )


def is_map(texts: Sequence[str]) -> bool:
    """Whether regions are told by a picture's name, and not by boxes."""
    return len(texts) == 1 and Path(texts[0]).suffix.lower() == ".png"


def lasting(texts: Sequence[str] | None) -> list[str] | None:
    """Regions as they are typed, so that they mean the same from another working directory."""
    if texts and is_map(texts):
        return [str(Path(texts[0]).expanduser().absolute())]
    return list(texts) if texts else None


def read_labels(file: Path) -> Labels:
    """A map of labels: a grey or palette PNG, 0 for no subject, i for the i-th.

    Raises InputError.
    """
    from PIL import Image

    try:
        with Image.open(file, formats=["PNG"]) as image:
            if image.mode not in ("L", "P"):
                raise ValueError(f"its pixels are {image.mode}")
            if max(image.size) > LARGEST:
                raise ValueError(f"it has {image.width}x{image.height} pixels")
            width, values = image.width, image.tobytes()
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(
            f"regions must be boxes or a grey or palette PNG of at most {LARGEST} pixels a side, "
            f"got {file} ({one_line(error)})"
        ) from error
    rows = range(0, len(values), width)
    return Labels(tuple(tuple(values[i : i + width]) for i in rows))
