"""`make demo` does what it says, and says so when it does not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import demo as played
import pytest
from support.daemon import require

DEMO = Path(__file__).parents[1] / "demo.py"


def demo(*before: str) -> subprocess.CompletedProcess[str]:
    command = [*before, "/usr/bin/python3", str(DEMO)]
    return subprocess.run(command, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)


def folders() -> set[Path]:
    return set(Path("/tmp").glob("loopd-demo-*"))


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """That of a demo which was killed before is none of this test's."""
    require(os.geteuid() == 0, "binding a loop device and making namespaces needs root")
    before = folders()
    yield
    assert folders() <= before


def test_demo() -> None:
    done = demo()
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("\nNothing is left behind: no device, no node, no process, no mount, no file.\n")


def test_devices_that_were_there_before_are_no_leftovers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Another daemon's, as one that is started by hand, may be of the same numbers."""
    there = {"loop4160", "loop4161"}
    monkeypatch.setattr(played, "devices", lambda: there)
    assert played.leftovers(tmp_path, {"loop4160"}, "loop4162") == ["/sys/block/loop4161"]
    assert played.leftovers(tmp_path, there, "loop4162") == []


def test_demo_that_fails_says_so_and_cleans_up() -> None:
    # No file of the size of the image can be made, which is found out in the container.
    done = demo("prlimit", "--fsize=20000000")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "container$ truncate" in done.stdout
    assert "FAILED" in done.stdout


def test_demo_that_is_ended_cleans_up() -> None:
    """By what ends a session, too: a terminal that is closed, a runner that gives up."""
    process = subprocess.Popen([sys.executable, str(DEMO)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if "loopctl attach" in line:
            break
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, rest
