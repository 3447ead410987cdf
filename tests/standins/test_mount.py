"""The stand-in for mount in a container's stead, held against mount(8), which makes its loop devices itself."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from support.box import (  # noqa: F401
    Box,
    Result,
    beside,
    box_fixture,
    granted_fixture,
    plain_fixture,
    real_fixture,
    run,
    stand_ins_fixture,
    version_fixture,
)
from support.daemon import ROOT, bound_to, eventually, require

from loopd import mountloop

E2FS = shutil.which("mkfs.ext4", path="/usr/sbin:/sbin:/usr/bin")
SQUASHFS = shutil.which("mksquashfs", path="/usr/sbin:/sbin:/usr/bin")


@pytest.fixture(name="file_system")
def file_system_fixture(box: Box) -> Box:
    require(E2FS, "needs mkfs.ext4 (package e2fsprogs)")
    assert run("mkfs.ext4", "-q", box.folder / "image", env=box.environment).code == 0
    (box.folder / "mnt").mkdir()
    return box


@pytest.mark.parametrize(
    "arguments",
    [
        ["-o", "loop", "image", "mnt"],
        ["image", "mnt"],
        ["-t", "ext4", "-oloop,noatime", "image", "mnt"],
        ["image", "mnt", "-o", "offset=0,sizelimit=4M,loop"],
        ["--options=loop", "--types=ext4", "--source", "image", "mnt"],
        ["--target", "mnt", "image"],
        ["-vo", "loop", "--", "image", "mnt"],
        ["-m0755", "-o", "loop", "image", "mnt"],
    ],
    ids=" ".join,
)
def test_mount_of_a_file(file_system: Box, arguments: list[str]) -> None:
    box = file_system
    done = box("mount", *arguments)
    assert (done.code, done.err) == (0, "")
    (name,) = bound_to(box.folder)
    assert box("sh", "-c", "echo text >mnt/file && sync -f mnt/file && cat mnt/file").out == "text\n"
    assert ("noatime" in box("findmnt", "-no", "OPTIONS", "mnt").out) == ("-oloop,noatime" in arguments)
    # It stays until the umount, which takes it away.
    assert box.losetup("-a").out.startswith(f"/dev/{name}: ")
    assert box("test", "-b", f"/dev/{name}").code == 0
    assert box("umount", "mnt").code == 0
    eventually(lambda: not bound_to(box.folder), "the device went with the mount")
    eventually(lambda: box.losetup("-a").out == "", "loopd knows it")
    assert box.names() == set()


# Beside mount(8) --------------------------------------------------------------------------------------------------

PREPARE = """
mkdir src; truncate -s 16M fs.img; mkfs.ext4 -q fs.img; head -c 300000 /dev/zero >src/f
mksquashfs src sq.img -quiet -no-progress >/dev/null 2>&1
said() { echo "rc=$? $(findmnt -n -o SOURCE,FSTYPE,OPTIONS m | tail -1) / $(findmnt -n -o SOURCE,FSTYPE,OPTIONS m2)"; }
mine() { $L -a 2>/dev/null | grep -F "$PWD"; }
end() {
    umount m2; umount m; umount m
    for i in $(seq 50); do mine || break; sleep 0.02; done
} >/dev/null 2>&1
try() {
    echo "== $1"; echo "== $1" >&2
    n=$((n + 1)); mkdir run$n; cd run$n; mkdir m m2 src; cp --sparse=always ../fs.img ../sq.img .
    eval "$1"; said; end; mine
    e2fsck -fn fs.img >/dev/null 2>&1 || echo damaged
    cd ..; rm -r run$n
}
"""
FORMS = """
$M fs.img m
$M -o ro fs.img m
$M -o ro,rw fs.img m
$M -o rw -r fs.img m
$M -r -o rw fs.img m
$M -w -o ro fs.img m
$M -o ro -w fs.img m
$M --read-only --rw fs.img m
$M -f -o loop fs.img m
$M -v -o loop fs.img m
$M -o loop,encryption=x fs.img m
$M -o loop,offset=512 fs.img m
$M -o offset=foo fs.img m
$M -o offset=1K,sizelimit=1M fs.img m
$M -o sizelimit=0x1000000 fs.img m
$M -t ext4,xfs fs.img m
$M -t noxfs fs.img m
$M -t auto fs.img m
$M -t ntfs-3g fs.img m
$M nofile m
$M -o loop fs.img nodir
$M -o loop fs.img /etc/passwd
$M -o remount,loop fs.img m
$M -o bind,loop fs.img m
$M -t tmpfs -o loop fs.img m
$M --target m --source fs.img
$M --source fs.img --target m -o ro
$M fs.img m; said; $M fs.img m
$M fs.img m; said; $M fs.img m2
$M -o ro fs.img m; said; $M fs.img m2
$M -o ro fs.img m; said; $M -w fs.img m2
$M fs.img m; said; $M -o ro fs.img m2
$M -o ro fs.img m; said; $M -o ro fs.img m2
$M fs.img m; said; $M -o offset=1M fs.img m2
$M fs.img m; said; $M -o sizelimit=16M fs.img m2
$M sq.img m; said; $M sq.img m2
$M sq.img m; said; $M -o ro sq.img m2
$M -o ro sq.img m; said; $M sq.img m2
$M --bind fs.img fs.img; $M -o remount,bind,ro fs.img; $M fs.img m; said; umount m; $M -w fs.img m; r=$?; \
umount fs.img; (exit $r)
d=$($L -f --show fs.img); $M fs.img m; said; umount m; $L -a | grep -c "$PWD"; $L -d $d; $M fs.img m
d=$($L -r -f --show fs.img); $M fs.img m; said; umount m; $L -d $d; false
d=$($L -f --show fs.img); $M $d m; $M | grep -c "^/dev/loop.* on "; $L -d $d; said
$M -o loop fs.img m; $M | sed -n 's/ on .*//p' | grep fs.img; $L -n -l -O AUTOCLEAR,BACK-FILE -j fs.img | xargs
$M -o loop fs.img m; umount fs.img
$M fs.img m; truncate -s 24M fs.img; $L -c $($L -j fs.img | cut -d: -f1); d=$(findmnt -n -o SOURCE m); \
resize2fs $d 2>&1 | grep -o "now.*"
$M fs.img m; dumpe2fs -h $(findmnt -n -o SOURCE m) 2>/dev/null | grep "^Filesystem state"
$M fs.img m; d=$($L -n -O NAME -j fs.img); $L -d $d; said; $L -a | grep "$PWD"
echo "$PWD/fs.img $PWD/m ext4 loop,ro 0 0" >tab; $M -T tab $PWD/m
echo "$PWD/fs.img $PWD/m ext4 defaults 0 0" >tab; $M -T tab -o ro fs.img
echo "$PWD/fs.img $PWD/m ext4 defaults 0 0" >tab; $M -T tab nothing
mkdir 'a b'; echo "$PWD/fs.img $PWD/a\\\\040b auto ro 0 0" >tab; $M -T tab "$PWD/a b"; findmnt -n -o OPTIONS 'a b'; \
umount 'a b'
"""


def tried(box: Box, forms: list[str]) -> list[tuple[str, list[str], list[str]]]:
    """Each form, with what the real program did and said, and what the stand-in did and said."""
    script = PREPARE + "".join(f"try {shlex.quote(form)}\n" for form in forms)
    theirs, ours = (
        [re.split("(?m)^== .*\n", text)[1:] for text in (result.out, result.err)] for result in beside(box, script)
    )
    return list(zip(forms, map(list, zip(*theirs, strict=True)), map(list, zip(*ours, strict=True)), strict=True))


def test_does_what_the_real_one_does(granted: Box) -> None:
    require(E2FS and SQUASHFS, "needs mkfs.ext4 and mksquashfs")
    forms = [line for line in FORMS.splitlines() if line]
    results = tried(granted, forms)
    assert [(form, ours) for form, _, ours in results] == [(form, theirs) for form, theirs, _ in results]
    assert len(results) == len(forms) > 50
    assert "damaged" not in str(results)
    assert not bound_to(granted.folder)


REFUSED = {
    "$M -o loop=/dev/loop9999999 fs.img m": "loop=/dev/loopN: loopd chooses the device: -o loop",
    "$M -o loop= fs.img m": "loop=: loopd chooses the device: -o loop",
    "$M -o loop nofile m": "No such file or directory",
    "$M -o loop src m": "Is a directory",
    "$M -o loop /dev/zero m": "regular file",
}


def test_what_it_does_not_do_is_refused_in_a_line(granted: Box) -> None:
    for form, theirs, ours in tried(granted, list(REFUSED)):
        assert ours[0] == theirs[0]
        assert ours[1].startswith(theirs[1].rstrip(".\n") + ": ")
        assert REFUSED[form] in ours[1]
        assert ours[1].count("\n") == 1


def test_a_file_of_another_namespace_is_refused(file_system: Box) -> None:
    result = file_system("mount", "-N", "1", "-o", "loop", "image", "mnt")
    assert (result.code, result.out) == (32, "")
    assert result.err.endswith(": loopd attaches no file of another namespace\n")


def test_it_knows_the_file_systems_that_libblkid_knows(granted: Box) -> None:
    """A file of another type goes to mount(2) as it is, or to a program for that type."""
    known = set(run("blkid", "-k", env=granted.environment).out.split())
    assert len(known) > 50
    assert known <= mountloop.KNOWN


# What may go wrong ------------------------------------------------------------------------------------------------


def test_a_mount_that_fails_leaves_no_device(file_system: Box) -> None:
    result = file_system("mount", "-o", "loop", "image", "nowhere")
    assert result.code == 32
    assert "nowhere" in result.err
    eventually(lambda: not bound_to(file_system.folder), "it is unbound")
    file_system.environment["LOOPD_SOCKET"] = "/nonexistent"
    result = file_system("mount", "-o", "loop", "image", "mnt")
    assert result.code == 32
    assert "systemctl enable --now loopd.socket" in result.err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_mount_that_is_interrupted_leaves_no_device(plain: Box, number: int) -> None:
    """mount(8) is told, and what it says is the end; here it is one that takes its time."""
    with slow_mount(plain) as process:
        os.kill(child_of(process.pid), number)
        assert process.wait(20) == 9
    eventually(lambda: not bound_to(plain.folder), "the device is gone")


def test_a_mount_that_is_killed_leaves_no_device(plain: Box) -> None:
    """The device is one that goes at its last close from the beginning, as mount(8)'s."""
    with slow_mount(plain) as process:
        os.kill(child_of(process.pid), signal.SIGKILL)
        process.wait(20)
    eventually(lambda: not bound_to(plain.folder), "the device is gone")


def slow_mount(box: Box) -> subprocess.Popen[bytes]:
    """A mount of a file by a mount(8) that takes its time, and has begun."""
    slow = box.folder / "slow"
    slow.mkdir()
    (slow / "mount").write_text("#!/bin/sh\ntrap 'exit 9' HUP INT TERM\ntouch started\nsleep 10 & wait\n")
    (slow / "mount").chmod(0o755)
    box.environment["PATH"] = f"{box.programs}:{slow}:{box.environment['PATH']}"
    process = subprocess.Popen([*box.inside, "mount", "-o", "loop", "image", "mnt"], env=box.environment)
    eventually((box.folder / "started").exists, "it is being mounted")
    return process


def child_of(pid: int) -> int:
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


def test_what_cannot_be_written_back_is_told(granted: Box) -> None:
    """A journal that is replayed for a mount which fails then, on a full file system."""
    require(E2FS, "needs mkfs.ext4 (package e2fsprogs)")
    writer = granted.folder / "bin2"
    writer.mkdir()
    (writer / "mount").write_text("#!/bin/sh\nfor last; do :; done\nfor a; do case $a in /dev/*) d=$a;; esac; done\n"
                                  "dd if=/dev/zero of=$d bs=1M count=8 status=none; exit 32\n")  # fmt: skip
    (writer / "mount").chmod(0o755)
    script = f"""
mkdir full mnt; /usr/bin/mount -t tmpfs -o size=2M tmpfs full; truncate -s 16M full/disk.img
PATH={granted.programs}:{writer}:$PATH; mount -o loop full/disk.img mnt; echo rc=$?
"""
    result = granted("bash", "-c", script)
    assert result.out == "rc=32\n"
    assert re.search(r"(?m)^mount: full/disk.img lacks what was written: ", result.err)
    eventually(lambda: not bound_to(granted.folder), "the device is gone")


def test_sync_tells_what_umount_does_not(granted: Box) -> None:
    """As with the real one: the kernel unbinds the device at umount, and nothing of ours runs then."""
    theirs, ours = beside(granted, """
mkdir full m; /usr/bin/mount -t tmpfs -o size=3M tmpfs full
truncate -s 32M full/disk.img; mkfs.ext4 -q -F full/disk.img
$M -o loop full/disk.img m; dd if=/dev/zero of=m/file bs=1M count=8 status=none
sync --file-system m 2>/dev/null; echo $?
umount m; echo $?
""")  # fmt: skip
    assert ours == theirs
    assert ours.out == "1\n0\n"


def test_without_path_nothing_of_the_working_directory_runs(plain: Box) -> None:
    (plain.folder / "mount").write_text("#!/bin/sh\necho trap\n")
    (plain.folder / "mount").chmod(0o755)
    done = plain("env", "-i", plain.programs / "mount", "--version")
    assert done.out.startswith("mount from util-linux")


def test_other_mounts_go_to_mount_as_they_are(box: Box) -> None:
    (box.folder / "mnt").mkdir()
    for arguments in (["-t", "tmpfs", "tmpfs", "mnt"], ["--bind", "bin", "mnt"], ["-o", "bind", "bin", "mnt"]):
        assert box("mount", *arguments).code == 0
        assert box("umount", "mnt").code == 0
    (box.folder / "file").touch()
    assert box("mount", "--bind", "image", "file").code == 0
    assert box("umount", "file").code == 0
    mount = shutil.which("mount", path="/usr/bin:/bin")
    for command in ([], ["--version"], ["-t", "tmpfs"], ["nothing"]):
        assert box("mount", *command) == box(mount, *command)
    assert not bound_to(box.folder)


def test_a_copy_of_the_trees_files_runs(file_system: Box) -> None:
    """Neither is packed: the one takes what both need from the other, which lies beside it."""
    copies = file_system.folder / "copies"
    copies.mkdir()
    for module, name in (("losetup", "losetup"), ("mountloop", "mount")):
        shutil.copy(ROOT / f"loopd/{module}.py", copies / name)
    assert file_system(copies / "mount", "-o", "loop", "image", "mnt") == Result(0, "", "")
    assert file_system(copies / "losetup", "-n", "-O", "AUTOCLEAR").out.split() == ["1"]
    assert file_system("umount", "mnt").code == 0
    assert file_system(ROOT / "loopd/mountloop.py", "image", "mnt").code == 0
    assert file_system("umount", "mnt").code == 0
