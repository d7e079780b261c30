"""What CLIPSeg sees in a picture: class probabilities, masks, the class matrix, uncertainty.

| symbol | meaning                                                                     |
|--------|-----------------------------------------------------------------------------|
| C      | number of classes, one a prompt                                             |
| P      | probabilities (C, H, W): sigmoid of CLIPSeg's logits, one map a prompt      |
| M      | class matrix (C, C): M[i, j] = mean probability of class j over class i     |
| p_i    | M[i, i], how confident class i is on its own pixels                         |
| q_i    | mean of M[i, j] over j != i, how much the others shine through class i      |
| u_i    | uncertainty of class i, -log(p_i (1 - q_i))                                 |
| E      | energy of the picture, from its purest pixels (`energy`)                    |

CLIPSeg: Lueddecke & Ecker 2022, arXiv:2112.10003.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from transformers import CLIPSegForImageSegmentation, CLIPSegProcessor

NONE = -1  # the label of a pixel that belongs to no class
# Keeps the logarithm finite: a class that is not there at all has uncertainty -log(1e-6) = 13.8.
SMALLEST = 1e-6
# The share of a picture's pixels that must show a class for it to be there: the smallest subjects.
PUREST = 0.03

# Latents to RGB in -1..1 without a VAE, by the VAE's scaling factor, which tells the families of
# Stable Diffusion apart: a row for each latent channel, then the bias.
LINEAR_MAPS = {
    # Stable Diffusion 1.x, factors in public use.
    0.18215: (
        (0.3512, 0.2297, 0.3227),
        (0.3250, 0.4974, 0.2350),
        (-0.2829, 0.1762, 0.2721),
        (-0.2120, -0.2616, -0.7177),
        (0.0, 0.0, 0.0),
    ),
    # Stable Diffusion XL: Vass 2024, here brought from 0..255 to -1..1.
    0.13025: tuple(
        tuple((value - offset) / 127.5 for value in row)
        for row, offset in (
            ((60, 60, 60), 0),
            ((-60, -5, 10), 0),
            ((25, 15, -5), 0),
            ((-70, -50, -35), 0),
            ((150, 140, 130), 127.5),
        )
    ),
}


@dataclass(frozen=True)
class ClipSeg:
    """A CLIPSeg model with the processor of its own checkpoint."""

    model: CLIPSegForImageSegmentation
    processor: CLIPSegProcessor


@dataclass(frozen=True)
class View:
    """What CLIPSeg saw in one picture."""

    image: Image.Image
    probabilities: Tensor  # (C, H, W) float32 in 0..1, at CLIPSeg's own resolution
    labels: Tensor  # (H, W) int64, the class of each pixel, -1 for none
    matrix: Tensor  # (C, C) float64, the class matrix
    uncertainty: Tensor  # (C,) float64

    @cached_property
    def energy(self) -> float:
        """How far the picture is from showing every class, confident and pure, 0..13.8."""
        return energy(self.probabilities)


@torch.no_grad()
def embed_prompts(clipseg: ClipSeg, prompts: Sequence[str]) -> Tensor:
    """CLIPSeg's conditional embeddings (C, D) of `prompts`; one call serves a whole run.

    A prompt over the text encoder's length is cut.
    """
    tokens = clipseg.processor.tokenizer(
        list(prompts),
        padding=True,
        truncation=True,
        max_length=clipseg.model.config.text_config.max_position_embeddings,
        return_tensors="pt",
    ).to(clipseg.model.device)
    return clipseg.model.get_conditional_embeddings(
        batch_size=len(prompts),
        input_ids=tokens.input_ids,
        attention_mask=tokens.attention_mask,
    )


@torch.no_grad()
def segment(clipseg: ClipSeg, images: Sequence[Image.Image], embeddings: Tensor) -> Tensor:
    """Probabilities (B, C, H, W), float32 in 0..1, on the CPU, at CLIPSeg's own resolution.

    `embeddings` is (B, C, D): the classes of each of the B images. The vision tower, whose output
    does not depend on the prompts, runs once an image; only the small decoder runs once a class.
    """
    model = clipseg.model
    pixels = clipseg.processor.image_processor(list(images), return_tensors="pt").pixel_values
    vision = model.clip.get_image_features(
        pixel_values=pixels.to(model.device, model.dtype), output_hidden_states=True
    )
    classes = embeddings.shape[1]
    layers = [
        vision.hidden_states[i + 1].repeat_interleave(classes, dim=0)  # (B * C, tokens, D)
        for i in model.extract_layers
    ]
    logits = model.decoder(layers, embeddings.flatten(0, 1)).logits  # (B * C, H, W)
    return logits.float().sigmoid().unflatten(0, embeddings.shape[:2]).cpu()


def view_of(image: Image.Image, probabilities: Tensor, threshold: float) -> View:
    """The view of `image` in which CLIPSeg gave `probabilities` (C, H, W)."""
    labels = classify(probabilities, threshold)
    matrix = class_matrix(probabilities, labels)
    return View(image, probabilities, labels, matrix, uncertainty(matrix))


def classify(probabilities: Tensor, threshold: float) -> Tensor:
    """Labels (H, W), int64: the class of highest probability where it exceeds `threshold`.

    `probabilities` is (C, H, W) in 0..1; a pixel of no class gets `NONE`.
    """
    highest, labels = probabilities.max(dim=0)
    return labels.masked_fill(highest <= threshold, NONE)


def class_matrix(probabilities: Tensor, labels: Tensor) -> Tensor:
    """M (C, C), float64: row i is the mean of `probabilities` (C, H, W) over the pixels of class i.

    The row of a class without pixels is 0.
    """
    classes = probabilities.shape[0]
    # (C, H * W): which pixels belong to which class
    members = (labels.flatten() == torch.arange(classes)[:, None]).double()
    sums = members @ probabilities.double().flatten(1).T  # (C, C)
    return sums / members.sum(dim=1, keepdim=True).clamp(min=1)


def uncertainty(matrix: Tensor) -> Tensor:
    """u (C,), float64, in 0..13.8: large where a class is faint or others shine through it.

    u_i = -log(p_i (1 - q_i)); a single class has q = 0.
    """
    classes = matrix.shape[0]
    p = matrix.diagonal()
    q = (matrix.sum(dim=1) - p) / max(1, classes - 1)
    return -(p * (1 - q)).clamp(min=SMALLEST).log()


def energy(probabilities: Tensor) -> float:
    """Energy of a picture, 0..13.8, from `probabilities` (C, H, W) in 0..1: its worst class counts.

    E = max over i of -log(mean of s_i over its purest pixels), with s_i = p_i prod(1 - p_j), the
    probability that a pixel shows class i and no other. The purest are the `PUREST` share of all
    pixels that have the highest s_i: what a small subject covers. Unlike u_i it asks for no
    threshold, and a class that is faintly everywhere does not pass for one that is there.
    """
    p = probabilities.double()
    count = max(1, round(PUREST * p[0].numel()))
    absent = 1 - p
    alone = torch.stack(
        [p[i] * absent[:i].prod(dim=0) * absent[i + 1 :].prod(dim=0) for i in range(len(p))]
    )  # (C, H, W)
    evidence = alone.flatten(1).topk(count, dim=1).values.mean(dim=1)  # (C,)
    return float(-evidence.min().clamp(min=SMALLEST).log())


def linear_map(vae: Any, device: torch.device | str) -> Tensor:
    """The linear map (channels + 1, 3) from a VAE's scaled latents and 1 to RGB in -1..1.

    Taken from `LINEAR_MAPS` where the VAE's family is known, else fitted on `device`.
    """
    config = vae.config
    # Every VAE of these families has 4 channels and 4 levels; the factor then tells which it is.
    family = config.scaling_factor, config.latent_channels, len(config.block_out_channels)
    known = LINEAR_MAPS.get(family[0]) if family[1:] == (4, 4) else None
    return fit_linear_map(vae, device) if known is None else torch.tensor(known)


@torch.no_grad()
def fit_linear_map(
    vae: Any, device: torch.device | str, pictures: int = 32, size: int = 16, seed: int = 0
) -> Tensor:
    """Least-squares map (channels + 1, 3) from scaled latents and 1 to RGB in -1..1, float32.

    The data are smooth random latents of unit variance, as a VAE's scaled latents are, and what
    `vae` decodes them to; so it needs no pictures. `device` is where the VAE computes, which under
    offload is not where it is kept.
    """
    rng = torch.Generator().manual_seed(seed)
    rough = torch.randn(pictures, vae.config.latent_channels, size // 2, size // 2, generator=rng)
    smooth = F.interpolate(rough, size=(size, size), mode="bilinear")
    latents = smooth / smooth.std()  # (B, channels, size, size)
    scaled = (latents / vae.config.scaling_factor).to(device, vae.dtype)
    pixels = vae.decode(scaled, return_dict=False)[0].clamp(-1, 1)
    rgb = F.interpolate(pixels.float().cpu(), size=(size, size), mode="area")
    # In float64: a VAE whose channels repeat each other leaves float32 without a stable solution.
    known, wanted = _with_one(latents).double(), _rows(rgb).double()
    return torch.linalg.lstsq(known.flatten(0, 2), wanted.flatten(0, 2)).solution.float()


def latents_to_rgb(latents: Tensor, weights: Tensor) -> Tensor:
    """RGB (B, 3, h, w), float32 in -1..1, of scaled `latents` (B, channels, h, w), without a VAE.

    `weights` is (channels + 1, 3), as `linear_map` gives it.
    """
    rgb = _with_one(latents.float()) @ weights.to(latents.device)  # (B, h, w, 3)
    return rgb.permute(0, 3, 1, 2).clamp(-1, 1)


def _rows(images: Tensor) -> Tensor:
    """(B, channels, h, w) -> (B, h, w, channels)."""
    return images.permute(0, 2, 3, 1)


def _with_one(latents: Tensor) -> Tensor:
    """Latents as rows with a constant 1 behind them, which carries the bias."""
    rows = _rows(latents)
    return torch.cat([rows, torch.ones_like(rows[..., :1])], dim=-1)
