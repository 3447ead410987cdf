"""The pool: the main process's side of its child processes.

Owns their lives: fork, dispatch, answers, writing off one that does not come back, reaping. Keeps a base of helpers
that respond, however many hang. What a message means is the task's business.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, Protocol

from loopd.children.bugs import described
from loopd.kernel import cgroups, rights, transport
from loopd.kernel.poller import Poller, Timer
from loopd.kernel.transport import FdSet
from loopd.worker import helper, messages
from loopd.worker.helper import Tools


class Lost(Protocol):
    """Who is told of the end of a child that hung and was killed."""

    def reaped(self) -> None:
        """It has really ended, and with it every fd that it held."""


class Task(Lost, Protocol):
    """What a helper is busy with, told how it goes."""

    slow_at: float
    """From when on (monotonic clock) its helper may hang in it; set by the pool, and sooner by who knows better."""

    def message(self, worker: Worker, message: Any, fds: FdSet) -> None:
        """The helper says something; what is not stolen from `fds` is closed."""

    def ready(self) -> None:
        """The helper has finished with the job, and closed or checked every fd of it."""

    def ended(self) -> None:
        """The helper ended before it was ready again; nothing more will come."""

    def timed_out(self) -> None:
        """The helper was not ready again in time and is written off; nothing more will come, until `reaped`."""


class Worker:
    """One helper process."""

    __slots__ = ("channel", "deadline", "pid", "since", "task")

    def __init__(self, pid: int, channel: socket.socket) -> None:
        self.pid = pid
        self.channel = channel
        self.task: Task | None = None
        self.since = 0.0
        self.deadline: Timer | None = None

    def send(self, message: Any, fds: Iterable[int] = ()) -> None:
        """Send the helper a message; that it has ended is noticed where its channel is read.

        One that cannot be told what to do (ENOBUFS, ETOOMANYREFS, EMSGSIZE) would be waited for in vain: it is ended.
        """
        try:
            transport.send(self.channel, messages.pack(message), fds)
        except OSError as error:
            # Nothing else: one that has ended may have been waited for, and its pid be another's.
            if error.errno in _UNTOLD:
                os.kill(self.pid, signal.SIGKILL)


_UNTOLD = (errno.ENOBUFS, errno.ENOMEM, errno.EAGAIN, errno.ETOOMANYREFS, errno.EMSGSIZE)


class Pool:
    """Helper processes: idle ones, busy ones, and those that were written off and have not ended yet."""

    BASE = 4
    """Helpers that respond, at least: as many requests can be under way without waiting for one another."""
    MOST = 64
    """Helpers at once, without those that may hang: these are counted against the accounts that hang them."""
    HANGS = 1.0
    """Seconds after which a helper that still has its job may hang in it."""
    REST = 2
    """Helpers that are kept when there is nothing to do: each takes some 4 MiB, and 3 ms to be made."""
    SLOW = 0.005
    """Seconds after which a busy helper no longer counts as one that responds."""

    def __init__(self, poller: Poller, tools: Tools, ready: Callable[[], None]) -> None:
        self._poller = poller
        self._tools = tools
        self._ready = ready
        self._idle: list[Worker] = []
        self._busy: set[Worker] = set()
        self._lost: dict[int, Lost] = {}
        self._pending: deque[tuple[Task, messages.Job, list[int], float]] = deque()
        self._trying = False
        self._jobs_first = False
        self._crowding = cgroups.Crowding()
        self.crowding = 0.0

    @property
    def busy(self) -> bool:
        """Whether any helper has a task, or a job waits for one."""
        return bool(self._busy or self._pending)

    @property
    def lost(self) -> int:
        """How many were written off and are not dead yet."""
        return len(self._lost)

    def available(self) -> bool:
        """Whether a helper can take a job now; forks one where few are there that respond."""
        if not self._idle:
            now = time.monotonic()
            responding = sum(worker.since > now - self.SLOW for worker in self._busy)
            working = sum(worker.task is not None and worker.task.slow_at > now for worker in self._busy)
            if responding < self.BASE and working < self.MOST:
                with contextlib.suppress(OSError):  # TasksMax=, memory, open files: those that are there go on
                    self._spawn()
        return bool(self._idle)

    def dispatch(self, task: Task, job: messages.Job, fds: Iterable[int], timeout: float) -> None:
        """Give an available helper a job, which has `timeout` seconds to be done with it."""
        worker = self._idle.pop()
        worker.task, worker.since = task, time.monotonic()
        task.slow_at = worker.since + self.HANGS
        worker.deadline = self._poller.later(timeout, lambda: self._write_off(worker))
        self._busy.add(worker)
        worker.send(job, fds)

    def submit(self, task: Task, job: messages.Job, fds: list[int], timeout: float) -> None:
        """Have a job done by the next helper that is available; the fds must stay open until then."""
        self._pending.append((task, job, fds, timeout))
        self._dispatch_pending()

    def _dispatch_pending(self) -> None:
        while self._pending and self.available():
            self.dispatch(*self._pending.popleft())
        if self._pending:
            self.try_again()

    def try_again(self) -> None:
        """See in a moment: the helpers that are busy now may turn out to be slow ones, and then there can be more."""
        if not self._trying:
            self._trying = True
            self._poller.later(self.SLOW, self._try)

    def _try(self) -> None:
        self._trying = False
        self._proceed()

    def _proceed(self) -> None:
        # By turns: neither do requests wait for the end of a thousand leases, nor these for a flood of requests.
        self._jobs_first = not self._jobs_first
        if self._jobs_first:
            self._dispatch_pending()
        self._ready()
        self._dispatch_pending()

    def _spawn(self) -> None:
        self.crowding = self._crowding.now()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                pid = fork([theirs.fileno(), *self._tools.fds], lambda: helper.main(theirs, self._tools))
            except OSError:
                ours.close()
                raise
        worker = Worker(pid, ours)
        self._poller.add(ours.fileno(), lambda: self._readable(worker))
        self._idle.append(worker)

    def _readable(self, worker: Worker) -> None:
        try:
            payload, fds = transport.receive(worker.channel, messages.MAX_MESSAGE, messages.MAX_FDS)
        except ConnectionResetError:
            payload, fds = b"", FdSet()
        if not payload:
            task = worker.task
            self._forget(worker)
            if task is not None:
                task.ended()
            self._proceed()
            return
        message = messages.unpack(payload)
        task = worker.task
        last = getattr(message, "last", False)
        if last:
            self._rest(worker)
            self._idle.append(worker)
        try:
            with fds:
                if task is not None and not isinstance(message, messages.Ready):
                    task.message(worker, message, fds)
        finally:  # what is charged for the job is so no more, whatever went wrong with its answer
            if last:
                if task is not None:
                    task.ready()
                self._proceed()

    def _rest(self, worker: Worker) -> None:
        self._busy.discard(worker)
        worker.task = None
        if worker.deadline is not None:
            worker.deadline.cancel()

    def _forget(self, worker: Worker) -> None:
        self._rest(worker)
        if worker in self._idle:
            self._idle.remove(worker)
        self._poller.remove(worker.channel.fileno())
        worker.channel.close()

    def shrink(self) -> None:
        """End idle helpers beyond those that are kept."""
        while len(self._idle) > self.REST:
            self._forget(self._idle[0])

    def _write_off(self, worker: Worker) -> None:
        task = worker.task
        self._forget(worker)
        # In an uninterruptible wait it stays until the file system answers, with the fds of this one request.
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker.pid, signal.SIGKILL)
        if task is not None:
            self._lost[worker.pid] = task
            task.timed_out()
        self._proceed()

    def lose(self, pid: int, task: Lost) -> None:
        """Child `pid`, of another kind, hangs and was killed."""
        self._lost[pid] = task

    def reap(self, pid: int) -> None:
        """Process `pid` has ended."""
        task = self._lost.pop(pid, None)
        if task is not None:
            task.reaped()


def fork(keep: list[int], main: Callable[[], None], *, outlives: bool = False) -> int:
    """Run `main` in a child that has no fd but `keep` and standard ones, and is killed when this process ends, unless
    it `outlives` it.

    To be called by a single-threaded process only. Returns when the child has closed what is not its own: until then it
    would keep devices open that are released meanwhile.
    """
    parent = os.getpid()
    closed, closing = os.pipe()
    try:
        pid = os.fork()
        if pid == 0:
            _child(0 if outlives else parent, keep, closing, main)
    except OSError:
        os.close(closed)
        raise
    finally:
        os.close(closing)
    os.read(closed, 1)  # nothing: the end of the child's side
    os.close(closed)
    return pid


def _child(parent: int, keep: list[int], closing: int, main: Callable[[], None]) -> NoReturn:
    # Never returns into the frames of the parent, whose objects believe to own fds that are closed here.
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the main process ends its children itself
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        low = 3
        for fd in sorted({*keep, closing}):
            os.closerange(low, fd)
            low = fd + 1
        os.closerange(low, os.sysconf("SC_OPEN_MAX"))
        os.close(closing)
        if parent:
            rights.die_with_parent(parent)
        main()
    except ConnectionResetError:
        pass  # the main process ended with an answer unread
    except BaseException as error:  # noqa: BLE001  # nothing may leave this frame
        print(described(error), file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)
