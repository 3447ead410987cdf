"""Numbers: a node that a client kept, or a way to one, never leads to another's data; and the counter behind that."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Self

import pytest
from support.daemon import Daemon, ask, bound_to, eventually, exists, require
from support.kept import Kept, hold, next_block, start_at, start_kept_fixture  # noqa: F401
from support.processes import IN_NAMESPACE, NOBODY, Activated, Child, become
from support.untouched import cgroup, kept_open, maker

from loopd.daemon import counter as counters
from loopd.daemon.accounts import Account
from loopd.daemon.counter import BLOCK, BLOCKS, LAST, QUARANTINE, Counter, Exhausted
from loopd.daemon.numbers import Numbers
from loopd.daemon.policy import Policy
from loopd.loop import Loop, LoopControl, backing_file
from loopd.protocol import wire
from loopd.worker.access import Access
from loopd.worker.make import FIRST, PARKED

SIZE = counters._HEADER.size + BLOCKS * counters._ENTRY.size

# The counter, on a real file ----------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "numbers")


@pytest.fixture
def open_counter() -> Iterator[Callable[[str], Counter]]:
    opened: list[Counter] = []

    def open_(path: str) -> Counter:
        opened.append(Counter(path))
        return opened[-1]

    yield open_
    for counter in opened:
        counter.close()


def set_times(path: str, times: dict[int, int], others: int | None = None) -> None:
    """Say of blocks how many seconds ago they were last used."""
    now = int(time.time())
    with open(path, "r+b") as file:
        if others is not None:
            file.seek(counters._HEADER.size)
            file.write(counters._ENTRY.pack(now - others, 0) * BLOCKS)
        for block, age in times.items():
            file.seek(counters._HEADER.size + block * counters._ENTRY.size)
            file.write(counters._ENTRY.pack(now - age, 0))


def block_of(reserved: range) -> int:
    assert len(reserved) == BLOCK
    assert (reserved[0] - FIRST) % BLOCK == 0
    return (reserved[0] - FIRST) // BLOCK


def test_each_block_once(open_counter: Callable[[str], Counter], path: str) -> None:
    start_at(Path(path), BLOCKS - 3)
    blocks = [block_of(open_counter(path).reserve()) for _ in range(6)]
    assert blocks == [BLOCKS - 3, BLOCKS - 2, BLOCKS - 1, 0, 1, 2]
    assert FIRST + BLOCKS * BLOCK - 1 == LAST


def test_a_lost_counter_starts_from_the_clock(open_counter: Callable[[str], Counter], path: str) -> None:
    passed = int(time.time() / (QUARANTINE / BLOCKS)) % BLOCKS
    assert open_counter(path).started_from_clock
    assert block_of(open_counter(path).reserve()) in (passed, (passed + 1) % BLOCKS)
    assert not open_counter(path).started_from_clock
    assert Path(path).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("damage", [b"", b"x", b"loopd\0n9" + bytes(8), bytes(SIZE)])
def test_a_damaged_counter_is_a_lost_one(open_counter: Callable[[str], Counter], path: str, damage: bytes) -> None:
    Path(path).write_bytes(damage)
    counter = open_counter(path)
    assert counter.started_from_clock
    assert block_of(counter.reserve()) + 1 == next_block(Path(path))


def test_a_counter_that_was_cut_off_is_a_lost_one(open_counter: Callable[[str], Counter], path: str) -> None:
    start_at(Path(path), 7)
    os.truncate(path, os.path.getsize(path) - 1)
    assert open_counter(path).started_from_clock


def test_a_link_is_not_followed(path: str, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"precious")
    os.symlink("elsewhere", path)
    with pytest.raises(OSError, match=os.strerror(errno.ELOOP)):
        Counter(path)
    assert (tmp_path / "elsewhere").read_bytes() == b"precious"


def test_quarantine(open_counter: Callable[[str], Counter], path: str) -> None:
    start_at(Path(path), 100)
    counter = open_counter(path)
    set_times(path, {5: QUARANTINE + 60, 9: QUARANTINE + 60, 101: QUARANTINE - 60, 102: -86400}, others=1)
    assert [block_of(counter.reserve()) for _ in range(2)] == [5, 9]
    with pytest.raises(Exhausted):
        counter.reserve()


def test_the_end_of_use_begins_the_quarantine(open_counter: Callable[[str], Counter], path: str) -> None:
    start_at(Path(path), 3)
    counter = open_counter(path)
    number = counter.reserve()[17]
    set_times(path, {3: QUARANTINE + 60}, others=1)
    counter.touch(number)
    with pytest.raises(Exhausted):
        counter.reserve()
    for number in (0, FIRST - 1, LAST + 1):  # the host's: no block of ours
        counter.touch(number)


def _reserve(path: str, count: int) -> list[int]:
    counter = Counter(path)
    return [counter.reserve()[0] for _ in range(count)]


def test_instances_share_a_counter(path: str) -> None:
    """Four processes, each of which opens it by itself, the file not being there yet: no block twice."""
    # multiprocessing's own pool waits for ever for what a worker had that has ended.
    with ProcessPoolExecutor(4, multiprocessing.get_context("spawn")) as pool:
        reserved = list(pool.map(_reserve, [path] * 4, [60] * 4))
    flat = [first for blocks in reserved for first in blocks]
    assert len(set(flat)) == len(flat) == 240


def test_the_rest_of_a_block_stays_with_its_leases(
    start_kept: Callable[..., Kept], open_counter: Callable[[str], Counter], image: int, directory: int
) -> None:
    """Who has the block is who knows its devices: another instance would take them for nobody's."""
    daemon = start_kept()
    with hold(daemon, "socket", image, directory) as lease:
        daemon.kill(signal.SIGTERM)
        assert lease.bound()
        assert block_of(open_counter(str(daemon.counter)).reserve()) != (int(lease.name[4:]) - FIRST) // BLOCK
        daemon.hello()
        assert lease.bound()
    daemon.end()


def test_a_process_that_was_killed_leaves_no_lock(open_counter: Callable[[str], Counter], path: str) -> None:
    start_at(Path(path), 0)

    def hold_lock(tell: Callable[[Any], None]) -> None:
        with Counter(path)._locked():
            tell(None)
            signal.pause()

    with Child(hold_lock) as child:
        child.hear()
        child.kill()
        assert block_of(open_counter(path).reserve()) == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one counter and little more."""
    require(os.geteuid() == 0, "needs root: a mount")
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=288k", "tmpfs", place], check=True)
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def fill(place: Path) -> None:
    with contextlib.suppress(OSError), (place / "ballast").open("ab", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def test_a_full_disk_stops_no_attach(open_counter: Callable[[str], Counter], small_disk: Path) -> None:
    counter = open_counter(str(small_disk / "numbers"))
    fill(small_disk)
    blocks = {block_of(counter.reserve()) for _ in range(100)}
    assert len(blocks) == 100
    counter.touch(FIRST)


def test_a_disk_that_is_full_at_first(small_disk: Path, open_counter: Callable[[str], Counter], tmp_path: Path) -> None:
    """No number is given out that is not written down; said in words, and mended by room alone."""
    fill(small_disk)
    daemon = Activated(tmp_path, [], [], {})
    daemon.state = small_disk
    daemon.start()
    try:
        assert daemon.wait() == 1
    finally:
        daemon.stop()
    assert str(small_disk) in daemon.log()
    assert os.strerror(errno.ENOSPC) in daemon.log()
    (small_disk / "ballast").unlink()
    assert open_counter(str(small_disk / "numbers")).started_from_clock


# What a client kept ------------------------------------------------------------------------------------------------

HOSTS = b"the host's a key"
MARK = 16
"""Bytes at the start of every sector of an image that say whose it is."""


class Client:
    """A process of a user that keeps every way to its devices that it can, and reads through all of them.

    `cycle(n)` has it attach and detach n times. What it reads that is not its own is `leaks`.
    """

    def __init__(self, daemon: Daemon, uid: int, place: Path, enter: Callable[[], None] = lambda: None) -> None:
        """`enter` is called in the process before it becomes `uid`."""
        place.mkdir()
        (place / "dev").mkdir()
        (place / "kept").mkdir()
        image = place / "image"
        image.write_bytes(b"the client's own".ljust(512, b".") * 128)
        for path in (place, place / "dev", place / "kept", image):
            os.chown(path, uid, uid)
        os.chmod(daemon.path, 0o666)
        self._orders, orders = socket.socketpair()
        fds = [
            os.open(image, os.O_RDWR | os.O_CLOEXEC),
            os.open(place / "dev", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC),
            os.open(place / "kept", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC),
            os.open(daemon.path, os.O_PATH | os.O_CLOEXEC),
            orders.fileno(),
        ]

        def be_client(tell: Callable[[Any], None]) -> None:
            enter()
            _keep_all(tell, uid, *fds)

        self._child = Child(be_client, fds)
        for fd in fds[:-1]:
            os.close(fd)
        orders.close()

    def begin(self, cycles: int) -> None:
        """Have it begin; `had` waits for the end."""
        self._orders.send(cycles.to_bytes(2, "little"))

    def had(self) -> dict[str, Any]:
        """What it has met with since: numbers, codes of refusals, how many ways it has kept, what it read of others."""
        found: dict[str, Any] = self._child.hear()
        return found

    def cycle(self, cycles: int) -> dict[str, Any]:
        self.begin(cycles)
        return self.had()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.__exit__()
        self._orders.close()


def _keep_all(  # noqa: C901  # a process of its own, with what it keeps
    tell: Callable[[Any], None], uid: int, image: int, dev: int, kept: int, path: int, orders: int
) -> None:
    become(uid)
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
    daemon = f"/proc/self/fd/{path}"
    own = os.pread(image, MARK, 0)
    paths: list[int] = []  # O_PATH, of every node
    opened: list[int] = []  # of devices as they went
    numbers_: list[int] = []
    leaks: list[str] = []

    def look() -> None:
        """Read through everything that was kept."""
        for name in os.listdir(kept):
            with contextlib.suppress(OSError):
                reading(os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=kept), f"link {name}")
        for fd in paths:
            with contextlib.suppress(OSError):
                reading(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "O_PATH fd")
        for fd in opened:
            check(fd, "fd that was opened before")

    def reading(fd: int, what: str) -> None:
        try:
            check(fd, what)
        finally:
            os.close(fd)

    def check(fd: int, what: str) -> None:
        with contextlib.suppress(OSError):
            found = os.pread(fd, MARK, 0)
            # Zeros are nobody's: a device that is open cannot be removed, and is bound to them until it can be.
            if found not in (b"", own, bytes(MARK)):
                leaks.append(f"{what} {os.fstat(fd).st_rdev:#x}: {found!r}")

    def once() -> str | None:
        reply = ask(daemon, wire.encode_request(wire.Attach(0, 1, 2)), [image, dev], timeout=30)
        with contextlib.closing(reply):
            name = reply.fields.get("devname")
            if name is None:
                return reply.code or "hung up"
            numbers_.append(int(name[4:]))
            with contextlib.suppress(FileExistsError):  # a number that it had before
                os.link(name, name, src_dir_fd=dev, dst_dir_fd=kept)
            paths.append(os.open(name, os.O_PATH | os.O_CLOEXEC, dir_fd=dev))
            if len(numbers_) % 10 == 5:
                opened.append(os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=dev))
            ask(daemon, wire.encode_request(wire.Detach(name, 0)), [], timeout=30).close()
            with contextlib.suppress(OSError):  # it may come between release and removal
                opened.append(os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=kept))
        return None

    while order := os.read(orders, 2):
        codes: list[str] = []
        for turn in range(int.from_bytes(order, "little")):
            code = once()
            if code is not None:
                codes.append(code)
            if turn % 8 == 0:
                look()
        look()
        tell({"numbers": numbers_, "codes": codes, "kept": len(paths) + len(opened), "leaks": leaks})
        numbers_, leaks = [], []


class Victim:
    """Another: leases of the test's own process, which is root."""

    def __init__(self, daemon: Daemon, place: Path) -> None:
        place.mkdir()
        (place / "dev").mkdir()
        (place / "image").write_bytes(b"another's secret".ljust(512, b".") * 128)
        self._daemon = daemon
        self._image = os.open(place / "image", os.O_RDWR | os.O_CLOEXEC)
        self._directory = os.open(place / "dev", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._replies: list[Any] = []

    def attach(self, count: int) -> list[int]:
        """The numbers of so many devices, which stay until `release`."""
        replies = [self._daemon.attach(self._image, self._directory) for _ in range(count)]
        self._replies += replies
        return [int(reply.fields["devname"][4:]) for reply in replies if reply.fields]

    def release(self) -> None:
        for reply in self._replies:
            reply.close()
        self._replies = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
        os.close(self._image)
        os.close(self._directory)


def low_devices() -> set[str]:
    """The devices below the range."""
    return {name for name in os.listdir("/sys/block") if re.fullmatch(r"loop\d{1,3}", name)}


def remove_low(before: set[str]) -> None:
    """Remove the idle ones that were not there before: the kernel and loopd made them for the host to find."""
    with contextlib.closing(LoopControl()) as control:
        for name in low_devices() - before:
            with contextlib.suppress(OSError):  # in use by another
                control.remove(int(name[4:]))


@contextlib.contextmanager
def host_devices(image: Path, count: int) -> Iterator[list[int]]:
    """The host's own ``losetup -f --show``, so many times, one after the other."""
    losetup = shutil.which("losetup", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    require(losetup, "losetup (package mount) is missing")
    image.write_bytes(HOSTS.ljust(512, b".") * 128)
    before = low_devices()
    made: list[str] = []
    try:
        for _ in range(count):
            shown = subprocess.run([str(losetup), "-f", "--show", image], capture_output=True, text=True, check=False)
            if shown.returncode == 0:  # else another was faster
                made.append(shown.stdout.strip())
        yield [int(name.removeprefix("/dev/loop")) for name in made]
    finally:
        for name in made:
            subprocess.run([str(losetup), "-d", name], check=False)
        # One of loopd's, where a client can make it again, is open to that client until its end.
        eventually(lambda: all(int(name[4:]) >= FIRST for name in bound_to(image)), "the host's devices are free")
        remove_low(before)


@pytest.fixture
def remakes(tmp_path: Path) -> bool:
    """Whether this kernel makes a device that was removed again when a kept node is opened: without loop.max_loop.

    Then a client has idle devices at will, and the host's losetup -f may be given one; another client is not.
    """
    number = random.randrange(FIRST, LAST)
    node = tmp_path / "stale"
    with contextlib.closing(LoopControl()) as control:
        control.add(number)
        control.remove(number)
        os.mknod(node, stat.S_IFBLK | 0o600, os.makedev(7, number))
        try:
            os.close(os.open(node, os.O_RDONLY))
        except OSError:
            return False
        with contextlib.suppress(OSError):
            control.remove(number)
        return True


def test_the_administrator_is_told_of_such_a_kernel(start_kept: Callable[..., Kept], remakes: bool) -> None:
    daemon = start_kept()
    daemon.hello()

    def told() -> list[str]:
        return [record["MESSAGE"] for record in daemon.records("warned") if "max_loop" in record["MESSAGE"]]

    if remakes:
        assert len(eventually(told, "the warning is written")) == 1
    else:
        time.sleep(0.5)
        assert not told()


@pytest.mark.parametrize("uid", [NOBODY, 0], ids=["another user", "another account"])
def test_a_kept_node_never_reads_anothers_bytes(
    start_kept: Callable[..., Kept], tmp_path: Path, remakes: bool, uid: int
) -> None:
    daemon = start_kept()
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context(cgroup(f"loopd-test-{os.getpid()}")) if uid == 0 else lambda: None
        require(enter, "needs a cgroup hierarchy to make a second account in")
        assert enter is not None
        client = stack.enter_context(Client(daemon, uid, tmp_path / "client", enter))
        victim = stack.enter_context(Victim(daemon, tmp_path / "victim"))
        burnt: set[int] = set()
        others: set[int] = set()
        times = 0

        def meet(found: dict[str, Any]) -> None:
            nonlocal times
            assert [leak for leak in found["leaks"] if not (remakes and HOSTS.decode() in leak)] == []
            burnt.update(found["numbers"])
            times += len(found["numbers"])
            assert not burnt & others

        meet(client.cycle(10))
        # While it goes on, another attaches, and the host finds devices for itself.
        client.begin(60)
        with host_devices(tmp_path / "hosts-image", 40) as hosts:
            others.update(victim.attach(30), [] if remakes else hosts)
            meet(client.had())
            meet(client.cycle(3))  # with all of it bound
            assert times == 73
            assert len(burnt) < times, "it gets its own numbers again"
        # The daemon is killed, and what it knew by heart is gone.
        daemon.kill()
        others.update(victim.attach(BLOCK + 6))
        meet(client.cycle(10))
        victim.release()
        daemon.kill(signal.SIGTERM)
        others.update(victim.attach(BLOCK + 6))
        found = client.cycle(3)
        meet(found)
        assert found["kept"] > len(burnt), "it keeps a way to each of its numbers, and some are open"
    daemon.end(devices=not remakes)


@contextlib.contextmanager
def burst(secret: bytes) -> Iterator[list[int]]:
    """What ``losetup -f`` does, as fast as it goes: the first free device is bound, until no low one is left and on."""
    image = os.memfd_create("secret", os.MFD_CLOEXEC)
    os.pwrite(image, secret * 512, 0)
    before = low_devices()
    with contextlib.ExitStack() as stack:
        control = stack.enter_context(contextlib.closing(LoopControl()))
        bound: list[int] = []

        stack.callback(remove_low, before)
        idle = [name for name in before if not backing_file(int(name[4:]))]
        for _ in range(len(idle) + 20):
            number = control.get_unbound()
            with contextlib.suppress(OSError):  # lost to another, or removed meanwhile
                loop = Loop(number)
                stack.callback(loop.close)
                loop.configure(image, autoclear=True)
                bound.append(number)
        os.close(image)
        yield bound


def test_an_idle_device_that_a_client_holds_is_not_the_hosts(start_kept: Callable[..., Kept], tmp_path: Path) -> None:
    """It opens its kept node before the removal, and the host binds devices faster than loopd makes low ones."""
    daemon = start_kept()
    daemon.block = 1  # the lowest are found first
    start_at(daemon.counter, daemon.block)
    place = tmp_path / "client"
    place.mkdir()
    image = os.memfd_create("client's", os.MFD_CLOEXEC)
    os.truncate(image, 1 << 16)
    directory = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        name = daemon.attach(image, directory).fields["devname"]
        with kept_open(daemon, place / name) as caught:
            daemon.hello()
            eventually(lambda: (backing_file(int(name[4:])) or "").startswith(PARKED), "it is bound to nothing", 8)
            with burst(b"secret") as hosts:
                assert os.pread(caught.fileno(), 6, 0) != b"secret"
                assert int(name[4:]) not in hosts
        eventually(lambda: not exists(name), "it goes at its last close", 8)
    finally:
        os.close(image)
        os.close(directory)
    daemon.end()


def test_a_device_that_stays_open_costs_no_file(
    start_kept: Callable[..., Kept], image: int, directory: int, devices: Path
) -> None:
    """However often it is tried again to remove it, through nodes of loopd's own as the unit has it."""
    prepare = 'mount -t tmpfs -o dev tmpfs /run; mkdir /run/loopd-nodes; exec "$@"'
    daemon = start_kept(wrapper=[*IN_NAMESPACE, prepare, "sh"])
    name = daemon.attach(image, directory).fields["devname"]
    process = maker(daemon)
    found = []
    with kept_open(daemon, devices / name):
        eventually(lambda: (backing_file(int(name[4:])) or "").startswith(PARKED), "it is bound to nothing", 8)
        for _ in range(6):
            found.append(len(os.listdir(f"/proc/{process}/fd")))
            Path(f"/sys/block/{name}/uevent").write_text("change")  # after which it is tried again
            time.sleep(0.3)
    assert max(found) == found[0], found
    (devices / "kept").unlink()
    eventually(lambda: not exists(name), "it goes at its last close", 8)
    daemon.end()


def test_nor_does_it_stay_when_its_client_would_have_it_so(
    start_kept: Callable[..., Kept], image: int, directory: int, devices: Path, tmp_path: Path
) -> None:
    """LOOP_SET_STATUS64 takes the flag away that unbinds it at its last close; who opened it to write may."""
    config = tmp_path / "loopd.toml"
    config.write_text("limits.devices = 1\n")
    daemon = start_kept(f"--config={config}")
    name = daemon.attach(image, directory).fields["devname"]
    number = int(name[4:])

    def refused() -> str | None:
        reply = daemon.attach(image, directory)
        if reply.code is None:
            daemon.ask(wire.Detach(reply.fields["devname"], 0, wait=5), [])
        return reply.code

    with kept_open(daemon, devices / name) as caught, contextlib.closing(Loop.from_fd(os.dup(caught.fileno()))) as mine:
        eventually(lambda: (backing_file(number) or "").startswith(PARKED), "it is bound to nothing", 8)
        eventually(lambda: refused() == "quota", "it is charged", 8)
        mine.set_status(autoclear=False)
    eventually(lambda: not exists(name), "it goes all the same", 15)
    eventually(lambda: refused() is None, "what is gone is not charged")
    assert not daemon.records("foreign")
    (devices / "kept").unlink()
    daemon.end()


def test_numbers_are_removed_although_the_process_that_does_it_hangs(
    start_kept: Callable[..., Kept], image: int, directory: int
) -> None:
    """A client can keep the lock that LOOP_CTL_REMOVE waits for; here it does so for all threads."""
    daemon = start_kept()
    names = [daemon.attach(image, directory).fields["devname"] for _ in range(3)]
    os.kill(maker(daemon), signal.SIGSTOP)
    for name in names:
        assert daemon.ask(wire.Detach(name, 0, wait=5), []).fields == {"state": "released"}
    eventually(lambda: not any(exists(name) for name in names), "the numbers are gone", 20)
    assert [record for record in daemon.records("stuck") if "numbers" in record["MESSAGE"]]
    assert daemon.attach(image, directory).code is None
    daemon.end()


def test_nor_when_the_counter_was_lost(start_kept: Callable[..., Kept], tmp_path: Path) -> None:
    daemon = start_kept()
    daemon.counter.unlink()
    each = QUARANTINE / BLOCKS
    if each - time.time() % each < 20:  # the clock is to be at the same block before and after
        time.sleep(each - time.time() % each + 1)
    with Client(daemon, NOBODY, tmp_path / "client") as client, Victim(daemon, tmp_path / "victim") as victim:
        burnt = set(client.cycle(5)["numbers"])
        daemon.block = next_block(daemon.counter) - 1
        daemon.kill(signal.SIGTERM)
        daemon.counter.unlink()
        others = victim.attach(BLOCK)
        daemon.block = min(daemon.block, next_block(daemon.counter) - 1)
        assert len([r for r in daemon.records("warned") if "counter" in r["MESSAGE"]]) == 2
        assert not burnt & set(others)
        assert client.cycle(0)["leaks"] == []


def test_a_held_device_across_a_crash_stays_burnt(start_kept: Callable[..., Kept], tmp_path: Path) -> None:
    """A client keeps node and device; the daemon that knew of its directory is gone by the time it closes."""
    daemon = start_kept()
    place = tmp_path / "client"
    place.mkdir()
    image = os.memfd_create("client's", os.MFD_CLOEXEC)
    os.truncate(image, 1 << 16)
    os.chown(place, NOBODY, NOBODY)
    directory = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    os.chmod(daemon.path, 0o666)
    path = os.open(daemon.path, os.O_PATH | os.O_CLOEXEC)
    request = wire.encode_request(wire.Attach(0, 1, 2))

    def be_client(tell: Callable[[Any], None]) -> None:
        become(NOBODY)
        with contextlib.closing(ask(f"/proc/self/fd/{path}", request, [image, directory])) as reply:
            tell(reply.fields["devname"])
            signal.pause()

    try:
        with Child(be_client, [image, directory, path]) as child:
            name = child.hear()
            opened = (place / name).open("rb")
        with opened:
            eventually(lambda: daemon.records("held"), "the device is let go of")
            daemon.kill()
            assert daemon.leases()[name]["state"] == "held"
        eventually(lambda: not exists(name), "its number is gone")
        with Victim(daemon, tmp_path / "victim") as victim:
            others = victim.attach(BLOCK + BLOCK // 2)  # more than it has at hand
            assert int(name[4:]) not in others
    finally:
        for fd in (image, directory, path):
            os.close(fd)
    daemon.end()


def test_what_another_has_open_for_a_moment_goes_too(
    start_kept: Callable[..., Kept], image: int, directory: int
) -> None:
    """As udev has, when a daemon tidies up after one that was killed, and when one ends."""
    daemon = start_kept()

    def made() -> list[int]:
        used = range(FIRST + daemon.block * BLOCK, FIRST + next_block(daemon.counter) * BLOCK)
        return [number for number in used if exists(f"loop{number}")]

    def opened(number: int) -> int:
        with Access().stale_node(number) as path:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def detached() -> None:
        name = daemon.attach(image, directory).fields["devname"]
        assert daemon.ask(wire.Detach(name, 0, wait=5), []).fields == {"state": "released"}
        eventually(lambda: not exists(name) and len(made()) > Numbers.AHEAD // 2, "numbers are made ahead")

    detached()
    with daemon.outage():
        left = made()
        caught = opened(left[0])
    try:
        eventually(lambda: daemon.ready and set(made()) & set(left) == {left[0]}, "the others are removed")
    finally:
        os.close(caught)
    eventually(lambda: not exists(f"loop{left[0]}"), "it goes at its last close", 8)
    detached()
    caught = opened(made()[-1])
    timer = threading.Timer(0.3, os.close, [caught])
    timer.start()
    daemon.kill(signal.SIGTERM)
    timer.join()
    assert made() == []


# How many ----------------------------------------------------------------------------------------------------------


def test_an_account_that_burns_numbers(start_kept: Callable[..., Kept], tmp_path: Path) -> None:
    """It gets so many new ones, then its own again, and another owner of the account is told that there are no more."""
    config = tmp_path / "loopd.toml"
    config.write_text("[limits]\nnew_numbers = 20\nnew_numbers_per_minute = 0\n")
    daemon = start_kept(f"--config={config}")
    with Client(daemon, NOBODY, tmp_path / "client") as client:
        found = client.cycle(60)
        assert found["codes"] == found["leaks"] == []
        assert len(found["numbers"]) == 60
        assert len({*found["numbers"]}) <= 20, "mostly numbers that it had before"
        with Victim(daemon, tmp_path / "other") as other:
            replies = [daemon.ask(wire.Attach(0, 1, 2), [other._image, other._directory]) for _ in range(21)]
            refused = next(reply for reply in replies if reply.code is not None)
            assert refused.code == "quota"
            assert "detach" in refused.fields["error"]["message"]
    daemon.end()


def test_the_budget_of_an_account() -> None:
    limits = Policy().limits
    account = Account("/a")
    assert [account.numbers.spend(3, 0.0) for _ in range(5)] == [True, True, True, False, False]
    slow = Account("/b")
    assert slow.numbers.spend(1, 0.5)
    assert not slow.numbers.spend(1, 0.5)
    time.sleep(2.1)
    assert slow.numbers.spend(1, 0.5), "one in two seconds comes back"
    assert limits.new_numbers >= limits.devices, "who uses no number up can have all its devices"


def test_no_number_is_left(start_kept: Callable[..., Kept]) -> None:
    """With no number left that is new, the counter says so: no device, and not one that was another's."""
    daemon = start_kept()
    set_times(str(daemon.counter), {}, others=1)
    image = os.memfd_create("image", os.MFD_CLOEXEC)
    try:
        os.truncate(image, 1 << 16)
        codes = {daemon.ask(wire.Attach(0, reply_fd=1, deliver=("fd",)), [image]).code for _ in range(2)}
        assert codes <= {"no-device", "quota"}, codes
        assert daemon.records("warned"), "the administrator is told"
        assert daemon.hello().code is None
    finally:
        os.close(image)
