"""The audit: one event, one structured journal record.

Owns the closed list of events with their MESSAGE_IDs (systemd/loopd.catalog explains each to the administrator), the
fields of a record, and the child that writes records into the journal. Never waits: records that the child does not
take at once are queued, and those that find no room in the queue are counted, and the count is recorded.
"""

from __future__ import annotations

import collections
import contextlib
import enum
import fcntl
import os
import socket
import sys
import termios
import time
from typing import NamedTuple, Protocol

from loopd.children.child import Child, Children, Role, packed
from loopd.kernel import transport
from loopd.worker import journal

ERR, WARNING, NOTICE, INFO = "3", "4", "5", "6"


class _Kind(NamedTuple):
    message_id: str
    priority: str


class Event(_Kind, enum.Enum):
    """What is recorded. A MESSAGE_ID never changes; the priority is syslog's."""

    ATTACHED = _Kind("e17225313c4f47a991f13d0e9b7456a8", INFO)
    DETACHED = _Kind("b3e25ffbf24c48e7a4efdb5ee5a71269", INFO)
    EXPIRED = _Kind("6f627446202b41ccba539dbefc35b92a", INFO)
    REFUSED = _Kind("3c0f368802cb4ac2bfc120fce9c6e0db", NOTICE)
    HELD = _Kind("617a963d4b01435ca2e3e8894efb2b1c", NOTICE)
    LOST = _Kind("a71c6e0bb0e14f2f9a3f7c6d5b2e9d10", ERR)
    SHED = _Kind("5169384b458e4ce4952db5f9b13e1a7d", WARNING)
    STUCK = _Kind("43eb208a7d8d4897828523e7cfce1227", WARNING)
    WARNED = _Kind("dc9aa196d7cf4d08b446fbf6444ced31", WARNING)
    FOREIGN = _Kind("5b8b0d6a3b0c4f0e9f0a5c1d7e2f4a68", WARNING)
    RELOADED = _Kind("0d9b0ff1b0a44b5e8a4c6f9ce1a2d7b3", INFO)
    FAILED = _Kind("e2d1b4c07cf64a5ea1a5f5b7a4f1d0c9", ERR)


class Output(Protocol):
    """Where records go."""

    def send(self, fields: dict[str, str]) -> bool:
        """Take a record; False when there is no room for one now."""

    def written(self) -> bool:
        """Whether everything that was taken is written."""

    def start(self) -> None:
        """Have a writer run for what was taken."""

    def close(self, deadline: float) -> None:
        """No record comes any more. Wait for the writer until `deadline` (monotonic) at most."""


class _Lines:
    """One line a record on standard error, for a daemon that runs where there is no journal."""

    def send(self, fields: dict[str, str]) -> bool:
        details = " ".join(f"{name}='{_quoted(value)}'" for name, value in fields.items() if name != "MESSAGE")
        print(f"loopd: {_quoted(fields['MESSAGE'])} [{details}]", file=sys.stderr, flush=True)
        return True

    def written(self) -> bool:
        return True

    def start(self) -> None: ...

    def close(self, deadline: float) -> None: ...


class JournalChild:
    """The main process's side of the child that writes records into the journal (`loopd.worker.journal`).

    Records wait in a socketpair until the child has written them. This process keeps both ends open, so that a new
    child goes on where a killed one has stopped.
    """

    ROOM = 1 << 20
    """Bytes that the socketpair is asked to hold; net.core.wmem_max is the limit: 180 records by default."""
    PAUSE = 1.0
    """Seconds between one start and the next: a child that ends at once is not started in a loop."""

    def __init__(self, children: Children) -> None:
        # Not SOCK_DGRAM: there the child would not see the end of this process.
        self._ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.ROOM)
        self._children = children
        main, records = os.getpid(), self._theirs
        keep = [records.fileno()]
        self._role = Role("journal", lambda _: journal.main(records, main), lambda: keep, outlives=True)
        self._child: Child | None = None
        self._next_start = 0.0

    def start(self) -> None:
        """Start the child, unless it runs."""
        now = time.monotonic()
        if self._child is None and now >= self._next_start:
            self._next_start = now + self.PAUSE
            with contextlib.suppress(OSError):  # TasksMax=, memory, open files: `Audit.flush` tries again
                self._child = Child(self._children, self._role, lambda message, fds: None, self._ended)

    def _ended(self) -> None:
        self._child = None

    def send(self, fields: dict[str, str]) -> bool:
        try:
            transport.send(self._ours, packed(fields), flags=socket.MSG_DONTWAIT)
        except OSError:  # EAGAIN, ENOBUFS
            return False
        self.start()
        return True

    def written(self) -> bool:
        # The child takes a record off the queue after it has written it.
        unread = fcntl.ioctl(self._theirs, termios.FIONREAD, bytes(4))
        return not any(unread)

    def close(self, deadline: float) -> None:
        """Let the child write what is left. It goes on when the deadline is over."""
        self._ours.close()
        # The service manager would find a child left over that ends after this process.
        while self._child is not None and not self._child.reaped.kept and time.monotonic() < deadline:
            self._children.reap()
            time.sleep(0.01)


def _quoted(text: str) -> str:
    """The text within single quotes and on one line, whatever a path has in it."""
    return _printable(text.replace("\\", "\\\\").replace("'", "\\'"))


def _printable(text: str) -> str:
    """The text on one line, without what a terminal obeys, or what journalctl shows as "blob data"."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class Audit:
    """Writes records in order, one for each call of `record`."""

    QUEUE = 4096
    """Records kept while journald stalls, about 4 MiB."""

    def __init__(self, children: Children, instance: str = "") -> None:
        self._output: Output = JournalChild(children) if journal.present() else _Lines()
        self._instance = instance
        self._waiting: collections.deque[dict[str, str]] = collections.deque()
        self._lost = 0

    def record(self, event: Event, message: str, /, **details: object) -> None:
        """Record `event`; each detail that is not None becomes the field LOOPD_<NAME>.

        A path is made printable in the message, and stays as it is in its field. A traceback keeps its lines.
        """
        fields = {
            "MESSAGE": "\n".join(map(_printable, message.split("\n") if event is Event.FAILED else [message])),
            "MESSAGE_ID": event.value.message_id,
            "PRIORITY": event.value.priority,
            "SYSLOG_IDENTIFIER": "loopd",
            "LOOPD_EVENT": event.name.lower(),
        }
        if self._instance:
            fields["LOOPD_INSTANCE"] = self._instance
        fields.update({f"LOOPD_{name.upper()}": str(value) for name, value in details.items() if value is not None})
        if len(self._waiting) >= self.QUEUE:
            self._lost += 1
            return
        self._waiting.append(fields)
        self.flush()

    @property
    def waiting(self) -> bool:
        """Whether there are records that are not in the journal yet."""
        return bool(self._waiting) or not self._output.written()

    def flush(self) -> bool:
        """Hand over what waits; True when everything is written."""
        while self._waiting:
            if not self._output.send(self._waiting[0]):
                break
            self._waiting.popleft()
        if self._lost and not self._waiting:
            lost, self._lost = self._lost, 0
            self.record(Event.SHED, f"{lost} records were lost while the journal did not take any", count=lost)
        if not self.waiting:
            return True
        self._output.start()
        return False

    def drain(self, seconds: float) -> None:
        """Before the process ends: have what waits written, and wait for that for at most `seconds`."""
        deadline = time.monotonic() + seconds
        while not self.flush() and time.monotonic() < deadline:
            time.sleep(0.01)
        self._output.close(deadline)
