"""The wire: requests, replies, codes and refusals, and how they are written as JSON.

Owns what may be said over the socket: every field of every request, its default and its limits; the closed list of
codes; the shape of the replies. `decode` reads requests. Pure data: no I/O, no file descriptors (a request names them
by index), nothing of the package imported. Shared by daemon and client, so it keeps to Python 3.8 and the standard
library.
"""

from __future__ import annotations

import enum
import json
from typing import Any, NamedTuple, Union

VERSION = 1
"""Version of the protocol, in the reply to ``hello``. A field that is added does not raise it, a change of meaning
does.
"""

MAX_REQUEST = 8192
"""Bytes of one request datagram."""
MAX_REPLY = 65536
"""Bytes of one reply datagram; a longer list is continued (see `List.after`)."""
MAX_FDS = 8
"""File descriptors in one request."""
MAX_DEPTH = 16
"""Levels of objects and arrays in a request."""
MAX_OFFSET = 2**63 - 1
"""Largest offset and sizelimit in bytes: the kernel keeps both as a signed 64-bit number (else EOVERFLOW)."""
MAX_ID = 64
"""Characters of a request's ``id``."""
MAX_REF = 63
"""Bytes of ``ref``: the kernel's ``lo_file_name`` holds 64 with its terminating NUL."""
MAX_AFTER = 80
"""Characters of ``after``: a directory's name with its uid."""
DEVICES = 8
"""Device numbers of a directory, where the request that makes it does not say."""
MAX_DEVICES = 64
"""Device numbers that one directory may own."""
MAX_WAIT = 3600
"""Seconds that ``detach`` may be asked to wait."""
NO_UID = 2**32 - 1
"""What the kernel takes for no user."""
SECTOR_SIZES = (512, 1024, 2048, 4096)
"""Logical sector sizes in bytes that every supported kernel accepts on every page size."""
DIRECT_IO = ("auto", "on", "off")
DELIVERIES = ("node", "fd", "mount")


class Code(str, enum.Enum):
    """Why a request was refused. The list is closed: a client may dispatch on it."""

    MALFORMED = "malformed"
    UNSUPPORTED = "unsupported"
    BAD_FD = "bad-fd"
    INVALID = "invalid"
    NOT_PERMITTED = "not-permitted"
    QUOTA = "quota"
    EXISTS = "exists"
    NOT_FOUND = "not-found"
    BUSY = "busy"
    TIMEOUT = "timeout"
    UNDELIVERABLE = "undeliverable"
    NO_DEVICE = "no-device"
    IO = "io"
    INTERNAL = "internal"


class Refusal(Exception):
    """A request that is answered with a code. Everything else that is raised is a bug."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message

    def __reduce__(self) -> tuple[type[Refusal], tuple[Code, str]]:
        return Refusal, (self.code, self.message)

    def __str__(self) -> str:
        return f"{self.code.value}: {self.message}"


# Requests ---------------------------------------------------------------------------------------------------------


class Attach(NamedTuple):
    """Bind a backing file to a loop device. Indices count the datagram's SCM_RIGHTS fds from 0; sizes are bytes."""

    fd: int
    dir_fd: int | None = None
    reply_fd: int | None = None
    lease_fd: int | None = None
    id: str | None = None
    offset: int = 0
    sizelimit: int = 0
    sector_size: int = 512
    read_only: bool = False
    partscan: bool = False
    lock: bool = False
    direct_io: str = "auto"
    ref: str = ""
    deliver: tuple[str, ...] = ("node",)


class Detach(NamedTuple):
    """End a lease, if it is still that of `diskseq`. `wait`: seconds that the reply may take to say ``released``."""

    devname: str
    reply_fd: int | None = None
    id: str | None = None
    dir_fd: int | None = None
    wait: float = 0
    diskseq: int | None = None
    force: bool = False


class Leases(NamedTuple):
    """``list``: the owner's leases, all of them on the admin socket; `after` continues an earlier reply."""

    reply_fd: int | None = None
    id: str | None = None
    dir_fd: int | None = None
    after: str = ""


class Directory(NamedTuple):
    """Make a directory to be bound into a container, or `remove` it. Asked from the host, not from a container.

    `devices`: how many device numbers the directory owns. None: as many as it has, and 8 where it is made.
    `uid`: whose directory it is; on the admin socket. None: the sender's.
    """

    name: str
    reply_fd: int | None = None
    id: str | None = None
    remove: bool = False
    devices: int | None = None
    uid: int | None = None


class Directories(NamedTuple):
    """The directories of the sender's uid, all of them on the admin socket; `after` continues an earlier reply."""

    reply_fd: int | None = None
    id: str | None = None
    after: str = ""


class Rescan(NamedTuple):
    """Read the partition table again."""

    devname: str
    reply_fd: int | None = None
    id: str | None = None
    dir_fd: int | None = None


class Resize(NamedTuple):
    """Take over the size of the backing file, after it grew or shrank."""

    devname: str
    reply_fd: int | None = None
    id: str | None = None
    dir_fd: int | None = None


class Hello(NamedTuple):
    """The daemon's version, operations and limits."""

    reply_fd: int | None = None
    id: str | None = None


class Metrics(NamedTuple):
    """What the daemon counts, for the host's monitoring; on the admin socket."""

    reply_fd: int | None = None
    id: str | None = None


Request = Union[Attach, Detach, Leases, Directory, Directories, Rescan, Resize, Hello, Metrics]

OPERATIONS: dict[str, type[Request]] = {
    "attach": Attach,
    "detach": Detach,
    "list": Leases,
    "directory": Directory,
    "directories": Directories,
    "rescan": Rescan,
    "resize": Resize,
    "hello": Hello,
    "metrics": Metrics,
}


class Envelope(NamedTuple):
    """What is known of a request even when the rest of it is refused: where the answer goes and what it echoes."""

    op: str = ""
    reply_fd: int | None = None
    dir_fd: int | None = None
    id: str | None = None


# Replies ----------------------------------------------------------------------------------------------------------


class Attached(NamedTuple):
    """Reply to ``attach``. Sizes in bytes, flags are the kernel's; `diskseq` is None before Linux 5.15."""

    devname: str
    diskseq: int | None
    major: int
    minor: int
    size: int
    sector_size: int
    read_only: bool
    direct_io: bool
    partitions: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


class Detached(NamedTuple):
    """Reply to ``detach``: ``released``, or ``busy`` while somebody has the device open: it goes at the last close.

    `lost` is there only where the kernel could not write back to the image what was written to the device; it gives the
    reason in words.
    """

    state: str
    lost: str | None = None


class LeaseInfo(NamedTuple):
    """One row of the reply to ``list``. Times in seconds, sizes in bytes; the owner is for the admin socket. The
    client fills in `openers` and `backing_file_at_attach`, and puts the file's present name into `backing_file`.
    `window`: the partition that the device is a window on; it goes with its disk.
    """

    devname: str
    diskseq: int | None
    major: int
    minor: int
    size: int
    offset: int
    sizelimit: int
    sector_size: int
    read_only: bool
    direct_io: bool
    partscan: bool
    backing_file: str
    backing_dev: str
    backing_inode: int
    ref: str
    state: str
    lease: str
    age: float
    partitions: tuple[str, ...] = ()
    owner: str | None = None
    account: str | None = None
    uid: int | None = None
    pid: int | None = None
    unit: str | None = None
    openers: tuple[str, ...] | None = None
    backing_file_at_attach: str | None = None
    window: str | None = None


class LeaseList(NamedTuple):
    """Reply to ``list``; `more` when the reply was full and another request with `after` gives the rest.

    `numbers`: the device numbers that the directory owns which was sent along; None where it owns none, or none was
    sent. `in_use`: how many of these have a device, or one that is detached and still open somewhere.
    """

    leases: tuple[LeaseInfo, ...]
    more: bool = False
    numbers: tuple[int, ...] | None = None
    in_use: int | None = None


class Granted(NamedTuple):
    """Reply to ``directory``: where it is, or was, on the host, and the device numbers that it owns now.

    `remade`: whether opening a kept node of a removed device makes the device again (``max_loop`` is not in force);
    None while that is not known.
    """

    path: str
    numbers: tuple[int, ...] = ()
    remade: bool | None = None


class GrantInfo(NamedTuple):
    """One row of the reply to ``directories``. `in_use`: how many of its devices are attached, or not gone yet."""

    name: str
    uid: int
    path: str
    numbers: tuple[int, ...]
    in_use: int


class GrantList(NamedTuple):
    """Reply to ``directories``; `more` when the reply was full: the next request's `after` is the last row's
    ``UID-NAME``.
    """

    directories: tuple[GrantInfo, ...]
    more: bool = False


class Rescanned(NamedTuple):
    """Reply to ``rescan``: the partitions that there are now."""

    partitions: tuple[str, ...]


class Resized(NamedTuple):
    """Reply to ``resize``: the size now, in bytes."""

    size: int


class Greeting(NamedTuple):
    """Reply to ``hello``: versions, the operations of this socket, and limits in bytes, numbers and seconds. `uid`: the
    sender's, as the host counts.
    """

    loopd: str
    protocol: int
    operations: tuple[str, ...]
    limits: dict[str, int]
    uid: int | None = None


class Measured(NamedTuple):
    """Reply to ``metrics``: OpenMetrics text."""

    openmetrics: str


Reply = Union[Attached, Detached, LeaseList, Granted, GrantList, Rescanned, Resized, Greeting, Measured]


def _jsonable(value: Any) -> Any:
    if hasattr(value, "_asdict"):
        return {name: _jsonable(item) for name, item in zip(value._fields, value) if item is not None}
    if isinstance(value, tuple):
        return [_jsonable(item) for item in value]
    return value


_encoder = json.JSONEncoder(separators=(",", ":"))


def encode_request(request: Request) -> bytes:
    """The datagram of a request; fields at their default are left out."""
    (op,) = (name for name, kind in OPERATIONS.items() if kind is type(request))
    fields: dict[str, Any] = {"op": op}
    for name, value in zip(request._fields, request):
        if name not in request._field_defaults or request._field_defaults[name] != value:
            fields[name] = value  # noqa: PERF403  # three conditions in a comprehension read worse
    return _encoder.encode(fields).encode()


def encode_reply(reply: Reply | Refusal, id: str | None = None) -> bytes:
    """The datagram of a reply or refusal, echoing the request's `id`."""
    if isinstance(reply, Refusal):
        fields: dict[str, Any] = {"error": {"code": reply.code.value, "message": reply.message}}
    else:
        fields = _jsonable(reply)
    if id is not None:
        fields["id"] = id
    return _encoder.encode(fields).encode()


def decode_reply(payload: bytes) -> dict[str, Any]:
    """The fields of a reply; raises the `Refusal` that it is, ValueError for one that is neither.

    Lenient where `decode` is strict: a newer daemon may say more than this module knows, with codes of its own.
    """
    fields = json.loads(payload.decode())
    if not isinstance(fields, dict):
        raise ValueError("the reply is no JSON object")
    error = fields.get("error")
    if error is None:
        return fields
    try:
        code = Code(error["code"])
    except ValueError:
        code = Code.INTERNAL
    raise Refusal(code, str(error["message"]))
