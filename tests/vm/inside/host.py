"""What the tests inside of a VM share: run a command, wait for something, read the journal, list what loopd holds.

Standard library only, and nothing of loopd: the tests see it as an administrator does.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

SERVICE, SOCKET, ADMIN = "loopd.service", "loopd.socket", "loopd-admin.socket"
SOCKET_PATH = Path("/run/loopd/loopd.sock")
DROP_IN = Path("/run/systemd/system/loopd.service.d/test.conf")
OPTIONS = Path("/run/loopd-test-options")
FIRST_NUMBER = 4096
KERNEL = tuple(int(part) for part in re.findall(r"\d+", os.uname().release)[:2])
POLICY = Path("/etc/loopd/loopd.toml")


def run(*command: str | Path, timeout: float = 90, check: bool = True, text: str = "", cwd: Path | None = None) -> str:
    """The command's standard output; its standard error goes to the test's, to be shown when the test fails."""
    done = subprocess.run(command, input=text, stdout=subprocess.PIPE, timeout=timeout, check=False, text=True, cwd=cwd)
    if check and done.returncode != 0:
        raise AssertionError(f"{' '.join(map(str, command))}: exit status {done.returncode}\n{done.stdout}")
    return done.stdout


def systemd_version() -> int:
    return int(run("systemctl", "--version").split()[1].partition(".")[0])


def loopctl(*arguments: str | Path) -> str:
    return run("loopctl", *arguments)


def prop(unit: str, name: str) -> str:
    return run("systemctl", "show", "--property", name, "--value", unit).strip()


def wait_for(what: str, condition: Callable[[], object], seconds: float = 30) -> None:
    """Wait until CONDITION holds. Software emulation is slow: a generous limit costs nothing where all is well."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"after {seconds} s still not: {what}"
        time.sleep(0.1)


def leases() -> list[dict[str, Any]]:
    """Every lease there is, from the administrator's socket."""
    found: list[dict[str, Any]] = json.loads(loopctl("--admin", "list", "--json"))["leases"]
    return found


def bound() -> dict[str, str]:
    """Devices of loopd's range that are bound, with their backing files: what the kernel says, not what loopd does.

    Without those that are bound to nothing until somebody, udev most likely, has closed them.
    """
    found = {}
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            name, file = path.parts[3], path.read_text().strip()
        except OSError:  # it has gone since: ENOENT, ENODEV
            continue
        if int(name[4:]) >= FIRST_NUMBER and not file.startswith("/memfd:loopd-parked"):
            found[name] = file
    return found


def disk_links() -> dict[str, str]:
    """Everything below /dev/disk: each link with where it leads."""
    return {str(path): os.readlink(path) for path in Path("/dev/disk").rglob("*") if path.is_symlink()}


@contextmanager
def drop_in(text: str) -> Iterator[None]:
    """A drop-in for loopd.service; the service is stopped before and after, its socket is not."""

    def apply() -> None:
        run("systemctl", "daemon-reload")
        # A request that waits may start it meanwhile, which cancels the stop.
        run("sh", "-c", f"for try in 1 2 3 4 5 6 7 8; do systemctl stop {SERVICE} && exit; done; exit 1")

    DROP_IN.parent.mkdir(parents=True, exist_ok=True)
    DROP_IN.write_text(text)
    try:
        apply()
        yield
    finally:
        DROP_IN.unlink()
        apply()


@contextmanager
def idle_timeout(seconds: float) -> Iterator[None]:
    """The service with another patience, by an option in a file that conftest.py made it read (a reload is slow)."""
    run("systemctl", "stop", SERVICE)
    OPTIONS.write_text(f"OPTIONS=--idle-timeout={seconds}\n")
    try:
        yield
    finally:
        OPTIONS.unlink()
        run("systemctl", "stop", SERVICE)


def attach(disk: Path, *options: str | Path) -> str:
    """Attach on the host, whose /dev has the kernel's nodes already, with a node beside the file; the node's path."""
    nodes = disk.parent / "dev"
    nodes.mkdir(exist_ok=True)
    device = loopctl("attach", "--directory", nodes, *options, disk).strip()
    assert device.startswith(f"{nodes}/loop"), device
    return device


def with_device(disk: Path, *command: str) -> str:
    """Run a command with a device for its length."""
    nodes = disk.parent / "dev"
    nodes.mkdir(exist_ok=True)
    return loopctl("run", "--directory", nodes, disk, "--", *command)


def name(device: str) -> str:
    return device.rpartition("/")[2]


def findings(told: str) -> dict[str, tuple[str, str]]:
    """What `loopctl doctor` said: level and text of each layer."""
    found = {}
    for line in told.splitlines():
        level, _, rest = line.partition(" ")
        layer, _, text = rest.strip().partition(": ")
        assert level in ("OK", "WARN", "FAIL"), line
        found[layer] = (level, text)
    return found


def _sockets(process: Path) -> set[str]:
    """What a process has open besides the standard files; nothing if any of it is no socket."""
    links = {os.readlink(fd) for fd in (process / "fd").iterdir() if int(fd.name) > 2}
    return links if all(link.startswith("socket:") for link in links) else set()


def _writers() -> list[Path]:
    """The processes of loopd's that write the journal. Each has two sockets, one for records and one to journald."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended
            if b"/sbin/loopd\0" in (process / "cmdline").read_bytes() and (sockets := _sockets(process)):
                main = (process / "stat").read_text().rpartition(")")[2].split()[1]
                requests = {os.readlink(f"/proc/{main}/fd/{fd}") for fd in (3, 4)}  # LISTEN_FDS
                if not sockets & requests:
                    found.append(process)
    return found


def _rests(writer: Path) -> bool:
    """Whether it waits for a record, and not for journald."""
    try:
        return (writer / "wchan").read_text() == "__skb_wait_for_more_packets"
    except OSError:
        return True


class Journal:
    """The journal from now on.

    By the clock: with a filter, journalctl of systemd 252 leaves out the first record after a cursor.
    """

    def __init__(self) -> None:
        self.begin = time.time()

    def text(self, *arguments: str) -> str:
        wait_for("what was recorded is handed to journald", lambda: all(map(_rests, _writers())))
        run("journalctl", "--sync")
        return run("journalctl", "--quiet", f"--since=@{self.begin:.6f}", *arguments)

    def records(self, *arguments: str) -> list[dict[str, str]]:
        return [json.loads(line) for line in self.text("--output=json", *arguments).splitlines()]


@contextmanager
def policy(text: str) -> Iterator[None]:
    """The administrator's configuration."""
    POLICY.parent.mkdir(exist_ok=True)
    POLICY.write_text(f"{text}\n")
    run("systemctl", "try-reload-or-restart", SERVICE)
    try:
        yield
    finally:
        POLICY.unlink()
        run("systemctl", "try-reload-or-restart", SERVICE)
