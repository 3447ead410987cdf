"""Unwanted datagrams: have a child take them off the queue, for releasing the files in them may take for ever.

One child for each listener drops. When it hangs it is killed, and charged to the account whose datagram it hangs in
until it is reaped. Until then further datagrams of that account are parked: another child takes them and closes none of
their files before that. An account has at most `MOST_PARKERS` such children that have not been reaped; beyond that its
datagrams are dropped as everybody's are.
"""

from __future__ import annotations

import math
import socket

from loopd.children.child import Child, Children, Role
from loopd.children.flow import Promise
from loopd.children.pool import Answer, Job, Pool, Sizes
from loopd.daemon.accounts import Account
from loopd.kernel.transport import FdSet
from loopd.worker.drop import Drop, Dropped, drop, park

PATIENCE = 0.02
"""Seconds for an order. A child that takes longer hangs in a file, whose datagram is off the queue by then."""
PATIENCE_PARKING = 2.0
"""The same, where no file is closed."""
MOST = 512
"""Datagrams of one order, which take a few milliseconds."""
MOST_PARKED = 64
"""The same, where up to 253 files of each are kept."""
MOST_PARKERS = 4
"""Parking children of one account."""


class Parker:
    """A child that parks: it keeps what it takes."""

    def __init__(self, children: Children, listener: socket.socket, account: Account) -> None:
        """OSError where there is no room for a process."""
        role = Role("park", lambda channel: park(channel, listener), lambda: [listener.fileno()])
        self.listener = listener
        self.full = False
        self._busy = False
        self._children = children
        self._answer: Promise[Dropped | None] = Promise()
        self._child = Child(children, role, self._heard, self._ended)
        self.reaped = self._child.reaped
        self._charge = Job(None, [], math.inf, account.jobs)
        self._child.reaped.then(self._charge.finish)

    async def drop(self, order: Drop) -> Dropped | None:
        """Have datagrams parked; None when that is not done in time."""
        answer = self._answer = Promise()
        self._busy = True
        self._child.send(order)
        deadline = self._children.poller.later(PATIENCE_PARKING, lambda: answer.keep(None))
        found = await answer
        self._busy = False
        deadline.cancel()
        self.full = found is None or found.full
        if found is None:
            self._child.kill()
        return found

    def _heard(self, answer: Answer, fds: FdSet) -> None:
        self._answer.keep(answer.message)

    def _ended(self) -> None:
        self.full = True
        self._answer.keep(None)

    def end(self) -> None:
        """Have the child close what it keeps, unless it is at work. It is charged until it has."""
        if not self._busy:
            self.full = True
            self._child.close()


class Dropping:
    """The children that drop and park, for all listeners."""

    def __init__(self, children: Children, listeners: list[socket.socket]) -> None:
        self._children = children
        self._listeners = listeners
        self._pools = [Pool(children, self._role(listener), Sizes(1, 1, 1), lambda: None) for listener in listeners]
        self._parkers: dict[Account, list[Parker]] = {}
        self._hung: set[Job] = set()
        """Orders whose child hangs, until it is reaped."""

    @staticmethod
    def _role(listener: socket.socket) -> Role:
        return Role("drop", lambda channel: drop(channel, listener), lambda: [listener.fileno()])

    @property
    def lost(self) -> int:
        """Children that hang and have not been reaped."""
        return sum(pool.lost for pool in self._pools)

    async def drop(self, index: int, pid: int, account: Account, *, run: bool) -> tuple[int, bool]:
        """Have the head of a queue dropped, which is from process `pid`; with `run` all of that process's datagrams up
        to the next one of another. How many there were, and whether the child hangs in one.
        """
        hangs = account in self._parkers or not self._hung.isdisjoint(account.jobs)
        parker = self._parker(self._listeners[index], account) if hangs else None
        if parker is not None:
            parked = await parker.drop(Drop((pid,), MOST_PARKED if run else 1))
            self._settle(account)
            return (sum(parked.counts.values()), False) if parked else (1, True)
        job = Job(Drop((pid,), MOST if run else 1), [], PATIENCE, account.jobs)
        answer = await self._pools[index].submit(job).done()
        if job.hung:
            self._hung.add(job)
            job.over.then(lambda: self._over(job, account))
        return (sum(answer.counts.values()), False) if isinstance(answer, Dropped) else (1, job.hung)

    def _over(self, job: Job, account: Account) -> None:
        self._hung.discard(job)
        self._settle(account)

    def _settle(self, account: Account) -> None:
        """Once nothing of the account hangs, close what was parked: a child on a busy machine may only have been slow,
        and who has sent a datagram waits for its end.
        """
        if self._hung.isdisjoint(account.jobs):
            for parker in self._parkers.get(account, []):
                parker.end()

    def _parker(self, listener: socket.socket, account: Account) -> Parker | None:
        parkers = self._parkers.get(account, [])
        for parker in parkers:
            if parker.listener is listener and not parker.full:
                return parker
        if len(parkers) >= MOST_PARKERS:
            return None
        try:
            parker = Parker(self._children, listener, account)
        except OSError:  # TasksMax=, memory, open files
            return None
        self._parkers.setdefault(account, []).append(parker)
        parker.reaped.then(lambda: self._reaped(parker, account))
        return parker

    def _reaped(self, parker: Parker, account: Account) -> None:
        self._parkers[account].remove(parker)
        if not self._parkers[account]:
            del self._parkers[account]

    def rest(self) -> None:
        """End the children that have nothing to do."""
        for pool in self._pools:
            pool.shrink(0)
