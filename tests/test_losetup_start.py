"""What the drop-in losetup imports: build scripts call it again and again. How long it takes, `make bench` measures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, Daemon

from loopd import losetup

LOSETUP = str(ROOT / "loopd" / "losetup.py")
NEEDED = {"__future__", "errno", "_socket", "_json"}
"""All but `__future__` are in C."""


@pytest.fixture
def environment(daemon: Daemon, devices: Path) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "LOOPD_SOCKET": daemon.path, "LOOPD_DIRECTORY": str(devices)}


def imported(environment: dict[str, str], *arguments: str) -> tuple[set[str], str]:
    """The modules that an interpreter imports, and its output."""
    command = [sys.executable, "-I", "-S", "-X", "importtime", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip() for line in lines[1:]}, done.stdout.strip()


def test_attaching_and_detaching_import_next_to_nothing(environment: dict[str, str], tmp_path: Path) -> None:
    bare, _ = imported(environment, "-c", "pass")
    assert "encodings" in bare
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    modules, device = imported(environment, LOSETUP, "-f", "--show", str(image))
    assert device.startswith("/")
    then, _ = imported(environment, LOSETUP, "-d", device)
    assert modules - bare <= NEEDED
    assert then - bare <= NEEDED


def test_listing_does_likewise(environment: dict[str, str], tmp_path: Path) -> None:
    bare, _ = imported(environment, "-c", "pass")
    modules, _ = imported(environment, LOSETUP, "-a")
    assert modules - bare <= NEEDED


def test_an_interpreter_whose_scanner_asks_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no public interface: Python 3.15 has one attribute more to be asked for."""

    def make_scanner(context: object) -> object:
        return context.of_some_other_python  # type: ignore[attr-defined]

    monkeypatch.setattr("_json.make_scanner", make_scanner)
    assert losetup.decoded('{"devname": "loop7", "nodes": [1]}') == {"devname": "loop7", "nodes": [1]}
