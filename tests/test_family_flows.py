"""Both flows from end to end on a tiny model of each family: from its folder, and from one file."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from calls import Done, call
from diffusers import DiffusionPipeline, LatentConsistencyModelPipeline
from safetensors.torch import save_file
from test_flows import MEASURE, PAINT, PROMPT, REPOSITORY, assert_same_bytes, parameters, pixels
from test_main import PROBE

from loras import locate

FEW = ("--steps", "4", "--rounds", "1", "--seed", "3", "--clipseg", "pocket", "--offline")
ON_CPU = ("--device", "cpu", "--dtype", "fp32")
PICTURES = ("plain.png", "tempered.png", "interrupted.png", "classes.png", "sheet.png")


def paint(model: Path, output: Path, *words: str) -> Done:
    flags = ("--model", str(model), "--output", str(output), *FEW, *ON_CPU)
    done = call(PAINT, *flags, "--compare", *words)
    assert (done.code, done.err) == (0, "")
    return done


def own_picture(pipe: Any, **options: Any) -> np.ndarray[Any, Any]:
    """What diffusers makes of the same folder, with nothing of this program."""
    pipe.set_progress_bar_config(disable=True)
    rng = torch.Generator().manual_seed(3)
    image = pipe(PROMPT, num_inference_steps=4, generator=rng, **options).images[0]
    return np.asarray(image, dtype=int)


@pytest.mark.parametrize(
    ("family", "pipeline", "scheduler", "guidance", "size"),
    [
        ("sd2", "StableDiffusionPipeline", "PNDMScheduler", 7.5, "32x32"),
        ("sdxl", "StableDiffusionXLPipeline", "EulerDiscreteScheduler", 5.0, "48x32"),
        ("sd3", "StableDiffusion3Pipeline", "FlowMatchEulerDiscreteScheduler", 4.5, "48x32"),
        ("bare", "StableDiffusion3Pipeline", "FlowMatchEulerDiscreteScheduler", 4.5, "32x32"),
    ],
)
def test_a_familys_folder_paints_and_its_file_measures_the_same(
    family: str,
    pipeline: str,
    scheduler: str,
    guidance: float,
    size: str,
    tiny_folders: dict[str, Path],
    tiny_files: dict[str, Path],
    lenders: None,
    tmp_path: Path,
) -> None:
    width, height = map(int, size.split("x"))
    shape = ("--width", str(width), "--height", str(height), "--negative_prompt", "a cat")
    model = tiny_folders[family]
    painted = paint(model, tmp_path, *shape, "--scheduler", "pndm" if family == "sd2" else "euler")
    run = painted.run
    assert (run["pipeline"], run["scheduler"]) == (pipeline, scheduler)
    assert run["arguments"]["guidance_scale"] == guidance
    assert len(run["text_encoders"]) == {"sd2": 1, "sdxl": 2, "sd3": 3, "bare": 2}[family]
    text = parameters(painted.folder / "tempered.png")
    assert f"CFG scale: {guidance:g}, Seed: 3, Size: {size}, Model: {family}," in text

    bare = {"text_encoder_3": None, "tokenizer_3": None} if family == "bare" else {}
    own = DiffusionPipeline.from_pretrained(model, **bare)
    wanted = {"negative_prompt": "a cat", "width": width, "height": height}
    plain = own_picture(own, guidance_scale=guidance, **wanted)
    np.testing.assert_array_equal(pixels(painted.folder / "plain.png"), plain)
    assert np.abs(pixels(painted.folder / "tempered.png") - plain).max() > 1

    again = call(PAINT, "--repeat", str(painted.folder / "run.json"), "--output", str(tmp_path))
    assert again.code == 0
    assert_same_bytes(again.folder, painted.folder, PICTURES)

    measured = call(
        *(MEASURE, "--repeat", str(painted.folder / "run.json"), "--cycles", "1"),
        *("--model", str(tiny_files[family]), "--output", str(tmp_path)),
    )
    assert measured.code == 0
    before = {path.name: path.stat().st_mtime_ns for path in measured.folder.glob("3-*.png")}
    for name in ("plain", "tempered"):
        found = pixels(measured.folder / f"3-{name}.png")
        np.testing.assert_array_equal(found, pixels(painted.folder / f"{name}.png"))
    resumed = call("--resume", str(measured.folder), "--cycles", "2")
    assert resumed.code == 0
    rows = (measured.folder / "cycles.jsonl").read_text().splitlines()
    assert [json.loads(row)["seed"] for row in rows] == [3, 4]
    assert {
        path.name: path.stat().st_mtime_ns for path in measured.folder.glob("3-*.png")
    } == before
    assert json.loads((measured.folder / "summary.json").read_text())["cycles"] == 2


def test_a_model_distilled_to_lcm_paints_as_diffusers_own_pipeline_for_it(tmp_path: Path) -> None:
    tiny.latent_consistency().save_pretrained(tmp_path / "lcm")
    painted = paint(tmp_path / "lcm", tmp_path / "outputs", "--guidance_scale", "8")
    assert painted.run["scheduler"] == "LCMScheduler"
    assert "Sampler: LCM, CFG scale: 8," in parameters(painted.folder / "plain.png")
    parts = DiffusionPipeline.from_pretrained(tmp_path / "lcm").components
    parts.pop("image_encoder")
    own = LatentConsistencyModelPipeline(**parts, requires_safety_checker=False)
    plain = own_picture(own, guidance_scale=8)
    np.testing.assert_array_equal(pixels(painted.folder / "plain.png"), plain)


def test_a_turbo_model_paints_without_guidance_on_its_own_schedule(tmp_path: Path) -> None:
    """Turbo and Lightning models have the usual parts, and timesteps that begin at the last."""
    pipe = tiny.stable_diffusion_xl()
    trailing = {"timestep_spacing": "trailing"}
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **trailing)
    pipe.save_pretrained(tmp_path / "turbo")
    words = ("--guidance_scale", "1", "--steps", "4")
    painted = paint(tmp_path / "turbo", tmp_path / "outputs", *words)
    own = DiffusionPipeline.from_pretrained(tmp_path / "turbo")
    assert own.scheduler.config.timestep_spacing == "trailing"
    plain = own_picture(own, guidance_scale=0)
    np.testing.assert_array_equal(pixels(painted.folder / "plain.png"), plain)


def test_loras_are_told_in_the_results_and_repeated(
    tiny_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(tiny.lora(tiny.shared("sd2")), tmp_path / "My style.safetensors")
    save_file(tiny.lora(tiny.shared("sd2"), seed=1), tmp_path / "other.safetensors")
    monkeypatch.chdir(tmp_path)
    words = ("--lora", "My style.safetensors:0.5", "--lora", "other.safetensors")
    painted = paint(tiny_folders["sd2"], tmp_path / "outputs", *words)
    hashes = [locate(f"{name}.safetensors", offline=True).hash for name in ("My style", "other")]
    assert painted.run["loras"] == [
        {"name": "My style", "weight": 0.5, "hash": hashes[0]},
        {"name": "other", "weight": 1.0, "hash": hashes[1]},
    ]
    text = parameters(painted.folder / "tempered.png")
    assert text.startswith(f"{PROMPT} <lora:My style:0.5> <lora:other:1>\n")
    assert f'Lora hashes: "My style: {hashes[0]}, other: {hashes[1]}"' in text

    monkeypatch.chdir("/")
    again = call(PAINT, "--repeat", str(painted.folder / "run.json"), "--output", str(tmp_path))
    assert again.code == 0
    assert_same_bytes(again.folder, painted.folder, PICTURES)
    other = ("--lora", str(tmp_path / "other.safetensors"))  # in the place of both
    alone = call(PAINT, "--repeat", str(painted.folder / "run.json"), *other)
    assert [lora["name"] for lora in alone.run["loras"]] == ["other"]
    assert (
        np.abs(pixels(alone.folder / "plain.png") - pixels(painted.folder / "plain.png")).max() > 4
    )


@pytest.mark.parametrize(
    ("family", "words", "fault"),
    [
        ("flux", (), "is FLUX (FluxPipeline), not Stable Diffusion 1, 2, XL or 3"),
        ("bare", ("--scheduler", "ddim"), "unipc with Stable Diffusion 3, got 'ddim'"),
        ("bare", ("--height", "40"), "multiples of 16 pixels with Stable Diffusion 3, got 40"),
        ("sdxl", ("--lora", "./x"), "--lora must be a .safetensors file"),
    ],
)
def test_what_a_family_does_not_admit_is_one_line_and_code_2(
    family: str,
    words: tuple[str, ...],
    fault: str,
    tiny_folders: dict[str, Path],
    tmp_path: Path,
) -> None:
    flux = Path(shutil.copytree(tiny_folders["bare"], tmp_path / "flux"))
    (flux / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    model = str({**tiny_folders, "flux": flux}[family])
    done = call(PAINT, "--model", model, *words, "--output", str(tmp_path), *FEW)
    assert (done.code, done.out) == (2, "")
    assert fault in done.err
    assert done.err.count("\n") == 1


def test_what_a_family_does_not_admit_is_refused_before_anything_heavy_is_imported(
    tiny_folders: dict[str, Path], tiny_files: dict[str, Path]
) -> None:
    sd3, bare = str(tiny_folders["sd3"]), str(tiny_files["bare"])
    words = [
        [PAINT, "--model", sd3, "--scheduler", "pndm"],
        [PAINT, "--model", sd3, "--height", "1000"],
        [PAINT, "--model", bare, "--width", "1000"],
        [PAINT, "--model", bare, "--prediction_type", "epsilon"],
    ]
    probe = subprocess.run(
        [sys.executable, "-c", PROBE],
        cwd=REPOSITORY,
        input=json.dumps(words),
        capture_output=True,
        text=True,
    )
    answers = [json.loads(line) for line in probe.stdout.splitlines()]
    assert answers == [[each, 2, []] for each in words], probe.stderr


def test_a_lora_of_another_family_is_refused_before_weights_load(
    tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_folders["sdxl"], tmp_path / "xl"))
    (model / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    save_file(tiny.lora(tiny.shared("sd2")), tmp_path / "style.safetensors")
    lora = ("--lora", str(tmp_path / "style.safetensors"))
    done = call(PAINT, "--model", str(model), *lora, "--output", str(tmp_path), *FEW)
    fault = "is for text of width 32, the model's is 96"
    line = f"error: --lora must be of the model's own family, but style {fault}\n"
    assert (done.code, done.out, done.err) == (2, "", line)


def test_t5_is_left_out_by_the_flag(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    painted = paint(tiny_folders["sd3"], tmp_path, "--no-t5")
    assert painted.run["text_encoders"] == ["text_encoder", "text_encoder_2"]
    again = call(PAINT, "--repeat", str(painted.folder / "run.json"), "--output", str(tmp_path))
    assert again.run["text_encoders"] == ["text_encoder", "text_encoder_2"]
