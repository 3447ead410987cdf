"""Each recipe of docs/containers.md, as it stands there, makes a real disk image, and the host checks it afterwards."""

from __future__ import annotations

import json
import os
import re
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path

import build
import pytest
from host import Journal, bound, leases, loopctl, run, wait_for
from recipes import recipe

EXPIRED = "6f627446202b41ccba539dbefc35b92a"
PROJECT = Path(__file__).parents[3]
ROOT = Path("/srv/container")
# What podman takes in place of an image: a root directory, whose changes are thrown away.
ROOTFS = f"--rootfs {ROOT}:O"


@pytest.fixture
def work(folder: Path) -> Iterator[Path]:
    """The folder that a container gets as /work, with the document's build.sh."""
    build.write(folder)
    yield folder
    run("loopctl", "directory", "--remove", "build", check=False)


def perform(text: str, folder: Path) -> None:
    """Run a recipe as the reader does, in a shell, and check what it made."""
    run("sh", "-ec", text, cwd=folder, timeout=200)
    check(folder)


def check(folder: Path) -> None:
    """What was made, and that no other delivery has stood in for the directory of loopd's."""
    build.check(folder)
    assert (folder / "device").read_text().startswith("/dev/loopd/loop")


def container_of(work: Path) -> str:
    """The pattern of the id of a container of podman's or docker's: it is called by the first half of it."""
    return f"{(work / 'host').read_text().strip()}[0-9a-f]+"


@pytest.mark.deadline(240)
def test_podman(work: Path, journal: Journal) -> None:
    perform(recipe("Podman, rootful", IMAGE=ROOTFS), work)
    build.recorded(journal, build.unit_of(journal, rf"libpod-{container_of(work)}\.scope"))


@pytest.mark.deadline(240)
def test_podman_without_cdi(work: Path, journal: Journal) -> None:
    perform(recipe("Podman, rootful, without CDI", IMAGE=ROOTFS), work)
    build.recorded(journal, build.unit_of(journal, rf"libpod-{container_of(work)}\.scope"))


def podman(command: str, *options: str) -> str:
    """The recipe with another command and more options."""
    text = recipe("Podman, rootful, without CDI", IMAGE=ROOTFS).replace("./build.sh", command)
    return text.replace("podman run", " ".join(("podman run", "--log-driver=none", *options)))


@pytest.mark.deadline(240)
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
    ended = (f"LOOPD_UNIT=libpod-{identifier}.scope", f"MESSAGE_ID={EXPIRED}")
    wait_for("that is recorded", lambda: len(journal.records(*ended)) == 2)


@pytest.mark.deadline(240)
def test_a_container_finds_a_socket_that_was_made_anew(work: Path) -> None:
    run("sh", "-ec", podman("sleep 600", "--detach", "--name=waits"), cwd=work)
    try:
        assert run("podman", "exec", "waits", "loopctl", "hello").startswith("loopd ")
        run("systemctl", "restart", "loopd.socket")
        assert run("podman", "exec", "waits", "loopctl", "hello").startswith("loopd ")
    finally:
        run("podman", "kill", "waits")


USR = f"{ROOT}/usr:/usr"


def below_usr() -> list[str]:
    """The same, but for /usr/local: Docker mounts volumes over what a specification brings."""
    return [f"{path}:/usr/{path.name}" for path in sorted((ROOT / "usr").iterdir()) if path.name != "local"]


@pytest.fixture(scope="module")
def docker_image() -> Iterator[str]:
    """An image that has all but /usr, which takes minutes to import; it is USR that is bind-mounted instead."""
    run("systemctl", "start", "docker.service", timeout=120)
    run("sh", "-c", f"tar -C {ROOT} --exclude=./usr --exclude=./var -c . | docker import - builder", timeout=200)
    yield "builder"
    run("docker", "image", "rm", "--force", "builder")
    run("systemctl", "stop", "docker.service", "docker.socket", "containerd.service")


def recorded_for_docker(journal: Journal, work: Path) -> None:
    build.recorded(journal, build.unit_of(journal, rf"docker-{container_of(work)}\.scope"))


@pytest.mark.deadline(480)
def test_docker(work: Path, docker_image: str, journal: Journal) -> None:
    volumes = " ".join(f"--volume={volume}" for volume in below_usr())
    perform(recipe("Docker", IMAGE=f"{volumes} {docker_image}"), work)
    recorded_for_docker(journal, work)


@pytest.mark.deadline(480)
def test_compose(work: Path, docker_image: str, journal: Journal) -> None:
    text = recipe("Compose", "yaml", IMAGE=docker_image)
    assert "volumes: [" in text
    (work / "compose.yaml").write_text(text.replace("volumes: [", f"volumes: [{', '.join(below_usr())}, "))
    perform(recipe("Compose"), work)
    recorded_for_docker(journal, work)


@pytest.mark.deadline(480)
def test_gitlab_runner(work: Path, docker_image: str, journal: Journal) -> None:
    """As the runner does, for want of it: its docker executor gives Docker these settings and a folder of its own."""
    (runner,) = tomllib.loads(recipe("GitLab runner", "toml"))["runners"]
    settings = runner["docker"]
    options = [f"--cap-drop={name}" for name in settings["cap_drop"]]
    options += [f"--device-cgroup-rule={rule}" for rule in settings["device_cgroup_rules"]]
    options += [f"--volume={volume}" for volume in (*settings["volumes"], USR, f"{work}:/work")]
    loopctl("directory", "build")
    run("docker", "run", "--rm", "--network=none", *options, "--workdir=/work", docker_image, "./build.sh", timeout=200)
    check(work)
    recorded_for_docker(journal, work)


@pytest.mark.deadline(480)
def test_github_runner(work: Path, docker_image: str, journal: Journal) -> None:
    """By act, which runs a workflow without GitHub."""
    text = recipe("GitHub runner", "yaml", IMAGE=docker_image)
    (work / "workflow.yaml").write_text("on: push\n" + text.replace("volumes:\n", f"volumes:\n        - {USR}\n"))
    (work / ".actrc").touch()  # without it asks which image to take where the workflow names none
    loopctl("directory", "build")
    options = ["--bind", "--pull=false", "--no-cache-server", "--container-daemon-socket=-"]
    options += ["--platform=self-hosted=none", "--workflows=workflow.yaml"]
    run("env", f"HOME={work}", PROJECT / ".venv/bin/act", "push", *options, cwd=work, timeout=300)
    check(work)
    # It has the host's network, and so the host's name.
    build.recorded(journal, build.unit_of(journal, r"docker-[0-9a-f]{64}\.scope"))


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
    check(work)
    build.recorded(journal, "build.service")


@pytest.mark.deadline(240)
def test_nspawn(work: Path, journal: Journal) -> None:
    perform(recipe("systemd-nspawn"), work)
    build.recorded(journal, "machine-build.scope")


@pytest.mark.usefixtures("instance")
@pytest.mark.deadline(480)
def test_nspawn_with_a_user_namespace(work: Path, journal: Journal) -> None:
    """It has the socket of an instance, and neither that of loopd.service nor its group."""
    perform(recipe("systemd-nspawn with a user namespace"), work)
    build.recorded(journal, "machine-build.scope")
    records = journal.records("LOOPD_UNIT=machine-build.scope")
    assert {(record["LOOPD_INSTANCE"], record["LOOPD_UID"]) for record in records} == {("build", "1342177280")}


@pytest.mark.deadline(240)
def test_bubblewrap(work: Path, journal: Journal) -> None:
    perform(recipe("bubblewrap"), work)
    build.recorded(journal, "build.service")


@pytest.mark.deadline(240)
def test_lxc(work: Path, journal: Journal) -> None:
    """The changes are thrown away, as elsewhere. There is no AppArmor in the VM to load LXC's profile."""
    text = recipe("LXC", "ini").replace("/srv/build", str(work))
    text = text.replace(f"dir:{ROOT}", f"overlayfs:{ROOT}:{work}/changes/upper")
    (work / "changes").mkdir()
    (work / "build.conf").write_text(f"{text}lxc.apparmor.profile = unconfined\n")
    perform(recipe("LXC"), work)
    build.recorded(journal, "lxc.payload.build")


@pytest.mark.deadline(240)
def test_partitions_of_a_table_that_was_there_before(work: Path) -> None:
    """With rules for exactly the partitions of an image, their nodes open, and without they do not."""
    table = "label: gpt\nsize=16M, type=uefi, name=boot\ntype=linux, name=root\n"
    disk = work / "disk.img"
    with disk.open("wb") as file:
        file.truncate(48 << 20)
    run("sfdisk", "--quiet", disk, text=table)
    text = recipe("Partitions", IMAGE=ROOTFS)
    assert '"$@" --volume' in text
    without = text.replace('"$@" --volume', "--volume").replace("podman run", "! podman run")
    assert "Operation not permitted" in run("sh", "-ec", without.replace('p2"', 'p2" 2>&1'), cwd=work)
    assert not has_ext4(disk, 2)
    run("sh", "-ec", text, cwd=work)
    assert has_ext4(disk, 2)


def has_ext4(disk: Path, number: int) -> bool:
    partition = json.loads(run("sfdisk", "--json", disk))["partitiontable"]["partitions"][number - 1]
    with disk.open("rb") as file:
        file.seek(partition["start"] * 512 + 0x438)
        return file.read(2) == b"\x53\xef"


def test_what_cap_mknod_would_give(work: Path) -> None:
    """With it, and the rule that lets the container open its own devices, those of the host are in reach."""
    secret = work / "secret"
    secret.write_bytes(b"SECRET".ljust(1 << 20))
    device = Path(run("losetup", "--find", "--show", secret).strip())
    try:
        minor = os.minor(device.stat().st_rdev)
        command = podman(f"sh -c 'mknod /tmp/other b 7 {minor} && head -c 6 /tmp/other'")
        assert run("sh", "-ec", command, cwd=work, check=False) == ""
        assert "--cap-drop=MKNOD" in command
        assert run("sh", "-ec", command.replace("--cap-drop=MKNOD", "--cap-add=MKNOD"), cwd=work) == "SECRET"
    finally:
        run("losetup", "--detach", device)


def test_directories_at_boot() -> None:
    folder = Path("/etc/systemd/system/loopd-directory@build.service.d")
    folder.mkdir()
    (folder / "devices.conf").write_text(recipe("At boot", "ini"))
    try:
        run("systemctl", "enable", "--now", "loopd-directory@build")
        (row,) = json.loads(run("loopctl", "directory", "--json"))["directories"]
        assert (row["name"], len(row["numbers"])) == ("build", 16)
        assert Path("/run/loopd-dev/0-build").is_dir()
        (device,) = json.loads(Path("/run/cdi/loopd-0-build.json").read_text())["devices"]
        assert [node["path"] for node in device["containerEdits"]["deviceNodes"]] == [
            f"/dev/loop{number}" for number in row["numbers"]
        ]
        run("systemctl", "disable", "--now", "loopd-directory@build")
        assert not Path("/run/loopd-dev/0-build").exists()
        assert not Path("/run/cdi/loopd-0-build.json").exists()
    finally:
        shutil.rmtree(folder)
        run("systemctl", "daemon-reload")


def test_a_directory_that_docker_made() -> None:
    """Docker makes a folder that it is to mount and does not find. It is none of loopd's, and so it says."""
    Path("/run/loopd-dev/0-build").mkdir(0o755)
    told = run("sh", "-c", "loopctl directory build 2>&1; loopctl directory --remove build; loopctl directory build")
    refusal, path = told.splitlines()
    assert "somebody else has made it" in refusal
    assert path == "/run/loopd-dev/0-build"
    loopctl("directory", "--remove", "build")


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
