"""An image is hostile: whatever is on it, udev, LVM, MD, btrfs and udisks leave it alone; `udevadm settle` is quick."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from host import attach, bound, disk_links, loopctl, name, run, wait_for


@contextmanager
def attached(disk: Path, *options: str) -> Iterator[str]:
    device = attach(disk, *options)
    try:
        yield device
    finally:
        loopctl("detach", device)


def settle() -> float:
    started = time.monotonic()
    run("udevadm", "settle", "--timeout=60")
    return time.monotonic() - started


def root(tag: str) -> str:
    return run("blkid", "-p", "-o", "value", "-s", tag, "/dev/vda").strip()


def test_host_names_cannot_be_claimed(disk: Path) -> None:
    """A file system with the label and UUID of the VM's own root changes nothing under /dev/disk."""
    run("mkfs.ext4", "-q", "-L", root("LABEL"), "-U", root("UUID"), disk)
    settle()
    before = disk_links()
    assert before[f"/dev/disk/by-uuid/{root('UUID')}"].endswith("/vda")
    with attached(disk) as device:
        settle()
        assert disk_links() == before
        run("sh", "-c", f"exec 9<>{device}")  # a close after writing is what makes udev probe a device again
        run("udevadm", "trigger", "--action=change", f"/sys/block/{name(device)}")
        settle()
        assert disk_links() == before
        properties = run("udevadm", "info", "--query=property", f"/sys/block/{name(device)}")
        assert "ID_FS_" not in properties
    settle()
    assert disk_links() == before


def test_partitions_cannot_either(disk: Path) -> None:
    run("sfdisk", "--quiet", disk, text="label: gpt\nsize=8M, name=vmroot\n,\n")
    run("mkfs.ext4", "-q", "-L", root("LABEL"), "-U", root("UUID"), "-E", "offset=1048576", disk, "8M")
    settle()
    before = disk_links()
    with attached(disk, "--partscan") as device:
        assert Path(f"/sys/block/{name(device)}/{name(device)}p1").exists(), "the kernel found no partition"
        settle()
        assert disk_links() == before
    settle()
    assert disk_links() == before


def test_without_loopd_udev_does_look(disk: Path) -> None:
    """The counter-check: the host's own losetup, below loopd's numbers, has its links; else the others show nothing."""
    run("mkfs.ext4", "-q", "-L", "seen-by-udev", disk)
    device = run("losetup", "--find", "--show", disk).strip()
    try:
        wait_for("udev made the link", lambda: Path("/dev/disk/by-label/seen-by-udev").exists())
    finally:
        run("losetup", "--detach", device)


def test_lvm_is_not_activated(disk: Path) -> None:
    device = run("losetup", "--find", "--show", disk).strip()
    try:
        run("vgcreate", "--quiet", "evil", device)
        run("lvcreate", "--quiet", "--yes", "--size=4M", "--name=disk", "evil")
        settle()
        run("vgchange", "--quiet", "--activate=n", "evil")
    finally:
        settle()
        run("losetup", "--detach", device)

    def closed() -> bool:
        run("vgchange", "--quiet", "--activate=n", "evil", check=False)  # the host's own activation may come only now
        return "evil" not in run("dmsetup", "ls")

    wait_for("losetup's device is gone", closed)
    run("systemctl", "reset-failed")  # the host's own activation may have come too late
    with attached(disk):
        settle()
        time.sleep(3)  # vgchange runs in a transient unit of its own
        assert "evil" not in run("dmsetup", "ls")


@pytest.mark.exhaustive
def test_md_is_not_assembled(disk: Path) -> None:
    device = run("losetup", "--find", "--show", disk).strip()
    create = "--create /dev/md/evil --run --level=1 --raid-devices=2 --metadata=1.2 --bitmap=none".split()
    try:
        run("mdadm", "--quiet", *create, device, "missing")
        settle()
        run("mdadm", "--quiet", "--stop", "/dev/md/evil")
    finally:
        settle()
        run("losetup", "--detach", device)
    assert "active" not in Path("/proc/mdstat").read_text()
    with attached(disk):
        settle()
        time.sleep(3)
        assert "loop" not in Path("/proc/mdstat").read_text()


@pytest.mark.exhaustive
def test_btrfs_is_not_registered(folder: Path) -> None:
    disk = folder / "btrfs.img"
    with disk.open("wb") as file:
        file.truncate(128 << 20)
    run("mkfs.btrfs", "--quiet", "--label", "evil", disk)
    with attached(disk) as device:
        settle()
        assert "ID_BTRFS_READY" not in run("udevadm", "info", "--query=property", f"/sys/block/{name(device)}")


def test_udisks_does_not_see_it(disk: Path) -> None:
    run("systemctl", "start", "udisks2.service")
    run("mkfs.ext4", "-q", "-L", "for-the-desktop", disk)
    with attached(disk) as device:
        settle()
        time.sleep(2)
        tree = run("busctl", "tree", "--list", "org.freedesktop.UDisks2")
        assert "/block_devices/vda" in tree
        assert f"/block_devices/{name(device)}" not in tree


def test_no_device_units(disk: Path) -> None:
    with attached(disk) as device:
        settle()
        units = run("systemctl", "list-units", "--all", "--plain", "--no-legend", "--type=device")
        assert "dev-vda.device" in units
        assert f"{name(device)}.device" not in units


@pytest.mark.deadline(180)
def test_settle_is_prompt_while_leases_are_held(folder: Path) -> None:
    devices = []
    for index in range(8):
        disk = folder / f"{index}.img"
        with disk.open("wb") as file:
            file.truncate(4 << 20)
        devices.append(attach(disk))
    try:
        assert len(set(bound())) == 8
        settle()
        for device in devices:
            run("sh", "-c", f"echo x >{device}")
        # 120 s is udevadm's own patience, which a lock that is held would exhaust.
        assert settle() < 5
    finally:
        loopctl("detach", *devices)
