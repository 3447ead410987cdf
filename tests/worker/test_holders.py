"""Nothing of loopd has a device open between attach and release.

The kernel writes a block device's cache back, and drops it, at the device's last close. So whatever loopd had open, in
a process or in a slot of the fd store, would take that close away from the client. What a slot holds no test can see;
that a client's close was the last one it can: the file has what was written, and the real losetup unbinds at once.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import re
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.daemon import LOCKS, ROOT, Daemon, Reply, bound_to, eventually, exists, granted, require
from support.kept import KINDS, Kept, hold, kept_fixture, start_kept_fixture  # noqa: F401
from support.processes import injected
from support.untouched import children

from loopd.loop import Loop
from loopd.protocol import wire

MIB = 1 << 20
SLOW = "close:delay_enter=30000"
"""A process that closes a device late, by so many microseconds, is one that had it open meanwhile."""


def openers(daemon: Daemon, name: str) -> list[str]:
    """Which fds of which processes of the daemon's are the device, or a partition of it."""
    numbers = set()
    for attribute in (Path(f"/sys/block/{name}/dev"), *Path(f"/sys/block/{name}").glob(f"{name}p*/dev")):
        with contextlib.suppress(OSError):
            numbers.add(os.makedev(*map(int, attribute.read_text().split(":"))))
    found = []
    for pid in daemon.family():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for fd in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(FileNotFoundError, PermissionError):
                    status = fd.stat()
                    if stat.S_ISBLK(status.st_mode) and status.st_rdev in numbers:
                        found.append(str(fd))
    return found


def in_slots(kept: Kept) -> list[str]:
    """The block devices among the fds that lie in the slots' queues."""
    found = []
    for slot in kept.slots():
        with slot, contextlib.suppress(BlockingIOError):
            flags = socket.MSG_PEEK | socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
            _, control, _, _ = slot.recvmsg(1, socket.CMSG_SPACE(4 * 16), flags)
            fds = array.array("i")
            for _, _, data in control:
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
            for fd in fds:
                if stat.S_ISBLK(os.fstat(fd).st_mode):
                    found.append(os.readlink(f"/proc/self/fd/{fd}"))
                os.close(fd)
    return found


def autoclear(name: str) -> str:
    return Path(f"/sys/block/{name}/loop/autoclear").read_text().strip()


def was_last(device: Path | str, image: Path, at: int = 4096) -> bool:
    """A client's close writes back and drops: what it wrote is in the file, and what is in the file it reads then."""
    mark = os.urandom(16)
    with open(device, "r+b", buffering=0) as file:
        os.pread(file.fileno(), 4096, at)
        os.pwrite(file.fileno(), mark, at)
    with image.open("r+b", buffering=0) as written:
        if os.pread(written.fileno(), 16, at) != mark:
            return False
        os.pwrite(written.fileno(), mark[::-1], at)
    with open(device, "rb", buffering=0) as file:
        return os.pread(file.fileno(), 16, at) == mark[::-1]


def is_last(device: Path | str, image: Path, at: int = 4096) -> None:
    """So it is; but for an `losetup --all` of somebody else's, which opens every device for a moment."""
    assert any(was_last(device, image, at) for _ in range(3)), f"somebody has {device} open"


def nobody_has(daemon: Daemon, name: str, image: Path, device: Path | str | None = None) -> None:
    """Whatever can be seen from outside."""
    is_last(device or f"/dev/{name}", image)
    assert autoclear(name) == "0"
    assert openers(daemon, name) == []
    if isinstance(daemon, Kept):
        assert in_slots(daemon) == []


def unbinds_at_once(name: str) -> None:
    """The real losetup detaches: only as the last one that has it open."""
    subprocess.run(["losetup", "--detach", f"/dev/{name}"], check=True)
    bound = Path(f"/sys/block/{name}/loop/backing_file")
    eventually(lambda: not bound.exists(), f"{name} is open nowhere", 0.3)  # an `losetup --all`, as above
    with contextlib.suppress(FileNotFoundError):  # its number is removed by now
        assert Path(f"/sys/block/{name}/size").read_text() == "0\n"


@pytest.fixture(autouse=True)
def needs_nodes() -> None:
    require(os.path.exists("/dev/loop-control"), "needs a devtmpfs, for the host's own nodes")


@pytest.fixture(name="granted")
def granted_fixture(tmp_path: Path, start_daemon: Callable[..., Daemon]) -> Iterator[tuple[Daemon, Path, int]]:
    with granted(start_daemon, tmp_path, "holders") as found:
        yield found


# While a lease lives ----------------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "partscan": {"partscan": True},
    "buffered": {"direct_io": "off"},
    "a window": {"offset": 4096, "sizelimit": MIB // 2},
    "large sectors": {"sector_size": 4096},
}


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_keeps_the_lease(daemon: Daemon, image: int, directory: int, tmp_path: Path, kind: str) -> None:
    daemon.hello()  # the first datagram, which starts it, has no sender to answer
    with hold(daemon, kind, image, directory) as lease:
        nobody_has(daemon, lease.name, tmp_path / "image", tmp_path / "dev" / lease.name)
        unbinds_at_once(lease.name)


@pytest.mark.parametrize("options", OPTIONS)
def test_whatever_was_asked_for(
    daemon: Daemon, image: int, directory: int, devices: Path, tmp_path: Path, options: str
) -> None:
    name = daemon.attach(image, directory, **OPTIONS[options]).fields["devname"]
    offset = OPTIONS[options].get("offset", 0)
    if offset:
        def agrees() -> bool:
            mark = os.urandom(512)
            (devices / name).write_bytes(mark)
            return (tmp_path / "image").read_bytes()[offset : offset + 512] == mark

        assert any(agrees() for _ in range(3)), "somebody has it open"
    else:
        is_last(devices / name, tmp_path / "image")
    assert (autoclear(name), openers(daemon, name)) == ("0", [])
    unbinds_at_once(name)


@pytest.mark.parametrize("deliver", [("node",), ("fd",), ("mount",), ("node", "fd"), ("mount", "fd")], ids="+".join)
def test_however_it_is_handed_over(
    granted: tuple[Daemon, Path, int], image: int, tmp_path: Path, deliver: tuple[str, ...]
) -> None:
    """An fd is the client's own: it has the device open until it closes it, and nobody but it."""
    daemon, path, directory = granted
    reply = daemon.attach(image, directory if "node" in deliver else None, deliver=deliver, partscan=True)
    assert reply.code is None, reply.fields
    name = reply.fields["devname"]
    if "fd" in deliver:
        eventually(lambda: not openers(daemon, name), "what sent it has closed it", 1)
        with open(reply.fds.pop(), "r+b", buffering=0) as file:
            file.write(b"by the fd".ljust(512))
        eventually(lambda: (tmp_path / "image").read_bytes().startswith(b"by the fd"), "it is written back", 1)
    if "mount" in deliver:
        is_last(f"/proc/self/fd/{reply.fds[0]}/{name}", tmp_path / "image")
    nobody_has(daemon, name, tmp_path / "image", path / name if "node" in deliver else None)
    unbinds_at_once(name)


def test_read_only(daemon: Daemon, make_image: Callable[..., int], directory: int, devices: Path) -> None:
    """What is cached is dropped: there is nothing to be written."""
    writable, image = make_image(), make_image(flags=os.O_RDONLY)
    name = daemon.attach(image, directory).fields["devname"]

    def agrees() -> bool:
        for mark in (b"one", b"two"):
            os.pwrite(writable, mark, 0)
            if (devices / name).read_bytes()[:3] != mark:
                return False
        return True

    assert any(agrees() for _ in range(3)), "somebody has it open"
    assert (autoclear(name), openers(daemon, name)) == ("0", [])
    unbinds_at_once(name)


def test_all_of_many(daemon: Daemon, make_image: Callable[..., int], directory: int, tmp_path: Path) -> None:
    images = {f"image{n}": make_image(name=f"image{n}") for n in range(12)}
    names = {key: daemon.attach(fd, directory, partscan=True).fields["devname"] for key, fd in images.items()}
    for key, name in names.items():
        nobody_has(daemon, name, tmp_path / key)
    for name in names.values():
        unbinds_at_once(name)


# From the answer on -----------------------------------------------------------------------------------------------


def slowly(daemon: Daemon) -> contextlib.AbstractContextManager[None]:
    """Have every process of the daemon's but the first close late."""
    daemon.hello()
    return injected(children(daemon.pid), SLOW)


def test_closed_before_the_client_is_answered(
    daemon: Daemon, image: int, directory: int, devices: Path, tmp_path: Path
) -> None:
    """What it writes at once, and closes, is in the file."""
    found = []
    with slowly(daemon):
        for number in range(6):
            name = daemon.attach(image, directory, partscan=True).fields["devname"]
            found.append(was_last(devices / name, tmp_path / "image", 8192 + 512 * number))
    assert found.count(False) <= 1, found  # one may be somebody's `losetup --all`


def test_closed_before_a_rescan_or_resize_is_answered(
    daemon: Daemon, image: int, directory: int, devices: Path, tmp_path: Path
) -> None:
    name = daemon.attach(image, directory, partscan=True).fields["devname"]
    resized, read = [], []
    with slowly(daemon):
        for size in (2 * MIB, 3 * MIB, 4 * MIB, 5 * MIB):
            os.truncate(image, size)
            assert daemon.ask(wire.Resize(name, 0), []).fields == {"size": size}
            resized.append(was_last(devices / name, tmp_path / "image", size - 512))
            assert daemon.ask(wire.Rescan(name, 0), []).fields == {"partitions": []}
            read.append(was_last(devices / name, tmp_path / "image", size - 1024))
    assert max(resized.count(False), read.count(False)) <= 1, (resized, read)
    nobody_has(daemon, name, tmp_path / "image")
    unbinds_at_once(name)


def test_a_look_at_the_table_is_not_through_the_device(
    daemon: Daemon, image: int, directory: int, devices: Path, tmp_path: Path
) -> None:
    """loopd looks after each close of a client, and the client may open and close it again meanwhile."""
    os.pwrite(image, b"\x55\xaa", 510)  # a table that is not changed, and so is not read again by the kernel
    name = daemon.attach(image, directory, partscan=True).fields["devname"]
    found = []
    with slowly(daemon):
        for turn in range(60):
            at = 0 if turn % 2 else 32768  # the boot code, and behind a table
            found.append(was_last(devices / name, tmp_path / "image", at))
            time.sleep(0.01)
    assert found.count(False) <= 3, found
    nobody_has(daemon, name, tmp_path / "image")
    unbinds_at_once(name)


def test_after_partitions_came_and_went(
    daemon: Daemon, image: int, directory: int, devices: Path, tmp_path: Path
) -> None:
    """Their nodes were made and opened as a proof; a partition that is open keeps the disk open as well."""
    name = daemon.attach(image, directory, partscan=True).fields["devname"]
    node = devices / f"{name}p1"
    with Loop(int(name[4:])) as loop:
        loop.add_partition(1, 65536, 65536)
    eventually(node.exists, "the node is there")
    eventually(lambda: not openers(daemon, name), "the proof is over")

    def agrees() -> bool:
        mark = os.urandom(512)
        node.write_bytes(mark)
        return (tmp_path / "image").read_bytes()[65536 : 65536 + 512] == mark

    assert any(agrees() for _ in range(3)), "somebody has it open"
    nobody_has(daemon, name, tmp_path / "image")
    with Loop(int(name[4:])) as loop:
        loop.delete_partition(1)
    eventually(lambda: not node.exists(), "the node is gone")
    nobody_has(daemon, name, tmp_path / "image")
    unbinds_at_once(name)


# Across the end of a daemon ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["kill", "restart"])
@pytest.mark.parametrize("options", [{}, {"partscan": True}], ids=["plain", "partscan"])
def test_after_a_recovery(
    kept: Kept, image: int, directory: int, devices: Path, tmp_path: Path, number: int, options: dict[str, Any]
) -> None:
    with hold(kept, "socket", image, directory, **options) as lease:
        nobody_has(kept, lease.name, tmp_path / "image", devices / lease.name)
        for _ in range(2):
            kept.kill(number)
            assert kept.leases()[lease.name]["state"] == "bound"
            assert lease.bound()
            eventually(lambda: not openers(kept, lease.name), "the new daemon has looked at its nodes")
            nobody_has(kept, lease.name, tmp_path / "image", devices / lease.name)
        unbinds_at_once(lease.name)
    eventually(lambda: not kept.leases(), "the lease is over")
    kept.end()


@pytest.mark.parametrize("kind", KINDS)
def test_during_an_outage(
    kept: Kept, image: int, directory: int, devices: Path, tmp_path: Path, kind: str
) -> None:
    """The fd store alone is left then."""
    with hold(kept, kind, image, directory) as lease:
        with kept.outage():
            is_last(devices / lease.name, tmp_path / "image")
            assert autoclear(lease.name) == "0"
            assert lease.bound()
        assert kept.leases()[lease.name]["state"] == "bound"
        with kept.outage():
            unbinds_at_once(lease.name)
        eventually(lambda: not kept.leases(), "what its client unbound is no lease")
        eventually(lambda: not list(devices.iterdir()), "its node is gone")
    kept.end()


def test_in_a_grant_with_partscan_after_a_kill(start_kept: Callable[..., Kept], image: int, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        kept, place, directory = stack.enter_context(granted(start_kept, tmp_path, "holders"))
        lease = stack.enter_context(hold(kept, "socket", image, directory, partscan=True))
        with Loop(int(lease.name[4:])) as loop:
            loop.add_partition(2, 65536, 65536)
        eventually((place / f"{lease.name}p2").exists, "the node is there")
        kept.kill()
        assert kept.leases()[lease.name]["state"] == "bound"
        eventually(lambda: not openers(kept, lease.name), "the new daemon has looked at its nodes")
        nobody_has(kept, lease.name, tmp_path / "image", place / lease.name)
        unbinds_at_once(lease.name)
        eventually(lambda: not kept.leases() and not list(place.iterdir()), "the lease is over")
        kept.end()


# A lock for the whole lease ---------------------------------------------------------------------------------------


def locked(name: str) -> bool:
    """As udev asks."""
    with open(f"/dev/{name}", "rb") as node:
        try:
            fcntl.flock(node, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_a_lock_keeps_the_device_open(
    start_kept: Callable[..., Kept], image: int, directory: int, tmp_path: Path
) -> None:
    """A lock is on an open file, so that there is one: the exception, and what it costs."""
    kept = start_kept(policy=LOCKS)
    with hold(kept, "socket", image, directory, lock=True) as lease:
        assert locked(lease.name)
        assert openers(kept, lease.name) + in_slots(kept)
        assert autoclear(lease.name) == "0"
        with open(f"/dev/{lease.name}", "r+b", buffering=0) as file:
            file.write(b"cached".ljust(512))
        assert not (tmp_path / "image").read_bytes().startswith(b"cached")
        kept.kill()
        assert kept.leases()[lease.name]["state"] == "bound"
        assert locked(lease.name)
        assert kept.ask(wire.Detach(lease.name, 0, wait=5), []).fields == {"state": "released"}
        assert (tmp_path / "image").read_bytes().startswith(b"cached")
    kept.end()


def test_the_manual_says_what_a_lock_costs() -> None:
    page = (ROOT / "docs/man/loopd-protocol.7.rst").read_text()
    (entry,) = re.findall(r"^\*\*lock\*\*: bool.*\n((?: +\S.*\n)+)", page, re.MULTILINE)
    text = " ".join(entry.split())
    assert "open" in text, text
    assert "last close" in text or "cache" in text, text


# The release ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def attached(daemon: Daemon, image: int, directory: int, **options: Any) -> Iterator[Reply]:
    reply = daemon.attach(image, directory, **options)
    assert reply.code is None, reply.fields
    yield reply
    eventually(lambda: not exists(reply.fields["devname"]), "its number is removed")


def test_a_release_is_done_when_it_is_answered(
    daemon: Daemon, image: int, directory: int, devices: Path, tmp_path: Path
) -> None:
    """As the only one that opens it, loopd unbinds it at once; and what was written is in the image."""
    for _ in range(5):
        with attached(daemon, image, directory) as reply:
            mark = os.urandom(512)
            with (devices / reply.fields["devname"]).open("r+b", buffering=0) as file:
                file.write(mark)
            assert daemon.ask(wire.Detach(reply.fields["devname"], 0, wait=5), []).fields == {"state": "released"}
            assert not bound_to(tmp_path)
            assert (tmp_path / "image").read_bytes().startswith(mark)


def test_a_device_in_use_goes_at_its_last_close_and_loses_nothing(
    daemon: Daemon, image: int, directory: int, devices: Path, tmp_path: Path
) -> None:
    """What is written after the detach, through a file that was open, is written back by that close."""
    with attached(daemon, image, directory) as reply:
        name = reply.fields["devname"]
        with (devices / name).open("r+b", buffering=0) as file:
            file.write(b"before".ljust(512))
            assert daemon.ask(wire.Detach(name, 0), []).fields == {"state": "busy"}
            assert bound_to(tmp_path) == [name]
            file.write(b"after".ljust(512))
        assert (tmp_path / "image").read_bytes()[:1024] == b"before".ljust(512) + b"after".ljust(512)
        eventually(lambda: not bound_to(tmp_path), "it is free at its last close", 2)
    (record,) = eventually(lambda: daemon.records("detached"), "it is recorded")
    assert record["LOOPD_DEVICE"] == name


def test_a_mounted_file_system_is_not_pulled_away(
    daemon: Daemon, make_image: Callable[..., int], directory: int, tmp_path: Path
) -> None:
    """Its client is gone. What is written to it later is in the image, and so is a clean end."""
    image = make_image(16 * MIB)
    subprocess.run(["mkfs.ext4", "-q", tmp_path / "image"], check=True)
    reply = daemon.attach(image, directory)
    name, point = reply.fields["devname"], tmp_path / "mounted"
    point.mkdir()
    subprocess.run(["mount", f"/dev/{name}", point], check=True)
    try:
        reply.close()
        eventually(lambda: daemon.records("held"), "it is held")
        (point / "file").write_text("written later\n")
    finally:
        subprocess.run(["umount", point], check=True)
    eventually(lambda: not bound_to(tmp_path), "it is free", 5)
    subprocess.run(["e2fsck", "-f", "-n", tmp_path / "image"], check=True, capture_output=True)
    read = ["debugfs", "-R", "cat file", str(tmp_path / "image")]
    assert subprocess.run(read, check=True, capture_output=True, text=True).stdout == "written later\n"
