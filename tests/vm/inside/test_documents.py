"""What README and docs have the reader do on a host, taken out of them. The recipes of containers.md have a file of
their own.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from host import bound, leases, loopctl, prop, run, wait_for
from recipes import DOCS, recipe

ROOTFS = "--rootfs /srv/container:O"
INSTANCE = Path("/run/loopd-build")


@pytest.fixture
def directory() -> Iterator[None]:
    yield
    loopctl("directory", "--remove", "build")


def shell(text: str, **options: Path) -> str:
    return run("sh", "-ec", text, timeout=200, **options)


@pytest.mark.deadline(240)
def test_install_as_the_readme_has_it() -> None:
    """Over what is there already: as an upgrade."""
    before = prop("loopd.socket", "ActiveEnterTimestampMonotonic")
    shell(recipe("Install", page="../README.md"), cwd=DOCS.parent)
    assert prop("loopd.socket", "ActiveState") == "active"
    assert prop("loopd.socket", "ActiveEnterTimestampMonotonic") == before, "the socket was started again"
    assert loopctl("--timeout", "90", "hello").startswith("loopd ")
    pages = [path.name for path in Path("/usr/local/share/man").rglob("loop*.*")]
    plugin = {"loopd-device-plugin.8"}  # of a package of its own
    assert set(pages) == {path.stem for path in (DOCS / "man").iterdir()} - plugin


@pytest.mark.deadline(240)
def test_a_container_with_a_device(directory: None) -> None:
    shell(recipe("A container with a device", page="../README.md", IMAGE=ROOTFS))
    assert not bound()


@pytest.fixture
def image() -> Iterator[str]:
    """An image in podman's store that has all but /usr, which takes minutes to import; that is bind-mounted instead."""
    run("sh", "-c", "tar -C /srv/container --exclude=./usr --exclude=./var -c . | podman import - builder", timeout=200)
    yield "--volume=/srv/container/usr:/usr builder"
    run("podman", "image", "rm", "--force", "builder")


@pytest.mark.exhaustive
@pytest.mark.deadline(480)
def test_a_container_of_an_image_with_a_device(directory: None, image: str) -> None:
    """Its root is mounted after loopd was started, where the service does not see it."""
    assert loopctl("hello").startswith("loopd ")
    shell(recipe("A container with a device", page="../README.md", IMAGE=image))
    assert not bound()


@pytest.mark.exhaustive
@pytest.mark.deadline(240)
def test_losetup_in_a_container(directory: None, disk: Path) -> None:
    text = recipe("losetup and mount -o loop in a container", page="losetup.md", IMAGE=ROOTFS)
    assert re.fullmatch(r"/dev/(loopd/)?loop\d+\n", shell(text, cwd=disk.parent))
    wait_for("it has ended with its container", lambda: not bound())


@pytest.mark.exhaustive
@pytest.mark.deadline(240)
def test_an_instance(disk: Path) -> None:
    rules, sock, nodes = Path("/etc/loopd/loopd.toml"), INSTANCE / "sock/loopd.sock", disk.parent / "dev"
    rules.parent.mkdir(exist_ok=True)
    nodes.mkdir()
    try:
        rules.write_text(recipe("Its rules", "toml", page="instances.md"))
        shell(recipe("To start one", page="instances.md"))
        assert stat.S_IMODE(sock.stat().st_mode) == 0o666
        assert stat.S_IMODE(INSTANCE.stat().st_mode) == 0o700
        assert "devices: 32\n" in loopctl("hello", "--socket", sock)
        attach = f"loopctl --socket {sock} attach --directory {nodes}"
        assert run("sh", "-c", f"{attach} {disk}", check=False) == "", "a device that can be written is not allowed"
        run("systemd-run", "--quiet", "--unit=keeps", "sh", "-c", f"{attach} --read-only {disk} && exec sleep 600")
        wait_for("it has its device", lambda: list(nodes.iterdir()))
        assert "keeps.service" in loopctl("--socket", INSTANCE / "admin.sock", "list")
    finally:
        rules.unlink()
        shell(recipe("To end it", page="instances.md"))
        run("systemctl", "stop", "keeps.service", check=False)
    wait_for("its devices are given up", lambda: not bound())
    assert prop("loopd@build.socket", "ActiveState") == "inactive"


@pytest.mark.exhaustive
@pytest.mark.deadline(180)
def test_give_everything_up(disk: Path) -> None:
    nodes = disk.parent / "dev"
    nodes.mkdir()
    for _ in range(2):
        loopctl("attach", "--directory", nodes, disk)
    assert len(leases()) == 2
    listed = shell(recipe("Give everything up", page="leases.md"))
    assert listed.count(str(disk)) == 2
    assert leases() == []
    assert list(nodes.iterdir()) == []
