"""Reservations: what a device is given before a worker binds it, for an attach and for a window alike.

Counts the device, and takes a slot and a number. What of these did not become a lease's is given up at the end.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable

from loopd.children.pool import Job
from loopd.daemon.accounts import Account, Owner
from loopd.daemon.books import WARN_AT, Books
from loopd.daemon.counter import Exhausted
from loopd.daemon.exchange import answered
from loopd.daemon.leases import Holder
from loopd.daemon.policy import Limits
from loopd.daemon.slots import Slot
from loopd.kernel.transport import FdSet
from loopd.protocol.wire import Code, Refusal
from loopd.worker.devices import Number
from loopd.worker.messages import Done, NumberPlease, UseNumber

FDS_OF_A_LEASE = 2
"""Keeper and slot; and one for each account."""
SPARE_FDS = 512
"""File descriptors for everything else: children's channels, replies under way, free slots."""


class Reservation:
    """One device of an account's, a slot, a number."""

    def __init__(self, account: Account, person: Owner, limits: Limits) -> None:
        self.account = account
        self.person = person
        self.limits = limits
        self.started = time.monotonic()
        self.holder: Holder | None = None
        self.slot: Slot | None = None
        self.number: Number | None = None
        self.granted: tuple[int, ...] = ()
        """The numbers that the client's directory grant owns, and none but which it gets."""
        self.fresh = False
        """Whether the number was charged to the account's new ones."""
        self.again = True
        """Whether the account may get the number again. Not where the client's directory has a file of that name."""
        self._counted = True
        account.devices += 1

    def uncount(self) -> None:
        """Charge the device no more: it is a lease's now, or there is none."""
        self.account.devices -= self._counted
        self._counted = False


class Reservations:
    """Makes reservations, and ends them."""

    def __init__(self, books: Books, abandon: Callable[[Slot, Account], int | None]) -> None:
        """`abandon` is `Recovery.abandon`."""
        self._books = books
        self._abandon = abandon
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most_fds = limit - min(SPARE_FDS, limit // 2)
        self.under_way = 0

    def make(
        self, account: Account, person: Owner, limits: Limits, granted: tuple[int, ...] = (), *, unsure: bool = False
    ) -> tuple[Reservation, Number | None]:
        """Reserve a device, and its number, one of those `granted` where there are any; without one the worker asks
        when it gets there. `unsure`: what the client has sent may be a grant that owns numbers. Raises Refusal.
        """
        if account.devices >= limits.devices:
            raise Refusal(Code.QUOTA, f"this account has {account.devices} devices, its limit is {limits.devices}")
        self._check_room()
        mine = Reservation(account, person, limits)
        mine.granted = granted
        number = None
        try:
            try:
                number = self._number(mine)
            except Refusal:
                if not unsure:
                    raise
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
        return mine, number

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
                books.warn(what, f"More than {WARN_AT:.0%} of the {what} are used by {count} leases")
            if used >= 1:
                raise Refusal(Code.NO_DEVICE, f"loopd has no more {what}")
        if books.numbers.fresh.few:
            books.warn("few numbers", f"More than {WARN_AT:.0%} of the device numbers are in use or in quarantine")
        if books.pool.no_room is not None:
            books.warn("processes", f"loopd could make no more worker processes (TasksMax=): {books.pool.no_room}")

    # Numbers ----------------------------------------------------------------------------------------------------------

    def _number(self, mine: Reservation) -> Number | None:
        """A number, the reservation's from now on; None when one is about to come free. Raises Refusal."""
        if mine.granted:
            return self._granted_number(mine)
        account, limits, numbers = mine.account, mine.limits, self._books.numbers
        number, none = None, None
        mine.fresh = False

        def fresh() -> bool:
            return account.numbers.spend(limits.new_numbers, limits.new_numbers_per_minute / 60)

        coming = numbers.expects(mine.person)
        try:
            number, mine.fresh = numbers.next(mine.person, fresh)
            self._books.warned.discard("numbers")
        except (Exhausted, OSError) as error:
            account.numbers.unspend()
            coming = coming or numbers.making
            if not coming:
                self._books.warn("numbers", f"There is no new device number: {error}", code=Code.NO_DEVICE.value)
                none = Refusal(Code.NO_DEVICE, "no device number is free; the journal of the host says more")
        if number is not None:
            mine.number = number
        elif not coming:
            limit = f"{limits.new_numbers} and {limits.new_numbers_per_minute:g} a minute"
            raise none or Refusal(Code.QUOTA, f"this account has used up its new device numbers ({limit}); detach some")
        return number

    def _granted_number(self, mine: Reservation) -> Number | None:
        """The same where a grant owns numbers: one of these, and it costs nothing."""
        numbers = self._books.numbers
        mine.fresh = False
        mine.number = numbers.next_of(mine.granted)
        if mine.number is None and not any(numbers.removals.has(number) for number in mine.granted):
            raise _all_in_use(mine.granted)
        return mine.number

    def take_from(self, mine: Reservation, granted: tuple[int, ...]) -> None:
        """What was sent along is a grant. The worker asks for a number of its own ones, so the first goes back."""
        mine.granted = granted
        if not granted or mine.number is None:
            return
        self._books.numbers.put_back(mine.number, mine.person, fresh=mine.fresh)
        if mine.fresh:
            mine.account.numbers.unspend()
        mine.number, mine.fresh = None, False

    async def _another_number(self, mine: Reservation, job: Job) -> Number:
        """Another number where the first one was lost to somebody else, or none was free yet. Raises Refusal."""
        books = self._books
        if mine.number is not None:
            books.metrics.retries += 1
            if mine.fresh:
                mine.account.numbers.unspend()
            # It is removed: it may have been made, and the account may have open a number that it had before. A grant's
            # number comes free for the grant as soon as the device that somebody else has made is gone.
            heir = None if mine.fresh or mine.granted else mine.account.heir(mine.person)
            books.numbers.retire(mine.number.number, heir)
            mine.number = None
        deadline = mine.started + min(books.policy.number_wait, books.policy.request_timeout / 2)
        while True:
            number = self._number(mine)
            if number is not None:
                return number
            if job.answered or time.monotonic() >= deadline:  # its worker has ended, or nobody waits any more
                if mine.granted:
                    raise _all_in_use(mine.granted)
                raise Refusal(Code.TIMEOUT, "no device number came free in time")
            await books.sleep(0.01)

    # The worker -------------------------------------------------------------------------------------------------------

    async def bind(self, mine: Reservation, job: Job) -> tuple[Done, FdSet]:
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

    async def end(self, mine: Reservation, job: Job) -> None:
        """Give up what was reserved and not used, once the worker is done with the job."""
        mine.uncount()
        self.under_way -= 1
        await job.over
        self._give_up(mine)

    def _give_up(self, mine: Reservation) -> None:
        """Give the slot back, and have the number removed: a client may have kept a node of it."""
        mine.uncount()
        if mine.slot is not None:
            slot, mine.slot = mine.slot, None
            left = self._abandon(slot, mine.account)
            if mine.number is not None and left == mine.number.number:
                mine.number = None  # the lease that ends gives it back
        if mine.number is not None:
            self._books.numbers.retire(mine.number.number, mine.account.heir(mine.person) if mine.again else None)
            mine.number = None


def _all_in_use(granted: tuple[int, ...]) -> Refusal:
    """For a client whose grant has no number free."""
    return Refusal(
        Code.QUOTA,
        f"all {len(granted)} device numbers of this directory are in use, a window on a partition has one, too; detach"
        " one, or have the host's administrator make the directory anew with more (loopctl directory --devices)",
    )
