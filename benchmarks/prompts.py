"""The prompts of the Attend-and-Excite benchmark in the pocket model's world.

Chefer et al. 2023, arXiv:2301.13826: 66 pairs of animals, 144 of an animal and an object, 66 of two
objects, articles uncorrected ("a elephant"). Its colours are drawn here by a seed.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

from pocket.world import ANIMALS, COLOUR_NAMES, OBJECTS, Noun

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
