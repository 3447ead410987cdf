"""`make fuzz`: datagrams that no client sends, with fds of every kind, to a real daemon that serves others too.

Nothing may come of them: no bug, no end, and nothing that stays; and the honest client, in another account, must not
notice. What was sent is in a transcript, which is named when something fails, and can be sent again.

    LOOPD_FUZZ_DATAGRAMS  how many (100,000)
    LOOPD_FUZZ_SEED       another run (0); the same number generates the same datagrams
    LOOPD_FUZZ_REPLAY     a transcript to send, in place of what would be generated
"""

from __future__ import annotations

import array
import ast
import contextlib
import ctypes
import fcntl
import functools
import json
import os
import random
import re
import select
import shutil
import signal
import socket
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from support.daemon import Daemon, bound_to, eventually, require
from support.processes import NOBODY, Child, become, own_user_namespace
from support.untouched import Untouched, cgroup, droppers, helpers, honest, pair

from loopd.daemon import counter as counters
from loopd.daemon import numbers
from loopd.protocol import wire
from loopd.protocol.decode import VALIDATORS, decode
from loopd.worker import make

DATAGRAMS = int(os.environ.get("LOOPD_FUZZ_DATAGRAMS", "100000"))
SEED = int(os.environ.get("LOOPD_FUZZ_SEED", "0"))
REPLAY = os.environ.get("LOOPD_FUZZ_REPLAY", "")
ROUND = min(5000, max(1, DATAGRAMS // 6))
"""Datagrams of one process. When it ends, so must everything that it was given."""
TAKEN = 30.0
"""Seconds in which the daemon takes a datagram from its queue, and an honest client is served."""
GROWTH = 24 << 20
"""Bytes that the main process may grow by after its first round."""

SETTINGS = settings(
    database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck), print_blob=False
)


class Datagram(NamedTuple):
    """What is sent. `kinds` names the fds (see `Zoo`); the client then does `deed` to one of its directories.

    `claimed` are the credentials that a process of root's can send in place of its own.
    """

    payload: bytes
    kinds: tuple[str, ...] = ()
    claimed: tuple[int, int] | None = None
    deed: str = ""


# Payloads ---------------------------------------------------------------------------------------------------------

LIVE = "loop@live"
"""In a payload: the name of a device that the client has."""

NUMBERS = (-1, 0, 1, 7, 8, 511, 512, 1023, 4096, 65536, 2**20, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**30)
TEXTS = ("", "a", "é" * 32, "x" * 63, "x" * 64, "x" * 65, "\0", "a\nb", "\ud800", "\u202e", "../..", "\U0001f4be")

quantities = st.one_of(st.sampled_from(NUMBERS), st.integers(), st.floats())
texts = st.one_of(st.sampled_from(TEXTS), st.text(max_size=8))
junk = st.recursive(
    st.one_of(st.none(), st.booleans(), quantities, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=4,
)
sizes = st.one_of(st.just(0), st.sampled_from([512, 4096, 65536, 1 << 20, 1, 511, 2**63 - 1]))
devnames = st.sampled_from([LIVE, LIVE, LIVE, "loop0", "loop4096", "loop1048575", "loop0001", "loop99999999"])

# For each field a value that is valid, and often makes sense.
VALID: dict[str, st.SearchStrategy[Any]] = {
    "fd": st.integers(0, wire.MAX_FDS - 1),
    "dir_fd": st.integers(0, wire.MAX_FDS - 1),
    "reply_fd": st.integers(0, wire.MAX_FDS - 1),
    "lease_fd": st.integers(0, wire.MAX_FDS - 1),
    "id": st.sampled_from(["", "1", "é" * 64, '"\\']),
    "offset": sizes,
    "sizelimit": sizes,
    "sector_size": st.sampled_from(wire.SECTOR_SIZES),
    "read_only": st.booleans(),
    "partscan": st.booleans(),
    "lock": st.booleans(),
    "direct_io": st.sampled_from(wire.DIRECT_IO),
    "ref": st.sampled_from(["", "mine", "é" * 31, "/a/b"]),
    "deliver": st.lists(st.sampled_from(wire.DELIVERIES), min_size=1, max_size=3),
    "devname": devnames,
    "diskseq": st.sampled_from([0, 1, 10**6]),
    "name": st.sampled_from(["a", "b", "A.b-c_9"]),
    "remove": st.booleans(),
    "wait": st.sampled_from([0, 0.01, 1, 3600]),
    "force": st.just(False),
    "after": st.sampled_from(["", LIVE, "loop4096", "0-a"]),
    "devices": st.integers(1, wire.MAX_DEVICES),
    "uid": st.integers(0, wire.NO_UID - 1),
}

# What each index mostly leads to.
RIGHT = {
    "fd": ("file", "file", "file", "read-only file", "memfd", "small file"),
    "dir_fd": ("directory", "directory", "directory", "grant"),
    "reply_fd": ("reply",),
    "lease_fd": ("reply", "pidfd", "half"),
}
OPERATIONS = ("attach",) * 10 + ("detach",) * 4 + tuple(wire.OPERATIONS)
DEEDS = (
    "", "", "", "", "unlink", "rename", "link", "replace", "occupy", "partition", "autoclear", "flags", "size", "lease",
)  # fmt: skip

Pairs = list[tuple[str, Any]]


@st.composite
def valid(draw: st.DrawFn) -> tuple[Pairs, list[str]]:
    """The fields of a request that can be decoded, and the kinds of the fds that it wants."""
    op = draw(st.sampled_from(OPERATIONS))
    request = wire.OPERATIONS[op]
    fields: Pairs = [("op", op)]
    kinds: list[str] = []
    # Two draws for all of them: a quarter of the requests has what is unusual, or has not what is usual.
    every = st.integers(0, 2 ** len(request._fields) - 1)
    chosen = draw(every) & draw(every)
    for bit, name in enumerate(request._fields):
        rare = bool(chosen >> bit & 1)
        needed = name not in request._field_defaults or (op == "attach" and name == "dir_fd")
        if not needed and rare is (name == "reply_fd"):
            continue
        if name in RIGHT:
            fields.append((name, len(kinds)))
            kinds.append(draw(st.sampled_from(RIGHT[name])))
        else:
            fields.append((name, draw(VALID[name])))
    return fields, kinds


@st.composite
def bent(draw: st.DrawFn) -> tuple[Pairs, list[str]]:
    """A valid request with one to three things wrong."""
    fields, kinds = draw(valid())
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(fields) - 1))
        name, value = fields[at]
        change = draw(st.sampled_from(["value", "other", "name", "twice", "gone", "kind", "fewer", "more"]))
        if change == "value":
            fields[at] = name, draw(junk)
        elif change == "other":
            fields[at] = draw(st.sampled_from(sorted(VALID))), value
        elif change == "name":
            fields[at] = draw(texts), value
        elif change == "twice":
            fields.append((name, value))
        elif change == "gone" and len(fields) > 1:
            del fields[at]
        elif change == "kind" and kinds:
            kinds[draw(st.integers(0, len(kinds) - 1))] = draw(st.sampled_from(KINDS))
        elif change == "fewer":
            kinds = kinds[:-1]
        else:
            kinds += draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=9))
    return fields, kinds


def encoded(fields: Pairs) -> bytes:
    """As JSON, with keys that stand twice and with values that are none of JSON's."""
    text = "{" + ",".join(f"{json.dumps(name)}:{json.dumps(value, ensure_ascii=False)}" for name, value in fields) + "}"
    return text.encode(errors="surrogatepass")


def damaged(payload: bytes, at: int, change: int) -> bytes:
    """With a few bytes changed, taken out, or put in."""
    at %= len(payload) + 1
    return (
        payload[:at],
        payload[at:],
        payload[:at] + bytes([change % 256]) + payload[at + 1 :],
        payload[:at] + b"9" * (change % 6000) + payload[at:],
        payload[:at] + b" " * (change % 9000) + payload[at:],
        payload + payload,
    )[change % 6]


NESTED = (b"[" * 8192, b'{"a":' * 1600, b'{"offset":' + b"9" * 8000 + b"}", b"\xff\xfe{}", b"null", b"NaN", b"{}")

raw = st.one_of(
    st.binary(max_size=40),
    st.sampled_from(NESTED),
    st.integers(8000, 8400).map(lambda size: b'{"op":"hello","id":"' + b"x" * size + b'"}'),
    st.builds(lambda value: json.dumps(value).encode(), junk),
    st.builds(
        lambda request, at, change: damaged(encoded(request[0]), at, change),
        valid(), st.integers(0, 300), st.integers(0, 2**16),
    ),
)  # fmt: skip

payloads = st.one_of(raw, *(requests.map(lambda request: encoded(request[0])) for requests in (valid(), bent())))


@st.composite
def datagrams(draw: st.DrawFn) -> Datagram:
    """Half of them are valid requests: they get furthest."""
    sort = draw(st.integers(0, 99))
    if sort < 50:
        fields, kinds = draw(valid())
        payload = encoded(fields)
    elif sort < 85:
        fields, kinds = draw(bent())
        payload = encoded(fields)
    else:
        payload, kinds = draw(raw), draw(st.lists(st.sampled_from(KINDS), max_size=12))
    claimed = draw(st.sampled_from([(0, 0), (NOBODY, NOBODY), (1000, 0), (2**32 - 2, 7)])) if sort % 16 == 0 else None
    return Datagram(payload, tuple(kinds), claimed, draw(st.sampled_from(DEEDS)))


# File descriptors -------------------------------------------------------------------------------------------------

LOOP_CLR_FD, LOOP_SET_STATUS64 = 0x4C01, 0x4C04
SYS_OPEN_TREE, OPEN_TREE_CLONE = 428, 1
PR_SET_PDEATHSIG = 1


class Zoo:
    """Fds of every kind; also those that the client could not open itself."""

    def __init__(self, base: Path, uid: int, grant: Path | None) -> None:
        self.base = base
        base.mkdir()
        os.chown(base, uid, uid)
        self._kept: dict[str, int] = {}
        self._grant = grant
        self.directories: list[int] = []
        self._files(uid)
        self._directories(uid)
        self._special()
        self._sockets()

    def _open(self, kind: str, path: Path | str, flags: int = os.O_RDWR) -> int:
        fd = os.open(path, flags | os.O_CLOEXEC)
        self._kept[kind] = fd
        return fd

    @property
    def fds(self) -> list[int]:
        """All of them."""
        return list(self._kept.values())

    def close(self) -> None:
        for fd in self._kept.values():
            os.close(fd)

    def _file(self, name: str, size: int, uid: int) -> Path:
        path = self.base / name
        path.touch()
        os.truncate(path, size)
        os.chown(path, uid, uid)
        return path

    def _files(self, uid: int) -> None:
        image = self._file("image", 1 << 20, uid)
        self._open("file", image)
        self._open("read-only file", image, os.O_RDONLY)
        self._open("write-only file", image, os.O_WRONLY)
        self._open("append file", image, os.O_RDWR | os.O_APPEND)
        self._open("path of a file", image, os.O_PATH)
        self._open("small file", self._file("small", 1000, uid))
        self._open("empty file", self._file("empty", 0, uid))
        self._open("deleted file", self._file("deleted", 1 << 16, uid))
        (self.base / "deleted").unlink()
        memfd = os.memfd_create("fuzz")
        os.truncate(memfd, 1 << 16)
        self._kept["memfd"] = memfd
        sealed = os.memfd_create("fuzz", os.MFD_ALLOW_SEALING)
        os.truncate(sealed, 1 << 16)
        fcntl.fcntl(sealed, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        self._kept["sealed memfd"] = sealed
        self._open("file without a name", self.base, os.O_TMPFILE | os.O_RDWR)
        os.truncate(self._kept["file without a name"], 1 << 16)
        self._open("direct file", image, os.O_RDWR | os.O_DIRECT)

    def _directories(self, uid: int) -> None:
        for kind, mode in (("directory", 0o755), ("closed directory", 0o500), ("root's directory", 0o755)):
            path = self.base / kind.replace(" ", "-")
            path.mkdir()
            os.chown(path, *((0, 0) if kind.startswith("root") else (uid, uid)))
            path.chmod(mode)
            self.directories.append(self._open(kind, path, os.O_RDONLY | os.O_DIRECTORY))
        self._open("path of a directory", self.base / "directory", os.O_PATH)
        self._open("grant", self._grant or self.base / "directory", os.O_RDONLY)
        gone = self.base / "gone"
        gone.mkdir()
        self._open("removed directory", gone, os.O_RDONLY)
        gone.rmdir()
        (self.base / "link").symlink_to("directory")
        self._open("symbolic link", self.base / "link", os.O_PATH | os.O_NOFOLLOW)
        tree = ctypes.CDLL(None).syscall(SYS_OPEN_TREE, -100, str(self.base).encode(), OPEN_TREE_CLONE)
        self._kept["detached mount"] = tree if tree >= 0 else self.directories[0]

    def _special(self) -> None:
        os.mkfifo(self.base / "fifo")
        self._open("fifo", self.base / "fifo", os.O_RDWR | os.O_NONBLOCK)
        for kind, path in (
            ("null", "/dev/null"), ("zero", "/dev/zero"), ("loop-control", "/dev/loop-control"),
            ("sysctl", "/proc/sys/kernel/hostname"), ("sysfs", "/sys/kernel/uevent_seqnum"),
            ("process", "/proc/self"), ("root of proc", "/proc"), ("mounts", "/proc/self/mounts"),
        ):  # fmt: skip
            directory = os.path.isdir(path)
            self._open(kind, path, os.O_RDONLY if directory or kind in ("sysfs", "mounts", "sysctl") else os.O_RDWR)
        read, write = os.pipe()
        self._kept["pipe to read"] = read
        self._kept["pipe to write"] = write
        self._kept["eventfd"] = os.eventfd(0)
        libc = ctypes.CDLL(None)
        self._kept["epoll"] = libc.epoll_create1(0)
        self._kept["inotify"] = libc.inotify_init1(0)
        self._kept["timerfd"] = libc.timerfd_create(1, 0)
        self._kept["signalfd"] = libc.signalfd(-1, ctypes.create_string_buffer(128), 0)
        self._kept["device"] = os.dup(read)  # until there is one

    def _sockets(self) -> None:
        server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        server.bind("")
        server.listen(1)
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connected.connect(server.getsockname())
        halves, ends = pair(), socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        for kind, made in (
            ("internet socket", socket.socket(socket.AF_INET, socket.SOCK_DGRAM)),
            ("netlink", socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 15)),
            ("server", server), ("connection", connected), ("half", halves[0]), ("other half", halves[1]),
            ("datagram socket", ends[0]), ("other datagram socket", ends[1]),
        ):  # fmt: skip
            self._kept[kind] = made.detach()

    def start(self) -> None:
        """What must be the process's own."""
        self._kept["own pidfd"] = os.pidfd_open(os.getpid())
        self._child = os.fork()
        if self._child == 0:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
            signal.pause()
            os._exit(0)
        self._kept["pidfd"] = os.pidfd_open(self._child)
        ended = os.fork()
        if ended == 0:
            os._exit(0)
        self._kept["pidfd of an ended process"] = os.pidfd_open(ended)
        os.waitpid(ended, 0)

    def end(self) -> None:
        os.kill(self._child, signal.SIGKILL)
        os.waitpid(self._child, 0)

    def adopt(self, device: int) -> None:
        """A device that was delivered is a kind too, the last one."""
        os.close(self._kept["device"])
        self._kept["device"] = device

    def give(self, kind: str) -> tuple[int, socket.socket | None]:
        """An fd, the caller's to close, and the client's end of it where it is a reply socket."""
        if kind in self._kept:
            return os.dup(self._kept[kind]), None
        family = socket.SOCK_STREAM if kind == "stream" else socket.SOCK_SEQPACKET
        ours, theirs = socket.socketpair(socket.AF_UNIX, family)
        if kind == "hung up":
            ours.close()
            return theirs.detach(), None
        if kind == "shut down":
            theirs.shutdown(socket.SHUT_RDWR)
        elif kind == "queued in itself":
            ours.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [theirs.fileno()]))])
        elif kind == "full":
            theirs.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    theirs.send(b"x" * 4096)
        return theirs.detach(), ours


KINDS = (
    "reply", "reply", "reply", "stream", "half", "other half", "hung up", "shut down", "queued in itself", "full",
    "file", "read-only file", "write-only file", "append file", "path of a file", "small file", "empty file",
    "deleted file", "memfd", "sealed memfd", "file without a name", "direct file", "directory", "closed directory",
    "root's directory", "path of a directory", "grant", "removed directory", "symbolic link", "detached mount", "fifo",
    "null", "zero", "loop-control", "sysctl", "sysfs", "process", "root of proc", "mounts", "pipe to read",
    "pipe to write", "eventfd", "epoll", "inotify",
    "timerfd", "signalfd", "device", "internet socket", "server", "connection", "netlink", "datagram socket",
    "own pidfd", "pidfd", "pidfd of an ended process",
)  # fmt: skip


# The client -------------------------------------------------------------------------------------------------------


class Client:
    """Sends datagrams, looks at what is answered, and misbehaves in its own directories."""

    KEPT = 48
    """Reply sockets that stay open, and with them the leases that they keep."""

    def __init__(self, channel: socket.socket, zoo: Zoo, transcript: TextIO) -> None:
        self._zoo = zoo
        self._transcript = transcript
        self._open: deque[tuple[Datagram, bytes, socket.socket]] = deque()
        self._live: deque[str] = deque(maxlen=16)
        self._random = random.Random(0)
        self._socket = channel
        self._privileged = os.access("/", os.W_OK) and "4294967295" in Path("/proc/self/uid_map").read_text()
        self.sent = 0
        self.answers: Counter[str] = Counter()

    def send(self, datagram: Datagram) -> None:
        """One of them."""
        print(repr(tuple(datagram)), file=self._transcript, flush=True)
        live = self._random.choice(self._live) if self._live else "loop4097"
        payload = datagram.payload.replace(LIVE.encode(), live.encode())
        control: list[tuple[int, int, Any]] = []
        fds: list[int] = []
        try:
            for kind in datagram.kinds:
                fd, ours = self._zoo.give(kind)
                fds.append(fd)
                if ours is not None:
                    self._open.append((datagram, payload, ours))
            if fds:
                control.append((socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds)))
            if datagram.claimed is not None and self._privileged:
                claimed = array.array("I", (os.getpid(), *datagram.claimed))
                control.append((socket.SOL_SOCKET, socket.SCM_CREDENTIALS, claimed))
            self._socket.sendmsg([payload], control)
        finally:
            for fd in fds:
                os.close(fd)
        self.sent += 1
        while len(self._open) > self.KEPT:
            self._look(*self._open.popleft())
        if datagram.deed:
            self._act(datagram.deed)

    def finish(self) -> None:
        """Let go of everything."""
        for entry in self._open:
            self._look(*entry)
        self._open.clear()

    def _look(self, datagram: Datagram, payload: bytes, ours: socket.socket) -> None:
        """At the answer, of which there may be one at most, and which must be what the decoder says."""
        with ours:
            answers = [*self._received(ours)]
        if ours.type is not socket.SOCK_SEQPACKET or "queued in itself" in datagram.kinds or "full" in datagram.kinds:
            return
        assert len(answers) <= 1, (datagram, answers)
        for answer in answers:
            try:
                fields = wire.decode_reply(answer)
                code = ""
            except wire.Refusal as refusal:
                fields, code = {}, refusal.code.value
            self.answers[code or ("attached" if "devname" in fields else "answered")] += 1
            assert code != "internal", (datagram, answer)
            _, request = decode(payload)
            if isinstance(request, wire.Refusal):
                assert code == request.code.value, (datagram, answer, request)
            elif isinstance(request, wire.Attach) and not code:
                self._live.append(fields["devname"])

    def _received(self, ours: socket.socket) -> Iterator[bytes]:
        ours.setblocking(False)
        with contextlib.suppress(BlockingIOError, ConnectionResetError):
            while True:
                payload, control, _, _ = ours.recvmsg(wire.MAX_REPLY, socket.CMSG_SPACE(64))
                for _, kind, data in control:
                    if kind == socket.SCM_RIGHTS:
                        self._keep(array.array("i", data))
                if not payload:
                    return
                yield payload

    def _keep(self, fds: array.array[int]) -> None:
        for fd in fds:
            if os.major(os.fstat(fd).st_rdev) == 7:
                self._zoo.adopt(fd)
            else:
                os.close(fd)

    def _act(self, deed: str) -> None:
        """What a client may do to the nodes that it was given."""
        directory = self._random.choice(self._zoo.directories)
        names = [name for name in os.listdir(f"/proc/self/fd/{directory}") if name.startswith("loop")]
        name = self._random.choice(names) if names else "loop4096"
        other = f"mine{self.sent}"
        with contextlib.suppress(OSError):
            if deed == "unlink":
                os.unlink(name, dir_fd=directory)
            elif deed == "rename":
                os.rename(name, other, src_dir_fd=directory, dst_dir_fd=directory)
            elif deed == "link":
                os.link(name, other, src_dir_fd=directory, dst_dir_fd=directory)
            elif deed == "replace":
                os.unlink(name, dir_fd=directory)
                os.symlink("/dev/null", name, dir_fd=directory)
            elif deed == "occupy":
                next_name = f"loop{int((self._live or ['loop4096'])[-1][4:]) + self._random.randrange(40)}"
                os.mkdir(next_name, dir_fd=directory)
            elif deed in ("partition", "autoclear"):
                self._change(directory, name, deed)
            else:
                self._change_file(deed)

    def _change_file(self, deed: str) -> None:
        """Of the open file description that was sent, perhaps before anybody has looked at it."""
        fd, _ = self._zoo.give(self._random.choice(["file", "read-only file", "direct file"]))
        try:
            if deed == "flags":
                chosen = self._random.choice([0, 0, os.O_APPEND, os.O_DIRECT, os.O_NONBLOCK | os.O_ASYNC])
                fcntl.fcntl(fd, fcntl.F_SETFL, chosen)
            elif deed == "size":
                os.ftruncate(fd, self._random.choice([0, 700, 1 << 16, 1 << 20, 1 << 20]))
            else:
                fcntl.fcntl(fd, fcntl.F_SETLEASE, self._random.choice([fcntl.F_RDLCK, fcntl.F_WRLCK, fcntl.F_UNLCK]))
        finally:
            os.close(fd)

    def _change(self, directory: int, name: str, deed: str) -> None:
        node = os.open(name, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        try:
            if os.major(os.fstat(node).st_rdev) != 7:
                return
            if deed == "partition":
                os.pwrite(node, self._random.randbytes(512), 0)
            else:
                fcntl.ioctl(node, LOOP_SET_STATUS64, bytes(232))
                fcntl.ioctl(node, LOOP_CLR_FD)
        finally:
            os.close(node)


RELATIVES = 4
"""Datagrams made of one, for each costs hypothesis some milliseconds."""


def generate(client: Client, count: int, number: int) -> None:
    """Send that many datagrams; the same ones for the same number."""
    chance = random.Random(number)

    @seed(number)
    @settings(SETTINGS, max_examples=-(-count // RELATIVES))
    @given(datagrams())
    def send(datagram: Datagram) -> None:
        client.send(datagram)
        # Once more, with its fds in another order, and with a byte or two that are wrong.
        client.send(datagram._replace(deed=""))
        client.send(datagram._replace(kinds=tuple(chance.sample(datagram.kinds, len(datagram.kinds)))))
        client.send(datagram._replace(payload=damaged(datagram.payload, chance.randrange(300), chance.getrandbits(16))))

    send()


def replay(client: Client, path: str) -> None:
    """Send what a transcript has."""
    for line in Path(path).read_text().splitlines():
        client.send(Datagram(*ast.literal_eval(line)))


# The runs ---------------------------------------------------------------------------------------------------------

POLICY = """
# Nothing of the client's is dropped unseen, and it does not run out of numbers.
[limits]
requests = 1000000
new_numbers = 1000000
[allow]
lock = true
"""


def registered(daemon: Daemon) -> Counter[str]:
    """What the main process waits for: epoll's and inotify's entries, but for the channels of its children."""
    found: Counter[str] = Counter()
    for info in Path(f"/proc/{daemon.pid}/fdinfo").iterdir():
        with contextlib.suppress(OSError):
            found += Counter(re.findall(r"^(tfd:|inotify wd)", info.read_text(), re.MULTILINE))
    found["tfd:"] -= len(helpers(daemon)) + len(droppers(daemon))
    return found


def resident(daemon: Daemon) -> int:
    """Bytes of memory that the main process has."""
    return int(Path(f"/proc/{daemon.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def serve(daemon: Daemon, until: Callable[[], bool]) -> tuple[int, float]:
    """Be the honest client meanwhile: how often it was served, and how long it took at worst."""
    served, worst = 0, 0.0
    while not until():
        began = time.monotonic()
        assert daemon.hello().code is None
        honest(daemon)
        for reply in daemon._replies:
            reply.close()
        daemon._replies.clear()
        served, worst = served + 1, max(worst, time.monotonic() - began)
    return served, worst


def attack(
    path: str, zoo: Zoo, enter: Callable[[], None], identity: str, send: Callable[[Client], None], transcript: TextIO
) -> Child:
    """The hostile client, a process of its own in an account of its own."""

    def body(tell: Callable[[Any], None]) -> None:
        enter()
        channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        channel.settimeout(TAKEN)
        channel.connect(path)  # the test's directory is root's
        if identity != "root":
            become(NOBODY)
        if identity == "user namespace":
            own_user_namespace()
        zoo.start()
        try:
            client = Client(channel, zoo, transcript)
            send(client)
            client.finish()
        finally:
            zoo.end()
        tell([client.sent, client.answers])

    return Child(body, [*zoo.fds, transcript.fileno()])


def ended(child: Child) -> bool:
    """Whether the client has said its last word."""
    return bool(select.select([child._lines], [], [], 0.05)[0])


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that every user can enter, unlike pytest's."""
    path = Path(tempfile.mkdtemp(prefix="loopd-fuzz-", dir="/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def fuzzed(start_daemon: Callable[..., Daemon], tmp_path: Path, place: Path) -> Daemon:
    """The daemon, with numbers that no other one of the machine comes near to."""
    require(ctypes.CDLL(None).syscall(SYS_OPEN_TREE, -100, b"/", OPEN_TREE_CLONE) >= 0, "needs CAP_SYS_ADMIN")
    (tmp_path / "loopd.toml").write_text(POLICY)
    (place / "grants").mkdir(mode=0o711)
    state = tmp_path / "loopd/state"
    state.mkdir(parents=True)
    # By default numbers start from the clock.
    block = int(time.time() / (counters.QUARANTINE / counters.BLOCKS) + counters.BLOCKS / 2) % counters.BLOCKS
    empty = bytes(counters.BLOCKS * counters._ENTRY.size)
    (state / "numbers").write_bytes(counters._HEADER.pack(counters._MAGIC, block) + empty)
    return start_daemon(f"--config={tmp_path}/loopd.toml", f"--grant-directory={place}/grants")


def made(daemon: Daemon) -> list[str]:
    """The devices that exist of the numbers that this daemon has had."""
    counter = (daemon.state / "numbers").read_bytes()[counters._HEADER.size :]
    used = [block for block, entry in enumerate(counters._ENTRY.iter_unpack(counter)) if any(entry)]
    assert used
    starts = [make.FIRST + block * counters.BLOCK for block in used]
    every = {f"loop{number}" for start in starts for number in range(start, start + counters.BLOCK)}
    return sorted(every.intersection(os.listdir("/sys/block")))


IDENTITIES = ("root", "nobody", "user namespace")


def test_daemon(fuzzed: Daemon, place: Path, tmp_path: Path) -> None:
    """One process after the other sends; after each, the daemon holds what it held before."""
    daemon, sent, answers = fuzzed, 0, Counter[str]()
    honest(daemon)
    grant = Path(daemon.ask(wire.Directory("fuzz", 0), []).fields["path"])
    before, waiting, size = Untouched(daemon), registered(daemon), 0
    transcript = Path(tempfile.gettempdir()) / f"loopd-fuzz-{os.getpid()}"
    with cgroup(f"loopd-fuzz-{os.getpid()}") as enter:
        require(enter, "needs a cgroup hierarchy to make a second account in")
        assert enter is not None
        while sent < DATAGRAMS:
            turn = sent // ROUND
            count, identity = min(ROUND, DATAGRAMS - sent), IDENTITIES[turn % len(IDENTITIES)]
            send = functools.partial(generate, count=count, number=SEED * 1_000_000 + turn)
            if REPLAY:
                send = functools.partial(replay, path=REPLAY)
            uid = 0 if identity == "root" else NOBODY
            zoo = Zoo(place / f"client{turn}", uid, grant if uid == 0 else None)
            began = time.monotonic()
            try:
                with transcript.open("w") as log, attack(daemon.path, zoo, enter, identity, send, log) as client:
                    served, worst = serve(daemon, functools.partial(ended, client))
                    number, codes = client.hear()
            finally:
                zoo.close()
            took = time.monotonic() - began
            print(f"{identity}: {number} in {took:.0f} s; {served} honest, at worst {worst:.2f} s; {codes}")
            sent, answers = sent + max(number, 1), answers + Counter(codes)
            assert worst < TAKEN
            eventually(lambda: not bound_to(place), "no file of the client is bound", 30)
            before.check(tmp_path)
            assert b"LOOPD_EVENT='failed'" not in daemon.log_path.read_bytes(), transcript
            eventually(lambda: registered(daemon) == waiting, "nothing more is waited for")
            eventually(lambda: len(made(daemon)) <= numbers.Numbers.AHEAD, "used numbers are removed", 30)
            assert not [path for path in grant.parent.rglob("loop*") if not path.is_dir()]
            assert resident(daemon) < (size := size or resident(daemon)) + GROWTH
            shutil.rmtree(zoo.base)
            daemon.log_path.write_bytes(b"")
    # It was no fuzz if nothing ever got through, or if a kind of answer never came.
    if not REPLAY and sent >= 3000:
        assert min(answers["answered"], answers["attached"]) > sent // 50
        assert {"malformed", "unsupported", "bad-fd", "invalid", "not-found", "not-permitted"} <= answers.keys()
    transcript.unlink()


@settings(SETTINGS, max_examples=max(1000, DATAGRAMS // 4), phases=[Phase.explicit, Phase.generate, Phase.shrink])
@seed(SEED)
@given(payloads)
def test_decoder(payload: bytes) -> None:
    """The decoder never raises; what it accepts is what it encodes, and the envelope says the same as the request."""
    envelope, request = decode(payload)
    if isinstance(request, wire.Refusal):
        assert json.loads(wire.encode_reply(request, envelope.id))["error"]["code"] == request.code.value
        return
    again = wire.encode_request(request)
    assert decode(again) == (envelope, request)
    assert wire.OPERATIONS[envelope.op] is type(request)
    assert (envelope.id, envelope.reply_fd) == (request.id, request.reply_fd)


def test_tables() -> None:
    """The fuzzer knows every field and every operation; what it takes for valid is valid."""
    assert VALID.keys() == VALIDATORS.keys()
    assert {name for name in VALID if name.endswith("fd")} == set(RIGHT)
    assert set(OPERATIONS) == set(wire.OPERATIONS)
    assert {kind for kinds in RIGHT.values() for kind in kinds} <= set(KINDS)
