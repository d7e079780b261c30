"""Prompt sets: the bundled ones against the benchmark's own counts, files line by line."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

import prompts
from benchmarks.prompts import benchmark, three_subjects
from errors import InputError
from pocket.world import ANIMALS, COLOUR_NAMES, OBJECTS, parse
from prompts import Prompt

TEXT = """\
# two heads and a line before them

a cat | a dog
[worn] " with "
a bear|a crown
   a lion |  a bow\t
[beside things]
a [red] car | a #1 mug | a clock
"""


def test_a_set_is_read_as_it_is_documented() -> None:
    assert prompts.parse(TEXT.splitlines(), " next to ", "x") == [
        Prompt(("a cat", "a dog"), " next to ", "others"),
        Prompt(("a bear", "a crown"), " with ", "worn"),
        Prompt(("a lion", "a bow"), " with ", "worn"),
        Prompt(("a [red] car", "a #1 mug", "a clock"), " next to ", "beside things"),
    ]


def test_the_prompt_is_the_subjects_joined() -> None:
    assert Prompt(("a cat", "a dog", "a car"), " and ").text == "a cat and a dog and a car"


@pytest.mark.parametrize("joiner", [" next to ", ' "and" '])
def test_what_was_written_is_read_again(joiner: str) -> None:
    first = prompts.parse(TEXT.splitlines(), joiner, "x")
    assert prompts.parse(prompts.write(first, joiner).splitlines(), joiner, "x") == first


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("a cat |", "no subject may be empty, got 'a cat |'"),
        ("a cat || a dog", "no subject may be empty, got 'a cat || a dog'"),
        ("|", "no subject may be empty, got '|'"),
        ("[worn", "a head must be [name] or [name] \"joiner\", got '[worn'"),
        ("[ ]", "a head must be [name] or [name] \"joiner\", got '[ ]'"),
        ("[worn] with", "a head must be [name] or [name] \"joiner\", got '[worn] with'"),
    ],
)
def test_a_bad_line_is_named_by_its_number(line: str, fault: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text(f"# comment\n\na cat | a dog\n{line}\n", encoding="utf-8")
    with pytest.raises(InputError) as caught:
        prompts.load(str(path), " and ")
    assert str(caught.value) == f"{path}, line 4: {fault}"


@pytest.mark.parametrize("content", [b"", b"# only this\n[head]\n", b"\xff\xfe\xff"])
def test_a_file_without_a_prompt_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match="--prompts_file must"):
        prompts.load(str(path), " and ")


@pytest.mark.parametrize("name", ["nobody", ".", "/dev/zero", "", "~nobody-here/x", "x" * 5000])
def test_what_is_neither_a_file_nor_a_name_is_told_the_names(name: str) -> None:
    with pytest.raises(InputError, match="one of attend-and-excite, three-subjects, pocket-"):
        prompts.load(prompts.lasting(name), " and ")


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_bytes("\ufeff[ñandúes]\r\na cat | a dog\r\n".encode())
    assert prompts.load(str(path), " y ") == [Prompt(("a cat", "a dog"), " y ", "ñandúes")]


# --- The bundled ones.


def test_the_benchmark_has_its_276_prompts_none_twice() -> None:
    found = prompts.load("attend-and-excite", "?")
    assert Counter(prompt.subset for prompt in found) == {
        "animal-animal": 66,
        "animal-object": 144,
        "object-object": 66,
    }
    assert len({frozenset(prompt.subjects) for prompt in found}) == 276
    assert Counter(prompt.joiner for prompt in found) == {" and ": 240, " with ": 36}
    for prompt in found:
        kinds = ["animal" if parse(s).subject in ANIMALS else "object" for s in prompt.subjects]
        assert "-".join(kinds) == prompt.subset
        assert all(s.startswith("a ") for s in prompt.subjects)  # uncorrected, as published
    colours = Counter(parse(s).colour for prompt in found for s in prompt.subjects)
    assert colours.keys() == {None, *COLOUR_NAMES}
    pairs = {frozenset(parse(s).subject for s in prompt.subjects) for prompt in found}
    assert {frozenset((a, o)) for a in ANIMALS for o in OBJECTS} <= pairs


def test_the_laboratory_measures_on_the_bundled_sets() -> None:
    bundled = {
        "attend-and-excite": benchmark(),
        "three-subjects": {"three_subjects": three_subjects(seed=0)},
    }
    for name, subsets in bundled.items():
        measured = [
            Prompt(tuple(prompt.phrases), prompt.joiner, subset.replace("_", "-"))
            for subset, each in subsets.items()
            for prompt in each
        ]
        assert measured == prompts.load(name, "?")


def test_every_bundled_set_is_the_pockets_too() -> None:
    for name in prompts.names():
        for prompt in prompts.load(name, "?"):
            assert len({parse(subject).subject for subject in prompt.subjects}) >= 2
        assert prompts.load(name, "?") == prompts.load(name.removeprefix("pocket-"), "?")
