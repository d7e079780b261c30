"""What befalls a rendered picture on its way to a network: blur, tint, noise, as generators make.

Images are (B, 3, 64, 64), float32, about -1..1; each of a batch is changed by amounts of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def worn(x: Tensor, rng: torch.Generator) -> Tensor:
    """Softened, recast and noisy."""
    return noisy(recast(softened(x, rng), rng), rng)


def softened(x: Tensor, rng: torch.Generator) -> Tensor:
    """Somewhere between a little sharpened and blurred as an autoencoder blurs."""
    narrow = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    coarse = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2.0, mode="bilinear")
    amounts = between(-0.3, 1, (2, len(x), 1, 1, 1), rng)
    soft = narrow.lerp(coarse, amounts[0].clamp(min=0))
    return x.lerp(soft, amounts[1])


def recast(x: Tensor, rng: torch.Generator) -> Tensor:
    """Contrast, brightness and tint change by less than what divides two colours' names."""
    contrast = between(0.9, 1.1, (len(x), 1, 1, 1), rng)
    brightness = between(-0.06, 0.06, (len(x), 1, 1, 1), rng)
    tint = between(-0.04, 0.04, (len(x), 3, 1, 1), rng)
    return x * contrast + brightness + tint


def noisy(x: Tensor, rng: torch.Generator) -> Tensor:
    """Fine noise on some pictures, coarse on others."""
    fine = torch.randn(x.shape, generator=rng)
    coarse = F.interpolate(fine[..., ::4, ::4], scale_factor=4.0, mode="bilinear")
    amounts = between(-0.06, 0.06, (2, len(x), 1, 1, 1), rng).clamp(min=0)
    return x + fine * amounts[0] + coarse * amounts[1]


def between(low: float, high: float, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=rng)
