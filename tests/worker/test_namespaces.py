"""Clients in namespaces of their own get their reply and a device that works, and nobody else's."""

from __future__ import annotations

import array
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.daemon import ROOT, Daemon, ask, bound_to, eventually, require
from support.processes import CLONE_NEWNET, CLONE_NEWNS, NOBODY, Child, become, mount_tmpfs, own_user_namespace, unshare

from loopd.protocol import wire

CONTENT = b"written in a container"

# The client library in a container: argv is its /dev, the socket, the image and the delivery.
CLIENT = f"""
import json, os, sys
import loopd
directory, socket, image, delivery = sys.argv[1:]
try:
    with loopd.attach(image, directory, deliver=[delivery], socket=socket) as device:
        os.pwrite(device.fd, {CONTENT!r}.ljust(512), 4096)
        os.fsync(device.fd)
        print(json.dumps([device.devname, os.listdir(directory), os.getpid()]))
except loopd.Refused as error:
    print(json.dumps([error.code.value, os.listdir(directory), error.message]))
"""


def run(sandbox: list[str], *arguments: object) -> Any:
    command = [*sandbox, sys.executable, "-c", CLIENT, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, env=environment
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("delivery", ["node", "fd"])
def test_own_network_mount_and_pid_namespace(
    daemon: Daemon, image: int, tmp_path: Path, devices: Path, delivery: str
) -> None:
    """Its /dev is a tmpfs that it mounted itself, and it is PID 1."""
    unshare = ["unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "--propagation", "private"]
    sandbox = [*unshare, "sh", "-ec", f'mount -t tmpfs tmpfs {devices}; exec "$@"', "sh"]
    name, listing, pid = run(sandbox, devices, daemon.path, tmp_path / "image", delivery)
    assert pid == 1
    assert listing == ([name] if delivery == "node" else [])
    assert list(devices.iterdir()) == []  # the host's view of that directory
    assert os.pread(image, len(CONTENT), 4096) == CONTENT
    record = eventually(lambda: daemon.records("attached"), "the record is written")[0]
    assert record["LOOPD_DEVICE"] == name
    assert int(record["LOOPD_PID"]) > 1
    assert not bound_to(tmp_path)


BWRAP = ["bwrap", "--unshare-all", "--die-with-parent", "--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev"]


@pytest.mark.parametrize("delivery", ["node", "fd"])
def test_bubblewrap_with_a_directory_of_the_host(
    daemon: Daemon, image: int, tmp_path: Path, devices: Path, delivery: str
) -> None:
    require(shutil.which("bwrap"), "needs bwrap (package bubblewrap)")
    sandbox = [
        *BWRAP,
        "--bind",
        str(tmp_path / "image"),
        str(tmp_path / "image"),
        "--dev-bind",
        str(devices),
        "/dev/loopd",
    ]
    name, listing, _ = run(sandbox, "/dev/loopd", daemon.path, tmp_path / "image", delivery)
    assert listing == ([name] if delivery == "node" else [])
    assert os.pread(image, len(CONTENT), 4096) == CONTENT
    assert list(devices.iterdir()) == []
    assert not bound_to(tmp_path)


def test_bubblewrap_with_a_dev_of_its_own(daemon: Daemon, image: int, tmp_path: Path) -> None:
    """No device opens on a tmpfs of a user namespace: that is said, not delivered. An open fd works."""
    require(shutil.which("bwrap"), "needs bwrap (package bubblewrap)")
    sandbox = [
        *BWRAP,
        "--unshare-user",
        "--bind",
        str(tmp_path / "image"),
        str(tmp_path / "image"),
        "--tmpfs",
        "/dev/loopd",
    ]
    code, listing, message = run(sandbox, "/dev/loopd", daemon.path, tmp_path / "image", "node")
    assert (code, listing) == ("undeliverable", []), message
    assert "user namespace" in message
    name, listing, _ = run(sandbox, "/dev/loopd", daemon.path, tmp_path / "image", "fd")
    assert name.startswith("loop")
    assert os.pread(image, len(CONTENT), 4096) == CONTENT
    eventually(lambda: not bound_to(tmp_path), "the file is free")


def in_user_namespace(daemon: Daemon, image: int, uid: int, deliver: tuple[str, ...]) -> Child:
    """As a user without any privilege, root of a user namespace with a tmpfs of its own."""
    os.chmod(daemon.path, 0o666)

    def body(tell: Callable[[Any], None]) -> None:
        os.chdir(daemon.directory)  # what is above it is closed to others
        become(uid)
        own_user_namespace()
        directory = mount_tmpfs("/mnt")
        reply = ask("loopd.sock", wire.encode_request(wire.Attach(0, 1, 2, deliver=deliver)), [image, directory])
        content = None
        if reply.fds:
            os.pwrite(reply.fds[0], CONTENT.ljust(512), 4096)
            os.fsync(reply.fds[0])
            content = os.pread(reply.fds[0], len(CONTENT), 4096).decode()
        tell([reply.fields, os.listdir("/mnt"), content])

    return Child(body, keep=[image])


def test_a_tmpfs_of_a_user_namespace_is_refused_and_left_as_it_was(daemon: Daemon, image: int, tmp_path: Path) -> None:
    with in_user_namespace(daemon, image, NOBODY, ("node",)) as client:
        fields, listing, _ = client.hear()
        assert fields["error"]["code"] == "undeliverable"
        assert "user namespace" in fields["error"]["message"]
        assert listing == []
        # While the client still lives.
        eventually(lambda: not bound_to(tmp_path), "the file is free")
    assert daemon.ask(wire.Leases(0), []).fields["leases"] == []
    record = eventually(lambda: daemon.records("refused"), "the record is written")[0]
    assert (record["LOOPD_CODE"], record["LOOPD_UID"]) == ("undeliverable", str(NOBODY))


def test_both_deliveries_are_refused_where_one_cannot_be(daemon: Daemon, image: int, tmp_path: Path) -> None:
    with in_user_namespace(daemon, image, NOBODY, ("node", "fd")) as client:
        fields, listing, content = client.hear()
        assert (fields["error"]["code"], listing, content) == ("undeliverable", [], None)
        eventually(lambda: not bound_to(tmp_path), "the file is free")


@pytest.mark.parametrize("uid", [0, NOBODY])
def test_an_open_fd_reaches_a_user_namespace(daemon: Daemon, image: int, tmp_path: Path, uid: int) -> None:
    with in_user_namespace(daemon, image, uid, ("fd",)) as client:
        fields, listing, content = client.hear()
        assert "error" not in fields
        assert listing == []
        assert content == CONTENT.decode()
        assert os.pread(image, len(CONTENT), 4096) == CONTENT
    eventually(lambda: not bound_to(tmp_path), "the file is free")


def test_an_unprivileged_user_owns_the_node(daemon: Daemon, image: int, directory: int, tmp_path: Path) -> None:
    """Made with its rights, it is the client's; an fd of root's directory gives no right to make it there."""
    os.chmod(daemon.path, 0o666)
    (tmp_path / "own").mkdir()
    os.chown(tmp_path / "own", NOBODY, NOBODY)
    own = os.open(tmp_path / "own", os.O_RDONLY | os.O_DIRECTORY)

    def body(tell: Callable[[Any], None]) -> None:
        os.chdir(daemon.directory)
        become(NOBODY)
        payload = wire.encode_request(wire.Attach(0, 1, 2))
        tell(ask("loopd.sock", payload, [image, directory]).code)
        reply = ask("loopd.sock", payload, [image, own])
        status = os.stat(reply.fields["devname"], dir_fd=own)
        tell([status.st_uid, status.st_gid, stat.filemode(status.st_mode)])

    try:
        with Child(body, keep=[image, directory, own]) as client:
            assert client.hear() == "not-permitted"
            assert client.hear() == [NOBODY, NOBODY, "brw-------"]
        eventually(lambda: not os.listdir(own), "its node is gone")
    finally:
        os.close(own)


# A request without reply_fd ---------------------------------------------------------------------------------------


def seed(path: str, address: bytes | str, fds: list[int]) -> socket.socket:
    """Send the seed's request, which has no reply_fd, from a socket of that address."""
    client = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    client.bind(address)
    rights = array.array("i", fds).tobytes()
    client.sendmsg([b'{"fd": 0, "dir_fd": 1}'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)], 0, path)
    return client


@pytest.fixture
def decoy(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[socket.socket]:
    """A socket of the host's with the address that the client will have."""
    # Abstract: one of the kernel's choice, as loopd answers at no other.
    address = str(tmp_path / "address") if request.param == "path" else ""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(address)
        listener.setblocking(False)
        yield listener


@pytest.mark.parametrize("decoy", ["abstract", "path"], indirect=True)
def test_a_reply_without_reply_fd_reaches_nobody_else(
    daemon: Daemon, image: int, directory: int, devices: Path, tmp_path: Path, decoy: socket.socket
) -> None:
    """In the client's namespaces the address is its own; in the host's, where loopd would send, it is the decoy's."""
    address = decoy.getsockname()
    # Shows that the decoy would hear what is sent to it: an answer to a request of its own.
    with seed(daemon.path, b"", [image, directory]) as honest:  # an address of the kernel's choice
        honest.settimeout(10)
        assert b"devname" in honest.recv(4096)
        honest.sendto(b"heard", address)
        assert decoy.recv(4096) == b"heard"

    def body(tell: Callable[[Any], None]) -> None:
        os.chdir(daemon.directory)
        unshare(CLONE_NEWNET | CLONE_NEWNS)
        mount_tmpfs(str(tmp_path))
        client = seed("loopd.sock", address, [image, directory])
        tell("sent")
        client.settimeout(30)
        tell(client.recv(4096).decode())

    with Child(body, keep=[image, directory]) as client:
        client.hear()
        record = eventually(lambda: daemon.records("refused"), "the record is written")[0]
        assert (record["LOOPD_CODE"], record["LOOPD_PID"]) == ("undeliverable", str(client.pid))
        assert "reply_fd" in record["MESSAGE"]
        # While the client still lives, nothing is left of its request.
        names = {r["LOOPD_DEVICE"] for r in daemon.records("attached") if r["LOOPD_PID"] == str(client.pid)}
        eventually(lambda: not names & {path.name for path in devices.iterdir()}, "its node is gone")
        eventually(lambda: not set(bound_to(tmp_path)) & names, "its device is unbound")
    with pytest.raises(BlockingIOError):
        decoy.recv(4096)
