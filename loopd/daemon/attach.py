"""Attach, as the main process sees it: charge, have a worker bind, book, answer.

`Attaches.admit` makes the reservation, `Attaches.attach` is the flow, and `Attaches.end` gives up what of the
reservation did not become the lease's.
"""

from __future__ import annotations

import contextlib
import resource
import time

from loopd.children.flow import start
from loopd.children.pool import Job
from loopd.daemon.audit import Event
from loopd.daemon.books import Books
from loopd.daemon.counter import Exhausted
from loopd.daemon.exchange import Answers, Exchange, answered
from loopd.daemon.leases import Holder, Lease
from loopd.daemon.policy import Allow
from loopd.daemon.recovery import Recovery, attached
from loopd.daemon.release import Releases
from loopd.daemon.slots import Slot
from loopd.daemon.watches import Watches
from loopd.kernel.transport import FdSet
from loopd.protocol.wire import Attach, Code, Refusal
from loopd.worker import records
from loopd.worker.devices import Number
from loopd.worker.messages import Done, NumberPlease, Take, Taken, Terms, UseNumber

FDS_OF_A_LEASE = 2
"""Keeper and slot; and one for each account."""
SPARE_FDS = 512
"""File descriptors for everything else: children's channels, replies under way, free slots."""
WARN_AT = 0.8


class Reservation:
    """What an attach is given before its worker begins: a device of the account's, a slot, a number."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.holder: Holder | None = None
        self.slot: Slot | None = None
        self.number: int | None = None
        self.fresh = False
        """Whether the number was charged to the account's new ones."""
        self.again = True
        """Whether the account may get the number again. Not where the client's directory has a file of that name."""
        self._counted = True
        exchange.account.devices += 1

    def uncount(self) -> None:
        """Charge the device no more: it is a lease's now, or there is none."""
        self.exchange.account.devices -= self._counted
        self._counted = False


class Attaches:
    """Attaches devices."""

    def __init__(
        self, books: Books, answers: Answers, watches: Watches, releases: Releases, recovery: Recovery
    ) -> None:
        self._books = books
        self._answers = answers
        self._watches = watches
        self._releases = releases
        self._recovery = recovery
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most_fds = limit - min(SPARE_FDS, limit // 2)
        self._warned: set[str] = set()
        self.under_way = 0

    # Admit ------------------------------------------------------------------------------------------------------------

    def admit(self, exchange: Exchange, request: Attach, job: Take) -> tuple[Take, Reservation]:
        """Charge an attach before anything is allocated, or refuse it; the job of its worker."""
        account, (limits, allow) = exchange.account, exchange.terms
        _check_allowed(request, allow)
        if account.devices >= limits.devices:
            raise Refusal(Code.QUOTA, f"this account has {account.devices} devices, its limit is {limits.devices}")
        self._check_room()
        mine = Reservation(exchange)
        try:
            number = self._number(mine)
            try:
                mine.slot = self._books.slots.take()
            except OSError as error:  # EMFILE, ENFILE, ENOMEM
                raise Refusal(Code.NO_DEVICE, f"loopd has no room for another device: {error.strerror}") from error
            if mine.slot is None:
                raise Refusal(Code.NO_DEVICE, "the service manager takes no more file descriptors for now")
        except BaseException:
            self._give_up(mine)
            raise
        self.under_way += 1
        sender, member = exchange.sender, exchange.member
        mine.holder = Holder(
            member.account, member.unit, sender.pid, sender.uid, sender.gid, time.time(), request.id, "",
            request.deliver, account.uid is not None, exchange.cgroup,
        )  # fmt: skip
        job = job._replace(
            lease=request.lease_fd,
            attach=request if allow.direct_io else request._replace(direct_io="off"),
            terms=Terms(
                allow.file_systems, allow.write, allow.block_devices, allow.mknod, number,
                limits.room(account.partitions),
            ),
            holder=mine.holder._asdict(),
            row=mine.slot.row,
        )  # fmt: skip
        return job, mine

    def _check_room(self) -> None:
        """Refuse what the daemon itself has no room for, and warn the administrator before that."""
        books = self._books
        count = len(books.leases) + self.under_way
        files = (count + 1) * FDS_OF_A_LEASE + books.accounts.cgroups.files
        for what, used in (
            ("open files (LimitNOFILE=)", files / max(1, self._most_fds)),
            ("places in the fd store (FileDescriptorStoreMax=)", books.slots.in_use),
        ):
            if used > WARN_AT:
                self.warn(what, f"More than {WARN_AT:.0%} of the {what} are used by {count} leases")
            if used >= 1:
                raise Refusal(Code.NO_DEVICE, f"loopd has no more {what}")
        if books.numbers.few:
            self.warn("few numbers", f"More than {WARN_AT:.0%} of the device numbers are in use or in quarantine")
        if books.pool.no_room is not None:
            self.warn("processes", f"loopd could make no more worker processes (TasksMax=): {books.pool.no_room}")

    def warn(self, what: str, text: str, **details: object) -> None:
        """Tell the administrator, once."""
        if what not in self._warned:
            self._warned.add(what)
            self._books.audit.record(Event.WARNED, text, **details)

    # Numbers ----------------------------------------------------------------------------------------------------------

    def _number(self, mine: Reservation) -> Number | None:
        """A number, the reservation's from now on; None when one is about to come free. Raises Refusal."""
        exchange, numbers = mine.exchange, self._books.numbers
        account, limits = exchange.account, exchange.terms.limits
        number, none = None, None
        mine.fresh = False

        def fresh() -> bool:
            return account.numbers.spend(limits.new_numbers, limits.new_numbers_per_minute / 60)

        coming = numbers.expects(exchange.person)
        try:
            number, mine.fresh = numbers.next(exchange.person, fresh)
            self._warned.discard("numbers")
        except (Exhausted, OSError) as error:
            account.numbers.unspend()
            coming = coming or numbers.making
            if not coming:
                self.warn("numbers", f"There is no new device number: {error}", code=Code.NO_DEVICE.value)
                none = Refusal(Code.NO_DEVICE, "no device number is free; the journal of the host says more")
        if number is not None:
            mine.number = number.number
        elif not coming:
            limit = f"{limits.new_numbers} and {limits.new_numbers_per_minute:g} a minute"
            raise none or Refusal(Code.QUOTA, f"this account has used up its new device numbers ({limit}); detach some")
        return number

    async def _another_number(self, mine: Reservation, job: Job) -> Number:
        """Another number where the first one was lost to somebody else, or none was free yet. Raises Refusal."""
        books, exchange = self._books, mine.exchange
        if mine.number is not None:
            books.metrics.retries += 1
            if mine.fresh:
                exchange.account.numbers.unspend()
            # It is removed: it may have been made, and the account may have open a number that it had before.
            books.numbers.retire(mine.number, None if mine.fresh else exchange.account.heir(exchange.person))
            mine.number = None
        deadline = exchange.started + min(books.policy.number_wait, books.policy.request_timeout / 2)
        while True:
            number = self._number(mine)
            if number is not None:
                return number
            if job.answered or time.monotonic() >= deadline:  # its worker has ended, or nobody waits any more
                raise Refusal(Code.TIMEOUT, "no device number came free in time")
            await books.sleep(0.01)

    # The flow ---------------------------------------------------------------------------------------------------------

    async def attach(self, exchange: Exchange, mine: Reservation, taken: Taken, job: Job) -> None:
        """From `Taken` to the reply. Raises Refusal."""
        done, fds = await self._bind(mine, job)
        with fds:
            if done.cgroup:
                exchange.cgroup = done.cgroup
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
            # Of a daemon that ends between the two notes nobody knows whether it answered: the next one answers again.
            records.note_answer(lease.slot.fd, "sending")
            warnings = done.warnings + self._books.partitioned(lease, done.partitions, done.excess)
            if self._answers.send(exchange, attached(lease, warnings), tuple(fds)):
                records.note_answer(lease.slot.fd, "sent")
                self._record(exchange, lease)
            else:
                start(self._releases.release(lease, "undeliverable"))
        self._books.numbers.refill()
        with contextlib.suppress(OSError):  # told where one is needed
            self._books.slots.top_up()

    async def _bind(self, mine: Reservation, job: Job) -> tuple[Done, FdSet]:
        """Have the worker bind and make the nodes. What it says at the end, with its fds. Raises Refusal."""
        while True:
            message, fds = await job.answer()
            if isinstance(message, Done):
                return message, fds
            fds.close()
            assert isinstance(answered(message), NumberPlease)
            try:
                job.send(UseNumber(await self._another_number(mine, job)))
            except Refusal as refusal:
                job.send(UseNumber(None, refusal))

    def _book(self, exchange: Exchange, mine: Reservation, taken: Taken, done: Done) -> Lease:
        """Put the lease into the books: it takes over what was reserved."""
        assert exchange.keeper is not None and mine.slot is not None  # noqa: PT018
        assert mine.holder is not None and done.binding is not None  # noqa: PT018
        holder = mine.holder._replace(grant=done.grant, cgroup=exchange.cgroup)
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

    async def end(self, mine: Reservation, job: Job) -> None:
        """The request is answered: give up what was reserved and not used, once the worker is done with the job."""
        mine.uncount()
        self.under_way -= 1
        await job.over
        self._give_up(mine)

    def _give_up(self, mine: Reservation) -> None:
        """Give the slot back, and have the number removed: a client may have kept a node of it."""
        mine.uncount()
        if mine.slot is not None:
            slot, mine.slot = mine.slot, None
            if self._recovery.abandon(slot, mine.exchange.account) == mine.number:
                mine.number = None  # the lease that ends gives it back
        if mine.number is not None:
            heir = mine.exchange.account.heir(mine.exchange.person) if mine.again else None
            self._books.numbers.retire(mine.number, heir)
            mine.number = None


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
