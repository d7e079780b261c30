"""What CLIPSeg and the judge learn from: pictures as the bundled U-Net paints them."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from pocket.images import as_tensor
from pocket.judge import load_judge
from pocket.world import Noun
from recipe.clipseg import PROMPTS, questions
from recipe.data import Placed, Scene
from recipe.judge import round_trip
from recipe.measure import denoiser
from recipe.unet import previews, repaint

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
