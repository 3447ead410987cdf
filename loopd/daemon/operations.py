"""The operations besides attach and directory: a small flow for each, found by a literal table."""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable
from typing import Any

from loopd import __version__
from loopd.children.flow import start
from loopd.daemon.arrange import Arrangements
from loopd.daemon.books import Books
from loopd.daemon.exchange import Exchange
from loopd.daemon.leases import Lease, State
from loopd.daemon.metrics import Gauges
from loopd.daemon.release import Releases
from loopd.protocol import wire
from loopd.protocol.wire import Code, Detach, Hello, Leases, Refusal, Reply, Rescan, Resize
from loopd.worker import devices

MOST_ROWS = 64
"""Leases in one reply to ``list``; a client that has more asks again."""
LISTED_PER_SECOND = 8 << 20
"""Bytes of replies to ``list`` that one account gets in a second. A full reply takes the main process a millisecond; so
one account's lists take an eighth of its time at most.
"""
NUMBER_BYTES = 1024
"""To look whether a device number is in use takes as long as so many bytes of a reply."""


class Operations:
    """The operations that need no file of the client's."""

    def __init__(
        self, books: Books, releases: Releases, arrangements: Arrangements, hanging: Callable[[], int]
    ) -> None:
        self._books = books
        self._releases = releases
        self._arrangements = arrangements
        self._hanging = hanging
        self.waiting = 0
        """Requests that wait for the end of a lease."""

    async def perform(self, exchange: Exchange, request: Any) -> Reply:
        """Do what is asked; the reply. Raises Refusal."""
        return await self._TABLE[type(request)](self, exchange, request)

    async def _hello(self, exchange: Exchange, request: Hello) -> Reply:
        limits = {
            "request_bytes": wire.MAX_REQUEST,
            "request_fds": wire.MAX_FDS,
            "reply_bytes": wire.MAX_REPLY,
            "devices": exchange.terms.limits.devices,
            "requests": exchange.terms.limits.requests,
        }
        own = (name for name, kind in wire.OPERATIONS.items() if kind is not wire.Metrics or exchange.admin)
        return wire.Greeting(__version__, wire.VERSION, tuple(own), limits, exchange.sender.uid)

    async def _list(self, exchange: Exchange, request: Leases) -> Reply:
        # In the order of their numbers: the device that the last reply ended with may be gone by now.
        after = int(request.after.removeprefix("loop")) if re.fullmatch("loop[0-9]{1,7}", request.after) else -1
        owner = None if exchange.admin else exchange.owner
        size = 0
        await exchange.account.listing.take()
        try:
            found, more = self._books.leases.of(owner, after, MOST_ROWS)
            rows: list[wire.LeaseInfo] = []
            for lease in found:
                row = _row(lease, exchange.admin)
                size += _most_bytes(row)
                if rows and size > wire.MAX_REPLY:
                    more = True
                    break
                rows.append(row)
            numbers = exchange.numbers or None
            size += NUMBER_BYTES * len(exchange.numbers)
            return wire.LeaseList(tuple(rows), more, numbers, numbers and self._in_use(numbers))
        finally:
            # Given back only when what this reply takes is earned again.
            self._books.poller.later(size / LISTED_PER_SECOND, exchange.account.listing.give)

    def _in_use(self, granted: tuple[int, ...]) -> int:
        """How many of a grant's numbers are somebody's: another instance's and the host's, too. An attach waits for one
        that is being removed.
        """
        taken = self._books.numbers.granted - self._books.numbers.removals.under_way.keys()
        return sum(number in taken or bool(devices.size(f"loop{number}")) for number in granted)

    async def _detach(self, exchange: Exchange, request: Detach) -> Reply:
        if request.force and not exchange.admin:
            raise Refusal(Code.NOT_PERMITTED, "force: for the administrator, on the admin socket")
        lease = self._lease(exchange, request.devname)
        if not request.force and not exchange.owns(lease.holder):
            raise Refusal(Code.NOT_PERMITTED, f"force: {request.devname} is another's")
        if request.diskseq not in (None, lease.binding.diskseq):
            raise Refusal(Code.NOT_FOUND, f"{request.devname} carries another binding by now")
        start(self._releases.release(lease, "detached"))
        now = time.monotonic()
        # A client can keep a release from going on, and the reply must not wait for ever. loopd's own client waits as
        # long as a request may take.
        deadline = now + request.wait
        patience = max(deadline, now + 0.9 * self._books.policy.request_timeout)
        self.waiting += 1
        try:
            while lease.state is not State.RELEASED:
                left = (deadline if lease.state is State.HELD else patience) - time.monotonic()
                if left <= 0:
                    return wire.Detached("busy")
                await self._books.change(lease, left)
        finally:
            self.waiting -= 1
        return wire.Detached("released", lease.lost)

    async def _rescan(self, exchange: Exchange, request: Rescan) -> Reply:
        lease = self._bound(exchange, request.devname)
        if not (lease.binding.partscan or exchange.terms.allow.partscan):
            raise Refusal(Code.NOT_PERMITTED, "the administrator does not allow this client partscan (loopd.toml)")
        return wire.Rescanned(await self._arrangements.rescan(lease))

    async def _resize(self, exchange: Exchange, request: Resize) -> Reply:
        lease = self._bound(exchange, request.devname)
        return wire.Resized(await self._arrangements.resize(lease, exchange.terms.limits.bytes))

    async def _count(self, exchange: Exchange, request: wire.Metrics) -> Reply:
        if not exchange.admin:
            raise Refusal(Code.NOT_PERMITTED, "metrics: for the administrator, on the admin socket")
        states = dict.fromkeys((state.value for state in State if state is not State.RELEASED), 0)
        for lease in self._books.leases:
            states[lease.state.value] += 1
        return wire.Measured(self._books.metrics.text(Gauges(states, self._hanging())))

    _TABLE: dict[type[Any], Callable[[Operations, Exchange, Any], Awaitable[Reply]]] = {  # noqa: RUF012  # never changed
        Hello: _hello,
        Leases: _list,
        Detach: _detach,
        Rescan: _rescan,
        Resize: _resize,
        wire.Metrics: _count,
    }

    def _lease(self, exchange: Exchange, devname: str) -> Lease:
        lease = self._books.leases.get(devname)
        if lease is None or not (exchange.admin or exchange.owns(lease.holder)):
            # The same words for a device that is not there and for another's.
            raise Refusal(Code.NOT_FOUND, f"no device {devname} of yours")
        if lease.binding.window:
            raise Refusal(Code.INVALID, f"{devname} is {lease.binding.window}, a window that goes with its disk")
        return lease

    def _bound(self, exchange: Exchange, devname: str) -> Lease:
        lease = self._lease(exchange, devname)
        if lease.state is not State.BOUND:
            raise Refusal(Code.BUSY, f"{devname} is detached already, and goes at its last close")
        return lease


def _most_bytes(row: wire.LeaseInfo) -> int:
    """Bytes that a row takes at most: a character that is no ASCII takes six."""
    texts = sum(6 * len(text) for text in row if isinstance(text, str))
    return 1024 + texts + sum(len(name) + 3 for name in row.partitions)


def _row(lease: Lease, admin: bool) -> wire.LeaseInfo:
    binding, holder = lease.binding, lease.holder
    shared = binding._asdict()
    del shared["number"], shared["backing_view"], shared["windows"]
    shared["window"] = binding.window or None
    return wire.LeaseInfo(
        **shared,
        state=lease.state.value,
        lease=lease.kept_by,
        age=round(lease.age, 3),
        partitions=lease.partitions,
        owner=holder.owner.account if admin else None,
        account=holder.account if admin else None,
        uid=holder.uid if admin else None,
        pid=holder.pid if admin else None,
        unit=holder.unit if admin else None,
    )
