"""The client in one file, bind-mounted into a container, as docs/packages.md has it."""

from __future__ import annotations

import re
from pathlib import Path

from host import run
from recipes import recipe

PROJECT = Path(__file__).parents[3]


def test_in_a_container() -> None:
    run("make", "-s", "-C", PROJECT, "zipapp")
    command = recipe("The client in a container", page="packages.md", IMAGE="--rootfs /srv/container:O")
    said = run("sh", "-euc", command, cwd=PROJECT)
    assert re.match(r"loopd \S+, protocol 1\n", said)
