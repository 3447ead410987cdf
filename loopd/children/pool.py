"""The pool: children of one role that do one job at a time each.

A job is charged before a child gets it, until the child has finished the job or has been reaped. A child that does not
come back in time hangs: the pool kills it and forks another, and the job stays charged until the child is reaped.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple

from loopd.children.child import Child, Children, Role
from loopd.children.flow import Promise
from loopd.kernel.transport import FdSet


class Ended:
    """In place of an answer: the child ended in the middle of the job, killed or by a bug of its own."""


class Hung:
    """In place of an answer: the child did not come back in time."""


ENDED: Final = Ended()
HUNG: Final = Hung()


class Answer(NamedTuple):
    """What a child says of its job. With `last` the child can take the next job: closing the fds that it still has open
    cannot hang. An answer without a message is for the pool alone.
    """

    message: Any
    last: bool


class Sizes(NamedTuple):
    """How many children a pool has."""

    base: int
    """Children that respond, at least: so many jobs do not wait for one another."""
    most: int
    """Children at once, not counting children that may hang: accounts are charged for these."""
    rest: int
    """Children that are kept when there is nothing to do."""


class Job:
    """What one child is busy with."""

    HANGS = 1.0
    """Seconds after which a child that still has its job may hang in it."""

    def __init__(
        self, message: Any, fds: Iterable[int], patience: float, charged: set[Job],
        hangs: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """`charged` is the set of jobs of the account that pays; the job is in it until it is `over`. `hangs` is called
        when the child did not come back within `patience` seconds, whether or not its answer came before.
        """
        self.message = message
        self.fds = fds
        self.patience = patience
        self.slow_at = math.inf
        """Time (monotonic) from which the child may hang in the job. The pool sets it; a flow may set it sooner."""
        self.hangs = hangs
        self.hung = False
        """Whether its child was killed because it hung, and has not been reaped yet."""
        self.over: Promise[None] = Promise()
        """Kept when the child has finished the job and closed or checked every fd of it, or has been reaped."""
        self._charged = charged
        self._child: Child | None = None
        self._heard: deque[tuple[Any, FdSet]] = deque()
        self._wanted: Promise[None] | None = None
        charged.add(self)

    @property
    def slow(self) -> bool:
        """Whether the child may hang in the job."""
        return self.slow_at < time.monotonic()

    @property
    def answered(self) -> bool:
        """Whether the child has said something, or has ended or hangs, that `answer` has not given yet."""
        return bool(self._heard)

    def send(self, message: Any, fds: Iterable[int] = ()) -> None:
        """Say more to the child."""
        if self._child is not None:
            self._child.send(message, fds)

    async def answer(self) -> tuple[Any, FdSet]:
        """The next message of the child with its fds, which are the caller's; or ENDED or HUNG."""
        while not self._heard:
            self._wanted = Promise()
            await self._wanted
        return self._heard.popleft()

    async def done(self) -> Any:
        """The next message of a job whose answers bring no fds."""
        message, fds = await self.answer()
        fds.close()
        return message

    # The pool's side --------------------------------------------------------------------------------------------------

    def begin(self, child: Child) -> None:
        self._child = child
        self.slow_at = time.monotonic() + self.HANGS
        child.send(self.message, self.fds)
        self.message, self.fds = None, ()

    def hear(self, message: Any, fds: Iterable[int] = ()) -> None:
        """Give a message to the flow that waits for it, or keep it until the flow asks."""
        self._heard.append((message, FdSet(fds)))
        wanted, self._wanted = self._wanted, None
        if wanted is not None:
            wanted.keep(None)

    def finish(self) -> None:
        """Charge it no more."""
        self._child = None
        self._charged.discard(self)
        self.over.keep(None)


class Pool:
    """Idle children, busy ones, and jobs that wait. Keeps a base of children that respond, however many hang."""

    SLOW = 0.005
    """Seconds after which a busy child no longer counts as one that responds."""

    def __init__(self, children: Children, role: Role, sizes: Sizes, available: Callable[[], None]) -> None:
        """`available` is called when a child may be free, for a caller that dispatches only then."""
        self._children = children
        self._role = role
        self._sizes = sizes
        self._available = available
        self._idle: list[Child] = []
        self._busy: dict[Child, tuple[Job, float]] = {}
        self._pending: deque[Job] = deque()
        self._trying = False
        self._jobs_first = False
        self.no_room: OSError | None = None
        """Why the last child that was wanted could not be made."""
        self.lost = 0
        """Children that were killed because they hung, and have not been reaped yet."""

    @property
    def busy(self) -> bool:
        """Whether any child has a job, or a job waits for one."""
        return bool(self._busy or self._pending)

    def available(self) -> bool:
        """Whether a child can take a job now; forks one where few are there that respond."""
        if not self._idle:
            now = time.monotonic()
            responding = sum(since > now - self.SLOW for _, since in self._busy.values())
            working = sum(job.slow_at > now for job, _ in self._busy.values())
            if responding < self._sizes.base and working < self._sizes.most:
                try:
                    self._spawn()
                    self.no_room = None
                except OSError as error:  # TasksMax=, memory, open files: the others go on
                    self.no_room = error
        return bool(self._idle)

    def submit(self, job: Job) -> Job:
        """Have a job done by the next child that is available. Its fds must stay open until its first answer."""
        self._pending.append(job)
        self._dispatch_pending()
        return job

    def _dispatch_pending(self) -> None:
        while self._pending and self.available():
            self._dispatch(self._idle.pop(), self._pending.popleft())
        if self._pending:
            self.try_again()

    def dispatch(self, job: Job) -> Job:
        """Give a job to a child that is `available`."""
        self._dispatch(self._idle.pop(), job)
        return job

    def _dispatch(self, child: Child, job: Job) -> None:
        self._busy[child] = (job, time.monotonic())
        deadline = self._children.poller.later(job.patience, lambda: self._hangs(child, job))
        job.over.then(deadline.cancel)
        job.begin(child)

    def try_again(self) -> None:
        """Try in a moment: children that are busy then as well do not respond, and there can be more."""
        if not self._trying:
            self._trying = True
            self._children.poller.later(self.SLOW, self._try)

    def _try(self) -> None:
        self._trying = False
        self._proceed()

    def _proceed(self) -> None:
        # By turns: requests do not wait for the end of a thousand leases, nor these ends for a flood of requests.
        self._jobs_first = not self._jobs_first
        if self._jobs_first:
            self._dispatch_pending()
        self._available()
        self._dispatch_pending()

    def _spawn(self) -> None:
        child: Child = Child(
            self._children, self._role, lambda answer, fds: self._heard(child, answer, fds), lambda: self._ended(child)
        )
        self._idle.append(child)

    def _heard(self, child: Child, answer: Answer, fds: FdSet) -> None:
        job = self._busy[child][0] if child in self._busy else None
        if answer.last and job is not None:
            del self._busy[child]
            self._idle.append(child)
        try:
            if job is not None and answer.message is not None:
                job.hear(answer.message, [fds.steal(index) for index in range(len(fds))])
        finally:  # the job is charged no more, whatever went wrong with its answer
            if answer.last and job is not None:
                job.finish()
                self._proceed()

    def _ended(self, child: Child) -> None:
        job, _ = self._busy.pop(child, (None, 0.0))
        if child in self._idle:
            self._idle.remove(child)
        try:
            if job is not None:
                job.hear(ENDED)
        finally:
            # The kernel still closes the child's fds, and may hang in one: charged until the child is reaped.
            if job is not None:
                child.reaped.then(job.finish)
            self._proceed()

    def _hangs(self, child: Child, job: Job) -> None:
        if self._busy.get(child, (None, 0.0))[0] is not job:
            return
        del self._busy[child]
        self.lost += 1
        job.hung = True
        child.kill()
        child.reaped.then(lambda: self._reaped(job))
        try:
            try:
                job.hangs()
            finally:
                job.hear(HUNG)
        finally:
            self._proceed()

    def _reaped(self, job: Job) -> None:
        self.lost -= 1
        job.hung = False
        job.finish()

    def shrink(self) -> None:
        """End idle children beyond those that the pool keeps."""
        while len(self._idle) > self._sizes.rest:
            self._idle.pop(0).close()
