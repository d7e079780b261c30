"""The algorithm, held against diffusers' own pipeline and the schedulers' own noise levels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import StableDiffusionPipeline
from PIL import Image

from errors import InputError
from loaders import SCHEDULERS, load_pipeline, set_scheduler
from segmentation import NONE, ClipSeg
from tempering import Branch, Painter, Tempering, View, descend, gammas, mix_noise, temper

PROMPTS = ["a black dog", "a toy robot"]
SEEDED = Tempering(steps=20, stoptime=15, backsteps=5)
FEW = Tempering(steps=8, stoptime=6, backsteps=3)
DETERMINISTIC = [name for name in SCHEDULERS if name != "euler ancestral"]


@pytest.fixture(params=list(SCHEDULERS))
def any_pipe(request: pytest.FixtureRequest, pipe: StableDiffusionPipeline) -> Any:
    yield from with_scheduler(pipe, request.param)


@pytest.fixture(params=DETERMINISTIC)
def deterministic_pipe(request: pytest.FixtureRequest, pipe: StableDiffusionPipeline) -> Any:
    yield from with_scheduler(pipe, request.param)


def with_scheduler(pipe: StableDiffusionPipeline, name: str) -> Any:
    before = pipe.scheduler
    set_scheduler(pipe, name)
    yield pipe
    pipe.scheduler = before


def diffusers_picture(pipe: StableDiffusionPipeline, settings: Tempering, seed: int) -> Image.Image:
    return pipe(
        settings.joiner.join(PROMPTS),
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        negative_prompt=settings.negative_prompt or None,
        generator=torch.Generator().manual_seed(seed),
    ).images[0]


def farthest(a: Image.Image, b: Image.Image) -> int:
    """The largest difference of any pixel, in 1/255."""
    return int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max())


@torch.no_grad()
@pytest.mark.parametrize("guidance_scale", [7.5, 1.0])
def test_the_plain_branch_alone_is_diffusers_picture_to_the_bit(
    any_pipe: StableDiffusionPipeline, clipseg: ClipSeg, guidance_scale: float
) -> None:
    settings = Tempering(
        steps=8, stoptime=6, backsteps=3, guidance_scale=guidance_scale, negative_prompt="a red cat"
    )
    painter = Painter(any_pipe, clipseg, [PROMPTS], settings)
    trunk = painter.start([7])
    for _ in descend(painter, [trunk], settings.steps):
        pass
    ours = painter.decode(trunk.latents)[0]
    assert farthest(ours, diffusers_picture(any_pipe, settings, 7)) == 0


def test_the_plain_picture_of_a_comparison_is_diffusers_picture(
    any_pipe: StableDiffusionPipeline, clipseg: ClipSeg
) -> None:
    result = temper(any_pipe, clipseg, PROMPTS, FEW, seed=7, compare=True)
    assert result.plain is not None
    assert farthest(result.plain, diffusers_picture(any_pipe, FEW, 7)) <= 1
    assert farthest(result.plain, result.image) > 1  # tempering did something


def test_comparing_does_not_change_the_tempered_picture(
    any_pipe: StableDiffusionPipeline, clipseg: ClipSeg
) -> None:
    alone = temper(any_pipe, clipseg, PROMPTS, FEW, seed=7)
    compared = temper(any_pipe, clipseg, PROMPTS, FEW, seed=7, compare=True)
    assert alone.plain is None
    assert farthest(alone.image, compared.image) <= 1


def test_k_0_and_no_step_back_is_the_plain_picture(
    pipe: StableDiffusionPipeline, clipseg: ClipSeg
) -> None:
    settings = Tempering(steps=8, stoptime=6, backsteps=0, k=0)
    result = temper(pipe, clipseg, PROMPTS, settings, seed=7)
    assert farthest(result.image, diffusers_picture(pipe, settings, 7)) <= 1


def test_going_back_after_the_last_step_by_none_changes_nothing(
    pipe: StableDiffusionPipeline, clipseg: ClipSeg
) -> None:
    settings = Tempering(steps=8, stoptime=8, backsteps=0, k=100)
    result = temper(pipe, clipseg, PROMPTS, settings, seed=7)
    assert farthest(result.image, diffusers_picture(pipe, settings, 7)) == 0


def test_k_0_gives_back_the_plain_picture_within_a_tolerance(
    deterministic_pipe: StableDiffusionPipeline, clipseg: ClipSeg
) -> None:
    """The way is walked twice with other discretisation errors: README states the tolerance."""
    away = {}
    for k in (0.0, 1e6):
        # Threshold 0 gives every pixel to a class, so that a large k forgets the whole picture.
        settings = Tempering(k=k, threshold=0)
        painter = Painter(deterministic_pipe, clipseg, [PROMPTS], settings)
        away[k] = [distance_from_plain(painter, seed) for seed in range(2)]
    assert max(away[0.0]) < 8
    assert np.mean(away[1e6]) > 1.5 * np.mean(away[0.0])


def distance_from_plain(painter: Painter, seed: int) -> float:
    """Mean absolute difference of the tempered and the plain picture, in 1/255."""
    result = painter.temper([seed], compare=True)[0]
    assert result.plain is not None
    return float(np.abs(np.asarray(result.plain, int) - np.asarray(result.image, int)).mean())


def uniform_view(u: float) -> View:
    """A picture that is all class 0, with uncertainty `u`."""
    labels = torch.zeros(4, 4, dtype=torch.int64)
    return View(
        Image.new("RGB", (4, 4)), labels[None].float(), labels, torch.eye(1), torch.tensor([u])
    )


@torch.no_grad()
@pytest.mark.parametrize("k", [0.0, 0.5, 4.0, 1e6])
def test_renoised_latents_have_the_schedulers_variance(
    any_pipe: StableDiffusionPipeline, clipseg: ClipSeg, k: float
) -> None:
    painter = Painter(any_pipe, clipseg, [PROMPTS], SEEDED)
    shape = (1, 4, 256, 256)
    eps = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    trunk = painter.start([7])
    gamma = gammas([uniform_view(0.7)], k, (256, 256))
    branch = painter.go_back(trunk, torch.full(shape, 2.0), eps, gamma)

    assert float(branch.timestep) == float(painter_timesteps(painter)[10])
    # As the U-Net sees it: alpha x0 plus noise of sigma squared at the level that it is told of.
    seen = branch.model_input()
    alpha_squared = float(any_pipe.scheduler.alphas_cumprod[int(branch.timestep)])
    # 262,144 draws: 0.3 % standard error of the variance, 0.002 of the mean
    assert seen.var().item() == pytest.approx(1 - alpha_squared, rel=0.02)
    assert seen.mean().item() == pytest.approx(2 * alpha_squared**0.5, rel=0.03)


def painter_timesteps(painter: Painter) -> torch.Tensor:
    """The distinct timesteps of the whole schedule, noisiest first."""
    return painter.start([0]).timesteps.unique().flip(0)


@torch.no_grad()
def test_cfg_rescale_scales_the_fresh_noise_in_tenths(
    pipe: StableDiffusionPipeline, clipseg: ClipSeg
) -> None:
    shape = (1, 4, 128, 128)
    zeros, all_fresh = torch.zeros(shape), torch.ones(1, 1, 1, 1)
    spread = {}
    for scale in (5.0, 10.0):
        painter = Painter(pipe, clipseg, [PROMPTS], Tempering(cfg_rescale=scale))
        spread[scale] = painter.go_back(painter.start([7]), zeros, zeros, all_fresh).latents.std()
    assert float(spread[5.0] / spread[10.0]) == pytest.approx(0.5, rel=1e-4)


def test_mixed_noise_keeps_unit_variance_for_every_gamma() -> None:
    rng = torch.Generator().manual_seed(1)
    eps, fresh = torch.randn(2, 1_000_000, generator=rng)
    for gamma in (0.0, 0.1, 0.5, 0.9, 1.0):
        mixed = mix_noise(eps, fresh, torch.tensor(gamma))
        assert mixed.var().item() == pytest.approx(1, rel=0.01)
    assert torch.equal(mix_noise(eps, fresh, torch.tensor(0.0)), eps)
    assert torch.equal(mix_noise(eps, fresh, torch.tensor(1.0)), fresh)


def test_gamma_follows_the_uncertainty_of_each_class_and_spares_the_rest() -> None:
    labels = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [NONE] * 4, [NONE] * 4])
    u = torch.tensor([0.5, 2.0], dtype=torch.float64)
    view = View(Image.new("RGB", (4, 4)), torch.zeros(2, 4, 4), labels, torch.eye(2), u)
    found = gammas([view], 1.5, (2, 2))[0, 0]
    expected = [[1 - np.exp(-0.75), 1 - np.exp(-3.0)], [0, 0]]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_fresh_noise_is_not_the_noise_at_the_start(
    pipe: StableDiffusionPipeline, clipseg: ClipSeg
) -> None:
    painter = Painter(pipe, clipseg, [PROMPTS], SEEDED)
    trunk = painter.start([7])
    zeros, all_fresh = torch.zeros(trunk.latents.shape), torch.ones(1, 1, 1, 1)
    fresh = painter.go_back(trunk, zeros, zeros, all_fresh).latents
    pair = torch.stack([trunk.latents.flatten(), fresh.flatten()])
    assert abs(float(torch.corrcoef(pair)[0, 1])) < 0.15  # 1,024 values: 0.03 standard error


def test_a_cycle_costs_30_unet_calls_with_the_default_parameters(
    pipe: StableDiffusionPipeline, clipseg: ClipSeg
) -> None:
    pictures: list[int] = []
    reported: list[int] = []
    hook = pipe.unet.register_forward_pre_hook(lambda _, args: pictures.append(len(args[0]) // 2))
    try:
        result = temper(
            pipe, clipseg, PROMPTS, SEEDED, seed=7, compare=True, progress=reported.append
        )
    finally:
        hook.remove()
    assert sum(pictures) == 30
    assert len(pictures) == 25  # the last five steps are shared by the two pictures
    assert sum(reported) == 30
    assert result.unet_calls == 30
    painter = Painter(pipe, clipseg, [PROMPTS], SEEDED)
    assert painter.unet_calls(compare=True) == 30
    assert painter.unet_calls(compare=False) == 25


def test_the_bar_is_exact_for_every_scheduler(
    any_pipe: StableDiffusionPipeline, clipseg: ClipSeg
) -> None:
    for compare in (False, True):
        reported: list[int] = []
        temper(any_pipe, clipseg, PROMPTS, FEW, compare=compare, progress=reported.append)
        painter = Painter(any_pipe, clipseg, [PROMPTS], FEW)
        assert sum(reported) == painter.unet_calls(compare=compare)


def test_a_picture_does_not_depend_on_its_batch(
    pipe: StableDiffusionPipeline, clipseg: ClipSeg
) -> None:
    others = ["a red car", "a blue bird"]
    together = Painter(pipe, clipseg, [PROMPTS, others], FEW).temper([3, 4])
    for prompts, seed, found in zip([PROMPTS, others], [3, 4], together, strict=True):
        alone = temper(pipe, clipseg, prompts, FEW, seed=seed)
        assert farthest(alone.image, found.image) <= 1


@pytest.mark.parametrize(("stoptime", "backsteps"), [(1, 0), (1, 1), (8, 8), (8, 1), (4, 4)])
def test_every_legal_stop_and_way_back_runs(
    any_pipe: StableDiffusionPipeline, clipseg: ClipSeg, stoptime: int, backsteps: int
) -> None:
    settings = Tempering(steps=8, stoptime=stoptime, backsteps=backsteps)
    result = temper(any_pipe, clipseg, PROMPTS, settings, compare=True)
    assert result.plain is not None
    assert farthest(result.plain, diffusers_picture(any_pipe, settings, 2024)) <= 1


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_x0_and_eps_follow_from_every_prediction_type(
    pipe: StableDiffusionPipeline, kind: str
) -> None:
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, prediction_type=kind)
    scheduler.set_timesteps(20)
    branch = Branch(scheduler, 5, [], {})
    alpha = float(1 / (1 + scheduler.sigmas[5] ** 2)) ** 0.5
    sigma = (1 - alpha**2) ** 0.5
    x0, eps = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    outputs = {"epsilon": eps, "v_prediction": alpha * eps - sigma * x0, "sample": x0}
    branch.latents = (alpha * x0 + sigma * eps) / alpha  # Euler's own scaling of x
    branch.step(branch.model_input(), outputs[kind])
    found_x0, found_eps = branch.prediction()
    torch.testing.assert_close(found_x0, x0, atol=1e-3, rtol=0)
    torch.testing.assert_close(found_eps, eps, atol=1e-3, rtol=0)


def test_one_prompt_and_three_prompts_are_tempered(
    pipe: StableDiffusionPipeline, clipseg: ClipSeg
) -> None:
    for prompts in (["a cat"], ["a cat", "a dog", "a red car"]):
        result = temper(pipe, clipseg, prompts, FEW)
        assert result.probabilities.shape == (len(prompts), 64, 64)
        assert result.interrupted.matrix.shape == (len(prompts), len(prompts))


@pytest.mark.parametrize("preview", ["vae", "linear"])
def test_offloading_changes_nothing(clipseg: ClipSeg, preview: str) -> None:
    settings = Tempering(steps=4, stoptime=3, backsteps=1, preview=preview)
    expected = temper(load_pipeline("pocket", device="cpu"), clipseg, PROMPTS, settings)
    offloaded = load_pipeline("pocket", device="cpu")
    for part in (offloaded.unet, offloaded.vae):
        cpu_offload(part, "cpu")  # as sequential offload: weights on "meta"
    found = temper(offloaded, clipseg, PROMPTS, settings)
    assert farthest(found.image, expected.image) <= 1
    assert farthest(found.interrupted.image, expected.interrupted.image) <= 1


def test_the_linear_preview_has_the_colours_of_the_vaes(
    pipe: StableDiffusionPipeline, clipseg: ClipSeg
) -> None:
    views = [
        temper(pipe, clipseg, PROMPTS, Tempering(preview=preview), seed=7).interrupted.image
        for preview in ("vae", "linear")
    ]
    small = [np.asarray(view.resize((16, 16), Image.Resampling.BOX)).ravel() for view in views]
    assert np.corrcoef(small)[0, 1] > 0.8


def test_sizes_and_the_linear_preview(pipe: StableDiffusionPipeline, clipseg: ClipSeg) -> None:
    settings = Tempering(steps=4, stoptime=3, backsteps=1, height=64, width=96, preview="linear")
    result = temper(pipe, clipseg, PROMPTS, settings)
    assert result.image.size == (96, 64)
    assert result.interrupted.image.size == (96, 64)


def test_the_users_pipeline_keeps_its_scheduler(
    pipe: StableDiffusionPipeline, clipseg: ClipSeg
) -> None:
    before = pipe.scheduler
    config = dict(before.config)
    temper(pipe, clipseg, PROMPTS, FEW)
    assert pipe.scheduler is before
    assert dict(before.config) == config


@pytest.mark.parametrize("prompts", [[], ["a dog", " "]])
def test_missing_prompts_are_refused(
    pipe: StableDiffusionPipeline, clipseg: ClipSeg, prompts: list[str]
) -> None:
    with pytest.raises(InputError):
        temper(pipe, clipseg, prompts, FEW)
