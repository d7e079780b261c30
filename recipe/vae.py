"""Stage 1: the autoencoder, 64x64 pixels to 4x16x16 latents."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from pocket.images import Pixels, as_tensor
from recipe.training import Plan, bf16, fit

PLAN = Plan(steps=4000, batch=16, lr=2e-3, ema=0.998, decay=0.5, seed=1, compiled=True)
KL_WEIGHT = 1e-6


def new_vae() -> AutoencoderKL:
    """An untrained autoencoder: 2.2 M parameters, no attention, 4x smaller latents."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 128),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    )


class Autoencoder(nn.Module):
    """The round trip that is trained: encode, draw from the posterior, decode."""

    def __init__(self) -> None:
        super().__init__()
        self.vae = new_vae().to(memory_format=torch.channels_last)

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Restored images and the posterior's divergence (B,), for noise (B, 4, 16, 16)."""
        posterior = self.vae.encode(images).latent_dist
        return self.vae.decode(posterior.mean + posterior.std * noise).sample, posterior.kl()


def train_vae(images: Pixels, work: Path, plan: Plan = PLAN) -> AutoencoderKL:
    """Train on `images`, then set the scaling factor that gives latents unit variance."""

    def loss(autoencoder: nn.Module, rng: torch.Generator) -> Tensor:
        picks = torch.randint(len(images), (plan.share,), generator=rng).numpy()
        x = as_tensor(images[picks]).contiguous(memory_format=torch.channels_last)
        noise = torch.randn(plan.share, 4, 16, 16, generator=rng)
        with bf16():
            restored, divergence = autoencoder(x, noise)
        error = restored.float() - x
        # L1 keeps edges, L2 keeps rare strong errors (a small subject's colour) from being ignored.
        return error.abs().mean() + 2 * error.square().mean() + KL_WEIGHT * divergence.mean()

    trained = fit("vae", Autoencoder(), loss, plan, work)
    assert isinstance(trained, Autoencoder)
    vae = trained.vae
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
