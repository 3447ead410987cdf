"""The journal: what the daemon writes into it, by a child process, and what becomes of that when the journal stalls,
when it goes away, and when either process is killed.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.daemon import ROOT, Daemon, eventually, require
from support.processes import Activated, stays
from support.untouched import writer
from test_activation import PROMPT, activated, in_namespace

from loopd.daemon.audit import Audit
from loopd.daemon.exchange import Answers
from loopd.protocol import wire
from loopd.worker import journal as child

__all__ = ["activated"]  # a fixture


class Journal:
    """journald's end of its native protocol, read as https://systemd.io/JOURNAL_NATIVE_PROTOCOL has it."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "socket"
        self.open()

    def open(self) -> None:
        """Bind the socket, anew."""
        self.path.unlink(missing_ok=True)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(self.path))

    def record(self, timeout: float = 10) -> dict[str, bytes]:
        """The next record."""
        self.socket.settimeout(timeout)
        data = self.socket.recv(1 << 20)
        fields = {}
        while data:
            line, _, data = data.partition(b"\n")
            name, equals, value = line.partition(b"=")
            if not equals:
                size = int.from_bytes(data[:8], "little")
                value, end, data = data[8 : 8 + size], data[8 + size : 9 + size], data[9 + size :]
                assert end == b"\n"
            assert re.fullmatch(rb"[A-Z][A-Z0-9_]{0,63}", name)
            assert name.decode() not in fields
            fields[name.decode()] = value
        return fields

    def of(self, event: str, timeout: float = 10) -> dict[str, bytes]:
        """The next record of that event; those of others are passed over."""
        while (record := self.record(timeout))["LOOPD_EVENT"] != event.encode():
            pass
        return record

    @contextlib.contextmanager
    def taking_all(self) -> Iterator[None]:
        """Take whatever comes, as journald does, and forget it."""
        over = threading.Event()

        def take() -> None:
            while not over.is_set():
                with contextlib.suppress(TimeoutError):
                    self.record(0.05)

        taker = threading.Thread(target=take)
        taker.start()
        try:
            yield
        finally:
            over.set()
            taker.join()


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    (tmp_path / "journal").mkdir()
    made = Journal(tmp_path / "journal")
    yield made
    made.socket.close()


def in_its_place(journal: Journal) -> tuple[str, ...]:
    """A wrapper: a mount namespace where that journal is the system's."""
    place = "/run/systemd/journal"
    return in_namespace(f"mount -t tmpfs tmpfs /run; mkdir -p {place}; mount --bind {journal.path.parent} {place}")


@pytest.fixture
def journalled(activated: Callable[..., Activated], journal: Journal) -> Iterator[Activated]:
    """A daemon that has it."""
    daemon = activated(wrapper=in_its_place(journal))
    daemon.start()
    daemon.hello()
    yield daemon
    with journal.taking_all():
        daemon.stop()


def test_records_are_structured_and_nothing_can_be_forged_into_one(
    journalled: Activated, journal: Journal, directory: int, tmp_path: Path
) -> None:
    hostile = os.fsencode(tmp_path) + b"/\xff=\nPRIORITY=0\nLOOPD_UID=1\n\n\x1b[2J"
    image = os.open(hostile, os.O_RDWR | os.O_CREAT)
    try:
        os.truncate(image, 1 << 20)
        fields = journalled.attach(image, directory).fields
        status = os.fstat(image)
    finally:
        os.close(image)
    record = journal.of("attached")
    assert record["LOOPD_BACKING_FILE"] == hostile
    # journalctl shows a message with something else in it as "blob data".
    assert record["MESSAGE"].decode().isprintable()
    assert b"\\udcff=\\nPRIORITY=0\\nLOOPD_UID=1\\n\\n\\x1b[2J" in record["MESSAGE"]
    assert record["LOOPD_BACKING_INODE"] == str(status.st_ino).encode()
    assert record["PRIORITY"] == b"6"
    assert record["SYSLOG_IDENTIFIER"] == b"loopd"
    assert record["LOOPD_DEVICE"] == fields["devname"].encode()
    assert record["LOOPD_DISKSEQ"] == str(fields["diskseq"]).encode()
    assert (record["LOOPD_PID"], record["LOOPD_UID"]) == (str(os.getpid()).encode(), str(os.getuid()).encode())
    assert int(record["LOOPD_DURATION_USEC"]) > 0
    # The catalog has an entry for each.
    catalog = (ROOT / "systemd/loopd.catalog").read_text()
    assert f"-- {record['MESSAGE_ID'].decode()}\n" in catalog

    journalled.ask(wire.Detach(fields["devname"], 0, wait=5), [])
    detached = journal.of("detached")
    assert detached["LOOPD_DEVICE"] == record["LOOPD_DEVICE"]
    assert detached["MESSAGE_ID"] != record["MESSAGE_ID"]
    journalled.ask(wire.Detach("loop4096", 0), [])
    refusal = journal.of("refused")
    assert (refusal["LOOPD_CODE"], refusal["LOOPD_OPERATION"]) == (b"not-found", b"detach")
    # Once, not on standard error too.
    assert journalled.records() == []


def refuse(daemon: Daemon, number: int) -> None:
    """A request that is refused, which makes a record with this number."""
    started = time.monotonic()
    assert daemon.ask(wire.Detach(f"loop{1000000 + number}", 0), []).code == "not-found"
    assert time.monotonic() - started < PROMPT
    time.sleep(1.1 / Answers.MOST_REFUSALS)  # more of them in a second have one record together


REFUSALS = 30
"""Records that are made beyond those that journald's socket queues: `net.unix.max_dgram_qlen`, 10 or 512 with systemd.
"""


def refused(record: dict[str, bytes]) -> int:
    """The number of that record."""
    (number,) = re.findall(rb"loop1(\d{6})", record["MESSAGE"])
    return int(number)


def stall(daemon: Daemon) -> int:
    """Have more recorded than a journal that does not read has room for; how many there are."""
    count = int(Path("/proc/sys/net/unix/max_dgram_qlen").read_text()) + REFUSALS
    for number in range(count):
        refuse(daemon, number)
    return count


def test_a_journal_that_stalls_holds_nobody_up_and_loses_nothing(journalled: Activated, journal: Journal) -> None:
    count = stall(journalled)
    # It reads again. No request comes to remind the daemon of what waits.
    assert [refused(journal.of("refused")) for _ in range(count)] == list(range(count))
    with pytest.raises(TimeoutError):
        journal.of("refused", 0.2)


def test_a_journal_that_is_restarted(journalled: Activated, journal: Journal) -> None:
    refuse(journalled, 0)
    journal.of("refused")
    journal.socket.close()
    for number in range(5):
        refuse(journalled, number)  # ECONNREFUSED
    journal.path.unlink()
    for number in range(5):
        refuse(journalled, number)  # ENOENT
    journal.open()
    assert [refused(journal.of("refused")) for _ in range(10)] == [*range(5), *range(5)]


def test_it_is_not_idle_while_records_wait(activated: Callable[..., Activated], journal: Journal) -> None:
    daemon = activated("--idle-timeout", "2", wrapper=in_its_place(journal))
    daemon.start()
    daemon.hello()
    journal.socket.close()
    refuse(daemon, 0)
    stays(lambda: daemon.running, 6.0, "it stays for that")
    journal.path.unlink()
    journal.open()
    assert journal.of("refused")["LOOPD_CODE"] == b"not-found"
    assert daemon.wait() == 0


def test_the_end_waits_for_the_journal_but_not_for_ever(journalled: Activated, journal: Journal) -> None:
    count = stall(journalled)
    started = time.monotonic()
    journalled.kill(signal.SIGTERM)
    assert journalled.wait() == 0
    assert time.monotonic() - started < 8
    # What was handed over is written all the same.
    assert [refused(journal.of("refused")) for _ in range(count)] == list(range(count))


def test_at_the_end_the_last_records_are_written(journalled: Activated, journal: Journal) -> None:
    count = stall(journalled)
    os.kill(journalled.pid, signal.SIGTERM)
    assert [refused(journal.of("refused")) for _ in range(count)] == list(range(count))
    assert journalled.wait() == 0


def test_what_was_handed_over_before_a_kill_is_written(journalled: Activated, journal: Journal) -> None:
    count = stall(journalled)
    journalled.kill()
    assert journalled.family(), "it outlives the main process"
    assert [refused(journal.of("refused")) for _ in range(count)] == list(range(count))
    eventually(lambda: not journalled.family(), "it ends when all is written", child.PATIENCE / 2)


def test_after_a_kill_it_waits_for_the_journal_but_not_for_ever(journalled: Activated, journal: Journal) -> None:
    stall(journalled)
    journalled.kill()
    stays(journalled.family, child.PATIENCE - 1.5, "it waits")
    eventually(lambda: not journalled.family(), "it gives up", 4)


@pytest.mark.parametrize("moment", ["at rest", "in a stall"])
def test_a_writer_that_is_killed_has_a_successor(journalled: Activated, journal: Journal, moment: str) -> None:
    refuse(journalled, 0)
    assert refused(journal.of("refused")) == 0
    at_rest = "__skb_wait_for_more_packets"
    eventually(lambda: Path(f"/proc/{writer(journalled)}/wchan").read_text() == at_rest, "it waits for the next record")
    count = stall(journalled) if moment == "in a stall" else 0
    before = writer(journalled)
    os.kill(before, signal.SIGKILL)
    refuse(journalled, count)
    assert [refused(journal.of("refused")) for _ in range(count + 1)] == list(range(count + 1))
    assert writer(journalled) != before
    with pytest.raises(TimeoutError):
        journal.of("refused", 0.2)


def test_sigterm_is_the_main_process_s_to_obey(journalled: Activated, journal: Journal) -> None:
    """It is sent to every process of the service by `systemctl kill`."""
    count = stall(journalled)
    os.kill(writer(journalled), signal.SIGTERM)
    os.kill(journalled.pid, signal.SIGTERM)
    assert [refused(journal.of("refused")) for _ in range(count)] == list(range(count))
    assert journalled.wait() == 0


def test_the_writer_holds_nothing_of_a_client(
    journalled: Activated, journal: Journal, image: int, directory: int
) -> None:
    assert journalled.attach(image, directory).code is None
    journal.of("attached")
    links = [os.readlink(f"/proc/{writer(journalled)}/fd/{fd}") for fd in os.listdir(f"/proc/{writer(journalled)}/fd")]
    assert len([link for link in links if not link.startswith("socket:")]) == 3, "the standard ones"
    assert len(links) == 6, "and its channel, that of the records, and libsystemd's socket"


FLOOD = """
import sys, time
from loopd.children.child import Children
from loopd.daemon.audit import Audit, Event
from loopd.kernel.poller import Poller
audit = Audit(Children(Poller()))
started = time.monotonic()
for number in range(int(sys.argv[1])):
    audit.record(Event.REFUSED, f"loop1{number:06}")
print(time.monotonic() - started, flush=True)
while not audit.flush():
    time.sleep(0.01)
"""


def test_what_does_not_fit_is_counted(journal: Journal) -> None:
    """Nobody reads while more is recorded than is kept; it takes no longer for that."""
    many = 2 * Audit.QUEUE
    command = [*in_its_place(journal), sys.executable, "-c", FLOOD, str(many)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        assert float(process.stdout.readline()) < 4
        kept = 0
        while (record := journal.record())["LOOPD_EVENT"] == b"refused":
            assert refused(record) == kept
            kept += 1
        assert record["LOOPD_EVENT"] == b"shed"
        assert kept >= Audit.QUEUE
        assert int(record["LOOPD_COUNT"]) == many - kept
        assert f"{many - kept} records were lost" in record["MESSAGE"].decode()
        assert process.wait(10) == 0


def test_without_a_journal_a_record_is_a_line(activated: Callable[..., Activated]) -> None:
    require(shutil.which("unshare"), "needs unshare (package util-linux)")
    daemon = activated(wrapper=in_namespace("mount -t tmpfs tmpfs /run"))
    daemon.start()
    daemon.ask(wire.Detach("loop4096", 0), [])
    (record,) = eventually(lambda: daemon.records("refused"), "the record is written")
    assert record["LOOPD_CODE"] == "not-found"
