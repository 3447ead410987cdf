"""The client library against a scripted peer: its bytes and fds, its errors, and what it leaves behind."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Sequence

import pytest
from support.processes import LANDLOCK
from support.scripted import Loop, Peer, Request, loop, no_directory_of_loopd, no_fd_is_left, released

import loopd
from loopd.client import api as client
from loopd.client import exchange, layers
from loopd.protocol import wire
from loopd.protocol.decode import decode

__all__ = ["loop", "no_directory_of_loopd", "no_fd_is_left"]  # fixtures

ROOT = Path(client.__file__).parents[1]
REPLY: dict[str, Any] = {
    "devname": "loop4096",
    "diskseq": 7,
    "major": 7,
    "minor": 4096,
    "size": 4096,
    "sector_size": 512,
    "read_only": False,
    "direct_io": False,
}
LEASE: dict[str, Any] = {
    **REPLY,
    "offset": 0,
    "sizelimit": 0,
    "partscan": False,
    "backing_file": "/disk.img",
    "backing_dev": "8:1",
    "backing_inode": 12,
    "ref": "",
    "state": "attached",
    "lease": "pidfd 1",
    "age": 3.5,
}


def answer(request: Request) -> None:
    request.reply(REPLY)


def hold(request: Request) -> None:
    """Answers nothing, and keeps the channel."""


def drop(request: Request) -> None:
    """What becomes of a datagram that is thrown away: nobody has its fds any more."""
    request.channel.close()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(4096))
    return path


@pytest.fixture
def sock(tmp_path: Path) -> Path:
    return tmp_path / "loopd.sock"


# The request ------------------------------------------------------------------------------------------------


def test_the_bytes_and_fds_of_an_attach(image: Path, sock: Path, tmp_path: Path) -> None:
    def step(request: Request) -> None:
        assert request.payload == b'{"op":"attach","fd":0,"dir_fd":1,"reply_fd":2}'
        backing, directory, channel = request.fds
        assert os.path.samestat(os.fstat(backing), image.stat())
        assert os.path.samestat(os.fstat(directory), tmp_path.stat())
        status = int(Path(f"/proc/self/fdinfo/{backing}").read_text().split("flags:\t")[1].split()[0], 8)
        assert status & os.O_ACCMODE == os.O_RDWR
        assert not status & (os.O_APPEND | os.O_NONBLOCK | os.O_PATH)
        with socket.socket(fileno=os.dup(channel)) as reply:
            assert reply.type == socket.SOCK_SEQPACKET
            assert reply.getsockname() == reply.getpeername() == ""
        request.reply(REPLY)

    with Peer(sock, step):
        loopd.attach(image, tmp_path, open_device=False, socket=sock).close()


def test_every_argument_reaches_the_wire(image: Path, sock: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "offset": 512,
        "sizelimit": 1024,
        "sector_size": 4096,
        "read_only": True,
        "partscan": True,
        "lock": True,
        "direct_io": "on",
        "ref": "gr\N{LATIN SMALL LETTER U WITH DIAERESIS}n",
    }

    def step(request: Request) -> None:
        assert {name: request.fields[name] for name in values} == values
        _, decoded = decode(request.payload)
        assert isinstance(decoded, wire.Attach)
        assert decoded.deliver == ("node", "fd")
        request.refuse("invalid")

    with Peer(sock, step), pytest.raises(loopd.Invalid):
        loopd.attach(image, tmp_path, deliver=["node", "fd"], socket=sock, **values)


def test_a_request_for_an_fd_alone_has_no_directory(image: Path, sock: Path) -> None:
    def step(request: Request) -> None:
        assert "dir_fd" not in request.fields
        request.refuse("unsupported")

    with Peer(sock, step), pytest.raises(loopd.Unsupported):
        loopd.attach(image, "/nonexistent", deliver=["fd"], socket=sock)


def test_credentials_are_attached_even_where_the_listener_did_not_ask_for_them(sock: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(sock))
        with pytest.raises(loopd.Timeout):
            loopd.hello(socket=sock, timeout=0.05)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)  # too late for what is queued
        _, ancillary, _, _ = listener.recvmsg(8192, socket.CMSG_SPACE(12))
        ((level, kind, content),) = ancillary
        assert (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS)
        pid, uid, gid = memoryview(content).cast("i")
        assert (pid, uid, gid) == (os.getpid(), os.getuid(), os.getgid())


def test_an_image_or_directory_that_is_an_fd_is_used_and_stays_open(
    image: Path, sock: Path, tmp_path: Path
) -> None:
    fd, dir_fd = os.open(image, os.O_RDONLY), os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with Peer(sock, answer) as peer:
            device = loopd.attach(fd, dir_fd, open_device=False, socket=sock)
            device.close()
        assert device.path == str(tmp_path / "loop4096")
        assert "read_only" not in peer.requests[0].fields
        os.fstat(fd)
        os.fstat(dir_fd)
    finally:
        os.close(fd)
        os.close(dir_fd)


@pytest.mark.parametrize(("directory", "path"), [("dev", "dev"), (".", ""), ("./dev/../dev/", "dev/../dev")])
def test_a_path_in_a_relative_directory_is_absolute(
    image: Path, sock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, directory: str, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("dev").mkdir()
    with Peer(sock, answer):
        device = loopd.attach(image.name, directory, open_device=False, socket=sock)
        device.close()
    assert os.fspath(device) == str(tmp_path / path / "loop4096")


def test_an_image_that_cannot_be_written_is_opened_read_only(sock: Path) -> None:
    """A process that is not root, for root may write everything."""
    code = """
import os, sys
import loopd.client.api  # now: another user may not reach the interpreter's own modules
os.setgid(65534), os.setuid(65534)
loopd.attach(sys.argv[1], "/", open_device=False, socket=sys.argv[2]).close()
"""

    def step(request: Request) -> None:
        flags = Path(f"/proc/self/fdinfo/{request.fds[0]}").read_text().split("flags:\t")[1].split()[0]
        assert int(flags, 8) & os.O_ACCMODE == os.O_RDONLY
        request.reply(REPLY)

    folder = reachable()
    try:
        (folder / "disk.img").write_bytes(bytes(512))
        (folder / "disk.img").chmod(0o444)
        with Peer(folder / "sock", step):
            assert python(code, folder / "disk.img", folder / "sock") == ""
    finally:
        shutil.rmtree(folder)


def test_a_fifo_does_not_block_and_a_missing_image_is_not_made(sock: Path, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with Peer(sock, lambda request: request.refuse("bad-fd")), pytest.raises(loopd.BadFd):
        loopd.attach(fifo, tmp_path, read_only=True, socket=sock)
    with pytest.raises(FileNotFoundError):
        loopd.attach(tmp_path / "missing", tmp_path, socket=sock)
    assert not (tmp_path / "missing").exists()


# The lifetime -----------------------------------------------------------------------------------------------


def test_the_lifetime_device_ends_at_close_and_not_before(image: Path, sock: Path, tmp_path: Path) -> None:
    with Peer(sock, answer) as peer:
        device = loopd.attach(image, tmp_path, open_device=False, socket=sock)
        assert "lease_fd" not in peer.requests[0].fields
        child = subprocess.Popen(["sleep", "30"], close_fds=False)
        try:
            assert not peer.hung_up()
            device.close()
            assert peer.hung_up()  # the child has no copy
        finally:
            child.kill()
            child.wait()
        with pytest.raises(ValueError, match="container"):
            device.keep()


@pytest.mark.parametrize(("lifetime", "pid"), [("process", os.getpid()), ("container", 1)])
def test_a_lifetime_is_a_pidfd(
    image: Path, sock: Path, tmp_path: Path, lifetime: client.Lifetime, pid: int
) -> None:
    def step(request: Request) -> None:
        assert request.fdinfo("lease_fd") == str(pid)
        request.reply(REPLY)

    with Peer(sock, step):
        loopd.attach(image, tmp_path, lifetime=lifetime, open_device=False, socket=sock).close()


def test_a_lifetime_that_is_an_fd_stays_the_callers(image: Path, sock: Path, tmp_path: Path) -> None:
    child = subprocess.Popen(["sleep", "30"])
    fd = loopd.pidfd_open(child.pid)
    try:
        assert not os.get_inheritable(fd)

        def step(request: Request) -> None:
            assert request.fdinfo("lease_fd") == str(child.pid)
            request.reply(REPLY)

        with Peer(sock, step):
            loopd.attach(image, tmp_path, lifetime=fd, open_device=False, socket=sock).close()
        os.fstat(fd)
    finally:
        os.close(fd)
        child.kill()
        child.wait()
    with pytest.raises(ProcessLookupError):
        loopd.pidfd_open(child.pid)


def test_an_unknown_lifetime_is_an_error_at_once(image: Path, sock: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="forever"):
        loopd.attach(image, tmp_path, lifetime="forever", socket=sock)  # type: ignore[arg-type]


# The device -------------------------------------------------------------------------------------------------


def test_the_device_is_opened_used_and_detached(loop: Loop, sock: Path, tmp_path: Path) -> None:
    directory = tmp_path / "dev"
    directory.mkdir()

    def detached(request: Request) -> None:
        assert os.path.samestat(os.fstat(request.fds[request.fields.pop("dir_fd")]), directory.stat())
        expected = {
            "op": "detach",
            "devname": loop.reply["devname"],
            "reply_fd": 1,
            "wait": 10.0,
            "diskseq": 7,
        }
        assert request.fields == expected
        assert not opened_by_this_process(loop.number)
        assert not peer.hung_up()  # released at once and by request, not by the hang-up
        request.reply({"state": "released"})

    loop.reply.update(partitions=["p1"], warnings=["mind the gap"], of_the_future={"x": 1})
    with Peer(sock, loop.deliver, detached) as peer:
        with loopd.attach(loop.image, directory, socket=sock) as device:
            assert os.pread(device.fd, 5, 0) == b"loopd"
            os.pwrite(device.fd, b"LOOPD", 0)
            os.fsync(device.fd)
            assert not os.get_inheritable(device.fd)
            assert device.path == os.fspath(device) == str(directory / device.devname)
            assert (device.diskseq, device.size, device.sector_size) == (7, 1 << 20, 512)
            assert (device.partitions, device.warnings) == (("p1",), ("mind the gap",))
            assert device.path in repr(device)
        assert peer.hung_up()
        assert device.detach()  # of itself: it asks nobody twice
        with pytest.raises(ValueError, match="closed"):
            _ = device.fd
    assert loop.image.read_bytes().startswith(b"LOOPD")


def test_a_read_only_device_is_opened_read_only(loop: Loop, sock: Path, tmp_path: Path) -> None:
    loop.reply["read_only"] = True
    with Peer(sock, loop.deliver, released), loopd.attach(loop.image, tmp_path, socket=sock) as device:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.pwrite(device.fd, b"x", 0)
        assert device.read_only


def test_an_fd_that_was_delivered_is_the_device_and_the_surplus_is_closed(
    loop: Loop, sock: Path, image: Path
) -> None:
    def step(request: Request) -> None:
        with open(loop.path, "r+b", buffering=0) as file:
            request.reply(loop.reply, [file.fileno(), 0, 0])

    before = set(os.listdir("/proc/self/fd"))
    with Peer(sock, step, released) as peer:
        with loopd.attach(image, deliver=["fd"], socket=sock) as device:
            assert os.pread(device.fd, 5, 0) == b"loopd"
            assert not os.get_inheritable(device.fd)
            assert device.path == f"/proc/self/fd/{device.fd}"
            # The listener and the channel of the peer, the channel of the client, and the device; the peer, a thread,
            # may not have closed its other ones yet.
            deadline = time.monotonic() + 5
            while len(os.listdir("/proc/self/fd")) != len(before) + 4:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        assert peer.requests[1].fields["devname"] == loop.reply["devname"]


def test_an_fd_that_was_asked_for_and_did_not_come_is_an_error_and_detached(sock: Path, image: Path) -> None:
    with Peer(sock, answer, released), pytest.raises(loopd.BadReply, match="without the open device"):
        loopd.attach(image, deliver=["fd"], socket=sock)


def test_more_fds_than_a_reply_may_have_are_not_kept(sock: Path) -> None:
    def step(request: Request) -> None:
        request.reply({"loopd": "1", "protocol": 1, "operations": [], "limits": {}}, [0] * 100)

    with Peer(sock, step):
        assert loopd.hello(socket=sock).loopd == "1"


def test_an_end_of_with_that_leaves_the_device_in_use_says_so(
    image: Path, sock: Path, tmp_path: Path
) -> None:
    steps = [answer, lambda request: request.reply({"state": "busy"})] * 2
    with Peer(sock, *steps) as peer:
        with pytest.raises(loopd.Busy, match="loop4096"):
            with loopd.attach(image, tmp_path, open_device=False, socket=sock):
                pass
        assert peer.hung_up(0)
        with pytest.raises(ZeroDivisionError):  # which matters more
            with loopd.attach(image, tmp_path, open_device=False, socket=sock):
                _ = 1 / 0
        assert peer.hung_up(2)


def test_a_device_that_is_gone_counts_as_released(image: Path, sock: Path, tmp_path: Path) -> None:
    # Whose it was, this user's or its directory's, is not known.
    with Peer(sock, answer, *[lambda request: request.refuse("not-found")] * 2):
        with loopd.attach(image, tmp_path, open_device=False, socket=sock):
            pass


LOST: dict[str, Any] = {"state": "released", "lost": "No space left on device"}


def test_what_the_image_lacks_is_an_error_of_its_own(image: Path, sock: Path, tmp_path: Path) -> None:
    def lost(request: Request) -> None:
        request.reply(LOST)

    with Peer(sock, answer, lost, lost, lambda request: request.reply({**LOST, "state": "busy"})) as peer:
        with pytest.raises(loopd.ImageIncomplete, match=r"loop4096 .* image lacks .*: No space left on device$") as end:
            with loopd.attach(image, tmp_path, open_device=False, socket=sock) as device:
                pass
        assert (end.value.reason, end.value.released, end.value.hint) == ("No space left on device", True, "")
        assert peer.hung_up(0)
        assert device.detach()  # nobody is asked again
        with pytest.raises(loopd.ImageIncomplete):
            loopd.detach("loop4096", socket=sock)
        with pytest.raises(loopd.ImageIncomplete, match="somebody still has it open") as held:
            loopd.detach("loop4096", socket=sock)
        assert not held.value.released


def test_what_the_image_lacks_hides_no_exception_of_the_block(image: Path, sock: Path, tmp_path: Path) -> None:
    with Peer(sock, answer, lambda request: request.reply(LOST)):
        with pytest.raises(ZeroDivisionError) as caught:
            with loopd.attach(image, tmp_path, open_device=False, socket=sock):
                _ = 1 / 0
    (note,) = caught.value.__notes__
    assert re.fullmatch(r".*/loop4096 is detached, but its image lacks .*: No space left on device", note)


def test_a_detach_that_lost_nothing_says_nothing_of_it() -> None:
    assert wire.encode_reply(wire.Detached("released")) == b'{"state":"released"}'
    assert wire.encode_reply(wire.Detached("busy", "why")) == b'{"state":"busy","lost":"why"}'


@pytest.fixture
def sent_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is dropped is not sent again: the first pause would be longer than the deadline."""
    monkeypatch.setattr(exchange, "FIRST_PAUSE", 60.0)


def test_a_detach_without_an_answer_hangs_up(image: Path, sock: Path, tmp_path: Path, sent_once: None) -> None:
    with Peer(sock, answer, drop, answer, drop) as peer:
        with pytest.raises(loopd.Dropped):
            with loopd.attach(image, tmp_path, open_device=False, socket=sock):
                pass
        assert peer.hung_up(0)
        with pytest.raises(ZeroDivisionError):
            with loopd.attach(image, tmp_path, open_device=False, socket=sock):
                _ = 1 / 0
        assert peer.hung_up(2)


def test_a_device_that_is_kept_is_not_detached(image: Path, sock: Path, tmp_path: Path) -> None:
    with Peer(sock, answer, released):  # a detach at the end of the block would use the second step up
        with loopd.attach(image, tmp_path, lifetime="container", open_device=False, socket=sock) as device:
            device.keep()
        assert loopd.detach(device, wait=1, socket=sock)


# The deliveries and their choice ----------------------------------------------------------------------------


def test_loopds_directory_comes_first(
    loop: Loop, sock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grant = tmp_path / "grant"
    grant.mkdir()
    monkeypatch.setenv("LOOPD_DIRECTORY", str(grant))
    with Peer(sock, loop.deliver, released), loopd.attach(loop.image, socket=sock) as device:
        assert device.path == str(grant / device.devname)


def test_a_directory_that_is_given_is_the_only_one(sock: Path, image: Path, tmp_path: Path) -> None:
    """A refusal of it is not followed by another way."""
    with Peer(sock, lambda request: request.refuse("undeliverable")):
        with pytest.raises(loopd.Undeliverable, match="loopctl doctor"):
            loopd.attach(image, tmp_path, socket=sock)


def test_another_way_is_tried_after_a_refusal(
    loop: Loop, sock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not os.path.ismount("/dev"):
        pytest.skip("needs a devtmpfs at /dev")
    monkeypatch.setenv("LOOPD_DIRECTORY", str(tmp_path))

    def kernels(request: Request) -> None:
        assert request.fields["deliver"] == ["fd"]
        with open(loop.path, "r+b", buffering=0) as file:
            request.reply(loop.reply, [file.fileno()])


    def none_listed(request: Request) -> None:
        request.reply({"leases": []})

    steps = [lambda request: request.refuse("undeliverable"), kernels, none_listed, released]
    with Peer(sock, *steps), loopd.attach(loop.image, socket=sock) as device:
        assert device.path == loop.path


@pytest.mark.parametrize(
    "code", ["quota", "invalid", "bad-fd", "busy", "no-device", "internal", "not-permitted", "unsupported"]
)
def test_what_has_nothing_to_do_with_the_way_is_not_asked_for_again(
    code: str, sock: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOOPD_DIRECTORY", str(tmp_path))
    with Peer(sock, lambda request: request.refuse(code)), pytest.raises(loopd.ERRORS[loopd.Code(code)]):
        loopd.attach(image, socket=sock)


def test_a_mount_that_did_not_come_or_is_none_is_an_error_and_detached(
    sock: Path, image: Path, tmp_path: Path
) -> None:
    def no_mount(request: Request) -> None:
        assert request.fields["deliver"] == ["mount"]
        assert "dir_fd" not in request.fields
        request.reply(REPLY, [0])

    with Peer(sock, answer, released, no_mount, released):
        with pytest.raises(loopd.BadReply, match="without the mount"):
            loopd.attach(image, tmp_path, deliver=["mount"], socket=sock)
        with pytest.raises(loopd.DeviceInaccessible) as caught:
            loopd.attach(image, tmp_path, deliver=["mount"], socket=sock)
    assert caught.value.layer == "mount"
    assert not (tmp_path / "loop4096").exists()


def test_the_place_of_a_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert layers.make_mount_point("loop1", str(tmp_path / "given")) == str(tmp_path / "given" / "loop1")
    with pytest.raises(FileExistsError):
        layers.make_mount_point("loop1", str(tmp_path / "given"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    (tmp_path / "loopd").touch()  # nothing can be made below it
    if not os.path.isdir("/dev/loopd") and not os.access("/dev", os.W_OK):
        first = Path(layers.make_mount_point("loop1"))
        assert first.parent.parent == tmp_path / "tmp"
        layers.remove_mount_point(str(first))
    layers.remove_mount_point(str(tmp_path / "given" / "loop1"))
    assert list((tmp_path / "given").iterdir()) == []  # which was not made for it alone
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_line_of_mountinfo() -> None:
    line = "36 35 98:0 /mnt1\\134x /mnt\\0402 rw,noatime master:1 - tmpfs loopd\\040dev rw\n"
    assert layers.parsed_mount(line) == (36, "/mnt1\\x", "/mnt 2", "tmpfs", "loopd dev")
    assert {mount.point for mount in layers.mounts()} >= {"/", "/proc"}


@pytest.mark.parametrize("mark", ["\r", "\x85", "\u2028", "\x1c"])
def test_a_mount_whose_name_looks_like_the_end_of_a_line(tmp_path: Path, mark: str) -> None:
    """Whoever may mount anything can make one: it hides no other, and breaks nothing that reads the table."""
    point = tmp_path / f"a{mark}b c"
    point.mkdir()
    script = """
import os, sys
from loopd import losetup
from loopd.cli import openers
from loopd.client import layers
point, device = sys.argv[1], os.stat(sys.argv[1]).st_dev
assert point in {mount.point for mount in layers.mounts()}
assert layers.mount_points("loop77777777") == []
losetup.DEV = losetup.DIRECTORY = sys.argv[1]
assert not losetup.is_the_kernels()
assert dict(openers._of_mounts("self", {(os.major(device), os.minor(device)): "this"})) == {"this": point}
"""
    command = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs none "$1" && exec "$0" -c "$2" "$1"', sys.executable, point]
    done = subprocess.run([*map(str, command), script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_where_the_node_of_a_device_is(loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = os.path.basename(loop.path)
    assert client.node_path(name) == loop.path
    monkeypatch.setenv("LOOPD_DIRECTORY", str(tmp_path))
    os.mknod(tmp_path / name, 0o60600, loop.number)
    assert client.node_path(name) == str(tmp_path / name)
    assert client.node_path(loop.path) == loop.path
    assert client.node_path(tmp_path / "loop77777777") is None
    assert client.node_path("loop77777777") is None


# What refuses a node ----------------------------------------------------------------------------------------


def test_a_node_that_is_another_device_is_refused(loop: Loop, sock: Path, tmp_path: Path) -> None:
    loop.reply["minor"] += 1
    with Peer(sock, loop.deliver, released) as peer, pytest.raises(loopd.DeviceInaccessible) as caught:
        loopd.attach(loop.image, tmp_path, socket=sock)
    assert (caught.value.layer, caught.value.errno) == ("device", 0)
    assert peer.requests[1].fields["op"] == "detach"


def test_a_node_that_is_missing_is_named(image: Path, sock: Path, tmp_path: Path) -> None:
    with Peer(sock, answer, released), pytest.raises(
        loopd.DeviceInaccessible, match="No such file"
    ) as caught:
        loopd.attach(image, tmp_path, socket=sock)
    assert caught.value.layer == "device"


def test_a_symlink_of_the_nodes_name_is_not_followed(loop: Loop, sock: Path, tmp_path: Path) -> None:
    (tmp_path / loop.reply["devname"]).symlink_to(loop.path)
    with Peer(sock, lambda request: request.reply(loop.reply), released):
        with pytest.raises(loopd.DeviceInaccessible):
            loopd.attach(loop.image, tmp_path, socket=sock)


ATTACH = """
import os, sys
import loopd.client.api
def attach(directory, image, sock):
    try:
        with loopd.attach(image, directory, socket=sock) as device:
            print("opened", end="")
    except loopd.DeviceInaccessible as error:
        print(error.layer, "|", error, end="")
"""


def refusing_layer(loop: Loop, prepare: str, *, wrap: str = 'exec "$@"') -> str:
    """What a process says that attaches in the directory $DIR; `wrap` is a shell's line around it."""
    folder = reachable()
    try:
        (folder / "dev").mkdir()
        (folder / "dev").chmod(0o777)
        code = f"{ATTACH}\nimage = os.open(sys.argv[1], os.O_RDWR)\n{prepare}\nattach(sys.argv[2], image, sys.argv[3])"
        with Peer(folder / "sock", loop.deliver, released):
            return python(
                code, loop.image, folder / "dev", folder / "sock", wrap=wrap, DIR=str(folder / "dev")
            )
    finally:
        shutil.rmtree(folder)


def test_a_node_that_opens(loop: Loop) -> None:
    assert refusing_layer(loop, "") == "opened"


def test_nodev_is_named(loop: Loop) -> None:
    wrap = 'exec unshare -m sh -c \'mount -t tmpfs -o nodev none "$DIR" && exec "$@"\' sh "$@"'
    layer, _, text = refusing_layer(loop, "", wrap=wrap).partition(" | ")
    assert layer == "nodev"
    assert ":dev" in text


def test_a_user_namespace_is_named(loop: Loop) -> None:
    wrap = 'exec unshare -Urm sh -c \'mount -t tmpfs none "$DIR" && exec "$@"\' sh "$@"'
    layer, _, text = refusing_layer(loop, "", wrap=wrap).partition(" | ")
    assert layer == "user namespace"
    assert "bind-mounted from the host" in text


def test_a_permission_is_named(loop: Loop) -> None:
    layer, _, text = refusing_layer(loop, "os.setgid(65534), os.setuid(65534)").partition(" | ")
    assert layer == "permission"
    assert "uid 0's, mode 0600" in text


def test_a_device_cgroup_is_named(loop: Loop) -> None:
    """With cgroup v1, where it is a file to write to; under v2 it is a BPF program, which podman's tests show."""
    cgroup = Path(f"/sys/fs/cgroup/devices/loopd-test-{os.getpid()}")
    if not (cgroup.parent / "devices.deny").exists():
        pytest.skip("there is no device controller of cgroup v1")
    cgroup.mkdir()
    try:
        (cgroup / "devices.deny").write_text("b 7:* w")
        layer, _, text = refusing_layer(
            loop, f"open('{cgroup}/cgroup.procs', 'w').write(str(os.getpid()))"
        ).partition(" | ")
    finally:
        cgroup.rmdir()
    assert layer == "device cgroup"
    assert "--device-cgroup-rule 'b 7:* rw'" in text


def test_a_security_module_is_named(loop: Loop) -> None:
    layer, _, text = refusing_layer(loop, LANDLOCK).partition(" | ")
    assert layer == "lsm"
    assert "audit log" in text


# Errors -----------------------------------------------------------------------------------------------------


def test_each_code_has_an_error_of_its_own() -> None:
    assert set(loopd.ERRORS) == set(loopd.Code)
    assert len(set(loopd.ERRORS.values())) == len(loopd.ERRORS)
    assert all(kind.code is code for code, kind in loopd.ERRORS.items())


@pytest.mark.parametrize("code", loopd.Code)
def test_a_refusal_raises_the_error_of_its_code(code: loopd.Code, sock: Path) -> None:
    with Peer(sock, lambda request: request.refuse(code.value, "because")):
        with pytest.raises(loopd.ERRORS[code], match="because") as caught:
            loopd.hello(socket=sock)
    assert caught.value.code is code
    assert caught.value.message == "because"


def test_a_code_of_the_future_is_an_error_too(sock: Path) -> None:
    with Peer(sock, lambda request: request.refuse("out-of-tea")), pytest.raises(loopd.Internal):
        loopd.hello(socket=sock)


@pytest.mark.parametrize(
    "payload",
    [
        b"no JSON",
        b"\xff",
        b"[]",
        b"[" * 5000,
        b"null",
        b'{"error": "text"}',
        b'{"error": {"code": "io"}}',
        b"{}",
        b'{"leases": {}}',
        b'{"leases": [1]}',
        b'{"leases": [{}]}',
        json.dumps({"leases": [dict(LEASE, devname="../../etc/passwd")]}).encode(),
        json.dumps({"leases": [dict(LEASE, devname=None)]}).encode(),
        json.dumps({"leases": [dict(LEASE, size=None)]}).encode(),
        b'{"leases": []}' + b" " * wire.MAX_REPLY,
    ],
)
def test_a_reply_without_sense_is_named_so(payload: bytes, sock: Path) -> None:
    with Peer(sock, lambda request: request.reply(payload)), pytest.raises(loopd.BadReply):
        loopd.list(socket=sock)


def test_a_detach_that_waits_outlives_the_daemon(sock: Path) -> None:
    """Dropped while it waits, it asks for what is left of the wait."""

    def hang_up(request: Request) -> None:
        time.sleep(0.6)
        drop(request)

    with Peer(sock, hang_up, released) as peer:
        assert loopd.Client(sock, timeout=5).detach("loop4096", wait=10)
    waits = [request.fields["wait"] for request in peer.requests]
    assert waits[0] == 10
    assert 5 < waits[1] < 9.5


def test_what_is_dropped_is_sent_again(sock: Path) -> None:
    with Peer(sock, drop, drop, lambda request: request.reply({"leases": []})) as peer:
        assert loopd.list(socket=sock) == ()
        assert len({request.payload for request in peer.requests}) == 1


def test_an_end_without_a_reply_is_no_timeout(sock: Path, sent_once: None) -> None:
    start = time.monotonic()
    with Peer(sock, drop), pytest.raises(loopd.Dropped, match="journalctl"):
        loopd.hello(socket=sock)
    assert time.monotonic() - start < 5


def test_no_answer_ends_at_the_deadline(sock: Path) -> None:
    start = time.monotonic()
    with Peer(sock, hold), pytest.raises(loopd.Timeout, match=r"within 0\.3 s"):
        loopd.hello(socket=sock, timeout=0.3)
    assert 0.3 <= time.monotonic() - start < 3


def test_a_detach_may_take_its_wait_beyond_the_timeout(sock: Path) -> None:
    def step(request: Request) -> None:
        assert request.fields["wait"] == 5
        time.sleep(0.4)
        released(request)

    with Peer(sock, step):
        assert loopd.detach("/dev/loop4096", wait=5, socket=sock, timeout=0.1)


def test_a_full_queue_ends_at_the_deadline_without_spinning(sock: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(sock))
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as filler:
            filler.setblocking(False)
            with suppress(BlockingIOError):
                while True:
                    filler.sendto(b"{}", str(sock))
        start, spent = time.monotonic(), time.process_time()
        with pytest.raises(loopd.Timeout, match="queue"):
            loopd.hello(socket=sock, timeout=0.5)
        assert 0.5 <= time.monotonic() - start < 3
        assert time.process_time() - spent < 0.25


def test_a_request_waits_until_the_daemon_comes(sock: Path) -> None:
    peer = Peer(sock, lambda r: r.reply({"loopd": "1", "protocol": 1, "operations": ["hello"], "limits": {}}))
    starter = threading.Timer(0.3, peer.__enter__)
    starter.start()
    try:
        assert loopd.hello(socket=sock).operations == ("hello",)
    finally:
        starter.join()
        peer.__exit__(None, None, None)


def test_what_to_do_where_there_is_no_daemon(sock: Path, tmp_path: Path) -> None:
    with pytest.raises(loopd.Unavailable, match=r"enable --now loopd\.socket.*/run/loopd"):
        loopd.hello(socket=tmp_path / "none")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(sock))
    with pytest.raises(loopd.Unavailable, match=r"restart loopd\.socket"):
        loopd.hello(socket=sock)
    with pytest.raises(loopd.Unavailable, match="too long"):
        loopd.hello(socket="/" + "x" * 200)
    sock.unlink()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(sock))
        listener.listen()
        with pytest.raises(loopd.Unavailable, match=r"no socket of loopd's.*--datagram"):
            loopd.hello(socket=sock)


def test_a_socket_that_is_not_the_usual_one_is_named_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = str(tmp_path / "none")
    with pytest.raises(loopd.Unavailable) as given:
        loopd.hello(socket=other)
    monkeypatch.setenv("LOOPD_SOCKET", other)
    with pytest.raises(loopd.Unavailable) as found:
        loopd.hello()
    assert given.value.hint.startswith(f"the usual one is {loopd.client.api.SOCKET}; on the host: ")
    assert found.value.hint.startswith("LOOPD_SOCKET names this one, the usual one is ")


def test_what_to_do_where_the_socket_is_not_for_this_user() -> None:
    code = """
import os, sys
import loopd.client.api  # now: another user may not reach the interpreter's own modules
os.setgid(65534), os.setuid(65534)
try:
    loopd.hello(socket=sys.argv[1])
except loopd.Unavailable as error:
    print(error.hint, end="")
"""
    folder = reachable()
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
            listener.bind(str(folder / "sock"))
            (folder / "sock").chmod(0o660)
            assert "group loopd" in python(code, folder / "sock")
    finally:
        shutil.rmtree(folder)


def test_a_bad_fd_is_the_callers_error(sock: Path, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(sock))
        with pytest.raises(OSError, match="Bad file descriptor"):
            loopd.attach(1 << 20, tmp_path, socket=sock)


def test_a_request_that_is_too_long_is_not_sent(image: Path, tmp_path: Path, sock: Path) -> None:
    with pytest.raises(loopd.Malformed, match="8192"):
        loopd.attach(image, tmp_path, ref="x" * 10000, socket=sock)


# The other operations ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "asked"),
    [
        ("loop1", ["list bound", "resize -"]),
        ("named/loop1", ["list bound", "resize named"]),
        ("named/loop2", ["resize named"]),
        ("loop3", ["resize bound"]),
        ("named/loop3", ["resize bound"]),
        ("link/loop3", ["resize bound"]),
        ("loop4", ["list bound", "resize bound"]),
        ("/nonexistent/loop1", ["list bound", "resize -"]),
    ],
)
def test_a_request_about_a_device_goes_to_its_owner(
    loop: Loop, sock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, asked: list[str]
) -> None:
    """What is asked as another owner is refused, which the journal would have.

    loop2 and loop3 have nodes; loop4 is of the directory that is bound in, and has lost its node: somebody still has it
    open after a detach.
    """
    folders = {name: tmp_path / name for name in ("named", "bound", "link")}
    for folder in folders.values():
        folder.mkdir()
    os.mknod(folders["named"] / "loop2", 0o60600, loop.number)
    os.mknod(folders["bound"] / "loop3", 0o60600, loop.number)
    (folders["link"] / "loop3").symlink_to("../bound/loop3")
    monkeypatch.setenv("LOOPD_DIRECTORY", str(folders["bound"]))
    seen: list[str] = []

    def step(request: Request) -> None:
        index = request.fields.get("dir_fd")
        status = None if index is None else os.fstat(request.fds[index])
        whose = next((n for n, p in folders.items() if status and os.path.samestat(p.stat(), status)), "-")
        seen.append(f"{request.fields['op']} {whose}")
        held = [dict(LEASE, devname="loop4")] if whose == "bound" else []
        request.reply({"leases": held} if request.fields["op"] == "list" else {"size": 1})

    with Peer(sock, *[step] * len(asked)):
        assert loopd.resize(device if device.startswith("loop") else tmp_path / device, socket=sock) == 1
    assert seen == asked


def test_a_node_of_somebody_elses_making_is_not_the_last_word(
    loop: Loop, sock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that somebody else has made tells nothing."""
    monkeypatch.setenv("LOOPD_DIRECTORY", str(tmp_path))
    os.mknod(tmp_path / "loop1", 0o60600, loop.number)
    with Peer(sock, lambda request: request.refuse("not-found"), lambda request: request.reply({"size": 1})) as peer:
        assert loopd.resize("loop1", socket=sock) == 1
    assert ["dir_fd" in request.fields for request in peer.requests] == [True, False]


def test_a_devtmpfs_is_no_directory_to_ask_about(sock: Path) -> None:
    """What is refused there anyway is in the journal once."""
    if not re.search(r"(?m)^\S+ /dev devtmpfs ", Path("/proc/mounts").read_text()):
        pytest.skip("needs a devtmpfs at /dev")

    def not_found(request: Request) -> None:
        assert "dir_fd" not in request.fields
        request.refuse("not-found")

    with Peer(sock, not_found), pytest.raises(loopd.NotFound):
        loopd.detach("/dev/loop4096", socket=sock)


def test_rescan_and_resize(image: Path, sock: Path, tmp_path: Path) -> None:
    def rescanned(request: Request) -> None:
        assert (request.fields["op"], request.fields["devname"]) == ("rescan", "loop4096")
        request.reply({"partitions": ["loop4096p1"]})

    def resized(request: Request) -> None:
        assert (request.fields["op"], request.fields["devname"]) == ("resize", "loop4096")
        request.reply({"size": 8192})

    with Peer(sock, answer, rescanned, resized, released, rescanned, resized):
        with loopd.attach(image, tmp_path, open_device=False, socket=sock) as device:
            assert device.rescan() == device.partitions == ("loop4096p1",)
            assert device.resize() == device.size == 8192
        assert loopd.rescan(device, socket=sock) == ("loop4096p1",)
        assert loopd.resize("loop4096", socket=sock) == 8192
    for reply, call in ((b"{}", loopd.rescan), (b"{}", loopd.resize)):
        with Peer(sock.with_name(call.__name__), lambda request, reply=reply: request.reply(reply)):  # type: ignore[misc]
            with pytest.raises(loopd.BadReply):
                call("loop4096", socket=sock.with_name(call.__name__))


def test_a_directory_is_asked_for(sock: Path) -> None:
    def made(request: Request) -> None:
        assert request.fields == {"op": "directory", "name": "build", "reply_fd": 0}
        request.reply({"path": "/run/loopd-dev/0-build"})

    def removed(request: Request) -> None:
        assert request.fields["remove"] is True
        request.reply({"path": "/run/loopd-dev/0-build"})

    with Peer(sock, made, removed):
        assert loopd.directory("build", socket=sock) == "/run/loopd-dev/0-build"
        loopd.directory("build", remove=True, socket=sock)


def test_a_directory_that_owns_numbers(sock: Path) -> None:
    def made(request: Request) -> None:
        assert request.fields == {"op": "directory", "name": "build", "reply_fd": 0, "devices": 2}
        request.reply({"path": "/run/loopd-dev/0-build", "numbers": [4096, 4097], "remade": True})

    def other(request: Request) -> None:
        request.refuse("exists", "directory build has 2")

    path = "/run/loopd-dev/0-build"
    row: dict[str, Any] = {"name": "build", "uid": 0, "path": path, "numbers": [4096, 4097], "in_use": 1}

    with Peer(sock, made, made, other, lambda request: request.reply({"directories": [row], "more": False})):
        assert loopd.grant("build", devices=2, socket=sock) == ("/run/loopd-dev/0-build", (4096, 4097), True)
        assert loopd.directory("build", devices=2, socket=sock) == "/run/loopd-dev/0-build"
        with pytest.raises(loopd.Exists, match="has 2"):
            loopd.directory("build", devices=3, socket=sock)
        assert loopd.directories(socket=sock) == (loopd.GrantInfo(**{**row, "numbers": (4096, 4097)}),)


@pytest.mark.parametrize("fields", [{}, {"directories": 1}, {"directories": [1]}, {"directories": [{"name": "x"}]}])
def test_a_list_of_directories_that_makes_no_sense(sock: Path, fields: dict[str, Any]) -> None:
    with Peer(sock, lambda request: request.reply(fields)), pytest.raises(loopd.BadReply):
        loopd.directories(socket=sock)


@pytest.mark.parametrize("path", ["/", "/run/loopd-dev/0-other", "/run/loopd-dev/7-build", "0-build", "/0-build/.."])
def test_a_directory_that_was_not_asked_for_is_none(sock: Path, path: str) -> None:
    """Root binds it into a container: whoever answers in the place of loopd must not choose it."""
    with Peer(sock, lambda request: request.reply({"path": path})), pytest.raises(loopd.BadReply):
        loopd.directory("build", socket=sock)


def test_what_to_do_about_a_directory_that_cannot_be_removed(sock: Path) -> None:
    def path(request: Request) -> None:
        assert "remove" not in request.fields
        request.reply({"path": "/run/loopd-dev/0-build"})

    with Peer(sock, lambda request: request.refuse("busy"), path, lambda request: request.refuse("not-found")):
        with pytest.raises(loopd.Busy, match="`LOOPD_DIRECTORY=/run/loopd-dev/0-build loopctl list` shows them"):
            loopd.directory("build", remove=True, socket=sock)
        with pytest.raises(loopd.NotFound, match="`loopctl directory`"):
            loopd.directory("build", remove=True, socket=sock)


def test_the_list_has_what_is_the_directorys_and_what_is_the_users(
    sock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOOPD_DIRECTORY", str(tmp_path))
    rows = [dict(LEASE, devname=name) for name in ("loop4096", "loop4097", "loop4098")]

    def directorys(request: Request) -> None:
        assert os.path.samestat(os.fstat(request.fds[request.fields["dir_fd"]]), tmp_path.stat())
        request.reply({"leases": rows[:2]})

    with Peer(sock, directorys, lambda request: request.reply({"leases": rows[1:]})):
        assert [lease.devname for lease in loopd.list(socket=sock)] == ["loop4096", "loop4097", "loop4098"]


def test_the_daemon_is_known_by_what_the_kernel_attests(sock: Path) -> None:
    greeting = {"loopd": "1", "protocol": 1, "operations": [], "limits": {}}
    with Peer(sock, lambda request: request.reply(greeting)):
        assert loopd.Client(sock).daemon_pid() == os.getpid()


# List, hello, names -----------------------------------------------------------------------------------------


def test_a_long_list_is_continued(sock: Path) -> None:
    def page(name: str, more: bool) -> dict[str, Any]:
        return {"leases": [dict(LEASE, devname=name, tomorrow=1)], "more": more}

    def first(request: Request) -> None:
        assert request.fields == {"op": "list", "reply_fd": 0}
        request.reply(page("loop4096", more=True))

    def second(request: Request) -> None:
        assert request.fields["after"] == "loop4096"
        request.reply(page("loop4097", more=False))

    def endless(request: Request) -> None:
        request.reply({"leases": [], "more": True})

    with Peer(sock, first, second, endless):
        leases = loopd.list(socket=sock)
        assert [lease.devname for lease in leases] == ["loop4096", "loop4097"]
        assert (leases[0].age, leases[0].uid) == (3.5, None)
        assert loopd.list(socket=sock) == ()


@pytest.mark.parametrize("known", [True, False])
def test_the_file_of_another_binding_is_not_that_of_the_lease(loop: Loop, sock: Path, known: bool) -> None:
    """The number may carry another one by now, or a client has replaced the file of its device: diskseq tells."""
    diskseq = int(Path(f"/sys/block/{loop.reply['devname']}/diskseq").read_text())
    row = {**LEASE, **loop.reply, "diskseq": diskseq if known else diskseq - 1}
    with Peer(sock, lambda request: request.reply({"leases": [row]})):
        (lease,) = loopd.list(socket=sock)
    assert lease.backing_file == (str(loop.image) if known else "/disk.img")
    assert lease.backing_file_at_attach == "/disk.img"


def test_what_is_not_known_before_linux_5_15_may_be_missing(image: Path, sock: Path, tmp_path: Path) -> None:
    old = {name: value for name, value in REPLY.items() if name != "diskseq"}
    with Peer(sock, lambda request: request.reply(old)):
        device = loopd.attach(image, tmp_path, open_device=False, socket=sock)
        device.close()
    assert device.diskseq is None


def test_force_and_a_name_with_its_directory(sock: Path) -> None:
    def step(request: Request) -> None:
        assert request.fields == {"op": "detach", "devname": "loop4096", "force": True, "reply_fd": 0}
        request.reply({"state": "busy"})

    with Peer(sock, step):
        assert not loopd.Client(sock).detach("/dev/loopd/loop4096", force=True)


def test_the_socket_comes_from_the_environment(sock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOOPD_SOCKET", str(sock))
    assert loopd.Client().socket == str(sock)
    assert loopd.Client("/other").socket == "/other"
    monkeypatch.setenv("LOOPD_SOCKET", "")
    assert loopd.Client().socket == "/run/loopd/loopd.sock"


def test_the_package_costs_nothing_until_it_is_used() -> None:
    code = "import sys, loopd; print({'json', 'socket', 'typing', 'loopd.client'} & set(sys.modules), end='')"
    assert python(code, flags=["-S"]) == "set()"


def test_every_name_of_the_package_is_there() -> None:
    for name in loopd.__all__:
        assert getattr(loopd, name) is not None
        assert name in dir(loopd)
    with pytest.raises(AttributeError, match=r"loopd.*absent"):
        _ = loopd.absent
    assert loopd.list is client.leases


@pytest.mark.parametrize("kind", [client.Unavailable, *client.ERRORS.values()], ids=lambda kind: str(kind.__name__))
def test_an_error_comes_out_of_a_worker_process_as_it_is(kind: type[client.Error]) -> None:
    error = kind("no")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_so_do_those_that_say_more() -> None:
    error = client.DeviceInaccessible("no", "do that", "nodev", 13)
    found = pickle.loads(pickle.dumps(error))
    assert (str(found), found.layer, found.errno) == (str(error), "nodev", 13)
    lost = pickle.loads(pickle.dumps(client.ImageIncomplete("no", reason="why", released=False)))
    assert (str(lost), lost.reason, lost.released) == ("no", "why", False)


# Tools ------------------------------------------------------------------------------------------------------


def reachable() -> Path:
    """A folder that every user reaches, which pytest's are not."""
    folder = Path(tempfile.mkdtemp(prefix="loopd-test-", dir="/tmp"))
    folder.chmod(0o755)
    return folder


def python(
    code: str, *arguments: Path, flags: Sequence[str] = (), wrap: str = 'exec "$@"', **environment: str
) -> str:
    """What a Python process of its own prints."""
    argv = ["sh", "-c", wrap, "sh", sys.executable, *flags, "-c", code, *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", **environment}
    return subprocess.run(argv, env=env, check=True, stdout=subprocess.PIPE, text=True, timeout=60).stdout


def opened_by_this_process(number: int) -> bool:
    def is_it(fd: str) -> bool:
        try:
            status = os.stat(f"/proc/self/fd/{fd}")
        except OSError:
            return False
        return stat.S_ISBLK(status.st_mode) and status.st_rdev == number

    return any(map(is_it, os.listdir("/proc/self/fd")))
