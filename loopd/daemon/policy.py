"""Policy: what a client may do, and how much.

Owns every limit and its default, and how the configuration files are read: a wrong key or value is an error that names
it, and there is no half-read policy. A Policy is a frozen value. It decides from the facts that it is given, and looks
at nothing itself.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from loopd.daemon import subids
from loopd.daemon.subids import Ranges
from loopd.protocol import wire
from loopd.worker.files import ANSWERING, NEVER

CONFIGURATION = "/etc/loopd/loopd.toml"


class ConfigurationError(Exception):
    """What is wrong in which file; `problems` are (file, key, reason)."""
    def __init__(self, problems: list[tuple[str, str, str]]) -> None:
        super().__init__("; ".join(f"{file}: {key}: {reason}" for file, key, reason in problems))
        self.problems = problems


class Limits(NamedTuple):
    """How much one account may have."""

    devices: int = 256
    """Devices at once."""
    requests: int = 32
    """Requests under way at once."""
    stuck: int = 2
    """Worker processes that may hang in its requests before these are dropped unanswered."""
    new_numbers: int = 256
    """Fresh device numbers at once; beyond these it gets numbers that it had before."""
    new_numbers_per_minute: float = 10.0
    """How fast it may use up more: there are a million, and each then rests for 30 days."""
    bytes: int = 0
    """Sum of the sizes of its devices; 0 is no limit."""
    partitions: int = 64
    """Partitions of one device. Each takes 7 KiB of the kernel's memory, and one of 2^20 minors that NVMe disks use."""
    partitions_in_all: int = 512
    """Partitions of all its devices."""

    def room(self, others: int) -> int:
        """Partitions that one device may have while the account's others have so many."""
        return max(0, min(self.partitions, self.partitions_in_all - others))


class Allow(NamedTuple):
    """What a client may do."""

    attach: bool = True
    """Attach anything at all."""
    write: bool = True
    """Have a device that can be written."""
    partscan: bool = True
    """Have partitions looked for."""
    lock: bool = False
    """Keep the lock against udev for the whole lease: ``udevadm settle`` on the host waits for its end."""
    direct_io: bool = True
    """Bypass the host's page cache."""
    block_devices: bool = False
    """Use a block device as a backing file."""
    mknod: bool = True
    """Attach although it has CAP_MKNOD and could make nodes of other devices; if so, the reply warns."""
    kernel_partitions: bool = False
    """Have nodes of the kernel's partitions, also where the client could keep them and read another's data later."""
    file_systems: frozenset[str] = ANSWERING
    """Types of the file systems on which its files and directories may lie."""
    sector_sizes: frozenset[int] = frozenset(wire.SECTOR_SIZES)
    """Sector sizes, bytes."""


class Terms(NamedTuple):
    """What holds for one client."""

    limits: Limits
    allow: Allow

    def for_strangers(self) -> Terms:
        """The same for clients that share one account although they have nothing to do with each other."""
        limits = self.limits
        return self._replace(
            limits=limits._replace(
                devices=min(limits.devices, 64), requests=min(limits.requests, 16),
                new_numbers=min(limits.new_numbers, 64),
            )
        )  # fmt: skip


class Rule(NamedTuple):
    """Other limits and permissions for clients that match all that is given; of several rules the later one wins.

    `subuids` and `subgids` are the ids that the users whom the rule is about have in their user namespaces.
    """

    instance: str | None
    account: str | None
    uids: Ranges | None
    gids: Ranges | None
    limits: dict[str, Any]
    allow: dict[str, Any]
    subuids: Ranges = ()
    subgids: Ranges = ()

    def matches(self, instance: str, account: str, uid: int, gid: int) -> bool:
        """Whether it is about this client."""
        return (
            (self.instance is None or fnmatch.fnmatchcase(instance, self.instance))
            and (self.account is None or fnmatch.fnmatchcase(account, self.account))
            and (self.uids is None or any(low <= uid <= high for low, high in self.uids))
            and (self.gids is None or any(low <= gid <= high for low, high in self.gids))
        )

    @property
    def of_namespaces(self) -> Rule | None:
        """The same rule for those users and for what they do in user namespaces; None where they have no such ids."""
        if not (self.subuids or self.subgids):
            return None
        uids = None if self.uids is None else self.uids + self.subuids
        return self._replace(uids=uids, gids=None if self.gids is None else self.gids + self.subgids)

    def changed(self, terms: Terms) -> Terms:
        """What holds where the rule does."""
        return Terms(terms.limits._replace(**self.limits), terms.allow._replace(**self.allow))

    def tightened(self, terms: Terms) -> Terms:
        """What holds where it can only take away."""
        limits = {key: _stricter(key, value, getattr(terms.limits, key)) for key, value in self.limits.items()}
        allow = {key: _stricter(key, value, getattr(terms.allow, key)) for key, value in self.allow.items()}
        return Terms(terms.limits._replace(**limits), terms.allow._replace(**allow))


def _stricter(key: str, one: Any, other: Any) -> Any:
    if isinstance(one, frozenset):
        return one & other
    if key == "bytes":  # 0 is no limit
        return min(one or other, other or one)
    return min(one, other)  # of two permissions the one that is False


class Policy(NamedTuple):
    """The whole policy. Times in seconds."""

    idle_timeout: float = 30.0
    """After this long with nothing to hold the daemon exits; systemd keeps the socket."""
    reply_to_address: bool = False
    """Answer a request without reply_fd at its sender's address: only where every client shares the host's network."""
    request_timeout: float = 30.0
    """Seconds after which a worker process that is not done with a request hangs: it is killed, and charged."""
    write_back_timeout: float = 300.0
    """The same for a worker that writes back what was written to a device: some GiB on a slow disk."""
    number_wait: float = 5.0
    """How long an attach waits for one of its account's own device numbers to come free. At most half of
    `request_timeout`: its worker waits, and does not hang.
    """
    limits: Limits = Limits()
    allow: Allow = Allow()
    rules: tuple[Rule, ...] = ()

    def terms(self, instance: str, account: str, uid: int, gid: int) -> Terms:
        """What holds for a client."""
        terms = Terms(self.limits, self.allow)
        for rule in self.rules:
            wider = rule.of_namespaces
            if rule.matches(instance, account, uid, gid):
                terms = rule.changed(terms)
            elif wider is not None and wider.matches(instance, account, uid, gid):
                # What a rule for a user gives is for that user, not for others in that user's containers.
                terms = rule.tightened(terms)
        return terms


# Reading. A check returns the value or raises ValueError with what is expected.


def _boolean(value: Any) -> bool:
    if type(value) is bool:
        return value
    raise ValueError("expected true or false")


def _whole(least: int) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        if type(value) is int and value >= least:
            return value
        raise ValueError(f"expected a whole number, {least} or more")

    return check


_SUFFIXES = "KMGTPE"
"""As losetup and loopctl have them: K and KiB are 1024, KB is 1000."""


def _size(value: Any) -> int:
    if type(value) is int and value >= 0:
        return value
    if type(value) is str and (size := re.fullmatch(rf"([0-9]+)([{_SUFFIXES}])(B|iB|)", value)):
        return int(size[1]) * int((1000 if size[3] == "B" else 1024) ** (_SUFFIXES.index(size[2]) + 1))
    raise ValueError('expected a whole number of bytes, 0 or more, or a size, as "100G"')


def _number(least: float) -> Callable[[Any], float]:
    def check(value: Any) -> float:
        if type(value) in (int, float) and least <= value < float("inf"):
            return float(value)
        raise ValueError(f"expected a number, {least:g} or more")

    return check


def _file_systems(value: Any) -> frozenset[str]:
    if type(value) is not list or not all(type(item) is str for item in value):
        raise ValueError('expected a list of file system types, as ["ext4", "xfs"]')
    if never := sorted(NEVER.intersection(value)):
        raise ValueError(f"files of {', '.join(never)} are never allowed: a kernel thread would write them as root")
    return frozenset(value)


def _sector_sizes(value: Any) -> frozenset[int]:
    if type(value) is not list or not value or not all(type(v) is int and v in wire.SECTOR_SIZES for v in value):
        raise ValueError(f"expected a list of some of {', '.join(map(str, wire.SECTOR_SIZES))}")
    return frozenset(value)


def _pattern(example: str, *, empty: bool = False) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if type(value) is str and (value or empty):
            return value
        raise ValueError(f'expected a pattern, as "{example}"')

    return check


def _ids(value: Any) -> Ranges:
    ranges = []
    for item in value if type(value) is list else [value]:
        low, dash, high = str(item).partition("-")
        if type(item) is bool or not low.isdecimal() or (dash and not high.isdecimal()):
            raise ValueError('expected an id or a range or a list of these, as [1000, "100000-165535"]')
        ranges.append((int(low), int(high or low)))
    if not ranges or any(low > high for low, high in ranges):
        raise ValueError("expected at least one id, and ranges from the lower to the higher")
    return tuple(ranges)


KEYS: dict[str, Callable[[Any], Any]] = {
    "idle_timeout": _number(0.1),
    "reply_to_address": _boolean,
    "request_timeout": _number(1),
    "write_back_timeout": _number(1),
    "number_wait": _number(0),
}
LIMIT_KEYS: dict[str, Callable[[Any], Any]] = {
    "devices": _whole(0),
    "requests": _whole(1),
    "stuck": _whole(1),
    "new_numbers": _whole(0),
    "new_numbers_per_minute": _number(0),
    "bytes": _size,
    "partitions": _whole(0),
    "partitions_in_all": _whole(0),
}
ALLOW_KEYS: dict[str, Callable[[Any], Any]] = {
    "attach": _boolean,
    "write": _boolean,
    "partscan": _boolean,
    "kernel_partitions": _boolean,
    "lock": _boolean,
    "direct_io": _boolean,
    "block_devices": _boolean,
    "mknod": _boolean,
    "file_systems": _file_systems,
    "sector_sizes": _sector_sizes,
}
RULE_KEYS: dict[str, Callable[[Any], Any]] = {
    "instance": _pattern("ci*", empty=True),
    "account": _pattern("/machine.slice/*"),
    "uid": _ids,
    "gid": _ids,
}
"""Every key of the configuration, by table; the manual is held against them."""


class _Reader:
    """Collects every problem of all files before it gives up."""

    def __init__(self) -> None:
        self.problems: list[tuple[str, str, str]] = []
        self.values: dict[str, Any] = {}
        self.limits: dict[str, Any] = {}
        self.allow: dict[str, Any] = {}
        self.rules: list[Rule] = []
        self._file = ""

    def _problem(self, key: str, reason: str) -> None:
        self.problems.append((self._file, key, reason))

    def read(self, path: str) -> None:
        import tomllib  # noqa: PLC0415  # a daemon without a configuration file starts the faster

        self._file = path
        try:
            with open(path, encoding="utf-8") as file:
                tables = tomllib.loads(file.read())
        except OSError as error:
            self._problem("-", str(error.strerror))
            return
        except ValueError as error:
            self._problem("-", str(error))
            return
        self.limits |= self._table("limits", tables.pop("limits", {}), LIMIT_KEYS)
        self.allow |= self._table("allow", tables.pop("allow", {}), ALLOW_KEYS)
        rules = tables.pop("rule", [])
        for number, rule in enumerate(rules if type(rules) is list else [None], 1):
            self._rule(f"rule {number}", rule)
        self.values |= self._table("", tables, KEYS, "limits", "allow", "[[rule]]")

    def _table(self, name: str, table: Any, checks: dict[str, Callable[[Any], Any]], *tables: str) -> dict[str, Any]:
        if type(table) is not dict:
            self._problem(name, "expected a table")
            return {}
        found = {}
        for key, value in table.items():
            place = f"{name}.{key}" if name else key
            if key not in checks:
                self._problem(place, f"there is no such key; there are {', '.join((*checks, *tables))}")
                continue
            try:
                found[key] = checks[key](value)
            except ValueError as error:
                self._problem(place, str(error))
        return found

    def _rule(self, name: str, rule: Any) -> None:
        if type(rule) is not dict:
            self._problem(name, "expected a table: [[rule]]")
            return
        limits = self._table(f"{name}.limits", rule.pop("limits", {}), LIMIT_KEYS)
        allow = self._table(f"{name}.allow", rule.pop("allow", {}), ALLOW_KEYS)
        keys = self._table(name, rule, RULE_KEYS, "limits.KEY", "allow.KEY")
        uids, gids = keys.get("uid"), keys.get("gid")
        subuids = self._subordinate(subids.SUBUID, subids.of_uids, uids)
        subgids = self._subordinate(subids.SUBGID, subids.of_gids, gids)
        self.rules.append(Rule(keys.get("instance"), keys.get("account"), uids, gids, limits, allow, subuids, subgids))

    def _subordinate(self, path: str, look: Callable[[Ranges], Ranges], ids: Ranges | None) -> Ranges:
        """The ids that the users of a rule have in their namespaces. A file that cannot be read is a problem."""
        try:
            return look(ids) if ids else ()
        except OSError as error:
            self.problems.append((path, "-", str(error.strerror)))
            return ()


def _files(path: str, reader: _Reader) -> list[str]:
    """The files that there are. Only the default path may be missing: a file that cannot be read may allow less."""
    found: list[str] = []
    try:
        found += [f"{path}.d/{name}" for name in sorted(os.listdir(path + ".d")) if name.endswith(".toml")]
    except FileNotFoundError:
        pass
    except OSError as error:
        reader.problems.append((path + ".d", "-", str(error.strerror)))
    try:
        os.stat(path)
        found.insert(0, path)
    except FileNotFoundError as error:
        if path != CONFIGURATION and not found:
            reader.problems.append((path, "-", str(error.strerror)))
    except OSError as error:
        reader.problems.append((path, "-", str(error.strerror)))
    return found


def load(path: str = CONFIGURATION) -> Policy:
    """The policy of the file `path` and of the files in ``path.d``, by name; the defaults where there are none.

    Raises ConfigurationError with everything that is wrong in any of them.
    """
    reader = _Reader()
    subids.user.cache_clear()
    for file in _files(path, reader):
        reader.read(file)
    if reader.problems:
        raise ConfigurationError(reader.problems)
    return Policy(
        **reader.values,
        limits=Limits(**reader.limits),
        allow=Allow(**reader.allow),
        rules=tuple(reader.rules),
    )
