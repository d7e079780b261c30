"""Tempering: denoise, look, put noise back where the classes are uncertain, denoise again.

| symbol | name here      | meaning                                                            |
|--------|----------------|--------------------------------------------------------------------|
| x      | latents        | (1, channels, h, w), at the noise level of the step to come        |
| x0     | x0             | clean latents that the denoiser predicts from x                    |
| eps    | eps            | noise that the denoiser predicts, guidance included                |
| alpha  | alpha          | signal scale at a timestep, sqrt(alphas_cumprod)                   |
| sigma  | sigma          | noise scale, sqrt(1 - alphas_cumprod): x = alpha x0 + sigma eps    |
| g      | guidance_scale | weight of classifier-free guidance                                 |
| gamma  | gamma          | share of fresh noise in eps, per pixel (annealing.py)              |

The method is Alberto García Núñez's (master's thesis, UNIR); the re-noising here stays on the
scheduler's own schedule for every k, and rounds of it are simulated annealing proper.
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

from annealing import cooled_depth, cooled_temperature, gamma_map, keeps, mix_noise
from errors import InputError, ModelError
from segmentation import (
    ClipSeg,
    View,
    embed_prompts,
    latents_to_rgb,
    linear_map,
    segment,
    view_of,
)
from settings import Tempering, check_prompts

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

__all__ = ["Painter", "Result", "Tempering", "View", "temper"]

Progress = Callable[[int], None]
DEFAULTS = Tempering()


@dataclass(frozen=True)
class Round:
    """What came of one round: the best energy that it found, where, and whether it was kept."""

    backsteps: int
    step: int  # the look that it came to: `stoptime`, or the early one
    energy: float
    kept: bool


@dataclass(frozen=True)
class Result:
    """One tempered picture and what was seen on the way."""

    image: Image.Image
    plain: Image.Image | None  # the untempered picture of the same seed, where it was asked for
    interrupted: View  # what CLIPSeg saw before any round
    interrupted_at: int  # step of that look
    kept: View | None  # what it saw in what was kept; None for a single round: no look
    kept_at: int | None
    rounds: tuple[Round, ...]  # those that ran; empty for a single round
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


@dataclass(frozen=True)
class State:
    """A picture at a look: its branch, paused there, and what is about to be painted."""

    branch: Branch
    step: int  # of the look, one of `Tempering.looks`
    x0: Tensor  # (1, channels, h, w) float32
    eps: Tensor  # the same
    view: View


@dataclass
class Walk:
    """The way of one picture through the rounds."""

    first: State
    kept: State
    generator: torch.Generator  # of everything random from `stoptime` on
    branches: list[Branch]  # all that were begun, the plain picture's first
    rounds: list[Round]


class Painter:
    """A pipeline and a CLIPSeg with the text of one run encoded: paints, looks and tempers.

    `prompts` holds the prompts of each of the B pictures of a batch, the same number for each.
    One painter serves any number of batches, so text is encoded once. Raises InputError for prompts
    that are missing or empty, or not as many for each picture.
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
        counts = dict.fromkeys(len(each) for each in prompts)
        if len(counts) != 1:
            raise InputError(
                f"pictures of a batch must have the same number of prompts, got "
                f"{' and '.join(map(str, counts)) or 'no picture'}"
            )
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
        trunks = self.start(seeds)
        walks = [self._walk(state) for state in self.follow(trunks, report)]
        tempered = self.anneal(walks, report) if self.settings.rounds > 1 else self.once(walks)
        # A picture that was good enough at once is its own plain picture: one branch, not two.
        branches = list(dict.fromkeys([*tempered, *(trunks if compare else [])]))
        self.descend(branches, self.settings.steps, report)

        images = self._decode_all(tempered)
        plain = self._decode_all(trunks) if compare else [None] * len(seeds)
        self.pipe.maybe_free_model_hooks()
        return [
            Result(
                image=image,
                plain=before,
                interrupted=walk.first.view,
                interrupted_at=walk.first.step,
                kept=walk.kept.view if self.settings.rounds > 1 else None,
                kept_at=walk.kept.step if self.settings.rounds > 1 else None,
                rounds=tuple(walk.rounds),
                seed=seed,
                unet_calls=sum(branch.evaluations for branch in walk.branches),
            )
            for image, before, walk, seed in zip(images, plain, walks, seeds, strict=True)
        ]

    def once(self, walks: Sequence[Walk]) -> list[Branch]:
        """The seed's tempering: every picture goes back once, and what comes of it is taken."""
        return [self.propose(walk, self.settings.backsteps) for walk in walks]

    def anneal(self, walks: Sequence[Walk], report: Progress) -> list[Branch]:
        """The branches that are kept after all rounds, each paused at the look it came to.

        A round goes back from the kept states of the pictures that are not good enough yet; the
        others have left the batch.
        """
        settings = self.settings
        for number in range(1, settings.rounds + 1):
            depth = cooled_depth(settings.backsteps, settings.cooling, number)
            temperature = cooled_temperature(settings.temperature, number, settings.rounds)
            hot = [walk for walk in walks if not self.good(walk.kept)]
            if not hot or not depth:  # going back by no step changes nothing
                break
            proposed = [
                self.propose(walk, depth) for walk in hot for _ in range(settings.candidates)
            ]
            found = iter(self.follow(proposed, report))
            for walk in hot:
                states = [next(found) for _ in range(settings.candidates)]
                settle(walk, states, depth, temperature)
        return [walk.kept.branch for walk in walks]

    def follow(self, branches: Sequence[Branch], report: Progress) -> list[State]:
        """Denoise to `stoptime`; the state of each branch at the last look that it came to.

        One that looks bad at the early look is left there, as delayed acceptance spares the dear
        test where the cheap one has failed (Christen & Fox 2005). A branch that starts later is
        not looked at early.
        """
        found: dict[Branch, State] = {}
        going = list(branches)
        for step in self.settings.looks:
            self.descend(going, step, report)
            seen = [branch for branch in going if branch.first < step]
            found.update(zip(seen, self.examine(seen, step), strict=True))
            going = [each for each in going if each not in seen or self.promising(found[each])]
        return [found[branch] for branch in branches]

    def promising(self, state: State) -> bool:
        return state.view.energy <= self.settings.early_accept

    def good(self, state: State) -> bool:
        """Whether no round is needed any more."""
        settings = self.settings
        return state.step == settings.stoptime and state.view.energy <= settings.accept

    def propose(self, walk: Walk, backsteps: int) -> Branch:
        """A new branch from the kept state, `backsteps` back, with noise where it is uncertain."""
        state, settings = walk.kept, self.settings
        height, width = state.x0.shape[-2:]
        gamma = gamma_map(
            state.view,
            (height, width),
            k=settings.k,
            background=settings.background,
            by_pixel=settings.uncertainty == "pixel",
        )
        branch = self.go_back(state, max(0, state.step - backsteps), gamma, walk.generator)
        walk.branches.append(branch)
        return branch

    def unet_calls(self, *, compare: bool) -> int:
        """U-Net evaluations of one tempered picture, with its plain one where `compare` is set.

        With several rounds this is the most that it can take.
        """
        settings = self.settings
        early, stop, end = settings.looks[0], settings.stoptime, settings.steps
        plain = self._counter(0)
        to_stop = plain.evaluations_until(stop)
        to_the_end = plain.evaluations_until(end) - to_stop
        total = to_stop + to_the_end * compare
        if settings.rounds == 1:
            return total + self._counter(stop - settings.backsteps).evaluations_until(end)
        for number in range(1, settings.rounds + 1):
            depth = cooled_depth(settings.backsteps, settings.cooling, number)
            total += settings.candidates * self._counter(stop - depth).evaluations_until(stop)
        # A picture that is left at the early look spares the way from there to `stoptime` (not with
        # `compare`, which paints it anyway); all candidates of one round may go it later.
        total += (settings.candidates - 1 + compare) * (to_stop - plain.evaluations_until(early))
        return total + to_the_end

    def _counter(self, step: int) -> Branch:
        """A branch that only tells how many evaluations there are from `step` on."""
        return self.branch(0, step, torch.Generator())

    def examine(self, branches: Sequence[Branch], step: int) -> list[State]:
        """The states of branches that are paused after `step`, with what CLIPSeg sees in them."""
        if not branches:
            return []
        predictions = [branch.prediction() for branch in branches]
        images = self.preview(torch.cat([branch.seen() for branch in branches]))
        views = self.look(images, [branch.row for branch in branches])
        return [
            State(branch, step, x0, eps, view)
            for branch, (x0, eps), view in zip(branches, predictions, views, strict=True)
        ]

    def look(self, images: Sequence[Image.Image], rows: Sequence[int] | None = None) -> list[View]:
        """CLIPSeg's view of each image; `rows` says whose prompts (default: of all B in order)."""
        embeddings = self.embeddings if rows is None else self.embeddings[list(rows)]
        found = segment(self.clipseg, images, embeddings)
        return [
            view_of(image, probabilities, self.settings.threshold)
            for image, probabilities in zip(images, found, strict=True)
        ]

    def start(self, seeds: Sequence[int]) -> list[Branch]:
        """A branch a seed, of pure noise as diffusers' pipeline draws it from a CPU generator.

        Raises InputError for seeds that are not as many as the batch's pictures, and for a size
        that is no multiple of the VAE's factor.
        """
        batch = len(self.embeddings)
        if len(seeds) != batch:
            raise InputError(
                f"a batch must have {batch} seed{'s' * (batch > 1)}, one a list of prompts, got "
                f"{len(seeds)}"
            )
        unet = self.pipe.unet.config
        factor = self.pipe.vae_scale_factor
        height = self.settings.height or unet.sample_size * factor
        width = self.settings.width or unet.sample_size * factor
        if height % factor or width % factor:
            raise InputError(f"sizes must be multiples of {factor} pixels, got {width}x{height}")
        shape = (1, unet.in_channels, height // factor, width // factor)
        branches = []
        for row, seed in enumerate(seeds):
            branch = self.branch(row, 0, torch.Generator().manual_seed(seed))
            noise = self.noise(shape, branch.generator, self.contexts[0].dtype)
            branch.latents = noise * branch.scheduler.init_noise_sigma
            branches.append(branch)
        return branches

    def go_back(self, state: State, step: int, gamma: Tensor, generator: torch.Generator) -> Branch:
        """A new branch from the noise level of `step`; `state` stays as it is.

        x <- alpha x0 + sigma (sqrt(1 - gamma) eps + sqrt(gamma) fresh noise), with `gamma`
        (1, 1, h, w). A multistep scheduler's history is left behind.
        """
        branch = self.branch(state.branch.row, step, generator)
        if not len(branch.timesteps):
            branch.latents = state.branch.latents  # no step was undone: there is no noise left
            return branch
        fresh = self.noise(state.x0.shape, generator, torch.float32)
        scale = self.settings.cfg_rescale / 10
        noise = mix_noise(state.eps, fresh, gamma.to(state.eps.device), scale)
        latents = branch.scheduler.add_noise(state.x0, noise, branch.timesteps[:1])
        branch.latents = latents.to(state.branch.latents.dtype)
        return branch

    def descend(self, branches: Sequence[Branch], until: int, report: Progress) -> None:
        """Denoise `branches` until step `until`; `report` hears of every U-Net call."""
        for calls in descend(self, branches, until):
            report(calls)

    def predict(self, branches: Sequence[Branch]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """The U-Net's input and guided output for branches at one timestep, in one batch.

        Each third is the output at `look_guidance`. Full guidance overshoots in the first half of
        the way: there its x0 is glaring, and CLIPSeg can not tell good from bad in it.
        """
        inputs = [branch.model_input() for branch in branches]
        rows = [branch.row for branch in branches]
        output = self.pipe.unet(
            torch.cat(inputs * len(self.contexts)),
            branches[0].timestep,
            encoder_hidden_states=torch.cat([context[rows] for context in self.contexts]),
            return_dict=False,
        )[0]
        outputs = output.chunk(len(self.contexts))
        scale = self.settings.guidance_scale
        guided = self.guide(outputs, scale).chunk(len(branches))
        seen = self.guide(outputs, min(self.settings.look_guidance, scale)).chunk(len(branches))
        return list(zip(inputs, guided, seen, strict=True))

    def guide(self, outputs: Sequence[Tensor], scale: float) -> Tensor:
        """One output of the U-Net's for each of `contexts`: classifier-free guidance."""
        if not self.guided:
            return outputs[0]
        negative, positive = outputs
        return negative + scale * (positive - negative)

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
        """Pictures of clean latents (B, channels, h, w), as diffusers' pipeline makes them.

        Raises ModelError for pixels that are not finite, as fp16 overflows give them.
        """
        vae = self.pipe.vae
        pixels = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
        if not pixels.isfinite().all():
            dtype = str(vae.dtype).removeprefix("torch.")
            raise ModelError(f"the picture is not finite in {dtype}; --dtype fp32 or bf16 may help")
        return self._pictures(pixels)

    def _decode_all(self, branches: Sequence[Branch]) -> list[Image.Image]:
        return self.decode(torch.cat([branch.latents for branch in branches]))

    def _pictures(self, pixels: Tensor) -> list[Image.Image]:
        normal = [True] * len(pixels)
        processor = self.pipe.image_processor
        return list(processor.postprocess(pixels, output_type="pil", do_denormalize=normal))

    def noise(self, shape: Sequence[int], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        """Noise of unit variance, the same on every device."""
        return randn_tensor(tuple(shape), generator=generator, device=self.device, dtype=dtype)

    def branch(self, row: int, step: int, generator: torch.Generator) -> Branch:
        """A branch of picture `row` of the batch from `step` on; its latents are to be set."""
        scheduler = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)
        if isinstance(scheduler, PNDMScheduler) and not scheduler.config.skip_prk_steps:
            raise InputError("PNDM must be used with skip_prk_steps=True, got False")
        scheduler.set_timesteps(self.settings.steps, device=self.device)
        extra = self.pipe.prepare_extra_step_kwargs(generator, eta=0.0)
        return Branch(scheduler, row, step, generator, extra)

    def _walk(self, state: State) -> Walk:
        # The trunk's random stream goes on here: fresh noise never repeats the noise at the start.
        generator = _clone(state.branch.generator)
        return Walk(state, state, generator, [state.branch], [])


def settle(walk: Walk, proposed: Sequence[State], backsteps: int, temperature: float) -> None:
    """End a round: the best of `proposed` takes the place of the kept state, or does not."""
    best = min(proposed, key=lambda state: (-state.step, state.view.energy))
    draw = float(torch.rand((), generator=walk.generator))
    # Who has come further passed the early look; energies of different looks are not compared.
    kept = best.step > walk.kept.step or (
        best.step == walk.kept.step
        and keeps(best.view.energy, walk.kept.view.energy, temperature, draw)
    )
    walk.rounds.append(Round(backsteps, best.step, best.view.energy, kept))
    if kept:
        walk.kept = best


class Branch:
    """One picture on its way down a schedule of its own, from a given step."""

    latents: Tensor  # (1, channels, h, w)

    def __init__(
        self,
        scheduler: Any,
        row: int,
        step: int,
        generator: torch.Generator,
        extra: dict[str, Any],
    ) -> None:
        self.scheduler = scheduler
        self.row = row  # of the batch's text
        self.generator = generator
        self.evaluations = 0
        self.first = step  # of the schedule
        self._extra = extra
        self._first = step * scheduler.order  # Heun's has two entries a step
        self.timesteps = timesteps_from(scheduler, self._first)
        # On the host, so that comparing timesteps does not wait for the device.
        self._host_timesteps = self.timesteps.tolist()
        self._last: tuple[Tensor, Tensor, Tensor] | None = None
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

    def step(self, model_input: Tensor, output: Tensor, seen: Tensor) -> None:
        """One scheduler step with the U-Net's guided `output` for `model_input`.

        `seen` is the output at the guidance at which one looks.
        """
        self._last = model_input, output, seen
        self.latents = self.scheduler.step(
            output, self.timestep, self.latents, **self._extra, return_dict=False
        )[0]
        self.evaluations += 1

    def prediction(self) -> tuple[Tensor, Tensor]:
        """x0 and eps of the last evaluation, float32."""
        assert self._last is not None
        return self._clean_and_noise(self._last[0], self._last[1])

    def seen(self) -> Tensor:
        """x0 of the last evaluation, float32, at the guidance at which one looks."""
        assert self._last is not None
        return self._clean_and_noise(self._last[0], self._last[2])[0]

    def _clean_and_noise(self, model_input: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """x0 and eps by the scheduler's prediction type.

        epsilon: x0 = (x - sigma eps) / alpha. v (Salimans & Ho 2022, arXiv:2202.00512):
        x0 = alpha x - sigma v, eps = sigma x + alpha v. sample: x0 itself.
        """
        x, output = model_input.float(), output.float()
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
        steps = step - self.first
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
        for branch, predicted in zip(meeting, painter.predict(meeting), strict=True):
            branch.step(*predicted)
        yield len(meeting)


def _clone(generator: torch.Generator) -> torch.Generator:
    clone = torch.Generator(generator.device)
    clone.set_state(generator.get_state())
    return clone
