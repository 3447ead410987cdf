"""How loopd itself opens loop devices and the control device, and the lock that keeps udev off."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import time
from collections.abc import Iterator

from loopd import loop as lo
from loopd.kernel import rights
from loopd.loop import LOOP_MAJOR, Loop, LoopControl, UnexpectedDevice, supports_configure
from loopd.worker.devices import device_number

PRIVATE_NODES = "/run/loopd-nodes"
"""A directory of the service alone, on a mount without nodev (TemporaryFileSystem= in the unit)."""

LOOP_CONTROL = (10, 237)
"""MISC_MAJOR and LOOP_CTRL_MINOR of <linux/miscdevice.h>: fixed numbers."""

LOCK_TIMEOUT = 2.0
"""Seconds to wait for udev, which takes LOCK_SH on a new device for as long as it probes it."""


class Access:
    """How loopd itself opens a device: through a node of its own in a private directory, else through /dev.

    `/dev/loopN` is root's until udev changes it, and loopd runs as a user of its own. Given the root of a sysfs of
    loopd's own, the process looks up there from now on what the kernel says of devices.
    """

    def __init__(self, own_sysfs: int | None = None) -> None:
        self._sysfs = own_sysfs
        if own_sysfs is not None:
            lo.sysfs = f"/proc/self/fd/{own_sysfs}"
        self._private: int | None = None
        # systemd makes the mount point in the host's /run, and leaves it there. Only in the service is a tmpfs on it.
        if os.path.ismount(PRIVATE_NODES):
            self._private = os.open(PRIVATE_NODES, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    @property
    def fds(self) -> list[int]:
        """The fds of the service's own directory and sysfs, where it has them."""
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
    def reopened(self, number: int, *, write: bool = False, exclusive: bool = False) -> Iterator[Loop]:
        """A bound device for a moment; EBUSY where `exclusive` is asked and a mount or the like has claimed it.

        OSError as open(2): ENOENT or ENODEV where the number is removed, ENXIO while it is being unbound (Linux 6.11).
        """
        name = f"loop{number}"
        flags = os.O_RDWR if write else os.O_RDONLY
        flags |= (os.O_EXCL if exclusive else 0) | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
        with self._node(number) as directory:
            fd = os.open(name if directory is not None else f"/dev/{name}", flags, dir_fd=directory)
        try:
            loop = Loop.from_fd(fd)
        except BaseException:
            os.close(fd)
            raise
        with loop:
            if loop.minor != number:
                raise UnexpectedDevice(number, loop.rdev, 0)
            yield loop

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

    As root, whose node it is until udev has changed that; this takes no capability beyond what a client's directory
    needs. Where there is no such node there is no udev to keep off either, and any other open file description will do.
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


def lock(fd: int) -> None:
    """Take LOCK_EX against udev; BlockingIOError when udev has the device for too long."""
    deadline = time.monotonic() + LOCK_TIMEOUT
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.005)
