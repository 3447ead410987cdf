"""What a daemon holds, to tell that nothing is left of what was tried; and clients that are not the test itself.

Looks at the daemon from outside, through /proc: nothing here speaks to it but `honest` and `kept_open`.
"""

from __future__ import annotations

import array
import contextlib
import errno
import io
import json
import os
import re
import signal
import socket
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from loopd.protocol import wire
from support.daemon import Daemon, Reply, bound_to, eventually, require


def _links(pid: int) -> list[str]:
    found = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.append(os.readlink(fd))
        except FileNotFoundError:  # the one that lists them, of a test that looks at itself
            pass
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            found.append("a path that is too long")
    return sorted(found)


def _names(links: list[str]) -> Counter[str]:
    return Counter(re.sub(r"\[\d+\]$", "", link) for link in links)


Fds = tuple[tuple[str, int], ...]
"""How many fds of each name a process has."""
Held = tuple[Counter[str], set[Fds], list[Fds], list[int]]
"""The fds of the main process, of its helpers, of its other children, and those of them that were not waited for."""


def _fds(pid: int) -> Fds:
    return tuple(sorted(_names(_links(pid)).items()))


def children(pid: int) -> list[int]:
    """The child processes of a process, those included that have ended and were not waited for."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def state(pid: int) -> str:
    """The state of a process as in /proc/PID/stat: S, D, Z, …; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def helpers(daemon: Daemon) -> list[int]:
    """The helper processes: those children that hold the socket which requests arrive on, and make devices."""
    return [child for child, links in _takers(daemon) if _makes(links)]


def droppers(daemon: Daemon) -> list[int]:
    """The other children that hold that socket: they come when something is to be dropped, and may stay."""
    return [child for child, links in _takers(daemon) if not _makes(links)]


def _takers(daemon: Daemon) -> list[tuple[int, list[str]]]:
    listener = os.readlink(f"/proc/{daemon.pid}/fd/3")  # SD_LISTEN_FDS_START
    found = []
    for child in children(daemon.pid):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            links = _links(child)
            if listener in links:
                found.append((child, links))
    return found


def maker(daemon: Daemon) -> int:
    """The process that makes and removes numbers: the child that makes devices and takes no requests."""
    (found,) = [child for child, links in _others(daemon) if _makes(links)]
    return found


def writer(daemon: Daemon) -> int:
    """The process that writes the audit into the journal: it is there from the first record on."""
    (found,) = [child for child, links in _others(daemon) if not _makes(links)]
    return found


def _makes(links: list[str]) -> bool:
    """Whether one is the control device, of /dev or through a node of loopd's own."""
    return any("/loop-control" in link for link in links)


def _others(daemon: Daemon) -> list[tuple[int, list[str]]]:
    takers = {child for child, _ in _takers(daemon)}
    return [(child, _links(child)) for child in children(daemon.pid) if child not in takers and state(child) != "Z"]


@contextlib.contextmanager
def paused(pid: int) -> Iterator[None]:
    """Have a process do nothing."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def kept_open(daemon: Daemon, node: Path) -> io.FileIO:
    """End a lease, and open another way to its node, ``kept``, before its number is removed."""
    kept = node.with_name("kept")
    os.link(node, kept)
    with paused(maker(daemon)):  # the removal takes its time
        assert daemon.ask(wire.Detach(node.name, 0, wait=5), []).fields == {"state": "released"}
        return kept.open("rb", buffering=0)


def stopped(daemon: Daemon) -> contextlib.AbstractContextManager[None]:
    """Let requests gather in the queue: once sent, clients need not hold the files any more, nor hang in them."""
    return paused(daemon.pid)


def _free(place: Path) -> bool:
    return not bound_to(place)


class Untouched:
    """What a daemon at rest holds; `check` tells what has been added since, or taken away."""

    def __init__(self, daemon: Daemon, *, honest_first: bool = True) -> None:
        self._daemon = daemon
        if honest_first:
            honest(daemon)
        else:
            daemon.hello()  # starts it
        self._pid = daemon.pid
        self._before = eventually(self._settled, "the daemon is at rest")

    def _settled(self) -> Held | None:
        """What is held when no helper is in the middle of something, or not yet done with its start."""
        first = self._held()
        time.sleep(0.02)
        # A pidfd is that of a client with whom it is not done yet.
        quiet = len(first[1]) == 1 and "anon_inode:[pidfd]" not in first[0]
        return first if quiet and first == self._held() else None

    def _held(self) -> Held:
        main = _names(_links(self._daemon.pid))
        workers, dropping = helpers(self._daemon), droppers(self._daemon)
        others = [child for child in children(self._daemon.pid) if child not in workers + dropping]
        # Each has one channel; their number follows the load.
        main["socket:"] -= len(workers + dropping)
        kinds = {_fds(worker) for worker in workers}
        return main, kinds, [_fds(other) for other in others], [child for child in others if state(child) == "Z"]

    def _as_before(self) -> bool:
        try:
            return bool(self._held() == self._before)
        except OSError:  # a child has just ended
            return False

    def check(self, *places: Path) -> None:
        """Nothing is left: no fd in any process, no process, no device bound to a file of `places`, no node there."""
        assert self._daemon.pid == self._pid
        try:
            eventually(self._as_before, "nothing more is held than before")
        except AssertionError:
            names = ("main process", "helpers", "other children", "ended children")
            now = zip(names, self._before, self._held(), strict=True)
            said = [f"{name}:\n  before {then}\n  now {held}" for name, then, held in now if then != held]
            raise AssertionError("\n".join(said)) from None
        for place in places:
            eventually(partial(_free, place), f"no file of {place} is bound")
            found = [path for path in place.rglob("loop*") if path.is_block_device()]
            assert not found, f"nodes that are left: {found}"


def leases(daemon: Daemon) -> list[dict[str, Any]]:
    """What the daemon says about the leases of the test."""
    found: list[dict[str, Any]] = []
    while True:
        after = found[-1]["devname"] if found else ""
        with contextlib.closing(daemon.ask(wire.Leases(0, after=after), [])) as reply:
            found += reply.fields["leases"]
            if not reply.fields["more"]:
                return found


def honest(daemon: Daemon) -> None:
    """An honest client is served, and nothing is left of it but its helper."""
    image = os.memfd_create("honest", os.MFD_CLOEXEC)
    try:
        os.truncate(image, 1 << 16)
        reply = daemon.ask(wire.Attach(0, reply_fd=1, deliver=("fd",)), [image])
        assert reply.code is None, reply.fields
        assert len(reply.fds) == 1
        os.pwrite(reply.fds[0], b"loopd" * 1024, 0)
        os.fsync(reply.fds[0])
        assert os.pread(image, 10, 0) == b"loopdloopd"
        name = reply.fields["devname"]
        reply.close()
        eventually(lambda: name not in [lease["devname"] for lease in leases(daemon)], "its lease is over")
    finally:
        os.close(image)


def send(
    path: str,
    payload: bytes,
    fds: list[int],
    *,
    credentials: tuple[int, int, int] | None = None,
    autobind: bool = False,
) -> socket.socket:
    """Send a datagram as it is, perhaps with credentials (pid, uid, gid) of choice; returns the socket it left by."""
    sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        if autobind:
            sender.bind("")
        sender.settimeout(10)
        sender.connect(path)
        control: list[tuple[int, int, Any]] = []
        if fds:
            control.append((socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds)))
        if credentials is not None:
            control.append((socket.SOL_SOCKET, socket.SCM_CREDENTIALS, array.array("I", credentials)))
        sender.sendmsg([payload], control)
    except BaseException:
        sender.close()
        raise
    return sender


def ask_at_address(path: str, payload: bytes, fds: list[int]) -> dict[str, Any]:
    """What is answered at the sender's address: for requests whose reply_fd will not do."""
    with send(path, payload, fds, autobind=True) as sender:
        answer: dict[str, Any] = json.loads(sender.recv(wire.MAX_REPLY))
    return answer


def reply_of(channel: socket.socket, timeout: float = 10.0) -> Reply:
    """The reply that comes on the client's end of a reply socket; without fields if it was hung up instead."""
    channel.settimeout(timeout)
    try:
        try:
            payload, control, _, _ = channel.recvmsg(wire.MAX_REPLY, socket.CMSG_SPACE(64))
        except ConnectionResetError:
            # Told once, before what is queued: the other end was closed with something unread in it.
            payload, control, _, _ = channel.recvmsg(wire.MAX_REPLY, socket.CMSG_SPACE(64))
    except OSError:
        channel.close()
        raise
    fds = array.array("i")
    for _, kind, data in control:
        if kind == socket.SCM_RIGHTS:
            fds.frombytes(data)
    return Reply(channel, payload, list(fds))


def pair() -> tuple[socket.socket, socket.socket]:
    """The client's end of a reply socket, and the end to send along."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


@contextlib.contextmanager
def concurrently(act: Callable[[], object], prepare: Callable[[], object]) -> Iterator[Callable[[], Any]]:
    """Run `act` in a child process of its own, after `prepare`, which may give up rights there.

    What is yielded waits for its end and returns what `act` returned, as JSON.
    """
    read, write = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            os.close(read)
            prepare()
            os.write(write, json.dumps(act()).encode())
            status = 0
        except BaseException:  # noqa: BLE001  # a fork of the test must not return into its frames
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(write)
    waited = False

    def result() -> Any:
        nonlocal waited
        with os.fdopen(os.dup(read), "rb") as stream:
            payload = stream.read()
        waited = True
        assert os.waitpid(child, 0)[1] == 0, "the client process failed, see its traceback"
        return json.loads(payload)

    try:
        yield result
    finally:
        os.close(read)
        if not waited:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


LONG_QUEUE = ("unshare", "--net", "sh", "-c", 'echo 512 >/proc/sys/net/unix/max_dgram_qlen && exec "$@"', "sh")
"""A daemon's launcher: in a network namespace of its own a socket's queue is as long as it is where systemd booted."""


def flood(path: str, count: int) -> None:
    """Send datagrams as fast as they are taken, with all sorts of requests in them."""
    payloads = [b'{"op": "hello", "reply_fd": 0}', b'{"op": "list", "reply_fd": 0}', b"nonsense"]
    ours, theirs = pair()
    ours.setblocking(False)
    with ours, theirs, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.connect(path)
        for number in range(count):
            socket.send_fds(sender, [payloads[number % len(payloads)]], [theirs.fileno()])
            with contextlib.suppress(BlockingIOError):
                ours.recv(65536)


def elsewhere(act: Callable[[], object], prepare: Callable[[], object] = lambda: None) -> Any:
    """What `act` returns in a process of its own: `concurrently`, and waited for."""
    with concurrently(act, prepare) as result:
        return result()


def become(uid: int) -> Callable[[], None]:
    """For `elsewhere`: give up root for `uid`, for good."""

    def act() -> None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)

    return act


@contextlib.contextmanager
def needed_cgroup(name: str) -> Iterator[Callable[[], None]]:
    """As `cgroup`, for a test that cannot do without."""
    with cgroup(name) as enter:
        require(enter, "needs a cgroup hierarchy to make a cgroup in")
        assert enter is not None
        yield enter


@contextlib.contextmanager
def cgroup(name: str) -> Iterator[Callable[[], None] | None]:
    """For `elsewhere`: enter a cgroup of its own, which is an account of its own; None where none can be made."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    roots = [Path(mount[1]) for mount in mounts if mount[2] == "cgroup2"]
    roots += [Path(mount[1]) for mount in mounts if mount[2] == "cgroup" and "name=systemd" in mount[3].split(",")]
    made = None
    for root in roots:
        with contextlib.suppress(OSError):
            (root / name).mkdir()
            made = root / name
            break
    if made is None:
        yield None
        return

    def enter() -> None:
        (made / "cgroup.procs").write_text(str(os.getpid()))

    try:
        yield enter
    finally:
        eventually(lambda: not (made / "cgroup.procs").read_text(), "the cgroup is empty")
        made.rmdir()
