"""Tiny random OWLv2, CLIP and BLIP, as folders that look like their repositories on the Hub."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForQuestionAnswering,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    Owlv2Config,
    Owlv2ForObjectDetection,
)

from kinds import MODEL

TOKENIZER = MODEL.pocket / "tokenizer"
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
# Words that BLIP's tokenizer knows; it spells all others.
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
WORDS = [*SPECIAL, "yes", "no", "a", "black", "dog", "toy", "robot", "?"]


def save(folder: Path, model: Any, processor: Mapping[str, object]) -> Path:
    """The files of a repository: weights, configuration, how pictures are prepared."""
    model.save_pretrained(folder)
    sizes = {"do_normalize": True, "do_rescale": True, "do_resize": True, "resample": 3}
    norm = {"image_mean": MEAN, "image_std": STD, "rescale_factor": 1 / 255}
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({**sizes, **norm, **processor}), encoding="utf-8")
    return folder


def clip_words(folder: Path, length: int) -> dict[str, int]:
    """The pocket's CLIP tokenizer into `folder`; what a text model must know of it."""
    words = CLIPTokenizer.from_pretrained(TOKENIZER, model_max_length=length)
    words.save_pretrained(folder)
    ids = {f"{kind}_token_id": getattr(words, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    return {"vocab_size": len(words), "max_position_embeddings": length, **ids}


def owlv2(folder: Path) -> Path:
    folder.mkdir()
    text = {**SMALL, **clip_words(folder, 16)}
    vision = {**SMALL, "image_size": 64, "patch_size": 16}
    torch.manual_seed(0)
    model = Owlv2ForObjectDetection(
        Owlv2Config(text_config=text, vision_config=vision, projection_dim=32)
    )
    with torch.no_grad():  # so that its boxes are near their places on the grid, as trained ones
        model.box_head.dense2.weight.mul_(0.01)
    size = {"size": {"height": 64, "width": 64}, "do_pad": True}
    return save(folder, model, {**size, "image_processor_type": "Owlv2ImageProcessor"})


def clip(folder: Path) -> Path:
    folder.mkdir()
    text = {**SMALL, **clip_words(folder, 77)}
    vision = {**SMALL, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    kind = {"do_center_crop": True, "image_processor_type": "CLIPImageProcessor"}
    return save(folder, model, {**size, **kind})


def blip(folder: Path) -> Path:
    folder.mkdir()
    letters = [chr(code) for code in range(97, 123)]
    vocabulary = [*WORDS, *letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    words = BertTokenizer(vocab=str(folder / "vocab.txt"))
    words.save_pretrained(folder)
    ids = {
        "bos_token_id": WORDS.index("[DEC]"),
        "sep_token_id": WORDS.index("[SEP]"),
        "pad_token_id": 0,
        "eos_token_id": WORDS.index("[SEP]"),
    }
    text = {**SMALL, **ids, "vocab_size": len(words), "max_position_embeddings": 24}
    text |= {"encoder_hidden_size": 32}
    vision = {**SMALL, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    config = BlipConfig(text_config=text, vision_config=vision, projection_dim=16)
    size = {"size": {"height": 32, "width": 32}, "image_processor_type": "BlipImageProcessor"}
    return save(folder, BlipForQuestionAnswering(config), size)


REPOSITORIES: dict[str, Callable[[Path], Path]] = {
    "google/owlv2-base-patch16-ensemble": owlv2,
    "openai/clip-vit-large-patch14": clip,
    "Salesforce/blip-vqa-base": blip,
}
