"""The helper process: takes one datagram, vets its fds, performs the request, hands back only what passed.

It alone touches a client's fds, one request at a time, so a file that never answers hangs this process and nothing
else. It decides nothing: what may be done arrives with the job. It keeps no state between jobs.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable
from typing import Any, NamedTuple

from loopd.children.bugs import described
from loopd.kernel import cgroups, inotify, peers, rights, transport
from loopd.kernel.transport import FdSet, Packet
from loopd.loop import Loop, LoopControl, backing_file
from loopd.protocol import wire
from loopd.protocol.wire import Attach, Code, Refusal
from loopd.worker import devices, files, messages, nodes, records
from loopd.worker.devices import Access, Binding, Number
from loopd.worker.grants import Grants, detached_mount
from loopd.worker.messages import (
    Arrange,
    Arranged,
    Changed,
    Done,
    Keep,
    Nudge,
    NumberPlease,
    Ready,
    Recognised,
    Release,
    Released,
    Resize,
    Resized,
    Revoke,
    Sweep,
    Take,
    Taken,
    Terms,
)
from loopd.worker.nodes import Client, Directory, Node, Numbers

MKNOD_WARNING = (
    "the client has CAP_MKNOD: with b 7:* in its device cgroup it can reach every loop device; use --cap-drop MKNOD"
)


class Tools(NamedTuple):
    """What every helper has: made by the main process before the first fork, and used by helpers alone."""

    listeners: list[socket.socket]
    control: LoopControl
    access: Access
    grants: Grants
    watches: int

    @property
    def fds(self) -> list[int]:
        """What a helper keeps open of the main process's fds."""
        listeners = [listener.fileno() for listener in self.listeners]
        return [*listeners, self.control.fileno(), self.watches, *self.access.fds, *self.grants.fds]


class _Vetted(NamedTuple):
    """The sockets of a request, and what else is known before its files are looked at; see `Taken`."""

    pidfd: int | None
    reply: int | None
    lease_fd: int | None
    lease: str
    refusal: Refusal | None
    granted: bool
    grant: str = ""


class Helper:
    """The loop of a helper process."""

    def __init__(self, channel: socket.socket, tools: Tools) -> None:
        self._channel = channel
        self._tools = tools

    def run(self) -> None:
        """Serve jobs until the main process is gone."""
        perform: dict[type[Any], Callable[[Any, FdSet], bool]] = {
            Take: self._take,
            Release: self._release,
            Keep: self._keep,
            Revoke: self._revoke,
            Arrange: self._arrange,
            Resize: self._resize,
            Nudge: self._nudge,
            Sweep: self._sweep,
        }
        while True:
            payload, fds = transport.receive(self._channel, messages.MAX_MESSAGE, messages.MAX_FDS)
            if not payload:
                return
            with fds:
                job = messages.unpack(payload)
                ready = perform[type(job)](job, fds)
            if not ready:
                self._send(Ready())

    def _send(self, message: Any, *fds: int | None) -> None:
        try:
            transport.send(self._channel, messages.pack(message), [fd for fd in fds if fd is not None])
        except (BrokenPipeError, ConnectionResetError):
            # The main process is gone. What is booked is its successor's already: nothing is undone here.
            os._exit(0)

    def _receive(self) -> Any:
        """The main process's word on what was said last."""
        payload, fds = transport.receive(self._channel, messages.MAX_MESSAGE, 0)
        fds.close()
        if not payload:
            os._exit(0)  # the main process is gone
        return messages.unpack(payload)

    # Take: the sockets ------------------------------------------------------------------------------------------------

    def _take(self, job: Take, own: FdSet) -> bool:
        packet = transport.take(self._tools.listeners[job.listener])
        if packet is None:
            self._send(Taken(messages.bug("the queue was empty"), False, False, "", last=True))
            return True
        with packet.own, packet.fds as fds:
            vetted = self._vet_sockets(job, packet)
            # The fds of which it is known that closing them cannot hang.
            passed = {fd for fd in (vetted.reply, vetted.lease_fd) if fd is not None}
            work = vetted.refusal is None and not (job.attach is None and job.change is None)
            last = not work and not vetted.granted and passed.issuperset(fds)
            flags = (vetted.pidfd is not None, vetted.reply is not None)
            taken = Taken(vetted.refusal, *flags, vetted.lease, vetted.granted, last)
            self._send(taken, vetted.pidfd, vetted.reply, vetted.lease_fd)
            if vetted.granted:
                vetted = self._recognise(vetted, packet, job)
                work = work and vetted.refusal is None
                last = not work and passed.issuperset(fds)
                self._send(Recognised(vetted.refusal, vetted.grant, last))
            if not work:
                return last
            events = None
            try:
                if job.change is not None:
                    uid, name, remove, admin = job.change
                    if not admin:
                        _check_on_host(packet, vetted)
                    path = self._tools.grants.change(uid, name, remove=remove)
                    last = passed.issuperset(fds)
                    self._send(Changed(path, last))
                    return last
                assert job.attach is not None and job.terms is not None  # noqa: PT018
                events = _open_events(job, packet)
                return self._attach(job, job.attach, job.terms, packet, vetted, own, passed, events)
            except Refusal as refusal:
                done = Done(refusal)
            except OSError as error:
                done = Done(_no_room(error))
            except Exception as error:  # noqa: BLE001  # the one boundary for bugs on this side
                done = Done(messages.bug(described(error)))
            last = passed.issuperset(fds)
            self._send(done._replace(cgroup=events is not None, last=last), events)
            return last

    def _vet_sockets(self, job: Take, packet: Packet) -> _Vetted:
        """Check what the main process answers on and watches. None of it can block."""
        reply, refusal = self._reply_socket(job.reply, packet)
        pidfd, lease_fd, lease, granted = packet.pidfd, None, "sender" if reply is None else "reply", False
        try:
            pidfd = _living_sender(job, packet)
            if reply is not None:
                peers.check_maker(reply, packet.sender)
            if job.lease is not None:
                candidate = borrow(packet.fds, job.lease, "lease_fd")
                kind = peers.check_lease(candidate)
                if kind == "socket":
                    peers.seal(candidate, "lease_fd")
                lease, lease_fd = kind, candidate
            if job.directory is not None:
                granted = self._tools.grants.has(borrow(packet.fds, job.directory, "dir_fd"))
        except Refusal as error:
            refusal = refusal or error
        except ProcessLookupError:
            # Its pid may belong to another process by now, and the account that was read for it to another tenant.
            refusal = refusal or Refusal(Code.NOT_PERMITTED, "the sender has ended")
        except OSError as error:
            refusal = refusal or _unseen(error)
        return _Vetted(pidfd, reply, lease_fd, lease, refusal, granted and refusal is None)

    def _recognise(self, vetted: _Vetted, packet: Packet, job: Take) -> _Vetted:
        """Which directory of loopd's was sent along. All of them may be locked: it was said that the head is off."""
        assert job.directory is not None
        try:
            return vetted._replace(grant=self._tools.grants.recognise(packet.fds.borrow(job.directory)))
        except Refusal as refusal:
            return vetted._replace(refusal=refusal)
        except OSError as error:
            return vetted._replace(refusal=_unseen(error))

    def _reply_socket(self, index: int | None, packet: Packet) -> tuple[int | None, Refusal | None]:
        """The reply socket, or why there is none although there should be."""
        refusal = None
        for candidate in () if index is None else range(len(packet.fds)) if index == messages.SEARCH else (index,):
            try:
                fd = borrow(packet.fds, candidate, "reply_fd")
                peers.check_reply_socket(fd, packet.sender)
                peers.seal(fd, "reply_fd")
                return fd, None
            except Refusal as error:
                refusal = error
            except OSError as error:
                refusal = Refusal(Code.BAD_FD, f"reply_fd: {error.strerror}")
        return None, refusal

    # Take: the files --------------------------------------------------------------------------------------------------

    def _attach(
        self, job: Take, request: Attach, terms: Terms, packet: Packet, vetted: _Vetted, own: FdSet, passed: set[int],
        events: int | None,
    ) -> bool:  # fmt: skip
        mounts = files.Mounts(packet.sender.pid)
        warnings = _check_mknod(packet.sender.pid, terms, mounts)
        fd = borrow(packet.fds, request.fd, "fd")
        backing = files.check_backing(fd, request, mounts, terms.file_systems, block_devices=terms.block_devices)
        if vetted.pidfd is None or peers.ended(vetted.pidfd):  # another process may have its pid by now
            backing = backing._replace(view=files.CLIENT)
        if not (terms.write or backing.read_only):
            raise Refusal(
                Code.NOT_PERMITTED, "the administrator allows this client read-only devices alone (loopd.toml)"
            )
        directory, grant = self._directory(request, terms, packet, vetted, mounts), vetted.grant
        passed.update(() if directory is None else (directory.fd, directory.view))
        bound = devices.bind(self._tools.control, self._tools.access, fd, request, backing, self._numbers(terms.number))
        with FdSet((bound.device, bound.lock)) as held, contextlib.ExitStack() as undo:
            if "mount" in request.deliver:
                directory, grant = self._mount_directory(bound.binding, packet, held)
                undo.callback(self._tools.grants.unmake, grant)
            made: list[Node] = []
            lock = bound.lock if request.lock else None
            place = None if directory is None else directory.fd
            if len(own):
                keeper = vetted.pidfd if vetted.lease == "sender" else vetted.lease_fd
                kept = {"device": bound.device, "directory": place, "lock": lock, "cgroup": events, "lease": keeper}
                holder = (job.holder or {}) | {"grant": grant}
                self._book(own.borrow(0), holder, vetted.lease, bound.binding, kept | {"reply": vetted.reply})
            undo.callback(_take_back, own.borrow(0) if len(own) else None, directory, made)
            if directory is not None:
                wanted = _wanted(bound.binding, partitions=request.partscan)
                made += nodes.place(directory, bound.binding.devname, wanted, read_only=bound.binding.read_only)
            watch, table = self._look_after(directory, bound, request)
            client = self._client_fds(request, bound, directory, grant, packet.sender.uid, held)
            flags = (directory is not None, lock is not None, events is not None, len(client))
            if backing.quiet:
                passed.add(fd)  # the device has it open, too
            last = passed.issuperset(packet.fds) and not client
            done = Done(None, bound.binding, tuple(made), warnings, watch, table, grant, *flags, last)
            self._send(done, bound.device, place, lock, events, *client)
            undo.pop_all()
            if client:  # the last close of one that was not delivered is here
                self._receive()  # Closed
            return last

    def _directory(
        self, request: Attach, terms: Terms, packet: Packet, vetted: _Vetted, mounts: files.Mounts
    ) -> Directory | None:
        if "node" not in request.deliver or request.dir_fd is None:
            return None
        fd = borrow(packet.fds, request.dir_fd, "dir_fd")
        client = Client(packet.sender.uid, packet.sender.gid, bool(vetted.grant))
        if vetted.grant:
            return nodes.directory(packet.own.add(self._tools.grants.open(vetted.grant)), client, fd)
        files.check_directory(fd, mounts, terms.file_systems)
        return nodes.directory(fd, client)

    def _client_fds(
        self, request: Attach, bound: devices.Bound, directory: Directory | None, grant: str, uid: int, held: FdSet
    ) -> list[int]:
        """The fds of the reply, in the order of `deliver`."""
        found = []
        for delivery in request.deliver:
            if delivery == "fd":
                found.append(held.add(devices.reopen(bound.device, bound.binding.read_only)))
            elif delivery == "mount" and directory is not None:
                self._tools.grants.admit(grant, uid)
                found.append(held.add(detached_mount(directory.fd)))
        return found

    def _mount_directory(self, binding: Binding, packet: Packet, held: FdSet) -> tuple[Directory, str]:
        grant, fd = self._tools.grants.make_for(binding.devname)
        held.add(fd)
        return nodes.directory(fd, Client(packet.sender.uid, packet.sender.gid, own=True)), grant

    def _book(
        self, slot: int, holder: dict[str, Any], lease: str, binding: Binding, fds: dict[str, int | None]
    ) -> None:
        """Put the lease into the fd store before its node is made: whatever ends now, the node will be found."""
        try:
            records.write(slot, holder, lease, binding, fds)
        except OSError as error:  # ETOOMANYREFS, ENOBUFS: too many fds are in flight
            raise Refusal(Code.NO_DEVICE, f"the lease cannot be booked: {error}") from error

    def _look_after(
        self, directory: Directory | None, bound: devices.Bound, request: Attach
    ) -> tuple[int | None, int | None]:
        """The watch and the state of the table, for the nodes of partitions to be made by."""
        if directory is None or not request.partscan:
            return None, None
        watch = self._watch(directory, bound.binding)
        with contextlib.suppress(OSError):  # the file is shorter by now, or its disk fails
            return watch, devices.table(bound.device)
        return watch, None

    def _watch(self, directory: Directory, binding: Binding) -> int | None:
        """Have the main process told when somebody who could write has closed the node.

        With the directory's rights: the watch needs permission to read the node, which is the client's.
        """
        path = f"/proc/self/fd/{directory.fd}/{binding.devname}"
        with directory.rights(), contextlib.suppress(OSError):
            return inotify.add_watch(self._tools.watches, path, inotify.IN_CLOSE_WRITE | inotify.IN_DONT_FOLLOW)
        return None

    def _numbers(self, first: Number | None) -> Callable[[], Number]:
        numbers = iter(() if first is None else (first,))

        def following() -> Number:
            number = next(numbers, None)
            if number is None:
                self._send(NumberPlease())
                answer = self._receive()
                if answer.refusal is not None:
                    raise answer.refusal
                number = answer.number
            return number

        return following

    # The other jobs ---------------------------------------------------------------------------------------------------

    def _release(self, job: Release, fds: FdSet) -> bool:
        left = list(job.nodes) if job.directory else []
        if job.directory:
            directory = nodes.directory(fds.borrow(1), job.client)
            with contextlib.suppress(OSError):
                left = nodes.displace(directory, _there(directory, job, {}))
            if job.grant.startswith("."):
                self._tools.grants.unmake(job.grant)
        with Loop.from_fd(fds.steal(0)) as loop:
            devices.let_go(loop)
            self._send(Released(tuple(left), loop.diskseq()))
            self._receive()  # Closed
        return False

    def _keep(self, job: Keep, fds: FdSet) -> bool:
        with Loop.from_fd(fds.steal(0)) as loop:
            self._send(Released((), loop.diskseq()))
            self._receive()  # Closed
        return False

    def _revoke(self, job: Revoke, fds: FdSet) -> bool:
        there = devices.partitions(job.devname)
        gone = (node for node in job.nodes if there.get(node.name) != (node.major, node.minor))
        nodes.revoke(nodes.directory(fds.borrow(0), job.client), gone)
        return False

    def _arrange(self, job: Arrange, fds: FdSet) -> bool:
        try:
            self._send(self._arranged(job, fds))
        except Refusal as refusal:
            self._send(Arranged(refusal))
        except OSError as error:
            self._send(Arranged(Refusal(Code.IO, f"the partitions cannot be read: {error}")))
        return True

    def _arranged(self, job: Arrange, fds: FdSet) -> Arranged:
        binding, refusal = job.binding, None
        directory = nodes.directory(fds.borrow(1), job.client) if len(fds) > 1 else None
        there = [] if directory is None else _there(directory, job, _wanted(binding, partitions=binding.partscan))
        with Loop.from_fd(fds.steal(0)) as loop:
            table = _table(loop, job)
            if job.rescan or job.table not in (None, table):
                if directory is not None:
                    # First: while the kernel reads, which may take long, their numbers are free for others' partitions.
                    there = nodes.prune(directory, there, _wanted(binding, partitions=False))
                try:
                    devices.rescan(loop)
                except Refusal as error:
                    # A partition is in use, most likely: once more when the node is closed the next time.
                    refusal, table = error if job.rescan else None, job.table
        if directory is None:
            return Arranged(refusal, (), None, table)
        wanted = _wanted(binding, partitions=binding.partscan)
        there = nodes.prune(directory, there, wanted)
        if not job.sure:
            nodes.finish(directory, there, read_only=binding.read_only)
        names = {node.name for node in there}
        missing = {name: device for name, device in wanted.items() if name not in names}
        if job.complete:
            there += nodes.place(directory, binding.devname, missing, read_only=binding.read_only)
        else:
            there += nodes.add(directory, missing, read_only=binding.read_only)
        watch = self._watch(directory, binding) if binding.partscan else None
        return Arranged(refusal, tuple(there), watch, table)

    def _resize(self, job: Resize, fds: FdSet) -> bool:
        with Loop.from_fd(fds.steal(0)) as loop:
            try:
                if loop.get_status().lo_sizelimit != job.binding.sizelimit:  # a resize was refused before
                    loop.set_status(sizelimit=job.binding.sizelimit)
                loop.set_capacity()
                if job.room is not None and loop.size() > job.room:
                    loop.set_status(sizelimit=max(1, job.binding.size))  # 0 is no limit; less than a sector is none
                    raise Refusal(Code.QUOTA, "the devices of this account would have more bytes than its limit")
                self._send(Resized(None, job.binding._replace(size=loop.size())))
            except Refusal as refusal:
                self._send(Resized(refusal))
            except OSError as error:
                self._send(Resized(Refusal(Code.IO, f"the size cannot be taken over: {error}")))
        return True

    def _sweep(self, job: Sweep, fds: FdSet) -> bool:
        self._tools.grants.sweep(job.known, lambda devname: backing_file(int(devname[4:])) is not None)
        return False

    def _nudge(self, job: Nudge, fds: FdSet) -> bool:
        devices.nudge(self._tools.access, job.number, job.diskseq)
        return False


def _check_on_host(packet: Packet, vetted: _Vetted) -> None:
    assert vetted.pidfd is not None
    # In this order: what was looked at was the sender if it has not ended since.
    if not files.on_host(packet.sender.pid) or peers.ended(vetted.pidfd):
        raise Refusal(Code.NOT_PERMITTED, "a directory is made from the host, and bound into the container from there")


def _take_back(slot: int | None, directory: Directory | None, made: list[Node]) -> None:
    """Undo what was booked, and what was made. What of that cannot be removed stays booked, to be tried again."""
    if directory is not None and nodes.displace(directory, made):
        return
    if slot is not None:
        records.clear(slot)


def _open_events(job: Take, packet: Packet) -> int | None:
    """What tells the end of the account, if anything does."""
    try:
        events = cgroups.open_events(job.holder["account"]) if job.holder is not None else None
    except cgroups.Gone:
        # Its process has moved on since, or its name is another tenant's by now.
        raise Refusal(Code.NOT_PERMITTED, "the sender's cgroup has ended") from None
    return None if events is None else packet.own.add(events)


def _check_mknod(pid: int, terms: Terms, mounts: files.Mounts) -> tuple[str, ...]:
    if not rights.can_make_nodes(pid) or mounts.on_host:
        return ()
    if not terms.mknod:
        raise Refusal(Code.NOT_PERMITTED, "the client has CAP_MKNOD: run its container with --cap-drop MKNOD")
    return (MKNOD_WARNING,)


def _living_sender(job: Take, packet: Packet) -> int:
    """The sender's pidfd, of a packet that is the one that was decided on; ProcessLookupError when it has ended."""
    if packet.payload != job.payload or packet.sender != job.sender:
        raise messages.bug("the head of the queue changed: somebody else reads this socket")
    if len(packet.fds) > wire.MAX_FDS:
        raise Refusal(Code.MALFORMED, f"more than {wire.MAX_FDS} fds")
    if packet.truncated:  # although there was room for all of them in the message
        raise Refusal(Code.NO_DEVICE, "loopd is at its limit of open files")
    pidfd = packet.pidfd
    if pidfd is None:  # before Linux 6.5
        pidfd = packet.own.add(transport.pidfd_of_sender(packet.sender.pid, packet.arrived))
    if peers.ended(pidfd):
        raise ProcessLookupError
    return pidfd


def _unseen(error: OSError) -> Refusal:
    """A client's fd that cannot be looked at."""
    if error.errno in nodes.NO_ROOM:
        return _no_room(error)
    return Refusal(Code.BAD_FD, f"an fd cannot be looked at: {error.strerror}")


def _no_room(error: OSError) -> Refusal:
    """What the host has no more of is no bug; any other errno that nobody gave a meaning is."""
    if error.errno in nodes.NO_ROOM:
        return Refusal(Code.NO_DEVICE, f"loopd has no room for another device: {error.strerror}")
    return messages.bug(described(error))


def _there(directory: Directory, job: Arrange | Release, wanted: dict[str, Numbers]) -> list[Node]:
    """The nodes that are there, of which the `wanted` ones stay."""
    if job.sure:
        return list(job.nodes)
    # First: to look into the directory may take as long as its client likes.
    nodes.revoke(directory, (node for node in job.nodes if wanted.get(node.name) != (node.major, node.minor)))
    return nodes.find(directory, job.binding.devname, _wanted(job.binding, partitions=True))


def _table(loop: Loop, job: Arrange) -> int | None:
    """The state of the partition table; that of the last look where it is not asked for or cannot be read."""
    if job.binding.partscan and (job.rescan or job.changed):
        with contextlib.suppress(OSError):
            return devices.table(loop.fd)
    return job.table


def _wanted(binding: Binding, *, partitions: bool) -> dict[str, Numbers]:
    """The nodes that a binding has, by name."""
    disk = {binding.devname: (binding.major, binding.minor)}
    return disk | devices.partitions(binding.devname) if partitions else disk


def borrow(fds: FdSet, index: int, name: str) -> int:
    """The fd that the request names; a refusal where the datagram has none of that index."""
    try:
        return fds.borrow(index)
    except IndexError:
        raise Refusal(Code.BAD_FD, f"{name}: the datagram has {len(fds)} fds, none of index {index}") from None


def main(channel: socket.socket, tools: Tools) -> None:
    """Be a helper process, from its fork to its end."""
    rights.drop_groups()
    rights.die_first()
    os.umask(0)
    Helper(channel, tools).run()
