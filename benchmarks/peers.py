"""Today's searches at inference time, by the rules of their papers, with our CLIPSeg and energy.

None of them needs gradients but Attend-and-Excite. A score V is minus the energy of a look, which
is taken of the same x0 as the tempering's. Costs are counted as in methods.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import replace

import torch
from torch import Generator, Tensor

from benchmarks.methods import (
    NEXT_CANDIDATE,
    Case,
    Models,
    Painted,
    attend_and_excite,
    ddim_scheduler,
    noisier,
    paint,
    seeds,
    tempered,
)
from budget import Energies
from loaders import set_scheduler
from sampling import Branch, unheard
from settings import Tempering
from tempering import Painter, State, begun

RESAMPLED = (0.2, 0.4, 0.6, 0.8)  # of the steps: where particles are looked at
FROM, UP, DOWN = 0.89, 0.78, 0.81  # of the steps: where paths begin, and how far each goes


class Reseeding(Painter):
    """Our looks and thresholds, but every round is a new seed: is going back worth anything?"""

    def propose(self, state: State, backsteps: int, generator: Generator) -> Branch:
        branch = self.sampler.branch(state.branch.row, 0, generator)
        noise = self.sampler.noise(self.sampler.shape, generator, state.branch.latents.dtype)
        branch.latents = noise * branch.scheduler.init_noise_sigma
        return branch


def reseeded(models: Models, cases: Sequence[Case], settings: Tempering) -> list[Painted]:
    """Best of N with an early look: as HEaD (arXiv:2409.10597), and stopped by our thresholds."""
    anew = replace(settings, backsteps=settings.stoptime, layout="joint")
    return tempered(models, cases, anew, kind=Reseeding)


# --- Particles: several pictures at once, the promising multiply.


@torch.no_grad()
def particles(
    models: Models,
    cases: Sequence[Case],
    settings: Tempering,
    count: int,
    strength: float,
    growth: float,
) -> list[Painted]:
    """`count` pictures of a case, resampled at every fifth of the way; the best at the end.

    `growth` 0 is Feynman-Kac steering (Singhal et al. 2025, arXiv:2501.06848): weights
    exp(strength V), V the highest so far, multinomial resampling. More is breadth-first search
    (Zhang et al. 2025, arXiv:2505.23614): weights exp(strength ((1 + growth)^i - 1) V) at look i,
    systematic resampling of the sorted pictures. By an ancestral sampler: clones would stay clones.
    """
    steps = settings.steps
    with scheduled(models, "euler ancestral"):
        painter = models.painter(cases, settings)
        painted = []
        for row, case in enumerate(cases):
            draw = Generator().manual_seed(case.seed)
            first = [case.seed + number * NEXT_CANDIDATE for number in range(count)]
            going = painter.sampler.start(first, [row] * count)
            best = [-math.inf] * count
            for number, share in enumerate(RESAMPLED, start=1):
                step = round(share * steps)
                painter.sampler.denoise(going, step)
                values = [-state.view.energy for state in painter.examine(going, step)]
                best = list(map(max, best, values))
                if growth:
                    weights = [strength * ((1 + growth) ** number - 1) * v for v in values]
                    chosen = systematic(softmax(weights), values, draw)
                else:
                    weights = [strength * v for v in best]
                    chosen = torch.multinomial(
                        softmax(weights), count, True, generator=draw
                    ).tolist()
                going = [clone(going[i], draw) for i in chosen]
                best = [best[i] for i in chosen]
            images = paint(painter.sampler, going)
            views = painter.look_twice(images, [row] * count)
            image = min(views, key=lambda view: view.energy).image
            painted.append(Painted(image, count * painter.evaluations(0, steps)))
        return painted


def softmax(weights: Sequence[float]) -> Tensor:
    return torch.tensor(weights, dtype=torch.float64).softmax(dim=0)


def systematic(weights: Tensor, values: Sequence[float], draw: Generator) -> list[int]:
    """As many of the pictures as there are, by evenly spaced points on their sorted weights."""
    order = sorted(range(len(values)), key=values.__getitem__)
    edges = weights[order].cumsum(dim=0)
    start = torch.rand((), generator=draw, dtype=torch.float64)
    points = (torch.arange(len(order)) + start) / len(order)
    return [order[int(i)] for i in torch.searchsorted(edges, points).clamp(max=len(order) - 1)]


def clone(branch: Branch, draw: Generator) -> Branch:
    """The same picture, with a random stream of its own from here on."""
    other = copy(branch)
    other.scheduler = deepcopy(branch.scheduler)
    other.generator = Generator().manual_seed(int(torch.randint(2**31, (), generator=draw)))
    other._options = {"generator": other.generator} if branch._options else {}
    return other


@contextmanager
def scheduled(models: Models, name: str) -> Iterator[None]:
    """The pipeline with another scheduler meanwhile."""
    before = models.pipe.scheduler
    set_scheduler(models.pipe, name)
    try:
        yield
    finally:
        models.pipe.scheduler = before


# --- Going back with fresh noise everywhere.


@torch.no_grad()
def depth_first(
    models: Models, cases: Sequence[Case], settings: Tempering, backtracks: int
) -> list[Painted]:
    """Depth-first search with backtracking (Zhang et al. 2025, arXiv:2505.23614).

    A look above its threshold goes back by a quarter of the steps and more, with fresh noise; after
    `backtracks` of them the best of the pictures at that look goes on. The thresholds are ours.
    """
    painter = models.painter(cases, settings, models.limits(settings))
    quarter = math.ceil(settings.steps / 4)
    best = painter.sampler.start(seeds(cases))
    tried = [[branch] for branch in best]  # of each case
    for step, limit in zip(settings.looks, painter.limits, strict=True):
        lowest = [math.inf] * len(cases)
        going = dict(enumerate(best))
        while going:
            painter.sampler.denoise(list(going.values()), step)
            states = painter.examine(list(going.values()), step)
            for i, state in zip(list(going), states, strict=True):
                if state.view.energy < lowest[i]:
                    lowest[i], best[i] = state.view.energy, state.branch
                if state.view.energy > limit and len(tried[i]) <= backtracks:
                    going[i] = noisier(painter.sampler, state.branch, step, max(0, step - quarter))
                    tried[i].append(going[i])
                else:
                    del going[i]
    images = paint(painter.sampler, best)
    return [
        Painted(image, sum(branch.evaluations for branch in branches))
        for image, branches in zip(images, tried, strict=True)
    ]


@torch.no_grad()
def over_paths(
    models: Models, cases: Sequence[Case], settings: Tempering, paths: int, copies: int, times: int
) -> list[Painted]:
    """Search over paths (Ma et al. 2025, arXiv:2501.09732).

    `paths` pictures come nearly to their end; `times` times each is noised up in `copies` ways by
    .78 of the way and denoised by .81 of it, and the best `paths` go on; at the end the best one.
    """
    painter = models.painter(cases, settings)
    sampler, steps = painter.sampler, settings.steps
    painted = []
    for row, case in enumerate(cases):
        step = round(FROM * steps)
        first = [case.seed + number * NEXT_CANDIDATE for number in range(paths)]
        kept = branches = sampler.start(first, [row] * paths)
        sampler.denoise(kept, step)
        for _ in range(times):
            up = max(0, step - round(UP * steps))
            tried = [noisier(sampler, each, step, up) for each in kept for _ in range(copies)]
            step = min(steps - 1, up + round(DOWN * steps))
            branches = [*branches, *tried]
            sampler.denoise(tried, step)
            states = sorted(painter.examine(tried, step), key=lambda state: state.view.energy)
            kept = [state.branch for state in states[:paths]]
        views = painter.look_twice(paint(sampler, kept), [row] * paths)
        image = min(views, key=lambda view: view.energy).image
        painted.append(Painted(image, sum(branch.evaluations for branch in branches)))
    return painted


# --- With gradients.


def attend_and_temper(
    models: Models, cases: Sequence[Case], settings: Tempering, scale_factor: float
) -> list[Painted]:
    """Attend-and-Excite (arXiv:2301.13826) up to `stoptime`, then our rounds, by DDIM.

    Attention is altered in the first half alone, so from there on it is the plain sampler that
    both share.
    """
    steps, stop = settings.steps, settings.stoptime
    limits = models.limits(settings)
    before = models.pipe.scheduler
    painted = []
    for case in cases:
        latents: dict[int, Tensor] = {}

        def watch(step: int, timestep: int, now: Tensor, seen: dict[int, Tensor] = latents) -> None:
            seen[step + 1] = now

        (excited,) = attend_and_excite(models, [case], settings, scale_factor, watch)
        spent = excited.unet_calls - (steps - stop + 1)  # what came after is painted anew
        models.pipe.scheduler = ddim_scheduler(models.pipe)
        try:
            painted.append(rounds_from(models, case, settings, limits, latents[stop - 1], spent))
        finally:
            models.pipe.scheduler = before
    return painted


@torch.no_grad()
def rounds_from(
    models: Models,
    case: Case,
    settings: Tempering,
    limits: Energies,
    latents: Tensor,
    spent: float,
) -> Painted:
    """A picture tempered from `latents` one step before `stoptime`; `spent` calls until there."""
    painter = models.painter([case], replace(settings, layout="joint"), limits)
    generator = Generator().manual_seed(case.seed + NEXT_CANDIDATE)
    trunk = painter.sampler.branch(0, settings.stoptime - 1, generator)
    trunk.latents = latents
    painter.sampler.denoise([trunk], settings.stoptime)
    walk = begun(trunk, painter.examine([trunk], settings.stoptime)[0])
    painter.anneal([walk], unheard)
    image = paint(painter.sampler, painter.finish([walk], unheard))[0]
    return Painted(image, spent + sum(each.evaluations for each in walk.branches))
