"""Fetch the emoji packages with npm, check their hashes and unpack the drawings that are needed."""

from __future__ import annotations

import hashlib
import io
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pocket.world import EMOJI


@dataclass(frozen=True)
class Package:
    """One npm package of emoji drawings; `pattern` is the path of a drawing inside it."""

    style: str
    name: str
    archive: str
    sha256: str
    pattern: str
    licence: str


PACKAGES = (
    Package(
        "noto",
        "emoji-datasource-google@16.0.0",
        "emoji-datasource-google-16.0.0.tgz",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        "package/img/google/64/{code}.png",
        "Apache-2.0",
    ),
    Package(
        "twemoji",
        "emoji-datasource-twitter@16.0.0",
        "emoji-datasource-twitter-16.0.0.tgz",
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
        "package/img/twitter/64/{code}.png",
        "CC-BY 4.0",
    ),
    Package(
        "fluent",
        "@lobehub/fluent-emoji-3d@1.1.0",
        "lobehub-fluent-emoji-3d-1.1.0.tgz",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        "package/assets/{code}.webp",
        "MIT",
    ),
)
STYLES = tuple(package.style for package in PACKAGES)


def drawings(folder: Path) -> dict[tuple[str, str], Image.Image]:
    """The emoji drawings by (subject, style), RGBA, 64 pixels; fetched into `folder` once."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for package in PACKAGES:
        with tarfile.open(_fetch(package, folder)) as archive:
            for subject, code in EMOJI.items():
                path = package.pattern.format(code=code)
                member = archive.extractfile(path)
                if member is None:
                    raise RuntimeError(f"{package.archive} has no file {path}")
                image = Image.open(io.BytesIO(member.read())).convert("RGBA")
                found[subject, package.style] = image.resize((64, 64), Image.Resampling.LANCZOS)
    return found


def _fetch(package: Package, folder: Path) -> Path:
    path = folder / package.archive
    if not path.exists():
        subprocess.run(["npm", "pack", "--silent", package.name], cwd=folder, check=True)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise RuntimeError(f"{path} has sha256 {digest}, expected {package.sha256}; delete it")
    return path
