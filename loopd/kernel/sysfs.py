"""sysfs: one of the daemon's own.

A process that may read a directory can keep it locked, and then every look-up of a name in it waits, also root's.
There is one sysfs for each network namespace. So where the daemon has a namespace of its own (PrivateNetwork=) nobody
else reads what is mounted here. Looks into nothing itself.
"""

from __future__ import annotations

import ctypes
import os

SYS_FSOPEN, SYS_FSCONFIG, SYS_FSMOUNT = 430, 431, 432  # the same on every architecture; Linux 5.2
FSOPEN_CLOEXEC = FSMOUNT_CLOEXEC = 1
FSCONFIG_CMD_CREATE = 6
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC = 1, 2, 4, 8
_ATTRIBUTES = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC

_libc = ctypes.CDLL(None)


def mount() -> int | None:
    """The root of the sysfs of this network namespace, mounted nowhere, the caller's to close; None where that cannot
    be had (it needs CAP_SYS_ADMIN).
    """
    context = _libc.syscall(SYS_FSOPEN, b"sysfs", FSOPEN_CLOEXEC)
    if context < 0:
        return None
    try:
        if _libc.syscall(SYS_FSCONFIG, context, FSCONFIG_CMD_CREATE, None, None, 0) < 0:
            return None
        root = int(_libc.syscall(SYS_FSMOUNT, context, FSMOUNT_CLOEXEC, _ATTRIBUTES))
    finally:
        os.close(context)
    return None if root < 0 else root
