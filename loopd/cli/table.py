"""The tables of ``loopctl list`` and ``loopctl directory``: their columns, and how a value looks in one.

Changes when there is another column.
"""

from __future__ import annotations

from typing import Any, Callable, Mapping, Sequence

from loopd.cli.output import clean
from loopd.protocol import ranges
from loopd.protocol.wire import GrantInfo, LeaseInfo

SUFFIXES = "KMGTPE"


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


COLUMNS: dict[str, Callable[[LeaseInfo], str]] = {
    "NAME": lambda lease: lease.devname,
    "SIZE": lambda lease: _size(lease.size),
    "RO": lambda lease: str(int(lease.read_only)),
    "DIO": lambda lease: str(int(lease.direct_io)),
    "SECTOR": lambda lease: str(lease.sector_size),
    "OFFSET": lambda lease: str(lease.offset),
    "SIZELIMIT": lambda lease: str(lease.sizelimit),
    "AGE": lambda lease: _age(lease.age),
    "STATE": lambda lease: lease.state,
    "LEASE": lambda lease: lease.lease,
    "UID": lambda lease: _optional(lease.uid),
    "PID": lambda lease: _optional(lease.pid),
    "REF": lambda lease: lease.ref or "-",
    "WINDOW": lambda lease: lease.window or "-",
    "UNIT": lambda lease: lease.unit or "-",
    "OWNER": lambda lease: _optional(lease.account),
    "OPEN-IN": lambda lease: ", ".join(lease.openers or ()) or "-",
    "BACK-FILE": lambda lease: lease.backing_file,
}
"""Of ``loopctl list``. Names of any length come last."""


GRANTS: dict[str, Callable[[GrantInfo], str]] = {
    "NAME": lambda grant: grant.name,
    "UID": lambda grant: str(grant.uid),
    "DEVICES": lambda grant: str(len(grant.numbers)),
    "IN-USE": lambda grant: str(grant.in_use),
    "NUMBERS": lambda grant: ranges.text(grant.numbers) or "-",
    "PATH": lambda grant: grant.path,
}
"""Of ``loopctl directory``."""

OWN = ("NAME", "SIZE", "RO", "DIO", "SECTOR", "AGE", "STATE", "LEASE", "BACK-FILE")
"""What a user sees of his own devices."""
EVERYBODYS = ("NAME", "SIZE", "AGE", "STATE", "LEASE", "UID", "PID", "UNIT", "OPEN-IN", "BACK-FILE")
"""What the administrator sees."""
WIDEST = 24
"""Characters of a cell in `EVERYBODYS`, but for the last: a container's unit has 78."""


def _cut(text: str) -> str:
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 11]}...{text[-8:]}"


def table(
    records: Sequence[Any], columns: Sequence[str], *, cut: bool, headings: bool,
    known: Mapping[str, Callable[[Any], str]] = COLUMNS,
) -> str:  # fmt: skip
    """Leases, or what `known` has columns of, in lines below the names of the columns. With `cut`, all but the last
    cell are of limited width.
    """
    rows = [list(columns)] if headings else []
    for record in records:
        *cells, last = (clean(known[column](record)) for column in columns)
        rows.append([*(map(_cut, cells) if cut else cells), last])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)
