"""Calls of the command line in this process, and how they ended."""

from __future__ import annotations

from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import main
import outputs


@dataclass(frozen=True)
class Done:
    """How a call of the program ended."""

    code: int
    out: str
    err: str

    @property
    def folder(self) -> Path:
        """The run's folder, which is the last line of its output."""
        return Path(self.out.splitlines()[-1])

    @property
    def run(self) -> dict[str, Any]:
        """The content of the run's run.json."""
        return run_of(self.folder)


def run_of(folder: Path) -> dict[str, Any]:
    return outputs.read_json(folder / "run.json")


def call(*words: str) -> Done:
    """Run the command line."""
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main.main(words)
    return Done(code, out.getvalue(), err.getvalue())
