"""Numbers: which device number the next binding gets, making numbers ahead of need, and removing them after use.

A node is a capability for whatever is bound to its number later, so a number that a client may have kept a node of is
not handed out again until a quarantine is over. The counter is in the state directory and written before a number is
used. LOOP_CTL_ADD and LOOP_CTL_REMOVE take from half a millisecond to fifty: a process of its own does them, several at
once.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import marshal
import os
import socket
import struct
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator

from loopd import loop as lo
from loopd.daemon.accounts import Owner
from loopd.kernel import transport
from loopd.loop import Loop, LoopControl, UnexpectedDevice, backing_file
from loopd.worker import devices
from loopd.worker.devices import Access, Number

FIRST = 4096
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

        `sequence` is something that grows at least as fast as numbers are used as long as the host runs.
        """
        self._instance = zlib.crc32(instance.encode())
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        self.started_from_clock = False
        with self._locked():
            data = os.pread(self._fd, _HEADER.size, 0)
            size = _HEADER.size + BLOCKS * _ENTRY.size
            if len(data) == _HEADER.size and data.startswith(_MAGIC) and os.fstat(self._fd).st_size == size:
                return
            # Lost or new. The clock passes all numbers once in a quarantine, so the start that it gives lies beyond
            # what was used before if no more than one number was used in 2.5 s; the sequence adds what was, since the
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
        """The numbers of one block, on disk as used before this returns; `Exhausted` when there is none."""
        with self._locked():
            first, skip = self._next()
            entries = os.pread(self._fd, BLOCKS * _ENTRY.size, _HEADER.size)
            now = int(time.time())
            for offset in range(BLOCKS):
                block = (first + offset) % BLOCKS
                used, _ = _ENTRY.unpack_from(entries, block * _ENTRY.size)
                rest = skip if offset == 0 else 0
                if rest or _free(used, now):
                    self._mark(block, now)
                    self._set_next((block + 1) % BLOCKS, 0)
                    os.fdatasync(self._fd)
                    return range(FIRST + block * BLOCK + rest, FIRST + (block + 1) * BLOCK)
        raise Exhausted

    def few(self) -> bool:
        """Whether less than `FEW` blocks are free: they come in turn, so the free ones are those that come next."""
        ahead = (self._next()[0] + FEW) % BLOCKS
        used, _ = _ENTRY.unpack(os.pread(self._fd, _ENTRY.size, _HEADER.size + ahead * _ENTRY.size))
        return not _free(used, int(time.time()))

    def give_back(self, number: int) -> None:
        """The numbers of a block from this one on were not used: they come next, unless a block has come since."""
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

    def _mark(self, block: int, now: int) -> None:
        os.pwrite(self._fd, _ENTRY.pack(now, self._instance), _HEADER.size + block * _ENTRY.size)

    def touch(self, number: int) -> None:
        """The number's use ends now: its quarantine is counted from here."""
        with contextlib.suppress(OSError):  # the time of its reservation stays
            self._mark((number - FIRST) // BLOCK, int(time.time()))

    def has(self, number: int) -> bool:
        """Whether the number is of a block that this instance used last."""
        entry = os.pread(self._fd, _ENTRY.size, _HEADER.size + (number - FIRST) // BLOCK * _ENTRY.size)
        used, instance = _ENTRY.unpack(entry)
        return bool(used) and bool(instance == self._instance)

    def close(self) -> None:
        os.close(self._fd)


def _free(used: int, now: int) -> bool:
    """Whether the numbers of a block that was last used at that time may be handed out."""
    return used == 0 or used + QUARANTINE < now


def ours(devname: str) -> bool:
    """Whether the device is in loopd's range."""
    return int(devname[4:]) >= FIRST


def work(channel: socket.socket, control: LoopControl, access: Access) -> None:
    """The process that makes and removes numbers: answers each (operation, number) with (it, number, errno)."""
    import queue  # noqa: PLC0415  # nobody waits for this process; the main one starts the faster
    import threading  # noqa: PLC0415

    jobs: queue.Queue[tuple[str, int]] = queue.Queue()
    threads: list[threading.Thread] = []

    def serve_one() -> None:
        operation, number = jobs.get()
        error = 0
        try:
            _OPERATIONS[operation](control, access, number)
        except OSError as failure:
            error = failure.errno or errno.EIO
        with contextlib.suppress(OSError):
            transport.send(channel, marshal.dumps((operation, number, error)))
        jobs.task_done()

    def serve() -> None:
        while True:
            serve_one()

    while payload := channel.recv(64):
        jobs.put(marshal.loads(payload))  # noqa: S302  # of our own process
        if len(threads) < min(jobs.unfinished_tasks, THREADS):
            thread = threading.Thread(target=serve, daemon=True)
            try:
                thread.start()
                threads.append(thread)
            except RuntimeError:  # TasksMax=: those that are there do it, else this one
                if not threads:
                    serve_one()
    os._exit(0)  # the main process is gone: what is left to remove, the next one finds


def _add(control: LoopControl, access: Access, number: int) -> None:
    control.add(number)


def _keep_low_free(control: LoopControl, access: Access, number: int) -> None:
    """Have a free device below the range, for the host's ``losetup -f`` to find before it finds one of loopd's."""
    if control.get_unbound() >= FIRST:
        control.add()


def _probe(control: LoopControl, access: Access, number: int) -> None:
    """Whether opening a node makes its removed device again: raises OSError(EEXIST) if so."""
    control.add(number)
    _remove_patiently(control, access, number)
    with access.stale_node(number) as path:
        try:
            os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        except OSError:
            return
    _remove_patiently(control, access, number)
    raise FileExistsError(errno.EEXIST, "made again")


PARKED = "/memfd:loopd-parked"
"""What sysfs names as the file of a device that was parked."""
PARKED_SIZE = 4096
"""Bytes of that file."""


def is_parked(devname: str, file: str) -> bool:
    """Whether a device of this file was parked; or by a client that went so far, whose it is harms nobody."""
    return file.startswith(PARKED) and devices.size(devname) == PARKED_SIZE



_parked: dict[int, Loop] = {}
"""Devices that could not be removed because somebody has them open: bound to nothing, so that nobody binds them to
more.

Idle, such a device would be the host's for the asking (LOOP_CTL_GET_FREE), and whoever has it open would read on.
"""


def _remove(control: LoopControl, access: Access, number: int) -> None:
    parked = _parked.pop(number, None)
    if parked is not None:
        parked.close()
    # LOOP_CTL_REMOVE takes the device's lock before it looks, which a client may hold for as long as it likes
    # (LOOP_CHANGE_FD); and what is bound is not to be parked.
    if backing_file(number) is not None:
        raise OSError(errno.EBUSY, "it is bound")
    try:
        control.remove(number)
    except OSError as error:
        if error.errno == errno.EBUSY:
            _park(access, number)
        raise


def _remove_patiently(control: LoopControl, access: Access, number: int) -> None:
    """Remove it although udev may have it open for a moment."""
    for _ in range(PATIENCE_TRIES):
        try:
            _remove(control, access, number)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            time.sleep(PATIENCE_PAUSE)
        else:
            return
    raise OSError(errno.EBUSY, "somebody has it open")


PATIENCE_TRIES = 20
PATIENCE_PAUSE = 0.05
"""Seconds."""


def _park(access: Access, number: int) -> None:
    with contextlib.suppress(OSError, UnexpectedDevice), access.opened(number) as (loop, _):
        nothing = os.memfd_create("loopd-parked", os.MFD_CLOEXEC)
        try:
            os.ftruncate(nothing, PARKED_SIZE)
            loop.configure(nothing, autoclear=True, read_only=True)
        finally:
            os.close(nothing)
        _parked[number] = Loop.from_fd(os.dup(loop.fd))


_OPERATIONS: dict[str, Callable[[LoopControl, Access, int], object]] = {
    "add": _add,
    "remove": _remove,
    "remove last": _remove_patiently,
    "low": _keep_low_free,
    "probe": _probe,
}

THREADS = 32
"""LOOP_CTL_REMOVE waits for an RCU grace period: 32 at once take hardly longer than one."""

AHEAD = 8
"""Numbers made ahead of need."""


class Numbers:
    """The main process's side: the next number, and what becomes of a used one.

    A number is fresh, or one that the same owner had before: only what that owner may have kept leads to it.
    """

    KEPT = 4096
    """Owners whose used numbers are remembered; those of the owner that came first are forgotten, never given to
    another.
    """

    SILENCE = 5.0
    """Seconds without an answer after which all threads of the process hang."""
    STUBBORN = 8
    """Numbers that were hung in before of which the removal is tried at once: there are threads for others."""

    def __init__(self, counter: Counter, channel: socket.socket) -> None:
        self._counter = counter
        self._channel = channel
        self._fresh: deque[int] = deque()
        self._made: deque[int] = deque()
        self._making: set[int] = set()
        self._stopping = False
        self._removing: dict[int, Owner | None] = {}
        self._lingering: dict[int, Owner | None] = {}
        self._stubborn: set[int] = set()
        self._heard = 0.0
        self._used: dict[Owner, deque[int]] = {}
        self.few = False
        self.remade: bool | None = None

    @property
    def channel(self) -> socket.socket:
        """To the process that makes and removes numbers."""
        return self._channel

    @property
    def removing(self) -> bool:
        """Whether numbers are being removed that nobody has open, or must be once they are made."""
        return bool(self._removing or (self._stopping and self._making))

    @property
    def hangs(self) -> bool:
        """Whether nothing was heard of the process for long that has something to do."""
        there = self._channel.fileno() >= 0
        return there and self._at_work and time.monotonic() - self._heard > self.SILENCE

    @property
    def _at_work(self) -> bool:
        """Whether it has others to remove than those that it was hung in before."""
        return len(self._removing) > len(self._stubborn & self._removing.keys())

    @property
    def making(self) -> bool:
        """Whether numbers that were taken before are about to come."""
        return bool(self._making)

    @property
    def lingering(self) -> bool:
        """Whether numbers could not be removed because somebody has them open."""
        return bool(self._lingering)

    def fresh(self) -> Number:
        """A number that nobody had within the quarantine; `Exhausted` when there is none."""
        if self._made:
            return Number(self._made.popleft(), True)
        return Number(self._take(), False)

    def again(self, owner: Owner) -> Number | None:
        """A number that this owner had before."""
        used = self._used.get(owner)
        return Number(used.popleft(), False) if used else None

    def expects(self, owner: Owner) -> bool:
        """Whether a number of this owner is about to be removed, and then `again` has it."""
        return owner in self._removing.values() or owner in self._lingering.values()

    def forget(self, account: str) -> None:
        """An account has ended: whoever has its name next is somebody else."""
        for owner in [owner for owner in self._used if owner.account == account]:
            del self._used[owner]
        for leaving in (self._removing, self._lingering):
            leaving |= {number: None for number, owner in leaving.items() if owner and owner.account == account}

    def _take(self) -> int:
        if not self._fresh:
            self._fresh.extend(self._counter.reserve())
            self.few = self._counter.few()
        return self._fresh.popleft()

    def refill(self) -> None:
        """Have numbers made ahead of need."""
        while not self._stopping and len(self._making) + len(self._made) < AHEAD:
            try:
                number = self._take()
            except (Exhausted, OSError):  # told where a number is needed
                return
            self._making.add(number)
            self._send("add", number)

    def retire(self, number: int, owner: Owner | None) -> None:
        """Remove a number that was used, soon: idle, LOOP_CTL_GET_FREE could hand it out to the host."""
        self._counter.touch(number)
        self._remove(number, owner)

    def had(self, number: int) -> Owner | None:
        """Who had a number last, as far as it is remembered."""
        leaving = self._removing.get(number) or self._lingering.get(number)
        return leaving or next((owner for owner, used in self._used.items() if number in used), None)

    def lingers(self, number: int) -> bool:
        """Whether the number is being removed, or cannot be because somebody has it open."""
        return number in self._removing or number in self._lingering

    def used(self, number: int) -> bool:
        """Whether this instance has handed out the number."""
        return self._counter.has(number)

    def _remove(self, number: int, owner: Owner | None) -> None:
        if not self._at_work:
            self._heard = time.monotonic()
        self._removing[number] = owner
        self._send_remove(number)

    def _send_remove(self, number: int) -> None:
        self._send("remove last" if self._stopping else "remove", number)

    def _send(self, operation: str, number: int) -> None:
        # When the process has ended its channel says so, and `restart` repeats what was lost.
        with contextlib.suppress(OSError):
            transport.send(self._channel, marshal.dumps((operation, number)))

    def receive(self) -> int | None:
        """Take one answer of the process: the number that somebody has open or bound, if it is that. EOFError when the
        process has ended.
        """
        try:
            payload = self._channel.recv(64)
        except ConnectionResetError:  # it ended with jobs unread
            payload = b""
        if not payload:
            raise EOFError
        operation, number, error = marshal.loads(payload)  # noqa: S302  # of our own process
        self._heard = time.monotonic()
        self._stubborn.discard(number)
        if operation == "probe":
            self._making.discard(number)
            if error in (0, errno.EEXIST):
                self.remade = error == errno.EEXIST
                self._fresh.append(number)  # no client ever saw it
            else:
                self._remove(number, None)
        elif operation == "add":
            self._making.discard(number)
            if error == 0 and self._stopping:
                self._remove(number, None)
            elif error == 0:
                self._made.append(number)
        elif number in self._removing:
            self._removed(number, busy=error == errno.EBUSY, last=operation == "remove last")
        return number if number in self._lingering else None

    def _removed(self, number: int, *, busy: bool, last: bool) -> None:
        owner = self._removing.pop(number)
        if busy and self._stopping and not last:
            self._remove(number, owner)
        elif busy:
            self._lingering[number] = owner
        elif owner is not None:
            self._keep(number, owner)

    def _keep(self, number: int, owner: Owner) -> None:
        if owner not in self._used and len(self._used) >= self.KEPT:
            del self._used[next(iter(self._used))]
        self._used.setdefault(owner, deque()).append(number)

    def give_up(self) -> None:
        """The process has ended, or hangs and is ended: nothing is sent to it any more."""
        for number in [*self._removing][:THREADS] if self.hangs else []:
            # It had come to those, and whoever has their locks may keep them.
            self._stubborn.add(number)
            self._lingering[number] = self._removing.pop(number)
        self._channel.close()

    def restart(self, channel: socket.socket) -> None:
        """There is a new process: have it do what was left."""
        self._channel = channel
        self._heard = time.monotonic()
        for number in self._removing:
            self._send_remove(number)
        for number in self._making:  # made or not: nobody had them
            self._remove(number, None)
        self._making.clear()

    def retry(self) -> None:
        """Try again what could not be removed because somebody has it open."""
        lingering, self._lingering = self._lingering, {}
        for number, owner in lingering.items():
            if number in self._stubborn and len(self._stubborn & self._removing.keys()) >= self.STUBBORN:
                self._lingering[number] = owner
            else:
                self._remove(number, owner)

    def sweep(self, known: set[int]) -> None:
        """Remove devices of the range that a daemon which died had made; one that is bound or open lingers."""
        used = functools.cache(lambda block: self.used(FIRST + block * BLOCK))
        for name in os.listdir(f"{lo.sysfs}/block"):
            if name.startswith("loop") and ours(name):
                number = int(name[4:])
                if number not in known and used((number - FIRST) // BLOCK):
                    self._remove(number, None)

    def probe(self) -> None:
        """Find out whether a kept node brings its removed number back; `remade` says so when it is known."""
        if self._stopping:
            return  # it would take the block that was given back
        with contextlib.suppress(Exhausted, OSError):
            number = self._take()
            self._making.add(number)
            self._send("probe", number)

    def keep_low_free(self) -> None:
        """Look after the free device that is there for the host."""
        self._send("low", 0)

    def _give_back(self) -> None:
        """Let the next daemon have the rest of the block: one that starts for each request would use up all blocks."""
        unused = set(self._fresh)
        if not unused:
            return
        last = max(unused)
        while last - 1 in unused:
            last -= 1
        if (max(unused) + 1 - FIRST) % BLOCK == 0:
            with contextlib.suppress(OSError):
                self._counter.give_back(last)
        self._fresh.clear()

    def remove_unused(self, *, held: bool) -> None:
        """Remove what was made ahead of need, before the daemon ends, and try the rest once more.

        `held`: numbers are in use still. A block is one instance's, so that all of it stays this one's.
        """
        self._stopping = True
        if not (held or self._removing or self._lingering):
            self._give_back()
        self.retry()
        while self._made:
            self._remove(self._made.popleft(), None)
