"""The network of the pocket's judge: its architecture alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from pocket.world import COLOUR_NAMES, SUBJECTS

# The background and a thing that is no one subject besides; a drawing's own colours besides.
SUBJECT_LABELS, COLOUR_LABELS = len(SUBJECTS) + 2, len(COLOUR_NAMES) + 1


class Block(nn.Module):
    """Two 3x3 convolutions around a skip connection; `stride` 2 halves the side."""

    def __init__(self, width_in: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.first = convolution(width_in, width, stride)
        self.second = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        )
        changed = stride > 1 or width_in != width
        self.skip = nn.Conv2d(width_in, width, 1, stride) if changed else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(self.first(x)) + self.skip(x))


def convolution(width_in: int, width: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    )


class JudgeNet(nn.Module):
    """A feature pyramid (Lin et al. 2017, arXiv:1612.03144) of 1.2 M parameters.

    Residual blocks go down to 4x4, where a cell sees the whole picture; what they saw comes back
    up to 32x32 on lateral connections.
    """

    def __init__(self, widths: Sequence[int] = (32, 64, 96, 128), width_up: int = 64) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            [
                nn.Sequential(convolution(3, widths[0], 2), Block(widths[0], widths[0])),
                *(
                    nn.Sequential(Block(above, width, 2), Block(width, width))
                    for above, width in itertools.pairwise(widths)
                ),
            ]
        )
        self.across = nn.ModuleList([nn.Conv2d(width, width_up, 1) for width in widths])
        self.up = nn.ModuleList([convolution(width_up, width_up) for _ in widths])
        self.head = nn.Conv2d(width_up, SUBJECT_LABELS + COLOUR_LABELS, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of subject (B, 27, 32, 32) and colour (B, 12, 32, 32) for (B, 3, 64, 64)."""
        laterals = [across(x) for across, x in zip(self.across, self.levels(images), strict=True)]
        y = self.up[-1](laterals[-1])
        for up, lateral in zip(reversed(self.up[:-1]), reversed(laterals[:-1]), strict=True):
            y = up(lateral + F.interpolate(y, scale_factor=2.0))
        logits = self.head(y)
        return logits[:, :SUBJECT_LABELS], logits[:, SUBJECT_LABELS:]

    def levels(self, images: Tensor) -> list[Tensor]:
        """What is seen on the way down: (B, width, side, side) for sides 32, 16, 8, 4."""
        x, seen = images, []
        for down in self.down:
            x = down(x)
            seen.append(x)
        return seen
