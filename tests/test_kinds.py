"""kinds.py: what is no Stable Diffusion is told what it is, before anything of it is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from errors import InputError
from hub import check
from kinds import MODEL, SEGMENTER, VAE

WORKS = "not Stable Diffusion 1, 2, XL or 3"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("FluxPipeline", "is FLUX (FluxPipeline)"),
        ("Flux2Pipeline", "is FLUX (Flux2Pipeline)"),
        ("StableDiffusionXLImg2ImgPipeline", "is the refiner of Stable Diffusion XL or like it ("),
        ("StableDiffusionInpaintPipeline", "is an inpainting model ("),
        ("StableDiffusionXLInpaintPipeline", "is an inpainting model ("),
        ("StableDiffusionControlNetPipeline", "is a ControlNet ("),
        ("StableDiffusionUpscalePipeline", "is an upscaler ("),
        ("StableVideoDiffusionPipeline", "is a video model ("),
        ("AnimateDiffPipeline", "is a video model ("),
        ("WanPipeline", "is a video model ("),
        ("HunyuanVideoPipeline", "is a video model ("),
        ("LTXPipeline", "is a video model ("),
        ("KandinskyPipeline", "is a KandinskyPipeline,"),
    ],
)
def test_folders_of_other_models_are_told_what_they_are(
    name: str, told: str, tmp_path: Path
) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    assert_refused(tmp_path, told)


def test_a_folder_of_a_single_network_is_told_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "ControlNetModel"}))
    assert_refused(tmp_path, "is a ControlNet (ControlNetModel)")


def test_a_folder_of_an_inpainting_unet_is_refused_whatever_it_calls_itself(painter: Path) -> None:
    config = painter / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "in_channels": 9}))
    assert_refused(painter, "is an inpainting model,")


def test_a_folder_with_a_corrupt_configuration_names_the_file(painter: Path) -> None:
    for name in ("unet/config.json", "model_index.json"):
        for content in ("[", "[" * 100_000, "[]"):
            (painter / name).write_text(content)
            with pytest.raises(InputError, match=rf"has a corrupt {Path(name).name}$"):
                check(str(painter), MODEL)


UNET = "model.diffusion_model.input_blocks.0.0.weight"
SHAPES: dict[str, dict[str, list[int]]] = {
    "is FLUX,": {"double_blocks.0.img_attn.norm.key_norm.scale": [128]},
    "is the refiner of Stable Diffusion XL,": {
        UNET: [384, 4, 3, 3],
        "first_stage_model.decoder.conv_in.weight": [512, 4, 3, 3],
        "conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias": [1280],
    },
    "is a ControlNet,": {"control_model.time_embed.0.weight": [1280, 320]},
    "is a video model,": {"model.diffusion_model.head.weight": [64, 16, 1, 2, 2]},
    "is a LoRA, which --lora takes,": {"lora_te1_text_model_encoder_layers_0.alpha": []},
    "is a model on EDM's schedule,": {"edm_mean": [1, 4, 1, 1]},
    "lacks the U-Net and the VAE and the CLIP text model": {"weight": [1]},
    "lacks the CLIP text model": {
        UNET: [320, 4, 3, 3],
        "first_stage_model.decoder.conv_in.weight": [512, 4, 3, 3],
    },
    "lacks the VAE and the second CLIP text model": {
        UNET: [320, 4, 3, 3],
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias": [768],
    },
    "lacks the VAE": {"joint_blocks.0.x_block.attn.qkv.weight": [4608, 1536]},
}


@pytest.mark.parametrize("told", SHAPES)
def test_single_files_of_other_models_are_told_what_they_are(told: str, tmp_path: Path) -> None:
    tensors = {name: torch.zeros(shape) for name, shape in SHAPES[told].items()}
    save_file(tensors, tmp_path / "x.safetensors")
    assert_refused(tmp_path / "x.safetensors", told)


@pytest.mark.parametrize(
    ("channels", "told"),
    [(9, "is an inpainting model,"), (8, "is a model that takes 8 channels,")],
)
@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_single_files_that_take_more_than_latents_are_refused(
    family: str, channels: int, told: str, tiny_files: dict[str, Path], tmp_path: Path
) -> None:
    tensors = load_file(tiny_files[family])
    wide = torch.zeros(len(tensors[UNET]), channels, 3, 3)
    save_file({**tensors, UNET: wide}, tmp_path / "x.safetensors")
    assert_refused(tmp_path / "x.safetensors", told)


@pytest.mark.parametrize("shape", ["5", "null", '"wide"', "[1, null]", "[[4]]", "[" * 100_000])
def test_a_header_that_no_library_wrote_is_none(shape: str, tmp_path: Path) -> None:
    header = f'{{"{UNET}": {{"dtype": "F32", "shape": {shape}, "data_offsets": [0, 4]}}}}'.encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(InputError, match=r"is not a safetensors file$"):
        check(str(tmp_path / "x.safetensors"), MODEL)


@pytest.mark.parametrize("shape", [[], [4]])
def test_a_first_layer_that_is_no_convolution_is_refused(shape: list[int], tmp_path: Path) -> None:
    save_file({UNET: torch.zeros(shape)}, tmp_path / "x.safetensors")
    assert_refused(tmp_path / "x.safetensors", "is a model that takes 0 channels,")


def test_models_are_no_vaes_and_no_segmenters(tiny_folders: dict[str, Path]) -> None:
    for folder in tiny_folders.values():
        check(str(folder), MODEL)
        with pytest.raises(InputError, match=r"^--vae must be .* lacks config\.json"):
            check(str(folder), VAE)
        with pytest.raises(InputError, match=r"^--clipseg must be .* is a clip_text_model, not CL"):
            check(str(folder / "text_encoder"), SEGMENTER)


def assert_refused(path: Path, told: str) -> None:
    with pytest.raises(InputError) as raised:
        check(str(path), MODEL)
    text = str(raised.value)
    assert told in text
    assert "\n" not in text
    assert text.endswith(WORKS if told.startswith("is ") else told)
