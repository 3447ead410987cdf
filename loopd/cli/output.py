"""What loopctl prints and says: results to standard output, all else to standard error, each safe for a terminal.

Changes when what is printed looks different, or when an error is told in other words.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import re
import sys
from typing import Any

from loopd.client import api as client
from loopd.protocol.decode import VALIDATORS


class Failure(Exception):
    """Something of loopctl's own that ends it with exit code 1."""


def prepare() -> None:
    """Have what is printed go out as the bytes that it is, in any locale."""
    for stream, errors in ((sys.stdout, "surrogateescape"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            # ASCII is what Python makes of the C locale, which says nothing about the terminal.
            known = codecs.lookup(stream.encoding).name != "ascii"
            stream.reconfigure(encoding=stream.encoding if known else "utf-8", errors=errors)


_UNDECODED = re.compile("[\udc80-\udcff]+")


def readable(text: str, errors: str = "backslashreplace") -> str:
    """`text` as a person reads it: the bytes that Python could not decode, in the C locale all of a letter such as
    an umlaut, are read as UTF-8.
    """
    return _UNDECODED.sub(lambda found: found[0].encode("ascii", "surrogateescape").decode("utf-8", errors), text)


def clean(text: str) -> str:
    """`text` on one line and harmless to a terminal: anybody may choose a backing file's name."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in readable(text))
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def warn(text: str) -> None:
    """One line to standard error; OSError where it cannot be written."""
    # Python leaves it None where fd 2 was closed at the start.
    if sys.stderr is None:
        return
    try:
        print(f"loopctl: {clean(text)}", file=sys.stderr)
    except OSError:
        sys.stderr = None  # else the flush at exit fails again, with exit code 120
        raise


def say(text: str) -> None:
    """One line to standard error, where there is anybody to read it."""
    with contextlib.suppress(OSError):
        warn(text)


def put(text: str) -> None:
    """To standard output, flushed: a device whose name nobody reads would be left over."""
    # As above, and print() would say nothing.
    if sys.stdout is None:
        raise Failure("standard output is closed")
    try:
        print(text, flush=True)
    except OSError as error:
        sys.stdout = None  # likewise
        raise Failure(f"standard output: {error.strerror}") from error


def fields(record: Any) -> dict[str, Any]:
    """A reply as JSON has it; what is not known is left out."""
    return {name: value for name, value in record._asdict().items() if value is not None}


_WORDS = {"dir_fd": "DIR", "lease_fd": "--lifetime", "devname": "DEVICE", "name": "NAME"}
_FIELD = re.compile(rf"(^|; )({'|'.join(VALIDATORS)}): ")
_ANOTHERS = re.compile(r"force: (loop\d+ is another's)")


def described(error: OSError) -> str:
    """An OSError in words: the file's name, if it is about one, and what is the matter with it."""
    said = error.strerror or str(error)
    return said if error.filename is None else f"{error.filename or repr('')}: {said}"


def explain(error: client.Error, image: str = "IMAGE") -> None:
    """Say an error with the words of the command line in place of the wire's fields."""
    words = {**_WORDS, "fd": image}
    message = _ANOTHERS.sub(r"\1: --force ends it too", error.message)
    say(_FIELD.sub(lambda m: f"{m[1]}{words.get(m[2], '--' + m[2].replace('_', '-'))}: ", message))
    if error.hint:
        say(error.hint)


def tell(error: BaseException, image: str = "IMAGE") -> None:
    """Say what ended a verb, and what its notes add, such as that the image lacks what was written."""
    if isinstance(error, client.Error):
        explain(error, image)
    elif isinstance(error, OSError):
        what_for = ": expected an image; --directory is for the nodes" if isinstance(error, IsADirectoryError) else ""
        say(described(error) + what_for)
    elif isinstance(error, Failure):
        say(str(error))
    for note in getattr(error, "__notes__", ()):
        say(note)
