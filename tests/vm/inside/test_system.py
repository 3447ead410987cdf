"""The VM itself is what it should be; if one of these fails, look at the image and not at loopd."""

from __future__ import annotations

from pathlib import Path

from host import run


def test_no_unit_failed() -> None:
    assert run("systemctl", "--failed", "--plain", "--no-legend") == ""


def test_losetup_works(disk: Path) -> None:
    device = run("losetup", "--find", "--show", disk).strip()
    run("losetup", "--detach", device)
