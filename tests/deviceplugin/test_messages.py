"""The kubelet's messages as bytes: protobuf's own library reads what is sent, and writes what is received."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.kubelet import message, plain

from loopd.deviceplugin import messages
from loopd.deviceplugin.messages import Container, Device, Mount

TEXT = st.text(max_size=300)
LISTS = st.lists(st.lists(TEXT, max_size=4), max_size=4)


def read(name: str, data: bytes) -> Any:
    """A message as protobuf reads it; there is nothing in it that it does not know."""
    found = message(name).FromString(data)
    copied = message(name)()
    copied.CopyFrom(found)
    copied.DiscardUnknownFields()
    assert copied == found
    return found


@given(TEXT, TEXT)
def test_register_request(endpoint: str, resource: str) -> None:
    found = read("v1beta1.RegisterRequest", messages.register_request(endpoint, resource))
    assert (found.version, found.endpoint, found.resource_name) == ("v1beta1", endpoint, resource)


@given(st.lists(TEXT, max_size=40), st.booleans())
def test_list_and_watch_response(ids: list[str], healthy: bool) -> None:
    found = read("v1beta1.ListAndWatchResponse", messages.list_and_watch_response(ids, healthy))
    health = "Healthy" if healthy else "Unhealthy"
    assert [(device.ID, device.health) for device in found.devices] == [(ident, health) for ident in ids]


CONTAINERS = st.builds(
    Container,
    st.dictionaries(TEXT, TEXT, max_size=4),
    st.lists(st.builds(Mount, TEXT, TEXT, st.booleans()), max_size=4).map(tuple),
    st.lists(st.builds(Device, TEXT, TEXT, TEXT), max_size=4).map(tuple),
    st.lists(TEXT, max_size=4).map(tuple),
)


@given(st.lists(CONTAINERS, max_size=4))
def test_allocate_response(containers: list[Container]) -> None:
    found = read("v1beta1.AllocateResponse", messages.allocate_response(containers)).container_responses
    assert [
        Container(
            dict(each.envs),
            tuple(Mount(mount.container_path, mount.host_path, mount.read_only) for mount in each.mounts),
            tuple(Device(node.container_path, node.host_path, node.permissions) for node in each.devices),
            tuple(device.name for device in each.cdi_devices),
        )
        for each in found
    ] == containers


@given(LISTS)
def test_allocate_request(containers: list[list[str]]) -> None:
    request = message("v1beta1.AllocateRequest")()
    for ids in containers:
        request.container_requests.add(devices_ids=ids)
    assert messages.allocate_request(request.SerializeToString()) == tuple(map(tuple, containers))


@given(st.lists(st.lists(st.tuples(TEXT, st.lists(TEXT, max_size=3)), max_size=3), max_size=4))
def test_pods(pods: list[list[tuple[str, list[str]]]]) -> None:
    """With fields of each type that the plugin does not need."""
    answer = message("v1.ListPodResourcesResponse")()
    for held in pods:
        pod = answer.pod_resources.add(name="pod", namespace="builds")
        for resource, ids in held:
            container = pod.containers.add(name="build", cpu_ids=[0, 1, -1, 1 << 40])
            container.devices.add(resource_name=resource, device_ids=ids).topology.nodes.add(ID=-1)
    found = messages.pods(answer.SerializeToString())
    assert found == tuple(tuple((resource, ident) for resource, ids in held for ident in ids) for held in pods)


@pytest.mark.parametrize("unknown", [b"\x78\x96\x01", b"\x79" + bytes(8), b"\x7d" + bytes(4), b"\x7a\x02ab"])
def test_a_field_that_is_not_known(unknown: bytes) -> None:
    """Of number 15 and each type: a newer kubelet's."""
    request = message("v1beta1.AllocateRequest")()
    request.container_requests.add(devices_ids=["loop-0"])
    data = unknown + request.SerializeToString() + unknown
    assert plain(message("v1beta1.AllocateRequest").FromString(data)) == plain(request)
    assert messages.allocate_request(data) == (("loop-0",),)


@given(st.binary(max_size=64))
def test_any_bytes(data: bytes) -> None:
    """A message, or a ValueError; never more than protobuf takes itself."""
    try:
        found = messages.pods(data)
    except ValueError:
        return
    assert len(str(found)) <= 64 * 8


@pytest.mark.parametrize("data", [b"\x0a", b"\x0a\x05ab", b"\x08", b"\x08" + b"\xff" * 10, b"\x0b", b"\x09ab"])
def test_what_is_cut_off_or_no_message(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"cut off|64 bits|of type 3"):
        messages.allocate_request(data)
    with pytest.raises(Exception, match=r"(?i)parse|decod|truncated|wire"):
        message("v1beta1.AllocateRequest").FromString(data)
