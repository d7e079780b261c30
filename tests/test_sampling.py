"""Branches, held against diffusers' own pipeline and the schedulers' own noise levels."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionPipeline
from pictures import diffusers_picture, farthest

from errors import InputError
from families import family_of
from sampling import Sampler
from settings import Tempering

PROMPT = "a black dog next to a toy robot"
FEW = Tempering(steps=8, stoptime=6, backsteps=3, negative_prompt="a red cat")


def sampler(pipe: StableDiffusionPipeline, settings: Tempering = FEW) -> Sampler:
    return Sampler(family_of(pipe), [PROMPT], settings)


@torch.no_grad()
@pytest.mark.parametrize(("guidance_scale", "width"), [(7.5, 64), (7.5, 96), (1.0, 64)])
def test_a_branch_denoised_to_the_end_is_diffusers_picture_to_the_bit(
    any_pipe: StableDiffusionPipeline, guidance_scale: float, width: int
) -> None:
    settings = Tempering(
        steps=8,
        stoptime=6,
        backsteps=3,
        guidance_scale=guidance_scale,
        negative_prompt="a red cat",
        height=64,
        width=width,
    )
    ours = sampler(any_pipe, settings)
    branches = ours.start([7])
    ours.denoise(branches, settings.steps)
    theirs = diffusers_picture(any_pipe, PROMPT, settings, 7)
    assert farthest(ours.decode(branches)[0], theirs) == 0


@torch.no_grad()
@pytest.mark.parametrize("step", [0, 3, 7])
def test_what_goes_back_is_the_clean_picture_and_the_noise_that_were_put_together(
    any_pipe: StableDiffusionPipeline, step: int
) -> None:
    """At the level that the denoiser is told of: mixed by the scheduler, told apart by us."""
    x0, eps = torch.randn(2, 1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    ours = sampler(any_pipe)
    begun = ours.start([7])[0]
    branch = ours.go_back(begun, x0, eps, step, begun.generator)
    branch.step(branch.x(), [eps], eps)
    for found, expected in zip(branch.clean_and_noise(eps), (x0, eps), strict=True):
        torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)


@torch.no_grad()
def test_going_back_leaves_the_branch_as_it_is(any_pipe: StableDiffusionPipeline) -> None:
    ours = sampler(any_pipe)
    (branch,) = ours.start([7])
    ours.denoise([branch], 5)
    before = branch.latents.clone()
    x0, eps = ours.prediction(branch, 7.5)
    back = ours.go_back(branch, x0, eps, 2, branch.generator)
    ours.denoise([back], 5)
    assert torch.equal(branch.latents, before)
    assert back.evaluations == ours.evaluations(2, 5)


@torch.no_grad()
def test_a_prediction_is_what_a_sampler_of_that_guidance_would_see(
    pipe: StableDiffusionPipeline,
) -> None:
    def after_a_step(scale: float, seen_at: float) -> torch.Tensor:
        ours = sampler(pipe, Tempering(guidance_scale=scale))
        (branch,) = ours.start([7])
        ours.denoise([branch], 1)
        return ours.prediction(branch, seen_at)[0]

    soft, full = after_a_step(2, 2), after_a_step(7.5, 7.5)
    assert (soft - full).abs().max() > 0.1
    torch.testing.assert_close(after_a_step(7.5, 2), soft)


def test_a_batch_has_a_seed_a_prompt(pipe: StableDiffusionPipeline) -> None:
    with pytest.raises(InputError, match="1 seed, one a list of prompts, got 3"):
        sampler(pipe).start([1, 2, 3])
