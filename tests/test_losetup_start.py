"""How long the drop-in losetup takes to start: build scripts call it again and again."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

from conftest import ROOT, Daemon, require

ROUNDS = 20, 200
"""At least so many, and at most, while others keep the machine busy."""
MOST = 3.0
"""Times the bare start of the interpreter."""
PYTHON = "/usr/bin/python3"


def test_start_up(daemon: Daemon, tmp_path: Path, devices: Path) -> None:
    """The shortest of many runs, each beside one of its measure: load can only make a run longer."""
    require(os.access(PYTHON, os.X_OK), f"needs {PYTHON}")
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    losetup = str(ROOT / "loopd" / "losetup.py")
    environment = {"PATH": os.environ["PATH"], "LOOPD_SOCKET": daemon.path, "LOOPD_DIRECTORY": str(devices)}

    def seconds(*command: str) -> tuple[float, str]:
        start = time.perf_counter()
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        return time.perf_counter() - start, done.stdout.strip()

    bare, show = [], []
    ratio = MOST + 1
    for number in range(ROUNDS[1]):
        if number >= ROUNDS[0] and ratio <= MOST:
            break
        bare.append(seconds(PYTHON, "-I", "-S", "-c", "pass")[0])
        duration, device = seconds(losetup, "-f", "--show", str(image))
        show.append(duration)
        seconds(losetup, "-d", device)
        ratio = min(show) / min(bare)
    print(f"losetup -f --show: {min(show) * 1e3:.1f} ms, {ratio:.2f} times the bare interpreter")
    assert ratio <= MOST
