"""The training loop that every stage shares: seeded, resumable after a kill, with a moving average.

Several processes (torchrun) share each batch and average their gradients: on two cores two of one
thread each are faster than one of two threads. Batches are a function of the seed, the step and the
process alone, so a resumed run sees the same ones.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, distributed, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

CHECKPOINT_SECONDS = 240
LOGGED = 100  # steps of which the learning curve keeps the mean loss

# Compiled, the nearest-neighbour upsampling of torch 2.13.0 on CPUs passes no gradient back: of a
# U-Net all but the outermost level stands still. Left out of the graphs, every gradient is right.
Upsample2D.forward = torch.compiler.disable(Upsample2D.forward)


Made = TypeVar("Made")


@dataclass(frozen=True)
class Plan:
    """How long and how fast a stage trains."""

    steps: int
    batch: int
    lr: float
    ema: float = 0.999
    warmup: int = 200
    decay: float = 0.3  # share of the steps over which the rate falls to zero at the end
    seed: int = 0
    snapshots: int | None = None  # steps after which the average so far is kept beside the state
    compiled: bool = False  # minutes of compiling, for hours of training a third faster

    @property
    def share(self) -> int:
        """What one process takes of each batch."""
        return self.batch // processes()

    def rate(self, step: int) -> float:
        """Learning rate: linear warm-up, constant, linear fall."""
        fall = (self.steps - step) / (self.decay * self.steps)
        return self.lr * min(1.0, (step + 1) / self.warmup, fall)


def processes() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def process() -> int:
    """The number of this one, from 0; the first one writes."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def first_alone(make: Callable[[], Made]) -> Made:
    """What `make` returns; the first process calls it before the others, who find its files."""
    if processes() == 1:
        return make()
    if process() > 0:
        distributed.barrier()
    made = make()
    if process() == 0:
        distributed.barrier()
    return made


def generator(seed: int, step: int) -> torch.Generator:
    """This process's random generator of one step of one run."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step * processes() + process())


def bf16() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def fit(
    name: str,
    model: nn.Module,
    loss: Callable[[nn.Module, torch.Generator], Tensor],
    plan: Plan,
    work: Path,
) -> nn.Module:
    """Train `model` by `plan` and return its exponential moving average, in eval mode.

    `loss(model, generator)` draws `plan.share` examples and returns their scalar loss. The state
    goes to `work/<name>.pt` every few minutes, the learning curve to `work/<name>.jsonl`; a later
    call goes on from there.
    """
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(plan.ema))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=plan.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    states = {"model": model, "average": average, "optimizer": optimizer}
    path = work / f"{name}.pt"
    first = _restore(path, states)
    model.train()
    run: Any = torch.compile(model) if plan.compiled else model
    saved, curve = time.monotonic(), Curve(path.with_suffix(".jsonl"))
    bar = tqdm(
        range(first, plan.steps), name, initial=first, total=plan.steps, mininterval=5,
        disable=process() > 0,
    )  # fmt: skip
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = plan.rate(step)
        value = loss(run, generator(plan.seed, step))
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        _share_gradients(model)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(model)
        curve.add(step + 1, value.item())
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            _save(path, states, step + 1)
            saved = time.monotonic()
        if plan.snapshots and (step + 1) % plan.snapshots == 0 and process() == 0:
            torch.save(average.module.state_dict(), work / f"{name}-{step + 1:06}.pt")
    if first < plan.steps:
        _save(path, states, plan.steps)
    return average.module.eval()


class Curve:
    """The learning curve: a line for every `LOGGED` steps, with their mean loss."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._values: list[float] = []

    def add(self, step: int, value: float) -> None:
        self._values.append(value)
        if step % LOGGED:
            return
        line = {"step": step, "loss": sum(self._values) / len(self._values)}
        self._values = []
        if process() == 0:
            with self._path.open("a", encoding="utf-8") as file:
                print(json.dumps({**line, "time": round(time.time())}), file=file)


def _share_gradients(model: nn.Module) -> None:
    """Average the gradients of all processes, in one message."""
    if processes() == 1:
        return
    gradients = [each.grad for each in model.parameters() if each.grad is not None]
    flat = torch.cat([each.flatten() for each in gradients])
    distributed.all_reduce(flat)
    flat /= processes()
    for gradient, mean in zip(
        gradients, flat.split([each.numel() for each in gradients]), strict=True
    ):
        gradient.copy_(mean.view_as(gradient))


def _restore(path: Path, states: dict[str, object]) -> int:
    if not path.exists():
        return 0
    stored = torch.load(path, weights_only=True)
    for key, part in states.items():
        part.load_state_dict(stored[key])  # type: ignore[attr-defined]
    return int(stored["step"])


def _save(path: Path, states: dict[str, object], step: int) -> None:
    if process() > 0:  # all processes hold the same
        return
    stored = {key: part.state_dict() for key, part in states.items()}  # type: ignore[attr-defined]
    partial = path.with_suffix(".partial")
    torch.save({**stored, "step": step}, partial)
    partial.rename(path)
