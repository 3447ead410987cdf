"""Memory: what the units let loopd have is enough for its work, and where it runs out one request ends."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.daemon import ROOT, Daemon, eventually, require
from support.processes import Child
from support.untouched import helpers
from test_mounts import client_fixture  # noqa: F401  # pytest finds it here

from loopd.daemon.process import WORKERS
from loopd.daemon.slots import Slots
from loopd.protocol import wire
from loopd.worker import grants
from loopd.worker.grants import Grants
from loopd.worker.links import Links
from loopd.worker.make import FIRST

MIB = 1 << 20
UNITS = ROOT / "systemd"


class Memory:
    """A cgroup with a limit of memory of its own."""

    def __init__(self, group: Path) -> None:
        self.group = group
        first = (group / "memory.limit_in_bytes").exists()
        self._used = group / ("memory.usage_in_bytes" if first else "memory.current")
        self._limit = group / ("memory.limit_in_bytes" if first else "memory.max")

    @property
    def used(self) -> int:
        """Bytes, those included that the kernel has taken for its processes."""
        return int(self._used.read_text())

    def limit(self, size: int) -> None:
        self._limit.write_text(str(size))


@pytest.fixture
def memory() -> Iterator[Memory]:
    path = Path("/sys/fs/cgroup/memory")
    if not path.is_dir():
        path = Path("/sys/fs/cgroup")
        controllers = path / "cgroup.subtree_control"
        require(controllers.exists() and "memory" in controllers.read_text(), "needs a cgroup with a limit of memory")
    group = path / f"loopd-test-{os.getpid()}"
    group.mkdir()
    yield Memory(group)
    eventually(lambda: not (group / "cgroup.procs").read_text(), "the cgroup is empty")
    group.rmdir()


@pytest.fixture
def daemon(memory: Memory, start_daemon: Callable[..., Daemon], tmp_path: Path) -> Daemon:
    """In that cgroup."""
    config = tmp_path / "loopd.toml"
    config.write_text("limits.devices = 1000\nlimits.new_numbers = 1000\n")
    enter = ("sh", "-c", f'echo $$ >{memory.group}/cgroup.procs; exec "$@"', "sh")
    return start_daemon(f"--config={config}", launcher=enter)


@pytest.mark.parametrize("client", ["one of 60 MB"], indirect=True)
def test_where_memory_runs_out_a_worker_is_killed(memory: Memory, daemon: Daemon, client: Child) -> None:
    """For a long line of a mount table the kernel takes memory that is charged to loopd. That is one request's end, and
    no more.
    """
    memory.limit(memory.used + 32 * MIB)
    pid = daemon.pid
    assert {client.hear().get("error", {}).get("code"), client.hear()["error"]["code"]} & {"internal"}
    assert "the worker process of this request ended" in daemon.log()
    assert daemon.hello().code is None
    assert daemon.pid == pid


def _option(unit: str, key: str) -> str:
    (found,) = re.findall(rf"(?m)^{key}=(.*)$", (UNITS / unit).read_text())
    return str(found)


def test_the_service_has_room_for_as_many_leases_as_it_takes(
    memory: Memory, daemon: Daemon, image: int, directory: int
) -> None:
    """And for as many workers, of which each has written into all of its memory: three quarters of MemoryMax= are more
    than that.
    """
    daemon.hello()
    keeper = os.pidfd_open(os.getpid())
    message = wire.encode_request(wire.Attach(0, 1, 3, 2))
    try:
        replies = [daemon.ask(message, [image, directory, keeper]) for _ in range(100)]
        before = memory.used
        replies += [daemon.ask(message, [image, directory, keeper]) for _ in range(400)]
        assert all(reply.code is None for reply in replies), replies[-1].fields
        lease = (memory.used - before) / 400
        rollups = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in helpers(daemon)]
        worker = max(int(re.findall(r"(?m)^Anonymous: +(\d+) kB", rollup)[0]) for rollup in rollups) << 10
        main = int(Path(f"/proc/{daemon.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    finally:
        os.close(keeper)
    leases = Slots.STORE // 2
    room = int(_option("loopd.service", "MemoryMax").removesuffix("G")) << 30
    needed = main + lease * leases + WORKERS.most * worker
    assert needed < 0.75 * room, f"{lease / 1024:.0f} KiB a lease, {worker >> 10} KiB a worker: {needed / MIB:.0f} MiB"


@pytest.fixture
def grant_directory(tmp_path: Path) -> Iterator[Path]:
    """The tmpfs as the unit mounts it, but for its owner."""
    require(os.geteuid() == 0, "needs root: a mount")
    options = _option("run-loopd-dev.mount", "Options").replace("=loopd", "=0")
    root = tmp_path / "grants"
    subprocess.run(["mount", "--mkdir", "-t", "tmpfs", "-o", options, "loopd-test", str(root)], check=True)
    try:
        yield root
    finally:
        subprocess.run(["umount", "-l", str(root)], check=True)


def test_the_grants_have_room_and_no_more(grant_directory: Path) -> None:
    """256 directories for each of 50 users, each with its access list and its numbers, and thousands of nodes; but no
    contents.
    """
    directories = Grants(str(grant_directory))
    root = os.open(grant_directory, os.O_RDONLY | os.O_DIRECTORY)
    links, numbers = Links(root), iter(range(FIRST, 2**20))
    for name in (f"{uid}-{number}" for uid in range(1000, 1050) for number in range(grants.MOST)):
        (grant_directory / name).mkdir(mode=0o700)
        directories.admit(name, int(name[:4]))
        links.write((grant_directory / name).stat().st_ino, itertools.islice(numbers, 64))
    for number in range(8192):
        os.mknod(grant_directory / f"1000-0/loop{number}", 0o600 | 0o060000, os.makedev(7, number))
    os.close(root)
    status = os.statvfs(grant_directory)
    assert status.f_ffree > 0.9 * status.f_files - 2 * 50 * grants.MOST
    assert status.f_bfree == status.f_blocks, "no link takes a page"
    assert status.f_files << 10 <= 256 * MIB, "memory of the kernel, where somebody makes as many as he can"
    with (grant_directory / "file").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(MIB)):
            pass
    assert (grant_directory / "file").stat().st_size <= MIB
