"""The judge of the pocket's pictures: is every subject there, in its colour, and nothing fused?

A small convolutional network labels the pixels of a picture; fixed rules read a verdict off the
labels. It shares no architecture and no training pictures with the CLIPSeg that guides the
tempering, and the tempering never sees it. `recipe/judge.py` is what trained it.

Labels stand on a grid of 32x32 cells, each 2x2 pixels of the picture:
    subject  0 the background, 1 .. 25 the subjects of `pocket.world`, 26 (`HYBRID`) a thing that
             is no one subject: grown together from two, half this and half that, or malformed.
    colour   0 .. 10 the colours of `pocket.world`, 11 (`NATURAL`) a drawing's own colours,
             255 (`NO_COLOUR`) where there is no subject.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from scipy import ndimage
from torch import Tensor

from pocket.images import Pixels, as_tensor
from pocket.judgenet import JudgeNet
from pocket.world import COLOUR_NAMES, SUBJECTS, Noun

WEIGHTS = Path(__file__).with_name("judge.safetensors")
SIDE = 64  # pixels of a picture

BACKGROUND, HYBRID = 0, len(SUBJECTS) + 1
NATURAL, NO_COLOUR = len(COLOUR_NAMES), 255

# The smallest subject of the pocket world, a chair of 20 pixels, covers 19 cells. With less than
# half of that it is not there as a whole; smaller patches are misread edges.
PRESENT_CELLS = 9
# A seam between two subjects that touch reads as hybrid over a few cells; a fused thing is
# larger: the smallest that the recipe draws covers 31.
FUSED_CELLS = 16
# A subject has its colour if this share of its cells has it. The rest is left for markings that
# stay dark or light in every colour; a subject of two colours has a third of its cells in each.
COLOUR_SHARE = 0.75


@dataclass(frozen=True)
class Verdict:
    """What is wrong with a picture, given the nouns of its prompts.

    missing: a subject is not there. What has grown into another subject is not there either.
    wrong_colour: a subject that is there has not the colour that its prompt names.
    fused: something in the picture is no one subject (`HYBRID`), whether it was asked for or not.
    extra: a subject is there that no prompt names. It is told, but spoils nothing: the seed's
        method promises that the asked subjects are there, not that they are alone.
    """

    missing: bool
    wrong_colour: bool
    fused: bool
    extra: bool = False

    @property
    def all_ok(self) -> bool:
        return not (self.missing or self.wrong_colour or self.fused)


@dataclass(frozen=True)
class Labels:
    """Label maps of N pictures: `subject` and `colour`, (N, 32, 32) uint8."""

    subject: Pixels
    colour: Pixels


def verdict(subject: Pixels, colour: Pixels, nouns: Sequence[Noun]) -> Verdict:
    """Read the verdict off one picture's label maps, (32, 32) uint8 each.

    Raises ValueError where two nouns name the same subject: their pixels can not be told apart.
    """
    asked = {noun.subject for noun in nouns}
    if len(asked) < len(nouns):
        raise ValueError(f"the judge needs different subjects, not {[n.phrase() for n in nouns]}")
    present = {name for name in SUBJECTS if has_patch(subject == label_of(name), PRESENT_CELLS)}
    return Verdict(
        missing=not asked <= present,
        wrong_colour=any(
            noun.colour is not None and not has_colour(subject, colour, noun)
            for noun in nouns
            if noun.subject in present
        ),
        fused=has_patch(subject == HYBRID, FUSED_CELLS),
        extra=not present <= asked,
    )


def label_of(subject: str) -> int:
    return SUBJECTS.index(subject) + 1


def has_patch(mask: NDArray[np.bool_], cells: int) -> bool:
    """Whether one connected patch of `mask` covers at least `cells` cells."""
    if mask.sum() < cells:  # most subjects are in no picture: spares the search
        return False
    # Cells that meet at a corner belong together: the legs of a small chair are one cell wide.
    patches, _ = ndimage.label(mask, np.ones((3, 3)))
    return bool(np.bincount(patches.ravel())[1:].max() >= cells)


def has_colour(subject: Pixels, colour: Pixels, noun: Noun) -> bool:
    """Whether enough of the cells of the noun's subject have the noun's colour."""
    assert noun.colour is not None
    cells = colour[subject == label_of(noun.subject)]
    return bool((cells == COLOUR_NAMES.index(noun.colour)).mean() >= COLOUR_SHARE)


class Judge:
    """A trained `JudgeNet` and the rules that read its labels."""

    def __init__(self, net: JudgeNet) -> None:
        self._net = net.eval()

    def judge(self, images: Pixels, nouns: Sequence[Sequence[Noun]]) -> list[Verdict]:
        """One verdict a picture: `images` (N, 64, 64, 3) uint8, `nouns` of its N prompt lists."""
        if images.shape[1:] != (SIDE, SIDE, 3) or images.dtype != np.uint8:
            raise ValueError(
                f"the judge needs uint8 images (N, 64, 64, 3), got {images.dtype} {images.shape}"
            )
        labels = self.label(images)
        return [
            verdict(subject, colour, asked)
            for subject, colour, asked in zip(labels.subject, labels.colour, nouns, strict=True)
        ]

    def label(self, images: Pixels, batch: int = 64) -> Labels:
        """The label maps of `images` (N, 64, 64, 3) uint8."""
        parts = [self._label(images[i : i + batch]) for i in range(0, len(images), batch)]
        subject, colour = (np.concatenate(maps) for maps in zip(*parts, strict=True))
        return Labels(subject, colour)

    @torch.inference_mode()
    def features(self, images: Tensor) -> Tensor:
        """The deepest level (B, 128, 4, 4) for images (B, 3, 64, 64) in -1..1."""
        return self._net.levels(images)[-1]

    @torch.inference_mode()
    def _label(self, images: Pixels) -> tuple[Pixels, Pixels]:
        x = as_tensor(np.ascontiguousarray(images))
        # The mean over the picture and its mirror image is steadier than either.
        subject, colour = (
            (ours.softmax(1) + theirs.flip(-1).softmax(1)).argmax(1).numpy().astype(np.uint8)
            for ours, theirs in zip(self._net(x), self._net(x.flip(-1)), strict=True)
        )
        colour[(subject == BACKGROUND) | (subject == HYBRID)] = NO_COLOUR
        return subject, colour


def load_judge(path: Path = WEIGHTS) -> Judge:
    """The judge with the weights that come with the repository (fp16, computed in float32)."""
    net = JudgeNet()
    net.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return Judge(net)
