"""The daemon is killed at every system call of an attach and a detach: no binding is lost, nothing is left over.

The system calls are those that a recording of the same way shows, so the list cannot rot. A sample of them is taken,
evenly; LOOPD_TEST_EVERY_CRASH=1 takes all. strace kills before the call is made: with the next one's turn, after it.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import pytest
from support.daemon import Reply, bound_to, eventually
from support.kept import KINDS, Holding, Kept, hold, start_kept_fixture, traced  # noqa: F401
from support.processes import Child
from support.untouched import helpers, pair, reply_of, send, state

from loopd.protocol import wire

WAYS = [
    pytest.param(role, kinds, load, id=f"{role}-{'-'.join(kinds)}-{'under-load' if load else 'alone'}")
    for role in ("main", "helper")
    for kinds in (("socket", "pidfd"), ("reply",))
    for load in (False, True)
]

EVERY = os.environ.get("LOOPD_TEST_EVERY_CRASH") == "1"
SAMPLE = 32
"""Points of one test, unless EVERY."""
ANSWER = 10.0
"""Seconds for an answer, a restart of the daemon included."""

Point = tuple[str, int, str, int]
"""What keeps the lease, which of the processes it is, the name of a system call, its how-manieth in that process."""


# A client that bears with crashes, and believes nothing ------------------------------------------------------------


def ask(path: str, request: wire.Request, fds: list[int]) -> Reply:
    """What is answered; without fields for a hang-up. Silence is a failure."""
    ours, theirs = pair()
    try:
        with theirs:
            send(path, wire.encode_request(request), [*fds, theirs.fileno()]).close()
        return reply_of(ours, ANSWER)
    except ConnectionResetError:
        return Reply(ours, b"", [])
    except BaseException:
        ours.close()
        raise


def come_and_go(path: str, kind: str, image: int, directory: int, place: Path, times: int) -> str:
    """Attach, use and detach, so many times at most; says how far it came. Whatever happens, nothing of it is left."""
    with contextlib.ExitStack() as stack:
        lease_fd = []
        if kind == "socket":
            ours, theirs = pair()
            stack.enter_context(ours)
            lease_fd = [stack.enter_context(theirs).fileno()]
        elif kind == "pidfd":
            lease_fd = [os.pidfd_open(stack.enter_context(Child(lambda tell: signal.pause())).pid)]
            stack.callback(os.close, lease_fd[0])
        request = wire.Attach(0, 1, 3, 2) if lease_fd else wire.Attach(0, 1, 2)
        reply = ask(path, request, [image, directory, *lease_fd])
        stack.callback(reply.close)
        name = reply.fields.get("devname")
        if name is None:
            assert reply.code in (None, "internal"), reply.fields
            result = "not attached"
        else:
            assert (place / name).read_bytes()[:6] == b"marker"
            assert Path(f"/sys/block/{name}/diskseq").read_text() == f"{reply.fields['diskseq']}\n"
            result = detach(path, name, times)
    eventually(lambda: not list(place.iterdir()), f"the node is gone: {result}, {reply.fields}", 5)
    backing_file = Path(os.readlink(f"/proc/self/fd/{image}"))
    eventually(lambda: not bound_to(backing_file), f"the file is free: {result}, {reply.fields}", 5)
    return result


def detach(path: str, name: str, times: int) -> str:
    """Once, and again where that was not answered."""
    for turn in range(times):
        with contextlib.closing(ask(path, wire.Detach(name, 0, wait=5), [])) as reply:
            if reply.fields:
                assert reply.fields == {"state": "released"} or reply.code in ("not-found", "internal"), reply.fields
                if reply.code != "internal":
                    return "detached again" if turn else "detached"
    raise AssertionError("the last detach was not answered")


# Beside it ---------------------------------------------------------------------------------------------------------


class Beside:
    """A process that does the same again and again until it is told to stop; what it fails with fails the test."""

    def __init__(self, act: Callable[[], object], pause: float, keep: tuple[int, ...] = ()) -> None:
        self._stop, stop = pair()

        def run(tell: Callable[[Any], None]) -> None:
            turns = 0
            while not select.select([stop], [], [], pause)[0]:
                act()
                turns += 1
            tell(turns)

        self._child = Child(run, (stop.fileno(), *keep))
        stop.close()

    def stop(self) -> int:
        """How often it did it."""
        self._stop.close()
        turns: int = self._child.hear()
        return turns

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.close()
        self._child.__exit__()


def watcher(leases: list[Holding]) -> Beside:
    """Looks all the time whether they are bound, and to what they were."""

    def look() -> None:
        free = [lease.name for lease in leases if not lease.bound()]
        assert not free, f"seen unbound: {free}"

    return Beside(look, 0.002)


# The ways ----------------------------------------------------------------------------------------------------------


class Site:
    """What one client uses: an image that begins with a marker, and an empty directory."""

    def __init__(self, path: Path, stack: contextlib.ExitStack) -> None:
        path.mkdir()
        self.place = path / "dev"
        self.place.mkdir()
        (path / "image").write_bytes(b"marker" + bytes(65530))
        self.image = os.open(path / "image", os.O_RDWR | os.O_CLOEXEC)
        self.directory = os.open(self.place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, self.image)
        stack.callback(os.close, self.directory)

    def come_and_go(self, path: str, kind: str, times: int = 2) -> str:
        return come_and_go(path, kind, self.image, self.directory, self.place, times)


def switches(pid: int) -> int:
    """How often the process had to wait for something."""
    found = re.search(r"^voluntary_ctxt_switches:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1])


def processes(daemon: Kept, role: str, site: Site) -> list[int]:
    """The processes of a role, first the one that does most: the helper that was idle last is the next to be used."""
    if role == "main":
        return [daemon.pid]
    assert site.come_and_go(daemon.path, "socket") == "detached"
    before = {pid: switches(pid) for pid in helpers(daemon)}
    assert site.come_and_go(daemon.path, "socket") == "detached"
    return sorted(before, key=lambda pid: before[pid] - switches(pid))


def recorded(daemon: Kept, role: str, kind: str, site: Site, tmp_path: Path) -> list[Point]:
    """Every system call of that role in each attach and detach. The main process also looks at what uevents name, now
    more often and now less.
    """
    runs = [_recorded(daemon, role, kind, site, tmp_path) for _ in range(4 if role == "main" else 1)]
    return [point for point in runs[0] if all(point in run for run in runs)]


def _recorded(daemon: Kept, role: str, kind: str, site: Site, tmp_path: Path) -> list[Point]:
    """From the datagram of an attach to the answer of its detach."""
    time.sleep(0.3)  # uevents of what was before are looked at a moment later
    output = tmp_path / "recording"
    pids = processes(daemon, role, site)
    with traced(pids, f"-o{output}"):
        assert site.come_and_go(daemon.path, kind) == "detached"
    seen: Counter[tuple[int, str]] = Counter()
    points = []
    for match in re.finditer(r"^(\d* *)(\w+)\(.*", output.read_text(errors="replace"), re.MULTILINE):
        which, name = pids.index(int(match[1] or pids[0])), match[2]
        seen[which, name] += 1
        if "AF_NETLINK" not in match[0]:  # uevents, of the whole machine
            points.append((kind, which, name, seen[which, name]))
    assert {"recvmsg", "sendmsg", "close"} <= {name for _, name in seen}
    return points


def next_of(daemon: Kept, pid: int) -> None:
    """Wait until the next main process is started."""
    eventually(lambda: daemon.running not in (0, pid), "the next one is started")


@pytest.mark.parametrize(("role", "kinds", "load"), WAYS)
def test_killed_at_every_system_call(
    start_kept: Callable[..., Kept], tmp_path: Path, role: str, kinds: tuple[str, ...], load: bool
) -> None:
    daemon = start_kept()
    path = daemon.path
    with contextlib.ExitStack() as stack:
        one, other, standing = (Site(tmp_path / name, stack) for name in ("one", "other", "standing"))
        assert other.come_and_go(path, "reply") == "detached"
        time.sleep(0.3)  # what is left of an earlier daemon is looked for after the start, and takes a helper
        files = daemon.stored()
        leases = [stack.enter_context(hold(daemon, kind, standing.image, standing.directory)) for kind in KINDS]
        points = [point for kind in kinds for point in recorded(daemon, role, kind, one, tmp_path)]
        points = points if EVERY else points[:: -(-len(points) // SAMPLE)]
        beside = [stack.enter_context(watcher(leases))]
        if load:
            keep = (other.image, other.directory)
            # The next kill may come before it has the answer to its second detach.
            beside.append(stack.enter_context(Beside(lambda: other.come_and_go(path, kinds[0], 4), 0.05, keep)))
        killed: list[Point] = []
        missed: list[Point] = []
        results: Counter[str] = Counter()
        for kind, which, name, count in points:
            # Helpers take turns, the more so under load: where the one that was expected was not the one, the next.
            for shift in range(8):
                pids = processes(daemon, role, one)
                pid = pids[(which + shift) % len(pids)]
                with traced([pid], "-o/dev/null", f"-etrace={name}", f"-einject={name}:signal=KILL:when={count}"):
                    try:
                        results[one.come_and_go(path, kind)] += 1
                    except BaseException as error:
                        error.add_note(f"killed at {name} number {count} of {role} {which}, with a lease by {kind}")
                        raise
                if state(pid) in ("", "Z"):
                    killed.append((kind, which, name, count))
                    if role == "main":
                        next_of(daemon, pid)
                    break
            else:
                missed.append((kind, which, name, count))
        turns = [process.stop() for process in beside]
        print(f"{len(killed)} of {len(points)} points, {results}, beside it {turns}; not reached: {missed}")
        assert len(missed) <= len(points) * 0.1, f"most points were reached, but not {missed}"
        assert all(lease.bound() for lease in leases)
        assert sorted(daemon.leases()) == sorted(lease.name for lease in leases) == daemon.in_store()
        assert sorted(node.name for node in standing.place.iterdir()) == sorted(lease.name for lease in leases)
    daemon.end()
    assert daemon.stored() == files
