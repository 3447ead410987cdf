"""What becomes of an attach when a signal would end loopctl: nothing stays attached whose name was not printed.

Until loopd has answered, a signal takes the attach back. From then on until the name is printed, it raises
`Interrupted`, which detaches. An exception from a handler comes between any two instructions, so handlers raise only
where the code around is ready to detach, and elsewhere note the signal. Changes when a signal is to undo more or less.
"""

from __future__ import annotations

import os
import signal
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Callable, Iterator, NoReturn

from loopd.cli.output import say

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
"""Signals that people and service managers send, and that end a process without a handler."""


class Interrupted(BaseException):
    """A signal came while the result of the attach was being printed."""


class Interrupt:
    """Handles the signals that would end loopctl in a ``with`` block. If one interrupted it, loopctl ends by that."""

    def __init__(self, withdraw: Callable[[], None]) -> None:
        self._withdraw = withdraw
        self._before: dict[signal.Signals, Any] = {}
        self._number = 0
        self._raising = False

    def __enter__(self) -> Interrupt:  # noqa: PYI034  # Self is of Python 3.11
        for number in ENDING:
            before = signal.getsignal(number)
            if before is not signal.SIG_IGN:  # as nohup has it
                self._before[number] = before
                signal.signal(number, self._noted)
        return self

    def _noted(self, number: int, _: FrameType | None) -> None:
        self._number = self._number or number
        if self._raising:
            self._raising = False  # only once: a second signal must not interrupt the detach
            raise Interrupted
        self._withdraw()

    @contextmanager
    def raised(self) -> Iterator[None]:
        """Within, a signal raises `Interrupted`; at once if it came before."""
        self._raising = True
        try:
            if self._number:
                raise Interrupted
            yield
        finally:
            self._raising = False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        if isinstance(error, (Interrupted, InterruptedError)) and self._number:
            for note in getattr(error, "__notes__", ()):  # of the detach
                say(note)
            self._end()

    def _end(self) -> NoReturn:
        if self._number != signal.SIGINT:
            signal.signal(self._number, signal.SIG_DFL)
            os.kill(os.getpid(), self._number)
        # Not sys.exit(): Python would first write the rest of the output, maybe into a full pipe that nobody reads.
        os._exit(130)
