"""The manifests in docs/kubernetes: valid by the API's schemas, and of one piece with each other and the device plugin.

The image is built, and run as its manifest has it, in a virtual machine: tests/vm/inside/test_deviceplugin.py.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]  # it has no types
import pytest
import yaml
from support.daemon import ROOT

from loopd.daemon import policy
from loopd.deviceplugin import options
from loopd.deviceplugin.options import Options

sys.path.insert(0, str(ROOT / "tests/vm/inside"))
from recipes import blocks, recipe

PAGE = ROOT / "docs/kubernetes.md"
MANIFESTS = sorted((ROOT / "docs/kubernetes").glob("*.yaml"))
VERSIONS = ["1.30", kubernetes_validate.latest_version()]


def objects(name: str) -> dict[str, dict[str, Any]]:
    """The objects of a manifest by their kinds."""
    return {found["kind"]: found for found in yaml.safe_load_all((ROOT / "docs/kubernetes" / name).read_text())}


def pod(name: str, kind: str) -> dict[str, Any]:
    found: dict[str, Any] = objects(name)[kind]["spec"]["template"]["spec"]
    return found


def plugin() -> tuple[dict[str, Any], Options]:
    """The container of the device plugin, and what its options say."""
    (container,) = pod("device-plugin.yaml", "DaemonSet")["containers"]
    return container, options.parse(container["args"])


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.name)
def test_schemas(manifest: Path, version: str) -> None:
    """Strictly: a field that the API does not know is an error."""
    found = list(yaml.safe_load_all(manifest.read_text()))
    assert found
    for each in found:
        kubernetes_validate.validate(each, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_schemas_of_the_page(version: str) -> None:
    resources, quota = (yaml.safe_load(text) for _, kind, text in blocks("kubernetes.md") if kind == "yaml")
    kubernetes_validate.validate(quota, version, strict=True)
    wanted = {"containers": [{"name": "build", **resources}]}
    asked = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "build"}, "spec": wanted}
    kubernetes_validate.validate(asked, version, strict=True)
    names = {f"requests.{resource.name}" for resource in plugin()[1].resources}
    assert set(quota["spec"]["hard"]) == names == {name for name in quotas() if "loopd" in name}
    assert f"requests.{next(iter(resources['resources']['limits']))}" in names


def test_the_schemas_refuse() -> None:
    wrong = objects("job.yaml")["Job"]
    wrong["spec"]["template"]["spec"]["containers"][0]["priviledged"] = True
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, kubernetes_validate.latest_version(), strict=True)


def quotas() -> dict[str, str]:
    found: dict[str, str] = objects("namespace.yaml")["ResourceQuota"]["spec"]["hard"]
    return found


def test_the_page_names_every_manifest() -> None:
    assert set(re.findall(r"\]\(kubernetes/([a-z-]+\.yaml)\)", PAGE.read_text())) == {path.name for path in MANIFESTS}


def test_the_build_has_what_its_resource_is_for() -> None:
    """The level `restricted` of the pod security standards, whose fields these are; and nothing of the node."""
    namespace, job = objects("namespace.yaml"), pod("job.yaml", "Job")
    assert namespace["Namespace"]["metadata"]["labels"] == {"pod-security.kubernetes.io/enforce": "restricted"}
    (container,) = job["containers"]
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert job["securityContext"]["runAsNonRoot"] is True
    assert job["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert all(volume.keys() == {"name", "emptyDir"} for volume in job["volumes"])
    assert not {"hostPID", "hostNetwork", "hostIPC", "runtimeClassName", "hostUsers"} & job.keys()
    (asked,) = (name for name in container["resources"]["limits"] if "/" in name)
    assert container["resources"]["limits"][asked] == 1
    (resource,) = (resource for resource in plugin()[1].resources if resource.name == asked)
    assert resource.uid == job["securityContext"]["runAsUser"] != 0
    assert int(quotas()[f"requests.{asked}"]) > 0
    unit = (ROOT / "systemd/loopd@.socket").read_text().replace("%i", "builds")
    assert f"ListenDatagram={resource.socket}\n" in unit
    assert "SocketMode=0666\n" in unit  # the kubelet gives a container no group
    assert f"enable --now loopd@{namespace['Namespace']['metadata']['name']}.socket" in (
        ROOT / "docs/kubernetes/installer.yaml"
    ).read_text()


def test_the_plugin_has_each_place_as_the_node_has_it() -> None:
    """What it names is for the kubelet."""
    container, chosen = plugin()
    volumes = {each["name"]: each["hostPath"]["path"] for each in pod("device-plugin.yaml", "DaemonSet")["volumes"]}
    mounts = {each["mountPath"]: each for each in container["volumeMounts"]}
    assert {path: each["name"] for path, each in mounts.items()} == {path: name for name, path in volumes.items()}
    written = {str(Path(path)) for path, each in mounts.items() if not each.get("readOnly")}
    assert chosen.textfile is not None
    assert written == {chosen.plugins, chosen.nodes, chosen.cdi_dir, str(Path(chosen.textfile).parent)}
    needed = [chosen.pods, *(path for each in chosen.resources for path in (each.socket, each.admin_socket))]
    for path in needed:
        assert any(Path(path).is_relative_to(mounted) for mounted in mounts), path
    exporter = pod("node-exporter.yaml", "DaemonSet")["volumes"][0]["hostPath"]["path"]
    assert str(Path(chosen.textfile).parent) == exporter
    assert f"Environment=TEXTFILES={exporter}\n" in (ROOT / "systemd/loopd-metrics.service").read_text()


def test_the_plugin_has_no_more_than_the_unit() -> None:
    context = plugin()[0]["securityContext"]
    unit = (ROOT / "systemd/loopd-device-plugin.service").read_text()
    (bounding,) = re.findall(r"(?m)^CapabilityBoundingSet=(.*)$", unit)
    assert context["capabilities"] == {"drop": ["ALL"], "add": [name[4:] for name in bounding.split()]}
    assert (context["allowPrivilegeEscalation"], context["readOnlyRootFilesystem"]) == (False, True)
    spec = pod("device-plugin.yaml", "DaemonSet")
    assert not {"hostPID", "hostNetwork", "hostIPC", "hostUsers"} & spec.keys()


def test_options_of_the_page() -> None:
    """Each line of its table is an option, with the default where it is one."""
    for option in re.findall(r"(?m)^\| `(--[^`]+)` \|", PAGE.read_text()):
        chosen = options.parse([option]).resources
        if option in ("--count=32", "--devices=8"):
            assert chosen == options.parse([]).resources
        else:
            assert chosen != options.parse([]).resources, option


def test_limits_are_loopds(tmp_path: Path) -> None:
    (tmp_path / "loopd.toml").write_text(recipe("A namespace that builds", "toml", page="kubernetes.md"))
    account = "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod0.slice/cri-containerd-0.scope"
    terms = policy.load(str(tmp_path / "loopd.toml")).terms("builds", account, 0, 0)
    assert (terms.limits.devices, terms.limits.bytes) == (8, 100 << 30)
