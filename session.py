"""What both flows share: the models of one run, and how the run is described on disk."""

from __future__ import annotations

import math
import platform
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import calibration
import layouts
import outputs
from budget import THRESHOLDS, Sample
from calibration import NAMES, Origin
from errors import blaming
from families import Reader, family_of
from hub import POCKET
from loaders import (
    SAMPLER_NAMES,
    clipseg_for,
    load_clipseg,
    load_pipeline,
    model_name,
    scheduler_of,
)
from loras import Lora, locate, parsed
from sampling import Progress
from settings import VERSION, Request
from tempering import Painter

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image

    from segmentation import ClipSeg

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft", "numpy", "scipy")
# The settings that a tempered picture's text names; the second ones mean something in rounds only.
OF_A_ROUND = (
    "stoptime",
    "backsteps",
    "k",
    "cfg_rescale",
    "uncertainty",
    "background",
    "rounds",
)
OF_REGIONS = ("layout", "window", "harmonise")
OF_ROUNDS = (
    *THRESHOLDS,
    "budget",
    "max_cost",
    "temperature",
    "cooling",
    "candidates",
)
LONGEST_CUT = 60  # characters of a cut prompt that a warning shows


@dataclass(frozen=True)
class Session:
    """One run: the request, a painter ready to paint it, and what stood in for what."""

    request: Request
    painter: Painter
    model: str  # the name of the model that really runs
    clipseg: str
    loras: tuple[Lora, ...]
    notice: str | None  # why another model than the default runs

    @property
    def pipe(self) -> DiffusionPipeline:
        return self.painter.pipe

    @property
    def dtype(self) -> str:
        return str(self.painter.sampler.family.denoiser.dtype).removeprefix("torch.")

    @property
    def origin(self) -> Origin:
        """What the energies of this run's pictures belong to."""
        settings, models = self.painter.settings, self.request.models
        height, width = self.painter.sampler.shape[2:]
        factor = self.pipe.vae_scale_factor
        return {
            **{name: getattr(settings, name) for name in NAMES if hasattr(settings, name)},
            "early_look": settings.looks[0],
            "regions": layouts.told(settings.regions),
            "apart": self.painter.apart,
            "preview": self.painter.sampler.preview_by,
            "model": self.model,
            "vae": shown(models.vae) if models.vae else None,
            "lora": [f"{lora.name}:{lora.weight:g}" for lora in self.loras],
            "clipseg": self.clipseg,
            "scheduler": scheduler_of(self.pipe),
            "height": height * factor,
            "width": width * factor,
        }

    @property
    def thresholds(self) -> dict[str, float | bool]:
        """The energies to stop at, by their flags, and whether a sample or a hand has given them.

        None for a single round.
        """
        if not self.painter.settings.annealed:
            return {}
        limits = self.painter.limits
        return {
            **dict(zip(THRESHOLDS, (limits.last, limits.early), strict=True)),
            "calibrated": self.painter.calibrated,
        }

    def calibrated(self, sample: Sample) -> Session:
        """The same run with thresholds that meet its budget, where they were not given."""
        return replace(self, painter=self.painter.accepting(self.painter.sought(sample)))

    @property
    def of_the_backend(self) -> list[str]:
        """The packages that run the networks beside torch."""
        return [] if self.request.models.backend == "torch" else [self.request.models.backend]

    def painter_of(self, prompts: Sequence[Sequence[str]], joiner: str) -> Painter:
        """A painter like this run's, of other prompts."""
        settings = replace(self.painter.settings, joiner=joiner)
        limits = self.painter.limits if self.painter.calibrated else None
        return Painter(self.pipe, self.painter.clipseg, prompts, settings, limits)

    def parameters(self, image: Image, seed: int, name: str, prompt: str | None = None) -> str:
        """AUTOMATIC1111's `parameters` text of one picture of this run.

        `name` is "plain", "tempered", or what else it shows of the way to the tempered picture
        `image`; `prompt` is its text, where it is not that of the request.
        """
        settings = self.painter.settings
        names = (*OF_A_ROUND, *(OF_ROUNDS if settings.annealed else ()))
        values = {name: getattr(settings, name) for name in names}
        values |= {name: self.thresholds[name] for name in THRESHOLDS if name in names}
        if self.painter.apart or self.painter.may_turn:
            values |= {name: getattr(settings, name) for name in OF_REGIONS}
            values["background_prompt"] = settings.background_prompt or None
            values["regions"] = " ".join(layouts.told(settings.regions) or []) or None
        method = {f"Tempering {name}": value for name, value in values.items()}
        tags = [f"<lora:{lora.name}:{lora.weight:g}>" for lora in self.loras]
        hashes = [f"{lora.name}: {lora.hash}" for lora in self.loras]
        return outputs.parameters_text(
            prompt=" ".join([self.request.prompt if prompt is None else prompt, *tags]),
            negative_prompt=settings.negative_prompt,
            steps=settings.steps,
            sampler=SAMPLER_NAMES[scheduler_of(self.pipe)],
            guidance_scale=settings.guidance_scale,
            seed=seed,
            width=image.width,
            height=image.height,
            model=self.model,
            extra={
                "Lora hashes": ", ".join(hashes) or None,
                **(method if name != "plain" else {}),
                "Tempering view": name if name not in ("plain", "tempered") else None,
                "Version": f"Tempering {VERSION}",
            },
        )

    def facts(self) -> dict[str, Any]:
        """What run.json says of every run: the flags to repeat it, models, device, versions."""
        models = self.request.models
        return {
            "arguments": {
                **self.request.arguments,
                "guidance_scale": self.painter.settings.guidance_scale,
                # A repetition uses what ran, wherever it is started.
                "model": lasting(models.model) or self.model,
                "clipseg": lasting(models.clipseg) or self.clipseg,
                "vae": lasting(models.vae),
                "lora": [
                    f"{lasting(name)}:{weight:g}" for name, weight in map(parsed, models.lora)
                ],
                "scheduler": scheduler_of(self.pipe),
                "preview": self.painter.sampler.preview_by,
            },
            "thresholds": self.thresholds,
            "notice": self.notice,
            "model": self.model,
            "clipseg": self.clipseg,
            "loras": [
                {"name": lora.name, "weight": lora.weight, "hash": lora.hash} for lora in self.loras
            ],
            "pipeline": type(self.pipe).__name__,
            "text_encoders": [
                name
                for name, part in self.pipe.components.items()
                if name.startswith("text_encoder") and part is not None
            ],
            "scheduler": type(self.pipe.scheduler).__name__,
            "preview": self.painter.sampler.preview_by,
            "device": str(self.painter.sampler.family.device),
            "dtype": self.dtype,
            "backend": models.backend,
            "started": self.request.begun.isoformat(timespec="seconds"),
            "versions": {
                "tempering": VERSION,
                "python": platform.python_version(),
                **{name: version(name) for name in (*PACKAGES, *self.of_the_backend)},
            },
        }


def open_session(request: Request, device: str | None = None) -> Session:
    """Load the models that `request` names and encode its text; warns of prompts that are cut.

    `device` is this process's share where several run, and goes before the request's.
    """
    models = replace(request.models, device=device or request.models.device)
    notices: list[str] = []

    def notice(text: str) -> None:
        notices.append(text)
        say(text)

    pipe = load_pipeline(
        models.model,
        vae=models.vae,
        lora=models.lora,
        t5=models.t5,
        scheduler=models.scheduler,
        prediction_type=models.prediction_type,
        preview=request.settings.preview,
        sizes=(request.settings.height, request.settings.width),
        device=models.device,
        dtype=models.dtype,
        offload=models.offload,
        backend=models.backend,
        compiled=models.compile,
        offline=models.offline,
        notice=notice,
    )
    pipe.set_progress_bar_config(disable=True)
    clipseg_name = models.clipseg or clipseg_for(pipe)
    clipseg = load_clipseg(
        clipseg_name,
        device=models.device,
        dtype=models.dtype,
        backend=models.backend,
        offline=models.offline,
        notice=say,
    )
    with blaming("a tokenizer"):
        warn_of_cuts(pipe, clipseg, request)
    session = Session(
        request=request,
        painter=Painter(pipe, clipseg, [request.prompts], request.settings),
        model=model_name(pipe),
        clipseg=shown(clipseg_name),
        loras=tuple(locate(each, offline=True) for each in models.lora),  # they are all here now
        notice="\n".join(notices) or None,
    )
    return calibrated(session)


def calibrated(session: Session) -> Session:
    """A run with the thresholds of an earlier one, or those of a sample that fits it.

    The sample that was asked for, else the pocket's own; with none of them the run stays as it is.
    Raises InputError for a sample of other pictures.
    """
    request = session.request
    if not session.painter.settings.annealed:
        return session
    if request.limits:
        return replace(session, painter=session.painter.accepting(request.limits))
    asked = request.calibration
    if asked:
        given = calibration.load(asked)
        given.check(session.origin, asked)
        return session.calibrated(given.sample)
    own = calibration.pockets_own()
    return session.calibrated(own.sample) if own.origin == session.origin else session


def lasting(name: str | None) -> str | None:
    """A model's name that still means the same from another working directory."""
    path = Path(name or "").expanduser()
    return str(path.absolute()) if name and name != POCKET and path.exists() else name


def shown(name: str) -> str:
    """What to call a model in titles and figures: the last part of a path."""
    path = Path(name).expanduser()
    return path.name if name != POCKET and path.exists() else name


def warn_of_cuts(pipe: DiffusionPipeline, clipseg: ClipSeg, request: Request) -> None:
    """Say what of the prompts has no effect; once where two text encoders cut the same."""
    texts = [*(each.text for each in request.all_prompts), request.settings.negative_prompt]
    found = [cut for reader in family_of(pipe).readers for cut in cuts(reader, texts)]
    tokenizer = clipseg.processor.tokenizer
    looking = Reader("CLIPSeg", tokenizer, tokenizer.model_max_length)
    subjects = dict.fromkeys(subject for each in request.all_prompts for subject in each.subjects)
    for cut in dict.fromkeys([*found, *cuts(looking, list(subjects))]):
        say(f"warning: {cut}")


def cuts(reader: Reader, prompts: Sequence[str]) -> Iterator[str]:
    """Which words of `prompts` are over the length that is read, and have no effect there."""
    name, tokenizer, limit = reader
    for prompt in prompts:
        ids = tokenizer(prompt).input_ids
        if len(ids) > limit:
            cut = tokenizer.decode(ids[limit - 1 : -1])
            yield (
                f"{name} reads {limit} tokens, this prompt has {len(ids)}; "
                f"without effect: {textwrap.shorten(cut, LONGEST_CUT)!r}"
            )


def in_whole_calls(update: Callable[[int], object]) -> Progress:
    """What hears of evaluations as they come, for a bar that counts whole ones."""
    done = 0.0

    def report(calls: float) -> None:
        nonlocal done
        before, done = done, done + calls
        update(math.floor(done) - math.floor(before))

    return report


def say(text: str) -> None:
    """Tell the user something that is not a result."""
    print(text, file=sys.stderr, flush=True)
