"""Memory that nothing needs any more, given back to the system."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from functools import cache

import torch


def free_memory(device: torch.device) -> None:
    """Give back what nothing needs any more."""
    gc.collect()
    empty = getattr(getattr(torch, device.type, None), "empty_cache", None)
    if empty:
        empty()


def trim_heap() -> None:
    """Give back what was freed on the host: glibc keeps it, a gigabyte after a large decoding.

    Some milliseconds; where the C library is another one, nothing happens.
    """
    if trim := _malloc_trim():
        trim(0)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):
        return None
