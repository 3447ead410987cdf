"""Leases: the books of the main process, and their place in the fd store.

A lease is a binding together with what keeps it alive and where its nodes are. Owns the fds of every lease and the slots.
Changes no device: taking one away is a helper's job.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from . import records, sd
from .accounts import Account
from .devices import Binding, Node
from .transport import FdSet


class Owner(NamedTuple):
    """Who may list and detach a lease."""

    account: str
    uid: int


class Holder(NamedTuple):
    """For whom a lease was made, as the kernel attested then; part of its record in the fd store."""

    account: str
    unit: str
    pid: int
    uid: int
    gid: int
    since: float
    id: str | None = None

    @property
    def owner(self) -> Owner:
        return Owner(self.account, self.uid)


class Lease:
    """One binding and what belongs to it. The fds are owned here; `lease` says what the keeper fd is."""

    __slots__ = (
        "account", "binding", "device", "directory", "holder", "keeper", "lease", "lock", "nodes", "reason", "slot", "state",
        "waiting",
    )  # fmt: skip

    def __init__(
        self, binding: Binding, holder: Holder, account: Account, lease: str, fds: dict[str, int], nodes: tuple[Node, ...]
    ) -> None:
        self.binding = binding
        self.holder = holder
        self.account = account
        self.lease = lease
        self.device = fds["device"]
        self.keeper = fds["keeper"]
        self.directory = fds.get("directory")
        self.lock = fds.get("lock")
        self.nodes = nodes
        self.slot: socket.socket | None = None
        self.state = "bound"
        self.reason = ""
        self.waiting: list[Callable[[str], None]] = []

    @property
    def age(self) -> float:
        """Seconds since it was made, across restarts of the daemon."""
        return max(0.0, time.time() - self.holder.since)

    def close(self) -> None:
        """Close every fd: the device is unbound if nobody else has it open."""
        for name in ("device", "directory", "lock", "keeper"):
            fd = getattr(self, name)
            if fd is not None:
                setattr(self, name, None)
                with contextlib.suppress(OSError):
                    os.close(fd)


class Slots:
    """Free places in the service manager's fd store; without one there are none and leases die with the daemon."""

    BATCH = 64
    LOW = 16

    def __init__(self, notifier: sd.Notifier) -> None:
        self._notifier = notifier
        self._free: list[socket.socket] = []

    def top_up(self) -> None:
        """Have some free slots ahead of need."""
        if not self._notifier.present or len(self._free) >= self.LOW:
            return
        made = [records.make_slot() for _ in range(self.BATCH)]
        if self._notifier.send("FDSTORE=1\nFDNAME=slot\nFDPOLL=0", [slot.fileno() for slot in made]):
            self._free += made
        else:
            for slot in made:
                slot.close()

    def take(self) -> socket.socket | None:
        """A free slot for one lease."""
        return self._free.pop() if self._free else None

    def give_back(self, slot: socket.socket) -> None:
        """A slot whose lease is over: emptied, free for the next."""
        records.clear(slot.fileno())
        self._free.append(slot)


class Leases:
    """All leases by device name."""

    def __init__(self) -> None:
        self._leases: dict[str, Lease] = {}

    def __len__(self) -> int:
        return len(self._leases)

    def __iter__(self) -> Iterator[Lease]:
        return iter(self._leases.values())

    def get(self, devname: str) -> Lease | None:
        """The lease of that device."""
        return self._leases.get(devname)

    def add(self, lease: Lease) -> None:
        self._leases[lease.binding.devname] = lease
        lease.account.devices += 1

    def drop(self, lease: Lease) -> None:
        """Forget a lease whose device is gone."""
        del self._leases[lease.binding.devname]
        lease.account.devices -= 1

    def of(self, owner: Owner | None) -> Iterator[Lease]:
        """The leases of an owner, all of them for None, in the order of their numbers."""
        mine = (lease for lease in self if owner is None or lease.holder.owner == owner)
        return iter(sorted(mine, key=lambda lease: lease.binding.number))


def stored(fd: int, accounts: Callable[[str], Account]) -> tuple[Lease, int | None] | None:
    """The lease that a slot of the fd store holds and its reply socket; None for an empty slot. ValueError: newer record."""
    found = records.read(fd)
    if found is None:
        return None
    fds: dict[str, Any] = {name: found.fds.steal(index) for index, name in enumerate(found.names)}
    FdSet().close()
    holder = Holder(**found.client)
    keeper = fds.pop("lease", None)
    reply = fds.pop("reply", None)
    if keeper is None:
        keeper, reply = reply, None
    lease = Lease(found.binding, holder, accounts(holder.account), found.lease, {**fds, "keeper": keeper}, ())
    return lease, reply
