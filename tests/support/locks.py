"""Locks that a client holds: while the kernel copies from memory, or to it, that a FUSE server has to bring."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from support.daemon import Daemon, eventually, require
from support.fuse_never import SIZE, Never
from support.processes import Child
from support.untouched import honest, send, state

SERVED = 5.0
"""Seconds in which an honest client has its reply, whatever hangs: before that is written off."""
WRITTEN_OFF = 6.0
"""Seconds after which the daemons here write a helper off."""


@pytest.fixture(name="never")
def never_fixture(start_daemon: Callable[..., Daemon], tmp_path: Path) -> Iterator[Never]:
    """The file system; ended before the daemons are, so that what hangs in it can end."""
    require(os.path.exists("/dev/fuse"), "needs /dev/fuse")
    try:
        file_system = Never(tmp_path / "never")
    except OSError as error:
        pytest.skip(f"FUSE cannot be mounted: {error}")
    try:
        yield file_system
    finally:
        file_system.end()


@pytest.fixture(name="quick")
def quick_fixture(start_daemon: Callable[..., Daemon], tmp_path: Path) -> Callable[..., Daemon]:
    """Start daemons that write a helper off soon."""
    config = tmp_path / "loopd.toml"
    config.write_text(f"request_timeout = {WRITTEN_OFF}\nwrite_back_timeout = {WRITTEN_OFF}\n")

    def start(*options: str, name: str = "loopd") -> Daemon:
        return start_daemon(f"--config={config}", *options, name=name)

    return start


@contextlib.contextmanager
def locking(never: Never, hold: Callable[[mmap.mmap], object], keep: Iterable[int] = ()) -> Iterator[Child]:
    """A process that, told nothing more once the file system is mute, waits in `hold` for memory that never comes.

    Its end waits for the file system's.
    """
    path = never._mountpoint / "file"
    go = os.pipe()

    def body(tell: Callable[[object], None]) -> None:
        file = os.open(path, os.O_RDWR)
        os.fstat(file)  # from now on the size is known
        memory = mmap.mmap(file, SIZE)
        tell("ready")
        os.read(go[0], 1)
        hold(memory)
        tell("not held")

    try:
        with Child(body, keep=[go[0], *keep]) as child:
            child.hear()
            never.mute()
            os.write(go[1], b"x")
            eventually(lambda: waits_for_fuse(child.pid), "the lock is held")
            try:
                yield child
            finally:
                never.end()
    finally:
        for fd in go:
            os.close(fd)


def waits_for_fuse(pid: int) -> bool:
    return "fuse" in stack(pid)


def stack(pid: int) -> str:
    return Path(f"/proc/{pid}/stack").read_text()


def writing(path: Path) -> Callable[[mmap.mmap], object]:
    """For `locking`: the lock of that file."""
    return lambda memory: os.pwrite(os.open(path, os.O_RDWR), memory, 0)


def listing(directory: Path) -> Callable[[mmap.mmap], object]:
    """Have a directory locked by whoever may read it."""

    def hold(memory: mmap.mmap) -> None:
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        listed = os.open(directory, os.O_RDONLY)
        ctypes.CDLL(None).getdents64(listed, ctypes.c_void_p(address), ctypes.c_size_t(SIZE))

    return hold


@contextlib.contextmanager
def closed_to_all(never: Never, directory: Path) -> Iterator[None]:
    """Nobody can look up a name in that directory: it is listed for ever, and who would make one there comes first."""

    def make(tell: Callable[[object], None]) -> None:
        tell("soon")
        with contextlib.suppress(OSError):  # neither file system lets files be made; it takes the lock to find out
            os.open(directory / "loopd-test", os.O_WRONLY | os.O_CREAT)

    with locking(never, listing(directory)), Child(make) as second:
        second.hear()
        eventually(lambda: state(second.pid) == "D", "the next one waits for the lock")
        try:
            yield
        finally:
            never.end()


def let_go(daemon: Daemon, image: int, directory: int, devices: Path) -> int:
    """A device that loopd has let go of, open here: its last close will be this fd's."""
    reply = daemon.attach(image, directory)
    device = os.open(devices / reply.fields["devname"], os.O_RDWR)
    reply.close()
    eventually(lambda: daemon.records("held"), "loopd has let go of the device")
    return device


def sent(daemon: Daemon, fd: int) -> None:
    send(daemon.path, b'{"op": "hello"}', [fd]).close()


def served(daemon: Daemon) -> None:
    """Honest clients are, all of them soon."""
    for _ in range(6):
        began, stuck = time.monotonic(), len(daemon.records("stuck"))
        assert daemon.hello().code is None
        honest(daemon)
        # On a busy machine it may take its time, but it does not wait for something to be written off.
        assert time.monotonic() - began < SERVED or len(daemon.records("stuck")) == stuck
