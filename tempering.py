"""Tempering: denoise, look, put noise back where the classes are uncertain, denoise again.

A round goes back from what is kept, denoises up to a look, and takes its place or not. What is kept
in the end is denoised to the last step. Where fresh noise goes and what may be kept is the
mathematics of annealing.py; how a picture gets from one noise level to another, sampling.py knows.

The method is Alberto García Núñez's (master's thesis, UNIR); the re-noising here stays on the
scheduler's own schedule for every k, and rounds of it are simulated annealing proper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from annealing import cooled_depth, cooled_temperature, depths, gamma_map, keeps, mix_noise
from errors import InputError, blaming
from families import family_of
from sampling import Branch, Progress, Sampler, unheard
from segmentation import ClipSeg, View, embed_prompts, segment, view_of
from settings import Tempering, check_prompts

__all__ = ["Painter", "Result", "Tempering", "View", "temper"]

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
    tempered_calls: int  # of them, what the tempered picture would have taken by itself
    plain_calls: int | None  # and the plain one, where it was asked for

    @property
    def probabilities(self) -> Tensor:
        """(classes, height, width), CLIPSeg's view of the interrupted picture."""
        return self.interrupted.probabilities


def temper(
    pipe: DiffusionPipeline,
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

    @property
    def trunk(self) -> Branch:
        """The plain picture's branch."""
        return self.branches[0]

    def evaluations_for(self, branch: Branch) -> int:
        """Evaluations without those that took the trunk to its end, where `branch` is another."""
        total = sum(each.evaluations for each in self.branches)
        if branch is self.trunk:
            return total
        return total - self.trunk.evaluations + self.trunk.evaluations_until(self.first.step)


class Painter:
    """A pipeline and a CLIPSeg with the text of one run encoded: paints, looks and tempers.

    `prompts` holds the prompts of each of the B pictures of a batch, the same number for each.
    One painter serves any number of batches, so text is encoded once. Raises InputError for prompts
    that are missing or empty, or not as many for each picture.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
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
        joined = [settings.joiner.join(each) for each in prompts]
        self.sampler = Sampler(family_of(pipe), joined, settings)
        self.settings = self.sampler.settings  # complete: with what belongs to the family
        with blaming("CLIPSeg"):
            self.embeddings = torch.stack([embed_prompts(clipseg, each) for each in prompts])

    @torch.no_grad()
    def temper(
        self,
        seeds: Sequence[int],
        *,
        rows: Sequence[int] | None = None,
        compare: bool = False,
        progress: Progress | None = None,
    ) -> list[Result]:
        """One tempered picture for each of the seeds; the parameters are those of `temper`.

        `rows` says whose prompts each is of (default: one of all B in order). Every picture has a
        random generator of its own, so it does not depend on the batch that it was made in (beyond
        floating-point rounding).
        """
        report = progress or unheard
        trunks = self.sampler.start(seeds, rows)
        walks = [begun(state) for state in self.follow(trunks, report)]
        tempered = self.anneal(walks, report) if self.settings.rounds > 1 else self.once(walks)
        # A picture that was good enough at once is its own plain picture: one branch, not two.
        branches = list(dict.fromkeys([*tempered, *(trunks if compare else [])]))
        self.sampler.denoise(branches, self.settings.steps, report)

        images = dict(zip(tempered, self.sampler.decode(tempered), strict=True))
        others = [branch for branch in branches if branch not in images]
        if others:
            images |= zip(others, self.sampler.decode(others), strict=True)
        self.pipe.maybe_free_model_hooks()
        return [
            Result(
                image=images[branch],
                plain=images[walk.trunk] if compare else None,
                interrupted=walk.first.view,
                interrupted_at=walk.first.step,
                kept=walk.kept.view if self.settings.rounds > 1 else None,
                kept_at=walk.kept.step if self.settings.rounds > 1 else None,
                rounds=tuple(walk.rounds),
                seed=seed,
                unet_calls=sum(each.evaluations for each in walk.branches),
                tempered_calls=walk.evaluations_for(branch),
                plain_calls=walk.trunk.evaluations if compare else None,
            )
            for branch, walk, seed in zip(tempered, walks, seeds, strict=True)
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
            self.sampler.denoise(going, step, report)
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
        ).to(state.eps.device)
        fresh = self.sampler.noise(state.eps.shape, walk.generator, state.eps.dtype)
        noise = mix_noise(state.eps, fresh, gamma, settings.cfg_rescale / 10)
        step = max(0, state.step - backsteps)
        branch = self.sampler.go_back(state.branch, state.x0, noise, step, walk.generator)
        walk.branches.append(branch)
        return branch

    def unet_calls(self, *, compare: bool) -> int:
        """U-Net evaluations of one tempered picture, with its plain one where `compare` is set.

        With several rounds this is the most that it can take.
        """
        settings = self.settings
        early, stop, end = settings.looks[0], settings.stoptime, settings.steps
        evaluations = self.sampler.evaluations
        to_stop, to_the_end = evaluations(0, stop), evaluations(0, end) - evaluations(0, stop)
        total = to_stop + to_the_end * compare
        if settings.rounds == 1:
            return total + evaluations(stop - settings.backsteps, end)
        for depth, rounds in depths(settings.backsteps, settings.cooling, settings.rounds):
            total += settings.candidates * rounds * evaluations(stop - depth, stop)
        # A picture that is left at the early look spares the way from there to `stoptime` (not with
        # `compare`, which paints it anyway); all candidates of one round may go it later.
        total += (settings.candidates - 1 + compare) * (to_stop - evaluations(0, early))
        return total + to_the_end

    def examine(self, branches: Sequence[Branch], step: int) -> list[State]:
        """The states of branches that are paused after `step`, with what CLIPSeg sees in them."""
        if not branches:
            return []
        scale = self.settings.guidance_scale
        views = self.glance(branches, min(self.settings.look_guidance, scale))
        return [
            State(branch, step, *self.sampler.prediction(branch, scale), view)
            for branch, view in zip(branches, views, strict=True)
        ]

    def glance(self, branches: Sequence[Branch], guidance_scale: float) -> list[View]:
        """CLIPSeg's view of what branches are about to paint, as it is at this guidance.

        Full guidance overshoots in the first half of the way: there its x0 is glaring, and CLIPSeg
        can not tell good from bad in it.
        """
        images = self.sampler.preview(branches, guidance_scale)
        return self.look(images, [branch.row for branch in branches])

    def look(self, images: Sequence[Image.Image], rows: Sequence[int] | None = None) -> list[View]:
        """CLIPSeg's view of each image; `rows` says whose prompts (default: of all B in order)."""
        embeddings = self.embeddings if rows is None else self.embeddings[list(rows)]
        with blaming("CLIPSeg"):
            found = segment(self.clipseg, images, embeddings)
        self.sampler.trim()
        return [
            view_of(image, probabilities, self.settings.threshold)
            for image, probabilities in zip(images, found, strict=True)
        ]


def begun(state: State) -> Walk:
    """The walk of a picture that was looked at for the first time."""
    # The trunk's random stream goes on here: fresh noise never repeats the noise at the start.
    return Walk(state, state, state.branch.generator.clone_state(), [state.branch], [])


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
