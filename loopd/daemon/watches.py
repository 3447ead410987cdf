"""The watches on a lease: its keeper, its account's cgroup, its node.

Each brings about one of the flows, which are given at the start. Decides nothing else.
"""

from __future__ import annotations

from collections.abc import Callable

from loopd.children.flow import Flow, start
from loopd.daemon.books import Books
from loopd.daemon.leases import Lease, State
from loopd.kernel import inotify
from loopd.kernel.inotify import Inotify
from loopd.kernel.poller import HUNG_UP, READABLE


class Watches:
    """The watches on all leases."""

    def __init__(
        self, books: Books, nodes: Inotify, over: Callable[[Lease, str], Flow], closed: Callable[[Lease], None]
    ) -> None:
        """Workers add watches on nodes to `nodes`. `over` is the flow for a lease that is over, with the reason;
        `closed` is called when a writer has closed the node.
        """
        self._books = books
        self._nodes = nodes
        self._over = over
        self._closed = closed
        self._watched: dict[int, Lease] = {}
        books.accounts.on_end = self._account_ended
        books.poller.add(books.accounts.cgroups.fd, books.accounts.cgroups.receive)
        books.poller.add(nodes.fd, self._on_nodes)

    # Leases -----------------------------------------------------------------------------------------------------------

    def watch(self, lease: Lease) -> None:
        """Have a lease end when its keeper does; OSError where there is no room for a watch."""
        assert lease.keeper is not None
        # A pidfd is readable when the process has ended; a socket is sealed, and hangs up.
        events = HUNG_UP if lease.kept_by in ("reply", "socket") else READABLE
        self._books.poller.add(lease.keeper, lambda: start(self._over(lease, "expired")), events)
        self.watch_node(lease, lease.watch)

    def watch_node(self, lease: Lease, watch: int | None) -> None:
        """A worker has put `watch` on the node of the lease."""
        if watch is None:
            return
        if lease.watch not in (None, watch):
            self._unwatch_node(lease)  # the node's name leads to another node by now
        lease.watch = watch
        self._watched[watch] = lease
        if lease.state is not State.BOUND:
            self._unwatch_node(lease)

    def _unwatch_node(self, lease: Lease) -> None:
        if lease.watch is not None:
            self._watched.pop(lease.watch, None)
            self._nodes.remove(lease.watch)
            lease.watch = None

    def forget(self, lease: Lease) -> None:
        """Watch a lease no longer, and close its keeper."""
        if lease.keeper is not None:
            self._books.poller.remove(lease.keeper)
        lease.close()
        self._unwatch_node(lease)

    def _on_nodes(self) -> None:
        watches = {watch for watch, _ in self._nodes.events()}
        if inotify.OVERFLOW in watches:
            watches = set(self._watched)
        for watch in watches:
            lease = self._watched.get(watch)
            if lease is not None:
                self._closed(lease)

    def _account_ended(self, name: str) -> None:
        """An account's cgroup is empty: its leases are over, and its name may come again."""

        def end() -> None:
            for lease in list(self._books.leases):
                if lease.account.ended:
                    start(self._over(lease, "expired"))

        self._books.numbers.forget(name)
        # Not now: it may have been noticed on the way of a request, whose worker these ends would take.
        self._books.poller.later(0, end)
