"""The main process: the one writer of leases, accounts and numbers.

Imports: worker, children, kernel, protocol.
Never: opens a client's device, touches a client's fd that a worker has not vetted, or waits for a client or a disk.
"""

from __future__ import annotations


def main(arguments: list[str] | None = None) -> int:
    """Entry point of ``loopd``; the exit status."""
    from loopd.daemon import process  # noqa: PLC0415  # `import loopd.daemon` alone loads nothing

    return process.main(arguments)
