"""Each kind of container makes a real disk image with loopd's socket alone, and the host checks it afterwards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from host import Journal, bound, leases, loopctl, run, wait_for

ATTACHED = "e17225313c4f47a991f13d0e9b7456a8"
EXPIRED = "6f627446202b41ccba539dbefc35b92a"
ROOT = Path("/srv/container")
# loopctl and the library it needs, as they are installed; and the socket's directory.
PROGRAMS = ("/usr/local/bin/loopctl", "/usr/local/lib/loopd")


@pytest.fixture
def work(folder: Path) -> Path:
    """The folder that a container gets as /work, with the script that it runs."""
    script = folder / "builder.sh"
    shutil.copy(Path(__file__).with_name("builder.sh"), script)
    script.chmod(0o755)
    return folder


def check_image(disk: Path) -> None:
    """What the host finds in the image: its own losetup, kernel and file systems judge it."""
    table = json.loads(run("sfdisk", "--json", disk))["partitiontable"]
    assert table["label"] == "gpt"
    assert [partition["name"] for partition in table["partitions"]] == ["boot", "root"]
    expected = (ROOT / "etc/debian_version").read_bytes()
    device = run("losetup", "--find", "--show", "--partscan", "--read-only", disk).strip()
    mounted = disk.with_name("mounted")
    mounted.mkdir()
    try:
        for part, kind, name in ((1, "vfat", "hello"), (2, "ext4", "from-container")):
            wait_for(f"partition {part}", Path(f"{device}p{part}").exists)
            run("mount", "-o", "ro", "-t", kind, f"{device}p{part}", mounted)
            try:
                assert (mounted / name).read_bytes() == expected
            finally:
                run("umount", mounted)
    finally:
        run("losetup", "--detach", device)


def binds(option: str, separator: str = ":", read_only: str = ":ro") -> list[str]:
    programs = [f"{option}{path}{separator}{path}{read_only}" for path in PROGRAMS]
    return [f"{option}/run/loopd{separator}/run/loopd", *programs]


def podman(work: Path, *more: str) -> list[str]:
    return ["podman", "run", "--rm", "--log-driver=none", *recipe(work), *more]


def recipe(work: Path) -> list[str]:
    """What podman and docker need: the socket's directory, the device cgroup, and no CAP_MKNOD."""
    options = ["--network=none", "--cap-drop=MKNOD", "--device-cgroup-rule", "b 7:* rw"]
    return [*options, *binds("--volume="), f"--volume={work}:/work", "--workdir=/work"]


def build(runtime: str, work: Path, *image: str) -> str:
    """Make the image in a container of RUNTIME; the container's id."""
    identifier = run(runtime, "create", *recipe(work), *image, "/work/builder.sh").split()[-1]
    try:
        run(runtime, "start", "--attach", identifier, timeout=200)
    finally:
        run(runtime, "rm", identifier)
    return identifier


@pytest.mark.deadline(240)
def test_podman(work: Path, journal: Journal) -> None:
    identifier = build("podman", work, "--rootfs", f"{ROOT}:O")
    check_image(work / "disk.img")
    records = journal.records(f"LOOPD_UNIT=libpod-{identifier}.scope")
    assert [record["MESSAGE_ID"] for record in records].count(ATTACHED) == 5
    assert len(records) == 10
    assert journal.records(f"MESSAGE_ID={ATTACHED}") == [r for r in records if r["MESSAGE_ID"] == ATTACHED]


@pytest.mark.deadline(180)
def test_a_container_that_dies_leaves_nothing(work: Path, journal: Journal) -> None:
    script = "truncate -s 8M a.img b.img && loopctl attach a.img && loopctl attach b.img && touch ready && sleep 600"
    name = "dies"
    command = [*podman(work, "--detach", "--name", name), "--rootfs", f"{ROOT}:O", "sh", "-c", script]
    identifier = run(*command).strip()
    try:
        wait_for("the container has its devices", (work / "ready").exists, 60)
        assert len(bound()) == 2
    finally:
        run("podman", "kill", name)
    wait_for("its devices are gone", lambda: not bound(), 10)
    records = journal.records(f"LOOPD_UNIT=libpod-{identifier}.scope", f"MESSAGE_ID={EXPIRED}")
    assert len(records) == 2


@pytest.mark.deadline(180)
def test_a_container_finds_a_socket_that_was_made_anew(work: Path) -> None:
    command = [*podman(work, "--detach", "--name", "waits"), "--rootfs", f"{ROOT}:O", "sleep", "600"]
    run(*command)
    try:
        assert run("podman", "exec", "waits", "loopctl", "hello").startswith("loopd ")
        run("systemctl", "restart", "loopd.socket")
        assert run("podman", "exec", "waits", "loopctl", "hello").startswith("loopd ")
    finally:
        run("podman", "kill", "waits")


@pytest.fixture
def docker_image() -> Iterator[str]:
    run("systemctl", "start", "docker.service", timeout=120)
    run("sh", "-c", f"tar -C {ROOT} -c . | docker import - builder", timeout=200)
    yield "builder"
    run("docker", "image", "rm", "--force", "builder")
    run("systemctl", "stop", "docker.service", "docker.socket", "containerd.service")


@pytest.mark.deadline(480)
def test_docker(work: Path, docker_image: str, journal: Journal) -> None:
    identifier = build("docker", work, docker_image)
    check_image(work / "disk.img")
    assert len(journal.records(f"LOOPD_UNIT=docker-{identifier}.scope", f"MESSAGE_ID={ATTACHED}")) == 5


@pytest.mark.deadline(240)
def test_nspawn(work: Path, journal: Journal) -> None:
    command = "systemd-nspawn --quiet --pipe --private-network --volatile=overlay --machine=builds".split()
    command += [f"--directory={ROOT}", "--drop-capability=CAP_MKNOD", "--property=DeviceAllow=block-loop rw"]
    command += [
        "--bind=/run/loopd",
        *(f"--bind-ro={path}" for path in PROGRAMS),
        f"--bind={work}:/work",
        "--chdir=/work",
    ]
    run(*command, "/work/builder.sh", timeout=200)
    check_image(work / "disk.img")
    assert len(journal.records(f"MESSAGE_ID={ATTACHED}")) == 5


@pytest.mark.deadline(240)
def test_bubblewrap(work: Path, journal: Journal) -> None:
    """Its own /dev is a tmpfs with nodev, so a directory of the host holds the nodes."""
    nodes = work / "nodes"
    nodes.mkdir()
    command = [
        "bwrap",
        "--unshare-pid",
        "--unshare-net",
        "--unshare-ipc",
        "--unshare-uts",
        "--unshare-cgroup",
        "--die-with-parent",
    ]
    command += ["--bind", str(ROOT), "/", "--dev", "/dev", "--proc", "/proc", "--tmpfs", "/run", "--tmpfs", "/tmp"]
    for path in ("/run/loopd", *PROGRAMS):
        command += ["--ro-bind", path, path]
    command += ["--bind", str(work), "/work", "--dev-bind", str(nodes), "/dev/loopd", "--chdir", "/work"]
    run(
        "systemd-run",
        "--quiet",
        "--wait",
        "--pipe",
        "--unit=sandbox.service",
        *command,
        "./builder.sh",
        "/dev/loopd",
        timeout=200,
    )
    check_image(work / "disk.img")
    assert len(journal.records("LOOPD_UNIT=sandbox.service", f"MESSAGE_ID={ATTACHED}")) == 5
    assert list(nodes.iterdir()) == []


def test_without_the_device_cgroup_rule(work: Path) -> None:
    """What a container is told when the recipe's rule is missing: it names the layer, and nothing is left."""
    command = [argument for argument in podman(work) if argument not in ("--device-cgroup-rule", "b 7:* rw")]
    script = "truncate -s 8M disk.img; loopctl attach disk.img 2>&1; echo status $?"
    told = run(*command, "--rootfs", f"{ROOT}:O", "sh", "-c", script)
    assert told.strip().endswith("status 1")
    assert "cgroup" in told
    wait_for("nothing is bound", lambda: not bound(), 10)


def test_host_sees_whose_they_are(disk: Path) -> None:
    nodes = disk.parent / "dev"
    nodes.mkdir()
    script = f"loopctl attach --directory {nodes} {disk}; touch {nodes}/ready; sleep 600"
    run("systemd-run", "--quiet", "--unit=owner.service", "sh", "-c", script)
    try:
        wait_for("it is attached", (nodes / "ready").exists)
        (lease,) = leases()
        assert lease["account"].endswith("/owner.service")
        assert lease["backing_file"] == str(disk)
        assert lease["uid"] == 0
        assert loopctl("list").strip() == "", "a lease of another account is listed"
        loopctl("--admin", "detach", "--force", lease["devname"])
        assert leases() == []
    finally:
        run("systemctl", "stop", "owner.service")
