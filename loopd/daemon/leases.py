"""Leases: the books of the main process, and their place in the fd store.

A lease is a binding together with what keeps it alive and where its nodes are. Owns the fds of every lease and the
slots. Changes no device: taking one away is a helper's job.
"""

from __future__ import annotations

import contextlib
import enum
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

from loopd.daemon import sd
from loopd.daemon.accounts import Account, Owner
from loopd.kernel.transport import FdSet
from loopd.worker import records
from loopd.worker.devices import Binding, partitions
from loopd.worker.nodes import Client, Node


class Holder(NamedTuple):
    """For whom a lease was made, as the kernel attested then; part of its record. `since`: seconds since 1970.

    `grant` names the directory of loopd's that the nodes are in, with a dot before it where it was made for this lease.
    `by_uid`: it counts for the user, and not for all of the account.
    """

    account: str
    unit: str
    pid: int
    uid: int
    gid: int
    since: float
    id: str | None = None
    grant: str = ""
    deliver: tuple[str, ...] | list[str] = ()
    by_uid: bool = False

    @property
    def owner(self) -> Owner:
        """Who may list and detach: the holder of the directory grant, else the account and uid."""
        granted = self.grant and not self.grant.startswith(".")
        return Owner(f"directory {self.grant}", 0) if granted else Owner(self.account, self.uid)

    @property
    def client(self) -> Client:
        """With whose rights its nodes are made and removed."""
        return Client(self.uid, self.gid, bool(self.grant))


class State(enum.Enum):
    """Where a lease stands. HELD: loopd has let go of the device, and somebody else still has it open."""

    BOUND = "bound"
    RELEASING = "releasing"
    HELD = "held"
    RELEASED = "released"


class Lease:
    """One binding and what belongs to it. The fds are owned here; `lease` says what the keeper fd is.

    `nodes` are those that there are, or, unless `sure`, that there were. `jobs` are done one after the other: two
    helpers at once in one directory would undo each other's work. Only `revoking` (None: it is not done now; True: once
    more) undoes nothing.
    """

    FDS = ("device", "directory", "lock", "keeper", "cgroup")

    __slots__ = (
        *FDS, "account", "again", "binding", "holder", "jobs", "lease", "nodes", "reason", "revoking", "slot",
        "state", "sure", "table", "waiting", "watch", "working",
    )  # fmt: skip

    def __init__(self, binding: Binding, holder: Holder, account: Account, lease: str, fds: dict[str, int]) -> None:
        self.binding = binding
        self.holder = holder
        self.account = account
        self.lease = lease
        self.device = fds.get("device")
        self.directory = fds.get("directory")
        self.lock = fds.get("lock")
        self.keeper = fds.get("keeper")
        self.cgroup = fds.get("cgroup")
        self.nodes: tuple[Node, ...] = ()
        self.sure = False
        self.watch: int | None = None
        self.table: int | None = None
        self.slot: socket.socket | None = None
        self.state = State.BOUND
        self.reason = ""
        self.waiting: list[Callable[[State], None]] = []
        self.jobs: deque[Callable[[], None]] = deque()
        self.working = False
        self.again: set[bool] = set()
        self.revoking: bool | None = None

    @property
    def partitions(self) -> tuple[str, ...]:
        """Names of the partition nodes that are there; of the partitions, where the lease has no directory."""
        if self.directory is None and self.binding.partscan:
            return tuple(partitions(self.binding.devname))
        return tuple(node.name for node in self.nodes if node.name != self.binding.devname)

    @property
    def age(self) -> float:
        """Seconds since it was made, across restarts of the daemon."""
        return max(0.0, time.time() - self.holder.since)

    def close(self) -> None:
        """Close every fd: the device is unbound if nobody else has it open."""
        for name in self.FDS:
            fd = getattr(self, name)
            if fd is not None:
                setattr(self, name, None)
                with contextlib.suppress(OSError):
                    os.close(fd)


class Slots:
    """Places for leases in the service manager's fd store. Without one, leases end with the daemon."""

    BATCH = 64
    LOW = 16
    STORE = 16384
    """FileDescriptorStoreMax= of the unit."""
    MOST = 24576
    """Of more the names would not fit into the environment of the next daemon, and it would not start."""

    def __init__(self, notifier: sd.Notifier, size: int | None = None) -> None:
        """`size` is that of the fd store, where it is known.

        Half of it is used: beyond its size the service manager closes what is sent, and only warns, and a daemon does
        not know of what one before it had sent when it was killed.
        """
        self._notifier = notifier
        self._free: list[socket.socket] = []
        self._count = 0
        self._most = max(1, min(size or self.STORE, self.MOST) // 2 // self.BATCH) * self.BATCH

    @property
    def present(self) -> bool:
        """Whether there is a service manager to keep them."""
        return self._notifier.present

    @property
    def in_use(self) -> float:
        """How much of the fd store is taken, 0 to 1: the last slot is for releases."""
        return (self._count - len(self._free) + 1) / self._most

    def top_up(self) -> None:
        """Have some free slots ahead of need."""
        if not self.present or len(self._free) >= self.LOW or self._count + self.BATCH > self._most:
            return
        made = [records.make_slot() for _ in range(self.BATCH)]
        if self._notifier.send("FDSTORE=1\nFDNAME=slot\nFDPOLL=0", [slot.fileno() for slot in made]):
            self._free += made
            self._count += len(made)
        else:
            for slot in made:
                slot.close()

    def take(self, spare: int = 0) -> socket.socket | None:
        """A free slot for one lease, if `spare` ones are left: a release needs another one for a moment."""
        if len(self._free) <= spare:
            self.top_up()
        return self._free.pop() if len(self._free) > spare else None

    def give_back(self, slot: socket.socket) -> None:
        """A slot whose lease is over: emptied, free for the next."""
        records.clear(slot.fileno())
        self._free.append(slot)

    def known(self) -> None:
        """One more slot came back from the store."""
        self._count += 1


class Leases:
    """All leases by device name."""

    def __init__(self) -> None:
        self._leases: dict[str, Lease] = {}
        self._locked: set[str] = set()

    def __len__(self) -> int:
        return len(self._leases)

    def __iter__(self) -> Iterator[Lease]:
        return iter(self._leases.values())

    @property
    def locks(self) -> int:
        """How many were made to keep the lock against udev."""
        return len(self._locked)

    def get(self, devname: str) -> Lease | None:
        """The lease of that device."""
        return self._leases.get(devname)

    def add(self, lease: Lease) -> None:
        self._leases[lease.binding.devname] = lease
        if lease.lock is not None:
            self._locked.add(lease.binding.devname)
        lease.account.devices += 1
        lease.account.bytes += lease.binding.size

    def replace(self, lease: Lease) -> None:
        """Put a lease in the place of another record of the same device."""
        self._leases[lease.binding.devname] = lease

    def drop(self, lease: Lease) -> None:
        """Forget a lease whose device is gone."""
        del self._leases[lease.binding.devname]
        self._locked.discard(lease.binding.devname)
        lease.account.devices -= 1
        lease.account.bytes -= lease.binding.size

    def of(self, owner: Owner | None) -> Iterator[Lease]:
        """The leases of an owner, all of them for None, in the order of their numbers."""
        mine = (lease for lease in self if owner is None or lease.holder.owner == owner)
        return iter(sorted(mine, key=lambda lease: lease.binding.number))


def stored(slot: socket.socket, account: Callable[[str, int | None], Account]) -> tuple[Lease, int | None] | None:
    """The lease that a slot holds, and its reply socket if that does not keep it; None for an empty slot.

    Raises ValueError for a record of a newer version.
    """
    found = records.read(slot.fileno())
    if found is None:
        return None
    with FdSet(found.fds.values()) as owned:
        holder = Holder(**{name: value for name, value in found.holder.items() if name in Holder._fields})
        fds = dict(found.fds)
        reply = fds.pop("reply", None)
        keeper = fds.pop("lease", None)
        if found.lease == "reply" and reply is not None:
            keeper = owned.add(os.dup(reply))
        if reply is not None and found.version < records.VERSION:
            os.close(owned.steal(list(owned).index(reply)))
            reply = None
        if keeper is not None:
            fds["keeper"] = keeper
        charged = account(holder.account, holder.uid if holder.by_uid else None)
        lease = Lease(found.binding, holder, charged, found.lease, fds)
        owned.release()
    lease.slot = slot
    if found.releasing:
        lease.state = State.HELD
    return lease, reply
