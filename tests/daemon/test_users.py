"""Several users in one unit: what one of them has is not another's to pay for, and a container is no several users."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.daemon import Daemon, ask, eventually
from support.kept import Kept, start_kept_fixture  # noqa: F401
from support.processes import CLONE_NEWPID, Child, become, end_with_parent, mapped, unshare
from support.untouched import cgroup, needed_cgroup

from loopd.protocol import wire

LIMIT = 2
POLICY = f"limits.devices = {LIMIT}\n"
ATTACH = wire.encode_request(wire.Attach(0, reply_fd=1, deliver=("fd",)))


@pytest.fixture
def service() -> Iterator[Callable[[], None]]:
    """Enter the cgroup of a service."""
    with needed_cgroup(f"loopd-test-{os.getpid()}.service") as enter:
        yield enter


@pytest.fixture
def daemon(start_daemon: Callable[..., Daemon]) -> Daemon:
    """One that everybody may send to."""
    daemon = start_daemon(policy=POLICY)
    Path(daemon.path).chmod(0o666)
    daemon.hello()
    return daemon


class User(Child):
    """A client that attaches as often as it may, and holds what it got; it tells how much that is."""

    def __init__(self, daemon: Daemon, image: int, *prepare: Callable[[], object]) -> None:
        def body(tell: Callable[[Any], None]) -> None:
            os.chdir(daemon.directory)
            for step in prepare:
                step()
            end_with_parent()
            held = []
            while not (reply := ask("loopd.sock", ATTACH, [image])).code:
                held.append(reply)
            tell([len(held), reply.code])
            os.read(os.pipe()[0], 1)

        super().__init__(body, [image])


def test_one_user_of_a_service_does_not_use_up_what_another_may_have(
    daemon: Daemon, image: int, service: Callable[[], None]
) -> None:
    """As the jobs of a CI runner, and root."""
    runner = lambda: become(3001)  # noqa: E731  # a step of preparation
    with User(daemon, image, service, runner) as first, User(daemon, image, service) as root:
        assert first.hear() == root.hear() == [LIMIT, "quota"]
        with User(daemon, image, service, runner) as again:
            assert again.hear() == [0, "quota"]
        with User(daemon, image, service, lambda: become(3002)) as other:
            assert other.hear() == [LIMIT, "quota"]
    account = f"/loopd-test-{os.getpid()}.service"
    assert {record["LOOPD_ACCOUNT"] for record in daemon.records("attached")} == {account}


def _pid_namespace() -> None:
    """What follows is a process of a pid namespace of its own."""
    unshare(CLONE_NEWPID)
    if child := os.fork():
        os.waitpid(child, 0)
        os._exit(0)


CONTAINERS: dict[str, list[Callable[[], None]]] = {
    "a user namespace": [mapped(300000, 65536)],
    "a pid namespace": [_pid_namespace],
}


@pytest.mark.parametrize("kind", [*CONTAINERS, "a cgroup below"])
def test_all_of_a_container_are_one(daemon: Daemon, image: int, service: Callable[[], None], kind: str) -> None:
    """Also where it has no cgroup of its own (podman's --cgroups=disabled): it could choose among all of its uids."""
    with cgroup(f"loopd-test-{os.getpid()}.service/job") as job:
        assert job is not None
        inside = CONTAINERS.get(kind, [])
        enter = service if inside else job
        with User(daemon, image, enter, *inside, lambda: become(1)) as one:
            assert one.hear() == [LIMIT, "quota"]
            with User(daemon, image, enter, *inside, lambda: become(2)) as other:
                assert other.hear() == [0, "quota"]


def test_it_is_known_after_a_restart(start_kept: Callable[..., Kept], image: int, service: Callable[[], None]) -> None:
    daemon = start_kept(policy=POLICY)
    Path(daemon.path).chmod(0o666)
    daemon.hello()
    runner = lambda: become(3001)  # noqa: E731  # a step of preparation
    with User(daemon, image, service, runner) as user:
        assert user.hear() == [LIMIT, "quota"]
        daemon.kill()
        with User(daemon, image, service, runner) as again, User(daemon, image, service) as root:
            assert again.hear() == [0, "quota"]
            assert root.hear() == [LIMIT, "quota"]
    eventually(lambda: not daemon.leases(), "all of it is over")
    daemon.end()
