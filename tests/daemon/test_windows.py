"""Windows: loop devices that stand in for partitions, where a client must not have nodes of the kernel's.

The clients here are in boxes: root of the host's user namespace, in mount namespaces of their own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.box import MIB, Box, box_fixture, granted_fixture, make_box, stand_ins_fixture  # noqa: F401
from support.daemon import Daemon, Reply, bound_to, configured, eventually, exists
from support.kept import Kept, start_kept_fixture  # noqa: F401
from support.processes import stays

from loopd.deviceplugin.front import Front
from loopd.loop import Loop, backing_file
from loopd.protocol import wire


def add(device: str, number: int, start: int, size: int) -> None:
    """Have the kernel find a partition: no kernel refuses BLKPG, and not every kernel reads tables. In bytes."""
    with Loop(int(Path(device).name[4:])) as loop:
        loop.add_partition(number, start, size)


def delete(device: str, number: int) -> None:
    with Loop(int(Path(device).name[4:])) as loop:
        loop.delete_partition(number)


def node(box: Box, device: str, number: int) -> Path:
    """Where the node of a partition is, or will be, seen from outside."""
    folder = box.dev("loopd") if box.dev("loopd").exists() else box.dev()
    return folder / f"{Path(device).name}p{number}"


def within(box: Box, path: Path) -> str:
    """The same path, seen from inside."""
    return str(path).replace(f"/proc/{box.pid}/root", "")


def window(box: Box, device: str, number: int) -> str:
    """The device behind the node of a partition, once that is there."""
    path = node(box, device, number)
    eventually(path.exists, f"a node for partition {number}")
    status = path.stat()
    assert stat.S_ISBLK(status.st_mode)
    assert os.major(status.st_rdev) == 7, "a loop device, not the kernel's partition"
    return Path(f"/sys/dev/block/7:{os.minor(status.st_rdev)}").resolve().name


def mounted(box: Box, device: str) -> str:
    """Have the box mount its first partition, with a file in it, on `m`; the device behind the node."""
    add(device, 1, MIB, 2 * MIB)
    name = window(box, device, 1)
    path = within(box, node(box, device, 1))
    assert box("sh", "-ec", f"mkfs.ext4 -q {path}; mkdir m; mount {path} m; echo text >m/text").code == 0
    return name


def attribute(device: str, name: str) -> int:
    return int(Path(f"/sys/block/{device}/{name}").read_text())


def test_a_partition_is_a_window(box: Box) -> None:
    device = box.attach("-P", box.folder / "image")
    add(device, 1, MIB, MIB)
    name = window(box, device, 1)
    assert attribute(name, "loop/offset") == attribute(name, "loop/sizelimit") == MIB
    assert attribute(name, "size") * 512 == MIB
    assert box("dd", "if=/dev/zero", f"of={device}p1", "bs=1M", "count=1", "conv=notrunc").code == 0


def test_disk_window_and_file_agree(box: Box) -> None:
    """What is written and closed at one place is read at the others."""
    image = box.folder / "image"
    device = box.attach("-P", image)
    add(device, 1, MIB, MIB)
    window(box, device, 1)
    (box.folder / "text").write_bytes(b"by the window".ljust(4096, b"."))
    script = "dd if=text of=$0 conv=notrunc; cmp -n 4096 text $0; cmp -n 4096 -i 0:1M text $1; "
    script += "cmp -n 4096 -i 0:1M text image"
    inside = within(box, node(box, device, 1))
    done = box("sh", "-ec", script, inside, device)
    assert (done.code, done.out) == (0, ""), done.err
    script = "tr a-z A-Z <text | dd of=$1 seek=2048 conv=notrunc; dd if=$0 count=8 | head -c 13; "
    script += "dd if=image skip=2048 count=8 | head -c 13"
    assert box("sh", "-ec", f"({script}) 2>/dev/null", inside, device).out == "BY THE WINDOW" * 2


def test_windows_come_go_and_stay(box: Box) -> None:
    device = box.attach("-P", box.folder / "image")
    add(device, 1, MIB, MIB)
    add(device, 2, 2 * MIB, MIB)
    kept, gone = window(box, device, 1), window(box, device, 2)
    inode = node(box, device, 1).stat().st_ino
    delete(device, 2)
    eventually(lambda: not node(box, device, 2).exists(), "the node of a partition that is gone")
    eventually(lambda: not exists(gone), "its device")
    add(device, 2, 3 * MIB, MIB // 2)
    moved = window(box, device, 2)
    assert (attribute(moved, "loop/offset"), attribute(moved, "size")) == (3 * MIB, MIB // 1024)
    assert (window(box, device, 1), node(box, device, 1).stat().st_ino) == (kept, inode)
    assert box.losetup("-d", device).code == 0
    for name in (kept, moved, Path(device).name):
        eventually(lambda name=name: not exists(name), "all go with the disk")  # type: ignore[misc]
    assert box.names() == set()


def test_a_window_in_use_goes_at_its_last_close(granted: Box) -> None:
    device = granted.attach("-P", granted.folder / "image")
    name = mounted(granted, device)
    delete(device, 1)
    eventually(lambda: not node(granted, device, 1).exists(), "the node")
    assert granted("cat", "m/text").out == "text\n"
    # The disk can be used meanwhile, and another partition be made in the same place.
    add(device, 1, MIB, MIB)
    assert window(granted, device, 1) != name
    assert granted.losetup("-d", device).code == 0
    assert granted("cat", "m/text").out == "text\n"
    assert granted("umount", "m").code == 0
    eventually(lambda: not bound_to(granted.folder), "nothing is left")
    eventually(lambda: not exists(name), "nor its device")


def test_detach_waits_for_windows_in_use(granted: Box) -> None:
    """As it does for a partition: the disk counts as in use."""
    device = granted.attach("-P", granted.folder / "image")
    mounted(granted, device)
    assert detached(granted, Path(device).name).fields["state"] == "busy"
    assert not node(granted, device, 1).exists()
    disk = Path(device).name
    eventually(lambda: "parked" in (backing_file(int(disk[4:])) or ""), "the host is not given the disk's device")
    assert granted("umount", "m").code == 0
    eventually(lambda: not bound_to(granted.folder), "nothing is left")
    eventually(lambda: not exists(disk), "nor the disk's device")


def of_grant(box: Box, request: Callable[[int], wire.Request]) -> Reply:
    """Ask about the devices of the box's grant."""
    grant = os.open(box.dev("loopd"), os.O_RDONLY | os.O_DIRECTORY)
    try:
        return box.daemon.ask(request(0), [grant])
    finally:
        os.close(grant)


def detached(box: Box, devname: str) -> Reply:
    return of_grant(box, lambda grant: wire.Detach(devname, 1, dir_fd=grant))


def test_a_window_is_listed_and_goes_with_its_disk_alone(granted: Box) -> None:
    device = granted.attach("-P", granted.folder / "image")
    add(device, 1, MIB, MIB)
    name = window(granted, device, 1)
    rows = of_grant(granted, lambda grant: wire.Leases(1, dir_fd=grant)).fields["leases"]
    assert [(row["devname"], row.get("window")) for row in rows] == [
        (Path(device).name, None), (name, f"{Path(device).name}p1")
    ]  # fmt: skip
    assert [row["partitions"] for row in rows] == [[f"{Path(device).name}p1"], []]
    assert granted.losetup("-n", "-O", "NAME").out.split() == [device], "losetup shows disks"
    refused = detached(granted, name)
    assert (refused.code, "goes with its disk" in refused.fields["error"]["message"]) == (wire.Code.INVALID, True)
    assert of_grant(granted, lambda grant: wire.Resize(name, 1, dir_fd=grant)).code == wire.Code.INVALID


def test_a_window_that_its_client_unbinds_is_no_partition_any_more(granted: Box) -> None:
    device = granted.attach("-P", granted.folder / "image")
    add(device, 1, MIB, MIB)
    name = window(granted, device, 1)
    with Loop(int(name[4:])) as loop:
        loop.clear_fd()
    eventually(lambda: not exists(name), "it is gone")
    (row,) = of_grant(granted, lambda grant: wire.Leases(1, dir_fd=grant)).fields["leases"]
    assert row["partitions"] == []
    add(device, 2, 2 * MIB, MIB)
    window(granted, device, 1)


def test_the_device_plugin_ends_disks_alone(start_kept: Callable[..., Kept], stand_ins: Path, tmp_path: Path) -> None:
    """Also where a window has a number below that of its disk, and so comes first in the list."""
    with contextlib.contextmanager(make_box)(start_kept, tmp_path, stand_ins, grant=True) as box:
        numbers = tuple(box.daemon.ask(wire.Directory("box", 0), []).fields["numbers"])
        first, *_, device = (box.attach("-P", box.folder / "image") for _ in numbers)
        assert box.losetup("-d", first).code == 0
        add(device, 1, MIB, MIB)
        assert window(box, device, 1) == Path(first).name
        Front(f"{box.daemon.path}.admin").end(numbers)
        eventually(lambda: not bound_to(box.folder), "nothing is left")


def test_windows_are_as_their_disk(granted: Box) -> None:
    image = granted.folder / "image"
    device = granted.attach("-P", "-r", "-o", MIB, "-b", 4096, image)
    add(device, 1, MIB, MIB)
    name = window(granted, device, 1)
    assert (attribute(name, "ro"), attribute(name, "queue/logical_block_size")) == (1, 4096)
    assert attribute(name, "loop/offset") == 2 * MIB
    assert attribute(name, "loop/dio") == attribute(Path(device).name, "loop/dio")
    assert granted("dd", "if=/dev/zero", f"of=/dev/loopd/{Path(device).name}p1", "bs=4k", "count=1").code != 0


@pytest.fixture(name="make")
def make_fixture(
    start_daemon: Callable[..., Daemon], stand_ins: Path, tmp_path: Path
) -> Iterator[Callable[[str], Box]]:
    """A box with a grant, whose loopd has this configuration."""
    with contextlib.ExitStack() as stack:
        yield lambda policy: stack.enter_context(
            contextlib.contextmanager(make_box)(
                start_daemon, tmp_path, stand_ins, grant=True, options=configured(tmp_path, policy)
            )
        )


def test_windows_are_devices_of_the_account(make: Callable[[str], Box]) -> None:
    box = make("limits.devices = 3\n")
    device = box.attach("-P", box.folder / "image")
    for number in (1, 2, 3):
        add(device, number, number * MIB // 2, MIB // 2)
    window(box, device, 1)
    window(box, device, 2)
    stays(lambda: not node(box, device, 3).exists(), 0.5, "there is room for two")
    said = [record["MESSAGE"] for record in box.daemon.records("warned")]
    said = [text for text in said if "has a partition without a device" in text]
    assert len(said) == 1
    assert "its limit is 3" in said[0]
    delete(device, 1)
    window(box, device, 3)


def test_the_kernels_partitions_where_the_administrator_allows_them(make: Callable[[str], Box]) -> None:
    box = make("allow.kernel_partitions = true\n")
    device = box.attach("-P", box.folder / "image")
    add(device, 1, MIB, MIB)
    path = node(box, device, 1)
    eventually(path.exists, "a node")
    assert os.major(path.stat().st_rdev) != 7


def test_root_of_the_host_in_a_user_namespace(granted: Box) -> None:
    """It has CAP_DAC_OVERRIDE for root's nodes, whatever their mode is."""
    unshare = ["unshare", "--user", "--map-root-user"]
    done = granted(*unshare, granted.programs / "losetup", "-f", "--show", "-P", granted.folder / "image")
    device = done.out.strip()
    add(device, 1, MIB, MIB)
    window(granted, device, 1)


def test_windows_are_there_with_the_answer(box: Box) -> None:
    """Of a kernel that reads tables; of another none is there, and none is made up."""
    image = box.folder / "image"
    subprocess.run(["sfdisk", "-q", image], input="2048,1024\n4096,1024\n", text=True, check=True)
    device = box.attach("-P", image)
    found = {name for name in os.listdir(f"/sys/block/{Path(device).name}") if name.startswith(Path(device).name)}
    folder = node(box, device, 1).parent
    there = {path.name for path in folder.iterdir() if path.name.startswith(f"{Path(device).name}p")}
    assert {name for name in there if (folder / name).is_block_device()} == found


# Nothing is lost, and nothing left ---------------------------------------------------------------------------------


@pytest.fixture(name="kept", params=[True, False], ids=["grant", "own /dev"])
def kept_fixture(
    request: pytest.FixtureRequest, start_kept: Callable[..., Kept], stand_ins: Path, tmp_path: Path
) -> Iterator[Box]:
    """A box whose loopd is started again when it was killed, with what it had stored."""
    yield from make_box(start_kept, tmp_path, stand_ins, grant=request.param)


def test_windows_outlive_the_daemon(kept: Box) -> None:
    daemon = kept.daemon
    assert isinstance(daemon, Kept)
    device = kept.attach("-P", kept.folder / "image")
    add(device, 1, MIB, MIB)
    add(device, 2, 2 * MIB, MIB)
    names = [window(kept, device, number) for number in (1, 2)]
    inode = node(kept, device, 1).stat().st_ino
    with daemon.outage():
        delete(device, 2)
    eventually(lambda: not node(kept, device, 2).exists(), "what changed meanwhile is seen")
    assert (window(kept, device, 1), node(kept, device, 1).stat().st_ino) == (names[0], inode)
    eventually(lambda: not exists(names[1]), "its device is gone")
    assert sorted(daemon.in_store()) == sorted([Path(device).name, names[0]])
    daemon.kill()
    add(device, 2, 2 * MIB, MIB)
    window(kept, device, 2)
    assert kept.losetup("-d", device).code == 0
    daemon.end()


def test_a_window_without_its_node_gets_it(kept: Box) -> None:
    """A worker that is killed between the bind and the node has left the window as it is here."""
    daemon = kept.daemon
    assert isinstance(daemon, Kept)
    device = kept.attach("-P", kept.folder / "image")
    add(device, 1, MIB, MIB)
    name, path = window(kept, device, 1), node(kept, device, 1)
    grant = kept.folder.parent / "grants/0-box"  # which the box has read-only
    with daemon.outage():
        (grant / path.name if path.parent.name == "loopd" else path).unlink()
    assert window(kept, device, 1) == name
    assert kept.losetup("-d", device).code == 0
    eventually(lambda: not path.exists(), "the node goes with the window")
    daemon.end()


def test_two_windows_of_one_partition(kept: Box) -> None:
    """A daemon was killed while the first could not be let go of, and the second was there. One of the two stays."""
    daemon = kept.daemon
    assert isinstance(daemon, Kept)
    device = kept.attach("-P", kept.folder / "image")
    add(device, 1, MIB, MIB)
    name, path = window(kept, device, 1), node(kept, device, 1)
    other = Path(kept.attach(kept.folder / "image")).name
    with daemon.outage():
        for record in daemon.records_in_store():
            if record.fields["binding"]["devname"] == other:
                record.fields["kept_by"] = "disk"
                record.fields["binding"]["window"] = path.name
                for fd in [record.fds.pop(each) for each in ("keeper", "reply", "cgroup") if each in record.fds]:
                    os.close(fd)
                record.fields["fds"] = [*record.fds]
                record.write()
            record.close()
            record.slot.close()
    eventually(lambda: len(daemon.leases()) == 2, "the disk and one window")
    eventually(lambda: not (exists(other) and exists(name)), "the device of the other")
    eventually(lambda: window(kept, device, 1) in daemon.leases(), "its node leads to it")
    assert kept.losetup("-d", device).code == 0
    daemon.end()


def test_on_a_device_attached_without_partscan(kept: Box) -> None:
    """They come once somebody asks, and go on coming after a restart."""
    daemon = kept.daemon
    assert isinstance(daemon, Kept)
    device = kept.attach(kept.folder / "image")
    add(device, 1, MIB, MIB)
    stays(lambda: not node(kept, device, 1).exists(), 0.3, "nobody has asked")
    if node(kept, device, 1).parent.name == "loopd":
        of_grant(kept, lambda grant: wire.Rescan(Path(device).name, 1, dir_fd=grant))
    else:
        kept("partprobe", device)
    add(device, 1, MIB, MIB)
    name = window(kept, device, 1)
    daemon.kill()
    add(device, 2, 2 * MIB, MIB)
    window(kept, device, 2)
    assert window(kept, device, 1) == name
    assert kept.losetup("-d", device).code == 0
    daemon.end()


def test_killed_at_any_time(kept: Box) -> None:
    """At some moment of an attach, of windows that come, or of a release: nothing is left in the end."""
    daemon = kept.daemon
    assert isinstance(daemon, Kept)
    assert kept.losetup("-a").code == 0
    devices: list[str] = []
    for turn in range(12):
        killer = threading.Timer(0.02 + turn * 0.02, os.kill, (daemon.pid, signal.SIGKILL))
        killer.start()
        attached = kept.losetup("-f", "--show", "-P", kept.folder / "image")
        here = attached.out.split()
        for device in here:
            with contextlib.suppress(OSError):
                add(device, 1, MIB, MIB)
                add(device, 2, 2 * MIB, MIB)
            kept.losetup("-d", device)
        killer.join()
        eventually(lambda: daemon.ready, "the next daemon", 30)
        for device in here:
            kept.losetup("-d", device)
        devices += here
        eventually(lambda: not bound_to(kept.folder), f"nothing is bound after turn {turn}")
    assert devices
    eventually(lambda: not daemon.leases(), "no lease")
    folder = node(kept, "/dev/loop0", 1).parent
    assert not [path for path in folder.iterdir() if path.is_block_device() and path.name.startswith("loop")]
    daemon.end()


# In a grant that owns numbers -------------------------------------------------------------------------------------


def test_a_window_has_a_number_of_its_grant(granted: Box) -> None:
    own = set(granted.daemon.ask(wire.Directory("box", 0), []).fields["numbers"])
    device = granted.attach("-P", granted.folder / "image")
    for number in range(1, 8):
        add(device, number, number * MIB // 2, MIB // 4)
    names = {window(granted, device, number) for number in range(1, 8)} | {Path(device).name}
    assert {int(name[4:]) for name in names} == own
    add(device, 8, 0, MIB // 4)
    stays(lambda: not node(granted, device, 8).exists(), 0.5, "the grant has no more numbers")
    assert granted.losetup("-f", granted.folder / "image").code == 1
    delete(device, 1)
    window(granted, device, 8)
    assert granted.losetup("-d", device).code == 0
    again = granted.attach("-P", granted.folder / "image")
    add(again, 1, MIB, MIB)
    assert {int(window(granted, again, 1)[4:]), int(Path(again).name[4:])} <= own


def test_a_window_that_was_gone_and_is_in_use_keeps_the_disk_busy(granted: Box) -> None:
    device = granted.attach("-P", granted.folder / "image")
    mounted(granted, device)
    delete(device, 1)
    eventually(lambda: not node(granted, device, 1).exists(), "the node")
    assert detached(granted, Path(device).name).fields["state"] == "busy"
    assert granted("umount", "m").code == 0
    eventually(lambda: not bound_to(granted.folder), "nothing is left")
    eventually(lambda: not exists(Path(device).name), "nor the disk's device")


def test_a_window_that_failed_is_tried_again(make: Callable[[str], Box]) -> None:
    """The second disk has the last number; when the first is gone there is one for its partition."""
    box = make("limits.devices = 2\n")
    (box.folder / "other").write_bytes(bytes(4 * MIB))
    first, second = box.attach(box.folder / "image"), box.attach("-P", box.folder / "other")
    add(second, 1, MIB, MIB)

    def told() -> bool:
        return any("partition without a device" in record["MESSAGE"] for record in box.daemon.records("warned"))

    eventually(told, "there is no room for its window")
    assert box.losetup("-d", first).code == 0
    window(box, second, 1)


def test_a_disk_waits_for_its_windows_over_a_restart(kept: Box) -> None:
    daemon = kept.daemon
    assert isinstance(daemon, Kept)
    device = kept.attach("-P", kept.folder / "image")
    name = mounted(kept, device)
    assert kept.losetup("-d", device).code == 0
    both = {Path(device).name: "held", name: "held"}
    eventually(lambda: {each: row["state"] for each, row in daemon.leases().items()} == both, "both are held")
    daemon.kill()
    eventually(lambda: {each: row["state"] for each, row in daemon.leases().items()} == both, "and after the restart")
    assert kept("umount", "m").code == 0
    eventually(lambda: not daemon.leases(), "nothing is left")
    daemon.end()
