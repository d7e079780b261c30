"""The pocket model's world: which subjects and colours exist, and how captions speak of them.

The vocabulary is that of the Attend-and-Excite benchmark (Chefer et al. 2023, arXiv:2301.13826),
plus "toy robot". No drawing library is needed here, so the benchmarks can read it too.
"""

from __future__ import annotations

import functools
import itertools
import random
import re
from dataclasses import dataclass

# Subject -> code point of the emoji that stands for it.
ANIMALS = {
    "cat": "1f408",
    "dog": "1f415",
    "bird": "1f426",
    "bear": "1f43b",
    "lion": "1f981",
    "horse": "1f40e",
    "elephant": "1f418",
    "monkey": "1f412",
    "frog": "1f438",
    "turtle": "1f422",
    "rabbit": "1f407",
    "mouse": "1f401",
}
OBJECTS = {
    "backpack": "1f392",
    "glasses": "1f453",
    "crown": "1f451",
    "suitcase": "1f9f3",
    "chair": "1fa91",
    "balloon": "1f388",
    "bow": "1f380",
    "car": "1f697",
    "bowl": "1f963",
    # There is no bench among the emoji; the couch stands in for it.
    "bench": "1f6cb-fe0f",
    "clock": "23f0",
    "apple": "1f34e",
}
EXTRAS = {"toy robot": "1f916"}
EMOJI = {**ANIMALS, **OBJECTS, **EXTRAS}
SUBJECTS = tuple(EMOJI)

# Colour -> sRGB of the middle of its luminance ramp.
COLOURS = {
    "red": (220, 30, 35),
    "orange": (247, 135, 15),
    "yellow": (250, 215, 30),
    "green": (35, 155, 60),
    "blue": (40, 95, 225),
    "purple": (125, 50, 185),
    "pink": (250, 130, 190),
    "brown": (115, 70, 38),
    "gray": (128, 128, 130),
    "black": (38, 38, 42),
    "white": (246, 246, 246),
}
COLOUR_NAMES = tuple(COLOURS)
JOINERS = (" and ", " with ", " next to ")


@dataclass(frozen=True)
class Noun:
    """One subject of a caption; `colour` is None where the caption names none."""

    subject: str
    colour: str | None = None

    def phrase(self, article: str | None = None) -> str:
        """The noun phrase, such as "a black dog"; the article is the grammatical one by default."""
        words = f"{self.colour} {self.subject}" if self.colour else self.subject
        return f"{article or ('an' if words[0] in 'aeiou' else 'a')} {words}"


def parse(prompt: str) -> Noun:
    """Read one prompt ("a black dog") as a `Noun`.

    Raises ValueError where the prompt is not an article, an optional colour and a subject of this
    world.
    """
    colours, subjects = "|".join(COLOURS), "|".join(SUBJECTS)
    match = re.fullmatch(rf"(?:an?|the) (?:({colours}) )?({subjects})", prompt.strip().lower())
    if match is None:
        raise ValueError(f"not a prompt of the pocket model's world: {prompt!r}")
    return Noun(match[2], match[1])


def caption(nouns: list[Noun], rng: random.Random) -> str:
    """A caption of `nouns` with one joiner; one vowel in four keeps the uncorrected "a"."""
    phrases = [noun.phrase("a" if rng.random() < 0.25 else None) for noun in nouns]
    return rng.choice(JOINERS).join(phrases)


@functools.cache
def seen_pairs(seed: int = 20260) -> frozenset[frozenset[str]]:
    """The quarter of all pairs of subjects that occur together in training pictures."""
    pairs = [frozenset(pair) for pair in itertools.combinations(SUBJECTS, 2)]
    return frozenset(random.Random(seed).sample(pairs, len(pairs) // 4))
