"""Rights: act on a client's directory as that client, and drop what a process does not need.

The one place that changes credentials. Works on the calling thread alone (fsuid, fsgid and capabilities are a
thread's), so it is for workers, which have one thread. Nothing here knows what is done under the rights it lends.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
import struct
from collections.abc import Iterator

from loopd.kernel import libc, proc

CAP_MKNOD = 27
PR_SET_PDEATHSIG, PR_SET_DUMPABLE = 1, 4
_CAPABILITY_VERSION_3 = 0x20080522
_HEADER = struct.Struct("=Ii")
_DATA = struct.Struct(
    "=6I"
)  # low and high words of effective, permitted and inheritable, interleaved as the kernel has it


def _sets(pid: int = 0) -> tuple[int, int]:
    """Permitted and inheritable set of a process, or of this thread, as bit masks."""
    data = ctypes.create_string_buffer(_DATA.size)
    libc.call("capget", _HEADER.pack(_CAPABILITY_VERSION_3, pid), data)
    _, p0, i0, _, p1, i1 = _DATA.unpack(data.raw)
    return p0 | p1 << 32, i0 | i1 << 32


def _packed(effective: int, permitted: int, inheritable: int) -> bytes:
    low = 0xFFFFFFFF
    sets = (effective, permitted, inheritable)
    return _DATA.pack(*(s & low for s in sets), *(s >> 32 for s in sets))


def drop_groups() -> None:
    """Leave all supplementary groups: a worker acts with a client's rights, and the client is not in loopd's groups."""
    os.setgroups([])


def die_with_parent(parent: int) -> None:
    """Be killed when the parent process ends, or end now if it has ended already."""
    libc.call("prctl", PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)


def die_first() -> None:
    """Have the kernel kill this process first where memory runs out (MemoryMax=)."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "wb", buffering=0) as file:
        file.write(b"500")


def can_make_nodes(pid: int) -> bool:
    """Whether process `pid` may take CAP_MKNOD into force, and is in the host's user namespace, where it counts."""
    try:
        if not _sets(pid)[0] & 1 << CAP_MKNOD:
            return False
        return proc.in_hosts_user_namespace(pid)
    except OSError:  # gone
        return False


def may_count(pid: int) -> bool:
    """Whether capabilities of process `pid` count for what is loopd's own: its user namespace knows loopd's uid, as the
    host's does and one that root has made with root in it; or it is gone.
    """
    try:
        return proc.knows(pid, os.geteuid())
    except OSError:
        return True


class Rights:
    """loopd's own rights, to which a worker returns, and the way to a client's. Made once in each worker."""

    def __init__(self) -> None:
        permitted, inheritable = _sets()
        self._header = _HEADER.pack(_CAPABILITY_VERSION_3, 0)
        self._all = _packed(permitted, permitted, inheritable)
        self._mknod = _packed(permitted & 1 << CAP_MKNOD, permitted, inheritable)
        self._uid, self._gid = os.geteuid(), os.getegid()
        self._parent = os.getppid()

    @contextlib.contextmanager
    def acting_as(self, uid: int, gid: int) -> Iterator[None]:
        """Use the file system as `uid` and `gid` with no capability but CAP_MKNOD; loopd's own rights return
        afterwards.

        setfsuid(2) and setfsgid(2) do not report failure, so the ids are read back: an id of -1 changes nothing and
        returns what is in force. Raises PermissionError when the ids could not be taken.
        """
        try:
            libc.library.setfsgid(gid)
            libc.library.setfsuid(uid)
            # After setfsuid: leaving or reaching fsuid 0 makes the kernel change the effective set by itself.
            libc.call("capset", self._header, self._mknod)
            if libc.library.setfsuid(-1) & _ID != uid or libc.library.setfsgid(-1) & _ID != gid:
                raise PermissionError(f"the file system rights of {uid}:{gid} cannot be taken")
            yield
        finally:
            libc.call("capset", self._header, self._all)  # first: CAP_SETUID is needed to go back
            libc.library.setfsuid(self._uid)
            libc.library.setfsgid(self._gid)
            libc.call("capset", self._header, self._all)
            die_with_parent(self._parent)  # the kernel forgets the wish with every change of fsuid or capabilities
            # It also gives /proc/self to root then: /proc/self/fdinfo would be out of reach (until Linux 5.14).
            libc.call("prctl", PR_SET_DUMPABLE, 1, 0, 0, 0)


_ID = 0xFFFFFFFF


@functools.cache
def _own() -> Rights:
    return Rights()


def acting_as(uid: int, gid: int) -> contextlib.AbstractContextManager[None]:
    """`Rights.acting_as` of this process."""
    return _own().acting_as(uid, gid)
