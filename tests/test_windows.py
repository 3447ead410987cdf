"""Windows: loop devices that stand in for partitions, where a client must not have nodes of the kernel's.

The clients here are in boxes: root of the host's user namespace, in mount namespaces of their own.
"""

from __future__ import annotations

import os
import signal
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from box import MIB, Box, box_fixture, granted_fixture, stand_ins_fixture  # noqa: F401
from conftest import Daemon, bound_to, configured, eventually, exists
from processes import stays

from loopd.loop import Loop
from loopd.protocol import wire


def add(device: str, number: int, start: int, size: int) -> None:
    """Have the kernel find a partition: no kernel refuses BLKPG, and not every kernel reads tables. In bytes."""
    with Loop(int(Path(device).name[4:])) as loop:
        loop.add_partition(number, start, size)


def delete(device: str, number: int) -> None:
    with Loop(int(Path(device).name[4:])) as loop:
        loop.delete_partition(number)


def node(box: Box, device: str, number: int) -> Path:
    """Where the node of a partition is, or will be, seen from outside."""
    folder = box.dev("loopd") if box.dev("loopd").exists() else box.dev()
    return folder / f"{Path(device).name}p{number}"


def window(box: Box, device: str, number: int) -> str:
    """The device behind the node of a partition, once that is there."""
    path = node(box, device, number)
    eventually(path.exists, f"a node for partition {number}")
    status = path.stat()
    assert stat.S_ISBLK(status.st_mode)
    assert os.major(status.st_rdev) == 7, "a loop device, not the kernel's partition"
    return Path(f"/sys/dev/block/7:{os.minor(status.st_rdev)}").resolve().name


def attribute(device: str, name: str) -> int:
    return int(Path(f"/sys/block/{device}/{name}").read_text())


def test_a_partition_is_a_window(box: Box) -> None:
    device = box.attach("-P", box.folder / "image")
    add(device, 1, MIB, MIB)
    name = window(box, device, 1)
    assert attribute(name, "loop/offset") == attribute(name, "loop/sizelimit") == MIB
    assert attribute(name, "size") * 512 == MIB
    assert box("dd", "if=/dev/zero", f"of={device}p1", "bs=1M", "count=1", "conv=notrunc").code == 0
