"""The verbs of loopctl: what each asks for, prints and exits with.

Changes when a verb does something else. Asks through `loopd.client` alone. What only one verb needs is imported there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
from typing import Iterator

from loopd.cli import command
from loopd.cli.interrupt import Interrupt
from loopd.cli.output import Failure, clean, explain, fields, put, readable, tell, warn
from loopd.cli.table import EVERYBODYS, GRANTS, OWN, table
from loopd.cli.values import is_device
from loopd.client import api as client
from loopd.protocol import wire


@contextlib.contextmanager
def _lease(lifetime: str) -> Iterator[client.Lifetime]:
    """What `client.attach` takes for the value of --lifetime."""
    if lifetime in ("container", "detach"):
        yield "container"
        return
    parent = os.getppid()
    pid = parent if lifetime == "parent" else int(lifetime)
    try:
        fd = client.pidfd_open(pid)
    except OSError as error:
        raise Failure(f"process {pid}: {error.strerror}") from error
    try:
        # If the parent has ended, its id may be another process's by now. Then this process has a new parent.
        if lifetime == "parent" and os.getppid() != parent:
            raise Failure("the process that called loopctl has ended")
        yield fd
    finally:
        os.close(fd)


def _unproved(args: argparse.Namespace) -> client.Client:
    return client.Client(args.socket or (client.ADMIN_SOCKET if args.admin else None), args.timeout)


def _client(args: argparse.Namespace) -> client.Client:
    asked = _unproved(args)
    # An ordinary socket would answer, but about this user's own leases alone.
    if args.admin and args.socket and "metrics" not in asked.hello().operations:
        raise Failure(f"--admin: {args.socket} is not an administrator's socket; an instance's is admin.sock")
    return asked


def _attached(asked: client.Client, args: argparse.Namespace, lifetime: client.Lifetime) -> client.Device:
    return asked.attach(
        args.image,
        args.directory,
        deliver=args.deliver and (args.deliver,),
        offset=args.offset,
        sizelimit=args.sizelimit,
        sector_size=args.sector_size,
        read_only=args.read_only,
        partscan=args.partscan,
        lock=args.lock,
        direct_io=args.direct_io,
        ref=args.ref,
        lifetime=lifetime,
    )


def _warn(args: argparse.Namespace, device: client.Device) -> None:
    for warning in device.warnings:
        warn(f"warning: {warning}")
    if device.read_only and not args.read_only:
        warn(f"warning: {args.image} cannot be written here, so the device is read-only")
    left = _beyond_the_last_sector(args)
    if left:
        warn(f"warning: {args.image}: the last {left} bytes fill no sector of {args.sector_size}, and are left out")


def _beyond_the_last_sector(args: argparse.Namespace) -> int:
    """Bytes at the end of the image that the device cannot have."""
    with contextlib.suppress(OSError):  # gone or renamed meanwhile
        length = max(0, os.stat(args.image).st_size - args.offset)  # a block device's is 0
        return int(min(length, args.sizelimit or length) % args.sector_size)
    return 0


def attach(args: argparse.Namespace) -> int:
    asked = _client(args)
    # A failure or a signal before the path is printed detaches the device again.
    with Interrupt(asked.withdraw) as ending, _lease(args.lifetime) as lease, _attached(asked, args, lease) as device:
        with ending.raised():
            _warn(args, device)
            path = _lasting(device) if args.deliver == "fd" else device.path
            if args.json:
                fields = {name: getattr(device, name) for name in wire.Attached._fields}
                path = json.dumps({"path": readable(path, "surrogateescape"), **fields}, indent=2)
            put(path)
        device.keep()
    return 0


def _lasting(device: client.Device) -> str:
    """Where a device that was delivered as an fd can be opened after loopctl has ended."""
    path = client.node_path(device.devname)
    if path is None or os.lstat(path).st_rdev != os.makedev(device.major, device.minor):
        raise Failure(f"{device.devname} has no node here, and an fd of it ends with loopctl: use `loopctl run`")
    return path


def run(args: argparse.Namespace) -> int:
    status = 0
    try:
        with _attached(_client(args), args, "device") as device:
            _warn(args, device)
            if args.deliver == "fd":
                os.set_inheritable(device.fd, True)  # its path is /proc/self/fd/N, in the command too
            argv = [argument.replace("{}", device.path) for argument in args.command]
            status = command.run(argv, {**os.environ, "LOOPD_DEVICE": device.path})
    except client.Error as error:
        explain(error, args.image)
        return status or 1
    return status


def _detach_all(args: argparse.Namespace) -> int:
    """Detach everything at once, and wait for all of it together."""
    asked = _client(args)
    left = [(lease.devname, lease.diskseq) for lease in asked.list()]
    deadline = time.monotonic() + args.wait
    failed = False
    for wait in (False, True):
        busy = []
        for devname, diskseq in left:
            seconds = max(0.0, deadline - time.monotonic()) if wait else 0
            try:
                if not asked.detach(devname, wait=seconds, force=args.force, diskseq=diskseq):
                    busy.append((devname, diskseq))
            except client.NotFound:
                pass  # it ended meanwhile
            except client.Error as error:
                explain(error)
                failed = True
                if isinstance(error, client.ImageIncomplete) and not error.released:
                    busy.append((devname, diskseq))
        left = busy
    for devname, _ in left:
        explain(client.Busy(f"{devname} is detached, but somebody still has it open"))
    return int(failed or bool(left))


def detach(args: argparse.Namespace) -> int:
    if args.all:
        return _detach_all(args)
    asked, failed = _client(args), False
    for word in args.device:
        try:
            devices = [(word, None)] if is_device(word) else _on_image(asked, word)
        except (client.Error, OSError) as error:
            tell(error)
            failed = True
            continue
        for device, diskseq in devices:
            try:
                if not asked.detach(device, wait=args.wait, force=args.force, diskseq=diskseq):
                    raise client.Busy(f"{device} is detached, but somebody still has it open")
            except client.Error as error:
                explain(error)
                failed = True
    return int(failed)


def _on_image(asked: client.Client, file: str) -> list[tuple[str, int | None]]:
    """The devices that have an image, each with its binding."""
    found = client.on_file(asked.list(), file)
    if not found:
        raise client.NotFound(f"{file} is the image of no device here")
    return [(lease.devname, lease.diskseq) for lease in found]


def listed(args: argparse.Namespace) -> int:
    asked = _client(args)
    leases = asked.list()
    everybodys = any(lease.account for lease in leases)
    columns = args.output or (EVERYBODYS if everybodys else OWN)
    wants_openers = everybodys if args.json else "OPEN-IN" in columns
    if wants_openers:
        from loopd.cli import openers  # noqa: PLC0415  # costs all who do not need it

        found = openers.find([lease.devname for lease in leases], asked.daemon_pid())
        leases = tuple(lease._replace(openers=found[lease.devname]) for lease in leases)
    if args.json:
        put(json.dumps({"leases": [fields(lease) for lease in leases]}, indent=2))
    elif leases:
        put(table(leases, columns, cut=not args.output, headings=not args.noheadings))
    return 0


def directory(args: argparse.Namespace) -> int:
    asked = _client(args)
    if args.name is None:
        found = asked.directories()
        if args.json:
            put(json.dumps({"directories": [fields(grant) for grant in found]}, indent=2))
        elif found:
            put(table(found, tuple(GRANTS), cut=False, headings=True, known=GRANTS))
        return 0
    from loopd.cli import cdi, user  # noqa: PLC0415  # nobody else needs them

    uid = user.uid_of(args.user)
    within = cdi.folders(uid, args.cdi_dir)
    if args.remove:
        with user.acting_as(args.user, asked.socket):
            missing = _removed(asked, args.name)
        # A directory that is gone, as after a boot, may have left its specification.
        if not cdi.remove(within, uid, args.name) and missing is not None:
            raise missing
        return 0
    if args.cdi and "metrics" in asked.hello().operations:
        raise Failure(f"--cdi gives a container the socket, and {asked.socket} is an administrator's")
    with user.acting_as(args.user, asked.socket):
        granted = _granted(asked, args)
    if args.cdi:
        spec = cdi.checked(uid, args.name, granted, cdi.parts(asked.socket, args.losetup), args.force)
        cdi.write(within[0], uid, args.name, spec)
        cdi.remove(within[1:], uid, args.name)
        put(f"{cdi.kind(uid)}={args.name}")
        return 0
    for stale in cdi.remove(within, uid, args.name, unless=granted.numbers):
        warn(f"warning: {stale} named devices that are not this directory's, and is removed: --cdi writes it anew")
    put(json.dumps(fields(granted), indent=2) if args.json else granted.path)
    return 0


def _granted(asked: client.Client, args: argparse.Namespace) -> wire.Granted:
    granted = asked.grant(args.name, devices=args.devices)
    # A daemon that has just been started does not know yet whether max_loop is in force.
    deadline = time.monotonic() + min(args.timeout, 10)
    while args.cdi and granted.remade is None and time.monotonic() < deadline:
        time.sleep(0.1)
        granted = asked.grant(args.name)
    return granted


def _removed(asked: client.Client, name: str) -> client.NotFound | None:
    """Remove a directory; what there is to say where there is none."""
    try:
        asked.directory(name, remove=True)
    except client.NotFound as error:
        return error
    return None


def rescan(args: argparse.Namespace) -> int:
    partitions = _client(args).rescan(args.device)
    folder = os.path.dirname(client.node_path(args.device) or args.device)
    if partitions:
        put("\n".join(os.path.join(folder, name) for name in partitions))
    return 0


def resize(args: argparse.Namespace) -> int:
    put(str(_client(args).resize(args.device)))
    return 0


def doctor(args: argparse.Namespace) -> int:
    from loopd.cli import doctor  # noqa: PLC0415  # nobody else needs it

    findings = []
    for finding in doctor.examine(_unproved(args)):
        if not args.json:
            put(clean(str(finding)))
        findings.append(finding)
    if args.json:
        rows = [{name: readable(text) for name, text in finding._asdict().items()} for finding in findings]
        put(json.dumps({"findings": rows}, indent=2))
    return int(any(finding.failed for finding in findings))


def hello(args: argparse.Namespace) -> int:
    greeting = _client(args).hello()
    if args.json:
        put(json.dumps(fields(greeting), indent=2))
    else:
        lines = [
            f"loopd {greeting.loopd}, protocol {greeting.protocol}",
            "operations: " + " ".join(greeting.operations),
        ]
        lines += [f"{name}: {value}" for name, value in greeting.limits.items()]
        put("\n".join(map(clean, lines)))
    return 0


def metrics(args: argparse.Namespace) -> int:
    # The daemon answers this to the administrator alone, so the default is his socket.
    text = client.Client(args.socket or client.ADMIN_SOCKET, args.timeout).metrics().rstrip("\n")
    put(text if args.openmetrics else prometheus(text))
    return 0


def prometheus(openmetrics: str) -> str:
    """The same in Prometheus's text format, as node_exporter's textfile collector reads it: there the name of a counter
    ends with _total, and what is _created would be a series of its own.
    """
    lines = []
    for line in openmetrics.splitlines():
        name = line.split(" ", 3)[2] if line.startswith("# ") and line != "# EOF" else line.partition("{")[0]
        if line == "# EOF" or line.startswith("# UNIT ") or name.endswith("_created"):
            continue
        counter = line.startswith("# ") and f"# TYPE {name} counter" in openmetrics
        lines.append(line.replace(f" {name} ", f" {name}_total ", 1) if counter else line)
    return "\n".join(lines)
