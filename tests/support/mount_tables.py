"""Clients whose mount tables are long, in namespaces of their own."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.daemon import Daemon, ask
from support.processes import Child, become, mount, mount_tmpfs, own_user_namespace

from loopd.protocol import wire

ALICE = 20001
AWKWARD = "\\ " * 125
"""A name that takes four bytes in a mount table for each of its own."""


def long_lines() -> None:
    """6,000 mounts, each with a line of 21 KB: 126 MB."""
    for _ in range(10):
        os.mkdir(AWKWARD)
        os.chdir(AWKWARD)
    os.mkdir("m")
    for _ in range(6000):
        mount(b"a \\" * 1300, "m", b"ramfs")


def one_on_the_other() -> None:
    """10,000 mounts, each on the one before: 1.5 MB, for which the kernel climbs 50 million mounts."""
    os.mkdir("m")
    for _ in range(10000):
        mount(b"m", "m", b"ramfs")


def one_long_line(depth: int = 5000) -> None:
    """One mount so deep that its line is 5 MB long."""
    for _ in range(depth):
        os.mkdir(AWKWARD)
        os.chdir(AWKWARD)
    os.mkdir("m")
    mount(b"m", "m", b"ramfs")


TABLES: dict[str, Callable[[], None]] = {
    "long lines": long_lines,
    "one on the other": one_on_the_other,
    "one long line": one_long_line,
    "one of 60 MB": lambda: one_long_line(60000),
}


@pytest.fixture(name="client", params=TABLES)
def client_fixture(request: pytest.FixtureRequest, daemon: Daemon, image: int, tmp_path: Path) -> Iterator[Child]:
    """A user with such a table, who tells what is answered to two attaches: of a file on a file system that was mounted
    before, and with a directory on one that was mounted last.
    """
    Path(daemon.path).chmod(0o666)
    tmp_path.chmod(0o711)
    daemon.hello()

    def body(tell: Callable[[Any], None]) -> None:
        os.chdir(tmp_path)
        become(ALICE)
        own_user_namespace()
        home, image = os.open(".", os.O_PATH), os.open("image", os.O_RDONLY)
        os.close(mount_tmpfs("/mnt"))
        os.chdir("/mnt")
        TABLES[request.param]()
        os.fchdir(home)
        os.mkdir("/mnt/last")
        last = mount_tmpfs("/mnt/last")
        tell("mounted")
        asked = (wire.Attach(0, reply_fd=1, deliver=("fd",)), [image]), (wire.Attach(0, 1, 2), [image, last])
        for message, fds in asked:
            reply = ask("loopd/loopd.sock", wire.encode_request(message), fds)
            reply.close()
            tell(reply.fields)
        time.sleep(60)

    with Child(body) as child:
        assert child.hear() == "mounted"
        yield child
