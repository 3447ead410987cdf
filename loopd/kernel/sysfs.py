"""sysfs: one of the daemon's own.

A process that may read a directory can keep it locked, and then every look-up of a name in it waits, also root's.
There is one sysfs for each network namespace. So where the daemon has a namespace of its own (PrivateNetwork=) nobody
else reads what is mounted here. Looks into nothing itself.
"""

from __future__ import annotations

import os

from loopd.kernel import libc

SYS_FSOPEN, SYS_FSCONFIG, SYS_FSMOUNT = 430, 431, 432  # the same on every architecture; Linux 5.2
FSOPEN_CLOEXEC = FSMOUNT_CLOEXEC = 1
FSCONFIG_CMD_CREATE = 6
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC = 1, 2, 4, 8
_ATTRIBUTES = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC


def mount() -> int | None:
    """The root of the sysfs of this network namespace, mounted nowhere, the caller's to close; None where that cannot
    be had (it needs CAP_SYS_ADMIN).
    """
    try:
        context = libc.call("syscall", SYS_FSOPEN, b"sysfs", FSOPEN_CLOEXEC)
        try:
            libc.call("syscall", SYS_FSCONFIG, context, FSCONFIG_CMD_CREATE, None, None, 0)
            return libc.call("syscall", SYS_FSMOUNT, context, FSMOUNT_CLOEXEC, _ATTRIBUTES)
        finally:
            os.close(context)
    except OSError:
        return None
