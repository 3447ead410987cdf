"""docs/api.md: its examples work, and it has every public name."""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.daemon import ROOT, Daemon

import loopd
from loopd import loop
from loopd.client import api as client

PAGE = ROOT / "docs/api.md"


def public(kind: type) -> set[str]:
    ours = [base for base in kind.__mro__ if base.__module__.startswith("loopd.")]
    return {name for base in ours for name in vars(base) if not name.startswith("_")}


def named(text: str) -> set[str]:
    """The names in code within the text: of what is called, only what is called."""
    spans = re.findall(r"`([^`]+)`", text)
    return {name for span in spans for name in re.findall(r"^(?:\w+\.)*(\w+)", span)}


def part(title: str) -> str:
    """The text from a heading to the next one of its level."""
    text = re.sub(r"(?ms)^```.*?^```$", "", PAGE.read_text())
    level = re.search(rf"(?m)^(#+) {title}$", text)
    assert level
    return re.split(rf"(?m)^#{{1,{len(level[1])}}} ", text[level.end() :])[0]


def test_examples(daemon: Daemon, devices: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOOPD_SOCKET", daemon.path)
    monkeypatch.setenv("LOOPD_DIRECTORY", str(devices))
    blocks = re.findall(r"(?ms)^```python\n(.*?)^```$", PAGE.read_text())
    assert len(blocks) == PAGE.read_text().count("```") / 2
    test = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, "api.md", str(PAGE), 0)
    said: list[str] = []
    result = doctest.DocTestRunner().run(test, out=said.append)
    assert (result.failed, "".join(said)) == (0, "")
    assert result.attempted > 15
    assert os.listdir(devices) == []


def test_every_name_of_loopd() -> None:
    assert named(part("loopd")) >= set(loopd.__all__)


def test_every_name_of_loop() -> None:
    assert named(part(r"loopd\.loop")) >= set(loop.__all__)


@pytest.mark.parametrize("kind", [loop.Loop, loop.LoopControl, loop.LoopInfo])
def test_every_method_of_loop(kind: type) -> None:
    text = part(r"loopd\.loop")
    for name in public(kind):
        # The kernel's names are told by their beginnings.
        assert re.search(rf"\b{name}\b", text) or name.startswith(("lo_", "LOOP_")), name


def test_every_attribute_of_a_device(daemon: Daemon, image: int, devices: Path) -> None:
    with client.Client(daemon.path).attach(image, devices) as device:
        attributes = {name for name in vars(device) if not name.startswith("_")}
    assert named(part("Device")) >= attributes | public(client.Device)


def test_every_method_of_a_client() -> None:
    text = part("Functions")
    for name in public(client.Client):
        assert re.search(rf"\b{name}\b", text), name


def test_every_argument_of_attach() -> None:
    code = client.attach.__code__
    arguments = set(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])
    assert named(part("Functions")) | {"image", "directory"} >= arguments


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A sparse image of 64 MiB on a file system of 4 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4M", "loopd-test", folder], check=True)
    try:
        (folder / "disk.img").touch()
        os.truncate(folder / "disk.img", 64 << 20)
        yield folder / "disk.img"
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_full_below_a_sparse_image(
    daemon: Daemon, full: Path, devices: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOOPD_SOCKET", daemon.path)
    monkeypatch.setenv("LOOPD_DIRECTORY", str(devices))
    fill = ["dd", "if=/dev/urandom", "bs=1M", "count=16", "status=none"]
    with pytest.raises(loopd.ImageIncomplete) as end:
        with loopd.attach(full) as device:
            subprocess.run([*fill, f"of={device.path}"], check=True)
    assert end.value.released
    assert end.value.reason in str(end.value)
    device = loopd.attach(full, open_device=False)
    subprocess.run([*fill, f"of={device.path}"], check=True)
    with pytest.raises(loopd.ImageIncomplete):
        loopd.detach(device, wait=10)
    device.close()
    command = [sys.executable, "-m", "loopd.cli", "run", str(full), "--", *fill, "of={}"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "its image lacks what was written to it" in done.stderr
