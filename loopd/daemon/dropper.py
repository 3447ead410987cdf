"""The dropper: a child process that takes unwanted datagrams off a queue, with whatever files are in them.

The kernel releases those in whoever drops them, and that can wait: for a TCP socket as long as SO_LINGER says, for the
last close of a block device until its backing file answers, which not even SIGKILL ends. So the main process drops
nothing itself. Decides nothing: which processes' datagrams go arrives with the order.

A dropper that hangs is a process for as long as it does. So what comes from one that hung a dropper is parked: a child
takes it and closes none of the files, until it is full.
"""

from __future__ import annotations

import array
import contextlib
import os
import resource
import signal
import socket
from collections.abc import Callable, Collection

from loopd.daemon.pool import fork
from loopd.kernel import transport
from loopd.kernel.poller import Poller, Timer

Dropped = dict[int, int]
"""How many datagrams of which process were dropped."""
OWN = 16
"""Files that such a process has open itself, or for a moment."""


class Dropper:
    """The main process's side, for one listener; one order at a time. The child is made when it is needed."""

    PATIENCE = 0.02
    """Seconds for an order. What takes longer hangs in a file; that datagram is off the queue by then."""
    PATIENCE_PARKING = 2.0
    """The same, where no file is closed."""
    MOST = 512
    """Datagrams of one order, which take a few milliseconds."""
    MOST_PARKED = 64
    """The same, where up to 253 files of each are kept."""

    def __init__(self, poller: Poller, listener: socket.socket, *, parks: bool = False) -> None:
        self._poller = poller
        self._listener = listener
        self._parks = parks
        self._channel: socket.socket | None = None
        self._pid = 0
        self._done: Callable[[Dropped | int], None] | None = None
        self._deadline: Timer | None = None

    def drop(self, pids: Collection[int], *, run: bool, done: Callable[[Dropped | int], None]) -> None:
        """Drop what is at the head of the queue from any of `pids`, or a `run` of such, and call `done`: when it hangs,
        with the pid of the process that does.
        """
        self._done = done
        most = (self.MOST_PARKED if self._parks else self.MOST) if run else 1
        patience = self.PATIENCE
        # TasksMax=, memory, or it has just ended: it is tried again after the deadline.
        with contextlib.suppress(OSError):
            if self._channel is None:
                self._start()
            assert self._channel is not None
            self._channel.send(array.array("i", [most, *pids]).tobytes(), transport.MSG_DONTWAIT)
            patience = self.PATIENCE_PARKING if self._parks else self.PATIENCE
        self._deadline = self._poller.later(patience, self._hangs)

    def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                fds = [theirs.fileno(), self._listener.fileno()]
                self._pid = fork(fds, lambda: work(theirs, self._listener, parks=self._parks))
            except OSError:
                ours.close()
                raise
        self._channel = ours
        self._poller.add(ours.fileno(), self._answered)

    def _answered(self) -> None:
        assert self._channel is not None
        try:
            answer = array.array("i", self._channel.recv(65536))
        except ConnectionResetError:  # it ended, being full, with an order unread
            answer = array.array("i")
        if not answer:
            self.rest()
            if self._done is not None and self._deadline is not None:
                self._deadline.cancel()
                self._deadline = self._poller.later(self.PATIENCE, self._hangs)  # not at once, for it may have no room
            return
        self._finish({pid: count for pid, count in zip(answer[::2], answer[1::2], strict=True) if count})

    def _hangs(self) -> None:
        found: Dropped | int = {}
        if self._channel is not None:  # else there was none
            with contextlib.suppress(ProcessLookupError):  # it had ended, and was waited for
                os.kill(self._pid, signal.SIGKILL)
                found = self._pid
            self.rest()
        self._finish(found)

    def _finish(self, dropped: Dropped | int) -> None:
        done, self._done = self._done, None
        if self._deadline is not None:
            self._deadline.cancel()
        if done is not None:
            done(dropped)

    def rest(self) -> None:
        """End the child, until it is needed again."""
        if self._channel is not None:
            self._poller.remove(self._channel.fileno())
            self._channel.close()
            self._channel = None


def work(channel: socket.socket, listener: socket.socket, *, parks: bool) -> None:
    """Be the dropper, until the main process closes its end, or there is no room to park more."""
    kept: list[int] | None = [] if parks else None
    room = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - OWN
    while order := channel.recv(65536):
        most, *pids = array.array("i", order)
        dropped = transport.drop(listener, pids, most, kept, room)
        answer = array.array("i", [number for item in dropped.items() for number in item] or [0, 0])
        channel.send(answer.tobytes())
        if kept is not None and len(kept) + transport.SCM_MAX_FD > room:
            channel.close()  # before its files, which may take long: another one goes on
            return
