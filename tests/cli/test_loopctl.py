"""``loopctl`` with a real daemon: files by the names that they have now, and what a person reads."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.daemon import eventually, require
from test_deliveries import MIB, UID, World, world

import loopd

__all__ = ["world"]  # a fixture


@pytest.fixture
def grant(world: World) -> str:
    """The directory that a container of the user's would have at /dev/loopd."""
    path = world.environment["LOOPD_DIRECTORY"] = str(world.grant("build"))
    return path


def attached(world: World, name: str = "disk.img", *options: str) -> str:
    """Attach an image of that name; the device's name."""
    return os.path.basename(world.ctl("attach", *options, world.image(name), uid=UID).stdout.rstrip("\n"))


def rows(world: World, *options: str, uid: int = UID) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(world.ctl(*options, "list", "--json", uid=uid).stdout)["leases"]
    return found


# The file, by the name that it has now ----------------------------------------------------------------------


def test_the_file_is_listed_by_its_present_name(world: World, grant: str) -> None:
    device = attached(world)
    old, new = world.work / "disk.img", world.work / "new \u00f1.img"

    def shown() -> tuple[str, str]:
        """As the kernel has it, and the admin's list; the user's list and the library agree with it."""
        (row,) = rows(world)
        kernels = Path(f"/sys/block/{device}/loop/backing_file").read_text()[:-1]
        (of_all,) = rows(world, "--socket", world.daemon.admin, uid=0)
        (of_library,) = loopd.list(socket=world.daemon.admin)
        assert row["backing_file"] == of_all["backing_file"] == of_library.backing_file == kernels
        assert row["backing_file_at_attach"] == of_library.backing_file_at_attach == str(old)
        assert world.ctl("list", uid=UID).stdout.splitlines()[-1].endswith(f"  {kernels}")
        return row["backing_file"], row["state"]

    assert shown() == (str(old), "bound")
    old.rename(new)
    assert shown() == (str(new), "bound")
    new.unlink()
    assert shown() == (f"{new} (deleted)", "bound")
    old.touch()
    assert shown() == (f"{new} (deleted)", "bound")


def test_a_list_where_there_is_no_sysfs(world: World, grant: str) -> None:
    attached(world)
    (world.work / "disk.img").rename(world.work / "new.img")
    hidden = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs none /sys && exec "$@"', "sh"]
    done = world.run([*hidden, "loopctl", "--socket", world.daemon.admin, "list", "--json"])
    assert json.loads(done.stdout)["leases"][0]["backing_file"] == str(world.work / "disk.img")


@pytest.mark.parametrize("relative", [False, True])
def test_detach_by_the_image(world: World, grant: str, relative: bool) -> None:
    """By what the file is, not by what it was called."""
    attached(world)
    attached(world, "disk.img", "--offset", str(MIB))
    kept = attached(world, "kept.img")
    (world.work / "disk.img").rename(world.work / "new.img")
    world.image("disk.img")
    for _ in range(2):
        done = world.ctl("detach", "disk.img" if relative else world.work / "disk.img", uid=UID, check=False)
        assert (done.returncode, "is the image of no device here" in done.stderr) == (1, True)
    assert len(rows(world)) == 3
    (world.work / "link").symlink_to("new.img")
    assert world.ctl("detach", "link" if relative else world.work / "new.img", uid=UID).stdout == ""
    assert [row["devname"] for row in rows(world)] == [kept]


def test_detach_by_the_name_of_an_image_that_is_gone(world: World, grant: str) -> None:
    first, second = attached(world, "first.img"), attached(world, "second.img")
    (world.work / "first.img").rename(world.work / "third.img")
    (world.work / "third.img").unlink()
    (world.work / "second.img").unlink()
    assert world.ctl("detach", "first.img", uid=UID, check=False).returncode == 1  # it had another name last
    assert world.ctl("detach", "second.img", uid=UID).stderr == ""
    assert [row["devname"] for row in rows(world)] == [first]
    assert world.ctl("detach", f"{world.work}/third.img (deleted)", uid=UID).stderr == ""
    assert rows(world) == []
    assert second != first


def test_detach_by_an_image_that_is_named_as_a_device(world: World, grant: str) -> None:
    device = attached(world)
    image = world.work / device
    image.touch()
    done = world.ctl("detach", f"./{device}", uid=UID, check=False)
    assert "is the image of no device here" in done.stderr
    assert world.ctl("detach", device, uid=UID).stderr == ""
    assert rows(world) == []


def test_detach_of_anothers_image_by_the_administrator(world: World, grant: str) -> None:
    attached(world)
    admin = ["--socket", world.daemon.admin, "detach"]
    done = world.ctl(*admin, "disk.img", check=False, LOOPD_DIRECTORY="/nonexistent")
    assert (done.returncode, "--force ends it too" in done.stderr) == (1, True)
    assert world.ctl(*admin, "--force", "disk.img").stderr == ""
    assert rows(world) == []


# Whose device it is -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["{device}", "{node}", "{work}/flat/{device}", "/dev/{device}"])
def test_a_device_is_found_by_any_of_its_names_without_a_refusal(world: World, grant: str, name: str) -> None:
    """One of the container's directory; the journal of the host has no word of what was not asked for."""
    device = attached(world, "disk.img", "--partscan")
    (world.work / "flat").mkdir()
    (world.work / "flat" / device).symlink_to(f"{grant}/{device}")
    text = name.format(device=device, node=f"{grant}/{device}", work=world.work)
    os.truncate(world.work / "disk.img", 2 * MIB)
    assert world.ctl("resize", text, uid=UID).stdout == f"{2 * MIB}\n"
    assert world.ctl("rescan", text, uid=UID).stderr == ""
    with open(f"{grant}/{device}", "rb"):
        held = world.ctl("detach", "--wait=0", text, uid=UID, check=False)
        assert f"{text} is detached, but somebody still has it open" in held.stderr
        assert world.ctl("detach", "--wait=0", text, uid=UID, check=False).stderr == held.stderr  # its node is gone
    assert world.daemon.records("refused") == []


def test_a_device_of_this_users_is_found_where_a_directory_is_bound_in(world: World, grant: str) -> None:
    own = world.work / "own"
    own.mkdir()
    os.chown(own, UID, UID)
    for name in ("{}", f"{own}/{{}}", f"{grant}/{{}}"):
        device = attached(world, "disk.img", "-d", str(own))
        assert world.ctl("detach", name.format(device), uid=UID).stderr == ""
    assert world.daemon.records("refused") == []


def test_a_device_that_there_is_not_is_refused_once(world: World, grant: str) -> None:
    done = world.ctl("detach", "loop1", f"{grant}/loop1", uid=UID, check=False)
    assert (done.returncode, done.stderr.count("no device loop1 of yours")) == (1, 2)
    assert len(world.daemon.records("refused")) == 2


# A signal in the middle of an attach ------------------------------------------------------------------------


class Named:
    """The names that attaches have printed, and those of the attaches that succeeded."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._printed: set[str] = set()
        self._kept: set[str] = set()

    def add(self, out: str, status: int) -> None:
        if out:
            name = os.path.basename(out.rstrip("\n"))
            assert re.fullmatch(r"loop\d+", name)
            self._printed.add(name)
            if status == 0:
                self._kept.add(name)
        assert out or status != 0

    def check(self) -> None:
        """A signal that comes when the name is out may leave the device, and none that succeeded is gone."""
        eventually(lambda: self._kept <= self._left() <= self._printed, "every device that is left has a name")

    def _left(self) -> set[str]:
        return {row["devname"] for row in rows(self._world, uid=0)}


@pytest.fixture
def named(world: World, grant: str) -> Iterator[Named]:
    world.image()
    yield Named(world)
    world.ctl("detach", "--all", "--wait=10")


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("call", "socketpair sendmsg poll recvmsg openat write close rt_sigaction".split())
def test_a_signal_at_any_step_leaves_no_device_without_a_name(
    world: World, named: Named, call: str, number: str
) -> None:
    """It comes when the system call begins, the last of its kind, the one before that, and so on."""
    require(shutil.which("strace"), "needs strace")
    traced = ["strace", "-qq", "-o", f"{world.work}/trace", "-e", f"trace={call}"]
    done = world.run([*traced, "loopctl", "attach", "disk.img"])
    named.add(done.stdout, done.returncode)
    calls = len((world.work / "trace").read_text().splitlines())
    assert calls
    for when in range(calls, max(0, calls - 12), -1):
        inject = ["-e", f"inject={call}:signal={number}:when={when}"]
        done = world.run([*traced, *inject, "loopctl", "attach", "disk.img"], check=False)
        named.add(done.stdout, done.returncode)
        named.check()


def test_signals_at_random_leave_no_device_without_a_name(world: World, named: Named) -> None:
    chance = random.Random(7)
    for _ in range(40):
        command = ["loopctl", "attach", "disk.img"]
        options: dict[str, Any] = {"cwd": world.work, "env": world.environment, "text": True}
        with subprocess.Popen(command, stdout=subprocess.PIPE, **options) as process:
            time.sleep(chance.uniform(0, 0.2))
            process.send_signal(chance.choice([signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT]))
            out, _ = process.communicate(timeout=60)
        named.add(out, process.returncode)
    named.check()
