"""The image is sacred: what a builder does in a container, with the kernel's own partitions and real mounts.

Each script runs twice: on the host with the real losetup and mount, and in a container with loopd's, first in its PATH.
Both must say the same and end the same; the host judges the image afterwards.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from host import SERVICE, Journal, attach, bound, leases, loopctl, name, policy, prop, run, wait_for

BIN = "/usr/local/lib/loopd/bin"
REAL = "/usr/sbin/losetup"
MIB = 1 << 20

PRELUDE = """
exec >said 2>log
set -eu
# udev looks at a device that is new, grew, or was closed after a write, and whoever has it open keeps its cache.
settle() { if test -n "${REAL-}"; then udevadm settle; else sleep 2; fi; }
close() { if test -n "${REAL-}"; then udevadm settle; fi; }
partition() { for try in $(seq 600); do ! test -b $1 || return 0; sleep 0.1; done; echo "$1 does not come"; return 1; }
check() { e2fsck -f -n $1 >log.e2fsck 2>&1 || { cat log.e2fsck; return 1; }; }
same() { if test "$2" = "$3"; then echo "$1: the same"; else echo "$1: $2 and $3"; fi; }
"""

WRITES = """
truncate -s 8M disk.img
d=$(losetup --find --show disk.img); settle
printf hello | dd of=$d conv=notrunc status=none; close
head -c 5 disk.img
head -c 5 $d >&2
printf howdy | dd of=disk.img conv=notrunc status=none
head -c 5 $d
yes boot | head -c 440 | dd of=$d conv=notrunc status=none; close
printf 'label: dos\\nlabel-id: 0x10adface\\n2048,4096\\n' | sfdisk --quiet --no-reread --no-tell-kernel disk.img
losetup --detach $d
head -c 440 disk.img | cksum; sfdisk --dump disk.img; cksum <disk.img
"""

PARTITIONS = """
mkdir tree m; echo by the disk >tree/disk
truncate -s 48M disk.img
printf 'label: gpt\\n2048,40960\\n43008,40960\\n' | sfdisk --quiet disk.img
d=$(losetup --find --show --partscan disk.img); settle
partition ${d}p1; partition ${d}p2
mkfs.ext4 -q -d tree ${d}p2; close
truncate -s 20M fs.img; mkfs.ext4 -q -d tree fs.img
dd if=${d}p1 of=/dev/null bs=1M status=none
dd if=fs.img of=$d bs=1M seek=1 conv=notrunc status=none; settle
for n in 1 2; do
    mount ${d}p$n m; cat m/disk; echo by the partition >m/partition; umount m; close
    check ${d}p$n
done
whole=$(dd if=$d bs=1M skip=1 count=40 status=none | cksum)
same 'disk and partitions' "$whole" "$(cat ${d}p1 ${d}p2 | cksum)"
same 'disk and file' "$whole" "$(dd if=disk.img bs=1M skip=1 count=40 status=none | cksum)"
losetup --detach $d
dd if=disk.img of=fs.img bs=1M skip=21 count=20 status=none
check fs.img; debugfs -R 'cat partition' fs.img 2>/dev/null
"""

MOUNTS = """
truncate -s 24M disk.img; mkdir m
d=$(losetup --find --show disk.img); settle
mkfs.ext4 -q $d; close
mount $d m; echo one >m/one; umount m; close
echo two >two; debugfs -w -R 'write two two' disk.img 2>/dev/null | sed 's/inode.*//'
check disk.img
mount $d m; cat m/one m/two; rm m/one; echo three >m/three; umount m; close
check disk.img
debugfs -R 'cat three' disk.img 2>/dev/null
e2fsck -f -y disk.img >&2
mount $d m; ls m; umount m
losetup --detach $d
check disk.img
"""

GROWTH = """
truncate -s 16M disk.img; mkdir m
mkfs.ext4 -q disk.img
d=$(losetup --find --show disk.img); settle
mount $d m; echo kept >m/kept
truncate -s 32M disk.img; losetup --set-capacity $d; settle; blockdev --getsize64 $d
resize2fs $d >&2; df --output=size m | tail -n 1; umount m; close
check disk.img
truncate -s 48M disk.img; losetup --set-capacity $d; settle; blockdev --getsize64 $d
e2fsck -f -y disk.img >&2; resize2fs disk.img >&2
mount $d m; df --output=size m | tail -n 1; cat m/kept; head -c 30M /dev/zero >m/zeros; umount m
losetup --detach $d
check disk.img; dumpe2fs -h disk.img 2>/dev/null | grep 'Block count'
"""

LOOP_MOUNTS = """
truncate -s 24M disk.img; mkdir m
mkfs.ext4 -q disk.img
mount -o loop disk.img m; echo one >m/one; umount m
echo two >two; debugfs -w -R 'write two two' disk.img 2>/dev/null | sed 's/inode.*//'
mount -o loop disk.img m; cat m/one m/two; echo three >m/three; umount m
check disk.img; debugfs -R 'cat three' disk.img 2>/dev/null
truncate -s 1M whole.img; cat disk.img >>whole.img
mount -o loop,offset=1M,sizelimit=24M whole.img m; cat m/three; echo four >m/four; umount m
dd if=whole.img of=disk.img bs=1M skip=1 status=none
check disk.img; debugfs -R 'cat four' disk.img 2>/dev/null
"""

SCRIPTS = {
    "writes": WRITES, "partitions": PARTITIONS, "mounts": MOUNTS, "growth": GROWTH, "mount -o loop": LOOP_MOUNTS,
}  # fmt: skip


class Said(NamedTuple):
    code: int
    words: str


def beside(folder: Path, script: str) -> Said:
    """With the real losetup and mount, in a mount namespace of its own."""
    work = folder / "real"
    work.mkdir()
    (work / "script").write_text(PRELUDE + script)
    command = ["unshare", "--mount", "--propagation", "private", "env", "REAL=1", "timeout", "100", "sh", "script"]
    done = subprocess.run(command, cwd=work, stdin=subprocess.DEVNULL, check=False)
    print((work / "log").read_text())
    return Said(done.returncode, (work / "said").read_text())


def contained(folder: Path, script: str, *options: str) -> Said:
    """With loopd's, in a container that may mount and has nothing of the host's /dev."""
    work = folder / "ours"
    work.mkdir()
    (work / "script").write_text(PRELUDE + script)
    given = ["--rm", "--log-driver=none", "--network=none", "--cap-drop=MKNOD", "--cap-add=SYS_ADMIN"]
    given += ["--cap-add=SYS_RESOURCE", "--volume=/run/loopd:/run/loopd:ro"]  # the latter for a resize while mounted
    given += ["--device-cgroup-rule=b 7:* rw"]
    given += [f"--volume={BIN}/{program}:/usr/local/sbin/{program}:ro" for program in ("losetup", "mount")]
    given += [f"--volume={work}:/srv/work", "--workdir=/srv/work", *options]
    # It ends by itself: what a test's deadline cuts off leaves the container behind.
    command = ["podman", "run", *given, "--rootfs", "/:O", "timeout", "100", "sh", "script"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, check=False, timeout=150)
    print((work / "log").read_text())
    return Said(done.returncode, (work / "said").read_text())


@pytest.fixture(params=["own-dev", "grant"])
def delivery(request: pytest.FixtureRequest) -> Iterator[tuple[str, ...]]:
    """What lets a container have its nodes: nothing, they are made in its /dev; or a directory grant."""
    if request.param == "own-dev":
        yield ()
        return
    path = loopctl("directory", "image").strip()
    yield (f"--volume={path}:/dev/loopd:ro",)
    loopctl("directory", "--remove", "image")


# Beside the real one ----------------------------------------------------------------------------------------------


@pytest.mark.sample(2)
@pytest.mark.deadline(300)
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_container_beside_the_real_losetup(folder: Path, delivery: tuple[str, ...], script: str) -> None:
    real = beside(folder, SCRIPTS[script])
    assert real.code == 0, real.words
    ours = contained(folder, SCRIPTS[script], *delivery)
    assert ours == real
    wait_for("nothing is attached", lambda: not bound() and not leases())
    wait_for("the real one has nothing", lambda: run(REAL, "-n", "-O", "NAME", "-j", folder / "real/disk.img") == "")


@pytest.mark.deadline(300)
def test_the_kernels_partitions_beside_the_real_losetup(folder: Path) -> None:
    """Where the administrator gives these, and the device cgroup allows them."""
    real = beside(folder, PARTITIONS)
    with policy("allow.kernel_partitions = true"):
        ours = contained(folder, PARTITIONS, "--device-cgroup-rule=b 259:* rw")
    assert ours == real
    wait_for("nothing is attached", lambda: not bound() and not leases())


# mount names the device -------------------------------------------------------------------------------------------

NAMES = """
truncate -s 24M disk.img; mkfs.ext4 -q disk.img; truncate -s 1M whole.img; cat disk.img >>whole.img; mkdir m
names() {
    ls /sys/block | while read -r device; do
        ! grep -q "/$1$" /sys/block/$device/loop/backing_file 2>/dev/null || echo "device $device"
    done
    mount | sed -n "s, on $PWD/m type .*,,p"
    findmnt -n -o SOURCE m
    sed -n "s, $PWD/m .*,,p" /proc/mounts
    echo end
}
"""
BY_DEVICE = """
d=$(losetup --find --show disk.img); mount $d m; names disk.img; umount $d; losetup --detach $d
d=$(losetup --find --show --offset 1M whole.img); mount $d m; names whole.img; umount $d; losetup --detach $d
"""
BY_DROP_IN = """
mount -o loop disk.img m; names disk.img; umount m
mount -o loop,offset=1M whole.img m; names whole.img; umount m
"""


def named(words: str) -> None:
    """In all three places it is the device, twice."""
    for _ in range(2):
        one, _, words = words.partition("end\n")
        device, *sources = one.splitlines()
        assert re.fullmatch("device loop[0-9]+", device)
        assert len(sources) == 3
        assert {source.rpartition("/")[2] for source in sources} == {device.removeprefix("device ")}, sources
    assert words == ""


@pytest.mark.sample(2)
@pytest.mark.deadline(240)
def test_the_list_of_mounts_names_a_device_that_was_mounted(folder: Path, delivery: tuple[str, ...]) -> None:
    """A script that looks for it there, and unmounts what it finds, finds it: by device, and by the window's."""
    real = beside(folder, NAMES + BY_DEVICE)
    assert real.code == 0
    named(real.words)
    ours = contained(folder, NAMES + BY_DEVICE, *delivery)
    assert ours.code == 0, ours.words
    named(ours.words)


@pytest.mark.sample(2)
@pytest.mark.deadline(240)
def test_the_list_of_mounts_names_what_the_real_loop_mount_does(folder: Path, delivery: tuple[str, ...]) -> None:
    """`mount -o loop` has the kernel unbind at the umount (AUTOCLEAR), and libmount then lists the image."""
    real = beside(folder, NAMES + BY_DROP_IN)
    assert real.code == 0
    ours = contained(folder, NAMES + BY_DROP_IN, *delivery)
    assert ours.code == 0, ours.words
    shapes = [re.sub("loop[0-9]+", "loopN", re.sub(r"\S*/", "", found.words)) for found in (ours, real)]
    assert shapes[0] == shapes[1]
    wait_for("umount has let them go", lambda: not bound())


# Partition nodes stay ---------------------------------------------------------------------------------------------

POLL = """
import os, subprocess, sys, threading, time

device, first, end = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
nodes = [f"{device}p{number}" for number in (1, 2)]
seen, absent, looks, stopping = {node: set() for node in nodes}, {node: 0 for node in nodes}, 0, False

def watch():
    global looks
    while not stopping:
        looks += 1
        for node in nodes:
            try:
                status = os.stat(node)
                seen[node].add((status.st_ino, status.st_rdev, status.st_mode))
            except FileNotFoundError:
                absent[node] += 1
        time.sleep(0.001)

def write(at, data):
    fd = os.open(device, os.O_WRONLY)
    os.pwrite(fd, data, at)
    os.close(fd)

thread = threading.Thread(target=watch)
thread.start()
for turn in range(8):
    write(0, os.urandom(446))
    write(first, os.urandom(512))
    write((first + end) // 1024 * 512, os.urandom(8192))
    write(end - 512, os.urandom(512))
    time.sleep(0.3)
if len(sys.argv) > 4:  # a table that the kernel does not read now
    quiet = ["sfdisk", "--quiet", "--force", "--no-reread", "--no-tell-kernel"]
    subprocess.run([*quiet, "--append", device], input=",4M\\n", text=True, check=True)
    for turn in range(4):
        time.sleep(0.3)
        os.close(os.open(device, os.O_WRONLY))
time.sleep(1)
stopping = True
thread.join()
assert looks > 50, looks
for node in nodes:
    print("absent" if absent[node] else "there", "replaced" if len(seen[node]) > 1 else "the same")
"""

# The start of the gap behind the table, and of the first partition.
GAPS = {"dos": (512, MIB), "gpt": (34 * 512, MIB)}
BOOT_LOADER = """
truncate -s 64M disk.img; mkdir m
printf 'label: {label}\\n2048,40960\\n43008,40960\\n' | sfdisk --quiet disk.img
d=$(losetup --find --show --partscan disk.img); settle
partition ${{d}}p1; partition ${{d}}p2
mkfs.ext4 -q ${{d}}p1; mkfs.ext4 -q ${{d}}p2
{before}
python3 poll.py $d {first} {end} {changed}
{after}
partition ${{d}}p{last}
mount ${{d}}p2 m; umount m
losetup --detach $d
sfdisk --quiet --json disk.img | grep -c '"start"'
"""


def boot_loader(label: str, use: str, *, changed: bool = False) -> str:
    first, end = GAPS[label]
    before, after = {
        "idle": ("", ""),
        "mounted": ("mount ${d}p1 m; echo kept >m/file", "cat m/file; umount m; : <>$d"),
    }[use]
    if changed:  # a name in /dev for a partition more is made when a stand-in runs
        after += "; for try in $(seq 100); do losetup --all >log; test ! -b ${d}p3 || break; sleep 0.3; done"
    script = BOOT_LOADER.format(
        label=label, first=first, end=end, before=before, after=after, changed="changed" if changed else "",
        last=3 if changed else 2,
    )  # fmt: skip
    return f"cat >poll.py <<'END'\n{POLL}END\n{script}"


STAYED = "there the same\n" * 2


@pytest.mark.sample(3)
@pytest.mark.deadline(300)
@pytest.mark.parametrize("use", ["idle", "mounted"])
@pytest.mark.parametrize("label", GAPS)
def test_a_boot_loader_leaves_the_partition_nodes_alone(
    folder: Path, delivery: tuple[str, ...], label: str, use: str
) -> None:
    ours = contained(folder, boot_loader(label, use), *delivery)
    kept = "kept\n" if use == "mounted" else ""
    assert ours == Said(0, f"{STAYED}{kept}2\n")


@pytest.mark.sample(2)
@pytest.mark.deadline(300)
@pytest.mark.parametrize("label", GAPS)
def test_a_table_that_the_kernel_refuses_to_read_changes_nothing(
    folder: Path, delivery: tuple[str, ...], label: str
) -> None:
    """A third partition is appended while the first is in use; at the next close without one it is there."""
    ours = contained(folder, boot_loader(label, "mounted", changed=True), *delivery)
    assert ours == Said(0, f"{STAYED}kept\n3\n")


@pytest.mark.sample(2)
@pytest.mark.deadline(240)
@pytest.mark.parametrize("label", GAPS)
def test_after_a_re_read_what_did_not_change_is_the_same(disk: Path, label: str) -> None:
    """Nothing is in use, so that the kernel reads the table; the partition that keeps its number keeps its node."""
    run("sfdisk", "--quiet", disk, text=f"label: {label}\n2048,8192\n10240,8192\n")
    device = attach(disk, "--partscan")
    number = Path(f"/sys/block/{name(device)}/{name(device)}p1/dev")
    before, inode = number.read_text(), Path(f"{device}p1").stat().st_ino
    run("sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", "--delete", device, "2")
    wait_for("the second is gone", lambda: not Path(f"{device}p2").exists())
    wait_for("the first is there", Path(f"{device}p1").exists)
    if number.read_text() == before:  # the kernel removes all of them, and may give it another number
        assert Path(f"{device}p1").stat().st_ino == inode
    loopctl("detach", device)


# Nothing is open --------------------------------------------------------------------------------------------------


@pytest.mark.deadline(240)
def test_the_service_has_no_device_open(disk: Path, journal: Journal) -> None:
    """Neither a process of the unit's nor the service manager, whose fd store has what the slots hold."""
    run("sfdisk", "--quiet", disk, text="label: gpt\n2048,8192\n")
    device = attach(disk, "--partscan")
    wait_for("its partition", Path(f"{device}p1").exists)
    with disk.open("r+b", buffering=0) as image:
        for mark in (b"one", b"two", b"three"):
            run("udevadm", "settle")
            is_last(device, image.fileno(), mark)
            assert Path(f"/sys/block/{name(device)}/loop/autoclear").read_text() == "0\n"
            os.kill(int(prop(SERVICE, "MainPID")), signal.SIGKILL)
            wait_for("the next one knows it", lambda: [lease["devname"] for lease in leases()] == [name(device)])
    run("udevadm", "settle")
    run(REAL, "--detach", f"/dev/{name(device)}")
    assert not bound()
    wait_for("the lease is over", lambda: leases() == [])
    wait_for("its node is gone", lambda: not Path(device).exists())
    assert journal.records(f"LOOPD_DEVICE={name(device)}", "LOOPD_EVENT=foreign") == []


def is_last(device: str, image: int, mark: bytes, at: int = 512 * 100) -> None:
    """A close writes back and drops: the file has what was written, and the device reads what is in the file."""
    with open(device, "r+b", buffering=0) as file:
        os.pread(file.fileno(), 4096, at)
        os.pwrite(file.fileno(), mark, at)
    assert os.pread(image, len(mark), at) == mark
    os.pwrite(image, mark[::-1], at)
    with open(device, "rb", buffering=0) as file:
        assert os.pread(file.fileno(), len(mark), at) == mark[::-1]
