"""The slot of a lease: what a new daemon needs to carry the lease on.

A slot is a datagram socket connected to itself. A service manager keeps the slots in its fd store, and they outlive the
daemon. The lease is in the slot's queue: first the record with the lease's fds, which one system call writes before the
device is bound; after it small notes of what has happened since. Owns the format: a field may be added, a change of
meaning raises `VERSION`, and a record of a newer version is kept untouched.
"""

from __future__ import annotations

import contextlib
import json
import socket
from typing import Any, NamedTuple

from loopd.kernel import transport
from loopd.kernel.transport import FdSet
from loopd.worker.devices import Binding

VERSION = 3
OLDEST = 3
"""Records from this version on are read, so that leases outlive an upgrade."""
MAX_RECORD = 32768
FDS = ("keeper", "reply", "cgroup", "directory", "file", "lock")
"""Which fds a record may have along, in the order in which they are sent; the record says which it has."""
OF_MAIN = FDS[:3]
"""Those that the main process opens. They come first. Closing one of the others may wait."""
_PEEK = transport.MSG_PEEK | transport.MSG_DONTWAIT
SO_PEEK_OFF = 42  # not in Python's socket module


class Stored(NamedTuple):
    """What a slot holds. `holder` is the main process's part of the record, `kept_by` says what the keeper is.

    `bound`: the device was bound, and `binding` is as the kernel reports it; otherwise as it was asked for. `answer`
    says how far the answer to the attach is: "" for not begun, "sending" or "sent". `released`: loopd has let go of the
    device, and waits for its last close; of the fds it has kept the one that tells whose the lease is.
    """

    holder: dict[str, Any]
    kept_by: str
    binding: Binding
    row: int
    bound: bool
    answer: str
    released: bool
    fds: dict[str, int]


def make_slot() -> socket.socket:
    """A slot: an AF_UNIX datagram socket with an address of the kernel's choice, connected to itself."""
    slot = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    slot.bind("")
    slot.connect(slot.getsockname())
    return slot


def write(
    slot: int, holder: dict[str, Any], kept_by: str, binding: Binding, row: int, fds: dict[str, int | None]
) -> None:
    """Book a lease into the empty slot, by one sendmsg; OSError where the kernel takes no more fds in flight."""
    present = [(name, fd) for name in FDS if (fd := fds.get(name)) is not None]
    record = {
        "version": VERSION,
        "holder": holder,
        "kept_by": kept_by,
        "binding": binding._asdict(),
        "row": row,
        "fds": [name for name, _ in present],
    }
    _send(slot, record, [fd for _, fd in present])


def note_bound(slot: int, binding: Binding) -> None:
    """The device is bound."""
    _send(slot, {"bound": {"diskseq": binding.diskseq, "size": binding.size, "direct_io": binding.direct_io}})


def note_partscan(slot: int) -> None:
    """The kernel looks for partitions on the device from now on."""
    with contextlib.suppress(OSError):
        _send(slot, {"partscan": True})


def note_answer(slot: int, progress: str) -> None:
    """The answer to the attach is about to be sent, or was sent: see `Stored`."""
    with contextlib.suppress(OSError):
        _send(slot, {"answer": progress})


def note_released(slot: int) -> None:
    """loopd has let go of the device: keep the record with the account's cgroup, and close its other fds.

    For a worker: one of them may be the last that has the device open, and its close may wait.
    """
    with transport.borrowed(slot) as channel:
        payloads = _payloads(channel)
        notes = [json.loads(payload) for payload in payloads]
        # The new record is written before the old one is dropped: at no moment is the binding in no record. A release
        # that was cut short after that has left some of the older messages.
        last = max((index for index, note in enumerate(notes) if "version" in note), default=None)
        if last is None:
            return
        if not notes[last].get("released"):
            bound = next((note["bound"] for note in notes if note.get("bound")), None)
            names = [name for name in notes[last]["fds"] if name in OF_MAIN]
            with _opened(channel, payloads[:last], len(names)) as fds:
                kept = {name: fd for name, fd in zip(names, fds, strict=True) if name == "cgroup"}
                record = notes[last] | {"fds": [*kept], "released": True, "bound": bound}
                _send(slot, record, [*kept.values()])
            last = len(notes)
        _drop(channel, last)


def _send(slot: int, record: dict[str, Any], fds: list[int] | None = None) -> None:
    with transport.borrowed(slot) as channel:
        transport.send(channel, json.dumps(record).encode(), fds or (), transport.MSG_DONTWAIT)


def _opened(channel: socket.socket, before: list[bytes], count: int) -> FdSet:
    """The first fds of the message that comes after those, and stays in the queue."""
    channel.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, sum(map(len, before)))
    try:
        opened = transport.receive_some(channel, 1, count, _PEEK)[1] if count else FdSet()
    finally:
        channel.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, -1)
    if len(opened) != count:
        opened.close()
        raise ValueError(f"record with {len(opened)} of {count} fds")
    return opened


def _payloads(channel: socket.socket) -> list[bytes]:
    """The messages of the queue, which stay there."""
    found = []
    channel.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, 0)  # from here on each MSG_PEEK goes on behind the last one
    try:
        with contextlib.suppress(BlockingIOError):
            while True:
                found.append(channel.recv(MAX_RECORD, _PEEK))
    finally:
        channel.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, -1)
    return found


def read(slot: int, *, every_fd: bool = False) -> Stored | None:
    """What the slot holds, which stays there; None when the slot is empty. Opens the fds of `OF_MAIN`, or `every_fd`.

    Raises ValueError for a record of a newer version, which is to be left as it is.
    """
    with transport.borrowed(slot) as channel:
        payloads = _payloads(channel)
        notes = [json.loads(payload) for payload in payloads]
        if not notes:
            return None
        # A release that was cut short leaves two records; the later one counts.
        last = max((index for index, note in enumerate(notes) if "version" in note), default=0)
        record: dict[str, Any] = notes[last]
        if not OLDEST <= record["version"] <= VERSION:
            raise ValueError(f"record of version {record['version']}")
        if record["fds"] != [name for name in FDS if name in record["fds"]]:
            raise ValueError(f"record with fds named {record['fds']}")
        names = [name for name in record["fds"] if every_fd or name in OF_MAIN]
        opened = _opened(channel, payloads[:last], len(names))
    with opened:
        bound = next((note["bound"] for note in notes if note.get("bound")), None)
        # A field that a later edition of this version adds is not known here, and not needed.
        known = {name: value for name, value in record["binding"].items() if name in Binding._fields}
        known["partscan"] = known["partscan"] or any("partscan" in note for note in notes)
        found = Stored(
            dict(record["holder"]), str(record["kept_by"]), Binding(**known | (bound or {})), int(record["row"]),
            bound is not None, next((note["answer"] for note in reversed(notes) if "answer" in note), ""),
            bool(record.get("released")), {},
        )  # fmt: skip
        found.fds.update({name: opened.steal(index) for index, name in enumerate(names)})
        return found


def clear(slot: int) -> None:
    """Empty the slot; the kernel closes its fds here."""
    with transport.borrowed(slot) as channel:
        _drop(channel, None)


def _drop(channel: socket.socket, count: int | None) -> None:
    with contextlib.suppress(BlockingIOError):
        while count is None or count > 0:
            # No room for fds: the kernel drops them. (Python makes no system call for a buffer of 0 bytes.)
            channel.recv(1, transport.MSG_DONTWAIT)
            count = None if count is None else count - 1
