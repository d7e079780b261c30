"""The methods that the laboratory compares: one function each, from the same initial latents.

A method paints a batch of cases and says what each picture cost, in U-Net calls: evaluations of the
U-Net, of which the two halves of classifier-free guidance are one. Neither are the backward passes
counted that Attend-and-Excite needs, nor what looking costs: a decoding and a run of CLIPSeg for
every picture that best of N and tempering look at. The seconds show them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.pipelines import StableDiffusionAttendAndExcitePipeline
from PIL import Image
from torch import Tensor

from benchmarks.prompts import Prompt, crowd, development
from budget import Energies, Sample
from families import family_of
from loaders import scheduler_of
from sampling import Branch, Sampler
from segmentation import ClipSeg
from settings import CROWD, DEFAULT_MOST, Tempering
from tempering import Painter, Watched, walked

# Seeds of a picture's further candidates, far from those of other pictures.
NEXT_CANDIDATE = 1_000_003
SAMPLE = 32  # pictures a subset, whose energies are the lab's calibration
FIRST_SAMPLED = 970_000  # their seeds
WALKED = 2.0  # by this budget at least: a sample tells of lower ones, too


@dataclass(frozen=True)
class Case:
    """One picture to be painted."""

    prompt: Prompt
    seed: int


@dataclass(frozen=True)
class Painted:
    """A picture and what it cost."""

    image: Image.Image
    unet_calls: float


@dataclass(frozen=True)
class Models:
    """What a method may use. The judge is not among it."""

    pipe: StableDiffusionPipeline
    clipseg: ClipSeg

    def sampler(self, cases: Sequence[Case], settings: Tempering) -> Sampler:
        """A sampler of `cases`, for methods that do not look."""
        return Sampler(family_of(self.pipe), [case.prompt.text for case in cases], settings)

    def painter(
        self,
        cases: Sequence[Case],
        settings: Tempering,
        limits: Energies | None = None,
        kind: Callable[..., Painter] = Painter,
    ) -> Painter:
        """A painter of `cases`, which share one joiner."""
        settings = replace(settings, joiner=cases[0].prompt.joiner)
        prompts = [case.prompt.phrases for case in cases]
        return kind(self.pipe, self.clipseg, prompts, settings, limits)

    def limits(
        self, settings: Tempering, kind: Callable[..., Painter] = Painter, subjects: int = 2
    ) -> Energies:
        """The energies at which to stop, by a sample of prompts that are not reported.

        Of settings that give them both, there is nothing to be found.
        """
        if settings.accept is not None and settings.early_accept is not None:
            return Energies(settings.early_accept, settings.accept)
        row = sampled_prompts(subjects)[0][:1]
        settings = settings.of_subjects(subjects)
        painter = self.painter([Case(prompt, 0) for prompt in row], settings, kind=kind)
        walked_by = replace(settings, budget=max(WALKED, settings.budget))
        if settings.max_cost == DEFAULT_MOST * settings.budget:
            walked_by = replace(walked_by, max_cost=DEFAULT_MOST * walked_by.budget)
        return painter.sought(sample(self, scheduler_of(self.pipe), walked_by, kind, subjects))


def sampled_prompts(subjects: int) -> list[list[Prompt]]:
    """The subsets of which a sample is taken: the laboratory's, of more subjects one of their own.

    None of them is reported.
    """
    return [crowd(subjects, seed=1)] if subjects >= CROWD else list(development().values())


@lru_cache
def sample(
    models: Models,
    scheduler: str,
    settings: Tempering,
    kind: Callable[..., Painter],
    subjects: int,
) -> Sample:
    """A sample of `SAMPLE` pictures a subset, by the pipeline's `scheduler`."""
    pictures: list[tuple[Painter, Watched]] = []
    for number, prompts in enumerate(sampled_prompts(subjects)):
        first = FIRST_SAMPLED + number * SAMPLE
        cases = [Case(prompt, first + i) for i, prompt in enumerate(prompts[:SAMPLE])]
        painter = models.painter(cases, settings, kind=kind)
        pictures += [(painter, watched) for watched in painter.watch(seeds(cases))]
    return walked(pictures)


Method = Callable[[Models, Sequence[Case]], list[Painted]]


def seeds(cases: Sequence[Case]) -> list[int]:
    return [case.seed for case in cases]


def paint(sampler: Sampler, branches: Sequence[Branch]) -> list[Image.Image]:
    """Denoise to the end and decode."""
    sampler.denoise(branches, sampler.settings.steps)
    return sampler.decode(branches)


@torch.no_grad()
def plain(models: Models, cases: Sequence[Case], settings: Tempering) -> list[Painted]:
    """The sampler as it is."""
    sampler = models.sampler(cases, settings)
    branches = sampler.start(seeds(cases))
    images = paint(sampler, branches)
    return [Painted(i, b.evaluations) for i, b in zip(images, branches, strict=True)]


def tempered(
    models: Models,
    cases: Sequence[Case],
    settings: Tempering,
    *,
    calibrated: bool = True,
    kind: Callable[..., Painter] = Painter,
) -> list[Painted]:
    """This program; where it is not `calibrated`, by the rule that needs no sample."""
    limits = None
    if calibrated and settings.annealed:
        limits = models.limits(settings, kind, len(cases[0].prompt.nouns))
    results = models.painter(cases, settings, limits, kind).temper(seeds(cases))
    return [Painted(result.image, result.unet_calls) for result in results]


@torch.no_grad()
def best_of_n(
    models: Models,
    cases: Sequence[Case],
    settings: Tempering,
    n: int,
    accept: float | None = None,
) -> list[Painted]:
    """Of `n` pictures the one of the lowest energy; none is painted after one of `accept` or less.

    The same CLIPSeg and the same energy as the tempering's, and the same `accept`, where none is
    given.
    """
    if accept is None:
        accept = models.limits(settings).last
    best: list[tuple[float, Image.Image] | None] = [None] * len(cases)
    calls = [0] * len(cases)
    for number in range(n):
        rows = [i for i, found in enumerate(best) if found is None or found[0] > accept]
        if not rows:
            break
        painter = models.painter([cases[i] for i in rows], settings)
        branches = painter.sampler.start([cases[i].seed + number * NEXT_CANDIDATE for i in rows])
        images = paint(painter.sampler, branches)
        for i, branch, view in zip(rows, branches, painter.look_twice(images), strict=True):
            calls[i] += branch.evaluations
            found = best[i]
            if found is None or view.energy < found[0]:
                best[i] = view.energy, view.image
    return [Painted(found[1], cost) for found, cost in zip(best, calls, strict=True) if found]


class ComposableSampler(Sampler):
    """Composable Diffusion (Liu et al. 2022, arXiv:2206.01714): the sum of the sub-prompts' scores.

    eps = eps_negative + sum_i w_i (eps_i - eps_negative), with a weight for each conditioning but
    the first.
    """

    weights: Sequence[float]

    def guide(self, outputs: Sequence[Tensor], scale: float) -> Tensor:
        negative, *positives = outputs
        terms = [w * (each - negative) for w, each in zip(self.weights, positives, strict=True)]
        return negative + torch.stack(terms).sum(dim=0)


@torch.no_grad()
def composable(
    models: Models, cases: Sequence[Case], settings: Tempering, weight: float, joined: float = 0
) -> list[Painted]:
    """Composable Diffusion, `weight` for each sub-prompt.

    With a weight `joined` the whole prompt is one of the terms, too, as users of AND write it where
    the sum of the parts alone, as in the paper, grows the subjects together.
    """
    family = family_of(models.pipe)
    sampler = ComposableSampler(family, [case.prompt.text for case in cases], settings)
    phrases = [case.prompt.phrases for case in cases]
    parts = [family.encode(of_one_place, "", 1)[0] for of_one_place in zip(*phrases, strict=True)]
    negative, whole = sampler.conditionings
    wholes = [whole] if joined else []
    sampler.conditionings = [negative, *wholes, *parts]
    sampler.weights = [joined] * len(wholes) + [weight] * len(parts)
    branches = sampler.start(seeds(cases))
    images = paint(sampler, branches)
    halves = len(sampler.conditionings) / 2
    return [Painted(i, b.evaluations * halves) for i, b in zip(images, branches, strict=True)]


@torch.no_grad()
def restart(
    models: Models, cases: Sequence[Case], settings: Tempering, times: int
) -> list[Painted]:
    """Restart sampling (Xu et al. 2023, arXiv:2306.14878): `times` times back with fresh noise.

    From `stoptime` by `backsteps`, everywhere, whatever the picture shows. In Euler's scaling of
    the latents: x + sqrt(sigma_hi^2 - sigma_lo^2) noise.
    """
    sampler = models.sampler(cases, settings)
    stop, step = settings.stoptime, settings.stoptime - settings.backsteps
    branches = sampler.start(seeds(cases))
    calls = [0] * len(cases)
    for _ in range(times):
        sampler.denoise(branches, stop)
        calls = [cost + branch.evaluations for cost, branch in zip(calls, branches, strict=True)]
        branches = [noisier(sampler, branch, stop, step) for branch in branches]
    images = paint(sampler, branches)
    return [
        Painted(image, cost + branch.evaluations)
        for image, cost, branch in zip(images, calls, branches, strict=True)
    ]


def noisier(sampler: Sampler, branch: Branch, at: int, to: int) -> Branch:
    """A branch from step `to` with the latents of one at step `at` and the noise between them."""
    again = sampler.branch(branch.row, to, branch.generator)
    low, high = (again.scheduler.sigmas[step] for step in (at, to))
    noise = sampler.noise(branch.latents.shape, branch.generator, branch.latents.dtype)
    again.latents = branch.latents + (high**2 - low**2).sqrt() * noise
    return again


def attend_and_excite(
    models: Models,
    cases: Sequence[Case],
    settings: Tempering,
    scale_factor: float,
    watch: Callable[[int, int, Tensor], None] | None = None,
) -> list[Painted]:
    """Attend-and-Excite (Chefer et al. 2023, arXiv:2301.13826) as diffusers has it.

    Its schedule of 50 steps (altered in the first half, refined at steps 0, 10 and 20) is brought
    to `steps`. It needs a scheduler that does not scale the model's input: DDIM, as in `ddim`. Its
    looks at attention that change nothing, after the first half, are not counted. `watch` is called
    after every step with its number from 0, its timestep and the latents.
    """
    parts = models.pipe.components
    wanted = ("vae", "text_encoder", "tokenizer", "unet")
    pipe = StableDiffusionAttendAndExcitePipeline(
        **{name: parts[name] for name in wanted},
        scheduler=ddim_scheduler(models.pipe),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    share = settings.steps / 50
    options: dict[str, Any] = {
        "num_inference_steps": settings.steps,
        "guidance_scale": settings.guidance_scale,
        "max_iter_to_alter": round(25 * share),
        "thresholds": {round(step * share): goal for step, goal in REFINED.items()},
        "scale_factor": scale_factor,
        "attn_res": ATTENTION_SIZE,
    }
    painted = []
    for case in cases:  # one at a time, so that each picture's cost is its own
        with counted(pipe.unet) as halves:
            image = pipe(
                case.prompt.text,
                subject_tokens(pipe.tokenizer, case.prompt),
                generator=torch.Generator().manual_seed(case.seed),
                callback=watch,
                **options,
            ).images[0]
        idle = settings.steps - options["max_iter_to_alter"]
        painted.append(Painted(image, (sum(halves) - idle) / 2))
    return painted


@torch.no_grad()
def ddim(models: Models, cases: Sequence[Case], settings: Tempering) -> list[Painted]:
    """The plain picture by DDIM: what Attend-and-Excite is to be held against."""
    pipe = models.pipe
    euler = pipe.scheduler
    pipe.scheduler = ddim_scheduler(pipe)
    try:
        return plain(models, cases, settings)
    finally:
        pipe.scheduler = euler


def ddim_scheduler(pipe: StableDiffusionPipeline) -> DDIMScheduler:
    """DDIM on the model's schedule, with the spacing of timesteps that its steps assume."""
    return DDIMScheduler.from_config(
        pipe.scheduler.config,
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="leading",
    )


REFINED = {0: 0.05, 10: 0.5, 20: 0.8}  # step of 50 -> attention that every subject must reach
ATTENTION_SIZE = (8, 8)  # the pocket's finest cross-attention


def subject_tokens(tokenizer: Any, prompt: Prompt) -> list[int]:
    """The places in the tokenized prompt where its subjects are named, by their last word."""
    ids = tokenizer(prompt.text).input_ids
    names = [tokenizer(noun.subject).input_ids[-2] for noun in prompt.nouns]
    return [ids.index(name) for name in names]


@contextmanager
def counted(unet: torch.nn.Module) -> Iterator[list[int]]:
    """The batch size of every evaluation of `unet` meanwhile."""
    halves: list[int] = []
    hook = unet.register_forward_pre_hook(lambda _, args: halves.append(len(args[0])))
    try:
        yield halves
    finally:
        hook.remove()
