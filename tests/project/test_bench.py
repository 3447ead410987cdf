"""The benchmark itself, run small: it works, and what it saves has the shape that the documentation is made from.

Speed is not tested here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from support.daemon import ROOT, require

SECTIONS = ("attach", "crowd", "leases", "release", "start", "drop-in", "io", "flood", "hang", "share")


def test_every_section_measures_something(tmp_path: Path) -> None:
    require(os.geteuid() == 0, "needs root: loop devices")
    command = [sys.executable, str(ROOT / "tests/bench/bench.py"), "--quick", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "performance.json").read_text())
    assert found["machine"]["mode"] == "quick"
    assert [*dict.fromkeys(row["section"] for row in found["rows"])] == list(SECTIONS)
    for row in found["rows"]:
        assert row["what"] in done.stdout
        assert row["value"] >= 0
        assert (row["ratio"] is None) == (row["reference"] is None)
        assert row["ratio"] is None or row["low"] <= row["ratio"] <= row["high"]
        assert (row["reached"] is None) == (row["reach"] is None)


def test_the_page_shows_what_was_saved() -> None:
    page = (ROOT / "docs/performance.md").read_text()
    shown = page.partition("```text\n")[2].partition("```")[0]
    saved = json.loads((ROOT / "docs/performance.json").read_text())
    assert saved["machine"]["mode"] == "full"
    assert {row["section"] for row in saved["rows"]} == set(SECTIONS)
    for row in saved["rows"]:
        assert f"{row['what']} " in shown
