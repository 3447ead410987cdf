"""``partx`` and ``partprobe`` for a container that has loopd's socket: they bring the nodes of partitions.

The kernel lets nobody in a container read a partition table again; loopd does it (`rescan`), and makes the nodes. What
the kernel does not find, because it was built without a reader of that table, the real program adds, where it may. What
is no device of loopd's, and what only reads, goes to the real program. Owns the two command lines and what they print.
Standard library of Python 3.8 and later.
"""

from __future__ import annotations

import posix
import sys
from time import monotonic, sleep

from loopd.losetup import (
    DIRECTORY,
    NAME,
    S_IFBLK,
    S_IFREG,
    VERSION,
    Failure,
    Options,
    ask_about,
    attached,
    become,
    devname,
    environment,
    is_window,
    leases,
    make_flat,
    mode,
    node,
    put,
    real,
    say,
    sysfs,
    tell_of_partitions,
    tidy,
)
from loopd.table import table_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Iterator

    from loopd.losetup import Lease
    from loopd.table import Partition

NODE_WAIT = 1.0
"""Seconds for loopd to make the node of a partition that the kernel has."""


# What both do -----------------------------------------------------------------------------------------------------


def ours(device: str) -> Lease | None:
    """The owner's device of that path; None where it is another's, or no device."""
    if mode(device) != S_IFBLK:
        return None
    try:
        name = devname(device)
    except Failure:
        return None
    return next((lease for lease in leases() if lease["devname"] == name), None)


def table(path: str, lease: Lease) -> tuple[str, list[Partition]]:
    """What the device's table has."""
    try:
        return table_of(path, lease["sector_size"])
    except OSError as error:
        raise Failure(f"{path}: {error.strerror}") from None


def nodes(lease: Lease) -> set[int]:
    """The partitions that have a node."""
    begin = f"{lease['devname']}p"
    return {int(name[len(begin) :]) for name in posix.listdir(DIRECTORY) if name.startswith(begin)}


def settle(lease: Lease) -> None:
    """Wait until loopd has made and removed the nodes: it hears of partitions from the kernel."""
    deadline = monotonic() + NODE_WAIT
    while nodes(lease) != set(in_the_kernel(lease)) and monotonic() < deadline:
        sleep(0.01)
    tidy(lease["devname"])


def in_the_kernel(lease: Lease) -> dict[int, tuple[int, int]]:
    """Number, start and size of the partitions that the kernel has."""
    disk = lease["devname"]
    try:
        names = [name for name in posix.listdir(f"/sys/block/{disk}") if name.startswith(f"{disk}p")]
    except OSError:
        return {}
    found = {}
    for name in names:
        start, size = sysfs(disk, f"{name}/start"), sysfs(disk, f"{name}/size")
        if start and size:
            found[int(name[len(disk) + 1 :])] = int(start), int(size)
    return found


def bring(path: str, lease: Lease) -> int:
    """Have the kernel's partitions, and their nodes, be those of the table; 1 where some are missing then."""
    _, partitions = table(path, lease)
    right = {number: (start, size) for number, start, size, _ in partitions}
    refusal = "the kernel did not find them"
    # What is right already stays: to read the table again takes every node away for a moment.
    if in_the_kernel(lease) != right or nodes(lease) != set(right):
        try:
            ask_about(op="rescan", devname=lease["devname"])
        except Failure as failure:
            if failure.code not in ("busy", "unsupported"):
                raise
            refusal = str(failure)
        if in_the_kernel(lease) != right:
            run_quietly("partx", "--update", path)
    settle(lease)
    missing = set(right) - nodes(lease)
    if missing:
        which = " ".join(map(str, sorted(missing)))
        say(f"{path}: no nodes for {which}: {refusal}; `kpartx -av {path}` makes devices of partitions")
        return 1
    tell_of_partitions(path, {"partitions": [f"{lease['devname']}p{row[0]}" for row in partitions]})
    return 0


def run_quietly(program: str, *arguments: str) -> int:
    """Run the real program of that name; its exit code, 127 where there is none."""
    try:
        path = real(program)
    except Failure:
        return 127
    silent = (posix.POSIX_SPAWN_OPEN, 2, "/dev/null", posix.O_WRONLY, 0)
    pid = posix.posix_spawn(path, [program, *arguments], environment(), file_actions=[silent])
    return posix.waitpid(pid, 0)[1]


# partx ------------------------------------------------------------------------------------------------------------

ACTIONS = {"add": "a", "update": "u", "delete": "d", "show": "s", "list": "l", "raw": "r", "pairs": "P"}
"""Long options of which one excludes the others, by their letters."""
ARGUMENT = {"nr": "n", "output": "o", "sector-size": "S", "type": "t"}
"""Those with an argument."""
ALL = {**ACTIONS, **ARGUMENT, "bytes": "b", "noheadings": "g", "output-all": "", "list-types": "", "verbose": "v",
       "help": "h", "version": "V"}  # fmt: skip


def letters_of(words: list[str], operands: list[str]) -> Iterator[str]:
    """The options as letters; an argument is left out, and what is none goes to `operands`."""
    left = list(words)
    while left:
        word = left.pop(0)
        if word == "--":
            operands += left
            return
        if word.startswith("--"):
            name, equals, _ = word[2:].partition("=")
            name = name if name in ALL else next((long for long in ALL if long.startswith(name)), "")
            if name in ARGUMENT and not equals and left:
                left.pop(0)
            yield ALL.get(name, "")
        elif word.startswith("-") and word != "-":
            for index, letter in enumerate(word[1:], 2):
                yield letter
                if letter in ARGUMENT.values():
                    if not word[index:] and left:
                        left.pop(0)
                    break
        else:
            operands.append(word)


def partx(words: list[str]) -> int:
    """Add, update or delete the partitions of a device of loopd's; all else is the real partx's."""
    operands: list[str] = []
    letters = list(letters_of(words, operands))
    actions = [letter for letter in letters if letter in ACTIONS.values()]
    if "V" in letters:
        put(f"{NAME} (loopd {VERSION})\n")
        return 0
    if len(set(actions)) != 1 or actions[0] not in "aud" or not operands:
        become(real("partx"))
    disk = operands[-1]
    if mode(disk) == S_IFREG and actions[0] == "a":
        disk = attached_disk(disk, verbose="v" in letters)
    lease = ours(disk)
    if lease is None:
        become(real("partx"))
    if actions[0] in "au":
        return bring(disk, lease)
    if run_quietly("partx", *words) and in_the_kernel(lease):
        say(f"{disk}: its partitions stay until it is detached: to remove them takes CAP_SYS_ADMIN")
        return 1
    settle(lease)
    return 0


def attached_disk(file: str, verbose: bool) -> str:
    """The device of a file, which partx attaches as losetup does."""
    options = Options()
    options.partscan = True
    path = make_flat(attached(file, options, f"{file}: failed to set up loop device")["devname"])
    if verbose:
        put(f"Trying to use '{path}' for the loop device\n")
    return path


# partprobe --------------------------------------------------------------------------------------------------------

KINDS = {"gpt": "gpt", "dos": "msdos"}
"""The kinds of tables as parted calls them."""


def summary(path: str, lease: Lease) -> str:
    """The line of --summary: logical partitions in brackets behind the one that they are in."""
    kind, partitions = table(path, lease)
    text = f"{path}: {KINDS.get(kind, kind)} partitions"
    for number, _, _, container in partitions:
        inside = [str(row[0]) for row in partitions if row[3] == number]
        text += "" if container else f" {number}" + (f" <{' '.join(inside)}>" if inside else "")
    return text + "\n"


def partprobe(words: list[str]) -> int:
    """Bring the partitions of devices of loopd's, or of all that are the owner's; others are the real partprobe's."""
    devices = [word for word in words if not word.startswith("-")]
    options = "".join(word.lstrip("-")[: 1 if word.startswith("--") else None] for word in words if word not in devices)
    if "v" in options:
        put(f"{NAME} (loopd {VERSION})\n")
        return 0
    found = {device: ours(device) for device in devices}
    if not devices:
        found = {node(lease["devname"]): lease for lease in leases() if not is_window(lease)}
    if set(options) - {"d", "s"} or (devices and not all(found.values())):
        become(real("partprobe"))
    failed = 0
    for path, lease in found.items():
        assert lease is not None
        if "d" not in options:
            failed += bring(path, lease)
        if "s" in options:
            put(summary(path, lease))
    return min(failed, 1)


def main() -> int:
    """The exit code: 1 where something failed."""
    try:
        return partprobe(sys.argv[1:]) if NAME == "partprobe" else partx(sys.argv[1:])
    except Failure as failure:
        say(failure)
        return 1
    except OSError as error:
        say(error.strerror or error)
        return 1


if __name__ == "__main__":
    posix._exit(main())  # noqa: SLF001  # without the tidying up of the interpreter
