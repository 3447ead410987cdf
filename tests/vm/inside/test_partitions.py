"""Partitions by the kernel's own scan: named in the reply, nodes that come and go by themselves, nothing left."""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from host import attach, bound, loopctl, name, run, wait_for

MIB = 1 << 20
ROOTFS = "/srv/container:O"


@pytest.fixture
def grant() -> Iterator[Path]:
    """A directory of loopd's, of root's."""
    yield Path(loopctl("directory", "test").strip())
    loopctl("directory", "--remove", "test")


def numbers(device: str) -> dict[str, tuple[int, int]]:
    """The partitions that the kernel has for a device, with their numbers."""
    found = {}
    for path in Path(f"/sys/block/{name(device)}").glob(f"{name(device)}p*"):
        with contextlib.suppress(FileNotFoundError):  # it goes while it is looked at
            major, minor = (path / "dev").read_text().split(":")
            found[path.name] = (int(major), int(minor))
    return found


def nodes(device: str) -> dict[str, tuple[int, int]]:
    """The nodes of partitions beside the node of a device, with their numbers."""
    found = {}
    for path in Path(device).parent.glob(f"{name(device)}p*"):
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            assert stat.S_ISBLK(status.st_mode)
            found[path.name] = (os.major(status.st_rdev), os.minor(status.st_rdev))
    return found


def follows(device: str, *partitions: int) -> bool:
    """Whether exactly these partitions are there, each with a node of its number."""
    return nodes(device) == numbers(device) and set(nodes(device)) == {f"{name(device)}p{n}" for n in partitions}


# At the bind ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["client", "grant"])
def test_what_the_kernel_finds_is_in_the_reply_and_its_nodes_are_there(disk: Path, grant: Path, where: str) -> None:
    run("sfdisk", "--quiet", disk, text="label: gpt\n,4M\n,4M\n,4M\n")
    folder = grant if where == "grant" else disk.parent / "dev"
    folder.mkdir(exist_ok=True)
    script = f"loopctl attach --partscan --json --directory {folder} {disk} && ls {folder}"
    reply, end = json.JSONDecoder().raw_decode(said := run("sh", "-ec", script))
    device = reply["path"]
    assert reply["partitions"] == [f"{name(device)}p{n}" for n in (1, 2, 3)]
    assert said[end:].split() == sorted([name(device), *reply["partitions"]])
    assert follows(device, 1, 2, 3)
    loopctl("detach", device)
    assert list(folder.iterdir()) == []


def test_they_are_in_the_reply_also_where_no_node_is_made(disk: Path) -> None:
    run("sfdisk", "--quiet", disk, text="label: dos\n,4M\n,4M\n")
    reply = json.loads(loopctl("attach", "--partscan", "--json", "--deliver", "fd", disk))
    assert reply["partitions"] == [f"{reply['devname']}p1", f"{reply['devname']}p2"]
    (lease,) = json.loads(loopctl("list", "--json"))["leases"]
    assert lease["partitions"] == reply["partitions"]
    loopctl("detach", reply["path"])


def test_none_are_looked_for_unless_asked(disk: Path, grant: Path) -> None:
    run("sfdisk", "--quiet", disk, text="label: gpt\n,4M\n")
    device = attach(disk)
    assert nodes(device) == numbers(device) == {}
    assert loopctl("rescan", device).split() == [f"{device}p1"]
    assert follows(device, 1)
    loopctl("detach", device)


# As they come and go ----------------------------------------------------------------------------------------

TOOLS = {
    "sfdisk": (r"printf 'label: gpt\n,4M\n,4M\n' | sfdisk --quiet $device", "sfdisk --quiet --delete $device 1"),
    "parted": (
        # It fails after each step, which is written by then, for it cannot tell the kernel.
        "for step in 'mklabel gpt' 'mkpart one 1MiB 5MiB' 'mkpart two 5MiB 9MiB'; do parted -s $device $step; done",
        "parted --script $device rm 1",
    ),
    "sgdisk": ("sgdisk --new=1:0:+4M --new=2:0:+4M $device", "sgdisk --delete=1 $device"),
}
# Into a file: of what a container prints last, podman has been seen to lose a line.
IN_CONTAINER = """
set -eu
exec >said
awk '/^CapEff/ {{ print $2 }}' /proc/self/status
for folder in /dev/loopd /dev; do
    rm -f disk.img
    truncate -s 16M disk.img
    device=$(loopctl attach --partscan --directory $folder disk.img)
    {first} || :
    timeout 60 sh -c "until [ -b ${{device}}p1 ] && [ -b ${{device}}p2 ]; do sleep 0.05; done"
    stat -c '%n %t:%T' $device*
    {second} || :
    timeout 60 sh -c "until [ ! -e ${{device}}p1 ] && [ -b ${{device}}p2 ]; do sleep 0.05; done"
    stat -c '%n %t:%T' $device*
    echo $(cat /sys/block/${{device##*/}}/${{device##*/}}p2/size) $(blockdev --getsz ${{device}}p2)
    loopctl detach $device
    ls $folder | grep -c ${{device##*/}} || :
done
"""


@pytest.mark.sample(3)
@pytest.mark.deadline(240)
@pytest.mark.parametrize("tool", TOOLS)
def test_after_a_tool_in_a_container_without_a_command(folder: Path, grant: Path, tool: str) -> None:
    """Its own re-read fails, for it has no CAP_SYS_ADMIN. With loopd's directory, and with the container's own /dev."""
    first, second = TOOLS[tool]
    (folder / "script").write_text(IN_CONTAINER.format(first=first, second=second))
    command = ["podman", "run", "--rm", "--log-driver=none", "--network=none", "--cap-drop=MKNOD"]
    command += ["--device-cgroup-rule=b 7:* rw", "--volume=/run/loopd:/run/loopd:ro", f"--volume={grant}:/dev/loopd:ro"]
    command += [f"--volume=/usr/local/{path}:/usr/local/{path}:ro" for path in ("bin/loopctl", "lib/loopd")]
    command += [f"--volume={folder}:/work", "--workdir=/work", "--rootfs", ROOTFS, "sh", "script"]
    run(*command, timeout=200)
    said = (folder / "said").read_text().splitlines()
    assert int(said.pop(0), 16) & 1 << 21 == 0  # CAP_SYS_ADMIN
    said = [line for line in said if re.match(r"/dev/\S+ \w+:\w+$|\d+( \d+)?$", line)]  # sgdisk and parted talk
    for where in ("/dev/loopd", "/dev"):
        disk, one, two, disk_again, two_again, sizes, left = said[:7]
        del said[:7]
        device = disk.split()[0]
        assert re.fullmatch(rf"{where}/loop\d+", device)
        assert disk_again == disk
        assert [line.split()[0] for line in (one, two, two_again)] == [f"{device}p1", f"{device}p2", f"{device}p2"]
        # The rule allows no partition of the kernel's: a window opens, which is as long.
        assert two_again.split()[1].startswith("7:")
        assert two_again == two
        assert sizes == f"{4 * MIB // 512} {4 * MIB // 512}"
        assert left == "0"
    assert said == []


def test_a_node_whose_partition_has_another_number_is_replaced(disk: Path, grant: Path) -> None:
    device = loopctl("attach", "--partscan", "--directory", grant, disk).strip()
    run("sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", device, text="label: gpt\n,4M\n,4M\n,4M\n")
    wait_for("three partitions", lambda: follows(device, 1, 2, 3))
    before = nodes(device)
    # Of the numbers that are free the kernel takes the lowest, or new ones, as long as the old ones are not free yet.
    run("sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", "--delete", device, "1")
    wait_for("two partitions", lambda: follows(device, 2, 3))
    assert nodes(device)[f"{name(device)}p3"] != before[f"{name(device)}p3"]
    loopctl("detach", device)


def test_rescan_on_request(disk: Path, grant: Path) -> None:
    """Where nobody has closed the node since the table was written, so that loopd could not know."""
    device = loopctl("attach", "--partscan", "--directory", grant, disk).strip()
    table = disk.with_name("table")
    with table.open("wb") as file:
        file.truncate(16 * MIB)
    run("sfdisk", "--quiet", table, text="label: dos\nstart=2048, size=4M\nstart=12M, size=2M\n")
    with open(device, "r+b", buffering=0) as node:
        for content, partitions in ((table.read_bytes()[:512], (1, 2)), (bytes(512), ())):
            os.pwrite(node.fileno(), content, 0)
            assert loopctl("rescan", device).split() == [f"{device}p{n}" for n in partitions]
            assert follows(device, *partitions)
    loopctl("detach", device)


def test_a_partition_in_use_is_left_alone(disk: Path, grant: Path) -> None:
    run("sfdisk", "--quiet", disk, text="label: gpt\n,4M\n")
    device = loopctl("attach", "--partscan", "--directory", grant, disk).strip()
    run("mkfs.ext4", "-q", f"/dev/{name(device)}p1")
    mounted = disk.parent / "mounted"
    mounted.mkdir()
    run("mount", f"/dev/{name(device)}p1", mounted)
    try:
        run("sfdisk", "--quiet", "--force", "--no-reread", "--no-tell-kernel", "--append", device, text=",4M\n")
        told = run("sh", "-c", f"loopctl rescan {device} 2>&1; echo status $?")
        assert "a partition is in use" in told
        assert follows(device, 1)
    finally:
        run("umount", mounted)
    run("sh", "-c", f": <>{device}")  # a close after which loopd looks once more
    wait_for("the second partition", lambda: follows(device, 1, 2))
    loopctl("detach", device)


# Nothing is left --------------------------------------------------------------------------------------------


@pytest.mark.sample(2)
@pytest.mark.parametrize("options", [(), ("--partscan",)], ids=["without partscan", "with partscan"])
def test_left_over_partitions_do_not_survive_the_detach(disk: Path, options: tuple[str, ...]) -> None:
    """They were added by hand, and somebody still has the device open, so that it stays in existence."""
    device = attach(disk, *options)
    # By the host's own node, which loopd does not watch.
    run("sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", f"/dev/{name(device)}", text="label: gpt\n,4M\n")
    run("partx", "--add", f"/dev/{name(device)}")
    assert set(numbers(device)) == {f"{name(device)}p1"}
    with open(f"/dev/{name(device)}", "rb"):
        run("loopctl", "detach", "--wait=0", device, check=False)
        assert bound()
        assert numbers(device) == {}
    wait_for("the device is gone", lambda: not bound())


@pytest.mark.deadline(240)
def test_left_over_partitions_of_an_idle_device_do_not_meet_the_next_file(disk: Path) -> None:
    """What the host's losetup and partx left on a device of loopd's: kernels before 7.2 keep it over the detach."""
    first = attach(disk)  # loopd runs, and has devices ready
    other = disk.with_name("other.img")
    with other.open("wb") as file:
        file.truncate(16 * MIB)
    run("sfdisk", "--quiet", other, text="label: gpt\n,4M\n")
    ready = sorted(int(path.name[4:]) for path in Path("/sys/block").glob("loop*"))
    idle = [f"loop{number}" for number in ready if number > int(name(first)[4:])][:2]
    assert idle
    for device in idle:
        run("losetup", f"/dev/{device}", other)
        run("partx", "--add", f"/dev/{device}")
        run("losetup", "--detach", f"/dev/{device}")
    wait_for("they are idle again", lambda: set(bound()) == {name(first)})
    left = {device for device in idle if numbers(device)}
    devices: list[str] = []
    while not {name(device) for device in devices} & (left or set(idle)):
        assert len(devices) < len(ready), "none of them was taken"
        devices.append(attach(disk))
        assert numbers(devices[-1]) == {}
    loopctl("detach", first, *devices)


KEEPER = """
import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
pinned = os.open(sys.argv[1], os.O_PATH)

def opens():
    try:
        with open(f"/proc/self/fd/{pinned}", "rb") as node:
            return f"reads {node.read(6)}"
    except OSError as error:
        return error.strerror

def fails(call, *arguments):
    try:
        call(*arguments)
    except OSError as error:
        return error.strerror
    return "done"

node = sys.argv[1]
print(opens(), "|", fails(os.link, node, node + "x"), "|", fails(os.rename, node, node + "x"), "|",
      fails(os.chmod, node, 0o666), flush=True)
signal.sigwait([signal.SIGUSR1])
print(opens(), "|", fails(os.chmod, f"/proc/self/fd/{pinned}", 0o666), flush=True)
"""


@pytest.mark.deadline(240)
def test_a_stale_partition_node_never_reads_the_next_files_data(disk: Path, grant: Path) -> None:
    """A user kept the node of its partition, as root of a user namespace, and another's partition got the number."""
    builders = ["setpriv", "--reuid=builder", "--regid=builder", "--groups=loopd"]
    own = Path(run(*builders, "loopctl", "directory", "stale").strip())
    os.chown(disk, 1000, 1000)
    secret = disk.with_name("secret.img")
    with secret.open("wb") as file:
        file.truncate(16 * MIB)
        file.seek(MIB)
        file.write(b"SECRET")
    for path in (disk, secret):
        run("sfdisk", "--quiet", path, text="label: gpt\n,4M\n")
    device = run(*builders, "loopctl", "attach", "--partscan", "--directory", own, disk).strip()
    number = numbers(device)[f"{name(device)}p1"]
    command = [*builders, "unshare", "-Urm", sys.executable, "-c", KEEPER, f"{device}p1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as keeper:
        try:
            assert keeper.stdout is not None
            before, *kept = keeper.stdout.readline().strip().split(" | ")
            assert before == f"reads {bytes(6)}"
            assert "done" not in kept
            run(*builders, "loopctl", "detach", "--wait=30", device)
            for _ in range(10):
                other = loopctl("attach", "--partscan", "--directory", grant, secret).strip()
                if numbers(other)[f"{name(other)}p1"] == number:
                    break
                loopctl("detach", other)
            assert numbers(other)[f"{name(other)}p1"] == number
            assert Path(f"{other}p1").read_bytes()[:6] == b"SECRET"
            pid = int(run("pgrep", "--parent", str(keeper.pid), check=False) or keeper.pid)
            os.kill(pid, 10)
            assert keeper.stdout.readline().strip() == "Permission denied | Operation not permitted"
        finally:
            keeper.kill()
    loopctl("detach", other)
    run(*builders, "loopctl", "directory", "--remove", "stale")


# Sizes and sectors ------------------------------------------------------------------------------------------


def test_sectors_of_4096_bytes(disk: Path, grant: Path) -> None:
    device = loopctl("attach", "--partscan", "--sector-size=4096", "--directory", grant, disk).strip()
    run("sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", device, text="label: gpt\n,4M\n,\n")
    wait_for("two partitions", lambda: follows(device, 1, 2))
    for number in (1, 2):
        assert run("blockdev", "--getss", f"/dev/{name(device)}p{number}") == "4096\n"
    assert Path(f"/sys/block/{name(device)}/{name(device)}p1/start").read_text() == f"{256 * 8}\n"
    run("mkfs.ext4", "-q", "-L", "four", f"/dev/{name(device)}p2")
    loopctl("detach", device)
    assert disk.read_bytes()[4096:4104] == b"EFI PART"
    other = run("losetup", "--find", "--show", "--partscan", "--sector-size=4096", "--read-only", disk).strip()
    try:
        run("udevadm", "settle")  # where it looks meanwhile, a kernel scans twice, and they are gone in between
        wait_for("the host's node", Path(f"{other}p2").exists)
        assert run("blkid", "-p", "-o", "value", "-s", "LABEL", f"{other}p2") == "four\n"
    finally:
        run("losetup", "--detach", other)


def test_a_partition_in_the_room_that_the_file_grew_by(disk: Path, grant: Path) -> None:
    run("sfdisk", "--quiet", disk, text="label: dos\n,\n")
    device = loopctl("attach", "--partscan", "--directory", grant, disk).strip()
    os.truncate(disk, 32 * MIB)
    assert loopctl("resize", device) == f"{32 * MIB}\n"
    assert run("blockdev", "--getsize64", device) == f"{32 * MIB}\n"
    run("sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", "--append", device, text=",\n")
    wait_for("two partitions", lambda: follows(device, 1, 2))
    assert int(Path(f"/sys/block/{name(device)}/{name(device)}p2/size").read_text()) * 512 == 16 * MIB
    loopctl("detach", device)


# Direct I/O -------------------------------------------------------------------------------------------------

FILE_SYSTEMS = ("ext4", "xfs", "btrfs", "tmpfs", "overlay")


@pytest.fixture
def mounted(folder: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system of that type."""
    kind, point = request.param, folder / "mounted"
    point.mkdir()
    if kind == "tmpfs":
        run("mount", "-t", "tmpfs", "test", point)
    elif kind == "overlay":
        layers = [folder / part for part in ("lower", "upper", "work")]
        for layer in layers:
            layer.mkdir()
        run("mount", "-t", "overlay", "-o", "lowerdir={},upperdir={},workdir={}".format(*layers), "test", point)
    else:
        with (folder / "fs.img").open("wb") as file:
            file.truncate(512 * MIB)
        # What the oldest kernel can mount, under its newer userland.
        old = kind == "xfs" and os.uname().release.startswith("5.10.")
        options = ("-c", "options=/usr/share/xfsprogs/mkfs/lts_5.10.conf") if old else ()
        run(f"mkfs.{kind}", "-q", *options, folder / "fs.img")
        run("mount", "-o", "loop", folder / "fs.img", point)
    yield point
    run("umount", point)


@pytest.mark.sample(3)
@pytest.mark.parametrize("mounted", FILE_SYSTEMS, indirect=True)
def test_direct_io_in_its_three_values(mounted: Path, grant: Path, request: pytest.FixtureRequest) -> None:
    """What the reply says is what the kernel does; "on" is granted or refused, never silently dropped."""
    disk = mounted / "disk.img"
    with disk.open("wb") as file:
        file.truncate(4 * MIB)

    def effective(value: str) -> bool:
        """What is in force; where it is refused, False."""
        told = run("sh", "-c", f"loopctl attach --json --direct-io={value} --directory {grant} {disk} 2>&1 || :")
        if value == "on" and told.startswith("loopctl: "):
            assert "direct-io" in told.replace("_", "-")
            return False
        reply = json.loads(told)
        assert reply["direct_io"] is bool(int(Path(f"/sys/block/{reply['devname']}/loop/dio").read_text()))
        run("dd", "if=/dev/zero", f"of={reply['path']}", "bs=4096", "count=1", "conv=fsync", "status=none")
        loopctl("detach", reply["path"])
        return bool(reply["direct_io"])

    can = effective("auto")
    assert effective("on") is can
    assert not effective("off")
    if request.node.callspec.params["mounted"] in ("ext4", "xfs"):
        assert can
