"""Builders of disk images as they are, in containers: they call `losetup`, and it is loopd's.

A container has loopd's socket, the two stand-ins first in its PATH, the right to mount and the device cgroup's leave
for loop devices, and nothing else: no `--privileged`, nothing of the host's /dev. The root
directory is the VM's own, copied on write; so the builders are Debian's packages, unmodified.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from host import bound, leases, loopctl, policy, run, wait_for

HERE = Path(__file__).parent
BIN = "/usr/local/lib/loopd/bin"
REAL = "/usr/sbin/losetup"


def container(work: Path, *command: str, options: tuple[str, ...] = ()) -> str:
    given = ["--rm", "--log-driver=none", "--network=none", "--cap-add=SYS_ADMIN", "--volume=/run/loopd:/run/loopd:ro"]
    given += ["--device-cgroup-rule=b 7:* rw"]
    given += [f"--volume={BIN}/{name}:/usr/local/sbin/{name}:ro" for name in ("losetup", "mount")]
    given += [f"--volume={work}:/srv/work", "--workdir=/srv/work", *options]
    return run("podman", "run", *given, "--rootfs", "/:O", *command, timeout=400)


@contextmanager
def attached(disk: Path) -> Iterator[str]:
    """The image on a device of the host's own losetup, with its partitions."""
    device = run(REAL, "--find", "--show", "--partscan", "--read-only", disk).strip()
    try:
        run("udevadm", "settle")  # where it looks meanwhile, a kernel scans twice, and they are gone in between
        wait_for("its partitions", lambda: Path(f"{device}p1").exists() and Path(f"{device}p2").exists())
        yield device
    finally:
        run(REAL, "--detach", device)


@contextmanager
def mounted(device: str, folder: Path) -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    run("mount", "-o", "ro", device, folder)
    try:
        yield folder
    finally:
        run("umount", folder)


@pytest.mark.exhaustive
@pytest.mark.deadline(600)
def test_fai_diskimage(folder: Path) -> None:
    """An image that boots with a BIOS: partitions by setup-storage, GRUB by grub-install in FAI's chroot."""
    shutil.copytree(HERE / "fai", folder / "config")
    (folder / "config/basefiles").mkdir()
    (folder / "config/basefiles/LOOPD.tar.zst").symlink_to("/srv/base.tar.zst")
    (folder / "etc").mkdir()
    command = "fai-diskimage -C /srv/work/etc -u built -S 600M -c LOOPD -s /srv/work/config disk.raw"
    with policy("allow.kernel_partitions = true"):  # grub-install asks sysfs which disk a partition is of
        print(container(folder, *command.split(), options=("--device-cgroup-rule=b 259:* rw",)))
    wait_for("nothing is bound", lambda: not bound())

    disk = folder / "disk.raw"
    table = json.loads(run("sfdisk", "--json", disk))["partitiontable"]
    assert table["label"] == "dos"
    boot, root = table["partitions"]
    assert boot["bootable"]
    assert (boot["start"], boot["type"], root["type"]) == (2048, "83", "83")
    with disk.open("rb") as file:
        sectors = file.read(512 * boot["start"])
    # GRUB's first stage, with the mark of a boot sector, and its second in the gap before the first partition.
    assert b"GRUB " in sectors[:446]
    assert sectors[510:512] == b"\x55\xaa"
    assert b"loading" in sectors[512:1024]
    release = os.uname().release
    with attached(disk) as device:
        uuids = [run("blkid", "-o", "value", "-s", "UUID", f"{device}p{number}").strip() for number in (1, 2)]
        for number in (1, 2):
            run("e2fsck", "-fn", f"{device}p{number}")
        with mounted(f"{device}p2", folder / "root") as path:
            fstab = [line.split()[:2] for line in (path / "etc/fstab").read_text().splitlines() if "UUID" in line]
            assert sorted(fstab) == sorted([[f"UUID={uuids[1]}", "/"], [f"UUID={uuids[0]}", "/boot"]])
            version = Path("/srv/container/etc/debian_version").read_bytes()
            assert (path / "etc/debian_version").read_bytes() == version
        with mounted(f"{device}p1", folder / "root") as path:
            for name in (f"vmlinuz-{release}", f"initrd.img-{release}"):
                run("cmp", path / name, f"/boot/{name}")
            menu = (path / "grub/grub.cfg").read_text()
            assert f"linux\t/vmlinuz-{release} root=UUID={uuids[1]} ro" in menu
            assert (path / "grub/i386-pc/core.img").stat().st_size > 0


# The calls of builders that are no packages of Debian, in the order in which they make them.
PI_GEN = """#!/bin/bash -e
# export-image/prerun.sh and scripts/common
next_device() {
    local device number
    device=$(losetup -f)
    number=$(echo "$device" | sed -E 's/.*[^0-9]([0-9]+)$/\\1/')
    [[ -b $device ]] || mknod "$device" b 7 "$number"
}
until next_device && device=$(losetup --show --find --partscan disk.img); do exit 1; done
lsblk -r -n -o NAME,MAJ:MIN "$device" | grep -v "^${device#/dev/}" | while read -r name number; do
    [[ -b /dev/$name ]] || mknod "/dev/$name" b "${number%:*}" "${number#*:}"
done
mkdosfs -n boot -F 16 "${device}p1" >/dev/null
mkfs.ext4 -q -L root -O ^huge_file "${device}p2"
mkdir root
mount -v "${device}p2" root -t ext4
mkdir root/boot
mount -v "${device}p1" root/boot -t vfat
echo text >root/boot/file
echo text >root/file
sync
for device in $(losetup --list | grep disk.img | cut -f1 -d' '); do
    umount root/boot root
    losetup -d "$device"
done
[[ -z $(losetup --list | grep disk.img) ]]
"""
ARMBIAN = """#!/bin/bash -e
# lib/functions/image/partitioning.sh
device=$(losetup --show --partscan --find disk.img)
partprobe "$device"
[[ -b ${device}p1 && -b ${device}p2 ]]
mkfs.vfat -F 16 -n boot "${device}p1" >/dev/null
mkfs.ext4 -q -L root "${device}p2"
mkdir root
mount "${device}p2" root/
mkdir root/boot
mount "${device}p1" root/boot/
echo text >root/boot/file
echo text >root/file
umount root/boot root
losetup -d "$device"
"""
MOUNT = """#!/bin/bash -e
# Those that never call losetup
offset=$(($(partx -g -n 2 -o START disk.img) * 512)) size=$(($(partx -g -n 2 -o SECTORS disk.img) * 512))
mkfs.ext4 -q -L root -E offset=$offset disk.img $((size / 1024))
offset1=$(($(partx -g -n 1 -o START disk.img) * 512)) size1=$(($(partx -g -n 1 -o SECTORS disk.img) * 512))
mkfs.vfat -F 16 -n boot --offset $((offset1 / 512)) disk.img $((size1 / 1024)) >/dev/null
mkdir root
mount -o loop,offset=$offset,sizelimit=$size disk.img root
mkdir root/boot
mount -t vfat -o loop,offset=$offset1,sizelimit=$size1 disk.img root/boot
echo text >root/boot/file
echo text >root/file
umount root/boot root
"""


@pytest.fixture(params=["own-dev", "grant"])
def delivery(request: pytest.FixtureRequest) -> Iterator[tuple[str, ...]]:
    """What lets a container have its nodes: nothing, they are made in its /dev; or a directory grant."""
    if request.param == "own-dev":
        yield ("--cap-drop=MKNOD",)
        return
    path = loopctl("directory", "built").strip()
    yield ("--cap-drop=MKNOD", f"--volume={path}:/dev/loopd:ro")
    loopctl("directory", "--remove", "built")


@pytest.mark.sample(2)
@pytest.mark.deadline(300)
@pytest.mark.parametrize("script", [PI_GEN, ARMBIAN, MOUNT], ids=["pi-gen", "armbian", "mount"])
def test_calls_of_builders(folder: Path, delivery: tuple[str, ...], script: str) -> None:
    disk = folder / "disk.img"
    run("truncate", "-s", "64M", disk)
    run("sfdisk", "-q", disk, text="label: dos\nsize=16M, type=c\ntype=83\n")
    (folder / "build").write_text(script)
    (folder / "build").chmod(0o755)
    # Ends by itself: what a test's deadline cuts off leaves the container behind.
    container(folder, "timeout", "200", "./build", options=delivery)
    wait_for("nothing is attached", lambda: not bound() and not leases())
    with attached(disk) as device:
        assert run("blkid", "-o", "value", "-s", "LABEL", f"{device}p1", f"{device}p2").split() == ["boot", "root"]
        run("e2fsck", "-fn", f"{device}p2")
        for number in (1, 2):
            with mounted(f"{device}p{number}", folder / "mounted") as path:
                assert (path / "file").read_text() == "text\n"


OURS = f"{BIN}/losetup"
OWN = {"name", "maj:min", "maj", "min", "autoclear", "back-ino", "back-file", "ref"}
"""Columns that are each device's own."""
SETUP = (
    "--direct-io=off|-o 1M --direct-io=off|--sizelimit 1MiB --direct-io=off|-b 4096 --direct-io=off|-r --direct-io=off|"
    "--direct-io=on|--loop-ref name --direct-io=off|-P --direct-io=off|-L --direct-io=off"
)
SHOW = "|-l|-J|--raw|-n|-O NAME,RO|--output-all|-J --output-all|--raw --output-all"
WRONG = "-d nonexistent|-c nonexistent|nonexistent|-l nonexistent|-b 512 nonexistent|-f -o|--nonsense|-f -r|-O x|-o x"


class Pair:
    """The two programs, on a host whose /dev has the kernel's nodes, and files of the same size for them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images = {OURS: folder / "ours.img", REAL: folder / "theirs.img"}
        for image in self.images.values():
            run("truncate", "-s", "8M", image)
        (folder / "dev").mkdir()

    def one(self, program: str, *arguments: str | Path) -> tuple[int, str, str]:
        environment = {**os.environ, "LOOPD_DIRECTORY": str(self.folder / "dev"), "LC_ALL": "C.UTF-8"}
        done = subprocess.run(
            [program, *arguments], env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        return done.returncode, done.stdout, done.stderr.replace(f"{program}:", "losetup:")

    def both(self, *arguments: str | Path) -> tuple[int, str, str]:
        """The same command line to both, with the same outcome."""
        ours, theirs = self.one(OURS, *arguments), self.one(REAL, *arguments)
        if "-n" in arguments:  # before 2.42 columns are as wide as the headings that are not printed
            ours, theirs = ((code, " ".join(out.split()), err) for code, out, err in (ours, theirs))
        assert ours == theirs, arguments
        return ours

    def attach(self, program: str, *options: str) -> str:
        status, out, err = self.one(program, *options, "-f", "--show", self.images[program])
        assert (status, err) == (0, "")
        return out.strip()


@pytest.fixture
def pair(folder: Path) -> Pair:
    return Pair(folder)


def row(device: str) -> dict[str, Any]:
    """What the real one says of a device, by the kernel's node, but for what is each one's own."""
    (found,) = json.loads(run(REAL, "-l", "-J", "--output-all", f"/dev/{Path(device).name}"))["loopdevices"]
    return {column: value for column, value in found.items() if column not in OWN}


@pytest.mark.deadline(300)
def test_setting_up_beside_the_real_one(pair: Pair) -> None:
    """What each option makes is what the real one makes, and every form of output the same on the same device."""
    for options in SETUP.split("|"):
        ours, theirs = (pair.attach(program, *options.split()) for program in (OURS, REAL))
        assert row(ours) == row(theirs), options
        for form in SHOW.split("|"):
            assert pair.both(*form.split(), f"/dev/{Path(ours).name}")[0] == 0
        for form in ("-j", "-O OFFSET -j"):
            assert pair.both(*form.split(), pair.images[OURS])[1] != ""
        assert pair.both("-j", pair.images[OURS], "-o", "512") == (0, "", "")
        assert pair.one(OURS, "-d", ours) == pair.one(REAL, "-d", theirs) == (0, "", "")
        wait_for("both are gone", lambda: run(REAL, "-n", "-O", "NAME").strip() == "")


def test_all_else_beside_the_real_one(pair: Pair) -> None:
    device = pair.attach(OURS, "--direct-io=off")
    try:
        run("truncate", "-s", "16M", pair.images[OURS])
        for change in ("-c", "-b 4096", "--direct-io=on"):
            assert pair.one(OURS, *change.split(), device) == (0, "", "")
        assert run("blockdev", "--getsize64", device) == f"{16 << 20}\n"
        assert (row(device)["log-sec"], row(device)["dio"]) == (4096, True)
        for form in ("-a", "-l", "", "-J", "-l -n --raw"):
            assert Path(device).name in pair.both(*form.split())[1]
        assert pair.one(OURS, "--remove", device)[0] == 1
    finally:
        assert pair.one(OURS, "-D") == (0, "", "")
    wait_for("it is gone", lambda: not bound())
    assert pair.one(OURS, "--remove", device) == (0, "", "")
    for wrong in WRONG.split("|"):
        pair.both(*wrong.split())
    assert pair.one(OURS, "-V")[1].startswith("losetup from util-linux ")
    assert pair.one(OURS, "-h")[0] == pair.one(REAL, "-h")[0] == 0
