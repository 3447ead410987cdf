"""loopd gives loop devices to containers.

    with loopd.attach("disk.img", directory="/dev") as device:
        print(device.path, device.size)

The names of the client are loaded when the first of them is used: the daemon, which imports its own modules
of this package, does not pay for them.
"""

from __future__ import annotations

__version__ = "0.1.0"

TYPE_CHECKING = False  # type checkers know the name; importing typing for it would double the cost of this module
if TYPE_CHECKING:
    from typing import Iterable

    from loopd.client.api import (
        ADMIN_SOCKET,
        DIRECTORY,
        ERRORS,
        SOCKET,
        BadFd,
        BadReply,
        Busy,
        Client,
        Device,
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
        attach,
        detach,
        directories,
        directory,
        grant,
        hello,
        pidfd_open,
        rescan,
        resize,
    )
    from loopd.client.api import leases as list  # noqa: A004  # it is to read loopd.list()
    from loopd.protocol.wire import Attached, Code, Granted, GrantInfo, Greeting, LeaseInfo

__all__ = [
    "ADMIN_SOCKET",
    "DIRECTORY",
    "ERRORS",
    "SOCKET",
    "Attached",
    "BadFd",
    "BadReply",
    "Busy",
    "Client",
    "Code",
    "Device",
    "DeviceInaccessible",
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
    "grant",
    "hello",
    "list",
    "pidfd_open",
    "rescan",
    "resize",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from loopd.client import api as client  # noqa: PLC0415  # see above

    # The client has no function of the name `list`: it would hide the type in all of its module.
    value = globals()[name] = getattr(client, "leases" if name == "list" else name)
    return value


def __dir__() -> Iterable[str]:
    return sorted([*globals(), *__all__])
