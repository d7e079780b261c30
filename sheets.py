"""Drawing: contact sheets with titles and figures, classes over a picture, their colours."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

from outputs import encodable

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
INK, FAINT, PAPER = (28, 28, 30), (205, 205, 208), (255, 255, 255)
SMALLEST, LARGEST = 256, 384  # pixels of a picture's longer side on a sheet
COLUMNS = 4
MARGIN, GAP, PAD = 28, 24, 10  # pixels: round the sheet, between panels, between picture and text
HAIRLINE = 1
OVERHANG = 3  # pixels that a glyph may reach beyond its advance, such as the hook of a j
NARROWEST = 2 * SMALLEST + GAP  # so that one small picture still leaves room for its title


@dataclass(frozen=True)
class Panel:
    """One picture of a sheet: its title above it, its figures, one a line, under it."""

    title: str
    image: Image.Image
    lines: tuple[str, ...] = ()


def class_colours(n: int) -> list[Colour]:
    """Return `n` colours, RGB in 0..255: Okabe and Ito's seven, then darker rounds of the same."""
    colours: list[Colour] = []
    for index in range(n):
        darkness, place = divmod(index, len(OKABE_ITO))
        red, green, blue = (round(part * 0.6**darkness) for part in OKABE_ITO[place])
        colours.append((red, green, blue))
    return colours


def class_overlay(image: Image.Image, labels: np.ndarray) -> Image.Image:
    """Return the picture in light grey with every class tinted and outlined in its own colour.

    `labels`: (height, width) of the picture, integers: the class of every pixel, -1 for none; such
    pixels stay grey. Class i has colour i of `class_colours`. Raises ValueError.
    """
    if labels.shape != (image.height, image.width):
        raise ValueError(
            f"labels must have the picture's shape {(image.height, image.width)}: {labels.shape}"
        )
    grey = np.asarray(image.convert("L"), dtype=np.float64)[..., None]  # (H, W, 1)
    light = 120 + grey * (135 / 255)
    # One entry more than there are classes: label -1 picks the last, whose weight below is 0.
    colours = np.array([*class_colours(int(labels.max()) + 1), PAPER], dtype=np.float64)
    near = 2 * max(1, round(max(image.size) / SMALLEST)) + 1  # seen when a sheet reduces it, too
    numbers = Image.fromarray(labels.astype(np.int32))
    largest, least = (
        np.asarray(numbers.filter(kind(near)))
        for kind in (ImageFilter.MaxFilter, ImageFilter.MinFilter)
    )
    weight = np.where(largest != least, 1.0, 0.5) * (labels >= 0)
    blended = light + weight[..., None] * (colours[labels] - light)
    return Image.fromarray(blended.round().astype(np.uint8))


def sheet(
    panels: Sequence[Panel], title: str, legend: Sequence[tuple[str, Colour]] = ()
) -> Image.Image:
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


def _display(image: Image.Image) -> Image.Image:
    """Return the picture at its size on a sheet, in a hairline: a white one would have no edge."""
    side = max(image.size)
    scale: float = math.ceil(SMALLEST / side) if side < SMALLEST else min(1, LARGEST / side)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    method = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    return ImageOps.expand(image.convert("RGB").resize(size, method), HAIRLINE, FAINT)


def _row(shown: Sequence[tuple[Panel, Image.Image]], cell: int) -> Image.Image:
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


def _legend(legend: Sequence[tuple[str, Colour]], width: int) -> Image.Image:
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


def _stack(blocks: Sequence[Image.Image], width: int) -> Image.Image:
    height = sum(block.height for block in blocks) + GAP * (len(blocks) - 1)
    page = _blank(width + 2 * MARGIN, height + 2 * MARGIN)
    top = MARGIN
    for block in blocks:
        page.paste(block, (MARGIN, top))
        top += block.height + GAP
    return page


def _text(texts: Sequence[str], font: ImageFont.FreeTypeFont, width: int, wrap: int) -> Image.Image:
    """Return the texts as a picture, each on at most `wrap` lines of at most `width` pixels."""
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


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int, limit: int) -> list[str]:
    # NFC: the font has letters with their accents on, and draws loose accents badly.
    words = unicodedata.normalize("NFC", encodable(text)).split()
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
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    import matplotlib  # not above: no picture waits for it

    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")  # the same font on every machine
    return ImageFont.truetype(str(folder / f"DejaVuSans{'-Bold' if bold else ''}.ttf"), size)


def _blank(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), PAPER)
