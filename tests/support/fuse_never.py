"""A FUSE file system that stops answering: a server on the bare /dev/fuse, and the test's handle on it.

As a program, `fuse_never.py MOUNTPOINT`: answers like any file system (one file, one directory) until it is told
something on its standard input; after that it reads every request, so that who waits for an answer cannot even be
killed, and answers none. Its end, at the latest that of its standard input, ends the connection, and with it every
wait. Owns the mount; nothing here knows of loopd. The protocol is that of <linux/fuse.h>, version 7.31.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import stat
import struct
import subprocess
import sys
import time
from pathlib import Path

_IN = struct.Struct("=IIQQIIIHH")  # len, opcode, unique, nodeid, uid, gid, pid, total_extlen, padding
_OUT = struct.Struct("=IiQ")  # len, error, unique
# major, minor, readahead, flags, background, congestion, max_write, granularity, pages, alignment, flags2
_INIT = struct.Struct("=IIIIHHIIHHI28x")
# ino, size, blocks, three times, their nanoseconds, mode, nlink, uid, gid, rdev, blksize, flags
_ATTR = struct.Struct("=6Q10I")
_ENTRY = struct.Struct("=QQQQII")  # nodeid, generation, entry_valid, attr_valid, and their nanoseconds
_ATTR_OUT = struct.Struct("=QII")  # attr_valid, its nanoseconds, padding
_OPENED = struct.Struct("=QII")  # fh, open_flags, padding

LOOKUP, FORGET, GETATTR, OPEN, RELEASE, FLUSH, INIT, OPENDIR, RELEASEDIR, INTERRUPT, BATCH_FORGET = (
    1, 2, 3, 14, 18, 25, 26, 27, 29, 36, 42,
)  # fmt: skip
SIZE = 1 << 20
VALID = 3600  # seconds for which the kernel may keep what it was told
_NODES = {1: stat.S_IFDIR | 0o777, 2: stat.S_IFREG | 0o666, 3: stat.S_IFDIR | 0o777}
_NAMES = {b"file": 2, b"directory": 3}

MS_NOSUID, MS_NODEV, MNT_DETACH = 2, 4, 2
_libc = ctypes.CDLL(None, use_errno=True)


def _attr(node: int) -> bytes:
    return _ATTR.pack(node, SIZE, SIZE // 512, 0, 0, 0, 0, 0, 0, _NODES[node], 1, 0, 0, 0, 4096, 0)


def _answer(opcode: int, node: int, body: bytes) -> bytes | int:
    """The payload of an answer, or the errno."""
    if opcode == INIT:
        return _INIT.pack(7, 31, 65536, 0, 12, 9, 65536, 1, 0, 0, 0)
    if opcode == LOOKUP:
        found = _NAMES.get(body.rstrip(b"\0"))
        return _ENTRY.pack(found, 0, VALID, VALID, 0, 0) + _attr(found) if found else errno.ENOENT
    if opcode == GETATTR:
        return _ATTR_OUT.pack(VALID, 0, 0) + _attr(node)
    if opcode in (OPEN, OPENDIR):
        return _OPENED.pack(node, 0, 0)
    return b"" if opcode in (FLUSH, RELEASE, RELEASEDIR) else errno.ENOSYS


def _read(fd: int) -> bytes | None:
    """The next request; None when there is none, after all; empty when there will be no more."""
    try:
        return os.read(fd, 1 << 18)
    except OSError as error:
        if error.errno == errno.ENODEV:  # unmounted, or aborted
            return b""
        if error.errno in (errno.EAGAIN, errno.ENOENT):  # ENOENT: it was interrupted before it was read
            return None
        raise


def serve(mountpoint: str) -> None:
    """Mount and serve until the mount is gone; says when it is muted, and which close is not answered from then on."""
    muted = False
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    options = f"fd={fd},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
    if _libc.mount(b"loopd-test", os.fsencode(mountpoint), b"fuse", MS_NOSUID | MS_NODEV, options) < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"mount: {os.strerror(error)}")
    print("mounted", flush=True)
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    poll.register(sys.stdin, select.POLLIN)
    while True:
        ready = [number for number, _ in poll.poll()]
        if sys.stdin.fileno() in ready:
            if not os.read(sys.stdin.fileno(), 1):
                return
            muted = True
            print("muted", flush=True)
        request = _read(fd)
        if request is None:
            continue
        if not request:
            return
        _, opcode, unique, node, *_ = _IN.unpack_from(request)
        if muted and opcode == FLUSH:
            print("unanswered", flush=True)
        if muted or opcode in (FORGET, BATCH_FORGET, INTERRUPT):
            continue
        answer = _answer(opcode, node, request[_IN.size :])
        payload = answer if isinstance(answer, bytes) else b""
        header = _OUT.pack(_OUT.size + len(payload), 0 if isinstance(answer, bytes) else -answer, unique)
        with contextlib.suppress(FileNotFoundError):  # who asked was killed
            os.write(fd, header + payload)


class Never:
    """The file system, mounted, with fds of its file and its directory; it answers until `mute`."""

    def __init__(self, mountpoint: Path) -> None:
        """Raises OSError where FUSE cannot be mounted."""
        mountpoint.mkdir()
        self._mountpoint = mountpoint
        self._fds: list[int] = []
        command = [sys.executable, "-I", "-S", __file__, str(mountpoint)]
        self._server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
        )
        assert self._server.stdout is not None
        assert self._server.stderr is not None
        if self._server.stdout.readline() != b"mounted\n":
            message = self._server.stderr.read().decode().strip()
            self.end()
            raise OSError(message.rpartition("\n")[2])

    def directory(self) -> int:
        """Another open file description of the directory, as `file`."""
        return self._open("directory", os.O_RDONLY | os.O_DIRECTORY)

    def _open(self, name: str, flags: int) -> int:
        self._fds.append(os.open(self._mountpoint / name, flags | os.O_CLOEXEC))
        return self._fds[-1]

    def file(self) -> int:
        """Another open file description of the file, to be asked for before `mute`, which closes it."""
        return self._open("file", os.O_RDWR)

    def mute(self) -> None:
        """Close the fds that were given out, and answer nothing from then on.

        In that order: who holds one hangs when it closes it, at the latest when it ends. What was sent stays open.
        """
        self._close()
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(b"x")
        assert self._server.stdout.readline() == b"muted\n"

    def hanging(self, count: int) -> None:
        """Wait until so many more processes hang in closing the file, beyond the reach of signals."""
        assert self._server.stdout is not None
        for _ in range(count):
            assert self._server.stdout.readline() == b"unanswered\n"

    def _close(self) -> None:
        for fd in self._fds:
            with contextlib.suppress(OSError):
                os.close(fd)
        self._fds = []

    def end(self) -> None:
        """End every wait by the end of the server, whose fd is the connection, and unmount; can be called twice."""
        self._server.kill()
        self._server.wait()
        for stream in (self._server.stdin, self._server.stdout, self._server.stderr):
            assert stream is not None
            stream.close()
        self._close()  # not before: closing asks the file system
        deadline = time.monotonic() + 5
        while _libc.umount2(os.fsencode(self._mountpoint), MNT_DETACH) == 0 and time.monotonic() < deadline:
            pass


if __name__ == "__main__":
    serve(sys.argv[1])
