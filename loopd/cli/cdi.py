"""The specification of ``loopctl directory --cdi``: what a runtime gives a container for ``--device KIND=NAME``.

Changes when a container needs another part of loopd, or when runtimes look in other folders. Asks no daemon. The format
is that of the Container Device Interface (SPEC.md of cncf-tags/container-device-interface).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from typing import Any, Iterator, NamedTuple

from loopd.cli.output import Failure
from loopd.client import api as client
from loopd.client.layers import LOOP_MAJOR
from loopd.protocol.wire import Granted

DOMAIN = "loopd.alt"
"""In place of a vendor's domain. Nobody can own it: RFC 9476 keeps names below ``alt`` out of the DNS for good."""
SOCKETS = "/run/loopd"
"""Where the container has the folder of loopd's socket."""
STAND_INS = "/usr/local/sbin"
"""Where the container has the stand-ins: first in the PATH of most images, and of their sudo. ``env`` of a
specification sets a whole value, so it cannot put a folder in front of an image's own PATH.
"""
BOUND = ("bind", "ro", "nosuid")
"""Options of every mount; `nodev` and `noexec` are added where no device is opened or nothing is run."""


class Parts(NamedTuple):
    """What is bound into the container, as the host has it."""

    socket: str
    gid: int | None
    """Of the socket; None where everybody may write to it."""
    program: str
    library: str | None
    """The modules of `program`; None where that is one file with all of them."""
    stand_ins: str | None = None


def kind(uid: int) -> str:
    """The kind of a user's directories. Root's have another than a user's: each may have one of the same name."""
    return f"{DOMAIN}/loop" if uid == 0 else f"{DOMAIN}/loop-{uid}"


def specification(uid: int, name: str, granted: Granted, parts: Parts) -> dict[str, Any]:
    """The specification of the directory `name` of a user. A user other than root has a rootless runtime: it makes no
    device nodes, has no device cgroup, and knows the host's groups by other numbers.
    """
    if not name[-1].isalnum():
        raise Failure(f"--cdi: {name}: a runtime takes no device whose name ends with {name[-1]}")
    mounts = [
        _mount(os.path.dirname(parts.socket), SOCKETS, "nodev", "noexec"),
        _mount(granted.path, client.DIRECTORY, "noexec"),
        _mount(parts.program, parts.program, "nodev"),
    ]
    if parts.library is not None:
        mounts.append(_mount(parts.library, parts.library, "nodev"))
    if parts.stand_ins is not None:
        mounts.append(_mount(parts.stand_ins, STAND_INS, "nodev"))
    edits: dict[str, Any] = {
        "env": [
            f"LOOPD_SOCKET={os.path.join(SOCKETS, os.path.basename(parts.socket))}",
            f"LOOPD_DIRECTORY={client.DIRECTORY}",
        ],
        "mounts": mounts,
    }
    version = "0.5.0"  # the first in which a device's name may begin with a digit
    if uid == 0:
        edits["deviceNodes"] = [_node(number) for number in granted.numbers]
        if parts.gid:  # runtimes ignore 0
            edits["additionalGids"] = [parts.gid]
            version = "0.7.0"
    return {"cdiVersion": version, "kind": kind(uid), "devices": [{"name": name, "containerEdits": edits}]}


def _mount(source: str, target: str, *options: str) -> dict[str, Any]:
    return {"hostPath": source, "containerPath": target, "options": [*BOUND, *options]}


def _node(number: int) -> dict[str, Any]:
    # With type and numbers the runtime needs no node on the host, which has none before the device is attached. It
    # makes a rule of the device cgroup from `permissions`: no `m`, which every container has for all devices anyway.
    return {
        "path": f"/dev/loop{number}",
        "type": "b",
        "major": LOOP_MAJOR,
        "minor": minor(number),
        "fileMode": 0o600,
        "permissions": "rw",
    }


def minor(number: int) -> int:
    """The minor of a device that need not exist now: the kernel keeps minors for `loop.max_part` partitions of each."""
    partitions = 0
    with contextlib.suppress(OSError), open("/sys/module/loop/parameters/max_part", encoding="ascii") as file:
        partitions = int(file.read())
    return number << partitions.bit_length()


def parts(socket: str, stand_ins: bool) -> Parts:
    """Where this installation has what a container needs."""
    import loopd  # noqa: PLC0415  # the package's own place

    try:
        status = os.stat(socket)
    except OSError as error:
        raise Failure(f"{socket}: {error.strerror}") from error
    gid = None if status.st_mode & stat.S_IWOTH else status.st_gid
    socket = os.path.join(os.path.realpath(os.path.dirname(socket) or "."), os.path.basename(socket))
    package = os.path.dirname(os.path.realpath(loopd.__file__))
    library = os.path.dirname(package)
    if os.path.isfile(library):  # `make zipapp`
        if stand_ins:
            raise Failure("--losetup: the stand-ins do not come with loopctl in one file")
        return Parts(socket, gid, library, None)
    program = os.path.join(os.path.dirname(os.path.dirname(library)), "bin", "loopctl")
    if os.path.basename(library) != "loopd" or not os.path.isfile(program):
        raise Failure(f"--cdi: {package} is no installation that a container could use: `make install`, or a package")
    return Parts(socket, gid, program, library, os.path.join(library, "bin") if stand_ins else None)


def checked(uid: int, name: str, granted: Granted, found: Parts, force: bool) -> dict[str, Any]:
    """The specification, where a container may have one."""
    if uid == 0 and not granted.numbers:
        raise Failure("--cdi: this loopd gives a directory no device numbers of its own")
    told = None if uid or force else refusal(granted)
    if told is not None:
        raise Failure(f"{granted.path} has no specification: {told}")
    return specification(uid, name, granted, found)


def refusal(granted: Granted) -> str | None:
    """Why no container should open nodes of a directory's numbers while nothing is attached, if it should not."""
    if granted.remade is False:
        return None
    known = "max_loop is not in force" if granted.remade else "whether max_loop is in force is not known"
    return (
        f"{known}: whoever opens a node of the container's while no image is attached would make an idle device, and "
        "the host's `losetup -f` may be given it; set loop.max_loop=8 on the kernel's command line or, where loop is a "
        "module, `options loop max_loop=8` in modprobe.d, and boot; --force does without"
    )


# Files --------------------------------------------------------------------------------------------------------


def folders(uid: int, first: str | None) -> list[str]:
    """Where the specification of a user's directory may be; the first is written to."""
    if uid == 0 or os.geteuid() == 0:
        known = ["/run/cdi", "/etc/cdi"]
    else:
        runtime = os.environ.get("XDG_RUNTIME_DIR")
        config = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
        known = [os.path.join(folder, "cdi") for folder in (runtime, config) if folder]
    return known if first is None else [first, *(folder for folder in known if folder != os.path.normpath(first))]


def write(folder: str, uid: int, name: str, spec: dict[str, Any]) -> None:
    """Write a specification in one step: a runtime reads the old one or the new one, never a part."""
    try:
        text = json.dumps(spec, indent=2, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise Failure("--cdi: a path of this installation is no UTF-8, which JSON cannot hold") from error
    final = _file(uid, name)
    with _opened(folder, make=True) as dir_fd:
        assert dir_fd is not None
        # Runtimes read *.json and *.yaml alone.
        begun = f".{final}.{os.getpid()}"
        fd = os.open(begun, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=dir_fd)
        try:
            with open(fd, "wb") as file:
                file.write(text + b"\n")
                os.fchmod(fd, 0o644)  # rootless runtimes read it, whatever the umask
            os.rename(begun, final, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)  # replaces a link, and does not follow it
        except BaseException:
            os.unlink(begun, dir_fd=dir_fd)
            raise


def remove(within: list[str], uid: int, name: str, unless: tuple[int, ...] | None = None) -> list[str]:
    """Remove the specifications of a directory, but for those of exactly the numbers `unless`; which they were."""
    removed = []
    final = _file(uid, name)
    for folder in within:
        with _opened(folder, make=False) as dir_fd, contextlib.suppress(FileNotFoundError):
            if dir_fd is None or (unless is not None and _has(final, dir_fd, uid, unless)):
                continue
            os.unlink(final, dir_fd=dir_fd)
            removed.append(os.path.join(folder, final))
    return removed


def _file(uid: int, name: str) -> str:
    return f"loopd-{uid}-{name}.json"


def _has(file: str, dir_fd: int, uid: int, numbers: tuple[int, ...]) -> bool:
    wanted = {minor(number) for number in numbers} if uid == 0 else set()
    try:
        with open(os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd), "rb") as opened:
            (device,) = json.load(opened)["devices"]
        return {node["minor"] for node in device["containerEdits"].get("deviceNodes", ())} == wanted
    except FileNotFoundError:
        raise
    except (OSError, ValueError, TypeError, LookupError, AttributeError):  # a link, or another's text
        return False


@contextlib.contextmanager
def _opened(folder: str, *, make: bool) -> Iterator[int | None]:
    """The folder, None where it is not there and not to be made. Whoever may write to it says what containers get."""
    made = False
    with contextlib.suppress(FileExistsError):
        if make:
            os.mkdir(folder)
            made = True
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        # As after setpriv(1), which leaves HOME as it was: this user can have put nothing there.
        if make or (os.geteuid() == 0 and error.errno != errno.ENOENT):
            raise
        yield None
        return
    try:
        if made:
            os.fchmod(fd, 0o755)  # whatever the umask
        status = os.fstat(fd)
        if os.geteuid() == 0 and (status.st_uid != 0 or status.st_mode & 0o022):
            raise Failure(f"--cdi: {folder} is not root's alone to write, and what is in it decides over containers")
        yield fd
    finally:
        os.close(fd)
