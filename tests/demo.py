"""`make demo`: the way of one loop device into a sandbox and back, on this machine's kernel, as a transcript.

Installs loopd into a temporary directory, starts it by socket activation, and plays a client in a container: a
user without any privilege, with network, mount, pid and ipc namespaces and a /dev of its own. Nothing of the
host's configuration is touched; whatever fails, or stays behind, makes the exit status 1.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

TREE = Path(__file__).resolve().parent.parent
NOBODY = "65534"

# Its /dev is a tmpfs without nodev, as Docker's and Podman's is; the directory of the socket is bound in.
CONTAINER = """
mount -t tmpfs -o mode=1777,nosuid tmpfs /dev
mknod -m 666 /dev/null c 1 3
mknod -m 666 /dev/urandom c 1 9
mount -t tmpfs tmpfs /run
mkdir /run/loopd
mount --bind "$1" /run/loopd
mount -o remount,bind,ro /run/loopd
echo ready
exec sleep infinity
"""
UNPRIVILEGED = [
    "setpriv",
    f"--reuid={NOBODY}",
    f"--regid={NOBODY}",
    "--clear-groups",
    "--bounding-set=-all",
    "--no-new-privs",
]


class Failed(Exception):
    """A step did not do what it should."""


def say(text: str = "") -> None:
    print(text, flush=True)


def step(prompt: str, shown: str, command: list[str], expect: str = "") -> str:
    """Run one step and show it; returns its output."""
    say(f"{prompt} {shown}")
    done = subprocess.run(
        command,
        check=False,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )
    for line in done.stdout.splitlines():
        say(f"    {line}")
    if done.returncode != 0:
        raise Failed(f"exit status {done.returncode}")
    if expect not in done.stdout:
        raise Failed(f"{expect!r} was expected in the output")
    return done.stdout


def until(condition: Callable[[], bool], what: str, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise Failed(f"{what}: not within {seconds:.0f} seconds")
        time.sleep(0.02)


@contextlib.contextmanager
def ended(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """The process, ended at the end of the block."""
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Demo:
    """One run in the temporary directory `base`."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.socket = base / "run/loopd.sock"
        self.log = base / "log"
        self.started = int(time.time())
        self.before = devices()
        self.sandbox = 0

    def host(self, command: str, expect: str = "") -> str:
        return step(
            "host#",
            command.replace(f"={self.base}/", "=$PWD/").replace(f"{self.base}/", ""),
            ["sh", "-c", f"cd {self.base} && {command}"],
            expect,
        )

    def container(self, command: str, expect: str = "") -> str:
        enter = ["nsenter", f"--target={self.sandbox}", "--mount", "--root", "--net", "--ipc", "--uts"]
        enter.append(f"--pid=/proc/{self.sandbox}/ns/pid_for_children")
        path = f"{self.base}/usr/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        inside = ["env", "-i", f"--chdir={self.base}/work", f"PATH={path}", "sh", "-c", command]
        return step("  container$", command, [*enter, *UNPRIVILEGED, *inside], expect)

    def daemon(self) -> subprocess.Popen[str]:
        """systemd's part: hold the socket, start the daemon with the first datagram."""
        loopd = [str(self.base / "usr/sbin/loopd"), f"--state-directory={self.base}/state"]
        command = ["systemd-socket-activate", "--datagram", f"--listen={self.socket}", *loopd]
        say("host# " + shlex.join(command).replace(f"{self.base}/", ""))
        with self.log.open("w") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, text=True)
        until(self.socket.is_socket, "the socket is there")
        self.socket.chmod(0o666)
        return process

    def enter(self) -> subprocess.Popen[str]:
        namespaces = ["--mount", "--net", "--ipc", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        command = ["unshare", *namespaces, "sh", "-ec", CONTAINER, "sh", str(self.socket.parent)]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise Failed("the container could not be made; see above")
        self.sandbox = process.pid
        return process

    def audit(self, device: str, event: str) -> None:
        """Show the record of that event: the journal's where there is one, else what the daemon wrote."""
        command = f"""grep "LOOPD_EVENT='{event}'.*{device}" log | sed 's/ LOOPD_/\\n&/g'"""
        if os.path.exists("/run/systemd/journal/socket"):
            match = f"--since=@{self.started} LOOPD_EVENT={event} LOOPD_DEVICE={device}"
            command = f"journalctl --quiet --output=verbose {match} | grep -E 'MESSAGE=|LOOPD_'"

        def recorded() -> bool:
            done = subprocess.run(
                ["sh", "-c", f"cd {self.base} && {command}"], check=False, capture_output=True, text=True
            )
            return device in done.stdout

        until(recorded, f"the record that {device} was {event}")
        self.host(command, NOBODY)

    def play(self) -> str:
        """The whole of it; returns the device's name."""
        (self.base / "run").mkdir()
        (self.base / "work").mkdir()
        os.chown(self.base / "work", int(NOBODY), int(NOBODY))
        self.host(f"make -s -C {TREE} install DESTDIR=/ PREFIX={self.base}/usr MANUAL=")
        with contextlib.ExitStack() as stack:
            daemon = stack.enter_context(ended(self.daemon()))
            stack.enter_context(ended(self.enter()))

            say("\nA container: nobody's uid, no capability, no loop device, no network, a /dev of its own.")
            self.container(
                "id -u; grep CapBnd /proc/self/status; ls /dev", "CapBnd:\t0000000000000000\nnull\nurandom\n"
            )
            self.container(
                "truncate --size=64M disk.img && mkdir files && echo 'hello from the container' >files/hello"
            )

            say("\nIt asks loopd, which starts now, for a loop device, and makes a file system on it.")
            path = self.container("loopctl attach disk.img").split()[-1]
            device = path.removeprefix("/dev/")
            self.container(f"ls -ln {path}", f"brw------- 1 {NOBODY} {NOBODY} 7, ")
            self.container(f"mke2fs -q -t ext4 -L demo -d files {path} && e2fsck -fn {path}", "\ndemo: ")
            self.container(f"debugfs -R 'cat hello' {path}", "hello from the container")
            self.container("loopctl list", device)

            say("\nThe host knows who has it.")
            self.host(f"cat /sys/block/{device}/loop/backing_file", "disk.img")
            self.audit(device, "attached")

            say("\nIt gives the device back, and the file has what was written.")
            self.container(f"loopctl detach --wait 10 {path} && ls /dev", "null\nurandom\n")
            self.audit(device, "detached")
            self.host("debugfs -R 'cat hello' work/disk.img", "hello from the container")

            daemon.terminate()
            if daemon.wait(15) != 0:
                raise Failed(f"loopd ended with status {daemon.returncode}")
        return device


def devices() -> set[str]:
    return {path.name for path in Path("/sys/block").glob("loop*")}


def leftovers(base: Path, before: set[str], device: str) -> list[str]:
    """What is still there of a run; `before` are the devices that were there before it."""
    found = [f"mount: {line}" for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(base) in line]
    for attribute in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            if str(base) in (text := attribute.read_text()):
                found.append(f"{attribute}: {text}")
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(base) in (text := command.read_text().replace("\0", " ")):
                found.append(f"process: {text}")
    # Numbers are taken in blocks of 64, some ahead of need.
    first = int(device.removeprefix("loop")) // 64 * 64 if device else 0
    block = {f"loop{number}" for number in range(first, first + 64)} if device else set()
    return found + [f"/sys/block/{name}" for name in sorted(block & devices() - before)]


def main() -> int:
    if os.geteuid() != 0:
        say("The demo binds a real loop device, which needs root: sudo make demo")
        return 1
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    base = Path(tempfile.mkdtemp(prefix="loopd-demo-", dir="/tmp"))  # $TMPDIR may be closed to nobody
    base.chmod(0o755)
    demo, device = Demo(base), ""
    try:
        device = demo.play()
        until(lambda: not leftovers(base, demo.before, device), "nothing is left behind")
    except (Failed, OSError, subprocess.TimeoutExpired) as error:
        say(f"\nFAILED: {error}")
        for line in [
            *(demo.log.read_text().splitlines() if demo.log.exists() else []),
            *leftovers(base, demo.before, device),
        ]:
            say(f"    {line}")
        return 1
    finally:
        subprocess.run(["rm", "-rf", str(base)], check=True)
    say("\nNothing is left behind: no device, no node, no process, no mount, no file.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
