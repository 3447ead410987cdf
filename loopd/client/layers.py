"""The layers between a client and its device: what a directory, a mount, a namespace or a right lets through.

Finds out what the client alone can find out, and says it in words with a remedy. Attaches a mount and takes it away.
Changes when another layer can refuse a device. Asks no daemon and imports nothing of the package.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from contextlib import suppress
from typing import NamedTuple

LOOP_MAJOR = 7
CAP_SYS_ADMIN, CAP_MKNOD = 21, 27
SYS_MOVE_MOUNT = 429  # the same on every architecture but Alpha; Linux 5.2
MOVE_MOUNT_F_EMPTY_PATH = 0x4
AT_FDCWD = -100
MNT_DETACH = 2
NS_GET_USERNS = 0xB701  # ioctl_ns(2); Linux 4.9
ACL_USER = 0x02  # of <linux/posix_acl_xattr.h>

BIND = (
    "on the host, bind a directory of loopd's into the container: "
    "podman run -v /run/loopd:/run/loopd:ro -v $(loopctl directory NAME):/dev/loopd:ro"
)
"""The remedy that is recommended: works in every kind of container."""
SELINUX = (
    "loopd's policy module on the host (docs/containers.md, SELinux), or podman run --security-opt label=disable for "
    "this container alone"
)
"""The remedy where SELinux is what denies it."""
KERNEL_PARTITION = (
    "a rule for their major would let in NVMe disks too: attach the part of the image with --offset and --sizelimit; "
    "without allow.kernel_partitions in loopd.toml, a container without a user namespace of its own gets nodes of loop "
    "devices (docs/containers.md, Partitions)"
)
"""The remedy where the device cgroup denies the kernel's partitions."""


class Obstacle(NamedTuple):
    """What refuses a device: `layer` as `DeviceInaccessible` has it, the reason, and what helps."""

    layer: str
    reason: str
    hint: str


class Mount(NamedTuple):
    """A line of mountinfo; `root` is the directory of the file system that is mounted at `point`."""

    id: int
    root: str
    point: str
    type: str
    source: str


def unescaped(text: str) -> str:
    """A path as mountinfo has it: space, tab, newline and backslash are octal there."""
    for escape, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(escape, character)
    return text


def parsed_mount(line: str) -> Mount:
    """One line of /proc/PID/mountinfo (proc_pid_mountinfo(5))."""
    before, _, behind = line.rstrip("\n").partition(" - ")
    fields, (kind, source) = before.split(" "), behind.split(" ")[:2]
    return Mount(int(fields[0]), unescaped(fields[3]), unescaped(fields[4]), kind, unescaped(source))


def mounts() -> list[Mount]:
    """What is mounted for this process; empty where that cannot be read."""
    # Paths are bytes, and a carriage return in one does not end the line.
    with suppress(OSError), open(
        "/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape", newline="\n"
    ) as table:
        return [parsed_mount(line) for line in table]
    return []


def mount_of(fd: int) -> Mount | None:
    """The mount that an open file is on, None where it cannot be told."""
    with suppress(OSError, ValueError, IndexError), open(f"/proc/self/fdinfo/{fd}", encoding="utf-8") as info:
        wanted = int(info.read().split("mnt_id:")[1].split()[0])
        return next((mount for mount in mounts() if mount.id == wanted), None)
    return None


def is_devtmpfs(dir_fd: int) -> bool:
    """Whether a directory is the top of a devtmpfs: there the kernel itself makes and removes the nodes."""
    mount = mount_of(dir_fd)
    if mount is None or (mount.type, mount.root) != ("devtmpfs", "/"):
        return False
    with suppress(OSError):
        return os.path.samestat(os.stat(mount.point), os.fstat(dir_fd))
    return False


def capable(capability: int) -> bool:
    """Whether this process has a capability in effect, in the user namespace that it is in."""
    with suppress(OSError, ValueError, IndexError), open("/proc/self/status", encoding="utf-8") as status:
        return bool(int(status.read().split("CapEff:\t")[1][:16], 16) & 1 << capability)
    return False


def foreign_user_namespace() -> bool:
    """Whether the user namespace is another one than the host's."""
    # Without it there is no /proc here, or the kernel has no user namespaces.
    with suppress(FileNotFoundError), open("/proc/self/uid_map", encoding="utf-8") as file:
        return file.read().split() != ["0", "0", str(2**32 - 1)]
    return False


# A directory for a node -------------------------------------------------------------------------------------


def _of_user_namespace(dir_fd: int) -> bool:
    """Whether the file system of a directory was mounted in a user namespace: no device opens there.

    Makes a whiteout and opens it. A whiteout is the one character device that anybody may make (Linux 5.8). It has no
    driver, so open(2) gives ENXIO where devices open, and EACCES where they do not.
    """
    name = f".loopd-{os.urandom(8).hex()}"
    try:
        os.mknod(name, stat.S_IFCHR | 0o600, 0, dir_fd=dir_fd)
    except OSError:
        return False  # not known here: the daemon will find out
    try:
        os.close(os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=dir_fd))
    except OSError as error:
        return error.errno == errno.EACCES
    finally:
        with suppress(OSError):
            os.unlink(name, dir_fd=dir_fd)
    return False


def obstacle(dir_fd: int, *, own: bool) -> Obstacle | None:
    """What keeps a device from being opened in a directory, as far as it can be known without asking loopd.

    `own`: the directory is to be the client's, so that it must be able to write there.
    """
    if os.fstatvfs(dir_fd).f_flag & os.ST_NODEV:
        return Obstacle(
            "nodev",
            "its mount has the option nodev",
            f"{BIND}; any directory does where it is bound in with the option dev, as by -v DIRECTORY:/dev/loopd:dev",
        )
    writable = os.access(".", os.W_OK | os.X_OK, dir_fd=dir_fd, effective_ids=True)
    if own and not writable:
        return Obstacle("permission", f"uid {os.geteuid()} may not make a file in it", BIND)
    if writable and foreign_user_namespace() and _of_user_namespace(dir_fd):
        return USER_NAMESPACE
    return None


USER_NAMESPACE = Obstacle(
    "user namespace",
    "its file system is one of a user namespace, where no device opens",
    f"take a directory that was bind-mounted from the host ({BIND}), or let an fd be delivered",
)


def not_the_hosts(dir_fd: int) -> Obstacle | None:
    """What keeps this user from the nodes that the kernel makes in the host's /dev.

    udev gives them to the group that it gives the control device to.
    """
    if os.access("loop-control", os.R_OK | os.W_OK, dir_fd=dir_fd, effective_ids=True):
        return None
    return Obstacle(
        "permission",
        f"the host's loop devices are not for uid {os.geteuid()}",
        "take a directory of this user's own, -d DIRECTORY, on a mount without nodev",
    )


def not_this_users(uid: int | None = None) -> Obstacle:
    """Why a directory of loopd's that is bound in cannot be opened. `uid`: this user's on the host, if it is known."""
    if uid is None and not foreign_user_namespace():
        uid = os.geteuid()
    return Obstacle(
        "permission",
        f"it is not for uid {os.geteuid()}",
        "`loopctl directory NAME` makes one for who calls it: without sudo, as the user who starts the container; "
        f"root makes one for this user by `loopctl directory --user={'UID' if uid is None else uid} NAME`",
    )


def unopened(dir_fd: int, name: str, device: tuple[int, int], read_only: bool, error: int) -> Obstacle:
    """Which layer made open(2) of a node fail, by its errno (fs/namei.c, security/device_cgroup.c)."""
    if error == errno.EPERM:
        rule = f"--device-cgroup-rule 'b {LOOP_MAJOR}:* {'r' if read_only else 'rw'}' for an image that is trusted"
        remedy = f'podman or docker run --device="$(loopctl directory --cdi NAME)", or {rule}'
        return Obstacle(
            "device cgroup",
            "the device cgroup of this container denies it",
            remedy if device[0] == LOOP_MAJOR else KERNEL_PARTITION,
        )
    if error != errno.EACCES:
        return Obstacle("device", os.strerror(error), "`loopctl list` shows whether it is still attached")
    known = obstacle(dir_fd, own=False)
    if known is not None:
        return known
    node = os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    # Only loopd makes access lists, in its directories on the host: then neither the mount nor the mode is the reason.
    if not _listed(dir_fd, name):
        # access(2) checks mode, ACL and the LSM's hook on the inode, but not what the mount allows.
        if os.access(name, os.R_OK if read_only else os.R_OK | os.W_OK, dir_fd=dir_fd, effective_ids=True):
            if foreign_user_namespace():
                return USER_NAMESPACE
        elif node.st_uid != os.geteuid():
            return Obstacle(
                "permission",
                f"it is uid {node.st_uid}'s, mode {stat.S_IMODE(node.st_mode):04o}, not uid {os.geteuid()}'s",
                "ask as the user who is to use the device, or take a directory of that user's: -d DIRECTORY",
            )
    return Obstacle(
        "lsm",
        "a security module, SELinux or AppArmor, denies it",
        f"its audit log on the host tells why; for SELinux: {SELINUX}",
    )


def _listed(dir_fd: int, name: str) -> bool:
    """Whether the access list of a node (acl(5)) names this user. Only loopd makes one, and it allows access."""
    with suppress(OSError, ValueError, struct.error):
        value = os.getxattr(f"/proc/self/fd/{dir_fd}/{name}", "system.posix_acl_access", follow_symlinks=False)
        # A version of 4 bytes, then entries of tag, permissions and id. The kernel maps the ids to this user namespace.
        return any(tag == ACL_USER and uid == os.geteuid() for tag, _, uid in struct.iter_unpack("<HHI", value[4:]))
    return False


# A mount ----------------------------------------------------------------------------------------------------


def no_mount() -> Obstacle | None:
    """What keeps this process from attaching a mount."""
    if not capable(CAP_SYS_ADMIN):
        return Obstacle(
            "mount",
            "attaching a mount needs CAP_SYS_ADMIN, in the user namespace of the container",
            f"{BIND}; in a rootless container --cap-add SYS_ADMIN does, too",
        )
    if not _owns_mount_namespace():
        return Obstacle(
            "mount",
            "the mount namespace is of another user namespace than this one",
            f"{BIND}; `unshare --mount` makes one that is of this",
        )
    return None


def _owns_mount_namespace() -> bool:
    """Whether the capabilities of this user namespace count for its mounts: those of bwrap's inner one do not."""
    import fcntl  # noqa: PLC0415  # costs all who need no mount

    try:
        with open("/proc/self/ns/mnt", "rb", buffering=0) as namespace:
            os.close(fcntl.ioctl(namespace.fileno(), NS_GET_USERNS))
    except OSError as error:
        return error.errno != errno.EPERM  # the owner is an ancestor of this user namespace (ioctl_ns(2))
    return True


TEMPORARY = "loopd-"


def remove_mount_point(point: str) -> None:
    """Remove what `make_mount_point` made, as far as nothing else is in it."""
    with suppress(OSError):
        os.rmdir(point)
        if os.path.basename(os.path.dirname(point)).startswith(TEMPORARY):
            os.rmdir(os.path.dirname(point))


def make_mount_point(devname: str, folder: str | None = None) -> str:
    """Make an empty directory for a mount: in `folder`, else in the first that can be had of /dev/loopd,
    $XDG_RUNTIME_DIR/loopd, and $TMPDIR under a name of its own; its path. OSError of the last that was tried.
    """
    folders = [folder]
    if folder is None:
        runtime = os.environ.get("XDG_RUNTIME_DIR")
        # Others can write there, too, so the name must not be guessable.
        temporary = os.path.join(os.environ.get("TMPDIR") or "/tmp", f"{TEMPORARY}{os.urandom(8).hex()}")  # noqa: S108
        folders = ["/dev/loopd", os.path.join(runtime, "loopd") if runtime else None, temporary]
    refused = OSError(errno.ENOENT, os.strerror(errno.ENOENT))
    for parent in filter(None, folders):
        path = os.path.join(parent, devname)
        try:
            with suppress(FileExistsError):
                os.mkdir(parent, 0o700)
            os.mkdir(path, 0o700)
        except OSError as error:
            refused = error
        else:
            return path
    raise refused


def attach_mount(mount: int, point: str) -> None:
    """Attach a detached mount at a directory (move_mount(2)); OSError."""
    import ctypes  # noqa: PLC0415  # costs all who need no mount

    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.syscall(
        ctypes.c_long(SYS_MOVE_MOUNT),
        ctypes.c_int(mount),
        b"",
        ctypes.c_int(AT_FDCWD),
        os.fsencode(point),
        ctypes.c_uint(MOVE_MOUNT_F_EMPTY_PATH),
    )
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), point)


def mount_points(devname: str) -> list[str]:
    """Where the mounts with this device's node are attached, also those whose directory loopd has removed."""
    roots = (f":{devname}", f":{devname}//deleted")  # loopd's directory is /.INSTANCE:loopN/:loopN
    return [mount.point for mount in mounts() if mount.type == "tmpfs" and mount.root.endswith(roots)]


def detach_mounts(devname: str) -> None:
    """Take the mounts of a device away, and the directories that they were attached at, as far as possible."""
    points = mount_points(devname)
    if not points:
        return
    import ctypes  # noqa: PLC0415  # costs all who need no mount

    libc = ctypes.CDLL(None, use_errno=True)
    for point in points:
        if libc.umount2(os.fsencode(point), ctypes.c_int(MNT_DETACH)) == 0:
            remove_mount_point(point)
