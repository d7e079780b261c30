"""Tempering: denoise, look, put noise back where the classes are uncertain, denoise again.

| symbol | name here      | meaning                                                            |
|--------|----------------|--------------------------------------------------------------------|
| x      | latents        | (B, channels, h, w), at the noise level of the step to come        |
| x0     | x0             | clean latents that the denoiser predicts from x                    |
| eps    | eps            | noise that the denoiser predicts, guidance included                |
| alpha  | alpha          | signal scale at a timestep, sqrt(alphas_cumprod)                   |
| sigma  | sigma          | noise scale, sqrt(1 - alphas_cumprod): x = alpha x0 + sigma eps    |
| g      | guidance_scale | weight of classifier-free guidance                                 |
| u_i    | uncertainty    | of class i (segmentation.py)                                       |
| gamma  | gamma          | share of fresh noise in eps, per pixel: 1 - exp(-k u_i) in class i |

The method is Alberto García Núñez's (master's thesis, UNIR); the re-noising here stays on the
scheduler's own schedule for every k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from diffusers import PNDMScheduler
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from errors import InputError, ModelError
from segmentation import (
    NONE,
    ClipSeg,
    class_matrix,
    classify,
    embed_prompts,
    latents_to_rgb,
    linear_map,
    segment,
    uncertainty,
)
from settings import Tempering, check_prompts

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

__all__ = ["Painter", "Result", "Tempering", "View", "temper"]

Progress = Callable[[int], None]
DEFAULTS = Tempering()


@dataclass(frozen=True)
class View:
    """What CLIPSeg saw in one picture."""

    image: Image.Image
    probabilities: Tensor  # (C, H, W) float32 in 0..1, at CLIPSeg's own resolution
    labels: Tensor  # (H, W) int64, the class of each pixel, -1 for none
    matrix: Tensor  # (C, C) float64, the class matrix
    uncertainty: Tensor  # (C,) float64


@dataclass(frozen=True)
class Result:
    """One tempered picture and what was seen on the way."""

    image: Image.Image
    plain: Image.Image | None  # the untempered picture of the same seed, where it was asked for
    interrupted: View  # what CLIPSeg saw at `stoptime`
    seed: int
    unet_calls: int  # U-Net evaluations; both halves of guidance count as one

    @property
    def probabilities(self) -> Tensor:
        """(classes, height, width), CLIPSeg's view of the interrupted picture."""
        return self.interrupted.probabilities


def temper(
    pipe: StableDiffusionPipeline,
    clipseg: ClipSeg,
    prompts: Sequence[str],
    settings: Tempering = DEFAULTS,
    *,
    seed: int = 2024,
    compare: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Paint `prompts`, one subject each, into one picture, tempered.

    With `compare` the untempered picture of the same seed is made too; it shares the steps before
    `stoptime`, so it costs steps - stoptime U-Net calls more. `progress` is called with the number
    of U-Net calls just made. Raises InputError for prompts that are missing or empty.
    """
    painter = Painter(pipe, clipseg, [prompts], settings)
    return painter.temper([seed], compare=compare, progress=progress)[0]


def gammas(views: Sequence[View], k: float, size: tuple[int, int]) -> Tensor:
    """Share of fresh noise (B, 1, h, w), float32 in 0..1: 1 - exp(-k u_i) in class i, else 0."""
    maps = []
    for view in views:
        of_class = (1 - (-k * view.uncertainty).exp()).float()  # (C,)
        gamma = of_class[view.labels.clamp(min=0)].masked_fill(view.labels == NONE, 0.0)
        maps.append(F.adaptive_avg_pool2d(gamma[None], size))
    return torch.stack(maps)


def mix_noise(eps: Tensor, fresh: Tensor, gamma: Tensor, scale: float = 1.0) -> Tensor:
    """sqrt(1 - gamma) eps + sqrt(gamma) scale fresh: unit variance for every gamma at scale 1.

    For independent eps and fresh noise of unit variance; as in Noise Diffusion (arXiv:2411.16503).
    """
    return (1 - gamma).sqrt() * eps + gamma.sqrt() * scale * fresh


class Painter:
    """A pipeline and a CLIPSeg with the text of one run encoded: paints, looks and tempers.

    `prompts` holds the prompts of each of the B pictures of a batch, the same number for each.
    One painter serves any number of seeds, so text is encoded once. Raises InputError for prompts
    that are missing or empty.
    """

    def __init__(
        self,
        pipe: StableDiffusionPipeline,
        clipseg: ClipSeg,
        prompts: Sequence[Sequence[str]],
        settings: Tempering = DEFAULTS,
    ) -> None:
        for each in prompts:
            check_prompts(each)
        self.pipe = pipe
        self.clipseg = clipseg
        self.settings = settings
        self.device = pipe._execution_device  # the only one that is right under offload
        self.guided = settings.guidance_scale > 1  # as in diffusers' pipeline
        joined = [settings.joiner.join(each) for each in prompts]
        with torch.no_grad():
            positive, negative = pipe.encode_prompt(
                joined, self.device, 1, self.guided, [settings.negative_prompt] * len(joined)
            )
        self.contexts = [negative, positive] if self.guided else [positive]  # each (B, L, D)
        self.embeddings = torch.stack([embed_prompts(clipseg, each) for each in prompts])

    @torch.no_grad()
    def temper(
        self, seeds: Sequence[int], *, compare: bool = False, progress: Progress | None = None
    ) -> list[Result]:
        """One tempered picture for each of the B seeds; the parameters are those of `temper`.

        Every picture has a random generator of its own, so it does not depend on the batch that
        it was made in (beyond floating-point rounding).
        """
        report = progress or (lambda calls: None)
        trunk = self.start(seeds)
        for calls in descend(self, [trunk], self.settings.stoptime):
            report(calls)
        x0, eps = trunk.prediction()
        views = self.look(self.preview(x0))

        height, width = x0.shape[-2:]
        gamma = gammas(views, self.settings.k, (height, width))
        tempered = self.go_back(trunk, x0, eps, gamma)
        branches = [trunk, tempered] if compare else [tempered]
        for calls in descend(self, branches, self.settings.steps):
            report(calls)

        images = self.decode(tempered.latents)
        plain = self.decode(trunk.latents) if compare else [None] * len(seeds)
        self.pipe.maybe_free_model_hooks()
        calls = trunk.evaluations + tempered.evaluations
        return [
            Result(image, before, view, seed, calls)
            for image, before, view, seed in zip(images, plain, views, seeds, strict=True)
        ]

    def unet_calls(self, *, compare: bool) -> int:
        """U-Net evaluations of one tempered picture, with its plain one where `compare` is set."""
        trunk, tempered = self._branch(0, []), self._branch(self._return_step, [])
        end = self.settings.steps if compare else self.settings.stoptime
        return trunk.evaluations_until(end) + tempered.evaluations_until(self.settings.steps)

    @property
    def _return_step(self) -> int:
        return self.settings.stoptime - self.settings.backsteps

    def look(self, images: Sequence[Image.Image]) -> list[View]:
        """CLIPSeg's view of each of the B pictures."""
        views = []
        found = segment(self.clipseg, images, self.embeddings)
        for image, probabilities in zip(images, found, strict=True):
            labels = classify(probabilities, self.settings.threshold)
            matrix = class_matrix(probabilities, labels)
            views.append(View(image, probabilities, labels, matrix, uncertainty(matrix)))
        return views

    def start(self, seeds: Sequence[int]) -> Branch:
        """Pure noise, drawn as diffusers' pipeline draws it, with one CPU generator a picture."""
        branch = self._branch(0, [torch.Generator().manual_seed(seed) for seed in seeds])
        unet = self.pipe.unet.config
        factor = self.pipe.vae_scale_factor
        height = self.settings.height or unet.sample_size * factor
        width = self.settings.width or unet.sample_size * factor
        if height % factor or width % factor:
            raise InputError(f"sizes must be multiples of {factor} pixels, got {width}x{height}")
        shape = (len(seeds), unet.in_channels, height // factor, width // factor)
        noise = self._noise(shape, branch.generators, self.contexts[0].dtype)
        branch.latents = noise * branch.scheduler.init_noise_sigma
        return branch

    def go_back(self, trunk: Branch, x0: Tensor, eps: Tensor, gamma: Tensor) -> Branch:
        """A new branch from the noise level of step stoptime - backsteps.

        x <- alpha x0 + sigma (sqrt(1 - gamma) eps + sqrt(gamma) fresh noise); `trunk` stays as it
        is, and any multistep history is left with it. All tensors are (B, channels, h, w).
        """
        # The trunk's random streams go on here: fresh noise never repeats the noise at the start.
        branch = self._branch(
            self._return_step, [_clone(generator) for generator in trunk.generators]
        )
        if not len(branch.timesteps):
            branch.latents = trunk.latents  # no step was undone: there is no noise left to change
            return branch
        fresh = self._noise(x0.shape, branch.generators, torch.float32)
        noise = mix_noise(eps, fresh, gamma.to(eps.device), self.settings.cfg_rescale / 10)
        latents = branch.scheduler.add_noise(x0, noise, branch.timesteps[:1])
        branch.latents = latents.to(trunk.latents.dtype)
        return branch

    def predict(self, branches: Sequence[Branch]) -> list[tuple[Tensor, Tensor]]:
        """The U-Net's input and guided output for branches at one timestep, in one batch."""
        inputs = [branch.model_input() for branch in branches]
        output = self.pipe.unet(
            torch.cat(inputs * len(self.contexts)),
            branches[0].timestep,
            encoder_hidden_states=torch.cat(
                [context for context in self.contexts for _ in branches]
            ),
            return_dict=False,
        )[0]
        if self.guided:
            negative, positive = output.chunk(2)
            output = negative + self.settings.guidance_scale * (positive - negative)
        return list(zip(inputs, output.chunk(len(branches)), strict=True))

    def preview(self, x0: Tensor) -> list[Image.Image]:
        """Pictures of predicted clean latents, by the VAE or by the linear map."""
        if self.settings.preview == "vae":
            return self.decode(x0.to(self.contexts[0].dtype))
        rgb = latents_to_rgb(x0, self._linear_map)
        large = F.interpolate(rgb, scale_factor=self.pipe.vae_scale_factor, mode="bilinear")
        return self._pictures(large)

    @cached_property
    def _linear_map(self) -> Tensor:
        return linear_map(self.pipe.vae, self.device)

    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Pictures of clean latents, as diffusers' pipeline makes them.

        Raises ModelError for pixels that are not finite, as fp16 overflows give them.
        """
        vae = self.pipe.vae
        pixels = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
        if not pixels.isfinite().all():
            dtype = str(vae.dtype).removeprefix("torch.")
            raise ModelError(f"the picture is not finite in {dtype}; --dtype fp32 or bf16 may help")
        return self._pictures(pixels)

    def _pictures(self, pixels: Tensor) -> list[Image.Image]:
        normal = [True] * len(pixels)
        processor = self.pipe.image_processor
        return list(processor.postprocess(pixels, output_type="pil", do_denormalize=normal))

    def _noise(
        self, shape: Sequence[int], generators: list[torch.Generator], dtype: torch.dtype
    ) -> Tensor:
        return randn_tensor(tuple(shape), generator=generators, device=self.device, dtype=dtype)

    def _branch(self, step: int, generators: list[torch.Generator]) -> Branch:
        scheduler = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)
        if isinstance(scheduler, PNDMScheduler) and not scheduler.config.skip_prk_steps:
            raise InputError("PNDM must be used with skip_prk_steps=True, got False")
        scheduler.set_timesteps(self.settings.steps, device=self.device)
        extra = self.pipe.prepare_extra_step_kwargs(generators, eta=0.0)
        return Branch(scheduler, step, generators, extra)


class Branch:
    """A batch of pictures on its way down a schedule of its own, from a given step."""

    latents: Tensor  # (B, channels, h, w)

    def __init__(
        self, scheduler: Any, step: int, generators: list[torch.Generator], extra: dict[str, Any]
    ) -> None:
        self.scheduler = scheduler
        self.generators = generators
        self.evaluations = 0
        self._extra = extra
        self._step = step
        self._first = step * scheduler.order  # Heun's has two entries a step
        self.timesteps = timesteps_from(scheduler, self._first)
        # On the host, so that comparing timesteps does not wait for the device.
        self._host_timesteps = self.timesteps.tolist()
        self._last: tuple[Tensor, Tensor] | None = None
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(self._first)

    @property
    def timestep(self) -> Tensor:
        return self.timesteps[self.evaluations]

    @property
    def level(self) -> float:
        """The timestep to come, on the host."""
        return float(self._host_timesteps[self.evaluations])

    def reached(self, step: int) -> bool:
        """Whether `step` steps of the schedule are done."""
        return self.evaluations >= self.evaluations_until(step)

    def model_input(self) -> Tensor:
        return self.scheduler.scale_model_input(self.latents, self.timestep)

    def step(self, model_input: Tensor, output: Tensor) -> None:
        """One scheduler step with the U-Net's guided `output` for `model_input`."""
        self._last = model_input, output
        self.latents = self.scheduler.step(
            output, self.timestep, self.latents, **self._extra, return_dict=False
        )[0]
        self.evaluations += 1

    def prediction(self) -> tuple[Tensor, Tensor]:
        """x0 and eps of the last evaluation, float32, by the scheduler's prediction type.

        epsilon: x0 = (x - sigma eps) / alpha. v (Salimans & Ho 2022, arXiv:2202.00512):
        x0 = alpha x - sigma v, eps = sigma x + alpha v. sample: x0 itself.
        """
        assert self._last is not None
        x, output = (tensor.float() for tensor in self._last)
        alpha, sigma = self._signal_and_noise()
        kind = self.scheduler.config.prediction_type
        if kind == "v_prediction":
            return alpha * x - sigma * output, sigma * x + alpha * output
        if kind == "sample":
            return output, (x - alpha * output) / sigma
        return (x - sigma * output) / alpha, output

    def _signal_and_noise(self) -> tuple[float, float]:
        """alpha and sigma at the last evaluation."""
        done = self.evaluations - 1
        if hasattr(self.scheduler, "sigmas"):
            ratio = float(self.scheduler.sigmas[self._first + done])  # sigma / alpha
            alpha = (1 + ratio**2) ** -0.5
            return alpha, ratio * alpha
        alpha_squared = float(self.scheduler.alphas_cumprod[int(self._host_timesteps[done])])
        return alpha_squared**0.5, (1 - alpha_squared) ** 0.5

    def evaluations_until(self, step: int) -> int:
        """Evaluations from this branch's start until `step` steps of the schedule are done."""
        steps = step - self._step
        if isinstance(self.scheduler, PNDMScheduler):
            steps += steps > 0  # its first step takes two evaluations
        return min(steps * self.scheduler.order, len(self.timesteps))


def timesteps_from(scheduler: Any, first: int) -> Tensor:
    """The timesteps of the evaluations from entry `first` of the schedule to its end.

    PNDM without Runge-Kutta steps warms up by evaluating its second timestep twice, wherever it
    starts (Liu et al. 2022, arXiv:2202.09778; diffusers' `skip_prk_steps`).
    """
    if not isinstance(scheduler, PNDMScheduler):
        return scheduler.timesteps[first:]
    rest = scheduler.timesteps.unique().flip(0)[first:]  # descending
    return torch.cat([rest[:2], rest[1:]])


def descend(painter: Painter, branches: Sequence[Branch], until: int) -> Iterator[int]:
    """Denoise `branches` until step `until`; yields the number of U-Net calls just made.

    The noisiest go first, so that branches catch up with each other and share batches from there.
    """
    while waiting := [branch for branch in branches if not branch.reached(until)]:
        level = max(branch.level for branch in waiting)
        meeting = [branch for branch in waiting if branch.level == level]
        for branch, (model_input, output) in zip(meeting, painter.predict(meeting), strict=True):
            branch.step(model_input, output)
        yield sum(len(branch.latents) for branch in meeting)


def _clone(generator: torch.Generator) -> torch.Generator:
    clone = torch.Generator(generator.device)
    clone.set_state(generator.get_state())
    return clone
