"""Bugs: how an exception that nobody expected reads in the journal of the host. A client is never told."""

from __future__ import annotations


def described(error: BaseException) -> str:
    """The exception with its traceback."""
    try:
        import traceback  # noqa: PLC0415  # takes 2 ms to load, and every start would wait for it
    except (ImportError, OSError):  # the limit of open files is reached
        return repr(error)
    return "".join(traceback.format_exception(error))
