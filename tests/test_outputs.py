"""What reaches the disk, read back."""

from __future__ import annotations

import csv
import dataclasses
import errno
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import outputs
from errors import InputError, ResourceError

NOW = datetime(2024, 3, 9, 7, 5, 1, tzinfo=timezone.utc)
ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
RANDOM = np.random.default_rng(2024)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(RANDOM.integers(0, 256, (height, width, 3), dtype=np.uint8))


# Folders and names


def test_a_folder_that_does_not_exist_yet_is_writable_and_nothing_is_left_behind(
    tmp_path: Path,
) -> None:
    outputs.check_writable(tmp_path / "a" / "b")
    outputs.check_writable(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_relative_folder_is_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outputs.check_writable(Path("outputs"))
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(InputError) as error:
        outputs.check_writable(tmp_path / "file" / "runs")
    assert str(error.value) == (
        f"the output folder must be a folder: {tmp_path / 'file' / 'runs'} "
        f"({tmp_path / 'file'} is not one)"
    )
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.skipif(ROOT or os.name == "nt", reason="permission bits do not bind here")
def test_a_folder_without_write_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(InputError, match=r"must be writable: .*runs .*[Pp]ermission"):
            outputs.check_writable(tmp_path / "runs")
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that nobody can fill")
def test_a_folder_where_nothing_can_be_made_is_refused() -> None:
    with pytest.raises(InputError, match="must be writable: /proc/self/runs"):
        outputs.check_writable(Path("/proc/self/runs"))


def test_a_name_that_no_disk_takes_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must be writable") as error:
        outputs.check_writable(tmp_path / ("x" * 5000 + "\nx"))
    assert len(str(error.value).splitlines()) == 1


def test_the_import_brings_nothing_heavy() -> None:
    code = "import sys, outputs; print(*{name.partition('.')[0] for name in sys.modules})"
    run = [sys.executable, "-c", code]
    folder = Path(outputs.__file__).parent
    loaded = subprocess.run(run, cwd=folder, capture_output=True, text=True, check=True).stdout
    assert not {"PIL", "numpy", "matplotlib", "scipy", "torch"} & set(loaded.split())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a black dog", "a-black-dog"),
        ("Un PERRO negro pequeño, ¡qué corazón!", "un-perro-negro-pequeno-que-corazon"),
        ("straße ﬁn", "strasse-fin"),
        ("../../etc/passwd", "etc-passwd"),
        ("C:\\dog\0\n", "c-dog"),
        ("犬 🐕", "picture"),
        ("", "picture"),
        ("...", "picture"),
        ("Con", "picture"),
        ("LPT1.", "picture"),
        ("com¹", "picture"),
        ("console", "console"),
        ("\udcff dog", "dog"),
    ],
)
def test_slug(text: str, expected: str) -> None:
    assert outputs.slug(text) == expected


def test_a_slug_keeps_to_its_limit_and_ends_in_no_dash() -> None:
    assert outputs.slug("word " * 50) == "word-word-word-word-word-word-word-word"
    assert outputs.slug("abc def", limit=4) == "abc"
    assert outputs.slug("console", limit=3) == "pic"  # "con", cut, would be the device


def test_run_folders_of_one_second_get_numbers(tmp_path: Path) -> None:
    folders = [
        outputs.new_run_folder(tmp_path / "new" / "deep", "A black dog", NOW) for _ in range(3)
    ]
    stem = "20240309-070501-a-black-dog"
    assert [folder.name for folder in folders] == [stem, f"{stem}-2", f"{stem}-3"]
    assert all(folder.is_dir() for folder in folders)


def test_run_folders_made_at_the_same_time_differ(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = pool.map(lambda _: outputs.new_run_folder(tmp_path, "dog", NOW), range(40))
    assert len(set(made)) == 40


def test_a_run_folder_below_a_file_is_an_error_not_a_loop(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match=r"can not write .*20240309-070501-dog"):
        outputs.new_run_folder(tmp_path / "file", "dog", NOW)


# PNG


def parameters(**changes: object) -> str:
    values: dict[str, object] = {
        "prompt": "a black dog next to a toy robot",
        "negative_prompt": "",
        "steps": 20,
        "sampler": "Euler",
        "guidance_scale": 7.5,
        "seed": 2024,
        "width": 512,
        "height": 768,
        "model": "v1-4",
        "extra": {},
    }
    return outputs.parameters_text(**{**values, **changes})  # type: ignore[arg-type]


def test_the_parameters_are_automatic1111s() -> None:
    assert parameters() == (
        "a black dog next to a toy robot\n"
        "Steps: 20, Sampler: Euler, CFG scale: 7.5, Seed: 2024, Size: 512x768, Model: v1-4"
    )


def test_negative_prompt_and_further_keys_have_their_place() -> None:
    text = parameters(
        negative_prompt="blurry, low quality",
        guidance_scale=7.0,
        model='CompVis/a "b"',
        extra={"Stoptime": 15, "Prompts": "a dog, a cat", "k": 0.0, "VAE": None, "Note": "x\ny: z"},
    )
    assert text == (
        "a black dog next to a toy robot\n"
        "Negative prompt: blurry, low quality\n"
        "Steps: 20, Sampler: Euler, CFG scale: 7, Seed: 2024, Size: 512x768, "
        'Model: "CompVis/a \\"b\\"", Stoptime: 15, Prompts: "a dog, a cat", k: 0.0, '
        'Note: "x\\ny: z"'
    )


@pytest.mark.parametrize("negative", [None, "", "  "])
def test_without_a_negative_prompt_there_is_no_such_line(negative: str | None) -> None:
    assert "Negative" not in parameters(negative_prompt=negative)


@pytest.mark.parametrize("text", ["a dog\nSteps: 20", "un corazón pequeño ©", "犬 🐕 — ñ", ""])
def test_text_and_pixels_of_a_png_come_back(tmp_path: Path, text: str) -> None:
    image = noise(64, 48)
    outputs.save_image(tmp_path / "a.png", image, text)
    with Image.open(tmp_path / "a.png") as found:
        assert found.format == "PNG"
        assert found.info == {"parameters": text}
        assert np.array_equal(np.asarray(found), np.asarray(image))


def test_a_png_without_parameters_has_no_text(tmp_path: Path) -> None:
    outputs.save_image(tmp_path / "a.png", noise(8, 8))
    with Image.open(tmp_path / "a.png") as found:
        assert found.info == {}


def test_a_prompt_that_was_not_utf8_does_not_stop_the_picture(tmp_path: Path) -> None:
    outputs.save_image(tmp_path / "a.png", noise(8, 8), "dog \udcff 犬")
    with Image.open(tmp_path / "a.png") as found:
        assert found.info["parameters"] == "dog ? 犬"


def test_the_same_picture_gives_the_same_bytes(tmp_path: Path) -> None:
    image = noise(64, 64)
    for name in ("a.png", "b.png"):
        outputs.save_image(tmp_path / name, image, "corazón 🐕")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_figure_is_a_png_of_150_dpi_that_names_no_version(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    for name in ("a.png", "b.png"):
        figure = Figure(figsize=(4, 3))
        figure.subplots().plot([1, 3, 2])
        outputs.save_figure(tmp_path / name, figure)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as found:
        assert found.size == (600, 450)
        assert set(found.info) == {"dpi"}


# JSON and CSV


@dataclasses.dataclass(frozen=True)
class Settings:
    steps: int = 20
    where: Path = Path("runs")
    extra: tuple[float, ...] = (0.5, math.nan)


def test_json_keeps_order_accents_and_every_kind_of_value(tmp_path: Path) -> None:
    value = {
        "z": "corazón 🐕",
        "a": Settings(),
        "matrix": np.array([[1.0, np.nan], [np.inf, 0.25]]),
        "scalars": [np.float32(0.5), np.int64(3), np.bool_(True), np.float64(-np.inf), None, True],
        "when": NOW,
        "keys": {1: "one"},
    }
    outputs.save_json(tmp_path / "run.json", value)
    text = (tmp_path / "run.json").read_text(encoding="utf-8")
    assert "corazón 🐕" in text
    assert text.startswith('{\n  "z"')
    assert text.endswith("}\n")
    found = json.loads(text)
    assert found == {
        "z": "corazón 🐕",
        "a": {"steps": 20, "where": "runs", "extra": [0.5, None]},
        "matrix": [[1.0, None], [None, 0.25]],
        "scalars": [0.5, 3, True, None, None, True],
        "when": "2024-03-09T07:05:01+00:00",
        "keys": {"1": "one"},
    }
    assert list(found) == list(value)


def test_json_is_exact_for_float64(tmp_path: Path) -> None:
    outputs.save_json(tmp_path / "a.json", np.array([0.1 + 0.2, 1e-300]))
    assert json.loads((tmp_path / "a.json").read_text()) == [0.1 + 0.2, 1e-300]


def test_a_path_that_was_not_utf8_survives_json(tmp_path: Path) -> None:
    outputs.save_json(tmp_path / "a.json", {"model": Path("dog-\udcff")})
    assert json.loads((tmp_path / "a.json").read_bytes()) == {"model": "dog-\udcff"}


def test_what_json_can_not_hold_is_refused_and_the_old_file_stays(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("old")
    with pytest.raises(TypeError, match="JSON can hold: object"):
        outputs.save_json(tmp_path / "a.json", {"a": object()})
    assert (tmp_path / "a.json").read_text() == "old"


def test_csv_comes_back_with_all_columns(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"prompt": 'un niño, "él"\nsolo', "ppv": np.float64(0.1), "npv": math.nan},
        {"prompt": "=1", "js": None, "seeds": [1, 2]},
    ]
    outputs.save_csv(tmp_path / "a.csv", rows)
    with (tmp_path / "a.csv").open(encoding="utf-8", newline="") as file:
        found = list(csv.reader(file))
    assert found == [
        ["prompt", "ppv", "npv", "js", "seeds"],
        ['un niño, "él"\nsolo', "0.1", "", "", ""],
        ["=1", "", "", "", "[1, 2]"],
    ]


def test_csv_without_rows_is_an_empty_file(tmp_path: Path) -> None:
    outputs.save_csv(tmp_path / "a.csv", [])
    assert (tmp_path / "a.csv").read_bytes() == b""


def test_json_lines_come_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "cycles.jsonl"
    for seed in (1, 2):
        outputs.append_json_line(path, {"seed": np.int64(seed), "text": "ñ\n", "ppv": math.nan})
    assert path.read_text(encoding="utf-8").count("\n") == 2
    assert outputs.read_json_lines(path) == [
        {"seed": 1, "text": "ñ\n", "ppv": None},
        {"seed": 2, "text": "ñ\n", "ppv": None},
    ]


def test_every_place_where_a_kill_can_cut_the_last_line(tmp_path: Path) -> None:
    path = tmp_path / "cycles.jsonl"
    first, second = b'{"a": "1"}\n', '{"b": {"ñ": 22}}'.encode()
    for cut in range(len(second)):
        path.write_bytes(first + second[:cut])
        assert outputs.read_json_lines(path) == [{"a": "1"}]
        outputs.append_json_line(path, {"c": 3})
        assert outputs.read_json_lines(path) == [{"a": "1"}, {"c": 3}]


def test_half_a_line_is_cut_off_before_the_next_is_appended(tmp_path: Path) -> None:
    path = tmp_path / "cycles.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b": 2}')  # only its end is missing: it is not read either
    assert outputs.read_json_lines(path) == [{"a": 1}]
    outputs.append_json_line(path, {"c": 3})
    assert path.read_bytes() == b'{"a": 1}\n{"c": 3}\n'


def test_lines_that_are_no_objects_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'[1]\n\n\xff\nnull\n{"a": 1}\n\0\0')
    assert outputs.read_json_lines(tmp_path / "a.jsonl") == [{"a": 1}]


def test_no_file_has_no_lines(tmp_path: Path) -> None:
    assert outputs.read_json_lines(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("length", [0, 1, 65_535, 65_536, 65_537, 200_000])
@pytest.mark.parametrize("before", [b"", b'{"a": 1}\n', b'{"a": 1}\n' * 20_000])
def test_half_a_line_of_any_length_is_cut_off_exactly(
    before: bytes, length: int, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(before + b"x" * length)
    outputs.append_json_line(path, {"b": 2})
    assert path.read_bytes() == before + b'{"b": 2}\n'


def test_json_lines_that_can_not_be_read_are_an_error_of_one_line(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"^can not read .* \(.*\); nothing was changed$"):
        outputs.read_json_lines(tmp_path)


# What the disk refuses


def save_figure(path: Path) -> None:
    from matplotlib.figure import Figure

    outputs.save_figure(path, Figure(figsize=(1, 1)))


SAVERS: list[Callable[[Path], None]] = [
    lambda path: outputs.save_image(path, noise(8, 8), "text"),
    lambda path: outputs.save_json(path, {"a": 1}),
    lambda path: outputs.save_csv(path, [{"a": 1}]),
    save_figure,
]


def failing(number: int) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("save", SAVERS)
@pytest.mark.parametrize(("owner", "call"), [(Path, "replace"), (os, "fsync")])
def test_a_full_disk_leaves_the_old_file_and_no_other(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    save: Callable[[Path], None],
    owner: object,
    call: str,
) -> None:
    path = tmp_path / "result"
    path.write_text("old")
    monkeypatch.setattr(owner, call, failing(errno.ENOSPC))
    with pytest.raises(ResourceError) as error:
        save(path)
    assert str(error.value) == f"disk full: can not write {path}; the earlier one is kept"
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_exhausted_quota_is_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", failing(errno.EDQUOT))
    with pytest.raises(ResourceError) as error:
        outputs.save_json(tmp_path / "a.json", 1)
    assert str(error.value) == (
        f"disk full: can not write {tmp_path / 'a.json'}; the files before it are kept"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_really_full_disk_under_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "cycles.jsonl"
    path.symlink_to("/dev/full")
    with pytest.raises(ResourceError, match=r"^disk full: .*jsonl; the lines before it are kept$"):
        outputs.append_json_line(path, {"a": 1})


def test_another_refusal_gives_its_reason_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ResourceError) as error:
        outputs.save_json(tmp_path / "gone" / "a.json", 1)
    assert str(error.value) == (
        f"can not write {tmp_path / 'gone' / 'a.json'} ({os.strerror(errno.ENOENT)}); "
        "the files before it are kept"
    )


def test_an_interrupt_while_writing_leaves_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        outputs.save_json(tmp_path / "a.json", 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="no umask")
def test_files_have_the_permissions_that_the_user_asked_for(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        outputs.save_json(tmp_path / "a.json", 1)
    finally:
        os.umask(before)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o640
