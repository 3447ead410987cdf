"""``dmsetup`` for a container that has loopd's socket: what builders of images ask of it about the maps of `kpartx`.

These are `ls`, `info`, `mknodes`, `remove` and `remove_all`, for the loop devices that this kpartx made. There is no
device mapper behind it: any other command goes to the real dmsetup, where the container has /dev/mapper/control.
Standard library of Python 3.8 and later.
"""

from __future__ import annotations

import posix
import sys

from loopd.kpartx import make_name, maps, remove_map
from loopd.losetup import DIRECTORY, MAPPER, VERSION, Failure, become, is_claimed, leases, mode, put, real

TYPE_CHECKING = False
if TYPE_CHECKING:
    from loopd.losetup import Lease

FLAGS = ("f", "force", "v", "verbose", "y", "yes", "retry", "deferred", "noudevsync", "noudevrules", "verifyudev",
         "noopencount", "noflush", "nolockfs", "checks")  # fmt: skip
"""Options that change nothing here."""
COMMANDS = ("ls", "info", "mknodes", "remove", "remove_all")


def parse_dmsetup(words: list[str]) -> tuple[str, list[str], str]:
    """Command, names, and the type of maps that are meant; the command is empty where only the real one knows it."""
    operands: list[str] = []
    target = "linear"
    left = list(words)
    while left:
        word = left.pop(0)
        name, equals, value = word.lstrip("-").partition("=")
        if not word.startswith("-"):
            operands.append(word)
        elif name == "target":
            target = value if equals or not left else left.pop(0)
        elif name == "version":
            put(f"dmsetup (loopd {VERSION})\n")
            raise SystemExit(0)
        elif name not in FLAGS:
            return "", [], ""
    command = operands[0] if operands else ""
    return (command, operands[1:], target) if command in COMMANDS else ("", [], "")


def chosen(words: list[str]) -> dict[str, Lease]:
    """The maps that are named, or all of them where none is; Failure where one is not there."""
    known = maps(leases())
    names = [word[len(MAPPER) + 1 :] if word.startswith(f"{MAPPER}/") else word for word in words]
    for name in names:
        if name not in known:
            raise Failure(f"Device {name} not found")
    return {name: known[name] for name in names or sorted(known)}


def info(name: str, lease: Lease) -> str:
    """A map, as dmsetup has it. How many have it open is known as none or some."""
    state = "ACTIVE (READ-ONLY)" if lease["read_only"] else "ACTIVE"
    count = int(is_claimed(f"{DIRECTORY}/{lease['devname']}"))
    rows = (
        ("Name", name), ("State", state), ("Read Ahead", "256"), ("Tables present", "LIVE"), ("Open count", count),
        ("Event number", "0"), ("Major, minor", f"{lease['major']}, {lease['minor']}"), ("Number of targets", "1"),
    )  # fmt: skip
    return "".join(f"{title + ':':<18} {value}\n" for title, value in rows) + "\n"


def perform(command: str, words: list[str], target: str) -> None:
    """Do what the command line says."""
    if command == "remove" and not words:
        raise Failure("Missing device name")
    found = chosen(words) if target == "linear" else {}
    if command == "ls":
        lines = [f"{name}\t({lease['major']}:{lease['minor']})\n" for name, lease in found.items()]
        put("".join(lines) or "No devices found\n")
    elif command == "info":
        put("".join(info(name, lease) for name, lease in found.items()) or "No devices found\n")
    elif command == "mknodes":
        for name, lease in found.items():
            make_name(name, lease)
    else:
        for name, lease in found.items():
            remove_map(name, lease)


def main() -> int:
    """The exit code: 0, or 1 for a command that failed."""
    try:
        command, words, target = parse_dmsetup(sys.argv[1:])
        if not command and mode(f"{MAPPER}/control"):
            become(real("dmsetup"))
        if not command:
            raise Failure("there is no device mapper here; for the maps of kpartx loopd has " + ", ".join(COMMANDS))
        perform(command, words, target)
    except Failure as failure:
        put(f"{failure}\nCommand failed.\n", 2)
        return 1
    except SystemExit as end:
        return int(end.code or 0)
    return 0


if __name__ == "__main__":
    posix._exit(main())  # noqa: SLF001  # without the tidying up of the interpreter
