"""Accounts: who is charged, and with what.

Owns the way from a process to its account and the counters of each. An account is a cgroup of the second version: its
id tells it from another that has its name later, and its name is for people and policy. Decides nothing: limits are
policy's.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from loopd.children.flow import Turns
from loopd.children.pool import Job
from loopd.kernel import cgroups, proc

_UNIT = re.compile(r".\.(?:service|scope|socket|mount|swap|timer|path|target|device|automount)$")
# Where no service manager made a unit: what runtimes put their containers' cgroups below.
_PARENTS = frozenset("docker lxc libpod_parent machine garden buildkit crio default moby k8s.io".split())
_QOS_CLASSES = frozenset(("burstable", "besteffort", "guaranteed"))


class Membership(NamedTuple):
    """Where a process belongs: `account` is a cgroup path, `unit` what an administrator calls it."""

    account: str
    unit: str

    @property
    def name(self) -> str:
        """For a sentence: what runs in the root of the cgroups has no unit."""
        return self.unit or f"account {self.account}"


SHARED = "first-version"
"""The one account of all clients that the second version of cgroups does not tell apart."""


def membership(cgroup: str) -> Membership:
    """The account of a process from its cgroup path: from the root through its first unit that is no slice.

    A tenant names deeper components itself (a user's manager, systemd in a container), so these never make an account
    of their own. For the same reason a unit counts only where everything above it is a slice.
    """
    parts = [part for part in cgroup.split("/") if part]
    depth = 0
    while depth < len(parts) and parts[depth].endswith(".slice"):
        depth += 1
    if depth == len(parts):
        return Membership("/" + "/".join(parts), parts[-1] if parts else "")
    unit = parts[depth]
    if not _UNIT.search(unit):
        depth = _container_depth(parts, depth)
        unit = parts[depth]
    elif unit.startswith("user@"):
        # A user's containers are one account, but the journal names the unit that the user's manager made for each.
        unit = next((part for part in parts[depth + 1 :] if _UNIT.search(part)), unit)
    return Membership("/" + "/".join(parts[: depth + 1]), unit)


def _container_depth(parts: list[str], first: int) -> int:
    """How deep the runtime's own cgroup for a container is. The container may have made what is below."""
    name = parts[first]
    if name == "kubepods":
        first += 1 if len(parts) > first + 1 and parts[first + 1] in _QOS_CLASSES else 0
        return min(first + 2, len(parts) - 1)  # the pod, and in it the container
    while parts[first] in _PARENTS and first + 1 < len(parts):  # as /docker/buildkit/ID
        first += 1
    return first


def whose(pid: int) -> tuple[Membership, bool] | None:
    """The account and unit of a process, and whether its limits are counted for each uid; None when it is gone.

    An account is a cgroup of the second version. Where a runtime puts containers into cgroups of the first version
    alone (Docker or the kubelet with the cgroupfs driver), the second has all of them in the runtime's own.
    """
    try:
        paths = cgroups.paths(pid)
    except OSError:
        return None
    unified = paths.pop("", None) if cgroups.root() else None
    # Every runtime uses systemd's own hierarchy where there is one; in others the whole host may be moved.
    first = [paths["name=systemd"]] if "name=systemd" in paths else list(paths.values())
    for path in first:
        if path != "/" and (unified is None or not f"{unified}/".startswith(f"{path}/")):
            return Membership(SHARED, membership(path).unit), False
    if unified is None:
        return Membership(SHARED, ""), False
    found = membership(unified)
    return found, counts_by_uid(unified, found, pid)


_OF_MANY = re.compile(r".\.service$|^session-[^.]+\.scope$")


def counts_by_uid(cgroup: str, member: Membership, pid: int) -> bool:
    """Whether limits are counted for each uid of the account, and not for the account as a whole.

    They are for the host's own users without a container: the jobs of a CI runner, or sudo in a login session. In a
    container one tenant has 65,536 uids to choose from. A container has a cgroup below that of the unit or a scope of
    its own, or else a user or pid namespace.
    """
    if cgroup != member.account or not _OF_MANY.search(member.unit):
        return False
    try:
        status = proc.read(f"/proc/{pid}/status")
        in_hosts = proc.in_hosts_user_namespace(pid)
    except OSError:  # gone
        return False
    return in_hosts and re.search(rb"(?m)^NStgid:\t\d+$", status) is not None


class Owner(NamedTuple):
    """Who may list and detach a lease."""

    account: str
    uid: int
    cgroup: int = 0


NOBODY = Owner("", -1)
"""The owner of a lease of a client that cannot be told from others: its keeper alone ends it."""


def owner_of(account: str, uid: int, cgroup: int) -> Owner:
    """The owner of what a process of that account and uid attaches without a directory grant. `cgroup` is the id of the
    account's cgroup; where it is not known, as with `SHARED`, a later one may have the name.
    """
    return Owner(account, uid, cgroup) if cgroup else NOBODY


class Bucket:
    """An allowance: so much at once, and more as time passes."""

    __slots__ = ("_burst", "_per_second", "_spent", "at")

    def __init__(self) -> None:
        self._burst = self._per_second = 0.0
        self._spent = 0.0
        self.at = 0.0

    def spend(self, burst: float, per_second: float, count: int = 1) -> bool:
        """Charge so many: `burst` at once, and then `per_second`; False when the allowance is used up."""
        now = max(time.monotonic(), self.at)
        self._burst, self._per_second = burst, per_second
        self._spent = max(0.0, self._spent - (now - self.at) * per_second)
        self.at = now
        if self._spent + count > burst:
            return False
        self._spent += count
        return True

    @property
    def half_spent(self) -> bool:
        """Whether more than half of the burst is spent now."""
        return self._now > self._burst / 2

    @property
    def spent(self) -> bool:
        """Whether any of the burst is spent now."""
        return self._now > 0

    @property
    def _now(self) -> float:
        return self._spent - max(0.0, time.monotonic() - self.at) * self._per_second

    def unspend(self, count: int = 1) -> None:
        """Give the charge of so many back."""
        self._spent = max(0.0, self._spent - count)


class Account:
    """What one account has in use; with a `uid`, what that user of the account has in use."""

    MOST_HANGING = 8
    """Children of any role that may hang in jobs of one account, or be busy with one for longer than `Job.HANGS`,
    before its requests are dropped and its other jobs wait.
    """

    MOST_USERS = 64
    """Users of one account that are counted one by one; the others are counted together."""

    def __init__(self, name: str, cgroup: int = 0, uid: int | None = None) -> None:
        self.name = name
        self.cgroup = cgroup
        """The id of its cgroup; 0 while that is not known."""
        self.uid = uid
        self.users: dict[int, Account] = {}
        self.ended = False
        self.devices = 0
        """Devices, with those of attaches that are under way."""
        self.bytes = 0
        self.partitions = 0
        """Partitions of its devices."""
        self.requests: set[Any] = set()
        """Requests under way, and those that were answered and whose worker has files to close."""
        self.jobs: set[Job] = set()
        """Jobs of the account that a child does or hangs in, or that wait for a child."""
        self.turns = Turns(self.MOST_HANGING)
        """For jobs on its leases."""
        self.revoking = Turns(self.MOST_HANGING)
        """For closing nodes: a client that has made the jobs wait must not keep that from being done."""
        self.listing = Turns()
        """For building replies to ``list``, each until its time in the main process is earned again."""
        self.numbers = Bucket()
        self.shed = 0
        self._refusals = 0
        self._refused_at = 0.0

    def of(self, uid: int) -> Account:
        """What is counted for one user."""
        if uid not in self.users and len(self.users) >= self.MOST_USERS:
            self.users = {known: user for known, user in self.users.items() if user.in_use}
            if len(self.users) >= self.MOST_USERS:
                return self
        return self.users.setdefault(uid, Account(self.name, self.cgroup, uid))

    @property
    def hanging(self) -> int:
        """Children that may hang, or do."""
        return sum(job.slow for job in self.jobs)

    @property
    def hung(self) -> int:
        """Children that were killed because they hung, and have not been reaped yet."""
        return sum(job.hung for job in self.jobs)

    def refused(self, most: int) -> bool:
        """Count a refusal; whether it is among the first `most` of its second, and so worth a record of its own."""
        now = time.monotonic()
        if now - self._refused_at >= 1:
            self._refused_at, self._refusals = now, 0
        self._refusals += 1
        return self._refusals <= most

    @property
    def in_use(self) -> bool:
        """Whether anything is charged to it now."""
        busy = self.devices or self.requests or self.jobs or self.shed
        return bool(busy) or any(user.in_use for user in self.users.values())

    @property
    def burning(self) -> bool:
        """Whether many numbers were used up just now."""
        return self.numbers.half_spent or any(user.burning for user in self.users.values())

    def heir(self, person: Owner) -> Owner | None:
        """The owner that may get a number of this account and person again."""
        return None if self.ended or person == NOBODY else person

    def identify(self, cgroup: int, *, ended: bool) -> None:
        """Its cgroup is known, or has ended."""
        for account in (self, *self.users.values()):
            account.cgroup, account.ended = cgroup, ended


class Accounts:
    """All accounts, by name and id of their cgroups: small, and there for as long as the cgroup is, since what an
    account spent counts on. One whose cgroup is not known yet has the id 0.
    """

    MOST = 16384
    """Accounts with nothing in use that are remembered: a user that can make cgroups can make any number of them."""

    def __init__(self) -> None:
        self._accounts: dict[tuple[str, int], Account] = {}
        self.cgroups = cgroups.Watcher(self._end)
        self.on_end: Callable[[str], None] = lambda name: None

    def get(self, name: str, cgroup: int = 0, uid: int | None = None) -> Account:
        """The account of that cgroup; with a `uid`, what is counted for that user."""
        account = self._accounts.get((name, cgroup))
        if account is None:
            if len(self._accounts) >= self.MOST:
                self._accounts = {key: value for key, value in self._accounts.items() if value.in_use}
            account = self._accounts[name, cgroup] = Account(name, cgroup)
        return account if uid is None else account.of(uid)

    def now(self, name: str, uid: int | None) -> Account:
        """The same for a process that was seen in a cgroup of that name just now."""
        return self.get(name, self.cgroups.living(name), uid)

    def watch(self, account: Account, events: int) -> None:
        """Know the cgroup of an account, and have the account's leases end with it. Takes over what
        `cgroups.open_events` gave; OSError where there is no room for a watch.
        """
        known = None if account.cgroup else self._accounts.pop((account.name, 0), None)
        if known is not None:
            cgroup = cgroups.identity(events)
            known.identify(cgroup, ended=False)
            self._accounts[account.name, cgroup] = known
        self.cgroups.watch(account.name, events)

    def last(self, owner: Owner | None) -> Account:
        """What is charged with the devices of an owner that left: the user where users are counted, else the account.
        """
        account = self.get(owner.account, owner.cgroup) if owner else self.get("")
        return account.users.get(owner.uid, account) if owner else account

    @property
    def burning(self) -> bool:
        """Whether one has just used up many numbers: forgotten, it could go on at once."""
        return any(account.burning for account in self._accounts.values())

    def _end(self, name: str, cgroup: int) -> None:
        account = self._accounts.pop((name, cgroup), None)
        if account is not None:
            account.identify(cgroup, ended=True)
        self.on_end(name)
