"""A pytest plugin: a JSON line for each test that starts and ends, marks in the journal around it, a deadline for it.

{"event": "start", "test": ID}
{"event": "result", "test": ID, "outcome": "passed" | "failed" | "skipped", "text": …, "duration": seconds}
"""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator
from typing import Any

import pytest

RESULTS = int(os.environ["LOOPD_VM_RESULTS"])
JOURNAL = "/run/systemd/journal/socket"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--deadline", type=int, default=120, help="seconds a test may take, where it has no mark of its own"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "deadline(seconds): how long this test may take")
    for name in ("exhaustive", "sample"):
        config.addinivalue_line("markers", f"{name}: which tests the host selects (tests/support/sampling.py)")


def say(event: str, **fields: Any) -> None:
    line = json.dumps({"event": event, **fields}).encode() + b"\n"
    while line:
        line = line[os.write(RESULTS, line) :]


def mark(text: str) -> None:
    """Write TEXT to the journal; the host cuts the journal of one test out of the stream by it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.sendto(f"SYSLOG_IDENTIFIER=loopd-vm\nPRIORITY=6\nMESSAGE={text}\n".encode(), JOURNAL)


def too_late(signum: int, frame: object) -> None:
    raise TimeoutError("this test's deadline has passed")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    say("start", test=item.nodeid)
    mark(f"begin {item.nodeid}")
    own = item.get_closest_marker("deadline")
    signal.signal(signal.SIGALRM, too_late)
    signal.alarm(own.args[0] if own else item.config.getoption("--deadline"))
    item.stash[REPORTS] = []
    yield
    signal.alarm(0)
    mark(f"end {item.nodeid}")
    reports = item.stash[REPORTS]
    outcome = next((o for o in ("failed", "skipped", "passed") if any(r.outcome == o for r in reports)), "failed")
    text = "\n".join(text_of(r) for r in reports if r.outcome == outcome != "passed") or (
        "" if reports else "no report"
    )
    say("result", test=item.nodeid, outcome=outcome, text=text, duration=sum(r.duration for r in reports))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome: Any = yield
    item.stash[REPORTS].append(outcome.get_result())


def text_of(report: pytest.TestReport) -> str:
    if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    captured = "".join(f"\n--- {name} ---\n{content}" for name, content in report.sections if content)
    return f"[{report.when}] {report.longreprtext}{captured}"


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        say("uncollected", test=report.nodeid, text=report.longreprtext)


REPORTS = pytest.StashKey[list[pytest.TestReport]]()
