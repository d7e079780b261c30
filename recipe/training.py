"""The training loop that every stage shares: seeded, resumable after a kill, with a moving average.

Batches are a function of the seed and the step alone, so a resumed run sees the same ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

CHECKPOINT_SECONDS = 240


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

    def rate(self, step: int) -> float:
        """Learning rate: linear warm-up, constant, linear fall."""
        fall = (self.steps - step) / (self.decay * self.steps)
        return self.lr * min(1.0, (step + 1) / self.warmup, fall)


def generator(seed: int, step: int) -> torch.Generator:
    """The random generator of one step of one run."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


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

    `loss(model, generator)` draws a batch and returns its scalar loss. The state goes to
    `work/<name>.pt` every few minutes; a later call goes on from there.
    """
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(plan.ema))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=plan.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    states = {"model": model, "average": average, "optimizer": optimizer}
    path = work / f"{name}.pt"
    first = _restore(path, states)
    model.train()
    # Never compiled: on CPUs torch.compile (torch 2.13.0) zeroes most gradients of the U-Net.
    saved, smooth = time.monotonic(), None
    bar = tqdm(range(first, plan.steps), name, initial=first, total=plan.steps, mininterval=5)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = plan.rate(step)
        value = loss(model, generator(plan.seed, step))
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(model)
        smooth = value.item() if smooth is None else 0.99 * smooth + 0.01 * value.item()
        bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            _save(path, states, step + 1)
            saved = time.monotonic()
    if first < plan.steps:
        _save(path, states, plan.steps)
    return average.module.eval()


def _restore(path: Path, states: dict[str, object]) -> int:
    if not path.exists():
        return 0
    stored = torch.load(path, weights_only=True)
    for key, part in states.items():
        part.load_state_dict(stored[key])  # type: ignore[attr-defined]
    return int(stored["step"])


def _save(path: Path, states: dict[str, object], step: int) -> None:
    stored = {key: part.state_dict() for key, part in states.items()}  # type: ignore[attr-defined]
    partial = path.with_suffix(".partial")
    torch.save({**stored, "step": step}, partial)
    partial.rename(path)
