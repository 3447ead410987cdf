"""The grants of one resource: made for an id of the kubelet's, and ended when no pod has it any more.

There is no call that gives an id back. So what an id had goes when the id is allocated again, and otherwise once the
kubelet's list of pods has been without it for a while. loopd itself ends what a container left attached as soon as its
cgroup is gone. Which grants there are is asked of loopd: this program may be ended and started at any time.
"""

from __future__ import annotations

import os
import secrets
import stat
import time
from contextlib import suppress
from typing import NamedTuple

from loopd.cli import cdi
from loopd.client import api as client
from loopd.deviceplugin.front import Front
from loopd.deviceplugin.messages import Container, Device, Mount
from loopd.deviceplugin.options import PREFIX, Resource
from loopd.protocol.wire import Granted, GrantInfo


class Places(NamedTuple):
    """Where runtimes are to find what they need."""

    nodes: str
    cdi_dir: str


class Grants:
    """The grants of one resource."""

    def __init__(self, resource: Resource, places: Places, grace: float) -> None:
        self.resource = resource
        self.front = Front(resource.admin_socket)
        self._places = places
        self._grace = grace
        self._unused: dict[str, float] = {}
        """Since when (monotonic) no pod has had the id of a grant, by the grant's name."""

    # Making -----------------------------------------------------------------------------------------------------------

    def fresh(self, ident: str) -> Container:
        """A new grant, and how a container gets it. What the id had before ends. Raises the client's errors, Failure,
        and OSError.
        """
        for old in self._all():
            if _id(old.name) == ident:
                self._end(old)
        # By the time the newest of an id is known, and nobody on the host guesses the rest.
        name = f"{PREFIX}.{self.resource.key}.{ident.rpartition('-')[2]}.{time.time_ns() // 10**6:011x}"
        name += secrets.token_hex(8)
        granted = self.front.make(self.resource.uid, name, self.resource.devices)
        try:
            return self._container(name, granted)
        except BaseException:
            self._end(GrantInfo(name, self.resource.uid, granted.path, granted.numbers, 0))
            raise

    def discard(self, ident: str) -> None:
        """Take back what was made for an id: another part of the same answer failed."""
        for grant in self._all():
            if _id(grant.name) == ident:
                self._end(grant)

    def _container(self, name: str, granted: Granted) -> Container:
        found = cdi.parts(self.resource.socket, self.resource.losetup)
        # As root's, whoever the user in the container is: it is root's runtime that makes nodes and rules.
        spec = cdi.checked(0, name, granted, found, self.resource.force)
        if self.resource.cdi:
            cdi.write(self._places.cdi_dir, 0, name, spec)
            return Container({}, (), (), (f"{cdi.kind(0)}={name}",))
        (device,) = spec["devices"]
        edits = device["containerEdits"]
        mounts = tuple(
            Mount(each["containerPath"], each["hostPath"], "ro" in each["options"]) for each in edits["mounts"]
        )
        devices = tuple(Device(node["path"], self._node(node), node["permissions"]) for node in edits["deviceNodes"])
        return Container(dict(each.split("=", 1) for each in edits["env"]), mounts, devices, ())

    def _node(self, node: dict[str, int | str]) -> str:
        """A node for the runtime, which reads the numbers off it. A CDI specification has them instead."""
        path = os.path.join(self._places.nodes, os.path.basename(str(node["path"])))
        with suppress(FileExistsError):  # of a grant that somebody else removed: it has the same numbers
            os.mknod(path, stat.S_IFBLK | 0o600, os.makedev(int(node["major"]), int(node["minor"])))
        return path

    # Ending -----------------------------------------------------------------------------------------------------------

    def _all(self) -> list[GrantInfo]:
        own = f"{PREFIX}.{self.resource.key}."
        # Any user of the node may take such a name. Root's: of this program before it was given another --uid.
        found = (grant for grant in self.front.directories() if grant.uid in (0, self.resource.uid))
        return [grant for grant in found if grant.name.startswith(own) and _id(grant.name)]

    def _end(self, grant: GrantInfo) -> bool:
        """End a grant; False where a device of it is still open somewhere, and keeps it for now."""
        for number in grant.numbers:  # first: a number that was removed may be another grant's at once
            with suppress(FileNotFoundError):
                os.unlink(os.path.join(self._places.nodes, f"loop{number}"))
        cdi.remove([self._places.cdi_dir], 0, grant.name)
        self.front.end(grant.numbers if grant.in_use else ())
        try:
            self.front.remove(grant.uid, grant.name)
        except client.Busy:
            return False
        self._unused.pop(grant.name, None)
        return True

    def sweep(self, used: frozenset[str] | None) -> int:
        """End the grants that no pod has any more, by the ids that pods have; None where that is not known. How many
        are left. Raises the client's errors.
        """
        now = time.monotonic()
        newest: dict[str, str] = {}
        grants = self._all()
        for grant in grants:
            newest[_id(grant.name)] = max(grant.name, newest.get(_id(grant.name), ""))
        left = 0
        unused: dict[str, float] = {}
        for grant in grants:
            ident = _id(grant.name)
            since = now
            if used is not None and ident not in used:
                since = unused[grant.name] = self._unused.get(grant.name, now)
            replaced = grant.name != newest[ident]
            # A list without a pod that is there must not cost that pod its devices. So what is attached stays, and
            # ends with the pod's cgroup, by loopd.
            if not (replaced or (now - since > self._grace and not grant.in_use)) or not self._end(grant):
                left += 1
        self._unused = unused
        return left


def _id(name: str) -> str:
    """The kubelet's id, of the name of a grant; empty for what has no such name."""
    start, _, rest = name.partition(".")
    key, _, index = rest.rpartition(".")[0].rpartition(".")
    return f"{key}-{index}" if start == PREFIX and index.isdecimal() else ""
