"""The counter of numbers in a state directory, as a test would have it."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

from loopd.daemon import counter as counters


def start_at(counter: Path, block: int) -> None:
    """Make a number counter whose next block is `block`."""
    counter.parent.mkdir(mode=0o700, exist_ok=True)
    counters.Counter(str(counter)).close()
    with counter.open("r+b") as file:
        file.write(counters._HEADER.pack(counters._MAGIC, block))


def next_block(counter: Path) -> int:
    """The block that the counter hands out next, of which no number has been used."""
    value: int = counters._HEADER.unpack(counter.read_bytes()[: counters._HEADER.size])[1]
    block, used = value % 2**32, value >> 32
    return block + 1 if used else block


def set_times(path: str, times: dict[int, int], others: int | None = None) -> None:
    """Say of blocks how many seconds ago they were last used."""
    now = int(time.time())
    with open(path, "r+b") as file:
        if others is not None:
            file.seek(counters._HEADER.size)
            file.write(counters._ENTRY.pack(now - others, 0) * counters.BLOCKS)
        for block, age in times.items():
            file.seek(counters._HEADER.size + block * counters._ENTRY.size)
            file.write(counters._ENTRY.pack(now - age, 0))


def apart(state: Path) -> Path:
    """A state directory with a counter that starts anywhere: a number that is lost to another daemon counts too."""
    state.mkdir(mode=0o700)
    counter = counters.Counter(str(state / "numbers"))
    try:
        os.pwrite(counter._fd, counters._HEADER.pack(counters._MAGIC, random.randrange(counters.BLOCKS)), 0)
    finally:
        counter.close()
    return state
