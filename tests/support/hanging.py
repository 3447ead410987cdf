"""Requests whose workers hang, without a file system that does: in the last close of a TCP socket."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator

from support.daemon import Daemon
from support.untouched import pair, reply_of, send, stopped


def lingering(seconds: int) -> tuple[socket.socket, socket.socket]:
    """A TCP socket whose last close takes so long, since its peer reads nothing; and the peer."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        ours = socket.create_connection(listener.getsockname())
        peer, _ = listener.accept()
    ours.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            ours.send(bytes(65536))
    ours.setblocking(True)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, seconds))
    return ours, peer


@contextlib.contextmanager
def hanging(daemon: Daemon, count: int, before: int = 0) -> Iterator[None]:
    """Send requests that are answered, and whose helpers then hang when they close what came along.

    `before`: so many other fds are before that.
    """
    with contextlib.ExitStack() as stack:
        for _ in range(0, count, 8):
            asked = []
            with stopped(daemon):  # so that the daemon's is the last close
                for _ in range(min(8, count)):
                    slow, peer = lingering(40)
                    stack.enter_context(peer)
                    ours, theirs = pair()
                    with theirs, slow:
                        fds = [theirs.fileno()] * (before + 1) + [slow.fileno()]
                        send(daemon.path, b'{"op": "hello", "reply_fd": 0}', fds).close()
                    asked.append(ours)
            for ours in asked:
                with ours, contextlib.suppress(TimeoutError):
                    reply_of(ours, 2)
        yield


def shed(daemon: Daemon) -> int:
    """The requests that were dropped, of all records: there is one a second."""
    return sum(int(record["LOOPD_COUNT"]) for record in daemon.records("shed"))
