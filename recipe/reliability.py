"""Whether CLIPSeg's probabilities are frequencies, on the previews that it is asked about.

Held-out renders are noised to the levels of the looks, x0 is predicted from there, and CLIPSeg says
of each pixel how likely each subject is. Where the render has it, is known: of the pixels that it
gives 0.7, seven in ten should be the subject's (Guo et al. 2017, arXiv:1706.04599).
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from transformers import CLIPTokenizer

from pocket.images import as_pixels
from pocket.world import SUBJECTS, Noun, caption
from recipe.data import Pictures, Scene
from recipe.tokenizer import tokenize
from recipe.unet import SCHEDULE, Denoiser, predicted
from recipe.vae import latents
from segmentation import ClipSeg, embed_prompts, segment
from settings import Tempering

BINS = 10
Floats = NDArray[np.float64]


def looked_at(settings: Tempering) -> dict[int, int]:
    """Step -> timestep of the last prediction before each look of these settings."""
    schedule = EulerDiscreteScheduler(**SCHEDULE, steps_offset=1)
    schedule.set_timesteps(settings.steps)
    looks = settings.early_look, settings.stoptime
    return {step: round(float(schedule.timesteps[step - 1])) for step in looks}


def reliability(
    clipseg: ClipSeg,
    denoiser: Denoiser,
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    seen: Pictures,
    timestep: int,
) -> dict[str, Any]:
    """`binned` of the pixels of previews of `seen` at this timestep."""
    images = previews_at(timestep, denoiser, vae, tokenizer, seen)
    return {"timestep": timestep, **binned(*responses(clipseg, images, seen))}


def binned(said: Floats, true: Floats) -> dict[str, Any]:
    """In bins of the probability: its mean, how often the subject is there, share of the pixels.

    The expected calibration error is the mean distance of the first two over all pixels (N,).
    """
    bins = np.minimum((said * BINS).astype(int), BINS - 1)
    count = np.bincount(bins, minlength=BINS)
    mean, frequency = (
        np.bincount(bins, values, minlength=BINS) / np.maximum(count, 1) for values in (said, true)
    )
    share = count / len(said)
    return {
        "error": round(float((share * np.abs(mean - frequency)).sum()), 4),
        "mean": mean.round(4).tolist(),
        "frequency": frequency.round(4).tolist(),
        "share": share.round(6).tolist(),
    }


def previews_at(
    timestep: int,
    denoiser: Denoiser,
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    seen: Pictures,
) -> list[Image.Image]:
    """What would be painted, as it is predicted from each render with noise of this timestep."""
    rng, draw = torch.Generator().manual_seed(timestep), random.Random(timestep)
    captions = [caption([placed.noun for placed in scene.placed], draw) for scene in seen.scenes]
    x0 = latents(vae, seen.images) * vae.config.scaling_factor
    noise = torch.randn(x0.shape, generator=rng)
    timesteps = torch.full((len(x0),), timestep)
    images = predicted(denoiser, vae, x0, noise, timesteps, tokenize(tokenizer, captions))
    return [Image.fromarray(pixels) for pixels in as_pixels(images)]


def responses(
    clipseg: ClipSeg, images: Sequence[Image.Image], seen: Pictures
) -> tuple[Floats, Floats]:
    """Probabilities of all pixels for what is there and for a stranger; 1 where it is, else 0."""
    said: list[Floats] = []
    true: list[Floats] = []
    for found, slots in zip(found_in(clipseg, images, seen.scenes), seen.slots, strict=True):
        said.append(found.astype(float).ravel())
        slot = np.arange(1, len(found) + 1)[:, None, None]  # the stranger's is nowhere
        true.append((slots == slot).astype(float).ravel())
    return np.concatenate(said), np.concatenate(true)


def found_in(
    clipseg: ClipSeg, images: Iterable[Image.Image], scenes: Iterable[Scene]
) -> Iterator[NDArray[np.float32]]:
    """Of each image the probabilities (N + 1, 64, 64) of its N subjects, and of a stranger."""
    draw = random.Random(0)
    for image, scene in zip(images, scenes, strict=True):
        shown = [placed.noun for placed in scene.placed]
        names = {noun.subject for noun in shown}
        absent = Noun(draw.choice([s for s in SUBJECTS if s not in names]), shown[0].colour)
        embeddings = embed_prompts(clipseg, [noun.phrase() for noun in (*shown, absent)])
        yield segment(clipseg, [image], embeddings[None])[0].numpy()


def draw(found: Mapping[int, Mapping[str, Any]]) -> Figure:
    """The reliability diagram: a line a look, and the diagonal on which frequencies would lie."""
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    for step, each in found.items():
        label = f"step {step} of 20, error {each['error']:.3f}"
        axes.plot(each["mean"], each["frequency"], marker="o", label=label)
    axes.set(xlabel="what CLIPSeg says", ylabel="how often the subject is there", aspect="equal")
    axes.legend(frameon=False)
    axes.grid(color="0.9", linewidth=0.8)
    return figure
