"""A real daemon under real socket activation, a client that can speak any bytes, and how tests wait."""

from __future__ import annotations

import array
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from loopd.protocol import wire

ROOT = Path(__file__).resolve().parents[2]


def require(condition: object, reason: str) -> None:
    """Skip the test where it cannot run."""
    if not condition:
        pytest.skip(reason)


def eventually(condition: Callable[[], Any], what: str, seconds: float = 10.0) -> Any:
    """The first true value of `condition` within `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.01)
    return value


def prompt(turn: Callable[[], float]) -> None:
    """What `turn` takes is a second at most, in one of five turns.

    Where the machine is busy with other things some are late. With a daemon that only looks now and then most would be.
    """
    took = [turn()]
    while took[-1] > 1.0 and len(took) < 5:
        took.append(turn())
    assert took[-1] <= 1.0, f"it took {took} s"


def bound_to(path: Path) -> list[str]:
    """The loop devices that hold a file of that path (or below that directory)."""
    found = []
    for attribute in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            if attribute.read_text(errors="replace").startswith(str(path)):
                found.append(attribute.parts[3])
    return found


class Reply:
    """What came back: the fields, the fds, and the client's end of the reply socket, which is the lease."""

    def __init__(self, channel: socket.socket, payload: bytes, fds: list[int]) -> None:
        self.channel = channel
        self.fields: dict[str, Any] = json.loads(payload) if payload else {}
        self.fds = fds

    @property
    def code(self) -> str | None:
        """The code of a refusal, None for a reply that is none."""
        return self.fields["error"]["code"] if "error" in self.fields else None

    def close(self) -> None:
        self.channel.close()
        for fd in self.fds:
            os.close(fd)
        self.fds = []


def ask(path: str, payload: bytes, fds: list[int], *, reply: bool = True, timeout: float = 10.0) -> Reply:
    """Send a datagram as it is; with `reply` one end of a socketpair goes along as the last fd, and the answer is
    awaited.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        sender.settimeout(timeout)
        sender.connect(path)
        rights = array.array("i", [*fds, theirs.fileno()] if reply else fds)
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights.tobytes())] if rights else []
        sender.sendmsg([payload], control)
    if not reply:
        return Reply(ours, b"", [])
    ours.settimeout(timeout)
    answer, control_in, _, _ = ours.recvmsg(wire.MAX_REPLY, socket.CMSG_SPACE(64))
    received = array.array("i")
    for _, kind, data in control_in:
        if kind == socket.SCM_RIGHTS:
            received.frombytes(data)
    return Reply(ours, answer, list(received))


class Daemon:
    """A loopd of the test's own, started by the first datagram."""

    def __init__(self, directory: Path, options: list[str], wrapper: list[str], environment: dict[str, str]) -> None:
        self.directory = directory
        self.path = str(directory / "loopd.sock")
        self.state = directory / "state"
        self.log_path = directory / "log"
        self._options = options
        self._wrapper = wrapper
        self._environment = environment
        self.launcher: list[str] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._replies: list[Reply] = []

    def start(self) -> None:
        """Listen on the socket; the daemon itself starts on the first datagram."""
        activate = shutil.which("systemd-socket-activate")
        require(activate, "systemd-socket-activate (package systemd) is missing")
        Path(self.path).unlink(missing_ok=True)
        command = [*self.launcher, str(activate), "--datagram", "-l", self.path, "--fdname=loopd"]
        for name in ("PYTHONPATH", *self._environment):
            command += ["-E", name]
        command += [*self._wrapper, sys.executable, "-m", "loopd", "--state-directory", str(self.state), *self._options]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **self._environment}
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=environment
            )
        eventually(lambda: Path(self.path).exists(), "the socket is there")

    @property
    def pid(self) -> int:
        """The main process (the daemon replaces systemd-socket-activate, and a tracer is its parent)."""
        assert self._process is not None
        if self._wrapper:
            children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
            return int(children[0]) if children else self._process.pid
        return self._process.pid

    def log(self) -> str:
        """Everything the daemon has written, its audit included."""
        return self.log_path.read_text(errors="replace")

    def records(self, event: str | None = None) -> list[dict[str, str]]:
        """The audit's records so far, of one kind or all."""
        found = []
        for line in self.log().splitlines():
            match = re.match(r"loopd: (.*) \[(MESSAGE_ID=.*)\]$", line)
            if match:
                fields = dict(re.findall(r"([A-Z_]+)='((?:[^'\\]|\\.)*)'", match[2]))
                found.append({"MESSAGE": match[1], **fields})
        return [record for record in found if event is None or record.get("LOOPD_EVENT") == event]

    def ask(self, payload: bytes | wire.Request, fds: list[int], **options: Any) -> Reply:
        """As `ask`, with a request or bytes."""
        if not isinstance(payload, bytes):
            payload = wire.encode_request(payload)
        reply = ask(self.path, payload, fds, **options)
        self._replies.append(reply)
        return reply

    def attach(self, image: int, directory: int | None, **fields: Any) -> Reply:
        """Attach with the fds in the usual places."""
        if directory is None:
            return self.ask(wire.Attach(0, reply_fd=1, **fields), [image])
        return self.ask(wire.Attach(0, 1, 2, **fields), [image, directory])

    def hello(self) -> Reply:
        """Greet: shows that an honest client is served."""
        return self.ask(wire.Hello(0), [])

    def fds(self) -> list[str]:
        """What the main process has open, but for its listening sockets' and pipes' inode numbers."""
        found = []
        for fd in Path(f"/proc/{self.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                found.append(re.sub(r"\[\d+\]", "", os.readlink(fd)))
        return sorted(found)

    def family(self) -> list[int]:
        """Every process of the daemon's session."""
        if self._process is None:
            return []
        found = []
        for status in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = status.read_text().rpartition(")")[2].split()
                if int(fields[3]) == self._process.pid and fields[0] != "Z":
                    found.append(int(status.parts[2]))
        return found

    def kill(self, number: int = signal.SIGKILL) -> None:
        """End the main process by a signal, and wait for its end."""
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)
        self._process.wait(20)

    def wait(self, seconds: float = 20.0) -> int:
        """Wait for the end; the exit status."""
        assert self._process is not None
        return self._process.wait(seconds)

    def stop(self) -> None:
        """End it in good order; nothing of it may be left."""
        for reply in self._replies:
            reply.close()
        if self._process is None:
            return
        if self._process.poll() is None:
            self.kill(signal.SIGTERM)
        family = self.family
        try:
            eventually(lambda: not family(), "no process is left", 10)
        finally:
            for pid in family():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        eventually(lambda: not bound_to(self.directory.parent), "no file of the test is bound", 10)


D = TypeVar("D", bound=Daemon)


@contextlib.contextmanager
def grants_at(path: Path) -> Iterator[Path]:
    """A tmpfs for directory grants, as run-loopd\\x2ddev.mount has one."""
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=0711", "loopd-test", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


@contextlib.contextmanager
def granted(start: Callable[..., D], place: Path, name: str) -> Iterator[tuple[D, Path, int]]:
    """A daemon with a directory grant of that name: the daemon, where the grant is, and the client's fd of it."""
    with grants_at(place / "grants") as grants:
        daemon = start(f"--grant-directory={grants}")
        path = Path(daemon.ask(wire.Directory(name, 0), []).fields["path"])
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            yield daemon, path, directory
        finally:
            os.close(directory)


LOCKS = "allow.lock = true\n"
"""A policy with which a client may keep the lock against udev."""


def configured(directory: Path, policy: str) -> list[str]:
    """The option for a daemon with this policy, which lies in its directory; none for one with the defaults."""
    if not policy:
        return []
    (directory / "loopd.toml").write_text(policy)
    return [f"--config={directory}/loopd.toml"]


def exists(devname: str) -> bool:
    """Whether the device exists."""
    return Path(f"/sys/block/{devname}").exists()
