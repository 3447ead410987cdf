"""The command line: loopctl, with `loopctl doctor` and the look at who has a device open.

Standard library of Python 3.8 and later.

Imports: client, protocol.
Never: does what the client library cannot do.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``loopctl``; the exit status."""
    from loopd.cli import loopctl  # noqa: PLC0415  # `import loopd.cli` alone loads nothing

    return loopctl.main(arguments)
