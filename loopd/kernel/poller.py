"""The event loop of the main process: file descriptors, deadlines, nothing else.

Single-threaded; a callback that raises is the caller's boundary to catch. Nothing here knows what it waits for.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import select
import time
from collections import deque
from collections.abc import Callable

READABLE = select.EPOLLIN
HUNG_UP = 0  # EPOLLHUP and EPOLLERR come unasked
ONCE = select.EPOLLIN | select.EPOLLONESHOT


class Timer:
    """A call at a time; `cancel` makes it none."""

    __slots__ = ("callback", "cancelled")

    def __init__(self, callback: Callable[[], None], cancelled: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback
        self.cancelled = cancelled

    def cancel(self) -> None:
        if self.callback is not None:
            self.callback = None
            self.cancelled()


class Poller:
    """epoll with callbacks and timers. No call may wait."""

    LONGEST = 3600.0
    """Seconds of one wait: epoll takes no more than 24 days, and a timer may be for later."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[], None]] = {}
        self._ready: deque[int] = deque()
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._cancelled = 0

    def add(self, fd: int, callback: Callable[[], None], events: int = READABLE) -> None:
        """Call `callback` while `fd` is ready (level-triggered unless `ONCE`)."""
        self._epoll.register(fd, events)
        self._callbacks[fd] = callback

    def rearm(self, fd: int) -> None:
        """Watch an fd of `ONCE` again."""
        self._epoll.modify(fd, ONCE)

    def remove(self, fd: int) -> None:
        """Watch `fd` no longer; call before it is closed: a description open elsewhere would keep reporting."""
        if self._callbacks.pop(fd, None) is not None:
            self._epoll.unregister(fd)
            # An event of this round may be of the fd: the number can be another file's before its turn comes.
            with contextlib.suppress(ValueError):
                self._ready.remove(fd)

    def later(self, seconds: float, callback: Callable[[], None]) -> Timer:
        """Call `callback` once in `seconds`."""
        timer = Timer(callback, self._tidy)
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._order), timer))
        return timer

    def _tidy(self) -> None:
        """Drop cancelled timers once they are the majority: a deadline of half a minute outlives its request by far."""
        self._cancelled += 1
        if self._cancelled > 64 and self._cancelled * 2 > len(self._timers):
            self._timers = [entry for entry in self._timers if entry[2].callback is not None]
            heapq.heapify(self._timers)
            self._cancelled = 0

    def run_once(self) -> None:
        """Wait for the next events or deadline, and make the calls."""
        # After a call that raised the others are still to be made: an event of `ONCE` is not told again.
        if not self._ready:
            self._ready.extend(fd for fd, _ in self._epoll.poll(self._timeout()))
        while self._ready:
            callback = self._callbacks.get(self._ready.popleft())  # an earlier call may have removed it
            if callback is not None:
                callback()
        now = time.monotonic()
        while self._timers and (self._timers[0][0] <= now or self._timers[0][2].callback is None):
            timer = heapq.heappop(self._timers)[2]
            callback, timer.callback = timer.callback, None
            if callback is not None:
                callback()

    def _timeout(self) -> float | None:
        while self._timers and self._timers[0][2].callback is None:
            heapq.heappop(self._timers)
        return min(self.LONGEST, max(0.0, self._timers[0][0] - time.monotonic())) if self._timers else None

    def close(self) -> None:
        self._epoll.close()
