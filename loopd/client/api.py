"""The client: asks loopd for a loop device, from inside a container or on the host. What ``import loopd`` offers.

Changes when the public API does. Prints nothing. Standard library of Python 3.8 and later.

    with loopd.attach("disk.img", directory="/dev", partscan=True) as device:
        subprocess.run(["sfdisk", device], input=b"label: gpt\\n,\\n", check=True)
"""

from __future__ import annotations

import os
from contextlib import ExitStack, suppress
from functools import partial
from typing import Literal, Sequence

from loopd.client import layers
from loopd.client.backing import on_file
from loopd.client.delivery import Deliver, Way, choices, concerns_the_way, ordered, received, reopened
from loopd.client.device import DETACH_WAIT, Device
from loopd.client.errors import (
    ERRORS,
    UNAVAILABLE,
    BadFd,
    BadReply,
    Busy,
    DeviceInaccessible,
    Dropped,
    Error,
    Exists,
    ImageIncomplete,
    Internal,
    Invalid,
    Io,
    Malformed,
    NoDevice,
    NotFound,
    NotPermitted,
    Quota,
    Refused,
    TimedOut,
    Timeout,
    Unavailable,
    Undeliverable,
    Unsupported,
)
from loopd.client.exchange import ADMIN_SOCKET, SOCKET, TIMEOUT, parsed
from loopd.client.inputs import (
    DIRECTORY,
    Lifetime,
    StrPath,
    directory_grant,
    node_path,
    opened_image,
    opened_lease,
    pidfd_open,
)
from loopd.client.requests import Requests
from loopd.protocol import wire
from loopd.protocol.wire import Attached, Code, Granted, GrantInfo, Greeting, LeaseInfo

__all__ = [
    "ADMIN_SOCKET",
    "DETACH_WAIT",
    "DIRECTORY",
    "ERRORS",
    "SOCKET",
    "TIMEOUT",
    "UNAVAILABLE",
    "Attached",
    "BadFd",
    "BadReply",
    "Busy",
    "Client",
    "Code",
    "Device",
    "DeviceInaccessible",
    "DirectIO",
    "Dropped",
    "Error",
    "Exists",
    "GrantInfo",
    "Granted",
    "Greeting",
    "ImageIncomplete",
    "Internal",
    "Invalid",
    "Io",
    "LeaseInfo",
    "Lifetime",
    "Malformed",
    "NoDevice",
    "NotFound",
    "NotPermitted",
    "Quota",
    "Refused",
    "TimedOut",
    "Timeout",
    "Unavailable",
    "Undeliverable",
    "Unsupported",
    "attach",
    "detach",
    "directories",
    "directory",
    "directory_grant",
    "grant",
    "hello",
    "leases",
    "node_path",
    "on_file",
    "pidfd_open",
    "rescan",
    "resize",
]

DirectIO = Literal["auto", "on", "off"]


class Client(Requests):
    """One loopd, by its socket. Keeps no connection and no fd: requests are independent of each other.

    `socket` is a path, by default $LOOPD_SOCKET or `SOCKET`; `timeout` is in seconds and covers the sending,
    which waits while the daemon starts, and the reply. Every method raises `Error`.
    """

    def attach(
        self, image: StrPath | int, directory: StrPath | int | None = None, *, offset: int = 0, sizelimit: int = 0,
        sector_size: int = 512, read_only: bool = False, partscan: bool = False, lock: bool = False,
        direct_io: DirectIO = "auto", ref: str = "", deliver: Sequence[Deliver] | None = None,
        lifetime: Lifetime = "device", open_device: bool = True,
    ) -> Device:  # fmt: skip
        """Bind `image` to a loop device and have it handed over: see `attach` of this module."""
        directory_grant()  # refuse a wrong one now: the detach would be too late
        with ExitStack() as inputs:
            fds = [opened_image(image, read_only, inputs)]
            request = wire.Attach(
                fd=0, offset=offset, sizelimit=sizelimit, sector_size=sector_size, read_only=read_only,
                partscan=partscan, lock=lock, direct_io=direct_io, ref=ref,
            )  # fmt: skip
            lease_fd = opened_lease(lifetime, inputs)
            if lease_fd is not None:
                request = request._replace(lease_fd=len(fds))
                fds.append(lease_fd)
            if deliver is not None:
                return self._attach(ordered(deliver, directory, inputs), request, fds, lifetime, open_device)
            failures: list[Error] = []
            for way in choices(directory, inputs):
                try:
                    if isinstance(way, DeviceInaccessible):
                        raise way
                    return self._attach(way, request, fds, lifetime, open_device)
                except Error as error:
                    if not concerns_the_way(error):
                        raise
                    failures.append(error)
            failures[0].message = "; ".join(dict.fromkeys(failure.message for failure in failures))
            raise failures[0]

    def _attach(
        self, way: Way, request: wire.Attach, fds: Sequence[int], lifetime: Lifetime, open_device: bool
    ) -> Device:
        """Attach and take over what is delivered, else leave nothing attached."""
        request = request._replace(deliver=way.deliver)
        if "node" in way.deliver and way.dir_fd is not None:
            request = request._replace(dir_fd=len(fds))
            fds = [*fds, way.dir_fd]
        with ExitStack() as outputs:
            try:
                answer = self._ask(outputs, request, fds)
            except Exists as error:
                if way.dir_fd is not None and layers.is_devtmpfs(way.dir_fd):
                    error.hint = "in the host's /dev the kernel makes the node: leave the delivery to the client"
                raise
            attached = parsed(Attached, answer.fields)
            try:
                path, file = received(way, attached, answer.fds, open_device)
            except BaseException:
                answer.fds.close()
                with suppress(Error):
                    self.detach(os.path.join(way.path, attached.devname), wait=DETACH_WAIT, diskseq=attached.diskseq)
                raise
            answer.fds.close()
            outputs.pop_all()
            reopen = partial(reopened, path, attached) if open_device and file is None else None
            return Device(self, attached, path, lifetime, answer.channel, file, reopen)


def attach(
    image: StrPath | int, directory: StrPath | int | None = None, *, offset: int = 0, sizelimit: int = 0,
    sector_size: int = 512, read_only: bool = False, partscan: bool = False, lock: bool = False,
    direct_io: DirectIO = "auto", ref: str = "", deliver: Sequence[Deliver] | None = None,
    lifetime: Lifetime = "device", open_device: bool = True, socket: StrPath | None = None, timeout: float = TIMEOUT,
) -> Device:  # fmt: skip
    """Bind an image to a loop device and have it handed over.

    - `image`: a path, opened read-write, and read-only where `read_only` is set or nothing else is allowed;
      or an open fd, which is used as it was opened.
    - `directory`: where the node is made, as a path or an open fd. Without it, and without `deliver`, the first of
      these that works: the directory of loopd's that is bound in at /dev/loopd ($LOOPD_DIRECTORY); a node in /dev,
      or, where /dev is the host's devtmpfs, the node that the kernel makes there; a mount, where this process may
      attach one.
    - `offset`, `sizelimit`: the part of the image in bytes; a `sizelimit` of 0 goes to its end.
    - `sector_size`: the logical sector size in bytes: 512, 1024, 2048 or 4096.
    - `partscan`: have the partitions found and their nodes made.
    - `lock`: keep udev on the host off the device as long as it is attached (it waits, and `udevadm settle`
      with it).
    - `direct_io`: ``"on"`` is refused where it cannot be had, ``"auto"`` does without.
    - `ref`: up to 63 bytes for the caller's own use, kept with the device.
    - `deliver`: how it is handed over: a ``"node"`` in `directory`; a ``"mount"`` with the node, attached at a
      directory that is made in `directory` (else in /dev/loopd, $XDG_RUNTIME_DIR/loopd or $TMPDIR); an ``"fd"``,
      opened by the daemon; an fd goes with each of the others.
    - `lifetime`: see `Lifetime`.
    - `open_device`: open the node once, to say which layer refuses if it cannot be used; `Device.fd` opens it again.
    - `socket`, `timeout`: see `Client`.

    Raises OSError for an image or directory that cannot be opened, `DeviceInaccessible` where the device cannot
    be, and the `Refused` of its code where the daemon says no. No device is left attached by these, nor by `Timeout`.
    One may be after KeyboardInterrupt, if its lifetime is not ``"device"``: let the handler call `Client.withdraw`.
    """
    return Client(socket, timeout).attach(
        image, directory, offset=offset, sizelimit=sizelimit, sector_size=sector_size, read_only=read_only,
        partscan=partscan, lock=lock, direct_io=direct_io, ref=ref, deliver=deliver, lifetime=lifetime,
        open_device=open_device,
    )  # fmt: skip


def detach(device: StrPath, *, wait: float = 0.0, socket: StrPath | None = None, timeout: float = TIMEOUT) -> bool:
    """`Client.detach`: True when the image is free, False while somebody has the device open; `ImageIncomplete`."""
    return Client(socket, timeout).detach(device, wait=wait)


def leases(*, socket: StrPath | None = None, timeout: float = TIMEOUT) -> tuple[LeaseInfo, ...]:
    """`Client.list`, as ``loopd.list()``: the leases of this owner."""
    return Client(socket, timeout).list()


def rescan(device: StrPath, *, socket: StrPath | None = None, timeout: float = TIMEOUT) -> tuple[str, ...]:
    """`Client.rescan`: the names of the partitions that there are now."""
    return Client(socket, timeout).rescan(device)


def resize(device: StrPath, *, socket: StrPath | None = None, timeout: float = TIMEOUT) -> int:
    """`Client.resize`: the size in bytes, as that of the image."""
    return Client(socket, timeout).resize(device)


def directory(
    name: str, *, remove: bool = False, devices: int | None = None, socket: StrPath | None = None,
    timeout: float = TIMEOUT,
) -> str:  # fmt: skip
    """`Client.directory`: the path of a directory to be bound into a container."""
    return Client(socket, timeout).directory(name, remove=remove, devices=devices)


def grant(
    name: str, *, remove: bool = False, devices: int | None = None, socket: StrPath | None = None,
    timeout: float = TIMEOUT,
) -> Granted:  # fmt: skip
    """`Client.grant`: the same with the device numbers that the directory owns."""
    return Client(socket, timeout).grant(name, remove=remove, devices=devices)


def directories(*, socket: StrPath | None = None, timeout: float = TIMEOUT) -> tuple[GrantInfo, ...]:
    """`Client.directories`: the directories of this user."""
    return Client(socket, timeout).directories()


def hello(*, socket: StrPath | None = None, timeout: float = TIMEOUT) -> Greeting:
    """`Client.hello`: the daemon's version, and what the socket offers."""
    return Client(socket, timeout).hello()
