"""Decoding a request: strict, for its bytes are a stranger's. The daemon's side of the protocol.

A validator returns the value or raises ValueError with what is expected. `bool` is an `int` to Python and is told apart
by `type() is`.
"""

from __future__ import annotations

import contextlib
import json
import re
from typing import Any, Callable, NoReturn

from loopd.protocol.wire import (
    DELIVERIES,
    DIRECT_IO,
    MAX_AFTER,
    MAX_DEPTH,
    MAX_DEVICES,
    MAX_FDS,
    MAX_ID,
    MAX_OFFSET,
    MAX_REF,
    MAX_REQUEST,
    MAX_WAIT,
    NO_UID,
    OPERATIONS,
    SECTOR_SIZES,
    Attach,
    Code,
    Directory,
    Envelope,
    Refusal,
    Request,
)


def _index(value: Any) -> int:
    if type(value) is int and 0 <= value < MAX_FDS:
        return value
    raise ValueError(f"the index of an fd of the datagram, 0 to {MAX_FDS - 1}")


def _flag(value: Any) -> bool:
    if type(value) is bool:
        return value
    raise ValueError("true or false")


def _size(value: Any) -> int:
    if type(value) is int and 0 <= value <= MAX_OFFSET:
        return value
    raise ValueError(f"a number of bytes, 0 to {MAX_OFFSET}")


def _sector_size(value: Any) -> int:
    if type(value) is int and value in SECTOR_SIZES:
        return value
    raise ValueError(f"one of {', '.join(map(str, SECTOR_SIZES))}")


def _devices(value: Any) -> int:
    if type(value) is int and 1 <= value <= MAX_DEVICES:
        return value
    raise ValueError(f"a number of devices, 1 to {MAX_DEVICES}")


def _uid(value: Any) -> int:
    if type(value) is int and 0 <= value < NO_UID:
        return value
    raise ValueError(f"a user's number, 0 to {NO_UID - 1}")


def _seconds(value: Any) -> float:
    if type(value) in (int, float) and 0 <= value <= MAX_WAIT:
        return float(value)
    raise ValueError(f"a number of seconds, 0 to {MAX_WAIT}")


def _text(limit: int, measure: Callable[[str], int], unit: str) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        # A control character would forge lines where a name is printed; a lone surrogate cannot be encoded.
        if type(value) is str and value.isprintable() and measure(value) <= limit:
            return value
        raise ValueError(f"a string of at most {limit} printable {unit}")

    return check


def _devname(value: Any) -> str:
    if (
        type(value) is str
        and value.startswith("loop")
        and value[4:].isdecimal()
        and value.isascii()
        and len(value) <= 11
    ):
        return value
    raise ValueError('the name of a device, as "loop4096"')


def _name(value: Any) -> str:
    # One component of a path: no slash, nothing hidden, no surprise in a shell.
    if type(value) is str and re.match(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}\Z", value):
        return value
    raise ValueError("a name of at most 64 letters, digits and any of _.- that begins with a letter or digit")


def _direct_io(value: Any) -> str:
    if type(value) is str and value in DIRECT_IO:
        return value
    raise ValueError(f"one of {', '.join(DIRECT_IO)}")


def _deliver(value: Any) -> tuple[str, ...]:
    if type(value) is list and value and all(type(v) is str and v in DELIVERIES for v in value):
        return tuple(dict.fromkeys(value))
    raise ValueError(f"a list of {', '.join(DELIVERIES)}")


_encoded = lambda text: len(text.encode())  # noqa: E731  # a measure of `_text`, beside its use

VALIDATORS: dict[str, Callable[[Any], Any]] = {
    "fd": _index,
    "dir_fd": _index,
    "reply_fd": _index,
    "lease_fd": _index,
    "id": _text(MAX_ID, len, "characters"),
    "offset": _size,
    "sizelimit": _size,
    "sector_size": _sector_size,
    "read_only": _flag,
    "partscan": _flag,
    "lock": _flag,
    "direct_io": _direct_io,
    "ref": _text(MAX_REF, _encoded, "bytes of UTF-8"),
    "deliver": _deliver,
    "devname": _devname,
    "diskseq": _size,
    "name": _name,
    "remove": _flag,
    "wait": _seconds,
    "force": _flag,
    "after": _text(MAX_AFTER, len, "characters"),
    "devices": _devices,
    "uid": _uid,
}
"""Every field of every request, by name: a name means the same in each operation."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a key stands twice")
    return fields


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


def _object(payload: bytes) -> dict[str, Any]:
    try:
        value = _decoder.decode(payload.decode())
    # RecursionError: nested arrays. ValueError: bad JSON, bad UTF-8, and an integer of more digits than Python
    # converts.
    except (ValueError, RecursionError) as error:
        raise Refusal(Code.MALFORMED, f"the request is no JSON object: {error}") from None
    if type(value) is not dict:
        raise Refusal(Code.MALFORMED, "the request is no JSON object")
    if _deep(value):
        raise Refusal(Code.MALFORMED, f"the request is nested more than {MAX_DEPTH} levels deep")
    return value


def _deep(value: Any) -> bool:
    """Whether it is nested deeper than `MAX_DEPTH`: how much Python itself bears differs by its version."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        nested = [item for item in level if isinstance(item, (dict, list))]
        if not nested:
            return False
        level = [inner for item in nested for inner in (item.values() if isinstance(item, dict) else item)]
    return True


def _check(name: str, value: Any) -> Any:
    try:
        return VALIDATORS[name](value)
    except ValueError as error:
        raise Refusal(Code.MALFORMED, f"{name}: expected {error}") from None


def _request(fields: dict[str, Any]) -> Request:
    op = fields.get("op", "attach")
    kind = OPERATIONS.get(op) if type(op) is str else None
    if kind is None:
        raise Refusal(Code.UNSUPPORTED, f"op: expected one of {', '.join(OPERATIONS)}")
    values = {}
    for name, value in fields.items():
        if name == "op":
            continue
        if name not in kind._fields:
            raise Refusal(Code.MALFORMED, f"{op} has no field of the name {name[:MAX_ID]!r}")
        values[name] = _check(name, value)
    try:
        request = kind(**values)
    except TypeError:
        missing = [name for name in kind._fields if name not in kind._field_defaults and name not in values]
        raise Refusal(Code.MALFORMED, f"{op} needs {', '.join(missing)}") from None
    if isinstance(request, Attach) and "node" in request.deliver and request.dir_fd is None:
        raise Refusal(Code.MALFORMED, 'dir_fd: expected with "node" in deliver')
    if isinstance(request, Attach) and request.reply_fd is None and request.deliver != ("node",):
        raise Refusal(Code.MALFORMED, f"reply_fd: expected with {request.deliver[0]!r} in deliver")
    if isinstance(request, Attach) and {"node", "mount"} <= set(request.deliver):
        raise Refusal(Code.MALFORMED, "deliver: a node lies in the client's directory or in the mount, not in both")
    if isinstance(request, Directory) and request.remove and request.devices is not None:
        raise Refusal(Code.MALFORMED, "devices: a directory that is removed has none")
    return request


def decode(payload: bytes) -> tuple[Envelope, Request | Refusal]:
    """One request datagram as a value, or why it is none; never raises. How many fds came with it is not known here."""
    if len(payload) > MAX_REQUEST:
        return Envelope(), Refusal(Code.MALFORMED, f"the request has more than {MAX_REQUEST} bytes")
    try:
        fields = _object(payload)
    except Refusal as refusal:
        return Envelope(), refusal
    known: dict[str, Any] = {}
    for name in ("reply_fd", "dir_fd", "id"):
        with contextlib.suppress(KeyError, Refusal):
            known[name] = _check(name, fields[name])
    op = fields.get("op", "attach")
    envelope = Envelope(op if type(op) is str and op in OPERATIONS else "", **known)
    try:
        return envelope, _request(fields)
    except Refusal as refusal:
        return envelope, refusal
