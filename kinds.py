"""The kinds of model that the flags take: what each consists of, and how it is told from others.

A model is a folder as diffusers and transformers write it, of which a marker file says what it is,
or a single .safetensors file, which is told by its tensors' names and shapes. Importing this is
part of every refusal of bad input, so nothing heavy is imported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

Shapes = Mapping[str, Sequence[int]]  # of a single file's tensors, by name

WEIGHTS = ".safetensors"
PICKLES = (".ckpt", ".bin", ".pt", ".pth")
_SMALL = ("*.json", "*.txt")
_LARGEST_HEADER = 100_000_000  # bytes, safetensors' own limit

# What models of other kinds are, by what they call themselves.
_OTHER_CLASSES = {
    "Flux": "FLUX",
    "XLImg2Img": "the refiner of Stable Diffusion XL or like it",
    "Inpaint": "an inpainting model",
    "ControlNet": "a ControlNet",
    "Upscale": "an upscaler",
    "Video|Animate|Wan|LTX|Mochi|CogVideo|Hunyuan|Cosmos": "a video model",
}
_ON_EDM = "a model on EDM's schedule"
# The same by the names of a single file's tensors.
_OTHER_TENSORS = {
    r"(.*\.)?double_blocks\.": "FLUX",
    r"conditioner\.embedders\.0\.model\.": "the refiner of Stable Diffusion XL",
    r"edm_mean": _ON_EDM,
    r"(control_model|controlnet_\w+|input_hint_block|zero_convs)\.": "a ControlNet",
    r"(.*\.)?(motion_modules|temporal_\w+|time_stack|time_mixer)\.": "a video model",
}
_LORA_TENSORS = r"(?i)(.*[._])?(lora|lokr|hada|oft|dora)[._]"


@dataclass(frozen=True)
class Layout:
    """What a model of one family consists of."""

    classes: tuple[str, ...]  # what its marker may call it; by the first it is loaded
    parts: Mapping[str, tuple[str, ...]]  # folder -> files it needs; "a|b" is either of two
    optional: tuple[str, ...] = ()  # parts that a model may do without: all of them or none
    tensors: Mapping[str, str] = field(default_factory=dict)  # of a single file: part -> names
    # Of a single file, too: parts that it may lack -> names of their tensors, and names -> the
    # model that has such parts, and the configuration of all; the first that fits.
    lent: Mapping[str, str] = field(default_factory=dict)
    lenders: Mapping[str, str] = field(default_factory=dict)
    on_flows: bool = False  # the model's schedule is a flow's
    size_factor: int = 8  # sizes are multiples of so many pixels
    taesd: str = ""  # the Hub id of the tiny decoder for its latents

    @property
    def needs(self) -> list[str]:
        return [
            "|".join(f"{folder}/{name}".lstrip("/") for name in need.split("|"))
            for folder, needs in self.parts.items()
            for need in needs
        ]

    @property
    def patterns(self) -> list[str]:
        """What is fetched of a Hub repository: neither pickles nor variants such as fp16."""
        names = [name for need in self.needs for name in need.split("|")]
        weights = [name for name in names if name.endswith(WEIGHTS)]
        shards = [name.replace(WEIGHTS, f"-?????-of-?????{WEIGHTS}") for name in weights]
        # Tokenizers may have more files than they need.
        rich = [folder for folder, needs in self.parts.items() if "tokenizer_config.json" in needs]
        small = [f"{folder}/{each}".lstrip("/") for folder in rich for each in _SMALL]
        return [*names, *shards, *(f"{name}.index.json" for name in weights), *small]

    @property
    def bare(self) -> Layout:
        """Without the optional parts."""
        return self._of(lambda part, need: part not in self.optional)

    def holding(self, holds: Callable[[str], bool]) -> Layout:
        """Of a model that `holds` some parts: without the optional ones where it does not."""
        return self if not self.optional or holds(self.optional[0]) else self.bare

    def lacking(self, shapes: Shapes) -> list[str]:
        """The parts that are not in a single file of this layout."""
        own = {part: names for part, names in self.lent.items() if part in self.parts}
        return [part for part, names in own.items() if not _named(names, shapes)]

    def borrowed(self, shapes: Shapes) -> Layout:
        """What a single file needs beside itself: configuration, and weights that it lacks."""
        lacking = self.lacking(shapes)
        return self._of(lambda part, need: part in lacking or not need.endswith(WEIGHTS))

    def lender(self, shapes: Shapes) -> str:
        """The Hub id of the model that a single file borrows from."""
        return next(repo for names, repo in self.lenders.items() if _named(names, shapes))

    def _of(self, wanted: Callable[[str, str], bool]) -> Layout:
        """The same with less: of each part the needs that are wanted, and no part without any."""
        kept = {
            part: tuple(need for need in needs if wanted(part, need))
            for part, needs in self.parts.items()
        }
        parts = {part: needs for part, needs in kept.items() if needs}
        return replace(self, parts=parts, optional=tuple(p for p in self.optional if p in parts))


@dataclass(frozen=True)
class Kind:
    """What one of the model flags asks for."""

    flag: str
    title: str
    pocket: Path
    marker: tuple[str, str]  # file and key that tell what a model is
    layouts: tuple[Layout, ...]
    instead: str  # what works where the Hub does not

    @property
    def forms(self) -> str:
        single = any(layout.tensors for layout in self.layouts)
        return f"a folder, {'a .safetensors file, ' * single}a Hub id or pocket"

    @property
    def bare(self) -> Kind:
        """Of models without their optional parts."""
        return replace(self, layouts=tuple(layout.bare for layout in self.layouts))

    def called(self, name: object) -> Layout | None:
        """The layout of models that call themselves `name`; the first of those that do not say."""
        if name is None:
            return self.layouts[0]
        return next((layout for layout in self.layouts if name in layout.classes), None)

    def made_of(self, shapes: Shapes) -> Layout | None:
        """The layout of a single file with these tensors."""
        found = (layout for layout in self.layouts if layout.tensors and not _lacks(layout, shapes))
        return next(found, None)


_BUNDLED = Path(__file__).parent / "pocket" / "weights"
_DIFFUSERS = ("config.json", "diffusion_pytorch_model.safetensors")
_TRANSFORMERS = ("config.json", "model.safetensors")
_TOKENIZER = ("tokenizer_config.json", "vocab.json|tokenizer.json", "merges.txt|tokenizer.json")
_PROCESSOR = "preprocessor_config.json|processor_config.json"
_T5_TOKENIZER = ("tokenizer_config.json", "tokenizer.json|spiece.model")
_INDEX = {"": ("model_index.json",)}
_UNET = {"unet": _DIFFUSERS}
_VAE_AND_CLIP = {
    "vae": _DIFFUSERS,
    "text_encoder": _TRANSFORMERS,
    "tokenizer": _TOKENIZER,
    "scheduler": ("scheduler_config.json",),
}
_SECOND_CLIP = {"text_encoder_2": _TRANSFORMERS, "tokenizer_2": _TOKENIZER}
_T5 = {"text_encoder_3": _TRANSFORMERS, "tokenizer_3": _T5_TOKENIZER}
# The same in single files, by the names of the tensors.
_UNET_TENSORS = {"U-Net": r"model\.diffusion_model\.\w+_blocks?\."}
_VAE_ENTRY = r"(.*\.)?decoder\.conv_in\.weight"  # takes the latents
_VAE_TENSORS = {"VAE": r"(first_stage_model|vae)\."}

STABLE_DIFFUSION = "CompVis/stable-diffusion-v1-4"
MODEL = Kind(
    flag="--model",
    title="Stable Diffusion 1, 2, XL or 3",
    pocket=_BUNDLED / "stable-diffusion",
    marker=("model_index.json", "_class_name"),
    layouts=(
        Layout(
            classes=("StableDiffusionPipeline", "LatentConsistencyModelPipeline"),
            parts={**_INDEX, **_UNET, **_VAE_AND_CLIP},
            tensors={
                **_UNET_TENSORS,
                **_VAE_TENSORS,
                "CLIP text model": r"cond_stage_model\.(transformer|model)\.",
            },
            lenders={
                r"cond_stage_model\.model\.": "stabilityai/stable-diffusion-2-1",
                "": STABLE_DIFFUSION,
            },
            taesd="madebyollin/taesd",
        ),
        Layout(
            classes=("StableDiffusionXLPipeline",),
            parts={**_INDEX, **_UNET, **_VAE_AND_CLIP, **_SECOND_CLIP},
            tensors={
                **_UNET_TENSORS,
                **_VAE_TENSORS,
                "first CLIP text model": r"conditioner\.embedders\.0\.transformer\.",
                "second CLIP text model": r"conditioner\.embedders\.1\.model\.",
            },
            lenders={"": "stabilityai/stable-diffusion-xl-base-1.0"},
            taesd="madebyollin/taesdxl",
        ),
        Layout(
            classes=("StableDiffusion3Pipeline",),
            parts={**_INDEX, "transformer": _DIFFUSERS, **_VAE_AND_CLIP, **_SECOND_CLIP, **_T5},
            optional=tuple(_T5),
            tensors={"MM-DiT": r"(.*\.)?joint_blocks\.", **_VAE_TENSORS},
            lent={
                "text_encoder": r"text_encoders\.clip_l\.",
                "text_encoder_2": r"text_encoders\.clip_g\.",
                "text_encoder_3": r"text_encoders\.t5xxl\.",
            },
            lenders={
                r".*\.x_block\.attn2\.": "stabilityai/stable-diffusion-3.5-medium",
                r".*\.x_block\.attn\.ln_q\.": "stabilityai/stable-diffusion-3.5-large",
                "": "stabilityai/stable-diffusion-3-medium-diffusers",
            },
            on_flows=True,
            size_factor=16,
            taesd="madebyollin/taesd3",
        ),
    ),
    instead="what works without it: --model pocket, a diffusers folder, a .safetensors file",
)
VAE = Kind(
    flag="--vae",
    title="an AutoencoderKL",
    pocket=_BUNDLED / "stable-diffusion" / "vae",
    marker=("config.json", "_class_name"),
    layouts=(
        Layout(
            classes=("AutoencoderKL",),
            parts={"": _DIFFUSERS},
            tensors={"VAE": _VAE_ENTRY},
        ),
    ),
    instead="what works without it: a VAE's folder, a .safetensors file, the model's own VAE",
)
OWN_TAESD = "taesd"  # a model's folder may hold its own tiny decoder under this name
TAESD = Kind(
    flag="--preview taesd",
    title="an AutoencoderTiny",
    pocket=MODEL.pocket / OWN_TAESD,
    marker=("config.json", "_class_name"),
    layouts=(Layout(classes=("AutoencoderTiny",), parts={"": _DIFFUSERS}),),
    instead="what works without it: --preview vae, half or linear",
)
SEGMENTER = Kind(
    flag="--clipseg",
    title="CLIPSeg",
    pocket=_BUNDLED / "clipseg",
    marker=("config.json", "model_type"),
    layouts=(
        Layout(
            classes=("clipseg",),
            parts={"": (*_TRANSFORMERS, *_TOKENIZER, _PROCESSOR)},
        ),
    ),
    instead="what works without it: a CLIPSeg folder, or --clipseg pocket with --model pocket",
)

# What judges look through: always by these names, from the Hub or its cache.
OWLV2 = "google/owlv2-base-patch16-ensemble"
CLIP = "openai/clip-vit-large-patch14"
BLIP_VQA = "Salesforce/blip-vqa-base"
_WORD_PIECES = ("tokenizer_config.json", "vocab.txt|tokenizer.json")
EYES = {
    repo: replace(
        SEGMENTER,
        flag="--judge",
        title=title,
        layouts=(
            Layout(classes=(model_type,), parts={"": (*_TRANSFORMERS, *tokenizer, _PROCESSOR)}),
        ),
        instead="what works without it: --judge none, and to judge the same pictures later with "
        "--resume",
    )
    for repo, title, model_type, tokenizer in (
        (OWLV2, "OWLv2", "owlv2", _TOKENIZER),
        (CLIP, "CLIP", "clip", _TOKENIZER),
        (BLIP_VQA, "BLIP", "blip", _WORD_PIECES),
    )
}


def shapes_of(file: Path) -> Shapes | None:
    """The tensors of a safetensors file by its header, which alone is read; None of another.

    A folder has none by itself.
    """
    if file.is_dir():
        return {}
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        text = opened.read(length if length <= _LARGEST_HEADER else 0)
    try:
        header = json.loads(text)
        shapes = {n: tensor["shape"] for n, tensor in header.items() if n != "__metadata__"}
        sound = all(type(size) is int for shape in shapes.values() for size in list(shape))
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        return None
    return shapes if sound else None


def layout_of(source: Path, kind: Kind) -> Layout:
    """The layout of a folder or file that is fit for the flag, with the parts that it has."""
    if source.is_dir():
        found = kind.called(marked(source, kind).get(kind.marker[1]))
        assert found is not None, f"{source} was not checked"
        return found.holding(lambda part: (source / part).is_dir())
    shapes = shapes_of(source) or {}
    found = kind.made_of(shapes)
    assert found is not None, f"{source} was not checked"
    lacking = found.lacking(shapes)
    return found.holding(lambda part: part not in lacking)


def fault_of_folder(folder: Path, kind: Kind, *, as_marked: bool = False) -> str | None:
    """What makes a folder unfit for a flag, as the end of a sentence.

    Optional parts may be missing; not so `as_marked`, of what the marker names.
    """
    try:
        said = marked(folder, kind)
        channels = _json(folder / "unet" / "config.json").get("in_channels", 4)
        schedule = _json(folder / "scheduler" / "scheduler_config.json")
    except ValueError as error:
        return f"has a corrupt {error}"

    def holds(part: str) -> bool:
        return said.get(part) not in (None, [None, None]) if as_marked else (folder / part).is_dir()

    name = said.get(kind.marker[1])
    if fault := fault_of_model(kind, name, lambda file: (folder / file).is_file(), holds):
        return fault
    if channels != 4:
        return f"is {_taking(channels)}, not {kind.title}"
    return f"is {_ON_EDM}, not {kind.title}" if "sigma_data" in schedule else None


def fault_of_model(
    kind: Kind, name: object, has: Callable[[str], bool], holds: Callable[[str], bool]
) -> str | None:
    """The same of a model that calls itself `name`, with tests for its files and its parts."""

    def present(need: str) -> bool:  # as it is, or in shards
        return any(has(file) or has(f"{file}.index.json") for file in need.split("|"))

    layout = kind.called(name)
    if layout is None:
        return f"is {_class_of(str(name))}, not {kind.title}"
    needs = layout.holding(holds).needs
    lacks = [need.replace("|", " or ") for need in needs if not present(need)]
    if not lacks:
        return None
    pickles = [re.sub(r"\bmodel\.safet", "pytorch_model.safet", name) for name in lacks]
    has_pickles = any(has(name.replace(WEIGHTS, ".bin")) for name in pickles)
    reason = " (.bin weights are not loaded: they can run code)" if has_pickles else ""
    return f"lacks {', '.join(lacks)}{reason}"


def fault_of_file(shapes: Shapes | None, kind: Kind) -> str | None:
    """What makes a single file unfit for a flag, as the end of a sentence."""
    layouts = [layout for layout in kind.layouts if layout.tensors]
    if not layouts:
        return "is a file"
    if shapes is None:
        return "is not a safetensors file"
    if kind.marker == MODEL.marker and (other := _other_model(shapes)):
        return f"is {other}, not {kind.title}"
    # Of what it resembles most.
    nearest = min(layouts, key=lambda each: len(_lacks(each, shapes)) / len(each.tensors))
    lacks = _lacks(nearest, shapes)
    return f"lacks the {' and the '.join(lacks)}" if lacks else None


def marked(folder: Path, kind: Kind) -> dict[str, Any]:
    """What the marker says; of a folder without it, what its configuration calls itself."""
    file, key = kind.marker
    own = {key: _json(folder / "config.json").get("_class_name")}
    return _json(folder / file) or own


def latent_channels(vae: Path) -> int | None:
    """How many channels the latents of a VAE's folder or single file have, as far as it says."""
    if vae.is_dir():
        channels = _json(vae / "config.json").get("latent_channels")
        return channels if isinstance(channels, int) else None
    shapes = [shape for name, shape in (shapes_of(vae) or {}).items() if re.match(_VAE_ENTRY, name)]
    return shapes[0][1] if shapes and len(shapes[0]) == 4 else None


def text_width(folder: Path) -> int | None:
    """How wide the text is that a folder's U-Net reads, where it has one that says so."""
    width = _json(folder / "unet" / "config.json").get("cross_attention_dim")
    return width if isinstance(width, int) else None


def _json(file: Path) -> dict[str, Any]:
    """The content of a JSON file, empty where there is none. Raises ValueError with its name."""
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ValueError(file.name)
    return content


def is_lora(shapes: Shapes | None) -> bool:
    """Whether a single file's tensors change a model's weights instead of being them."""
    return _named(_LORA_TENSORS, shapes or {})


def _lacks(layout: Layout, shapes: Shapes) -> list[str]:
    return [part for part, names in layout.tensors.items() if not _named(names, shapes)]


def _named(names: str, shapes: Shapes) -> bool:
    return any(re.match(names, name) for name in shapes)


def _class_of(name: str) -> str:
    """What a model of a class that is not taken is."""
    known = (what for names, what in _OTHER_CLASSES.items() if re.search(names, name))
    what = next(known, None)
    return f"{what} ({name})" if what else f"a {name}"


def _other_model(shapes: Shapes) -> str | None:
    """What the tensors are of, where that is known to be something else."""
    for names, what in _OTHER_TENSORS.items():
        if _named(names, shapes):
            return what
    if is_lora(shapes):
        return "a LoRA, which --lora takes"
    if any(len(shape) == 5 for shape in shapes.values()):  # convolutions over time, too
        return "a video model"
    first = shapes.get("model.diffusion_model.input_blocks.0.0.weight", (0, 4))
    channels = first[1] if len(first) > 1 else 0
    return None if channels == 4 else _taking(channels)


def _taking(channels: int) -> str:
    return "an inpainting model" if channels == 9 else f"a model that takes {channels} channels"
