"""The command line: what it refuses and in which words, how fast, and what README says of it."""

from __future__ import annotations

import ast
import errno
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import evaluation
import hub
import inference
import kinds
import loaders
import loras
import main
import sampling
from settings import DEFAULT_WAY, VERSION, Request, Tempering

REPOSITORY = Path(main.__file__).parent
FULL_DISK = Path("/dev/full")
POCKET = REPOSITORY / "pocket" / "weights" / "stable-diffusion"
UNET = Path("unet", "diffusion_pytorch_model.safetensors")
TABLES = ("README.md", "README.es.md")
INIT_ALONE = {"--test"}
PAINT, MEASURE = "--tempered_inference", "--evaluate"
FEW = (
    *("--model", "pocket", "--device", "cpu"),
    *("--steps", "4", "--stoptime", "3", "--backsteps", "1", "--rounds", "1"),
)
ONE_FLOW = "exactly one of --tempered_inference, --evaluate, --update is needed, got"
STEPS = "a whole number in 1..1000 (the steps of the model's own schedule)"
MODEL = "--model must be a folder, a .safetensors file, a Hub id or pocket, but"

# Words of the command line, and the one line that they get after "error: ".
BAD: dict[str, tuple[list[str], str]] = {
    "no flow": ([], f"{ONE_FLOW} none"),
    "two flows": ([PAINT, MEASURE], f"{ONE_FLOW} --tempered_inference and --evaluate"),
    "update and a flow": ([MEASURE, "--update"], f"{ONE_FLOW} --evaluate and --update"),
    "no prompt": (
        [PAINT, "--prompts"],
        "argument --prompts: expected at least one argument (see --help)",
    ),
    "an empty prompt": (
        [PAINT, "--prompts", "a black dog", ""],
        "prompt 2 must not be empty, got ''",
    ),
    "a blank prompt": ([PAINT, "--prompts", " \t"], "prompt 1 must not be empty, got ' \\t'"),
    "steps 0": ([PAINT, "--steps", "0"], f"steps must be {STEPS}, got 0"),
    "steps -3": ([PAINT, "--steps", "-3"], f"steps must be {STEPS}, got -3"),
    "steps 1001": ([PAINT, "--steps", "1001"], f"steps must be {STEPS}, got 1001"),
    "steps 0.5": (
        [PAINT, "--steps", "0.5"],
        "argument --steps: invalid int value: '0.5' (see --help)",
    ),
    "stoptime 0": (
        [PAINT, "--stoptime", "0"],
        "stoptime must be a whole number in 1..20 (the number of steps), got 0",
    ),
    "stoptime over steps": (
        [PAINT, "--steps", "10", "--stoptime", "11"],
        "stoptime must be a whole number in 1..10 (the number of steps), got 11",
    ),
    "early stoptime, late backsteps": (
        [PAINT, "--steps", "10", "--stoptime", "5", "--backsteps", "6"],
        "backsteps must be a whole number in 0..5 (the stoptime), got 6",
    ),
    "an invalid byte": (
        [PAINT, "--prompts", "a black dog", "a toy \udcff"],
        "prompt 2 must be a text in UTF-8, got 'a toy \\udcff'",
    ),
    "an invalid byte to keep out": (
        [PAINT, "--negative_prompt", "\udcff"],
        "negative_prompt must be a text in UTF-8, got '\\udcff'",
    ),
    "a folder that can not be": (
        ["--resume", "x" * 5000],
        f"needs the run.json of an earlier run, got {'x' * 5000}/run.json: it can not be read as "
        f"JSON ({os.strerror(errno.ENAMETOOLONG)})",
    ),
    "backsteps -1": (
        [PAINT, "--backsteps", "-1"],
        "backsteps must be a whole number in 0..15 (the stoptime), got -1",
    ),
    "backsteps over stoptime": (
        [PAINT, "--stoptime", "3", "--backsteps", "4"],
        "backsteps must be a whole number in 0..3 (the stoptime), got 4",
    ),
    "k -1": ([PAINT, "--k", "-1"], "k must be a finite number of at least 0, got -1.0"),
    "k nan": ([PAINT, "--k", "nan"], "k must be a finite number of at least 0, got nan"),
    "k inf": ([PAINT, "--k", "inf"], "k must be a finite number of at least 0, got inf"),
    "k -inf": ([PAINT, "--k=-inf"], "k must be a finite number of at least 0, got -inf"),
    "rounds 0": ([PAINT, "--rounds", "0"], "rounds must be a whole number of at least 1, got 0"),
    "early_look -1": (
        [PAINT, "--early_look", "-1"],
        "early_look must be a whole number of at least 0, got -1",
    ),
    "early_accept -1": (
        [PAINT, "--early_accept", "-1"],
        "early_accept must be a finite number of at least 0, got -1.0",
    ),
    "look_guidance nan": (
        [PAINT, "--look_guidance", "nan"],
        "look_guidance must be a finite number of at least 0, got nan",
    ),
    "accept -1": (
        [PAINT, "--accept", "-1"],
        "accept must be a finite number of at least 0, got -1.0",
    ),
    "budget 0.5": (
        [PAINT, "--budget", "0.5"],
        "budget must be a finite number of at least 1, got 0.5",
    ),
    "max_cost nan": (
        [PAINT, "--max_cost", "nan"],
        "max_cost must be a finite number of at least 1, got nan",
    ),
    "temperature nan": (
        [PAINT, "--temperature", "nan"],
        "temperature must be a finite number of at least 0, got nan",
    ),
    "cooling 2": ([PAINT, "--cooling", "2"], "cooling must be a finite number in 0..1, got 2.0"),
    "candidates 0": (
        [MEASURE, "--candidates", "0"],
        "candidates must be a whole number in 1..1000, got 0",
    ),
    "background 2": (
        [PAINT, "--background", "2"],
        "background must be a finite number in 0..1, got 2.0",
    ),
    "cfg_rescale nan": (
        [PAINT, "--cfg_rescale", "nan"],
        "cfg_rescale must be a finite number of at least 0, got nan",
    ),
    "guidance_scale inf": (
        [PAINT, "--guidance_scale", "inf"],
        "guidance_scale must be a finite number of at least 0, got inf",
    ),
    "threshold 2": (
        [PAINT, "--threshold", "2"],
        "threshold must be a finite number in 0..1, got 2.0",
    ),
    "cycles 0": ([MEASURE, "--cycles", "0"], "cycles must be a whole number in 1..1000000, got 0"),
    "cycles beyond count": (
        [MEASURE, "--cycles", "1000000000"],
        "cycles must be a whole number in 1..1000000, got 1000000000",
    ),
    "cycles of many prompts": (
        [MEASURE, "--prompts_file", "attend-and-excite", "--cycles", "4000"],
        "cycles must be a whole number in 1..3623 (1000000 in all, of 276 prompts), got 4000",
    ),
    "candidates beyond memory": (
        [PAINT, "--candidates", "1000000000"],
        "candidates must be a whole number in 1..1000, got 1000000000",
    ),
    "a LoRA that can not be": (
        [PAINT, "--lora", f"{'x' * 400}:1"],
        f"--lora must be {loras.FORMS}, but '{'x' * 400}:1' can not be read "
        f"([Errno {errno.ENAMETOOLONG}] {os.strerror(errno.ENAMETOOLONG)}: ...)",
    ),
    "seed -1": (
        [PAINT, "--seed", "-1"],
        "seed must be a whole number in 0..4294967295, got -1",
    ),
    "seed of 33 bits": (
        [PAINT, "--seed", "4294967296"],
        "seed must be a whole number in 0..4294967295, got 4294967296",
    ),
    "height 60": ([PAINT, "--height", "60"], "height must be a multiple of 8 pixels, got 60"),
    "width 0": ([PAINT, "--width", "0"], "width must be a multiple of 8 pixels, got 0"),
    "width -8": ([MEASURE, "--width", "-8"], "width must be a multiple of 8 pixels, got -8"),
    "scheduler": (
        [PAINT, "--scheduler", "eulre"],
        f"--scheduler must be one of {', '.join(loaders.SCHEDULERS)}, got 'eulre'",
    ),
    "model of words": ([PAINT, "--model", "a good one"], f"{MODEL} 'a good one' is none of them"),
    "model of nothing": ([PAINT, "--model", ""], f"{MODEL} '' is none of them"),
    "model nowhere": (
        [PAINT, "--model", "./no/such/model"],
        f"{MODEL} './no/such/model' does not exist",
    ),
    "model of no text": (
        [PAINT, "--model", "mo\udcffdel"],
        f"{MODEL} 'mo\\udcffdel' can not be read ('utf-8' codec can't encode character "
        "'\\udcff' in position 2: surrogates not allowed)",
    ),
    "model pickled": (
        [PAINT, "--model", "sd-v1-4.ckpt"],
        f"{MODEL} 'sd-v1-4.ckpt' is a .ckpt file, which can run code when it is loaded",
    ),
    "clipseg nowhere": (
        [PAINT, "--clipseg", "./no/such"],
        "--clipseg must be a folder, a Hub id or pocket, but './no/such' does not exist",
    ),
    "unknown flag": (
        [PAINT, "--annealing"],
        "unrecognized arguments: --annealing (see --help)",
    ),
    "flag cut short": ([PAINT, "--step", "4"], "unrecognized arguments: --step 4 (see --help)"),
    "repeat and resume": (
        ["--repeat", "a", "--resume", "b"],
        "--repeat and --resume exclude each other, got both",
    ),
}
HEAVY = ("torch", "diffusers", "transformers", "huggingface_hub", "numpy", "scipy", "PIL")
# Runs commands from stdin in one process; says how each ended and what was imported by then.
PROBE = f"""
import json, main, sys
for words in json.load(sys.stdin):
    code = main.main(words)
    print(json.dumps([words, code, [name for name in {HEAVY} if name in sys.modules]]))
"""


def refusal(words: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """The one line on stderr, without "error: ", that is all that these words get."""
    assert main.main(words) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"error: [^\n\r]+\n", err), err
    return err[len("error: ") : -1]


def empty_model(folder: Path) -> Path:
    """A folder with all of the pocket's files, whose weights are empty."""
    shutil.copytree(POCKET, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    for weights in POCKET.rglob("*.safetensors"):
        (folder / weights.relative_to(POCKET)).touch()
    return folder


# ---- Bad input ----


@pytest.mark.parametrize(("words", "line"), BAD.values(), ids=BAD)
def test_bad_input_gets_one_line_and_code_2(
    words: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refusal(words, capsys) == line


def test_a_choice_that_is_none_names_the_choices(capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal([PAINT, "--preview", "photo"], capsys)
    assert re.fullmatch("argument --preview: .*'photo'.*vae.*linear.*", line)


def test_a_flag_of_two_lines_gets_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--anneal" in refusal([PAINT, "--anneal\ning"], capsys)


def test_bad_input_is_refused_without_importing_anything_heavy() -> None:
    probe = subprocess.run(
        [sys.executable, "-c", PROBE],
        cwd=REPOSITORY,
        input=json.dumps([words for words, _ in BAD.values()]),
        capture_output=True,
        text=True,
    )
    found = [json.loads(line) for line in probe.stdout.splitlines()]
    assert len(found) == len(BAD), probe.stderr
    assert [answer for answer in found if answer[1:] != [2, []]] == []


@pytest.mark.parametrize(
    "part",
    [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "tokenizer/tokenizer_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ],
)
def test_a_model_folder_that_lacks_a_part_is_refused_by_its_name(
    part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = empty_model(tmp_path / "painter")
    (folder / part).unlink()
    line = refusal([PAINT, "--model", str(folder)], capsys)
    assert line == f"{MODEL} {str(folder)!r} lacks {part}"


def test_a_model_folder_names_all_that_it_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = empty_model(tmp_path / "painter")
    shutil.rmtree(folder / "vae")
    line = refusal([MEASURE, "--model", str(folder)], capsys)
    lacks = "lacks vae/config.json, vae/diffusion_pytorch_model.safetensors"
    assert line == f"{MODEL} {str(folder)!r} {lacks}"


def test_an_output_folder_inside_a_file_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "notes.txt"
    file.touch()
    line = refusal([PAINT, "--output", str(file / "runs")], capsys)
    assert line == f"the output folder must be a folder: {file / 'runs'} ({file} is not one)"


def test_an_output_folder_that_the_disk_refuses_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / ("x" * 300)  # longer than a name may be on any file system in use
    assert refusal([PAINT, "--output", str(folder)], capsys).startswith(
        f"the output folder must be writable: {folder} ("
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write all")
def test_an_output_folder_without_permission_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tmp_path.chmod(0o500)
    reason = os.strerror(errno.EACCES)
    line = refusal([PAINT, "--output", str(tmp_path)], capsys)
    tmp_path.chmod(0o700)
    assert line == f"the output folder must be writable: {tmp_path} ({reason})"


@pytest.mark.parametrize(
    ("words", "pattern"),
    [
        (["--device", "cuda:99"], r"--device must be present \(.*cpu\), got 'cuda:99'"),
        (["--device", "abacus"], r"--device must be present \(.*cpu\), got 'abacus'"),
        (["--dtype", "fp8"], "--dtype must be one of fp16, bf16, fp32, got 'fp8'"),
        (
            ["--device", "cpu", "--dtype", "fp16"],
            "--dtype must be bf16 or fp32 on the cpu, got 'fp16'",
        ),
        (["--offload", "disk"], "--offload must be one of model, sequential, got 'disk'"),
        (
            ["--device", "cpu", "--offload", "model"],
            "--offload needs a GPU, but this run is on the cpu, got 'model'",
        ),
    ],
    ids=" ".join,
)
def test_a_machine_that_is_not_there_is_refused_before_weights_load(
    words: list[str], pattern: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = empty_model(tmp_path / "broken")  # loading it would be another error, with code 1
    assert re.fullmatch(pattern, refusal([PAINT, "--model", str(broken), *words], capsys))


@pytest.mark.parametrize(
    "content",
    [None, "", "[]", '{"model": "pocket"}', '{"arguments": []}', '{"arguments": {"k": null}}'],
    ids=str,
)
@pytest.mark.parametrize("flag", ["--repeat", "--resume"])
def test_what_is_no_run_can_neither_be_repeated_nor_resumed(
    flag: str, content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run.json"
    if content is not None:
        run.write_text(content, encoding="utf-8")
    refusal([MEASURE, *FEW, flag, str(run if flag == "--repeat" else tmp_path)], capsys)


# ---- What an earlier run may say ----


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """What the flows are asked for; they do not run."""
    requests: list[Request] = []
    monkeypatch.setattr(inference, "run", requests.append)
    monkeypatch.setattr(evaluation, "run", requests.append)
    return requests


def run_json(folder: Path, **arguments: object) -> Path:
    """The run.json of a picture, as another might have written it."""
    path = folder / "run.json"
    path.write_text(json.dumps({"arguments": {"tempered_inference": True, **arguments}}))
    return path


NOT_TYPED: dict[str, list[object]] = {
    "steps": ["ten", 4.5, True, None, [], {}, 10**30, float("nan")],
    "k": ["much", False, None, [4], float("inf")],
    # Not null: that is what an evaluation of a prompt set says.
    "prompts": ["a black dog", 7, [], ["a black dog", 7], [[]]],
    "joiner": [5, None, [" and "], "\ud800"],
    "offline": ["no", 0, None],
    "compare": ["false", 1],
    "preview": ["photo", 1, None],
    "backend": ["abacus", True, None],
    "compile": ["yes", 1, None],
    "model": [5, ["pocket"], {}],
    "height": ["large", 60, 8.0],
    "seed": [-1, "9" * 20, 2024.0],
}


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in NOT_TYPED.items() for value in values],
    ids=repr,
)
def test_a_value_that_could_not_be_typed_is_refused_by_its_name(
    name: str, value: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_json(tmp_path, **{name: value})
    line = refusal(["--repeat", str(path), "--output", str(tmp_path)], capsys)
    assert name.removesuffix("s") in line  # prompt 2


@pytest.mark.parametrize(
    "name", ["update", "debug", "output", "repeat", "resume", "help", "nobody"]
)
def test_what_does_not_belong_to_the_picture_is_not_taken(
    name: str, tmp_path: Path, asked: list[Request]
) -> None:
    elsewhere = tmp_path / "elsewhere"
    for value in (True, str(elsewhere)):
        path = run_json(tmp_path, k=2, **{name: value})
        assert main.main(["--repeat", str(path), "--output", str(tmp_path / "runs")]) == 0
    assert [(each.settings.k, each.output, each.resume) for each in asked] == [
        (2.0, tmp_path / "runs", None)
    ] * 2
    assert not elsewhere.exists()


def test_a_prompt_that_looks_like_a_flag_is_a_prompt(tmp_path: Path, asked: list[Request]) -> None:
    path = run_json(tmp_path, prompts=["--update", "--evaluate"], joiner="--output=/")
    assert main.main(["--repeat", str(path), "--output", str(tmp_path)]) == 0
    assert (asked[0].prompts, asked[0].settings.joiner) == (
        ("--update", "--evaluate"),
        "--output=/",
    )


def test_a_run_json_that_notepad_saved_is_fine(tmp_path: Path, asked: list[Request]) -> None:
    path = run_json(tmp_path, k=2)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert main.main(["--repeat", str(path), "--output", str(tmp_path)]) == 0
    assert asked[0].settings.k == 2


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def of_100_megabytes(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(100_000_000)


def nested(path: Path) -> None:
    path.write_text("[" * 100_000)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such files")
@pytest.mark.parametrize("make", [a_pipe, endless, of_100_megabytes, nested, Path.mkdir])
@pytest.mark.parametrize("flag", ["--repeat", "--resume"])
def test_what_is_no_run_json_is_refused_at_once(
    flag: str, make: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.json"
    make(path)
    begun = time.monotonic()
    line = refusal([flag, str(path if flag == "--repeat" else tmp_path)], capsys)
    assert line.startswith(f"needs the run.json of an earlier run, got {path}: ")
    assert time.monotonic() - begun < 2


# ---- Flags that follow each other ----


@pytest.mark.parametrize("flow", [PAINT, MEASURE])
def test_steps_alone_take_the_rest_along_into_run_json(
    flow: str, tmp_path: Path, asked: list[Request]
) -> None:
    for steps in ("10", "50"):
        assert main.main([flow, "--steps", steps, "--output", str(tmp_path)]) == 0
    names = ("steps", "stoptime", "backsteps", "early_look")
    told = [[each.arguments[name] for name in names] for each in asked]
    assert told == [[10, 8, 6, 3], [50, 38, 30, 15]]
    assert asked[1].settings == Tempering(steps=50).of_subjects(2)


@pytest.mark.parametrize("name", TABLES)
def test_readme_and_help_say_what_follows_the_steps(name: str) -> None:
    text = " ".join((REPOSITORY / name).read_text(encoding="utf-8").split())
    settings = Tempering(steps=50)
    parts = [getattr(settings, each) for each in DEFAULT_WAY]
    assert re.search(r"\b50 (steps|pasos)\D+{}, {} \w+ {}\b".format(*parts), text)
    told = " ".join(main.parser().format_help().split())
    for part in DEFAULT_WAY.values():
        assert f"(default: {part} of 20 steps, of others as large a share" in told


def test_a_run_repeated_with_other_steps_keeps_its_own_shares(
    tmp_path: Path, asked: list[Request]
) -> None:
    path = str(run_json(tmp_path, steps=20, stoptime=10, backsteps=5, early_look=0))
    words = ["--repeat", path, "--output", str(tmp_path)]
    assert main.main([*words, "--steps", "40"]) == 0
    assert main.main([*words, "--steps", "40", "--stoptime", "15"]) == 0
    assert main.main(words) == 0
    found = [(s.stoptime, s.backsteps, s.early_look) for s in (each.settings for each in asked)]
    assert found == [(20, 10, 0), (15, 10, 0), (10, 5, 0)]


def test_a_prompt_over_the_text_encoders_length_runs_and_the_cut_is_named(tmp_path: Path) -> None:
    # 30 words fit beside the marks of start and end; each prompt does, and the joined one does not.
    prompts = ["a black dog " * 5, "a red car " * 4 + "a blue bird"]
    words = [PAINT, *FEW, "--prompts", *prompts, "--joiner", " next to ", "--output", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "main.py", *words], cwd=REPOSITORY, capture_output=True, text=True
    )
    warning = (
        "Stable Diffusion's CLIP reads 32 tokens, this prompt has 34; without effect: 'blue bird'"
    )
    assert (done.returncode, done.stderr) == (0, f"warning: {warning}\n")


@pytest.mark.skipif(os.name == "nt", reason="Windows keeps the folder that one is in")
def test_a_working_directory_that_was_deleted_is_named(tmp_path: Path) -> None:
    code = (
        f"import os, sys; os.mkdir('gone'); os.chdir('gone'); os.rmdir('../gone');"
        f"sys.path.insert(0, {str(REPOSITORY)!r}); import main; sys.exit(main.main(['{PAINT}']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    line = "error: the working directory must exist, this one was deleted\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)


def test_an_older_python_is_told_which_one_is_needed() -> None:
    """main.py can be read by one, and asks for its version before what that could not import."""
    ast.parse((REPOSITORY / "main.py").read_text(encoding="utf-8"), feature_version=(3, 7))
    pretend = (
        "import runpy, sys; sys.version_info = (3, 8, 18, 'final', 0); sys.modules['hub'] = None;"
        "runpy.run_path('main.py', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", pretend], cwd=REPOSITORY, capture_output=True, text=True
    )
    line = "error: Python 3.10 to 3.13 is needed: start init.py with another one\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)


def test_a_python_without_the_libraries_says_how_to_start(tmp_path: Path) -> None:
    words = [sys.executable, "-S", "main.py", PAINT, "--output", str(tmp_path)]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True)
    line = r"error: \w+ is not installed in this Python: start with `python init.py` and the same "
    assert re.fullmatch(line + r"flags, or activate .venv\n", done.stderr)
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("raised", "reason"),
    [
        ("ImportError('libcudnn.so.9: cannot open')", "libcudnn.so.9: cannot open"),
        ("OSError('libgomp.so.1: cannot open')", "libgomp.so.1: cannot open"),
        ("AttributeError('no Tensor')", "no Tensor"),
    ],
)
def test_libraries_that_do_not_import_are_named(
    raised: str,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "broken.py").write_text(f"raise {raised}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(main.MODULES, "tempered_inference", "broken")
    assert refusal([PAINT, "--output", str(tmp_path)], capsys, code=1) == (
        f"the libraries of this Python can not be imported ({reason}): start with `python init.py` "
        "and the same flags, or activate .venv"
    )


# ---- Speed, help and documents ----


@pytest.mark.parametrize(
    ("words", "code"),
    [(["--help"], 0), (["--version"], 0), ([PAINT, "--steps", "0"], 2), (["--annealing"], 2)],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_help_and_a_bad_argument_answer_in_under_300_milliseconds(
    words: list[str], code: int
) -> None:
    """Processor time, so that other programs on the machine do not count; the best of five."""
    spent = []
    for _ in range(5):
        before, begun = os.times(), time.perf_counter()
        done = subprocess.run(
            [sys.executable, "main.py", *words], cwd=REPOSITORY, capture_output=True
        )
        after, seconds = os.times(), time.perf_counter() - begun
        assert done.returncode == code
        if os.name != "nt":  # Windows does not tell
            seconds = sum(after[2:4]) - sum(before[2:4])
        spent.append(seconds)
    assert min(spent) < 0.3


def test_help_and_version_need_no_package() -> None:
    """On a fresh machine, with the standard library alone (-S), they answer all the same."""
    python = [sys.executable, "-S", "main.py"]
    version = subprocess.run([*python, "--version"], cwd=REPOSITORY, capture_output=True, text=True)
    assert (version.stdout, version.stderr) == (f"{VERSION}\n", "")
    helped = subprocess.run([*python, "--help"], cwd=REPOSITORY, capture_output=True, text=True)
    assert (helped.stdout, helped.stderr) == (main.parser().format_help(), "")


def flag_table(name: str) -> dict[str, str]:
    """Flag -> default, from the table of flags of a README; flags of one row share its default."""
    if not (REPOSITORY / name).exists():
        pytest.skip(f"there is no {name} yet")
    text = (REPOSITORY / name).read_text(encoding="utf-8").replace(r"\|", "or")
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| `--")]
    flags = [(re.findall(r"--\w[\w-]*", flag), default.strip()) for flag, default, _ in rows]
    return {name: default for names, default in flags for name in names}


@pytest.mark.parametrize("name", TABLES)
def test_help_and_readme_name_the_same_flags(name: str) -> None:
    assert set(flag_table(name)) == set(re.findall(r"--\w[\w-]*", main.parser().format_help()))


@pytest.mark.parametrize("name", TABLES)
def test_the_parser_has_the_flags_of_readme(name: str) -> None:
    known = {flag for action in main.parser()._actions for flag in action.option_strings}
    assert set(flag_table(name)) - INIT_ALONE == known - {"-h"}


@pytest.mark.parametrize("name", TABLES)
def test_the_defaults_of_readme_are_the_parsers(name: str) -> None:
    table = flag_table(name)
    for action in main.parser()._actions:
        flag, default = action.option_strings[0], action.default
        flag = "--help" if flag == "-h" else flag
        if flag == "--model":
            assert table[flag] == kinds.STABLE_DIFFUSION
        elif flag == "--clipseg":
            assert table[flag] == hub.CLIPSEG
        elif default is False or default in ("", []):
            assert table[flag] == "", flag
        elif default is True:
            assert table[flag] == "on", flag
        elif action.dest not in ("help", "version") and default is not None:
            values = default if isinstance(default, list) else [default]
            kind = action.type if callable(action.type) else str
            assert [kind(word) for word in shlex.split(table[flag])] == values, flag


# ---- Failures at run time ----


def test_an_unexpected_error_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(request: object) -> None:
        raise LookupError("no such colour\nsecond line")

    monkeypatch.setattr(inference, "run", fail)
    line = refusal([PAINT], capsys, code=1)
    assert line == "unexpected LookupError: no such colour (--debug shows where)"

    assert main.main([PAINT, "--debug"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("Traceback (most recent call last):\n")
    assert "in fail\n" in err
    assert err.endswith(f"\nerror: {line}\n")


def test_debug_shows_a_traceback_with_bad_input_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main([PAINT, "--steps", "0", "--debug"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith(f"\nerror: steps must be {STEPS}, got 0\n")


def tell_the_folder(request: Request) -> None:
    sys.stdout.write(f"{request.output}\n")


def test_what_a_terminal_can_not_show_is_escaped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a redirected Windows console, which takes letters of one alphabet only."""
    terminal = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(terminal, encoding="ascii"))
    monkeypatch.setattr(inference, "run", tell_the_folder)
    assert main.main([PAINT, "--output", str(tmp_path / "Größe \udcff")]) == 0
    assert terminal.getvalue().decode().rstrip().endswith(r"Gr\xf6\xdfe \udcff")


@pytest.mark.parametrize("unbuffered", [False, True])
@pytest.mark.parametrize("fault", [errno.EPIPE, errno.ENOSPC], ids=errno.errorcode.get)
def test_who_does_not_take_the_results_is_named(
    fault: int,
    unbuffered: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As `main.py ... | head -1` does, and a full disk behind `main.py ... > file`."""
    if fault == errno.ENOSPC and not FULL_DISK.exists():
        pytest.skip("this system has no full disk at hand")
    monkeypatch.setattr(inference, "run", tell_the_folder)
    file = io.FileIO(FULL_DISK, "w") if fault == errno.ENOSPC else unread_pipe()
    raw: Any = file if unbuffered else io.BufferedWriter(file)
    with io.TextIOWrapper(raw, encoding="utf-8", write_through=unbuffered) as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main.main([PAINT]) == 1
        monkeypatch.undo()  # and nothing is raised where Python closes it at its end
    reason = os.strerror(fault)
    assert capsys.readouterr().err == f"error: can not write to standard output ({reason})\n"


def unread_pipe() -> io.FileIO:
    reader, writer = os.pipe()
    os.close(reader)
    return io.FileIO(writer, "w")


def test_closed_streams_are_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `main.py ... >&- 2>&-` leaves them."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    monkeypatch.setattr(inference, "run", tell_the_folder)
    assert [main.main(words) for words in ([PAINT], [PAINT, "--steps", "0"])] == [0, 2]


def test_ctrl_c_before_the_start_shows_no_traceback() -> None:
    interrupt_itself = (
        "import builtins, os, runpy, signal\n"
        "real = builtins.__import__\n"
        "def imported(name, *others):\n"
        "    if name == 'hub':\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    return real(name, *others)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "builtins.__import__ = imported\n"
        f"runpy.run_path({main.__file__!r}, run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", interrupt_itself], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_that_comes_while_python_tidies_up_is_not_lost(name: str, tmp_path: Path) -> None:
    """What is raised in a finaliser is ignored by Python."""
    (tmp_path / "flow.py").write_text(
        "import os, signal, time\n"
        "class Tidying:\n"
        "    def __del__(self):\n"
        f"        os.kill(os.getpid(), signal.{name})\n"
        "        sum(range(1000))\n"
        "def run(request):\n"
        "    Tidying()\n"
        "    time.sleep(60)\n"
    )
    words = [PAINT, "--output", str(tmp_path)]
    code = (
        f"import sys; sys.path[:0] = [{str(REPOSITORY)!r}, {str(tmp_path)!r}]; import main, signal;"
        f"signal.signal(signal.{name}, signal.SIG_DFL);"  # whatever this process was started by
        "main.MODULES['tempered_inference'] = 'flow'; main.heed_signals();"
        f"sys.exit(main.main({words!r}))"
    )
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=90)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")
    assert time.monotonic() - begun < 50


@pytest.mark.parametrize("kept", [0.5, 0.0001], ids=["half the weights", "half the header"])
def test_corrupt_weights_are_one_line(
    kept: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "painter"
    shutil.copytree(POCKET, folder)
    whole = (folder / UNET).read_bytes()
    (folder / UNET).write_bytes(whole[: int(len(whole) * kept)])
    line = refusal(
        [PAINT, "--model", str(folder), "--clipseg", "pocket", "--output", str(tmp_path / "runs")],
        capsys,
        code=1,
    )
    assert line.startswith("weights of painter are corrupt or do not fit: ")
    assert line.endswith("; put a sound copy in its place")
    assert not (tmp_path / "runs").exists()


def poisoned(source: Path, folder: Path, weights: Path) -> Path:
    """A copy of a model whose weights of one part are not numbers any more."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / weights)
    damaged = {
        name: each * float("nan") if each.is_floating_point() else each
        for name, each in tensors.items()
    }
    save_file(damaged, folder / weights, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_that_are_not_finite_are_named(
    part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = next((POCKET / part).glob("*.safetensors")).relative_to(POCKET)
    folder = poisoned(POCKET, tmp_path / "painter", weights)
    words = [*FEW, "--model", str(folder), "--clipseg", "pocket", "--dtype", "fp32"]
    line = refusal([PAINT, *words, "--output", str(tmp_path / "runs")], capsys, code=1)
    assert line == (
        f"the picture is not finite because weights of {part} are not: put a sound copy in their "
        "place"
    )


def test_a_clipseg_that_sees_no_numbers_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = poisoned(POCKET.with_name("clipseg"), tmp_path / "eyes", Path("model.safetensors"))
    words = [*FEW, "--clipseg", str(folder), "--output", str(tmp_path / "runs")]
    line = refusal([PAINT, *words], capsys, code=1)
    assert line == (
        "what CLIPSeg sees is not finite because weights of CLIPSeg are not: put a sound copy in "
        "their place"
    )


@pytest.mark.parametrize("flag", ["--guidance_scale", "--cfg_rescale"])
def test_settings_that_no_number_survives_are_named_and_not_the_precision(
    flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*FEW, flag, "1e38", "--k", "100", "--dtype", "fp32", "--output", str(tmp_path)]
    line = refusal([PAINT, *words], capsys, code=1)
    assert line == (
        "the picture is not finite in float32; what may help: a smaller --guidance_scale or "
        "--cfg_rescale"
    )


def test_a_part_that_fails_while_painting_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(POCKET, tmp_path / "painter"))
    config = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
    (folder / "unet" / "config.json").write_text(json.dumps({**config, "norm_eps": "small"}))
    words = [*FEW, "--model", str(folder), "--clipseg", "pocket", "--output", str(tmp_path)]
    line = refusal([PAINT, *words], capsys, code=1)
    assert line.startswith("the denoiser of this model does not work: ")


def test_a_million_rounds_that_are_not_needed_cost_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [PAINT, *FEW, "--rounds", "1000000", "--accept", "100", "--early_look", "0"]
    main.main([*words, "--output", str(tmp_path)])  # whatever is loaded once
    begun = time.process_time()
    assert main.main([*words, "--output", str(tmp_path)]) == 0
    assert time.process_time() - begun < 5
    assert capsys.readouterr().err == ""


def test_a_model_that_can_not_be_had_names_what_would_work(
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = refusal([PAINT, "--model", "nobody/nothing", "--offline"], capsys, code=1)
    assert line == (
        "can not download nobody/nothing: it is not complete in the cache, and offline nothing is "
        "fetched; what works without it: --model pocket, a diffusers folder, a .safetensors file"
    )


def test_a_full_disk_is_one_line_and_leaves_whole_files_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fill_disk_after(2, monkeypatch)
    line = refusal([PAINT, *FEW, "--output", str(tmp_path)], capsys, code=1)
    folder = next(tmp_path.iterdir())
    written = sorted(file.name for file in folder.iterdir())
    assert written == ["interrupted.png", "tempered.png"]
    failed = folder / "classes.png"
    assert line == f"disk full: can not write {failed}; the files before it are kept"


def fill_disk_after(writes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the disk be full when more than this number of files have been written."""
    sync, done = os.fsync, 0

    def fsync(descriptor: int) -> None:
        nonlocal done
        if done == writes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done += 1
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


def test_a_file_that_the_system_cuts_off_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        line = refusal([PAINT, *FEW, "--output", str(tmp_path)], capsys, code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    folder = next(tmp_path.iterdir())
    reason = os.strerror(errno.EFBIG)
    assert (
        line == f"can not write {folder / 'tempered.png'} ({reason}); the files before it are kept"
    )
    assert list(folder.iterdir()) == []


OUT_OF_MEMORY = (
    "out of memory; what helps: --offload model or sequential and --dtype fp16 on a GPU, "
    "--dtype bf16 on a CPU, a smaller --height and --width"
)


@pytest.mark.parametrize(
    "pixels",
    ["800000000", str(2**59)],  # 160 petabytes of latents, and more than can be counted
)
def test_more_pixels_than_memory_are_one_line(
    pixels: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = ["--height", pixels, "--width", pixels]
    words = [PAINT, *FEW, *size, "--output", str(tmp_path)]
    assert refusal(words, capsys, code=1) == OUT_OF_MEMORY


def test_a_gpu_out_of_memory_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def step(*_: object) -> None:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of ..."
        )

    monkeypatch.setattr(sampling.Sampler, "step", step)
    words = [PAINT, *FEW, "--output", str(tmp_path)]
    assert refusal(words, capsys, code=1) == OUT_OF_MEMORY
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_is_one_line_and_code_130(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def step(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sampling.Sampler, "step", step)
    assert main.main([PAINT, *FEW, "--output", str(tmp_path)]) == 130
    assert tuple(capsys.readouterr()) == ("", "interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_update_is_handed_to_init(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called = tmp_path / "init.py"
    called.write_text("import sys; sys.exit(3 if sys.argv[1:] == ['--update'] else 4)")
    monkeypatch.setattr(main, "INIT", called)
    with pytest.raises(SystemExit) as raised:
        main.main(["--update"])
    assert raised.value.code == 3
