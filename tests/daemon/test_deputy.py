"""The confused deputy: whoever asks gets what he could have had himself; nothing of others is touched, nothing told."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import stat
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.daemon import ROOT, Daemon, ask, bound_to, eventually, exists, require
from support.kept import traced
from support.processes import (
    CLONE_NEWNET,
    CLONE_NEWNS,
    CLONE_NEWUSER,
    Child,
    become,
    injected,
    own_user_namespace,
    unshare,
)
from support.untouched import cgroup, elsewhere, helpers, leases, pair, reply_of, send
from test_policy import apart

from loopd.daemon import accounts
from loopd.daemon.audit import Event
from loopd.protocol import wire

ALICE, BOB = 20001, 20002
SOON = 5.0


@pytest.fixture
def daemon(start_daemon: Callable[..., Daemon], tmp_path: Path) -> Daemon:
    """One that everybody may send to, with directory grants."""
    root = tmp_path / "grants"
    root.mkdir(mode=0o711)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=0711", "loopd-test", str(root)], check=True)
    daemon = start_daemon(f"--grant-directory={root}", f"--state-directory={apart(tmp_path / 'state')}")
    Path(daemon.path).chmod(0o666)
    tmp_path.chmod(0o711)
    daemon.hello()
    return daemon


@pytest.fixture(autouse=True)
def _unmounted(tmp_path: Path) -> Iterator[None]:
    """The mounts of a test go after its daemon has ended."""
    yield
    for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
        place = line.split()[1]
        if place.startswith(f"{tmp_path}/"):
            subprocess.run(["umount", "-l", place], check=True)


def request(message: wire.Request, *fds: int, close: bool = True) -> dict[str, Any]:
    """What is answered to a client that is in the daemon's directory."""
    reply = ask("loopd.sock", wire.encode_request(message), list(fds))
    if close:
        reply.close()
    return reply.fields


def attach(image: int, directory: int, **fields: Any) -> dict[str, Any]:
    """As `request`."""
    return request(wire.Attach(0, 1, 2, **fields), image, directory)


def client(daemon: Daemon, act: Callable[[], object], *prepare: Callable[[], object]) -> Any:
    """What `act` returns in a process that has gone to the daemon's directory and then done what is to be prepared."""

    def begin() -> None:
        os.chdir(daemon.directory)
        for step in prepare:
            step()

    return elsewhere(act, begin)


def user(uid: int) -> Callable[[], None]:
    """For `client`: a user without privileges."""
    return lambda: become(uid)


@contextlib.contextmanager
def holding(
    daemon: Daemon, image: int, directory: int, *prepare: Callable[[], object], **fields: Any
) -> Iterator[tuple[str, Child]]:
    """A client that holds a lease; the name of its device. Told "detach", or ended, it has none."""

    def body(tell: Callable[[Any], None]) -> None:
        os.chdir(daemon.directory)
        for step in prepare:
            step()
        reply = ask("loopd.sock", wire.encode_request(wire.Attach(0, 1, 2, **fields)), [image, directory])
        tell(reply.fields)
        time.sleep(60)

    with Child(body, keep=[image, directory]) as child:
        fields = child.hear()
        assert "error" not in fields, fields
        yield fields["devname"], child


# Where nodes are made ---------------------------------------------------------------------------------------------


def _of_root(place: Path) -> Path:
    place.mkdir(mode=0o755)
    return place


def _of_another(place: Path) -> Path:
    place.mkdir(mode=0o755)
    os.chown(place, BOB, BOB)
    return place


def _read_only(place: Path) -> Path:
    """The client's own, but its mount is read-only."""
    place.mkdir(mode=0o777)
    place.chmod(0o777)
    subprocess.run(["mount", "--bind", str(place), str(place)], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", str(place)], check=True)
    return place


def _sticky_but_closed(place: Path) -> Path:
    """Of a group that a client of that uid is in only as a supplement, which is not sent along."""
    place.mkdir()
    os.chown(place, 0, ALICE + 1)
    place.chmod(0o070)
    return place


PLACES: dict[str, Callable[[Path], Path]] = {
    "of root": _of_root,
    "of another uid": _of_another,
    "on a read-only mount": _read_only,
    "of a supplementary group": _sticky_but_closed,
    "/etc": lambda _: Path("/etc"),
    "/sys": lambda _: Path("/sys"),
    "/proc/self": lambda _: Path("/proc/self"),
}


@pytest.mark.parametrize("namespace", ["the host's user", "a user namespace", "a mount namespace"])
@pytest.mark.parametrize("place", PLACES)
def test_no_node_where_the_client_could_make_no_file(
    daemon: Daemon, image: int, tmp_path: Path, place: str, namespace: str
) -> None:
    """An fd of a directory proves that it could be opened, and no more; in a container too."""
    path = PLACES[place](tmp_path / "place")
    before = sorted(os.listdir(path))
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    prepare = [user(ALICE)]
    if namespace == "a user namespace":
        prepare.append(own_user_namespace)
    elif namespace == "a mount namespace":
        prepare.insert(0, lambda: unshare(CLONE_NEWNS))
    try:
        fields = client(daemon, lambda: attach(image, fd), *prepare)
        assert fields["error"]["code"] == "not-permitted", fields
        if place != "/proc/self":
            assert sorted(os.listdir(path)) == before
    finally:
        os.close(fd)
    eventually(lambda: not bound_to(tmp_path), "the file is free", SOON)
    assert leases(daemon) == []


# What removal touches ---------------------------------------------------------------------------------------------


def _node(path: Path, _: Path) -> None:
    os.mknod(path, 0o640 | stat.S_IFBLK, os.makedev(7, 0))


REPLACEMENTS: dict[str, Callable[[Path, Path], None]] = {
    "a symbolic link": lambda path, victim: path.symlink_to(victim),
    "a hard link": lambda path, victim: path.hardlink_to(victim),
    "a directory": lambda path, _: path.mkdir(mode=0o750),
    "a pipe": lambda path, _: os.mkfifo(path, 0o640),
    "another device": _node,
}


def _what(path: Path) -> tuple[int, int, int, int]:
    status = path.lstat()
    return status.st_ino, status.st_mode, status.st_rdev, status.st_nlink


@pytest.mark.parametrize("kind", REPLACEMENTS)
def test_what_took_the_place_of_a_node_stays(
    daemon: Daemon, image: int, directory: int, devices: Path, tmp_path: Path, kind: str
) -> None:
    """Renamed, and something else there by its name: neither is loopd's any more, nor is what a link leads to."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    victim.chmod(0o644)
    reply = daemon.attach(image, directory)
    path = devices / reply.fields["devname"]
    path.rename(tmp_path / "aside")
    REPLACEMENTS[kind](path, victim)
    before = _what(path), _what(victim), _what(tmp_path / "aside")
    reply.close()
    eventually(lambda: not leases(daemon), "the lease is over", SOON)
    assert (_what(path), _what(victim), _what(tmp_path / "aside")) == before
    assert victim.read_text() == "mine"


ROUNDS = 40


@pytest.mark.parametrize("kind", REPLACEMENTS)
def test_nodes_swapped_while_they_are_removed(
    daemon: Daemon, image: int, directory: int, devices: Path, tmp_path: Path, kind: str
) -> None:
    """A link is not followed however it is timed: the mode of what it leads to, of the same uid, is what it was."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    victim.chmod(0o644)
    aside = tmp_path / "aside"
    aside.mkdir()
    before = _what(victim)[:3]

    def body(tell: Callable[[Any], None]) -> None:
        tell("ready")
        while True:
            # Back and forth, so that a removal finds now its node, now the other, and every step in between.
            for name in os.listdir(directory):
                path, kept = devices / name, aside / name
                with contextlib.suppress(OSError):
                    path.rename(kept)
                    REPLACEMENTS[kind](path, victim)
                    kept.rename(path)

    with Child(body, keep=[directory]) as child:
        child.hear()
        for _ in range(ROUNDS):
            reply = daemon.attach(image, directory)
            assert reply.code in (None, "undeliverable", "io", "exists")
            reply.close()
        eventually(lambda: not leases(daemon), "every lease is over", 20)
    assert _what(victim)[:3] == before
    assert victim.read_text() == "mine"
    eventually(lambda: not bound_to(tmp_path / "image"), "the file is free", SOON)
    for path in (*devices.iterdir(), *aside.iterdir()):  # nodes that were aside at the time stay the client's
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink()


# Grants: an fd of the directory, and only one that is open --------------------------------------------------------


def grant(daemon: Daemon, uid: int, name: str) -> Path:
    """A directory of loopd's for that user."""
    path: str = client(daemon, lambda: request(wire.Directory(name, 0))["path"], user(uid))
    return Path(path)


@contextlib.contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    fd = os.open(path, flags | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


def test_a_grant_reaches_its_own_leases_only(daemon: Daemon, image: int) -> None:
    """Two directories of one user: who has one along sees, ends and changes what is in it, and nothing of the other."""
    one, other = grant(daemon, ALICE, "one"), grant(daemon, ALICE, "other")
    with opened(one) as first, opened(other) as second, holding(daemon, image, first, user(ALICE)) as (name, _):

        def act() -> list[Any]:
            ops: list[wire.Request] = [
                wire.Leases(1, dir_fd=0), wire.Detach(name, 1, dir_fd=0), wire.Resize(name, 1, dir_fd=0),
                wire.Rescan(name, 1, dir_fd=0),
            ]  # fmt: skip
            return [request(op, second) for op in ops] + [request(wire.Detach(name, 0))]

        listed, *refused = client(daemon, act, user(ALICE))
        assert listed["leases"] == []
        assert [fields["error"]["code"] for fields in refused] == ["not-found"] * 4
        seen = client(daemon, lambda: request(wire.Leases(1, dir_fd=0), first), user(ALICE))
        assert [lease["devname"] for lease in seen["leases"]] == [name]


def test_an_o_path_fd_is_no_grant(daemon: Daemon, image: int) -> None:
    """Any user of the host can have one of a directory whose name he knows, though he may not open it."""
    path = grant(daemon, ALICE, "mine")
    below = Path("..", *path.parts[-2:])  # what is above the test's directory is closed to others
    with opened(path) as fd, holding(daemon, image, fd, user(ALICE)) as (name, _):

        def bob() -> list[Any]:
            with pytest.raises(PermissionError), opened(below):
                pass
            with opened(below, os.O_PATH) as pinned:
                return [request(wire.Leases(1, dir_fd=0), pinned), request(wire.Detach(name, 1, dir_fd=0), pinned)]

        told = client(daemon, bob, user(BOB))
        assert all(not fields.get("leases") and "state" not in fields for fields in told), told
        assert exists(name)


def test_a_link_in_a_grant_is_not_followed(daemon: Daemon, image: int, tmp_path: Path) -> None:
    """Root of a container that has its directory bound in without `:ro` can put a link where a node was."""
    victim = tmp_path / "victim"
    victim.write_text("the host's")
    victim.chmod(0o600)
    path = grant(daemon, ALICE, "mine")

    def body(tell: Callable[[Any], None]) -> None:
        tell("ready")
        while True:
            for name in os.listdir(path):
                if (path / name).is_block_device() and not (path / name).is_symlink():
                    (path / name).unlink()
                    (path / name).symlink_to(victim)
                    return

    with (
        opened(path) as fd,
        injected([daemon.pid, *helpers(daemon)], "setxattr:delay_enter=300000"),
        Child(body) as child,
    ):
        child.hear()
        client(daemon, lambda: request(wire.Attach(0, 1, 2), image, fd), user(ALICE))
        child.wait()
    for left in path.iterdir():
        left.unlink()
    assert os.listxattr(victim) == []


def test_a_number_that_root_may_have_kept_goes_to_nobody_else(daemon: Daemon, make_image: Callable[..., int]) -> None:
    """A user of a container asks, and its root, who may open what he likes, keeps an O_PATH fd of the node."""
    image, secret = make_image(name="image"), make_image(name="secret")
    os.pwrite(secret, b"SECRET", 0)
    path = grant(daemon, ALICE, "mine")

    def contained() -> None:
        unshare(CLONE_NEWNS)

    with opened(path) as fd, holding(daemon, image, fd, contained, user(ALICE)) as (name, child):
        kept = os.open(path / name, os.O_PATH)
        child.kill()
        eventually(lambda: not exists(name), "the number is removed", SOON)
    try:
        for _ in range(130):
            reply = daemon.ask(wire.Attach(0, reply_fd=1, deliver=("fd",)), [secret])
            same = reply.fields["devname"] == name
            if same:
                with contextlib.suppress(OSError), open(f"/proc/self/fd/{kept}", "rb") as device:
                    assert device.read(6) != b"SECRET", "another's data was read through a kept node"
            reply.close()
            assert not same
    finally:
        os.close(kept)


# Whose leases -----------------------------------------------------------------------------------------------------


def _everything(name: str) -> list[Any]:
    """All that one might try with another's device; the codes, and what is listed."""
    asked: list[wire.Request] = [
        wire.Detach(name, 0),
        wire.Detach(name, 0, wait=1),
        wire.Resize(name, 0),
        wire.Rescan(name, 0),
    ]
    return [request(op)["error"]["code"] for op in asked] + [request(wire.Leases(0))["leases"]]


NOTHING: list[Any] = ["not-found"] * 4 + [[]]


def test_another_uids_lease(daemon: Daemon, image: int, directory: int, devices: Path) -> None:
    os.chown(devices, ALICE, ALICE)
    with holding(daemon, image, directory, user(ALICE)) as (name, _):
        assert client(daemon, lambda: _everything(name), user(BOB)) == NOTHING
        assert client(daemon, lambda: _everything(name)) == NOTHING  # of root too: that is the admin socket alone
        assert client(
            daemon, lambda: [lease["devname"] for lease in request(wire.Leases(0))["leases"]], user(ALICE)
        ) == [name]
        assert client(daemon, lambda: request(wire.Detach(name, 0)), user(ALICE)) == {"state": "released"}


def test_the_same_uid_in_another_account(daemon: Daemon, image: int, directory: int, devices: Path) -> None:
    """uid 0 of one container is not uid 0 of the next."""
    with cgroup(f"loopd-test-{os.getpid()}") as enter, holding(daemon, image, directory) as (name, _):
        require(enter, "needs a cgroup hierarchy to make a second account in")
        assert enter is not None
        assert client(daemon, lambda: _everything(name), enter) == NOTHING


def test_a_claim_of_another_uid(daemon: Daemon, image: int, directory: int, devices: Path) -> None:
    """Root of a user namespace claims to be its uid 0, which is not the host's."""
    with holding(daemon, image, directory) as (name, _):

        def claim() -> list[Any]:
            told = []
            for message in (wire.Leases(0), wire.Detach(name, 0)):
                ours, theirs = pair()
                with theirs:
                    mine = (os.getpid(), os.getuid(), os.getgid())
                    payload = wire.encode_request(message)
                    send("loopd.sock", payload, [theirs.fileno()], credentials=mine).close()
                told.append(reply_of(ours).fields)
            return told

        listed, detached = client(daemon, claim, user(ALICE), own_user_namespace)
        assert listed["leases"] == []
        assert detached["error"]["code"] == "not-found"


@pytest.mark.parametrize("unit", ["docker-0123456789abcdef.scope", "loopd.service"])
def test_a_scope_that_is_named_like_anothers(unit: str) -> None:
    """What a user's manager names, or systemd in a container, is below the unit that is charged."""
    user_manager = "/user.slice/user-1000.slice/user@1000.service"
    assert accounts.membership(f"{user_manager}/app.slice/{unit}").account == user_manager
    container = "/system.slice/docker-fedcba9876543210.scope"
    assert accounts.membership(f"{container}/system.slice/{unit}").account == container


@pytest.mark.parametrize("container", ["/lxc.payload.build", "/lxc/build", "/buildkit/abcdefghijklmnopqrstuvwxy"])
def test_a_cgroup_within_a_container_is_no_account(container: str) -> None:
    """Each would have devices and numbers of its own."""
    first = accounts.membership(f"{container}/init.scope").account
    assert accounts.membership(f"{container}/0123456789abcdef").account == first
    assert accounts.membership(f"{container}/x/pod01234567-89ab-cdef-0123-456789abcdef/y").account == first


def test_uid_0_of_a_container_is_not_the_administrator(
    daemon: Daemon, image: int, directory: int, devices: Path
) -> None:
    os.chown(devices, ALICE, ALICE)
    with holding(daemon, image, directory, user(ALICE)) as (name, _):

        def root() -> list[Any]:
            asked: list[wire.Request] = [wire.Directory("mine", 0), wire.Directory("mine", 0, remove=True)]
            asked.append(wire.Detach(name, 0, force=True))
            return [request(op)["error"]["code"] for op in asked] + [request(wire.Leases(0))["leases"]]

        refused: list[Any] = ["not-permitted"] * 3 + [[]]
        assert client(daemon, root, lambda: unshare(CLONE_NEWNS)) == refused
        assert client(daemon, root, user(ALICE), own_user_namespace)[:3] == refused[:3]
        # With the host's mounts, but 65,536 uids to choose from: each would have directories without end.
        assert client(daemon, root, user(ALICE), lambda: unshare(CLONE_NEWUSER))[:3] == refused[:3]
        assert client(daemon, root, lambda: os.chroot(".")) == refused
        assert exists(name)
    assert [path.name for path in (daemon.directory.parent / "grants").iterdir()] == []


# Where replies go -------------------------------------------------------------------------------------------------


def test_a_connection_to_somebodys_server_as_a_lease(
    daemon: Daemon, image: int, directory: int, tmp_path: Path
) -> None:
    """Nothing is said on it. The server can send its client no more, as if the client had ended that."""
    path = str(tmp_path / "server")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        mine = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        mine.connect(path)
        server, _ = listener.accept()
        with server, mine:
            reply = daemon.ask(wire.Attach(0, 1, 3, 2), [image, directory, mine.fileno()])
            assert reply.code is None
            with pytest.raises(BrokenPipeError):
                server.send(b"to the client")
            server.setblocking(False)
            with pytest.raises(BlockingIOError):
                server.recvmsg(4096, 4096)
            server.close()
            eventually(lambda: not bound_to(tmp_path), "the server's end ends the lease", SOON)


def test_an_address_of_another_network_namespace(daemon: Daemon, image: int, directory: int, tmp_path: Path) -> None:
    """A process of the host's network sends by a socket of another: its address is somebody else's here."""
    name = b"\0loopd-test-" + uuid.uuid4().hex.encode()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as victim:
        victim.bind(name)
        victim.setblocking(False)

        def act() -> None:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            child = os.fork()
            if not child:
                unshare(CLONE_NEWNET)
                sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
                sender.bind(name)
                socket.send_fds(theirs, [b"x"], [sender.fileno()])
                os._exit(0)
            _, fds, _, _ = socket.recv_fds(ours, 1, 1)
            os.waitpid(child, 0)
            with socket.socket(fileno=fds[0]) as sender:
                sender.connect("loopd.sock")
                sender.sendmsg([b'{"op": "hello", "id": "aimed"}'])
                time.sleep(0.5)

        client(daemon, act)
        with pytest.raises(BlockingIOError):
            victim.recv(4096)


# What a client can use up -----------------------------------------------------------------------------------------


def test_detaching_again_and_again(daemon: Daemon, image: int, directory: int, devices: Path) -> None:
    """A device that its client keeps open is detached many times: nothing piles up."""
    name = daemon.attach(image, directory).fields["devname"]

    def resident() -> int:
        return int(Path(f"/proc/{daemon.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def detach(times: int) -> None:
        for _ in range(times):
            reply = ask(daemon.path, wire.encode_request(wire.Detach(name, 0)), [])
            reply.close()
            assert reply.fields == {"state": "busy"}

    with (devices / name).open("rb"):
        detach(200)
        before = resident()
        detach(3000)
        grown = resident() - before
    assert grown < 1 << 18, f"{grown} bytes more"


def _watches(daemon: Daemon) -> int:
    found = 0
    for info in Path(f"/proc/{daemon.pid}/fdinfo").iterdir():
        with contextlib.suppress(OSError):
            found += info.read_text().count("inotify wd:")
    return found


def test_watches_do_not_pile_up(daemon: Daemon, image: int, directory: int, devices: Path) -> None:
    """A client puts one file after the other in its node's place, and asks for a rescan each time."""
    name = daemon.attach(image, directory, partscan=True).fields["devname"]
    before = _watches(daemon)
    (devices / name).unlink()
    for round_ in range(20):
        (devices / f"{round_}").touch()
        (devices / f"{round_}").rename(devices / f"{name}.{round_}")
        with contextlib.suppress(FileNotFoundError):
            (devices / name).rename(devices / f"old.{round_}")
        (devices / f"{name}.{round_}").rename(devices / name)
        daemon.ask(wire.Rescan(name, 0), [])
    assert _watches(daemon) <= before + 1


def test_nor_where_a_lease_ends_during_a_rescan(daemon: Daemon, image: int, directory: int, devices: Path) -> None:
    """The client keeps the node by another name, so that the watch would stay."""
    before = _watches(daemon)
    for round_ in range(3):
        name = daemon.attach(image, directory, partscan=True).fields["devname"]
        os.link(devices / name, devices / f"kept.{round_}")
        slow = "-einject=inotify_add_watch:delay_enter=300ms"
        with traced(helpers(daemon), "-o/dev/null", "-etrace=inotify_add_watch", slow):
            ours, theirs = pair()
            with theirs:
                send(daemon.path, wire.encode_request(wire.Rescan(name, 0)), [theirs.fileno()]).close()
            time.sleep(0.1)
            assert daemon.ask(wire.Detach(name, 0, wait=5), []).fields == {"state": "released"}
            reply_of(ours).close()
    assert _watches(daemon) <= before + 1, "that of the cgroup"


def test_what_is_recorded_cannot_be_forged(daemon: Daemon, tmp_path: Path, directory: int) -> None:
    """A path with a newline in it makes no record of its own."""
    record = f"[MESSAGE_ID='{Event.DETACHED.value.message_id}' LOOPD_EVENT='detached']"
    path = tmp_path / f"x\nloopd: loop1 was detached {record}"
    path.write_bytes(bytes(4096))
    with path.open("r+b") as image:
        assert daemon.attach(image.fileno(), directory).code is None
    eventually(lambda: "was attached" in daemon.log(), "the record is written")
    assert daemon.records("detached") == []


# The documentation ------------------------------------------------------------------------------------------------

SECURITY = (ROOT / "docs/security.md").read_text()


def _named(text: str) -> list[str]:
    return re.findall(r"`([\w/]+::test_\w+)`", text)


def test_each_promise_names_a_test_that_holds_it() -> None:
    named = _named(SECURITY)
    assert len(named) > 40
    for test in named:
        module, _, function = test.partition("::")
        (path,) = (ROOT / "tests").glob(f"{module}.py" if "/" in module else f"*/{module}.py")
        assert f"\ndef {function}(" in path.read_text(), f"there is no {test}"


def test_each_promise_has_a_row_with_a_test() -> None:
    promises = re.findall(r"(?m)^\| \*\*(.+?)\.\*\* .* \| (.+) \|$", SECURITY)
    assert len(promises) > 35
    for promise, tests in promises:
        assert _named(tests), promise


def test_each_function_that_it_names_exists() -> None:
    named = re.findall(r"`([\w/]+)\.py: (\w+)`", SECURITY)
    assert len(named) > 12
    for module, name in named:
        source = (ROOT / f"loopd/{module}.py").read_text()
        assert re.search(rf"(?m)^\s*(?:def|class) {name}\b", source), f"{module}: {name}"
