"""Pictures and noise levels to hold others against, and how far two pictures are apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from families import family_of
from sampling import Branch
from settings import Tempering


def farthest(a: Image.Image, b: Image.Image) -> int:
    """The largest difference of any pixel, in 1/255."""
    return int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max())


def diffusers_picture(
    pipe: DiffusionPipeline, prompt: str, settings: Tempering, seed: int
) -> Image.Image:
    """What the pipeline paints by itself."""
    return diffusers_picture_and_latents(pipe, prompt, settings, seed)[0]


def diffusers_picture_and_latents(
    pipe: Any, prompt: str, settings: Tempering, seed: int
) -> tuple[Image.Image, Tensor]:
    """The same, and the latents that it decodes."""
    seen: dict[str, Tensor] = {}

    def keep(_pipe: Any, _step: int, _timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
        seen.update(tensors)
        return {}

    scale = settings.guidance_scale
    image = pipe(
        prompt,
        num_inference_steps=settings.steps,
        guidance_scale=family_of(pipe).guidance_scale if scale is None else scale,
        negative_prompt=settings.negative_prompt or None,
        height=settings.height,
        width=settings.width,
        generator=torch.Generator().manual_seed(seed),
        callback_on_step_end=keep,
    ).images[0]
    return image, seen["latents"]


def told_level(branch: Branch) -> tuple[float, float]:
    """alpha and sigma at the timestep that the denoiser is told of, by the training's schedule.

    Timesteps of flows may be rounded to whole ones, of 1000.
    """
    config, timestep = branch.scheduler.config, float(branch.timestep)
    if config.get("prediction_type", "flow_prediction") == "flow_prediction":
        return 1 - timestep / 1000, timestep / 1000
    alpha_squared = float(branch.scheduler.alphas_cumprod[int(timestep)])
    return alpha_squared**0.5, (1 - alpha_squared) ** 0.5
