"""The tiny decoder: what the autoencoder makes of latents, at a fraction of its cost.

For the looks of CLIPSeg alone, as Bohan's TAESD is for Stable Diffusion's own latents: the finished
picture is the autoencoder's.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor, nn

from recipe.training import Plan, bf16, fit

PLAN = Plan(steps=3000, batch=16, lr=2e-3, ema=0.998, decay=0.5, seed=5)
MOST_NOISE = 0.5  # in latents of unit variance


def new_taesd() -> AutoencoderTiny:
    """An untrained decoder of 0.13 M parameters; its encoder, unused, is next to none."""
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(4,) * 3,
        num_encoder_blocks=(0,) * 3,
        decoder_block_out_channels=(32,) * 3,
        num_decoder_blocks=(2, 1, 1),
    )
    tiny.encoder.requires_grad_(False)
    return tiny


class Decoder(nn.Module):
    """What is trained of it."""

    def __init__(self) -> None:
        super().__init__()
        self.tiny = new_taesd().to(memory_format=torch.channels_last)

    def forward(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, 64, 64) of scaled latents (B, 4, 16, 16)."""
        return self.tiny.decode(latents).sample


def train_taesd(
    vae: AutoencoderKL, latents: Tensor, work: Path, plan: Plan = PLAN
) -> AutoencoderTiny:
    """Train on what `vae` makes of scaled `latents` (N, 4, 16, 16) and of what lies round them."""

    def loss(decoder: nn.Module, rng: torch.Generator) -> Tensor:
        x0 = surroundings(latents, plan.share, rng).to(memory_format=torch.channels_last)
        with bf16():
            with torch.no_grad():
                wanted = vae.decode(x0 / vae.config.scaling_factor).sample.float()
            error = decoder(x0).float() - wanted
        return error.abs().mean() + 2 * error.square().mean()

    trained = fit("taesd", Decoder(), loss, plan, work)
    assert isinstance(trained, Decoder)
    return trained.tiny


def surroundings(latents: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """`count` latents as a look may meet them: between two pictures, and not free of noise.

    What is predicted halfway is a mixture of the pictures that it may become.
    """
    one, other = (
        latents[torch.randint(len(latents), (count,), generator=rng)].float() for _ in range(2)
    )
    share, level = torch.rand(2, count, 1, 1, 1, generator=rng)
    share = (share - 0.5).clamp(min=0)  # half of them are pictures as they are
    noise = torch.randn(one.shape, generator=rng)
    return one.lerp(other, share) + MOST_NOISE * level**2 * noise
