"""The books: the state that the flows of the main process read and change, and how a flow has a job done on a lease.

Decides nothing. The flows are in modules of their own.
"""

from __future__ import annotations

from typing import Any

from loopd.children.flow import Promise
from loopd.children.pool import ENDED, HUNG, Job, Pool
from loopd.daemon.accounts import SHARED, Accounts, Membership
from loopd.daemon.audit import Audit, Event
from loopd.daemon.leases import Lease, Leases
from loopd.daemon.metrics import Metrics
from loopd.daemon.numbers import Numbers
from loopd.daemon.policy import Policy, Terms
from loopd.daemon.slots import Slots
from loopd.kernel.poller import Poller
from loopd.protocol.wire import Code
from loopd.worker.files import HOST

WARN_AT = 0.8
"""How much of what the daemon has room for is taken when the administrator is warned."""


class Books:
    """Accounts, leases, numbers and slots of one daemon, with its policy, its audit and its workers."""

    TRIES = 5
    """Workers that may be killed in one job before it is given up."""

    def __init__(
        self, poller: Poller, pool: Pool, numbers: Numbers, slots: Slots, audit: Audit, metrics: Metrics,
        policy: Policy, instance: str,
    ) -> None:  # fmt: skip
        self.poller = poller
        self.pool = pool
        self.numbers = numbers
        self.slots = slots
        self.audit = audit
        self.metrics = metrics
        self.policy = policy
        self.mistake = ""
        """What is wrong with the configuration, if the daemon started with it so: then it gives nothing."""
        self.instance = instance
        self.accounts = Accounts()
        self.leases = Leases()
        self.warned: set[str] = set()
        """What the administrator was warned of."""

    def terms(self, account: str, uid: int, gid: int) -> Terms:
        """What a client may do and have."""
        terms = self.policy.terms(self.instance, account, uid, gid)
        return terms.for_strangers() if account == SHARED else terms

    def warn(self, what: str, text: str, **details: object) -> None:
        """Tell the administrator, once."""
        if what not in self.warned:
            self.warned.add(what)
            self.audit.record(Event.WARNED, text, **details)

    async def sleep(self, seconds: float) -> None:
        """Go on later."""
        over: Promise[None] = Promise()
        self.poller.later(seconds, lambda: over.keep(None))
        await over

    async def change(self, lease: Lease, seconds: float) -> None:
        """Wait until something has changed about a lease, for at most `seconds`."""
        over: Promise[None] = Promise()
        timer = self.poller.later(seconds, lambda: over.keep(None))
        lease.changed.then(lambda: over.keep(None))
        await over
        timer.cancel()

    async def work(self, lease: Lease, message: Any, patience: float | None = None) -> Any:
        """Have a worker do a job on a lease. Its answer; None when it hangs, or when `TRIES` workers ended in the job.
        `patience` is in seconds; by default it is the policy's for a request.

        A worker that ended, most likely killed because memory ran out, may have done part of the job.
        """
        for _ in range(self.TRIES):
            answer = await (await self.submit(lease, message, [lease.slot.fd], patience)).done()
            if answer is not ENDED:
                return None if answer is HUNG else answer
            if "sure" in message._fields:
                message = message._replace(sure=False)
        return None

    async def submit(self, lease: Lease, message: Any, fds: list[int], patience: float | None = None) -> Job:
        """Give a worker a job on a lease, in a turn of its account's, which the job has until it is over."""
        account = lease.account
        await account.turns.take()
        job = Job(message, fds, patience or self.policy.request_timeout, account.jobs, lambda: self.stuck(lease))
        job.over.then(account.turns.give)
        return self.pool.submit(job)

    def partitioned(self, lease: Lease, count: int, excess: int) -> tuple[str, ...]:
        """The device has so many partitions, and `excess` more than it may have; the warnings of that."""
        self.leases.partitioned(lease, count)
        if not excess:
            return ()
        why = "limits.partitions, limits.partitions_in_all"
        if not lease.told:
            lease.told = True
            text = f"had {excess} partitions too many ({why}): they get no nodes, and loopd deletes what is not open"
            self.record(Event.WARNED, lease, text)
        return (f"{excess} partitions are too many, and have no nodes ({why} in the host's loopd.toml)",)

    def stuck(self, lease: Lease) -> None:
        """Record that a worker hangs in what belongs to a lease."""
        text = "has a worker process that hangs in its directory or file: it was killed, and is charged until it ends"
        self.record(Event.STUCK, lease, text, code=Code.TIMEOUT.value)

    def record(self, event: Event, lease: Lease, text: str, **details: object) -> None:
        """Write the audit's record of something that happened to a lease."""
        binding, holder = lease.binding, lease.holder
        owner = Membership(holder.account, holder.unit).name
        whose = (
            ""
            if binding.backing_view == HOST or not binding.backing_file
            else " (a path in the client's mount namespace)"
        )
        self.audit.record(
            event, f"{binding.devname} of {owner} on {binding.backing_file}{whose} {text}",
            device=binding.devname, number=binding.number, diskseq=binding.diskseq,
            backing_file=binding.backing_file, backing_dev=binding.backing_dev, backing_inode=binding.backing_inode,
            backing_view=binding.backing_view, window=binding.window or None,
            account=holder.account, owner=str(holder.owner.account), unit=holder.unit,
            pid=holder.pid, uid=holder.uid, gid=holder.gid,
            reason=lease.reason or None, lease=lease.kept_by, **details,
        )  # fmt: skip
