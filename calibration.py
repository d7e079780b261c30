"""A sample of energies on disk: what it was taken of, and whose pictures it may judge.

An evaluation takes it from its own plain pictures and leaves it in its folder; single pictures of
the same model, CLIPSeg and sampler can use it from there.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import outputs
from budget import Sample, Sampled, Stop
from errors import InputError

FILE = "calibration.json"
POCKETS_OWN = Path(__file__).parent / "pocket" / FILE
FEWEST = 16  # pictures of a sample: of fewer a threshold says too little
# What decides which energies there are and what it costs to lower them, in the words of a refusal.
NAMES = {
    "model": "model",
    "vae": "VAE",
    "lora": "LoRA",
    "clipseg": "CLIPSeg",
    "scheduler": "scheduler",
    "steps": "number of steps",
    "early_look": "early look",
    "stoptime": "stoptime",
    "guidance_scale": "guidance",
    "look_guidance": "guidance of the look",
    "mirror": "use of mirror images",
    "preview": "preview",
    "height": "height",
    "width": "width",
    "backsteps": "number of backsteps",
    "k": "k",
    "uncertainty": "uncertainty",
    "background": "background",
    "threshold": "threshold of a pixel",
    "cfg_rescale": "cfg_rescale",
    "rounds": "number of rounds",
    "temperature": "temperature",
    "cooling": "cooling",
    "candidates": "number of candidates",
    "layout": "layout",
    "regions": "regions",
    "apart": "use of regions from the start",
    "background_prompt": "prompt of the background",
    "window": "window of a region",
    "harmonise": "harmonising",
}
Origin = Mapping[str, Any]  # by NAMES


@dataclass(frozen=True)
class Calibration:
    """A sample, and what it belongs to."""

    origin: Origin
    sample: Sample

    def check(self, origin: Origin, file: Path) -> None:
        """Raise InputError where pictures of `origin` have other energies, or go another way.

        What `origin` does not tell yet is not compared.
        """
        for name, what in NAMES.items():
            if name in origin and origin[name] != self.origin.get(name):
                raise InputError(
                    f"--calibration must be of the same model, CLIPSeg and sampler; the {what} of "
                    f"{file} is {told(self.origin.get(name))}, here it is {told(origin[name])}"
                )


def told(value: object) -> str:
    return "none" if value in (None, "", []) else str(value)


def save(file: Path, calibration: Calibration) -> None:
    """Raises ResourceError."""
    sample = calibration.sample
    pictures = [picture._asdict() for picture in sample.pictures]
    about = {
        "of": calibration.origin,
        "plain": sample.plain,
        "cap": sample.cap,
        "early": sample.early,
    }
    outputs.save_json(file, {**about, "pictures": pictures})


def load(place: Path) -> Calibration:
    """What is in a file, or in the folder of an evaluation. Raises InputError."""
    file = place / FILE if place.is_dir() else place
    try:
        stored = outputs.read_json(file)
        origin, pictures = stored.get("of"), stored.get("pictures")
        if not isinstance(origin, dict) or not isinstance(pictures, list):
            raise InputError("it holds no energies")
        if len(pictures) < FEWEST:
            raise InputError(f"it must hold energies of {FEWEST} pictures, got {len(pictures)}")
        plain = whole(stored.get("plain"))
        cap, early = real(stored.get("cap")), real(stored.get("early"))
        return Calibration(origin, Sample(plain, early, tuple(map(sampled, pictures)), cap))
    except InputError as error:
        raise InputError(
            f"--calibration needs the {FILE} of an evaluation, got {place}: {error}"
        ) from error


@cache
def pockets_own() -> Calibration:
    """The sample that ships with the pocket: it stands in where there is none."""
    return load(POCKETS_OWN)


# What JSON holds of a picture. All raise InputError for what is none.


def sampled(value: object) -> Sampled:
    ways = [value.get(name) for name in Sampled._fields] if isinstance(value, dict) else []
    if not ways or not all(isinstance(way, list) for way in ways) or not ways[0]:
        raise InputError(f"a picture must have {' and '.join(Sampled._fields)}, got {shown(value)}")
    return Sampled(*(tuple(map(stop, way or [])) for way in ways))


def stop(value: object) -> Stop:
    if not isinstance(value, list) or len(value) != len(Stop._fields):
        raise InputError(f"a look must have {', '.join(Stop._fields)}, got {shown(value)}")
    late, energy, cost, most = value
    if not isinstance(late, bool):
        raise InputError(f"late must be true or false, got {shown(late)}")
    return Stop(late, real(energy), calls(cost), None if most is None else calls(most))


def real(value: object) -> float:
    if type(value) in (int, float) and math.isfinite(value):  # type: ignore[arg-type]
        return float(value)  # type: ignore[arg-type]
    raise InputError(f"an energy must be a finite number, got {shown(value)}")


def calls(value: object) -> float:
    """Evaluations; those of a part of a picture count as its share."""
    if type(value) in (int, float) and 0 < value < 2**53:  # type: ignore[operator]
        return value  # type: ignore[return-value]
    raise InputError(f"a cost must be a positive number, got {shown(value)}")


def whole(value: object) -> int:
    if type(value) is int and 0 < value < 2**53:
        return value
    raise InputError(f"a cost must be a whole number of at least 1, got {shown(value)}")


def shown(value: object) -> str:
    return textwrap.shorten(repr(value), 60, placeholder=" ...")
