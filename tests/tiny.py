"""A tiny random model of every family, built offline: what it paints is noise, but no other noise.

Each has all parts of its family and nothing of its size: a picture takes a tenth of a second.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from kinds import MODEL

SIDE = 32  # pixels, each model's own size
# Stable Diffusion's, as its models have it.
SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}
# The two CLIPs of a model differ in width: that is how diffusers tells them apart in one file.
WIDTH, WIDTH_2 = 32, 64


def stable_diffusion_1() -> StableDiffusionPipeline:
    return _with_unet(
        unet(cross_attention_dim=WIDTH, attention_head_dim=4),
        clip(CLIPTextModel),
        PNDMScheduler(**SCHEDULE, skip_prk_steps=True),
    )


def stable_diffusion_2() -> StableDiffusionPipeline:
    """The one of 768 pixels, which predicts v."""
    return _with_unet(
        unet(cross_attention_dim=WIDTH, attention_head_dim=(2, 4), use_linear_projection=True),
        clip(CLIPTextModel, act="gelu"),
        PNDMScheduler(**SCHEDULE, skip_prk_steps=True, prediction_type="v_prediction"),
    )


def latent_consistency() -> StableDiffusionPipeline:
    """Distilled to few steps, and to be told the guidance."""
    return _with_unet(
        unet(cross_attention_dim=WIDTH, attention_head_dim=4, time_cond_proj_dim=8),
        clip(CLIPTextModel),
        LCMScheduler(**SCHEDULE, clip_sample=False),
    )


def stable_diffusion_xl() -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(
        unet=unet(
            cross_attention_dim=WIDTH + WIDTH_2,
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            transformer_layers_per_block=(1, 2),
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + WIDTH_2,
        ),
        vae=vae(scaling_factor=0.13025),
        text_encoder=clip(CLIPTextModel),
        text_encoder_2=clip(CLIPTextModelWithProjection, WIDTH_2, act="gelu"),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        scheduler=EulerDiscreteScheduler(**SCHEDULE),
        add_watermarker=False,
    )


def stable_diffusion_3(t5: bool = True) -> StableDiffusion3Pipeline:
    """With what 3.5 medium has: normalised queries and keys, and a second attention."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=WIDTH + WIDTH_2,
        caption_projection_dim=32,
        pooled_projection_dim=WIDTH + WIDTH_2,
        pos_embed_max_size=24,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    first = clip(CLIPTextModelWithProjection)
    nn.init.eye_(first.text_projection.weight)  # single files leave it out
    return StableDiffusion3Pipeline(
        transformer=louder(transformer.eval(), transformer.proj_out),
        vae=vae(
            16,
            scaling_factor=1.5305,
            shift_factor=0.0609,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=first,
        text_encoder_2=clip(CLIPTextModelWithProjection, WIDTH_2, act="gelu"),
        text_encoder_3=t5_encoder() if t5 else None,
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        tokenizer_3=t5_tokenizer() if t5 else None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


FAMILIES: dict[str, Callable[[], Any]] = {
    "sd2": stable_diffusion_2,
    "sdxl": stable_diffusion_xl,
    "sd3": stable_diffusion_3,
}


# Whose configuration diffusers takes for single files of each.
LENDERS = {
    "sd2": "stabilityai/stable-diffusion-2-1",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sd3": "stabilityai/stable-diffusion-3.5-medium",
}


@cache
def shared(family: str) -> Any:
    """A family's pipeline, made once: whoever changes it brings it back to what it was.

    "bare" is Stable Diffusion 3 without T5.
    """
    pipe = stable_diffusion_3(t5=False) if family == "bare" else FAMILIES[family]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _with_unet(denoiser: Any, text_encoder: Any, scheduler: Any) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        unet=denoiser,
        vae=vae(scaling_factor=0.18215),
        text_encoder=text_encoder,
        tokenizer=clip_tokenizer(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def unet(**more: Any) -> Any:
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **more,
    )
    return louder(model.eval(), model.conv_out)


@torch.no_grad()
def louder(denoiser: Any, last: Any) -> Any:
    """The denoiser with an output of about unit variance, else schedulers hardly differ."""
    last.weight.mul_(4)
    return denoiser


def vae(channels: int = 4, **more: Any) -> Any:
    """Two levels, so that a latent is two pixels wide and not eight."""
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(16, 32),
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        sample_size=SIDE,
        **more,
    ).eval()


def taesd(channels: int = 4) -> Any:
    """A tiny decoder for the latents of `vae`."""
    torch.manual_seed(1)
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        decoder_block_out_channels=(8, 8),
        num_decoder_blocks=(1, 1),
        latent_channels=channels,
    ).eval()


def clip_tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(MODEL.pocket / "tokenizer")


def clip(cls: Any, width: int = WIDTH, act: str = "quick_gelu") -> Any:
    """A text encoder of that class; the pooled output of the one with projection is as wide."""
    tokenizer = clip_tokenizer()
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_position_embeddings=tokenizer.model_max_length,
        hidden_size=width,
        projection_dim=width,
        intermediate_size=width,
        num_attention_heads=4,
        num_hidden_layers=3,
        hidden_act=act,
    )
    return cls(config).eval()


def t5_tokenizer() -> T5TokenizerFast:
    """A few words and all small letters."""
    words = ["a", "black", "dog", "next", "to", "toy", "robot", "red", "cat"]
    letters = map(chr, range(ord("a"), ord("z") + 1))
    pieces = ["<pad>", "</s>", "<unk>", *(f"\u2581{word}" for word in words), *letters, "\u2581"]
    scores = [(piece, -float(number)) for number, piece in enumerate(pieces)]
    return T5TokenizerFast(vocab=scores, extra_ids=0)


def t5_encoder() -> Any:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=64, d_model=WIDTH + WIDTH_2, d_kv=8, d_ff=37, num_layers=2, num_heads=4
    )
    return T5EncoderModel(config).eval()


def lora(pipe: Any, seed: int = 0) -> dict[str, torch.Tensor]:
    """A LoRA for all attention of a pipeline, text encoders included, as peft names its tensors."""
    rng = torch.Generator().manual_seed(seed)
    parts = {
        "unet": ("to_q", "to_k", "to_v", "to_out.0"),
        "transformer": ("to_q", "to_k", "to_v", "to_out.0"),
        "text_encoder": ("q_proj", "k_proj", "v_proj", "out_proj"),
        "text_encoder_2": ("q_proj", "k_proj", "v_proj", "out_proj"),
    }
    tensors = {}
    for part, changed in parts.items():
        network = getattr(pipe, part, None)
        for name, module in network.named_modules() if network is not None else ():
            if name.endswith(changed) and isinstance(module, nn.Linear):
                down, up = (2, module.in_features), (module.out_features, 2)
                tensors[f"{part}.{name}.lora_A.weight"] = torch.randn(down, generator=rng) / 4
                tensors[f"{part}.{name}.lora_B.weight"] = torch.randn(up, generator=rng) / 4
    return tensors


def kohya(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same LoRA under the names of kohya's scripts, as most LoRAs in circulation have them."""
    several = any(name.startswith("text_encoder_2") for name in tensors)
    parts = {
        "unet.": "lora_unet_",
        "text_encoder.": f"lora_te{'1' * several}_text_model_",
        "text_encoder_2.": "lora_te2_text_model_",
    }
    found = {}
    for name, value in tensors.items():
        part = next(part for part in parts if name.startswith(part))
        module, _, way = name.removeprefix(part).removesuffix(".weight").rpartition(".")
        start = parts[part] + module.removeprefix("text_model.").replace(".", "_")
        found[f"{start}.{'lora_down' if way == 'lora_A' else 'lora_up'}.weight"] = value
        found[f"{start}.alpha"] = torch.tensor(2.0)  # the rank: no scaling
    return found
