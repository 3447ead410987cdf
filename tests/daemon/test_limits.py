"""Running out, of whatever there is only so much of: a warning before, a refusal of that name, and others are served.

What is left over of one request is others' business (test_faults.py); here it is the limit itself that is reached.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.daemon import Daemon, Reply, bound_to, eventually, exists, require
from support.kept import Kept, kept_fixture, start_kept_fixture  # noqa: F401
from support.processes import Child
from support.untouched import children, helpers, honest, leases, state
from test_numbers import fill, set_times

from loopd.daemon.counter import BLOCK, BLOCKS, FEW
from loopd.daemon.slots import Slots
from loopd.protocol import wire

_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 1, 2
_libc = ctypes.CDLL(None, use_errno=True)


def warnings(daemon: Daemon, words: str) -> list[str]:
    """What the administrator was told, with these words in it."""
    return [record["MESSAGE"] for record in daemon.records("warned") if words in record["MESSAGE"]]


def lease(daemon: Daemon, image: int) -> Reply:
    """Attach, and keep nothing but what keeps the lease."""
    reply = daemon.ask(wire.Attach(0, reply_fd=1, deliver=("fd",)), [image])
    for fd in reply.fds:
        os.close(fd)
    reply.fds = []
    return reply


def fill_up(daemon: Daemon, image: int, most: int) -> tuple[list[Reply], Reply]:
    """Attach until that is refused; the leases and the refusal."""
    replies: list[Reply] = []
    while len(replies) <= most:
        reply = lease(daemon, image)
        if reply.code is not None:
            return replies, reply
        replies.append(reply)
    raise AssertionError(f"not refused after {most} leases")


def others_are_served(daemon: Daemon, one_of: Reply) -> None:
    """What needs no more of what there is no more of."""
    assert daemon.hello().code is None
    assert one_of.fields["devname"] in [lease["devname"] for lease in leases(daemon)]
    assert daemon.ask(wire.Resize(one_of.fields["devname"], 0), []).code is None


# Open files and the fd store ---------------------------------------------------------------------------------------


def test_open_files(start_daemon: Callable[..., Daemon], image: int, tmp_path: Path) -> None:
    daemon = start_daemon()
    # Of what will become the daemon at the first datagram.
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (700, 700))
    honest(daemon)
    assert not warnings(daemon, "open files")
    held, refused = fill_up(daemon, image, 700)
    assert refused.code == "no-device"
    assert "open files" in refused.fields["error"]["message"]
    (warning,) = warnings(daemon, "open files")
    used = int(warning.split()[-2])
    assert len(held) * 0.7 < used < len(held) * 0.95, "the warning came before the limit"
    others_are_served(daemon, held[0])
    held[0].close()
    eventually(lambda: len(leases(daemon)) < len(held), "one lease is over")
    honest(daemon)
    for reply in held:
        reply.close()
    eventually(lambda: not leases(daemon), "the leases are over")
    assert len(warnings(daemon, "open files")) == 1


def test_places_in_the_fd_store(start_kept: Callable[..., Kept], image: int, directory: int, devices: Path) -> None:
    """No lease is without one, neither at the limit nor over a crash there, nor while it is released."""
    size = 4 * Slots.BATCH
    daemon = start_kept(environment={"FDSTORE": str(size)})
    first = daemon.attach(image, directory)
    held, refused = fill_up(daemon, image, size)
    held.insert(0, first)
    assert len(held) == size // 2
    assert refused.code == "no-device"
    assert "FileDescriptorStoreMax=" in refused.fields["error"]["message"]
    (warning,) = warnings(daemon, "fd store")
    used = int(warning.split()[-2])
    assert len(held) * 0.7 < used < len(held) * 0.95, "the warning came before the limit"
    others_are_served(daemon, held[-1])
    names = sorted(reply.fields["devname"] for reply in held)
    assert daemon.in_store() == names
    # One is let go of while it is open: that it is still bound is kept in the store too.
    with (devices / first.fields["devname"]).open("rb"):
        assert daemon.ask(wire.Detach(first.fields["devname"], 0), []).fields == {"state": "busy"}
        assert daemon.in_store() == names
        daemon.kill()
        found = daemon.leases()
        assert sorted(found) == names
        assert found[first.fields["devname"]]["state"] == "held"
        assert fill_up(daemon, image, 1)[1].code == "no-device"
    eventually(lambda: len(daemon.leases()) < len(held), "it is gone with its last close")
    honest(daemon)
    daemon.end()


# Processes and threads ---------------------------------------------------------------------------------------------


class Tasks:
    """A cgroup of the pids controller, with a limit."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.mkdir()

    def add(self, pid: int) -> None:
        (self._path / "cgroup.procs").write_text(str(pid))

    @property
    def count(self) -> int:
        """How many processes and threads are there."""
        return int((self._path / "pids.current").read_text())

    def limit(self, most: int | str) -> None:
        """Have no more be made when there are so many."""
        (self._path / "pids.max").write_text(str(most))

    def end(self) -> None:
        root = self._path.parent / "cgroup.procs"
        for pid in (self._path / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                root.write_text(pid)
        eventually(lambda: not (self._path / "cgroup.procs").read_text(), "nobody is in it")
        self._path.rmdir()


@pytest.fixture
def tasks() -> Iterator[Tasks]:
    for line in Path("/proc/self/mounts").read_text().splitlines():
        fields = line.split()
        root = Path(fields[1])
        if fields[2] == "cgroup" and "pids" in fields[3].split(","):
            break
        if fields[2] == "cgroup2" and "pids" in (root / "cgroup.subtree_control").read_text().split():
            break
    else:
        pytest.skip("there is no cgroup hierarchy with the pids controller")
    made = Tasks(root / f"loopd-test-{os.getpid()}")
    yield made
    made.end()


def test_processes(daemon: Daemon, tasks: Tasks, image: int, tmp_path: Path) -> None:
    """With no room for another process those that are there do the work; with none there, it is done when there is."""
    honest(daemon)
    assert not warnings(daemon, "TasksMax=")
    with Child(_crowd) as crowd:
        crowd.hear()
        for pid in [crowd.pid, daemon.pid, *children(daemon.pid)]:
            tasks.add(pid)
        tasks.limit(tasks.count)
        _kill(helpers(daemon))
        honest(daemon)  # by a helper that has taken the place of one
        tasks.limit(tasks.count)
        pid, forked = daemon.pid, len(helpers(daemon))
        threads = [threading.Thread(target=honest, args=(daemon,)) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(helpers(daemon)) == forked, "there was no room for more"
        honest(daemon)
        assert len(warnings(daemon, "TasksMax=")) == 1
        # The numbers of released devices are removed by a process that would like to have threads for it.
        replies = [lease(daemon, image) for _ in range(6)]
        names = [reply.fields["devname"] for reply in replies]
        for reply in replies:
            reply.close()
        eventually(lambda: not any(exists(name) for name in names), "their numbers are removed")
        last = lease(daemon, image)
        tasks.limit(1)
        _kill(children(pid))
        eventually(lambda: not children(pid), "they have been waited for, and none took their place")
        last.close()
        waiting = threading.Thread(target=honest, args=(daemon,))
        waiting.start()
        time.sleep(0.5)
        assert waiting.is_alive()
        tasks.limit("max")
        waiting.join(20)
        assert not waiting.is_alive()
        eventually(lambda: not bound_to(tmp_path), "the last lease is over")
        eventually(lambda: not exists(last.fields["devname"]), "and its number is removed")
    assert daemon.pid == pid
    assert not daemon.records("failed")


def _crowd(tell: Callable[[object], None]) -> None:
    for _ in range(40):
        threading.Thread(target=signal.pause).start()
    tell("all are there")
    signal.pause()


def _kill(pids: list[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: not any(state(pid) not in ("", "Z") for pid in pids), "they have ended")


# Numbers -----------------------------------------------------------------------------------------------------------


def test_numbers(start_kept: Callable[..., Kept], image: int) -> None:
    """All but one block are in quarantine: told when the first of them is taken, and refused when it is used up."""
    daemon = start_kept()
    set_times(str(daemon.counter), {daemon.block: 60 * 86400}, others=60)
    held, refused = fill_up(daemon, image, BLOCK)
    assert len(held) == BLOCK
    assert refused.code == "no-device"
    (few, none) = warnings(daemon, "number")
    assert few.startswith("More than 80%")
    assert none.startswith("There is no new device number")
    others_are_served(daemon, held[0])
    assert lease(daemon, image).code == "no-device"
    assert len(warnings(daemon, "number")) == 2, "told once"
    daemon.end()


@pytest.mark.parametrize("left", [FEW, FEW + 2])
def test_the_warning_comes_when_few_are_left(start_kept: Callable[..., Kept], left: int) -> None:
    daemon = start_kept()
    free = {(daemon.block + offset) % BLOCKS: 60 * 86400 for offset in range(left)}
    set_times(str(daemon.counter), free, others=60)
    for _ in range(2):  # how many are left is known when the first has taken one
        honest(daemon)
    assert len(warnings(daemon, "quarantine")) == (left == FEW)
    daemon.end()


@pytest.fixture
def small_state(tmp_path: Path) -> Iterator[Path]:
    """The state directory on a file system with room for one counter and little more."""
    place = tmp_path / "loopd/state"
    place.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=320k", "tmpfs", place], check=True)
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk(small_state: Path, start_kept: Callable[..., Kept], image: int) -> None:
    """No number is used that could not be written down before; those that were are, and an owner's own come again.

    The counter has its room on the disk from the start: a full disk does not matter to it, until it is given a hole.
    """
    daemon = start_kept()
    first = lease(daemon, image)
    fill(small_state)
    held = [lease(daemon, image) for _ in range(BLOCK + 6)]
    assert [reply.code for reply in held if reply.code is not None] == []
    _punch(daemon.counter)
    fill(small_state)
    more, refused = fill_up(daemon, image, BLOCK)
    held += more
    assert refused.code == "no-device"
    assert len(warnings(daemon, "No space left on device")) == 1
    others_are_served(daemon, held[0])
    name = first.fields["devname"]
    assert daemon.ask(wire.Detach(name, 0, wait=5), []).fields == {"state": "released"}
    assert lease(daemon, image).fields.get("devname") == name
    (small_state / "ballast").unlink()
    assert lease(daemon, image).code is None
    daemon.end()


def _punch(path: Path) -> None:
    """Give back the room of all but the first page of a file."""
    with path.open("r+b") as file:
        size, mode = os.fstat(file.fileno()).st_size, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE
        done = _libc.fallocate(file.fileno(), mode, ctypes.c_long(4096), ctypes.c_long(size - 4096))
        require(done == 0, "the file system of the test makes no holes")
