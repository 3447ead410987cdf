"""Take unwanted datagrams off a queue, with whatever files are in them.

The kernel releases the files in the process that drops the datagram, and that can wait: for a TCP socket as long as
SO_LINGER says, for the last close of a block device until its backing file answers, which not even SIGKILL ends. So the
main process drops nothing itself, but a child of the role "drop" does. Datagrams of an account that hung this child are
parked: a child of the role "park" takes them and closes none of their files. A full one stays, and takes no more.
"""

from __future__ import annotations

import resource
import socket
from typing import NamedTuple

from loopd.children.child import Channel
from loopd.children.pool import Answer
from loopd.kernel import transport

OWN = 16
"""Files that a parking child has open itself, or for a moment."""


class Drop(NamedTuple):
    """Drop what is at the head of the queue from any of these processes, at most `most` datagrams."""

    pids: tuple[int, ...]
    most: int


class Dropped(NamedTuple):
    """How many datagrams of which process were dropped. `full`: the child has no room for the files of one more."""

    counts: dict[int, int]
    full: bool


def drop(channel: Channel, listener: socket.socket) -> None:
    """Be the child that drops, until the main process closes its end."""
    while True:
        order, _ = channel.receive()
        channel.send(Answer(Dropped(transport.drop(listener, order.pids, order.most), False), last=True))


def park(channel: Channel, listener: socket.socket) -> None:
    """Be a child that parks: its files stay open until the main process ends it."""
    kept: list[int] = []
    room = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - OWN
    while True:
        order, _ = channel.receive()
        counts = transport.drop(listener, order.pids, order.most, kept, room)
        channel.send(Answer(Dropped(counts, len(kept) + transport.SCM_MAX_FD > room), last=True))
