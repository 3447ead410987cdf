"""The event loop of the main process: file descriptors, deadlines, nothing else.

Single-threaded; a callback that raises is the caller's boundary to catch. Nothing here knows what it waits for.
"""

from __future__ import annotations

import heapq
import itertools
import select
import time
from collections.abc import Callable

READABLE = select.EPOLLIN
HUNG_UP = select.EPOLLIN | select.EPOLLRDHUP  # EPOLLHUP and EPOLLERR come unasked
ONCE = select.EPOLLIN | select.EPOLLONESHOT


class Timer:
    """A call at a time; `cancel` makes it none."""

    __slots__ = ("callback",)

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class Poller:
    """epoll with callbacks and timers."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[], None]] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()

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

    def later(self, seconds: float, callback: Callable[[], None]) -> Timer:
        """Call `callback` once in `seconds`."""
        timer = Timer(callback)
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._order), timer))
        return timer

    def run_once(self) -> None:
        """Wait for the next events or deadline, and make the calls."""
        for fd, _ in self._epoll.poll(self._timeout()):
            callback = self._callbacks.get(fd)  # an earlier call may have removed it
            if callback is not None:
                callback()
        now = time.monotonic()
        while self._timers and (self._timers[0][0] <= now or self._timers[0][2].callback is None):
            timer = heapq.heappop(self._timers)[2]
            if timer.callback is not None:
                timer.callback()

    def _timeout(self) -> float | None:
        while self._timers and self._timers[0][2].callback is None:
            heapq.heappop(self._timers)
        return max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None

    def close(self) -> None:
        self._epoll.close()
