"""Branches, held against diffusers' own pipeline and the schedulers' own noise levels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from diffusers import (
    DiffusionPipeline,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
)
from pictures import diffusers_picture, diffusers_picture_and_latents, farthest, told_level

from errors import InputError
from families import family_of
from loaders import set_scheduler
from sampling import Sampler
from settings import Tempering

PROMPT = "a black dog next to a toy robot"
FEW = Tempering(steps=8, stoptime=6, backsteps=3, negative_prompt="a red cat")
BRIEF = Tempering(steps=4, stoptime=3, backsteps=2)


def sampler(pipe: DiffusionPipeline, settings: Tempering = FEW) -> Sampler:
    return Sampler(family_of(pipe), [PROMPT], settings)


def test_a_branch_denoised_to_the_end_is_diffusers_picture_to_the_bit(
    any_pipe: StableDiffusionPipeline,
) -> None:
    assert_bit_equal(any_pipe, replace(FEW, height=64, width=96))


@pytest.mark.parametrize("any_pipe", ["euler", "heun"], indirect=True)
@pytest.mark.parametrize("guidance_scale", [1, 7.5])
def test_in_its_own_size_too_with_guidance_or_without(
    any_pipe: StableDiffusionPipeline, guidance_scale: float
) -> None:
    assert_bit_equal(any_pipe, replace(FEW, guidance_scale=guidance_scale))


@torch.no_grad()
@pytest.mark.parametrize(
    "settings",
    [
        replace(BRIEF, negative_prompt="a red cat", height=32, width=48),
        replace(BRIEF, guidance_scale=1),
    ],
    ids=["negative prompt, not square", "own size, without guidance"],
)
def test_a_branch_of_every_family_is_its_own_pipelines_picture_to_the_bit(
    family_pipe: DiffusionPipeline, settings: Tempering
) -> None:
    assert_bit_equal(family_pipe, settings)


def test_a_branch_without_negative_prompt_is_its_own_pipelines_picture_to_the_bit(
    own_pipe: DiffusionPipeline,
) -> None:
    assert_bit_equal(own_pipe, BRIEF)


@torch.no_grad()
def assert_bit_equal(pipe: DiffusionPipeline, settings: Tempering) -> None:
    ours = sampler(pipe, settings)
    (branch,) = ours.start([7])
    ours.denoise([branch], settings.steps)
    image, latents = diffusers_picture_and_latents(pipe, PROMPT, settings, 7)
    assert torch.equal(branch.latents, latents)
    assert farthest(ours.decode([branch])[0], image) == 0


@torch.no_grad()
def test_a_batch_of_every_family_has_each_prompts_own_picture(
    family_pipe: DiffusionPipeline,
) -> None:
    prompts, seeds = ["a black dog", "a toy robot next to a cat"], [3, 4]
    ours = Sampler(family_of(family_pipe), prompts, BRIEF)
    branches = ours.start(seeds)
    ours.denoise(branches, BRIEF.steps)
    for prompt, seed, found in zip(prompts, seeds, ours.decode(branches), strict=True):
        assert farthest(found, diffusers_picture(family_pipe, prompt, BRIEF, seed)) <= 1


def test_schedulers_prompts_and_guidance_change_the_tiny_models_pictures(
    own_pipe: DiffusionPipeline,
) -> None:
    """Else no equality above could fail."""
    settings = [BRIEF, replace(BRIEF, guidance_scale=1), replace(BRIEF, negative_prompt="a cat")]
    pictures = [diffusers_picture(own_pipe, PROMPT, each, 7) for each in settings]
    pictures.append(diffusers_picture(own_pipe, "a toy robot", BRIEF, 7))
    for scheduler in ("heun", "unipc"):
        set_scheduler(own_pipe, scheduler)
        pictures.append(diffusers_picture(own_pipe, PROMPT, BRIEF, 7))
    for number, picture in enumerate(pictures):
        assert all(farthest(picture, other) > 4 for other in pictures[:number])


@pytest.mark.parametrize("scheduler", ["lcm", "euler"])
@pytest.mark.parametrize("guidance_scale", [1, 8.5])
def test_a_denoiser_that_is_told_the_guidance_is_told_it(
    scheduler: str, guidance_scale: float
) -> None:
    pipe = tiny.latent_consistency()
    pipe.set_progress_bar_config(disable=True)
    set_scheduler(pipe, scheduler)
    assert_bit_equal(pipe, replace(BRIEF, guidance_scale=guidance_scale))


def test_stable_diffusion_3_without_t5_is_its_own_pipelines_picture_to_the_bit() -> None:
    pipe = tiny.stable_diffusion_3(t5=False)
    pipe.set_progress_bar_config(disable=True)
    assert_bit_equal(pipe, BRIEF)


@torch.no_grad()
def test_xl_in_float16_is_decoded_in_float32_as_by_its_own_pipeline() -> None:
    """Of a VAE whose float16 overflows, and which stays in it between pictures."""
    pipe = tiny.stable_diffusion_xl()
    pipe.set_progress_bar_config(disable=True)
    pipe.vae.post_quant_conv.weight.mul_(1e5)
    pipe.to(torch.float16)
    assert_bit_equal(pipe, BRIEF)
    assert pipe.vae.dtype is torch.float16


@pytest.mark.parametrize("scheduler", ["euler", "unipc"])
def test_a_shift_that_follows_the_size_is_the_pipelines(scheduler: str) -> None:
    pipe = tiny.stable_diffusion_3()
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    set_scheduler(pipe, scheduler)
    assert_bit_equal(pipe, replace(BRIEF, height=32, width=48))
    small, large = (sampler(pipe, replace(BRIEF, height=side)).schedule() for side in (32, 64))
    assert small.timesteps[1] < large.timesteps[1]


def test_schedules_that_can_not_be_followed_are_refused_in_words(
    pipe: StableDiffusionPipeline,
) -> None:
    xl, before = tiny.stable_diffusion_xl(), pipe.scheduler
    for scheduler, settings, fault in [
        (EDMEulerScheduler(), BRIEF, "schedule must be .*, got EDMEulerScheduler"),
        (LCMScheduler(), Tempering(steps=51), "number that LCMScheduler can take, got 51 "),
        (
            FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            BRIEF,
            "must not use dynamic shifting with this family",
        ),
    ]:
        xl.scheduler = scheduler
        with pytest.raises(InputError, match=fault):
            sampler(xl, settings).start([7])
    assert pipe.scheduler is before


@torch.no_grad()
@pytest.mark.parametrize("step", [0, 1, 3])
def test_what_goes_back_in_every_family_is_what_was_put_together(
    family_pipe: DiffusionPipeline, step: int
) -> None:
    """At the level that the denoiser is told of: mixed by the scheduler, told apart by us.

    What the denoiser puts out for such an x0 and eps follows from its prediction type alone.
    """
    ours = sampler(family_pipe, BRIEF)
    x0, eps = torch.randn(2, *ours.shape, generator=torch.Generator().manual_seed(1))
    begun = ours.start([7])[0]
    branch = ours.go_back(begun, x0, eps, step, begun.generator)
    alpha, sigma = told_level(branch)
    output = {
        "epsilon": eps,
        "v_prediction": alpha * eps - sigma * x0,
        "flow_prediction": eps - x0,
    }[branch.scheduler.config.get("prediction_type", "flow_prediction")]
    branch.step(branch.x(), [output], output)
    for found, expected in zip(branch.clean_and_noise(output), (x0, eps), strict=True):
        torch.testing.assert_close(found, expected, atol=4e-3, rtol=0)


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
