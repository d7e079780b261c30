"""Subjects in regions of their own: each is painted, judged and painted again by itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from calls import call
from conftest import with_scheduler
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from pictures import farthest
from PIL import Image

import mosaics
import tempering
from budget import Energies
from layouts import Box
from mosaics import Assembled
from sampling import Frame
from segmentation import ClipSeg, view_of
from settings import OF_THE_BUDGET
from tempering import JOINT_ROUNDS, Painter, Tempering, temper

PROMPTS = ["a red car", "a blue bird", "a yellow chair"]
HALVES = (Box(0, 0, 0.5, 1), Box(0.5, 0, 1, 1))
LAID = Tempering(
    steps=8, stoptime=6, backsteps=4, early_look=3, layout="regions", budget=3, max_cost=8,
    rounds=3, accept=0, early_accept=9, guidance_scale=4, preview="linear",
)  # fmt: skip


def begun(
    pipe: StableDiffusionPipeline, clipseg: ClipSeg, settings: Tempering
) -> tuple[Painter, Assembled]:
    """A painter, and a mosaic at the last look before any round."""
    painter = Painter(pipe, clipseg, [PROMPTS], settings)
    (watched,) = painter.watch([7])
    state = watched[-1].kept
    assert isinstance(state, Assembled)
    return painter, state


def test_around_its_region_a_cell_is_shown_the_ground_at_the_steps_noise_level() -> None:
    inside = torch.tensor([[1.0, 0.0]]).view(1, 1, 1, 2)
    clean, noise, x = torch.full((3, 1, 1, 1, 2), 2.0).unbind()
    shown = Frame(inside, clean, 3 * noise).around(5 * x, 0.8, 0.6)
    assert shown.flatten().tolist() == pytest.approx([10, 0.8 * 2 + 0.6 * 6])


@torch.no_grad()
def test_only_what_failed_is_painted_again(pipe: StableDiffusionPipeline, clipseg: ClipSeg) -> None:
    painter, before = begun(pipe, clipseg, LAID)
    numbers = painter.mender.failed(before)
    (walk,) = (watched[-1] for watched in painter.watch([7]))
    painter.round([walk])
    after = walk.kept
    assert isinstance(after, Assembled)
    assert 0 < len(numbers) < 3, "this seed does not test anything"
    for number, (old, new) in enumerate(zip(before.mosaic.cells, after.mosaic.cells, strict=True)):
        same = torch.equal(old.branch.latents, new.branch.latents)
        assert same or number in numbers
    worst = max(before.energy(number) for number in numbers)
    assert before.view.energy == worst


def test_no_round_keeps_what_is_worse(pipe: StableDiffusionPipeline, clipseg: ClipSeg) -> None:
    result = temper(pipe, clipseg, PROMPTS, LAID, seed=7)
    assert len(result.rounds) == 3
    assert any(each.kept for each in result.rounds)
    assert result.kept is not None
    assert max(result.kept.energies) <= max(result.interrupted.energies)


def test_a_part_of_the_picture_costs_its_share_and_no_picture_passes_the_cap(
    any_pipe: StableDiffusionPipeline, clipseg: ClipSeg
) -> None:
    pixels: list[float] = []
    hook = any_pipe.unet.register_forward_pre_hook(
        lambda _, args: pixels.append(args[0].numel() / (2 * 4 * 16 * 16))
    )
    reported: list[float] = []
    settings = replace(LAID, rounds=None, max_cost=4)
    try:
        result = temper(any_pipe, clipseg, PROMPTS, settings, seed=7, progress=reported.append)
    finally:
        hook.remove()
    assert result.rounds
    assert result.unet_calls == result.tempered_calls == pytest.approx(sum(pixels))
    assert sum(reported) == pytest.approx(sum(pixels))
    painter = Painter(any_pipe, clipseg, [PROMPTS], settings)
    assert sum(pixels) <= painter.unet_calls(compare=False) == 4 * painter.plain_calls
    assert painter.price_apart < sum(pixels)


def test_without_rounds_a_picture_costs_its_windows(
    pipe: StableDiffusionPipeline, clipseg: ClipSeg
) -> None:
    settings = replace(LAID, rounds=None, accept=9)
    prompts = [*PROMPTS, "a green frog"]
    result = temper(pipe, clipseg, prompts, settings, seed=7)
    assert result.unet_calls == 4 * 0.75**2 * 8
    assert set(result.regions) == {
        Box(left, top, left + 0.5, top + 0.5) for left in (0, 0.5) for top in (0, 0.5)
    }


@pytest.mark.parametrize("scheduler", ["euler", "euler ancestral"])  # which draws at every step
def test_a_picture_does_not_depend_on_its_batch(
    scheduler: str, pipe: StableDiffusionPipeline, clipseg: ClipSeg
) -> None:
    seeds = [3, 4]
    for each in with_scheduler(pipe, scheduler):
        together = Painter(each, clipseg, [PROMPTS] * 2, LAID).temper(seeds)
        for seed, found in zip(seeds, together, strict=True):
            alone = temper(each, clipseg, PROMPTS, LAID, seed=seed)
            assert farthest(alone.image, found.image) <= 1
            assert alone.unet_calls == found.unet_calls


def test_comparing_paints_the_plain_picture_beside_it(
    pipe: StableDiffusionPipeline, clipseg: ClipSeg
) -> None:
    alone = temper(pipe, clipseg, PROMPTS, LAID, seed=7)
    compared = temper(pipe, clipseg, PROMPTS, LAID, seed=7, compare=True)
    joint = temper(pipe, clipseg, PROMPTS, replace(LAID, layout="joint"), seed=7, compare=True)
    assert farthest(alone.image, compared.image) <= 1
    assert compared.plain is not None and joint.plain is not None
    assert farthest(compared.plain, joint.plain) <= 1
    assert compared.tempered_calls == alone.unet_calls
    assert compared.unet_calls == alone.unet_calls + 8


def test_boxes_by_hand_are_where_subjects_are_painted(
    pipe: StableDiffusionPipeline, clipseg: ClipSeg
) -> None:
    settings = replace(LAID, layout="auto", regions=HALVES)
    result = temper(pipe, clipseg, PROMPTS[:2], settings, seed=7)
    assert result.regions == HALVES


@torch.no_grad()
def test_a_background_prompt_paints_what_is_in_no_region(
    pipe: StableDiffusionPipeline, clipseg: ClipSeg
) -> None:
    corner = (Box(0, 0, 0.25, 0.25),)
    settings = replace(LAID, regions=corner, background_prompt="a red car")
    painted = temper(pipe, clipseg, ["a blue bird", "a cat"], replace(
        settings, regions=(*corner, Box(0.75, 0.75, 1, 1))
    ), seed=7)  # fmt: skip
    bare = temper(pipe, clipseg, ["a blue bird", "a cat"], replace(
        settings, regions=(*corner, Box(0.75, 0.75, 1, 1)), background_prompt=""
    ), seed=7)  # fmt: skip
    middle = (24, 24, 40, 40)
    assert spread(bare.image.crop(middle)) < 12  # plain: but for what the VAE makes of it
    assert spread(painted.image.crop(middle)) > 2 * spread(bare.image.crop(middle))
    assert painted.unet_calls >= bare.unet_calls + 8


def spread(image: object) -> int:
    return max(high - low for low, high in image.getextrema())  # type: ignore[attr-defined]


def test_auto_paints_regions_after_some_rounds_by_the_joint_prompt(
    pipe: StableDiffusionPipeline, clipseg: ClipSeg, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(LAID, layout="auto", rounds=JOINT_ROUNDS, preview="vae")
    joint = temper(pipe, clipseg, PROMPTS, settings, seed=8)
    assert joint.regions == (None, None, None)
    expected = temper(pipe, clipseg, PROMPTS, replace(settings, layout="joint"), seed=8)
    assert farthest(joint.image, expected.image) == 0
    on = replace(settings, rounds=5, max_cost=12)
    assert not any(temper(pipe, clipseg, PROMPTS, on, seed=8).regions)  # nothing is missing
    monkeypatch.setattr(tempering, "MISSING", 0.0)  # everything is
    more = temper(pipe, clipseg, PROMPTS, on, seed=8)
    assert more.rounds[:JOINT_ROUNDS] == joint.rounds
    assert [each.regions > 0 for each in more.rounds] == [False, False, True, True, True]
    assert any(more.regions) and not all(more.regions)  # what was seen kept its place
    assert more.kept is not None and joint.kept is not None
    assert more.kept.energy < joint.kept.energy


def test_many_subjects_have_regions_at_once_where_the_budget_pays_for_them(
    pipe: StableDiffusionPipeline, clipseg: ClipSeg
) -> None:
    crowd = [*PROMPTS, "a green frog"]
    cases: list[tuple[list[str], Any, str, bool]] = [
        (crowd, 3, "auto", True),
        (crowd, None, "auto", True),
        (crowd, 1.3, "auto", False),
        (crowd, 3, "joint", False),
        (PROMPTS, 3, "auto", False),
        (PROMPTS, 3, "regions", True),
        (PROMPTS[:1], 3, "regions", False),  # there is nothing to keep apart
    ]
    for prompts, budget, layout, apart in cases:
        settings = replace(LAID, layout=layout, budget=budget, max_cost=OF_THE_BUDGET)
        assert Painter(pipe, clipseg, [prompts], settings).apart == apart


def test_a_single_round_goes_back_once_in_every_cell(
    pipe: StableDiffusionPipeline, clipseg: ClipSeg
) -> None:
    settings = replace(LAID, rounds=1, max_cost=20)
    once = temper(pipe, clipseg, PROMPTS, settings, seed=7)
    plain = temper(pipe, clipseg, PROMPTS, replace(settings, backsteps=0, k=0), seed=7)
    assert once.unet_calls > plain.unet_calls
    assert farthest(once.image, plain.image) > 1


@pytest.mark.parametrize("harmonise", [0, 2])
def test_the_last_steps_are_one_pictures(
    pipe: StableDiffusionPipeline, clipseg: ClipSeg, harmonise: int
) -> None:
    settings = replace(LAID, rounds=None, accept=9, harmonise=harmonise)
    result = temper(pipe, clipseg, [*PROMPTS, "a green frog"], settings, seed=7)
    assert result.unet_calls == 4 * 0.75**2 * (8 - harmonise) + harmonise


def test_every_family_paints_in_regions(own_pipe: DiffusionPipeline, clipseg: ClipSeg) -> None:
    reported: list[float] = []
    result = temper(
        own_pipe, clipseg, PROMPTS, replace(LAID, rounds=2), seed=7, compare=True,
        progress=reported.append,
    )  # fmt: skip
    assert len(result.rounds) == 2
    assert all(result.regions)
    assert sum(reported) == pytest.approx(result.unet_calls)


@torch.no_grad()
def test_a_walk_goes_the_same_way_by_whichever_threshold_it_ends(
    pipe: StableDiffusionPipeline, clipseg: ClipSeg
) -> None:
    """So a sample that was walked for one budget serves others."""
    settings = replace(LAID, rounds=None, accept=None, early_accept=None, max_cost=6)
    painter = Painter(pipe, clipseg, [PROMPTS], settings)
    walks = [painter.accepting(Energies(9, accept)) for accept in (0.0, 0.3)]
    ways = []
    for by in walks:
        (watched,) = by.watch([7])
        walk = watched[-1]
        while not by.good(walk.kept) and by.may_go_on(walk) and len(walk.rounds) < 4:
            by.round([walk])
        ways.append(walk.rounds)
    shorter, longer = sorted(ways, key=len)
    assert longer[: len(shorter)] == shorter


def test_a_missing_subject_goes_all_the_way_back_and_an_impure_one_less_far(
    pipe: StableDiffusionPipeline, clipseg: ClipSeg, monkeypatch: pytest.MonkeyPatch
) -> None:
    painter, state = begun(pipe, clipseg, LAID)
    (number, *_) = painter.mender.failed(state)
    for missing, step in ((0.0, 0), (2.0, 2)):
        monkeypatch.setattr(mosaics, "MISSING", missing)
        assert painter.mender.back_to(state, number, 4) == step


@torch.no_grad()
def test_where_nothing_is_seen_all_but_one_subject_gets_a_region(
    pipe: StableDiffusionPipeline, clipseg: ClipSeg
) -> None:
    painter = Painter(pipe, clipseg, [PROMPTS], LAID)
    trunk = painter.sampler.start([7])[0]
    painter.sampler.denoise([trunk], 3)
    nothing = view_of(Image.new("RGB", (64, 64)), torch.zeros(3, 64, 64), 0.1)
    assert len(set(nothing.energies)) == 1
    x0 = painter.sampler.prediction(trunk, 4)[0]
    mosaic = painter.mender.onto(trunk, x0, nothing, torch.Generator())
    assert len(mosaic.cells) == 2
    assert len({cell.subject for cell in mosaic.cells}) == 2


def test_a_run_tells_its_regions_and_can_be_repeated(tmp_path: object) -> None:
    words = [
        "--tempered_inference", "--model", "pocket", "--output", str(tmp_path), "--steps", "8",
        "--prompts", "a red car", "a blue bird", "--regions", "0,0,0.5,1", "0.5,0,1,1",
        "--harmonise", "1",
    ]  # fmt: skip
    first = call(*words)
    assert first.code == 0, first.err
    assert first.run["regions"] == [list(box) for box in HALVES]
    again = call(
        "--tempered_inference", "--output", str(tmp_path), "--repeat",
        str(first.folder / "run.json"),
    )  # fmt: skip
    assert again.code == 0, again.err
    for name in ("tempered.png", "sheet.png"):
        assert (again.folder / name).read_bytes() == (first.folder / name).read_bytes()
