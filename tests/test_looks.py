"""How well looks foretell verdicts: the figures by hand, and a run on the bundled models."""

from __future__ import annotations

import numpy as np

from benchmarks import looks
from benchmarks.methods import Case
from benchmarks.prompts import Prompt
from pocket.world import Noun


def test_the_area_is_the_share_of_pairs_in_the_right_order() -> None:
    assert looks.auc(np.array([3.0, 1.0]), np.array([0.0, 2.0])) == 0.75
    assert looks.auc(np.array([1.0]), np.array([1.0, 1.0])) == 0.5


def test_areas_stand_by_guidance_of_the_look_and_step() -> None:
    rows: list[looks.Watched] = [
        ({"2/4": 1.0, "2/8": 1.0}, False),
        ({"2/4": 0.5, "2/8": 2.0}, True),
        ({"2/4": 0.7, "2/8": 3.0}, True),
    ]
    assert looks.foretold(rows) == {"2": {"4": 0.0, "8": 1.0}}


def test_no_look_is_at_more_than_the_samplers_own_guidance() -> None:
    cases = [Case(Prompt((Noun("cat"), Noun("clock", "red")), " and "), seed) for seed in (3, 4)]
    found = looks.watched(cases, 4.0)
    names = {f"{look:g}/{step}" for look in (1, 2, 3) for step in looks.STEPS}
    for energies, _ in found:
        assert set(energies) == names
    assert found[0][0] != found[1][0]
