"""hub.py: what can not name a model, and what the Hub is asked for.

Whatever talks to a Hub runs in a process of its own, against the stand-in of loopback.py.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from loopback import Files, Hub, ask, child, closed_url, files_of, hub, hub_environment
from safetensors.torch import save_file

from errors import InputError
from hub import POCKET, check
from kinds import MODEL, SEGMENTER, STABLE_DIFFUSION, VAE

__all__ = ["hub"]  # a fixture is used by its name

REPOSITORY = Path(__file__).parents[1]
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


# What lies beside a model in the repositories of the families.
UNNEEDED = (
    "README.md",
    "LICENSE.md",
    "model_index.fp16.json",
    "sd3.5_medium.safetensors",
    "text_encoder/flax_model.msgpack",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/model.onnx",
    "text_encoder/openvino_model.bin",
    "text_encoder_2/pytorch_model.bin",
    "text_encoder_3/model.fp16-00001-of-00002.safetensors",
    "text_encoder_3/model.safetensors.index.fp16.json",
    "text_encoders/clip_g.safetensors",
    "transformer/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/model.onnx_data",
    "vae/diffusion_pytorch_model.bin",
    "vae_1_0/diffusion_pytorch_model.safetensors",
    "vae_decoder/model.onnx",
)


@pytest.fixture
def repositories(hub: Hub, tiny_folders: dict[str, Path], tmp_path: Path) -> dict[str, Files]:
    """The families' own files, which the stand-in serves among others; T5's in shards."""
    own = {tiny.LENDERS[name]: files_of(tiny_folders[name]) for name in tiny.LENDERS}
    of_3 = own[tiny.LENDERS["sd3"]]
    del of_3["text_encoder_3/model.safetensors"]
    t5 = tiny.shared("sd3").text_encoder_3
    t5.save_pretrained(tmp_path / "t5" / "text_encoder_3", max_shard_size="30KB")
    own[tiny.LENDERS["sd3"]] = {**of_3, **files_of(tmp_path / "t5")}
    for files in own.values():  # the client fetches what is equal once: so that nothing is
        for number, name in enumerate(files):
            files[name] += b"\n" * number * name.endswith(".json")
    for name, files in own.items():
        hub.repositories[name] = {**dict.fromkeys(UNNEEDED, b"not needed"), **files}
    return own


def test_of_every_family_only_what_is_needed_is_fetched(
    hub: Hub, repositories: dict[str, Files], tmp_path: Path
) -> None:
    code = """
    from kinds import MODEL
    for repo in sys.argv[1:]:
        resolve(repo, MODEL.bare)
    answer = [str(resolve(repo, MODEL.bare, offline=True)) for repo in sys.argv[1:]]"""
    environment = hub.environment(tmp_path / "home")
    assert len(child(code.strip(), environment, *repositories)["answer"]) == 3
    needed = {f"{repo}/{file}" for repo, files in repositories.items() for file in files}
    t5 = {file for file in needed if "_3/" in file}
    assert len([file for file in t5 if "-of-" in file]) > 1
    assert hub.downloads() == sorted(needed - t5)

    (of_3,) = {file.rpartition("/text_encoder_3/")[0] for file in t5} - {""}
    offline = ask(environment, of_3, offline=True)["answer"]["text"]
    assert "it is not complete in the cache, and offline nothing is fetched" in offline
    ask(environment, of_3)
    assert hub.downloads() == sorted(needed)


def test_of_a_single_files_lender_only_what_the_file_lacks_is_fetched(
    hub: Hub, repositories: dict[str, Files], tiny_files: dict[str, Path], tmp_path: Path
) -> None:
    code = """
    from hub import configuration
    from kinds import MODEL
    answer = [str(configuration(Path(file), MODEL, False)) for file in sys.argv[1:]]"""
    names = ["sd2", "sdxl", "sd3"]
    environment = hub.environment(tmp_path / "home")
    child(code.strip(), environment, *(tiny_files[name] for name in names))
    small = {
        f"{repo}/{file}"
        for repo, files in repositories.items()
        for file in files
        if "safetensors" not in file
    }
    assert hub.downloads() == sorted(small)
    child(code.strip(), environment, tiny_files["mute"])
    clips = {file for file in hub.downloads() if file.endswith(".safetensors")}
    of_3 = tiny.LENDERS["sd3"]
    assert clips == {
        f"{of_3}/{part}/model.safetensors" for part in ("text_encoder", "text_encoder_2")
    }
    assert hub.downloads() == sorted(small | clips)


TAESD_HUB = "madebyollin/taesd"
# Of every load: the sum of the tiny decoder's weights, None without it, or the error.
LOAD_TAESD = """
    answer = []
    for folder, preview, offline in json.loads(sys.argv[1]):
        try:
            words = {"dtype": "fp32", "preview": preview, "offline": offline}
            found = load_pipeline(folder, **words).taesd
            answer.append(found and sum(float(each.double().sum()) for each in found.parameters()))
        except TemperingError as error:
            answer.append({"error": error.exit_code, "text": str(error)})"""


def tiny_decoders(environment: dict[str, str], *loads: tuple[Path, str, bool]) -> list[Any]:
    """What each of these loads, of a folder with a preview and maybe offline, comes to."""
    given = json.dumps(loads, default=str)
    answer: list[Any] = child(LOAD_TAESD.strip(), environment, given)["answer"]
    return answer


def taesd_files(folder: Path, **more: int) -> Files:
    tiny.taesd(**more).save_pretrained(folder)
    return files_of(folder)


def test_the_tiny_decoder_is_fetched_with_the_model_once(
    hub: Hub, tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    unneeded = dict.fromkeys(("taesd_decoder.safetensors", "diffusion_pytorch_model.bin"), b"no")
    hub.repositories[TAESD_HUB] = {**unneeded, **taesd_files(tmp_path / "taesd")}
    environment, folder = hub.environment(tmp_path / "home"), tiny_folders["sd2"]
    assert tiny_decoders(environment, (folder, "vae", False)) == [None]
    assert hub.downloads() == []
    expected = sum(float(each.detach().double().sum()) for each in tiny.taesd().parameters())
    loads = [(folder, "auto", False), (folder, "taesd", True), (folder, "auto", False)]
    assert tiny_decoders(environment, *loads) == pytest.approx([expected] * 3)
    assert hub.downloads() == [
        f"{TAESD_HUB}/config.json",
        f"{TAESD_HUB}/diffusion_pytorch_model.safetensors",
    ]


def test_without_the_tiny_decoder_auto_does_with_the_vae_and_taesd_is_one_line(
    hub: Hub, tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    hub.repositories["madebyollin/taesd3"] = taesd_files(tmp_path / "taesd")  # 4 channels, not 16
    of_2, of_3 = tiny_folders["sd2"], tiny_folders["bare"]
    *by_itself, missing, unfit = tiny_decoders(
        hub.environment(tmp_path / "home"),
        *[(of_2, "auto", True), (of_2, "auto", False), (of_3, "auto", False)],
        *[(of_2, "taesd", True), (of_3, "taesd", False)],
    )
    assert by_itself == [None] * 3
    instead = "; what works without it: --preview vae, half or linear"
    reason = "it is not complete in the cache, and offline nothing is fetched"
    text = f"can not download {TAESD_HUB}: {reason}{instead}"
    assert missing == {"error": 1, "text": text}
    text = (
        "the tiny decoder madebyollin/taesd3 does not fit: it takes 4 channels and enlarges 2 "
        f"times, the model's VAE 16 and 2{instead}"
    )
    assert unfit == {"error": 1, "text": text}


def test_auto_asks_a_busy_hub_for_the_tiny_decoder_once(
    hub: Hub, tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    hub.repositories[TAESD_HUB] = taesd_files(tmp_path / "taesd")
    environment = hub.environment(tmp_path / "home")

    def load(preview: str) -> dict[str, Any]:
        given = json.dumps([(tiny_folders["sd2"], preview, False)], default=str)
        return child(LOAD_TAESD.strip(), environment, given)

    hub.answer_busy(TAESD_HUB, 503, times=2)
    by_itself = load("auto")
    assert (by_itself["answer"], by_itself["pauses"]) == ([None], [])
    hub.answer_busy(TAESD_HUB, 503, times=2)
    by_name = load("taesd")
    assert by_name["answer"] != [None]
    assert by_name["pauses"][:1] == [1]


def test_auto_waits_seconds_for_a_hub_that_says_nothing(
    tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    code = """
    import time
    taken = []
    for preview in ("vae", "vae", "auto"):  # the first time imports
        begun = time.monotonic()
        pipe = load_pipeline(sys.argv[1], dtype="fp32", preview=preview)
        taken.append(time.monotonic() - begun)
    answer = pipe.taesd, taken[2] - taken[1]"""
    with socket.create_server(("127.0.0.1", 0)) as mute:
        environment = hub_environment(f"http://127.0.0.1:{mute.getsockname()[1]}", tmp_path)
        tiny_decoder, longer = child(code.strip(), environment, tiny_folders["sd2"])["answer"]
    assert tiny_decoder is None
    assert 2 < longer < 9  # seconds; a model that is needed is waited for longer


def test_a_lender_behind_terms_is_named_with_what_helps(
    hub: Hub, tiny_files: dict[str, Path], tmp_path: Path
) -> None:
    hub.refusals[tiny.LENDERS["sd3"]] = (403, "GatedRepo")
    code = "answer = load_pipeline(sys.argv[1])"
    said = child(code, hub.environment(tmp_path), tiny_files["sd3"])["answer"]
    assert said["error"] == 1
    assert said["text"].startswith(
        f"can not download {tiny.LENDERS['sd3']}: accept its terms on the Hub and log in with "
        "`hf auth login`; a single file needs the configuration and tokenizer of "
    )


def test_the_hub_need_not_say_what_a_model_is(
    hub: Hub, repositories: dict[str, Files], tmp_path: Path
) -> None:
    hub.silent.add(tiny.LENDERS["sdxl"])
    folder = Path(ask(hub.environment(tmp_path), tiny.LENDERS["sdxl"])["answer"])
    assert files_of(folder).keys() == repositories[tiny.LENDERS["sdxl"]].keys()


@pytest.mark.parametrize("reset", [False, True], ids=["ends early", "reset"])
def test_dropped_connection_is_taken_up(hub: Hub, tmp_path: Path, reset: bool) -> None:
    hub.drop(f"{STABLE_DIFFUSION}/{UNET}", reset=reset)
    said = ask(hub.environment(tmp_path))
    assert (Path(said["answer"]) / UNET).read_bytes() == (MODEL.pocket / UNET).read_bytes()
    assert hub.downloads().count(f"{STABLE_DIFFUSION}/{UNET}") == 2


def test_a_download_that_stalls_is_taken_up(hub: Hub, tmp_path: Path) -> None:
    hub.drop(f"{STABLE_DIFFUSION}/{UNET}", times=2, reset=True, stalls=3)
    environment = {**hub.environment(tmp_path), "HF_HUB_DOWNLOAD_TIMEOUT": "1"}
    said = ask(environment, STABLE_DIFFUSION)
    assert (Path(said["answer"]) / UNET).read_bytes() == (MODEL.pocket / UNET).read_bytes()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_waits_for_no_dead_line(hub: Hub, tmp_path: Path, name: str) -> None:
    hub.drop(f"{STABLE_DIFFUSION}/{UNET}", stalls=100)  # seconds
    environment = {**hub.environment(tmp_path), "HF_HUB_DOWNLOAD_TIMEOUT": "100"}
    words = ["--tempered_inference", "--prompts", "a dog", "--output", str(tmp_path / "runs")]
    process = subprocess.Popen(
        [sys.executable, "main.py", *words],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 200
    while f"{STABLE_DIFFUSION}/{UNET}" not in hub.downloads():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=50)  # half of what the line is dead for
    assert (process.returncode, out, err.splitlines()[-1]) == (130, "", "interrupted")
    assert not (tmp_path / "runs").exists()


def test_download_that_fails_for_good_is_one_line_and_a_second_run_completes(
    hub: Hub, tmp_path: Path
) -> None:
    hub.drop(f"{STABLE_DIFFUSION}/{UNET}", times=7, reset=True)
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


@pytest.mark.parametrize("status", [500, 502, 503, 504, 429, 408])
def test_a_busy_hub_is_asked_again_and_what_is_complete_is_kept(
    hub: Hub, tmp_path: Path, status: int
) -> None:
    hub.answer_busy(f"{STABLE_DIFFUSION}/{UNET}", status, times=2)
    hub.answer_busy(STABLE_DIFFUSION, status, times=2)
    said = ask(hub.environment(tmp_path), STABLE_DIFFUSION)
    assert (Path(said["answer"]) / UNET).read_bytes() == (MODEL.pocket / UNET).read_bytes()
    downloads = hub.downloads()
    assert [path for path in downloads if downloads.count(path) > 1] == [
        f"{STABLE_DIFFUSION}/{UNET}"
    ] * downloads.count(f"{STABLE_DIFFUSION}/{UNET}")


def test_a_hub_that_stays_busy_is_asked_for_a_minute_in_growing_pauses(
    hub: Hub, tmp_path: Path
) -> None:
    hub.answer_busy(f"{STABLE_DIFFUSION}/{UNET}", 503, times=10**9)
    environment = hub.environment(tmp_path)
    said = ask(environment, STABLE_DIFFUSION)
    assert said["answer"]["error"] == 1
    assert "broke off, the Hub can not be reached (it answers 503); run" in said["answer"]["text"]
    assert sum(said["pauses"]) >= 60
    assert said["pauses"] == sorted(set(said["pauses"]))
    told = re.findall("it answers 503.; trying again in ([0-9]+) s\n", said["stderr"])
    assert [int(pause) for pause in told] == said["pauses"]
    hub.answer_busy(f"{STABLE_DIFFUSION}/{UNET}", 503)
    assert Path(ask(environment, STABLE_DIFFUSION)["answer"]).is_dir()


def test_what_will_not_pass_is_not_asked_for_again(hub: Hub, tmp_path: Path) -> None:
    hub.answer_busy(f"{STABLE_DIFFUSION}/{UNET}", 403, times=10**9)
    said = ask(hub.environment(tmp_path), STABLE_DIFFUSION)
    assert (said["answer"]["error"], said["pauses"]) == (1, [])
    assert ask(hub_environment(closed_url(), tmp_path / "other"))["pauses"] == []  # no network


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
