"""Numbers: a node, or a way to one, that a client kept never leads to another's data; and the counter that sees to it."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Daemon, ask, bound_to, eventually, exists, require
from kept import KNOWN, Kept, hold, next_block, start_at, start_kept  # noqa: F401  # a fixture
from processes import NOBODY, Child, become

from loopd import numbers, wire
from loopd.accounts import Account
from loopd.loop import LoopControl
from loopd.numbers import BLOCK, BLOCKS, FIRST, LAST, QUARANTINE, Counter, Exhausted
from loopd.policy import Policy

# The counter, on a real file ----------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "numbers")


@pytest.fixture
def open_counter() -> Iterator[Callable[[str], Counter]]:
    opened: list[Counter] = []

    def open_(path: str) -> Counter:
        opened.append(Counter(path))
        return opened[-1]

    yield open_
    for counter in opened:
        counter.close()


def set_times(path: str, times: dict[int, int], others: int | None = None) -> None:
    """Say of blocks when they were last used, in seconds before now; 0 stays never."""
    now = int(time.time())
    with open(path, "r+b") as file:
        if others is not None:
            file.seek(numbers._HEADER.size)
            file.write(numbers._ENTRY.pack(now - others) * BLOCKS)
        for block, age in times.items():
            file.seek(numbers._HEADER.size + block * numbers._ENTRY.size)
            file.write(numbers._ENTRY.pack(now - age))


def block_of(reserved: range) -> int:
    assert len(reserved) == BLOCK
    assert (reserved[0] - FIRST) % BLOCK == 0
    return (reserved[0] - FIRST) // BLOCK


def test_each_block_once(open_counter: Callable[[str], Counter], path: str) -> None:
    start_at(Path(path), BLOCKS - 3)
    blocks = [block_of(open_counter(path).reserve()) for _ in range(6)]
    assert blocks == [BLOCKS - 3, BLOCKS - 2, BLOCKS - 1, 0, 1, 2]
    assert FIRST <= open_counter(path).reserve()[0]
    assert FIRST + BLOCKS * BLOCK - 1 == LAST


def test_a_lost_counter_starts_from_the_clock(open_counter: Callable[[str], Counter], path: str) -> None:
    passed = int(time.time() / (QUARANTINE / BLOCKS)) % BLOCKS
    assert open_counter(path).started_from_clock
    assert block_of(open_counter(path).reserve()) in (passed, (passed + 1) % BLOCKS)
    assert not open_counter(path).started_from_clock
    assert Path(path).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("damage", [b"", b"x", b"loopd\0n9" + bytes(8), bytes(130576)])
def test_a_damaged_counter_is_a_lost_one(open_counter: Callable[[str], Counter], path: str, damage: bytes) -> None:
    Path(path).write_bytes(damage)
    counter = open_counter(path)
    assert counter.started_from_clock
    assert block_of(counter.reserve()) + 1 == next_block(Path(path))


def test_a_counter_that_was_cut_off_is_a_lost_one(open_counter: Callable[[str], Counter], path: str) -> None:
    start_at(Path(path), 7)
    os.truncate(path, os.path.getsize(path) - 1)
    assert open_counter(path).started_from_clock


def test_a_link_is_not_followed(path: str, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"precious")
    os.symlink("elsewhere", path)
    with pytest.raises(OSError, match=os.strerror(errno.ELOOP)):
        Counter(path)
    assert (tmp_path / "elsewhere").read_bytes() == b"precious"


def test_quarantine(open_counter: Callable[[str], Counter], path: str) -> None:
    start_at(Path(path), 100)
    counter = open_counter(path)
    set_times(path, {5: QUARANTINE + 60, 9: QUARANTINE + 60, 101: QUARANTINE - 60, 102: -86400}, others=1)
    assert [block_of(counter.reserve()) for _ in range(2)] == [5, 9]
    with pytest.raises(Exhausted):
        counter.reserve()


def test_the_end_of_use_begins_the_quarantine(open_counter: Callable[[str], Counter], path: str) -> None:
    start_at(Path(path), 3)
    counter = open_counter(path)
    number = counter.reserve()[17]
    set_times(path, {3: QUARANTINE + 60}, others=1)
    counter.touch(number)
    with pytest.raises(Exhausted):
        counter.reserve()
    for number in (0, FIRST - 1, LAST + 1):  # the host's: no block of ours
        counter.touch(number)


def _reserve(path: str, count: int) -> list[int]:
    counter = Counter(path)
    return [counter.reserve()[0] for _ in range(count)]


def test_instances_share_a_counter(path: str) -> None:
    """Four processes, each of which opens it by itself, the file not being there yet: no block twice."""
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        reserved = pool.starmap(_reserve, [(path, 60)] * 4, chunksize=1)
    flat = [first for blocks in reserved for first in blocks]
    assert len(set(flat)) == len(flat) == 240


def test_a_process_that_was_killed_leaves_no_lock(open_counter: Callable[[str], Counter], path: str) -> None:
    start_at(Path(path), 0)

    def hold_lock(tell: Callable[[Any], None]) -> None:
        with Counter(path)._locked():
            tell(None)
            signal.pause()

    with Child(hold_lock) as child:
        child.hear()
        child.kill()
        assert block_of(open_counter(path).reserve()) == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one counter and little more."""
    require(os.geteuid() == 0, "needs root: a mount")
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", place], check=True)
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def fill(place: Path) -> None:
    with contextlib.suppress(OSError), (place / "ballast").open("ab", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def test_a_full_disk_stops_no_attach(open_counter: Callable[[str], Counter], small_disk: Path) -> None:
    counter = open_counter(str(small_disk / "numbers"))
    fill(small_disk)
    blocks = {block_of(counter.reserve()) for _ in range(100)}
    assert len(blocks) == 100
    counter.touch(FIRST)


def test_a_disk_that_is_full_at_first(
    start_daemon: Callable[..., Daemon], small_disk: Path, open_counter: Callable[[str], Counter]
) -> None:
    """No number is given out that is not written down; said in words, and mended by room alone."""
    fill(small_disk)
    result = subprocess.run(
        ["systemd-socket-activate", "--now", "--datagram", "-l", str(small_disk.parent / "s"), "-E", f"PYTHONPATH={ROOT}",
         "python3", "-m", "loopd", "--state-directory", str(small_disk)],
        capture_output=True, text=True, timeout=30, check=False,
    ) if _has_now() else _start_by_hand(small_disk)  # fmt: skip
    assert result.returncode == 1
    assert str(small_disk) in result.stderr
    assert os.strerror(errno.ENOSPC) in result.stderr
    (small_disk / "ballast").unlink()
    assert open_counter(str(small_disk / "numbers")).started_from_clock
