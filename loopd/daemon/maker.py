"""The child that makes and removes device numbers, as the main process sees it.

The main process tells it what to do, and replaces it when it ends or all of its threads hang.
"""

from __future__ import annotations

from collections.abc import Callable

from loopd.children.child import Child, Children, Role
from loopd.kernel.transport import FdSet


class Maker:
    """One such child at a time. `heard` is called with each answer, `renewed` when another child has taken over."""

    PAUSE = 0.2
    """Seconds after which it is tried again to start a child."""

    def __init__(
        self, children: Children, role: Role, heard: Callable[[str, int, int], None], renewed: Callable[[], None]
    ) -> None:
        """Start the child; OSError where there is no room for one."""
        self._children = children
        self._role = role
        self._tell = heard
        self._renewed = renewed
        self._child: Child | None = self._fork()

    def _fork(self) -> Child:
        return Child(self._children, self._role, self._heard, self._ended)

    def _heard(self, answer: tuple[str, int, int], fds: FdSet) -> None:
        self._tell(*answer)

    @property
    def present(self) -> bool:
        """Whether there is a child; while there is none, workers make the numbers, and the removals wait."""
        return self._child is not None

    def send(self, operation: str, number: int) -> None:
        """Have something done. What is lost with a child has to be asked for again, at `renewed`."""
        if self._child is not None:
            self._child.send((operation, number))

    def renew(self) -> None:
        """Kill a child that hangs. Another one takes over."""
        if self._child is not None:
            self._child.kill()
            self._ended()

    def _ended(self) -> None:
        self._child = None
        self._restart()

    def _restart(self) -> None:
        try:
            self._child = self._fork()
        except OSError:  # TasksMax=, memory, open files
            self._children.poller.later(self.PAUSE, self._restart)
            return
        self._renewed()
