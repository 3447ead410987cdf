"""Numbers and the host: losetup beside loopd, bindings that are not loopd's, files that must not become devices."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.daemon import Daemon, Reply, ask, bound_to, eventually, exists, require
from support.fuse_never import Never
from support.kept import Kept, start_kept_fixture  # noqa: F401
from support.processes import IN_NAMESPACE, Child, become, injected, mount_tmpfs, own_user_namespace
from support.untouched import cgroup, children, helpers, leases

from loopd.loop import Loop
from loopd.protocol import wire
from loopd.worker.make import FIRST

SOON = 5.0


# Beside the host's losetup ----------------------------------------------------------------------------------------


@pytest.fixture
def losetup(tmp_path: Path) -> Iterator[Callable[[], str]]:
    """Have the host bind an image of its own to a device that losetup finds; its name. Unbound at the end."""
    bound: list[str] = []

    def bind() -> str:
        path = tmp_path / f"host{len(bound)}"
        path.write_bytes(b"the host's".ljust(1 << 16, b"\0"))
        done = subprocess.run(["losetup", "--find", "--show", str(path)], check=True, capture_output=True, text=True)
        bound.append(done.stdout.strip())
        return os.path.basename(bound[-1])

    yield bind
    for device in bound:
        subprocess.run(["losetup", "--detach", device], check=True)


def _file_of(name: str) -> str:
    return Path(f"/sys/block/{name}/loop/backing_file").read_text().strip()


def test_the_host_with_all_low_devices_bound(
    daemon: Daemon, image: int, directory: int, devices: Path, tmp_path: Path, losetup: Callable[[], str]
) -> None:
    """More bindings of the host's than there were devices: each is what it was, and so is each of loopd's."""
    held: dict[str, Reply] = {}
    hosts: list[str] = []
    before = sum(int(path.name[4:]) < FIRST for path in Path("/sys/block").glob("loop*"))
    for _ in range(before + 6):
        hosts.append(losetup())
        reply = daemon.attach(image, directory)
        assert reply.code is None, reply.fields
        held[reply.fields["devname"]] = reply
        # loopd is told by a uevent, and makes another for the host to find.
        eventually(_free_low, "a low device is free again")
    assert len({*hosts, *held}) == len(hosts) + len(held)
    assert all(int(name[4:]) < FIRST for name in hosts)
    assert all(int(name[4:]) >= FIRST for name in held)
    for number, name in enumerate(hosts):
        assert _file_of(name) == str(tmp_path / f"host{number}")
        assert Path(f"/dev/{name}").read_bytes()[:10] == b"the host's"
    for name in held:
        assert _file_of(name) == str(tmp_path / "image")
        assert (devices / name).is_block_device()
    name, reply = held.popitem()
    assert daemon.ask(wire.Detach(name, 0), []).fields == {"state": "released"}
    assert [_file_of(name) for name in hosts] == [str(tmp_path / f"host{number}") for number in range(len(hosts))]
    reply.close()


def _free_low() -> bool:
    return any(int(path.name[4:]) < FIRST and not (path / "loop").exists() for path in Path("/sys/block").glob("loop*"))


def test_the_host_unbinds_and_binds_a_lease_of_loopds(
    daemon: Daemon, image: int, directory: int, devices: Path, tmp_path: Path
) -> None:
    """`losetup --detach` on the wrong device: what the client has open keeps it, and nothing else is bound there."""
    name = daemon.attach(image, directory).fields["devname"]
    subprocess.run(["losetup", "--detach", str(devices / name)], check=False, capture_output=True)
    with contextlib.suppress(FileNotFoundError):
        assert _file_of(name) == str(tmp_path / "image")
    for lease in leases(daemon):
        daemon.ask(wire.Detach(lease["devname"], 0), [])
    eventually(lambda: not leases(daemon), "the lease ends in good order", SOON)


# Bindings that are not loopd's ------------------------------------------------------------------------------------


@contextlib.contextmanager
def bound_by_itself(kept: Path, image: int) -> Iterator[None]:
    """A client binds the number of a node that it kept, as soon as it can; unbound again at the end."""
    device = None
    deadline = time.monotonic() + SOON
    while device is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            found = Loop.from_fd(os.open(kept, os.O_RDWR))
            try:
                found.configure(image)
                device = found
            except OSError:
                found.close()
    require(device, "the kernel makes no removed device again (loop.max_loop), and there was no moment to be faster")
    assert device is not None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            device.clear_fd()
        device.close()


def _keep(daemon: Daemon, image: int, directory: int, devices: Path, tmp_path: Path) -> tuple[str, Path]:
    reply = daemon.attach(image, directory)
    name: str = reply.fields["devname"]
    kept = tmp_path / "kept"
    (devices / name).rename(kept)
    reply.close()
    return name, kept


def test_a_binding_that_is_not_loopds_is_reported(
    daemon: Daemon, image: int, directory: int, devices: Path, tmp_path: Path
) -> None:
    """With what is known of it; and it is left as it is, for it may be the host's."""
    name, kept = _keep(daemon, image, directory, devices, tmp_path)
    eventually(lambda: not exists(name), "the number is removed")
    with bound_by_itself(kept, image):
        (record,) = eventually(lambda: daemon.records("foreign"), "it is reported", SOON)
        assert record["LOOPD_DEVICE"] == name
        assert record["LOOPD_BACKING_FILE"] == str(tmp_path / "image")
        assert (record["LOOPD_ACCOUNT"], record["LOOPD_UID"]) == ("/", "0")
        assert record["PRIORITY"] == "4"
        assert bound_to(tmp_path) == [name]
        assert daemon.attach(image, directory).code is None
    assert not [r for r in daemon.records("detached") if r["LOOPD_DEVICE"] == name]


def test_a_binding_made_before_the_number_is_removed_is_charged(
    daemon: Daemon, image: int, directory: int, devices: Path, tmp_path: Path
) -> None:
    """The client need not wait: between the last close and the removal the device is there for whoever opens it."""
    daemon.hello()
    makers = [pid for pid in children(daemon.pid) if pid not in helpers(daemon)]
    with injected(makers, "ioctl:delay_enter=500000"):
        _, kept = _keep(daemon, image, directory, devices, tmp_path)
        with bound_by_itself(kept, image):
            (record,) = eventually(lambda: daemon.records("foreign"), "it is reported", SOON)
            assert record.get("LOOPD_ACCOUNT") == "/", record


def test_a_binding_that_is_not_loopds_is_charged(
    start_daemon: Callable[..., Daemon], image: int, directory: int, devices: Path, tmp_path: Path
) -> None:
    """It is one of the devices that the account may have."""
    config = tmp_path / "loopd.toml"
    config.write_text("limits.devices = 1\n")
    daemon = start_daemon(f"--config={config}")
    name, kept = _keep(daemon, image, directory, devices, tmp_path)
    eventually(lambda: not exists(name), "the number is removed")
    with bound_by_itself(kept, image):
        eventually(lambda: daemon.records("foreign"), "it is reported", SOON)
        assert daemon.attach(image, directory).code == "quota"
    eventually(lambda: daemon.attach(image, directory).code is None, "what is gone is not charged", 10)


def test_the_hosts_own_binding_in_the_range_is_let_alone(daemon: Daemon, image: int, tmp_path: Path) -> None:
    """A number that this loopd never handed out is none of its business."""
    daemon.hello()
    number = 1_000_000
    require(not exists(f"loop{number}"), "that number is taken")
    path = tmp_path / "host"
    path.write_bytes(bytes(1 << 16))
    subprocess.run(["losetup", f"/dev/loop{number}", str(path)], check=False, capture_output=True)
    require(bound_to(path), "losetup makes no device of that number here")
    try:
        time.sleep(1.5)
        assert bound_to(path) == [f"loop{number}"]
        assert daemon.records("foreign") == []
    finally:
        subprocess.run(["losetup", "--detach", f"/dev/loop{number}"], check=True)


# Whose a number is ------------------------------------------------------------------------------------------------


def test_a_kept_node_never_reads_what_is_anothers(
    daemon: Daemon, make_image: Callable[..., int], directory: int, devices: Path, tmp_path: Path
) -> None:
    """One account's number is not given to the next; the account itself may have it again."""
    mine, secret = make_image(name="mine"), make_image(name="secret")
    name, kept = _keep(daemon, mine, directory, devices, tmp_path)
    eventually(lambda: not exists(name), "the number is removed")
    with cgroup(f"loopd-test-{os.getpid()}") as enter:
        require(enter, "needs a cgroup hierarchy to make a second account in")
        assert enter is not None

        def body(tell: Callable[[Any], None]) -> None:
            enter()
            replies = [
                ask(daemon.path, wire.encode_request(wire.Attach(0, reply_fd=1, deliver=("fd",))), [secret])
                for _ in range(80)
            ]
            tell([reply.fields["devname"] for reply in replies])

        with Child(body, keep=[secret]) as child:
            names = child.hear()
            assert name not in names
            assert len(set(names)) == 80
    kept.unlink()


# Files ------------------------------------------------------------------------------------------------------------

PSEUDO = {
    "procfs": "/proc/sys/kernel/core_pattern",
    "procfs of a process": "/proc/self/oom_score_adj",
    "sysfs": "/sys/kernel/uevent_seqnum",
    "cgroup": "/proc/self/root/sys/fs/cgroup",
}


@pytest.mark.parametrize("kind", PSEUDO)
@pytest.mark.parametrize("policy", ["the defaults", "one that allows everything else"])
def test_pseudo_file_systems(
    start_daemon: Callable[..., Daemon], directory: int, tmp_path: Path, kind: str, policy: str
) -> None:
    """A kernel thread would write them with root's rights."""
    path = Path(PSEUDO[kind])
    if kind == "cgroup":
        path = next(iter(path.rglob("cgroup.procs")), path)
        require(path.is_file(), "no cgroup hierarchy is mounted")
    config = tmp_path / "loopd.toml"
    types = sorted({line.split()[-1] for line in Path("/proc/filesystems").read_text().splitlines()})
    never = ("proc", "sysfs", "cgroup", "cgroup2")
    allowed = [name for name in types if name not in never]
    from loopd.worker.files import NEVER  # noqa: PLC0415  # the daemon's side

    assert NEVER.issuperset(never)
    listed = [name for name in allowed if name not in NEVER]
    config.write_text("" if policy == "the defaults" else f"allow.file_systems = {listed}\n")
    daemon = start_daemon(f"--config={config}")
    file = os.open(path, os.O_RDONLY)
    try:
        reply = daemon.attach(file, directory)
        assert reply.code == "not-permitted", reply.fields
        assert "not among the allowed" in reply.fields["error"]["message"]
    finally:
        os.close(file)


@pytest.fixture
def fuse(tmp_path: Path) -> Iterator[Path]:
    """A file of a FUSE file system that answers."""
    require(os.path.exists("/dev/fuse"), "needs /dev/fuse")
    try:
        never = Never(tmp_path / "never")
    except OSError as error:
        pytest.skip(f"FUSE cannot be mounted: {error}")
    try:
        yield tmp_path / "never" / "file"
    finally:
        never.end()


def test_fuse_only_where_the_administrator_allows_it(
    start_daemon: Callable[..., Daemon], directory: int, tmp_path: Path, fuse: Path
) -> None:
    daemon = start_daemon(name="defaults")
    with fuse.open("r+b") as file:
        reply = daemon.attach(file.fileno(), directory)
        assert reply.code == "not-permitted"
        assert "fuse is not among the allowed file systems" in reply.fields["error"]["message"]
    config = tmp_path / "loopd.toml"
    config.write_text('allow.file_systems = ["fuse", "ext4", "tmpfs", "overlay", "xfs", "btrfs"]\n')
    daemon = start_daemon(f"--config={config}", name="allowed")
    with fuse.open("rb") as file:
        assert daemon.attach(file.fileno(), directory, read_only=True, direct_io="off").code is None
    for reply in daemon._replies:
        reply.close()
    eventually(lambda: not leases(daemon), "the lease is over", SOON)


def test_an_overlay_of_a_user_namespace(daemon: Daemon, directory: int, tmp_path: Path) -> None:
    """One of its layers may be FUSE, which nobody can tell from outside."""
    Path(daemon.path).chmod(0o666)

    def body(tell: Callable[[Any], None]) -> None:
        os.chdir(daemon.directory)
        become(20400)
        own_user_namespace()
        mount_tmpfs("/mnt")
        for name in ("lower", "upper", "work", "merged"):
            os.mkdir(f"/mnt/{name}")
        Path("/mnt/lower/image").write_bytes(bytes(1 << 16))
        layers = "lowerdir=/mnt/lower,upperdir=/mnt/upper,workdir=/mnt/work,userxattr"
        mounted = subprocess.run(
            ["mount", "-t", "overlay", "overlay", "-o", layers, "/mnt/merged"],
            check=False,
            capture_output=True,
            text=True,
        )
        if mounted.returncode:
            tell(mounted.stderr)
            return
        tell("")
        answers = []
        for place in ("merged", "lower"):
            with open(f"/mnt/{place}/image", "r+b") as image:
                reply = ask(
                    "loopd.sock", wire.encode_request(wire.Attach(0, reply_fd=1, deliver=("fd",))), [image.fileno()]
                )
                answers.append(reply.fields)
        tell(answers)

    with Child(body) as child:
        problem = child.hear()
        require(not problem, f"no overlay in a user namespace here: {problem}")
        merged, lower = child.hear()
    assert merged["error"]["code"] == "not-permitted"
    assert "overlay that the host itself has not mounted" in merged["error"]["message"]
    assert "error" not in lower  # its tmpfs is memory, which answers


@pytest.mark.parametrize("apart", [False, True], ids=["seen by loopd", "mounted where its namespace sees nothing"])
def test_an_overlay_of_the_hosts(
    start_kept: Callable[..., Kept], directory: int, tmp_path: Path, *, apart: bool
) -> None:
    """As a container's root is, of an image: podman mounts those below a private mount, and the service has a mount
    namespace of its own.
    """
    daemon = start_kept(wrapper=[*IN_NAMESPACE, 'exec "$@"', "sh"] if apart else [])
    daemon.hello()  # it runs
    layers = tmp_path / "layers"
    subprocess.run(["mount", "--mkdir", "-t", "tmpfs", "loopd-test", str(layers)], check=True)
    try:
        for name in ("lower", "upper", "work", "merged"):
            (layers / name).mkdir()
        (layers / "lower/image").write_bytes(bytes(1 << 16))
        options = f"lowerdir={layers}/lower,upperdir={layers}/upper,workdir={layers}/work"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, str(layers / "merged")], check=True)
        try:
            with (layers / "merged/image").open("r+b") as image:
                reply = daemon.attach(image.fileno(), directory)
                assert reply.code is None, reply.fields
                name = reply.fields["devname"]
                assert daemon.ask(wire.Detach(name, 0), []).fields == {"state": "released"}
        finally:
            subprocess.run(["umount", "-l", str(layers / "merged")], check=True)
    finally:
        subprocess.run(["umount", "-l", str(layers)], check=True)
