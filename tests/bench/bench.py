"""make bench: what loopd costs, beside the bare system calls, a broker in C that does no more, and losetup.

Real daemons with a stand-in for the fd store, real devices. What is compared is measured in turns, in rounds, so that
what else happens on the machine happens to both. `usage: bench.py [--quick] [--only SECTION ...] [--output DIR]`;
`--quick` shows that everything works, and its figures say nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from report import Row, alone, compared, load, plot, save, table, write_into
from support import untouched
from support.daemon import ROOT, Daemon, ask, bound_to, eventually  # the path is set above
from support.fuse_never import Never
from support.kept import Kept
from support.processes import Child
from support.untouched import LONG_QUEUE, cgroup, pair, reply_of, send

import loopd
from loopd.loop import Loop
from loopd.protocol import wire

FLOOR = "C floor"
BURNING = "C floor, each number once"
"""The same with what else the promise takes that a node which somebody kept leads nowhere: a new number is made for
each device, and removed. loopd makes them ahead.
"""
PYTHON = "Python floor"
IN_TWO = "Python floor, two processes"
"""The C floor's steps in Python, without a check as there; and with a second process that touches the client's fds."""
CONFIGURATION = """
request_timeout = 2
idle_timeout = {idle_timeout}
[limits]
devices = 10000
requests = {requests}
new_numbers = {new_numbers}
"""
"""The one account of the measurements has what in real operation a hundred have."""
MIB = 1 << 20


class Bench:
    """Where everything lies, how long everything is measured, and what measures it."""

    def __init__(self, directory: Path, *, quick: bool) -> None:
        self.directory = directory
        self.quick = quick
        self.nodes = directory / "dev"
        self.nodes.mkdir()
        self.image = directory / "image"
        self.image.touch()
        os.truncate(self.image, 16 * MIB)
        self._program = directory / "floor"
        source = Path(__file__).with_name("floor.c")
        subprocess.run(["cc", "-O2", "-Wall", "-Wextra", "-o", str(self._program), str(source)], check=True)
        self._count = 0
        self.python = os.path.realpath(sys.executable)

    def size(self, full: int, quick: int) -> int:
        """How much of something: in full, or for a quick look."""
        return quick if self.quick else full

    @contextlib.contextmanager
    def daemon(
        self, kind: type[Daemon] = Kept, launcher: tuple[str, ...] = (), **options: float
    ) -> Iterator[Daemon]:
        """A daemon that is ready."""
        self._count += 1
        home = self.directory / f"daemon{self._count}"
        home.mkdir()
        configuration = home / "loopd.toml"
        usual = {"idle_timeout": 30, "new_numbers": 100_000, "requests": 1000}
        configuration.write_text(CONFIGURATION.format_map(usual | options))
        daemon = kind(home, [f"--config={configuration}"], [], {})
        daemon.launcher = list(launcher)
        daemon.start()
        try:
            assert daemon.hello().code is None
            yield daemon
        finally:
            daemon.stop()

    @contextlib.contextmanager
    def floor(self, mode: str = "serve") -> Iterator[str]:
        """The broker in C; its socket. With "burn" no number serves twice; "1" and "2" are processes, in Python."""
        path = self.directory / f"{mode}.sock"
        path.unlink(missing_ok=True)
        command = [str(self._program), mode, str(path)]
        if mode.isdigit():
            command = [self.python, "-I", "-S", str(Path(__file__).with_name("floor.py")), str(path), mode]
        with subprocess.Popen(command) as server:
            try:
                eventually(path.exists, "the floor listens")
                yield str(path)
                eventually(lambda: not bound_to(self.image), "the floor has released everything")
            finally:
                server.kill()

    def _measure(self, *arguments: object) -> list[float]:
        command = [str(self._program), *map(str, arguments)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        lines = done.stdout.split()
        assert "failed" not in lines, f"{lines.count('failed')} of {len(lines)} attaches failed: {done.stderr[-500:]}"
        return [int(line) / 1e6 for line in lines]

    def attaches(self, path: str, count: int, pause: int = 2000, clients: int = 1) -> list[float]:
        """Round trips of the client in C, in milliseconds; each device is given back before the next is asked for."""
        return self._measure("attach", path, self.image, self.nodes, count, pause, clients)

    def raw(self, count: int) -> list[float]:
        """The same system calls without a broker, in milliseconds."""
        return self._measure("raw", self.image, self.nodes, count, 2000)


def timed(count: int, act: Callable[[], object]) -> list[float]:
    """How long an action takes, in milliseconds."""
    took = []
    for _ in range(count):
        start = time.perf_counter()
        act()
        took.append((time.perf_counter() - start) * 1000)
    return took


def in_turns(rounds: int, subjects: dict[str, Callable[[], list[float]]]) -> dict[str, list[list[float]]]:
    """Measure each in turn, so many times."""
    found: dict[str, list[list[float]]] = {name: [] for name in subjects}
    for _ in range(rounds):
        for name, measure in subjects.items():
            found[name].append(measure())
    return found


# Sections -----------------------------------------------------------------------------------------------------------


def attach(bench: Bench) -> list[Row]:
    """The way of one attach, alone."""
    count = bench.size(100, 5)

    def losetup() -> None:
        command = ["losetup", "--find", "--show", str(bench.image)]
        names.append(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())

    def with_losetup() -> list[float]:
        took = timed(count // 5, losetup)
        while names:
            subprocess.run(["losetup", "--detach", names.pop()], check=True)
        return took

    def library() -> None:
        devices.append(loopd.attach(bench.image, bench.nodes, socket=daemon.path))

    def with_library() -> list[float]:
        took = []
        for _ in range(count):
            took += timed(1, library)
            devices.pop().close()
            time.sleep(0.002)
        return took

    names: list[str] = []
    devices: list[loopd.Device] = []
    with bench.daemon() as daemon, bench.floor() as floor, bench.floor("burn") as burning, \
            bench.floor("1") as python, bench.floor("2") as in_two:  # fmt: skip
        bench.attaches(daemon.path, count)
        found = in_turns(bench.size(9, 2), {
            "bare system calls": lambda: bench.raw(count),
            FLOOR: lambda: bench.attaches(floor, count),
            BURNING: lambda: bench.attaches(burning, count),
            PYTHON: lambda: bench.attaches(python, count),
            IN_TWO: lambda: bench.attaches(in_two, count),
            "loopd": lambda: bench.attaches(daemon.path, count),
            "loopd, Python client": with_library,
            "losetup, a process": with_losetup,
        })  # fmt: skip
    pause = 100_000  # the kernel takes half of that to remove a number
    with bench.daemon(new_numbers=16) as daemon, bench.floor() as floor:
        bench.attaches(daemon.path, 20, pause)
        used = in_turns(bench.size(5, 2), {
            FLOOR: lambda: bench.attaches(floor, count // 2, pause),
            "loopd": lambda: bench.attaches(daemon.path, count // 2, pause),
        })  # fmt: skip
    rows = []
    for name, reach in (("loopd", 2.0), ("loopd, Python client", None), ("losetup, a process", None),
                        ("bare system calls", None), (BURNING, None), (PYTHON, None), (IN_TWO, None)):  # fmt: skip
        rows += [
            compared("attach", name, found[name], FLOOR, found[FLOOR], percent, reach=reach if percent == 50 else None)
            for percent in (50, 99)
        ]
    name = "loopd, a number that the account had before"
    rows += [compared("attach", name, used["loopd"], FLOOR, used[FLOOR], percent) for percent in (50, 99)]
    return rows


def crowd(bench: Bench) -> list[Row]:
    """Many clients at once, each of which asks for the next device as soon as it has one."""
    rows = []
    with bench.daemon() as daemon, bench.daemon(launcher=LONG_QUEUE) as long, bench.floor() as floor, \
            bench.floor("burn") as burning:  # fmt: skip
        brokers = {FLOOR: floor, BURNING: burning, "loopd": daemon.path, "a queue of 512": long.path}
        for clients in (1, 8, 64):
            count = bench.size(50 if clients > 1 else 400, 2)
            subjects = list(brokers) if clients == 64 else [FLOOR, BURNING, "loopd"]
            for pause, name in ((0, ""), (50000, ", 50 ms apart")):
                if pause and clients == 1:
                    continue
                took: dict[str, list[list[float]]] = {subject: [] for subject in subjects}
                rates: dict[str, list[list[float]]] = {subject: [] for subject in subjects}
                for _ in range(bench.size(3, 1)):
                    for subject in subjects:
                        start = time.perf_counter()
                        took[subject].append(bench.attaches(brokers[subject], count, pause, clients))
                        rates[subject].append([len(took[subject][-1]) / (time.perf_counter() - start)])
                        eventually(lambda: not bound_to(bench.image), "everything is released", 60)
                what = f"{clients} clients{name}" if clients > 1 else "1 client"
                if not pause:
                    rows.append(compared("crowd", f"{what}, attaches in a second", rates["loopd"], FLOOR, rates[FLOOR],
                                         unit="/s")._replace(what=f"{what}, attaches in a second"))  # fmt: skip
                for subject in subjects[2:]:
                    which = what if subject == "loopd" else f"{what}, {subject}"
                    rows.append(alone("crowd", which, took[subject], 50))
                    rows.append(alone("crowd", which, took[subject], 99, reach=20.0 if clients == 64 else None))
                rows += [alone("crowd", f"{what}, {broker}", took[broker], 99) for broker in (FLOOR, BURNING)]
    return rows


def _memory(daemon: Daemon) -> tuple[float, float]:
    """Resident memory of the main process, and what all processes have together, shared pages counted once; MiB."""
    status = Path(f"/proc/{daemon.pid}/status").read_text()
    resident = int(status.partition("VmRSS:")[2].split()[0]) / 1024
    together = 0.0
    for pid in {*daemon.family(), daemon.pid}:
        if pid == getattr(daemon, "manager", 0):
            continue
        with contextlib.suppress(OSError):
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            together += int(rollup.partition("\nPss:")[2].split()[0]) / 1024
    return resident, together


def _ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


REST = 3
"""Seconds after which a daemon that holds something ends the helpers that it does not need."""


def leases(bench: Bench) -> list[Row]:
    """The cost of live leases: of an attach beside them, of their memory and files, and of their being there."""
    levels = (0, 10, 100, 1000, 4000) if not bench.quick else (0, 10, 20)
    count = bench.size(60, 5)
    memory: dict[int, tuple[float, float]] = {}
    took: dict[int, list[list[float]]] = {}
    files: dict[int, int] = {}

    def hold(tell: Callable[[Any], None]) -> None:
        pidfd = os.pidfd_open(os.getpid())
        fds = [os.open(bench.image, os.O_RDWR), os.open(bench.nodes, os.O_DIRECTORY), pidfd]
        request = wire.encode_request(wire.Attach(0, 1, 3, 2))
        held = 0
        for level in levels:
            for held in range(held, level):  # noqa: B020, B007  # goes on where it was
                with contextlib.closing(ask(path, request, fds)) as reply:
                    assert reply.code is None, reply.fields
            held = level
            tell(level)
            while not (bench.directory / f"level{level}").exists():
                time.sleep(0.01)
        time.sleep(3600)

    with bench.daemon(idle_timeout=REST) as daemon:
        path = daemon.path
        with Child(hold) as child:
            for level in levels:
                assert child.hear() == level
                bench.attaches(path, count)
                took[level] = [bench.attaches(path, count) for _ in range(bench.size(5, 1))]
                if level:  # with nothing to hold the daemon would end
                    time.sleep(bench.size(2 * REST + 1, 0))
                memory[level] = _memory(daemon)
                files[level] = len(os.listdir(f"/proc/{daemon.pid}/fd"))
                if level < levels[-1]:
                    (bench.directory / f"level{level}").touch()
            time.sleep(1)
            before, since = _ticks(daemon.pid), time.monotonic()
            time.sleep(bench.size(10, 1))
            idle = (_ticks(daemon.pid) - before) * 10 / (time.monotonic() - since)
        eventually(lambda: not daemon.ask(wire.Leases(0), []).fields["leases"], "every lease is over", 120)
        took[-10] = [bench.attaches(path, count) for _ in range(bench.size(5, 1))]
    rows = [
        compared("leases", f"attach with {level:,} leases", took[level], "with 10", took[10],
                 reach=1.3 if level == levels[-1] else None)
        for level in (*levels[2:],)
    ]  # fmt: skip
    rows.append(compared("leases", "attach after their end", took[-10], "with 10", took[10]))
    most = 1000 if 1000 in levels else levels[-1]
    for level in (0, 100, 1000, 4000):
        if level in memory:
            reach = 40.0 if level == 1000 else None
            rows.append(Row("leases", f"memory of the main process, {level:,} leases", memory[level][0], "MiB",
                            reach=reach))  # fmt: skip
            rows.append(Row("leases", f"memory of all its processes, {level:,} leases", memory[level][1], "MiB",
                            reach=reach))  # fmt: skip
    rows.append(Row("leases", "memory of one lease", (memory[most][0] - memory[0][0]) * 1024 / most, "KiB"))
    rows.append(Row("leases", "open files of one lease", (files[most] - files[0]) / most, "files"))
    rows.append(Row("leases", f"CPU time of {levels[-1]:,} idle leases", idle, "ms/s", reach=1.0))
    return rows


def release(bench: Bench) -> list[Row]:
    """From the request to detach, and from the end of what keeps a lease, until the image is free."""
    image = os.open(bench.image, os.O_RDWR)
    directory = os.open(bench.nodes, os.O_DIRECTORY)
    count = bench.size(100, 5)

    def attached() -> str:
        reply = daemon.attach(image, directory)
        held.append(reply)
        return str(reply.fields["devname"])

    def detach() -> list[float]:
        took = []
        for _ in range(count):
            name = attached()
            took += timed(1, lambda name=name: daemon.ask(wire.Detach(name, 0, wait=5), []).close())  # type: ignore[misc]
            assert not os.path.exists(f"/sys/block/{name}/loop")
            held.pop().close()
        return took

    def hang_up() -> list[float]:
        took = []
        for _ in range(count):
            path = f"/sys/block/{attached()}/loop"

            def gone(path: str = path) -> None:
                held.pop().close()
                while os.path.exists(path):
                    time.sleep(0.0001)

            took += timed(1, gone)
        return took

    def with_losetup() -> list[float]:
        took = []
        for _ in range(count // 5):
            command = ["losetup", "--find", "--show", str(bench.image)]
            name = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
            took += timed(1, lambda name=name: subprocess.run(["losetup", "--detach", name], check=True))  # type: ignore[misc]
        return took

    held: list[Any] = []
    with bench.daemon() as daemon:
        found = in_turns(bench.size(5, 2), {
            "detach": detach, "end of the lease": hang_up, "losetup --detach": with_losetup,
        })  # fmt: skip
    os.close(image)
    os.close(directory)
    return [
        compared("release", f"{name} until the image is free", found[name], "losetup --detach",
                 found["losetup --detach"], percent)
        for name in ("detach", "end of the lease") for percent in (50, 99)
    ]  # fmt: skip


class _Installed(Daemon):
    """A daemon as it is installed: the system's interpreter, isolated, without site-packages."""

    def start(self) -> None:
        self._options = ["--state-directory", str(self.state), *self._options]
        activate = str(shutil.which("systemd-socket-activate"))
        program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from loopd.daemon import main; sys.exit(main())"
        command = [activate, "--datagram", "-l", self.path, "--fdname=loopd", os.path.realpath(sys.executable), "-ISc"]
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, program, *self._options], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        eventually(lambda: Path(self.path).exists(), "the socket is there")


def start(bench: Bench) -> list[Row]:
    """From the first datagram, which starts the daemon, to its answer."""

    def first() -> list[float]:
        took = []
        for _ in range(bench.size(3, 1)):
            bench._count += 1
            home = bench.directory / f"daemon{bench._count}"
            home.mkdir()
            daemon = _Installed(home, [], [], {})
            daemon.state.mkdir()
            if counters:
                shutil.copy(counters[0], daemon.state / "numbers")
            daemon.start()
            time.sleep(0.05)
            try:
                took += timed(1, daemon.hello)
            finally:
                daemon.stop()
            counters[:] = [daemon.state / "numbers"]
        return took

    counters: list[Path] = []
    first()  # compiles the modules, and makes the number counter
    found = in_turns(bench.size(7, 1), {
        "loopd": first,
        "python3 -c pass": lambda: timed(3, lambda: subprocess.run([bench.python, "-c", "pass"], check=True)),
        "python3 -IS -c pass": lambda: timed(3, lambda: subprocess.run([bench.python, "-ISc", "pass"], check=True)),
    })  # fmt: skip
    reach = 6.0
    return [
        compared("start", "first datagram to answer", found["loopd"], name, found[name], reach=reach if last else None)
        for name, last in (("python3 -c pass", True), ("python3 -IS -c pass", False))
    ]


def drop_in(bench: Bench) -> list[Row]:
    """The stand-in for losetup beside losetup; most of it is the start of an interpreter."""
    environment = {**os.environ, "LOOPD_DIRECTORY": str(bench.nodes)}
    programs = bench.nodes.parent / "bin"
    pack = [bench.python, str(ROOT / "systemd/packaging/stand_ins.py"), str(programs), "losetup:losetup"]
    subprocess.run(pack, check=True)
    stand_in = [str(programs / "losetup")]

    def run(command: list[str]) -> str:
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        return done.stdout.strip()

    def cycles(command: list[str]) -> Callable[[], list[float]]:
        def measure() -> list[float]:
            took = []
            for _ in range(count):
                took += timed(1, lambda: names.append(run([*command, "--find", "--show", str(bench.image)])))
                run([*command, "--detach", names.pop()])
            return took

        return measure

    count = bench.size(10, 1)
    names: list[str] = []
    with bench.daemon() as daemon:
        environment["LOOPD_SOCKET"] = daemon.path
        found = in_turns(bench.size(7, 2), {
            "drop-in": cycles(stand_in),
            "losetup": cycles(["losetup"]),
            "python3 -I -S -c pass": lambda: timed(count, lambda: run([bench.python, "-IS", "-c", "pass"])),
        })  # fmt: skip
    return [
        compared("drop-in", "losetup --find --show", found["drop-in"], name, found[name])
        for name in ("losetup", "python3 -I -S -c pass")
    ]


# Input and output ---------------------------------------------------------------------------------------------------

SYS_CACHESTAT = 451
"""Linux 6.5; the same number on every architecture."""


def _cached(*paths: str) -> float:
    """The pages of files and devices that the page cache has, in MiB."""
    total = 0
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            everything = (ctypes.c_uint64 * 2)(0, 0)
            found = (ctypes.c_uint64 * 5)()
            if ctypes.CDLL(None, use_errno=True).syscall(SYS_CACHESTAT, fd, everything, found, 0) < 0:
                raise OSError(ctypes.get_errno(), "cachestat")
            total += found[0]
        finally:
            os.close(fd)
    return total * os.sysconf("SC_PAGE_SIZE") / MIB


def _fio(path: str, *, size: int, seconds: int, rw: str, block: str, direct: bool, depth: int = 1) -> float:
    """Throughput in MiB a second."""
    command = [
        "fio", "--name=bench", f"--filename={path}", f"--rw={rw}", f"--bs={block}", f"--size={size}M",
        f"--direct={int(direct)}", "--end_fsync=1", f"--iodepth={depth}", "--output-format=json",
        "--ioengine=libaio" if direct else "--ioengine=psync",
    ]  # fmt: skip
    if rw != "write":
        command += ["--time_based", f"--runtime={seconds}"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=os.path.dirname(path))
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    side = "write" if "write" in rw else "read"
    return float(job[side]["bw_bytes"]) / MIB


IO = (
    ("write 1 MiB, O_DIRECT", {"rw": "write", "block": "1M", "direct": True}),
    ("write 1 MiB, buffered", {"rw": "write", "block": "1M", "direct": False}),
    ("write 4 KiB at random, O_DIRECT", {"rw": "randwrite", "block": "4k", "direct": True, "depth": 16}),
    ("read 4 KiB at random, O_DIRECT", {"rw": "randread", "block": "4k", "direct": True, "depth": 16}),
)
MODES = {"direct_io: auto": "auto", "direct_io: off": "off"}


def io(bench: Bench) -> list[Row]:
    """Through the device, with and without direct I/O to the backing file."""
    size = bench.size(1024, 8)
    path = bench.directory / "io"
    rates: dict[str, dict[str, list[list[float]]]] = {name: {mode: [] for mode in MODES} for name, _ in IO}
    left: dict[str, list[list[float]]] = {mode: [] for mode in MODES}
    lived: dict[str, list[list[float]]] = {mode: [] for mode in MODES}
    with bench.daemon() as daemon:
        for _ in range(bench.size(3, 1)):
            for mode, value in MODES.items():
                path.unlink(missing_ok=True)
                path.touch()
                os.truncate(path, size * MIB)
                for name, job in IO:
                    with loopd.attach(
                        path, bench.nodes, socket=daemon.path, direct_io=value,  # type: ignore[arg-type]
                    ) as device:  # fmt: skip
                        rates[name][mode].append([_fio(device.path, size=size, seconds=bench.size(2, 1), **job)])  # type: ignore[arg-type]
                        cached = _cached(str(path), device.path)
                    if name == "write 1 MiB, buffered":
                        lived[mode].append([cached])
                    elif name == "write 1 MiB, O_DIRECT":
                        left[mode].append([_cached(str(path))])
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        path.unlink()
    auto, off = MODES
    rows = [
        compared("io", name, found[auto], off, found[off], unit="MiB/s")._replace(what=name)
        for name, found in rates.items()
    ]
    floor = 1e-3  # nothing left at all is a ratio too
    for what, found, reach in (
        (f"page cache left by {size} MiB", left, 0.1),
        (f"page cache while the device lives, {size} MiB written buffered", lived, None),
    ):
        measured = {mode: [[max(floor, one[0])] for one in found[mode]] for mode in MODES}
        row = compared("io", what, measured[auto], off, measured[off], unit="MiB", reach=reach)
        rows.append(row._replace(what=what))
    return rows


# Honest clients beside others ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def _other(act: Callable[[Callable[[Any], None]], None]) -> Iterator[Child]:
    """A process of another account."""
    with cgroup(f"loopd-bench-{os.getpid()}") as enter:
        assert enter is not None, "no cgroup hierarchy to make a second account in"

        def body(tell: Callable[[Any], None]) -> None:
            enter()
            act(tell)

        with Child(body) as child:
            yield child


def _flood(path: str, count: int) -> Callable[[Callable[[Any], None]], None]:
    def act(tell: Callable[[Any], None]) -> None:
        tell("ready")
        untouched.flood(path, count)
        tell("sent")

    return act


def flood(bench: Bench) -> list[Row]:
    """Honest clients while another account sends datagrams as fast as they are taken."""
    many = bench.size(10_000, 50)
    count = bench.size(100, 3)
    found: dict[str, list[list[float]]] = {"quiet": [], "same": [], "long": [], "own": []}
    # As many requests as an account has by default.
    usual: dict[str, Any] = {"idle_timeout": 600, "requests": 32}
    with (
        bench.daemon(Daemon, **usual) as flooded,
        bench.daemon(Daemon, LONG_QUEUE, **usual) as long,
        bench.daemon(Daemon, **usual) as own,
    ):
        for _ in range(bench.size(7, 1)):
            found["quiet"].append(bench.attaches(own.path, count))
            for name, target, daemon in (("same", flooded, flooded), ("long", long, long), ("own", flooded, own)):
                with _other(_flood(target.path, many)) as child:
                    assert child.hear() == "ready"
                    found[name].append(bench.attaches(daemon.path, count))
                    assert child.hear() == "sent"
    rows = [
        alone("flood", f"attach on the flooded socket{queue}", found[name], percent,
              reach=10.0 if percent == 99 else None)
        for name, queue in (("same", ""), ("long", ", a queue of 512")) for percent in (50, 99)
    ]  # fmt: skip
    rows += [
        compared("flood", "attach at an instance of one's own", found["own"], "no flood", found["quiet"], percent,
                 reach=2.0 if percent == 99 else None)
        for percent in (50, 99)
    ]  # fmt: skip
    return rows


def hang(bench: Bench) -> list[Row]:
    """Honest clients while another account's files never answer."""
    count = bench.size(100, 3)
    found: dict[str, list[list[float]]] = {"quiet": [], "hanging": []}
    with bench.daemon(Daemon, idle_timeout=600) as daemon:
        for number in range(bench.size(3, 1)):
            found["quiet"].append(bench.attaches(daemon.path, count))
            never = Never(bench.directory / f"never{number}")
            path = bench.directory / f"never{number}" / "file"

            def act(tell: Callable[[Any], None], path: Path = path) -> None:
                files = [os.open(path, os.O_RDWR) for _ in range(6)]
                tell("open")
                for file in files:
                    ours, theirs = pair()
                    with ours, theirs:
                        send(daemon.path, b'{"op": "hello", "reply_fd": 0}', [theirs.fileno(), file]).close()
                        with contextlib.suppress(TimeoutError):
                            reply_of(ours, 1)
                tell("sent")
                signal.pause()

            try:
                with _other(act) as child:
                    assert child.hear() == "open"
                    never.mute()
                    assert child.hear() == "sent"
                    found["hanging"].append(bench.attaches(daemon.path, count))
                    never.end()
            finally:
                never.end()
    return [
        compared("hang", "attach while another's FUSE files hang", found["hanging"], "without", found["quiet"], percent,
                 reach=2.0 if percent == 99 else None)
        for percent in (50, 99)
    ]  # fmt: skip


def _lists(
    path: str, image: Path, nodes: Path, devices: int, partitions: int
) -> Callable[[Callable[[Any], None]], None]:
    def act(tell: Callable[[Any], None]) -> None:
        fds = [os.open(image, os.O_RDWR), os.open(nodes, os.O_DIRECTORY)]
        held = [ask(path, wire.encode_request(wire.Attach(0, 1, 2, partscan=True)), fds, timeout=60)
                for _ in range(devices)]  # fmt: skip
        for reply in held:
            with Loop(int(reply.fields["devname"][4:])) as loop:
                for number in range(1, partitions + 1):
                    loop.add_partition(number, number << 13, 1 << 13)
        time.sleep(2)  # loopd has made the nodes by then
        tell("ready")
        waiting: list[Any] = []
        while True:
            ours, theirs = pair()
            with theirs:
                send(path, wire.encode_request(wire.Leases(0)), [theirs.fileno()]).close()
            waiting.append(ours)
            if len(waiting) == LISTS:
                with waiting.pop(0) as first, contextlib.suppress(OSError):
                    reply_of(first, 60)

    return act


LISTS = 16
"""Requests that the client which lists all the time has under way."""


def _storm(path: str, image: Path, nodes: Path, partitions: int) -> Callable[[Callable[[Any], None]], None]:
    def act(tell: Callable[[Any], None]) -> None:
        fds = [os.open(image, os.O_RDWR), os.open(nodes, os.O_DIRECTORY)]
        reply = ask(path, wire.encode_request(wire.Attach(0, 1, 2, partscan=True)), fds)
        with Loop(int(reply.fields["devname"][4:])) as loop:
            for number in range(1, partitions + 1):
                loop.add_partition(number, number << 13, 1 << 13)
            tell("ready")
            while True:
                loop.set_capacity()

    return act


def share(bench: Bench) -> list[Row]:
    """Honest clients while another account has main do what it can be made to do."""
    count = bench.size(300, 3)
    few, many, most = bench.size(18, 2), bench.size(250, 4), bench.size(255, 8)
    others: dict[str, Callable[[str], Callable[[Callable[[Any], None]], None]]] = {
        f"another lists {few} devices with {most} partitions":
            lambda path: _lists(path, bench.image, bench.nodes, few, most),
        f"another lists {many} devices": lambda path: _lists(path, bench.image, bench.nodes, many, 0),
        f"another makes uevents of a device with {most} partitions":
            lambda path: _storm(path, bench.image, bench.nodes, most),
    }  # fmt: skip
    quiet: list[list[float]] = []
    found: dict[str, list[list[float]]] = {name: [] for name in others}
    with bench.daemon(Daemon, idle_timeout=600, requests=32) as daemon:

        def hello() -> list[float]:
            took = []
            for _ in range(count):
                took += timed(1, lambda: ask(daemon.path, wire.encode_request(wire.Hello(0)), [], timeout=60).close())
                time.sleep(0.002)
            return took

        for _ in range(bench.size(3, 1)):
            quiet.append(hello())
            for name, act in others.items():
                with _other(act(daemon.path)) as child:
                    assert child.hear() == "ready"
                    found[name].append(hello())
                eventually(lambda: not bound_to(bench.image), "everything is released", 60)
    return [
        compared("share", f"hello while {name}", found[name], "alone", quiet, percent,
                 reach=3.0 if percent == 50 else None)
        for name in others for percent in (50, 99)
    ]  # fmt: skip


SECTIONS = {
    "attach": attach, "crowd": crowd, "leases": leases, "release": release, "start": start, "drop-in": drop_in,
    "io": io, "flood": flood, "hang": hang, "share": share,
}  # fmt: skip


def _machine(bench: Bench) -> dict[str, Any]:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (1 << 30)
    return {
        "mode": "quick" if bench.quick else "full",
        "cpus": os.cpu_count(),
        "memory_gib": round(memory),
        "kernel": ".".join(platform.release().split("-")[0].split(".")[:2]),
        "python": platform.python_version(),
        "load_before": round(os.getloadavg()[0], 1),
        "priority": "real time" if os.sched_getscheduler(0) == os.SCHED_FIFO else f"nice {os.nice(0)}",
        "loopd": loopd.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what loopd costs.")
    parser.add_argument("--quick", action="store_true", help="show that everything works; the figures say nothing")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION",
                        help=f"of {', '.join(SECTIONS)}")  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="DIR", help="where performance.json and performance.png go")
    parser.add_argument("--plot", action="store_true", help="make the PNG too (matplotlib)")
    options = parser.parse_args()
    rows: list[Row] = []
    # On a disk, as images are: /tmp may be a tmpfs, which has no direct I/O.
    with tempfile.TemporaryDirectory(prefix="loopd-bench-", dir="/var/tmp") as directory:
        os.chmod(directory, 0o755)
        bench = Bench(Path(directory), quick=options.quick)
        machine = _machine(bench)
        for name in options.only:
            print(f"{name} ...", file=sys.stderr, flush=True)
            rows += SECTIONS[name](bench)
    print(json.dumps(machine))
    print(table(rows))
    if options.output is not None:
        saved = options.output / "performance.json"
        if saved.exists() and options.only != list(SECTIONS):  # what was not measured again stays
            rows += [row for row in load(saved) if row.section not in options.only]
            rows.sort(key=lambda row: list(SECTIONS).index(row.section))
        save(saved, machine, rows)
        write_into(options.output / "performance.md", rows)
        if options.plot:
            plot(options.output / "performance.png", rows)


if __name__ == "__main__":
    main()
