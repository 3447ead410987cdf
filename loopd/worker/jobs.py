"""What a worker may be asked to do, by the message that asks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from loopd.kernel.transport import FdSet
from loopd.worker import take, upkeep, window
from loopd.worker.messages import (
    Arrange,
    Clear,
    Displace,
    Inspect,
    Nudge,
    OpenWindow,
    Resize,
    Revoke,
    Sweep,
    Take,
    Tidy,
    Unbind,
)
from loopd.worker.process import Worker

JOBS: dict[type[Any], Callable[[Worker, Any, FdSet], bool]] = {
    Take: take.take,
    Displace: upkeep.displace,
    Unbind: upkeep.unbind,
    Clear: upkeep.clear,
    Arrange: upkeep.arrange,
    Revoke: upkeep.revoke,
    OpenWindow: window.open_window,
    Resize: upkeep.resize,
    Nudge: upkeep.nudge,
    Tidy: upkeep.tidy,
    Sweep: upkeep.sweep,
    Inspect: upkeep.inspect,
}
