"""Contact sheets and class maps, looked at pixel by pixel."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

import sheets

RANDOM = np.random.default_rng(2024)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(RANDOM.integers(0, 256, (height, width, 3), dtype=np.uint8))


# Class maps


def test_many_classes_have_as_many_colours() -> None:
    colours = sheets.class_colours(28)
    assert len(set(colours)) == 28
    assert colours[:3] == sheets.class_colours(3)
    assert sheets.class_colours(0) == []
    assert all(0 <= part <= 255 for colour in colours for part in colour)


def test_an_overlay_tints_every_class_and_nothing_else() -> None:
    labels = np.full((64, 96), -1)
    for index in range(8):
        labels[8:56, 12 * index : 12 * index + 10] = index
    image = noise(96, 64)
    overlay = np.asarray(sheets.class_overlay(image, labels)).astype(int)
    untinted = overlay[labels == -1]
    assert np.ptp(untinted, axis=1).max() == 0
    without = np.asarray(sheets.class_overlay(image, np.full_like(labels, -1)))
    assert np.array_equal(untinted, without[labels == -1])  # outlines do not reach outside either
    assert untinted.std() > 10  # the picture is still to be seen
    means = np.array([overlay[labels == index].mean(axis=0) for index in range(8)])
    assert np.ptp(means, axis=1).min() > 20
    between = np.abs(means[:, None] - means[None]).max(axis=2)
    assert between[~np.eye(8, dtype=bool)].min() > 15


@pytest.mark.parametrize("size", [64, 512])
def test_an_outline_is_solid_and_lies_inside_its_class(size: int) -> None:
    low, high = size // 4, size // 2
    labels = np.full((size, size), -1)
    labels[low:high, low:] = 0
    overlay = np.asarray(sheets.class_overlay(Image.new("RGB", (size, size), "white"), labels))
    colour = sheets.class_colours(1)[0]
    assert (overlay[low, low:] == colour).all()
    assert (overlay[high - 1, low:] == colour).all()
    assert (overlay[low:high, low] == colour).all()
    assert (overlay[(low + high) // 2, size - 1] != colour).any()  # the frame is no outline
    assert (overlay[labels == -1] == 255).all()


@pytest.mark.parametrize("label", [-1, 0])
def test_an_overlay_of_one_label_alone(label: int) -> None:
    overlay = sheets.class_overlay(noise(64, 64), np.full((64, 64), label))
    grey = np.ptp(np.asarray(overlay).astype(int), axis=2) == 0
    assert grey.all() if label == -1 else not grey.any()


def test_labels_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(48, 64\): \(64, 48\)"):
        sheets.class_overlay(noise(64, 48), np.zeros((64, 48), dtype=int))


# Contact sheets


def places(page: Image.Image, part: Image.Image) -> list[tuple[int, int]]:
    """Where, as (left, top), the part stands pixel for pixel in the page."""
    pixels, wanted = np.asarray(page), np.asarray(part)
    height, width = wanted.shape[:2]
    starts = np.argwhere((pixels == wanted[0, 0]).all(axis=2))
    return [
        (int(left), int(top))
        for top, left in starts
        if np.array_equal(pixels[top : top + height, left : left + width], wanted)
    ]


def panels(count: int, size: int) -> list[sheets.Panel]:
    return [sheets.Panel(f"Panel {n}", noise(size, size), (f"PPV 0.{n}",)) for n in range(count)]


@pytest.mark.parametrize(
    ("size", "shown"), [(64, 256), (100, 300), (256, 256), (352, 352), (512, 384), (1024, 384)]
)
def test_a_sheet_shows_every_picture_at_its_scale(size: int, shown: int) -> None:
    chosen = panels(3, size)
    method = Image.Resampling.NEAREST if shown >= size else Image.Resampling.LANCZOS
    page = sheets.sheet(chosen, "a dog")
    found = [places(page, panel.image.resize((shown, shown), method)) for panel in chosen]
    assert [len(places) for places in found] == [1, 1, 1]
    lefts, tops = zip(*(place for (place,) in found), strict=True)
    assert len(set(tops)) == 1
    assert lefts[1] - lefts[0] == lefts[2] - lefts[1] > shown
    assert page.width > lefts[2] + shown
    assert page.height > tops[0] + shown


@pytest.mark.parametrize(("count", "rows"), [(1, [1]), (4, [4]), (5, [3, 2]), (9, [3, 3, 3])])
def test_panels_wrap_at_four_a_row(count: int, rows: list[int]) -> None:
    chosen = panels(count, 256)
    page = sheets.sheet(chosen, "title")
    tops = [places(page, panel.image)[0][1] for panel in chosen]
    assert [tops.count(top) for top in sorted(set(tops))] == rows
    assert tops == sorted(tops)


def ink(page: Image.Image) -> np.ndarray:
    """Return (height, width) bool: the pixels that are not paper."""
    return np.asarray((np.asarray(page) != 255).any(axis=2))


LONG = "un corazón pequeño y jugoso " * 60
UNBROKEN = "jÑ" * 3000


@pytest.mark.parametrize(
    "text", [LONG, UNBROKEN, "犬🐕" * 500, "مرحبا " * 300, "\0\x07\u202e\udcff", ""]
)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_no_text_reaches_a_margin_or_a_picture(text: str, count: int) -> None:
    white = Image.new("RGB", (64, 64), "white")
    chosen = [sheets.Panel(text, white, (text, "PPV 0.5")) for _ in range(count)]
    page = sheets.sheet(chosen, text, [(text, (0, 0, 255)), ("b", (255, 0, 0))])
    marks = ink(page)
    edge = 20
    assert not marks[:edge].any()
    assert not marks[-edge:].any()
    assert not marks[:, :edge].any()
    assert not marks[:, -edge:].any()
    framed = Image.new("RGB", (258, 258), sheets.FAINT)
    framed.paste((255, 255, 255), (1, 1, 257, 257))
    frames = places(page, framed)
    assert len(frames) == count
    for left, top in frames:  # nothing between a column and the next, from title to last figure
        gutter = slice(left + 258, left + 258 + sheets.GAP)
        assert not marks[top - 60 : top + 258 + 80, gutter].any()
        assert not marks[top - 4 : top, left : left + 258].any()
        assert not marks[top + 258 : top + 262, left : left + 258].any()
    assert page.height < 1400


def test_every_text_leaves_ink() -> None:
    white = Image.new("RGB", (256, 256), "white")
    bare = ink(sheets.sheet([sheets.Panel("", white, ("",))], "")).sum()
    for sheet in (
        sheets.sheet([sheets.Panel("Plain", white, ("",))], ""),
        sheets.sheet([sheets.Panel("", white, ("PPV 0.5",))], ""),
        sheets.sheet([sheets.Panel("", white, ("",))], "título"),
    ):
        assert ink(sheet).sum() > bare + 100


def test_a_cut_text_ends_in_an_ellipsis_and_the_rest_is_whole() -> None:
    font = sheets._font(15)
    lines = sheets._wrapped("uno dos tres cuatro cinco seis", font, 70, 2)
    assert lines == ["uno dos", "tres…"]
    assert sheets._wrapped("uno  dos\ntres", font, 500, 2) == ["uno dos tres"]
    assert "".join(sheets._wrapped("abcdefghijklmnop", font, 50, 9)) == "abcdefghijklmnop"
    assert all(font.getlength(line) <= 70 for line in sheets._wrapped(LONG, font, 70, 3))


def test_letters_that_no_eye_can_see_are_left_out() -> None:
    assert sheets._wrapped("\x07do\u202eg\0", sheets._font(15), 500, 1) == ["dog"]


@pytest.mark.parametrize("text", ["junto", "ẾẪǺ", "gjpqy", "fff", "Å_"])
def test_no_letter_loses_a_pixel_at_the_edge_of_its_block(text: str) -> None:
    font = sheets._font(24, bold=True)
    spacious = Image.new("RGB", (300, 100), "white")
    ImageDraw.Draw(spacious).text((100, 50), text, fill=sheets.INK, font=font, anchor="ls")
    block = sheets._text([text], font, 200, wrap=1)
    assert ink(block).sum() == ink(spacious).sum()


def test_margins_are_tight() -> None:
    page = sheets.sheet(panels(5, 64), "title", [("a dog", (0, 0, 255))])
    rows, columns = (np.flatnonzero(ink(page).any(axis=axis)) for axis in (1, 0))
    assert rows[0] < 45
    assert page.height - rows[-1] < 45
    assert columns[0] < 35
    assert page.width - columns[-1] < 35


def test_the_legend_shows_every_colour() -> None:
    colours = sheets.class_colours(9)
    page = sheets.sheet(panels(2, 64), "title", [(LONG[:40], colour) for colour in colours])
    for colour in colours:
        assert len(places(page, Image.new("RGB", (16, 16), colour))) == 1


def test_a_sheet_is_the_same_twice() -> None:
    chosen = panels(2, 64)
    first, second = (sheets.sheet(chosen, "niño", [("a", (1, 2, 3))]) for _ in range(2))
    assert first.tobytes() == second.tobytes()
    assert first.mode == "RGB"


def test_pictures_of_other_modes_and_shapes() -> None:
    grey, wide = Image.new("L", (64, 64), 90), noise(1024, 128)
    page = sheets.sheet([sheets.Panel("a", grey, ()), sheets.Panel("b", wide, ())], "t")
    assert len(places(page, Image.new("RGB", (256, 256), (90, 90, 90)))) == 1
    assert len(places(page, wide.resize((384, 48), Image.Resampling.LANCZOS))) == 1


def test_a_sheet_without_panels_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one panel"):
        sheets.sheet([], "title")
