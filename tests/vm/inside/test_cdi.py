"""`loopctl directory --cdi`, as container runtimes read it: a container opens its own devices, and no other.

The recipes of docs/containers.md that use it are run by test_containers.py and test_rootless.py.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from host import bound, loopctl, run, wait_for
from test_containers import ROOT, below_usr, docker_image

__all__ = ["docker_image"]  # a fixture

SPEC = Path("/run/cdi/loopd-0-build.json")
PROBE = """
set -u
exec 2>&1
truncate -s 8M /tmp/disk.img
device=$(loopctl attach /tmp/disk.img)
echo "device $device"
echo mine >"$device" && echo opened
flat=/dev/${device##*/}
head -c 4 "$flat"; echo
ls -1 /dev/loop[0-9]*
mknod /tmp/other b 7 $1 && head -c 6 /tmp/other
head -c 6 /srv/image-node
loopctl detach "$device"
head -c 1 "$flat" || echo idle
"""


@pytest.fixture
def device() -> Iterator[str]:
    """The directory `build` with its specification, as its runtime calls it."""
    yield loopctl("directory", "--cdi", "build").strip()
    wait_for("the container is gone", lambda: not bound())
    loopctl("directory", "--remove", "build")
    assert not SPEC.exists()


@pytest.fixture
def secret(folder: Path) -> Iterator[int]:
    """A loop device of the host's with something in it, a node of which is in the image; its minor."""
    file, node = folder / "secret", ROOT / "srv/image-node"
    file.write_bytes(b"SECRET".ljust(1 << 20))
    path = run("losetup", "--find", "--show", file).strip()
    minor = os.minor(os.stat(path).st_rdev)
    os.mknod(node, 0o60666, os.makedev(7, minor))
    try:
        yield minor
    finally:
        node.unlink()
        run("losetup", "--detach", path)


def numbers() -> list[int]:
    (device,) = json.loads(SPEC.read_text())["devices"]
    return [node["minor"] for node in device["containerEdits"]["deviceNodes"]]


def judge(told: str, own: list[int] | None = None) -> None:
    """What PROBE said: its own device opens by both names, and those of nobody else do."""
    own = numbers() if own is None else own
    (path,) = re.findall("(?m)^device (.*)$", told)
    assert path.startswith("/dev/loopd/loop"), told
    assert int(path.removeprefix("/dev/loopd/loop")) in own
    assert "\nopened\nmine\n" in told
    assert re.findall(r"(?m)^/dev/loop(\d+)$", told) == [str(number) for number in sorted(own)]
    assert re.findall("(?m)open.*/tmp/other.*: (.*)$", told) == ["Operation not permitted"], told
    assert re.findall("(?m)open.*/srv/image-node.*: (.*)$", told) == ["Operation not permitted"], told
    assert "SECRET" not in told
    assert told.endswith("No such device or address\nidle\n"), told


def podman(*options: str) -> tuple[str, ...]:
    return ("podman", "run", "--rm", "--log-driver=none", "--network=none", *options, "--rootfs", f"{ROOT}:O")


@pytest.mark.deadline(240)
def test_no_other_device_opens(device: str, secret: int) -> None:
    """Neither by a node that CAP_MKNOD makes nor by one of the image's; with the rule for all of them both do."""
    probe = ("sh", "-c", PROBE, "sh", str(secret))
    judge(run(*podman(f"--device={device}", "--cap-add=MKNOD"), *probe))
    opened = run(*podman(f"--device={device}", "--cap-add=MKNOD", "--device-cgroup-rule=b 7:* rw"), *probe)
    assert opened.count("SECRET") == 2, "the test proves nothing"


@pytest.mark.deadline(480)
def test_docker(device: str, secret: int, docker_image: str) -> None:
    """It gives CAP_MKNOD by default."""
    volumes = [f"--volume={volume}" for volume in (*below_usr(), f"{ROOT}/srv:/srv")]
    command = ["docker", "run", "--rm", "--network=none", f"--device={device}", *volumes, docker_image]
    judge(run(*command, "sh", "-c", PROBE, "sh", str(secret)))


@pytest.mark.deadline(240)
@pytest.mark.parametrize("engine", ["podman", "docker"])
def test_the_rules_outlive_a_reload_of_systemd(
    device: str, folder: Path, engine: str, request: pytest.FixtureRequest
) -> None:
    """systemd puts its own list of devices in the place of the runtime's then."""
    script = "truncate -s 8M disk.img; until [ -e go ]; do sleep 0.2; done; loopctl run disk.img -- mkfs.ext4 -q {}"
    podmans = ["--log-driver=none", "--rootfs", f"{ROOT}:O"]
    dockers = [f"--volume={volume}" for volume in below_usr()]
    image = podmans if engine == "podman" else [*dockers, request.getfixturevalue("docker_image")]
    options = ["--detach", "--name=reload", "--network=none", f"--volume={folder}:/work", "--workdir=/work"]
    run(engine, "run", f"--device={device}", *options, *image, "sh", "-ec", script)
    try:
        wait_for("it runs", (folder / "disk.img").exists)
        run("systemctl", "daemon-reload")
        (folder / "go").touch()
        assert run(engine, "wait", "reload").strip() == "0"
        run("e2fsck", "-fn", folder / "disk.img")
    finally:
        run(engine, "rm", "--force", "reload")


def test_removed_with_the_directory() -> None:
    device = loopctl("directory", "--cdi", "gone").strip()
    loopctl("directory", "--remove", "gone")
    assert not list(Path("/run/cdi").glob("loopd-0-gone*"))
    told = run("sh", "-c", '"$@" 2>&1 || :', "sh", *podman(f"--device={device}"), "true")
    assert "unresolvable CDI devices" in told


def test_where_it_is_asked_for() -> None:
    """In /etc/cdi podman finds it, too, and where there was another it is gone."""
    device = loopctl("directory", "--cdi", "build").strip()
    folder = Path("/etc/cdi")
    try:
        assert loopctl("directory", "--cdi", "--cdi-dir", folder, "build").strip() == device
        assert (folder / SPEC.name).exists()
        assert not SPEC.exists()
        assert run(*podman(f"--device={device}"), "loopctl", "hello").startswith("loopd ")
    finally:
        loopctl("directory", "--remove", "build")
    assert not (folder / SPEC.name).exists()


def test_one_that_names_other_numbers(device: str) -> None:
    """As in a folder that outlives the boot: it would let the container open what is another's by now."""
    spec = json.loads(SPEC.read_text())
    spec["devices"][0]["containerEdits"]["deviceNodes"][0]["minor"] -= 1
    SPEC.write_text(json.dumps(spec))
    warning, path = run("sh", "-c", "loopctl directory build 2>&1").splitlines()
    assert re.search(f"{SPEC} named devices that are not this directory's", warning)
    assert path == "/run/loopd-dev/0-build"
    assert not SPEC.exists()
    assert loopctl("directory", "--cdi", "build").strip() == device
    assert loopctl("directory", "build").strip() == path
    assert SPEC.exists()


@pytest.mark.deadline(240)
def test_the_stand_ins(disk: Path) -> None:
    device = loopctl("directory", "--cdi", "--losetup", "build").strip()
    try:
        script = "losetup -f --show disk.img && command -v mount"
        options = (f"--device={device}", f"--volume={disk.parent}:/work", "--workdir=/work")
        found, mount = run(*podman(*options), "sh", "-ec", script).split()
        assert int(re.fullmatch(r"/dev/loop(\d+)", found)[1]) in numbers()  # type: ignore[index]
        assert mount == "/usr/local/sbin/mount"
        wait_for("it has ended with its container", lambda: not bound())
    finally:
        loopctl("directory", "--remove", "build")


@pytest.mark.deadline(240)
def test_another_user_of_the_container(device: str) -> None:
    """Who is not root there reaches the socket by its group."""
    gid = os.stat("/run/loopd/loopd.sock").st_gid
    told = run(*podman(f"--device={device}", "--user=1000:1000"), "sh", "-ec", "loopctl hello && id -G")
    assert told.startswith("loopd ")
    assert str(gid) in told.splitlines()[-1].split()
