"""Stable Diffusion v1-4 and CLIPSeg rd64-refined as they are, but for what they have learned.

The folders that `save` writes have the files, sizes and settings of the repositories on the Hub,
with random weights and a vocabulary that knows the pocket's words alone. They paint noise at the
original's price: enough to measure speed and memory, and to test that the program runs them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kinds import MODEL

POCKET_TOKENIZER = MODEL.pocket / "tokenizer"
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
# Small enough that the activations of random weights stay finite in bf16.
SPREAD = 0.02

Config = dict[str, Any]
Architecture = Mapping[str, Config]  # part -> its model's configuration

# What is not named here has been the library's default from the start.
FULL: Architecture = {
    # CompVis/stable-diffusion-v1-4
    "unet": {
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
    "vae": {
        "sample_size": 512,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "latent_channels": 4,
        "scaling_factor": 0.18215,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    },
    "text_encoder": {
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
    },
    # CIDAS/clipseg-rd64-refined: CLIP ViT-B/16, whose 14x14 positions are interpolated to 22x22
    "clipseg": {
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
}

SCHEDULER: Config = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "clip_sample": False,
    "trained_betas": None,
}
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


def skeletons(architecture: Architecture = FULL) -> dict[str, nn.Module]:
    """The four models by their part's name, on the meta device: shapes without any memory."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import (
        CLIPSegConfig,
        CLIPSegForImageSegmentation,
        CLIPTextConfig,
        CLIPTextModel,
    )

    with torch.device("meta"):
        models: dict[str, Any] = {
            "unet": UNet2DConditionModel(**architecture["unet"]),
            "vae": AutoencoderKL(**architecture["vae"]),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**architecture["text_encoder"])),
            "clipseg": CLIPSegForImageSegmentation(CLIPSegConfig(**architecture["clipseg"])),
        }
    return models


def parameters(model: nn.Module) -> int:
    """How many parameters a model has."""
    return sum(parameter.numel() for parameter in model.parameters())


def save(folder: Path, architecture: Architecture = FULL, seed: int = 0) -> None:
    """Write `stable-diffusion` and `clipseg` into `folder`: 5 GB of float32 for the full ones.

    They are built under another name and renamed, so a folder that is there is complete. One
    model at a time is in memory.
    """
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    painter, segmenter = unfinished / "stable-diffusion", unfinished / "clipseg"
    for name, model in skeletons(architecture).items():
        target = segmenter if name == "clipseg" else painter / name
        fill(model.to_empty(device="cpu"), seed).save_pretrained(target)
        model.to("meta")
    _save_json(painter / "scheduler" / "scheduler_config.json", SCHEDULER)
    _save_json(painter / "model_index.json", _model_index())
    save_tokenizer(painter / "tokenizer", architecture["text_encoder"])
    save_tokenizer(segmenter, architecture["clipseg"]["text_config"])
    _save_json(segmenter / "preprocessor_config.json", IMAGE_PROCESSOR)
    unfinished.replace(folder)


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


def _model_index() -> Config:
    import diffusers

    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _load_json(path: Path) -> Config:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _save_json(path: Path, value: Config, indent: int | None = 2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=indent, ensure_ascii=False), encoding="utf-8")
