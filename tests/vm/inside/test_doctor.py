"""`loopctl doctor` on the host and in a container of root's: what its recipe leaves out is named, with the remedy."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from host import findings, loopctl, policy, run
from recipes import recipe
from test_containers import ROOTFS

MODPROBE = Path("/usr/local/lib/modprobe.d/loopd.conf")


@pytest.fixture(autouse=True)
def directory() -> Iterator[None]:
    yield
    run("loopctl", "directory", "--remove", "build", check=False)


def examined(
    folder: Path, option: str = "", instead: str = "", section: str = "Podman, rootful, without CDI"
) -> dict[str, tuple[str, str]]:
    """In the recipe's container, with an option of it replaced."""
    command = recipe(section, IMAGE=ROOTFS).replace("./build.sh", "loopctl doctor")
    assert option in command
    return findings(run("sh", "-c", command.replace(option, instead), cwd=folder, check=False))


@pytest.mark.exhaustive
@pytest.mark.deadline(240)
def test_a_container(folder: Path) -> None:
    found = examined(folder)
    assert {level for level, _ in found.values()} == {"OK"}
    assert "loop.max_loop" not in found  # the host's business
    assert "owns 8 device numbers" in found["numbers"][1]
    assert "p1 opens: a loop device on that part of the image" in found["partitions"][1]

    found = examined(folder, "--device-cgroup-rule='b 7:* rw'")
    assert found["device cgroup"][0] == found["device"][0] == "FAIL"
    assert "--device-cgroup-rule 'b 7:* rw'" in found["device cgroup"][1]
    assert found["nodev"][0] == "OK"

    found = examined(folder, "--cap-drop=MKNOD", "--cap-add=MKNOD")
    assert found["CAP_MKNOD"][0] == "WARN"
    assert "--cap-drop MKNOD" in found["CAP_MKNOD"][1]
    assert found["device"][0] == "OK"

    found = examined(folder, ":/dev/loopd:ro", ":/dev/loopd")
    assert found["directory"][0] == "WARN"
    assert "read-only" in found["directory"][1]

    found = examined(folder, "--volume=/run/loopd:/run/loopd:ro", "")
    assert found["socket"][0] == "FAIL"
    assert "bind-mount the directory /run/loopd" in found["socket"][1]


@pytest.mark.exhaustive
@pytest.mark.deadline(240)
def test_a_container_with_one_option(folder: Path) -> None:
    found = examined(folder, section="Podman, rootful")
    assert {level for level, _ in found.values()} == {"OK"}
    assert "a loop device on that part of the image" in found["partitions"][1]

    # Its rules are for single devices, so that the capability is no way to others.
    found = examined(folder, "--rm", "--rm --cap-add=MKNOD", "Podman, rootful")
    assert found["CAP_MKNOD"] == ("OK", "there, and the device cgroup lets no loop device be opened but single ones")

    # As a user of the container, with the socket's group and without. The directory is root's.
    socket = os.stat("/run/loopd/loopd.sock")
    found = examined(folder, "--rm", "--rm --user=1000", "Podman, rootful")
    assert (found["socket"][0], found["group"][0], found["directory"][0]) == ("OK", "OK", "FAIL")
    assert "loopctl directory --user=1000 NAME" in found["directory"][1]
    command = ["podman", "run", "--rm", "--network=none", "--user=1000", "--volume=/run/loopd:/run/loopd:ro"]
    command += [f"--volume=/usr/local/{path}:/usr/local/{path}:ro" for path in ("bin/loopctl", "lib/loopd")]
    said = findings(run(*command, *ROOTFS.split(), "loopctl", "doctor", check=False))["group"]
    assert (said[0], f"--group-add={socket.st_gid}" in said[1]) == ("FAIL", True)
    (option,) = re.findall(r"--group-add=\d+", said[1])
    assert findings(run(*command, option, *ROOTFS.split(), "loopctl", "doctor", check=False))["group"][0] == "OK"


@pytest.mark.deadline(240)
def test_partitions_that_the_device_cgroup_denies(folder: Path) -> None:
    """The device opens, and it is not said that all is well."""
    with policy("allow.kernel_partitions = true"):
        found = examined(folder)
    assert found["device"][0] == "OK"
    assert found["device cgroup"][0] == found["partitions"][0] == "FAIL"
    assert "p1 cannot be opened: the device cgroup of this container denies it" in found["partitions"][1]
    assert "--device-cgroup-rule" not in found["partitions"][1]


@pytest.mark.deadline(240)
def test_a_partition_without_a_device(folder: Path) -> None:
    with policy("limits.devices = 1"):
        found = examined(folder)
    assert found["device"][0] == "OK"
    assert found["partitions"][0] == "FAIL"
    assert "p1 has no device: " in found["partitions"][1]


def test_the_host() -> None:
    found = findings(loopctl("doctor"))
    assert {level for level, _ in found.values()} == {"OK"}
    assert "p1 opens: the kernel's partition, as root of the host has it" in found["partitions"][1]
    assert "options loop max_loop=" in found["loop.max_loop"][1]
    hidden = MODPROBE.with_suffix(".off")
    MODPROBE.rename(hidden)
    try:
        found = findings(loopctl("doctor"))
    finally:
        hidden.rename(MODPROBE)
    assert found["loop.max_loop"][0] == "WARN"
    assert "loop.max_loop=8 on the kernel's command line" in found["loop.max_loop"][1]
