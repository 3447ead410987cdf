"""The C library, for system calls that Python's os module has not. Owns how they fail: with OSError."""

from __future__ import annotations

import ctypes
import os

library = ctypes.CDLL(None, use_errno=True)
"""For functions that tell no failure, or whose failure does not count."""


def call(name: str, *arguments: object) -> int:
    """What the C library's function of that name returns; OSError of its errno where that is less than 0."""
    result = int(getattr(library, name)(*arguments))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")
    return result
