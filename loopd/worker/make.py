"""Make device numbers and remove them again, in a child with threads.

LOOP_CTL_ADD takes half a millisecond and LOOP_CTL_REMOVE up to fifty, for an RCU grace period; many at once take hardly
longer than one.

A number lingers when somebody has its device open: it cannot be removed. Such a device is parked: bound to an empty
file. Idle, LOOP_CTL_GET_FREE would give it to the host, and its opener would read what the host binds to it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable

from loopd.children.child import Channel
from loopd.loop import Loop, LoopControl, UnexpectedDevice, backing_file
from loopd.worker import devices
from loopd.worker.access import Access

FIRST = 4096
"""The first number of loopd's range; those below are the host's."""
THREADS = 32
LOW_FREE = 4
"""Devices below the range that are kept free, for the host's ``losetup -f`` to find before it finds one of loopd's."""


def make(channel: Channel, control: LoopControl, access: Access) -> None:
    """Be the child that makes numbers: answer each (operation, number) with (operation, number, errno), in any order.
    """
    import queue  # noqa: PLC0415  # nothing waits for this child, and the main process starts faster without
    import threading  # noqa: PLC0415

    jobs: queue.Queue[tuple[str, int]] = queue.Queue()
    threads: list[threading.Thread] = []

    def serve_one() -> None:
        operation, number = jobs.get()
        error = 0
        try:
            _OPERATIONS[operation](control, access, number)
        except OSError as failure:
            error = failure.errno or errno.EIO
        with contextlib.suppress(OSError):
            channel.send((operation, number, error))
        jobs.task_done()

    def serve() -> None:
        while True:
            serve_one()

    while True:
        try:
            jobs.put(channel.receive()[0])
        except EOFError:
            os._exit(0)  # the main process is gone: the next one finds what is left to remove
        if len(threads) < min(jobs.unfinished_tasks, THREADS):
            thread = threading.Thread(target=serve, daemon=True)
            try:
                thread.start()
                threads.append(thread)
            except RuntimeError:  # TasksMax=: the threads that there are do it, or this one
                if not threads:
                    serve_one()


def _add(control: LoopControl, access: Access, number: int) -> None:
    control.add(number)


def _keep_low_free(control: LoopControl, access: Access, number: int) -> None:
    """Have `LOW_FREE` free devices below the range."""
    free = 0
    for low in range(FIRST):
        if devices.size(f"loop{low}") is None:
            with contextlib.suppress(FileExistsError):
                control.add(low)
        if backing_file(low) is None:
            free += 1
            if free == LOW_FREE:
                return


def _probe(control: LoopControl, access: Access, number: int) -> None:
    """Whether opening a node makes its removed device again: raises OSError(EEXIST) if so."""
    control.add(number)
    _remove_patiently(control, access, number)
    with access.stale_node(number) as path:
        try:
            os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        except OSError:
            return
    _remove_patiently(control, access, number)
    raise FileExistsError(errno.EEXIST, "made again")


PARKED = "/memfd:loopd-parked"
"""What sysfs names as the file of a device that was parked."""
PARKED_SIZE = 4096
"""Bytes of that file."""


def is_parked(devname: str, file: str) -> bool:
    """Whether a device of this file was parked. A client can bind a file of that name and size itself, and gains
    nothing.
    """
    return file.startswith(PARKED) and devices.size(devname) == PARKED_SIZE


_parked: dict[int, Loop] = {}
"""The devices that this child has parked."""


def _remove(control: LoopControl, access: Access, number: int) -> None:
    parked = _parked.pop(number, None)
    if parked is not None:
        parked.close()
    # LOOP_CTL_REMOVE takes the device's lock before it looks, and a client may hold that lock for as long as it likes
    # (LOOP_CHANGE_FD). Nor may a device that is bound be parked.
    if backing_file(number) is not None:
        raise OSError(errno.EBUSY, "it is bound")
    try:
        control.remove(number)
    except OSError as error:
        if error.errno == errno.EBUSY:
            _park(access, number)
        raise


def _remove_patiently(control: LoopControl, access: Access, number: int) -> None:
    """Remove it although udev may have it open for a moment."""
    for _ in range(PATIENCE_TRIES):
        try:
            _remove(control, access, number)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            time.sleep(PATIENCE_PAUSE)
        else:
            return
    raise OSError(errno.EBUSY, "somebody has it open")


PATIENCE_TRIES = 20
PATIENCE_PAUSE = 0.05
"""Seconds."""


def _park(access: Access, number: int) -> None:
    with contextlib.suppress(OSError, UnexpectedDevice), access.opened(number) as (loop, _):
        nothing = os.memfd_create("loopd-parked", os.MFD_CLOEXEC)
        try:
            os.ftruncate(nothing, PARKED_SIZE)
            loop.configure(nothing, autoclear=True, read_only=True)
        finally:
            os.close(nothing)
        _parked[number] = Loop.from_fd(os.dup(loop.fd))


def _hold(control: LoopControl, access: Access, number: int) -> None:
    """Park a device that nobody may have before it is removed."""
    _park(access, number)


_OPERATIONS: dict[str, Callable[[LoopControl, Access, int], object]] = {
    "add": _add,
    "hold": _hold,
    "remove": _remove,
    "remove last": _remove_patiently,
    "low": _keep_low_free,
    "probe": _probe,
}
