"""Who has sent a datagram: its credentials are a claim, and the reply socket in it is the proof."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.daemon import Daemon, bound_to, eventually, require
from support.processes import CLONE_NEWPID, CLONE_NEWUSER, Child, become, unshare
from support.untouched import needed_cgroup, pair, reply_of, send

from loopd.protocol import wire

ALICE = 20001
ATTACH = wire.encode_request(wire.Attach(0, reply_fd=1, deliver=("fd",)))



def ask_as(path: str, payload: bytes, image: int, pid: int | None = None) -> dict[str, Any]:
    """What is answered to a request, sent with the credentials of another process if `pid` is one."""
    ours, theirs = pair()
    claim = None if pid is None else (pid, os.getuid(), os.getgid())
    with theirs:
        send(path, payload, [image, theirs.fileno()], credentials=claim).close()
    reply = reply_of(ours)
    reply.close()
    return reply.fields


def outcome(fields: dict[str, Any]) -> str:
    return fields["error"]["message"] if "error" in fields else "done"


# A container, and a shell of the administrator's in it ------------------------------------------------------------


@pytest.fixture
def tenant() -> Iterator[Callable[[], None]]:
    with needed_cgroup(f"loopd-test-tenant-{os.getpid()}") as enter:
        yield enter


@pytest.fixture
def session() -> Iterator[Callable[[], None]]:
    with needed_cgroup(f"loopd-test-session-{os.getpid()}") as enter:
        yield enter


def container(
    daemon: Daemon, enter: Callable[[], None], image: int, claims: socket.socket
) -> Callable[[Callable[[Any], None]], None]:
    """Root of a user and pid namespace, in a cgroup of its own. It tells its pid; of each that it reads it tells what
    comes of a request in its name.
    """

    def body(tell: Callable[[Any], None]) -> None:
        os.chdir(daemon.directory)
        enter()
        become(ALICE)
        unshare(CLONE_NEWUSER | CLONE_NEWPID)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {ALICE} 1")
        Path("/proc/self/gid_map").write_text(f"0 {ALICE} 1")
        first = os.fork()  # PID 1 of the namespace
        if first:
            tell(first)
            os.waitpid(first, 0)
            return
        while claim := claims.recv(16):
            tell(outcome(ask_as("loopd.sock", ATTACH, image, int(claim) or None)))

    return body


def test_root_of_a_container_claims_the_pid_of_an_administrators_shell(
    start_daemon: Callable[..., Daemon], tmp_path: Path, image: int,
    tenant: Callable[[], None], session: Callable[[], None],
) -> None:  # fmt: skip
    """It would be charged to the administrator's session, with what that may have, and the audit would name it."""
    require(shutil.which("nsenter"), "needs nsenter (package util-linux)")
    config = tmp_path / "loopd.toml"
    config.write_text('[[rule]]\naccount = "*loopd-test-tenant-*"\nallow.write = false\n')
    daemon = start_daemon(f"--config={config}")
    Path(daemon.path).chmod(0o666)
    daemon.hello()

    def shell(tell: Callable[[Any], None]) -> None:
        session()
        command = ["nsenter", f"--target={pid}", "--pid", "sleep", "60"]
        with subprocess.Popen(command) as entered:
            children = Path(f"/proc/{entered.pid}/task/{entered.pid}/children")
            inner = eventually(lambda: children.read_text().split(), "it has entered")[0]
            tell(re.findall(r"(?m)^NSpid:.*\t(\d+)$", Path(f"/proc/{inner}/status").read_text())[0])
            try:
                signal.pause()
            finally:
                entered.kill()

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, Child(container(daemon, tenant, image, theirs), [image, theirs.fileno()]) as inside:
        pid = inside.hear()
        try:
            with Child(shell) as administrator:
                claim = administrator.hear()
                assert int(claim) > 1
                ours.send(b"0")
                assert "read-only devices alone" in inside.hear(), "it has sent as itself"
                ours.send(claim.encode())
                assert "reply_fd was made by another process" in inside.hear()
        finally:
            os.kill(pid, signal.SIGKILL)  # and with it what has entered its namespace
    assert not daemon.records("attached")
    assert not bound_to(tmp_path)
    codes = [record["LOOPD_CODE"] for record in daemon.records("refused")]
    assert codes == ["not-permitted", "not-permitted"]


# What is no claim, but looks like one -----------------------------------------------------------------------------


def test_a_fork_between(daemon: Daemon, image: int) -> None:
    """The client is told what is wrong with it."""
    daemon.hello()
    ours, theirs = pair()
    fds = [image, theirs.fileno()]

    def body(tell: Callable[[Any], None]) -> None:
        send(daemon.path, ATTACH, fds).close()
        tell("sent")
        time.sleep(60)

    with theirs, Child(body, fds) as child:
        assert child.hear() == "sent"
        reply = reply_of(ours)
    reply.close()
    assert reply.code == "not-permitted"
    assert "make it in the process that sends" in reply.fields["error"]["message"]


def _hand_over(to: socket.socket) -> None:
    """Make a pair and give both of its ends away."""
    ours, theirs = pair()
    socket.send_fds(to, [b"pair"], [ours.fileno(), theirs.fileno()])


def test_a_reply_socket_whose_maker_has_ended(daemon: Daemon, image: int) -> None:
    daemon.hello()
    here, there = pair()
    with here, there, Child(lambda _: _hand_over(there), [there.fileno()]) as maker:
        assert maker.wait() == 0
        _, fds, _, _ = socket.recv_fds(here, 16, 2)
    with socket.socket(fileno=fds[1]) as theirs:
        send(daemon.path, ATTACH, [image, theirs.fileno()]).close()
    reply = reply_of(socket.socket(fileno=fds[0]))
    reply.close()
    assert reply.code == "not-permitted"


def test_a_pid_that_comes_again(daemon: Daemon, image: int) -> None:
    """The maker has ended, and the sender has got its number."""
    last = Path("/proc/sys/kernel/ns_last_pid")
    require(last.exists(), "the kernel has no /proc/sys/kernel/ns_last_pid")
    require(hasattr(socket, "SO_PASSCRED") and _has_peer_pidfd(), "needs SO_PEERPIDFD (Linux 6.5)")
    daemon.hello()
    here, there = pair()
    with here, there:
        with Child(lambda _: _hand_over(there), [there.fileno()]) as maker:
            assert maker.wait() == 0
        _, fds, _, _ = socket.recv_fds(here, 16, 2)

        def sender(tell: Callable[[Any], None]) -> None:
            if os.getpid() == maker.pid:
                send(daemon.path, ATTACH, [image, fds[1]]).close()
            tell(os.getpid())
            time.sleep(60)

        def again() -> bool:
            last.write_text(str(maker.pid - 1))
            with Child(sender, [image, fds[1]]) as other:
                if other.hear() != maker.pid:
                    return False
                reply = reply_of(socket.socket(fileno=os.dup(fds[0])))
                reply.close()
                assert reply.code == "not-permitted", reply.fields
                return True

        try:
            eventually(again, "a process has got that number")
        finally:
            for fd in fds:
                os.close(fd)


def _has_peer_pidfd() -> bool:
    one, other = pair()
    with one, other, contextlib.suppress(OSError):
        os.close(int.from_bytes(one.getsockopt(socket.SOL_SOCKET, 77, 4), "little"))
        return True
    return False


def test_a_thread_of_the_client_asks(daemon: Daemon, image: int) -> None:
    """A process is one client, whichever thread of it makes the socket or sends."""
    import threading  # noqa: PLC0415  # a process that forks has none

    def body(tell: Callable[[Any], None]) -> None:
        made = pair()

        def ask() -> None:
            ours, theirs = made
            with theirs:
                send(daemon.path, ATTACH, [image, theirs.fileno()]).close()
            reply = reply_of(ours)
            reply.close()
            tell(outcome(reply.fields))

        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()

    daemon.hello()
    with Child(body, [image]) as child:
        assert child.hear() == "done"


# The lease --------------------------------------------------------------------------------------------------------


def test_a_lease_socket_that_another_process_has_made(daemon: Daemon, image: int, tmp_path: Path) -> None:
    """It lends no identity: its end ends the lease, and nothing more."""
    message = wire.encode_request(wire.Attach(0, reply_fd=2, lease_fd=1, deliver=("fd",)))
    ours, theirs = pair()

    def body(tell: Callable[[Any], None]) -> None:
        mine, other = pair()
        send(daemon.path, message, [image, theirs.fileno(), other.fileno()]).close()
        reply = reply_of(mine)
        reply.close()
        tell(outcome(reply.fields))

    daemon.hello()
    with ours:
        with theirs, Child(body, [image, theirs.fileno()]) as child:
            assert child.hear() == "done"
        time.sleep(0.2)
        assert bound_to(tmp_path), "the client has ended, and its parent has not"
    eventually(lambda: not bound_to(tmp_path), "the parent has hung up")
