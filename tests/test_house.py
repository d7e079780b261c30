"""The plan of the house: imports run down CONTRIBUTING's map, never up and never in a circle."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
MAP = re.findall(
    r"^\| (`.+?`) +\|", CONTRIBUTING.partition("## Where things are")[2].partition("\n## ")[0], re.M
)
# A row is a floor: a file or a folder, or several of which none knows another. "x/" is folder x.
FLOORS = [re.findall(r"`([\w/]+?)(?:\.py|/)`", row) for row in MAP]
FLOOR_OF = {name: number for number, names in enumerate(FLOORS) for name in names}
FILES = sorted(
    path.relative_to(ROOT)
    for folder in (".", *(name for name in FLOOR_OF if (ROOT / name).is_dir()))
    for path in (ROOT / folder).glob("*.py")
)


def module(file: Path) -> str:
    return ".".join(file.with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(file): file for file in FILES}


def imported(file: Path) -> Iterator[str]:
    """Our own modules that a file imports, be it inside a function or for type checkers alone.

    What is imported for its types is known as well: such an arrow may not run back up either.
    """
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relative to itself"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else str(node.module) for name in inside]
        yield from (name for name in names if name in MODULES)


def test_the_map_names_every_file_and_folder_of_ours_once() -> None:
    tops = {file.stem if len(file.parts) == 1 else file.parts[0] for file in FILES}
    names = [name for names in FLOORS for name in names]
    assert sorted(names) == sorted(tops)
    folders = {path.parent.name for path in ROOT.glob("*/*.py")}
    assert folders - {"tests"} <= tops


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_run_down_the_map(file: Path) -> None:
    own = module(file).partition(".")[0]
    for name in imported(file):
        other = name.partition(".")[0]
        assert other == own or FLOOR_OF[other] > FLOOR_OF[own], f"{file} imports {name}"


def test_no_two_files_import_each_other_by_whatever_way() -> None:
    graph = {name: set(imported(file)) - {name} for name, file in MODULES.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_the_arrows_of_the_plan_are_there() -> None:
    """So that a test that finds no import at all is not taken for one that finds no fault."""
    for above, below in [
        ("main", "settings"),
        ("inference", "session"),
        ("evaluation", "session"),
        ("session", "tempering"),
        ("session", "loaders"),
        ("loaders", "hub"),
        ("tempering", "sampling"),
        ("sampling", "families"),
        ("recipe.judge", "pocket.judge"),
        ("benchmarks.quality", "pocket.judge"),
    ]:
        assert below in imported(MODULES[above]), f"{above} does not import {below}"
