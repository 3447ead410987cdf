"""The service: the way of a request from the head of the queue to the reply, and of a lease to its end.

    peek -> decode -> admit -> (a helper: take, vet, perform) -> book -> audit -> reply

The one writer of leases, accounts and numbers; never holds an fd that a helper has not vetted. Everything that waits for a
disk, a client or the kernel happens in a helper.
"""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from . import __version__, accounts, cgroups, devices, helper, leases, records, transport, wire
from .accounts import Account, Accounts, Membership, Owner
from .audit import Audit, Event
from .devices import Client, Number
from .leases import Holder, Lease, Leases, Slots, State
from .numbers import Exhausted, Numbers, ours
from .policy import Allow, Policy, Terms
from .poller import HUNG_UP, ONCE, Poller
from .pool import Pool, Worker
from .transport import FdSet, Sender
from .wire import Attach, Code, Detach, Envelope, Hello, Refusal, Reply, Request
from .wire import Leases as ListLeases


FDS_OF_A_LEASE = 5
"""Device, directory, lock, keeper and slot."""
SPARE_FDS = 512
"""File descriptors for everything else: helpers' channels, replies under way, free slots."""
WARN_AT = 0.8


class Listener(NamedTuple):
    """A socket that requests arrive on; the administrator's sees and may end every lease."""

    socket: socket.socket
    admin: bool


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
        self.taken = False
        self.finished = False
        self.stuck = False
        self.attaching = False
        self.slot: socket.socket | None = None
        self.number: int | None = None
        self.holder: Holder | None = None
        self.lease = ""
        self.fds = FdSet()
        self.pidfd: int | None = None
        self.reply_fd: int | None = None
        self.lease_fd: int | None = None

    @property
    def owner(self) -> Owner:
        return Owner(self.member.account, self.sender.uid)

    def message(self, worker: Worker, message: Any, fds: FdSet) -> None:
        try:
            if isinstance(message, helper.Taken):
                self.service.on_taken(self, message, fds)
            elif isinstance(message, helper.NumberPlease):
                self.service.on_number_please(self, worker)
            else:
                self.service.on_done(self, message, fds)
        except Refusal as refusal:
            self.service.answer(self, refusal)
        except Exception:
            self.service.bug(self)

    def ended(self) -> None:
        self.service.on_helper_ended(self)

    def timed_out(self) -> None:
        self.service.on_helper_stuck(self)

    def reaped(self) -> None:
        self.service.on_helper_reaped(self)


class Removal:
    """A lease that a helper is taking away; a `pool.Task`."""

    def __init__(self, service: Service, lease: Lease) -> None:
        self._service = service
        self._lease = lease

    def message(self, worker: Worker, message: Any, fds: FdSet) -> None:
        self._lease.nodes = message.left
        self._done()

    def ended(self) -> None:
        self._done()

    def timed_out(self) -> None:
        self._done()

    def reaped(self) -> None:
        pass

    def _done(self) -> None:
        """The helper has let go of the device, or hangs with its own copy of it."""
        if self._lease.state is State.RELEASING:
            self._service.on_removed(self._lease)


class Restoration:
    """A lease of an earlier daemon whose nodes a helper looks up; a `pool.Task`."""

    def __init__(self, service: Service, lease: Lease, reply: int | None) -> None:
        self._service = service
        self._lease = lease
        self._reply = reply

    def message(self, worker: Worker, message: Any, fds: FdSet) -> None:
        self._lease.nodes = message.nodes
        self._answer(message.refusal and Refusal(Code(message.refusal[0]), message.refusal[1]))

    def ended(self) -> None:
        self._answer(Refusal(Code.INTERNAL, "the helper process of this request ended"))

    def timed_out(self) -> None:
        self._answer(Refusal(Code.TIMEOUT, "the request was not done in time: do its files answer?"))

    def reaped(self) -> None:
        pass

    def _answer(self, refusal: Refusal | None) -> None:
        reply, self._reply = self._reply, None
        self._service.on_restored(self._lease, reply, refusal)


class Service:
    """The main process's state and its stages."""

    MAX_LIST = 48
    """Leases in one reply: with the longest paths they fit into wire.MAX_REPLY."""

    BURST = 64
    """Datagrams of one queue that are looked at before other events get their turn."""

    HELD_CHECK = 5.0
    """Seconds between looks at devices that others keep open, in case a uevent was missed."""

    def __init__(
        self, poller: Poller, listeners: list[Listener], make_pool: Callable[[Callable[[], None]], Pool], numbers: Numbers,
        slots: Slots, audit: Audit, policy: Policy, instance: str,
    ) -> None:  # fmt: skip
        self._poller = poller
        self._listeners = listeners
        self._pool = make_pool(self._serve_waiting)
        self._numbers = numbers
        self._slots = slots
        self._audit = audit
        self.policy = policy
        self._instance = instance
        self._accounts = Accounts()
        self._cgroups = cgroups.Watcher(self._account_ended)
        poller.add(self._cgroups.fd, self._cgroups.receive)
        self._leases = Leases()
        self._pending: deque[Callable[[], None]] = deque()
        self._held: dict[str, Lease] = {}
        self._kept: list[socket.socket] = []
        self._replies: dict[str, int | None] = {}
        self._waiting: set[int] = set()
        self._taking: set[int] = set()
        self._exchanges = 0
        self._most_fds = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - SPARE_FDS
        self._warned: set[str] = set()
        self._stopping = False
        self._watching = False
        self.last_activity = time.monotonic()

    @property
    def busy(self) -> bool:
        """Whether there is anything to hold or to do."""
        return bool(self._exchanges or len(self._leases) or self._pool.busy or self._numbers.removing)

    @property
    def status(self) -> str:
        """What ``systemctl status`` shows."""
        return f"{len(self._leases)} leases, {self._exchanges} requests under way, {self._pool.lost} helpers hanging"

    @property
    def ending(self) -> bool:
        """Whether after `stop` something is still to be done that the fd store does not keep."""
        return bool(self._exchanges or self._pool.busy or self._numbers.removing or self._transient())

    def stop(self) -> None:
        """Take no more requests, and take away what nothing would keep; a lease in the fd store stays."""
        for listener in self._listeners:
            self._poller.remove(listener.socket.fileno())
        self._stopping = True
        for lease in self._transient():
            self.release(lease, "stopped")
        self._numbers.remove_unused()

    def _transient(self) -> list[Lease]:
        return [lease for lease in self._leases if lease.slot is None and lease.state is not State.HELD]

    def start(self) -> None:
        """Go on with what was recovered, tidy up after a daemon that died, and take requests."""
        self._resume()
        self._numbers.sweep({lease.binding.number for lease in self._leases})
        self._numbers.keep_low_free()
        for index, listener in enumerate(self._listeners):
            self._poller.add(listener.socket.fileno(), lambda index=index: self._serve(index), ONCE)  # type: ignore[misc]

    def recover(self, slot: socket.socket) -> None:
        """Carry on what an earlier daemon left in a slot of the fd store."""
        self._slots.known()
        try:
            found = leases.stored(slot, self._accounts.get)
        except (ValueError, KeyError, TypeError) as error:
            # Most likely a newer loopd's, before a downgrade: it stays in the store, and its device bound.
            self._kept.append(slot)
            self._audit.record(Event.WARNED, f"A lease in the fd store cannot be read and is kept as it is: {error}")
            return
        if found is None:
            self._slots.give_back(slot)
            return
        lease, reply = found
        twin = self._leases.get(lease.binding.devname)
        if twin is not None:
            # The daemon ended between the two records of a release: the one that still has the device goes on.
            lease, twin = (lease, twin) if lease.state is State.BOUND else (twin, lease)
            assert twin.slot is not None
            self._slots.give_back(twin.slot)
            self._leases.replace(lease)
        else:
            self._leases.add(lease)
        self._replies[lease.binding.devname] = reply or self._replies.get(lease.binding.devname)

    def _resume(self) -> None:
        """Go on with every lease that was recovered."""
        for lease in list(self._leases):
            reply = self._replies.pop(lease.binding.devname, None)
            if lease.state is State.HELD:
                self._after_close(lease)
                continue
            self._watch(lease)
            self._when_available(lambda lease=lease, reply=reply: self._restore(lease, reply))  # type: ignore[misc]

    def _restore(self, lease: Lease, reply: int | None) -> None:
        if lease.directory is None:
            self.on_restored(lease, reply, None)
            return
        # A client that closed its end of the reply socket has the answer, or wants it no more.
        complete = reply is not None and not transport.hung_up(reply)
        job = helper.Restore(lease.binding, Client(lease.holder.uid, lease.holder.gid), complete)
        self._pool.dispatch(Restoration(self, lease, reply), job, [lease.directory], self.policy.request_timeout)

    def on_restored(self, lease: Lease, reply: int | None, refusal: Refusal | None) -> None:
        """The nodes of a recovered lease are known; its client may still wait for the answer."""
        if reply is not None:
            nodes = [node.name for node in lease.nodes or ()]
            transport.reply(reply, wire.encode_reply(refusal or _attached(lease, nodes), lease.holder.id))
            os.close(reply)
        if refusal is not None:
            self.release(lease, "undeliverable")

    def on_number(self) -> None:
        """The process that makes and removes numbers answers; EOFError when it has ended."""
        self._numbers.receive()
        self._watch_held()

    def reap(self, pid: int) -> None:
        """A child process has ended."""
        self._pool.reap(pid)

    # peek, decode, admit ------------------------------------------------------------------------------------------

    def _serve(self, index: int) -> None:
        """Serve the head of a queue, and what comes behind it while helpers are there."""
        listener = self._listeners[index]
        for _ in range(self.BURST):
            if index in self._taking or self._stopping:
                return
            if not self._pool.available():
                self._waiting.add(index)
                self._poller.later(Pool.SLOW, self._serve_waiting)
                return
            peeked = transport.peek(listener.socket)
            if peeked is None:
                self._poller.rearm(listener.socket.fileno())
                return
            self.last_activity = time.monotonic()
            self._admit(index, *peeked)
        if index not in self._taking and not self._stopping:
            self._poller.rearm(listener.socket.fileno())

    def _serve_waiting(self) -> None:
        waiting, self._waiting = self._waiting, set()
        for index in waiting:
            self._serve(index)
        while self._pending and self._pool.available():
            self._pending.popleft()()

    def _admit(self, index: int, payload: bytes, sender: Sender) -> None:
        envelope, request = wire.decode(payload)
        cgroup = accounts.cgroup_of(sender.pid)
        if cgroup is None:
            # Gone already, or sent through a socket that attests nothing: nobody to charge and nobody to answer.
            transport.drop(self._listeners[index].socket)
            self._audit.record(
                Event.REFUSED, "A datagram of an unknown sender was dropped", pid=sender.pid, uid=sender.uid
            )
            return
        member = accounts.membership(cgroup)
        account = self._accounts.get(member.account)
        terms = self.policy.terms(self._instance, member.account, sender.uid, sender.gid)
        if account.stuck >= terms.limits.stuck or account.in_flight >= terms.limits.requests:
            transport.drop(self._listeners[index].socket)
            self._shed(account, member, sender)
            return
        exchange = Exchange(self, index, sender, member, account, terms, envelope, request)
        job = helper.Take(index, payload, sender, self._reply_index(exchange), None, None, None, {}, False)
        fds: tuple[int, ...] = ()
        if isinstance(request, Attach):
            try:
                job, fds = self._admit_attach(exchange, request, job)
            except Refusal as refusal:
                exchange.request = refusal
        account.in_flight += 1
        self._exchanges += 1
        self._taking.add(index)
        self._pool.dispatch(exchange, job, fds, self.policy.request_timeout)

    def _reply_index(self, exchange: Exchange) -> int | None:
        if isinstance(exchange.request, Refusal) and not exchange.envelope.op:
            return helper.SEARCH
        return exchange.envelope.reply_fd

    def _admit_attach(
        self, exchange: Exchange, request: Attach, job: helper.Take
    ) -> tuple[helper.Take, tuple[int, ...]]:
        if "mount" in request.deliver:
            raise Refusal(Code.UNSUPPORTED, "deliver: mount is not available here")
        account, (limits, allow) = exchange.account, exchange.terms
        _check_allowed(request, allow)
        if account.devices + account.attaching >= limits.devices:
            raise Refusal(Code.QUOTA, f"this account has {account.devices} devices, its limit is {limits.devices}")
        self._check_room()
        number = self._number(exchange)
        sender, member = exchange.sender, exchange.member
        exchange.holder = Holder(
            member.account, member.unit, sender.pid, sender.uid, sender.gid, time.time(), request.id
        )
        account.attaching += 1
        exchange.attaching = True
        exchange.slot = self._slots.take()
        if exchange.slot is None and self._slots.present:
            raise Refusal(Code.NO_DEVICE, "the service manager takes no more file descriptors for now")
        job = job._replace(
            lease=request.lease_fd,
            attach=request,
            terms=helper.Terms(allow.file_systems, allow.write, allow.block_devices, allow.mknod, number),
            holder=exchange.holder._asdict(),
            store=exchange.slot is not None,
        )
        return job, () if exchange.slot is None else (exchange.slot.fileno(),)

    def _check_room(self) -> None:
        """Refuse what the daemon itself has no room for, and warn the administrator before that."""
        leases_ = len(self._leases) + self._exchanges
        for what, used in (
            ("open files (LimitNOFILE=)", leases_ * FDS_OF_A_LEASE / self._most_fds),
            ("places in the fd store (FileDescriptorStoreMax=)", self._slots.in_use),
        ):
            if used > WARN_AT and what not in self._warned:
                self._warned.add(what)
                self._audit.record(Event.WARNED, f"More than {WARN_AT:.0%} of the {what} are used by {leases_} leases")
            if used >= 1:
                raise Refusal(Code.NO_DEVICE, f"loopd has no more {what}")

    def _number(self, exchange: Exchange) -> Number | None:
        """A number for an attach, its exchange's from now on; None when one is about to come free. Else a refusal.

        One that the owner had costs no other's stock, but it has to be made now, half a millisecond's work.
        """
        limits = exchange.terms.limits
        number = None
        if exchange.account.spend(limits.new_numbers, limits.new_numbers_per_minute):
            try:
                number = self._numbers.fresh()
            except (Exhausted, OSError) as error:
                self._audit.record(Event.WARNED, f"There is no new device number: {error}", code=Code.NO_DEVICE.value)
        number = number or self._numbers.again(exchange.owner)
        if number is not None:
            exchange.number = number.number
        elif not self._numbers.expects(exchange.owner):
            limit = f"{limits.new_numbers} and {limits.new_numbers_per_minute:g} a minute"
            raise Refusal(Code.QUOTA, f"this account has used up its new device numbers ({limit}); detach some")
        return number

    def on_number_please(self, exchange: Exchange, worker: Worker) -> None:
        """A helper lost the number it was given to somebody else, or was given none because there was none yet."""
        exchange.number = None
        try:
            number = self._number(exchange)
        except Refusal as refusal:
            worker.send(helper.UseNumber(None, (refusal.code.value, refusal.message)))
            return
        if number is not None:
            worker.send(helper.UseNumber(number))
        elif time.monotonic() < exchange.started + self.policy.number_wait:
            self._poller.later(0.01, lambda: self.on_number_please(exchange, worker))
        else:
            worker.send(helper.UseNumber(None, (Code.TIMEOUT.value, "no device number came free in time")))

    def _shed(self, account: Account, member: Membership, sender: Sender) -> None:
        """Count what is dropped unanswered; one record for each account and second."""
        account.shed += 1
        if account.shed > 1:
            return

        def tell() -> None:
            count, account.shed = account.shed, 0
            self._audit.record(
                Event.SHED,
                f"{count} requests of {member.account} were dropped: too many of its requests are under way or hang",
                account=member.account, unit=member.unit, uid=sender.uid, pid=sender.pid, count=count,
            )  # fmt: skip

        self._poller.later(1.0, tell)

    # What a helper tells ------------------------------------------------------------------------------------------

    def on_taken(self, exchange: Exchange, message: helper.Taken, fds: FdSet) -> None:
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
            raise Refusal(Code(message.refusal[0]), message.refusal[1])
        if not isinstance(exchange.request, Attach):
            self._OPERATIONS[type(exchange.request)](self, exchange, exchange.request)

    def on_done(self, exchange: Exchange, message: helper.Done, fds: FdSet) -> None:
        """The device is there with its nodes, or the attach was refused: book, audit, reply."""
        if message.refusal is not None or message.binding is None:
            code, text = message.refusal or (Code.INTERNAL.value, "the helper bound nothing")
            raise Refusal(Code(code), text)
        given = iter(range(len(fds)))
        flags = {"device": True, "directory": message.directory, "lock": message.lock, "client": message.client}
        own = {name: fds.steal(next(given)) for name, present in flags.items() if present}
        client = own.pop("client", None)
        lease = self._book(exchange, message, own)
        limit = exchange.terms.limits.bytes
        if limit and exchange.account.bytes > limit:
            self.release(lease, "refused")
            raise Refusal(Code.QUOTA, f"the devices of this account would have more than {limit} bytes together")
        reply = _attached(lease, [node.name for node in message.nodes], message.warnings)
        try:
            delivered = self.answer(exchange, reply, () if client is None else (client,))
        finally:
            if client is not None:
                os.close(client)
        if not delivered:
            self.release(lease, "undeliverable")
        self._numbers.refill()
        self._slots.top_up()

    def _book(self, exchange: Exchange, message: helper.Done, own: dict[str, int]) -> Lease:
        assert message.binding is not None
        source = {
            "pidfd": exchange.lease_fd,
            "socket": exchange.lease_fd,
            "reply": exchange.reply_fd,
            "sender": exchange.pidfd,
        }
        keeper = source[exchange.lease]
        assert keeper is not None
        own["keeper"] = os.dup(keeper)
        assert exchange.holder is not None
        lease = Lease(message.binding, exchange.holder, exchange.account, exchange.lease, own)
        lease.nodes = message.nodes
        lease.slot, exchange.slot = exchange.slot, None
        exchange.number = None
        self.adopt(lease)
        return lease

    def adopt(self, lease: Lease) -> None:
        """Take a new lease into the books."""
        self._leases.add(lease)
        self._watch(lease)

    def _watch(self, lease: Lease) -> None:
        """End the lease when what keeps it ends, or when its account does."""
        assert lease.keeper is not None
        self._poller.add(lease.keeper, lambda: self.release(lease, "expired"), HUNG_UP)
        if lease.account.ended:
            self.release(lease, "expired")
        else:
            self._cgroups.watch(lease.holder.account)

    def _account_ended(self, name: str) -> None:
        """An account's cgroup is empty: nobody is left who could use its devices, and its name may come again."""
        self._accounts.end(name)
        self._numbers.forget(name)
        for lease in list(self._leases):
            if lease.account.ended:
                self.release(lease, "expired")

    def on_helper_ended(self, exchange: Exchange) -> None:
        """The helper ended in the middle: killed, or by a bug of its own that it has printed."""
        self._release_head(exchange)
        if not exchange.finished:
            self._record(Event.FAILED, exchange, "A helper process ended in the middle of a request", Code.INTERNAL)
            self.answer(exchange, Refusal(Code.INTERNAL, "the helper process of this request ended"))

    def on_helper_stuck(self, exchange: Exchange) -> None:
        """The helper hangs, most likely on one of the client's own files."""
        self._release_head(exchange)
        exchange.account.stuck += 1
        exchange.stuck = True
        self._record(
            Event.STUCK,
            exchange,
            "A helper process hangs in a request and was written off; its account is charged",
            Code.TIMEOUT,
        )
        if not exchange.finished:
            self.answer(exchange, Refusal(Code.TIMEOUT, "the request was not done in time: do its files answer?"))

    def on_helper_reaped(self, exchange: Exchange) -> None:
        """The helper that hung is gone."""
        exchange.account.stuck -= 1
        exchange.stuck = False
        self._give_up(exchange)

    def _give_up(self, exchange: Exchange) -> None:
        """What an attach was given and did not use: its slot is free again; its number may have had a node, so it goes."""
        if exchange.slot is not None:
            self._abandon(exchange.slot)
            exchange.slot = None
        if exchange.number is not None:
            self._retire(exchange.number, exchange.account, exchange.owner)
            exchange.number = None

    def _abandon(self, slot: socket.socket) -> None:
        """A helper that ended may have booked the lease and made nodes: take them away as at any release."""
        found = leases.stored(slot, self._accounts.get)
        if found is None:
            self._slots.give_back(slot)
            return
        lease, reply = found
        if reply is not None:
            os.close(reply)
        self._leases.add(lease)
        self.release(lease, "failed")

    def _release_head(self, exchange: Exchange) -> None:
        if not exchange.taken:
            exchange.taken = True
            self._taking.discard(exchange.listener)
            self._serve(exchange.listener)

    # Operations that the main process performs --------------------------------------------------------------------

    def _hello(self, exchange: Exchange, request: Hello) -> None:
        limits = {
            "request_bytes": wire.MAX_REQUEST,
            "request_fds": wire.MAX_FDS,
            "reply_bytes": wire.MAX_REPLY,
            "devices": exchange.terms.limits.devices,
            "requests": exchange.terms.limits.requests,
        }
        self.answer(exchange, wire.Greeting(__version__, wire.VERSION, tuple(wire.OPERATIONS), limits))

    def _list(self, exchange: Exchange, request: ListLeases) -> None:
        admin = self._listeners[exchange.listener].admin
        leases = list(self._leases.of(None if admin else exchange.owner))
        start = next((i + 1 for i, lease in enumerate(leases) if lease.binding.devname == request.after), 0)
        page = leases[start : start + self.MAX_LIST]
        rows = tuple(_info(lease, admin) for lease in page)
        self.answer(exchange, wire.LeaseList(rows, more=start + len(page) < len(leases)))

    def _detach(self, exchange: Exchange, request: Detach) -> None:
        admin = self._listeners[exchange.listener].admin
        if request.force and not admin:
            raise Refusal(Code.NOT_PERMITTED, "force: for the administrator, on the admin socket")
        lease = self._leases.get(request.devname)
        if lease is None or not (admin or lease.holder.owner == exchange.owner):
            # The same words for what is not there and what is another's.
            raise Refusal(Code.NOT_FOUND, f"no device {request.devname} of yours")
        deadline = time.monotonic() + request.wait

        def told(state: State) -> None:
            if state is State.RELEASED:
                self.answer(exchange, wire.Detached("released"))
            elif not exchange.finished:
                remaining = max(0.0, deadline - time.monotonic())
                self._poller.later(remaining, lambda: None if exchange.finished else self._still_busy(exchange))

        lease.waiting.append(told)
        if lease.state is State.HELD:
            told(State.HELD)
        else:
            self.release(lease, "detached")

    def _still_busy(self, exchange: Exchange) -> None:
        self.answer(exchange, wire.Detached("busy"))

    _OPERATIONS: dict[type[Any], Callable[[Service, Exchange, Any], None]] = {
        Hello: _hello,
        ListLeases: _list,
        Detach: _detach,
    }

    # The end of a lease -------------------------------------------------------------------------------------------

    def release(self, lease: Lease, reason: str) -> None:
        """End a lease: a helper removes the nodes and partitions, then the last fd is closed."""
        if lease.state is not State.BOUND:
            return
        lease.state, lease.reason = State.RELEASING, reason
        if lease.keeper is not None:
            self._poller.remove(lease.keeper)
        self._when_available(lambda: self._remove(lease))

    def _when_available(self, dispatch: Callable[[], None]) -> None:
        if self._pool.available():
            dispatch()
        else:
            self._pending.append(dispatch)
            self._poller.later(Pool.SLOW, self._serve_waiting)

    def _remove(self, lease: Lease) -> None:
        client = Client(lease.holder.uid, lease.holder.gid)
        job = helper.Release(lease.binding, client, lease.nodes)
        fds = [fd for fd in (lease.device, lease.directory) if fd is not None]
        self._pool.dispatch(Removal(self, lease), job, fds, self.policy.request_timeout)

    def on_removed(self, lease: Lease) -> None:
        """Nodes and partitions are gone; loopd's own fds go now, and the kernel unbinds at the last close."""
        after = self._slots.take() if lease.slot is not None else None
        if after is not None:
            # Written before the device's fds go: at no moment is the binding in no record.
            records.write(after.fileno(), lease.holder._asdict(), lease.lease, lease.binding, {})
        lease.close()
        if lease.slot is not None:
            self._slots.give_back(lease.slot)
        lease.slot = after
        self._after_close(lease)

    def _after_close(self, lease: Lease) -> None:
        if devices.still_bound(lease.binding):
            self._held[lease.binding.devname] = lease
            self._tell(lease, State.HELD)
            self._record_lease(Event.HELD, lease, "is still open elsewhere and goes at its last close")
            self._watch_held()
        else:
            self._gone(lease)

    def on_uevent(self, devname: str) -> None:
        """The kernel says that something changed about a disk."""
        if not ours(devname):
            # Perhaps the host bound the device that was kept free for it.
            self._numbers.keep_low_free()
            return
        lease = self._held.get(devname)
        if lease is not None and not devices.still_bound(lease.binding):
            self._gone(lease)

    def check_held(self) -> None:
        """Look again at all devices that others keep open."""
        self._numbers.retry()
        for devname in list(self._held):
            self.on_uevent(devname)
        self._watch_held()

    def _watch_held(self) -> None:
        if (self._held or self._numbers.lingering) and not self._watching:
            self._watching = True
            self._poller.later(self.HELD_CHECK, self._look_again)

    def _look_again(self) -> None:
        self._watching = False
        self.check_held()

    def _gone(self, lease: Lease) -> None:
        self._held.pop(lease.binding.devname, None)
        self._leases.drop(lease)
        if lease.slot is not None:
            self._slots.give_back(lease.slot)
            lease.slot = None
        self._retire(lease.binding.number, lease.account, lease.holder.owner)
        event, text = (Event.EXPIRED, "expired") if lease.reason == "expired" else (Event.DETACHED, "was detached")
        self._record_lease(event, lease, text)
        self._tell(lease, State.RELEASED)
        self.last_activity = time.monotonic()

    def _retire(self, number: int, account: Account, owner: Owner) -> None:
        self._numbers.retire(number, None if account.ended else owner)

    def _tell(self, lease: Lease, state: State) -> None:
        lease.state = state
        for told in lease.waiting:
            told(state)

    # Answers and the audit ----------------------------------------------------------------------------------------

    def answer(self, exchange: Exchange, reply: Reply | Refusal, fds: tuple[int, ...] = ()) -> bool:
        """Send the one reply of an exchange and write its record; whether the reply could be delivered."""
        if exchange.finished:
            return False
        exchange.finished = True
        payload = wire.encode_reply(reply, exchange.envelope.id)
        try:
            if exchange.reply_fd is not None:
                delivered = transport.reply(exchange.reply_fd, payload, fds)
            else:
                delivered = self._answer_at_address(exchange, payload)
            if delivered and exchange.lease == "reply" and exchange.reply_fd is not None:
                transport.seal_lease(exchange.reply_fd)
        finally:
            exchange.fds.close()
            exchange.account.in_flight -= 1
            exchange.account.attaching -= exchange.attaching
            self._exchanges -= 1
            if not exchange.stuck:
                self._give_up(exchange)
        if isinstance(reply, Refusal):
            self._record(Event.REFUSED, exchange, f"Refused: {reply}", reply.code)
        elif isinstance(reply, wire.Attached):
            lease = self._leases.get(reply.devname)
            if lease is not None:
                microseconds = int((time.monotonic() - exchange.started) * 1e6)
                self._record_lease(Event.ATTACHED, lease, "was attached", duration_usec=microseconds)
        if not delivered:
            self._record(Event.REFUSED, exchange, "The reply could not be delivered", Code.UNDELIVERABLE)
        self._audit.flush()
        return delivered

    def _answer_at_address(self, exchange: Exchange, payload: bytes) -> bool:
        """Answer the seed's form of a request, which has no reply_fd.

        An address means something else in another network namespace, where it may be somebody else's. So this needs proof
        that the sender shares the listener's, or the administrator's word; and it is never a path.
        """
        address = exchange.sender.address
        listener = self._listeners[exchange.listener].socket
        if not address.startswith(b"\0"):
            return False
        if not (self.policy.reply_to_address or transport.shares_network(listener, exchange.sender.pid)):
            return False
        try:
            listener.sendto(payload, socket.MSG_DONTWAIT, address)
        except OSError:
            return False
        return True

    def bug(self, exchange: Exchange) -> None:
        """The one boundary for bugs: recorded with a traceback, answered without."""
        self._record(Event.FAILED, exchange, traceback.format_exc(), Code.INTERNAL)
        with contextlib.suppress(Exception):
            self.answer(exchange, Refusal(Code.INTERNAL, "a bug of loopd: the journal of the host says more"))

    def _record(self, event: Event, exchange: Exchange, message: str, code: Code) -> None:
        self._audit.record(
            event, message,
            operation=exchange.envelope.op or None, code=code.value,
            account=exchange.member.account, unit=exchange.member.unit,
            pid=exchange.sender.pid, uid=exchange.sender.uid, gid=exchange.sender.gid,
            duration_usec=int((time.monotonic() - exchange.started) * 1e6),
        )  # fmt: skip

    def _record_lease(self, event: Event, lease: Lease, text: str, **details: object) -> None:
        binding, holder = lease.binding, lease.holder
        self._audit.record(
            event, f"{binding.devname} of {holder.unit or holder.account} on {binding.backing_file} {text}",
            device=binding.devname, number=binding.number, diskseq=binding.diskseq,
            backing_file=binding.backing_file, backing_dev=binding.backing_dev, backing_inode=binding.backing_inode,
            account=holder.account, unit=holder.unit, pid=holder.pid, uid=holder.uid, gid=holder.gid,
            reason=lease.reason or None, lease=lease.lease, **details,
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


def _attached(lease: Lease, nodes: list[str], warnings: tuple[str, ...] = ()) -> wire.Attached:
    binding = lease.binding
    return wire.Attached(
        binding.devname,
        binding.diskseq,
        binding.major,
        binding.minor,
        binding.size,
        binding.sector_size,
        binding.read_only,
        binding.direct_io,
        tuple(name for name in nodes if name != binding.devname),
        warnings,
    )


def _info(lease: Lease, admin: bool) -> wire.LeaseInfo:
    binding, holder = lease.binding, lease.holder
    shared = binding._asdict()
    del shared["number"]
    return wire.LeaseInfo(
        **shared,
        state=lease.state.value,
        lease=lease.lease,
        age=round(lease.age, 3),
        partitions=tuple(node.name for node in lease.nodes or () if node.name != binding.devname),
        account=holder.account if admin else None,
        uid=holder.uid if admin else None,
        pid=holder.pid if admin else None,
        unit=holder.unit if admin else None,
    )
