"""The helper process: takes one datagram, vets its fds, performs the request, hands back only what passed.

It alone touches a client's fds, one request at a time, so a file that never answers hangs this process and nothing else.
It decides nothing: what may be done arrives with the job. It keeps no state between jobs. This module also owns the
messages between the main process and a helper; both are forks of one image, so their encoding has no versions.
"""

from __future__ import annotations

import contextlib
import marshal
import os
import select
import socket
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

from . import devices, files, records, rights, transport, wire
from .devices import Binding, Client, Node, Nodes, Number
from .loop import Loop, LoopControl
from .transport import FdSet, Packet, Sender
from .wire import Attach, Code, Refusal

SEARCH = -1
"""In place of the index of reply_fd: the request could not be decoded, so answer on the first fd that will do."""


MKNOD_WARNING = (
    "the client has CAP_MKNOD: with b 7:* in its device cgroup it can reach every loop device; use --cap-drop MKNOD"
)


# Jobs, from the main process --------------------------------------------------------------------------------------


class Terms(NamedTuple):
    """What policy lets this request do, and the first number to try; without one the helper asks when it gets there."""

    file_systems: frozenset[str]
    write: bool
    block_devices: bool
    mknod: bool
    number: Number | None


class Take(NamedTuple):
    """Take the datagram that was peeked; if `attach` is there, perform it. With `store`, a slot's fd comes along."""

    listener: int
    payload: bytes
    sender: Sender
    reply: int | None
    lease: int | None
    attach: Attach | None
    terms: Terms | None
    holder: dict[str, Any]
    store: bool


class Release(NamedTuple):
    """Take a lease's nodes, partitions and binding away. Fds: the device, and the directory if it has one.

    Without `nodes` it is not known which there are.
    """

    binding: Binding
    client: Client
    nodes: tuple[Node, ...] | None


class Restore(NamedTuple):
    """Find the nodes of a lease that outlived the daemon. Fds: the directory.

    `complete`: the client still waits for the answer to its attach, so make what is missing.
    """

    binding: Binding
    client: Client
    complete: bool


class UseNumber(NamedTuple):
    """Answer to NumberPlease, or why there is none."""

    number: Number | None
    refusal: tuple[str, str] | None = None


# Answers, to the main process -------------------------------------------------------------------------------------


class Taken(NamedTuple):
    """The datagram is off the queue. Fds, each if its flag says so: the sender's pidfd, the reply socket, the lease fd.

    With a refusal nothing more is done with the request.
    """

    refusal: tuple[str, str] | None
    pidfd: bool
    reply: bool
    lease: str


class NumberPlease(NamedTuple):
    """The last number was lost to somebody else, or there was none yet."""


class Done(NamedTuple):
    """The attach is done, or refused. Fds: device; then, each if its flag says so, directory, lock, the client's device."""

    refusal: tuple[str, str] | None
    number: int | None = None
    binding: Binding | None = None
    nodes: tuple[Node, ...] = ()
    warnings: tuple[str, ...] = ()
    directory: bool = False
    lock: bool = False
    client: bool = False


class Released(NamedTuple):
    """A lease's nodes are gone but for `left`, and the kernel unbinds the device at the last close."""

    left: tuple[Node, ...]


class Restored(NamedTuple):
    """The nodes that are there."""

    refusal: tuple[str, str] | None
    nodes: tuple[Node, ...]


class Ready(NamedTuple):
    """Every fd is closed: the helper takes the next job."""


MESSAGES: tuple[type[Any], ...] = (
    Take, Release, Restore, UseNumber, Taken, NumberPlease, Done, Released, Restored, Ready,
)  # fmt: skip
_TAGS = {kind: tag for tag, kind in enumerate(MESSAGES)}
MAX_MESSAGE = 2 * wire.MAX_REQUEST + 65536
MAX_MESSAGE_FDS = 8


def _terms(*values: Any) -> Terms:
    *flags, number = values
    return Terms._make((*flags, number and Number(*number)))


def _plain(value: Any) -> Any:
    return tuple(map(_plain, value)) if isinstance(value, tuple) else value


def pack(message: Any) -> bytes:
    """A message as bytes: marshal, for speed, of plain tuples."""
    return marshal.dumps((_TAGS[type(message)], *_plain(message)))


def unpack(payload: bytes) -> Any:
    """The message that `pack` packed."""
    tag, *values = marshal.loads(payload)
    kind = MESSAGES[tag]
    if kind is Take:
        values[2] = Sender(*values[2])
        values[5] = values[5] and Attach(*values[5])
        values[6] = values[6] and _terms(*values[6])
    elif kind is Release:
        nodes = values[2] and tuple(Node(*node) for node in values[2])
        values = [Binding(*values[0]), Client(*values[1]), nodes]
    elif kind is UseNumber:
        values[0] = values[0] and Number(*values[0])
    elif kind is Restore:
        values = [Binding(*values[0]), Client(*values[1]), values[2]]
    elif kind is Restored:
        values[1] = tuple(Node(*node) for node in values[1])
    elif kind is Done:
        values[2] = values[2] and Binding(*values[2])
        values[3] = tuple(Node(*node) for node in values[3])
    elif kind is Released:
        values = [tuple(Node(*node) for node in values[0])]
    return kind(*values)


class _Vetted(NamedTuple):
    """The sockets of a request. `lease` is what keeps it: "pidfd" or "socket" (lease_fd), "reply", or the "sender"."""

    pidfd: int | None
    reply: int | None
    lease_fd: int | None
    lease: str
    refusal: Refusal | None


def _verdict(refusal: Refusal | None) -> tuple[str, str] | None:
    return None if refusal is None else (refusal.code.value, refusal.message)


# The process ------------------------------------------------------------------------------------------------------


class Helper:
    """The loop of a helper process."""

    def __init__(
        self, channel: socket.socket, listeners: list[socket.socket], control: LoopControl, nodes: Nodes
    ) -> None:
        self._channel = channel
        self._listeners = listeners
        self._control = control
        self._nodes = nodes
        self._number: int | None = None

    def run(self) -> None:
        """Serve jobs until the main process is gone."""
        while True:
            payload, fds = transport.receive(self._channel, MAX_MESSAGE, MAX_MESSAGE_FDS)
            if not payload:
                return
            with fds:
                job = unpack(payload)
                if isinstance(job, Take):
                    self._take(job, fds)
                elif isinstance(job, Release):
                    self._release(job, fds)
                else:
                    self._restore(job, fds)
            self._send(Ready())

    def _send(self, message: Any, fds: tuple[int, ...] = ()) -> None:
        transport.send(self._channel, pack(message), fds)

    def _take(self, job: Take, own: FdSet) -> None:
        packet = transport.take(self._listeners[job.listener])
        if packet is None:
            self._send(Taken((Code.INTERNAL.value, "the queue was empty"), False, False, ""))
            return
        with packet.fds:
            vetted = self._vet_sockets(job, packet)
            handed = (vetted.pidfd, vetted.reply, vetted.lease_fd)
            flags = (vetted.pidfd is not None, vetted.reply is not None, vetted.lease)
            self._send(Taken(_verdict(vetted.refusal), *flags), tuple(fd for fd in handed if fd is not None))
            if vetted.refusal is not None or job.attach is None or job.terms is None:
                return
            self._number = None
            try:
                self._attach(job, job.attach, job.terms, packet, vetted, own)
            except Refusal as refusal:
                self._send(Done(_verdict(refusal), self._number))
            except Exception as bug:  # noqa: BLE001  # the one boundary for bugs on this side
                text = "".join(traceback.format_exception(bug))[-4000:]
                self._send(Done((Code.INTERNAL.value, text), self._number))

    def _vet_sockets(self, job: Take, packet: Packet) -> _Vetted:
        """Check what the main process answers on and watches. None of it can block."""
        reply, refusal = self._reply_socket(job.reply, packet)
        lease, lease_fd = "", None
        pidfd = packet.pidfd
        try:
            if packet.payload != job.payload or packet.sender != job.sender:
                raise Refusal(Code.INTERNAL, "the head of the queue changed: somebody else reads this socket")
            if packet.truncated:
                raise Refusal(Code.MALFORMED, f"more than {wire.MAX_FDS} fds")
            if pidfd is None:  # before Linux 6.5
                pidfd = os.pidfd_open(packet.sender.pid)
            packet.fds.add(pidfd)
            if _ended(pidfd):
                raise ProcessLookupError
            if job.lease is not None:
                candidate = borrow(packet.fds, job.lease, "lease_fd")
                lease, lease_fd = transport.check_lease(candidate), candidate
        except ProcessLookupError:
            # Its pid may belong to another process by now, and the account that was read for it to another tenant.
            refusal = refusal or Refusal(Code.NOT_PERMITTED, "the sender has ended")
        except OSError as error:
            refusal = refusal or Refusal(Code.BAD_FD, f"lease_fd: {error.strerror}")
        except Refusal as error:
            refusal = refusal or error
        return _Vetted(pidfd, reply, lease_fd, lease or ("reply" if reply is not None else "sender"), refusal)

    def _reply_socket(self, index: int | None, packet: Packet) -> tuple[int | None, Refusal | None]:
        """The reply socket, or why there is none although there should be."""
        refusal = None
        for candidate in () if index is None else range(len(packet.fds)) if index == SEARCH else (index,):
            try:
                fd = borrow(packet.fds, candidate, "reply_fd")
                transport.check_reply_socket(fd, packet.sender)
                return fd, None
            except Refusal as error:
                refusal = error
            except OSError as error:
                refusal = Refusal(Code.BAD_FD, f"reply_fd: {error.strerror}")
        return None, refusal

    def _attach(self, job: Take, request: Attach, terms: Terms, packet: Packet, vetted: _Vetted, own: FdSet) -> None:
        pid = packet.sender.pid
        warnings: tuple[str, ...] = ()
        if rights.can_make_nodes(pid):
            if not terms.mknod:
                raise Refusal(Code.NOT_PERMITTED, "the client has CAP_MKNOD: run its container with --cap-drop MKNOD")
            warnings = (MKNOD_WARNING,)
        fd = borrow(packet.fds, request.fd, "fd")
        backing = files.check_backing(fd, request, pid, terms.file_systems, block_devices=terms.block_devices)
        if not (terms.write or backing.read_only):
            raise Refusal(
                Code.NOT_PERMITTED, "the administrator allows this client read-only devices alone (loopd.toml)"
            )
        directory = None
        if "node" in request.deliver and request.dir_fd is not None:
            directory = borrow(packet.fds, request.dir_fd, "dir_fd")
            files.check_directory(directory, pid, terms.file_systems)
        bound = devices.bind(self._control, self._nodes, fd, request, backing, self._numbers(terms.number))
        with FdSet((bound.device, bound.lock)) as held, contextlib.ExitStack() as undo:
            lock = bound.lock if request.lock else None
            if job.store:
                keeper = vetted.pidfd if vetted.lease == "sender" else vetted.lease_fd
                kept = {"device": bound.device, "directory": directory, "lock": lock, "lease": keeper}
                try:
                    records.write(
                        own.borrow(0), job.holder, vetted.lease, bound.binding, kept | {"reply": vetted.reply}
                    )
                except OSError as error:  # ETOOMANYREFS, ENOBUFS: too many fds are in flight
                    raise Refusal(Code.NO_DEVICE, f"the lease cannot be booked: {error}") from error
                undo.callback(records.clear, own.borrow(0))
            nodes: list[Node] = []
            if directory is not None:
                wanted = _wanted(bound.binding, partitions=request.partscan)
                client_rights = Client(packet.sender.uid, packet.sender.gid)
                nodes = devices.place(directory, client_rights, bound.binding.devname, wanted)
            client = None
            if "fd" in request.deliver:
                client = held.add(devices.reopen(bound.device, bound.binding.read_only))
            handed = (bound.device, directory, lock, client)
            flags = (directory is not None, lock is not None, client is not None)
            self._send(
                Done(None, bound.binding.number, bound.binding, tuple(nodes), warnings, *flags),
                tuple(fd for fd in handed if fd is not None),
            )
            undo.pop_all()

    def _numbers(self, first: Number | None) -> Callable[[], Number]:
        numbers = iter(() if first is None else (first,))

        def following() -> Number:
            number = next(numbers, None)
            if number is None:
                self._send(NumberPlease())
                payload, fds = transport.receive(self._channel, MAX_MESSAGE, 0)
                fds.close()
                if not payload:
                    raise SystemExit  # the main process is gone
                answer = unpack(payload)
                if answer.refusal is not None:
                    raise Refusal(Code(answer.refusal[0]), answer.refusal[1])
                number = answer.number
            self._number = number.number
            return number

        return following

    def _release(self, job: Release, fds: FdSet) -> None:
        left: list[Node] = []
        if len(fds) > 1:
            nodes = self._find(fds.borrow(1), job) if job.nodes is None else list(job.nodes)
            with contextlib.suppress(OSError):
                left = devices.displace(fds.borrow(1), job.client, nodes)
        with Loop.from_fd(fds.steal(0)) as loop:
            devices.let_go(loop)
        fds.close()
        self._send(Released(tuple(left)))

    def _find(self, directory: int, job: Release | Restore) -> list[Node]:
        return devices.find(directory, job.client, _wanted(job.binding, partitions=True))

    def _restore(self, job: Restore, fds: FdSet) -> None:
        directory = fds.borrow(0)
        nodes = self._find(directory, job)
        refusal = None
        if job.complete:
            there = {node.name for node in nodes}
            wanted = _wanted(job.binding, partitions=job.binding.partscan)
            missing = {name: device for name, device in wanted.items() if name not in there}
            try:
                nodes += devices.place(directory, job.client, job.binding.devname, missing)
            except Refusal as error:
                refusal = error
        self._send(Restored(_verdict(refusal), tuple(nodes)))


def _wanted(binding: Binding, *, partitions: bool) -> dict[str, tuple[int, int]]:
    """The nodes that a binding has, by name."""
    disk = {binding.devname: (binding.major, binding.minor)}
    return disk | devices.partitions(binding.devname) if partitions else disk


def _ended(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def borrow(fds: FdSet, index: int, name: str) -> int:
    """The fd that the request names; a refusal where the datagram has none of that index."""
    try:
        return fds.borrow(index)
    except IndexError:
        raise Refusal(Code.BAD_FD, f"{name}: the datagram has {len(fds)} fds, none of index {index}") from None


def main(channel: socket.socket, listeners: list[socket.socket], control: LoopControl, nodes: Nodes) -> None:
    """Be a helper process, from its fork to its end."""
    rights.drop_groups()
    os.umask(0)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the main process is gone
        Helper(channel, listeners, control, nodes).run()
