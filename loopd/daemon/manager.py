"""The service manager: what it passes at the start, and what it is told.

Reads each variable that the service manager sets, once. `systemd.daemon` (systemd-python) reads those of the passed
sockets; it has nothing for $WATCHDOG_USEC and $FDSTORE. Nothing here may block.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterable
from types import ModuleType

_PACKAGES = (
    "/usr/lib/python3/dist-packages",
    f"{sys.prefix}/{sys.platlibdir}/python{sys.version_info.major}.{sys.version_info.minor}/site-packages",
)
"""Where Debian and others have python3-systemd. Installed programs run without the module `site`, which knows these
folders, because it takes a third of an interpreter's start.
"""


def library() -> ModuleType:
    """The module `systemd.daemon`; ImportError where systemd-python is missing."""
    if sys.flags.no_site and _PACKAGES[0] not in sys.path:
        sys.path.extend(_PACKAGES)
    import systemd.daemon  # noqa: PLC0415  # --version and --check-config do without

    module: ModuleType = systemd.daemon
    return module


def listen_fds() -> list[tuple[str, int]]:
    """The sockets that systemd passed, as (FileDescriptorName=, fd), newest first for the fd store; empty when none."""
    return [(name, fd) for fd, name in library().listen_fds_with_names().items()]


def logs_to_journal() -> bool:
    """Whether standard error is what $JOURNAL_STREAM names: a process may have inherited the variable alone."""
    try:
        status = os.fstat(2)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM", "") == f"{status.st_dev}:{status.st_ino}"


def watchdog_interval() -> float | None:
    """Seconds within which systemd wants a sign of life (WatchdogSec=), None when it wants none."""
    microseconds = os.environ.pop("WATCHDOG_USEC", None)
    pid = os.environ.pop("WATCHDOG_PID", None)
    if microseconds is None or pid not in (None, str(os.getpid())):
        return None
    return int(microseconds) / 1e6


def fd_store_size() -> int | None:
    """How many fds the service manager keeps (FileDescriptorStoreMax=); None before systemd 254, which does not say."""
    size = os.environ.pop("FDSTORE", None)
    return None if size is None else int(size)


class Notifier:
    """Sends state to the service manager; does nothing where there is none.

    `systemd.daemon.notify` does not do here. sd_notify(3) waits while PID 1's queue is full, which any service of the
    host can bring about, and systemd-python 235 holds the interpreter's lock meanwhile. So this is sendmsg(2) with
    MSG_DONTWAIT, and the caller learns that the message was not sent.
    """

    def __init__(self) -> None:
        address = os.environ.pop("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    @property
    def present(self) -> bool:
        """Whether a service manager listens."""
        return bool(self._address)

    def send(self, state: str, fds: Iterable[int] = ()) -> bool:
        """One notify message, as ``READY=1``; False when PID 1's queue is full and it was not sent."""
        if not self._address:
            return False
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, b"".join(fd.to_bytes(4, "little") for fd in fds))]
        try:
            self._socket.sendmsg([state.encode()], rights if fds else [], socket.MSG_DONTWAIT, self._address)
        except OSError:
            return False
        return True
