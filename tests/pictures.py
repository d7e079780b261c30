"""Pictures to hold others against, and how far two are apart."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from settings import Tempering


def farthest(a: Image.Image, b: Image.Image) -> int:
    """The largest difference of any pixel, in 1/255."""
    return int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max())


def diffusers_picture(
    pipe: StableDiffusionPipeline, prompt: str, settings: Tempering, seed: int
) -> Image.Image:
    """What the pipeline paints by itself."""
    return pipe(
        prompt,
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        negative_prompt=settings.negative_prompt or None,
        height=settings.height,
        width=settings.width,
        generator=torch.Generator().manual_seed(seed),
    ).images[0]
