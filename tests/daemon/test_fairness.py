"""Fairness: one that floods, never reads or hangs slows itself; honest clients see no error, and lose no record.

How long honest clients wait is printed, not asserted: that is the benchmark's.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.daemon import Daemon, ask, bound_to, eventually, require
from support.fuse_never import Never
from support.hanging import hanging, lingering, shed
from support.processes import Child
from support.untouched import LONG_QUEUE, cgroup, concurrently, flood, helpers, pair, reply_of, send, stopped

from loopd.kernel import transport
from loopd.protocol import wire

FLOOD = 10_000
ROUNDS = 60


@pytest.fixture
def other() -> Iterator[tuple[Callable[[], None], str]]:
    """A second account: how to enter it, and its name."""
    name = f"loopd-test-{os.getpid()}"
    with cgroup(name) as enter:
        require(enter, "needs a cgroup hierarchy to make a second account in")
        assert enter is not None
        yield enter, f"/{name}"


def honest(daemon: Daemon, rounds: int = ROUNDS) -> list[float]:
    """Attach, write, read back and detach, again and again; how long each attach took, in seconds."""
    took = []
    for round_ in range(rounds):
        image = os.memfd_create("honest", os.MFD_CLOEXEC)
        try:
            os.truncate(image, 1 << 16)
            began = time.monotonic()
            reply = ask(
                daemon.path, wire.encode_request(wire.Attach(0, reply_fd=1, deliver=("fd",))), [image], timeout=30
            )
            took.append(time.monotonic() - began)
            assert reply.code is None, reply.fields
            mark = b"%08d" % round_ * 512
            os.pwrite(reply.fds[0], mark, 4096)
            os.fsync(reply.fds[0])
            assert os.pread(image, len(mark), 4096) == mark
            reply.close()
        finally:
            os.close(image)
    return took


def told(what: str, quiet: list[float], busy: list[float]) -> None:
    """Print both distributions."""
    for name, took in (("quiet", quiet), (what, busy)):
        steps = statistics.quantiles(took, n=100, method="inclusive")
        figures = " ".join(f"p{p} {steps[p - 1] * 1000:.2f}" for p in (50, 90, 99))
        print(f"attach, {name}: {figures} max {max(took) * 1000:.2f} ms of {len(took)}")


def recorded(daemon: Daemon, count: int) -> None:
    """The records of `count` honest attaches are all there."""

    def mine() -> int:
        return sum(record["LOOPD_PID"] == str(os.getpid()) for record in daemon.records("attached"))

    eventually(lambda: mine() == count, "each honest attach is in the journal", 20)


@contextlib.contextmanager
def attacker(
    enter: Callable[[], None], act: Callable[[Callable[[Any], None]], None], keep: Iterable[int] = ()
) -> Iterator[Child]:
    """A client of the other account, at work; it is not needed to end."""

    def body(tell: Callable[[Any], None]) -> None:
        enter()
        tell("ready")
        act(tell)

    with Child(body, keep) as child:
        child.hear()
        yield child


def flooding(path: str) -> Callable[[Callable[[Any], None]], None]:
    """For `attacker`: a flood, whose end it tells."""

    def act(tell: Callable[[Any], None]) -> None:
        flood(path, FLOOD)
        tell(FLOOD)

    return act


@pytest.mark.parametrize("launcher", [(), LONG_QUEUE], ids=["short queue", "long queue"])
def test_a_flood(
    start_daemon: Callable[..., Daemon], other: tuple[Callable[[], None], str], launcher: tuple[str, ...]
) -> None:
    """10,000 datagrams by the same socket."""
    enter, account = other
    daemon = start_daemon(launcher=launcher)
    quiet = honest(daemon)
    with attacker(enter, flooding(daemon.path)) as child:
        busy = honest(daemon)
        assert child.hear() == FLOOD
    told("in a flood", quiet, busy)
    recorded(daemon, 2 * ROUNDS)
    assert all(record["LOOPD_ACCOUNT"] == account for record in daemon.records("refused"))
    eventually(lambda: daemon.records("shed"), "what is too much is dropped, and told")
    assert {record["LOOPD_ACCOUNT"] for record in daemon.records("shed")} == {account}


@pytest.mark.parametrize("option", ["SO_PASSPIDFD", "SO_TIMESTAMPNS"])
def test_a_flood_is_taken_out_up_to_the_next_one(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what the kernel attaches since Linux 6.5 and before; and no file of it is ever opened here."""
    if option == "SO_TIMESTAMPNS":
        monkeypatch.setattr(transport, "_NO_FDS", socket.CMSG_SPACE(12) + socket.CMSG_SPACE(16))
    else:
        require(transport.PIDFDS, "needs Linux 6.5")
    sender, listener = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with sender, listener, open(os.devnull) as file:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        listener.setsockopt(socket.SOL_SOCKET, getattr(transport, option), 1)
        for _ in range(3):
            socket.send_fds(sender, [b"flood"], [file.fileno()])
        with concurrently(lambda: sender.send(b"honest"), lambda: None) as sent:
            assert sent() == len(b"honest")
        sender.send(b"flood")
        before = os.listdir("/proc/self/fd")
        me = os.getpid()
        assert transport.drop(listener, me, 2) == 2
        assert transport.drop(listener, me, 16, lambda: False) == 0
        assert transport.drop(listener, me, 16) == 1
        assert transport.drop(listener, me, 16) == 0
        assert os.listdir("/proc/self/fd") == before
        assert listener.recv(100) == b"honest"
        assert transport.drop(listener, me, 16) == 1
        assert transport.drop(listener, me, 16) == 0


class Late(socket.socket):
    """A listener whose thread is not run for a while after its look, as on a busy machine: it is written off."""

    late = False

    def recvmsg(self, *arguments: Any) -> Any:
        found = super().recvmsg(*arguments)
        self.late = True
        return found


def test_a_thread_that_is_late_takes_nothing() -> None:
    """By then the head of the queue may be another's."""
    sender, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with sender, other, Late(fileno=other.detach()) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        sender.send(b"flood")
        assert transport.drop(listener, os.getpid(), 1, lambda: not listener.late) == 0
        assert listener.recv(100) == b"flood"


def test_who_waits_for_room_gets_it(daemon: Daemon, other: tuple[Callable[[], None], str]) -> None:
    """The queue is full all the time: another sender is not kept from it until the flood is over."""
    enter, _ = other
    with attacker(enter, flooding(daemon.path)) as child:
        answered = 0
        while not child.heard():
            assert daemon.hello().code is None
            answered += 1
        assert child.hear() == FLOOD
    assert answered > 20


def test_one_that_never_reads(daemon: Daemon, other: tuple[Callable[[], None], str]) -> None:
    """Its reply socket is full: replies are dropped, nobody waits for it."""
    enter, account = other
    quiet = honest(daemon)

    def deaf(tell: Callable[[Any], None]) -> None:
        ours, theirs = pair()
        with ours, theirs:
            while os.getppid() != 1:
                send(daemon.path, b'{"op": "hello", "reply_fd": 0}', [theirs.fileno()]).close()

    with attacker(enter, deaf):
        busy = honest(daemon)
        eventually(lambda: "LOOPD_CODE='undeliverable'" in daemon.log(), "its queue is full", 60)
    told("beside one that never reads", quiet, busy)
    recorded(daemon, 2 * ROUNDS)
    assert all(record["LOOPD_ACCOUNT"] == account for record in daemon.records("refused"))


def test_one_that_hangs_fuse_files(
    start_daemon: Callable[..., Daemon], tmp_path: Path, other: tuple[Callable[[], None], str]
) -> None:
    """Its helpers hang, are written off and charged; then its requests are dropped."""
    require(os.path.exists("/dev/fuse"), "needs /dev/fuse")
    enter, account = other
    (tmp_path / "loopd.toml").write_text("request_timeout = 5\n")
    daemon = start_daemon(f"--config={tmp_path / 'loopd.toml'}")
    quiet = honest(daemon)
    try:
        never = Never(tmp_path / "never")
    except OSError as error:
        pytest.skip(f"FUSE cannot be mounted: {error}")
    try:
        path = tmp_path / "never" / "file"

        def hang(tell: Callable[[Any], None]) -> None:
            files = [os.open(path, os.O_RDWR) for _ in range(6)]
            tell("open")
            for file in files:
                # Whoever closes it last hangs; the other way round it would be this one.
                ours, theirs = pair()
                with ours, theirs:
                    send(daemon.path, b'{"op": "hello", "reply_fd": 0}', [theirs.fileno(), file]).close()
                    with contextlib.suppress(TimeoutError):
                        reply_of(ours, 1)
            tell("sent")
            time.sleep(60)

        with attacker(enter, hang) as child:
            assert child.hear() == "open"
            never.mute()
            assert child.hear() == "sent"
            busy = honest(daemon)
            eventually(lambda: len(daemon.records("stuck")) >= 2, "they are written off", 20)
            busy += honest(daemon)
            assert {record["LOOPD_ACCOUNT"] for record in daemon.records("stuck")} == {account}
            never.end()
    finally:
        never.end()
    told("beside one whose files hang", quiet, busy)
    recorded(daemon, 3 * ROUNDS)


@pytest.mark.parametrize("before", [0, 250], ids=["few fds", "more fds than are allowed"])
def test_many_that_hang_after_their_answer(daemon: Daemon, other: tuple[Callable[[], None], str], before: int) -> None:
    """No privilege and no FUSE is needed: a TCP socket whose close lingers will do. Nobody waits behind them."""
    enter, _ = other
    honest(daemon, 1)

    def hang(tell: Callable[[Any], None]) -> None:
        with hanging(daemon, 8 if before else 72, before):
            tell("sent")
            time.sleep(60)

    with attacker(enter, hang) as child:
        assert child.hear() == "sent"
        ours, theirs = pair()
        with ours:
            with theirs:
                send(daemon.path, b'{"op": "hello", "reply_fd": 0}', [theirs.fileno()]).close()
            assert reply_of(ours, 5).code is None


def test_what_is_shed_is_counted(
    start_daemon: Callable[..., Daemon], tmp_path: Path, image: int, directory: int, devices: Path,
    other: tuple[Callable[[], None], str],
) -> None:  # fmt: skip
    """One record for each account and second says how many; the records of another are not among them."""
    enter, account = other
    (tmp_path / "loopd.toml").write_text(f'[[rule]]\naccount = "{account}"\nlimits.requests = 1\n')
    daemon = start_daemon(f"--config={tmp_path / 'loopd.toml'}")
    daemon.hello()
    flood = 2000

    def act(tell: Callable[[Any], None]) -> None:
        reply = ask(daemon.path, wire.encode_request(wire.Attach(0, reply_fd=1, deliver=("fd",))), [memory()])
        name = reply.fields["devname"]
        ours, theirs = pair()
        with ours, theirs:
            # The one request that it may have under way: it waits until the device is closed.
            send(daemon.path, wire.encode_request(wire.Detach(name, 0, wait=600)), [theirs.fileno()]).close()
            eventually(lambda: daemon.records("held"), "it waits")
            for _ in range(flood):
                send(daemon.path, b'{"op": "hello"}', []).close()
            tell("sent")
            eventually(lambda: shed(daemon) == flood, "all are counted, and none is in the queue", 20)
            for fd in reply.fds:
                os.close(fd)
            tell(reply_of(ours).fields)

    began = time.monotonic()
    with attacker(enter, act) as child:
        honest(daemon, 10)
        assert child.hear() == "sent"
        seconds = time.monotonic() - began
        assert child.hear() == {"state": "released"}

    records = daemon.records("shed")
    assert {record["LOOPD_ACCOUNT"] for record in records} == {account}
    assert len(records) <= seconds + 2
    recorded(daemon, 10)
    assert not bound_to(tmp_path)


def memory() -> int:
    """A backing file in memory."""
    fd = os.memfd_create("memory", os.MFD_CLOEXEC)
    os.truncate(fd, 1 << 16)
    return fd


def test_refusals_are_summed_up(daemon: Daemon, other: tuple[Callable[[], None], str]) -> None:
    """A journal of limited size holds the records of all: nobody may fill it in a minute."""
    enter, _ = other
    honest(daemon, 1)

    def flood(tell: Callable[[Any], None]) -> None:
        for _ in range(1000):
            ask(daemon.path, b"nonsense", []).close()
        tell("sent")

    began = time.monotonic()
    with attacker(enter, flood) as child:
        assert child.hear() == "sent"
    seconds = time.monotonic() - began
    assert len(daemon.records("refused")) < 50 * (seconds + 1)


def test_answers_that_nobody_can_get_are_summed_up(daemon: Daemon, other: tuple[Callable[[], None], str]) -> None:
    """Neither reply_fd nor an address: each is refused, and there is nobody to tell it to."""
    enter, _ = other
    honest(daemon, 1)

    def flood(tell: Callable[[Any], None]) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.connect(daemon.path)
            for _ in range(600):
                sender.send(b'{"op": "hello"}')
                time.sleep(0.002)
        tell("sent")

    began = time.monotonic()
    with attacker(enter, flood) as child:
        assert child.hear() == "sent"
    seconds = time.monotonic() - began
    assert 20 <= len(daemon.records("refused")) < 50 * (seconds + 1)


def test_waiting_leaves_nothing_behind(start_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    """A detach that was answered long before the time that it would have waited for."""
    config = tmp_path / "loopd.toml"
    config.write_text("")
    daemon = start_daemon(f"--config={config}")

    def resident() -> int:
        fields = dict(line.split(":", 1) for line in Path(f"/proc/{daemon.pid}/status").read_text().splitlines())
        return int(fields["VmRSS"].split()[0])

    def rounds(count: int) -> None:
        for _ in range(count):
            image = memory()
            reply = ask(daemon.path, wire.encode_request(wire.Attach(0, reply_fd=1, deliver=("fd",))), [image])
            os.close(image)
            detach = wire.encode_request(wire.Detach(reply.fields["devname"], 0, wait=3600))
            waiting = []
            for _ in range(25):
                ours, theirs = pair()
                with theirs:
                    send(daemon.path, detach, [theirs.fileno()]).close()
                waiting.append(ours)
            assert daemon.hello().code is None  # behind them in the queue
            reply.close()
            answers = [reply_of(ours) for ours in waiting]
            for ours in waiting:
                ours.close()
            assert [answer.fields for answer in answers] == [{"state": "released"}] * 25

    rounds(20)
    before = resident()
    rounds(80)
    assert resident() - before < 1500  # KiB; 2 for each of 2,000 when they stayed


def test_accounts_that_hang_helpers_stop_nobody(start_daemon: Callable[..., Daemon]) -> None:
    """Each as many as it may have requests under way: together more than there may be helpers."""
    daemon = start_daemon(launcher=LONG_QUEUE)
    assert daemon.hello().code is None
    with contextlib.ExitStack() as stack:
        waits, go = os.pipe()
        stack.callback(os.close, waits)
        stack.callback(os.close, go)
        children = []
        for which in ("one", "two", "three"):
            enter = stack.enter_context(cgroup(f"loopd-test-{which}-{os.getpid()}"))
            require(enter, "needs a cgroup hierarchy to make accounts in")
            assert enter is not None

            def act(tell: Callable[[Any], None]) -> None:
                slow = [lingering(60) for _ in range(32)]
                tell("ready")
                os.read(waits, 1)  # until the daemon is stopped, so that its close is the last one
                channels = []
                for socket_, _ in slow:
                    ours, theirs = pair()
                    channels.append(ours)
                    with theirs, socket_:
                        fds = [theirs.fileno(), socket_.fileno()]
                        send(daemon.path, b'{"op": "hello", "reply_fd": 0}', fds).close()
                tell("sent")
                signal.pause()

            children.append(stack.enter_context(attacker(enter, act, [waits])))
        for child in children:
            assert child.hear() == "ready"
        with stopped(daemon):
            os.write(go, b"x" * len(children))
            for child in children:
                assert child.hear() == "sent"
        for _ in range(3):
            with contextlib.closing(ask(daemon.path, wire.encode_request(wire.Hello(0)), [], timeout=10)) as reply:
                assert reply.fields["protocol"]
        assert len(helpers(daemon)) > 8


def test_datagrams_that_hang_whoever_drops_them(start_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    """Each has a socket whose close takes a minute, and is dropped, for its account has enough requests under way."""
    config = tmp_path / "loopd.toml"
    config.write_text("[limits]\nrequests = 1\n")
    daemon = start_daemon(f"--config={config}", launcher=LONG_QUEUE)
    with contextlib.ExitStack() as stack:
        waits, go = os.pipe()
        stack.callback(os.close, waits)
        stack.callback(os.close, go)
        enter = stack.enter_context(cgroup(f"loopd-test-{os.getpid()}"))
        require(enter, "needs a cgroup hierarchy to make a second account in")
        assert enter is not None

        def act(tell: Callable[[Any], None]) -> None:
            slow = [lingering(60) for _ in range(40)]
            reply = ask(daemon.path, wire.encode_request(wire.Attach(0, reply_fd=1, deliver=("fd",))), [memory()])
            channels = pair()
            detach = wire.encode_request(wire.Detach(reply.fields["devname"], 0, wait=600))
            send(daemon.path, detach, [channels[1].fileno()]).close()
            eventually(lambda: daemon.records("held"), "the detach waits")
            tell("ready")
            os.read(waits, 1)  # until the daemon is stopped, so that its close is the last one
            for socket_, _ in slow:
                with socket_:
                    send(daemon.path, b'{"op": "hello"}', [socket_.fileno()]).close()
            tell("sent")
            signal.pause()

        child = stack.enter_context(attacker(enter, act, [waits]))
        assert child.hear() == "ready"
        with stopped(daemon):
            os.write(go, b"x")
            assert child.hear() == "sent"
        with contextlib.closing(ask(daemon.path, wire.encode_request(wire.Hello(0)), [], timeout=10)) as reply:
            assert reply.fields["protocol"]
        # On a slow machine one may be counted as hanging that had not been reached.
        eventually(lambda: shed(daemon) >= 40, "all are in the journal")
        assert all("and what is in it hangs" in record["MESSAGE"] for record in daemon.records("shed"))
