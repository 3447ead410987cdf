"""The client in one file, bind-mounted into a container, as docs/packages.md has it."""

from __future__ import annotations

import re
from pathlib import Path

from host import run

PROJECT = Path(__file__).parents[3]


def test_in_a_container() -> None:
    run("make", "-s", "-C", PROJECT, "zipapp")
    page = (PROJECT / "docs/packages.md").read_text()
    (command,) = re.findall(r"(?ms)^```sh\n(podman .*?)^```", page)
    said = run("sh", "-euc", command.replace("IMAGE", "--rootfs /srv/container:O"), cwd=PROJECT)
    assert re.match(r"loopd \S+, protocol 1\n", said)
