"""``loopctl``: the command line of the client.

Owns the options, what is printed, and the exit codes; asks through `loopd.client` alone. What only one verb
needs is imported there.

Exit codes: 0, done; 1, refused or failed, or a device that is detached but still in use, or whose image lacks
what was written; 2, a wrong command line; 130, interrupted. ``loopctl run`` exits as its command did (128 + N
where signal N ended it, 127 where there is no such command, 126 where it cannot be run), and with 1 where the
command succeeded and one of the above holds of the device. What a program reads goes to standard output, all
else to standard error.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import signal
import sys
import time
from typing import Any, Callable, Iterable, Iterator, NamedTuple, NoReturn, Sequence

from loopd import __version__
from loopd.client import api as client
from loopd.protocol import wire

SUFFIXES = "KMGTPE"
_PARTITION = re.compile(r"(loop[0-9]+)p[0-9]+")
_SIZE = re.compile(rf"(0x[0-9a-f]+|0|[1-9][0-9]*)(?:([{SUFFIXES}])(i?b)?)?", re.ASCII | re.IGNORECASE)


class _Failure(Exception):
    """Something of loopctl's own that ends it with exit code 1."""


# What is printed --------------------------------------------------------------------------------------------


def _clean(text: str) -> str:
    """`text` on one line and harmless to a terminal: a backing file's name is for anybody to choose."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _say(text: str) -> None:
    if sys.stderr is not None:
        print(f"loopctl: {_clean(text)}", file=sys.stderr)


def _print(text: str) -> None:
    """To standard output, all the way: a device whose name nobody reads would be left over."""
    # Python leaves it None where fd 1 was closed at the start, and print() would say nothing.
    if sys.stdout is None:
        raise _Failure("standard output is closed")
    try:
        print(text, flush=True)
    except OSError as error:
        sys.stdout = None  # else the flush at exit fails again, with exit code 120
        raise _Failure(f"standard output: {error.strerror}") from error


def _fields(record: Any) -> dict[str, Any]:
    """A reply as JSON has it; what is not known is left out."""
    return {name: value for name, value in record._asdict().items() if value is not None}


def _size(size: int) -> str:
    """As lsblk prints it: the largest unit with a number of at least 1, one decimal."""
    value, unit = float(size), "B"
    for suffix in SUFFIXES:
        if value < 1024:
            break
        value, unit = value / 1024, suffix
    return f"{value:.1f}".replace(".0", "") + unit


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{int(seconds // length)}{unit}"
    return f"{int(seconds)}s"


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


class _Column(NamedTuple):
    name: str
    text: Callable[[wire.LeaseInfo], str]
    admin: bool = False


def _optional(value: object) -> str:
    return "-" if value is None else str(value)


COLUMNS = (
    _Column("NAME", lambda lease: lease.devname),
    _Column("SIZE", lambda lease: _size(lease.size)),
    _Column("RO", lambda lease: str(int(lease.read_only))),
    _Column("DIO", lambda lease: str(int(lease.direct_io))),
    _Column("SECTOR", lambda lease: str(lease.sector_size)),
    _Column("AGE", lambda lease: _age(lease.age)),
    _Column("STATE", lambda lease: lease.state),
    _Column("LEASE", lambda lease: lease.lease),
    _Column("OWNER", lambda lease: _optional(lease.account), admin=True),
    _Column("UNIT", lambda lease: lease.unit or "-", admin=True),
    _Column("UID", lambda lease: _optional(lease.uid), admin=True),
    _Column("PID", lambda lease: _optional(lease.pid), admin=True),
    _Column("OPEN-IN", lambda lease: ", ".join(lease.openers or ()) or "-", admin=True),
    _Column("BACK-FILE", lambda lease: lease.backing_file),
)
"""Of ``loopctl list``. The file's name, of any length, comes last."""


# Values of options ------------------------------------------------------------------------------------------


def size(text: str) -> int:
    """Bytes, as losetup takes them: K = KiB = 1024, KB = 1000 and so on to E, or hexadecimal with 0x."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(
            f"not a size: {text!r}; expected bytes, or a number with K, M, G, KiB, MB, ..."
        )
    number, suffix, unit = match.groups()
    value = int(number, 16 if number[:2].lower() == "0x" else 10)
    if suffix:
        value *= (1000 if unit and len(unit) == 1 else 1024) ** (SUFFIXES.index(suffix.upper()) + 1)
    if value > wire.MAX_OFFSET:
        raise argparse.ArgumentTypeError(f"more than {wire.MAX_OFFSET} bytes: {text!r}")
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value <= wire.MAX_WAIT:
        raise argparse.ArgumentTypeError(f"expected seconds, 0 to {wire.MAX_WAIT}, not {text!r}")
    return value


def _device(text: str) -> str:
    try:
        wire.VALIDATORS["devname"](os.path.basename(text))
    except ValueError:
        folder, name = os.path.split(text)
        partition = _PARTITION.fullmatch(name)
        if partition:
            whole = os.path.join(folder, partition[1])
            raise argparse.ArgumentTypeError(f"{text} is a partition: give {whole}") from None
        raise argparse.ArgumentTypeError(
            f"expected a device, as /dev/loop4096 or loop4096, not {text!r}: `loopctl list` shows which has which image"
        ) from None
    return text


def _lifetime(text: str) -> str:
    number = text.isascii() and text.isdecimal() and int(text) < 2**31  # what pid_t holds
    if text not in ("container", "detach", "parent") and not number:
        raise argparse.ArgumentTypeError(f"expected container, detach, parent or the id of a process, not {text!r}")
    return text


@contextlib.contextmanager
def _lease(lifetime: str) -> Iterator[client.Lifetime]:
    """What `client.attach` takes for the value of --lifetime."""
    if lifetime in ("container", "detach"):
        yield "container"
        return
    parent = os.getppid()
    pid = parent if lifetime == "parent" else int(lifetime)
    try:
        fd = client.pidfd_open(pid)
    except OSError as error:
        raise _Failure(f"process {pid}: {error.strerror}") from error
    try:
        # The parent may have ended before, and its id be another's: then this process has a new parent.
        if lifetime == "parent" and os.getppid() != parent:
            raise _Failure("the process that called loopctl has ended")
        yield fd
    finally:
        os.close(fd)


# The verbs --------------------------------------------------------------------------------------------------


def _unproved(args: argparse.Namespace) -> client.Client:
    return client.Client(args.socket or (client.ADMIN_SOCKET if args.admin else None), args.timeout)


def _client(args: argparse.Namespace) -> client.Client:
    asked = _unproved(args)
    # An ordinary socket would answer, about this user's own leases alone.
    if args.admin and args.socket and "metrics" not in asked.hello().operations:
        raise _Failure(f"--admin: {args.socket} is not an administrator's socket; an instance's is admin.sock")
    return asked


def _attached(args: argparse.Namespace, lifetime: client.Lifetime) -> client.Device:
    return _client(args).attach(
        args.image,
        args.directory,
        deliver=args.deliver and (args.deliver,),
        offset=args.offset,
        sizelimit=args.sizelimit,
        sector_size=args.sector_size,
        read_only=args.read_only,
        partscan=args.partscan,
        lock=args.lock,
        direct_io=args.direct_io,
        ref=args.ref,
        lifetime=lifetime,
    )


def _warn(args: argparse.Namespace, device: client.Device) -> None:
    for warning in device.warnings:
        _say(f"warning: {warning}")
    if device.read_only and not args.read_only:
        _say(f"warning: {args.image} cannot be written here, so the device is read-only")
    left = _beyond_the_last_sector(args)
    if left:
        _say(f"warning: {args.image}: the last {left} bytes fill no sector of {args.sector_size}, and are left out")


def _beyond_the_last_sector(args: argparse.Namespace) -> int:
    """Bytes at the end of the image that the device cannot have."""
    with contextlib.suppress(OSError):  # gone or renamed meanwhile
        length = max(0, os.stat(args.image).st_size - args.offset)  # a block device's is 0
        return int(min(length, args.sizelimit or length) % args.sector_size)
    return 0


def _attach(args: argparse.Namespace) -> int:
    # Whatever fails before the path is printed detaches again.
    with _lease(args.lifetime) as lifetime, _attached(args, lifetime) as device:
        _warn(args, device)
        path = _lasting(device) if args.deliver == "fd" else device.path
        if args.json:
            fields = {name: getattr(device, name) for name in wire.Attached._fields}
            _print(json.dumps({"path": path, **fields}, indent=2))
        else:
            _print(path)
        device.keep()
    return 0


def _lasting(device: client.Device) -> str:
    """Where a device that was delivered as an fd can be opened after loopctl has ended."""
    path = client.node_path(device.devname)
    if path is None or os.lstat(path).st_rdev != os.makedev(device.major, device.minor):
        raise _Failure(f"{device.devname} has no node here, and an fd of it ends with loopctl: use `loopctl run`")
    return path


def _command(argv: list[str], environment: dict[str, str]) -> int:
    """Run a command to its end; its exit status as a shell has it."""
    forwarded = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # where it was ignored, the kernel would keep no status
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, (*forwarded, signal.SIGCHLD))
    try:
        try:
            # Python ignores these two signals, and a command would inherit that.
            ignored = (signal.SIGPIPE, signal.SIGXFSZ)
            pid = os.posix_spawnp(argv[0], argv, environment, setsigmask=mask, setsigdef=ignored)
        except OSError as error:
            _say(f"{argv[0]}: {error.strerror}")
            return 127 if isinstance(error, FileNotFoundError) else 126
        while True:
            info = signal.sigwaitinfo((*forwarded, signal.SIGCHLD))
            if info.si_signo == signal.SIGCHLD:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
            # One that the kernel sent, as for ^C, has gone to the whole foreground process group, the command
            # included; but SIGHUP, where the terminal is gone, to the session's leader alone.
            elif info.si_code <= 0 or info.si_signo == signal.SIGHUP:
                os.kill(pid, info.si_signo)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _run(args: argparse.Namespace) -> int:
    status = 0
    try:
        with _attached(args, "device") as device:
            _warn(args, device)
            if args.deliver == "fd":
                os.set_inheritable(device.fd, True)  # its path is /proc/self/fd/N, in the command too
            argv = [argument.replace("{}", device.path) for argument in args.command]
            status = _command(argv, {**os.environ, "LOOPD_DEVICE": device.path})
    except client.Error as error:
        _explain(error, args.image)
        return status or 1
    return status


def _detach_all(args: argparse.Namespace) -> int:
    """Detach everything at once, and wait for all of it together."""
    asked = _client(args)
    left = [(lease.devname, lease.diskseq) for lease in asked.list()]
    deadline = time.monotonic() + args.wait
    failed = False
    for wait in (False, True):
        busy = []
        for devname, diskseq in left:
            seconds = max(0.0, deadline - time.monotonic()) if wait else 0
            try:
                if not asked.detach(devname, wait=seconds, force=args.force, diskseq=diskseq):
                    busy.append((devname, diskseq))
            except client.NotFound:
                pass  # gone by itself
            except client.Error as error:
                _explain(error)
                failed = True
                if isinstance(error, client.ImageIncomplete) and not error.released:
                    busy.append((devname, diskseq))
        left = busy
    for devname, _ in left:
        _explain(client.Busy(f"{devname} is detached, but somebody still has it open"))
    return int(failed or bool(left))


def _detach(args: argparse.Namespace) -> int:
    if args.all:
        return _detach_all(args)
    asked, failed = _client(args), False
    for device in args.device:
        try:
            if not asked.detach(device, wait=args.wait, force=args.force):
                raise client.Busy(f"{device} is detached, but somebody still has it open")
        except client.Error as error:
            _explain(error)
            failed = True
    return int(failed)


def _list(args: argparse.Namespace) -> int:
    asked = _client(args)
    leases = asked.list()
    everybodys = any(lease.account for lease in leases)
    if everybodys:
        from loopd.cli import openers  # noqa: PLC0415  # costs all who do not need it

        found = openers.find([lease.devname for lease in leases], asked.daemon_pid())
        leases = tuple(lease._replace(openers=found[lease.devname]) for lease in leases)
    if args.json:
        _print(json.dumps({"leases": [_fields(lease) for lease in leases]}, indent=2))
    elif leases:
        columns = [column for column in COLUMNS if not column.admin or everybodys]
        rows = [[_clean(column.text(lease)) for column in columns] for lease in leases]
        _print(_table([[column.name for column in columns], *rows]))
    return 0


def _directory(args: argparse.Namespace) -> int:
    path = _client(args).directory(args.name, remove=args.remove)
    if not args.remove:
        _print(path)
    return 0


def _rescan(args: argparse.Namespace) -> int:
    partitions = _client(args).rescan(args.device)
    folder = os.path.dirname(client.node_path(args.device) or args.device)
    if partitions:
        _print("\n".join(os.path.join(folder, name) for name in partitions))
    return 0


def _resize(args: argparse.Namespace) -> int:
    _print(str(_client(args).resize(args.device)))
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from loopd.cli import doctor  # noqa: PLC0415  # nobody else needs it

    findings = []
    for finding in doctor.examine(_unproved(args)):
        _print(_clean(str(finding)))
        findings.append(finding)
    return int(any(finding.failed for finding in findings))


def _hello(args: argparse.Namespace) -> int:
    greeting = _client(args).hello()
    if args.json:
        _print(json.dumps(_fields(greeting), indent=2))
    else:
        lines = [
            f"loopd {greeting.loopd}, protocol {greeting.protocol}",
            "operations: " + " ".join(greeting.operations),
        ]
        lines += [f"{name}: {value}" for name, value in greeting.limits.items()]
        _print("\n".join(map(_clean, lines)))
    return 0


def _metrics(args: argparse.Namespace) -> int:
    # Nobody but the administrator is answered, so that there is no other socket to choose.
    _print(client.Client(args.socket or client.ADMIN_SOCKET, args.timeout).metrics().rstrip("\n"))
    return 0


# The command line -------------------------------------------------------------------------------------------


def _meant(word: str, known: Iterable[str]) -> str:
    """What to say behind a word that is not known."""
    from difflib import get_close_matches  # noqa: PLC0415  # costs all who do not need it

    found = get_close_matches(word.partition("=")[0], known, 1)
    return f"; did you mean {found[0]}?" if found else ""


class _Parser(argparse.ArgumentParser):
    """One line for what is wrong, and one for where to read more: no usage of many lines in front of them."""

    def error(self, message: str) -> NoReturn:
        word = message.partition("unrecognized arguments: ")[2].partition(" ")[0]
        _say(message + (_meant(word, self._option_string_actions) if word.startswith("--") else ""))
        _say(f"`{self.prog} --help` tells more")
        raise SystemExit(2)


def _image_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("image", metavar="IMAGE", help="the file to bind; opened read-only where it cannot be written")
    add(
        "-d",
        "--directory",
        metavar="DIR",
        help="where the node is made (default: the first that works of the directory that is bound in at "
        f"$LOOPD_DIRECTORY or {client.DIRECTORY}, /dev, and a mount)",
    )
    add(
        "--deliver",
        choices=wire.DELIVERIES,
        help="insist on a node in DIR, on a mount, which is attached in DIR, or on an open fd, which is passed to "
        "the command of `loopctl run`",
    )
    add("-o", "--offset", metavar="BYTES", type=size, default=0, help="start of the device in the image")
    add(
        "--sizelimit",
        metavar="BYTES",
        type=size,
        default=0,
        help="size of the device at most (default: all of the image)",
    )
    add(
        "-b",
        "--sector-size",
        metavar="BYTES",
        type=size,
        choices=wire.SECTOR_SIZES,
        default=512,
        help="logical sector size: 512 (default), 1024, 2048 or 4096",
    )
    add("-r", "--read-only", action="store_true", help="a device that cannot be written")
    add("-P", "--partscan", action="store_true", help="find the partitions and make their nodes")
    add(
        "--direct-io",
        choices=wire.DIRECT_IO,
        default="auto",
        help="past the page cache: where possible (auto, the default), else be refused (on), never (off)",
    )
    add("--lock", action="store_true", help="keep udev on the host off the device as long as it is attached")
    add(
        "--ref",
        metavar="TEXT",
        default="",
        help=f"text to keep with the device, at most {wire.MAX_REF} bytes",
    )


def _attach_options(parser: argparse.ArgumentParser) -> None:
    _image_options(parser)
    parser.add_argument(
        "--lifetime",
        metavar="container|parent|PID|detach",
        type=_lifetime,
        default="container",
        help="what ends the device, beside `loopctl detach`: the end of PID 1 of this PID namespace "
        "(container, the default); of the process that called loopctl (parent: mind that $(...) may be one of "
        "its own); of a process (PID, as $$). detach is another name of container: nothing outlives that",
    )
    parser.add_argument("--json", action="store_true", help="print all that is known of the device")


def _detach_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("device", metavar="DEVICE", nargs="*", type=_device, help="the device, as /dev/loop4096 or loop4096")
    add(
        "-a",
        "--all",
        action="store_true",
        help="all that `loopctl list` shows (with --admin --force: everybody's)",
    )
    add(
        "--wait",
        metavar="SECONDS",
        type=_seconds,
        default=client.DETACH_WAIT,
        help=f"how long to wait until the image is free (default: {client.DETACH_WAIT:g})",
    )
    add("--force", action="store_true", help="whoever owns it (with --admin)")


def _directory_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("name", metavar="NAME", help="its name, of letters, digits and any of _.-")
    add("--remove", action="store_true", help="remove it; there may be no device in it")


def _device_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("device", metavar="DEVICE", type=_device, help="the device, as /dev/loop4096 or loop4096")


def _no_option(_: argparse.ArgumentParser) -> None:
    pass


def _json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


class Verb(NamedTuple):
    help: str
    perform: Callable[[argparse.Namespace], int]
    options: Callable[[argparse.ArgumentParser], None]


VERBS: dict[str, Verb] = {
    "attach": Verb("attach an image to a loop device and print its path", _attach, _attach_options),
    "run": Verb("attach an image for the length of a command, {} in which is the device", _run, _image_options),
    "detach": Verb("detach devices and wait until their images are free", _detach, _detach_options),
    "list": Verb("show the devices that are held", _list, _json_option),
    "directory": Verb(
        "on the host: make a directory to be bound into a container, and print its path",
        _directory,
        _directory_options,
    ),
    "rescan": Verb("have the partitions of a device read again, and print their paths", _rescan, _device_option),
    "resize": Verb("have a device take over the size of its image, and print it", _resize, _device_option),
    "doctor": Verb("look for what keeps devices from here, and say what helps", _doctor, _no_option),
    "hello": Verb("show what the daemon is and offers", _hello, _json_option),
    "metrics": Verb("on the host: print what the daemon counts, as OpenMetrics text", _metrics, _no_option),
}


def _common(parser: argparse.ArgumentParser, *, told: bool) -> argparse.ArgumentParser:
    """Add the options of every verb; `told`: in its help, too."""

    def add(name: str, help: str, **options: Any) -> None:
        parser.add_argument(name, help=help if told else argparse.SUPPRESS, **options)

    add("--socket", f"where loopd listens (default: $LOOPD_SOCKET or {client.SOCKET})", metavar="PATH")
    add("--admin", f"ask as the host's administrator, at {client.ADMIN_SOCKET}", action="store_true")
    seconds = f"for a request and its answer (default: {client.TIMEOUT:g})"
    add("--timeout", seconds, metavar="SECONDS", type=_seconds, default=client.TIMEOUT)
    return parser


def parser() -> argparse.ArgumentParser:
    """The options in front of the verb; what follows it is for `verb_parser`, of which one is built."""
    verbs = "\n".join(f"  {name:11}{verb.help}" for name, verb in VERBS.items())
    top = _Parser(
        "loopctl",
        "loopctl [options] VERB ...",
        f"Loop devices for containers, from loopd.\n\nverbs:\n{verbs}",
        "`loopctl VERB --help` tells more, loopctl(1) all.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"loopctl {__version__}", help="print the version")
    _common(top, told=True)
    top.add_argument("verb", metavar="VERB", nargs="?", help=argparse.SUPPRESS)
    top.add_argument("rest", metavar="...", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return top


def verb_parser(name: str) -> argparse.ArgumentParser:
    """The options of one verb, and the common ones once more."""
    verb = VERBS[name]
    usage = "%(prog)s [options] IMAGE -- COMMAND [ARGUMENT ...]" if name == "run" else None
    about = verb.help[0].upper() + verb.help[1:] + "."
    more = "The options of `loopctl --help` may stand here, too."
    result = _Parser(f"loopctl {name}", usage, about, more, allow_abbrev=False)
    verb.options(result)
    return _common(result, told=False)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    top = parser()
    args = top.parse_args(argv)
    if args.verb not in VERBS:
        said = "" if args.verb is None else f", not {args.verb!r}{_meant(args.verb, VERBS)}"
        top.error(f"expected one of {', '.join(VERBS)}{said}")
    rest, words = args.rest, list(sys.argv[1:] if argv is None else argv)
    if words[: len(words) - len(rest)][-1] == "--":
        rest = ["--", *rest]  # argparse takes the one directly behind the verb away
    options = verb_parser(args.verb)
    if args.verb == "run":
        # Not left to argparse, which in some versions takes a second "--" out of the command.
        end = rest.index("--") if "--" in rest else len(rest)
        rest, args.command = rest[:end], rest[end + 1 :]
        if not args.command and not {"-h", "--help"} & set(rest):
            options.error("expected -- and a command behind the image")
    options.parse_args(rest, args)  # leaves be what was given in front of the verb
    if args.verb == "detach":
        _check_detach(args, options)
    return args


def _check_detach(args: argparse.Namespace, options: argparse.ArgumentParser) -> None:
    if bool(args.device) == args.all:
        options.error("expected either devices or --all")
    if args.force and not (args.admin or args.socket):
        options.error("--force needs --admin")
    if args.all and args.admin and not args.force:
        options.error("--all with --admin is everybody's: it needs --force")


_WORDS = {"dir_fd": "DIR", "lease_fd": "--lifetime", "devname": "DEVICE", "name": "NAME"}
_FIELD = re.compile(rf"(^|; )({'|'.join(wire.VALIDATORS)}): ")


_ANOTHERS = re.compile(r"force: (loop\d+ is another's)")


def _explain(error: client.Error, image: str = "IMAGE") -> None:
    """What a message calls by the name of the wire's field is called as it was on the command line."""
    words = {**_WORDS, "fd": image}
    message = _ANOTHERS.sub(r"\1: --force ends it too", error.message)
    _say(_FIELD.sub(lambda m: f"{m[1]}{words.get(m[2], '--' + m[2].replace('_', '-'))}: ", message))
    if error.hint:
        _say(error.hint)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``loopctl`` with `argv`, by default the process's; its exit code. SystemExit(2) for bad usage."""
    args = _parse(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # a path goes out as the bytes that it is
    try:
        return VERBS[args.verb].perform(args)
    except (client.Error, _Failure, OSError, KeyboardInterrupt) as error:
        _tell(error, getattr(args, "image", "IMAGE"))
        return 130 if isinstance(error, KeyboardInterrupt) else 1


def _tell(error: BaseException, image: str) -> None:
    """Say what ended a verb, and what its notes add, such as that the image lacks what was written."""
    if isinstance(error, client.Error):
        _explain(error, image)
    elif isinstance(error, OSError):
        said = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        what_for = ": expected an image; --directory is for the nodes" if isinstance(error, IsADirectoryError) else ""
        _say(said + what_for)
    elif isinstance(error, _Failure):
        _say(str(error))
    for note in getattr(error, "__notes__", ()):
        _say(note)


if __name__ == "__main__":
    sys.exit(main())
