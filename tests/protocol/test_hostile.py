"""Bad input, each with its code: nothing of it is left in any process of the daemon, and an honest client is served."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.daemon import Daemon, Reply, bound_to, eventually, require
from support.processes import mapped
from support.untouched import (
    Untouched,
    ask_at_address,
    become,
    concurrently,
    elsewhere,
    helpers,
    honest,
    leases,
    pair,
    reply_of,
    send,
)

from loopd.protocol import wire
from loopd.worker import files

NOBODY = 65534
ALL = b'{"fd": 0, "dir_fd": 1, "reply_fd": 2}'


@pytest.fixture(scope="module")
def _served() -> Iterator[Daemon]:
    require(os.geteuid() == 0, "needs root: loop devices")
    require(os.path.exists("/dev/loop-control"), "needs /dev/loop-control")
    # pytest's own directories are in reach of their owner alone.
    with tempfile.TemporaryDirectory(prefix="loopd-") as path:
        Path(path).chmod(0o755)
        directory = Path(path) / "loopd"
        directory.mkdir()
        config = Path(path) / "loopd.toml"
        config.write_text("idle_timeout = 600\nlimits.new_numbers = 100000\n")
        daemon = Daemon(directory, [f"--config={config}"], [], {})
        yield daemon
        daemon.stop()


@pytest.fixture
def served(_served: Daemon) -> Daemon:
    """One daemon for all of it: what an earlier test did to it would show in a later one. Everybody may send to it."""
    if not (_served._process and _served._process.poll() is None):
        _served.start()
        Path(_served.path).chmod(0o666)
    return _served


@pytest.fixture(autouse=True)
def untouched(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[None]:
    """The daemon that the test uses holds afterwards what it held before, and serves an honest client."""
    daemon: Daemon = request.getfixturevalue("served")
    before = Untouched(daemon)
    yield
    for reply in daemon._replies:
        reply.close()
    before.check(tmp_path)
    honest(daemon)


@pytest.fixture
def closing() -> Iterator[contextlib.ExitStack]:
    """Closes what a test opens."""
    with contextlib.ExitStack() as stack:
        yield stack


def opened(closing: contextlib.ExitStack, path: str | Path, flags: int) -> int:
    """The file, open until the test ends."""
    fd = os.open(path, flags | os.O_CLOEXEC)
    closing.callback(os.close, fd)
    return fd


def owned(closing: contextlib.ExitStack, *fds: int) -> int:
    """The first of fds that are closed when the test ends."""
    for fd in fds:
        closing.callback(os.close, fd)
    return fds[0]


# Bytes ------------------------------------------------------------------------------------------------------------

# With reply_fd as the last of three fds, or found by loopd where the bytes cannot name it.
BYTES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "malformed"),
    "not JSON": (b"attach, please", "malformed"),
    "cut off": (b'{"fd": 0, "dir_fd": 1, "reply_', "malformed"),
    "two objects": (ALL + ALL, "malformed"),
    "invalid UTF-8": (b'{"fd": 0, "dir_fd": 1, "reply_fd": 2, "ref": "\xff"}', "malformed"),
    "UTF-16": (ALL.decode().encode("utf-16"), "malformed"),
    "NUL bytes": (b"\0" * 100, "malformed"),
    "5,000 open arrays": (b"[" * 5000, "malformed"),
    "4,000 nested arrays": (b"[" * 4000 + b"]" * 4000, "malformed"),
    "1,000 nested objects": (b'{"a":' * 1000 + b"1" + b"}" * 1000, "malformed"),
    "17 nested objects": (b'{"a":' * 17 + b"1" + b"}" * 17, "malformed"),
    "an array": (b"[0, 1, 2]", "malformed"),
    "a number": (b"1", "malformed"),
    "null": (b"null", "malformed"),
    "a number of 7,000 digits": (b'{"fd": 0, "reply_fd": 2, "dir_fd": ' + b"1" * 7000 + b"}", "malformed"),
    "NaN": (b'{"reply_fd": 2, "op": "detach", "devname": "loop4096", "wait": NaN}', "malformed"),
    "Infinity": (b'{"reply_fd": 2, "op": "detach", "devname": "loop4096", "wait": Infinity}', "malformed"),
    "a key twice": (b'{"reply_fd": 2, "fd": 0, "fd": 1, "dir_fd": 1}', "malformed"),
    "more than 8 KiB": (ALL + b" " * (wire.MAX_REQUEST - len(ALL) + 1), "malformed"),
    "100 KiB": (ALL + b" " * 100000, "malformed"),
}

# The rest of an object that has reply_fd.
FIELDS: dict[str, tuple[str, str]] = {
    "1e400": ('"fd": 0, "dir_fd": 1, "offset": 1e400', "malformed"),
    "endless wait": ('"op": "detach", "devname": "loop4096", "wait": 1e308', "malformed"),
    "true for an index": ('"fd": true, "dir_fd": 1', "malformed"),
    "a float for an index": ('"fd": 0.0, "dir_fd": 1', "malformed"),
    "null for an index": ('"fd": null, "dir_fd": 1', "malformed"),
    "a negative index": ('"fd": -1, "dir_fd": 1', "malformed"),
    "an index that is never there": ('"fd": 8, "dir_fd": 1', "malformed"),
    "an index that is not there": ('"fd": 3, "dir_fd": 1', "bad-fd"),
    "another index that is not there": ('"fd": 0, "dir_fd": 7', "bad-fd"),
    "a lease_fd that is not there": ('"fd": 0, "dir_fd": 1, "lease_fd": 5', "bad-fd"),
    "no fd": ('"dir_fd": 1', "malformed"),
    "no dir_fd": ('"fd": 0', "malformed"),
    "an unknown key": ('"fd": 0, "dir_fd": 1, "size": 1', "malformed"),
    "another operation's key": ('"op": "hello", "fd": 0', "malformed"),
    "1 for true": ('"fd": 0, "dir_fd": 1, "read_only": 1', "malformed"),
    "a negative offset": ('"fd": 0, "dir_fd": 1, "offset": -512', "malformed"),
    "an offset over 63 bits": ('"fd": 0, "dir_fd": 1, "offset": 9223372036854775808', "malformed"),
    "a sizelimit over 64 bits": ('"fd": 0, "dir_fd": 1, "sizelimit": 18446744073709551616', "malformed"),
    "an odd sector size": ('"fd": 0, "dir_fd": 1, "sector_size": 513', "malformed"),
    "a huge sector size": ('"fd": 0, "dir_fd": 1, "sector_size": 65536', "malformed"),
    "no delivery": ('"fd": 0, "dir_fd": 1, "deliver": []', "malformed"),
    "an unknown delivery": ('"fd": 0, "dir_fd": 1, "deliver": ["post"]', "malformed"),
    "a long ref": (f'"fd": 0, "dir_fd": 1, "ref": "{"a" * 64}"', "malformed"),
    "a line in a ref": ('"fd": 0, "dir_fd": 1, "ref": "a\\nb"', "malformed"),
    "half a character": ('"fd": 0, "dir_fd": 1, "ref": "\\ud800"', "malformed"),
    "a NUL in a ref": ('"fd": 0, "dir_fd": 1, "ref": "a\\u0000b"', "malformed"),
    "a path for a name": ('"op": "detach", "devname": "../loop0"', "malformed"),
    "another one's device": ('"op": "detach", "devname": "loop0"', "not-found"),
    "force without being the administrator": ('"op": "detach", "devname": "loop4096", "force": true', "not-permitted"),
    "an unknown op": ('"op": "format"', "unsupported"),
    "null for op": ('"op": null', "unsupported"),
    "an array for op": ('"op": []', "unsupported"),
}


@pytest.mark.parametrize("name", BYTES)
def test_bytes(served: Daemon, image: int, directory: int, name: str) -> None:
    payload, code = BYTES[name]
    assert served.ask(payload, [image, directory]).code == code


@pytest.mark.parametrize("name", FIELDS)
def test_fields(served: Daemon, image: int, directory: int, name: str) -> None:
    fields, code = FIELDS[name]
    reply = served.ask(f'{{"reply_fd": 2, "id": "x", {fields}}}'.encode(), [image, directory])
    assert reply.code == code
    assert reply.fields["id"] == "x"


def test_no_words_of_the_inside(served: Daemon, image: int, directory: int) -> None:
    """No traceback and no class name in any refusal."""
    for fields, _ in FIELDS.values():
        reply = served.ask(f'{{"reply_fd": 2, {fields}}}'.encode(), [image, directory])
        message = reply.fields["error"]["message"]
        reply.close()
        assert not [word for word in ("Traceback", "Error", "Exception", "loopd.", ".py") if word in message], message


# How many fds -----------------------------------------------------------------------------------------------------


def test_no_fds(served: Daemon) -> None:
    assert ask_at_address(served.path, b'{"fd": 0, "dir_fd": 1}', [])["error"]["code"] == "bad-fd"
    assert ask_at_address(served.path, ALL, [])["error"]["code"] == "bad-fd"


@pytest.mark.parametrize("count", [wire.MAX_FDS + 1, wire.MAX_FDS + 2, 253])
def test_too_many_fds(served: Daemon, image: int, directory: int, count: int) -> None:
    ours, theirs = pair()
    with theirs:
        fds = [theirs.fileno(), image, directory] + [image] * (count - 3)
        send(served.path, b'{"fd": 1, "dir_fd": 2, "reply_fd": 0}', fds).close()
    reply = reply_of(ours)
    reply.close()
    assert reply.code == "malformed"
    assert str(wire.MAX_FDS) in reply.fields["error"]["message"]


# Types of fds -----------------------------------------------------------------------------------------------------


def _loop_device(closing: contextlib.ExitStack, tmp_path: Path) -> int:
    path = tmp_path / "below"
    path.write_bytes(bytes(1 << 20))
    name = subprocess.run(["losetup", "-f", "--show", str(path)], check=True, capture_output=True, text=True).stdout
    closing.callback(subprocess.run, ["losetup", "-d", name.strip()], check=True)
    return opened(closing, name.strip(), os.O_RDWR)


def _with(flags: int) -> Callable[[contextlib.ExitStack, Path], int]:
    def make(closing: contextlib.ExitStack, tmp_path: Path) -> int:
        path = tmp_path / "other"
        path.write_bytes(bytes(1 << 20))
        return opened(closing, path, flags)

    return make


def _path(path: str, flags: int = os.O_RDONLY) -> Callable[[contextlib.ExitStack, Path], int]:
    return lambda closing, _: opened(closing, path, flags)


def _deep(closing: contextlib.ExitStack, tmp_path: Path) -> int:
    """A file whose path has more than 4096 bytes, so that no call can tell it."""
    closing.callback(shutil.rmtree, tmp_path / ("d" * 200))
    at = opened(closing, tmp_path, os.O_RDONLY)
    for _ in range(22):
        os.mkdir("d" * 200, dir_fd=at)
        at = owned(closing, os.open("d" * 200, os.O_RDONLY, dir_fd=at))
    fd = owned(closing, os.open("image", os.O_RDWR | os.O_CREAT, dir_fd=at))
    os.truncate(fd, 1 << 16)
    return fd


def _memfd(closing: contextlib.ExitStack, size: int) -> int:
    fd = owned(closing, os.memfd_create("memfd", os.MFD_CLOEXEC))
    os.truncate(fd, size)
    return fd


def _socket(closing: contextlib.ExitStack) -> int:
    return closing.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)).fileno()


BACKINGS: dict[str, tuple[Callable[[contextlib.ExitStack, Path], int], set[str]]] = {
    "a directory": (lambda closing, tmp_path: opened(closing, tmp_path, os.O_RDONLY), {"bad-fd"}),
    "a pipe": (lambda closing, _: owned(closing, *os.pipe()), {"bad-fd"}),
    "a socket": (lambda closing, _: _socket(closing), {"bad-fd"}),
    "O_PATH": (_with(os.O_PATH), {"bad-fd"}),
    "O_WRONLY": (_with(os.O_WRONLY), {"bad-fd"}),
    "O_APPEND": (_with(os.O_RDWR | os.O_APPEND), {"bad-fd"}),
    "a loop device": (_loop_device, {"bad-fd"}),
    "/dev/zero": (_path("/dev/zero", os.O_RDWR), {"bad-fd"}),
    "/dev/loop-control": (_path("/dev/loop-control", os.O_RDWR), {"bad-fd"}),
    "a file of /proc": (_path("/proc/self/maps"), {"not-permitted"}),
    "a writable file of /proc/sys": (_path("/proc/sys/kernel/core_pattern", os.O_RDWR), {"not-permitted"}),
    "a file of /sys": (_path("/sys/kernel/uevent_seqnum"), {"not-permitted"}),
    "a cgroup's file": (_path("/proc/self/cgroup"), {"not-permitted"}),
    "a namespace": (_path("/proc/self/ns/net"), {"not-permitted"}),
    # The type of an anonymous inode changes from kernel to kernel.
    "a pidfd": (lambda closing, _: owned(closing, os.pidfd_open(os.getpid())), {"bad-fd", "not-permitted"}),
    "an eventfd": (lambda closing, _: owned(closing, os.eventfd(0)), {"bad-fd", "not-permitted"}),
    "an epoll fd": (lambda closing, _: closing.enter_context(select.epoll()).fileno(), {"bad-fd", "not-permitted"}),
    "a path without end": (_deep, {"bad-fd"}),
    "an empty file": (lambda closing, _: _memfd(closing, 0), {"invalid"}),
    "less than a sector": (lambda closing, _: _memfd(closing, 511), {"invalid"}),
}


@pytest.mark.parametrize("name", BACKINGS)
def test_backing_files(
    served: Daemon, directory: int, devices: Path, tmp_path: Path, closing: contextlib.ExitStack, name: str
) -> None:
    make, codes = BACKINGS[name]
    reply = served.attach(make(closing, tmp_path), directory)
    assert reply.code in codes
    assert reply.fields["error"]["message"].startswith(("fd:", "offset:"))
    assert not list(devices.iterdir())


DIRECTORIES: dict[str, tuple[Callable[[contextlib.ExitStack, Path], int], str]] = {
    "a file": (_with(os.O_RDWR), "bad-fd"),
    "a file with O_PATH": (_with(os.O_PATH), "bad-fd"),
    "a pipe": (lambda closing, _: owned(closing, *os.pipe()), "bad-fd"),
    "a socket": (lambda closing, _: _socket(closing), "bad-fd"),
    "/dev/zero": (_path("/dev/zero"), "bad-fd"),
    "/proc": (_path("/proc"), "not-permitted"),
    "/sys": (_path("/sys"), "not-permitted"),
}


@pytest.mark.parametrize("name", DIRECTORIES)
def test_directories(served: Daemon, image: int, tmp_path: Path, closing: contextlib.ExitStack, name: str) -> None:
    make, code = DIRECTORIES[name]
    reply = served.attach(image, make(closing, tmp_path))
    assert reply.code == code
    assert reply.fields["error"]["message"].startswith("dir_fd:")


NO_PAIRS: dict[str, Callable[[contextlib.ExitStack, Path], int]] = {
    "a file": _with(os.O_RDWR),
    "a directory": lambda closing, tmp_path: opened(closing, tmp_path, os.O_RDONLY),
    "a pipe": lambda closing, _: owned(closing, *os.pipe()),
    "an eventfd": lambda closing, _: owned(closing, os.eventfd(0)),
    "a socket that is not connected": lambda closing, _: _socket(closing),
    "a datagram pair": lambda closing, _: _pair(closing, socket.SOCK_DGRAM),
    "a stream pair": lambda closing, _: _pair(closing, socket.SOCK_STREAM),
    "a stream pair with out-of-band data": lambda closing, _: _out_of_band(closing),
    "a network socket": lambda closing, _: closing.enter_context(socket.socket(socket.AF_INET)).fileno(),
}


def _out_of_band(closing: contextlib.ExitStack) -> int:
    """What is in its queue, an fd for example, is seen by no MSG_PEEK."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    closing.enter_context(ours).send(b"x", socket.MSG_OOB)
    return closing.enter_context(theirs).fileno()


def _pair(closing: contextlib.ExitStack, kind: int) -> int:
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    closing.enter_context(ours)
    return closing.enter_context(theirs).fileno()


@pytest.mark.parametrize("name", NO_PAIRS)
def test_leases(
    served: Daemon, image: int, directory: int, tmp_path: Path, closing: contextlib.ExitStack, name: str
) -> None:
    lease = NO_PAIRS[name](closing, tmp_path)
    reply = served.ask(wire.Attach(0, 1, 3, lease_fd=2), [image, directory, lease])
    assert reply.code == "bad-fd"
    assert reply.fields["error"]["message"].startswith("lease_fd")


def test_a_lease_that_is_over(served: Daemon, image: int, directory: int, devices: Path) -> None:
    """The process has ended, or the other end is closed, before the request is even sent: nothing stays bound."""
    ended = subprocess.Popen(["true"])
    pidfd = os.pidfd_open(ended.pid)
    ours, theirs = pair()
    ours.close()
    try:
        ended.wait()
        for lease in (pidfd, theirs.fileno()):
            served.ask(wire.Attach(0, 1, 3, lease_fd=2), [image, directory, lease])
    finally:
        os.close(pidfd)
        theirs.close()
    eventually(lambda: not list(devices.iterdir()), "the nodes are gone")


# The reply socket -------------------------------------------------------------------------------------------------


def _server(closing: contextlib.ExitStack, path: Path) -> tuple[socket.socket, socket.socket, socket.socket]:
    """Somebody's server: its listening socket, a connection to it, and its own end of that."""
    server = closing.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    server.bind(str(path))
    server.listen()
    client = closing.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    client.connect(str(path))
    accepted = closing.enter_context(server.accept()[0])
    return server, client, accepted


@pytest.mark.parametrize("side", ["connection", "the server's end", "listening socket"])
def test_nothing_is_said_to_somebodys_server(
    served: Daemon, image: int, directory: int, devices: Path, tmp_path: Path, closing: contextlib.ExitStack, side: str
) -> None:
    server, client, accepted = _server(closing, tmp_path / "server")
    given = {"connection": client, "the server's end": accepted, "listening socket": server}[side]
    for payload in (ALL, b'{"op": "hello", "reply_fd": 2}', b"\xff", b'{"fd": 9, "dir_fd": 1, "reply_fd": 2}'):
        answer = ask_at_address(served.path, payload, [image, directory, given.fileno()])
        assert answer["error"]["code"] in ("bad-fd", "malformed")
    for end in (client, accepted):
        with pytest.raises(BlockingIOError):
            end.recv(1, socket.MSG_DONTWAIT)
    assert not list(devices.iterdir())


@pytest.mark.parametrize("named", ["ours", "theirs"])
def test_a_pair_with_a_name(served: Daemon, tmp_path: Path, closing: contextlib.ExitStack, named: str) -> None:
    ours, theirs = map(closing.enter_context, pair())
    {"ours": ours, "theirs": theirs}[named].bind(str(tmp_path / "name"))
    answer = ask_at_address(served.path, b'{"op": "hello", "reply_fd": 0}', [theirs.fileno()])
    assert answer["error"]["code"] == "bad-fd"
    with pytest.raises(BlockingIOError):
        ours.recv(1, socket.MSG_DONTWAIT)


@pytest.mark.parametrize("name", NO_PAIRS)
def test_reply_sockets(
    served: Daemon, image: int, directory: int, devices: Path, tmp_path: Path, closing: contextlib.ExitStack, name: str
) -> None:
    given = NO_PAIRS[name](closing, tmp_path)
    assert ask_at_address(served.path, ALL, [image, directory, given])["error"]["code"] == "bad-fd"
    assert not list(devices.iterdir())


def test_a_reply_socket_of_another_uid(served: Daemon, image: int, directory: int, devices: Path) -> None:
    """Made by root, sent by nobody: a reply would be for whoever has root's other end."""
    ours, theirs = pair()
    seen, see = pair()
    with ours, theirs, seen, see:
        fds = [image, directory, theirs.fileno()]

        def client() -> None:
            send(served.path, ALL, fds).close()
            seen.recv(1)  # what comes from one that is gone is dropped

        time.sleep(1)  # of what earlier tests were refused within a second, the account's first 20 have a record
        with concurrently(client, become(NOBODY)) as ended:
            eventually(lambda: _refused(served, "not-permitted", NOBODY), "it is in the journal")
            see.send(b".")
            ended()
        with pytest.raises(BlockingIOError):
            ours.recv(1, socket.MSG_DONTWAIT)
    assert not list(devices.iterdir())


def _refused(daemon: Daemon, code: str, uid: int) -> list[dict[str, str]]:
    found = daemon.records("refused")
    return [record for record in found if (record.get("LOOPD_CODE"), record["LOOPD_UID"]) == (code, str(uid))]


def test_a_client_that_never_reads(served: Daemon, image: int, directory: int, devices: Path, tmp_path: Path) -> None:
    """Its reply socket is full: the device is not delivered, so it does not stay."""
    before = len(served.records("refused"))
    ours, theirs = pair()
    with ours, theirs:
        with contextlib.suppress(BlockingIOError):
            while True:
                theirs.send(bytes(1 << 10), socket.MSG_DONTWAIT)
        send(served.path, ALL, [image, directory, theirs.fileno()]).close()
        eventually(lambda: len(served.records("refused")) > before, "it is in the journal")
        assert served.records("refused")[-1]["LOOPD_CODE"] == "undeliverable"
        eventually(lambda: not bound_to(tmp_path) and not list(devices.iterdir()), "the device is gone")


def test_a_client_that_shuts_its_reply_socket(
    served: Daemon, image: int, directory: int, devices: Path, tmp_path: Path
) -> None:
    ours, theirs = pair()
    with ours, theirs:
        ours.shutdown(socket.SHUT_RDWR)
        send(served.path, ALL, [image, directory, theirs.fileno()]).close()
        time.sleep(0.1)
        eventually(lambda: not bound_to(tmp_path) and not list(devices.iterdir()), "the device is gone")


def test_clients_that_are_gone(served: Daemon, image: int, directory: int, devices: Path, tmp_path: Path) -> None:
    """Before the request is looked at, while it is performed, and just after the reply."""
    for pause in (0.0, 0.0, 0.0, 0.0005, 0.001, 0.002, 0.003, 0.004, 0.006, 0.01):

        def client(pause: float = pause) -> None:
            ours, theirs = pair()
            send(served.path, ALL, [image, directory, theirs.fileno()])
            time.sleep(pause)
            ours.close()
            os._exit(0)

        child = os.fork()
        if not child:
            client()
        os.waitpid(child, 0)
    honest(served)  # the queue is in order: what was sent before has been taken
    eventually(lambda: not bound_to(tmp_path) and not list(devices.iterdir()), "the devices are gone")


# The window -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "fields", "code"),
    [
        (1 << 20, {"offset": 1 << 20}, "invalid"),
        (1 << 20, {"offset": (1 << 20) + 512}, "invalid"),
        (1 << 20, {"offset": wire.MAX_OFFSET}, "invalid"),
        (1 << 20, {"offset": (1 << 20) - 511}, "invalid"),
        (1 << 20, {"sizelimit": 511}, "invalid"),
        (4095, {"sector_size": 4096}, "invalid"),
    ],
)
def test_no_window(
    served: Daemon, make_image: Callable[..., int], directory: int, size: int, fields: dict[str, int], code: str
) -> None:
    assert served.attach(make_image(size), directory, **fields).code == code


def test_a_size_that_is_no_multiple_of_the_sector(
    served: Daemon, make_image: Callable[..., int], directory: int, devices: Path
) -> None:
    """Accepted, as losetup does; the reply says what there is of it."""
    fields = served.attach(make_image((1 << 20) + 700), directory).fields
    assert fields["size"] == (1 << 20) + 512
    with (devices / fields["devname"]).open("rb") as device:
        assert device.seek(0, os.SEEK_END) == (1 << 20) + 512


def test_an_offset_that_is_no_multiple_of_the_sector(
    served: Daemon, make_image: Callable[..., int], directory: int, devices: Path
) -> None:
    image = make_image(1 << 20)
    os.pwrite(image, b"odd", 777)
    fields = served.attach(image, directory, offset=777).fields
    assert (fields["size"], fields["direct_io"]) == ((1 << 20) - 1024, False)
    with (devices / fields["devname"]).open("rb", buffering=0) as device:
        assert device.read(3) == b"odd"
    reply = served.attach(image, directory, offset=777, direct_io="on")
    assert reply.code == "unsupported"
    assert "direct_io" in reply.fields["error"]["message"]


# The directory ----------------------------------------------------------------------------------------------------


def _names_to_come(daemon: Daemon, image: int, directory: int, before: int = 0) -> list[str]:
    """Names of which the next devices will be: numbers go up, by far if another daemon has the next ones.

    With `before` also lower ones, which may have been made ahead and not be used up.
    """
    reply = daemon.attach(image, directory)
    number = int(reply.fields["devname"][4:])
    reply.close()
    return [f"loop{n}" for n in range(max(0, number - before), number + 1500)]


@pytest.mark.parametrize("kind", ["file", "symlink", "dangling symlink", "directory", "node"])
def test_a_name_that_exists(
    served: Daemon, image: int, directory: int, devices: Path, tmp_path: Path, kind: str
) -> None:
    """It is refused, and what was there is what it was: nothing is replaced, and nothing is followed."""
    target = tmp_path / "target"
    names = _names_to_come(served, image, directory, before=1500)
    eventually(lambda: not list(devices.iterdir()), "the first node is gone")
    for name in names:
        path = devices / name
        if kind == "file":
            path.write_text("mine")
        elif kind == "directory":
            path.mkdir()
        elif kind == "node":
            os.mknod(path, 0o600 | 0o010000)
        else:
            path.symlink_to(target)
    if kind == "symlink":
        target.write_text("mine")
    before = {path.name: (path.lstat().st_ino, path.lstat().st_mode) for path in devices.iterdir()}
    reply = served.attach(image, directory)
    assert reply.code == "exists"
    assert {path.name: (path.lstat().st_ino, path.lstat().st_mode) for path in devices.iterdir()} == before
    assert target.exists() is (kind == "symlink")


def _attach_as(uid: int, daemon: Daemon, image: int, directory: int) -> dict[str, Any]:
    """The answer that a client of that uid gets."""

    def client() -> dict[str, Any]:
        ours, theirs = pair()
        send(daemon.path, ALL, [image, directory, theirs.fileno()]).close()
        theirs.close()
        return reply_of(ours).fields

    fields: dict[str, Any] = elsewhere(client, become(uid))
    return fields


def test_a_directory_that_the_client_may_only_read(served: Daemon, image: int, directory: int, devices: Path) -> None:
    """The fd proves no more than that it could be opened: nodes are made with the client's own rights."""
    devices.chmod(0o755)
    assert _attach_as(NOBODY, served, image, directory)["error"]["code"] == "not-permitted"
    os.chown(devices, NOBODY, NOBODY)
    fields = _attach_as(NOBODY, served, image, directory)
    assert fields["devname"].startswith("loop")
    eventually(lambda: not list(devices.iterdir()), "and it is gone with its client")


def test_a_group_of_the_client_that_it_did_not_send(served: Daemon, image: int, directory: int, devices: Path) -> None:
    """A directory that root's groups could write to gives nobody anything."""
    os.chown(devices, 0, 0)
    devices.chmod(0o775)
    assert _attach_as(NOBODY, served, image, directory)["error"]["code"] == "not-permitted"


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mount something below the test's directory."""
    mounted: list[Path] = []

    def make(*options: str) -> Path:
        path = tmp_path / f"mount{len(mounted)}"
        path.mkdir()
        subprocess.run(["mount", *options, str(path)], check=True)
        mounted.append(path)
        return path

    yield make
    for path in reversed(mounted):
        subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_read_only_mount(
    served: Daemon, image: int, mount: Callable[..., Path], closing: contextlib.ExitStack
) -> None:
    path = mount("-t", "tmpfs", "-o", "ro", "loopd-test")
    assert served.attach(image, opened(closing, path, os.O_RDONLY)).code == "not-permitted"


def test_a_nodev_mount(served: Daemon, image: int, mount: Callable[..., Path], closing: contextlib.ExitStack) -> None:
    """The node could be made, but not opened: what is delivered is proved."""
    path = mount("-t", "tmpfs", "-o", "nodev", "loopd-test")
    reply = served.attach(image, opened(closing, path, os.O_RDONLY))
    assert reply.code == "undeliverable"
    assert "nodev" in reply.fields["error"]["message"]
    assert not list(path.iterdir())


def test_a_full_disk(served: Daemon, image: int, mount: Callable[..., Path], closing: contextlib.ExitStack) -> None:
    path = mount("-t", "tmpfs", "-o", "nr_inodes=1", "loopd-test")
    reply = served.attach(image, opened(closing, path, os.O_RDONLY))
    assert reply.code == "io"
    assert "full" in reply.fields["error"]["message"]


def test_a_directory_that_is_deleted(served: Daemon, image: int, tmp_path: Path, closing: contextlib.ExitStack) -> None:
    path = tmp_path / "gone"
    path.mkdir()
    fd = opened(closing, path, os.O_RDONLY)
    path.rmdir()
    assert served.attach(image, fd).code == "not-found"


def test_a_directory_that_is_deleted_later(
    served: Daemon, image: int, tmp_path: Path, closing: contextlib.ExitStack
) -> None:
    """The node is gone with it; the device ends as ever."""
    path = tmp_path / "gone"
    path.mkdir()
    reply = served.attach(image, opened(closing, path, os.O_RDONLY))
    shutil.rmtree(path)
    reply.close()
    eventually(lambda: not bound_to(tmp_path), "the file is free")


SWAPS: dict[str, Callable[[Path, Path], None]] = {
    "fifo": lambda path, _: os.mkfifo(path),
    "symlink": lambda path, victim: path.symlink_to(victim),
    "directory": lambda path, _: path.mkdir(),
    "file": lambda path, victim: os.link(victim, path),
    "tty": lambda path, _: os.mknod(path, 0o600 | 0o020000, os.makedev(5, 0)),
    "nothing": lambda path, _: None,
}


def _served_or_not(daemon: Daemon, image: int, directory: int) -> str | None:
    reply = daemon.attach(image, directory)
    reply.close()
    return reply.code


@pytest.mark.parametrize("kind", SWAPS)
def test_names_swapped_while_attach_is_under_way(
    served: Daemon, image: int, directory: int, devices: Path, tmp_path: Path, kind: str
) -> None:
    """Whatever takes the node's place is not opened, not trusted and not removed; the device ends with its lease."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    aside = tmp_path / "aside"
    aside.mkdir()
    names = _names_to_come(served, image, directory)
    # A process of its own that knows the next names: it strikes in every gap that the daemon leaves.
    swapper = os.fork()
    if not swapper:
        while os.getppid() != 1:
            for name in names[:16]:
                with contextlib.suppress(FileNotFoundError):
                    (devices / name).rename(aside / name)
                    SWAPS[kind](devices / name, victim)
                    del names[: names.index(name) + 1]
            # Numbers that were lost to others leave a gap: go on behind it.
            late = [names.index(name) for name in os.listdir(directory) if name in names]
            del names[: max(late, default=0)]
    try:
        replies = [_served_or_not(served, image, directory) for _ in range(100)]
    finally:
        os.kill(swapper, signal.SIGKILL)
        os.waitpid(swapper, 0)
        eventually(lambda: not leases(served), "every lease is over")
        # What the client put there, and the nodes that it has taken aside, are its own.
        taken, left = list(aside.iterdir()), [*aside.iterdir(), *devices.iterdir()]
        nodes = [path for path in devices.iterdir() if path.is_block_device() and not path.is_symlink()]
        for path in left:
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            else:
                path.unlink(missing_ok=True)
    assert taken
    assert not nodes
    # A number that the client had comes again, and what the client put in the place of its node has the name.
    assert set(replies) <= {None, "undeliverable", "exists"}
    assert victim.read_text() == "mine"
    eventually(lambda: not bound_to(tmp_path), "the file is free")


# Credentials ------------------------------------------------------------------------------------------------------

def test_forged_credentials(served: Daemon, image: int, directory: int, devices: Path) -> None:
    """Root of a user namespace is root to nobody else: not in a directory of the host's, and not by what it claims."""
    require(
        Path("/proc/sys/user/max_user_namespaces").read_text().strip() != "0", "user namespaces are switched off here"
    )
    first = 100000
    devices.chmod(0o755)

    def client() -> dict[str, Any]:
        told: dict[str, Any] = {}

        def attempt(name: str, credentials: tuple[int, int, int] | None) -> None:
            ours, theirs = pair()
            try:
                send(served.path, ALL, [image, directory, theirs.fileno()], credentials=credentials).close()
                theirs.close()
                told[name] = reply_of(ours).code or "none"
            except OSError as error:
                told[name] = error.strerror

        attempt("honest", None)
        attempt("as it is", (os.getpid(), 0, 0))
        attempt("another process", (os.getppid(), 0, 0))
        attempt("a uid that is not mapped", (os.getpid(), 70000, 0))
        attempt("another uid of its own", (os.getpid(), 1000, 0))
        return told

    told = elsewhere(client, mapped(first, 65536))
    assert told == {
        "honest": "not-permitted",
        "as it is": "not-permitted",
        "another process": "Operation not permitted",
        "a uid that is not mapped": "Invalid argument",
        # The kernel lets it, for it may become that uid; but its reply socket is not of that uid, and nothing is told.
        "another uid of its own": "none",
    }
    assert _refused(served, "not-permitted", first)
    eventually(lambda: _refused(served, "not-permitted", first + 1000), "the claim is in the journal")
    assert not list(devices.iterdir())


# Limits -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _few_fds(pid: int, more: int) -> Iterator[None]:
    """Leave a process room for `more` open files."""
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    used = {int(path.name) for path in Path(f"/proc/{pid}/fd").iterdir()}
    # The limit is on the number of an fd, and holes below it are filled first.
    limit = next(limit for limit in range(before[0]) if limit - len([fd for fd in used if fd < limit]) == more)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


def _answered(daemon: Daemon, image: int, directory: int) -> Reply:
    """The reply, perhaps without fields: hung up."""
    ours, theirs = pair()
    with theirs:
        send(daemon.path, ALL, [image, directory, theirs.fileno()]).close()
    reply = reply_of(ours, 5)
    daemon._replies.append(reply)
    return reply


@pytest.mark.parametrize("limit", [400, 540, 600])
def test_the_limit_of_open_files(
    start_daemon: Callable[..., Daemon], image: int, directory: int, devices: Path, tmp_path: Path, limit: int
) -> None:
    """No room is a refusal of that name; when there is room again, it goes on."""
    daemon = start_daemon()
    # Of what will become the daemon at the first datagram.
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (limit, limit))
    before = Untouched(daemon, honest_first=False)
    for _ in range(2):
        replies = [_answered(daemon, image, directory)]
        while replies[-1].code is None and len(replies) < limit:
            replies.append(_answered(daemon, image, directory))
        assert replies[-1].code == "no-device"
        assert len(leases(daemon)) == len(replies) - 1 == len(list(devices.iterdir()))
        for reply in replies:
            reply.close()
        eventually(lambda: not leases(daemon), "the leases are over")
    before.check(tmp_path)


@pytest.mark.parametrize("more", range(12))
def test_the_limit_of_open_files_of_a_helper(
    served: Daemon, image: int, directory: int, devices: Path, tmp_path: Path, more: int
) -> None:
    with contextlib.ExitStack() as stack:
        for helper in helpers(served):
            stack.enter_context(_few_fds(helper, more))
        for _ in range(3):
            reply = _answered(served, image, directory)
            assert reply.code in (None, "no-device", "internal")
            reply.close()
            eventually(lambda: not bound_to(tmp_path), "nothing is bound")
    assert helpers(served)
    eventually(lambda: not list(devices.iterdir()), "no node is there")


def test_many_at_once(served: Daemon, image: int, directory: int, tmp_path: Path) -> None:
    """Bad and good in one queue: each gets its own answer."""
    asked: list[tuple[socket.socket, str | None]] = []
    for number in range(24):
        bad = number % 3
        payload = (ALL, b'{"fd": 9, "dir_fd": 1, "reply_fd": 2}', b'{"fd": 0, "dir_fd": 0, "reply_fd": 2}')[bad]
        ours, theirs = pair()
        with theirs:
            send(served.path, payload, [image, directory, theirs.fileno()]).close()
        asked.append((ours, (None, "malformed", "bad-fd")[bad]))
    names = []
    for ours, code in asked:
        reply = reply_of(ours)
        assert reply.code == code, json.dumps(reply.fields)
        names += [reply.fields["devname"]] if code is None else []
    assert len(set(names)) == len(names) == 8
    for ours, _ in asked:
        ours.close()
    eventually(lambda: not bound_to(tmp_path), "the file is free")


def test_a_file_system_whose_name_is_no_text() -> None:
    """Who mounts FUSE in a user namespace of its own chooses what follows "fuse.": any byte but a few."""
    assert files._parsed(b"7 1 0:99 / /mnt rw - fuse.\xff source rw", False).type == "fuse.\\xff"
