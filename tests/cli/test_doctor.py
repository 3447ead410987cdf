"""``loopctl doctor``, in containers that lack one thing each: the line of that layer says so, with a remedy."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.daemon import require
from support.processes import LANDLOCK
from test_deliveries import BWRAP, MIB, PYTHON, UID, UNSHARED, World, as_user, is_devtmpfs, world

from loopd.client import layers

__all__ = ["world"]  # a fixture

LAYERS = (
    "socket",
    "group",
    "directory",
    "nodev",
    "user namespace",
    "device cgroup",
    "lsm",
    "device",
    "CAP_MKNOD",
)


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
        assert tuple(name for name in self.found if name != "loop.max_loop") == LAYERS
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
    assert [level for level, _ in report.found.values()] == ["OK"] * len(LAYERS)
    assert "/dev/loopd is a directory of loopd's" in report["directory"][1]
    assert re.search(r"/dev/loopd/loop\d+ opens", report["device"][1])
    assert "loop.max_loop" not in report.found  # the host's business


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
    os.chmod(world.daemon.path, 0o660)
    report = examined(world)
    assert {"socket", "group", "device"} <= set(report.failed)
    assert "--group-add keep-groups" in report["group"][1]


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


def test_a_directory_on_a_mount_with_nodev(world: World) -> None:
    grant = str(world.grant("build"))
    bind = f'mount --bind {grant} /mnt && mount -o remount,bind,nodev /mnt && exec "$@"'
    report = examined(world, *UNSHARED, "sh", "-ec", bind, "sh", LOOPD_DIRECTORY="/mnt")
    assert report["nodev"][0] == "FAIL"
    assert ":dev" in report["nodev"][1]


def test_a_dev_of_a_user_namespace(world: World) -> None:
    """With CAP_SYS_ADMIN in it, loopctl attaches a mount; without, nothing works."""
    enter = [*UNSHARED, "sh", "-ec", 'mount -t tmpfs none /mnt && exec "$@"', "sh"]
    report = examined(world, *enter, LOOPD_DIRECTORY="/mnt", TMPDIR="/mnt")
    assert report["user namespace"][0] == "OK"
    assert "mount" in report["user namespace"][1]
    assert report["CAP_MKNOD"][0] == "OK"
    drop = [*enter, "setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"]
    report = examined(world, *drop, LOOPD_DIRECTORY="/mnt")
    assert {"user namespace", "device"} <= set(report.failed)
    assert "--cap-add SYS_ADMIN" in report["user namespace"][1]


@pytest.fixture
def denied() -> Iterator[Path]:
    """A device cgroup that lets no loop device be written."""
    root = Path("/sys/fs/cgroup/devices")
    require((root / "devices.deny").exists(), "there is no device controller of cgroup v1")
    cgroup = root / f"loopd-test-doctor-{os.getpid()}"
    cgroup.mkdir()
    (cgroup / "devices.deny").write_text("b 7:* w")
    try:
        yield cgroup
    finally:
        cgroup.rmdir()


def test_a_device_cgroup_that_denies_loop_devices(world: World, denied: Path) -> None:
    enter = ["sh", "-ec", f'echo $$ >{denied}/cgroup.procs && exec "$@"', "sh", *as_user(UID)]
    report = examined(world, *enter, uid=0, LOOPD_DIRECTORY=str(world.grant("build")))
    assert {"device cgroup", "device"} == set(report.failed)
    assert "--device-cgroup-rule 'b 7:* rw'" in report["device cgroup"][1]
    assert report["lsm"][0] == "WARN"


LOCKED = [PYTHON, "-c", f"{LANDLOCK}\nimport sys\nos.execvp(sys.argv[1], sys.argv[1:])"]


@pytest.mark.parametrize("enter", [[], UNSHARED], ids=["a user", "a user namespace"])
def test_a_security_module_that_denies_the_node(world: World, enter: list[str]) -> None:
    """In a directory of loopd's, whose access list tells that permissions are not the reason."""
    report = examined(world, *enter, *LOCKED, LOOPD_DIRECTORY=str(world.grant("build")))
    assert {"lsm", "device"} == set(report.failed)
    assert "label=disable" in report["lsm"][1]
    assert report["device cgroup"][0] == "WARN"


def test_a_container_that_may_make_nodes(world: World) -> None:
    enter = ["unshare", "--mount", "--propagation", "private", "sh", "-ec"]
    report = examined(world, *enter, 'mount -t tmpfs none /dev && exec "$@"', "sh", uid=0)
    assert report.failed == []
    assert report["CAP_MKNOD"][0] == "WARN"
    assert "--cap-drop MKNOD" in report["CAP_MKNOD"][1]
    enter = [*enter, 'mount -t tmpfs none /dev && exec "$@"', "sh", "setpriv", "--bounding-set=-mknod"]
    assert examined(world, *enter, uid=0)["CAP_MKNOD"][0] == "OK"


def test_nothing_is_left_of_it(world: World) -> None:
    world.image(size=MIB)
    examined(world, uid=0)
    assert world.ctl("list").stdout == ""
    assert sorted(path.name for path in world.work.iterdir()) == ["disk.img"]
