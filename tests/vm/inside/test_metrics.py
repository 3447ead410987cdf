"""loopd-metrics.timer and its service, as an administrator enables them, and the line for cron."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from host import prop, run, with_device
from recipes import recipe

SERVICE, TIMER = "loopd-metrics.service", "loopd-metrics.timer"


@pytest.fixture
def textfiles() -> Iterator[Path]:
    """Where the unit writes: node_exporter, which would make it, is not here."""
    (path,) = (Path(value) for value in re.findall(r"TEXTFILES=(\S+)", prop(SERVICE, "Environment")))
    path.mkdir(parents=True)
    yield path
    shutil.rmtree(path)


def sample(file: Path, name: str) -> float:
    (value,) = re.findall(rf"(?m)^{name}\{{[^}}]*\}} (\S+)$", file.read_text())
    return float(value)


@pytest.mark.deadline(290)
def test_service(disk: Path, textfiles: Path) -> None:
    run("systemctl", "start", SERVICE)
    before = sample(textfiles / "loopd-admin.prom", "loopd_attaches_total")
    with_device(disk, "true")
    run("systemctl", "start", "loopd@team.socket")
    try:
        run("systemctl", "start", SERVICE)
        assert sorted(path.name for path in textfiles.iterdir()) == ["loopd-admin.prom", "loopd-team.prom"]
        assert sample(textfiles / "loopd-admin.prom", "loopd_attaches_total") == before + 1
        assert 'service="loopd@team"' in (textfiles / "loopd-team.prom").read_text()
        assert (textfiles / "loopd-team.prom").stat().st_mode & 0o777 == 0o644
    finally:
        run("systemctl", "stop", "loopd@team.socket", "loopd@team.service", "loopd-admin@team.socket")
    run("systemctl", "start", SERVICE)
    assert [path.name for path in textfiles.iterdir()] == ["loopd-admin.prom"], "the instance's is there no more"
    shutil.rmtree("/run/loopd-team")


def test_timer(textfiles: Path) -> None:
    assert run("systemctl", "is-enabled", TIMER, check=False).strip() == "disabled"
    run("sh", "-euc", recipe("node_exporter", page="metrics.md"))
    try:
        assert prop(TIMER, "ActiveState") == "active"
        assert prop(TIMER, "Unit") == SERVICE
        assert "OnCalendar=*-*-* *:*:00" in prop(TIMER, "TimersCalendar")
    finally:
        run("systemctl", "disable", "--now", TIMER)
        run("systemctl", "start", SERVICE)  # at the full minute the timer has: to wait for its end


def test_line_for_cron(textfiles: Path) -> None:
    path, line = recipe("node_exporter", "text", page="metrics.md").split("\n", 1)
    when, command = line.split("root ", 1)
    assert when.split() == ["*"] * 5
    run("env", "-i", path, "/bin/sh", "-euc", command)
    assert sample(textfiles / "loopd-admin.prom", "loopd_build_info") == 1
