"""The stand-ins for kpartx and dmsetup in a container's stead.

`kpartx -l` is held against the real one, which needs no device mapper for it; what the maps are is held against windows
that the real losetup makes.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
from support.box import (  # noqa: F401
    Box,
    Result,
    beside,
    box_fixture,
    granted_fixture,
    plain_fixture,
    stand_ins_fixture,
)
from support.daemon import bound_to, require

from loopd import table

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


def without_mapper(result: Result) -> Result:
    """A result without what the real ones say of themselves, as where the kernel has no device mapper."""
    said = r"(?m)^(/dev/mapper/control: open|Failure to communicate|Check that dev|Incompatible lib|llseek error).*\n"
    return result._replace(err=re.sub(said, "", result.err))


@pytest.fixture(name="mapper")
def mapper_fixture(box: Box) -> Box:
    require(shutil.which("sfdisk", path=box.environment["PATH"]), "needs sfdisk (package fdisk)")
    return box


# Listing, beside the real one -------------------------------------------------------------------------------------

LISTED = """
$K -l disk.img; echo $?; $K -v disk.img; echo $?; $K -l -p - disk.img; $K -l -t dos disk.img; $K -l -t gpt disk.img
d=$($L -f --show disk.img); $K -l $d; $K -l disk.img; $L -j disk.img; $L -d $d; $L -j disk.img
d=$($L -f --show -b 4096 disk.img); $K -l $d; $L -d $d
truncate -s 1M none.img; $K -l none.img; echo $?; $K -l nofile; echo $?; $K -l /dev/null; echo $?
$K -lv disk.img; $K -lg disk.img
"""
DAMAGED = {
    "the first header of a GPT": "dd if=/dev/zero of=disk.img bs=512 seek=1 count=1 conv=notrunc status=none",
    "both headers of a GPT": "dd if=/dev/zero of=disk.img bs=512 seek=1 count=1 conv=notrunc status=none;"
    "dd if=/dev/zero of=disk.img bs=512 seek=65535 count=1 conv=notrunc status=none",
    "an entry of a GPT": "printf x | dd of=disk.img bs=1 seek=1056 conv=notrunc status=none",
    "the protective MBR": "dd if=/dev/zero of=disk.img bs=512 count=1 conv=notrunc status=none",
}


def listing(box: Box, script: str) -> None:
    require(shutil.which("kpartx", path=box.environment["PATH"].partition(":")[2]), "needs kpartx")
    theirs, ours = map(without_mapper, beside(box, script))
    assert "loopN" in theirs.out + theirs.err
    assert ours.out == theirs.out
    # Ours begins with its name where the real one says nothing of its own.
    assert ours.err.replace("kpartx: ", "") == theirs.err


@pytest.mark.parametrize("name", TABLES)
def test_lists_what_the_real_one_lists(granted: Box, name: str) -> None:
    listing(granted, prepared(name) + LISTED)


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_table(granted: Box, name: str) -> None:
    require(shutil.which("kpartx", path=granted.environment["PATH"].partition(":")[2]), "needs kpartx")
    theirs, ours = beside(
        granted, f"{prepared('gpt')}{DAMAGED[name]}\n$K -l disk.img; echo $?; $K -lg disk.img; echo $?"
    )
    assert ours.out == theirs.out
    assert ours.err == ""


def test_a_chain_that_leads_into_itself(tmp_path: Path) -> None:
    entry = bytes(4) + b"\x05" + bytes(3) + (8).to_bytes(4, "little") + (64).to_bytes(4, "little")
    logical = bytes(4) + b"\x83" + bytes(3) + (1).to_bytes(4, "little") + (1).to_bytes(4, "little")
    again = bytes(4) + b"\x05" + bytes(3) + (0).to_bytes(4, "little") + (64).to_bytes(4, "little")
    block = bytes(446) + logical + again.replace(bytes(4) + (64).to_bytes(4, "little"), entry[8:]) + bytes(32)
    image = tmp_path / "image"
    image.write_bytes(bytes(446) + entry + bytes(48) + b"\x55\xaa" + bytes(7 * 512) + block + b"\x55\xaa")
    image.write_bytes(image.read_bytes() + bytes(7 * 512) + block + b"\x55\xaa" + bytes(4096))
    fd = os.open(image, os.O_RDONLY)
    try:
        kind, partitions = table.read_table(fd, 512)
    finally:
        os.close(fd)
    assert kind == "dos"
    assert [row[0] for row in partitions] == [1, 5, 6]


# Maps -------------------------------------------------------------------------------------------------------------

WINDOWS = """
map() { # BOOT ROOT: make file systems, and something in them
    export E2FSPROGS_FAKE_TIME=1; printf hello >text
    mkfs.ext4 -q -U 44444444-4444-4444-4444-444444444444 -E hash_seed=$U,lazy_itable_init=0 -L boot $1
    mkfs.ext4 -q -U 55555555-5555-5555-5555-555555555555 -E hash_seed=$U,lazy_itable_init=0 -L root $2
    debugfs -w -R 'write text text' $1 2>/dev/null; debugfs -R 'cat text' $2 2>/dev/null; sync
}
U=66666666-6666-6666-6666-666666666666
if type $K >/dev/null 2>&1 && [ "$K" = kpartx ]; then
    set -- $($K -asv disk.img | sed 's/^add map \\([^ ]*\\) .*/\\1/'); map /dev/mapper/$1 /dev/mapper/$2
    $K -dsv disk.img >/dev/null 2>&1; echo $?
else
    boot=$($L -f --show -o $((START1 * 512)) --sizelimit $((SIZE1 * 512)) disk.img)
    root=$($L -f --show -o $((START2 * 512)) --sizelimit $((SIZE2 * 512)) disk.img)
    map $boot $root; $L -d $boot; $L -d $root; echo $?
fi
sha256sum disk.img; ls /dev/mapper | grep -c "p[12]$"
"""


@pytest.mark.parametrize(("name", "places"), [("gpt", (2048, 8192, 10240, 16384)), ("dos", (2048, 8192, 10240, 16384))])
def test_makes_the_image_that_losetup_makes(mapper: Box, name: str, places: tuple[int, ...]) -> None:
    starts = "START1={}; SIZE1={}; START2={}; SIZE2={}\n".format(*places)
    theirs, ours = beside(mapper, prepared(name) + starts + WINDOWS)
    assert ours == theirs
    assert "\n0\n" in theirs.out
    assert not bound_to(mapper.folder)


def kpartx(box: Box, *arguments: str) -> Result:
    result = box("kpartx", *arguments)
    return result._replace(out=re.sub(r"loop\d+", "loopN", re.sub(r"7:\d+", "7:N", result.out)))


def test_says_the_words_that_scripts_read(mapper: Box) -> None:
    box = mapper
    assert box("bash", "-c", prepared("dos with logical ones")).code == 0
    added = kpartx(box, "-asv", "disk.img")
    assert (added.code, added.err) == (0, "")
    lines = [
        "add map loopNp1 (7:N): 0 8192 linear 7:N 2048", "add map loopNp2 (7:N): 0 2 linear 7:N 10240",
        "add map loopNp3 (7:N): 0 4096 linear 7:N 18432", "add map loopNp4 (7:N): 0 2048 linear 7:N 22528",
    ]  # fmt: skip
    assert added.out.splitlines()[:4] == lines
    assert [line.split()[2] for line in added.out.splitlines()[4:]] == ["loopNp5", "loopNp6"]
    # Once more: nothing changes.
    before = sorted(bound_to(box.folder))
    assert kpartx(box, "-av", "disk.img") == added
    assert sorted(bound_to(box.folder)) == before
    (disk,) = box.losetup("-n", "-O", "NAME", "-j", "disk.img").out.split()
    deleted = kpartx(box, "-dv", "disk.img")
    assert deleted.out.splitlines() == [f"del devmap : loopNp{number}" for number in (6, 5, 4, 3, 2, 1)]
    assert (deleted.code, deleted.err) == (0, f"loop deleted : {disk}\n")
    assert not bound_to(box.folder)
    assert box("ls", "/dev/mapper").out == ""
    assert kpartx(box, "-d", "disk.img") == Result(0, "", "")
    assert kpartx(box).code == kpartx(box, "-x", "disk.img").code == 1


def test_losetup_shows_the_disk_alone(mapper: Box) -> None:
    box = mapper
    assert box("bash", "-c", prepared("gpt")).code == 0
    device = box.attach("disk.img")
    assert box("kpartx", "-a", device) == Result(0, "", "")
    assert len(bound_to(box.folder)) == 3
    assert box.losetup("-n", "-O", "NAME").out.split() == [device]
    assert box.losetup("-n", "-O", "NAME", "-j", "disk.img").out.split() == [device]
    assert box("sh", "-c", f"ls {device}*").out.split() == [device]
    assert box("kpartx", "-d", device).code == 0
    assert box.losetup("-n", "-O", "NAME").out.split() == [device]
    assert box.losetup("-d", device).code == 0


def test_update_follows_the_table(mapper: Box) -> None:
    box = mapper
    assert box("bash", "-c", prepared("dos")).code == 0
    device = box.attach("disk.img")
    name = os.path.basename(device)
    assert box("kpartx", "-a", device).code == 0
    before = os.stat(box.dev(f"mapper/{name}p1"), follow_symlinks=False).st_ino
    assert box("sh", "-c", f"printf 'label: dos\\n2048,8192\\n,,\\n' | sfdisk -q --no-reread {device}").code == 0
    assert (
        box(
            "sh",
            "-c",
            f"sfdisk -q --no-reread --delete {device} 2; printf '20480,4096\\n' | sfdisk -q --no-reread -a {device}",
        ).code
        == 0
    )
    updated = kpartx(box, "-uv", device)
    assert updated.out.splitlines()[1] == "add map loopNp2 (7:N): 0 4096 linear 7:N 20480"
    assert os.stat(box.dev(f"mapper/{name}p1"), follow_symlinks=False).st_ino == before
    assert box("blockdev", "--getsize64", f"/dev/mapper/{name}p2").out == f"{4096 * 512}\n"
    assert box("sfdisk", "-q", "--no-reread", "--delete", device, "2").code == 0
    assert kpartx(box, "-uv", device).out.splitlines()[-1] == "del devmap : loopNp2"
    assert box("ls", "/dev/mapper").out.split() == [f"{name}p1"]


def test_a_map_in_use_stays(mapper: Box) -> None:
    require(shutil.which("mkfs.ext4", path=mapper.environment["PATH"]), "needs mkfs.ext4")
    box = mapper
    script = f"""{prepared("gpt")}
set -- $(kpartx -av disk.img | cut -d' ' -f3); mkfs.ext4 -q /dev/mapper/$2; mkdir m; mount /dev/mapper/$2 m
kpartx -d disk.img; echo $?; ls /dev/mapper | wc -l; dmsetup remove $2; echo $?; umount m; kpartx -d disk.img; echo $?
"""
    result = box("bash", "-c", script)
    assert result.out == "1\n1\n1\n0\n"
    busy = r"device-mapper: remove ioctl on loop\d+p2  failed: Device or resource busy\n"
    assert re.fullmatch(rf"{busy}{busy}Command failed\.\n", result.err)
    assert not bound_to(box.folder)


def test_read_only_maps_and_disks(mapper: Box) -> None:
    box = mapper
    assert box("bash", "-c", prepared("gpt")).code == 0
    for device, options in ((box.attach("disk.img"), ["-r"]), (box.attach("-r", "disk.img"), [])):
        name = os.path.basename(device)
        assert box("kpartx", "-a", *options, device).code == 0
        assert box("blockdev", "--getro", f"/dev/mapper/{name}p1").out == "1\n"
        assert box("kpartx", "-d", device).code == 0
        assert box.losetup("-d", device).code == 0


def test_a_window_on_a_window(mapper: Box) -> None:
    """The disk begins in the middle of the file."""
    box = mapper
    script = prepared("gpt", "inner.img") + "head -c 1M /dev/zero >disk.img; cat inner.img >>disk.img"
    assert box("bash", "-c", script).code == 0
    device = box.attach("-o", "1M", "disk.img")
    name = os.path.basename(device)
    assert box("kpartx", "-a", device).code == 0
    assert box("bash", "-c", f"printf here >/dev/mapper/{name}p1; sync").code == 0
    with (box.folder / "disk.img").open("rb") as file:
        file.seek((1 << 20) + 2048 * 512)
        assert file.read(4) == b"here"
    assert box("kpartx", "-d", device).code == 0


def test_what_cannot_be_mapped_is_told(mapper: Box) -> None:
    box = mapper
    assert box("bash", "-c", prepared("gpt")).code == 0
    device = box.attach("disk.img")
    name = os.path.basename(device)
    (box.folder / "disk.img").unlink()
    result = box("kpartx", "-av", device)
    assert (result.code, result.out) == (2, "")
    assert (
        f"create/reload failed on {name}p1: {box.folder}/disk.img (deleted) is not the file of {device}\n" in result.err
    )
    assert box("kpartx", "-a", "/dev/zero").err == "kpartx: invalid device: /dev/zero\n"
    (box.folder / "small").write_bytes(b"\0")
    assert "can't set up loop: small: " in box("kpartx", "-a", "small").err


def test_the_disk_may_be_detached_first(mapper: Box) -> None:
    box = mapper
    assert box("bash", "-c", prepared("gpt")).code == 0
    device = box.attach("disk.img")
    assert box("kpartx", "-a", device).code == 0
    assert box.losetup("-d", device).code == 0
    assert kpartx(box, "-dv", "disk.img") == Result(0, "del devmap : loopNp2\ndel devmap : loopNp1\n", "")
    assert not bound_to(box.folder)


# The calls of builders, in the order in which they make them. Each leaves its root file system with a file in it.
VMDB2 = """
truncate -s 32M disk.img; parted -s disk.img mklabel gpt; parted -s disk.img mkpart primary ext2 1MiB 5MiB
parted -s disk.img mkpart primary ext2 5MiB 13MiB
kpartx -asv disk.img | awk '$1 == "add" { print "/dev/mapper/" $3 }' >devices
{ read boot; read root; } <devices; mkfs.ext2 -q -L boot $boot; mkfs.ext4 -q -L root $root
mkdir m; mount $root m; mkdir m/boot; mount $boot m/boot; echo text | tee m/file >m/boot/file; umount m/boot; umount m
kpartx -dsv disk.img >/dev/null 2>&1
"""
DISKIMAGE_BUILDER = """
truncate -s 32M disk.img; device=$(losetup --show -f disk.img)
printf 'label: dos\\n2048,8192\\n10240,16384\\n' | sfdisk -q --no-reread --no-tell-kernel disk.img
partprobe $device || true; test -e ${device}p1 || kpartx -av $device >/dev/null; dmsetup --noudevsync mknodes
root=/dev/mapper/$(basename $device)p2; mkfs.vfat -n boot ${root%2}1 >/dev/null; mkfs.ext4 -q -L root $root
mkdir m; mount $root m; echo text >m/file; umount m; kpartx -d $device; losetup -d $device
"""
KIWI = """
truncate -s 32M disk.img; device=$(losetup -f --show disk.img); sgdisk -Z $device >/dev/null 2>&1
sgdisk -n 1:2048:10239 -n 2:10240:26623 $device >/dev/null 2>&1; kpartx -s -a $device
map=/dev/mapper/$(basename $device); mkfs.vfat -n boot ${map}p1 >/dev/null; mkfs.ext4 -q -L root ${map}p2
mkdir m; mount ${map}p2 m; echo text >m/file; umount m
dmsetup remove ${map}p1; dmsetup remove ${map}p2; kpartx -d $device; losetup -d $device
"""


@pytest.mark.parametrize("script", [VMDB2, DISKIMAGE_BUILDER, KIWI], ids=["vmdb2", "diskimage-builder", "kiwi"])
def test_calls_of_builders(granted: Box, script: str) -> None:
    for program in ("parted", "sgdisk", "mkfs.vfat"):
        require(shutil.which(program, path=granted.environment["PATH"]), f"needs {program}")
    result = granted("bash", "-ec", script)
    assert result.code == 0, result
    assert not bound_to(granted.folder)
    assert granted("ls", "/dev/mapper").out == ""
    begin, size = 10240 * 512, 8 << 20
    root = granted.folder / "root.img"
    with (granted.folder / "disk.img").open("rb") as file:
        file.seek(begin)
        root.write_bytes(file.read(size))
    assert granted("e2fsck", "-fn", root).code == 0
    assert granted("debugfs", "-R", "cat file", root).out == "text\n"
    assert granted("blkid", "-o", "value", "-s", "LABEL", root).out == "root\n"


# dmsetup ----------------------------------------------------------------------------------------------------------


def test_dmsetup(mapper: Box) -> None:
    box = mapper
    assert box("bash", "-c", prepared("gpt")).code == 0
    assert box("dmsetup", "ls") == Result(0, "No devices found\n", "")
    added = box("kpartx", "-av", "disk.img").out
    (first, major, minor), (second, *_) = re.findall(r"add map (\S+) \((\d+):(\d+)\)", added)
    listed = box("dmsetup", "ls").out.splitlines()
    assert listed[0] == f"{first}\t({major}:{minor})"
    assert len(listed) == 2
    assert box("dmsetup", "ls", "--target", "crypt").out == "No devices found\n"
    assert box("dmsetup", "ls", "--target=linear").out.splitlines() == listed
    info = box("dmsetup", "info", f"/dev/mapper/{first}").out
    assert f"Name:              {first}\nState:             ACTIVE\n" in info
    assert f"Major, minor:      {major}, {minor}\n" in info
    assert box("dmsetup", "info", "nothing") == Result(1, "", "Device nothing not found\nCommand failed.\n")
    box.dev(f"mapper/{first}").unlink()
    assert box("dmsetup", "--noudevsync", "mknodes") == Result(0, "", "")
    assert box("test", "-b", f"/dev/mapper/{first}").code == 0
    assert box("dmsetup", "remove", f"/dev/mapper/{first}") == Result(0, "", "")
    assert box("ls", "/dev/mapper").out.split() == [second]
    assert box("dmsetup", "remove_all", "-f").code == 0
    assert box("dmsetup", "ls").out == "No devices found\n"
    assert box("kpartx", "-d", "disk.img").code == 0
    refused = box("dmsetup", "create", "x")
    assert (refused.code, refused.out) == (1, "")
    assert refused.err.startswith("there is no device mapper here; for the maps of kpartx loopd has ls, info")


def test_what_is_lost_is_told(granted: Box) -> None:
    script = f"""
mkdir full; /usr/bin/mount -t tmpfs -o size=4M tmpfs full; cd full; {prepared("gpt")}
set -- $(kpartx -av disk.img | cut -d' ' -f3); dd if=/dev/zero of=/dev/mapper/$2 bs=1M count=8 status=none
kpartx -d disk.img; echo $?
"""
    result = granted("bash", "-c", script)
    assert result.out == "1\n"
    assert re.search(r"(?m)^loop\d+p2 is removed, but .*/full/disk.img lacks what was written: ", result.err)
