"""LoRA: what the flag names, and the file that it means.

A LoRA (Hu et al. 2021, arXiv:2106.09685) is a .safetensors file with changes of low rank to a
model's weights. Nothing heavy is imported before it is needed.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import hub
from errors import InputError, ModelError, one_line
from kinds import PICKLES, WEIGHTS, Kind, Layout, Shapes, is_lora, shapes_of, text_width

FORMS = "a .safetensors file, a folder with one, a Hub id or Hub id/file, with :WEIGHT if wanted"
USUAL = "pytorch_lora_weights.safetensors"  # what diffusers calls the file
# Part of a pipeline -> names of the tensors that change it, as diffusers and kohya's scripts have.
_PARTS = {
    "unet": r"(lora_)?unet[._]",
    "transformer": r"(lora_)?transformer[._]",
    "text_encoder": r"text_encoder\.|lora_te1?_",
    "text_encoder_2": r"text_encoder_2\.|lora_te2_",
}
# Those that change how a U-Net reads the text: (rank, width of the text, ...).
_READING_TEXT = r".*attn2[._](processor\.)?to_[kv].*(lora_A|down)\.weight"
LORA = Kind(
    flag="--lora",
    title="a LoRA",
    pocket=Path(),  # there is none
    marker=("", ""),
    layouts=(),
    instead="what works without it: a .safetensors file",
)


@dataclass(frozen=True)
class Lora:
    """A LoRA on this machine."""

    name: str  # what AUTOMATIC1111 would call it
    weight: float
    file: Path

    @cached_property
    def tensors(self) -> Shapes:
        """The shapes of its tensors, by name."""
        return shapes_of(self.file) or {}

    @property
    def parts(self) -> list[str]:
        """The pipeline's parts that it changes, as far as its tensors' names tell."""
        return [
            part
            for part, pattern in _PARTS.items()
            if any(re.match(pattern, name) for name in self.tensors)
        ]

    @cached_property  # every picture tells it, and the file may have hundreds of MB
    def hash(self) -> str:
        """12 digits by which AUTOMATIC1111 knows a LoRA again: SHA-256 of all but the header."""
        with self.file.open("rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
            if known := header.get("__metadata__", {}).get("sshs_model_hash"):
                return str(known)[:12]
            digest = hashlib.sha256()
            while block := opened.read(1 << 20):
                digest.update(block)
            return digest.hexdigest()[:12]


def parsed(text: str) -> tuple[str, float]:
    """Name and weight of `NAME[:WEIGHT]`. Raises InputError for a weight that is no number."""
    name, colon, last = text.rpartition(":")
    # A name has colons of its own on Windows, C:\, and wherever a file is called so.
    if not colon or len(name) == 1 or Path(text).exists():
        return text, 1.0
    try:
        weight = float(last)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise InputError(f"--lora must have a finite number as its weight, got {text!r}")
    return name, weight


def check(text: str) -> None:
    """Raise InputError where `text` can not name a LoRA, without asking the Hub."""
    try:
        text.encode()  # safetensors opens no other path
        name, _ = parsed(text)
        path = Path(name).expanduser()
        if path.is_dir() and name:
            fault = _fault_of_names(_names_in(path))
        elif path.suffix.lower() in PICKLES:
            fault = f"is a {path.suffix} file, which can run code when it is loaded"
        elif path.is_file():
            fault = None if is_lora(shapes_of(path)) else "has no LoRA in it"
        else:
            fault = None if _on_hub(name) else "is none of them"
    except (OSError, RuntimeError, UnicodeEncodeError) as error:
        fault = f"can not be read ({one_line(error)})"
    if fault:
        raise InputError(f"--lora must be {FORMS}, but {text!r} {fault}")


def locate(text: str, offline: bool) -> Lora:
    """The LoRA that a `text` which was checked names, fetched first where need be."""
    name, weight = parsed(text)
    path = Path(name).expanduser()
    if path.is_dir():
        path = path / _chosen(_names_in(path))
    elif not path.is_file():
        path = _fetched(name, offline)
    return Lora(_title(path), weight, path)


def check_fit(lora: Lora, layout: Layout, configuration: Path) -> None:
    """Raise InputError for a LoRA of another family, as far as names and shapes tell.

    The model's are told by its layout, and by the folder that has its `configuration`.
    """
    strangers = [part for part in lora.parts if part not in layout.parts]
    own = text_width(configuration)
    reading = [shape for name, shape in lora.tensors.items() if re.match(_READING_TEXT, name)]
    widths = {shape[1] for shape in reading if len(shape) > 1}
    if strangers:
        fault = f"changes {' and '.join(strangers)}, which the model does not have"
    elif own and widths - {own}:
        fault = f"is for text of width {min(widths - {own})}, the model's is {own}"
    else:
        return
    raise InputError(f"--lora must be of the model's own family, but {lora.name} {fault}")


def _fetched(name: str, offline: bool) -> Path:
    """The file that a Hub id means by itself, or with the name of one of its files behind it."""
    found = _on_hub(name)
    assert found is not None, f"{name} was not checked"
    repo, file = found
    if not file:
        names = hub.files_of(repo, LORA, offline)
        if fault := _fault_of_names(names):
            raise ModelError(f"{repo} can not be used: it {fault}")
        file = _chosen(names)
    one = Layout(classes=(), parts={"": (file,)})
    path = hub.fetch(repo, replace(LORA, layouts=(one,)), offline) / file
    if not is_lora(shapes_of(path)):
        raise ModelError(f"{repo} can not be used: {file} has no LoRA in it")
    return path


def _on_hub(name: str) -> tuple[str, str] | None:
    """Hub id and file of `owner/name` or `owner/name/file.safetensors`, None of what is neither."""
    found = re.fullmatch(rf"([^/]+/[^/]+)(?:/([^/]+{re.escape(WEIGHTS)}))?", name)
    return (found[1], found[2] or "") if found and hub.is_id(found[1]) else None


def _title(file: Path) -> str:
    """What to call a LoRA: by its file, or where that is called as all are, by what it lies in."""
    if file.name != USUAL:
        return file.stem
    entry = hub.cache_entry(file)
    return entry.name.rpartition("--")[2] if entry else file.absolute().parent.name


def _names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def _fault_of_names(names: Iterable[str]) -> str | None:
    """What is wrong with the files of a folder, as the end of a sentence."""
    weights = sorted(name for name in names if name.endswith(WEIGHTS) and "/" not in name)
    if USUAL in weights or len(weights) == 1:
        return None
    several = f"has several, of which one must be named: {', '.join(weights)}"
    return several if weights else f"has no {WEIGHTS} file"


def _chosen(names: Iterable[str]) -> str:
    """The file to take of those of a folder that has no fault."""
    weights = [name for name in names if name.endswith(WEIGHTS) and "/" not in name]
    return USUAL if USUAL in weights else weights[0]
