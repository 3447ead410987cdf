"""What is lost is told: an image that lacks what was written to its device is no success, and is in the audit.

The file system of a sparse image is full. The kernel writes a device's cache back at its last close, which tells nobody
of an error; the sync of the release is the first to hear of it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import DEVNULL
from typing import Any

import pytest
from support.daemon import ROOT, Daemon, bound_to, eventually, require
from support.processes import injected
from support.untouched import children

import loopd
from loopd.protocol import wire

MIB = 1 << 20
LOST = (os.strerror(errno.ENOSPC), os.strerror(errno.EIO))
"""Of a full file system the loop driver tells the device's cache no more than EIO (6.18)."""
IO_ERROR = os.strerror(errno.EIO)
WORDS = "lacks what was written"
"""What a user is told; the daemon's error follows."""
DATA = os.urandom(MIB) * 8


@contextlib.contextmanager
def mounted(point: Path, options: str) -> Iterator[Path]:
    """A tmpfs."""
    require(os.geteuid() == 0, "needs root: loop devices and mounts")
    subprocess.run(["mount", "--mkdir", "-t", "tmpfs", "-o", options, "loopd-test", point], check=True)
    try:
        yield point
    finally:
        umount = ["umount", str(point)]
        eventually(lambda: subprocess.run(umount, check=False, stderr=DEVNULL).returncode == 0, "it is unmounted")


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A sparse image of 32 MiB on a file system with room for 2."""
    with mounted(tmp_path / "full", "size=2M") as point:
        image = point / "disk.img"
        image.touch()
        os.truncate(image, 32 * MIB)
        yield image


@pytest.fixture
def grants(tmp_path: Path) -> Iterator[Path]:
    """Where a daemon has its directories."""
    with mounted(tmp_path / "grants", "mode=0711") as point:
        yield point


@pytest.fixture
def daemon(full: Path, grants: Path, start_daemon: Callable[..., Daemon]) -> Daemon:
    """One that ends before the file systems do."""
    assert full.exists()
    return start_daemon(f"--grant-directory={grants}")


def write(device: Path | str, data: bytes = DATA) -> None:
    """As dd does: a write, and a close that hears of no error."""
    with open(device, "r+b", buffering=0) as file:
        file.write(data)


def lacks(image: Path) -> bool:
    """Whether the image is without some of it: else a test here shows nothing."""
    with image.open("rb") as file:
        return file.read(len(DATA)) != DATA


def the_record(daemon: Daemon, name: str, image: Path) -> dict[str, str]:
    """The one record of it, which names the device and the file."""
    record: dict[str, str]
    (record,) = eventually(lambda: daemon.records("lost"), "it is recorded")
    assert (record["LOOPD_DEVICE"], record["LOOPD_BACKING_FILE"]) == (name, str(image))
    assert record["PRIORITY"] in "01234"  # a warning at least
    assert WORDS in record["MESSAGE"]
    return record


# The wire ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direct_io", ["on", "off"])
@pytest.mark.parametrize("deliver", ["node", "fd", "mount"])
def test_the_reply_to_a_detach_tells_it(
    daemon: Daemon, full: Path, directory: int, devices: Path, deliver: str, direct_io: str
) -> None:
    with full.open("r+b") as image:
        place = directory if deliver == "node" else None
        reply = daemon.attach(image.fileno(), place, deliver=(deliver,), direct_io=direct_io)
        assert reply.code is None, reply.fields
    name = reply.fields["devname"]
    if deliver == "node":
        write(devices / name)
    elif deliver == "mount":
        write(f"/proc/self/fd/{reply.fds[0]}/{name}")
    else:
        with open(reply.fds.pop(), "r+b", buffering=0) as file:
            file.write(DATA)
    answer = daemon.ask(wire.Detach(name, 0, wait=5), []).fields
    assert set(answer) == {"state", "lost"}
    assert answer["state"] == "released"
    assert answer["lost"] in LOST
    assert lacks(full)
    assert not bound_to(full)
    assert answer["lost"] in the_record(daemon, name, full)["MESSAGE"]


def test_nothing_is_said_where_nothing_is_lost(daemon: Daemon, full: Path, directory: int, devices: Path) -> None:
    with full.open("r+b") as image:
        name = daemon.attach(image.fileno(), directory).fields["devname"]
    write(devices / name, DATA[:MIB])
    assert daemon.ask(wire.Detach(name, 0, wait=5), []).fields == {"state": "released"}
    assert full.read_bytes()[:MIB] == DATA[:MIB]
    eventually(lambda: daemon.records("detached"), "the detach is recorded")
    assert daemon.records("lost") == []


def test_the_next_device_of_the_image_is_not_blamed(daemon: Daemon, full: Path, directory: int, devices: Path) -> None:
    with full.open("r+b") as image:
        first = daemon.attach(image.fileno(), directory).fields["devname"]
        write(devices / first)
        assert daemon.ask(wire.Detach(first, 0, wait=5), []).fields["lost"] in LOST
        os.truncate(full, 0)
        os.truncate(full, 32 * MIB)
        second = daemon.attach(image.fileno(), directory).fields["devname"]
    write(devices / second, DATA[:MIB])
    assert daemon.ask(wire.Detach(second, 0, wait=5), []).fields == {"state": "released"}
    the_record(daemon, first, full)


def test_an_end_that_nobody_waits_for_is_recorded(daemon: Daemon, full: Path, directory: int, devices: Path) -> None:
    """The client is gone, and with it whoever could be told."""
    with full.open("r+b") as image:
        reply = daemon.attach(image.fileno(), directory)
    write(devices / reply.fields["devname"])
    reply.close()
    the_record(daemon, reply.fields["devname"], full)
    eventually(lambda: daemon.records("expired"), "its end is a record, too")


@pytest.mark.parametrize("partscan", [False, True])
def test_any_error_of_the_sync_is_told(
    daemon: Daemon, make_image: Callable[..., int], directory: int, tmp_path: Path, *, partscan: bool
) -> None:
    """EIO, of a disk that fails; there is none here, so the call fails in the real worker."""
    name = daemon.attach(make_image(), directory, partscan=partscan).fields["devname"]
    with injected(children(daemon.pid), "fsync:error=EIO", "fdatasync:error=EIO"):
        answer = daemon.ask(wire.Detach(name, 0, wait=5), [])
    assert answer.fields == {"state": "released", "lost": IO_ERROR}
    assert IO_ERROR in the_record(daemon, name, tmp_path / "image")["MESSAGE"]


# The clients ------------------------------------------------------------------------------------------------------


class Told:
    """A client's command: its exit status, and the one line that it is to say."""

    def __init__(self, daemon: Daemon, devices: Path) -> None:
        self.environment = {
            **os.environ, "LOOPD_SOCKET": daemon.path, "LOOPD_DIRECTORY": str(devices), "PYTHONPATH": str(ROOT),
            "LC_ALL": "C.UTF-8",
        }  # fmt: skip

    def run(self, *command: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*map(str, command)], check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
            env=self.environment,
        )  # fmt: skip

    def loopctl(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, "-m", "loopd.cli", *arguments)

    def losetup(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, ROOT / "loopd/losetup.py", *arguments)


@pytest.fixture
def told(daemon: Daemon, devices: Path) -> Told:
    return Told(daemon, devices)


def assert_line(done: subprocess.CompletedProcess[str], *, code: int = 1) -> None:
    """It failed with one line that says what happened."""
    lines = [line for line in done.stderr.splitlines() if "CAP_MKNOD" not in line]  # the test's process has it
    assert (done.returncode, len(lines)) == (code, 1), done
    assert WORDS in lines[0]
    assert any(error in lines[0] for error in LOST)


@pytest.mark.parametrize("arguments", [[], ["--all"]], ids=["one", "all"])
def test_loopctl_detach(daemon: Daemon, told: Told, full: Path, arguments: list[str]) -> None:
    device = Path(told.loopctl("attach", full).stdout.rstrip("\n"))
    write(device)
    assert_line(told.loopctl("detach", *(arguments or [str(device)])))
    assert lacks(full)
    the_record(daemon, device.name, full)


def test_loopctl_detach_of_several(told: Told, full: Path, tmp_path: Path) -> None:
    """The others are detached all the same, and have nothing to complain of."""
    other = tmp_path / "other.img"
    other.write_bytes(bytes(MIB))
    devices = [told.loopctl("attach", image).stdout.rstrip("\n") for image in (full, other)]
    write(devices[0])
    write(devices[1], DATA[:MIB])
    assert_line(told.loopctl("detach", *devices))
    assert other.read_bytes() == DATA[:MIB]
    assert not bound_to(tmp_path)


@pytest.mark.parametrize("status", [0, 3])
def test_loopctl_run(daemon: Daemon, told: Told, full: Path, tmp_path: Path, status: int) -> None:
    """A command that succeeded has not; one that failed keeps its own exit status."""
    (tmp_path / "data").write_bytes(DATA)
    script = f'dd if="$0" of="$1" bs=1M status=none; exit {status}'
    assert_line(told.loopctl("run", full, "--", "sh", "-c", script, tmp_path / "data", "{}"), code=status or 1)
    assert lacks(full)
    eventually(lambda: daemon.records("lost"), "it is recorded")


@pytest.mark.parametrize("command", ["--detach", "--detach-all"])
def test_the_drop_in_losetup(daemon: Daemon, told: Told, full: Path, command: str) -> None:
    """The real one succeeds without a word."""
    device = Path(told.losetup("--find", "--show", full).stdout.rstrip("\n"))
    write(device)
    assert_line(told.losetup(command, *([device] if command == "--detach" else [])))
    assert lacks(full)
    assert not bound_to(full)
    the_record(daemon, device.name, full)


@pytest.mark.parametrize("deliver", [["node"], ["fd"]], ids=["node", "fd"])
def test_the_with_block(daemon: Daemon, full: Path, devices: Path, deliver: Any) -> None:
    place = devices if deliver == ["node"] else None
    with pytest.raises(loopd.Error, match=f"{WORDS}.*({'|'.join(LOST)})"):
        with loopd.attach(full, place, deliver=deliver, socket=daemon.path) as device:
            os.write(device.fd, DATA)
    assert lacks(full)
    assert not bound_to(full)
    the_record(daemon, device.devname, full)


def test_an_error_of_the_with_block_is_the_one_to_see(daemon: Daemon, full: Path, devices: Path) -> None:
    names: list[str] = []

    def block() -> None:
        with loopd.attach(full, devices, socket=daemon.path) as device:
            names.append(device.devname)
            os.write(device.fd, DATA)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        block()
    assert not bound_to(full)
    the_record(daemon, names[0], full)


def test_a_detach_of_the_library(daemon: Daemon, full: Path, devices: Path) -> None:
    """It is told once: the device is gone."""
    device = loopd.attach(full, devices, socket=daemon.path)
    os.write(device.fd, DATA)
    with pytest.raises(loopd.Error, match=WORDS):
        device.detach()
    with contextlib.closing(device):
        assert device.detach()
