"""The fd store is lost, with every slot in it: what loopd had bound is found by its state directory, and released.

So it is after `systemctl clean --what=fdstore`, after `stop` on systemd 252, and when a daemon by hand is killed. The
kernel keeps the bindings, and their clients may be at work on them; what is not loopd's stays what it is.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support.daemon import LOCKS, Daemon, bound_to, configured, eventually, exists, grants_at, require
from support.kept import Kept
from support.processes import stays

from loopd.daemon.counter import BLOCK
from loopd.loop import Loop, LoopControl
from loopd.protocol import wire
from loopd.worker.make import FIRST

SOON = 10.0
MIB = 1 << 20


class Rig:
    """A daemon with a grant, which loses its slots, and leases whose clients live on."""

    def __init__(self, daemon: Daemon, grants: Path, place: Path) -> None:
        self.daemon = daemon
        self.grants = grants
        self.place = place
        self.node = place / "dev"
        self.node.mkdir(exist_ok=True)
        self.client = os.open(self.node, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self.grant = self.take_grant()
        self._fds = [self.client, self.grant]
        self._records = 0

    def take_grant(self) -> int:
        self.granted = Path(self.daemon.ask(wire.Directory("lost", 0), []).fields["path"])
        return os.open(self.granted, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def image(self, name: str, size: int = MIB) -> int:
        path = self.place / name
        path.touch()
        os.truncate(path, size)
        self._fds.append(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        return self._fds[-1]

    def attach(self, name: str, directory: int | None, **options: Any) -> str:
        """A device of an image of that name; the reply socket, which keeps it, stays open."""
        reply = self.daemon.attach(self.image(name, options.pop("size", MIB)), directory, **options)
        assert reply.code is None, reply.fields
        devname: str = reply.fields["devname"]
        return devname

    def lose(self) -> None:
        """Kill every process that has a slot: the daemon's, and the service manager's stand-in."""
        self._records = len(self.daemon.records())
        processes = self.daemon.family()
        for pid in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.daemon.wait()
        eventually(lambda: not self.daemon.family(), "no process is left")

    def again(self, *, greet: bool = True) -> None:
        """Have a daemon start with the same state directory, and no store; unless greeted, by the next request."""
        for end in ("", ".admin", ".notify"):
            Path(self.daemon.path + end).unlink(missing_ok=True)
        if isinstance(self.daemon, Kept):
            self.daemon.launch()
        else:
            self.daemon.start()
        if greet:
            assert self.daemon.hello().code is None

    def told(self, name: str) -> list[dict[str, str]]:
        """What the new daemon has said of a device."""
        return [record for record in self.daemon.records()[self._records :] if record.get("LOOPD_DEVICE") == name]

    def free(self, *names: str) -> None:
        """These are released: no binding, no number, no lease, and the audit says so."""
        eventually(lambda: not set(names) & set(bound_to(self.place)), "they are unbound", SOON)
        eventually(lambda: not any(exists(name) for name in names), "their numbers are removed", SOON)
        for name in names:
            found = self.told(name)
            assert found, f"nothing was said of {name}"
            assert not [record for record in found if record["LOOPD_EVENT"] == "foreign"], found
        assert self.daemon.ask(wire.Leases(0), []).fields["leases"] == []

    def removable(self) -> None:
        """Nothing of what was lost lies in the grant, which can be removed, nor beside it."""
        eventually(lambda: not list(self.granted.iterdir()), "the grant is empty", SOON)
        reply = self.daemon.ask(wire.Directory("lost", 0, remove=True), [])
        assert reply.code is None, reply.fields
        eventually(lambda: not list(self.grants.glob("[!.]*")), "no directory is left", SOON)

    def close(self) -> None:
        """End the daemon, with what a failed test leaves: no daemon may know of it any more."""
        for fd in self._fds:
            os.close(fd)
        if not self.daemon.family():
            self.again()
        _unbind(self.place)
        self.daemon.stop()


@contextlib.contextmanager
def make_rig(tmp_path: Path, how: str, start_daemon: Callable[..., Daemon]) -> Iterator[Rig]:
    require(os.geteuid() == 0, "needs root: loop devices")
    require(os.path.exists("/dev/loop-control"), "needs /dev/loop-control")
    with contextlib.ExitStack() as stack:
        grants = stack.enter_context(grants_at(tmp_path / "grants"))
        daemon: Daemon
        if how == "store":
            (tmp_path / "kept").mkdir()
            options = ["--grant-directory", str(grants), *configured(tmp_path / "kept", LOCKS)]
            daemon = Kept(tmp_path / "kept", options, [], {})
            daemon.start()
        else:
            daemon = start_daemon("--grant-directory", str(grants), name="byhand", policy=LOCKS)
        rig = Rig(daemon, grants, tmp_path)
        stack.callback(rig.close)
        yield rig


def _unbind(place: Path) -> None:
    """What a failed test leaves: no daemon knows of it any more."""
    for name in bound_to(place):
        with contextlib.suppress(OSError), Loop(int(name[4:])) as loop:
            loop.clear_fd()


@pytest.fixture(params=["store", "by hand"])
def rig(request: pytest.FixtureRequest, tmp_path: Path, start_daemon: Callable[..., Daemon]) -> Iterator[Rig]:
    """With a service manager whose store is given up, and by hand, killed."""
    with make_rig(tmp_path, request.param, start_daemon) as found:
        yield found


@pytest.fixture
def stored(tmp_path: Path, start_daemon: Callable[..., Daemon]) -> Iterator[Rig]:
    with make_rig(tmp_path, "store", start_daemon) as found:
        yield found


class Lost(NamedTuple):
    """How a device is attached; `grant`: in loopd's directory."""

    options: dict[str, Any]
    grant: bool = False
    directory: bool = True


LEASES = {
    "client": Lost({}),
    "grant": Lost({"partscan": True}, grant=True),
    "mount": Lost({"deliver": ("mount",)}, directory=False),
    "fd": Lost({"deliver": ("fd",)}, directory=False),
    "lock": Lost({"lock": True}, grant=True),
    "read-only": Lost({"read_only": True}, grant=True),
    "window": Lost({"offset": 4096, "sizelimit": 65536, "direct_io": "off"}, grant=True),
}


# What loopd had bound ---------------------------------------------------------------------------------------------


def test_every_kind_of_lease_is_released(rig: Rig) -> None:
    names = {}
    for kind, lost in LEASES.items():
        directory = rig.grant if lost.grant else rig.client if lost.directory else None
        names[kind] = rig.attach(kind, directory, **lost.options)
    for reply in rig.daemon._replies:
        while reply.fds:
            os.close(reply.fds.pop())  # what was delivered: an fd that is open would keep its device
    rig.lose()
    stays(lambda: set(bound_to(rig.place)) == set(names.values()), 0.2, "the kernel keeps every binding")
    Path(f"/dev/{names['client']}").write_bytes(b"written meanwhile".ljust(512))
    rig.again()
    rig.free(*names.values())
    assert (rig.place / "client").read_bytes().startswith(b"written meanwhile")
    rig.removable()


def test_with_its_partitions(rig: Rig) -> None:
    name = rig.attach("image", rig.grant, partscan=True)
    with Loop(int(name[4:])) as loop:
        for number in (1, 2):
            loop.add_partition(number, 65536 * number, 65536)
    eventually((rig.granted / f"{name}p2").exists, "the nodes are there")
    rig.lose()
    rig.again()
    rig.free(name)
    rig.removable()


def test_one_that_is_in_use_goes_at_its_last_close(rig: Rig) -> None:
    """Its client mounts it, writes, and unmounts it as if nothing had been."""
    name = rig.attach("image", rig.grant, size=16 * MIB)
    point = rig.place / "mounted"
    point.mkdir()
    subprocess.run(["mkfs.ext4", "-q", rig.granted / name], check=True)
    subprocess.run(["mount", f"/dev/{name}", point], check=True)
    try:
        rig.lose()
        rig.again()
        eventually(lambda: rig.told(name), "it is found", SOON)
        (point / "file").write_text("written later\n")
        assert bound_to(rig.place) == [name]
    finally:
        subprocess.run(["umount", point], check=True)
    rig.free(name)
    subprocess.run(["e2fsck", "-f", "-n", rig.place / "image"], check=True, capture_output=True)
    read = ["debugfs", "-R", "cat file", str(rig.place / "image")]
    assert subprocess.run(read, check=True, capture_output=True, text=True).stdout == "written later\n"
    rig.removable()


def test_one_that_somebody_unbound_meanwhile(rig: Rig) -> None:
    """Its record is all that there is of it, and its node in the grant."""
    name = rig.attach("image", rig.grant)
    rig.lose()
    subprocess.run(["losetup", "--detach", f"/dev/{name}"], check=True)
    assert not bound_to(rig.place)
    rig.again()
    eventually(lambda: not exists(name), "its number is removed", SOON)
    rig.removable()
    assert rig.daemon.records("foreign") == []


def test_what_was_detached_is_no_more_looked_for(rig: Rig) -> None:
    """The state directory does not remember it: the host may bind that number, and even that file."""
    name = rig.attach("image", rig.grant)
    other = rig.attach("other", rig.grant)
    assert rig.daemon.ask(wire.Detach(name, 1, dir_fd=0, wait=5), [rig.grant]).fields == {"state": "released"}
    eventually(lambda: not exists(name), "its number is removed")
    rig.lose()
    with host_binding(int(name[4:]), rig.place / "image"):
        rig.again()
        rig.free(other)
        stays(lambda: bound_to(rig.place / "image") == [name], 1, "it is the host's")
    eventually(lambda: not exists(name), "what is free again is removed", SOON)
    rig.removable()


def test_killed_again_while_it_releases(rig: Rig) -> None:
    names = [rig.attach(f"image{number}", rig.grant, partscan=True) for number in range(12)]
    rig.lose()
    for _ in range(3):
        rig.again()
        rig.lose()
    rig.again()
    eventually(lambda: not bound_to(rig.place), "they are unbound", SOON)
    eventually(lambda: not any(exists(name) for name in names), "their numbers are removed", SOON)
    rig.removable()


def test_who_comes_first_is_served_and_gets_another_device(rig: Rig) -> None:
    lost = [rig.attach(f"image{number}", rig.grant) for number in range(4)]
    rig.lose()
    rig.again(greet=False)
    name = rig.attach("new", rig.client)
    assert name not in lost
    (rig.node / name).write_bytes(b"the new one's".ljust(512))
    eventually(lambda: bound_to(rig.place) == [name], "the lost ones are unbound", SOON)
    stays(lambda: (rig.node / name).exists() and bound_to(rig.place) == [name], 1, "the new one is not")
    assert rig.daemon.ask(wire.Detach(name, 0, wait=5), []).fields == {"state": "released"}
    assert (rig.place / "new").read_bytes().startswith(b"the new one's")
    rig.free(*lost)
    rig.removable()


# What others have bound -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def host_binding(number: int, file: Path) -> Iterator[str]:
    """The host's own, of a number of its choice."""
    name = f"loop{number}"
    eventually(lambda: _made(number), "the device is there")
    subprocess.run(["losetup", f"/dev/{name}", file], check=True)
    try:
        yield name
    finally:
        subprocess.run(["losetup", "--detach", f"/dev/{name}"], check=True)


def _made(number: int) -> bool:
    """Whether there is such a device. While the kernel still removes it, it is neither there nor can it be made."""
    with contextlib.closing(LoopControl()) as control, contextlib.suppress(FileExistsError):
        control.add(number)
    return Path(f"/dev/loop{number}").exists()


def foreign(rig: Rig, name: str, file: Path) -> None:
    """Reported, once, and left as it is."""
    reported = eventually(lambda: [r for r in rig.told(name) if r["LOOPD_EVENT"] == "foreign"], "it is reported", 20)
    assert [record["LOOPD_BACKING_FILE"] for record in reported] == [str(file)]
    stays(lambda: bound_to(file) == [name], 1, "it is left alone")


def test_a_binding_of_the_hosts_on_a_number_of_loopds(stored: Rig) -> None:
    lost = stored.attach("image", stored.grant)
    host = stored.place / "host"
    host.write_bytes(b"the host's".ljust(1 << 16, b"\0"))
    stored.lose()
    first = int(lost[4:])
    block = range(FIRST + (first - FIRST) // BLOCK * BLOCK, FIRST + ((first - FIRST) // BLOCK + 1) * BLOCK)
    number = next(n for n in reversed(block) if not exists(f"loop{n}"))
    with host_binding(number, host) as name:
        stored.again()
        foreign(stored, name, host)
        stored.free(lost)
        assert Path(f"/dev/{name}").read_bytes().startswith(b"the host's")
    stored.removable()


def test_a_binding_of_the_hosts_in_the_place_of_a_lost_one(rig: Rig) -> None:
    """The number is what the state directory names; the file is not."""
    name = rig.attach("image", rig.grant)
    host = rig.place / "host"
    host.write_bytes(b"the host's".ljust(1 << 16, b"\0"))
    rig.lose()
    subprocess.run(["losetup", "--detach", f"/dev/{name}"], check=True)
    with host_binding(int(name[4:]), host):
        rig.again()
        foreign(rig, name, host)
        assert Path(f"/dev/{name}").read_bytes().startswith(b"the host's")
        rig.removable()
    eventually(lambda: not exists(name), "what is free again is removed", SOON)


def test_leases_of_another_instance_are_left_alone(stored: Rig, tmp_path: Path) -> None:
    """Instances share the state directory, and each knows its own."""
    (tmp_path / "second").mkdir()
    second = Kept(tmp_path / "second", ["--instance", "second"], [], {})
    second.state, second.block, second.counter = stored.daemon.state, _block(stored), stored.daemon.state / "numbers"
    second.launch()
    eventually(lambda: Path(second.path).exists(), "the socket is there")
    try:
        reply = second.attach(stored.image("second's"), stored.client)
        name = reply.fields["devname"]
        lost = stored.attach("image", stored.grant)
        stored.lose()
        stored.again()
        stored.free(lost)
        stays(lambda: bound_to(tmp_path) == [name] and (stored.node / name).exists(), 1, "it is another's")
        assert list(second.leases()) == [name]
        assert not [record for record in stored.daemon.records("foreign") if record["LOOPD_DEVICE"] == name]
        assert second.ask(wire.Detach(name, 0, wait=5), []).fields == {"state": "released"}
        stored.removable()
    finally:
        second.stop()


def _block(rig: Rig) -> int:
    assert isinstance(rig.daemon, Kept)
    return rig.daemon.block
