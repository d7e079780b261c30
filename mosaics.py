"""Pictures put together of cells: each subject is painted alone, and drawn again alone if it fails.

A cell is a subject's region. It is denoised by its subject's prompt alone, in a window around the
region, where it is shown nothing but background around itself. At every look the cells lie on the
ground, which is the joint picture where that was begun, and CLIPSeg says of each cell how far it is
from showing its subject there. Those that failed go back, for no more than their windows' share of
a picture; the others stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from random import Random
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from annealing import gamma_map, mix_noise
from budget import Energies
from regions import Region, compose, masks_of, seats, tiles, window_of
from sampling import Branch, Frame, Progress, Sampler, noised_to
from segmentation import View
from settings import Tempering

Look = Callable[[Sequence[Tensor], Sequence[int]], list[View]]  # at x0s, with their texts' rows
# From this energy on a subject is not there at all: nothing of its cell is worth keeping.
MISSING = 0.5


PLAIN = 0.65  # the grey of a ground that nothing paints, in -1..1: light, so that all stands out
TAKEN = 0.1  # the probability of a subject, on average over a place, from which it has the place


class Seen(NamedTuple):
    """How far a cell has come, and what CLIPSeg saw there: the less, the better."""

    left: int  # steps to go
    energy: float


@dataclass(eq=False)
class Cell:
    """A subject's region, and what is kept there."""

    subject: int
    row: int  # of its own prompt
    region: Region
    clean: Tensor  # (1, channels, height, width) float32 of its window: what is around it
    branch: Branch | None = None  # paused at a look
    seen: Seen | None = None
    view: View | None = None  # of the whole picture, at that look

    @property
    def missing(self) -> bool:
        return self.seen is None or self.seen.energy > MISSING


@dataclass(eq=False)
class Mosaic:
    """A picture of cells on a ground."""

    row: int  # of its joint prompt
    clean: Tensor  # (1, channels, h, w) float32: x0 of the ground
    ground: Branch | None  # what paints it; None: it is plain
    cells: list[Cell]
    generator: Generator  # of everything random from here on
    spent: float  # evaluations so far, in whole pictures'
    begun: list[Branch] = field(default_factory=list)

    @property
    def cost(self) -> float:
        """Evaluations so far, with those of all cells that were begun."""
        return self.spent + sum(branch.cost for branch in self.begun)

    @cached_property
    def parts(self) -> Tensor:
        """Where each subject is to be, (C, h, w) bool: in its cell, or wherever there is none."""
        size = self.clean.shape[-2:]
        taken = torch.stack([cell.region.mask[0, 0] for cell in self.cells]).sum(dim=0) > 0
        parts = (~taken).repeat(max(cell.subject for cell in self.cells) + 1, 1, 1)
        for cell in self.cells:
            parts[cell.subject] = cell.region.mask[0, 0].reshape(size) > 0
        return parts


Proposed = Mapping[Cell, Branch]


class Mender:
    """Paints mosaics on the schedule of the joint pictures' sampler.

    `alone` has a row of text for each subject's prompt, `joint` one for each picture's. `look` says
    what CLIPSeg sees in x0, `limits` which energies are low enough, `most` how many evaluations no
    picture passes.
    """

    def __init__(
        self, joint: Sampler, alone: Sampler, look: Look, limits: Energies, most: int
    ) -> None:
        self.joint = joint
        self.alone = alone
        self.look = look
        self.limits = limits
        self.most = most
        self.settings: Tempering = joint.settings

    # --- How a mosaic begins.

    def anew(self, row: int, count: int, generator: Generator) -> Mosaic:
        """A picture of `count` subjects, each in a cell of its own, on a plain ground."""
        clean = self.joint.family.encode_flat(PLAIN).expand(self.joint.shape).cpu()
        masks = self.masks(count, generator)
        cells = [self.cell(row, count, i, masks[i : i + 1], clean) for i in range(count)]
        return Mosaic(row, clean, None, cells, generator, 0)

    def onto(
        self, ground: Branch, x0: Tensor, view: View, spent: float, generator: Generator
    ) -> Mosaic:
        """A joint picture, paused at a look at which it is `x0`, with cells for what it lacks.

        A subject that is found keeps its place; a missing one gets what is free of a tile. There it
        is shown the ground as it is, but for the other subjects.
        """
        count, size = len(view.energies), x0.shape[-2:]
        found = [energy <= max(self.limits.last, min(view.energies)) for energy in view.energies]
        seen = F.adaptive_avg_pool2d(only(view), size)  # (C, h, w)
        masks = self.masks(count, generator)
        masks = masks[seats(seen, masks, found)]
        labels = F.adaptive_max_pool2d((view.labels >= 0).float()[None], size)  # (1, h, w)
        free = (labels == 0).expand(x0.shape[1:])
        level = x0[0].masked_fill(~free, torch.nan).flatten(1).nanmedian(dim=1).values
        level = level.nan_to_num()[:, None, None]  # of a picture without any free place
        clean = torch.where(free, x0[0], level)[None]
        here = torch.tensor(found)[:, None, None]
        taken = (seen.masked_fill(~here, 0).amax(dim=0) > TAKEN).float()[None, None]
        cells = [
            self.cell(ground.row, count, i, masks[i : i + 1], clean, taken)
            for i in range(count)
            if not found[i]
        ]
        return Mosaic(ground.row, x0, ground, cells, generator, spent)

    def masks(self, count: int, generator: Generator) -> Tensor:
        """Where the subjects are to be, (C, 1, h, w): as the user says, else in tiles."""
        size = tuple(self.joint.shape[-2:])
        draw = Random(int(torch.randint(2**31, (), generator=generator)))
        return masks_of(self.settings.regions or tiles(count, size, draw), size)

    def cell(
        self,
        row: int,
        count: int,
        subject: int,
        mask: Tensor,
        clean: Tensor,
        taken: Tensor | None = None,
    ) -> Cell:
        window = window_of(mask, self.settings.window, self.joint.family.grid_factor)
        region = Region(mask, window)
        if taken is not None:
            region = region.without(taken)
        return Cell(subject, row * count + subject, region, window.of(clean))

    # --- How it is painted.

    def mend(self, mosaics: Sequence[Mosaic], rounds: int, report: Progress) -> None:
        """Paint the cells; then, `rounds` times at most, go back where one failed and it pays."""
        for _ in range(rounds + 1):
            proposed = {
                cell: self.propose(mosaic, cell) for mosaic in mosaics for cell in self.hot(mosaic)
            }
            if not proposed:
                break
            found = self.follow(mosaics, proposed, report)
            for cell, (seen, view) in found.items():
                if cell.seen is None or seen < cell.seen:
                    cell.branch, cell.seen, cell.view = proposed[cell], seen, view

    def hot(self, mosaic: Mosaic) -> list[Cell]:
        """The cells that have failed and can pay for another try, the worst first."""
        left = self.most - self.finished_cost(mosaic)
        found = []
        for cell in sorted(mosaic.cells, key=lambda cell: cell.seen or Seen(0, 0), reverse=True):
            price = self.price(cell)
            if not self.good(cell) and (price <= left or cell.branch is None):
                left -= price
                found.append(cell)
        return found

    def good(self, cell: Cell) -> bool:
        """Whether it needs no round any more."""
        last = Seen(self.settings.steps - self.settings.stoptime, self.limits.last)
        return cell.seen is not None and cell.seen <= last

    def first_step(self, cell: Cell) -> int:
        """Where its next round begins: a missing subject goes all the way back."""
        if cell.missing or cell.seen is None:
            return 0
        return max(0, self.settings.steps - cell.seen.left - self.settings.backsteps)

    def price(self, cell: Cell) -> float:
        """What its next try can cost, in evaluations of whole pictures."""
        until = self.settings.stoptime if cell.branch else self.end
        return self.share(cell) * self.joint.evaluations(self.first_step(cell), until)

    def finished_cost(self, mosaic: Mosaic) -> float:
        """What it has cost when it is finished from where it stands."""
        steps = self.settings.steps
        branches = [cell.branch for cell in mosaic.cells if cell.branch]
        if mosaic.ground:
            branches.append(mosaic.ground)
        rest = sum(
            branch.share * max(0, branch.evaluations_until(self.end) - branch.evaluations)
            for branch in branches
        )
        return mosaic.cost + rest + self.joint.evaluations(self.end, steps)

    @property
    def end(self) -> int:
        """The step from which the picture is denoised as a whole."""
        return self.settings.steps - self.settings.harmonise

    def share(self, cell: Cell) -> float:
        return cell.region.window.share(self.joint.shape[-2:])

    def propose(self, mosaic: Mosaic, cell: Cell) -> Branch:
        """A new branch of a cell: of noise alone, or from what is kept, where it is uncertain."""
        step, draw = self.first_step(cell), mosaic.generator
        if cell.branch is None or cell.view is None or not step:
            branch = self.alone.branch(cell.row, step, draw)
            branch.latents = self.noise(cell, draw) * getattr(
                branch.scheduler, "init_noise_sigma", 1
            )
        else:
            x0, eps = self.alone.prediction(cell.branch, self.settings.guidance_scale)
            gamma = self.gamma(cell, cell.view).to(eps.device)
            fresh = self.noise(cell, draw).float()
            noise = mix_noise(eps, fresh, gamma, self.settings.cfg_rescale / 10)
            branch = self.alone.go_back(cell.branch, x0, noise, step, draw)
        inside = cell.region.inside.to(cell.clean.device)
        branch.frame = Frame(inside, cell.clean, self.noise(cell, draw).float())
        branch.share = self.share(cell)
        mosaic.begun.append(branch)
        return branch

    def gamma(self, cell: Cell, view: View) -> Tensor:
        """The share of fresh noise in a cell's window, by its own subject's uncertainty."""
        settings, size = self.settings, self.joint.shape[-2:]
        own = replace(view, uncertainty=view.uncertainty[cell.subject].expand(len(view.matrix)))
        by_pixel = settings.uncertainty == "pixel"
        gamma = gamma_map(
            own, size, k=settings.k, background=settings.background, by_pixel=by_pixel
        )
        return cell.region.window.of(gamma)

    def noise(self, cell: Cell, generator: Generator) -> Tensor:
        dtype = self.alone.conditionings[0]["encoder_hidden_states"].dtype
        return self.alone.noise(cell.clean.shape, generator, dtype)

    def follow(
        self, mosaics: Sequence[Mosaic], proposed: Proposed, report: Progress
    ) -> dict[Cell, tuple[Seen, View]]:
        """Denoise to `stoptime`; what CLIPSeg saw of each cell at the last look that it came to."""
        found: dict[Cell, tuple[Seen, View]] = {}
        going = dict(proposed)
        for step in self.settings.looks:
            self.alone.denoise(list(going.values()), step, report)
            shown = {cell: branch for cell, branch in going.items() if branch.first < step}
            looked = [each for each in mosaics if not shown.keys().isdisjoint(each.cells)]
            for mosaic, view in zip(looked, self.see(looked, shown), strict=True):
                for cell in mosaic.cells:
                    if cell in shown:
                        energy = view.energies[cell.subject]
                        found[cell] = Seen(self.settings.steps - step, energy), view
            left = {cell for cell in shown if found[cell][0].energy > self.limits.early}
            going = {cell: branch for cell, branch in going.items() if cell not in left}
        return found

    def see(self, mosaics: Sequence[Mosaic], proposed: Proposed) -> list[View]:
        """CLIPSeg's views of mosaics, with what is `proposed` in its place."""
        scale = min(self.settings.look_guidance, self.settings.guidance_scale)
        clean = [self.clean(mosaic, proposed, scale) for mosaic in mosaics]
        views = self.look(clean, [mosaic.row for mosaic in mosaics])
        return [
            replace(view, parts=enlarged(mosaic.parts, view.labels.shape))
            for mosaic, view in zip(mosaics, views, strict=True)
        ]

    def clean(self, mosaic: Mosaic, proposed: Proposed, guidance_scale: float) -> Tensor:
        """x0 of a mosaic (1, channels, h, w) at this guidance."""
        shown = [(cell, proposed.get(cell, cell.branch)) for cell in mosaic.cells]
        parts = [
            (cell.region, self.alone.prediction(branch, guidance_scale)[0])
            for cell, branch in shown
            if branch
        ]
        return compose(mosaic.clean, *zip(*parts, strict=True))

    def finish(self, mosaics: Sequence[Mosaic], report: Progress) -> list[Branch]:
        """Denoise to the end: each cell alone, and the last `harmonise` steps as one picture."""
        cells = [cell.branch for mosaic in mosaics for cell in mosaic.cells if cell.branch]
        self.alone.denoise(cells, self.end, report)
        grounds = [mosaic.ground for mosaic in mosaics if mosaic.ground]
        self.joint.denoise(grounds, self.end, report)
        whole = [self.joined(mosaic) for mosaic in mosaics]
        self.joint.denoise(whole, self.settings.steps, report)
        return whole

    def joined(self, mosaic: Mosaic) -> Branch:
        """The branch of the whole picture, from where its parts have come."""
        branch = self.joint.branch(mosaic.row, self.end, mosaic.generator)
        if mosaic.ground:
            ground = mosaic.ground.latents
        elif len(branch.timesteps):
            noise = self.joint.noise(mosaic.clean.shape, mosaic.generator, torch.float32)
            ground = noised_to(branch, mosaic.clean, noise)
        else:
            ground = mosaic.clean
        painted = [(cell.region, cell.branch.latents) for cell in mosaic.cells if cell.branch]
        latents = compose(ground, *zip(*painted, strict=True))
        branch.latents = latents.to(painted[0][1].dtype)
        mosaic.begun.append(branch)
        return branch


def only(view: View) -> Tensor:
    """Of each class what CLIPSeg sees on its own pixels, (C, H, W)."""
    own = view.labels == torch.arange(len(view.probabilities))[:, None, None]
    return view.probabilities * own


def enlarged(parts: Tensor, size: Sequence[int]) -> Tensor:
    """Parts (C, h, w) bool of the latents' grid, of CLIPSeg's size."""
    return F.interpolate(parts[None].float(), size=tuple(size))[0] > 0.5
