"""The service: the way of a request from the head of the queue to the reply.

    peek -> decode -> admit -> (a helper: take, vet, perform) -> book -> reply -> audit

Part of the main process, the one writer of leases, accounts and numbers; never holds an fd that a helper has not
vetted. Everything that waits for a disk, a client or the kernel happens in a helper, but for `numbers.Counter`. What
becomes of a lease is `lifecycle`'s.
"""

from __future__ import annotations

import contextlib
import math
import re
import resource
import socket
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from loopd import __version__
from loopd.children.bugs import described
from loopd.daemon import accounts
from loopd.daemon.accounts import Account, Membership, Owner
from loopd.daemon.audit import Audit, Event
from loopd.daemon.dropper import Dropped, Dropper
from loopd.daemon.leases import Holder, Lease, Slots, State
from loopd.daemon.lifecycle import Lifecycle, attached
from loopd.daemon.metrics import Gauges, Metrics
from loopd.daemon.numbers import Exhausted, Numbers
from loopd.daemon.policy import Allow, Policy, Terms
from loopd.daemon.pool import Pool, Worker
from loopd.kernel import transport
from loopd.kernel.poller import ONCE, Poller, Timer
from loopd.kernel.transport import FdSet, Sender
from loopd.protocol import wire
from loopd.protocol.wire import (
    Attach,
    Code,
    Detach,
    Directory,
    Envelope,
    Hello,
    Leases,
    Refusal,
    Reply,
    Request,
    Rescan,
    Resize,
)
from loopd.worker import messages, records
from loopd.worker.devices import Number

FDS_OF_A_LEASE = 4
"""Device, directory, keeper and slot; one more for a lock that is kept, and one for each account."""
SPARE_FDS = 512
"""File descriptors for everything else: helpers' channels, replies under way, free slots."""
WARN_AT = 0.8


class Listener(NamedTuple):
    """A socket that requests arrive on; the administrator's sees and may end every lease."""

    socket: socket.socket
    admin: bool


class Unwanted(NamedTuple):
    """Whose datagrams are dropped unread, until when (monotonic clock; 0: this one alone), and what is told of them."""

    sender: Sender
    until: float
    account: Account
    member: Membership
    why: str


class Exchange:
    """One request on its way through the stages. A `pool.Task`: it is told how its helper gets on."""

    def __init__(
        self, service: Service, listener: int, sender: Sender, member: Membership, account: Account, terms: Terms,
        envelope: Envelope, request: Request | Refusal,
    ) -> None:  # fmt: skip
        self.service = service
        self.listener = listener
        self.sender = sender
        self.member = member
        self.account = account
        self.terms = terms
        self.envelope = envelope
        self.request = request
        self.started = time.monotonic()
        self.slow_at = math.inf
        self.taken = False
        self.finished = False
        self.stuck = False
        self.attaching = False
        self.slot: socket.socket | None = None
        self.record: int | None = None
        self.number: int | None = None
        self.charged = False
        self.holder: Holder | None = None
        self.address = b""
        self.lease = ""
        self.grant = ""
        self.fds = FdSet()
        self.pidfd: int | None = None
        self.reply_fd: int | None = None
        self.lease_fd: int | None = None

    @property
    def owner(self) -> Owner:
        """Whose leases the request is about."""
        return Owner(f"directory {self.grant}", 0) if self.grant else self.person

    @property
    def person(self) -> Owner:
        """Who asks, whatever grant he has along."""
        return Owner(self.member.account, self.sender.uid)

    def message(self, worker: Worker, message: Any, fds: FdSet) -> None:
        try:
            if isinstance(message, messages.Taken):
                self.service.on_taken(self, message, fds)
            elif isinstance(message, messages.Recognised):
                self.service.on_recognised(self, message)
            elif isinstance(message, messages.Changed):
                self.service.answer(self, wire.Granted(message.path))
            elif isinstance(message, messages.NumberPlease):
                self.service.on_number_please(self, worker)
            else:
                self.service.on_done(self, message, fds)
        except Refusal as refusal:
            self.service.answer(self, refusal)
        except Exception as error:  # noqa: BLE001  # the one boundary for bugs on this side
            self.service.bug(self, described(error))
        finally:
            if isinstance(message, messages.Done) and message.client:
                fds.close()
                worker.send(messages.Closed())

    def ready(self) -> None:
        self.account.helpers.discard(self)
        self.land()

    def land(self) -> None:
        """Charge the request no more, once it is answered and its helper has done with it."""
        if self.finished and self not in self.account.helpers:
            self.account.flights.discard(self)

    def ended(self) -> None:
        self.ready()
        self.service.on_helper_ended(self)

    def timed_out(self) -> None:
        self.ready()
        self.service.on_helper_stuck(self)

    def reaped(self) -> None:
        self.service.on_helper_reaped(self)


class Hung:
    """A dropper that hangs in what an account has sent, until it is reaped; a `pool.Lost`."""

    def __init__(self, account: Account) -> None:
        self._account = account
        account.hung += 1

    def reaped(self) -> None:
        self._account.hung -= 1


class Waiter:
    """A detach that is to be answered when its lease is over, or else at its deadline."""

    def __init__(self, service: Service, exchange: Exchange, lease: Lease, deadline: float) -> None:
        self._service = service
        self._exchange = exchange
        self._lease = lease
        self._deadline = deadline
        # A release that a client keeps from going on must not keep who asks for it waiting for ever; loopd's own client
        # waits as long as a request may take.
        patience = time.monotonic() + 0.9 * service.policy.request_timeout
        self._timer = service.at(max(deadline, patience), self._busy)

    def told(self, state: State) -> None:
        """The lease is in another state."""
        if self._timer is not None:
            self._timer.cancel()  # else it would keep all this for as long as the client chose to wait
        if state is State.RELEASED:
            self._service.answer(self._exchange, wire.Detached("released"))
        else:
            self._timer = self._service.at(self._deadline, self._busy)

    def _busy(self) -> None:
        if self.told in self._lease.waiting:
            self._lease.waiting.remove(self.told)
            self._service.answer(self._exchange, wire.Detached("busy"))


class Service:
    """The stages of a request."""

    MOST_SLOW = 8
    """Helpers that one account's requests may keep for longer than a request takes, before more are dropped."""

    CLOSING = 0.1
    """Seconds for a helper to be done with a request that was answered: it has files to close, no more."""

    MOST_REFUSALS = 20
    """Refusals of one account in a second that are recorded one by one; the others are counted."""

    BURST = 16
    """Datagrams of one queue that are looked at before other events get their turn."""

    AT_ONCE = 8
    """Requests that one process may send at once, or as many as it may in so many milliseconds: what is behind them in
    the queue waits for each. A client with more threads sends again what was dropped.
    """

    MOST_FLOODS = 256
    """Processes that are remembered as floods before those whose time is over are forgotten."""

    FLOOD_PAUSE = 0.01
    """Seconds for which what a process sends is dropped unread after it has sent too much, and its allowance does not
    grow: who waits for room in the queue gets it only where a flood is taken out faster than it comes in.
    """

    def __init__(
        self, poller: Poller, listeners: list[Listener], pool: Pool, lifecycle: Lifecycle, numbers: Numbers,
        slots: Slots, audit: Audit, metrics: Metrics, policy: Policy, instance: str,
    ) -> None:  # fmt: skip
        self._poller = poller
        self._listeners = listeners
        self._pool = pool
        self._lifecycle = lifecycle
        self._leases = lifecycle.leases
        self._numbers = numbers
        self._slots = slots
        self._audit = audit
        self._metrics = metrics
        self._instance = instance
        self.policy = policy
        self.mistake = ""
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most_fds = limit - min(SPARE_FDS, limit // 2)
        self._warned: set[str] = set()
        self._waiting: set[int] = set()
        self._taking: set[int] = set()
        self._exchanges = 0
        self._droppers = [Dropper(poller, listener.socket) for listener in listeners]
        self._parkers = [Dropper(poller, listener.socket, parks=True) for listener in listeners]
        self._floods: dict[int, Unwanted] = {}
        self._stopping = False
        self.last_activity = time.monotonic()

    @property
    def busy(self) -> bool:
        """Whether there is anything to hold, to do or to remember."""
        at_work = self._exchanges or len(self._leases) or self._pool.busy or self._numbers.removing
        return bool(at_work or self._numbers.lingering or self._lifecycle.accounts.burning)

    @property
    def status(self) -> str:
        """What ``systemctl status`` shows."""
        wrong = " ".join(f"Nothing is attached, the configuration is wrong: {self.mistake} - ".split("\n"))
        work = f"{len(self._leases)} leases, {self._exchanges} requests under way, {self._pool.lost} helpers hanging"
        return wrong + work if self.mistake else work

    def start(self) -> None:
        """Take requests."""
        for index, listener in enumerate(self._listeners):
            self._poller.add(listener.socket.fileno(), lambda index=index: self._serve(index), ONCE)  # type: ignore[misc]

    def stop(self) -> None:
        """Take no more requests, and take away what nothing would keep; a lease in the fd store stays."""
        self._stopping = True
        for listener in self._listeners:
            self._poller.remove(listener.socket.fileno())
        for lease in self._lifecycle.transient():
            self._lifecycle.release(lease, "stopped")
        self._numbers.remove_unused(held=len(self._leases) > 0)

    @property
    def ending(self) -> bool:
        """Whether after `stop` something is still to be done that the fd store does not keep."""
        # Who waits for the end of a lease asks the next daemon.
        waiting = sum(len(lease.waiting) for lease in self._leases)
        return bool(
            self._exchanges > waiting or self._pool.busy or self._numbers.removing or self._lifecycle.transient()
        )

    # peek, decode, admit ----------------------------------------------------------------------------------------------

    def _serve(self, index: int) -> None:
        """Serve the head of a queue, and what comes behind it while helpers are there."""
        listener = self._listeners[index]
        for _ in range(self.BURST):
            if index in self._taking or self._stopping:
                return
            try:
                peeked = transport.peek(listener.socket)
            except OSError:  # ENOMEM, ENOBUFS: the queue is as it was
                self._later(index)
                return
            if peeked is None:
                break
            self.last_activity = time.monotonic()
            flood = self._floods.get(peeked.sender.pid)
            if flood is not None and self.last_activity < flood.until:
                self._drop(index, flood)
            elif self._pool.available():
                try:
                    self._admit(index, *peeked)
                except Exception as error:  # noqa: BLE001  # there is nobody to answer, and there are others in the queue
                    self._give_up_head(index, peeked.sender, error)
            else:
                self._later(index)
                return
        if index not in self._taking:
            try:
                self._poller.rearm(listener.socket.fileno())
            except OSError:  # ENOMEM
                self._later(index)

    def _give_up_head(self, index: int, sender: Sender, error: Exception) -> None:
        """Record a bug that a datagram brought about, and have it dropped: else it would stay at the head."""
        account, nobody = self._lifecycle.accounts.get(""), Membership("", "")
        if account.refused(self.MOST_REFUSALS):
            self._audit.record(Event.FAILED, described(error)[-4000:])
        if index not in self._taking:
            self._drop(index, Unwanted(sender, 0, account, nobody, "they met a bug of loopd"))

    def _later(self, index: int) -> None:
        """Serve a queue again soon: nothing else will tell that it is to be."""
        self._waiting.add(index)
        self._pool.try_again()

    def serve_waiting(self) -> None:
        """A helper may be available again."""
        waiting, self._waiting = self._waiting, set()
        for index in waiting:
            self._serve(index)

    def _admit(self, index: int, payload: bytes, sender: Sender) -> None:
        envelope, request = wire.decode(payload)
        cgroup = accounts.cgroup_of(sender.pid)
        member = Membership("", "") if cgroup is None else accounts.membership(cgroup)
        by_uid = cgroup is not None and accounts.counts_by_uid(cgroup, member, sender.pid)
        account = self._lifecycle.accounts.get(member.account, sender.uid if by_uid else None)
        if cgroup is None:
            # Gone already, or sent through a socket that attests nothing: nobody to charge and nobody to answer.
            self._drop(index, Unwanted(sender, 0, account, member, "their senders had ended or are unknown"))
            return
        terms = self.policy.terms(self._instance, member.account, sender.uid, sender.gid)
        limits = terms.limits
        rate = limits.requests_per_second
        allowance = account.requests_of(sender.pid)
        too_fast = not allowance.spend(max(self.AT_ONCE, rate * self.AT_ONCE / 1000), rate)
        why = ""
        # One that was answered, and whose helper has files to close, stands in nobody's way who waits for each answer.
        answered = any(flight.finished for flight in account.flights)
        crowded = len(account.flights) >= limits.requests + answered
        if account.stuck >= limits.stuck or account.slow >= self.MOST_SLOW or crowded:
            why = "too many of its requests are under way or hang"
        # Who waits for each answer cannot fill the queue, however fast it asks.
        elif too_fast and any(flight.sender.pid == sender.pid and not flight.finished for flight in account.flights):
            why = f"one process sends more than {rate:g} a second"
        if why:
            unwanted = Unwanted(sender, self.last_activity + self.FLOOD_PAUSE if too_fast else 0, account, member, why)
            if too_fast:
                allowance.pause(unwanted.until)
                self._remember(unwanted)
            self._drop(index, unwanted)
            return
        exchange = Exchange(self, index, sender, member, account, terms, envelope, request)
        if envelope.reply_fd is None:
            exchange.address = self._address(index, sender)
            if not exchange.address and not isinstance(request, Refusal):
                exchange.request = request = Refusal(
                    Code.UNDELIVERABLE, "there is no reply_fd, and the sender's address cannot be trusted to be its own"
                )
        undecoded = isinstance(request, Refusal) and not envelope.op
        reply = messages.SEARCH if undecoded else envelope.reply_fd
        job = self._complete(exchange, messages.Take(index, payload, sender, reply, envelope.dir_fd))
        account.flights.add(exchange)
        account.helpers.add(exchange)
        self._exchanges += 1
        self._taking.add(index)
        fds = () if exchange.slot is None else (exchange.slot.fileno(),)
        self._pool.dispatch(exchange, job, fds, self.policy.request_timeout)

    def _remember(self, flood: Unwanted) -> None:
        """Have what the process sends next dropped unread."""
        if len(self._floods) >= self.MOST_FLOODS:
            self._floods = {pid: other for pid, other in self._floods.items() if other.until > self.last_activity}
        self._floods[flood.sender.pid] = flood

    def _complete(self, exchange: Exchange, job: messages.Take) -> messages.Take:
        """The job of a request's helper, with what it is to do beside taking the datagram."""
        request = exchange.request
        try:
            if self.mistake and isinstance(request, (Attach, Directory, Rescan, Resize)):
                why = f"loopd gives nothing before its administrator has corrected its configuration: {self.mistake}"
                raise Refusal(Code.NOT_PERMITTED, why[:1000])
            if isinstance(request, Attach):
                return self._admit_attach(exchange, request, job)
            if isinstance(request, Directory):
                return job._replace(change=self._admit_change(exchange, request))
        except Refusal as refusal:
            exchange.request = refusal
        return job

    def _admit_attach(self, exchange: Exchange, request: Attach, job: messages.Take) -> messages.Take:
        """Charge an attach before anything is allocated, or refuse it."""
        account, (limits, allow) = exchange.account, exchange.terms
        _check_allowed(request, allow)
        if account.devices + account.attaching >= limits.devices:
            raise Refusal(Code.QUOTA, f"this account has {account.devices} devices, its limit is {limits.devices}")
        self._check_room()
        number = self._number(exchange)
        with contextlib.suppress(OSError):  # ENFILE, ENOMEM: the same as a store that is full
            exchange.slot = self._slots.take(spare=1)
        if exchange.slot is None and self._slots.present:
            raise Refusal(Code.NO_DEVICE, "the service manager takes no more file descriptors for now")
        account.attaching += 1
        exchange.attaching = True
        sender, member = exchange.sender, exchange.member
        exchange.holder = Holder(
            member.account,
            member.unit,
            sender.pid,
            sender.uid,
            sender.gid,
            time.time(),
            request.id,
            "",
            request.deliver,
            account.uid is not None,
        )
        return job._replace(
            lease=request.lease_fd,
            attach=request if allow.direct_io else request._replace(direct_io="off"),
            terms=messages.Terms(allow.file_systems, allow.write, allow.block_devices, allow.mknod, number),
            holder=exchange.holder._asdict(),
        )

    def _admit_change(self, exchange: Exchange, request: Directory) -> messages.Change:
        return messages.Change(exchange.sender.uid, request.name, request.remove, self._admin(exchange))

    def _check_room(self) -> None:
        """Refuse what the daemon itself has no room for, and warn the administrator before that."""
        count = len(self._leases) + self._exchanges
        for what, used in (
            ("open files (LimitNOFILE=)", self._files(count + 1) / max(1, self._most_fds)),
            ("places in the fd store (FileDescriptorStoreMax=)", self._slots.in_use),
        ):
            if used > WARN_AT:
                self._warn(what, f"More than {WARN_AT:.0%} of the {what} are used by {count} leases")
            if used >= 1:
                raise Refusal(Code.NO_DEVICE, f"loopd has no more {what}")
        if self._numbers.few:
            self._warn("few numbers", f"More than {WARN_AT:.0%} of the device numbers are in use or in quarantine")
        if self._pool.crowding > WARN_AT:
            self._warn("processes", f"loopd has more than {WARN_AT:.0%} of the processes that it may have (TasksMax=)")

    def _warn(self, what: str, text: str, **details: object) -> None:
        """Tell the administrator, once."""
        if what not in self._warned:
            self._warned.add(what)
            self._audit.record(Event.WARNED, text, **details)

    def _files(self, count: int) -> int:
        """Open files of so many leases."""
        return count * FDS_OF_A_LEASE + self._leases.locks + self._lifecycle.watched

    def _number(self, exchange: Exchange) -> Number | None:
        """A number for an attach, its exchange's from now on; None when one is about to come free. Else a refusal.

        One that the owner had costs no other's stock, but it has to be made now, half a millisecond's work.
        """
        limits = exchange.terms.limits
        number, none, coming = None, None, False
        exchange.charged = False
        if exchange.account.numbers.spend(limits.new_numbers, limits.new_numbers_per_minute / 60):
            try:
                number = self._numbers.fresh()
                exchange.charged = True
                self._warned.discard("numbers")
            except (Exhausted, OSError) as error:
                exchange.account.numbers.unspend()
                coming = self._numbers.making
                if not coming:
                    self._warn("numbers", f"There is no new device number: {error}", code=Code.NO_DEVICE.value)
                    none = Refusal(Code.NO_DEVICE, "no device number is free; the journal of the host says more")
        number = number or self._numbers.again(exchange.person)
        if number is not None:
            exchange.number = number.number
        elif not (coming or self._numbers.expects(exchange.person)):
            limit = f"{limits.new_numbers} and {limits.new_numbers_per_minute:g} a minute"
            raise none or Refusal(Code.QUOTA, f"this account has used up its new device numbers ({limit}); detach some")
        return number

    def on_number_please(self, exchange: Exchange, worker: Worker) -> None:
        """A helper lost the number it was given to somebody else, or was given none because there was none yet."""
        if exchange.finished:
            return  # it ended while it waited
        if exchange.number is not None:
            self._metrics.retries += 1
            if exchange.charged:
                exchange.account.numbers.unspend()
                self._numbers.retire(exchange.number, None)  # it may have been made
            else:  # one that the account had before, and may itself have open
                self._lifecycle.retire(exchange.number, exchange.account, exchange.person)
            exchange.number = None
        try:
            number = self._number(exchange)
        except Refusal as refusal:
            worker.send(messages.UseNumber(None, refusal))
            return
        if number is not None:
            worker.send(messages.UseNumber(number))
        elif time.monotonic() < exchange.started + min(self.policy.number_wait, self.policy.request_timeout / 2):
            self._poller.later(0.01, lambda: self.on_number_please(exchange, worker))
        else:
            worker.send(messages.UseNumber(None, Refusal(Code.TIMEOUT, "no device number came free in time")))

    def _drop(self, index: int, unwanted: Unwanted) -> None:
        """Have the head of a queue taken away unanswered, and what follows it of floods of the same account."""
        now = time.monotonic()
        pids = {unwanted.sender.pid: unwanted}
        if unwanted.until:
            pids |= {
                pid: flood for pid, flood in self._floods.items()
                if flood.until > now and flood.account is unwanted.account
            }  # fmt: skip
        self._taking.add(index)

        def dropped(counts: Dropped | int) -> None:
            hangs = ""
            if isinstance(counts, int):
                self._pool.lose(counts, Hung(unwanted.account))
                counts, hangs = {unwanted.sender.pid: 1}, ", and what is in it hangs"
            for pid, count in counts.items():
                self._metrics.dropped += count
                found = pids[pid]
                self._shed(found.account, found.member, found.sender, f"dropped, {found.why}{hangs}", count)
            self._taking.discard(index)
            self._serve(index)

        droppers = self._parkers if unwanted.account.hung else self._droppers
        droppers[index].drop(pids, run=bool(unwanted.until), done=dropped)

    def rest(self) -> None:
        """End the child processes that nothing is to be done for."""
        self._pool.shrink()
        hanging = self._pool.lost > 0  # what is parked might
        for droppers in [self._droppers] if hanging else [self._droppers, self._parkers]:
            for index, dropper in enumerate(droppers):
                if index not in self._taking:
                    dropper.rest()

    def _shed(self, account: Account, member: Membership, sender: Sender, why: str, count: int = 1) -> None:
        """Count what is dropped unanswered; one record for each account and second."""
        account.shed += count
        if account.shed > count:
            return

        def tell() -> None:
            count, account.shed = account.shed, 0
            self._audit.record(
                Event.SHED,
                f"{count} requests of {member.account or 'nobody'} have no record of their own: {why}",
                account=member.account, unit=member.unit, uid=sender.uid, pid=sender.pid, count=count,
            )  # fmt: skip

        self._poller.later(1.0, tell)

    # What a helper tells ----------------------------------------------------------------------------------------------

    def on_taken(self, exchange: Exchange, message: messages.Taken, fds: FdSet) -> None:
        """The datagram is off the queue: keep what passed, let the next one come, perform what needs no helper."""
        self._release_head(exchange)
        exchange.fds = FdSet(fds.steal(index) for index in range(len(fds)))
        given = iter(exchange.fds)
        exchange.pidfd = next(given) if message.pidfd else None
        exchange.reply_fd = next(given) if message.reply else None
        exchange.lease = message.lease
        exchange.lease_fd = next(given) if message.lease in ("pidfd", "socket") else None
        if isinstance(exchange.request, Refusal):
            raise exchange.request
        if message.refusal is not None:
            raise message.refusal
        if not message.granted:
            self._perform(exchange)

    def on_recognised(self, exchange: Exchange, message: messages.Recognised) -> None:
        """The directory that was sent along has a name: go on for its owner."""
        if exchange.finished:  # refused while the helper looked
            return
        if message.refusal is not None:
            raise message.refusal
        exchange.grant = message.grant
        self._perform(exchange)

    def _perform(self, exchange: Exchange) -> None:
        perform = self._OPERATIONS.get(type(exchange.request))
        if perform is not None:  # else the helper goes on with it
            perform(self, exchange, exchange.request)

    def on_done(self, exchange: Exchange, message: messages.Done, fds: FdSet) -> None:
        """The device is there with its nodes, or the attach was refused: book, reply, audit."""
        if message.refusal is not None:
            if message.cgroup and len(fds):
                self._lifecycle.watch(exchange.account, fds.steal(0))
            if message.refusal.code is Code.INTERNAL:
                self.bug(exchange, message.refusal.message)
                return
            raise message.refusal
        taken = iter([fds.steal(index) for index in range(len(fds))])
        own = {"device": next(taken)}
        own |= {name: next(taken) for name in ("directory", "lock", "cgroup") if getattr(message, name)}
        with FdSet(taken) as client:
            lease = self._book(exchange, message, own)
            limit = exchange.terms.limits.bytes
            if limit and exchange.account.bytes > limit:
                self._lifecycle.refuse(lease)
                raise Refusal(Code.QUOTA, f"the devices of this account would have more than {limit} bytes together")
            delivered = self.answer(exchange, attached(lease, message.warnings), tuple(client))
        if delivered:
            duration = time.monotonic() - exchange.started
            self._metrics.attached(duration)
            self._lifecycle.record(
                Event.ATTACHED, lease, "was attached", operation="attach", duration_usec=int(duration * 1e6)
            )
        else:
            self._lifecycle.release(lease, "undeliverable")
        self._numbers.refill()
        self._slots.top_up()

    def _book(self, exchange: Exchange, message: messages.Done, own: dict[str, int]) -> Lease:
        keepers = {"reply": exchange.reply_fd, "sender": exchange.pidfd}
        keeper = keepers.get(exchange.lease, exchange.lease_fd)
        assert keeper is not None and exchange.holder is not None and message.binding is not None  # noqa: PT018
        own["keeper"] = exchange.fds.steal(list(exchange.fds).index(keeper))
        holder = exchange.holder._replace(grant=message.grant)
        lease = Lease(message.binding, holder, exchange.account, exchange.lease, own)
        lease.nodes, lease.sure, lease.watch, lease.table = message.nodes, True, message.watch, message.table
        lease.slot, exchange.slot, exchange.number = exchange.slot, None, None
        exchange.record = None if lease.slot is None else lease.slot.fileno()
        try:
            self._lifecycle.adopt(lease)
        except OSError as error:  # ENOSPC: max_user_watches; ENOMEM
            self._lifecycle.release(lease, "refused")
            raise Refusal(Code.NO_DEVICE, f"the lease cannot be watched: {error}") from error
        return lease

    def on_helper_ended(self, exchange: Exchange) -> None:
        """The helper ended in the middle: killed, or by a bug of its own that it has printed."""
        self._release_head(exchange)
        if not exchange.finished:
            text = f"A helper process ended in the middle of a request of {exchange.member.name}"
            self._record(Event.FAILED, exchange, text, Code.INTERNAL)
            self.answer(exchange, Refusal(Code.INTERNAL, "the helper process of this request ended"))

    def on_helper_stuck(self, exchange: Exchange) -> None:
        """The helper hangs, most likely on one of the client's own files."""
        self._release_head(exchange)
        exchange.account.stuck += 1
        exchange.stuck = True
        self._metrics.stuck += 1
        text = f"A helper process hangs in a request of {exchange.member.name}, which is charged, and was written off"
        self._record(Event.STUCK, exchange, text, Code.TIMEOUT)
        if not exchange.finished:
            self.answer(exchange, Refusal(Code.TIMEOUT, "the request was not done in time: do its files answer?"))

    def on_helper_reaped(self, exchange: Exchange) -> None:
        """The helper that hung is gone."""
        exchange.account.stuck -= 1
        exchange.stuck = False
        self._give_up(exchange)

    def _give_up(self, exchange: Exchange) -> None:
        """What an attach was given and did not use: its slot is free again; its number may have had a node and goes."""
        if exchange.slot is not None:
            if self._lifecycle.abandon(exchange.slot):
                exchange.number = None
            exchange.slot = None
        if exchange.number is not None:
            self._lifecycle.retire(exchange.number, exchange.account, exchange.person)
            exchange.number = None

    def _release_head(self, exchange: Exchange) -> None:
        if not exchange.taken:
            exchange.taken = True
            self._taking.discard(exchange.listener)
            self._serve(exchange.listener)

    # Operations that need no file of the client's ---------------------------------------------------------------------

    def _hello(self, exchange: Exchange, request: Hello) -> None:
        limits = {
            "request_bytes": wire.MAX_REQUEST,
            "request_fds": wire.MAX_FDS,
            "reply_bytes": wire.MAX_REPLY,
            "devices": exchange.terms.limits.devices,
            "requests": exchange.terms.limits.requests,
        }
        own = (name for name, kind in wire.OPERATIONS.items() if kind is not wire.Metrics or self._admin(exchange))
        self.answer(exchange, wire.Greeting(__version__, wire.VERSION, tuple(own), limits))

    def _list(self, exchange: Exchange, request: Leases) -> None:
        admin = self._admin(exchange)
        # In the order of their numbers: the one that the last reply ended with may be gone by now.
        after = int(request.after.removeprefix("loop")) if re.fullmatch("loop[0-9]{1,7}", request.after) else -1
        leases = self._leases.of(None if admin else exchange.owner)
        found = [lease for lease in leases if lease.binding.number > after]
        rows: list[wire.LeaseInfo] = []
        size = 0
        for lease in found:
            row = _info(lease, admin)
            size += len(wire.encode_reply(wire.LeaseList((row,))))
            if rows and size > wire.MAX_REPLY:
                break
            rows.append(row)
        self.answer(exchange, wire.LeaseList(tuple(rows), more=len(rows) < len(found)))

    def _detach(self, exchange: Exchange, request: Detach) -> None:
        if request.force and not self._admin(exchange):
            raise Refusal(Code.NOT_PERMITTED, "force: for the administrator, on the admin socket")
        lease = self._lease(exchange, request.devname)
        if not request.force and lease.holder.owner != exchange.owner:
            raise Refusal(Code.NOT_PERMITTED, f"force: {request.devname} is another's")
        if request.diskseq not in (None, lease.binding.diskseq):
            raise Refusal(Code.NOT_FOUND, f"{request.devname} carries another binding by now")
        waiter = Waiter(self, exchange, lease, time.monotonic() + request.wait)
        lease.waiting.append(waiter.told)
        if lease.state is State.HELD:
            waiter.told(State.HELD)
        else:
            self._lifecycle.release(lease, "detached")

    def _rescan(self, exchange: Exchange, request: Rescan) -> None:
        def done(result: Refusal | tuple[str, ...]) -> None:
            self.answer(exchange, result if isinstance(result, Refusal) else wire.Rescanned(result))

        self._lifecycle.rescan(self._bound(exchange, request.devname), done)

    def _resize(self, exchange: Exchange, request: Resize) -> None:
        def done(result: Refusal | int) -> None:
            self.answer(exchange, result if isinstance(result, Refusal) else wire.Resized(result))

        self._lifecycle.resize(self._bound(exchange, request.devname), exchange.terms.limits.bytes, done)

    def _count(self, exchange: Exchange, request: wire.Metrics) -> None:
        if not self._admin(exchange):
            raise Refusal(Code.NOT_PERMITTED, "metrics: for the administrator, on the admin socket")
        states = dict.fromkeys((state.value for state in State if state is not State.RELEASED), 0)
        for lease in self._leases:
            states[lease.state.value] += 1
        self.answer(exchange, wire.Measured(self._metrics.text(Gauges(states, self._pool.lost))))

    _OPERATIONS: dict[type[Any], Callable[[Service, Exchange, Any], None]] = {  # noqa: RUF012  # never changed
        Hello: _hello,
        Leases: _list,
        Detach: _detach,
        Rescan: _rescan,
        Resize: _resize,
        wire.Metrics: _count,
    }

    def _admin(self, exchange: Exchange) -> bool:
        return self._listeners[exchange.listener].admin

    def _lease(self, exchange: Exchange, devname: str) -> Lease:
        lease = self._leases.get(devname)
        if lease is None or not (self._admin(exchange) or lease.holder.owner == exchange.owner):
            # The same words for what is not there and what is another's.
            raise Refusal(Code.NOT_FOUND, f"no device {devname} of yours")
        return lease

    def _bound(self, exchange: Exchange, devname: str) -> Lease:
        lease = self._lease(exchange, devname)
        if lease.state is not State.BOUND:
            raise Refusal(Code.BUSY, f"{devname} is detached already, and goes at its last close")
        return lease

    def at(self, deadline: float, callback: Callable[[], None]) -> Timer | None:
        """Call back at a time of the monotonic clock, at once when it has passed; the timer, if there is one."""
        if deadline <= time.monotonic():
            callback()
            return None
        return self._poller.later(deadline - time.monotonic(), callback)

    # Answers and the audit --------------------------------------------------------------------------------------------

    def answer(self, exchange: Exchange, reply: Reply | Refusal, fds: tuple[int, ...] = ()) -> bool:
        """Send the one reply of an exchange; whether it could be delivered. A refusal is recorded."""
        if exchange.finished:
            return False
        exchange.finished = True
        payload = wire.encode_reply(reply, exchange.envelope.id)
        try:
            if exchange.reply_fd is None:
                delivered = self._send_to(exchange, payload)
            elif isinstance(reply, wire.Attached):
                # If there is a record in the fd store, a new daemon does not answer again.
                delivered = records.answer(exchange.record, exchange.reply_fd, payload, fds)
            else:
                delivered = transport.reply(exchange.reply_fd, payload, fds)
        finally:
            exchange.fds.close()
            exchange.slow_at = min(exchange.slow_at, time.monotonic() + self.CLOSING)
            exchange.land()
            exchange.account.attaching -= exchange.attaching
            self._exchanges -= 1
            self.last_activity = time.monotonic()
            if not exchange.stuck:
                self._give_up(exchange)
        if isinstance(reply, Refusal):
            self._metrics.refused(reply.code)
            text = f"A request of {exchange.member.name} was refused: {reply}"
            self._record_singly(Event.REFUSED, exchange, text, reply.code)
        if not delivered:
            self._metrics.refused(Code.UNDELIVERABLE)
            text = f"The reply to {exchange.member.name} could not be delivered"
            self._record_singly(Event.REFUSED, exchange, text, Code.UNDELIVERABLE)
        return delivered

    def _address(self, index: int, sender: Sender) -> bytes:
        """Where to answer the seed's form of a request, which has no reply_fd; empty where there is no such place.

        An address means something else in another network namespace, where it may be somebody else's. So this needs
        proof that the sender shares the listener's and has the socket of that name, or the administrator's word; and it
        is an address of the kernel's choice, never a path.
        """
        if not transport.is_autobound(sender.address):
            return b""
        listener = self._listeners[index].socket
        proved = transport.shares_network(listener, sender.pid) and transport.owns_address(sender.pid, sender.address)
        return sender.address if proved or self.policy.reply_to_address else b""

    def _send_to(self, exchange: Exchange, payload: bytes) -> bool:
        address = exchange.address or self._address(exchange.listener, exchange.sender)
        if not address:
            return False
        try:
            self._listeners[exchange.listener].socket.sendto(payload, socket.MSG_DONTWAIT, address)
        except OSError:
            return False
        return True

    def bug(self, exchange: Exchange, text: str) -> None:
        """Record a bug with its traceback, and answer without."""
        self._record_singly(Event.FAILED, exchange, text[-4000:], Code.INTERNAL)
        with contextlib.suppress(Exception):
            self.answer(exchange, Refusal(Code.INTERNAL, "a bug of loopd: the journal of the host says more"))

    def _record_singly(self, event: Event, exchange: Exchange, message: str, code: Code) -> None:
        """Record what a client can bring about as often as it likes: beyond the first of a second it is counted."""
        if exchange.account.refused(self.MOST_REFUSALS):
            self._record(event, exchange, message, code)
        else:
            self._shed(exchange.account, exchange.member, exchange.sender, "refused, more than are recorded singly")

    def _record(self, event: Event, exchange: Exchange, message: str, code: Code) -> None:
        self._audit.record(
            event, message,
            operation=exchange.envelope.op or None, code=code.value,
            account=exchange.member.account, unit=exchange.member.unit,
            pid=exchange.sender.pid, uid=exchange.sender.uid, gid=exchange.sender.gid,
            duration_usec=int((time.monotonic() - exchange.started) * 1e6),
        )  # fmt: skip


def _check_allowed(request: Attach, allow: Allow) -> None:
    """Refuse what the administrator does not allow this client."""
    for permission, asked in (
        ("attach", True),
        ("partscan", request.partscan),
        ("lock", request.lock),
        ("direct_io", request.direct_io == "on"),
    ):
        if asked and not getattr(allow, permission):
            raise Refusal(Code.NOT_PERMITTED, f"the administrator does not allow this client {permission} (loopd.toml)")
    if request.sector_size not in allow.sector_sizes:
        raise Refusal(Code.NOT_PERMITTED, f"sector_size: the administrator allows {sorted(allow.sector_sizes)}")


def _info(lease: Lease, admin: bool) -> wire.LeaseInfo:
    binding, holder = lease.binding, lease.holder
    shared = binding._asdict()
    del shared["number"], shared["backing_view"]
    return wire.LeaseInfo(
        **shared,
        state=lease.state.value,
        lease=lease.lease,
        age=round(lease.age, 3),
        partitions=lease.partitions,
        owner=holder.owner.account if admin else None,
        account=holder.account if admin else None,
        uid=holder.uid if admin else None,
        pid=holder.pid if admin else None,
        unit=holder.unit if admin else None,
    )
