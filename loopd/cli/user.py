"""``--user`` of ``loopctl directory``: root asks as the user whose directory it is to be.

Changes when loopd tells users apart by something else than their uid.
"""

from __future__ import annotations

import contextlib
import os
import pwd
from typing import Iterator

from loopd.cli.output import Failure


def uid_of(user: str | None) -> int:
    """The uid of a user that is given by name or number; this process's where none is."""
    return os.getuid() if user is None else _found(user)[0]


def _found(user: str) -> tuple[int, int]:
    """uid and gid. A number need not be a user's that the host knows: a container's root may have it."""
    with contextlib.suppress(KeyError):
        entry = pwd.getpwnam(user)
        return entry.pw_uid, entry.pw_gid
    if user.isascii() and user.isdecimal() and int(user) < 2**32 - 1:
        return int(user), int(user)
    raise Failure(f"--user: there is no user {user}")


@contextlib.contextmanager
def acting_as(user: str | None, socket: str) -> Iterator[None]:
    """Be another user meanwhile, with no group but that of loopd's socket, which root may reach anyhow.

    The kernel attests the real uid with a datagram and the effective one with a socketpair, and loopd wants both to be
    the same. The saved uid stays root's: the way back, and what keeps that user from tracing this process.
    """
    if user is None or _found(user)[0] == os.getuid():
        yield
        return
    if os.geteuid() != 0:
        raise Failure("--user: only root asks for another user")
    uid, gid = _found(user)
    before = os.getgid(), os.getgroups()
    with contextlib.suppress(OSError):  # the request tells why the socket cannot be reached
        os.setgroups([os.stat(socket).st_gid])
    os.setresgid(gid, gid, 0)
    os.setresuid(uid, uid, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)
        os.setresgid(before[0], before[0], before[0])
        os.setgroups(before[1])
