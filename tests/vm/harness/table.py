"""The table of docs/kernels.md, from the results of real runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from .machines import MACHINES
from .qemu import Together

HEAD = """\
# Kernels that loopd was tested on

Written by `make check-kernels` from the run itself; do not edit. Every machine is a Debian system in QEMU that runs the
tests of `tests/vm/inside`: the newest stable all of them, the others those that its kernel or systemd could change.

| machine | kernel | systemd | Python | passed | failed | skipped | no result |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""


def table(runs: Mapping[str, Together], before: str) -> str:
    """The page, with what `before`, the page as it was, says of machines that did not run now."""
    others = tuple(f"{mark}{name} " for name in MACHINES if name not in runs for mark in ("| ", "- "))
    kept = [line for line in before.splitlines() if line.startswith(others)]
    rows = [line for line in kept if line.startswith("| ")]
    notes = [line for line in kept if line.startswith("- ")]
    for name, run in runs.items():
        kernel, systemd, python = (run.hello.get(key, "?") for key in ("kernel", "systemd", "python"))
        count = Counter(result.outcome for result in run.results.values())
        lost = len(set(run.tests) - set(run.results))
        cells = (name, kernel, systemd, python, count["passed"], count["failed"], count["skipped"], lost)
        rows.append(f"| {' | '.join(map(str, cells))} |")
        notes += [
            f"- {name} ({kernel}), `{result.test}` {result.outcome}: {reason(result.text)}"
            for result in run.results.values()
            if result.outcome != "passed"
        ]
    return HEAD + "\n".join(sorted(rows)) + "\n" + ("\n## Not passed\n\n" + "\n".join(notes) + "\n" if notes else "")


def reason(text: str) -> str:
    """The one line of a failure's text that says most: pytest marks the error's own lines with E."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["?"]
    return next((line[1:].strip() for line in lines if line.startswith("E ")), lines[-1])
