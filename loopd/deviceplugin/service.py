"""The service that the kubelet calls, for one resource: which devices there are, and what a container gets.

Changes when the kubelet's interface does. What a grant is made of is in `grants`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import grpc

from loopd.cli.output import Failure
from loopd.client import api as client
from loopd.deviceplugin import messages
from loopd.deviceplugin.grants import Grants
from loopd.deviceplugin.messages import Container

Ids = tuple[tuple[str, ...], ...]

UNAVAILABLE = (client.Unavailable, client.Timeout, client.Dropped)
EXHAUSTED = (client.Quota, client.NoDevice)


class Refused(Exception):
    """A request that is answered with a status of gRPC's."""

    def __init__(self, code: grpc.StatusCode, text: str) -> None:
        super().__init__(text)
        self.code = code


class Service:
    """Device plugin v1beta1."""

    def __init__(self, grants: Grants, say: Callable[[str], None]) -> None:
        self.grants = grants
        self.allocations = 0
        self.failures = 0
        self._say = say
        self._healthy = False
        self._ended = 0
        self._changed = threading.Condition()

    @property
    def healthy(self) -> bool:
        """What the kubelet is told."""
        return self._healthy

    def tell(self, healthy: bool) -> None:
        """Whether loopd answers."""
        with self._changed:
            self._healthy = healthy
            self._changed.notify_all()

    def end_watches(self) -> None:
        """Return from every watch: a server that is to end would wait for them."""
        with self._changed:
            self._ended += 1
            self._changed.notify_all()

    def handlers(self) -> grpc.GenericRpcHandler:
        """The calls, for a server."""

        def encoded(answer: bytes) -> bytes:
            return answer

        return grpc.method_handlers_generic_handler(
            messages.PLUGIN,
            {
                "GetDevicePluginOptions": grpc.unary_unary_rpc_method_handler(self._options, None, encoded),
                "ListAndWatch": grpc.unary_stream_rpc_method_handler(self._watch, None, encoded),
                "Allocate": grpc.unary_unary_rpc_method_handler(
                    self._allocate, messages.allocate_request, messages.allocate_response
                ),
            },
        )

    def _options(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        return messages.EMPTY

    def _watch(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        """The list of devices, now and whenever it changes."""

        def wake() -> None:
            with self._changed:
                self._changed.notify_all()

        if not context.add_callback(wake):  # it has ended already
            return
        said: bool | None = None
        ended = self._ended

        def over() -> bool:
            return self._ended != ended or not context.is_active()

        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._healthy is not said or over())  # noqa: B023
                said = self._healthy
            if over():
                return
            yield messages.list_and_watch_response(self.grants.resource.ids, said)

    def _allocate(self, request: Ids, context: grpc.ServicerContext) -> tuple[Container, ...]:
        try:
            answer = self._made(request)
        except Refused as refused:
            with self._changed:
                self.failures += 1
            self._say(f"{self.grants.resource.name}: {request}: {refused}")
            context.abort(refused.code, str(refused))
        with self._changed:
            self.allocations += len(answer)
        return answer

    def _made(self, request: Ids) -> tuple[Container, ...]:
        for ids in request:
            self._check(ids)
        made: list[Container] = []
        try:
            for (ident,) in request:
                made.append(self.grants.fresh(ident))
        except (client.Error, Failure, OSError) as error:
            for (ident,) in request[: len(made)]:
                self._discard(ident)
            raise self._refused(error) from error
        return tuple(made)

    def _check(self, ids: tuple[str, ...]) -> None:
        resource = self.grants.resource
        if len(ids) != 1:
            text = f"one {resource.name} has the {resource.devices} devices of a container, so ask for a limit of 1"
            text = f"{text}; --devices of loopd-device-plugin gives it more devices"
            raise Refused(grpc.StatusCode.INVALID_ARGUMENT, text)
        if ids[0] not in resource.ids:
            text = f"{ids[0]} is none of the {resource.capacity} {resource.name} of this node: have the pod made anew"
            raise Refused(grpc.StatusCode.NOT_FOUND, text)

    def _discard(self, ident: str) -> None:
        try:
            self.grants.discard(ident)
        except client.Error as error:  # it goes when the id is allocated again
            self._say(f"{ident}: not taken back: {error}")

    def _refused(self, error: Exception) -> Refused:
        text = str(error).removeprefix("--cdi: ")
        if isinstance(error, UNAVAILABLE):
            return Refused(grpc.StatusCode.UNAVAILABLE, text)
        if isinstance(error, EXHAUSTED):
            return Refused(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
        if isinstance(error, (client.Refused, Failure)):
            return Refused(grpc.StatusCode.FAILED_PRECONDITION, text)
        hint = "on the node, `journalctl -u loopd -u loopd-device-plugin` has the details"
        return Refused(grpc.StatusCode.INTERNAL, text if isinstance(error, client.Error) else f"{text}; {hint}")
