"""The command line: reads the flags, runs one flow, and turns errors into one line and a code.

Nothing heavy is imported before the arguments are known to be valid.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict, fields
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import hub
import kinds
import loaders
import loras
from errors import InputError, TemperingError
from outputs import check_writable
from settings import (
    MAX_SEED,
    PREDICTION_TYPES,
    PREVIEWS,
    UNCERTAINTIES,
    VERSION,
    Models,
    Request,
    Tempering,
)

FLOWS = ("tempered_inference", "evaluate", "update")
MODULES = {"tempered_inference": "inference", "evaluate": "evaluation"}
INIT = Path(__file__).with_name("init.py")
PROMPTS = ("a black dog", "a toy robot")
# What a flag says about this call, not about the picture: not kept in run.json.
OF_THE_CALL = ("debug", "output", "repeat", "resume", "update")
# What may differ when an evaluation is resumed; anything else would mix two experiments.
FREE_ON_RESUME = ("cycles", "device", "offload", "offline", *OF_THE_CALL)
EXAMPLES = """\
examples:
  python init.py --tempered_inference
  python init.py --tempered_inference --prompts "a black dog" "a toy robot" --compare
  python init.py --evaluate --prompts "a black dog" "a toy robot" --cycles 4
  python init.py --tempered_inference --model pocket --prompts "a red car" "a blue bird"
  python init.py --tempered_inference --repeat outputs/<run>/run.json
  python init.py --update

init.py installs what is missing and hands every flag on; `python init.py --test` runs the tests.
"""


class Repeated(argparse.Action):
    """A flag that may be given several times; what is given takes the place of the default."""

    def __call__(self, parser: Any, namespace: Any, value: Any, option: str | None = None) -> None:
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [value] if before is self.default else [*before, value])


# How flags are read.
Options = dict[str, Any]
SWITCH: Options = {"action": "store_true", "default": False}
EITHER: Options = {"action": argparse.BooleanOptionalAction, "default": False}
TEXT: Options = {"metavar": "TEXT"}
NAME: Options = {"metavar": "NAME"}
N: Options = {"type": int, "metavar": "N"}
X: Options = {"type": float, "metavar": "X"}
P: Options = {"type": float, "metavar": "P"}
FOLDER: Options = {"type": Path, "metavar": "FOLDER"}

# A flag has the name and the default of its setting; None is told in its own words.
DEFAULTS: dict[str, Any] = {
    **asdict(Tempering()),
    **asdict(Models()),
    "backsteps": None,
    "prompts": list(PROMPTS),
    "lora": [],
    "seed": 2024,
    "cycles": 4,
    "output": Path("outputs"),
}
# Group -> flag -> how it is read, what it means.
FLAGS: dict[str, dict[str, tuple[Options, str]]] = {
    "flows (exactly one a call)": {
        "tempered_inference": (SWITCH, "make a tempered picture"),
        "evaluate": (SWITCH, "measure plain against tempered over many seeds"),
        "update": (SWITCH, "renew the installed libraries"),
    },
    "what to paint": {
        "prompts": ({**TEXT, "nargs": "+"}, "one prompt a subject"),
        "joiner": (TEXT, "stands between the subjects in the prompt (default: %(default)r)"),
        "negative_prompt": (TEXT, "what to keep out of the picture"),
        "seed": (N, f"0..{MAX_SEED}; same start on every device"),
        "height": (N, "pixels, a multiple of 8 (default: the model's)"),
        "width": (N, "pixels, a multiple of 8 (default: the model's)"),
    },
    "tempering": {
        "steps": (N, "denoising steps"),
        "stoptime": (N, "interrupt after this many steps and look, 1..steps"),
        "backsteps": (
            N,
            f"go back by this many steps, 0..stoptime (default: {Tempering.backsteps}, or stoptime "
            "where that is less)",
        ),
        "k": (X, "how fast uncertainty turns into fresh noise; 0 adds none"),
        "uncertainty": (
            {"choices": UNCERTAINTIES},
            "what fresh noise follows: each class's uncertainty or each pixel's own",
        ),
        "background": (X, "uncertainty of pixels of no class, in the worst class's, 0..1"),
        "cfg_rescale": (X, "fresh noise in tenths of what the schedule expects"),
        "rounds": (N, "times to go back, look again and keep the better; 1 does not look again"),
        "accept": (X, "with rounds: an energy that is low enough to stop at"),
        "early_look": (N, "with rounds: look after this many steps, too; 0 does not"),
        "early_accept": (
            X,
            "with rounds: above this energy a picture goes no further than the early look",
        ),
        "temperature": (X, "with rounds: makes keeping a worse picture likelier; 0 never"),
        "cooling": (X, "with rounds: each goes back so many times as far as the one before, 0..1"),
        "candidates": (N, "with rounds: pictures a round, of which the best counts"),
        "guidance_scale": (
            X,
            "weight of the prompt; 1 or less switches guidance off (default: 7.5; XL: 5; 3: 7; "
            "3.5: 4.5)",
        ),
        "look_guidance": (X, "guidance of the picture that CLIPSeg is shown"),
        "threshold": (P, "a pixel below this probability belongs to no class"),
        "preview": (
            {"choices": PREVIEWS},
            "how the interrupted latents become a picture for CLIPSeg",
        ),
    },
    "models": {
        "model": (
            NAME,
            "Hub id, diffusers folder, .safetensors file, or pocket (the bundled model); default: "
            f"{kinds.STABLE_DIFFUSION}, or pocket where it can not be had",
        ),
        "clipseg": (
            NAME,
            f"Hub id, folder or pocket (default: {hub.CLIPSEG}, or pocket with the pocket)",
        ),
        "vae": (NAME, "Hub id, folder or file (default: the model's)"),
        "lora": (
            {"action": Repeated, "metavar": "NAME[:WEIGHT]"},
            "Hub id, Hub id/file, folder or file; may be given several times",
        ),
        "t5": (
            {**EITHER, "default": True},
            "read with Stable Diffusion 3's largest text encoder, too, where the model has it; "
            "--no-t5 neither fetches nor loads it (default: on)",
        ),
        "scheduler": (
            NAME,
            f"{', '.join(loaders.SCHEDULERS)}; with Stable Diffusion 3 "
            f"{', '.join(loaders.FLOW_SCHEDULERS)} (default: euler; of an LCM: lcm)",
        ),
        "prediction_type": (
            {"choices": PREDICTION_TYPES},
            "what the model predicts, where its configuration does not tell: of single files of "
            "Stable Diffusion 2 it says v_prediction, which its 512 pixels model does not predict "
            "(default: the model's)",
        ),
        "offline": (EITHER, "use what is in the cache, never the network"),
    },
    "machine": {
        "device": (NAME, "cuda, mps, xpu or cpu (default: the best one present)"),
        "dtype": (NAME, "fp16, bf16 or fp32 (default: what the device does best)"),
        "offload": (
            NAME,
            "model or sequential: keep only that part of Stable Diffusion in GPU memory which "
            "runs; slower",
        ),
    },
    "results": {
        "output": (FOLDER, "a folder a run is made in it"),
        "compare": (EITHER, "make the plain picture of the same seed too"),
        "cycles": (N, "seeds to evaluate: seed, seed + 1, ..."),
        "repeat": (
            {**FOLDER, "metavar": "RUN.JSON"},
            "take every flag that is not given from an earlier run",
        ),
        "resume": (FOLDER, "go on with an interrupted evaluation"),
    },
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{' '.join(message.split())} (see --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, 1 (failed at run time), 2 (bad input) or 130 (Ctrl-C)."""
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        run(words)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if "--debug" in words:
            traceback.print_exc()
        known = isinstance(error, TemperingError)
        print(f"error: {error if known else unexpected(error)}", file=sys.stderr)
        return error.exit_code if isinstance(error, TemperingError) else 1
    return 0


def unexpected(error: Exception) -> str:
    first = (str(error).splitlines() or [""])[0]
    return f"unexpected {type(error).__name__}: {first} (--debug shows where)"


def run(words: Sequence[str]) -> None:
    """Check everything that needs no model, then import and run the flow."""
    args = parse(words)
    flow = chosen_flow(args)
    if flow == "update":
        sys.exit(subprocess.call([sys.executable, str(INIT), "--update"]))
    request = to_request(args)
    try:
        flow_module = importlib.import_module(MODULES[flow])
    except ModuleNotFoundError as error:
        raise TemperingError(
            f"{error.name} is not installed in this Python: start with `python init.py` and the "
            "same flags, or activate .venv"
        ) from error
    with loaders.memory_errors():
        flow_module.run(request)


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The arguments; those of an earlier run (--repeat, --resume) stand in for flags not given."""
    args = parser().parse_args(words)
    if args.repeat and args.resume:
        raise InputError("--repeat and --resume exclude each other, got both")
    if not (args.repeat or args.resume):
        return args
    stored = stored_arguments(args.repeat or args.resume / "run.json")
    if args.resume and not (stored.get("evaluate") and not args.tempered_inference):
        raise InputError(f"--resume must name the folder of an evaluation, got {args.resume}")
    if any(getattr(args, flow) for flow in FLOWS):
        stored = {name: value for name, value in stored.items() if name not in FLOWS}
    repeated = parser()
    repeated.set_defaults(**stored)
    args = repeated.parse_args(words)
    changed = [
        name
        for name in stored
        if name not in FREE_ON_RESUME and getattr(args, name) != stored[name]
    ]
    if args.resume and changed:
        raise InputError(f"--resume must keep the run's own --{changed[0]} {stored[changed[0]]!r}")
    return args


def stored_arguments(path: Path) -> dict[str, Any]:
    """The flags of an earlier run, from its run.json."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))["arguments"]
        known = vars(parser().parse_args([]))
        return {name: stored[name] for name in stored.keys() & known}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"needs the run.json of an earlier run, got {path} ({error})") from error


def chosen_flow(args: argparse.Namespace) -> str:
    """The one flow that is asked for."""
    flows = [flow for flow in FLOWS if getattr(args, flow)]
    if len(flows) != 1:
        names = ", ".join(f"--{flow}" for flow in FLOWS)
        got = " and ".join(f"--{flow}" for flow in flows) or "none"
        raise InputError(f"exactly one of {names} is needed, got {got}")
    return flows[0]


def to_request(args: argparse.Namespace) -> Request:
    """The arguments as a checked request; raises InputError."""
    values = {**vars(args), "lora": tuple(args.lora)}
    if args.backsteps is None:
        values["backsteps"] = min(Tempering.backsteps, args.stoptime)
    request = Request(
        prompts=tuple(args.prompts),
        settings=Tempering(**{field.name: values[field.name] for field in fields(Tempering)}),
        models=Models(**{field.name: values[field.name] for field in fields(Models)}),
        seed=args.seed,
        output=args.output,
        begun=datetime.now(),
        arguments={name: value for name, value in values.items() if name not in OF_THE_CALL},
        compare=args.compare,
        evaluate=args.evaluate,
        cycles=args.cycles,
        resume=args.resume,
    )
    check_models(request.models)
    check_writable(args.resume or args.output)
    return request


def check_models(models: Models) -> None:
    """Raise InputError for names that can not mean a model or a scheduler."""
    if models.scheduler is not None:
        loaders.scheduler_name(models.scheduler)
    for name, kind in (
        (models.model, kinds.MODEL if models.t5 else kinds.MODEL.bare),
        (models.clipseg, kinds.SEGMENTER),
        (models.vae, kinds.VAE),
    ):
        if name is not None:
            hub.check(name, kind)
    for lora in models.lora:
        loras.check(lora)


def parser() -> Parser:
    """All flags, in groups."""
    top = Parser(
        prog="main.py",
        description="Pictures with several subjects that do not bleed into each other: simulated "
        "annealing inside Stable Diffusion's sampler.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=VERSION)
    top.add_argument("--debug", action="store_true", help="show a traceback with an error")
    for title, flags in FLAGS.items():
        group = top.add_argument_group(title)
        for name, (options, text) in flags.items():
            default = DEFAULTS.get(name)
            group.add_argument(
                f"--{name}", **{"default": default, **options}, help=f"{text}{shown(default, text)}"
            )
    return top


def shown(default: object, text: str) -> str:
    """How a flag's help ends: with its default, where it has one and does not tell it itself."""
    if default is None or default is False or default in ("", []) or "(default" in text:
        return ""
    return f" (default: %(default){'g' if isinstance(default, (int, float)) else 's'})"


if __name__ == "__main__":
    sys.exit(main())
