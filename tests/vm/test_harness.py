"""The harness reports what went wrong, however it did: a run that says nothing never looks like one that passed."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from harness import image, qemu
from harness.machines import IMAGES, MACHINES

HERE = Path(__file__).parent
SAMPLE = "tests/vm/sample"


@pytest.fixture
def any_machine(request: pytest.FixtureRequest) -> str:
    name: str = request.config.getoption("--vm-machines").split(",")[0]
    return name


def sample(*names: str) -> list[str]:
    return [f"test_sample.py::{name}" for name in names]


@pytest.mark.exhaustive
def test_outcomes(any_machine: str, tmp_path: Path) -> None:
    """Through pytest, as `make check-vm` does it: each outcome arrives as it was, an early end fails the rest."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/vm/test_vm.py",
        f"--vm-machines={any_machine}",
        f"--vm-folder={SAMPLE}",
    ]
    command += ["-p", "no:cacheprovider", f"--basetemp={tmp_path}/base", f"--junitxml={tmp_path}/junit.xml"]
    command += ["-k", "not hangs and not closing"]
    environment = {**os.environ, "LOOPD_TEST_REQUIRE_ALL": "0"}
    done = subprocess.run(command, check=False, cwd=qemu.PROJECT, env=environment, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 1, done.stdout
    ends: dict[str, tuple[str, str]] = {}
    for case in ET.parse(tmp_path / "junit.xml").iter("testcase"):
        name = case.attrib["name"].partition("::")[2].removesuffix("]")
        verdict = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        text = "".join(case.itertext()) + (verdict.attrib.get("message", "") if verdict is not None else "")
        ends[name] = ("passed" if verdict is None else verdict.tag, text)
    assert {name: end for name, (end, _) in ends.items()} == {
        "test_passes": "passed",
        "test_fails": "failure",
        "test_skips": "skipped",
        "test_parameter[one]": "passed",
        "test_parameter[two words]": "passed",
        r"test_parameter[k\\xe4se]": "passed",
        "test_cleanup_fails": "failure",
        "test_deadline": "failure",
        "test_power_failure": "failure",
        "test_after_the_end": "failure",
    }, done.stdout
    assert "a reason to fail" in ends["test_fails"][1]
    assert "a line for the journal" in ends["test_fails"][1]
    assert "a reason to skip" in ends["test_skips"][1]
    assert "the cleanup failed" in ends["test_cleanup_fails"][1]
    assert "deadline" in ends["test_deadline"][1]
    assert "before its closing line" in ends["test_power_failure"][1]
    assert "before its closing line" in ends["test_after_the_end"][1]


PLANS = {
    "hang": qemu.Plan(sample("test_passes", "test_hangs", "test_after_the_end"), SAMPLE, (), silence_deadline=60),
    "no closing line": qemu.Plan(sample("test_passes", "test_no_closing_line"), SAMPLE, ()),
    "failed install": qemu.Plan(sample("test_passes"), SAMPLE, ("echo first", "echo second; exit 3", "echo third")),
}


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, qemu.Run]]:
    """A VM for each plan, all at once: one keeps one core busy."""
    machine: str = request.config.getoption("--vm-machines").split(",")[0]
    with contextlib.ExitStack() as stack:
        yield {
            name: stack.enter_context(qemu.run(machine, tmp_path_factory.mktemp("harness"), plan))
            for name, plan in PLANS.items()
        }


@pytest.mark.exhaustive
def test_hang(runs: dict[str, qemu.Run]) -> None:
    run = runs["hang"]
    assert run.result("test_sample.py::test_passes").outcome == "passed"
    with pytest.raises(qemu.RunFailed, match=r"silent for 60 s(.|\n)*begin test_sample.py::test_hangs"):
        run.result("test_sample.py::test_hangs")
    assert run.qemu.poll() is not None, "the VM still runs"
    with pytest.raises(qemu.RunFailed, match="silent"):
        run.result("test_sample.py::test_after_the_end")


@pytest.mark.exhaustive
def test_no_closing_line(runs: dict[str, qemu.Run]) -> None:
    """Every test has its result and the VM powers off in good order, but the last word is missing."""
    run = runs["no closing line"]
    assert run.result("test_sample.py::test_passes").outcome == "passed"
    with pytest.raises(qemu.RunFailed, match="before its closing line"):
        run.finish()


@pytest.mark.exhaustive
def test_failed_install(runs: dict[str, qemu.Run]) -> None:
    with pytest.raises(
        qemu.RunFailed, match=r"could not be installed(.|\n)*first\n(.|\n)*second\nexit status 3\n---"
    ):
        runs["failed install"].result("test_sample.py::test_passes")


def test_a_change_makes_a_new_image() -> None:
    keys = {image.digest(spec) for spec in IMAGES.values()}
    assert len(keys) == len(IMAGES)
    assert all(machine.image in IMAGES for machine in MACHINES.values())
