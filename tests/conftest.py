"""The bundled model, loaded once for all tests."""

from __future__ import annotations

import pytest
from diffusers import StableDiffusionPipeline

from loaders import load_clipseg, load_pipeline
from segmentation import ClipSeg


@pytest.fixture(scope="session")
def pipe() -> StableDiffusionPipeline:
    pipeline = load_pipeline("pocket", device="cpu", dtype="fp32")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def clipseg() -> ClipSeg:
    return load_clipseg("pocket", device="cpu", dtype="fp32")
