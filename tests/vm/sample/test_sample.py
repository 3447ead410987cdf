"""Each of these ends in one known way; tests/vm/test_harness.py holds what the host makes of it."""

from __future__ import annotations

import os
import signal
import subprocess
import time

import pytest


def test_passes() -> None:
    assert subprocess.run(["uname", "-s"], stdout=subprocess.PIPE, check=True).stdout == b"Linux\n"


def test_fails() -> None:
    subprocess.run(["systemd-cat", "--identifier=sample", "echo", "a line for the journal"], check=True)
    assert 1 + 1 == 3, "a reason to fail"


def test_skips() -> None:
    pytest.skip("a reason to skip")


@pytest.mark.parametrize("value", ["one", "two words", "käse"])
def test_parameter(value: str) -> None:
    assert value


@pytest.fixture
def broken_cleanup() -> object:
    yield 1
    raise RuntimeError("the cleanup failed")


def test_cleanup_fails(broken_cleanup: object) -> None:
    assert broken_cleanup


@pytest.mark.deadline(2)
def test_deadline() -> None:
    time.sleep(600)


def test_power_failure() -> None:
    """The run dies half-way."""
    subprocess.run(["systemctl", "poweroff", "--force", "--force"], check=True)
    time.sleep(600)


def test_after_the_end() -> None:
    """Never runs after test_power_failure, and must not count as passed."""


def test_hangs() -> None:
    """Like a process in D state: the test's own deadline does not reach it."""
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    time.sleep(600)


def test_no_closing_line() -> None:
    """Ends pytest's caller, so that the VM powers off in good order, but with no closing line."""
    os.kill(os.getppid(), 9)
    time.sleep(1)
