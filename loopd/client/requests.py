"""The requests about what is there: end a lease, list leases, change a device, make a directory, greet.

Changes when there is another operation, or another field of one. Attaching is in `api`.
"""

from __future__ import annotations

import os
from contextlib import ExitStack, suppress
from typing import Any, Iterator

from loopd.client import backing, layers
from loopd.client.errors import BadReply, Busy, Error, ImageIncomplete, NotFound
from loopd.client.exchange import Exchange, parsed
from loopd.client.inputs import StrPath, has_node, opened_grant, opened_places
from loopd.protocol import wire
from loopd.protocol.wire import Detached, Granted, GrantInfo, Greeting, LeaseInfo, Measured, Rescanned, Resized


class Requests(Exchange):
    """The methods of `api.Client` that attach nothing."""

    def detach(self, device: StrPath, *, wait: float = 0.0, force: bool = False, diskseq: int | None = None) -> bool:
        """End the lease of a device, given as ``"loop4096"`` or with its directory.

        Waits up to `wait` seconds (at most 3600) beyond the timeout. True when the image is free, False while
        somebody has the device open: it goes at the last close. `force` is the administrator's, on the admin
        socket. With `diskseq`, raises `NotFound` where the name stands for another binding by now. Raises
        `ImageIncomplete` where the device is detached, and the image lacks what was written.
        """
        name = os.path.basename(os.fspath(device))
        request = wire.Detach(devname=name, wait=wait, force=force, diskseq=diskseq)
        reply = parsed(Detached, self._about(device, request, wait))
        layers.detach_mounts(name)
        released = reply.state == "released"
        if reply.lost is not None:
            text = f"{os.fspath(device)} is detached, but its image lacks what was written to it: {reply.lost}"
            text += "" if released else "; and somebody still has it open"
            raise ImageIncomplete(text, reason=reply.lost, released=released)
        return released

    def rescan(self, device: StrPath) -> tuple[str, ...]:
        """Have the partition table of a device read again; the names of the partitions, whose nodes are there now."""
        request = wire.Rescan(devname=os.path.basename(os.fspath(device)))
        return parsed(Rescanned, self._about(device, request)).partitions

    def resize(self, device: StrPath) -> int:
        """Have a device take over the size of its image after that changed; bytes."""
        request = wire.Resize(devname=os.path.basename(os.fspath(device)))
        return parsed(Resized, self._about(device, request)).size

    def directory(self, name: str, *, remove: bool = False, devices: int | None = None) -> str:
        """Make the directory `name` of this user on the host, to be bound into a container, or `remove` it; its path.

        A directory that exists stays as it is. `Busy` where the directory to remove has a device in it. `devices`: how
        many device numbers the directory owns, by default as many as it has, and 8 where it is made; `Exists` where it
        has another number of them.
        """
        return self.grant(name, remove=remove, devices=devices).path

    def grant(self, name: str, *, remove: bool = False, devices: int | None = None) -> Granted:
        """The same, with the device numbers that the directory owns now."""
        with ExitStack() as stack:
            try:
                request = wire.Directory(name, remove=remove, devices=devices)
                granted = parsed(Granted, self._ask(stack, request).fields)
                # Root binds the path into containers, so accept only what a loopd would answer.
                if not os.path.isabs(granted.path) or os.path.basename(granted.path) != f"{os.getuid()}-{name}":
                    raise BadReply(f"{granted.path} is no directory {name} of loopd's")
                # And writes the numbers into what runtimes let containers open.
                if not all(type(number) is int and 0 <= number < 1 << 20 for number in granted.numbers):
                    raise BadReply(f"{granted.numbers} are no numbers of devices")
                return granted
            except NotFound as error:
                error.hint = "`loopctl directory` shows those that there are"
                raise
            except Busy as error:
                with suppress(Error):
                    path = self.directory(name)  # it is there, and stays as it is
                    shows = f"`LOOPD_DIRECTORY={path} loopctl list` shows them"
                    error.hint = f"{shows}, `loopctl detach {path}/loopN` ends one"
                raise

    def directories(self) -> tuple[GrantInfo, ...]:
        """The directories of this user on the host; on the admin socket those of all."""
        found: list[GrantInfo] = []
        request = wire.Directories()
        while True:
            with ExitStack() as stack:
                fields = self._ask(stack, request).fields
            rows = fields.get("directories")
            if not isinstance(rows, list):
                raise BadReply("the reply makes no sense: it has no directories")
            found += [parsed(GrantInfo, row) for row in rows]
            if not fields.get("more") or not rows:
                return tuple(found)
            request = request._replace(after=f"{found[-1].uid}-{found[-1].name}")

    def list(self) -> tuple[LeaseInfo, ...]:
        """The leases of this owner and of this container's directory; on the admin socket those of all.

        `backing_file` is the name that the kernel has for the file now, as this process sees it, with `` (deleted)``
        behind it where the file is; `backing_file_at_attach` is the one that it had.
        """
        with ExitStack() as stack:
            grant = opened_grant(stack)
            leases = {lease.devname: lease for lease in (() if grant is None else self._listed(grant[0]))}
            leases.update((lease.devname, lease) for lease in self._listed(None))
            return tuple(map(backing.present, leases.values()))

    def _listed(self, dir_fd: int | None) -> Iterator[LeaseInfo]:
        request, fds = (wire.Leases(), ()) if dir_fd is None else (wire.Leases(dir_fd=0), (dir_fd,))
        while True:
            with ExitStack() as stack:
                fields = self._ask(stack, request, fds).fields
            rows = fields.get("leases")
            if not isinstance(rows, list):
                raise BadReply("the reply makes no sense: it has no leases")
            leases = [parsed(LeaseInfo, row) for row in rows]
            yield from leases
            # An empty page that promises more would be asked for again for ever.
            if not fields.get("more") or not leases:
                return
            request = request._replace(after=leases[-1].devname)

    def _about(self, device: StrPath, request: wire.Detach | wire.Rescan | wire.Resize, wait: float = 0.0) -> Any:
        """The answer to a request about a lease, asked as the owner of the lease."""
        with ExitStack() as stack:
            if not (isinstance(request, wire.Detach) and request.force):
                for dir_fd in self._owners(device, stack):
                    with suppress(NotFound):
                        return self._ask(stack, request._replace(dir_fd=0), [dir_fd], wait).fields
            return self._ask(stack, request, (), wait).fields

    def _owners(self, device: StrPath, stack: ExitStack) -> Iterator[int]:
        """The directories to ask as, before this user: a lease may be this container's directory's, or that of the
        directory in the name.
        """
        # To ask as the wrong owner is refused, which the journal of the host would have for each device that is named
        # without its directory. So look for the node first, and where there is none into the list, which refuses none.
        name = os.path.basename(os.fspath(device))
        grant, named = opened_places(device, stack)
        if grant is not None:
            elsewhere = named is not None and has_node(named, name)
            if has_node(grant, name) or (not elsewhere and any(row.devname == name for row in self._listed(grant))):
                yield grant
        if named is not None:
            yield named

    def hello(self) -> Greeting:
        """The daemon's version, and what this socket offers."""
        with ExitStack() as stack:
            return parsed(Greeting, self._ask(stack, wire.Hello()).fields)

    def metrics(self) -> str:
        """What the daemon counts, as OpenMetrics text; on the admin socket."""
        with ExitStack() as stack:
            return parsed(Measured, self._ask(stack, wire.Metrics()).fields).openmetrics

    def daemon_pid(self) -> int:
        """The process id of the daemon, as the kernel attests it; 0 where it is of another PID namespace."""
        with ExitStack() as stack:
            return self._ask(stack, wire.Hello()).pid
