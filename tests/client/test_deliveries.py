"""The ways to hand a device over, end to end: a real daemon, the client and loopctl, clients without any privilege.

The kernel's own scan of a partition table is shown in the virtual machines; here root of the host adds and removes
partitions by hand (BLKPG), which no kernel refuses.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import select
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import pytest
from support.daemon import ROOT, Daemon, bound_to, eventually, prompt, require
from support.processes import CLONE_NEWNS, Child, become, injected, mount_tmpfs, own_user_namespace, unshare
from support.untouched import helpers, stopped

import loopd
from loopd.client import api as client
from loopd.client import layers
from loopd.loop import Loop
from loopd.protocol import wire

UID, OTHER = 1000, 1001
MIB = 1 << 20
PYTHON = "/usr/bin/python3"


class Served(Daemon):
    """A daemon with the administrator's socket as well."""

    @property
    def admin(self) -> str:
        return f"{self.path}.admin"

    def start(self) -> None:
        activate = shutil.which("systemd-socket-activate")
        require(activate, "systemd-socket-activate (package systemd) is missing")
        command = [str(activate), "--datagram", "-l", self.path, "-l", self.admin, "--fdname=loopd:admin"]
        command += ["-E", "PYTHONPATH", sys.executable, "-m", "loopd", "--state-directory", str(self.state)]
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, *self._options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
        eventually(lambda: Path(self.admin).exists(), "the sockets are there")
        os.chmod(self.path, 0o666)


class World:
    """A folder that every user reaches, with a daemon, its grants and an installed loopctl."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.grants = folder / "grants"
        self.work = folder / "work"
        run = folder / "run"
        for path in (self.grants, self.work, run):
            path.mkdir()
        os.chown(self.work, UID, UID)
        shutil.copytree(ROOT / "loopd", folder / "lib/loopd", ignore=shutil.ignore_patterns("__pycache__"))
        loopctl = folder / "loopctl"
        program = (
            f"import sys\nsys.path.insert(0, '{folder}/lib')\nfrom loopd.cli import main\nsys.exit(main())\n"
        )
        loopctl.write_text(f"#!{PYTHON} -IS\n{program}")
        loopctl.chmod(0o755)
        self.daemon = Served(run, ["--grant-directory", str(self.grants)], [], {})
        self.environment = {
            "PATH": f"{folder}:/usr/sbin:/usr/bin:/sbin:/bin",
            "LOOPD_SOCKET": self.daemon.path,
            "LANG": "C.UTF-8",
            "WORK": str(self.work),
        }

    def image(self, name: str = "disk.img", size: int = 8 * MIB) -> Path:
        path = self.work / name
        path.touch()
        os.truncate(path, size)
        os.chown(path, UID, UID)
        return path

    def grant(self, name: str, uid: int = UID) -> Path:
        """A directory of loopd's for that user, as `loopctl directory` on the host gives it."""
        return Path(self.ctl("directory", name, uid=uid).stdout.rstrip("\n"))

    def ctl(
        self, *arguments: object, uid: int = 0, check: bool = True, **env: str
    ) -> subprocess.CompletedProcess[str]:
        """Run loopctl to its end, as a user of the host."""
        return self.run([*as_user(uid), "loopctl", *map(str, arguments)], check=check, **env)

    def run(self, command: list[str], *, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command,
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            env={**self.environment, **env},
            cwd=self.work,
        )
        assert not check or done.returncode == 0, done.stderr
        return done

    def client(self, body: Callable[[Callable[[Any], None]], object], uid: int = UID, **env: str) -> Child:
        """A process of its own that uses the client library."""

        def run(tell: Callable[[Any], None]) -> None:
            os.environ.update(self.environment, **env)
            os.chdir(self.work)
            become(uid)
            body(tell)
            signal.pause()

        return Child(run)


def as_user(uid: int) -> list[str]:
    return ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"] if uid else []


@pytest.fixture
def world() -> Iterator[World]:
    require(os.geteuid() == 0, "needs root: loop devices and mounts")
    require(os.path.exists("/dev/loop-control"), "needs /dev/loop-control")
    require(os.access(PYTHON, os.X_OK), f"needs {PYTHON}, which every user reaches")
    folder = Path(tempfile.mkdtemp(prefix="loopd-test-", dir="/tmp"))
    folder.chmod(0o755)
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        found = World(folder)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=0711", "loopd-test", found.grants], check=True)
        stack.callback(lambda: subprocess.run(["umount", "--lazy", found.grants], check=True))
        stack.callback(found.daemon.stop)
        found.daemon.start()
        yield found


def errno_of(call: Callable[[], object]) -> str:
    """The name of the errno that a call fails with, empty where it does not."""
    try:
        call()
    except OSError as error:
        return os.strerror(error.errno or 0)
    return ""


def reopened(pinned: int) -> str:
    """What opening an inode that is held by O_PATH fails with."""
    return errno_of(lambda: os.close(os.open(f"/proc/self/fd/{pinned}", os.O_RDONLY)))


DENIED, READ_ONLY, NOT_PERMITTED = "Permission denied", "Read-only file system", "Operation not permitted"


# A directory of loopd's -------------------------------------------------------------------------------------


def test_a_directory_is_made_used_and_removed(world: World) -> None:
    path = world.grant("build")
    assert path.parent == world.grants
    assert world.grant("build") == path
    assert world.grant("build", OTHER) != path
    device = Path(world.ctl("attach", world.image(), uid=UID, LOOPD_DIRECTORY=str(path)).stdout.rstrip("\n"))
    assert device.parent == path
    assert stat.S_ISBLK(device.stat().st_mode)
    refused = world.ctl("directory", "build", "--remove", uid=UID, check=False)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "detach them first" in refused.stderr
    assert f"`LOOPD_DIRECTORY={path} loopctl list` shows them" in refused.stderr
    world.ctl("detach", device, uid=UID)
    assert world.ctl("directory", "build", "--remove", uid=UID).stdout == ""
    assert not path.exists()
    assert world.ctl("directory", "build", "--remove", uid=UID, check=False).returncode == 1


def test_a_directory_with_devices_of_its_own(world: World) -> None:
    """As the user asks for it, uses it up, and sees it listed; and as the unit for the boot makes and removes it."""
    made = json.loads(world.ctl("directory", "build", "--devices", 2, "--json", uid=UID).stdout)
    assert Path(made["path"]).parent == world.grants
    images = [world.image(name) for name in ("one", "two", "three")]
    grant = {"LOOPD_DIRECTORY": made["path"]}
    devices = [world.ctl("attach", image, uid=UID, **grant).stdout.rstrip("\n") for image in images[:2]]
    assert sorted(int(Path(device).name[4:]) for device in devices) == made["numbers"]
    refused = world.ctl("attach", "-d", made["path"], images[2], uid=UID, check=False, **grant)
    assert (refused.returncode, "all 2 device numbers of this directory are in use" in refused.stderr) == (1, True)
    world.ctl("detach", devices[0], uid=UID)
    assert world.ctl("attach", images[2], uid=UID, **grant).stdout == f"{devices[0]}\n"
    unit = (ROOT / "systemd/loopd-directory@.service").read_text()
    start, stop = (
        line.replace("@PREFIX@/bin/", "").replace("%i", "boot").replace("$OPTIONS", "--devices=3").split()
        for line in re.findall(r"(?m)^Exec(?:Start|Stop)=-?(.*)$", unit)
    )
    path = world.run(start).stdout.rstrip("\n")
    rows = [line.split() for line in world.ctl("directory").stdout.splitlines()]
    assert [row[:4] for row in rows] == [["NAME", "UID", "DEVICES", "IN-USE"], ["boot", "0", "3", "0"]]
    rows = [line.split() for line in world.ctl("directory", uid=UID).stdout.splitlines()[1:]]
    assert [row[:4] for row in rows] == [["build", str(UID), "2", "2"]]
    everybodys = json.loads(world.ctl("--socket", world.daemon.admin, "directory", "--json").stdout)["directories"]
    assert {row["name"] for row in everybodys} == {"boot", "build"}
    device = world.ctl("attach", images[2], LOOPD_DIRECTORY=path).stdout.rstrip("\n")
    assert world.run(stop, check=False).returncode == 1
    assert os.path.exists(path)
    world.ctl("detach", device)
    world.run(stop)
    assert not os.path.exists(path)
    for device in devices:
        world.ctl("detach", device, uid=UID)


def test_a_directory_is_asked_for_from_the_host_alone(world: World) -> None:
    done = world.run(["unshare", "--mount", "loopctl", "directory", "build"], check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "from the host" in done.stderr


def test_the_client_can_open_a_granted_node_and_nothing_else(world: World) -> None:
    """As root of a user namespace with every capability in it, and with the directory bound in for writing."""
    grant = world.grant("build")
    image = world.image()

    def body(tell: Callable[[Any], None]) -> None:
        own_user_namespace()
        with loopd.attach(image) as device:
            os.pwrite(device.fd, b"through the grant", 0)
            os.fsync(device.fd)
            path, folder = device.path, os.path.dirname(device.path)
            away, here = f"{world.work}/kept", f"{folder}/kept"
            attempts = {
                "link": lambda: os.link(path, away),
                "link here": lambda: os.link(path, here),
                "rename": lambda: os.rename(path, here),
                "chmod": lambda: os.chmod(path, 0o666),
                "chown": lambda: os.chown(path, 0, 0),
                "unlink": lambda: os.unlink(path),
                "make": lambda: os.mkdir(here),
                "chmod of the directory": lambda: os.chmod(folder, 0o777),
            }
            tell([path, {name: errno_of(attempt) for name, attempt in attempts.items()}])

    with world.client(body, LOOPD_DIRECTORY=str(grant)) as child:
        path, refused = child.hear()
        assert Path(path).parent == grant
        assert set(refused.values()) <= {DENIED, NOT_PERMITTED, "Invalid cross-device link"}, refused
    assert image.read_bytes().startswith(b"through the grant")


def test_another_uid_cannot_open_a_granted_node(world: World) -> None:
    grant, image = world.grant("build"), world.image()
    path = world.ctl("attach", image, uid=UID, LOOPD_DIRECTORY=str(grant)).stdout.rstrip("\n")
    read = ["dd", "count=1", "of=/dev/null", f"if={path}"]
    assert world.run([*as_user(UID), *read]).returncode == 0
    done = world.run([*as_user(OTHER), *read], check=False)
    assert DENIED in done.stderr
    world.ctl("detach", path, uid=UID)


def test_two_grants_see_nothing_of_each_other(world: World) -> None:
    """The same user and account, two containers. What the user attached without a grant is a third one's."""
    grants = [str(world.grant(name)) for name in ("one", "two")]
    own = world.work / "dev"
    own.mkdir()
    os.chown(own, UID, UID)
    images = [world.image(name) for name in ("one.img", "two.img", "three.img")]
    paths = []
    for image, grant in zip(images, grants, strict=False):
        paths.append(world.ctl("attach", image, uid=UID, LOOPD_DIRECTORY=grant).stdout.rstrip("\n"))
    paths.append(world.ctl("attach", "-d", own, images[2], uid=UID).stdout.rstrip("\n"))
    names = [os.path.basename(path) for path in paths]

    def seen(grant: str) -> set[str]:
        leases = json.loads(world.ctl("list", "--json", uid=UID, LOOPD_DIRECTORY=grant).stdout)["leases"]
        return {lease["devname"] for lease in leases}

    assert seen(grants[0]) == {names[0], names[2]}  # outside of a container it is the user, too
    assert seen(grants[1]) == {names[1], names[2]}
    assert seen("/nonexistent") == {names[2]}
    for verb in ("detach", "rescan", "resize"):
        refused = world.ctl(verb, names[0], uid=UID, check=False, LOOPD_DIRECTORY=grants[1])
        assert (refused.returncode, f"no device {names[0]} of yours" in refused.stderr) == (1, True)
    # The directory in the name tells whose it is, wherever loopctl is called.
    world.ctl("detach", paths[0], uid=UID)
    world.ctl("detach", "--all", uid=UID, LOOPD_DIRECTORY=grants[1])
    assert not bound_to(world.work)


# Revocation -------------------------------------------------------------------------------------------------


def test_a_grant_is_known_whoever_else_looks(world: World) -> None:
    """All helpers have one open description of the directory of directories, and one of them is in the middle of it."""
    grant = os.open(world.grant("build", 0), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def look(_: int) -> list[str]:
        fields = world.daemon.ask(wire.Leases(1, dir_fd=0), [grant]).fields
        return [lease["devname"] for lease in fields["leases"]]

    try:
        with (
            loopd.attach(world.image(), grant, socket=world.daemon.path) as device,
            injected(helpers(world.daemon), "getdents64:delay_exit=300000"),
            ThreadPoolExecutor(2) as both,
        ):
            assert list(both.map(look, range(4))) == [[device.devname]] * 4
    finally:
        os.close(grant)


def test_a_granted_node_that_was_kept_does_not_open_after_the_detach(world: World) -> None:
    grant, image = world.grant("build"), world.image()

    def body(tell: Callable[[Any], None]) -> None:
        own_user_namespace()
        with loopd.attach(image) as device:
            pinned = os.open(device.path, os.O_PATH)
            before = reopened(pinned)
        tell([before, reopened(pinned), errno_of(lambda: os.chmod(f"/proc/self/fd/{pinned}", 0o666))])

    with world.client(body, LOOPD_DIRECTORY=str(grant)) as child:
        assert child.hear() == ["", DENIED, NOT_PERMITTED]


def test_a_mount_that_was_kept_leads_to_nothing_after_the_detach(world: World) -> None:
    image = world.image()

    def body(tell: Callable[[Any], None]) -> None:
        own_user_namespace()
        mount_tmpfs("/mnt")
        device = loopd.attach(image, "/mnt", deliver=["mount"])
        pinned = os.open(device.path, os.O_PATH)
        folder = os.open(os.path.dirname(device.path), os.O_RDONLY)
        Path("/mnt/node").touch()
        subprocess.run(["mount", "--bind", device.path, "/mnt/node"], check=True)
        before = [reopened(pinned), os.listdir(folder) == [device.devname]]
        refused = [
            errno_of(lambda: os.rename(device.path, f"{device.path}x")),
            errno_of(lambda: os.link(device.path, f"{device.path}x")),
            errno_of(lambda: os.unlink(device.path)),
            errno_of(lambda: os.chmod(device.path, 0o666)),
        ]
        device.detach()
        bound = errno_of(lambda: os.close(os.open("/mnt/node", os.O_RDONLY)))
        tell([before, refused, reopened(pinned), bound, os.listdir(folder), os.listdir("/mnt")])

    with world.client(body) as child:
        before, refused, pinned, bound, listing, mnt = child.hear()
    assert before == ["", True]
    assert set(refused) <= {DENIED, NOT_PERMITTED, READ_ONLY}
    assert (pinned, bound, listing) == (DENIED, DENIED, [])
    assert mnt == ["node"]  # the mount is gone, and its directory


@pytest.mark.parametrize("deliver", ["node", "fd"])
def test_what_was_written_without_a_sync_is_in_the_image(
    world: World, deliver: Literal["node", "fd"]
) -> None:
    """The client's close is not the last one, which would write the page cache back: loopd has it open, too."""
    image, grant = world.image(), world.grant("build", 0)
    with loopd.attach(image, grant, deliver=[deliver], socket=world.daemon.path) as device:
        os.pwrite(device.fd, b"not synced", MIB)
    assert image.read_bytes()[MIB:].startswith(b"not synced")


def test_a_mount_is_nobodys_to_write(world: World) -> None:
    """Not even root's, who is the host's in a container without a user namespace of its own."""
    with world.image().open("r+b") as image:
        reply = world.daemon.attach(image.fileno(), None, deliver=("mount",))
        (mount,) = reply.fds
        name = reply.fields["devname"]
        for change in (
            lambda: os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=mount),
            lambda: os.mkdir("folder", dir_fd=mount),
            lambda: os.rename(name, "other", src_dir_fd=mount, dst_dir_fd=mount),
            lambda: os.link(name, "other", src_dir_fd=mount, dst_dir_fd=mount),
        ):
            assert errno_of(change) == READ_ONLY
        os.close(os.open(name, os.O_RDWR, dir_fd=mount))  # the device is another thing
        assert world.daemon.ask(wire.Detach(name, 0, wait=5), []).fields == {"state": "released"}


# Partition nodes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["client", "grant", "mount"])
def test_partition_nodes_come_and_go_within_a_second(world: World, way: str) -> None:
    image, grant = world.image(), world.grant("build")
    own = world.work / "dev"
    own.mkdir()
    os.chown(own, UID, UID)

    def body(tell: Callable[[Any], None]) -> None:
        if way == "mount":
            own_user_namespace()
            mount_tmpfs("/mnt")
            device = loopd.attach(image, "/mnt", deliver=["mount"], partscan=True)
        else:
            device = loopd.attach(image, own if way == "client" else grant, partscan=True)
        tell([device.path, device.devname])
        signal.pause()

    with world.client(body) as child:
        path, devname = child.hear()
        view = Path(f"/proc/{child.pid}/root{path}p1")
        with Loop(int(devname[4:])) as loop:

            def listed() -> bool:
                leases = loopd.Client(world.daemon.admin).list()
                return [lease.partitions for lease in leases] == [(f"{devname}p1",)]

            def turn(length: int) -> float:
                began = time.monotonic()
                loop.add_partition(1, MIB, length)
                eventually(view.exists, "the node is there")
                came = time.monotonic() - began
                major, minor = map(int, Path(f"/sys/block/{devname}/{devname}p1/dev").read_text().split(":"))
                assert view.stat().st_rdev == os.makedev(major, minor)
                # A moment later there may be the node of a partition with another minor.
                eventually(listed, "it is in the list")
                began = time.monotonic()
                loop.delete_partition(1)
                eventually(lambda: not view.exists(), "the node is gone")
                return max(came, time.monotonic() - began)

            for length in (MIB, 2 * MIB):
                prompt(functools.partial(turn, length))
    eventually(lambda: not bound_to(world.work), "the file is free")


def test_a_table_that_cannot_be_read_is_no_reason_to_refuse(
    daemon: Daemon, image: int, directory: int, devices: Path, tmp_path: Path
) -> None:
    """Nor are the nodes left to who was refused: the file may be shorter by the time that loopd looks at its end."""
    daemon.hello()
    with injected(helpers(daemon), "pread64:error=EIO"):
        reply = daemon.attach(image, directory, partscan=True)
    assert reply.code is None
    assert (devices / reply.fields["devname"]).is_block_device()
    reply.close()
    eventually(lambda: not bound_to(tmp_path) and not list(devices.iterdir()), "all is gone")


def test_a_node_goes_although_the_event_is_lost(world: World) -> None:
    """Whoever has a device can have the kernel send more events than the queue holds."""
    image, own = world.image(), world.work / "dev"
    own.mkdir()
    with loopd.attach(image, own, partscan=True, socket=world.daemon.path) as device, Loop(device.minor) as loop:
        node = Path(f"{device.path}p1")
        loop.add_partition(1, MIB, MIB)
        eventually(node.exists, "the node is there")
        with stopped(world.daemon):
            for _ in range(20_000):
                Path(f"/sys/block/{device.devname}/uevent").write_text("change")
            loop.delete_partition(1)
        eventually(lambda: not node.exists(), "the node is gone", 5)


@pytest.mark.parametrize("deliver", ["node", "fd"])
def test_a_partition_does_not_outlive_the_binding(world: World, deliver: Literal["node", "fd"]) -> None:
    """A number that comes again to the same owner shows nothing of what was there before."""
    image = world.image()
    own = world.work / "dev"
    own.mkdir()
    path = "/sys/block/{0}/{0}p1"
    device = loopd.attach(image, own, deliver=[deliver], partscan=True, socket=world.daemon.path)
    with Loop(device.minor) as loop:
        loop.add_partition(1, MIB, MIB)
        pinned = os.open(
            f"/dev/{device.devname}", os.O_RDONLY
        )  # the device stays in existence, with its partition
    try:
        assert os.path.exists(path.format(device.devname))
        assert not device.detach(wait=0.2)
        assert not os.path.exists(path.format(device.devname))
    finally:
        os.close(pinned)
    eventually(lambda: not bound_to(world.work), "the file is free")


def held(world: World, path: str, partition: int = 1) -> Child:
    """A process of the user's that pins the node of a partition, tries to keep it, and opens it when it is told to."""

    def body(tell: Callable[[Any], None]) -> None:
        own_user_namespace()
        node = f"{path}p{partition}"
        pinned = os.open(node, os.O_PATH)
        link = f"{path}kept"
        kept = [
            errno_of(lambda: os.link(node, link)),
            errno_of(lambda: os.rename(node, link)),
            errno_of(lambda: os.chmod(node, 0o666)),
        ]
        tell([reopened(pinned), kept])
        signal.sigwait([signal.SIGUSR1])
        tell([reopened(pinned), errno_of(lambda: os.chmod(f"/proc/self/fd/{pinned}", 0o666))])
        signal.pause()

    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    try:
        return world.client(body)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])


def number_of(devname: str, partition: int = 1) -> str:
    return Path(f"/sys/block/{devname}/{devname}p{partition}/dev").read_text().strip()


def test_a_kept_partition_node_never_reads_what_is_anothers(world: World) -> None:
    """The kernel gives the number of a partition that is gone to the next one, of whatever disk."""
    paths = [
        world.ctl(
            "attach", "-P", world.image(f"{uid}.img"), uid=uid, LOOPD_DIRECTORY=str(world.grant("build", uid))
        ).stdout.rstrip("\n")
        for uid in (UID, OTHER)
    ]
    names = [os.path.basename(path) for path in paths]
    with Loop(int(names[0][4:])) as one, Loop(int(names[1][4:])) as two:
        one.add_partition(1, MIB, MIB)
        eventually(Path(f"{paths[0]}p1").exists, "the node is there")
        number = number_of(names[0])
        with held(world, paths[0]) as child:
            before, kept = child.hear()
            assert before == ""
            assert "" not in kept
            one.delete_partition(1)
            eventually(lambda: not Path(f"{paths[0]}p1").exists(), "the node is gone")

            def again() -> bool:
                two.add_partition(1, MIB, MIB)
                if number_of(names[1]) != number:
                    two.delete_partition(1)  # others on this machine take numbers, too
                    return False
                return True

            eventually(again, "the number is another's")
            os.kill(child.pid, signal.SIGUSR1)
            assert child.hear() == [DENIED, NOT_PERMITTED]
    for path, uid in zip(paths, (UID, OTHER), strict=True):
        world.ctl("detach", path, uid=uid)


def test_a_node_whose_partition_has_another_number_is_replaced(world: World) -> None:
    """loopd sees only what has become of it: it stands still meanwhile."""
    grant, image = world.grant("build", 0), world.image()
    with loopd.attach(image, grant, partscan=True, socket=world.daemon.path) as device:
        node = Path(f"{device.path}p1")
        with Loop(int(device.devname[4:])) as loop:
            loop.add_partition(1, MIB, MIB)
            eventually(node.exists, "the node is there")
            number, inode = number_of(device.devname), node.stat().st_ino
            family = world.daemon.family()
            for pid in family:
                os.kill(pid, signal.SIGSTOP)

            def again() -> bool:
                loop.delete_partition(1)
                loop.add_partition(1, MIB, MIB)  # at once: the old number is most likely not free yet
                return number_of(device.devname) != number

            try:
                eventually(again, "it has another number")
            finally:
                for pid in family:
                    os.kill(pid, signal.SIGCONT)
            now = number_of(device.devname)
            eventually(lambda: node.exists() and node.stat().st_ino != inode, "the node is another one")
            assert node.stat().st_rdev == os.makedev(*map(int, now.split(":")))
            loop.delete_partition(1)


def test_in_a_directory_of_the_clients_a_kept_node_is_closed(world: World) -> None:
    """Whoever has another way to it; its owner can open it again, which docs/security.md says."""
    own, image = world.work / "dev", world.image()
    own.mkdir()
    os.chown(own, UID, UID)
    path = world.ctl("attach", "-P", "-d", own, image, uid=UID).stdout.rstrip("\n")
    with Loop(int(os.path.basename(path)[4:])) as loop:
        loop.add_partition(1, MIB, MIB)
        node, kept = Path(f"{path}p1"), own / "kept"
        eventually(node.exists, "the node is there")
        kept.hardlink_to(node)
        assert stat.S_IMODE(kept.stat().st_mode) == 0o600
        loop.delete_partition(1)
        eventually(lambda: not node.exists(), "the node is gone")
        assert stat.S_IMODE(kept.stat().st_mode) == 0
        assert DENIED in world.run([*as_user(UID), "dd", f"if={kept}", "of=/dev/null"], check=False).stderr
    world.ctl("detach", path, uid=UID)


def test_a_table_that_is_written_while_a_partition_is_in_use_is_read_later(world: World) -> None:
    """The kernel reads none then: it is tried once more at the next close of the node."""
    grant, image = world.grant("build", 0), world.image()
    with loopd.attach(image, grant, partscan=True, socket=world.daemon.path) as device:
        node = Path(f"{device.path}p1")
        with Loop(int(device.devname[4:])) as loop:
            loop.add_partition(1, MIB, MIB)
            eventually(node.exists, "the node is there")
            with node.open("rb"):
                Path(device.path).write_bytes(b"another table".ljust(512))
                time.sleep(0.5)
                assert loop.partitions() == [1]
                with pytest.raises(loopd.Busy, match="a partition is in use"):
                    device.rescan()
                assert node.is_block_device()
            os.close(os.open(device.path, os.O_RDWR))
            eventually(lambda: not node.exists() and not loop.partitions(), "the table is read")
            assert device.rescan() == ()


@pytest.mark.parametrize("read_only", [False, True])
def test_an_fd_has_the_access_of_the_lease(world: World, read_only: bool) -> None:
    image = world.image()
    image.write_bytes(b"what was there".ljust(MIB))

    def body(tell: Callable[[Any], None]) -> None:
        with loopd.attach(image, deliver=["fd"], read_only=read_only) as device:
            written = errno_of(lambda: os.pwrite(device.fd, b"by the client", 0))
            os.fsync(device.fd)
            tell([os.pread(device.fd, 14, 0).decode(), written, errno_of(lambda: os.open(device.path, os.O_RDWR))])

    with world.client(body) as child:
        content, written, again = child.hear()
    assert (content, written) == (("what was there", "Bad file descriptor") if read_only else ("by the cliente", ""))
    assert again == DENIED  # the node that it leads to is loopd's own


# Size, direct I/O, sectors ----------------------------------------------------------------------------------


def test_a_device_grows_with_its_image(world: World) -> None:
    image, grant = world.image(size=4 * MIB), world.grant("build")
    path = world.ctl("attach", image, uid=UID, LOOPD_DIRECTORY=str(grant)).stdout.rstrip("\n")
    os.truncate(image, 6 * MIB)
    assert world.ctl("resize", path, uid=UID).stdout == f"{6 * MIB}\n"
    assert world.run([*as_user(UID), "blockdev", "--getsize64", path]).stdout == f"{6 * MIB}\n"
    with loopd.attach(world.image("second.img"), grant, socket=world.daemon.path) as device:
        os.truncate(world.work / "second.img", 16 * MIB)
        assert device.resize() == device.size == 16 * MIB
    world.ctl("detach", path, uid=UID)


FILE_SYSTEMS = {
    "tmpfs": ["mount", "-t", "tmpfs", "loopd-test"],
    "ext4": ["mkfs.ext4", "-q"],
    "xfs": ["mkfs.xfs", "-q"],
    "btrfs": ["mkfs.btrfs", "-q"],
    "overlay": ["mount", "-t", "overlay", "overlay"],
}
KNOWN = Path("/proc/filesystems").read_text().split()


@pytest.fixture
def mounted(world: World, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system of that type."""
    kind, command = request.param, FILE_SYSTEMS[request.param]
    point, base = world.folder / "mounted", world.folder / "base"
    point.mkdir()
    base.mkdir()
    if command[0] == "mount":
        for name in ("lower", "upper", "work"):
            (base / name).mkdir()
        options = f"lowerdir={base}/lower,upperdir={base}/upper,workdir={base}/work"
        subprocess.run([*command, *(["-o", options] if kind == "overlay" else []), point], check=True)
    else:
        require(shutil.which(command[0]), f"needs {command[0]}")
        (base / "fs.img").touch()
        os.truncate(base / "fs.img", 512 * MIB)  # mkfs.xfs takes no less than 300
        subprocess.run([*command, base / "fs.img"], check=True)
        subprocess.run(["mount", "-t", kind, "-o", "loop", base / "fs.img", point], check=True)
    try:
        yield point
    finally:
        # The helper that refused the last request may close its files a moment after the answer.
        eventually(lambda: subprocess.run(["umount", point], check=False).returncode == 0, "it is unmounted")


@pytest.mark.parametrize("mounted", [kind for kind in FILE_SYSTEMS if kind in KNOWN], indirect=True)
def test_direct_io_in_its_three_values(world: World, mounted: Path) -> None:
    """What the reply says is what the kernel says; and "on" is granted or refused, never silently dropped."""
    image = mounted / "disk.img"
    image.touch()
    os.truncate(image, 4 * MIB)
    grant = world.grant("build", 0)
    asked = loopd.Client(world.daemon.path)

    def effective(value: client.DirectIO, offset: int = 0) -> bool:
        with asked.attach(image, grant, direct_io=value, offset=offset) as device:
            dio = Path(f"/sys/block/{device.devname}/loop/dio").read_text()
            assert device.direct_io is bool(int(dio))
            (lease,) = loopd.Client(world.daemon.admin).list()
            assert lease.direct_io is device.direct_io
            os.pwrite(device.fd, bytes(4096), 4096)
            return device.direct_io

    can = effective("auto")
    assert not effective("off")
    if can:
        assert effective("on")
    else:
        with pytest.raises(loopd.Unsupported, match="direct_io"):
            asked.attach(image, grant, direct_io="on")
    assert can or mounted.stat().st_dev != os.stat(world.work).st_dev
    # No file system takes direct I/O in the middle of a sector.
    assert not effective("auto", 100)
    with pytest.raises(loopd.Unsupported, match="direct_io"):
        asked.attach(image, grant, direct_io="on", offset=100)
    assert not bound_to(mounted)


def test_sectors_of_4096_bytes_with_partitions(world: World) -> None:
    image, grant = world.image(size=32 * MIB), world.grant("build", 0)
    with loopd.attach(image, grant, sector_size=4096, partscan=True, socket=world.daemon.path) as device:
        assert device.sector_size == 4096
        assert Path(f"/sys/block/{device.devname}/queue/logical_block_size").read_text() == "4096\n"
        table = subprocess.run(
            ["sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", device.path], input="label: gpt\n2048,1024\n",
            text=True, check=True, capture_output=True,
        )  # fmt: skip
        assert table.stderr == ""
        with open(image, "rb") as file:
            header = os.pread(file.fileno(), 4096, 4096)
        assert header.startswith(b"EFI PART")
        entry = struct.unpack_from("<16x16xQQ", image.read_bytes(), 2 * 4096)
        with Loop(int(device.devname[4:])) as loop:
            eventually(lambda: add(loop, {1: (entry[0] * 4096, 1024 * 4096)}), "the partition is there")
        node = Path(f"{device.path}p1")
        eventually(node.exists, "its node is there")
        assert int(Path(f"/sys/block/{device.devname}/{node.name}/start").read_text()) == 2048 * 8
        assert (
            subprocess.run(["blockdev", "--getss", node], stdout=subprocess.PIPE, check=True).stdout
            == b"4096\n"
        )


def add(loop: Loop, wanted: dict[int, tuple[int, int]]) -> bool:
    """Make partitions, by number: start and length in bytes; whether they are still there after loopd's second look.

    loopd has a table that was written read again, and a kernel without a parser for it then finds none.
    """
    for number, (start, length) in wanted.items():
        if number not in loop.partitions():
            loop.add_partition(number, start, length)
    time.sleep(1.5)
    return set(wanted) <= set(loop.partitions())


# Whole images -----------------------------------------------------------------------------------------------

BUILD = """
cd "$WORK"
mkdir one two && echo first >one/hello && echo second >two/hello
device=$(loopctl attach -P disk.img)
echo "$device"
printf 'label: gpt\\n,8M\\n,8M\\n' | sfdisk --quiet "$device" >&2
echo written
until [ -b "${device}p1" ] && [ -b "${device}p2" ]; do sleep 0.05; done
echo found
read -r _
mkfs.ext4 -q -d one "${device}p1"
mkfs.ext4 -q -d two "${device}p2"
[ "$(loopctl list | wc -l)" = 2 ]
loopctl detach "$device"
[ ! -e "$device" ] && [ ! -e "${device}p1" ]
echo done
"""

UNSHARED = ["unshare", "-Urm", "--propagation", "private"]
BWRAP = [
    "bwrap",
    "--unshare-all",
    "--die-with-parent",
    "--ro-bind",
    "/",
    "/",
    "--proc",
    "/proc",
    "--dev",
    "/dev",
]


def sandbox(world: World, kind: str) -> tuple[list[str], dict[str, str]]:
    """How a container of that kind is started, and what it has in its environment."""
    grant = str(world.grant("container"))
    if kind == "unshare with a directory of loopd's":
        bind = f'mount --bind {grant} /mnt && mount -o remount,bind,ro /mnt && exec "$@"'
        return [*UNSHARED, "sh", "-ec", bind, "sh"], {"LOOPD_DIRECTORY": "/mnt"}
    if kind == "unshare with a mount":
        return [*UNSHARED, "sh", "-ec", 'mount -t tmpfs none /mnt && exec "$@"', "sh"], {"TMPDIR": "/mnt"}
    require(shutil.which("bwrap"), "needs bwrap (package bubblewrap)")
    bound = [*BWRAP, "--bind", str(world.work), str(world.work)]
    if kind == "bubblewrap with a directory of loopd's":
        # There is no --dev-ro-bind; the directory is not the client's to write anyway.
        return [*bound, "--dev-bind", grant, "/dev/loopd"], {}
    # The mount namespace that bwrap makes is not that of the user namespace in which the command runs.
    return [*bound, "--unshare-user", "--cap-add", "CAP_SYS_ADMIN", "unshare", "--mount"], {}


@pytest.mark.parametrize(
    "kind",
    [
        "unshare with a directory of loopd's",
        "unshare with a mount",
        "bubblewrap with a directory of loopd's",
        "bubblewrap with a mount",
    ],
)
def test_a_user_without_privilege_makes_an_image_with_two_file_systems(world: World, kind: str) -> None:
    """loopctl finds the way by itself; the uid has no right on any loop device of the host."""
    image = world.image(size=32 * MIB)
    wrapper, env = sandbox(world, kind)
    process = subprocess.Popen(
        [*as_user(UID), *wrapper, "sh", "-ec", BUILD],
        env={**world.environment, **env},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    output, errors = process.stdout, process.stderr

    def says(what: str) -> str:
        line = output.readline().rstrip("\n")
        assert what in line, errors.read()
        return line

    try:
        device = says("/")
        assert not device.startswith("/dev/loop") or device.startswith("/dev/loopd/")
        says("written")
        layout = json.loads(subprocess.check_output(["sfdisk", "--json", image]))["partitiontable"]
        parts = {i: (p["start"] * 512, p["size"] * 512) for i, p in enumerate(layout["partitions"], 1)}
        (name,) = bound_to(image)
        with Loop(int(name[4:])) as loop:
            eventually(
                lambda: add(loop, parts) and select.select([output], [], [], 0)[0], "the nodes are found"
            )
        says("found")
        # Only now: before, loopd may have had the table read once more, and the nodes were gone again.
        process.stdin.write("\n")
        process.stdin.flush()
        says("done")
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.communicate()
    for (start, length), expected in zip(parts.values(), ("first\n", "second\n"), strict=True):
        content = world.work / "partition"
        with image.open("rb") as file:
            content.write_bytes(os.pread(file.fileno(), length, start))
        done = subprocess.run(
            ["debugfs", "-R", "cat hello", content], capture_output=True, text=True, check=True
        )
        assert done.stdout == expected
    eventually(lambda: not bound_to(world.work), "the file is free")


# The choice -------------------------------------------------------------------------------------------------


def test_the_directory_is_taken_before_the_containers_own_dev(world: World) -> None:
    """Of a container of root's with a /dev of its own, in which a node works."""
    image, grant = world.image(), str(world.grant("build", 0))
    enter = ["unshare", "--mount", "--propagation", "private", "sh", "-ec"]
    own = "mount -t tmpfs none /dev; device=$(loopctl attach $0)"
    command = [*enter, f"{own}; echo $device; echo found 1<>$device; loopctl detach $device", str(image)]
    assert re.fullmatch(r"/dev/loop\d+\n", world.run(command).stdout)
    assert world.run(command, LOOPD_DIRECTORY=grant).stdout.startswith(f"{grant}/loop")
    assert image.read_bytes().startswith(b"found")


def test_where_nothing_works_each_way_is_explained(world: World) -> None:
    """Of a container with a /dev of its own user namespace's, no directory of loopd's, and no capability."""
    require(shutil.which("bwrap"), "needs bwrap (package bubblewrap)")
    image = world.image()
    wrapper = [*BWRAP, "--unshare-user", "--bind", str(world.work), str(world.work)]
    done = world.run([*as_user(UID), *wrapper, "loopctl", "attach", str(image)], check=False)
    assert (done.returncode, done.stdout) == (1, "")
    said, remedy = done.stderr.splitlines()
    assert said.startswith("loopctl: /dev: its ")
    assert "a mount: attaching a mount needs CAP_SYS_ADMIN" in said
    assert "loopctl directory NAME" in remedy
    assert world.daemon.records() == []  # it was not even asked


def test_a_refused_image_is_asked_for_once(world: World) -> None:
    """No other way to hand it over would help, and the journal has one record, not one for each way."""
    refused = world.ctl("attach", "/proc/version", check=False)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "/proc/version: proc is not among the allowed file systems" in refused.stderr
    (record,) = world.daemon.records("refused")
    assert record["LOOPD_CODE"] == "not-permitted"


def test_the_administrator_is_told_of_an_ordinary_socket(world: World) -> None:
    """Which would answer, with what is this user's own."""
    admin, ordinary = world.daemon.admin, world.daemon.path
    assert world.ctl("--admin", "--socket", admin, "list").stdout == ""
    for verb in (["list"], ["detach", "loop4096"]):
        refused = world.ctl("--admin", "--socket", ordinary, *verb, check=False)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert f"{ordinary} is not an administrator's socket" in refused.stderr
    assert world.daemon.records("refused") == []


def test_a_directory_of_a_user_namespace_is_known_without_asking(world: World) -> None:
    def body(tell: Callable[[Any], None]) -> None:
        hosts = os.open(world.work, os.O_RDONLY)
        assert layers.obstacle(hosts, own=True) is None
        own_user_namespace()
        assert layers.obstacle(hosts, own=True) is None
        own = mount_tmpfs("/mnt")
        tell([layers.obstacle(own, own=True), os.listdir("/mnt"), os.listdir(hosts)])

    with world.client(body) as child:
        (layer, *_), mine, hosts = child.hear()
    assert layer == "user namespace"
    assert (mine, hosts) == ([], [])


def test_on_the_host_the_device_is_the_kernels_node(world: World) -> None:
    require(os.path.ismount("/dev") and is_devtmpfs("/dev"), "needs a devtmpfs at /dev")
    image = world.image()
    path = world.ctl("attach", image).stdout.rstrip("\n")
    assert path == f"/dev/{bound_to(image)[0]}"
    world.ctl("detach", path)
    path = world.ctl("attach", "--deliver", "fd", image).stdout.rstrip("\n")
    assert path == f"/dev/{bound_to(image)[0]}"
    world.ctl("detach", path)
    refused = world.ctl("attach", "--deliver", "node", "-d", "/dev", image, check=False)
    assert refused.returncode == 1
    assert "the kernel makes the node" in refused.stderr
    # Another user has no right on it, and is told so before a device is attached.
    refused = world.ctl("attach", image, uid=UID, check=False)
    assert refused.returncode == 1
    assert f"not for uid {UID}" in refused.stderr
    assert "-d DIRECTORY" in refused.stderr
    assert not bound_to(world.work)


def test_losetup_on_the_host(world: World) -> None:
    require(os.path.ismount("/dev") and is_devtmpfs("/dev"), "needs a devtmpfs at /dev")
    image = world.image()
    losetup = [PYTHON, "-IS", f"{world.folder}/lib/loopd/losetup.py"]
    device = world.run([*losetup, "-f", "--show", str(image)]).stdout.rstrip("\n")
    assert device == f"/dev/{bound_to(image)[0]}"
    assert world.run([*losetup, "-a"]).stdout.startswith(f"{device}: ")
    world.run([*losetup, "-d", device])
    # Another user has no right on it, and is not left with it.
    refused = world.run([*as_user(UID), *losetup, "-f", str(image)], check=False)
    assert refused.returncode == 1
    assert re.search(r": /dev/loop\d+: Permission denied$", refused.stderr)
    assert not bound_to(world.work)


def is_devtmpfs(path: str) -> bool:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return layers.is_devtmpfs(fd)
    finally:
        os.close(fd)


def test_an_open_device_is_passed_to_a_command(world: World) -> None:
    """To a user and a command that could open no node."""
    image = world.image()
    write = 'printf %s {} && echo "by fd" 1>&${1##*/}'
    command = ["run", "--deliver", "fd", image, "--", "bash", "-c", write, "-", "{}"]
    assert world.ctl(*command, uid=UID).stdout.startswith("/proc/self/fd/")
    assert image.read_bytes().startswith(b"by fd\n")
    refused = world.ctl(
        "attach", "--deliver", "fd", image, uid=UID, check=False, LOOPD_DIRECTORY="/nonexistent"
    )
    if not is_devtmpfs("/dev"):
        assert "loopctl run" in refused.stderr
    else:
        world.ctl("detach", "--all", uid=UID)
    assert not bound_to(world.work)


# The administrator ------------------------------------------------------------------------------------------


def test_the_administrator_sees_who_has_what_and_ends_all(world: World) -> None:
    require(is_devtmpfs("/dev"), "needs a devtmpfs at /dev")
    images = [world.image(name) for name in ("one.img", "two.img")]
    one = world.ctl("attach", images[0]).stdout.rstrip("\n")
    grant = world.grant("build")
    world.ctl("attach", images[1], uid=UID, LOOPD_DIRECTORY=str(grant))
    point = world.folder / "a mount"
    point.mkdir()
    subprocess.run(["mkfs.ext4", "-q", one], check=True)

    def body(tell: Callable[[Any], None]) -> None:
        unshare(CLONE_NEWNS)
        subprocess.run(["mount", one, point], check=True)
        tell("mounted")

    with world.client(body, 0) as child:
        child.hear()
        holder = os.open(one, os.O_RDONLY)
        try:
            admin = ("--admin", "--socket", world.daemon.admin)
            leases = json.loads(world.ctl("list", *admin, "--json").stdout)["leases"]
            by_image = {os.path.basename(lease["backing_file"]): lease for lease in leases}
            assert {lease["uid"] for lease in leases} == {0, UID}
            openers = by_image["one.img"]["openers"]
            assert any(opener.endswith(f"[{os.getpid()}]") for opener in openers)
            assert any(opener.startswith(f"{point} in ") and f"[{child.pid}]" in opener for opener in openers)
            assert by_image["two.img"].get("openers", []) == []  # loopd itself is not among them
            assert not any(f"[{pid}]" in opener for pid in world.daemon.family() for opener in openers)
            header = world.ctl("list", *admin).stdout.splitlines()[0].split()
            assert {"UNIT", "UID", "PID", "OPEN-IN"} <= set(header)

            assert world.ctl("detach", *admin, "--all", check=False).returncode == 2
            # An instance's socket has no option of its own.
            done = world.ctl("detach", *admin[1:], "--all", "--wait", "0.3", check=False)
            assert (done.returncode, "is another's" in done.stderr) == (1, True)
            assert bound_to(images[1]) != []
            done = world.ctl("detach", *admin, "--all", "--force", "--wait", "0.3", check=False)
            assert done.returncode == 1
            assert os.path.basename(one) in done.stderr
            assert bound_to(images[1]) == []
        finally:
            os.close(holder)
    eventually(lambda: not bound_to(world.work), "the files are free")
    assert world.ctl("detach", *admin, "--all", "--force").stdout == ""


def test_a_detached_device_that_is_in_use_answers_at_once(world: World) -> None:
    """Nothing is to be done on it any more: rescan and resize say so."""
    image, grant = world.image(), world.grant("build", 0)
    device = loopd.attach(image, grant, partscan=True, socket=world.daemon.path)
    pinned = os.open(device.path, os.O_RDONLY)
    try:
        assert not device.detach(wait=0.1)
        for request in (wire.Rescan(device.devname, dir_fd=0), wire.Resize(device.devname, dir_fd=0)):
            folder = os.open(grant, os.O_RDONLY)
            try:
                reply = world.daemon.ask(request._replace(reply_fd=1), [folder], timeout=5)
            finally:
                os.close(folder)
            assert reply.code in ("busy", "not-found")
    finally:
        os.close(pinned)
