"""The options of each verb, and the parser that reads them.

Changes when a verb has another option.
"""

from __future__ import annotations

import argparse
import codecs
import re
from typing import Any, Iterable, NoReturn

from loopd import __version__
from loopd.cli.output import put, readable, say
from loopd.cli.table import COLUMNS
from loopd.cli.values import columns, device, device_or_image, devices, lifetime, seconds, size
from loopd.client import api as client
from loopd.protocol import wire


def meant(word: str, known: Iterable[str]) -> str:
    """What to say behind a word that is not known."""
    from difflib import get_close_matches  # noqa: PLC0415  # costs all who do not need it

    found = get_close_matches(word.partition("=")[0], known, 1)
    return f"; did you mean {found[0]}?" if found else ""


_ESCAPED = re.compile(r"(?:\\udc[89a-f][0-9a-f])+")


class Parser(argparse.ArgumentParser):
    """One line for what is wrong, and one for where to read more: no usage of many lines in front of them."""

    def error(self, message: str) -> NoReturn:
        word = message.partition("unrecognized arguments: ")[2].partition(" ")[0]
        # argparse quotes a word by repr(), which escapes what Python could not decode.
        message = _ESCAPED.sub(lambda found: codecs.decode(found[0], "unicode_escape"), message)
        say(message + (meant(word, self._option_string_actions) if word.startswith("--") else ""))
        say(f"`{self.prog} --help` tells more")
        raise SystemExit(2)

    def print_help(self, file: object = None) -> None:
        put(self.format_help().rstrip("\n"))


class Version(argparse.Action):
    """Print the version and end, as argparse's own action, which does not see that nobody gets it."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        put(f"loopctl {__version__}")
        parser.exit()


def image_options(parser: argparse.ArgumentParser) -> None:
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
        type=lambda text: readable(text, "surrogateescape"),
        default="",
        help=f"text to keep with the device, at most {wire.MAX_REF} bytes",
    )


def attach_options(parser: argparse.ArgumentParser) -> None:
    image_options(parser)
    parser.add_argument(
        "--lifetime",
        metavar="container|parent|PID|detach",
        type=lifetime,
        default="container",
        help="what ends the device, beside `loopctl detach`: the end of PID 1 of this PID namespace "
        "(container, the default); of the process that called loopctl (parent: mind that $(...) may be one of "
        "its own); of a process (PID, as $$). detach is another name of container: nothing outlives that",
    )
    parser.add_argument("--json", action="store_true", help="print all that is known of the device")


def detach_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "device",
        metavar="DEVICE",
        nargs="*",
        type=device_or_image,
        help="the device, as /dev/loop4096 or loop4096, or its image",
    )
    add(
        "-a",
        "--all",
        action="store_true",
        help="all that `loopctl list` shows (with --admin --force: everybody's)",
    )
    add(
        "--wait",
        metavar="SECONDS",
        type=seconds,
        default=client.DETACH_WAIT,
        help=f"how long to wait until the image is free (default: {client.DETACH_WAIT:g})",
    )
    add("--force", action="store_true", help="whoever owns it (with --admin)")


def directory_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("name", metavar="NAME", nargs="?", help="its name, of letters, digits and any of _.-; without one, list all")
    add("--remove", action="store_true", help="remove it; there may be no device in it")
    add(
        "--devices",
        metavar="N",
        type=devices,
        help=f"how many device numbers it owns, 1 to {wire.MAX_DEVICES} (default: {wire.DEVICES} where it is made)",
    )
    add("--json", action="store_true", help="print JSON, with its device numbers")
    add("--user", metavar="USER", help="as root: the directory of another user, for that user's rootless containers")
    add(
        "--cdi",
        action="store_true",
        help="write a specification for container runtimes, too, and print the device to name: "
        "podman run --device DEVICE",
    )
    add(
        "--cdi-dir",
        metavar="DIR",
        help="where that is (default: /run/cdi, or a user's $XDG_RUNTIME_DIR/cdi)",
    )
    add("--losetup", action="store_true", help="with --cdi: the container's losetup, mount, kpartx, ... are loopd's")
    add("--force", action="store_true", help="with --cdi: also where max_loop is not in force")


def device_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("device", metavar="DEVICE", type=device, help="the device, as /dev/loop4096 or loop4096")


def no_option(_: argparse.ArgumentParser) -> None:
    pass


def metrics(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--openmetrics", action="store_true", help="in the format OpenMetrics 1.0")


def list_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "-o",
        "--output",
        metavar="COLUMNS",
        type=columns,
        help=f"the columns to print, with commas between them, or all: {', '.join(COLUMNS)}",
    )
    add("-n", "--noheadings", action="store_true", help="leave out the line with the names of the columns")
    add("--json", action="store_true", help="print JSON, with all that is known of each device")


def json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def common(parser: argparse.ArgumentParser, *, told: bool) -> argparse.ArgumentParser:
    """Add the options of every verb; `told`: in its help, too."""

    def add(name: str, help: str, **options: Any) -> None:
        parser.add_argument(name, help=help if told else argparse.SUPPRESS, **options)

    add("--socket", f"where loopd listens (default: $LOOPD_SOCKET or {client.SOCKET})", metavar="PATH")
    add("--admin", f"ask as the host's administrator, at {client.ADMIN_SOCKET}", action="store_true")
    text = f"for a request and its answer (default: {client.TIMEOUT:g})"
    add("--timeout", text, metavar="SECONDS", type=seconds, default=client.TIMEOUT)
    return parser
