"""A stand-in for the Hugging Face Hub on loopback, as far as its client needs it to download.

    with Hub(pocket_repositories()) as hub:
        subprocess.run([...], env=hub.environment(tmp_path))
        assert hub.downloads() == [...]

The client reads HF_ENDPOINT when it is imported, so what talks to a Hub runs in its own process.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

import pytest

from hub import CLIPSEG
from kinds import MODEL, STABLE_DIFFUSION

WEIGHTS = MODEL.pocket.parent
Files = dict[str, bytes]
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
# What a child process does, then how it tells what came of it. It counts pauses and makes none.
CHILD = """
import hub, json, sys
from pathlib import Path
from types import SimpleNamespace
from errors import TemperingError
from hub import CLIPSEG, resolve
from kinds import STABLE_DIFFUSION
from loaders import *
notices, pauses = [], []
hub.time = SimpleNamespace(sleep=pauses.append)
try:
    {code}
except TemperingError as error:
    answer = {{"error": error.exit_code, "text": str(error)}}
print(json.dumps({{"answer": answer, "notices": notices, "pauses": pauses}}))
"""
RESOLVE = (
    "answer = str(resolve(sys.argv[1] or None, offline=bool(sys.argv[2]), notice=notices.append))"
)


def files_of(folder: Path) -> Files:
    """The files of a folder, as a repository of the Hub would hold them."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def pocket_repositories() -> dict[str, Files]:
    """The pocket under the names of the default models, among all that need not be fetched."""
    painter = files_of(WEIGHTS / "stable-diffusion")
    index = json.loads(painter["model_index.json"])
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    unneeded = dict.fromkeys(
        (
            "README.md",
            "v1-variants.png",
            "sd-v1-4.ckpt",
            "sd-v1-4.safetensors",
            "feature_extractor/preprocessor_config.json",
            "safety_checker/config.json",
            "safety_checker/model.safetensors",
            "text_encoder/model.fp16.safetensors",
            "text_encoder/pytorch_model.bin",
            "unet/diffusion_pytorch_model.bin",
            "unet/diffusion_pytorch_model.fp16.safetensors",
            "unet/diffusion_pytorch_model.non_ema.safetensors",
            "unet/diffusion_flax_model.msgpack",
            "vae/diffusion_pytorch_model.bin",
        ),
        b"not needed",
    )
    clipseg = {**files_of(WEIGHTS / "clipseg"), "pytorch_model.bin": b"not needed"}
    return {
        STABLE_DIFFUSION: {**unneeded, **painter, "model_index.json": _json(index)},
        CLIPSEG: clipseg,
    }


@dataclass(frozen=True)
class Request:
    """One request that reached the stand-in."""

    method: str
    path: str
    range: str | None = None  # the header


class Hub:
    """Serves repositories, name -> path -> content, and keeps account of who asked for what."""

    def __init__(self, repositories: Mapping[str, Files]) -> None:
        self.repositories = dict(repositories)
        self.refusals: dict[str, tuple[int, str]] = {}  # repository -> status, X-Error-Code
        self.silent: set[str] = set()  # repositories of which it does not tell what they are
        self.requests: list[Request] = []
        self._drops: dict[str, tuple[int, tuple[bool, float]]] = {}
        self._busy: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Hub:
        poll = {"poll_interval": 0.02}
        threading.Thread(target=self._server.serve_forever, kwargs=poll, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """Environment of a process that takes this for the Hub and has its cache in `home`."""
        return hub_environment(self.url, home)

    def drop(self, path: str, *, times: int = 1, reset: bool = False, stalls: float = 0.0) -> None:
        """End the next `times` downloads of `path` in the middle: too early, or with a reset.

        First nothing more comes for as long as it `stalls`, in seconds.
        """
        self._drops[path] = (times, (reset, stalls))

    def answer_busy(self, path: str, status: int, *, times: int = 1) -> None:
        """Answer the next `times` downloads of `path` with a status, or questions about a model."""
        self._busy[path] = (times, status)

    def downloads(self) -> list[str]:
        """The repositories' files that were downloaded, `repository/path`, sorted."""
        found = (
            re.sub("/resolve/[^/]+/", "/", r.path[1:]) for r in self.requests if r.method == "GET"
        )
        return sorted(path for path in found if not path.startswith("api/"))

    def note(self, request: Request) -> None:
        """Keep account of a request."""
        with self._lock:
            self.requests.append(request)

    def take_busy(self, path: str) -> int | None:
        """The status of an answer that puts off, if this download of `path` gets one."""
        with self._lock:
            times, status = self._busy.pop(path, (0, 0))
            if times > 1:
                self._busy[path] = (times - 1, status)
            return status if times else None

    def take_drop(self, path: str) -> tuple[bool, float] | None:
        """How this download of `path` is to end early: with a reset, after how long; or not."""
        with self._lock:
            times, how = self._drops.pop(path, (0, (False, 0.0)))
            if times > 1:
                self._drops[path] = (times - 1, how)
            return how if times else None


def hub_environment(url: str, home: Path) -> dict[str, str]:
    """Environment of a process whose Hub is at `url`; proxies and the user's own cache are out."""
    mine = ("HF_", "HUGGING", "TRANSFORMERS_", "DIFFUSERS_")
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(mine) and key.upper() not in PROXIES
    }
    return {**kept, "HF_ENDPOINT": url, "HF_HOME": str(home), "NO_PROXY": "*"}


def closed_url() -> str:
    """An address on loopback where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def child(code: str, environment: dict[str, str], *arguments: object) -> Any:
    """What a child process answers that runs `code` with the program's modules at hand."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD.format(code=code), *map(str, arguments)],
        cwd=WEIGHTS.parents[1],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout.splitlines()[-1]), "stderr": done.stderr}


def ask(environment: dict[str, str], model: str = "", *, offline: bool = False) -> Any:
    """Resolve `model`, the default if empty, in a process of its own; no model is loaded."""
    return child(RESOLVE, environment, model, "offline" if offline else "")


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A running stand-in that has the default models."""
    with Hub(pocket_repositories()) as running:
        yield running


class _Handler(BaseHTTPRequestHandler):
    hub: ClassVar[Hub]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.note(Request(self.command, path, self.headers.get("Range")))
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+|/tree/[^/]+)?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        match = api or file
        repository = match[1] if match else ""
        asked = "/".join(match.groups()) if match and match is file else repository
        busy = self.hub.take_busy(asked) if self.command == "GET" else None
        if busy:
            self._refuse(busy, "")
        elif repository in self.hub.refusals:
            self._refuse(*self.hub.refusals[repository])
        elif match is None or repository not in self.hub.repositories:
            self._refuse(401, "RepoNotFound")  # what the Hub tells whoever has not logged in
        elif api and (api[2] or "").startswith("/tree/"):
            self._send(_json(self._tree(repository)))
        elif api:
            self._send(_json(self._info(repository)))
        elif match[2] in self.hub.repositories[repository]:
            self._send_file(repository, match[2])
        else:
            self._refuse(404, "EntryNotFound")

    def _info(self, repository: str) -> dict[str, object]:
        files = self.hub.repositories[repository]
        if "model_index.json" in files:
            config = {"diffusers": {"_class_name": _class_name(files["model_index.json"])}}
        else:
            config = {"model_type": json.loads(files.get("config.json", b"{}")).get("model_type")}
        if repository in self.hub.silent:
            config = {}
        siblings = [{"rfilename": name} for name in files]
        return {
            "id": repository,
            "sha": _commit(repository),
            "siblings": siblings,
            "config": config,
        }

    def _tree(self, repository: str) -> list[dict[str, object]]:
        return [
            {"type": "file", "path": name, "size": len(content), "oid": _digest(content)}
            for name, content in self.hub.repositories[repository].items()
        ]

    def _send_file(self, repository: str, name: str) -> None:
        content = self.hub.repositories[repository][name]
        headers = {"X-Repo-Commit": _commit(repository), "ETag": f'"{_digest(content)}"'}
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted else 0
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        end = self.hub.take_drop(f"{repository}/{name}") if self.command == "GET" else None
        if end is None:
            self._send(content[start:], 206 if wanted else 200, headers)
        else:
            reset, stalls = end
            self._send(content[start:], 206 if wanted else 200, headers, stop=len(content) // 2)
            self.wfile.flush()
            time.sleep(stalls)
            self._hang_up(reset)

    def _send(
        self,
        content: bytes,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
        stop: int | None = None,
    ) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[:stop])

    def _hang_up(self, reset: bool) -> None:
        self.wfile.flush()
        if reset:  # no lingering: the other side gets RST instead of a proper end
            linger = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()
        else:
            self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def _refuse(self, status: int, code: str) -> None:
        self._send(b"", status, {"X-Error-Code": code})


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _commit(repository: str) -> str:
    return hashlib.sha1(repository.encode(), usedforsecurity=False).hexdigest()


def _class_name(index: bytes) -> str:
    return json.loads(index)["_class_name"]
