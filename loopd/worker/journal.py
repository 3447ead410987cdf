"""The child that writes the audit's records into the journal, one after the other, as the main process hands them over.

It is a process because `systemd.journal` waits for journald with the interpreter's lock held. It ends after the main
process, so that records which were handed over before the main process was killed are still written.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from types import ModuleType

from loopd.children.child import MAX_MESSAGE, unpacked

SOCKET = "/run/systemd/journal/socket"
PATIENCE = 10.0
"""Seconds for which the child goes on after the main process has ended: journald may never come back."""
PAUSE = 0.1
"""Seconds after which a record is offered again to a journald that did not take it."""
LOOK = 1.0
"""Seconds after which a wait for journald is interrupted, to see whether the main process is still there."""


def present() -> bool:
    """Whether there is a journal to write to."""
    return os.path.exists(SOCKET)


def main(channel: socket.socket, parent: int) -> None:
    """Write what comes on `channel` until the other end is closed; `parent` is the main process."""
    # systemd sends SIGTERM to all processes of the service; the main process still has records to hand over then.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, lambda *_: None)
    import systemd.journal  # noqa: PLC0415  # takes 15 ms, which nobody waits for here

    patience = _Patience(parent)
    while record := channel.recv(MAX_MESSAGE, socket.MSG_PEEK):
        fields = unpacked(record)
        if not _write(systemd.journal, [_line(name, value) for name, value in fields.items()], patience):
            return
        # Taken off the queue only now: where this child is killed, the next one writes the record.
        channel.recv(1)


def _line(name: str, value: str) -> bytes:
    # As bytes: systemd-python encodes a str strictly, and a path may be no UTF-8. sd_journal_sendv(3) gives the length
    # of a value that has a newline in it, so that none can forge a field.
    return name.encode() + b"=" + value.encode(errors="surrogateescape")


class _Patience:
    """How long to wait for journald."""

    def __init__(self, parent: int) -> None:
        self._parent = parent
        self._deadline = 0.0

    @property
    def over(self) -> bool:
        """Whether the main process has ended, and `PATIENCE` since."""
        if not self._deadline and os.getppid() != self._parent:
            self._deadline = time.monotonic() + PATIENCE
        return bool(self._deadline) and time.monotonic() > self._deadline


def _write(journal: ModuleType, lines: list[bytes], patience: _Patience) -> bool:
    """Write one record as soon as journald takes it; False when the patience is over."""
    # By an interval: a single signal that comes just before sendmsg(2) would leave that waiting for ever.
    signal.setitimer(signal.ITIMER_REAL, LOOK, LOOK)
    try:
        while not patience.over:
            # sd_journal_sendv(3) drops the record and says nothing where the socket is missing (ENOENT).
            if present():
                # Not send(): each record would say that this function made it (CODE_FILE=, CODE_LINE=, CODE_FUNC=).
                with contextlib.suppress(OSError):  # EINTR; ECONNREFUSED: journald is not there
                    journal.sendv(*lines)
                    return True
            time.sleep(PAUSE)
        return False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
