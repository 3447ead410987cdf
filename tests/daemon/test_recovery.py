"""Leases outlive the daemon: killed, restarted or replaced, the next one carries on, and loses or leaks none."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import signal
import socket
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.daemon import LOCKS, ask, bound_to, eventually, exists, granted
from support.kept import KINDS, Holding, Kept, Record, hold, once_there, start_kept_fixture, traced  # noqa: F401
from support.processes import NOBODY, Child, become, stays
from support.untouched import children, helpers, maker, pair, reply_of, send, state

from loopd.daemon.process import Daemon
from loopd.daemon.slots import Slots
from loopd.loop import Loop, backing_file
from loopd.protocol import wire
from loopd.worker import records

SOON = 10.0
"""Seconds within which what ends a lease has ended it, on a machine however busy."""


@pytest.fixture
def kept(start_kept: Callable[..., Kept]) -> Kept:
    """A daemon whose clients may keep the lock."""
    return start_kept(policy=LOCKS)


@pytest.fixture
def many(kept: Kept, make_image: Callable[..., int], directory: int) -> Iterator[dict[str, Holding]]:
    """A lease of each kind, with different options."""
    options: dict[str, dict[str, Any]] = {
        "reply": {"lock": True},
        "socket": {"partscan": True, "offset": 4096},
        "pidfd": {"read_only": True, "ref": "a pidfd's"},
        "sender": {"sector_size": 4096, "sizelimit": 65536},
    }
    with contextlib.ExitStack() as stack:
        leases = {}
        for kind in KINDS:
            lease = hold(kept, kind, make_image(name=kind), directory, **options[kind])
            leases[kind] = stack.enter_context(lease)
        yield leases


def rows(daemon: Kept) -> dict[str, dict[str, Any]]:
    """What `list` says but for the age."""
    return {name: {k: v for k, v in row.items() if k != "age"} for name, row in daemon.leases().items()}


def gone(devices: Path, tmp_path: Path, seconds: float = SOON) -> None:
    """Node and binding go within `seconds`."""
    deadline = time.monotonic() + seconds
    eventually(lambda: not bound_to(tmp_path), "the file is free", seconds)
    eventually(lambda: not list(devices.iterdir()), "the node is gone", max(0.01, deadline - time.monotonic()))


def open_files(daemon: Kept) -> Counter[str]:
    """What the main process has open, but for the channels to its helpers, whose number follows the load."""
    found = Counter(daemon.fds())
    found["socket:"] -= len(helpers(daemon))
    return found


def owned(slots: list[socket.socket]) -> Iterator[socket.socket]:
    """Each in turn, closed afterwards."""
    for slot in slots:
        with slot:
            yield slot


def unreadable(daemon: Kept) -> list[str]:
    """What the administrator was told of records that could not be read."""
    return [record["MESSAGE"] for record in daemon.records("warned") if "fd store" in record["MESSAGE"]]


def the_record(daemon: Kept) -> Record:
    """The one record in the fd store."""
    (record,) = daemon.records_in_store()
    return record


# Carried on -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["kill", "restart"])
def test_every_kind_of_lease_is_carried_on(
    kept: Kept, many: dict[str, Holding], devices: Path, tmp_path: Path, number: int
) -> None:
    before = rows(kept)
    assert sorted(before) == sorted(lease.name for lease in many.values())
    inodes = {node.name: node.stat().st_ino for node in devices.iterdir()}
    for _ in range(2):
        kept.kill(number)
        assert rows(kept) == before
        assert all(lease.bound() for lease in many.values())
    assert {node.name: node.stat().st_ino for node in devices.iterdir()} == inodes
    with (devices / many["socket"].name).open("r+b", buffering=0) as written:
        written.write(b"written" * 512)
        os.fsync(written.fileno())
    assert (tmp_path / "socket").read_bytes()[4096:4103] == b"written"
    with open(f"/dev/{many['reply'].name}", "rb") as node, pytest.raises(BlockingIOError):  # as udev does
        fcntl.flock(node, fcntl.LOCK_SH | fcntl.LOCK_NB)
    for lease in many.values():
        assert kept.ask(wire.Detach(lease.name, 0, wait=5), []).fields == {"state": "released"}
    gone(devices, tmp_path)
    kept.end()


@pytest.mark.parametrize("kind", KINDS)
def test_its_end_is_noticed_after_the_restart(
    kept: Kept, image: int, directory: int, devices: Path, tmp_path: Path, kind: str
) -> None:
    with hold(kept, kind, image, directory) as lease:
        kept.kill()
        assert kept.leases()[lease.name]["state"] == "bound"
        lease.finish()
        gone(devices, tmp_path)
    kept.end()


@pytest.mark.parametrize("kind", KINDS)
def test_its_end_during_the_outage_is_noticed(
    kept: Kept, image: int, directory: int, devices: Path, tmp_path: Path, kind: str
) -> None:
    with hold(kept, kind, image, directory) as lease:
        with kept.outage():
            lease.finish()
            stays(lease.bound, 0.1, "the store holds it")
        gone(devices, tmp_path, 5)
    (record,) = eventually(lambda: kept.records("expired"), "the record is written")
    assert record["LOOPD_DEVICE"] == lease.name
    kept.end()


def test_stopped_it_holds_every_lease(kept: Kept, many: dict[str, Holding], devices: Path) -> None:
    kept.kill(signal.SIGTERM)
    assert kept.ends == [0]
    stays(lambda: not kept.running and all(lease.bound() for lease in many.values()), 0.3, "the store holds them")
    assert len(list(devices.iterdir())) == len(KINDS)
    assert len(kept.leases()) == len(KINDS)
    assert kept.running
    assert kept.starts == 2


def test_a_device_that_was_resized(
    start_kept: Callable[..., Kept], make_image: Callable[..., int], directory: int, tmp_path: Path
) -> None:
    """Its size is what it is now, and so is what the account is charged."""
    config = tmp_path / "loopd.toml"
    config.write_text(f"limits.bytes = {4 << 20}\n")
    daemon = start_kept(f"--config={config}")
    image = make_image(1 << 20)
    with hold(daemon, "socket", image, directory) as lease:
        os.truncate(image, 3 << 20)
        assert daemon.ask(wire.Resize(lease.name, 0), []).fields == {"size": 3 << 20}
        daemon.kill()
        assert [row["size"] for row in daemon.leases().values()] == [3 << 20]
        other = make_image(2 << 20, "other")
        assert daemon.ask(wire.Attach(0, 1, 2), [other, directory]).code == "quota"
    daemon.end()


def test_a_detach_that_waits_holds_no_end_up(kept: Kept, image: int, directory: int, devices: Path) -> None:
    """Its client is hung up on, and asks the next daemon."""
    with hold(kept, "socket", image, directory) as lease, (devices / lease.name).open("rb"):
        ours, theirs = pair()
        with ours, theirs:
            send(kept.path, wire.encode_request(wire.Detach(lease.name, 0, wait=60)), [theirs.fileno()]).close()
            eventually(lambda: [row["state"] for row in kept.leases().values()] == ["held"], "it waits")
            theirs.close()
            began = time.monotonic()
            kept.kill(signal.SIGTERM)
            assert time.monotonic() - began < Daemon.STOP_TIMEOUT
            assert ours.recv(1) == b""
        kept.hello()
    kept.end()


def test_a_lease_stays_although_its_nodes_cannot_be_looked_at(
    start_kept: Callable[..., Kept], image: int, directory: int, devices: Path, tmp_path: Path
) -> None:
    """Every helper of the next daemon ends as soon as it takes a client's rights."""
    flag = tmp_path / "flag"
    daemon = start_kept(wrapper=once_there(flag, "-etrace=setfsuid", "-einject=setfsuid:signal=KILL"))
    with hold(daemon, "socket", image, directory, partscan=True) as lease:
        flag.touch()
        daemon.kill()
        assert list(daemon.leases()) == [lease.name]
        stays(lease.bound, 1, "it is the client's")
        assert [row["state"] for row in daemon.leases().values()] == ["bound"]
        flag.unlink()
        daemon.kill()
        assert (devices / lease.name).is_block_device()
    daemon.end()


def test_without_a_directory(kept: Kept, image: int) -> None:
    reply = kept.ask(wire.Attach(0, reply_fd=1, deliver=("fd",)), [image])
    kept.kill()
    assert kept.leases()[reply.fields["devname"]]["state"] == "bound"
    os.pwrite(reply.fds[0], b"loopd" * 1024, 0)
    os.fsync(reply.fds[0])
    assert os.pread(image, 5, 0) == b"loopd"
    reply.close()
    eventually(lambda: not kept.leases(), "the lease is over", SOON)
    kept.end()


def test_a_lease_of_another_user(kept: Kept, image: int, directory: int, devices: Path, tmp_path: Path) -> None:
    """Owner and rights are carried on too: the node is removed from the client's directory as the client."""
    os.chown(devices, NOBODY, NOBODY)
    os.chmod(kept.path, 0o666)

    def request(message: wire.Request, fds: list[int]) -> Child:
        def client(tell: Callable[[Any], None]) -> None:
            become(NOBODY)
            reply = ask(f"/proc/self/fd/{path}", wire.encode_request(message), fds)
            tell(reply.fields)
            signal.pause()

        return Child(client, [*fds, path])

    path = os.open(kept.path, os.O_PATH)  # the directories above are root's alone
    try:
        with request(wire.Attach(0, 1, 2), [image, directory]) as holder:
            name = holder.hear()["devname"]
            kept.kill()
            assert kept.ask(wire.Detach(name, 0), []).code == "not-found"
            assert kept.leases()[name]["uid"] == NOBODY
            with request(wire.Detach(name, 0), []) as other:
                assert other.hear() == {"state": "released"}
            gone(devices, tmp_path)
    finally:
        os.close(path)
    kept.end()


def test_left_over_partitions_go_with_the_device(
    kept: Kept, image: int, directory: int, devices: Path, tmp_path: Path
) -> None:
    with hold(kept, "reply", image, directory, partscan=True) as lease:
        number = lease.name[4:]
        with Loop(int(number)) as device:
            device.add_partition(1, 512 * 64, 512 * 64)
        kept.kill()
        assert kept.leases()[lease.name]["partscan"] is True
        assert exists(f"{lease.name}/{lease.name}p1")
        with (devices / lease.name).open("rb"):
            assert kept.ask(wire.Detach(lease.name, 0), []).fields == {"state": "busy"}
            assert not exists(f"{lease.name}/{lease.name}p1")
    gone(devices, tmp_path)
    kept.end()


@pytest.fixture(name="granted")
def granted_fixture(start_kept: Callable[..., Kept], tmp_path: Path) -> Iterator[tuple[Kept, Path, int]]:
    with granted(start_kept, tmp_path, "build") as (kept, place, directory):
        yield kept, place, directory
        eventually(lambda: not list(place.iterdir()), "nothing is left")
        kept.end()


def test_partition_nodes_of_a_grant_are_those_of_now(granted: tuple[Kept, Path, int], image: int) -> None:
    """Partitions went, and came with another number, while there was no daemon."""
    kept, place, directory = granted
    with contextlib.ExitStack() as stack:
        lease = stack.enter_context(hold(kept, "reply", image, directory, partscan=True))
        device = stack.enter_context(Loop(int(lease.name[4:])))
        one, two = (place / f"{lease.name}p{number}" for number in (1, 2))
        for number in (1, 2):
            device.add_partition(number, 65536 * number, 65536)
        eventually(lambda: one.exists() and two.exists(), "their nodes are there")
        pinned = [os.open(path, os.O_PATH) for path in (one, two)]
        for fd in pinned:
            stack.callback(os.close, fd)
        with kept.outage():
            for number in (1, 2):
                device.delete_partition(number)
            device.add_partition(2, 65536, 65536)  # at once: the old number is not free yet
        eventually(lambda: not one.exists() and two.exists(), "they are in line", 10)
        assert two.stat().st_ino != os.fstat(pinned[1]).st_ino
        now = Path(f"/sys/block/{lease.name}/{two.name}/dev").read_text()
        assert two.stat().st_rdev == os.makedev(*map(int, now.split(":")))
        assert [stat.S_IMODE(os.fstat(fd).st_mode) for fd in pinned] == [0, 0]
        device.delete_partition(2)


def test_a_node_of_a_grant_that_a_helper_left_half_made(granted: tuple[Kept, Path, int], image: int) -> None:
    """It ended between making the node and giving the client access to it."""
    kept, place, directory = granted
    with hold(kept, "reply", image, directory, partscan=True) as lease, Loop(int(lease.name[4:])) as device:
        time.sleep(0.5)  # else the tidying up after the start keeps the helper busy, and the job is another's
        before, node = set(helpers(kept)), place / f"{lease.name}p1"
        access = os.getxattr(place / lease.name, "system.posix_acl_access")
        with traced(sorted(before), "-o/dev/null", "-etrace=setxattr", "-einject=setxattr:signal=KILL:when=1"):
            device.add_partition(1, 65536, 65536)
            eventually(lambda: before - set(helpers(kept)), "a helper has ended")
        eventually(lambda: "system.posix_acl_access" in os.listxattr(node), "the client may open the node")
        assert os.getxattr(node, "system.posix_acl_access") == access
        device.delete_partition(1)


def test_nodes_of_a_helper_that_ended_before_it_named_them(
    kept: Kept, image: int, directory: int, devices: Path, tmp_path: Path
) -> None:
    with hold(kept, "reply", image, directory, partscan=True) as lease:
        before = set(helpers(kept))
        with Loop(int(lease.name[4:])) as device:
            with traced(sorted(before), "-o/dev/null", "-etrace=sendmsg", "-einject=sendmsg:signal=KILL:when=1"):
                device.add_partition(1, 65536, 65536)
                eventually((devices / f"{lease.name}p1").exists, "the node is there")
                eventually(lambda: before - set(helpers(kept)), "a helper has ended")
        assert kept.ask(wire.Detach(lease.name, 0, wait=5), []).fields == {"state": "released"}
    gone(devices, tmp_path)
    kept.end()


# An attach that was under way: the record is there, and its client still waits -------------------------------------


def in_flight(daemon: Kept, notes: Callable[[dict[str, Any]], bool]) -> socket.socket:
    """Make a lease as if its daemon had ended with these notes alone; the client's end of the reply socket."""
    ours, theirs = pair()
    record = the_record(daemon)
    reply = "keeper" if record.fields["kept_by"] == "reply" else "reply"
    os.dup2(theirs.fileno(), record.fds[reply])
    record.notes = [note for note in record.notes if notes(note)]
    record.write()
    record.close()
    record.slot.close()
    theirs.close()
    return ours


BEFORE: dict[str, Callable[[dict[str, Any]], bool]] = {
    "the device is bound": lambda note: False,
    "the answer": lambda note: "bound" in note,
}


@pytest.mark.parametrize("kind", ["reply", "socket", "pidfd"])
@pytest.mark.parametrize("before", BEFORE)
def test_an_attach_under_way_is_undone(
    kept: Kept, image: int, directory: int, devices: Path, tmp_path: Path, kind: str, before: str
) -> None:
    """The client sees the hang-up, and asks again."""
    with hold(kept, kind, image, directory):
        with kept.outage():
            ours = in_flight(kept, BEFORE[before])
        with ours:
            ours.settimeout(10)
            assert ours.recv(1) == b""
        gone(devices, tmp_path)
        (record,) = eventually(lambda: kept.records("detached"), "the record is written")
        assert record["LOOPD_REASON"] == "failed"
    kept.end()


@pytest.mark.parametrize("kind", ["reply", "socket", "pidfd"])
def test_an_answer_under_way_is_given_again(
    kept: Kept, image: int, directory: int, devices: Path, kind: str
) -> None:
    """The daemon ended between the two notes around it: the client may have it, and then its device is its own."""
    with hold(kept, kind, image, directory, id="mine") as lease:
        with kept.outage():
            ours = in_flight(kept, lambda note: note.get("answer") != "sent")
        with ours, contextlib.closing(reply_of(ours)) as reply:
            wanted = {name: value for name, value in lease.fields.items() if name != "warnings"}
            assert {name: reply.fields.get(name) for name in wanted} == wanted
            assert (devices / lease.name).is_block_device()
            assert lease.bound()
            kept.kill()
            kept.hello()
            ours.settimeout(0.2)
            with pytest.raises(TimeoutError):  # once
                ours.recv(1)
            if kind == "reply":
                reply.close()
                eventually(lambda: not kept.leases(), "its end of the reply socket is the lease", SOON)
    kept.end()


@pytest.mark.parametrize("deliver", [["node", "fd"], ["mount", "fd"]], ids=lambda words: words[0])
def test_what_comes_with_fds_is_not_delivered_again(
    kept: Kept, image: int, directory: int, devices: Path, tmp_path: Path, deliver: list[str]
) -> None:
    """To open a device may wait for a client. The client may have the answer: the device stays as long as the lease."""
    with hold(kept, "pidfd", image, directory) as lease:
        with kept.outage():
            change(kept, lambda fields: fields["holder"].update(deliver=deliver))
            ours = in_flight(kept, lambda note: note.get("answer") != "sent")
        with ours:
            assert list(kept.leases()) == [lease.name]
            ours.settimeout(0.3)
            with pytest.raises(TimeoutError):
                ours.recv(1)
            assert lease.bound()
    gone(devices, tmp_path)
    kept.end()


def test_a_client_that_has_its_answer_gets_no_other(kept: Kept, image: int, directory: int) -> None:
    """Although it keeps its end of the reply socket open, and the lease has it still."""
    ours, theirs = pair()
    with ours, theirs:
        reply = kept.ask(wire.Attach(0, 1, 3, 2), [image, directory, theirs.fileno()])
        eventually(lambda: kept.records("attached"), "the daemon is done with the request")
        kept.kill()
        assert len(kept.leases()) == 1
        reply.channel.settimeout(0.3)
        try:
            again = reply.channel.recv(wire.MAX_REPLY)
        except TimeoutError:
            again = b""
        assert again == b""  # hung up, or nothing
    eventually(lambda: not kept.leases(), "the lease is over", SOON)
    kept.end()


def test_a_datagram_that_comes_during_the_outage_is_served(
    kept: Kept, image: int, directory: int, devices: Path
) -> None:
    ours, theirs = pair()
    kept.hello()
    with kept.outage(), theirs, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.connect(kept.path)
        socket.send_fds(sender, [wire.encode_request(wire.Attach(0, 1, 2))], [image, directory, theirs.fileno()])
    with ours, contextlib.closing(reply_of(ours)) as reply:
        assert (devices / reply.fields["devname"]).is_block_device()
    kept.end()


# A release that was under way --------------------------------------------------------------------------------------


def unbind(name: str) -> None:
    """Have the kernel let go of the file, as a worker does at the end of a release."""
    with Loop(int(name[4:])) as device:
        device.clear_fd()


@pytest.mark.parametrize("dropped", [False, True], ids=["both records", "one record"])
def test_a_release_whose_device_has_gone(
    kept: Kept, image: int, directory: int, devices: Path, tmp_path: Path, dropped: bool
) -> None:
    """The daemon ended when the device was let go of: the record without fds is there, and perhaps still the first."""
    with hold(kept, "socket", image, directory) as lease:
        with kept.outage():
            record = the_record(kept)
            released = {**record.fields, "released": True, "fds": [], "bound": record.notes[0]["bound"]}
            if dropped:
                record.close()
                record.fds, record.fields, record.notes = {}, released, []
            else:
                record.notes.append(released)
            record.write()
            record.close()
            record.slot.close()
            (devices / lease.name).unlink()
            unbind(lease.name)
            eventually(lambda: not lease.bound(), "the kernel has unbound it")
        kept.hello()
        eventually(lambda: not kept.leases(), "the lease is over", SOON)
        assert not kept.in_store()
        gone(devices, tmp_path)
        eventually(lambda: not exists(lease.name), "its number is gone")
    kept.end()


@pytest.mark.parametrize("closed", ["after", "during"])
def test_a_device_that_others_hold_open(
    kept: Kept, image: int, directory: int, devices: Path, tmp_path: Path, closed: str
) -> None:
    with hold(kept, "reply", image, directory) as lease:
        opened = (devices / lease.name).open("rb")
        assert kept.ask(wire.Detach(lease.name, 0), []).fields == {"state": "busy"}
        if closed == "during":
            with kept.outage():
                opened.close()
        else:
            kept.kill()
            assert [row["state"] for row in kept.leases().values()] == ["held"]
            assert kept.ask(wire.Detach(lease.name, 0), []).fields == {"state": "busy"}
            assert bound_to(tmp_path) == [lease.name]
            opened.close()
        eventually(lambda: not kept.leases(), "the lease is over", 5)
        gone(devices, tmp_path)
        eventually(lambda: not exists(lease.name), "its number is gone")
    kept.end()


@pytest.mark.parametrize("killed", [False, True], ids=["alone", "killed"])
def test_a_device_whose_file_was_changed(
    kept: Kept, image: int, directory: int, devices: Path, tmp_path: Path, killed: bool
) -> None:
    """LOOP_CHANGE_FD by the client makes another binding: the lease is over, and what is there now is reported."""
    other = tmp_path / "other"
    other.write_bytes(bytes(os.fstat(image).st_size))
    with hold(kept, "reply", image, directory, read_only=True) as lease:
        number = int(lease.name[4:])
        with Loop.from_fd(os.open(devices / lease.name, os.O_RDWR)) as opened:
            with other.open("rb") as file:
                opened.change_fd(file.fileno())
            eventually(lambda: not kept.leases(), "the lease is over", SOON)
            assert not list(devices.iterdir())
            if killed:
                kept.kill()
            eventually(lambda: kept.records("foreign"), "the new binding is reported", 20)
            assert backing_file(number) == str(other)
            opened.clear_fd()
        gone(devices, tmp_path)
        eventually(lambda: not exists(lease.name), "its number is gone", 20)
    kept.end()


# The record's shape ------------------------------------------------------------------------------------------------


def change(daemon: Kept, change: Callable[[dict[str, Any]], None]) -> None:
    """Write the one record anew, as another edition of the daemon would have."""
    record = the_record(daemon)
    change(record.fields)
    record.write()
    record.close()
    record.slot.close()


def test_a_record_of_an_older_edition(kept: Kept, image: int, directory: int, devices: Path) -> None:
    """It has not the fields that came later, and perhaps one that is no more."""

    def older(fields: dict[str, Any]) -> None:
        del fields["holder"]["id"]
        for part in (fields, fields["holder"], fields["binding"]):
            part["of-another-edition"] = ["x", {"y": None}]

    with hold(kept, "reply", image, directory) as lease:
        before = rows(kept)
        with kept.outage():
            change(kept, older)
        assert rows(kept) == before
        assert not unreadable(kept)
        assert kept.ask(wire.Detach(lease.name, 0), []).fields == {"state": "released"}
        assert not list(devices.iterdir())
    kept.end()


def test_a_record_of_a_newer_version_is_kept(
    kept: Kept, make_image: Callable[..., int], directory: int, devices: Path
) -> None:
    """A downgrade loses nothing: the device stays bound, and the next upgrade carries the lease on."""
    with hold(kept, "pidfd", make_image(), directory) as lease:

        def set_version(version: int) -> None:
            change(kept, lambda fields: fields.update(version=version))

        with kept.outage():
            set_version(records.VERSION + 1)
        for _ in range(2):
            assert not kept.leases()
            assert lease.bound()
            assert (devices / lease.name).is_block_device()
            assert kept.in_store() == [lease.name]
            with hold(kept, "reply", make_image(name="other"), directory) as other:
                assert other.name != lease.name
                assert list(kept.leases()) == [other.name]
            eventually(lambda: not kept.leases(), "the other lease is over")
            kept.kill()
        kept.hello()
        # The warning has been written by each of the three that found it.
        assert [str(records.VERSION + 1) in message for message in unreadable(kept)] == [True] * 3
        with kept.outage():
            set_version(records.VERSION)
        assert list(kept.leases()) == [lease.name]
    eventually(lambda: not kept.leases(), "the lease is over", SOON)
    kept.end()


MISSHAPEN: dict[str, Callable[[dict[str, Any]], object]] = {
    "no-version": lambda fields: fields.pop("version"),
    "version-of-letters": lambda fields: fields.update(version="2"),
    "no-holder": lambda fields: fields.pop("holder"),
    "a-list-for-the-holder": lambda fields: fields.update(holder=[]),
    "a-list-for-the-binding": lambda fields: fields.update(binding=[]),
    "a-binding-without-device": lambda fields: fields["binding"].pop("devname"),
    "no-row": lambda fields: fields.pop("row"),
    "nothing-that-keeps-it": lambda fields: fields.pop("kept_by"),
    "an-fd-of-an-unknown-kind": lambda fields: fields["fds"].append("what"),
    # What a limit of open files that has become too low does.
    "more-fds-than-there-are": lambda fields: fields.update(fds=["keeper", "reply", "cgroup", "directory"]),
}


@pytest.mark.parametrize("shape", MISSHAPEN)
def test_a_record_that_cannot_be_read_is_kept(kept: Kept, image: int, directory: int, shape: str) -> None:
    """Whatever is in a slot, the daemon starts and serves, and the device is not given away."""
    with hold(kept, "pidfd", image, directory) as lease, contextlib.ExitStack() as stack:
        record = the_record(kept)
        stack.callback(record.close)
        stack.callback(record.slot.close)
        good = json.loads(json.dumps(record.fields))
        with kept.outage():
            MISSHAPEN[shape](record.fields)
            fds = dict(record.fds)
            if shape.startswith("more"):
                record.fds = {"keeper": fds["keeper"]}
            record.write()
            record.fds = fds
        try:
            eventually(lambda: kept.ready or kept.starts > 3, "it starts or fails", 20)
            assert kept.starts == 2, kept.log()[-2000:]
            assert not kept.leases()
            assert lease.bound()
            assert unreadable(kept)
            assert "/dev/" + lease.name not in kept.fds(), "nothing but the slot holds the device"
        finally:
            with kept.outage():
                record.fields = good
                record.write()
        assert list(kept.leases()) == [lease.name]
    kept.end()


# The store ---------------------------------------------------------------------------------------------------------


def test_the_store_does_not_grow(kept: Kept, make_image: Callable[..., int], directory: int, devices: Path) -> None:
    """Slots are used again: after 40 leases and 8 crashes the manager and the daemon hold what they held before."""
    image = make_image()
    kept.attach(image, directory).close()
    eventually(lambda: not kept.leases(), "the first lease is over")

    def at_rest() -> Counter[str] | None:
        first = open_files(kept)
        time.sleep(0.2)
        # A pidfd is that of a client with whom it is not done yet.
        return first if "anon_inode:[pidfd]" not in first and first == open_files(kept) else None

    own = eventually(at_rest, "it is at rest")
    files = kept.stored()
    slots = sorted(slot.getsockname() for slot in owned(kept.slots()))
    for turn in range(8):
        with contextlib.ExitStack() as stack:
            leases = [stack.enter_context(hold(kept, KINDS[i % 3], image, directory)) for i in range(5)]
            kept.kill()
            for lease in leases[turn % 3 :]:
                assert kept.ask(wire.Detach(lease.name, 0, wait=5), []).fields == {"state": "released"}
        eventually(lambda: not kept.leases(), "no lease is left")
    eventually(lambda: not kept.in_store(), "every slot is empty")
    assert kept.stored() == files
    assert sorted(slot.getsockname() for slot in owned(kept.slots())) == slots
    with contextlib.suppress(AssertionError):
        eventually(lambda: open_files(kept) == own, "it is at rest", 5)
    assert open_files(kept) == own, "the daemon has not more open than before"
    assert not list(devices.iterdir())
    kept.end()


def test_more_leases_than_a_batch_of_slots(kept: Kept, image: int, directory: int) -> None:
    names = [kept.attach(image, directory).fields["devname"] for _ in range(Slots.BATCH + 6)]
    assert kept.in_store() == sorted(names)
    before = rows(kept)
    kept.kill()
    assert rows(kept) == before
    assert kept.in_store() == sorted(names)
    files = kept.stored()
    for reply in kept._replies:
        reply.close()
    eventually(lambda: not kept.leases(), "no lease is left")
    kept.end()
    assert kept.stored() == files


# Parts of the daemon end -------------------------------------------------------------------------------------------


def _next(daemon: Kept, pid: int) -> int:
    return daemon.running if daemon.running != pid else 0


def test_killed_while_it_starts(kept: Kept, many: dict[str, Holding], devices: Path) -> None:
    """Recovery only reads: it can be cut off anywhere."""
    before = rows(kept)
    chance = random.Random(0)
    for _ in range(10):
        pid = kept.pid
        with contextlib.suppress(ProcessLookupError):  # the one that was killed last, whose successor is not there yet
            os.kill(pid, signal.SIGKILL)
        following = eventually(partial(_next, kept, pid), "the next one is started")
        time.sleep(chance.uniform(0, 0.25))
        with contextlib.suppress(ProcessLookupError):
            os.kill(following, signal.SIGKILL)
    assert rows(kept) == before
    assert all(lease.bound() for lease in many.values())
    assert len(list(devices.iterdir())) == len(many)
    assert len(kept.in_store()) == len(many)


def test_helpers_may_end(kept: Kept, make_image: Callable[..., int], directory: int, devices: Path) -> None:
    """Killed, they are replaced, and the lease knows nothing of it."""
    with hold(kept, "reply", make_image(), directory) as lease:
        pid = kept.pid
        for _ in range(3):
            for child in helpers(kept):
                os.kill(child, signal.SIGKILL)
            with hold(kept, "reply", make_image(name="other"), directory) as other:
                assert kept.ask(wire.Detach(other.name, 0, wait=5), []).fields == {"state": "released"}
        assert kept.pid == pid
        assert lease.bound()
        assert [node.name for node in devices.iterdir()] == [lease.name]
        eventually(lambda: not [child for child in children(pid) if state(child) == "Z"], "they were waited for")
    kept.end()


# Where a job is sent to it before its end is read, that send gets the error.
def test_the_process_that_makes_numbers_may_end(kept: Kept, make_image: Callable[..., int], directory: int) -> None:
    """Killed with work before it, it is replaced, and the work is done."""
    with hold(kept, "reply", make_image(), directory) as lease:
        pid = kept.pid
        with hold(kept, "reply", make_image(name="other"), directory) as other:
            child = maker(kept)
            os.kill(child, signal.SIGSTOP)
            assert kept.ask(wire.Detach(other.name, 0, wait=5), []).fields == {"state": "released"}
        assert exists(other.name)
        os.kill(child, signal.SIGKILL)
        eventually(lambda: not exists(other.name), "its number is gone")
        kept.hello()
        assert kept.pid == pid
        assert lease.bound()
    kept.end()
