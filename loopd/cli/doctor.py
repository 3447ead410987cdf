"""``loopctl doctor``: what stands between this process and a loop device, one line for each layer.

Changes when another layer can refuse a device, or when a better remedy is known. Asks through `loopd.client`; what
becomes of a device is found out by `trial`.
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

from loopd.cli.trial import Partition, Trial, attempted
from loopd.client import api as client
from loopd.client import layers
from loopd.client.errors import NOT_ROOT
from loopd.protocol.wire import Greeting

GRANTS = "/run/loopd-dev"
"""Where the host has the directories that are bound into containers."""
OTHERS = 0
"""A loop device's minor that is no directory's: those are numbered from 4096 on."""
NOT_KNOWN = "not known, since no device could be opened"


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


# The way to loopd ---------------------------------------------------------------------------------------------


def _greeted(asked: client.Client) -> Greeting | client.Error:
    try:
        return asked.hello()
    except client.Error as error:
        return error


def _socket(asked: client.Client, greeted: Greeting | client.Error) -> Finding:
    if isinstance(greeted, client.Error):
        # The line about the group says more of what the mode denies, where that can be seen.
        told = _is_denied(greeted) and os.path.exists(asked.socket)
        return Finding("FAIL", "socket", greeted.message, "" if told else greeted.hint)
    return Finding("OK", "socket", f"loopd {greeted.loopd} answers at {asked.socket}")


def _is_denied(greeted: Greeting | client.Error) -> bool:
    return isinstance(greeted, client.Error) and getattr(greeted.__cause__, "errno", 0) == errno.EACCES


def _group(asked: client.Client, greeted: Greeting | client.Error, place: _Place | None) -> Finding:
    try:
        status = os.stat(asked.socket)
    except OSError as error:
        return Finding("WARN", "group", f"not known: {asked.socket}: {error.strerror}")
    text = f"{asked.socket} is of uid {status.st_uid} and gid {status.st_gid}, {stat.filemode(status.st_mode)}"
    if not os.access(asked.socket, os.W_OK, effective_ids=True):
        text += f", and not to be written by uid {os.geteuid()}"
        return Finding("FAIL", "group", text, _membership(asked.socket, status))
    if _is_denied(greeted):
        return Finding("WARN", "group", f"{text}: not what denies it; a security module may", layers.SELINUX)
    folder = os.path.dirname(asked.socket) or "."
    if os.access(folder, os.W_OK, effective_ids=True) and not (place and place.host):
        text = f"{folder} can be written here: another socket in the place of loopd's would get the files of others"
        return Finding("WARN", "group", text, "bind it in read-only: podman run -v /run/loopd:/run/loopd:ro")
    return Finding("OK", "group", text)


def _membership(socket: str, status: os.stat_result) -> str:
    """How this process comes to be in the socket's group."""
    if os.path.basename(socket) == os.path.basename(client.ADMIN_SOCKET):
        return NOT_ROOT
    if not status.st_mode & stat.S_IWGRP:
        return "its group may not write to it either: SocketMode= of loopd.socket on the host has the mode"
    gid = status.st_gid
    if layers.foreign_user_namespace():
        # A group that is not mapped here has the overflow gid, which is no number that a runtime could add.
        known = "" if str(gid) == (_read("/proc/sys/kernel/overflowgid") or "65534") else f", or --group-add={gid}"
        return f"podman run --group-add keep-groups (with crun), as a user who is in the group on the host{known}"
    return (
        f"podman or docker run --group-add={gid}; on the host, usermod --append --groups={gid} USER, who then logs in "
        f"anew, or as root setpriv --reuid={os.geteuid()} --regid={os.getegid()} --groups={gid} COMMAND"
    )


# The directory ------------------------------------------------------------------------------------------------


def _directory(place: _Place, uid: int | None) -> Finding:
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
        found = layers.not_this_users(uid)
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


def _numbers(asked: client.Client, place: _Place) -> Finding:
    try:
        known = asked.own_numbers(place.fd)
    except client.Error as error:
        return Finding("WARN", "numbers", f"not known: {error.message}", error.hint)
    if known is None:
        remedy = "on the host, loopctl directory --remove NAME, and loopctl directory NAME once more"
        return Finding("WARN", "numbers", f"{place.path} owns no device numbers: each attach takes a new one", remedy)
    numbers, in_use = known
    text = f"{place.path} owns {len(numbers)} device numbers, loop{numbers[0]} the first; {in_use} are in use"
    if len(numbers) - in_use > 1:
        return Finding("OK", "numbers", text)
    remedy = "loopctl detach gives one back; on the host, loopctl directory --devices N makes a directory with more"
    return Finding("WARN", "numbers", f"{text}, and a disk with a partition may need two", remedy)


# The device ---------------------------------------------------------------------------------------------------


def _opening(place: _Place, trial: Trial) -> Iterator[Finding]:
    """Tell from what became of a device, and of its partition, which layer refuses."""
    error, partition = trial.error, trial.partition
    refused = {getattr(error, "layer", ""): error}
    if partition is not None and partition.obstacle is not None:
        found = partition.obstacle
        refused[found.layer] = client.Error(f"{partition.path} cannot be opened: {found.reason}", found.hint)
    for name, what in (("device cgroup", "the device cgroup"), ("lsm", f"a security module ({_lsm()})")):
        known = refused.get(name)
        if known is not None:
            yield Finding("FAIL", name, known.message, known.hint)
        elif error is not None:
            yield Finding("WARN", name, NOT_KNOWN)
        elif name == "lsm" and "device cgroup" in refused:  # which the kernel asks first
            yield Finding("WARN", name, f"{what} does not refuse the device; of the partition it is not known")
        else:
            yield Finding("OK", name, f"{what} refuses nothing")
    if error is None:
        yield Finding("OK", "device", f"{trial.path} opens")
    else:
        yield Finding("FAIL", "device", error.message, error.hint)
    yield _partitions(place, trial)


def _partitions(place: _Place, trial: Trial) -> Finding:
    partition = trial.partition
    if trial.unscanned is not None:
        return Finding("WARN", "partitions", trial.unscanned.message, "in loopd.toml: allow.partscan")
    if partition is None:
        return Finding("WARN", "partitions", NOT_KNOWN)
    if partition.said:
        return Finding("FAIL", "partitions", partition.said)
    if partition.device is None:
        text = "the kernel has found no partition: it cannot read such a table (CONFIG_MSDOS_PARTITION)"
        remedy = "attach a part of the image, with --offset and --sizelimit"
        return Finding("WARN", "partitions", text, remedy)
    if partition.obstacle is not None:
        text = f"{partition.path} cannot be opened: {partition.obstacle.reason}"
        return Finding("FAIL", "partitions", text, partition.obstacle.hint)
    return Finding("OK", "partitions", f"{partition.path} opens: {_what_and_why(place, partition)}")


def _what_and_why(place: _Place, partition: Partition) -> str:
    if not partition.kernels:
        return (
            "a loop device on that part of the image, for a node of the kernel's partition could be kept here; what "
            "asks /sys for the disk of a partition, as grub-install, needs allow.kernel_partitions in loopd.toml, and "
            "mkfs.fat needs -h FIRST-SECTOR where a boot loader reads it"
        )
    if place.host and os.geteuid() == 0:
        return "the kernel's partition, as root of the host has it"
    if layers.foreign_user_namespace() and (place.grant or os.path.dirname(partition.path) != place.path):
        return "the kernel's partition, whose node loopd can close to this user namespace"
    return "the kernel's partition, as the administrator allows (allow.kernel_partitions in loopd.toml)"


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
    if not _reaches_others():
        return Finding("OK", "CAP_MKNOD", "there, and the device cgroup lets no loop device be opened but single ones")
    text = "with the device cgroup's b 7:* every loop device of the host is in reach"
    return Finding("WARN", "CAP_MKNOD", text, "podman or docker run --cap-drop MKNOD")


def _reaches_others() -> bool:
    """Whether a node of a loop device that is no directory's could be opened. Opens none: access(2) asks the device
    cgroup, too.
    """
    path = f"/dev/.loopd-{os.urandom(8).hex()}"
    try:
        os.mknod(path, stat.S_IFBLK | 0o600, os.makedev(layers.LOOP_MAJOR, OTHERS))
    except OSError as error:
        return error.errno != errno.EPERM  # the device cgroup's m; else another place may do
    try:
        return os.access(path, os.R_OK, effective_ids=True)
    finally:
        os.unlink(path)


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


# All of them --------------------------------------------------------------------------------------------------


def examine(asked: client.Client) -> Iterator[Finding]:
    """Every check, in the order in which a request meets them."""
    greeted = _greeted(asked)
    yield _socket(asked, greeted)
    try:
        place = _place()
    except client.Error as error:  # LOOPD_DIRECTORY
        yield Finding("FAIL", "directory", error.message, error.hint)
        return
    yield _group(asked, greeted, place)
    if place is None:
        yield Finding("FAIL", "directory", "/dev cannot be opened")
        return
    try:
        if isinstance(greeted, client.Error):
            numbers, trial = [], Trial(error=client.Error("loopd cannot be asked for one"))
        else:
            numbers = [_numbers(asked, place)] if place.grant else []
            trial = attempted(asked)
        found = [_directory(place, getattr(greeted, "uid", None)), *numbers, _nodev(place), _user_namespace(place)]
        found += [*_opening(place, trial), _mknod(place)]
        yield from _agreeing(found, trial)
        if place.host:
            yield _max_loop()
    finally:
        os.close(place.fd)


def _agreeing(findings: list[Finding], trial: Trial) -> Iterator[Finding]:
    """What was found, and no OK beside a FAIL for the same thing: what became of the device is right."""
    error = trial.error
    refusing = "" if error is None else _refusing(error)
    told = any(finding.layer == refusing for finding in findings)
    for finding in findings:
        if error is not None and finding.layer == refusing and not finding.failed:
            yield Finding("FAIL", finding.layer, error.message, error.hint)
        elif told and finding.layer == "device":
            yield finding._replace(remedy="")  # it stands in the line of the layer
        elif error is None and finding.failed and finding.layer in ("directory", "nodev", "user namespace"):
            yield finding._replace(level="WARN")  # the device came another way
        else:
            yield finding


def _refusing(error: client.Error) -> str:
    """The line that speaks of what has refused a device."""
    if isinstance(error, client.DeviceInaccessible):
        return {"permission": "directory", "mount": "user namespace"}.get(error.layer, error.layer)
    if isinstance(error, client.Quota) and "device numbers of this directory" in error.message:
        return "numbers"
    if isinstance(error, client.NotPermitted) and "CAP_MKNOD" in error.message:
        return "CAP_MKNOD"
    return "directory" if error.message.startswith("dir_fd: ") else ""
