"""Subordinate ids: those that a user may have in user namespaces (subuid(5), subgid(5)).

Processes in such a namespace have these ids, and a rule for the user holds for them too. Read once, with the policy.
"""

from __future__ import annotations

import functools
import pwd

SUBUID, SUBGID = "/etc/subuid", "/etc/subgid"

Ranges = tuple[tuple[int, int], ...]
"""Ids from the first through the last, each in order."""


@functools.cache
def user(name: str) -> tuple[int, int | None] | None:
    """The uid and the primary gid of a user, given by name or uid; None where there is no such user."""
    try:
        found = pwd.getpwnam(name)
    except KeyError:
        if not name.isdecimal():
            return None
        try:
            found = pwd.getpwuid(int(name))
        except (KeyError, OverflowError):
            return int(name), None
    return found.pw_uid, found.pw_gid


def _lines(path: str) -> list[tuple[str, int, int]]:
    """The users with their ids. A line that newuidmap(1) would not understand gives nobody any, and is left out."""
    found = []
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                name, *numbers = line.strip().split(":")
                if len(numbers) == 2 and all(number.isdecimal() for number in numbers) and int(numbers[1]):
                    first = int(numbers[0])
                    found.append((name, first, first + int(numbers[1]) - 1))
    except FileNotFoundError:
        pass
    return found


def _merged(ranges: list[tuple[int, int]]) -> Ranges:
    merged: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return tuple(merged)


def _has(ranges: Ranges, number: int | None) -> bool:
    return number is not None and any(low <= number <= high for low, high in ranges)


def of_uids(uids: Ranges) -> Ranges:
    """The subordinate uids of the users with these uids. OSError where the file cannot be read."""
    return _merged([(low, high) for name, low, high in _lines(SUBUID) if (who := user(name)) and _has(uids, who[0])])


def of_gids(gids: Ranges) -> Ranges:
    """The subordinate gids of the users with these primary gids. OSError where the file cannot be read."""
    return _merged([(low, high) for name, low, high in _lines(SUBGID) if (who := user(name)) and _has(gids, who[1])])
