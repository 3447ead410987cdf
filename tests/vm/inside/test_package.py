"""The Debian package (`make deb`) through its life: installed, upgraded with leases held, removed, purged."""

from __future__ import annotations

import os
import re
import shutil
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from host import (
    ADMIN,
    DROP_IN,
    SERVICE,
    SOCKET,
    SOCKET_PATH,
    attach,
    bound,
    leases,
    loopctl,
    name,
    prop,
    run,
    wait_for,
)
from recipes import recipe

PROJECT = Path(__file__).parents[3]
INSTANCE = "loopd@team.service"
INSTANCE_SOCKET = Path("/run/loopd-team/sock/loopd.sock")
INSTANCE_ADMIN = Path("/run/loopd-team/admin.sock")
CONFIGURATION, STATE = Path("/etc/loopd/loopd.toml"), Path("/var/lib/loopd/numbers")


def traces() -> set[str]:
    """Whatever has the name of loopd in the system's directories, without the package manager's own records."""
    found = run("find", "/etc", "/usr", "/run", "/var/lib", "-xdev", "-name", "*loopd*").splitlines()
    return {path for path in found if not path.startswith(("/var/lib/dpkg", "/run/loopd-test", "/run/systemd"))}


def install(package: Path) -> None:
    run("sh", "-ec", 'dpkg --install "$1" 2>&1', "sh", package, timeout=250)


def version(socket: Path = SOCKET_PATH) -> str:
    return loopctl("--socket", socket, "hello").split()[1].rstrip(",")


def make(target: str) -> None:
    run("make", "-s", "-C", PROJECT, target, timeout=250)


@pytest.fixture(scope="module")
def before() -> Iterator[set[str]]:
    """The traces of loopd when it is not there; what `make install` brought comes back afterwards."""
    options = DROP_IN.with_name("options.conf")
    kept = options.read_text()
    options.unlink()
    make("uninstall")
    shutil.rmtree(STATE.parent, ignore_errors=True)
    try:
        yield traces()
    finally:
        options.write_text(kept)
        make_install()


def make_install() -> None:
    if Path("/usr/local/sbin/loopd").exists():
        return
    run("dpkg", "--purge", "loopd", check=False, timeout=250)
    make("install")
    run("systemctl", "enable", "--now", SOCKET)


@pytest.fixture(scope="module")
def package(before: set[str]) -> Path:
    """The package, installed as docs/packages.md has it (but built on another machine)."""
    (built,) = (PROJECT / "build").glob("*.deb")
    build, install, _ = recipe("On Debian", page="packages.md").splitlines()
    assert build == "make deb"
    run("sh", "-euc", install, cwd=PROJECT, timeout=250)
    return built


@pytest.fixture
def afterwards_installed() -> Iterator[None]:
    yield
    make_install()


@pytest.fixture
def next_version(package: Path, folder: Path) -> Path:
    """The same package as a later version, which says so itself."""
    tree = folder / "next"
    run("dpkg-deb", "--raw-extract", package, tree)
    run("sed", "-i", "/^Version: /s/$/+next/", tree / "DEBIAN/control")
    run("sed", "-i", r'/^__version__ = /s/"$/+next"/', tree / "usr/lib/loopd/loopd/__init__.py")
    run("dpkg-deb", "--root-owner-group", "--build", tree, folder)
    (built,) = folder.glob("loopd_*+next_all.deb")
    return built


@pytest.mark.deadline(290)
def test_installation(package: Path) -> None:
    assert run("systemctl", "is-enabled", SOCKET, ADMIN).split() == ["enabled", "enabled"]
    assert [prop(unit, "ActiveState") for unit in (SOCKET, ADMIN, SERVICE)] == ["active", "active", "inactive"]
    *_, first_request = recipe("On Debian", page="packages.md").splitlines()
    assert run("sh", "-euc", first_request).startswith("loopd ")
    assert prop(SERVICE, "ActiveState") == "active"
    assert prop(SERVICE, "FragmentPath").removeprefix("/usr") == "/lib/systemd/system/loopd.service"
    assert version() == run("dpkg-deb", "--field", package, "Version").strip()
    assert list(Path("/usr/lib/loopd/loopd/__pycache__").glob("daemon.*.pyc"))


@pytest.mark.deadline(290)
@pytest.mark.usefixtures("package")
def test_upgrade_with_leases_held(next_version: Path, disk: Path, folder: Path) -> None:
    old = version()
    run("systemctl", "start", "loopd@team.socket")

    # On the common socket one that is mounted; on the instance's one of a directory grant.
    device = attach(disk)
    run("mkfs.ext4", "-q", device)
    mount = folder / "mount"
    mount.mkdir()
    run("mount", device, mount)
    other = folder / "other.img"
    shutil.copy(disk, other)
    grant = loopctl("directory", "team").strip()
    second = loopctl("--socket", INSTANCE_SOCKET, "attach", "--directory", grant, other).strip()
    try:
        services, sockets = (SERVICE, INSTANCE), (SOCKET, ADMIN, "loopd@team.socket", "loopd-admin@team.socket")
        before = bound()
        assert set(before) == {name(device), name(second)}
        held = [leases(), loopctl("--socket", INSTANCE_ADMIN, "list", "--json").count('"devname"')]
        pids = [prop(unit, "MainPID") for unit in services]
        listening = [(prop(unit, "ActiveState"), prop(unit, "ActiveEnterTimestampMonotonic")) for unit in sockets]
        inodes = [path.stat().st_ino for path in (SOCKET_PATH, INSTANCE_SOCKET)]

        install(next_version)

        assert bound() == before
        assert [version(), version(INSTANCE_SOCKET)] == [f"{old}+next"] * 2
        assert not set(pids) & {prop(unit, "MainPID") for unit in services}
        assert listening == [
            (prop(unit, "ActiveState"), prop(unit, "ActiveEnterTimestampMonotonic")) for unit in sockets
        ]
        assert inodes == [path.stat().st_ino for path in (SOCKET_PATH, INSTANCE_SOCKET)]
        now = [leases(), loopctl("--socket", INSTANCE_ADMIN, "list", "--json").count('"devname"')]
        for lease in (*held[0], *now[0]):
            assert lease.pop("age") >= 0
            del lease["openers"]  # udev may be at it
        assert now == held
        assert len(held[0]) == held[1] == 1
        (mount / "file").write_text("after the upgrade\n")
        run("sync", "--file-system", mount)
        with open(second, "r+b", buffering=0) as file:
            file.write(b"after the upgrade\n".ljust(512))
            os.fsync(file.fileno())
        assert other.read_bytes().startswith(b"after the upgrade\n")
    finally:
        run("umount", mount)
        loopctl("detach", device)
        loopctl("--socket", INSTANCE_SOCKET, "detach", second)
    assert bound() == {}
    loopctl("directory", "--remove", "team")


@pytest.mark.deadline(290)
def test_installer_of_the_cluster(package: Path) -> None:
    """docs/kubernetes/installer.yaml: its command, in a privileged container with the host's process ids."""
    manifest = (PROJECT / "docs/kubernetes/installer.yaml").read_text()
    (block,) = re.findall(r"(?s)            - -ec\n            - \|\n(.*?)\n      containers:", manifest)
    container = ["podman", "run", "--rm", "--privileged", "--pid=host", "--network=none"]
    container += [f"--volume={package}:/loopd_0_all.deb:ro", "--rootfs", "/srv/container:O"]
    run("dpkg", "--purge", "loopd", timeout=250)
    for _ in range(2):  # the second time there is nothing to do but to enable
        run(*container, "/bin/sh", "-ec", textwrap.dedent(block), timeout=250)
    assert run("systemctl", "is-enabled", SOCKET, "loopd@builds.socket").split() == ["enabled", "enabled"]
    assert version(Path("/run/loopd-builds/sock/loopd.sock")) == run("dpkg-deb", "--field", package, "Version").strip()
    run("systemctl", "disable", "--now", "loopd@builds.socket")
    run("systemctl", "stop", "loopd@builds.service")


@pytest.mark.deadline(290)
@pytest.mark.usefixtures("package", "afterwards_installed")
def test_removal_and_purge(before: set[str], disk: Path, folder: Path) -> None:
    CONFIGURATION.write_text("limits.devices = 7\n")
    run("systemctl", "start", "loopd@team.socket")
    idle = attach(disk)
    in_use = folder / "in-use.img"
    shutil.copy(disk, in_use)
    mounted = loopctl("--socket", INSTANCE_SOCKET, "attach", "--directory", disk.parent / "dev", in_use).strip()
    run("mkfs.ext4", "-q", mounted)
    mount = folder / "mount"
    mount.mkdir()
    run("mount", mounted, mount)
    try:
        run("dpkg", "--remove", "loopd", timeout=250)
        # Given up, nodes included; what is in use works until its last close.
        assert list((disk.parent / "dev").iterdir()) == []
        assert set(bound()) == {name(mounted)}
        (mount / "file").write_text("after the removal\n")
    finally:
        run("umount", mount)
    wait_for("the device goes at its last close", lambda: not bound())
    assert not Path(idle).exists()
    for unit in (SOCKET, ADMIN, SERVICE, INSTANCE, "loopd@team.socket", r"run-loopd\x2ddev.mount"):
        assert (prop(unit, "LoadState"), prop(unit, "ActiveState")) == ("not-found", "inactive"), unit
    assert run("systemctl", "--failed", "--plain", "--no-legend") == ""
    assert run("find", "/run", "-maxdepth", "1", "-name", "loopd*", "!", "-name", "loopd-test*") == ""
    assert [path.exists() for path in (CONFIGURATION, STATE)] == [True, True]

    run("dpkg", "--purge", "loopd", timeout=250)
    shutil.rmtree(disk.parent / "dev")
    assert traces() == before
