"""What README and docs say holds of the tree: their links lead somewhere, and every command in them is run by a test.

A block of commands (```sh) is taken out of its document by the test that runs it, with `recipe` of
tests/vm/inside/recipes.py, or `RUN_BY` names what runs the same. A block of neither is an error.
"""

from __future__ import annotations

import ast
import functools
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.daemon import ROOT, Daemon

from loopd.cli import loopctl as cli
from loopd.daemon import policy

sys.path.insert(0, str(ROOT / "tests/vm/inside"))
import recipes  # of the tests in virtual machines
from recipes import recipe

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MANUAL = sorted((ROOT / "docs/man").glob("*.rst"))
RUN_BY = {
    # In a test it would run itself.
    ("README.md", "Try it"): (
        "tests/project/test_demo.py::test_demo",
        "tests/project/test_docs.py::test_ci_calls_the_readmes_test_command",
    ),
    ("docs/HACKING.md", "Tests"): (
        "tests/project/test_docs.py::test_hacking_one_test",
        "tests/vm/test_vm.py::test_inside",
    ),
    ("docs/packages.md", "The client in a container"): (
        "tests/project/test_packages.py::test_one_file_client_in_a_container",
    ),
    ("docs/man/loopd.8.rst", "JOURNAL"): ("tests/vm/inside/test_containers.py::test_podman",),
    ("docs/man/loopd.8.rst", "EXAMPLES"): (
        "tests/vm/inside/test_documents.py::test_install_as_the_readme_has_it",
        "tests/vm/inside/test_documents.py::test_an_instance",
        "tests/daemon/test_policy.py::test_check_config_names_file_key_and_reason_of_everything",
    ),
    ("docs/man/loopctl.1.rst", "EXAMPLES"): ("tests/project/test_manual.py::test_examples_of_loopctl",),
    ("docs/man/loopd.toml.5.rst", "EXAMPLES"): ("tests/project/test_manual.py::test_example_of_a_configuration",),
    ("docs/man/loopd-protocol.7.rst", "EXAMPLES"): ("tests/project/test_manual.py::test_example_of_the_protocol",),
    ("docs/man/loopd-device-plugin.8.rst", "EXAMPLES"): (
        "tests/project/test_manual.py::test_example_of_the_device_plugin",
    ),
    ("docs/man/loopd-losetup.8.rst", "EXAMPLES"): ("tests/standins/test_losetup.py::test_examples_of_the_manual",),
}
"""Tests that run what these sections have, without taking it from there."""


def commands(page: Path) -> Iterator[str]:
    """The sections of the page that have commands."""
    if page.suffix == ".rst":
        heading = ""
        lines = page.read_text().splitlines()
        for line, following in itertools.pairwise(lines):
            heading = line if re.fullmatch(r"=+|-+", following) and line[:1].isalpha() else heading
            if line.endswith("::"):
                yield heading
    else:
        yield from (
            heading for heading, language, _ in recipes.blocks(os.path.relpath(page, recipes.DOCS)) if language == "sh"
        )


@functools.cache
def taken() -> set[tuple[str, str, str]]:
    """What the tests take out of documents: page, section, language. A section that one has in a variable is any text
    in a test.
    """
    trees = [ast.parse(path.read_text()) for path in (ROOT / "tests").rglob("*.py") if path.name != "test_docs.py"]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    found = set()
    for call in (*nodes, *ast.walk(ast.parse(Path(__file__).read_text()))):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "recipe":
            words: dict[str, ast.expr] = dict(zip(("section", "language", "page"), call.args, strict=False))
            words |= {word.arg: word.value for word in call.keywords if word.arg}
            known = {name: str(word.value) for name, word in words.items() if isinstance(word, ast.Constant)}
            page = os.path.relpath(recipes.DOCS / known.get("page", "containers.md"), ROOT)
            for section in {known["section"]} if "section" in known else texts:
                found.add((page, section, known.get("language", "sh")))
    return found


@pytest.mark.parametrize("page", [*PAGES, *MANUAL], ids=lambda page: page.name)
def test_every_command_is_run_by_a_test(page: Path) -> None:
    name = str(page.relative_to(ROOT))
    for section in commands(page):
        assert (name, section, "sh") in taken() or (name, section) in RUN_BY, f"no test runs what is in {section!r}"


def test_what_is_said_to_run_them_does_exist() -> None:
    for (page, section), tests in RUN_BY.items():
        assert section in commands(ROOT / page), section
        for test in tests:
            path, _, function = test.partition("::")
            assert f"\ndef {function}(" in (ROOT / path).read_text(), test


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_is_in_fences_and_of_a_language(page: Path) -> None:
    """An indented block would escape the above."""
    text = re.sub(r"(?ms)^```(?:sh|python|toml|ini|yaml|text)\n.*?^```$", "", page.read_text())
    assert "```" not in text
    assert re.findall(r"(?m)^(?![ ]*(?:[-*]|\d+\.) ).*\n\n(    .*)", text) == []


def test_hacking_by_hand(tmp_path: Path) -> None:
    text = recipe("The daemon by hand", page="HACKING.md")
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        ["sh", "-ec", text],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    device, header, row = done.stdout.splitlines()
    assert re.fullmatch(rf"{tmp_path}/[^/]+/dev/0-build/loop\d+", device)
    assert "UNIT" in header.split()
    assert row.split()[0] == os.path.basename(device)
    assert "LOOPD_EVENT='attached'" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_hacking_one_test() -> None:
    (command,) = (
        text
        for heading, kind, text in recipes.blocks("HACKING.md")
        if (heading, kind) == ("Tests", "sh") and "pytest" in text
    )
    done = subprocess.run(["sh", "-ec", command], check=False, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"[1-9]\d* passed", done.stdout)


def test_python_of_the_readme(daemon: Daemon, devices: Path, tmp_path: Path) -> None:
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    environment = {**os.environ, "LOOPD_SOCKET": daemon.path, "LOOPD_DIRECTORY": str(devices), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", recipe("A container with a device", "python", page="../README.md")]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(rf"{devices}/loop\d+ 1048576 \(\)\n", done.stdout)


def test_rule_of_an_instance(tmp_path: Path) -> None:
    (tmp_path / "loopd.toml").write_text(recipe("Its rules", "toml", page="instances.md"))
    loaded = policy.load(str(tmp_path / "loopd.toml"))
    assert loaded.terms("build", "/a", 0, 0).limits.devices == 32
    assert loaded.terms("other", "/a", 0, 0) == policy.Policy().terms("other", "/a", 0, 0)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_make_help() -> None:
    done = subprocess.run(["make", "-s", "help"], check=True, capture_output=True, text=True, cwd=ROOT, timeout=60)
    first, *_, last = done.stdout.splitlines()
    assert first.startswith("Each target ")
    assert last == "  make help         this list"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_exist(page: Path) -> None:
    makefiles = (ROOT / "Makefile", ROOT / "tests/vm/vm.mk", ROOT / "systemd/packaging/packages.mk")
    targets = {found for file in makefiles for found in re.findall(r"(?m)^([a-z][a-z -]*):", file.read_text())}
    named = {name for line in targets for name in line.split()}
    for target in re.findall(r"(?m)(?:^|`)make ([a-z][a-z-]*)", page.read_text()):
        assert target in named, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_loopctl_commands_exist(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    usage = capsys.readouterr().out
    text = re.sub(r"(?m)^lxc\.mount\.entry.*", "", page.read_text())
    for command in set(re.findall(r"loopctl (?:--admin )?([a-z]+)\b", text)) - {"and"}:
        assert re.search(rf"\b{command}\b", usage), command


def test_ci_calls_the_readmes_test_command() -> None:
    assert "make check " in recipe("Try it", page="../README.md")
    script = (ROOT / ".ci/run").read_text()
    assert re.search(r"(?m)^twice make check$", script)
    assert "LOOPD_TEST_REQUIRE_ALL=1" in script
