"""Names and flags in, ready models out: on which device, in which dtype, with which scheduler.

Nothing heavy is imported before it is needed. What a name means, hub.py knows.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from logging import CRITICAL
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hub
import loras
from errors import InputError, ModelError, TemperingError, importing, memory_errors, one_line
from kinds import (
    BLIP_VQA,
    CLIP,
    EYES,
    MODEL,
    OWLV2,
    OWN_TAESD,
    SEGMENTER,
    TAESD,
    VAE,
    Layout,
    fault_of_folder,
    latent_channels,
    layout_of,
    shapes_of,
)
from loras import Lora
from settings import AUTO, BACKENDS, BY_TAESD, PREDICTION_TYPES

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from judges import Eye, Judge
    from prompts import Prompt
    from segmentation import ClipSeg

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
    "lcm": ("LCMScheduler", {"clip_sample": False}),
}
_A1111 = ("Euler", "DDIM", "PLMS", "DPM++ 2M", "Heun", "UniPC", "Euler a", "LCM")
SAMPLER_NAMES = dict(zip(SCHEDULERS, _A1111, strict=True))
# The same for models of flows (Stable Diffusion 3), as far as there is one, and what diffusers
# calls the shift of the schedule there.
_ON_FLOWS = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
FLOW_SCHEDULERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "euler": ("FlowMatchEulerDiscreteScheduler", {}, "shift"),
    "dpm++ 2m": ("DPMSolverMultistepScheduler", _ON_FLOWS, "flow_shift"),
    "heun": ("FlowMatchHeunDiscreteScheduler", {}, "shift"),
    "unipc": ("UniPCMultistepScheduler", _ON_FLOWS, "flow_shift"),
}
DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
DTYPE_NAMES = {long: short for short, long in DTYPES.items()}
# Arguments of diffusers' pipelines, as far as they know them, for a picture that is left as it is.
UNWANTED = {
    "safety_checker": None,
    "requires_safety_checker": False,
    "feature_extractor": None,
    "image_encoder": None,
    "add_watermarker": False,
}
CXX = {"darwin": "clang++", "win32": "cl"}  # torch's choice by system; of others g++
OPENVINO, OPENVINO_REQUIREMENTS = "openvino", "requirements-openvino.txt"
OFFLOADS = {"model": "enable_model_cpu_offload", "sequential": "enable_sequential_cpu_offload"}


def load_pipeline(
    model: str | Path | None = None,
    *,
    vae: str | Path | None = None,
    lora: Sequence[str] = (),
    t5: bool = True,
    scheduler: str | None = None,
    prediction_type: str | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    offload: str | None = None,
    preview: str = AUTO,
    backend: str = "torch",
    compiled: bool = False,
    sizes: Sequence[int | None] = (),
    offline: bool = False,
    notice: Callable[[str], None] = hub.to_stderr,
) -> DiffusionPipeline:
    """A pipeline of a family of Stable Diffusion, ready on its device; it has no safety checker.

    `model` None is Stable Diffusion v1-4, or, where it can neither be fetched nor found in the
    cache, the bundled pocket, which `notice` is told. `model_name` tells which one it became.
    Each `lora` is a name, or a name and its weight behind a colon. Without `t5` Stable Diffusion 3
    leaves that text encoder out. `scheduler` None is Euler's, or LCM's for a model distilled to it;
    `prediction_type` None is what the model itself says. `preview` is the setting of that name: for
    those by a tiny decoder and, where it can be had, for "auto" the pipeline gets one, `taesd`.
    `backend` "openvino" lets OpenVINO run the networks that take the time, as they are now: a LoRA
    that is loaded later changes nothing. `compiled` lets torch compile the denoiser. `sizes` are
    what it is to paint: what its family does not is refused here. `dtype` and `device` are names as
    on the command line, or torch's own. Raises InputError before anything is loaded, ModelError and
    ResourceError after.
    """
    kind = MODEL if t5 else MODEL.bare
    if scheduler is not None:
        scheduler_name(scheduler)
    if prediction_type not in (None, *PREDICTION_TYPES):
        names = ", ".join(PREDICTION_TYPES)
        raise InputError(f"--prediction_type must be one of {names}, got {prediction_type!r}")
    model, vae = (None if name is None else str(name) for name in (model, vae))
    if model is not None:
        hub.check(model, kind)
    if vae is not None:
        hub.check(vae, VAE)
    for text in lora:
        loras.check(text)
    target = pick_device(device)
    pick_dtype(dtype, target)
    if offload is not None and offload not in OFFLOADS:
        raise InputError(f"--offload must be one of {', '.join(OFFLOADS)}, got {offload!r}")
    if offload is not None and target.type == "cpu":
        raise InputError(f"--offload needs a GPU, but this run is on the cpu, got {offload!r}")
    check_backend(backend, target, compiled)

    admit = admission(scheduler, prediction_type, sizes)
    source = hub.resolve(model, kind, offline=offline, notice=notice, admit=admit)
    layout = layout_of(source, kind)
    configuration = source if source.is_dir() else hub.configuration(source, kind, offline)
    vae_source = None if vae is None else hub.locate(vae, VAE, offline)
    if vae_source is not None:
        got, own = latent_channels(vae_source), latent_channels(configuration / "vae")
        if got and own and got != own:
            raise InputError(f"--vae must take latents of {own} channels, but {vae!r} takes {got}")
    tiny = _taesd_source(source, layout, preview, offline)
    found_loras = [loras.locate(each, offline) for each in lora]  # all is fetched before it loads
    for each in found_loras:
        loras.check_fit(each, layout, configuration)
    precision = _precision(source, dtype, target, layout.on_flows)
    pipe = _pipeline(source, layout, configuration, vae_source, precision)
    with _loading(source):
        pipe.scheduler = _corrected(pipe.scheduler, source, prediction_type)
        set_scheduler(pipe, scheduler or default_scheduler(pipe))
    add_loras(pipe, found_loras)
    pipe.taesd = None if tiny is None else _taesd(tiny, pipe, preview)
    return _on_backend(place(pipe, target, offload), backend, compiled, notice)


def admission(
    scheduler: str | None, prediction_type: str | None, sizes: Sequence[int | None]
) -> hub.Admit:
    """What raises InputError for a model of a family that does not do what the flags ask for."""

    def admit(layout: Layout) -> None:
        if scheduler is not None:
            scheduler_name(scheduler, on_flows=layout.on_flows)
        if any(size and size % layout.size_factor for size in sizes):
            text = f"sizes must be multiples of {layout.size_factor} pixels with Stable Diffusion 3"
            raise InputError(f"{text}, got {' and '.join(str(size) for size in sizes if size)}")
        if prediction_type is not None and layout.on_flows:
            text = "--prediction_type must not be given with Stable Diffusion 3"
            raise InputError(f"{text}, got {prediction_type!r}")

    return admit


def place(
    pipe: DiffusionPipeline, device: torch.device, offload: str | None = None
) -> DiffusionPipeline:
    """The pipeline on its device; of an `offload` only what runs there, a picture at a time."""
    import torch

    # Not under _loading: what a device refuses is no fault of the weights.
    with memory_errors():
        if tiny := getattr(pipe, "taesd", None):  # no part of diffusers' pipeline, and
            tiny.to(device)  # too small to be worth offloading
            if device.type == "cpu":
                tiny.to(memory_format=torch.channels_last)  # in which a CPU is faster at it
        if offload is None:
            return pipe.to(device)
        pipe.vae.enable_slicing()
        pipe.vae.enable_tiling()
        getattr(pipe, OFFLOADS[offload])(device=device)
        return pipe


def check_backend(name: str, device: torch.device | None = None, compiled: bool = False) -> None:
    """Raise InputError for a backend that there is not, here or on `device`, or not `compiled`."""
    if name not in BACKENDS:
        raise InputError(f"--backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    if compiled and name == OPENVINO:
        raise InputError("--compile is for --backend torch, got openvino")
    if compiled and device is not None and device.type == "cpu":
        compiler = os.environ.get("CXX", CXX.get(sys.platform, "g++"))
        if shutil.which(compiler) is None:
            required = "a C++ compiler, which the environment variable CXX can name"
            raise InputError(f"--compile needs {required}, got {compiler!r}, which is not there")
    if name != OPENVINO:
        return
    if find_spec(OPENVINO) is None:
        install = f"{sys.executable} -m pip install -r {OPENVINO_REQUIREMENTS}"
        raise InputError(f"--backend openvino needs OpenVINO, which is not installed: {install}")
    if device is not None and device.type != "cpu":
        raise InputError(f"--backend openvino needs --device cpu, got {str(device)!r}")


def _on_backend(
    pipe: DiffusionPipeline, backend: str, compiled: bool, notice: Callable[[str], None]
) -> DiffusionPipeline:
    """The pipeline, ready, with its networks on what runs them."""
    if backend == OPENVINO or compiled:
        import backends

        if compiled:
            backends.compile_pipeline(pipe)
        else:
            backends.convert_pipeline(pipe, notice)
    return pipe


def _pipeline(
    source: Path, layout: Layout, configuration: Path, vae: Path | None, precision: torch.dtype
) -> DiffusionPipeline:
    """The pipeline of a folder or a single file, on the CPU, as it is configured."""
    parts: dict[str, Any] = {}
    if vae is not None:
        with _loading(vae) as diffusers:
            files = vae, configuration / "vae"
            parts["vae"] = _network(diffusers.AutoencoderKL, "vae", *files, precision)
    with _loading(source, layout.classes[0]) as diffusers:
        pipeline = getattr(diffusers, layout.classes[0])
        parts |= _without(pipeline, layout)
        if source.is_dir():
            parts |= _networks(source, precision, but=parts)
        else:
            parts |= _lent(layout.lacking(shapes_of(source) or {}), configuration, precision)
        try:
            pipe = _load(pipeline, source, configuration, **parts, torch_dtype=precision)
        except Exception:
            if source.is_file():
                _name_gaps(source, configuration)
            raise
        if source.is_file() and "text_encoder_3" in layout.parts:
            # diffusers leaves the second name of T5's embeddings on "meta", and its dropout on.
            pipe.text_encoder_3.tie_weights()
            pipe.text_encoder_3.eval()
        pipe.register_to_config(_name_or_path=str(source))
        _check_parts(pipe)
    return pipe


def _taesd_source(source: Path, layout: Layout, preview: str, offline: bool) -> Path | None:
    """The folder of the tiny decoder for a model: its own, or its family's.

    None where the preview does not want it, or where "auto" has to do without.
    """
    if preview not in (AUTO, *BY_TAESD):
        return None
    own = source / OWN_TAESD
    if own.is_dir() and not fault_of_folder(own, TAESD):
        return own
    if hub.name_of(source) == hub.POCKET:
        if preview == AUTO:
            return None
        raise InputError(f"--preview {preview} must not be given with the pocket; {TAESD.instead}")
    try:
        return hub.fetch(layout.taesd, TAESD, offline, patient=preview != AUTO)
    except ModelError:
        if preview == AUTO:
            return None
        raise


def _taesd(source: Path, pipe: DiffusionPipeline, preview: str) -> Any | None:
    """The tiny decoder in the VAE's dtype; for "auto" None where it is of other latents.

    Raises ModelError for one that is damaged, or of other latents.
    """
    with _loading(source) as diffusers:
        tiny = _network(diffusers.AutoencoderTiny, "taesd", source, source, pipe.vae.dtype)
    vae, config = pipe.vae.config, tiny.config
    found = config.latent_channels, 2 ** (len(config.num_decoder_blocks) - 1)
    needed = vae.latent_channels, 2 ** (len(vae.block_out_channels) - 1)
    if found == needed:
        return tiny.eval()
    if preview == AUTO:
        return None
    (channels, factor), (own_channels, own_factor) = found, needed
    raise ModelError(
        f"the tiny decoder {hub.name_of(source)} does not fit: it takes {channels} channels and "
        f"enlarges {factor} times, the model's VAE {own_channels} and {own_factor}; "
        f"{TAESD.instead}"
    )


def _without(pipeline: Any, layout: Layout) -> dict[str, Any]:
    """What a pipeline must be told to do without: what is never wanted, and what is not there."""
    known = inspect.signature(pipeline.__init__).parameters
    whole = next(each for each in MODEL.layouts if each.classes == layout.classes)
    left_out = [part for part in whole.optional if part not in layout.parts]
    return {
        **{name: value for name, value in UNWANTED.items() if name in known},
        **dict.fromkeys(left_out),
    }


def _corrected(scheduler: Any, source: Path, prediction_type: str | None) -> Any:
    """The model's scheduler by what its single file and the user say beyond its configuration.

    Finetunes that predict v, or that were trained down to no signal at all, say so by tensors of
    these names. The latter start from pure noise: arXiv:2305.08891.
    """
    shapes = shapes_of(source) or {}
    said: dict[str, Any] = {}
    if "v_pred" in shapes:
        said |= {"prediction_type": "v_prediction"}
    if "ztsnr" in shapes:
        said |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if prediction_type is not None:
        said |= {"prediction_type": prediction_type}
    return type(scheduler).from_config(scheduler.config, **said) if said else scheduler


def add_loras(pipe: DiffusionPipeline, found: Sequence[Lora]) -> None:
    """Let each LoRA change the pipeline's weights; ModelError for one that is of another model."""
    adapters = [f"lora_{number}" for number in range(len(found))]
    for adapter, lora in zip(adapters, found, strict=True):
        folder, name = str(lora.file.parent), lora.file.name
        try:
            with memory_errors(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", module="peft")  # of several that add up
                pipe.load_lora_weights(
                    folder, weight_name=name, adapter_name=adapter, local_files_only=True
                )
            changed = [part for part, there in pipe.get_list_adapters().items() if adapter in there]
            if strangers := [part for part in lora.parts if part not in changed]:
                raise ValueError(f"it changes {' and '.join(strangers)}, which is not there")
            if not changed:
                raise ValueError("it names no part that it would change")
        except TemperingError:
            raise
        except Exception as error:  # of diffusers, of peft, of torch: whatever they stumble over
            text = f"the LoRA {lora.name} does not fit {model_name(pipe)}: {one_line(error)}"
            raise ModelError(text) from error
    if found:
        pipe.set_adapters(adapters, [lora.weight for lora in found])


def load_clipseg(
    model: str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    backend: str = "torch",
    offline: bool = False,
    notice: Callable[[str], None] = hub.to_stderr,
) -> ClipSeg:
    """CLIPSeg with its checkpoint's own processor, ready on its device; None is `hub.CLIPSEG`.

    Raises InputError before anything is loaded, ModelError and ResourceError after.
    """
    model = hub.CLIPSEG if model is None else str(model)
    hub.check(model, SEGMENTER)
    target = pick_device(device)
    pick_dtype(dtype, target)
    check_backend(backend, target)
    source = hub.locate(model, SEGMENTER, offline)
    with _loading(source):
        from segmentation import ClipSeg

        transformers = import_module("transformers")
        precision = _precision(source, dtype, target)
        segmenter = transformers.CLIPSegForImageSegmentation
        clipseg = _network(segmenter, "CLIPSeg", source, source, precision)
        processor = transformers.CLIPSegProcessor.from_pretrained(source, local_files_only=True)
        _check_words(processor.tokenizer, clipseg.config.text_config)
        _leave_out_layers(clipseg)
    with memory_errors():
        network = clipseg.to(target).eval()
        if backend == OPENVINO:
            import backends

            backends.convert_clipseg(network, notice)
        return ClipSeg(network, processor)


def _leave_out_layers(clipseg: Any) -> None:
    """Cut CLIPSeg's vision tower behind the last layer that its decoder reads: two of twelve."""
    encoder = clipseg.clip.vision_model.encoder
    encoder.layers = encoder.layers[: max(clipseg.config.extract_layers) + 1]


def load_judge(
    name: str,
    prompts: Sequence[Prompt],
    *,
    device: str | torch.device | None = None,
    offline: bool = False,
) -> Judge:
    """The judge of that name, ready on its device, for pictures of `prompts`; in float32.

    Raises InputError before anything is loaded, ModelError and ResourceError after.
    """
    import judges

    if name == "pocket":
        from pocket.judge import load_judge as load_pockets

        return judges.PocketJudge(load_pockets())
    target = pick_device(device)
    if name == "blip-vqa":
        return judges.BlipVqaJudge(_eye(BLIP_VQA, "BlipForQuestionAnswering", target, offline))
    nouns = [judges.subject_of(subject).noun for each in prompts for subject in each.subjects]
    owlv2 = _eye(OWLV2, "Owlv2ForObjectDetection", target, offline)
    return judges.Owlv2Judge(owlv2, _eye(CLIP, "CLIPModel", target, offline), nouns)


def _eye(repo: str, class_name: str, device: torch.device, offline: bool) -> Eye:
    """A model that a judge looks through, with its checkpoint's own processor."""
    import torch

    source = hub.fetch(repo, EYES[repo], offline)
    with _loading(source):
        from judges import Eye

        transformers = import_module("transformers")
        model = getattr(transformers, class_name)
        network = _network(model, class_name, source, source, torch.float32)
        processor = transformers.AutoProcessor.from_pretrained(source, local_files_only=True)
    with memory_errors():
        return Eye(network.to(device).eval(), processor)


def default_scheduler(pipe: DiffusionPipeline) -> str:
    """LCM's for a model whose own that is, for it can not do with others; Euler's for the rest."""
    return "lcm" if type(pipe.scheduler).__name__ == SCHEDULERS["lcm"][0] else "euler"


def scheduler_of(pipe: DiffusionPipeline) -> str:
    """The name in SCHEDULERS of a pipeline's scheduler; its class where it is none of them."""
    found = type(pipe.scheduler).__name__
    known = [*SCHEDULERS.items(), *FLOW_SCHEDULERS.items()]
    return next((name for name, (class_name, *_) in known if class_name == found), found)


def set_scheduler(pipe: DiffusionPipeline, name: str) -> None:
    """Give the pipeline the scheduler of that name, with its model's own schedule.

    Raises InputError for one that there is not for the model's kind of schedule, and for EDM's.
    """
    from sampling import FLOW, check_schedule, prediction_type

    check_schedule(pipe.scheduler)
    config = pipe.scheduler.config
    if prediction_type(pipe.scheduler) == FLOW:
        class_name, settings, shift = FLOW_SCHEDULERS[scheduler_name(name, on_flows=True)]
        settings = {**settings, shift: config.get("shift", config.get("flow_shift", 1.0))}
    else:
        class_name, settings = SCHEDULERS[scheduler_name(name)]
    # diffusers drops what another scheduler's config holds by default only: then ours counts.
    own = config.keys() - set(config.get("_use_default_values", ()))
    missing = {key: value for key, value in settings.items() if key not in own}
    scheduler_class = getattr(import_module("diffusers"), class_name)
    pipe.scheduler = scheduler_class.from_config(config, **missing)


def model_name(pipe: DiffusionPipeline) -> str:
    """What to call the pipeline's model in results: Hub id, `pocket`, or a path's last name."""
    return hub.name_of(str(pipe.name_or_path or "unknown"))


def clipseg_for(model: str | DiffusionPipeline) -> str:
    """The CLIPSeg that belongs to a pipeline, or to what `model_name` calls it."""
    name = model if isinstance(model, str) else model_name(model)
    return hub.POCKET if name == hub.POCKET else hub.CLIPSEG


def scheduler_name(text: str, *, on_flows: bool = False) -> str:
    """The name in SCHEDULERS that `text` means, in any usual spelling, AUTOMATIC1111's too.

    Raises InputError for none, and for one that there is not `on_flows`, where that matters.
    """
    known = [name for name in SCHEDULERS if not on_flows or name in FLOW_SCHEDULERS]
    for name in known:
        if _squash(text) in (_squash(name), _squash(SAMPLER_NAMES[name])):
            return name
    where = " with Stable Diffusion 3" if on_flows else ""
    raise InputError(f"--scheduler must be one of {', '.join(known)}{where}, got {text!r}")


def _squash(text: str) -> str:
    return re.sub(r"[\s_-]", "", text.lower())


def pick_device(name: str | torch.device | None = None) -> torch.device:
    """The device of that name, by itself the first of cuda, mps, xpu and cpu that is present."""
    import torch

    text = None if name is None else str(name)

    counts = {
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
        "xpu": torch.xpu.device_count() if torch.xpu.is_available() else 0,
        "cpu": 1,
    }
    if text is None:
        return torch.device(next(name for name, count in counts.items() if count))
    kind, _, index = text.partition(":")
    if not re.fullmatch(r"\w+(:\d{1,3})?", text, re.ASCII) or int(index or 0) >= counts.get(
        kind, 0
    ):
        present = [f"{name}:{i}" if n > 1 else name for name, n in counts.items() for i in range(n)]
        raise InputError(f"--device must be present ({', '.join(present)}), got {text!r}")
    return torch.device(text)


def pick_dtype(name: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype of that name, be it torch's own (`float16`, `torch.float16`) or shorter (`fp16`).

    By itself fp16 on GPUs, bf16 on CPUs that have it, else fp32.
    """
    import torch

    text = str(name).removeprefix("torch.")
    text = DTYPE_NAMES.get(text, text)
    if name is None:
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


def _precision(
    source: Path, dtype: str | torch.dtype | None, device: torch.device, on_flows: bool = False
) -> torch.dtype:
    """The dtype that is asked for; by itself the model's own, or else the device's best."""
    if dtype is None and device.type == "cpu" and hub.name_of(source) == hub.POCKET:
        dtype = "fp32"  # bf16 gains nothing on a model as small, and fp32 repeats exactly
    elif dtype is None and device.type != "cpu" and on_flows:
        dtype = "bf16"  # what Stable Diffusion 3 was trained in; its T5 overflows in fp16
    return pick_dtype(dtype, device)


def _load(cls: Any, source: Path, configuration: Path, **options: Any) -> Any:
    """A pipeline or a network of diffusers or transformers from a folder or a single file."""
    options["local_files_only"] = True
    if source.is_file():
        return cls.from_single_file(str(source), config=str(configuration), **options)
    return cls.from_pretrained(str(source), use_safetensors=True, **options)


def _networks(folder: Path, precision: torch.dtype, but: Container[str]) -> dict[str, Any]:
    """The networks that a diffusers folder's model_index.json names, `but` for some."""
    return {
        name: _network(cls, name, folder / name, folder / name, precision)
        for name, cls in _classes(folder).items()
        if name not in but
    }


def _classes(folder: Path) -> dict[str, Any]:
    """The classes of the parts with weights that a diffusers folder's model_index.json names."""
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    classes = {
        name: getattr(import_module(entry[0]), entry[1])
        for name, entry in index.items()
        if isinstance(entry, list) and entry[0] in ("diffusers", "transformers")
    }
    return {name: cls for name, cls in classes.items() if hasattr(cls, "named_parameters")}


def _name_gaps(file: Path, configuration: Path) -> None:
    """Raise ValueError for the first network that a single file does not hold whole.

    A pipeline says only that something does not fit. Its networks, each by itself, say what.
    """
    for name, cls in _classes(configuration).items():
        if hasattr(cls, "from_single_file"):
            try:
                _load(_checking(cls, name), file, configuration / name)
            except Exception as error:
                raise ValueError(f"of the {name}: {one_line(error)}") from error


def _lent(names: Iterable[str], lender: Path, precision: torch.dtype) -> dict[str, Any]:
    """The text encoders that a single file lacks, from the folder of the model that lends them."""
    cls = import_module("transformers").CLIPTextModelWithProjection
    folders = {name: lender / name for name in names}
    return {
        name: _network(cls, name, folder, folder, precision) for name, folder in folders.items()
    }


def _network(cls: Any, part: str, source: Path, configuration: Path, precision: torch.dtype) -> Any:
    """One network from a folder or a single file. Raises ValueError where it is not whole."""
    if source.is_file():
        network = _load(_checking(cls, part), source, configuration, torch_dtype=precision)
        network.__class__ = cls
        return network
    # What has another shape would otherwise end the loading, uncounted, in words of a library.
    options = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    network, report = _load(cls, source, configuration, torch_dtype=precision, **options)
    _check_whole(part, network, report["missing_keys"], report["mismatched_keys"])
    return network


def _checking(cls: Any, part: str) -> Any:
    """The class, whose networks check that they are whole before they are moved.

    From a single file diffusers moves a network at once, which ends without a name for what lacks.
    """

    class Checking(cls):
        def to(self, *args: Any, **kwargs: Any) -> Any:
            _check_whole(part, self)
            return super().to(*args, **kwargs)

    return Checking


def _check_whole(
    part: str,
    network: Any,
    missing: Iterable[str] = (),
    misshapen: Iterable[Sequence[Any]] = (),
) -> None:
    """Raise ValueError, which names the part and how many, for tensors that were not loaded.

    transformers goes on with random numbers in their place, diffusers leaves them on "meta".
    """
    names = [name for name, *_ in misshapen]
    if names:
        raise ValueError(f"{len(names)} tensors of the {part} have another shape: {names[0]}")
    on_meta = {name for name, each in network.state_dict().items() if each.is_meta}
    names = sorted({*missing, *on_meta})
    if names:
        raise ValueError(f"there is no {names[0]}: {len(names)} tensors of the {part} are missing")


def _check_parts(pipe: DiffusionPipeline) -> None:
    """Raise ValueError for parts that are not whole, or not made for each other."""
    from families import family_of, networks_of

    for name, network in networks_of(pipe).items():
        _check_whole(name, network)
    for what, found, needed in family_of(pipe).joints:
        if found != needed:
            raise ValueError(f"the {what} must be {needed}, got {found}")
    for number in ("", "_2", "_3"):
        tokenizer = getattr(pipe, f"tokenizer{number}", None)
        if tokenizer is not None:
            text = getattr(pipe, f"text_encoder{number}").config
            _check_words(tokenizer, text)
            _check_length(tokenizer, text)


def _check_words(tokenizer: Any, text: Any) -> None:
    """Raise ValueError for words that a text encoder of this configuration does not know."""
    words = len(tokenizer)
    if words > text.vocab_size:
        raise ValueError(f"the tokenizer has {words} words, the text encoder {text.vocab_size}")


def _check_length(tokenizer: Any, text: Any) -> None:
    """Raise ValueError for more tokens than the text encoder takes, where the tokenizer decides."""
    length = tokenizer.model_max_length
    takes = getattr(text, "max_position_embeddings", length)  # T5 takes any number
    if not 2 < length <= takes:
        raise ValueError(f"the tokenizer gives {length} tokens, the text encoder takes {takes}")


@contextmanager
def _loading(source: Path, pipeline: str = "StableDiffusionPipeline") -> Iterator[Any]:
    """Gives diffusers, without its chatter, and turns what fails into one line of our own."""
    with importing():  # for real, since diffusers is lazy: this is no fault of the weights
        torch = import_module("torch")
        _quiet()
        getattr(import_module("diffusers"), pipeline)
    before = torch.get_default_dtype()
    try:
        with memory_errors(), warnings.catch_warnings():
            # torch_dtype is the one name that every version of diffusers in range knows.
            warnings.simplefilter("ignore", FutureWarning)
            yield import_module("diffusers")
    except TemperingError:
        raise
    except Exception as error:  # each library has its own for a file that it does not like
        entry = hub.cache_entry(source)
        remedy = f"delete {entry} and run again" if entry else "put a sound copy in its place"
        fault = f"weights of {hub.name_of(source)} are corrupt or do not fit"
        raise ModelError(f"{fault}: {one_line(error)}; {remedy}") from error
    finally:
        torch.set_default_dtype(before)  # which they change, and forget where something fails


def _quiet() -> None:
    """No bars and advice of transformers and diffusers from here on; the Hub client keeps its bars.

    What they say of prompts that are too long, the flows say in their own words.
    """
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars

    had_bars = not are_progress_bars_disabled()
    for library in ("transformers", "diffusers"):  # advice starts while diffusers is imported
        log = import_module(f"{library}.utils.logging")
        log.set_verbosity(CRITICAL)  # errors, too: they are raised as well
        log.disable_progress_bar()
    if had_bars:  # transformers' switch turned them off as well
        enable_progress_bars()
