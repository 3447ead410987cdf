"""Devices: bind a backing file to a number, and let go of it again.

Runs in helper processes: every call here may wait for a disk. Owns the order of the steps on the device (lock,
left-over partitions, configure, verify) and the meaning of each errno. Knows no accounts, no policy and no leases.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from loopd import loop as lo
from loopd.kernel import rights
from loopd.loop import LOOP_MAJOR, Loop, LoopControl, UnexpectedDevice, backing_file, supports_configure
from loopd.protocol.wire import Attach, Code, Refusal
from loopd.worker.files import CLIENT, Backing

PRIVATE_NODES = "/run/loopd-nodes"
"""A directory of the service alone, on a mount without nodev (TemporaryFileSystem= in the unit)."""

LOOP_CONTROL = (10, 237)
"""MISC_MAJOR and LOOP_CTRL_MINOR of <linux/miscdevice.h>: fixed numbers."""

LOCK_TIMEOUT = 2.0
"""Seconds to wait for udev, which takes LOCK_SH on a new device for as long as it probes it."""

ATTEMPTS = 256
"""Numbers that one attach may lose to others (the host's losetup) before it gives up."""


class Number(NamedTuple):
    """The number of a device; `made` when LOOP_CTL_ADD has been done for it."""

    number: int
    made: bool


class Binding(NamedTuple):
    """One backing file on one device, as the kernel reports it. Sizes in bytes; `diskseq` is its identity (None: <
    5.15).
    """

    number: int
    devname: str
    major: int
    minor: int
    diskseq: int | None
    size: int
    offset: int
    sizelimit: int
    sector_size: int
    read_only: bool
    direct_io: bool
    partscan: bool
    backing_file: str
    backing_dev: str
    backing_inode: int
    ref: str
    backing_view: str = CLIENT


class Access:
    """How loopd itself opens a device: through a node of its own in a private directory, else through /dev.

    `/dev/loopN` is root's until udev changes it, and loopd runs as a user of its own. What the kernel says of devices
    the process looks up in a sysfs of its own from now on, if it is given the root of one.
    """

    def __init__(self, own_sysfs: int | None = None) -> None:
        self._sysfs = own_sysfs
        if own_sysfs is not None:
            lo.sysfs = f"/proc/self/fd/{own_sysfs}"
        self._private: int | None = None
        with contextlib.suppress(OSError):
            # Outside of the service it may be there too, as the mount point in /run.
            if not os.statvfs(PRIVATE_NODES).f_flag & os.ST_NODEV:
                self._private = os.open(PRIVATE_NODES, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    @property
    def fds(self) -> list[int]:
        """Those of the directory and of sysfs, where there are such of the service's own."""
        return [fd for fd in (self._private, self._sysfs) if fd is not None]

    def open_control(self) -> LoopControl:
        """Open the loop control device; OSError as open(2)."""
        if self._private is None:
            return LoopControl()
        with self._made("loop-control", stat.S_IFCHR, LOOP_CONTROL):
            return LoopControl(self._private)

    def has_configure(self, control: LoopControl) -> bool:
        """Whether the kernel has LOOP_CONFIGURE; OSError where no loop device can be opened."""
        with self._node(control.get_unbound()) as directory:
            return supports_configure(control, directory)

    @contextlib.contextmanager
    def _node(self, number: int) -> Iterator[int | None]:
        if self._private is None:
            yield None
            return
        name = f"loop{number}"
        with self._made(name, stat.S_IFBLK, device_number(name)):
            yield self._private

    @contextlib.contextmanager
    def stale_node(self, number: int) -> Iterator[str]:
        """The path of a node for a number that need not exist, where the whole disk's minor is the number."""
        if self._private is None:
            path = f"/dev/.loopd-{number}"
            os.mknod(path, stat.S_IFBLK | 0o600, os.makedev(LOOP_MAJOR, number))
            try:
                pinned = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
            finally:
                os.unlink(path)  # before it is opened, which may take long: a daemon that is killed leaves none
            try:
                yield f"/proc/self/fd/{pinned}"
            finally:
                os.close(pinned)
            return
        with self._made(f"stale{number}", stat.S_IFBLK, (LOOP_MAJOR, number)):
            yield f"{PRIVATE_NODES}/stale{number}"

    @contextlib.contextmanager
    def _made(self, name: str, kind: int, device: tuple[int, int]) -> Iterator[None]:
        with contextlib.suppress(FileExistsError):
            os.mknod(name, kind | 0o600, os.makedev(*device), dir_fd=self._private)
        try:
            yield
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=self._private)

    def open(self, number: int) -> tuple[Loop, int]:
        """The device, and an fd of its node in /dev for the lock; both are the caller's to close."""
        with self._node(number) as directory:
            loop = Loop(number, directory)
        try:
            return loop, _open_for_lock(loop)
        except BaseException:
            loop.close()
            raise

    @contextlib.contextmanager
    def opened(self, number: int) -> Iterator[tuple[Loop, int]]:
        """As `open`, both closed at the end."""
        loop, lock = self.open(number)
        try:
            yield loop, lock
        finally:
            os.close(lock)
            loop.close()


def _open_for_lock(loop: Loop) -> int:
    """Open the node that udev opens: a lock by flock(2) is on a node, not on the device that it leads to.

    As root, whose node it is until udev has changed that; acting so takes no capability but what a client's directory
    needs. Where there is no such node there is no udev to keep away either, and any other description will do.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with rights.acting_as(0, 0):
            fd = os.open(f"/dev/{loop.devname}", flags)
    except FileNotFoundError:
        return reopen(loop.fd, read_only=True)
    try:
        if os.fstat(fd).st_rdev == loop.rdev:
            return fd
    except OSError:
        os.close(fd)
        raise
    os.close(fd)
    return reopen(loop.fd, read_only=True)


def reopen(device: int, read_only: bool) -> int:
    """Another open file description of an open device, the caller's to close."""
    return os.open(f"/proc/self/fd/{device}", (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)


def device_number(name: str, disk: str | None = None) -> tuple[int, int]:
    """Major and minor of a disk, or of partition `name` of `disk`. Never derived from the name: loop.max_part shifts
    it.
    """
    path = f"{lo.sysfs}/block/{name}/dev" if disk is None else f"{lo.sysfs}/block/{disk}/{name}/dev"
    with open(path, encoding="ascii") as attribute:
        major, minor = attribute.read().split(":")
    return int(major), int(minor)


def size(devname: str) -> int | None:
    """Bytes of a device, as the kernel has it now; None without a device."""
    try:
        with open(f"{lo.sysfs}/block/{devname}/size", encoding="ascii") as attribute:
            return int(attribute.read()) * 512  # whatever the sector size is
    except OSError:
        return None


@contextlib.contextmanager
def _gone() -> Iterator[None]:
    """What sysfs has of a device may go meanwhile: ENOENT, or ENODEV between open and read."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENODEV):
            raise


def partitions(devname: str) -> dict[str, tuple[int, int]]:
    """Names and device numbers of the partitions that the kernel has for `devname` now."""
    found = {}
    with _gone():
        for name in os.listdir(f"{lo.sysfs}/block/{devname}"):
            if name.startswith(f"{devname}p"):
                with _gone():
                    found[name] = device_number(name, devname)
    return dict(sorted(found.items(), key=lambda item: int(item[0].rpartition("p")[2])))


# Binding ----------------------------------------------------------------------------------------------------------

# Somebody else was faster, or the number went away: the next number is tried.
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


def _lock(fd: int) -> None:
    deadline = time.monotonic() + LOCK_TIMEOUT
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.005)


def delete_partitions(loop: Loop) -> None:
    """Delete what partitions there are, so that none reads the next file's data; needs CAP_SYS_ADMIN."""
    for name in partitions(loop.devname):
        with contextlib.suppress(OSError):
            loop.delete_partition(int(name.rpartition("p")[2]))


class Bound(NamedTuple):
    """A device that was bound; both fds are the caller's to close, `lock` holds LOCK_EX against udev."""

    binding: Binding
    device: int
    lock: int


def bind(
    control: LoopControl, access: Access, fd: int, request: Attach, backing: Backing, next_number: Callable[[], Number]
) -> Bound:
    """Bind the backing file `fd` to the first number of `next_number` that can be had."""
    reason = ""
    for _ in range(ATTEMPTS):
        number, made = next_number()
        try:
            if not made:
                control.add(number)
            return _bind(*access.open(number), number, fd, request, backing)
        except UnexpectedDevice as error:
            reason = str(error)
        except OSError as error:
            if error.errno in _LOST:
                reason = f"{_LOST[error.errno]} ({error})"
                continue
            code, meaning = _CONFIGURE.get(error.errno or 0, (Code.IO, "the device could not be bound"))
            raise Refusal(code, f"{meaning}: {error}") from error
    raise Refusal(Code.BUSY, f"{ATTEMPTS} numbers were lost to others, the last because: {reason}")


def _bind(loop: Loop, lock: int, number: int, fd: int, request: Attach, backing: Backing) -> Bound:
    """Takes over the device and its lock."""
    try:
        _lock(lock)
        delete_partitions(loop)
        _configure(loop, fd, request, backing)
        try:
            return Bound(_verify(loop, number, request, backing), loop.fd, lock)
        except OSError as error:  # not lost to anybody: it is bound, and its file was asked
            raise Refusal(Code.IO, f"the device could not be read back: {error}") from error
    except BaseException:
        os.close(lock)
        loop.close()
        raise


def _configure(loop: Loop, fd: int, request: Attach, backing: Backing) -> None:
    loop.configure(
        fd,
        offset=request.offset,
        sizelimit=request.sizelimit,
        blocksize=request.sector_size,
        autoclear=True,
        partscan=request.partscan,
        read_only=backing.read_only,
        direct_io=request.direct_io != "off",
        ref=request.ref.encode(),
    )


def _verify(loop: Loop, number: int, request: Attach, backing: Backing) -> Binding:
    """Read back what is in force: the kernel drops direct I/O silently, early 5.8 ignored sizelimit and partscan."""
    info = loop.get_status()
    if info.direct_io and request.direct_io == "off":  # the fd was opened with O_DIRECT, which turns it on
        loop.set_direct_io(False)
        info = loop.get_status()
    binding = Binding(
        number=number,
        devname=loop.devname,
        major=os.major(loop.rdev),
        minor=os.minor(loop.rdev),
        diskseq=loop.diskseq(),
        size=loop.size(),
        offset=info.lo_offset,
        sizelimit=info.lo_sizelimit,
        sector_size=loop.sector_size(),
        read_only=loop.read_only(),
        direct_io=info.direct_io,
        partscan=info.partscan,
        backing_file=backing.path,
        backing_dev=backing.dev,
        backing_inode=backing.inode,
        backing_view=backing.view,
        ref=request.ref,
    )
    asked = (request.offset, request.sizelimit, request.sector_size, backing.read_only, request.partscan)
    got = (binding.offset, binding.sizelimit, binding.sector_size, binding.read_only, binding.partscan)
    if asked != got or not info.autoclear:
        raise Refusal(
            Code.INTERNAL, f"the kernel bound {got} where {asked} was asked (offset, sizelimit, sector, ro, partscan)"
        )
    if request.direct_io == "on" and not binding.direct_io:
        raise Refusal(
            Code.UNSUPPORTED,
            "direct_io: the backing file, its offset or the sector size does not allow it; a larger sector may",
        )
    return binding


# Release ----------------------------------------------------------------------------------------------------------


def sequence(devname: str) -> int | None:
    """The device's sequence number, which every bind and unbind raises; None before Linux 5.15, or without a device."""
    try:
        with open(f"{lo.sysfs}/block/{devname}/diskseq", encoding="ascii") as attribute:
            return int(attribute.read())
    except OSError:
        return None


def still_bound(binding: Binding) -> bool:
    """Whether the number still carries this binding, or is being torn down from it."""
    return backing_file(binding.number) is not None and sequence(binding.devname) == binding.diskseq


def autoclear(devname: str) -> bool | None:
    """Whether the kernel unbinds the device at its last close; None if it is not bound."""
    try:
        with open(f"{lo.sysfs}/block/{devname}/loop/autoclear", encoding="ascii") as attribute:
            return attribute.read() == "1\n"
    except OSError:
        return None


def let_go(loop: Loop) -> None:
    """Write back what was written, delete the partitions, and have the kernel unbind at the last close.

    Not by LOOP_CLR_FD: from Linux 6.11 on it makes the device refuse what is still in its page cache. The flag is set
    again because a client can clear it.
    """
    with contextlib.suppress(OSError):  # EIO: the file's disk failed, which its writer has been told
        os.fsync(loop.fd)
    _unbind_at_last_close(loop)


def _unbind_at_last_close(loop: Loop) -> None:
    delete_partitions(loop)
    with contextlib.suppress(OSError):  # ENXIO: unbound already
        if not loop.get_status().autoclear:
            loop.set_status(autoclear=True)


def nudge(access: Access, number: int, diskseq: int | None) -> None:
    """Once more have a device unbound that somebody kept open, in case he cleared the flag before he closed it."""
    with contextlib.suppress(OSError, UnexpectedDevice), access.opened(number) as (loop, _):
        if loop.diskseq() == diskseq:
            _unbind_at_last_close(loop)


# Partitions -------------------------------------------------------------------------------------------------------

TABLE = 65536
"""Bytes at both ends of a device in which every partition table lies."""


def table(device: int) -> int:
    """A checksum of where the partition table is: tells that it changed, and says nothing of what it means."""
    end = os.lseek(device, 0, os.SEEK_END)
    first = os.pread(device, TABLE, 0)
    return zlib.crc32(os.pread(device, TABLE, max(0, end - TABLE)), zlib.crc32(first))


def rescan(loop: Loop) -> None:
    """Have the kernel read the partition table again; needs CAP_SYS_ADMIN, which a container has not."""
    try:
        loop.reread_partitions()
    except OSError as error:
        code, meaning = _RESCAN.get(error.errno or 0, (Code.IO, "the kernel cannot read the table: {}"))
        raise Refusal(code, meaning.format(error)) from error


_RESCAN = {
    errno.EBUSY: (Code.BUSY, "a partition is in use: {}"),
    errno.EINVAL: (
        Code.UNSUPPORTED, "the device was attached without partscan: detach it, and attach it with partscan"
    ),
    errno.EACCES: (Code.UNSUPPORTED, "this loopd runs without CAP_SYS_ADMIN: {}"),
    errno.EPERM: (Code.UNSUPPORTED, "this loopd runs without CAP_SYS_ADMIN: {}"),
}
