"""The device itself, on a distribution's kernel: nothing of what was written is lost, however the lease ends."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from host import attach, bound, loopctl, name, run, wait_for


@pytest.fixture
def content(folder: Path) -> Path:
    """8 MiB that no file holds by chance."""
    path = folder / "content"
    path.write_bytes(os.urandom(8 << 20))
    return path


@pytest.mark.parametrize("options", [(), ("--direct-io", "off")], ids=["auto", "buffered"])
def test_detach_writes_back(disk: Path, content: Path, options: tuple[str, ...]) -> None:
    """Nobody called fsync. The kernel writes dirty pages at the last close, when loopd may have unbound the file."""
    for _ in range(3):
        device = attach(disk, *options)
        run("cp", content, device)
        loopctl("detach", device)
        assert run("cmp", f"--bytes={8 << 20}", disk, content) == ""
        with disk.open("r+b") as file:
            file.write(bytes(8 << 20))


def test_end_of_the_lease_writes_back(disk: Path, content: Path) -> None:
    nodes = disk.parent / "dev"
    nodes.mkdir()
    script = f"cp {content} $(loopctl attach --lifetime $$ --directory {nodes} {disk})"
    run("sh", "-c", script)
    wait_for("the lease is over", lambda: not bound())
    assert run("cmp", f"--bytes={8 << 20}", disk, content) == ""


def test_a_mounted_file_system_is_not_pulled_away(disk: Path) -> None:
    """The device goes at the last close, and what is written until then is in the file."""
    run("mkfs.ext4", "-q", disk)
    device = attach(disk)
    mounted = disk.parent / "mounted"
    mounted.mkdir()
    run("mount", f"/dev/{name(device)}", mounted)
    try:
        run("loopctl", "detach", "--wait=0", device, check=False)
        (mounted / "late").write_text("written after the detach")
        assert bound()
    finally:
        run("umount", mounted)
    wait_for("the device is gone", lambda: not bound())
    assert "written after the detach" in run("debugfs", "-R", "cat /late", disk)


def test_a_refused_attach_leaves_nothing(disk: Path) -> None:
    """The node's name is taken in the host's own /dev; the file was bound by then."""
    told = run("sh", "-c", f"loopctl attach --deliver node --directory /dev {disk} 2>&1; echo $?")
    assert told.strip().endswith("1"), told
    wait_for("nothing is bound", lambda: not bound(), 10)
