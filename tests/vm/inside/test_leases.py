"""Nothing is lost and nothing leaks under a real systemd: kills, restarts, the watchdog, upgrades, giving all up."""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from host import (
    FIRST_NUMBER,
    OPTIONS,
    SERVICE,
    SOCKET_PATH,
    Journal,
    attach,
    bound,
    drop_in,
    leases,
    loopctl,
    name,
    prop,
    run,
    systemd_version,
    wait_for,
)

PROJECT = Path(__file__).parents[3]
sys.path.insert(0, str(PROJECT / "tests"))

from support.fuse_never import Never  # noqa: E402  # a file system that never answers, shared with the machine's tests

PRESERVES = systemd_version() >= 254
"""FileDescriptorStorePreserve=: what is in the fd store outlives a stop."""
EXPIRED = "6f627446202b41ccba539dbefc35b92a"
STUCK = "43eb208a7d8d4897828523e7cfce1227"
WARNED = "dc9aa196d7cf4d08b446fbf6444ced31"

LIBRARY = "import sys; sys.path.insert(0, '/usr/local/lib/loopd'); import loopd\n"

HOLD = (
    LIBRARY
    + """
disk, nodes, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
kinds = ("device", "process", "container")
held = [
    loopd.attach(disk, nodes, lifetime=kinds[turn % 3], open_device=False, timeout=90) for turn in range(count)
]
print(*[f"{device.devname}={device.diskseq}" for device in held], flush=True)
sys.stdin.read()
for device in held:
    device.detach()
"""
)
"""Keeps devices by a socket, a pidfd of its own and a pidfd of PID 1, until its standard input is closed."""

CHURN = (
    LIBRARY
    + """
import os, select
disk, nodes = sys.argv[1:]
results = {"detached": 0, "detached again": 0, "not attached": 0}
while not select.select([sys.stdin], [], [], 0)[0]:
    try:
        device = loopd.attach(disk, nodes, open_device=False, timeout=90)
    except (loopd.Dropped, loopd.Internal):
        results["not attached"] += 1  # the daemon was killed with the request in its hands
        continue
    for result in ("detached", "detached again"):
        try:
            assert device.detach(wait=60)
        except loopd.Dropped:
            continue
        results[result] += 1
        break
    else:  # killed twice within two requests
        assert loopd.Client(timeout=90).detach(device.path, wait=60, diskseq=device.diskseq)
    assert not os.path.lexists(device.path), device.path
print(results, flush=True)
"""
)
"""Attaches and detaches until its standard input is closed; every second detach that it asks for is answered."""

WATCH = """
import select, sys
leases = [word.partition("=") for word in sys.argv[1:]]
turns = 0
while not select.select([sys.stdin], [], [], 0.2)[0]:
    for name, _, diskseq in leases:
        if diskseq != "None":  # Linux 5.15
            with open(f"/sys/block/{name}/diskseq") as file:
                assert file.read() == diskseq + "\\n", f"{name} is another binding"
        open(f"/sys/block/{name}/loop/backing_file").close()
    turns += 1
print(turns, flush=True)
"""
"""Fails when a device was free for a moment, which changes its sequence number."""


class Script:
    """A Python program beside the test, told to stop by the end of its standard input."""

    def __init__(self, script: str, *arguments: str | Path) -> None:
        self.process = subprocess.Popen(
            ["/usr/bin/python3", "-I", "-c", script, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def line(self) -> str:
        """What it says next; empty when it has ended."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def stop(self) -> str:
        """Have it end; its last words. It must not have failed."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        said = self.line()
        assert self.process.wait(90) == 0
        return said

    def __enter__(self) -> Script:  # noqa: PYI034  # Script has no subclasses
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def folder_for_nodes(disk: Path, name: str = "dev") -> Path:
    nodes = disk.parent / name
    nodes.mkdir(exist_ok=True)
    return nodes


@contextmanager
def held(disk: Path, count: int = 12) -> Iterator[dict[str, str]]:
    """So many leases, and a watcher that sees to it that they are bound at every moment of the block.

    Afterwards they and their nodes must still be there, and nothing else; then they are ended.
    """
    nodes = folder_for_nodes(disk)
    with ExitStack() as stack:
        holder = stack.enter_context(Script(HOLD, disk, nodes, str(count)))
        said = holder.line().split()
        assert len(said) == count
        watcher = stack.enter_context(Script(WATCH, *said))
        found = dict(word.split("=") for word in said)
        yield found
        assert int(watcher.stop()) > 0
        assert {lease["devname"]: str(lease.get("diskseq")) for lease in leases()} == found
        assert {lease["state"] for lease in leases()} == {"bound"}
        assert sorted(bound()) == sorted(found) == sorted(node.name for node in nodes.iterdir())
        holder.stop()
        assert not bound()
        assert not list(nodes.iterdir())
    run("udevadm", "settle")  # a number that it has open is not removed


def main_pid() -> int:
    return int(prop(SERVICE, "MainPID"))


def restarted(before: int) -> bool:
    return prop(SERVICE, "ActiveState") == "active" and main_pid() not in (0, before)


def in_range() -> list[str]:
    """Devices of loopd's numbers that exist, bound or not."""
    names = [path.name for path in Path("/sys/block").glob("loop*")]
    return [name for name in names if int(name[4:]) >= FIRST_NUMBER]


def nothing_leaks() -> None:
    """After the last lease: the fd store has not grown, and when the daemon ends, so does each device it made."""
    if PRESERVES:
        assert int(prop(SERVICE, "NFileDescriptorStore")) <= 192, "slots are used again"
    run("systemctl", "stop", SERVICE)
    wait_for("no device is left in loopd's range", lambda: not in_range())


# Kills and restarts -----------------------------------------------------------------------------------------------


@pytest.mark.deadline(480)
def test_killed_in_the_middle_of_attaches_and_detaches(disk: Path, folder: Path) -> None:
    """`kill -9` at any moment, with many leases and three clients that come and go."""
    chance = random.Random(4)
    with held(disk), ExitStack() as stack:
        churns = []
        for turn in range(3):
            image = folder / f"other{turn}"
            image.write_bytes(bytes(1 << 20))
            churns.append(stack.enter_context(Script(CHURN, image, folder_for_nodes(disk, f"dev{turn}"))))
        for _ in range(5):
            wait_for("the daemon runs", lambda: prop(SERVICE, "ActiveState") == "active")
            time.sleep(chance.uniform(0, 3))
            before = main_pid()
            os.kill(before, signal.SIGKILL)
            wait_for("it runs again", lambda before=before: restarted(before), 150)
        results = [churn.stop() for churn in churns]
        print(results)
        assert all("'detached': 0" not in result for result in results), results
    nothing_leaks()


@pytest.mark.deadline(480)
def test_a_restart(disk: Path) -> None:
    run("systemctl", "start", SERVICE)
    with held(disk) as found:
        for _ in range(2):
            before = main_pid()
            run("systemctl", "restart", SERVICE)
            assert main_pid() != before
            assert len(leases()) == len(found)
    nothing_leaks()


@pytest.mark.deadline(480)
def test_a_stop(disk: Path) -> None:
    """It keeps every lease until the next start or datagram; systemd 252 and 253 give them up, as documented."""
    if PRESERVES:
        with held(disk) as found:
            for start in (lambda: run("systemctl", "start", SERVICE), lambda: loopctl("--timeout=90", "hello")):
                run("systemctl", "stop", SERVICE)
                assert prop(SERVICE, "MainPID") == "0"
                assert int(prop(SERVICE, "NFileDescriptorStore")) >= len(found)
                start()
                assert len(leases()) == len(found)
    else:
        with Script(HOLD, disk, folder_for_nodes(disk), "3") as holder:
            assert len(holder.line().split()) == 3
            run("systemctl", "stop", SERVICE)
            wait_for("nothing is bound", lambda: not bound())
            assert leases() == []
    nothing_leaks()


@pytest.mark.deadline(480)
def test_the_fd_store_is_full(disk: Path, journal: Journal) -> None:
    """No lease is without a place in it: a warning, then a refusal; and every lease outlives a crash at the limit.

    A systemd before 254 does not say how large the store is, so it has to be as large as the unit has it.
    """
    size = "FileDescriptorStoreMax=128\n" if PRESERVES else ""  # loopd uses half of it
    with drop_in(f"[Service]\n{size}"), held(disk, 64) as found:
        if PRESERVES:
            refused = run("sh", "-c", f"loopctl attach --directory {disk.parent}/dev {disk} 2>&1; echo $?")
            assert refused.strip().endswith("1")
            assert "FileDescriptorStoreMax=" in refused
            (warning,) = journal.records(f"MESSAGE_ID={WARNED}")
            assert "fd store" in warning["MESSAGE"]
            assert int(prop(SERVICE, "NFileDescriptorStore")) == 64
        before = main_pid()
        os.kill(before, signal.SIGKILL)
        wait_for("it runs again", lambda: restarted(before), 150)
        assert len(leases()) == len(found)
    nothing_leaks()


# Giving everything up ---------------------------------------------------------------------------------------------


@pytest.mark.deadline(480)
def test_detach_all_by_force(disk: Path) -> None:
    """Everybody's, nodes included; what a mount keeps goes with the mount."""
    run("mkfs.ext4", "-q", disk)
    nodes, mounted = folder_for_nodes(disk), disk.parent / "mounted"
    mounted.mkdir()
    with Script(HOLD, disk, nodes, "3") as holder:
        devices = [word.partition("=")[0] for word in holder.line().split()]
        run("mount", f"/dev/{devices[0]}", mounted)
        try:
            said = run("sh", "-c", "loopctl --admin detach --all --force --wait=1 2>&1; echo $?")
            assert said.splitlines()[-1] == "1"
            assert f"{devices[0]} is detached, but somebody still has it open" in said
            assert list(nodes.iterdir()) == []
            wait_for("the others are free", lambda: list(bound()) == devices[:1])  # udev may have had them open
            (mounted / "file").write_text("it works until it is unmounted")
            wait_for("loopd knows it", lambda: [lease["state"] for lease in leases()] == ["held"])
        finally:
            run("umount", mounted)
        wait_for("the last one is gone", lambda: not bound() and not leases())
    nothing_leaks()


@pytest.mark.deadline(480)
def test_giving_all_up_without_the_daemon(disk: Path) -> None:
    nodes = folder_for_nodes(disk)
    with Script(HOLD, disk, nodes, "3") as holder:
        assert len(holder.line().split()) == 3
        run("systemctl", "stop", SERVICE)
        if PRESERVES:
            assert len(bound()) == 3
            run("systemctl", "clean", "--what=fdstore", SERVICE)
        run("systemctl", "start", SERVICE)
        wait_for("the start releases what is in its table", lambda: not bound())
        assert len(list(nodes.iterdir())) == 3, "as documented"
        assert leases() == []
        assert prop(SERVICE, "ActiveState") == "active"
    nothing_leaks()


# The watchdog -----------------------------------------------------------------------------------------------------

WATCHDOG = "[Service]\nWatchdogSec=8s\n"


@pytest.mark.deadline(480)
def test_a_main_loop_that_stops_is_restarted(disk: Path) -> None:
    """It loses nothing, not even a request that came meanwhile."""
    with drop_in(WATCHDOG):
        with held(disk, 6):
            before = main_pid()
            os.kill(before, signal.SIGSTOP)
            greeted = subprocess.Popen(["loopctl", "--timeout=90", "hello"], stdout=subprocess.PIPE, text=True)
            wait_for("it is restarted", lambda: restarted(before), 150)
            assert greeted.communicate(timeout=60)[0].startswith("loopd ")
            assert int(prop(SERVICE, "NRestarts")) == 1
        nothing_leaks()


@pytest.mark.deadline(480)
def test_stuck_workers_do_not_trip_it(disk: Path, folder: Path, journal: Journal) -> None:
    """Helpers that hang in a file system which never answers, for more than twice the watchdog's time."""
    configuration = folder / "loopd.toml"
    times = "request_timeout = 8\nwrite_back_timeout = 8\n"
    configuration.write_text(f"{times}limits.stuck = 8\n")  # else this account would be served no more
    OPTIONS.write_text(f"OPTIONS=--config={configuration}\n")
    run("modprobe", "fuse")
    never = Never(folder / "never")
    try:
        with drop_in(WATCHDOG), held(disk, 3):
            before = main_pid()
            directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            os.kill(before, signal.SIGSTOP)  # so that the client does not have to keep the file open, and hang in it
            ours = [hang(never.file(), directory) for _ in range(2)]
            never.mute()
            os.kill(before, signal.SIGCONT)
            os.close(directory)
            wait_for("both are written off", lambda: len(journal.records(f"MESSAGE_ID={STUCK}")) == 2, 90)
            time.sleep(18)
            wait_for("its status says so", lambda: "2 worker processes hanging" in prop(SERVICE, "StatusText"))
            assert loopctl("hello").startswith("loopd ")
            assert main_pid() == before
            assert prop(SERVICE, "NRestarts") == "0"
            # Nor do they hold up its restart, or the release of what others have.
            run("systemctl", "restart", SERVICE)
            assert main_pid() not in (0, before)
            for channel in ours:
                channel.close()
    finally:
        never.end()
        OPTIONS.unlink()
        run("systemctl", "stop", SERVICE)


def hang(file: int, directory: int) -> socket.socket:
    """Ask for a device on that file; our end of the reply socket."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
        client.connect(str(SOCKET_PATH))
        socket.send_fds(client, [b'{"fd": 0, "dir_fd": 1, "reply_fd": 2}'], [file, directory, theirs.fileno()])
    return ours


# Upgrades ---------------------------------------------------------------------------------------------------------


@pytest.mark.deadline(600)
def test_an_upgrade_and_a_downgrade(disk: Path, folder: Path, journal: Journal) -> None:
    """`make install` of another version restarts the daemon with every lease; what it cannot read it keeps."""
    newer = folder / "newer"
    shutil.copytree(PROJECT, newer, symlinks=True)
    version = set_version(newer, "loopd/__init__.py", r'(?<=^__version__ = ")[^"]+', "99.0")
    set_version(newer, "loopd/worker/records.py", r"(?<=^VERSION = )\d+", "99")

    def install(tree: Path, expected: str) -> None:
        before = main_pid()
        run("make", "-C", tree, "install", timeout=300)
        assert main_pid() not in (0, before)
        assert loopctl("hello").startswith(f"loopd {expected},")

    other = folder / "other.img"
    other.write_bytes(bytes(1 << 20))
    with held(disk, 6) as found:
        try:
            install(newer, "99.0")
            assert len(leases()) == len(found)
            device = attach(other)
            wait_for("it is listed", lambda: name(device) in [lease["devname"] for lease in leases()])
        finally:
            install(PROJECT, version)
        assert sorted(lease["devname"] for lease in leases()) == sorted(found)
        assert bound()[name(device)] == str(other)
        assert Path(device).is_block_device()
        (warning,) = [record for record in journal.records(f"MESSAGE_ID={WARNED}") if "fd store" in record["MESSAGE"]]
        assert "version 99" in warning["MESSAGE"]
        assert "newer" in journal.text(f"MESSAGE_ID={WARNED}", "-x")
        with other.open("r+b") as file:
            file.write(b"still the same")
        run("blockdev", "--flushbufs", device)
        with open(device, "rb") as node:
            assert node.read(14) == b"still the same"
        # The newer one carries it on: as its user would, by an upgrade.
        try:
            install(newer, "99.0")
            assert loopctl("hello").startswith("loopd 99.0,")
            assert len(leases()) == len(found) + 1
            loopctl("detach", device)
            assert not Path(device).exists()
        finally:
            install(PROJECT, version)
    nothing_leaks()


def set_version(tree: Path, file: str, pattern: str, text: str) -> str:
    """Put `text` in the place of the one match; what was there."""
    path = tree / file
    source = path.read_text()
    (match,) = re.finditer(pattern, source, re.MULTILINE)
    path.write_text(source[: match.start()] + text + source[match.end() :])
    return match[0]


# Numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.deadline(480)
def test_a_kept_node_leads_nowhere(disk: Path, folder: Path, journal: Journal) -> None:
    """Whatever is bound later, after a restart and with the counter lost: its device does not come again."""
    assert Path("/sys/module/loop/parameters/max_loop").read_text() == "8\n", "as the file in modprobe.d has it"
    device, kept = attach(disk), folder / "kept"
    os.link(device, kept)
    loopctl("detach", device)
    wait_for("its number is removed", lambda: not Path(f"/sys/block/{name(device)}").exists())
    image = folder / "hosts.img"
    image.write_bytes(bytes(1 << 20))
    hosts: list[str] = []
    try:
        for lost in (False, True):
            run("systemctl", "stop", SERVICE)
            if lost:
                Path("/var/lib/loopd/numbers").unlink()
            with Script(HOLD, disk, folder_for_nodes(disk), "6") as holder:
                assert name(device) not in dict(word.split("=") for word in holder.line().split())
                hosts += [run("losetup", "--find", "--show", image).strip() for _ in range(4)]
                with pytest.raises(OSError, match=os.strerror(errno.ENXIO)):
                    os.close(os.open(kept, os.O_RDONLY))
                holder.stop()
    finally:
        for host in hosts:
            run("losetup", "--detach", host)
    said = [record["MESSAGE"] for record in journal.records(f"MESSAGE_ID={WARNED}")]
    assert len(said) == 1
    assert "no number counter" in said[0]
    nothing_leaks()


def test_a_kernel_that_makes_devices_again(journal: Journal) -> None:
    """Without max_loop, as loopd finds out at its start."""

    def reload(*command: str) -> None:
        run("systemctl", "stop", SERVICE)
        run("udevadm", "settle")
        # A helper has the control device open for a moment longer than the main process lives.
        wait_for("the module is out", lambda: run("sh", "-c", "modprobe --remove loop || echo in use") == "")
        run(*command)

    reload("insmod", run("modinfo", "--filename", "loop").strip())
    try:
        loopctl("hello")
        wait_for("it warns", lambda: journal.records(f"MESSAGE_ID={WARNED}"))
        (warning,) = journal.records(f"MESSAGE_ID={WARNED}")
        assert "loop.max_loop=8" in warning["MESSAGE"]
        assert "modprobe.d" in journal.text(f"MESSAGE_ID={WARNED}", "-x")
    finally:
        reload("modprobe", "loop")


# What the administrator sees, and the end of a cgroup -----------------------------------------------------------------


@pytest.fixture
def scope() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Run commands in a scope of their own, which is an account of its own; stopped at the end."""
    unit = "a-build.scope"

    def start(*command: str | Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen(["systemd-run", "--quiet", "--scope", f"--unit={unit}", *command])

    yield start
    run("systemctl", "stop", unit, check=False)


@pytest.mark.deadline(480)
def test_the_administrators_list(disk: Path, scope: Callable[..., subprocess.Popen[bytes]]) -> None:
    """Age, owner, unit, file, size, what keeps it alive, who has it open; and `detach --force` of somebody else's."""
    run("mkfs.ext4", "-q", disk)
    nodes, mounted = folder_for_nodes(disk), disk.parent / "mounted"
    mounted.mkdir()
    for path in (disk, nodes):
        os.chown(path, 1000, 1000)
    user = ("setpriv", "--reuid=builder", "--regid=builder", "--groups=loopd", "--")
    script = f"exec sleep 600 <$(loopctl attach --directory {nodes} {disk})"
    with scope(*user, "sh", "-c", script):
        wait_for("it is attached", lambda: any("sleep[" in str(lease.get("openers")) for lease in leases()))
        run("udevadm", "settle")  # it may have the device open, too
        (lease,) = leases()
        assert (lease["size"], lease["backing_file"]) == (16 << 20, str(disk))
        assert (lease["uid"], lease["unit"], lease["lease"]) == (1000, "a-build.scope", "pidfd")
        assert lease["account"].endswith("/a-build.scope")
        assert lease["owner"] == lease["account"]
        assert 0 < lease["age"] < 240
        (opener,) = lease["openers"]
        assert re.fullmatch(r"sleep\[\d+\]", opener)
        run("mount", f"/dev/{lease['devname']}", mounted)
        header, _ = loopctl("--admin", "list").splitlines()
        assert header.split() == "NAME SIZE AGE STATE LEASE UID PID UNIT OPEN-IN BACK-FILE".split()
        line = loopctl("--admin", "list", "--noheadings", "--output=all")
        for word in ("16M", "bound", "pidfd", "a-build.scope", " 1000 ", opener, f"{mounted} in ", str(disk)):
            assert word in line, word
        assert loopctl("list") == "", "root's own are others"
        run("umount", mounted)
        refused = run("sh", "-c", f"loopctl detach {lease['devname']} 2>&1; echo $?")
        assert refused.strip().endswith("1")
        assert "no device" in refused
        run("sh", "-c", f"loopctl --admin detach --force --wait=0 {lease['devname']}", check=False)
        assert not list(nodes.iterdir())
        assert [found["state"] for found in leases()] == ["held"]
        run("systemctl", "stop", "a-build.scope")
    wait_for("it goes at its last close", lambda: not bound() and not leases())


@pytest.mark.deadline(480)
def test_the_end_of_the_cgroup_is_the_end(
    disk: Path, journal: Journal, scope: Callable[..., subprocess.Popen[bytes]]
) -> None:
    """Kept by a pidfd of the host's own PID 1, which never ends; its scope does. Also after a restart of the daemon."""
    nodes = folder_for_nodes(disk)
    with scope("sh", "-c", f"loopctl attach --directory {nodes} {disk}; exec sleep 600"):
        wait_for("it is attached", leases)
        run("systemctl", "restart", SERVICE)
        (lease,) = leases()
        assert lease["lease"] == "pidfd"
        run("systemctl", "stop", "a-build.scope")
    wait_for("the lease is over", lambda: not bound() and journal.records(f"MESSAGE_ID={EXPIRED}"))
    assert not list(nodes.iterdir())
    (record,) = journal.records(f"MESSAGE_ID={EXPIRED}")
    assert record["LOOPD_UNIT"] == "a-build.scope"
