"""Recipes for one and the same container give it the same, in whatever form they are written.

They are run in a VM: tests/vm/inside/test_containers.py.
"""

from __future__ import annotations

import re
import shlex
import sys
import tomllib
from typing import Any, NamedTuple

import yaml
from support.daemon import ROOT

sys.path.insert(0, str(ROOT / "tests/vm/inside"))
from recipes import recipe


class Container(NamedTuple):
    """What a recipe changes of a container; `volumes` without the folder of the build, which a runner brings along."""

    dropped: set[str]
    rules: set[str]
    volumes: set[str]


def container(dropped: list[str], rules: list[str], volumes: list[str]) -> Container:
    return Container(set(dropped), set(rules), {volume for volume in volumes if not volume.endswith(":/work")})


def options(text: str) -> dict[str, list[str]]:
    """The options of a command, those that are given more than once too."""
    found: dict[str, list[str]] = {}
    for word in shlex.split(text.replace("$(loopctl directory build)", "/run/loopd-dev/0-build")):
        name, given, value = word.partition("=")
        if name.startswith("--"):
            found.setdefault(name[2:], []).extend([value] if given else [])
    return found


def run(section: str) -> Container:
    found = options(recipe(section))
    return container(found["cap-drop"], found["device-cgroup-rule"], found["volume"])


DOCKER = run("Docker")


def test_docker() -> None:
    """What the others are compared with is itself what the document says of it."""
    assert DOCKER.dropped == {"MKNOD"}
    assert DOCKER.rules == {"b 7:* rw"}
    assert {"/run/loopd:/run/loopd:ro", "/run/loopd-dev/0-build:/dev/loopd:ro"} < DOCKER.volumes
    assert run("Podman, rootful") == DOCKER


def test_stand_ins() -> None:
    """A container of builders is the same, with the stand-ins in the place of loopctl."""
    found = options(recipe("losetup and mount -o loop in a container", page="losetup.md"))
    builder = container(found["cap-drop"], found["device-cgroup-rule"], found["volume"])
    assert (builder.dropped, builder.rules) == (DOCKER.dropped, DOCKER.rules)
    loopctl = {volume for volume in DOCKER.volumes if volume.startswith("/usr/local/")}
    assert builder.volumes == DOCKER.volumes - loopctl | {"/usr/local/lib/loopd/bin:/usr/local/sbin:ro"}


def test_the_socket_is_nobodys_to_replace() -> None:
    """Its directory is read-only wherever it is bound into a container: root there may be its owner."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.*"), *(ROOT / "loopd").glob("*.py")]
    lines = [
        line
        for page in pages
        if page.suffix in (".md", ".rst", ".yaml", ".py")
        for line in page.read_text().splitlines()
    ]
    bound = r":/run/loopd\b|bind=/run/loopd|bind /run/loopd |mountPath: /run/loopd\b(?!-)|^lxc.*run/loopd "
    found = [line for line in lines if re.search(bound, line)]
    assert len(found) > 15
    read_only = r":/run/loopd:ro|--ro-bind|--bind-ro=|bind,ro|readOnly: true"
    assert [line for line in found if not re.search(read_only, line)] == []


def test_compose() -> None:
    file = yaml.safe_load(recipe("Compose", "yaml", IMAGE="builder"))
    (service,) = file["services"].values()
    assert container(service["cap_drop"], service["device_cgroup_rules"], service["volumes"]) == DOCKER
    assert ".:/work" in service["volumes"]
    known = {"image", "command", "working_dir", "network_mode", "cap_drop", "device_cgroup_rules", "volumes"}
    assert service.keys() == known


def test_quadlet() -> None:
    keys: dict[str, list[str]] = {}
    for name, value in re.findall(r"(?m)^(\w+)=(.*)$", recipe("Quadlet", "ini")):
        keys.setdefault(name, []).append(value)
    rules = options(" ".join(keys["PodmanArgs"]))["device-cgroup-rule"]
    assert container(keys["DropCapability"], rules, keys["Volume"]) == DOCKER


def test_gitlab_runner() -> None:
    (runner,) = tomllib.loads(recipe("GitLab runner", "toml"))["runners"]
    docker: dict[str, Any] = runner["docker"]
    assert runner["executor"] == "docker"
    assert container(docker["cap_drop"], docker["device_cgroup_rules"], docker["volumes"]) == DOCKER


def test_github_runner() -> None:
    (job,) = yaml.safe_load(recipe("GitHub runner", "yaml", IMAGE="builder"))["jobs"].values()
    given = options(job["container"]["options"])
    assert container(given["cap-drop"], given["device-cgroup-rule"], job["container"]["volumes"]) == DOCKER
    # They go to docker without a shell, by a parser to which an apostrophe is a letter.
    assert "'" not in job["container"]["options"]


def test_bubblewrap_leaves_the_devices_of_the_directory_open() -> None:
    """It has no read-only bind mount but with nodev: the unit around it has."""
    text = recipe("bubblewrap")
    assert '--property=ReadOnlyPaths="$directory"' in text
    assert '--dev-bind "$directory" /dev/loopd' in text
    assert "--remount-ro" not in text
