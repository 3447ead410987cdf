"""Partition tables, partitions that root of the host adds, and a cgroup that may open none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.daemon import eventually, require

from loopd.loop import Loop

MIB = 1 << 20
TABLES = {
    "gpt": "label: gpt\nlabel-id: 11111111-1111-1111-1111-111111111111\n"
    "size=4M, type=uefi, name=boot, uuid=22222222-2222-2222-2222-222222222222\n"
    "size=8M, type=linux, uuid=33333333-3333-3333-3333-333333333333\n",
    "gpt with a gap": "label: gpt\n7: start=2048, size=8192, type=linux\n3: start=20480, size=2048, type=swap\n",
    "gpt of many": "label: gpt\n" + "size=64K\n" * 30,
    "dos": "label: dos\nlabel-id: 7\n2048,8192,c,*\n10240,16384\n",
    "dos with logical ones": "label: dos\nlabel-id: 7\n2048,8192\n,8192,E\n,4096\n,2048,L\n,1024,L\n,,L\n",
}
"""Scripts of sfdisk, by what they make in 32 MiB."""


def prepared(name: str, file: str = "disk.img") -> str:
    text = TABLES[name].replace("\n", "\\n")
    return f"truncate -s 32M {file}; printf '{text}' | sfdisk -q {file}\n"


def add_partitions(name: str, *numbers: int) -> None:
    """What a kernel with a parser of tables does, or partprobe."""
    with Loop(int(name[4:])) as device:
        for number in numbers:
            device.add_partition(number, number * MIB // 8, MIB // 8)


DEVICES = Path("/sys/fs/cgroup/devices")
"""The first version's controller: rules that can be written as text."""


@pytest.fixture(name="denied")
def denied_fixture() -> Iterator[Path]:
    """A cgroup that may not open partitions, as a container with `b 7:* rw` alone."""
    require((DEVICES / "devices.deny").exists(), "needs the devices controller of the first version")
    cgroup = DEVICES / f"loopd-test-{os.getpid()}"
    cgroup.mkdir()
    try:
        (cgroup / "devices.deny").write_text("b 259:* rwm")
        yield cgroup
    finally:
        eventually(lambda: (cgroup / "cgroup.procs").read_text() == "", "it is empty")
        cgroup.rmdir()
