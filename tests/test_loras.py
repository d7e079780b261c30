"""loras.py, and what a LoRA does to a pipeline: the same as by diffusers' own loader."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from loopback import Hub, child, hub
from pictures import diffusers_picture_and_latents, farthest
from safetensors.torch import save_file

from errors import InputError, ModelError
from families import family_of
from kinds import MODEL, layout_of
from loaders import load_pipeline
from loras import FORMS, check, check_fit, locate, parsed
from sampling import Sampler
from settings import Tempering

__all__ = ["hub"]  # a fixture is used by its name

BRIEF = Tempering(steps=3, stoptime=2, backsteps=1)
USUAL = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA for each tiny family, another for the first, and those that kohya's scripts write."""
    folder = tmp_path_factory.mktemp("loras")
    for family in tiny.FAMILIES:
        tensors = tiny.lora(tiny.shared(family))
        save_file(tensors, folder / f"{family}.safetensors")
        if family != "sd3":
            save_file(tiny.kohya(tensors), folder / f"{family}-kohya.safetensors")
    save_file(tiny.lora(tiny.shared("sd2"), seed=1), folder / "second.safetensors")
    return folder


# What the flag means.


@pytest.mark.parametrize(
    ("text", "name", "weight"),
    [
        ("style", "style", 1),
        ("a/b", "a/b", 1),
        ("a/b:0.5", "a/b", 0.5),
        ("a/b/c.safetensors:-1", "a/b/c.safetensors", -1),
        ("style.safetensors:1e-1", "style.safetensors", 0.1),
        ("C:\\loras\\style.safetensors", "C:\\loras\\style.safetensors", 1),
        ("C:\\loras\\style.safetensors:2", "C:\\loras\\style.safetensors", 2),
    ],
)
def test_the_weight_stands_behind_the_last_colon(text: str, name: str, weight: float) -> None:
    assert parsed(text) == (name, weight)


def test_a_file_with_a_colon_in_its_name_is_taken_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "style:0.5"
    file.write_bytes(b"")
    assert parsed(str(file)) == (str(file), 1)


@pytest.mark.parametrize("weight", ["much", "nan", "inf", ""])
def test_a_weight_that_is_no_number_is_refused(weight: str) -> None:
    with pytest.raises(InputError) as raised:
        parsed(f"a/b:{weight}")
    text = f"--lora must have a finite number as its weight, got 'a/b:{weight}'"
    assert str(raised.value) == text


def test_what_can_not_name_a_lora_is_refused(folder: Path, tmp_path: Path) -> None:
    save_file({"weight": torch.ones(1)}, tmp_path / "plain.safetensors")
    (tmp_path / "empty").mkdir()
    for name, fault in {
        "": "is none of them",
        "a style": "is none of them",
        "style.safetensors": "is none of them",
        "./nowhere/style.safetensors": "is none of them",
        "old.pt": "is a .pt file, which can run code when it is loaded",
        str(tmp_path / "plain.safetensors"): "has no LoRA in it",
        str(tmp_path / "empty"): "has no .safetensors file",
        str(folder): "has several, of which one must be named: sd2-kohya.safetensors, sd2.safet",
    }.items():
        with pytest.raises(InputError) as raised:
            check(name)
        assert str(raised.value).startswith(f"--lora must be {FORMS}, but {name!r} {fault}")
    for name in (str(folder / "sd2.safetensors:0.3"), "owner/style", "owner/style/x.safetensors:2"):
        check(name)


def test_a_lora_is_called_by_its_file_or_by_what_it_lies_in(tmp_path: Path) -> None:
    lora = tiny.lora(tiny.shared("sd2"))
    (tmp_path / "my style").mkdir()
    save_file(lora, tmp_path / "my style" / USUAL)
    save_file(lora, tmp_path / "my style" / "other.safetensors")
    assert locate(str(tmp_path / "my style"), offline=True).file.name == USUAL
    assert locate(f"{tmp_path / 'my style'}:0.5", offline=True).name == "my style"
    assert locate(f"{tmp_path / 'my style' / 'other.safetensors'}", offline=True).name == "other"


def test_the_hash_is_automatic1111s(tmp_path: Path) -> None:
    """Of what stands behind the header; or the one that kohya's scripts have written into it."""
    tensors = {"lora_unet_x.alpha": torch.tensor([1.0, 2.0])}
    save_file(tensors, tmp_path / "plain.safetensors")
    save_file(tensors, tmp_path / "signed.safetensors", {"sshs_model_hash": "0123456789abcdef"})
    body = hashlib.sha256(torch.tensor([1.0, 2.0]).numpy().tobytes()).hexdigest()
    assert locate(str(tmp_path / "plain.safetensors"), offline=True).hash == body[:12]
    assert locate(str(tmp_path / "signed.safetensors"), offline=True).hash == "0123456789ab"


def test_the_hub_gives_the_one_file_that_is_meant(hub: Hub, folder: Path, tmp_path: Path) -> None:
    lora, other = ((folder / name).read_bytes() for name in ("sd2.safetensors", "sd3.safetensors"))
    beside = {"README.md": b"not needed", "style.png": b"not needed", "adapter.json": b"{}"}
    hub.repositories["one/style"] = {**beside, "Style v1.safetensors": lora}
    hub.repositories["usual/style"] = {**beside, "a.safetensors": other, USUAL: lora}
    hub.repositories["two/styles"] = {**beside, "a.safetensors": other, "b.safetensors": lora}
    hub.repositories["no/style"] = beside
    hub.repositories["no/lora"] = {**beside, "a.safetensors": b"{}"}
    code = """
    from loras import locate
    answer = []
    for name in sys.argv[1:]:
        try:
            found = locate(name, offline=False)
            answer.append([found.name, found.weight, found.file.name, locate(name, True) == found])
        except TemperingError as error:
            answer.append(str(error))"""
    faults = "two/styles", "no/style", "no/lora"
    names = "one/style:0.5", "usual/style", "two/styles/b.safetensors"
    said = child(code.strip(), hub.environment(tmp_path), *faults, *names)["answer"]
    assert said == [
        "two/styles can not be used: it has several, of which one must be named: a.safetensors, "
        "b.safetensors",
        "no/style can not be used: it has no .safetensors file",
        "no/lora can not be used: a.safetensors has no LoRA in it",
        ["Style v1", 0.5, "Style v1.safetensors", True],
        ["style", 1, USUAL, True],
        ["b", 1, "b.safetensors", True],
    ]
    assert hub.downloads() == [
        "no/lora/a.safetensors",
        "one/style/Style v1.safetensors",
        "two/styles/b.safetensors",
        f"usual/style/{USUAL}",
    ]


# What it does.


@torch.no_grad()
@pytest.mark.parametrize("lora", ["sd2", "sd2-kohya", "sdxl", "sdxl-kohya", "sd3"])
def test_a_lora_of_every_family_changes_what_diffusers_changes(
    lora: str, folder: Path, tiny_folders: dict[str, Path]
) -> None:
    family = lora.partition("-")[0]
    name = f"{folder / lora}.safetensors:0.7"
    ours = load_pipeline(tiny_folders[family], lora=[name], device="cpu", dtype="fp32")
    theirs = type(ours).from_pretrained(tiny_folders[family])
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = ours.scheduler
    theirs.load_lora_weights(folder, weight_name=f"{lora}.safetensors", adapter_name="x")
    theirs.set_adapters(["x"], [0.7])
    assert ours.get_list_adapters().keys() == theirs.get_list_adapters().keys()
    plain = painted(tiny.shared(family))
    found = painted(ours)
    image, latents = diffusers_picture_and_latents(theirs, "a cat", BRIEF, 7)
    assert torch.equal(found[1], latents)
    assert farthest(found[0], image) == 0
    assert farthest(found[0], plain[0]) > 4


def test_several_loras_add_up_and_weight_0_is_none(
    folder: Path, tiny_folders: dict[str, Path]
) -> None:
    def with_loras(*texts: str) -> Any:
        names = [str(folder / text) for text in texts]
        pipe = load_pipeline(tiny_folders["sd2"], lora=names, device="cpu", dtype="fp32")
        return painted(pipe)[0]

    plain = painted(load_pipeline(tiny_folders["sd2"], device="cpu", dtype="fp32"))[0]
    first, both = (
        with_loras("sd2.safetensors"),
        with_loras("sd2.safetensors", "second.safetensors:0.5"),
    )
    assert farthest(first, both) > 4
    assert farthest(with_loras("sd2.safetensors", "second.safetensors:0"), first) <= 1
    assert farthest(with_loras("sd2.safetensors:0"), plain) <= 1


@pytest.mark.parametrize(
    ("family", "lora"),
    [
        (family, lora)
        for family in tiny.FAMILIES
        for lora in ("sd2", "sd2-kohya", "sdxl", "sdxl-kohya", "sd3")
        if not lora.startswith(family)
    ],
)
def test_a_lora_of_another_family_is_refused_by_its_header(
    family: str, lora: str, folder: Path, tiny_folders: dict[str, Path]
) -> None:
    found = locate(f"{folder / lora}.safetensors", offline=True)
    layout = layout_of(tiny_folders[family], MODEL)
    other = f"^--lora must be of the model's own family, but {lora} (changes|is for text of width)"
    with pytest.raises(InputError, match=other):
        check_fit(found, layout, tiny_folders[family])
    of_its_own = tiny_folders[lora.removesuffix("-kohya")]
    check_fit(found, layout_of(of_its_own, MODEL), of_its_own)


def test_a_lora_of_another_size_is_one_line_of_the_programs_own(
    tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    wide = tmp_path / "wide.safetensors"
    own = tiny.lora(tiny.shared("sd3"))
    save_file(
        {name: torch.cat([value, value], int("lora_A" in name)) for name, value in own.items()},
        wide,
    )
    said: list[logging.LogRecord] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record)

    listener = Listener()
    logging.getLogger("diffusers").addHandler(listener)
    try:
        with pytest.raises(ModelError, match=r"^the LoRA wide does not fit sd3: [^\n]*$"):
            load_pipeline(tiny_folders["sd3"], lora=[str(wide)], device="cpu")
    finally:
        logging.getLogger("diffusers").removeHandler(listener)
    assert said == []


def test_a_lora_that_names_no_part_is_refused_in_one_line(
    tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    """As some scripts write them, of the U-Net's own names."""
    tensors = tiny.lora(tiny.shared("sd2"))
    bare = {name.removeprefix("unet."): each for name, each in tensors.items() if "unet" in name}
    save_file(bare, tmp_path / "bare.safetensors")
    with pytest.raises(ModelError, match=r"^the LoRA bare does not fit sd2: it names no part that"):
        load_pipeline(tiny_folders["sd2"], lora=[str(tmp_path / "bare.safetensors")], device="cpu")


def test_a_lora_that_is_not_finite_is_named_and_not_its_model(
    tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    tensors = tiny.lora(tiny.shared("sd2"))
    unsound = {name: each * float("nan") for name, each in tensors.items() if "unet" in name}
    save_file(unsound, tmp_path / "unsound.safetensors")
    name = str(tmp_path / "unsound.safetensors")
    pipe = load_pipeline(tiny_folders["sd2"], lora=[name], device="cpu", dtype="fp32")
    with pytest.raises(ModelError, match=r"because weights of a LoRA of unet are not: put a sound"):
        painted(pipe)


def painted(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    sampler = Sampler(family_of(pipe), ["a cat"], BRIEF)
    with torch.no_grad():
        branches = sampler.start([7])
        sampler.denoise(branches, BRIEF.steps)
        return sampler.decode(branches)[0], branches[0].latents
