"""Other engines: OpenVINO paints what torch paints, and its cache is never trusted blindly."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline
from pictures import farthest
from safetensors.torch import save_file
from torch import Tensor

import backends
import loaders
from errors import InputError
from families import family_of
from loaders import add_loras, load_clipseg, load_pipeline
from loras import locate
from main import main
from segmentation import ClipSeg
from tempering import Painter, Tempering

PROMPTS = ["a black dog", "a toy robot"]
CLIPSEGS = ("CLIPSeg", "CLIPSeg's decoder")
FEW = Tempering(steps=4, stoptime=3, backsteps=2, rounds=1)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of converted networks."""
    pytest.importorskip("openvino")
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    return backends.cache_folder()


@pytest.fixture
def notices() -> list[str]:
    return []


def converted(pipe: Any, notices: list[str]) -> Any:
    pipe.set_progress_bar_config(disable=True)
    backends.convert_pipeline(pipe, notices.append)
    return pipe


def painted(pipe: Any, clipseg: ClipSeg, settings: Tempering, seeds: list[int]) -> list[Any]:
    painter = Painter(pipe, clipseg, [PROMPTS] * len(seeds), settings)
    return painter.temper(seeds, compare=True)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_paints_the_same_in_every_size_and_number(
    family: str, clipseg: ClipSeg, notices: list[str]
) -> None:
    """In float32 it differs by the order of additions alone."""
    theirs, ours = tiny.FAMILIES[family](), tiny.FAMILIES[family]()
    for pipe in (theirs, ours):
        pipe.taesd = tiny.taesd(pipe.vae.config.latent_channels)
    converted(ours, notices)
    # The second size is not the one that was traced, and not square.
    for (height, width), seeds in (((32, 32), [3]), ((32, 48), [3, 4])):
        settings = replace(FEW, height=height, width=width)
        both = [painted(pipe, clipseg, settings, seeds) for pipe in (theirs, ours)]
        for by_torch, by_openvino in zip(*both, strict=True):
            assert farthest(by_openvino.plain, by_torch.plain) <= 1
            assert farthest(by_openvino.interrupted.image, by_torch.interrupted.image) <= 1
    assert len(notices) == 3


def test_clipseg_sees_the_same(
    pipe: StableDiffusionPipeline, clipseg: ClipSeg, notices: list[str]
) -> None:
    ours = load_clipseg("pocket", dtype="fp32", backend="openvino", notice=notices.append)
    views = [painted(pipe, each, FEW, [3, 4]) for each in (clipseg, ours)]
    for by_torch, by_openvino in zip(*views, strict=True):
        torch.testing.assert_close(
            by_openvino.probabilities, by_torch.probabilities, atol=5e-3, rtol=0
        )
    assert notices == [f"converting {what} for OpenVINO, once" for what in CLIPSEGS]


@torch.no_grad()
def test_weights_that_lie_in_another_order_are_the_same(notices: list[str]) -> None:
    decoder = tiny.taesd().decoder.to(torch.bfloat16)
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    expected = decoder.float()(latents)
    coarse = decoder.to(torch.bfloat16).to(memory_format=torch.channels_last)
    by_openvino = backends.Decoder("the tiny decoder", coarse, torch.bfloat16, notices.append)
    found = by_openvino(latents.bfloat16()).float()
    assert (found - expected).norm() < 0.05 * expected.norm()


@torch.no_grad()
def test_bfloat16_is_no_coarser_than_torchs(
    pipe: StableDiffusionPipeline, notices: list[str]
) -> None:
    rng = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 16, 16, generator=rng)
    text = family_of(pipe).encode(PROMPTS, "", 1)[0]["encoder_hidden_states"]

    def predicted(unet: Any) -> Tensor:
        given = {"timestep": torch.tensor(500.0), "encoder_hidden_states": text.to(unet.dtype)}
        return unet(latents.to(unet.dtype), **given, return_dict=False)[0].float()

    exact = predicted(pipe.unet)
    coarse = load_pipeline("pocket", device="cpu", dtype="bf16")
    rounding = (predicted(coarse.unet) - exact).norm()
    ours = predicted(converted(coarse, notices).unet)
    assert 0 < (ours - exact).norm() < 1.5 * rounding
    assert coarse.unet.dtype is torch.bfloat16


@torch.no_grad()
def prediction(pipe: Any, number: int = 1) -> Tensor:
    """What the denoiser says of so many pictures."""
    family = family_of(pipe)
    latents = torch.randn(number, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    text = family.encode(["a cat"] * number, "", 1)[0]
    return family.predict(latents, torch.tensor(500), text)


def predict(pipe: Any, notices: list[str]) -> Tensor:
    """The same of one picture by OpenVINO."""
    return prediction(converted(pipe, notices))


def test_a_network_is_converted_once_and_again_where_the_cache_is_damaged(
    cache: Path, notices: list[str]
) -> None:
    told = "converting the denoiser for OpenVINO, once"
    first = predict(tiny.stable_diffusion_1(), notices)
    assert notices == [told]
    (folder,) = cache.iterdir()  # nothing unfinished is left
    assert torch.equal(predict(tiny.stable_diffusion_1(), notices), first)
    assert notices == [told]
    for name in ("network.bin", "network.xml", "digests.json"):
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)
        assert torch.equal(predict(tiny.stable_diffusion_1(), notices), first)
        (folder / name).unlink()
        assert torch.equal(predict(tiny.stable_diffusion_1(), notices), first)
    assert notices == [told] * 7
    assert list(cache.iterdir()) == [folder]


def test_what_changes_the_weights_changes_what_is_taken_from_the_cache(
    cache: Path, notices: list[str], tmp_path: Path
) -> None:
    plain = predict(tiny.stable_diffusion_1(), notices)
    file = tmp_path / "style.safetensors"
    save_file(tiny.lora(tiny.stable_diffusion_1()), file)
    found = []
    for weight in (0.5, 1.0):
        theirs, ours = tiny.stable_diffusion_1(), tiny.stable_diffusion_1()
        for pipe in (theirs, ours):
            add_loras(pipe, [locate(f"{file}:{weight}", offline=True)])
        found.append(predict(ours, notices))
        torch.testing.assert_close(found[-1], prediction(theirs), atol=1e-4, rtol=1e-3)
    assert not torch.allclose(found[0], found[1], atol=1e-2)
    assert not torch.allclose(found[0], plain, atol=1e-2)
    assert len(list(cache.iterdir())) == 3


def test_a_cache_that_can_not_be_written_is_told_and_done_without(
    cache: Path, notices: list[str]
) -> None:
    cache.parent.mkdir()
    cache.write_text("in the way")
    predict(tiny.stable_diffusion_1(), notices)
    assert len(notices) == 2
    assert notices[1].startswith(f"it is not kept in {cache}: ")


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (("--backend", "tensorrt"), "argument --backend: invalid choice: 'tensorrt'"),
        (("--backend", "openvino", "--compile"), "--compile is for --backend torch, got openvino"),
    ],
)
def test_what_does_not_go_together_is_one_line(
    words: tuple[str, ...], fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--tempered_inference", *words]) == 2
    line = capsys.readouterr().err
    assert fault in line
    assert line.count("\n") == 1


@pytest.mark.slow  # a minute of compiling
def test_a_compiled_denoiser_predicts_the_same_for_every_number_of_pictures() -> None:
    eager, compiled = tiny.stable_diffusion_1(), tiny.stable_diffusion_1()
    backends.compile_pipeline(compiled)
    for number in (1, 2, 3):
        found, expected = (prediction(pipe, number) for pipe in (compiled, eager))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_compiling_on_a_cpu_needs_a_compiler(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    words = ["--tempered_inference", "--model", "pocket", "--device", "cpu", "--compile"]
    assert main(words) == 2
    assert capsys.readouterr().err == (
        "error: --compile needs a C++ compiler, which the environment variable CXX can name, "
        "got 'no-such-compiler', which is not there\n"
    )


def test_openvino_is_for_cpus() -> None:
    with pytest.raises(InputError) as raised:
        loaders.check_backend("openvino", torch.device("cuda"))
    assert str(raised.value) == "--backend openvino needs --device cpu, got 'cuda'"


def test_where_it_is_missing_the_file_that_brings_it_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loaders, "find_spec", lambda name: None)
    assert main(["--tempered_inference", "--backend", "openvino"]) == 2
    said = capsys.readouterr().err
    assert said == (
        "error: --backend openvino needs OpenVINO, which is not installed: "
        f"{sys.executable} -m pip install -r requirements-openvino.txt\n"
    )
    assert (Path(loaders.__file__).parent / "requirements-openvino.txt").exists()
