"""A small stand-in for what the service manager does for loopd: socket activation, the fd store, restart.

Runs as a program of its own, so that killing the daemon ends nothing but the daemon: FDSTORE=1 messages are kept, and passed
back with LISTEN_FDS when the daemon is started again. `usage: fdstore.py SOCKET STATE [OPTION...] -- COMMAND...`
"""

from __future__ import annotations

import array
import os
import select
import signal
import socket
import subprocess
import sys


def listen(path: str) -> socket.socket:
    """The daemon's socket, as loopd.socket makes it."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listener.bind(path)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    return listener


class Manager:
    """One service with its socket and its fd store."""

    def __init__(self, path: str, command: list[str]) -> None:
        self._listener = listen(path)
        self._admin = listen(path + ".admin")
        self._command = command
        self._notify_path = path + ".notify"
        self._notify = listen(self._notify_path)
        self._notify.setblocking(False)
        self._store: list[tuple[str, int]] = []
        self._child: subprocess.Popen[bytes] | None = None

    def _start(self) -> None:
        passed = [("loopd", self._listener.fileno()), ("admin", self._admin.fileno()), *reversed(self._store)]
        environment = {**os.environ, "NOTIFY_SOCKET": self._notify_path, "LISTEN_FDS": str(len(passed))}
        environment["LISTEN_FDNAMES"] = ":".join(name for name, _ in passed)
        # What sits between fork and exec of the service manager: the fds in their places, LISTEN_PID.
        script = "import os,sys\n" + (
            "n=int(sys.argv[1]);fds=list(map(int,sys.argv[2].split(',')))\n"
            "high=[os.dup2(fd,10000+i,inheritable=True) for i,fd in enumerate(fds)]\n"
            "os.closerange(3,10000)\n"
            "for i,fd in enumerate(high): os.dup2(fd,3+i,inheritable=True)\n"
            "os.closerange(10000,10000+n)\n"
            "os.environ['LISTEN_PID']=str(os.getpid())\n"
            "os.execvp(sys.argv[3],sys.argv[3:])\n"
        )
        fds = [fd for _, fd in passed]
        arguments = [str(len(fds)), ",".join(map(str, fds)), *self._command]
        self._child = subprocess.Popen(
            [sys.executable, "-c", script, *arguments], pass_fds=fds, env=environment, stdin=subprocess.DEVNULL
        )
        print(f"started {self._child.pid}", flush=True)

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
                self._store += [(fields.get("FDNAME", "stored"), fd) for fd in fds]
            for line in payload.decode().splitlines():
                if "FD" not in line:
                    print(line, flush=True)

    def run(self) -> None:
        """Start the daemon when a datagram waits, and again whenever it has ended, until SIGTERM."""
        wake, waker = socket.socketpair()
        waker.setblocking(False)
        signal.set_wakeup_fd(waker.fileno())
        ended = []
        signal.signal(signal.SIGTERM, lambda *_: ended.append(True))
        signal.signal(signal.SIGCHLD, lambda *_: None)
        poll = select.poll()
        for waited in (self._notify, wake):
            poll.register(waited, select.POLLIN)
        waiting = select.poll()
        waiting.register(self._listener, select.POLLIN)
        waiting.register(self._admin, select.POLLIN)
        restart = False
        while not ended:
            if self._child is None and (restart or waiting.poll(0)):
                self._start()
                restart = False
            poll.poll(20 if self._child is None else 1000)
            try:
                wake.setblocking(False)
                wake.recv(100)
            except BlockingIOError:
                pass
            self._receive()
            if self._child is not None and (status := self._child.poll()) is not None:
                self._receive()
                print(f"ended {status}", flush=True)
                self._child, restart = None, status != 0
        if self._child is not None:
            self._child.terminate()
            self._child.wait()


if __name__ == "__main__":
    Manager(sys.argv[1], sys.argv[2:]).run()
