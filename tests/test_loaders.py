"""loaders.py: what is refused before anything loads, what is fetched, what gets ready."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from huggingface_hub.utils.tqdm import are_progress_bars_disabled
from loopback import Hub, ask, child, closed_url, files_of, hub, hub_environment
from safetensors.torch import load_file, save_file

import loaders
from errors import InputError, ModelError, ResourceError, memory_errors
from hub import CLIPSEG, POCKET, resolve
from kinds import STABLE_DIFFUSION
from loaders import (
    SAMPLER_NAMES,
    SCHEDULERS,
    clipseg_for,
    load_clipseg,
    load_pipeline,
    model_name,
    pick_device,
    pick_dtype,
    scheduler_name,
)

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

__all__ = ["hub"]  # a fixture is used by its name

REPOSITORY = Path(loaders.__file__).parent
PAINTER = REPOSITORY / "pocket" / "weights" / "stable-diffusion"
SEGMENTER = REPOSITORY / "pocket" / "weights" / "clipseg"
UNET = "unet/diffusion_pytorch_model.safetensors"
SCHEDULER_LIST = "euler, ddim, pndm, dpm++ 2m, heun, unipc, euler ancestral, lcm"


@pytest.fixture(scope="module")
def pocket() -> StableDiffusionPipeline:
    return load_pipeline(POCKET)


# Before anything loads.


def test_import_is_light() -> None:
    code = "import sys, loaders; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    heavy = {"torch", "diffusers", "transformers", "huggingface_hub", "numpy", "PIL", "safetensors"}
    assert heavy.isdisjoint(done.stdout.split())


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("euler", "euler"),
        ("DDIM", "ddim"),
        ("PLMS", "pndm"),
        ("dpm++2m", "dpm++ 2m"),
        ("DPM++_2M", "dpm++ 2m"),
        ("euler_a", "euler ancestral"),
        ("Euler-Ancestral", "euler ancestral"),
        ("UniPC", "unipc"),
    ],
)
def test_scheduler_spellings(text: str, name: str) -> None:
    assert scheduler_name(text) == name


def test_unknown_scheduler_is_named_with_the_known_ones() -> None:
    with pytest.raises(InputError) as raised:
        load_pipeline(POCKET, scheduler="ddpm")
    assert str(raised.value) == f"--scheduler must be one of {SCHEDULER_LIST}, got 'ddpm'"


@pytest.mark.parametrize("text", ["tpu", "cuda:99", "cpu:1", "", "CPU", "cpu:-1"])
def test_absent_device_is_named_with_the_present_ones(text: str) -> None:
    with pytest.raises(InputError) as raised:
        pick_device(text)
    present = re.fullmatch(r"--device must be present \((.*)\), got (.*)", str(raised.value))
    assert present is not None
    assert present[2] == repr(text)
    for name in present[1].split(", "):
        assert str(pick_device(name)) == name


def test_dtypes() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert pick_dtype(None, cuda) is torch.float16
    assert pick_dtype(None, cpu) in (torch.bfloat16, torch.float32)
    assert pick_dtype("bf16", cuda) is torch.bfloat16
    assert pick_dtype("fp32", cpu) is torch.float32
    with pytest.raises(InputError) as raised:
        pick_dtype("int8", cpu)
    assert str(raised.value) == "--dtype must be one of fp16, bf16, fp32, got 'int8'"
    with pytest.raises(InputError) as raised:
        load_pipeline(POCKET, device="cpu", dtype="fp16")
    assert str(raised.value) == "--dtype must be bf16 or fp32 on the cpu, got 'fp16'"


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [("avx512_bf16", torch.bfloat16), ("bf16", torch.bfloat16), ("avx2", torch.float32)],
)
def test_cpu_dtype_follows_the_hardware(
    monkeypatch: pytest.MonkeyPatch, capability: str, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {capability: True}, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    assert pick_dtype(None, torch.device("cpu")) is dtype


def test_offload_needs_a_gpu() -> None:
    with pytest.raises(InputError) as raised:
        load_pipeline(POCKET, device="cpu", offload="model")
    needs = "--offload needs a GPU, but this run is on the cpu, got 'model'"
    assert str(raised.value) == needs
    with pytest.raises(InputError) as raised:
        load_pipeline(POCKET, device="cpu", offload="disk")
    assert str(raised.value) == "--offload must be one of model, sequential, got 'disk'"


# The Hub.


def test_first_run_fetches_what_is_needed_and_the_second_nothing(hub: Hub, tmp_path: Path) -> None:
    environment = hub.environment(tmp_path / "home")
    original = tmp_path / "Mine v2.safetensors"
    save_file(single_file(), original)
    code = """
    import torch
    pipe, clipseg = load_pipeline(), load_clipseg(dtype="fp32")
    single = load_pipeline(sys.argv[1], scheduler="ddim", offline=True, dtype="fp32")
    same = load_pipeline(sys.argv[2], scheduler="ddim", dtype="fp32")
    def weights(pipe):
        modules = (pipe.unet, pipe.vae, pipe.text_encoder)
        return {f"{i} {key}": v for i, m in enumerate(modules) for key, v in m.state_dict().items()}
    one, two = weights(single), weights(same)
    answer = {
        "names": [model_name(pipe), model_name(single), model_name(same), clipseg_for(pipe)],
        "unsafe": pipe.safety_checker is None and pipe.feature_extractor is None,
        "size": clipseg.processor.image_processor.size["height"],
        "equal": one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one),
        "parameters": len(one),
    }"""
    said = child(code.strip(), environment, original, PAINTER)
    assert said["answer"] == {
        "names": [STABLE_DIFFUSION, "Mine v2.safetensors", POCKET, CLIPSEG],
        "unsafe": True,
        "size": 64,
        "equal": True,
        "parameters": said["answer"]["parameters"],
    }
    assert said["answer"]["parameters"] > 100
    assert said["notices"] == []
    advice = ("torchvision", "Loading", "deprecated", "Warning", "safety")
    assert not [word for word in advice if word in said["stderr"]]
    needed = {f"{STABLE_DIFFUSION}/{name}" for name in files_of(PAINTER)}
    needed |= {f"{CLIPSEG}/{name}" for name in files_of(SEGMENTER)}
    assert hub.downloads() == sorted(needed)

    before = len(hub.requests)
    again = ask(environment)
    assert Path(again["answer"]).is_dir()
    assert ask(environment, offline=True) == {**again, "stderr": ""}
    assert (
        ask({**environment, "HF_HUB_OFFLINE": "1"}, STABLE_DIFFUSION)["answer"] == again["answer"]
    )
    assert len(hub.requests) == before


def test_single_file_needs_the_configuration_once(tmp_path: Path) -> None:
    original = tmp_path / "mine.safetensors"
    save_file(single_file(), original)
    code = "answer = load_pipeline(sys.argv[1], offline=True)"
    said = child(code, hub_environment(closed_url(), tmp_path), original)
    assert said["answer"]["error"] == 1
    needed = (
        f"a single file needs the configuration and tokenizer of {STABLE_DIFFUSION} once (2 MB)"
    )
    assert needed in said["answer"]["text"]


# Ready models.


def test_pocket_is_ready_exact_and_named(pocket: StableDiffusionPipeline) -> None:
    assert model_name(pocket) == POCKET
    assert clipseg_for(pocket) == clipseg_for(POCKET) == POCKET
    assert clipseg_for("Mine v2.safetensors") == CLIPSEG
    assert pocket.device == pick_device()
    if pocket.device.type == "cpu":
        assert pocket.unet.dtype == pocket.vae.dtype == pocket.text_encoder.dtype == torch.float32
    assert not are_progress_bars_disabled()  # the Hub client's, which transformers' switch turns
    clipseg = load_clipseg(POCKET)
    assert clipseg.model.device == pocket.device
    assert not clipseg.model.training
    own = json.loads((SEGMENTER / "processor_config.json").read_text())["image_processor"]
    assert list(clipseg.processor.image_processor.image_mean) == own["image_mean"]
    assert clipseg.processor.image_processor.size["height"] == own["size"]["height"]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_each_scheduler_is_of_its_class_on_the_models_own_schedule(name: str) -> None:
    pipe = load_pipeline(POCKET, scheduler=name.upper())
    class_name, settings = SCHEDULERS[name]
    assert type(pipe.scheduler).__name__ == class_name
    assert name in SAMPLER_NAMES
    own = json.loads((PAINTER / "scheduler" / "scheduler_config.json").read_text())
    for key in ("beta_start", "beta_end", "beta_schedule", "prediction_type"):
        settings = {**settings, key: own[key]}
    assert {key: pipe.scheduler.config[key] for key in settings} == settings


def test_vae_of_another_folder_or_file_replaces_the_models_own(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(PAINTER / "vae", tmp_path / "vae"))
    weights = folder / "diffusion_pytorch_model.safetensors"
    bias = "decoder.conv_out.bias"
    save_file({**load_file(weights), bias: torch.full((3,), 7.0)}, weights)
    for vae in (folder, weights):
        pipe = load_pipeline(POCKET, vae=str(vae))
        assert pipe.vae.state_dict()[bias].tolist() == [7.0, 7.0, 7.0]
        assert model_name(pipe) == POCKET


def test_folder_is_called_by_its_last_name(painter: Path) -> None:
    pipe = load_pipeline(str(painter), dtype="bf16")
    assert model_name(pipe) == "painter"
    assert pipe.unet.dtype == pipe.text_encoder.dtype == torch.bfloat16
    assert resolve(str(painter)) == painter


def test_corrupt_weights_are_one_line(painter: Path) -> None:
    weights = painter / UNET
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ModelError) as raised:
        load_pipeline(str(painter))
    text = str(raised.value)
    assert text.startswith("weights of painter are corrupt or do not fit: ")
    assert text.endswith("; put a sound copy in its place")
    assert "\n" not in text


def test_weights_that_do_not_fit_are_one_line(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(SEGMENTER, tmp_path / "clipseg"))
    weights = load_file(folder / "model.safetensors")
    name = next(key for key in weights if key.endswith("visual_projection.weight"))
    save_file({**weights, name: torch.ones(1, 1)}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"^weights of clipseg are corrupt or do not fit: "):
        load_clipseg(str(folder))
    save_file({k: v for k, v in weights.items() if k != name}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"do not fit: there is no .*visual_projection"):
        load_clipseg(str(folder))


def test_corrupt_cache_is_named_to_be_deleted(tmp_path: Path) -> None:
    folder = tmp_path / "models--a--b" / "snapshots" / "c"
    shutil.copytree(SEGMENTER, folder)
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError) as raised:
        load_clipseg(str(folder))
    assert str(raised.value).startswith("weights of a/b are corrupt or do not fit: ")
    assert str(raised.value).endswith(f"; delete {tmp_path / 'models--a--b'} and run again")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("MPS backend out of memory (MPS allocated: 17 GB)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        OSError(12, "Cannot allocate memory"),
        MemoryError(),
    ],
)
def test_out_of_memory_names_the_flags_that_help(error: Exception) -> None:
    flags = r"--offload .* --dtype .* --height and --width$"
    with pytest.raises(ResourceError, match=flags), memory_errors():
        raise error


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match=r"^shapes differ$"), memory_errors():
        raise RuntimeError("shapes differ")


# The original Stable Diffusion's names, the reverse of what diffusers reads.

UNET_NAMES = {
    r"time_embedding\.linear_1": "time_embed.0",
    r"time_embedding\.linear_2": "time_embed.2",
    r"conv_in\.": "input_blocks.0.0.",
    r"conv_norm_out\.": "out.0.",
    r"conv_out\.": "out.2.",
    r"mid_block\.resnets\.0": "middle_block.0",
    r"mid_block\.attentions\.0": "middle_block.1",
    r"mid_block\.resnets\.1": "middle_block.2",
}
RESNET_NAMES = {
    r"\.norm1": ".in_layers.0",
    r"\.conv1": ".in_layers.2",
    r"\.norm2": ".out_layers.0",
    r"\.conv2": ".out_layers.3",
    r"\.time_emb_proj": ".emb_layers.1",
    r"\.conv_shortcut": ".skip_connection",
}
VAE_NAMES = {
    r"mid_block\.resnets\.0": "mid.block_1",
    r"mid_block\.resnets\.1": "mid.block_2",
    r"conv_norm_out": "norm_out",
    r"conv_shortcut": "nin_shortcut",
    r"down_blocks\.(\d)\.resnets": r"down.\1.block",
    r"down_blocks\.(\d)\.downsamplers\.0": r"down.\1.downsample",
}


def single_file() -> dict[str, torch.Tensor]:
    """The pocket's weights, named as in Stable Diffusion v1's original checkpoint."""
    unet = load_file(PAINTER / UNET)
    vae = load_file(PAINTER / "vae" / "diffusion_pytorch_model.safetensors")
    text = load_file(PAINTER / "text_encoder" / "model.safetensors")
    prefix = "cond_stage_model.transformer.text_model."
    return {
        **{f"model.diffusion_model.{unet_name(name)}": value for name, value in unet.items()},
        **{f"first_stage_model.{vae_name(name)}": value for name, value in vae.items()},
        **{prefix + name.removeprefix("text_model."): value for name, value in text.items()},
    }


def unet_name(name: str) -> str:
    layers = json.loads((PAINTER / "unet" / "config.json").read_text())["layers_per_block"]
    if block := re.match(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.?(.*)", name):
        side, number, kind, layer, rest = block.groups()
        down = side == "down"
        index = int(number) * (layers + 1) + int(layer) + int(down)
        if kind.endswith("samplers"):
            index += layers
        start = f"{'input' if down else 'output'}_blocks.{index}"
        if kind == "downsamplers":
            return rest.replace("conv", f"{start}.0.op")
        if kind == "upsamplers":
            above = f"up_blocks.{number}.attentions.0.norm.weight"
            return f"{start}.{2 if above in load_file(PAINTER / UNET) else 1}.{rest}"
        name = f"{start}.{0 if kind == 'resnets' else 1}.{rest}"
        return replaced(name, RESNET_NAMES) if kind == "resnets" else name
    name = replaced(name, {f"^{old}": new for old, new in UNET_NAMES.items()})
    return replaced(name, RESNET_NAMES) if re.match(r"middle_block\.[02]", name) else name


def vae_name(name: str) -> str:
    last = len(json.loads((PAINTER / "vae" / "config.json").read_text())["up_block_types"]) - 1
    if block := re.match(r"decoder\.up_blocks\.(\d)\.(.*)", name):
        rest = replaced(block[2], {r"resnets": "block", r"upsamplers\.0": "upsample"})
        name = f"decoder.up.{last - int(block[1])}.{rest}"
    return replaced(name, VAE_NAMES)


def replaced(name: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        name = re.sub(old, new, name)
    return name
