"""``loopctl``: the command line of the client.

Changes when there is another verb, or when the exit codes mean something else.

Exit codes: 0, done; 1, refused or failed, or a device that is detached but still in use, or whose image lacks
what was written; 2, a wrong command line; 130, interrupted. ``loopctl run`` exits as its command did (128 + N
where signal N ended it, 127 where there is no such command, 126 where it cannot be run), and with 1 where the
command succeeded and one of the above holds of the device.
"""

from __future__ import annotations

import argparse
import sys
from typing import Callable, NamedTuple, Sequence

from loopd.cli import options, verbs
from loopd.cli.options import Parser, Version, common, meant
from loopd.cli.output import Failure, prepare, tell
from loopd.client import api as client


class Verb(NamedTuple):
    help: str
    perform: Callable[[argparse.Namespace], int]
    options: Callable[[argparse.ArgumentParser], None]


VERBS: dict[str, Verb] = {
    "attach": Verb("attach an image to a loop device and print its path", verbs.attach, options.attach_options),
    "run": Verb(
        "attach an image for the length of a command, {} in which is the device", verbs.run, options.image_options
    ),
    "detach": Verb("detach devices and wait until their images are free", verbs.detach, options.detach_options),
    "list": Verb("show the devices that are held", verbs.listed, options.list_options),
    "directory": Verb(
        "on the host: make a directory to be bound into a container, and print its path; or list them",
        verbs.directory,
        options.directory_options,
    ),
    "rescan": Verb(
        "have the partitions of a device read again, and print their paths", verbs.rescan, options.device_option
    ),
    "resize": Verb("have a device take over the size of its image, and print it", verbs.resize, options.device_option),
    "doctor": Verb("look for what keeps devices from here, and say what helps", verbs.doctor, options.json_option),
    "hello": Verb("show what the daemon is and offers", verbs.hello, options.json_option),
    "metrics": Verb("on the host: print what the daemon counts, for Prometheus", verbs.metrics, options.metrics),
}


def parser() -> argparse.ArgumentParser:
    """The options in front of the verb; what follows it is for `verb_parser`, of which one is built."""
    verbs = "\n".join(f"  {name:11}{verb.help}" for name, verb in VERBS.items())
    top = Parser(
        "loopctl",
        "loopctl [options] VERB ...",
        f"Loop devices for containers, from loopd.\n\nverbs:\n{verbs}",
        "`loopctl VERB --help` tells more, loopctl(1) all.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    top.add_argument("--version", action=Version, nargs=0, help="print the version")
    common(top, told=True)
    top.add_argument("verb", metavar="VERB", nargs="?", help=argparse.SUPPRESS)
    top.add_argument("rest", metavar="...", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return top


def verb_parser(name: str) -> argparse.ArgumentParser:
    """The options of one verb, and the common ones once more."""
    verb = VERBS[name]
    usage = "%(prog)s [options] IMAGE -- COMMAND [ARGUMENT ...]" if name == "run" else None
    about = verb.help[0].upper() + verb.help[1:] + "."
    more = "The options of `loopctl --help` may stand here, too."
    result = Parser(f"loopctl {name}", usage, about, more, allow_abbrev=False)
    verb.options(result)
    return common(result, told=False)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    top = parser()
    args = top.parse_args(argv)
    if args.verb not in VERBS:
        said = "" if args.verb is None else f", not {args.verb!r}{meant(args.verb, VERBS)}"
        top.error(f"expected one of {', '.join(VERBS)}{said}")
    rest, words = args.rest, list(sys.argv[1:] if argv is None else argv)
    if words[: len(words) - len(rest)][-1] == "--":
        rest = ["--", *rest]  # argparse takes the one directly behind the verb away
    behind = verb_parser(args.verb)
    if args.verb == "run":
        # Not left to argparse, which in some versions takes a second "--" out of the command.
        end = rest.index("--") if "--" in rest else len(rest)
        rest, args.command = rest[:end], rest[end + 1 :]
        if not args.command and not {"-h", "--help"} & set(rest):
            behind.error("expected -- and a command behind the image")
    behind.parse_args(rest, args)  # leaves be what was given in front of the verb
    if args.verb == "detach":
        _check_detach(args, behind)
    if args.verb == "directory":
        _check_directory(args, behind)
    return args


def _check_detach(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if bool(args.device) == args.all:
        parser.error("expected either devices or --all")
    if args.force and not (args.admin or args.socket):
        parser.error("--force needs --admin")
    if args.all and args.admin and not args.force:
        parser.error("--all with --admin is everybody's: it needs --force")


def _check_directory(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if args.name is None and (args.remove or args.devices or args.cdi or args.user):
        parser.error("expected the NAME of the directory")
    if args.remove and (args.devices or args.json or args.cdi):
        parser.error("--remove goes with neither --devices nor --json nor --cdi: a specification goes by itself")
    for option in ("losetup", "force", *(() if args.remove else ("cdi_dir",))):
        if getattr(args, option) and not args.cdi:
            parser.error(f"--{option.replace('_', '-')} needs --cdi")
    if args.cdi and (args.json or args.admin):
        parser.error("--cdi goes with neither --json nor --admin")


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``loopctl`` with `argv`, by default the process's; its exit code. SystemExit(2) for bad usage."""
    prepare()
    image = "IMAGE"
    try:
        args = _parse(argv)
        image = getattr(args, "image", image)
        return VERBS[args.verb].perform(args)
    except (client.Error, Failure, OSError, KeyboardInterrupt) as error:
        tell(error, image)
        return 130 if isinstance(error, KeyboardInterrupt) else 1


if __name__ == "__main__":
    sys.exit(main())
