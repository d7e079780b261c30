"""Stable Diffusion v1-4's full architecture, with random weights, through the whole program.

5 GB of disk, 8 GB of memory and some minutes: `python -m pytest -m slow`.
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
from diffusers import StableDiffusionPipeline
from numpy.typing import NDArray
from PIL import Image

import loaders
from benchmarks.architecture import save
from families import family_of
from loaders import load_pipeline
from sampling import Sampler
from settings import Tempering

pytestmark = pytest.mark.slow

REPOSITORY = Path(loaders.__file__).parent
PROMPTS = ["a black dog", "a toy robot"]
SIDE = 256

Pixels = NDArray[np.uint8]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that holds the full models; pytest would keep its 5 GB for three runs."""
    folder = tmp_path_factory.mktemp("full") / "models"
    save(folder)
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
            assert np.asarray(image).std() > 1  # what is not finite is one colour
    assert (run / "classes.png").is_file()
    assert (run / "sheet.png").is_file()
    facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert facts["unet_calls"] == 3
    # What is not finite is null in JSON.
    for matrix in (facts["interrupted"]["class_matrix"], facts["tempered"]["class_matrix"]):
        assert np.isfinite(np.array(matrix, dtype=float)).all()


@torch.no_grad()
def test_the_plain_branch_is_diffusers_picture_to_the_bit(models: Path) -> None:
    settings = Tempering(steps=3, stoptime=3, backsteps=0, rounds=1, height=128, width=128)
    ours = plain_picture(models, settings)
    theirs = diffusers_picture(models, settings)
    assert ours.std() > 1
    np.testing.assert_array_equal(ours, theirs)


def plain_picture(models: Path, settings: Tempering) -> Pixels:
    folder = str(models / "stable-diffusion")
    # The scheduler that the model comes with.
    pipe: Any = load_pipeline(folder, scheduler="pndm", device="cpu", dtype="fp32")
    sampler = Sampler(family_of(pipe), [settings.joiner.join(PROMPTS)], settings)
    branches = sampler.start([7])
    sampler.denoise(branches, settings.steps)
    return np.asarray(sampler.decode(branches)[0])


def diffusers_picture(models: Path, settings: Tempering) -> Pixels:
    """What diffusers makes of the same folder, with nothing of this program."""
    pipe: Any = StableDiffusionPipeline.from_pretrained(models / "stable-diffusion")
    pipe.set_progress_bar_config(disable=True)
    image = pipe(
        settings.joiner.join(PROMPTS),
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        height=settings.height,
        width=settings.width,
        generator=torch.Generator().manual_seed(7),
    ).images[0]
    return np.asarray(image)
