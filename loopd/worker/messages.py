"""Messages between the main process and its helpers: jobs one way, answers the other.

Both ends are forks of one image on a private socketpair, and neither sends the other anything of a client's but values
that `wire` has decoded; so a message is pickled and has no versions.
"""

from __future__ import annotations

import copyreg
import pickle
from typing import Any, NamedTuple

from loopd.kernel.transport import Sender
from loopd.protocol.wire import Attach, Code, Refusal
from loopd.worker.devices import Binding, Number
from loopd.worker.nodes import Client, Node

MAX_MESSAGE = 1 << 17
"""Bytes of a message: a record of 8 KiB of request, and the nodes of a device with 256 partitions."""
MAX_FDS = 8
SEARCH = -1
"""In place of the index of reply_fd: the request could not be decoded, so answer on the first fd that will do."""

# Jobs -------------------------------------------------------------------------------------------------------------


class Terms(NamedTuple):
    """What policy lets this request do, and the first number to try; without one the helper asks when it gets there."""

    file_systems: frozenset[str]
    write: bool
    block_devices: bool
    mknod: bool
    number: Number | None


class Change(NamedTuple):
    """Make a directory of loopd's own for a uid, or remove it; unless the administrator asks, from the host alone."""

    uid: int
    name: str
    remove: bool
    admin: bool


class Take(NamedTuple):
    """Take the datagram that was peeked; if `attach` or `change` is there, perform it.

    `reply`, `lease` and `directory` are indices of its fds. `holder` is for the record. Fds: a free slot, where there
    is one.
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
    change: Change | None = None


class Release(NamedTuple):
    """Take a lease's nodes, partitions and binding away. Fds: the device, the `directory` if it has one, and the lock
    if it is kept, so that the last close of that is the helper's too.

    Unless `sure`, there may be others than the `nodes`.
    """

    binding: Binding
    client: Client
    nodes: tuple[Node, ...]
    sure: bool
    grant: str
    directory: bool


class Keep(NamedTuple):
    """Have a lease's files open for as long as the main process has, in place of a helper of its release that does not
    come back. Fds: as for `Release`.
    """


class Revoke(NamedTuple):
    """Close the nodes of partitions that the kernel has no more, while what would remove them waits. Fds: the
    directory.
    """

    devname: str
    client: Client
    nodes: tuple[Node, ...]


class Arrange(NamedTuple):
    """Bring a lease's nodes in line with the partitions that the kernel has. Fds: the device, and the directory if any.

    Unless `sure`, there may be others than the `nodes`. `complete`: the client still waits for the answer to its
    attach, so a node that cannot be made is a refusal. `rescan`: have the kernel read the table first; `changed`: only
    if that is not what it was at the last look, `table`.
    """

    binding: Binding
    client: Client
    nodes: tuple[Node, ...]
    sure: bool
    complete: bool = False
    rescan: bool = False
    changed: bool = False
    table: int | None = None


class Resize(NamedTuple):
    """Have the device take over its file's size, if that is no more than `room`. Fds: the device."""

    binding: Binding
    room: int | None


class Nudge(NamedTuple):
    """Have a device unbound that was let go of, and that somebody else had open."""

    number: int
    diskseq: int | None


class Sweep(NamedTuple):
    """Remove the directories of devices that are neither bound nor among the `known` ones."""

    known: frozenset[str]


class Closed(NamedTuple):
    """Word to a helper that has said Released, or Done with fds for the client: the main process has closed its own fds
    of the device.
    """


class UseNumber(NamedTuple):
    """Answer to NumberPlease, or why there is none."""

    number: Number | None
    refusal: Refusal | None = None


Job = Take | Release | Keep | Revoke | Arrange | Resize | Nudge | Sweep

# Answers ----------------------------------------------------------------------------------------------------------
#
# With `last` the helper takes the next job: what it still has open are fds that cannot hang when they are closed.


class Taken(NamedTuple):
    """The datagram is off the queue. Fds, each if its flag says so: the sender's pidfd, the reply socket, the lease fd.

    `lease` is what keeps a lease: "pidfd" or "socket" (the lease fd), "reply", or "sender". With `granted` a directory
    of loopd's seems to have been sent along, and `Recognised` follows. With a refusal nothing more is done with the
    request.
    """

    refusal: Refusal | None
    pidfd: bool
    reply: bool
    lease: str
    granted: bool = False
    last: bool = False


class Recognised(NamedTuple):
    """Which directory of loopd's was sent along; to find that out may have taken long."""

    refusal: Refusal | None
    grant: str
    last: bool


class NumberPlease(NamedTuple):
    """The last number was lost to somebody else, or there was none yet."""


class Changed(NamedTuple):
    """The directory is there, or gone."""

    path: str
    last: bool


class Done(NamedTuple):
    """The attach is done, or what was asked for is refused. Fds: device; then, if so flagged, directory, lock, what
    tells of the account's cgroup, the client's fds. Of a refusal: the cgroup's alone.
    """

    refusal: Refusal | None
    binding: Binding | None = None
    nodes: tuple[Node, ...] = ()
    warnings: tuple[str, ...] = ()
    watch: int | None = None
    table: int | None = None
    grant: str = ""
    directory: bool = False
    lock: bool = False
    cgroup: bool = False
    client: int = 0
    last: bool = False


class Released(NamedTuple):
    """A lease's nodes are gone but for `left`. The helper has the device open until it hears `Closed`: the last close
    writes back what there is, which may wait for a file that its owner keeps locked, and so must not be the main
    process's. `diskseq` is the present one: a client that gave its read-only device another file has raised it.
    """

    left: tuple[Node, ...]
    diskseq: int | None


class Arranged(NamedTuple):
    """The nodes that are there now (None: not known), and the state of the watch and of the table."""

    refusal: Refusal | None
    nodes: tuple[Node, ...] | None = None
    watch: int | None = None
    table: int | None = None
    last: bool = True


class Resized(NamedTuple):
    """The binding as it is now."""

    refusal: Refusal | None
    binding: Binding | None = None
    last: bool = True


class Ready(NamedTuple):
    """Every fd is closed and none hung: the helper takes the next job. Comes when no answer was the `last`."""

    last: bool = True


# A class in a pickle is one byte instead of two names to be looked up.
for _code, _kind in enumerate((
    Take, Release, Arrange, Resize, Nudge, UseNumber, Taken, NumberPlease, Done, Released, Arranged, Resized, Ready,
    Terms, Attach, Sender, Binding, Number, Client, Node, Refusal, Code, Change, Changed, Sweep, Recognised, Keep,
    Revoke,
), 1):  # fmt: skip
    copyreg.add_extension(_kind.__module__, _kind.__qualname__, _code)


def pack(message: Any) -> bytes:
    """A message as bytes."""
    return pickle.dumps(message, pickle.HIGHEST_PROTOCOL)


def unpack(payload: bytes) -> Any:
    """The message that `pack` packed."""
    return pickle.loads(payload)  # noqa: S301  # of our own process: see above


def bug(text: str) -> Refusal:
    """What a helper says of a bug on its side; the main process records the text and does not send it on."""
    return Refusal(Code.INTERNAL, text)
