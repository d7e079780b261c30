"""The bundled model and a tiny one of each family, made once for all tests."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from safetensors.torch import save_file

from benchmarks.originals import single_file
from kinds import MODEL
from loaders import FLOW_SCHEDULERS, SCHEDULERS, load_clipseg, load_pipeline, set_scheduler
from segmentation import ClipSeg

# Every family with every scheduler that it admits; the first family is the pocket's tests' own.
FAMILY_SCHEDULERS = [
    (family, scheduler)
    for family in tiny.FAMILIES
    for scheduler in (FLOW_SCHEDULERS if family == "sd3" else SCHEDULERS)
]


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Processes that share the tests; each takes 1 GB. A slow one needs the machine for itself."""
    return min(os.cpu_count() or 1, 4) if config.option.markexpr == "not slow" else 0


def pytest_configure(config: pytest.Config) -> None:
    """A thread for each process, or they would wait for each other's; figures are comparable so."""
    if config.option.markexpr == "not slow":
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def pipe() -> StableDiffusionPipeline:
    pipeline = load_pipeline("pocket", device="cpu", dtype="fp32")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def clipseg() -> ClipSeg:
    return load_clipseg("pocket", device="cpu", dtype="fp32")


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model of each family as a folder; without T5, too."""
    parent = tmp_path_factory.mktemp("tiny")
    pipes = {**{name: tiny.shared(name) for name in tiny.FAMILIES}, "bare": tiny.shared("bare")}
    for name, pipe in pipes.items():
        pipe.save_pretrained(parent / name)
    return {name: parent / name for name in pipes}


@pytest.fixture(scope="session")
def tiny_files(tiny_folders: dict[str, Path]) -> dict[str, Path]:
    """The same as single files; of Stable Diffusion 3 also one that lacks the text encoders."""
    parent = next(iter(tiny_folders.values())).parent
    states = {name: single_file(tiny.shared(name)) for name in tiny_folders}
    states["mute"] = single_file(tiny.shared("sd3"), text_encoders=False)
    for name, state in states.items():
        save_file(state, parent / f"{name}.safetensors")
    return {name: parent / f"{name}.safetensors" for name in states}


@pytest.fixture(scope="session")
def lenders(
    tiny_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """In the Hub's cache: the models that have what single files leave out."""
    cache = tmp_path_factory.mktemp("cache")
    for family, repo in tiny.LENDERS.items():
        put_into(cache, repo, tiny_folders[family])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
        yield


def put_into(cache: Path, repo: str, source: Path) -> None:
    """A copy of a folder into the Hub's cache, as what was fetched of a repository."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    shutil.copytree(source, folder / "snapshots" / "0")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0")


@pytest.fixture(params=list(SCHEDULERS))
def any_pipe(
    request: pytest.FixtureRequest, pipe: StableDiffusionPipeline
) -> Iterator[StableDiffusionPipeline]:
    """The pipeline with each scheduler in turn."""
    yield from with_scheduler(pipe, request.param)


@pytest.fixture(params=FAMILY_SCHEDULERS, ids=" ".join)
def family_pipe(request: pytest.FixtureRequest) -> Iterator[DiffusionPipeline]:
    """A tiny pipeline of each family with each of its schedulers in turn."""
    family, scheduler = request.param
    yield from with_scheduler(tiny.shared(family), scheduler)


@pytest.fixture(params=list(tiny.FAMILIES))
def own_pipe(request: pytest.FixtureRequest) -> Iterator[DiffusionPipeline]:
    """A tiny pipeline of each family in turn, with Euler's scheduler."""
    yield from with_scheduler(tiny.shared(request.param), "euler")


def with_scheduler(pipe: Any, name: str) -> Iterator[Any]:
    before = pipe.scheduler
    set_scheduler(pipe, name)
    yield pipe
    pipe.scheduler = before


@pytest.fixture
def painter(tmp_path: Path) -> Path:
    """The bundled model's folder, copied: a test may damage it."""
    return Path(shutil.copytree(MODEL.pocket, tmp_path / "painter"))
