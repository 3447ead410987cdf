"""A user without a right on the host's loop devices makes a disk image, by the recipes of docs/containers.md."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import build
import pytest
from host import Journal, findings, loopctl, prop, run, wait_for
from recipes import recipe

USER, UID = "builder", 1000
ROOT = Path("/srv/rootless")
ROOTFS = f"--rootfs {ROOT}:O"
CAP_MKNOD, CAP_SYS_ADMIN = 1 << 27, 1 << 21


@pytest.fixture(scope="module", autouse=True)
def user() -> Iterator[None]:
    """The user is in the group loopd, and has a service manager; what the document asks for."""
    run("usermod", "--append", "--groups", "loopd", USER)
    run("loginctl", "enable-linger", USER)
    wait_for("the user's manager runs", lambda: prop(f"user@{UID}.service", "ActiveState") == "active", 90)
    refuses = 'for node in /dev/loop*; do if [ -b "$node" ] || [ -c "$node" ]; then ! [ -r "$node" ]; fi; done'
    as_user(refuses, Path("/"))
    yield
    run("loginctl", "disable-linger", USER)
    run("loginctl", "terminate-user", USER, check=False)
    wait_for("the user's manager has ended", lambda: prop(f"user@{UID}.service", "ActiveState") == "inactive", 90)
    run("gpasswd", "--delete", USER, "loopd")


@pytest.fixture(scope="module")
def root() -> Iterator[str]:
    """In place of an image: a root directory whose files are this user's, which is root of its containers."""
    if not ROOT.exists():
        run("cp", "--archive", "/srv/container", ROOT, timeout=300)
        run("chown", "--recursive", "--no-dereference", f"{USER}:", ROOT, timeout=300)
    yield ROOTFS
    run("rm", "--recursive", ROOT, timeout=300)


@pytest.fixture
def work(folder: Path) -> Iterator[Path]:
    """The user's folder, with the document's build.sh; it says there in what it ran."""
    build.write(folder)
    with (folder / "build.sh").open("a") as script:
        script.write("grep -E '^(CapEff|Seccomp):' /proc/self/status >status\n")
    os.chown(folder, UID, UID)
    yield folder
    as_user("loopctl directory --remove build || :", folder)


def as_user(command: str, folder: Path) -> str:
    """Run a shell command as a service of the user's own manager."""
    manager = ["systemd-run", "--quiet", "--wait", "--pipe", "--collect", "--user", f"--machine={USER}@.host"]
    return run(*manager, f"--working-directory={folder}", "sh", "-ec", command, timeout=270)


def perform(command: str, work: Path, journal: Journal) -> dict[str, int]:
    """Run a recipe as the user, and check what it made; the status of the process in it."""
    as_user(command, work)
    build.check(work)
    (attached,) = journal.records(f"MESSAGE_ID={build.ATTACHED}")
    assert attached["LOOPD_UID"] == str(UID)
    assert f"/user@{UID}.service" in attached["LOOPD_ACCOUNT"]
    status = (line.split() for line in (work / "status").read_text().splitlines())
    return {field.rstrip(":"): int(value, 16) for field, value in status}


@pytest.mark.deadline(400)
def test_podman(work: Path, root: str, journal: Journal) -> None:
    """With the capabilities and the seccomp profile that a container gets by itself."""
    status = perform(recipe("Podman, rootless", IMAGE=root), work, journal)
    assert status["CapEff"] & (CAP_SYS_ADMIN | CAP_MKNOD) == 0
    assert status["Seccomp"] == 2
    build.unit_of(journal, r"libpod-[0-9a-f]{64}\.scope")


@pytest.mark.deadline(400)
def test_podman_with_one_option(work: Path, root: str, journal: Journal) -> None:
    """Root makes the specification, where podman is older than 5.5; in the document's words."""
    spec = Path(f"/run/cdi/loopd-{UID}-build.json")
    assert loopctl("directory", "--cdi", f"--user={USER}", "build") == f"loopd.alt/loop-{UID}=build\n"
    assert Path(f"/run/loopd-dev/{UID}-build").is_dir()
    try:
        status = perform(recipe("Podman, rootless, with one option", IMAGE=root), work, journal)
        assert status["CapEff"] & (CAP_SYS_ADMIN | CAP_MKNOD) == 0
        assert (work / "device").read_text().startswith("/dev/loopd/loop")
    finally:
        loopctl("directory", "--remove", f"--user={USER}", "build")
    assert not spec.exists()
    assert not Path(f"/run/loopd-dev/{UID}-build").exists()


@pytest.mark.exhaustive
@pytest.mark.deadline(300)
def test_podman_with_a_mount(work: Path, root: str, journal: Journal) -> None:
    status = perform(recipe("Podman, rootless, without a directory", IMAGE=root), work, journal)
    assert status["CapEff"] & CAP_SYS_ADMIN
    assert status["Seccomp"] == 2


@pytest.mark.exhaustive
@pytest.mark.usefixtures("instance")
@pytest.mark.deadline(480)
def test_podman_with_an_instance(work: Path, root: str, journal: Journal) -> None:
    """Who has the instance's socket mounted may ask, and who is in its group may mount it."""
    perform(recipe("Podman, rootless, with an instance", IMAGE=root), work, journal)
    unit = build.unit_of(journal, r"libpod-[0-9a-f]{64}\.scope")
    build.recorded(journal, unit)
    assert {record["LOOPD_INSTANCE"] for record in journal.records(f"LOOPD_UNIT={unit}")} == {"build"}


@pytest.mark.deadline(240)
def test_unshare(work: Path, journal: Journal) -> None:
    perform(recipe("unshare"), work, journal)


@pytest.mark.exhaustive
@pytest.mark.deadline(240)
def test_unshare_with_a_mount(work: Path, journal: Journal) -> None:
    perform(recipe("unshare, without a directory"), work, journal)


@pytest.mark.deadline(240)
def test_bubblewrap(work: Path, journal: Journal) -> None:
    perform(recipe("bubblewrap, rootless"), work, journal)
    assert (work / "device").read_text().startswith("/dev/loopd/loop")


# What the doctor finds --------------------------------------------------------------------------------------


def examined(command: str, work: Path) -> dict[str, tuple[str, str]]:
    """Level and text of each layer, of `loopctl doctor` in place of the build."""
    assert "./build.sh" in command
    return findings(as_user(f"{command.replace('./build.sh', 'loopctl doctor').rstrip()} || :", work))


@pytest.mark.exhaustive
@pytest.mark.deadline(300)
def test_the_doctor_in_podman(work: Path, root: str) -> None:
    whole = recipe("Podman, rootless", IMAGE=root)
    found = examined(whole, work)
    assert {level for level, _ in found.values()} == {"OK"}
    assert "p1 opens: the kernel's partition, whose node loopd can close" in found["partitions"][1]

    found = examined(whole.replace("--group-add=keep-groups", ""), work)
    assert found["socket"][0] == found["group"][0] == "FAIL"
    assert "--group-add keep-groups" in found["group"][1]

    directory = '--volume="$(loopctl directory build)":/dev/loopd:ro'
    assert directory in whole
    found = examined(whole.replace(directory, ""), work)
    assert found["directory"][0] == "WARN"
    assert found["user namespace"][0] == found["device"][0] == "FAIL"
    assert "loopctl directory NAME" in found["user namespace"][1]
    assert "--cap-add SYS_ADMIN" in found["user namespace"][1]

    roots = loopctl("directory", "roots").strip()
    found = examined(whole.replace(directory, f"--volume={roots}:/dev/loopd:ro"), work)
    loopctl("directory", "--remove", "roots")
    assert found["directory"][0] == "FAIL"
    assert "without sudo" in found["directory"][1]
    assert f"loopctl directory --user={UID} NAME" in found["directory"][1]
