"""Nodes: put device nodes into a directory and take them away, each directory in the way that is safe for it.

A client's own directory is changed with that client's rights alone. A directory of loopd's (a grant, or one made for a
mount) is changed with loopd's own, and its nodes stay loopd's, with an access list for the client: the client can open
them, but neither link, rename, chmod nor remove them. Runs in workers. Knows no leases and no policy.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol

from loopd.kernel import openat2, rights
from loopd.protocol.wire import Code, Refusal
from loopd.worker.devices import MOST_PARTITIONS

Numbers = tuple[int, int]
"""Major and minor of a device."""


class Node(NamedTuple):
    """A node that loopd made: it is removed only while the name still leads to this inode with this device number."""

    name: str
    major: int
    minor: int
    inode: int


class Client(NamedTuple):
    """The uid and gid whose rights are used in a client's directory, and who may open nodes in one of loopd's `own`."""

    uid: int
    gid: int
    own: bool


class Directory(Protocol):
    """A directory for nodes: `fd` is where they are made, `view` is as the client sees it; `own`: it is loopd's."""

    fd: int
    view: int
    own: bool

    def rights(self) -> contextlib.AbstractContextManager[None]:
        """The rights under which everything in the directory is done."""

    def finish(self, name: str, *, read_only: bool) -> None:
        """What a new node needs before the client can use it."""


class ClientDirectory:
    """A directory of the client's own.

    Every step is taken with the client's uid and gid, no supplementary groups and CAP_MKNOD alone, so that it reaches
    only what the client could change itself: an fd proves no more than that it could be opened.
    """

    own = False

    def __init__(self, fd: int, client: Client) -> None:
        self.fd = self.view = fd
        self._client = client

    def rights(self) -> contextlib.AbstractContextManager[None]:
        return rights.acting_as(self._client.uid, self._client.gid)

    def finish(self, name: str, *, read_only: bool) -> None:
        """Nothing: made with its fsuid, the node is the client's already."""


_ACL_HEADER = struct.Struct("<I")  # POSIX_ACL_XATTR_VERSION of <linux/posix_acl_xattr.h>
_ACL_ENTRY = struct.Struct("<HHI")  # tag, permissions, id
ACL_USER_OBJ, ACL_USER, ACL_GROUP_OBJ, ACL_MASK, ACL_OTHER = 0x01, 0x02, 0x04, 0x10, 0x20
ACL_UNDEFINED_ID = 0xFFFFFFFF
READ, WRITE, SEARCH = 4, 2, 1


def access_list(uid: int, owner: int, permissions: int) -> bytes:
    """The value of system.posix_acl_access that gives `uid` these permissions, and nobody else but the owner any."""
    entries = (
        (ACL_USER_OBJ, owner, ACL_UNDEFINED_ID),
        (ACL_USER, permissions, uid),
        (ACL_GROUP_OBJ, 0, ACL_UNDEFINED_ID),
        (ACL_MASK, permissions, ACL_UNDEFINED_ID),
        (ACL_OTHER, 0, ACL_UNDEFINED_ID),
    )
    return _ACL_HEADER.pack(2) + b"".join(_ACL_ENTRY.pack(*entry) for entry in entries)


class OwnDirectory:
    """A directory of loopd's own that the client can see; `view` is the client's fd of it, which may be read-only."""

    own = True

    def __init__(self, fd: int, view: int, uid: int) -> None:
        self.fd = fd
        self.view = view
        self._uid = uid

    def rights(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def finish(self, name: str, *, read_only: bool) -> None:
        # By way of the pinned inode: where the directory is mounted writable, root of the container can put a link
        # there.
        pinned = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.fd)
        try:
            if not stat.S_ISBLK(os.fstat(pinned).st_mode):
                raise Refusal(Code.UNDELIVERABLE, f"dir_fd: {name} was replaced as soon as it was made")
            acl = access_list(self._uid, READ | WRITE, READ if read_only else READ | WRITE)
            os.setxattr(f"/proc/self/fd/{pinned}", "system.posix_acl_access", acl)
        finally:
            os.close(pinned)


def directory(fd: int, client: Client, view: int | None = None) -> Directory:
    """The directory `fd` for this client; `view` is the client's own fd of it, where it has one of its own."""
    return OwnDirectory(fd, fd if view is None else view, client.uid) if client.own else ClientDirectory(fd, client)


_MKNOD = {
    errno.EEXIST: (Code.EXISTS, "the name is taken in the directory"),
    errno.EACCES: (Code.NOT_PERMITTED, "the client itself may not create a file in the directory"),
    errno.EPERM: (Code.NOT_PERMITTED, "the directory does not take device nodes from the client"),
    errno.EROFS: (Code.NOT_PERMITTED, "the directory is on a read-only mount"),
    errno.ENOSPC: (Code.IO, "the directory's file system is full"),
    errno.EDQUOT: (Code.IO, "the client's disk quota in the directory is used up"),
    errno.ENOENT: (Code.NOT_FOUND, "the directory has been removed"),
}

NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""What loopd itself or the host has no more of, whatever the directory."""

_PROVE = {
    errno.EACCES: "its mount is nodev or belongs to a user namespace: use a directory of the host or another delivery",
    errno.ENOENT: "it was removed at once",
    errno.ENXIO: "the device went away",
}


def place(directory: Directory, devname: str, wanted: dict[str, Numbers], *, read_only: bool = False) -> list[Node]:
    """Make the nodes of `wanted`, all or none, and prove that the disk's can be opened where the client sees it."""
    made: list[Node] = []
    with directory.rights():
        try:
            for name, numbers in wanted.items():
                made.append(_make(directory, name, numbers))
                directory.finish(name, read_only=read_only)
                if name == devname:
                    _prove(directory, made[-1])
        except BaseException:
            _remove_all(directory, made)
            raise
    return made


def displace(directory: Directory, nodes: Iterable[Node]) -> list[Node]:
    """Remove nodes; returns those that could not be removed."""
    with directory.rights():
        return _remove_all(directory, list(nodes))


def revoke(directory: Directory, nodes: Iterable[Node]) -> None:
    """Close nodes to everybody (mode 0). A process that kept another way to a node (a mount, a hard link) cannot open
    it any more, unless it owns the node, as the client does in its own directory. Unlike all else here this does not
    wait while somebody keeps the directory locked.
    """
    with directory.rights():
        _revoke_all(directory, nodes)


def revoke_partitions(directory: Directory, devname: str, number_of: Callable[[str], Numbers | None]) -> None:
    """In a directory of loopd's own, close all nodes of partitions that have not the `number_of` their name. It waits
    for nobody. Another worker may make nodes meanwhile: a name is asked for only once its node is there.
    """
    if not directory.own:
        return
    for number in range(1, MOST_PARTITIONS + 1):
        name = f"{devname}p{number}"
        with contextlib.suppress(OSError):
            pinned = openat2.pin_cached(name, directory.fd)
            try:
                status = os.fstat(pinned)
                device = (os.major(status.st_rdev), os.minor(status.st_rdev))
                if stat.S_ISBLK(status.st_mode) and number_of(name) != device:
                    os.chmod(f"/proc/self/fd/{pinned}", 0)
            finally:
                os.close(pinned)


def close(directory: Directory, nodes: Iterable[Node]) -> list[tuple[Node, int]]:
    """Close nodes for a while. Returns the nodes that were closed, each with the mode that `reopen` gives back."""
    closed = []
    with directory.rights():
        for node in nodes:
            with contextlib.suppress(OSError):
                mode = stat.S_IMODE(os.stat(node.name, dir_fd=directory.fd, follow_symlinks=False).st_mode)
                if _revoke(directory, node):
                    closed.append((node, mode))
    return closed


def reopen(directory: Directory, closed: Iterable[tuple[Node, int]]) -> None:
    """Give nodes their mode back. Of a node with an access list the mode's group bits are the list's mask."""
    with directory.rights():
        for node, mode in closed:
            with contextlib.suppress(OSError):
                _change_mode(directory, node, mode)


def prune(directory: Directory, nodes: Iterable[Node], wanted: dict[str, Numbers]) -> list[Node]:
    """Remove nodes that are not `wanted`, by name and numbers; returns those that are there."""
    there = list(nodes)
    gone = [node for node in there if wanted.get(node.name) != (node.major, node.minor)]
    with directory.rights():
        left = _remove_all(directory, gone)
    return [node for node in there if node not in gone or node in left]


def add(directory: Directory, wanted: dict[str, Numbers], *, read_only: bool) -> list[Node]:
    """Make nodes, as far as that is possible: a name that the client took meanwhile stays the client's."""
    made = []
    with directory.rights():
        for name, numbers in wanted.items():
            with contextlib.suppress(Refusal, OSError):
                made.append(_make(directory, name, numbers))
                directory.finish(name, read_only=read_only)
    return made


def find(directory: Directory, name: str, wanted: dict[str, Numbers], *, whole: bool) -> list[Node]:
    """The nodes of a device that a worker or daemon which ended may have left in the directory: the node `name`, and if
    `whole` those of its partitions.

    In a directory of loopd's own these are all nodes of a partition's name, also of one that has gone meanwhile. Else
    these are the `wanted` ones: in a client's directory such a node may be the client's, and that of a window the next
    window's.
    """
    found = []
    with directory.rights():
        for found_name in names(directory.fd) if directory.own else wanted:
            if found_name != name and not (whole and re.fullmatch(rf"{name}p\d+", found_name)):
                continue
            with contextlib.suppress(OSError):
                status = os.stat(found_name, dir_fd=directory.fd, follow_symlinks=False)
                node = Node(found_name, os.major(status.st_rdev), os.minor(status.st_rdev), status.st_ino)
                of_any = directory.own and found_name != name
                if stat.S_ISBLK(status.st_mode) and (of_any or wanted[found_name] == (node.major, node.minor)):
                    found.append(node)
    return found


@contextlib.contextmanager
def listed(directory: int) -> Iterator[int]:
    """The directory, to be listed by an open file description of its own. Workers share the other one, and with it the
    place that a listing has come to, and a worker that was killed may have left off in the middle.
    """
    fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)
    try:
        yield fd
    finally:
        os.close(fd)


def names(directory: int) -> list[str]:
    """What is in the directory."""
    with listed(directory) as fd:
        return os.listdir(fd)


def finish(directory: Directory, nodes: Iterable[Node], *, read_only: bool) -> None:
    """Complete nodes, of which a worker that ended may have left one half-made."""
    with directory.rights():
        for node in nodes:
            with contextlib.suppress(Refusal, OSError):
                directory.finish(node.name, read_only=read_only)


def _make(directory: Directory, name: str, numbers: Numbers) -> Node:
    try:
        os.mknod(name, stat.S_IFBLK | 0o600, os.makedev(*numbers), dir_fd=directory.fd)
    except OSError as error:
        code, meaning = _MKNOD.get(error.errno or 0, (Code.IO, "the node could not be made"))
        raise Refusal(code, f"dir_fd: {meaning}: {name}: {os.strerror(error.errno or 0)}") from error
    try:
        status = os.stat(name, dir_fd=directory.fd, follow_symlinks=False)
    except OSError as error:
        with contextlib.suppress(OSError):  # ENOMEM: it may be there all the same
            status = os.stat(name, dir_fd=directory.fd, follow_symlinks=False)
            _remove(directory, Node(name, *numbers, status.st_ino))
        raise Refusal(Code.UNDELIVERABLE, f"dir_fd: {name} went as soon as it was made: {error.strerror}") from error
    return Node(name, *numbers, status.st_ino)


def _is(status: os.stat_result, node: Node) -> bool:
    same = status.st_ino == node.inode and status.st_rdev == os.makedev(node.major, node.minor)
    return same and stat.S_ISBLK(status.st_mode)


def _prove(directory: Directory, node: Node) -> None:
    """Open the node the way the client will.

    O_PATH pins the inode, so that the inode which was looked at is opened. The client may swap the name for a FIFO,
    whose open blocks, or for a device whose open has effects.
    """
    try:
        pinned = os.open(node.name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory.view)
        try:
            if not _is(os.fstat(pinned), node):
                raise Refusal(Code.UNDELIVERABLE, f"dir_fd: {node.name} was replaced as soon as it was made")
            os.close(os.open(f"/proc/self/fd/{pinned}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
        finally:
            os.close(pinned)
    except OSError as error:
        if error.errno in NO_ROOM:
            raise
        meaning = _PROVE.get(error.errno or 0, "it cannot be opened")
        why = f"dir_fd: {node.name} is there, but {meaning}: {os.strerror(error.errno or 0)}"
        raise Refusal(Code.UNDELIVERABLE, why) from error


def _remove_all(directory: Directory, gone: list[Node]) -> list[Node]:
    """Remove nodes; returns those that could not be removed.

    All are closed before the first is removed: a client can keep the directory locked, so that unlink(2) waits, and the
    numbers of the other nodes become another disk's meanwhile.
    """
    if len(gone) > 1:
        _revoke_all(directory, gone)
    return [node for node in gone if not _remove(directory, node)]


def _revoke_all(directory: Directory, nodes: Iterable[Node]) -> None:
    for node in nodes:
        with contextlib.suppress(OSError):
            _revoke(directory, node)


def _revoke(directory: Directory, node: Node) -> bool:
    """Close a node to everybody; whether its name leads to it. OSError where it cannot be looked at."""
    return _change_mode(directory, node, 0)


def _change_mode(directory: Directory, node: Node, mode: int) -> bool:
    """Change a node's permissions; whether its name leads to it. OSError where it cannot be looked at."""
    try:
        pinned = os.open(node.name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory.fd)
    except FileNotFoundError:
        return False
    try:
        if not _is(os.fstat(pinned), node):
            return False  # the client's own, by that name
        with contextlib.suppress(OSError):
            # By way of the pinned inode: the name may have become a symbolic link, which chmod(2) would follow in this
            # process's namespace.
            os.chmod(f"/proc/self/fd/{pinned}", mode)
        return True
    finally:
        os.close(pinned)


def _remove(directory: Directory, node: Node) -> bool:
    try:
        if _revoke(directory, node):
            os.unlink(node.name, dir_fd=directory.fd)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True
