"""What a lease costs while nothing happens to it: a few open files, one entry of the poller, and no CPU time at all."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.daemon import eventually
from support.kept import Kept, start_kept_fixture  # noqa: F401
from support.untouched import children, helpers

from loopd.kernel import uevents

LEASES = 24
IDLE = 6.0
"""Seconds in which nothing may happen."""
TRIES = 20
"""Windows of that length: what others on the machine do with block devices wakes every loopd, so that one is looked
for in which they do nothing."""


def _polled(pid: int) -> int:
    """How many files the poller of a process watches."""
    for link in Path(f"/proc/{pid}/fd").iterdir():
        if os.readlink(link) == "anon_inode:[eventpoll]":
            return Path(f"/proc/{pid}/fdinfo/{link.name}").read_text().count("tfd:")
    raise AssertionError("the process has no poller")


def _waits(pids: list[int]) -> dict[str, int]:
    """How often each thread of the processes has gone to sleep: one that has not did not wake up either."""
    found = {}
    for pid in pids:
        for status in Path(f"/proc/{pid}/task").glob("*/status"):
            found[status.parts[-2]] = int(status.read_text().partition("\nvoluntary_ctxt_switches:")[2].split()[0])
    return found


def test_files_and_poller(start_kept: Callable[..., Kept], image: int, directory: int) -> None:
    daemon = start_kept()

    def cost() -> tuple[int, int]:
        """Entries of the poller and open files, but for the channel of each child process."""
        channels = len(children(daemon.pid))
        return _polled(daemon.pid) - channels, len(daemon.fds()) - channels

    def attach() -> None:
        assert daemon.attach(image, directory).code is None

    def settled() -> tuple[int, int] | None:
        """What belongs to the request is closed: nothing changes any more."""
        first = cost()
        time.sleep(0.5)
        return first if first == cost() else None

    attach()
    polled, files = eventually(settled, "it is at rest")
    for _ in range(LEASES):
        attach()
    # The keeper; slots are stored 64 at a time.
    eventually(lambda: cost() in [(polled + LEASES, files + LEASES + slots) for slots in (0, 64)], "one each")


def test_helpers_that_are_not_needed_end(start_kept: Callable[..., Kept], image: int, directory: int) -> None:
    daemon = start_kept("--idle-timeout=3")
    daemon.attach(image, directory)  # else the daemon itself would end
    with ThreadPoolExecutor(16) as crowd:
        replies = list(crowd.map(lambda _: daemon.attach(image, directory), range(64)))
    assert all(reply.code is None for reply in replies)
    assert len(helpers(daemon)) > 2
    eventually(lambda: len(helpers(daemon)) == 2, "the others have ended", 20)
    assert daemon.hello().code is None


def test_nothing_happens(start_kept: Callable[..., Kept], image: int, directory: int) -> None:
    daemon = start_kept("--idle-timeout=3600")
    for _ in range(LEASES):
        assert daemon.attach(image, directory, partscan=True).code is None
    pids = [daemon.pid, *children(daemon.pid)]
    with uevents.listen() as kernel:
        for _ in range(TRIES):
            time.sleep(2)  # what there was has been looked at
            uevents.receive(kernel)
            before = _waits(pids)
            time.sleep(IDLE)
            after = _waits(pids)
            if not select.select([kernel], [], [], 0)[0]:
                assert after == before
                return
    pytest.skip("others never leave the machine's block devices alone")
