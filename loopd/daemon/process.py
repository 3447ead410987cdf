"""The daemon: start, signals, watchdog, idle exit, end.

Prepares everything that the service needs, in the order in which it can fail, and says clearly what is missing. Knows
nothing of requests.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import resource
import signal
import socket
import sys
import time

from loopd import __version__
from loopd.children.bugs import described
from loopd.daemon import leases, numbers, policy, pool, sd
from loopd.daemon.audit import Audit, Event
from loopd.daemon.lifecycle import Lifecycle
from loopd.daemon.metrics import Metrics
from loopd.daemon.numbers import Counter, Numbers
from loopd.daemon.pool import Pool
from loopd.daemon.service import Listener, Service
from loopd.kernel import sysfs, transport, uevents
from loopd.kernel.inotify import Inotify
from loopd.kernel.poller import ONCE, Poller
from loopd.loop import LoopControl
from loopd.worker import devices
from loopd.worker.devices import Access
from loopd.worker.grants import ROOT, Grants
from loopd.worker.helper import Tools

STATE_DIRECTORY = "/var/lib/loopd"
ADMIN = "admin"
"""FileDescriptorName= of the administrator's socket."""
SLOT = "slot"
"""FDNAME= of the slots in the fd store."""


class CannotStart(Exception):
    """What is missing, in words for the administrator."""


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="loopd", description="Give loop devices to containers. Started by systemd with loopd.socket; see loopd(8)."
    )
    parser.add_argument("--version", action="version", version=f"loopd {__version__}")
    parser.add_argument(
        "--idle-timeout", type=float, metavar="SECONDS", help="exit after this long with nothing to hold"
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        default=policy.CONFIGURATION,
        help="policy and limits, with FILE.d (default: %(default)s)",
    )
    parser.add_argument(
        "--check-config", action="store_true", help="say what is wrong with the configuration, and exit"
    )
    parser.add_argument(
        "--instance", default="", metavar="NAME", help="the NAME of loopd@NAME.service, for the journal"
    )
    parser.add_argument(
        "--grant-directory", metavar="DIR", default=ROOT,
        help="the tmpfs with the directories that are bound into containers (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--state-directory", metavar="DIR", default=os.environ.get("STATE_DIRECTORY", STATE_DIRECTORY),
        help="where the number counter is (default: $STATE_DIRECTORY or %(default)s)",
    )  # fmt: skip
    return parser.parse_args(arguments)


def _listeners(passed: list[tuple[str, int]]) -> list[Listener]:
    found = []
    for name, fd in passed:
        if name == SLOT:
            continue
        try:
            listener = socket.socket(fileno=fd)
        except OSError as error:
            raise CannotStart(f"{name!r} is no AF_UNIX datagram socket, but no socket at all") from error
        if listener.family != socket.AF_UNIX or listener.type != socket.SOCK_DGRAM:
            raise CannotStart(f"socket {name!r} is no AF_UNIX datagram socket: loopd.socket has ListenDatagram=")
        transport.prepare(listener)
        found.append(Listener(listener, name == ADMIN))
    if not found:
        program = "python3 -m loopd" if sys.argv[0].endswith("__main__.py") else sys.argv[0]
        raise CannotStart(
            "no socket was passed: start loopd.socket, or by hand"
            f" systemd-socket-activate --datagram -l /run/loopd/loopd.sock {program}"
        )
    return found


_CONTROL = {
    errno.ENOENT: "/dev/loop-control is missing: is the loop module there (modprobe loop)?",
    errno.ENODEV: "/dev/loop-control leads to no device: is the loop module there (modprobe loop)?",
    errno.ENXIO: "/dev/loop-control leads to no device: is the loop module there (modprobe loop)?",
    errno.EACCES: "opening /dev/loop-control is not permitted: run as root, or as the service does",
    errno.EPERM: "opening /dev/loop-control is not permitted: the device cgroup (DeviceAllow=) refuses it",
}


def _control(access: Access) -> LoopControl:
    try:
        control = access.open_control()
    except OSError as error:
        raise CannotStart(_CONTROL.get(error.errno or 0, f"/dev/loop-control cannot be opened: {error}")) from error
    try:
        if not access.has_configure(control):
            raise CannotStart(f"Linux {os.uname().release} has no LOOP_CONFIGURE: loopd needs Linux 5.8 or later")
    except OSError as error:
        raise CannotStart(f"no loop device can be opened: {error}") from error
    return control


def _newest_sequence(control: LoopControl) -> int:
    """The kernel's sequence number of disks, that of a device made for this; 0 before Linux 5.15."""
    with contextlib.suppress(OSError):
        number = control.add()
        found = devices.sequence(f"loop{number}")
        control.remove(number)
        return found or 0
    return 0


def _counter(directory: str, instance: str, control: LoopControl, audit: Audit) -> Counter:
    try:
        os.makedirs(directory, 0o700, exist_ok=True)
        counter = Counter(os.path.join(directory, "numbers"), instance, lambda: _newest_sequence(control))
    except OSError as error:
        raise CannotStart(f"the number counter cannot be kept in {directory}: {error}") from error
    if counter.started_from_clock:
        audit.record(
            Event.WARNED, f"There was no number counter in {directory}: numbers start from the clock", path=directory
        )
    return counter


class Daemon:
    """The running daemon."""

    STOP_TIMEOUT = 5.0
    """Seconds that the end may take: requests under way, and the nodes of leases that nothing else will keep."""

    MOST_BUGS = 100
    """Bugs outside of any request that one daemon survives."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._bugs = 0
        self._maker = 0
        self._renewing = False
        self._flushing = False
        self._reporting = False
        self._reported = ""
        if os.uname().sysname != "Linux" or sys.version_info < (3, 11):
            raise CannotStart("loopd needs Linux and Python 3.11 or later")
        limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        if limit < most:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        passed = sd.listen_fds()
        self._notifier = sd.Notifier()
        self._watchdog = sd.watchdog_interval()
        self._audit = Audit(options.instance)
        listeners = _listeners(passed)
        self._access = Access(sysfs.mount())
        self._control = _control(self._access)
        self._poller = Poller()
        self._stopping = False
        self._catch_signals()
        self._options = options
        self._policy, mistake = self._policy_at_start()
        self._numbers = Numbers(
            _counter(options.state_directory, options.instance, self._control, self._audit), self._fork_numbers()
        )
        # Instances share the state directory. One that is started by hand may have any name.
        service = f"loopd@{options.instance}" if options.instance else "loopd"
        saved = os.path.join(options.state_directory, f"metrics.{service.replace('/', '-')}")
        self._metrics = Metrics(service, saved)
        slots = leases.Slots(self._notifier, sd.fd_store_size())
        watches = Inotify()
        grants = Grants(options.grant_directory, options.instance)
        tools = Tools([listener.socket for listener in listeners], self._control, self._access, grants, watches.fd)
        self._pool = Pool(self._poller, tools, self._helper_ready)
        self._lifecycle = Lifecycle(self._poller, self._pool, watches, self._numbers, slots, self._audit, self._policy)
        self._lifecycle.renew_numbers = self._renew_numbers
        self._service = Service(
            self._poller, listeners, self._pool, self._lifecycle, self._numbers, slots, self._audit, self._metrics,
            self._policy, options.instance,
        )  # fmt: skip
        self._service.mistake = mistake
        for name, fd in passed:
            if name == SLOT:
                self._lifecycle.recover(socket.socket(fileno=fd))
        self._uevents = uevents.listen()
        self._poller.add(self._uevents.fileno(), self._on_uevent, ONCE)
        self._lifecycle.resume()
        self._service.start()

    def _load_policy(self) -> policy.Policy:
        return self._with_options(policy.load(self._options.config))

    def _with_options(self, loaded: policy.Policy) -> policy.Policy:
        given = self._options.idle_timeout
        return loaded if given is None else loaded._replace(idle_timeout=given)

    def _policy_at_start(self) -> tuple[policy.Policy, str]:
        """The policy, and what is wrong with it. Each request would wait for a daemon that ended because of that."""
        try:
            return self._load_policy(), ""
        except policy.ConfigurationError as error:
            text = f"Nothing is attached before the configuration is corrected: {error}"
            self._audit.record(Event.FAILED, text, path=self._options.config)
            return self._with_options(policy.Policy()), str(error)

    def _reload(self) -> None:
        """New requests follow the new policy; a policy with an error changes nothing."""
        try:
            self._policy = self._service.policy = self._lifecycle.policy = self._load_policy()
            self._service.mistake = ""
        except policy.ConfigurationError as error:
            still = "The old policy stays in force"
            if self._service.mistake:
                still, self._service.mistake = "Nothing is attached, as before", str(error)
            for file, key, reason in error.problems:
                self._audit.record(Event.WARNED, f"{still}: {file}: {key}: {reason}", path=file)
            return
        self._audit.record(Event.RELOADED, "The policy was read again", path=self._options.config)

    def _fork_numbers(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                keep = [theirs.fileno(), self._control.fileno(), *self._access.fds]
                self._maker = pool.fork(keep, lambda: numbers.work(theirs, self._control, self._access))
            except OSError:
                ours.close()
                raise
        self._poller.add(ours.fileno(), self._on_number)
        return ours

    def _helper_ready(self) -> None:
        self._service.serve_waiting()

    def _on_number(self) -> None:
        try:
            self._lifecycle.on_number()
        except EOFError:
            self._renew_numbers()

    def _renew_numbers(self) -> None:
        if not self._renewing:
            self._renewing = True
            if self._maker:  # it hangs; what it has not come to is the next one's
                os.kill(self._maker, signal.SIGKILL)
            self._poller.remove(self._numbers.channel.fileno())
            self._numbers.give_up()
            self._restart_numbers()

    def _restart_numbers(self) -> None:
        try:
            channel = self._fork_numbers()
        except OSError:  # TasksMax=, memory, open files: helpers make the numbers, and the removals wait
            self._poller.later(self.NUMBERS_PAUSE, self._restart_numbers)
            return
        self._renewing = False
        self._numbers.restart(channel)

    NUMBERS_PAUSE = 0.2
    """Seconds after which it is tried again to start the process that makes numbers."""

    FLUSH_PAUSE = 0.1
    """Seconds after which records are offered again to a journal that took none."""

    UEVENT_PAUSE = 0.02
    """Seconds in which uevents are gathered: every attach makes some, and hardly one has to be acted on."""

    def _on_uevent(self) -> None:
        began = time.monotonic()
        try:
            changes = uevents.receive(self._uevents)
            if changes is None:
                self._lifecycle.look_again()
                self._lifecycle.look_at_partitions()
                return
            for devname in changes.disks:
                self._lifecycle.on_disk(devname)
            for devname in changes.partitioned:
                self._lifecycle.on_partitions(devname)
        finally:
            # Whoever has a device can have the kernel tell of it without end: that gets a tenth of the time at most.
            pause = max(self.UEVENT_PAUSE, 9 * (time.monotonic() - began))
            self._poller.later(pause, lambda: self._poller.rearm(self._uevents.fileno()))

    def _catch_signals(self) -> None:
        read, write = socket.socketpair()
        read.setblocking(False)
        write.setblocking(False)
        self._signals = (read, write)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(write.fileno(), warn_on_full_buffer=False)
        self._poller.add(read.fileno(), self._on_signal)

    def _on_signal(self) -> None:
        for number in set(self._signals[0].recv(4096)):
            if number == signal.SIGCHLD:
                self._reap()
            elif number == signal.SIGHUP:
                self._reload()
            elif number in (signal.SIGTERM, signal.SIGINT):
                self._stopping = True

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while (pid := os.waitpid(-1, os.WNOHANG)[0]) != 0:
                self._pool.reap(pid)
                if pid == self._maker:
                    self._maker = 0

    def _ping(self) -> None:
        assert self._watchdog is not None
        self._notifier.send("WATCHDOG=1")
        self._collect_garbage()
        self._poller.later(self._watchdog / 2, self._ping)

    STATUS_PAUSE = 1.0
    """Seconds in which changes of the status are gathered: nobody is woken for each, nor while there is none."""

    def _report(self) -> None:
        self._reporting = False
        self._reported = self._service.status
        self._notifier.send(f"STATUS={self._reported}")

    READY_PAUSE = 0.1
    """Seconds before systemd is told again, where its queue was full."""

    def _tell_ready(self) -> None:
        if self._notifier.present and not self._notifier.send(f"READY=1\nSTATUS={self._reported}"):
            self._poller.later(self.READY_PAUSE, self._tell_ready)

    def run(self) -> None:
        """Serve until a signal or idleness ends it."""
        self._reported = self._service.status
        self._tell_ready()
        if not self._notifier.present:
            print("loopd: runs by hand: leases end with it (no fd store)", file=sys.stderr, flush=True)
        if self._watchdog is not None:
            self._ping()
        # What started it waits in a queue; it is served before idleness is thought of.
        self._poller.later(self._policy.idle_timeout, self._idle_check)
        while not self._stopping:
            self._turn()
        self._stop()

    def _turn(self) -> None:
        """One round of events. A bug in one is recorded and the others go on; one that does not pass ends the daemon,
        and the service manager starts it again with every lease.
        """
        try:
            self._poller.run_once()
        except Exception as error:
            self._bugs += 1
            self._audit.record(Event.FAILED, described(error)[-4000:])
            if self._bugs > self.MOST_BUGS:
                raise
        if self._audit.waiting and not self._flushing:
            self._flushing = True
            self._poller.later(self.FLUSH_PAUSE, self._flush)
        if not self._reporting and self._service.status != self._reported:
            self._reporting = True
            self._poller.later(self.STATUS_PAUSE, self._report)

    def _flush(self) -> None:
        self._flushing = False
        self._audit.flush()

    def _collect_garbage(self) -> None:
        """Have the kernel look for AF_UNIX sockets that nobody can reach, whenever the process is awake anyway.

        The end of a lease socket that a client has queued in itself is one. The kernel looks whenever one is closed,
        which on most hosts happens all the time.
        """
        with contextlib.suppress(OSError):
            socket.socket(socket.AF_UNIX).close()

    def _idle_check(self) -> None:
        self._collect_garbage()
        idle = time.monotonic() - self._service.last_activity
        timeout = self._policy.idle_timeout
        if not (self._service.busy or self._audit.waiting) and idle >= timeout:
            self._stopping = True
            return
        if idle >= timeout:
            self._service.rest()
        self._poller.later(max(0.05, timeout - idle if idle < timeout else timeout), self._idle_check)

    def _stop(self) -> None:
        """Finish what is under way; take away what nothing will keep; leave the rest to the fd store."""
        self._notifier.send("STOPPING=1")
        self._service.stop()
        deadline = time.monotonic() + self.STOP_TIMEOUT
        self._poller.later(self.STOP_TIMEOUT, lambda: None)
        while self._service.ending and time.monotonic() < deadline:
            self._turn()
        self._metrics.save()
        self._audit.drain(1.0)


def main(arguments: list[str] | None = None) -> int:
    """Entry point of ``loopd``; the exit status."""
    options = _options(arguments)
    try:
        if options.check_config:
            policy.load(options.config)
            return 0
        daemon = Daemon(options)
    except policy.ConfigurationError as error:
        return _cannot_start(options, [f"{file}: {key}: {reason}" for file, key, reason in error.problems])
    except CannotStart as error:
        return _cannot_start(options, [str(error)])
    daemon.run()
    return 0


def _cannot_start(options: argparse.Namespace, reasons: list[str]) -> int:
    """Say why, in the audit where standard error is the journal; the exit status."""
    if sd.logs_to_journal() and not options.check_config:
        audit = Audit(options.instance)
        for reason in reasons:
            audit.record(Event.FAILED, reason)
        audit.drain(1.0)
    else:
        for reason in reasons:
            print(f"loopd: {reason}", file=sys.stderr)
    return 1
