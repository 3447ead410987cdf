#!/usr/bin/python3 -IS
"""``mount`` for a container that has loopd's socket: a file that is to be mounted gets a device of loopd's first.

mount(8) sets its loop devices up by itself, through /dev/loop-control, and asks no losetup. So this stands before it
in PATH, as `mount`, one file with the drop-in `losetup` beside it: it attaches the file, has mount(8) mount the device,
and detaches it. A device that is mounted is kept by the kernel until umount, as with the autoclear flag that mount(8)
sets; one that could not be mounted is gone. What needs no loop device goes to mount(8) as it is, and so does what is
in fstab. Owns the reading of mount's command line; imports nothing of the package. Standard library of Python 3.8 and
later.
"""

from __future__ import annotations

import os
import sys
from _signal import (  # type: ignore[import-not-found]
    SIG_DFL,
    SIG_IGN,
    SIGHUP,
    SIGINT,
    SIGPIPE,
    SIGTERM,
    SIGXFSZ,
    getsignal,
    signal,
)  # fmt: skip

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType
    from typing import NoReturn

HERE = os.path.dirname(os.path.realpath(__file__))
LETTERS = "tToOLUN"
"""Letters of mount(8) with an argument."""
WORDS = ("types", "fstab", "options", "test-opts", "label", "uuid", "namespace", "source", "target", "target-prefix",
         "options-mode", "options-source", "map-groups", "map-users")  # fmt: skip
"""Long options of mount(8) that must have an argument."""
NO_DEVICE = {"bind", "rbind", "move", "remount", "shared", "slave", "private", "unbindable", "rshared", "rslave",
             "rprivate", "runbindable"}  # fmt: skip
"""Options with which a source is no file system."""
MOST_BYTES_IGNORED = 1024
"""A file that is no longer gets no device of mount(8)'s own accord."""


ENDS = (SIGHUP, SIGINT, SIGTERM)
IGNORED = (SIGPIPE, SIGXFSZ)
"""By Python, and what it starts would inherit that."""
interrupts: list[int] = []
"""Signals that were to end this program while there was a device."""
running: list[int] = []
"""mount(8), which is told of them, and ends by itself."""


class Failure(Exception):
    """What is said before the program ends."""


class Plan:
    """A command line of mount(8), taken apart: `kept` is what goes to mount(8) unchanged."""

    def __init__(self, arguments: list[str]) -> None:
        self.kept: list[str] = []
        self.options: list[str] = []
        self.operands: list[str] = []
        self.type = self.source = ""
        self.target = self.device_unlikely = self.read_only = False
        for key, value, words in getopt(arguments):
            if key in ("o", "options"):
                self.options += split(value)
            elif key == "source":
                self.source = value
            elif key == "":
                self.operands.append(value)
            else:
                self.kept += words
                self.target |= key == "target"
                self.type = value if key in ("t", "types") else self.type
                self.read_only |= key in ("r", "read-only")
                self.device_unlikely |= key in ("B", "R", "M") or key.startswith("make-") or key in NO_DEVICE
        if not self.source and len(self.operands) == 2 - self.target:
            self.source = self.operands.pop(0)
        self.read_only |= "ro" in self.options

    def needs_device(self) -> bool:
        """Whether mount(8) would set a loop device up."""
        if not self.source or self.device_unlikely or NO_DEVICE.intersection(self.options):
            return False
        if any(option.partition("=")[0] in ("loop", "offset", "sizelimit") for option in self.options):
            return True
        file_system = self.type in ("", "auto") or not nodev(self.type)
        return file_system and os.path.isfile(self.source) and os.stat(self.source).st_size > MOST_BYTES_IGNORED


def getopt(arguments: list[str]) -> Iterator[tuple[str, str, list[str]]]:
    """Each option as letter or name, argument and words; an operand has an empty name."""
    words = iter(arguments)
    for word in words:
        if word == "--":
            yield from (("", operand, []) for operand in words)
        elif word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            # An abbreviation is taken for the first option of mount(8) that it can be.
            name = name if name in WORDS else next((long for long in WORDS if long.startswith(name)), name)
            if name in WORDS and not equals:
                value = next(words, "")
                yield name, value, [word, value]
            else:
                yield name, value, [word]
        elif word.startswith("-") and word != "-":
            letters = word[1:]
            while letters:
                key, letters = letters[0], letters[1:]
                if key == "m" and letters:
                    yield key, "", [f"-m{letters}"]  # an argument that may be missing
                    break
                if key in LETTERS:
                    value = letters or next(words, "")
                    yield key, value, [f"-{key}", value]
                    break
                yield key, "", [f"-{key}"]
        else:
            yield "", word, []


def split(options: str) -> list[str]:
    """The options of -o; a comma in quotes belongs to the value."""
    found, quoted = [""], False
    for character in options:
        quoted ^= character == '"'
        if character == "," and not quoted:
            found.append("")
        else:
            found[-1] += character
    return [option for option in found if option]


def nodev(file_system: str) -> bool:
    """Whether a type of file system is on no device."""
    if file_system.startswith("fuse"):
        return True
    try:
        with open("/proc/filesystems", encoding="ascii") as file:
            return any(line.split() == ["nodev", file_system] for line in file)
    except OSError:
        return False


def program(name: str, first: str) -> str:
    """The program of that name in the directory `first`, else in PATH, but for this one and its copies."""
    # An empty element would be the working directory, which may be a tree that is being built.
    for directory in filter(None, (first, *os.environ.get("PATH", "").split(":"), "/usr/bin", "/bin")):
        path = os.path.join(directory, name)
        if os.access(path, os.X_OK) and not is_copy(path):
            return path
    raise Failure(f"there is no {name} in PATH")


def is_copy(path: str) -> bool:
    """Whether a file is this program, of whatever version: two of them would run each other for ever."""
    try:
        with open(path, "rb") as file:
            return __doc__.partition("\n")[0].encode() in file.read(256)
    except OSError:
        return False


def run(path: str, arguments: list[str]) -> tuple[int, str]:
    """A program's exit code and output."""
    read, write = os.pipe()
    pid = os.posix_spawn(
        path, [os.path.basename(path), *arguments], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, write, 1)],
        setsigdef=IGNORED,
    )  # fmt: skip
    os.close(write)
    with os.fdopen(read) as file:
        output = file.read()
    return status(pid), output


def status(pid: int) -> int:
    code = os.waitpid(pid, 0)[1]
    return os.WEXITSTATUS(code) if os.WIFEXITED(code) else 128 + os.WTERMSIG(code)


def attach(losetup: str, plan: Plan) -> tuple[str, bool]:
    """The device of the file, and whether it was there before: mounting a file twice mounts one device twice."""
    arguments = ["--nooverlap", "--find", "--show"]
    for option in plan.options:
        name, _, value = option.partition("=")
        if name in ("offset", "sizelimit"):
            arguments.append(f"--{name}={value}")
        if name == "loop" and value:
            raise Failure(f"{plan.source}: {option}: loopd chooses the device: -o loop")
    if plan.read_only:
        arguments.append("--read-only")
    before = run(losetup, ["--noheadings", "--output", "NAME", "--list", "--associated", plan.source])[1].split()
    code, output = run(losetup, [*arguments, "--", plan.source])
    device = output.strip()
    if code or not device:
        raise Failure(f"{plan.source}: failed to set up loop device")
    return device, device in before


def pass_on(number: int, frame: FrameType | None) -> None:
    """Have mount(8) end, and this program after it."""
    interrupts.append(number)
    for pid in running:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return  # it has ended by itself


def mount_file(mount: str, plan: Plan) -> int:
    """Attach, mount, detach; the exit code of mount(8)."""
    losetup = program("losetup", HERE)
    for number in ENDS:
        if getsignal(number) != SIG_IGN:
            signal(number, pass_on)
    device, there_before = attach(losetup, plan)
    options = [option for option in plan.options if option.partition("=")[0] not in ("loop", "offset", "sizelimit")]
    arguments = plan.kept + (["-o", ",".join(options)] if options else [])
    arguments += ["--source", device] if plan.target else [device, *plan.operands]
    try:
        if interrupts:
            return 128 + interrupts[0]
        running.append(os.posix_spawn(mount, ["mount", *arguments], os.environ, setsigdef=IGNORED))
        for number in interrupts:  # while it was made
            os.kill(running[0], number)
        return status(running[0])
    finally:
        running.clear()
        for number in ENDS:  # for losetup too
            signal(number, SIG_IGN)
        if not there_before:
            run(losetup, ["--detach", device])


def replace(mount: str) -> NoReturn:
    for number in IGNORED:
        signal(number, SIG_DFL)
    os.execv(mount, ["mount", *sys.argv[1:]])  # noqa: S606  # no shell is wanted


def main() -> int:
    """Mount; the exit code: mount(8)'s, or 32, its code for a mount that failed."""
    try:
        mount = program("mount", "/nonexistent")
        plan = Plan(sys.argv[1:])
        if not plan.needs_device():
            replace(mount)
        return mount_file(mount, plan)
    except (Failure, OSError) as error:
        sys.stderr.write(f"mount: {error}\n")
        return 32


if __name__ == "__main__":
    sys.exit(main())
