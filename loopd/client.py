"""The client: asks loopd for a loop device, from inside a container or on the host.

Owns the client's side of the wire: one datagram out, one reply in, the fds of both, the deadline over both,
the types of the errors, and the check that what was delivered can be opened here. Prints nothing, repeats no
request (a second one would bind a second device) and takes nothing else of the package than `wire`. Standard
library of Python 3.8 and later.

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
from typing import Any, Literal, NamedTuple, Sequence, TypeVar, Union

from loopd import wire
from loopd.wire import Attached, Code, Detached, Greeting, LeaseInfo

SOCKET = "/run/loopd/loopd.sock"
"""Where loopd listens; the environment variable LOOPD_SOCKET says otherwise."""
ADMIN_SOCKET = "/run/loopd-admin/admin.sock"
"""The administrator's socket on the host: every owner's leases, and detach by force."""
TIMEOUT = 30.0
"""Seconds that a request and its reply may take together."""
DETACH_WAIT = 10.0
"""Seconds that the end of a ``with`` block waits until the image is free."""

StrPath = Union[str, "os.PathLike[str]"]
DirectIO = Literal["auto", "on", "off"]
Deliver = Literal["node", "fd"]
Lifetime = Union[Literal["device", "process", "container"], int]
"""What ends a lease, beside an explicit detach and the end of the container, which both always do.

``"device"``: `Device.close`, or the end of this process and of those that it forked. ``"process"``: the end
of this process. ``"container"``: the end of PID 1 of this PID namespace. A number: an open fd, a pidfd or a
connected socket, whose becoming readable or hanging up ends the lease; the caller keeps it.
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
    """loopd threw the request away without an answer, or ended before it gave one."""

    hint = "on the host, `journalctl -u loopd` tells why"


class BadReply(Error):
    """The answer is none that this version understands."""

    hint = "`loopctl hello` tells the version of the daemon"


class DeviceInaccessible(Error):
    """The device was attached, could not be opened here, and has been detached again.

    `layer` is what refused: ``"device cgroup"``, ``"nodev"``, ``"user namespace"``, ``"permission"``,
    ``"lsm"`` or ``"device"``; `errno` is that of open(2), 0 where another device was found in its place.
    """

    def __init__(self, message: str, hint: str, layer: str, errno: int) -> None:
        super().__init__(message, hint)
        self.layer = layer
        self.errno = errno


class Refused(Error):
    """The daemon said no. `code` is the wire's; each code has a subclass of its own."""

    code: Code


class Malformed(Refused):
    """A field that is unknown or whose value is out of its limits."""

    code = Code.MALFORMED


class Unsupported(Refused):
    """This daemon, or the kernel it runs on, does not have what was asked for."""

    code = Code.UNSUPPORTED
    hint = "`loopctl hello` tells the version of the daemon and what it can do"


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

_UNAVAILABLE = {
    errno.ENOENT: "on the host: systemctl enable --now loopd.socket; "
    "into a container, bind-mount the directory /run/loopd",
    errno.ECONNREFUSED: "on the host: systemctl restart loopd.socket; "
    "into a container, bind-mount the directory /run/loopd: the socket in it is another one after a restart",
    errno.EACCES: "add the user to the group loopd; "
    "a container with --group-add, in rootless podman --group-add keep-groups",
}
"""What helps, by the errno of connect(2)."""


# One request, one reply -------------------------------------------------------------------------------------


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
            hint = _UNAVAILABLE.get(error.errno or 0, "")
            raise Unavailable(f"cannot ask loopd at {path}: {error.strerror or error}", hint) from error


def _receive(channel: _socket.socket, stack: ExitStack, deadline: float) -> tuple[bytes | None, _Fds]:
    """The reply, empty where the other end hung up, None where it is late; `stack` owns the fds."""
    channel.settimeout(_left(deadline))
    room = _socket.CMSG_SPACE(wire.MAX_FDS * 4)
    # One byte more than a reply may have tells one that is cut off.
    try:
        data, ancillary, _, _ = channel.recvmsg(wire.MAX_REPLY + 1, room, _socket.MSG_CMSG_CLOEXEC)
    except _socket.timeout:
        return None, _Fds(())
    except ConnectionResetError:
        return b"", _Fds(())
    rights = b"".join(
        content[: len(content) // 4 * 4]
        for level, kind, content in ancillary
        if (level, kind) == (_socket.SOL_SOCKET, _socket.SCM_RIGHTS)
    )
    fds = _Fds(struct.unpack(f"{len(rights) // 4}i", rights))
    stack.callback(fds.close)
    return data, fds


_Record = TypeVar("_Record", Attached, Detached, LeaseInfo, Greeting)


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
    raises `Busy`. An object that is not used so is ended by `detach` or `close`, or is left alone after
    `keep`.

    `path` is the node, in the directory as it was given, or ``/proc/self/fd/N`` where only an fd was
    delivered. The other attributes are the daemon's answer: `diskseq` identifies this one binding (None
    before Linux 5.15), `size` and `sector_size` are in bytes, `read_only` and `direct_io` are what the kernel
    has in force, `partitions` are the names of the partitions that were found, `warnings` is text for a
    person.
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
    def fd(self) -> int:
        """The open device, in the access that it has. ValueError after `close` or with
        ``open_device=False``."""
        if self._file is None:
            raise ValueError(f"{self.devname} was attached with open_device=False")
        return self._file.fileno()

    def detach(self, wait: float = DETACH_WAIT) -> bool:
        """End the lease; True when the image is free, False when it still is not after `wait` seconds.

        A device in use, by a mount for example, goes at the last close, and may be asked for again. One that
        somebody else detached before counts as released. Raises `Error` when loopd could not be asked; a
        lease of the lifetime ``"device"`` ends all the same.
        """
        if not self._released:
            if self._file is not None:
                self._file.close()  # else it would be this process that has it open
            try:
                self._released = self._client.detach(self.devname, wait=wait)
            except NotFound:
                self._released = True
            finally:
                self.close()
        return self._released

    def close(self) -> None:
        """Close what is open here, which ends a lease of the lifetime ``"device"``; waits for nothing."""
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
            released = self.detach()
        except Error:
            if error is None:
                raise
            return  # the error of the block is the one to see
        if error is None and not released:
            raise Busy(f"{self.devname} is detached, but somebody still has it open")

    def __fspath__(self) -> str:
        return self.path

    def __repr__(self) -> str:
        return f"<loopd.Device {self.path} diskseq={self.diskseq} size={self.size}>"


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
        return fd, path if os.path.isabs(path) else os.path.join(os.getcwd(), path)
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
            'it needs Linux 5.3 and a seccomp profile with pidfd_open; the lifetime "device" does without',
        ) from error
    stack.callback(os.close, fd)
    return fd


# The layers between a node and its use ----------------------------------------------------------------------


def _foreign_user_namespace() -> bool:
    with open("/proc/self/uid_map", encoding="ascii") as file:
        return file.read().split() != ["0", "0", str(2**32 - 1)]


def _inaccessible(dir_fd: int, path: str, attached: Attached, errno_: int) -> DeviceInaccessible:
    """Which layer made open(2) of the node fail, by its errno (fs/namei.c, security/device_cgroup.c)."""

    def because(layer: str, reason: str, hint: str) -> DeviceInaccessible:
        return DeviceInaccessible(f"{path} cannot be opened: {reason}", hint, layer, errno_)

    access = "r" if attached.read_only else "rw"
    if errno_ == errno.EPERM:
        rule = f"--device-cgroup-rule 'b {attached.major}:* {access}'"
        return because("device cgroup", "the device cgroup of this container denies it", f"podman or docker run {rule}")
    if errno_ != errno.EACCES:
        return because("device", os.strerror(errno_), "`loopctl list` shows whether it is still attached")
    if os.fstatvfs(dir_fd).f_flag & os.ST_NODEV:
        return because(
            "nodev",
            "its directory is on a mount with the option nodev",
            "take a directory without it, as podman run -v DIRECTORY:/dev/loopd:dev makes one",
        )
    # access(2) asks for mode, ACL and the LSM's hook on the inode, not for what a mount allows.
    mode = os.R_OK if attached.read_only else os.R_OK | os.W_OK
    if os.access(attached.devname, mode, dir_fd=dir_fd, effective_ids=True):
        if _foreign_user_namespace():
            return because(
                "user namespace",
                "its directory is on a file system of a user namespace, where no device opens",
                "take a directory that was bind-mounted from the host, or let an fd be delivered",
            )
    else:
        node = os.stat(attached.devname, dir_fd=dir_fd, follow_symlinks=False)
        if node.st_uid != os.geteuid():
            return because(
                "permission",
                f"it is uid {node.st_uid}'s, mode {stat.S_IMODE(node.st_mode):04o}, not uid {os.geteuid()}'s",
                "ask as the user who is to use the device",
            )
    return because(
        "lsm",
        "a security module, SELinux or AppArmor, denies it",
        "its audit log on the host tells why; for SELinux: podman run --security-opt label=disable",
    )


def _opened_device(dir_fd: int, path: str, attached: Attached) -> io.FileIO:
    flags = os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_RDONLY if attached.read_only else os.O_RDWR)
    try:
        return io.FileIO(
            attached.devname,
            "rb" if attached.read_only else "rb+",
            opener=lambda name, _: os.open(name, flags, dir_fd=dir_fd),
        )
    except OSError as error:
        raise _inaccessible(dir_fd, path, attached, error.errno or 0) from error


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
        directory: StrPath | int = "/dev",
        *,
        offset: int = 0,
        sizelimit: int = 0,
        sector_size: int = 512,
        read_only: bool = False,
        partscan: bool = False,
        lock: bool = False,
        direct_io: DirectIO = "auto",
        ref: str = "",
        deliver: Sequence[Deliver] = ("node",),
        lifetime: Lifetime = "device",
        open_device: bool = True,
    ) -> Device:
        """Bind `image` to a loop device with a node in `directory`: see `attach` of this module."""
        with ExitStack() as inputs, ExitStack() as outputs:
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
                deliver=tuple(deliver),
            )
            dir_fd, dir_path = None, ""
            if "node" in deliver:
                dir_fd, dir_path = _opened_directory(directory, inputs)
                request = request._replace(dir_fd=len(fds))
                fds.append(dir_fd)
            lease_fd = _opened_lease(lifetime, inputs)
            if lease_fd is not None:
                request = request._replace(lease_fd=len(fds))
                fds.append(lease_fd)

            answer = self._ask(outputs, request, fds)
            attached = _parsed(Attached, answer.fields)
            file = None
            try:
                path = os.path.join(dir_path, attached.devname) if dir_fd is not None else ""
                if "fd" in deliver:
                    # The fds of a reply come in the order of the deliveries that have one.
                    file = self._delivered(
                        answer.fds, [name for name in deliver if name != "node"].index("fd"), attached
                    )
                elif dir_fd is not None and open_device:
                    file = _opened_device(dir_fd, path, attached)
                if file is not None:
                    self._prove(file, path, attached)
                    path = path or f"/proc/self/fd/{file.fileno()}"
            except BaseException:
                answer.fds.close()
                if file is not None:
                    file.close()  # else this process would be the one that has the device open
                with suppress(Error):
                    self.detach(attached.devname, wait=DETACH_WAIT)
                raise
            answer.fds.close()
            outputs.pop_all()
            return Device(self, attached, path, lifetime, answer.channel, file)

    def detach(self, device: StrPath, *, wait: float = 0.0, force: bool = False) -> bool:
        """End the lease of a device, given as ``"loop4096"`` or with its directory.

        Waits up to `wait` seconds (at most 3600) beyond the timeout. True when the image is free, False while
        somebody has the device open: it goes at the last close. `force` is the administrator's, on the admin
        socket.
        """
        request = wire.Detach(devname=os.path.basename(os.fspath(device)), wait=wait, force=force)
        with ExitStack() as stack:
            fields = self._ask(stack, request, (), wait).fields
        return _parsed(Detached, fields).state == "released"

    def list(self) -> tuple[LeaseInfo, ...]:
        """The leases of this owner; on the admin socket those of all."""
        leases: list[LeaseInfo] = []
        while True:
            with ExitStack() as stack:
                fields = self._ask(stack, wire.Leases(after=leases[-1].devname if leases else "")).fields
            rows = fields.get("leases")
            if not isinstance(rows, list):
                raise BadReply("the reply makes no sense: it has no leases")
            leases += [_parsed(LeaseInfo, row) for row in rows]
            # An empty page that promises more would be asked for again for ever.
            if not fields.get("more") or not rows:
                return tuple(leases)

    def hello(self) -> Greeting:
        """The daemon's version, and what this socket offers."""
        with ExitStack() as stack:
            return _parsed(Greeting, self._ask(stack, wire.Hello()).fields)

    def _ask(self, stack: ExitStack, request: wire.Request, fds: Sequence[int] = (), wait: float = 0.0) -> _Answer:
        """Send `request` with `fds` (borrowed) and a socket for the reply; `stack` owns what comes back."""
        deadline = time.monotonic() + self.timeout + wait
        channel, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        stack.enter_context(channel)
        with theirs:
            payload = wire.encode_request(request._replace(reply_fd=len(fds)))
            if len(payload) > wire.MAX_REQUEST:
                raise Malformed(f"the request has more than {wire.MAX_REQUEST} bytes")
            _send(self.socket, payload, [*fds, theirs.fileno()], deadline)
        # With our copy of their end closed, their end of the conversation is a hang-up here.
        data, received = _receive(channel, stack, deadline)
        if data is None:
            raise Timeout(f"no answer from {self.socket} within {self.timeout + wait:g} s")
        if not data:
            raise Dropped(f"{self.socket}: the request was dropped without an answer")
        try:
            if len(data) > wire.MAX_REPLY:
                raise ValueError(f"it has more than {wire.MAX_REPLY} bytes")
            return _Answer(wire.decode_reply(data), received, channel)
        except wire.Refusal as refusal:
            raise ERRORS[refusal.code](refusal.message) from None
        # RecursionError: nested arrays; the others: a refusal of another shape.
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise BadReply(f"the reply makes no sense: {error}") from error

    @staticmethod
    def _delivered(fds: _Fds, index: int, attached: Attached) -> io.FileIO:
        try:
            return io.FileIO(fds.take(index), "rb" if attached.read_only else "rb+")
        except KeyError:
            raise BadReply("the reply came without the open device that was asked for") from None

    @staticmethod
    def _prove(file: io.FileIO, path: str, attached: Attached) -> None:
        """What was opened is what was attached."""
        status = os.fstat(file.fileno())
        if not stat.S_ISBLK(status.st_mode) or status.st_rdev != os.makedev(attached.major, attached.minor):
            raise DeviceInaccessible(
                f"{path or 'the fd'} is not {attached.devname}, the device that was attached", "", "device", 0
            )


def attach(
    image: StrPath | int,
    directory: StrPath | int = "/dev",
    *,
    offset: int = 0,
    sizelimit: int = 0,
    sector_size: int = 512,
    read_only: bool = False,
    partscan: bool = False,
    lock: bool = False,
    direct_io: DirectIO = "auto",
    ref: str = "",
    deliver: Sequence[Deliver] = ("node",),
    lifetime: Lifetime = "device",
    open_device: bool = True,
    socket: StrPath | None = None,
    timeout: float = TIMEOUT,
) -> Device:
    """Bind an image to a loop device and have its node made in a directory.

    - `image`: a path, opened read-write, and read-only where `read_only` is set or nothing else is allowed;
      or an open fd, which is used as it was opened.
    - `directory`: where the node is made, as a path or an open fd.
    - `offset`, `sizelimit`: the part of the image in bytes; a `sizelimit` of 0 goes to its end.
    - `sector_size`: the logical sector size in bytes: 512, 1024, 2048 or 4096.
    - `partscan`: have the partitions found and their nodes made.
    - `lock`: keep udev on the host off the device as long as it is attached (it waits, and `udevadm settle`
      with it).
    - `direct_io`: ``"on"`` is refused where it cannot be had, ``"auto"`` does without.
    - `ref`: up to 63 bytes for the caller's own use, kept with the device.
    - `deliver`: ``"node"``, ``"fd"`` or both; an fd is opened by the daemon, and `directory` is not used
      without a node.
    - `lifetime`: see `Lifetime`.
    - `open_device`: open the node, to say which layer refuses if it cannot be used, and for `Device.fd`.
    - `socket`, `timeout`: see `Client`.

    Raises OSError for an image or directory that cannot be opened, `DeviceInaccessible` where the node cannot
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
    """`Client.detach`: True when the image is free, False while somebody has the device open."""
    return Client(socket, timeout).detach(device, wait=wait)


def leases(*, socket: StrPath | None = None, timeout: float = TIMEOUT) -> tuple[LeaseInfo, ...]:
    """`Client.list`, as ``loopd.list()``: the leases of this owner."""
    return Client(socket, timeout).list()


def hello(*, socket: StrPath | None = None, timeout: float = TIMEOUT) -> Greeting:
    """`Client.hello`: the daemon's version, and what the socket offers."""
    return Client(socket, timeout).hello()
