"""The counter of device numbers in the state directory: each number once in a quarantine.

A node opens whatever is bound to its number later. So a number of which a client may have kept a node is not handed out
again until its quarantine is over. The counter is on disk before a number is used.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from loopd.worker.make import FIRST

LAST = 2**20 - 1
BLOCK = 64
BLOCKS = (LAST + 1 - FIRST) // BLOCK
QUARANTINE = 30 * 86400
"""Seconds for which a number that was used is not given to another."""

_HEADER = struct.Struct("<8sQ")  # magic; the block that comes next, and from bit 32 on how much of it has been used
_ENTRY = struct.Struct("<QQ")  # for each block: when it was last used, seconds since 1970, and by which instance
_MAGIC = b"loopd\x00n1"


FEW = BLOCKS // 5
"""Blocks that are left when the administrator is warned."""


class Exhausted(Exception):
    """Every block is in use or in quarantine."""

    def __str__(self) -> str:
        return "all are in use or in quarantine"


class Counter:
    """Hands out blocks of numbers, each once in a quarantine; instances share the file under its lock."""

    def __init__(self, path: str, instance: str = "", sequence: Callable[[], int] = lambda: 0) -> None:
        """Open or make the file; OSError when that cannot be done. `started_from_clock` tells that it was not there.

        `sequence` gives a number that grows, as long as the host runs, at least as fast as device numbers are used.
        """
        self._instance = zlib.crc32(instance.encode())
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        self.started_from_clock = False
        with self._locked():
            data = os.pread(self._fd, _HEADER.size, 0)
            size = _HEADER.size + BLOCKS * _ENTRY.size
            if len(data) == _HEADER.size and data.startswith(_MAGIC) and os.fstat(self._fd).st_size == size:
                return
            # Lost or new. The clock passes all numbers once in a quarantine. So the start that it gives lies beyond
            # what was used before, if at most one number was used in 2.5 s; the sequence adds what was used since the
            # boot.
            self.started_from_clock = True
            os.ftruncate(self._fd, 0)
            # Every block on disk now: a full disk later stops no attach.
            os.posix_fallocate(self._fd, 0, size)
            grown = sequence()
            start = int(time.time() / (QUARANTINE / BLOCKS)) + grown // BLOCK
            self._set_next(start % BLOCKS, grown % BLOCK)
            os.fsync(self._fd)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    def reserve(self) -> range:
        """The numbers of one block, which is on disk as used when this returns; `Exhausted` when there is none."""
        with self._locked():
            first, skip = self._next()
            entries = os.pread(self._fd, BLOCKS * _ENTRY.size, _HEADER.size)
            now = int(time.time())
            for offset in range(BLOCKS):
                block = (first + offset) % BLOCKS
                used, _ = _ENTRY.unpack_from(entries, block * _ENTRY.size)
                rest = skip if offset == 0 else 0
                if rest or _free(used, now):
                    self._mark(block, now, self._instance)
                    self._set_next((block + 1) % BLOCKS, 0)
                    os.fdatasync(self._fd)
                    return range(FIRST + block * BLOCK + rest, FIRST + (block + 1) * BLOCK)
        raise Exhausted

    def few(self) -> bool:
        """Whether less than `FEW` blocks are free. Blocks come in turn, so the free ones are those that come next."""
        ahead = (self._next()[0] + FEW) % BLOCKS
        used, _ = _ENTRY.unpack(os.pread(self._fd, _ENTRY.size, _HEADER.size + ahead * _ENTRY.size))
        return not _free(used, int(time.time()))

    def give_back(self, number: int) -> None:
        """The numbers of a block from `number` on were not used: they come next, unless another block has come since.
        """
        block, skip = divmod(number - FIRST, BLOCK)
        with self._locked():
            if skip and self._next() == ((block + 1) % BLOCKS, 0):
                self._set_next(block, skip)

    def _next(self) -> tuple[int, int]:
        """The block that comes next, and how many numbers of it have been used."""
        _, value = _HEADER.unpack(os.pread(self._fd, _HEADER.size, 0))
        return value % 2**32, value >> 32

    def _set_next(self, block: int, skip: int) -> None:
        os.pwrite(self._fd, _HEADER.pack(_MAGIC, block | skip << 32), 0)

    def _mark(self, block: int, now: int, instance: int) -> None:
        os.pwrite(self._fd, _ENTRY.pack(now, instance), _HEADER.size + block * _ENTRY.size)

    def touch(self, number: int) -> None:
        """The number's use ends now: its quarantine is counted from here."""
        block = (number - FIRST) // BLOCK
        if not 0 <= block < BLOCKS:  # the host's
            return
        with contextlib.suppress(OSError):  # the time of its reservation stays
            # The block of a grant's numbers may be another instance's, and stays it.
            used, instance = self._entry(block)
            self._mark(block, int(time.time()), instance if used else self._instance)

    def has(self, number: int) -> bool:
        """Whether the number is of a block that this instance reserved last."""
        used, instance = self._entry((number - FIRST) // BLOCK)
        return bool(used) and instance == self._instance

    def _entry(self, block: int) -> tuple[int, int]:
        """When a block was last used, and the instance that reserved it."""
        used, instance = _ENTRY.unpack(os.pread(self._fd, _ENTRY.size, _HEADER.size + block * _ENTRY.size))
        return used, instance

    def close(self) -> None:
        os.close(self._fd)


class Fresh:
    """The numbers of the reserved blocks that nobody has had."""

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self._numbers: deque[int] = deque()
        self.few = False
        """Whether few blocks are left."""

    def take(self) -> int:
        """The next number. `Exhausted` and OSError where there is none."""
        if not self._numbers:
            self._numbers.extend(self._counter.reserve())
            self.few = self._counter.few()
        return self._numbers.popleft()

    def take_some(self, count: int) -> tuple[int, ...]:
        """So many numbers, in order; or none of them, with an exception as `take`."""
        taken: list[int] = []
        try:
            while len(taken) < count:
                taken.append(self.take())
        except BaseException:
            self.put_back(taken)
            raise
        return tuple(sorted(taken))

    def put_back(self, numbers: Iterable[int]) -> None:
        """These come next: no client ever saw them."""
        self._numbers.extendleft(sorted(numbers, reverse=True))

    def keep(self, numbers: Iterable[int]) -> None:
        """The quarantine of these numbers is counted from now on."""
        for number in {(number - FIRST) // BLOCK: number for number in numbers}.values():
            self._counter.touch(number)

    def leave(self) -> None:
        """Leave the rest of the block to the next daemon. Where each request starts one, all blocks would be used up.
        """
        unused = set(self._numbers)
        if not unused:
            return
        last = max(unused)
        while last - 1 in unused:
            last -= 1
        if (max(unused) + 1 - FIRST) % BLOCK == 0:
            with contextlib.suppress(OSError):
                self._counter.give_back(last)
        self._numbers.clear()


def _free(used: int, now: int) -> bool:
    """Whether the numbers of a block that was last used at that time may be handed out."""
    return used == 0 or used + QUARANTINE < now
