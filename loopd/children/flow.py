"""Flows: a coroutine says what happens in order, and a promise is what it waits for.

There is no event loop here: `Promise.keep` carries on the flows that wait for the promise, in the same call.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Coroutine, Generator
from typing import Any, Generic, TypeVar

T = TypeVar("T")

Flow = Coroutine[Any, Any, None]


class Promise(Generic[T]):
    """A value that comes once. A flow awaits it; other code asks for it by `then`."""

    __slots__ = ("_value", "_waiting", "kept")

    def __init__(self) -> None:
        self.kept = False
        self._waiting: list[Callable[[], None]] = []

    def keep(self, value: T) -> None:
        """Give the value, and carry on the flows that wait. A second value is ignored: the first event counts."""
        if self.kept:
            return
        self.kept = True
        self._value = value
        waiting, self._waiting = self._waiting, []
        for index, carry_on in enumerate(waiting):
            try:
                carry_on()
            except BaseException:
                # The caller reports the bug in this flow; the other flows go on.
                _carry_on_all(waiting[index + 1 :])
                raise

    def then(self, callback: Callable[[], None]) -> None:
        """Call back when the value is there, at once if it is."""
        if self.kept:
            callback()
        else:
            self._waiting.append(callback)

    def __await__(self) -> Generator[Promise[T], None, T]:
        while not self.kept:
            yield self
        return self._value


def _carry_on_all(waiting: list[Callable[[], None]]) -> None:
    for callback in waiting:
        callback()


def start(flow: Flow) -> None:
    """Run a flow up to the first promise that is not kept, and from there whenever that is kept.

    What the flow raises is raised where the promise was kept.
    """

    def carry_on() -> None:
        try:
            promise = flow.send(None)
        except StopIteration:
            return
        promise.then(carry_on)

    carry_on()


_handed_on: deque[Promise[None]] = deque()


def _hand_on(turn: Promise[None]) -> None:
    """Give a turn to the flow that waits for it. A flow that gives it back at once does not stack up on this one."""
    _handed_on.append(turn)
    if len(_handed_on) > 1:  # a call below goes on with it
        return
    bug = None
    while _handed_on:
        try:
            _handed_on[0].keep(None)
        except Exception as error:  # noqa: BLE001  # raised below, once the others have gone on
            bug = error
        _handed_on.popleft()
    if bug is not None:
        raise bug


class Turns:
    """At most `most` at once, the others in the order in which they came: ``async with turns: ...``."""

    __slots__ = ("_most", "_waiting", "taken")

    def __init__(self, most: int = 1) -> None:
        self.taken = 0
        self._most = most
        self._waiting: deque[Promise[None]] = deque()

    @property
    def waited_for(self) -> bool:
        """Whether the next to come has to wait."""
        return self.taken >= self._most

    async def take(self) -> None:
        """Wait for a turn, which `give` gives back."""
        if self.waited_for:
            turn: Promise[None] = Promise()
            self._waiting.append(turn)
            await turn  # `taken` stays: the turn is handed on
        else:
            self.taken += 1

    def give(self) -> None:
        if self._waiting:
            _hand_on(self._waiting.popleft())
        else:
            self.taken -= 1

    async def __aenter__(self) -> None:
        await self.take()

    async def __aexit__(self, *_: object) -> None:
        self.give()
