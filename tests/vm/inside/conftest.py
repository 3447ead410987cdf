"""Fixtures of the tests inside of a VM. After each, no lease, no bound device and no failed unit may be left."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import host
import pytest
from recipes import recipe


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder on the root file system (ext4), open to everybody."""
    path = Path(tempfile.mkdtemp(dir="/srv", prefix="test-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def disk(folder: Path) -> Path:
    """A file of 16 MiB to bind."""
    path = folder / "disk.img"
    with path.open("wb") as file:
        file.truncate(16 << 20)
    return path


@pytest.fixture
def journal() -> host.Journal:
    return host.Journal()


@pytest.fixture
def instance() -> Iterator[None]:
    """The instance `build`, open to the group `builder`, set up and ended as the document has it."""
    drop_in = Path("/run/systemd/system/loopd@build.socket.d/override.conf")
    drop_in.parent.mkdir(parents=True)
    drop_in.write_text(recipe("For a user without root", "ini", "instances.md", GROUP="builder"))
    host.run("systemctl", "daemon-reload")
    host.run("systemctl", "restart", "loopd@build.socket")
    yield
    shutil.rmtree(drop_in.parent)
    host.run("sh", "-ec", recipe("To end it", page="instances.md"))


@pytest.fixture(autouse=True, scope="session")
def options_from_a_file() -> None:
    drop_in = host.DROP_IN.with_name("options.conf")
    drop_in.parent.mkdir(parents=True)
    program = "/usr/local/sbin/loopd"
    settings = (
        "Environment=OPTIONS=",
        f"EnvironmentFile=-{host.OPTIONS}",
        "ExecStart=",
        f"ExecStart={program} $OPTIONS",
    )
    drop_in.write_text("\n".join(("[Service]", *settings, "")))
    host.run("systemctl", "daemon-reload")


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    left = host.leases() if host.bound() else []
    for lease in left:
        host.run("loopctl", "--admin", "detach", "--force", lease["devname"], check=False)
    for instance in Path("/run").glob("loopd-*/admin.sock") if host.bound() else ():
        host.run("loopctl", "--socket", instance, "detach", "--all", "--force", check=False)
    try:
        host.wait_for("no device is bound", lambda: not host.bound(), 15)
        failed = host.run("systemctl", "--failed", "--plain", "--no-legend")
        assert not failed, f"units have failed:\n{failed}"
        assert not left, f"leases were left behind: {left}"
    finally:
        # A test's deadline may have come in the middle of its own cleaning up: the next one gets the real service.
        if host.prop(host.SERVICE, "NeedDaemonReload") == "yes":
            host.run("systemctl", "daemon-reload")
            # A request that waits may start it again meanwhile, and so cancel this.
            host.run("systemctl", "stop", host.SERVICE, check=False)
        host.run("systemctl", "reset-failed")
        host.run("systemctl", "start", host.SOCKET)
