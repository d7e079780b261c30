"""The figures of the model card: `python -m recipe.measure` writes pocket/figures.json.

Everything is measured on renders and seeds that no stage trained on, with the weights as shipped.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image

import outputs
from benchmarks.prompts import benchmark
from loaders import load_clipseg, load_pipeline
from pocket.images import Pixels
from pocket.judge import NO_COLOUR, Judge, Verdict, load_judge
from pocket.world import COLOUR_NAMES, SUBJECTS, Noun, seen_pairs
from recipe import reliability
from recipe.data import Pictures, Studio, pictures, training_scene
from recipe.fidelity import features, precision_recall, single_renders
from recipe.judge import measure_judge, round_trip
from recipe.unet import Denoiser, repaint
from segmentation import ClipSeg, classify
from settings import Tempering
from sheets import Panel, sheet

FIGURES = Path(__file__).parent.parent / "pocket" / "figures.json"
BATCH = 50
HELD_OUT = 500
FIRST_SEED = 10_000
RENDERS, PICTURES_A_SUBJECT = 400, 40  # whose features are compared
GUIDANCE_SCALES = (5.0, 7.5)
SAMPLES = (
    "a black dog",
    "a toy robot",
    "a red car",
    "a blue bird",
    "a green elephant",
    "a cat",
    "a pink crown",
    "a yellow balloon",
    "a black dog next to a toy robot",
    "a cat and a elephant",
    "a red apple and a blue chair",
    "a bear with glasses",
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m recipe.measure", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(__file__).parent / "work")
    parser.add_argument("--pictures", type=int, default=500, help="pictures a figure")
    args = parser.parse_args()
    figures = measure(args.work, args.pictures)
    outputs.save_image(FIGURES.with_name("samples.png"), draw_samples(pocket()))
    diagram = reliability.draw(figures["reliability"])
    outputs.save_figure(FIGURES.with_name("reliability.png"), diagram)
    FIGURES.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=2))


def pocket() -> StableDiffusionPipeline:
    """The pipeline as shipped, without bars."""
    pipe = load_pipeline("pocket", device="cpu", dtype="fp32")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def measure(work: Path, count: int) -> dict[str, Any]:
    """All figures, by part."""
    studio = Studio(work / "packages")
    held_out = pictures(studio, work, "held-out", HELD_OUT, training_scene)
    judge = load_judge()
    pipe = pocket()
    return {
        "seconds_a_picture": seconds_a_picture(pipe),
        "vae": vae_figures(pipe.vae, held_out, judge),
        "clipseg": clipseg_figures(load_clipseg("pocket", device="cpu"), held_out),
        "reliability": reliability_figures(pipe, held_out),
        "judge": measure_judge(judge, studio, 3000, seed=1),
        "judge_repainted": measure_judge(
            judge, studio, 3000, seed=1, degrade=repaint(denoiser(pipe), pipe.vae, pipe.tokenizer)
        ),
        "single": {str(g): single_figures(pipe, judge, count, g) for g in GUIDANCE_SCALES},
        "fidelity": {
            str(g): fidelity_figures(pipe, judge, studio, PICTURES_A_SUBJECT, g)
            for g in GUIDANCE_SCALES
        },
        "pairs": {
            name: pair_figures(pipe, judge, [list(prompt.nouns) for prompt in prompts], count)
            for name, prompts in benchmark().items()
        },
    }


def denoiser(pipe: StableDiffusionPipeline) -> Denoiser:
    """The pipeline's U-Net and text encoder as they were trained."""
    module = Denoiser(pipe.tokenizer)
    module.unet, module.text_encoder = pipe.unet, pipe.text_encoder
    return module.eval()


def draw_samples(pipe: StableDiffusionPipeline) -> Image.Image:
    """One picture of each sample prompt, none chosen: the seed is the prompt's number."""
    panels = []
    for seed, prompt in enumerate(SAMPLES):
        rng = torch.Generator().manual_seed(seed)
        image = pipe(prompt, num_inference_steps=20, guidance_scale=7.5, generator=rng).images[0]
        panels.append(Panel(prompt, image))
    return sheet(panels, "The pocket model: 20 steps, guidance 7.5, seeds 0 to 11")


def seconds_a_picture(pipe: StableDiffusionPipeline, runs: int = 5) -> float:
    """Median wall time of one 20-step picture, weights loaded."""
    seconds = []
    for _ in range(runs):
        begun = time.perf_counter()
        pipe("a black dog next to a toy robot", num_inference_steps=20)
        seconds.append(time.perf_counter() - begun)
    return round(float(np.median(seconds)), 3)


@torch.no_grad()
def vae_figures(vae: AutoencoderKL, held_out: Pictures, judge: Judge) -> dict[str, float]:
    """PSNR in dB (peak 255, mean over pictures), and colours told before and after a round trip."""
    restored = round_trip(
        held_out.images, lambda x: vae.decode(vae.encode(x).latent_dist.mean).sample
    )
    error = (restored.astype(float) - held_out.images) ** 2
    psnr = 10 * np.log10(255**2 / error.mean(axis=(1, 2, 3)))
    return {
        "psnr": round(float(psnr.mean()), 2),
        "colour_accuracy_before": colour_accuracy(judge, held_out, held_out.images),
        "colour_accuracy_after": colour_accuracy(judge, held_out, restored),
    }


def colour_accuracy(judge: Judge, held_out: Pictures, images: Pixels) -> float:
    """Share of the coloured subjects most of whose cells the judge gives the right colour."""
    labels = judge.label(images)
    right = []
    for scene, slots, colours in zip(held_out.scenes, held_out.slots, labels.colour, strict=True):
        for slot, placed in enumerate(scene.placed, start=1):
            named = colours[(slots[::2, ::2] == slot) & (colours != NO_COLOUR)]
            if placed.noun.colour and len(named):
                most = np.bincount(named).argmax()
                right.append(most == COLOUR_NAMES.index(placed.noun.colour))
    return round(float(np.mean(right)), 4)


def clipseg_figures(clipseg: ClipSeg, held_out: Pictures) -> dict[str, float]:
    """Mean IoU of full prompts at threshold 0.5, and the response to what is not there."""
    overlaps, strangers, mistaken = [], [], []
    images = map(Image.fromarray, held_out.images)
    all_found = reliability.found_in(clipseg, images, held_out.scenes)
    for found, slots in zip(all_found, held_out.slots, strict=True):
        for slot, mask in enumerate(found[:-1] > 0.5, start=1):
            truth = slots == slot
            overlaps.append((mask & truth).sum() / (mask | truth).sum())
        strangers.append(found[-1].mean())
        mistaken.append(bool((classify(torch.from_numpy(found), 0.1) == len(found) - 1).any()))
    return {
        "mean_iou": round(float(np.mean(overlaps)), 4),
        "absent_mean_probability": round(float(np.mean(strangers)), 4),
        "absent_wins_a_pixel": round(float(np.mean(mistaken)), 4),
    }


def reliability_figures(pipe: StableDiffusionPipeline, held_out: Pictures) -> dict[int, Any]:
    """Of CLIPSeg at each look of the default settings."""
    clipseg, networks = load_clipseg("pocket", device="cpu"), denoiser(pipe)
    return {
        step: reliability.reliability(
            clipseg, networks, pipe.vae, pipe.tokenizer, held_out, timestep
        )
        for step, timestep in reliability.looked_at(Tempering()).items()
    }


def single_figures(
    pipe: StableDiffusionPipeline, judge: Judge, count: int, guidance_scale: float
) -> dict[str, float]:
    """One coloured subject a picture."""
    draw = random.Random(0)
    asked = [[Noun(draw.choice(SUBJECTS), draw.choice(COLOUR_NAMES))] for _ in range(count)]
    return rates(judged(pipe, judge, asked, guidance_scale))


def pair_figures(
    pipe: StableDiffusionPipeline, judge: Judge, prompts: list[list[Noun]], count: int
) -> dict[str, dict[str, float]]:
    """Two subjects a picture, plain sampling at guidance 7.5: all, seen pairs, unseen pairs."""
    asked = [prompts[i % len(prompts)] for i in range(count)]
    verdicts = judged(pipe, judge, asked, 7.5)
    seen = [frozenset(noun.subject for noun in nouns) in seen_pairs() for nouns in asked]
    return {
        "all": rates(verdicts),
        "seen": rates([v for v, known in zip(verdicts, seen, strict=True) if known]),
        "unseen": rates([v for v, known in zip(verdicts, seen, strict=True) if not known]),
    }


def fidelity_figures(
    pipe: StableDiffusionPipeline, judge: Judge, studio: Studio, each: int, guidance_scale: float
) -> dict[str, Any]:
    """Precision and recall of `each` pictures a subject, and of as many held-out renders."""
    by_subject = {}
    for subject in SUBJECTS:
        draw = random.Random(f"fidelity/{subject}")
        asked = [[Noun(subject, draw.choice(COLOUR_NAMES))] for _ in range(each)]
        renders, held_out, pictures = (
            features(judge, images)
            for images in (
                single_renders(studio, subject, RENDERS, "fidelity"),
                single_renders(studio, subject, each, "fidelity-held-out"),
                painted(pipe, asked, guidance_scale),
            )
        )
        found = *precision_recall(renders, pictures), *precision_recall(renders, held_out)
        names = ("precision", "recall", "renders_precision", "renders_recall")
        by_subject[subject] = {k: round(v, 4) for k, v in zip(names, found, strict=True)}
    mean = {
        name: round(float(np.mean([row[name] for row in by_subject.values()])), 4)
        for name in next(iter(by_subject.values()))
    }
    return {"pictures_a_subject": each, "mean": mean, "by_subject": by_subject}


def judged(
    pipe: StableDiffusionPipeline, judge: Judge, asked: list[list[Noun]], guidance_scale: float
) -> list[Verdict]:
    """The judge's verdict of one 20-step picture for each entry of `asked`, seeds in order."""
    return judge.judge(painted(pipe, asked, guidance_scale), asked)


def painted(
    pipe: StableDiffusionPipeline, asked: list[list[Noun]], guidance_scale: float
) -> Pixels:
    """One 20-step picture for each entry of `asked`, seeds in order, (N, 64, 64, 3)."""
    pictures: list[Image.Image] = []
    for start in range(0, len(asked), BATCH):
        batch = asked[start : start + BATCH]
        pictures += pipe(
            [" and ".join(noun.phrase("a") for noun in nouns) for nouns in batch],
            num_inference_steps=20,
            guidance_scale=guidance_scale,
            generator=[
                torch.Generator().manual_seed(FIRST_SEED + start + i) for i in range(len(batch))
            ],
        ).images
    return np.stack([np.asarray(picture) for picture in pictures])


def rates(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Shares of the verdicts that are all OK, and of each fault."""
    return {
        "n": len(verdicts),
        **{
            name: round(float(np.mean([getattr(v, name) for v in verdicts])), 4)
            for name in ("all_ok", "missing", "wrong_colour", "fused")
        },
    }


if __name__ == "__main__":
    main()
