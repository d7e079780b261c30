"""Pictures put together of cells: each subject is painted alone, and drawn again alone if it fails.

A cell is a subject's region. It is denoised by its subject's prompt alone, in a window around the
region, where it is shown nothing but the ground around itself. At every look the cells lie on the
ground, and CLIPSeg says of each subject how far it is from standing out in its cell. Cells that
failed go back, for no more than their windows' share of a picture; the others stay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from random import Random
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from annealing import gamma_map, keeps, mix_noise
from budget import Energies
from regions import Region, compose, masks_of, seats, tiles, window_of
from sampling import Branch, Frame, Progress, Sampler, noised_to, unheard
from segmentation import View
from settings import Tempering

Look = Callable[[Sequence[Tensor], Sequence[int]], list[View]]  # at x0s, with their texts' rows
# From this energy on a subject is not there at all: nothing of its cell is worth keeping.
MISSING = 0.5
KEPT = 0.5  # of the worst one's energy: what a subject of a joint picture has that keeps its place
PLAIN = 0.65  # the grey of a ground that nothing paints, in -1..1: light, so that all stands out
TAKEN = 0.1  # the probability of a subject, on average over a place, from which it has the place


@dataclass(frozen=True, eq=False)
class Cell:
    """A subject's region, and what paints it."""

    subject: int
    region: Region
    around: Tensor  # (1, channels, height, width) float32 of its window: x0 of what is around it
    branch: Branch


@dataclass(frozen=True, eq=False)
class Ground:
    """What cells lie on."""

    clean: Tensor  # (1, channels, h, w) float32: x0, where nothing else is known of it
    branch: Branch | None = None  # what paints it, and who has its text; None: it is plain
    by: Sampler | None = None


@dataclass(frozen=True, eq=False)
class Mosaic:
    """A picture that is put together of cells on a ground."""

    row: int  # of its joint prompt
    count: int  # of subjects
    ground: Ground
    cells: tuple[Cell, ...]

    @property
    def first(self) -> int:
        """The step at which its cells begin."""
        return 0

    @property
    def painted(self) -> list[Branch]:
        """The branches of its cells."""
        return [cell.branch for cell in self.cells]

    @cached_property
    def parts(self) -> Tensor:
        """Where each subject is to be, (C, h, w) bool: in its cell, or wherever there is none."""
        masks = {cell.subject: cell.region.mask[0, 0] > 0 for cell in self.cells}
        free = ~torch.stack(list(masks.values())).any(dim=0)
        return torch.stack([masks.get(subject, free) for subject in range(self.count)])

    def with_cells(self, branches: dict[int, Branch]) -> Mosaic:
        """The same with other branches in some of its cells, by their numbers."""
        cells = (
            replace(cell, branch=branches.get(number, cell.branch))
            for number, cell in enumerate(self.cells)
        )
        return replace(self, cells=tuple(cells))


@dataclass(frozen=True, eq=False)
class Assembled:
    """A mosaic at a look: its branches are paused there."""

    mosaic: Mosaic
    step: int
    view: View

    @property
    def branches(self) -> list[Branch]:
        ground = self.mosaic.ground.branch
        return [*self.mosaic.painted, *([ground] if ground else [])]

    def energy(self, number: int) -> float:
        """Of a cell's subject."""
        return self.view.energies[self.mosaic.cells[number].subject]


class Mended(NamedTuple):
    """What came of a round of a mosaic."""

    state: Assembled  # what is kept
    begun: list[Branch]
    energy: float  # of the best trial


@dataclass(eq=False)
class Trial:
    """A mosaic of which some cells are painted again."""

    origin: Assembled
    begun: dict[int, Branch]  # by their cells' numbers
    dropped: set[int]  # cells whose new branch was left at the early look
    view: View | None = None

    @property
    def going(self) -> dict[int, Branch]:
        return {n: branch for n, branch in self.begun.items() if n not in self.dropped}

    @property
    def mosaic(self) -> Mosaic:
        """With what is painted again, as far as anything is."""
        shown = {n: branch for n, branch in self.going.items() if branch.evaluations}
        return self.origin.mosaic.with_cells(shown)

    def energy(self, number: int) -> float:
        assert self.view is not None, "a trial is judged before it was looked at"
        return self.view.energies[self.origin.mosaic.cells[number].subject]


class Mender:
    """Begins mosaics, paints them and mends them, on the schedule of the joint pictures' sampler.

    `joint` has a row of text for each picture's prompt, `alone` one for each subject's in turn, and
    then the background's. `look` says what CLIPSeg sees in x0.
    """

    def __init__(self, joint: Sampler, alone: Sampler, count: int, look: Look) -> None:
        self.joint = joint
        self.alone = alone
        self.count = count
        self.look = look
        self.settings: Tempering = joint.settings

    # --- How a mosaic begins.

    def anew(self, row: int, ground: Ground, generator: Generator) -> Mosaic:
        """Of all subjects, each in a cell of its own."""
        masks = self.masks(generator)
        cells = (
            self.cell(row, i, masks[i : i + 1], ground.clean, generator) for i in range(self.count)
        )
        return Mosaic(row, self.count, ground, tuple(cells))

    @property
    def background(self) -> int:
        """The row of the background's text."""
        return len(self.alone.conditionings[0]["encoder_hidden_states"]) - 1

    @cached_property
    def plain(self) -> Ground:
        """A ground that nothing paints."""
        return Ground(self.joint.family.encode_flat(PLAIN).expand(self.joint.shape))

    def grounds(self, generators: Sequence[Generator], report: Progress = unheard) -> list[Ground]:
        """A ground for each picture: by the background's prompt up to the last look, or plain."""
        if not self.settings.background_prompt:
            return [self.plain] * len(generators)
        whole = self.plain.clean
        branches = [self.of_noise(self.background, whole, forked(each)) for each in generators]
        self.alone.denoise(branches, self.settings.stoptime, report)
        scale = self.settings.guidance_scale
        return [
            Ground(self.alone.prediction(branch, scale)[0], branch, self.alone)
            for branch in branches
        ]

    def onto(self, ground: Branch, x0: Tensor, view: View, generator: Generator) -> Mosaic:
        """Of a joint picture, paused at a look at which it is `x0`, with cells for what it lacks.

        A subject that is less than half as bad as the worst, and in any case the best one, keeps
        its place; the others get what is free of a tile. There they are shown the ground as it is,
        but for the subjects on it.
        """
        size = (x0.shape[-2], x0.shape[-1])
        energies = view.energies
        best, good = energies.index(min(energies)), KEPT * max(energies)
        found = [i == best or energy <= good for i, energy in enumerate(energies)]
        seen = F.adaptive_avg_pool2d(only(view), size)  # (C, h, w)
        masks = self.masks(generator)
        masks = masks[seats(seen, masks, found)]
        clean = without_subjects(x0, view)
        here = torch.tensor(found)[:, None, None]
        taken = (seen.masked_fill(~here, 0).amax(dim=0) > TAKEN).float()[None, None]
        cells = [
            self.cell(ground.row, i, masks[i : i + 1], clean, generator, taken)
            for i in range(self.count)
            if not found[i]
        ]
        return Mosaic(ground.row, self.count, Ground(x0, ground, self.joint), tuple(cells))

    def masks(self, generator: Generator) -> Tensor:
        """Where the subjects are to be, (C, 1, h, w): as the user says, else in tiles."""
        size = (self.joint.shape[-2], self.joint.shape[-1])
        draw = Random(int(torch.randint(2**31, (), generator=generator)))
        return masks_of(self.settings.regions or tiles(self.count, size, draw), self.count, size)

    def cell(
        self,
        row: int,
        subject: int,
        mask: Tensor,
        clean: Tensor,
        generator: Generator,
        taken: Tensor | None = None,
    ) -> Cell:
        """A cell that begins with noise alone, on a ground whose x0 is `clean`."""
        window = window_of(mask, self.settings.window, self.joint.family.grid_factor)
        region = Region(mask, window)
        if taken is not None:
            region = region.without(taken)
        around = window.of(clean).cpu()
        branch = self.of_noise(row * self.count + subject, around, forked(generator))
        return Cell(subject, region, around, self.framed(branch, region, around))

    def of_noise(self, row: int, like: Tensor, generator: Generator) -> Branch:
        """A branch from the first step, of noise alone."""
        branch = self.alone.branch(row, 0, generator)
        noise = self.noise(like, generator)
        branch.latents = noise * getattr(branch.scheduler, "init_noise_sigma", 1)
        return branch

    def framed(self, branch: Branch, region: Region, around: Tensor) -> Branch:
        """`branch`, which paints a cell, with what it is shown around its region."""
        noise = self.noise(around, branch.generator).float()
        device = noise.device
        branch.frame = Frame(region.inside.to(device), around.to(device), noise)
        branch.share = region.window.share(self.joint.shape[-2:])
        return branch

    def noise(self, like: Tensor, generator: Generator) -> Tensor:
        dtype = self.alone.conditionings[0]["encoder_hidden_states"].dtype
        return self.alone.noise(like.shape, generator, dtype)

    # --- How it is painted and looked at.

    def denoise(self, mosaics: Sequence[Mosaic], until: int, report: Progress = unheard) -> None:
        """All of it until step `until`: what was there already stays as it is."""
        self.alone.denoise([each for mosaic in mosaics for each in mosaic.painted], until, report)
        for sampler in (self.joint, self.alone):
            grounds = [each.ground.branch for each in mosaics if each.ground.by is sampler]
            sampler.denoise([branch for branch in grounds if branch], until, report)

    def examine(self, mosaics: Sequence[Mosaic], step: int) -> list[Assembled]:
        """Mosaics that are paused after `step`, with what CLIPSeg sees in them."""
        return [
            Assembled(mosaic, step, view)
            for mosaic, view in zip(mosaics, self.see(mosaics), strict=True)
        ]

    def see(self, mosaics: Sequence[Mosaic]) -> list[View]:
        """CLIPSeg's views of mosaics, each subject looked for where it is to be."""
        if not mosaics:
            return []
        settings = self.settings
        scale = min(settings.look_guidance, settings.guidance_scale)
        clean = [self.assembled(mosaic, scale) for mosaic in mosaics]
        return [
            replace(view, parts=enlarged(mosaic.parts, view.labels.shape))
            for mosaic, view in zip(
                mosaics, self.look(clean, [mosaic.row for mosaic in mosaics]), strict=True
            )
        ]

    def assembled(self, mosaic: Mosaic, guidance_scale: float) -> Tensor:
        """x0 of a mosaic (1, channels, h, w), float32, at this guidance."""
        ground = mosaic.ground
        clean = ground.clean
        if ground.branch:
            clean = self.joint.prediction(ground.branch, guidance_scale)[0]
        parts = [self.alone.prediction(each, guidance_scale)[0] for each in mosaic.painted]
        return compose(clean, [cell.region for cell in mosaic.cells], parts)

    def finish(self, mosaics: Sequence[Mosaic], report: Progress = unheard) -> list[Branch]:
        """Denoise to the end: the cells alone, and the last `harmonise` steps as one picture."""
        self.denoise(mosaics, self.end, report)
        whole = [self.joined(mosaic) for mosaic in mosaics]
        self.alone.denoise(whole, self.settings.steps, report)
        return whole

    def joined(self, mosaic: Mosaic) -> Branch:
        """The branch of the whole picture, from where its parts have come."""
        generator = mosaic.cells[0].branch.generator
        branch = self.alone.branch(self.background, self.end, generator)
        ground = mosaic.ground.clean
        if mosaic.ground.branch:
            ground = mosaic.ground.branch.latents
        elif len(branch.timesteps):
            noise = self.joint.noise(ground.shape, generator, torch.float32)
            ground = noised_to(branch, ground, noise)
        latents = [each.latents for each in mosaic.painted]
        whole = compose(ground, [cell.region for cell in mosaic.cells], latents)
        branch.latents = whole.to(latents[0].dtype)
        return branch

    @property
    def end(self) -> int:
        """The step from which the picture is denoised as a whole."""
        return self.settings.steps - self.settings.harmonise

    # --- How it is mended.

    def failed(self, seen: Assembled) -> list[int]:
        """The numbers of the cells that go back next: the worst, and whatever is missing.

        None where a subject is the worst that has no cell: nothing that is painted here changes
        it. No threshold decides, so a walk goes the same way by whichever it ends.
        """
        energies = {number: seen.energy(number) for number in range(len(seen.mosaic.cells))}
        worst = max(energies.values())
        if worst < seen.view.energy:
            return []
        return [n for n, energy in energies.items() if energy == worst or energy > MISSING]

    def back_to(self, seen: Assembled, number: int, depth: int) -> int:
        """The step at which a cell begins again: a missing subject goes all the way back."""
        return 0 if seen.energy(number) > MISSING else max(0, seen.step - depth)

    def trial(
        self, seen: Assembled, numbers: Sequence[int], depth: int, generator: Generator
    ) -> Trial:
        """A mosaic with the cells of these `numbers` begun again."""
        begun = {n: self.again(seen, n, depth, forked(generator)) for n in numbers}
        return Trial(seen, begun, set())

    def again(self, seen: Assembled, number: int, depth: int, generator: Generator) -> Branch:
        """A new branch of a cell: of noise alone, or with noise where the kept one is uncertain."""
        cell, settings = seen.mosaic.cells[number], self.settings
        step = self.back_to(seen, number, depth)
        if step:
            x0, eps = self.alone.prediction(cell.branch, settings.guidance_scale)
            gamma = self.gamma(cell, seen.view).to(eps.device)
            fresh = self.noise(cell.around, generator).float()
            noise = mix_noise(eps, fresh, gamma, settings.cfg_rescale / 10)
            branch = self.alone.go_back(cell.branch, x0, noise, step, generator)
        else:
            branch = self.of_noise(cell.branch.row, cell.around, generator)
        return self.framed(branch, cell.region, cell.around)

    def gamma(self, cell: Cell, view: View) -> Tensor:
        """The share of fresh noise in a cell's window, by its own subject's uncertainty."""
        settings, size = self.settings, (self.joint.shape[-2], self.joint.shape[-1])
        own = replace(view, uncertainty=view.uncertainty[cell.subject].expand(self.count))
        by_pixel = settings.uncertainty == "pixel"
        gamma = gamma_map(
            own, size, k=settings.k, background=settings.background, by_pixel=by_pixel
        )
        return cell.region.window.of(gamma)

    def price(self, seen: Assembled, depth: int) -> float:
        """What its next round can cost, in evaluations of whole pictures."""
        evaluations = self.joint.evaluations
        return self.settings.candidates * sum(
            seen.mosaic.cells[number].branch.share
            * evaluations(self.back_to(seen, number, depth), seen.step)
            for number in self.failed(seen)
        )

    def to_finish(self, seen: Assembled) -> float:
        """What finishing it costs, from its look on."""
        return self.to_paint(seen.mosaic, seen.step, seen.step)

    def to_paint(self, mosaic: Mosaic, on_ground: int, in_cells: int = 0) -> float:
        """What painting it costs from these steps of its ground and its cells on."""

        def rest(branch: Branch, step: int) -> float:
            until = branch.evaluations_until
            return branch.share * (until(self.end) - until(step))

        ground = rest(mosaic.ground.branch, on_ground) if mosaic.ground.branch else 0
        cells = sum(rest(branch, in_cells) for branch in mosaic.painted)
        return ground + cells + self.joint.evaluations(self.end, self.settings.steps)

    def mend(
        self,
        trials: Sequence[Sequence[Trial]],
        temperatures: Sequence[float],
        generators: Sequence[Generator],
        limits: Energies,
        report: Progress,
    ) -> list[Mended]:
        """A round: of each mosaic there are some trials, of which each cell takes the best.

        A mosaic that was left at the early look goes on where it looks good there by now.
        """
        self.attempt([trial for of_one in trials for trial in of_one], limits, report)
        taken = [
            self.taken(of_one, temperature, generator)
            for of_one, temperature, generator in zip(trials, temperatures, generators, strict=True)
        ]
        states = [of_one[0].origin for of_one in trials]
        changed = [i for i, cells in enumerate(taken) if cells]
        mosaics = [states[i].mosaic.with_cells(taken[i]) for i in changed]
        for i, mosaic, view in zip(changed, mosaics, self.see(mosaics), strict=True):
            states[i] = Assembled(mosaic, states[i].step, view)
        stop = self.settings.stoptime
        early = [i for i in changed if states[i].step < stop]
        ready = [i for i in early if states[i].view.energy <= limits.early]
        going = [states[i].mosaic for i in ready]
        self.denoise(going, stop, report)
        for i, state in zip(ready, self.examine(going, stop), strict=True):
            states[i] = state
        return [
            Mended(
                state,
                [branch for trial in of_one for branch in trial.begun.values()],
                min(trial.view.energy for trial in of_one if trial.view),
            )
            for state, of_one in zip(states, trials, strict=True)
        ]

    def attempt(self, trials: Sequence[Trial], limits: Energies, report: Progress) -> None:
        """Paint what has begun again up to the look of its origin, and look.

        What CLIPSeg does not find at the early look is left there; the other cells go on.
        """
        for step in self.settings.looks:
            live = [trial for trial in trials if trial.going and step <= trial.origin.step]
            branches = [each for trial in live for each in trial.going.values()]
            self.alone.denoise(branches, step, report)
            moved = [each for each in live if any(b.first < step for b in each.going.values())]
            for trial, view in zip(moved, self.see([each.mosaic for each in moved]), strict=True):
                trial.view = view
                if step < trial.origin.step:
                    trial.dropped |= {
                        n
                        for n, branch in trial.going.items()
                        if branch.first < step and trial.energy(n) > limits.early
                    }

    def taken(
        self, trials: Sequence[Trial], temperature: float, generator: Generator
    ) -> dict[int, Branch]:
        """Which new branches of one mosaic's trials take their cells, by the cells' numbers."""
        origin, found = trials[0].origin, {}
        for number in trials[0].begun:
            best = min(
                (trial for trial in trials if number in trial.going),
                key=lambda trial: trial.energy(number),
                default=None,
            )
            draw = float(torch.rand((), generator=generator))
            if best and keeps(best.energy(number), origin.energy(number), temperature, draw):
                found[number] = best.going[number]
        return found


def forked(generator: Generator) -> Generator:
    """A generator of its own for a cell: it shall not depend on what shares a batch with it."""
    return Generator().manual_seed(int(torch.randint(2**31, (), generator=generator)))


def only(view: View) -> Tensor:
    """Of each class what CLIPSeg sees on its own pixels, (C, H, W)."""
    own = view.labels == torch.arange(len(view.probabilities))[:, None, None]
    return view.probabilities * own


def without_subjects(x0: Tensor, view: View) -> Tensor:
    """x0 (1, channels, h, w) with the median of what is free of subjects in their places."""
    size = (x0.shape[-2], x0.shape[-1])
    there = F.adaptive_max_pool2d((view.labels >= 0).float()[None], size)  # (1, h, w)
    free = (there == 0).expand(x0.shape[1:]).to(x0.device)
    level = x0[0].masked_fill(~free, torch.nan).flatten(1).nanmedian(dim=1).values
    level = level.nan_to_num()[:, None, None]  # of a picture without any free place
    return torch.where(free, x0[0], level)[None]


def enlarged(parts: Tensor, size: Sequence[int]) -> Tensor:
    """Parts (C, h, w) bool of the latents' grid, of CLIPSeg's size."""
    return F.interpolate(parts[None].float(), size=tuple(size))[0] > 0.5
