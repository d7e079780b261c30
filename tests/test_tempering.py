"""The rounds, held against diffusers' own pipeline and the schedulers' own noise levels."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from accelerate import cpu_offload
from conftest import with_scheduler
from diffusers import (
    DiffusionPipeline,
    EulerAncestralDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
)
from pictures import diffusers_picture, farthest, told_level
from PIL import Image

from errors import InputError
from families import networks_of
from loaders import FLOW_SCHEDULERS, OFFLOADS, load_pipeline, place
from sampling import Sampler
from segmentation import ClipSeg, View
from tempering import Painter, Result, State, Tempering, temper

PROMPTS = ["a black dog", "a toy robot"]
SEEDED = Tempering(steps=20, stoptime=15, backsteps=5, rounds=1)
FEW = Tempering(steps=8, stoptime=6, backsteps=3, rounds=1)
JOINED = SEEDED.joiner.join(PROMPTS)


def test_the_plain_picture_of_a_comparison_is_diffusers_picture(
    any_pipe: StableDiffusionPipeline, clipseg: ClipSeg
) -> None:
    result = temper(any_pipe, clipseg, PROMPTS, FEW, seed=7, compare=True)
    assert result.plain is not None
    assert farthest(result.plain, diffusers_picture(any_pipe, JOINED, FEW, 7)) <= 1
    assert farthest(result.plain, result.image) > 1  # tempering did something


def test_comparing_does_not_change_the_tempered_picture(
    any_pipe: StableDiffusionPipeline, clipseg: ClipSeg
) -> None:
    alone = temper(any_pipe, clipseg, PROMPTS, FEW, seed=7)
    compared = temper(any_pipe, clipseg, PROMPTS, FEW, seed=7, compare=True)
    assert alone.plain is None
    assert farthest(alone.image, compared.image) <= 1


def test_k_0_and_no_step_back_is_the_plain_picture(
    pipe: StableDiffusionPipeline, clipseg: ClipSeg
) -> None:
    settings = Tempering(steps=8, stoptime=6, backsteps=0, k=0, rounds=1)
    result = temper(pipe, clipseg, PROMPTS, settings, seed=7)
    assert farthest(result.image, diffusers_picture(pipe, JOINED, settings, 7)) <= 1


def test_going_back_after_the_last_step_by_none_changes_nothing(
    pipe: StableDiffusionPipeline, clipseg: ClipSeg
) -> None:
    settings = Tempering(steps=8, stoptime=8, backsteps=0, k=100, rounds=1)
    result = temper(pipe, clipseg, PROMPTS, settings, seed=7)
    assert farthest(result.image, diffusers_picture(pipe, JOINED, settings, 7)) == 0


def test_k_0_gives_back_the_plain_picture_within_a_tolerance(
    any_pipe: StableDiffusionPipeline, clipseg: ClipSeg
) -> None:
    """The way is walked twice with other discretisation errors: README states the tolerance.

    PNDM's own error is large at few steps and such guidance (20/255 on the pocket at 20 steps).
    """
    if isinstance(any_pipe.scheduler, (EulerAncestralDiscreteScheduler, LCMScheduler)):
        pytest.skip("draws noise at every step")
    finer = 3 if isinstance(any_pipe.scheduler, PNDMScheduler) else 1
    way = Tempering(steps=20 * finer, stoptime=15 * finer, backsteps=5 * finer, rounds=1)
    away = {}
    for k in (0.0, 1e6):
        # Threshold 0 gives every pixel to a class, so that a large k forgets the whole picture.
        settings = replace(way, k=k, threshold=0)
        painter = Painter(any_pipe, clipseg, [PROMPTS], settings)
        away[k] = [distance_from_plain(painter, seed) for seed in range(2)]
    assert np.mean(away[0.0]) < 8
    assert np.mean(away[1e6]) > 1.5 * np.mean(away[0.0])


@pytest.mark.parametrize(
    ("family", "scheduler"),
    [("sd2", "euler"), ("sdxl", "euler"), *(("sd3", name) for name in FLOW_SCHEDULERS)],
)
def test_k_0_gives_back_the_plain_picture_of_every_family(
    family: str, scheduler: str, clipseg: ClipSeg
) -> None:
    """But for the sampler's own error; how large that is depends on what the network predicts."""
    for pipe in with_scheduler(tiny.shared(family), scheduler):
        kept, forgotten = (
            distance_from_plain(Painter(pipe, clipseg, [PROMPTS], settings), 1)
            for settings in (replace(SEEDED, k=k, threshold=0) for k in (0.0, 1e6))
        )
        assert forgotten > 2
        assert kept < forgotten / 4


def distance_from_plain(painter: Painter, seed: int) -> float:
    """Mean absolute difference of the tempered and the plain picture, in 1/255."""
    result = painter.temper([seed], compare=True)[0]
    assert result.plain is not None
    return float(np.abs(np.asarray(result.plain, int) - np.asarray(result.image, int)).mean())


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def test_renoised_latents_of_every_family_have_the_schedulers_variance(
    family_pipe: DiffusionPipeline, clipseg: ClipSeg
) -> None:
    for k in (0.5, 1e6):
        painter = Painter(family_pipe, clipseg, [PROMPTS], replace(SEEDED, k=k))
        shape = (1, painter.sampler.shape[1], 256, 256)
        branch = back_from(painter, torch.full(shape, 2.0), torch.randn(shape, generator=rng(1)))
        alpha, sigma = told_level(branch)
        seen = branch.x()
        assert seen.var().item() == pytest.approx(sigma**2, rel=0.02)
        assert seen.mean().item() == pytest.approx(2 * alpha, rel=0.03)


def back_from(painter: Painter, x0: torch.Tensor, eps: torch.Tensor) -> Any:
    """The branch that goes back to step 10 from a picture of one class, of uncertainty 0.7."""
    one = torch.zeros(1, 1)
    view = View(Image.new("RGB", (1, 1)), one[None], one.long(), one, torch.tensor([0.7]))
    state = State(painter.sampler.start([7])[0], 15, x0, eps, view)
    return painter.propose(state, 5, rng(2))


@torch.no_grad()
@pytest.mark.parametrize("k", [0.0, 0.5, 4.0, 1e6])
def test_renoised_latents_have_the_schedulers_variance(
    any_pipe: StableDiffusionPipeline, clipseg: ClipSeg, k: float
) -> None:
    painter = Painter(any_pipe, clipseg, [PROMPTS], replace(SEEDED, k=k))
    shape = (1, 4, 256, 256)
    branch = back_from(painter, torch.full(shape, 2.0), torch.randn(shape, generator=rng(1)))
    # PNDM evaluates one timestep twice.
    timesteps = painter.sampler.start([0])[0].timesteps.unique().flip(0)
    assert float(branch.timestep) == float(timesteps[10])
    # As the U-Net sees it: alpha x0 plus noise of sigma squared at the level that it is told of.
    seen = branch.x()
    alpha, sigma = told_level(branch)
    # 262,144 draws: 0.3 % standard error of the variance, 0.002 of the mean
    assert seen.var().item() == pytest.approx(sigma**2, rel=0.02)
    assert seen.mean().item() == pytest.approx(2 * alpha, rel=0.03)


@torch.no_grad()
def test_cfg_rescale_scales_the_fresh_noise_in_tenths(
    pipe: StableDiffusionPipeline, clipseg: ClipSeg
) -> None:
    zeros = torch.zeros(1, 4, 128, 128)
    spread = {}
    for scale in (5.0, 10.0):
        settings = replace(SEEDED, cfg_rescale=scale, k=1e6)
        painter = Painter(pipe, clipseg, [PROMPTS], settings)
        spread[scale] = back_from(painter, zeros, zeros).latents.std()
    assert float(spread[5.0] / spread[10.0]) == pytest.approx(0.5, rel=1e-4)


def test_fresh_noise_is_not_the_noise_at_the_start(
    pipe: StableDiffusionPipeline, clipseg: ClipSeg, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream of a seed goes on: were it begun anew, the start would be drawn again."""
    drawn: list[torch.Tensor] = []
    noise = Sampler.noise

    def recorded(*args: Any) -> torch.Tensor:
        drawn.append(noise(*args))
        return drawn[-1]

    monkeypatch.setattr(Sampler, "noise", recorded)
    temper(pipe, clipseg, PROMPTS, FEW, seed=7)
    start, fresh = drawn
    pair = torch.stack([start.flatten(), fresh.flatten()])
    assert abs(float(torch.corrcoef(pair)[0, 1])) < 0.15  # 1,024 values: 0.03 standard error


def test_a_cycle_costs_30_unet_calls_with_the_default_parameters(
    pipe: StableDiffusionPipeline, clipseg: ClipSeg
) -> None:
    pictures: list[int] = []
    reported: list[float] = []
    hook = pipe.unet.register_forward_pre_hook(lambda _, args: pictures.append(len(args[0]) // 2))
    try:
        result = temper(
            pipe, clipseg, PROMPTS, SEEDED, seed=7, compare=True, progress=reported.append
        )
    finally:
        hook.remove()
    assert sum(pictures) == 30
    assert len(pictures) == 25  # the last five steps are shared by the two pictures
    assert sum(reported) == 30
    assert result.unet_calls == 30
    painter = Painter(pipe, clipseg, [PROMPTS], SEEDED)
    assert painter.unet_calls(compare=True) == 30
    assert painter.unet_calls(compare=False) == 25


def test_the_bar_is_exact_for_every_scheduler(
    any_pipe: StableDiffusionPipeline, clipseg: ClipSeg
) -> None:
    for compare in (False, True):
        reported: list[float] = []
        temper(any_pipe, clipseg, PROMPTS, FEW, compare=compare, progress=reported.append)
        painter = Painter(any_pipe, clipseg, [PROMPTS], FEW)
        assert sum(reported) == painter.unet_calls(compare=compare)


def test_a_picture_does_not_depend_on_its_batch(
    pipe: StableDiffusionPipeline, clipseg: ClipSeg
) -> None:
    others = ["a red car", "a blue bird"]
    together = Painter(pipe, clipseg, [PROMPTS, others], FEW).temper([3, 4])
    for prompts, seed, found in zip([PROMPTS, others], [3, 4], together, strict=True):
        alone = temper(pipe, clipseg, prompts, FEW, seed=seed)
        assert farthest(alone.image, found.image) <= 1


def test_every_legal_stop_and_way_back_runs(
    any_pipe: StableDiffusionPipeline, clipseg: ClipSeg
) -> None:
    expected = diffusers_picture(any_pipe, JOINED, Tempering(steps=6), 2024)
    for stoptime, backsteps in ((1, 0), (1, 1), (6, 6), (6, 1), (3, 3)):
        settings = Tempering(steps=6, stoptime=stoptime, backsteps=backsteps, rounds=1)
        result = temper(any_pipe, clipseg, PROMPTS, settings, compare=True)
        assert result.plain is not None
        assert farthest(result.plain, expected) <= 1, settings


ROUNDS = Tempering(
    steps=8, stoptime=5, backsteps=4, early_look=0, rounds=3, accept=0, layout="joint"
)


def test_a_picture_that_is_good_enough_is_the_plain_one_and_costs_no_more(
    any_pipe: StableDiffusionPipeline, clipseg: ClipSeg
) -> None:
    settings = replace(ROUNDS, accept=1e9)
    result = temper(any_pipe, clipseg, PROMPTS, settings, seed=7, compare=True)
    assert result.rounds == ()
    assert result.plain is not None
    assert farthest(result.image, result.plain) == 0
    assert farthest(result.image, diffusers_picture(any_pipe, JOINED, settings, 7)) == 0
    painter = Painter(any_pipe, clipseg, [PROMPTS], settings)
    assert result.unet_calls == painter.sampler.evaluations(0, settings.steps)


def test_rounds_that_go_back_by_no_step_are_none(
    pipe: StableDiffusionPipeline, clipseg: ClipSeg
) -> None:
    result = temper(pipe, clipseg, PROMPTS, replace(ROUNDS, backsteps=0), seed=7)
    assert result.rounds == ()
    assert farthest(result.image, diffusers_picture(pipe, JOINED, ROUNDS, 7)) <= 1


def test_rounds_keep_only_what_lowers_the_energy(
    any_pipe: StableDiffusionPipeline, clipseg: ClipSeg
) -> None:
    result = temper(any_pipe, clipseg, PROMPTS, ROUNDS, seed=7)
    assert len(result.rounds) == ROUNDS.rounds
    lowest = result.interrupted.energy
    for each in result.rounds:
        assert each.kept == (each.energy < lowest)
        lowest = min(lowest, each.energy)
    assert result.kept is not None
    assert result.kept.energy == lowest


def test_what_no_round_could_better_is_the_plain_picture(
    pipe: StableDiffusionPipeline, clipseg: ClipSeg, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempering.keeps", lambda *_: False)
    result = temper(pipe, clipseg, PROMPTS, ROUNDS, seed=7)
    assert farthest(result.image, diffusers_picture(pipe, JOINED, ROUNDS, 7)) <= 1


def test_a_very_high_temperature_keeps_all_but_the_last_round(
    pipe: StableDiffusionPipeline, clipseg: ClipSeg
) -> None:
    """In the last round the temperature is 0."""
    settings = replace(ROUNDS, temperature=1e9)
    rounds = temper(pipe, clipseg, PROMPTS, settings, seed=7).rounds
    assert [each.kept for each in rounds[:-1]] == [True, True]
    assert rounds[-1].kept == (rounds[-1].energy < rounds[-2].energy)


def test_the_calls_of_all_rounds_are_counted_and_foretold(
    any_pipe: StableDiffusionPipeline, clipseg: ClipSeg
) -> None:
    settings = replace(ROUNDS, candidates=2, cooling=0.5)
    reported: list[float] = []
    with_hook: list[int] = []
    hook = any_pipe.unet.register_forward_pre_hook(
        lambda _, args: with_hook.append(len(args[0]) // 2)
    )
    try:
        result = temper(any_pipe, clipseg, PROMPTS, settings, progress=reported.append)
    finally:
        hook.remove()
    assert [each.backsteps for each in result.rounds] == [4, 2, 1]
    assert sum(with_hook) == sum(reported) == result.unet_calls
    assert result.unet_calls == Painter(any_pipe, clipseg, [PROMPTS], settings).unet_calls(
        compare=False
    )


def test_pictures_that_are_done_leave_the_batch_and_change_nothing_for_the_others(
    pipe: StableDiffusionPipeline, clipseg: ClipSeg
) -> None:
    seeds = [3, 4, 5]
    energies = [
        temper(pipe, clipseg, PROMPTS, ROUNDS, seed=seed).interrupted.energy for seed in seeds
    ]
    lowest, middle, highest = sorted(energies)
    settings = replace(ROUNDS, accept=(middle + highest) / 2)  # the worst goes on alone
    assert lowest <= middle < highest
    together = Painter(pipe, clipseg, [PROMPTS] * 3, settings).temper(seeds)
    assert [bool(found.rounds) for found in together] == [e == max(energies) for e in energies]
    for seed, found in zip(seeds, together, strict=True):
        alone = temper(pipe, clipseg, PROMPTS, settings, seed=seed)
        assert farthest(alone.image, found.image) <= 1
        assert alone.unet_calls == found.unet_calls


EARLY = replace(ROUNDS, early_look=3)


def test_what_looks_bad_early_goes_no_further_before_the_rounds_are_over(
    any_pipe: StableDiffusionPipeline, clipseg: ClipSeg
) -> None:
    settings = replace(EARLY, early_accept=0)
    reported: list[float] = []
    result = temper(any_pipe, clipseg, PROMPTS, settings, seed=7, progress=reported.append)
    assert result.interrupted_at == result.kept_at == 3
    assert [each.step for each in result.rounds] == [3, 3, 3]
    assert sum(reported) == result.unet_calls
    painter = Painter(any_pipe, clipseg, [PROMPTS], settings)
    evaluations = painter.sampler.evaluations
    rounds = 3 * evaluations(0, 3)  # 4 steps back from the third is the start
    assert result.unet_calls == evaluations(0, 8) + rounds
    assert result.unet_calls <= painter.unet_calls(compare=False)


def test_an_early_look_at_which_all_are_good_enough_changes_nothing(
    pipe: StableDiffusionPipeline, clipseg: ClipSeg
) -> None:
    late, early = (
        temper(pipe, clipseg, PROMPTS, settings, seed=7)
        for settings in (ROUNDS, replace(EARLY, early_accept=1e9))
    )
    assert farthest(late.image, early.image) == 0
    assert late.rounds == early.rounds


def test_who_has_come_further_takes_the_place_of_who_was_left_early(
    pipe: StableDiffusionPipeline, clipseg: ClipSeg
) -> None:
    """Whatever the energies: those of different looks are not compared."""
    left = temper(pipe, clipseg, PROMPTS, replace(EARLY, early_accept=0), seed=7)
    lowest = min(each.energy for each in left.rounds)
    result = temper(pipe, clipseg, PROMPTS, replace(EARLY, early_accept=lowest), seed=7)
    assert result.interrupted_at == 3
    assert result.kept_at == 5
    first = next(i for i, each in enumerate(result.rounds) if each.step == 5)
    assert result.rounds[first].kept


def test_a_round_that_starts_after_the_early_look_is_not_looked_at_there(
    pipe: StableDiffusionPipeline, clipseg: ClipSeg
) -> None:
    settings = replace(EARLY, backsteps=2, early_accept=1e9)
    shallow = temper(pipe, clipseg, PROMPTS, settings, seed=7)
    assert [each.step for each in shallow.rounds] == [5, 5, 5]


@torch.no_grad()
@pytest.mark.parametrize(("look_guidance", "seen_at"), [(2, 2), (9, 7.5)])
def test_clipseg_sees_x0_at_its_own_guidance_and_at_most_at_the_samplers(
    pipe: StableDiffusionPipeline, clipseg: ClipSeg, look_guidance: float, seen_at: float
) -> None:
    painter = Painter(pipe, clipseg, [PROMPTS], replace(FEW, look_guidance=look_guidance))
    branches = painter.sampler.start([7])
    painter.sampler.denoise(branches, 3)
    seen = painter.examine(branches, 3)[0].view.image
    assert farthest(seen, painter.sampler.preview(branches, seen_at)[0]) == 0
    assert farthest(seen, painter.sampler.preview(branches, 9.5 - seen_at)[0]) > 1


def test_one_prompt_and_three_prompts_are_tempered(
    pipe: StableDiffusionPipeline, clipseg: ClipSeg
) -> None:
    for prompts in (["a cat"], ["a cat", "a dog", "a red car"]):
        result = temper(pipe, clipseg, prompts, FEW)
        assert result.probabilities.shape == (len(prompts), 64, 64)
        assert result.interrupted.matrix.shape == (len(prompts), len(prompts))


def test_offloading_changes_nothing(pipe: StableDiffusionPipeline, clipseg: ClipSeg) -> None:
    offloaded = load_pipeline("pocket", device="cpu", dtype="fp32")
    for part in (offloaded.unet, offloaded.vae):
        cpu_offload(part, "cpu")  # as sequential offload: weights on "meta"
    for preview in ("vae", "linear"):
        settings = Tempering(steps=4, stoptime=3, backsteps=1, preview=preview, rounds=1)
        expected, found = (temper(each, clipseg, PROMPTS, settings) for each in (pipe, offloaded))
        assert farthest(found.image, expected.image) <= 1
        assert farthest(found.interrupted.image, expected.interrupted.image) <= 1


@pytest.mark.parametrize("preview", ["vae", "linear"])
def test_every_family_is_annealed(
    own_pipe: DiffusionPipeline, clipseg: ClipSeg, preview: str
) -> None:
    settings = replace(EARLY, early_accept=1e9, width=48, height=32, preview=preview)
    reported: list[float] = []
    result = temper(
        own_pipe, clipseg, PROMPTS, settings, seed=7, compare=True, progress=reported.append
    )
    assert {each.step for each in result.rounds} == {settings.stoptime}
    assert len(result.rounds) == settings.rounds
    assert result.interrupted.image.size == result.image.size == (48, 32)
    assert sum(reported) == result.unet_calls
    assert result.plain is not None
    assert farthest(result.plain, diffusers_picture(own_pipe, JOINED, settings, 7)) <= 1


OFFLOADED = Tempering(steps=3, stoptime=2, backsteps=1, rounds=2, accept=0)


@pytest.mark.parametrize("lora", [False, True], ids=["alone", "with a LoRA"])
@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_offloading_changes_nothing_in_any_family(
    family: str, offload: str, lora: bool, clipseg: ClipSeg
) -> None:
    """By the hooks that diffusers uses, from the CPU to the CPU: all of it but a GPU's memory."""
    offloaded = with_lora(family) if lora else tiny.FAMILIES[family]()
    if offload == "model":
        place(offloaded, torch.device("cpu"), offload)
    else:  # diffusers would say "cpu:0", which torch takes for another device than "cpu"
        for part in networks_of(offloaded).values():
            cpu_offload(part, "cpu")
        assert offloaded.vae.device.type == "meta"
    found = temper(offloaded, clipseg, PROMPTS, OFFLOADED, compare=True)
    expected = kept_in_place(family, lora, clipseg)
    for name in ("image", "plain"):
        assert farthest(getattr(found, name), getattr(expected, name)) <= 1


def with_lora(family: str) -> Any:
    pipe = tiny.FAMILIES[family]()
    pipe.load_lora_weights(tiny.lora(pipe))
    return pipe


@cache
def kept_in_place(family: str, lora: bool, clipseg: ClipSeg) -> Result:
    """What the model paints where nothing is offloaded."""
    pipe = with_lora(family) if lora else tiny.shared(family)
    return temper(pipe, clipseg, PROMPTS, OFFLOADED, compare=True)


def test_the_linear_preview_has_the_colours_of_the_vaes(
    pipe: StableDiffusionPipeline, clipseg: ClipSeg
) -> None:
    views = [
        temper(pipe, clipseg, PROMPTS, replace(SEEDED, preview=preview), seed=7).interrupted.image
        for preview in ("vae", "linear")
    ]
    small = [np.asarray(view.resize((16, 16), Image.Resampling.BOX)).ravel() for view in views]
    assert np.corrcoef(small)[0, 1] > 0.8


def test_sizes_and_the_linear_preview(pipe: StableDiffusionPipeline, clipseg: ClipSeg) -> None:
    settings = Tempering(
        steps=4, stoptime=3, backsteps=1, height=64, width=96, preview="linear", rounds=1
    )
    result = temper(pipe, clipseg, PROMPTS, settings)
    assert result.image.size == (96, 64)
    assert result.interrupted.image.size == (96, 64)


def test_the_users_pipeline_keeps_its_scheduler(
    pipe: StableDiffusionPipeline, clipseg: ClipSeg
) -> None:
    before = pipe.scheduler
    config = dict(before.config)
    temper(pipe, clipseg, PROMPTS, FEW)
    assert pipe.scheduler is before
    assert dict(before.config) == config


def test_the_prompt_lists_of_a_batch_are_of_one_length(
    pipe: StableDiffusionPipeline, clipseg: ClipSeg
) -> None:
    with pytest.raises(InputError, match="the same number of prompts, got 2 and 1"):
        Painter(pipe, clipseg, [PROMPTS, PROMPTS[:1]], FEW)


@pytest.mark.parametrize("prompts", [[], ["a dog", " "]])
def test_missing_prompts_are_refused(
    pipe: StableDiffusionPipeline, clipseg: ClipSeg, prompts: list[str]
) -> None:
    with pytest.raises(InputError):
        temper(pipe, clipseg, prompts, FEW)


@pytest.mark.parametrize(
    "settings",
    [FEW, ROUNDS, replace(ROUNDS, accept=100), replace(EARLY, early_accept=0)],
    ids=["once", "rounds", "good at once", "left early"],
)
# A call a step, two, and one more a start.
@pytest.mark.parametrize("any_pipe", ["euler", "heun", "pndm"], indirect=True)
def test_a_comparison_tells_what_the_tempered_picture_costs_by_itself(
    any_pipe: StableDiffusionPipeline, clipseg: ClipSeg, settings: Tempering
) -> None:
    alone, compared = (
        temper(any_pipe, clipseg, PROMPTS, settings, seed=7, compare=each) for each in (False, True)
    )
    assert compared.tempered_calls == alone.tempered_calls == alone.unet_calls
    assert compared.unet_calls >= alone.unet_calls


def test_several_seeds_of_one_prompt_share_its_text(
    pipe: StableDiffusionPipeline, clipseg: ClipSeg
) -> None:
    others = ["a cat", "a red car"]
    painter = Painter(pipe, clipseg, [PROMPTS, others], ROUNDS)
    found = painter.temper([3, 4, 3], rows=[1, 0, 0], compare=True)
    for result, prompts in zip(found, (others, PROMPTS, PROMPTS), strict=True):
        alone = temper(pipe, clipseg, prompts, ROUNDS, seed=result.seed, compare=True)
        assert alone.plain is not None
        assert result.plain is not None
        assert farthest(alone.image, result.image) <= 1
        assert farthest(alone.plain, result.plain) <= 1
        assert alone.interrupted.energy == pytest.approx(result.interrupted.energy, abs=1e-3)
    with pytest.raises(InputError, match="must have 2 seeds, one a list of prompts, got 1"):
        painter.temper([3], rows=[0, 1])
