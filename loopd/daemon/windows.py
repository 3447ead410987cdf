"""Windows: loop devices that stand in for the partitions of a disk, for clients that get no nodes of the kernel's.

A window is a lease of its own, which its disk's lease keeps. Each flow here has the turn of the disk's lease.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from loopd.children.flow import start
from loopd.daemon.audit import Event
from loopd.daemon.books import Books
from loopd.daemon.leases import Lease, State
from loopd.daemon.release import Releases
from loopd.daemon.reserve import Reservations
from loopd.protocol.wire import Refusal
from loopd.worker.devices import Extent
from loopd.worker.messages import OpenWindow
from loopd.worker.window import DISK

FIRST_PAUSE, LAST_PAUSE = 1.0, 64.0
"""Seconds until windows that failed are tried again; each time it takes twice as long."""


class Windows:
    """Keeps the windows of a disk in line with its partitions."""

    def __init__(self, books: Books, reservations: Reservations, releases: Releases) -> None:
        self._books = books
        self._reservations = reservations
        self._releases = releases
        self.look: Callable[[Lease], None]
        """Looks at the partitions once more. Set later: the looks need the windows, too."""

    async def arrange(self, disk: Lease, extents: tuple[Extent, ...]) -> Refusal | None:
        """Have one window on each partition; why that is not so in the end. A window stays where its partition has not
        changed. A window that is in use goes at its last close.
        """
        wanted = {extent.name: extent for extent in extents}
        leaving = [window for name, window in disk.windows.items() if not _is_on(window, disk, wanted.get(name))]
        for window in leaving:
            del disk.windows[window.binding.window]
        disk.leaving = [window for window in disk.leaving if window.state is not State.RELEASED] + leaving
        await self._releases.let_go_of(leaving, "gone")
        for name, extent in wanted.items():
            if name in disk.windows or disk.state is not State.BOUND:
                continue
            try:
                await self._open(disk, extent)
            except Refusal as refusal:
                text = f"{name} has no device: {refusal.message}"
                if not disk.told:
                    disk.told = True
                    self._books.record(Event.WARNED, disk, f"has a partition without a device: {text}")
                self._retry(disk)
                return Refusal(refusal.code, text)
        disk.pause = 0.0
        return None

    def _retry(self, disk: Lease) -> None:
        """Try again in a while; one try answers all that has failed before it."""
        if disk.retrying:
            return

        def look() -> None:
            disk.retrying = False
            self.look(disk)

        disk.retrying = True
        disk.pause = min(2 * disk.pause or FIRST_PAUSE, LAST_PAUSE)
        self._books.poller.later(disk.pause, look)

    async def _open(self, disk: Lease, extent: Extent) -> None:
        """Attach a window. Raises Refusal."""
        books, account = self._books, disk.account
        holder = disk.holder._replace(since=time.time(), id=None, deliver=())
        limits = books.terms(holder.account, holder.uid, holder.gid).limits
        mine, number = self._reservations.make(account, holder.person, limits, tuple(holder.numbers))
        assert mine.slot is not None
        message = OpenWindow(disk.binding, extent, number, holder.client, holder._asdict(), mine.slot.row)
        job = await books.submit(disk, message, [disk.slot.fd, mine.slot.fd])
        try:
            done, _ = await self._reservations.bind(mine, job)
            if done.refusal is not None:
                raise done.refusal
            assert done.binding is not None
            window = Lease(done.binding, holder, account, mine.slot, DISK, None)
            window.nodes, window.sure = done.nodes, True
            mine.slot = mine.number = None
            books.leases.add(window)
            disk.adopt(window)
            text = f"was attached as {extent.name}, a window on {disk.binding.devname}"
            books.record(Event.ATTACHED, window, text, operation="attach")
        finally:
            start(self._reservations.end(mine, job))


def _is_on(window: Lease, disk: Lease, extent: Extent | None) -> bool:
    """Whether a window is on that partition, as it is now."""
    if extent is None or window.state is not State.BOUND:
        return False
    binding = window.binding
    return (binding.offset, binding.sizelimit) == (disk.binding.offset + extent.start, extent.size)
