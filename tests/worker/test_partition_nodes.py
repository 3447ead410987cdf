"""Partition nodes stay: what did not change is never absent, whatever is written in front of the partitions.

The kernel of a test machine may have no parser for partition tables, so partitions are added by hand. One of them,
which no table has, is the canary: a re-read of the table by any kernel removes it, and nothing else does.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from support.daemon import Daemon, eventually, granted, require
from support.processes import stays
from support.untouched import stopped

from loopd.loop import Loop
from loopd.protocol import wire

MIB = 1 << 20
CANARY = 7
SETTLED = 0.3
"""Seconds after a close within which loopd has looked, and done what it does."""


class Watcher:
    """Looks all the time at nodes that are to stay, until the block ends. `check` says what has become of them."""

    def __init__(self, *paths: Path) -> None:
        self._paths = paths
        self._seen: dict[Path, set[tuple[int, int, int]]] = {path: {self._look(path)} for path in paths}
        self._absent: dict[Path, int] = dict.fromkeys(paths, 0)
        self._looks = 0
        self._stopping = False
        self._thread = threading.Thread(target=self._watch)

    @staticmethod
    def _look(path: Path) -> tuple[int, int, int]:
        status = path.stat()
        return status.st_ino, status.st_rdev, status.st_mode

    def _watch(self) -> None:
        while not self._stopping:
            self._looks += 1
            for path in self._paths:
                try:
                    self._seen[path].add(self._look(path))
                except FileNotFoundError:
                    self._absent[path] += 1
            time.sleep(0.0002)

    def check(self, *, tried: bool = False) -> None:
        """Each is the very node that it was, with its number and mode, and no look found it absent.

        While loopd has the kernel try to read the table (`tried`) nodes are closed for that moment.
        """
        if tried:
            self._seen = {path: {node for node in seen if node[2] & 0o777} for path, seen in self._seen.items()}
        assert self._looks > 50, "too few looks to show anything"
        assert {path.name: count for path, count in self._absent.items() if count} == {}, "absent"
        assert {path.name: seen for path, seen in self._seen.items() if len(seen) > 1} == {}, "replaced"

    def __enter__(self) -> Watcher:  # noqa: PYI034  # it has no subclasses
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping = True
        self._thread.join()


class Disk:
    """A device with partscan, a table with two partitions and the canary, all with their nodes."""

    def __init__(self, daemon: Daemon, device: Path, sector: int) -> None:
        self.daemon = daemon
        self.device = device
        self.name = device.name
        self.number = int(self.name[4:])
        self.sector = sector

    def node(self, partition: int) -> Path:
        return self.device.with_name(f"{self.name}p{partition}")

    def nodes(self, *partitions: int) -> list[Path]:
        return [self.node(partition) for partition in partitions]

    def partitions(self) -> list[int]:
        with Loop(self.number) as loop:
            return loop.partitions()

    def add(self, partition: int, start: int, length: int) -> None:
        """A partition, if the kernel has not found it in the table, with its node."""
        with Loop(self.number) as loop:
            if partition not in loop.partitions():
                loop.add_partition(partition, start, length)
        eventually(self.node(partition).exists, f"the node of partition {partition} is there")

    def write(self, data: bytes, at: int) -> None:
        """As dd does: open, write, close."""
        fd = os.open(self.device, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.pwrite(fd, data, at)
        finally:
            os.close(fd)

    def fdisk(self, *arguments: str, text: str = "") -> None:
        """Change the table as in a container: the kernel is told nothing, nor asked whether a partition is in use."""
        quiet = ["sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", "--force"]
        subprocess.run([*quiet, *arguments], input=text, text=True, check=True, capture_output=True)

    @property
    def size(self) -> int:
        return int(Path(f"/sys/block/{self.name}/size").read_text()) * 512

    def stays(self, act: Callable[[], object], *more: Path, tried: bool = False) -> None:
        """All nodes stay what they are while `act` is done, and while loopd looks at the table afterwards."""
        with Watcher(*self.nodes(1, 2, CANARY), *more) as watcher:
            act()
            time.sleep(SETTLED)
        watcher.check(tried=tried)
        assert self.partitions() == [1, 2, CANARY]

    def is_read_again(self, act: Callable[[], object]) -> None:
        """The kernel reads the table again after that: the canary is gone, with its node."""
        act()
        eventually(lambda: CANARY not in self.partitions(), "the table is read", 3)
        eventually(lambda: not self.node(CANARY).exists(), "the node is gone", 3)


LAYOUT = (2048, 8192), (16384, 8192)
"""Start and length of both partitions, in sectors of 512 bytes; the canary lies behind them."""
TABLES = {
    "dos": ["sfdisk", "--quiet", "--no-reread", "--no-tell-kernel"],
    "gpt": ["sfdisk", "--quiet", "--no-reread", "--no-tell-kernel"],
    "sgdisk": ["sgdisk", "--new=1:2048:10239", "--new=2:16384:24575"],
}


def write_table(image: int, table: str, sector: int) -> None:
    """By a device of the real losetup, so that the tool knows the sectors."""
    tool = TABLES[table][0]
    require(shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin"), f"needs {tool}")
    find = ["losetup", "--find", "--show", f"--sector-size={sector}", os.readlink(f"/proc/self/fd/{image}")]
    device = subprocess.run(find, check=True, capture_output=True, text=True).stdout.strip()
    layout = "".join(f"{start * 512 // sector},{length * 512 // sector}\n" for start, length in LAYOUT)
    text = f"label: {table}\n{layout}" if tool == "sfdisk" else ""
    try:
        subprocess.run([*TABLES[table], device], input=text, text=True, check=True, capture_output=True)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


@contextlib.contextmanager
def make_disk(
    daemon: Daemon, image: int, directory: int | None, place: Path, table: str = "dos", sector: int = 512,
    deliver: str = "node",
) -> Iterator[Disk]:  # fmt: skip
    write_table(image, table, sector)
    reply = daemon.attach(image, directory, partscan=True, sector_size=sector, deliver=(deliver,))
    assert reply.code is None, reply.fields
    if deliver == "mount":
        place = Path(f"/proc/self/fd/{reply.fds[0]}")
    disk = Disk(daemon, place / reply.fields["devname"], sector)
    for partition, (start, length) in enumerate(LAYOUT, 1):
        disk.add(partition, start * 512, length * 512)
    disk.add(CANARY, 20 * MIB, MIB)
    yield disk
    given, owner = ([], None) if directory is None else ([directory], 0)
    answer = daemon.ask(wire.Detach(disk.name, len(given), dir_fd=owner, wait=5), given)
    assert answer.fields == {"state": "released"}


@pytest.fixture
def image(make_image: Callable[..., int]) -> int:
    return make_image(32 * MIB)


@pytest.fixture
def dos(daemon: Daemon, image: int, directory: int, devices: Path) -> Iterator[Disk]:
    with make_disk(daemon, image, directory, devices) as disk:
        yield disk


@pytest.fixture(params=["gpt", "sgdisk"])
def gpt(request: pytest.FixtureRequest, daemon: Daemon, image: int, directory: int, devices: Path) -> Iterator[Disk]:
    with make_disk(daemon, image, directory, devices, request.param) as disk:
        yield disk


@contextlib.contextmanager
def mounted(disk: Disk, place: Path) -> Iterator[Path]:
    """The first partition, with a file system."""
    point = place / "mounted"
    point.mkdir()
    subprocess.run(["mkfs.ext4", "-q", f"/dev/{disk.name}p1"], check=True)
    subprocess.run(["mount", f"/dev/{disk.name}p1", point], check=True)
    try:
        yield point
    finally:
        subprocess.run(["umount", point], check=True)


@contextlib.contextmanager
def in_use(disk: Disk, how: str, place: Path) -> Iterator[None]:
    if how == "mounted":
        with mounted(disk, place):
            yield
    elif how == "open":
        with disk.node(1).open("rb"):
            yield
    else:
        yield


# In front of the partitions ---------------------------------------------------------------------------------------

USES = ("idle", "open", "mounted")


def boot_loader(disk: Disk, first: int, end: int) -> None:
    """What grub-install does: its boot code, and its core image between `first` and `end`, which is the start of the
    first partition.
    """
    for _ in range(6):
        disk.write(os.urandom(446), 0)
        time.sleep(0.07)  # loopd looks 50 ms after a close
        disk.write(os.urandom(512), first)
        disk.write(os.urandom(512), end - 512)
        disk.write(os.urandom(8192), (first + end) // 2 // 512 * 512)
        time.sleep(0.07)


@pytest.mark.parametrize("use", USES)
def test_boot_code_and_core_image_of_grub(dos: Disk, tmp_path: Path, use: str) -> None:
    with in_use(dos, use, tmp_path):
        dos.stays(lambda: boot_loader(dos, 512, MIB))


@pytest.mark.parametrize("use", USES)
def test_in_front_of_a_gpt(gpt: Disk, tmp_path: Path, use: str) -> None:
    """Behind its entries, and in front of those at the end."""

    def act() -> None:
        boot_loader(gpt, 34 * 512, MIB)
        for _ in range(3):
            gpt.write(os.urandom(4096), gpt.size - 33 * 512 - 4096)
            time.sleep(0.07)

    with in_use(gpt, use, tmp_path):
        gpt.stays(act)


def test_with_large_sectors(daemon: Daemon, image: int, directory: int, devices: Path) -> None:
    """The table lies elsewhere: the header in the second sector of 4096 bytes, and the entries behind it."""
    with make_disk(daemon, image, directory, devices, "gpt", 4096) as disk:

        def act() -> None:
            for _ in range(4):
                disk.write(os.urandom(446), 0)
                disk.write(os.urandom(3584), 512)
                disk.write(os.urandom(8192), 6 * 4096)
                time.sleep(0.07)

        disk.stays(act)
        disk.is_read_again(lambda: disk.fdisk("--delete", str(disk.device), "2"))


@pytest.mark.parametrize("deliver", ["node", "mount"])
def test_in_a_directory_of_loopds(
    start_daemon: Callable[..., Daemon], image: int, tmp_path: Path, deliver: str
) -> None:
    with granted(start_daemon, tmp_path, "nodes") as (daemon, place, directory):
        given = directory if deliver == "node" else None
        with make_disk(daemon, image, given, place, deliver=deliver) as disk, disk.node(1).open("rb"):
            disk.stays(lambda: boot_loader(disk, 512, MIB))


def test_what_is_written_into_a_partition(dos: Disk) -> None:
    """By the node of the disk."""

    def act() -> None:
        for _ in range(4):
            dos.write(os.urandom(4096), MIB)
            dos.write(os.urandom(4096), dos.size - 4096)
            time.sleep(0.07)

    dos.stays(act)


# The table itself -------------------------------------------------------------------------------------------------


def test_a_changed_table_is_read(dos: Disk) -> None:
    dos.is_read_again(lambda: dos.fdisk("--delete", str(dos.device), "2"))


def test_every_byte_of_the_table_counts(dos: Disk) -> None:
    """446 to 511, and no more: the byte in front is boot code, the one behind it the gap's."""
    dos.stays(lambda: dos.write(b"x", 445))
    dos.stays(lambda: dos.write(b"x", 512))
    # The type of an entry that is not used.
    dos.is_read_again(lambda: dos.write(b"\x01", 446 + 3 * 16 + 4))


class Place(NamedTuple):
    """Bytes of a GPT from its start, or from its end if negative."""

    at: int


PLACES = {
    "header": Place(512 + 16), "first entry": Place(2 * 512 + 48), "last entry": Place(33 * 512 + 511),
    "first entry at the end": Place(-33 * 512 + 48), "last entry at the end": Place(-512 - 1),
    "header at the end": Place(-512 + 16),
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_header_and_entries_at_both_ends(
    daemon: Daemon, image: int, directory: int, devices: Path, place: str
) -> None:
    """The kernel falls back on the one at the end, so that loopd looks at both."""
    with make_disk(daemon, image, directory, devices, "gpt") as disk:
        at = PLACES[place].at % disk.size
        disk.is_read_again(lambda: disk.write(b"\x5a", at))


def test_a_changed_gpt_is_read(gpt: Disk) -> None:
    gpt.is_read_again(lambda: gpt.fdisk("--delete", str(gpt.device), "2"))


def test_a_table_of_another_kind(daemon: Daemon, image: int, directory: int, devices: Path) -> None:
    """loopd does not know where it lies: whatever is written near the ends has it read again."""
    with make_disk(daemon, image, directory, devices) as disk:
        disk.is_read_again(lambda: disk.write(bytes(512), 0))
        for at in (32768, disk.size - 512):
            disk.add(CANARY, 20 * MIB, MIB)
            disk.is_read_again(lambda at=at: disk.write(b"perhaps a table", at))  # type: ignore[misc]


def test_a_table_that_is_written_to_the_file(dos: Disk, tmp_path: Path) -> None:
    """It is seen when the node is closed the next time."""
    dos.fdisk("--delete", str(tmp_path / "image"), "2")
    dos.is_read_again(lambda: os.close(os.open(dos.device, os.O_RDWR)))


# While a partition is in use --------------------------------------------------------------------------------------


@pytest.mark.parametrize("use", ["open", "mounted"])
@pytest.mark.parametrize("change", [("--append", ""), ("--delete", "2")], ids=["another", "one less"])
def test_a_table_that_the_kernel_does_not_read_now_changes_nothing(
    dos: Disk, tmp_path: Path, use: str, change: tuple[str, str]
) -> None:
    """It refuses as long as a partition is in use, and a rescan says so. Later it is read."""
    option, argument = change

    def act() -> None:
        text = "25600,2048\n" if option == "--append" else ""
        dos.fdisk(option, str(dos.device), *([argument] if argument else []), text=text)
        for _ in range(4):
            time.sleep(0.07)
            os.close(os.open(dos.device, os.O_RDWR))
        assert dos.daemon.ask(wire.Rescan(dos.name, 0), []).code == "busy"

    with in_use(dos, use, tmp_path):
        dos.stays(act, tried=use == "open")  # of what is merely open only a try tells
    dos.is_read_again(lambda: os.close(os.open(dos.device, os.O_RDWR)))


def test_only_what_changed_is_touched(dos: Disk) -> None:
    """Partitions come and go beside one that stays."""
    with Watcher(*dos.nodes(1, CANARY)) as watcher, Loop(dos.number) as loop:
        for turn in range(12):
            loop.delete_partition(2)
            eventually(lambda: not dos.node(2).exists(), "its node is gone")
            loop.add_partition(2, 16384 * 512, (8192 - turn) * 512)
            eventually(dos.node(2).exists, "its node is there")
    watcher.check()


def test_after_events_were_lost(dos: Disk) -> None:
    """loopd looks at all nodes then, and touches those alone whose partitions are others."""
    with Watcher(*dos.nodes(1, 2)) as watcher:
        with stopped(dos.daemon):
            for _ in range(20_000):
                Path(f"/sys/block/{dos.name}/uevent").write_text("change")
            with Loop(dos.number) as loop:
                loop.delete_partition(CANARY)
        eventually(lambda: not dos.node(CANARY).exists(), "the node is gone", 5)
    watcher.check()


def test_a_mounted_partition_outlives_its_boot_loader(dos: Disk, tmp_path: Path) -> None:
    """What an image builder does at the end: it installs a boot loader, unmounts, and the image is whole."""
    with mounted(dos, tmp_path) as point:
        (point / "file").write_text("kept\n")
        dos.stays(lambda: boot_loader(dos, 512, MIB))
        (point / "file").write_text("kept, and changed\n")
    subprocess.run(["e2fsck", "-f", "-n", dos.node(1)], check=True, capture_output=True)
    subprocess.run(["mount", dos.node(1), point], check=True)
    try:
        assert (point / "file").read_text() == "kept, and changed\n"
    finally:
        subprocess.run(["umount", point], check=True)
    stays(lambda: dos.node(2).exists(), SETTLED, "the other node is there")
