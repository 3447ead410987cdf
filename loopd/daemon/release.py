"""The end of a lease, for whatever reason: one flow from the first step to the last.

BOUND -> RELEASING: nothing is watched any more; a worker removes the nodes, then writes back and unbinds
RELEASING -> RELEASED: the kernel has let go of the file
RELEASING -> HELD -> RELEASED: somebody else still has the device open; the kernel unbinds it at the last close
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from loopd.children.flow import start
from loopd.daemon.audit import Event
from loopd.daemon.books import Books
from loopd.daemon.leases import Lease, State
from loopd.daemon.watches import Watches
from loopd.loop import backing_file
from loopd.worker import devices
from loopd.worker.messages import Clear, Displace, Displaced, Unbind, Unbound

HELD_PAUSE = 0.05
"""Seconds after which a device that is still open counts as held: before that it may be udev."""
HELD_CHECK = 5.0
"""Seconds between looks at devices that others keep open, in case a uevent was missed."""

_ENDS = {
    "expired": (Event.EXPIRED, "expired"),
    "unbound": (Event.DETACHED, "was unbound by its client"),
}


class Releases:
    """Ends leases."""

    def __init__(self, books: Books) -> None:
        self._books = books
        self.watches: Watches
        """Set later: the watches need the releases, too."""

    async def release(self, lease: Lease, reason: str) -> None:
        """End a lease: RELEASING to RELEASED. It is charged until the kernel has let go of the file."""
        if not lease.become(State.RELEASING):
            return
        lease.reason = reason
        self.watches.forget(lease)
        async with lease.turn:
            windows = list(lease.windows.values())
            await self.let_go_of(windows, reason)
            bound = await self._let_go(lease)
        lease.lost = next((window.lost for window in windows if window.lost), lease.lost)
        if lease.lost is not None:
            text = f"has lost data: the image lacks what was written to it: {lease.lost}"
            self._books.record(Event.LOST, lease, text, error=lease.lost)
        await self._wait_until_unbound(lease, bound=bound)
        for window in (*windows, *lease.leaving):
            await self._end_of(window, lease)
        await self._finish(lease)

    async def let_go_of(self, windows: Iterable[Lease], reason: str) -> None:
        """End windows. Returns when their nodes are gone; the kernel unbinds them at their last close."""
        ending = list(windows)
        for window in ending:
            start(self.release(window, reason))
        for window in ending:
            while window.state in (State.BOUND, State.RELEASING):
                await self._books.change(window, HELD_CHECK)

    async def _end_of(self, window: Lease, disk: Lease) -> None:
        """Wait until the kernel has let go of a window: its disk is in use until then. The disk's device is free, and
        idle the host could be given it, or a client that has kept its node bind it.
        """
        while window.state is not State.RELEASED:
            if disk.become(State.HELD) or backing_file(disk.binding.number) is None:
                self._books.numbers.removals.hold(disk.binding.number)
            await self._books.change(window, HELD_CHECK)

    async def resume(self, lease: Lease) -> None:
        """Go on with a release of an earlier daemon, which had let go of the device."""
        lease.become(State.RELEASING)
        lease.cleared = lease.sure = True
        if devices.still_bound(lease.binding):
            lease.become(State.HELD)
        await self._wait_until_unbound(lease, bound=True)
        for window in lease.leaving:
            await self._end_of(window, lease)
        await self._finish(lease)

    async def _let_go(self, lease: Lease) -> bool:
        """Have the nodes removed, and then the device unbound. Whether it may still be bound."""
        books, holder = self._books, lease.holder
        job = Displace(lease.binding, holder.client, lease.nodes, lease.sure, holder.grant)
        displaced = await books.work(lease, job)
        if not isinstance(displaced, Displaced):
            lease.sure = False
            return True
        lease.nodes, lease.sure = displaced.nodes, True
        patience = books.policy.write_back_timeout
        unbound = await books.work(lease, Unbind(lease.binding, lease.slot.row, lease.cleared), patience)
        if not isinstance(unbound, Unbound):
            lease.lost = lease.lost or f"the write-back had not ended after {patience:g} seconds"
            return True
        lease.cleared = True
        if unbound.diskseq is not None:
            lease.binding = lease.binding._replace(diskseq=unbound.diskseq)
        lease.lost = unbound.lost or lease.lost
        return unbound.there

    async def _wait_until_unbound(self, lease: Lease, *, bound: bool) -> None:
        """A mounted file system is never pulled away: the kernel unbinds at the last close, and a uevent tells."""
        looked = time.monotonic()
        while bound and devices.still_bound(lease.binding):
            pause = HELD_PAUSE if lease.state is State.RELEASING else HELD_CHECK
            await self._books.change(lease, pause)
            if time.monotonic() - looked < pause or not devices.still_bound(lease.binding):
                continue
            if lease.become(State.HELD):
                self._books.record(Event.HELD, lease, "is still open elsewhere and goes at its last close")
            elif lease.nodes or not lease.cleared or devices.autoclear(lease.binding.devname) is False:
                # Something is left to do, or a client that has the device open has cleared autoclear: then its last
                # close would not unbind.
                bound = await self._let_go(lease)
            looked = time.monotonic()

    async def _finish(self, lease: Lease) -> None:
        books = self._books
        if not lease.cleared:  # the client unbound the device itself meanwhile
            lease.cleared = await books.work(lease, Clear(lease.slot.row)) is not None
        books.leases.drop(lease)
        if lease.cleared:  # else its fds may hang when they are closed, and stay in it
            books.slots.give_back(lease.slot)
        self.retire(lease)
        event, text = _ENDS.get(lease.reason, (Event.DETACHED, "was detached"))
        books.record(event, lease, text)
        lease.become(State.RELEASED)

    def retire(self, lease: Lease) -> None:
        """The lease's number goes, for a client may have kept a node of it. Only the same owner may get it again."""
        self._books.numbers.retire(lease.binding.number, lease.account.heir(lease.holder.person))
