"""The bundled model, loaded once for all tests."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline

from hub import MODEL
from loaders import SCHEDULERS, load_clipseg, load_pipeline, set_scheduler
from segmentation import ClipSeg


@pytest.fixture(scope="session")
def pipe() -> StableDiffusionPipeline:
    pipeline = load_pipeline("pocket", device="cpu", dtype="fp32")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def clipseg() -> ClipSeg:
    return load_clipseg("pocket", device="cpu", dtype="fp32")


@pytest.fixture(params=list(SCHEDULERS))
def any_pipe(
    request: pytest.FixtureRequest, pipe: StableDiffusionPipeline
) -> Iterator[StableDiffusionPipeline]:
    """The pipeline with each scheduler in turn."""
    before = pipe.scheduler
    set_scheduler(pipe, request.param)
    yield pipe
    pipe.scheduler = before


@pytest.fixture
def painter(tmp_path: Path) -> Path:
    """The bundled model's folder, copied: a test may damage it."""
    return Path(shutil.copytree(MODEL.pocket, tmp_path / "painter"))
