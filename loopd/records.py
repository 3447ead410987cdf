"""The record of a lease in the fd store: what a new daemon needs to carry it on.

A slot is a datagram socket connected to itself that the service manager holds; a lease is one message in its queue, the
record with the lease's fds, written once by one system call. Owns the record's format: a field may be added, a change of
meaning raises `VERSION`, and a record of a newer version is kept untouched.
"""

from __future__ import annotations

import contextlib
import json
import socket
from typing import Any, NamedTuple

from . import transport
from .devices import Binding
from .transport import FdSet

VERSION = 1
MAX_RECORD = 32768
FDS = ("device", "directory", "lock", "lease", "reply")
"""Which fds a record may have along, in the order in which they are sent; the record says which it has."""


class Stored(NamedTuple):
    """What a slot holds: the main process's part of the record, what keeps the lease, the binding, the fds and their names."""

    client: dict[str, Any]
    lease: str
    binding: Binding
    names: tuple[str, ...]
    fds: FdSet


def make_slot() -> socket.socket:
    """A slot: an AF_UNIX datagram socket with an address of the kernel's choice, connected to itself."""
    slot = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    slot.bind("")
    slot.connect(slot.getsockname())
    return slot


def write(slot: int, client: str, lease: str, binding: Binding, fds: dict[str, int | None]) -> None:
    """Book a lease: the record and its fds into the empty slot, by one sendmsg."""
    names = [name for name in FDS if fds.get(name) is not None]
    record = {"version": VERSION, "client": json.loads(client), "lease": lease, "binding": binding._asdict(), "fds": names}
    with transport.borrowed(slot) as channel:
        transport.send(
            channel, json.dumps(record).encode(), [fd for name in FDS if (fd := fds.get(name)) is not None], socket.MSG_DONTWAIT
        )


def read(slot: int) -> Stored | None:
    """What the slot holds, which stays there; None when it is empty. ValueError: a record of a newer version."""
    with transport.borrowed(slot) as channel:
        try:
            payload, fds = transport.receive(channel, MAX_RECORD, len(FDS), socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
    record = json.loads(payload)
    if record["version"] > VERSION:
        fds.close()
        raise ValueError(f"record of version {record['version']}")
    return Stored(record["client"], record["lease"], Binding(**record["binding"]), tuple(record["fds"]), fds)


def clear(slot: int) -> None:
    """Empty the slot; its fds are closed by the kernel."""
    with transport.borrowed(slot) as channel, contextlib.suppress(BlockingIOError):
        # No room for fds: the kernel drops them.
        channel.recv(0, socket.MSG_DONTWAIT)
