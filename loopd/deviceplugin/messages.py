"""The kubelet's messages that this program sends or receives, as bytes and as values.

Two interfaces: k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1 and .../podresources/v1. Each function names the message;
the numbers are those of the fields in the kubelet's api.proto. Written by hand: what protoc makes of that file runs
only with the protobuf library of its own version, and these are a few messages of texts, lists and flags. A field that
is not known is skipped, as protobuf demands, for a newer kubelet sends more. Imports nothing of the package.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

VERSION = "v1beta1"
REGISTER = "/v1beta1.Registration/Register"
PLUGIN = "v1beta1.DevicePlugin"
LIST_PODS = "/v1.PodResourcesLister/List"
EMPTY = b""
"""Empty, and every message whose fields have their defaults."""


class Mount(NamedTuple):
    """A directory or file of the host's that the container gets."""

    container_path: str
    host_path: str
    read_only: bool


class Device(NamedTuple):
    """A device node that the container gets, with a rule of the device cgroup for it."""

    container_path: str
    host_path: str
    permissions: str


class Container(NamedTuple):
    """ContainerAllocateResponse: what one container gets."""

    envs: dict[str, str]
    mounts: tuple[Mount, ...]
    devices: tuple[Device, ...]
    cdi_devices: tuple[str, ...]


# The wire -------------------------------------------------------------------------------------------------------------

VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _nested(number: int, payload: bytes) -> bytes:
    return _varint(number << 3 | LENGTH) + _varint(len(payload)) + payload


def _text(number: int, value: str) -> bytes:
    return _nested(number, value.encode()) if value else b""


def _flag(number: int, value: bool) -> bytes:
    return _varint(number << 3 | VARINT) + b"\1" if value else b""


def _read(data: bytes, position: int) -> tuple[int, int]:
    """A varint, and where it ends. Raises IndexError at the end of the data."""
    value = 0
    for shift in range(0, 64, 7):
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("a number of more than 64 bits")


def _fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The fields of type LENGTH: texts and messages. Raises ValueError."""
    position = 0
    try:
        while position < len(data):
            tag, position = _read(data, position)
            kind = tag & 7
            if kind == LENGTH:
                size, position = _read(data, position)
                yield tag >> 3, data[position : position + size]
                position += size
            elif kind == VARINT:
                _, position = _read(data, position)
            elif kind in (FIXED64, FIXED32):
                position += 8 if kind == FIXED64 else 4
            else:
                raise ValueError(f"a field of type {kind}")
        if position > len(data):
            raise ValueError("the message is cut off")
    except IndexError:
        raise ValueError("the message is cut off") from None


def _of(number: int, data: bytes) -> Iterator[bytes]:
    return (payload for found, payload in _fields(data) if found == number)


# What is sent ---------------------------------------------------------------------------------------------------------


def register_request(endpoint: str, resource: str) -> bytes:
    """RegisterRequest, without options."""
    return _text(1, VERSION) + _text(2, endpoint) + _text(3, resource)


def list_and_watch_response(ids: Iterable[str], healthy: bool) -> bytes:
    """ListAndWatchResponse with a Device for each id."""
    health = _text(2, "Healthy" if healthy else "Unhealthy")
    return b"".join(_nested(1, _text(1, ident) + health) for ident in ids)


def allocate_response(containers: Iterable[Container]) -> bytes:
    """AllocateResponse."""
    return b"".join(_nested(1, _container(container)) for container in containers)


def _container(container: Container) -> bytes:
    # An entry of a map is a message with the key as 1 and the value as 2.
    parts = [_nested(1, _text(1, name) + _text(2, value)) for name, value in container.envs.items()]
    for path, source, read_only in container.mounts:
        parts += [_nested(2, _text(1, path) + _text(2, source) + _flag(3, read_only))]
    for path, source, permissions in container.devices:
        parts += [_nested(3, _text(1, path) + _text(2, source) + _text(3, permissions))]
    parts += [_nested(5, _text(1, name)) for name in container.cdi_devices]
    return b"".join(parts)


# What is received -----------------------------------------------------------------------------------------------------


def allocate_request(data: bytes) -> tuple[tuple[str, ...], ...]:
    """AllocateRequest: the ids that each container is to get. Raises ValueError."""
    return tuple(tuple(ident.decode() for ident in _of(1, request)) for request in _of(1, data))


def pods(data: bytes) -> tuple[tuple[tuple[str, str], ...], ...]:
    """ListPodResourcesResponse: for each pod the resources that its containers have, and the ids of them. Raises
    ValueError.
    """
    return tuple(
        tuple(held for container in _of(3, pod) for device in _of(2, container) for held in _held(device))
        for pod in _of(1, data)
    )


def _held(device: bytes) -> Iterator[tuple[str, str]]:
    resource = [b"", *_of(1, device)][-1].decode()
    return ((resource, ident.decode()) for ident in _of(2, device))
