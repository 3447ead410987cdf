"""A folder that every user of the host reaches, with a daemon, its grants and an installed loopctl in it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.daemon import ROOT, Daemon, eventually, require
from support.processes import Child, become

from loopd.client import layers

UID = 1000
OTHER = 1001
MIB = 1 << 20
PYTHON = "/usr/bin/python3"
UNSHARED = ["unshare", "-Urm", "--propagation", "private"]
BWRAP = [
    "bwrap",
    "--unshare-all",
    "--die-with-parent",
    "--ro-bind",
    "/",
    "/",
    "--proc",
    "/proc",
    "--dev",
    "/dev",
]


class Served(Daemon):
    """A daemon with the administrator's socket as well."""

    @property
    def admin(self) -> str:
        return f"{self.path}.admin"

    def start(self) -> None:
        activate = shutil.which("systemd-socket-activate")
        require(activate, "systemd-socket-activate (package systemd) is missing")
        command = [str(activate), "--datagram", "-l", self.path, "-l", self.admin, "--fdname=loopd:admin"]
        command += ["-E", "PYTHONPATH", sys.executable, "-m", "loopd", "--state-directory", str(self.state)]
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, *self._options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
        eventually(lambda: Path(self.admin).exists(), "the sockets are there")
        os.chmod(self.path, 0o666)


class World:
    """A folder that every user reaches, with a daemon, its grants and an installed loopctl."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.grants = folder / "grants"
        self.work = folder / "work"
        run = folder / "run"
        for path in (self.grants, self.work, run):
            path.mkdir()
        os.chown(self.work, UID, UID)
        shutil.copytree(ROOT / "loopd", folder / "lib/loopd", ignore=shutil.ignore_patterns("__pycache__"))
        loopctl = folder / "loopctl"
        program = (
            f"import sys\nsys.path.insert(0, '{folder}/lib')\nfrom loopd.cli import main\nsys.exit(main())\n"
        )
        loopctl.write_text(f"#!{PYTHON} -IS\n{program}")
        loopctl.chmod(0o755)
        self.daemon = Served(run, ["--grant-directory", str(self.grants)], [], {})
        self.environment = {
            "PATH": f"{folder}:/usr/sbin:/usr/bin:/sbin:/bin",
            "LOOPD_SOCKET": self.daemon.path,
            "LANG": "C.UTF-8",
            "WORK": str(self.work),
        }

    def image(self, name: str = "disk.img", size: int = 8 * MIB) -> Path:
        path = self.work / name
        path.touch()
        os.truncate(path, size)
        os.chown(path, UID, UID)
        return path

    def grant(self, name: str, uid: int = UID) -> Path:
        """A directory of loopd's for that user, as `loopctl directory` on the host gives it."""
        return Path(self.ctl("directory", name, uid=uid).stdout.rstrip("\n"))

    def ctl(
        self, *arguments: object, uid: int = 0, check: bool = True, **env: str
    ) -> subprocess.CompletedProcess[str]:
        """Run loopctl to its end, as a user of the host."""
        return self.run([*as_user(uid), "loopctl", *map(str, arguments)], check=check, **env)

    def run(self, command: list[str], *, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command,
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            env={**self.environment, **env},
            cwd=self.work,
        )
        assert not check or done.returncode == 0, done.stderr
        return done

    def client(self, body: Callable[[Callable[[Any], None]], object], uid: int = UID, **env: str) -> Child:
        """A process of its own that uses the client library."""

        def run(tell: Callable[[Any], None]) -> None:
            os.environ.update(self.environment, **env)
            os.chdir(self.work)
            become(uid)
            body(tell)
            signal.pause()

        return Child(run)


def as_user(uid: int) -> list[str]:
    return ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"] if uid else []


@pytest.fixture(name="world")
def world_fixture() -> Iterator[World]:
    require(os.geteuid() == 0, "needs root: loop devices and mounts")
    require(os.path.exists("/dev/loop-control"), "needs /dev/loop-control")
    require(os.access(PYTHON, os.X_OK), f"needs {PYTHON}, which every user reaches")
    folder = Path(tempfile.mkdtemp(prefix="loopd-test-", dir="/tmp"))
    folder.chmod(0o755)
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        found = World(folder)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=0711", "loopd-test", found.grants], check=True)
        stack.callback(lambda: subprocess.run(["umount", "--lazy", found.grants], check=True))
        stack.callback(found.daemon.stop)
        found.daemon.start()
        yield found


def is_devtmpfs(path: str) -> bool:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return layers.is_devtmpfs(fd)
    finally:
        os.close(fd)
