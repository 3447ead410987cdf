"""`loopctl doctor` on the host and in a container of root's: what its recipe leaves out is named, with the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from host import findings, loopctl, run
from recipes import recipe
from test_containers import ROOTFS

MODPROBE = Path("/usr/local/lib/modprobe.d/loopd.conf")


@pytest.fixture(autouse=True)
def directory() -> Iterator[None]:
    yield
    run("loopctl", "directory", "--remove", "build", check=False)


def examined(folder: Path, option: str = "", instead: str = "") -> dict[str, tuple[str, str]]:
    """In the recipe's container, with an option of it replaced."""
    command = recipe("Podman, rootful, without CDI", IMAGE=ROOTFS).replace("./build.sh", "loopctl doctor")
    assert option in command
    return findings(run("sh", "-c", command.replace(option, instead), cwd=folder, check=False))


@pytest.mark.exhaustive
@pytest.mark.deadline(240)
def test_a_container(folder: Path) -> None:
    found = examined(folder)
    assert {level for level, _ in found.values()} == {"OK"}
    assert "loop.max_loop" not in found  # the host's business

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


def test_the_host() -> None:
    found = findings(loopctl("doctor"))
    assert {level for level, _ in found.values()} == {"OK"}
    assert "options loop max_loop=" in found["loop.max_loop"][1]
    hidden = MODPROBE.with_suffix(".off")
    MODPROBE.rename(hidden)
    try:
        found = findings(loopctl("doctor"))
    finally:
        hidden.rename(MODPROBE)
    assert found["loop.max_loop"][0] == "WARN"
    assert "loop.max_loop=8 on the kernel's command line" in found["loop.max_loop"][1]
