"""Budgets on the bundled pocket: samples of energies, the thresholds they give, and the cap."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import Done, call

import calibration
import main
import outputs
from budget import Sample, Sampled, Stop
from calibrating import take_sample
from calibration import Calibration
from cycles import Records
from errors import InputError
from evaluation import seeds_of
from painting import Batch
from session import open_session

STEPS = ("--steps", "4", "--stoptime", "3", "--backsteps", "3", "--early_look", "1")
FEW = ("--model", "pocket", "--device", "cpu", "--dtype", "fp32", "--judge", "none", *STEPS)
PAINT = ("--tempered_inference", *FEW)
SET = "a cat | a dog\na red car | a blue bowl\na bear | a crown\n"
CYCLES = 6  # of each of the three prompts


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
    found = calibration.load(evaluated.folder)
    assert len(found.sample.pictures) == 3 * CYCLES
    assert found.origin["model"] == found.origin["clipseg"] == "pocket"
    thresholds = evaluated.run["thresholds"]
    assert thresholds["calibrated"] is True
    # They are energies of the sample: some pictures pass, some do not.
    assert thresholds["early_accept"] in [each.early for each in found.sample.energies]
    rounds = (stop.energy for each in found.sample.pictures for stop in each.rounds)
    assert thresholds["accept"] in [*rounds, *(each.last for each in found.sample.energies)]


def test_an_evaluation_costs_its_budget(evaluated: Done) -> None:
    """All of this one is its own sample: 18 pictures of 4 calls, to the way of the last one."""
    costs = [row["tempered_calls"] for row in rows_of(evaluated.folder).values()]
    assert 0 <= sum(costs) - 1.5 * 4 * len(costs) <= 3.5 * 4
    assert max(costs) <= 4.5 * 4  # three budgets
    assert min(costs) == 4


def test_what_has_walked_in_the_sample_is_not_painted_again(evaluated: Done) -> None:
    """The way of each picture in the file is the way that its tempered picture has gone."""
    sample = calibration.load(evaluated.folder).sample
    for row, each in zip(rows_of(evaluated.folder).values(), sample.pictures, strict=True):
        assert row["rounds"] == len(each.rounds)
        assert row["tempered_calls"] == each.way(sample.early)[-1].cost


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
    (folder / "energies-1.jsonl").write_bytes(b"".join([*lines[5:9], *lines[-4:-1]]))
    (folder / "cycles.jsonl").unlink()


def damage_it(folder: Path) -> None:
    (folder / calibration.FILE).write_text('{"of": {}, "pictures": [[1, null]]}')
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


def test_however_cycles_are_shared_the_sample_is_the_same(evaluated: Done, copied: Path) -> None:
    """A process that has every other cycle, and is faster than the one that has the rest."""
    lose_the_sample(copied)
    request = main.to_request(main.parse(["--resume", str(copied)]))
    records = Records(copied, request.all_prompts, seeds_of(request))
    mine = records.keys[::2]
    batch = Batch(1, torch.device("cpu"))
    sample, begun = take_sample(open_session(request), records, 1, mine, batch)
    assert sample == calibration.load(evaluated.folder).sample
    assert begun.keys() <= set(mine)
    rounds = {key: row["rounds"] for key, row in rows_of(evaluated.folder).items()}
    assert all(len(each.walk.rounds) <= rounds[key] for key, each in begun.items())


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
        (("--k", "2"), "k of {file} is 4.0, here it is 2.0"),
        (("--rounds", "3"), "number of rounds of {file} is none, here it is 3"),
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


def kept(looks: list[Any], count: int = 16) -> str:
    """A calibration.json of pictures that look so."""
    return json.dumps(
        {
            "of": {},
            "plain": 20,
            "cap": 9,
            "early": 1,
            "pictures": [{"looks": looks, "rounds": []}] * count,
        }
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "it does not exist"),
        ("[]", "it holds no JSON object"),
        ('{"of": {}}', "it holds no energies"),
        (kept([[True, 1, 20, 32]], count=15), "it must hold energies of 16 pictures, got 15"),
        (kept([]), "a picture must have looks and rounds, got {'looks': [], 'rounds': []}"),
        (kept([[True, 1, 20]]), "a look must have late, energy, cost, most, got [True, 1, 20]"),
        (kept([[1, 1, 20, 32]]), "late must be true or false, got 1"),
        (kept([[True, "a", 20, 32]]), "an energy must be a finite number, got 'a'"),
        (kept([[True, 1, 0, 32]]), "a cost must be a positive number, got 0"),
        (kept([[True, 1, 20, -0.5]]), "a cost must be a positive number, got -0.5"),
    ],
    ids=[
        "missing",
        "no object",
        "no energies",
        "too few",
        "no look",
        "no most",
        "no late",
        "no energy",
        "no cost",
        "a negative cost",
    ],
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
    for seed in ("1", "2"):
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
    own = calibration.pockets_own()
    assert own.origin == session.origin
    calibrate = pytest.importorskip("benchmarks.calibrate")
    of_each_subset = own.sample.energies[:: len(own.sample.energies) // 4]
    found = [painter.looks(watched)[-1] for painter, watched in calibrate.watched(session, 1)]
    for taken, stored in zip(found, of_each_subset, strict=True):
        assert taken.energy == pytest.approx(stored.last, abs=0.05)


def test_a_sample_survives_its_file(tmp_path: Path) -> None:
    looks = Stop(False, 0.25, 20, 26), Stop(True, 1 / 7, 20, 32)
    pictures = tuple(Sampled(looks, (Stop(True, i / 7, 32, None),) * i) for i in range(16))
    mine = Calibration({"steps": 20, "lora": []}, Sample(20, 0.2, pictures, 9.0))
    calibration.save(tmp_path / calibration.FILE, mine)
    assert calibration.load(tmp_path) == mine
    assert json.loads((tmp_path / calibration.FILE).read_text())["of"]["steps"] == 20
