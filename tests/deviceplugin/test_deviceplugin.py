"""The device plugin beside a real loopd, called by a stand-in for the kubelet whose messages are protobuf's own.

What `Allocate` answers is handed to container runtimes in a virtual machine: tests/vm/inside/test_deviceplugin.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.daemon import ROOT, eventually, exists, grants_at, require
from support.kept import Kept, start_kept_fixture  # noqa: F401  # a fixture
from support.node import KIND, Container, Node

from loopd.cli import cdi
from loopd.deviceplugin import options
from loopd.deviceplugin.grants import Grants, Places
from loopd.protocol import wire

UID = 54321


@pytest.fixture(scope="module")
def prefix() -> Iterator[Path]:
    """An installation that every user reaches."""
    folder = Path(tempfile.mkdtemp(prefix="loopd-test-", dir="/tmp"))
    folder.chmod(0o755)
    make = ["make", "-s", "-C", str(ROOT), "install", "install-device-plugin", "DESTDIR=/", "MANUAL="]
    subprocess.run([*make, f"PREFIX={folder}"], check=True, env=os.environ | {"MAKEFLAGS": ""}, stderr=subprocess.PIPE)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def node(start_kept: Callable[..., Kept], prefix: Path) -> Iterator[Node]:
    require(shutil.which("bwrap"), "needs bubblewrap")
    # Sockets have short paths.
    folder = Path(tempfile.mkdtemp(prefix="loopd-test-", dir="/tmp"))
    folder.chmod(0o755)
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        grants = stack.enter_context(grants_at(folder / "grants"))
        grants.chmod(0o711)
        daemon = start_kept(f"--grant-directory={grants}")
        os.chmod(daemon.path, 0o666)
        node = Node(folder, daemon, prefix, grants)
        try:
            yield node
        finally:
            node.close()
        daemon.end()


@pytest.fixture
def ready(node: Node) -> Node:
    """With a kubelet, which knows the plugin's devices."""
    node.start_kubelet()
    node.start_plugin()
    node.ready()
    return node


def failed(answer: Any, code: str, *words: str) -> bool:
    assert isinstance(answer, dict), answer
    assert answer["error"] == code, answer
    assert all(word in answer["details"] for word in words), answer
    return True


# What the kubelet is told --------------------------------------------------------------------------------------------


def test_it_registers_and_lists(ready: Node) -> None:
    assert ready.listed() == {f"loop-{index}": "Healthy" for index in range(32)}
    assert ready.kubelet is not None
    assert ready.kubelet.ask("options", resource=KIND) == {}
    socket = ready.folder / "device-plugins/loopd-loop.sock"
    assert stat.S_IMODE(socket.stat().st_mode) & 0o077 == 0
    assert ready.stop_plugin() == 0
    assert not socket.exists()
    eventually(lambda: not ready.listed(), "the watch has ended")


def test_an_authority_that_is_a_path(node: Node) -> None:
    """As kubelets before 1.26 send it."""
    node.start_kubelet(authority=str(node.folder / "device-plugins/loopd-loop.sock"))
    node.start_plugin()
    node.ready()


def test_it_waits_for_the_kubelet(node: Node) -> None:
    (node.folder / "device-plugins").mkdir(mode=0o750)
    node.start_plugin()
    eventually(lambda: "loopd answers" in node.told(), "it looks at loopd")
    time.sleep(1.5)
    assert node.told().splitlines() == ["loopd-device-plugin: loopd.alt/loop: loopd answers"]
    node.start_kubelet()
    node.ready()


def test_a_kubelet_that_is_started_again(ready: Node) -> None:
    """It has removed the plugin's socket. What pods have stays."""
    (answer,) = ready.allocate("loop-3")
    with Container(ready, answer).attached() as number:
        before = ready.grants()
        assert ready.kubelet is not None
        ready.kubelet.kill()
        ready.start_kubelet()
        ready.ready()
        assert ready.grants() == before
        assert exists(f"loop{number}")


def test_a_kubelet_that_is_killed_and_stays_away(ready: Node) -> None:
    assert ready.kubelet is not None
    ready.kubelet.kill()
    time.sleep(1)
    ready.start_kubelet()
    ready.ready()
    assert isinstance(ready.allocate("loop-0"), list)


def test_a_registration_that_is_refused_is_said_once(node: Node) -> None:
    """The kubelet's socket is there, and nobody behind it."""
    node.start_kubelet().kill()
    node.start_plugin()
    eventually(lambda: "registering: UNAVAILABLE" in node.told(), "it says so")
    time.sleep(2.5)
    assert node.told().count("registering") == 1
    node.start_kubelet()
    node.ready()


def test_without_loopd_the_devices_are_unhealthy(ready: Node) -> None:
    with ready.daemon.outage():
        os.rename(ready.daemon.path + ".admin", ready.daemon.path + ".away")
        ready.ready(health="Unhealthy")
        assert failed(ready.allocate("loop-0"), "UNAVAILABLE", "cannot ask loopd", "systemctl")
        os.rename(ready.daemon.path + ".away", ready.daemon.path + ".admin")
    ready.ready()
    assert isinstance(ready.allocate("loop-0"), list)


def test_a_loopd_that_is_started_again_costs_nobody_a_device(ready: Node) -> None:
    (answer,) = ready.allocate("loop-0")
    container = Container(ready, answer)
    with container.attached() as number:
        ready.daemon.kill()
        ready.ready()
        assert exists(f"loop{number}")
        assert int(container.run("truncate -s 1M b.img; loopctl run b.img -- echo {}").strip()[15:]) != number
    assert "does not answer" not in ready.told()


# What a container gets -----------------------------------------------------------------------------------------------


def test_a_container_has_devices_of_its_own(ready: Node) -> None:
    (answer,) = ready.allocate("loop-0")
    assert set(answer) == {"envs", "mounts", "devices"}
    container = Container(ready, answer)
    assert len(container.numbers) == 8
    for device, number in zip(answer["devices"], container.numbers, strict=True):
        host = ready.nodes / f"loop{number}"
        path = f"/dev/loop{number}"
        assert device == {"container_path": path, "host_path": str(host), "permissions": "rw"}
        status = host.stat()
        assert status.st_rdev == os.makedev(7, cdi.minor(number))
        assert status.st_mode == stat.S_IFBLK | 0o600
    (name,) = ready.grants()
    assert ready.grants()[name]["numbers"] == container.numbers
    assert answer["envs"] == {"LOOPD_SOCKET": "/run/loopd/loopd.sock", "LOOPD_DIRECTORY": "/dev/loopd"}
    assert {mount["container_path"]: mount["host_path"] for mount in answer["mounts"]} == {
        "/run/loopd": os.path.dirname(ready.daemon.path),
        "/dev/loopd": str(ready.grants_at / name),
        f"{ready.prefix}/bin/loopctl": f"{ready.prefix}/bin/loopctl",
        f"{ready.prefix}/lib/loopd": f"{ready.prefix}/lib/loopd",
    }
    device = container.run(
        "truncate -s 8M disk.img; loopctl run disk.img -- sh -ec 'mkfs.ext4 -q $1; echo $1' sh {}"
    ).strip()
    assert int(device.removeprefix("/dev/loopd/loop")) in container.numbers
    subprocess.run(["e2fsck", "-fn", container.work / "disk.img"], check=True, capture_output=True)


def test_no_two_have_a_number_in_common(ready: Node) -> None:
    answers = [ready.allocate(f"loop-{index}")[0] for index in range(3)] + ready.allocate("loop-3", "loop-4")
    numbers = [number for answer in answers for number in Container(ready, answer).numbers]
    assert len(set(numbers)) == len(numbers) == 40
    assert len(ready.grants()) == 5


def test_what_an_id_had_before_ends(ready: Node) -> None:
    """Whatever is attached: that container is gone, says the kubelet."""
    (answer,) = ready.allocate("loop-7")
    with Container(ready, answer).attached() as number:
        (fresh,) = ready.allocate("loop-7")
        eventually(lambda: not exists(f"loop{number}"), "its device has gone")
    (name,) = ready.grants()
    assert str(ready.grants_at / name) in {mount["host_path"] for mount in fresh["mounts"]}
    before, after = (set(Container(ready, each).numbers) for each in (answer, fresh))
    assert not before & after
    assert ready.left() == {f"loop{number}" for number in after}


def test_a_device_that_is_still_open_is_in_nobodys_way(ready: Node) -> None:
    """Its directory goes later."""
    (answer,) = ready.allocate("loop-7")
    with Container(ready, answer).attached() as number:
        (ready.folder / "node").unlink(missing_ok=True)
        os.mknod(ready.folder / "node", stat.S_IFBLK | 0o600, os.makedev(7, cdi.minor(number)))
        with (ready.folder / "node").open("rb"):
            assert isinstance(ready.allocate("loop-7"), list)
    eventually(lambda: len(ready.grants()) == 1, "only the new one is left")


def test_the_name_of_a_specification(node: Node) -> None:
    node.start_kubelet()
    node.start_plugin("--cdi")
    node.ready()
    (answer,) = node.allocate("loop-0")
    assert set(answer) == {"cdi_devices"}
    (device,) = answer["cdi_devices"]
    kind, _, name = device["name"].partition("=")
    spec = json.loads((node.cdi / f"loopd-0-{name}.json").read_text())
    assert (spec["kind"], spec["devices"][0]["name"]) == (kind, name)
    (grant,) = node.grants().values()
    assert grant["name"] == name
    minors = [each["minor"] for each in spec["devices"][0]["containerEdits"]["deviceNodes"]]
    assert minors == [cdi.minor(number) for number in grant["numbers"]]
    (answer,) = node.allocate("loop-0")
    assert [path.name for path in node.cdi.iterdir()] != [f"loopd-0-{name}.json"]
    assert len(node.left()) == 1


def test_resources_of_several_kinds(node: Node) -> None:
    """One of them for containers that are not root."""
    node.start_kubelet()
    node.start_plugin("--count=2", "--resource=loopd.alt/loop,losetup", f"--resource=loopd.alt/one,uid={UID},devices=1")
    assert set(node.ready()) == {"loop-0", "loop-1"}
    assert set(node.ready("loopd.alt/one")) == {"one-0", "one-1"}
    (roots,), (answer,) = node.allocate("loop-1"), node.allocate("one-1", kind="loopd.alt/one")
    assert "/usr/local/sbin" in {mount["container_path"] for mount in roots["mounts"]}
    container = Container(node, answer, UID)
    assert len(container.numbers) == 1
    assert sorted(name.split(".")[0] for name in node.grants()) == ["0-k8s", f"{UID}-k8s"]
    script = "id -u; truncate -s 1M disk.img; loopctl run disk.img -- sh -ec 'echo data >$1; head -c 4 $1' sh {}"
    assert container.run(script).split() == [str(UID), "data"]


# What is refused -----------------------------------------------------------------------------------------------------


def test_ids_that_there_are_not(ready: Node) -> None:
    assert failed(ready.allocate("loop-99"), "NOT_FOUND", "none of the 32 loopd.alt/loop")
    assert failed(ready.allocate(["loop-0", "loop-1"]), "INVALID_ARGUMENT", "a limit of 1", "--devices")
    assert failed(ready.allocate([]), "INVALID_ARGUMENT", "a limit of 1")
    assert failed(ready.allocate("loop-0", "loop-99"), "NOT_FOUND")
    assert not ready.grants()
    assert isinstance(ready.allocate("loop-0"), list)


def test_a_part_that_fails_leaves_nothing_of_the_others(ready: Node) -> None:
    """There is room for one more directory, and two are asked for."""
    for index in range(255):
        reply = ready.daemon.admin(wire.Directory(f"other{index}", 0, devices=1))
        assert reply.code is None, reply.fields
        reply.close()
    assert failed(ready.allocate("loop-0", "loop-1"), "RESOURCE_EXHAUSTED", "256 directories", "remove some")
    assert len(ready.grants()) == 255
    assert not ready.left()


def test_a_program_that_is_not_installed(node: Node, prefix: Path) -> None:
    node.start_kubelet()
    node.start_plugin("--resource=loopd.alt/loop,socket=/nowhere/loopd.sock")
    node.ready()
    assert failed(node.allocate("loop-0"), "FAILED_PRECONDITION", "/nowhere/loopd.sock")
    assert not node.grants()


# What goes -----------------------------------------------------------------------------------------------------------


def test_it_goes_with_its_pod(node: Node) -> None:
    node.start_kubelet()
    node.start_plugin(grace=0.5)
    node.ready()
    node.pods(["loop-0"], ["loop-1"], [])
    for index in range(2):
        node.allocate(f"loop-{index}")
    time.sleep(1.5)
    before = node.grants()
    assert len(before) == 2
    node.pods(["loop-1"], [])
    (left,) = eventually(lambda: len(node.grants()) == 1 and node.grants(), "one has gone")
    assert ".1." in left
    assert node.left() == {f"loop{number}" for number in before[left]["numbers"]}


def test_what_is_attached_stays_until_its_container_has_ended(node: Node) -> None:
    """Whatever the kubelet says: it may not have heard of its pods yet."""
    node.start_kubelet()
    node.start_plugin(grace=0.3)
    node.ready()
    node.pods(["loop-0"])
    (answer,) = node.allocate("loop-0")
    with Container(node, answer).attached() as number:
        node.pods([])
        time.sleep(1.5)
        assert len(node.grants()) == 1
        assert exists(f"loop{number}")
    eventually(lambda: not node.grants(), "it has gone")


def test_a_kubelet_without_any_pod_is_not_believed(node: Node) -> None:
    node.start_kubelet()
    node.start_plugin(grace=0.3)
    node.ready()
    node.allocate("loop-0")
    node.pods()
    time.sleep(1.5)
    assert len(node.grants()) == 1
    node.pods([])
    eventually(lambda: not node.grants(), "it has gone")


def test_a_fresh_one_is_given_time(ready: Node) -> None:
    """The kubelet lists a pod only after it has been told what the pod has."""
    ready.pods([])
    ready.allocate("loop-0")
    time.sleep(1)
    assert len(ready.grants()) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_plugin_that_is_started_again(ready: Node, number: signal.Signals) -> None:
    """It finds what there is, and what pods have stays."""
    (answer,) = ready.allocate("loop-0")
    with Container(ready, answer).attached() as attached:
        assert ready.stop_plugin(number) == (0 if number == signal.SIGTERM else -number)
        eventually(lambda: not ready.listed(), "the kubelet has noticed")
        before = ready.grants()
        ready.start_plugin()
        ready.ready()
        assert ready.grants() == before
        assert exists(f"loop{attached}")
        assert isinstance(ready.allocate("loop-0"), list)
        eventually(lambda: not exists(f"loop{attached}"), "its device has gone")
        assert not before.keys() & ready.grants().keys()


def test_directories_of_others_are_left_alone(node: Node) -> None:
    names = ("k8s.other.0.0abc", "k8s.loop.x.y", "k8s.loop", "build")
    for name in names:
        node.daemon.admin(wire.Directory(name, 0, devices=1)).close()
    node.start_kubelet()
    node.start_plugin(grace=0.1)
    node.ready()
    node.pods([])
    time.sleep(1)
    assert {row["name"] for row in node.grants().values()} == set(names)


def test_a_user_of_the_node_ends_no_grant(start_kept: Callable[..., Kept], tmp_path: Path) -> None:
    """By a directory of the user's own, whose name says that it is the newest of a pod's."""
    (resource,) = options.parse(["--count=1"]).resources
    with grants_at(tmp_path / "grants") as grants:
        daemon = start_kept(f"--grant-directory={grants}")
        pods = Grants(resource._replace(admin_socket=f"{daemon.path}.admin"), Places(str(tmp_path), str(tmp_path)), 60)
        for uid, name in ((resource.uid, "k8s.loop.0.1"), (UID, "k8s.loop.0.2")):
            assert daemon.admin(wire.Directory(name, 0, devices=1, uid=uid)).code is None
        assert pods.sweep(frozenset({"loop-0"})) == 1
        assert (grants / f"{resource.uid}-k8s.loop.0.1").exists()
        assert (grants / f"{UID}-k8s.loop.0.2").exists()
        daemon.end()


# Counting ------------------------------------------------------------------------------------------------------------


def test_metrics(node: Node) -> None:
    node.start_kubelet()
    file = node.folder / "loopd-device-plugin.prom"
    node.start_plugin(f"--textfile={file}", "--count=4")
    node.ready()
    node.allocate("loop-0", "loop-1")
    node.allocate("loop-9")

    def samples() -> dict[str, float]:
        return {
            sample.name.removeprefix("loopd_device_plugin_"): sample.value
            for family in text_string_to_metric_families(file.read_text())
            for sample in family.samples
            if sample.labels == {"resource": KIND}
        }

    wanted = {"capacity": 4, "grants": 2, "healthy": 1, "allocations_total": 2, "failures_total": 1}
    eventually(lambda: file.exists() and samples() == wanted, "they are written")
    assert [path.name for path in node.folder.glob(".*")] == []


# Load ----------------------------------------------------------------------------------------------------------------

ALLOCATIONS, AT_A_TIME = 200, 20


def test_load(node: Node) -> None:
    """Each pod attaches something and ends. None fails, and nothing is left of any."""
    node.start_kubelet()
    node.start_plugin("--count=40", grace=0.2)
    node.ready()
    assert node.kubelet is not None
    assert node.plugin is not None
    node.pods([f"loop-{index}" for index in range(40)])
    image = node.folder / "image"
    image.write_bytes(bytes(1 << 20))
    fds: list[int] = []
    for first in range(0, ALLOCATIONS, AT_A_TIME):
        ids = [f"loop-{index % 40}" for index in range(first, first + AT_A_TIME)]
        asked = [node.kubelet.start("allocate", resource=KIND, containers=[[ident]]) for ident in ids]
        for future in asked:
            answer = future.result(120)
            assert isinstance(answer, list), answer
            mounts = {mount["container_path"]: mount["host_path"] for mount in answer[0]["mounts"]}
            _attach_and_end(node, image, mounts["/dev/loopd"])
        fds.append(len(os.listdir(f"/proc/{node.plugin.pid}/fd")))
        node.pods([])
        eventually(lambda: not node.grants(), "every grant has gone", 60)
        node.pods([f"loop-{index}" for index in range(40)])
    assert not node.left()
    assert not node.daemon.leases()
    assert not [path for path in node.grants_at.iterdir() if not path.name.startswith(".")]
    assert fds[-1] <= fds[0] + 5, fds
    children = Path(f"/proc/{node.plugin.pid}/task/{node.plugin.pid}/children").read_text().split()
    assert children == []
    assert node.daemon.records("refused") == []


def _attach_and_end(node: Node, image: Path, directory: str) -> None:
    fds = [os.open(image, os.O_RDWR), os.open(directory, os.O_RDONLY | os.O_DIRECTORY)]
    try:
        reply = node.daemon.attach(*fds)
        assert reply.code is None, reply.fields
        reply.close()  # the end of the lease
    finally:
        for fd in fds:
            os.close(fd)


# The command line ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--count=0"], "expected a number, 1 to 200"),
        (["--resource=loop"], "expected DOMAIN/NAME"),
        (["--resource=loopd.alt/" + "x" * 25], "at most 24 characters"),
        (["--resource=loopd.alt/loop,size=3"], "size=3: expected one of count=, devices="),
        (["--resource=loopd.alt/loop,cdi=1"], "cdi=1: expected one of"),
        (["--resource=loopd.alt/loop,uid=4294967295"], "expected a number, 0 to 4294967294"),
        (["--resource=a.b/loop", "--resource=c.d/loop"], "the same name behind the slash"),
        (["--instance=../x"], "expected the name of an instance"),
        (["--cdi-dir=cdi"], "expected an absolute path"),
        (["--grace=never"], "expected a number of seconds"),
    ],
)
def test_wrong_options(options: list[str], told: str) -> None:
    command = [sys.executable, "-m", "loopd.deviceplugin", *options]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert told in re.sub(r"\s+", " ", done.stderr)
