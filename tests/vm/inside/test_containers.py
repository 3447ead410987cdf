"""Each recipe of docs/containers.md, as it stands there, makes a real disk image, and the host checks it afterwards."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from host import Journal, bound, leases, loopctl, run, wait_for
from recipes import recipe

ATTACHED = "e17225313c4f47a991f13d0e9b7456a8"
EXPIRED = "6f627446202b41ccba539dbefc35b92a"
ROOT = Path("/srv/container")
# What podman takes in place of an image: a root directory, whose changes are thrown away.
ROOTFS = f"--rootfs {ROOT}:O"


@pytest.fixture
def work(folder: Path) -> Iterator[Path]:
    """The folder that a container gets as /work, with the document's build.sh; it says there which host it ran on."""
    write_build(folder, "By offset")
    yield folder
    loopctl("directory", "--remove", "build")


def write_build(folder: Path, section: str) -> None:
    script = folder / "build.sh"
    script.write_text(recipe(section) + "hostname >host\n")
    script.chmod(0o755)


def perform(text: str, folder: Path) -> None:
    """Run a recipe as the reader does, in a shell, and check what it made."""
    run("sh", "-ec", text, cwd=folder, timeout=200)
    check_image(folder / "disk.img", folder / "content/hello")


def check_image(disk: Path, hello: Path) -> None:
    """What the host finds in the image: its own losetup, kernel and file systems judge it."""
    table = json.loads(run("sfdisk", "--json", disk))["partitiontable"]
    assert table["label"] == "gpt"
    assert [partition["name"] for partition in table["partitions"]] == ["boot", "root"]
    device = run("losetup", "--find", "--show", "--partscan", "--read-only", disk).strip()
    mounted = disk.with_name("mounted")
    mounted.mkdir()
    # Where udev looks at the device meanwhile, a kernel scans it twice, and the partitions are gone in between.
    run("udevadm", "settle")
    try:
        for number, kind in ((1, "vfat"), (2, "ext4")):
            wait_for(f"partition {number}", Path(f"{device}p{number}").exists)
            run("mount", "-o", "ro", "-t", kind, f"{device}p{number}", mounted)
            try:
                assert (mounted / "hello").read_bytes() == hello.read_bytes() != b""
            finally:
                run("umount", mounted)
        run("e2fsck", "-fn", f"{device}p2")
    finally:
        run("losetup", "--detach", device)


def recorded(journal: Journal, unit: str, work: Path) -> None:
    """The journal has under the name of that unit all that the build did: a disk and three windows on it."""
    records = journal.records(f"LOOPD_UNIT={unit}")
    assert [record["MESSAGE_ID"] for record in records].count(ATTACHED) == 4
    assert len(records) == 8
    assert {record["LOOPD_BACKING_FILE"] for record in records} == {"/work/disk.img"}
    everybodys = journal.records(f"MESSAGE_ID={ATTACHED}")
    assert everybodys == [record for record in records if record["MESSAGE_ID"] == ATTACHED]


def unit_of(journal: Journal, pattern: str) -> str:
    """The one unit of that form that is in the journal."""
    units = {record["LOOPD_UNIT"] for record in journal.records(f"MESSAGE_ID={ATTACHED}")}
    (unit,) = units
    assert re.fullmatch(pattern, unit)
    return unit


@pytest.mark.deadline(240)
def test_podman(work: Path, journal: Journal) -> None:
    perform(recipe("Podman, rootful", IMAGE=ROOTFS), work)
    # A container's hostname is its id, the first half of it.
    short = (work / "host").read_text().strip()
    recorded(journal, unit_of(journal, rf"libpod-{short}[0-9a-f]+\.scope"), work)


def podman(command: str, *options: str) -> str:
    """The recipe with another command and more options."""
    text = recipe("Podman, rootful", IMAGE=ROOTFS).replace("./build.sh", command)
    return text.replace("podman run", " ".join(("podman run", "--log-driver=none", *options)))


@pytest.mark.deadline(180)
def test_a_container_that_dies_leaves_nothing(work: Path, journal: Journal) -> None:
    """Without the directory, too: the nodes are then in the container's own /dev."""
    script = "truncate -s 8M a.img b.img && loopctl attach a.img >a && loopctl attach -d /dev b.img >b && sleep 600"
    identifier = run("sh", "-ec", podman(f"sh -c '{script}'", "--detach", "--name=dies"), cwd=work).strip()
    try:
        wait_for("the container has its devices", lambda: (work / "b").exists() and (work / "b").read_text(), 60)
        assert len(bound()) == 2
        assert (work / "a").read_text().startswith("/dev/loopd/loop")
        assert re.fullmatch("/dev/loop[0-9]+\n", (work / "b").read_text())
    finally:
        run("podman", "kill", "dies")
    wait_for("its devices are gone", lambda: not bound(), 10)
    records = journal.records(f"LOOPD_UNIT=libpod-{identifier}.scope", f"MESSAGE_ID={EXPIRED}")
    assert len(records) == 2


@pytest.mark.deadline(180)
def test_a_container_finds_a_socket_that_was_made_anew(work: Path) -> None:
    run("sh", "-ec", podman("sleep 600", "--detach", "--name=waits"), cwd=work)
    try:
        assert run("podman", "exec", "waits", "loopctl", "hello").startswith("loopd ")
        run("systemctl", "restart", "loopd.socket")
        assert run("podman", "exec", "waits", "loopctl", "hello").startswith("loopd ")
    finally:
        run("podman", "kill", "waits")


@pytest.fixture
def docker_image() -> Iterator[str]:
    """An image that has all but /usr, which takes minutes to import, and is bind-mounted instead."""
    run("systemctl", "start", "docker.service", timeout=120)
    run("sh", "-c", f"tar -C {ROOT} --exclude=./usr --exclude=./var -c . | docker import - builder", timeout=200)
    yield f"--volume={ROOT}/usr:/usr builder"
    run("docker", "image", "rm", "--force", "builder")
    run("systemctl", "stop", "docker.service", "docker.socket", "containerd.service")


@pytest.mark.deadline(480)
def test_docker(work: Path, docker_image: str, journal: Journal) -> None:
    perform(recipe("Docker", IMAGE=docker_image), work)
    short = (work / "host").read_text().strip()
    recorded(journal, unit_of(journal, rf"docker-{short}[0-9a-f]+\.scope"), work)


@pytest.mark.deadline(240)
def test_quadlet(work: Path, journal: Journal) -> None:
    """A Quadlet takes a root directory by a key of its own."""
    text = recipe("Quadlet", "ini").replace("Image=IMAGE", f"Rootfs={ROOT}:O").replace("/srv/build:", f"{work}:")
    unit = Path("/etc/containers/systemd/build.container")
    unit.parent.mkdir(parents=True, exist_ok=True)
    unit.write_text(text)
    try:
        run("systemctl", "daemon-reload")
        run("systemctl", "start", "build", timeout=200)
    finally:
        unit.unlink()
        run("systemctl", "daemon-reload")
    check_image(work / "disk.img", work / "content/hello")
    recorded(journal, "build.service", work)


@pytest.mark.deadline(240)
def test_nspawn(work: Path, journal: Journal) -> None:
    perform(recipe("systemd-nspawn"), work)
    recorded(journal, "machine-build.scope", work)


@pytest.mark.deadline(240)
def test_bubblewrap(work: Path, journal: Journal) -> None:
    perform(recipe("bubblewrap"), work)
    recorded(journal, "build.service", work)


@pytest.mark.deadline(240)
def test_lxc(work: Path, journal: Journal) -> None:
    """The changes are thrown away, as elsewhere. There is no AppArmor in the VM to load LXC's profile."""
    text = recipe("LXC", "ini").replace("/srv/build", str(work))
    text = text.replace(f"dir:{ROOT}", f"overlayfs:{ROOT}:{work}/changes/upper")
    (work / "changes").mkdir()
    (work / "build.conf").write_text(f"{text}lxc.apparmor.profile = unconfined\n")
    perform(recipe("LXC"), work)
    recorded(journal, "lxc.payload.build", work)


def test_without_the_device_cgroup_rule(work: Path) -> None:
    """What a container is told when the recipe's rule is missing: it names the layer, and nothing is left."""
    script = "truncate -s 8M disk.img; loopctl attach disk.img 2>&1; echo status $?"
    command = podman(f"sh -c '{script}'")
    rule = "--device-cgroup-rule='b 7:* rw'"
    assert rule in command
    told = run("sh", "-ec", command.replace(rule, ""), cwd=work)
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
