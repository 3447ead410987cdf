"""The kernel's loop device interface: ``/dev/loop-control``, ``/dev/loopN`` and their ioctls.

Owns every ioctl on a loop device and the meaning of its errno. Knows nothing of the daemon, the wire or
policy, imports nothing of the package, and never logs. Standard library only, Python 3.8 and later, so that a
program can carry this one file along. Names and arguments are those of osbuild's ``loop`` module, and
programs written for it run on this one.

What differs from it, on purpose:

* There is no fallback for ``LOOP_CONFIGURE`` (Linux 5.8; RHEL 8.4): see `supports_configure`. The older pair
  ``LOOP_SET_FD`` and ``LOOP_SET_STATUS64`` leaves a moment in which the device is open to all, writable and
  at offset 0.
* Values are checked before the kernel sees them and are a ValueError. A block size that the kernel refuses
  would leave the device without uevents until its next successful bind (Linux 6.18 and 7.2).
* `LoopControl.loop_for_fd` gives up: retries are bounded in number and in time.
* File descriptors are closed by ``close()`` or a ``with`` block and by nothing else; there is no ``__del__``.
  An object that is dropped unclosed keeps its device open, and a device with autoclear keeps its file, until
  the process ends.
* Use of a closed object is a RuntimeError.
* `Loop.set_status` takes 0 for a value, and refuses a change that the kernel would silently ignore.
* `Loop.mknod` always makes a node; it never bind-mounts the one in /dev.

A *number* is the N of ``loopN``. It is called ``minor`` here because callers know it by that name, but the
device's minor number differs from it wherever ``loop.max_part`` is not 0. `Loop.rdev` is the true device
number.

An OSError carries the kernel's errno and names the ioctl. Sizes and offsets are in bytes.
"""

from __future__ import annotations

import array
import enum
import errno
import fcntl
import os
import stat
import struct
import time
from typing import TYPE_CHECKING, NamedTuple, overload

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

__all__ = [
    "LOOP_MAJOR",
    "LO_FLAGS_AUTOCLEAR",
    "LO_FLAGS_DIRECT_IO",
    "LO_FLAGS_PARTSCAN",
    "LO_FLAGS_READ_ONLY",
    "Loop",
    "LoopControl",
    "LoopInfo",
    "UnexpectedDevice",
    "backing_file",
    "supports_configure",
]

# linux/major.h, linux/loop.h
LOOP_MAJOR = 7
LO_FLAGS_READ_ONLY = 1
LO_FLAGS_AUTOCLEAR = 4
LO_FLAGS_PARTSCAN = 8
LO_FLAGS_DIRECT_IO = 16
LO_NAME_SIZE = 64

_LLONG_MAX = 2**63 - 1
_MINOR_MAX = 2**20 - 1  # MINORMASK. Linux before 5.16 registers a wrapped, duplicate device for more.
_PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")

# loop_for_fd. A race lost to another binder is over within microseconds, but GET_FREE names the same device
# to everybody that asks meanwhile: hence many short tries rather than few long ones. An flock on
# /dev/loop-control would avoid the race among those who take it (systemd and Apptainer do; losetup does not),
# but it would have to be held while LOOP_CONFIGURE writes the file back, and that would stall every program
# on the host that takes it.
_ATTEMPTS = 256
_PAUSE_MAX = 0.05  # seconds
_NODE_WAIT = 0.5  # seconds for /dev/loopN to appear and to get its owner; udev needs milliseconds
_LOCK_WAIT = 1.0  # seconds for udev to end its probe of one device
_STRIKES = 3  # lost tries on a device that is free all the same, until it is left alone
_PROBE_ATTEMPTS = 16  # supports_configure


# asm/ioctl.h. The loop ioctls are plain numbers; the block layer's are made by _IO() and _IOR(), and some
# architectures (ppc64el among them) lay those out differently.
if os.uname().machine.startswith(("ppc", "mips", "sparc", "alpha")):
    _IOC_NONE, _IOC_READ, _IOC_DIRSHIFT = 1, 2, 29
else:
    _IOC_NONE, _IOC_READ, _IOC_DIRSHIFT = 0, 2, 30


def _io(number: int) -> int:
    return _IOC_NONE << _IOC_DIRSHIFT | 0x12 << 8 | number


def _ior(number: int, size: int) -> int:
    return _IOC_READ << _IOC_DIRSHIFT | size << 16 | 0x12 << 8 | number


class Request(enum.IntEnum):
    """Every ioctl this module issues, by the kernel's name (linux/loop.h, linux/fs.h, linux/blkpg.h)."""

    LOOP_SET_FD = 0x4C00
    LOOP_CLR_FD = 0x4C01
    LOOP_SET_STATUS64 = 0x4C04
    LOOP_GET_STATUS64 = 0x4C05
    LOOP_CHANGE_FD = 0x4C06
    LOOP_SET_CAPACITY = 0x4C07
    LOOP_SET_DIRECT_IO = 0x4C08
    LOOP_SET_BLOCK_SIZE = 0x4C09
    LOOP_CONFIGURE = 0x4C0A
    LOOP_CTL_ADD = 0x4C80
    LOOP_CTL_REMOVE = 0x4C81
    LOOP_CTL_GET_FREE = 0x4C82
    BLKROGET = _io(94)
    BLKRRPART = _io(95)
    BLKFLSBUF = _io(97)
    BLKSSZGET = _io(104)
    BLKPG = _io(105)
    BLKGETSIZE64 = _ior(114, struct.calcsize("N"))  # declared with size_t, but it writes a u64
    BLKGETDISKSEQ = _ior(128, 8)


@overload
def _ioctl(fd: int, request: Request, arg: int = 0) -> int: ...


@overload
def _ioctl(fd: int, request: Request, arg: bytes) -> bytes: ...


def _ioctl(fd: int, request: Request, arg: int | bytes = 0) -> int | bytes:
    """The one place that issues an ioctl. For bytes, gives back the buffer as the kernel left it."""
    try:
        return fcntl.ioctl(fd, request, arg)
    except OSError as error:
        # The constructor picks the class that belongs to the errno, as PermissionError does to EACCES.
        raise OSError(error.errno, f"{request.name}: {error.strerror}") from None


class UnexpectedDevice(Exception):
    """What was opened is not the loop device it should be.

    `expected_minor` is the number that was asked for (-1 for any loop device), `rdev` and `mode` are what
    stat(2) says.
    """

    def __init__(self, expected_minor: int, rdev: int, mode: int) -> None:
        super().__init__(expected_minor, rdev, mode)
        self.expected_minor = expected_minor
        self.rdev = rdev
        self.mode = mode

    def __str__(self) -> str:
        wanted = f"loop{self.expected_minor}" if self.expected_minor >= 0 else "a loop device"
        if stat.S_ISBLK(self.mode):
            return f"expected {wanted}, found block device {os.major(self.rdev)}:{os.minor(self.rdev)}"
        return f"expected {wanted}, found no block device (mode {self.mode:o})"


# struct loop_info64
_INFO = struct.Struct("=5Q4I64s64s32s2Q")


class LoopInfo(NamedTuple):
    """``struct loop_info64``: what ``LOOP_GET_STATUS64`` says of a bound device. See loop(4)."""

    lo_device: int = 0
    """st_dev of the backing file"""
    lo_inode: int = 0
    """st_ino of the backing file"""
    lo_rdevice: int = 0
    """st_rdev of the backing file, where that is a block device"""
    lo_offset: int = 0
    """where the device starts in the backing file, bytes"""
    lo_sizelimit: int = 0
    """the most the device may hold, bytes; 0 is no limit"""
    lo_number: int = 0
    """the N of loopN"""
    lo_encrypt_type: int = 0
    lo_encrypt_key_size: int = 0
    lo_flags: int = 0
    """LO_FLAGS_*"""
    lo_file_name: bytes = bytes(LO_NAME_SIZE)
    """64 bytes for the binder's own use, filled up with NUL; the kernel never interprets them. See `ref`"""
    lo_crypt_name: bytes = bytes(LO_NAME_SIZE)
    lo_encrypt_key: bytes = bytes(32)
    lo_init: tuple[int, int] = (0, 0)

    @property
    def read_only(self) -> bool:
        """Whether the device was bound read-only"""
        return bool(self.lo_flags & LO_FLAGS_READ_ONLY)

    @property
    def autoclear(self) -> bool:
        """Whether the device is unbound when the last opener closes it"""
        return bool(self.lo_flags & LO_FLAGS_AUTOCLEAR)

    @property
    def partscan(self) -> bool:
        """Whether the kernel looks for partitions on the device"""
        return bool(self.lo_flags & LO_FLAGS_PARTSCAN)

    @property
    def direct_io(self) -> bool:
        """Whether direct I/O is in force, which may not be what was asked for"""
        return bool(self.lo_flags & LO_FLAGS_DIRECT_IO)

    @property
    def ref(self) -> bytes:
        """`lo_file_name` up to its first NUL: the ``ref`` given to `Loop.configure`"""
        return self.lo_file_name.split(b"\0", 1)[0]

    def is_bound_to(self, info: os.stat_result) -> bool:
        """Whether the backing file is the one that `info` is the stat(2) of"""
        return (self.lo_device, self.lo_inode) == (info.st_dev, info.st_ino)


def _pack_info(info: LoopInfo) -> bytes:
    return _INFO.pack(*info[:-1], *info.lo_init)


def _unpack_info(data: bytes) -> LoopInfo:
    fields = _INFO.unpack(data)
    return LoopInfo._make((*fields[:-2], fields[-2:]))


# struct loop_config: fd, block_size, struct loop_info64, u64 reserved[8]
_CONFIG = struct.Struct(f"=II{_INFO.size}s64x")


def _pack_config(
    fd: int,
    *,
    offset: int | None,
    sizelimit: int | None,
    blocksize: int,
    autoclear: bool | None,
    partscan: bool | None,
    read_only: bool | None,
    direct_io: bool,
    ref: bytes,
) -> bytes:
    if len(ref) >= LO_NAME_SIZE or b"\0" in ref:
        raise ValueError(f"ref must be at most {LO_NAME_SIZE - 1} bytes without NUL: {ref!r}")
    flags = (
        (LO_FLAGS_READ_ONLY if read_only else 0)
        | (LO_FLAGS_AUTOCLEAR if autoclear else 0)
        | (LO_FLAGS_PARTSCAN if partscan else 0)
        | (LO_FLAGS_DIRECT_IO if direct_io else 0)
    )
    info = LoopInfo(
        lo_offset=0 if offset is None else _window("offset", offset),
        lo_sizelimit=0 if sizelimit is None else _window("sizelimit", sizelimit),
        lo_flags=flags,
        lo_file_name=ref,
    )
    return _CONFIG.pack(_valid_fd(fd), _valid_block_size(blocksize) if blocksize else 0, _pack_info(info))


# struct blkpg_ioctl_arg: op, flags, datalen, pointer to the data
_BLKPG_ARG = struct.Struct("@iiiP")
# struct blkpg_partition: start, length, number, and two names of 64 bytes that the kernel ignores
_BLKPG_PARTITION = struct.Struct("@qqi128x0q")
_BLKPG_ADD_PARTITION = 1
_BLKPG_DEL_PARTITION = 2


def _blkpg(fd: int, op: int, number: int, start: int = 0, length: int = 0) -> None:
    # The argument holds a pointer. An array has an address that can be asked for, without ctypes.
    partition = array.array("B", _BLKPG_PARTITION.pack(start, length, number))
    address, size = partition.buffer_info()
    _ioctl(fd, Request.BLKPG, _BLKPG_ARG.pack(op, 0, size, address))


_INT = struct.Struct("@i")
_U64 = struct.Struct("=Q")


def _valid_fd(fd: int) -> int:
    # Also keeps AT_FDCWD (-100) from being taken for a directory.
    if not 0 <= fd < 2**31:
        raise ValueError(f"not a file descriptor: {fd}")
    return fd


def _window(name: str, value: int) -> int:
    """An offset or a size. Beyond LLONG_MAX the kernel says EOVERFLOW, or wraps, depending on its version."""
    whole = int(value)
    if whole != value or not 0 <= whole <= _LLONG_MAX:
        raise ValueError(f"{name} must be a whole number of bytes from 0 to 2^63-1: {value!r}")
    return whole


def _valid_block_size(size: int) -> int:
    """The page size is the limit of every kernel before 6.15; later ones would take up to 64 KiB."""
    whole = int(size)
    if whole != size or not 512 <= whole <= _PAGE_SIZE or whole & (whole - 1):
        raise ValueError(f"block size must be a power of two from 512 to {_PAGE_SIZE}: {size!r}")
    return whole


def _valid_number(minor: int) -> int:
    if not 0 <= minor <= _MINOR_MAX:
        raise ValueError(f"loop device number must be from 0 to {_MINOR_MAX}: {minor}")
    return minor


def _open_node(minor: int, flags: int, dir_fd: int | None) -> int:
    name = f"loop{_valid_number(minor)}"
    flags |= os.O_CLOEXEC | os.O_NOFOLLOW
    if dir_fd is None:
        return os.open(f"/dev/{name}", flags)
    return os.open(name, flags, dir_fd=_valid_fd(dir_fd))


sysfs = "/sys"
"""Where sysfs is mounted: that which the whole process looks into."""


def _sysfs_name(rdev: int) -> str:
    """The kernel's name of an *open* block device, which cannot be removed, so sysfs has it."""
    path = f"{sysfs}/dev/block/{os.major(rdev)}:{os.minor(rdev)}"
    try:
        return os.path.basename(os.readlink(path))
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, "no sysfs entry for a block device; mount /sys", path) from None


def _identify(fd: int, expected: int) -> tuple[int, int]:
    """Number and device number of the loop device behind `fd`; `expected` is its number, or -1 for any."""
    info = os.fstat(fd)
    if stat.S_ISBLK(info.st_mode) and os.major(info.st_rdev) == LOOP_MAJOR:
        # Whole disks and, with loop.max_part, partitions have this major: "loop0" and "loop0p1".
        digits = _sysfs_name(info.st_rdev)[len("loop") :]
        if digits.isdigit() and (expected < 0 or int(digits) == expected):
            return int(digits), info.st_rdev
    raise UnexpectedDevice(expected, info.st_rdev, info.st_mode)


class Loop:
    """A loop device that is held open, read-write.

    The binding outlives the object unless autoclear is set: closing does not unbind.

    Attributes:
        devname: the device's name, ``loopN``; ``<closed>`` after `close`
        minor: its number, the N of ``loopN`` (which is the minor number only where ``loop.max_part`` is 0)
        rdev: its device number, for ``os.major`` and ``os.minor``
        fd: the open device; -1 after `close`
        on_close: called with the Loop by `close`, while the device is still open; or None
    """

    LOOP_MAJOR = LOOP_MAJOR

    LO_FLAGS_READ_ONLY = LO_FLAGS_READ_ONLY
    LO_FLAGS_AUTOCLEAR = LO_FLAGS_AUTOCLEAR
    LO_FLAGS_PARTSCAN = LO_FLAGS_PARTSCAN
    LO_FLAGS_DIRECT_IO = LO_FLAGS_DIRECT_IO

    LOOP_SET_FD = Request.LOOP_SET_FD
    LOOP_CLR_FD = Request.LOOP_CLR_FD
    LOOP_SET_STATUS64 = Request.LOOP_SET_STATUS64
    LOOP_GET_STATUS64 = Request.LOOP_GET_STATUS64
    LOOP_CHANGE_FD = Request.LOOP_CHANGE_FD
    LOOP_SET_CAPACITY = Request.LOOP_SET_CAPACITY
    LOOP_SET_DIRECT_IO = Request.LOOP_SET_DIRECT_IO
    LOOP_SET_BLOCK_SIZE = Request.LOOP_SET_BLOCK_SIZE
    LOOP_CONFIGURE = Request.LOOP_CONFIGURE

    def __init__(self, minor: int, dir_fd: int | None = None) -> None:
        """Open the node ``loop{minor}`` in the directory `dir_fd`, or in /dev.

        The directory must be one that only trusted parties can change: what lies there under that name is
        opened before it can be looked at. A symbolic link is not followed.

        Raises UnexpectedDevice if the node is not that loop device; OSError as open(2) does, with ENXIO for a
        device that is being unbound (Linux 6.11) or removed; FileNotFoundError also where sysfs, which knows
        the device's number, is not mounted.
        """
        fd = _open_node(minor, os.O_RDWR, dir_fd)
        try:
            self._own(fd, minor)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def from_fd(cls, fd: int) -> Self:
        """A Loop that takes over `fd`, an open loop device, and closes it in the end.

        If this raises, `fd` still belongs to the caller: UnexpectedDevice if it is no whole loop device,
        ValueError if it is negative, OSError if it is not open.
        """
        self = cls.__new__(cls)
        self._own(_valid_fd(fd), -1)
        return self

    def _own(self, fd: int, expected: int) -> None:
        self.minor, self.rdev = _identify(fd, expected)
        self.devname = f"loop{self.minor}"
        self.on_close: Callable[[Loop], object] | None = None
        self.fd = fd
        self._closing = False

    def __repr__(self) -> str:
        return f"<Loop {self.devname} fd={self.fd}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the device; nothing but a further `close`, which does nothing, is valid afterwards.

        `on_close` is called first, with the device still open. Should it raise, the device is closed all the
        same and the exception goes on. The last close of a device with autoclear unbinds it.
        """
        if self.fd < 0 or self._closing:
            return
        self._closing = True
        try:
            if callable(self.on_close):
                self.on_close(self)
        finally:
            fd, self.fd = self.fd, -1
            self.devname = "<closed>"
            os.close(fd)

    def fileno(self) -> int:
        """The open device's file descriptor; RuntimeError after `close`"""
        if self.fd < 0:
            raise RuntimeError("loop device is closed")
        return self.fd

    # -- binding --

    def configure(
        self,
        fd: int,
        offset: int | None = None,
        sizelimit: int | None = None,
        blocksize: int = 0,
        autoclear: bool | None = None,
        partscan: bool | None = None,
        read_only: bool | None = None,
        *,
        direct_io: bool = False,
        ref: bytes = b"",
    ) -> None:
        """Bind the file `fd` and set all properties, in one atomic step: LOOP_CONFIGURE, Linux 5.8.

        The device must be unbound, the file a regular file or a block device. None means the kernel's
        default, which is 0 or off. The kernel may write the file's dirty pages back first, which takes as
        long as it takes.

        Args:
            fd: the backing file. Opened read-only it makes a read-only device. Opened *write-only* it makes a
                device that can be read nevertheless: check before passing on a stranger's.
            offset: where the device starts in the file, bytes; past the end the device is of size 0
            sizelimit: the most the device may hold of the file, bytes; 0 is no limit
            blocksize: logical block size, bytes: a power of two from 512 to the page size; 0 is 512, or what
                the file needs where it was opened with O_DIRECT.
            autoclear: unbind at the last close of the device.
            partscan: look for partitions, now and on `reread_partitions`.
            read_only: refuse writes. Cannot be changed later.
            direct_io: bypass the page cache of the file. The kernel drops the wish without a word where file,
                offset and block size do not allow it: see `LoopInfo.direct_io`.
            ref: up to 63 bytes, given back as `LoopInfo.ref`.

        Raises ValueError for a bad argument, before the kernel sees it. OSError: EBUSY if the device is
        bound, being unbound, or held with O_EXCL by somebody else; EBADF if `fd` is not open, an O_PATH fd,
        or this very device; EINVAL if the file is of a wrong type, or the kernel is too old
        (`supports_configure` tells).
        """
        config = _pack_config(
            fd,
            offset=offset,
            sizelimit=sizelimit,
            blocksize=blocksize,
            autoclear=autoclear,
            partscan=partscan,
            read_only=read_only,
            direct_io=direct_io,
            ref=ref,
        )
        _ioctl(self.fileno(), Request.LOOP_CONFIGURE, config)

    def set_fd(self, fd: int) -> None:
        """Bind the file `fd` with no properties: LOOP_SET_FD. For old callers; only `configure` is atomic.

        Raises OSError as `configure` does.
        """
        _ioctl(self.fileno(), Request.LOOP_SET_FD, _valid_fd(fd))

    def change_fd(self, fd: int) -> None:
        """Replace the backing file of a read-only device with another of the same size: LOOP_CHANGE_FD.

        The properties stay, and the device stays read-only whatever `fd` allows. Gives the device a new
        `diskseq`.

        Raises OSError: EINVAL if the device is not read-only or the sizes differ, ENXIO if it is not bound.
        """
        _ioctl(self.fileno(), Request.LOOP_CHANGE_FD, _valid_fd(fd))

    def clear_fd(self) -> None:
        """Unbind: LOOP_CLR_FD. Returning does not mean that the device is unbound.

        Before Linux 6.11 the only opener unbinds at once. With other openers (of a partition, a mount, swap),
        and always since 6.11, the kernel sets autoclear and unbinds at the last close, the caller's included.
        Since 6.11 a device with no other opener admits no new one meanwhile (ENXIO). See `clear_fd_wait`.

        Raises OSError: ENXIO if the device is not bound or already on its way.
        """
        _ioctl(self.fileno(), Request.LOOP_CLR_FD)

    def clear_fd_wait(self, fd: int, timeout: float, wait: float = 0.1) -> None:
        """Unbind, and wait until nobody can reach the file `fd` through this device any more.

        On return the device is unbound, or bound to another file by somebody else, or (Linux 6.11 and later,
        where a device is never unbound while it is open) nobody but this Loop has it open, nobody else can
        open it, and requests that reach it fail. In that last case the kernel lets go of the file in `close`,
        and not before: `backing_file` still names it. So close the Loop before the file's file system is
        unmounted.

        Args:
            fd: the file to wait for; files are compared by device and inode
            timeout: seconds to wait at most; there is always one try
            wait: seconds between two looks at the device

        Raises TimeoutError when others still have the device open after `timeout` seconds; autoclear is set
        by then, so it is unbound when the last of them closes it. Any other failure is an OSError and ends
        the wait.
        """
        file = os.fstat(_valid_fd(fd))
        deadline = time.monotonic() + timeout
        while True:
            try:
                # Looking comes first: between two rounds the device may have been unbound and taken by a
                # stranger, whose binding must not be cleared.
                if not self.get_status().is_bound_to(file):
                    return
                self.clear_fd()
                if not self.get_status().is_bound_to(file):
                    return
            except OSError as error:
                if error.errno != errno.ENXIO:  # unbound, or in rundown
                    raise
                return
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError(
                    errno.ETIMEDOUT, f"{self.devname} is open elsewhere, and unbound when that is closed"
                )
            time.sleep(min(wait, remaining))

    def is_bound_to(self, fd: int) -> bool:
        """Whether the device is bound to the file `fd`, by device and inode; False if it is not bound at all.

        Raises OSError for any failure other than not being bound.
        """
        file = os.fstat(_valid_fd(fd))
        try:
            return self.get_status().is_bound_to(file)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return False

    # -- properties --

    def get_status(self) -> LoopInfo:
        """The properties of a bound device: LOOP_GET_STATUS64.

        Asks the backing file's file system for its device and inode, and waits for the answer.

        Raises OSError: ENXIO if the device is not bound, or on its way to be unbound (Linux 6.11).
        """
        return _unpack_info(_ioctl(self.fileno(), Request.LOOP_GET_STATUS64, bytes(_INFO.size)))

    def set_status(
        self,
        offset: int | None = None,
        sizelimit: int | None = None,
        autoclear: bool | None = None,
        partscan: bool | None = None,
        read_only: bool | None = None,
    ) -> None:
        """Change properties of a bound device: LOOP_SET_STATUS64. None leaves one as it is; 0 is a value.

        Reads the status, changes it and writes it back, which is not atomic. A change of `offset` or
        `sizelimit` resizes the device under those that use it.

        Raises ValueError, and changes nothing, for what the kernel would silently ignore: `read_only` other
        than the device was bound with, and `partscan` off where it is on. OSError: EPERM without write access
        to the device and CAP_SYS_ADMIN; EAGAIN if dirty pages are left (Linux before 6.1); EBUSY possible
        where somebody holds the device with O_EXCL; ENXIO if it is not bound.
        """
        info = self.get_status()
        flags = info.lo_flags
        if read_only is not None and bool(read_only) != info.read_only:
            raise ValueError("read_only is settled when the file is bound: use configure(read_only=...)")
        if partscan is not None:
            if info.partscan and not partscan:
                raise ValueError("partscan cannot be turned off while the device is bound")
            flags |= LO_FLAGS_PARTSCAN if partscan else 0
        if autoclear is not None:
            flags = flags | LO_FLAGS_AUTOCLEAR if autoclear else flags & ~LO_FLAGS_AUTOCLEAR
        info = info._replace(
            lo_offset=info.lo_offset if offset is None else _window("offset", offset),
            lo_sizelimit=info.lo_sizelimit if sizelimit is None else _window("sizelimit", sizelimit),
            lo_flags=flags,
        )
        _ioctl(self.fileno(), Request.LOOP_SET_STATUS64, _pack_info(info))

    def set_capacity(self) -> None:
        """Take over the size of the backing file after it changed: LOOP_SET_CAPACITY.

        Raises OSError: ENXIO if the device is not bound, EPERM as `set_status`.
        """
        _ioctl(self.fileno(), Request.LOOP_SET_CAPACITY)

    def set_direct_io(self, dio: bool = True) -> None:
        """Turn direct I/O on or off: LOOP_SET_DIRECT_IO, Linux 4.10.

        With it, data is not cached twice and the file's pages do not fill the memory.

        Raises OSError: EINVAL where the file system, the offset or the block size does not allow it, ENXIO if
        the device is not bound, EPERM as `set_status`.
        """
        _ioctl(self.fileno(), Request.LOOP_SET_DIRECT_IO, 1 if dio else 0)

    def set_block_size(self, size: int) -> None:
        """Change the logical block size: LOOP_SET_BLOCK_SIZE, Linux 4.14. Better given to `configure`.

        Args:
            size: bytes, a power of two from 512 to the page size; anything else is a ValueError

        Raises OSError: EBUSY where somebody else holds the device with O_EXCL (it is mounted, for one),
        EAGAIN if dirty pages are left (Linux before 6.1), ENXIO if the device is not bound, EPERM as
        `set_status`.
        """
        _ioctl(self.fileno(), Request.LOOP_SET_BLOCK_SIZE, _valid_block_size(size))

    def size(self) -> int:
        """The size of the device, bytes; 0 if it is not bound: BLKGETSIZE64"""
        return int(_U64.unpack(_ioctl(self.fileno(), Request.BLKGETSIZE64, bytes(_U64.size)))[0])

    def sector_size(self) -> int:
        """The logical block size, bytes: BLKSSZGET"""
        return int(_INT.unpack(_ioctl(self.fileno(), Request.BLKSSZGET, bytes(_INT.size)))[0])

    def read_only(self) -> bool:
        """Whether the block layer refuses writes to the device: BLKROGET"""
        return bool(_INT.unpack(_ioctl(self.fileno(), Request.BLKROGET, bytes(_INT.size)))[0])

    def diskseq(self) -> int | None:
        """The identity of the present binding: BLKGETDISKSEQ. None before Linux 5.15.

        It changes when the device is made, bound, given another file, and unbound, and no value ever comes
        again on any disk until the next boot. A device whose diskseq is the one that was seen before is still
        the same.
        """
        try:
            return int(_U64.unpack(_ioctl(self.fileno(), Request.BLKGETDISKSEQ, bytes(_U64.size)))[0])
        except OSError as error:
            # The block layer passes on what it does not know, and the loop driver calls that EINVAL.
            if error.errno not in (errno.EINVAL, errno.ENOTTY):
                raise
            return None

    # -- partitions --

    def partitions(self) -> list[int]:
        """The numbers of the partitions that the kernel has for this device, sorted; from sysfs"""
        self.fileno()
        split = [name.partition(f"{self.devname}p") for name in os.listdir(f"{sysfs}/block/{self.devname}")]
        return sorted(int(number) for before, _, number in split if not before and number.isdigit())

    def add_partition(self, number: int, start: int, length: int) -> None:
        """Make the partition `number` of `length` bytes at `start`: BLKPG. Writes nothing to the device.

        Left over at an unbind, it shows the next file that is bound (Linux 6.18; not with partscan, not since
        7.2): delete it before.

        Raises ValueError for negative numbers. OSError: EACCES without CAP_SYS_ADMIN; EBUSY if it exists or
        overlaps another; EINVAL if it does not fit the device or its logical blocks.
        """
        if number <= 0 or length <= 0:
            raise ValueError(f"not a partition: number {number} of {length} bytes")
        start, length = _window("start", start), _window("length", length)
        _blkpg(self.fileno(), _BLKPG_ADD_PARTITION, number, start, length)

    def delete_partition(self, number: int) -> None:
        """Take the partition `number` away: BLKPG. Writes nothing to the device.

        Raises OSError: EACCES without CAP_SYS_ADMIN; EBUSY if it is in use; ENXIO if there is none.
        """
        if number <= 0:
            raise ValueError(f"not a partition number: {number}")
        _blkpg(self.fileno(), _BLKPG_DEL_PARTITION, number)

    def reread_partitions(self) -> None:
        """Have the kernel read the partition table again: BLKRRPART.

        Raises OSError: EACCES without CAP_SYS_ADMIN; EBUSY if a partition is open; EINVAL if partscan is off.
        """
        _ioctl(self.fileno(), Request.BLKRRPART)

    # -- the open device and its node --

    def flock(self, op: int) -> None:
        """Lock or unlock the device with flock(2): ``fcntl.LOCK_EX``, ``LOCK_SH``, ``LOCK_UN``, ``LOCK_NB``.

        udev keeps off a device that is locked exclusively (https://systemd.io/BLOCK_DEVICE_LOCKING), but
        tries again and again, and ``udevadm settle`` on the host waits meanwhile: lock for moments. The lock
        belongs to the open file and goes with its last copy. It keeps nobody else from using the device.

        Raises BlockingIOError with LOCK_NB if somebody else has the lock; without, waits for as long as it
        takes.
        """
        fcntl.flock(self.fileno(), op)

    def flush_buf(self) -> None:
        """Write the device's dirty pages to the file and drop its page cache: BLKFLSBUF.

        Before `clear_fd` on kernels that unbind at once (before 6.11), where the cache outlives the binding.

        Raises OSError: EACCES without CAP_SYS_ADMIN.
        """
        _ioctl(self.fileno(), Request.BLKFLSBUF)

    def mknod(self, dir_fd: int, mode: int = 0o600) -> None:
        """Make a node of this device's name in the directory `dir_fd`.

        The node stands for the device, not for the binding: who keeps it can open whatever is bound to this
        number later.

        Args:
            dir_fd: the directory; an O_PATH fd will do
            mode: permissions, less the umask

        Raises OSError: FileExistsError if the name is taken (a symbolic link is not followed), EPERM without
        CAP_MKNOD, and as mknodat(2) does. The node may exist and still not open, where the directory is on a
        ``nodev`` mount or one made in a user namespace.
        """
        self.fileno()
        os.mknod(self.devname, stat.S_IMODE(mode) | stat.S_IFBLK, self.rdev, dir_fd=_valid_fd(dir_fd))


class LoopControl:
    """``/dev/loop-control``: makes, removes and finds loop devices.

    Attributes:
        fd: the open control device; -1 after `close`
    """

    LOOP_CTL_ADD = Request.LOOP_CTL_ADD
    LOOP_CTL_REMOVE = Request.LOOP_CTL_REMOVE
    LOOP_CTL_GET_FREE = Request.LOOP_CTL_GET_FREE

    def __init__(self, dir_fd: int | None = None) -> None:
        """Open ``loop-control`` in the directory `dir_fd`, or in /dev.

        Raises OSError as open(2) does: ENOENT where the loop module is not loaded and nothing loads it.
        """
        flags = os.O_RDWR | os.O_CLOEXEC
        if dir_fd is None:
            self.fd = os.open("/dev/loop-control", flags)
        else:
            self.fd = os.open("loop-control", flags, dir_fd=_valid_fd(dir_fd))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close; nothing but a further `close`, which does nothing, is valid afterwards"""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def fileno(self) -> int:
        """The open control device's file descriptor; RuntimeError after `close`"""
        if self.fd < 0:
            raise RuntimeError("loop control is closed")
        return self.fd

    def add(self, minor: int = -1) -> int:
        """Make a device, and give its number: LOOP_CTL_ADD.

        Args:
            minor: the number it is to have; negative for the lowest that does not exist

        The new device is anybody's: `get_unbound` may name it to another process before it is bound here.

        Raises OSError: EEXIST if there is such a device.
        """
        return _ioctl(self.fileno(), Request.LOOP_CTL_ADD, _valid_number(minor) if minor >= 0 else -1)

    def remove(self, minor: int = -1) -> None:
        """Remove the unbound, unopened device `minor`: LOOP_CTL_REMOVE. Takes some 50 ms.

        Raises OSError: EBUSY if it is bound or open, perhaps by udev for a moment; ENODEV if there is none;
        EINVAL for a negative number (Linux before 5.14 removes the first unbound device instead).
        """
        _ioctl(self.fileno(), Request.LOOP_CTL_REMOVE, _valid_number(minor) if minor >= 0 else -1)

    def get_unbound(self) -> int:
        """The lowest number of an unbound device, which is made if there is none: LOOP_CTL_GET_FREE.

        Nothing is reserved: the next process that asks gets the same number.
        """
        return _ioctl(self.fileno(), Request.LOOP_CTL_GET_FREE)

    def loop_for_fd(
        self,
        fd: int,
        lock: bool = False,
        setup: Callable[[Loop], object] | None = None,
        *,
        offset: int | None = None,
        sizelimit: int | None = None,
        blocksize: int = 0,
        autoclear: bool | None = None,
        partscan: bool | None = None,
        read_only: bool | None = None,
        direct_io: bool = False,
        ref: bytes = b"",
        dir_fd: int | None = None,
        timeout: float = 10.0,
    ) -> Loop:
        """Find or make an unbound device, bind the file `fd` to it, and give the open device.

        Others bind devices at the same time, so a device may be gone between being found and being bound;
        then the next one is tried, a bounded number of times and for a bounded time. A device that stays
        unusable though it is free (somebody keeps it locked, or open with O_EXCL) is left aside and a new one
        is made.

        Args:
            lock: lock the device exclusively (see `Loop.flock`) before it is bound, and leave it locked
            setup: called with each device that is tried, after it was opened and before anything else is done
                with it. What it raises goes to the caller. A device that is given up is closed, and its
                `on_close` called.
            dir_fd: the directory with the device nodes; /dev if None
            timeout: seconds for all tries. A bind that has begun is not interrupted.
            others: as for `Loop.configure`

        Raises ValueError for a bad argument, before any device is touched; TimeoutError if no device was to
        be had; OSError as `Loop` and `Loop.configure` for anything that another try would not cure.
        """
        self.fileno()
        config = _pack_config(
            fd, offset=offset, sizelimit=sizelimit, blocksize=blocksize, autoclear=autoclear,
            partscan=partscan, read_only=read_only, direct_io=direct_io, ref=ref,
        )  # fmt: skip
        if dir_fd is not None:
            _valid_fd(dir_fd)
        deadline = time.monotonic() + timeout
        named: dict[int, float] = {}
        strikes: dict[int, int] = {}
        cause: OSError | None = None
        for attempt in range(_ATTEMPTS):
            number = self.get_unbound()
            if strikes.get(number, 0) >= _STRIKES:
                number = self.add()
            try:
                lo = _open_found(number, dir_fd, named.setdefault(number, time.monotonic()) + _NODE_WAIT)
                _take(lo, config, setup, min(time.monotonic() + _LOCK_WAIT, deadline) if lock else None)
                return lo
            except _LostError as lost:
                cause = lost.cause
                strikes[number] = strikes.get(number, 0) + lost.strikes
            left = deadline - time.monotonic()
            if left <= 0:
                break
            time.sleep(min(left, _pause(attempt)))
        raise TimeoutError(errno.ETIMEDOUT, f"no loop device was to be had, the last for: {cause}") from cause


class _LostError(Exception):
    """Somebody else was faster, or is in the way: the next try may have more luck."""

    def __init__(self, cause: OSError, strikes: int = 0) -> None:
        self.cause = cause
        self.strikes = strikes
        """how far this speaks against trying the same device again; see _STRIKES"""


# What opening a device that GET_FREE has just named may fail with though nothing is wrong.
_DEVICE_GONE = {
    errno.ENXIO,  # bound, and now being unbound, by another (Linux 6.11); or removed, where the node is kept
    errno.ENODEV,  # removed by another between lookup and open
}
_NODE_UNREADY = {
    errno.ENOENT,  # removed by another; or the node is made by udev, without devtmpfs
    errno.EACCES,  # udev has not given the node to its group yet; root does not see this
}


def _open_found(number: int, dir_fd: int | None, node_deadline: float) -> Loop:
    try:
        return Loop(number, dir_fd)
    except OSError as error:
        patient = time.monotonic() < node_deadline
        if error.errno in _DEVICE_GONE or (patient and error.errno in _NODE_UNREADY):
            raise _LostError(error) from None
        raise


def _take(lo: Loop, config: bytes, setup: Callable[[Loop], object] | None, lock_deadline: float | None) -> None:
    """Set up, lock if there is a deadline for that, and bind; close `lo` on any failure."""
    try:
        if callable(setup):
            setup(lo)
        if lock_deadline is not None:
            _lock(lo, lock_deadline)
        try:
            _ioctl(lo.fileno(), Request.LOOP_CONFIGURE, config)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            # Bound, or being unbound, by another: that is not ours to clear. Or somebody has it open with
            # O_EXCL; a device that is free by now may also have been bound for a moment only, so that is one
            # strike.
            raise _LostError(error, 0 if _is_bound(lo) else 1) from None
    except BaseException:
        lo.close()
        raise


def _lock(lo: Loop, deadline: float) -> None:
    """LOCK_EX, while the device is unbound and the deadline has not passed."""
    attempt = 0
    while True:
        try:
            return lo.flock(fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            # udev probes the device, or another is about to bind it. Waiting is better than another try:
            # closing the device here would make udev probe it once more.
            bound = _is_bound(lo)
            if bound or time.monotonic() >= deadline:
                raise _LostError(error, 0 if bound else _STRIKES) from None
        time.sleep(_pause(attempt))
        attempt += 1


def _is_bound(lo: Loop) -> bool:
    # Not by get_status: that asks the file system of a stranger's file, which may never answer.
    return backing_file(lo.minor) is not None


def _pause(attempt: int) -> float:
    """Seconds, a little longer each time, less a random half so that those who met once do not meet again."""
    return min(_PAUSE_MAX, 0.0003 * (attempt + 1)) * (0.5 + os.urandom(1)[0] / 512)


def supports_configure(control: LoopControl, dir_fd: int | None = None) -> bool:
    """Whether the kernel has LOOP_CONFIGURE (Linux 5.8, or an older one with a backport). Binds nothing.

    Asks for a bind of the file descriptor -1. A kernel that knows the ioctl looks at that first, and says
    EBADF before it looks at the device: so it does no harm even if another has bound the device by then. The
    device is one that `LoopControl.get_unbound` names; it is opened read-only, since udev probes a device
    when a writer closes it, through its node in the directory `dir_fd`, or in /dev.

    Raises OSError as open(2) does where no device can be opened.
    """
    attempt = 0
    while True:
        minor = control.get_unbound()
        try:
            fd = _open_node(minor, os.O_RDONLY, dir_fd)
        except OSError as error:
            attempt += 1
            if attempt == _PROBE_ATTEMPTS or error.errno not in _DEVICE_GONE | _NODE_UNREADY:
                raise
            time.sleep(_pause(attempt))
            continue
        try:
            _identify(fd, minor)
            return _knows_configure(fd)
        finally:
            os.close(fd)


def _knows_configure(device: int) -> bool:
    try:
        _ioctl(device, Request.LOOP_CONFIGURE, _CONFIG.pack(2**32 - 1, 0, _pack_info(LoopInfo())))
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOTTY, errno.ENOSYS):
            return False
        if error.errno != errno.EBADF:
            raise
    return True


def backing_file(minor: int) -> str | None:
    """The path of the file that the device `minor` holds, from sysfs; None if there is no file or no device.

    Opens nothing, so it neither delays an unbind nor wakes udev. Unlike `Loop.get_status` it also names a
    file whose device is being unbound (Linux 6.11): when it gives None, the kernel has let go of the file.
    The path is that of the binder's mount namespace, with `` (deleted)`` after it if so.
    """
    try:
        with open(f"{sysfs}/block/loop{_valid_number(minor)}/loop/backing_file", "rb") as attribute:
            path = attribute.read()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENODEV):  # ENODEV: unbound between open and read
            raise
        return None
    return os.fsdecode(path[:-1]) or None
