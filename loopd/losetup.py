#!/usr/bin/python3 -IS
"""``losetup`` for a container that has loopd's socket: the command line of util-linux 2.38 to 2.42.

Owns that command line, what it prints, its exit codes, and the flat names in /dev. One file, to be bind-mounted by
itself as `losetup`: it imports nothing of the package, and speaks the wire by itself. It sees and touches the owner's
devices alone, and opens neither /dev/loop-control nor a device that loopd did not give. Standard library of Python 3.8
and later. Build scripts wait for it, so what it imports and how long it is count for more than elsewhere: `socket` and
`json` alone take longer than all that is done here.

Exit codes: 0, done; 1, refused, failed, or a device that is not attached; 2, the status of a device cannot be told.
"""

from __future__ import annotations

import errno
import posix  # os is made of it, and takes several times as long
import sys
from _socket import (
    AF_UNIX,
    SCM_RIGHTS,
    SO_PASSCRED,
    SOCK_DGRAM,
    SOCK_SEQPACKET,
    SOL_SOCKET,
    socket,
    socketpair,
    timeout,
)
from time import monotonic, sleep

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Dict, Iterator, NoReturn, Sequence

    Lease = Dict[str, Any]


def variable(name: str) -> str:
    """A variable of the environment, else of PID 1's: sudo takes loopd's away. Empty where neither has it."""
    value = posix.environ.get(name.encode())
    if value is None:
        value = environment_of_the_container().get(name.encode(), b"")
    return value.decode(errors="surrogateescape")


def environment_of_the_container() -> dict[bytes, bytes]:
    """What the runtime gave to PID 1; empty where this user may not read it."""
    try:
        with open("/proc/1/environ", "rb") as file:
            return dict(word.split(b"=", 1) for word in file.read().split(b"\0") if b"=" in word)
    except OSError:
        return {}


def mode(path: str) -> int:
    """The type of a file, 0 where there is none."""
    try:
        return posix.stat(path).st_mode & 0o170000  # S_IFMT
    except OSError:
        return 0


S_IFDIR, S_IFBLK, S_IFREG = 0o040000, 0o060000, 0o100000

VERSION = "0.1.0"
SPEAKS = "2.42"
SOCKET = variable("LOOPD_SOCKET") or "/run/loopd/loopd.sock"
TIMEOUT = 60.0
"""Seconds for a request and its reply: more than the daemon takes before it gives up by itself."""
DETACH_WAIT = 1.0
"""Seconds that a detach may take; a device that somebody has open goes at the last close, as the kernel's does."""
DEV = "/dev"
DIRECTORY = variable("LOOPD_DIRECTORY") or ("/dev/loopd" if mode("/dev/loopd") == S_IFDIR else DEV)
"""Where the nodes are made: the directory grant that was bound into the container, else /dev."""
PARTITIONS = 16
"""Partitions whose flat names are made ahead of them, where there is no partition yet."""
MAPPER = f"{DEV}/mapper"
MAX_REPLY = 65536

NAME = sys.argv[0].rpartition("/")[2] or "losetup"
RARE = ("overlapping", "keep", "clear", "remove", "capacity", "change", "show_one", "show_all", "columns",
        "every_column", "usage_error", "help_text", "fall_back", "lost")  # fmt: skip
"""Functions that attaching and detaching do without: the installed program compiles them when they are called."""


class Failure(Exception):
    """What goes to standard error behind the program's name, before it ends with `status` or does the next device."""

    def __init__(self, message: str, code: str = "", status: int = 1) -> None:
        super().__init__(message)
        self.code = code
        self.status = status


def put(text: str, fd: int = 1) -> None:
    """Write all of it, without a buffer that were to be flushed; a file's name may be any bytes."""
    data = text.encode(errors="surrogateescape")
    try:
        while data:
            data = data[posix.write(fd, data) :]
    except OSError as error:
        if fd == 1:
            raise Failure(f"write error: {error.strerror}") from None


def say(text: object) -> None:
    """A line to standard error; what another chose, such as a file's name, cannot forge a second one."""
    put(f"{NAME}: {''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in str(text))}\n", 2)


def usage_error(text: str) -> NoReturn:
    say(text)
    put(f"Try '{NAME} --help' for more information.\n", 2)
    raise SystemExit(1)


# The command line -------------------------------------------------------------------------------------------------

LONG = {
    "all": "a",
    "set-capacity": "c",
    "detach": "d",
    "detach-all": "D",
    "find": "f",
    "nooverlap": "L",
    "help": "h",
    "associated": "j",
    "json": "J",
    "list": "l",
    "sector-size": "b",
    "noheadings": "n",
    "offset": "o",
    "output": "O",
    "output-all": "output-all",
    "sizelimit": "sizelimit",
    "partscan": "P",
    "read-only": "r",
    "direct-io": "direct-io",
    "raw": "raw",
    "loop-ref": "loop-ref",
    "show": "show",
    "verbose": "v",
    "version": "V",
    "remove": "remove",
}
"""Every option by its long name, in util-linux's order; its key is the letter where there is one."""
ARGUMENT = ("b", "j", "o", "O", "sizelimit", "loop-ref")
"""Keys of the options that have an argument."""
MAYBE = ("direct-io", "c", "d")
"""Keys of those that may have one. The device of -c and -d is their argument up to 2.41 and an operand in 2.42."""
EXCLUSIVE = (("D", "a", "c", "d", "f", "j", "remove"), ("D", "c", "d", "f", "l", "remove"),
             ("D", "O", "c", "d", "f", "remove"), ("J", "raw"))  # fmt: skip

ACTIONS = {"a": "show", "j": "show", "c": "capacity", "d": "detach", "D": "detach-all", "f": "find", "remove": "remove"}
FLAGS = {"J": "json", "n": "no_headings", "raw": "raw", "L": "no_overlap", "P": "partscan",
         "r": "read_only", "show": "show", "v": "verbose"}  # fmt: skip
LISTING = ("l", "O", "output-all")
TEXTS = {"j": "file", "O": "output", "loop-ref": "ref"}
SIZES = {
    "b": ("sector_size", "failed to parse logical block size"),
    "o": ("offset", "failed to parse offset"),
    "sizelimit": ("sizelimit", "failed to parse size"),
}


class Options:
    """What the command line says; None is what it does not."""

    action = ""
    list = json = no_headings = raw = no_overlap = partscan = read_only = show = verbose = False
    sector_size: int | None = None
    offset: int | None = None
    sizelimit: int | None = None
    file: str | None = None
    ref: str | None = None
    direct_io: bool | None = None
    output: str | None = None
    columns: Sequence[str] = ()
    operands: Sequence[str] = ()


def long_name(key: str) -> str:
    return next(name for name, value in LONG.items() if value == key)


def long_key(word: str) -> str:
    """The key of a long option that may be abbreviated, as getopt_long(3) has it."""
    name = word.partition("=")[0]
    if name in LONG:
        return LONG[name]
    found = [option for option in LONG if option.startswith(name)]
    if not found:
        usage_error(f"unrecognized option '--{word}'")
    if len(found) > 1:
        usage_error(f"option '--{word}' is ambiguous; possibilities: " + " ".join(f"'--{option}'" for option in found))
    return LONG[found[0]]


def getopt(arguments: Sequence[str], operands: list[str]) -> Iterator[tuple[str, str | None]]:
    """The options in their order, each with its argument; all else goes to `operands`, before, between or behind."""
    words = iter(arguments)
    for word in words:
        if word == "--":
            operands.extend(words)
        elif word.startswith("--"):
            _, equals, value = word.partition("=")
            key = long_key(word[2:])
            if equals and key not in ARGUMENT + MAYBE:
                usage_error(f"option '--{long_name(key)}' doesn't allow an argument")
            argument = value if equals else None
            if key in ARGUMENT and not equals:
                argument = next(words, None)
                if argument is None:
                    usage_error(f"option '--{long_name(key)}' requires an argument")
            yield key, argument
        elif word.startswith("-") and word != "-":
            yield from letters(word[1:], words)
        else:
            operands.append(word)


def letters(word: str, words: Iterator[str]) -> Iterator[tuple[str, str | None]]:
    """The options of a word of letters; an argument is the rest of the word, or the next word."""
    while word:
        key, word = word[0], word[1:]
        if key not in LONG.values():
            usage_error(f"invalid option -- '{key}'")
        argument = None
        if key in ARGUMENT or (key in MAYBE and word.startswith(("/", "loop"))):
            argument, word = word or next(words, None), ""
            if argument is None:
                usage_error(f"option requires an argument -- '{key}'")
        yield key, argument


def exclude(seen: list[str], key: str) -> None:
    """End the program where an option does not go with one that was there before."""
    for row in EXCLUSIVE:
        first = next((other for other in seen if other in row), key) if key in row else key
        if first != key:
            raise Failure(f"options --{long_name(first)} and --{long_name(key)} cannot be combined")
    seen.append(key)


def parse(arguments: Sequence[str]) -> Options:
    """The options, in the order and with the messages of losetup."""
    options = Options()
    seen: list[str] = []
    operands: list[str] = []
    devices: list[str] = []
    for key, value in getopt(arguments, operands):
        exclude(seen, key)
        if key in ("c", "d") and value is not None:
            devices.append(value)
        apply(options, key, value)
    options.operands = devices + operands
    if not arguments or (not options.action and len(arguments) == 1 and (options.raw or options.json)):
        options.action, options.list = "show", True
    settle(options)
    check(options)
    if options.list and not options.columns:
        options.columns = DEFAULT
    if options.output is not None:
        options.columns = columns(options.output, options.columns)
    return options


def apply(options: Options, key: str, value: str | None) -> None:
    """Take one option over."""
    options.action = ACTIONS.get(key, options.action)
    options.list = options.list or key in LISTING
    if key in FLAGS:
        setattr(options, FLAGS[key], True)
    elif key in TEXTS:
        setattr(options, TEXTS[key], value)
    elif key in SIZES:
        setattr(options, SIZES[key][0], size(value or "", SIZES[key][1]))
    elif key == "output-all":
        options.columns = every_column()
    elif key == "direct-io":
        options.direct_io = switch(value)
    elif key in TELL:
        put(TELL[key]())
        raise SystemExit(0)


def settle(options: Options) -> None:
    """The action, where the operands decide."""
    if options.action == "find" and options.operands:
        if len(options.operands) > 1:
            raise Failure("unexpected arguments")
        options.action, options.file = "create", options.operands[0]
    if options.list and not options.action and not options.operands:
        options.action = "show"
    if options.action in ("capacity", "detach", "remove") and not options.operands:
        raise Failure("no loop device specified")
    if not options.action and len(options.operands) == 1:
        options.action = "show-one"
        if options.direct_io is not None:
            options.action = "direct-io"
        elif options.sector_size is not None:
            options.action = "sector-size"
    if not options.action:
        if len(options.operands) < 2:
            raise Failure("no file specified" if options.operands else "no loop device specified")
        options.action = "create-at"


def check(options: Options) -> None:
    """Refuse options that do not go with the action."""
    if options.action.startswith("create"):
        return
    setup = options.sizelimit or options.partscan or options.read_only or options.show
    if setup or (options.direct_io and options.action != "direct-io"):
        which = "--{sizelimit,partscan,read-only,show}"
        raise Failure(f"the options {which} are allowed during loop device setup only")
    if options.offset is not None and (options.action != "show" or options.file is None):
        raise Failure("the option --offset is not allowed in this context")


SUFFIXES = "KMGTPEZY"


def size(text: str, message: str) -> int:
    """A number of bytes as strtoumax(3) reads it, with a suffix: 512, 0x200, 1K or 1KiB, 1KB, 1.5M."""
    number = text.lstrip()
    number = number[1:] if number.startswith("+") else number
    base = 16 if number[:2] in ("0x", "0X") else 8 if number[:1] == "0" else 10
    start = end = 2 if base == 16 else 0
    digits = "0123456789abcdefABCDEF"[: 22 if base == 16 else base]
    while number[end : end + 1] and number[end] in digits:
        end += 1
    suffix = number[end:]
    fraction = ""
    if suffix[:1] == ".":
        fraction = suffix[1:].rstrip(SUFFIXES + SUFFIXES.lower() + "iBb")
        suffix = suffix[1 + len(fraction) :]
    unit = scale(suffix)
    if end == start or not unit or (fraction and (not fraction.isdecimal() or unit == 1)):
        raise Failure(f"{message}: '{text}': {posix.strerror(errno.EINVAL)}")
    value = int(number[start:end], base) * unit
    if fraction:
        value += int(fraction) * unit // 10 ** len(fraction)
    if value >= 2**64:
        raise Failure(f"{message}: '{text}': {posix.strerror(errno.ERANGE)}")
    return value


def scale(suffix: str) -> int:
    """What a suffix multiplies by, 0 where it is none."""
    if not suffix:
        return 1
    base = {"": 1024, "ib": 1024, "iB": 1024, "b": 1000, "B": 1000}.get(suffix[1:], 0)
    power = SUFFIXES.find(suffix[0].upper()) + 1
    return base**power if power else 0


def switch(value: str | None) -> bool:
    if value not in (None, "on", "off"):
        raise Failure(f"unsupported argument: {value}")
    return value != "off"


def every_column() -> Sequence[str]:
    return tuple(COLUMNS)


def columns(text: str, given: Sequence[str]) -> Sequence[str]:
    """The columns of -O; a plus adds to those that are there."""
    names = text[1:] if text.startswith("+") else text
    found = []
    left = names
    while left:
        name, comma, rest = left.partition(",")
        if comma and not rest:
            name += comma
        if not name:
            raise SystemExit(1)
        if name.upper() not in COLUMNS:
            raise Failure(f"unknown column: {left}")
        found.append(name.upper())
        left = rest
    if not found:
        raise SystemExit(1)
    return (*given, *found) if text.startswith("+") else found


# The wire ---------------------------------------------------------------------------------------------------------

UNAVAILABLE = {
    errno.ENOENT: "on the host: systemctl enable --now loopd.socket; into a container, bind-mount the directory "
    "/run/loopd, read-only",
    errno.ECONNREFUSED: "on the host: systemctl restart loopd.socket; into a container, bind-mount the directory "
    "/run/loopd, not the socket in it",
    errno.EACCES: "add the user to the group loopd, a container with --group-add; where SELinux is enforcing, by "
    "loopd's policy module on the host, or with --security-opt label=disable",
}
"""What helps, by the errno of connect(2)."""


NO_SENSE = "the answer of loopd makes no sense; is it a newer one?"


def encoded(value: object) -> str:
    """A value of a request as JSON."""
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, list):
        return "[" + ",".join(map(encoded, value)) + "]"
    return str(value).lower()


class Scan:
    """What the scanner of `_json` wants to know."""

    strict = True
    object_hook = object_pairs_hook = array_hook = None
    parse_float = float
    parse_int = int
    parse_constant = None


def decoded(text: str) -> Any:
    """A JSON text as a value. The scanner in C without the package around it, which takes long to import."""
    context: Any = Scan
    try:
        from _json import make_scanner  # noqa: PLC0415

        scan = make_scanner(context)
    except (ImportError, AttributeError):
        import json  # noqa: PLC0415  # an interpreter without it in C, or a newer one, whose scanner asks for more

        return json.loads(text)
    return scan(text, 0)[0]


def ask(fields: dict[str, object], fds: Sequence[int] = ()) -> Lease:
    """One request and its reply; Failure with the daemon's code where it is a refusal. The fds stay the caller's.

    One that is dropped is sent again after pauses that grow: most likely others of this account have as many requests
    under way as it may have.
    """
    fields["reply_fd"] = len(fds)
    request = "{" + ",".join(f'"{name}":{encoded(value)}' for name, value in fields.items()) + "}"
    pause, deadline = 0.01, monotonic() + TIMEOUT
    while not (reply := answer(request, fds, deadline)):
        if monotonic() + pause > deadline:
            raise Failure(f"loopd at {SOCKET} dropped the request; `journalctl -u loopd` on the host tells why")
        sleep(pause * (0.5 + posix.urandom(1)[0] / 510))  # no two come back at the same time
        pause = min(2 * pause, 0.5)
    return checked(reply)


def answer(request: str, fds: Sequence[int], deadline: float) -> bytes:
    """The reply to a request that is sent once; empty where it was dropped."""
    ours, theirs = socketpair(AF_UNIX, SOCK_SEQPACKET)
    sender = socket(AF_UNIX, SOCK_DGRAM)
    try:
        # The kernel attaches credentials where either side asks for them; a socket made by hand may not.
        sender.setsockopt(SOL_SOCKET, SO_PASSCRED, 1)
        sender.connect(SOCKET)
        sender.settimeout(max(deadline - monotonic(), 1e-3))
        rights = b"".join(fd.to_bytes(4, sys.byteorder) for fd in (*fds, theirs.fileno()))
        sender.sendmsg([request.encode()], [(SOL_SOCKET, SCM_RIGHTS, rights)])
        # With our copy of their end closed, their end of the conversation is a hang-up here.
        theirs.close()
        ours.settimeout(max(deadline - monotonic(), 1e-3))
        return ours.recv(MAX_REPLY)
    except ConnectionResetError:
        return b""
    except timeout:
        raise Failure(f"no answer from loopd at {SOCKET} in {TIMEOUT:g} s") from None
    except OSError as error:
        hint = UNAVAILABLE.get(error.errno or 0, "")
        why = error.strerror or str(error)
        raise Failure(f"cannot ask loopd at {SOCKET}: {why}" + (f" ({hint})" if hint else "")) from None
    finally:
        theirs.close()
        sender.close()
        ours.close()


def checked(reply: bytes) -> Lease:
    """The fields of a reply that is no refusal."""
    try:
        fields = decoded(reply.decode())
        error = fields.get("error")
        if error is None:
            return fields  # type: ignore[no-any-return]
        code, message = str(error["code"]), str(error["message"])
    # Without JSON the scanner raises StopIteration, or nothing at all where the package is not loaded (3.10, 3.11).
    except (AttributeError, KeyError, RecursionError, StopIteration, SystemError, TypeError, ValueError):
        raise Failure(NO_SENSE) from None
    raise Failure(message, code)


def open_directory() -> int:
    try:
        return posix.open(DIRECTORY, posix.O_RDONLY | posix.O_DIRECTORY | posix.O_CLOEXEC)
    except OSError as error:
        raise Failure(f"{DIRECTORY}: {error.strerror}") from None


def ask_about(**fields: object) -> Lease:
    """A request about devices that are there; a directory of loopd's own says whose."""
    if DIRECTORY == DEV:
        return ask(fields)
    fd = open_directory()
    try:
        return ask({**fields, "dir_fd": 0}, [fd])
    finally:
        posix.close(fd)


LEASE = set(
    "devname major minor offset sizelimit sector_size read_only direct_io partscan backing_file backing_dev "
    "backing_inode ref state".split()
)
"""What is needed of a row of the reply to ``list``."""


def leases() -> list[Lease]:
    """The owner's devices, all that the kernel has: after a umount loopd may not have heard of it yet."""
    found: list[Lease] = []
    after: dict[str, object] = {}
    while True:
        reply = ask_about(op="list", **after)
        rows = reply.get("leases") or []
        if not all(isinstance(row, dict) and row.keys() >= LEASE and is_devname(row["devname"]) for row in rows):
            raise Failure(NO_SENSE)
        # A window that stands in for a partition goes with its disk, and losetup shows no partitions.
        found += [row for row in rows if not (row.get("window") or let_go(row))]
        if not reply.get("more") or not rows:
            return found
        after = {"after": rows[-1]["devname"]}


def find(device: str) -> Lease:
    """The owner's device of that name."""
    name = devname(device)
    for lease in leases():
        if lease["devname"] == name:
            return lease
    raise Failure("", "not-found")


# Devices and their names ------------------------------------------------------------------------------------------


def is_devname(name: str) -> bool:
    return name.startswith("loop") and name[4:].isdecimal() and name.isascii()


def full(device: str) -> str:
    """A device as it was named, as a path: loop0 is /dev/loop0."""
    return device if device.startswith("/") else f"{DEV}/{device}"


def devname(device: str) -> str:
    """The kernel's name of a device, by that of its node, whether that is still there or not; Failure if it is none."""
    path = full(device)
    name = path.rpartition("/")[2]
    try:
        status = posix.stat(path)
    except OSError:
        pass
    else:
        name = ""
        if status.st_mode & 0o170000 == S_IFBLK:
            number = f"{posix.major(status.st_rdev)}:{posix.minor(status.st_rdev)}"
            try:
                name = posix.readlink(f"/sys/dev/block/{number}").rpartition("/")[2]
            except OSError:  # removed, or no /sys
                name = path.rpartition("/")[2]
    if not is_devname(name):
        raise Failure("", "not-found")
    return name


def node(name: str) -> str:
    """The path of a device of which the kernel's name is known; one that has no node here is lost."""
    for path in (f"{DEV}/{name}", f"{DIRECTORY}/{name}"):
        if mode(path) == S_IFBLK:
            return path
    return f"{DEV}/{name} (lost)"


def disk_of(name: str) -> str:
    """The device of a flat name: loop7 for loop7 and loop7p1; empty where the name is no device's."""
    number, letter, partition = name[4:].partition("p")
    plain = name.startswith("loop") and number.isdecimal() and (partition.isdecimal() or not letter)
    return f"loop{number}" if plain else ""


def target(name: str) -> str:
    """Where the flat name leads: relative to /dev, so that it holds in a chroot that has /dev bound into it, too."""
    path = f"{DIRECTORY}/{name}"
    return path[len(DEV) + 1 :] if path.startswith(f"{DEV}/") else path


def is_ours(name: str) -> bool:
    """Whether a flat name is a link of these programs."""
    try:
        return posix.readlink(f"{DEV}/{name}") == target(name)
    except OSError:
        return False


def is_flat(name: str) -> bool:
    """Whether the flat name is the device's: by a link, or by a node that the container's runtime made."""
    try:
        number = posix.stat(f"{DIRECTORY}/{name}").st_rdev
        return is_ours(name) or (mode(f"{DEV}/{name}") == S_IFBLK and posix.stat(f"{DEV}/{name}").st_rdev == number)
    except OSError:
        return False


def make_flat(name: str, ahead: bool = False) -> str:
    """Make the flat name in /dev of a device in a directory of its own; the path to call it by.

    With `ahead` the names of partitions, too: the table may be written later, and nothing of ours runs then.
    """
    if DIRECTORY == DEV:
        return f"{DEV}/{name}"
    link(name)
    if not is_flat(name):
        return f"{DIRECTORY}/{name}"
    for number in range(1, PARTITIONS + 1 if ahead else 1):
        link(f"{name}p{number}")
    return f"{DEV}/{name}"


def link(name: str) -> None:
    """Make a flat name; one that is taken is left alone, and so is a /dev that cannot be written."""
    try:
        posix.symlink(target(name), f"{DEV}/{name}")
    except OSError:
        return


def tidy(settled: str = "") -> None:
    """Have the flat names lead to what is there. A device may have gone at its umount, or got another table.

    Names that were made ahead stay, but for those of a device of which it is `settled` that there are no partitions.
    """
    if DIRECTORY == DEV:
        return
    try:
        there = {name for name in posix.listdir(DIRECTORY) if disk_of(name)}
        names = [name for name in posix.listdir(DEV) if disk_of(name)]
    except OSError:
        return
    cut = {settled, *(disk_of(name) for name in there if disk_of(name) != name)}
    for name in names:
        disk = disk_of(name)
        ahead = disk in there and disk not in cut
        if name not in there and not ahead and is_ours(name):
            try:
                posix.unlink(f"{DEV}/{name}")
            except OSError:
                return
    for name in there.difference(names):
        if name != disk_of(name) and is_flat(disk_of(name)):
            link(name)


def is_the_kernels() -> bool:
    """Whether the nodes are the kernel's to make, as in the /dev of a host, a devtmpfs."""
    try:
        with open("/proc/self/mountinfo", errors="surrogateescape", newline="\n") as file:
            mounts = [text for text in file if text.split(" ", 5)[4] == DEV]
    except OSError:  # no /proc
        return False
    return DIRECTORY == DEV and bool(mounts) and " - devtmpfs " in mounts[-1]


# Actions ----------------------------------------------------------------------------------------------------------


def open_image(path: str, read_only: bool) -> int:
    if not read_only:
        try:
            return posix.open(path, posix.O_RDWR | posix.O_CLOEXEC)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EROFS):
                raise
    return posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC)


CONTAINER = 1
"""PID 1 of this pid namespace: a device lives as long as the container."""


def pidfd(pid: int) -> int:
    if hasattr(posix, "pidfd_open"):
        return posix.pidfd_open(pid)
    import _ctypes  # noqa: PLC0415  # for Python 3.8 alone; the package around it takes long to import

    libc = _ctypes.dlopen(None, 2)  # type: ignore[arg-type]  # RTLD_NOW
    syscall = _ctypes.dlsym(libc, "syscall")
    fd: int = _ctypes.call_function(syscall, (434, pid, 0))  # SYS_pidfd_open, everywhere; close-on-exec by itself
    if fd < 0:
        raise OSError(errno.ENOSYS, "the kernel has no pidfd_open")
    return fd


LO_NAME_SIZE = 64  # <linux/loop.h>, with the terminating NUL


def reference(fd: int) -> str:
    """What losetup gives the kernel as the file's name where no reference is asked for."""
    try:
        text = posix.readlink(f"/proc/self/fd/{fd}".encode())[: LO_NAME_SIZE - 1].decode(errors="ignore")
    except OSError:  # no /proc
        return ""
    return text if text.isprintable() else ""


def checked_reference(text: str) -> str:
    if not text.isprintable() or len(text.encode()) >= LO_NAME_SIZE:
        raise Failure(f"a reference is printable and of less than {LO_NAME_SIZE} bytes")
    return text


def attached(file: str, options: Options, failed: str) -> Lease:
    """Attach a file; Failure that begins with `failed`."""
    try:
        return attach(open_image(file, options.read_only), options)
    except OSError as error:
        raise Failure(f"{failed}: {error.strerror}") from None
    except Failure as failure:
        raise Failure(f"{failed}: {failure}") from None


def create(options: Options) -> None:
    file = options.file or ""
    lease = overlapping(options) if options.no_overlap else None
    if lease is not None:
        if lease["read_only"] and not options.read_only:
            raise Failure(f"{file}: overlapping read-only loop device exists")
        path = keep(lease)
    else:
        reply = attached(file, options, f"{file}: failed to set up loop device")
        path = make_flat(reply["devname"], options.partscan and not reply.get("partitions"))
        tidy()
        if options.partscan:
            tell_of_partitions(path, reply)
    if options.show:
        put(f"{path}\n")
    warn_size(file, options)


def tell_of_partitions(path: str, reply: Lease) -> None:
    """Say it where a partition's node will not open here."""
    for text in reply.get("warnings") or ():
        if "partition" in str(text):
            say(f"{path}: {text}")
    for name in (reply.get("partitions") or ())[:1]:
        try:
            posix.close(posix.open(f"{DIRECTORY}/{name}", posix.O_RDONLY | posix.O_NONBLOCK | posix.O_CLOEXEC))
        except OSError as error:
            if error.errno == errno.EPERM:  # the device cgroup's errno; permissions are EACCES
                why = "the container's device cgroup allows no nodes of partitions"
                say(f"{path}: {name} does not open here: {why}; `kpartx -av {path}` makes devices that open")


def attach(image: int, options: Options, lifetime: int = CONTAINER) -> Lease:
    """Attach a file, whose fd is consumed, for as long as a process lives; the reply, whose devname is one."""
    fields: dict[str, object] = {"op": "attach", "fd": 0, "lease_fd": 1, "partscan": options.partscan}
    for name in ("offset", "sizelimit", "sector_size"):
        if getattr(options, name) is not None:
            fields[name] = getattr(options, name)
    if options.direct_io is not None:
        fields["direct_io"] = "on" if options.direct_io else "off"
    fields["read_only"] = options.read_only
    fds = [image]
    try:
        fields["ref"] = reference(image) if options.ref is None else checked_reference(options.ref)
        fds.append(pidfd(lifetime))
        kernels = is_the_kernels()
        if kernels:
            fields["deliver"] = ["fd"]  # which is not taken
        else:
            fields["dir_fd"] = 2
            fds.append(open_directory())
        reply = ask(fields, fds)
    except Failure as failure:
        said = str(failure)
        raise Failure(said[4:] if said.startswith("fd: ") else said, failure.code) from None  # the wire's name of it
    finally:
        for fd in fds:
            posix.close(fd)
    name = str(reply.get("devname"))
    if not is_devname(name):
        raise Failure(NO_SENSE)
    if kernels and not posix.access(full(name), posix.R_OK):
        ask_about(op="detach", devname=name, wait=DETACH_WAIT)
        raise Failure(f"{full(name)}: {posix.strerror(errno.EACCES)}")
    return reply


def find_unused(options: Options) -> None:
    """A device with nothing in it, for scripts that look for one, and make its node, before they attach their file.

    It is gone when the script ends.
    """
    try:
        empty = posix.memfd_create("unused", posix.MFD_CLOEXEC)
        posix.ftruncate(empty, 4096)
        path = make_flat(attach(empty, options, posix.getppid() or CONTAINER)["devname"])
    except OSError as error:
        raise Failure(f"cannot find an unused loop device: {error.strerror}") from None
    except Failure as failure:
        raise Failure(f"cannot find an unused loop device: {failure}") from None
    tidy()
    put(f"{path}\n")


def overlapping(options: Options) -> Lease | None:
    """The owner's device that has the same part of the file already; a failure where it has some of it."""
    file = options.file or ""
    offset, limit = options.offset or 0, options.sizelimit or 0
    try:
        posix.stat(file)
    except OSError:
        return None  # said when it is opened
    for lease in leases():
        if is_window(lease) or not backs(lease, file):
            continue
        # One that was detached while it was open has no node any more.
        same = (lease["offset"], lease["sizelimit"], lease["state"]) == (offset, limit, "bound")
        if same and mode(node(lease["devname"])) == S_IFBLK:
            return lease
        before = limit and offset + limit <= lease["offset"]
        behind = lease["sizelimit"] and offset >= lease["offset"] + lease["sizelimit"]
        if not before and not behind:
            raise Failure(f"{file}: overlapping loop device exists", "overlap")
    return None


def keep(lease: Lease) -> str:
    """The path of a device that was found, which is to stay until it is detached, as losetup has it."""
    path = node(lease["devname"])
    if sysfs(lease["devname"], "loop/autoclear") == "1":
        try:
            fd = open_image(path, read_only=False)
            try:
                set_autoclear(fd, False)
            finally:
                posix.close(fd)
        except OSError as error:
            raise Failure(f"{path}: failed to set up loop device: {error.strerror}") from None
    return path


def is_window(lease: Lease) -> bool:
    """Whether kpartx made it, of a partition: the real one makes no loop devices, and losetup shows none."""
    return str(lease["ref"]).startswith(f"{MAPPER}/")


def let_go(lease: Lease) -> bool:
    """Whether the kernel has done with a device, of which loopd has not heard yet."""
    return mode("/sys/block") == S_IFDIR and not sysfs(lease["devname"], "loop/backing_file")


def backs(lease: Lease, file: str) -> bool:
    """Whether a file is the one behind a device: the same inode, or the name of one that is gone."""
    try:
        status = posix.stat(file)
    except OSError:
        from os.path import realpath  # noqa: PLC0415

        return backing_file(lease) in (file, realpath(file))
    device = f"{posix.major(status.st_dev)}:{posix.minor(status.st_dev)}"
    return (lease["backing_dev"], lease["backing_inode"]) == (device, status.st_ino)


def warn_size(file: str, options: Options) -> None:
    try:
        length = options.sizelimit or posix.stat(file).st_size - (options.offset or 0)
    except OSError:
        return
    if length % 512:
        end = "the remaining end of the file will be ignored."
        say(f"{file}: Warning: file does not end on a 512-byte sector boundary; {end}")


def lost(device: str, what: str, failure: Failure) -> Failure:
    """A failure in losetup's words: a device that is not attached has the kernel's message."""
    path = full(device)
    if failure.code != "not-found":
        return Failure(f"{path}: {what}{failure}")
    number = errno.ENXIO if is_devname(device.rpartition("/")[2]) else errno.ENOTTY
    return Failure(f"{path}: {what}{posix.strerror(number if mode(path) else errno.ENOENT)}")


def detach(device: str) -> None:
    try:
        name = devname(device)
        file = sysfs(name, "loop/backing_file")
        reason = clear(device) if is_claimed(full(device)) else detached(name)
    except Failure as failure:
        raise lost(device, "detach failed: ", failure) from None
    except OSError as error:
        raise Failure(f"{full(device)}: detach failed: {error.strerror}") from None
    tidy()
    if reason:
        raise Failure(f"{full(device)}: detached, but {file or 'its file'} lacks what was written: {reason}")


def detached(name: str) -> str:
    """Detach a device; why the file lacks what was written, if it does."""
    return str(ask_about(op="detach", devname=name, wait=DETACH_WAIT).get("lost") or "")


def is_claimed(path: str) -> bool:
    """Whether it or a partition of it is mounted, swap or part of another device, in this container or elsewhere."""
    try:
        posix.close(posix.open(path, posix.O_RDONLY | posix.O_EXCL | posix.O_CLOEXEC))
    except OSError as error:
        return error.errno == errno.EBUSY
    return False


LOOP_CLR_FD = 0x4C01  # <linux/loop.h>
LOOP_SET_STATUS64 = 0x4C04
LOOP_GET_STATUS64 = 0x4C05
STATUS_SIZE = 232  # struct loop_info64
STATUS_FLAGS = slice(52, 56)
LO_FLAGS_AUTOCLEAR = 4


def clear(device: str) -> str:
    """Have the kernel unbind a device in use at its last close, and leave it its node: swapoff(8) needs that.

    What is written from now on is not known here; why the file lacks what was written before, if it does.
    """
    from fcntl import ioctl  # noqa: PLC0415

    find(device)
    reason = ""
    fd = posix.open(full(device), posix.O_RDONLY | posix.O_CLOEXEC)
    try:
        try:
            posix.fsync(fd)  # were this the last close, Linux 6.11 and later would drop what is in the cache
        except OSError as error:
            reason = error.strerror or str(error)
        ioctl(fd, LOOP_CLR_FD)
    except OSError as error:
        if error.errno != errno.ENXIO:  # it has gone meanwhile
            raise
    finally:
        posix.close(fd)
    return reason


def set_autoclear(fd: int, on: bool) -> None:
    """Whether the kernel unbinds a device at its last close."""
    from fcntl import ioctl  # noqa: PLC0415

    status = bytearray(ioctl(fd, LOOP_GET_STATUS64, bytes(STATUS_SIZE)))
    flags = int.from_bytes(status[STATUS_FLAGS], sys.byteorder) & ~LO_FLAGS_AUTOCLEAR
    status[STATUS_FLAGS] = (flags | (LO_FLAGS_AUTOCLEAR if on else 0)).to_bytes(4, sys.byteorder)
    again(lambda: ioctl(fd, LOOP_SET_STATUS64, bytes(status)))


def remove(device: str) -> None:
    """loopd removes a number by itself when its device is detached; so there is only to say whether it is."""
    try:
        name = devname(device)
    except Failure as failure:
        raise lost(device, "remove failed: ", failure) from None
    if any(lease["devname"] == name for lease in leases()) or sysfs(name, "loop/backing_file"):
        raise Failure(f"{full(device)}: remove failed: {posix.strerror(errno.EBUSY)}")


def capacity(device: str) -> None:
    try:
        ask_about(op="resize", devname=devname(device))
    except Failure as failure:
        raise lost(device, "set capacity failed: ", failure) from None


LOOP_SET_DIRECT_IO = 0x4C08  # <linux/loop.h>
LOOP_SET_BLOCK_SIZE = 0x4C09


def change(device: str, request: int, value: int, what: str) -> None:
    """Change an attached device by an ioctl of its own; without privilege it takes an fd that can write."""
    from fcntl import ioctl  # noqa: PLC0415

    try:
        find(device)
    except Failure as failure:
        raise lost(device, f"{what} failed: ", failure) from None
    try:
        fd = open_image(full(device), read_only=False)
        try:
            again(lambda: ioctl(fd, request, min(value, 2**31 - 1)))  # a long of the kernel's, an int of Python's
        finally:
            posix.close(fd)
    except OSError as error:
        raise Failure(f"{full(device)}: {what} failed: {error.strerror}") from None


def again(act: Any) -> None:
    """Do it, as often as losetup does where the kernel says EAGAIN: pages are left to be written (until Linux 6.1)."""
    from errno import EAGAIN  # noqa: PLC0415
    from time import sleep  # noqa: PLC0415

    for tries in range(10, -1, -1):
        try:
            act()
        except OSError as error:
            if error.errno != EAGAIN or not tries:
                raise
            sleep(0.25)
        else:
            return


def each(action: Any, devices: Sequence[str]) -> int:
    """Do it to each device, whatever becomes of the others."""
    status = 0
    for device in devices:
        try:
            action(device)
        except Failure as failure:
            say(failure)
            status = 1
    return status


# Showing ----------------------------------------------------------------------------------------------------------

COLUMNS = {
    "NAME": ("<", "text", "loop device"),
    "AUTOCLEAR": (">", "bool", "whether it goes at the last close"),
    "BACK-FILE": ("<", "text", "backing file"),
    "BACK-INO": (">", "number", "inode number of the backing file"),
    "BACK-MAJ:MIN": ("<", "text", "device numbers of the backing file's file system"),
    "BACK-MAJ": ("<", "text", "major of these"),
    "BACK-MIN": ("<", "text", "minor of these"),
    "MAJ:MIN": ("<", "text", "device numbers of the loop device"),
    "MAJ": (">", "number", "major of these"),
    "MIN": (">", "number", "minor of these"),
    "OFFSET": (">", "number", "start in the backing file, bytes"),
    "PARTSCAN": (">", "bool", "whether it has partitions"),
    "REF": ("<", "text", "reference string"),
    "RO": (">", "bool", "whether it is read-only"),
    "SIZELIMIT": (">", "number", "most bytes of the backing file, 0 for no limit"),
    "DIO": (">", "bool", "whether it bypasses the page cache"),
    "LOG-SEC": (">", "number", "logical sector size, bytes"),
}
"""Columns by name: alignment, type in JSON, meaning. The order is that of --output-all."""
LEAST = {"BACK-INO": 4, "BACK-MAJ": 6, "BACK-MIN": 6, "LOG-SEC": 4, "OFFSET": 5, "SIZELIMIT": 5}
"""Least width of a column with more than one character, which shows where the headings are not printed."""
DEFAULT = ("NAME", "SIZELIMIT", "OFFSET", "AUTOCLEAR", "RO", "BACK-FILE", "DIO", "LOG-SEC")


def sysfs(name: str, attribute: str) -> str:
    """What the kernel says of a device, empty where it or /sys is not there."""
    try:
        with open(f"/sys/block/{name}/{attribute}", errors="surrogateescape", newline="\n") as file:
            return file.read()[:-1]  # the newline that the kernel adds; one before it is the name's
    except OSError:
        return ""


def backing_file(lease: Lease) -> str:
    """As the kernel tells it to this process, in whose mount namespace it may have another path than in loopd's."""
    return sysfs(lease["devname"], "loop/backing_file") or str(lease["backing_file"])


def numbers(major: object, minor: object, width: int, compact: bool) -> str:
    return f"{major}:{minor}" if compact else f"{major:>{width}}:{minor:<3}"


def cells(lease: Lease, name: str, compact: bool) -> dict[str, str]:
    """Every column of a device. What a client can change by an ioctl is asked of the kernel."""
    if not lease:
        return unattached(name, compact)
    device = lease["devname"]
    major, minor = lease["backing_dev"].split(":")
    return {
        "AUTOCLEAR": sysfs(device, "loop/autoclear") or "1",
        "BACK-FILE": backing_file(lease),
        "BACK-INO": str(lease["backing_inode"]),
        "BACK-MAJ:MIN": numbers(major, minor, 8, compact),
        "BACK-MAJ": major,
        "BACK-MIN": minor,
        "NAME": name,
        "OFFSET": str(lease["offset"]),
        "PARTSCAN": str(int(lease["partscan"])),
        "REF": lease["ref"],
        "RO": sysfs(device, "ro") or str(int(lease["read_only"])),
        "SIZELIMIT": str(lease["sizelimit"]),
        "MAJ:MIN": numbers(lease["major"], lease["minor"], 3, compact),
        "MAJ": str(lease["major"]),
        "MIN": str(lease["minor"]),
        "DIO": sysfs(device, "loop/dio") or str(int(lease["direct_io"])),
        "LOG-SEC": sysfs(device, "queue/logical_block_size") or str(lease["sector_size"]),
    }


def unattached(path: str, compact: bool) -> dict[str, str]:
    """The row of a device that is not attached, or another's: losetup shows one where a list was asked for."""
    row = {column: "0" if kind == "bool" else "" for column, (_, kind, _) in COLUMNS.items()}
    row.update({"NAME": path, "PARTSCAN": "1"})
    if mode(path) == S_IFBLK:
        number = posix.stat(path).st_rdev
        major, minor = str(posix.major(number)), str(posix.minor(number))
        row.update({"MAJ": major, "MIN": minor, "MAJ:MIN": numbers(major, minor, 3, compact)})
        row["LOG-SEC"] = sysfs(path.rpartition("/")[2], "queue/logical_block_size")
    return row


def line(lease: Lease, name: str) -> str:
    """A device in the form of -a."""
    major, minor = map(int, lease["backing_dev"].split(":"))
    text = f"{name}: [{posix.makedev(major, minor):04}]:{lease['backing_inode']} ({backing_file(lease)})"
    for field in ("offset", "sizelimit"):
        if lease[field]:
            text += f", {field} {lease[field]}"
    return text + "\n"


def show(options: Options, found: Sequence[tuple[Lease, str]]) -> None:
    """Print devices, each with the name it goes by."""
    if not options.list:
        put("".join(line(lease, name) for lease, name in found))
        return
    rows = [cells(lease, name, options.raw or options.json) for lease, name in found]
    if options.json:
        put(json_text(options.columns, rows))
    elif rows:
        lines = [[row[column] for column in options.columns] for row in rows]
        head = [] if options.no_headings else [list(options.columns)]
        if options.raw:
            put("".join(" ".join(map(nonblank, cell)) + "\n" for cell in head + lines))
        else:
            put(table(options.columns, head + lines))


def table(names: Sequence[str], lines: list[list[str]]) -> str:
    """Columns side by side, each as wide as its widest cell."""
    lines = [[safe(text) for text in cell] for cell in lines]
    widths = [max(map(width, column)) for column in zip(*lines)]
    widths = [max(most, LEAST.get(name, 0)) if most > 1 else most for name, most in zip(names, widths)]
    text = ""
    for cell in lines:
        parts = []
        for name, value, most in zip(names, cell, widths):
            padding = " " * (most - width(value))
            parts.append(value + padding if COLUMNS[name][0] == "<" else padding + value)
        if not cell[-1] or COLUMNS[names[-1]][0] == "<":
            parts[-1] = cell[-1]
        text += " ".join(parts) + "\n"
    return text


def width(text: str) -> int:
    """Columns on a terminal."""
    if text.isascii():
        return len(text)
    from unicodedata import combining, east_asian_width  # noqa: PLC0415

    return sum(0 if combining(c) else 2 if east_asian_width(c) in "WF" else 1 for c in text)


def escaped(text: str, harmless: Any) -> str:
    def escape(c: str) -> str:
        return c if harmless(c) else "".join(f"\\x{byte:02x}" for byte in c.encode(errors="surrogateescape"))

    return "".join(map(escape, text))


def safe(text: str) -> str:
    return escaped(text.replace("\\x", "\\x5cx"), str.isprintable)


def nonblank(text: str) -> str:
    return escaped(text, lambda c: "!" <= c <= "~" and c != "\\")


JSON = {"\\": "\\\\", '"': '\\"', "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def json_value(kind: str, text: str) -> str:
    if not text:
        return "null"
    if kind == "number":
        return text
    if kind == "bool":
        return "true" if text == "1" else "false"
    return '"' + "".join(JSON.get(c) or (c if c >= " " else f"\\u{ord(c):04x}") for c in text) + '"'


def json_text(names: Sequence[str], rows: list[dict[str, str]]) -> str:
    objects = []
    for row in rows:
        fields = [f'         "{name.lower()}": {json_value(COLUMNS[name][1], row[name])}' for name in names]
        objects.append("{\n" + ",\n".join(fields) + "\n      }")
    body = "      " + ",".join(objects) if objects else ""
    return '{\n   "loopdevices": [\n' + body + "\n   ]\n}\n"


def help_text() -> str:
    options = """
 -a, --all                     show all of your devices
 -d, --detach <loopdev>...     detach devices
 -D, --detach-all              detach all of your devices
 -f, --find                    take a device for <file>; which one, loopd chooses
 -c, --set-capacity <loopdev>  take over the size of the backing file
 -j, --associated <file>       show the devices of <file>
 -L, --nooverlap               take no second device for the same part of <file>
     --remove <loopdev>...     remove devices that are detached (loopd has done so)

 -o, --offset <num>            start at byte <num> of the file
     --sizelimit <num>         use at most <num> bytes of the file
 -b, --sector-size <num>       logical sector size, bytes
 -P, --partscan                have the partitions found
 -r, --read-only               make the device read-only
     --direct-io[=<on|off>]    bypass the page cache; without this, where that can be
     --loop-ref <string>       reference string of the device
     --show                    print the name of the device
 -v, --verbose                 changes nothing

 -J, --json                    print the list as JSON
 -l, --list                    print a list, of all devices or one
 -n, --noheadings              print the list without headings
 -O, --output <cols>           columns of the list
     --output-all              all columns
     --raw                     print the list without alignment

 -h, --help                    print this
 -V, --version                 print the version

Columns:
"""
    usage = f"\nUsage:\n {NAME} [options] [<loopdev>]\n {NAME} [options] -f <file>\n"
    about = "\nLoop devices of loopd, for a container without /dev/loop-control.\n\nOptions:"
    return usage + about + options + "".join(f" {name:>12}  {COLUMNS[name][2]}\n" for name in COLUMNS)


# ------------------------------------------------------------------------------------------------------------------


def show_one(options: Options) -> None:
    device = options.operands[0]
    try:
        lease = find(device)
    except Failure as failure:
        if failure.code != "not-found":
            raise Failure(f"{full(device)}: {failure}", failure.code, 2) from None
        if not options.list:
            raise Failure(f"{full(device)}: {posix.strerror(errno.ENOENT)}") from None
        lease = {}
    show(options, [(lease, full(device))])


def detach_all(options: Options) -> int:
    return each(detach, [lease["devname"] for lease in leases() if not is_window(lease)])


def refuse_choice(options: Options) -> None:
    device = full(options.operands[0])
    raise Failure(f"{device}: failed to set up loop device: loopd chooses the device: {NAME} -f --show FILE")


def show_all(options: Options) -> None:
    tidy()
    found = [lease for lease in leases() if not is_window(lease)]
    found = [lease for lease in found if options.file is None or backs(lease, options.file)]
    if options.offset is not None:
        found = [lease for lease in found if lease["offset"] == options.offset]
    show(options, [(lease, node(lease["devname"])) for lease in found])


PERFORM: dict[str, Any] = {
    "create": create,
    "create-at": refuse_choice,
    "find": find_unused,
    "show": show_all,
    "show-one": show_one,
    "detach": lambda options: each(detach, options.operands),
    "detach-all": detach_all,
    "remove": lambda options: each(remove, options.operands),
    "capacity": lambda options: capacity(options.operands[0]),
    "direct-io": lambda options: change(options.operands[0], LOOP_SET_DIRECT_IO, options.direct_io, "set direct io"),
    "sector-size": lambda options: change(
        options.operands[0], LOOP_SET_BLOCK_SIZE, options.sector_size, "set logical block size"
    ),
}


# The real programs -------------------------------------------------------------------------------------------------

MARK = b"for a container that has loopd's socket"
"""What the first lines of each of these programs have, of whatever version."""
MOST_IN_A_ROW = 16
"""So many of these programs may have started one another, as mount does in a helper of mount's."""


def depth() -> int:
    """How many of these programs, one started by the other, this one stands in."""
    text = posix.environ.get(b"LOOPD_DEPTH", b"")
    return int(text) if text.isdigit() else 0


def real(name: str) -> str:
    """The path of the real program of that name: the first in PATH that is none of these."""
    path = variable("PATH")
    # An empty element would be the working directory, which may be a tree that is being built.
    for directory in filter(None, [*path.split(":"), "/usr/sbin", "/usr/bin", "/sbin", "/bin"]):
        if posix.access(f"{directory}/{name}", posix.X_OK) and not is_one_of_these(f"{directory}/{name}"):
            return f"{directory}/{name}"
    raise Failure(f"there is no other {name} in PATH")


def is_one_of_these(path: str) -> bool:
    """Whether a file is one of these programs, or a directory."""
    try:
        with open(path, "rb") as file:
            return MARK in file.read(4096)
    except OSError:
        return mode(path) == S_IFDIR


def environment() -> dict[bytes, bytes]:
    """That of a program which this one starts; Failure where it has led back here again and again."""
    if depth() >= MOST_IN_A_ROW:
        raise Failure(f"what this program takes for the real {NAME} runs this one again: have a look at PATH")
    return {**posix.environ, b"LOOPD_DEPTH": str(depth() + 1).encode()}


def become(path: str) -> NoReturn:
    """Be that program, with the same arguments."""
    from _signal import (  # type: ignore[import-not-found]  # noqa: PLC0415  # `signal` takes long to import
        SIG_DFL,
        SIGPIPE,
        SIGXFSZ,
        signal,
    )

    for number in (SIGPIPE, SIGXFSZ):  # which Python ignores, and it would inherit that
        signal(number, SIG_DFL)
    posix.execve(path, [NAME, *sys.argv[1:]], environment())


def fall_back(path: str) -> NoReturn:
    """Be the real losetup."""
    try:
        become(path)
    except OSError as error:
        raise Failure(f"LOOPD_LOSETUP_FALLBACK: {path}: {error.strerror}") from None


TELL: dict[str, Any] = {"h": help_text, "V": lambda: f"{NAME} from util-linux {SPEAKS} (loopd {VERSION})\n"}


def main() -> int:
    """Do what the command line says; the exit code."""
    fallback = variable("LOOPD_LOSETUP_FALLBACK")
    try:
        if fallback and not mode(SOCKET) and depth() < MOST_IN_A_ROW:  # it may be this one, or lead to it
            fall_back(fallback)
        options = parse(sys.argv[1:])
        return int(PERFORM[options.action](options) or 0)
    except Failure as failure:
        say(failure)
        return failure.status
    except SystemExit as end:
        return int(end.code or 0)
    except KeyboardInterrupt:
        return 130  # loopd takes a device away again whose client has gone before the answer


if __name__ == "__main__":
    posix._exit(main())  # noqa: SLF001  # without the tidying up of the interpreter, which takes as long as the request
