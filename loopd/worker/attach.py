"""Attach: vet the files, bind, make the nodes, prove them.

The lease is in its slot before the device is bound, and an attach that fails is undone. When the client is answered no
fd of the device is open any more, but for the fds that the client asked for, and the lock where it asked for that.
"""

from __future__ import annotations

import contextlib

from loopd.kernel import inotify, peers, rights
from loopd.kernel.transport import FdSet, Packet
from loopd.loop import Loop
from loopd.protocol.wire import Attach, Code, Refusal
from loopd.worker import access, bind, devices, files, nodes, partitions
from loopd.worker.bind import Bound
from loopd.worker.booking import Booking
from loopd.worker.devices import Binding
from loopd.worker.files import Backing
from loopd.worker.grants import detached_mount
from loopd.worker.messages import Done, Take, Terms
from loopd.worker.nodes import Client, Directory, Node
from loopd.worker.process import Worker

MKNOD_WARNING = (
    "the client has CAP_MKNOD: with b 7:* in its device cgroup it can reach every loop device; use --cap-drop MKNOD"
)


class Attaching:
    """One attach. `harmless` are the client's fds that can be closed without waiting."""

    def __init__(self, worker: Worker, job: Take, packet: Packet, pidfd: int | None, slot: int) -> None:
        assert job.attach is not None and job.terms is not None  # noqa: PT018
        self.harmless: set[int] = set()
        self._worker = worker
        self._tools = worker.tools
        self._request: Attach = job.attach
        self._terms: Terms = job.terms
        self._packet = packet
        self._pidfd = pidfd
        self._booking = Booking(worker, slot, job.row, job.holder or {}, job.terms.number)
        self._client = Client(packet.sender.uid, packet.sender.gid, False)
        self._grant = ""
        self._directory: Directory | None = None

    def run(
        self, grant: str, kept_by: str, fds: dict[str, int | None], numbers: tuple[int, ...]
    ) -> tuple[Done, list[int]]:
        """Attach. Returns the answer, and the fds for the client, which are the caller's. `fds` go into the record.
        `numbers` are the grant's own: the main process gives one of these when it is asked.
        """
        mounts = files.Mounts(self._packet.sender.pid)
        warnings = _check_mknod(self._packet.sender.pid, self._terms, mounts)
        backing, fd = self._vet_file(mounts)
        if self._pidfd is None or peers.ended(self._pidfd):  # another process may have its pid by now
            backing = backing._replace(view=files.CLIENT)
        self._grant = grant
        self._booking.kept_by = kept_by
        self._booking.holder["numbers"] = numbers
        if numbers:
            self._booking.number = None
        self._directory = self._vet_directory(mounts, grant)
        if self._directory is not None:
            self.harmless.update((self._directory.fd, self._directory.view))
        kept = fds | {"file": fd}
        windows = self._directory is not None and self._needs_windows(mounts)
        with contextlib.ExitStack() as undo:
            undo.callback(self._unmake_mount)
            bound = self._bind(bind.Request(fd, self._request, backing, windows), kept)
            with FdSet((bound.lock,)), bound.device as device:
                done, client = self._deliver(device, bound.binding)
            undo.pop_all()
        if backing.quiet:
            self.harmless.add(fd)  # the device has it open, too
        return done._replace(warnings=warnings), client

    # Vet --------------------------------------------------------------------------------------------------------------

    def _vet_file(self, mounts: files.Mounts) -> tuple[Backing, int]:
        fd = borrow(self._packet.fds, self._request.fd, "fd")
        terms = self._terms
        backing = files.check_backing(fd, self._request, mounts, terms.file_systems, block_devices=terms.block_devices)
        if not (terms.write or backing.read_only):
            raise Refusal(
                Code.NOT_PERMITTED, "the administrator allows this client read-only devices alone (loopd.toml)"
            )
        return backing, fd

    def _vet_directory(self, mounts: files.Mounts, grant: str) -> Directory | None:
        if "node" not in self._request.deliver or self._request.dir_fd is None:
            return None
        fd = borrow(self._packet.fds, self._request.dir_fd, "dir_fd")
        if grant:
            own = self._packet.own.add(self._tools.grants.open(grant))
            return nodes.directory(own, self._client._replace(own=True), fd)
        files.check_directory(fd, mounts, self._terms.file_systems)
        return nodes.directory(fd, self._client)

    # Bind -------------------------------------------------------------------------------------------------------------

    def _needs_windows(self, mounts: files.Mounts) -> bool:
        """Whether the client gets windows in place of nodes of the kernel's partitions.

        The kernel gives the number of a partition that is gone to the next one of whatever disk. A node of loopd's is
        closed by then (mode 0), which stops a client in a user namespace of its own without root, but neither who has
        CAP_DAC_OVERRIDE on the host nor who owns the node. Root of the host itself can open every device as it is.
        """
        if self._terms.kernel_partitions or (mounts.on_host and self._client.uid == 0):
            return False
        own = self._directory is not None and self._directory.own
        # Root of a rootful container can ask from a user namespace that it makes with other ids.
        return not own or self._grant.startswith("0-") or rights.may_count(self._packet.sender.pid)

    def _bind(self, request: bind.Request, fds: dict[str, int | None]) -> Bound:
        def prepare(expected: Binding, lock_fd: int) -> dict[str, int | None]:
            if "mount" in self._request.deliver:
                self._unmake_mount()
                self._make_mount(expected.devname)
            self._booking.holder["grant"] = self._grant
            directory = None if self._directory is None else self._directory.fd
            return fds | {"directory": directory, "lock": lock_fd if self._request.lock else None}

        return self._booking.bind(request, prepare)

    # Deliver ----------------------------------------------------------------------------------------------------------

    def _deliver(self, device: Loop, binding: Binding) -> tuple[Done, list[int]]:
        """Make the nodes, and what else the client asked for."""
        directory, grant = self._directory, self._grant
        room = self._terms.partitions if self._request.partscan else 0
        count, excess = limit_partitions(device, room) if self._request.partscan else (0, 0)
        made: list[Node] = []
        client = FdSet()
        try:
            if directory is not None:
                wanted = wanted_nodes(binding, room)
                made += nodes.place(directory, binding.devname, wanted, read_only=binding.read_only)
            watch, table = self._look_after(directory, binding)
            for delivery in self._request.deliver:
                if delivery == "fd":
                    client.add(access.reopen(device.fd, binding.read_only))
                elif delivery == "mount" and directory is not None:
                    self._tools.grants.admit(grant, self._client.uid)
                    client.add(detached_mount(directory.fd))
        except BaseException:
            client.close()
            # Where nodes cannot be removed the record stays, and the device: the main process has both released.
            if directory is None or not nodes.displace(directory, made):
                bind.let_go(device, sync=False)
                self._booking.forget()
            raise
        fds = list(client)
        client.release()
        names = tuple(devices.partition_names(binding.devname, room)) if directory is None and room else ()
        extents = devices.extents(binding.devname, room) if binding.windows and room else ()
        done = Done(
            None, binding, tuple(made), (), watch, table, grant, names, partitions=count, excess=excess, extents=extents
        )
        return done, fds

    def _make_mount(self, devname: str) -> None:
        """A directory for the nodes of this device, to be handed over as a mount."""
        self._grant, fd = self._tools.grants.make_for(devname)
        self._packet.own.add(fd)
        self._directory = nodes.directory(fd, self._client._replace(own=True))

    def _unmake_mount(self) -> None:
        if "mount" in self._request.deliver and self._grant:
            self._tools.grants.unmake(self._grant)

    def _look_after(self, directory: Directory | None, binding: Binding) -> tuple[int | None, int | None]:
        """The watch on the node, and a checksum of the table, by which the nodes of partitions are kept in line."""
        if directory is None or not self._request.partscan:
            return None, None
        watch = add_watch(self._tools.watches, directory, binding)
        with contextlib.suppress(OSError):  # the file is shorter by now, or its disk fails
            return watch, partitions.look(self._packet.fds.borrow(self._request.fd), binding)
        return watch, None


def add_watch(watches: int, directory: Directory, binding: Binding) -> int | None:
    """Have the kernel tell the main process when a writer has closed the node.

    With the directory's rights: the watch needs permission to read the node, and the node is the client's.
    """
    path = f"/proc/self/fd/{directory.fd}/{binding.devname}"
    with directory.rights(), contextlib.suppress(OSError):
        return inotify.add_watch(watches, path, inotify.IN_CLOSE_WRITE | inotify.IN_DONT_FOLLOW)
    return None


def limit_partitions(device: Loop, room: int) -> tuple[int, int]:
    """Delete the partitions beyond `room`. How many there are now, and how many were too many."""
    count = len(devices.partition_names(device.devname))
    if count <= room:
        return count, 0
    bind.delete_partitions(device, room)
    return len(devices.partition_names(device.devname)), count - room


def wanted_nodes(binding: Binding, room: int) -> dict[str, nodes.Numbers]:
    """The nodes that a binding has, by name: its own, and if `whole` those of its first `room` partitions."""
    own = {binding.node: (binding.major, binding.minor)}
    return own | devices.partitions(binding.devname, room) if room and binding.whole else own


def _check_mknod(pid: int, terms: Terms, mounts: files.Mounts) -> tuple[str, ...]:
    if not rights.can_make_nodes(pid) or mounts.on_host:
        return ()
    if not terms.mknod:
        raise Refusal(Code.NOT_PERMITTED, "the client has CAP_MKNOD: run its container with --cap-drop MKNOD")
    return (MKNOD_WARNING,)


def borrow(fds: FdSet, index: int, name: str) -> int:
    """The fd that the request names; a refusal where the datagram has no fd of that index."""
    try:
        return fds.borrow(index)
    except IndexError:
        raise Refusal(Code.BAD_FD, f"{name}: the datagram has {len(fds)} fds, none of index {index}") from None
