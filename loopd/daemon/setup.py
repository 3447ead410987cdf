"""What the daemon needs before it can start, and what to tell the administrator where something is missing."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys

from loopd.daemon import manager
from loopd.daemon.audit import Audit, Event
from loopd.daemon.counter import Counter
from loopd.daemon.service import Listener
from loopd.kernel import transport
from loopd.loop import LoopControl
from loopd.worker import devices
from loopd.worker.access import Access
from loopd.worker.bindings import Bindings

ADMIN = "admin"
"""FileDescriptorName= of the administrator's socket."""
SLOT = "slot"
"""FDNAME= of the slots in the fd store."""


class CannotStart(Exception):
    """What is missing, in words for the administrator."""


def passed() -> list[tuple[str, int]]:
    try:
        return manager.listen_fds()
    except ImportError as error:
        raise CannotStart(f"systemd-python is missing ({error}): install python3-systemd") from error
    except OSError as error:
        raise CannotStart(f"LISTEN_FDS and LISTEN_FDNAMES do not say which sockets were passed: {error}") from error


def listeners(passed: list[tuple[str, int]]) -> list[Listener]:
    found = []
    for name, fd in passed:
        if name == SLOT:
            continue
        try:
            listener = socket.socket(fileno=fd)
        except OSError as error:
            raise CannotStart(f"{name!r} is no AF_UNIX datagram socket, but no socket at all") from error
        if listener.family != socket.AF_UNIX or listener.type != socket.SOCK_DGRAM:
            raise CannotStart(f"socket {name!r} is no AF_UNIX datagram socket: loopd.socket has ListenDatagram=")
        transport.prepare(listener)
        found.append(Listener(listener, name == ADMIN))
    if not found:
        program = "python3 -m loopd" if sys.argv[0].endswith("__main__.py") else sys.argv[0]
        raise CannotStart(
            "no socket was passed: start loopd.socket, or by hand"
            f" systemd-socket-activate --datagram -l /run/loopd/loopd.sock {program}"
        )
    return found


_CONTROL = {
    errno.ENOENT: "/dev/loop-control is missing: is the loop module there (modprobe loop)?",
    errno.ENODEV: "/dev/loop-control leads to no device: is the loop module there (modprobe loop)?",
    errno.ENXIO: "/dev/loop-control leads to no device: is the loop module there (modprobe loop)?",
    errno.EACCES: "opening /dev/loop-control is not permitted: run as root, or as the service does",
    errno.EPERM: "opening /dev/loop-control is not permitted: the device cgroup (DeviceAllow=) refuses it",
}


def control(access: Access) -> LoopControl:
    try:
        control = access.open_control()
    except OSError as error:
        raise CannotStart(_CONTROL.get(error.errno or 0, f"/dev/loop-control cannot be opened: {error}")) from error
    try:
        if not access.has_configure(control):
            raise CannotStart(f"Linux {os.uname().release} has no LOOP_CONFIGURE: loopd needs Linux 5.8 or later")
    except OSError as error:
        raise CannotStart(f"no loop device can be opened: {error}") from error
    return control


def bindings(path: str) -> Bindings:
    try:
        return Bindings(path)
    except OSError as error:
        raise CannotStart(f"the table of bindings cannot be kept in {path}: {error}") from error


def _newest_sequence(control: LoopControl) -> int:
    """The kernel's sequence number of disks, that of a device made for this; 0 before Linux 5.15."""
    with contextlib.suppress(OSError):
        number = control.add()
        found = devices.sequence(f"loop{number}")
        control.remove(number)
        return found or 0
    return 0


def counter(directory: str, instance: str, control: LoopControl, audit: Audit) -> Counter:
    try:
        os.makedirs(directory, 0o700, exist_ok=True)
        counter = Counter(os.path.join(directory, "numbers"), instance, lambda: _newest_sequence(control))
    except OSError as error:
        raise CannotStart(f"the number counter cannot be kept in {directory}: {error}") from error
    if counter.started_from_clock:
        audit.record(
            Event.WARNED, f"There was no number counter in {directory}: numbers start from the clock", path=directory
        )
    return counter
