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
