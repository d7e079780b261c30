"""Write trained parts as the folders that diffusers and transformers load, fp16 safetensors."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
)
from transformers import (
    CLIPSegForImageSegmentation,
    CLIPSegProcessor,
    CLIPTokenizer,
    ViTImageProcessor,
)

from recipe.data import SIZE
from recipe.unet import SCHEDULE, Denoiser


def export_stable_diffusion(
    folder: Path, vae: AutoencoderKL, denoiser: Denoiser, tokenizer: CLIPTokenizer
) -> None:
    """Write a diffusers pipeline folder without safety checker."""
    pipeline = StableDiffusionPipeline(
        vae=copy.deepcopy(vae),
        text_encoder=copy.deepcopy(denoiser.text_encoder),
        tokenizer=tokenizer,
        unet=copy.deepcopy(denoiser.unet),
        scheduler=EulerDiscreteScheduler(**SCHEDULE, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(folder, safe_serialization=True)
    _write_slow_tokenizer(tokenizer, folder / "tokenizer")
    _load_as_float32(folder / "text_encoder")
    _only_the_schedule(folder / "scheduler" / "scheduler_config.json")


def export_taesd(folder: Path, tiny: AutoencoderTiny) -> None:
    """Write the tiny decoder beside the pipeline's parts."""
    copy.deepcopy(tiny).to(torch.float16).save_pretrained(folder, safe_serialization=True)


def _only_the_schedule(path: Path) -> None:
    """Drop this scheduler's own defaults: another one would take them for the model's wish."""
    config = json.loads(path.read_text(encoding="utf-8"))
    kept = ("_class_name", "_diffusers_version", "steps_offset", *SCHEDULE)
    path.write_text(
        json.dumps({name: config[name] for name in kept}, indent=2) + "\n", encoding="utf-8"
    )


def export_clipseg(
    folder: Path, clipseg: CLIPSegForImageSegmentation, tokenizer: CLIPTokenizer
) -> None:
    """Write a CLIPSeg folder with its processor."""
    image_processor = ViTImageProcessor(
        size={"height": SIZE, "width": SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    CLIPSegProcessor(image_processor, tokenizer).save_pretrained(folder)
    copy.deepcopy(clipseg).half().save_pretrained(folder, safe_serialization=True)
    _load_as_float32(folder)


def _load_as_float32(folder: Path) -> None:
    """transformers loads in the dtype that a config names, diffusers in float32: let them agree."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "dtype": "float32"}, indent=2) + "\n", encoding="utf-8")


def _write_slow_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Add vocab.json and merges.txt, the form in which Stable Diffusion v1 ships its tokenizer."""
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    merges = "\n".join(" ".join(merge) for merge in model["merges"])
    (folder / "vocab.json").write_text(
        json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8"
    )
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
