"""The packages (`make deb`, `make rpm`) through their lives: installed, upgraded with leases held, removed, purged.

The RPM by rpm itself, on Debian, where no other package is in its database.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

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
NAMES = ("loopd", "python3-loopd")
CONFIGURATION, STATE = Path("/etc/loopd/loopd.toml"), Path("/var/lib/loopd/numbers")


def traces() -> set[str]:
    """Whatever has the name of loopd in the system's directories, without the package manager's own records."""
    found = run("find", "/etc", "/usr", "/run", "/var/lib", "-xdev", "-name", "*loopd*").splitlines()
    return {path for path in found if not path.startswith(("/var/lib/dpkg", "/run/loopd-test", "/run/systemd"))}


def version(socket: Path = SOCKET_PATH) -> str:
    return loopctl("--socket", socket, "hello").split()[1].rstrip(",")


def make(target: str) -> None:
    run("make", "-s", "-C", PROJECT, target, timeout=250)


class Package(NamedTuple):
    """A package, beside which the library's is installed, and the traces of loopd when it is not there."""

    kind: str
    path: Path
    before: set[str]

    def install(self, *paths: Path) -> None:
        """Install or upgrade."""
        command = {"deb": "dpkg --install", "rpm": "rpm --nodeps --upgrade"}[self.kind]
        run("sh", "-ec", f'{command} "$@" 2>&1', "sh", *paths, timeout=250)

    def remove(self) -> None:
        run(*{"deb": ("dpkg", "--remove"), "rpm": ("rpm", "--erase")}[self.kind], *NAMES, timeout=250)

    def purge(self) -> None:
        """Take away what `remove` leaves: with an RPM that is the administrator's to do (docs/packages.md)."""
        if self.kind == "deb":
            run("dpkg", "--purge", *NAMES, timeout=250)
        else:
            shutil.rmtree(CONFIGURATION.parent)
            shutil.rmtree(STATE.parent)


@pytest.fixture(scope="module", params=["deb", "rpm"])
def package(request: pytest.FixtureRequest) -> Iterator[Package]:
    """The package, installed in place of what `make install` brought, which comes back afterwards."""
    options = DROP_IN.with_name("options.conf")
    kept = options.read_text()
    options.unlink()
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        disk = Path(folder, "disk")
        disk.write_bytes(bytes(1 << 20))
        node = Path(attach(disk))
        make("uninstall")
        assert not node.exists(), "leases end, and their nodes go"
        assert not bound()
    shutil.rmtree(STATE.parent, ignore_errors=True)
    (built,) = (PROJECT / "build").glob(f"loopd[_-][0-9]*.{request.param}")
    package = Package(request.param, built, traces())
    try:
        build, install, *enable, _ = recipe(SECTION[package.kind], page="packages.md").splitlines()
        assert build == f"make {package.kind}"
        if package.kind == "deb":
            run("sh", "-euc", install, cwd=PROJECT, timeout=250)
        else:
            assert install == "dnf install ./build/*.noarch.rpm"
            package.install(*(PROJECT / "build").glob("*.noarch.rpm"))
            run("sh", "-euc", *enable)
        yield package
    finally:
        options.write_text(kept)
        make_install()


def make_install() -> None:
    if Path("/usr/local/sbin/loopd").exists():
        return
    both = " ".join(NAMES)
    run("sh", "-c", f"dpkg --purge {both}; rpm --erase {both}", check=False, timeout=250)
    make("install")
    run("systemctl", "enable", "--now", SOCKET)


@pytest.fixture
def afterwards_installed() -> Iterator[None]:
    yield
    make_install()


SECTION = {"deb": "On Debian", "rpm": "On Fedora"}


@pytest.fixture
def next_version(package: Package, folder: Path) -> Path:
    """The same package as a later version, which says so itself."""
    tree = folder / "next"
    later = ("sed", "-i", r'/^__version__ = /s/"$/+next"/')
    if package.kind == "deb":
        run("dpkg-deb", "--raw-extract", package.path, tree)
        run("sed", "-i", "/^Version: /s/$/+next/", tree / "DEBIAN/control")
        run(*later, tree / "usr/lib/loopd/loopd/__init__.py")
        run("dpkg-deb", "--root-owner-group", "--build", tree, folder)
    else:
        shutil.copytree(PROJECT, tree, ignore=shutil.ignore_patterns("build", ".venv", "tests"))
        (tree / "tests/vm").mkdir(parents=True)
        (old,) = re.findall(r"^loopd-(.*)-1\.noarch\.rpm$", package.path.name)
        run("make", "-s", "-C", tree, "rpm", f"VERSION={old}+next", timeout=250)
        run("mv", *(tree / "build").glob("*.rpm"), folder)
    (built,) = folder.glob(f"loopd[_-][0-9]*+next*.{package.kind}")
    return built


@pytest.mark.sample(2)
@pytest.mark.deadline(290)
def test_installation(package: Package) -> None:
    assert run("systemctl", "is-enabled", SOCKET, ADMIN).split() == ["enabled", "enabled"]
    assert [prop(unit, "ActiveState") for unit in (SOCKET, ADMIN, SERVICE)] == ["active", "active", "inactive"]
    *_, first_request = recipe(SECTION[package.kind], page="packages.md").splitlines()
    assert run("sh", "-euc", first_request).startswith("loopd ")
    assert prop(SERVICE, "ActiveState") == "active"
    assert prop(SERVICE, "FragmentPath").removeprefix("/usr") == "/lib/systemd/system/loopd.service"
    assert package.path.name.startswith((f"loopd_{version()}_", f"loopd-{version()}-"))
    assert list(Path("/usr/lib/loopd/loopd/daemon/__pycache__").glob("process.*.pyc"))
    assert run("/usr/bin/python3", "-Ic", "import loopd; print(loopd.hello().loopd)").strip() == version()


@pytest.mark.sample(2)
@pytest.mark.deadline(290)
def test_upgrade_with_leases_held(package: Package, next_version: Path, disk: Path, folder: Path) -> None:
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

        package.install(next_version)

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


@pytest.mark.exhaustive
@pytest.mark.deadline(290)
@pytest.mark.parametrize("package", ["deb"], indirect=True)
def test_installer_of_the_cluster(package: Package) -> None:
    """docs/kubernetes/installer.yaml: its command, in a privileged container with the host's process ids."""
    manifest = (PROJECT / "docs/kubernetes/installer.yaml").read_text()
    (block,) = re.findall(r"(?s)            - -ec\n            - \|\n(.*?)\n      containers:", manifest)
    container = ["podman", "run", "--rm", "--privileged", "--pid=host", "--network=none"]
    container += [f"--volume={package.path}:/loopd_0_all.deb:ro", "--rootfs", "/srv/container:O"]
    run("dpkg", "--remove", "loopd", timeout=250)  # which dpkg still knows the version of
    for _ in range(2):  # the second time there is nothing to do but to enable
        run(*container, "/bin/sh", "-ec", textwrap.dedent(block), timeout=250)
    assert run("systemctl", "is-enabled", SOCKET, "loopd@builds.socket").split() == ["enabled", "enabled"]
    assert package.path.name == f"loopd_{version(Path('/run/loopd-builds/sock/loopd.sock'))}_all.deb"
    run("systemctl", "disable", "--now", "loopd@builds.socket")
    run("systemctl", "stop", "loopd@builds.service")


@pytest.mark.sample(2)
@pytest.mark.deadline(290)
@pytest.mark.usefixtures("afterwards_installed")
def test_removal_and_purge(package: Package, disk: Path, folder: Path) -> None:
    CONFIGURATION.write_text("limits.devices = 7\n")
    run("systemctl", "enable", "--now", "loopd@team.socket")
    metrics = Path("/var/lib/prometheus/node-exporter/loopd-admin.prom")
    made = [path for path in metrics.parents if not path.exists()]
    metrics.parent.mkdir(parents=True, exist_ok=True)
    metrics.touch()
    run("systemctl", "start", "loopd-metrics.timer")
    idle = attach(disk)
    in_use = folder / "in-use.img"
    shutil.copy(disk, in_use)
    mounted = loopctl("--socket", INSTANCE_SOCKET, "attach", "--directory", disk.parent / "dev", in_use).strip()
    run("mkfs.ext4", "-q", mounted)
    mount = folder / "mount"
    mount.mkdir()
    run("mount", mounted, mount)
    try:
        package.remove()
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
    assert [path.exists() for path in (CONFIGURATION, STATE, metrics)] == [True, True, False]
    for each in made:
        each.rmdir()

    package.purge()
    shutil.rmtree(disk.parent / "dev")
    assert traces() == package.before
