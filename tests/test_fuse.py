"""Files of a FUSE file system that never answers: refused or written off, whatever they are sent as, while others are served."""

from __future__ import annotations

import array
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Daemon, bound_to, eventually, require
from fuse_never import Never
from untouched import Untouched, cgroup, elsewhere, helpers, honest, leases, pair, reply_of, send, state

from loopd import wire

WRITTEN_OFF = 2.0
"""Seconds after which the daemons here write a helper off."""
SERVED = 1.0
"""Seconds in which an honest client has its reply, whatever hangs."""


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
    config.write_text(f"request_timeout = {WRITTEN_OFF}\n")

    def start(*options: str, name: str = "loopd") -> Daemon:
        return start_daemon(f"--config={config}", *options, name=name)

    return start


def _queue(channel: socket.socket, fd: int) -> None:
    channel.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])




# What is sent behind reply_fd, by where the file that never answers is; and the code, None for an attach that is done.
PLACES: dict[str, tuple[bytes, Callable[[Never, int, int], list[int]], str | None]] = {
    "fd": (b'"fd": 1, "dir_fd": 2', lambda never, _, directory: [never.file(), directory], "not-permitted"),
    "a directory as fd": (b'"fd": 1, "dir_fd": 2', lambda never, _, directory: [never.directory, directory], "bad-fd"),
    "dir_fd": (b'"fd": 1, "dir_fd": 2', lambda never, image, _: [image, never.directory], "not-permitted"),
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


def _served(daemon: Daemon) -> None:
    """Honest clients are, all of them soon."""
    for _ in range(6):
        began = time.monotonic()
        assert daemon.hello().code is None
        honest(daemon)
        assert time.monotonic() - began < SERVED


@pytest.mark.parametrize("place", PLACES)
def test_others_are_served(
    quick: Callable[..., Daemon], never: Never, image: int, directory: int, devices: Path, tmp_path: Path, place: str
) -> None:
    daemon = quick()
    before = Untouched(daemon)
    fields, make, code = PLACES[place]
    fds = make(never, image, directory)
    never.mute()
    ours, theirs = pair()
    with theirs:
        send(daemon.path, b'{"reply_fd": 0, %s}' % fields, [theirs.fileno(), *fds]).close()
    reply = reply_of(ours, SERVED)
    assert reply.code == code
    _served(daemon)
    reply.close()
    eventually(lambda: not bound_to(tmp_path), "the device ends with its lease, whatever hangs", 2)
    eventually(lambda: not list(devices.iterdir()), "so does its node", 2)
    # A helper that hangs is written off; where none did, the file's close was the kernel's.
    time.sleep(WRITTEN_OFF)
    _served(daemon)
    never.end()
    before.check(tmp_path)
    honest(daemon)


@pytest.mark.parametrize("place", ["file", "directory"])
def test_as_reply_fd(quick: Callable[..., Daemon], never: Never, image: int, directory: int, place: str) -> None:
    """Nobody can be answered; it is in the journal."""
    daemon = quick()
    before = Untouched(daemon)
    given = never.directory if place == "directory" else never.file()
    never.mute()
    send(daemon.path, b'{"fd": 0, "dir_fd": 1, "reply_fd": 2}', [image, directory, given]).close()
    eventually(lambda: daemon.records("refused"), "the refusal is in the journal", SERVED)
    assert daemon.records("refused")[0]["LOOPD_CODE"] == "bad-fd"
    _served(daemon)
    never.end()
    before.check()


@pytest.mark.parametrize("where", ["lease_fd", "reply_fd"])
def test_in_the_queue_of_a_socket(
    quick: Callable[..., Daemon], never: Never, image: int, directory: int, devices: Path, tmp_path: Path, where: str
) -> None:
    """The lease socket has a message with such a file in its queue, which goes when the daemon closes the socket."""
    daemon = quick()
    before = Untouched(daemon)
    file = never.file()
    never.mute()
    ours, theirs = pair()
    lease, leased = pair()
    with lease, leased, theirs:
        _queue({"lease_fd": lease, "reply_fd": ours}[where], file)
        send(
            daemon.path, b'{"fd": 0, "dir_fd": 1, "reply_fd": 2, "lease_fd": 3}',
            [image, directory, theirs.fileno(), leased.fileno()],
        ).close()  # fmt: skip
    reply = reply_of(ours, SERVED)
    # A lease socket that is readable is over: the device may have gone before the reply was made.
    assert reply.code is None
    _served(daemon)
    reply.close()
    eventually(lambda: not bound_to(tmp_path), "the device ends with its lease", 2)
    eventually(lambda: not list(devices.iterdir()), "so does its node", 2)
    _served(daemon)
    never.end()
    before.check(tmp_path)


def _hang(daemon: Daemon, never: list[int]) -> None:
    """Requests whose helpers hang when they close what nobody asked for."""
    for file in never:
        ours, theirs = pair()
        with ours, theirs:
            send(daemon.path, b'{"op": "hello", "reply_fd": 0}', [theirs.fileno(), file]).close()
            assert reply_of(ours, SERVED).code is None


def test_written_off_and_charged(quick: Callable[..., Daemon], never: Never) -> None:
    """A hostile account hangs itself alone: after two its requests are dropped, and another account is served."""
    daemon = quick()
    before = Untouched(daemon)
    files = [never.file(), never.file()]
    with cgroup(f"loopd-test-{os.getpid()}") as enter:
        require(enter, "needs a cgroup hierarchy to make a second account in")
        assert enter is not None
        began = time.monotonic()
        elsewhere_hang = lambda: _hang(daemon, files)  # noqa: E731  # a client of the other account
        never.mute()
        elsewhere(elsewhere_hang, enter)
        _served(daemon)
        eventually(lambda: len(daemon.records("stuck")) == 2, "both helpers are written off", WRITTEN_OFF + 3)
        assert time.monotonic() - began > WRITTEN_OFF * 0.9
        assert {record["LOOPD_ACCOUNT"] for record in daemon.records("stuck")} == {f"/loopd-test-{os.getpid()}"}

        def asks() -> str:
            ours, theirs = pair()
            with theirs:
                send(daemon.path, b'{"op": "hello", "reply_fd": 0}', [theirs.fileno()]).close()
            return "hung up" if not reply_of(ours, 5).fields else "served"

        assert elsewhere(asks, enter) == "hung up"
        _served(daemon)
        eventually(lambda: daemon.records("shed"), "it is in the journal", 3)
        never.end()
        eventually(lambda: elsewhere(asks, enter) == "served", "the account is served again", 5)
    before.check()


def test_many_that_hang(quick: Callable[..., Daemon], never: Never) -> None:
    """All that one account may have under way hang at once, and others are served meanwhile."""
    daemon = quick()
    files = [never.file() for _ in range(20)]
    with cgroup(f"loopd-test-{os.getpid()}") as enter:
        require(enter, "needs a cgroup hierarchy to make a second account in")
        assert enter is not None
        honest(daemon)
        never.mute()
        elsewhere(lambda: _hang(daemon, files), enter)
        _served(daemon)
        eventually(lambda: len(daemon.records("stuck")) >= 20, "they are written off", WRITTEN_OFF + 5)
        _served(daemon)
        never.end()
    eventually(lambda: all(state(pid) != "D" for pid in daemon.family()), "nothing hangs")
    _served(daemon)


def test_kill_during_the_hang(
    quick: Callable[..., Daemon], never: Never, image: int, directory: int, devices: Path, tmp_path: Path
) -> None:
    """A helper is in a wait that no signal ends. The daemon is killed, and a new one serves within seconds.

    By hand there is no fd store: the devices end with the daemon, although the helper that had bound one still hangs.
    """
    daemon = quick()
    honest(daemon)
    files = [never.file(), never.file()]
    never.mute()
    for file in files:
        ours, theirs = pair()
        with theirs:
            fds = [theirs.fileno(), image, directory, file]
            send(daemon.path, b'{"fd": 1, "dir_fd": 2, "reply_fd": 0}', fds).close()
        daemon._replies.append(reply_of(ours, SERVED))
    workers = helpers(daemon)
    assert len(bound_to(tmp_path)) == 2
    began = time.monotonic()
    daemon.kill(signal.SIGKILL)
    hanging = [pid for pid in workers if state(pid) == "D"]
    assert len(hanging) == 2, [state(pid) for pid in workers]
    successor = quick(f"--state-directory={daemon.state}", name="successor")
    fields = successor.attach(image, directory).fields
    assert time.monotonic() - began < 5
    assert (devices / fields["devname"]).is_block_device()
    _served(successor)
    assert [pid for pid in hanging if state(pid) == "D"] == hanging
    assert bound_to(tmp_path) == [fields["devname"]]
    assert [lease["devname"] for lease in leases(successor)] == [fields["devname"]]
    assert successor.ask(wire.Detach(fields["devname"], 0), []).fields == {"state": "released"}
    never.end()
    eventually(lambda: not any(state(pid) for pid in hanging), "the helpers of the dead daemon are gone")
