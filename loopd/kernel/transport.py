"""Datagrams and file descriptors: look at the head of the queue, take it with its fds, drop it; own what was received.

A received fd may belong to a file system that never answers, and even `close` on it can block. So `peek` and `drop`
install no fd, and only workers call `take`. Nothing here interprets a payload.
"""

from __future__ import annotations

import array
import contextlib
import os
import re
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import NamedTuple, Self

from loopd.protocol import wire

# Not in Python's socket module; Linux 6.5 and later.
SO_PASSPIDFD = 76
SCM_PIDFD = 4
SO_TIMESTAMPNS = SCM_TIMESTAMPNS = 35

# As numbers: the module's own are an enum's members, and every `|` of two makes a third.
MSG_PEEK, MSG_DONTWAIT = int(socket.MSG_PEEK), int(socket.MSG_DONTWAIT)
_CLOEXEC, _NOSIGNAL, _CTRUNC = int(socket.MSG_CMSG_CLOEXEC), int(socket.MSG_NOSIGNAL), int(socket.MSG_CTRUNC)

_UCRED = struct.Struct("iII")  # pid, uid, gid: struct ucred
_TIMESPEC = struct.Struct("qq")


def _knows_pidfds() -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        try:
            probe.setsockopt(socket.SOL_SOCKET, SO_PASSPIDFD, 1)
        except OSError:
            return False
        return True


PIDFDS = _knows_pidfds()
"""Whether the kernel passes a pidfd of the sender along; else the time of arrival tells that a pid was reused."""

_NO_FDS = socket.CMSG_SPACE(_UCRED.size) + (0 if PIDFDS else socket.CMSG_SPACE(_TIMESPEC.size))
SCM_MAX_FD = 253
"""The most that the kernel lets one datagram have."""
# The kernel releases fds that find no room before recvmsg(2) returns. A release may wait (SO_LINGER), and the whole
# queue with it.
_EVERYTHING = _NO_FDS + socket.CMSG_SPACE(4 * SCM_MAX_FD) + socket.CMSG_SPACE(4)


class Sender(NamedTuple):
    """Who sent a datagram, as the kernel attests (SCM_CREDENTIALS), and the address of the sending socket if it has
    one.
    """

    pid: int
    uid: int
    gid: int
    address: bytes


class Peeked(NamedTuple):
    """The head of the queue. The payload of a datagram that is too long is cut, and longer than wire.MAX_REQUEST."""

    payload: bytes
    sender: Sender


class FdSet:
    """File descriptors that are owned here until they are stolen; closed on leaving the context."""

    def __init__(self, fds: Iterable[int] = ()) -> None:
        self._fds: list[int | None] = list(fds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._fds)

    def __iter__(self) -> Iterator[int]:
        return (fd for fd in self._fds if fd is not None)

    def borrow(self, index: int) -> int:
        """The fd at `index`, still owned here; IndexError where there is none."""
        fd = self._fds[index]
        if fd is None:
            raise IndexError(index)
        return fd

    def steal(self, index: int) -> int:
        """The fd at `index`, the caller's to close from now on."""
        fd = self.borrow(index)
        self._fds[index] = None
        return fd

    def add(self, fd: int) -> int:
        """Own `fd` too; returns it."""
        self._fds.append(fd)
        return fd

    def release(self) -> None:
        """Own none of them any more: somebody else does."""
        self._fds = []

    def close(self) -> None:
        fds, self._fds = self._fds, []
        for fd in fds:
            if fd is not None:
                with contextlib.suppress(OSError):  # Linux frees the number whatever close(2) returns.
                    os.close(fd)


class Packet(NamedTuple):
    """A datagram that was taken: `fds` are its SCM_RIGHTS, which its indices count; `own` has the sender's `pidfd`,
    which is None before Linux 6.5.

    `truncated` when the kernel could not install all fds. `arrived`: seconds since 1970, 0 where there is a pidfd.
    """

    payload: bytes
    sender: Sender
    fds: FdSet
    own: FdSet
    pidfd: int | None
    truncated: bool
    arrived: float


def prepare(listener: socket.socket) -> None:
    """Have the kernel attach credentials to each datagram, and a pidfd where it can (Linux 6.5)."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    listener.setsockopt(socket.SOL_SOCKET, SO_PASSPIDFD if PIDFDS else SO_TIMESTAMPNS, 1)


def _sender(control: list[tuple[int, int, bytes]], address: object) -> Sender:
    for level, kind, data in control:
        if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS and len(data) == _UCRED.size:
            name = address if isinstance(address, bytes) else str(address or "").encode(errors="surrogateescape")
            pid, uid, gid = _UCRED.unpack(data)
            return Sender(pid, uid, gid, name)
    # Sent before `prepare` was called on a socket that was made without PassCredentials=.
    return Sender(0, 0xFFFFFFFF, 0xFFFFFFFF, b"")


def peek(listener: socket.socket) -> Peeked | None:
    """The head of the queue without taking it, None when the queue is empty. Installs no fd, does not block.

    Even MSG_PEEK wakes the next sender that waits for room, although it makes none. With two senders the turns could
    starve one of them while the other floods: each peek would wake the one, and each take the other. So every other
    time, at random, there is one peek more.
    """
    try:
        if os.urandom(1)[0] & 1:
            listener.recvmsg(0, 0, MSG_PEEK | MSG_DONTWAIT)
        payload, control, _, address = listener.recvmsg(wire.MAX_REQUEST + 1, _NO_FDS, MSG_PEEK | MSG_DONTWAIT)
    except BlockingIOError:
        return None
    return Peeked(payload, _sender(control, address))


def drop(listener: socket.socket, pid: int, most: int, go_on: Callable[[], bool] = lambda: True) -> int:
    """Discard at most `most` datagrams of this process from the head of the queue, as long as `go_on()`; how many there
    were. For the child that drops alone: the kernel may take for ever to release what is in a datagram.

    No fd of a datagram is opened, so that at least no FUSE server is asked to flush it.
    """
    count, payload = 0, bytearray(1)
    with contextlib.suppress(BlockingIOError):
        while count < most and go_on():
            control = listener.recvmsg(0, _NO_FDS, MSG_PEEK | MSG_DONTWAIT)[1]
            # Credentials come last: behind the time of arrival, and without room for a pidfd.
            known = control and control[-1][1] == socket.SCM_CREDENTIALS
            # Asked once more: a thread that was late here was taken for one that hangs, and others serve the queue.
            if pid != (int.from_bytes(control[-1][2][:4], sys.byteorder) if known else 0) or not go_on():
                break
            listener.recv_into(payload, 1, MSG_DONTWAIT)
            count += 1
    return count


def _received(control: list[tuple[int, int, bytes]]) -> tuple[list[int], list[int]]:
    rights, pidfds = array.array("i"), array.array("i")
    for level, kind, data in control:
        if level == socket.SOL_SOCKET and kind in (socket.SCM_RIGHTS, SCM_PIDFD):
            (rights if kind == socket.SCM_RIGHTS else pidfds).frombytes(data[: len(data) // 4 * 4])
    # SCM_PIDFD carries an errno in place of an fd when the sender is gone.
    return list(rights), [fd for fd in pidfds if fd >= 0]


def take(listener: socket.socket) -> Packet | None:
    """The head of the queue with all of its fds, None when the queue is empty."""
    try:
        payload, control, flags, address = listener.recvmsg(wire.MAX_REQUEST + 1, _EVERYTHING, MSG_DONTWAIT | _CLOEXEC)
    except BlockingIOError:
        return None
    rights, pidfds = _received(control)
    truncated = bool(flags & _CTRUNC)
    pidfd = pidfds[0] if pidfds else None
    sender = _sender(control, address)
    return Packet(payload, sender, FdSet(rights), FdSet(pidfds), pidfd, truncated, _arrived(control))


def _arrived(control: list[tuple[int, int, bytes]]) -> float:
    for level, kind, data in control:
        if level == socket.SOL_SOCKET and kind == SCM_TIMESTAMPNS:
            seconds, nanoseconds = _TIMESPEC.unpack(data)
            return float(seconds + nanoseconds / 1e9)
    return 0.0


def pidfd_of_sender(pid: int, arrived: float) -> int:
    """A pidfd of the process that sent a datagram at `arrived`, on a kernel that passes none along.

    A process that is younger than the datagram is not the sender, and has only its pid. ProcessLookupError for such a
    process, and where there is none.
    """
    pidfd = os.pidfd_open(pid)
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as stat:
            ticks = int(stat.read().rpartition(")")[2].split()[19])  # starttime, since boot
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
        if age + 0.02 < time.time() - arrived:  # starttime is cut to a tick of 10 ms
            raise ProcessLookupError
    except BaseException as error:
        os.close(pidfd)
        raise ProcessLookupError(pid) from error
    return pidfd


def receive(channel: socket.socket, size: int, fds: int, flags: int = 0) -> tuple[bytes, FdSet]:
    """One message of one of loopd's own sockets with at most `fds` fds."""
    payload, control, _, _ = channel.recvmsg(size, socket.CMSG_SPACE(4 * fds), flags | _CLOEXEC)
    rights, _ = _received(control)
    return payload, FdSet(rights)


def receive_some(channel: socket.socket, size: int, fds: int, flags: int) -> tuple[bytes, FdSet]:
    """One message of one of loopd's own sockets, of whose fds the first `fds` are opened and no other.

    With MSG_PEEK the others stay where they are. CMSG_SPACE() would have room for one more than an odd number.
    """
    payload, control, _, _ = channel.recvmsg(size, socket.CMSG_LEN(4 * fds) if fds else 0, flags | _CLOEXEC)
    rights, _ = _received(control)
    return payload, FdSet(rights)


def send(channel: socket.socket, payload: bytes, fds: Iterable[int] = (), flags: int = 0) -> None:
    """One message with fds, which stay the caller's."""
    rights = array.array("i", fds)
    control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights.tobytes())] if rights else []
    channel.sendmsg([payload], control, flags | _NOSIGNAL)


@contextlib.contextmanager
def borrowed(fd: int) -> Iterator[socket.socket]:
    """An AF_UNIX socket's fd as an object, while it stays its owner's to close."""
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fd)
    try:
        yield channel
    finally:
        channel.detach()


def shares_network(pid: int) -> bool:
    """Whether process `pid` is in this process's network namespace. False where that cannot be established."""
    try:
        return os.path.samefile("/proc/self/ns/net", f"/proc/{pid}/ns/net")
    except OSError:  # gone, or not to be looked at by this user
        return False


def is_autobound(address: bytes) -> bool:
    """Whether the kernel has chosen the address: unix(7), five hexadecimal digits in the abstract namespace."""
    return re.fullmatch(rb"\0[0-9a-f]{5}", address) is not None


def reply(fd: int, payload: bytes, fds: Iterable[int] = ()) -> bool:
    """Send a reply without waiting; False when it cannot be delivered."""
    try:
        with borrowed(fd) as channel:
            send(channel, payload, fds, MSG_DONTWAIT)
    except OSError:  # EPIPE, ECONNRESET: hung up; EAGAIN: does not read
        return False
    return True
