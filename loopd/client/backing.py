"""Which file is behind a device now, and which devices are on a file.

The daemon tells the name that a file had when it was attached. Only the kernel knows the name that the file has now,
and tells it as the mount namespace of the reader has it: so the client reads it, not the daemon. Changes when the
kernel tells it in another way. Opens nothing but sysfs.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Iterable

from loopd.client.inputs import StrPath
from loopd.protocol.wire import LeaseInfo


def _attribute(devname: str, name: str) -> str:
    """An attribute in sysfs, empty where that is not to be had."""
    with suppress(OSError), open(f"/sys/block/{devname}/{name}", "rb") as file:
        return file.read()[:-1].decode("utf-8", "surrogateescape")  # the kernel adds one newline
    return ""


def present(lease: LeaseInfo) -> LeaseInfo:
    """A lease with the name of its file now in `backing_file`: renamed, or with `` (deleted)`` behind it.

    Where sysfs is not there, or tells of another binding, it stays the name at attach.
    """
    # The kernel counts diskseq up before it shows the file of a new binding (LOOP_CONFIGURE, LOOP_CHANGE_FD). So the
    # name is read first: the diskseq that is read after it is that of the name, or a later one.
    name = _attribute(lease.devname, "loop/backing_file")
    diskseq = "" if lease.diskseq is None else str(lease.diskseq)  # sysfs has none before Linux 5.15 either
    if not name or _attribute(lease.devname, "diskseq") != diskseq:
        name = lease.backing_file
    return lease._replace(backing_file=name, backing_file_at_attach=lease.backing_file)


def on_file(leases: Iterable[LeaseInfo], file: StrPath) -> tuple[LeaseInfo, ...]:
    """Those of the leases whose file this is: by device and inode, or, where no file has the name, by the name.

    A lease whose file was renamed or deleted is not one of another file that has its name now. OSError where it cannot
    be told whether a file has the name.
    """
    try:
        status = os.stat(file)
    except (FileNotFoundError, NotADirectoryError):
        paths = (os.path.abspath(file), os.path.realpath(file))
        names = {os.fsencode(path).decode("utf-8", "surrogateescape") for path in paths}
        names |= {f"{name} (deleted)" for name in names}
        return tuple(lease for lease in leases if lease.backing_file in names)
    # As the daemon makes them, of statx(2) of the fd that it was sent.
    identity = (f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}", status.st_ino)
    return tuple(lease for lease in leases if (lease.backing_dev, lease.backing_inode) == identity)
