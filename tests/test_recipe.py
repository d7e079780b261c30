"""What CLIPSeg and the judge learn from: pictures as the bundled U-Net paints them."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.unets.unet_2d_blocks import UpBlock2D
from torch import Tensor, nn

from pocket.images import as_tensor
from pocket.judge import load_judge
from pocket.world import Noun
from recipe.clipseg import PROMPTS, questions
from recipe.data import Placed, Scene
from recipe.judge import round_trip
from recipe.measure import denoiser
from recipe.reliability import binned, looked_at
from recipe.taesd import new_taesd, surroundings, train_taesd
from recipe.training import Plan, bf16
from recipe.unet import previews, repaint
from settings import Tempering

CAR = Noun("car", "red")
SCENE = Scene((Placed(CAR, "noto", False, 8, 8, 48),), "a red car", (255,) * 3, (255,) * 3)


@pytest.fixture(scope="module")
def cars(pipe: StableDiffusionPipeline) -> Tensor:
    """Eight times the same painted picture, (8, 3, 64, 64)."""
    rng = torch.Generator().manual_seed(0)
    image = pipe("a red car", num_inference_steps=20, generator=rng).images[0]
    return as_tensor(np.stack([np.asarray(image)] * 8))


def off(found: Tensor, wanted: Tensor) -> float:
    return float((found.clamp(-1, 1) - wanted).abs().mean())


def test_repainting_leaves_in_place_what_is_there(
    pipe: StableDiffusionPipeline, cars: Tensor
) -> None:
    images = ((cars + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    pixels = round_trip(images, repaint(denoiser(pipe), pipe.vae, pipe.tokenizer))
    assert 0.001 < off(as_tensor(pixels), cars) < 0.1
    assert all(said.all_ok for said in load_judge().judge(pixels, [[CAR]] * len(cars)))


def test_a_preview_of_less_noise_is_nearer_to_the_picture(
    pipe: StableDiffusionPipeline, cars: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.no_grad():
        latents = pipe.vae.encode(cars).latent_dist.mean * pipe.vae.config.scaling_factor
    preview = previews(denoiser(pipe), pipe.vae, latents, [SCENE] * 8, pipe.tokenizer)
    errors = []
    for last in (1, 200, 600):
        monkeypatch.setattr("recipe.unet.LAST_PREVIEW", last)
        errors.append(off(preview(list(range(8)), torch.Generator().manual_seed(1)), cars))
    assert errors[0] < 0.05
    assert errors == sorted(errors)


def test_the_tiny_decoder_learns_what_the_autoencoder_makes_of_latents(
    pipe: StableDiffusionPipeline, tmp_path: Path
) -> None:
    """Of latents that it never saw; its input is scaled, as the U-Net's output is."""
    rng = torch.Generator().manual_seed(0)
    latents = torch.randn(64, 4, 16, 16, generator=rng)
    plan = Plan(steps=60, batch=4, lr=2e-3, warmup=5, ema=0.9)
    tiny = train_taesd(pipe.vae, latents[:32], tmp_path, plan)
    with torch.no_grad():
        wanted = pipe.vae.decode(latents[32:40] / pipe.vae.config.scaling_factor).sample
        found, untaught = (each.decode(latents[32:40]).sample for each in (tiny, new_taesd()))
    assert off(found, wanted) < 0.6 * off(untaught, wanted)
    assert (tmp_path / "taesd.pt").exists()


def test_a_look_meets_pictures_mixtures_and_noise() -> None:
    latents = torch.stack([torch.full((4, 16, 16), value) for value in (0.0, 1.0)])
    drawn = surroundings(latents, 400, torch.Generator().manual_seed(0))
    means = drawn.mean(dim=(1, 2, 3))
    levels = drawn.std(dim=(1, 2, 3))
    pure = ((means < 0.03) | (means > 0.97)).float().mean()
    assert 0.5 < pure < 0.9
    assert levels.min() < 0.01 < 0.2 < levels.max() < 1


def test_clipseg_is_asked_what_bleeding_would_make_true() -> None:
    dog = Noun("dog", "blue")
    scene = Scene((*SCENE.placed, Placed(dog, "noto", False, 0, 0, 8)), "", (255,) * 3, (255,) * 3)
    draws = [questions(scene, random.Random(seed)) for seed in range(200)]
    assert {len(asked) for asked in draws} == {PROMPTS}
    told = {prompt: slots for asked in draws for prompt, slots in asked}
    right = {"a red car": [1], "a car": [1], "a blue dog": [2], "a dog": [2]}
    swapped: dict[str, list[int]] = {"a blue car": [], "a red dog": []}
    assert {prompt: told[prompt] for prompt in (*right, *swapped)} == {**right, **swapped}
    often = sum(prompt == "a blue car" for asked in draws for prompt, _ in asked)
    assert often > 60  # by chance alone, one colour in eleven, about 18


class Upwards(nn.Module):
    """The way up of a small U-Net: two levels with an upsampling in between."""

    def __init__(self) -> None:
        super().__init__()
        self.deep, self.skip = (nn.Conv2d(4, 16, 3, padding=1) for _ in range(2))
        self.lower, self.upper = (
            UpBlock2D(16, 16, 16, None, num_layers=1, resnet_groups=4, add_upsample=upsample)
            for upsample in (True, False)
        )

    def forward(self, deep: Tensor, skip: Tensor) -> Tensor:
        h = self.deep(deep)
        return self.upper(self.lower(h, (h,)), (self.skip(skip),))


def test_compiled_gradients_are_the_eager_ones() -> None:
    """torch 2.13.0 compiles the upsampling of `UpBlock2D` to one that passes no gradient back."""
    torch.manual_seed(0)
    net: Any = Upwards().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    deep, skip = (
        torch.randn(2, 4, side, side).to(memory_format=torch.channels_last) for side in (8, 16)
    )

    def gradients(run: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Tensor]:
        net.zero_grad()
        with bf16():
            found = run(deep, skip)
        found.float().square().mean().backward()
        return {name: each.grad.clone() for name, each in net.named_parameters()}

    eager, compiled = gradients(net), gradients(torch.compile(net))
    for name, gradient in eager.items():
        torch.testing.assert_close(
            compiled[name], gradient, rtol=0.05, atol=0.02 * float(gradient.norm())
        )
        assert gradient.any(), name


def test_what_is_said_as_often_as_it_is_true_has_no_calibration_error() -> None:
    said = np.repeat([0.25, 0.75], 400)
    true = np.tile([1.0, 0, 0, 0], 100).tolist() + np.tile([1.0, 1, 1, 0], 100).tolist()
    honest = binned(said, np.array(true))
    assert honest["error"] == 0
    assert honest["mean"][2] == honest["frequency"][2] == 0.25
    assert sum(honest["share"]) == 1
    boastful = binned(np.where(said > 0.5, 0.95, 0.05), np.array(true))
    assert boastful["error"] == pytest.approx(0.2)


def test_a_look_sees_the_prediction_of_its_step() -> None:
    steps = looked_at(Tempering())
    assert list(steps) == [6, 15]
    assert steps[6] > steps[15] > 0
