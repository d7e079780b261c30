"""The laboratory: its prompts, its methods on the bundled model, and its figures worked by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from pictures import diffusers_picture, farthest
from PIL import Image

from benchmarks import methods, quality
from benchmarks.methods import Case, Models
from benchmarks.prompts import Prompt, development, laboratory
from benchmarks.roster import NEVER, PLAIN, ROSTER
from benchmarks.search import TOPICS
from pocket.world import Noun
from sampling import Sampler
from segmentation import ClipSeg
from settings import Tempering

FEW = Tempering(steps=6, stoptime=4, backsteps=2, rounds=1, guidance_scale=7.5)
PAIR = Prompt((Noun("cat"), Noun("clock", "red")), " and ")
CASES = [Case(PAIR, 3), Case(Prompt((Noun("dog"), Noun("car", "blue")), " and "), 4)]


@pytest.fixture
def models(pipe: StableDiffusionPipeline, clipseg: ClipSeg) -> Models:
    return Models(pipe, clipseg)


# --- Prompts.


def test_the_laboratory_has_the_benchmarks_subsets_and_one_of_three_subjects() -> None:
    assert {name: len(prompts) for name, prompts in laboratory().items()} == {
        "animal_animal": 66,
        "animal_object": 144,
        "object_object": 66,
        "three_subjects": 66,
    }
    for prompts in laboratory().values():
        for prompt in prompts:
            subjects = [noun.subject for noun in prompt.nouns]
            assert len(set(subjects)) == len(subjects)


def test_no_prompt_that_settings_are_chosen_on_is_reported() -> None:
    texts = [
        {prompt.text for prompts in sets.values() for prompt in prompts}
        for sets in (laboratory(), development())
    ]
    assert not texts[0] & texts[1]


# --- Methods.


def test_plain_is_diffusers_picture(models: Models) -> None:
    painted = methods.plain(models, CASES, FEW)
    for case, found in zip(CASES, painted, strict=True):
        expected = diffusers_picture(models.pipe, case.prompt.text, FEW, case.seed)
        assert farthest(found.image, expected) <= 1
        assert found.unet_calls == 6


def test_one_candidate_is_plain_and_more_are_painted_only_where_needed(models: Models) -> None:
    plain = methods.plain(models, CASES, FEW)
    content = methods.best_of_n(models, CASES, FEW, n=3, accept=math.inf)
    for one, other in zip(plain, content, strict=True):
        assert farthest(one.image, other.image) == 0
        assert other.unet_calls == 6
    assert [p.unet_calls for p in methods.best_of_n(models, CASES, FEW, n=3, accept=NEVER)] == [
        18,
        18,
    ]


def test_the_best_of_n_has_the_lowest_energy_of_all(models: Models) -> None:
    seeds = [3 + number * methods.NEXT_CANDIDATE for number in range(4)]
    cases = [Case(PAIR, seed) for seed in seeds]
    images = [each.image for each in methods.plain(models, cases, FEW)]
    energies = [view.energy for view in models.painter(cases, FEW).look_twice(images)]
    best = images[energies.index(min(energies))]
    found = methods.best_of_n(models, CASES[:1], FEW, n=4, accept=NEVER)[0]
    assert farthest(found.image, best) <= 1
    assert max(energies) > min(energies)


def test_composing_one_prompt_is_plain_guidance(models: Models) -> None:
    alone = [Case(Prompt((Noun("cat"),), " and "), 3)]
    composed = methods.composable(models, alone, FEW, weight=FEW.guidance_scale)[0]
    plain = methods.plain(models, alone, FEW)[0]
    assert farthest(composed.image, plain.image) <= 1
    assert composed.unet_calls == plain.unet_calls


def test_composing_two_prompts_costs_three_halves_a_step(models: Models) -> None:
    assert methods.composable(models, CASES, FEW, weight=5)[0].unet_calls == 9


def test_composing_the_whole_prompt_with_parts_of_no_weight_is_plain_guidance(
    models: Models,
) -> None:
    composed = methods.composable(models, CASES, FEW, weight=0, joined=FEW.guidance_scale)
    for case, one in zip(CASES, composed, strict=True):
        plain = methods.plain(models, [case], FEW)[0]
        assert farthest(one.image, plain.image) <= 1
        assert one.unet_calls == 12


def test_restarting_adds_the_noise_between_two_steps(models: Models) -> None:
    sampler = models.sampler(CASES[:1], FEW)
    branch = sampler.start([3])[0]
    branch.latents = torch.zeros(1, 4, 256, 256)
    again = methods.noisier(sampler, branch, at=4, to=2)
    sigmas = branch.scheduler.sigmas
    expected = float(sigmas[2] ** 2 - sigmas[4] ** 2)
    assert again.latents.var().item() == pytest.approx(expected, rel=0.02)
    assert methods.restart(models, CASES, FEW, times=2)[0].unet_calls == 6 + 2 * FEW.backsteps


def test_attend_and_excite_without_excitement_is_the_plain_ddim_picture(models: Models) -> None:
    case = CASES[:1]
    painted = methods.attend_and_excite(models, case, FEW, scale_factor=0)[0]
    control = methods.ddim(models, case, FEW)[0]
    assert farthest(painted.image, control.image) <= 1
    assert control.unet_calls == 6
    assert farthest(control.image, methods.plain(models, case, FEW)[0].image) > 1
    assert type(models.pipe.scheduler).__name__ == "EulerDiscreteScheduler"


def test_attend_and_excite_tends_to_the_subjects_and_counts_what_it_runs(models: Models) -> None:
    tokens = methods.subject_tokens(models.pipe.tokenizer, PAIR)
    ids = models.pipe.tokenizer(PAIR.text).input_ids
    assert [models.pipe.tokenizer.decode(ids[i]).strip() for i in tokens] == ["cat", "clock"]
    before = {name: type(each) for name, each in models.pipe.unet.attn_processors.items()}
    painted = methods.attend_and_excite(models, CASES[:1], FEW, scale_factor=20)[0]
    assert painted.unet_calls >= 6 + 3 / 2  # a look of half a call before each that is altered
    after = {name: type(each) for name, each in models.pipe.unet.attn_processors.items()}
    assert after == before
    assert farthest(painted.image, methods.plain(models, CASES[:1], FEW)[0].image) > 1


def test_every_method_of_the_roster_starts_from_the_same_latents(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attend-and-Excite's loop is not ours: that it is plain DDIM without excitement shows it.

    Thresholds are given, so that no sample is taken.
    """
    given: list[Any] = []
    start = Sampler.start

    def recorded(sampler: Sampler, seeds: Sequence[int], *rows: Any) -> Any:
        branches = start(sampler, seeds, *rows)
        given.append(branches[0].latents / branches[0].scheduler.init_noise_sigma)
        return branches

    monkeypatch.setattr(Sampler, "start", recorded)
    methods_of_all_budgets = {name.partition("@")[0]: method for name, method in ROSTER.items()}
    for name, method in methods_of_all_budgets.items():
        if name.startswith(("attend_and_excite", "attend and excite")):
            continue
        given.clear()
        assert isinstance(method, partial)
        settings = method.keywords["settings"]
        way = {"steps": 4, "stoptime": 3, "backsteps": 2, "early_look": 1}
        few = replace(settings, **way, accept=9.0, early_accept=9.0)
        method.func(models, CASES[:1], **{**method.keywords, "settings": few})
        expected = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
        torch.testing.assert_close(given[0], expected)


# --- Figures.


def row(method: str, subset: str, seed: int, *, ok: bool, calls: float = 20) -> dict[str, Any]:
    faults = dict.fromkeys(quality.FAULTS, not ok)
    figures = {"ppv": 0.5, "npv": 0.6, "js": 0.4}
    return {
        "method": method,
        "subset": subset,
        "prompt": "a cat and a dog",
        "seed": seed,
        "all_ok": ok,
        "unet_calls": calls,
        **faults,
        **figures,
    }


def test_rates_and_paired_differences_worked_by_hand() -> None:
    outcomes = {"plain": [0, 0, 1, 0], "annealed": [1, 0, 1, 1]}
    rows = [
        row(name, subset, seed, ok=bool(ok), calls=20 + 10 * seed)
        for name, results in outcomes.items()
        for seed, (subset, ok) in enumerate(
            zip(["animal_animal"] * 2 + ["object_object"] * 2, results, strict=True)
        )
    ]
    found = quality.summarise(rows)
    assert found["plain"]["animal_animal"].all_ok == 0
    assert found["plain"]["animal_animal"].difference is None
    pooled = found["annealed"][quality.POOLED]
    assert (pooled.n, pooled.all_ok, pooled.missing) == (4, 0.75, 0.25)
    assert pooled.difference == 0.5
    assert pooled.low is not None
    assert pooled.high is not None
    assert pooled.low <= 0.75 <= pooled.high
    assert (pooled.unet_calls_mean, pooled.unet_calls_max) == (35, 50)


def test_pictures_are_paired_by_prompt_and_seed() -> None:
    """Where a method changes no verdict, there is no doubt of the difference."""
    outcomes = [True, False, False, True, True, False]
    rows = [
        row(name, "animal_animal", seed, ok=ok)
        for name in ("plain", "annealed")
        for seed, ok in enumerate(outcomes)
    ]
    found = quality.summarise(rows)["annealed"][quality.POOLED]
    assert (found.difference, found.difference_low, found.difference_high) == (0, 0, 0)


def test_the_results_have_the_form_that_readers_expect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "RESULTS", tmp_path)
    rows = [
        row(name, "animal_animal", seed, ok=seed % 2 == 0)
        for name in ("plain", "annealed", "annealed@2x")
        for seed in range(6)
    ]
    summaries = quality.summarise(rows)
    quality.write(summaries, "quality")
    stored = json.loads((tmp_path / "quality.json").read_text(encoding="utf-8"))
    assert set(stored) == {"plain", "annealed", "annealed@2x"}
    assert set(stored["annealed"]) == {"animal_animal"}
    wanted = {"n", "all_ok", "low", "high", "missing", "wrong_colour", "fused"}
    wanted |= {"unet_calls_mean", "unet_calls_max", "seconds"}
    assert wanted <= set(stored["annealed"]["animal_animal"])
    header, *lines = (tmp_path / "quality.csv").read_text(encoding="utf-8").splitlines()
    assert header.startswith("method,subset,n,all_ok")
    assert len(lines) == 6  # each method on its subset and pooled
    with Image.open(tmp_path / "quality.png") as image:
        assert image.size == (1200, 825)
    assert quality.table(summaries).count("\n") == 4


def test_another_setting_is_another_method() -> None:
    files = {quality.file_of(method) for method in ROSTER.values()}
    assert len(files) == len(ROSTER)


@pytest.mark.parametrize("name", list(TOPICS))
def test_every_variant_of_a_topic_is_another_method(name: str) -> None:
    files = {quality.file_of(method) for method in TOPICS[name].values()}
    assert len(files) == len(TOPICS[name])
    for method in TOPICS[name].values():
        assert isinstance(method, partial)
        if name in ("budget", "temperature", "cooling", "candidates"):
            assert method.keywords["settings"].annealed  # or it would change nothing


def test_subsets_share_no_seed() -> None:
    cases = quality.drawn(laboratory(), quality.FULL, quality.FIRST_SEED)
    seeds = [case.seed for row in cases.values() for case in row]
    assert len(set(seeds)) == len(seeds) == 4 * quality.FULL


def test_pictures_that_were_judged_are_not_painted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "folder", lambda: tmp_path / "work" / "new")
    chosen = {PLAIN: partial(methods.plain, settings=FEW)}
    prompts = {"animal_object": [case.prompt for case in CASES]}
    first = quality.judged(chosen, quality.drawn(prompts, 3, 10), processes=1)
    assert [each["seed"] for each in first] == [10, 11, 12]
    assert [each["prompt"] for each in first] == [CASES[i % 2].prompt.text for i in range(3)]
    (file,) = tmp_path.rglob("*.jsonl")
    assert len(file.read_text(encoding="utf-8").splitlines()) == 3
    marked = file.read_text(encoding="utf-8").replace('"unet_calls": 6', '"unet_calls": 60')
    file.write_text(marked, encoding="utf-8")
    more = quality.judged(chosen, quality.drawn(prompts, 4, 10), processes=1)
    assert [each["unet_calls"] for each in more] == [60, 60, 60, 6]
    assert len(file.read_text(encoding="utf-8").splitlines()) == 4


@pytest.mark.parametrize(
    ("given", "pictures"),
    [([], quality.FULL), (["--quick"], quality.QUICK), (["--pictures", "7"], 7)],
)
def test_the_number_of_pictures_is_the_one_asked_for(
    given: list[str], pictures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drawn(_: object, count: int, __: int) -> None:
        raise InterruptedError(f"{count} a subset")

    monkeypatch.setattr(quality, "drawn", drawn)
    with pytest.raises(InterruptedError, match=f"^{pictures} a subset"):
        quality.main(given)


def test_no_pictures_are_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        quality.main(["--pictures", "0"])
    assert stop.value.code == 2
    assert "--pictures must be in 1..10000, got 0" in capsys.readouterr().err
