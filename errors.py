"""The errors that a user can cause or meet; main.py turns each into one line and an exit code."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

OUT_OF_MEMORY = (
    "out of memory|can(no|')t allocate|not enough memory|alloc_failed|paging file|"
    "(calculation|multiplication) overflow"  # of more bytes than can be counted
)


class TemperingError(Exception):
    """Base of the family: its text is one line that a user can act on."""

    exit_code = 1


class InputError(TemperingError, ValueError):
    """A value that can not be used; the text gives the requirement and the value received."""

    exit_code = 2


class ModelError(TemperingError):
    """A model that was found wanting at run time: download failed, weights corrupt."""


class ResourceError(TemperingError):
    """The machine ran out of something (memory, disk); the text names what would help."""


def raise_not_finite(what: str, parts: Mapping[str, Any], advice: str) -> NoReturn:
    """Raise ModelError for numbers that no picture can have, naming what is to blame.

    Those of the `parts` (torch modules by name) whose weights are not finite; else `advice` helps.
    """
    unsound = []
    for name, part in parts.items():
        # On "meta" are those that sequential offloading keeps elsewhere.
        weights = {key: each for key, each in part.named_parameters() if not each.is_meta}
        bad = [key for key, each in weights.items() if not each.isfinite().all()]
        if bad:
            of_a_lora = all(".lora_" in key for key in bad)  # as peft calls them
            unsound.append(f"a LoRA of {name}" if of_a_lora else name)
    if unsound:
        advice = f"because weights of {', '.join(unsound)} are not: put a sound copy in their place"
    raise ModelError(f"{what} is not finite {advice}")


@contextmanager
def memory_errors() -> Iterator[None]:
    """Any library's way of being out of memory becomes ResourceError; while loading or running."""
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search(OUT_OF_MEMORY, str(error).lower()):
            raise
        raise ResourceError(
            "out of memory; what helps: --offload model or sequential and --dtype fp16 on a GPU, "
            "--dtype bf16 on a CPU, a smaller --height and --width"
        ) from error


@contextmanager
def importing() -> Iterator[None]:
    """Whatever libraries raise while they are imported becomes a line that says how to start."""
    start = "start with `python init.py` and the same flags, or activate .venv"
    try:
        yield
    except ModuleNotFoundError as error:
        raise TemperingError(f"{error.name} is not installed in this Python: {start}") from error
    except Exception as error:  # of a loader, of a wrong version: they have no family
        text = f"the libraries of this Python can not be imported ({one_line(error)}): {start}"
        raise TemperingError(text) from error


@contextmanager
def blaming(part: str) -> Iterator[None]:
    """Whatever a library raises over a part of a model becomes ModelError, which names the part."""
    try:
        with memory_errors():
            yield
    except TemperingError:
        raise
    except Exception as error:
        raise ModelError(f"{part} of this model does not work: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """What an error says, in one line of at most 160 characters."""
    text = f"there is no {error}" if isinstance(error, KeyError) else str(error)
    return textwrap.shorten(text, 160, placeholder=" ...") or type(error).__name__
