"""Numbers: which device number the next binding gets, made ahead of need, and what becomes of a used one.

A number is fresh, or the same owner had it before: nodes of it are kept by that owner, if by anybody. A used number is
removed at once: idle, LOOP_CTL_GET_FREE could give it to the host. The numbers of a directory grant are never fresh and
never an owner's: what attaches through the grant has them alone.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import time
from collections import deque
from collections.abc import Callable, Iterable

from loopd import loop as lo
from loopd.children.child import Children, Role
from loopd.daemon.accounts import Owner
from loopd.daemon.counter import BLOCK, Counter, Exhausted, Fresh
from loopd.daemon.maker import Maker
from loopd.worker.devices import Number
from loopd.worker.make import FIRST, THREADS


def ours(devname: str) -> bool:
    """Whether the device is in loopd's range."""
    return int(devname[4:]) >= FIRST


class Removals:
    """Used numbers that are being removed, and those that linger: somebody has their device open."""

    SILENCE = 5.0
    """Seconds without an answer after which all threads of the child hang."""
    STUBBORN = 8
    """Numbers that a thread hung in before which are tried at the same time: other threads stay for the others."""

    def __init__(self, send: Callable[[str, int], None]) -> None:
        self.under_way: dict[int, Owner | None] = {}
        self.lingering: dict[int, Owner | None] = {}
        self.stopping = False
        self._send = send
        self._stubborn: set[int] = set()
        self._heard = 0.0

    @property
    def hang(self) -> bool:
        """Whether a child with something to do has said nothing for `SILENCE`."""
        return self._at_work and time.monotonic() - self._heard > self.SILENCE

    @property
    def _at_work(self) -> bool:
        """Whether there are numbers to remove that no thread hung in before."""
        return len(self.under_way) > len(self._stubborn & self.under_way.keys())

    def has(self, number: int) -> bool:
        """Whether the number is being removed, or cannot be because somebody has it open."""
        return number in self.under_way or number in self.lingering

    def owner(self, number: int) -> Owner | None:
        """The owner that had the number."""
        return self.under_way.get(number) or self.lingering.get(number)

    def owners(self, but: set[int]) -> set[Owner | None]:
        """The owners whose numbers are not removed yet, `but` these numbers."""
        leaving = (*self.under_way.items(), *self.lingering.items())
        return {owner for number, owner in leaving if number not in but}

    def forget(self, account: str) -> None:
        """Nobody gets the numbers of this account again."""
        for leaving in (self.under_way, self.lingering):
            leaving |= {number: None for number, owner in leaving.items() if owner and owner.account == account}

    def begin(self, number: int, owner: Owner | None) -> None:
        """Remove a number."""
        if not self._at_work:
            self._heard = time.monotonic()
        self.under_way[number] = owner
        self.ask(number)

    def hold(self, number: int) -> None:
        """Have the device of a used number parked until the number is removed."""
        self._send("hold", number)

    def ask(self, number: int) -> None:
        """Have the child remove a number that is under way."""
        self._send("remove last" if self.stopping else "remove", number)

    def heard(self, number: int) -> None:
        """The child has answered."""
        self._heard = time.monotonic()
        self._stubborn.discard(number)

    def done(self, number: int, error: int, *, last: bool) -> Owner | None:
        """The child has tried. The owner that may get the number again, if it is removed now."""
        if number not in self.under_way:
            return None
        owner = self.under_way.pop(number)
        if error != errno.EBUSY:
            return owner
        if self.stopping and not last:
            self.begin(number, owner)
        else:
            self.lingering[number] = owner
        return None

    def retry(self) -> None:
        """Try again to remove the numbers that linger."""
        lingering, self.lingering = self.lingering, {}
        for number, owner in lingering.items():
            if number in self._stubborn and len(self._stubborn & self.under_way.keys()) >= self.STUBBORN:
                self.lingering[number] = owner
            else:
                self.begin(number, owner)

    def set_aside(self) -> None:
        """All threads of the child hang, in the numbers that were asked for first: somebody may keep these locked."""
        for number in [*self.under_way][:THREADS]:
            self._stubborn.add(number)
            self.lingering[number] = self.under_way.pop(number)

    def ask_again(self) -> None:
        """There is a new child."""
        self._heard = time.monotonic()
        for number in self.under_way:
            self.ask(number)


class Numbers:
    """The next number, and what becomes of a used one."""

    AHEAD = 8
    """Numbers made ahead of need."""
    KEPT = 4096
    """Owners whose used numbers are remembered. Beyond that, the numbers of the first owner are forgotten, and given to
    nobody.
    """

    def __init__(self, counter: Counter, children: Children, role: Role, changed: Callable[[int | None], None]) -> None:
        """`changed` is called when there is something to remove, and after each answer, with a number that lingers."""
        self._counter = counter
        self._changed = changed
        self.fresh = Fresh(counter)
        self._made: deque[int] = deque()
        self._making: set[int] = set()
        self._used: dict[Owner, deque[int]] = {}
        self.granted: set[int] = set()
        """Numbers of grants that are in use, up to the moment at which their device is gone."""
        self.remade: bool | None = None
        """Whether opening a kept node of a removed device makes the device again; None when it is not known."""
        self._maker = Maker(children, role, self._heard, self._renewed)
        self.removals = Removals(self._maker.send)

    # The child --------------------------------------------------------------------------------------------------------

    def _heard(self, operation: str, number: int, error: int) -> None:
        self.removals.heard(number)
        if operation == "probe":
            self._making.discard(number)
            if error in (0, errno.EEXIST):
                self.remade = error == errno.EEXIST
                self.fresh.put_back([number])
            else:
                self.removals.begin(number, None)
        elif operation == "add":
            self._making.discard(number)
            if error == 0 and self.removals.stopping:
                self.removals.begin(number, None)
            elif error == 0:
                self._made.append(number)
        elif operation.startswith("remove"):
            owner = self.removals.done(number, error, last=operation == "remove last")
            if owner is not None and number not in self.granted:
                self._keep(number, owner)
            if not self.removals.has(number):
                self.granted.discard(number)
        self._changed(number if number in self.removals.lingering else None)

    def _keep(self, number: int, owner: Owner) -> None:
        if owner not in self._used and len(self._used) >= self.KEPT:
            del self._used[next(iter(self._used))]
        self._used.setdefault(owner, deque()).append(number)

    def _renewed(self) -> None:
        self.removals.ask_again()
        for number in self._making:  # made or not: nobody had them
            self.removals.begin(number, None)
        self._making.clear()

    def renew_if_hung(self) -> bool:
        """Replace the child if all of it hangs; whether it does."""
        if not (self._maker.present and self.removals.hang):
            return False
        self.removals.set_aside()
        self._maker.renew()
        return True

    # The next number --------------------------------------------------------------------------------------------------

    def next(self, owner: Owner, fresh: Callable[[], bool]) -> tuple[Number | None, bool]:
        """A number that this owner had before; else a fresh one, if `fresh()` allows it. And whether it is fresh.

        None where there is no number now. `Exhausted` and OSError where there is no fresh one.
        """
        used = self._used.get(owner)
        if used:
            return Number(used.popleft(), False), False
        if not fresh():
            return None, False
        if self._made:
            return Number(self._made.popleft(), True), True
        return Number(self.fresh.take(), False), True

    def put_back(self, number: Number, owner: Owner, *, fresh: bool) -> None:
        """A number of `next` was not used."""
        if number.made and self.removals.stopping:
            self.removals.begin(number.number, None)
        elif number.made:
            self._made.appendleft(number.number)
        elif fresh:
            self.fresh.put_back([number.number])
        elif owner in self._used:  # else the account has ended, and nobody gets it
            self._used[owner].appendleft(number.number)

    def next_of(self, numbers: Iterable[int]) -> Number | None:
        """One of a grant's numbers; None where all of them are in use."""
        for number in numbers:
            if number not in self.granted and not self.removals.has(number):
                self.granted.add(number)
                return Number(number, False)
        return None

    @property
    def making(self) -> bool:
        """Whether numbers are being made that nobody has yet."""
        return bool(self._making)

    def expects(self, owner: Owner) -> bool:
        """Whether a number of this owner is being removed, so that `next` will have it."""
        return owner in self.removals.owners(self.granted)

    def refill(self) -> None:
        """Have numbers made ahead of need."""
        while not self.removals.stopping and len(self._making) + len(self._made) < self.AHEAD:
            try:
                number = self.fresh.take()
            except (Exhausted, OSError):  # an attach that needs a number is told
                return
            self._making.add(number)
            self._maker.send("add", number)

    def probe(self) -> None:
        """Find out whether a kept node brings its removed number back; `remade` says so when it is known."""
        if self.removals.stopping:
            return  # it would take the block that was given back
        with contextlib.suppress(Exhausted, OSError):
            number = self.fresh.take()
            self._making.add(number)
            self._maker.send("probe", number)

    def keep_low_free(self) -> None:
        """Look after the free devices that are there for the host."""
        self._maker.send("low", 0)

    # Used numbers -----------------------------------------------------------------------------------------------------

    def retire(self, number: int, owner: Owner | None) -> None:
        """Remove a number that was used, soon."""
        self._counter.touch(number)
        self.removals.begin(number, owner)
        self._changed(None)

    def forget(self, account: str) -> None:
        """An account has ended: its name may come again, and is another's then."""
        for owner in [owner for owner in self._used if owner.account == account]:
            del self._used[owner]
        self.removals.forget(account)

    def had(self, number: int) -> Owner | None:
        """The owner that had a number last; None where that is not remembered."""
        leaving = self.removals.owner(number)
        return leaving or next((owner for owner, used in self._used.items() if number in used), None)

    def used(self, number: int) -> bool:
        """Whether this instance has handed out the number."""
        return self._counter.has(number)

    def sweep(self, known: set[int]) -> None:
        """Remove devices of the range that an earlier daemon has left; one that is bound or open lingers."""
        used = functools.cache(lambda block: self.used(FIRST + block * BLOCK))
        for name in os.listdir(f"{lo.sysfs}/block"):
            if name.startswith("loop") and ours(name):
                number = int(name[4:])
                if number not in known and used((number - FIRST) // BLOCK):
                    self.removals.begin(number, None)

    # The end ----------------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether numbers are being removed, or will be as soon as they are made."""
        return bool(self.removals.under_way or (self.removals.stopping and self._making))

    def remove_unused(self, *, held: bool) -> None:
        """Remove what was made ahead of need, before the daemon ends, and try the rest once more.

        `held`: numbers are in use still. A block is one instance's, so that all of it stays this one's.
        """
        self.removals.stopping = True
        if not (held or self.removals.under_way or self.removals.lingering):
            self.fresh.leave()
        self.removals.retry()
        while self._made:
            self.removals.begin(self._made.popleft(), None)
