"""Fixtures: a real daemon under real socket activation, backing files, and directories for nodes."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.daemon import Daemon, configured, require

# Both are ignored in the background of a script, and would be by what the tests run.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)

REQUIRE_ALL = os.environ.get("LOOPD_TEST_REQUIRE_ALL") == "1"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """With LOOPD_TEST_REQUIRE_ALL=1 a test that skips has failed: CI must not test nothing."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if REQUIRE_ALL and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"LOOPD_TEST_REQUIRE_ALL is set, and this was skipped: {report.longrepr}"


@pytest.fixture
def start_daemon(tmp_path: Path) -> Iterator[Callable[..., Daemon]]:
    """Start daemons with options of the test's choice; each is ended and looked over afterwards."""
    require(os.geteuid() == 0, "needs root: loop devices")
    require(os.path.exists("/dev/loop-control"), "needs /dev/loop-control")
    started: list[Daemon] = []

    def start(
        *options: str, name: str = "loopd", wrapper: list[str] | None = None, environment: dict[str, str] | None = None,
        launcher: tuple[str, ...] = (), policy: str = "",
    ) -> Daemon:  # fmt: skip
        directory = tmp_path / name
        directory.mkdir(exist_ok=True)
        daemon = Daemon(directory, [*options, *configured(directory, policy)], wrapper or [], environment or {})
        daemon.launcher = list(launcher)
        daemon.start()
        started.append(daemon)
        return daemon

    with contextlib.ExitStack() as stack:
        yield start
        for daemon in started:
            stack.callback(daemon.stop)


@pytest.fixture
def daemon(start_daemon: Callable[..., Daemon]) -> Daemon:
    """One daemon with the defaults."""
    return start_daemon()


@pytest.fixture
def make_image(tmp_path: Path) -> Iterator[Callable[..., int]]:
    """Make backing files; their open fds (O_RDWR unless told) are closed at the end."""
    fds: list[int] = []

    def make(size: int = 1 << 20, name: str = "image", flags: int = os.O_RDWR) -> int:
        path = tmp_path / name
        if not path.exists():
            path.write_bytes(b"")
            os.truncate(path, size)
        fds.append(os.open(path, flags | os.O_CLOEXEC))
        return fds[-1]

    yield make
    for fd in fds:
        os.close(fd)


@pytest.fixture
def image(make_image: Callable[..., int]) -> int:
    """A sparse backing file of 1 MiB, open for reading and writing."""
    return make_image()


@pytest.fixture
def devices(tmp_path: Path) -> Path:
    """A directory for nodes."""
    path = tmp_path / "dev"
    path.mkdir()
    return path


@pytest.fixture
def directory(devices: Path) -> Iterator[int]:
    """The directory for nodes, open."""
    fd = os.open(devices, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    yield fd
    os.close(fd)
