"""The prompts of the Attend-and-Excite benchmark in the pocket model's world.

Chefer et al. 2023, arXiv:2301.13826: 66 pairs of animals, 144 of an animal and an object, 66 of two
objects, articles uncorrected ("a elephant"). Its colours are drawn here by a seed. A fourth subset
has three subjects.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, replace

from pocket.world import ANIMALS, COLOUR_NAMES, OBJECTS, SUBJECTS, Noun

WORN = ("glasses", "crown", "bow")  # what an animal is shown "with", without a colour


@dataclass(frozen=True)
class Prompt:
    """A prompt of the benchmark: its subjects, and the joiner between them."""

    nouns: tuple[Noun, ...]
    joiner: str

    @property
    def phrases(self) -> list[str]:
        """One prompt a subject, as tempering takes them."""
        return [noun.phrase("a") for noun in self.nouns]

    @property
    def text(self) -> str:
        return self.joiner.join(self.phrases)


TRIPLES = 66  # as many as of the other two small subsets


def laboratory() -> dict[str, list[Prompt]]:
    """The prompts that are reported: the benchmark's three subsets, and three_subjects (66).

    In random order, so that the first few of a subset stand for all of it.
    """
    return shuffled({**benchmark(), "three_subjects": three_subjects(seed=0)})


def development() -> dict[str, list[Prompt]]:
    """The prompts on which settings are chosen: none of them is reported.

    The same subjects in other colours, joined by "next to", and other triples.
    """
    sets = {**benchmark(seed=1), "three_subjects": three_subjects(seed=1)}
    return shuffled(
        {
            name: [replace(prompt, joiner=" next to ") for prompt in prompts]
            for name, prompts in sets.items()
        }
    )


def shuffled(sets: dict[str, list[Prompt]]) -> dict[str, list[Prompt]]:
    draw = random.Random(0)
    return {name: draw.sample(prompts, len(prompts)) for name, prompts in sets.items()}


def three_subjects(seed: int) -> list[Prompt]:
    """An animal and two coloured objects each."""
    draw = random.Random(f"three subjects/{seed}")
    beside = [item for item in OBJECTS if item not in WORN]
    return [
        Prompt(
            (
                Noun(draw.choice(list(ANIMALS))),
                *(Noun(item, draw.choice(COLOUR_NAMES)) for item in draw.sample(beside, 2)),
            ),
            " and ",
        )
        for _ in range(TRIPLES)
    ]


def crowd(count: int, seed: int) -> list[Prompt]:
    """`count` coloured subjects each, all different."""
    draw = random.Random(f"crowd/{count}/{seed}")
    return [
        Prompt(
            tuple(Noun(s, draw.choice(COLOUR_NAMES)) for s in draw.sample(SUBJECTS, count)), " and "
        )
        for _ in range(TRIPLES)
    ]


def benchmark(seed: int = 0) -> dict[str, list[Prompt]]:
    """The prompts by subset: animal_animal (66), animal_object (144), object_object (66)."""
    draw = random.Random(seed)

    def coloured(subject: str) -> Noun:
        return Noun(subject, draw.choice(COLOUR_NAMES))

    worn = [Prompt((Noun(animal), Noun(item)), " with ") for animal in ANIMALS for item in WORN]
    beside = [
        Prompt((Noun(animal), coloured(item)), " and ")
        for animal in ANIMALS
        for item in OBJECTS
        if item not in WORN
    ]
    return {
        "animal_animal": [
            Prompt((Noun(a), Noun(b)), " and ") for a, b in itertools.combinations(ANIMALS, 2)
        ],
        "animal_object": worn + beside,
        "object_object": [
            Prompt((coloured(a), coloured(b)), " and ")
            for a, b in itertools.combinations(OBJECTS, 2)
        ],
    }
