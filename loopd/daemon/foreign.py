"""Devices in loopd's range that are no lease's: bound by somebody else, or kept open so that they cannot be removed.

Most likely a client kept a node, and opening that made the device again (no max_loop). Such a device is charged to the
account that had its number last, and reported. It is never unbound: nothing proves whose it is, and it may be the
host's own.
"""

from __future__ import annotations

import time

from loopd.children.flow import start
from loopd.children.pool import Job
from loopd.daemon.accounts import Account
from loopd.daemon.audit import Event
from loopd.daemon.books import Books
from loopd.daemon.leases import Lease, State
from loopd.daemon.numbers import ours
from loopd.daemon.release import Releases
from loopd.loop import backing_file
from loopd.worker import devices
from loopd.worker.bindings import Bindings
from loopd.worker.make import is_parked
from loopd.worker.messages import Nudge

CHECK = 1.0
"""Seconds after which a device that was bound must be a lease's."""
LOOK_AGAIN = 5.0
"""Seconds between looks at devices that others keep open, in case a uevent was missed."""


class Foreign:
    """Looks at devices that the kernel tells of, and charges those that are no lease's."""

    def __init__(self, books: Books, releases: Releases, bindings: Bindings) -> None:
        self._books = books
        self._releases = releases
        self._bindings = bindings
        self._charged: dict[str, Account] = {}
        self._reported: set[str] = set()
        self._suspects: dict[str, tuple[tuple[str, int | None] | None, float]] = {}
        self._looks: set[str] = set()
        self._nudged: set[str] = set()
        self._looking = False
        self._told_remade = False

    def on_disk(self, devname: str) -> None:
        """The kernel says that something changed about a disk."""
        if not ours(devname):
            # Perhaps the host bound one of the devices that are kept free for it.
            self._books.numbers.keep_low_free()
            return
        lease = self._books.leases.get(devname)
        if lease is not None and lease.state is not State.BOUND:
            lease.wake()
            return
        if lease is not None:
            self._look_at_lease(lease)
            # The kernel tells of another file (LOOP_CHANGE_FD) before the device has it.
            self._look_later(devname)
            return
        if self._books.numbers.removals.has(int(devname[4:])):
            self._books.numbers.removals.retry()
        # An attach that is under way binds its device before the lease is in the books.
        self._look_later(devname)

    def on_number(self, lingering: int | None) -> None:
        """The child that makes and removes numbers has answered; the number that lingers, if one does."""
        numbers = self._books.numbers
        if lingering is not None:
            # A client may have bound it, with an event that came while there still was a lease.
            self._look_later(f"loop{lingering}")
        for devname in [name for name in self._charged if not numbers.removals.has(int(name[4:]))]:
            if devname not in self._reported:
                self._discharge(devname)
        if numbers.remade and not self._told_remade:
            self._told_remade = True
            self._books.audit.record(
                Event.WARNED,
                "Opening a kept node of a removed loop device makes the device again: set loop.max_loop=8 (modprobe.d,"
                " or the kernel's command line where loop is built in)",
            )
        self.look_after()

    def look_after(self) -> None:
        """Look again now and then, as long as others keep devices open or numbers are being removed."""
        removals = self._books.numbers.removals
        if not self._looking and (removals.lingering or removals.under_way):
            self._looking = True
            self._books.poller.later(LOOK_AGAIN, self._look_after)

    def _look_after(self) -> None:
        self._looking = False
        if self._books.numbers.renew_if_hung():
            self._books.audit.record(Event.STUCK, "The process that removes device numbers hangs, and is replaced")
        self.look_again()

    def look_again(self) -> None:
        """Look at what is no lease's."""
        self._books.numbers.removals.retry()
        for devname in self._charged:
            self._look_later(devname)
        self.look_after()

    def _look_at_lease(self, lease: Lease) -> None:
        """End a lease whose device does not carry its binding any more: its client has unbound it."""
        if lease.state is State.BOUND and not devices.still_bound(lease.binding):
            start(self._releases.release(lease, "unbound"))

    # One device -------------------------------------------------------------------------------------------------------

    def _look_later(self, devname: str) -> None:
        if devname not in self._looks:
            self._looks.add(devname)
            self._books.poller.later(CHECK, lambda: self._look(devname))

    def _look(self, devname: str) -> None:
        """Report a binding of one of this instance's numbers that is not of its making."""
        self._looks.discard(devname)
        number = int(devname[4:])
        file, lease = backing_file(number), self._books.leases.get(devname)
        if lease is not None:
            self._look_at_lease(lease)
        if file is None or lease is not None:
            self._discharge(devname)
            return
        if not self._books.numbers.used(number):
            return
        diskseq, now = devices.sequence(devname), time.monotonic()
        before, since = self._suspects.get(devname, (None, now))
        seen = (file, diskseq)
        if is_parked(devname, file):
            if devices.autoclear(devname) is False:
                start(self._nudge(number, diskseq))
            if before is not None:
                self._charge(devname)
            elif devname not in self._charged:  # udev has it open for a moment, most likely
                self._suspects[devname] = (seen, now)
                self._look_later(devname)
            return
        if devname in self._reported:
            return
        # It may be of an attach that is not in the books yet, and is there at the next look. A number that lingers is
        # of none.
        maybe = before is None or (before != seen and not self._books.numbers.removals.has(number))
        if maybe and now - since < self._books.policy.request_timeout:
            self._suspects[devname] = (seen, since)
            self._look_later(devname)
            return
        self._report(devname, number, file, diskseq)

    def _report(self, devname: str, number: int, file: str, diskseq: int | None) -> None:
        del self._suspects[devname]
        if self._bindings.elsewhere(number, diskseq):
            return
        self._reported.add(devname)
        account = self._charge(devname)
        owner = self._books.numbers.had(number)
        text = f"{devname} is bound to {file}, and not by loopd: a client may have kept its node; it is left as it is"
        self._books.audit.record(
            Event.FOREIGN, text, device=devname, number=number, backing_file=file,
            account=account.name or None, uid=owner.uid if owner else None,
        )  # fmt: skip

    def _charge(self, devname: str) -> Account:
        """Charge a device that is no lease's to the account that had its number last."""
        account = self._charged.get(devname)
        if account is None:
            account = self._charged[devname] = self._last_account(int(devname[4:]))
            account.devices += 1
        return account

    def _last_account(self, number: int) -> Account:
        """The account that had the number last; nobody's where that is not remembered."""
        return self._books.accounts.last(self._books.numbers.had(number))

    def _discharge(self, devname: str) -> None:
        self._suspects.pop(devname, None)
        account = self._charged.pop(devname, None)
        if account is not None:
            account.devices -= 1
        if devname in self._reported:
            self._reported.discard(devname)
            self._books.numbers.retire(int(devname[4:]), None)

    async def _nudge(self, number: int, diskseq: int | None) -> None:
        """Have a parked device unbound whose opener has cleared autoclear: it would stay for ever."""
        devname = f"loop{number}"
        if devname in self._nudged:
            return
        self._nudged.add(devname)
        account = self._last_account(number)

        def hangs() -> None:
            text = f"A worker process hangs in {devname}: it was killed, and is charged until it ends"
            self._books.audit.record(Event.STUCK, text, device=devname, number=number, account=account.name or None)

        async with account.turns:
            job = Job(Nudge(number, diskseq), [], self._books.policy.request_timeout, account.jobs, hangs)
            await self._books.pool.submit(job).over
        self._nudged.discard(devname)
