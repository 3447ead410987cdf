"""What daemon and service manager say to each other: sockets, signals, notify messages, records, a start that fails."""

from __future__ import annotations

import array
import contextlib
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.daemon import ROOT, Daemon, ask, bound_to, eventually, exists, prompt, require
from support.processes import IN_NAMESPACE, NOBODY, Activated, Child, stays
from support.untouched import kept_open

from loopd.protocol import wire

HELLO = wire.encode_request(wire.Hello(0))
PROMPT = 2.0
"""Seconds for an answer that waits for nothing, of a daemon that has started."""


@pytest.fixture
def activated(tmp_path: Path) -> Iterator[Callable[..., Activated]]:
    """Daemons that are started by the test, on a listening socket which the test keeps."""
    require(os.geteuid() == 0, "needs root: loop devices")
    require(os.path.exists("/dev/loop-control"), "needs /dev/loop-control")
    with contextlib.ExitStack() as stack:

        def make(*options: str, wrapper: tuple[str, ...] = (), **environment: str) -> Activated:
            directory = tmp_path / f"loopd{uuid.uuid4().hex[:4]}"
            directory.mkdir()
            daemon = Activated(directory, list(options), list(wrapper), environment)
            stack.callback(daemon.stop)
            return daemon

        yield make


def in_namespace(prepare: str) -> tuple[str, ...]:
    """A wrapper that changes what the daemon sees of the file system."""
    return (*IN_NAMESPACE, f'{prepare}; exec "$@"', "sh")


def numbers_of(devname: str, before: list[str]) -> list[str]:
    """The devices that exist of the block of numbers that this one is of: a daemon takes them by blocks of 64.

    `before`: those that were there before it. A daemon that was killed earlier may have left some of the same block.
    """
    first = int(devname.removeprefix("loop")) // 64 * 64
    return [name for number in range(first, first + 64) if exists(name := f"loop{number}") and name not in before]


# Sockets, idleness, signals ---------------------------------------------------------------------------------------


def test_idle_exit_and_the_next_datagram(
    activated: Callable[..., Activated], image: int, directory: int, tmp_path: Path
) -> None:
    before = os.listdir("/sys/block")
    daemon = activated("--idle-timeout", "0.5")
    daemon.start()
    lease = daemon.attach(image, directory)
    stays(lambda: daemon.running, 1.5, "a daemon that holds something stays")
    lease.close()
    assert daemon.wait() == 0
    assert not bound_to(tmp_path)
    eventually(lambda: not numbers_of(lease.fields["devname"], before), "what was made ahead of need is gone too")

    # Nobody is there; the socket is. This is what systemd waits for.
    with Child(lambda tell: tell(ask(daemon.path, HELLO, []).fields)) as client:
        assert select.select([daemon.listener], [], [], 10)[0]
        assert not daemon.running
        daemon.start()
        assert client.hear()["protocol"] == wire.VERSION
    assert daemon.wait() == 0


def test_a_number_that_somebody_has_open_is_not_forgotten(
    activated: Callable[..., Activated], image: int, directory: int, devices: Path
) -> None:
    """Its device is bound to nothing, which nobody would do any more."""
    daemon = activated("--idle-timeout", "0.5")
    daemon.start()
    name = daemon.attach(image, directory).fields["devname"]
    with kept_open(daemon, devices / name):
        stays(lambda: daemon.running, 3.0, "it stays for that")
    assert daemon.wait() == 0
    assert not exists(name)


def test_patience_of_years(start_daemon: Callable[..., Daemon]) -> None:
    """More milliseconds than epoll can wait for."""
    assert start_daemon("--idle-timeout", "1e9").hello().code is None


def test_an_account_that_burns_numbers_is_not_forgotten(
    activated: Callable[..., Activated], image: int, directory: int, tmp_path: Path
) -> None:
    """Else it would have new ones as soon as loopd is idle; who has used less than half of them holds nothing up."""
    config = tmp_path / "loopd.toml"
    config.write_text("limits.new_numbers = 4\nlimits.new_numbers_per_minute = 6\n")
    daemon = activated("--idle-timeout", "2", f"--config={config}")
    daemon.start()
    for count, ends in ((2, True), (3, False)):
        for _ in range(count):
            name = daemon.attach(image, directory).fields["devname"]
            assert daemon.ask(wire.Detach(name, 0, wait=5), []).fields == {"state": "released"}
        if ends:
            assert daemon.wait() == 0
            daemon.start()
        else:
            stays(lambda: daemon.running, 4.0, "it remembers")
            assert daemon.wait(30) == 0, "a number comes back after ten seconds"


def test_requests_end_the_idleness(activated: Callable[..., Activated]) -> None:
    daemon = activated("--idle-timeout", "2")
    daemon.start()
    deadline = time.monotonic() + 5.0
    while time.monotonic() < deadline:
        assert daemon.hello().fields["protocol"] == wire.VERSION
        time.sleep(0.1)
    assert daemon.running
    assert daemon.wait() == 0


def test_no_request_is_lost_between_two_daemons(activated: Callable[..., Activated]) -> None:
    daemon = activated()
    daemon.start()
    daemon.hello()
    os.kill(daemon.pid, signal.SIGSTOP)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Child(lambda tell: tell(ask(daemon.path, HELLO, []).fields))) for _ in range(5)]
        eventually(lambda: select.select([daemon.listener], [], [], 0)[0], "requests are there")
        time.sleep(0.3)
        os.kill(daemon.pid, signal.SIGTERM)
        os.kill(daemon.pid, signal.SIGCONT)
        assert daemon.wait() == 0
        daemon.start()
        for client in clients:
            assert client.hear()["protocol"] == wire.VERSION


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_and_the_leases_that_nothing_keeps(
    activated: Callable[..., Activated],
    make_image: Callable[..., int],
    directory: int,
    devices: Path,
    tmp_path: Path,
    number: int,
) -> None:
    daemon = activated()
    daemon.start()
    leases = [daemon.attach(make_image(name=f"image{i}"), directory) for i in range(3)]
    assert "runs by hand: leases end with it" in daemon.log()
    with (devices / leases[0].fields["devname"]).open("rb") as used:
        started = time.monotonic()
        os.kill(daemon.pid, number)
        assert daemon.wait() == 0
        assert time.monotonic() - started < 8
        assert list(devices.iterdir()) == []
        # Never pulled away under somebody who has it open.
        assert bound_to(tmp_path) == [leases[0].fields["devname"]]
        assert len(used.read(4096)) == 4096
    eventually(lambda: not bound_to(tmp_path), "the last one is free")
    assert "Traceback" not in daemon.log()
    assert daemon.family() == []


def test_a_hangup_signal_does_not_end_it(activated: Callable[..., Activated]) -> None:
    daemon = activated()
    daemon.start()
    daemon.hello()
    os.kill(daemon.pid, signal.SIGHUP)
    stays(lambda: daemon.running, 0.3, "it runs")
    assert daemon.hello().fields["protocol"] == wire.VERSION


def test_both_sockets(activated: Callable[..., Activated], image: int, directory: int, tmp_path: Path) -> None:
    """The name of the second says that it is the administrator's, which sees who has what."""
    admin = tmp_path / "admin.sock"
    daemon = activated(LISTEN_FDNAMES="loopd:admin")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(admin))
        daemon.launch([daemon.listener.fileno(), listener.fileno()])
        name = daemon.attach(image, directory).fields["devname"]
        (row,) = daemon.ask(wire.Leases(0), []).fields["leases"]
        assert "account" not in row
        with contextlib.closing(ask(str(admin), wire.encode_request(wire.Leases(0)), [])) as reply:
            (row,) = reply.fields["leases"]
        assert (row["devname"], row["uid"], row["pid"]) == (name, os.getuid(), os.getpid())


# Notify -----------------------------------------------------------------------------------------------------------


class Manager:
    """The service manager's end of the notify socket."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind("\0" + path[1:] if path.startswith("@") else path)
        self.socket.settimeout(10)

    def message(self) -> str:
        """The next message; the fds that came with it are closed."""
        payload, control, _, _ = self.socket.recvmsg(65536, socket.CMSG_SPACE(4 * 253), socket.MSG_CMSG_CLOEXEC)
        for _, _, data in control:
            for fd in array.array("i", data):
                os.close(fd)
        return payload.decode()

    def until(self, text: str) -> list[str]:
        """The messages up to the first one that has `text`."""
        found = [self.message()]
        while text not in found[-1]:
            found.append(self.message())
        return found

    def drain(self) -> None:
        """Pass over what has come so far."""
        while select.select([self.socket], [], [], 0)[0]:
            self.message()


@pytest.fixture
def manager(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Manager, str]]:
    abstract = getattr(request, "param", "path") == "abstract"
    path = f"@loopd-test-{uuid.uuid4().hex}" if abstract else str(tmp_path / "notify")
    made = Manager(path)
    with made.socket:
        yield made, path


@pytest.mark.parametrize("manager", ["path", "abstract"], indirect=True)
def test_notify(activated: Callable[..., Activated], manager: tuple[Manager, str]) -> None:
    told, path = manager
    daemon = activated(NOTIFY_SOCKET=path, WATCHDOG_USEC="400000")
    daemon.start()
    before = told.until("READY=1")
    assert all("READY" not in message for message in before[:-1])
    assert "STATUS=" in before[-1]
    assert daemon.hello().fields["protocol"] == wire.VERSION

    def turn() -> float:
        started = time.monotonic()
        told.drain()
        for _ in range(4):
            told.until("WATCHDOG=1")
        took = time.monotonic() - started
        assert took > 0.5
        return took

    prompt(turn)  # twice in each interval, whether there is work or not

    os.kill(daemon.pid, signal.SIGTERM)
    told.until("STOPPING=1")
    assert daemon.wait() == 0
    assert "runs by hand" not in daemon.log()


def test_status_says_what_is_wrong_with_the_configuration(
    activated: Callable[..., Activated], manager: tuple[Manager, str], tmp_path: Path
) -> None:
    """The start succeeds, else nobody could be told; what is right again is said, too."""
    told, path = manager
    config = tmp_path / "loopd.toml"
    config.write_text("limits.devices = 'many'\nlimits.surprise = 1\n")
    daemon = activated(f"--config={config}", NOTIFY_SOCKET=path)
    daemon.start()
    ready = told.until("READY=1")[-1]
    wrong = f"STATUS=Nothing is attached, the configuration is wrong: {config}: limits.devices: expected a whole number"
    assert wrong in ready
    assert "limits.surprise: there is no such key" in ready
    config.write_text("limits.devices = 5\n")
    os.kill(daemon.pid, signal.SIGHUP)
    told.until("STATUS=0 leases")
    config.write_text("limits.devices = 'many'\n")
    daemon.kill()
    daemon.start()
    told.until("STATUS=Nothing is attached")


def test_status_says_what_is_held(
    activated: Callable[..., Activated], manager: tuple[Manager, str], image: int, directory: int, devices: Path
) -> None:
    told, path = manager
    daemon = activated("--idle-timeout", "2", NOTIFY_SOCKET=path)
    daemon.start()
    told.until("STATUS=0 leases")
    reply = daemon.attach(image, directory)
    told.until("STATUS=1 lease")
    assert daemon.ask(wire.Detach(reply.fields["devname"], 0, wait=5), []).fields == {"state": "released"}
    told.until("STOPPING=1")  # idle: nothing was left in the fd store
    assert daemon.wait() == 0


def test_it_is_ready_once_the_manager_has_room_for_it(
    activated: Callable[..., Activated], manager: tuple[Manager, str]
) -> None:
    """Without READY=1 systemd would end it after a while."""
    told, path = manager
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as others, contextlib.suppress(BlockingIOError):
        others.setblocking(False)
        others.connect(path)
        while True:
            others.send(b"FDNAME=another's")
    daemon = activated(NOTIFY_SOCKET=path)
    daemon.start()
    assert daemon.hello().fields["protocol"] == wire.VERSION
    assert "READY=1" in told.until("READY=1")[-1]


def test_a_manager_that_does_not_read_holds_nobody_up(
    activated: Callable[..., Activated], manager: tuple[Manager, str]
) -> None:
    _, path = manager
    daemon = activated(NOTIFY_SOCKET=path, WATCHDOG_USEC="20000")  # fills the queue within a second
    daemon.start()
    daemon.hello()
    time.sleep(1.0)
    for _ in range(20):
        started = time.monotonic()
        assert daemon.hello().fields["protocol"] == wire.VERSION
        assert time.monotonic() - started < PROMPT
    daemon.kill(signal.SIGTERM)
    assert daemon.wait() == 0


def test_a_watchdog_that_is_for_another_process(
    activated: Callable[..., Activated], manager: tuple[Manager, str]
) -> None:
    told, path = manager
    # The launcher sets WATCHDOG_PID to the daemon's own pid; env puts another in its place.
    daemon = activated(NOTIFY_SOCKET=path, WATCHDOG_USEC="100000", wrapper=("env", "WATCHDOG_PID=1"))
    daemon.start()
    told.until("READY=1")
    told.socket.settimeout(1.0)
    with pytest.raises(TimeoutError):
        told.until("WATCHDOG=1")


# A start that fails -----------------------------------------------------------------------------------------------


def refused(daemon: Activated, fds: list[int] | None = None) -> str:
    """What a daemon says that does not start: one line, and exit status 1."""
    daemon.launch([daemon.listener.fileno()] if fds is None else fds)
    assert daemon.wait() == 1
    log = daemon.log()
    assert log.count("\n") == 1, log
    assert log.startswith("loopd: ")
    daemon.log_path.write_text("")
    return log


def test_no_socket(activated: Callable[..., Activated]) -> None:
    said = refused(activated(), [])
    assert "no socket was passed" in said
    assert "loopd.socket" in said
    assert "systemd-socket-activate --datagram" in said


def test_sockets_that_were_passed_to_another_process(activated: Callable[..., Activated]) -> None:
    """LISTEN_PID is for the process that was started; what it starts itself inherits the variable, not the meaning."""
    assert "no socket was passed" in refused(activated(wrapper=("env", "LISTEN_PID=1")))


def test_passed_sockets_that_are_miscounted(activated: Callable[..., Activated]) -> None:
    said = refused(activated(wrapper=("env", "LISTEN_FDNAMES=one:two")))
    assert "LISTEN_FDS and LISTEN_FDNAMES do not say which sockets were passed" in said


def test_without_systemd_python(activated: Callable[..., Activated], tmp_path: Path) -> None:
    """What to install is said; what only looks at the program or the configuration works."""
    (tmp_path / "without/systemd").mkdir(parents=True)
    (tmp_path / "without/systemd/__init__.py").touch()
    path = f"{ROOT}:{tmp_path}/without"
    assert "systemd-python is missing" in (said := refused(activated(PYTHONPATH=path)))
    assert "install python3-systemd" in said
    (tmp_path / "loopd.toml").touch()
    for option in ("--version", "--check-config"):
        command = [sys.executable, "-m", "loopd", option, "--config", str(tmp_path / "loopd.toml")]
        assert subprocess.run(command, check=False, env={**os.environ, "PYTHONPATH": path}).returncode == 0


def _stream() -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    made.bind("")
    made.listen()
    return made


def _internet() -> socket.socket:
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    made.bind(("127.0.0.1", 0))
    return made


@pytest.mark.parametrize("kind", [_stream, _internet])
def test_a_socket_of_another_type(activated: Callable[..., Activated], kind: Callable[[], socket.socket]) -> None:
    with kind() as passed:
        said = refused(activated(), [passed.fileno()])
    assert "no AF_UNIX datagram socket" in said
    assert "ListenDatagram=" in said


@pytest.mark.parametrize("path", ["/dev/null", "/etc/passwd"])
def test_no_socket_at_all(activated: Callable[..., Activated], path: str) -> None:
    """ListenSpecial= and ListenFIFO= pass such."""
    fd = os.open(path, os.O_RDONLY)
    try:
        assert "no AF_UNIX datagram socket" in refused(activated(), [fd])
    finally:
        os.close(fd)


def test_loop_control_is_missing(activated: Callable[..., Activated]) -> None:
    """And the request that started it is answered once it is there."""
    daemon = activated(wrapper=in_namespace("mount -t tmpfs tmpfs /dev"))
    with Child(lambda tell: tell(ask(daemon.path, HELLO, [], timeout=30).fields)) as client:
        said = refused(daemon)
        assert "/dev/loop-control is missing" in said
        assert "modprobe loop" in said
        again = Activated(daemon.directory, [], [], {}, daemon.listener)
        try:
            again.start()
            assert client.hear()["protocol"] == wire.VERSION
        finally:
            again.kill(signal.SIGTERM)


def test_loop_control_without_the_module(activated: Callable[..., Activated]) -> None:
    prepare = "mount -t tmpfs tmpfs /dev; mknod /dev/loop-control c 10 254"  # a minor that no driver has
    said = refused(activated(wrapper=in_namespace(prepare)))
    assert "/dev/loop-control leads to no device" in said
    assert "modprobe loop" in said


def test_loop_control_is_not_permitted(activated: Callable[..., Activated]) -> None:
    user = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--no-new-privs")
    # So that it can read the interpreter and the tree wherever they are; it lets nobody write.
    reader = (
        "--inh-caps=-all,+dac_read_search",
        "--ambient-caps=-all,+dac_read_search",
        "--bounding-set=-all,+dac_read_search",
    )
    said = refused(activated(wrapper=(*user, *reader)))
    assert "opening /dev/loop-control is not permitted" in said
    assert "run as root" in said


def test_loop_control_is_denied_by_the_mount(activated: Callable[..., Activated]) -> None:
    prepare = "mount -t tmpfs -o nodev tmpfs /dev; mknod /dev/loop-control c 10 237"
    assert "opening /dev/loop-control is not permitted" in refused(activated(wrapper=in_namespace(prepare)))


def test_no_loop_device_can_be_opened(activated: Callable[..., Activated]) -> None:
    """The control device alone, as a container with `--device /dev/loop-control` has it."""
    prepare = "mount -t tmpfs tmpfs /dev; mknod /dev/loop-control c 10 237"
    assert "no loop device can be opened" in refused(activated(wrapper=in_namespace(prepare)))


@pytest.mark.parametrize(
    "prepare", ["touch STATE", "mkdir STATE; mount -t tmpfs -o ro tmpfs STATE"], ids=["file", "read-only"]
)
def test_the_state_directory_cannot_be_written(
    activated: Callable[..., Activated], tmp_path: Path, prepare: str
) -> None:
    state = tmp_path / "elsewhere"
    daemon = activated("--state-directory", str(state), wrapper=in_namespace(prepare.replace("STATE", str(state))))
    said = refused(daemon)
    assert f"the number counter cannot be kept in {state}" in said


def test_an_option_that_is_none(activated: Callable[..., Activated]) -> None:
    daemon = activated("--foreground")
    daemon.launch([])
    assert daemon.wait() == 2
    assert "usage: loopd" in daemon.log()


def test_the_module_is_the_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "loopd", "--version"], check=True, capture_output=True, text=True, cwd=ROOT
    )
    assert re.fullmatch(r"loopd \d+\.\d+\.\d+\n", done.stdout)
