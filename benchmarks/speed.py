"""Speed and memory of this program beside diffusers', on the architectures of its families.

    python -m benchmarks.speed [--models v1-4 xl 3.5-medium] [--steps 4] [--size 512]
                               [--scratch DIR] [--keep] [--cpu_time]
                               [--engine NAME=PYTHON ...]

Weights are random (architecture.py): what is painted is noise, what it costs is not. Each variant
runs in a process of its own, so its peak memory is its own. Loading reads files that have just been
written, so it measures the work of loading and not the disk. Times are taken around the models'
own methods; the algorithm knows nothing of them. This program paints a picture that is looked at
twice and needs no round. What one of 20 steps takes follows from its parts. Other engines
(engines.py) run with the Python that has them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import outputs
from benchmarks.engines import ENGINES, alone, peak_memory, timed
from errors import InputError
from settings import Tempering

# Neither torch nor anything that imports it stands above: Linux counts what a process has had in
# memory before it starts a child as the child's own peak.

RESULTS = Path(__file__).parent / "results" / "speed.json"
FOLDER = "tempering-benchmark"  # in the scratch directory
PROMPTS = ("a black dog", "a toy robot")
SEED = 2024
GOAL = 0.05  # of painting's time may be spent outside of the models
MEMORY_GOAL = 1.05  # times diffusers' own, in the same dtype
PLAIN_GOAL = 1.03  # times a plain picture, for one that needs no round
LOOK_GOAL = 0.1  # of a step, for every look
STEPS = 20  # of a picture that users make
ANYTHING = 100.0  # accepts all: no picture's energy is as high
NETWORKS = ("denoiser", "vae", "preview", "clipseg", "clipseg_text")
PARTS = (*NETWORKS, "text_encoder", "look")
# Of benchmarks.architecture, with what their files take on the disk, in GB.
MODELS = {"v1-4": 5, "xl": 8, "3.5-medium": 8}
PACKAGES = ("torch", "diffusers", "transformers")
LIBRARIES = (
    ("diffusers", "StableDiffusionPipeline"),
    ("diffusers", "StableDiffusionXLPipeline"),
    ("diffusers", "StableDiffusion3Pipeline"),
    ("transformers", "CLIPSegForImageSegmentation"),
    ("tempering", "Painter"),
)
# The libraries' bars and advice, of which diffusers' bars can not be switched off from outside.
QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore::FutureWarning",
}
GIB = 2**30
CPU_TIME = "TEMPERING_BENCHMARK_CPU_TIME"  # set where the processor's seconds count


@dataclass(frozen=True)
class Part:
    """What one of the models took during a picture."""

    calls: int
    seconds: float  # all calls together
    median: float  # seconds of one call
    first: float  # of the first


@dataclass(frozen=True)
class Measurement:
    """What one variant took for one picture."""

    variant: str
    dtype: str
    device: str
    load: float  # seconds
    paint: float  # seconds, text and VAE included
    parts: dict[str, Part]
    peak: int  # bytes of host memory at most, weights included

    @property
    def rest(self) -> float:
        """The share of painting that is neither denoiser nor VAE nor CLIPSeg."""
        return 1 - sum(self.parts[name].seconds for name in NETWORKS) / self.paint

    @property
    def further_look(self) -> float:
        """Seconds of a look after the first, at which the networks warm up; of the only one else.

        A preview, CLIPSeg, and all that is between them.
        """
        look = self.parts["look"]
        return (look.seconds - look.first) / (look.calls - 1) if look.calls > 1 else look.first

    @property
    def content(self) -> float:
        """Times a plain picture's seconds that one takes which needs no round: its looks more."""
        return 1 + (self.parts["look"].seconds + self.parts["clipseg_text"].seconds) / self.plain

    @property
    def plain(self) -> float:
        """Seconds of a plain picture of `STEPS` steps, by the medians of the calls."""
        text, vae = self.parts["text_encoder"], self.parts["vae"]
        return text.seconds + STEPS * self.parts["denoiser"].median + vae.median

    @property
    def warm_up(self) -> float:
        """Seconds that the first step took more than the others: compiling, reading a cache."""
        return max(0.0, self.parts["denoiser"].first - self.parts["denoiser"].median)


@dataclass(frozen=True)
class Loaded:
    """A variant, ready to paint."""

    pipe: Any
    clipseg: Any | None
    paint: Callable[[Clock], None]


class Clock:
    """Seconds spent inside the models, call by call.

    No call of one contains one of another, but for looks, which are counted as a whole, too.
    """

    def __init__(self, loaded: Loaded) -> None:
        from families import family_of

        self._seconds: dict[str, list[float]] = {name: [] for name in PARTS}
        self.watch("denoiser", family_of(loaded.pipe).denoiser)
        self.watch("vae", loaded.pipe.vae, "decode")
        if getattr(loaded.pipe, "taesd", None) is not None:
            self.watch("preview", loaded.pipe.taesd, "decode")
        for name, part in loaded.pipe.components.items():
            if name.startswith("text_encoder") and part is not None:
                self.watch("text_encoder", part)
        if loaded.clipseg:
            model = loaded.clipseg.model
            self.watch("clipseg_text", model, "get_conditional_embeddings")
            self.watch("clipseg", model.clip, "get_image_features")
            self.watch("clipseg", model.decoder)

    def parts(self) -> dict[str, Part]:
        """What each model took so far."""
        return {name: _part(seconds) for name, seconds in self._seconds.items()}

    def watch(self, part: str, owner: Any, method: str = "forward") -> None:
        """Count what every call of a method takes as a part's seconds."""
        setattr(owner, method, timed(getattr(owner, method), self._seconds[part], now))


def _part(seconds: Sequence[float]) -> Part:
    known = list(seconds) or [0.0]
    return Part(len(seconds), sum(known), median(known), known[0])


def now() -> float:
    """Seconds, the processor's where asked for, once the device has done all it was told."""
    if os.environ.get(CPU_TIME):
        return time.process_time()
    import torch

    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def load_diffusers(folder: Path, settings: Tempering, dtype: str) -> Loaded:
    """diffusers' own pipeline with its model's scheduler."""
    import torch
    from diffusers import DiffusionPipeline

    from families import family_of
    from loaders import pick_device

    options: dict[str, Any] = {"torch_dtype": getattr(torch, dtype)}
    index = json.loads((folder / "stable-diffusion" / "model_index.json").read_text())
    if "text_encoder_3" in index:
        options |= {"text_encoder_3": None, "tokenizer_3": None}
    pipe = DiffusionPipeline.from_pretrained(folder / "stable-diffusion", **options)
    pipe.to(pick_device())
    pipe.set_progress_bar_config(disable=True)
    scale = settings.guidance_scale or family_of(pipe).guidance_scale

    def paint(_: Clock) -> None:
        pipe(
            settings.joiner.join(PROMPTS),
            num_inference_steps=settings.steps,
            guidance_scale=scale,
            height=settings.height,
            width=settings.width,
            generator=torch.Generator().manual_seed(SEED),
        )

    return Loaded(pipe, None, paint)


def load_program(folder: Path, settings: Tempering, **options: Any) -> Loaded:
    """This program with all its defaults but for the `options` of its loaders."""
    from loaders import load_clipseg, load_pipeline
    from tempering import Painter

    pipe = load_pipeline(str(folder / "stable-diffusion"), **options)
    clipseg = load_clipseg(str(folder / "clipseg"), **options)

    def paint(clock: Clock) -> None:
        painter = Painter(pipe, clipseg, [PROMPTS], settings)
        clock.watch("look", painter, "glance")
        painter.temper([SEED])

    return Loaded(pipe, clipseg, paint)


OURS, OURS_BY_OPENVINO = "tempering", "tempering, OpenVINO"
# Those of diffusers, by the dtype that they compute in.
DIFFUSERS = {
    "float32": "diffusers, as it comes",
    "bfloat16": "diffusers, bf16",
    "float16": "diffusers, fp16",
}
VARIANTS: dict[str, Callable[[Path, Tempering], Loaded]] = {
    **{name: partial(load_diffusers, dtype=dtype) for dtype, name in DIFFUSERS.items()},
    OURS: load_program,
    OURS_BY_OPENVINO: partial(load_program, backend="openvino", device="cpu"),
}


def of_diffusers(model: str, dtype: str) -> list[str]:
    """Its variants to measure beside this program in `dtype`: the same, and its default.

    But for models whose files are in 16 bits, which nobody loads in fp32.
    """
    default = [DIFFUSERS["float32"]] if model == "v1-4" else []
    return list(dict.fromkeys([*default, DIFFUSERS[dtype]]))


def measure(variant: str, folder: Path, settings: Tempering) -> Measurement:
    """Load the models that `architecture.save` wrote to `folder`, paint one picture, take times."""
    for library, name in LIBRARIES:  # importing them is not a part of loading a model
        getattr(import_module(library), name)
    begun = now()
    loaded = VARIANTS[variant](folder, settings)
    ready = now()
    clock = Clock(loaded)
    started = now()
    loaded.paint(clock)
    painted = now()
    vae = loaded.pipe.vae
    return Measurement(
        variant=variant,
        dtype=str(vae.dtype).removeprefix("torch."),
        device=vae.device.type,
        load=ready - begun,
        paint=painted - started,
        parts=clock.parts(),
        peak=peak_memory(),
    )


def build(folder: Path, model: str) -> None:
    """Write the models."""
    from benchmarks.architecture import ORIGINALS, save

    save(folder, ORIGINALS[model])


def machine() -> dict[str, object]:
    """What the figures depend on beside the code."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }


def processor() -> str:
    """The processor's name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def report(settings: Tempering, measurements: Sequence[Measurement]) -> dict[str, object]:
    """What speed.json says of a model; seconds and shares are rounded to what they can mean."""
    return {
        "machine": machine(),
        "size": [settings.width, settings.height],
        "steps": settings.steps,
        "looks": settings.looks,
        "variants": [
            {
                "variant": each.variant,
                "device": each.device,
                "dtype": each.dtype,
                "load_seconds": round(each.load, 2),
                "warm_up_seconds": round(each.warm_up, 2),
                "plain_20_steps_seconds": round(each.plain, 1),
                "paint_seconds": round(each.paint, 2),
                "total_seconds": round(each.load + each.paint, 2),
                "further_look_seconds": round(each.further_look, 3),
                **{name: rounded(part) for name, part in each.parts.items()},
                "rest_share": round(each.rest, 4),
                "peak_gib": round(each.peak / GIB, 2),
            }
            for each in measurements
        ],
    }


def rounded(part: Part) -> dict[str, float]:
    return {
        "calls": part.calls,
        "seconds": round(part.seconds, 3),
        "median_seconds": round(part.median, 3),
    }


def table(measurements: Sequence[Measurement]) -> str:
    """A Markdown table, a row a variant; models as calls x median seconds of a call."""
    head = (
        "variant", "dtype", "load s", "first step s more", "denoiser step s", "VAE s", "preview s",
        "CLIPSeg s", "look s", "rest", "20 plain steps s", "peak GiB",
    )  # fmt: skip
    rows = [
        (
            each.variant,
            each.dtype,
            f"{each.load:.1f}",
            f"{each.warm_up:.1f}",
            cell(each.parts["denoiser"]),
            cell(each.parts["vae"]),
            cell(each.parts["preview"]),
            cell(each.parts["clipseg"]),
            f"{each.further_look:.2f}",
            f"{each.rest:.1%}",
            f"{each.plain:.1f}",
            f"{each.peak / GIB:.2f}",
        )
        for each in measurements
    ]
    lines = [head, ("---", "---", *["---:"] * (len(head) - 2)), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(part: Part) -> str:
    return f"{part.calls} x {part.median:.2f}"


def named(text: str) -> tuple[str, str]:
    """An engine and its Python, as `--engine` gives them."""
    name, _, python = text.partition("=")
    if name not in ENGINES or shutil.which(python) is None:
        form = f"NAME=PYTHON, NAME from {', '.join(ENGINES)}, PYTHON a program"
        raise argparse.ArgumentTypeError(f"must be {form}, got {text!r}")
    return name, python


def say(text: str) -> None:
    """Tell how far it is; the result alone goes to stdout."""
    print(text, file=sys.stderr, flush=True)


def measure_engine(
    engine: str, python: str, folder: Path, settings: Tempering
) -> Measurement | None:
    """What another program takes for a plain picture; None where it fails, which it says itself."""
    words = ["--steps", str(settings.steps), "--size", str(settings.height)]
    words += ["--cpu_time"] if os.environ.get(CPU_TIME) else []
    done = subprocess.run(
        [python, str(Path(__file__).with_name("engines.py")), engine, str(folder), *words],
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        say(f"leaving out {engine}: it ended with code {done.returncode}")
        return None
    found = json.loads(done.stdout.splitlines()[-1])
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return Measurement(
        variant=versions,
        dtype=found["dtype"],
        device="cpu",
        load=found["load"],
        paint=found["paint"],
        parts={name: _part(found["seconds"].get(name, ())) for name in PARTS},
        peak=found["peak"],
    )


def build_original(folder: Path) -> None:
    """Write the model as one file in the original layout, beside its folder."""
    from diffusers import DiffusionPipeline
    from safetensors.torch import save_file

    from benchmarks.originals import single_file

    pipe = DiffusionPipeline.from_pretrained(folder / "stable-diffusion")
    halves = {name: each.half() for name, each in single_file(pipe).items()}
    save_file(halves, folder / "original.safetensors")


def run(
    model: str, scratch: Path, settings: Tempering, engines: Mapping[str, str], *, keep: bool
) -> list[Measurement]:
    """Measure every variant of a model; its files are written to `scratch` where they lack."""
    folder = scratch / f"{FOLDER}-{model}"
    try:
        if folder.exists():
            say(f"using the models in {folder}")
        else:
            say(f"writing {MODELS[model]} GB of random weights to {folder}")
            alone(build, folder, model)
        home = folder / "home"  # what OpenVINO converts goes with the models
        os.environ["HF_HOME"] = str(home)
        ours = measured(OURS, folder, settings)
        beside = [measured(name, folder, settings) for name in of_diffusers(model, ours.dtype)]
        measurements = [*beside, ours]
        if find_spec("openvino") is None:
            say("leaving out OpenVINO, which is not installed")
        else:
            before = set(home.rglob("*"))
            by_openvino = measured(OURS_BY_OPENVINO, folder, settings)
            if set(home.rglob("*")) != before:  # it has converted something
                by_openvino = measured(OURS_BY_OPENVINO, folder, settings)
            measurements.append(by_openvino)
        for engine, python in engines.items() if model == "v1-4" else ():
            say(f"measuring {engine}")
            if not (folder / "original.safetensors").exists():
                alone(build_original, folder)
            if found := measure_engine(engine, python, folder, settings):
                measurements.append(found)
        return measurements
    finally:
        if not keep:
            for name in (folder.name, f"{folder.name}.unfinished"):
                shutil.rmtree(scratch / name, ignore_errors=True)


def measured(variant: str, folder: Path, settings: Tempering) -> Measurement:
    """What `measure` finds in a process of its own."""
    say(f"measuring {variant}")
    return alone(measure, variant, folder, settings)


def verdict(measurements: Sequence[Measurement]) -> str:
    """What the figures say of the program, of its memory beside diffusers in the same precision."""
    ours = next(each for each in measurements if each.variant == OURS)
    theirs = next(each for each in measurements if each.variant == DIFFUSERS[ours.dtype])
    times = ours.peak / theirs.peak
    look = ours.further_look / ours.parts["denoiser"].median
    return (
        f"Tempering spends {ours.rest:.1%} of painting outside of denoiser, VAE and CLIPSeg "
        f"(goal: under {GOAL:.0%}): {'met' if ours.rest < GOAL else 'missed'}. Its peak memory is "
        f"{times:.3f} times diffusers' (goal: at most {MEMORY_GOAL:g}): "
        f"{'met' if times <= MEMORY_GOAL else 'missed'}. A picture of {STEPS} steps that needs no "
        f"round takes {ours.content:.3f} times its plain one (goal: at most {PLAIN_GOAL:g}): "
        f"{'met' if ours.content <= PLAIN_GOAL else 'missed'}. A further look takes {look:.3f} of "
        f"a step (goal: at most {LOOK_GOAL:g}): {'met' if look <= LOOK_GOAL else 'missed'}."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write speed.json, print a table a model."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", allow_abbrev=False)
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: all",
    )  # fmt: skip
    parser.add_argument(
        "--scratch", type=Path, default=Path(tempfile.gettempdir()), metavar="DIR",
        help=f"where up to {max(MODELS.values())} GB of weights are written at a time; those of an "
        "earlier --keep are used again",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=4, help="denoising steps (default: 4)")
    parser.add_argument("--size", type=int, default=512, help="pixels a side (default: 512)")
    parser.add_argument(
        "--engine", action="append", default=[], type=named, metavar="NAME=PYTHON",
        help=f"of v1-4, another program and the Python that has it: {', '.join(ENGINES)}",
    )  # fmt: skip
    parser.add_argument(
        "--cpu_time", action="store_true",
        help="the processor's seconds in place of the clock's: for one thread on a busy machine",
    )  # fmt: skip
    parser.add_argument("--keep", action="store_true", help="leave the models for the next time")
    args = parser.parse_args(argv)
    try:
        stoptime = max(1, args.steps - 1)  # with another look before it: two, and no round
        settings = Tempering(
            steps=args.steps,
            stoptime=stoptime,
            early_look=stoptime - 1,
            accept=ANYTHING,
            early_accept=ANYTHING,
            height=args.size,
            width=args.size,
        )
    except InputError as error:
        parser.error(str(error))
    os.environ.update(QUIET, **({CPU_TIME: "1"} if args.cpu_time else {}))
    args.scratch.mkdir(parents=True, exist_ok=True)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    for model in args.models:
        measurements = run(model, args.scratch, settings, dict(args.engine), keep=args.keep)
        known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        outputs.save_json(RESULTS, {**known, model: report(settings, measurements)})
        print(f"{model}\n\n{table(measurements)}\n\n{verdict(measurements)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
