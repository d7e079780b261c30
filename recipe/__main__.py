"""Make the pocket model: `python -m recipe` runs every stage, or goes on where it stopped.

`OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 -m recipe` shares each batch between two cores.

Stages: taesd (the tiny decoder, with the autoencoder that it learns from), unet (with its text
encoder and that autoencoder), clipseg, judge; renders come first by themselves, and the last two
need the U-Net, whose pictures they learn to read. Each keeps its state in the work folder, so that
a killed run loses a few minutes at most; the finished weights go to pocket/.
"""

from __future__ import annotations

import argparse
import os
from datetime import timedelta
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, distributed

from kinds import TAESD
from recipe.clipseg import train_clipseg
from recipe.data import PICTURES, Pictures, Studio, crowded_scene, pictures, training_scene
from recipe.export import export_clipseg, export_stable_diffusion, export_taesd
from recipe.judge import export_judge, train_judge
from recipe.taesd import train_taesd
from recipe.tokenizer import new_tokenizer
from recipe.training import first_alone, process
from recipe.unet import previews, repaint, train_unet
from recipe.vae import latents, train_vae

HERE = Path(__file__).parent
WEIGHTS = HERE.parent / "pocket" / "weights"
CROWDED = 40_000  # for CLIPSeg
STAGES = ("taesd", "unet", "clipseg", "judge")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m recipe", description=__doc__)
    parser.add_argument("stages", nargs="*", help=f"from {', '.join(STAGES)}; all by default")
    parser.add_argument("--work", type=Path, default=HERE / "work", help="folder of checkpoints")
    args = parser.parse_args()
    unknown = set(args.stages) - set(STAGES)
    if unknown:
        parser.error(f"stages must be from {', '.join(STAGES)}, got {', '.join(sorted(unknown))}")
    if "WORLD_SIZE" in os.environ:  # torchrun's
        # The others wait while the first renders.
        distributed.init_process_group("gloo", timeout=timedelta(hours=6))
    make(args.stages or STAGES, args.work)


def make(stages: list[str] | tuple[str, ...], work: Path) -> None:
    """Run `stages`, each with what it builds upon.

    A tokenizer remembers how it padded last: what is exported has never been used.
    """
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    studio = first_alone(lambda: Studio(work / "packages"))
    tokenizer = new_tokenizer()
    seen = first_alone(lambda: pictures(studio, work, "train", PICTURES, training_scene))
    vae = train_vae(seen.images, work)
    codes = first_alone(lambda: scaled_latents(vae, seen, work / "latents.pt"))
    if "taesd" in stages:
        tiny = train_taesd(vae, codes, work)
        if process() == 0:
            export_taesd(TAESD.pocket, tiny)
    if set(stages) <= {"taesd"}:
        return
    denoiser = train_unet(codes, seen.scenes, tokenizer, work)
    if "unet" in stages and process() == 0:
        export_stable_diffusion(WEIGHTS / "stable-diffusion", vae, denoiser, new_tokenizer())
    if "clipseg" in stages:
        crowded = first_alone(lambda: pictures(studio, work, "clipseg", CROWDED, crowded_scene))
        codes = first_alone(lambda: scaled_latents(vae, crowded, work / "clipseg-latents.pt"))
        preview = previews(denoiser, vae, codes, crowded.scenes, tokenizer)
        clipseg = train_clipseg(crowded, preview, tokenizer, work)
        if process() == 0:
            export_clipseg(WEIGHTS / "clipseg", clipseg, new_tokenizer())
    if "judge" in stages:
        judge = train_judge(studio, work, degrade=repaint(denoiser, vae, tokenizer))
        if process() == 0:
            export_judge(judge)


def scaled_latents(vae: AutoencoderKL, seen: Pictures, path: Path) -> Tensor:
    """Latents (N, 4, 16, 16) of unit variance, fp16, encoded once into `path`."""
    if not path.exists():
        torch.save((latents(vae, seen.images) * vae.config.scaling_factor).half(), path)
    return torch.load(path, weights_only=True)


if __name__ == "__main__":
    main()
