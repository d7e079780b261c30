"""The U-Net's learning curve: `python -m recipe.curve` measures every snapshot in the work folder.

Beside the loss stands what it does not tell: how many single subjects are all OK, and how many are
drawn whole (`recipe.fidelity`). It writes pocket/curve.json and pocket/curve.png.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

import outputs
from pocket.judge import load_judge
from pocket.world import SUBJECTS
from recipe.data import PICTURES, Studio, pictures, training_scene
from recipe.fidelity import NEIGHBOURS
from recipe.measure import FIGURES, denoiser, fidelity_figures, pocket, single_figures
from recipe.vae import train_vae

GUIDANCE_SCALE = 5.0
SHARES = {"all_ok": "one subject, all OK", "precision": "precision"}
FEWEST = len(SUBJECTS) * (NEIGHBOURS + 1)  # pictures: precision needs neighbours in each subject

Point = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m recipe.curve", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(__file__).parent / "work")
    parser.add_argument("--pictures", type=int, default=200, help="pictures a figure")
    args = parser.parse_args()
    if args.pictures < FEWEST:
        parser.error(f"--pictures must be at least {FEWEST}, got {args.pictures}")
    points = measure(args.work, args.pictures)
    FIGURES.with_name("curve.json").write_text(json.dumps(points, indent=2) + "\n", "utf-8")
    outputs.save_figure(FIGURES.with_name("curve.png"), draw(points))
    print(json.dumps(points, indent=2))


def measure(work: Path, count: int) -> list[Point]:
    """A point for each snapshot of the U-Net in `work`, from the first on."""
    pipe, judge, studio = pocket(), load_judge(), Studio(work / "packages")
    seen = pictures(studio, work, "train", PICTURES, training_scene)
    pipe.vae = train_vae(seen.images, work)  # whose latents the snapshots know, shipped or not
    networks = denoiser(pipe)  # the pipeline's own, so the pipeline paints as the snapshot does
    lines = [json.loads(line) for line in (work / "unet.jsonl").read_text("utf-8").splitlines()]
    points = []
    for path in sorted(work.glob("unet-*.pt")):
        step = int(path.stem.removeprefix("unet-"))
        networks.load_state_dict(torch.load(path, weights_only=True))
        single = single_figures(pipe, judge, count, GUIDANCE_SCALE)
        whole = fidelity_figures(pipe, judge, studio, count // len(SUBJECTS), GUIDANCE_SCALE)
        shares = {"all_ok": single["all_ok"], "precision": whole["mean"]["precision"]}
        points.append({"step": step, "loss": loss_before(step, lines), **shares})
    return points


def loss_before(step: int, lines: Sequence[Point], steps: int = 1000) -> float:
    """Mean of the training loss over the last `steps` steps before a snapshot."""
    near = [line["loss"] for line in lines if step - steps < line["step"] <= step]
    return round(float(np.mean(near)), 5)


def draw(points: Sequence[Point]) -> Figure:
    """The shares on the left axis, the loss on the right one."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    left = figure.add_subplot()
    right = left.twinx()
    steps = [point["step"] for point in points]
    for name, label in SHARES.items():
        left.plot(steps, [100 * point[name] for point in points], marker="o", label=label)
    right.plot(steps, [point["loss"] for point in points], "k:", label="loss (right)")
    left.set(xlabel="steps", ylabel="%", ylim=(0, 100), title="Single subjects, guidance 5")
    right.set(ylabel="mean loss of the last 1,000 steps")
    left.grid(color="0.9", linewidth=0.8)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return figure


if __name__ == "__main__":
    main()
