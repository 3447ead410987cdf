"""Bind a backing file to a device, and let go of it again.

Every call may wait for a disk. Owns the order of the steps on the device (lock, left-over partitions, configure,
verify; and back) and the meaning of each errno. Nothing here keeps a device open for longer than the job that opened
it: the kernel writes a device's cache back, and drops it, at the last close, and that has to be the client's.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from typing import NamedTuple

from loopd.kernel.transport import FdSet
from loopd.loop import Loop, LoopControl, UnexpectedDevice
from loopd.protocol.wire import Attach, Code, Refusal
from loopd.worker.access import Access, lock, reopen
from loopd.worker.devices import Binding, Number, partition_names
from loopd.worker.files import Backing

ATTEMPTS = 256
"""Numbers that one attach may lose to others (the host's losetup) before it gives up."""

# The number is lost: somebody else was faster, or it went away. The next number is tried.
_LOST = {
    errno.EBUSY: "the host's losetup bound the number, or has it open exclusively",
    errno.ENXIO: "the device is being torn down",
    errno.ENODEV: "the number was removed",
    errno.ENOENT: "the number was removed, and its node with it",
    errno.EEXIST: "LOOP_CTL_ADD: somebody else made the number",
    errno.EAGAIN: "somebody else holds the lock of the device",
}

_CONFIGURE = {
    errno.EINVAL: (Code.BAD_FD, "the kernel does not take this file as a backing file"),
    errno.EBADF: (Code.BAD_FD, "the kernel does not take this file as a backing file"),
    errno.EOVERFLOW: (Code.INVALID, "offset and sizelimit lie outside what the kernel can address"),
    errno.ENOMEM: (Code.NO_DEVICE, "the host has no memory for another device"),
    errno.EMFILE: (Code.NO_DEVICE, "loopd is at its limit of open files"),
    errno.ENFILE: (Code.NO_DEVICE, "the host is at its limit of open files"),
    errno.EPERM: (Code.NO_DEVICE, "the host does not let loopd use its loop devices"),
    errno.EACCES: (Code.NO_DEVICE, "the host does not let loopd use its loop devices"),
    errno.ENOSPC: (Code.NO_DEVICE, "the host has no number for another device"),
}


def delete_partitions(loop: Loop, keep: int = 0) -> None:
    """Delete the partitions of a device but the first `keep`, so that none reads the next file's data. A partition that
    is open stays. Needs CAP_SYS_ADMIN.
    """
    for name in partition_names(loop.devname)[keep:]:
        with contextlib.suppress(OSError):
            loop.delete_partition(int(name.rpartition("p")[2]))


class Bound(NamedTuple):
    """A device that was bound. Device and lock are the caller's to close; `lock` has LOCK_EX against udev."""

    binding: Binding
    device: Loop
    lock: int


class Request(NamedTuple):
    """What is to be bound, and how: the open file, what was asked, and what is known of the file. `windows` and
    `window` are `Binding`'s.
    """

    fd: int
    attach: Attach
    backing: Backing
    windows: bool = False
    window: str = ""

    def expected(self, loop: Loop) -> Binding:
        """The binding as it will be if the kernel does what it is asked; its size and direct I/O are not known yet."""
        attach, backing = self.attach, self.backing
        return Binding(
            number=loop.minor,
            devname=loop.devname,
            major=os.major(loop.rdev),
            minor=os.minor(loop.rdev),
            diskseq=None,
            size=0,
            offset=attach.offset,
            sizelimit=attach.sizelimit,
            sector_size=attach.sector_size,
            read_only=backing.read_only,
            direct_io=False,
            partscan=attach.partscan,
            backing_file=backing.path,
            backing_dev=backing.dev,
            backing_inode=backing.inode,
            backing_view=backing.view,
            ref=attach.ref,
            windows=self.windows,
            window=self.window,
        )


def bind(
    control: LoopControl, access: Access, request: Request, next_number: Callable[[], Number],
    intend: Callable[[Binding, int], None], note: Callable[[Binding], None],
) -> Bound:  # fmt: skip
    """Bind the file to the first number of `next_number` that is not lost to others.

    `intend` is called just before each try, with the binding as it will be and the fd that has the lock against udev.
    `note` is called with the binding as it is; an exception of `note` undoes the binding.
    """
    reason = ""
    for _ in range(ATTEMPTS):
        number, made = next_number()
        try:
            if not made:
                control.add(number)
            return _bind(*access.open(number), request, intend, note)
        except UnexpectedDevice as error:
            reason = str(error)
        except OSError as error:
            if error.errno in _LOST:
                reason = f"{_LOST[error.errno]} ({error})"
                continue
            code, meaning = _CONFIGURE.get(error.errno or 0, (Code.IO, "the device could not be bound"))
            raise Refusal(code, f"{meaning}: {error}") from error
    raise Refusal(Code.BUSY, f"{ATTEMPTS} numbers were lost to others, the last because: {reason}")


def _bind(
    loop: Loop, lock_fd: int, request: Request, intend: Callable[[Binding, int], None],
    note: Callable[[Binding], None],
) -> Bound:  # fmt: skip
    """Takes over the device and its lock."""
    try:
        lock(lock_fd)
        delete_partitions(loop)
        expected = request.expected(loop)
        intend(expected, lock_fd)
        _configure(loop, request)
        try:
            binding = _verify(loop, expected, request.attach)
            note(binding)
            return Bound(binding, loop, lock_fd)
        except BaseException as error:
            let_go(loop, sync=False)
            if isinstance(error, OSError):  # the number is not lost: it was bound, and the file was asked
                raise Refusal(Code.IO, f"the device could not be read back: {error}") from error
            raise
    except BaseException:
        os.close(lock_fd)
        loop.close()
        raise


def _configure(loop: Loop, request: Request) -> None:
    attach = request.attach
    # Without autoclear: between the attach and the client's first open nothing has the device open.
    loop.configure(
        request.fd,
        offset=attach.offset,
        sizelimit=attach.sizelimit,
        blocksize=attach.sector_size,
        partscan=attach.partscan,
        read_only=request.backing.read_only,
        direct_io=attach.direct_io != "off",
        ref=attach.ref.encode(),
    )


def _verify(loop: Loop, expected: Binding, attach: Attach) -> Binding:
    """Read back what is in force: the kernel drops direct I/O silently, and early 5.8 ignored sizelimit and partscan.
    """
    info = loop.get_status()
    if info.direct_io and attach.direct_io == "off":  # the fd was opened with O_DIRECT, which turns it on
        loop.set_direct_io(False)
        info = loop.get_status()
    binding = expected._replace(
        diskseq=loop.diskseq(),
        size=loop.size(),
        offset=info.lo_offset,
        sizelimit=info.lo_sizelimit,
        sector_size=loop.sector_size(),
        read_only=loop.read_only(),
        direct_io=info.direct_io,
        partscan=info.partscan,
    )
    if binding._replace(diskseq=None, size=0, direct_io=False) != expected or info.autoclear:
        raise Refusal(Code.INTERNAL, f"the kernel bound {binding} where {expected} was asked")
    if attach.direct_io == "on" and not binding.direct_io:
        raise Refusal(
            Code.UNSUPPORTED,
            "direct_io: the backing file, its offset or the sector size does not allow it; a larger sector may",
        )
    return binding


# Letting go -------------------------------------------------------------------------------------------------------


def let_go(loop: Loop, *, sync: bool = True) -> str | None:
    """Have the kernel unbind at the last close, of `loop` or of others, and write back what was written.

    Returns why the image lacks what was written; None when it lacks nothing. fsync(2) on an fd that was opened anew
    reports an error of an earlier write-back that was not reported to anybody yet.
    """
    delete_partitions(loop)
    # For the only opener LOOP_CLR_FD unbinds at once, and Linux 6.11 and later lose what is in the cache by then, which
    # others may have written after an fsync. With a second opener the kernel notes that the last close unbinds, and
    # that writes back first.
    with FdSet() as second:
        with contextlib.suppress(OSError):  # EMFILE, ENFILE, ENOMEM
            second.add(reopen(loop.fd, read_only=True))
        if len(second):
            _clear(loop)
        lost = _sync(loop) if sync else None
        if not len(second):
            _clear(loop)
    return lost


def _sync(loop: Loop) -> str | None:
    if loop.read_only():
        return None
    try:
        os.fsync(loop.fd)
    except OSError as error:  # ENOSPC below a sparse file, EDQUOT, EIO
        return os.strerror(error.errno or errno.EIO)
    return None


def _clear(loop: Loop) -> None:
    with contextlib.suppress(OSError):  # ENXIO: unbound already, or on its way
        loop.clear_fd()


def carries(loop: Loop, binding: Binding) -> bool:
    """Whether the device carries this binding, by its diskseq; by its file where the diskseq is not known."""
    if binding.diskseq is not None:
        return loop.diskseq() == binding.diskseq
    try:
        info = loop.get_status()
    except OSError:  # ENXIO
        return False
    return (info.lo_device, info.lo_inode) == binding.backing
