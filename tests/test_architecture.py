"""The benchmark's models are Stable Diffusion v1-4 and CLIPSeg in size, and run as they do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.architecture import FULL, Architecture, parameters, save, skeletons
from benchmarks.speed import measure
from hub import check
from kinds import MODEL, SEGMENTER
from loaders import load_clipseg, load_pipeline
from settings import Tempering

# All of the original, in small.
NARROW: Architecture = {
    "unet": {**FULL["unet"], "block_out_channels": (32, 64, 64, 64), "cross_attention_dim": 64},
    "vae": {**FULL["vae"], "block_out_channels": (32, 32, 32, 32)},
    "text_encoder": {
        **FULL["text_encoder"],
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
    },
    "clipseg": {
        **FULL["clipseg"],
        "projection_dim": 32,
        "text_config": {
            **FULL["clipseg"]["text_config"],
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "intermediate_size": 64,
        },
        "vision_config": {
            **FULL["clipseg"]["vision_config"],
            "hidden_size": 48,
            "intermediate_size": 96,
        },
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("narrow") / "models"
    save(folder, NARROW)
    return folder


def test_every_model_has_as_many_parameters_as_the_original() -> None:
    """Counted in the files of CompVis/stable-diffusion-v1-4 and CIDAS/clipseg-rd64-refined."""
    assert {name: parameters(model) for name, model in skeletons().items()} == {
        "unet": 859_520_964,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "clipseg": 150_747_746,
    }


def test_what_is_saved_is_loaded_by_name_and_reads_text_as_the_original_does(folder: Path) -> None:
    painter, segmenter = str(folder / "stable-diffusion"), str(folder / "clipseg")
    check(painter, MODEL)
    check(segmenter, SEGMENTER)
    pipe: Any = load_pipeline(painter, scheduler="pndm", device="cpu")
    assert dict(pipe.scheduler.config)["steps_offset"] == 1
    clipseg = load_clipseg(segmenter, device="cpu")
    assert clipseg.processor.image_processor.size["height"] == 352
    for tokenizer in (pipe.tokenizer, clipseg.processor.tokenizer):
        assert len(tokenizer) == 49408
        ids = tokenizer("a black dog", padding="max_length").input_ids
        assert len(ids) == 77
        assert ids[0] == 49406
        assert ids[-1] == 49407
        assert tokenizer.decode(ids, skip_special_tokens=True) == "a black dog"


def test_the_weights_are_the_same_each_time(folder: Path, tmp_path: Path) -> None:
    save(tmp_path / "again", NARROW)
    for path in folder.rglob("*.safetensors"):
        again = tmp_path / "again" / path.relative_to(folder)
        assert path.read_bytes() == again.read_bytes()


def test_a_measurement_accounts_for_every_call(folder: Path) -> None:
    settings = Tempering(steps=4, stoptime=3, backsteps=1, rounds=1, height=64, width=64)
    found = measure("tempering", folder, settings)
    calls = {name: part.calls for name, part in found.parts.items()}
    # CLIPSeg: the prompts' text, then one picture through its tower and its decoder.
    assert calls == {"unet": 5, "vae": 2, "text_encoder": 2, "clipseg": 3}
    assert all(part.seconds >= part.median > 0 for part in found.parts.values())
    assert 0 < found.rest < 1
    assert found.peak > 10**8
