"""The device numbers of a directory grant: reserved with it, used through it alone, at rest when it is removed."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import Daemon, Reply, ask, bound_to, eventually, exists, grants_at
from kept import Kept, hold, start_kept_fixture  # noqa: F401
from processes import NOBODY, become, injected, own_user_namespace, stays
from untouched import elsewhere, helpers, maker, paused

from loopd.daemon import counter as counters
from loopd.loop import LoopControl
from loopd.protocol import wire
from loopd.protocol.wire import DEVICES
from loopd.worker.grants import LISTED
from loopd.worker.make import FIRST


class Grant:
    """A grant as its client has it, and what the reply said of it."""

    def __init__(self, daemon: Daemon, name: str, devices: int | None = None) -> None:
        self.daemon = daemon
        self.reply = daemon.ask(wire.Directory(name, 0, devices=devices), [])
        assert self.reply.code is None, self.reply.fields
        self.path = Path(self.reply.fields["path"])
        self.numbers: list[int] = self.reply.fields.get("numbers", [])
        self.fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def attach(self, image: int) -> Reply:
        return self.daemon.attach(image, self.fd)

    def number(self, image: int) -> int:
        """Attach, and tell the number."""
        reply = self.attach(image)
        assert reply.code is None, reply.fields
        assert (self.path / reply.fields["devname"]).is_block_device()
        return int(reply.fields["devname"][4:])

    def detach(self, number: int) -> None:
        reply = self.daemon.ask(wire.Detach(f"loop{number}", 1, dir_fd=0, wait=5), [self.fd])
        assert reply.fields == {"state": "released"}, reply.fields


@pytest.fixture
def grants(tmp_path: Path) -> Iterator[Path]:
    with grants_at(tmp_path / "grants") as path:
        yield path


@pytest.fixture
def make() -> Iterator[Callable[..., Grant]]:
    made: list[Grant] = []

    def make_one(*arguments: Any, **options: Any) -> Grant:
        made.append(Grant(*arguments, **options))
        return made[-1]

    yield make_one
    for grant in made:
        os.close(grant.fd)


@pytest.fixture
def daemon(start_daemon: Callable[..., Daemon], grants: Path) -> Daemon:
    return start_daemon(f"--grant-directory={grants}")


@pytest.fixture
def kept(start_kept: Callable[..., Kept], grants: Path) -> Iterator[Kept]:
    kept = start_kept(f"--grant-directory={grants}")
    yield kept
    kept.end()


def remove(daemon: Daemon, name: str) -> None:
    reply = daemon.ask(wire.Directory(name, 0, remove=True), [])
    assert reply.code is None, reply.fields
    assert reply.fields.get("numbers", []) == []


def refused(reply: Reply, code: str, words: str) -> bool:
    assert reply.code == code, reply.fields
    assert words in reply.fields["error"]["message"], reply.fields
    return True


# Numbers of its own ---------------------------------------------------------------------------------------------------


def test_attaches_take_its_numbers_alone(
    daemon: Daemon, make: Callable[..., Grant], image: int, directory: int
) -> None:
    grant = make(daemon, "build", devices=3)
    assert len(set(grant.numbers)) == 3
    assert all(number >= FIRST for number in grant.numbers)
    assert {grant.number(image) for _ in range(3)} == set(grant.numbers)
    assert refused(grant.attach(image), "quota", "all 3 device numbers of this directory are in use")
    others = {int(daemon.attach(image, directory).fields["devname"][4:]) for _ in range(12)}
    assert not others & set(grant.numbers)
    # A number comes free for the same grant, and for nobody else.
    grant.detach(grant.numbers[1])
    assert int(daemon.attach(image, directory).fields["devname"][4:]) not in grant.numbers
    assert grant.number(image) == grant.numbers[1]
    assert daemon.records("failed") == []


def test_grants_share_no_number(daemon: Daemon, make: Callable[..., Grant], image: int) -> None:
    made = [make(daemon, f"g{count}", devices=count) for count in (1, 5, 64, 3)] + [make(daemon, "default")]
    assert [len(grant.numbers) for grant in made] == [1, 5, 64, 3, DEVICES]
    numbers = [number for grant in made for number in grant.numbers]
    assert len(set(numbers)) == len(numbers)
    for grant in made:
        assert grant.numbers == sorted(grant.numbers)
        assert grant.number(image) in grant.numbers
    # Each has what it had: who asks again gets the same answer.
    for grant in made:
        again = daemon.ask(wire.Directory(grant.path.name.partition("-")[2], 0), [])
        assert again.fields["numbers"] == grant.numbers


def test_a_directory_that_is_there_keeps_its_numbers(daemon: Daemon, make: Callable[..., Grant]) -> None:
    grant = make(daemon, "build", devices=3)
    assert daemon.ask(wire.Directory("build", 0, devices=3), []).fields["numbers"] == grant.numbers
    for other in (2, 4, 64):
        reply = daemon.ask(wire.Directory("build", 0, devices=other), [])
        assert refused(reply, "exists", "directory build has 3 device numbers of its own: to change that, remove it")
    assert daemon.ask(wire.Directory("build", 0), []).fields["numbers"] == grant.numbers
    remove(daemon, "build")
    assert len(daemon.ask(wire.Directory("build", 0, devices=4), []).fields["numbers"]) == 4


@pytest.mark.parametrize("devices", [0, 65, -1, True, "8", 1.5, None])
def test_how_many_there_may_be(daemon: Daemon, devices: object) -> None:
    payload = wire._encoder.encode({"op": "directory", "name": "build", "reply_fd": 0, "devices": devices}).encode()
    assert refused(daemon.ask(payload, []), "malformed", "devices: expected a number of devices, 1 to 64")
    payload = b'{"op": "directory", "name": "build", "reply_fd": 0, "devices": 8, "remove": true}'
    assert refused(daemon.ask(payload, []), "malformed", "devices: ")


def test_the_reply_says_whether_kept_nodes_come_back(daemon: Daemon) -> None:
    """As loopd's own test at the start finds out, which it may not have done when the first request comes."""

    def remade() -> bool | None:
        found: bool | None = daemon.ask(wire.Directory("build", 0), []).fields.get("remade")
        return found

    eventually(lambda: remade() is not None, "it is known")
    warned = any("max_loop" in record["MESSAGE"] for record in daemon.records("warned"))
    assert remade() is warned


def test_who_makes_one_at_the_same_time_gets_the_same(
    image: int, directory: int, start_daemon: Callable[..., Daemon], grants: Path
) -> None:
    """The numbers that were reserved in vain come next, and are not charged."""
    daemon = start_daemon(f"--grant-directory={grants}", name="few", policy="limits.new_numbers = 64\n")
    daemon.hello()
    for turn in range(5):
        with ThreadPoolExecutor(8) as pool, paused(daemon.pid) if turn else contextlib.nullcontext():
            asked = [pool.submit(ask, daemon.path, _make(f"g{turn}"), []) for _ in range(8)]
            time.sleep(0.1)
            if turn:
                os.kill(daemon.pid, signal.SIGCONT)
            replies = [future.result() for future in asked]
        codes = {reply.code for reply in replies}
        found = {tuple(reply.fields.get("numbers", ())) for reply in replies if reply.code is None}
        for reply in replies:
            reply.close()
        assert codes <= {None, "quota"}  # eight at once are 64 numbers, for the moment
        assert len(found) == 1, found
    assert len(daemon.attach(image, directory).fields["devname"]) > 4
    spent = [daemon.ask(wire.Directory(f"h{number}", 0), []).code for number in range(4)]
    assert spent == [None, None, "quota", "quota"]  # five grants and one device were charged before


def _make(name: str) -> bytes:
    return wire.encode_request(wire.Directory(name, 0))


# In use, and free again -----------------------------------------------------------------------------------------------


def test_a_number_is_waited_for(daemon: Daemon, make: Callable[..., Grant], image: int) -> None:
    grant = make(daemon, "build", devices=1)
    for _ in range(10):
        assert grant.number(image) == grant.numbers[0]
        grant.detach(grant.numbers[0])
    grant.number(image)
    with injected([maker(daemon)], "ioctl:delay_enter=700000"):
        grant.detach(grant.numbers[0])
        assert exists(f"loop{grant.numbers[0]}")  # idle, and about to be removed
        started = time.monotonic()
        assert grant.number(image) == grant.numbers[0]
        assert time.monotonic() - started > 0.4
    grant.detach(grant.numbers[0])


def test_a_device_that_is_held_open_has_its_number(daemon: Daemon, make: Callable[..., Grant], image: int) -> None:
    grant = make(daemon, "build", devices=1)
    name = f"loop{grant.number(image)}"
    with (grant.path / name).open("rb"):
        assert daemon.ask(wire.Detach(name, 1, dir_fd=0), [grant.fd]).fields == {"state": "busy"}
        assert refused(grant.attach(image), "quota", "all 1 device numbers")
    assert eventually(lambda: grant.attach(image).fields.get("devname"), "it is free") == name


def test_a_number_that_is_kept_open_beyond_its_end(daemon: Daemon, make: Callable[..., Grant], image: int) -> None:
    """Parked, and somebody has it open: the attach waits, and is told at the end of its patience."""
    grant = make(daemon, "build", devices=1)
    number = grant.number(image)
    with paused(maker(daemon)):
        grant.detach(number)
        held = os.open(f"/dev/loop{number}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        assert refused(grant.attach(image), "quota", "all 1 device numbers")
    finally:
        os.close(held)
    assert grant.number(image) == number


def test_it_costs_no_new_numbers(
    start_daemon: Callable[..., Daemon], grants: Path, make: Callable[..., Grant], image: int, directory: int
) -> None:
    """Making one does: who makes and removes grants would use up the host's numbers."""
    limits = "limits.new_numbers = 10\nlimits.new_numbers_per_minute = 0\n"
    daemon = start_daemon(f"--grant-directory={grants}", policy=limits)
    grant = make(daemon, "build", devices=8)
    reply = daemon.ask(wire.Directory("more", 0, devices=3), [])
    assert refused(reply, "quota", "a directory with 3 device numbers is more than this account may have now: 10 and 0")
    assert {path.name for path in grants.iterdir()} == {grant.path.name, ".numbers"}
    last = make(daemon, "last", devices=2)
    assert refused(daemon.attach(image, directory), "quota", "has used up its new device numbers")
    for _ in range(30):
        number = grant.number(image)
        assert number in grant.numbers
        grant.detach(number)
    assert last.number(image) in last.numbers
    remove(daemon, "build")
    assert refused(daemon.ask(wire.Directory("build", 0, devices=1), []), "quota", "10 and 0 a minute")


def test_a_number_that_another_has(daemon: Daemon, make: Callable[..., Grant], image: int, tmp_path: Path) -> None:
    """The host has made the device. One that is idle is taken back, one with a file is left alone and told."""
    grant = make(daemon, "build", devices=3)
    hosts, idle, free = grant.numbers
    (tmp_path / "hosts").write_bytes(bytes(4096))
    with contextlib.closing(LoopControl()) as control:
        control.add(hosts)
        control.add(idle)
    subprocess.run(["losetup", f"/dev/loop{hosts}", tmp_path / "hosts"], check=True)
    try:
        assert grant.number(image) == free
        assert grant.number(image) == idle
        assert refused(grant.attach(image), "quota", "all 3 device numbers")
        eventually(lambda: daemon.records("foreign"), "it is told", 30)
        assert f"loop{hosts} is bound to" in daemon.records("foreign")[0]["MESSAGE"]
        assert (tmp_path / "hosts").samefile(Path(f"/sys/block/loop{hosts}/loop/backing_file").read_text().strip())
    finally:
        subprocess.run(["losetup", "--detach", f"/dev/loop{hosts}"], check=True)
    assert eventually(lambda: grant.attach(image).fields.get("devname"), "it is free again", 20) == f"loop{hosts}"


# Restarts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_they_survive_the_daemon(kept: Kept, make: Callable[..., Grant], image: int, number: int) -> None:
    grant, other = make(kept, "build", devices=2), make(kept, "other", devices=2)
    with hold(kept, "socket", image, grant.fd) as lease:
        kept.kill(number)
        again = make(kept, "build")
        assert again.numbers == grant.numbers
        assert lease.bound()
        (left,) = set(grant.numbers) - {int(lease.name[4:])}
        assert grant.number(image) == left
        assert refused(grant.attach(image), "quota", "all 2 device numbers")
        grant.detach(int(lease.name[4:]))
        assert grant.number(image) == int(lease.name[4:])
        assert not set(make(kept, "third").numbers) & {*grant.numbers, *other.numbers}


def test_a_worker_that_made_it_and_was_killed(kept: Kept, make: Callable[..., Grant], grants: Path, image: int) -> None:
    """Before it wrote the numbers down, as where the daemon is killed."""
    kept.hello()
    with injected([kept.pid, *helpers(kept)], "symlinkat:signal=KILL:when=1"):
        assert kept.ask(wire.Directory("build", 0), []).code == "internal"
    fd = os.open(grants / f"{os.getuid()}-build", os.O_RDONLY | os.O_DIRECTORY)
    try:
        assert refused(kept.attach(image, fd), "no-device", "not made to its end")
    finally:
        os.close(fd)
    grant = make(kept, "build")
    assert len(grant.numbers) == DEVICES
    assert grant.number(image) in grant.numbers


def test_a_device_that_a_daemon_left_idle(kept: Kept, make: Callable[..., Grant]) -> None:
    """Any instance may have left it, and a client may have its node: the host's losetup must not find it."""
    grant = make(kept, "build")
    with kept.outage():
        # Of another instance from now on, so that no look at the own blocks finds it.
        block = (grant.numbers[0] - FIRST) // counters.BLOCK
        with kept.counter.open("r+b") as file:
            file.seek(counters._HEADER.size + block * counters._ENTRY.size)
            file.write(counters._ENTRY.pack(int(time.time()) - 9999, 12345))
        with contextlib.closing(LoopControl()) as control:
            control.add(grant.numbers[0])
    kept.hello()
    eventually(lambda: not exists(f"loop{grant.numbers[0]}"), "it is gone")
    used, instance = _entry(kept, grant.numbers[0])
    assert time.time() - used < 60  # so its quarantine has not begun while the grant is there
    assert instance == 12345


def _entry(kept: Kept, number: int) -> tuple[int, int]:
    data = kept.counter.read_bytes()[counters._HEADER.size :]
    used, instance = counters._ENTRY.unpack_from(data, (number - FIRST) // counters.BLOCK * counters._ENTRY.size)
    return used, instance


def test_a_grant_of_an_earlier_daemon(daemon: Daemon, grants: Path, make: Callable[..., Grant], image: int) -> None:
    """It has no numbers of its own, and goes on."""
    path = grants / f"{os.getuid()}-old"
    path.mkdir(mode=0o700)
    grant = make(daemon, "old")
    assert (grant.path, grant.numbers) == (path, [])
    mine = {grant.number(image) for _ in range(12)}
    assert len(mine) == 12
    assert refused(daemon.ask(wire.Directory("old", 0, devices=8), []), "exists", "has no device numbers of its own")
    for number in mine:
        grant.detach(number)
    remove(daemon, "old")
    assert len(make(daemon, "old").numbers) == DEVICES


# The end of a grant ---------------------------------------------------------------------------------------------------


def test_removed_its_numbers_rest(kept: Kept, make: Callable[..., Grant], grants: Path, image: int) -> None:
    grant = make(kept, "build", devices=2)
    number = grant.number(image)
    assert refused(kept.ask(wire.Directory("build", 0, remove=True), []), "busy", "detach them first")
    assert make(kept, "build").numbers == grant.numbers
    grant.detach(number)
    with kept.counter.open("r+b") as file:
        file.seek(counters._HEADER.size + (number - FIRST) // counters.BLOCK * counters._ENTRY.size)
        file.write(counters._ENTRY.pack(1, 0))
    remove(kept, "build")
    assert time.time() - _entry(kept, number)[0] < 60
    assert list((grants / ".numbers").iterdir()) == []
    seen = set(grant.numbers)
    for turn in range(20):
        numbers = make(kept, "build", devices=2).numbers
        assert not seen & set(numbers)
        seen |= set(numbers)
        remove(kept, "build")
        if turn == 10:
            kept.kill()
    assert len(seen) == 42


def test_removed_while_a_device_is_held_open(daemon: Daemon, make: Callable[..., Grant], image: int) -> None:
    grant = make(daemon, "build", devices=1)
    number = grant.number(image)
    with (grant.path / f"loop{number}").open("rb"):
        assert daemon.ask(wire.Detach(f"loop{number}", 1, dir_fd=0), [grant.fd]).fields == {"state": "busy"}
        remove(daemon, "build")
        again = make(daemon, "build", devices=1)
        assert again.numbers != grant.numbers
        assert again.number(image) == again.numbers[0]
    eventually(lambda: not exists(f"loop{number}"), "it is gone")
    assert refused(again.attach(image), "quota", "all 1 device numbers")


def test_what_is_left_of_one_is_tidied_up(kept: Kept, grants: Path, make: Callable[..., Grant]) -> None:
    """A worker was killed between the two steps of a removal."""
    grant, other = make(kept, "build"), make(kept, "other")
    with injected([kept.pid, *helpers(kept)], "unlinkat:signal=KILL:when=2"):
        assert kept.ask(wire.Directory("build", 0, remove=True), []).code == "internal"
    assert len(list((grants / ".numbers").iterdir())) == 2
    assert not set(make(kept, "build").numbers) & set(grant.numbers)
    kept.kill()
    kept.hello()
    eventually(lambda: len(list((grants / ".numbers").iterdir())) == 2, "the third link is gone")
    assert make(kept, "other").numbers == other.numbers


# Instances ------------------------------------------------------------------------------------------------------------


def test_instances_have_a_grants_numbers_in_common(
    start_daemon: Callable[..., Daemon], grants: Path, make: Callable[..., Grant], tmp_path: Path, image: int
) -> None:
    """A grant serves with any instance. Each leaves the other's devices alone, and reports none of them."""
    common = [f"--grant-directory={grants}", f"--state-directory={tmp_path}/state"]
    both = [start_daemon(*common, f"--instance={name}", name=name) for name in ("one", "two")]
    grant = make(both[0], "build", devices=4)
    replies = [both[turn % 2].attach(image, grant.fd) for turn in range(4)]
    numbers = [int(reply.fields["devname"][4:]) for reply in replies]
    assert sorted(numbers) == grant.numbers
    for daemon in both:
        assert refused(daemon.attach(image, grant.fd), "quota", "all 4 device numbers")
    stays(lambda: not any(daemon.records("foreign") for daemon in both), 4, "nothing is foreign")
    assert {int(row["devname"][4:]) for row in both[1].ask(wire.Leases(1, dir_fd=0), [grant.fd]).fields["leases"]} == {
        numbers[1], numbers[3],
    }  # fmt: skip
    reply = both[1].ask(wire.Detach(f"loop{numbers[1]}", 1, dir_fd=0, wait=5), [grant.fd])
    assert reply.fields == {"state": "released"}

    def again() -> str | None:
        replies.append(both[0].attach(image, grant.fd))
        return replies[-1].fields.get("devname")

    assert eventually(again, "it is free for the other, too", 30) == f"loop{numbers[1]}"
    for reply in replies:
        reply.close()
    eventually(lambda: not bound_to(tmp_path), "neither has any")


# The list -------------------------------------------------------------------------------------------------------------


def listed(path: str, after: str = "") -> dict[str, Any]:
    with contextlib.closing(ask(path, wire.encode_request(wire.Directories(0, after=after)), [])) as reply:
        assert reply.code is None, reply.fields
        return reply.fields


def test_they_are_listed(kept: Kept, make: Callable[..., Grant], grants: Path, image: int) -> None:
    assert listed(kept.path) == {"directories": [], "more": False}
    one, two = make(kept, "one", devices=2), make(kept, "two")
    os.mkdir(grants / f"{os.getuid()}-old", 0o700)
    os.mkdir(grants / "4711-anothers", 0o700)
    os.mkdir(grants / ".loopd:loop4096", 0o700)
    (grants / "stray").touch()
    number = one.number(image)
    uid = os.getuid()

    def row(name: str, numbers: list[int], used: int, uid: int = uid) -> dict[str, Any]:
        path = str(grants / f"{uid}-{name}")
        return {"name": name, "uid": uid, "path": path, "numbers": numbers, "in_use": used}

    mine = [row("old", [], 0), row("one", one.numbers, 1), row("two", two.numbers, 0)]
    assert listed(kept.path) == {"directories": mine, "more": False}
    everybodys = sorted([*mine, row("anothers", [], 0, 4711)], key=lambda row: os.path.basename(row["path"]))
    assert listed(kept.path + ".admin") == {"directories": everybodys, "more": False}
    assert listed(kept.path, f"{uid}-one")["directories"] == mine[2:]
    grant_fd_of_another = make(kept, "two").fd
    assert kept.attach(image, grant_fd_of_another).code is None
    one.detach(number)
    eventually(lambda: listed(kept.path)["directories"][1]["in_use"] == 0, "its device is gone")


def test_a_long_list_goes_on(daemon: Daemon) -> None:
    made = {}
    for number in range(LISTED + 7):
        fields = daemon.ask(wire.Directory(f"g{number}", 0, devices=1), []).fields
        made[f"g{number}"] = fields["numbers"]
    first = listed(daemon.path)
    assert (len(first["directories"]), first["more"]) == (LISTED, True)
    assert len(wire._encoder.encode(first)) < wire.MAX_REPLY
    last = first["directories"][-1]
    rest = listed(daemon.path, f"{last['uid']}-{last['name']}")
    assert (len(rest["directories"]), rest["more"]) == (7, False)
    assert {row["name"]: row["numbers"] for row in first["directories"] + rest["directories"]} == made


def test_the_longest_rows_fit_into_a_reply() -> None:
    numbers = tuple(range(2**20 - 2 * wire.MAX_DEVICES, 2**20, 2))
    row = wire.GrantInfo("n" * 64, 2**32 - 2, "/run/loopd-dev/4294967294-" + "n" * 64, numbers, 64)
    assert len(wire.encode_reply(wire.GrantList((row,) * LISTED, more=True), "i" * 64)) < wire.MAX_REPLY


def test_they_are_listed_on_the_host_alone(daemon: Daemon, make: Callable[..., Grant]) -> None:
    """A container's root may have the uid of the host's."""
    make(daemon, "secret")

    def look() -> dict[str, Any]:
        with contextlib.closing(ask(daemon.path, wire.encode_request(wire.Directories(0)), [])) as reply:
            return reply.fields

    os.chmod(daemon.path, 0o666)
    found = elsewhere(look, own_user_namespace)
    assert found["error"]["code"] == "not-permitted", found


# What keeps them ------------------------------------------------------------------------------------------------------


def test_no_client_reaches_what_keeps_them(daemon: Daemon, make: Callable[..., Grant], grants: Path) -> None:
    """Neither by its name nor as a directory that it passes for a grant."""
    grant = make(daemon, "build")
    place = grants / ".numbers"
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert [os.readlink(path) for path in place.iterdir()] == [f"{grant.numbers[0]}-{grant.numbers[-1]}"]

    def look() -> str:
        try:
            return str(os.listdir(place))
        except OSError as error:
            return errno.errorcode[error.errno or 0]

    assert elsewhere(look, lambda: become(NOBODY)) == "EACCES"
    for name in (".numbers", "../x", ".x"):
        payload = wire._encoder.encode({"op": "directory", "name": name, "reply_fd": 0}).encode()
        assert daemon.ask(payload, []).code == "malformed"
