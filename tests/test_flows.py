"""Both flows from end to end on the bundled pocket: files, figures, repetition, interruption.

Most runs happen in this process, since importing torch takes longer than they do; what needs an
environment of its own, or a signal, is a process.
"""

from __future__ import annotations

import csv
import errno
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calls import Done, call, run_of
from loopback import Hub, closed_url, hub_environment, pocket_repositories
from PIL import Image

import main
import outputs
from errors import ResourceError
from hub import CLIPSEG
from kinds import STABLE_DIFFUSION
from metrics import Paired, PictureMetrics, picture_metrics, scatter, summarise
from segmentation import SMALLEST
from settings import VERSION

REPOSITORY = Path(main.__file__).parent
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
STEPS = ("--steps", "4", "--stoptime", "3", "--backsteps", "1", "--rounds", "1")
FEW = ("--model", "pocket", "--device", "cpu", *STEPS)
CALLS = 4 + 1 + 1  # of the U-Net, for a cycle of so few steps
PAINT, MEASURE = "--tempered_inference", "--evaluate"
PROMPT = "a black dog next to a toy robot"  # of the default prompts
PICTURES = ("tempered.png", "plain.png", "interrupted.png", "classes.png", "sheet.png")
CYCLES = 4
PATIENCE = 300  # seconds; only a process that hangs takes so long
Row = dict[str, Any]


def start(*words: str, env: Mapping[str, str] = os.environ) -> subprocess.Popen[str]:
    """Start the command line in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "main.py", *words],
        cwd=REPOSITORY,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )


def finish(process: subprocess.Popen[str]) -> Done:
    """Wait for a process that was started."""
    try:
        out, err = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    return Done(process.returncode, out, err)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def pixels(path: Path) -> np.ndarray[Any, Any]:
    with Image.open(path) as image:
        return np.asarray(image, dtype=int)


def parameters(path: Path) -> str:
    with Image.open(path) as image:
        return str(image.info["parameters"])


def assert_same_bytes(one: Path, other: Path, files: tuple[str, ...] = PICTURES) -> None:
    assert [
        name for name in files if (one / name).read_bytes() != (other / name).read_bytes()
    ] == []


# ---- One tempered picture ----


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """A tempered picture and the plain one of its seed."""
    return call(PAINT, *FEW, "--compare", "--output", str(tmp_path_factory.mktemp("picture")))


def files_in_readme() -> tuple[set[str], set[str]]:
    """The files that README says a picture leaves, and those of an evaluation."""
    section = README.split("### What a run leaves")[1].split("\n## ")[0]
    texts = section.split("An evaluation's folder holds")
    picture, added = (
        set(re.findall(r"`([a-z-]+\.(?:png|jsonl?|csv|md|html))`", text)) for text in texts
    )
    return picture, added


def test_a_picture_leaves_the_files_of_readme(picture: Done, tmp_path: Path) -> None:
    told, _ = files_in_readme()
    assert picture.code == 0
    assert names(picture.folder) == {*PICTURES, "run.json"} == told - {"kept.png"}
    alone = call(PAINT, *FEW, "--output", str(tmp_path))
    assert alone.code == 0
    assert names(alone.folder) == told - {"plain.png", "kept.png"}
    difference = pixels(alone.folder / "tempered.png") - pixels(picture.folder / "tempered.png")
    assert np.abs(difference).max() <= 1  # --compare adds a picture, and changes none


def test_a_picture_tells_its_figures_and_its_folder_and_nothing_else(picture: Done) -> None:
    lines = []
    for name in ("plain", "tempered"):
        figures = picture.run[name]["metrics"]
        rounded = "  ".join(f"{key} {figures[key.lower()]:.3f}" for key in ("PPV", "NPV", "JS"))
        lines.append(f"{name:9}{rounded}")
    assert picture.out.splitlines() == [*lines, str(picture.folder)]
    assert picture.err == ""
    assert re.fullmatch(r"\d{8}-\d{6}-a-black-dog-next-to-a-toy-robot(-\d+)?", picture.folder.name)


def test_the_pictures_carry_their_parameters(picture: Done) -> None:
    settings = "Steps: 4, Sampler: Euler, CFG scale: 7.5, Seed: 2024, Size: 64x64, Model: pocket"
    tempered = "Tempering stoptime: 3, Tempering backsteps: 1, Tempering k: 4.0, "
    tempered += "Tempering cfg_rescale: 10.0, Tempering uncertainty: class, "
    tempered += "Tempering background: 1.0, Tempering rounds: 1"
    made_by = f"Version: Tempering {VERSION}"
    folder = picture.folder
    assert parameters(folder / "plain.png") == f"{PROMPT}\n{settings}, {made_by}"
    assert parameters(folder / "tempered.png") == f"{PROMPT}\n{settings}, {tempered}, {made_by}"


def test_the_same_command_twice_gives_the_same_bytes(picture: Done) -> None:
    again = call(PAINT, *FEW, "--compare", "--output", str(picture.folder.parent))
    assert again.code == 0
    assert again.folder != picture.folder
    assert_same_bytes(again.folder, picture.folder)


def test_run_json_tells_of_the_run(picture: Done) -> None:
    run = picture.run
    flags = {action.dest for action in main.parser()._actions} - {"help", "version"}
    of_the_call = {"calibration", "debug", "output", "repeat", "resume", "update"}
    assert set(run["arguments"]) == flags - of_the_call
    told: Row = {"steps": 4, "stoptime": 3, "backsteps": 1, "k": 4, "cfg_rescale": 10, "seed": 2024}
    told |= {"prompts": ["a black dog", "a toy robot"], "compare": True, "tempered_inference": True}
    assert {name: run["arguments"][name] for name in told} == told
    assert (run["model"], run["clipseg"], run["notice"]) == ("pocket", "pocket", None)
    assert (run["device"], run["dtype"], run["seed"]) == ("cpu", "float32", 2024)
    assert run["scheduler"] == "EulerDiscreteScheduler"
    assert run["unet_calls"] == CALLS
    python = ".".join(map(str, sys.version_info[:3]))
    assert run["versions"]["tempering"] == VERSION
    assert run["versions"]["python"] == python
    for package in ("torch", "diffusers", "transformers"):
        assert run["versions"][package] == version(package)
    assert min(run["seconds"]["load"], run["seconds"]["paint"]) > 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", run["started"])
    for name in ("plain", "tempered"):
        assert run[name]["metrics"] == asdict(picture_metrics(run[name]["class_matrix"]))
    seen = run["interrupted"]
    matrix = np.array(seen["class_matrix"])
    certainty = np.maximum(matrix.diagonal() * (1 - matrix[[0, 1], [1, 0]]), SMALLEST)
    assert seen["uncertainty"] == pytest.approx(-np.log(certainty), rel=1e-4)


ROUNDS = ("--rounds", "2", "--accept", "0", "--candidates", "2")


def test_rounds_are_told_in_run_json_and_on_the_picture(tmp_path: Path) -> None:
    done = call(PAINT, *FEW, *ROUNDS, "--output", str(tmp_path))
    assert (done.code, done.err) == (0, "")
    assert names(done.folder) == {*PICTURES, "kept.png", "run.json"} - {"plain.png"}
    run = done.run
    assert [row["backsteps"] for row in run["rounds"]] == [1, 1]
    lowest = min(row["energy"] for row in run["rounds"])
    assert run["kept"]["energy"] == min(run["interrupted"]["energy"], lowest)
    assert run["unet_calls"] == 3 + 2 * 2 * 1 + 1
    text = parameters(done.folder / "tempered.png")
    assert "Tempering rounds: 2, Tempering accept: 0.0," in text
    assert text.count("Tempering candidates: 2") == 1


def test_a_picture_that_is_good_enough_is_plain(tmp_path: Path) -> None:
    content = ("--rounds", "5", "--accept", "100", "--early_look", "0")
    done = call(PAINT, *FEW, *content, "--compare", "--output", str(tmp_path))
    assert done.code == 0
    assert done.run["rounds"] == []
    assert done.run["unet_calls"] == 4
    assert_same_pixels(done.folder / "plain.png", done.folder / "tempered.png")


def assert_same_pixels(a: Path, b: Path) -> None:
    np.testing.assert_array_equal(pixels(a), pixels(b))


def test_an_evaluation_counts_the_rounds_that_ran(tmp_path: Path) -> None:
    done = call(MEASURE, *FEW, *ROUNDS, "--cycles", "2", "--output", str(tmp_path))
    assert done.code == 0
    assert [row["rounds"] for row in rows_of(done.folder)] == [2, 2]


def test_nothing_in_run_json_names_a_folder_of_this_machine(picture: Done) -> None:
    text = (picture.folder / "run.json").read_text(encoding="utf-8")
    assert str(REPOSITORY) not in text
    assert str(picture.folder.parent) not in text


def test_repeat_gives_the_same_bytes(picture: Done, tmp_path: Path) -> None:
    again = call("--repeat", str(picture.folder / "run.json"), "--output", str(tmp_path))
    assert again.code == 0
    assert again.run["arguments"] == picture.run["arguments"]
    assert_same_bytes(again.folder, picture.folder)


def test_a_flag_goes_before_the_repeated_one(picture: Done, tmp_path: Path) -> None:
    output = ("--output", str(tmp_path))
    other = call("--repeat", str(picture.folder / "run.json"), "--seed", "7", "--k", "0", *output)
    direct = call(PAINT, *FEW, "--compare", "--seed", "7", "--k", "0", *output)
    assert (other.code, direct.code) == (0, 0)
    assert other.run["arguments"] == {**picture.run["arguments"], "seed": 7, "k": 0}
    assert_same_bytes(other.folder, direct.folder)
    back = call("--repeat", str(other.folder / "run.json"), "--seed", "2024", "--k", "4", *output)
    assert_same_bytes(back.folder, picture.folder)  # the defaults, given, are flags as any other


@pytest.mark.parametrize(
    "prompts", [["a red car"], ["a red car", "a blue bird", "a black dog"]], ids=len
)
def test_any_number_of_prompts_is_painted(prompts: list[str], tmp_path: Path) -> None:
    done = call(PAINT, *FEW, "--prompts", *prompts, "--output", str(tmp_path))
    assert (done.code, done.err) == (0, "")
    square = (len(prompts), len(prompts))
    assert np.shape(done.run["tempered"]["class_matrix"]) == square
    assert np.shape(done.run["interrupted"]["class_matrix"]) == square
    assert all(0 <= figure <= 1 for figure in done.run["tempered"]["metrics"].values())
    assert all(math.isfinite(value) for value in done.run["interrupted"]["uncertainty"])
    first = parameters(done.folder / "tempered.png").splitlines()[0]
    assert first == " next to ".join(prompts)


@pytest.mark.parametrize("preview", ["half", "linear"])
def test_another_preview_is_another_view_of_the_same_latents(
    picture: Done, tmp_path: Path, preview: str
) -> None:
    done = call(PAINT, *FEW, "--compare", "--preview", preview, "--output", str(tmp_path))
    assert (done.code, done.err) == (0, "")
    assert done.run["preview"] == done.run["arguments"]["preview"] == preview
    found, usual = (pixels(folder / "interrupted.png") for folder in (done.folder, picture.folder))
    assert found.shape == usual.shape
    assert (found != usual).any()
    assert_same_bytes(done.folder, picture.folder, ("plain.png",))


def test_which_preview_ran_is_told_and_repeated(picture: Done, tmp_path: Path) -> None:
    """By itself it is whatever there is; a repetition takes what that was."""
    ran = picture.run["preview"]
    assert ran != "auto"
    assert picture.run["arguments"]["preview"] == ran
    done = call(PAINT, *FEW, "--compare", "--preview", ran, "--output", str(tmp_path))
    assert_same_bytes(done.folder, picture.folder, ("interrupted.png", "tempered.png"))


def test_another_scheduler_makes_another_picture_and_says_so(picture: Done, tmp_path: Path) -> None:
    done = call(PAINT, *FEW, "--compare", "--scheduler", "ddim", "--output", str(tmp_path))
    assert (done.code, done.err) == (0, "")
    assert done.run["scheduler"] == "DDIMScheduler"
    assert "Sampler: DDIM," in parameters(done.folder / "plain.png")
    assert (pixels(done.folder / "plain.png") != pixels(picture.folder / "plain.png")).any()


def test_height_and_width_are_those_of_every_picture(tmp_path: Path) -> None:
    size = ("--height", "64", "--width", "96")
    done = call(PAINT, *FEW, "--compare", *size, "--output", str(tmp_path))
    assert (done.code, done.err) == (0, "")
    for name in ("tempered", "plain", "interrupted", "classes"):
        assert pixels(done.folder / f"{name}.png").shape == (64, 96, 3)
    assert "Size: 96x64," in parameters(done.folder / "tempered.png")


def test_accents_emoji_and_a_negative_prompt_are_kept(tmp_path: Path) -> None:
    prompts, negative = ["un café ñandú", "a robot 🤖"], "niebla, «gris»"
    texts = ("--prompts", *prompts, "--negative_prompt", negative, "--joiner", " y ")
    done = call(PAINT, *FEW, *texts, "--output", str(tmp_path))
    assert (done.code, done.err) == (0, "")
    assert re.fullmatch(r"\d{8}-\d{6}-un-cafe-nandu-y-a-robot", done.folder.name)
    assert done.run["arguments"]["prompts"] == prompts
    assert done.run["arguments"]["negative_prompt"] == negative
    first, second, _ = parameters(done.folder / "tempered.png").splitlines()
    assert (first, second) == ("un café ñandú y a robot 🤖", f"Negative prompt: {negative}")


# ---- An evaluation ----


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """An evaluation that nothing interrupted."""
    output = str(tmp_path_factory.mktemp("evaluation"))
    return call(MEASURE, *FEW, "--cycles", str(CYCLES), "--output", output)


@pytest.fixture
def copied(evaluation: Done, tmp_path: Path) -> Path:
    """A copy of the evaluation's folder, to be changed."""
    return shutil.copytree(evaluation.folder, tmp_path / "copied")


def rows_of(folder: Path) -> list[Row]:
    """The cycles of all processes, by seed, as `outputs` reads them."""
    files = folder.glob("cycles*.jsonl")
    rows = [row for file in files for row in outputs.read_json_lines(file)]
    return sorted(rows, key=lambda row: row["seed"])


def figures(rows: list[Row]) -> list[Row]:
    """What must not depend on when and in how many parts the cycles ran."""
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def picture_figures(rows: list[Row], name: str) -> list[PictureMetrics]:
    return [PictureMetrics(*(row[name][key] for key in ("ppv", "npv", "js"))) for row in rows]


def summary_of(rows: list[Row]) -> dict[str, Paired]:
    return summarise(picture_figures(rows, "plain"), picture_figures(rows, "tempered"))


def pictures_of(seeds: range) -> set[str]:
    return {f"{seed}-{name}.png" for seed in seeds for name in ("plain", "tempered")}


def assert_summary_agrees(folder: Path, cycles: int) -> None:
    """The summary's files say what follows from the lines of the cycles."""
    rows = rows_of(folder)
    assert [row["seed"] for row in rows] == list(range(2024, 2024 + cycles))
    expected = {name: asdict(row) for name, row in summary_of(rows).items()}
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert summary["metrics"] == expected
    assert (summary["cycles"], summary["unet_calls"]) == (cycles, cycles * CALLS)
    with (folder / "summary.csv").open(encoding="utf-8", newline="") as file:
        table = {row.pop("metric"): row for row in csv.DictReader(file)}
    for name, row in expected.items():
        cells = {key: cell(value) for key, value in table[name].items() if key in row}
        assert cells == row


def cell(text: str) -> float | None:
    return float(text) if text else None


def state_of(folder: Path) -> dict[str, int]:
    """When each picture was written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("[0-9]*.png")}


OF_A_SAMPLE = {"calibration.json", "energies.jsonl"}  # which a single round does not need


def test_an_evaluation_leaves_the_files_of_readme(evaluation: Done) -> None:
    _, added = files_in_readme()
    assert evaluation.code == 0
    assert added == {
        *("run.json", "cycles.jsonl", "summary.json", "summary.csv", "summary.md"),
        *("scatter.png", "sheet.png", "report.html", "notes-pocket.jsonl"),
        *OF_A_SAMPLE,
    }
    pictures = pictures_of(range(2024, 2024 + CYCLES))
    assert names(evaluation.folder) == {*added, *pictures} - OF_A_SAMPLE


def test_a_line_a_cycle_with_its_figures(evaluation: Done) -> None:
    lines = (evaluation.folder / "cycles.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["cycle"] for row in rows] == list(range(1, CYCLES + 1))
    assert [row["seed"] for row in rows] == list(range(2024, 2024 + CYCLES))
    assert [row["unet_calls"] for row in rows] == [CALLS] * CYCLES
    assert min(row["seconds"] for row in rows) > 0
    for row in rows:
        for name in ("plain", "tempered"):
            matrix = row[name]["class_matrix"]
            assert np.shape(matrix) == (2, 2)
            assert row[name] == {**asdict(picture_metrics(matrix)), "class_matrix": matrix}


def test_the_summary_agrees_with_the_cycles(evaluation: Done, tmp_path: Path) -> None:
    assert_summary_agrees(evaluation.folder, CYCLES)
    rows = rows_of(evaluation.folder)
    plot = scatter(
        picture_figures(rows, "plain"), picture_figures(rows, "tempered"), f"{PROMPT} (pocket)"
    )
    outputs.save_figure(tmp_path / "scatter.png", plot)
    assert (pixels(evaluation.folder / "scatter.png") == pixels(tmp_path / "scatter.png")).all()


def test_an_evaluation_tells_cycles_summary_and_folder(evaluation: Done) -> None:
    rows = rows_of(evaluation.folder)
    lines = evaluation.out.splitlines()
    for line, row in zip(lines, rows, strict=False):
        assert line.startswith(f"cycle {row['cycle']}  seed {row['seed']}  plain PPV ")
        assert f"tempered PPV {row['tempered']['ppv']:.3f}  NPV " in line
    titles = [line for line in lines[CYCLES:] if re.match("all OK|faults|figures|cost", line)]
    assert [title.split(",")[0].split(":")[0] for title in titles] == [
        "all OK",
        "faults",
        "figures",
        "cost",
    ]
    for name, found in summary_of(rows).items():
        told = next(line for line in lines if line.lower().startswith(f"{name} "))
        assert f"{found.plain_mean:.4f}  " in told
        assert f"{found.difference_mean:+.4f} (" in told
    assert lines[-1] == str(evaluation.folder)
    assert evaluation.err == ""


def test_run_json_of_an_evaluation_repeats_it(evaluation: Done, tmp_path: Path) -> None:
    run = str(evaluation.folder / "run.json")
    again = call("--repeat", run, "--cycles", "2", "--output", str(tmp_path))
    assert again.code == 0
    assert figures(rows_of(again.folder)) == figures(rows_of(evaluation.folder))[:2]
    for name in pictures_of(range(2024, 2026)):
        assert_same_bytes(again.folder, evaluation.folder, (name,))


def test_a_cycles_pictures_are_those_of_tempered_inference(
    evaluation: Done, tmp_path: Path
) -> None:
    run = str(evaluation.folder / "run.json")
    words = ("--seed", "2025", "--compare", "--output", str(tmp_path))
    for done in (call(PAINT, *FEW, *words), call(PAINT, "--repeat", run, *words)):
        assert done.code == 0
        for name in ("plain", "tempered"):
            there = evaluation.folder / f"2025-{name}.png"
            assert (done.folder / f"{name}.png").read_bytes() == there.read_bytes()
            row = rows_of(evaluation.folder)[1]
            assert done.run[name]["class_matrix"] == row[name]["class_matrix"]


# ---- Interruption and resumption ----


@dataclass(frozen=True)
class Interrupted:
    """An evaluation that Ctrl-C ended, as it was left."""

    done: Done
    folder: Path
    lines: bytes
    pictures: Mapping[str, int]

    @property
    def kept(self) -> int:
        return self.lines.count(b"\n")


MANY = 12  # so many cycles that the signal comes long before the last one


def wait_for_rows(process: subprocess.Popen[str], output: Path, files: int = 1) -> None:
    """Wait until so many processes have finished a cycle."""
    until = time.monotonic() + PATIENCE
    while sum(file.stat().st_size > 0 for file in output.glob("*/cycles*.jsonl")) < files:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.005)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Interrupted:
    """An evaluation that got SIGINT when its first cycle was on the disk."""
    if os.name == "nt":
        pytest.skip("Windows has no SIGINT for one process")
    output = tmp_path_factory.mktemp("my runs")  # a space, as folders of users have
    process = start(MEASURE, *FEW, "--cycles", str(MANY), "--output", str(output))
    wait_for_rows(process, output)
    process.send_signal(signal.SIGINT)
    done = finish(process)
    folder = next(output.iterdir())
    return Interrupted(done, folder, (folder / "cycles.jsonl").read_bytes(), state_of(folder))


@pytest.fixture(scope="module")
def resumed(interrupted: Interrupted) -> Done:
    """The same evaluation after its resumption."""
    return call("--resume", str(interrupted.folder))


def test_ctrl_c_keeps_the_finished_cycles_and_says_how_to_go_on(interrupted: Interrupted) -> None:
    assert interrupted.done.code == 130
    assert 1 <= interrupted.kept < MANY
    rows = [json.loads(line) for line in interrupted.lines.splitlines()]
    assert [row["cycle"] for row in rows] == list(range(1, interrupted.kept + 1))
    assert len(interrupted.done.out.splitlines()) in (interrupted.kept, interrupted.kept - 1)
    kept, *rest = interrupted.done.err.splitlines()
    assert kept.startswith(f"kept {interrupted.kept} of {MANY} cycles; go on with: python init.py ")
    assert rest == ["interrupted"]
    assert [path for path in interrupted.folder.iterdir() if path.suffix == ".tmp"] == []


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
def test_what_ends_a_job_ends_it_as_ctrl_c_does(tmp_path: Path) -> None:
    """As docker, slurm and torchrun send it: maybe several times."""
    process = start(MEASURE, *FEW, "--cycles", str(MANY), "--output", str(tmp_path))
    wait_for_rows(process, tmp_path)
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
    done = finish(process)
    folder = next(tmp_path.iterdir())
    kept = len(rows_of(folder))
    words = f"kept {kept} of {MANY} cycles; go on with: python init.py --resume {folder}"
    assert (done.code, done.err) == (130, f"{words}\ninterrupted\n")
    assert [path for path in folder.iterdir() if path.name.startswith(".")] == []


def test_the_way_to_go_on_can_be_pasted(interrupted: Interrupted) -> None:
    command = shlex.split(interrupted.done.err.splitlines()[0].split("go on with: ")[1])
    assert command == ["python", "init.py", "--resume", str(interrupted.folder)]


def test_a_resumed_evaluation_computes_no_cycle_twice(
    interrupted: Interrupted, resumed: Done
) -> None:
    assert (resumed.code, resumed.err) == (0, "")
    lines = (interrupted.folder / "cycles.jsonl").read_bytes()
    assert lines.startswith(interrupted.lines)
    assert lines.count(b"\n") == MANY
    cycles = [line for line in resumed.out.splitlines() if line.startswith("cycle ")]
    assert len(cycles) == MANY - interrupted.kept
    finished = pictures_of(range(2024, 2024 + interrupted.kept))
    now = state_of(interrupted.folder)
    assert {name: now[name] for name in finished} == {
        name: interrupted.pictures[name] for name in finished
    }
    assert_summary_agrees(interrupted.folder, MANY)


def test_a_resumed_evaluation_has_the_figures_of_an_uninterrupted_one(
    interrupted: Interrupted, resumed: Done, evaluation: Done
) -> None:
    assert interrupted.kept < CYCLES
    assert figures(rows_of(resumed.folder))[:CYCLES] == figures(rows_of(evaluation.folder))
    assert names(resumed.folder) == names(evaluation.folder) | pictures_of(range(2024, 2024 + MANY))


@pytest.fixture
def cut(copied: Path) -> Path:
    """The evaluation as a kill in the middle of its last line would have left it."""
    for name in ("summary.json", "summary.csv", "scatter.png"):
        (copied / name).unlink()
    whole = (copied / "cycles.jsonl").read_bytes()
    (copied / "cycles.jsonl").write_bytes(whole[: whole.rstrip().rindex(b"\n") + 40])
    return copied


def test_a_line_that_was_cut_off_is_computed_again(cut: Path, evaluation: Done) -> None:
    done = call("--resume", str(cut))
    assert (done.code, done.err) == (0, "")
    assert sum(line.startswith("cycle ") for line in done.out.splitlines()) == 1
    assert figures(rows_of(cut)) == figures(rows_of(evaluation.folder))
    assert_summary_agrees(cut, CYCLES)


def test_after_a_recovery_every_line_is_json_again(cut: Path) -> None:
    assert call("--resume", str(cut)).code == 0
    lines = (cut / "cycles.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == CYCLES
    assert [json.loads(line)["cycle"] for line in lines] == list(range(1, CYCLES + 1))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--steps", "5"), "--resume must keep the run's own --steps 4"),
        (("--seed", "1"), "--resume must keep the run's own --seed 2024"),
        (
            ("--prompts", "a red car"),
            "--resume must keep the run's own --prompts ['a black dog', 'a toy robot']",
        ),
        (("--model", "nobody/nothing"), "--resume must keep the run's own --model 'pocket'"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_resuming_with_other_settings_is_refused(
    words: tuple[str, ...], line: str, copied: Path
) -> None:
    before = {path.name: path.read_bytes() for path in copied.iterdir()}
    assert call("--resume", str(copied), *words) == Done(2, "", f"error: {line}\n")
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == before


@pytest.mark.parametrize(
    ("of", "flow"),
    [("picture", ()), ("picture", (MEASURE,)), ("evaluation", (PAINT,))],
    ids=["a picture", "a picture, to evaluate", "an evaluation, to paint"],
)
def test_only_an_evaluation_can_be_resumed(
    of: str, flow: tuple[str, ...], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    run: Done = request.getfixturevalue(of)
    folder = shutil.copytree(run.folder, tmp_path / "copied")
    done = call("--resume", str(folder), *flow, "--output", str(tmp_path / "runs"))
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert done.err.startswith("error: --resume ")
    assert names(folder) == names(run.folder)
    assert not (tmp_path / "runs").exists()


def test_more_cycles_extend_a_finished_evaluation(copied: Path) -> None:
    lines, pictures = (copied / "cycles.jsonl").read_bytes(), state_of(copied)
    done = call("--resume", str(copied), "--cycles", str(CYCLES + 2))
    assert (done.code, done.err) == (0, "")
    assert (copied / "cycles.jsonl").read_bytes().startswith(lines)
    now = state_of(copied)
    assert {name: now[name] for name in pictures} == pictures
    assert_summary_agrees(copied, CYCLES + 2)
    assert run_of(copied)["arguments"]["cycles"] == CYCLES + 2


def test_an_evaluation_goes_on_after_a_full_disk(
    evaluation: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, written = os.fsync, 0

    def fsync(descriptor: int) -> None:
        nonlocal written
        written += 1
        if written > 5:  # run.json, then two pictures and a line a cycle
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        full = call(MEASURE, *FEW, "--cycles", "3", "--output", str(tmp_path))
    folder = next(tmp_path.iterdir())
    assert full.code == 1
    kept = "kept 1 of 3 cycles; go on with: python init.py --resume [^\n]*\n"
    line = "error: disk full: can not write [^\n]*2025-tempered.png[^\n]*\n"
    assert re.fullmatch(kept + line, full.err)
    assert names(folder) == {"run.json", "cycles.jsonl", *pictures_of(range(2024, 2025))} | {
        "2025-plain.png"
    }
    done = call("--resume", str(folder))
    assert done.code == 0
    assert figures(rows_of(folder)) == figures(rows_of(evaluation.folder))[:3]
    assert_summary_agrees(folder, 3)


def painted(done: Done) -> int:
    return sum(line.startswith("cycle ") for line in done.out.splitlines())


def lost(path: Path) -> None:
    path.unlink()


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def one_bit_off(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:99] + bytes([data[99] ^ 1]) + data[100:])


@pytest.mark.parametrize(
    ("damage", "seed"),
    [
        *((each, 2024 + MANY - 1) for each in (lost, emptied, cut_short, one_bit_off)),
        (one_bit_off, 2024),  # one that is on the sheet
    ],
)
def test_a_picture_that_was_lost_or_damaged_is_painted_again(
    damage: Callable[[Path], None], seed: int, resumed: Done, tmp_path: Path
) -> None:
    folder = shutil.copytree(resumed.folder, tmp_path / "copied")
    damage(folder / f"{seed}-tempered.png")
    done = call("--resume", str(folder))
    assert (done.code, done.err, painted(done)) == (0, "", 1)
    assert_same_bytes(folder, resumed.folder, tuple(pictures_of(range(2024, 2024 + MANY))))
    assert {row["seed"]: row for row in figures(rows_of(folder))} == {
        row["seed"]: row for row in figures(rows_of(resumed.folder))
    }


def test_rows_that_lack_something_are_made_again(copied: Path, evaluation: Done) -> None:
    """What may be lacking, `test_cycles.py` tells."""
    rows = rows_of(copied)
    del rows[1]["model"], rows[2]["plain"]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (copied / "cycles.jsonl").write_text(text, encoding="utf-8")
    done = call("--resume", str(copied))
    assert (done.code, done.err, painted(done)) == (0, "", 2)
    for name in ("summary.csv", "scatter.png"):
        assert_same_bytes(copied, evaluation.folder, (name,))


ALL_FLAGS = (MEASURE, *FEW, "--cycles", str(CYCLES))


@pytest.mark.parametrize("content", [None, "", '{"arguments": ', "[]", '{"arguments": {"k": "x"}}'])
def test_where_run_json_is_damaged_all_flags_given_again_go_on(
    content: str | None, copied: Path, evaluation: Done
) -> None:
    lost(copied / "run.json")
    lost(copied / "2025-plain.png")
    if content is not None:
        (copied / "run.json").write_text(content, encoding="utf-8")
    alone = call("--resume", str(copied))
    assert (alone.code, alone.out, alone.err.count("\n")) == (2, "", 1)
    assert "all flags of the first call are given again, --evaluate among them" in alone.err
    done = call("--resume", str(copied), *ALL_FLAGS)
    assert (done.code, done.err, painted(done)) == (0, "", 1)
    assert run_of(copied)["arguments"] == evaluation.run["arguments"]
    assert figures(rows_of(copied))[:1] == figures(rows_of(evaluation.folder))[:1]


def test_where_run_json_is_lost_other_flags_than_the_runs_own_are_refused(copied: Path) -> None:
    lost(copied / "run.json")
    for other in ("--k 3", "--accept 0.1", "--look_guidance 3", "--steps 5", "--seed 1"):
        refused = call("--resume", str(copied), *ALL_FLAGS, *other.split())
        assert (refused.code, painted(refused)) == (2, 0)
        assert "its cycles were made by others than these" in refused.err


def test_two_resumptions_at_once_paint_no_cycle_twice(copied: Path) -> None:
    (copied / "cycles.jsonl").write_bytes(b"")
    ended = [finish(each) for each in [start("--resume", str(copied)) for _ in range(2)]]
    assert sum(map(painted, ended)) == CYCLES
    assert 0 in [done.code for done in ended]
    for done in ended:
        if done.code:
            assert done.code == 1
            assert done.err.startswith("error: another run paints cycles in this folder: wait ")
    assert_summary_agrees(copied, CYCLES)
    assert [path for path in copied.iterdir() if path.name.startswith(".")] == []


def untimed(table: list[str]) -> list[str]:
    """Without the seconds at the end of a line."""
    assert table
    return [re.sub(r" +[0-9.]+$", "", line) for line in table]


def test_a_disk_that_fills_up_at_the_sheet_costs_the_sheet_and_not_the_table(
    evaluation: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = outputs._write

    def full(path: Path, data: bytes) -> None:
        if path.name == "sheet.png":
            raise ResourceError(f"disk full: can not write {path}; the files before it are kept")
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(outputs, "_write", full)
        done = call(MEASURE, *FEW, "--cycles", str(CYCLES), "--output", str(tmp_path))
    assert done.code == 1
    assert untimed(done.out.splitlines()[CYCLES:]) == untimed(
        evaluation.out.splitlines()[CYCLES:-1]
    )
    words, error = done.err.splitlines()
    assert words.startswith(
        f"kept {CYCLES} of {CYCLES} cycles; go on with: python init.py --resume"
    )
    assert error.startswith("error: disk full: can not write ")


# ---- Several processes ----


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_when_one_of_several_is_killed_the_others_last_words_say_how_to_go_on(
    tmp_path: Path,
) -> None:
    """torchrun ends the others then."""
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    words = (MEASURE, *FEW, "--cycles", "40", "--output", str(tmp_path))
    process = subprocess.Popen(
        [*launcher, "--nproc_per_node", "2", "main.py", *words],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    wait_for_rows(process, tmp_path, files=2)
    os.kill(children(process.pid)[0], signal.SIGKILL)
    done = finish(process)
    folder = next(tmp_path.iterdir())
    assert re.search(r"^kept \d+ of 40 cycles; go on with: ", done.err, re.MULTILINE)
    assert f"go on with: python init.py --resume {folder}\ninterrupted\n" in done.err
    resumed = call("--resume", str(folder), "--cycles", "6")
    assert resumed.code == 0
    assert {row["seed"] for row in rows_of(folder)} >= set(range(2024, 2030))


def children(process: int) -> list[int]:
    listed = subprocess.run(
        ["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True
    )
    pairs = [tuple(map(int, line.split())) for line in listed.stdout.splitlines()]
    return [child for child, parent in pairs if parent == process]


def test_two_processes_share_the_cycles(evaluation: Done, tmp_path: Path) -> None:
    """In the environment that accelerate's and torch's launchers give to each process."""
    address = closed_url()  # a free port: the first process listens there for the second
    host, port = address.removeprefix("http://").split(":")
    words = (MEASURE, *FEW, "--cycles", str(CYCLES), "--output", str(tmp_path))
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": host, "MASTER_PORT": port}
    ranks = [{**os.environ, **common, "RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
    processes = [start(*words, env=env) for env in ranks]
    ended = [finish(process) for process in processes]
    assert [done.code for done in ended] == [0, 0], [done.err for done in ended]
    assert [path.is_dir() for path in tmp_path.iterdir()] == [True]  # they agreed on one folder
    folder = next(tmp_path.iterdir())
    rows = rows_of(folder)
    for done in ended:
        assert sum(line.startswith("cycle ") for line in done.out.splitlines()) == CYCLES // 2
    assert_summary_agrees(folder, CYCLES)
    assert figures(rows) == figures(rows_of(evaluation.folder))


# ---- Without a Hub, and with one ----


def commands_in_readme() -> list[list[str]]:
    """README's three examples for main.py, word for word."""
    lines = re.findall(r"^python main\.py .*$", README, re.MULTILINE)
    return [shlex.split(line)[2:] for line in lines]


@pytest.fixture(scope="module")
def without_hub(tmp_path_factory: pytest.TempPathFactory) -> list[Done]:
    """README's examples where the Hub can not be reached and nothing is in its cache."""
    home, output = tmp_path_factory.mktemp("home"), str(tmp_path_factory.mktemp("outputs"))
    env = hub_environment(closed_url(), home)
    processes = [start(*words, "--output", output, env=env) for words in commands_in_readme()]
    return [finish(process) for process in processes]


def test_readme_has_an_example_of_each_flow() -> None:
    assert [words[0] for words in commands_in_readme()] == [PAINT, MEASURE, MEASURE]


def test_the_examples_of_readme_run_without_a_hub_and_say_what_they_are(
    without_hub: list[Done],
) -> None:
    for done in without_hub:
        assert done.code == 0, done.err
        run = done.run
        assert (run["model"], run["clipseg"]) == ("pocket", "pocket")
        assert "NOT STABLE DIFFUSION" in run["notice"]
        assert done.err == run["notice"] + "\n"  # the notice and nothing else
        for picture in done.folder.glob("*tempered.png"):
            assert "Model: pocket," in parameters(picture)


def test_the_examples_of_readme_make_what_they_ask_for(without_hub: list[Done]) -> None:
    picture, annealed, once = without_hub
    assert names(picture.folder) == {*PICTURES, "kept.png", "run.json"} - {"plain.png"}
    assert [row["unet_calls"] for row in rows_of(once.folder)] == [30] * 4
    for evaluation in (annealed, once):
        summary = json.loads((evaluation.folder / "summary.json").read_text(encoding="utf-8"))
        assert summary["notice"] == evaluation.run["notice"]
        calls = [row["unet_calls"] for row in rows_of(evaluation.folder)]
        assert summary["unet_calls"] == sum(calls)


def test_repeat_of_a_run_without_a_hub_runs_the_model_that_ran(
    without_hub: list[Done], tmp_path: Path
) -> None:
    picture = without_hub[0]
    again = call("--repeat", str(picture.folder / "run.json"), "--output", str(tmp_path))
    assert (again.code, again.err) == (0, "")
    files = tuple(name for name in PICTURES if name != "plain.png")
    assert_same_bytes(again.folder, picture.folder, files)


def test_the_first_run_downloads_and_the_next_ones_need_no_network(tmp_path: Path) -> None:
    words = (PAINT, *STEPS, "--device", "cpu", "--output", str(tmp_path / "outputs"))
    with Hub(pocket_repositories()) as hub:
        env = hub.environment(tmp_path / "home")
        first = finish(start(*words, env=env))
        assert first.code == 0, first.err
        fetched = {path.rpartition("/")[0] for path in hub.downloads()}
    assert {f"{STABLE_DIFFUSION}/unet", CLIPSEG} <= fetched
    second = finish(start(*words, "--offline", env=env))
    assert (second.code, second.err) == (0, "")
    for done in (first, second):
        assert (done.run["model"], done.run["clipseg"]) == (STABLE_DIFFUSION, CLIPSEG)
        assert done.run["notice"] is None
        assert f"Model: {STABLE_DIFFUSION}," in parameters(done.folder / "tempered.png")
    files = tuple(name for name in PICTURES if name != "plain.png")
    assert_same_bytes(first.folder, second.folder, files)
