"""The errors of the client: what can go wrong, as a type, a message and a hint.

Changes when the client can fail in one more way, or when a better remedy is known. Does no I/O.
"""

from __future__ import annotations

import errno

from loopd.protocol.wire import Code


class Error(Exception):
    """Base of all errors of the client: `message` says what happened, `hint` (may be empty) what to do
    next."""

    hint: str = ""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint or type(self).hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class Unavailable(Error):
    """The request could not be sent: no socket, nobody behind it, or no permission to write to it."""


class Timeout(Error):
    """No answer came within the deadline."""

    hint = "on the host, `systemctl status loopd` and `journalctl -u loopd` tell what it is doing"


class Dropped(Error):
    """loopd dropped the request without an answer, or ended before it answered, each time until the deadline."""

    hint = "on the host, `journalctl -u loopd` tells why"


class BadReply(Error):
    """This version of the client does not understand the answer."""

    hint = "`loopctl hello` tells the version of the daemon"


class DeviceInaccessible(Error):
    """The device could not be opened here and has been detached again, or it is known that it could not be.

    `layer` is what refuses: ``"device cgroup"``, ``"nodev"``, ``"user namespace"``, ``"permission"``,
    ``"lsm"``, ``"mount"`` (attaching one) or ``"device"``. `errno` is that of open(2) or move_mount(2); it is 0 where
    neither was called, or where another device was found in its place.
    """

    # pickle calls this with the message alone, and then sets the attributes.
    def __init__(self, message: str, hint: str = "", layer: str = "device", errno: int = 0) -> None:
        super().__init__(message, hint)
        self.layer = layer
        self.errno = errno


class ImageIncomplete(Error):
    """The device is detached, and the image lacks what was written to the device: the kernel could not write it back.

    `reason` says why, as ``"Input/output error"``, which may mean a full disk. `released` is False while
    somebody still has the device open.
    """

    # As above.
    def __init__(self, message: str, hint: str = "", reason: str = "", released: bool = True) -> None:
        super().__init__(message, hint)
        self.reason = reason
        self.released = released


class Refused(Error):
    """The daemon refused the request. `code` is the wire's; each code has a subclass of its own."""

    code: Code


class Malformed(Refused):
    """A field that is unknown or whose value is out of its limits."""

    code = Code.MALFORMED


class Unsupported(Refused):
    """This daemon, or the kernel it runs on, does not have what was asked for."""

    code = Code.UNSUPPORTED


class BadFd(Refused):
    """The image, directory or lifetime is no file of the kind that is needed."""

    code = Code.BAD_FD


class Invalid(Refused):
    """The values do not go together or do not fit the image, such as an offset past its end."""

    code = Code.INVALID


class NotPermitted(Refused):
    """The policy, or the right of the client on its own directory, does not allow it."""

    code = Code.NOT_PERMITTED


class Quota(Refused):
    """The account has as many devices, or asks as often, as it may."""

    code = Code.QUOTA
    hint = "`loopctl list` shows the devices that are held, `loopctl detach` gives one back"


class Exists(Refused):
    """The directory has a file of the device's name, which loopd never replaces."""

    code = Code.EXISTS


class NotFound(Refused):
    """No lease of this owner has that name."""

    code = Code.NOT_FOUND
    hint = "`loopctl list` shows the devices that are held"


class Busy(Refused):
    """Somebody still has the device open. The device goes, and the image is free, at the last close."""

    code = Code.BUSY
    hint = "unmount its file systems and end what has it open"


class TimedOut(Refused, Timeout):
    """The daemon gave up: something that it waited for, such as the image's file system, took too long."""

    code = Code.TIMEOUT


class Undeliverable(Refused):
    """The device could not be handed over, for the reason that the message names."""

    code = Code.UNDELIVERABLE
    hint = "`loopctl doctor` tells what would help"


class NoDevice(Refused):
    """The host has no device number left to give."""

    code = Code.NO_DEVICE
    hint = "on the host, `journalctl -u loopd` tells what used them up"


class Io(Refused):
    """Reading or writing the image or the directory failed."""

    code = Code.IO


class Internal(Refused):
    """A defect of the daemon."""

    code = Code.INTERNAL
    hint = "on the host, `journalctl -u loopd` has the details; please report them"


ERRORS: dict[Code, type[Refused]] = {
    Code.MALFORMED: Malformed,
    Code.UNSUPPORTED: Unsupported,
    Code.BAD_FD: BadFd,
    Code.INVALID: Invalid,
    Code.NOT_PERMITTED: NotPermitted,
    Code.QUOTA: Quota,
    Code.EXISTS: Exists,
    Code.NOT_FOUND: NotFound,
    Code.BUSY: Busy,
    Code.TIMEOUT: TimedOut,
    Code.UNDELIVERABLE: Undeliverable,
    Code.NO_DEVICE: NoDevice,
    Code.IO: Io,
    Code.INTERNAL: Internal,
}
"""The error of each code."""

UNAVAILABLE = {
    errno.ENOENT: "on the host: systemctl enable --now loopd.socket; "
    "into a container, bind-mount the directory /run/loopd, read-only",
    errno.ECONNREFUSED: "on the host: systemctl restart loopd.socket; "
    "into a container, bind-mount the directory /run/loopd: the socket in it is another one after a restart",
    errno.EACCES: "add the user to the group loopd; "
    "a container with --group-add, in rootless podman --group-add keep-groups; "
    "where SELinux is enforcing, by loopd's policy module on the host, or with --security-opt label=disable; "
    "`loopctl doctor` gives the group's number",
    errno.EPROTOTYPE: "this is no socket of loopd's; by hand: systemd-socket-activate --datagram",
}
"""What helps, by the errno of connect(2)."""
ADMIN_UNAVAILABLE = "on the host, as root: systemctl enable --now loopd-admin.socket; no container has it"
NOT_ROOT = "you are not root: sudo loopctl ..."
