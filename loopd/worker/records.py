"""The record of a lease in the fd store: what a new daemon needs to carry it on.

A slot is a datagram socket connected to itself that the service manager holds; a lease is one message in its queue, the
record with the lease's fds, written once by one system call. Owns the record's format: a field may be added, a change
of meaning raises `VERSION`, and a record of a newer version is kept untouched.
"""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterable
from typing import Any, NamedTuple

from loopd.kernel import transport
from loopd.worker.devices import Binding

VERSION = 2
"""With the first one the reply socket had the word on the answer. What it says of such a lease is that it was given."""
MAX_RECORD = 32768
FDS = ("device", "directory", "lock", "cgroup", "lease", "reply")
"""Which fds a record may have along, in the order in which they are sent; the record says which it has."""


class Stored(NamedTuple):
    """What a slot holds. `holder` is the main process's part of the record, `lease` what keeps the lease.

    `releasing`: the device has been let go of, and what is left to do is to notice its last close.
    """

    version: int

    holder: dict[str, Any]
    lease: str
    binding: Binding
    releasing: bool
    fds: dict[str, int]


def make_slot() -> socket.socket:
    """A slot: an AF_UNIX datagram socket with an address of the kernel's choice, connected to itself."""
    slot = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    slot.bind("")
    slot.connect(slot.getsockname())
    return slot


def write(slot: int, holder: dict[str, Any], lease: str, binding: Binding, fds: dict[str, int | None]) -> None:
    """Book a lease: the record and its fds into the empty slot, by one sendmsg. Without a device it is `releasing`."""
    present = [(name, fd) for name in FDS if (fd := fds.get(name)) is not None]
    record = {
        "version": VERSION,
        "holder": holder,
        "lease": lease,
        "binding": binding._asdict(),
        "releasing": fds.get("device") is None,
        "fds": [name for name, _ in present],
    }
    with transport.borrowed(slot) as channel:
        transport.send(channel, json.dumps(record).encode(), [fd for _, fd in present], transport.MSG_DONTWAIT)


def read(slot: int) -> Stored | None:
    """What the slot holds, which stays there; the fds are the caller's. None when it is empty.

    Raises ValueError for a record of a newer version, which is to be left as it is.
    """
    with transport.borrowed(slot) as channel:
        try:
            payload, fds = transport.receive(channel, MAX_RECORD, len(FDS), transport.MSG_PEEK | transport.MSG_DONTWAIT)
        except BlockingIOError:
            return None
    with fds:
        record = json.loads(payload)
        if record["version"] > VERSION:
            raise ValueError(f"record of version {record['version']}")
        # A field that a later edition of this version adds is not known here, and not needed.
        known = {name: value for name, value in record["binding"].items() if name in Binding._fields}
        binding, names = Binding(**known), list(record["fds"])
        if len(names) != len(fds) or not set(names) <= set(FDS):
            raise ValueError(f"record with {len(fds)} fds, named {names}")
        holder, lease, releasing = dict(record["holder"]), str(record["lease"]), bool(record["releasing"])
        found = Stored(record["version"], holder, lease, binding, releasing, {})
        found.fds.update({name: fds.steal(index) for index, name in enumerate(names)})
        return found


def clear(slot: int) -> None:
    """Empty the slot; its fds are closed by the kernel."""
    with transport.borrowed(slot) as channel, contextlib.suppress(BlockingIOError):
        # No room for fds: the kernel drops them. (Python makes no system call for a buffer of 0 bytes.)
        channel.recv(1, transport.MSG_DONTWAIT)
    if progress(slot) != ASKED:
        _mark(slot, ASKED)


ASKED, ANSWERED, ANSWERING = 0, 1, 2
"""How far the answer to the attach is: none was delivered, it was sent, it may have been."""


def answer(slot: int | None, reply_fd: int, payload: bytes, fds: Iterable[int] = ()) -> bool:
    """Send the reply to an attach, as `transport.reply`, and have `progress` tell of its slot, if any, how far it is.

    Nothing is set on the client's socket: before Linux 6.7 that waits for whoever has it locked, and a client can keep
    it so.
    """
    if slot is None:
        return transport.reply(reply_fd, payload, fds)
    _mark(slot, ANSWERING)
    delivered = transport.reply(reply_fd, payload, fds)
    _mark(slot, ANSWERED if delivered else ASKED)
    return delivered


def _mark(slot: int, progress: int) -> None:
    with transport.borrowed(slot) as channel, contextlib.suppress(OSError):
        channel.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, progress)


def progress(slot: int) -> int:
    """How far the answer to the attach in a slot is."""
    with transport.borrowed(slot) as channel:
        return channel.getsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY)
