"""Stage 1: the autoencoder, 64x64 pixels to 4x16x16 latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from pocket.images import Pixels, as_tensor
from recipe.training import Plan, bf16, fit

PLAN = Plan(steps=3600, batch=12, lr=2e-3, ema=0.998, seed=1)
KL_WEIGHT = 1e-6


def new_vae() -> AutoencoderKL:
    """An untrained autoencoder: 0.9 M parameters, no attention, 4x smaller latents."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    )


def train_vae(images: Pixels, work: Path, plan: Plan = PLAN) -> AutoencoderKL:
    """Train on `images`, then set the scaling factor that gives latents unit variance."""

    def loss(vae: Any, rng: torch.Generator) -> Tensor:
        picks = torch.randint(len(images), (plan.batch,), generator=rng).numpy()
        x = as_tensor(images[picks])  # (B, 3, 64, 64)
        with bf16():
            posterior = vae.encode(x).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=rng)
            restored = vae.decode(posterior.mean + posterior.std * noise).sample
        error = restored.float() - x
        # L1 keeps edges, L2 keeps rare strong errors (a small subject's colour) from being ignored.
        return error.abs().mean() + 2 * error.square().mean() + KL_WEIGHT * posterior.kl().mean()

    vae: Any = fit("vae", new_vae().to(memory_format=torch.channels_last), loss, plan, work)
    scale = 1 / latents(vae, images[:2000]).std().item()
    vae.register_to_config(scaling_factor=round(scale, 5))
    return vae


@torch.no_grad()
def latents(vae: AutoencoderKL, images: Pixels, batch: int = 50) -> Tensor:
    """Mean latents (N, 4, 16, 16) of `images`, unscaled, float32."""
    parts = []
    for start in range(0, len(images), batch):
        with bf16():
            parts.append(vae.encode(as_tensor(images[start : start + batch])).latent_dist.mean)
    return torch.cat([part.float() for part in parts])
