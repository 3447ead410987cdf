"""``loopctl doctor``, in containers that lack one thing each: the line of that layer says so, with a remedy."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.daemon import configured, eventually, require
from support.processes import LANDLOCK
from support.world import BWRAP, MIB, PYTHON, UID, UNSHARED, World, as_user, is_devtmpfs, world_fixture  # noqa: F401

from loopd.cli import trial
from loopd.client import layers
from loopd.loop import Loop
from loopd.protocol import wire

LAYERS = (
    "socket",
    "group",
    "directory",
    "nodev",
    "user namespace",
    "device cgroup",
    "lsm",
    "device",
    "partitions",
    "CAP_MKNOD",
)
AT_TIMES = ("loop.max_loop", "numbers")
"""The first on the host alone, the other with a directory of loopd's."""


class Report:
    """What the doctor said: the level and the text of each layer, one line each."""

    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        lines = [
            re.fullmatch(r"(OK  |WARN|FAIL)  ([\w. ]+): (.+)", line) for line in done.stdout.splitlines()
        ]
        assert None not in lines, done.stdout
        assert done.stderr == ""
        self.found = {line[2]: (line[1].strip(), line[3]) for line in lines if line}
        assert len(self.found) == len(lines)
        assert tuple(name for name in self.found if name not in AT_TIMES) == LAYERS
        self.failed = [name for name, (level, _) in self.found.items() if level == "FAIL"]
        assert done.returncode == bool(self.failed)

    def __getitem__(self, layer: str) -> tuple[str, str]:
        return self.found[layer]


def examined(world: World, *wrapper: str, uid: int = UID, **env: str) -> Report:
    return Report(world.run([*as_user(uid), *wrapper, "loopctl", "doctor"], check=False, **env))


def test_a_container_that_has_all_it_needs(world: World) -> None:
    require(shutil.which("bwrap"), "needs bwrap (package bubblewrap)")
    report = examined(world, *BWRAP, "--dev-bind", str(world.grant("build")), "/dev/loopd")
    assert report.failed == []
    found = dict(report.found)
    level, text = found.pop("partitions")
    if reads_tables(world):
        assert (level, "p1 opens: the kernel's partition" in text) == ("OK", True)
    else:
        assert (level, "CONFIG_MSDOS_PARTITION" in text) == ("WARN", True)
    assert {level for level, _ in found.values()} == {"OK"}
    assert "/dev/loopd is a directory of loopd's" in report["directory"][1]
    assert re.search(r"owns 8 device numbers, loop\d+ the first; 0 are in use", report["numbers"][1])
    assert re.search(r"/dev/loopd/loop\d+ opens", report["device"][1])
    assert "loop.max_loop" not in report.found  # the host's business


def reads_tables(world: World) -> bool:
    """Whether this kernel finds the partition of the table that the doctor's device has."""
    image = world.image("table.img", trial.SIZE)
    with image.open("r+b") as file:
        file.write(trial.table())
    device = Path(world.ctl("attach", "-P", "--lifetime", os.getpid(), image).stdout.strip())
    found = Path(f"/sys/block/{device.name}/{device.name}p1").exists()
    world.ctl("detach", device)
    return found


def test_the_table_is_what_others_read_too(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(trial.table().ljust(trial.SIZE, b"\0"))
    done = subprocess.run(["sfdisk", "--json", image], check=True, capture_output=True, text=True)
    found = json.loads(done.stdout)["partitiontable"]
    assert (found["label"], found["sectorsize"]) == ("dos", trial.SECTOR)
    (partition,) = found["partitions"]
    assert (partition["start"], partition["size"], partition["type"]) == (trial.START, trial.SECTORS, "83")


def test_the_host(world: World) -> None:
    require(is_devtmpfs("/dev"), "needs a devtmpfs at /dev")
    report = examined(world, uid=0)
    assert report.failed == []
    assert re.search(r"/dev/loop\d+ opens", report["device"][1])
    assert report["CAP_MKNOD"][0] == "OK"
    given = "loop.max_loop=" in Path("/proc/cmdline").read_text() or "\nloop " in modules()
    assert report["loop.max_loop"][0] == "WARN" or given


def modules() -> str:
    try:
        return "\n" + Path("/proc/modules").read_text()
    except FileNotFoundError:  # a kernel without modules
        return ""


def test_a_daemon_that_is_not_there(world: World) -> None:
    report = examined(world, LOOPD_SOCKET="/nonexistent/loopd.sock")
    assert {"socket", "device"} <= set(report.failed)
    assert "systemctl enable --now loopd.socket" in report["socket"][1]
    assert report["group"][0] == report["device cgroup"][0] == report["lsm"][0] == "WARN"


def test_a_socket_that_is_not_for_this_user(world: World) -> None:
    """The group by its number, where that is one for a runtime; what is said then works."""
    os.chown(world.daemon.path, 0, 991)
    os.chmod(world.daemon.path, 0o660)
    report = examined(world)
    assert {"socket", "group", "device"} <= set(report.failed)
    assert "--group-add=991" in report["group"][1]
    assert "keep-groups" not in report["group"][1]
    (said,) = re.findall(r"setpriv \S+ \S+ \S+", report["group"][1])
    assert said == f"setpriv --reuid={UID} --regid={UID} --groups=991"
    assert "loopd 0." in world.run([*said.split(), "loopctl", "hello"]).stdout

    report = examined(world, "unshare", "--user", "--map-root-user")
    assert "--group-add keep-groups" in report["group"][1]
    assert "--group-add=" not in report["group"][1]


def test_a_socket_that_something_else_denies(world: World) -> None:
    """Its mode allows it, so that OK for the group would be beside the point."""
    denied = ["strace", "--quiet=all", "--output=/dev/null", "--inject=connect:error=EACCES"]
    require(shutil.which("strace"), "needs strace")
    report = examined(world, *denied, LOOPD_DIRECTORY=str(world.grant("build")))
    assert {"socket", "device"} == set(report.failed)
    assert report["group"][0] == "WARN"
    assert "policy module" in report["group"][1]
    assert "label=disable" in report["group"][1]


def test_the_administrators_socket_as_a_user(world: World) -> None:
    grant = str(world.grant("build"))
    link = world.folder / "admin.sock"
    link.symlink_to(world.daemon.admin)
    os.chmod(world.daemon.admin, 0o600)
    report = examined(world, LOOPD_SOCKET=str(link), LOOPD_DIRECTORY=grant)
    assert set(report.failed) == {"socket", "group", "device"}
    assert report["group"][1].endswith("; you are not root: sudo loopctl ...")
    # In a folder of root's own, as that of the host.
    private = world.folder / "private"
    private.mkdir(mode=0o700)
    link.rename(private / "admin.sock")
    report = examined(world, LOOPD_SOCKET=str(private / "admin.sock"), LOOPD_DIRECTORY=grant)
    assert set(report.failed) == {"socket", "device"}
    assert report["socket"][1].endswith("; you are not root: sudo loopctl ...")


def test_a_directory_that_is_missing(world: World) -> None:
    own = world.work / "dev"
    own.mkdir()
    os.chown(own, UID, UID)
    require(shutil.which("bwrap"), "needs bwrap (package bubblewrap)")
    report = examined(world, *BWRAP, "--dev-bind", str(own), "/dev/loopd")
    assert report.failed == []
    assert report["directory"][0] == "WARN"
    assert layers.BIND in report["directory"][1]


def test_a_directory_of_another_user(world: World) -> None:
    """As root has made it, for example, for a container that is not root's."""
    require(shutil.which("bwrap"), "needs bwrap (package bubblewrap)")
    wrapper = [*BWRAP, "--dev-bind", str(world.grant("build", 0)), "/dev/loopd"]
    report = examined(world, *wrapper)
    assert {"directory", "device"} <= set(report.failed)
    assert f"not for uid {UID}" in report["directory"][1]
    assert "without sudo" in report["directory"][1]
    remedy = f"root makes one for this user by `loopctl directory --user={UID} NAME`"
    assert remedy in report["directory"][1]
    # The host's number in a user namespace, too, where the user has another one.
    inside = examined(world, *UNSHARED, LOOPD_DIRECTORY=str(world.grants / "0-build"))
    assert inside["directory"][1].startswith(f"{world.grants}/0-build: it is not for uid 0; ")
    assert remedy in inside["directory"][1]
    image = world.image(size=MIB)
    done = world.run([*as_user(UID), *wrapper, "loopctl", "attach", str(image)], check=False)
    assert f"loopctl: /dev/loopd: it is not for uid {UID}; " in done.stderr


def test_a_socket_that_could_be_replaced(world: World) -> None:
    """Its directory is the client's to write in, as it is that of root in a rootful container."""
    folder = str(Path(world.daemon.path).parent)
    os.chown(folder, UID, UID)
    report = examined(world, *BWRAP, "--bind", folder, folder)
    assert report["group"][0] == "WARN"
    assert "read-only" in report["group"][1]
    assert examined(world, *BWRAP)["group"][0] == "OK"


def test_a_directory_that_can_be_written(world: World) -> None:
    """Bound in without :ro, where root of the container is the host's."""
    report = examined(world, uid=0, LOOPD_DIRECTORY=str(world.grant("build", 0)))
    assert report.failed == []
    assert report["directory"][0] == "WARN"
    assert "read-only" in report["directory"][1]


NO_SYS_ADMIN = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"]


def test_a_directory_on_a_mount_with_nodev(world: World) -> None:
    grant = str(world.grant("build"))
    bind = f'mount --bind {grant} /mnt && mount -o remount,bind,nodev /mnt && exec "$@"'
    enter = [*UNSHARED, "sh", "-ec", bind, "sh"]
    report = examined(world, *enter, *NO_SYS_ADMIN, LOOPD_DIRECTORY="/mnt")
    assert {"nodev", "device"} <= set(report.failed)
    assert ":dev" in report["nodev"][1]
    # Where the device comes as a mount, it works all the same.
    report = examined(world, *enter, LOOPD_DIRECTORY="/mnt", TMPDIR=str(world.work))
    assert report.failed == []
    assert report["nodev"][0] == "WARN"
    assert ":dev" in report["nodev"][1]


def test_a_dev_of_a_user_namespace(world: World) -> None:
    """With CAP_SYS_ADMIN in it, loopctl attaches a mount; without, nothing works."""
    enter = [*UNSHARED, "sh", "-ec", 'mount -t tmpfs none /mnt && exec "$@"', "sh"]
    report = examined(world, *enter, LOOPD_DIRECTORY="/mnt", TMPDIR="/mnt")
    assert report["user namespace"][0] == "OK"
    assert "mount" in report["user namespace"][1]
    assert report["CAP_MKNOD"][0] == "OK"
    report = examined(world, *enter, *NO_SYS_ADMIN, LOOPD_DIRECTORY="/mnt")
    assert {"user namespace", "device"} <= set(report.failed)
    assert "--cap-add SYS_ADMIN" in report["user namespace"][1]
    denied = ["strace", "--quiet=all", "--output=/dev/null", "--inject=move_mount:error=EPERM"]
    require(shutil.which("strace"), "needs strace")
    report = examined(world, *enter, *denied, LOOPD_DIRECTORY="/mnt", TMPDIR="/mnt")
    assert set(report.failed) == {"user namespace", "device"}
    assert re.search(r"the mount of loop\d+ cannot be attached: Operation not permitted", report["user namespace"][1])


@pytest.fixture(name="denied")
def denied_fixture() -> Iterator[Callable[[str], list[str]]]:
    """Enter a device cgroup that denies something."""
    root = Path("/sys/fs/cgroup/devices")
    require((root / "devices.deny").exists(), "there is no device controller of cgroup v1")
    cgroup = root / f"loopd-test-doctor-{os.getpid()}"
    cgroup.mkdir()

    def enter(rule: str) -> list[str]:
        (cgroup / "devices.deny").write_text(rule)
        return ["sh", "-ec", f'echo $$ >{cgroup}/cgroup.procs && exec "$@"', "sh"]

    try:
        yield enter
    finally:
        cgroup.rmdir()


def test_a_device_cgroup_that_denies_loop_devices(world: World, denied: Callable[[str], list[str]]) -> None:
    report = examined(
        world, *denied("b 7:* w"), *as_user(UID), uid=0, LOOPD_DIRECTORY=str(world.grant("build"))
    )
    assert {"device cgroup", "device"} == set(report.failed)
    assert "--device-cgroup-rule 'b 7:* rw'" in report["device cgroup"][1]
    assert '--device="$(loopctl directory --cdi NAME)"' in report["device cgroup"][1]
    assert report["lsm"][0] == report["partitions"][0] == "WARN"


LOCKED = [PYTHON, "-c", f"{LANDLOCK}\nimport sys\nos.execvp(sys.argv[1], sys.argv[1:])"]


@pytest.mark.parametrize("enter", [[], UNSHARED], ids=["a user", "a user namespace"])
def test_a_security_module_that_denies_the_node(world: World, enter: list[str]) -> None:
    """In a directory of loopd's, whose access list tells that permissions are not the reason."""
    report = examined(world, *enter, *LOCKED, LOOPD_DIRECTORY=str(world.grant("build")))
    assert {"lsm", "device"} == set(report.failed)
    assert "label=disable" in report["lsm"][1]
    assert "policy module" in report["lsm"][1]
    assert report["device cgroup"][0] == "WARN"


def test_a_container_that_may_make_nodes(world: World) -> None:
    enter = ["unshare", "--mount", "--propagation", "private", "sh", "-ec"]
    report = examined(world, *enter, 'mount -t tmpfs none /dev && exec "$@"', "sh", uid=0)
    assert report.failed == []
    assert report["CAP_MKNOD"][0] == "WARN"
    assert "--cap-drop MKNOD" in report["CAP_MKNOD"][1]
    enter = [*enter, 'mount -t tmpfs none /dev && exec "$@"', "sh", "setpriv", "--bounding-set=-mknod"]
    assert examined(world, *enter, uid=0)["CAP_MKNOD"][0] == "OK"


def test_a_container_that_may_make_nodes_and_open_none_of_them(
    world: World, denied: Callable[[str], list[str]]
) -> None:
    """As with rules for the numbers of a directory alone."""
    enter = [*denied("b 7:0 rw"), "unshare", "--mount", "--propagation", "private", "sh", "-ec"]
    report = examined(world, *enter, 'mount -t tmpfs none /dev && exec "$@"', "sh", uid=0)
    assert report.failed == []
    assert report["CAP_MKNOD"][0] == "OK"
    assert "single ones" in report["CAP_MKNOD"][1]


def restarted(world: World, policy: str) -> None:
    """The daemon anew, with this configuration."""
    world.daemon.stop()
    world.daemon._options += configured(world.folder, policy)
    Path(world.daemon.admin).unlink()
    world.daemon.start()


def test_a_client_that_may_not_have_the_right_to_make_nodes(world: World) -> None:
    restarted(world, "allow.mknod = false\n")
    enter = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", 'mount -t tmpfs none /dev && exec "$@"']
    report = examined(world, *enter, "sh", uid=0)
    assert {"CAP_MKNOD", "device"} == set(report.failed)
    assert "--cap-drop MKNOD" in report["CAP_MKNOD"][1]


# Numbers and partitions -----------------------------------------------------------------------------------------------


def of_numbers(world: World, path: str, words: str) -> Report:
    """The report that says this of numbers. The number that the doctor itself had before is in use a moment longer."""

    def look() -> Report | None:
        report = examined(world, uid=0, LOOPD_DIRECTORY=path)
        return report if words in report["numbers"][1] else None

    report: Report = eventually(look, words)
    return report


def test_the_numbers_of_a_directory(world: World) -> None:
    granted = world.daemon.ask(wire.Directory("build", 0, devices=2), []).fields
    path, first = granted["path"], f"loop{granted['numbers'][0]}"
    report = examined(world, uid=0, LOOPD_DIRECTORY=path)
    assert report["numbers"][0] == "OK", report["numbers"]
    hold = ["loopctl", "attach", "--lifetime", str(os.getpid()), str(world.image(size=MIB))]
    for in_use, failed in ((1, []), (2, ["numbers", "device"])):
        device = world.run(hold, LOOPD_DIRECTORY=path).stdout.strip()
        assert device.startswith(f"{path}/loop")
        words = f"owns 2 device numbers, {first} the first; {in_use} are in use"
        words = "all 2 device numbers of this directory are in use" if failed else words
        report = of_numbers(world, path, words)
        assert report["numbers"][0] == ("FAIL" if failed else "WARN")
        assert "loopctl directory --devices" in report["numbers"][1]
        if not reads_tables(world):  # else the window has no number left
            assert report.failed == failed
    world.run(["loopctl", "detach", "--all"], LOOPD_DIRECTORY=path)


def test_a_directory_without_numbers(world: World) -> None:
    """Of an earlier loopd."""
    path = world.grants / "0-old"
    path.mkdir(mode=0o700)
    report = examined(world, uid=0, LOOPD_DIRECTORY=str(path))
    assert report["numbers"][0] == "WARN"
    assert "each attach takes a new one" in report["numbers"][1]


def test_a_client_that_may_not_have_partitions(world: World) -> None:
    restarted(world, "allow.partscan = false\n")
    report = examined(world, LOOPD_DIRECTORY=str(world.grant("build")))
    assert report.failed == []
    assert report["device"][0] == "OK"
    assert report["partitions"][0] == "WARN"
    assert "allow.partscan" in report["partitions"][1]


LOOK = """
import os, sys
sys.path.insert(0, sys.argv[1])
from loopd.cli import doctor, trial
from loopd.client import api as client
fd = os.memfd_create("image")
os.ftruncate(fd, trial.SIZE)
with client.Client().attach(fd, partscan=True) as device:
    print(device.path, flush=True)
    sys.stdin.readline()
    seen = trial.Trial(device.path, partition=trial.look(f"{device.path}p1"))
    for finding in doctor._opening(doctor._place(), seen):
        print(finding)
"""


def partitioned(world: World, *wrapper: str, folder: str, uid: int = UID, **env: str) -> dict[str, tuple[str, str]]:
    """What the doctor says of a device with a partition: no kernel refuses BLKPG, and not every kernel reads tables."""
    command = [*as_user(uid), *wrapper, PYTHON, "-I", "-c", LOOK, str(world.folder / "lib")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**world.environment, **env}
    ) as process:
        assert process.stdout is not None
        name = Path(process.stdout.readline().strip()).name
        with Loop(int(name[4:])) as loop:
            loop.add_partition(1, trial.START * trial.SECTOR, trial.SECTORS * trial.SECTOR)
        eventually(Path(folder, f"{name}p1").exists, "the node of the partition")
        told, _ = process.communicate("go\n", 60)
    assert process.returncode == 0
    found = {}
    for line in told.splitlines():
        level, layer, text = re.fullmatch(r"(\w+) +([\w ]+): (.*)", line).groups()  # type: ignore[union-attr]
        found[layer] = (level, text)
    return found


def test_windows(world: World) -> None:
    """For a user of the host, who could keep a node of the kernel's partition."""
    grant = str(world.grant("build"))
    found = partitioned(world, folder=grant, LOOPD_DIRECTORY=grant)
    assert {level for level, _ in found.values()} == {"OK"}
    assert "p1 opens: a loop device on that part of the image" in found["partitions"][1]
    assert "grub-install" in found["partitions"][1]
    assert "allow.kernel_partitions" in found["partitions"][1]


def test_the_kernels_partitions_in_a_user_namespace(world: World) -> None:
    grant = str(world.grant("build"))
    found = partitioned(world, *UNSHARED, folder=grant, LOOPD_DIRECTORY=grant)
    assert {level for level, _ in found.values()} == {"OK"}
    assert "p1 opens: the kernel's partition, whose node loopd can close" in found["partitions"][1]


def test_the_kernels_partitions_for_the_hosts_root(world: World) -> None:
    require(is_devtmpfs("/dev"), "needs a devtmpfs at /dev")
    found = partitioned(world, folder="/dev", uid=0)
    assert found["partitions"][0] == "OK"
    assert "p1 opens: the kernel's partition, as root of the host has it" in found["partitions"][1]


def test_the_kernels_partitions_as_the_administrator_allows(world: World) -> None:
    restarted(world, "allow.kernel_partitions = true\n")
    grant = str(world.grant("build"))
    found = partitioned(world, folder=grant, LOOPD_DIRECTORY=grant)
    assert found["partitions"][0] == "OK"
    assert "p1 opens: the kernel's partition, as the administrator allows" in found["partitions"][1]


def test_a_device_cgroup_that_denies_the_kernels_partitions(world: World, denied: Callable[[str], list[str]]) -> None:
    """The device opens, and it is not said that the device cgroup refuses nothing."""
    restarted(world, "allow.kernel_partitions = true\n")
    grant = str(world.grant("build"))
    enter = [*denied("b 259:* rw"), *as_user(UID)]
    found = partitioned(world, *enter, folder=grant, uid=0, LOOPD_DIRECTORY=grant)
    assert {layer: level for layer, (level, _) in found.items()} == {
        "device cgroup": "FAIL", "lsm": "WARN", "device": "OK", "partitions": "FAIL",
    }  # fmt: skip
    for layer in ("device cgroup", "partitions"):
        assert "p1 cannot be opened: the device cgroup of this container denies it" in found[layer][1]
        assert "--offset" in found[layer][1]
        assert "--device-cgroup-rule" not in found[layer][1]  # the major is that of NVMe disks, too


# What is printed ------------------------------------------------------------------------------------------------------


def test_as_json(world: World) -> None:
    os.chmod(world.daemon.path, 0o600)
    done = world.ctl("doctor", "--json", uid=UID, check=False)
    assert done.returncode == 1
    found = json.loads(done.stdout)["findings"]
    assert all(list(row) == ["level", "layer", "text", "remedy"] for row in found)
    lines = world.ctl("doctor", uid=UID, check=False).stdout.splitlines()
    for row, line in zip(found, lines, strict=True):
        assert line == f"{row['level']:4}  {row['layer']}: {row['text']}" + (row["remedy"] and f"; {row['remedy']}")
    assert {row["layer"] for row in found if row["level"] == "FAIL"} >= {"socket", "group", "device"}


def test_nothing_is_left_of_it(world: World) -> None:
    world.image(size=MIB)
    examined(world, uid=0)
    assert world.ctl("list").stdout == ""
    assert sorted(path.name for path in world.work.iterdir()) == ["disk.img"]
