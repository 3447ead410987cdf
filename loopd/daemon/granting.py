"""Directory grants, as the main process sees them: made with device numbers of their own, removed, listed, looked at.

The numbers are kept with the directories, by the workers; the main process keeps no list of them.
"""

from __future__ import annotations

from typing import Any

from loopd.children.flow import start
from loopd.children.pool import Job
from loopd.daemon.accounts import Bucket
from loopd.daemon.audit import Event
from loopd.daemon.books import Books
from loopd.daemon.counter import BLOCK, Exhausted
from loopd.daemon.exchange import Exchange, answered
from loopd.daemon.operations import LISTED_PER_SECOND
from loopd.protocol import wire
from loopd.protocol.wire import Code, Directories, Directory, Refusal, Reply
from loopd.worker.messages import Change, Changed, Inspect, Inspected, NumbersPlease, Survey, Surveyed, UseNumbers

DAY = 86400.0
"""Seconds between looks at the numbers of all grants: less than a quarantine takes."""
MOST_BYTES = 1024
"""Of a row in the reply to ``directories``."""


def job_of(exchange: Exchange, request: Directory | Directories) -> Change | Survey:
    """What a worker is to do for a request about grants. Raises Refusal."""
    uid = exchange.sender.uid
    if isinstance(request, Directory):
        if request.uid is not None:
            if not exchange.admin:
                raise Refusal(Code.NOT_PERMITTED, "uid: for the administrator, on the admin socket")
            uid = request.uid
        return Change(uid, request.name, request.remove, request.devices, exchange.admin)
    return Survey(None if exchange.admin else uid, request.after, exchange.admin)


class Granting:
    """Makes, removes and lists grants."""

    def __init__(self, books: Books) -> None:
        self._books = books
        self._users: dict[int, Bucket] = {}
        """The numbers that the grants of each user but root have taken: a user has a new account with each login."""

    @property
    def burning(self) -> bool:
        """Whether what a user has taken just now counts still: forgotten, the user could go on at once."""
        return any(bucket.spent for bucket in self._users.values())

    async def perform(self, exchange: Exchange, asked: Change | Survey, job: Job) -> Reply:
        """From the worker's first message to the reply. Raises Refusal."""
        reserved: tuple[int, ...] = ()
        while isinstance(message := answered(await job.done()), NumbersPlease):
            try:
                reserved = self._reserve(exchange, message.wanted)
                job.send(UseNumbers(reserved))
            except Refusal as refusal:
                job.send(UseNumbers((), refusal))
        numbers = self._books.numbers
        if isinstance(message, Surveyed):
            return await self._listed(exchange, message)
        if not isinstance(message, Changed):
            # It may have written the numbers down: nobody gets them, and they stay charged.
            raise message.refusal
        if isinstance(asked, Change) and asked.remove:
            numbers.fresh.keep(message.numbers)  # they rest
            return wire.Granted(message.path, (), numbers.remade)
        if reserved and message.numbers != reserved:  # another request made the directory meanwhile
            numbers.fresh.put_back(reserved)
            self._unspend(exchange, len(reserved))
        return wire.Granted(message.path, message.numbers, numbers.remade)

    def _reserve(self, exchange: Exchange, count: int) -> tuple[int, ...]:
        """Numbers for a new grant, charged to the account: one that makes and removes grants would use up all. The
        administrator may: a device plugin of Kubernetes makes a grant for each container.
        """
        limits = exchange.terms.limits
        if not exchange.admin and not self._spend(exchange, count):
            limit = f"{limits.new_numbers} and {limits.new_numbers_per_minute:g} a minute"
            reason = f"a directory with {count} device numbers is more than this account may have now: {limit}"
            raise Refusal(Code.QUOTA, reason)
        try:
            return self._books.numbers.fresh.take_some(count)
        except (Exhausted, OSError) as error:
            self._unspend(exchange, count)
            text = f"There are no {count} new device numbers for a directory: {error}"
            self._books.audit.record(Event.WARNED, text, code=Code.NO_DEVICE.value)
            reason = f"no {count} device numbers are free; the journal of the host says more"
            raise Refusal(Code.NO_DEVICE, reason) from error

    def _spend(self, exchange: Exchange, count: int) -> bool:
        """Charge the user and the account."""
        burst, a_second = exchange.terms.limits.new_numbers, exchange.terms.limits.new_numbers_per_minute / 60
        self._users = {uid: bucket for uid, bucket in self._users.items() if bucket.spent}
        user = Bucket() if exchange.sender.uid == 0 else self._users.setdefault(exchange.sender.uid, Bucket())
        if not user.spend(burst, a_second, count):
            return False
        if not exchange.account.numbers.spend(burst, a_second, count):
            user.unspend(count)
            return False
        return True

    def _unspend(self, exchange: Exchange, count: int) -> None:
        if not exchange.admin:
            exchange.account.numbers.unspend(count)
            self._users.get(exchange.sender.uid, Bucket()).unspend(count)

    async def _listed(self, exchange: Exchange, found: Surveyed) -> wire.GrantList:
        listing = exchange.account.listing
        await listing.take()
        self._books.poller.later(len(found.grants) * MOST_BYTES / LISTED_PER_SECOND, listing.give)
        return wire.GrantList(found.grants, found.more)

    # All grants -------------------------------------------------------------------------------------------------------

    async def inspect(self) -> None:
        """Look at the numbers that grants own."""
        books = self._books

        def stuck() -> None:
            books.audit.record(Event.STUCK, "The directory grants cannot be looked at: they are locked")

        job = Job(Inspect(BLOCK), [], books.policy.request_timeout, books.accounts.get("").jobs, stuck)
        self.inspected(await books.pool.submit(job).done())

    def inspected(self, answer: Any) -> None:
        """See to it that no number of a grant is handed out again while the grant is there, nor left idle, where the
        host's losetup would find it and a client may have its node. A grant may have been made through any instance.
        """
        self._books.poller.later(DAY, lambda: start(self.inspect()))
        if not isinstance(answer, Inspected):
            return
        numbers = self._books.numbers
        numbers.fresh.keep(answer.blocks)
        for number in answer.idle:
            if number not in numbers.granted and not numbers.removals.has(number):
                numbers.retire(number, None)
