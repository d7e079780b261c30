"""What a model's name means, and how its files get here.

A model is named by a Hub id, a diffusers folder, a single .safetensors file, or `pocket`, the model
that is bundled with this repository. What the Hub has is fetched once into its client's cache and
taken from there ever after. Importing this is part of every refusal of bad input, so nothing heavy
is imported before it is needed.
"""

from __future__ import annotations

import errno
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from errors import InputError, ModelError, ResourceError, one_line
from kinds import (
    MODEL,
    PICKLES,
    SEGMENTER,
    STABLE_DIFFUSION,
    WEIGHTS,
    Kind,
    Layout,
    fault_of_file,
    fault_of_folder,
    fault_of_model,
    layout_of,
    marked,
    shapes_of,
)

CLIPSEG = "CIDAS/clipseg-rd64-refined"
POCKET = "pocket"
Admit = Callable[[Layout], object]  # is told what a model is before it is fetched; may raise

_CONTACT_SECONDS = 10  # how long the Hub may take to answer for the first time
_BRIEF_SECONDS = 3  # the same where what is asked for can be done without, all in all
_PAUSES = (1, 2, 4, 8, 16, 32)  # seconds before a busy Hub or a broken line is tried again
# Compiled where it is used: not every start needs it.
_HUB_ID = r"(?a:(?!.*(--|\.\.))(\w[\w.-]{0,95}/)?\w([\w.-]{0,94}\w)?)"
_NOTICE = """\
{rule}
  NOT STABLE DIFFUSION: the small bundled pocket model runs instead.
  Stable Diffusion v1-4 can not be downloaded: {reason}.
  The pocket knows a few emoji, 64x64 pixels, and nothing else.
  For Stable Diffusion run this once with a connection, or give --model a folder or a file.
{rule}"""


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


def anything(layout: Layout) -> None:
    """Admits every layout."""


def resolve(
    model: str | None,
    kind: Kind = MODEL,
    *,
    offline: bool = False,
    notice: Callable[[str], None] = to_stderr,
    admit: Admit = anything,
) -> Path:
    """What `locate` finds for `model`, or for None, which stands for the default.

    Where that can neither be fetched nor found in the cache it is the pocket; `notice` is told why.
    """
    if model is not None:
        return locate(model, kind, offline, admit)
    try:
        return fetch(STABLE_DIFFUSION, kind, offline, admit)
    except _UnreachableError as error:
        notice(_NOTICE.format(rule="*" * 88, reason=error.reason))
        return kind.pocket


def configuration(file: Path, kind: Kind, offline: bool) -> Path:
    """The folder with what a single file of a model needs beside itself."""
    shapes = shapes_of(file) or {}
    layout = layout_of(file, kind)
    repo, borrowed = layout.lender(shapes), layout.borrowed(shapes)
    heavy = any(need.endswith(WEIGHTS) for need in borrowed.needs)
    what = "configuration, tokenizers and text encoders" if heavy else "configuration and tokenizer"
    size = "1.6 GB" if heavy else "2 MB"
    instead = (
        f"a single file needs the {what} of {repo} once ({size}); what works without them: "
        "--model pocket, a diffusers folder"
    )
    return fetch(repo, replace(kind, layouts=(borrowed,), instead=instead), offline)


def check(text: str, kind: Kind, admit: Admit = anything) -> None:
    """Raise InputError where `text` can not name a model of that kind, without asking the Hub.

    What is a folder or a file on this machine is shown to `admit`, too.
    """
    if text == POCKET:
        return
    try:
        text.encode()  # safetensors opens no other path
        path = Path(text).expanduser()
        if path.is_dir() and text:
            fault = fault_of_folder(path, kind)
        elif path.suffix.lower() in PICKLES:
            fault = f"is a {path.suffix} file, which can run code when it is loaded"
        elif path.is_file():
            fault = fault_of_file(shapes_of(path), kind)
        elif text.startswith(("/", ".", "~")) or re.search(r"\\|/.*/|\.safetensors$", text):
            fault = "does not exist"
        else:
            fault = None if is_id(text) else "is none of them"
    except (OSError, RuntimeError, UnicodeEncodeError) as error:
        fault = f"can not be read ({one_line(error)})"
    if fault:
        raise InputError(f"{kind.flag} must be {kind.forms}, but {text!r} {fault}")
    if path.exists():
        admit(layout_of(path, kind))


def is_id(text: str) -> bool:
    """Whether a repository of the Hub could be called so."""
    return re.fullmatch(_HUB_ID, text) is not None


def name_of(model: str | Path) -> str:
    """What to call a model in results: its Hub id, `pocket`, or the last name of its path."""
    path = Path(model)
    if is_id(str(model)) and not path.exists():
        return str(model)
    if path.resolve() in (MODEL.pocket.resolve(), SEGMENTER.pocket.resolve()):
        return POCKET
    if entry := cache_entry(path):
        return entry.name.removeprefix("models--").replace("--", "/")
    return path.name if path.name not in ("", "..") else path.resolve().name


def cache_entry(path: Path) -> Path | None:
    """The folder of the Hub's cache that holds the model that `path` lies in."""
    return next((folder for folder in path.parents if folder.name.startswith("models--")), None)


def locate(text: str, kind: Kind, offline: bool, admit: Admit = anything) -> Path:
    """The folder or file on this machine that `text` names, fetched first where need be."""
    path = kind.pocket if text == POCKET else Path(text).expanduser()
    if not path.exists():
        return fetch(text, kind, offline, admit)
    admit(layout_of(path, kind))
    return path


def fetch(
    repo: str, kind: Kind, offline: bool, admit: Admit = anything, *, patient: bool = True
) -> Path:
    """The folder of `repo` in the Hub's cache; the Hub is asked only for what is not there.

    If not `patient`, it is asked once, and has three seconds to say what it has.
    """
    if cached := _cached(repo, kind):
        admit(layout_of(cached, kind))
        return cached
    info = _info(repo, kind, offline, patient)
    config, key = info.config or {}, kind.marker[1]
    found = config.get(key) or (config.get("diffusers") or {}).get(key)
    names = {file.rfilename for file in info.siblings or ()}
    if found is None and kind.marker[0] in names:  # the Hub does not say it of every model
        found = marked(_download(repo, [kind.marker[0]], kind, patient), kind).get(key)

    def holds(part: str) -> bool:
        return any(name.startswith(f"{part}/") for name in names)

    fault, layout = fault_of_model(kind, found, names.__contains__, holds), kind.called(found)
    if fault or layout is None:
        raise ModelError(f"{repo} can not be used: it {fault}")
    layout = layout.holding(holds)
    admit(layout)
    try:
        folder = _download(repo, layout.patterns, kind, patient)
    except _UnreachableError as error:  # not a reason to run another model: it was there
        text = f"the download of {repo} broke off, {error.reason}; run again to go on"
        raise ModelError(text) from error
    if fault := fault_of_folder(folder, kind):
        raise ModelError(f"{repo} can not be used: it {fault}")
    return folder


def files_of(repo: str, kind: Kind, offline: bool) -> list[str]:
    """The names of a repository's files: of those in the Hub's cache, else of all on the Hub."""
    snapshot = _snapshot(repo)
    here = [path.name for path in snapshot.iterdir()] if snapshot else []
    return here or [file.rfilename for file in _info(repo, kind, offline).siblings or ()]


def _info(repo: str, kind: Kind, offline: bool, patient: bool = True) -> Any:
    """What the Hub says of a model."""
    from huggingface_hub import HfApi

    if offline:
        reason = "it is not complete in the cache, and offline nothing is fetched"
        raise _UnreachableError(repo, reason, kind.instead)
    return _patiently(
        lambda: HfApi().model_info(repo, timeout=_CONTACT_SECONDS),
        repo,
        kind,
        worth_it=lambda error: patient and error.busy,  # without a network it is known at once
        within=None if patient else _BRIEF_SECONDS,
    )


def _cached(repo: str, kind: Kind) -> Path | None:
    """The folder of `repo` in the Hub's cache, if all that the kind needs is there."""
    folder = _snapshot(repo)
    return folder if folder and not fault_of_folder(folder, kind, as_marked=True) else None


def _snapshot(repo: str) -> Path | None:
    """The folder of `repo` in the Hub's cache, whatever is there of it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:  # of no file: what is to be there is not for the client to judge
        return Path(snapshot_download(repo, allow_patterns=[], local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def _download(repo: str, patterns: list[str], kind: Kind, patient: bool) -> Path:
    """The folder of `repo` in the Hub's cache, with the files that match one of the patterns."""
    from huggingface_hub import snapshot_download

    ask = partial(snapshot_download, repo, allow_patterns=patterns)
    try:
        return Path(_patiently(ask, repo, kind, worth_it=lambda error: patient))
    except KeyboardInterrupt:
        to_stderr("")  # the client's bar stands there
        raise


def _patiently(
    ask: Callable[[], Any],
    repo: str,
    kind: Kind,
    worth_it: Callable[[_UnreachableError], bool],
    within: int | None = None,
) -> Any:
    """What the Hub's client gives; asked again where a Hub is out of reach and it is `worth_it`.

    `within` seconds, if that is given, whatever a name server and a dead line take together.
    The client keeps the files that are complete, and takes up a body that ends early, but gives up
    at a reset connection, a time-out, and at most of what a busy Hub answers.
    """
    for pause in _PAUSES:
        try:
            with _hub_errors(repo, kind):
                return _aside(ask, within)
        except _UnreachableError as error:
            if not worth_it(error):
                raise
            to_stderr(f"{repo}: {error.reason}; trying again in {pause} s")
        time.sleep(pause)
    with _hub_errors(repo, kind):
        return _aside(ask, within)


def _aside(ask: Callable[[], Any], within: int | None) -> Any:
    """What `ask` gives, or raises, in a thread of its own: a signal waits for no dead line.

    Raises TimeoutError if it takes longer than `within` seconds.
    """
    future: Future[Any] = Future()

    def answer() -> None:
        try:
            future.set_result(ask())
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    for _ in count() if within is None else range(within):
        thread.join(1)  # second: Windows hears of a Ctrl-C between two waits only
        if not thread.is_alive():
            return future.result()
    raise TimeoutError(f"no answer within {within} s")


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
