"""Attach, as the main process sees it: charge, have a worker bind, book, answer.

`Attaches.admit` makes the reservation, and `Attaches.attach` is the flow.
"""

from __future__ import annotations

import contextlib
import time

from loopd.children.flow import start
from loopd.children.pool import Job
from loopd.daemon.audit import Event
from loopd.daemon.books import Books
from loopd.daemon.exchange import Answers, Exchange
from loopd.daemon.leases import Holder, Lease, State
from loopd.daemon.policy import Allow
from loopd.daemon.recovery import attached
from loopd.daemon.release import Releases
from loopd.daemon.reserve import Reservation, Reservations
from loopd.daemon.watches import Watches
from loopd.daemon.windows import Windows
from loopd.protocol.wire import Attach, Code, Refusal
from loopd.worker import records
from loopd.worker.messages import Done, Take, Taken, Terms


class Attaches:
    """Attaches devices."""

    def __init__(
        self, books: Books, answers: Answers, watches: Watches, releases: Releases, reservations: Reservations,
        windows: Windows,
    ) -> None:  # fmt: skip
        self._books = books
        self._answers = answers
        self._watches = watches
        self._releases = releases
        self._reservations = reservations
        self._windows = windows

    def admit(self, exchange: Exchange, request: Attach, job: Take) -> tuple[Take, Reservation]:
        """Charge an attach before anything is allocated, or refuse it; the job of its worker."""
        account, (limits, allow) = exchange.account, exchange.terms
        _check_allowed(request, allow)
        mine, number = self._reservations.make(account, exchange.person, limits, unsure=request.dir_fd is not None)
        assert mine.slot is not None
        sender, member = exchange.sender, exchange.member
        mine.holder = Holder(
            member.account, member.unit, sender.pid, sender.uid, sender.gid, time.time(), request.id, "",
            request.deliver, account.uid is not None, cgroup=exchange.cgroup,
        )  # fmt: skip
        job = job._replace(
            lease=request.lease_fd,
            attach=request if allow.direct_io else request._replace(direct_io="off"),
            terms=Terms(
                allow.file_systems, allow.write, allow.block_devices, allow.mknod, number,
                limits.room(account.partitions), allow.kernel_partitions,
            ),
            holder=mine.holder._asdict(),
            row=mine.slot.row,
        )  # fmt: skip
        return job, mine

    # The flow ---------------------------------------------------------------------------------------------------------

    async def attach(self, exchange: Exchange, mine: Reservation, taken: Taken, job: Job) -> None:
        """From `Taken` to the reply. Raises Refusal."""
        self._reservations.take_from(mine, exchange.numbers)
        done, fds = await self._reservations.bind(mine, job)
        with fds:
            if done.cgroup:
                exchange.cgroup = done.cgroup
                mine.person = exchange.person
                with contextlib.suppress(OSError):  # no room for a watch: the end is noticed later
                    self._books.accounts.watch(exchange.account, fds.steal(0))
            if done.refusal is not None:
                if done.refusal.code in (Code.EXISTS, Code.BUSY):  # its name is taken
                    mine.again = False
                raise done.refusal
            lease = self._book(exchange, mine, taken, done)
            refusal = self._objection(exchange, lease)
            if refusal is not None:
                # Answered first: the reply socket may be what keeps the lease.
                self._answers.send(exchange, refusal)
                start(self._releases.release(lease, "refused"))
                return
            warnings = done.warnings + self._books.partitioned(lease, done.partitions, done.excess)
            if done.extents:
                async with lease.turn:
                    missing = await self._windows.arrange(lease, done.extents)
                warnings += () if missing is None else (missing.message,)
                if lease.state is not State.BOUND:
                    raise Refusal(Code.UNDELIVERABLE, "the lease ended before the device was delivered")
            # Of a daemon that ends between the two notes nobody knows whether it answered: the next one answers again.
            records.note_answer(lease.slot.fd, "sending")
            if self._answers.send(exchange, attached(lease, warnings), tuple(fds)):
                records.note_answer(lease.slot.fd, "sent")
                self._record(exchange, lease)
            else:
                start(self._releases.release(lease, "undeliverable"))
        self._books.numbers.refill()
        with contextlib.suppress(OSError):  # told where one is needed
            self._books.slots.top_up()

    def _book(self, exchange: Exchange, mine: Reservation, taken: Taken, done: Done) -> Lease:
        """Put the lease into the books: it takes over what was reserved."""
        assert exchange.keeper is not None and mine.slot is not None  # noqa: PT018
        assert mine.holder is not None and done.binding is not None  # noqa: PT018
        holder = mine.holder._replace(grant=done.grant, numbers=mine.granted, cgroup=exchange.cgroup)
        keeper = exchange.fds.steal(list(exchange.fds).index(exchange.keeper))
        lease = Lease(done.binding, holder, exchange.account, mine.slot, taken.kept_by, keeper)
        lease.nodes, lease.names, lease.sure = done.nodes, done.names, True
        lease.watch, lease.table = done.watch, done.table
        mine.slot = mine.number = None
        self._books.leases.add(lease)
        mine.uncount()
        return lease

    def _objection(self, exchange: Exchange, lease: Lease) -> Refusal | None:
        """Watch the lease; a refusal where it cannot stay all the same."""
        limit = exchange.terms.limits.bytes
        if lease.account.ended or lease.account.cgroup != exchange.cgroup:
            return Refusal(Code.NOT_PERMITTED, "the sender's cgroup has ended")
        if limit and exchange.account.bytes > limit:
            # Its bytes are not charged while it ends: a smaller device need not wait.
            self._books.leases.resized(lease, lease.binding._replace(size=0))
            return Refusal(Code.QUOTA, f"the devices of this account would have more than {limit} bytes together")
        try:
            self._watches.watch(lease)
        except OSError as error:  # ENOMEM, ENOSPC (max_user_watches of epoll)
            return Refusal(Code.NO_DEVICE, f"the lease cannot be watched: {error}")
        return None

    def _record(self, exchange: Exchange, lease: Lease) -> None:
        duration = time.monotonic() - exchange.started
        self._books.metrics.attached(duration)
        self._books.record(Event.ATTACHED, lease, "was attached", operation="attach", duration_usec=int(duration * 1e6))


def _check_allowed(request: Attach, allow: Allow) -> None:
    """Refuse what the administrator does not allow this client."""
    for permission, asked in (
        ("attach", True),
        ("partscan", request.partscan),
        ("lock", request.lock),
        ("direct_io", request.direct_io == "on"),
    ):
        if asked and not getattr(allow, permission):
            raise Refusal(Code.NOT_PERMITTED, f"the administrator does not allow this client {permission} (loopd.toml)")
    if request.sector_size not in allow.sector_sizes:
        raise Refusal(Code.NOT_PERMITTED, f"sector_size: the administrator allows {sorted(allow.sector_sizes)}")
