"""Other engines for the networks that a picture's time is spent in: OpenVINO, and compiled torch.

A network is replaced by one that takes and gives the same, so whoever samples, looks or decodes
does not know. OpenVINO's form of a network is kept in the user's cache by the identity of its
weights: what a LoRA, another VAE or a finetune changes is converted anew.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from errors import one_line

# What decides, beside the weights, what is made of a network.
LIBRARIES = ("openvino", "torch", "diffusers", "transformers")
PRECISIONS = {torch.bfloat16: "bf16", torch.float32: "f32"}
UNFINISHED, A_DAY = ".unfinished", 86_400  # seconds
NETWORK, WEIGHTS, DIGESTS = "network.xml", "network.bin", "digests.json"

Notice = Callable[[str], None]
Tensors = dict[str, Tensor]


def compile_pipeline(pipe: DiffusionPipeline) -> None:
    """Let torch compile the denoiser, in place, at its first call.

    On a CPU with its weights frozen into the code, without which little is gained there.
    """
    network = getattr(pipe, _denoiser_of(pipe))
    network.compile(options={"freezing": True} if network.device.type == "cpu" else None)


def convert_pipeline(pipe: DiffusionPipeline, notice: Notice) -> None:
    """Let OpenVINO run a pipeline's denoiser and its decoders; its LoRAs become part of them."""
    if any(pipe.get_list_adapters().values()):
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    name = _denoiser_of(pipe)
    setattr(pipe, name, Denoiser(getattr(pipe, name), notice))
    pipe.vae.decoder = Decoder("the VAE", pipe.vae.decoder, pipe.vae.dtype, notice)
    tiny = getattr(pipe, "taesd", None)
    if tiny is not None:
        tiny.decoder = Decoder("the tiny decoder", tiny.decoder, tiny.dtype, notice)


def convert_clipseg(model: Any, notice: Notice) -> None:
    """The same of CLIPSeg's vision tower and decoder; its text, which is read once, is torch's."""
    tower = model.clip.vision_model
    del model.clip.vision_model  # which would hold its weights for as long as CLIPSeg is there
    model.clip.get_image_features = VisionTower(tower, model.dtype, notice)
    model.decoder = MaskDecoder(model.decoder, model.dtype, notice)


def _denoiser_of(pipe: DiffusionPipeline) -> str:
    return "transformer" if hasattr(pipe, "transformer") else "unet"


# --- In the place of the networks of diffusers and transformers.


class Denoiser(nn.Module):
    """In the place of a U-Net or a transformer."""

    def __init__(self, network: Any, notice: Notice) -> None:
        super().__init__()
        self.config, self.dtype, self.device = network.config, network.dtype, network.device

        def call(latents: Tensor, **given: Tensor) -> Sequence[Tensor]:
            return network(latents, **nested(given), return_dict=False)

        self._engine = Engine("the denoiser", network, call, network.dtype, notice)

    def forward(
        self, latents: Tensor, timestep: Tensor, *, return_dict: bool = False, **more: Any
    ) -> tuple[Tensor, ...]:
        return tuple(self._engine({"latents": latents, "timestep": timestep, **flat(more)}))


class Decoder(nn.Module):
    """In the place of the part of an autoencoder that decodes."""

    def __init__(self, title: str, network: nn.Module, dtype: torch.dtype, notice: Notice) -> None:
        super().__init__()
        self._engine = Engine(title, network, lambda latents: [network(latents)], dtype, notice)

    def forward(self, latents: Tensor, *_: None) -> Tensor:
        return self._engine({"latents": latents})[0]


class VisionTower:
    """In the place of `get_image_features` of CLIPSeg's CLIP, for its hidden states alone."""

    def __init__(self, network: Any, dtype: torch.dtype, notice: Notice) -> None:
        def call(pixels: Tensor) -> Sequence[Tensor]:
            return network(
                pixels, interpolate_pos_encoding=True, output_hidden_states=True, return_dict=True
            ).hidden_states

        self._engine = Engine("CLIPSeg", network, call, dtype, notice)

    def __call__(self, pixel_values: Tensor, **_: object) -> SimpleNamespace:
        return SimpleNamespace(hidden_states=self._engine({"pixels": pixel_values}))


class MaskDecoder(nn.Module):
    """In the place of CLIPSeg's decoder."""

    def __init__(self, network: nn.Module, dtype: torch.dtype, notice: Notice) -> None:
        super().__init__()

        def call(classes: Tensor, **layers: Tensor) -> Sequence[Tensor]:
            return [network(list(layers.values()), classes).logits]

        self._engine = Engine("CLIPSeg's decoder", network, call, dtype, notice)

    def forward(self, layers: Sequence[Tensor], classes: Tensor) -> SimpleNamespace:
        given = {f"layer{number}": layer for number, layer in enumerate(layers)}
        return SimpleNamespace(logits=self._engine({"classes": classes, **given})[0])


def flat(nested: Mapping[str, Any]) -> Tensors:
    """Tensors by dotted names, of which some lie in mappings; what is None is left out."""
    found: Tensors = {}
    for name, value in nested.items():
        if isinstance(value, Mapping):
            found |= {f"{name}.{inner}": each for inner, each in flat(value).items()}
        elif value is not None:
            found[name] = value
    return found


def nested(flat: Mapping[str, Tensor]) -> dict[str, Any]:
    """The other way round, one level deep."""
    found: dict[str, Any] = {}
    for name, value in flat.items():
        outer, _, inner = name.partition(".")
        if inner:
            found.setdefault(outer, {})[inner] = value
        else:
            found[name] = value
    return found


# --- OpenVINO.


class Engine:
    """A network that OpenVINO runs: tensors by name in, tensors out, in the dtype of the network.

    It is converted at its first call, or taken from the cache, and the original given up. It is
    compiled for the sizes of the first call, and once more for all others: sizes that are known are
    a seventh faster (Stable Diffusion's U-Net at 512x512 on a CPU with AMX: 4.2 s, else 4.8).
    """

    def __init__(
        self,
        title: str,
        network: nn.Module,
        call: Callable[..., Sequence[Tensor]],
        dtype: torch.dtype,
        notice: Notice,
    ) -> None:
        self._title = title
        self._call: Callable[..., Sequence[Tensor]] | None = call
        self._network: nn.Module | None = network
        self._dtype = dtype
        self._notice = notice
        self._model: Any = None
        self._first: dict[str, tuple[int, ...]] = {}  # sizes of the first call
        self._requests: dict[bool, Any] = {}  # for these sizes, and for others

    def __call__(self, given: Tensors) -> list[Tensor]:
        given = {name: _plain(each) for name, each in given.items()}
        sizes = {name: tuple(each.shape) for name, each in given.items()}
        if self._model is None:
            self._model, self._first = self._ready(given), sizes
            self._network = self._call = None
        known = sizes == self._first
        if known not in self._requests:
            self._requests[known] = self._compiled(sizes if known else {})
        arrays = {name: each.numpy() for name, each in given.items()}
        found = self._requests[known].infer(arrays, share_inputs=True)
        # The request's own memory is written to again by the next call.
        return [torch.from_numpy(each.copy()).to(self._dtype) for each in found.to_tuple()]

    def _compiled(self, sizes: Mapping[str, tuple[int, ...]]) -> Any:
        import openvino

        model = self._model.clone()
        if sizes:
            model.reshape({name: list(size) for name, size in sizes.items()})
        options = {
            "INFERENCE_PRECISION_HINT": PRECISIONS[self._dtype],
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        return openvino.Core().compile_model(model, "CPU", options).create_infer_request()

    def _ready(self, given: Tensors) -> Any:
        """The network from the cache, where it is put first if it is not there, or is damaged."""
        import openvino

        assert self._network is not None
        folder = cache_folder() / identity(self._network, self._title, given)
        if not is_sound(folder):
            self._notice(f"converting {self._title} for OpenVINO, once")
            model = self._converted(given)
            try:
                store(model, folder)
            except (OSError, RuntimeError) as error:
                self._notice(f"it is not kept in {folder.parent}: {one_line(error)}")
                return model
        return openvino.Core().read_model(folder / NETWORK)

    def _converted(self, given: Tensors) -> Any:
        import openvino

        assert self._network is not None
        # Of bf16 in another order OpenVINO keeps the address of a copy that is gone by then.
        self._network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        traced = _Traced(self._network, self._call, list(given), self._dtype).eval()
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of whatever a trace takes for a constant
            model = openvino.convert_model(traced, example_input=tuple(given.values()))
        for port, name in zip(model.inputs, given, strict=True):
            port.get_tensor().set_names({name})
        return model


class _Traced(nn.Module):
    """A network as a function of tensors in a fixed order, in float32 at both ends."""

    def __init__(self, network: nn.Module, call: Any, names: list[str], dtype: torch.dtype) -> None:
        super().__init__()
        self.network = network
        self._call, self._names, self._dtype = call, names, dtype

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = {
            name: each.to(self._dtype) if each.is_floating_point() else each
            for name, each in zip(self._names, tensors, strict=True)
        }
        return tuple(each.float() for each in self._call(**given))


def _plain(tensor: Tensor) -> Tensor:
    """As numpy can hold it."""
    return (tensor.float() if tensor.is_floating_point() else tensor).detach().contiguous()


def cache_folder() -> Path:
    """Where converted networks are kept: on the disk that is meant for the Hub's cache."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "tempering-openvino"


def identity(network: nn.Module, title: str, given: Tensors) -> str:
    """A digest of all that a converted network follows from: weights, architecture, libraries."""
    shapes = {name: (each.ndim, str(each.dtype)) for name, each in given.items()}
    facts = [title, repr(network), shapes, [version(name) for name in LIBRARIES]]
    digest = hashlib.sha256(repr(facts).encode())
    for name, tensor in network.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def is_sound(folder: Path) -> bool:
    """Whether a converted network is there, as it was written."""
    try:
        digests = json.loads((folder / DIGESTS).read_text(encoding="utf-8"))
        return bool(digests == digests_of(folder))
    except (OSError, ValueError):
        return False


def digests_of(folder: Path) -> dict[str, str]:
    found = {}
    for name in (NETWORK, WEIGHTS):
        with (folder / name).open("rb") as file:
            digest = hashlib.sha256()
            while chunk := file.read(1 << 20):
                digest.update(chunk)
            found[name] = digest.hexdigest()
    return found


def store(model: Any, folder: Path) -> None:
    """Write a converted network, whole or not at all; another process may do the same meanwhile."""
    import openvino

    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f"*{UNFINISHED}"):  # by who was killed
        if time.time() - left.stat().st_mtime > A_DAY:
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, suffix=UNFINISHED) as unfinished:
        ready = Path(unfinished) / folder.name
        openvino.save_model(model, ready / NETWORK, compress_to_fp16=False)
        (ready / DIGESTS).write_text(json.dumps(digests_of(ready)), encoding="utf-8")
        if not is_sound(folder):
            shutil.rmtree(folder, ignore_errors=True)
            ready.replace(folder)
