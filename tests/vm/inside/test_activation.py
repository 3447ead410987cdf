"""The sockets are there for good, whatever the service does; the service is there when it is needed."""

from __future__ import annotations

import os
import socket
import stat
import time
from pathlib import Path

import pytest
from host import (
    ADMIN,
    SERVICE,
    SOCKET,
    SOCKET_PATH,
    Journal,
    attach,
    bound,
    drop_in,
    idle_timeout,
    loopctl,
    prop,
    run,
    systemd_version,
    wait_for,
)


def state(unit: str) -> str:
    return prop(unit, "ActiveState")


def is_served() -> None:
    assert loopctl("hello").startswith("loopd ")


def sockets_are_up(inode: int) -> None:
    """Both listen, and the socket is still the same one: not closed and made anew in between."""
    assert state(SOCKET) == state(ADMIN) == "active"
    assert SOCKET_PATH.stat().st_ino == inode


@pytest.fixture
def inode() -> int:
    return SOCKET_PATH.stat().st_ino


def test_installed() -> None:
    assert run("systemctl", "is-enabled", SOCKET, ADMIN).split() == ["enabled", "enabled"]
    assert state(SOCKET) == state(ADMIN) == "active"
    for path, kind, mode, group in (
        ("/run/loopd", stat.S_ISDIR, 0o755, "root"),
        ("/run/loopd/loopd.sock", stat.S_ISSOCK, 0o660, "loopd"),
        ("/run/loopd-admin", stat.S_ISDIR, 0o700, "root"),
        ("/run/loopd-admin/admin.sock", stat.S_ISSOCK, 0o600, "root"),
    ):
        found = Path(path).stat()
        assert kind(found.st_mode), path
        assert (stat.S_IMODE(found.st_mode), Path(path).owner(), Path(path).group()) == (mode, "root", group), path


def test_units_are_verified() -> None:
    """Not a word from systemd-analyze, but for what an older systemd says of a key that it does not know."""
    done = run("sh", "-c", f"systemd-analyze verify --man=no {SERVICE} {SOCKET} {ADMIN} 2>&1")
    lines = done.splitlines()
    if systemd_version() < 254:
        lines = [line for line in lines if "FileDescriptorStorePreserve" not in line]
    else:
        run("udevadm", "verify", "/usr/local/lib/udev/rules.d/00-loopd.rules")
    assert lines == []


def test_starts_on_the_first_datagram(inode: int) -> None:
    run("systemctl", "stop", SERVICE)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as idle:
        idle.connect(str(SOCKET_PATH))
        time.sleep(2)
        assert state(SERVICE) == "inactive", "somebody connected, but nothing was sent"
    is_served()
    assert state(SERVICE) == "active"
    assert int(prop(SERVICE, "MainPID")) > 0
    sockets_are_up(inode)


def test_administrator_starts_it_too() -> None:
    run("systemctl", "stop", SERVICE)
    loopctl("--admin", "list")
    assert state(SERVICE) == "active"


def test_exits_when_idle_and_starts_again(inode: int) -> None:
    with idle_timeout(1):
        for _ in range(3):
            is_served()
            first = prop(SERVICE, "MainPID")
            wait_for("the idle service is gone", lambda: state(SERVICE) == "inactive")
            assert prop(SERVICE, "Result") == "success"
            assert not Path(f"/proc/{first}").exists()
        sockets_are_up(inode)


def test_a_lease_keeps_it_from_being_idle(disk: Path) -> None:
    with idle_timeout(1):
        device = attach(disk)
        first = prop(SERVICE, "MainPID")
        time.sleep(5)
        assert state(SERVICE) == "active"
        assert prop(SERVICE, "MainPID") == first
        loopctl("detach", device)
        wait_for("the idle service is gone", lambda: state(SERVICE) == "inactive")


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "verb", ["restart", "try-restart", "stop", "reload", "kill --signal=KILL", "kill --signal=TERM"]
)
def test_socket_survives(verb: str, inode: int) -> None:
    is_served()
    run("systemctl", *verb.split(), SERVICE)
    sockets_are_up(inode)
    is_served()
    sockets_are_up(inode)


def test_reload_is_no_restart() -> None:
    is_served()
    first = prop(SERVICE, "MainPID")
    run("systemctl", "reload", SERVICE)
    is_served()
    assert prop(SERVICE, "MainPID") == first


def test_restart_keeps_what_is_attached(disk: Path) -> None:
    device = attach(disk)
    before = bound()
    run("systemctl", "restart", SERVICE)
    assert bound() == before
    run("systemctl", "kill", "--signal=KILL", SERVICE)
    is_served()
    assert bound() == before
    loopctl("detach", device)


def test_each_request_may_need_a_start(inode: int) -> None:
    """The daemon is about to exit, or has just done so, whenever a request comes."""
    with idle_timeout(0.2):
        for _ in range(6):
            is_served()
        sockets_are_up(inode)


@pytest.mark.exhaustive
@pytest.mark.deadline(300)
def test_no_rate_of_starts_ends_the_socket(inode: int, journal: Journal) -> None:
    """As if requests were timed so that each finds the service just gone: starts as fast as systemd can do them.

    A program that ends at once takes the daemon's place, and the datagram that it leaves starts it again. By default
    systemd gives up after 5 starts in 10 s, or a socket after 20 in 2 s.
    """

    # Software emulation on a busy machine may be too slow for the limits to bite, so look up too that they are off.
    assert prop(SERVICE, "StartLimitIntervalUSec") == "0"
    assert prop(SOCKET, "TriggerLimitIntervalUSec") == prop(ADMIN, "TriggerLimitIntervalUSec") == "0"

    def starts() -> int:
        return len(journal.records("-u", SERVICE, "MESSAGE_ID=7d4958e842da4a758f6c1cdc7b36dcc5"))

    with drop_in("[Service]\nType=oneshot\nExecStart=\nExecStart=/bin/true\n"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
            client.sendto(b"{}", str(SOCKET_PATH))
        wait_for("it was started 12 times", lambda: starts() >= 12, 180)
        sockets_are_up(inode)
    is_served()
    sockets_are_up(inode)


@pytest.mark.exhaustive
def test_no_number_of_crashes_ends_the_socket(inode: int) -> None:
    for _ in range(8):
        is_served()
        run("systemctl", "kill", "--signal=KILL", SERVICE)
    is_served()
    sockets_are_up(inode)


def test_a_service_that_cannot_start_is_tried_again(inode: int, journal: Journal) -> None:
    """Neither given up for good nor tried as fast as the machine can."""
    with drop_in("[Service]\nExecStart=\nExecStart=/bin/false\n"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
            client.sendto(b"{}", str(SOCKET_PATH))
        time.sleep(12)
        tries = len(journal.records("-u", SERVICE, "MESSAGE_ID=7d4958e842da4a758f6c1cdc7b36dcc5"))
        assert 2 <= tries <= 8, f"systemd started it {tries} times in 12 s"
        sockets_are_up(inode)
    is_served()


def test_access_is_by_group(disk: Path) -> None:
    """A user who is not in the group cannot even ask; one who is can attach its own file in its own directory."""
    disk.parent.chmod(0o755)
    os.chown(disk, 1000, 1000)
    refused = run("runuser", "-u", "builder", "--", "sh", "-c", "loopctl hello 2>&1; echo $?")
    assert refused.strip().endswith("1")
    assert "ermission denied" in refused
    nodes = disk.parent / "dev"
    nodes.mkdir()
    os.chown(nodes, 1000, 1000)
    user = ("setpriv", "--reuid=builder", "--regid=builder", "--groups=loopd", "--")
    written = run(*user, "loopctl", "run", "--directory", nodes, disk, "--", "sh", "-c", "echo mine >{}; ls -ln {}")
    assert " 1000 1000 " in written
    assert disk.read_bytes().startswith(b"mine\n")
    assert list(nodes.iterdir()) == []
