"""Budgets on the bundled pocket: samples of energies, the thresholds they give, and the cap."""

from __future__ import annotations

import json
import shutil
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch

import calibration
import main
import outputs
from calibration import Sample
from errors import InputError
from session import POCKETS_OWN, open_session

STEPS = ("--steps", "4", "--stoptime", "3", "--backsteps", "3", "--early_look", "1")
FEW = ("--model", "pocket", "--device", "cpu", "--dtype", "fp32", "--judge", "none", *STEPS)
PAINT = ("--tempered_inference", *FEW)
SET = "a cat | a dog\na red car | a blue bowl\na bear | a crown\n"
CYCLES = 6  # of each of the three prompts


@dataclass(frozen=True)
class Done:
    """How a call of the program ended."""

    code: int
    out: str
    err: str

    @property
    def folder(self) -> Path:
        return Path(self.out.splitlines()[-1])

    @property
    def run(self) -> dict[str, Any]:
        return outputs.read_json(self.folder / "run.json")


def call(*words: str) -> Done:
    """Run the command line in this process."""
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main.main(words)
    return Done(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """An evaluation that finds its own thresholds."""
    place = tmp_path_factory.mktemp("evaluated")
    (place / "mine.txt").write_text(SET, encoding="utf-8")
    words = ("--prompts_file", str(place / "mine.txt"), "--cycles", str(CYCLES))
    done = call("--evaluate", *FEW, *words, "--budget", "1.5", "--output", str(place))
    assert done.code == 0, done.err
    return done


@pytest.fixture
def copied(evaluated: Done, tmp_path: Path) -> Path:
    return Path(shutil.copytree(evaluated.folder, tmp_path / "copied"))


def rows_of(folder: Path) -> dict[tuple[int, int], dict[str, Any]]:
    rows = outputs.read_json_lines(folder / "cycles.jsonl")
    return {(row["prompt"], row["seed"]): row for row in rows}


def told(folder: Path) -> list[tuple[Any, ...]]:
    """What does not depend on when and how the cycles were painted."""
    names = ("tempered_calls", "rounds", "plain", "tempered")
    return [(key, *map(row.get, names)) for key, row in sorted(rows_of(folder).items())]


def test_an_evaluation_takes_its_thresholds_from_its_own_plain_pictures(evaluated: Done) -> None:
    sample = calibration.load(evaluated.folder)
    assert len(sample.energies) == 3 * CYCLES
    assert sample.origin["model"] == sample.origin["clipseg"] == "pocket"
    thresholds = evaluated.run["thresholds"]
    assert thresholds["calibrated"] is True
    # They are energies of the sample: some pictures pass, some do not.
    assert thresholds["accept"] in [each.last for each in sample.energies]
    assert thresholds["early_accept"] in [each.early for each in sample.energies]
    costs = [row["tempered_calls"] / 4 for row in rows_of(evaluated.folder).values()]
    assert max(costs) <= 4.5  # three budgets
    assert min(costs) == 1
    assert any(cost > 1 for cost in costs)


def test_a_plain_picture_that_is_in_the_sample_is_not_painted_twice(evaluated: Done) -> None:
    """All of this set are: what both pictures cost is what their branches took."""
    for row in rows_of(evaluated.folder).values():
        assert row["unet_calls"] <= row["plain_calls"] + row["tempered_calls"] - 1
        if not row["rounds"]:
            assert row["unet_calls"] == row["tempered_calls"] == 4


def lose_the_sample(folder: Path) -> None:
    (folder / calibration.FILE).unlink()
    (folder / "energies.jsonl").unlink()
    lines = (folder / "cycles.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "cycles.jsonl").write_bytes(b"".join(lines[::2]))


def leave_half_of_it(folder: Path) -> None:
    """As two processes that were killed would."""
    (folder / calibration.FILE).unlink()
    lines = (folder / "energies.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "energies.jsonl").write_bytes(lines[0] + lines[1][:20])
    (folder / "energies-1.jsonl").write_bytes(b"".join(lines[5:9]))
    (folder / "cycles.jsonl").unlink()


def damage_it(folder: Path) -> None:
    (folder / calibration.FILE).write_text('{"of": {}, "energies": [[1, null]]}')
    (folder / "cycles.jsonl").unlink()


@pytest.mark.parametrize(
    "damage", [lose_the_sample, leave_half_of_it, damage_it], ids=lambda each: each.__name__
)
def test_whatever_is_lost_the_thresholds_are_the_same_again(
    evaluated: Done, copied: Path, damage: Any
) -> None:
    damage(copied)
    run = outputs.read_json(copied / "run.json")
    outputs.save_json(copied / "run.json", {**run, "thresholds": {}})  # as killed before it
    again = call("--resume", str(copied))
    assert again.code == 0, again.err
    assert told(copied) == told(evaluated.folder)
    assert calibration.load(copied) == calibration.load(evaluated.folder)
    assert outputs.read_json(copied / "run.json")["thresholds"] == evaluated.run["thresholds"]


def test_a_single_picture_uses_the_sample_of_an_evaluation_and_repeats_without_it(
    evaluated: Done, copied: Path, tmp_path: Path
) -> None:
    words = ("--calibration", str(copied), "--budget", "1.5", "--output", str(tmp_path))
    found = call(*PAINT, *words)
    assert found.code == 0, found.err
    assert found.run["thresholds"] == evaluated.run["thresholds"]
    by_file = call(*PAINT, "--calibration", str(copied / calibration.FILE), *words[2:])
    assert by_file.run["thresholds"] == found.run["thresholds"]
    shutil.rmtree(copied)
    again = call("--repeat", str(found.folder / "run.json"), "--output", str(tmp_path))
    assert again.run["thresholds"] == found.run["thresholds"]
    names = ("tempered.png", "kept.png")
    for one, other in ((found.folder / name, again.folder / name) for name in names):
        assert one.read_bytes() == other.read_bytes()


def test_a_repeated_run_with_another_budget_has_thresholds_of_its_own(
    evaluated: Done, tmp_path: Path
) -> None:
    place = ("--output", str(tmp_path))
    found = call(*PAINT, "--calibration", str(evaluated.folder), "--budget", "1.5", *place)
    repeat = ("--repeat", str(found.folder / "run.json"), *place)
    richer = call(*repeat, "--calibration", str(evaluated.folder), "--budget", "2")
    assert richer.run["thresholds"]["accept"] < found.run["thresholds"]["accept"]
    assert richer.run["arguments"]["max_cost"] == 6


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("--steps", "5"), "number of steps of {file} is 4, here it is 5"),
        (("--early_look", "2"), "early look of {file} is 1, here it is 2"),
        (("--scheduler", "ddim"), "scheduler of {file} is euler, here it is ddim"),
        (("--guidance_scale", "3"), "guidance of {file} is 7.5, here it is 3.0"),
        (("--no-mirror",), "use of mirror images of {file} is True, here it is False"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_sample_of_another_sampler_is_refused_before_anything_is_loaded(
    evaluated: Done, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], what: str
) -> None:
    monkeypatch.setattr("importlib.import_module", lambda name: pytest.fail(f"{name} was loaded"))
    done = call(*PAINT, "--calibration", str(evaluated.folder), *words)
    assert done.code == 2
    assert done.err == (
        "error: --calibration must be of the same model, CLIPSeg and sampler; the "
        f"{what.format(file=evaluated.folder)}\n"
    )


def test_a_sample_of_another_model_is_refused(
    evaluated: Done, painter: Path, tmp_path: Path
) -> None:
    place = ("--model", str(painter), "--clipseg", "pocket", "--output", str(tmp_path))
    done = call(*PAINT, *place, "--calibration", str(evaluated.folder))
    assert done.code == 2
    assert f"the model of {evaluated.folder} is pocket, here it is painter" in done.err


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "it does not exist"),
        ("[]", "it holds no JSON object"),
        ('{"of": {}}', "it holds no energies"),
        ('{"of": {}, "energies": [[1, 2]]}', "it must hold energies of 16 pictures, got 1"),
        ('{"of": {}, "energies": [[1, "a"]]}', "energies must be two finite numbers a picture"),
    ],
    ids=["missing", "no object", "no energies", "too few", "no numbers"],
)
def test_what_is_no_sample_is_refused(tmp_path: Path, content: str | None, reason: str) -> None:
    file = tmp_path / "mine.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(
        InputError, match=f"needs the calibration.json of an evaluation, got {file}"
    ):
        calibration.load(file)
    done = call(*PAINT, "--calibration", str(file))
    assert done.code == 2
    assert reason in done.err


def test_thresholds_by_hand_are_kept_whatever_the_sample_says(
    evaluated: Done, tmp_path: Path
) -> None:
    words = ("--accept", "0.125", "--calibration", str(evaluated.folder), "--output", str(tmp_path))
    found = call(*PAINT, *words)
    assert found.run["thresholds"]["accept"] == 0.125
    assert found.run["thresholds"]["early_accept"] != 0.125


@pytest.mark.parametrize("most", [1.0, 1.5, 2.2])
def test_no_picture_passes_the_cap_and_the_best_that_was_seen_is_finished(
    tmp_path: Path, most: float
) -> None:
    never = ("--accept", "0", "--early_accept", "0.5", "--max_cost", str(most))
    for seed in ("1", "2", "3"):
        found = call(*PAINT, *never, "--seed", seed, "--output", str(tmp_path))
        run = found.run
        assert run["unet_calls"] <= most * 4
        assert (run["rounds"] == []) == (most == 1)
        at_the_last_look = [each["energy"] for each in run["rounds"] if each["step"] == 3]
        first = run["interrupted"]
        if first["step"] == 3:
            at_the_last_look.append(first["energy"])
        if at_the_last_look:
            assert run["kept"]["energy"] == pytest.approx(min(at_the_last_look))


def test_without_a_sample_there_is_one_all_the_same_and_no_hidden_state(tmp_path: Path) -> None:
    one, other = (call(*PAINT, "--output", str(tmp_path)) for _ in range(2))
    assert one.run["thresholds"] == other.run["thresholds"]
    assert one.run["thresholds"]["calibrated"] is False
    file = "tempered.png"
    assert (one.folder / file).read_bytes() == (other.folder / file).read_bytes()
    assert not list(tmp_path.glob(f"*/{calibration.FILE}"))


def test_the_pockets_own_sample_is_of_these_weights() -> None:
    """Who trains the pocket again takes it again: python -m benchmarks.calibrate."""
    words = ["--tempered_inference", "--model", "pocket", "--device", "cpu", "--dtype", "fp32"]
    session = open_session(main.to_request(main.parse(words)))
    assert session.painter.calibrated
    sample = calibration.load(POCKETS_OWN)
    assert sample.origin == session.origin
    calibrate = pytest.importorskip("benchmarks.calibrate")
    torch.manual_seed(0)
    found = calibrate.energies(session, 1)
    of_each_subset = sample.energies[:: len(sample.energies) // 4]
    for taken, stored in zip(found, of_each_subset, strict=True):
        assert taken.last == pytest.approx(stored.last, abs=0.05)


def test_a_sample_survives_its_file(tmp_path: Path) -> None:
    energies = tuple(calibration.energies_of([i / 7, i]) for i in range(16))
    calibration.save(tmp_path / calibration.FILE, Sample({"steps": 20, "lora": []}, energies))
    assert calibration.load(tmp_path) == Sample({"steps": 20, "lora": []}, energies)
    assert json.loads((tmp_path / calibration.FILE).read_text())["of"]["steps"] == 20
