"""The service: the way of a request from the head of the queue to the reply.

    peek -> decode -> admit -> (a worker: take, vet, perform) -> book -> reply -> audit

Never holds an fd that a worker has not vetted. Everything that waits for a disk, a client or the kernel happens in a
worker, but for `counter.Counter`.
"""

from __future__ import annotations

import socket
import time
from typing import Any, NamedTuple

from loopd.children.bugs import described
from loopd.children.flow import start
from loopd.children.pool import Job
from loopd.daemon import accounts
from loopd.daemon.accounts import Account, Membership
from loopd.daemon.attach import Attaches
from loopd.daemon.audit import Event
from loopd.daemon.books import Books
from loopd.daemon.dropping import Dropping
from loopd.daemon.exchange import Answers, Exchange, answered
from loopd.daemon.granting import Granting, job_of
from loopd.daemon.operations import Operations
from loopd.daemon.policy import Limits
from loopd.daemon.reserve import Reservation, Reservations
from loopd.kernel import cgroups, transport
from loopd.kernel.poller import ONCE
from loopd.kernel.transport import FdSet, Sender
from loopd.protocol.decode import decode
from loopd.protocol.wire import Attach, Code, Directories, Directory, Refusal, Rescan, Resize
from loopd.worker import messages
from loopd.worker.messages import Recognised, Take, Taken

SHARED_WARNING = (
    "Clients are not told apart, for the host or their runtime has cgroups of the first version alone: all of them are"
    " one account with strict limits, and only with a directory grant can they list and detach"
)


class Listener(NamedTuple):
    """A socket that requests arrive on; the administrator's sees and may end every lease."""

    socket: socket.socket
    admin: bool


class Service:
    """Takes requests off the queues, and has each answered."""

    CLOSING = 0.1
    """Seconds after which the worker of an answered request may hang: it has files to close, no more."""
    BURST = 16
    """Datagrams of one queue that are looked at before other events get their turn."""

    def __init__(
        self, books: Books, listeners: list[Listener], dropping: Dropping, answers: Answers, attaches: Attaches,
        reservations: Reservations, granting: Granting, operations: Operations,
    ) -> None:  # fmt: skip
        self._books = books
        self._reservations = reservations
        self._listeners = listeners
        self._dropping = dropping
        self._answers = answers
        self._attaches = attaches
        self._granting = granting
        self._operations = operations
        self._waiting: set[int] = set()
        self._taking: set[int] = set()
        self._stopping = False
        self.under_way = 0
        """Requests that were not answered yet."""
        self.last_activity = time.monotonic()

    def start(self) -> None:
        """Take requests."""
        if cgroups.root() is None:
            self._books.warn("shared", SHARED_WARNING)
        for index, listener in enumerate(self._listeners):
            self._books.poller.add(listener.socket.fileno(), lambda index=index: self._serve(index), ONCE)  # type: ignore[misc]

    def stop(self) -> None:
        """Take no more requests."""
        self._stopping = True
        for listener in self._listeners:
            self._books.poller.remove(listener.socket.fileno())

    # The head of a queue ----------------------------------------------------------------------------------------------

    def _serve(self, index: int) -> None:
        """Serve the head of a queue, and the datagrams behind it while workers are there."""
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
            if not self._books.pool.available():
                self._later(index)
                return
            try:
                self._admit(index, *peeked)
            except Exception as error:  # noqa: BLE001  # there is nobody to answer, and there are others in the queue
                self._give_up_head(index, peeked.sender, error)
        if index not in self._taking:
            try:
                self._books.poller.rearm(listener.socket.fileno())
            except OSError:  # ENOMEM
                self._later(index)

    def _give_up_head(self, index: int, sender: Sender, error: Exception) -> None:
        """Record a bug that a datagram brought about, and have the datagram dropped: else it would stay at the head."""
        account, nobody = self._books.accounts.get(""), Membership("", "")
        if account.refused(Answers.MOST_REFUSALS):
            self._books.audit.record(Event.FAILED, described(error)[-4000:])
        if index not in self._taking:
            self._drop(index, sender, nobody, account, "they met a bug of loopd", run=False)

    def _later(self, index: int) -> None:
        """Serve a queue again soon: no event of the poller will tell."""
        self._waiting.add(index)
        self._books.pool.try_again()

    def serve_waiting(self) -> None:
        """A worker may be available again."""
        waiting, self._waiting = self._waiting, set()
        for index in waiting:
            self._serve(index)

    def _release_head(self, exchange: Exchange) -> None:
        if not exchange.taken:
            exchange.taken = True
            self._taking.discard(exchange.listener)
            self._serve(exchange.listener)

    def _drop(self, index: int, sender: Sender, member: Membership, account: Account, why: str, *, run: bool) -> None:
        """Have the head of a queue dropped unanswered; with `run`, also what follows it of the same process."""

        async def drop() -> None:
            count, hangs = await self._dropping.drop(index, sender.pid, account, run=run)
            self._books.metrics.dropped += count
            if count:
                text = f"dropped, {why}{', and what is in it hangs' if hangs else ''}"
                self._answers.shed(account, member, sender, text, count)
            self._taking.discard(index)
            self._serve(index)

        self._taking.add(index)
        start(drop())

    # Admit ------------------------------------------------------------------------------------------------------------

    def _admit(self, index: int, payload: bytes, sender: Sender) -> None:
        envelope, request = decode(payload)
        found = accounts.whose(sender.pid)
        member, by_uid = found or (Membership("", ""), False)
        account = self._books.accounts.now(member.account, sender.uid if by_uid else None)
        if found is None:
            # The sender is gone, or the socket attests nothing: there is nobody to charge and nobody to answer.
            self._drop(index, sender, member, account, "their senders had ended or are unknown", run=False)
            return
        terms = self._books.terms(member.account, sender.uid, sender.gid)
        if member.account == accounts.SHARED:
            self._books.warn("shared", SHARED_WARNING)
        if _unwanted(account, terms.limits):
            self._drop(index, sender, member, account, "too many of its requests are under way or hang", run=True)
            return
        exchange = Exchange(index, self._listeners[index].admin, sender, member, account, terms, envelope)
        if envelope.reply_fd is None:
            exchange.address = self._answers.address(sender)
            if not exchange.address and not isinstance(request, Refusal):
                request = Refusal(
                    Code.UNDELIVERABLE, "there is no reply_fd, and the sender's address cannot be trusted to be its own"
                )
        undecoded = isinstance(request, Refusal) and not envelope.op
        reply = messages.SEARCH if undecoded else envelope.reply_fd
        job = Take(index, payload, sender, reply, envelope.dir_fd)
        mine = None
        try:
            if self._books.mistake and isinstance(request, (Attach, Directory, Rescan, Resize)):
                why = f"the administrator has to correct the configuration first: {self._books.mistake}"
                raise Refusal(Code.NOT_PERMITTED, why[:1000])
            if isinstance(request, Attach):
                job, mine = self._attaches.admit(exchange, request, job)
            elif isinstance(request, (Directory, Directories)):
                job = job._replace(grants=job_of(exchange, request))
        except Refusal as refusal:
            request = refusal
        start(self._exchange(exchange, request, job, mine))

    # The flow of a request --------------------------------------------------------------------------------------------

    async def _exchange(self, exchange: Exchange, request: Any, message: Take, mine: Reservation | None) -> None:
        """One request, from its datagram to its reply."""
        account = exchange.account
        fds = () if mine is None or mine.slot is None else (mine.slot.fd,)
        job = Job(message, fds, self._books.policy.request_timeout, account.jobs, lambda: self._stuck(exchange))
        account.requests.add(exchange)
        self._taking.add(exchange.listener)
        self.under_way += 1
        self._books.pool.dispatch(job)
        try:
            taken = await self._take(exchange, job)
            if isinstance(request, Refusal):
                raise request
            if taken.refusal is not None:
                raise taken.refusal
            if taken.granted:
                await self._recognise(exchange, job)
            if mine is not None:
                await self._attaches.attach(exchange, mine, taken, job)
            elif message.grants is not None:
                self._answers.send(exchange, await self._granting.perform(exchange, message.grants, job))
            else:
                self._answers.send(exchange, await self._operations.perform(exchange, request))
        except Refusal as refusal:
            if refusal.code is Code.INTERNAL:
                self._answers.bug(exchange, refusal.message)
            else:
                self._answers.send(exchange, refusal)
        except Exception as error:  # noqa: BLE001  # the one boundary for bugs on this side
            self._answers.bug(exchange, described(error))
        self._release_head(exchange)
        self.last_activity = time.monotonic()
        self.under_way -= 1
        job.slow_at = min(job.slow_at, time.monotonic() + self.CLOSING)
        try:
            if mine is not None:
                await self._reservations.end(mine, job)
            await job.over
        finally:
            account.requests.discard(exchange)

    async def _take(self, exchange: Exchange, job: Job) -> Taken:
        """The datagram is off the queue: keep the fds that were vetted, and let the next datagram come."""
        message, fds = await job.answer()
        exchange.fds = FdSet(fds.steal(index) for index in range(len(fds)))
        taken: Taken = answered(message)
        given = iter(exchange.fds)
        pidfd = next(given) if taken.pidfd else None
        exchange.reply_fd = next(given) if taken.reply else None
        lease_fd = next(given) if taken.kept_by in ("pidfd", "socket") else None
        exchange.keeper = {"reply": exchange.reply_fd, "sender": pidfd}.get(taken.kept_by, lease_fd)
        self._release_head(exchange)
        return taken

    async def _recognise(self, exchange: Exchange, job: Job) -> None:
        """Find out which grant was sent along, and the numbers that it owns."""
        message: Recognised = answered(await job.done())
        if message.refusal is not None:
            raise message.refusal
        exchange.grant, exchange.numbers = message.grant, message.numbers

    def _stuck(self, exchange: Exchange) -> None:
        """Record that the worker hangs, most likely on one of the client's own files."""
        self._books.metrics.stuck += 1
        who = exchange.member.name
        text = f"A worker process hangs in a request of {who}: it was killed, and is charged to it until it ends"
        self._answers.record(Event.STUCK, exchange, text, Code.TIMEOUT)


def _unwanted(account: Account, limits: Limits) -> bool:
    """Whether the account has as much under way as it may have."""
    # An answered request may keep its worker while files are closed. Do not count it against a client that waits for
    # each reply.
    answered = any(request.finished for request in account.requests)
    crowded = len(account.requests) >= limits.requests + answered
    return crowded or account.hung >= limits.stuck or account.hanging >= Account.MOST_HANGING
