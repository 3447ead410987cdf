"""A daemon whose leases outlive it: under fdstore.py, with what the fd store holds laid open, and numbers of its own.

Other daemons may run on the machine, and a new counter starts from the clock: here it starts at random, so that every
device in the blocks that this one used is of this one.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.counters import next_block, start_at
from support.daemon import ROOT, Daemon, Reply, ask, bound_to, configured, eventually, require
from support.processes import Child
from support.untouched import ask_at_address

from loopd.daemon import counter as counters
from loopd.loop import LoopControl
from loopd.protocol import wire
from loopd.worker import make

SO_PEEK_OFF = 42
SYS_PIDFD_GETFD = 438
"""Linux 5.6; the same number on every architecture."""
MOST_BLOCKS = 2048
"""Blocks that one test may use; every start takes one."""

_libc = ctypes.CDLL(None, use_errno=True)


class Record:
    """A slot's content: what the record says, the fds that go with it, which are the test's to close, and the notes of
    what has happened since.
    """

    def __init__(self, slot: socket.socket, messages: list[bytes], fds: list[int]) -> None:
        self.slot = slot
        self.fields, *self.notes = [json.loads(message) for message in messages]
        self.fds = dict(zip(self.fields["fds"], fds, strict=True))

    def write(self) -> None:
        """Put this in the place of what the slot holds; what is to be said of the fds is in `fields`."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self.slot.recv(1, socket.MSG_DONTWAIT)
        rights = array.array("i", self.fds.values()).tobytes()
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if rights else []
        self.slot.sendmsg([json.dumps(self.fields).encode()], control)
        for note in self.notes:
            self.slot.send(json.dumps(note).encode())

    def close(self) -> None:
        for fd in self.fds.values():
            os.close(fd)


def contents(slot: socket.socket) -> tuple[list[bytes], list[int]]:
    """The messages of a slot, which stay there, and the fds of the first."""
    messages, fds = [], array.array("i")
    slot.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, 0)
    try:
        with contextlib.suppress(BlockingIOError):
            while True:
                flags = socket.MSG_PEEK | socket.MSG_DONTWAIT
                payload, control, _, _ = slot.recvmsg(65536, socket.CMSG_SPACE(64), flags)
                for _, _, data in control:
                    fds.frombytes(data)
                messages.append(payload)
    finally:
        slot.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, -1)
    return messages, list(fds)


class Kept(Daemon):
    """A daemon under the stand-in for the service manager, which `_process` is."""

    def __init__(self, directory: Path, options: list[str], wrapper: list[str], environment: dict[str, str]) -> None:
        super().__init__(directory, options, wrapper, environment)
        self.block = random.randrange(counters.BLOCKS - MOST_BLOCKS)
        self.counter = self.state / "numbers"
        self._read = 0
        self._pid = 0
        self._ready = False
        self._stores = False
        self.ends: list[int] = []
        self.starts = 0

    def start(self) -> None:
        """Listen on the sockets; the daemon itself starts on the first datagram."""
        start_at(self.counter, self.block)
        self.launch()

    def launch(self) -> None:
        """The same with the counter that is there."""
        self._pid, self._ready, self._stores = 0, False, False
        program = str(Path(__file__).with_name("fdstore.py"))
        command = [*self.launcher, sys.executable, program, self.path, *self._wrapper, sys.executable, "-m", "loopd"]
        command += ["--state-directory", str(self.state), *self._options]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **self._environment}
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=environment
            )
        eventually(lambda: Path(self.path).exists(), "the socket is there")

    def _follow(self) -> None:
        """Read on in what the manager says."""
        with self.log_path.open("rb") as log:
            log.seek(self._read)
            data = log.read()
        lines = data[: data.rfind(b"\n") + 1]
        self._read += len(lines)
        for line in lines.decode(errors="replace").splitlines():
            word, _, rest = line.partition(" ")
            if word == "started":
                self._pid, self._ready = int(rest), False
                self.starts += 1
            elif word == "ended":
                self._pid, self._ready = 0, False
                self.ends.append(int(rest.split()[1]))
            elif word == "stored":
                self._stores = True
            elif line == "READY=1":
                self._ready = True

    @property
    def running(self) -> int:
        """The main process, 0 when there is none."""
        self._follow()
        return self._pid

    @property
    def pid(self) -> int:
        """The main process, which is there and has said READY=1."""
        eventually(lambda: self.ready, "the daemon is ready", 30)
        return self._pid

    @property
    def ready(self) -> bool:
        """Whether there is a main process that has said READY=1."""
        return bool(self.running and self._ready)

    @property
    def manager(self) -> int:
        """The process that has the fd store."""
        assert self._process is not None
        return self._process.pid

    def kill(self, number: int = signal.SIGKILL) -> None:
        """End the main process by a signal, and wait until the manager knows: after SIGKILL it starts the next one."""
        pid, before = self.pid, len(self.ends)
        os.kill(pid, number)
        try:
            eventually(lambda: self.running != pid and len(self.ends) > before, "the daemon has ended", 60)
        except AssertionError as error:  # a wait for the disk, most likely: it has to write a number down
            stack = Path(f"/proc/{pid}/stack")
            raise AssertionError(stack.read_text() if stack.exists() else f"{pid} ended unnoticed") from error

    @contextlib.contextmanager
    def outage(self) -> Iterator[None]:
        """The daemon is killed, and the next one starts at the end of the block."""
        eventually(self._has_stored, "the manager has the slots, and not only the message that brings them")
        os.kill(self.manager, signal.SIGSTOP)
        try:
            eventually(self._killed, "the daemon and its helpers have ended")
            self._follow()
            self._pid, self._ready = 0, False
            yield
        finally:
            os.kill(self.manager, signal.SIGCONT)

    def _killed(self) -> bool:
        family = [pid for pid in self.family() if pid != self.manager]
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not family

    def admin(self, request: wire.Request) -> Reply:
        """Ask on the administrator's socket."""
        reply = ask(self.path + ".admin", wire.encode_request(request), [])
        self._replies.append(reply)
        return reply

    def leases(self) -> dict[str, dict[str, Any]]:
        """Every lease by its device name."""
        found: dict[str, dict[str, Any]] = {}
        while True:
            with contextlib.closing(self.admin(wire.Leases(0, after=list(found)[-1] if found else ""))) as reply:
                found.update((lease["devname"], lease) for lease in reply.fields["leases"])
                if not reply.fields["more"]:
                    return found

    def stored(self) -> int:
        """How many files the manager has open: its own, and the fd store with its first slots at least."""
        eventually(self._has_stored, "the daemon has stored slots")
        return len(os.listdir(f"/proc/{self.manager}/fd"))

    def _has_stored(self) -> bool:
        self._follow()
        return self._stores

    def slots(self) -> list[socket.socket]:
        """The slots in the fd store, as duplicates of the manager's."""
        pidfd = os.pidfd_open(self.manager)
        try:
            links = {int(path.name): os.readlink(path) for path in Path(f"/proc/{self.manager}/fd").iterdir()}
            found = []
            for number in sorted(links):
                if links[number].startswith("socket:"):
                    fd = _libc.syscall(SYS_PIDFD_GETFD, pidfd, number, 0)
                    assert fd >= 0, os.strerror(ctypes.get_errno())
                    candidate = socket.socket(fileno=fd)
                    if candidate.type == socket.SOCK_DGRAM and isinstance(candidate.getsockname(), bytes):
                        found.append(candidate)
                    else:
                        candidate.close()
            return found
        finally:
            os.close(pidfd)

    def records_in_store(self) -> list[Record]:
        """What the slots hold; nothing of it is taken away."""
        found = []
        for slot in self.slots():
            messages, fds = contents(slot)
            if messages:
                found.append(Record(slot, messages, fds))
            else:
                slot.close()
        return found

    def in_store(self) -> list[str]:
        """The names of the devices that have a record in the fd store, once for each record."""
        found = []
        for record in self.records_in_store():
            found.append(record.fields["binding"]["devname"])
            record.close()
            record.slot.close()
        return sorted(found)

    def in_range(self) -> list[str]:
        """The devices that exist in the blocks which this daemon has used."""
        first, end = (make.FIRST + block * counters.BLOCK for block in (self.block, next_block(self.counter)))
        mine = range(first, end)
        return [name for name in os.listdir("/sys/block") if name.startswith("loop") and int(name[4:]) in mine]

    def end(self, *, devices: bool = True) -> None:
        """End it in good order after every lease is over; nothing of it may be left, neither `devices` nor records."""
        self.pid  # noqa: B018  # a start that is under way is waited for
        for name, lease in self.leases().items():
            if lease["state"] == "bound" and not lease.get("window"):  # a window goes with its disk
                answer = self.admin(wire.Detach(name, 0, force=True, wait=5))
                # Its client may have unbound it meanwhile.
                assert answer.fields.get("state") == "released" or answer.code == "not-found", answer.fields
        eventually(lambda: not self.leases(), "no lease is left")
        eventually(lambda: not self.in_store(), "every slot is empty")
        self.kill(signal.SIGTERM)
        assert self.ends[-1] == 0
        if devices:
            eventually(lambda: not self.in_range(), "no device of its numbers is left")

    def stop(self) -> None:
        """Take everything away, whatever a test left."""
        for reply in self._replies:
            reply.close()
        assert self._process is not None
        os.kill(self.manager, signal.SIGCONT)
        try:
            if self.running:
                for name in self.leases():
                    self.admin(wire.Detach(name, 0, force=True)).close()
        finally:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(20)
            for pid in self.family():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._process.wait(10)
            with contextlib.closing(LoopControl()) as control:
                for name in self.in_range():
                    with contextlib.suppress(OSError):
                        control.remove(int(name[4:]))
        eventually(lambda: not bound_to(self.directory.parent), "no file of the test is bound", 10)


@contextlib.contextmanager
def traced(pids: list[int], *options: str) -> Iterator[None]:
    """strace on running processes, from when it has them all until the block ends."""
    strace = shutil.which("strace")
    require(strace, "strace is missing")
    command = [str(strace), *options, *(word for pid in pids for word in ("-p", str(pid)))]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE) as tracer:
        assert tracer.stderr is not None
        try:
            for _ in pids:
                line = tracer.stderr.readline()
                # A helper that is not needed may end at any time.
                assert b"attached" in line or b"No such process" in line, line
            yield
        finally:
            tracer.terminate()
            tracer.stderr.read()


KINDS = ("reply", "socket", "pidfd", "sender")
"""What can keep a lease: the reply socket, a socket or a pidfd sent along, the sender itself."""


class Holding:
    """A lease as its client has it. `finish` ends what keeps it."""

    def __init__(self, fields: dict[str, Any], finish: Callable[[], None]) -> None:
        self.fields = fields
        self.name: str = fields["devname"]
        self.finish = finish

    def bound(self) -> bool:
        """Whether it is the same binding still; false once it was free for a moment, which changes the diskseq."""
        sysfs = Path(f"/sys/block/{self.name}")
        try:
            same = (sysfs / "diskseq").read_text() == f"{self.fields['diskseq']}\n"
        except FileNotFoundError:
            return False
        return same and (sysfs / "loop/backing_file").exists()


@contextlib.contextmanager
def hold(daemon: Daemon, kind: str, image: int, directory: int, **options: Any) -> Iterator[Holding]:
    """Attach, with what keeps the lease of this kind; it ends with the block at the latest."""
    with contextlib.ExitStack() as stack:
        if kind == "reply":
            reply = daemon.attach(image, directory, **options)
            finish = reply.close
        elif kind == "socket":
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                reply = daemon.ask(wire.Attach(0, 1, 3, 2, **options), [image, directory, theirs.fileno()])
            finish = ours.close
        elif kind == "pidfd":
            child = stack.enter_context(Child(lambda tell: signal.pause()))
            pidfd = os.pidfd_open(child.pid)
            reply = daemon.ask(wire.Attach(0, 1, 3, 2, **options), [image, directory, pidfd])
            os.close(pidfd)
            finish = child.kill
        else:
            request = wire.encode_request(wire.Attach(0, 1, **options))

            def be_sender(tell: Callable[[Any], None]) -> None:
                tell(ask_at_address(daemon.path, request, [image, directory]))
                signal.pause()

            child = stack.enter_context(Child(be_sender, [image, directory]))
            finish = child.kill
            fields = child.hear()
            assert "error" not in fields, fields
            stack.callback(finish)
            yield Holding(fields, finish)
            return
        stack.callback(finish)
        assert reply.code is None, reply.fields
        if kind != "reply":
            reply.close()
        yield Holding(reply.fields, finish)


@pytest.fixture(name="start_kept")
def start_kept_fixture(tmp_path: Path) -> Iterator[Callable[..., Kept]]:
    """Start daemons under a service manager's stand-in; each is ended and looked over afterwards."""
    require(os.geteuid() == 0, "needs root: loop devices")
    require(os.path.exists("/dev/loop-control"), "needs /dev/loop-control")
    with contextlib.ExitStack() as stack:

        def start(
            *options: str,
            name: str = "loopd",
            wrapper: list[str] | None = None,
            environment: dict[str, str] | None = None,
            policy: str = "",
        ) -> Kept:
            directory = tmp_path / name
            directory.mkdir(exist_ok=True)
            daemon = Kept(directory, [*options, *configured(directory, policy)], wrapper or [], environment or {})
            daemon.start()
            stack.callback(daemon.stop)
            return daemon

        yield start


def once_there(flag: Path, *options: str) -> list[str]:
    """A wrapper that has strace tamper with every process of a daemon that starts while `flag` is there."""
    script = """
        if [ -e "$0" ]; then exec strace -D -f -o /dev/null "$@"; fi
        while [ "$1" != -- ]; do shift; done
        shift
        exec "$@"
    """
    return ["sh", "-c", script, str(flag), *options, "--"]


@pytest.fixture(name="kept")
def kept_fixture(start_kept: Callable[..., Kept]) -> Kept:
    """One with the defaults."""
    return start_kept()
