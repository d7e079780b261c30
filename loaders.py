"""Which models, from where, on which device and how: names and flags in, ready models out.

A model is named by a Hub id, a diffusers folder, a single .safetensors file, or `pocket`, the model
that is bundled with this repository. What the Hub has is fetched once into its client's cache and
taken from there ever after. Nothing heavy is imported before it is needed.
"""

from __future__ import annotations

import errno
import json
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errors import InputError, ModelError, ResourceError, TemperingError

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionPipeline

    from segmentation import ClipSeg

STABLE_DIFFUSION = "CompVis/stable-diffusion-v1-4"
CLIPSEG = "CIDAS/clipseg-rd64-refined"
POCKET = "pocket"

# Name -> diffusers' class, and what Stable Diffusion v1's own scheduler sets, for models whose
# scheduler is of a class that does not know the setting.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("EulerDiscreteScheduler", {}),
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False}),
    "dpm++ 2m": ("DPMSolverMultistepScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "euler ancestral": ("EulerAncestralDiscreteScheduler", {}),
}
_A1111 = ("Euler", "DDIM", "PLMS", "DPM++ 2M", "Heun", "UniPC", "Euler a")
SAMPLER_NAMES = dict(zip(SCHEDULERS, _A1111, strict=True))
DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
OFFLOADS = {"model": "enable_model_cpu_offload", "sequential": "enable_sequential_cpu_offload"}

_CONTACT_SECONDS = 10  # how long the Hub may take to answer for the first time
# Compiled where they are used: importing this module is part of every refusal of bad input.
_HUB_ID = r"(?a:(?!.*(--|\.\.))(\w[\w.-]{0,95}/)?\w([\w.-]{0,94}\w)?)"
_PICKLES = (".ckpt", ".bin", ".pt", ".pth")
_OUT_OF_MEMORY = "out of memory|can(no|')t allocate|not enough memory|alloc_failed|paging file"
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
class _Kind:
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


_MODEL = _Kind(
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
_CONFIGURATION = replace(
    _MODEL,
    weights=False,
    instead=f"a single file needs the configuration and tokenizer of {STABLE_DIFFUSION} once "
    "(2 MB); what works without them: --model pocket, a diffusers folder",
)
_VAE = _Kind(
    flag="--vae",
    pocket=_BUNDLED / "stable-diffusion" / "vae",
    marker=("config.json", "_class_name", "AutoencoderKL"),
    parts={"": _DIFFUSERS},
    single_file={"VAE": r"(.*\.)?decoder\.conv_in\.weight"},
    instead="what works without it: a VAE's folder, a .safetensors file, the model's own VAE",
)
_CLIPSEG = _Kind(
    flag="--clipseg",
    pocket=_BUNDLED / "clipseg",
    marker=("config.json", "model_type", "clipseg"),
    parts={"": (*_TRANSFORMERS, *_TOKENIZER, "preprocessor_config.json|processor_config.json")},
    single_file={},
    instead="what works without it: a CLIPSeg folder, or --clipseg pocket with --model pocket",
)


class _UnreachableError(ModelError):
    """A model that is not in the cache, while the Hub does not answer or must not be asked."""

    def __init__(self, repo: str, reason: str, instead: str) -> None:
        super().__init__(f"can not download {repo}: {reason}; {instead}")
        self.reason = reason


def to_stderr(text: str) -> None:
    """Where notices go when the caller does not take them."""
    sys.stderr.write(f"{text}\n")


def load_pipeline(
    model: str | None = None,
    *,
    vae: str | None = None,
    scheduler: str = "euler",
    device: str | None = None,
    dtype: str | None = None,
    offload: str | None = None,
    offline: bool = False,
    notice: Callable[[str], None] = to_stderr,
) -> StableDiffusionPipeline:
    """A Stable Diffusion pipeline, ready on its device; it has no safety checker.

    `model` None is Stable Diffusion v1-4, or, where it can neither be fetched nor found in the
    cache, the bundled pocket, which `notice` is told. `model_name` tells which one it became.
    Raises InputError before anything is loaded, ModelError and ResourceError after.
    """
    scheduler_name(scheduler)
    if model is not None:
        check_model(model)
    if vae is not None:
        check_vae(vae)
    target = pick_device(device)
    pick_dtype(dtype, target)
    if offload is not None and offload not in OFFLOADS:
        raise InputError(f"--offload must be one of {', '.join(OFFLOADS)}, got {offload!r}")
    if offload is not None and target.type == "cpu":
        raise InputError(f"--offload needs a GPU, but this run is on the cpu, got {offload!r}")

    source = resolve(model, offline=offline, notice=notice)
    precision = _precision(source, dtype, target)
    configuration = source
    if source.is_file():
        configuration = _fetch(STABLE_DIFFUSION, _CONFIGURATION, offline)
    options: dict[str, Any] = {"torch_dtype": precision, "local_files_only": True}
    parts: dict[str, Any] = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"))
    if vae is not None:
        vae_source = _locate(vae, _VAE, offline)
        with _loading(vae_source) as diffusers:
            autoencoder = diffusers.AutoencoderKL
            parts["vae"] = _load(autoencoder, vae_source, configuration / "vae", **options)
    with _loading(source) as diffusers:
        options |= {**parts, "requires_safety_checker": False}
        pipe = _load(diffusers.StableDiffusionPipeline, source, configuration, **options)
        pipe.register_to_config(_name_or_path=str(source))
        latents, taken = pipe.vae.config.latent_channels, pipe.unet.config.in_channels
        if latents != taken:
            raise ValueError(f"the VAE's latents have {latents} channels, the U-Net takes {taken}")
        set_scheduler(pipe, scheduler)
    # Not under _loading: what a device refuses is no fault of the weights.
    with memory_errors():
        if offload is None:
            return pipe.to(target)
        pipe.vae.enable_slicing()
        pipe.vae.enable_tiling()
        getattr(pipe, OFFLOADS[offload])(device=target)
        return pipe


def load_clipseg(
    model: str | None = None,
    *,
    device: str | None = None,
    dtype: str | None = None,
    offline: bool = False,
) -> ClipSeg:
    """CLIPSeg with its checkpoint's own processor, ready on its device; None is CLIPSEG.

    Raises InputError before anything is loaded, ModelError and ResourceError after.
    """
    model = CLIPSEG if model is None else model
    check_clipseg(model)
    target = pick_device(device)
    pick_dtype(dtype, target)
    source = _locate(model, _CLIPSEG, offline)
    with _loading(source):
        from segmentation import ClipSeg

        transformers = import_module("transformers")
        options = {"local_files_only": True}
        clipseg, report = transformers.CLIPSegForImageSegmentation.from_pretrained(
            source, use_safetensors=True, output_loading_info=True, **options
        )
        if report["missing_keys"]:  # transformers would go on with random weights
            raise ValueError(f"there is no {', '.join(sorted(report['missing_keys']))}")
        processor = transformers.CLIPSegProcessor.from_pretrained(source, **options)
    with memory_errors():
        return ClipSeg(clipseg.to(target, _precision(source, dtype, target)).eval(), processor)


def set_scheduler(pipe: StableDiffusionPipeline, name: str) -> None:
    """Give the pipeline the scheduler of that name in SCHEDULERS, with its model's own schedule."""
    class_name, settings = SCHEDULERS[scheduler_name(name)]
    config = pipe.scheduler.config
    # diffusers drops what another scheduler's config holds by default only: then ours counts.
    own = config.keys() - set(config.get("_use_default_values", ()))
    missing = {key: value for key, value in settings.items() if key not in own}
    scheduler_class = getattr(import_module("diffusers"), class_name)
    pipe.scheduler = scheduler_class.from_config(config, **missing)


def resolve(
    model: str | None, *, offline: bool = False, notice: Callable[[str], None] = to_stderr
) -> Path:
    """The folder or file on this machine that `model` names, fetched first where need be."""
    if model is not None:
        return _locate(model, _MODEL, offline)
    try:
        return _fetch(STABLE_DIFFUSION, _MODEL, offline)
    except _UnreachableError as error:
        notice(_NOTICE.format(rule="*" * 88, reason=error.reason))
        return _MODEL.pocket


def model_name(pipe: StableDiffusionPipeline) -> str:
    """What to call the pipeline's model in results: Hub id, `pocket`, or a path's last name."""
    text = str(pipe.name_or_path or "unknown")
    return text if re.fullmatch(_HUB_ID, text) and not Path(text).exists() else _name(Path(text))


def clipseg_for(model: str | StableDiffusionPipeline) -> str:
    """The CLIPSeg that belongs to a pipeline, or to what `model_name` calls it."""
    name = model if isinstance(model, str) else model_name(model)
    return POCKET if name == POCKET else CLIPSEG


def scheduler_name(text: str) -> str:
    """The name in SCHEDULERS that `text` means, in any usual spelling, AUTOMATIC1111's too."""
    for name, sampler in SAMPLER_NAMES.items():
        if _squash(text) in (_squash(name), _squash(sampler)):
            return name
    raise InputError(f"--scheduler must be one of {', '.join(SCHEDULERS)}, got {text!r}")


def _squash(text: str) -> str:
    return re.sub(r"[\s_-]", "", text.lower())


def check_model(text: str) -> None:
    """Raise InputError where `text` can not name a model, without asking the Hub. Stdlib only."""
    _check(text, _MODEL)


def check_vae(text: str) -> None:
    """Raise InputError where `text` can not name a VAE, without asking the Hub. Stdlib only."""
    _check(text, _VAE)


def check_clipseg(text: str) -> None:
    """Raise InputError where `text` can not name a CLIPSeg, without asking the Hub. Stdlib only."""
    _check(text, _CLIPSEG)


def _check(text: str, kind: _Kind) -> None:
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
        fault = f"can not be read ({_line(error)})"
    if fault:
        raise InputError(f"{kind.flag} must be {forms}, but {text!r} {fault}")


def _file_fault(path: Path, kind: _Kind) -> str | None:
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


def _fault(folder: Path, kind: _Kind) -> str | None:
    """What makes `folder` unfit, as the end of a sentence."""
    name, key, _ = kind.marker
    found = None
    if (folder / name).is_file():
        try:
            found = json.loads((folder / name).read_text(encoding="utf-8"))[key]
        except (KeyError, TypeError, ValueError):
            return f"has a corrupt {name}"
    return _unfit(kind, lambda file: (folder / file).is_file(), found)


def _unfit(kind: _Kind, has: Callable[[str], bool], found: str | None) -> str | None:
    """The same, from a test for files and from what the model calls itself, where that is known."""

    def present(need: str) -> bool:  # as it is, or in shards
        return any(has(name) or has(f"{name}.index.json") for name in need.split("|"))

    if lacks := [need.replace("|", " or ") for need in kind.needs if not present(need)]:
        pickles = [re.sub(r"\bmodel\.safet", "pytorch_model.safet", name) for name in lacks]
        has_pickles = any(has(name.replace(".safetensors", ".bin")) for name in pickles)
        reason = " (.bin weights are not loaded: they can run code)" if has_pickles else ""
        return f"lacks {', '.join(lacks)}{reason}"
    return f"is a {found}, not a {kind.marker[2]}" if found not in (None, kind.marker[2]) else None


def pick_device(text: str | None = None) -> torch.device:
    """The device named `text`, by itself the first of cuda, mps, xpu and cpu that is present."""
    import torch

    counts = {
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
        "xpu": torch.xpu.device_count() if torch.xpu.is_available() else 0,
        "cpu": 1,
    }
    if text is None:
        return torch.device(next(name for name, count in counts.items() if count))
    name, _, index = text.partition(":")
    if not re.fullmatch(r"\w+(:\d{1,3})?", text, re.ASCII) or int(index or 0) >= counts.get(
        name, 0
    ):
        present = [f"{name}:{i}" if n > 1 else name for name, n in counts.items() for i in range(n)]
        raise InputError(f"--device must be present ({', '.join(present)}), got {text!r}")
    return torch.device(text)


def pick_dtype(text: str | None, device: torch.device) -> torch.dtype:
    """The dtype named `text`; by itself fp16 on GPUs, bf16 on CPUs that have it, else fp32."""
    import torch

    if text is None:
        # Older torch has no get_capabilities, and knows of x86 alone whether it has bf16.
        found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        older = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
        names = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
        has_bf16 = older or any(found.get(name) for name in names)
        text = "fp16" if device.type != "cpu" else "bf16" if has_bf16 else "fp32"
    if text not in DTYPES:
        raise InputError(f"--dtype must be one of {', '.join(DTYPES)}, got {text!r}")
    if text == "fp16" and device.type == "cpu":
        raise InputError("--dtype must be bf16 or fp32 on the cpu, got 'fp16'")
    return getattr(torch, DTYPES[text])


def _precision(source: Path, dtype: str | None, device: torch.device) -> torch.dtype:
    # bf16 gains nothing on a model as small as the pocket, and fp32 repeats exactly.
    exact = dtype is None and device.type == "cpu" and _name(source) == POCKET
    return pick_dtype("fp32" if exact else dtype, device)


def _name(path: Path) -> str:
    if path.resolve() in (_MODEL.pocket.resolve(), _CLIPSEG.pocket.resolve()):
        return POCKET
    if entry := _cache_entry(path):
        return entry.name.removeprefix("models--").replace("--", "/")
    return path.name if path.name not in ("", "..") else path.resolve().name


def _cache_entry(path: Path) -> Path | None:
    """The folder of the Hub's cache that holds the model that `path` lies in."""
    return next((folder for folder in path.parents if folder.name.startswith("models--")), None)


def _locate(text: str, kind: _Kind, offline: bool) -> Path:
    path = kind.pocket if text == POCKET else Path(text).expanduser()
    return path if path.exists() else _fetch(text, kind, offline)


def _fetch(repo: str, kind: _Kind, offline: bool) -> Path:
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
    with _hub_errors(repo, kind):
        info = HfApi().model_info(repo, timeout=_CONTACT_SECONDS)
    config, key = info.config or {}, kind.marker[1]
    found = config.get(key) or (config.get("diffusers") or {}).get(key)
    names = {file.rfilename for file in info.siblings or ()}
    fault = _unfit(kind, names.__contains__, found)
    if not fault:
        try:
            with _hub_errors(repo, kind):
                folder = _download(repo, kind.patterns)
        except _UnreachableError as error:  # not a reason to run another model: it was there
            text = f"the download of {repo} broke off, {error.reason}; run again to go on"
            raise ModelError(text) from error
        fault = _fault(folder, kind)
    if fault:
        raise ModelError(f"{repo} can not be used: it {fault}")
    return folder


def _download(repo: str, patterns: list[str], attempts: int = 3) -> Path:
    """Fetch into the Hub's cache; files that are complete there are not fetched again.

    The client takes up a body that ends early by itself, but not one whose connection is reset.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, allow_patterns=patterns))
    except Exception as error:
        # By name: which of these libraries is there depends on the client's version.
        library = type(error).__module__.partition(".")[0]
        if attempts == 1 or library not in ("httpx", "httpx2", "requests"):
            raise
    time.sleep(1)
    return _download(repo, patterns, attempts - 1)


@contextmanager
def _hub_errors(repo: str, kind: _Kind) -> Iterator[None]:
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
            reason = _line(error)
        else:
            answer = f"it answers {http.response.status_code}" if http else _line(cause)
            reason = f"the Hub can not be reached ({answer})"
            raise _UnreachableError(repo, reason, kind.instead) from error
        raise ModelError(f"{start}: {reason}; {kind.instead}") from error


def _load(cls: Any, source: Path, configuration: Path, **options: Any) -> Any:
    """A pipeline or a model of diffusers from a folder or a single file."""
    if source.is_file():
        return cls.from_single_file(str(source), config=str(configuration), **options)
    return cls.from_pretrained(str(source), use_safetensors=True, **options)


@contextmanager
def _loading(source: Path) -> Iterator[Any]:
    """Gives diffusers, without its chatter, and turns what fails into one line of our own."""
    from safetensors import SafetensorError

    _quiet()
    # Imported for real, for diffusers is lazy: what an installation lacks is no fault of the
    # weights either.
    import_module("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion")
    try:
        with memory_errors(), warnings.catch_warnings():
            # torch_dtype is the one name that every version of diffusers in range knows.
            warnings.simplefilter("ignore", FutureWarning)
            yield import_module("diffusers")
    except TemperingError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        entry = _cache_entry(source)
        remedy = f"delete {entry} and run again" if entry else "put a sound copy in its place"
        text = f"weights of {_name(source)} are corrupt or do not fit: {_line(error)}; {remedy}"
        raise ModelError(text) from error


@contextmanager
def memory_errors() -> Iterator[None]:
    """Any library's way of being out of memory becomes ResourceError; while loading or running."""
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search(_OUT_OF_MEMORY, str(error).lower()):
            raise
        raise ResourceError(
            "out of memory; what helps: --offload model or sequential and --dtype fp16 on a GPU, "
            "--dtype bf16 on a CPU, a smaller --height and --width"
        ) from error


def _quiet() -> None:
    """No bars and advice of transformers and diffusers from here on; the Hub client keeps its bars.

    What they say of prompts that are too long, the flows say in their own words.
    """
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars

    had_bars = not are_progress_bars_disabled()
    for library in ("transformers", "diffusers"):  # advice starts while diffusers is imported
        log = import_module(f"{library}.utils.logging")
        log.set_verbosity_error()
        log.disable_progress_bar()
    if had_bars:  # transformers' switch turned them off as well
        enable_progress_bars()


def _line(error: BaseException) -> str:
    import textwrap

    return textwrap.shorten(str(error), 160, placeholder=" ...") or type(error).__name__
