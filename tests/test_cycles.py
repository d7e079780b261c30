"""cycles.py: of an evaluation's folder, what is finished, and who may paint there."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
from PIL import Image

import cycles
import outputs
from cycles import Records
from errors import ResourceError
from prompts import Prompt

SEED = 7
KEY = (1, SEED)


def row_of(seed: int) -> cycles.Row:
    figures = {"ppv": 0.5, "npv": 0.5, "js": 0.5}
    made_by = {"model": "pocket", "dtype": "float32"}
    return {
        "seed": seed,
        **made_by,
        "unet_calls": 20,
        "plain": dict(figures),
        "tempered": dict(figures),
    }


def records(folder: Path) -> Records:
    return Records(folder, [Prompt(("a black dog",), "")], range(SEED, SEED + 1))


def finished(folder: Path) -> dict[cycles.Key, cycles.Row]:
    """What is not painted again: whole rows of which both pictures are sound."""
    known = records(folder)
    return {key: row for key, row in known.rows() if known.is_painted(key)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of one finished cycle."""
    for name in cycles.PICTURES:
        picture = Image.effect_noise((64, 64), 50).convert("RGB")
        outputs.save_image(records(tmp_path).picture_file(KEY, name), picture, "a black dog")
    outputs.append_json_line(records(tmp_path).rows_file(0), row_of(SEED))
    return tmp_path


def test_a_row_with_both_pictures_is_a_finished_cycle(folder: Path) -> None:
    assert finished(folder) == {KEY: row_of(SEED)}


@pytest.mark.parametrize("name", cycles.PICTURES)
@pytest.mark.parametrize(
    "kept", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999], ids=lambda share: f"{share:.1%} left"
)
def test_a_picture_that_is_cut_is_no_picture(folder: Path, name: str, kept: float) -> None:
    path = records(folder).picture_file(KEY, name)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    assert finished(folder) == {}


def test_no_byte_of_a_picture_can_change_unnoticed(folder: Path) -> None:
    path = records(folder).picture_file(KEY, "plain")
    data = path.read_bytes()
    for at in [*range(60), *range(60, len(data) - 20, 97), *range(len(data) - 20, len(data))]:
        changed = bytearray(data)
        changed[at] ^= 0xFF
        path.write_bytes(changed)
        assert finished(folder) == {}, f"byte {at} of {len(data)}"
    path.write_bytes(data)
    assert KEY in finished(folder)


def test_a_picture_that_only_seems_sound_is_named_with_what_helps(tmp_path: Path) -> None:
    """Its checksums are right, what they are of is not: no accident makes that."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 64, 64, 8, 2, 0, 0, 0))
    path = tmp_path / "7-plain.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"?" * 50) + cycles.PNG_END)
    assert cycles.is_sound(path)
    with pytest.raises(ResourceError, match=r"7-plain\.png \(.*\): delete it, and --resume paints"):
        cycles.picture(path)


def a_folder(path: Path) -> None:
    path.mkdir()


def a_dead_link(path: Path) -> None:
    path.symlink_to("nowhere")


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


ODDITIES = [a_folder, a_dead_link, endless, *([os.mkfifo] if hasattr(os, "mkfifo") else [])]


@pytest.mark.skipif(os.name == "nt", reason="Windows has neither devices nor, mostly, links")
@pytest.mark.parametrize("make", ODDITIES)
def test_what_is_no_file_is_no_picture_and_nothing_is_waited_for(
    folder: Path, make: Callable[[Path], Any]
) -> None:
    path = records(folder).picture_file(KEY, "tempered")
    path.unlink()
    make(path)
    assert finished(folder) == {}
    make(folder / "cycles-1.jsonl")
    assert finished(folder) == {}


@pytest.mark.parametrize(
    "change",
    [
        *({name: None} for name in ("seed", "plain", "tempered", "model", "dtype", "unet_calls")),
        {"seed": "7"},
        {"seed": True},
        {"plain": []},
        {"plain": {"ppv": 0.5, "npv": 0.5}},
        {"plain": {"ppv": "high", "npv": 0.5, "js": 0.5}},
        {"tempered": {"ppv": float("nan"), "npv": 0.5, "js": 0.5}},
        {"unet_calls": 10**400},
        {"tempered_calls": -5},
        {"plain_calls": "20"},
        {"seconds": "x"},
        {"seconds": 10**400},
        {"flags": []},
        {"model": 5},
    ],
    ids=str,
)
def test_a_row_that_lacks_what_a_summary_takes_is_no_row(
    folder: Path, change: dict[str, Any]
) -> None:
    row = {name: value for name, value in {**row_of(SEED), **change}.items() if value is not None}
    records(folder).rows_file(0).write_text(json.dumps(row) + "\n", encoding="utf-8")
    assert finished(folder) == {}


@pytest.mark.parametrize(
    "line", ["", "[" * 100_000, '{"seed": 7', "null", "\x00"], ids=lambda line: repr(line[:9])
)
def test_lines_that_are_no_rows_hide_no_others(folder: Path, line: str) -> None:
    with records(folder).rows_file(0).open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")
    outputs.append_json_line(records(folder).rows_file(0), {**row_of(SEED), "unet_calls": 21})
    assert finished(folder)[KEY]["unet_calls"] == 21  # the later row counts


def test_who_paints_keeps_others_out_until_it_is_done(folder: Path) -> None:
    with cycles.claimed(folder, 1):
        for claim in (lambda: cycles.prepare(folder), cycles.claimed(folder, 1).__enter__):
            with pytest.raises(ResourceError, match=r"^another run paints cycles in this folder"):
                claim()
        with cycles.claimed(folder, 0):
            pass  # a process of the same run
    cycles.prepare(folder)
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_a_folder_that_can_not_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match=r"^can not read .*; nothing was changed$"):
        cycles.prepare(tmp_path / "file")


def test_what_a_kill_left_is_removed_and_nothing_else(folder: Path) -> None:
    mine = {folder / "notes.tmp", folder / ".mine.tmp", folder / ".hidden"}
    left = {folder / ".0123456789abcdef.tmp", folder / ".cycles-0.lock", folder / ".cycles-3.lock"}
    before = set(folder.iterdir())
    for path in mine | left:
        path.touch()
    (folder / ".fedcba9876543210.tmp").mkdir()
    cycles.prepare(folder)
    assert set(folder.iterdir()) == before | mine


# --- Several prompts.

PAIR = [Prompt(("a cat", "a dog"), " and "), Prompt(("¿qué?", "*"), " / ")]


def test_each_prompt_has_a_folder_that_says_which(tmp_path: Path) -> None:
    many = Records(tmp_path, PAIR * 6, range(3, 5))
    assert many.keys[:3] == [(1, 3), (1, 4), (2, 3)]
    assert len(many.keys) == len({many.picture_file(key, "plain") for key in many.keys}) == 24
    assert many.picture_file((1, 4), "plain") == tmp_path / "01-a-cat-and-a-dog" / "4-plain.png"
    assert many.picture_file((12, 3), "plain") == tmp_path / "12-que" / "3-plain.png"


def test_rows_of_all_processes_and_of_no_other_cycle_are_taken(tmp_path: Path) -> None:
    of = Records(tmp_path, PAIR, range(3, 5))
    for rank, (number, seed) in enumerate([(1, 3), (2, 4), (2, 9), (3, 3), (0, 3)]):
        outputs.append_json_line(of.rows_file(rank), {**row_of(seed), "prompt": number})
    outputs.append_json_line(tmp_path / "cycles-mine.jsonl", {**row_of(4), "prompt": 1})
    outputs.append_json_line(of.rows_file(7), {**row_of(4), "prompt": "1"})
    assert sorted(key for key, _ in of.rows()) == [(1, 3), (2, 4)]


def test_notes_of_one_judge_are_not_those_of_another(tmp_path: Path) -> None:
    of = Records(tmp_path, PAIR, range(3, 5))
    for judge in ("owlv2", "owlv2-large"):
        outputs.append_json_line(of.notes_file(judge, 0), {"judge": judge})
        outputs.append_json_line(of.notes_file(judge, 11), {"judge": judge})
    assert [row["judge"] for row in of.notes("owlv2")] == ["owlv2"] * 2
