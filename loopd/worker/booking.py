"""Bind with the lease in its slot, and in the table of bindings, before the device is bound.

Used for every device that loopd binds: an attach, and a window on a partition.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from loopd.protocol.wire import Code, Refusal
from loopd.worker import bind, records
from loopd.worker.bind import Bound, Request
from loopd.worker.devices import Binding, Number
from loopd.worker.messages import NumberPlease, UseNumber
from loopd.worker.process import Worker


class Booking:
    """A slot and a row for one lease. `holder` and `kept_by` are the record's (`records.Stored`)."""

    def __init__(self, worker: Worker, slot: int, row: int, holder: dict[str, Any], number: Number | None) -> None:
        """`number` is the first to be tried; without one the main process is asked for it."""
        self.holder = holder
        self.kept_by = ""
        self._worker = worker
        self._slot = slot
        self._row = row
        self.number = number

    def bind(self, request: Request, prepare: Callable[[Binding, int], dict[str, int | None]]) -> Bound:
        """Bind a file. `prepare` is called before each try, with the binding as it will be and the fd of the lock, and
        gives the fds of the record. Raises Refusal.
        """
        tools = self._worker.tools
        numbers = iter(() if self.number is None else (self.number,))

        def next_number() -> Number:
            return next(numbers, None) or self._ask_for_number()

        def intend(expected: Binding, lock_fd: int) -> None:
            records.clear(self._slot)
            fds = prepare(expected, lock_fd)
            try:
                records.write(self._slot, self.holder, self.kept_by, expected, self._row, fds)
            except OSError as error:  # ETOOMANYREFS, ENOBUFS: too many fds are in flight
                raise Refusal(Code.NO_DEVICE, f"the lease cannot be booked: {error}") from error
            tools.bindings.note(self._row, expected)

        try:
            return bind.bind(tools.control, tools.access, request, next_number, intend, self._note)
        except BaseException:
            self.forget()
            raise

    def forget(self) -> None:
        """Empty slot and row: nothing is bound."""
        records.clear(self._slot)
        self._worker.tools.bindings.forget(self._row)

    def _note(self, binding: Binding) -> None:
        try:
            records.note_bound(self._slot, binding)
        except OSError as error:  # ENOBUFS, ENOMEM
            raise Refusal(Code.NO_DEVICE, f"the lease cannot be booked: {error}") from error
        self._worker.tools.bindings.note(self._row, binding)

    def _ask_for_number(self) -> Number:
        # The last number is lost: without a record of it, for the main process gives it away.
        self.forget()
        self._worker.say(NumberPlease())
        answer = self._worker.hear()
        assert isinstance(answer, UseNumber)
        if answer.refusal is not None:
            raise answer.refusal
        assert answer.number is not None
        return answer.number
