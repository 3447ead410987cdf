"""Policy: every key of loopd.toml does what it says, by real requests; a wrong one is an error that names it."""

from __future__ import annotations

import contextlib
import functools
import os
import pwd
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.daemon import ROOT, Daemon, ask, bound_to, eventually, exists, require
from support.kept import Kept, start_kept_fixture  # noqa: F401
from support.processes import CLONE_NEWNS, IN_NAMESPACE, Activated, become, mapped, unshare
from support.untouched import cgroup, elsewhere, helpers, leases, maker, pair, paused, reply_of, send, stopped

from loopd.daemon import counter as counters
from loopd.daemon import policy, subids
from loopd.daemon.policy import Allow, ConfigurationError, Limits, Policy
from loopd.protocol import wire
from loopd.worker import devices

EXAMPLE = ROOT / "docs/loopd.toml.example"
SOON = 5.0


# The example ------------------------------------------------------------------------------------------------------


def test_the_example_has_every_key_with_its_default() -> None:
    tables = tomllib.loads(EXAMPLE.read_text())
    assert set(tables) - {"limits", "allow"} == set(policy.KEYS)
    assert set(tables["limits"]) == set(policy.LIMIT_KEYS) == set(Limits._fields)
    assert set(tables["allow"]) == set(policy.ALLOW_KEYS) == set(Allow._fields)
    assert policy.load(str(EXAMPLE)) == Policy()
    assert Policy._fields == (*policy.KEYS, "limits", "allow", "rules")


def test_the_example_explains_every_key() -> None:
    lines = EXAMPLE.read_text().splitlines()
    keys = [number for number, line in enumerate(lines) if re.match(r"\w+ = ", line)]
    assert len(keys) == len(policy.KEYS) + len(policy.LIMIT_KEYS) + len(policy.ALLOW_KEYS)
    for number in keys:
        assert lines[number - 1].startswith("# "), lines[number]


def test_the_examples_rule_can_be_used(tmp_path: Path) -> None:
    _, _, rule = EXAMPLE.read_text().partition("# [[rule]]\n")
    path = tmp_path / "loopd.toml"
    path.write_text("[[rule]]\n" + "".join(line.removeprefix("# ") for line in rule.splitlines(keepends=True)))
    (found,) = policy.load(str(path)).rules
    assert found.instance
    assert found.account
    assert found.uids == ((0, 0), (100000, 165535))
    assert found.gids == ((100000, 165535),)
    assert set(tomllib.loads(path.read_text())["rule"][0]) - {"limits", "allow"} == set(policy.RULE_KEYS)


# What is wrong ----------------------------------------------------------------------------------------------------

WRONG = {
    "idle_timeout = -1": ("idle_timeout", "0.1 or more"),
    "idle_timeout = nan": ("idle_timeout", "a number"),
    "request_timeout = 0.5": ("request_timeout", "1 or more"),
    "number_wait = '5'": ("number_wait", "a number"),
    "reply_to_address = 1": ("reply_to_address", "true or false"),
    "surprise = 1": ("surprise", "there is no such key"),
    "limits = 5": ("limits", "a table"),
    "limits.surprise = 1": ("limits.surprise", "there is no such key; there are devices, "),
    "limits.devices = -1": ("limits.devices", "0 or more"),
    "limits.devices = 1.5": ("limits.devices", "a whole number"),
    "limits.devices = true": ("limits.devices", "a whole number"),
    "limits.requests = 0": ("limits.requests", "1 or more"),
    "limits.requests_per_second = 1": ("limits.requests_per_second", "there is no such key"),
    "limits.stuck = 0": ("limits.stuck", "1 or more"),
    "limits.new_numbers = 'all'": ("limits.new_numbers", "a whole number"),
    "limits.new_numbers_per_minute = inf": ("limits.new_numbers_per_minute", "a number"),
    "limits.bytes = '1 GiB'": ("limits.bytes", 'a size, as "100G"'),
    "limits.bytes = '1.5G'": ("limits.bytes", 'a size, as "100G"'),
    "limits.bytes = '-1G'": ("limits.bytes", 'a size, as "100G"'),
    "limits.bytes = '10'": ("limits.bytes", 'a size, as "100G"'),
    "limits.bytes = -1": ("limits.bytes", "a whole number"),
    "limits.bytes = true": ("limits.bytes", "a whole number"),
    "allow.surprise = true": ("allow.surprise", "there is no such key"),
    "allow.attach = 'no'": ("allow.attach", "true or false"),
    "allow.write = 0": ("allow.write", "true or false"),
    "allow.partscan = []": ("allow.partscan", "true or false"),
    "allow.lock = 1": ("allow.lock", "true or false"),
    "allow.direct_io = 'auto'": ("allow.direct_io", "true or false"),
    "allow.block_devices = ''": ("allow.block_devices", "true or false"),
    "allow.mknod = 2": ("allow.mknod", "true or false"),
    "allow.file_systems = 'ext4'": ("allow.file_systems", "a list"),
    "allow.file_systems = [1]": ("allow.file_systems", "a list"),
    "allow.file_systems = ['ext4', 'proc', 'sysfs']": ("allow.file_systems", "files of proc, sysfs are never allowed"),
    "allow.sector_sizes = [520]": ("allow.sector_sizes", "512, 1024, 2048, 4096"),
    "allow.sector_sizes = []": ("allow.sector_sizes", "some of"),
    "rule = 1": ("rule 1", "a table"),
    "rule = [1]": ("rule 1", "a table"),
    "[[rule]]\nsurprise = 1": ("rule 1.surprise", "there are instance, account, uid, gid, limits.KEY, allow.KEY"),
    "[[rule]]\n[[rule]]\nuid = 'root'": ("rule 2.uid", "an id or a range"),
    "[[rule]]\nuid = -1": ("rule 1.uid", "an id or a range"),
    "[[rule]]\ngid = ['1-', 2]": ("rule 1.gid", "an id or a range"),
    "[[rule]]\ngid = true": ("rule 1.gid", "an id or a range"),
    "[[rule]]\naccount = ''": ("rule 1.account", "a pattern"),
    "[[rule]]\ninstance = 5": ("rule 1.instance", 'a pattern, as "ci*"'),
    "[[rule]]\nlimits.devices = 'x'": ("rule 1.limits.devices", "a whole number"),
    "[[rule]]\nallow.lock = 'x'": ("rule 1.allow.lock", "true or false"),
    "not toml": ("-", "line 1"),
}


SIZES = {
    "5": 5, '"5K"': 5120, '"1M"': 1 << 20, '"100G"': 100 << 30, '"2T"': 2 << 40, '"1GiB"': 1 << 30, '"1GB"': 10**9,
    '"0K"': 0,
}  # fmt: skip


@pytest.mark.parametrize("text", SIZES)
def test_sizes(tmp_path: Path, text: str) -> None:
    (tmp_path / "loopd.toml").write_text(f"limits.bytes = {text}\n[[rule]]\nuid = 7\nlimits.bytes = {text}\n")
    loaded = policy.load(str(tmp_path / "loopd.toml"))
    assert (loaded.limits.bytes, loaded.terms("", "/", 7, 7).limits.bytes) == (SIZES[text], SIZES[text])


def _problem(path: Path, text: str) -> tuple[str, str]:
    path.write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        policy.load(str(path))
    ((file, key, reason),) = caught.value.problems
    assert file == str(path)
    return key, reason


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_key_or_value(tmp_path: Path, text: str) -> None:
    key, reason = WRONG[text]
    found = _problem(tmp_path / "loopd.toml", text)
    assert found[0] == key
    assert reason in found[1]


MISTAKES = (
    "allow.sector_sizes = [[512]]",
    "allow.sector_sizes = [512.0]",
    "[[rule]]\nuid = '9-5'",
    "[[rule]]\nuid = []",
)


@pytest.mark.parametrize("text", MISTAKES)
def test_a_value_that_can_only_be_a_mistake(tmp_path: Path, text: str) -> None:
    _problem(tmp_path / "loopd.toml", text)


def check(path: Path | str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "loopd", "--check-config", f"--config={path}"]
    return subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_check_config_names_file_key_and_reason_of_everything(tmp_path: Path) -> None:
    path, more = tmp_path / "loopd.toml", tmp_path / "loopd.toml.d" / "10-more.toml"
    path.write_text("surprise = 1\nlimits.devices = -1\n")
    more.parent.mkdir()
    more.write_text("[[rule]]\nuid = 'root'\n")
    (more.parent / "20-broken.toml").write_text("[")
    done = check(path)
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert [line.rpartition(": expected")[0] or line for line in lines[:2]] == [
        f"loopd: {path}: limits.devices",
        f"loopd: {path}: surprise: there is no such key; there are {', '.join(policy.KEYS)}, limits, allow, [[rule]]",
    ]
    assert lines[2].startswith(f"loopd: {more}: rule 1.uid: expected an id")
    assert lines[3].startswith(f"loopd: {more.parent}/20-broken.toml: -: ")
    assert len(lines) == 4


@pytest.mark.parametrize("inherited", [False, True], ids=["of the service", "in a terminal"])
def test_a_start_that_fails_is_in_the_audit(tmp_path: Path, *, inherited: bool) -> None:
    """Where standard error is the journal's; a variable of that name is in a desktop's terminals, too."""
    command = [sys.executable, "-m", "loopd", f"--config={EXAMPLE}", f"--state-directory={tmp_path}"]
    # Without a journal its records go to standard error, too.
    hidden = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs tmpfs /run && exec "$@"', "sh"]
    log = tmp_path / "log"
    with log.open("wb") as file:
        status = os.fstat(0 if inherited else file.fileno())
        environment = {**os.environ, "JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
        done = subprocess.run(
            [*hidden, *command], check=False, cwd=ROOT, stderr=file, timeout=60, env=environment
        )
    assert done.returncode == 1
    assert "no socket was passed" in log.read_text()
    assert ("LOOPD_EVENT='failed'" in log.read_text()) is not inherited


def test_check_config_of_what_is_right(tmp_path: Path) -> None:
    done = check(EXAMPLE)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_file_that_is_asked_for_and_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "loopd.tmol"
    done = check(path)
    assert (done.returncode, done.stderr) == (1, f"loopd: {path}: -: No such file or directory\n")


@pytest.mark.parametrize("closed", ["the folder", "the folder of more files"])
def test_a_policy_that_cannot_be_read_is_not_the_defaults(tmp_path: Path, closed: str) -> None:
    """The service is no root: a policy in a folder of root's alone must not be passed over in silence."""
    folder = tmp_path / "loopd"
    more = folder / "loopd.toml.d"
    more.mkdir(parents=True)
    (folder / "loopd.toml").write_text("")
    (more / "deny.toml").write_text("allow.attach = false")
    folder.chmod(0o755)
    (folder if closed == "the folder" else more).chmod(0o700)

    def read() -> bool:
        try:
            policy.load("loopd/loopd.toml")
        except ConfigurationError:
            return True
        return False

    def prepare() -> None:
        os.chdir(tmp_path)
        become(65534)

    assert elsewhere(read, prepare)


def test_files_are_merged_in_the_order_of_their_names(tmp_path: Path) -> None:
    path = tmp_path / "loopd.toml"
    path.write_text("limits.devices = 1\nlimits.requests = 1\nlimits.stuck = 1\n[[rule]]\nuid = 1\nlimits.bytes = 1\n")
    more = tmp_path / "loopd.toml.d"
    more.mkdir()
    (more / "b.toml").write_text("limits.requests = 3\n[[rule]]\nuid = 1\nlimits.bytes = 3\n")
    (more / "a.toml").write_text("limits.devices = 2\nlimits.requests = 2\n[[rule]]\nuid = 1\nlimits.bytes = 2\n")
    (more / "c.toml.bak").write_text("limits.devices = 9\n")
    loaded = policy.load(str(path))
    assert loaded.limits == Limits(devices=2, requests=3, stuck=1)
    assert loaded.terms("", "/", 1, 1).limits.bytes == 3
    path.unlink()
    assert policy.load(str(path)).limits == Limits(devices=2, requests=3)


# Real requests ----------------------------------------------------------------------------------------------------


def apart(state: Path) -> Path:
    """A state directory with a counter that starts anywhere: a number that is lost to another daemon counts too."""
    state.mkdir(mode=0o700)
    counter = counters.Counter(str(state / "numbers"))
    try:
        os.pwrite(counter._fd, counters._HEADER.pack(counters._MAGIC, random.randrange(counters.BLOCKS)), 0)
    finally:
        counter.close()
    return state


@pytest.fixture
def configured(start_daemon: Callable[..., Daemon], tmp_path: Path) -> Callable[..., Daemon]:
    """Start a daemon with this policy, to which everybody may send."""

    def start(text: str, *options: str, **more: Any) -> Daemon:
        path = tmp_path / "loopd.toml"
        path.write_text(text)
        options = (f"--state-directory={apart(tmp_path / 'state')}", *options)
        daemon = start_daemon(f"--config={path}", *options, **more)
        Path(daemon.path).chmod(0o666)
        tmp_path.chmod(0o711)
        return daemon

    return start


def client(daemon: Daemon, act: Callable[[], object], *prepare: Callable[[], object]) -> Any:
    """What `act` returns in a process that has gone to the daemon's directory and then done what is to be prepared."""

    def begin() -> None:
        os.chdir(daemon.directory)
        for step in prepare:
            step()

    return elsewhere(act, begin)


def ids(uid: int, gid: int) -> Callable[[], None]:
    """For `client`: that uid and gid, without capabilities where they are not 0."""

    def act() -> None:
        os.setgroups([])
        os.setgid(gid)
        os.setuid(uid)

    return act


def request(message: wire.Request, *fds: int) -> dict[str, Any]:
    reply = ask("loopd.sock", wire.encode_request(message), list(fds))
    for fd in reply.fds:
        os.close(fd)
    reply.channel.close()
    return reply.fields


def devices_allowed() -> int:
    found: int = request(wire.Hello(0))["limits"]["devices"]
    return found


RULES = """
limits.devices = 1
[[rule]]
uid = 20002
limits.devices = 2
[[rule]]
uid = [20003, "20004-20009"]
limits.devices = 3
[[rule]]
gid = "20011-20012"
limits.devices = 4
[[rule]]
uid = "20005-20006"
limits.devices = 5
[[rule]]
account = "*/loopd-test-*"
limits.devices = 6
[[rule]]
account = "/nobody/*"
limits.devices = 7
[[rule]]
instance = "other*"
limits.devices = 8
[[rule]]
account = "*/loopd-test-*"
uid = 20020
limits.devices = 9
"""


def test_rules(configured: Callable[..., Daemon]) -> None:
    """By uid, gid, their ranges, account and instance; all that a rule names must match, and the later one wins."""
    daemon = configured(RULES)

    def allowed(uid: int, gid: int, *prepare: Callable[[], object]) -> int:
        found: int = client(daemon, devices_allowed, *prepare, ids(uid, gid))
        return found

    assert [allowed(uid, 1) for uid in range(20001, 20011)] == [1, 2, 3, 3, 5, 5, 3, 3, 3, 1]
    assert [allowed(20001, gid) for gid in range(20010, 20014)] == [1, 4, 4, 1]
    assert allowed(20005, 20011) == 5
    assert allowed(20020, 1) == 1
    with cgroup(f"loopd-test-{os.getpid()}") as enter:
        require(enter, "needs a cgroup hierarchy to make a second account in")
        assert enter is not None
        assert allowed(20002, 1, enter) == 6
        assert allowed(20020, 1, enter) == 9


SUBUIDS = """
nobody:300000:65536
20401:400000:65536
# a comment, a line that is none, and ids that nobody has
20402:500000
:600000:65536
20402:700000:0
no-such-user:800000:65536
20403:900000:100
20403:900100:100
"""
SUBRULES = """
limits.devices = 4
[[rule]]
uid = [65534, 20401]
allow.write = false
limits.devices = 2
limits.bytes = "1M"
[[rule]]
uid = 20403
limits.devices = 9
allow.lock = true
[[rule]]
uid = 20403
gid = 20403
limits.devices = 3
allow.sector_sizes = [512]
"""


@pytest.fixture
def subordinate(configured: Callable[..., Daemon], tmp_path: Path) -> Daemon:
    """A daemon that has these for /etc/subuid and /etc/subgid."""
    for name in ("subuid", "subgid"):
        require(Path(f"/etc/{name}").exists(), f"needs an /etc/{name} to be replaced")
        (tmp_path / name).write_text(SUBUIDS)
    there = f"mount --bind {tmp_path}/subuid /etc/subuid; mount --bind {tmp_path}/subgid /etc/subgid"
    return configured(SUBRULES, launcher=(*IN_NAMESPACE, f'{there}; exec "$@"', "sh"))


def test_a_rule_for_a_user_holds_for_his_user_namespaces(subordinate: Daemon, image: int) -> None:
    """For the ids that newuidmap(1) gives him, by name or by number; and it only takes away from these."""
    message = wire.Attach(0, reply_fd=1, deliver=("fd",))

    def code() -> str | None:
        found: str | None = request(message, image).get("error", {}).get("code")
        return found

    def asked(uid: int, gid: int, *prepare: Callable[[], object]) -> tuple[int, str | None]:
        devices: int = client(subordinate, devices_allowed, *prepare, ids(uid, gid))
        return devices, client(subordinate, code, *prepare, ids(uid, gid))

    refused = "not-permitted"
    for uid in (65534, 300000, 365535, 20401, 400005):
        assert asked(uid, 1) == (2, refused), uid
    for uid in (299999, 365536, 500000, 600000, 700000, 800000, 20402):
        assert asked(uid, 1) == (4, None), uid
    assert asked(20403, 1) == (9, None), "what a rule gives it gives to that user"
    assert asked(900150, 1) == (4, None), "and not to who is in his container"

    assert client(subordinate, code, mapped(300000, 65536)) == refused


def test_a_rule_for_ids_that_others_have_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several that hold for a namespace each takes away; a rule that names the ids themselves is as any other."""
    (tmp_path / "subuid").write_text("20401:400000:65536\n20402:400000:65536\n")
    (tmp_path / "subgid").write_text("nobody:400000:65536\n")
    monkeypatch.setattr(subids, "SUBUID", str(tmp_path / "subuid"))
    monkeypatch.setattr(subids, "SUBGID", str(tmp_path / "subgid"))

    def terms(text: str, uid: int, gid: int = 1) -> policy.Terms:
        (tmp_path / "loopd.toml").write_text(text)
        return policy.load(str(tmp_path / "loopd.toml")).terms("", "/", uid, gid)

    two = "[[rule]]\nuid = 20401\nlimits.bytes = 5\nlimits.stuck = 9\n[[rule]]\nuid = 20402\nlimits.bytes = 7\n"
    assert terms(two, 400001).limits == Limits(bytes=5)
    assert terms(two, 20402).limits == Limits(bytes=7)
    own = '[[rule]]\nuid = "400000-400009"\nallow.lock = true\nallow.sector_sizes = [512]\n'
    assert terms(two + own, 400001).allow == Allow(lock=True, sector_sizes=frozenset({512}))
    sizes = "[[rule]]\nuid = 20401\nallow.sector_sizes = [512, 4096]\n"
    sizes += "[[rule]]\nuid = 20402\nallow.sector_sizes = [512]\n"
    assert terms(sizes, 400001).allow.sector_sizes == {512}
    nogroup = pwd.getpwnam("nobody").pw_gid
    group = f"[[rule]]\ngid = {nogroup}\nlimits.devices = 1\n"
    assert [terms(group, 1, gid).limits.devices for gid in (nogroup, 400000, 465536)] == [1, 1, 256]
    both = f"[[rule]]\nuid = 20401\ngid = {nogroup}\nlimits.devices = 1\n"
    assert [terms(both, 400000, gid).limits.devices for gid in (nogroup, 400000, 5)] == [1, 1, 256]
    (tmp_path / "subuid").unlink()
    assert terms(two, 400001).limits == Limits()
    (tmp_path / "subuid").mkdir()
    with pytest.raises(ConfigurationError, match="subuid: -: Is a directory"):
        terms(two, 400001)


def test_rules_of_an_instance(configured: Callable[..., Daemon]) -> None:
    daemon = configured(RULES, "--instance=others")
    assert client(daemon, devices_allowed, ids(20002, 1)) == 8


# One daemon for all: each permission is taken away from a uid of its own, or given to it where it is off by default.
TAKEN = {
    "attach": 20100, "write": 20101, "partscan": 20102, "lock": 20103, "direct_io": 20104, "sector_sizes": 20105,
    "file_systems": 20106, "block_devices": 20107,
}  # fmt: skip
PERMISSIONS = "".join(
    f"[[rule]]\nuid = {uid}\nallow.{key} = "
    + {"sector_sizes": "[512]", "file_systems": '["xfs"]', "block_devices": "true", "lock": "true"}.get(key, "false")
    + "\n"
    for key, uid in TAKEN.items()
)  # fmt: skip


def test_permissions(configured: Callable[..., Daemon], make_image: Callable[..., int], tmp_path: Path) -> None:
    assert {*TAKEN, "mknod"} == set(policy.ALLOW_KEYS)
    daemon = configured(PERMISSIONS)
    image, readable = make_image(), make_image(flags=os.O_RDONLY)

    def code(uid: int, backing: int = image, **fields: Any) -> str | None:
        def act() -> str | None:
            answer = request(wire.Attach(0, reply_fd=1, deliver=("fd",), **fields), backing)
            return answer["error"]["code"] if "error" in answer else None

        found: str | None = client(daemon, act, ids(uid, uid))
        return found

    refused = "not-permitted"
    other = 20199  # whom no rule is about
    asked: dict[str, dict[str, Any]] = {
        "attach": {}, "write": {}, "partscan": {"partscan": True},
        "direct_io": {"direct_io": "on", "sector_size": 4096}, "sector_sizes": {"sector_size": 4096},
        "file_systems": {},
    }  # fmt: skip
    for key, fields in asked.items():
        assert code(TAKEN[key], **fields) == refused, key
        assert code(other, **fields) in (None, "unsupported"), key  # direct I/O is the file system's to have
    for key in ("partscan", "direct_io", "sector_sizes"):
        assert code(TAKEN[key]) is None, key
    assert code(other, lock=True) == refused, "udevadm settle on the host would wait for its end"
    assert code(TAKEN["lock"], lock=True) is None
    assert code(TAKEN["write"], read_only=True) is None
    assert code(TAKEN["write"], readable) is None
    assert code(TAKEN["attach"], readable, read_only=True) == refused
    with open(os.memfd_create("memory"), "r+b") as memory:
        os.truncate(memory.fileno(), 1 << 16)
        assert code(TAKEN["file_systems"], memory.fileno()) is None  # on none
    subprocess.run(["mount", "--mkdir", "-t", "tmpfs", "loopd-test", tmp_path / "tmpfs"], check=True)
    try:
        with (tmp_path / "tmpfs/image").open("w+b") as file:
            os.truncate(file.fileno(), 1 << 16)
            assert code(TAKEN["file_systems"], file.fileno()) == refused
            assert code(other, file.fileno()) is None
        eventually(lambda: not leases(daemon), "every lease is over", SOON)
    finally:
        subprocess.run(["umount", tmp_path / "tmpfs"], check=True)
    with _loop_device(tmp_path) as device:
        assert code(other, device) == "bad-fd"
        assert code(TAKEN["block_devices"], device) is None
    eventually(lambda: not leases(daemon), "every lease is over", SOON)


@contextlib.contextmanager
def _loop_device(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "below"
    path.write_bytes(bytes(1 << 20))
    name = subprocess.run(["losetup", "-f", "--show", str(path)], check=True, capture_output=True, text=True).stdout
    try:
        with open(name.strip(), "r+b", buffering=0) as device:
            yield device.fileno()
    finally:
        subprocess.run(["losetup", "-d", name.strip()], check=True)


def test_direct_io_is_off_where_it_is_not_allowed(
    configured: Callable[..., Daemon], make_image: Callable[..., int]
) -> None:
    """Nor does it help to open the file for direct I/O."""
    images = make_image(), make_image(flags=os.O_RDWR | os.O_DIRECT)
    daemon = configured("[[rule]]\nuid = 20104\nallow.direct_io = false\n")
    message = wire.Attach(0, reply_fd=1, deliver=("fd",), sector_size=4096)
    for image in images:
        free, bound = (client(daemon, lambda: request(message, image), ids(uid, uid)) for uid in (20199, 20104))  # noqa: B023
        require(free["direct_io"], "the file system of the test's directory has no direct I/O")
        assert not bound["direct_io"]


def test_clients_with_cap_mknod(configured: Callable[..., Daemon], image: int) -> None:
    """In a container they are warned, or refused; on the host it means nothing, where root can do what he likes."""
    daemon = configured("[[rule]]\ngid = 20200\nallow.mknod = false\n")
    message = wire.Attach(0, reply_fd=1, deliver=("fd",))

    def act() -> dict[str, Any]:
        return request(message, image)

    container = lambda: unshare(CLONE_NEWNS)  # noqa: E731  # a step of preparation
    (warning,) = client(daemon, act, container)["warnings"]
    assert "--cap-drop MKNOD" in warning
    fields = client(daemon, act, container, ids(0, 20200))
    assert fields["error"]["code"] == "not-permitted"
    assert "--cap-drop MKNOD" in fields["error"]["message"]
    assert client(daemon, act, ids(0, 20200))["warnings"] == []
    assert client(daemon, act, container, ids(20201, 20200))["warnings"] == []


# Limits -----------------------------------------------------------------------------------------------------------


def test_devices_at_once(configured: Callable[..., Daemon], image: int, directory: int) -> None:
    daemon = configured("limits.devices = 2")
    first, second, third = (daemon.attach(image, directory) for _ in range(3))
    assert (first.code, second.code, third.code) == (None, None, "quota")
    assert daemon.hello().fields["limits"]["devices"] == 2
    assert daemon.ask(wire.Detach(first.fields["devname"], 0), []).fields == {"state": "released"}
    assert daemon.attach(image, directory).code is None


def test_a_device_that_is_held_open_counts(
    configured: Callable[..., Daemon], image: int, directory: int, devices: Path
) -> None:
    daemon = configured("limits.devices = 1")
    name = daemon.attach(image, directory).fields["devname"]
    with (devices / name).open("rb"):
        assert daemon.ask(wire.Detach(name, 0), []).fields == {"state": "busy"}
        assert daemon.attach(image, directory).code == "quota"
    eventually(lambda: not leases(daemon), "the device is gone", SOON)
    assert daemon.attach(image, directory).code is None


def test_limits_are_an_accounts(configured: Callable[..., Daemon], image: int, directory: int) -> None:
    """65,536 uids of one user are one account; another container is another."""
    daemon = configured("limits.devices = 1")
    daemon.attach(image, directory)
    message = wire.Attach(0, reply_fd=1, deliver=("fd",))

    def act() -> dict[str, Any]:
        return request(message, image)

    for uid in (0, 20300, 20301):
        assert client(daemon, act, ids(uid, uid))["error"]["code"] == "quota"
    with cgroup(f"loopd-test-{os.getpid()}") as enter:
        require(enter, "needs a cgroup hierarchy to make a second account in")
        assert enter is not None
        assert "devname" in client(daemon, act, enter, ids(20300, 20300))


def shed(daemon: Daemon) -> int:
    """The requests that were dropped, of all records: there is one a second."""
    return sum(int(record["LOOPD_COUNT"]) for record in daemon.records("shed"))


def test_requests_under_way(configured: Callable[..., Daemon], image: int, directory: int, devices: Path) -> None:
    """What is beyond the limit is dropped: its reply socket hangs up. It is counted."""
    daemon = configured("limits.requests = 1")
    name = daemon.attach(image, directory).fields["devname"]
    with (devices / name).open("rb"):
        ours, theirs = pair()
        with theirs:
            send(daemon.path, wire.encode_request(wire.Detach(name, 0, wait=3)), [theirs.fileno()]).close()
        for _ in range(5):
            assert daemon.ask(wire.Hello(0), []).fields == {}
        assert reply_of(ours).fields == {"state": "busy"}
        ours.close()
        eventually(lambda: shed(daemon) >= 5, "they are in the journal", SOON)
        assert shed(daemon) == 5
        assert daemon.hello().code is None


def test_a_burst_of_one_process(configured: Callable[..., Daemon], image: int, directory: int) -> None:
    """As many as may be under way are all answered; what is more is dropped and counted. Who waits for each answer may
    be as fast as it can.
    """
    daemon = configured("limits.requests = 24")
    assert daemon.hello().code is None
    for _ in range(5):
        asked = []
        for _ in range(24):
            ours, theirs = pair()
            with theirs:
                send(daemon.path, wire.encode_request(wire.Hello(0)), [theirs.fileno()]).close()
            asked.append(ours)
        for ours in asked:
            with contextlib.closing(reply_of(ours)) as reply:
                assert "protocol" in reply.fields
    ours, theirs = pair()
    with ours, theirs, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.connect(daemon.path)
        with stopped(daemon):
            for _ in range(9):  # what the queue of a socket holds at least
                socket.send_fds(sender, [wire.encode_request(wire.Hello(0))], [theirs.fileno()])
    # Its worker may still have files of the last one to close when the next one comes.
    for _ in range(200):
        assert daemon.ask(wire.Hello(2), [image, directory]).fields != {}


def _gone(name: str) -> bool:
    return not exists(name)


def test_new_numbers(configured: Callable[..., Daemon], image: int, directory: int, devices: Path) -> None:
    """Beyond the limit an account gets again what it had."""
    daemon = configured("limits.new_numbers = 2\nlimits.new_numbers_per_minute = 0")
    names = set()
    for _ in range(8):
        reply = daemon.attach(image, directory)
        assert reply.code is None, reply.fields
        name = reply.fields["devname"]
        names.add(name)
        assert daemon.ask(wire.Detach(name, 0), []).fields == {"state": "released"}
        eventually(functools.partial(_gone, name), "the number is removed")
    assert len(names) == 2
    held = [daemon.attach(image, directory) for _ in range(3)]
    assert [reply.code for reply in held] == [None, None, "quota"]
    assert "2 and 0 a minute" in held[2].fields["error"]["message"]


def test_new_numbers_a_minute(configured: Callable[..., Daemon], image: int, directory: int) -> None:
    daemon = configured("limits.new_numbers = 1\nlimits.new_numbers_per_minute = 120")
    assert daemon.attach(image, directory).code is None
    began = time.monotonic()
    eventually(lambda: daemon.attach(image, directory).code is None, "there is another number", 20)
    assert time.monotonic() - began > 0.4


@pytest.mark.parametrize("wait", [0, 5])
def test_waiting_for_a_number(configured: Callable[..., Daemon], image: int, directory: int, wait: int) -> None:
    """The one number of this account is being removed when it is wanted again: it is waited for, or not."""
    daemon = configured(f"limits.new_numbers = 1\nlimits.new_numbers_per_minute = 0\nnumber_wait = {wait}")
    codes = set()
    for _ in range(10):
        reply = daemon.attach(image, directory)
        codes.add(reply.code)
        if reply.code is None:
            assert daemon.ask(wire.Detach(reply.fields["devname"], 0), []).fields == {"state": "released"}
    assert None in codes
    # "quota": the number cannot be removed as long as somebody, udev perhaps, has it open.
    assert "timeout" in codes if wait == 0 else "timeout" not in codes


PIDFD = "anon_inode:[pidfd]"
"""What the daemon has open of a client to which the answer is to come."""


@pytest.mark.parametrize("end", ["timeout", "killed"])
def test_an_attach_that_waited_for_a_number_has_none(
    configured: Callable[..., Daemon], image: int, directory: int, end: str
) -> None:
    """It ends while it waits: no helper counts as hanging, and the number is the next one's."""
    timeouts = "request_timeout = 2" if end == "timeout" else ""
    daemon = configured(f"{timeouts}\nlimits.new_numbers = 1\nlimits.new_numbers_per_minute = 0")
    name = daemon.attach(image, directory).fields["devname"]
    with paused(maker(daemon)):  # the removal takes its time
        assert daemon.ask(wire.Detach(name, 0, wait=5), []).fields == {"state": "released"}
        eventually(lambda: PIDFD not in daemon.fds(), "the detach is over")
        ours, theirs = pair()
        with theirs:
            fds = [image, directory, theirs.fileno()]
            send(daemon.path, wire.encode_request(wire.Attach(0, 1, 2)), fds).close()
        if end == "killed":
            eventually(lambda: PIDFD in daemon.fds(), "it is under way")
            time.sleep(0.1)  # it waits
            for helper in helpers(daemon):
                with contextlib.suppress(ProcessLookupError):  # ended by itself
                    os.kill(helper, signal.SIGKILL)
        with contextlib.closing(reply_of(ours)) as reply:
            assert reply.code == ("timeout" if end == "timeout" else "internal")
    time.sleep(0.1)
    # Numbers may have to be made ahead of need before that one is removed.
    found = eventually(lambda: daemon.attach(image, directory).fields.get("devname"), "there is a number")
    assert found == name
    assert daemon.records("stuck") == []


def test_bytes(
    configured: Callable[..., Daemon], make_image: Callable[..., int], directory: int, tmp_path: Path
) -> None:
    daemon = configured(f"limits.bytes = {3 << 20}")
    big, small = make_image(2 << 20, "big"), make_image(1 << 20, "small")
    assert daemon.attach(big, directory).code is None
    refused = daemon.attach(big, directory)
    assert refused.code == "quota"
    assert daemon.attach(small, directory).code is None
    eventually(lambda: len(bound_to(tmp_path)) == 2, "what was refused is not bound", SOON)


def test_bytes_after_a_resize(configured: Callable[..., Daemon], image: int, directory: int) -> None:
    daemon = configured(f"limits.bytes = {2 << 20}")
    name = daemon.attach(image, directory).fields["devname"]
    os.truncate(image, 3 << 20)
    assert daemon.ask(wire.Resize(name, 0), []).code == "quota"
    assert devices.size(name) == 1 << 20
    os.truncate(image, 3 << 19)
    assert daemon.ask(wire.Resize(name, 0), []).fields["size"] == devices.size(name) == 3 << 19


def lingering(seconds: int) -> tuple[socket.socket, socket.socket]:
    """A TCP socket whose last close takes so long, since its peer reads nothing; and the peer."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        ours = socket.create_connection(listener.getsockname())
        peer, _ = listener.accept()
    ours.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            ours.send(bytes(65536))
    ours.setblocking(True)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, seconds))
    return ours, peer


@contextlib.contextmanager
def hanging(daemon: Daemon, count: int, before: int = 0) -> Iterator[None]:
    """Send requests that are answered, and whose helpers then hang when they close what came along.

    `before`: so many other fds are before that.
    """
    with contextlib.ExitStack() as stack:
        for _ in range(0, count, 8):
            asked = []
            with stopped(daemon):  # so that the daemon's is the last close
                for _ in range(min(8, count)):
                    slow, peer = lingering(40)
                    stack.enter_context(peer)
                    ours, theirs = pair()
                    with theirs, slow:
                        fds = [theirs.fileno()] * (before + 1) + [slow.fileno()]
                        send(daemon.path, b'{"op": "hello", "reply_fd": 0}', fds).close()
                    asked.append(ours)
            for ours in asked:
                with ours, contextlib.suppress(TimeoutError):
                    reply_of(ours, 2)
        yield


def test_helpers_that_hang(configured: Callable[..., Daemon]) -> None:
    """Written off after `request_timeout`; after so many as `stuck` allows, nothing more is done until one ends."""
    daemon = configured("limits.stuck = 1\nrequest_timeout = 1")
    assert daemon.hello().code is None
    with hanging(daemon, 1):
        (record,) = eventually(lambda: daemon.records("stuck"), "it is written off", SOON)
        assert int(record["LOOPD_DURATION_USEC"]) > 0.9e6
    # A socket's close is no wait that withstands SIGKILL: it is over at once, and the account is served.
    eventually(lambda: daemon.hello().fields, "the account is served again", SOON)


# The daemon's own -------------------------------------------------------------------------------------------------


def test_idle_timeout(configured: Callable[..., Daemon]) -> None:
    daemon = configured("idle_timeout = 0.5")
    assert daemon.hello().code is None
    began = time.monotonic()
    assert daemon.wait(20) == 0
    assert time.monotonic() - began > 0.4


@pytest.mark.parametrize("vouched", [False, True])
def test_reply_to_address(tmp_path: Path, vouched: bool) -> None:
    """For a user other than root, as the service is, nothing but the administrator's word tells where the sender is."""
    require(os.geteuid() == 0, "needs root: loop devices")
    require(shutil.which("setpriv"), "needs setpriv (package util-linux)")
    path = tmp_path / "loopd.toml"
    path.write_text(f"reply_to_address = {str(vouched).lower()}")
    rights = "+mknod,+setuid,+setgid,+sys_admin,+dac_override"
    wrapper = ["setpriv", "--reuid=65534", f"--inh-caps={rights}", f"--ambient-caps={rights}"]
    directory = tmp_path / "loopd"
    directory.mkdir()
    daemon = Activated(directory, [f"--config={path}"], wrapper, {})
    with contextlib.ExitStack() as stack:
        stack.callback(daemon.stop)
        daemon.start()
        sender = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        sender.bind("")
        sender.connect(daemon.path)
        sender.settimeout(SOON)
        sender.send(b'{"op": "hello"}')
        if vouched:
            assert b'"protocol"' in sender.recv(4096)
        else:
            eventually(lambda: daemon.records("refused"), "it is in the journal")
            assert "undeliverable" in [record["LOOPD_CODE"] for record in daemon.records("refused")]
            sender.setblocking(False)
            with pytest.raises(BlockingIOError):
                sender.recv(4096)


# Reload -----------------------------------------------------------------------------------------------------------


def test_reload(configured: Callable[..., Daemon], image: int, directory: int, devices: Path, tmp_path: Path) -> None:
    """New requests follow it, leases stay; with anything wrong in it the old one stays, and the journal says why."""
    daemon = configured("limits.devices = 3")
    path = tmp_path / "loopd.toml"
    held = [daemon.attach(image, directory) for _ in range(2)]

    def reload(text: str, event: str) -> list[dict[str, str]]:
        before = len(daemon.records(event))
        path.write_text(text)
        os.kill(daemon.pid, signal.SIGHUP)
        return eventually(lambda: daemon.records(event)[before:], "it is in the journal", SOON)  # type: ignore[no-any-return]

    (record,) = reload("limits.devices = 2", "reloaded")
    assert record["LOOPD_PATH"] == str(path)
    assert daemon.hello().fields["limits"]["devices"] == 2
    assert daemon.attach(image, directory).code == "quota"
    assert all((devices / reply.fields["devname"]).is_block_device() for reply in held)

    reload("limits.devices = 9\nlimits.surprise = 1\nallow.lock = 5", "warned")
    for wrong in ("limits.surprise: there is no such key", "allow.lock: expected true or false"):
        said = f"The old policy stays in force: {path}: {wrong}"
        eventually(lambda said=said: said in daemon.log(), "all of it is in the journal", SOON)  # type: ignore[misc]
    assert daemon.hello().fields["limits"]["devices"] == 2
    reload("not toml", "warned")
    assert daemon.attach(image, directory).code == "quota"
    reload("", "reloaded")
    assert daemon.hello().fields["limits"]["devices"] == Limits().devices


def test_a_daemon_with_a_wrong_policy_gives_nothing(
    configured: Callable[..., Daemon], image: int, directory: int, tmp_path: Path
) -> None:
    """It would otherwise allow what the administrator wanted to forbid. The client is told at once, and the journal."""
    daemon = configured("allow.attach = 'no'\nlimits.surprise = 1")
    path = tmp_path / "loopd.toml"
    wrong = f"{path}: allow.attach: expected true or false"
    assert daemon.hello().code is None
    asked = wire.Attach(0, 1, 2), wire.Directory("mine", 2), wire.Rescan("loop5000", 2), wire.Resize("loop5000", 2)
    for message in asked:
        began = time.monotonic()
        reply = daemon.ask(message, [image, directory])
        assert reply.code == "not-permitted"
        assert wrong in reply.fields["error"]["message"]
        assert time.monotonic() - began < 5
    assert daemon.ask(wire.Leases(0), []).fields["leases"] == []
    (record,) = eventually(lambda: daemon.records("failed"), "it is in the journal, once")
    assert wrong in record["MESSAGE"]
    assert "limits.surprise" in record["MESSAGE"]
    assert not bound_to(tmp_path)

    path.write_text("allow.attach = 'yes'")
    os.kill(daemon.pid, signal.SIGHUP)
    (record,) = eventually(lambda: daemon.records("warned"), "it is still wrong")
    assert record["MESSAGE"] == f"Nothing is attached, as before: {wrong}"
    path.write_text("")
    os.kill(daemon.pid, signal.SIGHUP)
    eventually(lambda: daemon.records("reloaded"), "it is read again")
    assert daemon.attach(image, directory).code is None


def test_a_policy_that_cannot_be_read(configured: Callable[..., Daemon], image: int, tmp_path: Path) -> None:
    """As one that root has written with a umask of 077."""
    daemon = configured("allow.attach = true")
    (tmp_path / "loopd.toml").unlink()
    (tmp_path / "loopd.toml").mkdir()
    reply = daemon.attach(image, None, deliver=("fd",))
    assert "Is a directory" in reply.fields["error"]["message"]


def test_what_was_attached_before_can_be_given_back(
    start_kept: Callable[..., Kept], image: int, directory: int
) -> None:
    daemon = start_kept(policy="limits.devices = 5\n")
    reply = daemon.attach(image, directory)
    assert reply.code is None
    (daemon.directory / "loopd.toml").write_text("limits.devices = 'none'\n")
    daemon.kill()
    assert daemon.attach(image, directory).code == "not-permitted"
    assert list(daemon.leases()) == [reply.fields["devname"]]
    assert daemon.ask(wire.Detach(reply.fields["devname"], 0, wait=5), []).fields == {"state": "released"}
    daemon.end()
