"""Stable Diffusion v1-4, XL, 3.5 medium and CLIPSeg rd64-refined, but for what they have learned.

The folders that `save` writes have the files, sizes and settings of the repositories on the Hub,
with random weights and a vocabulary that knows the pocket's words alone. They paint noise at the
original's price: enough to measure speed and memory, and to test that the program runs them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kinds import MODEL, OWN_TAESD

POCKET_TOKENIZER = MODEL.pocket / "tokenizer"
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
# Small enough that the activations of random weights stay finite in bf16.
SPREAD = 0.02

Config = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """One network: its class in `library`, and its configuration there."""

    library: str
    name: str
    config: Config


@dataclass(frozen=True)
class Original:
    """A model of the Hub; what is not named here has been the library's default from the start."""

    title: str
    pipeline: str  # diffusers' class
    parts: Mapping[str, Part]  # in the order in which they are built
    scheduler: Config
    dtype: str = "float32"  # of the files

    @property
    def text_encoders(self) -> dict[str, Config]:
        return {name: part.config for name, part in self.parts.items() if "text_enc" in name}


SCHEDULE: Config = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "clip_sample": False,
    "trained_betas": None,
}
VAE: Config = {
    "sample_size": 512,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
CLIP: Config = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "projection_dim": 768,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
    "hidden_act": "quick_gelu",
    "bos_token_id": 49406,
    "eos_token_id": 49407,
}
OPEN_CLIP: Config = {
    **CLIP,
    "hidden_size": 1280,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "intermediate_size": 5120,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
ORIGINALS = {
    "v1-4": Original(
        "Stable Diffusion v1-4",  # CompVis/stable-diffusion-v1-4
        "StableDiffusionPipeline",
        {
            "unet": Part(
                "diffusers",
                "UNet2DConditionModel",
                {
                    "sample_size": 64,
                    "in_channels": 4,
                    "out_channels": 4,
                    "block_out_channels": (320, 640, 1280, 1280),
                    "layers_per_block": 2,
                    "attention_head_dim": 8,  # the number of heads, whatever its name says
                    "cross_attention_dim": 768,
                    "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
                    "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
                },
            ),
            "vae": Part("diffusers", "AutoencoderKL", VAE),
            "text_encoder": Part("transformers", "CLIPTextModel", CLIP),
        },
        {
            "_class_name": "PNDMScheduler",
            **SCHEDULE,
            "skip_prk_steps": True,
            "set_alpha_to_one": False,
        },
    ),
    "xl": Original(
        "Stable Diffusion XL",  # stabilityai/stable-diffusion-xl-base-1.0
        "StableDiffusionXLPipeline",
        {
            "unet": Part(
                "diffusers",
                "UNet2DConditionModel",
                {
                    "sample_size": 128,
                    "in_channels": 4,
                    "out_channels": 4,
                    "block_out_channels": (320, 640, 1280),
                    "layers_per_block": 2,
                    "attention_head_dim": (5, 10, 20),
                    "cross_attention_dim": 2048,
                    "down_block_types": ("DownBlock2D", *["CrossAttnDownBlock2D"] * 2),
                    "up_block_types": (*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"),
                    "transformer_layers_per_block": (1, 2, 10),
                    "use_linear_projection": True,
                    "addition_embed_type": "text_time",
                    "addition_time_embed_dim": 256,
                    "projection_class_embeddings_input_dim": 2816,
                },
            ),
            "vae": Part(
                "diffusers",
                "AutoencoderKL",
                {**VAE, "sample_size": 1024, "scaling_factor": 0.13025},
            ),
            "text_encoder": Part("transformers", "CLIPTextModel", CLIP),
            "text_encoder_2": Part("transformers", "CLIPTextModelWithProjection", OPEN_CLIP),
        },
        {
            "_class_name": "EulerDiscreteScheduler",
            **SCHEDULE,
            "timestep_spacing": "leading",
            "interpolation_type": "linear",
        },
        "bfloat16",
    ),
    "3.5-medium": Original(
        "Stable Diffusion 3.5 medium, without T5",  # stabilityai/stable-diffusion-3.5-medium
        "StableDiffusion3Pipeline",
        {
            "transformer": Part(
                "diffusers",
                "SD3Transformer2DModel",
                {
                    "sample_size": 128,
                    "patch_size": 2,
                    "in_channels": 16,
                    "out_channels": 16,
                    "num_layers": 24,
                    "attention_head_dim": 64,
                    "num_attention_heads": 24,
                    "joint_attention_dim": 4096,
                    "caption_projection_dim": 1536,
                    "pooled_projection_dim": 2048,
                    "pos_embed_max_size": 384,
                    "dual_attention_layers": tuple(range(13)),
                    "qk_norm": "rms_norm",
                },
            ),
            "vae": Part(
                "diffusers",
                "AutoencoderKL",
                {
                    **VAE,
                    "sample_size": 1024,
                    "latent_channels": 16,
                    "scaling_factor": 1.5305,
                    "shift_factor": 0.0609,
                    "use_quant_conv": False,
                    "use_post_quant_conv": False,
                },
            ),
            "text_encoder": Part("transformers", "CLIPTextModelWithProjection", CLIP),
            "text_encoder_2": Part("transformers", "CLIPTextModelWithProjection", OPEN_CLIP),
        },
        {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "shift": 3.0,
        },
        "bfloat16",
    ),
}
# CIDAS/clipseg-rd64-refined: CLIP ViT-B/16, whose 14x14 positions are interpolated to 22x22
SEGMENTER = Part(
    "transformers",
    "CLIPSegForImageSegmentation",
    {
        "reduce_dim": 64,
        "extract_layers": [3, 6, 9],
        "use_complex_transposed_convolution": True,
        "projection_dim": 512,
        "text_config": {
            "hidden_size": 512,
            "num_hidden_layers": 12,
            "num_attention_heads": 8,
            "intermediate_size": 2048,
            "max_position_embeddings": 77,
            "vocab_size": 49408,
            "bos_token_id": 49406,
            "eos_token_id": 49407,
        },
        "vision_config": {
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
            "image_size": 224,
            "patch_size": 16,
        },
    },
)
IMAGE_PROCESSOR: Config = {
    "image_processor_type": "ViTImageProcessor",
    "processor_class": "CLIPSegProcessor",
    "do_resize": True,
    "size": {"height": 352, "width": 352},
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],  # ImageNet's
    "image_std": [0.229, 0.224, 0.225],
}


def skeleton(part: Part) -> Any:
    """The network on the meta device: shapes without any memory."""
    cls = getattr(import_module(part.library), part.name)
    with torch.device("meta"):
        if part.library == "diffusers":
            return cls(**part.config)
        return cls(cls.config_class(**part.config))


def parameters(model: nn.Module) -> int:
    """How many parameters a model has."""
    return sum(parameter.numel() for parameter in model.parameters())


def save(folder: Path, original: Original, segmenter: Part = SEGMENTER, seed: int = 0) -> None:
    """Write the model and CLIPSeg into `folder`, as `stable-diffusion` and `clipseg`.

    The model has its tiny decoder with it; diffusers' defaults are TAESD's sizes. They are built
    under another name and renamed, so a folder that is there is complete. One network at a time is
    in memory.
    """
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    painter, looker = unfinished / "stable-diffusion", unfinished / "clipseg"
    for name, part in original.parts.items():
        _save_network(part, painter / name, getattr(torch, original.dtype), seed)
    channels = original.parts["vae"].config["latent_channels"]
    tiny = Part("diffusers", "AutoencoderTiny", {"latent_channels": channels})
    _save_network(tiny, painter / OWN_TAESD, torch.float32, seed)
    _save_network(segmenter, looker, torch.float32, seed)
    _save_json(painter / "scheduler" / "scheduler_config.json", original.scheduler)
    _save_json(painter / "model_index.json", dict(_model_index(original)))
    for name, config in original.text_encoders.items():
        save_tokenizer(painter / name.replace("text_encoder", "tokenizer"), config)
    save_tokenizer(looker, segmenter.config["text_config"])
    _save_json(looker / "preprocessor_config.json", IMAGE_PROCESSOR)
    unfinished.replace(folder)


def _save_network(part: Part, folder: Path, dtype: torch.dtype, seed: int) -> None:
    model = skeleton(part).to(dtype).to_empty(device="cpu")
    fill(model, seed).save_pretrained(folder)


@torch.no_grad()
def fill(model: nn.Module, seed: int) -> Any:
    """The model with normal weights, biases of 0 and normalisations that change nothing."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif parameter.ndim == 0 or (parameter.ndim == 1 and name.endswith("weight")):
            parameter.fill_(1)
        else:
            parameter.normal_(std=SPREAD, generator=generator)
    for _, buffer in model.named_buffers():
        if buffer.is_floating_point():  # positions, which are made without a memory, too
            buffer.normal_(std=SPREAD, generator=generator)
    return model


def save_tokenizer(folder: Path, text_config: Mapping[str, Any]) -> None:
    """The pocket's tokenizer, brought to the size and the special tokens of a text encoder.

    Words keep the pocket's numbers; numbers that it does not know belong to words that no text
    has, so the vocabulary is as large as the original's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    special = {BOS: text_config["bos_token_id"], EOS: text_config["eos_token_id"]}
    known = _load_json(POCKET_TOKENIZER / "vocab.json")
    words = {word: number for word, number in known.items() if word not in special}
    unused = set(range(text_config["vocab_size"])) - {*words.values(), *special.values()}
    vocabulary = words | {f"<|unused{number}|>": number for number in sorted(unused)} | special
    _save_json(folder / "vocab.json", vocabulary, indent=None)
    shutil.copy(POCKET_TOKENIZER / "merges.txt", folder)

    fast = _load_json(POCKET_TOKENIZER / "tokenizer.json")
    fast["model"]["vocab"] = vocabulary
    for token in fast["added_tokens"]:
        token["id"] = special[token["content"]]
    fast["post_processor"] |= {"cls": [BOS, special[BOS]], "sep": [EOS, special[EOS]]}
    _save_json(folder / "tokenizer.json", fast, indent=None)

    config = _load_json(POCKET_TOKENIZER / "tokenizer_config.json")
    config["model_max_length"] = text_config["max_position_embeddings"]
    _save_json(folder / "tokenizer_config.json", config)


def _model_index(original: Original) -> Iterator[tuple[str, Any]]:
    """What model_index.json says, entry by entry; what pipelines of the Hub have and we do not."""
    import diffusers

    yield "_class_name", original.pipeline
    yield "_diffusers_version", diffusers.__version__
    yield "scheduler", ["diffusers", original.scheduler["_class_name"]]
    for name, part in original.parts.items():
        yield name, [part.library, part.name]
    for name in original.text_encoders:
        yield name.replace("text_encoder", "tokenizer"), ["transformers", "CLIPTokenizer"]
    absent = {
        "StableDiffusionPipeline": ("safety_checker", "feature_extractor"),
        "StableDiffusion3Pipeline": ("text_encoder_3", "tokenizer_3"),
    }
    for name in absent.get(original.pipeline, ()):
        yield name, [None, None]
    if original.pipeline == "StableDiffusionPipeline":
        yield "requires_safety_checker", False


def _load_json(path: Path) -> Config:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _save_json(path: Path, value: Config, indent: int | None = 2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=indent, ensure_ascii=False), encoding="utf-8")
