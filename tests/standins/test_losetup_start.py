"""What the stand-ins import: build scripts call them again and again. How long it takes, `make bench` measures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.box import stand_ins_fixture  # noqa: F401
from support.daemon import Daemon

from loopd import losetup

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


def test_they_import_next_to_nothing(environment: dict[str, str], stand_ins: Path, tmp_path: Path) -> None:
    bare, _ = imported(environment, "-c", "pass")
    assert "encodings" in bare
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))

    def call(name: str, *arguments: str) -> str:
        modules, output = imported(environment, str(stand_ins / name), *arguments)
        assert modules - bare <= NEEDED, name
        return output

    device = call("losetup", "-f", "--show", str(image))
    assert device.startswith("/")
    assert device in call("losetup", "-a")
    assert call("kpartx", "-l", device) == ""
    assert call("partprobe", device) == ""
    assert call("partx", "-u", device) == ""
    assert call("dmsetup", "ls") == "No devices found"
    assert call("losetup", "-d", device) == ""


def test_rarely_needed_code_is_compiled_when_it_is_called(stand_ins: Path) -> None:
    """Compiling is most of a start. What attaching and detaching do without is a text until then."""
    text = (stand_ins / "losetup").read_text()
    rare = text.partition("RARELY = r'''")[2].partition("'''")[0]
    for name in losetup.RARE:
        assert f"\ndef {name}(" in rare
    assert len(rare) > len(text) // 4


def test_an_interpreter_whose_scanner_asks_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no public interface: Python 3.15 has one attribute more to be asked for."""

    def make_scanner(context: object) -> object:
        return context.of_some_other_python  # type: ignore[attr-defined]

    monkeypatch.setattr("_json.make_scanner", make_scanner)
    assert losetup.decoded('{"devname": "loop7", "nodes": [1]}') == {"devname": "loop7", "nodes": [1]}
