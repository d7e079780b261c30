"""Everything a user can set, checked; light to import, so that bad input fails at once."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import layouts
from budget import Energies
from errors import InputError
from layouts import LAYOUTS, Box, Labels
from prompts import Prompt

VERSION = "0.1.0"
# torch's CPU generator keeps 32 bits of a seed: larger ones would repeat smaller ones' pictures.
MAX_SEED = 2**32 - 1
MAX_STEPS = 1000  # Stable Diffusion's training schedule; no scheduler can take more
MAX_CANDIDATES = 1000  # all of a round are in memory together
MAX_CYCLES = 1_000_000  # of all prompts; what is done of them is known by a list
AUTO = "auto"  # of the previews: the best that there is
BY_TAESD = ("taesd", "taesd-half")  # those that need a tiny decoder
PREVIEWS = (AUTO, *BY_TAESD, "vae", "half", "linear")
UNCERTAINTIES = ("class", "pixel")
JUDGES = ("pocket", "owlv2", "blip-vqa")
NOBODY = "none"  # of the judges
BACKENDS = ("torch", "openvino")
PREDICTION_TYPES = ("epsilon", "v_prediction")
# Every Stable Diffusion v1 VAE shrinks by 8, and diffusers' own pipeline asks for multiples of 8.
SIZE_FACTOR = 8
# What may differ when an evaluation is resumed; anything else would mix two experiments.
FREE_ON_RESUME = ("batch", "cycles", "device", "judge", "offload", "offline")
DEFAULT_STEPS = 20
# Where a picture of so many steps is tempered; of other numbers these are the same shares.
DEFAULT_WAY = {"stoptime": 15, "backsteps": 12, "early_look": 6}
# The default of these: it follows from the steps. Typed as the number that it becomes.
IN_PROPORTION: Any = None
# The default of the budget, and what it becomes: with a crowd every subject has a region at once.
OF_THE_SUBJECTS: Any = None
DEFAULT_BUDGET, CROWDED_BUDGET = 1.3, 3.0
CROWD = 4
# The default of what follows from the budget, and how many times it that is.
OF_THE_BUDGET: Any = None
DEFAULT_MOST = 3
# The default of what belongs to the model's family. Typed as what it becomes once that is known.
OF_THE_FAMILY: Any = None


@dataclass(frozen=True)
class Tempering:
    """How a picture is denoised and tempered. Raises InputError for a value out of its range."""

    steps: int = DEFAULT_STEPS  # denoising steps of a plain picture, 1..1000
    stoptime: int = IN_PROPORTION  # interrupt after this many steps, 1..steps
    backsteps: int = IN_PROPORTION  # go back by this many steps, 0..stoptime
    k: float = 4.0  # how fast uncertainty turns into fresh noise, >= 0; 0 adds none
    cfg_rescale: float = 10.0  # fresh noise in tenths of what the schedule expects, >= 0
    # Costs are in plain pictures of the same sampler, counted in evaluations of the denoiser.
    budget: float = OF_THE_SUBJECTS  # with rounds: what a picture costs on average, >= 1
    max_cost: float = OF_THE_BUDGET  # what no picture passes, >= 1: no round begins that could
    # Of going back, looking and deciding; None: as many as max_cost pays for; 1 goes back once, and
    # takes what comes.
    rounds: int | None = None
    early_look: int = IN_PROPORTION  # with rounds: a look after so many, too; >= stoptime is none
    # Energies; None: what the budget pays for (budget.py).
    accept: float | None = None  # with rounds: a picture of this energy or less is good enough
    early_accept: float | None = None  # with rounds: above it a picture goes no further than that
    temperature: float = 0.0  # with rounds: what a worse picture may cost and still be kept
    cooling: float = 1.0  # with rounds: each goes back so many times as far as the last, 0..1
    candidates: int = 1  # with rounds: pictures a round, of which the best is proposed
    uncertainty: str = "class"  # what gamma follows: a class's uncertainty, or each pixel's own
    background: float = 1.0  # uncertainty of unclassified pixels, in the worst class's, 0..1
    # Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598); 1 or less is none.
    guidance_scale: float = OF_THE_FAMILY
    negative_prompt: str = ""
    joiner: str = " next to "  # stands between the prompts in the joined prompt
    # joint: all subjects by one prompt; regions: each alone in its own; auto: joint, then regions
    # for what fails, or regions at once for as many subjects as no model paints together.
    layout: str = "auto"
    regions: tuple[Box, ...] | Labels | None = None  # one a prompt; None: they are found
    background_prompt: str = ""  # of what is around regions; empty: it is plain
    window: float = 0.75  # of the picture's sides the denoiser sees around a region, 0..1
    harmonise: int = 0  # the last steps, in which regions are denoised as one picture, 0..steps
    look_guidance: float = 2.0  # of the x0 that CLIPSeg sees, at most guidance_scale
    mirror: bool = True  # with rounds: whether CLIPSeg sees the mirror image, too
    threshold: float = 0.1  # a pixel below this probability belongs to no class, 0..1
    preview: str = AUTO  # how the interrupted latents become a picture for CLIPSeg
    height: int | None = None  # pixels; None is the model's own size
    width: int | None = None

    def __post_init__(self) -> None:
        _whole("steps", self.steps, 1, MAX_STEPS, " (the steps of the model's own schedule)")
        self._follow_steps("stoptime", self.steps)
        _whole("stoptime", self.stoptime, 1, self.steps, " (the number of steps)")
        self._follow_steps("backsteps", self.stoptime)
        _whole("backsteps", self.backsteps, 0, self.stoptime, " (the stoptime)")
        _real("k", self.k, 0, math.inf)
        _real("cfg_rescale", self.cfg_rescale, 0, math.inf)
        if self.budget is not OF_THE_SUBJECTS:
            _real("budget", self.budget, 1, math.inf)
            if self.max_cost is OF_THE_BUDGET:
                object.__setattr__(self, "max_cost", DEFAULT_MOST * self.budget)
        if self.max_cost is not OF_THE_BUDGET:
            _real("max_cost", self.max_cost, 1, math.inf)
        if self.rounds is not None:
            _whole("rounds", self.rounds, 1, None)
        self._follow_steps("early_look", self.steps)
        _whole("early_look", self.early_look, 0, None)
        for name in ("accept", "early_accept"):
            if getattr(self, name) is not None:
                _real(name, getattr(self, name), 0, math.inf)
        _real("temperature", self.temperature, 0, math.inf)
        _real("cooling", self.cooling, 0, 1)
        _whole("candidates", self.candidates, 1, MAX_CANDIDATES)
        _choice("uncertainty", self.uncertainty, UNCERTAINTIES)
        _real("background", self.background, 0, 1)
        if self.guidance_scale is not OF_THE_FAMILY:
            _real("guidance_scale", self.guidance_scale, 0, math.inf)
        _choice("layout", self.layout, LAYOUTS)
        if self.layout == "joint" and self.regions:
            raise InputError("layout must be auto or regions where regions are given, got 'joint'")
        _text("background_prompt", self.background_prompt)
        _real("window", self.window, 0, 1)
        _whole(
            "harmonise",
            self.harmonise,
            0,
            self.steps - self.stoptime,
            " (those after the stoptime)",
        )
        _real("look_guidance", self.look_guidance, 0, math.inf)
        _real("threshold", self.threshold, 0, 1)
        if not isinstance(self.mirror, bool):
            raise InputError(f"mirror must be True or False, got {self.mirror!r}")
        _choice("preview", self.preview, PREVIEWS)
        _text("negative_prompt", self.negative_prompt)
        _text("joiner", self.joiner)
        for name in ("height", "width"):
            _size(name, getattr(self, name))

    def _follow_steps(self, name: str, most: int) -> None:
        if getattr(self, name) is IN_PROPORTION:
            value = min(most, in_proportion(DEFAULT_WAY[name], DEFAULT_STEPS, self.steps))
            object.__setattr__(self, name, value)  # how a frozen dataclass completes itself

    def of_subjects(self, count: int) -> Tempering:
        """The same with what follows from the number of subjects in a picture.

        Raises InputError for regions that are not as many.
        """
        layouts.check(self.regions, count)
        if self.budget is not OF_THE_SUBJECTS:
            return self
        crowded = count >= CROWD and self.layout != "joint"
        return replace(self, budget=CROWDED_BUDGET if crowded else DEFAULT_BUDGET)

    @property
    def annealed(self) -> bool:
        """Whether what comes of a round is looked at: not so of the seed's single one."""
        return self.rounds != 1

    @property
    def looks(self) -> tuple[int, ...]:
        """The steps after which CLIPSeg looks, ascending; the last is `stoptime`."""
        early = self.annealed and 0 < self.early_look < self.stoptime
        return (self.early_look, self.stoptime) if early else (self.stoptime,)


@dataclass(frozen=True)
class Models:
    """Which models, where, and how they are loaded; `loaders` gives the values their meaning."""

    model: str | None = None  # None: Stable Diffusion v1-4, or the pocket where it can not be had
    clipseg: str | None = None  # None: the one that belongs to the model
    vae: str | None = None  # None: the model's own
    lora: tuple[str, ...] = ()  # of each a name, or a name and its weight behind a colon
    t5: bool = True  # whether Stable Diffusion 3 reads with it, where it is there
    scheduler: str | None = None  # None: Euler's, or LCM's where the model was distilled to it
    prediction_type: str | None = None  # None: what the model's configuration says
    device: str | None = None  # None: the best one present
    dtype: str | None = None  # None: what the device computes fastest
    offload: str | None = None
    backend: str = "torch"  # what runs the networks that take the time
    compile: bool = False  # whether torch compiles the denoiser
    offline: bool = False


@dataclass(frozen=True)
class Request:
    """One run of the program: what to paint, with which models, and where it goes."""

    prompts: tuple[str, ...]
    settings: Tempering
    models: Models
    seed: int
    output: Path
    begun: datetime
    arguments: Mapping[str, object]  # the flags, as a later run repeats them
    compare: bool = False
    evaluate: bool = False
    cycles: int = 1
    prompt_set: tuple[Prompt, ...] = ()  # of an evaluation; empty: `prompts` alone
    set_name: str | None = None
    batch: int | None = None  # pictures that share U-Net calls; None: what the device has room for
    judges: tuple[str, ...] | None = None  # None: the one that belongs to the model
    calibration: Path | None = None  # where a sample of energies is
    limits: Energies | None = None  # the thresholds of the run that is repeated
    resume: Path | None = None
    blind: bool = False  # resumed by flags alone, since its run.json is damaged

    def __post_init__(self) -> None:
        check_prompts(self.prompts)
        counts = {len(each.subjects) for each in self.all_prompts}
        for count in sorted(counts):
            completed = self.settings.of_subjects(count)
        object.__setattr__(self, "settings", completed)  # by the most subjects of a prompt
        prompts = len(self.all_prompts)
        each = f" ({MAX_CYCLES} in all, of {prompts} prompts)" * (prompts > 1)
        _whole("cycles", self.cycles, 1, MAX_CYCLES // prompts, each)
        if self.batch is not None:
            _whole("batch", self.batch, 1, None)
        for judge in self.judges or ():
            _choice("judge", judge, (*JUDGES, NOBODY))
        if NOBODY in (self.judges or ()) and self.judges != (NOBODY,):
            raise InputError(f"judge {NOBODY} must stand alone, got {' '.join(self.judges or ())}")
        more = self.cycles - 1 if self.evaluate else 0
        _whole("seed", self.seed, 0, MAX_SEED - more, f" (with {more} seeds after it)" * (more > 0))

    @property
    def prompt(self) -> str:
        """The joined prompt."""
        return self.settings.joiner.join(self.prompts)

    @property
    def all_prompts(self) -> tuple[Prompt, ...]:
        """What an evaluation paints: its prompt set, or the one prompt."""
        return self.prompt_set or (Prompt(self.prompts, self.settings.joiner),)

    @property
    def title(self) -> str:
        """What to call the run."""
        return self.set_name or self.prompt


def in_proportion(part: int, whole: int, steps: int) -> int:
    """As large a share of `steps` as `part` is of `whole`, in whole steps."""
    return round(part * steps / whole)


def check_prompts(prompts: Sequence[str]) -> None:
    """Raise InputError unless there is a prompt and none is empty."""
    if isinstance(prompts, str):
        raise InputError(f"prompts must be a sequence of texts, got one text {prompts!r}")
    if not prompts:
        raise InputError("prompts must name at least one subject, got none")
    for number, prompt in enumerate(prompts, start=1):
        _text(f"prompt {number}", prompt)
        if not prompt.strip():
            raise InputError(f"prompt {number} must not be empty, got {prompt!r}")


def _whole(name: str, value: int, low: int, high: int | None, what: str = "") -> None:
    wrong_type = isinstance(value, bool) or not isinstance(value, int)
    largest = sys.maxsize if high is None else high  # what a range can count to
    if wrong_type or not low <= value <= largest:
        open_end = high is None and (wrong_type or value < low)
        span = f"of at least {low}" if open_end else f"in {low}..{largest}{what}"
        raise InputError(f"{name} must be a whole number {span}, got {value!r}")


def _real(name: str, value: float, low: float, high: float) -> None:
    wrong_type = isinstance(value, bool) or not isinstance(value, (int, float))
    if wrong_type or not low <= value <= min(high, sys.float_info.max):  # false for NaN, too
        span = f"of at least {low}" if high == math.inf else f"in {low}..{high}"
        raise InputError(f"{name} must be a finite number {span}, got {value!r}")


def _text(name: str, value: str) -> None:
    """Raise InputError for no text, or for bytes that are none in the terminal's encoding."""
    try:
        value.encode()
    except (AttributeError, UnicodeEncodeError) as error:
        raise InputError(f"{name} must be a text in UTF-8, got {value!r}") from error


def _choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise InputError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _size(name: str, value: int | None) -> None:
    if value is None:
        return
    wrong_type = isinstance(value, bool) or not isinstance(value, int)
    if wrong_type or value < SIZE_FACTOR or value % SIZE_FACTOR or value > sys.maxsize:
        raise InputError(f"{name} must be a multiple of {SIZE_FACTOR} pixels, got {value!r}")
