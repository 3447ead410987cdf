"""The device that was attached, as a value with an end: a path, an open file, and a ``with`` block.

Changes when a device has another attribute, or ends in another way.
"""

from __future__ import annotations

import io
import socket as _socket
import sys
from types import TracebackType
from typing import Callable

from loopd.client.errors import Busy, Error, ImageIncomplete, NotFound
from loopd.client.inputs import Lifetime
from loopd.client.requests import Requests
from loopd.protocol.wire import Attached

DETACH_WAIT = 10.0
"""Seconds that the end of a ``with`` block waits until the image is free."""


class Device:
    """A loop device that this client attached: a context manager, and a path wherever one is expected.

    The end of the ``with`` block detaches and waits up to `DETACH_WAIT` seconds until the image is free, else
    raises `Busy`; it raises `ImageIncomplete` where the image lacks what was written. An exception that the block
    raised comes out instead, with either as its note (PEP 678). An object that is not used so is ended by `detach`
    or `close`, or is left alone after `keep`.

    `path` is the node where this process sees it, or ``/proc/self/fd/N`` where only an fd was delivered; the
    nodes of the partitions are beside it. The other attributes are the daemon's answer: `diskseq` identifies
    this one binding (None before Linux 5.15), `size` and `sector_size` are in bytes, `read_only` and `direct_io`
    are what the kernel has in force, `partitions` are the names of the partitions at the last look, `warnings`
    is text for a person.
    """

    def __init__(
        self,
        requests: Requests,
        attached: Attached,
        path: str,
        lifetime: Lifetime,
        channel: _socket.socket,
        file: io.FileIO | None,
        reopen: Callable[[], io.FileIO] | None,
    ) -> None:
        self.path = path
        self.devname = attached.devname
        self.diskseq = attached.diskseq
        self.major = attached.major
        self.minor = attached.minor
        self.size = attached.size
        self.sector_size = attached.sector_size
        self.read_only = attached.read_only
        self.direct_io = attached.direct_io
        self.partitions = attached.partitions
        self.warnings = attached.warnings
        self._requests = requests
        self._lifetime = lifetime
        self._channel = channel  # with the lifetime "device", this open socket is the lease
        self._file = file
        self._reopen = reopen
        self._kept = False
        self._released = False

    @property
    def _name(self) -> str:
        """The device as requests name it: its directory tells who owns the lease."""
        return self.devname if self.path.startswith("/proc/self/fd/") else self.path

    @property
    def fd(self) -> int:
        """The open device, in the access that it has.

        It is opened when this is first asked for, and stays open until the device is detached or closed. As long as it
        is open, a close by somebody else writes nothing back into the image: sync it (`os.fsync`). ValueError after
        `close` or with ``open_device=False``; OSError as open(2).
        """
        if self._file is None:
            if self._reopen is None:
                raise ValueError(f"{self.devname} was attached with open_device=False, or is closed")
            self._file = self._reopen()
        return self._file.fileno()

    def detach(self, wait: float = DETACH_WAIT) -> bool:
        """End the lease; True when the image is free, False when it still is not after `wait` seconds.

        A device in use, by a mount for example, goes at the last close; `detach` may be called again. A device that
        somebody else detached before counts as released. Raises `ImageIncomplete` when the device is detached and
        the image lacks what was written, `Error` when loopd could not be asked; a lease of the lifetime
        ``"device"`` ends all the same.
        """
        if not self._released:
            if self._file is not None:
                self._file.close()  # the device would be in use by this process
            try:
                self._released = self._requests.detach(self._name, wait=wait, diskseq=self.diskseq)
            except NotFound:
                self._released = True
            except ImageIncomplete as error:
                self._released = error.released
                raise
            finally:
                self.close()
        return self._released

    def rescan(self) -> tuple[str, ...]:
        """Have the partition table read again; the names of the partitions, whose nodes are there now. `Error`."""
        self.partitions = self._requests.rescan(self._name)
        return self.partitions

    def resize(self) -> int:
        """Have the device take over the size of its image after that changed; bytes. `Error`."""
        self.size = self._requests.resize(self._name)
        return self.size

    def close(self) -> None:
        """Close what is open here, which ends a lease of the lifetime ``"device"``.

        Waits for nothing, so only the journal of the host tells what could not be written back to the image.
        """
        self._reopen = None
        if self._file is not None:
            self._file.close()
        self._channel.close()

    def keep(self) -> None:
        """Leave the device attached behind the ``with`` block: its lifetime, or a detach, ends it."""
        if self._lifetime == "device":
            raise ValueError('a device of the lifetime "device" cannot be kept: attach with lifetime="container"')
        self._kept = True
        self.close()

    def __enter__(self) -> Device:  # noqa: PYI034  # Self is of Python 3.11
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._kept:
            return
        try:
            if not self.detach():
                raise Busy(f"{self.devname} is detached, but somebody still has it open")
        except Error as found:
            if error is None:
                raise
            _add_note(error, str(found))  # the error of the block is the one to see

    def __fspath__(self) -> str:
        return self.path

    def __repr__(self) -> str:
        return f"<loopd.Device {self.path} diskseq={self.diskseq} size={self.size}>"


def _add_note(error: BaseException, note: str) -> None:
    """Add a note to an exception (PEP 678), which Python prints with it from 3.11 on."""
    if sys.version_info >= (3, 11):
        error.add_note(note)
    else:
        error.__notes__ = [*getattr(error, "__notes__", ()), note]
