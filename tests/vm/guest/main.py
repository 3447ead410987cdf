"""The guest's side of a run: installs loopd, runs the chosen tests, says how each ended.

Everything goes out through two virtio ports: `loopd.results` takes one JSON object a line (see `report`),
`loopd.journal` the journal as it grows, so that there is something to read after a run that hung. The last line is
`{"event": "end", …}`: without it the host fails the run. What is to be done is in `run.json` beside the project's
files.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PROJECT = Path("/srv/loopd")
PORTS = Path("/dev/virtio-ports")


class Port:
    def __init__(self, name: str) -> None:
        deadline = time.monotonic() + 60
        while not (PORTS / name).exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"no virtio port {name}: is virtio_console loaded?")
            time.sleep(0.2)
        self.fd = os.open(PORTS / name, os.O_WRONLY | os.O_CLOEXEC)

    def say(self, event: str, **fields: Any) -> None:
        line = json.dumps({"event": event, **fields}).encode() + b"\n"
        while line:
            line = line[os.write(self.fd, line) :]


def install(steps: list[str]) -> str:
    """Run the steps one by one; the returned log ends with the one that failed, or is empty if none did."""
    log = ""
    for step in steps:
        done = subprocess.run(
            step,
            check=False,
            shell=True,
            cwd=PROJECT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        log += f"# {step}\n{done.stdout.decode(errors='replace')}"
        if done.returncode != 0:
            return f"{log}exit status {done.returncode}\n"
    return ""


def main() -> int:
    run = json.loads((PROJECT / "run.json").read_text())
    results, journal = Port("loopd.results"), Port("loopd.journal")
    subprocess.Popen(
        ["journalctl", "--follow", "--lines=all", "--output=short-monotonic", "--no-hostname", "--boot"],
        stdin=subprocess.DEVNULL,
        stdout=journal.fd,
    )
    release = subprocess.run(["systemctl", "--version"], stdout=subprocess.PIPE, check=True).stdout.split()[1]
    results.say(
        "hello",
        kernel=os.uname().release,
        systemd=release.decode(),
        python=sys.version.split()[0],
        uptime=time.monotonic(),
    )
    failure = install(run["install"])
    results.say("installed", failure=failure, uptime=time.monotonic())
    status = -1
    if not failure and run["tests"]:
        environment = {
            **os.environ,
            "LOOPD_VM_RESULTS": str(results.fd),
            "LOOPD_TEST_REQUIRE_ALL": run["require_all"],
            "PYTHONPATH": str(PROJECT / "tests/vm/guest"),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        # The project's own settings and conftest.py are for the machine's tests; these start with a clean slate.
        command = [
            "/usr/bin/python3",
            "-m",
            "pytest",
            "-p",
            "report",
            "-p",
            "no:cacheprovider",
            "-c",
            "/dev/null",
            "-q",
        ]
        folder = PROJECT / run["folder"]
        command += [f"--rootdir={folder}", f"--confcutdir={folder}", f"--deadline={run['deadline']}"]
        status = subprocess.run(
            [*command, *run["tests"]],
            check=False,
            cwd=folder,
            env=environment,
            pass_fds=[results.fd],
            stdin=subprocess.DEVNULL,
        ).returncode
    results.say("end", status=status, uptime=time.monotonic())
    return 0


if __name__ == "__main__":
    sys.exit(main())
