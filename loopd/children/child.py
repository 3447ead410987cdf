"""One child process: fork, channel, kill, reap, in one way for every role.

Parent and child are forks of one image on a private socketpair, so a message is a pickled value and has no version.
Nothing here knows what is said.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import signal
import socket
import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, NoReturn

from loopd.children.bugs import described
from loopd.children.flow import Promise
from loopd.kernel import rights, transport
from loopd.kernel.poller import Poller
from loopd.kernel.transport import FdSet

MAX_MESSAGE = 1 << 17
"""Bytes of a message: a record of 8 KiB of request, and the nodes of a device with 256 partitions."""
MAX_FDS = 8

_UNTOLD = (errno.ENOBUFS, errno.ENOMEM, errno.EAGAIN, errno.ETOOMANYREFS, errno.EMSGSIZE)


def packed(message: Any) -> bytes:
    """A value as bytes, for another process of this program."""
    return pickle.dumps(message, pickle.HIGHEST_PROTOCOL)


def unpacked(payload: bytes) -> Any:
    """The value that `packed` packed."""
    return pickle.loads(payload)  # noqa: S301  # of our own process: see above


class Role(NamedTuple):
    """What a kind of child is for. `keep` gives the parent's fds that the child keeps open. `main` runs in the child
    with its end of the channel. A child that `outlives` its parent ends by itself when the channel does; any other is
    killed.
    """

    name: str
    main: Callable[[Channel], None]
    keep: Callable[[], list[int]]
    outlives: bool = False


class Channel:
    """One end of the socketpair between parent and child."""

    __slots__ = ("socket",)

    def __init__(self, end: socket.socket) -> None:
        self.socket = end

    def send(self, message: Any, fds: Iterable[int] = (), flags: int = 0) -> None:
        """Send a value with fds, which stay the caller's; OSError as sendmsg(2)."""
        transport.send(self.socket, packed(message), fds, flags)

    def receive(self, *, wait: bool = True) -> tuple[Any, FdSet]:
        """The next value with its fds; EOFError when the other end is closed, BlockingIOError where there is none."""
        try:
            payload, fds = transport.receive(self.socket, MAX_MESSAGE, MAX_FDS, 0 if wait else transport.MSG_DONTWAIT)
        except ConnectionResetError:  # the other process ended with a message unread
            raise EOFError from None
        if not payload:
            raise EOFError
        return unpacked(payload), fds

    def close(self) -> None:
        self.socket.close()


class Child:
    """A child process as its parent sees it. `heard` is called with each message, `ended` once when no more comes."""

    def __init__(
        self, children: Children, role: Role, heard: Callable[[Any, FdSet], None], ended: Callable[[], None]
    ) -> None:
        """Fork; OSError where there is no room for a process or a socket."""
        self.role = role
        self.reaped: Promise[None] = Promise()
        self._children = children
        self._heard = heard
        self._ended = ended
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                self.pid = _fork(role, theirs)
            except OSError:
                ours.close()
                raise
        self._channel: Channel | None = Channel(ours)
        children.add(self)
        children.poller.add(ours.fileno(), self._readable)

    @property
    def alive(self) -> bool:
        """Whether the channel is open: `close`, `kill` and the end of the child close it."""
        return self._channel is not None

    def send(self, message: Any, fds: Iterable[int] = ()) -> None:
        """Send a message. That the child has ended is noticed where its channel is read.

        Where the kernel cannot send (ENOBUFS, ETOOMANYREFS, EMSGSIZE) the child is killed: its answer would never come.
        """
        try:
            if self._channel is not None:
                self._channel.send(message, fds, transport.MSG_DONTWAIT)
        except OSError as error:
            # For no other errno: the child may have been reaped, and its pid be another process's.
            if error.errno in _UNTOLD:
                os.kill(self.pid, signal.SIGKILL)

    def _readable(self) -> None:
        assert self._channel is not None
        try:
            message, fds = self._channel.receive(wait=False)
        except BlockingIOError:
            return
        except EOFError:
            self.close()
            self._ended()
            return
        with fds:
            self._heard(message, fds)

    def close(self) -> None:
        """Close the channel: the child ends when it has done what it was told."""
        if self._channel is not None:
            self._children.poller.remove(self._channel.socket.fileno())
            self._channel.close()
            self._channel = None

    def kill(self) -> None:
        """Kill the child. In an uninterruptible wait it stays until the file system answers; `reaped` tells."""
        self.close()
        if not self.reaped.kept:
            os.kill(self.pid, signal.SIGKILL)


class Children:
    """All children of this process, each until it is reaped."""

    def __init__(self, poller: Poller) -> None:
        self.poller = poller
        self._children: dict[int, Child] = {}

    def add(self, child: Child) -> None:
        self._children[child.pid] = child

    def reap(self) -> None:
        """Reap the children that have ended."""
        with contextlib.suppress(ChildProcessError):
            while (pid := os.waitpid(-1, os.WNOHANG)[0]) != 0:
                child = self._children.pop(pid, None)
                if child is not None:
                    child.reaped.keep(None)


def _fork(role: Role, channel: socket.socket) -> int:
    """Run the role in a child that has no fd but its own and the standard ones.

    For a single-threaded process only. Returns when the child has closed what is not its own: until then the child
    would keep open what this process closes meanwhile.
    """
    parent = os.getpid()
    closed, closing = os.pipe()
    try:
        pid = os.fork()
        if pid == 0:
            _child(role, parent, channel, closing)
    except OSError:
        os.close(closed)
        raise
    finally:
        os.close(closing)
    os.read(closed, 1)  # nothing comes: it is the end of the child's side
    os.close(closed)
    return pid


def _child(role: Role, parent: int, channel: socket.socket, closing: int) -> NoReturn:
    # Never returns into the frames of the parent, whose objects believe that they own fds which are closed here.
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the parent ends its children itself
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        low = 3
        for fd in sorted({*role.keep(), channel.fileno(), closing}):
            os.closerange(low, fd)
            low = fd + 1
        os.closerange(low, os.sysconf("SC_OPEN_MAX"))
        os.close(closing)
        if not role.outlives:
            rights.die_with_parent(parent)
        role.main(Channel(channel))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the parent is gone
    except BaseException as error:  # noqa: BLE001  # nothing may leave this frame
        print(described(error), file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)
