"""Cgroups of the second version: which one has a name now, and the end of one.

A cgroup is known by its id, the inode of its cgroup.events, which does not come again; its name may. When it has no
process left, every lease of its account is over. This ends a lease whose keeper never does: a pidfd of the host's PID 1
from a container with the host's pid namespace, or a socket end that was hidden somewhere. Looks at the host's cgroup
file system only.

A process that may read a directory can keep it locked, and the look-up of a name in it then waits. So a worker opens
cgroup.events, and the main process reads that file and looks up no name.
"""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Callable
from typing import NamedTuple

from loopd.kernel import proc
from loopd.kernel.inotify import IN_MODIFY, OVERFLOW, Inotify

ROOTS = ("/sys/fs/cgroup", "/sys/fs/cgroup/unified")
"""Where cgroup v2 is mounted, alone or beside the first version."""

_ID_OF_THE_ROOT = 1


class Gone(Exception):
    """The account's cgroup is not there any more."""


@functools.cache
def root() -> str | None:
    """Where the second version is mounted; None where loopd sees none."""
    return next((path for path in ROOTS if os.path.exists(f"{path}/cgroup.controllers")), None)


def paths(pid: int) -> dict[str, str]:
    """The cgroup of a process in each hierarchy; that of the second version is named "". OSError as `proc.read`."""
    # By newlines alone: no name has one, but a name may have another of the characters that splitlines() knows.
    lines = proc.read(f"/proc/{pid}/cgroup").decode(errors="surrogateescape").split("\n")
    return {line.split(":", 2)[1]: line.split(":", 2)[2] for line in lines if line.count(":") >= 2}


def identity(events: int) -> int:
    """The id of the cgroup that this cgroup.events is of."""
    return os.fstat(events).st_ino


def open_events(account: str, cgroup: int, pid: int) -> int | None:
    """The cgroup.events of the account's cgroup, the caller's to close; None where there is none: the root cgroup has
    no end, and one of the first version does not tell it. OSError where there is no room for a file.

    `Gone` unless it is the one with the id `cgroup`, or, where that is 0, the one that process `pid` is in. For a
    worker: the look-up may take long.
    """
    if root() is None or not account.startswith("/") or account == "/":
        return None
    try:
        events = os.open(f"{root()}{account}/cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise
        raise Gone from error  # ENOENT; ENODEV between look-up and open
    if identity(events) == cgroup or (cgroup == 0 and _has(account, events, pid)):
        return events
    os.close(events)
    raise Gone


_NO_ROOM = (errno.ENOMEM, errno.EMFILE, errno.ENFILE)


def _has(account: str, events: int, pid: int) -> bool:
    try:
        inside = f"{paths(pid).get('', '')}/".startswith(f"{account}/")
    except OSError:  # the process has ended
        return False
    return inside and _populated(events)  # in this order: see `Watcher.living`


def _populated(events: int) -> bool:
    """Whether the cgroup, which may have been removed, has processes."""
    try:
        return b"populated 1" in os.pread(events, 4096, 0)
    except OSError:  # ENODEV: removed
        return False


class _Known(NamedTuple):
    name: str
    events: int
    watch: int | None


class Watcher:
    """Knows cgroups by their ids. Calls `ended` with name and id when one has become empty or was removed."""

    def __init__(self, ended: Callable[[str, int], None]) -> None:
        self._inotify = Inotify()
        self._ended = ended
        self._known: dict[int, _Known] = {}
        self._watches: dict[int, int] = {}
        self._named: dict[str, int] = {}

    @property
    def fd(self) -> int:
        """To be polled for reading; then `receive`."""
        return self._inotify.fd

    @property
    def files(self) -> int:
        """Files that are open: one for each cgroup."""
        return len(self._known)

    def living(self, name: str) -> int:
        """The id of the cgroup that has the name; 0 where it is not known.

        A process that was seen in a cgroup of that name before this call is in this one, or was: a name is one
        cgroup's at a time, and the second version renames none. So a cgroup that lives now had its name then, too.
        """
        if name == "/":
            return _ID_OF_THE_ROOT
        cgroup = self._named.get(name, 0)
        return cgroup if cgroup and self._lives(cgroup) else 0

    def watch(self, name: str, events: int) -> None:
        """Know a cgroup until it ends; `ended` is called at once where it has. Takes over what `open_events` gave.

        OSError where there can be no more watches: ENOSPC (fs.inotify.max_user_watches) and ENOMEM. Then the end is
        noticed by `living` alone.
        """
        cgroup = identity(events)
        if cgroup in self._known:
            os.close(events)
            return
        self._known[cgroup] = _Known(name, events, None)
        try:
            watch = self._inotify.add(f"/proc/self/fd/{events}", IN_MODIFY)
            self._known[cgroup] = _Known(name, events, watch)
            self._watches[watch] = cgroup
        finally:
            if self._lives(cgroup):
                self.living(name)  # another one that had the name has ended
                self._named[name] = cgroup

    def receive(self) -> None:
        """Look at what changed."""
        watches = {watch for watch, _ in self._inotify.events()}
        if OVERFLOW in watches:
            watches = set(self._watches)
        for cgroup in [self._watches[watch] for watch in watches & set(self._watches)]:
            if cgroup in self._known:
                self._lives(cgroup)

    def _lives(self, cgroup: int) -> bool:
        name, events, watch = self._known[cgroup]
        if _populated(events):
            return True
        del self._known[cgroup]
        if self._named.get(name) == cgroup:
            del self._named[name]
        if watch is not None:
            del self._watches[watch]
            self._inotify.remove(watch)
        os.close(events)
        self._ended(name, cgroup)
        return False
