"""Imports run down the floors of docs/architecture.md, which names every file."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "mod_jax"
PAGE = (ROOT / "docs" / "architecture.md").read_text()
SHARED = {"__init__.py", "data/__init__.py", "data/workers.py"}  # a name or two that rooms share

FILES = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}


def floors() -> dict[str, int]:
    """Room or top-level file -> its floor; 0 is the lowest."""
    listed = re.search(r"<!-- floors -->\n(.*)<!-- /floors -->", PAGE, re.DOTALL)[1]
    return {
        room: floor
        for floor, line in enumerate(reversed(listed.strip().splitlines()))
        for room in line.split()
    }


def room_of(file: str) -> str:
    """A top-level file is a room of its own."""
    return file.rpartition("/")[0] or file


def imported(file: str) -> set[str]:
    """The files of the package that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(FILES[file].read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        paths = [name.replace(".", "/").removeprefix("mod_jax/") + ".py" for name in names]
        found |= {path for name, path in zip(names, paths) if name.startswith("mod_jax.")}
    return found & FILES.keys()


@pytest.mark.parametrize("file", sorted(FILES.keys() - SHARED))
def test_imports_run_down(file):
    floor = floors()
    room = room_of(file)
    wrong = {
        other
        for other in imported(file) - SHARED
        if room_of(other) != room and floor[room_of(other)] >= floor[room]
    }
    assert not wrong


def test_no_room_stands_empty():
    assert floors().keys() == {room_of(file) for file in FILES.keys() - SHARED}


@pytest.mark.parametrize("file", sorted(FILES))
def test_the_page_names_every_file(file):
    name = file.rpartition("/")[2]
    assert name.startswith("__") or file in SHARED or f"`{name}`" in PAGE
