"""Processes for the tests: clients with rights and namespaces of their own, a daemon whose manager the test is."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from support.daemon import ROOT, Daemon, eventually, require

NOBODY = 65534

CLONE_NEWNS = 0x20000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: object) -> None:
    if getattr(_libc, name)(*arguments) != 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


def end_with_parent() -> None:
    """Once more, for a process that has changed its uid or forked since."""
    _call("prctl", _PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def unshare(flags: int) -> None:
    """New namespaces for this process; a new mount namespace shows nothing to the old one."""
    _call("unshare", flags)
    if flags & CLONE_NEWNS:
        _call("mount", b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)


def mount(source: bytes, path: str, kind: bytes = b"tmpfs") -> None:
    """Mount a file system of that kind, as mount(2) and without starting a program."""
    _call("mount", source, path.encode(), kind, 0, None)


def mount_tmpfs(path: str) -> int:
    """Mount a tmpfs; an fd of its root."""
    mount(b"tmpfs", path)
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY)


def become(uid: int) -> None:
    """Be another user, without any capability."""
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)
    _call("prctl", _PR_SET_DUMPABLE, 1, 0, 0, 0)  # else /proc/self is root's, uid_map included


def own_user_namespace() -> None:
    """What ``unshare -Urm`` does: root of a user namespace and a mount namespace of one's own."""
    uid, gid = os.geteuid(), os.getegid()
    _call("unshare", CLONE_NEWUSER | CLONE_NEWNS)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
    Path("/proc/self/gid_map").write_text(f"0 {gid} 1")


def mapped(first: int, count: int) -> Callable[[], None]:
    """For `elsewhere`: be root of a user namespace whose uids are the host's from `first` on."""

    def act() -> None:
        asked, mapped = os.pipe(), os.pipe()
        child = os.getpid()
        # Outside, root writes the maps, as newuidmap does for a rootless container.
        if not (writer := os.fork()):
            os.close(asked[1])
            if not os.read(asked[0], 1):  # it has failed
                os._exit(1)
            for name in ("uid_map", "gid_map"):
                Path(f"/proc/{child}/{name}").write_text(f"0 {first} {count}")
            os.write(mapped[1], b"x")
            os._exit(0)
        _call("unshare", CLONE_NEWUSER)
        os.write(asked[1], b"x")
        os.read(mapped[0], 1)
        os.waitpid(writer, 0)
        os.setgroups([])
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)

    return act


LANDLOCK = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
handled = (ctypes.c_uint64 * 1)(1 << 1)  # LANDLOCK_ACCESS_FS_WRITE_FILE, and no rule that allows it anywhere
ruleset = libc.syscall(444, handled, ctypes.c_size_t(8), ctypes.c_uint(0))
assert ruleset >= 0, os.strerror(ctypes.get_errno())
assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
assert libc.syscall(446, ruleset, ctypes.c_uint(0)) == 0, os.strerror(ctypes.get_errno())
"""
"""Code after which a security module (Landlock, Linux 5.13) lets the process open no file for writing."""


class Child:
    """A forked process that runs `body(tell)`: each `tell(value)` is a `hear()` here. It has no fds but `keep`.

    It ends with the block, and with the process of the tests.
    """

    def __init__(self, body: Callable[[Callable[[Any], None]], object], keep: Iterable[int] = ()) -> None:
        read, write = os.pipe()
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            _run(body, write, sorted({write, *keep}), parent)
        os.close(write)
        self._lines = os.fdopen(read)
        self._ended = False

    def hear(self) -> Any:
        """The next value that the child tells; AssertionError with its traceback where it failed."""
        line = self._lines.readline()
        assert line, f"the child ended: status {os.waitstatus_to_exitcode(self.wait())}"
        kind, value = json.loads(line)
        assert kind == "told", f"in the child:\n{value}"
        return value

    def heard(self) -> bool:
        """Whether it has told something since, or has ended."""
        return bool(select.select([self._lines], [], [], 0)[0])

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        if not self._ended:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()

    def wait(self) -> int:
        """Wait for the end; the status of waitpid(2)."""
        status = os.waitpid(self.pid, 0)[1]
        self._ended = True
        return status

    def __enter__(self) -> Child:  # noqa: PYI034  # Child has no subclasses
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._lines.close()


def _run(body: Callable[[Callable[[Any], None]], object], write: int, keep: list[int], parent: int) -> NoReturn:
    def say(kind: str, value: Any) -> None:
        os.write(write, json.dumps([kind, value]).encode() + b"\n")

    try:
        _call("prctl", _PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)
        low = 3
        for fd in keep:
            os.closerange(low, fd)
            low = fd + 1
        os.closerange(low, os.sysconf("SC_OPEN_MAX"))
        body(lambda value: say("told", value))
        os._exit(0)
    except BaseException:  # noqa: BLE001  # the parent raises it
        say("failed", traceback.format_exc())
    finally:
        os._exit(1)


_LAUNCHER = """
import fcntl, os, sys
fds = [int(fd) for fd in sys.argv[1].split(",") if fd]
high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 100) for fd in fds]
for fd in fds:
    os.close(fd)
for target, fd in enumerate(high, 3):
    os.dup2(fd, target)
os.environ["LISTEN_PID"] = os.environ["WATCHDOG_PID"] = str(os.getpid())
os.execvp(sys.argv[2], sys.argv[2:])
"""


class Activated(Daemon):
    """A daemon whose listening socket is the test's, as it is systemd's: it can be started on the same one again.

    A wrapper is to exec what follows it in the same process.
    """

    def __init__(
        self,
        directory: Path,
        options: list[str],
        wrapper: list[str],
        environment: dict[str, str],
        listener: socket.socket | None = None,
    ) -> None:
        super().__init__(directory, options, wrapper, environment)
        self.listener = listener or socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        if listener is None:
            Path(self.path).unlink(missing_ok=True)
            self.listener.bind(self.path)
            self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)

    def start(self) -> None:
        """Start it at once, on the socket that is there."""
        self.launch([self.listener.fileno()])

    def launch(self, fds: list[int]) -> None:
        """Start it with these fds passed."""
        names = {"LISTEN_FDS": str(len(fds)), "LISTEN_FDNAMES": ":".join(["loopd"] * len(fds))} if fds else {}
        command = [sys.executable, "-c", _LAUNCHER, ",".join(map(str, fds)), *self._wrapper]
        command += [sys.executable, "-m", "loopd", "--state-directory", str(self.state), *self._options]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **names, **self._environment}
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=environment,
                pass_fds=fds,
            )

    @property
    def pid(self) -> int:
        """The daemon replaces its launcher and its wrapper."""
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        try:
            super().stop()
        finally:
            self.listener.close()


IN_NAMESPACE = ["unshare", "--mount", "--propagation", "private", "sh", "-ec"]
"""The start of a wrapper that prepares a mount namespace: followed by commands that end with `exec "$@"`, and "sh"."""


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Be the only one on the machine that holds this lock file."""
    with path.open("a") as file:
        eventually(lambda: _try_lock(file.fileno()), f"{path} is free", 300)
        yield


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _traced(pid: int, tracer: int) -> bool:
    return f"TracerPid:\t{tracer}\n" in Path(f"/proc/{pid}/status").read_text()


@contextlib.contextmanager
def injected(pids: Iterable[int], *injections: str) -> Iterator[None]:
    """strace(1) on these processes and their children to come, with these arguments of ``--inject``."""
    require(shutil.which("strace"), "needs strace")
    pids = list(pids)
    # Only calls that are traced are tampered with.
    calls = ",".join(injection.partition(":")[0] for injection in injections)
    command = ["strace", "--follow-forks", "--quiet=all", "--output=/dev/null", f"--trace={calls}"]
    command += [f"--inject={injection}" for injection in injections] + [f"--attach={pid}" for pid in pids]
    tracer = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        for pid in pids:
            eventually(functools.partial(_traced, pid, tracer.pid), "strace is attached")
        yield
    finally:
        tracer.send_signal(signal.SIGINT)  # it detaches
        tracer.wait(10)


def stays(condition: Callable[[], Any], seconds: float, what: str) -> None:
    """`condition` holds now and for `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert condition(), what
        time.sleep(0.02)
