"""Other engines that run the same model, each in an environment of its own: what they take.

    PYTHON benchmarks/engines.py ENGINE FOLDER [--steps 4] [--size 512] [--cpu_time]

PYTHON is that of an environment which has the engine: pip's "optimum-intel[openvino]" or
stable-diffusion-cpp-python. FOLDER is what `benchmarks.speed --keep` has left. Prints JSON.
Nothing of this program needs to run there. Not verified: optimum-intel in bf16 at full size; of a
model of tiny sizes OpenVINO dies there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import wraps
from importlib import import_module
from importlib.metadata import version
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, TypeVar

PROMPT = "a black dog next to a toy robot"
GUIDANCE_SCALE, SEED = 7.5, 2024
Seconds = dict[str, list[float]]
T = TypeVar("T")
Paint = Callable[[Seconds], None]  # notes the seconds of every call, by part


def optimum_intel(folder: Path, steps: int, size: int, now: Callable[[], float]) -> Paint:
    """OVStableDiffusionPipeline, converted before; compiled for the size, as it advises."""
    import torch
    from optimum.intel import OVStableDiffusionPipeline

    kept = folder / "optimum-intel"
    pipe = OVStableDiffusionPipeline.from_pretrained(
        kept,
        compile=False,
        ov_config={
            "INFERENCE_PRECISION_HINT": "bf16",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        },
    )
    pipe.reshape(batch_size=1, height=size, width=size, num_images_per_prompt=1)
    pipe.compile()
    pipe.set_progress_bar_config(disable=True)

    def paint(seconds: Seconds) -> None:
        for part, owner, method in (
            ("denoiser", pipe.unet, "forward"),
            ("vae", pipe.vae, "decode"),
            ("text_encoder", pipe.text_encoder, "forward"),
        ):
            setattr(owner, method, timed(getattr(owner, method), seconds[part], now))
        pipe(
            PROMPT,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE_SCALE,
            height=size,
            width=size,
            generator=torch.Generator().manual_seed(SEED),
        )

    return paint


def convert_for_optimum_intel(folder: Path) -> None:
    """Once: its own conversion, weights in 16 bits, as it advises."""
    from optimum.intel import OVStableDiffusionPipeline

    if not (folder / "optimum-intel").exists():
        pipe = OVStableDiffusionPipeline.from_pretrained(
            folder / "stable-diffusion", export=True, compile=False
        )
        pipe.half()
        pipe.save_pretrained(folder / "optimum-intel")


def timed(call: Callable[..., Any], seconds: list[float], now: Callable[[], float]) -> Any:
    """The same call, which notes in `seconds` what each took."""

    @wraps(call)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        begun = now()
        result = call(*args, **kwargs)
        seconds.append(now() - begun)
        return result

    return wrapped


def stable_diffusion_cpp(folder: Path, steps: int, size: int, now: Callable[[], float]) -> Paint:
    """From a single file in the original layout; its own default precision, which is the file's."""
    from stable_diffusion_cpp import StableDiffusion

    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    model = StableDiffusion(
        model_path=str(folder / "original.safetensors"), n_threads=threads, verbose=False
    )

    def paint(seconds: Seconds) -> None:
        marks = [now()]

        def progress(step: int, _steps: int, _time: float) -> None:
            if step:
                marks.append(now())

        model.generate_image(
            prompt=PROMPT,
            width=size,
            height=size,
            sample_steps=steps,
            sample_method="euler",
            cfg_scale=GUIDANCE_SCALE,
            seed=SEED,
            progress_callback=progress,
        )
        # The first step counts from the start of the text, of which it does not tell the end.
        last = marks[: steps + 1]
        seconds["denoiser"] += [after - before for before, after in pairwise(last)][1:]
        seconds["text_encoder"].append(max(0.0, last[1] - last[0] - median(seconds["denoiser"])))
        seconds["vae"].append(now() - last[-1])

    return paint


def alone(function: Callable[..., T], *args: object) -> T:
    """What `function` returns from a new process, which ends with it."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(function, *args).result()


def peak_memory() -> int:
    """Bytes of host memory that this process has had at most."""
    import resource  # not on Windows, where the rest of this file can be read nevertheless

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Engine(NamedTuple):
    """Another program: how it loads a model, what it is imported by, and what it computes in."""

    load: Callable[[Path, int, int, Callable[[], float]], Paint]
    library: tuple[str, str]
    packages: tuple[str, ...]
    dtype: str


ENGINES = {
    "optimum-intel": Engine(
        optimum_intel,
        ("optimum.intel", "OVStableDiffusionPipeline"),
        ("optimum-intel", "openvino"),
        "bfloat16",
    ),
    "stable-diffusion.cpp": Engine(
        stable_diffusion_cpp,
        ("stable_diffusion_cpp", "StableDiffusion"),
        ("stable-diffusion-cpp-python",),
        "float16",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--cpu_time", action="store_true")
    args = parser.parse_args()
    now = time.process_time if args.cpu_time else time.perf_counter
    engine = ENGINES[args.engine]
    if args.engine == "optimum-intel":
        alone(convert_for_optimum_intel, args.folder)  # its memory is not the measured one's
    module, name = engine.library
    getattr(import_module(module), name)  # importing is not a part of loading a model
    begun = now()
    paint = engine.load(args.folder, args.steps, args.size, now)
    ready = now()
    seconds: Seconds = {"denoiser": [], "vae": [], "text_encoder": []}
    paint(seconds)
    done = now()
    print(
        json.dumps(
            {
                "load": ready - begun,
                "paint": done - ready,
                "seconds": seconds,
                "peak": peak_memory(),
                "dtype": engine.dtype,
                "versions": {name: version(name) for name in engine.packages},
            }
        )
    )


if __name__ == "__main__":
    main()
