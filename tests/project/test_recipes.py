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
    for word in shlex.split(text):
        name, given, value = word.partition("=")
        if name.startswith("--"):
            found.setdefault(name[2:], []).extend([value] if given else [])
    return found


RUNNER = Container(
    {"MKNOD"},
    {"b 7:* rw"},
    {
        "/run/loopd:/run/loopd:ro",
        "/run/loopd-dev/0-build:/dev/loopd:ro",
        "/usr/local/bin/loopctl:/usr/local/bin/loopctl:ro",
        "/usr/local/lib/loopd:/usr/local/lib/loopd:ro",
    },
)
"""What a container has that takes no CDI device, as a runner's."""

DEVICE = ["loopd.alt/loop=build"]
"""What all else is in; `loopctl directory --cdi build` prints it."""


def test_podman_without_cdi() -> None:
    text = recipe("Podman, rootful, without CDI").replace("$(loopctl directory build)", "/run/loopd-dev/0-build")
    found = options(text)
    assert container(found["cap-drop"], found["device-cgroup-rule"], found["volume"]) == RUNNER


def test_one_option() -> None:
    """Of a command, it is the one that loopctl prints. No device rule and no mount of loopd's stands beside it."""
    for section, page in (
        ("Podman, rootful", "containers.md"),
        ("Docker", "containers.md"),
        ("A container with a device", "../README.md"),
        ("losetup and mount -o loop in a container", "losetup.md"),
    ):
        found = options(recipe(section, page=page).partition(" IMAGE ")[0])
        (device,) = found["device"]
        assert re.fullmatch(r"\$\(loopctl directory --cdi (--losetup )?build\)", device), section
        assert ("--losetup" in device) == (page == "losetup.md")
        assert found.keys() <= {"rm", "network", "device", "volume", "workdir"}, section
        assert found.get("volume", ["$PWD:/work"]) == ["$PWD:/work"]


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
    assert len(found) > 10
    read_only = r":/run/loopd:ro|--ro-bind|--bind-ro=|bind,ro|readOnly: true"
    assert [line for line in found if not re.search(read_only, line)] == []


def test_compose() -> None:
    file = yaml.safe_load(recipe("Compose", "yaml", IMAGE="builder"))
    (service,) = file["services"].values()
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["device_ids"]) == ("cdi", DEVICE)
    assert service["volumes"] == [".:/work"]
    assert service.keys() == {"image", "command", "working_dir", "network_mode", "volumes", "deploy"}


def test_quadlet() -> None:
    keys: dict[str, list[str]] = {}
    for name, value in re.findall(r"(?m)^(\w+)=(.*)$", recipe("Quadlet", "ini")):
        keys.setdefault(name, []).append(value)
    assert keys["AddDevice"] == DEVICE
    assert keys["Volume"] == ["/srv/build:/work"]
    assert not keys.keys() & {"PodmanArgs", "DropCapability"}


def test_gitlab_runner() -> None:
    (runner,) = tomllib.loads(recipe("GitLab runner", "toml"))["runners"]
    docker: dict[str, Any] = runner["docker"]
    assert runner["executor"] == "docker"
    assert container(docker["cap_drop"], docker["device_cgroup_rules"], docker["volumes"]) == RUNNER


def test_github_runner() -> None:
    (job,) = yaml.safe_load(recipe("GitHub runner", "yaml", IMAGE="builder"))["jobs"].values()
    given = options(job["container"]["options"])
    assert container(given["cap-drop"], given["device-cgroup-rule"], job["container"]["volumes"]) == RUNNER
    # They go to docker without a shell, by a parser to which an apostrophe is a letter.
    assert "'" not in job["container"]["options"]


def test_bubblewrap_leaves_the_devices_of_the_directory_open() -> None:
    """It has no read-only bind mount but with nodev: the unit around it has."""
    text = recipe("bubblewrap")
    assert '--property=ReadOnlyPaths="$directory"' in text
    assert '--dev-bind "$directory" /dev/loopd' in text
    assert "--remount-ro" not in text
