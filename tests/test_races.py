"""What happens at the worst moment: a worker that ends, hangs or is slow just then.

The moment is the daemon's own: a sitecustomize in its PYTHONPATH has one step of it fail, or wait for the test.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ROOT, Daemon, Reply, ask, bound_to, eventually, exists, require
from fuse_never import Never
from kept import Kept, start_kept_fixture  # noqa: F401
from test_fuse import _closed_to_all
from untouched import leases, stopped

from loopd.children.flow import Promise, Turns, start
from loopd.loop import Loop, backing_file
from loopd.protocol import wire
from loopd.worker import records
from loopd.worker.devices import Binding

PATIENCE = 1.0
"""Seconds of a request, where one hangs."""
HURRIED = f"request_timeout = {PATIENCE}\n"
FLOWS = 200

FAULTS = """
import errno, os, signal, time, types
from pathlib import Path
from loopd.daemon import release, slots
from loopd.worker import attach, bind, jobs, messages, process, records

release.HELD_CHECK = 1.0
flags = Path({flags!r})

def seen(name):
    "Whether the flag was there; from now on it is another."
    try:
        os.rename(flags / name, flags / (name + " seen"))
    except FileNotFoundError:
        return False
    return True

def wait(name):
    while not (flags / name).exists():
        time.sleep(0.01)

def hang(*_):
    time.sleep(1000)

def die():
    os.kill(os.getpid(), signal.SIGKILL)
"""


class Flags:
    """What the test and the daemon's faults tell each other."""

    def __init__(self, place: Path) -> None:
        self.place = place
        place.mkdir()

    def faults(self, code: str) -> dict[str, str]:
        """The environment of a daemon in which that code has been run first."""
        (self.place / "sitecustomize.py").write_text(FAULTS.format(flags=str(self.place)) + code)
        return {"PYTHONPATH": f"{self.place}:{ROOT}"}

    def put(self, name: str) -> None:
        (self.place / name).touch()

    def wait(self, name: str) -> str:
        """What the daemon has put into a flag."""
        eventually((self.place / name).exists, name)
        return (self.place / name).read_text()


@pytest.fixture
def flags(tmp_path: Path) -> Flags:
    return Flags(tmp_path / "flags")


@contextlib.contextmanager
def asked(daemon: Daemon, request: wire.Request, fds: list[int]) -> Iterator[list[Reply]]:
    """Ask beside the test; the reply is in the list after the block."""
    replies: list[Reply] = []

    def body() -> None:
        replies.append(ask(daemon.path, wire.encode_request(request), fds, timeout=20))

    thread = threading.Thread(target=body)
    thread.start()
    try:
        yield replies
    finally:
        thread.join()
        daemon._replies += replies


def number_of(devname: str) -> int:
    return int(devname.removeprefix("loop"))


# The main process -------------------------------------------------------------------------------------------------


def test_an_event_of_a_file_that_is_closed(
    start_daemon: Callable[..., Daemon], flags: Flags, image: int, directory: int
) -> None:
    """The keeper ends in the round in which its lease is detached, and a new worker's channel has its fd's number."""
    environment = flags.faults("""
say, displace = process.Worker.say, jobs.JOBS[messages.Displace]

def late(self, message, *rest, **options):
    if isinstance(message, messages.Taken) and seen("hold"):
        wait("go on")
    say(self, message, *rest, **options)

def slow(*job):
    (flags / "displacing").touch()
    wait("displace")
    return displace(*job)

process.Worker.say = late
jobs.JOBS[messages.Displace] = slow
""")
    daemon = start_daemon(environment=environment)
    reply = daemon.attach(image, directory)
    daemon.hello()
    flags.put("hold")
    with asked(daemon, wire.Detach(reply.fields["devname"], 0, wait=9), []) as replies:
        flags.wait("hold seen")
        with stopped(daemon):
            flags.put("go on")
            time.sleep(0.3)  # the worker's answer is there before the hang-up
            reply.close()
        try:
            flags.wait("displacing")
            assert daemon.ask(wire.Hello(0), [], timeout=3).code is None
        finally:
            flags.put("displace")
    assert replies[0].fields == {"state": "released"}


def test_flows_that_give_their_turn_back_at_once() -> None:
    """Each goes on, although one hands its turn on to the next while it ends."""
    turns, log, gone = Turns(), [], Promise[None]()

    async def first() -> None:
        async with turns:
            await gone

    async def fail() -> None:
        async with turns:
            raise ValueError

    async def flow(number: int) -> None:
        try:
            await fail()
        except ValueError:
            log.append(number)

    start(first())
    for number in range(FLOWS):
        start(flow(number))
    gone.keep(None)
    assert log == list(range(FLOWS))
    assert turns.taken == 0


@pytest.mark.parametrize("clear", ["cleared", "hangs"])
def test_who_closes_the_file_of_a_lease_whose_release_hung(
    start_daemon: Callable[..., Daemon], flags: Flags, image: int, directory: int, devices: Path, clear: str
) -> None:
    """A worker does; where that hangs, too, the slot keeps it. The main process is given back what is empty."""
    environment = flags.faults(f"""
give_back = slots.Slots.give_back

def tell(self, slot):
    stored = records.read(slot.fd, every_fd=True)
    (flags / "given back").write_text(str(stored and sorted(stored.fds)))
    give_back(self, slot)

slots.Slots.give_back = tell
jobs.JOBS[messages.Displace] = hang
if {clear == "hangs"}:
    jobs.JOBS[messages.Clear] = hang
""")
    daemon = start_daemon(environment=environment, policy=HURRIED)
    reply = daemon.attach(image, directory, partscan=True)
    with Loop.from_fd(os.open(devices / reply.fields["devname"], os.O_RDWR)) as loop:
        reply.close()
        eventually(lambda: daemon.records("stuck"), "the release hangs")
        loop.clear_fd()
    eventually(lambda: daemon.records("expired"), "the lease is over")
    if clear == "hangs":
        assert not (flags.place / "given back").exists()
        assert len(daemon.records("stuck")) > 1
    else:
        assert flags.wait("given back") == "None"
    assert daemon.hello().code is None
    (devices / reply.fields["devname"]).unlink()


# A worker that is killed ------------------------------------------------------------------------------------------


LOSE_AND_ASK = """
configure, ask = bind._configure, attach.Attaching._ask_for_number

def lose(loop, request):
    if seen("lose"):
        (flags / "lost").write_text(str(loop.minor))
        raise OSError(errno.EBUSY, "somebody else was faster")
    configure(loop, request)

def killed(self):
    number = ask(self)
    if seen("lost"):
        if not number.made:
            self._tools.control.add(number.number)
        (flags / "asked").write_text(str(number.number))
        wait("die")
        die()
    return number

bind._configure, attach.Attaching._ask_for_number = lose, killed
"""


def test_a_worker_that_is_killed_when_it_asked_for_another_number(
    start_daemon: Callable[..., Daemon], flags: Flags, image: int, directory: int
) -> None:
    """Both numbers go: neither the first's record nor the second's device is left."""
    daemon = start_daemon(environment=flags.faults(LOSE_AND_ASK))
    flags.put("lose")
    flags.put("die")
    assert daemon.attach(image, directory).code == "internal"
    both = [f"loop{flags.wait(name)}" for name in ("lost seen", "asked")]
    assert both[0] != both[1]
    eventually(lambda: not any(exists(name) for name in both), "both devices are gone")
    assert leases(daemon) == []
    assert daemon.attach(image, directory).code is None


def test_a_lost_number_that_is_given_to_another(
    start_daemon: Callable[..., Daemon], flags: Flags, image: int, directory: int, devices: Path
) -> None:
    """Its first worker is killed then, and there is one lease of it."""
    daemon = start_daemon(environment=flags.faults(LOSE_AND_ASK))
    first = daemon.attach(image, directory).fields["devname"]
    assert daemon.ask(wire.Detach(first, 0, wait=5), []).fields["state"] == "released"
    flags.put("lose")
    with asked(daemon, wire.Attach(0, 1, 2), [image, directory]) as replies:
        flags.wait("asked")
        other = daemon.attach(image, directory)
        names = [other.fields["devname"], *(daemon.attach(image, directory).fields["devname"] for _ in range(2))]
        flags.put("die")
    assert replies[0].code == "internal"
    lost = f"loop{flags.wait('lost seen')}"
    assert lost in names, "the lost number is another's"
    daemon.hello()
    assert sorted(lease["devname"] for lease in leases(daemon)) == sorted(names)
    assert all(backing_file(number_of(name)) for name in names)
    for name in names:
        assert daemon.ask(wire.Detach(name, 0, wait=5), []).fields == {"state": "released"}
    assert not list(devices.iterdir())


def test_an_intended_binding_whose_release_hangs(
    start_daemon: Callable[..., Daemon], flags: Flags, image: int, directory: int, tmp_path: Path
) -> None:
    """Its worker was killed before it booked that the device is bound: it is a lease all the same, until it is not."""
    environment = flags.faults("""
configure, displace = bind._configure, jobs.JOBS[messages.Displace]

def killed(loop, request):
    configure(loop, request)
    if seen("die"):
        die()

def slow(*job):
    while (flags / "hang").exists():
        time.sleep(0.01)
    return displace(*job)

bind._configure = killed
jobs.JOBS[messages.Displace] = slow
""")
    daemon = start_daemon(environment=environment, policy=HURRIED)
    flags.put("hang")
    flags.put("die")
    assert daemon.attach(image, directory).code == "internal"
    eventually(lambda: daemon.records("stuck"), "the release hangs")
    eventually(lambda: daemon.records("held"), "the device is still bound")
    [devname] = bound_to(tmp_path)
    assert [lease["devname"] for lease in leases(daemon)] == [devname]
    (flags.place / "hang").unlink()
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
        count = len(records._payloads(slot))
        records.note_released(slot.fileno())
        [whole] = records._payloads(slot)
        for dropped in range(count + 1):
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


def test_what_is_written_during_a_write_back(
    start_daemon: Callable[..., Daemon], flags: Flags, image: int, directory: int, devices: Path, tmp_path: Path
) -> None:
    """It is in the image: what somebody else has written and closed after the fsync began."""
    environment = flags.faults("""
sync = bind._sync

def slow(loop):
    lost = sync(loop)
    (flags / "synced").touch()
    wait("go on")
    return lost

bind._sync = slow
""")
    daemon = start_daemon(environment=environment)
    reply = daemon.attach(image, directory)
    late = os.urandom(1 << 16)
    fd = os.open(devices / reply.fields["devname"], os.O_RDWR)
    os.pwrite(fd, b"early", 0)
    reply.close()
    flags.wait("synced")
    os.pwrite(fd, late, 1 << 16)
    os.close(fd)
    flags.put("go on")
    eventually(lambda: daemon.records("expired"), "the lease is over")
    assert not bound_to(tmp_path)
    assert os.pread(image, 5, 0) == b"early"
    assert os.pread(image, len(late), 1 << 16) == late


def test_what_a_slow_write_back_loses_is_told(
    start_daemon: Callable[..., Daemon], flags: Flags, image: int, directory: int
) -> None:
    """It may take longer than a request."""
    environment = flags.faults(f"""
def fail(fd):
    time.sleep({2 * PATIENCE})
    raise OSError(errno.ENOSPC, "a full disk behind much that is dirty")

bind.os = types.SimpleNamespace(**vars(os) | {{"fsync": fail}})
""")
    daemon = start_daemon(environment=environment, policy=HURRIED)
    devname = daemon.attach(image, directory).fields["devname"]
    fields = daemon.ask(wire.Detach(devname, 0, wait=9), [], timeout=15).fields
    assert fields == {"state": "released", "lost": os.strerror(28)}
    assert [record["LOOPD_ERROR"] for record in daemon.records("lost")] == [os.strerror(28)]


def test_one_of_a_dead_daemon_whose_write_back_hangs(
    start_daemon: Callable[..., Daemon], flags: Flags, make_image: Callable[..., int], directory: int, tmp_path: Path
) -> None:
    """The others are released."""
    environment = flags.faults("""
sync = bind._sync

def slow(loop):
    if seen("hang"):
        hang()
    return sync(loop)

bind._sync = slow
""")
    daemon = start_daemon(environment=environment, policy=HURRIED)
    names = [daemon.attach(make_image(name=f"image{number}"), directory).fields["devname"] for number in range(4)]
    daemon.kill()
    assert sorted(bound_to(tmp_path)) == sorted(names)
    flags.put("hang")
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
    with Loop(number_of(name)) as loop:
        for number in (1, 2):
            loop.add_partition(number, number << 16, 1 << 16)
    eventually(lambda: all(node.exists() for node in nodes), "the nodes are there")
    kept.ask(wire.Rescan(name, 0), [])
    with _closed_to_all(never, grant), contextlib.ExitStack() as stack:
        fds = [os.open(node, os.O_PATH) for node in nodes]
        for fd in fds:
            stack.callback(os.close, fd)
        kept.kill()
        assert list(kept.leases()) == [name]
        with Loop(number_of(name)) as loop:
            loop.delete_partition(1)
        eventually(lambda: not os.fstat(fds[0]).st_mode & 0o777, "the node is closed")
        assert os.fstat(fds[1]).st_mode & 0o777
    reply.close()
    eventually(lambda: not bound_to(tmp_path), "the device is gone", 20)
    kept.end()
