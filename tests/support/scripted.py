"""A scripted daemon for the tests of the client: the other end of the wire, and nothing behind it.

A real datagram socket and a thread that answers each request by the next step of a script. What a device does, and what
the daemon does, is not shown here.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
import subprocess
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Callable, Iterator, Sequence

import pytest

DEADLINE = 20.0


class Request:
    """One datagram as it arrived; closes its fds at the end of its step but for `channel`, which the peer closes."""

    def __init__(self, payload: bytes, fds: Sequence[int]) -> None:
        self.payload = payload
        self.fields: dict[str, Any] = json.loads(payload)
        self.fds = list(fds)
        self.channel = socket.socket(fileno=os.dup(fds[self.fields["reply_fd"]]))

    def reply(self, fields: Any, fds: Sequence[int] = ()) -> None:
        payload = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.channel.sendmsg([payload], rights)
        self.channel.shutdown(socket.SHUT_WR)

    def refuse(self, code: str, message: str = "no") -> None:
        self.reply({"error": {"code": code, "message": message}})

    def fdinfo(self, name: str) -> str:
        """A line of what the kernel tells of the fd that the request names so."""
        text = Path(f"/proc/self/fdinfo/{self.fds[self.fields[name]]}").read_text()
        return dict(line.split(":", 1) for line in text.splitlines())["Pid"].strip()


Step = Callable[[Request], object]


class Peer:
    """Serves `steps` in order at `path`, keeps the requests with their channels open, and at the end insists on all."""

    def __init__(self, path: Path, *steps: Step) -> None:
        self.path = path
        self.requests: list[Request] = []
        self._steps = steps
        self._failure: BaseException | None = None
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.settimeout(DEADLINE)
        path.chmod(0o666)
        self._thread = threading.Thread(target=self._serve)

    def _serve(self) -> None:
        try:
            for step in self._steps:
                payload, ancillary, _, _ = self._socket.recvmsg(65536, socket.CMSG_SPACE(4 * 253))
                fds = array.array("i")
                for level, kind, content in ancillary:
                    assert (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
                    fds.frombytes(content)
                try:
                    request = Request(payload, fds)
                    self.requests.append(request)
                    step(request)
                finally:
                    for fd in fds:
                        os.close(fd)
        except BaseException as error:  # noqa: BLE001  # raised again in the test
            self._failure = error
            self._socket.close()

    def __enter__(self) -> Peer:  # noqa: PYI034  # Self is of Python 3.11
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            if error is not None:  # the script will not be asked for the rest: wake the thread up
                self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(DEADLINE + 1)
        self._socket.close()
        for request in self.requests:
            request.channel.close()
        assert not self._thread.is_alive()
        if error is None and self._failure is not None:
            raise self._failure

    def hung_up(self, index: int = 0) -> bool:
        """Whether the client's end of a request's channel is closed, in all of its copies."""
        channel = self.requests[index].channel
        channel.setblocking(False)
        try:
            return channel.recv(1) == b""
        except BlockingIOError:
            return False


class Loop:
    """A real loop device, bound by losetup, and the reply that would tell of it."""

    def __init__(self, image: Path) -> None:
        self.image = image
        command = ["losetup", "--find", "--show", str(image)]
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        for _ in range(5):
            if result.returncode == 0:
                break
            # The device that it found was removed before it opened it: loopd, in another test, does that.
            result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        result.check_returncode()
        self.path = result.stdout.strip()
        self.number = os.stat(self.path).st_rdev
        self.reply: dict[str, Any] = {
            "devname": os.path.basename(self.path),
            "diskseq": 7,
            "major": os.major(self.number),
            "minor": os.minor(self.number),
            "size": image.stat().st_size,
            "sector_size": 512,
            "read_only": False,
            "direct_io": False,
        }

    def deliver(self, request: Request) -> None:
        """A step: make the node in the client's directory and reply, as the daemon does."""
        dir_fd = request.fds[request.fields["dir_fd"]]
        os.mknod(self.reply["devname"], 0o600 | 0o060000, self.number, dir_fd=dir_fd)
        request.reply(self.reply)


def released(request: Request) -> None:
    request.reply({"state": "released"})


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Loop]:
    if os.geteuid() or not os.path.exists("/dev/loop-control"):
        pytest.skip("binding a loop device needs root and /dev/loop-control")
    image = tmp_path / "bound.img"
    image.write_bytes(b"loopd" + bytes((1 << 20) - 5))
    device = Loop(image)
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device.path], check=True)


@pytest.fixture(autouse=True)
def no_directory_of_loopd(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the machine of the tests has bound in is none of their business."""
    monkeypatch.setenv("LOOPD_DIRECTORY", "/nonexistent")


@pytest.fixture(autouse=True)
def no_fd_is_left() -> Iterator[None]:
    before = os.listdir("/proc/self/fd")
    yield
    assert os.listdir("/proc/self/fd") == before
