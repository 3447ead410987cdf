"""What happens at the worst moment: a worker that ends, hangs or is slow just then.

The moment is the daemon's own: a sitecustomize in its PYTHONPATH has one step of it fail, or wait for the test.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.daemon import ROOT, Daemon, bound_to, eventually, exists, require
from support.fuse_never import Never
from support.kept import Kept, start_kept_fixture  # noqa: F401
from support.untouched import leases, stopped
from test_fuse import _closed_to_all

from loopd.children.flow import Promise, Turns, start
from loopd.kernel.transport import FdSet
from loopd.loop import Loop
from loopd.protocol import wire
from loopd.worker import records
from loopd.worker.devices import Binding

FAULTS = """
import errno, os, signal, time, types
from pathlib import Path
from loopd.daemon import release, slots
from loopd.worker import attach, bind, messages, process, records, upkeep

release.HELD_CHECK = 1.0
flags = Path({flags!r})

def put(name, text=""):
    (flags / name).write_text(text)

def wait(name):
    while not (flags / name).exists():
        time.sleep(0.01)

def seen(name):
    "Whether the flag was there; from now on it is another."
    there = (flags / name).exists()
    if there:
        os.rename(flags / name, flags / (name + " seen"))
    return there

def hang(*_):
    time.sleep(1000)

def add(place, name, before=lambda *_: None, after=lambda *_: None):
    "Have a function do more."
    real = getattr(place, name)
    def function(*args, **options):
        before(*args)
        value = real(*args, **options)
        after(*args)
        return value
    setattr(place, name, function)
"""


class Races:
    """A daemon with faults, and the flags by which it and the test wait for each other."""

    def __init__(self, start: Callable[..., Daemon], place: Path) -> None:
        self._start = start
        self.place = place
        place.mkdir()

    def start(self, code: str, policy: str = "") -> Daemon:
        """A daemon in each process of which that code has been run first."""
        (self.place / "sitecustomize.py").write_text(FAULTS.format(flags=str(self.place)) + code)
        return self._start(environment={"PYTHONPATH": f"{self.place}:{ROOT}"}, policy=policy)

    def start_hurried(self, code: str) -> Daemon:
        """One that writes a worker off soon."""
        return self.start(code, "request_timeout = 1\n")

    def put(self, *names: str) -> None:
        for name in names:
            (self.place / name).touch()

    def wait(self, name: str) -> str:
        """What the daemon has put into a flag."""
        eventually((self.place / name).exists, name)
        return (self.place / name).read_text()


@pytest.fixture
def races(start_daemon: Callable[..., Daemon], tmp_path: Path) -> Races:
    return Races(start_daemon, tmp_path / "flags")


# The main process -------------------------------------------------------------------------------------------------


def test_an_event_of_a_file_that_is_closed(races: Races, image: int, directory: int) -> None:
    """The keeper ends in the round in which its lease is detached, and a new worker's channel has its fd's number."""
    daemon = races.start("""
def late(self, message, *_):
    if isinstance(message, messages.Taken) and seen("hold"):
        wait("go on")

def slow(*_):
    put("displacing")
    wait("displace")

add(process.Worker, "say", late)
add(upkeep, "displace", slow)
""")
    reply = daemon.attach(image, directory)
    time.sleep(0.5)  # what the attach had open is closed: the next fd has the lowest number, once that is free
    races.put("hold")
    # With a file, which its worker may hang in: another worker is forked for the release.
    with ThreadPoolExecutor(1) as beside:
        detached = beside.submit(daemon.ask, wire.Detach(reply.fields["devname"], 1), [image])
        races.wait("hold seen")
        with stopped(daemon):
            races.put("go on")
            time.sleep(0.5)  # the worker's answer is there before the hang-up
            reply.close()
        try:
            races.wait("displacing")
            assert daemon.ask(wire.Hello(0), [], timeout=3).code is None
        finally:
            races.put("displace")
    assert detached.result().fields == {"state": "released"}


def test_flows_that_give_their_turn_back_at_once() -> None:
    """Each goes on, although one hands its turn on to the next while it ends."""
    turns, log, gone = Turns(), [], Promise[None]()

    async def first() -> None:
        async with turns:
            await gone

    async def flow(number: int) -> None:
        async with turns:
            log.append(number)

    start(first())
    for number in range(200):
        start(flow(number))
    gone.keep(None)
    assert log == list(range(200))
    assert turns.taken == 0


@pytest.mark.parametrize("clear", ["cleared", "hangs"])
def test_who_closes_the_file_after_a_hang(races: Races, image: int, directory: int, devices: Path, clear: str) -> None:
    """A worker does; where that hangs, too, the slot keeps it. The main process is given back what is empty."""
    daemon = races.start_hurried(f"""
def tell(self, slot):
    stored = records.read(slot.fd, every_fd=True)
    put("given back", str(stored and sorted(stored.fds)))

add(slots.Slots, "give_back", tell)
upkeep.displace = hang
if {clear == "hangs"}:
    upkeep.clear = hang
""")
    reply = daemon.attach(image, directory, partscan=True)
    with Loop.from_fd(os.open(devices / reply.fields["devname"], os.O_RDWR)) as loop:
        reply.close()
        eventually(lambda: daemon.records("stuck"), "the release hangs")
        loop.clear_fd()
    eventually(lambda: daemon.records("expired"), "the lease is over")
    if clear == "hangs":
        assert not (races.place / "given back").exists()
        assert len(daemon.records("stuck")) > 1
    else:
        assert races.wait("given back") == "None"
    assert daemon.hello().code is None
    (devices / reply.fields["devname"]).unlink()


# A worker that is killed ------------------------------------------------------------------------------------------


LOSE_AND_ASK = """
ask = attach.Attaching._ask_for_number

def lose(loop, request):
    if seen("lose"):
        put("lost", str(loop.minor))
        raise OSError(errno.EBUSY, "somebody else was faster")

def killed(self):
    number = ask(self)
    if seen("lost"):
        if not number.made:
            self._tools.control.add(number.number)
        put("asked", str(number.number))
        wait("die")
        signal.raise_signal(signal.SIGKILL)
    return number

add(bind, "_configure", lose)
attach.Attaching._ask_for_number = killed
"""


def test_a_worker_that_is_killed_when_it_asked_for_another_number(races: Races, image: int, directory: int) -> None:
    """Both numbers go: neither the first's record nor the second's device is left."""
    daemon = races.start(LOSE_AND_ASK)
    races.put("lose", "die")
    assert daemon.attach(image, directory).code == "internal"
    both = [f"loop{races.wait(name)}" for name in ("lost seen", "asked")]
    assert both[0] != both[1]
    eventually(lambda: not any(exists(name) for name in both), "both devices are gone")
    assert leases(daemon) == []
    assert daemon.attach(image, directory).code is None


def test_a_lost_number_that_another_has(
    races: Races, image: int, directory: int, devices: Path, tmp_path: Path
) -> None:
    """Its first worker is killed then, and there is one lease of it."""
    daemon = races.start(LOSE_AND_ASK)
    names: list[str] = []

    def given(lost: str) -> bool:
        names.append(daemon.attach(image, directory).fields["devname"])
        time.sleep(0.1)
        return names[-1] == lost

    lost = daemon.attach(image, directory).fields["devname"]
    assert daemon.ask(wire.Detach(lost, 0, wait=5), []).fields == {"state": "released"}
    eventually(lambda: not exists(lost), "the number is free")
    time.sleep(0.1)  # the main process knows it
    races.put("lose")
    with ThreadPoolExecutor(1) as beside:
        attached = beside.submit(daemon.attach, image, directory)
        races.wait("asked")
        assert races.wait("lost seen") == lost.removeprefix("loop")
        eventually(lambda: given(lost), "the number is another's")
        races.put("die")
    assert attached.result().code == "internal"
    assert sorted(lease["devname"] for lease in leases(daemon)) == sorted(names)
    assert sorted(bound_to(tmp_path)) == sorted(names)
    for name in names:
        assert daemon.ask(wire.Detach(name, 0, wait=5), []).fields == {"state": "released"}
    assert not list(devices.iterdir())


def test_an_intended_binding_whose_release_hangs(races: Races, image: int, directory: int, tmp_path: Path) -> None:
    """Its worker was killed before it booked that the device is bound: it is a lease all the same, until it is not."""
    daemon = races.start_hurried("""
def slow(*_):
    while (flags / "hang").exists():
        time.sleep(0.01)

add(bind, "_configure", after=lambda *_: seen("die") and signal.raise_signal(signal.SIGKILL))
add(upkeep, "displace", slow)
""")
    races.put("hang", "die")
    assert daemon.attach(image, directory).code == "internal"
    eventually(lambda: daemon.records("held"), "the release hangs, and the device is bound")
    assert daemon.records("stuck")
    [devname] = bound_to(tmp_path)
    assert [lease["devname"] for lease in leases(daemon)] == [devname]
    (races.place / "hang").unlink()
    eventually(lambda: not bound_to(tmp_path), "the device is released")
    eventually(lambda: not leases(daemon), "the lease is over")


def test_a_release_that_was_cut_short() -> None:
    """The next worker goes on with the record, however much of it the first had dropped."""
    intended = Binding(5000, "loop5000", 7, 5000, None, 0, 0, 0, 512, False, False, False, "x", "8:1", 5, "")
    with records.make_slot() as slot, open("/dev/null", "rb") as keeper:

        def book() -> None:
            records.write(slot.fileno(), {"account": "/"}, "reply", intended, 3, {"keeper": keeper.fileno()})
            records.note_bound(slot.fileno(), intended._replace(diskseq=77, size=512))
            records.note_answer(slot.fileno(), "sending")
            records.note_answer(slot.fileno(), "sent")

        book()
        records.note_released(slot.fileno())
        [whole] = records._payloads(slot)
        for dropped in range(5):
            records.clear(slot.fileno())
            book()
            slot.send(whole)
            records._drop(slot, dropped)
            for _ in range(2):
                records.note_released(slot.fileno())
                assert records._payloads(slot) == [whole]
            stored = records.read(slot.fileno())
            assert stored is not None
            assert stored.released
            assert (stored.binding.diskseq, stored.row, stored.fds) == (77, 3, {})


# A write-back that takes long -------------------------------------------------------------------------------------


def test_written_during_a_write_back(races: Races, image: int, directory: int, devices: Path, tmp_path: Path) -> None:
    """It is in the image: what somebody else has written and closed after the fsync began."""
    daemon = races.start("""
def slow(*_):
    put("synced")
    wait("go on")

add(bind, "_sync", after=slow)
""")
    reply = daemon.attach(image, directory)
    late = os.urandom(1 << 16)
    fd = os.open(devices / reply.fields["devname"], os.O_RDWR)
    os.pwrite(fd, b"early", 0)
    reply.close()
    races.wait("synced")
    os.pwrite(fd, late, 1 << 16)
    os.close(fd)
    races.put("go on")
    eventually(lambda: daemon.records("expired"), "the lease is over")
    assert not bound_to(tmp_path)
    assert os.pread(image, 5, 0) == b"early"
    assert os.pread(image, len(late), 1 << 16) == late


def test_what_a_slow_write_back_loses_is_told(races: Races, image: int, directory: int) -> None:
    """It may take longer than a request."""
    daemon = races.start_hurried("""
def fail(fd):
    time.sleep(2)
    raise OSError(errno.ENOSPC, "a full disk behind much that is dirty")

bind.os = types.SimpleNamespace(**vars(os) | {"fsync": fail})
""")
    devname = daemon.attach(image, directory).fields["devname"]
    fields = daemon.ask(wire.Detach(devname, 0, wait=9), [], timeout=15).fields
    assert fields == {"state": "released", "lost": os.strerror(28)}
    assert [record["LOOPD_ERROR"] for record in daemon.records("lost")] == [os.strerror(28)]


def test_one_of_a_dead_daemon_whose_write_back_hangs(
    races: Races, make_image: Callable[..., int], directory: int, tmp_path: Path
) -> None:
    """The others are released."""
    daemon = races.start_hurried('add(bind, "_sync", lambda *_: seen("hang") and hang())')
    names = [daemon.attach(make_image(name=f"image{number}"), directory).fields["devname"] for number in range(4)]
    daemon.kill()
    assert sorted(bound_to(tmp_path)) == sorted(names)
    races.put("hang")
    daemon.start()
    daemon.hello()
    eventually(lambda: len(daemon.records("expired")) == len(names) - 1, "the others are released")
    assert len(daemon.records("stuck")) == 1
    eventually(lambda: not bound_to(tmp_path), "the worker that hung is gone, and the device with it")


# Nodes in a directory that is kept locked -------------------------------------------------------------------------


@pytest.fixture
def never(start_kept: Callable[..., Kept], tmp_path: Path) -> Iterator[Never]:
    """Ended before the daemon is."""
    require(os.path.exists("/dev/fuse"), "needs /dev/fuse")
    file_system = Never(tmp_path / "never")
    yield file_system
    file_system.end()


def test_a_partition_that_goes_after_a_restart(
    start_kept: Callable[..., Kept], never: Never, image: int, tmp_path: Path
) -> None:
    """The new daemon has its node closed, although nobody can look into the directory."""
    grants = tmp_path / "grants"
    grants.mkdir()
    kept = start_kept(f"--grant-directory={grants}")
    grant = Path(kept.ask(wire.Directory("build", 0), []).fields["path"])
    directory = os.open(grant, os.O_RDONLY | os.O_DIRECTORY)
    reply = kept.attach(image, directory, partscan=True)
    os.close(directory)
    name = reply.fields["devname"]
    nodes = [grant / f"{name}p{number}" for number in (1, 2)]
    with Loop(int(name[4:])) as loop:
        for number in (1, 2):
            loop.add_partition(number, number << 16, 1 << 16)
    eventually(lambda: all(node.exists() for node in nodes), "the nodes are there")
    with _closed_to_all(never, grant), FdSet(os.open(node, os.O_PATH) for node in nodes) as fds:
        kept.kill()
        assert list(kept.leases()) == [name]
        with Loop(int(name[4:])) as loop:
            loop.delete_partition(1)
        eventually(lambda: not os.fstat(fds.borrow(0)).st_mode & 0o777, "the node is closed")
        assert os.fstat(fds.borrow(1)).st_mode & 0o777
    reply.close()
    eventually(lambda: not bound_to(tmp_path), "the device is gone", 20)
    kept.end()
