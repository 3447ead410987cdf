"""What stands behind an option or a verb, from text to a value: sizes, seconds, devices, lifetimes.

Changes when an option takes another kind of value. A wrong one is an ArgumentTypeError with a sentence.
"""

from __future__ import annotations

import argparse
import os
import re

from loopd.cli.table import COLUMNS, SUFFIXES
from loopd.protocol import wire
from loopd.protocol.decode import VALIDATORS

_PARTITION = re.compile(r"(loop[0-9]+)p[0-9]+")
_SIZE = re.compile(rf"(0x[0-9a-f]+|0|[1-9][0-9]*)(?:([{SUFFIXES}])(i?b)?)?", re.ASCII | re.IGNORECASE)


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


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value <= wire.MAX_WAIT:
        raise argparse.ArgumentTypeError(f"expected seconds, 0 to {wire.MAX_WAIT}, not {text!r}")
    return value


def devices(text: str) -> int:
    """How many device numbers a directory owns."""
    value = int(text) if text.isascii() and text.isdecimal() and len(text) < 9 else 0
    if not 1 <= value <= wire.MAX_DEVICES:
        raise argparse.ArgumentTypeError(f"expected 1 to {wire.MAX_DEVICES}, not {text!r}")
    return value


def is_device(text: str) -> bool:
    """Whether a word is a device's name or the path of its node, and not the path of a file that is named so."""
    try:
        VALIDATORS["devname"](os.path.basename(text))
    except ValueError:
        return False
    return "/" not in text or not os.path.isfile(text)


def device_or_image(text: str) -> str:
    """A device, or the path of an image. A partition is neither, and the error names its device."""
    if not is_device(text) and _PARTITION.fullmatch(os.path.basename(text)) and not os.path.isfile(text):
        return device(text)
    return text


def device(text: str) -> str:
    try:
        VALIDATORS["devname"](os.path.basename(text))
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


def columns(text: str) -> tuple[str, ...]:
    """Columns of ``loopctl list``, by their names in any case, or all."""
    if text.lower() == "all":
        return tuple(COLUMNS)
    found = tuple(name.strip().upper() for name in text.split(","))
    wrong = [name for name in found if name not in COLUMNS]
    if wrong:
        raise argparse.ArgumentTypeError(f"no column {wrong[0]!r}; expected all, or some of {','.join(COLUMNS)}")
    return found


def lifetime(text: str) -> str:
    number = text.isascii() and text.isdecimal() and int(text) < 2**31  # what pid_t holds
    if text not in ("container", "detach", "parent") and not number:
        raise argparse.ArgumentTypeError(f"expected container, detach, parent or the id of a process, not {text!r}")
    return text
