"""The errors that a user can cause or meet; main.py turns each into one line and an exit code."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any, NoReturn


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
    unsound = [
        name
        for name, part in parts.items()
        # On "meta" are those that sequential offloading keeps elsewhere.
        if not all(each.isfinite().all() for each in part.parameters() if not each.is_meta)
    ]
    if unsound:
        advice = f"because weights of {', '.join(unsound)} are not: put a sound copy in their place"
    raise ModelError(f"{what} is not finite {advice}")


def one_line(error: BaseException) -> str:
    """What an error says, in one line of at most 160 characters."""
    return textwrap.shorten(str(error), 160, placeholder=" ...") or type(error).__name__
