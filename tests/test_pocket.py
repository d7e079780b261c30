"""The bundled model: it loads as any diffusers folder does, knows its words, and draws."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open

from benchmarks.prompts import benchmark
from pocket.world import (
    COLOURS,
    JOINERS,
    SUBJECTS,
    Noun,
    caption,
    parse,
    seen_pairs,
)

WEIGHTS = Path(__file__).parent.parent / "pocket" / "weights"


def benchmark_prompts() -> list[str]:
    return [prompt.text for subset in benchmark().values() for prompt in subset]


def test_the_benchmark_has_its_276_prompts() -> None:
    sizes = {name: len(prompts) for name, prompts in benchmark().items()}
    assert sizes == {"animal_animal": 66, "animal_object": 144, "object_object": 66}
    assert len(set(benchmark_prompts())) == 276
    assert "a cat and a elephant" in benchmark_prompts()
    assert "a horse with a crown" in benchmark_prompts()


def test_it_is_stable_diffusions_classes_with_its_schedule(pipe: StableDiffusionPipeline) -> None:
    names = {name: type(part).__name__ for name, part in pipe.components.items() if part}
    assert (
        names.items()
        >= {
            "unet": "UNet2DConditionModel",
            "vae": "AutoencoderKL",
            "text_encoder": "CLIPTextModel",
            "tokenizer": "CLIPTokenizer",
        }.items()
    )
    config = pipe.scheduler.config
    assert (config.beta_schedule, config.beta_start, config.beta_end) == (
        "scaled_linear",
        0.00085,
        0.012,
    )
    assert (config.num_train_timesteps, config.prediction_type) == (1000, "epsilon")
    assert pipe.safety_checker is None
    assert pipe.unet.config.sample_size * pipe.vae_scale_factor == 64


def test_the_weights_are_fp16_safetensors_of_at_most_40_mb() -> None:
    files = list(WEIGHTS.rglob("*.safetensors"))
    assert len(files) == 4
    assert sum(file.stat().st_size for file in WEIGHTS.rglob("*")) <= 40e6
    for file in files:
        with safe_open(file, "pt") as weights:
            kinds = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
        assert "F32" not in kinds, file
        assert "F16" in kinds, file


def test_diffusers_loads_it_without_us() -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(
        str(WEIGHTS / "stable-diffusion"), local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a black dog", num_inference_steps=2).images[0]
    assert image.size == (64, 64)


def test_every_word_of_the_benchmark_is_one_token(pipe: StableDiffusionPipeline) -> None:
    for prompt in benchmark_prompts():
        ids = pipe.tokenizer(prompt).input_ids
        assert len(ids) == len(prompt.split()) + 2, prompt


def test_prompts_of_the_benchmark_are_drawn(pipe: StableDiffusionPipeline) -> None:
    prompts = benchmark_prompts()
    for start in range(0, len(prompts), 64):
        batch = prompts[start : start + 64]
        images = pipe(batch, num_inference_steps=1, output_type="np").images
        assert images.shape == (len(batch), 64, 64, 3)
        assert np.isfinite(images).all()


def test_a_seed_gives_the_same_picture_twice_and_another_seed_another(
    pipe: StableDiffusionPipeline,
) -> None:
    def draw(seed: int) -> bytes:
        rng = torch.Generator().manual_seed(seed)
        return pipe("a black dog", num_inference_steps=5, generator=rng).images[0].tobytes()

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_unknown_words_fall_apart_into_bytes(pipe: StableDiffusionPipeline) -> None:
    tokenizer = pipe.tokenizer
    for text in ("a zebra", "un perro ñandú", "42 % 龍 🐉", "", "DOGS!"):
        ids = tokenizer(text, truncation=True).input_ids
        assert ids[0] == tokenizer.bos_token_id
        assert ids[-1] == tokenizer.eos_token_id
        assert max(ids) < len(tokenizer)
    assert tokenizer.tokenize("zebra") == ["z", "e", "br", "a</w>"]  # as in "brown"
    assert tokenizer.tokenize("A Black DOG") == ["a</w>", "black</w>", "dog</w>"]


def test_the_fast_and_the_slow_tokenizer_files_agree() -> None:
    folder = WEIGHTS / "stable-diffusion" / "tokenizer"
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    assert json.loads((folder / "vocab.json").read_text(encoding="utf-8")) == model["vocab"]
    merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    assert [line.split(" ") for line in merges] == [list(merge) for merge in model["merges"]]


@pytest.mark.parametrize("subject", SUBJECTS)
def test_phrases_are_read_back(subject: str) -> None:
    for colour in (None, *COLOURS):
        noun = Noun(subject, colour)
        assert parse(noun.phrase()) == noun
        assert parse(noun.phrase("a")) == noun


@pytest.mark.parametrize("prompt", ["", "dog", "a zebra", "a crimson dog", "a red dog and a cat"])
def test_what_is_no_phrase_of_this_world_is_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match="pocket model's world"):
        parse(prompt)


def test_captions_use_every_joiner_and_both_articles() -> None:
    draw = random.Random(0)
    nouns = [Noun("elephant"), Noun("apple", "orange")]
    captions = {caption(nouns, draw) for _ in range(200)}
    for joiner in JOINERS:
        assert f"an elephant{joiner}an orange apple" in captions
        assert f"a elephant{joiner}an orange apple" in captions


def test_a_quarter_of_all_pairs_is_seen_in_training() -> None:
    pairs = seen_pairs()
    assert len(SUBJECTS) == 25
    assert len(pairs) == 300 // 4
    assert all(len(pair) == 2 for pair in pairs)
    assert seen_pairs() == pairs
