"""Leases: their states, and what the main process knows of each.

A lease is a binding, with what keeps it and where its nodes are. All of its fds are in its slot; the main process has
the keeper alone, which it watches. Changes no device: that is a worker's job.
"""

from __future__ import annotations

import bisect
import contextlib
import enum
import os
import time
from collections.abc import Iterator
from typing import NamedTuple

from loopd.children.flow import Promise, Turns
from loopd.daemon.accounts import NOBODY, Account, Owner, owner_of
from loopd.daemon.slots import Slot
from loopd.worker.devices import Binding
from loopd.worker.nodes import Client, Node


class Holder(NamedTuple):
    """For whom a lease was made, as the kernel attested then; part of its record. `since`: seconds since 1970.

    `grant` names the directory of loopd's that the nodes are in, and begins with a dot where that was made for this
    lease. `by_uid`: the lease is charged to the user, and not to all of the account. `numbers` are the grant's own,
    where it owns any: the device has one of these. `cgroup` is the id of the account's, 0 where it is not known; of a
    record counts the file itself.
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
    numbers: tuple[int, ...] | list[int] = ()
    cgroup: int = 0

    @property
    def owner(self) -> Owner:
        """Who may list and detach: the holder of the directory grant, else the account and uid."""
        granted = self.grant and not self.grant.startswith(".")
        return Owner(f"directory {self.grant}", 0) if granted else self.person

    @property
    def person(self) -> Owner:
        """The account and uid that attached it, also where the nodes are in a grant: numbers are counted for these."""
        return owner_of(self.account, self.uid, self.cgroup)

    @property
    def client(self) -> Client:
        """Whose rights its nodes are made and removed with."""
        return Client(self.uid, self.gid, bool(self.grant))


class State(enum.Enum):
    """Where a lease stands."""

    BOUND = "bound"
    RELEASING = "releasing"
    """loopd is taking away the nodes and the binding."""
    HELD = "held"
    """loopd has let go of the device, and somebody else still has it open."""
    RELEASED = "released"


NEXT = {
    State.BOUND: (State.RELEASING,),
    State.RELEASING: (State.HELD, State.RELEASED),
    State.HELD: (State.RELEASED,),
    State.RELEASED: (),
}
"""What may follow each state."""


class Lease:
    """One binding and what belongs to it. `kept_by` says what the keeper is: "reply", "sender", "pidfd", "socket"; of a
    window it is "disk", the lease of that.

    `nodes` are the nodes of the lease; unless `sure`, others may have been made, or some removed. `names` are the
    partitions, where the lease has no directory. `turn` is for jobs on the lease: two workers at once in one directory
    would undo each other's work. `lost` says why the image lacks what was written. `cleared`: loopd has let go of the
    device once, and the slot has no fds any more.
    """

    __slots__ = (
        "_changed", "account", "binding", "charged", "cleared", "holder", "keeper", "kept_by", "leaving", "lost",
        "names", "nodes", "pause", "reason", "retrying", "revoking", "slot", "state", "sure", "table", "told", "turn",
        "wanted_looks", "watch", "windows",
    )  # fmt: skip

    def __init__(
        self, binding: Binding, holder: Holder, account: Account, slot: Slot, kept_by: str, keeper: int | None
    ) -> None:
        self.binding = binding
        self.holder = holder
        self.account = account
        self.slot = slot
        self.kept_by = kept_by
        self.keeper = keeper
        self.nodes: tuple[Node, ...] = ()
        self.names: tuple[str, ...] = ()
        self.sure = False
        self.cleared = False
        self.watch: int | None = None
        self.table: int | None = None
        self.state = State.BOUND
        self.reason = ""
        self.lost: str | None = None
        self.turn = Turns()
        self.revoking: bool | None = None
        """Closing of nodes: wanted (True), under way (False), neither (None)."""
        self.windows: dict[str, Lease] = {}
        """Its windows, by the names of the partitions."""
        self.leaving: list[Lease] = []
        """Windows on what is a partition no more, which may still be in use."""
        self.pause = 0.0
        """Seconds after which it is tried again to make windows that failed; 0 where none did."""
        self.retrying = False
        """Whether that is due."""
        self.charged = 0
        """Partitions that its account is charged with."""
        self.told = False
        """Whether the administrator was told that partitions have no nodes."""
        self.wanted_looks: set[bool] = set()
        """Looks at its nodes that are due: with a look at the table (True), and without."""
        self._changed: Promise[None] = Promise()

    def adopt(self, window: Lease) -> None:
        """The window is one of this disk's."""
        self.windows[window.binding.window] = window

    def become(self, state: State) -> bool:
        """Change the state, and wake the flows that wait for that; False where `NEXT` does not have it."""
        if state not in NEXT[self.state]:
            return False
        self.state = state
        self.wake()
        return True

    def wake(self) -> None:
        """Something has changed about the lease or its device."""
        changed, self._changed = self._changed, Promise()
        changed.keep(None)

    @property
    def changed(self) -> Promise[None]:
        """Kept at the next change."""
        return self._changed

    @property
    def partitions(self) -> tuple[str, ...]:
        """Names of the partition nodes that are there; of the partitions, where the lease has no directory."""
        if self.binding.windows:
            there = (name for name, window in self.windows.items() if window.state is State.BOUND)
            return tuple(sorted(there, key=lambda name: int(name.rpartition("p")[2])))
        return self.names or tuple(node.name for node in self.nodes if node.name != self.binding.node)

    @property
    def bytes(self) -> int:
        """What its account is charged with: those of a window are the disk's."""
        return 0 if self.binding.window else self.binding.size

    @property
    def age(self) -> float:
        """Seconds since it was made, across restarts of the daemon."""
        return max(0.0, time.time() - self.holder.since)

    def close(self) -> None:
        """Close the keeper: it is not watched any more."""
        keeper, self.keeper = self.keeper, None
        if keeper is not None:
            with contextlib.suppress(OSError):
                os.close(keeper)


class Leases:
    """All leases by device name, and by owner."""

    def __init__(self) -> None:
        self._leases: dict[str, Lease] = {}
        self._numbers: dict[Owner, list[int]] = {}

    def __len__(self) -> int:
        return len(self._leases)

    def __iter__(self) -> Iterator[Lease]:
        return iter(self._leases.values())

    def get(self, devname: str) -> Lease | None:
        """The lease of that device."""
        return self._leases.get(devname)

    def add(self, lease: Lease) -> None:
        """Take a lease into the books, and charge it."""
        self._leases[lease.binding.devname] = lease
        for owner in (lease.holder.owner, _ANYBODY):
            bisect.insort(self._numbers.setdefault(owner, []), lease.binding.number)
        lease.account.devices += 1
        lease.account.bytes += lease.bytes

    def drop(self, lease: Lease) -> None:
        """Forget a lease whose device is gone."""
        del self._leases[lease.binding.devname]
        for owner in (lease.holder.owner, _ANYBODY):
            numbers = self._numbers[owner]
            del numbers[bisect.bisect_left(numbers, lease.binding.number)]
            if not numbers:
                del self._numbers[owner]
        lease.account.devices -= 1
        lease.account.bytes -= lease.bytes
        self.partitioned(lease, 0)

    def resized(self, lease: Lease, binding: Binding) -> None:
        """The device has another size."""
        lease.account.bytes -= lease.bytes
        lease.binding = binding
        lease.account.bytes += lease.bytes

    def partitioned(self, lease: Lease, count: int) -> None:
        """The device has so many partitions."""
        lease.account.partitions += count - lease.charged
        lease.charged = count

    def of(self, owner: Owner | None, after: int, most: int) -> tuple[list[Lease], bool]:
        """The leases of an owner, for None all, in the order of their numbers: `most` of those behind `after`, and
        whether there are more.
        """
        numbers = [] if owner == NOBODY else self._numbers.get(owner or _ANYBODY, [])
        start = bisect.bisect_right(numbers, after)
        found = [self._leases[f"loop{number}"] for number in numbers[start : start + most]]
        return found, len(numbers) > start + most


_ANYBODY = Owner("", -2)
