"""Branches of a picture on the scheduler's schedule: start, denoise, pause, go back to more noise.

A branch is one picture on its way down; several may begin from one of them, each at a noise level
of its own. Branches at the same timestep share a call of the denoiser. x, x0, eps, alpha and sigma
are those of families.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from diffusers import PNDMScheduler
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Generator, Tensor

from errors import InputError, blaming, one_line
from families import Family, clean_and_noise
from memory import trim_heap
from settings import AUTO, BY_TAESD, Tempering

# Is called with the number of denoiser calls just made; a part of a picture makes a part of one.
Progress = Callable[[float], object]
LARGE = 256  # pixels of a side: what smaller pictures leave in memory is not worth the time
FLOW = "flow_prediction"  # a prediction type, and the schedule that goes with it


def unheard(calls: float) -> None:
    """Where progress goes when nobody asks."""


@dataclass(frozen=True, eq=False)
class Frame:
    """What a branch that paints a part of a picture is shown around it, at every step.

    So it paints its subject into the part. MultiDiffusion's bootstrapping (Bar-Tal et al. 2023,
    arXiv:2302.08113), kept up for the whole way.
    """

    inside: Tensor  # (1, 1, h, w) float32: 1 in the part, 0 around it
    clean: Tensor  # (1, channels, h, w) float32: latents of what is around it
    noise: Tensor  # the same: always that, so that the surroundings stay what they are

    def around(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """x with the surroundings at its noise level."""
        shown = alpha * self.clean + sigma * self.noise
        return torch.where(self.inside > 0, x, shown.to(x.dtype))


class Sampler:
    """A family on the schedule of `settings`, with the text of a batch encoded.

    `prompts` holds one text for each of the B pictures of the batch; what is drawn at random is the
    same on every device. The settings tell steps, size, guidance, negative prompt and preview.
    """

    def __init__(self, family: Family, prompts: Sequence[str], settings: Tempering) -> None:
        if settings.guidance_scale is None:
            settings = replace(settings, guidance_scale=family.guidance_scale)
        if settings.preview in BY_TAESD and family.taesd is None:
            raise InputError(
                f"preview {settings.preview} needs a tiny decoder in the pipeline's taesd, got none"
            )
        self.family = family
        self.settings = settings
        with torch.no_grad(), blaming("the text encoder"):
            self.conditionings = family.encode(
                prompts, settings.negative_prompt, settings.guidance_scale
            )

    def start(self, seeds: Sequence[int], rows: Sequence[int] | None = None) -> list[Branch]:
        """A branch a seed, of pure noise as diffusers' pipeline draws it from a CPU generator.

        `rows` says of which text each is (default: of all in order). Raises InputError for seeds
        that are not as many as rows, and for a size that the family does not paint.
        """
        embeddings = self.conditionings[0]["encoder_hidden_states"]
        rows = range(len(embeddings)) if rows is None else rows
        if len(seeds) != len(rows):
            raise InputError(
                f"a batch must have {len(rows)} seed{'s' * (len(rows) > 1)}, one a list of "
                f"prompts, got {len(seeds)}"
            )
        branches = []
        for row, seed in zip(rows, seeds, strict=True):
            branch = self.branch(row, 0, Generator().manual_seed(seed))
            noise = self.noise(self.shape, branch.generator, embeddings.dtype)
            branch.latents = noise * getattr(branch.scheduler, "init_noise_sigma", 1)
            branches.append(branch)
        return branches

    def denoise(self, branches: Sequence[Branch], until: int, report: Progress = unheard) -> None:
        """Denoise `branches` until step `until`; those that are there already stay as they are.

        The noisiest go first, so that branches catch up with each other and share batches from
        there.
        """
        while waiting := [branch for branch in branches if not branch.reached(until)]:
            first = max(waiting, key=lambda branch: branch.level)
            meeting = [branch for branch in waiting if branch.can_join(first)]
            self.step(meeting)
            report(sum(branch.share for branch in meeting))

    def step(self, branches: Sequence[Branch]) -> None:
        """One evaluation of branches at one timestep and of one shape, in one batch."""
        inputs = [branch.x() for branch in branches]
        rows = [branch.row for branch in branches]
        given = self.conditionings
        conditioning = {name: torch.cat([each[name][rows] for each in given]) for name in given[0]}
        latents = torch.cat(inputs * len(given))
        with blaming("the denoiser"):
            output = self.family.predict(latents, branches[0].timestep, conditioning)
        outputs = output.chunk(len(given))
        guided = self.guide(outputs, self.settings.guidance_scale)
        for i, (branch, x) in enumerate(zip(branches, inputs, strict=True)):
            branch.step(x, [each[i : i + 1] for each in outputs], guided[i : i + 1])

    def guide(self, outputs: Sequence[Tensor], scale: float) -> Tensor:
        """One output of the denoiser's for each conditioning: classifier-free guidance."""
        if len(outputs) == 1:
            return outputs[0]
        negative, positive = outputs
        return negative + scale * (positive - negative)

    def prediction(self, branch: Branch, guidance_scale: float) -> tuple[Tensor, Tensor]:
        """x0 and eps, float32, of the last evaluation, had it been at this guidance."""
        return branch.clean_and_noise(self.guide(branch.last[1], guidance_scale))

    def go_back(
        self, branch: Branch, x0: Tensor, noise: Tensor, step: int, generator: Generator
    ) -> Branch:
        """A new branch of the same picture from the noise level of `step`: alpha x0 + sigma noise.

        `branch` stays as it is, and a multistep scheduler's history is left behind. `noise` must
        have unit variance to be on the schedule.
        """
        back = self.branch(branch.row, step, generator)
        # Where no step is undone, there is no noise left.
        dtype, undone = branch.latents.dtype, len(back.timesteps)
        back.latents = noised_to(back, x0, noise).to(dtype) if undone else branch.latents
        return back

    def preview(self, branches: Sequence[Branch], guidance_scale: float) -> list[Image.Image]:
        """Pictures of the last evaluations' x0."""
        return self.preview_of([self.prediction(each, guidance_scale)[0] for each in branches])

    def preview_of(self, clean: Sequence[Tensor]) -> list[Image.Image]:
        """Pictures of any x0, each (1, channels, h, w)."""
        with blaming("the preview"):
            return self.family.previews(torch.cat(list(clean)), self.preview_by)

    @cached_property
    def preview_by(self) -> str:
        """The preview that runs, where the settings leave it to what there is."""
        asked = self.settings.preview
        return self.family.preview_for(self.shape) if asked == AUTO else asked

    def decode(self, branches: Sequence[Branch]) -> list[Image.Image]:
        """The pictures of branches that are denoised to the end."""
        self.trim()  # the VAE takes the most: it shall not come on top of what the denoiser left
        with blaming("the VAE"):
            return self.family.decode(torch.cat([branch.latents for branch in branches]))

    def trim(self) -> None:
        """Give back the memory that large pictures leave behind."""
        side = min(self.shape[-2:]) * self.family.pipe.vae_scale_factor
        if side >= LARGE:
            trim_heap()

    def noise(self, shape: Sequence[int], generator: Generator, dtype: torch.dtype) -> Tensor:
        """Noise of unit variance."""
        device = self.family.device
        return randn_tensor(tuple(shape), generator=generator, device=device, dtype=dtype)

    @cached_property
    def shape(self) -> tuple[int, int, int, int]:
        """The latents' shape of one picture, (1, channels, h, w)."""
        return self.family.latents_shape(self.settings.height, self.settings.width)

    def evaluations(self, first: int, until: int) -> int:
        """How many evaluations take a branch from step `first` to step `until`."""
        return self.branch(0, first, Generator()).evaluations_until(until)

    def branch(self, row: int, step: int, generator: Generator) -> Branch:
        """A branch of picture `row` of the batch from `step` on; its latents are to be set."""
        return Branch(self.schedule(), row, step, generator)

    def schedule(self) -> Any:
        """A fresh scheduler of the pipeline's class and settings, with the run's timesteps."""
        own = self.family.pipe.scheduler
        with blaming("the scheduler"):
            scheduler = type(own).from_config(own.config)
            name, config, steps = type(own).__name__, scheduler.config, self.settings.steps
            if isinstance(scheduler, PNDMScheduler) and not config.skip_prk_steps:
                raise InputError("PNDM must be used with skip_prk_steps=True, got False")
            check_schedule(scheduler)
            options = {}
            if config.get("use_dynamic_shifting"):
                options["mu"] = self.family.shift(config, self.shape)
            try:
                scheduler.set_timesteps(steps, device=self.family.device, **options)
            except ValueError as error:
                text = f"steps must be a number that {name} can take, got {steps}"
                raise InputError(f"{text} ({one_line(error)})") from error
            return scheduler


class Branch:
    """One picture on its way down a schedule of its own, from a given step."""

    latents: Tensor  # (1, channels, h, w), in the scheduler's own scaling

    def __init__(self, scheduler: Any, row: int, step: int, generator: Generator) -> None:
        self.scheduler = scheduler
        self.row = row  # of the batch's text
        self.generator = generator
        self.evaluations = 0
        self.first = step  # of the schedule
        self._first = step * scheduler.order  # Heun's has two entries a step
        self.timesteps = timesteps_from(scheduler, self._first)
        # On the host, so that comparing timesteps does not wait for the device.
        self._host_timesteps = self.timesteps.tolist()
        self._last: tuple[Tensor, Sequence[Tensor]] | None = None
        draws = "generator" in inspect.signature(scheduler.step).parameters
        self._options = {"generator": generator} if draws else {}
        self.frame: Frame | None = None  # of a branch that paints a part of the picture
        self.share: float = 1  # what an evaluation costs, in those of a whole picture
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(self._first)

    @property
    def timestep(self) -> Tensor:
        return self.timesteps[self.evaluations]

    @property
    def level(self) -> float:
        """The timestep to come, on the host."""
        return float(self._host_timesteps[self.evaluations])

    @property
    def last(self) -> tuple[Tensor, Sequence[Tensor]]:
        """x of the last evaluation, and the denoiser's outputs for it: one a conditioning."""
        assert self._last is not None, "no step was taken"
        return self._last

    def can_join(self, other: Branch) -> bool:
        """Whether both can share their next evaluation."""
        return self.level == other.level and self.latents.shape == other.latents.shape

    @property
    def cost(self) -> float:
        """What its evaluations cost, in those of a whole picture."""
        return self.evaluations * self.share

    def reached(self, step: int) -> bool:
        """Whether `step` steps of the schedule are done."""
        return self.evaluations >= self.evaluations_until(step)

    def x(self) -> Tensor:
        """The latents as the denoiser takes them at the timestep to come."""
        x = self.latents
        if hasattr(self.scheduler, "scale_model_input"):  # schedulers made for flows have it not
            x = self.scheduler.scale_model_input(x, self.timestep)
        return self.frame.around(x, *self.levels(self.evaluations)) if self.frame else x

    def step(self, x: Tensor, outputs: Sequence[Tensor], guided: Tensor) -> None:
        """One scheduler step by `guided`, which guidance has made of the `outputs` for `x`."""
        self._last = x, outputs
        with blaming("the scheduler"):
            self.latents = self.scheduler.step(
                guided, self.timestep, self.latents, **self._options, return_dict=False
            )[0]
        self.evaluations += 1

    def clean_and_noise(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """x0 and eps, float32, if `output` is the denoiser's at the last evaluation."""
        kind = prediction_type(self.scheduler)
        return clean_and_noise(kind, self.last[0], output, *self.levels(self.evaluations - 1))

    def levels(self, number: int) -> tuple[float, float]:
        """alpha and sigma at an evaluation, by its number from 0."""
        if hasattr(self.scheduler, "sigmas"):
            level = float(self.scheduler.sigmas[self._first + number])
            if prediction_type(self.scheduler) == FLOW:
                return 1 - level, level
            alpha = (1 + level**2) ** -0.5  # there sigmas are sigma / alpha
            return alpha, level * alpha
        alpha_squared = float(self.scheduler.alphas_cumprod[int(self._host_timesteps[number])])
        return alpha_squared**0.5, (1 - alpha_squared) ** 0.5

    def evaluations_until(self, step: int) -> int:
        """Evaluations from this branch's start until `step` steps of the schedule are done."""
        steps = step - self.first
        if isinstance(self.scheduler, PNDMScheduler):
            steps += steps > 0  # its first step takes two evaluations
        return min(steps * self.scheduler.order, len(self.timesteps))


def check_schedule(scheduler: Any) -> None:
    """Raise InputError for a scheduler of EDM (Karras et al. 2022), which scales x differently."""
    if "sigma_data" in scheduler.config:
        name = type(scheduler).__name__
        raise InputError(f"the model's schedule must be Stable Diffusion's or a flow's, got {name}")


def prediction_type(scheduler: Any) -> str:
    """What the scheduler takes the denoiser's output for; those made for flows need not say it."""
    return scheduler.config.get("prediction_type", FLOW)


def noised_to(branch: Branch, x0: Tensor, noise: Tensor) -> Tensor:
    """Latents for a branch that has not begun, where it begins: alpha x0 + sigma noise, scaled."""
    scheduler, timestep = branch.scheduler, branch.timesteps[:1]
    if hasattr(scheduler, "scale_noise"):  # made for flows
        return scheduler.scale_noise(x0, timestep, noise)
    return scheduler.add_noise(x0, noise, timestep)


def timesteps_from(scheduler: Any, first: int) -> Tensor:
    """The timesteps of the evaluations from entry `first` of the schedule to its end.

    PNDM without Runge-Kutta steps warms up by evaluating its second timestep twice, wherever it
    starts (Liu et al. 2022, arXiv:2202.09778; diffusers' `skip_prk_steps`).
    """
    if not isinstance(scheduler, PNDMScheduler):
        return scheduler.timesteps[first:]
    rest = scheduler.timesteps.unique().flip(0)[first:]  # descending
    return torch.cat([rest[:2], rest[1:]])
