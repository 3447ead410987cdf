"""Kernel uevents of block devices: which disk something happened to. Parses no more than that."""

from __future__ import annotations

import re
import socket
from typing import NamedTuple

NETLINK_KOBJECT_UEVENT = 15
KERNEL_GROUP = 1

_DISK = re.compile(rb"^[a-z]+@/devices/virtual/block/(loop\d{1,7})(/loop\d+p\d+)?$")


class Changes(NamedTuple):
    """The loop devices that something happened to, and those of which a partition came or went."""

    disks: set[str]
    partitioned: set[str]


def listen() -> socket.socket:
    """A socket that receives the kernel's own events; works in a network namespace of the service's, as a user too."""
    netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, NETLINK_KOBJECT_UEVENT)
    netlink.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    netlink.bind((0, KERNEL_GROUP))
    return netlink


MOST = 256
"""Events of one look. A client can have the kernel tell of its device faster than they are read."""


def receive(netlink: socket.socket) -> Changes | None:
    """The devices that events have come for; None when events were lost, and all devices have to be looked at."""
    changes = Changes(set(), set())
    for _ in range(MOST):
        try:
            message, address = netlink.recvfrom(8192)
        except BlockingIOError:
            return changes
        except OSError:  # ENOBUFS: the queue was full
            return None
        match = _DISK.match(message.partition(b"\0")[0])
        if address[0] == 0 and match:  # port 0 is the kernel: any process of the namespace may send
            (changes.partitioned if match[2] else changes.disks).add(match[1].decode())
    return changes
