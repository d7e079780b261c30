"""Today's searches: what each comes to where its rule has nothing to decide, and what it costs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from pictures import farthest

from benchmarks import methods, peers, robustness
from benchmarks.methods import Case, Models
from benchmarks.prompts import Prompt
from benchmarks.robustness import CONDITIONS, bent_models
from pocket.world import Noun
from segmentation import ClipSeg
from settings import Tempering

PAIR = Prompt((Noun("cat"), Noun("car", "red")), " and ")
CASES = [Case(PAIR, 3), Case(PAIR, 4)]
# All pictures pass, or none does.
CONTENT = Tempering(
    steps=6, stoptime=5, backsteps=3, early_look=2, accept=9, early_accept=9, guidance_scale=4.0
)
NEVER = replace(CONTENT, accept=0, early_accept=9)


@pytest.fixture(scope="module")
def models(pipe: StableDiffusionPipeline, clipseg: ClipSeg) -> Models:
    return Models(pipe, clipseg)


@pytest.mark.parametrize("method", [peers.reseeded, methods.tempered])
def test_what_is_good_at_once_is_plain(models: Models, method: methods.Method) -> None:
    plain = methods.plain(models, CASES, CONTENT)
    found = method(models, CASES, settings=CONTENT)  # type: ignore[call-arg]
    for one, other in zip(plain, found, strict=True):
        assert farthest(one.image, other.image) == 0
        assert other.unet_calls == 6


def test_new_seeds_cost_all_steps_to_the_look_and_never_pass_the_cap(models: Models) -> None:
    settings = replace(NEVER, max_cost=3.0)
    # 5 to the first look, 5 a round, 1 to the end: two rounds pay, a third would pass 18.
    assert [p.unet_calls for p in peers.reseeded(models, CASES, settings)] == [16, 16]


def test_depth_first_search_is_plain_where_all_pass_and_backtracks_as_often_as_it_may(
    models: Models,
) -> None:
    plain = methods.plain(models, CASES, CONTENT)
    found = peers.depth_first(models, CASES, CONTENT, backtracks=3)
    for one, other in zip(plain, found, strict=True):
        assert farthest(one.image, other.image) == 0
    # A quarter of six steps is two of them.
    found = peers.depth_first(models, CASES, NEVER, backtracks=3)
    assert [each.unet_calls for each in found] == [6 + 3 * 2] * 2


def test_search_over_paths_costs_what_its_paths_do(models: Models) -> None:
    # To step 5, twice back to 0 and to 5 again, to the end.
    (found,) = peers.over_paths(models, CASES[:1], CONTENT, paths=1, copies=2, times=1)
    assert found.unet_calls == 5 + 2 * 5 + 1


@pytest.mark.parametrize("growth", [0.0, 0.5])
def test_particles_cost_as_many_pictures_and_are_the_same_again(
    models: Models, growth: float
) -> None:
    before = models.pipe.scheduler
    one, other = (
        peers.particles(models, CASES[:1], CONTENT, count=2, strength=5.0, growth=growth)[0]
        for _ in range(2)
    )
    assert one.unet_calls == 12
    assert farthest(one.image, other.image) == 0
    assert models.pipe.scheduler is before


def test_systematic_resampling_takes_each_by_its_weight() -> None:
    draw = torch.Generator().manual_seed(1)
    even = peers.systematic(torch.full((4,), 0.25).double(), [0.3, 0.1, 0.4, 0.2], draw)
    assert sorted(even) == [0, 1, 2, 3]
    weights = torch.tensor([0.5, 0.0, 0.5, 0.0], dtype=torch.float64)
    assert Counter(peers.systematic(weights, [1, 2, 3, 4], draw)) == {0: 2, 2: 2}


def test_attend_and_excite_that_is_good_at_our_look_is_its_own_picture(models: Models) -> None:
    alone = methods.attend_and_excite(models, CASES[:1], CONTENT, 2.5)[0]
    found = peers.attend_and_temper(models, CASES[:1], CONTENT, 2.5)[0]
    assert farthest(alone.image, found.image) <= 1
    assert found.unet_calls == alone.unet_calls
    more = peers.attend_and_temper(models, CASES[:1], NEVER, 2.5)[0]
    assert more.unet_calls > alone.unet_calls


def test_a_condition_changes_what_clipseg_sees_and_nothing_else(models: Models) -> None:
    image = methods.plain(models, CASES[:1], CONTENT)[0].image

    def seen(name: str) -> torch.Tensor:
        painter = bent_models(models, name).painter(CASES[:1], CONTENT)
        return painter.look([image])[0].probabilities.logit(eps=1e-6)

    usual = seen(robustness.USUAL)
    assert torch.equal(
        usual, models.painter(CASES[:1], CONTENT).look([image])[0].probabilities.logit(eps=1e-6)
    )
    torch.testing.assert_close(seen("a 0.5, b -1"), 0.5 * usual - 1, atol=1e-2, rtol=1e-3)
    bias = (seen("s 2") - usual).clamp(-9, 9).flatten(1).median(dim=1).values
    assert bias.abs().max() > 0.05
    for name, condition in CONDITIONS.items():
        if condition.blur or condition.damage:
            assert not torch.equal(seen(name), usual)
    assert torch.equal(seen("s 2"), seen("s 2"))
