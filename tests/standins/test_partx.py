"""The stand-ins for partx and partprobe in a container's stead, held against the real ones.

Where the kernel has no reader of partition tables, as the one of development machines, the real partx adds what the
stand-in finds missing; in the VM the kernel reads them (tests/vm).
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.box import (  # noqa: F401
    Box,
    Result,
    beside,
    box_fixture,
    granted_fixture,
    make_box,
    plain_fixture,
    run,
    stand_ins_fixture,
)
from support.daemon import Daemon, bound_to, configured, eventually, require
from support.scripted import Loop, Peer, Request, loop  # noqa: F401
from support.tables import denied_fixture, prepared  # noqa: F401

from loopd import loop as lo

SAME = {
    "add": """
d=$($L -P -f --show disk.img); $P -a $d 2>/dev/null; for p in ${d}p*; do echo "$p $(blockdev --getsz $p)"; done
$P -d $d; echo $?; ls ${d}p* 2>/dev/null | grep -c "p[12]$"; $L -d $d
""",
    "update": """
d=$($L -P -f --show disk.img); $P -u $d; echo $?; for p in ${d}p*; do echo "$p $(blockdev --getsz $p)"; done
sfdisk -q --no-reread --no-tell-kernel --delete $d 2; echo 20480,4096 | sfdisk -q --no-reread --no-tell-kernel -a $d
$P -u $d; echo $?; for p in ${d}p*; do echo "$p $(blockdev --getsz $p)"; done; $P -d $d; $L -d $d
""",
    "probe": """
d=$($L -P -f --show disk.img); $B $d; echo $?; for p in ${d}p*; do echo "$p $(blockdev --getsz $p)"; done
$B $d; echo $?; $B -s $d; echo $?; $B -d -s $d; $B -ds disk.img; $B nofile; echo $?; $P -d $d; $L -d $d
""",
    "show": """
$P -s -o NR,START,END disk.img; $P -s -g -o NR,SECTORS --nr 2 disk.img; $P --show --raw disk.img | cut -d' ' -f1-4
d=$($L -f --show disk.img); $P -s -o NR,START $d; $P -l $d 2>/dev/null; $L -d $d
$P; echo $?; $P -x 2>/dev/null; echo $?
""",
    "bytes after every close": """
d=$($L -P -f --show disk.img); $P -u $d; sums() { echo $1; for f in disk.img $d ${d}p1 ${d}p2; do cksum <$f; done; }
sums fresh; seq 9999 | dd of=${d}p1 conv=notrunc status=none; echo $?; sums partition
seq 500 3000 | dd of=$d bs=512 seek=4100 conv=notrunc status=none; echo $?; sums disk
seq 7000 9000 | dd of=disk.img bs=512 seek=20500 conv=notrunc status=none; sums file
E2FSPROGS_FAKE_TIME=1 mkfs.ext4 -q -U clear -E hash_seed=11111111-1111-1111-1111-111111111111 ${d}p2; echo $?; sums mkfs
dd if=/dev/zero of=${d}p1 bs=1M 2>/dev/null; echo $?; sums full; $P -d $d; $L -d $d; echo $?; cksum <disk.img
""",
    "a partition in use": """
d=$($L -P -f --show disk.img); $P -u $d; mkfs.ext4 -q ${d}p2; mkdir m; /usr/bin/mount ${d}p2 m; $B $d; echo $?
echo text >m/text; $P -u $d; echo $?; cat m/text; umount m; $P -d $d; echo $?; $L -d $d
""",
}


@pytest.mark.sample(3)
@pytest.mark.parametrize("case", SAME)
@pytest.mark.parametrize("table", ["gpt", "dos"])
def test_does_what_the_real_one_does(box: Box, case: str, table: str) -> None:
    for program in ("partx", "partprobe", "sfdisk", "mkfs.ext4"):
        require(shutil.which(program, path=box.environment["PATH"].partition(":")[2]), f"needs {program}")
    theirs, ours = beside(box, prepared(table) + SAME[case])
    assert ours == theirs
    eventually(lambda: not bound_to(box.folder), "nothing is left")


def test_adds_what_a_file_has(box: Box) -> None:
    """partx attaches a file by itself, and leaves it so."""
    assert box("bash", "-c", prepared("gpt")).code == 0
    result = box("partx", "-av", "disk.img")
    assert result.code == 0
    device = box.losetup("-n", "-O", "NAME", "-j", "disk.img").out.strip()
    assert result.out == f"Trying to use '{device}' for the loop device\n"
    assert box("test", "-b", f"{device}p2").code == 0
    assert box("partx", "-d", device).code == 0
    assert box.losetup("-d", device).code == 0


def test_what_is_right_stays(granted: Box) -> None:
    """Not for a moment is a node away, nor is it another one."""
    assert granted("bash", "-c", prepared("gpt")).code == 0
    device = granted.attach("-P", "disk.img")
    name = os.path.basename(device)
    assert granted("partprobe", device).code == 0
    before = [os.stat(granted.dev(f"loopd/{name}p{number}")) for number in (1, 2)]
    for command in (["partprobe", device], ["partprobe"], ["partx", "-u", device], ["partx", "-a", device]):
        assert granted(*command) == Result(0, "", "")
    after = [os.stat(granted.dev(f"loopd/{name}p{number}")) for number in (1, 2)]
    assert [(status.st_ino, status.st_rdev) for status in after] == [(s.st_ino, s.st_rdev) for s in before]
    assert granted("partx", "-d", device).code == 0


def test_without_privilege_it_says_what_to_do(granted: Box) -> None:
    """Here the kernel finds no partitions, and without CAP_SYS_ADMIN nobody may add them."""
    assert granted("bash", "-c", prepared("gpt")).code == 0
    device = granted.attach("-P", "disk.img")
    drop = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"]
    for command in (["partx", "-a"], ["partx", "--update"], ["partprobe"]):
        result = granted(*drop, *command, device)
        assert (result.code, result.out) == (1, "")
        why = rf"{device}: no nodes for 1 2: .*; `kpartx -av {device}` makes devices of partitions\n"
        assert re.fullmatch(f"{command[0]}: {why}", result.err)
    granted("partprobe", device)
    result = granted(*drop, "partx", "-d", device)
    kept = f"partx: {device}: its partitions stay until it is detached: to remove them takes CAP_SYS_ADMIN\n"
    assert result == Result(1, "", kept)
    assert granted("partx", "-d", device).code == 0


def test_without_the_real_ones(granted: Box) -> None:
    """A container may have neither; then what they alone do is an error."""
    assert granted("bash", "-c", prepared("gpt")).code == 0
    device = granted.attach("-P", "disk.img")
    assert granted("partprobe", device).code == 0
    for name in ("partx", "partprobe"):
        (granted.programs / name).write_text(hidden(granted, name))
    alone = ["env", "PATH=/nonexistent"]
    assert granted(*alone, granted.programs / "partprobe", "-s", device).out == f"{device}: gpt partitions 1 2\n"
    assert granted(*alone, granted.programs / "partx", "-a", device).code == 0
    result = granted(*alone, granted.programs / "partx", "-s", device)
    assert result == Result(1, "", "partx: there is no other partx in PATH\n")


def hidden(box: Box, name: str) -> str:
    """The program, which finds no other of its name."""
    return (box.programs / name).read_text().replace('"/usr/sbin", "/usr/bin", "/sbin", "/bin"', "")


# The device cgroup ------------------------------------------------------------------------------------------------


CLOSED = "does not open here: the container's device cgroup allows no nodes of partitions; `kpartx -av"


def test_losetup_says_that_partitions_do_not_open(denied: Path, loop: Loop, tmp_path: Path, stand_ins: Path) -> None:  # noqa: F811
    name = str(loop.reply["devname"])
    with lo.Loop(int(name[4:])) as device:
        device.add_partition(1, 4096, 8192)
    major, minor = map(int, Path(f"/sys/block/{name}/{name}p1/dev").read_text().split(":"))

    def deliver(request: Request) -> None:
        directory = request.fds[request.fields["dir_fd"]]
        os.mknod(name, 0o600 | 0o060000, loop.number, dir_fd=directory)
        os.mknod(f"{name}p1", 0o600 | 0o060000, os.makedev(major, minor), dir_fd=directory)
        request.reply({**loop.reply, "partitions": [f"{name}p1"], "warnings": ["nothing", "no partition of yours"]})

    grant = tmp_path / "grant"
    grant.mkdir()
    environment = {"LOOPD_SOCKET": str(tmp_path / "sock"), "LOOPD_DIRECTORY": str(grant), "PATH": os.environ["PATH"]}
    inside = ["sh", "-c", f'echo $$ >{denied}/cgroup.procs; exec "$@"', "sh"]
    with Peer(tmp_path / "sock", deliver):
        done = run(*inside, stand_ins / "losetup", "-P", "-f", "--show", loop.image, env=environment)
    with lo.Loop(int(name[4:])) as device:
        device.delete_partition(1)
    path = done.out.rstrip()
    try:
        assert done.code == 0
        assert done.err.splitlines() == [
            f"losetup: {path}: no partition of yours",
            f"losetup: {path}: {name}p1 {CLOSED} {path}` makes devices that open"
        ]  # fmt: skip
    finally:
        if os.path.islink(path):
            os.unlink(path)
            os.unlink(f"{path}p1")


@pytest.fixture(name="kernels")
def kernels_fixture(start_daemon: Callable[..., Daemon], stand_ins: Path, tmp_path: Path) -> Iterator[Box]:
    """A box that gets nodes of the kernel's partitions."""
    policy = configured(tmp_path, "allow.kernel_partitions = true\n")
    yield from make_box(start_daemon, tmp_path, stand_ins, grant=True, options=policy)


def test_partitions_open_where_the_kernels_do_not(denied: Path, granted: Box) -> None:
    assert granted("bash", "-c", prepared("gpt")).code == 0
    granted.inside[:0] = ["sh", "-c", f'echo $$ >{denied}/cgroup.procs; exec "$@"', "sh"]
    device = granted.attach("-P", "disk.img")
    assert granted("partprobe", device) == Result(0, "", "")
    assert granted("dd", "if=/dev/zero", f"of={device}p1", "bs=512", "count=1").code == 0


def test_partprobe_says_that_partitions_do_not_open(denied: Path, kernels: Box) -> None:
    granted = kernels
    assert granted("bash", "-c", prepared("gpt")).code == 0
    device = granted.attach("-P", "disk.img")
    assert granted("partprobe", device) == Result(0, "", "")
    granted.inside[:0] = ["sh", "-c", f'echo $$ >{denied}/cgroup.procs; exec "$@"', "sh"]
    result = granted("partprobe", device)
    name = os.path.basename(device)
    assert result == Result(0, "", f"partprobe: {device}: {name}p1 {CLOSED} {device}` makes devices that open\n")
    # And so it does.
    assert granted("dd", "if=/dev/zero", f"of={device}p1", "bs=512", "count=1").code == 1
    assert granted("kpartx", "-a", device).code == 0
    assert granted("dd", "if=/dev/zero", f"of=/dev/mapper/{name}p1", "bs=512", "count=1").code == 0
    assert granted("kpartx", "-d", device).code == 0
