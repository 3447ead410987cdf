"""Many clients at once, beside the host's own losetup: no error, nothing handed out twice, nothing left."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

from support.daemon import Daemon, bound_to, eventually, exists
from support.processes import Child, become
from support.untouched import LONG_QUEUE

import loopd
from loopd.loop import Loop

ATTACHES = 30
FIRST_UID = 20000
HELD = 3
"""Devices that a client holds at once, so that most are handed out while others are in use."""


class Use(NamedTuple):
    """A device as a client had it, from its reply to its request to detach (CLOCK_MONOTONIC, seconds)."""

    uid: int
    devname: str
    diskseq: int
    start: float
    end: float


def client(
    daemon: Daemon, directory: int, number: int, uid: int, deliver: Literal["node", "fd"]
) -> Callable[[Callable[[Any], None]], None]:
    """A user that attaches an image of its own again and again, and looks each time whether that is what it got."""
    mark = os.urandom(32)

    def attached(image: int) -> tuple[loopd.Device, float]:
        device = loopd.attach(image, directory, deliver=[deliver], socket="loopd/loopd.sock")
        now = time.monotonic()
        checked(device, image)
        os.pwrite(device.fd, device.devname.encode().ljust(512), 512)
        return device, now

    def checked(device: loopd.Device, image: int) -> None:
        assert os.pread(device.fd, len(mark), 0) == mark
        with Loop.from_fd(os.dup(device.fd)) as loop:
            assert loop.is_bound_to(image)
            assert loop.diskseq() == device.diskseq

    def body(tell: Callable[[Any], None]) -> None:
        os.chdir(daemon.directory.parent)
        image = os.open(f"images/{number}", os.O_RDWR | os.O_CREAT | os.O_EXCL)
        os.write(image, mark)
        os.truncate(image, 1 << 20)
        become(uid)
        held: deque[tuple[loopd.Device, float]] = deque()
        uses = []

        def detach() -> None:
            device, start = held.popleft()
            checked(device, image)
            os.fsync(device.fd)
            uses.append(Use(uid, device.devname, device.diskseq or 0, start, time.monotonic()))
            assert device.detach()

        tell("ready")
        for _ in range(ATTACHES):
            held.append(attached(image))
            if len(held) == HELD:
                detach()
        while held:
            detach()
        assert os.pread(image, 512, 512).rstrip().startswith(b"loop")
        tell(uses)

    return body


def losetup(directory: Path) -> Callable[[Callable[[Any], None]], None]:
    """The host at work with an image of its own, until `stop` is there."""
    image = directory / "host"

    def command(*arguments: str) -> str:
        return subprocess.run(["losetup", *arguments], check=True, capture_output=True, text=True).stdout.strip()

    def body(tell: Callable[[Any], None]) -> None:
        image.write_bytes(b"the host's".ljust(1 << 20, b"\0"))
        tell("ready")
        names = []
        while not (directory / "stop").exists():
            assert command("--find").startswith("/dev/loop")
            path = command("--find", "--show", str(image))
            names.append(os.path.basename(path))
            try:
                assert (Path("/sys/block") / names[-1] / "loop/backing_file").read_text() == f"{image}\n"
                assert Path(path).read_bytes()[:10] == b"the host's"
            finally:
                command("--detach", path)
            time.sleep(0.01)
        tell(names)

    return body


def crowd(
    stack: contextlib.ExitStack, daemon: Daemon, size: int, users: int, deliver: Literal["node", "fd"], directory: int
) -> list[Child]:
    """Clients that are ready, as so many users, in a directory that is open to all."""
    (daemon.directory.parent / "images").mkdir()
    daemon.directory.parent.chmod(0o711)
    os.fchmod(directory, 0o1777)
    os.chmod(daemon.path, 0o666)
    bodies = [client(daemon, directory, number, FIRST_UID + number % users, deliver) for number in range(size)]
    running = [stack.enter_context(Child(body, keep=[directory])) for body in bodies]
    assert [child.hear() for child in running] == ["ready"] * size
    return running


def check(uses: list[Use]) -> None:
    """Nothing was handed out twice."""
    assert len({use.diskseq for use in uses}) == len(uses)
    by_name: dict[str, list[Use]] = {}
    for use in sorted(uses, key=lambda use: use.start):
        by_name.setdefault(use.devname, []).append(use)
    for same in by_name.values():
        assert len({use.uid for use in same}) == 1, "a number that one user had went to another"
        assert all(before.end <= after.start for before, after in pairwise(same)), "two had it at once"


def storm(
    daemon: Daemon, size: int, users: int, deliver: Literal["node", "fd"], directory: int, devices: Path, tmp_path: Path
) -> None:
    with contextlib.ExitStack() as stack:
        host = stack.enter_context(Child(losetup(tmp_path)))
        assert host.hear() == "ready"
        running = crowd(stack, daemon, size, users, deliver, directory)
        uses = [Use(*use) for child in running for use in child.hear()]
        (tmp_path / "stop").touch()
        hosts = host.hear()
    assert len(uses) == size * ATTACHES
    assert hosts
    check(uses)
    assert list(devices.iterdir()) == []
    assert not bound_to(tmp_path)
    eventually(lambda: not [use for use in uses if exists(use.devname)], "every number is removed", 30)
    # Nobody but its client had any of them open, so none was found held at its detach.
    events = Counter(record["LOOPD_EVENT"] for record in daemon.records())
    del events["warned"], events["foreign"]  # what others do on this machine, but for
    assert not [record for record in daemon.records("foreign") if str(tmp_path) in record["LOOPD_BACKING_FILE"]]
    assert events == {"attached": len(uses), "detached": len(uses)}


def test_32_clients_and_the_hosts_losetup(daemon: Daemon, directory: int, devices: Path, tmp_path: Path) -> None:
    storm(daemon, 32, 1, "node", directory, devices, tmp_path)


def test_8_clients_that_get_an_open_fd(daemon: Daemon, directory: int, devices: Path, tmp_path: Path) -> None:
    storm(daemon, 8, 4, "fd", directory, devices, tmp_path)


def test_clients_that_are_killed_in_a_crowd(daemon: Daemon, directory: int, devices: Path, tmp_path: Path) -> None:
    """Half of them end in the middle, with what they hold; the others notice nothing."""
    with contextlib.ExitStack() as stack:
        running = crowd(stack, daemon, 12, 4, "node", directory)
        for child in running[::2]:
            child.kill()
        uses = [Use(*use) for child in running[1::2] for use in child.hear()]
        assert len(uses) == 6 * ATTACHES
        check(uses)
        eventually(lambda: not bound_to(tmp_path), "every file is free", 5)
    assert list(devices.iterdir()) == []
    assert daemon.hello().code is None


def test_more_requests_at_once_than_an_account_may_have(
    start_daemon: Callable[..., Daemon], directory: int, tmp_path: Path
) -> None:
    """Threads of one process: what is dropped is sent again, and comes to nothing lost but time."""
    config = tmp_path / "loopd.toml"
    config.write_text("[limits]\nrequests = 2\n")
    daemon = start_daemon(f"--config={config}", launcher=LONG_QUEUE)
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))

    def use(_: int) -> int:
        with loopd.attach(image, directory, socket=daemon.path) as device:
            return device.diskseq or 0

    with ThreadPoolExecutor(32) as pool:
        seen = list(pool.map(use, range(96)))
    assert len(set(seen)) == len(seen)
    eventually(lambda: daemon.records("shed"), "there were more than it may have")
