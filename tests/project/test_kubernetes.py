"""The manifests in docs/kubernetes: valid by the API's schemas, of one piece, and their commands do what they say."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]  # it has no types
import pytest
import yaml
from support.daemon import ROOT, bound_to, eventually, require

from loopd.daemon import policy

sys.path.insert(0, str(ROOT / "tests/vm/inside"))
from recipes import recipe

PAGE = ROOT / "docs/kubernetes.md"
MANIFESTS = sorted((ROOT / "docs/kubernetes").glob("*.yaml"))
SOCKET_DIRECTORY = "/run/loopd-builds/sock"


def objects(name: str) -> dict[str, dict[str, Any]]:
    """The objects of a manifest by their kinds."""
    return {found["kind"]: found for found in yaml.safe_load_all((ROOT / "docs/kubernetes" / name).read_text())}


def pod(name: str, kind: str) -> dict[str, Any]:
    found: dict[str, Any] = objects(name)[kind]["spec"]["template"]["spec"]
    return found


@pytest.mark.parametrize("version", ["1.30", kubernetes_validate.latest_version()])
@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.name)
def test_schemas(manifest: Path, version: str) -> None:
    """Strictly: a field that the API does not know is an error."""
    found = list(yaml.safe_load_all(manifest.read_text()))
    assert found
    for each in found:
        kubernetes_validate.validate(each, version, strict=True)


def test_the_schemas_refuse() -> None:
    wrong = objects("job.yaml")["Job"]
    wrong["spec"]["template"]["spec"]["containers"][0]["priviledged"] = True
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, kubernetes_validate.latest_version(), strict=True)


def test_the_page_names_every_manifest() -> None:
    assert set(re.findall(r"\]\(kubernetes/([a-z-]+\.yaml)\)", PAGE.read_text())) == {path.name for path in MANIFESTS}


def test_the_socket_gets_from_the_unit_into_the_pod() -> None:
    unit = (ROOT / "systemd/loopd@.socket").read_text().replace("%i", "builds")
    assert f"ListenDatagram={SOCKET_DIRECTORY}/loopd.sock\n" in unit
    namespace = objects("namespace.yaml")
    volume, claim = namespace["PersistentVolume"], namespace["PersistentVolumeClaim"]
    assert volume["spec"]["hostPath"]["path"] == SOCKET_DIRECTORY
    names = {"namespace": claim["metadata"]["namespace"], "name": claim["metadata"]["name"]}
    assert volume["spec"]["claimRef"] == names
    assert claim["spec"]["volumeName"] == volume["metadata"]["name"]
    job = pod("job.yaml", "Job")
    (mounted,) = (each["name"] for each in job["volumes"] if "persistentVolumeClaim" in each)
    (mount,) = (each for each in job["containers"][0]["volumeMounts"] if each["name"] == mounted)
    assert (mount["mountPath"], mount["readOnly"]) == ("/run/loopd", True)
    assert job["runtimeClassName"] == objects("runtimeclass.yaml")["RuntimeClass"]["metadata"]["name"]
    assert "MKNOD" in job["containers"][0]["securityContext"]["capabilities"]["drop"]
    exporter = pod("node-exporter.yaml", "DaemonSet")["volumes"][0]["hostPath"]["path"]
    assert f"Environment=TEXTFILES={exporter}\n" in (ROOT / "systemd/loopd-metrics.service").read_text()


def test_the_runtimes_handler(tmp_path: Path) -> None:
    """The page's command adds a rule to a specification, and its configuration names the file for the handler."""
    command = recipe("The device cgroup", page="kubernetes.md")
    (ctr := tmp_path / "ctr").write_text(
        '#!/bin/sh\n[ "$*" = "oci spec" ] && echo \'{"linux": {"resources": {"devices": []}},'
        ' "process": {"capabilities": {"bounding": ["CAP_CHOWN", "CAP_MKNOD"]}}}\'\n'
    )
    ctr.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    script = command.replace("/etc/containerd", str(tmp_path))
    subprocess.run(["/bin/sh", "-euc", script], check=True, env=environment)
    specification = yaml.safe_load((tmp_path / "loopd.json").read_text())
    assert specification["linux"]["resources"]["devices"] == [{"allow": True, "type": "b", "major": 7, "access": "rw"}]
    assert specification["process"]["capabilities"] == {"bounding": ["CAP_CHOWN"]}
    handler = objects("runtimeclass.yaml")["RuntimeClass"]["handler"]
    settings = recipe("The device cgroup", "toml", page="kubernetes.md")
    page = (ROOT / "docs/kubernetes.md").read_text()
    (newer,) = re.findall(r'the plugin is `"(io\.containerd\.[\w.]+)"`', page)
    older = "io.containerd.grpc.v1.cri"
    for plugin in (older, newer):
        runtimes = tomllib.loads(settings.replace(older, plugin))["plugins"][plugin]["containerd"]["runtimes"]
        assert runtimes[handler]["base_runtime_spec"] == "/etc/containerd/loopd.json"


@pytest.mark.parametrize(
    "text",
    [recipe("Limits", "toml", page="kubernetes.md"), objects("daemonset.yaml")["ConfigMap"]["data"]["loopd.toml"]],
)
def test_limits_are_loopds(text: str, tmp_path: Path) -> None:
    (tmp_path / "loopd.toml").write_text(text)
    account = "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod0.slice/cri-containerd-0.scope"
    terms = policy.load(str(tmp_path / "loopd.toml")).terms("builds", account, 0, 0)
    assert (terms.limits.devices, terms.limits.bytes) == (16, 100 << 30)


def test_daemonset_and_job_on_a_node(tmp_path: Path) -> None:
    """Their commands, in a mount namespace in which the node's directories are the test's: a device for the job, and
    the end of every lease with the daemon.
    """
    require(os.geteuid() == 0, "needs root: loop devices")
    daemon = pod("daemonset.yaml", "DaemonSet")["containers"][0]
    job = pod("job.yaml", "Job")["containers"][0]
    for name, module in (("loopd", "daemon"), ("loopctl", "cli")):
        program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from loopd.{module} import main; sys.exit(main())"
        (tmp_path / name).write_text(f"#!{sys.executable} -IS\n{program}\n")
        (tmp_path / name).chmod(0o755)
    work = tmp_path / "work"
    for folder in (work, tmp_path / "state"):
        folder.mkdir()
    prepare = f"""
        mount -t tmpfs tmpfs /run
        mkdir -p {SOCKET_DIRECTORY} /run/loopd
        mount --bind -o ro {SOCKET_DIRECTORY} /run/loopd
        mount --bind {tmp_path}/state /var/lib
        PATH={tmp_path}:$PATH
        exec "$@"
    """
    unshare = ["unshare", "--mount", "--propagation", "private", "sh", "-euc", prepare, "sh"]
    with (tmp_path / "log").open("wb") as log, subprocess.Popen([*unshare, *daemon["command"]], stderr=log) as node:
        try:
            into = ["nsenter", f"--target={node.pid}", "--mount", "env", f"PATH={tmp_path}:{os.environ['PATH']}"]
            sockets = Path(f"/proc/{node.pid}/root{SOCKET_DIRECTORY}/loopd.sock")
            eventually(sockets.exists, "the socket is there")
            subprocess.run([*into, *daemon["readinessProbe"]["exec"]["command"]], check=True, stdout=subprocess.PIPE)
            # /dev has the host's nodes here, where a container's own would be empty.
            script = job["command"][2].replace("/work/", f"{work}/").replace("run ", f"run --directory {work} ")
            ran = subprocess.run([*into, "sh", "-euc", script], check=True, stdout=subprocess.PIPE)
            assert ran.stdout == b""  # detached again
            image = work / "disk.img"
            checked = subprocess.run(["fsck.ext4", "-fn", image], check=False, capture_output=True)
            assert checked.returncode == 0, checked.stdout
            attach = [*into, "loopctl", "attach", "--directory", str(work), "--lifetime", str(os.getpid()), str(image)]
            subprocess.run(attach, check=True, stdout=subprocess.PIPE)
            assert len(bound_to(image)) == 1
        finally:
            node.send_signal(signal.SIGTERM)
        assert node.wait(20) == 0
    eventually(lambda: not bound_to(tmp_path), "the lease ended with the container")
    assert [path.name for path in work.iterdir()] == ["disk.img"]
