"""The device numbers that each grant owns: a symbolic link for each, beside the directories and on the same tmpfs.

The link is named by the inode of the grant's directory, and what it leads to is the numbers: it is there with all of
them or not at all, through any kill, and ends with the boot as the directory does. No client reaches the links.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable

from loopd.protocol import ranges

PLACE = ".numbers"
"""No grant's name begins with a dot."""


class Links:
    """The links on one tmpfs, of which `root` is an open fd."""

    def __init__(self, root: int) -> None:
        self._root = root

    def read(self, inode: int) -> tuple[int, ...] | None:
        """The numbers of a directory; None where none were written for it."""
        try:
            return ranges.numbers(os.readlink(f"{PLACE}/{inode}", dir_fd=self._root))
        except FileNotFoundError:
            return None

    def write(self, inode: int, numbers: Iterable[int]) -> tuple[int, ...]:
        """Give a directory its numbers: these, or those that another worker has written meanwhile."""
        with contextlib.suppress(FileExistsError):
            os.mkdir(PLACE, 0o700, dir_fd=self._root)
        with contextlib.suppress(FileExistsError):
            # Up to 127 bytes a tmpfs keeps in the inode, and longer ones take a page.
            os.symlink(ranges.text(numbers), f"{PLACE}/{inode}", dir_fd=self._root)
        return ranges.numbers(os.readlink(f"{PLACE}/{inode}", dir_fd=self._root))

    def remove(self, inode: int) -> None:
        """The directory is gone."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{PLACE}/{inode}", dir_fd=self._root)

    def inodes(self) -> set[int]:
        """Whose links there are."""
        try:
            place = os.open(PLACE, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._root)
        except FileNotFoundError:
            return set()
        try:
            return {int(name) for name in os.listdir(place)}
        finally:
            os.close(place)
