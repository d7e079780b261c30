"""What a family makes of a pipeline: predictions, pictures, and pictures without a VAE."""

from __future__ import annotations

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline

from errors import InputError
from families import (
    LINEAR_MAPS,
    clean_and_noise,
    family_of,
    fit_linear_map,
    latents_to_rgb,
    linear_map,
)


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
    text = "the pipeline must be a StableDiffusionPipeline, got DiffusionPipeline"
    assert str(raised.value) == text


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_x0_and_eps_follow_from_every_prediction_type(kind: str) -> None:
    alpha, sigma = 0.6, 0.8
    x0, eps = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    outputs = {"epsilon": eps, "v_prediction": alpha * eps - sigma * x0, "sample": x0}
    found_x0, found_eps = clean_and_noise(
        kind, alpha * x0 + sigma * eps, outputs[kind], alpha, sigma
    )
    torch.testing.assert_close(found_x0, x0)
    torch.testing.assert_close(found_eps, eps)


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
