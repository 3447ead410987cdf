"""Hundreds of datagrams of one account, each with a file whose release hangs: the account has no process for each."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.daemon import Daemon, ask, bound_to, eventually, require
from support.fuse_never import Never
from support.locks import locking, never_fixture, served, writing  # noqa: F401
from support.processes import Child, stays
from support.untouched import LONG_QUEUE, Untouched, cgroup, children, droppers, elsewhere, pair, send, stopped

from loopd.daemon.dropping import MOST_HANGING
from loopd.protocol import wire

HANGING = 200
HARMLESS = 240
"""Files besides, in each: whoever keeps them all open has no room for long."""
FILES = 900
"""Files that a process of the daemon may have open."""
POLICY = """
request_timeout = 6
write_back_timeout = 6
[limits]
devices = 400
requests = 1
new_numbers = 400
"""
MOST_CHILDREN = 12 + HANGING // MOST_HANGING
"""Workers at rest, those of honest clients, the children of other roles, and what an account may hang."""


def _threads(pid: int) -> int:
    with contextlib.suppress(FileNotFoundError):
        return len(os.listdir(f"/proc/{pid}/task"))
    return 0


def _shed(daemon: Daemon) -> int:
    return sum(int(record["LOOPD_COUNT"]) for record in daemon.records("shed"))


def _opened(daemon: Daemon, image: int, directory: int, devices: Path) -> list[int]:
    """Devices that loopd has let go of, open here: their last closes will be these fds'."""
    replies = [daemon.attach(image, directory) for _ in range(HANGING)]
    opened = [os.open(devices / reply.fields["devname"], os.O_RDWR) for reply in replies]
    for reply in replies:
        reply.close()
    eventually(lambda: len(daemon.records("held")) == HANGING, "loopd has let go of them", 60)
    return opened


def test_hundreds_of_one_account(
    start_daemon: Callable[..., Daemon], never: Never, make_image: Callable[..., int], directory: int,
    devices: Path, tmp_path: Path,
) -> None:  # fmt: skip
    daemon = start_daemon(policy=POLICY, launcher=LONG_QUEUE)
    before = Untouched(daemon)
    image, own = make_image(), make_image(name="own")
    opened = _opened(daemon, image, directory, devices)
    account = f"loopd-test-{os.getpid()}"

    with cgroup(account) as enter:
        require(enter, "needs a cgroup hierarchy to make a second account in")
        assert enter is not None

        def act(tell: Callable[[Any], None]) -> None:
            enter()
            reply = ask(daemon.path, wire.encode_request(wire.Attach(0, reply_fd=1, deliver=("fd",))), [own])
            ours, theirs = pair()
            send(daemon.path, wire.encode_request(wire.Detach(reply.fields["devname"], 0, wait=600)), [theirs.fileno()])
            eventually(lambda: len(daemon.records("held")) > HANGING, "the detach waits: it may ask for nothing more")
            tell("ready")
            harmless = os.open(os.devnull, os.O_RDONLY)
            hear.recv(1)
            for device in opened:
                send(daemon.path, b'{"op": "hello"}', [device, *[harmless] * HARMLESS]).close()
                os.close(device)
            tell("sent")
            signal.pause()
            ours.close()

        hear, go = pair()
        with hear, go, Child(act, [hear.fileno(), own, *opened]) as child:
            assert child.hear() == "ready"
            for device in opened:
                os.pwrite(device, b"late" * 1024, 4096)
            resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (FILES, FILES))
            with locking(never, writing(tmp_path / "image")):
                with stopped(daemon):
                    go.send(b"x")
                    assert child.hear() == "sent"
                    for device in opened:
                        os.close(device)
                most = 0

                def all_dropped() -> bool:
                    nonlocal most
                    most = max(most, len(children(daemon.pid)))
                    return _shed(daemon) >= HANGING

                eventually(all_dropped, "all are taken off the queue", 60)
                assert all("and what is in it hangs" in record["MESSAGE"] for record in daemon.records("shed"))
                assert {record["LOOPD_ACCOUNT"] for record in daemon.records("shed")} == {f"/{account}"}
                assert sum(map(_threads, children(daemon.pid))) >= HANGING, "they do hang"
                served(daemon)
                stays(lambda: len(children(daemon.pid)) <= MOST_CHILDREN, 1, "it has no more of them")
                assert most <= MOST_CHILDREN
            eventually(lambda: not bound_to(tmp_path / "image"), "the devices are gone", 60)
        eventually(lambda: not bound_to(tmp_path), "the last device is gone", 20)
        eventually(lambda: sum(map(_threads, droppers(daemon))) <= 1, "what hung has ended", 20)
        ask_in_account = lambda: bool(ask(daemon.path, wire.encode_request(wire.Hello(0)), []).fields)  # noqa: E731
        eventually(lambda: elsewhere(ask_in_account, enter), "the account is served again", 5)
    before.check(tmp_path)

