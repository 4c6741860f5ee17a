"""Who imports whom: the rule of ``docs/architecture.md``, read from there."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "vllm_neuron_rmsq"
DOC = (ROOT / "docs/architecture.md").read_text()


def sources() -> dict[str, Path]:
    """Every module of the package, by its path in there; links are followed."""
    return {
        str((Path(folder) / name).relative_to(PACKAGE)): Path(folder) / name
        for folder, _, names in os.walk(PACKAGE, followlinks=True)
        for name in names
        if name.endswith(".py")
    }


SOURCES = sources()
LEVELS = [
    re.findall(r"`([^`]+)`", row.split("|")[1])
    for row in re.search(r"\| room \|.*\n\| -.*\n((?:\|.*\n)+)", DOC)[1].splitlines()
]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
MAY_IMPORT_VLLM = set(re.findall(r"`([^`]+)`", re.search(r"Only (.*?)import `vllm`", DOC, re.DOTALL)[1]))
UPWARD = set(re.findall(r"^- `([^`]+)` → `([^`]+)`", DOC, flags=re.MULTILINE))


def room(path: str) -> str:
    """The room of a module: the longest name in the table that it lies under."""
    found = [name for name in LEVEL if path == name or (name.endswith("/") and path.startswith(name))]
    assert found, f"{path}: in no room of docs/architecture.md"
    return max(found, key=len)


def imports(path: str) -> Iterator[str]:
    """Dotted names that a module imports, at its top or anywhere inside, by statement or by name."""
    package = ["vllm_neuron_rmsq", *Path(path).parent.parts]
    for node in ast.walk(ast.parse(SOURCES[path].read_text())):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                start = package[: len(package) - level + 1] if level else []
                base = ".".join([*start, *([module] if module else [])])
                yield from (f"{base}.{alias.name}" for alias in names)
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name(id="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield name


def module(dotted: str) -> str | None:
    """Path of the module that a dotted name lies in; ``None`` where it is not the package's."""
    first, *parts = dotted.split(".")
    if first != "vllm_neuron_rmsq":
        return None
    while parts:
        for candidate in ("/".join(parts) + ".py", "/".join(parts) + "/__init__.py"):
            if candidate in SOURCES:
                return candidate
        parts.pop()
    return "__init__.py"


def test_no_import_goes_upward_or_to_a_neighbour():
    wrong, upward = [], set()
    for path in SOURCES:
        here = room(path)
        for dotted in imports(path):
            target = module(dotted)
            there = room(target) if target else here
            if there == here or LEVEL[there] > LEVEL[here]:
                continue
            upward.add((here, there))
            if (here, there) not in UPWARD:
                wrong.append(f"{path} imports {dotted}, but {there} is not below {here}")
    assert not wrong, "\n".join(wrong)
    assert upward == UPWARD, "docs/architecture.md lists an upward import that is gone"


def test_every_room_of_the_table_is_there():
    assert {room(path) for path in SOURCES} == set(LEVEL)


def test_only_the_integrations_and_the_commands_import_vllm():
    found = {
        path
        for path in SOURCES
        if any(name.split(".")[0] in ("vllm", "vllm_neuron") for name in imports(path))
    }
    assert {room(path) for path in found} <= MAY_IMPORT_VLLM
    assert {path for path in found if room(path) == "integrations/vllm/"} <= {"integrations/vllm/versions.py"}
