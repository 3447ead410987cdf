"""The sockets and pidfds that a client sends along: tell what they are and who has made them, and have nothing come in.

Nothing here waits for a client or asks a file system. Runs in workers, on fds that stay their owner's.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import struct
import sys

from loopd.kernel.transport import FdSet, Sender, borrowed
from loopd.protocol import wire

SO_PEERPIDFD = 77  # not in Python's socket module; Linux 6.5
_UCRED = struct.Struct("iII")  # pid, uid, gid: struct ucred


def is_pidfd(fd: int) -> bool:
    """Whether `fd` is a pidfd, without asking the file: no file system's path begins so (pid_fs since Linux 6.9)."""
    return os.readlink(f"/proc/self/fd/{fd}").startswith(("anon_inode:[pidfd]", "pidfd:["))


def _is_socket(fd: int) -> bool:
    # readlink asks the kernel's path code alone, whatever file system the file is of.
    return os.readlink(f"/proc/self/fd/{fd}").startswith("socket:[")


def _unix_type(channel: socket.socket) -> int | None:
    """The type of an AF_UNIX socket, None for another."""
    if channel.getsockopt(socket.SOL_SOCKET, socket.SO_DOMAIN) != socket.AF_UNIX:
        return None
    return channel.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)


def check_reply_socket(fd: int, sender: Sender) -> None:
    """Refuse what is not the sender's own end of an unnamed SEQPACKET socketpair.

    Both names must be empty: a connection to somebody's server would pass the check of the uid, and carry a reply with
    loopd's credentials there. SO_PEERCRED of a socketpair names its maker. `check_maker` asks which process that was;
    a refusal may go to any process of the same uid.
    """
    no_pair = wire.Refusal(wire.Code.BAD_FD, "reply_fd is no AF_UNIX SOCK_SEQPACKET socket")
    if not _is_socket(fd):
        raise no_pair
    with borrowed(fd) as peer:
        if _unix_type(peer) != socket.SOCK_SEQPACKET:
            raise no_pair
        if peer.getsockname() or _peer_name(peer):
            raise wire.Refusal(wire.Code.BAD_FD, "reply_fd is no unnamed socketpair")
        _, uid, _ = _UCRED.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    if uid != sender.uid:
        raise wire.Refusal(wire.Code.NOT_PERMITTED, "reply_fd was made by another uid than the sender's")


def check_maker(fd: int, sender: Sender) -> None:
    """Refuse a reply socket that was not made by the process that the datagram's credentials name.

    The credentials are a claim: with CAP_SYS_ADMIN over a pid namespace a process may put in the pid of any process
    there (net/core/scm.c: scm_check_creds), and SCM_PIDFD follows the claim. The maker of a socketpair is the kernel's
    own word.
    """
    if _maker(fd) != sender.pid:
        raise wire.Refusal(
            wire.Code.NOT_PERMITTED,
            "reply_fd was made by another process than the sender: make it in the process that sends, after its fork",
        )


def _maker(fd: int) -> int | None:
    """The process that has made a socketpair; None when it has ended, for its pid may be another's by now."""
    with borrowed(fd) as peer:
        pid = int(_UCRED.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))[0])
        try:
            pidfd = int.from_bytes(peer.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD, 4), sys.byteorder)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ESRCH):  # it has ended; Linux 6.16 gives a pidfd all the same
                return None
            if error.errno != errno.ENOPROTOOPT:  # EMFILE, ENFILE, ENOMEM
                raise
            return pid  # before Linux 6.5 nothing tells whether it has ended
    with FdSet((pidfd,)):
        return None if ended(pidfd) else pid


def ended(pidfd: int) -> bool:
    """Whether the process has ended."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def _peer_name(peer: socket.socket) -> object:
    try:
        return peer.getpeername()
    except OSError:  # ENOTCONN: never connected, or listening
        return "none"


def check_lease(fd: int) -> str:
    """Refuse what is neither a pidfd nor a connected AF_UNIX SOCK_SEQPACKET socket; else say which.

    A datagram pair gives no hang-up when the other end is closed, and a stream has out-of-band data (Linux 5.15), which
    `seal` could not see.
    """
    if is_pidfd(fd):
        return "pidfd"
    if not _is_socket(fd):
        raise wire.Refusal(wire.Code.BAD_FD, "lease_fd is neither a pidfd nor an AF_UNIX SOCK_SEQPACKET socket")
    with borrowed(fd) as peer:
        if _unix_type(peer) != socket.SOCK_SEQPACKET or _peer_name(peer) == "none":
            raise wire.Refusal(wire.Code.BAD_FD, "lease_fd is no connected AF_UNIX SOCK_SEQPACKET socket")
    return "socket"


FIONREAD = 0x541B  # <asm-generic/ioctls.h>


def seal(fd: int, name: str) -> None:
    """Have nothing come in through a client's socket any more; a refusal if something has.

    The process that closes the socket last releases what is in its queue. That may be a device whose last close waits
    for a file that never answers, and not even SIGKILL ends that wait. So the main process gets sealed sockets alone.
    The other end is told EPIPE, and its close is a hang-up as before. Where both ends of one pair are sealed, both hang
    up at once.
    """
    with borrowed(fd) as peer:
        peer.shutdown(socket.SHUT_RD)
        unread = int.from_bytes(fcntl.ioctl(peer, FIONREAD, bytes(4)), sys.byteorder)
    # Nothing is added from here on. FIONREAD does not see a message without bytes, so the kernel's count of the fds in
    # the queue is read as well (net/unix/af_unix.c: unix_show_fdinfo, Linux 5.6); a client cannot bend that.
    info = os.open(f"/proc/self/fdinfo/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        waiting = b"\nscm_fds: 0\n" not in os.read(info, 4096)
    finally:
        os.close(info)
    if waiting or unread:
        raise wire.Refusal(wire.Code.BAD_FD, f"{name}: something was sent into it, which is for loopd to answer")
