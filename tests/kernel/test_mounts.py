"""Mount tables: a client that may mount makes its own as long as it likes, and that costs loopd neither memory nor
time.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.daemon import Daemon, ask
from support.processes import Child, become, mount, mount_tmpfs, own_user_namespace
from support.untouched import helpers

from loopd.cli import openers
from loopd.kernel import proc
from loopd.protocol import wire

ALICE = 20001
AWKWARD = "\\ " * 125
"""A name that takes four bytes in a mount table for each of its own."""


def _long_lines() -> None:
    """6,000 mounts, each with a line of 21 KB: 126 MB."""
    for _ in range(10):
        os.mkdir(AWKWARD)
        os.chdir(AWKWARD)
    os.mkdir("m")
    for _ in range(6000):
        mount(b"a \\" * 1300, "m", b"ramfs")


def _one_on_the_other() -> None:
    """10,000 mounts, each on the one before: 1.5 MB, for which the kernel climbs 50 million mounts."""
    os.mkdir("m")
    for _ in range(10000):
        mount(b"m", "m", b"ramfs")


def _one_long_line(depth: int = 5000) -> None:
    """One mount so deep that its line is 5 MB long."""
    for _ in range(depth):
        os.mkdir(AWKWARD)
        os.chdir(AWKWARD)
    os.mkdir("m")
    mount(b"m", "m", b"ramfs")


TABLES: dict[str, Callable[[], None]] = {
    "long lines": _long_lines,
    "one on the other": _one_on_the_other,
    "one long line": _one_long_line,
    "one of 60 MB": lambda: _one_long_line(60000),
}


@pytest.fixture(name="client", params=TABLES)
def client_fixture(request: pytest.FixtureRequest, daemon: Daemon, image: int, tmp_path: Path) -> Iterator[Child]:
    """A user with such a table, who tells what is answered to two attaches: of a file on a file system that was mounted
    before, and with a directory on one that was mounted last.
    """
    Path(daemon.path).chmod(0o666)
    tmp_path.chmod(0o711)
    daemon.hello()

    def body(tell: Callable[[Any], None]) -> None:
        os.chdir(tmp_path)
        become(ALICE)
        own_user_namespace()
        home, image = os.open(".", os.O_PATH), os.open("image", os.O_RDONLY)
        os.close(mount_tmpfs("/mnt"))
        os.chdir("/mnt")
        TABLES[request.param]()
        os.fchdir(home)
        os.mkdir("/mnt/last")
        last = mount_tmpfs("/mnt/last")
        tell("mounted")
        asked = (wire.Attach(0, reply_fd=1, deliver=("fd",)), [image]), (wire.Attach(0, 1, 2), [image, last])
        for message, fds in asked:
            reply = ask("loopd/loopd.sock", wire.encode_request(message), fds)
            reply.close()
            tell(reply.fields)
        time.sleep(60)

    with Child(body) as child:
        assert child.hear() == "mounted"
        yield child


def _spent(pid: int) -> tuple[float, int]:
    """Seconds of CPU time that a process has used, and the most memory that it had, in bytes."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    most = re.search(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert most is not None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), int(most[1]) << 10


@pytest.mark.parametrize("client", ["long lines", "one on the other"], indirect=True)
def test_a_table_without_end(daemon: Daemon, client: Child) -> None:
    """What is found soon is found; the rest is refused in words that say why."""
    before = {pid: _spent(pid) for pid in helpers(daemon)}
    found, not_found = client.hear(), client.hear()
    for pid, (seconds, memory) in ((pid, _spent(pid)) for pid in before):
        assert seconds - before[pid][0] < 0.6
        assert memory - before[pid][1] < 8 << 20, "a worker has kept a table"
    assert "error" not in found, found
    assert not_found["error"]["code"] == "not-permitted"
    assert "there are too many mounts" in not_found["error"]["message"]


@pytest.mark.parametrize("client", ["one long line"], indirect=True)
def test_a_line_without_end(daemon: Daemon, client: Child) -> None:
    """It is left out, and what comes behind it is found."""
    before = {pid: _spent(pid) for pid in helpers(daemon)}
    found, behind = client.hear(), client.hear()
    for pid, (_, memory) in before.items():
        assert _spent(pid)[1] - memory < 8 << 20, "a worker has kept a line"
    assert "error" not in found, found
    assert "mount table" not in behind["error"]["message"], "it is in there"


def test_no_line_is_taken_for_another(tmp_path: Path) -> None:
    """The end of a line that is too long, and a line that a read cuts in two."""
    path = tmp_path / "table"
    path.write_bytes(b"1 a\n" + b"2 " + b"b" * proc.LONGEST + b"3 c - ext4\n" + b"4 d\n" * 3000 + b"5 e\n")
    assert list(proc.lines(str(path))) == [b"1 a", *[b"4 d"] * 3000, b"5 e"]


def test_a_table_is_read_as_it_is() -> None:
    assert b"".join(line + b"\n" for line in proc.lines("/proc/self/mountinfo")) == proc.read("/proc/self/mountinfo")


def test_the_openers_of_a_device_are_told_without_it(tmp_path: Path) -> None:
    """`loopctl list` looks at the tables of all, the administrator's with root's memory."""

    def body(tell: Callable[[Any], None]) -> None:
        own_user_namespace()
        os.close(mount_tmpfs("/mnt"))
        os.chdir("/mnt")
        _long_lines()
        tell("mounted")
        time.sleep(60)

    with Child(body) as child:
        assert child.hear() == "mounted"
        code = (
            "import re, time\n"
            "from loopd.cli import openers\n"
            f"print(sum(1 for _ in openers._mount_lines('{child.pid}')))\n"
            # Of this program alone: ru_maxrss also counts the process that it was forked from.
            "most = re.search('VmHWM:(.*)kB', open('/proc/self/status').read())[1]\n"
            "print(time.process_time(), most)\n"
        )
        result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    lines, seconds, memory = (float(word) for word in result.stdout.split())
    assert 0 < lines < 6000
    assert seconds < 1 + openers.PATIENCE
    assert memory < 48 << 10, "KiB"
