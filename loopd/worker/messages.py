"""Jobs of the main process for its workers, and their answers.

Values alone. Of what a client has sent, neither side passes on anything but what the protocol has decoded.
"""

from __future__ import annotations

import copyreg
from typing import Any, NamedTuple

from loopd.kernel.transport import Sender
from loopd.protocol.wire import Attach, Code, GrantInfo, Refusal
from loopd.worker.bindings import Row
from loopd.worker.devices import Binding, Extent, Number
from loopd.worker.nodes import Client, Node

SEARCH = -1
"""In place of the index of reply_fd: the request could not be decoded; answer on the first fd that is a reply socket.
"""

# Jobs -------------------------------------------------------------------------------------------------------------


class Terms(NamedTuple):
    """What policy lets this request do, and the first number to try; without one the worker asks when it gets there.
    `partitions`: how many the device may have. `kernel_partitions`: their nodes may be of the kernel's partitions,
    whoever the sender is.
    """

    file_systems: frozenset[str]
    write: bool
    block_devices: bool
    mknod: bool
    number: Number | None
    partitions: int
    kernel_partitions: bool


class Change(NamedTuple):
    """Make a directory of loopd's own for a uid, or remove it. Unless `admin` the sender has to be on the host.
    `devices`: how many numbers it owns; None for as many as it has, or the default.
    """

    uid: int
    name: str
    remove: bool
    devices: int | None
    admin: bool


class Survey(NamedTuple):
    """List the directories of loopd's own of a uid, for None all, behind `after`. Unless `admin` the sender has to be
    on the host.
    """

    uid: int | None
    after: str
    admin: bool


class Take(NamedTuple):
    """Take the datagram that was peeked; if `attach` or `grants` is there, perform it.

    `reply`, `lease` and `directory` are indices of its fds. `holder` is for the record, `row` the lease's place in the
    table of bindings. Fds: of an attach, a free slot.
    """

    listener: int
    payload: bytes
    sender: Sender
    reply: int | None
    directory: int | None
    lease: int | None = None
    attach: Attach | None = None
    terms: Terms | None = None
    holder: dict[str, Any] | None = None
    row: int = 0
    grants: Change | Survey | None = None


class UseNumber(NamedTuple):
    """The answer to `NumberPlease`: the number, or why there is none."""

    number: Number | None
    refusal: Refusal | None = None


class UseNumbers(NamedTuple):
    """The answer to `NumbersPlease`: the numbers, or why there are none."""

    numbers: tuple[int, ...]
    refusal: Refusal | None = None


class Displace(NamedTuple):
    """Remove a lease's nodes. Fds: its slot. Unless `sure`, there may be others than the `nodes`."""

    binding: Binding
    client: Client
    nodes: tuple[Node, ...]
    sure: bool
    grant: str


class Unbind(NamedTuple):
    """Write back what was written to the device, and unbind it. Fds: the lease's slot.

    `again`: that was done before, and somebody else still has the device open.
    """

    binding: Binding
    row: int
    again: bool


class Clear(NamedTuple):
    """Empty the slot and the row of a lease that is over, where no `Unbind` has ended. Fds: the slot."""

    row: int


class Revoke(NamedTuple):
    """Close the nodes of partitions that are gone, while the job that would remove them waits. Fds: the slot."""

    devname: str
    client: Client


class Arrange(NamedTuple):
    """Bring a lease's nodes in line with the partitions that the kernel has. Fds: the slot.

    Unless `sure`, there may be others than the `nodes`. `rescan`: have the kernel read the table first. `look`: do so
    only if the table's checksum is not that of the last look, `table`. `room`: how many partitions the device may have.
    """

    binding: Binding
    client: Client
    nodes: tuple[Node, ...]
    sure: bool
    table: int | None
    room: int
    look: bool = False
    rescan: bool = False


class OpenWindow(NamedTuple):
    """Bind a window on a partition of the disk, and make its node. `holder` and `row` are the window's, as in `Take`.
    Fds: the slot of the disk, a free slot.
    """

    disk: Binding
    extent: Extent
    number: Number | None
    client: Client
    holder: dict[str, Any]
    row: int


class Resize(NamedTuple):
    """Have the device take over its file's size, if that is no more than `room`."""

    binding: Binding
    room: int | None


class Nudge(NamedTuple):
    """Once more have a parked device unbound that somebody else has open."""

    number: int
    diskseq: int | None


class Tidy(NamedTuple):
    """After a start: release the binding of this row, which is no lease's."""

    row: Row


class Sweep(NamedTuple):
    """After a start: remove the nodes in loopd's own directories that were left `before` that time (seconds since
    1970), of these numbers and of all that are not bound. And do what `Inspect` is for.
    """

    numbers: tuple[int, ...]
    before: float
    block: int


class Inspect(NamedTuple):
    """Look at the numbers that grants own. `block`: how many have an entry in common in the counter."""

    block: int


Job = Take | Displace | Unbind | Clear | Revoke | Arrange | OpenWindow | Resize | Nudge | Tidy | Sweep | Inspect

# Answers ----------------------------------------------------------------------------------------------------------


class Taken(NamedTuple):
    """The datagram is off the queue. Fds, each if its flag says so: the sender's pidfd, the reply socket, the lease fd.

    `kept_by` is what keeps a lease: "pidfd" or "socket" (the lease fd), "reply", or "sender". With `granted` a
    directory of loopd's seems to have been sent along, and `Recognised` follows. With a refusal nothing more is done
    with the request.
    """

    refusal: Refusal | None
    pidfd: bool
    reply: bool
    kept_by: str
    granted: bool = False


class Recognised(NamedTuple):
    """Which directory of loopd's was sent along, and the numbers that it owns. To find out may have taken long,
    so `Taken` did not wait for it.
    """

    refusal: Refusal | None
    grant: str
    numbers: tuple[int, ...]


class NumberPlease(NamedTuple):
    """The last number was lost to somebody else, or there was none yet: the worker asks for another."""


class NumbersPlease(NamedTuple):
    """The directory was made, and needs so many numbers that nobody has had."""

    wanted: int


class Changed(NamedTuple):
    """The directory is there, or gone, with the numbers that it owns or owned."""

    path: str
    numbers: tuple[int, ...]


class Surveyed(NamedTuple):
    """The directories, and whether there are more."""

    grants: tuple[GrantInfo, ...]
    more: bool


class Done(NamedTuple):
    """The attach is done, or refused. `names` are the partitions, where there is no directory for their nodes;
    `partitions` is how many the kernel has, `excess` how many were too many; `extents` are those that windows are
    wanted on. Fds: with `cgroup`, the id of the account's, the file that tells the end of that cgroup; then the fds for
    the client.
    """

    refusal: Refusal | None
    binding: Binding | None = None
    nodes: tuple[Node, ...] = ()
    warnings: tuple[str, ...] = ()
    watch: int | None = None
    table: int | None = None
    grant: str = ""
    names: tuple[str, ...] = ()
    cgroup: int = 0
    partitions: int = 0
    excess: int = 0
    extents: tuple[Extent, ...] = ()


class Displaced(NamedTuple):
    """The nodes are gone but for these, which could not be removed."""

    nodes: tuple[Node, ...]


class Unbound(NamedTuple):
    """loopd has let go of the device. `there`: it carried the binding, and may carry it until somebody else's last
    close. `lost` says why the image lacks what was written; None when it lacks nothing. `diskseq` is the binding's.
    """

    there: bool
    lost: str | None
    diskseq: int | None


class Arranged(NamedTuple):
    """The nodes that are there now (None: not known), or the names of the partitions where there is no directory; the
    watch on the node, and the table's checksum. `partitions` is how many the kernel has, `excess` how many were too
    many; `extents` are those that windows are wanted on. `partscan`: the kernel looks for partitions now.
    """

    refusal: Refusal | None
    nodes: tuple[Node, ...] | None = None
    watch: int | None = None
    table: int | None = None
    names: tuple[str, ...] = ()
    partitions: int = 0
    excess: int = 0
    extents: tuple[Extent, ...] = ()
    partscan: bool = False


class Resized(NamedTuple):
    """The binding as it is now."""

    refusal: Refusal | None
    binding: Binding | None = None


class Tidied(NamedTuple):
    """The file of what was released, None where nothing was; `lost` says why that file lacks what was written."""

    file: str | None
    lost: str | None


class Inspected(NamedTuple):
    """One number of each block that grants own numbers of; and those of their numbers whose device is there, unbound.
    """

    blocks: tuple[int, ...]
    idle: tuple[int, ...]


class Finished(NamedTuple):
    """The answer of a job that has nothing to tell."""


# A class in a pickle is one byte instead of two names to be looked up.
for _code, _kind in enumerate((
    Take, Displace, Unbind, Clear, Arrange, Resize, Nudge, Revoke, Tidy, Sweep, UseNumber, Taken, NumberPlease, Done,
    Displaced, Unbound, Arranged, Resized, Finished, Terms, Attach, Sender, Binding, Number, Client, Node, Refusal,
    Code, Change, Changed, Recognised, Tidied, Extent, OpenWindow, Survey, Surveyed, NumbersPlease, UseNumbers,
    GrantInfo, Inspect, Inspected,
), 1):  # fmt: skip
    copyreg.add_extension(_kind.__module__, _kind.__qualname__, _code)


def bug(text: str) -> Refusal:
    """A refusal for a bug on the worker's side. The main process records the text, and does not send it to the client.
    """
    return Refusal(Code.INTERNAL, text)
