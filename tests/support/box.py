"""A container without its runtime: a mount and a PID namespace with a /dev of its own, loopd's socket, the stand-ins.

What a stand-in does is held against the real program, run beside it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from loopd.protocol import wire
from support.daemon import ROOT, Daemon, bound_to, eventually, require

MIB = 1 << 20
PACK = ROOT / "systemd/packaging/stand_ins.py"
STAND_INS = re.findall(r"[a-z]+:[a-z]+", re.findall(r"(?m)^STAND_INS = (.*)$", (ROOT / "Makefile").read_text())[0])
"""Module and program of each, as the Makefile has them."""


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


@pytest.fixture(name="real", scope="session")
def real_fixture() -> str:
    """The losetup of util-linux."""
    path = shutil.which("losetup", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    require(path and "util-linux" in run(path, "--version").out, "needs losetup of util-linux (package mount)")
    return str(path)


@pytest.fixture(name="version", scope="session")
def version_fixture(real: str) -> tuple[int, ...]:
    """That losetup's version: where the versions differ, ours says what the newest says."""
    return tuple(map(int, re.findall(r"\d+", run(real, "--version").out.split()[-1])))


@pytest.fixture(name="stand_ins", scope="session")
def stand_ins_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the programs as they are installed."""
    directory = tmp_path_factory.mktemp("programs")
    subprocess.run([sys.executable, str(PACK), str(directory), *STAND_INS], check=True)
    return directory


class Box:
    """A container: its own /dev, a tmpfs, its own PID 1, and the stand-ins first in its PATH."""

    def __init__(self, folder: Path, daemon: Daemon, programs: Path, grant: str = "") -> None:
        self.folder = folder
        self.programs = folder / "bin"
        shutil.copytree(programs, self.programs)
        script = "mount -t tmpfs -o mode=755 tmpfs /dev; mknod -m 666 /dev/null c 1 3; mknod -m 666 /dev/zero c 1 5;"
        if grant:
            script += f"mkdir /dev/loopd; mount --bind {grant} /dev/loopd; mount -o remount,bind,ro /dev/loopd;"
        self.environment = {**os.environ, "LOOPD_SOCKET": daemon.path, "LC_ALL": "C.UTF-8"}
        self.environment["PATH"] = f"{self.programs}:{os.environ['PATH']}:/usr/sbin:/sbin"
        self.environment.pop("LOOPD_DIRECTORY", None)
        unshare = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation", "private"]
        self._process = subprocess.Popen(
            [*unshare, "sh", "-ec", f"{script} echo ready; exec sleep 1000"],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=self.environment,
        )  # fmt: skip
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        self.pid = int(children[0])
        # The working directory is to be one of this mount namespace's.
        self.inside = ["nsenter", f"--target={self.pid}", "--mount", "--pid"]
        self.inside += ["sh", "-c", 'cd "$0" && exec "$@"', str(folder)]

    def __call__(self, *command: object) -> Result:
        """Run a command in it."""
        return run(*self.inside, *command, env=self.environment)

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


@pytest.fixture(name="box", params=["own /dev", "grant"])
def box_fixture(
    request: pytest.FixtureRequest, start_daemon: Callable[..., Daemon], stand_ins: Path, tmp_path: Path
) -> Iterator[Box]:
    """A box whose nodes are made in its own /dev, and one with a directory grant at /dev/loopd."""
    yield from make_box(start_daemon, tmp_path, stand_ins, grant=request.param == "grant")


@pytest.fixture(name="granted")
def granted_fixture(start_daemon: Callable[..., Daemon], stand_ins: Path, tmp_path: Path) -> Iterator[Box]:
    """A box with a directory grant at /dev/loopd."""
    yield from make_box(start_daemon, tmp_path, stand_ins, grant=True)


@pytest.fixture(name="plain")
def plain_fixture(start_daemon: Callable[..., Daemon], stand_ins: Path, tmp_path: Path) -> Iterator[Box]:
    """A box whose nodes are made in its own /dev."""
    yield from make_box(start_daemon, tmp_path, stand_ins, grant=False)


def make_box(start_daemon: Callable[..., Daemon], tmp_path: Path, programs: Path, *, grant: bool) -> Iterator[Box]:
    grants = tmp_path / "grants"
    grants.mkdir()
    daemon = start_daemon("--grant-directory", str(grants), name="boxed")
    path = daemon.ask(wire.Directory("box", 0), []).fields["path"] if grant else ""
    folder = tmp_path / "box"
    folder.mkdir()
    with (folder / "image").open("wb") as file:
        file.truncate(4 * MIB)
    box = Box(folder, daemon, programs, path)
    try:
        yield box
    finally:
        box.close()
        eventually(lambda: not bound_to(folder), "PID 1 has ended, so its devices are gone")


# Beside the real programs -----------------------------------------------------------------------------------------

PROGRAMS = {"L": "losetup", "M": "mount", "K": "kpartx", "P": "partx", "B": "partprobe"}
"""Programs by their names in scripts."""


def beside(box: Box, script: str) -> tuple[Result, Result]:
    """A script run by the real programs, in a mount namespace of its own on the host, and by the stand-ins in the box.

    Each in an empty directory of its own. The numbers of devices and the paths of the directories are left out of what
    they say.
    """
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    here, there = box.folder.parent / "theirs", box.folder / "ours"
    here.mkdir()
    there.mkdir()
    environment = {**box.environment, "PATH": path}
    programs = {letter: shutil.which(name, path=path) or name for letter, name in PROGRAMS.items()}
    programs["L"] = patient(programs["L"], box.folder.parent / "losetup")
    theirs = run("unshare", "--mount", "bash", "-c", script, cwd=here, env={**environment, **programs})
    ours = run(
        *box.inside, "sh", "-c", 'cd "$0" && exec bash -c "$1"', there, script, env={**box.environment, **PROGRAMS}
    )
    return plainly(theirs, here), plainly(ours, there)


def patient(losetup: str, path: Path) -> str:
    """The real losetup, which tries again where the device that it found is taken or removed by another test."""
    path.write_text(f"""#!/bin/sh
case " $* " in *" -f "*) ;; *) exec {losetup} "$@" ;; esac
for try in 1 2 3 4 5; do {losetup} "$@" 2>"$0.said" && break; done
code=$?; cat "$0.said" >&2; exit $code
""")
    path.chmod(0o755)
    return str(path)


def plainly(result: Result, folder: Path) -> Result:
    """A result without numbers of devices and inodes, and the path of its folder."""
    out, err = (
        re.sub(r"\[\d+\]:\d+", "[DEV]:INODE", re.sub(r"loop\d+", "loopN", text.replace("/dev/loopd/", "/dev/")))
        for text in (result.out.replace(str(folder), "@"), result.err.replace(str(folder), "@"))
    )
    return Result(result.code, out, err)
