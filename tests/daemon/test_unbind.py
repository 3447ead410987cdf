"""A client unbinds its own device, as `losetup --detach` does on a host; what it then has open is never the host's.

LOOP_CLR_FD needs no privilege, only an open device. The kernel tells loopd by a uevent that the device is unbound.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.daemon import Daemon, Reply, bound_to, eventually, exists, granted, require
from support.kept import Kept, hold, kept_fixture, start_at, start_kept_fixture  # noqa: F401
from support.processes import stays
from support.untouched import leases, stopped

from loopd.loop import Loop, LoopControl, backing_file
from loopd.protocol import wire
from loopd.worker.make import FIRST

SOON = 5.0


def by_ioctl(node: Path) -> None:
    with Loop.from_fd(os.open(node, os.O_RDONLY | os.O_CLOEXEC)) as loop:
        loop.clear_fd()


def by_losetup(node: Path) -> None:
    subprocess.run(["losetup", "--detach", node], check=True)


def by_autoclear(node: Path) -> None:
    """Set, it has the kernel unbind the device at the last close."""
    with Loop.from_fd(os.open(node, os.O_RDWR | os.O_CLOEXEC)) as loop:
        loop.set_status(autoclear=True)


WAYS: dict[str, Callable[[Path], None]] = {
    "LOOP_CLR_FD": by_ioctl, "losetup": by_losetup, "LO_FLAGS_AUTOCLEAR": by_autoclear,
}  # fmt: skip


def ends(daemon: Daemon, name: str, diskseq: int | None = None) -> list[dict[str, str]]:
    """The audit's records of the end of that device's lease; of one binding, where its account has the number again."""
    found = daemon.records("detached") + daemon.records("expired")
    of_it = [record for record in found if record["LOOPD_DEVICE"] == name]
    return [record for record in of_it if diskseq is None or record["LOOPD_DISKSEQ"] == str(diskseq)]


def has_ended(daemon: Daemon, name: str, *, number: bool = True, diskseq: int | None = None) -> None:
    """The lease is over, is no more in the list, has one record with its reason, and its number is removed."""
    eventually(lambda: not leases(daemon), "it is in no list", SOON)
    record: dict[str, str]
    (record,) = eventually(lambda: ends(daemon, name, diskseq), "its end is recorded", SOON)
    assert record["LOOPD_REASON"]
    if number:
        eventually(lambda: not exists(name), "its number is removed", SOON)
    assert ends(daemon, name, diskseq) == [record]


@contextlib.contextmanager
def attached(daemon: Daemon, image: int, directory: int | None, **options: Any) -> Iterator[Reply]:
    reply = daemon.attach(image, directory, **options)
    assert reply.code is None, reply.fields
    yield reply


# The lease ends ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_its_lease_ends(daemon: Daemon, image: int, directory: int, devices: Path, tmp_path: Path, way: str) -> None:
    """With its node; and its client, whose reply socket keeps it, sees the hang-up."""
    with attached(daemon, image, directory) as reply:
        name = reply.fields["devname"]
        (devices / name).write_bytes(b"written before".ljust(512))
        WAYS[way](devices / name)
        assert bound_to(tmp_path) == []
        assert (tmp_path / "image").read_bytes().startswith(b"written before")
        eventually(lambda: not list(devices.iterdir()), "its node is gone", SOON)
        has_ended(daemon, name)
        reply.channel.settimeout(SOON)
        assert reply.channel.recv(1) == b""
    assert daemon.ask(wire.Detach(name, 0), []).code == "not-found"
    assert daemon.records("foreign") + daemon.records("lost") == []


def test_with_its_partition_nodes(daemon: Daemon, image: int, directory: int, devices: Path) -> None:
    with attached(daemon, image, directory, partscan=True) as reply:
        name = reply.fields["devname"]
        with Loop(int(name[4:])) as loop:
            for number in (1, 2):
                loop.add_partition(number, 65536 * number, 65536)
        eventually((devices / f"{name}p2").exists, "the nodes are there")
        by_ioctl(devices / name)
        eventually(lambda: not list(devices.iterdir()), "all nodes are gone", SOON)
        has_ended(daemon, name)


@pytest.mark.parametrize("deliver", ["node", "mount", "fd"])
def test_however_it_was_handed_over(
    start_daemon: Callable[..., Daemon], image: int, tmp_path: Path, deliver: str
) -> None:
    with granted(start_daemon, tmp_path, "unbind") as (daemon, place, directory):
        with attached(daemon, image, directory if deliver == "node" else None, deliver=(deliver,)) as reply:
            name = reply.fields["devname"]
            if deliver == "fd":
                with Loop.from_fd(reply.fds.pop()) as loop:
                    loop.clear_fd()
            else:
                by_ioctl(place / name if deliver == "node" else Path(f"/proc/self/fd/{reply.fds[0]}/{name}"))
            eventually(lambda: daemon.records("detached") + daemon.records("expired"), "its end is recorded", SOON)
            eventually(lambda: not exists(name), "its number is removed", SOON)
            assert len(ends(daemon, name)) == 1
            assert list(place.iterdir()) == []
        asked = daemon.ask(wire.Directory("unbind", 0, remove=True), [])
        assert asked.code is None, asked.fields
        assert not place.exists()


def test_what_is_unbound_is_not_charged(
    start_daemon: Callable[..., Daemon], image: int, directory: int, devices: Path, tmp_path: Path
) -> None:
    config = tmp_path / "loopd.toml"
    config.write_text("limits.devices = 1\n")
    daemon = start_daemon(f"--config={config}")
    for _ in range(3):
        with attached(daemon, image, directory) as reply:
            assert daemon.attach(image, directory).code == "quota"
            by_ioctl(devices / reply.fields["devname"])
            has_ended(daemon, reply.fields["devname"], diskseq=reply.fields["diskseq"])


def test_it_goes_at_the_last_close_where_it_is_open_elsewhere(
    daemon: Daemon, image: int, directory: int, devices: Path, tmp_path: Path
) -> None:
    """The kernel only sets a flag until then, and the lease is what it was."""
    with attached(daemon, image, directory) as reply:
        name = reply.fields["devname"]
        with (devices / name).open("r+b", buffering=0) as file:
            by_ioctl(devices / name)
            stays(lambda: bound_to(tmp_path) == [name] and (devices / name).exists(), 0.3, "it is bound")
            assert [lease["devname"] for lease in leases(daemon)] == [name]
            assert ends(daemon, name) == []
            file.write(b"written later".ljust(512))
        assert (tmp_path / "image").read_bytes().startswith(b"written later")
        has_ended(daemon, name)
    assert list(devices.iterdir()) == []


def test_many_at_once(daemon: Daemon, make_image: Callable[..., int], directory: int, devices: Path) -> None:
    names = [daemon.attach(make_image(), directory).fields["devname"] for _ in range(24)]
    threads = [threading.Thread(target=by_ioctl, args=(devices / name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    eventually(lambda: not leases(daemon) and not list(devices.iterdir()), "all leases are over", SOON)
    eventually(lambda: not any(exists(name) for name in names), "all numbers are removed", 10)
    assert [len(ends(daemon, name)) for name in names] == [1] * len(names)


def test_while_it_is_detached(daemon: Daemon, image: int, directory: int, devices: Path, tmp_path: Path) -> None:
    """Both at the same time, in whatever order they come: one end, one record, and an answer."""
    for _ in range(10):
        with attached(daemon, image, directory) as reply:
            name = reply.fields["devname"]
            node = os.open(devices / name, os.O_RDONLY)
            thread = threading.Thread(target=_clear_and_close, args=(node,))
            thread.start()
            answer = daemon.ask(wire.Detach(name, 0, wait=5), [])
            thread.join()
            assert answer.code == "not-found" or answer.fields == {"state": "released"}
            eventually(partial(_removed, name), "its number is removed", SOON)
            assert len(ends(daemon, name, reply.fields["diskseq"])) == 1
    assert list(devices.iterdir()) == []
    assert not bound_to(tmp_path)


def _removed(name: str) -> bool:
    return not exists(name)


def _clear_and_close(fd: int) -> None:
    with contextlib.suppress(OSError), Loop.from_fd(fd) as loop:
        loop.clear_fd()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["kill", "restart"])
def test_after_a_restart(kept: Kept, image: int, directory: int, devices: Path, number: int) -> None:
    with hold(kept, "socket", image, directory) as lease:
        kept.kill(number)
        assert kept.leases()[lease.name]["state"] == "bound"
        by_losetup(devices / lease.name)
        eventually(lambda: not kept.leases() and not list(devices.iterdir()), "the lease is over", SOON)
        assert len(eventually(lambda: ends(kept, lease.name), "it is recorded")) == 1
        eventually(lambda: not exists(lease.name), "its number is removed", SOON)
    kept.end()


# Bound to another file --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def bound_again(node: Path, file: int) -> Iterator[None]:
    """The client's own binding in place of loopd's, unbound at the end of the block."""
    by_ioctl(node)
    with Loop.from_fd(os.open(node, os.O_RDWR | os.O_CLOEXEC)) as loop:
        loop.configure(file)
    try:
        yield
    finally:
        # By the number: loopd may have removed the node meanwhile.
        with contextlib.suppress(OSError), Loop(int(node.name[4:])) as loop:
            loop.clear_fd()


def test_it_is_reported_and_charged(
    start_daemon: Callable[..., Daemon], make_image: Callable[..., int], directory: int, devices: Path, tmp_path: Path
) -> None:
    """And left as it is. The daemon is not looking at the time, so that it cannot be faster."""
    config = tmp_path / "loopd.toml"
    config.write_text("limits.devices = 1\n")
    daemon = start_daemon(f"--config={config}")
    image, other = make_image(), make_image(name="other")
    with attached(daemon, image, directory) as reply, contextlib.ExitStack() as stack:
        name = reply.fields["devname"]
        with stopped(daemon):
            stack.enter_context(bound_again(devices / name, other))
        record: dict[str, str]
        (record,) = eventually(lambda: daemon.records("foreign"), "it is reported", 15)
        assert (record["LOOPD_DEVICE"], record["LOOPD_BACKING_FILE"]) == (name, str(tmp_path / "other"))
        assert (record["LOOPD_ACCOUNT"], record["LOOPD_UID"], record["PRIORITY"]) == ("/", "0", "4")
        has_ended(daemon, name, number=False)
        eventually(lambda: not list(devices.iterdir()), "its node is gone", SOON)
        assert daemon.attach(image, directory).code == "quota"
        stays(lambda: bound_to(tmp_path) == [name], 0.5, "it is left as it is")
        stack.close()
        eventually(lambda: not exists(name), "what is free again is removed", 10)
        again = eventually(lambda: _attach(daemon, image, directory), "what is gone is not charged", 10)
        again.close()
    assert len(daemon.records("foreign")) == 1


def _attach(daemon: Daemon, image: int, directory: int) -> Reply | None:
    reply = daemon.attach(image, directory)
    return reply if reply.code is None else None


def test_so_it_is_during_an_outage(
    kept: Kept, make_image: Callable[..., int], directory: int, devices: Path, tmp_path: Path
) -> None:
    """The record in the store is of another binding, which the next daemon must not take this one for."""
    image, other = make_image(), make_image(name="other")
    with hold(kept, "socket", image, directory) as lease, contextlib.ExitStack() as stack:
        with kept.outage():
            stack.enter_context(bound_again(devices / lease.name, other))
        eventually(lambda: not kept.leases(), "the lease is over", SOON)
        record: dict[str, str]
        (record,) = eventually(lambda: kept.records("foreign"), "it is reported", 15)
        assert (record["LOOPD_DEVICE"], record["LOOPD_BACKING_FILE"]) == (lease.name, str(tmp_path / "other"))
        assert bound_to(tmp_path) == [lease.name]
        assert len(ends(kept, lease.name)) == 1
        stack.close()
        eventually(lambda: not exists(lease.name), "what is free again is removed", 10)
    kept.end()


# What a client has open is not the host's -------------------------------------------------------------------------


class Asker:
    """Asks the kernel for a free device all the time, as `losetup -f` does, until the block ends."""

    def __init__(self) -> None:
        self.answers: set[int] = set()
        self.asked = 0
        self._stopping = False
        self._thread = threading.Thread(target=self._ask)

    def _ask(self) -> None:
        with contextlib.closing(LoopControl()) as control:
            while not self._stopping:
                with contextlib.suppress(OSError):
                    self.answers.add(control.get_unbound())
                    self.asked += 1
                # The kernel looks at one device after the other with a lock that attach and removal need.
                time.sleep(0.0002)

    def __enter__(self) -> Asker:  # noqa: PYI034  # it has no subclasses
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping = True
        self._thread.join()


def opened_again(node: Path, kept: Path) -> int | None:
    """Have the device open as soon as it is idle, by a node that the client kept; None where it was too late."""
    os.link(node, kept)
    by_ioctl(kept)
    try:
        return os.open(kept, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # its number is removed already
        return None


def opened_after_detach(daemon: Daemon, node: Path, kept: Path) -> int | None:
    """The same of a device that was in use when it was detached, and is idle from the last close on."""
    os.link(node, kept)
    with kept.open("rb", buffering=0):
        assert daemon.ask(wire.Detach(node.name, 0), []).fields == {"state": "busy"}
    try:
        return os.open(kept, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None


@pytest.mark.parametrize("way", ["unbinds", "detaches"])
def test_the_host_asks_for_a_free_device_all_the_time(
    start_kept: Callable[..., Kept], image: int, directory: int, devices: Path, tmp_path: Path, way: str
) -> None:
    daemon = start_kept()
    daemon.hello()
    had: set[int] = set()
    opened: list[int] = []
    with contextlib.ExitStack() as stack:
        asker = stack.enter_context(Asker())
        for turn in range(12):
            name = daemon.attach(image, directory).fields["devname"]
            had.add(int(name[4:]))
            node, kept = devices / name, tmp_path / f"kept{turn}"
            found = opened_again(node, kept) if way == "unbinds" else opened_after_detach(daemon, node, kept)
            if found is not None:
                stack.callback(os.close, found)
                opened.append(found)
            time.sleep(0.05)
        time.sleep(0.5)
        assert not asker.answers & had, "the host was given a device that a client has open"
        assert asker.asked > 200
    assert opened, "the client was never fast enough: this shows nothing"
    eventually(lambda: not daemon.leases(), "every lease is over", SOON)
    eventually(lambda: not daemon.in_range() or _only_ahead(daemon, had), "what it had open is removed", 15)
    daemon.end()


def _only_ahead(daemon: Kept, had: set[int]) -> bool:
    """Whether none of the numbers that were used is left."""
    return not {int(name[4:]) for name in daemon.in_range()} & had


def low_devices() -> list[str]:
    """The devices below loopd's range."""
    return [name for name in os.listdir("/sys/block") if name.startswith("loop") and int(name[4:]) < FIRST]


@contextlib.contextmanager
def low_as_before() -> Iterator[None]:
    """Remove the idle low devices that loopd and the kernel made meanwhile for the host to find."""
    before = low_devices()
    try:
        yield
    finally:
        with contextlib.closing(LoopControl()) as control:
            for name in set(low_devices()).difference(before):
                with contextlib.suppress(OSError):  # in use by another
                    control.remove(int(name[4:]))


class Finders:
    """Several scripts of the host's, each of which calls `losetup --find --show` again and again. `made` are their
    devices, which are detached at the end of the block.
    """

    def __init__(self, host: Path, scripts: int, times: int) -> None:
        self.made: list[str] = []
        self._host = host
        self._times = times
        self._threads = [threading.Thread(target=self._find) for _ in range(scripts)]

    def _find(self) -> None:
        for _ in range(self._times):
            command = ["losetup", "--find", "--show", str(self._host)]
            shown = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
            if shown.returncode == 0:  # else another was faster
                self.made.append(shown.stdout.strip())

    @property
    def running(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)

    def __enter__(self) -> Finders:  # noqa: PYI034  # it has no subclasses
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for thread in self._threads:
            thread.join()
        for device in self.made:
            subprocess.run(["losetup", "--detach", device], check=False)
        eventually(lambda: not bound_to(self._host), "the host's devices are free")


@pytest.fixture
def lowest(start_kept: Callable[..., Kept]) -> Kept:
    """A daemon whose numbers are the lowest of loopd's, which are found first."""
    daemon = start_kept()
    daemon.block = 1
    start_at(daemon.counter, daemon.block)
    daemon.hello()
    return daemon


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """An image of the host's own."""
    path = tmp_path / "host"
    path.write_bytes(b"the host's".ljust(1 << 16, b"\0"))
    return path


def test_the_host_binds_devices_meanwhile(
    lowest: Kept, host: Path, image: int, directory: int, devices: Path, tmp_path: Path
) -> None:
    """Several `losetup --find` at once, each of which takes away one of the low devices that are free."""
    had: set[int] = set()
    with contextlib.ExitStack() as stack:
        stack.enter_context(low_as_before())
        finders = stack.enter_context(Finders(host, scripts=3, times=8))
        while len(had) < 10 or finders.running:
            name = lowest.attach(image, directory).fields["devname"]
            found = opened_again(devices / name, tmp_path / f"kept{len(had)}")
            had.add(int(name[4:]))
            if found is not None:
                stack.callback(os.close, found)
                assert os.pread(found, 10, 0) != b"the host's"
        hosts = {int(device.removeprefix("/dev/loop")) for device in finders.made}
        assert len(hosts) > 10, "the host found too few to show anything"
        assert not hosts & had, "the host was given a device that a client has open"
        assert all(number < FIRST for number in hosts), "the host was given one of loopd's"
    lowest.end()


SEVERAL = 3


def test_the_host_binds_several_before_loopd_comes_to_it(
    lowest: Kept, host: Path, image: int, directory: int, devices: Path, tmp_path: Path
) -> None:
    """All low devices that were there are bound, the client has its idle one open, and loopd stands still."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(low_as_before())
        control = stack.enter_context(contextlib.closing(LoopControl()))
        file = stack.enter_context(host.open("r+b"))

        def bind() -> int:
            number = control.get_unbound()
            loop = stack.enter_context(Loop(number))
            loop.configure(file.fileno(), autoclear=True)
            return number

        for _ in range(sum(backing_file(int(name[4:])) is None for name in low_devices())):
            with contextlib.suppress(OSError):  # another was faster
                bind()
        name = lowest.attach(image, directory).fields["devname"]
        time.sleep(0.5)  # loopd is told that low devices were bound, and makes others
        with stopped(lowest):
            found = opened_again(devices / name, tmp_path / "kept")
            assert found is not None
            stack.callback(os.close, found)
            hosts = [bind() for _ in range(SEVERAL)]
            assert int(name[4:]) not in hosts, "the host was given a device that a client has open"
            assert os.pread(found, 10, 0) != b"the host's"
            assert all(number < FIRST for number in hosts), "the host was given one of loopd's"
    lowest.end()


def test_what_it_has_open_is_parked_at_once(
    start_kept: Callable[..., Kept], image: int, directory: int, devices: Path, tmp_path: Path
) -> None:
    """Idle and open it would be anybody's: it is bound to nothing until its client lets go of it."""
    daemon = start_kept()
    daemon.hello()
    name = daemon.attach(image, directory).fields["devname"]
    found = opened_again(devices / name, tmp_path / "kept")
    require(found is not None, "the client was not fast enough")
    assert found is not None
    try:
        began = time.monotonic()
        eventually(lambda: backing_file(int(name[4:])) is not None, "it is bound to nothing of anybody's", 2)
        assert time.monotonic() - began < 1
        assert os.pread(found, 4096, 0) in (b"", bytes(4096))
        eventually(lambda: not daemon.leases(), "the lease is over", SOON)
    finally:
        os.close(found)
    eventually(lambda: not exists(name), "it goes at its last close", 10)
    daemon.end()
