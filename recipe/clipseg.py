"""Stage 3: CLIPSeg, which finds the pixels that a prompt speaks of, in ordinary scenes."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPSegConfig, CLIPSegForImageSegmentation, CLIPTokenizer

from pocket.images import Pixels, as_tensor
from pocket.world import COLOUR_NAMES, SUBJECTS, Noun
from recipe.augment import worn
from recipe.data import SIZE, Pictures, Scene
from recipe.tokenizer import tokenize
from recipe.training import Plan, bf16, fit

PLAN = Plan(steps=8000, batch=32, lr=1e-3, ema=0.998, decay=0.6, seed=3)
TEXT_WIDTH, VISION_WIDTH = 128, 192
# What the training pictures of these numbers look like while they are painted, (B, 3, 64, 64).
Preview = Callable[[list[int], torch.Generator], Tensor]
SUBJECT_NAMES, COLOUR_NAMES_AND_NONE = 1 + len(SUBJECTS), len(COLOUR_NAMES) + 1
PROMPTS = 5  # a picture: its subjects first, then near misses and strangers
PROMPT_LENGTH = 8  # tokens; "a blue toy robot" and its two marks take 6


def new_clipseg(tokenizer: CLIPTokenizer) -> CLIPSegForImageSegmentation:
    """An untrained CLIPSeg of 3.5 M parameters: 64x64 pixels in 8x8 patches, a mask a prompt."""
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 4 * TEXT_WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": VISION_WIDTH,
        "intermediate_size": 4 * VISION_WIDTH,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "image_size": SIZE,
        "patch_size": 8,
    }
    config = CLIPSegConfig(
        text_config=text,
        vision_config=vision,
        projection_dim=TEXT_WIDTH,
        extract_layers=[1, 3, 5],
        reduce_dim=64,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=256,
    )
    clipseg = CLIPSegForImageSegmentation(config)
    # The backward pass of fused attention is slower than plain attention on CPUs.
    clipseg.set_attn_implementation("eager")
    # transformers draws the decoder's weights with a variance of 1, which suits no training: the
    # first masks are far off, and the text encoder learns to say the same of every prompt.
    decoder = clipseg.decoder
    for layer in (*decoder.reduces, decoder.film_mul, decoder.film_add):
        layer.reset_parameters()
    nn.init.ones_(decoder.film_mul.bias)
    decoder.transposed_convolution.reset_parameters()
    return clipseg


class Lesson(nn.Module):
    """CLIPSeg with a head on its vision tower that names each 4x4 cell's subject and colour.

    A mask a prompt says little of a picture; named cells teach a vision tower that starts from
    nothing what there is to see. The head is thrown away afterwards.
    """

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.clipseg = new_clipseg(tokenizer)
        self.names = nn.Linear(VISION_WIDTH, 4 * (SUBJECT_NAMES + COLOUR_NAMES_AND_NONE))

    def forward(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mask logits (B, P, H, W) of prompts `ids` (B, P, L); names' logits (B, names, 16, 16)."""
        batch, prompts, length = ids.shape
        parts = self.clipseg.clip
        vision = parts.get_image_features(pixel_values=images, output_hidden_states=True)
        layers = [vision.hidden_states[i + 1] for i in self.clipseg.extract_layers]
        names = self.names(layers[-1][:, 1:])  # (B, 64, 4 * names): 2x2 cells a patch
        names = F.pixel_shuffle(names.transpose(1, 2).unflatten(2, (8, 8)), 2)  # (B, names, 16, 16)
        layers = [layer.repeat_interleave(prompts, dim=0) for layer in layers]  # (B * P, N, D)
        text = parts.get_text_features(ids.reshape(batch * prompts, length)).pooler_output
        masks = self.clipseg.decoder(layers, text).logits.unflatten(0, (batch, prompts))
        return masks, names[:, :SUBJECT_NAMES], names[:, SUBJECT_NAMES:]


def named_cells(scene: Scene, slots: Pixels) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Subject (0 the background) and colour (-100, not counted, there) of each cell, (16, 16)."""
    subjects, colours = [0], [-100]
    for placed in scene.placed:
        subjects.append(1 + SUBJECTS.index(placed.noun.subject))
        named = placed.noun.colour
        colours.append(COLOUR_NAMES.index(named) if named else len(COLOUR_NAMES))
    cells = slots[2::4, 2::4]
    return np.array(subjects)[cells], np.array(colours)[cells]


def questions(scene: Scene, rng: random.Random) -> list[tuple[str, list[int]]]:
    """`PROMPTS` prompts for a scene, each with the slots (from 1) of the subjects it is true of.

    The near misses are what bleeding makes: a subject in another's colour, a stranger in a
    subject's colour.
    """
    shown = [placed.noun for placed in scene.placed]
    # A drawing in its natural colours may well be "red": nobody is asked about its colour.
    coloured = [noun for noun in shown if noun.colour]
    asked = [spoken(noun, rng) for noun in shown]
    while len(asked) < PROMPTS:
        near = rng.choice(shown)
        stranger = Noun(rng.choice(SUBJECTS), near.colour or rng.choice(COLOUR_NAMES))
        misses = [stranger] if stranger.subject not in {noun.subject for noun in shown} else []
        misses += [Noun(noun.subject, another_colour(noun, coloured, rng)) for noun in coloured]
        if misses:
            asked.append(spoken(rng.choice(misses), rng))
    # One article in four is "a" before a vowel, too, as in the captions.
    return [
        (noun.phrase("a" if rng.random() < 0.25 else None), answers(noun, scene)) for noun in asked
    ]


def another_colour(noun: Noun, coloured: list[Noun], rng: random.Random) -> str:
    """A colour for a near miss of `noun`, every other time one that another subject shows."""
    others = [each.colour for each in coloured if each.colour and each is not noun]
    return rng.choice(others if others and rng.random() < 0.5 else COLOUR_NAMES)


def spoken(noun: Noun, rng: random.Random) -> Noun:
    """The noun, now and then without its colour."""
    return Noun(noun.subject) if rng.random() < 0.2 else noun


def answers(noun: Noun, scene: Scene) -> list[int]:
    """Slots of the subjects that `noun` speaks of; a subject without colour means any colour."""
    return [
        slot
        for slot, placed in enumerate(scene.placed, start=1)
        if placed.noun.subject == noun.subject and noun.colour in (None, placed.noun.colour)
    ]


def train_clipseg(
    pictures: Pictures, preview: Preview, tokenizer: CLIPTokenizer, work: Path, plan: Plan = PLAN
) -> CLIPSegForImageSegmentation:
    """Train from nothing, all parts together: binary cross-entropy a prompt, and names of cells.

    It will be shown previews of unfinished pictures, so every other lesson is one, by `preview`,
    and all are worn.
    """
    # The background is most of every picture: weighted down, or the subjects are never learned.
    weights = torch.tensor([0.1] + [1.0] * len(SUBJECTS))

    def loss(lesson: nn.Module, rng: torch.Generator) -> Tensor:
        picks = torch.randint(len(pictures.images), (plan.share,), generator=rng).tolist()
        draw = random.Random(picks[0])
        asked = [questions(pictures.scenes[i], draw) for i in picks]
        texts = [prompt for row in asked for prompt, _ in row]
        ids = tokenize(tokenizer, texts, PROMPT_LENGTH)  # (B * P, L)
        slots = torch.from_numpy(pictures.slots[picks])  # (B, H, W)
        targets = torch.stack(
            [
                torch.isin(slots[b], torch.tensor(right, dtype=torch.uint8))
                for b, row in enumerate(asked)
                for _, right in row
            ]
        ).float()  # (B * P, H, W)
        cells = [named_cells(pictures.scenes[i], pictures.slots[i]) for i in picks]
        subjects, colours = (torch.from_numpy(np.stack(kind)) for kind in zip(*cells, strict=True))
        images = as_tensor(pictures.images[picks])
        images[1::2] = preview(picks[1::2], rng)
        images = worn(images, rng)
        with bf16():
            masks, subject, colour = lesson(images, ids.unflatten(0, (plan.share, PROMPTS)))
        return (
            F.binary_cross_entropy_with_logits(masks.float().flatten(0, 1), targets)
            + 0.1 * F.cross_entropy(subject.float(), subjects, weights)
            + 0.1 * F.cross_entropy(colour.float(), colours)
        )

    lesson = fit("clipseg", Lesson(tokenizer), loss, plan, work)
    assert isinstance(lesson, Lesson)
    return lesson.clipseg
