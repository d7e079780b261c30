"""The command line: reads the flags, runs one flow, and turns errors into one line and a code.

Nothing heavy is imported before the arguments are known to be valid. A Python that is too old for
the other files can read this one, and is told so.
"""

import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while there is nothing to keep, it just ends

if sys.version_info < (3, 10):  # noqa: UP036
    sys.stderr.write("error: Python 3.10 to 3.13 is needed: start init.py with another one\n")
    sys.exit(2)

import _thread
import argparse
import errno
import importlib
import io
import os
import subprocess
import textwrap
import threading
import traceback
from collections.abc import Sequence
from dataclasses import asdict, fields
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import calibration
import hub
import kinds
import layouts
import loaders
import loras
import prompts
from budget import THRESHOLDS, Energies
from errors import InputError, ResourceError, TemperingError, importing, memory_errors
from layouts import LAYOUTS
from outputs import check_writable, encodable, read_json
from settings import (
    AUTO,
    BACKENDS,
    CROWD,
    CROWDED_BUDGET,
    DEFAULT_BUDGET,
    DEFAULT_MOST,
    DEFAULT_STEPS,
    DEFAULT_WAY,
    FREE_ON_RESUME,
    JUDGES,
    MAX_SEED,
    NOBODY,
    PREDICTION_TYPES,
    PREVIEWS,
    UNCERTAINTIES,
    VERSION,
    Models,
    Request,
    Tempering,
    in_proportion,
)

UNHEARD = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EIO)
FLOWS = ("tempered_inference", "evaluate", "update")
MODULES = {"tempered_inference": "inference", "evaluate": "evaluation"}
INIT = Path(__file__).with_name("init.py")
PROMPTS = ("a black dog", "a toy robot")
# What a flag says about this call, not the picture: neither kept in run.json nor taken from one.
OF_THE_CALL = ("calibration", "debug", "output", "repeat", "resume", "update")
# A repeated run keeps the thresholds that it had, unless one of these is given.
OF_THRESHOLDS = ("budget", "calibration")
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
MULTIPLE = "pixels, a multiple of 8, with Stable Diffusion 3 of 16 (default: the model's)"
OF_STEPS = f"of {DEFAULT_STEPS} steps, of others as large a share"
DEFAULTS: dict[str, Any] = {
    **asdict(Tempering()),
    **asdict(Models()),
    **dict.fromkeys((*DEFAULT_WAY, "max_cost")),
    **dict.fromkeys(("budget", "regions")),
    "prompts": None,
    "prompts_file": None,
    "lora": [],
    "seed": 2024,
    "cycles": 4,
    "batch": None,
    "judge": None,
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
        "prompts": (
            {**TEXT, "nargs": "+"},
            f"one prompt a subject (default: {' '.join(map(repr, PROMPTS))})",
        ),
        "joiner": (TEXT, "stands between the subjects in the prompt (default: %(default)r)"),
        "negative_prompt": (TEXT, "what to keep out of the picture"),
        "layout": (
            {"choices": LAYOUTS},
            "joint: all subjects by one prompt; regions: each by its own, in a part of the picture "
            f"that is its alone; auto: joint, and regions for what does not come, with {CROWD} "
            "subjects or more regions at once where the budget pays for them",
        ),
        "regions": (
            {"metavar": "L,T,R,B", "nargs": "+"},
            "a box for each prompt, in fractions of the picture (left, top, right, bottom; where "
            "boxes overlap, the later one is in front), or one grey or palette PNG with a 1 where "
            "the first is to be, a 2 for the second, 0 elsewhere (default: they are found)",
        ),
        "background_prompt": (
            TEXT,
            "what is around the regions, which are then painted from the start (default: a plain "
            "light ground)",
        ),
        "window": (
            X,
            "share of the picture's sides that the denoiser sees around a region, 0..1; of less "
            "than the model was trained with it makes little",
        ),
        "harmonise": (
            N,
            "the last steps, in which regions are denoised as one picture, by the background's "
            "prompt or by none, 0..steps - stoptime; not verified on Stable Diffusion",
        ),
        "seed": (N, f"0..{MAX_SEED}; same start on every device"),
        "height": (N, MULTIPLE),
        "width": (N, MULTIPLE),
    },
    "tempering": {
        "steps": (N, "denoising steps"),
        "stoptime": (
            N,
            "interrupt after this many steps and look, 1..steps "
            f"(default: {DEFAULT_WAY['stoptime']} {OF_STEPS})",
        ),
        "backsteps": (
            N,
            "go back by this many steps, 0..stoptime "
            f"(default: {DEFAULT_WAY['backsteps']} {OF_STEPS}, stoptime at most)",
        ),
        "k": (X, "how fast uncertainty turns into fresh noise; 0 adds none"),
        "uncertainty": (
            {"choices": UNCERTAINTIES},
            "what fresh noise follows: each class's uncertainty or each pixel's own",
        ),
        "background": (X, "uncertainty of pixels of no class, in the worst class's, 0..1"),
        "cfg_rescale": (X, "fresh noise in tenths of what the schedule expects"),
        "budget": (
            X,
            "what a picture may cost on average, in plain pictures: how good is good enough "
            f"follows from it (default: {DEFAULT_BUDGET}; from {CROWD} subjects on "
            f"{CROWDED_BUDGET:g})",
        ),
        "max_cost": (
            X,
            "what no picture passes, in plain pictures: no round begins that could (default: "
            f"{DEFAULT_MOST} times the budget)",
        ),
        "calibration": (
            {**FOLDER, "metavar": "FOLDER_OR_FILE"},
            "an evaluation of the same model, CLIPSeg and sampler, or its calibration.json: its "
            "energies turn the budget into thresholds",
        ),
        "rounds": (
            N,
            "times to go back, look again and keep the better; 1 does not look again (default: as "
            "many as --max_cost pays for)",
        ),
        "accept": (
            X,
            "with rounds: an energy that is low enough to stop at (default: what the budget pays "
            "for)",
        ),
        "early_look": (
            N,
            "with rounds: look after this many steps, too; 0 does not "
            f"(default: {DEFAULT_WAY['early_look']} {OF_STEPS})",
        ),
        "early_accept": (
            X,
            "with rounds: above this energy a picture goes no further than the early look "
            "(default: what the budget pays for)",
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
        "mirror": (
            {**EITHER, "default": True},
            "with rounds: CLIPSeg sees the mirror image, too, and the worse of both counts "
            "(default: on)",
        ),
        "threshold": (P, "a pixel below this probability belongs to no class"),
        "preview": (
            {"choices": PREVIEWS},
            "how the interrupted latents become a picture for CLIPSeg: by a tiny decoder (taesd, "
            "fetched with the model), by the VAE, by either on half the side (taesd-half, half), "
            "or by a linear map, in which CLIPSeg sees little: on the pocket 2.5 times the U-Net "
            "calls for fewer good pictures; auto is taesd-half where the tiny decoder is there, "
            "else half, below 512 pixels taesd or vae; none of taesd, taesd-half and half is "
            "verified on Stable Diffusion itself",
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
            {"action": "append", "metavar": "NAME[:WEIGHT]"},
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
        "backend": (
            {"choices": BACKENDS},
            "what runs denoiser, VAE and CLIPSeg; openvino, for CPUs, is faster with some models "
            "and machines: it converts them once, keeps them in the user's cache, and needs "
            f"{loaders.OPENVINO_REQUIREMENTS}",
        ),
        "compile": (
            EITHER,
            "let torch compile the denoiser: minutes at the start of every run, so for long "
            "evaluations; what it gains is not measured, and it is not verified on GPUs",
        ),
        "offload": (
            NAME,
            "model or sequential: keep only that part of Stable Diffusion in GPU memory which "
            "runs; slower",
        ),
    },
    "results": {
        "output": (FOLDER, "a folder a run is made in it"),
        "compare": (EITHER, "make the plain picture of the same seed too"),
        "repeat": (
            {**FOLDER, "metavar": "RUN.JSON"},
            "take every flag that is not given from an earlier run",
        ),
    },
    "evaluations": {
        "prompts_file": (
            {"type": prompts.lasting, "metavar": "FILE_OR_NAME"},
            "many prompts: a file with a prompt a line, its subjects separated by |, [name] heads "
            f"of subsets and # comments; or {', '.join(prompts.names())}",
        ),
        "cycles": (N, "seeds of each prompt: seed, seed + 1, ..."),
        "batch": (
            N,
            "pictures that share every U-Net call (default: 1 on the cpu, on a GPU what "
            "its free memory has room for)",
        ),
        "judge": (
            {**NAME, "nargs": "+"},
            f"{', '.join(JUDGES)} or {NOBODY}: who says of the finished pictures whether they are "
            f"all OK (default: pocket with the pocket, else {NOBODY})",
        ),
        "resume": (FOLDER, "go on with an interrupted evaluation, or judge a finished one"),
    },
}


OPTIONS = {name: options for flags in FLAGS.values() for name, (options, _) in flags.items()}
Arguments = dict[str, Any]  # by the names of the flags


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{' '.join(message.split())} (see --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, 1 (failed at run time), 2 (bad input) or 130 (Ctrl-C)."""
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        try:
            prepare_streams()
            run(words)
        finally:
            flush_results()
    except (KeyboardInterrupt, Exception) as error:
        # Libraries that are interrupted while they are imported raise whatever comes of it.
        if heeded or isinstance(error, KeyboardInterrupt):
            print("interrupted", file=sys.stderr)
            return 130
        if "--debug" in words:
            traceback.print_exc()
        print(f"error: {in_a_line(error)}", file=sys.stderr)
        return error.exit_code if isinstance(error, TemperingError) else 1
    return 0


def prepare_streams() -> None:
    """Closed streams lead nowhere; others show as escapes what their encoding does not have."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def flush_results() -> None:
    """Raise ResourceError where nobody reads stdout any more, or it is on a full disk."""
    try:
        sys.stdout.flush()
    except OSError as error:
        # Python would try again at its end, and complain in words of its own.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise ResourceError(unheard(error)) from error


def unheard(error: OSError) -> str:
    return f"can not write to standard output ({error.strerror})"


def in_a_line(error: Exception) -> str:
    """What an error says to the user."""
    if isinstance(error, TemperingError):
        return str(error)
    # Of stdout, without a buffer or with a full one: what is meant for the disk has a file's name.
    if isinstance(error, OSError) and error.errno in UNHEARD and error.filename is None:
        return unheard(error)
    first = (str(error).splitlines() or [""])[0]
    return f"unexpected {type(error).__name__}: {first} (--debug shows where)"


def run(words: Sequence[str]) -> None:
    """Check everything that needs no model, then import and run the flow."""
    args = parse(words)
    flow = chosen_flow(args)
    if flow == "update":
        sys.exit(subprocess.call([sys.executable, str(INIT), "--update"]))
    request = to_request(args)
    with importing():
        flow_module = importlib.import_module(MODULES[flow])
    with memory_errors():
        flow_module.run(request)


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The arguments; those of an earlier run (--repeat, --resume) stand in for flags not given."""
    whole, blank = vars(parser().parse_args(words)), parser()
    blank.set_defaults(**dict.fromkeys(whole))
    typed = vars(blank.parse_args(words))
    given = {name: value for name, value in typed.items() if value is not None}
    check_working_directory()
    stored: Arguments = {}
    limits: Energies | None = None
    if "repeat" in given and "resume" in given:
        raise InputError("--repeat and --resume exclude each other, got both")
    if "repeat" in given:
        stored = follow_steps(stored_arguments(given["repeat"]), given)
        if given.keys().isdisjoint(OF_THRESHOLDS):
            limits = stored_limits(given["repeat"])
    if "resume" in given:
        stored = resumed_arguments(given["resume"], given)
        limits = stored_limits(given["resume"] / "run.json") if stored else None
        given = {**given, "judge": more_judges(stored.get("judge"), given.get("judge"))}
    blind = "resume" in given and not stored
    if not given.keys().isdisjoint(FLOWS):
        stored = {name: value for name, value in stored.items() if name not in FLOWS}
    if {"prompts", "prompts_file"} <= given.keys():
        raise InputError("--prompts and --prompts_file exclude each other, got both")
    for one, other in (("prompts", "prompts_file"), ("prompts_file", "prompts")):
        if one in given:
            stored = {**stored, other: None}
    return argparse.Namespace(**{**whole, **stored, **given}, blind=blind, limits=limits)


def check_working_directory() -> None:
    """Raise InputError where it was deleted: no relative path means anything there."""
    try:
        Path.cwd()
    except OSError as error:
        raise InputError("the working directory must exist, this one was deleted") from error


def stored_arguments(path: Path) -> Arguments:
    """The flags of an earlier run that belong to its picture, from its run.json, as if typed.

    Raises InputError for a file that is none, and for a value that its flag would not take.
    """
    try:
        stored = read_json(path).get("arguments")
        if not isinstance(stored, dict):
            raise InputError("it holds no arguments")
        names = [name for name in OPTIONS if name in stored and name not in OF_THE_CALL]
        reader = parser()
        return {name: as_typed(reader, name, stored[name]) for name in names}
    except InputError as error:
        raise InputError(f"needs the run.json of an earlier run, got {path}: {error}") from error


def stored_limits(path: Path) -> Energies | None:
    """The thresholds that an earlier run was given by a sample, from its run.json; else None."""
    stored = read_json(path).get("thresholds")
    reader = parser()
    try:
        if not isinstance(stored, dict) or stored.get("calibrated") is not True:
            return None
        found = [stored.get(name) for name in THRESHOLDS]
        if None in found:
            return None
        last, early = (
            as_typed(reader, name, value) for name, value in zip(THRESHOLDS, found, strict=True)
        )
        Tempering(accept=last, early_accept=early)
    except InputError as error:
        raise InputError(f"needs the run.json of an earlier run, got {path}: {error}") from error
    return Energies(early=early, last=last)


def as_typed(reader: Parser, name: str, value: object) -> Any:
    """A stored value as its flag would give it. Raises InputError for what it would not take."""
    options = OPTIONS[name]
    if value is None and DEFAULTS.get(name, ...) is None:
        return None
    if "nargs" in options or options.get("action") == "append":
        fits = isinstance(value, list) and all(isinstance(each, str) for each in value)
        kind = "a list of texts"
    elif "action" in options:
        kind, fits = "true or false", isinstance(value, bool)
    elif "type" in options:
        kind, fits = "a number", type(value) in (int, float, str)
    else:
        kind, fits = "a text", isinstance(value, str)
    if not fits:
        shown = textwrap.shorten(repr(value), 60, placeholder=" ...")
        raise InputError(f"{name} must be {kind}, got {shown}")
    if "action" in options or "nargs" in options:
        return value
    return getattr(reader.parse_args([f"--{name}={value}"]), name)


def follow_steps(stored: Arguments, given: Arguments) -> Arguments:
    """The stored flags; where other steps are given, those that follow them keep their share.

    What follows from the budget does not outlive another one.
    """
    if "budget" in given:
        stored = {**stored, "max_cost": None}
    before, now = stored.get("steps"), given.get("steps")
    if not (before and now):
        return stored
    following = [name for name in DEFAULT_WAY if stored.get(name) is not None]
    return {**stored, **{name: in_proportion(stored[name], before, now) for name in following}}


def resumed_arguments(folder: Path, given: Arguments) -> Arguments:
    """The flags of the evaluation in `folder`, which must stay as they are.

    None where its run.json is damaged but all of them are given: the cycles tell whether they are.
    """
    try:
        stored = stored_arguments(folder / "run.json")
    except InputError as error:
        try:
            worth = any(folder.glob("cycles*.jsonl"))
        except OSError:  # a name that no folder can have
            worth = False
        if not worth:
            raise
        if "evaluate" in given:
            return {}
        raise InputError(
            f"{error}; --resume goes on without it where all flags of the first call are given "
            "again, --evaluate among them"
        ) from error
    if not stored.get("evaluate") or "tempered_inference" in given:
        raise InputError(f"--resume must name the folder of an evaluation, got {folder}")
    for name, value in stored.items():
        if name not in FREE_ON_RESUME and given.get(name, value) != value:
            raise InputError(f"--resume must keep the run's own --{name} {value!r}")
    return stored


def more_judges(stored: list[str] | None, given: list[str] | None) -> list[str] | None:
    """The judges of a resumed evaluation: its own, and those that this call adds."""
    if not given or NOBODY in given:
        return given or stored
    return list(dict.fromkeys([*(name for name in stored or [] if name != NOBODY), *given]))


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
    given = {field.name: getattr(args, field.name) for field in fields(Tempering)}
    settings = Tempering(**{**given, "regions": args.regions and layouts.read(args.regions)})
    if args.prompts_file and not args.evaluate:
        raise InputError("--prompts_file is for --evaluate, got it without")
    asked = asked_set(args)
    if asked:
        args.prompts = None
    elif args.prompts is None:
        args.prompts = list(PROMPTS)
    kept = {"lora": tuple(args.lora), "regions": layouts.lasting(args.regions)}
    values = {**vars(args), **asdict(settings), **kept}
    request = Request(
        prompts=tuple(asked[0].subjects if asked else args.prompts),
        settings=settings,
        models=Models(**{field.name: values[field.name] for field in fields(Models)}),
        seed=args.seed,
        output=args.output,
        begun=datetime.now(),
        arguments={
            name: value
            for name, value in values.items()
            if name in OPTIONS and name not in OF_THE_CALL
        },
        compare=args.compare,
        evaluate=args.evaluate,
        cycles=args.cycles,
        prompt_set=asked,
        set_name=encodable(Path(args.prompts_file).stem) if asked else None,
        batch=args.batch,
        judges=None if args.judge is None else tuple(args.judge),
        calibration=args.calibration,
        limits=args.limits,
        resume=args.resume,
        blind=args.blind,
    )
    check_models(request.models, settings)
    if args.calibration:
        calibration.load(args.calibration).check(known_origin(request), args.calibration)
    check_writable(args.resume or args.output)
    return request


def known_origin(request: Request) -> calibration.Origin:
    """What can be told of a run's energies before its models are loaded."""
    settings = asdict(request.settings)
    names = settings.keys() & calibration.NAMES.keys()
    of_the_model = {n for n in ("guidance_scale", "height", "width") if settings[n] is None}
    of_the_model |= {"preview"} if settings["preview"] == AUTO else set()
    found = {name: settings[name] for name in names - of_the_model}
    found["regions"] = layouts.told(request.settings.regions)
    if request.models.scheduler is not None:
        found["scheduler"] = loaders.scheduler_name(request.models.scheduler)
    return {**found, "early_look": request.settings.looks[0]}


def asked_set(args: argparse.Namespace) -> tuple[prompts.Prompt, ...]:
    """The prompt set of an evaluation; of a resumed one as it was, whatever became of its file."""
    if not args.prompts_file:
        return ()
    kept = args.resume and args.resume / prompts.KEPT
    return tuple(
        prompts.load(str(kept) if kept and kept.exists() else args.prompts_file, args.joiner)
    )


def check_models(models: Models, settings: Tempering) -> None:
    """Raise InputError for names that can not mean a model or a scheduler.

    Of a model on this machine for settings, too, that its family does not do.
    """
    if models.scheduler is not None:
        loaders.scheduler_name(models.scheduler)
    loaders.check_backend(models.backend, compiled=models.compile)
    sizes = settings.height, settings.width
    admit = loaders.admission(models.scheduler, models.prediction_type, sizes)
    for name, kind, fits in (
        (models.model, kinds.MODEL if models.t5 else kinds.MODEL.bare, admit),
        (models.clipseg, kinds.SEGMENTER, hub.anything),
        (models.vae, kinds.VAE, hub.anything),
    ):
        if name is not None:
            hub.check(name, kind, fits)
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


heeded: list[int] = []  # the signals that have ended this process


def heed_signals() -> None:
    """Let what ends a job (docker stop, slurm, torchrun, a closed terminal) do as Ctrl-C does."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) != signal.SIG_IGN:  # nohup's stays
            signal.signal(number, interrupt)
    sys.unraisablehook = interrupt_again


def interrupt(number: int, frame: object) -> None:
    """Raise KeyboardInterrupt; others than Ctrl-C once, for launchers send them several times."""
    if number == signal.SIGINT or number not in heeded:
        heeded.append(number)
        raise KeyboardInterrupt


def interrupt_again(ignored: Any) -> None:
    """Repeat a signal that came while Python tidied up, where whatever is raised is ignored."""
    if heeded and ignored.exc_type is KeyboardInterrupt:
        threading.Timer(0.1, repeat, [heeded.pop()]).start()
    else:
        sys.__unraisablehook__(ignored)


def repeat(number: int) -> None:
    """Send this process's first thread a signal."""
    if os.name == "nt":
        _thread.interrupt_main(signal.Signals(number))
    else:  # which wakes it, too, where it waits
        signal.pthread_kill(threading.main_thread().ident or 0, number)


def leave(code: int) -> NoReturn:
    """End the process; an interrupted one at once: Python would wait for a download's threads."""
    if code == 130:
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    heed_signals()
    leave(main())
