"""The options of ``loopd-device-plugin``, and the resources that they describe.

Changes when there is another option.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from loopd import __version__
from loopd.client import api as client
from loopd.protocol.wire import MAX_DEVICES, NO_UID

PREFIX = "k8s"
"""The names of all grants of this program's begin with it."""
MOST = 200
"""Grants of one resource: loopd has 256 directories of a uid, and an old one may stay for a while."""
LONGEST = 24
"""Characters of a resource's name behind the slash, which are in the name of each grant."""


class Resource(NamedTuple):
    """What a pod asks for by one name."""

    name: str
    capacity: int
    devices: int
    uid: int
    cdi: bool
    losetup: bool
    force: bool
    socket: str
    admin_socket: str

    @property
    def key(self) -> str:
        """The name without its domain."""
        return self.name.partition("/")[2]

    @property
    def ids(self) -> tuple[str, ...]:
        """What the kubelet calls the grants that there may be."""
        return tuple(f"{self.key}-{index}" for index in range(self.capacity))


class Options(NamedTuple):
    """What the command line says."""

    resources: tuple[Resource, ...]
    plugins: str
    pods: str
    nodes: str
    cdi_dir: str
    textfile: str | None
    interval: float
    grace: float


def _whole(least: int, most: int) -> Callable[[str], int]:
    def check(text: str) -> int:
        if text.isascii() and text.isdecimal() and least <= int(text) <= most:
            return int(text)
        raise argparse.ArgumentTypeError(f"{text}: expected a number, {least} to {most}")

    return check


def _instance(text: str) -> str:
    if re.fullmatch("[A-Za-z0-9][A-Za-z0-9_.-]*", text):
        return text
    raise argparse.ArgumentTypeError(f"{text}: expected the name of an instance, as of loopd@NAME.socket")


def _path(text: str) -> str:
    if text.startswith("/"):
        return text
    raise argparse.ArgumentTypeError(f"{text}: expected an absolute path")


def _seconds(text: str) -> float:
    if re.fullmatch(r"\d{1,6}(\.\d+)?", text) and float(text) > 0:
        return float(text)
    raise argparse.ArgumentTypeError(f"{text}: expected a number of seconds")


VALUES: dict[str, Callable[[str], Any]] = {
    "count": _whole(1, MOST),
    "devices": _whole(1, MAX_DEVICES),
    "uid": _whole(0, NO_UID - 1),
    "instance": _instance,
    "socket": _path,
    "admin-socket": _path,
}
FLAGS = ("cdi", "losetup", "force")
"""With `VALUES` what may be said of all resources by an option, and of one behind its name."""


def _resource(text: str) -> dict[str, Any]:
    name, *settings = text.split(",")
    domain, _, key = name.partition("/")
    label = "[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?"
    if not (re.fullmatch(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?", domain) and re.fullmatch(label, key)):
        raise argparse.ArgumentTypeError(f'{name}: expected DOMAIN/NAME, as "loopd.alt/loop"')
    if len(key) > LONGEST:
        raise argparse.ArgumentTypeError(f"{name}: at most {LONGEST} characters behind the slash")
    found: dict[str, Any] = {"name": name}
    for setting in settings:
        key, given, value = setting.partition("=")
        if key in FLAGS and not given:
            found[key] = True
        elif key in VALUES and given:
            found[key.replace("-", "_")] = VALUES[key](value)
        else:
            known = ", ".join([*(f"{name}=" for name in VALUES), *FLAGS])
            raise argparse.ArgumentTypeError(f"{setting}: expected one of {known}")
    return found


def parser() -> argparse.ArgumentParser:
    """The parser; --help is its text."""
    found = argparse.ArgumentParser("loopd-device-plugin", description="Loop devices as a resource of Kubernetes.")
    add = found.add_argument
    add("--resource", action="append", type=_resource, metavar="DOMAIN/NAME[,KEY=VALUE...]", dest="resources",
        help="what pods ask for, by default loopd.alt/loop; may be repeated. "
        "Behind the name stand options of this resource alone, as count=4,uid=1000,cdi")  # fmt: skip
    add("--count", type=VALUES["count"], default=32, help="containers that may have it at a time, by default 32")
    add("--devices", type=VALUES["devices"], default=8, help="devices of one container, by default 8")
    add("--uid", type=VALUES["uid"], default=0, help="the user of the containers, by default 0")
    add("--instance", type=VALUES["instance"], help="the loopd that is asked: loopd@INSTANCE")
    add("--socket", type=_path, help="that loopd's socket, where it is not in its usual place")
    add("--admin-socket", type=_path, help="that loopd's administrator's socket, likewise")
    add("--cdi", action="store_true", help="answer with the name of a CDI specification")
    add("--losetup", action="store_true", help="bind losetup, mount and kpartx over the container's, too")
    add("--force", action="store_true", help="go on where max_loop is not in force")
    add("--plugin-directory", type=_path, default="/var/lib/kubelet/device-plugins", dest="plugins")
    add("--pod-resources", type=_path, default="/var/lib/kubelet/pod-resources/kubelet.sock", dest="pods")
    add("--node-directory", type=_path, default="/run/loopd-device-plugin", dest="nodes")
    add("--cdi-dir", type=_path, default="/run/cdi")
    add("--textfile", type=_path, help="write metrics to this file, for node_exporter")
    add("--interval", type=_seconds, default=10.0, help="seconds between looks at loopd and at pods, by default 10")
    add("--grace", type=_seconds, default=60.0, help="seconds until what no pod has any more goes, by default 60")
    add("--version", action="version", version=__version__)
    return found


def parse(arguments: Sequence[str] | None) -> Options:
    """The options; ends the program where they are wrong."""
    found = parser()
    args = found.parse_args(arguments)
    common = {name.replace("-", "_"): getattr(args, name.replace("-", "_")) for name in (*VALUES, *FLAGS)}
    resources = tuple(_made({**common, **given}) for given in args.resources or [{"name": "loopd.alt/loop"}])
    keys = [resource.key for resource in resources]
    if len(set(keys)) != len(keys):
        found.error("--resource: two have the same name behind the slash")
    rest = {name: getattr(args, name) for name in Options._fields if name != "resources"}
    return Options(resources=resources, **rest)


def _made(given: dict[str, Any]) -> Resource:
    instance = given.pop("instance")
    usual = client.SOCKET if instance is None else f"/run/loopd-{instance}/sock/loopd.sock"
    admin = client.ADMIN_SOCKET if instance is None else f"/run/loopd-{instance}/admin.sock"
    given["capacity"] = given.pop("count")
    given["socket"] = given["socket"] or usual
    given["admin_socket"] = given["admin_socket"] or admin
    return Resource(**given)
