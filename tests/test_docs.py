"""What README and docs say holds of the tree: their links lead somewhere, their commands and options exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import ROOT

from loopd import cli

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> str:
    """The page's code in that language."""
    return "\n".join(re.findall(rf"(?ms)^```{language}\n(.*?)^```", page.read_text()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_exist(page: Path) -> None:
    makefiles = (ROOT / "Makefile", ROOT / "tests/vm/vm.mk", ROOT / "systemd/packaging/packages.mk")
    targets = {
        found for file in makefiles for found in re.findall(r"(?m)^([a-z][a-z -]*):", file.read_text())
    }
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
    assert "make check " in blocks(ROOT / "README.md", "sh")
    script = (ROOT / ".ci/run").read_text()
    assert re.search(r"(?m)^make check$", script)
    assert "LOOPD_TEST_REQUIRE_ALL=1" in script
