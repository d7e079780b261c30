"""The full architectures, with random weights, through the whole program.

8 GB of disk, 12 GB of memory and half an hour: `python -m pytest -m slow`, or a model of
benchmarks/architecture.py alone, `-m slow -k xl`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from numpy.typing import NDArray
from PIL import Image

import loaders
from benchmarks.architecture import ORIGINALS, save
from benchmarks.engines import alone
from benchmarks.speed import MEMORY_GOAL, MODELS, measure, verdict
from families import family_of
from loaders import load_pipeline
from sampling import Sampler
from settings import Tempering

pytestmark = pytest.mark.slow

REPOSITORY = Path(loaders.__file__).parent
PROMPTS = ["a black dog", "a toy robot"]
SIDE = 256

Pixels = NDArray[np.uint8]


@pytest.fixture(scope="module", params=MODELS)
def models(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """The folder that holds a full model and CLIPSeg; pytest would keep its GB for three runs."""
    folder = tmp_path_factory.mktemp("full") / request.param
    save(folder, ORIGINALS[request.param])
    yield folder
    shutil.rmtree(folder)


def test_the_command_line_tempers_with_the_full_models(models: Path, tmp_path: Path) -> None:
    flags = ["--steps", "2", "--stoptime", "1", "--backsteps", "1", "--rounds", "1"]
    flags += ["--height", str(SIDE), "--width", str(SIDE)]
    flags += ["--model", str(models / "stable-diffusion"), "--clipseg", str(models / "clipseg")]
    flags += ["--output", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "main.py", "--tempered_inference", *flags],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "invalid value" not in done.stderr  # numpy, where a picture is not finite
    (run,) = tmp_path.iterdir()
    assert Path(done.stdout.splitlines()[-1]) == run
    for name in ("tempered", "interrupted"):
        with Image.open(run / f"{name}.png") as image:
            assert image.size == (SIDE, SIDE)
            assert np.asarray(image).std() > 0  # what is not finite is one colour
    assert (run / "classes.png").is_file()
    assert (run / "sheet.png").is_file()
    facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert facts["pipeline"] == ORIGINALS[models.name].pipeline
    assert facts["unet_calls"] == 3
    # What is not finite is null in JSON.
    for matrix in (facts["interrupted"]["class_matrix"], facts["tempered"]["class_matrix"]):
        assert np.isfinite(np.array(matrix, dtype=float)).all()


@torch.no_grad()
def test_the_plain_branch_is_diffusers_picture_to_the_bit(models: Path) -> None:
    """In the dtype of the files."""
    settings = Tempering(steps=3, stoptime=3, backsteps=0, rounds=1, height=128, width=128)
    ours = plain_picture(models, settings)
    theirs = diffusers_picture(models, settings)
    assert ours.std() > 1
    np.testing.assert_array_equal(ours, theirs)


def test_the_program_takes_hardly_more_memory_than_diffusers(models: Path) -> None:
    settings = Tempering(steps=2, stoptime=1, backsteps=1, rounds=1, height=512, width=512)
    variants = ("diffusers, bf16", "tempering")
    # A peak is as high as the heap happens to be full of holes: the middle one of three.
    runs = [[alone(measure, variant, models, settings) for variant in variants] for _ in range(3)]
    theirs, ours = (sorted(each, key=lambda run: run.peak)[1] for each in zip(*runs, strict=True))
    assert ours.dtype == theirs.dtype == "bfloat16"  # what a processor that has it does by itself
    assert ours.peak <= MEMORY_GOAL * theirs.peak, verdict([theirs, ours])


def plain_picture(models: Path, settings: Tempering) -> Pixels:
    original = ORIGINALS[models.name]
    # The scheduler that the model comes with.
    scheduler = "pndm" if "PNDM" in original.scheduler["_class_name"] else "euler"
    pipe: Any = load_pipeline(
        models / "stable-diffusion", scheduler=scheduler, device="cpu", dtype=original.dtype
    )
    sampler = Sampler(family_of(pipe), [settings.joiner.join(PROMPTS)], settings)
    branches = sampler.start([7])
    sampler.denoise(branches, settings.steps)
    return np.asarray(sampler.decode(branches)[0])


def diffusers_picture(models: Path, settings: Tempering) -> Pixels:
    """What diffusers makes of the same folder, with nothing of this program but the guidance."""
    original = ORIGINALS[models.name]
    options: dict[str, Any] = {"torch_dtype": getattr(torch, original.dtype)}
    if original.pipeline == "StableDiffusion3Pipeline":
        options |= {"text_encoder_3": None, "tokenizer_3": None}
    pipe: Any = DiffusionPipeline.from_pretrained(models / "stable-diffusion", **options)
    pipe.set_progress_bar_config(disable=True)
    image = pipe(
        settings.joiner.join(PROMPTS),
        num_inference_steps=settings.steps,
        guidance_scale=family_of(pipe).guidance_scale,
        height=settings.height,
        width=settings.width,
        generator=torch.Generator().manual_seed(7),
    ).images[0]
    return np.asarray(image)
