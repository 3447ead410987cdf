"""The nodes of partitions: kept in line with the partitions that the kernel has, on request and by themselves.

A lease has one job at a time (`Lease.turn`). Closing the nodes of partitions that are gone is the exception: a client
that makes jobs wait must not keep that from being done.
"""

from __future__ import annotations

from loopd.children.flow import start
from loopd.children.pool import Job
from loopd.daemon.books import Books
from loopd.daemon.leases import Lease, State
from loopd.daemon.watches import Watches
from loopd.daemon.windows import Windows
from loopd.protocol.wire import Code, Refusal
from loopd.worker.messages import Arrange, Arranged, Resize, Resized, Revoke

LOOK_PAUSE = 0.05
"""Seconds after a node was closed before the table is looked at: closing the node is free for the client."""
SECOND_LOOK = 1.0
"""Seconds after which it is looked at once more: the last close writes the device's cache back, which may take long."""

_LATE = Refusal(Code.TIMEOUT, "the request was not done in time: do its files answer?")


class Arrangements:
    """Keeps nodes in line."""

    def __init__(self, books: Books) -> None:
        self._books = books
        self.watches: Watches
        self.windows: Windows
        """Both set later: the watches need the arrangements, too, and a window needs what comes after."""

    # Flows ------------------------------------------------------------------------------------------------------------

    async def rescan(self, lease: Lease) -> tuple[str, ...]:
        """Have the kernel read the partition table again, and the nodes made. The partitions. Raises Refusal."""
        async with lease.turn:
            _check_bound(lease)
            refusal = await self._arrange(lease, rescan=True)
        if refusal is not None:
            raise refusal
        return lease.partitions

    async def resize(self, lease: Lease, limit: int) -> int:
        """Have the device take over the size of its file, within its account's `limit` of bytes (0: none). The size.
        Raises Refusal.
        """
        async with lease.turn:
            _check_bound(lease)
            room = limit - lease.account.bytes + lease.binding.size if limit else None
            answer = await self._books.work(lease, Resize(lease.binding, room))
            if not isinstance(answer, Resized):
                raise Refusal(Code.TIMEOUT, "the device did not answer in time")
            if answer.binding is None:
                raise answer.refusal or _LATE
            self._books.leases.resized(lease, answer.binding)
        return lease.binding.size

    async def restore(self, lease: Lease) -> None:
        """After a restart: find the nodes that are there, and look whether the table changed meanwhile."""
        async with lease.turn:
            await self._arrange(lease, look=True)

    async def _look(self, lease: Lease, pause: float, *, table: bool) -> None:
        """Look at the nodes, and at the table if that may have changed; one look answers all that comes before it."""
        if table in lease.wanted_looks:
            return
        lease.wanted_looks.add(table)
        await self._books.sleep(pause)
        async with lease.turn:
            lease.wanted_looks.discard(table)
            await self._arrange(lease, look=table)

    def look_again(self, lease: Lease) -> None:
        """Look at the nodes once more: what was in the way may be over."""
        start(self._look(lease, 0, table=False))

    async def _arrange(self, lease: Lease, *, rescan: bool = False, look: bool = False) -> Refusal | None:
        """Have a worker do it; the lease's turn is the caller's."""
        if lease.state is not State.BOUND:
            return None
        holder, others = lease.holder, lease.account.partitions - lease.charged
        limits = self._books.terms(holder.account, holder.uid, holder.gid).limits
        room = limits.room(others)
        job = Arrange(lease.binding, holder.client, lease.nodes, lease.sure, lease.table, room, look, rescan)
        answer = await self._books.work(lease, job)
        if not isinstance(answer, Arranged):
            lease.sure = False  # the worker may have made nodes before it ended or hung
            return _LATE
        lease.binding = lease.binding._replace(partscan=lease.binding.partscan or answer.partscan)
        if answer.nodes is not None:
            lease.nodes, lease.names, lease.sure, lease.table = answer.nodes, answer.names, True, answer.table
            self.watches.watch_node(lease, answer.watch)
            self._books.partitioned(lease, answer.partitions, answer.excess)
            if not (answer.excess or limits.room(lease.account.partitions - lease.charged) >= lease.charged):
                start(self._look(lease, 0, table=False))  # its account's other devices have got more meanwhile
            if lease.binding.windows:
                missing = await self.windows.arrange(lease, answer.extents)
                return answer.refusal or missing
        return answer.refusal

    async def _revoke(self, lease: Lease) -> None:
        """Close nodes whose partitions are gone: their numbers may be another's by now."""
        if lease.revoking is not None:
            lease.revoking = True
            return
        lease.revoking = True
        while lease.revoking:
            async with lease.account.revoking:
                lease.revoking = False
                if lease.state not in (State.BOUND, State.RELEASING):  # the slot is another's, or about to be
                    break
                message = Revoke(lease.binding.devname, lease.holder.client)
                patience = self._books.policy.request_timeout
                job = Job(message, [lease.slot.fd], patience, lease.account.jobs, lambda: self._books.stuck(lease))
                await self._books.pool.submit(job).over
        lease.revoking = None
        async with lease.turn:
            # A partition may have come back with its old number while its node was closed.
            lease.sure = False
            await self._arrange(lease)

    # What brings them about -------------------------------------------------------------------------------------------

    def on_closed(self, lease: Lease) -> None:
        """A writer has closed the node of a lease with partitions."""
        if lease.state is State.BOUND:
            start(self._look_twice(lease))

    async def _look_twice(self, lease: Lease) -> None:
        if True in lease.wanted_looks:
            return
        await self._look(lease, LOOK_PAUSE, table=True)
        await self._look(lease, SECOND_LOOK, table=True)

    def on_partitions(self, devname: str) -> None:
        """The kernel made or removed a partition."""
        lease = self._books.leases.get(devname)
        if lease is None:
            return
        # Without a pause: the number of a partition that is gone is another's after some milliseconds (RCU). In a
        # client's own directory the client can open them again, and have a name looked up for ever.
        busy = lease.turn.waited_for or lease.account.turns.waited_for
        if busy and lease.holder.grant and lease.binding.whole:
            start(self._revoke(lease))
        if lease.state is State.BOUND:
            start(self._look(lease, 0, table=False))


def _check_bound(lease: Lease) -> None:
    if lease.state is not State.BOUND:
        raise Refusal(Code.BUSY, f"{lease.binding.devname} is detached already, and goes at its last close")
