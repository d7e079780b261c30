"""Other methods that paint each subject in a region of its own, by the rules of their papers.

They are given regions: the tiles that ours are drawn in, and the same model. Costs are counted as
in methods.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from random import Random
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Tensor
from torch.nn import functional as F

from benchmarks.methods import Case, Models, Painted, paint, seeds
from families import Conditioning, Family, family_of
from regions import masks_of, tiles
from sampling import Branch, Sampler
from settings import Tempering


def regions_of(case: Case, size: tuple[int, int]) -> Tensor:
    """The parts of the grid (C, 1, h, w) that a case's subjects are given."""
    count = len(case.prompt.nouns)
    return masks_of(tiles(count, size, Random(case.seed)), count, size)


class MultiDiffusion(Sampler):
    """Bar-Tal et al. 2023, arXiv:2302.08113: every region's prompt sees the whole canvas.

    What it predicts counts in its region. For the first `bootstrap` steps it is shown a flat
    background of a random grey around it.
    """

    def __init__(
        self, family: Family, cases: Sequence[Case], settings: Tempering, bootstrap: int
    ) -> None:
        super().__init__(family, [case.prompt.text for case in cases], settings)
        size = (self.shape[-2], self.shape[-1])
        self.masks = [regions_of(case, size) for case in cases]
        self.parts = self.encoded([phrase for case in cases for phrase in case.prompt.phrases])
        self.bootstrap = bootstrap
        self.draws = [torch.Generator().manual_seed(case.seed + 1) for case in cases]

    def encoded(self, prompts: Sequence[str]) -> list[Conditioning]:
        scale = self.settings.guidance_scale
        return self.family.encode(prompts, self.settings.negative_prompt, scale)

    def step(self, branches: Sequence[Branch]) -> None:
        for branch in branches:
            masks, x = self.masks[branch.row], branch.x()
            count = len(masks)
            shown = x.repeat(count, 1, 1, 1)
            if branch.evaluations < self.bootstrap:
                shown = torch.where(masks > 0, shown, self.flat(branch, count)).to(x.dtype)
            rows = slice(branch.row * count, (branch.row + 1) * count)
            given = {
                name: torch.cat([each[name][rows] for each in self.parts]) for name in self.parts[0]
            }
            latents = shown.repeat(len(self.parts), 1, 1, 1)
            outputs = self.family.predict(latents, branch.timestep, given).chunk(len(self.parts))
            fused = [(masks.to(x.dtype) * each).sum(dim=0, keepdim=True) for each in outputs]
            branch.step(x, fused, self.guide(fused, self.settings.guidance_scale))

    def flat(self, branch: Branch, count: int) -> Tensor:
        """Flat backgrounds at the noise level of the evaluation to come, one a region."""
        draw = self.draws[branch.row]
        levels = torch.rand(count, generator=draw) * 2 - 1
        clean = torch.cat([self.family.encode_flat(float(level)) for level in levels])
        alpha, sigma = branch.levels(branch.evaluations)
        noise = self.noise(self.shape, draw, torch.float32)
        return alpha * clean + sigma * noise


@torch.no_grad()
def multidiffusion(
    models: Models, cases: Sequence[Case], settings: Tempering, bootstrap: float = 0.2
) -> list[Painted]:
    """MultiDiffusion with given regions; `bootstrap` is a share of the steps."""
    first = round(bootstrap * settings.steps)
    sampler = MultiDiffusion(family_of(models.pipe), cases, settings, first)
    branches = sampler.start(seeds(cases))
    images = paint(sampler, branches)
    return [
        Painted(image, branch.evaluations * len(case.prompt.nouns))
        for image, branch, case in zip(images, branches, cases, strict=True)
    ]


class Coupled:
    """Attention couple: cross-attention of each subject's prompt counts in its region alone.

    As users of ComfyUI and of A1111's regional prompter have it: one pass over the picture, in
    which every cross-attention is computed for each prompt and put together by the regions.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        self.plain = AttnProcessor()
        self.size = size
        self.contexts: list[Tensor] = []  # (B, L, D) of each region
        self.masks = torch.empty(0)  # (B, C, 1, h, w)

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        if encoder_hidden_states is None:
            return self.plain(attn, hidden_states, None, attention_mask, *args, **kwargs)
        shrunk = round((self.size[0] * self.size[1] / hidden_states.shape[1]) ** 0.5)
        side = (self.size[0] // shrunk, self.size[1] // shrunk)
        shares = F.adaptive_avg_pool2d(self.masks.flatten(0, 1), side)
        shares = shares.view(len(self.masks), -1, side[0] * side[1], 1)  # (B, C, tokens, 1)
        total = torch.zeros_like(hidden_states)
        for number, context in enumerate(self.contexts):
            found = self.plain(attn, hidden_states, context, attention_mask, *args, **kwargs)
            total += shares[:, number].to(found.dtype) * found
        return total


@contextmanager
def coupled(models: Models, processor: Coupled) -> Iterator[None]:
    """The pipeline's U-Net with other attention meanwhile."""
    unet = models.pipe.unet
    before = unet.attn_processors
    unet.set_attn_processor(processor)
    try:
        yield
    finally:
        unet.set_attn_processor(before)


class CoupledSampler(MultiDiffusion):
    """A sampler whose U-Net has `Coupled` attention."""

    def __init__(
        self, family: Family, cases: Sequence[Case], settings: Tempering, processor: Coupled
    ) -> None:
        super().__init__(family, cases, settings, 0)
        self.processor = processor

    def step(self, branches: Sequence[Branch]) -> None:
        count = len(self.masks[0])
        rows = [branch.row for branch in branches]
        states = [
            each["encoder_hidden_states"].unflatten(0, (-1, count))[rows] for each in self.parts
        ]
        # Each prompt for all branches, the negative one first: as the batch of the step is.
        self.processor.contexts = [
            torch.cat([each[:, number] for each in states]) for number in range(count)
        ]
        self.processor.masks = torch.stack([self.masks[row] for row in rows] * len(self.parts))
        Sampler.step(self, branches)


@torch.no_grad()
def attention_couple(models: Models, cases: Sequence[Case], settings: Tempering) -> list[Painted]:
    """Attention couple with given regions: it costs a plain picture's evaluations."""
    family = family_of(models.pipe)
    painted = []
    for case in cases:  # subjects are as many in all of a batch, but not in all cases
        size = family.latents_shape(settings.height, settings.width)[-2:]
        processor = Coupled((size[0], size[1]))
        sampler = CoupledSampler(family, [case], settings, processor)
        branches = sampler.start([case.seed])
        with coupled(models, processor):
            images = paint(sampler, branches)
        painted.append(Painted(images[0], branches[0].evaluations))
    return painted
