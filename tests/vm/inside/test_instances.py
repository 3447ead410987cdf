"""An instance has a process, a policy, a queue and an identity of its own; all services run as hardened as they say."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from host import (
    ADMIN,
    SERVICE,
    SOCKET,
    Journal,
    attach,
    bound,
    leases,
    loopctl,
    name,
    prop,
    run,
    systemd_version,
    wait_for,
)
from recipes import recipe

INSTANCE = "loopd@build.service"
MOUNT = r"run-loopd\x2ddev.mount"
ROOT = Path("/srv/container")
FOLDER = Path("/run/loopd-build")
POLICY = Path("/etc/loopd/loopd.toml")
NO_SYS_ADMIN = Path("/usr/local/share/doc/loopd/no-sys-admin.conf")
READ_ONLY = "the administrator allows this client read-only devices alone"
CAPABILITIES = {"MKNOD": 27, "SETUID": 7, "SETGID": 6, "SYS_ADMIN": 21}


def build(*arguments: str | Path) -> str:
    """What loopctl says when it asks the instance."""
    return run("loopctl", "--socket", FOLDER / "sock/loopd.sock", *arguments)


def refused(*arguments: str | Path) -> str:
    """What loopctl says of a refusal."""
    command = ["sh", "-c", '"$@" 2>&1; echo status $?', "sh", "loopctl", *map(str, arguments)]
    said = run(*command)
    assert said.strip().endswith("status 1"), said
    return said


def admin() -> list[dict[str, Any]]:
    """Every lease of the instance."""
    listed = run("loopctl", "--socket", FOLDER / "admin.sock", "list", "--json")
    found: list[dict[str, Any]] = json.loads(listed)["leases"]
    return found


@pytest.fixture(scope="module")
def instance() -> Iterator[None]:
    """The instance of the document, started by its commands."""
    run("sh", "-ec", recipe("To start one", page="instances.md"))
    yield
    end()


def end() -> None:
    """End it by the document's commands."""
    commands = recipe("To end it", page="instances.md")
    if systemd_version() < 254:  # documented: `stop` has given the devices up
        commands = commands.replace("systemctl clean", ": systemctl clean")
    run("sh", "-ec", commands)


def reload(*services: str) -> None:
    run("systemctl", "try-reload-or-restart", *services)
    if systemd_version() < 253:  # no Type=notify-reload: systemctl does not wait for the daemon
        time.sleep(2)


@contextmanager
def policy(text: str, *services: str) -> Iterator[None]:
    """Have the running services read this policy, and none afterwards."""
    POLICY.parent.mkdir(exist_ok=True)
    POLICY.write_text(text)
    try:
        reload(*services)
        yield
    finally:
        POLICY.unlink()
        reload(*services)


def nodes_of(disk: Path) -> Path:
    nodes = disk.parent / "dev"
    nodes.mkdir(exist_ok=True)
    return nodes


def mode(path: Path) -> tuple[str, str, str]:
    return f"{stat.S_IMODE(path.stat().st_mode):o}", path.owner(), path.group()


# What is an instance's own ----------------------------------------------------------------------------------------


@pytest.mark.deadline(240)
def test_process_leases_and_identity(instance: None, disk: Path, journal: Journal) -> None:
    """Neither sees the other's leases; the journal tells them apart, and no number is given twice."""
    assert (mode(FOLDER), mode(FOLDER / "sock")) == (("700", "root", "root"), ("755", "root", "root"))
    assert (mode(FOLDER / "sock/loopd.sock")[0], mode(FOLDER / "admin.sock")[0]) == ("666", "600")
    mine = attach(disk)
    theirs = build("attach", "--directory", nodes_of(disk), disk).strip()
    assert name(mine) != name(theirs)
    processes = {prop(service, "MainPID") for service in (SERVICE, INSTANCE)}
    assert len(processes) == 2
    assert "0" not in processes
    assert [lease["devname"] for lease in leases()] == [name(mine)]
    assert [lease["devname"] for lease in admin()] == [name(theirs)]
    assert name(theirs) in refused("detach", theirs)
    assert set(bound()) == {name(mine), name(theirs)}
    build("detach", theirs)
    loopctl("detach", mine)
    found = journal.records("LOOPD_INSTANCE=build")
    assert {record["LOOPD_DEVICE"] for record in found} == {name(theirs)}
    assert {record["_SYSTEMD_UNIT"] for record in found} == {INSTANCE}
    assert all("LOOPD_INSTANCE" not in record for record in journal.records(f"LOOPD_DEVICE={name(mine)}"))


@pytest.mark.deadline(240)
def test_policy(instance: None, disk: Path) -> None:
    """The document's rule is for the instance alone; a reload with a mistake changes nothing, and says so."""
    nodes = nodes_of(disk)
    asked = ("--socket", FOLDER / "sock/loopd.sock", "attach", "--directory", nodes, disk)
    mine = attach(disk)
    loopctl("detach", mine)
    theirs = build("attach", "--read-only", "--directory", nodes, disk).strip()  # held, so that it does not exit
    with policy(recipe("Its rules", "toml", "instances.md"), SERVICE, INSTANCE):
        assert READ_ONLY in refused(*asked)
        loopctl("detach", attach(disk))
        before = Journal()
        POLICY.write_text("limits.surprise = 1\n")
        done = run("sh", "-c", f"systemctl try-reload-or-restart {INSTANCE}; echo status $?")
        assert done.strip() == "status 1"
        time.sleep(2)  # the daemon has been told, and looks for itself
        (record,) = before.records("LOOPD_INSTANCE=build", "LOOPD_EVENT=warned")
        assert f"The old policy stays in force: {POLICY}: limits.surprise: there is no such key" in record["MESSAGE"]
        assert READ_ONLY in refused(*asked)
        checked = run("sh", "-c", "loopd --check-config 2>&1; echo status $?")
        assert f"{POLICY}: limits.surprise: there is no such key" in checked
        assert checked.strip().endswith("status 1")
        build("detach", theirs)


@pytest.mark.sample(2)
@pytest.mark.parametrize("stopped", [SERVICE, INSTANCE])
def test_queue(instance: None, stopped: str) -> None:
    """One does not answer at all: the other feels nothing of it."""
    build("hello")
    loopctl("hello")
    process = int(prop(stopped, "MainPID"))
    os.kill(process, signal.SIGSTOP)
    try:
        served = loopctl if stopped == INSTANCE else build
        for _ in range(2):
            assert served("hello").startswith("loopd ")
    finally:
        os.kill(process, signal.SIGCONT)


@pytest.mark.deadline(240)
def test_a_container(instance: None, folder: Path) -> None:
    """It has the instance's socket in the usual place, and a directory grant that any instance takes."""
    grant = loopctl("directory", "instances").strip()
    script = "truncate -s 8M disk.img; loopctl run --directory /dev/loopd disk.img -- sh -c 'echo mine >{}; echo {}'"
    command = "podman run --rm --log-driver=none --network=none --cap-drop=MKNOD --device-cgroup-rule".split()
    command += ["b 7:* rw", f"--volume={FOLDER}/sock:/run/loopd:ro", f"--volume={grant}:/dev/loopd:ro"]
    for program in ("/usr/local/bin/loopctl", "/usr/local/lib/loopd"):
        command.append(f"--volume={program}:{program}:ro")
    before = Journal()
    try:
        run(*command, f"--volume={folder}:/work", "--workdir=/work", "--rootfs", f"{ROOT}:O", "sh", "-c", script)
        assert (folder / "disk.img").read_bytes()[:5] == b"mine\n"
        assert len(before.records("LOOPD_INSTANCE=build", "LOOPD_EVENT=attached")) == 1
    finally:
        loopctl("directory", "--remove", "instances")


@pytest.mark.deadline(240)
def test_a_group(disk: Path) -> None:
    """The document's drop-in opens an instance to a group, and to nobody else."""
    drop_in = Path("/run/systemd/system/loopd@team.socket.d/group.conf")
    drop_in.parent.mkdir(parents=True)
    drop_in.write_text(recipe("For a user without root", "ini", "instances.md", GROUP="team"))
    run("groupadd", "team")
    run("systemctl", "daemon-reload")
    try:
        run("systemctl", "start", "loopd@team.socket")
        user = ["setpriv", "--reuid=builder", "--regid=builder", "--groups=team"]
        hello = ["loopctl", "--socket", "/run/loopd-team/sock/loopd.sock", "hello"]
        assert run(*user, *hello).startswith("loopd ")
        user[-1] = "--clear-groups"
        assert "ermission denied" in run("sh", "-c", '"$@" 2>&1 || :', "sh", *user, *hello)
    finally:
        run("systemctl", "stop", "loopd@team.socket", "loopd-admin@team.socket", "loopd@team.service")
        drop_in.unlink()
        run("systemctl", "daemon-reload")
        run("groupdel", "team")


@pytest.mark.sample(3)
@pytest.mark.parametrize("taken", ["admin", "dev", "nodes"])
def test_a_name_that_is_taken(taken: str) -> None:
    before = Journal()
    run("systemctl", "start", f"loopd@{taken}.socket", check=False)
    assert prop(f"loopd@{taken}.socket", "ActiveState") == "failed"
    assert f"loopd has a /run/loopd-{taken} already" in before.text("-u", f"loopd@{taken}.socket")
    run("systemctl", "stop", f"loopd@{taken}.socket", f"loopd-admin@{taken}.socket")
    run("systemctl", "reset-failed")
    loopctl("--admin", "list")


def test_the_end_gives_the_devices_up(instance: None, disk: Path) -> None:
    build("attach", "--directory", nodes_of(disk), disk)
    assert len(bound()) == 1
    end()
    wait_for("the device is given up", lambda: not bound(), 10)
    run("sh", "-ec", recipe("To start one", page="instances.md"))


# The mount of the grants ------------------------------------------------------------------------------------------


def test_the_mount_of_the_grants(disk: Path) -> None:
    """The service starts it, and it outlives the service; it is not nodev, and it is loopd's."""
    path = loopctl("directory", "mine").strip()
    try:
        assert prop(MOUNT, "ActiveState") == "active"
        options = run("findmnt", "--noheadings", "--output=OPTIONS", "/run/loopd-dev").strip().split(",")
        assert {"nosuid", "noexec"} <= set(options)
        assert "nodev" not in options
        assert mode(Path("/run/loopd-dev")) == ("711", "loopd", "loopd")
        identity = Path(path).stat().st_ino
        run("systemctl", "restart", SERVICE)
        device = loopctl("attach", "--directory", path, disk).strip()
        assert Path(device).parent == Path(path)
        assert Path(device).owner() == "loopd"
        Path(device).write_bytes(b"through the grant")
        loopctl("detach", device)
        assert Path(path).stat().st_ino == identity
        assert disk.read_bytes().startswith(b"through the grant")
    finally:
        loopctl("directory", "--remove", "mine")


# Hardening --------------------------------------------------------------------------------------------------------


def exposure(service: str) -> float:
    said = run("systemd-analyze", "security", "--no-pager", service)
    return float(re.findall(r"Overall exposure level for \S+: (\S+)", said)[0])


def status(service: str) -> dict[str, str]:
    """/proc/PID/status of the main process."""
    lines = Path(f"/proc/{prop(service, 'MainPID')}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def capabilities(*names: str) -> str:
    return f"{sum(1 << CAPABILITIES[name] for name in names):016x}"


@pytest.mark.deadline(240)
def test_services_run_hardened(instance: None) -> None:
    """As systemd scores the loaded units, and as the kernel has the processes."""
    for service, hello in ((SERVICE, loopctl), (INSTANCE, build)):
        assert exposure(service) <= 1.8
        hello("hello")
        process = status(service)
        for which in ("CapPrm", "CapBnd", "CapAmb"):
            assert process[which] == capabilities("MKNOD", "SETUID", "SETGID", "SYS_ADMIN")
        assert (process["NoNewPrivs"], process["Seccomp"]) == ("1", "2")
        assert {int(uid) for uid in process["Uid"].split()} == {int(run("id", "-u", "loopd"))}
        assert process["Groups"].split() in ([], [run("id", "-g", "loopd").strip()])
        root = Path(f"/proc/{prop(service, 'MainPID')}/root")
        assert not list((root / "home").iterdir())
        assert os.statvfs(root / "usr").f_flag & os.ST_RDONLY
        (sysfs,) = (fd for fd in root.with_name("fd").iterdir() if (fd / "block").is_dir())
        assert sysfs.stat().st_dev != Path("/sys").stat().st_dev, "others can keep its directories locked"


@pytest.fixture
def without_sys_admin() -> Iterator[None]:
    """The drop-in, by its own commands."""
    install = [line[1:].strip() for line in NO_SYS_ADMIN.read_text().splitlines() if line.startswith("#     ")]
    assert len(install) == 3
    try:
        run("sh", "-ec", f"cd {NO_SYS_ADMIN.parent}\n" + "\n".join(install))
        yield
    finally:
        for service in ("loopd.service.d", "loopd@.service.d"):
            drop_in = Path("/etc/systemd/system", service, NO_SYS_ADMIN.name)
            drop_in.unlink()
            drop_in.parent.rmdir()
        run("sh", "-ec", install[-1])


@pytest.mark.deadline(300)
def test_without_sys_admin(without_sys_admin: None, disk: Path) -> None:
    """Nodes, grants, open fds, partitions of the first look, restarts: all that needs no CAP_SYS_ADMIN still works."""
    run("sfdisk", "--quiet", disk, text="label: gpt\nsize=4M\n")
    loopctl("hello")
    assert exposure(SERVICE) <= 1.3
    assert status(SERVICE)["CapPrm"] == status(SERVICE)["CapBnd"] == capabilities("MKNOD", "SETUID", "SETGID")
    device = attach(disk, "--partscan")
    assert Path(f"{device}p1").is_block_device()
    assert "this loopd runs without CAP_SYS_ADMIN" in refused("rescan", device)
    before = bound()
    run("systemctl", "kill", "--signal=KILL", SERVICE)
    loopctl("hello")
    assert bound() == before
    run("systemctl", "restart", SERVICE)
    assert [lease["devname"] for lease in leases()] == [name(device)]
    with disk.open("r+b") as file:
        file.truncate(24 << 20)
    loopctl("resize", device)
    assert int(Path(f"/sys/block/{name(device)}/size").read_text()) * 512 == 24 << 20
    loopctl("detach", device)
    assert not list(nodes_of(disk).iterdir())
    grant = loopctl("directory", "mine").strip()
    loopctl("run", "--directory", grant, disk, "--", "dd", "if=/dev/zero", "of={}", "bs=4k", "count=1", "status=none")
    loopctl("directory", "--remove", "mine")


# Nodes that a client kept -----------------------------------------------------------------------------------------

BIND = """
import fcntl, os, sys
LOOP_SET_FD = 0x4C00
device = os.open(sys.argv[1], os.O_RDWR)
fcntl.ioctl(device, LOOP_SET_FD, os.open(sys.argv[2], os.O_RDWR))
print("bound", flush=True)
sys.stdin.read()
"""


def max_loop() -> int:
    return int(Path("/sys/module/loop/parameters/max_loop").read_text())


@pytest.fixture
def unset() -> Iterator[None]:
    """The module as it is where nobody has set max_loop."""
    _load_loop("-C", "/dev/null")
    try:
        yield
    finally:
        _load_loop()
        assert max_loop() == 8


def _load_loop(*options: str) -> None:
    run("systemctl", "stop", SOCKET, ADMIN, SERVICE, "loopd@*.service")
    if systemd_version() >= 254:
        run("systemctl", "clean", "--what=fdstore", SERVICE, check=False)
    wait_for("nothing is bound", lambda: not bound())
    run("udevadm", "settle")
    # A helper has the control device open for a moment longer than the main process lives.
    wait_for("the module is out", lambda: run("sh", "-c", "modprobe -r loop || echo in use") == "")
    run("modprobe", *options, "loop")
    run("systemctl", "start", SOCKET)


def kept_node(disk: Path) -> Path:
    """The node of a device that a client had, and kept."""
    device = Path(attach(disk))
    kept = disk.parent / "kept"
    device.rename(kept)
    loopctl("detach", str(device))
    wait_for("the number is removed", lambda: not Path("/sys/block", device.name).exists())
    return kept


def test_with_max_loop_a_kept_node_is_dead(disk: Path, journal: Journal) -> None:
    """With the file that is installed in modprobe.d: nobody binds a number by himself through a node that he kept."""
    assert max_loop() == 8
    kept = kept_node(disk)
    done = subprocess.run(["python3", "-c", BIND, kept, disk], check=False, capture_output=True, text=True, timeout=60)
    assert "No such device or address" in done.stderr
    assert not bound()
    assert journal.records("LOOPD_EVENT=foreign") == []
    assert journal.records("-u", SERVICE, "LOOPD_EVENT=warned") == []


@pytest.mark.deadline(300)
def test_without_it_a_binding_is_noticed_reported_and_charged(unset: None, disk: Path, journal: Journal) -> None:
    """It is not cleared: nothing proves that it is not the host's own."""
    loopctl("hello")
    with policy("limits.devices = 1\n", SERVICE):
        wait_for("it warns at its start", lambda: "max_loop=8" in journal.text("LOOPD_EVENT=warned"))
        kept = kept_node(disk)
        number = os.minor(kept.stat().st_rdev)
        with subprocess.Popen(
            ["python3", "-c", BIND, kept, disk], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as client:
            assert client.stdout is not None
            assert client.stdout.readline() == "bound\n"
            wait_for("it is reported", lambda: journal.records("LOOPD_EVENT=foreign"))
            (record,) = journal.records("LOOPD_EVENT=foreign")
            assert record["LOOPD_DEVICE"] == f"loop{number}"
            assert record["LOOPD_BACKING_FILE"] == str(disk)
            assert (record["LOOPD_UID"], record["LOOPD_ACCOUNT"]) == ("0", account())
            assert "its limit is 1" in refused("attach", "--directory", nodes_of(disk), disk)
            assert bound() == {f"loop{number}": str(disk)}
            run("losetup", "--detach", kept)
            client.communicate()
        wait_for("it is charged no more", lambda: attached_again(disk))


def account() -> str:
    """That of the tests."""
    return Path("/proc/self/cgroup").read_text().strip().partition("::")[2]


def attached_again(disk: Path) -> bool:
    device = run("loopctl", "attach", "--directory", nodes_of(disk), disk, check=False).strip()
    if device:
        loopctl("detach", device)
    return bool(device)
