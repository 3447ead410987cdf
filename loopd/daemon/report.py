"""Tells the service manager of the daemon's state: READY, STATUS, WATCHDOG, STOPPING."""

from __future__ import annotations

import contextlib
import socket
import sys

from loopd.daemon.manager import Notifier
from loopd.kernel.poller import Poller

STATUS_PAUSE = 1.0
"""Seconds in which changes of the status are gathered. Without a change nothing is sent."""
READY_PAUSE = 0.1
"""Seconds before systemd is told again, where its queue was full."""


class Reporter:
    """Tells systemd, where there is one."""

    def __init__(self, poller: Poller, notifier: Notifier, watchdog: float | None) -> None:
        """`watchdog`: seconds within which systemd wants a sign of life."""
        self._poller = poller
        self._notifier = notifier
        self._watchdog = watchdog
        self._reporting = False
        self._reported = ""

    @property
    def present(self) -> bool:
        """Whether there is a service manager, with an fd store."""
        return self._notifier.present

    def begin(self, status: str) -> None:
        """The daemon serves from now on."""
        self._reported = status
        self._tell_ready()
        if not self._notifier.present:
            print("loopd: runs by hand: leases end with it (no fd store)", file=sys.stderr, flush=True)
        if self._watchdog is not None:
            self._ping()

    def _tell_ready(self) -> None:
        if self._notifier.present and not self._notifier.send(f"READY=1\nSTATUS={self._reported}"):
            self._poller.later(READY_PAUSE, self._tell_ready)

    def _ping(self) -> None:
        assert self._watchdog is not None
        self._notifier.send("WATCHDOG=1")
        collect_garbage()
        self._poller.later(self._watchdog / 2, self._ping)

    def look(self, status: str) -> None:
        """Report the status soon, if it has changed."""
        if self._reporting or status == self._reported:
            return
        self._reporting = True
        self._reported = status
        self._poller.later(STATUS_PAUSE, self._report)

    def _report(self) -> None:
        self._reporting = False
        self._notifier.send(f"STATUS={self._reported}")

    def stopping(self) -> None:
        """The daemon takes no more requests."""
        self._notifier.send("STOPPING=1")


def collect_garbage() -> None:
    """Have the kernel look for AF_UNIX sockets that nobody can reach, now that the process is awake anyway.

    A client may have queued the other end of its lease socket in that socket itself. The kernel looks whenever an
    AF_UNIX socket is closed, which on most hosts happens all the time.
    """
    with contextlib.suppress(OSError):
        socket.socket(socket.AF_UNIX).close()
