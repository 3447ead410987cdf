"""What `make check` leaves to `make check-all`: tests that say so, and never all cases of one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from support.daemon import ROOT

TESTS = '''
import pytest

@pytest.fixture(params=["p", "q", "r"])
def place(request): return request.param

@pytest.mark.sample(3)
@pytest.mark.parametrize("letter", "abcd")
@pytest.mark.parametrize(("number", "word"), [(1, "x"), pytest.param(1, "y", id="1-y"), (2, "z")])
def test_table(letter, number, word): pass

@pytest.mark.sample(2)
@pytest.mark.parametrize("both", [("s", 1), ("t", 2)])
def test_of_a_fixture(place, both): pass

@pytest.mark.exhaustive
def test_left_out(): pass

@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_in_two_lengths(every): pass

def test_short(): pass
'''


def selected(place: Path, *options: str) -> list[str]:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "support.sampling", "-c", "/dev/null"]
    done = subprocess.run(
        [*command, f"--rootdir={place}", "-m", "not exhaustive", *(options or ".")],
        check=True, cwd=place, env={**os.environ, "PYTHONPATH": str(ROOT / "tests")}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    return re.findall(r"(?m)^test_\w+\.py::(.*)$", done.stdout)


def test_a_sample_has_every_value(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    assert selected(tmp_path) == [
        *("test_table[1-x-a]", "test_table[1-x-d]", "test_table[1-y-c]", "test_table[2-z-b]"),
        *("test_of_a_fixture[p-both0]", "test_of_a_fixture[q-both1]", "test_of_a_fixture[r-both0]"),
        "test_in_two_lengths[False]",
        "test_short",
    ]


def test_it_is_the_same_whatever_else_is_selected(tmp_path: Path) -> None:
    """So that those which failed can be run again."""
    (tmp_path / "test_some.py").write_text(TESTS)
    again = [f"test_some.py::test_table[{case}]" for case in ("1-x-b", "1-y-c", "2-z-b")]
    assert selected(tmp_path, *again) == ["test_table[1-y-c]", "test_table[2-z-b]"]
