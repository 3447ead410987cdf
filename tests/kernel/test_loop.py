"""loopd.loop against the real kernel: real devices, real files, as root.

Nothing here assumes a device number. Every device is bound with autoclear and closed again; what is not is
cleared by the fixtures.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import pickle
import shutil
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from loopd import loop

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    MakeFile = Callable[..., int]
    Bind = Callable[..., loop.Loop]

MIB = 1 << 20
PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")
ROOT = Path(__file__).resolve().parents[2]
NOBODY = 65534

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/dev/loop-control").exists(),
    reason="needs root and /dev/loop-control",
)


class Control(loop.LoopControl):
    """Remembers the numbers it was given, to tell the devices that a test made from those of others"""

    def __init__(self) -> None:
        super().__init__()
        self.before = numbers()
        self.given: list[int] = []

    def add(self, minor: int = -1) -> int:
        self.given.append(super().add(minor))
        return self.given[-1]

    def get_unbound(self) -> int:
        self.given.append(super().get_unbound())
        return self.given[-1]

    def add_apart(self) -> int:
        """A new device that no `get_unbound` names while there is another"""
        for number in range(3000, 2**20):
            try:
                return self.add(number)
            except FileExistsError:
                continue
        raise AssertionError("no number is free")


@pytest.fixture
def control() -> Iterator[Control]:
    with Control() as control:
        yield control
    remove_devices(set(control.given) - control.before)


@pytest.fixture
def make_file(tmp_path: Path) -> Iterator[MakeFile]:
    """Makes files on the disk's file system and gives them open; `make_file(size=MIB, flags=os.O_RDWR)`."""
    with contextlib.ExitStack() as stack:

        def make(size: int = MIB, flags: int = os.O_RDWR) -> int:
            path = tmp_path / f"image{len(list(tmp_path.iterdir()))}"
            with path.open("wb") as file:
                file.truncate(size)
            fd = os.open(path, flags | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            return fd

        yield make


@pytest.fixture
def fd(make_file: MakeFile) -> int:
    return make_file()


@pytest.fixture
def bind(control: Control) -> Iterator[Bind]:
    """LoopControl.loop_for_fd, with autoclear unless told otherwise, and unbound after the test"""
    with contextlib.ExitStack() as stack:

        def make(fd: int, **arguments: Any) -> loop.Loop:
            lo = control.loop_for_fd(fd, **{"autoclear": True, **arguments})
            stack.callback(unbind, lo)
            return lo

        yield make


@pytest.fixture
def unbound(control: Control) -> Iterator[loop.Loop]:
    """An open, unbound device that others do not find as long as there is one with a lower number"""
    with loop.Loop(control.add_apart()) as lo:
        yield lo
        with contextlib.suppress(OSError):
            lo.clear_fd()


def unbind(lo: loop.Loop) -> None:
    if lo.fd < 0:
        return
    for number in lo.partitions():
        lo.delete_partition(number)
    with contextlib.suppress(OSError):
        lo.clear_fd()
    lo.close()


def numbers() -> set[int]:
    names = (path.name[len("loop") :] for path in Path("/sys/block").glob("loop*"))
    return {int(name) for name in names if name.isdigit()}


def remove_devices(which: set[int]) -> None:
    """Remove devices that a test made, unless another program has taken one meanwhile"""
    with loop.LoopControl() as control:
        for number in which:
            deadline = time.monotonic() + 2
            while True:
                try:
                    control.remove(number)
                except OSError as error:
                    if error.errno == errno.EBUSY and time.monotonic() < deadline:
                        time.sleep(0.01)
                        continue
                break


def node(lo: loop.Loop) -> str:
    return f"/dev/loop{lo.minor}"


def wait_until(condition: Callable[[], bool], seconds: float = 2) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def open_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def errno_of_child(call: Callable[[], object]) -> int:
    """The errno that `call` fails with in a process of its own, 0 if it succeeds"""
    pid = os.fork()
    if pid == 0:
        code = 255
        try:
            call()
            code = 0
        except OSError as error:
            code = error.errno or 255
        finally:
            os._exit(code)
    return os.WEXITSTATUS(os.waitpid(pid, 0)[1])


def as_nobody(call: Callable[[], object]) -> int:
    """The same in a process without privilege"""

    def unprivileged() -> None:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        call()

    return errno_of_child(unprivileged)


def losetup(lo: loop.Loop) -> dict[str, Any]:
    """What util-linux, which has its own idea of the structures, says of the device"""
    if shutil.which("losetup") is None:
        pytest.skip("needs losetup of util-linux")
    columns = "OFFSET,SIZELIMIT,AUTOCLEAR,RO,PARTSCAN,DIO,LOG-SEC,BACK-INO,BACK-FILE"
    done = subprocess.run(["losetup", "--json", "--list", "-O", columns, node(lo)], stdout=subprocess.PIPE, check=True)
    device: dict[str, Any] = json.loads(done.stdout)["loopdevices"][0]
    return device


# -- what a program written for the ancestor does --


def test_attributes_and_constants_that_programs_use() -> None:
    assert (loop.Loop.LOOP_MAJOR, loop.LOOP_MAJOR) == (7, 7)
    flags = {"READ_ONLY": 1, "AUTOCLEAR": 4, "PARTSCAN": 8, "DIRECT_IO": 16}
    for name, value in flags.items():
        assert getattr(loop, f"LO_FLAGS_{name}") == getattr(loop.Loop, f"LO_FLAGS_{name}") == value
    ioctls = {
        "SET_FD": 0,
        "CLR_FD": 1,
        "SET_STATUS64": 4,
        "GET_STATUS64": 5,
        "CHANGE_FD": 6,
        "SET_CAPACITY": 7,
    }
    ioctls.update({"SET_DIRECT_IO": 8, "SET_BLOCK_SIZE": 9, "CONFIGURE": 10})
    for name, value in ioctls.items():
        assert getattr(loop.Loop, f"LOOP_{name}") == 0x4C00 + value
    for name, value in {"ADD": 0, "REMOVE": 1, "GET_FREE": 2}.items():
        assert getattr(loop.LoopControl, f"LOOP_CTL_{name}") == 0x4C80 + value


def test_bind_write_clear_read_back(control: Control, make_file: MakeFile) -> None:
    fd = make_file(1024)
    other = make_file(1024)
    lo = control.loop_for_fd(fd, autoclear=True)
    try:
        assert lo.devname == f"loop{lo.minor}"
        assert lo.is_bound_to(fd)
        info = lo.get_status()
        assert info.lo_inode == os.fstat(fd).st_ino
        assert info.lo_number == lo.minor
        assert info.is_bound_to(os.fstat(fd))
        assert not info.is_bound_to(os.fstat(other))
        assert info.autoclear
        lo.set_status(autoclear=False)
        assert not lo.get_status().autoclear
        with open(node(lo), "wb") as device:
            device.write(b"seven bytes")
        lo.flush_buf()
        lo.clear_fd()
    finally:
        unbind(lo)
    assert os.pread(fd, 11, 0) == b"seven bytes"
    assert wait_until(lambda: loop.backing_file(lo.minor) is None)


def test_set_fd_then_set_status(control: Control, fd: int) -> None:
    """The old, two-step way, which has no race to lose on a device that nobody else finds"""
    with loop.Loop(control.add_apart()) as lo:
        lo.set_fd(fd)
        lo.set_status(offset=4096, sizelimit=8192, autoclear=True)
        assert (lo.size(), lo.get_status().lo_offset, lo.get_status().lo_sizelimit) == (8192, 4096, 8192)
        with pytest.raises(OSError, match="LOOP_SET_FD") as caught:
            lo.set_fd(fd)
        assert caught.value.errno == errno.EBUSY


def test_the_service_pattern(control: Control, fd: int, tmp_path: Path) -> None:
    """setup and on_close hold a lock file; mknod through an O_PATH fd; flush, wait, close in the end"""
    held: list[int] = []

    def setup(lo: loop.Loop) -> None:
        held.append(os.makedev(lo.LOOP_MAJOR, lo.minor))
        lo.on_close = lambda _lo: held.pop()

    lo = control.loop_for_fd(fd, lock=True, setup=setup, offset=512, sizelimit=MIB // 2, partscan=False, autoclear=True)
    directory = os.open(tmp_path, os.O_CLOEXEC | os.O_PATH)
    try:
        assert held == [lo.rdev]
        lo.mknod(directory)
        assert (tmp_path / lo.devname).is_block_device()
        control.close()
        lo.flush_buf()
        lo.clear_fd_wait(fd, 30)
    finally:
        os.close(directory)
        lo.close()
    assert held == []


# -- opening --


def test_open_by_number(unbound: loop.Loop) -> None:
    with loop.Loop(unbound.minor) as lo:
        assert (lo.minor, lo.devname, lo.rdev) == (unbound.minor, unbound.devname, unbound.rdev)
        assert os.fstat(lo.fd).st_rdev == lo.rdev == os.stat(node(lo)).st_rdev
        assert lo.fileno() == lo.fd
        assert not os.get_inheritable(lo.fd)
        assert fcntl.fcntl(lo.fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR


def test_open_in_a_directory(unbound: loop.Loop, tmp_path: Path) -> None:
    os.mknod(tmp_path / unbound.devname, stat.S_IFBLK | 0o600, unbound.rdev)
    directory = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with loop.Loop(unbound.minor, directory) as lo:
            assert lo.rdev == unbound.rdev
        with loop.Loop(unbound.minor, dir_fd=directory) as lo:
            assert lo.rdev == unbound.rdev
    finally:
        os.close(directory)


def test_directory_zero_is_a_directory(unbound: loop.Loop, tmp_path: Path) -> None:
    """File descriptor 0 is not taken for «none given»: the empty directory is searched, not /dev"""

    def open_there() -> None:
        os.dup2(directory, 0)
        loop.Loop(unbound.minor, 0)

    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        assert errno_of_child(open_there) == errno.ENOENT
    finally:
        os.close(directory)


def other_loop(path: Path, lo: loop.Loop, other: loop.Loop) -> None:
    os.mknod(path, stat.S_IFBLK | 0o600, other.rdev)


def regular_file(path: Path, lo: loop.Loop, other: loop.Loop) -> None:
    path.write_bytes(b"")


def character_device(path: Path, lo: loop.Loop, other: loop.Loop) -> None:
    os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))  # /dev/null


@pytest.mark.parametrize("make", [other_loop, regular_file, character_device])
def test_unexpected_device(
    make: Callable[[Path, loop.Loop, loop.Loop], None],
    unbound: loop.Loop,
    bind: Bind,
    fd: int,
    tmp_path: Path,
) -> None:
    place = tmp_path / "dev"
    place.mkdir()
    path = place / unbound.devname
    make(path, unbound, bind(fd))
    directory = os.open(place, os.O_RDONLY)
    before = open_fds()
    try:
        with pytest.raises(loop.UnexpectedDevice) as caught:
            loop.Loop(unbound.minor, directory)
        assert open_fds() == before
    finally:
        os.close(directory)
    found = path.stat()
    error = caught.value
    assert (error.expected_minor, error.rdev, error.mode) == (unbound.minor, found.st_rdev, found.st_mode)
    assert unbound.devname in str(error)
    again = pickle.loads(pickle.dumps(error))
    assert (again.expected_minor, again.rdev, again.mode) == (error.expected_minor, error.rdev, error.mode)


def test_open_follows_no_symlink(unbound: loop.Loop, tmp_path: Path) -> None:
    (tmp_path / unbound.devname).symlink_to(node(unbound))
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(OSError, match="symbolic links") as caught:
            loop.Loop(unbound.minor, directory)
    finally:
        os.close(directory)
    assert caught.value.errno == errno.ELOOP


def test_open_missing(tmp_path: Path) -> None:
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(FileNotFoundError):
            loop.Loop(0, directory)
    finally:
        os.close(directory)


@pytest.mark.parametrize("minor", [-1, 2**20, 2**40])
def test_open_refuses_numbers_that_cannot_be(minor: int) -> None:
    with pytest.raises(ValueError, match="number"):
        loop.Loop(minor)


def test_from_fd_takes_the_fd(bind: Bind, fd: int) -> None:
    lo = bind(fd)
    taken = os.open(node(lo), os.O_RDWR | os.O_CLOEXEC)
    with loop.Loop.from_fd(taken) as again:
        assert (again.fd, again.minor, again.devname, again.rdev) == (taken, lo.minor, lo.devname, lo.rdev)
        assert again.is_bound_to(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(taken)


def test_from_fd_refuses_and_leaves_the_fd(bind: Bind, fd: int) -> None:
    lo = bind(fd)
    lo.add_partition(1, 4096, 8192)
    partition = os.open(f"{node(lo)}p1", os.O_RDONLY | os.O_CLOEXEC)
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    try:
        for wrong in (fd, null, partition):
            with pytest.raises(loop.UnexpectedDevice, match="a loop device") as caught:
                loop.Loop.from_fd(wrong)
            assert caught.value.expected_minor == -1
            os.fstat(wrong)
    finally:
        os.close(partition)
        os.close(null)
    with pytest.raises(OSError, match="Bad file descriptor"):
        loop.Loop.from_fd(null)


# -- closing --

CONTROL_CALLS: dict[str, Callable[[loop.LoopControl], object]] = {
    "add": lambda c: c.add(),
    "remove": lambda c: c.remove(),
    "get_unbound": lambda c: c.get_unbound(),
    "loop_for_fd": lambda c: c.loop_for_fd(0),
    "fileno": lambda c: c.fileno(),
    "supports_configure": loop.supports_configure,
}


def public(of: type) -> set[str]:
    return {name for name in vars(of) if name[0].islower()}


def test_closed_control() -> None:
    control = loop.LoopControl()
    opened = control.fd
    control.close()
    control.close()
    assert control.fd == -1
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened)
    assert set(CONTROL_CALLS) - {"supports_configure"} == public(loop.LoopControl) - {"close"}
    for call in CONTROL_CALLS.values():
        with pytest.raises(RuntimeError, match="closed"):
            call(control)


def test_control_in_a_directory(tmp_path: Path) -> None:
    os.mknod(tmp_path / "loop-control", stat.S_IFCHR | 0o600, os.stat("/dev/loop-control").st_rdev)
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        with loop.LoopControl(directory) as control:
            assert control.get_unbound() >= 0
        (tmp_path / "loop-control").unlink()
        with pytest.raises(FileNotFoundError):
            loop.LoopControl(dir_fd=directory)
    finally:
        os.close(directory)
    with pytest.raises(ValueError, match="file descriptor"):
        loop.LoopControl(-100)


LOOP_CALLS: dict[str, Callable[[loop.Loop], object]] = {
    "fileno": lambda lo: lo.fileno(),
    "configure": lambda lo: lo.configure(0),
    "set_fd": lambda lo: lo.set_fd(0),
    "change_fd": lambda lo: lo.change_fd(0),
    "clear_fd": lambda lo: lo.clear_fd(),
    "clear_fd_wait": lambda lo: lo.clear_fd_wait(0, 1),
    "is_bound_to": lambda lo: lo.is_bound_to(0),
    "get_status": lambda lo: lo.get_status(),
    "set_status": lambda lo: lo.set_status(autoclear=True),
    "set_capacity": lambda lo: lo.set_capacity(),
    "set_direct_io": lambda lo: lo.set_direct_io(),
    "set_block_size": lambda lo: lo.set_block_size(512),
    "size": lambda lo: lo.size(),
    "sector_size": lambda lo: lo.sector_size(),
    "read_only": lambda lo: lo.read_only(),
    "diskseq": lambda lo: lo.diskseq(),
    "partitions": lambda lo: lo.partitions(),
    "add_partition": lambda lo: lo.add_partition(1, 0, 512),
    "delete_partition": lambda lo: lo.delete_partition(1),
    "reread_partitions": lambda lo: lo.reread_partitions(),
    "flock": lambda lo: lo.flock(fcntl.LOCK_UN),
    "flush_buf": lambda lo: lo.flush_buf(),
    "mknod": lambda lo: lo.mknod(0),
}


def test_closed_loop(unbound: loop.Loop) -> None:
    lo = loop.Loop(unbound.minor)
    opened = lo.fd
    lo.close()
    lo.close()
    assert (lo.fd, lo.devname, lo.minor) == (-1, "<closed>", unbound.minor)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened)
    assert set(LOOP_CALLS) == public(loop.Loop) - {"close", "from_fd"}
    for call in LOOP_CALLS.values():
        with pytest.raises(RuntimeError, match="closed"):
            call(lo)
    assert "closed" in repr(lo)


def test_with_closes_and_autoclear_unbinds(control: Control, fd: int) -> None:
    with pytest.raises(KeyError), control.loop_for_fd(fd, autoclear=True) as lo:
        raise KeyError
    assert lo.fd == -1
    assert wait_until(lambda: loop.backing_file(lo.minor) is None)


def test_close_without_autoclear_leaves_the_binding(bind: Bind, fd: int) -> None:
    lo = bind(fd, autoclear=False)
    lo.close()
    with loop.Loop(lo.minor) as again:
        assert again.is_bound_to(fd)
        again.clear_fd()


def test_on_close_is_called_once_with_the_device_open(bind: Bind, fd: int) -> None:
    lo = bind(fd)
    seen: list[bool] = []

    def on_close(closing: loop.Loop) -> None:
        closing.close()
        seen.append(closing.is_bound_to(fd))

    lo.on_close = on_close
    lo.close()
    lo.close()
    assert seen == [True]


def test_on_close_that_raises_does_not_keep_the_device_open(bind: Bind, fd: int) -> None:
    lo = bind(fd)
    opened = lo.fd

    def on_close(_lo: loop.Loop) -> None:
        raise KeyError("mine")

    lo.on_close = on_close
    with pytest.raises(KeyError, match="mine"):
        lo.close()
    assert lo.fd == -1
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened)


# -- configure --


def test_defaults(bind: Bind, fd: int) -> None:
    lo = bind(fd, autoclear=None)
    info = lo.get_status()
    assert (info.lo_flags, info.lo_offset, info.lo_sizelimit, info.ref) == (0, 0, 0, b"")
    assert (lo.size(), lo.sector_size(), lo.read_only()) == (MIB, 512, False)


def test_every_property_at_once(bind: Bind, fd: int) -> None:
    lo = bind(
        fd,
        offset=8192,
        sizelimit=65536,
        blocksize=PAGE_SIZE,
        autoclear=True,
        partscan=True,
        read_only=True,
        direct_io=False,
        ref=b"r" * 63,
    )
    info = lo.get_status()
    assert (info.autoclear, info.partscan, info.read_only, info.direct_io) == (True, True, True, False)
    assert info.lo_flags == loop.LO_FLAGS_AUTOCLEAR | loop.LO_FLAGS_PARTSCAN | loop.LO_FLAGS_READ_ONLY
    assert (info.lo_offset, info.lo_sizelimit) == (8192, 65536)
    assert info.ref == b"r" * 63
    assert info.lo_file_name == b"r" * 63 + b"\0"
    assert (lo.size(), lo.sector_size(), lo.read_only()) == (65536, PAGE_SIZE, True)
    seen = losetup(lo)
    assert seen == {
        "offset": 8192,
        "sizelimit": 65536,
        "autoclear": True,
        "ro": True,
        "partscan": True,
        "dio": False,
        "log-sec": PAGE_SIZE,
        "back-ino": os.fstat(fd).st_ino,
        "back-file": loop.backing_file(lo.minor),
    }


def test_configure_by_position(unbound: loop.Loop, fd: int) -> None:
    unbound.configure(fd, 4096, 16384, 1024, True, True, True)
    info = unbound.get_status()
    assert (info.lo_offset, info.lo_sizelimit, unbound.sector_size()) == (4096, 16384, 1024)
    assert (info.autoclear, info.partscan, info.read_only) == (True, True, True)


@pytest.mark.parametrize("blocksize", [512 << n for n in range(4) if 512 << n <= PAGE_SIZE])
def test_block_sizes(bind: Bind, fd: int, blocksize: int) -> None:
    assert bind(fd, blocksize=blocksize).sector_size() == blocksize


def test_offset_is_where_the_device_starts(bind: Bind, fd: int) -> None:
    os.pwrite(fd, b"here", 4096)
    lo = bind(fd, offset=4096)
    assert os.pread(lo.fd, 4, 0) == b"here"
    assert lo.size() == MIB - 4096
    assert os.pwrite(lo.fd, b"there", 512) == 5
    os.fsync(lo.fd)
    assert os.pread(fd, 5, 4096 + 512) == b"there"


def test_offset_past_the_end_and_a_file_smaller_than_a_sector(bind: Bind, make_file: MakeFile) -> None:
    assert bind(make_file(4096), offset=2**40).size() == 0
    assert bind(make_file(100)).size() == 0
    assert bind(make_file(1000)).size() == 512


def test_largest_window_is_accepted(bind: Bind, fd: int) -> None:
    info = bind(fd, offset=2**63 - 1, sizelimit=2**63 - 1).get_status()
    assert (info.lo_offset, info.lo_sizelimit) == (2**63 - 1, 2**63 - 1)


def test_read_only_file_makes_a_read_only_device(bind: Bind, make_file: MakeFile) -> None:
    lo = bind(make_file(flags=os.O_RDONLY))
    assert lo.read_only()
    assert lo.get_status().read_only
    with pytest.raises(OSError, match="not permitted"):
        os.pwrite(lo.fd, bytes(512), 0)


BAD = {
    "block size not a power of two": {"blocksize": 3000},
    "block size too small": {"blocksize": 256},
    "block size too large": {"blocksize": PAGE_SIZE * 2},
    "block size negative": {"blocksize": -512},
    "block size no number": {"blocksize": "512"},
    "block size no whole number": {"blocksize": 512.5},
    "offset negative": {"offset": -1},
    "offset too large": {"offset": 2**63},
    "offset no whole number": {"offset": 0.5},
    "sizelimit negative": {"sizelimit": -512},
    "sizelimit too large": {"sizelimit": 2**64},
    "ref too long": {"ref": b"r" * 64},
    "ref with NUL": {"ref": b"a\0b"},
}


def uevents(during: Callable[[], object], device: str) -> list[bytes]:
    """The kernel's own messages about `device` that come while `during` runs"""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 15) as listener:  # NETLINK_KOBJECT_UEVENT
        listener.bind((0, 1))
        during()
        listener.settimeout(1)
        messages: list[bytes] = []
        with contextlib.suppress(socket.timeout):
            while not messages:
                message = listener.recv(65536)
                if message.endswith(b"\0") and f"/{device}\0".encode() in message:
                    messages.append(message)
        return messages


@pytest.mark.parametrize("arguments", BAD.values(), ids=BAD.keys())
def test_bad_value_is_refused_before_the_ioctl(
    arguments: dict[str, Any], unbound: loop.Loop, control: Control, fd: int
) -> None:
    seq = unbound.diskseq()
    with pytest.raises(ValueError, match=r"."):
        unbound.configure(fd, **{"read_only": True, **arguments})
    # The kernel counts on even when it refuses: so it was not asked.
    assert unbound.diskseq() == seq
    assert loop.backing_file(unbound.minor) is None
    asked = len(control.given)
    with pytest.raises(ValueError, match=r"."):
        control.loop_for_fd(fd, **arguments)
    assert len(control.given) == asked


def test_device_still_sends_uevents_after_a_refused_block_size(unbound: loop.Loop, fd: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        unbound.configure(fd, blocksize=3000)
    trigger = Path(f"/sys/block/{unbound.devname}/uevent")
    assert uevents(lambda: trigger.write_text("change"), unbound.devname)


def test_einval_has_no_fallback(unbound: loop.Loop, fd: int, tmp_path: Path) -> None:
    """After EINVAL the ancestor bound again the old way, read-write and without the size: here nothing is"""
    with pytest.raises(ValueError, match="block size"):
        unbound.configure(fd, blocksize=3000, read_only=True)
    assert loop.backing_file(unbound.minor) is None
    reader, writer = os.pipe()
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        for wrong in (reader, directory):
            with pytest.raises(OSError, match="LOOP_CONFIGURE") as caught:
                unbound.configure(wrong, read_only=True)
            assert caught.value.errno == errno.EINVAL
            assert loop.backing_file(unbound.minor) is None
    finally:
        for opened in (reader, writer, directory):
            os.close(opened)


def test_configure_bad_fds(unbound: loop.Loop, tmp_path: Path) -> None:
    path_only = os.open(tmp_path, os.O_PATH)
    closed = os.dup(path_only)
    os.close(closed)
    try:
        for wrong in (path_only, closed, unbound.fd):
            with pytest.raises(OSError, match="LOOP_CONFIGURE") as caught:
                unbound.configure(wrong)
            assert caught.value.errno == errno.EBADF
    finally:
        os.close(path_only)


@pytest.mark.parametrize(
    "call",
    [
        lambda lo, wrong: lo.configure(wrong),
        lambda lo, wrong: lo.set_fd(wrong),
        lambda lo, wrong: lo.change_fd(wrong),
        lambda lo, wrong: lo.is_bound_to(wrong),
        lambda lo, wrong: lo.clear_fd_wait(wrong, 0),
        lambda lo, wrong: lo.mknod(wrong),
        lambda lo, wrong: loop.Loop(lo.minor, wrong),
        lambda lo, wrong: loop.Loop.from_fd(wrong),
    ],
    ids=["configure", "set_fd", "change_fd", "is_bound_to", "clear_fd_wait", "mknod", "Loop", "from_fd"],
)
@pytest.mark.parametrize("wrong", [-1, -100, 2**31])
def test_no_fd_at_all(call: Callable[[loop.Loop, int], object], wrong: int, unbound: loop.Loop) -> None:
    with pytest.raises(ValueError, match="file descriptor"):
        call(unbound, wrong)


def test_configure_a_bound_device(bind: Bind, make_file: MakeFile) -> None:
    mine, other = make_file(), make_file()
    lo = bind(mine)
    seq = lo.diskseq()
    with pytest.raises(OSError, match="LOOP_CONFIGURE") as caught:
        lo.configure(other)
    assert caught.value.errno == errno.EBUSY
    assert lo.is_bound_to(mine)
    assert lo.diskseq() == seq


def test_loop_on_loop(bind: Bind, fd: int) -> None:
    inner = bind(fd, offset=4096)
    outer = bind(inner.fd, offset=4096)
    assert outer.get_status().lo_rdevice == inner.rdev
    assert outer.size() == MIB - 8192
    assert os.pwrite(outer.fd, b"deep", 0) == 4
    os.fsync(outer.fd)
    assert os.pread(fd, 4, 8192) == b"deep"


def test_supports_configure(control: Control) -> None:
    before = open_fds()
    assert loop.supports_configure(control)
    assert open_fds() == before


def test_supports_configure_harms_no_bound_device(bind: Bind, fd: int) -> None:
    """The question it asks, put to a device that is bound"""
    lo = bind(fd, read_only=True)
    seq, info = lo.diskseq(), lo.get_status()
    assert loop._knows_configure(lo.fd)
    assert (lo.diskseq(), lo.get_status()) == (seq, info)


def test_supports_configure_without_a_node(control: Control, tmp_path: Path) -> None:
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(FileNotFoundError):
            loop.supports_configure(control, directory)
    finally:
        os.close(directory)


# -- status --


def test_status_of_an_unbound_device(unbound: loop.Loop, fd: int) -> None:
    with pytest.raises(OSError, match="LOOP_GET_STATUS64") as caught:
        unbound.get_status()
    assert caught.value.errno == errno.ENXIO
    assert not unbound.is_bound_to(fd)
    for call in (unbound.clear_fd, unbound.set_capacity, unbound.set_status, unbound.set_direct_io):
        with pytest.raises(OSError, match="LOOP_") as caught:
            call()
        assert caught.value.errno == errno.ENXIO


def test_is_bound_to_tells_files_apart(bind: Bind, make_file: MakeFile) -> None:
    mine, other = make_file(), make_file()
    lo = bind(mine)
    again = os.open(f"/proc/self/fd/{mine}", os.O_RDONLY)
    try:
        assert lo.is_bound_to(again)
    finally:
        os.close(again)
    assert not lo.is_bound_to(other)
    with pytest.raises(OSError, match="Bad file descriptor"):
        lo.is_bound_to(again)


def test_set_status_changes_what_it_is_told(bind: Bind, fd: int) -> None:
    lo = bind(fd, offset=4096, sizelimit=8192, ref=b"kept")
    lo.set_status()
    assert (lo.get_status().lo_offset, lo.size()) == (4096, 8192)
    lo.set_status(offset=512)
    assert (lo.get_status().lo_offset, lo.size()) == (512, 8192)
    lo.set_status(sizelimit=0)
    assert lo.size() == MIB - 512
    lo.set_status(offset=0)
    assert (lo.get_status().lo_offset, lo.size()) == (0, MIB)
    lo.set_status(sizelimit=512)
    assert lo.size() == 512
    lo.set_status(autoclear=False, partscan=True, read_only=False)
    info = lo.get_status()
    assert (info.autoclear, info.partscan, info.read_only, info.ref) == (False, True, False, b"kept")
    lo.set_status(autoclear=True)
    assert lo.get_status().autoclear


def test_set_status_refuses_what_the_kernel_would_ignore(bind: Bind, make_file: MakeFile) -> None:
    writable, fixed = bind(make_file(), partscan=True), bind(make_file(), read_only=True)
    refused: list[tuple[loop.Loop, dict[str, bool]]] = [
        (writable, {"read_only": True}),
        (writable, {"partscan": False}),
        (fixed, {"read_only": False}),
    ]
    for lo, arguments in refused:
        before = lo.get_status()
        with pytest.raises(ValueError, match="bound"):
            lo.set_status(offset=512, **arguments)
        assert lo.get_status() == before
    writable.set_status(read_only=False, partscan=True)
    fixed.set_status(read_only=True)


@pytest.mark.parametrize("arguments", [{"offset": -1}, {"offset": 2**63}, {"sizelimit": -1}, {"sizelimit": 2**63}])
def test_set_status_bad_values(bind: Bind, fd: int, arguments: dict[str, Any]) -> None:
    lo = bind(fd)
    before = lo.get_status()
    with pytest.raises(ValueError, match="whole number"):
        lo.set_status(**arguments)
    assert lo.get_status() == before


def test_info_is_what_the_kernel_wrote() -> None:
    info = loop.LoopInfo(1, 2, 3, 4, 5, 6, 0, 0, 4, b"name".ljust(64, b"\0"), b"c" * 64, b"k" * 32, (2**64 - 1, 8))
    assert loop._unpack_info(loop._pack_info(info)) == info
    assert len(loop._pack_info(info)) == 232  # sizeof(struct loop_info64)
    assert info.ref == b"name"
    assert loop.LoopInfo(lo_file_name=b"f" * 64).ref == b"f" * 64
    assert not loop.LoopInfo().autoclear


# -- unbinding --


def test_clear_fd(bind: Bind, fd: int) -> None:
    lo = bind(fd, autoclear=False)
    lo.clear_fd()
    assert not lo.is_bound_to(fd)
    with pytest.raises(OSError, match="LOOP_CLR_FD") as caught:
        lo.clear_fd()
    assert caught.value.errno == errno.ENXIO
    lo.close()
    assert wait_until(lambda: loop.backing_file(lo.minor) is None)


def test_clear_fd_wait_alone(bind: Bind, fd: int) -> None:
    lo = bind(fd, autoclear=False)
    lo.clear_fd_wait(fd, 0)
    assert not lo.is_bound_to(fd)
    # Either the file is free, or nobody but `lo` holds the device and nobody else can open it.
    if loop.backing_file(lo.minor) is not None:
        with pytest.raises(OSError, match=node(lo)) as caught:
            loop.Loop(lo.minor)
        assert caught.value.errno == errno.ENXIO
    lo.clear_fd_wait(fd, 0)
    lo.close()
    assert wait_until(lambda: loop.backing_file(lo.minor) is None)


def test_clear_fd_wait_for_another_opener(bind: Bind, fd: int) -> None:
    lo = bind(fd, autoclear=False)
    with loop.Loop(lo.minor) as other:
        started = time.monotonic()
        with pytest.raises(TimeoutError, match=lo.devname):
            lo.clear_fd_wait(fd, 0.1, 5)
        assert 0.1 <= time.monotonic() - started < 1
        assert lo.is_bound_to(fd)
        assert lo.get_status().autoclear
        timer = threading.Timer(0.25, other.close)
        timer.start()
        try:
            lo.clear_fd_wait(fd, 5, 0.01)
        finally:
            timer.join()
        assert time.monotonic() - started < 4
        assert not lo.is_bound_to(fd)


def test_clear_fd_wait_for_an_open_partition(bind: Bind, fd: int) -> None:
    lo = bind(fd)
    lo.add_partition(1, 4096, 8192)
    partition = os.open(f"{node(lo)}p1", os.O_RDONLY | os.O_CLOEXEC)
    try:
        with pytest.raises(TimeoutError):
            lo.clear_fd_wait(fd, 0.05, 0.01)
    finally:
        os.close(partition)
    lo.delete_partition(1)
    lo.clear_fd_wait(fd, 1, 0.01)


def test_clear_fd_wait_leaves_a_strangers_binding(bind: Bind, make_file: MakeFile) -> None:
    theirs, mine = make_file(), make_file()
    lo = bind(theirs, autoclear=False)
    lo.clear_fd_wait(mine, 5)
    assert lo.is_bound_to(theirs)
    assert not lo.get_status().autoclear


def test_no_error_is_swallowed(bind: Bind, fd: int) -> None:
    """Only ENXIO means «not bound»"""
    lo = bind(fd)
    gone = os.dup(fd)
    os.close(gone)
    for call in (lambda: lo.clear_fd_wait(gone, 5), lambda: lo.is_bound_to(gone)):
        with pytest.raises(OSError, match="Bad file descriptor"):
            call()
    assert lo.is_bound_to(fd)
    broken = loop.Loop(lo.minor)
    kept = os.dup(broken.fd)
    os.close(broken.fd)
    try:
        for call in (lambda: broken.clear_fd_wait(fd, 5), lambda: broken.is_bound_to(fd)):
            with pytest.raises(OSError, match="LOOP_GET_STATUS64") as caught:
                call()
            assert caught.value.errno == errno.EBADF
    finally:
        os.dup2(kept, broken.fd, inheritable=False)
        os.close(kept)
        broken.close()


def test_backing_file(bind: Bind, unbound: loop.Loop, fd: int) -> None:
    path = os.readlink(f"/proc/self/fd/{fd}")
    lo = bind(fd)
    assert loop.backing_file(lo.minor) == path
    os.unlink(path)
    assert loop.backing_file(lo.minor) == f"{path} (deleted)"
    assert loop.backing_file(unbound.minor) is None
    assert loop.backing_file(max(numbers()) + 1) is None
    with pytest.raises(ValueError, match="number"):
        loop.backing_file(-1)


# -- properties of a bound device --


def test_change_fd(bind: Bind, make_file: MakeFile) -> None:
    first, second = make_file(), make_file()
    os.pwrite(second, b"second", 0)
    lo = bind(first, read_only=True)
    seq = lo.diskseq()
    lo.change_fd(second)
    assert lo.is_bound_to(second)
    assert lo.read_only()
    assert os.pread(lo.fd, 6, 0) == b"second"
    assert seq is None or lo.diskseq() != seq


def test_change_fd_refusals(bind: Bind, unbound: loop.Loop, make_file: MakeFile) -> None:
    fd, same_size, larger = make_file(), make_file(), make_file(2 * MIB)
    for lo, wrong in ((bind(fd, read_only=True), larger), (bind(fd), same_size)):
        with pytest.raises(OSError, match="LOOP_CHANGE_FD") as caught:
            lo.change_fd(wrong)
        assert caught.value.errno == errno.EINVAL
        assert lo.is_bound_to(fd)
    with pytest.raises(OSError, match="LOOP_CHANGE_FD") as caught:
        unbound.change_fd(fd)
    assert caught.value.errno == errno.ENXIO


def test_set_capacity(bind: Bind, fd: int) -> None:
    lo = bind(fd)
    os.ftruncate(fd, 3 * MIB)
    assert lo.size() == MIB
    lo.set_capacity()
    assert lo.size() == 3 * MIB
    os.ftruncate(fd, 512)
    lo.set_capacity()
    assert lo.size() == 512


def test_set_block_size(bind: Bind, fd: int) -> None:
    lo = bind(fd)
    lo.set_block_size(PAGE_SIZE)
    assert lo.sector_size() == PAGE_SIZE
    for wrong in (0, 511, 1536, PAGE_SIZE * 2, -512):
        with pytest.raises(ValueError, match="power of two"):
            lo.set_block_size(wrong)
    assert lo.sector_size() == PAGE_SIZE


def test_set_block_size_under_an_exclusive_opener(bind: Bind, fd: int) -> None:
    lo = bind(fd)
    owner = os.open(node(lo), os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
    try:
        with pytest.raises(OSError, match="LOOP_SET_BLOCK_SIZE") as caught:
            lo.set_block_size(1024)
    finally:
        os.close(owner)
    assert caught.value.errno == errno.EBUSY
    assert lo.sector_size() == 512


def test_direct_io(bind: Bind, fd: int) -> None:
    try:
        os.close(os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_DIRECT))
    except OSError as error:
        pytest.skip(f"the temporary directory's file system has no direct I/O: {error}")
    lo = bind(fd, blocksize=PAGE_SIZE)
    assert not lo.get_status().direct_io
    lo.set_direct_io()
    assert lo.get_status().direct_io
    assert losetup(lo)["dio"]
    assert os.pwrite(lo.fd, b"direct", 0) == 6
    os.fsync(lo.fd)
    assert os.pread(fd, 6, 0) == b"direct"
    lo.set_direct_io(False)
    assert not lo.get_status().direct_io
    lo.close()
    assert bind(fd, blocksize=PAGE_SIZE, direct_io=True).get_status().direct_io


def test_direct_io_that_cannot_be(bind: Bind, fd: int) -> None:
    """An odd offset rules it out: silently when asked for with the bind, with EINVAL later"""
    lo = bind(fd, offset=1, direct_io=True)
    assert not lo.get_status().direct_io
    with pytest.raises(OSError, match="LOOP_SET_DIRECT_IO") as caught:
        lo.set_direct_io(True)
    assert caught.value.errno == errno.EINVAL


def test_diskseq_names_the_binding(unbound: loop.Loop, fd: int) -> None:
    fresh = unbound.diskseq()
    if fresh is None:
        pytest.skip("needs Linux 5.15 for diskseq")
    unbound.configure(fd, autoclear=True)
    seq = unbound.diskseq()
    assert seq is not None
    assert seq > fresh
    assert Path(f"/sys/block/{unbound.devname}/diskseq").read_text() == f"{seq}\n"
    with loop.Loop(unbound.minor) as again:
        assert again.diskseq() == seq
    assert unbound.diskseq() == seq


# -- partitions --


def test_partitions(bind: Bind, fd: int) -> None:
    lo = bind(fd)
    assert lo.partitions() == []
    lo.add_partition(10, 512 * 1024, 65536)
    lo.add_partition(2, 4096, 8192)
    assert lo.partitions() == [2, 10]
    os.pwrite(fd, b"partition two", 4096)
    with open(f"{node(lo)}p2", "rb") as partition:
        assert partition.read(13) == b"partition two"
        assert partition.seek(0, os.SEEK_END) == 8192
        with pytest.raises(OSError, match="BLKPG") as caught:
            lo.delete_partition(2)
        assert caught.value.errno == errno.EBUSY
    lo.delete_partition(2)
    assert lo.partitions() == [10]
    assert not os.path.exists(f"{node(lo)}p2")
    lo.delete_partition(10)
    assert lo.partitions() == []


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ((1, 1 << 19, 512), errno.EBUSY),  # there is one
        ((2, 1 << 19, 512), errno.EBUSY),  # overlap
        ((2, 100, 512), errno.EINVAL),  # no multiple of the block size
        ((2, 0, 2 * MIB), errno.EINVAL),  # larger than the device
        ((1000, 0, 512), errno.EINVAL),  # a number no disk can have
    ],
)
def test_add_partition_refusals(bind: Bind, fd: int, arguments: tuple[int, int, int], code: int) -> None:
    lo = bind(fd)
    lo.add_partition(1, 1 << 19, 65536)
    with pytest.raises(OSError, match="BLKPG") as caught:
        lo.add_partition(*arguments)
    assert caught.value.errno == code
    assert lo.partitions() == [1]


def test_partition_numbers_that_cannot_be(bind: Bind, fd: int) -> None:
    lo = bind(fd)
    for arguments in ((0, 0, 512), (-1, 0, 512), (1, -512, 512), (1, 0, 0), (1, 0, -1), (1, 2**63, 512)):
        with pytest.raises(ValueError, match=r"."):
            lo.add_partition(*arguments)
    with pytest.raises(ValueError, match="partition number"):
        lo.delete_partition(0)
    with pytest.raises(OSError, match="BLKPG") as caught:
        lo.delete_partition(7)
    assert caught.value.errno == errno.ENXIO


def test_reread_partitions(bind: Bind, make_file: MakeFile) -> None:
    lo = bind(make_file(), partscan=True)
    lo.add_partition(1, 4096, 8192)
    with open(f"{node(lo)}p1", "rb"), pytest.raises(OSError, match="BLKRRPART") as caught:
        lo.reread_partitions()
    assert caught.value.errno == errno.EBUSY
    # The file has no partition table: what BLKPG made is gone after the kernel has looked.
    lo.reread_partitions()
    assert lo.partitions() == []
    without = bind(make_file())
    with pytest.raises(OSError, match="BLKRRPART") as caught:
        without.reread_partitions()
    assert caught.value.errno == errno.EINVAL


def test_what_needs_privilege_says_eacces(bind: Bind, fd: int) -> None:
    lo = bind(fd, partscan=True)
    lo.add_partition(1, 4096, 8192)
    assert as_nobody(lambda: lo.add_partition(2, 65536, 8192)) == errno.EACCES
    assert as_nobody(lambda: lo.delete_partition(1)) == errno.EACCES
    assert as_nobody(lo.reread_partitions) == errno.EACCES
    assert as_nobody(lo.flush_buf) == errno.EACCES
    assert lo.partitions() == [1]
    for call in (lo.size, lo.sector_size, lo.diskseq, lo.read_only, lo.get_status, lo.partitions):
        assert as_nobody(call) == 0


def test_what_needs_a_writable_device_says_eperm(bind: Bind, fd: int) -> None:
    lo = bind(fd)
    with loop.Loop.from_fd(os.open(node(lo), os.O_RDONLY | os.O_CLOEXEC)) as reader:
        for call in (reader.set_capacity, reader.set_direct_io, lambda: reader.set_status(offset=512)):
            assert as_nobody(call) == errno.EPERM
        assert as_nobody(lambda: reader.set_block_size(1024)) == errno.EPERM
    assert (lo.get_status().lo_offset, lo.sector_size()) == (0, 512)


# -- lock, cache, node --


def test_lock_is_held_until_close(bind: Bind, fd: int) -> None:
    lo = bind(fd, lock=True)
    with loop.Loop(lo.minor) as other:
        for op in (fcntl.LOCK_EX, fcntl.LOCK_SH):
            with pytest.raises(BlockingIOError):
                other.flock(op | fcntl.LOCK_NB)
        lo.close()
        other.flock(fcntl.LOCK_EX | fcntl.LOCK_NB)
        other.clear_fd()


def test_unlocked_unless_asked(bind: Bind, fd: int) -> None:
    lo = bind(fd)
    with loop.Loop(lo.minor) as other:
        other.flock(fcntl.LOCK_EX | fcntl.LOCK_NB)
        other.flock(fcntl.LOCK_UN)
        lo.flock(fcntl.LOCK_SH | fcntl.LOCK_NB)
        other.flock(fcntl.LOCK_SH | fcntl.LOCK_NB)


def test_flush_buf(bind: Bind, fd: int) -> None:
    lo = bind(fd)
    assert os.pwrite(lo.fd, b"cached", 0) == 6
    lo.flush_buf()
    assert os.pread(fd, 6, 0) == b"cached"
    # The device's cache is gone as well: a change of the file behind its back is seen.
    os.pwrite(fd, b"behind", 0)
    lo.flush_buf()
    assert os.pread(lo.fd, 6, 0) == b"behind"


def test_mknod(bind: Bind, fd: int, tmp_path: Path) -> None:
    os.pwrite(fd, b"through the node", 0)
    lo = bind(fd)
    place = tmp_path / "dev"
    place.mkdir()
    directory = os.open(place, os.O_PATH | os.O_DIRECTORY)
    try:
        lo.mknod(directory)
        made = (place / lo.devname).lstat()
        assert (made.st_mode, made.st_rdev) == (stat.S_IFBLK | 0o600, lo.rdev)
        with open(place / lo.devname, "rb") as device:
            assert device.read(16) == b"through the node"
        with pytest.raises(FileExistsError):
            lo.mknod(directory)
        (place / lo.devname).unlink()
        (place / lo.devname).symlink_to("elsewhere")
        with pytest.raises(FileExistsError):
            lo.mknod(directory)
        (place / lo.devname).unlink()
        lo.mknod(directory, mode=stat.S_IFREG | 0o640)
        assert (place / lo.devname).lstat().st_mode == stat.S_IFBLK | 0o640
        (place / lo.devname).unlink()
        assert as_nobody(lambda: lo.mknod(directory)) in (errno.EPERM, errno.EACCES)
    finally:
        os.close(directory)


def test_mknod_needs_a_directory(unbound: loop.Loop, fd: int, tmp_path: Path) -> None:
    mknod: Any = unbound.mknod
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        for call in (mknod, lambda: mknod(None)):
            with pytest.raises(TypeError):
                call()
        with pytest.raises(NotADirectoryError):
            mknod(fd)
    finally:
        os.chdir(here)
    assert not (tmp_path / unbound.devname).exists()


# -- control --


def test_add_and_remove(control: Control, fd: int) -> None:
    wanted = control.add_apart()
    assert wanted in numbers()
    assert wanted not in control.before
    with pytest.raises(OSError, match="LOOP_CTL_ADD") as caught:
        control.add(wanted)
    assert caught.value.errno == errno.EEXIST
    with loop.Loop(wanted) as lo:
        with pytest.raises(OSError, match="LOOP_CTL_REMOVE") as caught:
            control.remove(wanted)
        assert caught.value.errno == errno.EBUSY
        lo.configure(fd)
    with pytest.raises(OSError, match="LOOP_CTL_REMOVE") as caught:
        control.remove(wanted)
    assert caught.value.errno == errno.EBUSY
    with loop.Loop(wanted) as lo:
        lo.clear_fd()
    remove_devices({wanted})
    assert wanted not in numbers()
    with pytest.raises(OSError, match="LOOP_CTL_REMOVE") as caught:
        control.remove(wanted)
    assert caught.value.errno == errno.ENODEV


def test_add_any(control: Control) -> None:
    made = {control.add(), control.add(-7)}
    assert len(made) == 2
    assert made <= numbers() - control.before


@pytest.mark.parametrize("minor", [2**20, 2**31, 2**40])
def test_numbers_the_kernel_must_not_see(control: Control, minor: int) -> None:
    for call in (control.add, control.remove):
        with pytest.raises(ValueError, match="number"):
            call(minor)


def test_get_unbound_is_unbound(control: Control, bind: Bind, fd: int) -> None:
    taken = {bind(fd).minor for _ in range(3)}
    assert len(taken) == 3
    assert control.get_unbound() not in taken
    # Another program may take it in between, but not every time.
    assert wait_until(lambda: loop.backing_file(control.get_unbound()) is None)


# -- loop_for_fd --


def test_loop_for_fd_bad_fds(control: Control, fd: int) -> None:
    for wrong in (-1, -100, 2**31):
        with pytest.raises(ValueError, match="file descriptor"):
            control.loop_for_fd(wrong)
    with pytest.raises(ValueError, match="file descriptor"):
        control.loop_for_fd(fd, dir_fd=-100)
    assert control.given == []
    gone = os.dup(fd)
    os.close(gone)
    before = open_fds()
    with pytest.raises(OSError, match="LOOP_CONFIGURE") as caught:
        control.loop_for_fd(gone)
    assert caught.value.errno == errno.EBADF
    assert open_fds() == before
    untyped: Any = control.loop_for_fd
    with pytest.raises(TypeError):
        untyped(fd, blocksise=512)


def test_setup_comes_first_and_lock_next(bind: Bind, fd: int) -> None:
    seen: list[tuple[bool, bool]] = []

    def setup(lo: loop.Loop) -> None:
        with loop.Loop(lo.minor) as other:
            try:
                other.flock(fcntl.LOCK_EX | fcntl.LOCK_NB)
                locked = False
            except BlockingIOError:
                locked = True
        seen.append((lo.is_bound_to(fd), locked))

    assert bind(fd, lock=True, setup=setup).is_bound_to(fd)
    assert set(seen) == {(False, False)}


@pytest.mark.parametrize("error", [OSError(errno.EBUSY, "mine"), BlockingIOError(errno.EAGAIN, "mine"), KeyError()])
def test_setup_that_raises(control: Control, fd: int, error: Exception) -> None:
    closed: list[int] = []
    calls: list[loop.Loop] = []
    before = open_fds()

    def setup(lo: loop.Loop) -> None:
        calls.append(lo)
        lo.on_close = lambda closing: closed.append(closing.minor)
        raise error

    with pytest.raises(type(error)) as caught:
        control.loop_for_fd(fd, setup=setup)
    assert caught.value is error
    assert len(calls) == 1
    assert closed == [calls[0].minor]
    assert calls[0].fd == -1
    assert open_fds() == before


def test_lost_race_takes_the_next_device(bind: Bind, make_file: MakeFile) -> None:
    """Somebody binds the very device between its being found and its being bound"""
    theirs, mine = make_file(), make_file()
    rivals: list[loop.Loop] = []
    closed: list[int] = []

    def setup(lo: loop.Loop) -> None:
        lo.on_close = lambda closing: closed.append(closing.minor)
        if not rivals:
            rivals.append(loop.Loop(lo.minor))
            rivals[0].configure(theirs, autoclear=True)

    try:
        lo = bind(mine, setup=setup)
        assert lo.minor != rivals[0].minor
        assert lo.is_bound_to(mine)
        assert rivals[0].is_bound_to(theirs)
        assert closed[0] == rivals[0].minor
    finally:
        for rival in rivals:
            rival.close()


def test_device_that_stays_claimed_is_left_aside(bind: Bind, fd: int) -> None:
    """GET_FREE names an unbound device even while somebody has it open with O_EXCL"""
    claims: dict[int, int] = {}

    def setup(lo: loop.Loop) -> None:
        if not claims:
            claims[lo.minor] = os.open(node(lo), os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)

    try:
        assert bind(fd, setup=setup).minor not in claims
    finally:
        for claim in claims.values():
            os.close(claim)


def test_gives_up_in_time(control: Control, fd: int) -> None:
    claims: dict[int, int] = {}
    tries: list[int] = []
    before = open_fds()

    def setup(lo: loop.Loop) -> None:
        tries.append(lo.minor)
        if lo.minor not in claims:
            claims[lo.minor] = os.open(node(lo), os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)

    started = time.monotonic()
    try:
        with pytest.raises(TimeoutError, match="LOOP_CONFIGURE") as caught:
            control.loop_for_fd(fd, setup=setup, timeout=0.01)
        assert time.monotonic() - started < 1
    finally:
        for claim in claims.values():
            os.close(claim)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.EBUSY
    assert 1 <= len(tries) < 100
    assert open_fds() == before


def test_gives_up_after_a_number_of_tries(control: Control, fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_ATTEMPTS", 2)
    claims: dict[int, int] = {}
    tries: list[int] = []

    def setup(lo: loop.Loop) -> None:
        tries.append(lo.minor)
        if lo.minor not in claims:
            claims[lo.minor] = os.open(node(lo), os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)

    try:
        with pytest.raises(TimeoutError):
            control.loop_for_fd(fd, setup=setup, timeout=60)
    finally:
        for claim in claims.values():
            os.close(claim)
    assert len(tries) == 2


def test_lock_waits_for_a_probe_to_end(bind: Bind, fd: int) -> None:
    """udev holds LOCK_SH on a fresh device for a moment: the same device is locked once that is over"""

    def same_device_after_a_wait() -> bool:
        tried: list[int] = []
        timers: list[threading.Timer] = []

        def setup(lo: loop.Loop) -> None:
            tried.append(lo.minor)
            if not timers:
                probe = os.open(node(lo), os.O_RDONLY | os.O_CLOEXEC)
                fcntl.flock(probe, fcntl.LOCK_SH)
                timers.append(threading.Timer(0.2, os.close, [probe]))
                timers[0].start()

        started = time.monotonic()
        try:
            lo = bind(fd, lock=True, setup=setup)
        finally:
            for timer in timers:
                timer.join()
        return tried == [lo.minor] and 0.15 < time.monotonic() - started < 1

    # Another program may bind that device meanwhile, but not every time.
    assert any(same_device_after_a_wait() for _ in range(5))


def test_device_that_stays_locked_is_left_aside(bind: Bind, fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_LOCK_WAIT", 0.05)
    lockers: dict[int, int] = {}

    def setup(lo: loop.Loop) -> None:
        if not lockers:
            lockers[lo.minor] = os.open(node(lo), os.O_RDONLY | os.O_CLOEXEC)
            fcntl.flock(lockers[lo.minor], fcntl.LOCK_EX)

    try:
        lo = bind(fd, lock=True, setup=setup)
        assert lo.minor not in lockers
    finally:
        for locker in lockers.values():
            os.close(locker)


def test_node_that_never_appears(control: Control, fd: int, tmp_path: Path) -> None:
    directory = os.open(tmp_path, os.O_RDONLY)
    started = time.monotonic()
    try:
        with pytest.raises(FileNotFoundError):
            control.loop_for_fd(fd, dir_fd=directory)
    finally:
        os.close(directory)
    assert 0.4 < time.monotonic() - started < 3


def test_node_that_appears_late(
    bind: Bind, control: Control, fd: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "_NODE_WAIT", 5.0)
    place = tmp_path / "dev"
    place.mkdir()
    directory = os.open(place, os.O_RDONLY)

    def appear() -> None:
        for number in numbers():
            os.mknod(place / f"loop{number}", stat.S_IFBLK | 0o600, os.stat(f"/dev/loop{number}").st_rdev)

    control.get_unbound()
    timer = threading.Timer(0.1, appear)
    timer.start()
    try:
        assert bind(fd, dir_fd=directory).is_bound_to(fd)
    finally:
        timer.join()
        os.close(directory)


def test_node_that_may_not_be_opened(control: Control, fd: int) -> None:
    started = time.monotonic()
    assert as_nobody(lambda: control.loop_for_fd(fd)) == errno.EACCES
    assert time.monotonic() - started < 3


class Bound(NamedTuple):
    number: int
    seq: int | None


WORKER = """
import json, os, sys, tempfile, time
sys.path.insert(0, sys.argv[1])
from loopd import loop
rounds, lock = int(sys.argv[2]), sys.argv[3] == "lock"
seen = []
with loop.LoopControl() as control, tempfile.TemporaryFile(dir=sys.argv[4]) as file:
    file.truncate(1 << 20)
    fd = file.fileno()
    sys.stdin.readline()
    for _ in range(rounds):
        with control.loop_for_fd(fd, lock=lock, autoclear=True, read_only=True, sizelimit=65536) as lo:
            seq, info = lo.diskseq(), lo.get_status()
            assert info.is_bound_to(os.fstat(fd)) and info.lo_sizelimit == 65536 and lo.size() == 65536
            time.sleep(0.002)
            # Still ours after others had time to take it.
            assert lo.is_bound_to(fd) and lo.diskseq() == seq and lo.get_status() == info and lo.read_only()
            seen.append((lo.minor, seq))
print(json.dumps(seen))
"""


@pytest.mark.parametrize("lock", ["lock", "no-lock"])
def test_many_processes_beside_losetup(control: Control, tmp_path: Path, lock: str) -> None:
    """No device is handed out twice: number and diskseq seen twice would be one binding with two owners"""
    rounds, count = 20, 8
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(ROOT), str(rounds), lock, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(count)
    ]
    started = time.monotonic()
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    image = tmp_path / "losetup.img"
    image.write_bytes(bytes(4096))
    if shutil.which("losetup") is not None:
        for _ in range(10):
            done = subprocess.run(
                ["losetup", "-f", "--show", str(image)], stdout=subprocess.PIPE, text=True, check=True
            )
            subprocess.run(["losetup", "-d", done.stdout.strip()], check=True)
    results = [worker.communicate(timeout=60) for worker in workers]
    assert [err for _, err in results] == [""] * count
    bindings = [Bound(*pair) for out, _ in results for pair in json.loads(out)]
    control.given += [binding.number for binding in bindings]
    assert len(bindings) == rounds * count
    if all(binding.seq is not None for binding in bindings):
        assert len(set(bindings)) == len(bindings)
    assert time.monotonic() - started < 60


def test_threads_on_one_control(control: Control, make_file: MakeFile) -> None:
    files = [make_file() for _ in range(4)]
    wrong: list[BaseException] = []
    barrier = threading.Barrier(len(files))

    def work(fd: int) -> None:
        try:
            barrier.wait()
            for _ in range(10):
                with control.loop_for_fd(fd, lock=True, autoclear=True) as lo:
                    assert lo.is_bound_to(fd)
        except BaseException as error:  # noqa: BLE001 - reported by the test's own thread
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(fd,)) for fd in files]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# -- the module --


def test_module_stands_alone() -> None:
    """One file, without the package, without ctypes"""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import loop;"
        "print(sorted(n for n in sys.modules if n.split('.')[0] in ('loopd', 'ctypes')))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, str(ROOT / "loopd")], stdout=subprocess.PIPE, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_all_is_all_that_is_public() -> None:
    defined = {
        name
        for name, value in vars(loop).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == loop.__name__
    }
    assert defined - {"Request"} <= set(loop.__all__)
    assert all(hasattr(loop, name) for name in loop.__all__)
