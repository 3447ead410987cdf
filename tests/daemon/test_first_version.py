"""Hosts where cgroups of the second version do not tell clients apart: Docker or the kubelet with the cgroupfs driver.

The clients here are in cgroups of systemd's first hierarchy alone, as such a runtime puts its containers.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.daemon import Daemon, ask, bound_to, eventually, exists, require
from support.untouched import elsewhere

from loopd.daemon.accounts import NOBODY, SHARED, Owner, owner_of, whose
from loopd.kernel import libc
from loopd.loop import Loop
from loopd.protocol import wire

HIERARCHY = Path("/sys/fs/cgroup/systemd")


@contextlib.contextmanager
def container(name: str) -> Iterator[Callable[[], None]]:
    """For `elsewhere`: enter a cgroup of systemd's first hierarchy, and stay where one is in the second."""
    require((HIERARCHY / "cgroup.procs").exists(), "needs systemd's hierarchy of the first version")
    place = HIERARCHY / f"loopd-test-{os.getpid()}" / name
    place.mkdir(parents=True)

    def enter() -> None:
        (place / "cgroup.procs").write_text(str(os.getpid()))

    try:
        yield enter
    finally:
        eventually(lambda: not (place / "cgroup.procs").read_text(), "the cgroup is empty")
        place.rmdir()
        with contextlib.suppress(OSError):
            place.parent.rmdir()


@pytest.fixture
def two() -> Iterator[tuple[Callable[[], None], Callable[[], None]]]:
    """Two tenants of one host."""
    with container("a") as first, container("b") as second:
        yield first, second


def request(daemon: Daemon, message: wire.Request, *fds: int) -> dict[str, Any]:
    reply = ask(daemon.path, wire.encode_request(message), list(fds))
    reply.close()
    return reply.fields


def attach(daemon: Daemon, image: int, directory: int) -> Callable[[], dict[str, Any]]:
    """As a client whose lease is kept by the test's own process, so that it outlives the client."""

    def act() -> dict[str, Any]:
        return request(daemon, wire.Attach(0, 1, 3, 2), image, directory, os.pidfd_open(os.getppid()))

    return act


def test_they_are_one_account(two: tuple[Callable[[], None], Callable[[], None]]) -> None:
    found = [elsewhere(lambda: whose(os.getpid()), enter) for enter in two]
    assert {account for (account, _), _ in found} == {SHARED}


def test_a_process_that_the_second_version_knows_is_no_such_client() -> None:
    found = whose(os.getpid())
    assert found is not None
    assert found[0].account != SHARED


def test_nobody_lists_or_detaches_what_is_anothers(
    daemon: Daemon, image: int, directory: int, devices: Path, tmp_path: Path,
    two: tuple[Callable[[], None], Callable[[], None]],
) -> None:  # fmt: skip
    """Nor what is its own: nothing tells that it is."""
    first, second = two
    name = elsewhere(attach(daemon, image, directory), first)["devname"]
    for enter in (first, second):
        listed = elsewhere(lambda: request(daemon, wire.Leases(0)), enter)
        assert listed["leases"] == []
        for message in (wire.Detach(name, 0), wire.Resize(name, 0), wire.Rescan(name, 0)):
            refused = elsewhere(partial(request, daemon, message), enter)
            assert refused["error"]["code"] == "not-found"
    assert bound_to(tmp_path) == [name]
    (warning,) = [record for record in daemon.records("warned") if "first version" in record["MESSAGE"]]
    assert "one account" in warning["MESSAGE"]


def test_no_number_comes_again(
    daemon: Daemon, image: int, directory: int, two: tuple[Callable[[], None], Callable[[], None]]
) -> None:
    """Neither to another nor to the same, of whom nobody knows that it is the same."""

    def come_and_go() -> str:
        reply = ask(daemon.path, wire.encode_request(wire.Attach(0, 1, 2)), [image, directory])
        name: str = reply.fields["devname"]
        reply.close()
        eventually(lambda: not exists(name), "its number is removed")
        return name

    names = [elsewhere(come_and_go, enter) for enter in (*two, *two, *two)]
    assert len(set(names)) == len(names)


def test_their_limits_are_strict(
    daemon: Daemon, image: int, directory: int, two: tuple[Callable[[], None], Callable[[], None]]
) -> None:
    for enter in two:
        assert elsewhere(lambda: request(daemon, wire.Hello(0)), enter)["limits"]["devices"] == 64
    assert daemon.hello().fields["limits"]["devices"] == 256


def test_windows_are_within_their_limits(
    daemon: Daemon, image: int, directory: int, devices: Path, two: tuple[Callable[[], None], Callable[[], None]]
) -> None:
    def prepare() -> None:
        two[0]()
        libc.call("unshare", 0x00020000)  # CLONE_NEWNS: root of a container

    def act() -> dict[str, Any]:
        return request(daemon, wire.Attach(0, 1, 3, 2, partscan=True), image, directory, os.pidfd_open(os.getppid()))

    name = elsewhere(act, prepare)["devname"]
    with Loop(int(name[4:])) as loop:
        for number in range(1, 65):
            loop.add_partition(number, number * 4096, 4096)
    eventually((devices / f"{name}p63").exists, "a window", 30)
    eventually(lambda: "its limit is 64" in daemon.log(), "there is no room for the last")
    assert not (devices / f"{name}p64").exists()


def test_a_host_without_the_second_version(
    start_daemon: Callable[..., Daemon], image: int, directory: int, tmp_path: Path
) -> None:
    """The same, and the start says so."""
    hide = ("unshare", "--mount", "sh", "-ec", 'mount -t tmpfs none /sys/fs/cgroup; exec "$@"', "sh")
    daemon = start_daemon(launcher=hide)
    hello = daemon.hello().fields
    assert [record for record in daemon.records("warned") if "Clients are not told apart" in record["MESSAGE"]]
    assert hello["limits"]["devices"] == 64
    name = attach(daemon, image, directory)()["devname"]
    assert request(daemon, wire.Leases(0))["leases"] == []
    assert request(daemon, wire.Detach(name, 0))["error"]["code"] == "not-found"
    assert bound_to(tmp_path) == [name]


def test_nobody_is_no_owner() -> None:
    assert owner_of(SHARED, 0, 0) == NOBODY
    assert owner_of("/a", 0, 0) == NOBODY
    assert owner_of("/a", 0, 7) == Owner("/a", 0, 7) != owner_of("/a", 0, 8)
