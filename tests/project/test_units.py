"""What `make install` gives to systemd, udev, kmod and the journal, tried with their own programs."""

from __future__ import annotations

import contextlib
import fnmatch
import os
import re
import shutil
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.daemon import Daemon, eventually, exists, require
from support.processes import IN_NAMESPACE, Activated
from support.untouched import leases

from loopd.daemon import counter, setup
from loopd.daemon import process as daemon
from loopd.daemon.audit import Event
from loopd.loop import Loop, LoopControl
from loopd.protocol import wire
from loopd.worker import access, grants, make

ROOT = Path(__file__).parents[2]
MOUNT = r"run-loopd\x2ddev.mount"
SERVICES = ("loopd.service", "loopd@.service")
SOCKETS = ("loopd.socket", "loopd-admin.socket", "loopd@.socket", "loopd-admin@.socket")
PLUGIN = "loopd-device-plugin.service"
METRICS = ("loopd-metrics.service", "loopd-metrics.timer")
UNITS = (*SERVICES, *SOCKETS, MOUNT, "loopd-directory@.service", *METRICS, PLUGIN)
EXPOSURE = 1.8
EXPOSURE_WITHOUT_SYS_ADMIN = 1.3


def run(*command: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env=os.environ | (env or {}),
    )


def systemd_version() -> int:
    return int(run("systemd-analyze", "--version").stdout.split()[1])


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An installation that runs where it is; DESTDIR=/ keeps the running system out of it."""
    prefix = tmp_path_factory.mktemp("prefix")
    targets = ("install", "install-device-plugin")
    done = run("make", "-s", "-C", ROOT, *targets, "DESTDIR=/", f"PREFIX={prefix}", env={"MAKEFLAGS": ""})
    assert done.returncode == 0, done.stderr
    return prefix


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root file system with nothing but an installation in the usual place."""
    done = run("make", "-s", "-C", ROOT, "install", f"DESTDIR={tmp_path}", "PREFIX=/usr", env={"MAKEFLAGS": ""})
    assert done.returncode == 0, done.stderr
    return tmp_path


def options(path: Path) -> dict[str, list[str]]:
    """The keys of a unit with their values in order."""
    found: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        key, separator, value = line.partition("=")
        if separator and not line.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


# systemd ------------------------------------------------------------------------------------------------


def verify(units: Path, *names: str) -> tuple[int, list[str]]:
    """What systemd has to say about these units of that directory."""
    instances = [name.replace("@.", "@some.") for name in names]
    done = run("systemd-analyze", "verify", "--man=no", *instances, env={"SYSTEMD_UNIT_PATH": f"{units}:"})
    said = [line for line in (done.stdout + done.stderr).splitlines() if line]
    if systemd_version() < 254:  # documented: there `stop` gives the leases up
        said = [line for line in said if "'FileDescriptorStorePreserve'" not in line]
    return done.returncode, said


def test_systemd_has_nothing_to_say_about_the_units(prefix: Path) -> None:
    assert verify(prefix / "lib/systemd/system", *UNITS) == (0, [])


def test_units_name_pages_that_there_are(prefix: Path) -> None:
    for name in UNITS:
        (found,) = options(prefix / "lib/systemd/system" / name)["Documentation"]
        for page, section in re.findall(r"man:([\w.-]+)\((\d)\)", found):
            assert (prefix / f"share/man/man{section}/{page}.{section}").exists(), name
        assert found.startswith("man:"), name


def exposure(unit: Path) -> float:
    done = run("systemd-analyze", "security", "--offline=yes", "--no-pager", unit)
    (found,) = re.findall(r"Overall exposure level for loopd\S*: (\S+)", done.stdout)
    return float(found)


@pytest.mark.parametrize("service", [*SERVICES, PLUGIN])
def test_exposure(prefix: Path, service: str) -> None:
    assert exposure(prefix / "lib/systemd/system" / service) <= EXPOSURE


@pytest.mark.parametrize("service", SERVICES)
def test_exposure_without_sys_admin(prefix: Path, tmp_path: Path, service: str) -> None:
    shutil.copytree(prefix / "lib/systemd/system", tmp_path / "system")
    drop_in = tmp_path / f"system/{service}.d/no-sys-admin.conf"
    drop_in.parent.mkdir()
    drop_in.write_bytes((prefix / "share/doc/loopd/no-sys-admin.conf").read_bytes())
    assert exposure(tmp_path / "system" / service) <= EXPOSURE_WITHOUT_SYS_ADMIN
    assert verify(tmp_path / "system", service) == (0, [])
    # What it says about itself is where it really has to go, and it takes away that one capability only.
    assert f"/etc/systemd/system/{service}.d " in drop_in.read_text()
    (whole,), kept = (options(path)["AmbientCapabilities"] for path in (tmp_path / "system" / service, drop_in))
    assert kept == ["", whole.replace(" CAP_SYS_ADMIN", "")]
    assert options(drop_in)["CapabilityBoundingSet"] == kept


def test_every_capability_is_justified_and_none_is_left_over(prefix: Path) -> None:
    for name in ("loopd.service", PLUGIN):
        unit = prefix / "lib/systemd/system" / name
        (bounding,) = options(unit)["CapabilityBoundingSet"]
        if name != PLUGIN:  # which is root's
            assert options(unit)["AmbientCapabilities"] == [bounding]
        reasons = re.findall(r"^# ((?:CAP_\w+(?:, )?)+):", unit.read_text(), re.MULTILINE)
        assert sorted(", ".join(reasons).split(", ")) == sorted(bounding.split())


def test_unit_and_daemon_name_the_same_things(prefix: Path) -> None:
    service = options(prefix / "lib/systemd/system/loopd.service")
    (nodes,) = service["TemporaryFileSystem"]
    path, _, flags = nodes.partition(":")
    assert path == access.PRIVATE_NODES
    assert "dev" in flags.split(",")
    for name, started in (("loopd-admin.socket", "loopd.service"), ("loopd-admin@.socket", "loopd@%i.service")):
        admin = options(prefix / "lib/systemd/system" / name)
        assert (admin["FileDescriptorName"], admin["Service"]) == ([setup.ADMIN], [started])
        assert (admin["DirectoryMode"], admin["SocketMode"]) == (["0700"], ["0600"])
    assert f"/var/lib/{service['StateDirectory'][0]}" == daemon.STATE_DIRECTORY
    # What systemd passes at start must fit: else 202/FDS, or names beyond the 128 KiB of a variable.
    stored = int(service["FileDescriptorStoreMax"][0])
    assert int(service["LimitNOFILE"][0]) > stored
    assert len(f"{setup.SLOT}:") * stored < 128 * 1024


def test_sockets_are_closed_by_no_number_of_requests(prefix: Path) -> None:
    for name in SOCKETS:
        assert options(prefix / "lib/systemd/system" / name)["TriggerLimitIntervalSec"] == ["0"]
    for name in SERVICES:
        assert options(prefix / "lib/systemd/system" / name)["StartLimitIntervalSec"] == ["0"]


@pytest.mark.parametrize(
    ("code", "status", "waits"),
    [("exited", "0", False), ("killed", "KILL", False), ("exited", "1", True), ("exited", "203", True)],
)
def test_only_a_failed_start_is_slowed(prefix: Path, code: str, status: str, waits: bool) -> None:
    (line,) = options(prefix / "lib/systemd/system/loopd.service")["ExecStopPost"]
    shell, _, script = line.partition(" -c ")
    # systemd takes the quotes off and makes $$ one $.
    command = [shell, "-xc", script.strip("'").replace("$$", "$").replace("sleep", "echo sleep")]
    done = run(*command, env={"EXIT_CODE": code, "EXIT_STATUS": status})
    assert (done.returncode, "sleep" in done.stdout) == (0, waits)


def test_user_and_group(root: Path) -> None:
    (root / "etc").mkdir()
    done = run("systemd-sysusers", f"--root={root}")
    assert done.returncode == 0, done.stderr
    (user,) = re.findall(r"^loopd:.*", (root / "etc/passwd").read_text(), re.MULTILINE)
    (group,) = re.findall(r"^loopd:.*", (root / "etc/group").read_text(), re.MULTILINE)
    user, group = user.split(":"), group.split(":")
    assert user[3] == group[2]
    assert group[3] == ""
    assert user[6].endswith("/nologin")
    assert 0 < int(user[2]) < 1000


def test_directories(root: Path) -> None:
    (root / "run").mkdir()
    done = run("systemd-tmpfiles", "--create", f"--root={root}", root / "usr/lib/tmpfiles.d/loopd.conf")
    assert done.returncode == 0, done.stderr
    modes = {path.name: f"{path.stat().st_mode:o}" for path in (root / "run").iterdir()}
    assert modes == {"loopd": "40755", "loopd-admin": "40700"}
    # The socket units make them likewise where tmpfiles has not run.
    for unit in ("loopd", "loopd-admin"):
        keys = options(root / f"usr/lib/systemd/system/{unit}.socket")
        assert keys["DirectoryMode"] == [f"0{modes[unit][2:]}"]
        assert Path(keys["ListenDatagram"][0]).parent == Path("/run") / unit


# Instances ----------------------------------------------------------------------------------------------


def test_an_instance_is_the_same_service_with_its_own_socket(prefix: Path, tmp_path: Path) -> None:
    plain, template = (prefix / "lib/systemd/system" / service for service in SERVICES)
    assert plain.read_bytes() == template.read_bytes()
    assert options(template)["ExecStart"] == [f"{prefix}/sbin/loopd --instance=%i"]
    # That the name of each one's socket is made of its own: without that socket it cannot be started.
    for service, name in zip(SERVICES, ("loopd.socket", "loopd@.socket"), strict=True):
        units = tmp_path / service
        shutil.copytree(prefix / "lib/systemd/system", units)
        (units / name).unlink()
        status, said = verify(units, service)
        assert status != 0
        assert f"Unit {name.replace('@', '@some')} not found" in " ".join(said)


@pytest.mark.parametrize(("name", "taken"), [("some", False), ("a-b", False), ("dev", True), ("admin", True)])
def test_directory_of_an_instance(prefix: Path, name: str, taken: bool) -> None:
    """The outer directory is root's alone; the socket's, and the socket, are everybody's who has them mounted."""
    require(os.geteuid() == 0, "needs root: a mount namespace")
    keys = options(prefix / "lib/systemd/system/loopd@.socket")
    assert keys["ListenDatagram"] == ["/run/loopd-%i/sock/loopd.sock"]
    assert (keys["DirectoryMode"], keys["SocketMode"]) == (["0755"], ["0666"])
    text = (prefix / "lib/systemd/system/loopd@.socket").read_text().replace("\\\n", " ")
    (line,) = re.findall(r"^ExecStartPre=(.*)$", text, re.MULTILINE)
    prepare = line.replace("%i", name).replace("$$", "$")
    script = f"mount -t tmpfs tmpfs /run; umask 077; {prepare} && stat --format=%a:%U /run/loopd-{name}"
    done = run("unshare", "--mount", "sh", "-c", script)
    if taken:
        assert done.returncode != 0
        assert f"loopd has a /run/loopd-{name} already" in done.stderr
    else:
        assert (done.returncode, done.stdout, done.stderr) == (0, "700:root\n", "")


@pytest.mark.parametrize(("name", "taken"), [("some", False), ("dev", True), ("admin", True), ("nodes", True)])
def test_admin_socket_of_an_instance(prefix: Path, name: str, taken: bool) -> None:
    (line,) = options(prefix / "lib/systemd/system/loopd-admin@.socket")["ExecStartPre"]
    done = run("sh", "-c", line.replace("%i", name).replace("$$", "$"))
    said = f"loopd has a /run/loopd-{name} already\n" if taken else ""
    assert (done.returncode != 0, done.stderr) == (taken, said)


def test_instances_share_the_numbers_and_nothing_else(
    start_daemon: Callable[..., Daemon], make_image: Callable[..., int], directory: int, tmp_path: Path
) -> None:
    """Others start and end while one serves: no number is given twice, nothing fails, no lease is another's."""
    state = f"--state-directory={tmp_path}/state"
    resident = start_daemon(state, "--instance=resident", name="resident")
    names: list[str] = []
    for turn in range(5):
        visitor = start_daemon(state, f"--instance=visitor{turn}", name=f"visitor{turn}")
        # Its start and its end remove idle numbers, but not those that the other has made ahead of need.
        for service in (visitor, resident):
            reply = service.attach(make_image(name=f"image{len(names)}"), directory)
            assert reply.code is None, reply.fields
            names.append(reply.fields["devname"])
        assert [lease["devname"] for lease in leases(visitor)] == names[-2:-1]
        refused = visitor.ask(wire.Detach(names[-1], 0), [])
        assert refused.code == "not-found"
        refused.close()
        visitor.kill(signal.SIGTERM)
    assert len(set(names)) == len(names)
    assert {lease["devname"] for lease in leases(resident)} == set(names[1::2])
    resident.stop()


# The rights of the service ------------------------------------------------------------------------------

LOOPD = 4242
"""A uid that owns nothing, for the service's."""

# Runs an installed daemon as the unit says. Of the test's own command the options alone are used, and none of its
# directories: the user can reach nothing there.
AS_SERVICE = """
uid=$1 nodes=$2 mount=$3 capabilities=$4 library=$5
while [ "$1" != --state-directory ]; do shift; done; shift 2
mount -t tmpfs tmpfs /run
mkdir /run/code /run/state /run/loopd-nodes /run/loopd-dev
cp -r "$library"/. /run/code && chmod -R a+rX /run/code && chown $uid /run/state
mount -t tmpfs -o "$nodes" tmpfs /run/loopd-nodes
mount -t tmpfs -o "$mount" tmpfs /run/loopd-dev
exec setpriv --reuid=$uid --regid=$uid --clear-groups --no-new-privs --inh-caps=-all,$capabilities \\
    --ambient-caps=-all,$capabilities --bounding-set=-all,$capabilities /usr/bin/python3 -IS -c "
import sys
sys.path.insert(0, '/run/code')
from loopd.daemon import main
sys.exit(main())" --state-directory=/run/state "$@"
"""


@pytest.fixture
def as_service(prefix: Path, tmp_path: Path) -> Iterator[Callable[[Path], Activated]]:
    """Start the installed daemon with the user, mounts and capabilities that the units say, or that a drop-in does."""
    require(os.geteuid() == 0, "needs root: loop devices")
    require(os.path.exists("/dev/loop-control"), "needs /dev/loop-control")
    units = prefix / "lib/systemd/system"
    (nodes,) = options(units / "loopd.service")["TemporaryFileSystem"]
    (mount,) = options(units / MOUNT)["Options"]
    assert "uid=loopd" in mount
    mount = mount.replace("=loopd", f"={LOOPD}")
    with contextlib.ExitStack() as stack:

        def start(unit: Path) -> Activated:
            names = options(unit)["AmbientCapabilities"][-1].split()
            capabilities = ",".join(f"+{name.removeprefix('CAP_').lower()}" for name in names)
            arguments = [str(LOOPD), nodes.partition(":")[2], mount, capabilities, f"{prefix}/lib/loopd"]
            (tmp_path / "service").mkdir()
            found = Activated(tmp_path / "service", [], [*IN_NAMESPACE, AS_SERVICE, "sh", *arguments], {})
            stack.callback(found.stop)
            found.start()
            return found

        yield start


@pytest.mark.parametrize("unit", ["lib/systemd/system/loopd.service", "share/doc/loopd/no-sys-admin.conf"])
def test_rights_of_the_service_are_enough(
    as_service: Callable[[Path], Activated], prefix: Path, unit: str, image: int, directory: int, devices: Path
) -> None:
    """Everything works with the unit's capabilities; what is lost without CAP_SYS_ADMIN is refused, and no more."""
    sys_admin = unit.endswith(".service")
    service = as_service(prefix / unit)
    node = service.attach(image, directory, partscan=True)
    assert node.code is None, node.fields
    name = node.fields["devname"]
    status = (devices / name).stat()
    assert (stat.S_ISBLK(status.st_mode), status.st_uid) == (True, os.geteuid())
    record = eventually(lambda: service.records("attached"), "the record is written")[0]
    assert record["LOOPD_BACKING_VIEW"] == "host", "the service's own mount namespace is neither's"
    rescan = service.ask(wire.Rescan(name, 0), [])
    assert (rescan.code, rescan.fields.get("partitions")) == ((None, []) if sys_admin else ("unsupported", None))
    assert service.ask(wire.Resize(name, 0), []).fields == {"size": 1 << 20}
    assert service.ask(wire.Detach(name, 0, wait=5), []).fields == {"state": "released"}
    assert not (devices / name).exists()

    opened = service.attach(image, None, deliver=("fd",))
    assert (opened.code, len(opened.fds)) == (None, 1)
    mounted = service.attach(image, None, deliver=("mount",))
    assert (mounted.code, len(mounted.fds)) == ((None, 1) if sys_admin else ("undeliverable", 0))

    granted = Path(service.ask(wire.Directory("build", 0), []).fields["path"])
    assert granted.parent == Path(grants.ROOT)
    grant = os.open(f"/proc/{service.pid}/root{granted}", os.O_RDONLY | os.O_DIRECTORY)
    try:
        lent = service.attach(image, grant)
        assert lent.code is None, lent.fields
        status = os.stat(lent.fields["devname"], dir_fd=grant)
        assert (stat.S_ISBLK(status.st_mode), status.st_uid) == (True, LOOPD)
    finally:
        os.close(grant)
    for reply in (opened, mounted, lent):
        reply.close()
    gone = [opened.fields["devname"], lent.fields["devname"]]
    eventually(lambda: not any(map(exists, gone)), "the devices are gone")
    assert leases(service) == []
    assert service.records("failed") == []


# The journal --------------------------------------------------------------------------------------------


def test_each_event_has_its_catalog_entry(root: Path) -> None:
    done = run("journalctl", f"--root={root}", "--update-catalog")
    assert done.returncode == 0, done.stderr
    listed = run("journalctl", f"--root={root}", "--list-catalog").stdout.splitlines()
    subjects = dict(line.split(" ", 1) for line in listed)
    assert set(subjects) == {event.value.message_id for event in Event}
    for event in Event:
        entry = run("journalctl", f"--root={root}", "--dump-catalog", event.value.message_id).stdout
        header, _, body = entry.partition("\n\n")
        assert "Defined-By: loopd" in header
        assert len(body.split()) > 15, f"{event.name} is not explained"


# kmod ---------------------------------------------------------------------------------------------------


def test_kmod_takes_the_option(root: Path) -> None:
    done = run("modprobe", "--config", root / "usr/lib/modprobe.d/loopd.conf", "--showconfig")
    assert "options loop max_loop=8" in done.stdout.splitlines()


# udev ---------------------------------------------------------------------------------------------------


def covered(rules: Path) -> list[str]:
    (patterns,) = re.findall(r'^KERNEL!="([^"]+)"', rules.read_text(), re.MULTILINE)
    return str(patterns).split("|")


def test_rule_covers_the_numbers_of_loopd_and_no_others(prefix: Path) -> None:
    patterns = covered(prefix / "lib/udev/rules.d/00-loopd.rules")
    tried = {*range(12000), *(10**n + k for n in range(7) for k in (-1, 0, 1)), counter.LAST}
    for number in tried:
        for name in (f"loop{number}", f"loop{number}p1", f"loop{number}p15"):
            matches = any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
            assert matches == (number >= make.FIRST), name


@contextlib.contextmanager
def device(image: Path, start: int) -> Iterator[int]:
    """A loop device with `image` on it, of the first number from `start` on that can be had."""
    with LoopControl() as control:
        for number in range(start, start + 1000):
            with contextlib.suppress(FileExistsError):
                control.add(number)
                break
        else:
            pytest.fail(f"all numbers from {start} on are taken")
        try:
            with Loop(number) as loop, image.open("r+b") as file:
                loop.configure(file.fileno(), autoclear=True)
                yield number
        finally:
            control.remove(number)


def udev_makes_of(number: int, rules: Path) -> str:
    """What all the host's rules, with loopd's among them, make of the device; udevadm is a dry run of udevd.

    Not quite dry: it makes the links, and a database. So it gets a /dev and a /run of its own.
    """
    script = """
        mount -t tmpfs tmpfs /run && mkdir -p /run/udev/rules.d && cp "$1" /run/udev/rules.d
        mount -t tmpfs tmpfs /dev && mknod /dev/null c 1 3
        mknod /dev/loop$2 b $(tr : ' ' </sys/block/loop$2/dev)
        exec udevadm test /sys/devices/virtual/block/loop$2 2>&1
    """
    done = run("unshare", "--mount", "sh", "-ec", script, "sh", rules, str(number))
    assert f"Reading rules file: /run/udev/rules.d/{rules.name}" in done.stdout, done.stdout + done.stderr
    return done.stdout


def test_an_image_cannot_claim_names_of_the_host(prefix: Path, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("making a loop device and a mount namespace needs root")
    rules = prefix / "lib/udev/rules.d/00-loopd.rules"
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(1 << 20)
    assert run("mke2fs", "-q", "-F", "-L", "hostroot", image).returncode == 0
    with device(image, 2000) as number:
        assert "by-label/hostroot" in udev_makes_of(number, rules)  # else the other half would prove nothing
    with device(image, counter.LAST - 2000) as number:
        said = udev_makes_of(number, rules)
    assert "SYSTEMD_READY=0" in said.split()
    assert [word for word in ("hostroot", "ID_FS_", "blkid", "DEVLINKS=") if word in said] == []
