"""The folder listing is the architecture: what a folder says that it may import is true of its files."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.daemon import ROOT

from loopd.daemon.leases import State

PACKAGE = ROOT / "loopd"
FOLDERS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
ALONE = ("loop", "losetup", "table")
"""Files that need nothing of the package."""
STAND_INS = {"mountloop": {"losetup"}, "kpartx": {"losetup", "table"}, "dmsetup": {"losetup", "kpartx"},
             "partx": {"losetup", "table"}}  # fmt: skip
"""What others take from them is packed into each program when it is installed."""
MODULES = {path: ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}


def folder_of(path: Path) -> str:
    return path.parent.name if path.parent != PACKAGE else ""


def imports(path: Path) -> Iterator[str]:
    """The folders, and the modules outside of folders, that a module imports, wherever in it that is done."""
    for node in ast.walk(MODULES[path]):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [node.module or ""]
            if names == ["loopd"]:
                names = [f"loopd.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("loopd."))


def allowed(folder: str) -> set[str]:
    """What the first lines of a folder say that it may import."""
    first_lines = ast.get_docstring(MODULES[PACKAGE / folder / "__init__.py"]) or ""
    said = re.search(r"^Imports: (.*)\.$", first_lines, re.MULTILINE)
    assert said, f"loopd/{folder}/__init__.py does not say what it may import"
    return set() if said[1] == "nothing of the package" else set(said[1].split(", "))


def test_every_folder_says_what_it_may_import() -> None:
    for folder in FOLDERS:
        assert allowed(folder) <= set(FOLDERS) - {folder}
        assert "Never: " in (ast.get_docstring(MODULES[PACKAGE / folder / "__init__.py"]) or "")


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_imports_what_it_says(folder: str) -> None:
    found = {name for path in MODULES if folder_of(path) == folder for name in imports(path)}
    assert found - {folder, "__version__", "loop"} <= allowed(folder)


def test_folders_import_in_one_direction() -> None:
    left = {folder: allowed(folder) for folder in FOLDERS}
    while left:
        ready = [folder for folder, needs in left.items() if not needs & left.keys()]
        assert ready, f"these import each other: {sorted(left)}"
        for folder in ready:
            del left[folder]


def test_nothing_imports_the_device_plugin_nor_what_it_needs() -> None:
    """gRPC's library has threads, and the daemon forks; a client has no such package."""
    for path, tree in MODULES.items():
        if folder_of(path) != "deviceplugin":
            assert "deviceplugin" not in imports(path), path
            names = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
            assert "grpc" not in names, path


def test_no_import_goes_round() -> None:
    """Within a folder, too."""
    needs: dict[Path, set[Path]] = {}
    for path, tree in MODULES.items():
        needs[path] = set()
        for node in tree.body:  # what is imported where it is used is no cycle
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("loopd."):
                module = PACKAGE.parent / (node.module or "").replace(".", "/")
                found = [module / f"{alias.name}.py" for alias in node.names] + [module.with_suffix(".py")]
                needs[path] |= {module for module in found if module in MODULES}
    while needs:
        ready = [path for path, needed in needs.items() if not needed & needs.keys()]
        assert ready, f"these import each other: {sorted(map(str, needs))}"
        for path in ready:
            del needs[path]


def test_what_stands_alone_imports_nothing_of_the_package() -> None:
    for name in ALONE:
        assert list(imports(PACKAGE / f"{name}.py")) == [], name
    for name, others in STAND_INS.items():
        assert set(imports(PACKAGE / f"{name}.py")) == others, name


def names(tree: ast.AST) -> set[str]:
    """What a module or class defines, of classes with their members."""
    found: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
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
    for module, name in re.findall(r"`([\w/]+)\.py: ([\w.]+)`", page.read_text()):
        known = names(MODULES[PACKAGE / f"{module}.py"])
        assert name in known | {member.rpartition(".")[2] for member in known}, f"{module}.py: {name}"


# The tests --------------------------------------------------------------------------------------------------------

TESTS = ROOT / "tests"
FOLDERS_OF_TESTS = {*FOLDERS, "standins", "project"}
"""The stand-ins are files of no folder. What is around the code, as units, packages and documents, is the project."""


def test_the_folders_of_the_tests_are_the_same() -> None:
    found = {path.parent.name for path in TESTS.glob("*/test_*.py")} - {"vm"}
    assert found == FOLDERS_OF_TESTS
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert settings["testpaths"] == [f"tests/{folder}" for folder in sorted(found)]


def test_what_tests_share_is_no_tests() -> None:
    """A module of tests is taken by its name alone, and takes nothing from another."""
    modules = [path for folder in FOLDERS_OF_TESTS for path in (TESTS / folder).glob("*.py")]
    assert len({path.name for path in modules}) == len(modules)
    for path in modules:
        for node in ast.walk(ast.parse(path.read_text())):
            assert not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("test_"), path


# Sizes: what can be read in one go -------------------------------------------------------------------------------

MOST_LINES, MOST_METHODS, MOST_LINES_OF_A_FUNCTION = 400, 20, 50
LONG = {PACKAGE / f"{name}.py" for name in ("loop", "losetup")}
"""The kernel's loop ABI, and a stand-in that has to be one file."""


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_what_can_be_read_in_one_go(path: Path) -> None:
    assert path in LONG or len(path.read_text().splitlines()) <= MOST_LINES
    for node in ast.walk(MODULES[path]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            told = len((ast.get_docstring(node) or "").splitlines())
            assert (node.end_lineno or 0) - node.lineno - told < MOST_LINES_OF_A_FUNCTION, node.name
        if isinstance(node, ast.ClassDef) and path not in LONG:
            methods = [child for child in node.body if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)]
            assert len(methods) <= MOST_METHODS, node.name


ARCHITECTURE = (ROOT / "docs/architecture.md").read_text()


def rows(section: str) -> list[list[str]]:
    """The table of a section, without its head."""
    text = ARCHITECTURE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"(?m)^\| .*", text)[2:]]


def test_the_folders_modules_are_on_the_page() -> None:
    said = {folder.strip("`/"): set(re.findall(r"`(\w+)`", modules)) for folder, _, modules in rows("Folders")}
    found = {name: {path.stem for path in (PACKAGE / name).glob("*.py")} for name in FOLDERS}
    assert said == {name: modules - {"__init__", "__main__"} for name, modules in found.items()}


def test_the_glossary_is_short() -> None:
    words = [word for word, _ in rows("Words")]
    assert len(words) <= 25
    assert words == sorted(words)


def test_the_life_of_a_lease_has_its_states() -> None:
    section = ARCHITECTURE.split("## The life of a lease")[1].split("\n## ")[0]
    assert set(re.findall(r"\b[A-Z]{4,}\b(?!_)", section.split("```")[1])) - {"LOOP"} == {state.name for state in State}
