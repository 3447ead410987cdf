"""A stand-in for the kubelet, as far as a device plugin sees one: a process of its own, told what to do line by line.

Its messages are made by protobuf's own library from the table below, which has the fields of the kubelet's api.proto
(k8s.io/kubelet, pkg/apis/deviceplugin/v1beta1 and pkg/apis/podresources/v1). Nothing of loopd is imported. As the
kubelet does, it removes every socket in its folder when it starts, makes its own anew, calls back whoever registers,
and lists no pods until it is told of them.

    kubelet.py FOLDER AUTHORITY

A line of JSON on standard input is a command with a number; the line that answers has the same number.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory

FIELDS = {
    "v1beta1": """
        DevicePluginOptions: bool pre_start_required 1, bool get_preferred_allocation_available 2
        RegisterRequest: string version 1, string endpoint 2, string resource_name 3, DevicePluginOptions options 4
        Empty:
        ListAndWatchResponse: Device* devices 1
        TopologyInfo: NUMANode* nodes 1
        NUMANode: int64 ID 1
        Device: string ID 1, string health 2, TopologyInfo topology 3
        AllocateRequest: ContainerAllocateRequest* container_requests 1
        ContainerAllocateRequest: string* devices_ids 1
        CDIDevice: string name 1
        AllocateResponse: ContainerAllocateResponse* container_responses 1
        ContainerAllocateResponse: map envs 1, Mount* mounts 2, DeviceSpec* devices 3
        ContainerAllocateResponse: map annotations 4, CDIDevice* cdi_devices 5
        Mount: string container_path 1, string host_path 2, bool read_only 3
        DeviceSpec: string container_path 1, string host_path 2, string permissions 3
    """,
    "v1": """
        ListPodResourcesRequest:
        ListPodResourcesResponse: PodResources* pod_resources 1
        PodResources: string name 1, string namespace 2, ContainerResources* containers 3
        ContainerResources: string name 1, ContainerDevices* devices 2, int64* cpu_ids 3
        ContainerDevices: string resource_name 1, string* device_ids 2, TopologyInfo topology 3
        TopologyInfo: NUMANode* nodes 1
        NUMANode: int64 ID 1
    """,
}  # fmt: skip
"""A message a line, or its next fields; * is repeated, map is of string to string."""
HEALTHY = "Healthy"


def described(package: str) -> descriptor_pb2.FileDescriptorProto:
    """A package of the table as protoc would describe it."""
    file = descriptor_pb2.FileDescriptorProto(name=f"{package}.proto", package=package, syntax="proto3")
    kinds = descriptor_pb2.FieldDescriptorProto
    scalars = {"string": kinds.TYPE_STRING, "bool": kinds.TYPE_BOOL, "int64": kinds.TYPE_INT64}
    for line in FIELDS[package].strip().splitlines():
        name, _, rest = line.strip().partition(":")
        known = [each for each in file.message_type if each.name == name]
        message = known[0] if known else file.message_type.add(name=name)
        for text in filter(None, rest.strip().split(", ")):
            kind, label, number = text.split()
            field = message.field.add(name=label, number=int(number), label=kinds.LABEL_OPTIONAL)
            if kind.endswith("*") or kind == "map":
                field.label = kinds.LABEL_REPEATED
            kind = kind.rstrip("*")
            if kind in scalars:
                field.type = scalars[kind]
                continue
            field.type = kinds.TYPE_MESSAGE
            field.type_name = f".{package}.{kind}"
            if kind == "map":
                entry = message.nested_type.add(name=f"{label.title()}Entry")
                entry.options.map_entry = True
                for index, part in enumerate(("key", "value"), 1):
                    entry.field.add(name=part, number=index, label=kinds.LABEL_OPTIONAL, type=kinds.TYPE_STRING)
                field.type_name = f".{package}.{name}.{entry.name}"
    return file


_POOL = descriptor_pool.DescriptorPool()
for _package in FIELDS:
    _POOL.Add(described(_package))


def message(name: str) -> Any:
    """The class of a message, by its full name."""
    found = _POOL.FindMessageTypeByName(name)
    if hasattr(message_factory, "GetMessageClass"):
        return message_factory.GetMessageClass(found)
    older: Any = message_factory.MessageFactory(_POOL)  # before protobuf 4.22
    return older.GetPrototype(found)


def plain(value: Any) -> Any:
    """A message as JSON has it."""
    return json_format.MessageToDict(value, preserving_proto_field_name=True)


class Plugin:
    """A device plugin that has registered: what it lists, by its watch."""

    def __init__(self, kubelet: Kubelet, request: Any) -> None:
        options = [("grpc.default_authority", kubelet.authority), ("grpc.use_local_subchannel_pool", 1)]
        self._channel = grpc.insecure_channel(f"unix:{kubelet.plugins / request.endpoint}", options)
        self.devices: dict[str, str] = {}
        self.lists = 0
        self.ended = ""
        threading.Thread(target=self._watch, daemon=True).start()

    def _call(self, method: str, answer: str, *, stream: bool = False) -> Any:
        make = self._channel.unary_stream if stream else self._channel.unary_unary
        return make(
            f"/v1beta1.DevicePlugin/{method}", lambda request: request.SerializeToString(), message(answer).FromString
        )

    def _watch(self) -> None:
        try:
            watch = self._call("ListAndWatch", "v1beta1.ListAndWatchResponse", stream=True)
            for answer in watch(message("v1beta1.Empty")()):
                self.devices = {device.ID: device.health for device in answer.devices}
                self.lists += 1
        except grpc.RpcError as error:
            self.ended = error.code().name
        self.devices = {}

    def options(self) -> Any:
        return plain(self._call("GetDevicePluginOptions", "v1beta1.DevicePluginOptions")(message("v1beta1.Empty")()))

    def allocate(self, containers: list[list[str]]) -> Any:
        request = message("v1beta1.AllocateRequest")()
        for ids in containers:
            request.container_requests.add(devices_ids=ids)
        call = self._call("Allocate", "v1beta1.AllocateResponse")
        return plain(call(request, timeout=60))["container_responses"]


class Kubelet:
    """The two servers, and what has registered."""

    def __init__(self, folder: Path, authority: str) -> None:
        self.authority = authority
        self.plugins = folder / "device-plugins"
        self.registered: dict[str, Plugin] = {}
        self.pods: list[list[tuple[str, str]]] = []
        self.registrations = 0
        for place in (self.plugins, folder / "pod-resources"):
            place.mkdir(mode=0o750, exist_ok=True)
            for socket in place.iterdir():
                socket.unlink()
        register = {"Register": self._handler(self._register, "v1beta1.RegisterRequest")}
        pods = {"List": self._handler(self._list, "v1.ListPodResourcesRequest")}
        self._servers = [
            self._serve(self.plugins, "v1beta1.Registration", register),
            self._serve(folder / "pod-resources", "v1.PodResourcesLister", pods),
        ]

    def _handler(self, call: Any, request: str) -> Any:
        return grpc.unary_unary_rpc_method_handler(
            call, message(request).FromString, lambda answer: answer.SerializeToString()
        )

    def _serve(self, folder: Path, service: str, handlers: dict[str, Any]) -> Any:
        handler = grpc.method_handlers_generic_handler(service, handlers)
        server = grpc.server(futures.ThreadPoolExecutor(4), handlers=[handler])
        server.add_insecure_port(f"unix:{folder}/kubelet.sock")
        server.start()
        return server

    def _register(self, request: Any, context: Any) -> Any:
        if request.version != "v1beta1" or not (self.plugins / request.endpoint).is_socket():
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"version {request.version!r}, {request.endpoint!r}")
        self.registered[request.resource_name] = Plugin(self, request)
        self.registrations += 1
        return message("v1beta1.Empty")()

    def _list(self, request: Any, context: Any) -> Any:
        answer = message("v1.ListPodResourcesResponse")()
        for number, held in enumerate(self.pods):
            pod = answer.pod_resources.add(name=f"pod-{number}", namespace="builds")
            container = pod.containers.add(name="build", cpu_ids=[1, 300])
            for resource, ident in held:
                device = container.devices.add(resource_name=resource, device_ids=[ident])
                device.topology.nodes.add(ID=1)
        return answer

    def do(self, command: dict[str, Any]) -> Any:
        """One command; the answer."""
        plugin = self.registered.get(command.get("resource", ""))
        if command["do"] == "state":
            return {
                "registrations": self.registrations,
                "plugins": {
                    name: {"devices": each.devices, "lists": each.lists, "ended": each.ended}
                    for name, each in self.registered.items()
                },
            }
        if command["do"] == "pods":
            self.pods = command["pods"]
            return None
        if plugin is None:
            return {"error": "NOT_REGISTERED", "details": ""}
        if command["do"] == "options":
            return plugin.options()
        try:
            return plugin.allocate(command["containers"])
        except grpc.RpcError as error:
            failed: Any = error
            return {"error": failed.code().name, "details": failed.details()}


def main() -> None:
    """Serve until standard input ends."""
    kubelet = Kubelet(Path(sys.argv[1]), sys.argv[2])
    lock = threading.Lock()

    def answer(command: dict[str, Any]) -> None:
        line = json.dumps({"number": command["number"], "answer": kubelet.do(command)})
        with lock:
            print(line, flush=True)

    with futures.ThreadPoolExecutor(32) as pool:
        for line in sys.stdin:
            pool.submit(answer, json.loads(line))
    os._exit(0)  # the servers have threads


if __name__ == "__main__":
    main()
