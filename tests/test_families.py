"""What a family makes of a pipeline: predictions, pictures, and pictures without a VAE."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from pictures import diffusers_picture, diffusers_picture_and_latents, farthest
from PIL import Image
from tiny import SIDE, latent_consistency, shared, stable_diffusion_xl, taesd

from errors import InputError, ModelError
from families import (
    LINEAR_MAPS,
    StableDiffusion,
    clean_and_noise,
    family_of,
    fit_linear_map,
    latents_to_rgb,
    linear_map,
)
from settings import Tempering


def test_a_pipeline_of_a_known_family_or_derived_from_one_is_taken(
    pipe: StableDiffusionPipeline,
) -> None:
    class Mine(StableDiffusionPipeline):
        pass

    mine = Mine(**pipe.components, requires_safety_checker=False)
    assert family_of(mine).denoiser is pipe.unet


def test_a_pipeline_of_no_known_family_is_refused_by_its_name() -> None:
    with pytest.raises(InputError) as raised:
        family_of(DiffusionPipeline())
    text = str(raised.value)
    assert text.startswith("the pipeline must be a StableDiffusionPipeline, ")
    assert text.endswith(", StableDiffusion3Pipeline, got DiffusionPipeline")


@pytest.mark.parametrize(
    ("kind", "alpha"),
    [("epsilon", 0.6), ("v_prediction", 0.6), ("sample", 0.6), ("flow_prediction", 0.2)],
)
def test_x0_and_eps_follow_from_every_prediction_type(kind: str, alpha: float) -> None:
    sigma = 0.8  # a flow's signal is 1 - sigma, the others' the root of 1 - sigma squared
    x0, eps = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    outputs = {
        "epsilon": eps,
        "v_prediction": alpha * eps - sigma * x0,
        "sample": x0,
        "flow_prediction": eps - x0,
    }
    found_x0, found_eps = clean_and_noise(
        kind, alpha * x0 + sigma * eps, outputs[kind], alpha, sigma
    )
    torch.testing.assert_close(found_x0, x0)
    torch.testing.assert_close(found_eps, eps)


def test_pure_noise_has_an_x0_where_v_or_a_flow_is_predicted() -> None:
    """At the first step of a flow, and of a schedule that ends without any signal."""
    x, v = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    for kind in ("v_prediction", "flow_prediction"):
        x0, eps = clean_and_noise(kind, x, v, 0, 1)
        assert torch.equal(eps, x)
        torch.testing.assert_close(x0, -v if kind == "v_prediction" else x - v)


@pytest.mark.parametrize(
    ("family", "guidance", "factor", "read"),
    [
        ("sd2", 7.5, 2, [32]),
        ("sdxl", 5.0, 2, [32, 32]),
        ("sd3", 4.5, 4, [32, 32, 256]),
    ],
)
def test_each_family_has_defaults_and_readers_of_its_own(
    family: str, guidance: float, factor: int, read: list[int]
) -> None:
    found = family_of(shared(family))
    assert found.guidance_scale == guidance
    assert [reader.limit for reader in found.readers] == read
    height, width = found.latents_shape(None, factor * 8)[2:]
    assert (height, width) == (SIDE // 2, factor * 4)
    with pytest.raises(InputError, match=f"sizes must be multiples of {factor} pixels, got 21x32"):
        found.latents_shape(None, 21)


def test_stable_diffusion_3_before_3_5_has_another_guidance() -> None:
    pipe = shared("sd3")
    before = pipe.transformer.config
    pipe.transformer.register_to_config(qk_norm=None)
    try:
        assert family_of(pipe).guidance_scale == 7.0
    finally:
        pipe.transformer.register_to_config(**before)


def test_guidance_mixes_unless_it_is_off_or_the_denoiser_is_told_it() -> None:
    told = family_of(latent_consistency())
    mixed = family_of(shared("sd2"))
    assert [each.mixes(scale) for each in (mixed, told) for scale in (0, 1, 1.5)] == [
        *(False, False, True),
        *(False, False, False),
    ]
    assert len(mixed.encode(["a cat"], "", 2)) == 2
    (soft,), (strong,) = told.encode(["a cat"], "", 2), told.encode(["a cat"], "", 8)
    assert soft["timestep_cond"].shape == (1, 8)
    assert not torch.equal(soft["timestep_cond"], strong["timestep_cond"])


@torch.no_grad()
def test_the_vae_of_xl_decodes_in_float32_where_its_float16_overflows() -> None:
    pipe = stable_diffusion_xl()
    pipe.vae.post_quant_conv.weight.mul_(1e5)
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    expected = family_of(pipe).decode(latents)[0]
    pipe.vae.to(torch.float16)
    with pytest.raises(ModelError, match="the picture is not finite in float16"):
        StableDiffusion(pipe).decode(latents)
    assert farthest(family_of(pipe).decode(latents)[0], expected) <= 2
    assert pipe.vae.dtype is torch.float16  # as the user had it
    cpu_offload(pipe.vae, "cpu")  # weights on "meta", as by sequential offload
    assert farthest(family_of(pipe).decode(latents)[0], expected) <= 2


@torch.no_grad()
def test_the_tiny_decoder_gives_what_diffusers_gets_from_it_in_the_vaes_place(
    own_pipe: DiffusionPipeline,
) -> None:
    tiny = taesd(own_pipe.vae.config.latent_channels)
    settings = Tempering(steps=2, stoptime=1, height=32, width=48)
    _, latents = diffusers_picture_and_latents(own_pipe, "a cat", settings, 3)
    own: Any = type(own_pipe)(**{**own_pipe.components, "vae": tiny})
    own.set_progress_bar_config(disable=True)
    expected = diffusers_picture(own, "a cat", settings, 3)
    by_vae = family_of(own_pipe).decode(latents)[0]
    own_pipe.taesd = tiny
    try:
        found = family_of(own_pipe).previews(latents, "taesd")[0]
    finally:
        del own_pipe.taesd
    assert farthest(found, expected) == 0
    assert farthest(found, by_vae) > 8


@torch.no_grad()
def test_half_the_side_shows_the_same_picture_in_the_same_size(
    pipe: StableDiffusionPipeline,
) -> None:
    settings = Tempering(steps=8, height=64, width=88)
    _, latents = diffusers_picture_and_latents(pipe, "a red car", settings, 3)
    latents = latents[..., :-1]  # a side that has no half
    family = family_of(pipe)
    whole, half = (family.previews(latents, by)[0] for by in ("vae", "half"))
    assert half.size == whole.size == (84, 64)
    small = [
        np.asarray(each.resize((21, 16), Image.Resampling.BOX)).ravel() for each in (whole, half)
    ]
    assert np.corrcoef(small)[0, 1] > 0.9
    assert farthest(whole, half) > 8


@torch.no_grad()
def test_half_the_side_by_the_tiny_decoder_is_its_picture_of_half_the_latents() -> None:
    pipe = shared("sd2")
    pipe.taesd = taesd()
    family = family_of(pipe)
    # Faint: what is cut off at white or black is not the mean of its neighbours.
    small = 0.1 * torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(1))
    large = small.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    try:
        by_small = family.previews(small, "taesd")[0]
        found, whole = (family.previews(large, by)[0] for by in ("taesd-half", "taesd"))
    finally:
        del pipe.taesd
    assert found.size == whole.size == (48, 32)
    assert farthest(found, by_small.resize(whole.size, Image.Resampling.BILINEAR)) <= 1
    assert farthest(found, whole) > 4


def test_the_best_preview_is_the_tiny_decoders_or_else_follows_the_size() -> None:
    pipe = shared("sd2")  # a latent is two pixels wide
    family = family_of(pipe)
    assert [family.preview_for((1, 4, side, 400)) for side in (255, 256)] == ["vae", "half"]
    pipe.taesd = taesd()
    try:
        found = [family.preview_for((1, 4, side, 400)) for side in (255, 256)]
        assert found == ["taesd", "taesd-half"]
    finally:
        del pipe.taesd


def test_a_broken_tiny_decoder_is_the_one_that_is_named() -> None:
    pipe = shared("sd2")
    pipe.taesd = taesd()
    pipe.taesd.decoder.layers[0].weight.data[0] = float("nan")
    try:
        with pytest.raises(ModelError, match="because weights of tiny decoder are not"):
            family_of(pipe).previews(torch.zeros(1, 4, 8, 8), "taesd")
    finally:
        del pipe.taesd


class FakeVae:
    """A decoder that is linear: it mixes the channels, two of which are the same, and enlarges."""

    device, dtype = torch.device("cpu"), torch.float32
    mixing = torch.tensor([[0.10, 0.02, 0.0, 0.0], [0.0, 0.08, 0.05, 0.05], [0.03, 0.0, 0.1, 0.1]])
    bias = torch.tensor([0.2, -0.1, 0.05])

    class config:  # noqa: N801 - the name that diffusers gives it
        scaling_factor = 0.5
        latent_channels = 4
        block_out_channels = (128, 256, 512, 512)

    def decode(self, latents: torch.Tensor, return_dict: bool = True) -> tuple[torch.Tensor]:
        rgb = torch.einsum("cl,blhw->bchw", self.mixing, latents * 0.5)
        return (torch.nn.functional.interpolate(rgb + self.bias[:, None, None], scale_factor=4.0),)


def test_the_fitted_map_is_the_decoder_where_that_is_linear() -> None:
    vae = FakeVae()
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    expected = torch.nn.functional.avg_pool2d(vae.decode(latents / 0.5)[0], 4)
    found = latents_to_rgb(latents, fit_linear_map(vae, "cpu"))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_known_families_keep_their_published_map() -> None:
    vae = FakeVae()
    vae.config.scaling_factor = 0.18215
    try:
        assert linear_map(vae, "cpu")[0].tolist() == pytest.approx(LINEAR_MAPS[0.18215][0])
        vae.config.scaling_factor = 0.13025
        # Vass 2024: zero latents are (150, 140, 130) of 255
        grey = latents_to_rgb(torch.zeros(1, 4, 1, 1), linear_map(vae, "cpu")).flatten()
        assert ((grey + 1) * 127.5).tolist() == pytest.approx([150, 140, 130], abs=1e-3)
    finally:
        vae.config.scaling_factor = 0.5
