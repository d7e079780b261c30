"""loaders.py: what is refused before anything loads, what is fetched, what gets ready."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import pytest
import tiny
import torch
from conftest import put_into
from diffusers import EDMDPMSolverMultistepScheduler
from huggingface_hub.utils.tqdm import are_progress_bars_disabled
from loopback import Hub, ask, child, files_of, hub
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPSegForImageSegmentation

import loaders
from benchmarks.originals import single_file
from errors import InputError, ModelError, ResourceError, TemperingError, memory_errors
from families import networks_of
from hub import CLIPSEG, POCKET, check, resolve
from kinds import MODEL, STABLE_DIFFUSION
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
    scheduler_of,
    set_scheduler,
)
from segmentation import embed_prompts, segment

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

__all__ = ["hub"]  # a fixture is used by its name

REPOSITORY = Path(loaders.__file__).parent
PAINTER = REPOSITORY / "pocket" / "weights" / "stable-diffusion"
SEGMENTER = REPOSITORY / "pocket" / "weights" / "clipseg"
UNET = "unet/diffusion_pytorch_model.safetensors"
Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors], Tensors]
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


def test_first_run_fetches_what_is_needed_and_the_second_nothing(
    hub: Hub, pocket: StableDiffusionPipeline, tmp_path: Path
) -> None:
    environment = hub.environment(tmp_path / "home")
    original = tmp_path / "Mine v2.safetensors"
    save_file(single_file(pocket), original)
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


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The Hub's cache, empty."""
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    return folder


def test_single_file_needs_the_configuration_once(
    pocket: StableDiffusionPipeline, cache: Path, tmp_path: Path
) -> None:
    original = tmp_path / "mine.safetensors"
    save_file(single_file(pocket), original)
    with pytest.raises(TemperingError) as raised:
        load_pipeline(original, offline=True)
    needed = (
        f"a single file needs the configuration and tokenizer of {STABLE_DIFFUSION} once (2 MB)"
    )
    assert needed in str(raised.value)
    assert raised.value.exit_code == 1


@pytest.mark.parametrize(
    ("part", "prefix"), [("unet", "model.diffusion_model."), ("vae", "first_stage_model.")]
)
def test_a_single_file_with_gaps_names_the_part_that_has_them(
    part: str, prefix: str, pocket: StableDiffusionPipeline, cache: Path, tmp_path: Path
) -> None:
    put_into(cache, STABLE_DIFFUSION, PAINTER)
    whole = single_file(pocket)
    gone = [name for name in sorted(whole) if name.startswith(prefix)][5]
    original = tmp_path / "mine.safetensors"
    save_file(without([gone])(whole), original)
    with pytest.raises(ModelError) as raised:
        load_pipeline(original, offline=True)
    text = str(raised.value)
    assert text.startswith("weights of mine.safetensors are corrupt or do not fit: ")
    assert f": 1 tensors of the {part} are missing" in text
    if part == "vae":
        with pytest.raises(ModelError, match="1 tensors of the vae are missing"):
            load_pipeline(POCKET, vae=original)


# Families, each as a folder and as a single file.


@pytest.mark.parametrize("family", [*tiny.FAMILIES, "bare"])
def test_folder_and_single_file_of_every_family_hold_the_same(
    family: str, tiny_folders: dict[str, Path], tiny_files: dict[str, Path], lenders: None
) -> None:
    expected = tiny.shared(family)
    for source in (tiny_folders[family], tiny_files[family]):
        found = load_pipeline(source, device="cpu", dtype="fp32", offline=True)
        assert type(found) is type(expected)
        assert_same_weights(found, expected)
        assert model_name(found) == source.name
    assert len(networks_of(expected)) == {"sd2": 3, "sdxl": 4, "sd3": 5, "bare": 4}[family]


def test_t5_is_left_out_by_choice(
    tiny_folders: dict[str, Path], tiny_files: dict[str, Path], lenders: None
) -> None:
    for source in (tiny_folders["sd3"], tiny_files["sd3"]):
        found = load_pipeline(source, t5=False, device="cpu", dtype="fp32", offline=True)
        assert found.tokenizer_3 is None
        assert_same_weights(found, tiny.shared("bare"))


def test_t5_is_left_out_where_its_folder_was_deleted(
    tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_folders["sd3"], tmp_path / "sd3"))
    for part in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(folder / part)
    found = load_pipeline(folder, device="cpu", dtype="fp32")
    assert_same_weights(found, tiny.shared("bare"))


def test_a_single_file_without_text_encoders_borrows_the_clips(
    tiny_files: dict[str, Path], lenders: None
) -> None:
    found = load_pipeline(tiny_files["mute"], device="cpu", dtype="fp32", offline=True)
    assert_same_weights(found, tiny.shared("bare"))


def test_the_schedule_of_a_single_file_is_its_lenders_unless_it_says_otherwise(
    tiny_files: dict[str, Path], tmp_path: Path, lenders: None
) -> None:
    def schedule(file: Path, **options: Any) -> dict[str, Any]:
        return dict(load_pipeline(file, device="cpu", offline=True, **options).scheduler.config)

    assert schedule(tiny_files["sd2"])["prediction_type"] == "v_prediction"
    of_512 = schedule(tiny_files["sd2"], prediction_type="epsilon")
    assert of_512["prediction_type"] == "epsilon"
    assert schedule(tiny_files["sd3"])["shift"] == 3.0
    predicts_v = tmp_path / "v.safetensors"
    markers = {name: torch.ones(1) for name in ("v_pred", "ztsnr")}
    save_file({**load_file(tiny_files["sdxl"]), **markers}, predicts_v)
    plain, told = schedule(tiny_files["sdxl"]), schedule(predicts_v)
    names = ("prediction_type", "rescale_betas_zero_snr", "timestep_spacing")
    assert [plain[name] for name in names] == ["epsilon", False, "leading"]
    assert [told[name] for name in names] == ["v_prediction", True, "trailing"]


def assert_same_weights(found: Any, expected: Any) -> None:
    ours, theirs = networks_of(found), networks_of(expected)
    assert ours.keys() == theirs.keys()
    for name, network in theirs.items():
        assert not ours[name].training  # or dropout would read another prompt each time
        state = ours[name].state_dict()
        assert state.keys() == network.state_dict().keys()
        for key, value in network.state_dict().items():
            assert torch.equal(state[key], value), f"{name} {key}"


@pytest.mark.parametrize(
    ("family", "scheduler", "found"),
    [
        ("sdxl", None, "EulerDiscreteScheduler"),
        ("sd3", None, "FlowMatchEulerDiscreteScheduler"),
        ("sd3", "DPM++ 2M", "DPMSolverMultistepScheduler"),
        ("sd3", "heun", "FlowMatchHeunDiscreteScheduler"),
        ("sd3", "unipc", "UniPCMultistepScheduler"),
    ],
)
def test_the_schedulers_of_a_family_know_its_schedule(
    family: str, scheduler: str | None, found: str, tiny_folders: dict[str, Path]
) -> None:
    pipe = load_pipeline(tiny_folders[family], scheduler=scheduler, device="cpu")
    assert type(pipe.scheduler).__name__ == found
    assert scheduler_of(pipe) == scheduler_name(scheduler or "euler")
    config = dict(pipe.scheduler.config)
    if family == "sd3":
        assert 3.0 in (config.get("shift"), config.get("flow_shift"))
        set_scheduler(pipe, "euler")  # and back: the shift is not lost on the way
        assert pipe.scheduler.config.shift == 3.0


def test_a_model_that_was_distilled_to_lcm_has_its_scheduler(tmp_path: Path) -> None:
    tiny.latent_consistency().save_pretrained(tmp_path / "lcm")
    index = tmp_path / "lcm" / "model_index.json"
    named = {**json.loads(index.read_text()), "_class_name": "LatentConsistencyModelPipeline"}
    index.write_text(json.dumps(named))
    pipe = load_pipeline(tmp_path / "lcm", device="cpu")
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    assert scheduler_of(pipe) == "lcm"
    assert scheduler_of(load_pipeline(tmp_path / "lcm", scheduler="ddim", device="cpu")) == "ddim"


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (
            {"scheduler": "pndm"},
            "--scheduler must be one of euler, dpm++ 2m, heun, unipc with Stable Diffusion 3, "
            "got 'pndm'",
        ),
        (
            {"sizes": (None, 520)},
            "sizes must be multiples of 16 pixels with Stable Diffusion 3, got 520",
        ),
        (
            {"prediction_type": "epsilon"},
            "--prediction_type must not be given with Stable Diffusion 3, got 'epsilon'",
        ),
        (
            {"prediction_type": "noise"},
            "--prediction_type must be one of epsilon, v_prediction, got 'noise'",
        ),
    ],
)
def test_what_a_family_does_not_admit_is_refused_before_it_loads(
    options: dict[str, Any], fault: str, tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_folders["bare"], tmp_path / "sd3"))
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"not weights")
    with pytest.raises(InputError) as raised:
        load_pipeline(folder, **options)
    assert str(raised.value) == fault


def test_a_model_on_edms_schedule_is_refused(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folders["sdxl"], tmp_path / "playground"))
    EDMDPMSolverMultistepScheduler().save_pretrained(folder / "scheduler")
    with pytest.raises(InputError, match=r"'.*playground' is a model on EDM's schedule, not "):
        check(str(folder), MODEL)


@pytest.mark.parametrize(
    ("family", "part", "setting", "value", "fault"),
    [
        ("sdxl", "text_encoder_2", "projection_dim", 32, "width of size and pooled text must be"),
        ("sd3", "text_encoder_3", "d_model", 48, "width of T5's output must be 96, got 48"),
        ("sd3", "text_encoder_2", "projection_dim", 32, "width of the pooled text must be 96"),
    ],
)
def test_parts_that_do_not_meet_are_one_line(
    family: str,
    part: str,
    setting: str,
    value: int,
    fault: str,
    tiny_folders: dict[str, Path],
    tmp_path: Path,
) -> None:
    folder = Path(shutil.copytree(tiny_folders[family], tmp_path / family))
    network = getattr(tiny.shared(family), part)
    config = type(network.config).from_dict({**network.config.to_dict(), setting: value})
    type(network)(config).save_pretrained(folder / part)
    with pytest.raises(ModelError, match=rf"^weights of {family} are corrupt .*{fault}"):
        load_pipeline(folder, device="cpu")


@pytest.mark.parametrize(("family", "dtype"), [("sdxl", "float16"), ("sd3", "bfloat16")])
def test_the_dtype_of_a_gpu_is_the_familys(family: str, dtype: str) -> None:
    gpu = torch.device("cuda")
    found = loaders._precision(Path("x"), None, gpu, on_flows=family == "sd3")
    assert found is getattr(torch, dtype)
    assert loaders._precision(Path("x"), "fp32", gpu, on_flows=True) is torch.float32


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


@pytest.mark.parametrize("preview", ["taesd", "taesd-half"])
def test_a_tiny_decoder_that_the_pocket_has_not_is_refused(preview: str) -> None:
    with pytest.raises(InputError) as raised:
        load_pipeline(POCKET, preview=preview)
    text = f"--preview {preview} must not be given with the pocket; what works without it: "
    assert str(raised.value) == text + "--preview vae, half or linear"


def test_clipsegs_layers_that_no_mask_comes_from_are_left_out(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(SEGMENTER, tmp_path / "clipseg"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"extract_layers": [0, 1, 3]}))
    whole = CLIPSegForImageSegmentation.from_pretrained(folder).eval()
    loaded = load_clipseg(folder, device="cpu", dtype="fp32")
    spared = config["vision_config"]["num_hidden_layers"] - 4
    assert spared > 0
    layers = [len(each.clip.vision_model.encoder.layers) for each in (whole, loaded.model)]
    assert layers[0] - layers[1] == spared
    images = [Image.effect_noise((64, 64), 90).convert("RGB")]
    embeddings = embed_prompts(loaded, ["a dog", "a robot"])[None]
    found = segment(loaded, images, embeddings)
    assert torch.equal(found, segment(replace(loaded, model=whole), images, embeddings))


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


def test_libraries_that_do_not_import_are_no_fault_of_the_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(name: str) -> None:
        raise RuntimeError(f"Failed to import {name}")

    monkeypatch.setattr(loaders, "import_module", broken)
    with pytest.raises(TemperingError, match=r"^the libraries of this Python can not be imported"):
        load_clipseg(str(SEGMENTER))


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


PARTS = {
    "text_encoder": "text_encoder/model.safetensors",
    "unet": UNET,
    "vae": "vae/diffusion_pytorch_model.safetensors",
}


def without(names: Sequence[str]) -> Change:
    return lambda tensors: {name: tensors[name] for name in tensors.keys() - set(names)}


def of_another_shape(names: Sequence[str]) -> Change:
    return lambda tensors: {**tensors, **{name: torch.ones(2, 3, 5) for name in names}}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (without, "tensors of the {} are missing"),
        (of_another_shape, "tensors of the {} have anoth"),
    ],
)
@pytest.mark.parametrize("every", [2, 10**9], ids=["half", "one"])
def test_a_part_that_is_not_whole_is_named_and_its_gaps_are_counted(
    painter: Path, part: str, change: Callable[[Sequence[str]], Change], fault: str, every: int
) -> None:
    tensors = load_file(painter / PARTS[part])
    names = sorted(tensors)[::every]
    save_file(change(names)(tensors), painter / PARTS[part], metadata={"format": "pt"})
    with pytest.raises(ModelError) as raised:
        load_pipeline(str(painter))
    text = str(raised.value)
    assert text.startswith("weights of painter are corrupt or do not fit: ")
    assert f"{len(names)} {fault.format(part)}" in text
    assert "\n" not in text


def test_a_vae_that_is_not_whole_is_named(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(PAINTER / "vae", tmp_path / "other vae"))
    weights = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    save_file(without(sorted(tensors)[::3])(tensors), weights)
    with pytest.raises(
        ModelError, match=r"^weights of other vae .* tensors of the vae are missing"
    ):
        load_pipeline(POCKET, vae=str(folder))


def test_a_vae_of_another_family_is_refused_before_weights_load(
    tiny_folders: dict[str, Path], tiny_files: dict[str, Path], painter: Path
) -> None:
    (painter / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    of_3 = tiny_folders["sd3"] / "vae"
    for vae in (of_3, tiny_files["sd3"]):
        with pytest.raises(InputError) as raised:
            load_pipeline(painter, vae=vae)
        fault = f"but {str(vae)!r} takes 16"
        assert str(raised.value) == f"--vae must take latents of 4 channels, {fault}"


@pytest.mark.parametrize(
    ("part", "changed", "fault"),
    [
        ("unet", {"out_channels": 8}, "channels that the denoiser gives must be 4, got 8"),
        ("vae", {"latent_channels": 8}, "channels of the VAE's latents must be 4, got 8"),
        ("unet", {"cross_attention_dim": 48}, "width of the text encoder's output must be 48, got"),
        ("vae", {"out_channels": 1}, "channels of the VAE's pictures must be 3, got 1"),
    ],
    ids=str,
)
def test_parts_that_were_not_made_for_each_other_are_named(
    painter: Path, part: str, changed: dict[str, int], fault: str
) -> None:
    cls: Any = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}[part]
    cls.from_config({**cls.load_config(painter / part), **changed}).save_pretrained(painter / part)
    with pytest.raises(ModelError, match=re.escape(fault)):
        load_pipeline(str(painter))


def test_a_vocabulary_that_the_text_encoder_does_not_know_is_named(painter: Path) -> None:
    path = painter / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"]["vocab"]["zzzz"] = 99_999
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ModelError, match=r"the tokenizer has \d+ words, the text encoder \d+"):
        load_pipeline(str(painter))


@pytest.mark.parametrize("content", ["", "[]", '{"hidden_size": "wide"}', '{"hidden_size": 0}'])
def test_a_configuration_that_no_library_likes_is_one_line(painter: Path, content: str) -> None:
    (painter / "text_encoder" / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(ModelError, match=r"^weights of painter are corrupt or do not fit: "):
        load_pipeline(str(painter))


def test_a_model_that_fails_leaves_torch_as_it_was(painter: Path) -> None:
    config = painter / "unet" / "config.json"
    content = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({**content, "norm_num_groups": 7}), encoding="utf-8")
    with pytest.raises(ModelError):
        load_pipeline(str(painter), dtype="bf16", device="cpu")
    assert torch.get_default_dtype() is torch.float32


# What the ecosystem writes.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_dtype_has_torchs_names_too(dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    for spelling in (dtype, str(dtype), name, loaders.DTYPE_NAMES[name]):
        assert pick_dtype(spelling, torch.device("cuda")) is dtype


def test_what_torch_and_pathlib_write_is_taken() -> None:
    given: Any = {"dtype": torch.bfloat16, "device": torch.device("cpu")}
    pipe = load_pipeline(PAINTER, vae=PAINTER / "vae", **given)
    assert (pipe.unet.dtype, pipe.device.type) == (torch.bfloat16, "cpu")
    assert load_clipseg(SEGMENTER, **given).model.dtype is torch.bfloat16
    with pytest.raises(InputError, match=r"--dtype must be bf16 or fp32 on the cpu, got 'fp16'"):
        load_pipeline(POCKET, dtype=torch.float16, device="cpu")
    with pytest.raises(InputError, match=r"--dtype must be one of .*, got 'float64'"):
        load_pipeline(POCKET, dtype=torch.float64)


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
