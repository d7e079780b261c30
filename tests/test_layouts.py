"""Regions as a user types them."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

import layouts
from errors import InputError
from layouts import Box, Labels


def test_boxes_are_read_in_fractions() -> None:
    assert layouts.read(["0,0,0.5,1", ".5, 0, 1, 1"]) == (Box(0, 0, 0.5, 1), Box(0.5, 0, 1, 1))


@pytest.mark.parametrize(
    "text",
    ["", "0,0,1", "0,0,1,1,1", "a,0,1,1", "0.5,0,0.5,1", "0,1,1,0", "-0.1,0,1,1", "0,0,1,1.1",
     "nan,0,1,1", "0,0,1,inf"],
)  # fmt: skip
def test_what_is_no_box_is_refused_with_what_was_given(text: str) -> None:
    with pytest.raises(InputError, match=r"LEFT,TOP,RIGHT,BOTTOM.*got " + repr(text)):
        layouts.read([text, "0,0,1,1"])


def test_a_map_is_read_row_by_row(tmp_path: Path) -> None:
    picture = Image.new("L", (3, 2))
    picture.putdata([0, 1, 2, 2, 1, 0])
    picture.save(tmp_path / "map.png")
    found = layouts.read([str(tmp_path / "map.png")])
    assert found == Labels(((0, 1, 2), (2, 1, 0)))
    layouts.check(found, 2)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "I;16"])
def test_a_map_of_colours_is_refused(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (4, 4)).save(tmp_path / "map.png")
    with pytest.raises(InputError, match=r"grey or palette PNG.*its pixels are"):
        layouts.read([str(tmp_path / "map.png")])


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "map.png").write_text("no picture")
    for name in ("map.png", "missing.png"):
        with pytest.raises(InputError, match=f"grey or palette PNG.*{name}"):
            layouts.read([str(tmp_path / name)])
    Image.new("L", (layouts.LARGEST + 1, 1)).save(tmp_path / "map.png")
    with pytest.raises(InputError, match=f"{layouts.LARGEST + 1}x1 pixels"):
        layouts.read([str(tmp_path / "map.png")])


@pytest.mark.parametrize("values", [(0, 1), (1, 2, 3), (0, 255)])
def test_the_values_of_a_map_are_the_prompts(values: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"the values 1 to 2, one a prompt.*got"):
        layouts.check(Labels((values,)), 2)


def test_regions_are_as_many_as_prompts_and_all_are_seen() -> None:
    half, whole = Box(0, 0, 0.5, 1), Box(0, 0, 1, 1)
    layouts.check((whole, half), 2)
    with pytest.raises(InputError, match="as many as prompts, 3, got 2"):
        layouts.check((whole, half), 3)
    with pytest.raises(InputError, match=r"hidden by later ones, got 0,0,0\.5,1"):
        layouts.check((half, whole), 2)


def test_a_map_keeps_its_meaning_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert layouts.lasting(["map.png"]) == [str(tmp_path / "map.png")]
    assert layouts.lasting(["0,0,1,1"]) == ["0,0,1,1"]
    assert layouts.lasting(None) is None


def test_the_same_regions_are_told_the_same() -> None:
    assert layouts.told((Box(0, 0, 0.5, 1),)) == ["0,0,0.5,1"]
    first, second = (layouts.told(Labels(((1, value),))) for value in (0, 2))
    assert first == layouts.told(Labels(((1, 0),))) != second
    assert layouts.told(None) is None
