"""Leases end: when what keeps them ends, within a second, and at once when nothing could ever end them."""

from __future__ import annotations

import array
import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.daemon import ROOT, Daemon, Reply, ask, bound_to, eventually, exists, prompt, require
from support.processes import Child, become, injected, stays
from support.untouched import send

from loopd.kernel import transport
from loopd.protocol import wire

SOON = 10.0
"""Seconds within which that is noticed on a machine however busy; how prompt it is, `prompt` shows."""


def seqpacket() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def attach(path: str, image: int, directory: int, lease_fd: int | None = None) -> Reply:
    if lease_fd is None:
        return ask(path, wire.encode_request(wire.Attach(0, 1, 2)), [image, directory])
    return ask(path, wire.encode_request(wire.Attach(0, 1, 3, 2)), [image, directory, lease_fd])


def gone(devices: Path, tmp_path: Path, seconds: float = SOON) -> None:
    """Node and binding go within `seconds`."""
    deadline = time.monotonic() + seconds
    eventually(lambda: not bound_to(tmp_path), "the file is free", seconds)
    eventually(lambda: not list(devices.iterdir()), "the node is gone", max(0.0, deadline - time.monotonic()))


def expired(daemon: Daemon, name: str) -> dict[str, str]:
    record: dict[str, str] = eventually(
        lambda: next((r for r in daemon.records("expired") if r["LOOPD_DEVICE"] == name), None), "the record is written"
    )
    return record


# The client is killed ---------------------------------------------------------------------------------------------


def by_reply(path: str, image: int, directory: int) -> Any:
    return attach(path, image, directory)


def by_pidfd(path: str, image: int, directory: int) -> Any:
    reply = attach(path, image, directory, os.pidfd_open(os.getpid()))
    reply.channel.close()
    return reply


def by_socket(path: str, image: int, directory: int) -> Any:
    ours, theirs = seqpacket()
    reply = attach(path, image, directory, theirs.fileno())
    theirs.close()
    reply.channel.close()
    return reply, ours


def by_sender(path: str, image: int, directory: int) -> Any:
    """The seed's form: no reply_fd, answered at the address since this is the host's network."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        client.bind("")
        rights = array.array("i", [image, directory]).tobytes()
        client.sendmsg([b'{"fd": 0, "dir_fd": 1}'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)], 0, path)
        client.settimeout(10)
        return Reply(seqpacket()[0], client.recv(4096), [])


KEEPERS = {"reply": by_reply, "pidfd": by_pidfd, "socket": by_socket, "sender": by_sender}


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "open"])
@pytest.mark.parametrize("kind", KEEPERS)
def test_a_killed_clients_device_goes(
    daemon: Daemon, image: int, directory: int, devices: Path, tmp_path: Path, kind: str, busy: bool
) -> None:
    def body(tell: Callable[[Any], None]) -> None:
        held = KEEPERS[kind](daemon.path, image, directory)
        reply = held[0] if isinstance(held, tuple) else held
        device = os.open(reply.fields["devname"], os.O_RDWR, dir_fd=directory) if busy else None
        tell(reply.fields["devname"])
        signal.pause()
        del held, device

    with Child(body, keep=[image, directory]) as client:
        name = client.hear()
        stays(
            lambda: bound_to(tmp_path) == [name] and [p.name for p in devices.iterdir()] == [name],
            0.5,
            "the lease holds",
        )
        client.kill()
        gone(devices, tmp_path)
    assert expired(daemon, name)["LOOPD_LEASE"] == kind
    assert daemon.ask(wire.Leases(0), []).fields["leases"] == []


@pytest.mark.parametrize("kind", KEEPERS)
def test_it_goes_within_a_second(
    daemon: Daemon, image: int, directory: int, devices: Path, tmp_path: Path, kind: str
) -> None:
    def body(tell: Callable[[Any], None]) -> None:
        held = KEEPERS[kind](daemon.path, image, directory)
        tell("attached")
        signal.pause()
        del held

    def turn() -> float:
        with Child(body, keep=[image, directory]) as client:
            client.hear()
            began = time.monotonic()
            client.kill()
            gone(devices, tmp_path)
            return time.monotonic() - began

    prompt(turn)


def test_the_end_of_pid_1_ends_the_containers_lease(daemon: Daemon, image: int, devices: Path, tmp_path: Path) -> None:
    """`lifetime="container"`: the client that asked has ended long before."""
    script = f"""
import os, signal, sys, loopd
if os.fork() == 0:
    device = loopd.attach({str(tmp_path / "image")!r}, {str(devices)!r}, lifetime="container", socket={daemon.path!r})
    device.keep()
    sys.exit()
os.wait()
print("kept", flush=True)
signal.pause()
"""
    command = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", sys.executable, "-c", script]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as container:
        assert container.stdout is not None
        try:
            assert container.stdout.readline() == "kept\n"
            stays(lambda: bound_to(tmp_path) and list(devices.iterdir()), 0.5, "the lease holds")
        finally:
            container.kill()
        gone(devices, tmp_path)


def test_another_processes_pidfd_keeps_the_lease_when_the_client_is_dead(
    daemon: Daemon, image: int, directory: int, devices: Path, tmp_path: Path
) -> None:
    with Child(lambda tell: signal.pause()) as keeper:
        pidfd = os.pidfd_open(keeper.pid)

        def body(tell: Callable[[Any], None]) -> None:
            tell(attach(daemon.path, image, directory, pidfd).fields["devname"])

        with Child(body, keep=[image, directory, pidfd]) as client:
            name = client.hear()
            client.wait()
            stays(lambda: bound_to(tmp_path) == [name] and list(devices.iterdir()), 1.0, "the lease holds")
            keeper.kill()
            gone(devices, tmp_path)
        os.close(pidfd)


def test_a_copy_in_another_process_keeps_the_lease(
    daemon: Daemon, image: int, directory: int, devices: Path, tmp_path: Path
) -> None:
    """The reply socket is the lease, whoever has it open."""
    reply = daemon.attach(image, directory)
    with Child(lambda tell: signal.pause(), keep=[reply.channel.fileno()]) as heir:
        reply.close()
        stays(lambda: bound_to(tmp_path) and list(devices.iterdir()), 0.5, "the lease holds")
        heir.kill()
        gone(devices, tmp_path)


def test_a_detach_right_after_the_reply_finds_the_device_idle(
    daemon: Daemon, image: int, directory: int, tmp_path: Path
) -> None:
    """The helper's own copies, open for a moment more, are no reason to say that somebody has the device open."""
    daemon.hello().close()
    helpers = [pid for pid in daemon.family() if pid != daemon.pid]
    with injected(helpers, "sendmsg:delay_exit=300ms"):  # the helper tells that it is done, and lets go after that
        name = daemon.attach(image, directory).fields["devname"]
        assert daemon.ask(wire.Detach(name, 0), []).fields == {"state": "released"}
    assert not bound_to(tmp_path)
    assert not daemon.records("held")


# What a client does to a lease socket -----------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["reply", "socket"])
def test_nothing_can_be_sent_into_a_lease_socket(
    daemon: Daemon, image: int, directory: int, devices: Path, tmp_path: Path, given: str
) -> None:
    """What lay in its queue at the end would be released by loopd; and a file may never answer to that."""
    ours, theirs = seqpacket()
    with ours, theirs:
        if given == "reply":
            channel = daemon.attach(image, directory).channel
        else:
            daemon.ask(wire.Attach(0, 1, 3, 2), [image, directory, theirs.fileno()])
            channel = ours
        with pytest.raises(BrokenPipeError):
            channel.send(b"after")
        channel.shutdown(socket.SHUT_WR)
        stays(lambda: bound_to(tmp_path), 0.3, "the lease")
        assert list(devices.iterdir())
        theirs.close()
        channel.close()
        gone(devices, tmp_path)


@pytest.mark.parametrize("sent", [b"x", b""], ids=["a byte", "no byte"])
@pytest.mark.parametrize("name", ["reply_fd", "lease_fd"])
@pytest.mark.parametrize("state", ["open", "looked at elsewhere", "shut", "closed", "reset"])
def test_a_socket_with_something_in_its_queue_is_refused(
    daemon: Daemon, image: int, directory: int, tmp_path: Path, name: str, sent: bytes, state: str
) -> None:
    daemon.hello()  # before it has started, nobody attests who sends
    ours, theirs = seqpacket()
    with ours, theirs:
        if state == "reset":  # what was sent the other way is lost with the other end, which is told first
            theirs.send(b"y")
        _send_fd(ours, image, sent)
        if state != "open":
            theirs.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, 1000)
        if state == "shut":
            theirs.shutdown(socket.SHUT_RD)
        elif state in ("closed", "reset"):
            ours.close()
        if name == "lease_fd":
            reply = daemon.ask(wire.Attach(0, 1, 3, 2), [image, directory, theirs.fileno()])
            assert reply.code == "bad-fd"
        else:
            send(daemon.path, wire.encode_request(wire.Attach(0, 1, 2)), [image, directory, theirs.fileno()]).close()
        eventually(lambda: f"{name}: something was sent into it" in daemon.log(), "it is in the journal")
        assert not bound_to(tmp_path)


@pytest.mark.parametrize("name", ["reply_fd", "lease_fd"])
def test_nor_is_what_comes_in_at_the_last_moment(
    daemon: Daemon, image: int, directory: int, tmp_path: Path, name: str
) -> None:
    """Messages without bytes are like the end of all, but for what the client can take away: options of its socket."""
    daemon.hello().close()
    ours, theirs = seqpacket()

    def spoil() -> None:
        while True:
            theirs.setsockopt(socket.SOL_SOCKET, transport.SO_TIMESTAMPNS, 0)

    with ours, theirs, Child(lambda tell: spoil(), keep=[theirs.fileno()]):
        helpers = [pid for pid in daemon.family() if pid != daemon.pid]
        mine, answer = seqpacket()
        with mine, answer, injected(helpers, "shutdown:delay_enter=4s", "recvmsg:delay_enter=50ms"):
            # The reply socket is shut first.
            sockets, wait = ([theirs], 2) if name == "reply_fd" else ([answer, theirs], 6)
            order = range(2, 2 + len(sockets))
            fds = [image, directory, *(channel.fileno() for channel in sockets)]
            send(daemon.path, wire.encode_request(wire.Attach(0, 1, *order)), fds).close()
            time.sleep(wait)  # looked at, and not shut yet
            for _ in range(100):
                ours.send(b"")
            _send_fd(ours, image, b"")
            eventually(lambda: f"{name}: something was sent into it" in daemon.log(), "it is in the journal")
        assert not bound_to(tmp_path)


def test_bytes_that_were_sent_into_a_socket_are_not_overlooked(daemon: Daemon, image: int, directory: int) -> None:
    ours, theirs = seqpacket()
    with ours, theirs:
        ours.send(b"")
        ours.send(b"x")
        assert daemon.ask(wire.Attach(0, 1, 3, 2), [image, directory, theirs.fileno()]).code == "bad-fd"


def test_both_ends_of_one_pair_never_keep_each_other(
    daemon: Daemon, make_image: Callable[..., int], directory: int, devices: Path, tmp_path: Path
) -> None:
    """Each would wait for the other, which the daemon holds."""
    ours, theirs = seqpacket()
    for name, end in (("one", ours), ("other", theirs)):
        daemon.ask(wire.Attach(0, 1, 3, 2), [make_image(name=name), directory, end.fileno()])
        end.close()
    gone(devices, tmp_path)
    eventually(lambda: not daemon.ask(wire.Leases(0), []).fields["leases"], "the lease is over", SOON)


def test_both_ends_of_one_pair_in_one_request(
    daemon: Daemon, image: int, directory: int, devices: Path, tmp_path: Path
) -> None:
    """lease_fd is the other end of reply_fd: with the client gone, loopd alone would have both."""
    ours, theirs = seqpacket()
    with theirs:
        daemon.ask(wire.Attach(0, 1, 2, 3), [image, directory, theirs.fileno(), ours.fileno()], reply=False)
        ours.close()
    eventually(lambda: daemon.records("attached") or daemon.records("refused"), "it was served")
    gone(devices, tmp_path)
    eventually(lambda: not daemon.ask(wire.Leases(0), []).fields["leases"], "the lease is over", SOON)


def test_both_ends_of_one_pair_as_reply_sockets(
    daemon: Daemon, make_image: Callable[..., int], directory: int, devices: Path, tmp_path: Path
) -> None:
    ours, theirs = seqpacket()
    for name, end in (("one", ours), ("other", theirs)):
        daemon.ask(wire.Attach(0, 1, 2), [make_image(name=name), directory, end.fileno()], reply=False)
    ours.close()
    theirs.close()
    eventually(lambda: len(daemon.records("attached")) + len(daemon.records("refused")) >= 2, "both were served")
    gone(devices, tmp_path)


SO_PEEK_OFF = 42


def _send_fd(channel: socket.socket, fd: int, payload: bytes = b"x") -> None:
    channel.sendmsg([payload], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]).tobytes())])


def test_an_end_queued_in_the_other_does_not_keep_the_lease(
    daemon: Daemon, image: int, directory: int, devices: Path, tmp_path: Path
) -> None:
    ours, theirs = seqpacket()
    with theirs:
        _send_fd(ours, ours.fileno())
        ours.close()
        daemon.ask(wire.Attach(0, 1, 3, 2), [image, directory, theirs.fileno()])
        gone(devices, tmp_path)


def test_an_end_queued_in_itself_does_not_keep_the_lease(
    start_daemon: Callable[..., Daemon], image: int, directory: int, devices: Path, tmp_path: Path
) -> None:
    """Nobody can reach that end any more; the kernel collects it as garbage, and loopd hears a hang-up.

    The kernel looks for garbage when some socket is closed, at the latest one of loopd's: with each sign of life for
    the watchdog, and each look whether it is idle.
    """
    daemon = start_daemon("--idle-timeout=3")
    ours, theirs = seqpacket()
    with theirs:
        _send_fd(theirs, ours.fileno())
        daemon.ask(wire.Attach(0, 1, 3, 2), [image, directory, theirs.fileno()])
        assert bound_to(tmp_path)
    ours.close()
    gone(devices, tmp_path, 20)


def test_an_end_queued_in_another_socket_does_not_keep_the_first(
    daemon: Daemon, make_image: Callable[..., int], directory: int, devices: Path, tmp_path: Path
) -> None:
    ours, theirs = seqpacket()
    sink, given = seqpacket()
    daemon.ask(wire.Attach(0, 1, 3, 2), [make_image(name="one"), directory, theirs.fileno()])
    _send_fd(sink, ours.fileno())
    other = daemon.ask(wire.Attach(0, 1, 3, 2), [make_image(name="other"), directory, given.fileno()])
    assert other.code == "bad-fd"
    for end in (ours, theirs, given):
        end.close()
    try:
        gone(devices, tmp_path)
    finally:
        sink.close()


# What is no lease -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def datagram() -> Iterator[int]:
    """Gives no hang-up when the other end is closed."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        yield theirs.fileno()


@contextlib.contextmanager
def listening() -> Iterator[int]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind("")
        listener.listen()
        yield listener.fileno()


@contextlib.contextmanager
def unconnected() -> Iterator[int]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as single:
        yield single.fileno()


@contextlib.contextmanager
def internet() -> Iterator[int]:
    """A peer on another machine may never say that it is gone."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        yield client.fileno()


def opened(path: str, flags: int = os.O_RDONLY) -> Callable[[], contextlib.AbstractContextManager[int]]:
    @contextlib.contextmanager
    def made() -> Iterator[int]:
        fd = os.open(path, flags)
        try:
            yield fd
        finally:
            os.close(fd)

    return made


@contextlib.contextmanager
def pipe() -> Iterator[int]:
    read, write = os.pipe()
    try:
        yield read
    finally:
        os.close(read)
        os.close(write)


@contextlib.contextmanager
def lookalike() -> Iterator[int]:
    """A file whose path begins like a pidfd's link."""
    path = Path("/tmp") / f"loopd-test-{os.getpid()}"
    base = Path(path, "anon_inode:[pidfd]")
    base.parent.mkdir()
    base.touch()
    fd = os.open(base, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)
        shutil.rmtree(path)


@contextlib.contextmanager
def eventfd() -> Iterator[int]:
    fd = os.eventfd(0)
    try:
        yield fd
    finally:
        os.close(fd)


NO_LEASES = {
    "datagram socket": datagram,
    "listening socket": listening,
    "unconnected socket": unconnected,
    "internet socket": internet,
    "regular file": opened("/etc/passwd"),
    "path": opened("/etc/passwd", os.O_PATH),
    "/proc/PID": opened("/proc/self", os.O_RDONLY | os.O_DIRECTORY),
    "/dev/null": opened("/dev/null"),
    "pipe": pipe,
    "eventfd": eventfd,
    "file named like a pidfd": lookalike,
}


@pytest.mark.parametrize("kind", NO_LEASES)
def test_what_is_no_lease(daemon: Daemon, image: int, directory: int, devices: Path, tmp_path: Path, kind: str) -> None:
    daemon.hello().close()
    before = len(daemon.fds())
    with NO_LEASES[kind]() as fd:
        for _ in range(12):
            reply = daemon.ask(wire.Attach(0, 1, 3, 2), [image, directory, fd])
            assert reply.code == "bad-fd", reply.fields
            assert "lease_fd" in reply.fields["error"]["message"]
    assert not bound_to(tmp_path)
    assert list(devices.iterdir()) == []
    # A few helpers more may have been forked meanwhile, with a socket for each.
    eventually(lambda: len(daemon.fds()) < before + 12, "its fds are closed")
    assert daemon.attach(image, directory).code is None


@pytest.mark.parametrize("reaped", [False, True], ids=["zombie", "reaped"])
def test_the_pidfd_of_a_process_that_has_ended(
    daemon: Daemon, image: int, directory: int, devices: Path, tmp_path: Path, reaped: bool
) -> None:
    """The lease is over before it began: no device stays, whatever the answer."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    pidfd = os.pidfd_open(child.pid)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    if reaped:
        child.wait()
    reply = daemon.ask(wire.Attach(0, 1, 3, 2), [image, directory, pidfd])
    os.close(pidfd)
    child.wait()
    assert reply.code in (None, "bad-fd")
    gone(devices, tmp_path)
    eventually(lambda: not daemon.ask(wire.Leases(0), []).fields["leases"], "the lease is over", SOON)
    if reply.code is None:
        expired(daemon, reply.fields["devname"])


def test_the_pidfd_of_a_thread(daemon: Daemon, image: int, directory: int, devices: Path, tmp_path: Path) -> None:
    """`PIDFD_THREAD` (Linux 6.9): the lease is over when the thread ends, though its process goes on."""
    ours, theirs = seqpacket()

    def body(tell: Callable[[Any], None]) -> None:
        go = threading.Event()
        thread = threading.Thread(target=go.wait)
        thread.start()
        pidfd = ctypes.CDLL(None).syscall(434, thread.native_id, os.O_EXCL)  # pidfd_open on all but Alpha
        tell(pidfd >= 0)
        reply = attach(daemon.path, image, directory, pidfd)
        tell(reply.fields["devname"])
        theirs.recv(1)
        go.set()
        signal.pause()

    with ours, theirs, Child(body, keep=[image, directory, theirs.fileno()]) as client:
        require(client.hear(), "the kernel has no pidfd of a thread (Linux 6.9)")
        name = client.hear()
        stays(lambda: bound_to(tmp_path) == [name], 0.5, "the lease holds")
        ours.send(b"x")
        gone(devices, tmp_path)


def test_what_is_kept_of_a_delivered_fd_never_leads_to_another_users_file(
    daemon: Daemon, make_image: Callable[..., int], tmp_path: Path
) -> None:
    """An O_PATH fd of it keeps no device open, and opens whatever has the number later, for one who may read any file.

    Such a one may ask as another user, so the uid that asked does not say who has it in reach.
    """
    os.chmod(daemon.path, 0o666)
    first, second = make_image(name="first"), make_image(name="second")
    os.pwrite(second, b"secret", 0)
    attach_fd = wire.encode_request(wire.Attach(0, reply_fd=1, deliver=("fd",)))
    ours, theirs = socket.socketpair()

    def keeper(tell: Callable[[Any], None]) -> None:
        os.chdir(daemon.directory)
        become(20000)
        reply = ask("loopd.sock", attach_fd, [first])
        _send_fd(theirs, os.open(f"/proc/self/fd/{reply.fds[0]}", os.O_PATH))
        tell(reply.fields["devname"])

    def other(tell: Callable[[Any], None]) -> None:
        os.chdir(daemon.directory)
        become(30000)
        for _ in range(128):  # two blocks of numbers
            reply = ask("loopd.sock", attach_fd, [second])
            if reply.fields.get("devname") == name:
                tell("has it")
                signal.pause()
            reply.close()
        tell("never had it")

    with ours, theirs:
        with Child(keeper, keep=[first, theirs.fileno()]) as client:
            name = client.hear()
            client.wait()
        _, (kept,), _, _ = socket.recv_fds(ours, 1, 1)
    try:
        eventually(lambda: not exists(name), "the number is gone")
        with Child(other, keep=[second]) as client:
            if client.hear() == "has it":
                with pytest.raises(OSError, match="Errno"):
                    os.close(os.open(f"/proc/self/fd/{kept}", os.O_RDONLY))
    finally:
        os.close(kept)
