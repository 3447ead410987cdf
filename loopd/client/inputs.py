"""What goes along with a request as an fd: the image, a directory, what keeps the lease. And where nodes are.

Changes when a request takes another kind of file, or when directories and nodes are in other places. Opens
files and asks no daemon.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from contextlib import ExitStack, suppress
from typing import Literal, Union

from loopd.client import layers
from loopd.client.errors import Error

DIRECTORY = "/dev/loopd"
"""Where a directory of loopd's is bound into a container; the environment variable LOOPD_DIRECTORY says otherwise."""

StrPath = Union[str, "os.PathLike[str]"]
Lifetime = Union[Literal["device", "process", "container"], int]
"""What ends a lease, beside an explicit detach and the end of the container, which both always do.

``"device"``: `Device.close`, or the end of this process and of those that it forked. ``"process"``: the end
of this process. ``"container"``: the end of PID 1 of this PID namespace. A number: an open fd, a pidfd or a
connected SOCK_SEQPACKET socket; the lease ends when it becomes readable or hangs up. The caller keeps that fd.
"""


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


def opened_image(image: StrPath | int, read_only: bool, stack: ExitStack) -> int:
    """The image, open read-write if it may be written."""
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


def opened_directory(directory: StrPath | int, stack: ExitStack) -> tuple[int, str]:
    """The directory as fd and as absolute path."""
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


def opened_lease(lifetime: Lifetime, stack: ExitStack) -> int | None:
    """What keeps the lease, None where that is the socket of the reply."""
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


def directory_grant() -> str:
    """Where this container has its directory of loopd's, if it has one. `Error` where that is no absolute path."""
    path = os.environ.get("LOOPD_DIRECTORY") or DIRECTORY
    if not os.path.isabs(path):
        # Relative to the working directory it would be another directory in each program that inherits it.
        hint = f"give the directory of loopd's that is bound in, as {DIRECTORY}"
        raise Error(f"LOOPD_DIRECTORY={path} is no absolute path", hint)
    return path


def opened_grant(stack: ExitStack) -> tuple[int, str] | None:
    """This container's directory of loopd's as fd and path, None where it has none."""
    try:
        return opened_directory(directory_grant(), stack)
    except OSError:
        return None


def opened_places(device: StrPath, stack: ExitStack) -> tuple[int | None, int | None]:
    """This container's directory of loopd's, and the one that `device` is named in, if it is another; None where there
    is none, or where it is a devtmpfs, which is none of loopd's.
    """
    # /dev/loopN may be a link to the node in the container's directory: the drop-in losetup makes one.
    folder = os.path.dirname(os.fspath(device)) and os.path.dirname(os.path.realpath(device))
    found: list[int | None] = []
    for path in (directory_grant(), folder):
        dir_fd = None
        with suppress(OSError):
            dir_fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, dir_fd)
        found.append(None if dir_fd is None or layers.is_devtmpfs(dir_fd) else dir_fd)
    grant, named = found
    if grant is not None and named is not None and os.path.sameopenfile(grant, named):
        named = None
    return grant, named


def has_node(dir_fd: int, devname: str) -> bool:
    """Whether the node of a device is in a directory."""
    with suppress(OSError):
        return stat.S_ISBLK(os.stat(devname, dir_fd=dir_fd, follow_symlinks=False).st_mode)
    return False


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
