"""The worker process: one job at a time. The job says what may be done, and only what was vetted goes back.

A worker decides nothing and keeps no state between jobs. A client's file that never answers hangs this process and
nothing else.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from loopd.children.child import Channel
from loopd.children.pool import Answer
from loopd.kernel import rights
from loopd.kernel.transport import FdSet
from loopd.loop import LoopControl
from loopd.worker.access import Access
from loopd.worker.bindings import Bindings
from loopd.worker.grants import Grants
from loopd.worker.messages import Job


class Tools(NamedTuple):
    """What every worker has. The main process makes it before the first fork; workers alone use it."""

    listeners: list[socket.socket]
    control: LoopControl
    access: Access
    grants: Grants
    bindings: Bindings
    watches: int

    @property
    def fds(self) -> list[int]:
        """What a worker keeps open of the main process's fds."""
        listeners = [listener.fileno() for listener in self.listeners]
        own = [self.control.fileno(), self.watches, self.bindings.fd]
        return [*listeners, *own, *self.access.fds, *self.grants.fds]


class Worker:
    """A worker's end of the channel, and its tools."""

    def __init__(self, channel: Channel, tools: Tools) -> None:
        self.tools = tools
        self._channel = channel

    def say(self, message: Any, fds: Iterable[int | None] = (), *, last: bool = False) -> None:
        """Answer the main process. With `last` it may send the next job: closing what is still open cannot hang."""
        try:
            self._channel.send(Answer(message, last), [fd for fd in fds if fd is not None])
        except (BrokenPipeError, ConnectionResetError):
            # The main process is gone. The next one takes over what is in the slots: nothing is undone here.
            os._exit(0)

    def hear(self) -> Any:
        """The main process's answer to what was said last."""
        try:
            message, fds = self._channel.receive()
        except EOFError:
            os._exit(0)
        fds.close()
        return message

    def run(self, jobs: dict[type[Any], Callable[[Worker, Any, FdSet], bool]]) -> None:
        """Do jobs until the main process is gone. A job's function says whether its answer was the last."""
        while True:
            job, fds = self._channel.receive()
            with fds:
                last = jobs[type(job)](self, job, fds)
            if not last:
                self.say(None, last=True)


def main(channel: Channel, tools: Tools, jobs: dict[type[Job], Callable[[Worker, Any, FdSet], bool]]) -> None:
    """Be a worker, from the fork to the end."""
    rights.drop_groups()
    rights.die_first()
    os.umask(0)
    Worker(channel, tools).run(jobs)
