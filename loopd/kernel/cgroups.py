"""Cgroups: when an account's cgroup has no process left, every lease of it is over.

This ends a lease whose keeper never does: a pidfd of the host's PID 1 from a container with the host's pid namespace,
or a socket end that was hidden somewhere. Looks at the host's cgroup file system only.

A process that may read a directory can keep it locked, and the look-up of a name in it then waits. So a worker opens
the file that tells of an account, and the main process reads that file and looks up no name.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from loopd.kernel.inotify import IN_MODIFY, OVERFLOW, Inotify

ROOTS = ("/sys/fs/cgroup", "/sys/fs/cgroup/unified")
"""Where cgroup v2 is mounted, alone or beside the first version."""


class Gone(Exception):
    """The account's cgroup is not there any more."""


def watchable(account: str) -> bool:
    """Whether the end of the account is told: not that of the root cgroup, nor of one of the first version."""
    return account.startswith("/") and account != "/"


def open_events(account: str) -> int | None:
    """The file that tells the account's end, the caller's to close; None where there is none, as on a host without the
    second version. `Gone` when the account has ended, OSError where there is no room for a file.

    For a worker: the look-up may take long.
    """
    if not watchable(account):
        return None
    for root in ROOTS:
        if os.path.exists(f"{root}/cgroup.controllers"):
            try:
                return os.open(f"{root}{account}/cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                if error.errno in _NO_ROOM:
                    raise
                raise Gone from error  # ENOENT; ENODEV between look-up and open
    return None


_NO_ROOM = (errno.ENOMEM, errno.EMFILE, errno.ENFILE)


def _populated(events: int) -> bool:
    """Whether the cgroup, which may have been removed, has processes."""
    try:
        return b"populated 1" in os.pread(events, 4096, 0)
    except OSError:  # ENODEV: removed
        return False


class Watcher:
    """Calls `ended` with an account when its cgroup has become empty or was removed."""

    def __init__(self, ended: Callable[[str], None]) -> None:
        self._inotify = Inotify()
        self._ended = ended
        self._accounts: dict[int, str] = {}
        self._watches: dict[str, tuple[int, int]] = {}

    @property
    def fd(self) -> int:
        """To be polled for reading; then `receive`."""
        return self._inotify.fd

    @property
    def files(self) -> int:
        """Files that are open: one for each account."""
        return len(self._watches)

    def watches(self, account: str) -> bool:
        """Whether the end of the account will be told."""
        return account in self._watches

    def watch(self, account: str, events: int) -> None:
        """Watch an account until it ends; `ended` is called at once where it has. Takes over what `open_events` gave.

        OSError where there can be no more watches: ENOSPC (fs.inotify.max_user_watches) and ENOMEM.
        """
        if account in self._watches:
            os.close(events)
            # The new file may be of another cgroup that has the name now, and the end of the first be told later.
            if not _populated(self._watches[account][1]):
                self._end(account)
            return
        try:
            watch = self._inotify.add(f"/proc/self/fd/{events}", IN_MODIFY)
        except OSError:
            os.close(events)
            raise
        self._accounts[watch] = account
        self._watches[account] = (watch, events)
        if not _populated(events):
            self._end(account)

    def receive(self) -> None:
        """Look at what changed."""
        watches = {watch for watch, _ in self._inotify.events()}
        if OVERFLOW in watches:
            watches = set(self._accounts)
        for watch in watches & set(self._accounts):
            account = self._accounts[watch]
            if not _populated(self._watches[account][1]):
                self._end(account)

    def _end(self, account: str) -> None:
        watch, events = self._watches.pop(account)
        del self._accounts[watch]
        self._inotify.remove(watch)
        os.close(events)
        self._ended(account)
