"""The client: asks loopd for a loop device, from inside a container or on the host.

Owns the client's side of the wire: one datagram out, one reply in, the fds of both, the deadline over both,
the types of the errors, the choice of a delivery, and the check that what was delivered can be opened here.
Prints nothing, and repeats no request that was not refused or dropped (a second one would bind a second device). Takes
nothing else of the package than `wire` and `layers`. Standard library of Python 3.8 and later.

    with loopd.attach("disk.img", directory="/dev", partscan=True) as device:
        subprocess.run(["sfdisk", device], input=b"label: gpt\\n,\\n", check=True)
"""

from __future__ import annotations

import errno
import io
import os
import socket as _socket
import stat
import struct
import sys
import time
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Any, Iterator, Literal, NamedTuple, Sequence, TypeVar, Union

from loopd.client import layers
from loopd.client.layers import Obstacle
from loopd.protocol import wire
from loopd.protocol.wire import Attached, Code, Detached, Granted, Greeting, LeaseInfo, Measured, Rescanned, Resized

SOCKET = "/run/loopd/loopd.sock"
"""Where loopd listens; the environment variable LOOPD_SOCKET says otherwise."""
ADMIN_SOCKET = "/run/loopd-admin/admin.sock"
"""The administrator's socket on the host: every owner's leases, and detach by force."""
DIRECTORY = "/dev/loopd"
"""Where a directory of loopd's is bound into a container; the environment variable LOOPD_DIRECTORY says otherwise."""
TIMEOUT = 30.0
"""Seconds that a request and its reply may take together."""
DETACH_WAIT = 10.0
"""Seconds that the end of a ``with`` block waits until the image is free."""

StrPath = Union[str, "os.PathLike[str]"]
DirectIO = Literal["auto", "on", "off"]
Deliver = Literal["node", "fd", "mount"]
Lifetime = Union[Literal["device", "process", "container"], int]
"""What ends a lease, beside an explicit detach and the end of the container, which both always do.

``"device"``: `Device.close`, or the end of this process and of those that it forked. ``"process"``: the end
of this process. ``"container"``: the end of PID 1 of this PID namespace. A number: an open fd, a pidfd or a
connected SOCK_SEQPACKET socket, whose becoming readable or hanging up ends the lease; the caller keeps it.
"""


# Errors -----------------------------------------------------------------------------------------------------


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
    """There was no answer within the deadline. A device that is attached too late ends with its lifetime."""

    hint = "on the host, `systemctl status loopd` and `journalctl -u loopd` tell what it is doing"


class Dropped(Error):
    """loopd threw the request away without an answer, or ended before it gave one, as often as it was sent."""

    hint = "on the host, `journalctl -u loopd` tells why"


class BadReply(Error):
    """The answer is none that this version understands."""

    hint = "`loopctl hello` tells the version of the daemon"


class DeviceInaccessible(Error):
    """The device could not be opened here and has been detached again, or it is known that it could not be.

    `layer` is what refuses: ``"device cgroup"``, ``"nodev"``, ``"user namespace"``, ``"permission"``,
    ``"lsm"``, ``"mount"`` (attaching one) or ``"device"``; `errno` is that of open(2) or move_mount(2), 0 where
    it did not come to that, or another device was found in its place.
    """

    # pickle makes it from the message alone, and then sets the attributes.
    def __init__(self, message: str, hint: str = "", layer: str = "device", errno: int = 0) -> None:
        super().__init__(message, hint)
        self.layer = layer
        self.errno = errno


class ImageIncomplete(Error):
    """The device is detached, and the image lacks what was written to the device: the kernel could not write it back.

    `reason` says why, as ``"Input/output error"``, which may mean a full disk. `released` is False while
    somebody still has the device open.
    """

    # pickle makes it from the message alone, and then sets the attributes.
    def __init__(self, message: str, hint: str = "", reason: str = "", released: bool = True) -> None:
        super().__init__(message, hint)
        self.reason = reason
        self.released = released


class Refused(Error):
    """The daemon said no. `code` is the wire's; each code has a subclass of its own."""

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
    """The directory has a file of the device's name, which is never replaced."""

    code = Code.EXISTS


class NotFound(Refused):
    """No lease of this owner has that name."""

    code = Code.NOT_FOUND
    hint = "`loopctl list` shows the devices that are held"


class Busy(Refused):
    """Somebody still has the device open; it goes, and the image is free, at the last close."""

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
    "where SELinux is enforcing, with --security-opt label=disable",
    errno.EPROTOTYPE: "this is no socket of loopd's; by hand: systemd-socket-activate --datagram",
}
"""What helps, by the errno of connect(2)."""
_ADMIN_UNAVAILABLE = "on the host, as root: systemctl enable --now loopd-admin.socket; no container has it"


# One request, one reply -------------------------------------------------------------------------------------

_FIRST_PAUSE = 0.01
"""Seconds at most before a request that was dropped is sent again; each pause is twice as long as the one before."""
_LONGEST_PAUSE = 0.5

_UCRED = struct.Struct("=iII")  # pid, uid, gid of struct ucred


class _Fds:
    """Fds that were received, closed together but for those that were taken."""

    def __init__(self, fds: Sequence[int]) -> None:
        self._fds = dict(enumerate(fds))

    def take(self, index: int) -> int:
        return self._fds.pop(index)

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.popitem()[1])


class _Answer(NamedTuple):
    fields: dict[str, Any]
    fds: _Fds
    channel: _socket.socket
    pid: int


def _left(deadline: float) -> float:
    """Seconds until `deadline`, above 0: a timeout of 0 would be a socket that does not block."""
    return max(deadline - time.monotonic(), 1e-3)


def _send(path: str, payload: bytes, fds: Sequence[int], deadline: float) -> None:
    with _socket.socket(_socket.AF_UNIX, _socket.SOCK_DGRAM) as sender:
        # The kernel attaches credentials where either side asks for them; a socket made by hand may not.
        sender.setsockopt(_socket.SOL_SOCKET, _socket.SO_PASSCRED, 1)
        try:
            # Connected, since poll(2) does not see the full queue of a peer that a socket is not connected
            # to: the timeout would be spent spinning.
            sender.connect(path)
            sender.settimeout(_left(deadline))
            rights = struct.pack(f"{len(fds)}i", *fds)
            sender.sendmsg([payload], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)])
        except _socket.timeout:
            raise Timeout(f"{path}: the queue of requests stays full") from None
        except OSError as error:
            if error.errno == errno.EBADF:
                raise
            hint = _ADMIN_UNAVAILABLE if path == ADMIN_SOCKET else UNAVAILABLE.get(error.errno or 0, "")
            if path not in (SOCKET, ADMIN_SOCKET):
                named = "LOOPD_SOCKET names this one, " if path == os.environ.get("LOOPD_SOCKET") else ""
                hint = f"{named}the usual one is {SOCKET}" + (f"; {hint}" if hint else "")
            raise Unavailable(f"cannot ask loopd at {path}: {error.strerror or error}", hint) from error


def _receive(channel: _socket.socket, stack: ExitStack, deadline: float) -> tuple[bytes | None, _Fds, int]:
    """The reply, empty where the other end hung up, None where it is late, with its fds, which `stack` owns, and
    the process that sent it (0: one of another PID namespace).
    """
    channel.settimeout(_left(deadline))
    room = _socket.CMSG_SPACE(wire.MAX_FDS * 4) + _socket.CMSG_SPACE(_UCRED.size)
    # One byte more than a reply may have tells one that is cut off.
    try:
        data, ancillary, _, _ = channel.recvmsg(wire.MAX_REPLY + 1, room, _socket.MSG_CMSG_CLOEXEC)
    except _socket.timeout:
        return None, _Fds(()), 0
    except ConnectionResetError:
        return b"", _Fds(()), 0
    rights, pid = b"", 0
    for _, kind, content in ancillary:
        if kind == _socket.SCM_RIGHTS:
            rights += content[: len(content) // 4 * 4]
        elif kind == _socket.SCM_CREDENTIALS:
            pid = _UCRED.unpack(content)[0]
    fds = _Fds(struct.unpack(f"{len(rights) // 4}i", rights))
    stack.callback(fds.close)
    return data, fds, pid


_Record = TypeVar("_Record", Attached, Detached, LeaseInfo, Granted, Rescanned, Resized, Greeting, Measured)


def _record(kind: type[_Record], fields: dict[str, Any]) -> _Record:
    """A reply as a value. A field that is not known here is a newer daemon's and is left out."""
    values: dict[str, Any] = dict.fromkeys(name for name in kind._fields if name not in kind._field_defaults)
    values.update((name, tuple(value) if isinstance(value, list) else value) for name, value in fields.items())
    record = kind(**{name: values[name] for name in kind._fields if name in values})
    for name in kind._fields:
        if getattr(record, name) is None and name not in kind._field_defaults and name != "diskseq":
            raise ValueError(f"it has no {name}")
    return record


def _parsed(kind: type[_Record], fields: Any) -> _Record:
    try:
        record = _record(kind, fields)
        if isinstance(record, (Attached, LeaseInfo)):
            wire.VALIDATORS["devname"](record.devname)  # it becomes part of a path
        return record
    except (AttributeError, TypeError, ValueError) as error:
        raise BadReply(f"the reply makes no sense: {error}") from error


# The device -------------------------------------------------------------------------------------------------


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
        client: Client,
        attached: Attached,
        path: str,
        lifetime: Lifetime,
        channel: _socket.socket,
        file: io.FileIO | None,
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
        self._client = client
        self._lifetime = lifetime
        self._channel = channel  # with the lifetime "device", this open socket is the lease
        self._file = file
        self._kept = False
        self._released = False

    @property
    def _name(self) -> str:
        """The device as this process's request about it has it: its directory tells the owner."""
        return self.devname if self.path.startswith("/proc/self/fd/") else self.path

    @property
    def fd(self) -> int:
        """The open device, in the access that it has. ValueError after `close` or with
        ``open_device=False``."""
        if self._file is None:
            raise ValueError(f"{self.devname} was attached with open_device=False")
        return self._file.fileno()

    def detach(self, wait: float = DETACH_WAIT) -> bool:
        """End the lease; True when the image is free, False when it still is not after `wait` seconds.

        A device in use, by a mount for example, goes at the last close, and may be asked for again. One that
        somebody else detached before counts as released. Raises `ImageIncomplete` when the device is detached and
        the image lacks what was written, `Error` when loopd could not be asked; a lease of the lifetime
        ``"device"`` ends all the same.
        """
        if not self._released:
            if self._file is not None:
                self._file.close()  # else it would be this process that has it open
            try:
                self._released = self._client.detach(self._name, wait=wait, diskseq=self.diskseq)
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
        self.partitions = self._client.rescan(self._name)
        return self.partitions

    def resize(self) -> int:
        """Have the device take over the size of its image after that changed; bytes. `Error`."""
        self.size = self._client.resize(self._name)
        return self.size

    def close(self) -> None:
        """Close what is open here, which ends a lease of the lifetime ``"device"``.

        Waits for nothing, so only the journal of the host tells what could not be written back to the image.
        """
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


# What is needed to attach -----------------------------------------------------------------------------------


def pidfd_open(pid: int) -> int:
    """A new pidfd of a process, close-on-exec; for `attach` with ``lifetime``. OSError; Linux 5.3."""
    if sys.version_info >= (3, 9):
        return os.pidfd_open(pid)
    else:  # noqa: RET505  # mypy would call what follows the `if` unreachable
        import ctypes  # noqa: PLC0415  # costs all who do not need it

        libc = ctypes.CDLL(None, use_errno=True)
        fd = int(libc.syscall(ctypes.c_long(434), ctypes.c_int(pid), ctypes.c_uint(0)))  # 434 on all but Alpha
        if fd < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return fd


def _opened_image(image: StrPath | int, read_only: bool, stack: ExitStack) -> int:
    if isinstance(image, int):
        return image
    # O_NONBLOCK keeps the open of a FIFO from waiting for its other side; the daemon then refuses it.
    flags = os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    try:
        fd = os.open(image, flags | (os.O_RDONLY if read_only else os.O_RDWR))
    except OSError as error:
        if read_only or error.errno not in (errno.EACCES, errno.EROFS):
            raise
        fd = os.open(image, flags | os.O_RDONLY)
    stack.callback(os.close, fd)
    os.set_blocking(fd, True)
    return fd


def _opened_directory(directory: StrPath | int, stack: ExitStack) -> tuple[int, str]:
    """The directory as fd and as path."""
    if not isinstance(directory, int):
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, fd)
        path = os.fspath(directory)
        # Only a "." can be left out: in front of a ".." may be a link.
        steps = (step for step in path.split("/") if step not in ("", "."))
        return fd, path if os.path.isabs(path) else os.path.join(os.getcwd(), *steps)
    link = f"/proc/self/fd/{directory}"
    with suppress(OSError):
        path = os.readlink(link)
        if os.path.samestat(os.stat(path), os.fstat(directory)):
            return directory, path
    return directory, link


def _opened_lease(lifetime: Lifetime, stack: ExitStack) -> int | None:
    if isinstance(lifetime, int):
        return lifetime
    if lifetime not in ("device", "process", "container"):
        raise ValueError(f'lifetime: expected "device", "process", "container" or an fd, got {lifetime!r}')
    if lifetime == "device":
        return None
    try:
        fd = pidfd_open(1 if lifetime == "container" else os.getpid())
    except OSError as error:
        raise Error(
            f"the lifetime {lifetime!r} cannot be watched: pidfd_open: {error.strerror}",
            "it needs Linux 5.3 and a seccomp profile with pidfd_open;"
            ' `loopctl run` and the lifetime "device" do without',
        ) from error
    stack.callback(os.close, fd)
    return fd


# The ways to hand a device over -----------------------------------------------------------------------------


class _Way(NamedTuple):
    """A delivery that may work. `path` is the directory of the node, or the one in which a mount is to be.

    `kernel`: the directory is a devtmpfs, where the kernel makes the node.
    """

    deliver: tuple[Deliver, ...]
    dir_fd: int | None = None
    path: str = ""
    kernel: bool = False


def directory_grant() -> str:
    """Where this container has its directory of loopd's, if it has one."""
    return os.environ.get("LOOPD_DIRECTORY") or DIRECTORY


def _grant(stack: ExitStack) -> tuple[int, str] | None:
    try:
        return _opened_directory(directory_grant(), stack)
    except OSError:
        return None


def _inaccessible(what: str, obstacle: Obstacle, errno_: int = 0) -> DeviceInaccessible:
    return DeviceInaccessible(f"{what}: {obstacle.reason}", obstacle.hint, obstacle.layer, errno_)


def _choices(directory: StrPath | int | None, stack: ExitStack) -> Iterator[_Way | DeviceInaccessible]:
    """The deliveries to be tried in this order where none was asked for, or why one cannot work."""
    grant = _grant(stack) if directory is None else None
    if grant is not None:
        found = layers.obstacle(grant[0], own=False)
        yield _Way(("node",), *grant) if found is None else _inaccessible(grant[1], found)
    elif directory is None and os.path.isdir(directory_grant()):
        yield _inaccessible(directory_grant(), layers.not_this_users())
    fd, path = _opened_directory("/dev" if directory is None else directory, stack)
    kernel = layers.is_devtmpfs(fd)
    way = _Way(("fd",) if kernel else ("node",), fd, path, kernel)
    if directory is not None:
        yield way
        return
    found = layers.not_the_hosts(fd) if kernel else layers.obstacle(fd, own=True)
    yield way if found is None else _inaccessible(path, found)
    found = layers.no_mount()
    yield _Way(("mount",)) if found is None else _inaccessible("a mount", found)


def _ordered(deliver: Sequence[Deliver], directory: StrPath | int | None, stack: ExitStack) -> _Way:
    """The delivery that was asked for."""
    deliver = tuple(deliver)
    if "node" in deliver:
        grant = _grant(stack) if directory is None else None
        return _Way(deliver, *(grant or _opened_directory("/dev" if directory is None else directory, stack)))
    if "mount" in deliver and directory is not None:
        return _Way(deliver, *_opened_directory(directory, stack))
    return _Way(deliver)


def _attached_mount(mount: int, devname: str, folder: str | None) -> str:
    """Attach a mount in a directory that is made for it; where that is."""
    point = ""
    try:
        point = layers.make_mount_point(devname, folder)
        layers.attach_mount(mount, point)
    except OSError as error:
        if point:
            layers.remove_mount_point(point)
        known = layers.no_mount()
        if known is None:
            text = f"{error.strerror}: {error.filename}"
            known = Obstacle("mount", text, "seccomp or a security module may deny it: " + layers.BIND)
        raise _inaccessible(f"the mount of {devname} cannot be attached", known, error.errno or 0) from error
    finally:
        os.close(mount)
    return point


def _opened_device(dir_fd: int, path: str, attached: Attached) -> io.FileIO:
    flags = os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_RDONLY if attached.read_only else os.O_RDWR)
    try:
        return io.FileIO(
            attached.devname,
            "rb" if attached.read_only else "rb+",
            opener=lambda name, _: os.open(name, flags, dir_fd=dir_fd),
        )
    except OSError as error:
        number = (attached.major, attached.minor)
        found = layers.unopened(dir_fd, attached.devname, number, attached.read_only, error.errno or 0)
        raise _inaccessible(f"{path} cannot be opened", found, error.errno or 0) from error


def _concerns_the_way(error: Error) -> bool:
    """Whether another way to hand the device over may work where this error came."""
    if isinstance(error, DeviceInaccessible):
        return error.layer not in ("device cgroup", "device")  # no way is past these
    if isinstance(error, (NotPermitted, Unsupported)):
        return error.message.startswith(("dir_fd: ", "deliver: "))
    return isinstance(error, (Undeliverable, Exists))


# The client -------------------------------------------------------------------------------------------------


class Client:
    """One loopd, by its socket. Holds no connection and no fd: requests are independent of each other.

    `socket` is a path, by default $LOOPD_SOCKET or `SOCKET`; `timeout` is in seconds and covers the sending,
    which waits while the daemon starts, and the reply. Every method raises `Error`.
    """

    def __init__(self, socket: StrPath | None = None, timeout: float = TIMEOUT) -> None:
        self.socket = os.fspath(socket or os.environ.get("LOOPD_SOCKET") or SOCKET)
        self.timeout = timeout

    def attach(
        self,
        image: StrPath | int,
        directory: StrPath | int | None = None,
        *,
        offset: int = 0,
        sizelimit: int = 0,
        sector_size: int = 512,
        read_only: bool = False,
        partscan: bool = False,
        lock: bool = False,
        direct_io: DirectIO = "auto",
        ref: str = "",
        deliver: Sequence[Deliver] | None = None,
        lifetime: Lifetime = "device",
        open_device: bool = True,
    ) -> Device:
        """Bind `image` to a loop device and have it handed over: see `attach` of this module."""
        with ExitStack() as inputs:
            fds = [_opened_image(image, read_only, inputs)]
            request = wire.Attach(
                fd=0,
                offset=offset,
                sizelimit=sizelimit,
                sector_size=sector_size,
                read_only=read_only,
                partscan=partscan,
                lock=lock,
                direct_io=direct_io,
                ref=ref,
            )
            lease_fd = _opened_lease(lifetime, inputs)
            if lease_fd is not None:
                request = request._replace(lease_fd=len(fds))
                fds.append(lease_fd)

            def attached(way: _Way) -> Device:
                return self._attach(way, request, fds, lifetime, open_device)

            if deliver is not None:
                return attached(_ordered(deliver, directory, inputs))
            failures: list[Error] = []
            for way in _choices(directory, inputs):
                try:
                    if isinstance(way, DeviceInaccessible):
                        raise way
                    return attached(way)
                except Error as error:
                    if not _concerns_the_way(error):
                        raise
                    failures.append(error)
            failures[0].message = "; ".join(dict.fromkeys(failure.message for failure in failures))
            raise failures[0]

    def _attach(
        self, way: _Way, request: wire.Attach, fds: Sequence[int], lifetime: Lifetime, open_device: bool
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
            attached = _parsed(Attached, answer.fields)
            try:
                path, file = self._delivered(way, attached, answer.fds, open_device)
            except BaseException:
                answer.fds.close()
                with suppress(Error):
                    self.detach(os.path.join(way.path, attached.devname), wait=DETACH_WAIT, diskseq=attached.diskseq)
                raise
            answer.fds.close()
            outputs.pop_all()
            return Device(self, attached, path, lifetime, answer.channel, file)

    def _delivered(self, way: _Way, attached: Attached, fds: _Fds, open_device: bool) -> tuple[str, io.FileIO | None]:
        """Where the device is, and the device, open."""
        # The fds of a reply come in the order of the deliveries that have one.
        order = [name for name in way.deliver if name != "node"]
        with ExitStack() as stack:
            path, dir_fd = os.path.join(way.path, attached.devname), way.dir_fd
            if "mount" in way.deliver:
                mount = _taken(fds, order.index("mount"), "mount")
                path = _attached_mount(mount, attached.devname, way.path or None)
                dir_fd, _ = _opened_directory(path, stack)
                path = os.path.join(path, attached.devname)
            file = None
            try:
                if "fd" in way.deliver and not way.kernel:
                    fd = _taken(fds, order.index("fd"), "open device")
                    file = io.FileIO(fd, "rb" if attached.read_only else "rb+")
                    path = path if len(way.deliver) > 1 else f"/proc/self/fd/{fd}"
                elif open_device and dir_fd is not None:
                    file = _opened_device(dir_fd, path, attached)
                if file is not None:
                    _prove(file, path, attached)
            except BaseException:
                if file is not None:
                    file.close()  # else this process would be the one that has the device open
                raise
            return path, file

    def detach(self, device: StrPath, *, wait: float = 0.0, force: bool = False, diskseq: int | None = None) -> bool:
        """End the lease of a device, given as ``"loop4096"`` or with its directory.

        Waits up to `wait` seconds (at most 3600) beyond the timeout. True when the image is free, False while
        somebody has the device open: it goes at the last close. `force` is the administrator's, on the admin
        socket. With `diskseq`, `NotFound` where the name stands for another binding by now. `ImageIncomplete` where
        the device is detached, and the image lacks what was written.
        """
        name = os.path.basename(os.fspath(device))
        request = wire.Detach(devname=name, wait=wait, force=force, diskseq=diskseq)
        reply = _parsed(Detached, self._about(device, request, wait))
        layers.detach_mounts(name)
        released = reply.state == "released"
        if reply.lost is not None:
            text = f"{os.fspath(device)} is detached, but its image lacks what was written to it: {reply.lost}"
            text += "" if released else "; and somebody still has it open"
            raise ImageIncomplete(text, reason=reply.lost, released=released)
        return released

    def rescan(self, device: StrPath) -> tuple[str, ...]:
        """Have the partition table of a device read again; the names of the partitions, whose nodes are there now."""
        request = wire.Rescan(devname=os.path.basename(os.fspath(device)))
        return _parsed(Rescanned, self._about(device, request)).partitions

    def resize(self, device: StrPath) -> int:
        """Have a device take over the size of its image after that changed; bytes."""
        request = wire.Resize(devname=os.path.basename(os.fspath(device)))
        return _parsed(Resized, self._about(device, request)).size

    def directory(self, name: str, *, remove: bool = False) -> str:
        """Make the directory `name` of this user on the host, to be bound into a container, or `remove` it; its path.

        One that is there stays as it is; one with a device in it is not removed (`Busy`).
        """
        with ExitStack() as stack:
            try:
                path = _parsed(Granted, self._ask(stack, wire.Directory(name, remove=remove)).fields).path
                # What it names is bound into containers, by root: no other answer than that of a loopd will do.
                if not os.path.isabs(path) or os.path.basename(path) != f"{os.getuid()}-{name}":
                    raise BadReply(f"{path} is no directory {name} of loopd's")
                return path
            except NotFound as error:
                error.hint = "as root, `ls /run/loopd-dev` shows those that there are"
                raise
            except Busy as error:
                with suppress(Error):
                    path = self.directory(name)  # it is there, and stays as it is
                    shows = f"`LOOPD_DIRECTORY={path} loopctl list` shows them"
                    error.hint = f"{shows}, `loopctl detach {path}/loopN` ends one"
                raise

    def list(self) -> tuple[LeaseInfo, ...]:
        """The leases of this owner and of this container's directory; on the admin socket those of all."""
        with ExitStack() as stack:
            grant = _grant(stack)
            leases = {lease.devname: lease for lease in (() if grant is None else self._listed(grant[0]))}
            leases.update((lease.devname, lease) for lease in self._listed(None))
            return tuple(leases.values())

    def _listed(self, dir_fd: int | None) -> Iterator[LeaseInfo]:
        request, fds = (wire.Leases(), ()) if dir_fd is None else (wire.Leases(dir_fd=0), (dir_fd,))
        while True:
            with ExitStack() as stack:
                fields = self._ask(stack, request, fds).fields
            rows = fields.get("leases")
            if not isinstance(rows, list):
                raise BadReply("the reply makes no sense: it has no leases")
            leases = [_parsed(LeaseInfo, row) for row in rows]
            yield from leases
            # An empty page that promises more would be asked for again for ever.
            if not fields.get("more") or not leases:
                return
            request = request._replace(after=leases[-1].devname)

    def _about(self, device: StrPath, request: wire.Detach | wire.Rescan | wire.Resize, wait: float = 0.0) -> Any:
        """The answer to a request about a lease. Its owner may be a directory of loopd's: the one that `device`
        is in or this container's, else it is this user.
        """
        folders = dict.fromkeys((os.path.dirname(os.fspath(device)), directory_grant()))
        with ExitStack() as stack:
            for folder in filter(None, folders):
                try:
                    dir_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                except OSError:
                    continue
                stack.callback(os.close, dir_fd)
                if layers.is_devtmpfs(dir_fd):
                    continue  # none of loopd's: the journal would have a refusal more
                with suppress(NotFound):
                    return self._ask(stack, request._replace(dir_fd=0), [dir_fd], wait).fields
            return self._ask(stack, request, (), wait).fields

    def hello(self) -> Greeting:
        """The daemon's version, and what this socket offers."""
        with ExitStack() as stack:
            return _parsed(Greeting, self._ask(stack, wire.Hello()).fields)

    def metrics(self) -> str:
        """What the daemon counts, as OpenMetrics text; on the admin socket."""
        with ExitStack() as stack:
            return _parsed(Measured, self._ask(stack, wire.Metrics()).fields).openmetrics

    def daemon_pid(self) -> int:
        """The process id of the daemon, as the kernel attests it; 0 where it is of another PID namespace."""
        with ExitStack() as stack:
            return self._ask(stack, wire.Hello()).pid

    def _ask(self, stack: ExitStack, request: wire.Request, fds: Sequence[int] = (), wait: float = 0.0) -> _Answer:
        """Send `request` with `fds` (borrowed) and a socket for the reply; `stack` owns what comes back."""
        over = time.monotonic() + wait
        until = over + self.timeout
        pause = _FIRST_PAUSE
        while True:
            try:
                return self._ask_once(stack, request, fds, until, self.timeout + wait)
            except Dropped:
                # Most likely others of this account have as many requests under way as it may have, or loopd ended.
                if time.monotonic() + pause > until:
                    raise
                if isinstance(request, wire.Detach):
                    request = request._replace(wait=min(request.wait, max(0.0, over - time.monotonic())))
            time.sleep(pause * (0.5 + os.urandom(1)[0] / 510))  # no two come back at the same time
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _ask_once(
        self, stack: ExitStack, request: wire.Request, fds: Sequence[int], deadline: float, timeout: float
    ) -> _Answer:
        """One try; `Dropped` means that nothing has come of it, or that loopd ended meanwhile."""
        channel, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        stack.enter_context(channel)
        channel.setsockopt(_socket.SOL_SOCKET, _socket.SO_PASSCRED, 1)
        with theirs:
            payload = wire.encode_request(request._replace(reply_fd=len(fds)))
            if len(payload) > wire.MAX_REQUEST:
                raise Malformed(f"the request has more than {wire.MAX_REQUEST} bytes")
            _send(self.socket, payload, [*fds, theirs.fileno()], deadline)
        # With our copy of their end closed, their end of the conversation is a hang-up here.
        data, received, pid = _receive(channel, stack, deadline)
        if data is None:
            raise Timeout(f"no answer from {self.socket} within {timeout:g} s")
        if not data:
            channel.close()
            raise Dropped(f"{self.socket}: the request was dropped without an answer")
        try:
            if len(data) > wire.MAX_REPLY:
                raise ValueError(f"it has more than {wire.MAX_REPLY} bytes")
            return _Answer(wire.decode_reply(data), received, channel, pid)
        except wire.Refusal as refusal:
            raise ERRORS[refusal.code](refusal.message) from None
        # RecursionError: nested arrays; the others: a refusal of another shape.
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise BadReply(f"the reply makes no sense: {error}") from error


def _taken(fds: _Fds, index: int, what: str) -> int:
    try:
        return fds.take(index)
    except KeyError:
        raise BadReply(f"the reply came without the {what} that was asked for") from None


def _prove(file: io.FileIO, path: str, attached: Attached) -> None:
    """What was opened is what was attached."""
    status = os.fstat(file.fileno())
    if not stat.S_ISBLK(status.st_mode) or status.st_rdev != os.makedev(attached.major, attached.minor):
        raise DeviceInaccessible(f"{path} is not {attached.devname}, the device that was attached", "", "device", 0)


def node_path(device: StrPath) -> str | None:
    """Where this process sees the node of a device: beside the name that is given, else in the container's
    directory of loopd's, in /dev or in a mount of its own.
    """
    folder, name = os.path.split(os.path.abspath(device) if os.path.dirname(device) else os.fspath(device))
    folders = [folder] if folder else [directory_grant(), "/dev", *layers.mount_points(name)]
    for path in (os.path.join(folder, name) for folder in folders):
        with suppress(OSError):
            if stat.S_ISBLK(os.lstat(path).st_mode):
                return path
    return None


def attach(
    image: StrPath | int,
    directory: StrPath | int | None = None,
    *,
    offset: int = 0,
    sizelimit: int = 0,
    sector_size: int = 512,
    read_only: bool = False,
    partscan: bool = False,
    lock: bool = False,
    direct_io: DirectIO = "auto",
    ref: str = "",
    deliver: Sequence[Deliver] | None = None,
    lifetime: Lifetime = "device",
    open_device: bool = True,
    socket: StrPath | None = None,
    timeout: float = TIMEOUT,
) -> Device:
    """Bind an image to a loop device and have it handed over.

    - `image`: a path, opened read-write, and read-only where `read_only` is set or nothing else is allowed;
      or an open fd, which is used as it was opened.
    - `directory`: where the node is made, as a path or an open fd. Where it is not given and no `deliver` either,
      the first way that works is taken: the directory of loopd's that is bound in at /dev/loopd
      ($LOOPD_DIRECTORY); a node in /dev, or, where /dev is the host's devtmpfs, the one that the kernel makes
      there; a mount, where this process may attach one.
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
    - `open_device`: open the node, to say which layer refuses if it cannot be used, and for `Device.fd`.
    - `socket`, `timeout`: see `Client`.

    Raises OSError for an image or directory that cannot be opened, `DeviceInaccessible` where the device cannot
    be, and the `Refused` of its code where the daemon says no; no device is left attached by either. After
    `Timeout` and KeyboardInterrupt one may be, if its lifetime is not ``"device"``.
    """
    return Client(socket, timeout).attach(
        image,
        directory,
        offset=offset,
        sizelimit=sizelimit,
        sector_size=sector_size,
        read_only=read_only,
        partscan=partscan,
        lock=lock,
        direct_io=direct_io,
        ref=ref,
        deliver=deliver,
        lifetime=lifetime,
        open_device=open_device,
    )


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


def directory(name: str, *, remove: bool = False, socket: StrPath | None = None, timeout: float = TIMEOUT) -> str:
    """`Client.directory`: the path of a directory to be bound into a container."""
    return Client(socket, timeout).directory(name, remove=remove)


def hello(*, socket: StrPath | None = None, timeout: float = TIMEOUT) -> Greeting:
    """`Client.hello`: the daemon's version, and what the socket offers."""
    return Client(socket, timeout).hello()
