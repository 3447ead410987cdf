"""What is done to a device after its attach: nodes kept in line with its partitions, resize, release, and tidying up.

Every job opens the device anew by its number and checks that it still carries the lease's binding. The lease's
directory and file are in its slot.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

from loopd.kernel.transport import FdSet
from loopd.loop import Loop, UnexpectedDevice, backing_file
from loopd.protocol.wire import Code, Refusal
from loopd.worker import bind, devices, nodes, partitions, records
from loopd.worker.attach import add_watch, limit_partitions, wanted_nodes
from loopd.worker.devices import Binding
from loopd.worker.messages import (
    Arrange,
    Arranged,
    Clear,
    Displace,
    Displaced,
    Finished,
    Inspect,
    Inspected,
    Nudge,
    Resize,
    Resized,
    Revoke,
    Sweep,
    Tidied,
    Tidy,
    Unbind,
    Unbound,
)
from loopd.worker.nodes import Client, Directory, Node
from loopd.worker.process import Tools, Worker


@contextlib.contextmanager
def kept(slot: int, client: Client) -> Iterator[tuple[Directory | None, int | None]]:
    """The lease's directory and file, out of its slot."""
    stored = records.read(slot, every_fd=True)
    with FdSet(stored.fds.values() if stored else ()):
        fds = stored.fds if stored else {}
        directory = nodes.directory(fds["directory"], client) if "directory" in fds else None
        yield directory, fds.get("file")


def _there(directory: Directory, job: Arrange | Displace, wanted: dict[str, nodes.Numbers]) -> list[Node]:
    """The nodes that are there, of which the `wanted` ones stay."""
    if job.sure:
        return list(job.nodes)
    # Nodes are closed first: a look into the directory may take as long as the client likes.
    nodes.revoke(directory, (node for node in job.nodes if wanted.get(node.name) != (node.major, node.minor)))
    binding = job.binding
    if binding.whole:
        nodes.revoke_partitions(directory, binding.devname, wanted.get)
    return nodes.find(directory, binding.node, wanted_nodes(binding, devices.MOST_PARTITIONS), whole=binding.whole)


@contextlib.contextmanager
def _device(tools: Tools, binding: Binding, *, write: bool = False) -> Iterator[Loop | None]:
    """The device while it carries the binding, open for a moment; None when it does not, or is gone."""
    with contextlib.ExitStack() as stack:
        loop = None
        # ENXIO: it is being unbound (Linux 6.11); ENOENT, ENODEV: it was unbound and removed.
        with contextlib.suppress(OSError, UnexpectedDevice):
            loop = stack.enter_context(tools.access.reopened(binding.number, write=write))
            if not bind.carries(loop, binding):
                loop = None
        yield loop


# Release ----------------------------------------------------------------------------------------------------------


def displace(worker: Worker, job: Displace, fds: FdSet) -> bool:
    """Remove the lease's nodes."""
    left = []
    with kept(fds.borrow(0), job.client) as (directory, _):
        if directory is not None:
            left = list(job.nodes)
            with contextlib.suppress(OSError):
                left = nodes.displace(directory, _there(directory, job, {}))
    if job.grant.startswith("."):
        worker.tools.grants.unmake(job.grant)
    worker.say(Displaced(tuple(left)), last=True)
    return True


def unbind(worker: Worker, job: Unbind, fds: FdSet) -> bool:
    """Have the kernel unbind the device, and write back."""
    tools = worker.tools
    lost = diskseq = None
    with _device(tools, job.binding) as loop:
        if loop is not None:
            diskseq = loop.diskseq()
            lost = bind.let_go(loop, sync=not job.again)
        tools.bindings.forget(job.row)
        # The device's last open fd may be in the slot: the lock, where the client asked to keep it.
        records.note_released(fds.borrow(0))
    worker.say(Unbound(loop is not None, lost, diskseq))
    return False


def clear(worker: Worker, job: Clear, fds: FdSet) -> bool:
    """Empty a lease's slot and row. For a worker: closing the slot's fds may take long."""
    worker.tools.bindings.forget(job.row)
    records.clear(fds.borrow(0))
    worker.say(Finished())
    return False


def nudge(worker: Worker, job: Nudge, fds: FdSet) -> bool:
    """Once more have the kernel unbind a device at its last close: a client that has it open may have cleared
    autoclear.
    """
    with contextlib.suppress(OSError, UnexpectedDevice), worker.tools.access.reopened(job.number) as loop:
        if loop.diskseq() == job.diskseq:
            bind.let_go(loop, sync=False)
    worker.say(Finished())
    return False


def tidy(worker: Worker, job: Tidy, fds: FdSet) -> bool:
    """Release the binding of a row, which no lease has."""
    tools, row = worker.tools, job.row
    file, lost = backing_file(row.number), None
    if file is not None:
        binding = _of_row(row.number, row.file_dev, row.file_inode, row.diskseq)
        with _device(tools, binding) as loop:
            if loop is None:
                file = None
            else:
                lost = bind.let_go(loop)
    tools.bindings.forget(row.row)
    worker.say(Tidied(file, lost))
    return False


def sweep(worker: Worker, job: Sweep, fds: FdSet) -> bool:
    """Remove what is left in directories of loopd's own."""
    # Whatever these numbers are bound to by now: the nodes are those of a lease that is lost.
    lost = set(job.numbers)
    worker.tools.grants.sweep(
        job.before, lambda name: int(name[4:]) not in lost and backing_file(int(name[4:])) is not None
    )
    return inspect(worker, job, fds)


def inspect(worker: Worker, job: Inspect | Sweep, fds: FdSet) -> bool:
    """Look at the numbers that grants own, and tidy up behind grants that are gone."""
    owned = worker.tools.grants.owned()
    blocks = {number // job.block: number for number in owned}
    worker.say(Inspected(tuple(blocks.values()), tuple(devices.idle(owned))), last=True)
    return True


def _of_row(number: int, dev: int, inode: int, diskseq: int | None) -> Binding:
    """A binding of which the row is all that is known."""
    file = f"{os.major(dev)}:{os.minor(dev)}"
    return Binding(number, f"loop{number}", 0, 0, diskseq, 0, 0, 0, 512, False, False, False, "", file, inode, "")


# Partitions -------------------------------------------------------------------------------------------------------

UNREAD = -1
"""In place of a checksum of the table: the kernel was asked to read the table, and did not."""


def revoke(worker: Worker, job: Revoke, fds: FdSet) -> bool:
    """Close the nodes of partitions that are gone."""
    with kept(fds.borrow(0), job.client) as (directory, _):
        if directory is not None:
            nodes.revoke_partitions(directory, job.devname, lambda name: _present(name, job.devname))
    worker.say(Finished())
    return False


def _present(name: str, disk: str) -> nodes.Numbers | None:
    """The number of a partition that the kernel has now."""
    with contextlib.suppress(OSError):
        return devices.device_number(name, disk)
    return None


def arrange(worker: Worker, job: Arrange, fds: FdSet) -> bool:
    """Bring the nodes in line with the partitions."""
    try:
        with kept(fds.borrow(0), job.client) as (directory, file):
            if job.rescan and not job.binding.partscan:
                _begin_to_look(worker.tools, job.binding)
                records.note_partscan(fds.borrow(0))
                job = job._replace(binding=job.binding._replace(partscan=True))
            arranged = _arrange(worker.tools, job, directory, file)._replace(partscan=job.binding.partscan)
    except Refusal as refusal:
        arranged = Arranged(refusal)
    except OSError as error:
        arranged = Arranged(Refusal(Code.IO, f"the partitions cannot be read: {error}"))
    worker.say(arranged, last=True)
    return True


def _arrange(tools: Tools, job: Arrange, directory: Directory | None, file: int | None) -> Arranged:
    binding, refusal = job.binding, None
    room = job.room if binding.partscan else 0
    table = job.table
    if file is not None and (job.look or job.rescan):
        with contextlib.suppress(OSError):  # its disk fails: the table of the last look stays
            table = partitions.look(file, binding)
    there: list[Node] = []
    if directory is not None:
        there = _there(directory, job, wanted_nodes(binding, room))
    if job.rescan or job.table not in (None, table):
        try:
            _reread(tools, binding, directory, there)
        except Refusal as error:
            # Most likely a partition is in use. The next close of the node has the table looked at again.
            refusal, table = (error, UNREAD) if job.rescan else (None, job.table)
    if directory is None:
        found = tuple(devices.partition_names(binding.devname, room))
        return Arranged(refusal, (), None, table, found, *_limit(tools, binding, job.room))
    wanted = wanted_nodes(binding, room)
    there = nodes.prune(directory, there, wanted)
    count, excess = _limit(tools, binding, job.room)  # what is too much has no node by now
    if not job.sure:
        nodes.finish(directory, there, read_only=binding.read_only)
    names = {node.name for node in there}
    missing = {name: device for name, device in wanted.items() if name not in names}
    there += nodes.add(directory, missing, read_only=binding.read_only)
    watch = add_watch(tools.watches, directory, binding) if binding.partscan else None
    extents = devices.extents(binding.devname, room) if binding.windows else ()
    return Arranged(refusal, tuple(there), watch, table, (), count, excess, extents)


def _begin_to_look(tools: Tools, binding: Binding) -> None:
    """Have the kernel look for partitions on a device that was attached without partscan."""
    with _device(tools, binding, write=not binding.read_only) as loop:
        if loop is None:
            raise Refusal(Code.NOT_FOUND, f"{binding.devname} carries another binding by now")
        loop.set_status(partscan=True)


def _limit(tools: Tools, binding: Binding, room: int) -> tuple[int, int]:
    """Delete the partitions beyond those that the device may have, also where the client has looked for partitions
    itself without partscan. How many there are now, and how many were too many.
    """
    count = len(devices.partition_names(binding.devname))
    # Opened only then: an open of loopd's may keep a client's close from being the last.
    if count > room:
        with _device(tools, binding) as loop:
            if loop is not None:
                return limit_partitions(loop, room)
    return count, 0


def _reread(tools: Tools, binding: Binding, directory: Directory | None, there: list[Node]) -> None:
    """Have the kernel read the table.

    While the kernel reads, which may take long, the numbers of the partitions are free for other disks' partitions. So
    their nodes have mode 0 for that time. A node whose partition has the same number afterwards gets its mode back, and
    was never away.
    """
    with _device(tools, binding) as loop:
        if loop is None:
            raise Refusal(Code.NOT_FOUND, f"{binding.devname} carries another binding by now")
        of_partitions = [node for node in there if node.name != binding.devname]
        if directory is None or not of_partitions:
            partitions.reread(loop)
            return
        _check_claims(tools, binding)
        closed = nodes.close(directory, of_partitions)
        try:
            partitions.reread(loop)
        finally:
            wanted = devices.partitions(binding.devname)
            same = [(node, mode) for node, mode in closed if wanted.get(node.name) == (node.major, node.minor)]
            nodes.reopen(directory, same)


def _check_claims(tools: Tools, binding: Binding) -> None:
    """Refuse where a partition is mounted or claimed otherwise: the kernel would refuse too, after nodes were closed.
    """
    try:
        with tools.access.reopened(binding.number, exclusive=True):
            pass
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise Refusal(Code.BUSY, f"a partition is in use: {error}") from error
        raise


def resize(worker: Worker, job: Resize, fds: FdSet) -> bool:
    """Have the device take over its file's size, if that is within the account's limit."""
    try:
        with _device(worker.tools, job.binding, write=not job.binding.read_only) as loop:
            if loop is None:
                raise Refusal(Code.NOT_FOUND, f"{job.binding.devname} carries another binding by now")
            resized = _resize(loop, job)
    except Refusal as refusal:
        resized = Resized(refusal)
    except OSError as error:
        resized = Resized(Refusal(Code.IO, f"the size cannot be taken over: {error}"))
    worker.say(resized, last=True)  # the device is closed by now
    return True


def _resize(loop: Loop, job: Resize) -> Resized:
    if loop.get_status().lo_sizelimit != job.binding.sizelimit:  # a resize was refused before
        loop.set_status(sizelimit=job.binding.sizelimit)
    loop.set_capacity()
    if job.room is not None and loop.size() > job.room:
        loop.set_status(sizelimit=max(1, job.binding.size))  # 0 is no limit; less than a sector is none
        raise Refusal(Code.QUOTA, "the devices of this account would have more bytes than its limit")
    return Resized(None, job.binding._replace(size=loop.size()))
