"""memory.py: what is given back to the system."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest

from memory import trim_heap

MEBIBYTE = 2**20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
def test_freed_memory_is_given_back() -> None:
    blocks = [b"x" * 100_000 for _ in range(2000)]  # too small to be given back one by one
    pins = blocks[::20]  # so that the heap can not shrink from its end
    del blocks
    before = resident()
    trim_heap()
    assert resident() < before - 100 * MEBIBYTE
    assert all(pins)


def resident() -> int:
    """Bytes of this process that are in memory."""
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
