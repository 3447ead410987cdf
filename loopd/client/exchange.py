"""One exchange with the daemon: a datagram out, one reply in, the fds of both, and the deadline over both.

Changes when the transport does. Knows no operation: what a request means, and what its reply has, is for others.
Repeats no request unless the daemon dropped it: a second attach would bind a second device.
"""

from __future__ import annotations

import errno
import os
import select
import socket as _socket
import struct
import time
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Iterator, NamedTuple, Sequence, TypeVar

from loopd.client.errors import (
    ADMIN_UNAVAILABLE,
    ERRORS,
    NOT_ROOT,
    UNAVAILABLE,
    BadReply,
    Dropped,
    Error,
    Malformed,
    Timeout,
    Unavailable,
)
from loopd.client.inputs import StrPath
from loopd.protocol import wire
from loopd.protocol.decode import VALIDATORS
from loopd.protocol.wire import (
    Attached,
    Detached,
    Granted,
    GrantInfo,
    Greeting,
    LeaseInfo,
    Measured,
    Rescanned,
    Resized,
)

SOCKET = "/run/loopd/loopd.sock"
"""Where loopd listens; the environment variable LOOPD_SOCKET says otherwise."""
ADMIN_SOCKET = "/run/loopd-admin/admin.sock"
"""The administrator's socket on the host: every owner's leases, and detach by force."""
TIMEOUT = 30.0
"""Seconds that a request and its reply may take together."""

FIRST_PAUSE = 0.01
"""Seconds at most before a dropped request is sent again. Each pause is twice as long as the one before."""
LONGEST_PAUSE = 0.5

_UCRED = struct.Struct("=iII")  # pid, uid, gid of struct ucred


class Fds:
    """Fds that were received, closed together but for those that were taken."""

    def __init__(self, fds: Sequence[int]) -> None:
        self._fds = dict(enumerate(fds))

    def take(self, index: int, what: str) -> int:
        """Hand one over to the caller; `BadReply` where the daemon did not send `what`."""
        try:
            return self._fds.pop(index)
        except KeyError:
            raise BadReply(f"the reply came without the {what} that was asked for") from None

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.popitem()[1])


class Answer(NamedTuple):
    """What came back. `channel` is this side of the socket pair; `pid` is the daemon's, 0 in another PID namespace."""

    fields: dict[str, Any]
    fds: Fds
    channel: _socket.socket
    pid: int


def _left(deadline: float) -> float:
    """Seconds until `deadline`, above 0: a socket with a timeout of 0 does not block."""
    return max(deadline - time.monotonic(), 1e-3)


def _send(sender: _socket.socket, path: str, payload: bytes, fds: Sequence[int], deadline: float) -> None:
    # The kernel attaches credentials if either side asks for them; a socket made by hand may not.
    sender.setsockopt(_socket.SOL_SOCKET, _socket.SO_PASSCRED, 1)
    try:
        # Connect first: poll(2) sees the full queue of the peer only on a connected socket, and would
        # otherwise spin until the timeout.
        sender.connect(path)
        sender.settimeout(_left(deadline))
        rights = struct.pack(f"{len(fds)}i", *fds)
        sender.sendmsg([payload], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)])
    except _socket.timeout:
        raise Timeout(f"{path}: the queue of requests stays full") from None
    except OSError as error:
        if error.errno == errno.EBADF:
            raise
        raise Unavailable(f"cannot ask loopd at {path}: {error.strerror or error}", _hint(path, error)) from error


def _hint(path: str, error: OSError) -> str:
    # Those of instances have the same name.
    if error.errno == errno.EACCES and os.geteuid() and os.path.basename(path) == os.path.basename(ADMIN_SOCKET):
        return NOT_ROOT
    hint = ADMIN_UNAVAILABLE if path == ADMIN_SOCKET else UNAVAILABLE.get(error.errno or 0, "")
    if path in (SOCKET, ADMIN_SOCKET):
        return hint
    named = "LOOPD_SOCKET names this one, " if path == os.environ.get("LOOPD_SOCKET") else ""
    return f"{named}the usual one is {SOCKET}" + (f"; {hint}" if hint else "")


def _in_time(channel: _socket.socket, deadline: float, lasting: bool) -> bool:
    """Whether a reply or a hang-up came in time. If not, and the lease is to outlast this socket, none comes later."""
    poll = select.poll()
    poll.register(channel, select.POLLIN)
    if poll.poll(_left(deadline) * 1000):
        return True
    if not lasting:
        return False
    # The device would be left with a name that nobody knows. When we receive no more, loopd's answer fails (EPIPE), and
    # it undoes the attach. An answer that came just before is still in the queue (unix_shutdown, net/unix/af_unix.c).
    channel.shutdown(_socket.SHUT_RD)
    return bool(channel.recv(1, _socket.MSG_PEEK))


def _receive(channel: _socket.socket, stack: ExitStack) -> tuple[bytes, Fds, int]:
    """The reply, its fds, which `stack` owns, and the pid of the sender (0 from another PID namespace).

    The reply is empty where the daemon hung up.
    """
    room = _socket.CMSG_SPACE(wire.MAX_FDS * 4) + _socket.CMSG_SPACE(_UCRED.size)
    # One byte more than a reply may have shows a reply that is cut off.
    try:
        data, ancillary, _, _ = channel.recvmsg(wire.MAX_REPLY + 1, room, _socket.MSG_CMSG_CLOEXEC)
    except ConnectionResetError:
        return b"", Fds(()), 0
    rights, pid = b"", 0
    for _, kind, content in ancillary:
        if kind == _socket.SCM_RIGHTS:
            rights += content[: len(content) // 4 * 4]
        elif kind == _socket.SCM_CREDENTIALS:
            pid = _UCRED.unpack(content)[0]
    fds = Fds(struct.unpack(f"{len(rights) // 4}i", rights))
    stack.callback(fds.close)
    return data, fds, pid


class Exchange:
    """One loopd, by its socket. Keeps no connection and no fd between requests, which are independent of each other."""

    def __init__(self, socket: StrPath | None = None, timeout: float = TIMEOUT) -> None:
        self.socket = os.fspath(socket or os.environ.get("LOOPD_SOCKET") or SOCKET)
        self.timeout = timeout
        self._withdrawn = False
        self._attaching: set[_socket.socket] = set()

    def withdraw(self) -> None:
        """From a signal handler: take back the attach that is under way, and every later one of this client.

        `attach` then raises InterruptedError, and leaves nothing attached. If loopd has answered already, `attach`
        returns the device.
        """
        self._withdrawn = True
        for sock in tuple(self._attaching):
            with suppress(OSError):  # it was closed meanwhile
                sock.shutdown(_socket.SHUT_RDWR)

    @contextmanager
    def _withdrawable(self, request: wire.Request, *sockets: _socket.socket) -> Iterator[None]:
        if not isinstance(request, wire.Attach):
            yield
            return
        self._attaching.update(sockets)
        try:
            # A signal may come between these two lines, and must then find the sockets.
            if self._withdrawn:
                raise InterruptedError(errno.EINTR, "the attach was withdrawn")
            yield
        except Error:
            if self._withdrawn:
                raise InterruptedError(errno.EINTR, "the attach was withdrawn") from None
            raise
        finally:
            self._attaching.difference_update(sockets)

    def _ask(self, stack: ExitStack, request: wire.Request, fds: Sequence[int] = (), wait: float = 0.0) -> Answer:
        """Send `request` with `fds` (borrowed) and a socket for the reply; `stack` owns what comes back."""
        over = time.monotonic() + wait
        until = over + self.timeout
        pause = FIRST_PAUSE
        while True:
            try:
                return self._ask_once(stack, request, fds, until, self.timeout + wait)
            except Dropped:
                # Either this account has too many requests under way, or loopd ended.
                if time.monotonic() + pause > until:
                    raise
                if isinstance(request, wire.Detach):
                    request = request._replace(wait=min(request.wait, max(0.0, over - time.monotonic())))
            time.sleep(pause * (0.5 + os.urandom(1)[0] / 510))  # no two clients return at the same time
            pause = min(2 * pause, LONGEST_PAUSE)

    def _ask_once(
        self, stack: ExitStack, request: wire.Request, fds: Sequence[int], deadline: float, timeout: float
    ) -> Answer:
        """One try; `Dropped` means that the request had no effect, or that loopd ended meanwhile."""
        payload = wire.encode_request(request._replace(reply_fd=len(fds)))
        if len(payload) > wire.MAX_REQUEST:
            raise Malformed(f"the request has more than {wire.MAX_REQUEST} bytes")
        channel, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        stack.enter_context(channel)
        stack.enter_context(theirs)
        channel.setsockopt(_socket.SOL_SOCKET, _socket.SO_PASSCRED, 1)
        sender = stack.enter_context(_socket.socket(_socket.AF_UNIX, _socket.SOCK_DGRAM))
        with self._withdrawable(request, channel, sender):
            with theirs, sender:
                _send(sender, self.socket, payload, [*fds, theirs.fileno()], deadline)
            # Our copy of the daemon's end is closed, so that a hang-up of the daemon's shows here.
            if not _in_time(channel, deadline, isinstance(request, wire.Attach) and request.lease_fd is not None):
                raise Timeout(f"no answer from {self.socket} within {timeout:g} s")
            data, received, pid = _receive(channel, stack)
            if not data:
                channel.close()
                raise Dropped(f"{self.socket}: the request was dropped without an answer")
        return Answer(_decoded(data), received, channel, pid)


def _decoded(data: bytes) -> dict[str, Any]:
    try:
        if len(data) > wire.MAX_REPLY:
            raise ValueError(f"it has more than {wire.MAX_REPLY} bytes")
        return wire.decode_reply(data)
    except wire.Refusal as refusal:
        raise ERRORS[refusal.code](refusal.message) from None
    # RecursionError: nested arrays; the others: a refusal of another shape.
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadReply(f"the reply makes no sense: {error}") from error


Record = TypeVar("Record", Attached, Detached, LeaseInfo, Granted, GrantInfo, Rescanned, Resized, Greeting, Measured)


def _record(kind: type[Record], fields: dict[str, Any]) -> Record:
    """A reply as a value. An unknown field is a newer daemon's and is left out."""
    values: dict[str, Any] = dict.fromkeys(name for name in kind._fields if name not in kind._field_defaults)
    values.update((name, tuple(value) if isinstance(value, list) else value) for name, value in fields.items())
    record = kind(**{name: values[name] for name in kind._fields if name in values})
    for name in kind._fields:
        if getattr(record, name) is None and name not in kind._field_defaults and name != "diskseq":
            raise ValueError(f"it has no {name}")
    return record


def parsed(kind: type[Record], fields: Any) -> Record:
    """A reply, or a row of one, as a value; `BadReply`."""
    try:
        record = _record(kind, fields)
        if isinstance(record, (Attached, LeaseInfo)):
            VALIDATORS["devname"](record.devname)  # it becomes part of a path
        return record
    except (AttributeError, TypeError, ValueError) as error:
        raise BadReply(f"the reply makes no sense: {error}") from error
