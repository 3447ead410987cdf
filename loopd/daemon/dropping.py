"""Unwanted datagrams: have a child take them off the queue, for releasing the files in them may take for ever.

One child for each listener drops, and it has a thread for each file that hangs: so an account whose files hang in
datagrams has no child more than another. The thread is charged to the account as a child that hangs. A child in which
`MOST_HANGING` threads hang is killed, and another takes its place.
"""

from __future__ import annotations

import itertools
import math
import socket

from loopd.children.child import Child, Children, Role
from loopd.children.flow import Promise
from loopd.children.pool import Job
from loopd.daemon.accounts import Account
from loopd.kernel.transport import FdSet
from loopd.worker.drop import Drop, Dropped, Released, drop

PATIENCE = 2.0
"""Seconds for an answer of the child, which itself waits for no file."""
PAUSE = 0.02
"""Seconds before the next try where no child could be made."""
MOST = 512
"""Datagrams of one order, which take a few milliseconds."""
MOST_HANGING = 64
"""Threads of one child that hang."""


class Dropper:
    """The child that drops what comes on one listener."""

    def __init__(self, children: Children, listener: socket.socket) -> None:
        self._children = children
        self._role = Role("drop", lambda channel: drop(channel, listener), lambda: [listener.fileno()])
        self._child: Child | None = None
        self._answer: Promise[Dropped | None] = Promise()
        self._charges: dict[int, Job] = {}
        """What is charged for the order that is under way, and for those in which a thread hangs."""
        self._orders = itertools.count()
        self.hanging = 0
        """Threads that hang."""

    async def drop(self, pid: int, most: int, account: Account) -> Dropped | None:
        """Have datagrams of a process dropped; None where no child did."""
        order = Drop(next(self._orders), pid, most)
        self._charges[order.order] = charge = Job(None, [], math.inf, account.jobs)
        answer = self._answer = Promise()
        try:
            self._child = self._child or Child(self._children, self._role, self._heard, self._give_up)
        except OSError:  # TasksMax=, memory, open files
            deadline = self._children.poller.later(PAUSE, lambda: answer.keep(None))
        else:
            self._child.send(order)
            deadline = self._children.poller.later(PATIENCE, self._give_up)
        found = await answer
        deadline.cancel()
        if found is not None and found.hangs:
            charge.slow_at, charge.hung = 0.0, True
            self.hanging += 1
            charge.over.then(self._released)
            if len(self._charges) >= MOST_HANGING:
                self._give_up()
        elif order.order in self._charges:
            self._charges.pop(order.order).finish()
        return found

    def _released(self) -> None:
        self.hanging -= 1

    def _heard(self, message: Dropped | Released, fds: FdSet) -> None:
        if isinstance(message, Dropped):
            self._answer.keep(message)
        else:
            self._charges.pop(message.order).finish()

    def _give_up(self) -> None:
        """The child has ended, or is of no use any more. What it has is charged until it is reaped."""
        child, self._child = self._child, None
        charges, self._charges = self._charges, {}
        if child is not None:
            child.kill()
            for charge in charges.values():
                child.reaped.then(charge.finish)
        self._answer.keep(None)

    def rest(self) -> None:
        """End the child if it has nothing to do."""
        if self._child is not None and not self._charges:
            self._child.close()
            self._child = None


class Dropping:
    """The children that drop, for all listeners."""

    def __init__(self, children: Children, listeners: list[socket.socket]) -> None:
        self._droppers = [Dropper(children, listener) for listener in listeners]

    @property
    def hanging(self) -> int:
        """Threads that hang."""
        return sum(dropper.hanging for dropper in self._droppers)

    async def drop(self, index: int, pid: int, account: Account, *, run: bool) -> tuple[int, bool]:
        """Have the head of a queue dropped, which is from process `pid`; with `run` all of that process's datagrams up
        to the next one of another. How many there were, and whether the child hung in one.
        """
        found = await self._droppers[index].drop(pid, MOST if run else 1, account)
        return (found.dropped, found.slow) if found else (0, False)

    def rest(self) -> None:
        """End the children that have nothing to do."""
        for dropper in self._droppers:
            dropper.rest()
