"""The table of ``loopctl list``: its columns, and how a value looks in one.

Changes when there is another column.
"""

from __future__ import annotations

from typing import Callable, NamedTuple, Sequence

from loopd.cli.output import clean
from loopd.cli.values import SUFFIXES
from loopd.protocol.wire import LeaseInfo


def _size(size: int) -> str:
    """As lsblk prints it: the largest unit with a number of at least 1, one decimal."""
    value, unit = float(size), "B"
    for suffix in SUFFIXES:
        if value < 1024:
            break
        value, unit = value / 1024, suffix
    return f"{value:.1f}".replace(".0", "") + unit


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{int(seconds // length)}{unit}"
    return f"{int(seconds)}s"


def _optional(value: object) -> str:
    return "-" if value is None else str(value)


class _Column(NamedTuple):
    name: str
    text: Callable[[LeaseInfo], str]
    admin: bool = False


COLUMNS = (
    _Column("NAME", lambda lease: lease.devname),
    _Column("SIZE", lambda lease: _size(lease.size)),
    _Column("RO", lambda lease: str(int(lease.read_only))),
    _Column("DIO", lambda lease: str(int(lease.direct_io))),
    _Column("SECTOR", lambda lease: str(lease.sector_size)),
    _Column("AGE", lambda lease: _age(lease.age)),
    _Column("STATE", lambda lease: lease.state),
    _Column("LEASE", lambda lease: lease.lease),
    _Column("OWNER", lambda lease: _optional(lease.account), admin=True),
    _Column("UNIT", lambda lease: lease.unit or "-", admin=True),
    _Column("UID", lambda lease: _optional(lease.uid), admin=True),
    _Column("PID", lambda lease: _optional(lease.pid), admin=True),
    _Column("OPEN-IN", lambda lease: ", ".join(lease.openers or ()) or "-", admin=True),
    _Column("BACK-FILE", lambda lease: lease.backing_file),
)
"""Of ``loopctl list``. The file's name, of any length, comes last."""


def table(leases: Sequence[LeaseInfo], *, admin: bool) -> str:
    """The leases in lines, below the names of the columns."""
    columns = [column for column in COLUMNS if not column.admin or admin]
    rows = [[column.name for column in columns]]
    rows += [[clean(column.text(lease)) for column in columns] for lease in leases]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)
