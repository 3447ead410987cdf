"""Files: tell what a client's fd is, on which file system it lies, and whether it may be used, without asking that file
system.

A file of a FUSE file system whose server never answers blocks fstat, statfs and most else; `statx` with
AT_STATX_DONT_SYNC and the mount table do not. The file itself is asked only when its file system answers.
Nothing here changes anything.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import os
import stat
import struct
from collections.abc import Iterator
from typing import NamedTuple

from loopd.kernel import libc, proc
from loopd.protocol.wire import Attach, Code, Refusal

ANSWERING = frozenset(
    ("ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "bcachefs", "zfs", "tmpfs", "ramfs", "overlay", "vfat", "devtmpfs")
)
"""File systems whose answers depend on the host alone: no user and no network peer can stop one from answering."""

NEVER = frozenset(
    "proc sysfs cgroup cgroup2 debugfs tracefs securityfs configfs efivarfs pstore bpf binfmt_misc mqueue autofs devpts"
    " selinuxfs smackfs fusectl nsfs pidfs rpc_pipefs".split()
)
"""File systems whose files are not data: a kernel thread with root's rights would write them."""

AT_EMPTY_PATH = 0x1000
AT_STATX_DONT_SYNC = 0x4000
STATX_TYPE, STATX_INO, STATX_MNT_ID, STATX_MNT_ID_UNIQUE = 0x1, 0x100, 0x1000, 0x4000  # Linux 5.8; the last 6.8
_STATX = struct.Struct("=I24xH2xQ88xIIIIQ104x")  # mask, mode, ino, rdev, dev, mount id of struct statx
F_GET_SEALS = 1034


class Identity(NamedTuple):
    """What the kernel tells of an fd without asking its file system. `mount` is an id that no other mount ever gets;
    None before Linux 6.8.
    """

    mode: int
    inode: int
    dev: tuple[int, int]
    mount: int | None


class FileSystem(NamedTuple):
    """The type of a mount's file system, and whether it is of the host's making. An overlay is where the host has
    mounted it too: a user could have made it in a namespace of its own. `on_host`: the mount itself is the host's, so
    that the host has every path on it.
    """

    type: str
    hosts: bool
    on_host: bool


def _statx(fd: int, mask: int) -> tuple[int, ...]:
    buffer = ctypes.create_string_buffer(_STATX.size)
    libc.call("statx", fd, b"", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, mask, buffer)
    return _STATX.unpack(buffer.raw)


def identify(fd: int) -> Identity:
    """Type, inode number, device and mount of `fd`. Does not block on a file system that never answers."""
    mask, mode, inode, _, _, major, minor, mount = _statx(fd, STATX_TYPE | STATX_INO | STATX_MNT_ID_UNIQUE)
    return Identity(mode, inode, (major, minor), mount if mask & STATX_MNT_ID_UNIQUE else None)


def _mount_id(fd: int) -> int:
    """The id by which the mount tables call the file's mount, for as long as that is there."""
    return _statx(fd, STATX_MNT_ID)[-1]


GONE = (errno.ENOENT, errno.ESRCH, errno.EACCES, errno.EINVAL)
"""What procfs says of a process that has ended, or is hidden."""


def _read(path: str, most: int = proc.MOST) -> bytes:
    try:
        return proc.read(path, most)
    except OSError as error:
        if error.errno in GONE:
            return b""
        raise


def _table(process: int | str) -> Iterator[bytes]:
    """The mount table of a process, a line at a time; a refusal where that takes the kernel too long."""
    try:
        yield from proc.lines(f"/proc/{process}/mountinfo")
    except OSError as error:
        if error.errno not in GONE:
            raise
    except proc.TooLong as error:
        raise Refusal(
            Code.NOT_PERMITTED,
            "there are too many mounts: reading the mount table, to tell what the file is on, was given up after"
            f" {proc.PATIENCE:g} s",
        ) from error


_seen: dict[int, FileSystem] = {}
"""The file systems of mounts, by their unique ids. Nothing else is kept from one job to the next: this cannot change,
and the kernel takes a tenth of a millisecond to make up a mount table."""
_MOST_SEEN = 1024


class Mounts:
    """The mount tables that matter for one client: its own, the service's, and the host's.

    The service has a namespace of its own, which later mounts need not reach: podman has its containers' overlays below
    a private mount. So PID 1's table is read too.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid

    @functools.cached_property
    def on_host(self) -> bool:
        """Whether the client sees the host's file systems as the host does: `on_host`."""
        return on_host(self._pid)

    def find(self, fd: int, identity: Identity) -> FileSystem | None:
        """The file system of a file that the client holds; None when the mount is in neither mount table. A refusal
        where the client's table is too long.
        """
        found = None if identity.mount is None else _seen.get(identity.mount)
        # From a chroot even a mount of the host's looks like a container's.
        if found is None or (self.on_host and not found.on_host):
            mount = b"%d " % _mount_id(fd)
            found = _look(mount, self._pid, self.on_host) or _look(mount, "self", on_host("self"))
            # What the host has not mounted yet, it may mount later.
            if found is not None and found.hosts and identity.mount is not None:
                if len(_seen) >= _MOST_SEEN:
                    _seen.clear()
                _seen[identity.mount] = found
        return found


def _look(mount: bytes, process: int | str, is_on_host: bool) -> FileSystem | None:
    """What the mount table of a process says of the mount whose line begins so."""
    found = (_parsed(line, is_on_host) for line in _table(process) if line.startswith(mount))
    return next(found, None)


def _parsed(line: bytes, is_on_host: bool) -> FileSystem:
    kind, _, _ = line.partition(b" - ")[2].split(b" ", 2)
    # A user who mounts FUSE chooses what follows "fuse.", down to the byte.
    name = kind.decode(errors="backslashreplace")
    return FileSystem(name, kind != b"overlay" or _is_hosts(line.split(b" ", 3)[2]), is_on_host)


def _is_hosts(dev: bytes) -> bool:
    """Whether PID 1 or the service sees a file system of that device mounted."""
    return any(line.split(b" ", 3)[2:3] == [dev] for process in (1, "self") for line in _table(process))


def on_host(pid: int | str) -> bool:
    """Whether process `pid` sees the host's file systems as the host does: the same as PID 1, and at the same places.

    A mount id belongs to one mount in one namespace, so that no container has the same, and the place is as seen from
    the process's root, outside of which nothing is listed. So the first line of the table tells. The process is in no
    user namespace either, where it might choose among uids.
    """
    theirs, first = (_read(f"/proc/{process}/mountinfo", 256).partition(b"\n")[0] for process in (pid, 1))
    return bool(theirs) and theirs == first and _read(f"/proc/{pid}/uid_map") == _read("/proc/1/uid_map")


def _is_shmem(fd: int) -> bool:
    """Whether `fd` is a memfd or a file on tmpfs: only those have seals, and asking does not reach the file system."""
    try:
        fcntl.fcntl(fd, F_GET_SEALS)
    except OSError:  # EINVAL
        return False
    return True


def _check_file_system(fd: int, identity: Identity, what: str, mounts: Mounts, allowed: frozenset[str]) -> FileSystem:
    found = mounts.find(fd, identity)
    if found is None:
        raise Refusal(
            Code.NOT_PERMITTED,
            f"{what}: its mount is neither in the client's mount table nor in the host's, so it is not trusted",
        )
    if found.type in NEVER or found.type not in allowed:
        raise Refusal(Code.NOT_PERMITTED, f"{what}: {found.type} is not among the allowed file systems (loopd.toml)")
    if not found.hosts:
        # An overlay that a user made in a namespace of its own may have a layer on FUSE that stops answering.
        raise Refusal(
            Code.NOT_PERMITTED,
            f"{what}: an overlay that the host itself has not mounted; use a bind-mounted directory of the host",
        )
    return found


_TYPES = {stat.S_IFDIR: "a directory", stat.S_IFBLK: "a block device", stat.S_IFCHR: "a character device"}
_TYPES |= {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFLNK: "a symbolic link"}


class Backing(NamedTuple):
    """A backing file that was vetted. `dev` and `inode` identify it; `path` is where it is in the mount namespace that
    `view` names, the host's or the client's. `quiet`: to close it while it is open elsewhere asks no server that may
    not answer, as FUSE does.
    """

    read_only: bool
    size: int
    dev: str
    inode: int
    path: str
    view: str
    quiet: bool


HOST, CLIENT = "host", "client"
"""Whose view of the file system a path is."""


def _view(fd: int, path: str, identity: Identity, mounts: Mounts) -> str:
    """Whose the path is of a file whose file system was not looked for."""
    if path.startswith("/memfd:"):  # on no mount that is in a table
        return CLIENT
    found = None
    with contextlib.suppress(Refusal):  # there are too many mounts: that it is the host's cannot be told
        found = mounts.find(fd, identity)
    return HOST if found is not None and found.on_host else CLIENT


def _path(fd: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError as error:  # ENAMETOOLONG: more than 4096 bytes
        raise Refusal(Code.BAD_FD, f"fd: the path of the file cannot be told: {error.strerror}") from error


def check_backing(
    fd: int, request: Attach, mounts: Mounts, allowed: frozenset[str], *, block_devices: bool = False
) -> Backing:
    """Refuse a backing file that may not become a device; the checks are in the order of what can be asked safely."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    if flags & os.O_PATH:
        raise Refusal(Code.BAD_FD, "fd: opened with O_PATH")
    if flags & os.O_ACCMODE == os.O_WRONLY:
        # LOOP_CONFIGURE takes it, and the device then reads what the client may not.
        raise Refusal(Code.BAD_FD, "fd: opened write-only; open it for reading and writing")
    if flags & os.O_APPEND:
        raise Refusal(Code.BAD_FD, "fd: opened with O_APPEND, which a loop device would ignore")
    identity = identify(fd)
    quiet, path, view = True, _path(fd), ""
    if stat.S_ISBLK(identity.mode) and block_devices:
        size = os.lseek(fd, 0, os.SEEK_END)  # the driver is asked, not the file system that the node is on
    elif not stat.S_ISREG(identity.mode):
        kind = _TYPES.get(stat.S_IFMT(identity.mode), "no regular file")
        raise Refusal(Code.BAD_FD, f"fd: {kind}; a backing file is a regular file")
    else:
        # A memfd is on a mount that is in no table, and always allowed.
        if not _is_shmem(fd) or ("tmpfs" not in allowed and mounts.find(fd, identity) is not None):
            found = _check_file_system(fd, identity, "fd", mounts, allowed)
            quiet, view = found.type in ANSWERING, HOST if found.on_host else CLIENT
        size = os.fstat(fd).st_size
    if size == 0:
        raise Refusal(Code.INVALID, "fd: the file is empty: give it a size first, as truncate(1) does")
    if request.offset >= size:
        raise Refusal(Code.INVALID, f"offset: {request.offset} is at or past the end of the file ({size} bytes)")
    window = min(size - request.offset, request.sizelimit or size)
    if window < request.sector_size:
        raise Refusal(Code.INVALID, f"fd: {window} bytes are less than one sector of {request.sector_size}")
    read_only = request.read_only or flags & os.O_ACCMODE == os.O_RDONLY
    view = view or _view(fd, path, identity, mounts)
    return Backing(read_only, size, f"{identity.dev[0]}:{identity.dev[1]}", identity.inode, path, view, quiet)


def check_directory(fd: int, mounts: Mounts, allowed: frozenset[str]) -> None:
    """Refuse what is no directory, or a directory of a file system that may not answer."""
    identity = identify(fd)
    if not stat.S_ISDIR(identity.mode):
        raise Refusal(Code.BAD_FD, "dir_fd: not a directory")
    _check_file_system(fd, identity, "dir_fd", mounts, allowed)
