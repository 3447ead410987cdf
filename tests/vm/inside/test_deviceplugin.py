"""The device plugin of Kubernetes: what it answers a kubelet is handed to container runtimes, as a kubelet would.

The kubelet is a stand-in; what it says and hears is tested in tests/deviceplugin.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import build
import pytest
from host import bound, loopctl, run, wait_for
from recipes import DOCS, recipe
from test_cdi import PROBE, judge, podman, secret
from test_containers import ROOT

__all__ = ["secret"]  # a fixture
PROJECT = Path(__file__).parents[3]
UNIT, OPTIONS = "loopd-device-plugin.service", Path("/etc/default/loopd-device-plugin")
KIND = "loopd.alt/loop"
BASE = "docker.io/library/debian:trixie-slim"


class Kubelet:
    """The stand-in, told what to do line by line."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(PROJECT / "tests/support/kubelet.py"), str(folder), "localhost"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.ask("state")

    def ask(self, do: str, **values: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"number": 0, "do": do, **values}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())["answer"]

    def ready(self, kind: str) -> bool:
        devices = self.ask("state")["plugins"].get(kind, {}).get("devices", {})
        return set(devices.values()) == {"Healthy"}

    def allocate(self, ident: str, kind: str = KIND) -> dict[str, Any]:
        wait_for("the plugin has registered", lambda: self.ready(kind), 60)
        answer = self.ask("allocate", resource=kind, containers=[[ident]])
        assert isinstance(answer, list), answer  # else an error
        (found,) = answer
        assert isinstance(found, dict)
        return found

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def installed() -> Iterator[None]:
    run("make", "-s", "-C", PROJECT, "install-device-plugin", "MANUAL=", timeout=100)
    yield
    shutil.rmtree("/usr/local/lib/loopd/loopd/deviceplugin")
    for path in ("sbin/loopd-device-plugin", f"lib/systemd/system/{UNIT}"):
        (Path("/usr/local") / path).unlink()
    run("systemctl", "daemon-reload")


def remove_grants() -> None:
    """The plugin would, once no pod has them."""
    wait_for("the containers are gone", lambda: not bound(), 30)
    for path in Path("/run/loopd-dev").glob("*-k8s.*"):
        uid, _, name = path.name.partition("-")
        loopctl("directory", "--remove", "--user", uid, name)


@pytest.fixture
def kubelet(folder: Path, request: pytest.FixtureRequest) -> Iterator[Kubelet]:
    """With the plugin's unit beside it; a parameter has options."""
    request.getfixturevalue("installed")
    places = f"--plugin-directory={folder}/device-plugins --pod-resources={folder}/pod-resources/kubelet.sock"
    OPTIONS.write_text(f"OPTIONS={places} {getattr(request, 'param', '')}\n")
    kubelet = Kubelet(folder)
    try:
        run("systemctl", "start", UNIT)
        yield kubelet
        run("systemctl", "is-active", UNIT)
    finally:
        run("systemctl", "stop", UNIT)
        OPTIONS.unlink()
        kubelet.close()
        remove_grants()
        shutil.rmtree("/run/loopd-device-plugin", ignore_errors=True)
        for path in Path("/run/cdi").glob("loopd-0-k8s.*"):
            path.unlink()


def options_of(answer: dict[str, Any]) -> list[str]:
    """What a kubelet asks a runtime for, in podman's words."""
    assert all(mount["read_only"] for mount in answer.get("mounts", ()))
    return [
        *(f"--volume={mount['host_path']}:{mount['container_path']}:ro" for mount in answer.get("mounts", ())),
        *(f"--device={node['host_path']}:{node['container_path']}:{node['permissions']}" for node in nodes_of(answer)),
        *(f"--env={name}={value}" for name, value in answer.get("envs", {}).items()),
        *(f"--device={device['name']}" for device in answer.get("cdi_devices", ())),
    ]


def nodes_of(answer: dict[str, Any]) -> list[dict[str, str]]:
    found: list[dict[str, str]] = answer.get("devices", [])
    return found


def numbers_of(answer: dict[str, Any]) -> list[int]:
    if "devices" in answer:
        return [int(device["container_path"].removeprefix("/dev/loop")) for device in answer["devices"]]
    (device,) = answer["cdi_devices"]
    spec = json.loads(Path(f"/run/cdi/loopd-0-{device['name'].partition('=')[2]}.json").read_text())
    (found,) = spec["devices"]
    return [node["minor"] for node in found["containerEdits"]["deviceNodes"]]


@pytest.mark.deadline(300)
@pytest.mark.parametrize("kubelet", ["", "--cdi"], indirect=True, ids=["plain", "cdi"])
def test_no_other_device_opens(kubelet: Kubelet, secret: int) -> None:
    """Neither by a node that CAP_MKNOD makes nor by one of the image's, nor another pod's."""
    answer, other = kubelet.allocate("loop-0"), kubelet.allocate("loop-1")
    assert not set(numbers_of(answer)) & set(numbers_of(other))
    probe = ("sh", "-c", PROBE, "sh", str(secret))
    judge(run(*podman(*options_of(answer), "--cap-add=MKNOD"), *probe), numbers_of(answer))


@pytest.mark.deadline(300)
def test_a_partitioned_image(kubelet: Kubelet, folder: Path) -> None:
    """By a container that has no capability that podman would not give it, and nothing but what was answered."""
    work = folder / "work"
    work.mkdir()
    build.write(work)
    options = (*options_of(kubelet.allocate("loop-0")), f"--volume={work}:/work", "--workdir=/work")
    run(*podman(*options, "--cap-drop=MKNOD"), "./build.sh", timeout=200)
    wait_for("its devices are gone", lambda: not bound())
    build.check(work)


@pytest.mark.deadline(300)
def test_containerd(kubelet: Kubelet, secret: int, folder: Path) -> None:
    """By a specification as containerd's CRI makes it of what a kubelet asks for."""
    answer = kubelet.allocate("loop-0")
    with overlay(folder) as root:
        spec = specification(answer, root, ["sh", "-c", PROBE, "sh", str(secret)])
        (folder / "spec.json").write_text(json.dumps(spec))
        run("systemctl", "start", "containerd.service")
        try:
            judge(run("ctr", "run", "--rm", "--config", folder / "spec.json", "loopd-test"), numbers_of(answer))
        finally:
            run("systemctl", "stop", "containerd.service")


def specification(answer: dict[str, Any], root: Path, command: list[str]) -> dict[str, Any]:
    """With CAP_MKNOD. A node's numbers are read off the host's."""
    spec: dict[str, Any] = json.loads(run("ctr", "oci", "spec"))
    process, linux = spec["process"], spec["linux"]
    process["args"] = command
    process["env"] = ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]
    process["env"] += [f"{name}={value}" for name, value in answer["envs"].items()]
    for granted in process["capabilities"].values():
        granted.append("CAP_MKNOD")
    spec["root"] = {"path": str(root)}
    for mount in answer["mounts"]:
        options = ["rbind", "rprivate", "ro" if mount["read_only"] else "rw"]
        ends = {"source": mount["host_path"], "destination": mount["container_path"]}
        spec["mounts"].append({"type": "bind", **ends, "options": options})
    for device in answer["devices"]:
        status = os.stat(device["host_path"])
        number = {"type": "b", "major": os.major(status.st_rdev), "minor": os.minor(status.st_rdev)}
        node = {"path": device["container_path"], "fileMode": status.st_mode & 0o777, "uid": 0, "gid": 0}
        linux.setdefault("devices", []).append({**number, **node})
        linux["resources"]["devices"].append({"allow": True, "access": device["permissions"], **number})
    return spec


@contextmanager
def overlay(folder: Path) -> Iterator[Path]:
    """The root directory, whose changes are thrown away."""
    for name in ("upper", "work", "root"):
        (folder / name).mkdir()
    options = f"lowerdir={ROOT},upperdir={folder}/upper,workdir={folder}/work"
    run("mount", "-t", "overlay", "-o", options, "overlay", folder / "root")
    try:
        yield folder / "root"
    finally:
        run("umount", folder / "root")


@pytest.mark.deadline(300)
def test_what_restarts_cost(kubelet: Kubelet, folder: Path) -> None:
    """loopd and the plugin are started again under a container with a device."""
    options = (*options_of(kubelet.allocate("loop-0")), f"--volume={folder}:/work", "--workdir=/work")
    script = "truncate -s 8M disk.img; loopctl attach disk.img >device; until [ -e go ]; do sleep 0.2; done; "
    script += "mkfs.ext4 -q $(cat device); loopctl detach $(cat device)"
    run(*podman(*options, "--detach", "--name=restarts"), "sh", "-ec", script)
    try:
        wait_for("it has its device", lambda: (folder / "device").exists() and (folder / "device").read_text(), 60)
        run("systemctl", "restart", UNIT)
        run("systemctl", "restart", "loopd.service")
        wait_for("the plugin is back", lambda: kubelet.ready(KIND), 60)
        (folder / "go").touch()
        assert run("podman", "wait", "restarts").strip() == "0"
        run("e2fsck", "-fn", folder / "disk.img")
    finally:
        with suppress(AssertionError):
            run("podman", "rm", "--force", "restarts")


# The manifests --------------------------------------------------------------------------------------------------------


def block(manifest: str, before: str) -> list[str]:
    """The items of a list of a manifest, which are on a line each."""
    text = (DOCS / "kubernetes" / manifest).read_text()
    (found,) = re.findall(rf"(?m)^( *){before}:\n((?:\1 +(?:-|#).*\n)+)", text)
    return [line.strip()[2:] for line in found[1].splitlines() if line.strip().startswith("- ")]


@pytest.fixture
def image() -> Iterator[str]:
    """What the page builds, of a Debian that has the package already: there is no network."""
    leave = ("grub", "share/locale", "share/doc", "share/zoneinfo", "share/perl", "lib/grub", "lib/git-core")
    exclude = [f"--exclude=./usr/{name}" for name in leave]
    tar = ["sh", "-euc", 'base=$1; shift; "$@" | podman import - "$base"', "sh", BASE]
    run(*tar, "tar", "-C", str(ROOT), *exclude, "-c", ".", timeout=400)
    text = recipe("The nodes", page="kubernetes.md").replace("podman build", "podman build --network=none --pull=never")
    (name,) = re.findall(r"--tag (\S+)", text)
    run("sh", "-euc", text, cwd=PROJECT, timeout=400)
    # At the prefix of the package, from which the image is meant to be.
    shutil.copytree(PROJECT / "build/image/usr/lib/loopd", "/usr/lib/loopd")
    shutil.copy(PROJECT / "build/image/usr/bin/loopctl", "/usr/bin/loopctl")
    yield name
    run("podman", "rmi", "--force", name, BASE)
    shutil.rmtree("/usr/lib/loopd")
    Path("/usr/bin/loopctl").unlink()
    shutil.rmtree(PROJECT / "build/image")


@pytest.mark.deadline(640)
def test_daemonset_and_job(image: str, folder: Path) -> None:
    """The plugin in a container as its manifest says, and the build in one as a kubelet starts it for `restricted`."""
    kubelet = Kubelet(Path("/var/lib/kubelet"))
    run("systemctl", "start", "loopd@builds.socket")
    volumes = []
    for each in block("device-plugin.yaml", "volumeMounts"):
        path = re.findall(r"mountPath: ([^,}]+)", each)[0]
        Path(path).mkdir(parents=True, exist_ok=True)
        volumes.append(f"--volume={path}:{path}{':ro' if 'readOnly: true' in each else ''}")
    manifest = (DOCS / "kubernetes/device-plugin.yaml").read_text()
    (capabilities,) = re.findall(r"capabilities: \{drop: \[ALL\], add: \[(.*?)\]\}", manifest)
    limits = ["--cap-drop=ALL", *(f"--cap-add={name}" for name in capabilities.split(", ")), "--read-only"]
    limits += ["--security-opt=no-new-privileges", "--network=none", "--log-driver=none"]
    run("podman", "run", "--detach", "--name=plugin", *limits, *volumes, image, *block("device-plugin.yaml", "args"))
    try:
        answer = kubelet.allocate("builds-0", "loopd.alt/builds")
        work = folder / "work"
        work.mkdir(mode=0o777)
        work.chmod(0o777)
        job = (DOCS / "kubernetes/job.yaml").read_text()
        (script,) = re.findall(r"(?s)            - -ec\n            - \|\n(.*?)\n          resources:", job)
        options = (*options_of(answer), "--user=1000", "--cap-drop=ALL", "--security-opt=no-new-privileges")
        told = run(*podman(*options, f"--volume={work}:/work"), "/bin/sh", "-ec", textwrap.dedent(script), timeout=200)
        assert told == ""  # detached again
        run("e2fsck", "-fn", work / "disk.img")
        metrics = Path("/var/lib/prometheus/node-exporter/device-plugin.prom")
        wait_for("it is counted", lambda: 'allocations_total{resource="loopd.alt/builds"} 1' in metrics.read_text(), 30)
    finally:
        run("podman", "rm", "--force", "--time=2", "plugin")
        kubelet.close()
        remove_grants()
        run("systemctl", "stop", "loopd@builds.socket", "loopd-admin@builds.socket", "loopd@builds.service")
        for place in ("/var/lib/kubelet", "/run/loopd-device-plugin", "/var/lib/prometheus", "/run/loopd-builds"):
            shutil.rmtree(place, ignore_errors=True)
