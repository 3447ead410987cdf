"""The life of a lease: booked, watched, its nodes kept in line, released, gone; and carried on after a crash.

Part of the main process, the one writer. Whatever touches a device or a directory is a helper's job, one at a time for
each lease. Knows no requests: who may ask for what is decided before.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import time
from collections.abc import Callable
from typing import Any

from loopd.daemon import leases
from loopd.daemon.accounts import Account, Accounts, Membership, Owner
from loopd.daemon.audit import Audit, Event
from loopd.daemon.leases import Lease, Leases, Slots, State
from loopd.daemon.numbers import Numbers, is_parked, ours
from loopd.daemon.policy import Policy
from loopd.daemon.pool import Pool, Worker
from loopd.kernel import cgroups, inotify, transport
from loopd.kernel.inotify import Inotify
from loopd.kernel.poller import HUNG_UP, READABLE, Poller
from loopd.kernel.transport import FdSet
from loopd.loop import backing_file
from loopd.protocol import wire
from loopd.protocol.wire import Code, Refusal
from loopd.worker import devices, files, messages, records
from loopd.worker.devices import Binding


class LeaseTask:
    """A helper's job on a lease; a `pool.Task`. Each is called once: `done` with the answer or None, `after` when no
    more is to be waited for, `landed` when the helper has no fd of the lease any more.
    """

    def __init__(
        self, done: Callable[[Any], None], again: Callable[[], None] | None, stuck: Callable[[], None],
        after: Callable[[], None], landed: Callable[[], None],
    ) -> None:  # fmt: skip
        self.slow_at = math.inf
        self._done: Callable[[Any], None] | None = done
        self._again = again
        self._stuck = stuck
        self._after = after
        self._landed = landed

    def message(self, worker: Worker, message: Any, fds: FdSet) -> None:
        self._finish(message)
        if isinstance(message, messages.Released):
            worker.send(messages.Closed())

    def ready(self) -> None:
        self._finish(None)
        self._after()
        self._landed()

    def ended(self) -> None:
        if self._done is not None and self._again is not None:
            self._again()  # killed, most likely for its memory: another one does it
            self._landed()
        else:
            self.ready()

    def timed_out(self) -> None:
        self._stuck()
        self._finish(None)
        self._after()

    def reaped(self) -> None:
        self._landed()

    def _finish(self, message: Any) -> None:
        done, self._done = self._done, None
        if done is not None:
            done(message)


class Lifecycle:
    """Every lease of the daemon, and what happens to it."""

    HELD_PAUSE = 0.05
    """Seconds before a device that somebody else has open is said to be held: it may be udev, or the helper that
    attached it and has not come to its own close yet.
    """
    HELD_CHECK = 5.0
    """Seconds between looks at devices that others keep open, in case a uevent was missed."""
    FOREIGN_CHECK = 1.0
    """Seconds after which a device that was bound must be a lease's."""
    MOST_JOBS = 8
    """Helpers at once that are busy with the leases of one account, or hang in them: a client can keep its own
    directory, and its own file, locked for as long as it likes. So many more may close nodes, and one for each of those
    that were written off keeps what they had.
    """
    PROBE_PAUSE = 0.05
    """Seconds after the start until it is tried whether a kept node brings its number back, and left directories go."""
    ARRANGE_PAUSE = 0.05
    """Seconds after a look at a partition table before the next one: closing the node is free for the client."""

    def __init__(
        self, poller: Poller, pool: Pool, watches: Inotify, numbers: Numbers, slots: Slots, audit: Audit,
        policy: Policy,
    ) -> None:  # fmt: skip
        self.policy = policy
        self.accounts = Accounts()
        self.leases = Leases()
        self._poller = poller
        self._pool = pool
        self._watches = watches
        self._numbers = numbers
        self._slots = slots
        self._audit = audit
        self._cgroups = cgroups.Watcher(self._account_ended)
        self._held: dict[str, Lease] = {}
        self._charged: dict[str, Account] = {}
        self._reported: set[str] = set()
        self._suspects: dict[str, tuple[tuple[str, int | None] | None, float]] = {}
        self._unknown: set[str] = set()
        self._nudged: set[str] = set()
        self._watched: dict[int, Lease] = {}
        self._kept: list[socket.socket] = []
        self._replies: dict[str, int] = {}
        self._looking = False
        self.renew_numbers = nothing
        poller.add(self._cgroups.fd, self._cgroups.receive)
        poller.add(watches.fd, self._on_watches)

    # Beginning --------------------------------------------------------------------------------------------------------

    def adopt(self, lease: Lease) -> None:
        """Take a new lease into the books, and end it when what keeps it ends."""
        self.leases.add(lease)
        self._watch(lease)
        if lease.account.ended:
            self.release(lease, "expired")
        else:
            self._watch_account(lease)

    def watch(self, account: Account, events: int) -> None:
        """Watch an account of which nothing was attached: it may get the numbers again that it used up. Takes over
        what `cgroups.open_events` gave.
        """
        if account.ended:
            os.close(events)
            return
        with contextlib.suppress(OSError):  # then it gets none of them again
            self._cgroups.watch(account.name, events)

    def _watch_account(self, lease: Lease) -> None:
        if lease.cgroup is not None and not lease.account.ended:
            events, lease.cgroup = lease.cgroup, None
            self._cgroups.watch(lease.holder.account, events)

    def _watch(self, lease: Lease) -> None:
        assert lease.keeper is not None
        # A pidfd is readable when the process has ended; a socket is sealed, and hangs up.
        events = HUNG_UP if lease.lease in ("reply", "socket") else READABLE
        self._poller.add(lease.keeper, lambda: self.release(lease, "expired"), events)
        if lease.watch is not None:
            self._watched[lease.watch] = lease

    @property
    def watched(self) -> int:
        """How many accounts are watched, with an open file each."""
        return self._cgroups.files

    def _unwatch(self, lease: Lease) -> None:
        if lease.watch is not None:
            self._watched.pop(lease.watch, None)
            self._watches.remove(lease.watch)
            lease.watch = None

    def _account_ended(self, name: str) -> None:
        """An account's cgroup is empty: nobody is left who could use its devices, and its name may come again."""
        self.accounts.end(name)
        self._numbers.forget(name)
        for lease in list(self.leases):
            if lease.account.ended:
                self.release(lease, "expired")

    # Recovery ---------------------------------------------------------------------------------------------------------

    def recover(self, slot: socket.socket) -> None:
        """Take over what an earlier daemon left in a slot of the fd store."""
        self._slots.known()
        try:
            found = leases.stored(slot, self.accounts.get)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            # Most likely a newer loopd's, before a downgrade: it stays in the store, and its device bound.
            self._kept.append(slot)
            self._audit.record(Event.WARNED, f"A lease in the fd store cannot be read and is kept as it is: {error}")
            return
        if found is None:
            self._slots.give_back(slot)
            return
        lease, reply = found
        name = lease.binding.devname
        size = devices.size(name)
        if size is not None:  # it may have been resized
            lease.binding = lease.binding._replace(size=size)
        if reply is not None:
            self._replies[name] = reply
        twin = self.leases.get(name)
        if twin is None:
            self.leases.add(lease)
            return
        # The daemon ended between the two records of a release: the one that still has the device goes on.
        lease, twin = (lease, twin) if lease.state is State.BOUND else (twin, lease)
        assert twin.slot is not None
        self._slots.give_back(twin.slot)
        self.leases.replace(lease)

    def resume(self) -> None:
        """Go on with every lease that was recovered, and tidy up after a daemon that died."""
        # Accounts first: with one that ended meanwhile all its leases end.
        failures: dict[str, OSError] = {}
        for lease in list(self.leases):
            try:
                self._watch_account(lease)
            except OSError as error:
                failures[lease.holder.account] = error
        for account, failure in failures.items():
            self._audit.record(Event.WARNED, f"The end of {account} cannot be watched: {failure}", account=account)
        for lease in list(self.leases):
            reply = self._replies.pop(lease.binding.devname, None)
            if lease.state is State.BOUND:
                self._watch(lease)
                self._restore(lease, reply)
                continue
            if lease.state is State.HELD:
                self._after_close(lease)
            if reply is not None:
                os.close(reply)
        self._numbers.sweep({lease.binding.number for lease in self.leases})
        self._numbers.keep_low_free()
        # Whoever started the daemon is served first: one takes a helper, the other waits for the disk.
        self._poller.later(self.PROBE_PAUSE, self._sweep)
        self._poller.later(self.PROBE_PAUSE, self._numbers.probe)

    def _sweep(self) -> None:
        """Have the directories removed that an earlier daemon left: their clients may keep them locked."""

        def stuck() -> None:
            self._audit.record(Event.STUCK, "A directory that was delivered as a mount cannot be removed: it is locked")

        known = frozenset(lease.holder.grant for lease in self.leases if lease.state is not State.BOUND)
        task = LeaseTask(void, None, stuck, nothing, nothing)
        self._pool.submit(task, messages.Sweep(known), [], self.policy.request_timeout)

    def _restore(self, lease: Lease, reply: int | None) -> None:
        assert lease.slot is not None
        progress = records.ANSWERED if reply is None else records.progress(lease.slot.fileno())
        # To open a device may wait for its client, so that the main process can make no fd of it to send along.
        with_fds = bool(set(lease.holder.deliver) & {"fd", "mount"})
        # A client that closed its end of the reply socket waits for no answer any more. Where one may have been sent it
        # is sent again, but for one with fds: a refusal would take the device away.
        open_questions = (records.ASKED,) if with_fds else (records.ASKED, records.ANSWERING)
        complete = reply is not None and progress in open_questions and not transport.hung_up(reply)

        def restored(refusal: Refusal | None) -> None:
            with FdSet(() if reply is None else (reply,)):
                delivered = complete or progress != records.ASKED
                if reply is not None and complete:
                    if with_fds:
                        refusal = Refusal(Code.INTERNAL, "loopd ended in the middle of the request: ask again")
                    payload = wire.encode_reply(refusal or attached(lease), lease.holder.id)
                    slot = None if lease.slot is None else lease.slot.fileno()  # another's if it was released meanwhile
                    delivered = records.answer(slot, reply, payload)
                    if delivered and refusal is None:
                        self.record(Event.ATTACHED, lease, "was attached", operation="attach")
            # Of one that was answered long ago a refusal says no more than that the look at its nodes did not work.
            if (complete and refusal is not None) or not delivered:
                self.release(lease, "undeliverable")

        self._arrange(lease, restored, complete=complete, changed=True)

    def abandon(self, slot: socket.socket) -> bool:
        """Free a slot whose attach failed; a helper may have booked the lease and made nodes before it was killed, or
        could not remove them. Then it is a lease that ends, and its number with it: whether it is.
        """
        found = leases.stored(slot, self.accounts.get)
        if found is None:
            self._slots.give_back(slot)
            return False
        lease, reply = found
        if reply is not None:
            os.close(reply)
        self.leases.add(lease)
        if lease.cgroup is not None:
            events, lease.cgroup = lease.cgroup, None
            self.watch(lease.account, events)
        self.release(lease, "failed")
        return True

    # Partitions -------------------------------------------------------------------------------------------------------

    def rescan(self, lease: Lease, done: Callable[[Refusal | tuple[str, ...]], None]) -> None:
        """Have the kernel read the partition table again, and the nodes made that belong to it."""

        def arranged(refusal: Refusal | None) -> None:
            done(refusal or tuple(devices.partitions(lease.binding.devname)))

        self._arrange(lease, arranged, rescan=True)

    def resize(self, lease: Lease, limit: int, done: Callable[[Refusal | int], None]) -> None:
        """Have the device take over the size of its file, as far as its account's `limit` of bytes goes (0: none)."""

        def resized(message: messages.Resized | None) -> None:
            if message is not None and message.binding is not None:
                lease.account.bytes += message.binding.size - lease.binding.size
                lease.binding = message.binding
            self._proceed(lease)  # the next job builds on that
            if message is None or message.binding is None:
                done((message and message.refusal) or Refusal(Code.TIMEOUT, "the device did not answer in time"))
            else:
                done(lease.binding.size)

        def start() -> None:
            room = limit - lease.account.bytes + lease.binding.size if limit else None
            self._submit(lease, messages.Resize(lease.binding, room), resized)

        self._job(lease, start)

    def on_partitions(self, devname: str) -> None:
        """The kernel made or removed a partition."""
        lease = self.leases.get(devname)
        if lease is None or not lease.binding.partscan:
            return
        # Without a pause: the number of one that is gone is another's after some milliseconds (RCU). Nor may it wait
        # for what its client has made wait.
        if lease.working or lease.account.jobs >= self.MOST_JOBS:
            self._revoke(lease)
        if lease.state is State.BOUND:
            self._arrange_after(0, lease, changed=False)

    def _revoke(self, lease: Lease) -> None:
        """Have nodes closed whose partitions are gone; one helper at a time, beside what else is done to the lease."""
        nodes = tuple(node for node in lease.nodes if node.name != lease.binding.devname)
        # In a client's own directory it can open them again, and have a name looked up for ever.
        if lease.directory is None or not lease.holder.grant or not nodes:
            return
        if lease.revoking is not None:
            lease.revoking = True
            return
        account = lease.account
        if account.revokes >= self.MOST_JOBS:
            account.unrevoked[lease.binding.devname] = lease
            return
        try:
            directory = os.dup(lease.directory)  # the lease may be over before a helper is available
        except OSError:  # EMFILE, ENFILE: the job that waits does it
            return
        lease.revoking = False
        account.revokes += 1

        def landed() -> None:
            os.close(directory)
            account.revokes -= 1
            self._revoked(lease)

        task = LeaseTask(void, None, lambda: self._stuck(lease), nothing, landed)
        job = messages.Revoke(lease.binding.devname, lease.holder.client, nodes)
        self._pool.submit(task, job, [directory], self.policy.request_timeout)

    def _revoked(self, lease: Lease) -> None:
        account = lease.account
        again, lease.revoking = lease.revoking, None
        if again:
            account.unrevoked[lease.binding.devname] = lease
        while account.unrevoked and account.revokes < self.MOST_JOBS:
            self._revoke(account.unrevoked.pop(next(iter(account.unrevoked))))

        def unsure() -> None:
            lease.sure = False  # a partition may have come again with the number that it had, and its node be closed
            self._proceed(lease)

        if lease.state in (State.BOUND, State.RELEASING):
            self._job(lease, unsure)  # after what is under way, which believes to be sure
        if lease.state is State.BOUND:
            self._arrange_after(0, lease, changed=False)

    def _stuck(self, lease: Lease) -> None:
        text = "has a helper process that hangs in its directory or file, and was written off"
        self.record(Event.STUCK, lease, text, code=Code.TIMEOUT.value)

    def look_at_partitions(self) -> None:
        """Events were lost: look at the nodes of every lease whose partitions are not those that it had."""
        for lease in self.leases:
            if lease.binding.partscan and lease.state is State.BOUND:
                devname = lease.binding.devname
                known = {node.name: (node.major, node.minor) for node in lease.nodes if node.name != devname}
                if not lease.sure or known != devices.partitions(devname):
                    self.on_partitions(devname)

    def _on_watches(self) -> None:
        watches = {watch for watch, _ in self._watches.events()}
        if inotify.OVERFLOW in watches:
            watches = set(self._watched)
        for watch in watches:
            lease = self._watched.get(watch)
            if lease is not None and lease.state is State.BOUND:
                self._arrange_after(self.ARRANGE_PAUSE, lease, changed=True)

    def _arrange_after(self, pause: float, lease: Lease, *, changed: bool) -> None:
        """Look at the nodes, and at the table if that may have `changed`; one look answers all that comes meanwhile."""
        if changed in lease.again:
            return
        lease.again.add(changed)

        def arrange() -> None:
            if lease.state is State.BOUND:
                self._arrange(lease, void, changed=changed, begun=lambda: lease.again.discard(changed))

        self._poller.later(pause, arrange)

    def _arrange(
        self, lease: Lease, done: Callable[[Refusal | None], None], *,
        complete: bool = False, rescan: bool = False, changed: bool = False, begun: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        def arranged(message: messages.Arranged | None) -> None:
            if message is None:
                lease.sure = False  # the helper may have made some before it ended or hung
            elif message.nodes is not None:
                lease.nodes, lease.sure, lease.table = message.nodes, True, message.table
                if message.watch is not None:
                    if lease.watch not in (None, message.watch):
                        self._unwatch(lease)  # the name leads to another node by now
                    lease.watch = message.watch
                    self._watched[message.watch] = lease
                    if lease.state is not State.BOUND:
                        self._unwatch(lease)  # its release had done that already
            self._proceed(lease)  # the next job builds on that
            late = Refusal(Code.TIMEOUT, "the request was not done in time: do its files answer?")
            done(late if message is None else message.refusal)

        def start() -> None:
            begun()
            job = messages.Arrange(
                lease.binding, lease.holder.client, lease.nodes, lease.sure, complete, rescan, changed, lease.table
            )
            self._submit(lease, job, arranged)

        self._job(lease, start)

    def _job(self, lease: Lease, start: Callable[[], None]) -> None:
        lease.jobs.append(start)
        if not lease.working:
            self._proceed(lease)

    def _proceed(self, lease: Lease) -> None:
        lease.working = bool(lease.jobs) and lease.state in (State.BOUND, State.RELEASING)
        if lease.working:
            lease.jobs.popleft()()

    def _submit(
        self, lease: Lease, job: messages.Job, done: Callable[[Any], None], after: Callable[[], None] = lambda: None,
        ended: Callable[[], None] = lambda: None, tries: int = 5, *, in_turn: bool = True,
    ) -> None:  # fmt: skip
        account = lease.account

        def again() -> None:
            unsure = job
            if isinstance(job, messages.Arrange | messages.Release):
                unsure = job._replace(sure=False)  # the first one may have made or removed some
            self._submit(lease, unsure, done, after, ended, tries - 1, in_turn=in_turn)

        def landed() -> None:
            ended()
            if in_turn:
                self._landed(account)

        def start() -> None:
            lock = lease.lock if isinstance(job, messages.Release | messages.Keep) else None
            fds = [fd for fd in (lease.device, lease.directory, lock) if fd is not None]
            task = LeaseTask(
                done, again if tries > 1 else None, lambda: self._stuck(lease), after, landed
            )
            self._pool.submit(task, job, fds, self.policy.request_timeout)

        if in_turn:
            self._in_turn(account, start)
        else:
            start()

    def _in_turn(self, account: Account, start: Callable[[], None]) -> None:
        """Start a job of an account, until `_landed`; if it has enough of them, when one of those has."""
        if account.jobs < self.MOST_JOBS:
            account.jobs += 1
            start()
        else:
            account.queue.append(start)

    def _landed(self, account: Account) -> None:
        if account.queue:
            account.queue.popleft()()  # in its place
        else:
            account.jobs -= 1

    # The end ----------------------------------------------------------------------------------------------------------

    def release(self, lease: Lease, reason: str) -> None:
        """End a lease: a helper removes the nodes and partitions, then the last fd is closed."""
        if lease.state is not State.BOUND:
            return
        lease.state, lease.reason = State.RELEASING, reason
        if lease.keeper is not None:
            self._poller.remove(lease.keeper)
        self._unwatch(lease)

        def released(message: messages.Released | None) -> None:
            if message is None:
                # The helper hangs with its own copy of the device, or has ended since: whose close is the last one is
                # not known, and must not be this process's.
                self._submit(lease, messages.Keep(), kept, after, in_turn=False)
                return
            lease.binding = lease.binding._replace(diskseq=message.diskseq)
            lease.nodes = message.left
            self._close(lease)

        def kept(message: messages.Released | None) -> None:
            diskseq = devices.sequence(lease.binding.devname) if message is None else message.diskseq
            lease.binding = lease.binding._replace(diskseq=diskseq)
            self._close(lease)

        def after() -> None:
            if lease.state is State.HELD:
                self._after_close(lease)

        def start() -> None:
            binding, holder = lease.binding, lease.holder
            job = messages.Release(
                binding, holder.client, lease.nodes, lease.sure, holder.grant, lease.directory is not None
            )
            self._submit(lease, job, released, after)

        self._job(lease, start)

    def refuse(self, lease: Lease) -> None:
        """Release a lease that is larger than its account may have: a smaller one need not wait for its end."""
        lease.account.bytes -= lease.binding.size
        lease.binding = lease.binding._replace(size=0)
        self.release(lease, "refused")

    def _close(self, lease: Lease) -> None:
        """Nodes and partitions are gone; loopd's own fds go now. The last one is the helper's."""
        after = None
        with contextlib.suppress(OSError):  # ENFILE, ENOBUFS: the same as a store that is full
            after = self._slots.take() if lease.slot is not None else None
        if after is not None:
            try:
                # Written before the device's fds go: at no moment is the binding in no record.
                records.write(after.fileno(), lease.holder._asdict(), lease.lease, lease.binding, {})
            except OSError:
                self._slots.give_back(after)
                after = None
        lease.close()
        if lease.slot is not None:
            self._slots.give_back(lease.slot)
        lease.slot = after
        lease.state, lease.working = State.HELD, False

    def _after_close(self, lease: Lease) -> None:
        if not devices.still_bound(lease.binding):
            self._gone(lease)
            return
        self._held[lease.binding.devname] = lease
        self._poller.later(self.HELD_PAUSE, lambda: self._still_held(lease))
        self.look_after()

    def _still_held(self, lease: Lease) -> None:
        if self._held.get(lease.binding.devname) is not lease:
            return
        if not devices.still_bound(lease.binding):
            self._gone(lease)
            return
        self.record(Event.HELD, lease, "is still open elsewhere and goes at its last close")
        self._tell(lease)

    def on_disk(self, devname: str) -> None:
        """The kernel says that something changed about a disk."""
        if not ours(devname):
            # Perhaps the host bound the device that was kept free for it.
            self._numbers.keep_low_free()
            return
        lease = self._held.get(devname)
        if lease is not None and not devices.still_bound(lease.binding):
            self._gone(lease)
        elif self.leases.get(devname) is None:
            if self._numbers.lingers(int(devname[4:])):
                self._numbers.retry()
            # An attach under way has bound its device before it is in the books.
            self._look_at_foreign_later(devname)

    def _look_at_foreign_later(self, devname: str) -> None:
        if devname not in self._unknown:
            self._unknown.add(devname)
            self._poller.later(self.FOREIGN_CHECK, lambda: self._look_at_foreign(devname))

    def _look_at_foreign(self, devname: str) -> None:
        """Report a binding of one of this instance's numbers that is not of its making; it may be the host's own.

        Most likely a client kept a node, and opening that made the device again (no max_loop): charged to who had
        the number last, as is one that he has open so that it cannot be removed. It is never cleared: nothing proves
        whose it is.
        """
        self._unknown.discard(devname)
        number = int(devname[4:])
        file = backing_file(number)
        if file is None or self.leases.get(devname) is not None:
            self._discharge(devname)
            return
        if not self._numbers.used(number):
            return
        diskseq, now = devices.sequence(devname), time.monotonic()
        before, since = self._suspects.get(devname, (None, now))
        parked = is_parked(devname, file)
        if parked and devices.autoclear(devname) is False:
            self._nudge_parked(number, diskseq)
        seen = (file, diskseq)
        if parked:
            if before is not None:
                self._charge(devname)
            elif devname not in self._charged:  # udev has it open for a moment, most likely
                self._suspects[devname] = (seen, now)
                self._look_at_foreign_later(devname)
            return
        if devname in self._reported:
            return
        # It may be an attach that is not in the books yet: then it is at the next look. A number that lingers has none.
        maybe = before is None or (before != seen and not self._numbers.lingers(number))
        if maybe and now - since < self.policy.request_timeout:
            self._suspects[devname] = (seen, since)
            self._look_at_foreign_later(devname)
            return
        del self._suspects[devname]
        self._reported.add(devname)
        account = self._charge(devname)
        owner = self._numbers.had(number)
        text = f"{devname} is bound to {file}, and not by loopd: a client may have kept its node; it is left as it is"
        self._audit.record(
            Event.FOREIGN, text, device=devname, number=number, backing_file=file,
            account=account.name or None, uid=owner.uid if owner else None,
        )  # fmt: skip

    def _charge(self, devname: str) -> Account:
        """Charge a device that is no lease's to who had its number last."""
        account = self._charged.get(devname)
        if account is None:
            account = self._charged[devname] = self._last_account(int(devname[4:]))
            account.devices += 1
        return account

    def _last_account(self, number: int) -> Account:
        """Of who had the number last; nobody's where that is not remembered."""
        return self.accounts.last(self._numbers.had(number))

    def _discharge(self, devname: str) -> None:
        self._suspects.pop(devname, None)
        account = self._charged.pop(devname, None)
        if account is not None:
            account.devices -= 1
        if devname in self._reported:
            self._reported.discard(devname)
            self._numbers.retire(int(devname[4:]), None)

    def look_again(self) -> None:
        """Look at everything that is waited for, in case an event was lost."""
        self._numbers.retry()
        for devname, lease in list(self._held.items()):
            self.on_disk(devname)
            if lease.state is State.HELD and not lease.working:
                self._nudge(lease)
        for devname in self._charged:
            self._look_at_foreign_later(devname)
        self.look_after()

    def _nudge(self, lease: Lease) -> None:
        def ended() -> None:
            lease.working = False

        lease.working = True
        self._submit(lease, messages.Nudge(lease.binding.number, lease.binding.diskseq), void, ended=ended)

    def _nudge_parked(self, number: int, diskseq: int | None) -> None:
        """Whoever has a parked device open has seen to it that it would stay for ever."""
        devname = f"loop{number}"
        account = self._last_account(number)

        def stuck() -> None:
            text = f"A helper process hangs in {devname}, which could not be removed, and was written off"
            self._audit.record(Event.STUCK, text, device=devname, number=number, account=account.name or None)

        def landed() -> None:
            self._nudged.discard(devname)
            self._landed(account)

        def start() -> None:
            task = LeaseTask(void, None, stuck, nothing, landed)
            self._pool.submit(task, messages.Nudge(number, diskseq), [], self.policy.request_timeout)

        if devname not in self._nudged:
            self._nudged.add(devname)
            self._in_turn(account, start)

    def on_number(self) -> None:
        """The process that makes and removes numbers has answered; EOFError when it has ended instead."""
        known = self._numbers.remade
        left = self._numbers.receive()
        if left is not None:
            # Perhaps a client was faster, and its event came while the lease was there.
            self._look_at_foreign_later(f"loop{left}")
        for devname in [name for name in self._charged if not self._numbers.lingers(int(name[4:]))]:
            if devname not in self._reported:
                self._discharge(devname)
        if self._numbers.remade and not known:
            self._audit.record(
                Event.WARNED,
                "Opening a kept node of a removed loop device makes the device again: set loop.max_loop=8 (modprobe.d,"
                " or the kernel's command line where loop is built in)",
            )
        self.look_after()

    def look_after(self) -> None:
        """Look again now and then while others keep devices open, or numbers are being removed."""
        if self._looking or not (self._held or self._numbers.lingering or self._numbers.removing):
            return
        self._looking = True

        def look() -> None:
            self._looking = False
            if self._numbers.hangs:
                self._audit.record(Event.STUCK, "The process that removes device numbers hangs, and is replaced")
                self.renew_numbers()
            self.look_again()

        self._poller.later(self.HELD_CHECK, look)

    def _gone(self, lease: Lease) -> None:
        self._held.pop(lease.binding.devname, None)
        self.leases.drop(lease)
        if lease.slot is not None:
            self._slots.give_back(lease.slot)
            lease.slot = None
        holder = lease.holder
        self.retire(lease.binding.number, lease.account, Owner(holder.account, holder.uid))
        lease.state = State.RELEASED
        expired = lease.reason == "expired"
        self.record(Event.EXPIRED if expired else Event.DETACHED, lease, "expired" if expired else "was detached")
        self._tell(lease)

    def retire(self, number: int, account: Account, owner: Owner) -> None:
        """A number that a client may have kept a node of goes; if ever, only the same owner gets it again."""
        # Where its end is not told, who has its name next is not known.
        told = self._cgroups.watches(account.name) or not cgroups.watchable(account.name)
        self._numbers.retire(number, owner if told and not account.ended else None)
        self.look_after()

    def _tell(self, lease: Lease) -> None:
        for told in list(lease.waiting):
            told(lease.state)
        if lease.state is State.RELEASED:
            lease.waiting.clear()

    def transient(self) -> list[Lease]:
        """Leases that nothing keeps when the daemon ends."""
        return [lease for lease in self.leases if lease.slot is None and lease.state is not State.HELD]

    def record(self, event: Event, lease: Lease, text: str, **details: object) -> None:
        """Write the audit's record of something that happened to a lease."""
        binding, holder = lease.binding, lease.holder
        owner = Membership(holder.account, holder.unit).name
        whose = "" if binding.backing_view == files.HOST else " (a path in the client's mount namespace)"
        self._audit.record(
            event, f"{binding.devname} of {owner} on {binding.backing_file}{whose} {text}",
            device=binding.devname, number=binding.number, diskseq=binding.diskseq,
            backing_file=binding.backing_file, backing_dev=binding.backing_dev, backing_inode=binding.backing_inode,
            backing_view=binding.backing_view,
            account=holder.account, owner=str(holder.owner.account), unit=holder.unit,
            pid=holder.pid, uid=holder.uid, gid=holder.gid,
            reason=lease.reason or None, lease=lease.lease, **details,
        )  # fmt: skip


def nothing() -> None:
    """For who needs not be told."""


def void(_: object) -> None:
    """Nothing, of anything: for a job whose answer nobody waits for."""


def attached(lease: Lease, warnings: tuple[str, ...] = ()) -> wire.Attached:
    """The reply to the attach that made a lease."""
    binding: Binding = lease.binding
    return wire.Attached(
        binding.devname,
        binding.diskseq,
        binding.major,
        binding.minor,
        binding.size,
        binding.sector_size,
        binding.read_only,
        binding.direct_io,
        lease.partitions,
        warnings,
    )
