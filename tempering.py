"""Tempering: denoise, look, put noise back where the classes are uncertain, denoise again.

A round goes back from what is kept, denoises up to a look, and takes its place or not. What is kept
in the end is denoised to the last step. Where fresh noise goes and what may be kept is the
mathematics of annealing.py; how a picture gets from one noise level to another, sampling.py knows.

The method is Alberto García Núñez's (master's thesis, UNIR); the re-noising here stays on the
scheduler's own schedule for every k, and rounds of it are simulated annealing proper.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Protocol, TypeVar

import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageOps
from torch import Tensor

from annealing import cooled_depth, cooled_temperature, depths, gamma_map, keeps, mix_noise
from budget import (
    LOWEST,
    Energies,
    Sample,
    Sampled,
    Stop,
    descend,
    patience,
    promising,
    thresholds,
)
from calibration import pockets_own
from errors import InputError, blaming
from families import family_of
from layouts import Box
from mosaics import MISSING, Assembled, Mender, Mosaic
from sampling import Branch, Progress, Sampler, unheard
from segmentation import ClipSeg, View, embed_prompts, segment, view_of
from settings import CROWD, Tempering, check_prompts

__all__ = ["Painter", "Result", "Tempering", "View", "temper"]

DEFAULTS = Tempering()
# Layout "auto": how many rounds a joint picture gets before what is missing in it gets a region.
JOINT_ROUNDS = 2
SMALLEST_WINDOW = 0.1  # of the picture's sides, for reckoning how many rounds there could be


@dataclass(frozen=True)
class Round:
    """What came of one round: the best energy that it found, where, and whether it was kept."""

    backsteps: int
    step: int  # the look that it came to: `stoptime`, or the early one
    energy: float
    kept: bool
    regions: int = 0  # how many it painted; 0: the joint picture


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
    regions: tuple[Box | None, ...]  # where each subject was painted; None: by the joint prompt
    seed: int
    # U-Net evaluations; both halves of guidance count as one, a part of the picture as its share.
    unet_calls: float
    tempered_calls: float  # of them, what the tempered picture would have taken by itself
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

    @property
    def branches(self) -> list[Branch]:
        return [self.branch]


Seen = State | Assembled  # a picture at a look: of the joint prompt, or of cells


class Thing(Protocol):
    """What can be painted: a branch, or a mosaic."""

    @property
    def first(self) -> int:
        """The step at which it began."""


Painted = TypeVar("Painted", bound=Thing, contravariant=True)


class Way(Protocol[Painted]):
    """How things are painted and looked at."""

    def denoise(self, things: Sequence[Painted], until: int, report: Progress) -> None: ...

    def examine(self, things: Sequence[Painted], step: int) -> Sequence[Seen]: ...


@dataclass
class Walk:
    """The way of one picture through the rounds."""

    first: Seen
    kept: Seen
    generator: torch.Generator  # of everything random from `stoptime` on
    branches: list[Branch]  # all that were begun, the plain picture's first
    rounds: list[Round]

    @property
    def trunk(self) -> Branch:
        """The plain picture's branch."""
        return self.branches[0]

    @property
    def spent(self) -> float:
        """Evaluations without those that took the trunk further than to the first look."""
        return self.evaluations(self.first.step if isinstance(self.first, State) else 0)

    def evaluations(self, shared: int) -> float:
        """Evaluations of all branches, of the trunk's those until step `shared`."""
        rounds = sum(each.cost for each in self.branches[1:])
        return self.trunk.evaluations_until(shared) + rounds


Watched = Sequence[Walk]  # a plain picture's: how its walk begins if it is left at each look


class Painter:
    """A pipeline and a CLIPSeg with the text of one run encoded: paints, looks and tempers.

    `prompts` holds the prompts of each of the B pictures of a batch, the same number for each.
    One painter serves any number of batches, so text is encoded once. `limits` are the energies to
    stop at, where the settings do not give them; without, a rule that needs no sample. Raises
    InputError for prompts that are missing or empty, or not as many for each picture.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        clipseg: ClipSeg,
        prompts: Sequence[Sequence[str]],
        settings: Tempering = DEFAULTS,
        limits: Energies | None = None,
    ) -> None:
        for each in prompts:
            check_prompts(each)
        counts = dict.fromkeys(len(each) for each in prompts)
        if len(counts) != 1:
            raise InputError(
                f"pictures of a batch must have the same number of prompts, got "
                f"{' and '.join(map(str, counts)) or 'no picture'}"
            )
        settings = settings.of_subjects(*counts)
        self.pipe = pipe
        self.clipseg = clipseg
        self.prompts = prompts
        joined = [settings.joiner.join(each) for each in prompts]
        self.sampler = Sampler(family_of(pipe), joined, settings)
        self.evaluations = cache(self.sampler.evaluations)
        self.settings = self.sampler.settings  # complete: with what belongs to the family
        self.calibrated = limits is not None or self.settings.accept is not None
        self.limits = self.by_hand(limits or self.borrowed)
        with blaming("CLIPSeg"):
            self.embeddings = torch.stack([embed_prompts(clipseg, each) for each in prompts])

    @cached_property
    def mender(self) -> Mender:
        """What paints subjects in regions, with the text of each by itself encoded."""
        alone = [prompt for each in self.prompts for prompt in each]
        alone.append(self.settings.background_prompt)
        sampler = Sampler(self.sampler.family, alone, self.settings)
        return Mender(self.sampler, sampler, len(self.prompts[0]), self.see)

    @cached_property
    def apart(self) -> bool:
        """Whether each subject has a region from the start."""
        settings, count = self.settings, len(self.prompts[0])
        if settings.layout != "auto" or count == 1:
            return settings.layout == "regions" and count > 1
        if settings.regions or settings.background_prompt:
            return True
        crowded = settings.annealed and count >= CROWD
        return crowded and self.price_apart <= settings.budget * self.plain_calls

    @property
    def price_apart(self) -> float:
        """U-Net evaluations of a picture that is painted in regions, without any round."""
        return self.mender.to_paint(self.mender.anew(0, self.mender.plain, torch.Generator()), 0)

    @property
    def may_turn(self) -> bool:
        """Whether what is missing in a joint picture gets regions in the end."""
        auto = self.settings.layout == "auto" and len(self.prompts[0]) > 1
        return auto and self.settings.annealed and self.rounds > JOINT_ROUNDS

    def turns(self, walk: Walk) -> bool:
        """Whether its next round paints in regions what the joint prompt does not bring."""
        tried, kept = len(walk.rounds) >= JOINT_ROUNDS, walk.kept
        lacks = kept.step < self.settings.stoptime or kept.view.energy > MISSING
        return tried and lacks and self.may_turn and isinstance(kept, State)

    def turned(self, walk: Walk) -> tuple[Mosaic, torch.Generator]:
        """What its next round paints then, and the walk's random stream after that."""
        assert isinstance(walk.kept, State), "it is in regions already"
        generator, kept = walk.generator.clone_state(), walk.kept
        mosaic = self.mender.onto(kept.branch, kept.x0, kept.view, generator)
        return mosaic, generator

    def sought(self, sample: Sample) -> Energies:
        """At which energies to stop, so that pictures like those of `sample` cost the budget."""
        settings = self.settings
        return thresholds(sample, settings.budget, settings.max_cost, pockets_own().sample)

    @property
    def borrowed(self) -> Energies:
        """Energies to stop at by the pocket's sample, of pictures by the joint prompt: a guess.

        What regions cost from the start is not there for rounds.
        """
        sample, settings = pockets_own().sample, self.settings
        more = self.price_apart / self.plain_calls - 1 if self.apart else 0
        return thresholds(sample, max(1, settings.budget - more), settings.max_cost, sample)

    def by_hand(self, limits: Energies) -> Energies:
        """The thresholds `limits`, but for those that the settings give."""
        early, last = self.settings.early_accept, self.settings.accept
        return Energies(
            limits.early if early is None else early, limits.last if last is None else last
        )

    def accepting(self, limits: Energies) -> Painter:
        """The same painter with other thresholds, but for those that the settings give."""
        other = copy(self)
        other.calibrated = True
        other.limits = self.by_hand(limits)
        return other

    @torch.no_grad()
    def temper(
        self,
        seeds: Sequence[int],
        *,
        rows: Sequence[int] | None = None,
        compare: bool = False,
        walks: Sequence[Walk] | None = None,
        progress: Progress | None = None,
    ) -> list[Result]:
        """One tempered picture for each of the seeds; the parameters are those of `temper`.

        `rows` says whose prompts each is of (default: one of all B in order). Every picture has a
        random generator of its own, so it does not depend on the batch that it was made in (beyond
        floating-point rounding). `walks` are those of the same seeds and rows, where they have
        begun already.
        """
        report = progress or unheard
        if walks is None:
            trunks = self.sampler.start(seeds, rows)
            walks = self.begin(trunks, report)
        else:
            trunks = [walk.trunk for walk in walks]
            self.take_up(walks, report)
        if self.settings.annealed:
            self.anneal(walks, report)
        else:
            self.once(walks)
        tempered = self.finish(walks, report)
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
                kept=walk.kept.view if self.settings.annealed else None,
                kept_at=walk.kept.step if self.settings.annealed else None,
                rounds=tuple(walk.rounds),
                regions=self.regions(walk),
                seed=seed,
                unet_calls=sum(each.cost for each in walk.branches),
                tempered_calls=self.tempered_calls(walk),
                plain_calls=walk.trunk.evaluations if compare else None,
            )
            for branch, walk, seed in zip(tempered, walks, seeds, strict=True)
        ]

    @torch.no_grad()
    def watch(
        self,
        seeds: Sequence[int],
        *,
        rows: Sequence[int] | None = None,
        progress: Progress | None = None,
    ) -> list[Watched]:
        """Plain pictures up to `stoptime`, looked at by every look, whatever they show.

        The parameters are those of `temper`.
        """
        report, seen = progress or unheard, []
        trunks = self.sampler.start(seeds, rows)
        mosaics = self.anew(trunks, report) if self.apart else []
        for step in self.settings.looks:
            if mosaics:
                self.mender.denoise(mosaics, step, report)
                states: Sequence[Seen] = self.mender.examine(mosaics, step)
            else:
                self.sampler.denoise(trunks, step, report)
                states = self.examine(trunks, step)
            seen.append(list(map(begun, trunks, states)))
        return list(zip(*seen, strict=True))

    def where_left(self, watched: Watched) -> Walk:
        """The walk of a picture from the look at which it is left."""
        unpromising = (each for each in watched[:-1] if not self.promising(each.first))
        return next(unpromising, watched[-1])

    # --- A sample, from which thresholds follow.

    def looks(self, watched: Watched) -> tuple[Stop, ...]:
        """What a sample holds of a plain picture: rounds without the doubt of who has no sample."""
        calibrated = self.accepting(self.limits)
        return tuple(map(calibrated.stop, watched))

    def sampling(self, looks: Sequence[tuple[Stop, ...]]) -> Painter:
        """A painter that walks a sample of plain pictures with these looks."""
        early = promising([Sampled(each, ()).plain for each in looks])
        return self.accepting(Energies(early, LOWEST))

    def sample(self, pictures: Iterable[Sampled]) -> Sample:
        """The sample of which this painter walks the pictures."""
        ways = tuple(pictures)
        return Sample(self.plain_calls, self.limits.early, ways, self.settings.max_cost)

    def missing(self, sample: Sample) -> int | None:
        """Whose next round must be known, for the sample to have spent the budget.

        None, too, where `accept` is given by hand, and the budget has nothing to say.
        """
        settings = self.settings
        if settings.accept is not None:
            return None
        return descend(sample, settings.budget, settings.max_cost).missing

    # --- The rounds.

    def begin(self, trunks: Sequence[Branch], report: Progress) -> list[Walk]:
        """The walks of pictures that begin with `trunks`, up to their first looks."""
        if self.apart:
            states = self.follow(self.mender, self.anew(trunks, report), report)
            return list(map(begun, trunks, states))
        return list(map(begun, trunks, self.follow(self, trunks, report)))

    def anew(self, trunks: Sequence[Branch], report: Progress) -> list[Mosaic]:
        """The mosaics that are painted instead of joint pictures."""
        generators = [trunk.generator.clone_state() for trunk in trunks]
        grounds = self.mender.grounds(generators, report)
        return [
            self.mender.anew(trunk.row, ground, generator)
            for trunk, ground, generator in zip(trunks, grounds, generators, strict=True)
        ]

    def take_up(self, walks: Sequence[Walk], report: Progress) -> None:
        """Take on to `stoptime` what was left at the early look by a lower threshold than now."""
        left = [walk for walk in walks if walk.kept.step < self.settings.stoptime]
        later = [walk for walk in left if self.promising(walk.kept)]
        for walk, state in zip(later, self.go_on([w.kept for w in later], report), strict=True):
            walk.first = state if walk.kept is walk.first else walk.first
            walk.kept = state

    def go_on(self, states: Sequence[Seen], report: Progress) -> list[Seen]:
        """States that were left at the early look, at the last one."""
        stop = self.settings.stoptime
        joint = [state.branch for state in states if isinstance(state, State)]
        mosaics = [state.mosaic for state in states if isinstance(state, Assembled)]
        self.sampler.denoise(joint, stop, report)
        self.mender.denoise(mosaics, stop, report)
        joined, laid = iter(self.examine(joint, stop)), iter(self.mender.examine(mosaics, stop))
        return [next(joined) if isinstance(state, State) else next(laid) for state in states]

    def once(self, walks: Sequence[Walk]) -> None:
        """The seed's tempering: every picture goes back once, and what comes of it is taken."""
        depth = self.settings.backsteps
        for walk in walks:
            if self.dearest(walk, depth) > self.most:
                continue
            if isinstance(walk.kept, State):
                walk.branches.append(self.propose(walk.kept, depth, walk.generator))
                walk.kept = replace(walk.kept, branch=walk.branches[-1])
            else:
                everything = range(len(walk.kept.mosaic.cells))
                trial = self.mender.trial(walk.kept, everything, depth, walk.generator)
                walk.branches += trial.begun.values()
                walk.kept = replace(walk.kept, mosaic=walk.kept.mosaic.with_cells(trial.begun))

    def anneal(self, walks: Sequence[Walk], report: Progress) -> None:
        """Go back, look and decide, until nothing is left to do.

        A picture that is good enough, or can not pay for another round, has left the batch.
        """
        while hot := [each for each in walks if not self.good(each.kept) and self.may_go_on(each)]:
            self.round(hot, report)

    def finish(self, walks: Sequence[Walk], report: Progress) -> list[Branch]:
        """The branches of what walks keep; cells are one picture by then."""
        mosaics = [walk.kept.mosaic for walk in walks if isinstance(walk.kept, Assembled)]
        whole = iter(self.mender.finish(mosaics, report) if mosaics else [])
        finished = []
        for walk in walks:
            if isinstance(walk.kept, State):
                finished.append(walk.kept.branch)
            else:
                finished.append(next(whole))
                walk.branches.append(finished[-1])
        return finished

    @torch.no_grad()
    def round(self, walks: Sequence[Walk], report: Progress = unheard) -> None:
        """Every walk goes back from what it keeps, and keeps what comes of it, or does not.

        Where memory runs out on the way, the walks that it concerns are as they were.
        """
        mosaics = [(walk, walk.kept) for walk in walks if isinstance(walk.kept, Assembled)]
        joint = [(walk, walk.kept) for walk in walks if isinstance(walk.kept, State)]
        turning = [(walk, kept) for walk, kept in joint if self.turns(walk)]
        self.round_of_joint([each for each in joint if each not in turning], report)
        self.turn([walk for walk, _ in turning], report)
        self.round_of_mosaics(mosaics, report)

    def round_of_joint(self, walks: Sequence[tuple[Walk, State]], report: Progress) -> None:
        """A round of pictures by their joint prompts; of each there is what it keeps."""
        count = self.settings.candidates
        depths = [self.depth(walk) for walk, _ in walks]
        generators = [walk.generator.clone_state() for walk, _ in walks]
        proposed = [
            self.propose(kept, depth, generator)
            for (_, kept), depth, generator in zip(walks, depths, generators, strict=True)
            for _ in range(count)
        ]
        found = self.follow(self, proposed, report)
        for i, ((walk, _), depth) in enumerate(zip(walks, depths, strict=True)):
            walk.generator = generators[i]
            settle(walk, found[i * count : (i + 1) * count], depth, self.temperature(walk))

    def turn(self, walks: Sequence[Walk], report: Progress) -> None:
        """A round in which what a joint picture lacks is painted in regions, on the picture."""
        turned = [self.turned(walk) for walk in walks]
        found = self.follow(self.mender, [mosaic for mosaic, _ in turned], report)
        for walk, state, (_, generator) in zip(walks, found, turned, strict=True):
            walk.generator = generator
            settle(walk, [state], walk.kept.step, self.temperature(walk))

    def round_of_mosaics(self, walks: Sequence[tuple[Walk, Assembled]], report: Progress) -> None:
        """A round of pictures of cells: those that have failed go back, each by itself."""
        count = self.settings.candidates
        depths = [self.depth(walk) for walk, _ in walks]
        generators = [walk.generator.clone_state() for walk, _ in walks]
        trials = [
            [
                self.mender.trial(kept, self.mender.failed(kept), depth, generator)
                for _ in range(count)
            ]
            for (_, kept), depth, generator in zip(walks, depths, generators, strict=True)
        ]
        temperatures = [self.temperature(walk) for walk, _ in walks]
        found = self.mender.mend(trials, temperatures, generators, self.limits, report)
        for i, ((walk, kept), mended) in enumerate(zip(walks, found, strict=True)):
            changed = mended.state is not kept
            painted = len(trials[i][0].begun)
            walk.rounds.append(Round(depths[i], mended.state.step, mended.energy, changed, painted))
            walk.branches += mended.begun
            walk.generator, walk.kept = generators[i], mended.state

    def temperature(self, walk: Walk) -> float:
        """Of its next round."""
        number = len(walk.rounds) + 1
        return cooled_temperature(self.settings.temperature, number, self.rounds)

    def depth(self, walk: Walk) -> int:
        """How far its next round goes back."""
        return cooled_depth(self.settings.backsteps, self.settings.cooling, len(walk.rounds) + 1)

    def has_rounds(self, walk: Walk) -> bool:
        """Whether there is a next one that changes anything: going back by no step does not."""
        if len(walk.rounds) >= self.rounds or self.depth(walk) == 0:
            return False
        return isinstance(walk.kept, State) or bool(self.mender.failed(walk.kept))

    def may_go_on(self, walk: Walk) -> bool:
        """Whether there is a next round, and it can not take the picture past `max_cost`."""
        return self.has_rounds(walk) and self.dearest(walk, self.depth(walk)) <= self.most

    def follow(self, by: Way[Painted], things: Sequence[Painted], report: Progress) -> list[Seen]:
        """Denoise to `stoptime`; the state of each at the last look that it came to.

        One that looks bad at the early look is left there, as delayed acceptance spares the dear
        test where the cheap one has failed (Christen & Fox 2005). What starts later is not looked
        at early.
        """
        found: dict[Painted, Seen] = {}
        going = list(things)
        for step in self.settings.looks:
            by.denoise(going, step, report)
            seen = [thing for thing in going if thing.first < step]
            found.update(zip(seen, by.examine(seen, step), strict=True))
            going = [each for each in going if each not in seen or self.promising(found[each])]
        return [found[thing] for thing in things]

    def denoise(self, branches: Sequence[Branch], until: int, report: Progress = unheard) -> None:
        """Branches of joint pictures, until step `until`."""
        self.sampler.denoise(branches, until, report)

    def promising(self, state: Seen) -> bool:
        """Whether it is worth going on from the early look."""
        return state.view.energy <= self.limits.early

    def good(self, state: Seen) -> bool:
        """Whether no round is needed any more."""
        done = state.step == self.settings.stoptime
        return done and state.view.energy <= self.limits.last

    def propose(self, state: State, backsteps: int, generator: torch.Generator) -> Branch:
        """A new branch from a state, `backsteps` back, with noise where it is uncertain."""
        settings = self.settings
        height, width = state.x0.shape[-2:]
        gamma = gamma_map(
            state.view,
            (height, width),
            k=settings.k,
            background=settings.background,
            by_pixel=settings.uncertainty == "pixel",
        ).to(state.eps.device)
        fresh = self.sampler.noise(state.eps.shape, generator, state.eps.dtype)
        noise = mix_noise(state.eps, fresh, gamma, settings.cfg_rescale / 10)
        step = max(0, state.step - backsteps)
        return self.sampler.go_back(state.branch, state.x0, noise, step, generator)

    # --- What it costs.

    def dearest(self, walk: Walk, backsteps: int) -> float:
        """What the picture can cost after a round so deep, whatever comes of it."""
        kept, end = walk.kept, self.settings.steps
        if isinstance(kept, Assembled):
            price = self.mender.price(kept, backsteps)
            return walk.spent + price + self.mender.to_finish(kept)
        if self.turns(walk):
            return walk.spent + self.mender.to_paint(self.turned(walk)[0], kept.step)
        step = max(0, kept.step - backsteps)
        whole = max(
            self.evaluations(step, end), self.evaluations(step, kept.step) + self.to_finish(kept)
        )
        others = (self.settings.candidates - 1) * self.evaluations(step, self.settings.stoptime)
        return walk.spent + others + whole

    def to_finish(self, state: Seen) -> float:
        """What it costs to denoise it to the end from its look."""
        if isinstance(state, Assembled):
            return self.mender.to_finish(state)
        until = state.branch.evaluations_until
        return until(self.settings.steps) - until(state.step)

    def stop(self, walk: Walk) -> Stop:
        """Where the picture stands, for the mathematics of the budget."""
        kept = walk.kept
        cost = walk.spent + self.to_finish(kept)
        most = self.dearest(walk, self.depth(walk)) if self.has_rounds(walk) else None
        return Stop(kept.step == self.settings.stoptime, kept.view.energy, cost, most)

    def regions(self, walk: Walk) -> tuple[Box | None, ...]:
        """Where each subject of what is kept was painted, as the box around it."""
        kept = walk.kept
        cells = kept.mosaic.cells if isinstance(kept, Assembled) else ()
        boxes = {cell.subject: cell.region.box for cell in cells}
        return tuple(boxes.get(subject) for subject in range(len(self.prompts[0])))

    def tempered_calls(self, walk: Walk) -> float:
        """Evaluations that its finished picture has taken by itself."""
        kept = walk.kept
        if isinstance(kept, State):
            whole = kept.branch is walk.trunk
            return walk.evaluations(self.settings.steps) if whole else walk.spent
        on_trunk = kept.mosaic.ground.branch is walk.trunk
        return walk.evaluations(self.mender.end) if on_trunk else walk.spent

    @cached_property
    def most(self) -> int:
        """U-Net evaluations that a tempered picture never passes."""
        return math.floor(self.settings.max_cost * self.plain_calls)

    @property
    def plain_calls(self) -> int:
        """U-Net evaluations of a plain picture."""
        return self.evaluations(0, self.settings.steps)

    @property
    def rounds(self) -> int:
        """How many rounds there are at most: as asked for, or what `max_cost` could pay for.

        Thresholds that no sample has given are not trusted for longer than `patience` says.
        """
        settings = self.settings
        if settings.rounds is not None:
            return settings.rounds
        starts = [max(0, look - settings.backsteps) for look in settings.looks]
        ways = [(step, look) for step in starts for look in settings.looks if step < look]
        cheapest: float = min((self.evaluations(*each) for each in ways), default=1)
        if settings.layout != "joint":
            cheapest *= max(settings.window, SMALLEST_WINDOW) ** 2
        paid = int((self.most - self.plain_calls) // cheapest)
        if self.calibrated:
            return paid
        return min(paid, patience(pockets_own().sample, self.limits) - 1)

    def unet_calls(self, *, compare: bool) -> int:
        """U-Net evaluations of one tempered picture, with its plain one where `compare` is set.

        With several rounds this is the most that it can take.
        """
        settings, evaluations = self.settings, self.evaluations
        if self.apart or self.may_turn:
            return self.most + self.plain_calls * compare
        early, stop, end = settings.looks[0], settings.stoptime, settings.steps
        to_stop, to_the_end = evaluations(0, stop), evaluations(0, end) - evaluations(0, stop)
        beside = to_the_end * compare  # of the plain picture
        if not settings.annealed:
            once = to_stop + evaluations(stop - settings.backsteps, end)
            return beside + (once if once <= self.most else evaluations(0, end))
        total = evaluations(0, end)
        for depth, rounds in depths(settings.backsteps, settings.cooling, self.rounds):
            total += settings.candidates * rounds * evaluations(stop - depth, stop)
        # A picture that is left at the early look spares the way from there to `stoptime` (not with
        # `compare`, which paints it anyway); all candidates of one round may go it later.
        way_on = to_stop - evaluations(0, early)
        total = min(self.most, total + (settings.candidates - 1) * way_on)
        return total + beside + compare * way_on

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
        clean = [self.sampler.prediction(each, guidance_scale)[0] for each in branches]
        return self.see(clean, [branch.row for branch in branches])

    def see(self, clean: Sequence[Tensor], rows: Sequence[int]) -> list[View]:
        """CLIPSeg's view of what becomes of x0s, each (1, channels, h, w)."""
        images = self.sampler.preview_of(clean)
        both = self.settings.annealed and self.settings.mirror
        return self.look_twice(images, rows) if both else self.look(images, rows)

    def look_twice(
        self, images: Sequence[Image.Image], rows: Sequence[int] | None = None
    ) -> list[View]:
        """The same as `look`, with an energy that knows the mirror images, too."""
        rows = range(len(images)) if rows is None else rows
        mirrors = [ImageOps.mirror(image) for image in images]
        views = self.look([*images, *mirrors], [*rows, *rows])  # one call, which is less than two
        count = len(images)
        return [
            replace(view, mirrored=other.probabilities)
            for view, other in zip(views[:count], views[count:], strict=True)
        ]

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


def begun(trunk: Branch, state: Seen) -> Walk:
    """The walk of a picture that was looked at for the first time."""
    # A branch's random stream goes on here: fresh noise never repeats the noise at the start.
    generator = state.branches[0].generator.clone_state()
    return Walk(state, state, generator, list(dict.fromkeys([trunk, *state.branches])), [])


def settle(walk: Walk, proposed: Sequence[Seen], backsteps: int, temperature: float) -> None:
    """End a round: the best of `proposed` takes the place of the kept state, or does not."""
    best = min(proposed, key=lambda state: (-state.step, state.view.energy))
    draw = float(torch.rand((), generator=walk.generator))
    # Who has come further passed the early look; energies of different looks are not compared.
    kept = best.step > walk.kept.step or (
        best.step == walk.kept.step
        and keeps(best.view.energy, walk.kept.view.energy, temperature, draw)
    )
    regions = 0 if isinstance(best, State) else len(best.mosaic.cells)
    walk.rounds.append(Round(backsteps, best.step, best.view.energy, kept, regions))
    begun = (branch for state in proposed for branch in state.branches)
    walk.branches = list(dict.fromkeys([*walk.branches, *begun]))  # a ground is there already
    if kept:
        walk.kept = best


def walked(pictures: Sequence[tuple[Painter, Watched]]) -> Sample:
    """A sample of these plain pictures, walked until it has spent the budget of their settings.

    Of each there is the painter that has watched it; all have the same settings.
    """
    looks = [painter.looks(watched) for painter, watched in pictures]
    painters = [painter.sampling(looks) for painter, _ in pictures]
    walks = [
        painter.where_left(each) for painter, (_, each) in zip(painters, pictures, strict=True)
    ]
    rounds: list[list[Stop]] = [[] for _ in pictures]
    painter = painters[0]
    while True:
        ways = zip(looks, map(tuple, rounds), strict=True)
        sample = painter.sample(map(Sampled._make, ways))
        i = painter.missing(sample)
        if i is None:
            return sample
        painters[i].round([walks[i]])
        rounds[i].append(painters[i].stop(walks[i]))
