"""The table of docs/kernels.md, from the results of real runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from .qemu import Run

HEAD = """\
# Kernels that loopd was tested on

Written by `make check-kernels` from the run itself; do not edit. Every machine is a Debian system in QEMU that runs all tests of
`tests/vm/inside`.

| kernel | systemd | Python | passed | failed | skipped | no result |
| --- | --- | --- | --- | --- | --- | --- |
"""


def table(runs: Mapping[str, Run]) -> str:
    rows, notes = [], []
    for name, run in runs.items():
        count = Counter(result.outcome for result in run.results.values())
        lost = len(set(run.plan.tests) - set(run.results))
        figures = f"{count['passed']} | {count['failed']} | {count['skipped']} | {lost}"
        rows.append(
            f"| {run.hello.get('kernel', name)} | {run.hello.get('systemd', '?')} | {run.hello.get('python', '?')} | {figures} |"
        )
        for result in run.results.values():
            if result.outcome != "passed":
                first = (result.text.strip() or "?").splitlines()[-1]
                notes.append(f"- {run.hello.get('kernel', name)}, `{result.test}` {result.outcome}: {first}")
    return HEAD + "\n".join(rows) + "\n" + ("\n## Not passed\n\n" + "\n".join(notes) + "\n" if notes else "")
