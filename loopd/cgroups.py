"""Cgroups: when an account's cgroup has no process left, every lease of it is over.

This is what ends a lease whose own keeper never does: a pidfd of the host's PID 1 from a container with the host's pid
namespace, a socket end that was hidden somewhere. Looks at the host's cgroup file system only.

Of its own cgroup the daemon wants to know how near the limit of processes is.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable

from .inotify import IN_MODIFY, OVERFLOW, Inotify

ROOTS = ("/sys/fs/cgroup", "/sys/fs/cgroup/unified")
"""Where cgroup v2 is mounted, alone or beside the first version."""


def _events_file(account: str) -> str | None:
    """The file that tells the account's end; None for the root cgroup, and on a host without the second version."""
    if not account.startswith("/") or account == "/":
        return None
    roots = [root for root in ROOTS if os.path.exists(f"{root}/cgroup.controllers")]
    return f"{roots[0]}{account}/cgroup.events" if roots else None


def _population(path: str) -> int:
    """The inode number of the file while its cgroup has processes, else 0. One that is made anew has another."""
    try:
        with open(path, "rb", buffering=0) as file:
            return os.fstat(file.fileno()).st_ino if b"populated 1" in file.readall() else 0
    except OSError:  # removed
        return 0


def crowding() -> float:
    """How many of the processes that it may have are in this one's cgroup, 0 to 1; 0 where there is no limit."""
    with contextlib.suppress(OSError, ValueError):
        for line in filter(None, _read("/proc/self/cgroup").split("\n")):
            _, controllers, path = line.split(":", 2)
            for root in ("/sys/fs/cgroup/pids",) if controllers == "pids" else () if controllers else ROOTS:
                with contextlib.suppress(FileNotFoundError):
                    most = _read(f"{root}{path}/pids.max")
                    return 0.0 if most == "max\n" else int(_read(f"{root}{path}/pids.current")) / int(most)
    return 0.0


def _read(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read()


class Watcher:
    """Calls `ended` with an account when its cgroup has become empty or was removed."""

    def __init__(self, ended: Callable[[str], None]) -> None:
        self._inotify = Inotify()
        self._ended = ended
        self._files: dict[int, tuple[str, str, int]] = {}
        self._watches: dict[str, int] = {}

    @property
    def fd(self) -> int:
        """To be polled for reading; then `receive`."""
        return self._inotify.fd

    def watch(self, account: str) -> None:
        """Watch an account until it ends; one that has ended already is told at once.

        OSError where there can be no more watches: ENOSPC (fs.inotify.max_user_watches) and ENOMEM.
        """
        if account in self._watches:
            return
        path = _events_file(account)
        if path is None:
            return
        try:
            watch = self._inotify.add(path, IN_MODIFY)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.ENOMEM):
                raise
            self._end(account)  # removed
            return
        population = _population(path)
        self._files[watch] = (account, path, population)
        self._watches[account] = watch
        if not population:
            self._end(account)

    def receive(self) -> None:
        """Look at what changed."""
        watches = {watch for watch, _ in self._inotify.events()}
        if OVERFLOW in watches:
            watches = set(self._files)
        for watch in watches & set(self._files):
            account, path, population = self._files[watch]
            if _population(path) != population:
                self._end(account)

    def _end(self, account: str) -> None:
        watch = self._watches.pop(account, None)
        if watch is not None:
            del self._files[watch]
            self._inotify.remove(watch)
        self._ended(account)
