"""Accounts: whose a process is, as its cgroup says; and that with the last process of an account its leases end."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.daemon import Daemon, ask, bound_to, eventually, exists, prompt, require
from support.kept import Kept, hold, kept_fixture, once_there, start_kept_fixture, traced  # noqa: F401
from support.processes import Child, stays
from support.untouched import cgroup as entered
from support.untouched import elsewhere, helpers, maker, pair, paused, reply_of, send, stopped

from loopd.daemon.accounts import membership, whose
from loopd.kernel import cgroups
from loopd.protocol import wire

SOON = 10.0
"""Seconds within which the end of an account has ended its leases on a machine however busy."""

ID = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
POD = "6d3c1bf2-9f20-4f6c-8d6a-1f4b8c0a9d11"
SLICE_POD = POD.replace("-", "_")

MEMBERSHIPS: dict[str, tuple[str, str, str]] = {
    # what: cgroup, account, unit
    "the root": ("/", "/", ""),
    "a system service": ("/system.slice/cron.service", "/system.slice/cron.service", "cron.service"),
    "below a service": ("/system.slice/ci.service/job/7", "/system.slice/ci.service", "ci.service"),
    "an instance's slice": (
        "/system.slice/system-getty.slice/getty@tty1.service",
        "/system.slice/system-getty.slice/getty@tty1.service", "getty@tty1.service",
    ),
    "PID 1": ("/init.scope", "/init.scope", "init.scope"),
    "a slice itself": ("/user.slice/user-1000.slice", "/user.slice/user-1000.slice", "user-1000.slice"),
    "a login session": (
        "/user.slice/user-1000.slice/session-3.scope", "/user.slice/user-1000.slice/session-3.scope", "session-3.scope",
    ),
    "a user's program": (
        "/user.slice/user-1000.slice/user@1000.service/app.slice/app-gnome-Console-77.scope",
        "/user.slice/user-1000.slice/user@1000.service", "app-gnome-Console-77.scope",
    ),
    "podman, rootless": (
        f"/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{ID}.scope/container",
        "/user.slice/user-1000.slice/user@1000.service", f"libpod-{ID}.scope",
    ),
    "podman": (
        f"/machine.slice/libpod-{ID}.scope/container", f"/machine.slice/libpod-{ID}.scope", f"libpod-{ID}.scope",
    ),
    "podman's own process": (
        f"/machine.slice/libpod-conmon-{ID}.scope",
        f"/machine.slice/libpod-conmon-{ID}.scope", f"libpod-conmon-{ID}.scope",
    ),
    "podman, cgroupfs": (f"/libpod_parent/libpod-{ID}", f"/libpod_parent/libpod-{ID}", f"libpod-{ID}"),
    "docker, systemd": (f"/system.slice/docker-{ID}.scope", f"/system.slice/docker-{ID}.scope", f"docker-{ID}.scope"),
    "docker, cgroupfs": (f"/docker/{ID}", f"/docker/{ID}", ID),
    "systemd in docker, cgroupfs": (f"/docker/{ID}/system.slice/build.service", f"/docker/{ID}", ID),
    "docker in a user's manager": (
        f"/user.slice/user-1000.slice/user@1000.service/user.slice/docker-{ID}.scope",
        "/user.slice/user-1000.slice/user@1000.service", f"docker-{ID}.scope",
    ),
    "kubernetes, systemd": (
        f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{SLICE_POD}.slice/cri-containerd-{ID}.scope",
        f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{SLICE_POD}.slice/cri-containerd-{ID}.scope",
        f"cri-containerd-{ID}.scope",
    ),
    "kubernetes, cgroupfs": (f"/kubepods/burstable/pod{POD}/{ID}", f"/kubepods/burstable/pod{POD}/{ID}", ID),
    "kubernetes, cgroupfs, guaranteed": (f"/kubepods/pod{POD}/{ID}", f"/kubepods/pod{POD}/{ID}", ID),
    "systemd in a pod": (f"/kubepods/besteffort/pod{POD}/{ID}/init.scope", f"/kubepods/besteffort/pod{POD}/{ID}", ID),
    "a build of buildkit in docker, cgroupfs": (f"/docker/buildkit/{ID}", f"/docker/buildkit/{ID}", ID),
    "containerd": (f"/default/{ID}", f"/default/{ID}", ID),
    "lxc": ("/lxc.payload.web/system.slice/nginx.service", "/lxc.payload.web", "lxc.payload.web"),
    "lxc's own process": ("/lxc.monitor.web", "/lxc.monitor.web", "lxc.monitor.web"),
    "lxc, the first version": ("/lxc/web/system.slice/nginx.service", "/lxc/web", "web"),
    "nspawn": (
        "/machine.slice/systemd-nspawn@web.service/payload/system.slice/nginx.service",
        "/machine.slice/systemd-nspawn@web.service", "systemd-nspawn@web.service",
    ),
    "nspawn by hand": (
        "/machine.slice/machine-web.scope/payload", "/machine.slice/machine-web.scope", "machine-web.scope",
    ),
    "a build in a pod of its own": ("/actions_job/9f", "/actions_job", "actions_job"),
}  # fmt: skip


@pytest.mark.parametrize("mark", "\r\v\f\x1c\x1d\x1e\x85\u2028\u2029", ids=ascii)
def test_a_name_that_looks_like_a_line_of_its_own(mark: str) -> None:
    """Whoever may make a cgroup below his own chooses its name: all but a newline may be in it."""
    name = f"loopd-test-{os.getpid()}{mark}0::victim.scope"
    with entered(name) as enter:
        require(enter, "needs a cgroup hierarchy to make a cgroup in")
        assert enter is not None
        (account, unit), _ = elsewhere(lambda: whose(os.getpid()), enter)
        assert (account, unit) != ("/victim.scope", "victim.scope")
        assert name.startswith(account.strip("/"))


@pytest.mark.parametrize("what", MEMBERSHIPS)
def test_the_account_of_a_cgroup(what: str) -> None:
    cgroup, account, unit = MEMBERSHIPS[what]
    assert membership(cgroup) == (account, unit)


CONTAINERS = {
    "podman": f"/machine.slice/libpod-{ID}.scope",
    "docker, systemd": f"/system.slice/docker-{ID}.scope",
    "docker, cgroupfs": f"/docker/{ID}",
    "kubernetes, cgroupfs": f"/kubepods/burstable/pod{POD}/{ID}",
    "lxc": "/lxc.payload.web",
    "nspawn": "/machine.slice/systemd-nspawn@web.service",
    "a user's manager": "/user.slice/user-1000.slice/user@1000.service",
    "a service": "/system.slice/ci.service",
}


INNER = {
    "a scope": "x.scope",
    "a service": "system.slice/x.service",
    "a slice": "x.slice/y.scope",
    "a session": "user.slice/user-0.slice/session-1.scope",
    "no name": ".scope",
    "other characters": "a b\nc.service",
    "podman's": f"machine.slice/libpod-{ID[::-1]}.scope",
    "docker's": f"docker/{ID[::-1]}",
    "kubernetes'": f"kubepods/pod{POD}/{ID[::-1]}",
}
TENANTS = [
    pytest.param(
        container,
        inner,
    )
    for container in CONTAINERS
    for inner in INNER
]


@pytest.mark.parametrize(("container", "inner"), TENANTS)
def test_a_tenant_cannot_name_an_account(container: str, inner: str) -> None:
    """Whatever cgroups a container makes within its own, all it does is charged to the one account."""
    assert membership(f"{CONTAINERS[container]}/{INNER[inner]}").account == CONTAINERS[container]


# The end of an account ---------------------------------------------------------------------------------------------


class Cgroup:
    """A cgroup of the test's own."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def enter(self) -> None:
        """Move the calling process."""
        (self.path / "cgroup.procs").write_text(str(os.getpid()))

    def populated(self) -> bool:
        return "populated 1" in (self.path / "cgroup.events").read_text()

    def remove(self) -> None:
        """Its processes are to have ended; what is below it goes too."""
        for below in sorted(self.path.rglob("*/"), reverse=True):
            below.rmdir()
        eventually(lambda: not self.populated(), "the cgroup is empty")
        with contextlib.suppress(FileNotFoundError):
            self.path.rmdir()


@pytest.fixture
def make_cgroup() -> Iterator[Callable[[str], Cgroup]]:
    """Make cgroups in the host's cgroup v2 hierarchy, at its root: an account each."""
    root = next((Path(path) for path in cgroups.ROOTS if (Path(path) / "cgroup.procs").exists()), None)
    if root is None or not os.access(root, os.W_OK):
        pytest.skip("no cgroup v2 file system that can be written is mounted where loopd looks")
    made: list[Cgroup] = []

    def make(name: str) -> Cgroup:
        cgroup = Cgroup(root / f"loopd-test-{os.getpid()}-{name}")
        cgroup.path.mkdir()
        made.append(cgroup)
        return cgroup

    yield make
    for cgroup in made:
        if cgroup.path.exists():
            cgroup.remove()


@pytest.fixture
def cgroup(make_cgroup: Callable[[str], Cgroup]) -> Cgroup:
    """One of them."""
    return make_cgroup("a")


def client(path: str, cgroup: Cgroup, image: int, directory: int, lease_fd: int) -> Child:
    """A process in the cgroup that attaches with a lease fd of elsewhere, tells the fields of the reply, and stays."""
    request = wire.encode_request(wire.Attach(0, 1, 3, 2))

    def attach(tell: Callable[[Any], None]) -> None:
        cgroup.enter()
        reply = ask(path, request, [image, directory, lease_fd])
        tell(reply.fields)
        signal.pause()

    return Child(attach, [image, directory, lease_fd])


@pytest.fixture
def outside() -> Iterator[int]:
    """A pidfd of a process that does not end: what `--pid=host` gives a client."""
    fd = os.pidfd_open(1)
    yield fd
    os.close(fd)


def test_with_its_last_process_its_leases_end(
    daemon: Daemon, cgroup: Cgroup, make_image: Callable[..., int], directory: int, devices: Path,
    tmp_path: Path, outside: int,
) -> None:  # fmt: skip
    with contextlib.ExitStack() as stack:
        images = (make_image(), make_image(name="two"))
        clients = (client(daemon.path, cgroup, image, directory, outside) for image in images)
        first, second = map(stack.enter_context, clients)
        names = {child.hear()["devname"] for child in (first, second)}
        first.kill()
        stays(lambda: len(bound_to(tmp_path)) == 2, 0.3, "there is a process left")
        second.kill()
        eventually(lambda: not bound_to(tmp_path), "the files are free", SOON)
        eventually(lambda: not list(devices.iterdir()), "the nodes are gone", SOON)
    eventually(
        lambda: {record["LOOPD_DEVICE"] for record in daemon.records("expired")} == names, "the records are written"
    )
    assert {record["LOOPD_ACCOUNT"] for record in daemon.records("attached")} == {f"/{cgroup.path.name}"}


def test_they_end_within_a_second(
    daemon: Daemon, cgroup: Cgroup, image: int, directory: int, devices: Path, tmp_path: Path, outside: int
) -> None:
    def turn() -> float:
        with client(daemon.path, cgroup, image, directory, outside) as child:
            child.hear()
            began = time.monotonic()
            child.kill()
            eventually(lambda: not bound_to(tmp_path) and not list(devices.iterdir()), "the device is gone", SOON)
            return time.monotonic() - began

    prompt(turn)


def test_a_process_below_keeps_the_account(
    daemon: Daemon, cgroup: Cgroup, image: int, directory: int, tmp_path: Path, outside: int
) -> None:
    inner = Cgroup(cgroup.path / "inner.scope")
    inner.path.mkdir()

    def wait(tell: Callable[[Any], None]) -> None:
        inner.enter()
        tell(None)
        signal.pause()

    with Child(wait) as below, client(daemon.path, cgroup, image, directory, outside) as child:
        below.hear()
        assert "devname" in child.hear()
        child.kill()
        stays(lambda: bound_to(tmp_path), 0.3, "there is a process left")
        below.kill()
        eventually(lambda: not bound_to(tmp_path), "the file is free", SOON)


def test_other_accounts_go_on(
    daemon: Daemon, make_cgroup: Callable[[str], Cgroup], make_image: Callable[..., int], directory: int,
    tmp_path: Path, outside: int,
) -> None:  # fmt: skip
    accounts = [make_cgroup("one"), make_cgroup("two")]
    images = [make_image(name="one"), make_image(name="two")]
    with contextlib.ExitStack() as stack:
        children = [
            stack.enter_context(client(daemon.path, account, image, directory, outside))
            for account, image in zip(accounts, images, strict=True)
        ]
        names = [child.hear()["devname"] for child in children]
        children[0].kill()
        eventually(lambda: bound_to(tmp_path) == [names[1]], "the other's file is free", SOON)
        stays(lambda: bound_to(tmp_path) == [names[1]], 0.2, "it is another account")
        children[1].kill()
        eventually(lambda: not bound_to(tmp_path), "the file is free", SOON)


def test_who_comes_by_its_name_is_another(
    daemon: Daemon, cgroup: Cgroup, image: int, directory: int, tmp_path: Path, outside: int
) -> None:
    """The cgroup is made again with the same name: it sees nothing of the first and gets none of its numbers."""
    names = []
    for _ in range(2):
        with client(daemon.path, cgroup, image, directory, outside) as child:
            names.append(child.hear()["devname"])
        eventually(lambda: not bound_to(tmp_path), "the file is free", SOON)
        cgroup.remove()
        cgroup.path.mkdir()
    assert names[0] != names[1]


def test_it_is_another_although_nobody_saw_the_end(
    daemon: Daemon, cgroup: Cgroup, image: int, directory: int, tmp_path: Path, outside: int
) -> None:
    """The cgroup is made again, and has a process, before loopd gets to look."""

    def stay(tell: Callable[[Any], None]) -> None:
        cgroup.enter()
        tell(None)
        signal.pause()

    with client(daemon.path, cgroup, image, directory, outside) as child:
        child.hear()
        with stopped(daemon):
            child.kill()
            cgroup.remove()
            cgroup.path.mkdir()
            second = Child(stay)
            second.hear()
        with second:
            eventually(lambda: not bound_to(tmp_path), "the file is free", SOON)


def test_nor_a_number_that_was_being_removed(
    start_kept: Callable[..., Kept], cgroup: Cgroup, make_image: Callable[..., int], directory: int,
    tmp_path: Path, outside: int,
) -> None:  # fmt: skip
    """The first detaches as its last act; the second has used up its new numbers, and has no others."""
    config = tmp_path / "loopd.toml"
    config.write_text("[limits]\nnew_numbers = 2\nnew_numbers_per_minute = 0\n")
    daemon = start_kept(f"--config={config}")
    images = [make_image(name=f"image{turn}") for turn in range(3)]

    def attach(tell: Callable[[Any], None]) -> None:
        cgroup.enter()
        found = []
        for image in images:
            found.append(ask(daemon.path, wire.encode_request(wire.Attach(0, 1, 3, 2)), [image, directory, outside]))
            tell(found[-1].fields)
        signal.pause()

    with Child(attach, [directory, outside, *images]) as child:
        first, second = (child.hear()["devname"] for _ in range(2))
        assert child.hear()["error"]["code"] == "quota"
        with paused(maker(daemon)):
            assert daemon.admin(wire.Detach(first, 0, force=True, wait=5)).fields == {"state": "released"}
            child.kill()
            eventually(lambda: not bound_to(tmp_path), "the other lease is over: the account has ended", SOON)
    cgroup.remove()
    eventually(lambda: not exists(first) and not exists(second), "the numbers are gone", SOON)
    cgroup.path.mkdir()
    with Child(attach, [directory, outside, *images]) as child:
        names = {child.hear()["devname"] for _ in range(2)}
        assert not names & {first, second}
        assert child.hear()["error"]["code"] == "quota", "there is none that it had before"
        child.kill()
        eventually(lambda: not bound_to(tmp_path), "the files are free", SOON)
    daemon.end()


@pytest.mark.parametrize(
    "removed",
    [False, pytest.param(True)],
    ids=["empty", "removed"],
)
def test_it_ends_while_the_daemon_is_dead(
    kept: Kept, cgroup: Cgroup, image: int, directory: int, devices: Path, tmp_path: Path, outside: int, removed: bool
) -> None:
    with client(kept.path, cgroup, image, directory, outside) as child:
        child.hear()
        with kept.outage():
            child.kill()
            if removed:
                cgroup.remove()
        eventually(lambda: not bound_to(tmp_path), "the file is free", 5)
        eventually(lambda: not list(devices.iterdir()), "the node is gone", SOON)
    kept.end()


def test_it_ends_with_many_leases_while_the_daemon_is_dead(
    kept: Kept, cgroup: Cgroup, make_image: Callable[..., int], directory: int, devices: Path, tmp_path: Path
) -> None:
    """Each lease ends once: nothing of it is watched any more, for its fds are others' soon."""
    images = [make_image(name=f"image{turn}") for turn in range(4)]
    with contextlib.ExitStack() as stack:

        def attach(tell: Callable[[Any], None]) -> None:
            cgroup.enter()
            request = wire.encode_request(wire.Attach(0, 1, 2))
            replies = [ask(kept.path, request, [image, directory]) for image in images]
            tell([reply.fields for reply in replies])
            signal.pause()

        with Child(attach, [directory, *images]) as child:
            child.hear()
            assert len(kept.leases()) == len(images)
            with kept.outage():
                child.kill()
                cgroup.remove()
            eventually(lambda: not bound_to(tmp_path), "the files are free", SOON)
            eventually(lambda: not list(devices.iterdir()), "the nodes are gone", SOON)
        held = [stack.enter_context(hold(kept, kind, make_image(name=kind), directory)) for kind in ("socket", "pidfd")]
        before = cpu_time(kept.pid)
        stays(lambda: all(lease.bound() for lease in held), 0.5, "these are another's leases")
        assert cpu_time(kept.pid) - before < 0.25, "the daemon is busy with nothing"
    kept.end()


def cpu_time(pid: int) -> float:
    """Seconds that a process has run."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_daemon_that_cannot_watch_it_starts_all_the_same(
    start_kept: Callable[..., Kept], cgroup: Cgroup, image: int, directory: int, tmp_path: Path, outside: int
) -> None:
    """The host has no more watches (fs.inotify.max_user_watches); the next one can."""
    flag = tmp_path / "flag"
    daemon = start_kept(
        wrapper=once_there(flag, "-etrace=inotify_add_watch", "-einject=inotify_add_watch:error=ENOSPC")
    )
    with client(daemon.path, cgroup, image, directory, outside) as child:
        name = child.hear()["devname"]
        flag.touch()
        daemon.kill()
        assert list(daemon.leases()) == [name]
        assert [record for record in daemon.records("warned") if "cannot be watched" in record["MESSAGE"]]
        flag.unlink()
        daemon.kill()
        assert list(daemon.leases()) == [name]
        child.kill()
        eventually(lambda: not bound_to(tmp_path), "the file is free", SOON)
    daemon.end()


def test_it_ends_after_a_restart(
    kept: Kept, cgroup: Cgroup, image: int, directory: int, tmp_path: Path, outside: int
) -> None:
    with client(kept.path, cgroup, image, directory, outside) as child:
        child.hear()
        kept.kill()
        assert kept.leases()
        child.kill()
        eventually(lambda: not bound_to(tmp_path), "the file is free", SOON)
    kept.end()


def test_it_has_ended_before_the_lease_is_booked(
    daemon: Daemon, cgroup: Cgroup, image: int, directory: int, tmp_path: Path, outside: int
) -> None:
    """While a helper attaches for it, its only process ends, and the cgroup goes."""
    here, there = pair()
    request = wire.encode_request(wire.Attach(0, 1, 3, 2))
    fds = [image, directory, outside]

    def attach(tell: Callable[[Any], None]) -> None:
        cgroup.enter()
        ours, theirs = pair()
        socket.send_fds(there, [b"ours"], [ours.fileno()])
        send(daemon.path, request, [*fds, theirs.fileno()]).close()
        signal.pause()

    daemon.hello()
    with here, there, traced(helpers(daemon), "-o/dev/null", "-einject=mknodat:delay_enter=700ms"):
        with Child(attach, [*fds, there.fileno()]):
            eventually(lambda: bound_to(tmp_path), "the device is bound")
            _, (ours,), _, _ = socket.recv_fds(here, 16, 1)
        cgroup.remove()
        with contextlib.closing(reply_of(socket.socket(fileno=ours))) as reply:
            assert reply.code == "not-permitted", reply.fields  # whoever waits for it, it is no attach of the account's
            eventually(lambda: not bound_to(tmp_path), "the file is free", SOON)


def test_another_cgroup_of_its_name(make_cgroup: Callable[[str], Cgroup]) -> None:
    """The name may come again before the end of the first has been read."""

    def stay(cgroup: Cgroup, watcher: cgroups.Watcher, name: str) -> Child:
        def body(tell: Callable[[Any], None]) -> None:
            cgroup.enter()
            tell("there")
            signal.pause()

        child = Child(body)
        assert child.hear() == "there"
        events = cgroups.open_events(name)
        assert events is not None
        watcher.watch(name, events)
        return child

    ended: list[str] = []
    watcher = cgroups.Watcher(ended.append)
    cgroup = make_cgroup("again")
    name = f"/{cgroup.path.name}"
    with stay(cgroup, watcher, name) as child:
        assert watcher.watches(name)
        child.kill()
    cgroup.remove()
    cgroup.path.mkdir()
    with stay(cgroup, watcher, name):
        assert ended == [name]
        assert not watcher.watches(name), "an attach of the new one is refused, and watches it the next time"
