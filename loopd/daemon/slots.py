"""Slots: a place for each lease, in the service manager's fd store where there is one.

Without a service manager the daemon alone has the slots, and they end with it.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable
from typing import NamedTuple

from loopd.daemon.manager import Notifier
from loopd.worker import bindings, records


class Slot(NamedTuple):
    """A place for one lease: its socket (`worker.records`), and its row in the table of bindings."""

    socket: socket.socket
    row: int

    @property
    def fd(self) -> int:
        return self.socket.fileno()


class Slots:
    """Free slots, and how many there are."""

    BATCH = 64
    """Slots that are made at once, and sent to the service manager in one message."""
    BATCH_BY_HAND = 8
    STORE = 16384
    """FileDescriptorStoreMax= of the unit."""
    MOST = 2 * bindings.ROWS
    """Of more the names would not fit into the environment of the next daemon, and it would not start."""

    def __init__(self, notifier: Notifier, size: int | None = None) -> None:
        """`size` is that of the fd store, where it is known.

        Half of the store is used. Beyond its size the service manager closes what is sent, and only warns; and a daemon
        that was killed may have sent slots that the next one does not know of.
        """
        self._notifier = notifier
        self._batch = self.BATCH if notifier.present else self.BATCH_BY_HAND
        self._free: list[socket.socket] = []
        self._count = 0
        self._most = max(1, min(size or self.STORE, self.MOST) // 2 // self.BATCH) * self.BATCH
        self._rows = iter(range(self._most))
        self._free_rows: list[int] = []
        self._known_rows: set[int] = set()

    @property
    def in_use(self) -> float:
        """How much of the fd store is taken, 0 to 1."""
        return (self._count - len(self._free)) / self._most

    def top_up(self) -> None:
        """Make free slots ahead of need; OSError where there is no room for a socket."""
        if len(self._free) >= self._batch // 4 or self._count + self._batch > self._most:
            return
        made: list[socket.socket] = []
        try:
            made += (records.make_slot() for _ in range(self._batch))
        except OSError:
            _close(made)
            raise
        if not self._notifier.present or self._notifier.send(
            "FDSTORE=1\nFDNAME=slot\nFDPOLL=0", [slot.fileno() for slot in made]
        ):
            self._free += made
            self._count += len(made)
        else:
            _close(made)

    def take(self) -> Slot | None:
        """A free slot for one lease; None where the store is full. OSError as `top_up`."""
        if not self._free:
            self.top_up()
        return Slot(self._free.pop(), self._row()) if self._free else None

    def _row(self) -> int:
        if self._free_rows:
            return self._free_rows.pop()
        return next(row for row in self._rows if row not in self._known_rows)

    def give_back(self, slot: Slot) -> None:
        """A lease is over: empty its slot, which is free for the next."""
        records.clear(slot.fd)
        self._free_rows.append(slot.row)
        if self._notifier.present or len(self._free) < self._batch:
            self._free.append(slot.socket)
        else:
            slot.socket.close()
            self._count -= 1

    def came_back(self, stored: socket.socket) -> None:
        """One more slot came back from the store, and is empty."""
        self._count += 1
        self._free.append(stored)

    def came_back_with(self, stored: socket.socket, row: int) -> Slot:
        """One more slot came back from the store, with a lease in this row."""
        self._count += 1
        self._known_rows.add(row)
        return Slot(stored, row)

    def keep_rows(self, rows: Iterable[int]) -> None:
        """Do not use these rows: they have to be looked at first."""
        self._known_rows.update(rows)

    def free_rows(self, rows: Iterable[int]) -> None:
        """These rows are free again."""
        self._free_rows.extend(rows)

    def came_back_unread(self) -> None:
        """One more slot came back from the store, with a lease that cannot be read."""
        self._count += 1


def _close(slots: list[socket.socket]) -> None:
    for slot in slots:
        slot.close()
