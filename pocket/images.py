"""Pictures as the pocket's networks take them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Pixels = NDArray[np.uint8]


def as_tensor(images: Pixels) -> Tensor:
    """uint8 images (N, H, W, 3) as float32 (N, 3, H, W) in -1..1, channels last."""
    return (torch.from_numpy(images).float() / 127.5 - 1).permute(0, 3, 1, 2)


def as_pixels(images: Tensor) -> Pixels:
    """Images (N, 3, H, W) in -1..1, cut off there, as uint8 (N, H, W, 3)."""
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return np.asarray(pixels.permute(0, 2, 3, 1))
