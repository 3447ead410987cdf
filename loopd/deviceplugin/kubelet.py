"""The kubelet's sockets: where this program registers, is called, and asks which pods have what.

Changes when the kubelet handles its sockets in another way.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, cast

import grpc

from loopd.deviceplugin import messages
from loopd.deviceplugin.service import Service

CALL = 5.0
"""Seconds that the kubelet has for an answer, and its calls for theirs when the service ends."""
CALLS = 16
"""Calls of the kubelet's that are served at a time. One is its watch."""
# gRPC's library makes an authority of the escaped path of a socket, which some servers refuse as malformed.
CHANNEL = (("grpc.default_authority", "localhost"), ("grpc.use_local_subchannel_pool", 1))
MOST = 64 << 20
"""Bytes of the kubelet's list of pods."""

Identity = tuple[int, int, int]


def identity(path: str) -> Identity | None:
    """Which socket is there: a new one may get the inode number of the old one, but not its time, too."""
    with suppress(OSError):
        status = os.stat(path, follow_symlinks=False)
        return status.st_dev, status.st_ino, status.st_ctime_ns
    return None


def call(socket: str, method: str, request: bytes) -> bytes:
    """One call of the kubelet's. Raises grpc.RpcError."""
    options = (*CHANNEL, ("grpc.max_receive_message_length", MOST))
    with grpc.insecure_channel(f"unix:{socket}", options) as channel:
        ask: Callable[..., bytes] = channel.unary_unary(method)
        return ask(request, timeout=CALL)


def reason(error: grpc.RpcError) -> str:
    """What a call failed with."""
    failed = cast("Any", error)  # what the library raises is the call, too
    return f"{failed.code().name}: {failed.details()}"


class Endpoint:
    """This program's socket for one resource, and its registration."""

    def __init__(self, service: Service, folder: str) -> None:
        self._service = service
        self._kubelet = os.path.join(folder, "kubelet.sock")
        self._name = f"loopd-{service.grants.resource.key}.sock"
        self._path = os.path.join(folder, self._name)
        self._server: grpc.Server | None = None
        self._registered: tuple[Identity | None, Identity | None] = (None, None)

    def keep(self) -> bool:
        """Be registered with the kubelet that is there; whether it was not yet. A kubelet that starts removes every
        socket in the folder, and makes its own anew. Raises grpc.RpcError, OSError and RuntimeError.
        """
        kubelet = identity(self._kubelet)
        if kubelet is None or self._registered == (kubelet, identity(self._path)):
            return False
        self.close()
        self._serve()
        request = messages.register_request(self._name, self._service.grants.resource.name)
        call(self._kubelet, messages.REGISTER, request)
        self._registered = (kubelet, identity(self._path))
        return True

    def _serve(self) -> None:
        server = grpc.server(ThreadPoolExecutor(CALLS), handlers=[self._service.handlers()])
        server.add_insecure_port(f"unix:{self._path}")
        server.start()
        self._server = server

    def close(self) -> None:
        """Serve no longer. Waits: the library removes the socket by its name."""
        self._registered = (None, None)
        if self._server is not None:
            self._service.end_watches()
            self._server.stop(CALL).wait()
            self._server = None


def used(socket: str) -> frozenset[tuple[str, str]] | None:
    """The resources and ids that the node's pods have; None where that is not known.

    A kubelet that has just been started lists no pods, although they run, until it has heard of them from its cluster.
    So an empty list is taken for not known: what an empty node keeps is in nobody's way. Raises grpc.RpcError.
    """
    if identity(socket) is None:
        return None
    pods = messages.pods(call(socket, messages.LIST_PODS, messages.EMPTY))
    return frozenset(held for pod in pods for held in pod) if pods else None
