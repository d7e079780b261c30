"""Stage 2: the U-Net and its text encoder, trained together on cached latents."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from pocket.world import caption
from recipe.data import Scene
from recipe.tokenizer import tokenize
from recipe.training import Plan, bf16, fit

PLAN = Plan(
    steps=36_000, batch=96, lr=1e-3, ema=0.9995, decay=0.4, seed=2, snapshots=3000, compiled=True
)
WIDTH = 128  # of the text encoder and of the cross-attention
CAPTION_DROPOUT = 0.1  # share of empty captions: what classifier-free guidance subtracts
MAX_WEIGHT = 10.0  # of a loss; reached in the last fifteenth of the schedule
# Timesteps are 1000 u^0.6, u uniform: a sixth of them below 350 instead of a third. Even weights
# that drew badly restored 97 of 100 pictures from there; the noisier ones are the hard ones.
TIMESTEP_EXPONENT = 0.6

LAST_PREVIEW = 750  # timesteps below this: a look at a noisier prediction tells nothing yet
REPAINTED = 6  # steps of 20: noise of up to timestep 251, which leaves a lone subject as it was

# Stable Diffusion v1's own schedule.
SCHEDULE = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
}


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained CLIP text model of 0.5 M parameters."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_unet() -> UNet2DConditionModel:
    """An untrained U-Net of 10.9 M parameters with cross-attention at 8x8 and 4x4."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,  # diffusers reads this as the number of heads
        norm_num_groups=16,
    )


class Denoiser(nn.Module):
    """U-Net and text encoder as one module, so that one optimizer trains both."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.unet = new_unet().to(memory_format=torch.channels_last)
        # Fused attention is slower to train than plain attention on CPUs.
        self.unet.set_attn_processor(AttnProcessor())
        self.text_encoder = new_text_encoder(tokenizer)
        self.text_encoder.set_attn_implementation("eager")

    def forward(self, noisy: Tensor, timesteps: Tensor, ids: Tensor) -> Tensor:
        """Predicted noise (B, 4, 16, 16) for captions of token `ids` (B, L)."""
        context = self.text_encoder(ids).last_hidden_state  # (B, L, WIDTH)
        return self.unet(noisy, timesteps, context).sample


def train_unet(
    latents: Tensor, scenes: list[Scene], tokenizer: CLIPTokenizer, work: Path, plan: Plan = PLAN
) -> Denoiser:
    """Train on scaled `latents` (N, 4, 16, 16) of `scenes`; each step words the captions anew."""
    schedule = DDPMScheduler(**SCHEDULE)
    snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)

    def loss(denoiser: nn.Module, rng: torch.Generator) -> Tensor:
        picks = torch.randint(len(latents), (plan.share,), generator=rng)
        ids = tokenize(tokenizer, [words(scenes[i], rng) for i in picks.tolist()])
        x0 = latents[picks].float()
        noise = torch.randn(x0.shape, generator=rng)
        uniform = torch.rand(plan.share, generator=rng)
        timesteps = (1000 * uniform**TIMESTEP_EXPONENT).long().clamp(max=999)
        noisy = schedule.add_noise(x0, noise, timesteps).to(memory_format=torch.channels_last)
        with bf16():
            predicted = denoiser(noisy, timesteps, ids)
        error = (predicted.float() - noise).square().mean(dim=(1, 2, 3))  # (B,)
        # Yu et al. 2023, arXiv:2310.08442: more weight than usual for the noisiest steps, where it
        # is decided what a picture shows.
        weight = snr[timesteps].rsqrt().clamp(max=MAX_WEIGHT)
        return (weight * error).mean()

    denoiser = fit("unet", Denoiser(tokenizer), loss, plan, work)
    assert isinstance(denoiser, Denoiser)
    return denoiser


def previews(
    denoiser: Denoiser,
    vae: AutoencoderKL,
    latents: Tensor,
    scenes: list[Scene],
    tokenizer: CLIPTokenizer,
) -> Callable[[list[int], torch.Generator], Tensor]:
    """What CLIPSeg is shown: decoded x0, as it is predicted at a random timestep.

    The function returned takes numbers of `scenes` and a generator; its images are (B, 3, 64, 64).
    """

    def preview(picks: list[int], rng: torch.Generator) -> Tensor:
        ids = tokenize(tokenizer, [words(scenes[i], rng) for i in picks])
        x0 = latents[picks].float()
        noise = torch.randn(x0.shape, generator=rng)
        timesteps = torch.randint(LAST_PREVIEW, (len(picks),), generator=rng)
        return predicted(denoiser, vae, x0, noise, timesteps, ids)

    return preview


@torch.no_grad()
def predicted(
    denoiser: Denoiser,
    vae: AutoencoderKL,
    x0: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    ids: Tensor,
) -> Tensor:
    """Images (B, 3, 64, 64) of x0 (B, 4, 16, 16), predicted from it with noise of `timesteps`."""
    schedule = DDPMScheduler(**SCHEDULE)
    noisy = schedule.add_noise(x0, noise, timesteps).to(memory_format=torch.channels_last)
    alpha_squared = schedule.alphas_cumprod[timesteps][:, None, None, None]
    with bf16():
        eps = denoiser(noisy, timesteps, ids).float()
        clean = (noisy - (1 - alpha_squared).sqrt() * eps) / alpha_squared.sqrt()
        return vae.decode(clean / vae.config.scaling_factor).sample.float()


def repaint(
    denoiser: Denoiser, vae: AutoencoderKL, tokenizer: CLIPTokenizer
) -> Callable[[Tensor], Tensor]:
    """What the judge is shown: images as this model would have painted them.

    The function returned encodes images (N, 3, 64, 64), noises them lightly, restores them with up
    to `REPAINTED` steps of DDIM (Song et al. 2020, arXiv:2010.02502) and the empty prompt, and
    decodes.
    """
    schedule = DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False)
    schedule.set_timesteps(20)
    rng = torch.Generator().manual_seed(PLAN.seed)

    @torch.no_grad()
    def repainted(images: Tensor) -> Tensor:
        timesteps = schedule.timesteps[-int(torch.randint(REPAINTED, (), generator=rng)) - 1 :]
        ids = tokenize(tokenizer, [""] * len(images))
        scale = vae.config.scaling_factor
        with bf16():
            x = vae.encode(images).latent_dist.mean.float() * scale
            x = schedule.add_noise(x, torch.randn(x.shape, generator=rng), timesteps[:1])
            for timestep in timesteps:
                noise = denoiser(x, timestep, ids).float()
                x = schedule.step(noise, timestep, x, return_dict=False)[0]
            return vae.decode(x / scale).sample.float()

    return repainted


def words(scene: Scene, rng: torch.Generator) -> str:
    """A fresh caption of the scene, its subjects in random order; sometimes an empty one."""
    draw = random.Random(int(torch.randint(2**31, (), generator=rng)))
    if draw.random() < CAPTION_DROPOUT:
        return ""
    nouns = [placed.noun for placed in scene.placed]
    return caption(draw.sample(nouns, len(nouns)), draw)
