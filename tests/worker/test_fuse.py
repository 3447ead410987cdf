"""Files of a FUSE file system that never answers, sent as anything: refused or written off, while others are served."""

from __future__ import annotations

import array
import contextlib
import ctypes
import fcntl
import mmap
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import pytest
from support.daemon import LOCKS, Daemon, ask, bound_to, eventually, require
from support.fuse_never import SIZE, Never
from support.processes import Child, injected, stays
from support.untouched import (
    Untouched,
    cgroup,
    children,
    concurrently,
    elsewhere,
    helpers,
    honest,
    leases,
    maker,
    pair,
    reply_of,
    send,
    state,
    stopped,
)

from loopd.daemon.accounts import Account
from loopd.kernel.cgroups import ROOTS
from loopd.loop import Loop
from loopd.protocol import wire

WRITTEN_OFF = 6.0
"""Seconds after which the daemons here write a helper off."""
HANGING = 6
"""Requests of one account that hang."""
SERVED = 5.0
"""Seconds in which an honest client has its reply, whatever hangs: before that is written off."""
LEASES = 24
ALL = b'{"fd": 0, "dir_fd": 1, "reply_fd": 2}'


@pytest.fixture
def never(start_daemon: Callable[..., Daemon], tmp_path: Path) -> Iterator[Never]:
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


@pytest.fixture
def quick(start_daemon: Callable[..., Daemon], tmp_path: Path) -> Callable[..., Daemon]:
    """Start daemons that write a helper off soon."""
    config = tmp_path / "loopd.toml"
    config.write_text(f"request_timeout = {WRITTEN_OFF}\nwrite_back_timeout = {WRITTEN_OFF}\n")

    def start(*options: str, name: str = "loopd") -> Daemon:
        return start_daemon(f"--config={config}", *options, name=name)

    return start


def _queue(channel: socket.socket, fd: int) -> None:
    channel.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])


# What is sent behind reply_fd, by where the file that never answers is; and the code, None for an attach that is done.
PLACES: dict[str, tuple[bytes, Callable[[Never, int, int], list[int]], str | None]] = {
    "fd": (b'"fd": 1, "dir_fd": 2', lambda never, _, directory: [never.file(), directory], "not-permitted"),
    "a directory as fd": (
        b'"fd": 1, "dir_fd": 2',
        lambda never, _, directory: [never.directory(), directory],
        "bad-fd",
    ),
    "dir_fd": (b'"fd": 1, "dir_fd": 2', lambda never, image, _: [image, never.directory()], "not-permitted"),
    "a file as dir_fd": (b'"fd": 1, "dir_fd": 2', lambda never, image, _: [image, never.file()], "bad-fd"),
    "lease_fd": (
        b'"fd": 1, "dir_fd": 2, "lease_fd": 3',
        lambda never, image, directory: [image, directory, never.file()],
        "bad-fd",
    ),
    "an unused fd": (b'"fd": 1, "dir_fd": 2', lambda never, image, directory: [image, directory, never.file()], None),
    "an fd of hello": (b'"op": "hello"', lambda never, *_: [never.file()], None),
    "an fd of nonsense": (b'"op": "nonsense"', lambda never, *_: [never.file()], "unsupported"),
}


DIRECTORIES = ("a directory as fd", "dir_fd")


def _served(daemon: Daemon) -> None:
    """Honest clients are, all of them soon."""
    for _ in range(6):
        began, stuck = time.monotonic(), len(daemon.records("stuck"))
        assert daemon.hello().code is None
        honest(daemon)
        # On a busy machine it may take its time, but it does not wait for something to be written off.
        assert time.monotonic() - began < SERVED or len(daemon.records("stuck")) == stuck


@pytest.mark.parametrize("place", PLACES)
def test_others_are_served(
    quick: Callable[..., Daemon], never: Never, image: int, directory: int, devices: Path, tmp_path: Path, place: str
) -> None:
    daemon = quick()
    before = Untouched(daemon)
    fields, make, code = PLACES[place]
    ours, theirs = pair()
    with stopped(daemon), theirs:
        send(daemon.path, b'{"reply_fd": 0, %s}' % fields, [theirs.fileno(), *make(never, image, directory)]).close()
        never.mute()
    reply = reply_of(ours, SERVED)
    assert reply.code == code
    _served(daemon)
    reply.close()
    eventually(lambda: not bound_to(tmp_path), "the device ends with its lease, whatever hangs", SERVED)
    eventually(lambda: not list(devices.iterdir()), "so does its node", SERVED)
    if place in DIRECTORIES:  # which nobody waits for to be closed
        time.sleep(WRITTEN_OFF)
    eventually(lambda: len(daemon.records("stuck")) == (place not in DIRECTORIES), "it is written off", WRITTEN_OFF + 3)
    _served(daemon)
    never.end()
    before.check(tmp_path)
    honest(daemon)


@pytest.mark.parametrize("place", ["file", "directory"])
def test_as_reply_fd(quick: Callable[..., Daemon], never: Never, image: int, directory: int, place: str) -> None:
    """Nobody can be answered; it is in the journal."""
    daemon = quick()
    before = Untouched(daemon)
    with stopped(daemon):
        given = never.directory() if place == "directory" else never.file()
        send(daemon.path, b'{"fd": 0, "dir_fd": 1, "reply_fd": 2}', [image, directory, given]).close()
        never.mute()
    eventually(lambda: daemon.records("refused"), "the refusal is in the journal", SERVED)
    assert daemon.records("refused")[0]["LOOPD_CODE"] == "bad-fd"
    _served(daemon)
    never.end()
    before.check()


@pytest.mark.parametrize("where", ["lease_fd", "reply_fd"])
def test_in_the_queue_of_a_socket(
    quick: Callable[..., Daemon], never: Never, image: int, directory: int, devices: Path, tmp_path: Path, where: str
) -> None:
    """A socket has a message with such a file in its queue, which goes when the socket is closed: it is not taken."""
    daemon = quick()
    before = Untouched(daemon)
    ours, theirs = pair()
    lease, leased = pair()
    with stopped(daemon), lease, leased, theirs:
        _queue({"lease_fd": lease, "reply_fd": ours}[where], never.file())
        send(
            daemon.path, b'{"fd": 0, "dir_fd": 1, "reply_fd": 2, "lease_fd": 3}',
            [image, directory, theirs.fileno(), leased.fileno()],
        ).close()  # fmt: skip
        never.mute()
    reply = reply_of(ours, SERVED)
    assert reply.code == ("bad-fd" if where == "lease_fd" else None)
    assert "devname" not in reply.fields
    _served(daemon)
    reply.close()
    assert not bound_to(tmp_path)
    assert not list(devices.iterdir())
    never.end()
    before.check(tmp_path)


def _ask(daemon: Daemon, *fds: int) -> socket.socket:
    ours, theirs = pair()
    with theirs:
        send(daemon.path, b'{"op": "hello", "reply_fd": 0}', [theirs.fileno(), *fds]).close()
    return ours


def test_written_off_and_charged(quick: Callable[..., Daemon], never: Never) -> None:
    """A hostile account hangs only itself: after two its requests are dropped, and other accounts are served."""
    daemon = quick()
    before = Untouched(daemon)
    account = f"loopd-test-{os.getpid()}"
    with cgroup(account) as enter, contextlib.ExitStack() as stack:
        require(enter, "needs a cgroup hierarchy to make a second account in")
        assert enter is not None
        sent = os.pipe()
        for fd in sent:
            stack.callback(os.close, fd)
        files = [never.file() for _ in range(HANGING)]

        def hostile() -> list[bool]:
            """Send what hangs, and wait for the answers, as a client does: one that has ended is not served."""
            asked = [_ask(daemon, file) for file in files]
            for file in files:
                os.close(file)
            os.write(sent[1], b"x")
            return [bool(reply_of(channel).fields) for channel in asked]

        with stopped(daemon):
            answers = stack.enter_context(concurrently(hostile, enter))
            os.read(sent[0], 1)
            never.mute()
        assert answers() == [True] * HANGING
        _served(daemon)
        eventually(lambda: len(daemon.records("stuck")) == HANGING, "the helpers are written off", WRITTEN_OFF + 3)
        assert {record["LOOPD_ACCOUNT"] for record in daemon.records("stuck")} == {f"/{account}"}

        def answered() -> bool:
            return bool(reply_of(_ask(daemon)).fields)

        assert not elsewhere(answered, enter)
        _served(daemon)
        eventually(lambda: daemon.records("shed"), "it is in the journal", 3)
        never.end()
        eventually(lambda: elsewhere(answered, enter), "the account is served again", 5)
    before.check()


def test_kill_during_the_hang(
    quick: Callable[..., Daemon], never: Never, image: int, directory: int, devices: Path, tmp_path: Path
) -> None:
    """A helper is in a wait that no signal ends. The daemon is killed, and a new one serves within seconds.

    By hand there is no fd store: the devices end with the daemon, although the helper that had bound one still hangs.
    """
    daemon = quick()
    honest(daemon)
    asked = []
    with stopped(daemon):
        for _ in range(2):
            ours, theirs = pair()
            with theirs:
                fds = [theirs.fileno(), image, directory, never.file()]
                send(daemon.path, b'{"fd": 1, "dir_fd": 2, "reply_fd": 0}', fds).close()
            asked.append(ours)
        never.mute()
    daemon._replies += [reply_of(ours) for ours in asked]
    never.hanging(2)
    workers = helpers(daemon)
    assert len(bound_to(tmp_path)) == 2
    daemon.kill(signal.SIGKILL)

    def stuck() -> list[int]:
        return [pid for pid in workers if state(pid) == "D"]

    # The signal that its parent's end sends wakes a helper first, if only to wait anew.
    eventually(lambda: len(stuck()) == 2, "both hang")
    hanging = stuck()
    successor = quick(f"--state-directory={daemon.state}", name="successor")
    fields = successor.attach(image, directory).fields
    assert (devices / fields["devname"]).is_block_device()
    _served(successor)
    assert [pid for pid in hanging if state(pid) == "D"] == hanging
    assert bound_to(tmp_path) == [fields["devname"]]
    assert [lease["devname"] for lease in leases(successor)] == [fields["devname"]]
    assert successor.ask(wire.Detach(fields["devname"], 0), []).fields == {"state": "released"}
    never.end()
    eventually(lambda: not any(state(pid) for pid in hanging), "the helpers of the dead daemon are gone")


# Locks that a client holds: while the kernel copies from memory, or to it, that a FUSE server has to bring ------------


@contextlib.contextmanager
def _locking(never: Never, hold: Callable[[mmap.mmap], object], keep: Iterable[int] = ()) -> Iterator[Child]:
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
            eventually(lambda: _waits_for_fuse(child.pid), "the lock is held")
            try:
                yield child
            finally:
                never.end()
    finally:
        for fd in go:
            os.close(fd)


def _writing(path: Path) -> Callable[[mmap.mmap], object]:
    """For `_locking`: the lock of that file."""
    return lambda memory: os.pwrite(os.open(path, os.O_RDWR), memory, 0)


def _waits_for_fuse(pid: int) -> bool:
    return "fuse" in _stack(pid)


def _stack(pid: int) -> str:
    return Path(f"/proc/{pid}/stack").read_text()


def test_directories_that_their_owner_keeps_locked(
    quick: Callable[..., Daemon], never: Never, image: int, directory: int, devices: Path, tmp_path: Path
) -> None:
    """The nodes of its leases cannot be removed: it has a few helpers wait, however many they are, and no more."""
    daemon = quick()
    before = Untouched(daemon)
    account = f"loopd-test-{os.getpid()}"
    with cgroup(account) as enter:
        require(enter, "needs a cgroup hierarchy to make a second account in")
        assert enter is not None
        path = daemon.path

        def attach(tell: Callable[[object], None]) -> None:
            enter()
            kept = [ask(path, ALL, [image, directory]) for _ in range(LEASES)]
            tell([reply.code for reply in kept])
            time.sleep(60)

        with Child(attach, keep=[image, directory]) as client:
            assert client.hear() == [None] * LEASES
            with _locking(never, _listing(devices)):
                client.kill()
                for _ in range(3):
                    _served(daemon)
                records = eventually(lambda: daemon.records("stuck"), "they are written off", WRITTEN_OFF + 3)
                assert {record["LOOPD_ACCOUNT"] for record in records} == {f"/{account}"}
                _served(daemon)
                hanging = [pid for pid in children(daemon.pid) if state(pid) == "D"]
                assert 0 < len(hanging) <= Account.MOST_HANGING
                assert len(bound_to(tmp_path)) == LEASES, "until the device is really gone it stays charged"
        eventually(lambda: not list(devices.iterdir()), "the nodes are gone", 20)
    before.check(tmp_path)


def _listing(directory: Path) -> Callable[[mmap.mmap], object]:
    """Have a directory locked by whoever may read it."""

    def hold(memory: mmap.mmap) -> None:
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        listed = os.open(directory, os.O_RDONLY)
        ctypes.CDLL(None).getdents64(listed, ctypes.c_void_p(address), ctypes.c_size_t(SIZE))

    return hold


@pytest.mark.parametrize("remove", [False, True], ids=["made again", "removed"])
def test_a_grant_that_its_user_keeps_locked(
    quick: Callable[..., Daemon], never: Never, tmp_path: Path, *, remove: bool
) -> None:
    """It is a helper that waits for it. Where it is removed, all others are locked with it, and helpers of those that
    have one wait as well; nobody waits behind them.
    """
    grants = tmp_path / "grants"
    grants.mkdir()
    daemon = quick(f"--grant-directory={grants}")
    before = Untouched(daemon)
    grant, other = (Path(daemon.ask(wire.Directory(name, 0), []).fields["path"]) for name in ("build", "other"))
    with cgroup(f"loopd-test-{os.getpid()}") as enter:
        require(enter, "needs a cgroup hierarchy to make a second account in")
        assert enter is not None
        with _locking(never, _listing(grant)):

            def change(tell: Callable[[object], None]) -> None:
                enter()
                tell(ask(daemon.path, wire.encode_request(wire.Directory("build", 0, remove=remove)), []).code)

            def look(tell: Callable[[object], None]) -> None:
                call = "rmdir" if remove else "setxattr"
                eventually(lambda: any(call in _stack(pid) for pid in children(daemon.pid)), "one waits for the lock")
                mine = os.open(other, os.O_RDONLY | os.O_DIRECTORY)
                tell("looks")
                tell(ask(daemon.path, wire.encode_request(wire.Leases(1, dir_fd=0)), [mine]).code)

            with Child(change) as client, Child(look) as second:
                assert second.hear() == "looks"
                for _ in range(4):
                    began = time.monotonic()
                    assert daemon.hello().code is None
                    assert time.monotonic() - began < WRITTEN_OFF / 3, "it waits behind the others"
                    time.sleep(0.2)
                stays(lambda: daemon.hello().code is None and state(daemon.pid) != "D", 2, "the daemon serves")
                assert client.hear() == "timeout"
                assert second.hear() == ("timeout" if remove else None)
                assert daemon.hello().code is None
    eventually(lambda: grant.exists() != remove, "what was asked for is done")
    before.check(tmp_path)


def test_nodes_in_a_grant_that_is_kept_locked(
    quick: Callable[..., Daemon], never: Never, image: int, tmp_path: Path
) -> None:
    """None of them can be removed, and none opens any more: a partition's number is soon another's. What is left are
    names.
    """
    grants = tmp_path / "grants"
    grants.mkdir()
    daemon = quick(f"--grant-directory={grants}")
    grant = Path(daemon.ask(wire.Directory("build", 0), []).fields["path"])
    directory = os.open(grant, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    before = Untouched(daemon)
    reply = daemon.attach(image, directory, partscan=True)
    os.close(directory)
    name = reply.fields["devname"]
    nodes = [grant / node for node in (name, f"{name}p1", f"{name}p2")]
    with Loop(int(name[4:])) as loop:
        for number in (1, 2):
            loop.add_partition(number, number << 16, 1 << 16)
    eventually(lambda: all(node.exists() for node in nodes), "the nodes are there")
    with _locking(never, _listing(grant)):
        reply.close()
        eventually(lambda: {node.stat().st_mode & 0o777 for node in nodes} == {0}, "they are closed", WRITTEN_OFF / 2)
        eventually(lambda: daemon.records("stuck"), "the helper is written off", WRITTEN_OFF + 3)
    eventually(lambda: not bound_to(tmp_path), "the device is gone")
    assert {node.stat().st_mode & 0o777 for node in grant.iterdir()} <= {0}
    for node in grant.iterdir():
        node.unlink()
    before.check(tmp_path)


@contextlib.contextmanager
def _closed_to_all(never: Never, directory: Path) -> Iterator[None]:
    """Nobody can look up a name in that directory: it is listed for ever, and who would make one there comes first."""

    def make(tell: Callable[[object], None]) -> None:
        tell("soon")
        with contextlib.suppress(OSError):  # neither file system lets files be made; it takes the lock to find out
            os.open(directory / "loopd-test", os.O_WRONLY | os.O_CREAT)

    with _locking(never, _listing(directory)), Child(make) as second:
        second.hear()
        eventually(lambda: state(second.pid) == "D", "the next one waits for the lock")
        try:
            yield
        finally:
            never.end()


def test_a_cgroup_that_is_kept_locked(
    quick: Callable[..., Daemon], never: Never, image: int, directory: int, tmp_path: Path
) -> None:
    """A container may read its own. It has its own attaches wait, and nobody else's."""
    daemon = quick()
    before = Untouched(daemon)
    account = f"loopd-test-{os.getpid()}"
    go = os.pipe()
    with cgroup(account) as enter:
        place = next((path for root in ROOTS if (path := Path(root, account)).exists()), None)
        require(enter and place, "needs a cgroup v2 hierarchy to make a second account in")
        assert enter is not None
        assert place is not None

        def attach(tell: Callable[[object], None]) -> None:
            enter()
            tell("inside")
            os.read(go[0], 1)
            tell(ask(daemon.path, ALL, [image, directory]).code)

        with Child(attach, keep=[image, directory, go[0]]) as client:
            client.hear()
            with _closed_to_all(never, place):
                os.write(go[1], b"x")
                stays(lambda: daemon.hello().code is None and state(daemon.pid) != "D", 1, "the daemon serves")
                _served(daemon)
                assert client.hear() == "timeout"
                assert {record["LOOPD_ACCOUNT"] for record in daemon.records("stuck")} == {f"/{account}"}
    for fd in go:
        os.close(fd)
    before.check(tmp_path)


def test_a_device_whose_directory_in_sysfs_is_kept_locked(
    start_daemon: Callable[..., Daemon], never: Never, image: int, directory: int, tmp_path: Path
) -> None:
    """By a user of the host: a daemon with a network namespace of its own looks into a sysfs of its own."""
    daemon = start_daemon(launcher=("unshare", "--net"))
    before = Untouched(daemon)
    reply = daemon.attach(image, directory)
    with _closed_to_all(never, Path("/sys/block", reply.fields["devname"])):
        reply.close()
        stays(lambda: daemon.hello().code is None and state(daemon.pid) != "D", 1, "the daemon serves")
        eventually(lambda: daemon.records("expired"), "the device is gone")
        _served(daemon)
        assert not daemon.records("stuck")
    before.check(tmp_path)


def test_the_node_of_a_partition_that_goes_while_a_job_hangs(
    quick: Callable[..., Daemon], image: int, tmp_path: Path
) -> None:
    """Its number is soon another's partition. So it is closed whatever the lease's jobs wait for."""
    grants = tmp_path / "grants"
    grants.mkdir()
    daemon = quick(f"--grant-directory={grants}")
    grant = Path(daemon.ask(wire.Directory("build", 0), []).fields["path"])
    directory = os.open(grant, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    reply = daemon.attach(image, directory, partscan=True)
    name = reply.fields["devname"]
    nodes = [grant / f"{name}p{number}" for number in (1, 2)]
    with Loop(int(name[4:])) as loop:
        for number in (1, 2):
            loop.add_partition(number, number << 16, 1 << 16)
        eventually(lambda: all(node.exists() for node in nodes), "the nodes are there")
        stays(lambda: all(node.exists() for node in nodes), 0.3, "and nothing more is done")
        with injected(helpers(daemon), "pread64:delay_enter=4000000"):
            os.close(os.open(grant / name, os.O_WRONLY))  # a helper looks at the partition table
            stays(lambda: all(node.exists() for node in nodes), 0.5, "it does not get to read it")
            loop.delete_partition(1)
            eventually(lambda: nodes[0].stat().st_mode & 0o777 == 0, "it is closed", 3)
            assert nodes[1].stat().st_mode & 0o777 != 0
            loop.add_partition(1, 1 << 16, 1 << 16)
        # It may have the number that it had, and then its node is the same.
        eventually(lambda: nodes[0].exists() and nodes[0].stat().st_mode & 0o777, "one that comes again can be opened")
        assert nodes[1].stat().st_mode & 0o777 != 0
        loop.delete_partition(1)
        eventually(lambda: not nodes[0].exists(), "and one that goes is removed")
    os.close(directory)
    reply.close()
    eventually(lambda: not bound_to(tmp_path), "the device is gone")


def test_a_mount_that_is_kept_locked_across_a_restart(
    quick: Callable[..., Daemon], never: Never, tmp_path: Path
) -> None:
    """What an earlier daemon left behind is removed by a helper, and nobody waits for that."""
    left = tmp_path / "grants/.:loop999/:loop999"
    left.mkdir(parents=True)
    left.parent.chmod(0o700)
    with _locking(never, _listing(left)):
        daemon = quick(f"--grant-directory={tmp_path}/grants")
        daemon.hello()  # starts it; soon after that it waits for the disk once, in D as well
        stays(lambda: daemon.hello().code is None, 2, "the daemon serves")
        assert left.exists()
        assert daemon.ask(wire.Directory("build", 0), []).code is None, "its parent is not locked"
        eventually(lambda: daemon.records("stuck"), "the helper is written off", WRITTEN_OFF + 3)
    eventually(lambda: not left.exists(), "it is gone")
    daemon.stop()
    daemon.start()
    daemon.hello()
    eventually(lambda: not left.parent.exists(), "and so is what it lay in")


def test_a_file_that_its_owner_keeps_locked(
    quick: Callable[..., Daemon], never: Never, image: int, directory: int, devices: Path, tmp_path: Path
) -> None:
    """What was written to the device cannot be written back, so its last close waits; the main process must not."""
    daemon = quick()
    before = Untouched(daemon)
    reply = daemon.attach(image, directory)
    device = os.open(devices / reply.fields["devname"], os.O_RDWR)

    # The device is clean when the helper looks at it, and not any more when it is closed.
    with injected(helpers(daemon), "fsync:delay_exit=4s"), _locking(never, _writing(tmp_path / "image")):
        reply.close()
        eventually(lambda: not list(devices.iterdir()), "the node is gone, so the helper is at the device")
        time.sleep(1)
        os.pwrite(device, b"late" * 1024, 4096)
        os.close(device)
        stays(lambda: daemon.hello().code is None and state(daemon.pid) != "D", WRITTEN_OFF, "the daemon serves")
        eventually(lambda: daemon.records("stuck"), "the helper is written off", WRITTEN_OFF + 3)
        assert daemon.hello().code is None
    eventually(lambda: not bound_to(tmp_path), "the device is gone")
    assert os.pread(image, 8, 4096) == b"latelate"
    before.check(tmp_path)


LOOP_CHANGE_FD = 0x4C06


def test_a_device_whose_lock_its_client_holds(
    quick: Callable[..., Daemon], never: Never, image: int, directory: int, devices: Path, tmp_path: Path
) -> None:
    """LOOP_CHANGE_FD waits for what is being read, and has the device's lock meanwhile. It makes another binding: the
    lease is over, and whoever looks after the number does not wait for the lock.
    """
    daemon = quick()
    reply = daemon.attach(image, directory, read_only=True)
    name = reply.fields["devname"]
    file, (waits, go) = never.file(), os.pipe()

    def body(tell: Callable[[object], None]) -> None:
        device = os.open(devices / name, os.O_RDONLY)
        fcntl.ioctl(device, LOOP_CHANGE_FD, file)
        tell("changed")
        os.read(waits, 1)
        threading.Thread(target=os.pread, args=(device, 4096, 0), daemon=True).start()
        time.sleep(0.3)
        fcntl.ioctl(device, LOOP_CHANGE_FD, image)

    with Child(body, keep=[image, file, waits]) as client:
        try:
            assert client.hear() == "changed"
            never.mute()
            os.write(go, b"x")
            eventually(lambda: state(client.pid) == "D", "it waits with the lock")
            (record,) = eventually(lambda: daemon.records("detached"), "the lease is over")
            assert record["LOOPD_REASON"] == "unbound"
            reply.close()
            stays(lambda: daemon.hello().code is None, 1, "the daemon serves")
            eventually(lambda: daemon.records("foreign"), "the binding is reported", WRITTEN_OFF + 10)
            threads = Path(f"/proc/{maker(daemon)}/task").iterdir()
            assert not any(") D " in (thread / "stat").read_text() for thread in threads)
            assert not daemon.records("stuck")
        finally:
            never.end()
    with Loop(int(name[4:])) as device:
        device.clear_fd()
    eventually(lambda: not bound_to(tmp_path), "the device is gone")


def test_a_reply_socket_that_its_client_keeps_locked(
    quick: Callable[..., Daemon], never: Never, image: int, directory: int, tmp_path: Path
) -> None:
    """A filter for it is read from memory that never comes. Before Linux 6.7 setting an option waits for that."""
    daemon = quick()
    daemon.hello()  # starts it
    ours, theirs = pair()

    def hold(memory: mmap.mmap) -> None:
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        theirs.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("@HP", 1, address))

    with ours, _locking(never, hold, keep=[theirs.fileno()]):
        with theirs:
            send(daemon.path, ALL, [image, directory, theirs.fileno()]).close()
        with contextlib.closing(reply_of(ours)) as reply:
            assert "devname" in reply.fields
            stays(lambda: daemon.hello().code is None and state(daemon.pid) != "D", 1, "the daemon serves")
    eventually(lambda: not bound_to(tmp_path), "the device is gone")


SO_ATTACH_FILTER = 26  # <asm-generic/socket.h>


def test_the_last_close_of_a_lock_is_a_helpers_too(
    start_daemon: Callable[..., Daemon], image: int, directory: int, tmp_path: Path
) -> None:
    """It is an open of the device as any other, and waits as that does: the main process never has it."""
    daemon = start_daemon(policy=LOCKS)
    reply = daemon.attach(image, directory, lock=True)
    name = reply.fields["devname"]

    def opens(pid: int) -> int:
        with contextlib.suppress(FileNotFoundError):  # one that it closes meanwhile
            return sum(os.readlink(fd).endswith(f"/{name}") for fd in list(Path(f"/proc/{pid}/fd").iterdir()))
        return 0

    assert opens(daemon.pid) == 0
    # A helper empties the slot, in which the lock is: it peeks at it, and then drops what is there.
    with injected(helpers(daemon), "fsync:delay_exit=3s"):
        reply.close()
        eventually(lambda: any(map(opens, helpers(daemon))), "a worker has the device")
        stays(lambda: opens(daemon.pid) == 0, 1, "the main process has it not")
    eventually(lambda: not bound_to(tmp_path), "the device is gone")


def _let_go(daemon: Daemon, image: int, directory: int, devices: Path) -> int:
    """A device that loopd has let go of, open here: its last close will be this fd's."""
    reply = daemon.attach(image, directory)
    device = os.open(devices / reply.fields["devname"], os.O_RDWR)
    reply.close()
    eventually(lambda: daemon.records("held"), "loopd has let go of the device")
    return device


def test_a_device_in_the_queue_of_a_reply_socket(
    quick: Callable[..., Daemon], never: Never, image: int, directory: int, devices: Path, tmp_path: Path
) -> None:
    """Whoever closes it last waits for a file that its owner keeps locked, and no signal ends that."""
    daemon = quick()
    before = Untouched(daemon)
    device = _let_go(daemon, image, directory, devices)
    ours, theirs = pair()

    with ours, _locking(never, _writing(tmp_path / "image")):
        os.pwrite(device, b"late" * 1024, 4096)
        _queue(ours, device)
        os.close(device)
        with stopped(daemon), theirs:  # else the last close might be here
            send(daemon.path, b'{"op": "hello", "reply_fd": 0}', [theirs.fileno()]).close()
        eventually(lambda: daemon.records("refused"), "the socket is not taken")
        assert "reply_fd: something was sent into it" in daemon.records("refused")[0]["MESSAGE"]
        stays(lambda: daemon.hello().code is None and state(daemon.pid) != "D", WRITTEN_OFF, "the daemon serves")
        eventually(lambda: daemon.records("stuck"), "the helper is written off", WRITTEN_OFF + 3)
    eventually(lambda: not bound_to(tmp_path), "the device is gone")
    before.check(tmp_path)


def _sent(daemon: Daemon, fd: int) -> None:
    send(daemon.path, b'{"op": "hello"}', [fd]).close()


def test_a_device_in_a_datagram_that_is_dropped(
    quick: Callable[..., Daemon], never: Never, image: int, directory: int, devices: Path, tmp_path: Path
) -> None:
    """As above; its sender has ended, so that nobody would get an answer."""
    daemon = quick()
    before = Untouched(daemon)
    device = _let_go(daemon, image, directory, devices)

    with _locking(never, _writing(tmp_path / "image")):
        os.pwrite(device, b"late" * 1024, 4096)
        with stopped(daemon):
            elsewhere(partial(_sent, daemon, device))
            os.close(device)
        stays(lambda: daemon.hello().code is None and state(daemon.pid) != "D", 2, "the daemon serves")
        record = eventually(lambda: daemon.records("shed"), "it is in the journal")[0]
        assert "their senders had ended or are unknown, and what is in it hangs" in record["MESSAGE"]
    eventually(lambda: not bound_to(tmp_path), "the device is gone")
    before.check(tmp_path)


def test_many_devices_in_datagrams_that_are_dropped(
    quick: Callable[..., Daemon], never: Never, image: int, directory: int, devices: Path, tmp_path: Path
) -> None:
    """The first is a process that hangs. The others are parked, until that has ended."""
    daemon = quick("--idle-timeout=1")
    before = Untouched(daemon)
    opened = [_let_go(daemon, image, directory, devices) for _ in range(5)]

    with _locking(never, _writing(tmp_path / "image")):
        for device in opened:
            os.pwrite(device, b"late" * 1024, 4096)
            with stopped(daemon):
                elsewhere(partial(_sent, daemon, device))
                os.close(device)
            assert daemon.hello().code is None
        stays(lambda: daemon.hello().code is None, 1, "the daemon serves")
        assert [state(pid) for pid in children(daemon.pid)].count("D") <= 1
    eventually(lambda: not bound_to(tmp_path), "the devices are gone", 20)
    before.check(tmp_path)
