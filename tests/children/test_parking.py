"""Parking children that are full: they stay, and hang in nothing."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from functools import partial
from pathlib import Path

from support.daemon import Daemon, bound_to, eventually
from support.fuse_never import Never
from support.processes import stays
from support.untouched import children, elsewhere, send, state, stopped
from test_fuse import _let_go, _locking, _sent, _writing, never, quick  # noqa: F401  # fixtures

FILES = 700
"""Files that a process of the daemon may have open here, so that a parking child is full after two datagrams."""
FULL = 4
"""Parking children that are filled, each with a file whose last close hangs."""


def _fill(daemon: Daemon) -> None:
    with open(os.devnull) as null:
        for _ in range(2):
            send(daemon.path, b'{"op": "hello"}', [null.fileno()] * 250).close()


def test_full_ones(
    quick: Callable[..., Daemon], never: Never, image: int, directory: int, devices: Path, tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    daemon = quick("--idle-timeout=1")
    opened = [_let_go(daemon, image, directory, devices) for _ in range(1 + FULL)]
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (FILES, FILES))

    def keeps(pid: int) -> bool:
        return len(os.listdir(f"/proc/{pid}/fd")) > FILES - 300

    with _locking(never, _writing(tmp_path / "image")):
        for device in opened:  # the first hangs the child that drops
            os.pwrite(device, b"late" * 1024, 4096)
            with stopped(daemon):
                elsewhere(partial(_sent, daemon, device))
                os.close(device)
            assert daemon.hello().code is None
            if device != opened[0]:
                with stopped(daemon):
                    elsewhere(partial(_fill, daemon))
                assert daemon.hello().code is None
        stays(lambda: daemon.hello().code is None, 1, "the daemon serves")
        assert [state(pid) for pid in children(daemon.pid)].count("D") <= 1
        assert sum(keeps(pid) for pid in children(daemon.pid) if state(pid) != "D") == FULL
    eventually(lambda: not bound_to(tmp_path), "the devices are gone", 20)
