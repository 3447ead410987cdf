"""What `make install` gives to systemd, udev, kmod and the journal, tried with their own programs."""

from __future__ import annotations

import contextlib
import fnmatch
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from loopd import daemon, devices, numbers
from loopd.audit import Event
from loopd.loop import Loop, LoopControl

ROOT = Path(__file__).parent.parent
UNITS = ("loopd.socket", "loopd-admin.socket", "loopd.service")
EXPOSURE = 1.8


def run(*command: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env=os.environ | (env or {}),
    )


def systemd_version() -> int:
    return int(run("systemd-analyze", "--version").stdout.split()[1])


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An installation that runs where it is; DESTDIR=/ keeps the running system out of it."""
    prefix = tmp_path_factory.mktemp("prefix")
    done = run("make", "-s", "-C", ROOT, "install", "DESTDIR=/", f"PREFIX={prefix}", env={"MAKEFLAGS": ""})
    assert done.returncode == 0, done.stderr
    return prefix


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root file system with nothing but an installation in the usual place."""
    done = run("make", "-s", "-C", ROOT, "install", f"DESTDIR={tmp_path}", "PREFIX=/usr", env={"MAKEFLAGS": ""})
    assert done.returncode == 0, done.stderr
    return tmp_path


def options(path: Path) -> dict[str, list[str]]:
    """The keys of a unit with their values in order."""
    found: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        key, separator, value = line.partition("=")
        if separator and not line.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


# systemd ------------------------------------------------------------------------------------------------


def test_systemd_has_nothing_to_say_about_the_units(prefix: Path) -> None:
    done = run("systemd-analyze", "verify", *UNITS, env={"SYSTEMD_UNIT_PATH": f"{prefix}/lib/systemd/system:"})
    said = [line for line in (done.stdout + done.stderr).splitlines() if line]
    if systemd_version() < 254:  # documented: there `stop` gives the leases up
        said = [line for line in said if "'FileDescriptorStorePreserve'" not in line]
    assert (done.returncode, said) == (0, [])


def test_exposure(prefix: Path) -> None:
    unit = prefix / "lib/systemd/system/loopd.service"
    done = run("systemd-analyze", "security", "--offline=yes", f"--threshold={EXPOSURE * 10:.0f}", "--no-pager", unit)
    assert done.returncode == 0, done.stdout
    assert "Overall exposure level for loopd.service" in done.stdout


def test_every_capability_is_justified_and_none_is_left_over(prefix: Path) -> None:
    unit = prefix / "lib/systemd/system/loopd.service"
    (ambient,) = options(unit)["AmbientCapabilities"]
    assert options(unit)["CapabilityBoundingSet"] == [ambient]
    reasons = re.findall(r"^# ((?:CAP_\w+(?:, )?)+):", unit.read_text(), re.MULTILINE)
    assert sorted(", ".join(reasons).split(", ")) == sorted(ambient.split())


def test_unit_and_daemon_name_the_same_things(prefix: Path) -> None:
    service = options(prefix / "lib/systemd/system/loopd.service")
    (nodes,) = service["TemporaryFileSystem"]
    path, _, flags = nodes.partition(":")
    assert path == devices.PRIVATE_NODES
    assert "dev" in flags.split(",")
    admin = options(prefix / "lib/systemd/system/loopd-admin.socket")
    assert (admin["FileDescriptorName"], admin["Service"]) == ([daemon.ADMIN], ["loopd.service"])
    assert f"/var/lib/{service['StateDirectory'][0]}" == daemon.STATE_DIRECTORY
    # What systemd passes at start must fit: else 202/FDS, or names beyond the 128 KiB of a variable.
    stored = int(service["FileDescriptorStoreMax"][0])
    assert int(service["LimitNOFILE"][0]) > stored
    assert len(f"{daemon.SLOT}:") * stored < 128 * 1024


def test_sockets_are_closed_by_no_number_of_requests(prefix: Path) -> None:
    for name in ("loopd.socket", "loopd-admin.socket"):
        assert options(prefix / "lib/systemd/system" / name)["TriggerLimitIntervalSec"] == ["0"]
    assert options(prefix / "lib/systemd/system/loopd.service")["StartLimitIntervalSec"] == ["0"]


@pytest.mark.parametrize(
    ("code", "status", "waits"),
    [("exited", "0", False), ("killed", "KILL", False), ("exited", "1", True), ("exited", "203", True)],
)
def test_only_a_failed_start_is_slowed(prefix: Path, code: str, status: str, waits: bool) -> None:
    (line,) = options(prefix / "lib/systemd/system/loopd.service")["ExecStopPost"]
    shell, _, script = line.partition(" -c ")
    # systemd takes the quotes off and makes $$ one $.
    command = [shell, "-xc", script.strip("'").replace("$$", "$").replace("sleep", "echo sleep")]
    done = run(*command, env={"EXIT_CODE": code, "EXIT_STATUS": status})
    assert (done.returncode, "sleep" in done.stdout) == (0, waits)


def test_user_and_group(root: Path) -> None:
    (root / "etc").mkdir()
    done = run("systemd-sysusers", f"--root={root}")
    assert done.returncode == 0, done.stderr
    (user,) = re.findall(r"^loopd:.*", (root / "etc/passwd").read_text(), re.MULTILINE)
    (group,) = re.findall(r"^loopd:.*", (root / "etc/group").read_text(), re.MULTILINE)
    user, group = user.split(":"), group.split(":")
    assert user[3] == group[2]
    assert group[3] == ""
    assert user[6].endswith("/nologin")
    assert 0 < int(user[2]) < 1000


def test_directories(root: Path) -> None:
    (root / "run").mkdir()
    done = run("systemd-tmpfiles", "--create", f"--root={root}", root / "usr/lib/tmpfiles.d/loopd.conf")
    assert done.returncode == 0, done.stderr
    modes = {path.name: f"{path.stat().st_mode:o}" for path in (root / "run").iterdir()}
    assert modes == {"loopd": "40755", "loopd-admin": "40700"}
    # The socket units make them likewise where tmpfiles has not run.
    for unit in ("loopd", "loopd-admin"):
        keys = options(root / f"usr/lib/systemd/system/{unit}.socket")
        assert keys["DirectoryMode"] == [f"0{modes[unit][2:]}"]
        assert Path(keys["ListenDatagram"][0]).parent == Path("/run") / unit


# The journal --------------------------------------------------------------------------------------------


def test_each_event_has_its_catalog_entry(root: Path) -> None:
    done = run("journalctl", f"--root={root}", "--update-catalog")
    assert done.returncode == 0, done.stderr
    listed = run("journalctl", f"--root={root}", "--list-catalog").stdout.splitlines()
    subjects = dict(line.split(" ", 1) for line in listed)
    assert set(subjects) == {event.value.message_id for event in Event}
    for event in Event:
        entry = run("journalctl", f"--root={root}", "--dump-catalog", event.value.message_id).stdout
        header, _, body = entry.partition("\n\n")
        assert "Defined-By: loopd" in header
        assert len(body.split()) > 15, f"{event.name} is not explained"


# kmod ---------------------------------------------------------------------------------------------------


def test_kmod_takes_the_option(root: Path) -> None:
    done = run("modprobe", "--config", root / "usr/lib/modprobe.d/loopd.conf", "--showconfig")
    assert "options loop max_loop=8" in done.stdout.splitlines()


# udev ---------------------------------------------------------------------------------------------------


def covered(rules: Path) -> list[str]:
    (patterns,) = re.findall(r'^KERNEL!="([^"]+)"', rules.read_text(), re.MULTILINE)
    return str(patterns).split("|")


def test_rule_covers_the_numbers_of_loopd_and_no_others(prefix: Path) -> None:
    patterns = covered(prefix / "lib/udev/rules.d/00-loopd.rules")
    tried = {*range(12000), *(10**n + k for n in range(7) for k in (-1, 0, 1)), numbers.LAST}
    for number in tried:
        for name in (f"loop{number}", f"loop{number}p1", f"loop{number}p15"):
            matches = any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
            assert matches == (number >= numbers.FIRST), name


@contextlib.contextmanager
def device(image: Path, start: int) -> Iterator[int]:
    """A loop device with `image` on it, of the first number from `start` on that can be had."""
    with LoopControl() as control:
        for number in range(start, start + 1000):
            with contextlib.suppress(FileExistsError):
                control.add(number)
                break
        else:
            pytest.fail(f"all numbers from {start} on are taken")
        try:
            with Loop(number) as loop, image.open("r+b") as file:
                loop.configure(file.fileno(), autoclear=True)
                yield number
        finally:
            control.remove(number)


def udev_makes_of(number: int, rules: Path) -> str:
    """What all the host's rules, with loopd's among them, make of the device; udevadm is a dry run of udevd.

    Not quite dry: it makes the links, and a database. So it gets a /dev and a /run of its own.
    """
    script = """
        mount -t tmpfs tmpfs /run && mkdir -p /run/udev/rules.d && cp "$1" /run/udev/rules.d
        mount -t tmpfs tmpfs /dev && mknod /dev/null c 1 3
        mknod /dev/loop$2 b $(tr : ' ' </sys/block/loop$2/dev)
        exec udevadm test /sys/devices/virtual/block/loop$2 2>&1
    """
    done = run("unshare", "--mount", "sh", "-ec", script, "sh", rules, str(number))
    assert f"Reading rules file: /run/udev/rules.d/{rules.name}" in done.stdout, done.stdout + done.stderr
    return done.stdout


def test_an_image_cannot_claim_names_of_the_host(prefix: Path, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("making a loop device and a mount namespace needs root")
    rules = prefix / "lib/udev/rules.d/00-loopd.rules"
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(1 << 20)
    assert run("mke2fs", "-q", "-F", "-L", "hostroot", image).returncode == 0
    with device(image, 2000) as number:
        assert "by-label/hostroot" in udev_makes_of(number, rules)  # else the other half would prove nothing
    with device(image, numbers.LAST - 2000) as number:
        said = udev_makes_of(number, rules)
    assert "SYSTEMD_READY=0" in said.split()
    assert [word for word in ("hostroot", "ID_FS_", "blkid", "DEVLINKS=") if word in said] == []
