"""Files: tell what a client's fd is, on which file system it lies, and whether it may be used, without asking that file
system.

A file of a FUSE file system whose server never answers blocks fstat, statfs and most else; `statx` with
AT_STATX_DONT_SYNC and the mount table do not. Only when the file system is one that answers is the file itself asked.
Nothing here changes anything.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import os
import stat
import struct
from typing import NamedTuple

from .wire import Attach, Code, Refusal

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
STATX_TYPE, STATX_INO, STATX_MNT_ID = 0x1, 0x100, 0x1000  # STATX_MNT_ID: Linux 5.8
_STATX = struct.Struct("=28xH2xQ88xIIIIQ104x")  # mode, ino, rdev, dev, mount id of struct statx
F_GET_SEALS = 1034

_libc = ctypes.CDLL(None, use_errno=True)


class Identity(NamedTuple):
    """What can be known of an fd without asking its file system."""

    mode: int
    inode: int
    dev: tuple[int, int]
    mount: int


class FileSystem(NamedTuple):
    """The type of a file system, and its device number as the mount table has it."""

    type: str
    dev: bytes


def identify(fd: int) -> Identity:
    """Type, inode number, device and mount id of `fd`. Does not block on a file system that never answers."""
    buffer = ctypes.create_string_buffer(_STATX.size)
    mask = STATX_TYPE | STATX_INO | STATX_MNT_ID
    if _libc.statx(fd, b"", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, mask, buffer) < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    mode, inode, _, _, major, minor, mount = _STATX.unpack(buffer.raw)
    return Identity(mode, inode, (major, minor), mount)


def _read(path: str) -> bytes:
    try:
        with open(path, "rb", buffering=0) as table:
            return table.readall()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESRCH, errno.EACCES, errno.EINVAL):  # the client is gone, or hidden
            return b""
        raise


class Mounts:
    """The mount tables that matter for one client, each read when it is first needed."""

    def __init__(self, pid: int) -> None:
        self._pid = pid

    @functools.cached_property
    def _theirs(self) -> bytes:
        return b"\n" + _read(f"/proc/{self._pid}/mountinfo")

    @functools.cached_property
    def _ours(self) -> bytes:
        return b"\n" + _read("/proc/self/mountinfo")

    def find(self, identity: Identity) -> FileSystem | None:
        """The file system of a file that the client holds; None when the mount is in neither mount table."""
        return self._look(identity, self._theirs) or self._look(identity, self._ours)

    def _look(self, identity: Identity, table: bytes) -> FileSystem | None:
        start = table.find(b"\n%d " % identity.mount) + 1
        if start == 0:
            return None
        line = table[start : table.find(b"\n", start)]
        kind, _, _ = line.partition(b" - ")[2].split(b" ", 2)
        return FileSystem(kind.decode(), line.split(b" ", 3)[2])

    def on_host(self, found: FileSystem) -> bool:
        """Whether the host has mounted that file system too: then no user made it in a namespace of his own."""
        return any(line.split(b" ", 3)[2:3] == [found.dev] for line in self._ours.splitlines())


def on_host(pid: int) -> bool:
    """Whether process `pid` sees the host's file systems as the host does: its root is the mount that PID 1 has there.

    A mount id belongs to one mount in one namespace, so that no container has the same, whatever its uids are called.
    Nor is it in a user namespace, where it might choose among uids.
    """
    theirs, first = (_root_mount(_read(f"/proc/{process}/mountinfo")) for process in (pid, 1))
    maps = (_read(f"/proc/{process}/uid_map") for process in (pid, 1))
    return theirs is not None and theirs == first and len(set(maps)) == 1


def _root_mount(table: bytes) -> bytes | None:
    lines = (line.split(b" ", 5) for line in table.splitlines())
    # A later mount on the same place covers an earlier one.
    return next((line[0] for line in reversed(list(lines)) if line[4] == b"/"), None)


def _is_shmem(fd: int) -> bool:
    """Whether `fd` is a memfd or a file on tmpfs: only those have seals, and asking does not reach the file system."""
    try:
        fcntl.fcntl(fd, F_GET_SEALS)
    except OSError:  # EINVAL
        return False
    return True


def _check_file_system(identity: Identity, what: str, mounts: Mounts, allowed: frozenset[str]) -> None:
    found = mounts.find(identity)
    if found is None:
        raise Refusal(
            Code.NOT_PERMITTED,
            f"{what}: its mount is neither in the client's mount table nor in the host's, so it is not trusted",
        )
    if found.type in NEVER or found.type not in allowed:
        raise Refusal(Code.NOT_PERMITTED, f"{what}: {found.type} is not among the allowed file systems (loopd.toml)")
    if found.type == "overlay" and not mounts.on_host(found):
        # An overlay that a user made in a namespace of his own may have a layer on FUSE that stops answering.
        raise Refusal(
            Code.NOT_PERMITTED,
            f"{what}: an overlay of a user namespace's making; use a bind-mounted directory of the host",
        )


_TYPES = {stat.S_IFDIR: "a directory", stat.S_IFBLK: "a block device", stat.S_IFCHR: "a character device"}
_TYPES |= {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFLNK: "a symbolic link"}


class Backing(NamedTuple):
    """A backing file that passed; `dev` and `inode` identify it, `path` is where the client had it."""

    read_only: bool
    size: int
    dev: str
    inode: int
    path: str


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
    if stat.S_ISBLK(identity.mode) and block_devices:
        size = os.lseek(fd, 0, os.SEEK_END)  # the driver is asked, not the file system that the node is on
    elif not stat.S_ISREG(identity.mode):
        kind = _TYPES.get(stat.S_IFMT(identity.mode), "no regular file")
        raise Refusal(Code.BAD_FD, f"fd: {kind}; a backing file is a regular file")
    else:
        if not _is_shmem(fd):
            _check_file_system(identity, "fd", mounts, allowed)
        size = os.fstat(fd).st_size
    if request.offset >= size:
        raise Refusal(Code.INVALID, f"offset: {request.offset} is at or past the end of the file ({size} bytes)")
    window = min(size - request.offset, request.sizelimit or size)
    if window < request.sector_size:
        raise Refusal(Code.INVALID, f"fd: {window} bytes are less than one sector of {request.sector_size}")
    path = os.readlink(f"/proc/self/fd/{fd}")
    read_only = request.read_only or flags & os.O_ACCMODE == os.O_RDONLY
    return Backing(read_only, size, f"{identity.dev[0]}:{identity.dev[1]}", identity.inode, path)


def check_directory(fd: int, mounts: Mounts, allowed: frozenset[str]) -> None:
    """Refuse what is no directory, or a directory of a file system that may not answer."""
    identity = identify(fd)
    if not stat.S_ISDIR(identity.mode):
        raise Refusal(Code.BAD_FD, "dir_fd: not a directory")
    _check_file_system(identity, "dir_fd", mounts, allowed)
