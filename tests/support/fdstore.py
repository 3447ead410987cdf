"""A small stand-in for what the service manager does for loopd: socket activation, the fd store, restart.

Runs as a program of its own, so that killing the daemon ends nothing but the daemon. FDSTORE=1 messages are kept, and
passed back with LISTEN_FDS when the daemon is started again: at once when it failed (Restart=on-failure), after an end
in good order when the next datagram comes (FileDescriptorStorePreserve=yes). Between the two it kills what is left of
the daemon and waits for it (KillMode=control-group). `usage: fdstore.py SOCKET COMMAND...`; SOCKET.admin and
SOCKET.notify are made too. $FDSTORE is the size of the store, and what comes beyond it is closed.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
STOP_TIMEOUT = 5.0
"""Seconds to wait for what is left of the daemon (TimeoutStopSec=): a process in an uninterruptible wait stays."""
RESTART_DELAY = 0.2
"""Seconds before a daemon that failed without having said READY=1 is started again (RestartSec=)."""

# What sits between fork and exec of the service manager: the fds in their places, no others, LISTEN_PID.
_LAUNCHER = """
import fcntl, os, sys
fds = [int(fd) for fd in sys.argv[1].split(",")]
end = 3 + len(fds)
for target, fd in enumerate([fcntl.fcntl(fd, fcntl.F_DUPFD, end) for fd in fds], 3):
    os.dup2(fd, target)
os.closerange(end, os.sysconf("SC_OPEN_MAX"))
os.environ["LISTEN_PID"] = str(os.getpid())
os.execvp(sys.argv[2], sys.argv[2:])
"""


def listen(path: str) -> socket.socket:
    """A socket as loopd.socket makes it."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listener.bind(path)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    listener.set_inheritable(True)
    return listener


def _say(text: str) -> None:
    """On a line of its own: the daemon, which writes into the same log, may have been killed in the middle of one."""
    print(f"\n{text}", flush=True)


class Manager:
    """One service with its sockets and its fd store. Says on standard output what happens."""

    def __init__(self, path: str, command: list[str]) -> None:
        self._notify_path = path + ".notify"
        self._notify = listen(self._notify_path)
        self._notify.setblocking(False)
        self._admin = listen(path + ".admin")
        self._listener = listen(path)  # the last: whoever waits for it finds the others
        self._command = command
        self._store: list[tuple[str, int]] = []
        self._store_max = int(os.environ.get("FDSTORE", "16384"))
        self._pid = 0
        self._failed = False
        self._ready = False

    def _start(self) -> None:
        passed = [("loopd", self._listener.fileno()), ("admin", self._admin.fileno()), *reversed(self._store)]
        environment = {**os.environ, "NOTIFY_SOCKET": self._notify_path, "LISTEN_FDS": str(len(passed))}
        environment["LISTEN_FDNAMES"] = ":".join(name for name, _ in passed)
        environment["FDSTORE"] = str(self._store_max)
        arguments = [sys.executable, "-ISc", _LAUNCHER, ",".join(str(fd) for _, fd in passed), *self._command]
        self._pid, self._ready = os.posix_spawn(sys.executable, arguments, environment), False
        _say(f"started {self._pid}")

    def _receive(self) -> None:
        while True:
            try:
                payload, control, _, _ = self._notify.recvmsg(4096, socket.CMSG_SPACE(4 * 253))
            except BlockingIOError:
                return
            fds = array.array("i")
            for _, kind, data in control:
                if kind == socket.SCM_RIGHTS:
                    fds.frombytes(data)
            fields = dict(line.split("=", 1) for line in payload.decode().splitlines())
            if fields.get("FDSTORE") == "1":
                room = self._store_max - len(self._store)
                self._store += [(fields.get("FDNAME", "stored"), fd) for fd in fds[:room]]
                for fd in fds[room:]:
                    os.close(fd)
                _say(f"stored {len(self._store)}")
            else:
                self._ready |= "READY" in fields
                _say(payload.decode())

    def _reap(self) -> None:
        """Wait for what has ended: the daemon, and children of it that outlived it."""
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0] != 0:
                if ended[0] == self._pid:
                    self._receive()
                    self._kill_rest()
                    status = os.waitstatus_to_exitcode(ended[1])
                    _say(f"ended {self._pid} {status}")
                    self._pid, self._failed = 0, status != 0

    def _kill_rest(self) -> None:
        """The daemon's children are this subreaper's now."""
        deadline = time.monotonic() + STOP_TIMEOUT
        while time.monotonic() < deadline:
            for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(child), signal.SIGKILL)
            try:
                while os.waitpid(-1, os.WNOHANG)[0] != 0:
                    pass
            except ChildProcessError:
                return
            time.sleep(0.002)

    def run(self) -> None:
        """Start the daemon when a datagram waits, and again whenever it has failed, until SIGTERM."""
        wake, waker = socket.socketpair()
        wake.setblocking(False)
        waker.setblocking(False)
        signal.set_wakeup_fd(waker.fileno())
        stopping: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, _: stopping.append(number))
        signal.signal(signal.SIGCHLD, lambda *_: None)
        while not stopping:
            if self._pid == 0 and self._failed:
                time.sleep(0 if self._ready else RESTART_DELAY)
                self._start()
            poll = select.poll()
            poll.register(self._notify, select.POLLIN)
            poll.register(wake, select.POLLIN)
            if self._pid == 0:
                poll.register(self._listener, select.POLLIN)
                poll.register(self._admin, select.POLLIN)
            ready = {fd for fd, _ in poll.poll()}
            with contextlib.suppress(BlockingIOError):
                wake.recv(4096)
            self._receive()
            self._reap()
            if self._pid == 0 and ready & {self._listener.fileno(), self._admin.fileno()}:
                self._start()
        self._stop(lambda: self._pid != 0)

    def _stop(self, running: Callable[[], bool]) -> None:
        if running():
            os.kill(self._pid, signal.SIGTERM)
        deadline = time.monotonic() + 2 * STOP_TIMEOUT
        while running() and time.monotonic() < deadline:
            self._receive()
            self._reap()
            time.sleep(0.005)
        self._kill_rest()


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    Manager(sys.argv[1], sys.argv[2:]).run()
