"""The daemon: options, start, signals, idle exit, end. Makes the parts of the daemon; knows nothing of requests."""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import signal
import socket
import sys
import time

from loopd import __version__
from loopd.children.bugs import described
from loopd.children.child import Children, Role
from loopd.children.flow import start
from loopd.children.pool import Pool, Sizes
from loopd.daemon import manager, policy, setup
from loopd.daemon.arrange import Arrangements
from loopd.daemon.attach import Attaches
from loopd.daemon.audit import Audit, Event
from loopd.daemon.books import Books
from loopd.daemon.dropping import Dropping
from loopd.daemon.exchange import Answers
from loopd.daemon.foreign import Foreign
from loopd.daemon.granting import Granting
from loopd.daemon.leases import State
from loopd.daemon.metrics import Metrics
from loopd.daemon.numbers import Numbers
from loopd.daemon.operations import Operations
from loopd.daemon.recovery import Recovery
from loopd.daemon.release import Releases
from loopd.daemon.report import Reporter, collect_garbage
from loopd.daemon.reserve import Reservations
from loopd.daemon.service import Listener, Service
from loopd.daemon.slots import Slots
from loopd.daemon.uevents import Uevents
from loopd.daemon.watches import Watches
from loopd.daemon.windows import Windows
from loopd.kernel import sysfs
from loopd.kernel.inotify import Inotify
from loopd.kernel.poller import Poller
from loopd.worker import process
from loopd.worker.access import Access
from loopd.worker.grants import ROOT, Grants
from loopd.worker.jobs import JOBS
from loopd.worker.make import make
from loopd.worker.process import Tools

WORKERS = Sizes(base=4, most=64, rest=2)
"""A worker takes some 4 MiB, and 3 ms to fork."""
STATE_DIRECTORY = "/var/lib/loopd"


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


class Daemon:
    """The running daemon."""

    STOP_TIMEOUT = 5.0
    """Seconds that the end may take: requests under way, and the nodes of leases that nothing else will keep."""

    MOST_BUGS = 100
    """Bugs outside of any request that one daemon survives."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._bugs = 0
        self._flushing = False
        if os.uname().sysname != "Linux" or sys.version_info < (3, 11):
            raise setup.CannotStart("loopd needs Linux and Python 3.11 or later")
        limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        if limit < most:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        passed = setup.passed()
        notifier = manager.Notifier()
        self._options = options
        self._poller = Poller()
        self._children = Children(self._poller)
        self._audit = Audit(self._children, options.instance)
        listeners = setup.listeners(passed)
        self._reporter = Reporter(self._poller, notifier, manager.watchdog_interval())
        self._stopping = False
        self._catch_signals()
        self._build(listeners, notifier)
        for name, fd in passed:
            if name == setup.SLOT:
                self._recovery.read(socket.socket(fileno=fd))
        self._uevents = Uevents(self._books, self._foreign, self._arrangements)
        self._recovery.go_on()
        self._service.start()

    def _build(self, listeners: list[Listener], notifier: manager.Notifier) -> None:
        """Make the parts of the daemon, each from the parts that it needs."""
        options = self._options
        sockets = [listener.socket for listener in listeners]
        access = Access(sysfs.mount())
        control = setup.control(access)
        policy, mistake = self._policy_at_start()
        # Instances share the state directory. An instance that is started by hand may have any name.
        service = (f"loopd@{options.instance}" if options.instance else "loopd").replace("/", "-")
        counter = setup.counter(options.state_directory, options.instance, control, self._audit)
        bindings = setup.bindings(os.path.join(options.state_directory, f"bindings.{service}"))
        watches = Inotify()
        grants = Grants(options.grant_directory, options.instance)
        tools = Tools(sockets, control, access, grants, bindings, watches.fd)
        role = Role("worker", lambda channel: process.main(channel, tools, JOBS), lambda: tools.fds)
        maker = Role("make", lambda channel: make(channel, control, access), lambda: [control.fileno(), *access.fds])
        self._pool = Pool(self._children, role, WORKERS, lambda: self._service.serve_waiting())  # noqa: PLW0108  # made below
        self._books = books = Books(
            self._poller, self._pool,
            Numbers(counter, self._children, maker, lambda number: self._foreign.on_number(number)),  # noqa: PLW0108
            Slots(notifier, manager.fd_store_size()), self._audit,
            Metrics(service, os.path.join(options.state_directory, f"metrics.{service}")), policy, options.instance,
        )  # fmt: skip
        books.mistake = mistake
        releases = Releases(books)
        self._arrangements = Arrangements(books)
        self._watches = Watches(books, watches, releases.release, self._arrangements.on_closed)
        releases.watches = self._arrangements.watches = self._watches
        self._releases = releases
        self._foreign = Foreign(books, releases, bindings)
        self._granting = granting = Granting(books)
        self._recovery = Recovery(books, self._watches, releases, self._arrangements, bindings, granting)
        reservations = Reservations(books, self._recovery.abandon)
        windows = self._arrangements.windows = Windows(books, reservations, releases)
        windows.look = self._arrangements.look_again
        answers = Answers(books, sockets, by_hand=os.geteuid() == 0)
        self._dropping = Dropping(self._children, sockets)
        self._operations = Operations(books, releases, self._arrangements, lambda: self._hanging)
        attaches = Attaches(books, answers, self._watches, releases, reservations, windows)
        self._service = Service(
            books, listeners, self._dropping, answers, attaches, reservations, granting, self._operations
        )

    # Policy and signals -----------------------------------------------------------------------------------------------

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
            self._books.policy = self._load_policy()
            self._books.mistake = ""
        except policy.ConfigurationError as error:
            still = "The old policy stays in force"
            if self._books.mistake:
                still, self._books.mistake = "Nothing is attached, as before", str(error)
            for file, key, reason in error.problems:
                self._audit.record(Event.WARNED, f"{still}: {file}: {key}: {reason}", path=file)
            return
        self._audit.record(Event.RELOADED, "The policy was read again", path=self._options.config)

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
                self._children.reap()
            elif number == signal.SIGHUP:
                self._reload()
            elif number in (signal.SIGTERM, signal.SIGINT):
                self._stopping = True

    # Running ----------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until a signal or idleness ends it."""
        self._reporter.begin(self._status)
        # The request that started the daemon waits in a queue; it is served before the first check.
        self._poller.later(self._books.policy.idle_timeout, self._idle_check)
        while not self._stopping:
            self._turn()
        self._stop()

    FLUSH_PAUSE = 0.1
    """Seconds after which records are offered again to a journal that took none."""

    def _turn(self) -> None:
        """One round of events. A bug is recorded, and the other events go on. After `MOST_BUGS` the daemon ends, and
        the service manager starts another one with every lease.
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
        self._reporter.look(self._status)

    def _flush(self) -> None:
        self._flushing = False
        self._audit.flush()

    @property
    def _hanging(self) -> int:
        return self._pool.lost + self._dropping.hanging

    @property
    def _status(self) -> str:
        """What ``systemctl status`` shows."""
        leases, requests = len(self._books.leases), self._service.under_way
        work = f"{leases} leases, {requests} requests under way, {self._hanging} worker processes hanging"
        if self._books.mistake:
            wrong = " ".join(self._books.mistake.split("\n"))
            return f"Nothing is attached, the configuration is wrong: {wrong} - {work}"
        return work

    @property
    def _busy(self) -> bool:
        """Whether there is anything to hold, to do or to remember."""
        numbers = self._books.numbers
        at_work = self._service.under_way or len(self._books.leases) or self._pool.busy or numbers.busy
        burning = self._books.accounts.burning or self._granting.burning
        return bool(at_work or numbers.removals.lingering or burning or self._audit.waiting)

    def _idle_check(self) -> None:
        collect_garbage()
        idle = time.monotonic() - self._service.last_activity
        timeout = self._books.policy.idle_timeout
        if not self._busy and idle >= timeout:
            self._stopping = True
            return
        if idle >= timeout:
            self._pool.shrink()
            self._dropping.rest()
        self._poller.later(max(0.05, timeout - idle if idle < timeout else timeout), self._idle_check)

    # The end ----------------------------------------------------------------------------------------------------------

    def _stop(self) -> None:
        """Finish what is under way; release leases that no fd store keeps; leave the others to the fd store."""
        self._reporter.stopping()
        self._service.stop()
        if not self._reporter.present:
            for lease in list(self._books.leases):
                start(self._releases.release(lease, "stopped"))
        self._books.numbers.remove_unused(held=len(self._books.leases) > 0)
        deadline = time.monotonic() + self.STOP_TIMEOUT
        self._poller.later(self.STOP_TIMEOUT, lambda: None)
        while self._ending and time.monotonic() < deadline:
            self._turn()
        self._books.metrics.save()
        self._audit.drain(1.0)

    @property
    def _ending(self) -> bool:
        """Whether something is still to be done that the fd store does not keep."""
        # A client that waits for the end of a lease asks the next daemon.
        requests = self._service.under_way > self._operations.waiting
        ends = not self._reporter.present and any(lease.state is State.RELEASING for lease in self._books.leases)
        return bool(requests or self._pool.busy or self._books.numbers.busy or ends)


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
    except setup.CannotStart as error:
        return _cannot_start(options, [str(error)])
    daemon.run()
    return 0


def _cannot_start(options: argparse.Namespace, reasons: list[str]) -> int:
    """Say why, in the audit where standard error is the journal; the exit status."""
    with contextlib.suppress(ImportError):
        if manager.logs_to_journal() and not options.check_config:
            manager.library()  # which the child that writes the audit needs, too
            audit = Audit(Children(Poller()), options.instance)
            for reason in reasons:
                audit.record(Event.FAILED, reason)
            audit.drain(1.0)
            return 1
    for reason in reasons:
        print(f"loopd: {reason}", file=sys.stderr)
    return 1
