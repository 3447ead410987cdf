"""After a start: carry on the leases that an earlier daemon left in the slots, and tidy up behind it.

A lease whose attach was not answered is undone: its client sees the hang-up and asks again. A binding that is in no
slot is found in the table of bindings, and released.
"""

from __future__ import annotations

import contextlib
import socket
import time
from typing import Any

from loopd.children.flow import start
from loopd.children.pool import Job
from loopd.daemon.accounts import Account
from loopd.daemon.arrange import Arrangements
from loopd.daemon.audit import Event
from loopd.daemon.books import Books
from loopd.daemon.counter import BLOCK
from loopd.daemon.granting import Granting
from loopd.daemon.leases import Holder, Lease
from loopd.daemon.release import Releases
from loopd.daemon.slots import Slot
from loopd.daemon.watches import Watches
from loopd.kernel import cgroups, transport
from loopd.kernel.transport import FdSet
from loopd.protocol import wire
from loopd.worker import devices, records
from loopd.worker.bindings import Bindings, Row
from loopd.worker.messages import Sweep, Tidied, Tidy
from loopd.worker.records import Stored

PAUSE = 0.05
"""Seconds after the start before what is left is tidied up: the client that started the daemon is served first."""


class Recovery:
    """Done once, at the start. `abandon` does the same for one attach whose worker was killed."""

    def __init__(
        self, books: Books, watches: Watches, releases: Releases, arrangements: Arrangements, bindings: Bindings,
        granting: Granting,
    ) -> None:  # fmt: skip
        self._books = books
        self._watches = watches
        self._releases = releases
        self._arrangements = arrangements
        self._bindings = bindings
        self._granting = granting
        self._started = time.time()
        self._found: list[tuple[Lease, Stored, dict[str, int]]] = []
        self._unread: list[socket.socket] = []

    # Slots ------------------------------------------------------------------------------------------------------------

    def read(self, slot: socket.socket) -> None:
        """Take over a slot of the fd store, and put its lease into the books."""
        slots = self._books.slots
        try:
            stored = records.read(slot.fileno())
            holder = stored and _holder(stored)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            # Most likely a newer loopd wrote it, before a downgrade: it stays in the store, and its device stays bound.
            self._unread.append(slot)
            slots.came_back_unread()
            text = f"A lease in the fd store cannot be read and is kept as it is: {error}"
            self._books.audit.record(Event.WARNED, text)
            return
        if stored is None or holder is None:
            slots.came_back(slot)
            return
        lease, fds = self._lease(stored, holder, slots.came_back_with(slot, stored.row))
        self._found.append((lease, stored, fds))

    def _lease(
        self, stored: Stored, holder: Holder, slot: Slot, account: Account | None = None
    ) -> tuple[Lease, dict[str, int]]:
        """Put the lease into the books. The lease, and the other fds of its record, which are the caller's."""
        binding = stored.binding
        size = devices.size(binding.devname)
        if size is not None:  # it may have been resized
            binding = binding._replace(size=size)
        fds = dict(stored.fds)
        uid = holder.uid if holder.by_uid else None
        account = account or self._books.accounts.get(holder.account, holder.cgroup, uid)
        lease = Lease(binding, holder, account, slot, stored.kept_by, fds.pop("keeper", None))
        self._books.leases.add(lease)
        if holder.numbers:
            self._books.numbers.granted.add(binding.number)
        return lease, fds

    def abandon(self, slot: Slot, account: Account) -> int | None:
        """Free a slot whose attach failed. None where the slot was empty.

        A worker may have written the record and made nodes before it was killed, or could not remove the nodes. Then
        the slot has a lease, which is released, and its number with it: that number.
        """
        stored = records.read(slot.fd)
        if stored is None:
            self._books.slots.give_back(slot)
            return None
        lease, fds = self._lease(stored, _holder(stored), slot, account)
        events = fds.pop("cgroup", None)
        if events is not None:
            with contextlib.suppress(OSError):  # no room for a watch
                self._books.accounts.watch(lease.account, events)
        FdSet(fds.values()).close()
        start(self._releases.release(lease, "failed"))
        return lease.binding.number

    # Going on ---------------------------------------------------------------------------------------------------------

    def go_on(self) -> None:
        """Go on with every lease that was found, and tidy up after a daemon that died."""
        # Accounts first: where one ended meanwhile all of its leases end.
        for lease, _, fds in self._found:
            events = fds.pop("cgroup", None)
            if events is not None:
                try:
                    self._books.accounts.watch(lease.account, events)
                except OSError as error:
                    account = lease.holder.account
                    text = f"The end of {account} cannot be watched: {error}"
                    self._books.audit.record(Event.WARNED, text, account=account)
        found, self._found = self._found, []
        released = {lease.binding.devname for lease, stored, _ in found if stored.released}
        # Windows first: what becomes of a disk is about its windows, too.
        for lease, stored, fds in sorted(found, key=lambda lease: not lease[0].binding.window):
            with FdSet(fds.values()):
                if lease.binding.window and not stored.released:
                    self._carry_on_window(lease, stored, released)
                else:
                    disk = self._books.leases.get(lease.binding.disk)
                    if disk is not None:
                        disk.leaving.append(lease)
                    self._carry_on(lease, stored, fds.get("reply", lease.keeper))
        with contextlib.suppress(OSError):  # an attach that needs a slot is told
            self._books.slots.top_up()
        numbers = self._books.numbers
        numbers.sweep({lease.binding.number for lease in self._books.leases})
        numbers.keep_low_free()
        known = {lease.slot.row for lease in self._books.leases}
        carried_on = {lease.binding.number for lease in self._books.leases}
        found_rows = [row for row in self._bindings.rows() if row.row not in known]
        rows = tuple(row for row in found_rows if row.number not in carried_on)
        self._books.slots.keep_rows(row.row for row in rows)
        # A binding may belong to a lease that cannot be read.
        left = () if self._unread else rows
        self._books.poller.later(PAUSE, lambda: start(self._tidy(left)))
        self._books.poller.later(PAUSE, numbers.probe)

    def _carry_on(self, lease: Lease, stored: Stored, reply: int | None) -> None:
        if stored.released:
            start(self._releases.resume(lease))
        elif not stored.bound or not stored.answer:
            start(self._releases.release(lease, "failed"))
        elif lease.account.ended:
            start(self._releases.release(lease, "expired"))
        elif not devices.still_bound(lease.binding):
            start(self._releases.release(lease, "unbound"))
        else:
            with contextlib.suppress(OSError):  # no room for a watch: the lease ends with its account, or by detach
                self._watches.watch(lease)
            if stored.answer == "sending":
                self._answer_again(lease, reply)
            start(self._arrangements.restore(lease))

    def _carry_on_window(self, window: Lease, stored: Stored, released: set[str]) -> None:
        """The window goes on with its disk; without the disk it ends."""
        disk = self._books.leases.get(window.binding.disk)
        if (
            disk is None
            or disk.binding.devname in released
            or window.binding.window in disk.windows  # the first of two was let go of, and the worker that did so hung
            or not (stored.bound and devices.still_bound(window.binding))
        ):
            start(self._releases.release(window, "failed"))
        else:
            disk.adopt(window)
            start(self._arrangements.restore(window))  # a worker may have been killed between the bind and the node

    def _answer_again(self, lease: Lease, reply: int | None) -> None:
        """Answer an attach once more: the daemon ended just when it answered. A client that has the answer ignores
        this.

        An answer with fds is not given again: the main process opens no client's device.
        """
        records.note_answer(lease.slot.fd, "sent")
        if reply is not None and not set(lease.holder.deliver) & {"fd", "mount"}:
            transport.reply(reply, wire.encode_reply(attached(lease), lease.holder.id))

    async def _tidy(self, rows: tuple[Row, ...]) -> None:
        """Have bindings released that are in no slot, and nodes removed that are left in loopd's own directories. A
        worker does it: clients may keep these locked.
        """

        # All at once: one that hangs keeps no other bound.
        for row, job in [(row, self._by_worker(Tidy(row))) for row in rows]:
            self._tidied(row, await job.done())
        found = await self._by_worker(Sweep(tuple(row.number for row in rows), self._started, BLOCK)).done()
        # A number that lingered because its device was bound can go now.
        self._books.numbers.removals.retry()
        self._granting.inspected(found)

    def _tidied(self, row: Row, answer: Any) -> None:
        if not isinstance(answer, Tidied):
            return
        self._books.slots.free_rows([row.row])
        if answer.file is not None:
            devname = f"loop{row.number}"
            text = f"{devname} on {answer.file} was released: loopd had bound it, and its lease is lost"
            self._books.audit.record(
                Event.EXPIRED, text, device=devname, number=row.number, backing_file=answer.file, reason="lost",
                error=answer.lost,
            )  # fmt: skip

    def _by_worker(self, message: Tidy | Sweep) -> Job:
        def stuck() -> None:
            self._books.audit.record(Event.STUCK, "What an earlier daemon left cannot be removed: it is locked")

        nobody = self._books.accounts.get("")
        job = Job(message, [], self._books.policy.request_timeout, nobody.jobs, stuck)
        return self._books.pool.submit(job)


def _holder(stored: Stored) -> Holder:
    """The holder of a record; TypeError where something is missing."""
    holder = Holder(**{name: value for name, value in stored.holder.items() if name in Holder._fields})
    events = stored.fds.get("cgroup")
    return holder if events is None else holder._replace(cgroup=cgroups.identity(events))


def attached(lease: Lease, warnings: tuple[str, ...] = ()) -> wire.Attached:
    """The reply to the attach that made a lease."""
    binding = lease.binding
    return wire.Attached(
        binding.devname,
        binding.diskseq,
        binding.major,
        binding.minor,
        binding.size,
        binding.sector_size,
        binding.read_only,
        binding.direct_io,
        lease.partitions,
        warnings,
    )
