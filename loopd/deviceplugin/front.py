"""What this program asks of loopd, on the administrator's socket.

Changes when loopd's requests do.
"""

from __future__ import annotations

import os
import time
from contextlib import ExitStack, suppress

from loopd.client import api as client
from loopd.client.exchange import parsed
from loopd.protocol import wire
from loopd.protocol.wire import Granted

PATIENCE = 5.0
"""Seconds that a look at loopd may take: one that does not answer makes the devices unhealthy."""
REMADE = 30.0
"""Seconds after its start in which a daemon finds out whether max_loop is in force."""


class Front(client.Client):
    """One loopd."""

    def answers(self) -> bool:
        """Whether it is there. This starts a daemon that is not running, and keeps it running."""
        try:
            type(self)(self.socket, PATIENCE).hello()
        except client.Error:
            return False
        return True

    def make(self, uid: int, name: str, devices: int) -> Granted:
        """A new grant of a user's. Waits until the daemon knows whether kept nodes come back."""
        deadline = time.monotonic() + REMADE
        while True:
            with ExitStack() as stack:
                request = wire.Directory(name, devices=devices, uid=uid)
                granted = parsed(Granted, self._ask(stack, request).fields)
            # Its path is bound into a container, and its numbers get rules of the device cgroup.
            if not os.path.isabs(granted.path) or os.path.basename(granted.path) != f"{uid}-{name}":
                raise client.BadReply(f"{granted.path} is no directory {name} of loopd's")
            if len(granted.numbers) != devices or not all(0 <= number < 1 << 20 for number in granted.numbers):
                raise client.BadReply(f"{granted.numbers} are not the numbers of {devices} devices")
            if granted.remade is not None or time.monotonic() > deadline:
                return granted
            time.sleep(0.1)

    def remove(self, uid: int, name: str) -> None:
        """Remove a grant, if it is there. `Busy` where a device is in it."""
        with ExitStack() as stack, suppress(client.NotFound):
            self._ask(stack, wire.Directory(name, remove=True, uid=uid))

    def end(self, numbers: tuple[int, ...]) -> None:
        """End what is attached by these numbers. A device that is open stays until its last close."""
        names = {f"loop{number}" for number in numbers}
        for lease in self._listed(None):  # a detach of what is not there would be a refusal in the journal
            if lease.devname in names and lease.state == "bound" and not lease.window:  # a window goes with its disk
                with suppress(client.NotFound, client.ImageIncomplete):  # the journal has the second
                    self.detach(lease.devname, force=True, diskseq=lease.diskseq)
