"""The device works: what is written through the node is in the file, and every option does what it says."""

from __future__ import annotations

import array
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.daemon import Daemon, bound_to, eventually, exists, prompt

from loopd.protocol import wire


def test_bytes_through_the_node_are_in_the_file(daemon: Daemon, image: int, directory: int, devices: Path) -> None:
    reply = daemon.attach(image, directory)
    node = devices / reply.fields["devname"]
    with node.open("r+b", buffering=0) as device:
        device.seek(4096)
        device.write(b"loopd" * 100)
        os.fsync(device.fileno())
    assert os.pread(image, 500, 4096) == b"loopd" * 100


def test_the_reply_is_the_kernels_word(daemon: Daemon, image: int, directory: int, devices: Path) -> None:
    fields = daemon.attach(image, directory).fields
    sysfs = Path("/sys/block") / fields["devname"]
    assert f"{fields['major']}:{fields['minor']}\n" == (sysfs / "dev").read_text()
    assert fields["size"] == 512 * int((sysfs / "size").read_text()) == 1 << 20
    assert fields["diskseq"] == int((sysfs / "diskseq").read_text())
    assert fields["read_only"] is bool(int((sysfs / "ro").read_text())) is False
    assert fields["direct_io"] is bool(int((sysfs / "loop/dio").read_text()))
    status = (devices / fields["devname"]).stat()
    assert (os.major(status.st_rdev), os.minor(status.st_rdev)) == (fields["major"], fields["minor"])


def test_hang_up_ends_the_lease(daemon: Daemon, image: int, directory: int, devices: Path, tmp_path: Path) -> None:
    reply = daemon.attach(image, directory)
    name = reply.fields["devname"]
    reply.close()
    eventually(lambda: not list(devices.iterdir()), "the node is gone")
    eventually(lambda: not bound_to(tmp_path), "the file is free")
    eventually(lambda: not exists(name), "the number is gone")
    eventually(lambda: [r["LOOPD_DEVICE"] for r in daemon.records("expired")] == [name], "the record is written")


def test_detach_ends_it_at_once(daemon: Daemon, image: int, directory: int, devices: Path, tmp_path: Path) -> None:
    name = daemon.attach(image, directory).fields["devname"]
    assert daemon.ask(wire.Detach(name, 0), []).fields == {"state": "released"}
    assert not bound_to(tmp_path)
    assert not list(devices.iterdir())
    assert daemon.ask(wire.Detach(name, 0), []).code == "not-found"


def test_a_device_in_use_goes_at_its_last_close(
    daemon: Daemon, image: int, directory: int, devices: Path, tmp_path: Path
) -> None:
    def turn() -> float:
        name = daemon.attach(image, directory).fields["devname"]
        with (devices / name).open("rb"):
            assert daemon.ask(wire.Detach(name, 0), []).fields == {"state": "busy"}
            assert bound_to(tmp_path) == [name]
            assert daemon.ask(wire.Leases(0), []).fields["leases"][0]["state"] == "held"
            began = time.monotonic()
        eventually(lambda: not bound_to(tmp_path), "the file is free")
        eventually(lambda: not daemon.ask(wire.Leases(0), []).fields["leases"], "the lease is over")
        return time.monotonic() - began

    prompt(turn)  # not at the next look at what is held


def test_detach_waits_for_the_last_close(
    daemon: Daemon, image: int, directory: int, devices: Path, tmp_path: Path
) -> None:
    name = daemon.attach(image, directory).fields["devname"]
    with (devices / name).open("rb"):
        assert daemon.ask(wire.Detach(name, 0, wait=0.3), []).fields == {"state": "busy"}
    assert daemon.ask(wire.Detach(name, 0, wait=5), []).fields.get("state", "released") == "released"


def test_window_and_sector_size(daemon: Daemon, make_image: Callable[..., int], directory: int, devices: Path) -> None:
    image = make_image(1 << 20)
    os.pwrite(image, b"A" * 4096, 8192)
    fields = daemon.attach(image, directory, offset=8192, sizelimit=65536, sector_size=4096).fields
    assert (fields["size"], fields["sector_size"]) == (65536, 4096)
    assert (devices / fields["devname"]).read_bytes()[:4097] == b"A" * 4096 + b"\0"


def test_an_empty_file(daemon: Daemon, make_image: Callable[..., int], directory: int) -> None:
    """It is told as what it is, not as an offset at its end."""
    error = daemon.attach(make_image(0), directory).fields["error"]
    assert (error["code"], "the file is empty" in error["message"]) == ("invalid", True)


def test_a_rescan_without_partscan_says_what_to_do(daemon: Daemon, image: int, directory: int) -> None:
    name = daemon.attach(image, directory).fields["devname"]
    refusal = daemon.ask(wire.Rescan(name, 0), [])
    message = "the device was attached without partscan: detach it, and attach it with partscan"
    assert refusal.fields["error"] == {"code": "unsupported", "message": message}


def test_read_only(daemon: Daemon, make_image: Callable[..., int], directory: int, devices: Path) -> None:
    for image, option in ((make_image(), True), (make_image(flags=os.O_RDONLY), False)):
        fields = daemon.attach(image, directory, read_only=option).fields
        assert fields["read_only"] is True
        # Some kernels let root open it for writing; none lets a byte through.
        with pytest.raises(PermissionError), (devices / fields["devname"]).open("r+b", buffering=0) as device:
            device.write(b"x" * 512)


def test_the_seeds_own_request(daemon: Daemon, image: int, directory: int, devices: Path) -> None:
    """No op and no reply_fd: answered at the sender's autobind address, since the test shares the host's network."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
        client.bind("")
        client.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        client.connect(daemon.path)
        client.settimeout(10)
        rights = array.array("i", [image, directory]).tobytes()
        client.sendmsg([b'{"fd": 0, "dir_fd": 1}'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        reply = json.loads(client.recv(4096))
    assert (devices / reply["devname"]).is_block_device()
    record = eventually(lambda: daemon.records("attached"), "the record is written")[0]
    assert record["LOOPD_LEASE"] == "sender"
