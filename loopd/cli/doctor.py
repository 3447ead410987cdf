"""``loopctl doctor``: what stands between this process and a loop device, one line for each layer.

Changes when another layer can refuse a device, or when a better remedy is known. Asks through `loopd.client`, and
attaches one small device in memory, which it detaches again.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

from loopd.cli.output import described
from loopd.client import api as client
from loopd.client import layers

GRANTS = "/run/loopd-dev"
"""Where the host has the directories that are bound into containers."""
SIZE = 1 << 20
"""Bytes of the image that is attached."""


class Finding(NamedTuple):
    """One line: `level` is OK, WARN (it works, or something else does) or FAIL; the remedy may be empty."""

    level: str
    layer: str
    text: str
    remedy: str = ""

    @property
    def failed(self) -> bool:
        return self.level == "FAIL"

    def __str__(self) -> str:
        return f"{self.level:4}  {self.layer}: {self.text}" + (f"; {self.remedy}" if self.remedy else "")


class _Place(NamedTuple):
    """The directory that a device would be delivered in: loopd's own if it is bound in, else /dev."""

    path: str
    fd: int
    grant: bool
    host: bool


def _place() -> _Place | None:
    with suppress(OSError):
        fd = os.open("/dev", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        host = layers.is_devtmpfs(fd) and not layers.foreign_user_namespace()
        with suppress(OSError):
            bound = os.open(client.directory_grant(), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            os.close(fd)
            return _Place(client.directory_grant(), bound, _is_grant(bound), host)
        return _Place("/dev", fd, False, host)
    return None


def _is_grant(fd: int) -> bool:
    """Whether this looks like a directory of loopd's: on a tmpfs, named after a uid and in its top directory."""
    mount = layers.mount_of(fd)
    if mount is None or mount.type != "tmpfs":
        return False
    below = os.path.relpath(os.readlink(f"/proc/self/fd/{fd}"), mount.point)
    return bool(re.fullmatch(r"/\d+-[^/]+", os.path.normpath(os.path.join(mount.root, below))))


def _read(path: str) -> str:
    with suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
        return file.read().rstrip("\0\n")
    return ""


def _socket(asked: client.Client) -> Finding:
    try:
        greeting = asked.hello()
    except client.Error as error:
        return Finding("FAIL", "socket", error.message, error.hint)
    return Finding("OK", "socket", f"loopd {greeting.loopd} answers at {asked.socket}")


def _group(asked: client.Client, place: _Place | None) -> Finding:
    try:
        status = os.stat(asked.socket)
    except OSError as error:
        return Finding("WARN", "group", f"not known: {asked.socket}: {error.strerror}")
    text = f"{asked.socket} is of uid {status.st_uid} and gid {status.st_gid}, {stat.filemode(status.st_mode)}"
    if os.access(asked.socket, os.W_OK, effective_ids=True):
        folder = os.path.dirname(asked.socket) or "."
        if os.access(folder, os.W_OK, effective_ids=True) and not (place and place.host):
            text = f"{folder} can be written here: another socket in the place of loopd's would get the files of others"
            return Finding("WARN", "group", text, "bind it in read-only: podman run -v /run/loopd:/run/loopd:ro")
        return Finding("OK", "group", text)
    return Finding(
        "FAIL", "group", f"{text}, and not to be written by uid {os.geteuid()}", client.UNAVAILABLE[errno.EACCES]
    )


def _directory(place: _Place) -> Finding:
    if place.grant:
        if os.access(".", os.W_OK, dir_fd=place.fd, effective_ids=True):
            text = f"{place.path} can be written here, so that its nodes can be kept"
            return Finding("WARN", "directory", text, f"bind it in read-only: {layers.BIND}")
        return Finding("OK", "directory", f"{place.path} is a directory of loopd's")
    if place.host:
        if os.path.ismount(GRANTS):
            return Finding("OK", "directory", f"{GRANTS} is there for containers")
        remedy = "systemctl start 'run-loopd\\x2ddev.mount' && systemctl restart loopd"
        text = f"{GRANTS} is no mount: there is no directory for containers, or --grant-directory names another"
        return Finding("WARN", "directory", text, remedy)
    if os.path.isdir(client.directory_grant()) and place.path != client.directory_grant():
        found = layers.not_this_users()
        return Finding("FAIL", "directory", f"{client.directory_grant()}: {found.reason}", found.hint)
    return Finding("WARN", "directory", f"{client.directory_grant()} is no directory of loopd's", layers.BIND)


def _nodev(place: _Place) -> Finding:
    if os.fstatvfs(place.fd).f_flag & os.ST_NODEV:
        found = layers.obstacle(place.fd, own=False)
        return Finding("FAIL", "nodev", f"{place.path}: its mount has the option nodev", found.hint if found else "")
    return Finding("OK", "nodev", f"the mount of {place.path} lets devices be opened")


def _user_namespace(place: _Place) -> Finding:
    if not layers.foreign_user_namespace():
        return Finding("OK", "user namespace", "the host's")
    if layers.obstacle(place.fd, own=False) != layers.USER_NAMESPACE:
        return Finding("OK", "user namespace", f"one of its own, and {place.path} is not of its making")
    found = layers.no_mount()
    if found is None:
        text = f"no device opens in {place.path}, which is of its making; loopctl attaches a mount instead"
        return Finding("OK", "user namespace", text)
    return Finding("FAIL", "user namespace", f"no device opens in {place.path}, which is of its making", found.hint)


def _device(asked: client.Client) -> Iterator[Finding]:
    """Attach a device, and tell from what becomes of it which layer refuses."""
    found: client.Error | None = None
    text = ""
    try:
        fd = os.memfd_create("loopctl-doctor", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, SIZE)
            with asked.attach(fd) as device:
                text = f"{device.path} opens"
        finally:
            os.close(fd)
    except client.Error as error:
        found = error
    except OSError as error:
        found = client.Error(described(error))
    layer = getattr(found, "layer", "")
    for name, what in (("device cgroup", "the device cgroup"), ("lsm", f"a security module ({_lsm()})")):
        if layer == name and found is not None:
            yield Finding("FAIL", name, found.message, found.hint)
        elif found is None:
            yield Finding("OK", name, f"{what} refuses nothing")
        else:
            yield Finding("WARN", name, "not known, since no device could be opened")
    if found is None:
        yield Finding("OK", "device", text)
    else:
        yield Finding("FAIL", "device", found.message, found.hint)


def _lsm() -> str:
    active = _read("/sys/kernel/security/lsm") or "its name is not visible"
    label = _read("/proc/self/attr/current")
    return f"{active}, as {label}" if label else active


def _mknod(place: _Place) -> Finding:
    if not layers.capable(layers.CAP_MKNOD):
        return Finding("OK", "CAP_MKNOD", "not there")
    if place.host:
        return Finding("OK", "CAP_MKNOD", "this is the host's own administrator")
    if layers.foreign_user_namespace():
        return Finding("OK", "CAP_MKNOD", "of a user namespace, where it makes no device")
    text = "with the device cgroup's b 7:* every loop device of the host is in reach"
    return Finding("WARN", "CAP_MKNOD", text, "podman or docker run --cap-drop MKNOD")


def _modprobes_configuration() -> str:
    """As modprobe itself reads it: which folders, and which file hides another, depends on its version."""
    environment = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}
    with suppress(OSError, subprocess.SubprocessError):
        command = ["modprobe", "--showconfig"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=10, check=True).stdout
    return ""


def _max_loop() -> Finding:
    """Whether loop.max_loop was given. The parameter in sysfs does not tell: it is 8 even without a limit."""
    given = re.search(r"\bloop\.max_loop=[1-9]", _read("/proc/cmdline"))
    # Where loop is built in, modprobe's configuration is not read.
    if re.search(r"^loop ", _read("/proc/modules"), re.MULTILINE):
        given = given or re.search(r"(?m)^options\s+loop\b.*\bmax_loop=[1-9]", _modprobes_configuration())
    if given:
        text = f"{given[0]}; if loop was loaded before that was there, loopd warns in the journal until the next boot"
        return Finding("OK", "loop.max_loop", text)
    text = "not set: opening a node that was kept can make a removed device again"
    remedy = "loop.max_loop=8 on the kernel's command line; where loop is a module, max_loop=8 in modprobe.d"
    return Finding("WARN", "loop.max_loop", text, remedy)


def examine(asked: client.Client) -> Iterator[Finding]:
    """Every check, in the order in which a request meets them."""
    yield _socket(asked)
    try:
        place = _place()
    except client.Error as error:  # LOOPD_DIRECTORY
        yield Finding("FAIL", "directory", error.message, error.hint)
        return
    yield _group(asked, place)
    if place is None:
        yield Finding("FAIL", "directory", "/dev cannot be opened")
        return
    try:
        yield from (_directory(place), _nodev(place), _user_namespace(place))
        yield from _device(asked)
        yield _mknod(place)
        if place.host:
            yield _max_loop()
    finally:
        os.close(place.fd)
