"""How a device is handed over: the ways to try, in which order, and the proof that what came is the device.

Changes when there is another way to hand a device over, or another order of them.
"""

from __future__ import annotations

import io
import os
import stat
from contextlib import ExitStack
from typing import Iterator, Literal, NamedTuple, Sequence

from loopd.client import layers
from loopd.client.errors import DeviceInaccessible, Error, Exists, NotPermitted, Undeliverable, Unsupported
from loopd.client.exchange import Fds
from loopd.client.inputs import StrPath, directory_grant, opened_directory, opened_grant
from loopd.client.layers import Obstacle
from loopd.protocol.wire import Attached

Deliver = Literal["node", "fd", "mount"]


class Way(NamedTuple):
    """A delivery that may work. `path` is the directory for the node, or for the mount.

    `kernel`: the directory is a devtmpfs, where the kernel makes the node.
    """

    deliver: tuple[Deliver, ...]
    dir_fd: int | None = None
    path: str = ""
    kernel: bool = False


def _inaccessible(what: str, obstacle: Obstacle, errno_: int = 0) -> DeviceInaccessible:
    return DeviceInaccessible(f"{what}: {obstacle.reason}", obstacle.hint, obstacle.layer, errno_)


def choices(directory: StrPath | int | None, stack: ExitStack) -> Iterator[Way | DeviceInaccessible]:
    """The ways to try where the caller asked for none, in this order, or why one cannot work."""
    grant = opened_grant(stack) if directory is None else None
    if grant is not None:
        found = layers.obstacle(grant[0], own=False)
        yield Way(("node",), *grant) if found is None else _inaccessible(grant[1], found)
    elif directory is None and os.path.isdir(directory_grant()):
        yield _inaccessible(directory_grant(), layers.not_this_users())
    fd, path = opened_directory("/dev" if directory is None else directory, stack)
    kernel = layers.is_devtmpfs(fd)
    way = Way(("fd",) if kernel else ("node",), fd, path, kernel)
    if directory is not None:
        yield way
        return
    found = layers.not_the_hosts(fd) if kernel else layers.obstacle(fd, own=True)
    yield way if found is None else _inaccessible(path, found)
    found = layers.no_mount()
    yield Way(("mount",)) if found is None else _inaccessible("a mount", found)


def ordered(deliver: Sequence[Deliver], directory: StrPath | int | None, stack: ExitStack) -> Way:
    """The way that the caller insists on."""
    deliver = tuple(deliver)
    if "node" in deliver:
        grant = opened_grant(stack) if directory is None else None
        return Way(deliver, *(grant or opened_directory("/dev" if directory is None else directory, stack)))
    if "mount" in deliver and directory is not None:
        return Way(deliver, *opened_directory(directory, stack))
    return Way(deliver)


def concerns_the_way(error: Error) -> bool:
    """Whether another way to hand the device over may work after this error."""
    if isinstance(error, DeviceInaccessible):
        return error.layer not in ("device cgroup", "device")  # no way is past these
    if isinstance(error, (NotPermitted, Unsupported)):
        return error.message.startswith(("dir_fd: ", "deliver: "))
    return isinstance(error, (Undeliverable, Exists))


def received(way: Way, attached: Attached, fds: Fds, open_device: bool) -> tuple[str, io.FileIO | None]:
    """Where the device is, and the device, open, if an fd of it was delivered. Attaches the mount, if `way` is one.

    A device at a path is opened to prove that it can be, and closed again: while this process has it open, a close by
    another writes nothing back into the image.
    """
    # The fds of a reply come in the order of the deliveries that have one.
    order = [name for name in way.deliver if name != "node"]
    with ExitStack() as stack:
        path, dir_fd = os.path.join(way.path, attached.devname), way.dir_fd
        if "mount" in way.deliver:
            mount = fds.take(order.index("mount"), "mount")
            path = _attached_mount(mount, attached.devname, way.path or None)
            dir_fd, _ = opened_directory(path, stack)
            path = os.path.join(path, attached.devname)
        file = None
        try:
            if "fd" in way.deliver and not way.kernel:
                fd = fds.take(order.index("fd"), "open device")
                file = io.FileIO(fd, "rb" if attached.read_only else "rb+")
                path = path if len(way.deliver) > 1 else f"/proc/self/fd/{fd}"
                _prove(file, path, attached)
            elif open_device and dir_fd is not None:
                with _opened_device(dir_fd, path, attached) as opened:
                    _prove(opened, path, attached)
        except BaseException:
            if file is not None:
                file.close()  # the detach that follows would find the device in use by this process
            raise
        return path, file


def _attached_mount(mount: int, devname: str, folder: str | None) -> str:
    """Attach a mount (consumed) in a directory that is made for it; the directory's path."""
    point = ""
    try:
        point = layers.make_mount_point(devname, folder)
        layers.attach_mount(mount, point)
    except OSError as error:
        if point:
            layers.remove_mount_point(point)
        known = layers.no_mount()
        if known is None:
            text = f"{error.strerror}: {error.filename}"
            known = Obstacle("mount", text, "seccomp or a security module may deny it: " + layers.BIND)
        raise _inaccessible(f"the mount of {devname} cannot be attached", known, error.errno or 0) from error
    finally:
        os.close(mount)
    return point


def reopened(path: str, attached: Attached) -> io.FileIO:
    """The device at its path. OSError as open(2)."""
    flags = os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_RDONLY if attached.read_only else os.O_RDWR)
    file = io.FileIO(path, "rb" if attached.read_only else "rb+", opener=lambda name, _: os.open(name, flags))
    try:
        _prove(file, path, attached)
    except BaseException:
        file.close()
        raise
    return file


def _opened_device(dir_fd: int, path: str, attached: Attached) -> io.FileIO:
    flags = os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_RDONLY if attached.read_only else os.O_RDWR)
    try:
        return io.FileIO(
            attached.devname,
            "rb" if attached.read_only else "rb+",
            opener=lambda name, _: os.open(name, flags, dir_fd=dir_fd),
        )
    except OSError as error:
        number = (attached.major, attached.minor)
        found = layers.unopened(dir_fd, attached.devname, number, attached.read_only, error.errno or 0)
        raise _inaccessible(f"{path} cannot be opened", found, error.errno or 0) from error


def _prove(file: io.FileIO, path: str, attached: Attached) -> None:
    """Check that the file that was opened is the device that was attached."""
    status = os.fstat(file.fileno())
    if not stat.S_ISBLK(status.st_mode) or status.st_rdev != os.makedev(attached.major, attached.minor):
        raise DeviceInaccessible(f"{path} is not {attached.devname}, the device that was attached", "", "device", 0)
