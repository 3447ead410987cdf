"""Beside a real udevd: it is kept off a device until the reply, or for the whole lease, and never longer."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.daemon import LOCKS, ROOT, Daemon, bound_to, configured, eventually, exists, require
from support.processes import IN_NAMESPACE, Activated, injected, locked, stays

from loopd.protocol import wire

UDEVD = "/lib/systemd/systemd-udevd"
RULES = Path("/run/udev/rules.d")
RULE = """
SUBSYSTEM=="block", KERNEL=="loop[0-9]*", ACTION=="change", PROGRAM="{program} %k $env{{DISKSEQ}}"
"""
PROGRAM = """#!/bin/sh
echo "$1 $2 $(date +%s.%N)" >>{stamps}
"""


class Udev:
    """A udevd at work, with a rule that notes each change of a loop device that it handles."""

    def __init__(self, stamps: Path) -> None:
        self._stamps = stamps

    def handled(self, devname: str, diskseq: int) -> list[float]:
        """When udevd, its own lock of the device taken, handled changes of that binding: seconds since 1970."""
        found = []
        for line in self._stamps.read_text().splitlines():
            name, sequence, at = line.split()
            if name == devname and sequence in (str(diskseq), ""):
                found.append(float(at))
        return found

    def install(self, rules: Path) -> None:
        """Have it use another file of rules."""
        shutil.copy(rules, RULES / rules.name)
        subprocess.run(["udevadm", "control", "--reload"], check=True)


def ping() -> bool:
    command = ["udevadm", "control", "--ping", "--timeout=5"]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


@contextlib.contextmanager
def running() -> Iterator[None]:
    """The machine's udevd, or one for the time being."""
    if ping():
        yield
        return
    made = [path for path in ("/run/udev", "/dev/disk", "/dev/block", "/dev/char") if not os.path.exists(path)]
    process = subprocess.Popen([UDEVD, "--resolve-names=never"], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        eventually(ping, "udevd answers")
        yield
    finally:
        process.terminate()
        process.wait(20)
        for path in made:
            shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def udev(tmp_path: Path) -> Iterator[Udev]:
    require(os.geteuid() == 0, "needs root: udevd")
    require(os.path.exists(UDEVD) and shutil.which("udevadm"), "needs udevd (package udev)")
    require(os.access("/sys/kernel/uevent_seqnum", os.R_OK), "needs /sys")
    # Outside of the test's directory, where udevd's rules are the same for all that run at once.
    with locked(Path("/run/loopd-test-udevd")), running():
        stamps, program = tmp_path / "stamps", tmp_path / "stamp"
        stamps.touch()
        program.write_text(PROGRAM.format(stamps=stamps))
        program.chmod(0o755)
        rules = RULES / "00-a-loopd-test.rules"
        RULES.mkdir(exist_ok=True)
        before = {path.name for path in RULES.iterdir()}
        rules.write_text(RULE.format(program=program))
        try:
            subprocess.run(["udevadm", "control", "--reload"], check=True)
            yield Udev(stamps)
        finally:
            for path in RULES.iterdir():
                if path.name not in before:
                    path.unlink()
            subprocess.run(["udevadm", "control", "--reload"], check=True)


@pytest.fixture(params=["by hand", "as the service"])
def placed(request: pytest.FixtureRequest, tmp_path: Path, start_daemon: Callable[..., Daemon]) -> Iterator[Daemon]:
    """loopd opens devices through /dev, or through nodes of its own as its unit has it: both keep udev off."""
    if request.param == "by hand":
        yield start_daemon(policy=LOCKS)
        return
    (tmp_path / "loopd").mkdir()
    prepare = 'mount -t tmpfs -o dev tmpfs /run; mkdir -m 1777 /run/loopd-nodes; exec "$@"'
    options = configured(tmp_path / "loopd", LOCKS)
    daemon = Activated(tmp_path / "loopd", options, [*IN_NAMESPACE, prepare, "sh"], {})
    try:
        daemon.start()
        yield daemon
    finally:
        daemon.stop()


def reads(devname: str) -> int:
    """Requests to read that the device ever got."""
    return int(Path(f"/sys/block/{devname}/stat").read_text().split()[0])


def lockable(devname: str) -> bool:
    """Whether the lock that udevd takes, which is one of the host's node, can be had."""
    fd = os.open(f"/dev/{devname}", os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


def test_no_probe_before_the_reply(placed: Daemon, udev: Udev, image: int, directory: int, devices: Path) -> None:
    placed.hello().close()
    asked = time.time()
    with injected(placed.family(), "mknodat:delay_exit=1500ms"):  # bound, with its node, and not answered yet
        # A number that udevd has locked for long is passed over, and the next one takes such a time again.
        reply = placed.ask(wire.Attach(0, 1, 2), [image, directory], timeout=30)
        answered = time.time()
        name, diskseq = reply.fields["devname"], reply.fields["diskseq"]
        before = reads(name)
        # With the reply the lock is gone: a probe that has come by now was noted before it read.
        assert before == 0 or udev.handled(name, diskseq)
    assert answered - asked > 1.5
    made = (devices / name).stat().st_mtime
    # It does come, and this says when.
    first = eventually(lambda: udev.handled(name, diskseq), "udevd has handled the bind")[0]
    assert first >= made + 1.4


def test_the_lock_is_gone_after_the_reply(
    placed: Daemon, udev: Udev, image: int, directory: int, devices: Path
) -> None:
    reply = placed.attach(image, directory)
    name = reply.fields["devname"]
    node = devices / name
    before = node.stat()
    # udevd itself has a shared lock for as long as it probes.
    eventually(lambda: lockable(name), "the lock can be had", 5)
    eventually(lambda: udev.handled(name, reply.fields["diskseq"]), "udevd has handled the bind", 5)
    subprocess.run(["udevadm", "settle", "--timeout=20"], check=True)
    after = node.stat()
    assert [getattr(before, n) for n in ("st_ino", "st_mode", "st_uid", "st_gid", "st_rdev", "st_ctime_ns")] == [
        getattr(after, n) for n in ("st_ino", "st_mode", "st_uid", "st_gid", "st_rdev", "st_ctime_ns")
    ]
    with node.open("r+b", buffering=0) as device:
        device.write(b"loopd".ljust(512))
        os.fsync(device.fileno())
    assert os.pread(image, 5, 0) == b"loopd"


def test_the_lock_is_held_for_the_lease_when_asked_for(
    placed: Daemon, udev: Udev, image: int, directory: int, tmp_path: Path
) -> None:
    reply = placed.attach(image, directory, lock=True)
    name = reply.fields["devname"]
    stays(lambda: not lockable(name), 1.5, "the lock is held")
    assert udev.handled(name, reply.fields["diskseq"]) == []
    assert reads(name) == 0
    assert placed.ask(wire.Detach(name, 0, wait=10), []).fields == {"state": "released"}
    assert not bound_to(tmp_path)
    eventually(lambda: not exists(name), "the number is gone")
    subprocess.run(["udevadm", "settle", "--timeout=20"], check=True)


def test_a_device_that_udevd_probes_is_bound_all_the_same(
    placed: Daemon, udev: Udev, make_image: Callable[..., int], directory: int
) -> None:
    """A number made ahead of need is probed as it appears, under udevd's own lock: the bind waits or takes the next."""
    replies = [placed.attach(make_image(name=f"image{number}"), directory) for number in range(30)]
    assert [reply.code for reply in replies] == [None] * 30
    assert len({reply.fields["devname"] for reply in replies}) == 30


def test_the_shipped_rule_keeps_it_off_for_good(
    placed: Daemon, udev: Udev, make_image: Callable[..., int], tmp_path: Path, directory: int
) -> None:
    """The content says that it is the host's disk of a label; without the rule udevd believes it."""
    require(shutil.which("mkfs.ext4"), "needs mkfs.ext4 (package e2fsprogs)")
    image = make_image(8 << 20)
    label = f"loopd-{os.getpid()}"
    subprocess.run(["mkfs.ext4", "-q", "-L", label, str(tmp_path / "image")], check=True)
    link = Path("/dev/disk/by-label", label)

    name = placed.attach(image, directory).fields["devname"]
    eventually(link.exists, "udevd made the link: without the rule it probes")
    assert reads(name) > 0
    assert placed.ask(wire.Detach(name, 0, wait=10), []).fields == {"state": "released"}
    eventually(lambda: not link.is_symlink(), "udevd has removed the link")

    udev.install(ROOT / "systemd/00-loopd.rules")
    fields = placed.attach(image, directory).fields
    eventually(lambda: udev.handled(fields["devname"], fields["diskseq"]), "udevd has handled the bind")
    subprocess.run(["udevadm", "settle", "--timeout=20"], check=True)
    assert not link.is_symlink()
    assert reads(fields["devname"]) == 0
