"""Every system call on the way of an attach fails once, with each errno it can have, in the real daemon.

The calls are those that strace records of one attach, so the list follows the code; a call of which nothing is known
here fails the test. What may come of a fault: a refusal, or success after a retry, or a hang-up where it was the reply
itself that could not be sent. Never silence, never a leak, never the end of the daemon; and the next client is served.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Self

import pytest
from support.daemon import Daemon, Reply, bound_to, eventually, require
from support.untouched import Untouched, helpers, honest, maker, pair, paused, reply_of, send

from loopd.kernel.poller import ONCE, Poller
from loopd.protocol import wire

REQUEST = b'{"fd": 0, "dir_fd": 1, "reply_fd": 2, "lock": true, "deliver": ["node", "fd"]}'

NO_ROOM = ("EMFILE", "ENFILE", "ENOMEM")
ERRNOS: dict[str, tuple[str, ...]] = {
    "access": ("ENOENT", "EACCES", "ENOMEM"),
    "clone": ("EAGAIN", "ENOMEM"),
    "dup": NO_ROOM,
    "epoll_ctl": ("ENOMEM", "ENOSPC"),
    "epoll_wait": ("EINTR",),
    "fcntl F_DUPFD_CLOEXEC": NO_ROOM,
    "fdatasync": ("EIO", "ENOSPC"),
    "flock": ("EINTR", "ENOLCK", "EAGAIN"),
    "fork": ("EAGAIN", "ENOMEM"),
    "getdents64": ("ENOENT", "ENOMEM", "EIO"),
    "getpeername": ("ENOBUFS",),
    "getsockname": ("ENOBUFS",),
    "getsockopt": ("ENOMEM",),
    "inotify_add_watch": ("ENOSPC", "ENOMEM", "ENOENT", "EACCES"),
    "ioctl BLKGETSIZE64": ("ENXIO",),
    "ioctl BLKROGET": ("ENXIO",),
    "ioctl BLKSSZGET": ("ENXIO",),
    "ioctl BLKGETDISKSEQ": ("EINVAL", "ENOTTY"),  # before Linux 5.15
    "ioctl FIONREAD": ("EINVAL", "EACCES"),
    "ioctl LOOP_CONFIGURE": ("EBUSY", "EINVAL", "EBADF", "ENOMEM", "ENXIO", "EPERM", "EIO", "EINTR", "EOVERFLOW"),
    "ioctl LOOP_CTL_ADD": ("EEXIST", "ENOMEM", "ENOSPC", "EINTR", "EPERM"),
    "ioctl LOOP_GET_STATUS64": ("ENXIO", "EINTR"),
    "ioctl LOOP_SET_DIRECT_IO": ("EINVAL", "ENXIO", "EINTR"),
    "ioctl LOOP_SET_STATUS64": ("ENXIO", "EINTR"),
    "ioctl TCGETS": ("ENOTTY",),
    "lseek": ("ESPIPE",),
    "mknodat": ("EEXIST", "EACCES", "EPERM", "EROFS", "ENOSPC", "EDQUOT", "ENOMEM", "EIO", "ENOENT", "EINTR"),
    "mkdirat": ("EEXIST", "EACCES", "ENOSPC"),
    "newfstatat": ("ENOENT", "EACCES", "ENOMEM"),
    "fstat": ("ENOENT", "EACCES", "ENOMEM"),
    "open": (*NO_ROOM, "ENOENT", "EACCES", "EPERM", "ENXIO", "EBUSY", "EINTR"),
    "openat": (*NO_ROOM, "ENOENT", "EACCES", "EPERM", "ENXIO", "EBUSY", "EINTR"),
    "pidfd_open": (*NO_ROOM, "ESRCH"),
    "poll": ("ENOMEM", "EINTR"),
    "pread64": ("EIO",),
    "prlimit64": ("EPERM",),
    "pwrite64": ("EIO", "ENOSPC"),
    "read": ("EIO", "ENOMEM", "ENODEV", "EINTR", "ESRCH"),
    "readlink": ("ENOENT", "ENOMEM", "EACCES"),
    "recvfrom": ("EAGAIN", "ENOMEM", "EINTR"),
    "recvmsg": ("EAGAIN", "ENOMEM", "ENOBUFS", "EINTR"),
    "sendmsg": ("EAGAIN", "ENOBUFS", "ENOMEM", "EPIPE", "ETOOMANYREFS", "EINTR"),
    "sendto": ("EAGAIN", "ENOBUFS", "ENOMEM", "EPIPE"),
    "setsockopt": ("ENOMEM",),
    "shutdown": ("EACCES",),  # a security module's
    "socket": (*NO_ROOM, "EACCES"),
    "socketpair": NO_ROOM,
    "stat": ("ENOENT", "EACCES", "ENOMEM"),
    "statx": ("EACCES", "ENOMEM", "ENOENT"),
    "unlinkat": ("ENOENT", "EACCES", "EROFS"),
    "write": ("EIO", "ENOSPC", "EAGAIN", "EPIPE", "EINTR"),
}
"""Errnos of each call, by name and, where it has many meanings, its command."""

CANNOT_FAIL: dict[str, str] = {
    "brk": "tells its failure otherwise",
    "capget": "asks about the process itself",
    "capset": "takes on what is permitted, which is never refused",
    "close": "frees the fd whatever it returns, and injected it would not",
    "fcntl F_GETFD": "fails for no open fd",
    "fcntl F_GETFL": "fails for no open fd",
    "fcntl F_GET_SEALS": "tells by its failure what a file is",
    "fcntl F_SETFD": "fails for no open fd",
    "fcntl F_SETFL": "fails for no open fd of these kinds",
    "futex": "is a wait that is tried again",
    "getegid": "never fails",
    "geteuid": "never fails",
    "getpid": "never fails",
    "getppid": "never fails",
    "getrandom": "never fails for so few bytes",
    "gettid": "never fails",
    "getuid": "never fails",
    "madvise": "is advice",
    "mmap": "is the interpreter's memory, whose end is no errno to it",
    "mremap": "is the interpreter's memory",
    "munmap": "is the interpreter's memory",
    "prctl": "never fails with what it is given",
    "restart_syscall": "is strace's doing",
    "rt_sigaction": "never fails",
    "rt_sigprocmask": "never fails",
    "rt_sigreturn": "never returns",
    "setfsgid": "tells no failure",
    "setfsuid": "tells no failure",
}


NEWS = ("recvfrom",)
"""Calls that only take uevents and the answers about made and removed numbers, of any device of the host's."""


class Call(NamedTuple):
    """The `nth` call of that name that a process makes from when it is traced on; `meaning` is its key in ERRNOS."""

    name: str
    nth: int
    meaning: str
    line: str


class Tracer:
    """strace on running processes, until the end of the context."""

    def __init__(self, path: Path, pids: list[int], *options: str) -> None:
        self.path = path
        path.unlink(missing_ok=True)
        processes = [option for pid in pids for option in ("-p", str(pid))]
        self._strace = subprocess.Popen(
            ["strace", "-o", str(path), *options, *processes],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._strace.stderr is not None
        said: list[str] = []
        # Without the second an idle helper that has just ended would be waited for.
        while sum("attached" in line or "No such process" in line for line in said) < len(pids):
            line = self._strace.stderr.readline()
            if not line:
                self.end()
                require("Operation not permitted" not in "".join(said), "strace may not trace the daemon here")
                raise AssertionError(f"strace {' '.join(options)} has ended: {''.join(said)}")
            said.append(line)

    def end(self) -> None:
        """Let go of the processes."""
        self._strace.send_signal(signal.SIGINT)
        assert self._strace.stderr is not None
        self._strace.stderr.close()
        self._strace.wait(20)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def lines(self) -> list[str]:
        return self.path.read_text(errors="replace").splitlines()


def _calls(lines: list[str]) -> dict[int, list[Call]]:
    """What each process called, in order. With one process strace writes no pids."""
    found: dict[int, list[Call]] = {}
    count: Counter[tuple[int, str]] = Counter()
    for line in lines:
        match = re.match(r"(?:(\d+) +)?([a-z]\w+)\((.*)", line)
        if match is None:  # resumed, signals, exits
            continue
        pid, name, arguments = int(match[1] or 0), match[2], match[3]
        count[pid, name] += 1
        meaning = name
        if name in ("ioctl", "fcntl"):
            command = re.match(r"\d+, (?:(\w+)|(_IOC\([^)]*\)))", arguments)
            assert command is not None, line
            # BLKGETDISKSEQ is not in every strace's table.
            meaning = f"{name} {command[1] or 'BLKGETDISKSEQ'}"
        found.setdefault(pid, []).append(Call(name, count[pid, name], meaning, line))
    return found


class Rig:
    """A daemon whose attach is recorded and broken; a new one takes its place when it was harmed."""

    def __init__(self, start: Callable[[], Daemon], image: int, directory: int, place: Path) -> None:
        self._start = start
        self._image = image
        self._directory = directory
        self.place = place
        self.renew()

    def renew(self) -> None:
        """Another daemon, and nothing of what an earlier one may have left."""
        self.daemon = self._start()
        self.daemon.hello()  # starts it
        for name in os.listdir(self._directory):
            os.unlink(name, dir_fd=self._directory)
        eventually(lambda: not bound_to(self.place), "what an earlier one had bound is free")
        for _ in range(3):
            honest(self.daemon)
        self._before = Untouched(self.daemon)

    def attach(self) -> Reply:
        """Ask, with everything along that takes a system call; without fields if it is hung up."""
        ours, theirs = pair()
        with theirs:
            send(self.daemon.path, REQUEST, [self._image, self._directory, theirs.fileno()]).close()
        return reply_of(ours, 5)

    def pids(self, role: str) -> list[int]:
        return [self.daemon.pid] if role == "main" else helpers(self.daemon)

    def record(self, role: str) -> list[Call]:
        """What the process of that role calls in each attach, not only now and then (timers, news of other devices)."""
        recordings = [self._record(role) for _ in range(4)]
        times = [Counter(call.name for call in calls) for calls in recordings]
        least = {name: min(counted[name] for counted in times) for name in times[0]}
        # What comes after the last answer is the kernel's news, in no order that lasts.
        return [call for call in recordings[0] if call.nth <= least[call.name] and call.name not in NEWS]

    def _record(self, role: str) -> list[Call]:
        time.sleep(0.3)  # uevents of what was before are looked at a moment later
        with Tracer(self.place / "trace", self.pids(role)) as tracer:
            reply = self.attach()
            time.sleep(0.05)  # what comes after the reply belongs to the attach as well
            assert reply.code is None, reply.fields
        with contextlib.closing(reply):
            calls = max(_calls(tracer.lines()).values(), key=len)
        eventually(lambda: not bound_to(self.place), "the device is gone")
        return calls

    def outcome(self, role: str, call: Call, error: str) -> str:
        """Break one call; what is wrong with what came of it, "" for nothing, "-" if it was not made this time."""
        inject = f"inject={call.name}:error={error}:when={call.nth}"
        with Tracer(self.place / "trace", self.pids(role), f"-etrace={call.name}", "-e", inject) as tracer:
            try:
                reply = self.attach()
            except TimeoutError:
                return "no answer and no hang-up"
            except ConnectionResetError:
                return ""
            time.sleep(0.05)  # as long as `_record` does
        injected = any("(INJECTED)" in line for line in tracer.lines())
        with contextlib.closing(reply):
            if reply.fields and reply.code not in (None, *wire.Code):
                return f"an unknown code: {reply.fields}"
            if reply.code is not None or not reply.fields:
                try:
                    eventually(lambda: not bound_to(self.place), "nothing is bound", 2)
                except AssertionError:
                    return f"refused ({reply.fields}), but a device stays bound"
        return "" if injected else "-"

    def harm(self) -> str:
        """What the fault has left behind, "" for nothing."""
        try:
            honest(self.daemon)
            self._before.check(self.place)
        except (AssertionError, OSError, KeyError) as error:
            own = [line[:160] for line in self.daemon.log().splitlines() if not line.startswith("loopd: loop")]
            return f"afterwards: {error}\n  log: {own[-6:]}"
        return ""


@pytest.fixture
def rig(start_daemon: Callable[..., Daemon], image: int, directory: int, tmp_path: Path) -> Iterator[Rig]:
    """A daemon that may be broken."""
    require(shutil.which("strace"), "needs strace")
    config = tmp_path / "loopd.toml"
    times = "idle_timeout = 600\nrequest_timeout = 2\nwrite_back_timeout = 2\n"
    config.write_text(f"{times}limits.new_numbers = 100000\nallow.lock = true\n")
    started: list[Daemon] = []

    def start() -> Daemon:
        if started:
            with contextlib.suppress(AssertionError):
                started[-1].kill()
        environment = {"NOTIFY_SOCKET": str(tmp_path / "notify")}
        # In the place of the one before: what that had bound is found by what is in the state directory, and released.
        started.append(start_daemon(f"--config={config}", environment=environment))
        return started[-1]

    with _store(tmp_path / "notify"):
        yield Rig(start, image, directory, tmp_path)


@contextlib.contextmanager
def _store(path: Path) -> Iterator[None]:
    """A service manager that takes every notification, so that leases are booked in slots of its fd store as well."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        manager.settimeout(0.1)
        end = threading.Event()

        def take() -> None:
            while not end.is_set():
                with contextlib.suppress(TimeoutError):
                    for fd in socket.recv_fds(manager, 4096, 253)[1]:
                        os.close(fd)

        thread = threading.Thread(target=take)
        thread.start()
        try:
            yield
        finally:
            end.set()
            thread.join()


def _break(rig: Rig, role: str, calls: list[Call]) -> None:
    unknown = {call.meaning for call in calls} - {*ERRNOS, *CANNOT_FAIL}
    assert not unknown, f"{sorted(unknown)}: ERRNOS says with which errnos a call can fail, CANNOT_FAIL why not"
    wrong: list[str] = []
    made: set[Call] = set()
    for call in calls:
        for error in ERRNOS.get(call.meaning, ()):
            outcome = rig.outcome(role, call, error)
            if outcome != "-":
                made.add(call)
            harm = rig.harm()
            if outcome not in ("", "-") or harm:
                fault = f"{role}: {call.name} {call.nth} fails with {error}"
                wrong.append(f"{fault}: {outcome} {harm}\n  as in: {call.line[:200]}")
            if harm:
                rig.renew()
    assert not wrong, f"{len(wrong)} faults did harm:\n" + "\n".join(wrong)
    missed = [call for call in calls if call.meaning in ERRNOS and call not in made]
    assert len(missed) <= len(calls) // 4, f"these calls never failed: {missed}"


@pytest.mark.parametrize("role", ["main", "helper"])
def test_every_call_fails_once(rig: Rig, role: str) -> None:
    _break(rig, role, rig.record(role))


def test_making_the_number_fails(rig: Rig) -> None:
    """No number is ahead of need, so the helper makes it: LOOP_CTL_ADD as any other call."""
    with paused(maker(rig.daemon)):
        for _ in range(20):  # more than are made ahead, and than the account had before
            reply = rig.attach()
            reply.close()
        calls = [call for call in rig.record("helper") if call.meaning == "ioctl LOOP_CTL_ADD"]
        assert calls
        outcomes = {error: rig.outcome("helper", calls[0], error) for error in ERRNOS["ioctl LOOP_CTL_ADD"]}
        assert set(outcomes.values()) == {""}, outcomes
    assert not rig.harm()


def test_a_call_that_fails_costs_no_other_its_event() -> None:
    """Both sockets are ready in one round, and each is told once: what serves a queue must not wait for ever."""
    poller = Poller()
    called: list[int] = []

    def fail(number: int) -> None:
        called.append(number)
        raise ArithmeticError

    with contextlib.ExitStack() as stack:
        stack.callback(poller.close)
        for number in (1, 2):
            ours, theirs = map(stack.enter_context, pair())
            theirs.send(b"x")
            poller.add(ours.fileno(), lambda number=number: fail(number), ONCE)  # type: ignore[misc]
        for _ in range(2):
            with pytest.raises(ArithmeticError):
                poller.run_once()
    assert sorted(called) == [1, 2]
