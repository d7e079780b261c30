"""What a model's name means, and how its files get here.

A model is named by a Hub id, a diffusers folder, a single .safetensors file, or `pocket`, the model
that is bundled with this repository. What the Hub has is fetched once into its client's cache and
taken from there ever after. Importing this is part of every refusal of bad input, so nothing heavy
is imported before it is needed.
"""

from __future__ import annotations

import errno
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from errors import InputError, ModelError, ResourceError, one_line

STABLE_DIFFUSION = "CompVis/stable-diffusion-v1-4"
CLIPSEG = "CIDAS/clipseg-rd64-refined"
POCKET = "pocket"

_CONTACT_SECONDS = 10  # how long the Hub may take to answer for the first time
_PAUSES = (1, 2, 4, 8, 16, 32)  # seconds before a busy Hub or a broken line is tried again
# Compiled where it is used: not every start needs it.
_HUB_ID = r"(?a:(?!.*(--|\.\.))(\w[\w.-]{0,95}/)?\w([\w.-]{0,94}\w)?)"
_PICKLES = (".ckpt", ".bin", ".pt", ".pth")
_BUNDLED = Path(__file__).parent / "pocket" / "weights"
_NOTICE = """\
{rule}
  NOT STABLE DIFFUSION: the small bundled pocket model runs instead.
  Stable Diffusion v1-4 can not be downloaded: {reason}.
  The pocket knows a few emoji, 64x64 pixels, and nothing else.
  For Stable Diffusion run this once with a connection, or give --model a folder or a file.
{rule}"""

_DIFFUSERS = ("config.json", "diffusion_pytorch_model.safetensors")
_TRANSFORMERS = ("config.json", "model.safetensors")
_TOKENIZER = ("tokenizer_config.json", "vocab.json|tokenizer.json", "merges.txt|tokenizer.json")


@dataclass(frozen=True)
class Kind:
    """What one of the model flags asks for."""

    flag: str
    pocket: Path
    marker: tuple[str, str, str]  # file, key and value that tell this kind of model
    parts: dict[str, tuple[str, ...]]  # folder -> files it needs; "a|b" is either of two
    single_file: dict[str, str]  # what a single file holds -> its tensors' names; empty: none taken
    instead: str  # what works where the Hub does not
    weights: bool = True

    @property
    def needs(self) -> list[str]:
        paths = [
            "|".join(f"{folder}/{name}".lstrip("/") for name in need.split("|"))
            for folder, needs in self.parts.items()
            for need in needs
        ]
        return [path for path in paths if self.weights or not path.endswith(".safetensors")]

    @property
    def patterns(self) -> list[str]:
        """What is fetched of a Hub repository: neither pickles nor variants such as fp16."""
        stems = ("model", "diffusion_pytorch_model") if self.weights else ()
        shards = [f"{stem}{n}.safetensors" for stem in stems for n in ("", "-?????-of-?????")]
        names = ["*.json", "*.txt", *shards]
        folders = [f"{part}/" for part in self.parts if part] or [""]
        return [self.marker[0], *(folder + name for folder in folders for name in names)]


MODEL = Kind(
    flag="--model",
    pocket=_BUNDLED / "stable-diffusion",
    marker=("model_index.json", "_class_name", "StableDiffusionPipeline"),
    parts={
        "": ("model_index.json",),
        "unet": _DIFFUSERS,
        "vae": _DIFFUSERS,
        "text_encoder": _TRANSFORMERS,
        "tokenizer": _TOKENIZER,
        "scheduler": ("scheduler_config.json",),
    },
    single_file={
        "U-Net": r"model\.diffusion_model\.",
        "VAE": r"(first_stage_model|vae)\.",
        "CLIP text model of Stable Diffusion v1": r"cond_stage_model\.transformer\.",
    },
    instead="what works without it: --model pocket, a diffusers folder, a .safetensors file",
)
CONFIGURATION = replace(
    MODEL,
    weights=False,
    instead=f"a single file needs the configuration and tokenizer of {STABLE_DIFFUSION} once "
    "(2 MB); what works without them: --model pocket, a diffusers folder",
)
VAE = Kind(
    flag="--vae",
    pocket=_BUNDLED / "stable-diffusion" / "vae",
    marker=("config.json", "_class_name", "AutoencoderKL"),
    parts={"": _DIFFUSERS},
    single_file={"VAE": r"(.*\.)?decoder\.conv_in\.weight"},
    instead="what works without it: a VAE's folder, a .safetensors file, the model's own VAE",
)
SEGMENTER = Kind(
    flag="--clipseg",
    pocket=_BUNDLED / "clipseg",
    marker=("config.json", "model_type", "clipseg"),
    parts={"": (*_TRANSFORMERS, *_TOKENIZER, "preprocessor_config.json|processor_config.json")},
    single_file={},
    instead="what works without it: a CLIPSeg folder, or --clipseg pocket with --model pocket",
)


class _UnreachableError(ModelError):
    """A model that is not in the cache, while the Hub does not answer or must not be asked.

    `busy`: it did answer, that it can not now.
    """

    def __init__(self, repo: str, reason: str, instead: str, *, busy: bool = False) -> None:
        super().__init__(f"can not download {repo}: {reason}; {instead}")
        self.reason = reason
        self.busy = busy


def to_stderr(text: str) -> None:
    """Where notices go when the caller does not take them."""
    sys.stderr.write(f"{text}\n")


def resolve(
    model: str | None, *, offline: bool = False, notice: Callable[[str], None] = to_stderr
) -> Path:
    """What `locate` finds for `model`, or for None, which stands for the default.

    Where that can neither be fetched nor found in the cache it is the pocket; `notice` is told why.
    """
    if model is not None:
        return locate(model, MODEL, offline)
    try:
        return fetch(STABLE_DIFFUSION, MODEL, offline)
    except _UnreachableError as error:
        notice(_NOTICE.format(rule="*" * 88, reason=error.reason))
        return MODEL.pocket


def check(text: str, kind: Kind) -> None:
    """Raise InputError where `text` can not name a model of that kind, without asking the Hub."""
    if text == POCKET:
        return
    forms = f"a folder, {'a .safetensors file, ' if kind.single_file else ''}a Hub id or {POCKET}"
    try:
        path = Path(text).expanduser()
        if path.is_dir() and text:
            fault = _fault(path, kind)
        elif path.suffix.lower() in _PICKLES:
            fault = f"is a {path.suffix} file, which can run code when it is loaded"
        elif path.is_file():
            fault = _file_fault(path, kind)
        elif text.startswith(("/", ".", "~")) or re.search(r"\\|/.*/|\.safetensors$", text):
            fault = "does not exist"
        else:
            fault = None if re.fullmatch(_HUB_ID, text) else "is none of them"
    except (OSError, RuntimeError) as error:
        fault = f"can not be read ({one_line(error)})"
    if fault:
        raise InputError(f"{kind.flag} must be {forms}, but {text!r} {fault}")


def _file_fault(path: Path, kind: Kind) -> str | None:
    if not kind.single_file:
        return "is a file"
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length if length < 100_000_000 else 0)  # safetensors' own limit
    try:
        tensors = list(json.loads(text))
    except (TypeError, ValueError):
        return "is not a safetensors file"
    lacks = [
        part
        for part, pattern in kind.single_file.items()
        if not any(re.match(pattern, tensor) for tensor in tensors)
    ]
    return f"lacks the {' and the '.join(lacks)}" if lacks else None


def _fault(folder: Path, kind: Kind) -> str | None:
    """What makes `folder` unfit, as the end of a sentence."""
    name, key, _ = kind.marker
    found = None
    if (folder / name).is_file():
        try:
            found = json.loads((folder / name).read_text(encoding="utf-8"))[key]
        except (KeyError, TypeError, ValueError):
            return f"has a corrupt {name}"
    return _unfit(kind, lambda file: (folder / file).is_file(), found)


def _unfit(kind: Kind, has: Callable[[str], bool], found: str | None) -> str | None:
    """The same, from a test for files and from what the model calls itself, where that is known."""

    def present(need: str) -> bool:  # as it is, or in shards
        return any(has(name) or has(f"{name}.index.json") for name in need.split("|"))

    if lacks := [need.replace("|", " or ") for need in kind.needs if not present(need)]:
        pickles = [re.sub(r"\bmodel\.safet", "pytorch_model.safet", name) for name in lacks]
        has_pickles = any(has(name.replace(".safetensors", ".bin")) for name in pickles)
        reason = " (.bin weights are not loaded: they can run code)" if has_pickles else ""
        return f"lacks {', '.join(lacks)}{reason}"
    return f"is a {found}, not a {kind.marker[2]}" if found not in (None, kind.marker[2]) else None


def name_of(model: str | Path) -> str:
    """What to call a model in results: its Hub id, `pocket`, or the last name of its path."""
    path = Path(model)
    if re.fullmatch(_HUB_ID, str(model)) and not path.exists():
        return str(model)
    if path.resolve() in (MODEL.pocket.resolve(), SEGMENTER.pocket.resolve()):
        return POCKET
    if entry := cache_entry(path):
        return entry.name.removeprefix("models--").replace("--", "/")
    return path.name if path.name not in ("", "..") else path.resolve().name


def cache_entry(path: Path) -> Path | None:
    """The folder of the Hub's cache that holds the model that `path` lies in."""
    return next((folder for folder in path.parents if folder.name.startswith("models--")), None)


def locate(text: str, kind: Kind, offline: bool) -> Path:
    """The folder or file on this machine that `text` names, fetched first where need be."""
    path = kind.pocket if text == POCKET else Path(text).expanduser()
    return path if path.exists() else fetch(text, kind, offline)


def fetch(repo: str, kind: Kind, offline: bool) -> Path:
    """The folder of `repo` in the Hub's cache; the Hub is asked only for what is not there."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        cached = snapshot_download(repo, allow_patterns=kind.patterns, local_files_only=True)
        if not _fault(Path(cached), kind):
            return Path(cached)
    except LocalEntryNotFoundError:
        pass
    if offline:
        reason = "it is not complete in the cache, and offline nothing is fetched"
        raise _UnreachableError(repo, reason, kind.instead)
    info = _patiently(
        lambda: HfApi().model_info(repo, timeout=_CONTACT_SECONDS),
        repo,
        kind,
        worth_it=lambda error: error.busy,  # without a network it is known at once
    )
    config, key = info.config or {}, kind.marker[1]
    found = config.get(key) or (config.get("diffusers") or {}).get(key)
    names = {file.rfilename for file in info.siblings or ()}
    fault = _unfit(kind, names.__contains__, found)
    if not fault:
        try:
            patterns = kind.patterns
            folder = Path(
                _patiently(lambda: snapshot_download(repo, allow_patterns=patterns), repo, kind)
            )
        except _UnreachableError as error:  # not a reason to run another model: it was there
            text = f"the download of {repo} broke off, {error.reason}; run again to go on"
            raise ModelError(text) from error
        fault = _fault(folder, kind)
    if fault:
        raise ModelError(f"{repo} can not be used: it {fault}")
    return folder


def _patiently(
    ask: Callable[[], Any],
    repo: str,
    kind: Kind,
    worth_it: Callable[[_UnreachableError], bool] = lambda error: True,
) -> Any:
    """What the Hub's client gives; asked again where a Hub is out of reach and it is `worth_it`.

    The client keeps the files that are complete, and takes up a body that ends early, but gives up
    at a reset connection, a time-out, and at most of what a busy Hub answers.
    """
    for pause in _PAUSES:
        try:
            with _hub_errors(repo, kind):
                return ask()
        except _UnreachableError as error:
            if not worth_it(error):
                raise
            to_stderr(f"{repo}: {error.reason}; trying again in {pause} s")
        time.sleep(pause)
    with _hub_errors(repo, kind):
        return ask()


@contextmanager
def _hub_errors(repo: str, kind: Kind) -> Iterator[None]:
    """Whatever goes wrong with the Hub becomes one line that names what would work."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    try:
        yield
    except Exception as error:  # of HTTP, of Xet, of a captive portal's page: they have no family
        start, cause = f"can not download {repo}", error.__cause__ or error
        http = next((e for e in (error, cause) if isinstance(e, HfHubHTTPError)), None)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            text = f"{start}: the disk is full; free some space or set HF_HOME to another disk"
            raise ResourceError(text) from error
        if isinstance(http, GatedRepoError):
            reason = "accept its terms on the Hub and log in with `hf auth login`"
        elif isinstance(http, RepositoryNotFoundError):
            reason = "the Hub has no such public model"
        elif http and http.response.status_code in {*range(400, 500)} - {408, 429}:
            reason = f"the Hub answers {http.response.status_code}"
        elif isinstance(error, OSError) and error.errno is not None:
            reason = one_line(error)
        else:
            answer = f"it answers {http.response.status_code}" if http else one_line(cause)
            reason = f"the Hub can not be reached ({answer})"
            raise _UnreachableError(repo, reason, kind.instead, busy=http is not None) from error
        raise ModelError(f"{start}: {reason}; {kind.instead}") from error
