"""The benchmark's models are the originals in size, and run as they do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.architecture import (
    ORIGINALS,
    SEGMENTER,
    Original,
    Part,
    parameters,
    save,
    skeleton,
)
from benchmarks.speed import ANYTHING, MODELS, measure, of_diffusers, table, verdict
from benchmarks.speed import Part as Taken
from hub import check
from kinds import MODEL
from kinds import SEGMENTER as CLIPSEG
from loaders import load_clipseg, load_pipeline
from settings import Tempering

# What makes the originals small; all the rest stays as it is.
NARROW_CLIP = {
    "hidden_size": 64,
    "projection_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}
NARROW: dict[str, dict[str, dict[str, Any]]] = {
    "v1-4": {"unet": {"block_out_channels": (32, 64, 64, 64), "cross_attention_dim": 64}},
    "xl": {
        "unet": {
            "block_out_channels": (32, 64, 64),
            "attention_head_dim": (2, 4, 4),
            "cross_attention_dim": 128,
            "transformer_layers_per_block": (1, 1, 1),
            "projection_class_embeddings_input_dim": 6 * 256 + 64,
        }
    },
    "3.5-medium": {
        "transformer": {
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "joint_attention_dim": 128,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 128,
            "pos_embed_max_size": 64,
            "dual_attention_layers": (0,),
        }
    },
}
NARROW_SEGMENTER = Part(
    SEGMENTER.library,
    SEGMENTER.name,
    {
        **SEGMENTER.config,
        "projection_dim": 32,
        "text_config": {
            **SEGMENTER.config["text_config"],
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "intermediate_size": 64,
        },
        "vision_config": {
            **SEGMENTER.config["vision_config"],
            "hidden_size": 48,
            "intermediate_size": 96,
        },
    },
)


def narrow(model: str) -> Original:
    original = ORIGINALS[model]
    changes: dict[str, dict[str, Any]] = {
        "vae": {"block_out_channels": (32, 32, 32, 32)},
        **dict.fromkeys(original.text_encoders, NARROW_CLIP),
        **NARROW[model],
    }
    parts = {
        name: replace(part, config={**part.config, **changes[name]})
        for name, part in original.parts.items()
    }
    return replace(original, parts=parts)


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("narrow") / request.param
    save(folder, narrow(request.param), NARROW_SEGMENTER)
    return folder


@pytest.mark.parametrize(
    ("model", "sizes"),
    [
        ("v1-4", [859_520_964, 83_653_863, 123_060_480]),
        ("xl", [2_567_463_684, 83_653_863, 123_060_480, 694_659_840]),
        ("3.5-medium", [2_243_171_520, 83_819_683, 123_650_304, 694_659_840]),
    ],
)
def test_every_part_has_as_many_parameters_as_the_original(model: str, sizes: list[int]) -> None:
    """Of v1-4 and CLIPSeg counted in their files; of the others what is published of them."""
    parts = ORIGINALS[model].parts.values()
    assert [parameters(skeleton(part)) for part in parts] == sizes
    assert parameters(skeleton(SEGMENTER)) == 150_747_746


def test_what_is_saved_is_loaded_by_name_and_reads_text_as_the_original_does(folder: Path) -> None:
    painter, segmenter = str(folder / "stable-diffusion"), str(folder / "clipseg")
    check(painter, MODEL)
    check(segmenter, CLIPSEG)
    pipe: Any = load_pipeline(painter, device="cpu")
    assert type(pipe).__name__ == ORIGINALS[folder.name].pipeline
    clipseg = load_clipseg(segmenter, device="cpu")
    assert clipseg.processor.image_processor.size["height"] == 352
    tokenizers = [pipe.tokenizer, clipseg.processor.tokenizer]
    tokenizers += [pipe.tokenizer_2] if hasattr(pipe, "tokenizer_2") else []
    for tokenizer in tokenizers:
        assert len(tokenizer) == 49408
        ids = tokenizer("a black dog", padding="max_length").input_ids
        assert len(ids) == 77
        assert ids[0] == 49406
        assert ids[-1] == 49407
        assert tokenizer.decode(ids, skip_special_tokens=True) == "a black dog"


@pytest.mark.parametrize("folder", ["3.5-medium"], indirect=True)  # it has all there is
def test_the_weights_are_the_same_each_time(folder: Path, tmp_path: Path) -> None:
    save(tmp_path / "again", narrow(folder.name), NARROW_SEGMENTER)
    for path in folder.rglob("*.safetensors"):
        again = tmp_path / "again" / path.relative_to(folder)
        assert path.read_bytes() == again.read_bytes()


def test_a_measurement_accounts_for_every_call(folder: Path) -> None:
    settings = Tempering(
        steps=4,
        stoptime=3,
        early_look=2,
        accept=ANYTHING,
        early_accept=ANYTHING,
        height=64,
        width=64,
    )
    found = measure("tempering", folder, settings)
    calls = {name: part.calls for name, part in found.parts.items()}
    # CLIPSeg: the prompts' text, then each picture, with its mirror image, through tower and
    # decoder. XL has zeros in place of a negative prompt that was not given.
    texts = {"v1-4": 2, "xl": 2, "3.5-medium": 4}[folder.name]
    expected = {"denoiser": 4, "vae": 1, "preview": 2, "clipseg": 4, "clipseg_text": 1}
    assert calls == {**expected, "text_encoder": texts, "look": 2}
    assert found.plain > 20 * found.parts["denoiser"].median > 0
    assert found.parts["look"].seconds > found.parts["preview"].seconds
    assert found.further_look == found.parts["look"].seconds - found.parts["look"].first
    assert found.content > 1 + found.parts["look"].seconds / found.plain
    assert all(part.seconds >= part.median > 0 for part in found.parts.values())
    assert 0 < found.rest < 1
    assert found.peak > 10**8


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_diffusers_is_measured_in_the_precision_of_the_program(folder: Path, dtype: str) -> None:
    settings = Tempering(steps=2, stoptime=1, rounds=1, height=64, width=64)
    names = of_diffusers(folder.name, dtype)
    assert ("diffusers, as it comes" in names) == (folder.name == "v1-4" or dtype == "float32")
    found = [measure(name, folder, settings) for name in names]
    assert [each.dtype for each in found][-1] == dtype
    theirs = found[-1]
    assert theirs.parts["denoiser"].calls == 2 + (folder.name == "v1-4")  # PNDM's one more
    assert f"| {theirs.variant} | {dtype} |" in table(found)
    look = Taken(2, 0.5, 0.25, 0.3)
    ours = replace(theirs, variant="tempering", parts={**theirs.parts, "look": look})
    assert "1.000 times diffusers'" in verdict([*found, ours])
