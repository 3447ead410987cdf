"""``kpartx`` for a container that has loopd's socket: each partition is a loop device of its own.

Where kpartx(8) has the device mapper map a partition, this has loopd attach the same file once more, at the partition's
offset and with its size: a window. Its node opens wherever loop devices do. Owns kpartx's command line and what it
prints, and the names in /dev/mapper. Which window is which is kept by loopd, in the device's reference string.
Standard library of Python 3.8 and later.
"""

from __future__ import annotations

import errno
import posix
import sys

from loopd.losetup import (
    DEV,
    DIRECTORY,
    LO_NAME_SIZE,
    MAPPER,
    NAME,
    S_IFBLK,
    S_IFREG,
    VERSION,
    Failure,
    Options,
    attach,
    attached,
    backing_file,
    backs,
    become,
    detached,
    devname,
    full,
    is_claimed,
    is_window,
    leases,
    make_flat,
    mode,
    node,
    open_image,
    put,
    real,
    say,
    tidy,
)
from loopd.table import table_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from loopd.losetup import Lease
    from loopd.table import Partition

USAGE = """Usage:
  kpartx [-a|-d|-u|-l] [-r] [-p] [-f] [-g] [-s|-n] [-v] wholedisk
\t-a add partition devmappings
\t-r devmappings will be readonly
\t-d del partition devmappings
\t-u update partition devmappings
\t-l list partitions devmappings that would be added by -a
\t-p set device name-partition number delimiter
\t-t read tables of this type alone: gpt or dos
\t-g force GUID partition table (GPT)
\t-v verbose
\t-f, -n, -s change nothing: devices are there when kpartx returns
"""


class Arguments:
    """What the command line says."""

    action = "l"
    read_only = verbose = force_gpt = False
    delimiter: str | None = None
    kind = ""
    disk = ""


def parse_kpartx(words: list[str]) -> Arguments:
    """The command line as getopt(3) reads it; the usage and exit code 1 where it does not fit."""
    found = Arguments()
    operands: list[str] = []
    left = list(words)
    while left:
        word = left.pop(0)
        if word == "--":
            operands += left
            break
        if not word.startswith("-") or word == "-":
            operands.append(word)
            continue
        letters = word[1:]
        while letters:
            letter, letters = letters[0], letters[1:]
            if letter in "pt":
                if not letters and not left:
                    put(f"{NAME}: option requires an argument -- '{letter}'\n", 2)
                    usage()
                value, letters = letters or left.pop(0), ""
                setattr(found, "delimiter" if letter == "p" else "kind", value)
            elif letter in "ladu":
                found.action = letter
            elif letter not in "rfgvsn":
                put(f"{NAME}: invalid option -- '{letter}'\n", 2)
                usage()
            found.read_only |= letter == "r"
            found.verbose |= letter == "v"
            found.force_gpt |= letter == "g"
    if not 1 <= len(operands) <= 2:
        usage()
    found.disk = operands[0]
    return found


def usage() -> None:
    put(f"{NAME} (loopd {VERSION})\n{USAGE}")
    raise SystemExit(1)


# Maps -------------------------------------------------------------------------------------------------------------


def maps(found: list[Lease]) -> dict[str, Lease]:
    """The windows by the name that they have in /dev/mapper."""
    return {str(lease["ref"])[len(MAPPER) + 1 :]: lease for lease in found if is_window(lease)}


def window_node(lease: Lease) -> str:
    """Where the name in /dev/mapper leads: relative, as the device mapper's."""
    path = f"{DIRECTORY}/{lease['devname']}"
    return f"..{path[len(DEV) :]}" if path.startswith(f"{DEV}/") else path


def make_name(name: str, lease: Lease) -> None:
    """Have the name in /dev/mapper lead to the window."""
    try:
        if mode(MAPPER) == 0:
            posix.mkdir(MAPPER, 0o755)
        path = f"{MAPPER}/{name}"
        if link_of(name) not in ("", window_node(lease)):
            posix.unlink(path)  # of a window that is gone
        if not link_of(name):
            posix.symlink(window_node(lease), path)
    except OSError as error:
        raise Failure(f"{MAPPER}/{name}: {error.strerror}") from None


def link_of(name: str) -> str:
    """Where a name in /dev/mapper leads, if it is a link; empty where there is none."""
    try:
        return posix.readlink(f"{MAPPER}/{name}")
    except OSError as error:
        return f"{MAPPER}/{name}" if error.errno == errno.EINVAL else ""


def remove_map(name: str, lease: Lease) -> None:
    """Detach a window, and remove its name; Failure while it is mounted, as with the device mapper."""
    if is_claimed(f"{DIRECTORY}/{lease['devname']}"):
        raise Failure(f"device-mapper: remove ioctl on {name}  failed: {posix.strerror(errno.EBUSY)}", "busy")
    reason = detached(lease["devname"])
    if link_of(name) == window_node(lease):
        posix.unlink(f"{MAPPER}/{name}")
    if reason:
        raise Failure(f"{name} is removed, but {lease['backing_file']} lacks what was written: {reason}")


# Actions ----------------------------------------------------------------------------------------------------------


class Disk:
    """The device whose partitions are meant; `file` where the command line has its file."""

    def __init__(self, arguments: Arguments, found: list[Lease]) -> None:
        self.created = False
        kind = mode(arguments.disk)
        self.is_file = kind == S_IFREG
        if not kind:
            put(f"failed to stat() {arguments.disk}\n")
            raise SystemExit(1)
        if self.is_file:
            lease = next((row for row in found if is_whole(row) and backs(row, arguments.disk)), None)
            if lease is None:
                lease, self.created = attached_disk(arguments), True
        else:
            if kind != S_IFBLK:
                raise Failure(f"invalid device: {arguments.disk}")
            name = devname(arguments.disk)
            lease = next((row for row in found if row["devname"] == name), None)
            if lease is None:
                become(real("kpartx"))
        self.lease = lease
        self.name = str(lease["devname"])
        self.path = node(self.name) if self.is_file else full(arguments.disk)

    def delete(self, verbose: bool) -> None:
        """Detach the device of a file."""
        reason = detached(self.name)
        tidy()
        if verbose:
            put(f"loop deleted : {self.path}\n", 2)
        if reason:
            raise Failure(f"{self.lease['backing_file']} lacks what was written: {reason}")

    def partitions(self, kind: str, force_gpt: bool) -> list[Partition]:
        """The partitions in its table."""
        try:
            found, partitions = table_of(self.path, self.lease["sector_size"], force_gpt)
        except OSError as error:
            raise Failure(f"{self.path}: {error.strerror}") from None
        return partitions if kind in ("", found) else []

    def image(self) -> int:
        """The file, opened once more; Failure where it is not found by the name that it has here."""
        path = backing_file(self.lease)
        fd = open_image(path, bool(self.lease["read_only"])) if mode(path) == S_IFREG else -1
        if fd < 0 or not backs(self.lease, f"/proc/self/fd/{fd}"):
            raise Failure(f"{path} is not the file of {self.path}")
        return fd


def is_whole(lease: Lease) -> bool:
    return not is_window(lease) and lease["state"] == "bound" and not lease["offset"] and not lease["sizelimit"]


def attached_disk(arguments: Arguments) -> Lease:
    """Attach the file, as losetup without options does."""
    options = Options()
    options.read_only = arguments.read_only
    name = attached(arguments.disk, options, f"can't set up loop: {arguments.disk}")["devname"]
    make_flat(name)
    return next(lease for lease in leases() if lease["devname"] == name)


def window(disk: Disk, arguments: Arguments, name: str, partition: Partition, old: Lease | None) -> Lease:
    """The window of a partition: the one that there is, if it is where the table has the partition, or a new one."""
    _, start, size, _ = partition
    offset, limit = disk.lease["offset"] + start * 512, size * 512
    if old is not None:
        if (old["offset"], old["sizelimit"]) == (offset, limit):
            make_name(name, old)
            return old
        remove_map(name, old)
    if len(MAPPER) + 1 + len(name) >= LO_NAME_SIZE:
        raise Failure("the name is too long")
    options = Options()
    options.offset, options.sizelimit, options.ref = offset, limit, f"{MAPPER}/{name}"
    options.sector_size = disk.lease["sector_size"]
    options.read_only = arguments.read_only or bool(disk.lease["read_only"])
    lease = attach(disk.image(), options)
    make_name(name, lease)
    return lease


def add(disk: Disk, arguments: Arguments, partitions: list[Partition], known: dict[str, Lease]) -> int:
    """Make the maps; how many could not be made."""
    failed = 0
    for partition in sorted(partitions, key=lambda row: (row[3] > 0, row[0])):  # the logical ones come last
        number, start, size, _ = partition
        name = f"{disk.name}{arguments.delimiter}{number}"
        try:
            lease = window(disk, arguments, name, partition, known.get(name))
        except (Failure, OSError) as error:
            put(f"create/reload failed on {name}: {error.strerror if isinstance(error, OSError) else error}\n", 2)
            failed += 1
            continue
        if arguments.verbose:
            table = f"linear {disk.lease['major']}:{disk.lease['minor']} {start}"
            put(f"add map {name} ({lease['major']}:{lease['minor']}): 0 {size} {table}\n")
    return failed


def number_of(name: str) -> int:
    """The number that a name ends with."""
    return int(name[len(name.rstrip("0123456789")) :] or 0)


def of_disk(disk: Disk, known: dict[str, Lease]) -> set[str]:
    """The names of the maps of a disk, with whatever delimiter."""
    names = {name for name in known if name.startswith(disk.name) and not name[len(disk.name) :][:1].isdecimal()}
    file = ("backing_dev", "backing_inode")
    return {name for name in names if all(known[name][field] == disk.lease[field] for field in file)}


def remove(names: set[str], arguments: Arguments, known: dict[str, Lease]) -> int:
    """Remove maps; how many could not be removed."""
    failed = 0
    for name in sorted(names, key=number_of, reverse=True):
        try:
            remove_map(name, known[name])
        except Failure as failure:
            put(f"{failure}\n", 2)
            failed += 1
            continue
        if arguments.verbose:
            put(f"del devmap : {name}\n")
    return failed


def show_maps(disk: Disk, arguments: Arguments, partitions: list[Partition]) -> None:
    """What `-a` would add. A logical partition is in the map of the extended one, whose number is made up."""
    outside = [row for row in partitions if not row[3]]
    for number, start, size, _ in outside:
        put(f"{disk.name}{arguments.delimiter}{number} : 0 {size} {disk.path} {start}\n")
    begins = {row[0]: (index, row[1]) for index, row in enumerate(outside)}
    for number, start, size, container in partitions:
        if container:
            index, begin = begins[container]
            put(f"{disk.name}{arguments.delimiter}{number} : 0 {size} /dev/dm-{index} {start - begin}\n")


def perform(arguments: Arguments) -> int:
    """Do what the command line says; how much of it failed."""
    found = leases()
    known = maps(found)
    if arguments.action == "d" and mode(arguments.disk) == S_IFREG:
        of_file = {name for name, lease in known.items() if backs(lease, arguments.disk)}
        if not any(is_whole(lease) and backs(lease, arguments.disk) for lease in found):
            return remove(of_file, arguments, known)  # the disk was detached before its maps
    disk = Disk(arguments, found)
    if arguments.delimiter is None:
        arguments.delimiter = "p"
    if arguments.action == "d":
        failed = remove(of_disk(disk, known), arguments, known)
        if disk.is_file and not failed:
            disk.delete(arguments.verbose)
        return failed
    partitions = disk.partitions(arguments.kind, arguments.force_gpt)
    if arguments.action == "l":
        show_maps(disk, arguments, partitions)
        if disk.created:
            disk.delete(arguments.verbose)
        return 0
    failed = add(disk, arguments, partitions, known)
    if arguments.action == "u":
        right = {f"{disk.name}{arguments.delimiter}{row[0]}" for row in partitions}
        failed += remove(of_disk(disk, known) - right, arguments, known)
    return failed


def main() -> int:
    """The exit code: how many partitions failed, or 1."""
    try:
        if sys.argv[1:] == ["--version"]:
            put(f"{NAME} (loopd {VERSION})\n")
            return 0
        return perform(parse_kpartx(sys.argv[1:]))
    except Failure as failure:
        say(failure)
        return 1
    except SystemExit as end:
        return int(end.code or 0)


if __name__ == "__main__":
    posix._exit(main())  # noqa: SLF001  # without the tidying up of the interpreter
