"""Boots a machine, hands it the project, follows what it reports, and gives up on it at a deadline.

The project goes in as a tar archive on a raw disk, so that the VM sees exactly one state of it. Results come out as
lines of JSON in a file that QEMU writes, so nothing the guest does can block on the host, and what was said is there
however the run ended.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .image import Built, image
from .machines import MACHINES

PROJECT = Path(__file__).resolve().parents[3]
INSIDE = "tests/vm/inside"
# Software emulation by default: it works everywhere and gives the same timing with and without nested virtualisation.
# In one thread, which is no slower here: before QEMU 8.1 (deba78709a there) a CPU could run what another one had half
# patched, and the kernel panicked at an int3.
ACCEL = os.environ.get("LOOPD_VM_ACCEL", "tcg,thread=single")
# What an administrator does to install loopd, from the project's folder. A module that was loaded before takes the
# option of the file for modprobe.d when it is loaded again.
INSTALL = (
    "make install",
    "! [ -d /sys/module/loop ] || modprobe --remove loop",
    "systemctl enable --now loopd.socket",
)
JOURNAL_LINES = 200
CONSOLE_LINES = 40


class RunFailed(Exception):
    """The run as a whole went wrong; the text says how and shows the end of console and journal."""


@dataclass(frozen=True)
class Plan:
    """What the guest is to do: shell commands, then pytest node ids below `folder`; deadlines are seconds."""

    tests: Sequence[str]
    folder: str = INSIDE
    install: Sequence[str] = INSTALL
    test_deadline: int = 120
    boot_deadline: float = 300
    silence_deadline: float = 660


@dataclass(frozen=True)
class Result:
    test: str
    outcome: str
    text: str
    duration: float
    journal: str


def tracked_files() -> list[str]:
    """Every file that is in the working tree and not ignored, committed or not."""
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=PROJECT, stdout=subprocess.PIPE, check=True).stdout.decode()
    return sorted({name for name in listing.split("\0") if name and (PROJECT / name).is_file()})


def packages() -> list[str]:
    """What `make deb rpm venv` has built or brought: ignored by git, and used by a test."""
    found = (path for name in ("build/*.deb", "build/*.rpm", ".venv/bin/act") for path in PROJECT.glob(name))
    return [str(path.relative_to(PROJECT)) for path in found]


def payload(target: Path, plan: Plan) -> None:
    def as_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = 0
        member.uname = member.gname = "root"
        return member

    run = {
        "tests": list(plan.tests),
        "folder": plan.folder,
        "install": list(plan.install),
        "deadline": plan.test_deadline,
        "require_all": os.environ.get("LOOPD_TEST_REQUIRE_ALL", ""),
    }
    with tarfile.open(target, "w") as archive:
        for name in (*tracked_files(), *packages()):
            # A file may go while others work in the tree.
            with contextlib.suppress(FileNotFoundError):
                archive.add(PROJECT / name, name, filter=as_root)
        content = json.dumps(run).encode()
        member = tarfile.TarInfo("run.json")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))


def command_line(built: Built, folder: Path, mode: str) -> list[str]:
    # -cx16: Linux crashes under software emulation with the default CPU. A second one would have the same core of the
    # host, and spin there for the first. no_timer_check: on a busy host the first ticks come late, and Linux panics.
    # A VM does not outlive whoever started it, not even when that is killed.
    command = [
        "setpriv",
        "--pdeathsig",
        "KILL",
        "--",
        "qemu-system-x86_64",
        "-accel",
        ACCEL,
        "-cpu",
        "qemu64,-cx16",
        "-smp",
        "1",
        "-m",
        "3072",
    ]
    command += [
        "-no-reboot",
        "-nodefaults",
        "-nic",
        "none",
        "-display",
        "none",
        "-monitor",
        "none",
        "-device",
        "virtio-rng-pci",
    ]
    command += ["-kernel", str(built.vmlinuz), "-initrd", str(built.initrd)]
    for name, options in (
        ("root", f"file={built.disk},snapshot=on"),
        ("payload", f"file={folder}/payload.tar,readonly=on"),
    ):
        command += ["-drive", f"{options},if=none,id={name},format=raw"]
        command += ["-device", f"virtio-blk-pci,drive={name},serial={name}"]
    command += ["-device", "virtio-serial-pci"]
    for name in ("results", "journal"):
        command += ["-chardev", f"file,id={name},path={folder}/{name}"]
        command += ["-device", f"virtserialport,chardev={name},name=loopd.{name}"]
    command += ["-serial", "stdio" if mode == "shell" else f"file:{folder}/console"]
    kernel = f"rw console=ttyS0 panic=-1 quiet no_timer_check fsck.mode=skip mitigations=off nokaslr loopd.vm={mode}"
    return [*command, "-append", kernel]


@dataclass
class Run:
    """A machine that runs a plan. `result` waits for one test; the run's end answers for all that have no result."""

    machine: str
    folder: Path
    plan: Plan
    hello: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Result] = field(default_factory=dict)
    failure: str = ""
    ended: bool = False
    explained: bool = False

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.stack = contextlib.ExitStack()
        try:
            spec = MACHINES[self.machine]
            built = self.stack.enter_context(image(spec.image, spec.kernel))
            payload(self.folder / "payload.tar", self.plan)
            (self.folder / "results").touch()
            self.stream = self.stack.enter_context((self.folder / "results").open("rb"))
            self.rest = b""
            log = self.stack.enter_context((self.folder / "qemu").open("wb"))
            command = command_line(built, self.folder, "test")
            self.qemu = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            self.stack.callback(self._kill)
        except BaseException:
            self.stack.close()
            raise
        self.started = self.heard = time.monotonic()

    def _kill(self) -> None:
        self.qemu.kill()
        self.qemu.wait()

    def close(self) -> None:
        self.stack.close()

    def result(self, test: str) -> Result:
        """Wait for TEST; RunFailed if the run ended, or has to be ended, without a result of it."""
        while test not in self.results:
            if self.ended or self.failure:
                raise RunFailed(self._explain(self.failure or "the run ended without a result of this test"))
            self._step()
        return self.results[test]

    def finish(self) -> None:
        """Wait for the closing line and the power-off; RunFailed if there is no such line."""
        while not (self.ended or self.failure):
            self._step()
        if self.failure and not self.explained:
            raise RunFailed(self._explain(self.failure))
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.qemu.wait(60)
        self.close()

    def _step(self) -> None:
        running = self.qemu.poll() is None
        lines = self._lines()
        for line in lines:
            self._take(line)
        if self.ended or lines:
            return
        limit = self.plan.silence_deadline if self.hello else self.plan.boot_deadline
        if not running:
            self.failure = f"the VM ended (QEMU's exit status {self.qemu.returncode}) before its closing line"
        elif time.monotonic() - self.heard > limit:
            self.failure = f"the VM was silent for {limit:.0f} s and was killed"
        else:
            time.sleep(0.1)
            return
        self._kill()

    def _lines(self) -> list[bytes]:
        *lines, self.rest = (self.rest + self.stream.read()).split(b"\n")
        return lines

    def _take(self, line: bytes) -> None:
        self.heard = time.monotonic()
        try:
            fields = json.loads(line)
            event = fields.pop("event")
        except (ValueError, KeyError, AttributeError) as error:
            self.failure = f"the VM wrote a line that is no event ({error}): {line[:200]!r}"
            return
        if event == "hello":
            self.hello = fields
        elif event == "installed" and fields["failure"]:
            self.failure = f"loopd could not be installed:\n{fields['failure'].rstrip()}"
        elif event == "uncollected":
            self.failure = f"{fields['test']} could not be loaded in the VM:\n{fields['text']}"
        elif event == "result":
            journal = self._journal_of(fields["test"]) if fields["outcome"] == "failed" else ""
            self.results[fields["test"]] = Result(journal=journal, **fields)
        elif event == "end":
            self.ended = True

    def _journal_of(self, test: str) -> str:
        """What the journal says between the marks around TEST; the stream may be a little behind."""
        deadline = time.monotonic() + 10
        while True:
            text = self._read("journal")
            _, found, after = text.partition(f"]: begin {test}\n")
            inner, ended, _ = after.partition(f"]: end {test}\n")
            if ended or time.monotonic() > deadline:
                return last_lines((inner if found else text).rpartition("\n")[0], JOURNAL_LINES)
            time.sleep(0.2)

    def _read(self, name: str) -> str:
        with contextlib.suppress(FileNotFoundError):
            return (self.folder / name).read_bytes().decode(errors="replace").replace("\r\n", "\n")
        return ""

    def _explain(self, failure: str) -> str:
        """The failure, and the first time what there is to read about it."""
        if self.explained:
            return f"{self.machine}: {failure}\n(console and journal are shown where this happened first)"
        self.explained = True
        console, journal = self._read("qemu") + self._read("console"), self._read("journal")
        return (
            f"{self.machine}: {failure}\n--- end of the console ---\n{last_lines(console, CONSOLE_LINES)}\n"
            f"--- end of the journal ---\n{last_lines(journal, JOURNAL_LINES)}"
        )


def last_lines(text: str, count: int) -> str:
    return "\n".join(text.splitlines()[-count:])


class Together:
    """What runs of one machine, each with a share of the tests, say as if they were one."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._runs = runs
        self._of = {test: run for run in runs for test in run.plan.tests}

    @property
    def hello(self) -> dict[str, Any]:
        return self._runs[0].hello

    @property
    def tests(self) -> Iterable[str]:
        return self._of

    @property
    def results(self) -> dict[str, Result]:
        return {test: result for run in self._runs for test, result in run.results.items()}

    def result(self, test: str) -> Result:
        return self._of[test].result(test)

    def finish(self) -> None:
        for run in self._runs:
            run.finish()


@contextlib.contextmanager
def run(machine: str, folder: Path, plan: Plan) -> Iterator[Run]:
    vm = Run(machine, folder, plan)
    try:
        yield vm
    finally:
        vm.close()


def shell(machine: str, folder: Path) -> int:
    """A VM with loopd installed and a root shell on this terminal; `poweroff` ends it, Ctrl-A X kills it."""
    spec = MACHINES[machine]
    with image(spec.image, spec.kernel) as built:
        payload(folder / "payload.tar", Plan(tests=()))
        command = command_line(built, folder, "shell")
        command[command.index("stdio")] = "mon:stdio"
        print("booting; log in is automatic, `poweroff` ends it, Ctrl-A X kills it", file=sys.stderr)
        return subprocess.run(command, check=False).returncode
