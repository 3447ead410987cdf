"""A window: one more loop device on the file of a disk, from the start of a partition to its end.

It stands in for the kernel's partition device where the client must not have a node of that. The kernel reads the
partition table; nothing of the image is read here.
"""

from __future__ import annotations

from loopd.kernel.transport import FdSet
from loopd.protocol.wire import Attach, Code, Refusal
from loopd.worker import bind, nodes
from loopd.worker.booking import Booking
from loopd.worker.files import Backing
from loopd.worker.messages import Done, OpenWindow
from loopd.worker.nodes import Directory
from loopd.worker.process import Worker
from loopd.worker.upkeep import kept

DISK = "disk"
"""What keeps a window: the lease of its disk."""


def open_window(worker: Worker, job: OpenWindow, fds: FdSet) -> bool:
    """Bind a window, and make its node."""
    try:
        with kept(fds.borrow(0), job.client) as (directory, file):
            if directory is None or file is None:
                raise Refusal(Code.NOT_FOUND, f"{job.disk.devname} is detached already")
            done = _open(worker, job, fds.borrow(1), directory, file)
    except Refusal as refusal:
        done = Done(refusal)
    except OSError as error:
        done = Done(Refusal(Code.IO, f"{job.extent.name} cannot be made: {error}"))
    worker.say(done, last=True)
    return True


def _open(worker: Worker, job: OpenWindow, slot: int, directory: Directory, file: int) -> Done:
    booking = Booking(worker, slot, job.row, job.holder, job.number)
    booking.kept_by = DISK
    bound = booking.bind(_request(job, file), lambda *_: {"directory": directory.fd})
    binding = bound.binding
    with FdSet((bound.lock,)), bound.device as device:
        try:
            wanted = {binding.node: (binding.major, binding.minor)}
            made = nodes.place(directory, binding.node, wanted, read_only=binding.read_only)
        except BaseException:
            bind.let_go(device, sync=False)
            booking.forget()
            raise
    return Done(None, binding, tuple(made), grant=job.holder["grant"])


def _request(job: OpenWindow, file: int) -> bind.Request:
    """As the disk is, but for the part of the file. Direct I/O is off where the partition's start does not allow it."""
    disk, extent = job.disk, job.extent
    attach = Attach(
        0, offset=disk.offset + extent.start, sizelimit=extent.size, sector_size=disk.sector_size,
        read_only=disk.read_only, direct_io="auto" if disk.direct_io else "off", ref=disk.ref,
    )  # fmt: skip
    backing = Backing(
        disk.read_only, extent.size, disk.backing_dev, disk.backing_inode, disk.backing_file, disk.backing_view, False
    )
    return bind.Request(file, attach, backing, window=extent.name)
