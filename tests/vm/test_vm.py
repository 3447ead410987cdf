"""Every test of `inside/`, on every machine that was asked for."""

from __future__ import annotations

import os

import pytest
from harness import qemu


def test_inside(vm: qemu.Together, machine: str, test: str, request: pytest.FixtureRequest) -> None:
    try:
        result = vm.result(test)
    except qemu.RunFailed as failure:
        pytest.fail(str(failure), pytrace=False)
    if result.outcome == "failed":
        request.node.add_report_section("call", "journal of the VM", result.journal)
        pytest.fail(result.text, pytrace=False)
    if result.outcome == "skipped" and os.environ.get("LOOPD_TEST_REQUIRE_ALL") != "1":
        pytest.skip(result.text)
    assert result.outcome == "passed", result.text
