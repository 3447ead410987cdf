"""Take unwanted datagrams off a queue, with whatever files are in them.

The kernel releases the files in the thread that drops the datagram, and that can wait: for a TCP socket as long as
SO_LINGER says, for the last close of a block device until its backing file answers, which not even SIGKILL ends. So the
main process drops nothing itself, but a child of the role "drop" does, and each order in a thread of its own. A thread
that hangs in a file stays behind. It costs less than a process, and harmless files are released all the same.
"""

from __future__ import annotations

import contextlib
import signal
import socket
from typing import TYPE_CHECKING, NamedTuple

from loopd.children.child import Channel
from loopd.kernel import transport

if TYPE_CHECKING:
    import threading

PATIENCE = 0.02
"""Seconds for an order. A thread that takes longer hangs in a file, whose datagram is off the queue by then."""
INTERRUPTED = 0.005
"""Seconds more for a thread that a signal has interrupted."""
STACK = 1 << 17
"""Bytes of a thread's stack."""


class Drop(NamedTuple):
    """Drop what is at the head of the queue from this process, at most `most` datagrams. `order` is the main process's
    name for it.
    """

    order: int
    pid: int
    most: int


class Dropped(NamedTuple):
    """So many datagrams were dropped. `slow`: the thread had to be interrupted. `hangs`: it still hangs in the last
    one, and `Released` will follow.
    """

    dropped: int
    slow: bool
    hangs: bool


class Released(NamedTuple):
    """The thread that hung in this order has ended."""

    order: int


class _State:
    """What the thread of an order and the first thread tell each other, under the lock."""

    def __init__(self, lock: threading.Lock) -> None:
        self.lock = lock
        self.count: int | None = None
        self.late = False
        self.left = False


def drop(channel: Channel, listener: socket.socket) -> None:
    """Be the child that drops, until the main process closes its end."""
    import threading  # noqa: PLC0415  # as in `make`

    threading.stack_size(STACK)
    # What a signal interrupts, as the wait of SO_LINGER, is given up.
    signal.signal(signal.SIGUSR1, lambda *_: None)

    def perform(order: Drop, state: _State) -> None:
        count = transport.drop(listener, order.pid, order.most, lambda: not state.late)
        with state.lock:
            state.count = count
            if state.left:
                with contextlib.suppress(OSError):  # the main process is gone
                    channel.send(Released(order.order))

    while True:
        order, _ = channel.receive()
        state = _State(threading.Lock())
        thread = threading.Thread(target=perform, args=(order, state), daemon=True)
        try:
            thread.start()
        except RuntimeError:  # TasksMax=, memory
            perform(order, state)
        else:
            thread.join(PATIENCE)
        with state.lock:
            state.late = state.count is None
            if state.late and thread.ident is not None:  # it is there: it needs the lock to end
                signal.pthread_kill(thread.ident, signal.SIGUSR1)
        if state.late:
            thread.join(INTERRUPTED)
        with state.lock:
            state.left = state.count is None
            channel.send(Dropped(1 if state.count is None else state.count, state.late, state.left))
