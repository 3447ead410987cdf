"""The journal is the audit log: found by unit, by MESSAGE_ID, by device, by container; explained by the catalog."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from host import SERVICE, Journal, attach, loopctl, name, run, with_device

ATTACHED = "e17225313c4f47a991f13d0e9b7456a8"
DETACHED = "b3e25ffbf24c48e7a4efdb5ee5a71269"
REFUSED = "3c0f368802cb4ac2bfc120fce9c6e0db"


def events(records: list[dict[str, str]]) -> list[str]:
    """What happened, but for `held`: udev may have a device open when it is detached, for a moment."""
    return [record["MESSAGE_ID"] for record in records if record["LOOPD_EVENT"] != "held"]


def test_what_was_done_is_recorded(disk: Path, journal: Journal) -> None:
    device = attach(disk)
    loopctl("detach", device)
    devname = name(device)
    for event in (ATTACHED, DETACHED):
        (record,) = journal.records("-u", SERVICE, f"MESSAGE_ID={event}")
        assert record["LOOPD_DEVICE"] == devname
        assert record["LOOPD_NUMBER"] == devname.removeprefix("loop")
        assert record["LOOPD_BACKING_FILE"] == str(disk)
        assert record["LOOPD_BACKING_INODE"] == str(disk.stat().st_ino)
        assert record["LOOPD_BACKING_VIEW"] == "host"
        assert record["LOOPD_UID"] == "0"
        assert record["_SYSTEMD_UNIT"] == SERVICE
        assert devname in record["MESSAGE"]
    assert events(journal.records(f"LOOPD_DEVICE={devname}")) == [ATTACHED, DETACHED]


def test_by_unit_of_the_client(disk: Path, journal: Journal) -> None:
    scope = "a-build.scope"
    nodes = disk.parent / "dev"
    nodes.mkdir()
    run(
        "systemd-run",
        "--quiet",
        "--scope",
        f"--unit={scope}",
        "loopctl",
        "run",
        "--directory",
        nodes,
        disk,
        "--",
        "true",
    )
    with_device(disk, "true")
    assert events(journal.records(f"LOOPD_UNIT={scope}")) == [ATTACHED, DETACHED]
    assert len(journal.records(f"MESSAGE_ID={ATTACHED}")) == 2


def test_a_refusal_is_recorded(disk: Path, journal: Journal) -> None:
    refused = run("sh", "-c", f"loopctl attach --directory /proc {disk} 2>&1; echo $?")
    assert refused.strip().endswith("1")
    (record,) = journal.records("-u", SERVICE, f"MESSAGE_ID={REFUSED}")
    assert record["LOOPD_CODE"] in ("not-permitted", "undeliverable", "bad-fd")
    assert record["LOOPD_OPERATION"] == "attach"
    assert int(record["LOOPD_DURATION_USEC"]) > 0
    assert record["PRIORITY"] == "5"


def test_a_path_cannot_forge_a_field(folder: Path, journal: Journal) -> None:
    """The journal's protocol has a field a line; a path may have lines of its own."""
    disk = folder / "x\nLOOPD_UNIT=forged\nLOOPD_UID=4711\n"
    disk.write_bytes(bytes(1 << 20))
    loopctl("detach", attach(disk))
    (record,) = journal.records(f"MESSAGE_ID={ATTACHED}")
    assert record["LOOPD_BACKING_FILE"] == str(disk)
    assert (record["LOOPD_UID"], record["LOOPD_UNIT"] == "forged") == ("0", False)
    assert journal.records("LOOPD_UNIT=forged") == journal.records("LOOPD_UID=4711") == []


def test_catalog_explains_each_record(disk: Path, journal: Journal) -> None:
    with_device(disk, "true")
    plain, explained = (journal.text("-u", SERVICE, f"MESSAGE_ID={ATTACHED}", *more) for more in ((), ("-x",)))
    assert "journalctl LOOPD_UNIT=" not in plain
    assert "A loop device was attached for a client" in explained
    assert "journalctl LOOPD_UNIT=" in explained


def test_catalog_has_every_event() -> None:
    source = Path("/usr/local/lib/loopd/loopd/daemon/audit.py").read_text()
    events = re.findall(r'_Kind\("([0-9a-f]{32})"', source)
    assert len(events) >= 5
    for event in events:
        entry = run("journalctl", "--dump-catalog", event)
        assert "Defined-By: loopd" in entry
        assert len(entry) > 200


def test_no_noise(disk: Path, journal: Journal) -> None:
    """Where all goes well, the service says nothing besides its records, and systemd nothing about it."""
    with_device(disk, "true")
    run("systemctl", "restart", SERVICE)
    loopctl("hello")
    warnings = [record["MESSAGE"] for record in journal.records("-u", SERVICE, "--priority=warning")]
    assert warnings == []


@pytest.mark.parametrize("option", ["--user-unit=nothing", "LOOPD_DEVICE=loop1"])
def test_filters_filter(option: str, journal: Journal) -> None:
    assert journal.records(option) == []
