"""The floor once more, in Python: what the language costs, and what it costs to have a second process touch the fds.

`usage: floor.py SOCKET PROCESSES`. A broker as floor.c's: without a check, a record or a lease. With two processes the
first looks at the head of the queue and decides, the second takes the datagram, binds the device and hands it back, as
it has to be where a client's file may hang whoever touches it.
"""

from __future__ import annotations

import array
import fcntl
import json
import os
import resource
import select
import socket
import struct
import sys
from typing import NamedTuple

LOOP_CTL_GET_FREE, LOOP_CONFIGURE, LO_FLAGS_AUTOCLEAR, LOOP_MAJOR = 0x4C82, 0x4C0A, 4, 7
CONFIG = struct.Struct("=I4x52xI240x")
"""struct loop_config of <linux/loop.h>: fd, and of loop_info64 lo_flags."""
IMAGE, DIRECTORY, REPLY = 0, 1, 2
MOST = 4096


class Bound(NamedTuple):
    """A device with its node, the directory that this is in, and the socket whose end ends it."""

    number: int
    device: int
    directory: int
    reply: socket.socket


def bind(control: int, image: int, directory: int) -> tuple[int, int]:
    """Number and fd of a free device: locked, bound, with a node in the directory."""
    config = CONFIG.pack(image, LO_FLAGS_AUTOCLEAR)
    while True:
        number = fcntl.ioctl(control, LOOP_CTL_GET_FREE)
        device = os.open(f"/dev/loop{number}", os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(device, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.ioctl(device, LOOP_CONFIGURE, config)
        except OSError:  # somebody else was faster
            os.close(device)
            continue
        os.mknod(f"loop{number}", 0o60600, os.makedev(LOOP_MAJOR, number), dir_fd=directory)
        return number, device


def receive(channel: socket.socket, fds: int, flags: int = 0) -> tuple[bytes, list[int]]:
    """A message, and its fds."""
    payload, control, _, _ = channel.recvmsg(MOST, socket.CMSG_SPACE(4 * fds), flags | socket.MSG_CMSG_CLOEXEC)
    rights = array.array("i")
    for _, _, data in control:
        rights.frombytes(data)
    return payload, list(rights)


def helper(listener: socket.socket, control: int, channel: socket.socket) -> None:
    """The second process: does what it is told, and keeps nothing."""
    while order := receive(channel, 0)[0]:
        json.loads(order)
        fds = receive(listener, 3)[1]
        number, device = bind(control, fds[IMAGE], fds[DIRECTORY])
        own = [device, fds[DIRECTORY], fds[REPLY]]
        socket.send_fds(channel, [json.dumps({"number": number}).encode()], own)
        for fd in (fds[IMAGE], *own):
            os.close(fd)


def serve(listener: socket.socket, control: int, worker: socket.socket | None) -> None:
    """The first process, which may be the only one."""
    bound: dict[int, Bound] = {}
    poll = select.epoll()
    poll.register(listener, select.EPOLLIN)
    if worker is not None:
        poll.register(worker, select.EPOLLIN)

    def book(number: int, device: int, directory: int, fd: int) -> None:
        bound[fd] = Bound(number, device, directory, socket.socket(fileno=fd))
        poll.register(fd, select.EPOLLIN | select.EPOLLRDHUP)
        bound[fd].reply.send(json.dumps({"devname": f"loop{number}"}).encode())

    while True:
        for fd, _ in poll.poll():
            if fd in bound:
                ended = bound.pop(fd)
                poll.unregister(fd)
                os.unlink(f"loop{ended.number}", dir_fd=ended.directory)
                os.close(ended.device)
                os.close(ended.directory)
                ended.reply.close()
            elif worker is not None and fd == worker.fileno():
                poll.register(listener, select.EPOLLIN)
                payload, fds = receive(worker, 3)
                book(json.loads(payload)["number"], *fds)
            elif worker is not None:
                request = json.loads(receive(listener, 0, socket.MSG_PEEK)[0])
                poll.unregister(listener)  # until the datagram is taken
                worker.send(json.dumps({"take": request}).encode())
            else:
                payload, fds = receive(listener, 3)
                json.loads(payload)
                number, device = bind(control, fds[IMAGE], fds[DIRECTORY])
                os.close(fds[IMAGE])
                book(number, device, fds[DIRECTORY], fds[REPLY])


def main() -> None:
    path, processes = sys.argv[1], int(sys.argv[2])
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listener.bind(path)
    if processes == 1:
        serve(listener, control, None)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork():
        theirs.close()
        serve(listener, control, ours)
    ours.close()
    helper(listener, control, theirs)


if __name__ == "__main__":
    main()
