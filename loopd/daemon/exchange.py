"""An exchange: one request and its one reply, and what is recorded of it."""

from __future__ import annotations

import contextlib
import socket
import time
from typing import Any

from loopd.children.pool import ENDED, HUNG
from loopd.daemon.accounts import NOBODY, Account, Membership, Owner, owner_of
from loopd.daemon.audit import Event
from loopd.daemon.books import Books
from loopd.daemon.leases import Holder
from loopd.daemon.policy import Terms
from loopd.kernel import transport
from loopd.kernel.transport import FdSet, Sender
from loopd.protocol import wire
from loopd.protocol.wire import Code, Envelope, Refusal, Reply


class Exchange:
    """A request that is under way. `fds` are those that its worker handed over, among them the reply socket and the
    keeper. `taken`: its datagram is off the queue. `cgroup`: the id of the sender's account's, 0 where it is not known.
    `grant`: the directory of loopd's that was sent along, and `numbers` are its own.
    """

    def __init__(
        self, listener: int, admin: bool, sender: Sender, member: Membership, account: Account, terms: Terms,
        envelope: Envelope,
    ) -> None:  # fmt: skip
        self.listener = listener
        self.admin = admin
        self.sender = sender
        self.member = member
        self.account = account
        self.cgroup = account.cgroup
        self.terms = terms
        self.envelope = envelope
        self.started = time.monotonic()
        self.taken = False
        self.finished = False
        self.address = b""
        self.grant = ""
        self.numbers: tuple[int, ...] = ()
        self.fds = FdSet()
        self.reply_fd: int | None = None
        self.keeper: int | None = None

    @property
    def owner(self) -> Owner:
        """The owner of the leases that the request is about."""
        return Owner(f"directory {self.grant}", 0) if self.grant else self.person

    @property
    def person(self) -> Owner:
        """The owner of what the sender attaches without a directory grant: fresh numbers are counted for it."""
        return owner_of(self.member.account, self.sender.uid, self.cgroup)

    def owns(self, holder: Holder) -> bool:
        """Whether a lease of that holder is the sender's."""
        return self.owner != NOBODY and self.owner == holder.owner


def answered(message: Any) -> Any:
    """What the worker of a request says. Raises Refusal where it ended or hangs."""
    if message is ENDED:
        raise Refusal(Code.INTERNAL, "the worker process of this request ended")
    if message is HUNG:
        raise Refusal(Code.TIMEOUT, "the request was not done in time: do its files answer?")
    return message


class Answers:
    """Sends replies, and records what is refused."""

    MOST_REFUSALS = 20
    """Refusals of one account in a second that have a record each; the others are counted."""

    def __init__(self, books: Books, listeners: list[socket.socket], *, by_hand: bool) -> None:
        """`by_hand`: root runs the daemon, not the service's user, and can look at its senders' namespaces."""
        self._books = books
        self._listeners = listeners
        self._by_hand = by_hand

    def address(self, sender: Sender) -> bytes:
        """Where to answer a request without reply_fd, the oldest form; empty where it may not be answered.

        Only an address of the kernel's choice will do, never a path. An address may be somebody else's in another
        network namespace: so the administrator has to vouch for the clients.
        """
        if not transport.is_autobound(sender.address):
            return b""
        known = self._books.policy.reply_to_address or (self._by_hand and transport.shares_network(sender.pid))
        return sender.address if known else b""

    def send(self, exchange: Exchange, reply: Reply | Refusal, fds: tuple[int, ...] = ()) -> bool:
        """Send the one reply of an exchange; whether it could be delivered. A refusal is recorded."""
        if exchange.finished:
            return False
        exchange.finished = True
        payload = wire.encode_reply(reply, exchange.envelope.id)
        try:
            if exchange.reply_fd is None:
                delivered = self._send_to(exchange, payload)
            else:
                delivered = transport.reply(exchange.reply_fd, payload, fds)
        finally:
            exchange.fds.close()
        if isinstance(reply, Refusal):
            self._books.metrics.refused(reply.code)
            self.record_singly(
                Event.REFUSED, exchange, f"A request of {exchange.member.name} was refused: {reply}", reply.code
            )
        if not delivered:
            self._books.metrics.refused(Code.UNDELIVERABLE)
            text = f"The reply to {exchange.member.name} could not be delivered"
            self.record_singly(Event.REFUSED, exchange, text, Code.UNDELIVERABLE)
        return delivered

    def _send_to(self, exchange: Exchange, payload: bytes) -> bool:
        address = exchange.address or self.address(exchange.sender)
        if not address:
            return False
        try:
            self._listeners[exchange.listener].sendto(payload, socket.MSG_DONTWAIT, address)
        except OSError:
            return False
        return True

    def bug(self, exchange: Exchange, text: str) -> None:
        """Record a bug with its traceback, and answer without."""
        self.record_singly(Event.FAILED, exchange, text[-4000:], Code.INTERNAL)
        with contextlib.suppress(Exception):
            self.send(exchange, Refusal(Code.INTERNAL, "a bug of loopd: the journal of the host says more"))

    def record_singly(self, event: Event, exchange: Exchange, message: str, code: Code) -> None:
        """Record what a client can bring about as often as it likes: beyond the first in a second it is counted."""
        if exchange.account.refused(self.MOST_REFUSALS):
            self.record(event, exchange, message, code)
        else:
            why = "refused, more than are recorded singly"
            self.shed(exchange.account, exchange.member, exchange.sender, why)

    def record(self, event: Event, exchange: Exchange, message: str, code: Code) -> None:
        """Record something about a request."""
        self._books.audit.record(
            event, message,
            operation=exchange.envelope.op or None, code=code.value,
            account=exchange.member.account, unit=exchange.member.unit,
            pid=exchange.sender.pid, uid=exchange.sender.uid, gid=exchange.sender.gid,
            duration_usec=int((time.monotonic() - exchange.started) * 1e6),
        )  # fmt: skip

    def shed(self, account: Account, member: Membership, sender: Sender, why: str, count: int = 1) -> None:
        """Count requests that have no record of their own: there is one record for each account and second."""
        account.shed += count
        if account.shed > count:
            return

        def tell() -> None:
            count, account.shed = account.shed, 0
            self._books.audit.record(
                Event.SHED,
                f"{count} requests of {member.account or 'nobody'} have no record of their own: {why}",
                account=member.account, unit=member.unit, uid=sender.uid, pid=sender.pid, count=count,
            )  # fmt: skip

        self._books.poller.later(1.0, tell)
