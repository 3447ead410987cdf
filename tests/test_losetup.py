"""The drop-in losetup in a container's stead: a mount and a PID namespace with a /dev of its own, and loopd's socket.

What it prints is held against the real losetup, run beside it on the same devices.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT, Daemon, bound_to, eventually, exists, require

import loopd
from loopd import wire

SOURCE = ROOT / "loopd" / "losetup.py"
MIB = 1 << 20
CONTENT = b"written in a container"


class Result(NamedTuple):
    code: int
    out: str
    err: str


def run(*command: object, **options: object) -> Result:
    """A command whose argv[0] may be followed by the program to run in its stead."""
    done = subprocess.run(
        [str(word) for word in command], check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=60, **options,  # type: ignore[call-overload]
    )  # fmt: skip
    return Result(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def real() -> str:
    """The losetup of util-linux."""
    path = shutil.which("losetup", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    require(path and "util-linux" in run(path, "--version").out, "needs losetup of util-linux (package mount)")
    return str(path)


class Box:
    """A container without its runtime: its own /dev, a tmpfs, its own PID 1, and `losetup` first in its PATH."""

    def __init__(self, folder: Path, daemon: Daemon, grant: str = "") -> None:
        self.folder = folder
        self.programs = folder / "bin"
        self.programs.mkdir()
        shutil.copy(SOURCE, self.programs / "losetup")
        bind = f"mkdir /dev/loopd; mount --bind {grant} /dev/loopd; mount -o remount,bind,ro /dev/loopd;"
        script = f"mount -t tmpfs -o mode=755 tmpfs /dev; mknod -m 666 /dev/null c 1 3; {bind if grant else ''}"
        unshare = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation", "private"]
        self._process = subprocess.Popen(
            [*unshare, "sh", "-ec", f"{script} echo ready; exec sleep 1000"],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        self.pid = int(children[0])
        self.environment = {**os.environ, "LOOPD_SOCKET": daemon.path, "LC_ALL": "C.UTF-8"}
        self.environment["PATH"] = f"{self.programs}:{os.environ['PATH']}:/usr/sbin:/sbin"
        self.environment.pop("LOOPD_DIRECTORY", None)

    def __call__(self, *command: object) -> Result:
        """Run a command in it."""
        inside = ["nsenter", f"--target={self.pid}", "--mount", "--pid", f"--wd={self.folder}"]
        return run(*inside, *command, env=self.environment)

    def losetup(self, *arguments: object) -> Result:
        return self(self.programs / "losetup", *arguments)

    def attach(self, *arguments: object) -> str:
        """A device attached with -f --show; its path."""
        result = self.losetup("-f", "--show", *arguments)
        assert (result.code, result.err) == (0, "")
        return result.out.rstrip("\n")

    def dev(self, name: str = "") -> Path:
        """Its /dev, seen from outside; symbolic links in it are not to be followed."""
        return Path(f"/proc/{self.pid}/root/dev") / name

    def names(self) -> set[str]:
        """The names in its /dev that begin with loop."""
        return {path.name for path in self.dev().iterdir() if path.name.startswith("loop")} - {"loopd"}

    def close(self) -> None:
        """End it: its PID 1 is killed."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._process.wait(10)
        assert self._process.stdout is not None
        self._process.stdout.close()


@pytest.fixture(params=["own /dev", "grant"])
def box(request: pytest.FixtureRequest, start_daemon: Callable[..., Daemon], tmp_path: Path) -> Iterator[Box]:
    """A box whose nodes are made in its own /dev, and one with a directory grant at /dev/loopd."""
    yield from make_box(start_daemon, tmp_path, request.param == "grant")


@pytest.fixture
def granted(start_daemon: Callable[..., Daemon], tmp_path: Path) -> Iterator[Box]:
    """A box with a directory grant at /dev/loopd."""
    yield from make_box(start_daemon, tmp_path, True)


@pytest.fixture
def plain(start_daemon: Callable[..., Daemon], tmp_path: Path) -> Iterator[Box]:
    """A box whose nodes are made in its own /dev."""
    yield from make_box(start_daemon, tmp_path, False)


def make_box(start_daemon: Callable[..., Daemon], tmp_path: Path, grant: bool) -> Iterator[Box]:
    grants = tmp_path / "grants"
    grants.mkdir()
    daemon = start_daemon("--grant-directory", str(grants))
    path = daemon.ask(wire.Directory("box", 0), []).fields["path"] if grant else ""
    folder = tmp_path / "box"
    folder.mkdir()
    with (folder / "image").open("wb") as file:
        file.truncate(4 * MIB)
    box = Box(folder, daemon, path)
    try:
        yield box
    finally:
        box.close()
        eventually(lambda: not bound_to(folder), "PID 1 has ended, so its devices are gone")


# Setting up and detaching -----------------------------------------------------------------------------------------


def test_find_show_and_detach(box: Box) -> None:
    device = box.attach("image")
    assert re.fullmatch(r"/dev/loop\d+", device)
    assert box("test", "-b", device).code == 0
    assert box("dd", "if=/dev/zero", f"of={device}", "bs=4096", "count=1", "conv=fsync").code == 0
    (name,) = bound_to(box.folder)
    assert device == f"/dev/{name}"
    assert box.losetup("-d", device) == Result(0, "", "")
    assert not bound_to(box.folder)
    assert box.names() == set()
    again = box.losetup("-d", device)
    assert again == Result(1, "", f"losetup: {device}: failed to use device: No such device\n")
