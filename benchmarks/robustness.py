"""Whether a budget means the same under any CLIPSeg, guidance, number of steps and scheduler.

    python -m benchmarks.robustness [--pictures 30] [--conditions NAME ...]

Under each condition: plain pictures, tempering with the thresholds that the budget has under the
first condition ("fixed"), without a sample ("uncalibrated") and with one of the condition's own
("calibrated"), on prompts and seeds that are neither reported nor in a sample. Writes
robustness.json and robustness.png to benchmarks/results, and prints a table.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cache, partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

import outputs
from benchmarks.methods import SAMPLE, Case, Method, Models, Painted, plain, tempered
from benchmarks.prompts import development
from benchmarks.quality import RESULTS, SEEDS_A_SUBSET, Row, column, drawn, judged
from benchmarks.roster import PLAIN, paying
from comparison import markdown
from loaders import SCHEDULERS, set_scheduler
from metrics import bootstrap_interval
from segmentation import ClipSeg
from settings import Tempering
from sheets import class_colours

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIRST_SEED = 980_000
BUDGETS = (1.3, 2.0)
FIXED, UNCALIBRATED, CALIBRATED = WAYS = ("fixed", "uncalibrated", "calibrated")
# CLIPSeg's logits (N, H, W) and the embeddings (N, D) of their classes -> other logits
Bend = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Condition:
    """What is other than usual."""

    bend: Bend | None = None
    blur: float = 0.0  # of what CLIPSeg sees, in pixels
    damage: float = 0.0  # noise on CLIPSeg's weights, in their own spread
    scheduler: str = "euler"
    changes: Mapping[str, Any] = field(default_factory=dict)  # of the settings


def linear(a: float, b: float, spread: float = 0.0) -> Condition:
    """Logits a * logit + b, and a bias of each picture and class of that standard deviation."""

    def bend(logits: Tensor, embeddings: Tensor) -> Tensor:
        noise = torch.special.ndtri(fraction(logits.mean(dim=(-2, -1))).clamp(1e-3, 1 - 1e-3))
        return a * logits + b + spread * noise[:, None, None]

    return Condition(bend)


def weak(a: float, b: float) -> Condition:
    """The same, but of one class in two alone: always the same ones."""

    def bend(logits: Tensor, embeddings: Tensor) -> Tensor:
        chosen = (fraction(embeddings.float().mean(dim=-1)) < 0.5)[:, None, None]
        return torch.where(chosen, a * logits + b, logits)

    return Condition(bend)


def noisy(spread: float) -> Condition:
    """Noise on every logit."""

    def bend(logits: Tensor, embeddings: Tensor) -> Tensor:
        noise = torch.special.ndtri(fraction(logits).clamp(1e-3, 1 - 1e-3))
        return logits + spread * noise

    return Condition(bend)


def fraction(values: Tensor) -> Tensor:
    """As good as random in 0..1, and the same for the same values, whichever process asks."""
    return (values.double() * 43_758.5453).sin().mul(9_973.7).frac().abs()


CONDITIONS: dict[str, Condition] = {
    "as it is": Condition(),
    "a 0.5, b -1": linear(0.5, -1),
    "b -3": linear(1, -3),
    "a 0.3, b -0.5": linear(0.3, -0.5),
    "a 0.4, b -1.5": linear(0.4, -1.5),
    "a 2, b 2": linear(2, 2),
    "s 2": linear(1, 0, 2),
    "a 0.3, b -0.5, s 0.6": linear(0.3, -0.5, 0.6),
    "some classes b -2": weak(1, -2),
    "some classes a 0.5": weak(0.5, 0),
    "noise 1": noisy(1),
    "blurred": Condition(blur=1.5),
    "damaged CLIPSeg": Condition(damage=0.1),
    **{
        f"guidance {scale:g}": Condition(changes={"guidance_scale": scale})
        for scale in (2.0, 7.5, 10.0)
    },
    **{f"{steps} steps": Condition(changes={"steps": steps}) for steps in (10, 30, 50)},
    **{name: Condition(scheduler=name) for name in SCHEDULERS if name != "euler"},
}
USUAL = next(iter(CONDITIONS))


def main(argv: Sequence[str] | None = None) -> int:
    """Paint, judge, write, print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.robustness",
        description="Cost and quality of a budget under other CLIPSegs and samplers.",
        allow_abbrev=False,
    )
    parser.add_argument("--pictures", type=int, default=30, metavar="N", help="a subset")
    parser.add_argument(
        "--conditions", nargs="+", metavar="NAME", choices=list(CONDITIONS),
        default=list(CONDITIONS), help=f"from {', '.join(CONDITIONS)} (default: all)",
    )  # fmt: skip
    parser.add_argument("--processes", type=int, default=os.cpu_count(), metavar="N")
    args = parser.parse_args(argv)
    if not 1 <= args.pictures <= SEEDS_A_SUBSET:
        parser.error(f"--pictures must be in 1..{SEEDS_A_SUBSET}, got {args.pictures}")
    if args.processes < 1:
        parser.error(f"--processes must be at least 1, got {args.processes}")
    prompts = {subset: found[SAMPLE:] for subset, found in development().items()}
    cases = drawn(prompts, args.pictures, FIRST_SEED)
    names = list(dict.fromkeys([USUAL, *args.conditions]))
    methods = {key: method for name in names for key, method in cells(name)}
    rows: dict[str, list[Row]] = {}
    for row in judged(methods, cases, args.processes):
        rows.setdefault(row["method"], []).append(row)
    found = [figures(name, rows) for name in names]
    outputs.save_json(RESULTS / "robustness.json", found)
    outputs.save_figure(RESULTS / "robustness.png", plot(found))
    print(table(found))
    return 0


def cells(name: str) -> Iterator[tuple[str, Method]]:
    """What is painted under a condition."""
    yield f"{name}/{PLAIN}", partial(plain_under, condition=name)
    for way in WAYS:
        for budget in BUDGETS:
            yield (
                f"{name}/{way}/{budget:g}",
                partial(tempered_under, condition=name, way=way, budget=budget),
            )


def plain_under(models: Models, cases: Sequence[Case], condition: str) -> list[Painted]:
    with under(models, condition) as (bent, settings):
        return plain(bent, cases, settings)


def tempered_under(
    models: Models, cases: Sequence[Case], condition: str, way: str, budget: float
) -> list[Painted]:
    fixed = paying(budget)
    usual = models.limits(fixed) if way == FIXED else None
    with under(models, condition) as (bent, settings):
        settings = replace(settings, budget=fixed.budget, max_cost=fixed.max_cost)
        if usual:
            settings = replace(settings, accept=usual.last, early_accept=usual.early)
        return tempered(bent, cases, settings, calibrated=way == CALIBRATED)


@contextmanager
def under(models: Models, name: str) -> Iterator[tuple[Models, Tempering]]:
    """Models and settings under a condition."""
    condition = CONDITIONS[name]
    before = models.pipe.scheduler
    set_scheduler(models.pipe, condition.scheduler)
    usual = paying(BUDGETS[0])
    changed = {**follow(condition.changes), **condition.changes}
    try:
        yield bent_models(models, name), replace(usual, **changed)
    finally:
        models.pipe.scheduler = before


def follow(changes: Mapping[str, Any]) -> dict[str, int]:
    """What follows the number of steps."""
    if "steps" not in changes:
        return {}
    way = Tempering(steps=changes["steps"])
    return {name: getattr(way, name) for name in ("stoptime", "backsteps", "early_look")}


@cache
def bent_models(models: Models, name: str) -> Models:
    """The same pipeline with a CLIPSeg as the condition has it."""
    condition = CONDITIONS[name]
    model, processor = deepcopy(models.clipseg.model), models.clipseg.processor
    if condition.damage:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weights in model.decoder.parameters():
                noise = torch.randn(weights.shape, generator=generator).to(weights.dtype)
                weights += condition.damage * weights.std(correction=0) * noise
    bend = condition.bend
    if bend:

        def hook(_: Any, args: tuple[Any, Tensor], output: Any) -> Any:
            output.logits = bend(output.logits.float(), args[1])
            return output

        model.decoder.register_forward_hook(hook)
    if condition.blur:
        processor = SimpleNamespace(
            tokenizer=processor.tokenizer,
            image_processor=partial(blurred, processor.image_processor, condition.blur),
        )
    return Models(models.pipe, ClipSeg(model, processor))


def blurred(
    image_processor: Callable[..., Any],
    radius: float,
    images: Sequence[Image.Image],
    **options: Any,
) -> Any:
    """What the processor makes of blurred images."""
    return image_processor(
        [image.filter(ImageFilter.GaussianBlur(radius)) for image in images], **options
    )


# --- Figures.


def figures(name: str, rows: Mapping[str, Sequence[Row]]) -> Row:
    """Of each way and budget: rate, cost in plain pictures, and what of the gain is there."""
    before = rows[f"{name}/{PLAIN}"]
    calls, rate = column(before, "unet_calls").mean(), column(before, "all_ok").mean()
    found: Row = {"condition": name, "pictures": len(before), PLAIN: float(rate)}
    for way in WAYS:
        for budget in BUDGETS:
            cell = rows[f"{name}/{way}/{budget:g}"]
            good, costs = column(cell, "all_ok"), column(cell, "unet_calls") / calls
            low, high = bootstrap_interval(good)
            found[f"{way}/{budget:g}"] = {
                "all_ok": round(float(good.mean()), 4),
                "low": low,
                "high": high,
                "cost": round(float(costs.mean()), 4),
                "median": round(float(np.median(costs)), 4),
                "p95": round(float(np.percentile(costs, 95)), 4),
                "most": round(float(costs.max()), 4),
            }
    return found


def table(found: Sequence[Row]) -> str:
    """A row a condition: of each way and budget the rate, the mean cost and the dearest picture."""
    keys = [f"{way}/{budget:g}" for way in WAYS for budget in BUDGETS]
    head = ["condition", PLAIN, *(f"{key.replace('/', ' ')}x" for key in keys)]
    lines = [
        [
            row["condition"],
            f"{row[PLAIN]:.1%}",
            *(
                f"{row[key]['all_ok']:.1%} {row[key]['cost']:.2f}x ({row[key]['most']:.1f})"
                for key in keys
            ),
        ]
        for row in found
    ]
    return markdown([head, *lines])


def plot(found: Sequence[Row]) -> Figure:
    """Rate against mean cost: a point a condition and way, budgets apart."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    colours = [tuple(part / 255 for part in each) for each in class_colours(len(WAYS))]
    for axes, budget in zip(figure.subplots(1, len(BUDGETS), sharey=True), BUDGETS, strict=True):
        for way, mark, colour in zip(WAYS, "xso", colours, strict=True):
            cells = [row[f"{way}/{budget:g}"] for row in found]
            axes.scatter(
                [cell["cost"] for cell in cells],
                [100 * cell["all_ok"] for cell in cells],
                marker=mark,
                color=colour,
                label=way,
            )
        axes.axvspan(0.9 * budget, 1.1 * budget, color="0.92", zorder=0)
        axes.set_title(f"budget {budget:g}: within 10 % is grey")
        axes.set_xlabel("mean cost, in plain pictures")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("pictures that are all OK, %")
    figure.axes[0].legend(frameon=False)
    return figure


if __name__ == "__main__":
    sys.exit(main())
