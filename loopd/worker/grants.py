"""Grants: directories of loopd's own that an administrator or user has bound into a container.

They lie on a tmpfs without nodev (run-loopd\\x2ddev.mount). An fd of such a directory is the grant: it says whose
leases are meant. The client can open the nodes in it, and nothing else. Only directories are made and removed here;
nodes are made in `nodes`. Each grant owns device numbers (`links`); a grant of an earlier loopd owns none.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
import struct
from collections.abc import Callable

from loopd.kernel import libc
from loopd.protocol.wire import DEVICES, Code, GrantInfo, Refusal
from loopd.worker import devices
from loopd.worker.files import identify
from loopd.worker.links import Links
from loopd.worker.nodes import READ, SEARCH, WRITE, access_list, listed, names

ROOT = "/run/loopd-dev"
MOST = 256
"""Directories of one uid."""
LISTED = 48
"""Grants in one reply: each takes up to a KiB of it."""
OWNER = stat.S_ISVTX
"""This mode bit, for which loopd's directories have no other use, says that the directory owns numbers. mkdir(2) sets
it, so a worker that is killed just after that leaves no directory that looks like one of an earlier loopd.
"""
START = "on the host, systemctl start 'run-loopd\\x2ddev.mount' and restart loopd"


class Grants:
    """The directory of the directories; without one there are no grants."""

    def __init__(self, root: str = ROOT, instance: str = "") -> None:
        self.root = root
        self._instance = instance
        self._fd: int | None = None
        with contextlib.suppress(OSError):
            self._fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            self._links = Links(self._fd)
            device = os.fstat(self._fd).st_dev
            self._dev = (os.major(device), os.minor(device))

    @property
    def fds(self) -> list[int]:
        """The fd that a worker needs to recognise a grant."""
        return [] if self._fd is None else [self._fd]

    def has(self, fd: int) -> bool:
        """Whether a client's fd may be a grant. Does not wait."""
        return self._fd is not None and identify(fd).dev == self._dev

    def recognise(self, fd: int) -> str:
        """The name of the grant that a client's fd leads to, of which `has` is true; empty for any other file there.

        Waits as long as somebody keeps the directory of directories locked: see `remove`.
        """
        assert self._fd is not None
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_PATH:
            # It took no permission on the directory itself to open it so.
            raise Refusal(Code.BAD_FD, "dir_fd: opened with O_PATH, which is no grant")
        inode = identify(fd).inode
        with listed(self._fd) as root, os.scandir(root) as entries:
            found = next((entry.name for entry in entries if entry.inode() == inode), "")
        return "" if found.startswith(".") else found

    def numbers(self, name: str) -> tuple[int, ...]:
        """The device numbers that a grant owns; a grant of an earlier loopd owns none."""
        status = os.stat(name, dir_fd=self._fd, follow_symlinks=False)
        if not status.st_mode & OWNER:
            return ()
        numbers = self._links.read(status.st_ino)
        if numbers is None:
            raise Refusal(Code.NO_DEVICE, "dir_fd: not made to its end; on the host, make it with loopctl once more")
        return numbers

    def make_for(self, devname: str) -> tuple[str, int]:
        """A directory for the nodes of one device, to be handed over as a mount: its name, and loopd's own fd of it.

        It lies in a directory of its own that no client ever sees. A client can keep a directory locked that it may
        read, and rmdir(2) waits for that with the parent locked.
        """
        if self._fd is None:
            raise Refusal(Code.UNSUPPORTED, f"deliver: there is nothing to mount without {self.root}: {START}")
        key = self._key_for(devname)
        with contextlib.suppress(FileExistsError):  # a worker that removed both was killed between the two
            os.mkdir(os.path.dirname(key), 0o700, dir_fd=self._fd)
        try:
            os.mkdir(key, 0o700, dir_fd=self._fd)
        except FileExistsError as error:
            raise Refusal(Code.BUSY, f"deliver: the last mount of {devname} is not removed yet") from error
        return key, self.open(key)

    def _key_for(self, devname: str) -> str:
        return f".{self._instance}:{devname}/:{devname}"  # by whose end the client knows the mount in its mountinfo

    def admit(self, key: str, uid: int) -> None:
        """Let `uid` look into the directory."""
        path = f"/proc/self/fd/{self._fd}/{key}"
        os.setxattr(path, "system.posix_acl_access", access_list(uid, READ | WRITE | SEARCH, READ | SEARCH))

    def unmake(self, key: str) -> None:
        """Remove a directory of `make_for`; one with a node in it stays.

        A directory of an earlier loopd that lies beside all grants stays too: its client can keep it locked, and
        rmdir(2) would wait with the directory of all grants locked.
        """
        outer = os.path.dirname(key)
        with contextlib.suppress(OSError):
            if outer:
                with contextlib.suppress(FileNotFoundError):  # a worker that removed both was killed between the two
                    os.rmdir(key, dir_fd=self._fd)
                if not os.stat(outer, dir_fd=self._fd).st_mode & 0o077:
                    os.rmdir(outer, dir_fd=self._fd)

    def sweep(self, before: float, bound: Callable[[str], bool]) -> None:
        """Remove what was left `before` that time of devices that are not `bound` now: the directories that were made
        for them, and their nodes in the other directories.
        """
        prefix = f".{self._instance}:"
        for outer in [] if self._fd is None else names(self._fd):
            with contextlib.suppress(OSError):
                if outer.startswith(prefix):
                    devname = outer.removeprefix(prefix)
                    left = devname[4:].isdecimal() and os.stat(outer, dir_fd=self._fd).st_ctime < before
                    if left and not bound(devname):
                        with contextlib.suppress(FileNotFoundError):  # a worker was killed between the two removals
                            self._empty(self._key_for(devname), before, bound)
                        self.unmake(self._key_for(devname))
                elif not outer.startswith("."):
                    self._empty(outer, before, bound)

    def _empty(self, key: str, before: float, bound: Callable[[str], bool]) -> None:
        directory = self.open(key)
        try:
            for name in names(directory):
                disk = re.fullmatch(r"(loop\d+)(p\d+)?", name)
                status = os.stat(name, dir_fd=directory, follow_symlinks=False)
                if disk and stat.S_ISBLK(status.st_mode) and status.st_ctime < before and not bound(disk[1]):
                    os.unlink(name, dir_fd=directory)
        finally:
            os.close(directory)

    def open(self, key: str) -> int:
        """loopd's own fd of a grant, which can be written through whatever the client's mount of it allows."""
        return os.open(key, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._fd)

    # For workers: a grant's owner can keep its directory locked for as long as it likes (getdents64 into memory that
    # never comes).

    def create(
        self, uid: int, name: str, count: int | None, reserve: Callable[[int], tuple[int, ...]]
    ) -> tuple[str, tuple[int, ...]]:
        """Make the directory `name` of `uid`, if it is not there; its path and device numbers. `reserve` gives so many
        numbers that nobody has had, or raises Refusal.
        """
        if self._fd is None:
            raise Refusal(Code.UNSUPPORTED, f"{self.root} is not there: {START}")
        key = _key(uid, name)
        there = names(self._fd)
        if key not in there and sum(entry.startswith(f"{uid}-") for entry in there) >= MOST:
            raise Refusal(Code.QUOTA, f"uid {uid} has {MOST} directories; remove some")
        with contextlib.suppress(FileExistsError):
            os.mkdir(key, 0o700 | OWNER, dir_fd=self._fd)
        try:
            self.admit(key, uid)
            return os.path.join(self.root, key), self._own(key, name, count, reserve)
        except PermissionError as error:
            # Docker makes what it is to bind and does not find; loopd could put no node there.
            reason = f"directory {name}: somebody else has made it; remove it with --remove, and ask again"
            raise Refusal(Code.EXISTS, reason) from error
        except Refusal:
            with contextlib.suppress(OSError):
                status = os.stat(key, dir_fd=self._fd, follow_symlinks=False)
                if status.st_mode & OWNER and self._links.read(status.st_ino) is None:
                    os.rmdir(key, dir_fd=self._fd)
            raise

    def _own(
        self, key: str, name: str, count: int | None, reserve: Callable[[int], tuple[int, ...]]
    ) -> tuple[int, ...]:
        """The numbers of a directory that is there; they are reserved where it has none yet."""
        status = os.stat(key, dir_fd=self._fd, follow_symlinks=False)
        numbers: tuple[int, ...] | None = ()
        if status.st_mode & OWNER:
            numbers = self._links.read(status.st_ino)
            if numbers is None:
                numbers = self._links.write(status.st_ino, reserve(count or DEVICES))
        assert numbers is not None
        if count not in (None, len(numbers)):
            has = f"has {len(numbers) or 'no'} device numbers of its own"
            raise Refusal(Code.EXISTS, f"directory {name} {has}: to change that, remove it with --remove first")
        return numbers

    def remove(self, uid: int, name: str) -> tuple[str, tuple[int, ...]]:
        """Remove a directory that holds no device; its path, and the numbers that it owned."""
        if self._fd is None:
            raise Refusal(Code.NOT_FOUND, "there are no directories")
        key = _key(uid, name)
        try:
            inode = os.stat(key, dir_fd=self._fd, follow_symlinks=False).st_ino
            os.rmdir(key, dir_fd=self._fd)
        except OSError as error:
            if error.errno == errno.ENOTEMPTY:
                raise Refusal(Code.BUSY, f"directory {name}: there are devices in it; detach them first") from error
            raise Refusal(Code.NOT_FOUND, f"directory {name}: {error.strerror}") from error
        numbers = self._links.read(inode) or ()
        self._links.remove(inode)
        return os.path.join(self.root, key), numbers

    # Looking at all of them -------------------------------------------------------------------------------------------

    def rows(self, uid: int | None, after: str) -> tuple[tuple[GrantInfo, ...], bool]:
        """The grants of `uid`, for None all, in the order of their names in the tmpfs: `LISTED` of those behind
        `after`, and whether there are more.
        """
        found = [re.fullmatch(r"(\d+)-(.+)", key) for key in ([] if self._fd is None else sorted(names(self._fd)))]
        mine = [match for match in found if match and match[0] > after and uid in (None, int(match[1]))]
        rows = []
        for match in mine[:LISTED]:
            with contextlib.suppress(FileNotFoundError):  # it was removed meanwhile
                inode = os.stat(match[0], dir_fd=self._fd, follow_symlinks=False).st_ino
                numbers = self._links.read(inode) or ()
                used = sum(devices.size(f"loop{number}") is not None for number in numbers)
                path = os.path.join(self.root, match[0])
                rows.append(GrantInfo(match[2], int(match[1]), path, numbers, used))
        return tuple(rows), len(mine) > LISTED

    def owned(self) -> set[int]:
        """The numbers that grants own. What is left of grants that are gone is removed."""
        if self._fd is None:
            return set()
        # In this order: a directory is there before its link, so that a link whose directory is not there is left over.
        inodes = self._links.inodes()
        with listed(self._fd) as root, os.scandir(root) as entries:
            there = {entry.inode() for entry in entries}
        for inode in inodes - there:
            self._links.remove(inode)
        return {number for inode in inodes & there for number in self._links.read(inode) or ()}


SYS_OPEN_TREE = 428  # the same on every architecture; Linux 5.2
SYS_MOUNT_SETATTR = 442  # likewise; Linux 5.12
OPEN_TREE_CLONE = 1
MOUNT_ATTR_RDONLY = 0x1
_READ_ONLY = struct.pack("=QQQQ", MOUNT_ATTR_RDONLY, 0, 0, 0)  # struct mount_attr: set, clear, propagation, namespace
AT_EMPTY_PATH = 0x1000


def detached_mount(directory: int) -> int:
    """A mount of the directory that is attached nowhere yet: a client with CAP_SYS_ADMIN in its own user namespace can
    attach it there (move_mount(2)). Needs CAP_SYS_ADMIN, and a tmpfs that is attached in this mount namespace. The
    mount is read-only, because root of a container may be the host's (mount_setattr(2), Linux 5.12; before that it is
    not).
    """
    try:
        fd = libc.call("syscall", SYS_OPEN_TREE, directory, b"", OPEN_TREE_CLONE | os.O_CLOEXEC | AT_EMPTY_PATH)
    except OSError as error:
        why = os.strerror(error.errno or 0)
        raise Refusal(Code.UNDELIVERABLE, f"deliver: the directory cannot be made a mount: {why}") from error
    try:
        libc.call("syscall", SYS_MOUNT_SETATTR, fd, b"", AT_EMPTY_PATH, _READ_ONLY, len(_READ_ONLY))
    except OSError as error:
        if error.errno != errno.ENOSYS:
            os.close(fd)
            why = os.strerror(error.errno or 0)
            raise Refusal(Code.UNDELIVERABLE, f"deliver: the mount cannot be made read-only: {why}") from error
    return fd


def _key(uid: int, name: str) -> str:
    return f"{uid}-{name}"
