"""The audit: whose view of the file system a path in a record is, and whom a sentence is about."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.daemon import Daemon, ask, eventually
from support.kept import Kept, start_kept_fixture  # noqa: F401
from support.processes import CLONE_NEWNS, Child, mount_tmpfs, unshare
from support.untouched import elsewhere

from loopd.protocol import wire

ATTACH = wire.encode_request(wire.Attach(0, reply_fd=1, deliver=("fd",)))
THEIRS = " (a path in the client's mount namespace) was attached"


@pytest.fixture
def daemon(daemon: Daemon) -> Daemon:
    daemon.hello()
    return daemon


def attach(daemon: Daemon, path: str | int) -> None:
    """Attach a file, in the directory of the daemon."""
    image = os.open(path, os.O_RDWR) if isinstance(path, str) else path
    reply = ask("loopd.sock", ATTACH, [image])
    reply.close()
    assert "devname" in reply.fields, reply.fields


def recorded(daemon: Daemon, event: str = "attached") -> dict[str, str]:
    """The last record of that kind."""
    return eventually(lambda: daemon.records(event), "it is recorded")[-1]  # type: ignore[no-any-return]


def client(daemon: Daemon, act: Callable[[], object], *prepare: Callable[[], object]) -> None:
    def begin() -> None:
        os.chdir(daemon.directory)
        for step in prepare:
            step()

    elsewhere(act, begin)


@pytest.fixture
def shadow(tmp_path: Path) -> Path:
    """What a container has as its /etc."""
    path = tmp_path / "container/etc/shadow"
    path.parent.mkdir(parents=True)
    path.write_bytes(bytes(1 << 16))
    return path


def container(shadow: Path) -> Callable[[], None]:
    """For `client`: a mount namespace in which that is /etc/shadow."""

    def enter() -> None:
        unshare(CLONE_NEWNS)
        subprocess.run(["mount", "--bind", str(shadow.parent), "/etc"], check=True)

    return enter


def test_a_path_of_the_hosts(daemon: Daemon, tmp_path: Path, image: int) -> None:
    client(daemon, lambda: attach(daemon, image))
    record = recorded(daemon)
    assert (record["LOOPD_BACKING_VIEW"], record["LOOPD_BACKING_FILE"]) == ("host", str(tmp_path / "image"))
    assert record["MESSAGE"].endswith(f" on {tmp_path}/image was attached")


def test_a_path_of_a_containers_reads_as_the_hosts(daemon: Daemon, shadow: Path) -> None:
    client(daemon, lambda: attach(daemon, "/etc/shadow"), container(shadow))
    record = recorded(daemon)
    assert (record["LOOPD_BACKING_VIEW"], record["LOOPD_BACKING_FILE"]) == ("client", "/etc/shadow")
    assert record["MESSAGE"].replace("\\", "").endswith(f" on /etc/shadow{THEIRS}")
    expired = recorded(daemon, "expired")
    assert expired["LOOPD_BACKING_VIEW"] == "client"
    assert "(a path in the client" in expired["MESSAGE"]


def test_a_file_of_a_containers_that_the_host_hands_in(daemon: Daemon) -> None:
    """It is where the file is that counts, and not who sends it."""

    def body(tell: Callable[[Any], None]) -> None:
        unshare(CLONE_NEWNS)
        os.close(mount_tmpfs("/etc"))
        Path("/etc/shadow").write_bytes(bytes(1 << 16))
        tell("there")
        os.read(os.pipe()[0], 1)

    with Child(body) as inside:
        assert inside.hear() == "there"
        client(daemon, lambda: attach(daemon, f"/proc/{inside.pid}/root/etc/shadow"))
    assert recorded(daemon)["LOOPD_BACKING_VIEW"] == "client"


def test_a_file_of_the_hosts_that_a_container_is_given(daemon: Daemon, tmp_path: Path, image: int) -> None:
    client(daemon, lambda: attach(daemon, image), lambda: unshare(CLONE_NEWNS))
    record = recorded(daemon)
    assert (record["LOOPD_BACKING_VIEW"], record["LOOPD_BACKING_FILE"]) == ("host", str(tmp_path / "image"))


def test_memory_has_no_path_of_the_hosts(daemon: Daemon) -> None:
    memory = os.memfd_create("etc")
    os.truncate(memory, 1 << 16)
    client(daemon, lambda: attach(daemon, memory))
    os.close(memory)
    assert recorded(daemon)["LOOPD_BACKING_VIEW"] == "client"


@pytest.fixture
def mounted(shadow: Path) -> Iterator[Path]:
    """The container's root as a mount of its own, seen by the host too."""
    root = shadow.parent.parent
    subprocess.run(["mount", "--bind", str(root), str(root)], check=True)
    yield root
    subprocess.run(["umount", "-l", str(root)], check=True)


def test_a_chroot_and_then_the_host(daemon: Daemon, mounted: Path) -> None:
    """Both see the same mount; what was found for the one is not taken for the other."""
    home = os.open(daemon.directory, os.O_PATH)
    (mounted / "proc").mkdir()

    def enter() -> None:
        os.chroot(mounted)
        os.fchdir(home)

    client(daemon, lambda: attach(daemon, "/etc/shadow"), enter)
    os.close(home)
    first = recorded(daemon)
    client(daemon, lambda: attach(daemon, f"{mounted}/etc/shadow"))
    eventually(lambda: len(daemon.records("attached")) == 2, "both are recorded")
    second = recorded(daemon)
    assert [record["LOOPD_BACKING_VIEW"] for record in (first, second)] == ["client", "host"]


def test_it_is_known_after_a_restart(start_kept: Callable[..., Kept], image: int, directory: int) -> None:
    daemon = start_kept()
    daemon.hello()
    reply = daemon.attach(image, directory)
    assert reply.code is None
    daemon.kill()
    assert daemon.ask(wire.Detach(reply.fields["devname"], 0, wait=5), []).fields == {"state": "released"}
    assert recorded(daemon, "detached")["LOOPD_BACKING_VIEW"] == "host"
    daemon.end()


def test_a_refusal_says_whose_request_it_was(daemon: Daemon) -> None:
    with open("/proc/self/stat", "rb") as file:
        reply = daemon.ask(ATTACH, [file.fileno()])
    assert reply.code == "not-permitted"
    record = recorded(daemon, "refused")
    who = record.get("LOOPD_UNIT") or f"account {record['LOOPD_ACCOUNT']}"
    assert record["MESSAGE"].startswith(f"A request of {who} was refused: ")
    assert re.search("not among the allowed file systems", record["MESSAGE"])
