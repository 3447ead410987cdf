"""docs/architecture.md is true: its layers are those of the imports, and what it names is there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

PAGE = ROOT / "docs/architecture.md"
MODULES = {path.stem: ast.parse(path.read_text()) for path in (ROOT / "loopd").glob("*.py")}
CLIENT = {"wire", "layers", "client", "openers", "doctor", "cli", "loop"}


def imports(module: str) -> Iterator[str]:
    """The modules of the package that a module imports, wherever in it that is done."""
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.ImportFrom):
            name = ("loopd." if node.level else "") + (node.module or "")
            if name in {"loopd.", "loopd"}:
                yield from (alias.name for alias in node.names if alias.name in MODULES)
            elif name.startswith("loopd."):
                yield name.removeprefix("loopd.")
        elif isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("loopd.") for alias in node.names if alias.name.startswith("loopd."))


def layers() -> list[list[str]]:
    table = PAGE.read_text().partition("| layer | modules |")[2].partition("\n\n")[0]
    return [re.findall(r"`(\w+)`", line) for line in table.splitlines()[2:]]


def test_every_module_is_in_one_layer() -> None:
    # __init__ is the client's names, loaded when they are used.
    assert sorted(module for layer in layers() for module in layer) == sorted(MODULES.keys() - {"__init__"})


def test_imports_lead_down() -> None:
    below: set[str] = set()
    for layer in layers():
        for module in layer:
            assert below.issuperset(imports(module)), module
        below.update(layer)


def test_stand_ins_import_nothing_of_the_package() -> None:
    assert [list(imports(module)) for module in ("losetup", "mountloop", "loop", "wire")] == [[], [], [], []]


def test_the_client_needs_no_module_of_the_daemon() -> None:
    for module in CLIENT:
        assert CLIENT.issuperset(imports(module)), module


def names(tree: ast.AST) -> set[str]:
    """What a module or class defines, of classes with their members."""
    found: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found |= {node.name}
            if isinstance(node, ast.ClassDef):
                found |= {f"{node.name}.{name}" for name in names(node)}
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_what_pages_name_is_there(page: Path) -> None:
    for module, name in re.findall(r"`(\w+)\.py: ([\w.]+)`", page.read_text()):
        known = names(MODULES[module])
        assert name in known | {member.rpartition(".")[2] for member in known}, f"{module}.py: {name}"
