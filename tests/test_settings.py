"""settings.py: flags that follow each other, and values that no picture could be made with."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from errors import InputError
from settings import Tempering, check_prompts


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 20, 30, 50, 1000])
def test_what_follows_the_steps_keeps_its_share_of_the_way(steps: int) -> None:
    settings = Tempering(steps=steps)
    found = settings.stoptime, settings.backsteps, settings.early_look
    shares = 15 / 20 * steps, 12 / 20 * steps, 6 / 20 * steps
    assert all(abs(value - share) <= 0.5 for value, share in zip(found, shares, strict=True))


def test_by_default_a_picture_of_20_steps_is_tempered_at_15_12_and_6() -> None:
    assert Tempering() == Tempering(steps=20, stoptime=15, backsteps=12, early_look=6)
    assert Tempering(steps=10) == Tempering(steps=10, stoptime=8, backsteps=6, early_look=3)


@pytest.mark.parametrize(
    ("given", "others"),
    [
        ({"stoptime": 15}, {"backsteps": 15, "early_look": 15}),  # stoptime is the most
        ({"backsteps": 5}, {"stoptime": 38, "early_look": 15}),
        ({"early_look": 0}, {"stoptime": 38, "backsteps": 30}),
    ],
    ids=str,
)
def test_what_is_given_is_taken_as_given(given: dict[str, Any], others: dict[str, Any]) -> None:
    found = asdict(Tempering(steps=50, **given))
    assert {name: found[name] for name in (*given, *others)} == {**given, **others}


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"steps": 10, "stoptime": 15}, "stoptime must be a whole number in 1..10 "),
        ({"steps": 20.0}, "steps must be a whole number in 1..1000 "),
        ({"rounds": 10**30}, r"rounds must be a whole number in 1\.\.\d+, got 10{30}$"),
        ({"k": 10**400}, "k must be a finite number of at least 0, got 1000"),
        ({"height": "64"}, "height must be a multiple of 8 pixels, got '64'"),
        ({"width": True}, "width must be a multiple of 8 pixels, got True"),
        ({"joiner": 5}, "joiner must be a text in UTF-8, got 5"),
        ({"negative_prompt": "\udcff"}, r"negative_prompt must be a text in UTF-8, got '\\udcff'"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_what_no_picture_can_be_made_with_is_refused_by_name(
    values: dict[str, Any], text: str
) -> None:
    with pytest.raises(InputError, match=text):
        Tempering(**values)


@pytest.mark.parametrize("prompt", ["a dog \udcff", 5, None])
def test_a_prompt_that_is_no_text_is_refused_by_its_number(prompt: Any) -> None:
    with pytest.raises(InputError, match=r"^prompt 2 must be a text in UTF-8, got "):
        check_prompts(["a red car", prompt])
