"""The command line: reads the flags, runs one flow, and turns errors into one line and a code.

Nothing heavy is imported before the arguments are known to be valid.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict, fields
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import loaders
from errors import InputError, TemperingError
from outputs import check_writable
from settings import MAX_SEED, PREVIEWS, UNCERTAINTIES, VERSION, Models, Request, Tempering

FLOWS = ("tempered_inference", "evaluate", "update")
MODULES = {"tempered_inference": "inference", "evaluate": "evaluation"}
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
        import init

        sys.exit(init.update())
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
    settings = Tempering(**{field.name: getattr(args, field.name) for field in fields(Tempering)})
    values = {**vars(args), **asdict(settings)}
    request = Request(
        prompts=tuple(args.prompts),
        settings=settings,
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
    loaders.scheduler_name(models.scheduler)
    for name, check in (
        (models.model, loaders.check_model),
        (models.clipseg, loaders.check_clipseg),
        (models.vae, loaders.check_vae),
    ):
        if name is not None:
            check(name)


def parser() -> Parser:
    """All flags, in groups."""
    defaults = Tempering()
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

    flows = top.add_argument_group("flows (exactly one a call)")
    flows.add_argument("--tempered_inference", action="store_true", help="make a tempered picture")
    flows.add_argument(
        "--evaluate", action="store_true", help="measure plain against tempered over many seeds"
    )
    flows.add_argument("--update", action="store_true", help="renew the installed libraries")

    what = top.add_argument_group("what to paint")
    what.add_argument(
        "--prompts", nargs="+", default=list(PROMPTS), metavar="TEXT",
        help="one prompt a subject (default: %(default)s)",
    )  # fmt: skip
    what.add_argument(
        "--joiner", default=defaults.joiner, metavar="TEXT",
        help="stands between the subjects in the prompt (default: %(default)r)",
    )  # fmt: skip
    what.add_argument(
        "--negative_prompt", default="", metavar="TEXT", help="what to keep out of the picture"
    )
    what.add_argument(
        "--seed", type=int, default=2024, help=f"0..{MAX_SEED}; same start on every device "
        "(default: %(default)s)",
    )  # fmt: skip
    what.add_argument("--height", type=int, help="pixels, a multiple of 8 (default: the model's)")
    what.add_argument("--width", type=int, help="pixels, a multiple of 8 (default: the model's)")

    how = top.add_argument_group("tempering")
    numbers = (
        ("--steps", int, "N", "denoising steps"),
        ("--stoptime", int, "N", "interrupt after this many steps and look, 1..steps"),
        ("--k", float, "X", "how fast uncertainty turns into fresh noise; 0 adds none"),
        (
            "--background",
            float,
            "X",
            "uncertainty of pixels of no class, in the worst class's, 0..1",
        ),
        ("--cfg_rescale", float, "X", "fresh noise in tenths of what the schedule expects"),
        (
            "--rounds",
            int,
            "N",
            "times to go back, look again and keep the better; 1 does not look again",
        ),
        ("--accept", float, "X", "with rounds: an energy that is low enough to stop at"),
        ("--early_look", int, "N", "with rounds: look after this many steps, too; 0 does not"),
        (
            "--early_accept",
            float,
            "X",
            "with rounds: above this energy a picture goes no further than the early look",
        ),
        (
            "--temperature",
            float,
            "X",
            "with rounds: makes keeping a worse picture likelier; 0 never",
        ),
        (
            "--cooling",
            float,
            "X",
            "with rounds: each goes back so many times as far as the one before, 0..1",
        ),
        ("--candidates", int, "N", "with rounds: pictures a round, of which the best counts"),
        ("--guidance_scale", float, "X", "weight of the prompt; 1 or less switches guidance off"),
        ("--look_guidance", float, "X", "guidance of the picture that CLIPSeg is shown"),
        ("--threshold", float, "P", "a pixel below this probability belongs to no class"),
    )
    for flag, kind, metavar, text in numbers:
        how.add_argument(
            flag, type=kind, metavar=metavar, default=getattr(defaults, flag[2:]),
            help=f"{text} (default: %(default)g)",
        )  # fmt: skip
    how.add_argument(
        "--backsteps", type=int, metavar="N",
        help=f"go back by this many steps, 0..stoptime (default: {defaults.backsteps}, or stoptime "
        "where that is less)",
    )  # fmt: skip
    how.add_argument(
        "--uncertainty", choices=UNCERTAINTIES, default=defaults.uncertainty,
        help="what fresh noise follows: each class's uncertainty or each pixel's own (default: "
        "%(default)s)",
    )  # fmt: skip
    how.add_argument(
        "--preview", choices=PREVIEWS, default=defaults.preview,
        help="how the interrupted latents become a picture for CLIPSeg (default: %(default)s)",
    )  # fmt: skip

    models = top.add_argument_group("models")
    models.add_argument(
        "--model", metavar="NAME",
        help="Hub id, diffusers folder, .safetensors file, or pocket (the bundled model); default: "
        f"{loaders.STABLE_DIFFUSION}, or pocket where it can not be had",
    )  # fmt: skip
    models.add_argument(
        "--clipseg", metavar="NAME",
        help=f"Hub id, folder or pocket (default: {loaders.CLIPSEG}, or pocket with the pocket)",
    )  # fmt: skip
    models.add_argument(
        "--vae", metavar="NAME", help="Hub id, folder or file (default: the model's)"
    )
    models.add_argument(
        "--scheduler", default="euler", metavar="NAME",
        help=f"{', '.join(loaders.SCHEDULERS)} (default: %(default)s)",
    )  # fmt: skip
    models.add_argument(
        "--offline",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="use what is in the cache, never the network",
    )

    machine = top.add_argument_group("machine")
    machine.add_argument("--device", help="cuda, mps, xpu or cpu (default: the best one present)")
    machine.add_argument("--dtype", help="fp16, bf16 or fp32 (default: what the device does best)")
    machine.add_argument(
        "--offload",
        help="model or sequential: keep only that part of Stable Diffusion in GPU memory which "
        "runs; slower",
    )

    results = top.add_argument_group("results")
    results.add_argument(
        "--output", type=Path, default=Path("outputs"), metavar="FOLDER",
        help="a folder a run is made in it (default: %(default)s)",
    )  # fmt: skip
    results.add_argument(
        "--compare",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="make the plain picture of the same seed too",
    )
    results.add_argument(
        "--cycles", type=int, default=4, metavar="N",
        help="seeds to evaluate: seed, seed + 1, ... (default: %(default)s)",
    )  # fmt: skip
    results.add_argument(
        "--repeat", type=Path, metavar="RUN.JSON",
        help="take every flag that is not given from an earlier run",
    )  # fmt: skip
    results.add_argument(
        "--resume", type=Path, metavar="FOLDER", help="go on with an interrupted evaluation"
    )
    return top


if __name__ == "__main__":
    sys.exit(main())
