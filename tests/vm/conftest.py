"""Collection of the VM's tests, and the VMs themselves.

The tests below `inside/` are collected on the host to know what is expected, and run in the VM; each is a test of its
own on the host: `test_inside[MACHINE-FILE::TEST]`. A VM boots when its first test starts, and runs exactly the tests
that were selected on the host, in that order. Which machines: `--vm-machines` (none by default, so that the machine's
own tests do not need QEMU).
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from harness import qemu, table  # noqa: E402 - the folder has to be on the path first
from harness.machines import MACHINES  # noqa: E402

RUNS = pytest.StashKey[dict[str, qemu.Together]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--vm-machines", default="", metavar="NAME,…", help="run the VM tests on these machines")
    parser.addoption(
        "--vm-folder", default=qemu.INSIDE, help="the tests to run; others than the default go without loopd"
    )
    parser.addoption("--vm-table", default="", metavar="FILE", help="write the results as a table to FILE")


def machines(config: pytest.Config) -> list[str]:
    return [name for name in config.getoption("--vm-machines", "").split(",") if name]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if collection_path in (HERE / "inside", HERE / "sample"):
        return True
    return True if collection_path.parent == HERE and not machines(config) else None


def inside_tests(folder: str, *options: str) -> list[str]:
    """The node ids below FOLDER, as the VM will know them."""
    path = qemu.PROJECT / folder
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "-c", "/dev/null"]
    command += ["-p", "report", "-p", "support.sampling", f"--rootdir={path}", f"--confcutdir={path}", *options, "."]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{HERE}/guest:{HERE.parent}",
        "LOOPD_VM_RESULTS": "2",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        command, check=False, cwd=path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    tests = [line for line in done.stdout.splitlines() if "::" in line]
    if done.returncode != 0 or not tests:
        raise pytest.UsageError(f"the tests in {folder} cannot be collected:\n{done.stdout}")
    return tests


def file_of(test: str) -> str:
    return test.partition("::")[0].removeprefix("test_").removesuffix(".py")


def concerns(machine: str, test: str) -> bool:
    return file_of(test) not in MACHINES[machine].leave_out


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"machine", "test"} <= set(metafunc.fixturenames):
        folder = metafunc.config.getoption("--vm-folder")
        sample = set(inside_tests(folder, "-m", "not exhaustive"))
        pairs = [
            pytest.param(name, test, id=f"{name}-{test}", marks=() if test in sample else pytest.mark.exhaustive)
            for name in machines(metafunc.config)
            for test in inside_tests(folder)
            if concerns(name, test)
        ]
        metafunc.parametrize("machine, test", pairs, scope="session")


@pytest.fixture(scope="session")
def vm(
    machine: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[qemu.Together]:
    """The machine, running those of its tests that are selected on the host."""
    calls = [getattr(item, "callspec", None) for item in request.session.items]
    tests = [call.params["test"] for call in calls if call and call.params.get("machine") == machine]
    shares = [
        [test for test in tests if (file_of(test) in MACHINES[machine].aside) == aside] for aside in (False, True)
    ]
    folder = request.config.getoption("--vm-folder")
    install = qemu.INSTALL if folder == qemu.INSIDE else ()
    with contextlib.ExitStack() as stack:
        runs = [
            stack.enter_context(
                qemu.run(machine, tmp_path_factory.mktemp(f"vm-{machine}"), qemu.Plan(share, folder, install))
            )
            for share in shares
            if share
        ]
        together = qemu.Together(runs)
        request.config.stash.setdefault(RUNS, {})[machine] = together
        yield together
        together.finish()


def pytest_sessionfinish(session: pytest.Session) -> None:
    path, runs = session.config.getoption("--vm-table", ""), session.config.stash.get(RUNS, {})
    if path and runs:
        page = Path(path)
        page.write_text(table.table(runs, page.read_text() if page.exists() else ""))
