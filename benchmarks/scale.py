"""How an evaluation's paperwork grows: resuming, checking, summing up, with rows but no painting.

    python -m benchmarks.scale [--cycles 1000 10000 100000] [--ranks 64] [--paint 48]

Makes folders as so many processes would have left them (4 seeds a prompt, a judge's notes, every
picture a link to one of a few), and takes the seconds and the peak memory of each step in a process
of its own. Then it paints some cycles of the pocket, and holds the time that they took against the
sum of their model calls. Prints a table and writes benchmarks/results/scale.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import cycles
import evaluation
import outputs
import painting
import prompts
from benchmarks.quality import RESULTS
from benchmarks.speed import Clock, Loaded
from comparison import markdown
from cycles import PICTURES, Records
from main import parse, to_request
from session import open_session

SEEDS = 4
SUBSETS = ("animal-animal", "animal-object", "object-object")
CPU = torch.device("cpu")
LINKS = 30_000  # to one file: file systems have a limit
FLAGS = ("--evaluate", "--model", "pocket", "--cycles", str(SEEDS))
STEPS = {
    "resume": "what the first process reads when all start again",
    "check": "what each process reads of its share's pictures then",
    "summary": "all tables, files and the page, when the last process has finished",
}
COLUMNS = ("cycles", "processes", "step", "s", "MiB", "page, MB")


def main(argv: Sequence[str] | None = None) -> int:
    """Make folders, measure, print, write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale",
        description="How resuming and summing up grow with an evaluation.",
        allow_abbrev=False,
    )
    parser.add_argument("--cycles", nargs="+", type=int, default=[1000, 10_000, 100_000])
    parser.add_argument("--ranks", type=int, default=64, metavar="N")
    parser.add_argument("--paint", type=int, default=48, metavar="N", help="cycles of the pocket")
    parser.add_argument("--step", choices=list(STEPS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.step:
        print(json.dumps(measured(args.step, args.folder, args.ranks)))
        return 0
    found = []
    for count in args.cycles:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "evaluation"
            make(folder, count, args.ranks)
            for step in STEPS:
                row = {"cycles": count, "processes": args.ranks, "step": step}
                found.append({**row, **in_a_process(step, folder, args.ranks)})
                print(found[-1], file=sys.stderr, flush=True)
    painted = painting_beside_its_models(args.paint)
    outputs.save_json(RESULTS / "scale.json", {"steps": STEPS, "rows": found, "painting": painted})
    cells = [[str(row.get(name, "")) for name in COLUMNS] for row in found]
    print(markdown([COLUMNS, *cells], words=0))
    print(
        f"\n{painted['cycles']} cycles of the pocket: {painted['seconds']:.2f} s each, "
        f"{painted['times the models']:.3f} times their model calls"
    )
    return 0


def painting_beside_its_models(count: int) -> dict[str, float]:
    """Seconds of a cycle, files included, and how many times those of its model calls they are."""
    asked = prompts.load("attend-and-excite", "")
    with tempfile.TemporaryDirectory() as place:
        words = ["--evaluate", "--model", "pocket", "--device", "cpu", "--output", place]
        request = to_request(parse(words))
        session = open_session(request)
        clock = Clock(Loaded(session.pipe, session.painter.clipseg, lambda _: None))
        records = Records(Path(place), asked[:: max(1, len(asked) // count)][:count], range(1))
        begun = time.perf_counter()
        for row in painting.paint(session, records, records.keys, painting.Batch(1, CPU), {}):
            outputs.append_json_line(records.rows_file(0), row)
        seconds = time.perf_counter() - begun
    models = sum(part.seconds for part in clock.parts().values())
    done = len(records.keys)
    return {
        "cycles": done,
        "seconds": round(seconds / done, 3),
        "times the models": round(seconds / models, 4),
    }


def in_a_process(step: str, folder: Path, ranks: int) -> dict[str, Any]:
    """The figures of one step, which nothing before it has warmed up or swollen."""
    words = ["--step", step, "--folder", str(folder), "--ranks", str(ranks)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.scale", *words],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measured(step: str, folder: Path, ranks: int) -> dict[str, Any]:
    request = to_request(parse(["--resume", str(folder)]))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.perf_counter()
    records = Records(folder, request.all_prompts, evaluation.seeds_of(request))
    found: dict[str, Any] = {}
    if step == "resume":
        evaluation.begin(request)
    elif step == "check":
        assert all(records.is_painted(key) for key in records.keys[::ranks])
    else:
        facts = outputs.read_json(folder / "run.json")
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            evaluation.conclude(records, ["pocket"], 0, request.title, facts)
        found["page, MB"] = round((folder / "report.html").stat().st_size / 1e6, 1)
    seconds = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # ru_maxrss is in KiB on Linux: what the libraries take by themselves is in `before`.
    return {
        "s": round(seconds, 1),
        "MiB": round(peak / 1024),
        "before": round(before / 1024),
        **found,
    }


def make(folder: Path, count: int, ranks: int) -> None:
    """A finished evaluation of `count` cycles, by so many processes."""
    folder.mkdir(parents=True)
    number = -(-count // SEEDS)
    asked = [
        prompts.Prompt((f"a {SUBSETS[i % 3]} {i}", f"a thing {i}"), " and ", SUBSETS[i % 3])
        for i in range(number)
    ]
    records = Records(folder, asked, range(2024, 2024 + SEEDS))
    (folder / prompts.KEPT).write_text(prompts.write(asked, ""), encoding="utf-8")
    arguments = dict.fromkeys(("batch", "device", "judge", "offload")) | {"cycles": SEEDS}
    facts: dict[str, Any] = {
        "arguments": {**arguments, "evaluate": True, "prompts_file": "simulated"}
    }
    facts |= {"model": "pocket", "dtype": "float32", "device": "cpu", "scheduler": "Euler"}
    facts |= {"versions": {}, "started": "2025-01-01T00:00:00", "notice": None}
    outputs.save_json(folder / "run.json", facts)
    generator = np.random.default_rng(0)
    for rank in range(ranks):
        share = records.keys[rank::ranks]
        figures = generator.random((len(share), 2, 3))
        seen = generator.random((len(share), 2)) < (0.4, 0.2)
        rows = [row(records, key, *each) for key, each in zip(share, figures.tolist(), strict=True)]
        notes = [note(key, *each) for key, each in zip(share, seen.tolist(), strict=True)]
        records.rows_file(rank).write_text("".join(rows), encoding="utf-8")
        records.notes_file("pocket", rank).write_text("".join(notes), encoding="utf-8")
    link_pictures(records)


def row(records: Records, key: cycles.Key, plain: list[float], tempered: list[float]) -> str:
    """A cycle's line, as long as a real one."""
    sides = {
        name: {**dict(zip(cycles.FIGURES, values, strict=True)), "class_matrix": [values[:2]] * 2}
        for name, values in zip(PICTURES, (plain, tempered), strict=True)
    }
    calls = {"unet_calls": 40, "plain_calls": 20, "tempered_calls": 20 + int(60 * plain[0] ** 3)}
    told = {"cycle": 1, "prompt": key[0], "text": records.prompt(key).text, "seed": key[1], **calls}
    made = {"rounds": 2, "seconds": 1.234, "model": "pocket", "dtype": "float32", "flags": "0" * 12}
    return json.dumps({**told, **sides, **made}) + "\n"


def note(key: cycles.Key, *missing: bool) -> str:
    """A judge's line."""
    sides = {
        name: {"missing": lost, "wrong_colour": False, "fused": False, "extra": False}
        for name, lost in zip(PICTURES, missing, strict=True)
    }
    return json.dumps({"prompt": key[0], "seed": key[1], **sides}) + "\n"


def link_pictures(records: Records) -> None:
    """A file for every picture, of the pocket's size, though few are different."""
    noise = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    encoded = BytesIO()
    Image.fromarray(noise).resize((64, 64)).save(encoded, "PNG")
    wanted = [records.picture_file(key, name) for key in records.keys for name in PICTURES]
    for i, path in enumerate(wanted):
        path.parent.mkdir(exist_ok=True)
        if i % LINKS == 0:
            path.write_bytes(encoded.getvalue())
            source = path
        else:
            os.link(source, path)


if __name__ == "__main__":
    sys.exit(main())
