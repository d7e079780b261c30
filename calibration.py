"""A sample of energies on disk: what it was taken of, and whose pictures it may judge.

An evaluation takes it from its own plain pictures and leaves it in its folder; single pictures of
the same model, CLIPSeg and sampler can use it from there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import outputs
from budget import Energies
from errors import InputError

FILE = "calibration.json"
FEWEST = 16  # pictures of a sample: a quantile of fewer says too little
# What decides which energies there are, in the words of a refusal.
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
}
Origin = Mapping[str, Any]  # by NAMES


@dataclass(frozen=True)
class Sample:
    """Energies of plain pictures, and what they belong to."""

    origin: Origin
    energies: tuple[Energies, ...]

    def check(self, origin: Origin, file: Path) -> None:
        """Raise InputError where pictures of `origin` have other energies.

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


def save(file: Path, sample: Sample) -> None:
    """Raises ResourceError."""
    outputs.save_json(file, {"of": sample.origin, "energies": sample.energies})


def load(place: Path) -> Sample:
    """The sample in a file, or in the folder of an evaluation. Raises InputError."""
    file = place / FILE if place.is_dir() else place
    try:
        stored = outputs.read_json(file)
        origin, rows = stored.get("of"), stored.get("energies")
        if not isinstance(origin, dict) or not isinstance(rows, list):
            raise InputError("it holds no energies")
        found = tuple(energies_of(row) for row in rows)
        if len(found) < FEWEST:
            raise InputError(f"it must hold energies of {FEWEST} pictures, got {len(found)}")
    except InputError as error:
        raise InputError(
            f"--calibration needs the {FILE} of an evaluation, got {place}: {error}"
        ) from error
    return Sample(origin, found)


def energies_of(row: object) -> Energies:
    """One picture's energies as JSON holds them. Raises InputError for what is none."""
    if isinstance(row, list) and len(row) == len(Energies._fields):
        found = [float(each) for each in row if type(each) in (int, float) and math.isfinite(each)]
        if len(found) == len(row):
            return Energies(*found)
    raise InputError(f"energies must be two finite numbers a picture, got {row!r}"[:200])
