"""systemd's interfaces: passed sockets, notify messages, the watchdog, the journal's native protocol.

All of them are documented, stable datagram and environment protocols of a few lines (sd_listen_fds(3), sd_notify(3),
https://systemd.io/JOURNAL_NATIVE_PROTOCOL). They are spoken here directly because sd_journal_send(3) blocks when
journald stalls, which the main process must never do. Nothing here may block and nothing here knows what loopd is.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Mapping

LISTEN_FDS_START = 3
JOURNAL_SOCKET = "/run/systemd/journal/socket"


def listen_fds() -> list[tuple[str, int]]:
    """The sockets that systemd passed, as (FileDescriptorName=, fd), newest first for the fd store; empty when none."""
    count = int(os.environ.pop("LISTEN_FDS", "0"))
    names = os.environ.pop("LISTEN_FDNAMES", "")
    if os.environ.pop("LISTEN_PID", "") != str(os.getpid()):
        return []
    fds = range(LISTEN_FDS_START, LISTEN_FDS_START + count)
    for fd in fds:
        os.set_inheritable(fd, False)
    return list(zip(names.split(":") if names else ["unknown"] * count, fds, strict=True))


def logs_to_journal() -> bool:
    """Whether standard error is what the service manager connected to the journal, and not merely below one that is."""
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
    """Sends state to the service manager; does nothing where there is none."""

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

    def close(self) -> None:
        self._socket.close()


class Journal:
    """The journal's native protocol: one datagram for each record, never waiting."""

    def __init__(self, path: str = JOURNAL_SOCKET) -> None:
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    def present(self) -> bool:
        """Whether there is a journal to write to."""
        return os.path.exists(self._path)

    def send(self, fields: Mapping[str, str]) -> bool:
        """One record; False when journald does not take it now."""
        try:
            self._socket.sendto(_serialise(fields), socket.MSG_DONTWAIT, self._path)
        except OSError:
            return False
        return True

    def fileno(self) -> int:
        return self._socket.fileno()


def _serialise(fields: Mapping[str, str]) -> bytes:
    out = bytearray()
    for name, text in fields.items():
        # The length form takes any bytes, so that no value can forge a field with a newline.
        value = text.encode(errors="surrogateescape")
        out += name.encode() + b"\n" + len(value).to_bytes(8, "little") + value + b"\n"
    return bytes(out)
