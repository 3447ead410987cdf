"""The build of docs/containers.md: put in place for a container to run, and checked by the host afterwards."""

from __future__ import annotations

import json
import re
from pathlib import Path

from host import Journal, run, wait_for
from recipes import recipe

ATTACHED = "e17225313c4f47a991f13d0e9b7456a8"


def write(folder: Path) -> None:
    """Make build.sh in the folder; it says what the host is called that it ran on, and
    where its device was.
    """
    script = folder / "build.sh"
    script.write_text(recipe("The build") + "hostname >host\necho $device >device\n")
    script.chmod(0o755)


def check(folder: Path) -> None:
    """What the host finds in the image: its own losetup, kernel and file systems judge it."""
    disk, hello = folder / "disk.img", (folder / "content/hello").read_bytes()
    table = json.loads(run("sfdisk", "--json", disk))["partitiontable"]
    assert table["label"] == "gpt"
    assert [partition["name"] for partition in table["partitions"]] == ["boot", "root"]
    device = run("losetup", "--find", "--show", "--partscan", "--read-only", disk).strip()
    mounted = folder / "mounted"
    mounted.mkdir()
    try:
        # Where udev looks at the device meanwhile, a kernel scans it twice, and the partitions are gone in between.
        run("udevadm", "settle")
        for number, kind in ((1, "vfat"), (2, "ext4")):
            wait_for(f"partition {number}", Path(f"{device}p{number}").exists)
            run("mount", "-o", "ro", "-t", kind, f"{device}p{number}", mounted)
            try:
                assert (mounted / "hello").read_bytes() == hello != b""
            finally:
                run("umount", mounted)
        run("e2fsck", "-fn", f"{device}p2")
    finally:
        run("losetup", "--detach", device)


def recorded(journal: Journal, unit: str) -> None:
    """The journal has under the name of that unit what the build did, and nobody else did anything."""
    records = [record for record in journal.records(f"LOOPD_UNIT={unit}") if "LOOPD_WINDOW" not in record]
    events = [record["LOOPD_EVENT"] for record in records]
    assert events.count("attached") == events.count("detached") + events.count("expired") == 1
    held = events.count("held")  # udev may have a device open when it is detached, for a moment
    assert held <= 1
    assert len(events) == 2 + held
    assert {record["LOOPD_BACKING_FILE"].rpartition("/")[2] for record in records} == {"disk.img"}
    everybodys = [record for record in journal.records(f"MESSAGE_ID={ATTACHED}") if "LOOPD_WINDOW" not in record]
    assert everybodys == [record for record in records if record["MESSAGE_ID"] == ATTACHED]


def unit_of(journal: Journal, pattern: str) -> str:
    """The one unit of that form that is in the journal."""
    units = {record["LOOPD_UNIT"] for record in journal.records(f"MESSAGE_ID={ATTACHED}")}
    (unit,) = units
    assert re.fullmatch(pattern, unit)
    return unit
