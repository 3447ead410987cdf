"""Grants: directories of loopd's own that an administrator or user has bound into a container.

They lie on a tmpfs without nodev (run-loopd\\x2ddev.mount). An fd to one is the grant: it says whose leases are meant,
and the nodes made in it are out of the client's reach but for opening them. Only directories are made and removed here;
nodes are `nodes`'s.
"""

from __future__ import annotations

import contextlib
import errno
import os

from .files import Identity
from .nodes import READ, SEARCH, WRITE, access_list
from .wire import Code, Refusal

ROOT = "/run/loopd-dev"
MOST = 256
"""Directories of one uid."""


class Grants:
    """The directory of the directories; without one there are no grants."""

    def __init__(self, root: str = ROOT) -> None:
        self.root = root
        self._fd: int | None = None
        with contextlib.suppress(OSError):
            self._fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            device = os.fstat(self._fd).st_dev
            self._dev = (os.major(device), os.minor(device))

    @property
    def fds(self) -> list[int]:
        """The fd that a helper needs to recognise a grant."""
        return [] if self._fd is None else [self._fd]

    def recognise(self, identity: Identity) -> str:
        """The name of the grant that a client's fd leads to, by device and inode; empty for any other file."""
        if self._fd is None or identity.dev != self._dev:
            return ""
        with os.scandir(self._fd) as entries:
            return next((entry.name for entry in entries if entry.inode() == identity.inode), "")

    def open(self, key: str) -> int:
        """loopd's own fd of a grant, which can be written through whatever the client's mount of it allows."""
        return os.open(key, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._fd)

    def create(self, uid: int, name: str) -> str:
        """Make the directory `name` of `uid`, if it is not there; its path."""
        if self._fd is None:
            raise Refusal(Code.UNSUPPORTED, f"{self.root} is not there: start run-loopd\\x2ddev.mount")
        key = _key(uid, name)
        if sum(entry.startswith(f"{uid}-") for entry in os.listdir(self._fd)) >= MOST:
            raise Refusal(Code.QUOTA, f"uid {uid} has {MOST} directories; remove some")
        with contextlib.suppress(FileExistsError):
            os.mkdir(key, 0o700, dir_fd=self._fd)
        path = os.path.join(self.root, key)
        os.setxattr(path, "system.posix_acl_access", access_list(uid, READ | WRITE | SEARCH, READ | SEARCH))
        return path

    def remove(self, uid: int, name: str) -> str:
        """Remove a directory that holds no device; its path."""
        if self._fd is None:
            raise Refusal(Code.NOT_FOUND, "there are no directories")
        key = _key(uid, name)
        try:
            os.rmdir(key, dir_fd=self._fd)
        except OSError as error:
            if error.errno == errno.ENOTEMPTY:
                raise Refusal(Code.BUSY, f"directory {name}: there are devices in it; detach them first") from error
            raise Refusal(Code.NOT_FOUND, f"directory {name}: {error.strerror}") from error
        return os.path.join(self.root, key)


def _key(uid: int, name: str) -> str:
    return f"{uid}-{name}"
