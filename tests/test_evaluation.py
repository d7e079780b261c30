"""Evaluations at large on the bundled pocket: prompt sets, batches, judges, kills, processes."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_judges
import torch
from accelerate import PartialState
from calls import Done, call
from loopback import Hub, closed_url, files_of
from pictures import farthest
from PIL import Image
from tqdm import tqdm

import evaluation
import main
import outputs
import prompts
from cycles import Records
from judges import subject_of, verdict
from judging import SINGLES, chosen, noted, singles, verdicts
from painting import Batch, fitting, groups
from prompts import Prompt
from report import SIDES
from settings import Request
from tempering import Painter

REPOSITORY = Path(main.__file__).parent
STEPS = ("--steps", "4", "--stoptime", "3", "--backsteps", "1", "--rounds", "1")
FEW = ("--evaluate", "--model", "pocket", "--device", "cpu", *STEPS)
SET = """\
[animals]
a cat | a dog
[worn] " with "
a bear | a crown
[three]
a lion | a red car | a blue bowl
"""
SUMMARIES = ("summary.json", "summary.csv", "summary.md")
Row = dict[str, Any]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sets") / "mine.txt"
    path.write_text(SET, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def whole(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """An evaluation of three prompts and two seeds that nothing interrupted."""
    output = str(tmp_path_factory.mktemp("whole"))
    words = ("--prompts_file", str(file), "--cycles", "2", "--output", output)
    return call(*FEW, *words)


@pytest.fixture
def copied(whole: Done, tmp_path: Path) -> Path:
    """A copy of that evaluation's folder, to be damaged."""
    return shutil.copytree(whole.folder, tmp_path / "copied")


def rows_of(folder: Path) -> list[Row]:
    files = sorted(folder.glob("cycles*.jsonl"))
    rows = [row for each in files for row in outputs.read_json_lines(each)]
    return sorted(rows, key=lambda row: (row.get("prompt", 1), row["seed"]))


def summaries(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in SUMMARIES]


def summary(folder: Path) -> Row:
    found: Row = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return found


def pictures(folder: Path) -> list[Path]:
    return sorted(path.relative_to(folder) for path in folder.glob("[0-9]*/*.png"))


# --- Prompt sets.


def test_every_prompt_of_a_set_is_painted_with_every_seed(whole: Done) -> None:
    assert (whole.code, whole.err) == (0, "")
    rows = rows_of(whole.folder)
    assert [(row["prompt"], row["seed"]) for row in rows] == [
        (number, seed) for number in (1, 2, 3) for seed in (2024, 2025)
    ]
    assert [path.as_posix() for path in pictures(whole.folder)] == [
        f"{place}/{seed}-{name}.png"
        for place in (
            "1-a-cat-next-to-a-dog",
            "2-a-bear-with-a-crown",
            "3-a-lion-next-to-a-red-car-next-to-a-blue",
        )
        for seed in (2024, 2025)
        for name in ("plain", "tempered")
    ]
    assert re.search(r"-mine$", whole.folder.name)


def test_a_sets_picture_is_that_of_its_prompt_alone(whole: Done, tmp_path: Path) -> None:
    words = ("--prompts", "a bear", "a crown", "--joiner", " with ", "--seed", "2025", "--compare")
    alone = call("--tempered_inference", *FEW[1:], *words, "--output", str(tmp_path))
    assert alone.code == 0
    for name in SIDES:
        there = whole.folder / "2-a-bear-with-a-crown" / f"2025-{name}.png"
        assert (alone.folder / f"{name}.png").read_bytes() == there.read_bytes()


def test_the_summary_has_every_subset_and_all_together(whole: Done) -> None:
    found = summary(whole.folder)
    told = [(each["subset"], each["prompts"], each["cycles"]) for each in found["subsets"]]
    assert told == [("animals", 1, 2), ("worn", 1, 2), ("three", 1, 2), ("all", 3, 6)]
    assert (found["cycles"], found["prompts"], found["judges"]) == (6, 3, ["pocket"])
    with (whole.folder / "summary.csv").open(encoding="utf-8", newline="") as table:
        rows = list(csv.DictReader(table))
    assert Counter(row["subset"] for row in rows) == dict.fromkeys(
        ("animals", "worn", "three", "all"), 7
    )
    text = (whole.folder / "summary.md").read_text(encoding="utf-8")
    for each in found["subsets"]:
        rate = each["measures"]["pocket/all_ok"]
        assert re.search(rf"\| {each['subset']} \| {each['cycles']} \| .*\d %", text)
        assert 0 <= rate["plain_mean"] <= 1


def test_the_costs_are_those_of_the_rows(whole: Done) -> None:
    rows = rows_of(whole.folder)
    cost = summary(whole.folder)["subsets"][-1]["cost"]
    assert cost["plain"] == sum(row["plain_calls"] for row in rows) / len(rows) == 4
    assert cost["tempered"] == sum(row["tempered_calls"] for row in rows) / len(rows) == 5
    assert [row["unet_calls"] for row in rows] == [6] * 6


def test_the_page_shows_all_cycles(whole: Done) -> None:
    page = (whole.folder / "report.html").read_text(encoding="utf-8")
    found = re.search(r'id="data">(.*?)</script>', page)
    assert found
    data = json.loads(found[1])
    assert [pair["seed"] for pair in data["pairs"]] == [2024, 2025] * 3
    for pair in data["pairs"]:
        for name in SIDES:
            assert (whole.folder / pair[name]["file"]).is_file()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--prompts", "a cat"), "--prompts and --prompts_file exclude each other, got both"),
        (("--batch", "0"), "batch must be a whole number of at least 1, got 0"),
        (("--judge", "nobody"), "judge must be one of pocket, owlv2, blip-vqa, none, got 'nobody'"),
        (("--judge", "none", "pocket"), "judge none must stand alone, got none pocket"),
        (("--joiner", " & ", "--judge", "pocket", "--seed", "-1"), "seed must be a whole number"),
    ],
)
def test_what_can_not_be_meant_is_told_in_one_line(
    words: tuple[str, ...], line: str, file: Path, tmp_path: Path
) -> None:
    done = call(*FEW, "--prompts_file", str(file), *words, "--output", str(tmp_path))
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"error: {line}")
    assert list(tmp_path.iterdir()) == []


def test_a_bad_line_is_named_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("a cat | a dog\na bear |\n", encoding="utf-8")
    monkeypatch.setattr("main.importlib.import_module", None)  # no flow is even imported
    done = call(*FEW, "--prompts_file", str(path), "--output", str(tmp_path / "runs"))
    line = f"{path}, line 2: no subject may be empty, got 'a bear |'"
    assert done == Done(2, "", f"error: {line}\n")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
def test_a_set_whose_name_is_no_text_is_summed_up_too(tmp_path: Path) -> None:
    file = Path(os.fsdecode(os.fsencode(tmp_path) + b"/m\xffine.txt"))
    file.write_text("a cat | a dog\n", encoding="utf-8")
    output = str(tmp_path / "runs")
    done = call(*FEW, "--prompts_file", str(file), "--cycles", "1", "--output", output)
    assert (done.code, done.err) == (0, "")
    assert (done.folder / "summary.md").read_text(encoding="utf-8").startswith("# m?ine\n")


@pytest.mark.parametrize(
    ("fact", "value"), [("versions", 5), ("started", 5), ("model", None), ("scheduler", [])]
)
def test_a_run_json_with_facts_that_are_none_is_told_anew(
    fact: str, value: object, copied: Path, whole: Done
) -> None:
    run = outputs.read_json(copied / "run.json")
    outputs.save_json(copied / "run.json", {**run, fact: value})
    done = call("--resume", str(copied))
    assert (done.code, done.err) == (0, "")
    assert outputs.read_json(copied / "run.json")["model"] == "pocket"
    assert summaries(copied) == summaries(whole.folder)


def test_a_set_is_for_evaluations(file: Path) -> None:
    done = call("--tempered_inference", "--prompts_file", str(file))
    assert done == Done(2, "", "error: --prompts_file is for --evaluate, got it without\n")


def test_an_evaluation_keeps_its_set_whatever_becomes_of_the_file(
    copied: Path, file: Path, whole: Done
) -> None:
    before = file.read_text(encoding="utf-8")
    try:
        file.write_text("a horse | a frog\n", encoding="utf-8")
        (copied / "cycles.jsonl").write_bytes(b"")
        done = call("--resume", str(copied))
    finally:
        file.write_text(before, encoding="utf-8")
    assert done.code == 0
    assert summaries(copied) == summaries(whole.folder)


def test_the_command_of_the_page_makes_a_pair_again(whole: Done, tmp_path: Path) -> None:
    page = (whole.folder / "report.html").read_text(encoding="utf-8")
    found = re.search(r'id="data">(.*?)</script>', page)
    assert found
    words = shlex.split(json.loads(found[1])["prompts"][1]["again"])[2:]
    done = call(*words, "--seed", "2024", "--output", str(tmp_path))
    assert done.code == 0
    for name in SIDES:
        there = whole.folder / "2-a-bear-with-a-crown" / f"2024-{name}.png"
        assert (done.folder / f"{name}.png").read_bytes() == there.read_bytes()


# --- Batches.


@pytest.mark.parametrize("batch", [2, 100])
def test_a_picture_is_the_same_whatever_the_batch(
    batch: int, whole: Done, file: Path, tmp_path: Path
) -> None:
    words = ("--prompts_file", str(file), "--cycles", "2", "--batch", str(batch))
    done = call(*FEW, *words, "--output", str(tmp_path))
    assert (done.code, done.err) == (0, "")
    for path in pictures(whole.folder):
        with Image.open(whole.folder / path) as one, Image.open(done.folder / path) as other:
            assert farthest(one, other) <= 1
            assert one.info["parameters"] == other.info["parameters"]
    for row, alone in zip(rows_of(done.folder), rows_of(whole.folder), strict=True):
        for name in ("prompt", "seed", "unet_calls", "plain_calls", "tempered_calls"):
            assert row[name] == alone[name]


def test_where_memory_runs_out_the_batch_is_halved_and_nothing_is_lost(
    whole: Done, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temper, sizes = Painter.temper, list[int]()

    def small(self: Painter, seeds: Sequence[int], **options: Any) -> Any:
        sizes.append(len(seeds))
        if len(seeds) > 1:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return temper(self, seeds, **options)

    monkeypatch.setattr(Painter, "temper", small)
    words = ("--prompts_file", str(file), "--cycles", "2", "--batch", "4")
    done = call(*FEW, *words, "--output", str(tmp_path))
    assert (done.code, done.err) == (0, "")
    assert sizes == [2] + [1] * 6  # once halved it stays so; two cycles a joiner and number
    assert summaries(done.folder)[1] == summaries(whole.folder)[1]


def test_where_memory_is_short_of_one_picture_the_run_ends_in_one_line(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(self: Painter, seeds: Sequence[int], **options: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(Painter, "temper", never)
    done = call(*FEW, "--prompts_file", str(file), "--output", str(tmp_path))
    assert done.code == 1
    kept, error = done.err.splitlines()
    assert kept.startswith("kept 0 of 12 cycles; go on with: ")
    assert error.startswith("error: out of memory; what helps: ")


def test_a_batch_by_free_memory() -> None:
    gib = 2**30
    assert fitting(10 * gib, 2 * gib) == 4  # of four fifths
    assert fitting(gib, 2 * gib) == 1
    assert fitting(2**50, 1) == fitting(2**50, 0) == 32
    assert Batch(None, torch.device("cpu")).size == 1
    assert Batch(7, torch.device("cpu")).size == 7


class Memory:
    """A GPU of 4000 bytes, of which a picture takes 700 for a while."""

    taken = 1000
    peak = 0

    def reset_peak_memory_stats(self, device: torch.device) -> None:
        self.peak = self.taken

    def memory_allocated(self, device: torch.device) -> int:
        return self.taken

    def max_memory_allocated(self, device: torch.device) -> int:
        return self.peak

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        return 4000 - self.taken, 4000


def test_the_first_picture_says_how_many_fit_beside_each_other() -> None:
    memory, sizes = Memory(), list[int]()

    class Painting:
        def temper(self, seeds: Sequence[int], **_: Any) -> list[int]:
            sizes.append(len(seeds))
            memory.peak = memory.taken + 700 * len(seeds)
            if memory.peak > 4000:
                raise RuntimeError("out of memory")
            return list(seeds)

    batch = Batch(None, torch.device("cpu"))
    batch._memory = memory
    waiting = [(0, seed) for seed in range(10)]
    painter: Any = Painting()
    while waiting:
        waiting = waiting[len(batch.paint(painter, waiting, tqdm(disable=True))) :]
    assert sizes == [1, 3, 3, 3]  # four fifths of 3000 bytes hold three of 700


def test_batches_are_of_one_joiner_and_number_of_subjects_and_lose_nothing(tmp_path: Path) -> None:
    asked = prompts.load("attend-and-excite", " and ")
    asked += prompts.load("three-subjects", " and ")
    records = Records(tmp_path, asked, range(5, 9))
    for share in (records.keys, records.keys[3::7]):
        found = list(groups(records, share))
        assert [key for part in found for key in part] == list(share)
        for part in found:
            kinds = {(records.prompt(k).joiner, len(records.prompt(k).subjects)) for k in part}
            assert len(kinds) == 1
            assert len({number for number, _ in part}) <= 16


def test_the_text_of_a_prompt_is_encoded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from families import StableDiffusion

    encode, texts = StableDiffusion.encode, Counter[str]()

    def counted(self: Any, asked: Sequence[str], *rest: Any) -> Any:
        texts.update(asked)
        return encode(self, asked, *rest)

    monkeypatch.setattr(StableDiffusion, "encode", counted)
    path = tmp_path / "mine.txt"
    path.write_text("a cat | a dog\na bear | a lion\na frog | a car\n", encoding="utf-8")
    words = ("--prompts_file", str(path), "--cycles", "5", "--batch", "2", "--joiner", " and ")
    done = call(*FEW, *words, "--output", str(tmp_path))
    assert done.code == 0
    assert texts["a bear and a lion"] == texts["a frog and a car"] == 1


# --- What a kill may leave.


def cut_line(folder: Path) -> None:
    data = (folder / "cycles.jsonl").read_bytes()
    (folder / "cycles.jsonl").write_bytes(data[: data.rstrip().rindex(b"\n") + 40])


def lose_rows(folder: Path) -> None:
    lines = (folder / "cycles.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "cycles.jsonl").write_bytes(b"".join(lines[1::2]))


def lose_a_picture(folder: Path) -> None:
    (folder / pictures(folder)[5]).unlink()


def damage_a_picture(folder: Path) -> None:
    path = folder / pictures(folder)[-1]
    path.write_bytes(path.read_bytes()[:-40] + bytes(40))


def lose_notes(folder: Path) -> None:
    lines = (folder / "notes-pocket.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "notes-pocket.jsonl").write_bytes(b"".join(lines[::2]))


def lose_summaries(folder: Path) -> None:
    for name in (*SUMMARIES, "report.html", "scatter.png", "sheet.png"):
        (folder / name).unlink()


def spread_over_processes(folder: Path) -> None:
    """As many processes, killed at various places, would have left the rows."""
    for stem in ("cycles", "notes-pocket"):
        lines = (folder / f"{stem}.jsonl").read_bytes().splitlines(keepends=True)
        (folder / f"{stem}.jsonl").write_bytes(lines[3] + lines[0][:25])
        (folder / f"{stem}-1.jsonl").write_bytes(lines[5])
        (folder / f"{stem}-12.jsonl").write_bytes(lines[1] + lines[2])


@pytest.mark.parametrize(
    "damage",
    [
        cut_line,
        lose_rows,
        lose_a_picture,
        damage_a_picture,
        lose_notes,
        lose_summaries,
        spread_over_processes,
    ],
    ids=lambda each: each.__name__,
)
def test_whatever_was_lost_is_made_again_and_the_summary_is_the_same_to_the_byte(
    damage: Any, copied: Path, whole: Done
) -> None:
    damage(copied)
    done = call("--resume", str(copied))
    assert (done.code, done.err) == (0, "")
    assert summaries(copied) == summaries(whole.folder)
    for path in pictures(whole.folder):
        assert (copied / path).read_bytes() == (whole.folder / path).read_bytes()
    assert (copied / "report.html").is_file()


def test_a_finished_evaluation_is_summed_up_again_without_its_model(
    copied: Path, whole: Done, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "open_session", None)  # to call it would be an error
    lose_summaries(copied)
    done = call("--resume", str(copied))
    assert (done.code, done.err) == (0, "")
    assert summaries(copied) == summaries(whole.folder)


def ranks(words: Sequence[str], count: int) -> list[Done]:
    """The command line in so many processes at once, in a launcher's environment."""
    host, port = closed_url().removeprefix("http://").split(":")
    shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    shared |= {"MASTER_ADDR": host, "MASTER_PORT": port}
    running = [
        subprocess.Popen(
            [sys.executable, "main.py", *words],
            cwd=REPOSITORY,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
        for rank in range(count)
    ]
    found = [process.communicate(timeout=300) for process in running]
    return [Done(process.returncode, *texts) for process, texts in zip(running, found, strict=True)]


def test_any_number_of_processes_takes_up_the_rest(copied: Path, whole: Done) -> None:
    """Rows of three processes, of which two are gone; now there are two, and a picture is lost."""
    spread_over_processes(copied)
    (copied / pictures(copied)[2]).unlink()  # of a cycle that has its row
    ended = ranks(["--resume", str(copied)], 2)
    assert [done.code for done in ended] == [0, 0], [done.err for done in ended]
    assert summaries(copied) == summaries(whole.folder)
    painted = [line for done in ended for line in done.out.splitlines() if "  cycle " in line]
    assert len(painted) == len(set(painted)) == 3  # none twice
    shares = [sum("  cycle " in line for line in done.out.splitlines()) for done in ended]
    assert sorted(shares) == [1, 2]  # the rest is shared, not what each would have had


@pytest.mark.skipif(torch.accelerator.is_available(), reason="with GPUs it starts them all")
def test_a_launcher_that_starts_one_process_for_two_is_told_which_one_does_not(
    tmp_path: Path,
) -> None:
    words = ["--cpu", "--num_processes", "2", "main.py", *FEW, "--output", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *words],
        cwd=REPOSITORY,
        env={name: value for name, value in os.environ.items() if name != "WORLD_SIZE"},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )
    error = next(line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "here it has started one process alone" in error
    assert f"torchrun --nproc_per_node N main.py {' '.join(FEW)}" in error
    assert done.returncode != 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("size", "rest"),
    [
        ("abc", {}),
        ("2", {}),
        ("2", {"RANK": "5", "LOCAL_RANK": "5", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}),
    ],
    ids=["no number", "no others", "none of them"],
)
def test_an_environment_that_no_launcher_has_made_is_told(
    size: str, rest: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a cluster's script may leave it."""
    monkeypatch.setattr(PartialState, "_shared_state", {})
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"WORLD_SIZE": size, **rest}.items():
        monkeypatch.setenv(name, value)
    done = call(*FEW, "--output", str(tmp_path))
    line = "error: WORLD_SIZE must be unset, or stand beside all else that a launcher sets, got "
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert done.err.startswith(f"{line}'{size}' (")


# --- Judges.


def test_nobody_judges_where_nobody_is_asked_to(file: Path, tmp_path: Path) -> None:
    words = ("--prompts_file", str(file), "--cycles", "1", "--judge", "none")
    done = call(*FEW, *words, "--output", str(tmp_path))
    assert (done.code, done.err) == (0, "")
    assert list(done.folder.glob("notes*")) == []
    assert summary(done.folder)["judges"] == []
    assert "No judge has seen" in (done.folder / "report.html").read_text(encoding="utf-8")


def requested(*words: str) -> Request:
    return main.to_request(main.parse([*FEW, *words]))


def test_the_pockets_judge_judges_what_is_the_pockets_own() -> None:
    assert chosen(requested(), "pocket") == ["pocket"]
    assert chosen(requested("--width", "64"), "pocket") == ["pocket"]
    assert chosen(requested("--prompts", "a cat", "a zebra"), "pocket") == []
    assert chosen(requested("--width", "96"), "pocket") == []
    assert chosen(requested(), "CompVis/stable-diffusion-v1-4") == []
    assert chosen(requested("--judge", "none"), "pocket") == []
    both = requested("--judge", "owlv2", "pocket")
    assert chosen(both, "anything") == ["owlv2", "pocket"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--prompts", "a zebra"), "--judge pocket knows the pocket's subjects alone: "),
        (("--prompts", "a red dog", "a dog"), "--judge pocket needs different subjects in a "),
        (("--width", "96"), "--judge pocket needs pictures of 64 pixels, the pocket's size, got "),
    ],
)
def test_what_a_judge_does_not_know_is_told_before_anything_is_loaded(
    words: tuple[str, ...], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "open_session", None)
    done = call(*FEW, *words, "--judge", "pocket", "--output", str(tmp_path))
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"error: {line}")
    assert list(tmp_path.iterdir()) == []


def test_verdicts_follow_from_the_notes_on_disk(whole: Done, file: Path) -> None:
    asked = tuple(prompts.load(str(file), " next to "))
    records = Records(whole.folder, asked, range(2024, 2026))
    said = verdicts(records).said["pocket"]
    assert said.keys() == set(records.keys)
    for key, row in noted(records, "pocket").items():
        for name, found in zip(SIDES, said[key], strict=True):  # type: ignore[index]
            assert found == verdict("pocket", row[name], asked[0])
    rate = summary(whole.folder)["subsets"][-1]["measures"]["pocket/all_ok"]
    assert rate["tempered_mean"] == sum(found[1].all_ok for found in said.values()) / 6


def test_notes_of_nothing_hide_no_others(copied: Path, whole: Done) -> None:
    seen: Row = {"plain": {}, "tempered": {}}
    for row in (
        {"prompt": [], "seed": 2024, **seen},
        {"prompt": 1, "seed": {}, **seen},
        {"single": ["a cat"], "seed": 2024, "notes": {}},
    ):
        outputs.append_json_line(copied / "notes-pocket.jsonl", row)
    assert call("--resume", str(copied)).code == 0
    assert summaries(copied) == summaries(whole.folder)


def test_notes_that_can_not_be_read_are_named(copied: Path) -> None:
    row = {"prompt": 1, "seed": 2024, "plain": {}, "tempered": {}}
    outputs.append_json_line(copied / "notes-pocket.jsonl", row)
    done = call("--resume", str(copied))
    assert done.code == 2
    assert "what pocket has noted can not be read: delete " in done.err.splitlines()[-1]


def older(folder: Path) -> None:
    """The folder as an evaluation of one prompt was, before there were sets, judges and pages."""
    rows = []
    for row in rows_of(folder):
        for name in ("prompt", "text", "plain_calls", "tempered_calls", "flags"):
            row.pop(name, None)
        rows.append(json.dumps(row) + "\n")
    (folder / "cycles.jsonl").write_text("".join(rows), encoding="utf-8")
    for name in ("notes-pocket.jsonl", "report.html", "summary.md"):
        (folder / name).unlink()
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    for name in ("judge", "batch", "prompts_file"):
        del run["arguments"][name]
    (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")


def test_an_old_evaluation_is_judged_without_its_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--prompts", "a cat", "a red car", "--cycles", "3", "--output", str(tmp_path))
    new = call(*FEW, *words)
    assert new.code == 0
    expected = summary(new.folder)["subsets"][0]["measures"]
    older(new.folder)
    monkeypatch.setattr(evaluation, "open_session", None)
    done = call("--resume", str(new.folder), "--judge", "pocket")
    assert (done.code, done.err) == (0, "")
    found = summary(new.folder)["subsets"][0]
    assert found["measures"] == expected
    assert found["cost"] is None  # it was not noted then
    assert (new.folder / "report.html").is_file()


# --- Judges from the Hub.


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A Hub that has tiny random OWLv2, CLIP and BLIP, among what need not be fetched."""
    folder = tmp_path_factory.mktemp("repositories")
    repositories = {}
    for number, (name, make) in enumerate(tiny_judges.REPOSITORIES.items()):
        files = files_of(make(folder / str(number)))
        unneeded = dict.fromkeys(("pytorch_model.bin", "tf_model.h5", "README.md"), b"not needed")
        repositories[name] = {**unneeded, **files}
    with Hub(repositories) as running:
        yield running


def process(words: Sequence[str], env: dict[str, str]) -> Done:
    done = subprocess.run(
        [sys.executable, "main.py", *words],
        cwd=REPOSITORY,
        env=env,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def test_judges_come_from_the_hub_and_judge_old_pictures(
    hub: Hub, copied: Path, tmp_path: Path
) -> None:
    before = {path: (copied / path).stat().st_mtime_ns for path in pictures(copied)}
    env = hub.environment(tmp_path / "home")
    done = process(["--resume", str(copied), "--judge", "owlv2", "blip-vqa"], env)
    assert done.code == 0, done.err
    assert {path: (copied / path).stat().st_mtime_ns for path in before} == before
    found = summary(copied)
    assert found["judges"] == ["owlv2", "blip-vqa", "pocket"]
    assert found["calibration"]["pictures"] == 0  # far too few cycles
    pooled = found["subsets"][-1]["measures"]
    assert {"owlv2/clip_whole", "owlv2/clip_worst", "blip-vqa/vqa_score"} <= pooled.keys()
    assert not [path for path in hub.downloads() if "not needed" in path or path.endswith(".bin")]
    text = (copied / "summary.md").read_text(encoding="utf-8")
    assert "how it agrees with people was not measured here" in text
    again = call("--resume", str(copied), "--offline")  # without their cache: all is judged
    assert again.code == 0, again.err
    assert summary(copied)["judges"] == found["judges"]


def test_owlv2_is_calibrated_on_pictures_of_single_subjects(hub: Hub, tmp_path: Path) -> None:
    asked = tuple(prompts.load("three-subjects", " and "))[:4]
    path = tmp_path / "mine.txt"
    path.write_text(prompts.write(asked, ""), encoding="utf-8")
    words = ["--prompts_file", str(path), "--cycles", str(SINGLES // 4), "--judge", "owlv2"]
    words += ["--steps", "2", "--stoptime", "1"]  # many pictures, whatever they show
    done = process([*FEW, *words, "--output", str(tmp_path)], hub.environment(tmp_path / "home"))
    assert done.code == 0, done.err
    records = Records(done.folder, asked, range(2024, 2024 + SINGLES // 4))
    wanted = singles(records, ["owlv2"])
    assert len(wanted) == SINGLES == len({single.file for single in wanted})
    assert {single.noun for single in wanted} == {
        subject_of(subject).noun for prompt in asked for subject in prompt.subjects
    }
    assert all(single.file.is_file() for single in wanted)
    assert summary(done.folder)["calibration"]["pictures"] == SINGLES
    assert f"of {SINGLES} subjects painted alone" in (done.folder / "summary.md").read_text("utf-8")


def test_a_small_evaluation_paints_nothing_to_calibrate_on(tmp_path: Path) -> None:
    pair = [Prompt(("a cat", "a dog"), " and ")]
    assert singles(Records(tmp_path, pair, range(SINGLES - 1)), ["owlv2"]) == []
    assert singles(Records(tmp_path, pair, range(SINGLES)), ["pocket", "blip-vqa"]) == []
    found = singles(Records(tmp_path, pair, range(7, 7 + SINGLES)), ["owlv2"])
    assert Counter(single.noun for single in found) == {"cat": 24, "dog": 24}
    assert len({(single.noun, single.seed) for single in found}) == SINGLES
    many = [Prompt((f"a thing {i}",), "") for i in range(1000)]
    assert (
        len({single.noun for single in singles(Records(tmp_path, many, range(1)), ["owlv2"])})
        == SINGLES
    )


def test_a_judge_that_can_not_be_had_says_how_to_go_on(copied: Path, tmp_path: Path) -> None:
    with Hub({}) as hub:
        env = hub.environment(tmp_path / "home")
        done = process(["--resume", str(copied), "--judge", "owlv2"], env)
    assert done.code == 1
    kept, error = done.err.splitlines()[-2:]
    assert kept.startswith("kept 6 of 6 cycles; go on with: ")
    assert "can not download google/owlv2-base-patch16-ensemble" in error
    assert "--judge none" in error
