"""hub.py: what can not name a model, and what the Hub is asked for.

Whatever talks to a Hub runs in a process of its own, against the stand-in of loopback.py.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from loopback import Hub, ask, closed_url, hub, hub_environment
from safetensors.torch import save_file

from errors import InputError
from hub import POCKET, check
from kinds import MODEL, SEGMENTER, STABLE_DIFFUSION, VAE

__all__ = ["hub"]  # a fixture is used by its name

UNET = "unet/diffusion_pytorch_model.safetensors"
FORMS = "a folder, a .safetensors file, a Hub id or pocket"


@pytest.mark.parametrize("text", [STABLE_DIFFUSION, "gpt2", "a/b-c_d.e", POCKET, str(MODEL.pocket)])
def test_usable_models_pass(text: str) -> None:
    check(text, MODEL)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "is none of them"),
        ("a black dog", "is none of them"),
        ("owner/na--me", "is none of them"),
        ("./nowhere", "does not exist"),
        ("/no/where", "does not exist"),
        ("~/no-such-folder-here", "does not exist"),
        ("some/folder/deep", "does not exist"),
        ("models\\mine", "does not exist"),
        ("mine.safetensors", "does not exist"),
        ("old.ckpt", "is a .ckpt file, which can run code when it is loaded"),
        ("x" * 5000, "can not be read ("),
    ],
)
def test_what_can_not_name_a_model(text: str, fault: str) -> None:
    with pytest.raises(InputError) as raised:
        check(text, MODEL)
    assert str(raised.value).startswith(f"--model must be {FORMS}, but {text!r} {fault}")


def test_folder_names_the_part_that_it_lacks(painter: Path) -> None:
    shutil.rmtree(painter / "scheduler")
    with pytest.raises(InputError) as raised:
        check(str(painter), MODEL)
    lacks = "lacks scheduler/scheduler_config.json"
    assert str(raised.value) == f"--model must be {FORMS}, but {str(painter)!r} {lacks}"


def test_folder_with_pickled_weights_alone_is_refused(painter: Path) -> None:
    text_encoder = painter / "text_encoder"
    (text_encoder / "model.safetensors").rename(text_encoder / "pytorch_model.bin")
    reason = r"lacks text_encoder/model\.safetensors \(\.bin weights are not loaded"
    with pytest.raises(InputError, match=reason):
        check(str(painter), MODEL)


def test_folder_of_another_family_is_refused(painter: Path) -> None:
    index = painter / "model_index.json"
    index.write_text(json.dumps({"_class_name": "FluxPipeline"}))
    named = r"is FLUX \(FluxPipeline\), not Stable Diffusion 1, 2, XL or 3$"
    with pytest.raises(InputError, match=named):
        check(str(painter), MODEL)


def test_sharded_weights_pass(painter: Path) -> None:
    (painter / UNET).rename(painter / UNET.replace(".saf", "-00001-of-00001.saf"))
    (painter / f"{UNET}.index.json").write_text("{}")
    check(str(painter), MODEL)


def test_single_files_are_known_by_their_header(tmp_path: Path) -> None:
    lora = tmp_path / "lora.safetensors"
    save_file({"lora_unet_mid.alpha": torch.ones(1)}, lora)
    named = "is a LoRA, which --lora takes, not Stable Diffusion 1, 2, XL or 3$"
    with pytest.raises(InputError, match=named):
        check(str(lora), MODEL)
    with pytest.raises(InputError, match=r"lacks the VAE$"):
        check(str(lora), VAE)
    with pytest.raises(InputError, match=r"must be a folder, a Hub id or pocket, but .* is a file"):
        check(str(lora), SEGMENTER)
    lora.write_bytes(b"<html>404</html>")
    with pytest.raises(InputError, match="is not a safetensors file"):
        check(str(lora), MODEL)
    check(str(MODEL.pocket / "vae" / "diffusion_pytorch_model.safetensors"), VAE)
    check(str(SEGMENTER.pocket), SEGMENTER)


@pytest.mark.parametrize("reset", [False, True], ids=["ends early", "reset"])
def test_dropped_connection_is_taken_up(hub: Hub, tmp_path: Path, reset: bool) -> None:
    hub.drop(f"{STABLE_DIFFUSION}/{UNET}", reset=reset)
    said = ask(hub.environment(tmp_path))
    assert (Path(said["answer"]) / UNET).read_bytes() == (MODEL.pocket / UNET).read_bytes()
    assert hub.downloads().count(f"{STABLE_DIFFUSION}/{UNET}") == 2


def test_download_that_fails_for_good_is_one_line_and_a_second_run_completes(
    hub: Hub, tmp_path: Path
) -> None:
    hub.drop(f"{STABLE_DIFFUSION}/{UNET}", times=3, reset=True)
    environment = hub.environment(tmp_path)
    said = ask(environment)
    assert said["answer"]["error"] == 1
    assert re.fullmatch(
        f"the download of {STABLE_DIFFUSION} broke off, the Hub can not be reached "
        r"\(.*reset.*\); run again to go on",
        said["answer"]["text"],
    )
    assert said["notices"] == []
    offline = ask(environment, STABLE_DIFFUSION, offline=True)["answer"]["text"]
    assert "it is not complete in the cache, and offline nothing is fetched" in offline
    before = hub.downloads()
    folder = Path(ask(environment)["answer"])
    assert (folder / UNET).read_bytes() == (MODEL.pocket / UNET).read_bytes()
    assert len(hub.downloads()) == len(before) + 1  # the rest was not fetched again
    assert not list(tmp_path.rglob("*.incomplete"))


@pytest.mark.parametrize("offline", [False, True], ids=["closed port", "offline"])
def test_without_a_hub_the_pocket_runs_unless_a_model_is_named(
    tmp_path: Path, offline: bool
) -> None:
    environment = hub_environment(closed_url(), tmp_path)
    said = ask(environment, offline=offline)
    assert said["answer"] == str(MODEL.pocket)
    (notice,) = said["notices"]
    assert "NOT STABLE DIFFUSION: the small bundled pocket model runs instead." in notice
    reason = "it is not complete in the cache" if offline else "the Hub can not be reached ("
    assert f"Stable Diffusion v1-4 can not be downloaded: {reason}" in notice
    named = ask(environment, STABLE_DIFFUSION, offline=offline)
    assert named["notices"] == []
    assert named["answer"]["error"] == 1
    assert named["answer"]["text"].startswith(f"can not download {STABLE_DIFFUSION}: {reason}")
    works = "what works without it: --model pocket, a diffusers folder, a .safetensors file"
    assert named["answer"]["text"].endswith(f"; {works}")
    assert "\n" not in named["answer"]["text"]


@pytest.mark.parametrize(
    ("refusal", "reason"),
    [
        ((401, "RepoNotFound"), "the Hub has no such public model"),
        ((403, "GatedRepo"), "accept its terms on the Hub and log in with `hf auth login`"),
        ((451, ""), "the Hub answers 451"),
    ],
)
def test_refusal_is_an_error_for_the_default_too(
    hub: Hub, tmp_path: Path, refusal: tuple[int, str], reason: str
) -> None:
    hub.refusals[STABLE_DIFFUSION] = refusal
    said = ask(hub.environment(tmp_path))
    assert said["notices"] == []
    assert said["answer"]["error"] == 1
    assert said["answer"]["text"].startswith(f"can not download {STABLE_DIFFUSION}: {reason}; what")


def test_hub_that_is_down_counts_as_out_of_reach(hub: Hub, tmp_path: Path) -> None:
    hub.refusals[STABLE_DIFFUSION] = (503, "")
    said = ask(hub.environment(tmp_path))
    assert said["answer"] == str(MODEL.pocket)
    assert "the Hub can not be reached (it answers 503)" in said["notices"][0]


def test_unfit_repositories_are_refused_before_their_weights_come(hub: Hub, tmp_path: Path) -> None:
    files = hub.repositories[STABLE_DIFFUSION]
    index = b'{"_class_name": "StableDiffusionXLImg2ImgPipeline"}'
    hub.repositories["big/xl"] = {**files, "model_index.json": index}
    hub.repositories["old/pickles"] = {name: files[name] for name in files if name != UNET}
    environment = hub.environment(tmp_path)
    assert ask(environment, "big/xl")["answer"] == {
        "error": 1,
        "text": "big/xl can not be used: it is the refiner of Stable Diffusion XL or like it "
        "(StableDiffusionXLImg2ImgPipeline), not Stable Diffusion 1, 2, XL or 3",
    }
    assert ask(environment, "old/pickles")["answer"] == {
        "error": 1,
        "text": f"old/pickles can not be used: it lacks {UNET} "
        "(.bin weights are not loaded: they can run code)",
    }
    assert hub.downloads() == []
