"""Receives the kernel's uevents, and has the flows look at the devices that they are about."""

from __future__ import annotations

import time
from collections.abc import Callable

from loopd.children.flow import start
from loopd.daemon.arrange import Arrangements
from loopd.daemon.books import Books
from loopd.daemon.foreign import Foreign
from loopd.kernel import uevents
from loopd.kernel.poller import ONCE
from loopd.kernel.uevents import Changes

PAUSE = 0.02
"""Seconds in which uevents are gathered: every attach makes some, and hardly one has to be acted on."""
SHARE = 9
"""A client can have the kernel send events of its device without end. So after each look nothing is looked at for this
many times as long as the look took.
"""
SLICE = 16
"""Devices that are looked at before other events get their turn: a client may have hundreds."""


class Uevents:
    """Receives them."""

    def __init__(self, books: Books, foreign: Foreign, arrangements: Arrangements) -> None:
        self._books = books
        self._foreign = foreign
        self._arrangements = arrangements
        self._netlink = uevents.listen()
        books.poller.add(self._netlink.fileno(), lambda: start(self._receive()), ONCE)

    async def _receive(self) -> None:
        """Look at what events have come for, a slice at a time. No others are received before all is looked at."""
        began = time.monotonic()
        try:
            changes = uevents.receive(self._netlink)
            if changes is None:
                self._foreign.look_again()
                changes = self._everything()
            looks: list[tuple[Callable[[str], None], str]] = []
            # These first: the number of a partition that is gone may soon be another's.
            looks += [(self._arrangements.on_partitions, devname) for devname in changes.partitioned]
            looks += [(self._foreign.on_disk, devname) for devname in changes.disks]
            for count, (look, devname) in enumerate(looks, 1):
                look(devname)
                if count % SLICE == 0:
                    await self._books.sleep(SHARE * (time.monotonic() - began))
                    began = time.monotonic()
        finally:
            pause = max(PAUSE, SHARE * (time.monotonic() - began))
            self._books.poller.later(pause, lambda: self._books.poller.rearm(self._netlink.fileno()))

    def _everything(self) -> Changes:
        """Events were lost: something may have happened to every device of a lease."""
        leases = list(self._books.leases)
        partitioned = {lease.binding.devname for lease in leases if lease.binding.partscan or lease.charged}
        return Changes({lease.binding.devname for lease in leases}, partitioned)
