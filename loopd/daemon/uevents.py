"""The kernel's uevents: each tells one of the flows that something happened to a device."""

from __future__ import annotations

import time

from loopd.children.flow import start
from loopd.daemon.arrange import Arrangements
from loopd.daemon.foreign import Foreign
from loopd.kernel import uevents
from loopd.kernel.poller import ONCE, Poller

PAUSE = 0.02
"""Seconds in which uevents are gathered: every attach makes some, and hardly one has to be acted on."""
SHARE = 9
"""Whoever has a device can have the kernel tell of it without end: so much longer than it takes to look, nothing is
looked at.
"""


class Uevents:
    """Receives them."""

    def __init__(self, poller: Poller, foreign: Foreign, arrangements: Arrangements) -> None:
        self._poller = poller
        self._foreign = foreign
        self._arrangements = arrangements
        self._netlink = uevents.listen()
        poller.add(self._netlink.fileno(), self._receive, ONCE)

    def _receive(self) -> None:
        began = time.monotonic()
        try:
            changes = uevents.receive(self._netlink)
            if changes is None:
                start(self._foreign.look_at_all())
                self._arrangements.look_at_all()
                return
            for devname, sequence in changes.disks.items():
                self._foreign.on_disk(devname, sequence)
            for devname in changes.partitioned:
                self._arrangements.on_partitions(devname)
        finally:
            pause = max(PAUSE, SHARE * (time.monotonic() - began))
            self._poller.later(pause, lambda: self._poller.rearm(self._netlink.fileno()))
