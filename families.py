"""All that differs between the families of Stable Diffusion, on top of diffusers' pipelines.

| symbol | name here      | meaning                                                           |
|--------|----------------|-------------------------------------------------------------------|
| x      | x, latents     | (B, channels, h, w), as the denoiser takes them                   |
| x0     | x0             | clean latents that the denoiser predicts from x                   |
| eps    | eps            | noise that the denoiser predicts: x = alpha x0 + sigma eps        |
| alpha  | alpha          | signal scale at a timestep: sqrt(alphas_cumprod), on flows 1 - sigma |
| sigma  | sigma          | noise scale: sqrt(1 - alphas_cumprod), on flows the scheduler's sigma |
| v      | output         | what denoisers of v_prediction and of flows predict               |
| g      | guidance_scale | weight of classifier-free guidance (sampling.py)                  |
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from errors import InputError, raise_not_finite

# The text of a batch: what the denoiser is told beside latents and timestep, by the names of its
# own arguments, a row for each picture. All families have "encoder_hidden_states" (B, L, D).
Conditioning = dict[str, Tensor]

# Pixels from which on half a picture's side is about what CLIPSeg reads, 352.
HALVED_FROM = 512

# Latents to RGB in -1..1 without a VAE, by the VAE's scaling factor, which tells the families
# apart: a row for each latent channel, then the bias.
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


class Reader(NamedTuple):
    """A tokenizer that reads the prompts, and how much of them counts."""

    name: str
    tokenizer: Any
    limit: int  # tokens


class Family(ABC):
    """One of diffusers' pipelines, asked in the same words whatever its family.

    A family says how it encodes prompts, predicts, and decodes; it knows no schedule.
    """

    # To float32 for decoding, where its float16 may overflow. The VAE's own `force_upcast` is true
    # by default, so it counts only where the family has such VAEs.
    upcasts_vae = False

    def __init__(self, pipe: DiffusionPipeline) -> None:
        self.pipe = pipe
        self.device: torch.device = pipe._execution_device  # the only one right under offload

    @property
    @abstractmethod
    def denoiser(self) -> Any:
        """The network that predicts, with its configuration."""

    @property
    def joints(self) -> list[tuple[str, object, object]]:
        """Where the parts meet: what, as one part has it, and as another needs it."""
        denoiser, vae = self.denoiser.config, self.pipe.vae.config
        return [
            ("channels of the VAE's latents", vae.latent_channels, denoiser.in_channels),
            ("channels of the VAE's pictures", vae.out_channels, 3),
            ("channels that the denoiser gives", denoiser.out_channels, denoiser.in_channels),
        ]

    @property
    def guidance_scale(self) -> float:
        """What guidance is where the user does not say: diffusers' own."""
        return 7.5

    @property
    def readers(self) -> list[Reader]:
        """Who reads the prompts."""
        clips = [self.pipe.tokenizer, getattr(self.pipe, "tokenizer_2", None)]
        return [
            Reader("Stable Diffusion's CLIP", each, each.model_max_length) for each in clips if each
        ]

    def mixes(self, guidance_scale: float) -> bool:
        """Whether guidance of this scale mixes two outputs of the denoiser, as in diffusers.

        Not where it is off, and not where the denoiser was distilled to be told the scale (LCM:
        Luo et al. 2023, arXiv:2310.04378).
        """
        return guidance_scale > 1 and not self._guidance_width

    def encode(
        self, prompts: Sequence[str], negative_prompt: str, guidance_scale: float
    ) -> list[Conditioning]:
        """What guidance mixes, a row for each prompt: of the negative prompt, then of the prompts.

        Of the prompts alone where guidance mixes nothing.
        """
        # None, not "": some families have zeros in place of a prompt that was not given.
        negative = [negative_prompt] * len(prompts) if negative_prompt else None
        found = self._embed(list(prompts), negative, self.mixes(guidance_scale))
        if self._guidance_width:
            told = torch.tensor(guidance_scale - 1).repeat(len(prompts))
            embedded = self.pipe.get_guidance_scale_embedding(told, self._guidance_width)
            for each in found:
                each["timestep_cond"] = embedded.to(each["encoder_hidden_states"])
        return found

    @property
    def _guidance_width(self) -> int | None:
        return self.denoiser.config.get("time_cond_proj_dim")

    @abstractmethod
    def _embed(
        self, prompts: list[str], negative: list[str] | None, guided: bool
    ) -> list[Conditioning]:
        """The same of the text alone; `guided` says whether the negative prompt is wanted."""

    @abstractmethod
    def predict(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """The denoiser's output for `latents` (B, channels, h, w), of their shape."""

    @property
    def size_factor(self) -> int:
        """Height and width of a picture are multiples of so many pixels."""
        return self.pipe.vae_scale_factor

    @property
    def grid_factor(self) -> int:
        """Sides of latents are multiples of it: what the denoiser shrinks them by within."""
        return 2 ** (len(self.denoiser.config.block_out_channels) - 1)

    def latents_shape(self, height: int | None, width: int | None) -> tuple[int, int, int, int]:
        """The latents' shape (1, channels, h, w) of one picture; None is the model's own size.

        Raises InputError for a size that is no multiple of the family's factor.
        """
        config, factor = self.denoiser.config, self.pipe.vae_scale_factor
        own = config.sample_size
        if not (height and width) and not (isinstance(own, int) and own > 0):
            raise InputError("height and width must be given: the model has no size of its own")
        height, width = height or own * factor, width or own * factor
        if height % self.size_factor or width % self.size_factor:
            raise InputError(
                f"sizes must be multiples of {self.size_factor} pixels, got {width}x{height}"
            )
        return 1, config.in_channels, height // factor, width // factor

    def shift(self, config: Mapping[str, Any], shape: Sequence[int]) -> float:
        """mu of a scheduler whose noise levels follow the latents' `shape`; by its `config`."""
        raise InputError("a scheduler must not use dynamic shifting with this family")

    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Pictures of clean latents (B, channels, h, w), as diffusers' pipeline makes them.

        Raises ModelError for pixels that are not finite, as damaged weights, overflows of fp16 and
        absurd settings give them.
        """
        with self._decoder() as vae:
            pixels = decoded(vae, latents.to(vae.dtype), self.device)
        return self._pictures(pixels)

    @torch.no_grad()
    def encode_flat(self, level: float) -> Tensor:
        """Scaled latents (1, channels, 1, 1), float32, of a grey of this `level`, -1..1."""
        side = 8 * self.pipe.vae_scale_factor
        with self._decoder() as vae:
            pixels = torch.full((1, 3, side, side), level, dtype=vae.dtype, device=self.device)
            latents = vae.encode(pixels).latent_dist.mode().float()
            config = vae.config
        centred = latents - (getattr(config, "shift_factor", None) or 0)
        return centred.flatten(2).median(dim=2).values[..., None, None] * config.scaling_factor

    def previews(self, latents: Tensor, by: str) -> list[Image.Image]:
        """What CLIPSeg is shown of clean latents; `by` is one of `settings.PREVIEWS` but auto.

        As large as what `decode` makes of them.
        """
        ways = {
            "taesd": self._decode_tinily,
            "taesd-half": self._decode_half_tinily,
            "vae": self.decode,
            "half": self._decode_half,
            "linear": self._decode_linearly,
        }
        return ways[by](latents)

    def preview_for(self, shape: Sequence[int]) -> str:
        """The best preview that there is for latents of this shape, as named in `previews`."""
        halved = min(shape[-2:]) * self.pipe.vae_scale_factor >= HALVED_FROM
        if self.taesd is not None:
            return "taesd-half" if halved else "taesd"
        return "half" if halved else "vae"

    @property
    def taesd(self) -> Any | None:
        """The tiny decoder that the pipeline was given (diffusers' AutoencoderTiny), if any."""
        return getattr(self.pipe, "taesd", None)

    def _decode_tinily(self, latents: Tensor) -> list[Image.Image]:
        pixels = decoded(self.taesd, latents, self.device)
        return self._pictures(pixels, {"tiny decoder": self.taesd})

    def _decode_half_tinily(self, latents: Tensor) -> list[Image.Image]:
        pixels = self._decoded_half(self.taesd, latents)
        return self._pictures(pixels, {"tiny decoder": self.taesd})

    def _decode_half(self, latents: Tensor) -> list[Image.Image]:
        with self._decoder() as vae:
            return self._pictures(self._decoded_half(vae, latents))

    def _decoded_half(self, vae: Any, latents: Tensor) -> Tensor:
        """Pixels of latents of half the side, at a quarter of the cost, enlarged to full size."""
        height, width = latents.shape[-2:]
        half = F.interpolate(latents.float(), size=(-(-height // 2), -(-width // 2)), mode="area")
        factor = self.pipe.vae_scale_factor
        pixels = decoded(vae, half, self.device).float()
        return F.interpolate(pixels, size=(height * factor, width * factor), mode="bilinear")

    def _decode_linearly(self, latents: Tensor) -> list[Image.Image]:
        """By a linear map instead of the VAE: blurred, at hardly any cost."""
        rgb = latents_to_rgb(latents, self._linear_map)
        factor = self.pipe.vae_scale_factor
        return self._pictures(F.interpolate(rgb, scale_factor=factor, mode="bilinear"))

    @cached_property
    def _linear_map(self) -> Tensor:
        with self._decoder() as vae:
            return linear_map(vae, self.device)

    @contextmanager
    def _decoder(self) -> Iterator[Any]:
        """The VAE, in float32 where its float16 overflows and the family knows it."""
        vae = self.pipe.vae
        if not (self.upcasts_vae and vae.dtype is torch.float16 and vae.config.force_upcast):
            yield vae
            return
        vae.to(torch.float32)
        try:
            yield vae
        finally:
            vae.to(torch.float16)

    def _pictures(
        self, pixels: Tensor, made_by: Mapping[str, Any] | None = None
    ) -> list[Image.Image]:
        if not pixels.isfinite().all():
            networks = {**networks_of(self.pipe), **(made_by or {})}
            raise_not_finite("the picture", networks, self._advice())
        normal = [True] * len(pixels)
        processor = self.pipe.image_processor
        return list(processor.postprocess(pixels, output_type="pil", do_denormalize=normal))

    def _advice(self) -> str:
        dtype = str(self.pipe.vae.dtype).removeprefix("torch.")
        wider = "" if dtype == "float32" else "--dtype fp32 or bf16, or "
        return f"in {dtype}; what may help: {wider}a smaller --guidance_scale or --cfg_rescale"


class StableDiffusion(Family):
    """Stable Diffusion 1 and 2 (Rombach et al. 2022): a U-Net and one CLIP text encoder."""

    @property
    def denoiser(self) -> Any:
        return self.pipe.unet

    @property
    def joints(self) -> list[tuple[str, object, object]]:
        width, needed = self.pipe.text_encoder.config.hidden_size, self.denoiser.config
        return [
            *super().joints,
            ("width of the text encoder's output", width, needed.cross_attention_dim),
        ]

    def _embed(
        self, prompts: list[str], negative: list[str] | None, guided: bool
    ) -> list[Conditioning]:
        positive, unwanted = self.pipe.encode_prompt(prompts, self.device, 1, guided, negative)
        embeddings = [unwanted, positive] if guided else [positive]
        return [{"encoder_hidden_states": each} for each in embeddings]

    def predict(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        return self.denoiser(latents, timestep, **conditioning, return_dict=False)[0]


class StableDiffusionXL(Family):
    """Stable Diffusion XL (Podell et al. 2023): a U-Net, told the picture's size, and two CLIPs."""

    upcasts_vae = True

    @property
    def denoiser(self) -> Any:
        return self.pipe.unet

    @property
    def joints(self) -> list[tuple[str, object, object]]:
        clips = [self.pipe.text_encoder.config, self.pipe.text_encoder_2.config]
        width, needed = sum(clip.hidden_size for clip in clips), self.denoiser.config
        told = 6 * needed.addition_time_embed_dim + clips[1].projection_dim
        return [
            *super().joints,
            ("width of the text encoders' output", width, needed.cross_attention_dim),
            (
                "width of size and pooled text",
                told,
                needed.projection_class_embeddings_input_dim,
            ),
        ]

    @property
    def guidance_scale(self) -> float:
        return 5.0

    def _embed(
        self, prompts: list[str], negative: list[str] | None, guided: bool
    ) -> list[Conditioning]:
        encoded = self.pipe.encode_prompt(prompts, None, self.device, 1, guided, negative)
        return _with_pooled(encoded, "text_embeds", guided)

    def predict(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        given = dict(conditioning)
        added = {
            "text_embeds": given.pop("text_embeds"),
            "time_ids": self._time_ids(latents).to(given["encoder_hidden_states"]),
        }
        return self.denoiser(
            latents, timestep, **given, added_cond_kwargs=added, return_dict=False
        )[0]

    def _time_ids(self, latents: Tensor) -> Tensor:
        """Original size, upper left corner and size of the crop (B, 6): a whole picture."""
        factor = self.pipe.vae_scale_factor
        height, width = (side * factor for side in latents.shape[-2:])
        return torch.tensor([[height, width, 0, 0, height, width]]).repeat(len(latents), 1)


class StableDiffusion3(Family):
    """Stable Diffusion 3 and 3.5 (Esser et al. 2024): an MM-DiT on flows, two CLIPs, perhaps T5."""

    _T5_TOKENS = 256  # diffusers' pipeline reads no more, whatever the tokenizer allows

    @property
    def denoiser(self) -> Any:
        return self.pipe.transformer

    @property
    def joints(self) -> list[tuple[str, object, object]]:
        clips = [self.pipe.text_encoder.config, self.pipe.text_encoder_2.config]
        t5, needed = self.pipe.text_encoder_3, self.denoiser.config
        pooled = sum(clip.projection_dim for clip in clips)
        read = (
            [("width of T5's output", t5.config.d_model, needed.joint_attention_dim)] if t5 else []
        )
        return [
            *super().joints,
            ("width of the pooled text", pooled, needed.pooled_projection_dim),
            *read,
        ]

    @property
    def guidance_scale(self) -> float:
        """Of 3 diffusers' own; of 3.5, which alone normalises queries and keys, its card's."""
        return 4.5 if self.denoiser.config.qk_norm else 7.0

    @property
    def readers(self) -> list[Reader]:
        t5 = self.pipe.tokenizer_3
        return [
            *super().readers,
            *([Reader("Stable Diffusion's T5", t5, self._T5_TOKENS)] if t5 else []),
        ]

    def _embed(
        self, prompts: list[str], negative: list[str] | None, guided: bool
    ) -> list[Conditioning]:
        encoded = self.pipe.encode_prompt(prompts, None, None, self.device, 1, guided, negative)
        return _with_pooled(encoded, "pooled_projections", guided)

    def predict(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        return self.denoiser(
            latents, timestep=timestep.expand(len(latents)), **conditioning, return_dict=False
        )[0]

    @property
    def size_factor(self) -> int:
        return self.pipe.vae_scale_factor * self.denoiser.config.patch_size

    @property
    def grid_factor(self) -> int:
        return self.denoiser.config.patch_size

    def shift(self, config: Mapping[str, Any], shape: Sequence[int]) -> float:
        # Not above: importing this pipeline takes a second, and warns of libraries of its own.
        from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import (
            calculate_shift,
        )

        patch = self.denoiser.config.patch_size
        return calculate_shift(
            (shape[-2] // patch) * (shape[-1] // patch),
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.16),
        )


def _with_pooled(encoded: Sequence[Tensor], pooled_name: str, guided: bool) -> list[Conditioning]:
    """The conditionings of what two text encoders or more make of prompts and negative prompts."""
    positive, negative, pooled, negative_pooled = encoded
    pairs = [(negative, negative_pooled), (positive, pooled)] if guided else [(positive, pooled)]
    return [{"encoder_hidden_states": text, pooled_name: whole} for text, whole in pairs]


# By the pipeline's class in diffusers, or one that it is derived from.
FAMILIES: dict[str, type[Family]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "LatentConsistencyModelPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusion3Pipeline": StableDiffusion3,
}


def networks_of(pipe: DiffusionPipeline) -> dict[str, torch.nn.Module]:
    """The parts of a pipeline that have weights, by diffusers' names for them."""
    parts = pipe.components.items()
    return {name: part for name, part in parts if isinstance(part, torch.nn.Module)}


def family_of(pipe: DiffusionPipeline) -> Family:
    """The family of a pipeline. Raises InputError for one of no family that is known."""
    for ancestor in type(pipe).__mro__:
        if ancestor.__name__ in FAMILIES:
            return FAMILIES[ancestor.__name__](pipe)
    raise InputError(f"the pipeline must be a {', '.join(FAMILIES)}, got {type(pipe).__name__}")


def clean_and_noise(
    kind: str, x: Tensor, output: Tensor, alpha: float, sigma: float
) -> tuple[Tensor, Tensor]:
    """x0 and eps, float32, from the denoiser's `output` for `x` by its prediction type `kind`.

    epsilon: x0 = (x - sigma eps) / alpha. v_prediction (Salimans & Ho 2022, arXiv:2202.00512):
    x0 = alpha x - sigma v, eps = sigma x + alpha v. sample: x0 itself. flow_prediction (Lipman et
    al. 2022, arXiv:2210.02747; v = eps - x0, alpha = 1 - sigma): x0 = x - sigma v,
    eps = x + alpha v.
    """
    x, output = x.float(), output.float()
    if kind == "flow_prediction":
        return x - sigma * output, x + alpha * output
    if kind == "v_prediction":
        return alpha * x - sigma * output, sigma * x + alpha * output
    if kind == "sample":
        return output, (x - alpha * output) / sigma
    return (x - sigma * output) / alpha, output


def decoded(vae: Any, latents: Tensor, device: torch.device | str) -> Tensor:
    """Pixels (B, 3, height, width) of clean `latents`, in -1..1 but for what the VAE overshoots.

    `device` is where the VAE computes, which under offload is not where it is kept.
    """
    config = vae.config
    centred = latents / config.scaling_factor
    if shift := getattr(config, "shift_factor", None):
        centred = centred + shift
    return vae.decode(centred.to(device, vae.dtype), return_dict=False)[0]


def linear_map(vae: Any, device: torch.device | str) -> Tensor:
    """The linear map (channels + 1, 3) from a VAE's scaled latents and 1 to RGB in -1..1.

    Taken from `LINEAR_MAPS` where the VAE's family is known, else fitted on `device`.
    """
    config = vae.config
    # Those of Stable Diffusion 1 to XL have 4 channels and 4 levels; the factor tells which it is.
    family = config.scaling_factor, config.latent_channels, len(config.block_out_channels)
    known = LINEAR_MAPS.get(family[0]) if family[1:] == (4, 4) else None
    return fit_linear_map(vae, device) if known is None else torch.tensor(known)


@torch.no_grad()
def fit_linear_map(
    vae: Any, device: torch.device | str, pictures: int = 32, size: int = 16, seed: int = 0
) -> Tensor:
    """Least-squares map (channels + 1, 3) from scaled latents and 1 to RGB in -1..1, float32.

    The data are smooth random latents of unit variance, as a VAE's scaled latents are, and what
    `vae` decodes them to on `device`; so it needs no pictures.
    """
    rng = torch.Generator().manual_seed(seed)
    rough = torch.randn(pictures, vae.config.latent_channels, size // 2, size // 2, generator=rng)
    smooth = F.interpolate(rough, size=(size, size), mode="bilinear")
    latents = smooth / smooth.std()  # (B, channels, size, size)
    pixels = decoded(vae, latents, device).clamp(-1, 1)
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
