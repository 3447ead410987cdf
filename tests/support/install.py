"""`make install` into a folder of the test's."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from support.daemon import ROOT

SYSTEM_PYTHON = "/usr/bin/python3"
PLUGIN_MODULES = {f"usr/lib/loopd/{path.relative_to(ROOT)}" for path in (ROOT / "loopd/deviceplugin").glob("*.py")}
PLUGIN_PAGE = "usr/share/man/man8/loopd-device-plugin.8"


def make(*arguments: str, env: dict[str, str] | None = None, umask: int = -1) -> subprocess.CompletedProcess[str]:
    # MAKEFLAGS of a `make check` around it would override the variables given here.
    return subprocess.run(
        ["/usr/bin/make", "-s", "-C", str(ROOT), *arguments],
        check=False,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=os.environ | {"MAKEFLAGS": ""} | (env or {}),
        umask=umask,
    )


def install(*arguments: str, umask: int = -1) -> None:
    done = make("install", *arguments, umask=umask)
    prefixes = [argument.partition("=")[2] for argument in arguments if argument.startswith("PREFIX=")]
    said = "".join(no_import(prefix) for prefix in prefixes if prefix != "/usr")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", said)


def no_import(prefix: str | Path) -> str:
    """What is said where the system's Python has no folder for modules."""
    return f"make: 'import loopd' is left out: {SYSTEM_PYTHON} looks for modules nowhere below {prefix}\n"


@pytest.fixture(name="prefix")
def prefix_fixture(tmp_path: Path) -> Path:
    """A prefix that the installed programs really run from; DESTDIR=/ keeps the running system out of it."""
    install("DESTDIR=/", f"PREFIX={tmp_path}/prefix")
    return tmp_path / "prefix"


def files(tree: Path) -> set[str]:
    return {str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_symlink() or not path.is_dir()}


def imported(prepare: str) -> str:
    """The folder where the system's Python finds `loopd`, in a mount namespace with what was installed."""
    if os.geteuid() != 0:
        pytest.skip("needs root: a mount namespace")
    show = "import loopd, loopd.loop, os; loopd.attach; print(os.path.dirname(os.path.dirname(loopd.__file__)), end='')"
    script = f'{prepare}; cd /; exec {SYSTEM_PYTHON} -IBc "{show}"'
    return subprocess.check_output(["unshare", "--mount", "sh", "-ec", script], text=True)
