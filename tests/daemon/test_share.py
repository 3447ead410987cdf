"""What main does for one datagram or event does not grow with what a client has, and partitions have a limit.

Partitions are added by hand: the kernel of a test machine may have no parser for partition tables.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.daemon import Daemon, Reply, bound_to, eventually, require
from support.processes import injected, stays
from support.untouched import helpers, leases, pair, reply_of, send, stopped

from loopd.daemon.operations import LISTED_PER_SECOND
from loopd.kernel import uevents
from loopd.loop import Loop
from loopd.protocol import wire

MIB = 1 << 20
SO_RCVBUFFORCE = 33


@pytest.fixture
def image(make_image: Callable[..., int]) -> int:
    return make_image(32 * MIB)


def number(reply: Reply) -> int:
    assert reply.code is None, reply.fields
    return int(reply.fields["devname"][4:])


def partitions(disk: int) -> list[int]:
    with Loop(disk) as loop:
        return loop.partitions()


def add(disk: int, *numbers: int) -> None:
    """What root of the host can do, and the kernel for a client when it reads a table."""
    with Loop(disk) as loop:
        for partition in numbers:
            loop.add_partition(partition, partition * 65536, 65536)


def nodes(devices: Path, disk: int) -> list[int]:
    """The partitions that have a node."""
    return sorted(int(path.name.rpartition("p")[2]) for path in devices.glob(f"loop{disk}p*"))


# Lists and events ---------------------------------------------------------------------------------------------------


def test_lists_take_no_more_than_a_share(daemon: Daemon, image: int) -> None:
    """Each is built when what the one before has taken is earned again; all are answered."""
    for _ in range(64):
        reply = daemon.ask(wire.Attach(0, reply_fd=1, deliver=("fd",)), [image])
        assert reply.code is None, reply.fields
    count, waiting, bytes_ = 24, [], 0
    began = time.monotonic()
    for _ in range(count):
        ours, theirs = pair()
        with theirs:
            send(daemon.path, wire.encode_request(wire.Leases(0)), [theirs.fileno()]).close()
        waiting.append(ours)
    for ours in waiting:
        with ours, contextlib.closing(reply_of(ours)) as answer:
            assert answer.fields["leases"]
            bytes_ += len(wire._encoder.encode(answer.fields))
    assert time.monotonic() - began > bytes_ * (count - 1) / count / LISTED_PER_SECOND


@contextlib.contextmanager
def files_opened(pid: int, tmp_path: Path) -> Iterator[Callable[[], str]]:
    """What a process opens and lists."""
    require(shutil.which("strace"), "needs strace")
    trace = tmp_path / "trace"
    command = ["strace", "--quiet=all", f"--output={trace}", "--trace=open,openat,getdents64", f"--attach={pid}"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as tracer:
        eventually(lambda: f"TracerPid:\t{tracer.pid}\n" in Path(f"/proc/{pid}/status").read_text(), "it is attached")
        try:
            yield trace.read_text
        finally:
            tracer.terminate()


def test_main_looks_at_no_partition(daemon: Daemon, image: int, directory: int, devices: Path, tmp_path: Path) -> None:
    """Their names are the lease's; it is a worker that asks the kernel for them."""
    disk = number(daemon.attach(image, directory, partscan=True))
    with files_opened(daemon.pid, tmp_path) as seen:
        add(disk, *range(1, 41))
        eventually(lambda: len(nodes(devices, disk)) == 40, "the nodes are there")
        (lease,) = leases(daemon)
        assert lease["partitions"] == [f"loop{disk}p{partition}" for partition in range(1, 41)]
        answer = daemon.ask(wire.Rescan(f"loop{disk}", 0), [])
        assert answer.code is None
        eventually(lambda: f"loop{disk}/" in seen(), "it has looked at the disk")
    assert f"loop{disk}p" not in seen()
    assert "getdents64" not in seen()


def test_a_look_at_events_ends(daemon: Daemon, image: int) -> None:
    """However many come."""
    disk = number(daemon.attach(image, None, deliver=("fd",)))
    with uevents.listen() as netlink:
        netlink.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 16 * MIB)
        for _ in range(uevents.MOST + 50):
            Path(f"/sys/block/loop{disk}/uevent").write_text("change")
        found = uevents.receive(netlink)
        assert found is not None
        assert f"loop{disk}" in found.disks
        assert select.select([netlink], [], [], 0)[0], "the others are still to be read"
        found = uevents.receive(netlink)
        assert found is not None
        assert f"loop{disk}" in found.disks


def test_every_device_is_looked_at_when_events_were_lost(
    daemon: Daemon, image: int, directory: int, devices: Path
) -> None:
    """A slice at a time."""
    disks = [number(daemon.attach(image, directory, partscan=True)) for _ in range(40)]
    for disk in disks:
        add(disk, 1)
    eventually(lambda: all(nodes(devices, disk) == [1] for disk in disks), "the nodes are there")
    with stopped(daemon):
        for _ in range(20_000):
            Path(f"/sys/block/loop{disks[0]}/uevent").write_text("change")
        for disk in disks:
            with Loop(disk) as loop:
                loop.delete_partition(1)
    eventually(lambda: not any(nodes(devices, disk) for disk in disks), "all are gone")


# The limit of partitions ---------------------------------------------------------------------------------------------


@pytest.fixture
def limited(start_daemon: Callable[..., Daemon]) -> Daemon:
    return start_daemon(policy="[limits]\npartitions = 3\npartitions_in_all = 4\n")


def test_partitions_of_a_device(limited: Daemon, image: int, directory: int, devices: Path) -> None:
    """The first stay; the others go from the kernel, and the journal says so once."""
    disk = number(limited.attach(image, directory, partscan=True))
    for _ in range(2):
        add(disk, *sorted({1, 2, 3, 4, 5} - set(partitions(disk))))
        eventually(lambda: partitions(disk) == nodes(devices, disk) == [1, 2, 3], "the first three are left")
    (lease,) = leases(limited)
    assert lease["partitions"] == [f"loop{disk}p{partition}" for partition in (1, 2, 3)]
    (record,) = (record for record in limited.records("warned") if record.get("LOOPD_DEVICE"))
    assert "partitions too many (limits.partitions, limits.partitions_in_all)" in record["MESSAGE"]
    assert record["LOOPD_DEVICE"] == f"loop{disk}"


def test_partitions_of_all_devices(limited: Daemon, image: int, directory: int, devices: Path) -> None:
    """What one lets go of another may have."""
    first, second = (number(limited.attach(image, directory, partscan=True)) for _ in range(2))
    add(first, 1, 2, 3)
    eventually(lambda: nodes(devices, first) == [1, 2, 3], "there is room for these")
    add(second, 1, 2, 3)
    eventually(lambda: partitions(second) == nodes(devices, second) == [1], "and for one more")
    assert limited.ask(wire.Detach(f"loop{first}", 0, wait=5), []).fields == {"state": "released"}
    add(second, 2, 3)
    eventually(lambda: nodes(devices, second) == [1, 2, 3], "now there is")
    stays(lambda: partitions(second) == [1, 2, 3], 0.3, "they stay")


def test_partitions_that_the_client_has_looked_for_itself(limited: Daemon, image: int, directory: int) -> None:
    """Without partscan they get no nodes, and the kernel's memory and minors are used all the same."""
    disk = number(limited.attach(image, directory))
    add(disk, 1, 2, 3, 4, 5)
    eventually(lambda: partitions(disk) == [1, 2, 3], "what is too much is gone")


def test_a_partition_too_many_that_is_open(
    limited: Daemon, image: int, directory: int, devices: Path, tmp_path: Path
) -> None:
    """The kernel does not delete it: it has no node, and counts."""
    disk = number(limited.attach(image, directory, partscan=True))
    with stopped(limited):
        add(disk, 1, 2, 3, 4, 5)
        rdev = Path(f"/sys/block/loop{disk}/loop{disk}p4/dev").read_text().split(":")
        os.mknod(tmp_path / "node", 0o60600, os.makedev(*map(int, rdev)))
        opened = os.open(tmp_path / "node", os.O_RDONLY)
    try:
        eventually(lambda: partitions(disk) == [1, 2, 3, 4], "the last is gone")
        eventually(lambda: nodes(devices, disk) == [1, 2, 3], "the open one has no node")
        other = number(limited.attach(image, directory, partscan=True))
        add(other, 1)
        eventually(lambda: partitions(other) == [], "there is room for none")
    finally:
        os.close(opened)


def test_too_many_at_the_attach(
    limited: Daemon, image: int, directory: int, devices: Path, tmp_path: Path
) -> None:
    """As the kernel finds them in a table. The reply says so."""
    limited.hello()
    # The worker notes that the device is bound, and then looks at its partitions.
    with injected(helpers(limited), "sendto:delay_enter=1s", "sendmsg:delay_enter=1s"), ThreadPoolExecutor(1) as pool:
        attached = pool.submit(lambda: limited.attach(image, directory, partscan=True))
        (name,) = eventually(lambda: bound_to(tmp_path / "image"), "it is bound")
        add(int(name[4:]), 1, 2, 3, 4, 5)
        reply = attached.result()
    disk = number(reply)
    assert reply.fields["partitions"] == [f"{name}p{partition}" for partition in (1, 2, 3)]
    assert partitions(disk) == nodes(devices, disk) == [1, 2, 3]
    (warning,) = (warning for warning in reply.fields["warnings"] if "CAP_MKNOD" not in warning)
    assert warning.startswith("2 partitions are too many")
