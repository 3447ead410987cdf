"""``loopctl`` as a process, against a scripted peer: what it prints, its exit codes, what becomes of its signals."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple, Sequence

import pytest
from support.scripted import DEADLINE, Loop, Peer, Request, loop, no_directory_of_loopd, no_fd_is_left, released
from test_client import LEASE, REPLY, ROOT

import loopd.client.api
from loopd.cli import loopctl as cli
from loopd.cli import values
from loopd.protocol import wire

__all__ = ["loop", "no_directory_of_loopd", "no_fd_is_left"]  # fixtures

GREETING = {"loopd": "0.1.0", "protocol": 1, "operations": ["attach", "list"], "limits": {"max_fds": 8}}
IN_USE = "is detached, but somebody still has it open"


class Result(NamedTuple):
    code: int
    out: str
    err: str


class Ctl:
    """Runs ``loopctl`` with the socket and a directory of the test."""

    def __init__(self, folder: Path) -> None:
        self.sock = folder / "loopd.sock"
        self.dev = folder / "dev"
        self.dev.mkdir()
        self.image = folder / "disk.img"
        self.image.write_bytes(bytes(4096))

    @contextlib.contextmanager
    def start(self, *arguments: object, before: Sequence[str] = (), **options: Any) -> Iterator[subprocess.Popen[str]]:
        """The process; it and its command are ended with the block."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "LOOPD_SOCKET": str(self.sock)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        argv = [*before, sys.executable, "-m", "loopd.cli", *map(str, arguments)]
        with subprocess.Popen(argv, env=environment, text=True, start_new_session=True, **pipes) as process:
            try:
                yield process
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

    def __call__(self, *arguments: object, **options: Any) -> Result:
        with self.start(*arguments, **options) as process:
            out, err = process.communicate(timeout=DEADLINE)
        return Result(process.returncode, out, err)


@pytest.fixture
def ctl(tmp_path: Path) -> Ctl:
    return Ctl(tmp_path)


def busy(request: Request) -> None:
    request.reply({"state": "busy"})


# attach -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("fd: the file is empty", "{image}: the file is empty"),
        ("dir_fd: proc is not allowed; dir_fd: nor sysfs", "DIR: proc is not allowed; DIR: nor sysfs"),
        ("sector_size: the administrator allows [512]", "--sector-size: the administrator allows [512]"),
        ("a limit: its offset: 5", "a limit: its offset: 5"),
        ("force: loop1 is another's", "loop1 is another's: --force ends it too"),
    ],
)
def test_a_refusal_has_the_words_of_the_command_line(ctl: Ctl, loop: Loop, said: str, shown: str) -> None:
    with Peer(ctl.sock, lambda request: request.reply({"error": {"code": "malformed", "message": said}})):
        result = ctl("attach", loop.image, "-d", ctl.dev)
    assert (result.out, result.err, result.code) == ("", f"loopctl: {shown.format(image=loop.image)}\n", 1)


def test_attach_prints_the_path_and_keeps_the_device(ctl: Ctl, loop: Loop) -> None:
    def step(request: Request) -> None:
        assert request.fdinfo("lease_fd") == "1"
        loop.deliver(request)

    loop.reply["warnings"] = ["no direct I/O:\n\x1b[2Jtmpfs"]
    with Peer(ctl.sock, step):
        result = ctl("attach", loop.image, "-d", ctl.dev)
    assert result.out == f"{ctl.dev / loop.reply['devname']}\n"
    assert result.err == "loopctl: warning: no direct I/O:\\n\\x1b[2Jtmpfs\n"
    assert result.code == 0


def test_a_path_is_printed_as_the_bytes_that_it_is(ctl: Ctl, loop: Loop) -> None:
    ctl.dev = ctl.dev / os.fsdecode(b"b\xe4u")
    ctl.dev.mkdir()
    with Peer(ctl.sock, loop.deliver):
        # What a locale such as en_US.UTF-8 makes of standard output, and C.UTF-8 does not.
        strict = ["env", "PYTHONIOENCODING=utf-8:strict"]
        result = ctl("attach", loop.image, "-d", ctl.dev, before=strict, errors="surrogateescape")
    assert (result.out, result.err, result.code) == (f"{ctl.dev / loop.reply['devname']}\n", "", 0)


def test_an_image_whose_name_begins_with_a_dash(ctl: Ctl) -> None:
    image = ctl.image.rename(ctl.image.with_name("-w.img"))
    with Peer(ctl.sock, *[lambda request: request.refuse("quota", "none left")] * 3):
        for words in (["-d", ctl.dev, "--"], ["--json", "--"], ["--"]):
            result = ctl("attach", *words, image.name, cwd=image.parent)
            assert (result.err.splitlines()[0], result.code) == ("loopctl: none left", 1), words


def test_attach_in_json(ctl: Ctl, loop: Loop) -> None:
    with Peer(ctl.sock, loop.deliver):
        result = ctl("attach", loop.image, "-d", ctl.dev, "--json")
    path = str(ctl.dev / loop.reply["devname"])
    assert json.loads(result.out) == {"path": path, **loop.reply, "partitions": [], "warnings": []}


def test_every_option_reaches_the_wire(ctl: Ctl) -> None:
    expected: dict[str, object] = {
        "offset": 1 << 20,
        "sizelimit": 2_000_000,
        "sector_size": 4096,
        "read_only": True,
        "partscan": True,
        "lock": True,
        "direct_io": "off",
        "ref": "mine",
    }

    def step(request: Request) -> None:
        assert {name: request.fields[name] for name in expected} == expected
        request.refuse("quota", "8 devices are held, as many as may be")

    with Peer(ctl.sock, step, step):
        short = ["-d", ctl.dev, "-o", "1M", "--sizelimit", "2MB", "-b", "4K", "-r", "-P"]
        result = ctl("attach", *short, "--direct-io", "off", "--lock", "--ref", "mine", ctl.image)
        assert result.code == 1
        assert result.out == ""
        first, second = result.err.splitlines()
        assert first == "loopctl: 8 devices are held, as many as may be"
        assert "loopctl detach" in second

        long = [f"--directory={ctl.dev}", "--offset=1MiB", "--sizelimit=2000000", "--sector-size=4096"]
        flags = ["--read-only", "--partscan", "--direct-io=off", "--lock", "--ref=mine"]
        assert ctl("run", ctl.image, *long, *flags, "--", "true").code == 1


@pytest.mark.parametrize("lifetime", ["container", "detach", "parent", "pid"])
def test_the_lifetimes(ctl: Ctl, loop: Loop, lifetime: str) -> None:
    expected = {"container": 1, "detach": 1, "parent": os.getpid(), "pid": os.getppid()}[lifetime]

    def step(request: Request) -> None:
        assert request.fdinfo("lease_fd") == str(expected)
        loop.deliver(request)

    with Peer(ctl.sock, step):
        value = expected if lifetime == "pid" else lifetime
        result = ctl("attach", loop.image, "-d", ctl.dev, "--lifetime", value)
    assert result.code == 0


def test_a_process_that_is_not_there(ctl: Ctl) -> None:
    pid = 2**22 + 1  # more than pid_max can be
    result = ctl("attach", ctl.image, "-d", ctl.dev, "--lifetime", pid)
    assert result == (1, "", f"loopctl: process {pid}: No such process\n")


@pytest.mark.parametrize("stdout", ["full", "closed"])
def test_a_device_whose_path_cannot_be_printed_is_detached(ctl: Ctl, loop: Loop, stdout: str) -> None:
    with Peer(ctl.sock, loop.deliver, released) as peer, open("/dev/full", "w") as full:
        options: dict[str, Any] = {"stdout": full}
        if stdout == "closed":
            options = {"stdout": None, "preexec_fn": lambda: os.close(1)}
        result = ctl("attach", loop.image, "-d", ctl.dev, **options)
    assert result.code == 1
    assert "standard output" in result.err
    assert len(result.err.splitlines()) == 1
    assert peer.requests[1].fields["op"] == "detach"
    assert loop.image.read_bytes().startswith(b"loopd\0")  # where fd 1 is closed, the image may be it


def test_a_device_whose_warning_cannot_be_printed_is_detached(ctl: Ctl, loop: Loop) -> None:
    loop.reply["warnings"] = ["no direct I/O"]
    with Peer(ctl.sock, loop.deliver, released) as peer, open("/dev/full", "w") as full:
        assert ctl("attach", loop.image, "-d", ctl.dev, stderr=full).code == 1
    assert peer.requests[1].fields["op"] == "detach"


def test_a_node_that_cannot_be_opened_is_explained(ctl: Ctl) -> None:
    with Peer(ctl.sock, lambda request: request.reply(REPLY), released):
        result = ctl("attach", ctl.image, "-d", ctl.dev)
    assert result.code == 1
    first, second = result.err.splitlines()
    assert first == f"loopctl: {ctl.dev}/loop4096 cannot be opened: No such file or directory"
    assert second == "loopctl: `loopctl list` shows whether it is still attached"


def test_files_that_are_missing_are_named(ctl: Ctl) -> None:
    assert ctl("attach", "/missing.img") == (1, "", "loopctl: /missing.img: No such file or directory\n")
    result = ctl("attach", ctl.image, "-d", "/missing")
    assert result == (1, "", "loopctl: /missing: No such file or directory\n")
    result = ctl("--socket", "/missing.sock", "list")
    assert result.code == 1
    first, second = result.err.splitlines()
    assert first == "loopctl: cannot ask loopd at /missing.sock: No such file or directory"
    assert "loopd.socket" in second


# run --------------------------------------------------------------------------------------------------------


def test_run_puts_the_device_into_the_command(ctl: Ctl, loop: Loop) -> None:
    def detached(request: Request) -> None:
        assert request.fields["wait"] > 0
        released(request)

    path = str(ctl.dev / loop.reply["devname"])
    report = "ls /proc/self/fd | wc -l; grep SigIgn: /proc/self/status"
    script = f'printf "%s\\n" "$LOOPD_DEVICE" "$@"; head -c 5 "$1"; {report}; exit 7'
    with Peer(ctl.sock, loop.deliver, detached) as peer:
        result = ctl("run", loop.image, "-d", ctl.dev, "--", "sh", "-c", script, "--", "{}", "of={},{}", "--", "-r")
        assert "lease_fd" not in peer.requests[0].fields
    assert result.out.split("\n")[:5] == [path, path, f"of={path},{path}", "--", "-r"]
    assert result.out.split("\n")[5] == "loopd4"  # no fd of loopctl's: 0, 1, 2, and that of ls
    ignored = int(result.out.split()[-1], 16)
    assert not ignored & (1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1)  # which Python ignores
    assert result.code == 7


@pytest.mark.parametrize(
    ("command", "code"),
    [(["true"], 0), (["false"], 1), (["sh", "-c", "kill -9 $$"], 137), (["/missing"], 127), (["/etc"], 126)],
)
def test_run_exits_as_the_command(ctl: Ctl, loop: Loop, command: list[str], code: int) -> None:
    with Peer(ctl.sock, loop.deliver, released):
        assert ctl("run", loop.image, "-d", ctl.dev, "--", *command).code == code


def test_what_helps_is_said(ctl: Ctl) -> None:
    """Where a directory is given for an image, and where there is no administrator's socket."""
    assert "expected an image" in ctl("attach", ctl.dev).err
    if not os.path.exists(loopd.client.api.ADMIN_SOCKET):
        assert "loopd-admin.socket" in ctl("--admin", "list").err


def test_an_image_that_no_device_has(ctl: Ctl) -> None:
    with Peer(ctl.sock, *[lambda request: request.reply({"leases": [LEASE]})] * 2):
        for image in (ctl.image, "missing.img"):
            first, second = ctl("detach", image).err.splitlines()
            assert first == f"loopctl: {image} is the image of no device here"
            assert "`loopctl list`" in second


@pytest.mark.parametrize("verb", ["rescan", "resize"])
def test_an_image_is_no_device(ctl: Ctl, verb: str) -> None:
    """It is what one has at hand, and the list is where its device is found."""
    result = ctl(verb, ctl.image)
    assert result.code == 2
    assert "expected a device, as /dev/loop4096 or loop4096" in result.err
    assert "`loopctl list`" in result.err


def test_run_without_the_two_dashes(ctl: Ctl) -> None:
    result = ctl("run", ctl.image, "mkfs.ext4", "-q", "{}")
    assert (result.code, "expected -- and a command" in result.err) == (2, True)
    assert ctl("run", "--help").code == 0


def test_a_device_that_is_read_only_unasked(ctl: Ctl, loop: Loop) -> None:
    """An image that this user may only read: what makes a file system would complain of the device."""
    loop.reply["read_only"] = True
    with Peer(ctl.sock, loop.deliver, released, loop.deliver, released):
        result = ctl("run", loop.image, "-d", ctl.dev, "--", "true")
        assert (result.code, "cannot be written here" in result.err) == (0, True)
        (ctl.dev / loop.reply["devname"]).unlink()
        assert ctl("run", "-r", loop.image, "-d", ctl.dev, "--", "true").err == ""


@pytest.mark.parametrize(
    ("options", "left"),
    [([], 100), (["-b", "4096"], 612), (["-o", "612"], 0), (["--sizelimit", "1024"], 0), (["--sizelimit", "1030"], 6)],
)
def test_an_end_of_the_image_that_fills_no_sector(ctl: Ctl, loop: Loop, options: list[str], left: int) -> None:
    ctl.image.write_bytes(bytes(4096 + 612))
    said = f"loopctl: warning: {ctl.image}: the last {left} bytes fill no sector of {512 if left < 512 else 4096}"
    with Peer(ctl.sock, loop.deliver):
        result = ctl("attach", ctl.image, "-d", ctl.dev, *options)
    assert (result.code, result.err) == (0, f"{said}, and are left out\n" if left else "")


def test_run_says_when_the_device_is_left_in_use(ctl: Ctl, loop: Loop) -> None:
    with Peer(ctl.sock, loop.deliver, busy, loop.deliver, busy):
        result = ctl("run", loop.image, "-d", ctl.dev, "--", "true")
        assert result.code == 1
        assert IN_USE in result.err
        (ctl.dev / loop.reply["devname"]).unlink()
        result = ctl("run", loop.image, "-d", ctl.dev, "--", "sh", "-c", "exit 3")
        assert result.code == 3
        assert IN_USE in result.err


def lost(request: Request) -> None:
    request.reply({"state": "released", "lost": "Input/output error"})


@pytest.mark.parametrize(("command", "code"), [("true", 1), ("exit 3", 3), ("kill -9 $$", 137)])
def test_run_says_what_the_image_lacks(ctl: Ctl, loop: Loop, command: str, code: int) -> None:
    with Peer(ctl.sock, loop.deliver, lost):
        result = ctl("run", loop.image, "-d", ctl.dev, "--", "sh", "-c", command)
    path = ctl.dev / loop.reply["devname"]
    said = f"loopctl: {path} is detached, but its image lacks what was written to it: Input/output error\n"
    assert result == (code, "", said)


def test_detach_says_what_the_image_lacks(ctl: Ctl) -> None:
    rows = {"leases": [dict(LEASE, devname="loop1"), dict(LEASE, devname="loop2")]}

    def lost_and_busy(request: Request) -> None:
        request.reply({"state": "busy", "lost": "Input/output error"})

    said = "is detached, but its image lacks what was written to it: Input/output error"
    with Peer(ctl.sock, lost, released, lambda request: request.reply(rows), lost_and_busy, lost, released):
        assert ctl("detach", "loop1", "loop2") == (1, "", f"loopctl: loop1 {said}\n")
        result = ctl("detach", "--all")  # that of the one in use is waited for all the same
    assert (result.code, result.out) == (1, "")
    assert result.err.splitlines() == [
        f"loopctl: loop1 {said}; and somebody still has it open",
        f"loopctl: loop2 {said}",
    ]


COUNTS = """
import os, signal, sys
seen = []
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    assert signal.getsignal(number) is not signal.SIG_IGN
    signal.signal(number, lambda number, _: seen.append(number))
assert signal.getsignal(signal.SIGCHLD) == signal.getsignal(signal.SIGQUIT) == signal.SIG_DFL
assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])
os.write(1, b"ready\\n")
while not seen:
    signal.pause()
import time
time.sleep(0.3)
print(len(seen), "times", *seen)
sys.exit(9)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_run_forwards_a_signal(ctl: Ctl, loop: Loop, number: signal.Signals) -> None:
    with Peer(ctl.sock, loop.deliver, released):
        with ctl.start("run", loop.image, "-d", ctl.dev, "--", sys.executable, "-c", COUNTS) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            process.send_signal(number)
            out, err = process.communicate(timeout=DEADLINE)
    assert (out, err) == (f"1 times {number.value}\n", "")
    assert process.returncode == 9


# The first terminal that the leader of a session opens is the session's.
CLAIM = "import os, sys; os.close(os.open(os.ttyname(0), os.O_RDWR)); os.execv(sys.argv[1], sys.argv[1:])"


def test_the_end_of_the_terminal_is_forwarded(ctl: Ctl, loop: Loop) -> None:
    """The kernel tells the leader of the session alone: loopctl, as with ``ssh -t HOST loopctl run``."""
    leader, terminal = pty.openpty()
    command = ["run", loop.image, "-d", ctl.dev, "--", sys.executable, "-c", COUNTS]
    with open(terminal), Peer(ctl.sock, loop.deliver, released):
        with ctl.start(*command, before=[sys.executable, "-c", CLAIM], stdin=terminal) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            os.close(leader)
            out, _ = process.communicate(timeout=DEADLINE)
    assert out == f"1 times {signal.SIGHUP.value}\n"


def test_a_ctrl_c_at_the_terminal_is_not_forwarded(ctl: Ctl, loop: Loop) -> None:
    """The terminal has sent it to the command too, if that is in the foreground; this one has left it."""
    counts = COUNTS.replace("seen = []", "seen = []; os.setpgid(0, 0)").replace("while not seen", "if False")
    command = ["run", loop.image, "-d", ctl.dev, "--", sys.executable, "-c", counts]
    leader, terminal = pty.openpty()
    try:
        with Peer(ctl.sock, loop.deliver, released):
            with ctl.start(*command, before=[sys.executable, "-c", CLAIM], stdin=terminal) as process:
                assert process.stdout is not None
                assert process.stdout.readline() == "ready\n"
                os.write(leader, b"\x03")
                out, _ = process.communicate(timeout=DEADLINE)
    finally:
        os.close(leader)
        os.close(terminal)
    assert out == "0 times\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_attaching_hangs_up(ctl: Ctl, number: signal.Signals) -> None:
    with Peer(ctl.sock, lambda request: None) as peer:
        with ctl.start("run", ctl.image, "-d", ctl.dev, "--", "true") as process:
            deadline = time.monotonic() + DEADLINE
            while not peer.requests and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.1)
            process.send_signal(number)
            _, err = process.communicate(timeout=DEADLINE)
        assert peer.hung_up()
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert err == ""


ENDING = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT]


def status_of(number: signal.Signals) -> int:
    return 130 if number == signal.SIGINT else -number


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def state_of(process: subprocess.Popen[str]) -> str:
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(") ")[2][0]


@pytest.mark.parametrize("number", ENDING)
def test_a_signal_takes_back_an_attach_that_is_not_answered(ctl: Ctl, number: signal.Signals) -> None:
    """At once; and from then on the daemon's answer fails, so that it undoes what it has done."""
    with Peer(ctl.sock, lambda request: None) as peer:
        with ctl.start("attach", ctl.image, "-d", ctl.dev) as process:
            wait_for(lambda: peer.requests)
            time.sleep(0.1)
            process.send_signal(number)
            assert process.communicate(timeout=DEADLINE) == ("", "")
        assert process.returncode == status_of(number)
        with pytest.raises(BrokenPipeError):
            peer.requests[0].reply(REPLY)


@pytest.mark.parametrize("number", ENDING)
def test_a_signal_after_the_answer_detaches(ctl: Ctl, loop: Loop, number: signal.Signals) -> None:
    """The answer is in the socket, and loopctl has not run since it came."""
    answered = threading.Event()

    def step(request: Request) -> None:
        wait_for(lambda: state_of(process) == "S")
        process.send_signal(signal.SIGSTOP)
        wait_for(lambda: state_of(process) == "T")
        loop.deliver(request)
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)
        answered.set()

    with Peer(ctl.sock, step, released) as peer:
        with ctl.start("attach", loop.image, "-d", ctl.dev) as process:
            assert process.communicate(timeout=DEADLINE) == ("", "")
    assert process.returncode == status_of(number)
    assert (peer.requests[1].fields["op"], peer.requests[1].fields["diskseq"]) == ("detach", 7)
    assert answered.is_set()


@pytest.mark.parametrize("number", ENDING)
def test_a_signal_before_the_name_is_printed_detaches(ctl: Ctl, loop: Loop, number: signal.Signals) -> None:
    """The name goes into a pipe that is full; what the detach has to tell is said."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))
    os.set_blocking(writer, True)
    try:
        with Peer(ctl.sock, loop.deliver, lost) as peer:
            with ctl.start("attach", loop.image, "-d", ctl.dev, stdout=writer) as process:
                wait_for(lambda: peer.requests and "pipe" in Path(f"/proc/{process.pid}/wchan").read_text())
                process.send_signal(number)
                _, err = process.communicate(timeout=DEADLINE)
        assert process.returncode == status_of(number)
        assert peer.requests[1].fields["op"] == "detach"
        assert "its image lacks what was written to it: Input/output error" in err
    finally:
        os.close(reader)
        os.close(writer)


def test_a_signal_while_the_queue_is_full(ctl: Ctl) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(ctl.sock))
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as filler:
            filler.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    filler.sendto(b"{}", str(ctl.sock))
        with ctl.start("attach", ctl.image, "-d", ctl.dev) as process:
            wait_for(lambda: "poll" in Path(f"/proc/{process.pid}/wchan").read_text())
            process.send_signal(signal.SIGTERM)
            assert process.communicate(timeout=DEADLINE) == ("", "")
    assert process.returncode == -signal.SIGTERM


def test_a_signal_that_is_ignored_stays_so(ctl: Ctl, loop: Loop) -> None:
    """As nohup has it."""

    def step(request: Request) -> None:
        process.send_signal(signal.SIGHUP)
        time.sleep(0.1)
        loop.deliver(request)

    with Peer(ctl.sock, step):
        with ctl.start("attach", loop.image, "-d", ctl.dev, before=["nohup"], stdin=subprocess.DEVNULL) as process:
            out, err = process.communicate(timeout=DEADLINE)
    assert (process.returncode, out, err) == (0, f"{ctl.dev / loop.reply['devname']}\n", "")


def test_an_answer_that_is_too_late_is_none(ctl: Ctl) -> None:
    """Else a device would be left that nobody knows of: the daemon's answer fails, and it undoes the attach."""
    with Peer(ctl.sock, lambda request: None) as peer:
        result = ctl("--timeout", "0.2", "attach", ctl.image, "-d", ctl.dev)
        assert "no answer" in result.err
        with pytest.raises(BrokenPipeError):
            peer.requests[0].reply(REPLY)


def test_the_device_ends_with_loopctl(ctl: Ctl, loop: Loop) -> None:
    with Peer(ctl.sock, loop.deliver) as peer:
        with ctl.start("run", loop.image, "-d", ctl.dev, "--", "sh", "-c", "echo $$; exec sleep 30") as process:
            assert process.stdout is not None
            command = int(process.stdout.readline())
            assert not peer.hung_up()
            process.kill()
            process.wait()
            assert peer.hung_up()  # while the command lives
            os.kill(command, 0)


# detach, list, hello ----------------------------------------------------------------------------------------


def test_detach_is_silent_and_goes_on_after_a_failure(ctl: Ctl) -> None:
    names = []

    def step(request: Request) -> None:
        names.append((request.fields["devname"], request.fields["wait"]))
        (released, busy, lambda r: r.refuse("not-found", "no lease loop3"), released)[len(names) - 1](request)

    with Peer(ctl.sock, step, step, step, step):
        assert ctl("detach", "/dev/loop1") == (0, "", "")
        result = ctl("detach", "--wait", "2", "loop2", "loop3", "/dev/loopd/loop4")
    assert names == [("loop1", 10), ("loop2", 2), ("loop3", 2), ("loop4", 2)]
    assert (result.code, result.out) == (1, "")
    assert result.err.splitlines() == [
        f"loopctl: loop2 {IN_USE}",
        "loopctl: unmount its file systems and end what has it open",
        "loopctl: no lease loop3",
        "loopctl: `loopctl list` shows the devices that are held",
    ]


def test_detach_by_force(ctl: Ctl) -> None:
    def step(request: Request) -> None:
        assert request.fields["force"] is True
        released(request)

    with Peer(ctl.sock, step):
        assert ctl("--socket", ctl.sock, "detach", "--force", "loop1").code == 0
    assert ctl("detach", "--force", "loop1").code == 2


def test_list_is_a_table_that_nobodys_file_name_can_forge(ctl: Ctl) -> None:
    row = dict(LEASE, size=3 << 29, read_only=True, age=93784.0, lease="pidfd of 1", backing_file="/a\n\x1b[31mloop")
    mine = {"leases": [LEASE, dict(row, devname="loop10000")]}
    theirs = dict(LEASE, devname="loop7777777", account="/a.scope", unit="b.scope", uid=1000, pid=7)
    pages = iter([mine, {"leases": [theirs]}, GREETING, {"leases": []}])
    with Peer(ctl.sock, *[lambda request: request.reply(next(pages))] * 4):
        result = ctl("list")
        assert result.out.splitlines() == [
            "NAME       SIZE  RO  DIO  SECTOR  AGE  STATE     LEASE       BACK-FILE",
            "loop4096   4K    0   0    512     3s   attached  pidfd 1     /disk.img",
            "loop10000  1.5G  1   0    512     1d   attached  pidfd of 1  /a\\n\\x1b[31mloop",
        ]
        header, line = ctl("list").out.splitlines()
        assert header.split()[4:] == ["LEASE", "UID", "PID", "UNIT", "OPEN-IN", "BACK-FILE"]
        assert line.split()[6:] == ["1000", "7", "b.scope", "-", "/disk.img"]
        assert ctl("list") == (0, "", "")


def test_the_admins_list_is_no_wider_than_a_screen_and_its_file(ctl: Ctl) -> None:
    container = f"libpod-{'0123456789abcdef' * 4}.scope"
    account = f"/user.slice/user-1000.slice/user@1000.service/user.slice/{container}"
    file = f"/{'directory/' * 20}disk.img"
    theirs = dict(LEASE, devname="loop1048575", size=3 << 29, state="releasing", lease="pidfd", backing_file=file)
    page = {"leases": [dict(theirs, uid=100000, pid=4194304, account=account, unit=container)]}
    pages = iter([page, GREETING, page, page, GREETING])
    with Peer(ctl.sock, *[lambda request: request.reply(next(pages))] * 5):
        header, line = ctl("list").out.splitlines()
        assert line.index(file) == header.index("BACK-FILE") < 100
        assert "  libpod-012345...ef.scope  " in line
        assert line.endswith(file)
        assert ctl("list", "-o", "unit,owner").out.splitlines()[1].split() == [container, account]
        assert ctl("list", "--noheadings", "--output=all").out.split()[-2:] == ["-", file]


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        (["-o", "NAME,ref"], ["NAME      REF", "loop4096  -", "loop4097  mine"]),
        (["-n", "-o", "REF,NAME"], ["-     loop4096", "mine  loop4097"]),
        (["--noheadings", "--output", "OFFSET, SIZELIMIT"], ["0  0", "0  0"]),
        (["-n", "-o", "name"], ["loop4096", "loop4097"]),
    ],
)
def test_the_columns_that_are_asked_for(ctl: Ctl, options: list[str], lines: list[str]) -> None:
    rows = [LEASE, dict(LEASE, devname="loop4097", ref="mine")]
    with Peer(ctl.sock, lambda request: request.reply({"leases": rows})):
        assert ctl("list", *options).out.splitlines() == lines


def test_a_name_that_the_locale_has_no_characters_for_hides_no_device(ctl: Ctl) -> None:
    named = dict(LEASE, devname="loop10", backing_file="/\u0436.img")
    with Peer(ctl.sock, lambda request: request.reply({"leases": [named, LEASE]})):
        lines = ctl("list", before=("env", "PYTHONIOENCODING=latin-1")).out.splitlines()
    assert [line.split()[-1] for line in lines] == ["BACK-FILE", r"/\u0436.img", "/disk.img"]


def test_list_of_everybodys_devices_says_who_has_them_open(ctl: Ctl, loop: Loop) -> None:
    """Whatever named the administrator's socket."""
    pages = iter([{"leases": [{**LEASE, **loop.reply, "account": "/a.scope"}]}, GREETING])
    # No child of this process, which is the daemon here: its helpers are left out.
    script = 'sleep 60 <"$0" & echo $!; read _; kill $!'
    with subprocess.Popen(["sh", "-c", script, loop.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        pid = int(holder.stdout.readline())
        with Peer(ctl.sock, *[lambda request: request.reply(next(pages))] * 2):
            assert f"[{pid}]" in ctl("--socket", ctl.sock, "list").out
        holder.stdin.close()


def test_detach_all(ctl: Ctl) -> None:
    """All at once first, then the wait for those that are in use; one that is gone by itself is no failure."""
    asked = []

    def step(request: Request) -> None:
        assert request.fields["diskseq"] == 7
        asked.append((request.fields["devname"], request.fields.get("wait", 0) > 0))
        if request.fields["devname"] == "loop2":
            busy(request)
        elif request.fields["devname"] == "loop3":
            request.refuse("not-found")
        else:
            released(request)

    leases = [dict(LEASE, devname=f"loop{number}") for number in (1, 2, 3)]
    pages = iter([leases, []])

    def listed(request: Request) -> None:
        request.reply({"leases": next(pages)})

    with Peer(ctl.sock, listed, *[step] * 4, listed):
        result = ctl("detach", "--all", "--wait", "1")
        assert ctl("detach", "--all") == (0, "", "")
    assert asked == [("loop1", False), ("loop2", False), ("loop3", False), ("loop2", True)]
    assert (result.code, result.out) == (1, "")
    assert result.err.splitlines()[0] == f"loopctl: loop2 {IN_USE}"


def test_directory(ctl: Ctl) -> None:
    def step(request: Request) -> None:
        assert request.fields.get("remove", False) is (len(peer.requests) == 2)
        request.reply({"path": "/run/loopd-dev/0-build"})

    with Peer(ctl.sock, step, step) as peer:
        assert ctl("directory", "build") == (0, "/run/loopd-dev/0-build\n", "")
        assert ctl("directory", "build", "--remove") == (0, "", "")


def test_a_directory_with_its_numbers(ctl: Ctl) -> None:
    granted = {"path": "/run/loopd-dev/0-build", "numbers": [4096, 4097, 4160], "remade": False}

    def step(request: Request) -> None:
        assert request.fields.get("devices") == (3 if len(peer.requests) == 1 else None)
        request.reply(granted if len(peer.requests) < 3 else {"path": granted["path"]})

    with Peer(ctl.sock, step, step, step) as peer:
        assert ctl("directory", "--devices", "3", "build") == (0, "/run/loopd-dev/0-build\n", "")
        assert json.loads(ctl("directory", "--json", "build").out) == granted
        # An earlier loopd says no more.
        assert json.loads(ctl("directory", "--json", "build").out) == {"path": granted["path"], "numbers": []}


def test_directories(ctl: Ctl) -> None:
    rows = [
        {"name": "build", "uid": 0, "path": "/run/loopd-dev/0-build", "numbers": [4096, 4097, 4160], "in_use": 1},
        {"name": "a-b", "uid": 1000, "path": "/run/loopd-dev/1000-a-b", "numbers": [], "in_use": 0},
    ]

    def page(request: Request) -> None:
        assert request.fields["op"] == "directories"
        first = request.fields.get("after", "") == ""
        assert first or request.fields["after"] == "0-build"
        request.reply({"directories": rows[:1] if first else rows[1:], "more": first})

    with Peer(ctl.sock, page, page, page, page, lambda request: request.reply({"directories": [], "more": False})):
        result = ctl("directory")
        assert (result.code, result.err) == (0, "")
        assert result.out.splitlines() == [
            "NAME   UID   DEVICES  IN-USE  NUMBERS         PATH",
            "build  0     3        1       4096-4097,4160  /run/loopd-dev/0-build",
            "a-b    1000  0        0       -               /run/loopd-dev/1000-a-b",
        ]
        assert json.loads(ctl("directory", "--json").out) == {"directories": rows}
        assert ctl("directory") == (0, "", "")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--remove"], "expected the NAME of the directory"),
        (["--devices", "4"], "expected the NAME of the directory"),
        (["build", "--remove", "--devices", "4"], "--remove goes with neither --devices nor --json"),
        (["build", "--remove", "--json"], "--remove goes with neither --devices nor --json"),
        *((["build", "--devices", word], f"expected 1 to 64, not {word!r}") for word in ("0", "65", "x", "1.5", "")),
    ],
)
def test_a_wrong_command_line_about_directories(ctl: Ctl, words: list[str], said: str) -> None:
    result = ctl("directory", *words)
    assert (result.code, result.out) == (2, "")
    assert said in result.err


def test_rescan_prints_paths_and_resize_bytes(ctl: Ctl, loop: Loop) -> None:
    name = os.path.basename(loop.path)
    partitions = [f"{name}p1", f"{name}p2"]
    steps = [lambda request: request.reply({"partitions": partitions})] * 2
    steps += [
        lambda request: request.reply({"partitions": []}),
        lambda request: request.reply({"size": 1 << 40}),
    ]
    with Peer(ctl.sock, *steps):
        assert ctl("rescan", f"{ctl.dev}/{name}").out == "".join(f"{ctl.dev}/{part}\n" for part in partitions)
        assert ctl("rescan", name).out == "".join(f"/dev/{part}\n" for part in partitions)
        assert ctl("rescan", name) == (0, "", "")
        assert ctl("resize", name) == (0, f"{1 << 40}\n", "")


@pytest.mark.parametrize("deliver", ["node", "mount", "fd"])
def test_a_delivery_that_is_asked_for(ctl: Ctl, deliver: str) -> None:
    def step(request: Request) -> None:
        assert request.fields.get("deliver", ["node"]) == [deliver]
        assert ("dir_fd" in request.fields) is (deliver == "node")
        request.refuse("undeliverable", "not here")

    with Peer(ctl.sock, step):
        result = ctl("attach", "-d", ctl.dev, "--deliver", deliver, ctl.image)
    assert (result.code, result.out) == (1, "")
    assert result.err.splitlines() == ["loopctl: not here", "loopctl: `loopctl doctor` tells what would help"]


def test_an_fd_is_of_no_use_after_the_end_of_loopctl(ctl: Ctl, loop: Loop) -> None:
    """Where the device has no node, or the node of its name is another's, the device is detached again."""

    def step(request: Request) -> None:
        with open(loop.path, "r+b", buffering=0) as file:
            request.reply(dict(loop.reply, devname="loop7777777"), [file.fileno()])

    with Peer(ctl.sock, step, released):
        result = ctl("attach", "--deliver", "fd", loop.image)
    assert (result.code, result.out) == (1, "")
    assert "use `loopctl run`" in result.err


def test_list_in_json(ctl: Ctl) -> None:
    with Peer(ctl.sock, lambda request: request.reply({"leases": [LEASE]})):
        result = ctl("list", "--json")
    said = {"partitions": [], "backing_file_at_attach": LEASE["backing_file"]}
    assert json.loads(result.out) == {"leases": [{**LEASE, **said}]}


def test_list_into_a_pipe_that_is_closed(ctl: Ctl) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        with Peer(ctl.sock, lambda request: request.reply({"leases": [LEASE]})):
            result = ctl("list", stdout=writer)
        assert (result.code, result.err) == (1, "loopctl: standard output: Broken pipe\n")
    finally:
        os.close(writer)


def test_hello(ctl: Ctl) -> None:
    with Peer(ctl.sock, *[lambda request: request.reply(GREETING)] * 2):
        assert ctl("hello").out == "loopd 0.1.0, protocol 1\noperations: attach list\nmax_fds: 8\n"
        assert json.loads(ctl("hello", "--json").out) == GREETING


# The command line -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("socket", ["--socket {} list", "list --socket {}", "list --socket={}"])
def test_the_common_options_stand_before_or_behind_the_verb(ctl: Ctl, socket: str) -> None:
    other = ctl.sock.with_name("other.sock")
    with Peer(other, lambda request: request.reply({"leases": []})):
        assert ctl(*socket.format(other).split()) == (0, "", "")


def test_the_timeout(ctl: Ctl) -> None:
    start = time.monotonic()
    with Peer(ctl.sock, lambda request: None):
        result = ctl("--timeout", "0.2", "list")
    assert result.code == 1
    assert "within 0.2 s" in result.err
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    "line",
    [
        "",
        "unknown",
        "attach",
        "attach a b",
        "attach a --part b",
        "attach a --offset 1.5K",
        "attach a --offset -1",
        "attach a --sizelimit 8E",
        "attach a --sector-size 513",
        "attach a --direct-io maybe",
        "attach a --lifetime forever",
        "attach a --lifetime 2147483648",
        "attach a --part",
        "run a",
        "run a --",
        "run -- true",
        "detach",
        "detach loop1 --wait 1h",
        "detach loop1 --all",
        "detach --all --admin",
        "attach a --deliver pigeon",
        "directory --remove",
        "rescan",
        "resize loop1 loop2",
        "doctor loop1",
        "list loop1",
        "list -o NAMES",
        "list -o",
        "--timeout nan list",
    ],
)
def test_a_wrong_command_line_exits_with_2(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(line.split())
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"loopctl: .+\nloopctl: `loopctl[a-z ]* --help` tells more\n", err)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("ls", "not 'ls'; did you mean list?"),
        ("attach a --readonly", "--readonly; did you mean --read-only?"),
        ("attach a --sectorsize=512", "--sectorsize=512; did you mean --sector-size?"),
        ("attach a b", "unrecognized arguments: b"),
        ("detach /dev/loop5p1", "argument DEVICE: /dev/loop5p1 is a partition: give /dev/loop5"),
        ("resize loop5p1", "argument DEVICE: loop5p1 is a partition: give loop5"),
    ],
)
def test_what_may_have_been_meant(line: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(line.split())
    assert capsys.readouterr().err.splitlines()[0].endswith(said)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("512", 512),
        ("0x200", 512),
        ("1k", 1024),
        ("1K", 1024),
        ("1KiB", 1024),
        ("1KB", 1000),
        ("3M", 3 << 20),
        ("3MB", 3_000_000),
        ("2GiB", 2 << 30),
        ("1T", 1 << 40),
        ("1P", 1 << 50),
        ("7E", 7 << 60),
    ],
)
def test_sizes_are_losetups(text: str, value: int) -> None:
    assert values.size(text) == value


@pytest.mark.parametrize(
    "text", ["", "K", "1 K", "1KK", "1iB", "1B", "+1", "010", "1e3", "\u0661", str(wire.MAX_OFFSET + 1)]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        values.size(text)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help_and_is_in_the_overview(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    for line in ([verb, "--help"], ["--help"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(line)
        assert caught.value.code == 0
        assert verb in capsys.readouterr().out


@pytest.mark.parametrize("line", ["--help", "--version", "attach --help", "list", "hello"])
@pytest.mark.parametrize("stdout", ["full", "pipe", "closed"])
def test_output_that_nobody_gets_is_a_failure(ctl: Ctl, line: str, stdout: str) -> None:
    """One line for a person, and no traceback; the exit status is not 0 even where no person is told."""
    reader, writer = os.pipe()
    os.close(reader)
    fd = {"full": os.open("/dev/full", os.O_WRONLY), "pipe": writer, "closed": -1}
    why = {"full": ": No space left on device", "pipe": ": Broken pipe", "closed": " is closed"}[stdout]
    answer = {"list": {"leases": [LEASE]}, "hello": GREETING}.get(line)
    steps = [lambda request: request.reply(answer)] * 2 if answer else []
    options: dict[str, Any] = {"stdout": fd[stdout]}
    if stdout == "closed":
        options = {"stdout": None, "preexec_fn": lambda: os.close(1)}
    try:
        with Peer(ctl.sock, *steps):
            result = ctl(*line.split(), **options)
            assert (result.code, result.err) == (1, f"loopctl: standard output{why}\n")
            assert ctl(*line.split(), **{**options, "stderr": fd["full"]}).code == 1
    finally:
        os.close(fd["full"])
        os.close(writer)


@pytest.mark.parametrize("line", ["list", "lis", "attach /missing"])
def test_a_failure_that_nobody_reads_is_one(ctl: Ctl, line: str) -> None:
    with open("/dev/full", "w") as full:
        assert ctl(*line.split(), stderr=full).code == (2 if line == "lis" else 1)


C_LOCALE = ("env", "LC_ALL=C", "PYTHONUTF8=0", "PYTHONCOERCECLOCALE=0")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["attach", ""], "'': No such file or directory"),
        (["attach", "\u00f1"], "\u00f1: No such file or directory"),
        (["attach", os.fsdecode(b"\xc3\xb1\xff\n")], "\u00f1\\xff\\n: No such file or directory"),
        (["run", "\u00f1", "--", "true"], "\u00f1: No such file or directory"),
        (["attach", "{image}", "-d", "\u00f1"], "\u00f1: No such file or directory"),
        (["attach", "{image}", "--offset", "\u00f1"], "argument -o/--offset: not a size: '\u00f1'; expected bytes"),
        (["attach", "{image}", "--direct-io", "\u00f1"], "argument --direct-io: invalid choice: '\u00f1' (choose"),
        (["--socket", "/\u00f1", "list"], "cannot ask loopd at /\u00f1: No such file or directory"),
        (["\u00f1"], "not '\u00f1'"),
        (["attach", "{image}/x"], "{image}/x: Not a directory"),
    ],
)
@pytest.mark.parametrize("before", [(), C_LOCALE], ids=["UTF-8", "C"])
def test_what_is_wrong_as_a_person_reads_it(ctl: Ctl, words: list[str], said: str, before: tuple[str, ...]) -> None:
    """No numbers of errors, and names as they are, in a locale that knows no letter of them, too."""
    result = ctl(*(word.format(image=ctl.image) for word in words), before=before, encoding="utf-8")
    assert said.format(image=ctl.image) in result.err.splitlines()[0]
    assert result.code == (2 if "argument" in said or "not '" in said else 1)


def test_names_in_a_locale_without_their_letters(ctl: Ctl, loop: Loop) -> None:
    folder = ctl.dev / "\u00f1"
    folder.mkdir()

    def step(request: Request) -> None:
        assert request.fields["ref"] == "\u00f1"
        loop.deliver(request)

    named = dict(LEASE, backing_file="/\u00f1.img")
    path = folder / loop.reply["devname"]
    with Peer(ctl.sock, step, step, lambda request: request.reply({"leases": [named]})):
        for options in ([], ["--json"]):
            words = ["attach", loop.image, "-d", folder, "--ref=\u00f1", *options]
            result = ctl(*words, before=C_LOCALE, encoding="utf-8")
            assert (result.code, result.err) == (0, "")
            assert (json.loads(result.out)["path"] if options else result.out.rstrip("\n")) == str(path)
            path.unlink()
        assert ctl("list", before=C_LOCALE, encoding="utf-8").out.splitlines()[1].endswith("  /\u00f1.img")


@pytest.mark.parametrize("line", ["list", "attach disk.img -d dev", "detach loop1", "resize loop1"])
def test_a_relative_directory_of_loopds_is_refused(ctl: Ctl, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a sentence, and before anything is asked."""
    monkeypatch.setenv("LOOPD_DIRECTORY", "dev")
    first, second = ctl(*line.split(), cwd=ctl.dev.parent).err.splitlines()
    assert first == "loopctl: LOOPD_DIRECTORY=dev is no absolute path"
    assert "/dev/loopd" in second
    with Peer(ctl.sock, lambda request: request.reply(GREETING)):
        lines = ctl("doctor", cwd=ctl.dev.parent).out.splitlines()
    assert lines[1].startswith("FAIL  directory: LOOPD_DIRECTORY=dev is no absolute path; ")


def test_the_administrators_socket_is_roots(ctl: Ctl) -> None:
    """That of an instance, too; in a container, where root is not the host's, sudo would not help."""
    folder = Path(tempfile.mkdtemp(prefix="loopd-test-", dir="/tmp"))
    folder.chmod(0o755)
    try:
        with Peer(folder / "admin.sock"):
            (folder / "admin.sock").chmod(0o600)
            # Another user may not reach the interpreter's own modules.
            code = f"""
import os, sys
import {", ".join(f"loopd.cli.{name}" for name in ("loopctl", "verbs"))}
os.setgid(65534), os.setuid(65534)
sys.exit(loopd.cli.main(["--socket", "{folder}/admin.sock", "--admin", "list"]))
"""
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            command = [sys.executable, "-c", code]
            done = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True, env=environment)
    finally:
        shutil.rmtree(folder)
    assert done.stderr.splitlines() == [
        f"loopctl: cannot ask loopd at {folder}/admin.sock: Permission denied",
        "loopctl: you are not root: sudo loopctl ...",
    ]


def test_the_version(ctl: Ctl) -> None:
    result = ctl("--version")
    assert result.out.startswith("loopctl ")
    assert result.code == 0
