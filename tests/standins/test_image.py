"""The image is sacred: a device of loopd's behaves as one of losetup's, for every way in.

Each scenario is a shell script. It runs twice in the same test, once with the real losetup (and mount) and once with
loopd's way in, and both must agree on the words, the exit status and, where no clock is in it, every byte of the image.
A scenario that fails with the real tool fails the test as well, so that none can agree by going wrong twice.

The kernel of a test machine may have no parser for partition tables: partx(8) adds the partitions here, on both sides.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from support.daemon import ROOT, Daemon, eventually, require

import loopd
from loopd.protocol import wire

MIB = 1 << 20


class Scenario(NamedTuple):
    """What happens to disk.img before it is attached, while $d is its device, and after it was detached.

    `exact`: every byte of the image must be the same. A file system that was mounted has the time in it.
    """

    before: str
    during: str
    after: str = ""
    exact: bool = True
    options: str = ""


SCENARIOS = {
    "what is written and closed is in the file": Scenario(
        "truncate -s 4M disk.img",
        """
        printf hello | dd of=$d conv=notrunc status=none
        head -c 5 disk.img
        head -c 3M /dev/zero | tr '\\0' x | dd of=$d bs=64K seek=4 conv=notrunc status=none
        cksum <disk.img
        """,
        "cksum <disk.img",
    ),
    "what is written to the file is read through the device": Scenario(
        "truncate -s 4M disk.img",
        """
        head -c 5 $d | tr '\\0' .
        printf howdy | dd of=disk.img conv=notrunc status=none
        head -c 5 $d
        printf 'at its end' | dd of=disk.img bs=1M seek=3 conv=notrunc status=none
        cksum <$d
        """,
    ),
    "what is written to the file later is not overwritten": Scenario(
        "truncate -s 8M disk.img",
        """
        yes boot | head -c 440 | dd of=$d conv=notrunc status=none
        printf 'label: dos\\nlabel-id: 0x10adface\\n2048,4096\\n' |
            sfdisk --quiet --no-reread --no-tell-kernel disk.img
        """,
        "head -c 440 disk.img | cksum; sfdisk --dump disk.img",
    ),
    "disk and partition show the same": Scenario(
        "truncate -s 24M disk.img; echo 2048,32768 | sfdisk --quiet disk.img",
        """
        mkdir tree m; echo by the disk >tree/disk
        truncate -s 16M fs.img; mkfs.ext4 -q -d tree fs.img
        partition $d
        dd if=${d}p1 of=/dev/null bs=1M status=none
        dd if=fs.img of=$d bs=1M seek=1 conv=notrunc status=none
        mount ${d}p1 m; cat m/disk; echo by the partition >m/partition; umount m
        e2fsck -f -n ${d}p1 >log 2>&1 || { cat log; false; }
        one=$(dd if=$d bs=1M skip=1 count=16 status=none | cksum)
        two=$(cksum <${d}p1)
        three=$(dd if=disk.img bs=1M skip=1 count=16 status=none | cksum)
        test "$one" = "$two"; test "$two" = "$three"
        partx --delete $d
        """,
        """
        dd if=disk.img of=fs.img bs=1M skip=1 count=16 status=none
        e2fsck -f -n fs.img >log 2>&1 || { cat log; false; }
        debugfs -R 'cat partition' fs.img 2>/dev/null
        """,
        exact=False,
        options="-P",
    ),
    "mounted, changed as a file, mounted again": Scenario(
        "truncate -s 16M disk.img; mkdir m",
        """
        mkfs.ext4 -q $d
        mount $d m; echo one >m/one; umount m
        cat >two <<'END'\ntwo\nEND
        debugfs -w -R 'write two two' disk.img 2>/dev/null | sed 's/inode.*//'
        e2fsck -f -n disk.img >log 2>&1 || { cat log; false; }
        mount $d m; cat m/one m/two; rm m/one; echo three >m/three; umount m
        e2fsck -f -n disk.img >log 2>&1 || { cat log; false; }
        debugfs -R 'cat three' disk.img 2>/dev/null
        e2fsck -f -y disk.img >log 2>&1 || { cat log; false; }
        mount $d m; ls m; umount m
        """,
        "e2fsck -f -n disk.img >log 2>&1 || { cat log; false; }; debugfs -R 'cat three' disk.img 2>/dev/null",
        exact=False,
    ),
    "grown while it is attached": Scenario(
        "truncate -s 8M disk.img; mkfs.ext4 -q disk.img; mkdir m",
        """
        mount $d m; echo kept >m/kept; umount m
        truncate -s 24M disk.img; resize $d; blockdev --getsize64 $d
        e2fsck -f -p $d >log 2>&1 || { cat log; false; }
        resize2fs $d >log 2>&1 || { cat log; false; }
        mount $d m; df --output=size m | tail -n 1; umount m
        e2fsck -f -n disk.img >log 2>&1 || { cat log; false; }
        truncate -s 40M disk.img; resize $d; blockdev --getsize64 $d
        e2fsck -f -y disk.img >log 2>&1 || { cat log; false; }
        resize2fs disk.img >log 2>&1 || { cat log; false; }
        mount $d m; df --output=size m | tail -n 1; cat m/kept; head -c 20M /dev/zero >m/zeros; umount m
        """,
        "e2fsck -f -n disk.img >log 2>&1 || { cat log; false; }; dumpe2fs -h disk.img 2>/dev/null | grep 'Block count'",
        exact=False,
    ),
}

CONTENT = tuple(SCENARIOS)

NAMED_BY = """
        named() { if test "${1##*/}" = "${d##*/}"; then echo the device; else echo "$1 is named"; fi; }
        named "$(mount | sed -n "s, on $PWD/m type .*,,p")"
        named "$(findmnt -n -o SOURCE m)"
        named "$(sed -n "s, $PWD/m .*,,p" /proc/mounts)"
"""
NAMED = f"""
        mount $d m
        {NAMED_BY}
        for device in $(mount | sed -n "s,^\\([^ ]*${{d##*/}}\\) on .*,\\1,p"); do umount $device; done
        ! mountpoint -q m
        """
"""With AUTOCLEAR libmount would name the image, and a script that unmounts by the device would leave it mounted."""

SCENARIOS["mount names the device"] = Scenario(
    "truncate -s 16M disk.img; mkfs.ext4 -q disk.img; mkdir m", NAMED, exact=False
)
SCENARIOS["mount names the device of a window"] = Scenario(
    "truncate -s 8M fs.img; mkfs.ext4 -q fs.img; truncate -s 1M disk.img; cat fs.img fs.img >>disk.img; mkdir m", NAMED,
    exact=False, options=f"--offset={MIB} --sizelimit={8 * MIB}",
)  # fmt: skip

RAW = [name for name, scenario in SCENARIOS.items() if scenario.exact]

PRELUDE = """
export E2FSPROGS_FAKE_TIME=1700000000
partition() {
    partx --add $1
    for try in $(seq 500); do ! test -b ${1}p1 || return 0; sleep 0.01; done
    echo "${1}p1 does not come"; return 1
}
"""
"""For every script: the partition is there when its node is."""

SANDBOX = """
mount -t tmpfs -o mode=755 loopd-test {nodes}
mknod -m 666 {nodes}/null c 1 3; mknod -m 666 {nodes}/zero c 1 5; ln -s /proc/self/fd {nodes}/fd
{grant}
mount --move {nodes} /dev
exec "$@"
"""
"""What a container has: a /dev of its own. Its PID 1 is the script, whose end is the end of every device."""

BIND = "mkdir {nodes}/loopd; mount --bind {path} {nodes}/loopd; mount -o remount,bind,ro {nodes}/loopd"

LIBRARY = """
import os, subprocess, sys
import loopd
script, *options = sys.argv[1:]
values = dict(option[2:].split("=") for option in options if option.startswith("--"))
deliver = ["fd"] if "fd" in options else None
with loopd.attach(
    "disk.img", deliver=deliver, direct_io=values.get("direct-io", "auto"), offset=int(values.get("offset", 0)),
    sizelimit=int(values.get("sizelimit", 0)), partscan="-P" in options, lifetime="process",
    open_device="unopened" not in options,
) as device:
    path = device.path
    if deliver:
        os.pread(device.fd, 1 << 20, 0)
        device.close()  # a delivered fd is the client's own, and keeps the device open for as long as it has it
        path = f"/dev/{device.devname}"
    subprocess.run(["sh", "-euc", script, "sh", path], check=True)
"""
"""The library's way. What was delivered as an fd is read once and closed."""


class Way(NamedTuple):
    """A way in: how a script gets a device and gives it back. `sandbox` is None, "own" or "grant"; see `World.run`.

    `template` has the parts of the scenario put in, and the options.
    """

    template: str
    resize: str
    sandbox: str | None = None
    grant: bool = False



def _shell(attach: str, detach: str) -> str:
    """A device of a script that fails is detached, too."""
    attached = f"d=$({attach} {{options}} disk.img)\ntrap '{detach} $d' EXIT\necho device $d\n"
    return f"{{before}}\n{attached}{{during}}\n{detach} $d\ntrap - EXIT\n{{after}}"


def _python(*options: str) -> str:
    return f'{{before}}\npython -c "$LIBRARY" "$during" {" ".join(options)} {{options}}\n{{after}}'


REAL = Way(_shell("losetup --find --show", "losetup --detach"), "losetup --set-capacity")
DROP_IN = REAL.template

WAYS = {
    "loopctl attach": Way(_shell("loopctl attach -d $NODES", "loopctl detach"), "loopctl resize"),
    "loopctl attach with a grant": Way(_shell("loopctl attach", "loopctl detach"), "loopctl resize", grant=True),
    "loopctl run": Way(
        '{before}\nloopctl run {options} disk.img -- sh -euc "$during" sh {{}}\n{after}', "loopctl resize", grant=True
    ),
    "the library": Way(_python(), "python -c 'import loopd, sys; loopd.resize(sys.argv[1])'", grant=True),
    "the library, unopened": Way(_python("unopened"), "loopctl resize", grant=True),
    "the library, an fd": Way(_python("fd"), "loopctl resize"),
    "loopctl attach, an fd": Way(_shell("loopctl attach --deliver fd", "loopctl detach"), "loopctl resize"),
    "loopctl attach, a mount": Way(
        _shell("loopctl attach --deliver mount -d $NODES", "loopctl detach"), "loopctl resize"
    ),
    "losetup with a /dev of its own": Way(DROP_IN, "losetup --set-capacity", "own"),
    "losetup with a grant": Way(DROP_IN, "losetup --set-capacity", "grant"),
}


class Outcome(NamedTuple):
    """What a script said, with what became of the image."""

    code: int
    out: str
    err: str
    image: bytes


def _bound(folder: str) -> list[str]:
    """Devices of a file in a folder of that name: of a mount namespace that has ended the kernel knows only the end of
    the path.
    """
    found = []
    for attribute in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            if folder in attribute.read_text(errors="replace").split("/"):
                found.append(attribute.parts[3])
    return found


class World:
    """A daemon with a grant, and a folder with the programs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.programs, self.drop_ins = folder / "bin", folder / "drop-ins"
        self.grants, self.nodes = folder / "grants", folder / "nodes"
        for path in (self.programs, self.drop_ins, self.grants, self.nodes, folder / "run"):
            path.mkdir()
        for name, module in (("loopctl", "-m loopd.cli"), ("python", "")):
            (self.programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} {module} "$@"\n')
            (self.programs / name).chmod(0o755)
        for name, source in (("losetup", "losetup.py"), ("mount", "mountloop.py")):
            shutil.copy(ROOT / "loopd" / source, self.drop_ins / name)
        self.daemon = Daemon(folder / "run", ["--grant-directory", str(self.grants), "--idle-timeout=600"], [], {})
        self._count = 0

    def begin(self) -> None:
        self.daemon.start()
        self.grant = self.daemon.ask(wire.Directory("test", 0), []).fields["path"]

    def run(self, way: Way, scenario: Scenario, place: Path, options: str = "") -> Outcome:
        """Run a scenario in a new folder of `place`, in a mount namespace of its own, so that no mount outlives it."""
        self._count += 1
        folder = place / f"{self.folder.name}-{os.getpid()}-{self._count}"
        folder.mkdir()
        prelude = f"{PRELUDE}resize() {{ {way.resize} $1 >/dev/null; }}\n"
        look = "cat /sys/block/${d##*/}/loop/dio\n" if "--direct-io" in options else ""
        during = f"{prelude}d=$1\necho device $d\n{look}{scenario.during}"
        steps = scenario._asdict() | {"options": f"{options} {scenario.options}", "during": look + scenario.during}
        script = f"{prelude}cd $FOLDER\n{way.template.format(**steps)}"
        shell = ["setpriv", "--bounding-set=-mknod", "sh", "-euc", script]  # with it, loopd warns
        command = ["unshare", "--mount", "--propagation", "private", *shell]
        programs = [self.programs]
        if way.sandbox:
            grant = BIND.format(nodes=folder / "dev", path=self.grant) if way.sandbox == "grant" else ""
            (folder / "dev").mkdir()
            prepare = SANDBOX.format(nodes=folder / "dev", grant=grant)
            command = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child"]
            command += ["--mount-proc", "sh", "-euc", prepare, "sh", *shell]
            programs = [self.drop_ins, self.programs]
        environment = {
            "PATH": ":".join(map(str, [*programs, "/usr/sbin", "/usr/bin", "/sbin", "/bin"])),
            "FOLDER": str(folder), "NODES": str(self.nodes), "LIBRARY": LIBRARY, "during": during,
            "LOOPD_SOCKET": self.daemon.path, "PYTHONPATH": str(ROOT), "LC_ALL": "C.UTF-8",
        }  # fmt: skip
        if way.grant:
            environment["LOOPD_DIRECTORY"] = self.grant
        done = subprocess.run(
            command, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, env=environment
        )
        # The end of the sandbox is the end of its devices, and loopd may still be at it.
        eventually(lambda: not _bound(folder.name), "the image is free")
        image = (folder / "disk.img").read_bytes()
        shutil.rmtree(folder)
        first, newline, rest = done.stdout.partition("\n")
        device = first.removeprefix("device ") if first.startswith("device ") else "\0"
        out = rest if device != "\0" else first + newline + rest
        return Outcome(
            done.returncode, out.replace(device, "DEVICE"), done.stderr.replace(device, "DEVICE"), image
        )

    def close(self) -> None:
        """The daemon's end: it fails where anything is left."""
        self.daemon.stop()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """One daemon for all of them: a device costs no start."""
    require(os.geteuid() == 0, "needs root: loop devices and mounts")
    require(os.path.exists("/dev/loop-control"), "needs /dev/loop-control")
    for program in ("mkfs.ext4", "debugfs", "resize2fs", "e2fsck", "partx", "sfdisk", "unshare"):
        require(shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin"), f"needs {program}")
    folder = tmp_path_factory.mktemp("image")
    with contextlib.ExitStack() as stack:
        found = World(folder)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=0711", "loopd-test", found.grants], check=True)
        stack.callback(lambda: subprocess.run(["umount", "--lazy", found.grants], check=True))
        stack.callback(found.close)
        found.begin()
        yield found


@pytest.fixture
def place(world: World, tmp_path: Path) -> Path:
    """A folder on the file system of temporary files."""
    return tmp_path


def agree(world: World, way: Way, scenario: Scenario, place: Path, options: str = "") -> None:
    """The real tool and loopd's way say the same, end the same, and leave the same image."""
    real = world.run(REAL, scenario, place, options)
    assert real.code == 0, real.out + real.err
    ours = world.run(way, scenario, place, options)
    assert (ours.code, ours.out, ours.err) == (real.code, real.out, real.err)
    if scenario.exact:
        assert ours.image == real.image, "the images differ"


# Every way in -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("way", WAYS)
def test_as_with_losetup(world: World, place: Path, way: str, scenario: str) -> None:
    agree(world, WAYS[way], SCENARIOS[scenario], place)


def test_a_delivered_fd_that_is_closed_leaves_all_in_the_image(world: World, place: Path) -> None:
    """Without a sync, and before the detach: as long as the client has it open, it is the client that keeps it."""
    image = place / "disk.img"
    image.write_bytes(bytes(MIB))
    device = loopd.attach(image, deliver=["fd"], lifetime="process", socket=world.daemon.path)
    try:
        os.pwrite(device.fd, b"by the fd", 4096)
        assert image.read_bytes() == bytes(MIB)  # else this shows nothing: it was in the device's cache alone
        device.close()
        # What sent the fd closes its own copy a moment after it was received.
        eventually(lambda: image.read_bytes()[4096:4105] == b"by the fd", "it is written back", 1)
    finally:
        assert device.detach()


# Where the image lies, and how it is read and written -------------------------------------------------------------

FILE_SYSTEMS = {
    "ext4": ["mkfs.ext4", "-q"],
    "xfs": ["mkfs.xfs", "-q"],
    "btrfs": ["mkfs.btrfs", "-q"],
    "tmpfs": ["mount", "-t", "tmpfs", "loopd-test"],
    "overlay": ["mount", "-t", "overlay", "overlay"],
}
KNOWN = Path("/proc/filesystems").read_text().split()


@pytest.fixture(scope="module")
def mounted(world: World, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system of that type, of a file of the test's own."""
    kind, command = request.param, FILE_SYSTEMS[request.param]
    base = world.folder / kind
    point = base / "mounted"
    point.mkdir(parents=True)
    if command[0] == "mount":
        layers = [base / name for name in ("lower", "upper", "work")]
        for layer in layers:
            layer.mkdir()
        options = ["-o", "lowerdir={},upperdir={},workdir={}".format(*layers)] if kind == "overlay" else []
        subprocess.run([*command, *options, point], check=True)
    else:
        require(shutil.which(command[0]), f"needs {command[0]}")
        (base / "fs.img").touch()
        os.truncate(base / "fs.img", 320 * MIB)  # mkfs.xfs takes no less than 300
        subprocess.run([*command, base / "fs.img"], check=True, stdout=subprocess.DEVNULL)
        subprocess.run(["mount", "-t", kind, "-o", "loop", base / "fs.img", point], check=True)
    try:
        yield point
    finally:
        # A helper that has answered may close its files a moment later.
        eventually(lambda: subprocess.run(["umount", point], check=False).returncode == 0, "it is unmounted")
        shutil.rmtree(base)


@pytest.mark.parametrize("scenario", CONTENT)
@pytest.mark.parametrize("direct_io", ["on", "off"])
@pytest.mark.parametrize("mounted", [kind for kind in FILE_SYSTEMS if kind in KNOWN], indirect=True)
def test_as_with_losetup_on_every_file_system(world: World, mounted: Path, direct_io: str, scenario: str) -> None:
    """With the delivery that the documents recommend."""
    option = f"--direct-io={direct_io}"
    agree(world, WAYS["loopctl attach with a grant"], SCENARIOS[scenario], mounted, option)


@pytest.mark.parametrize("scenario", RAW)
@pytest.mark.parametrize("direct_io", ["on", "off"])
@pytest.mark.parametrize("way", ["loopctl run", "the library", "losetup with a grant"])
def test_as_with_losetup_with_direct_io_and_without(
    world: World, place: Path, way: str, direct_io: str, scenario: str
) -> None:
    agree(world, WAYS[way], SCENARIOS[scenario], place, f"--direct-io={direct_io}")


# mount -o loop ----------------------------------------------------------------------------------------------------

MOUNTS = {
    "all of it": Scenario(
        "truncate -s 16M disk.img; mkfs.ext4 -q -F disk.img; mkdir m",
        """
        mount -o loop disk.img m; echo one >m/one; umount m
        echo two >two; debugfs -w -R 'write two two' disk.img 2>/dev/null | sed 's/inode.*//'
        mount -o loop disk.img m; cat m/one m/two; echo three >m/three; umount m
        """,
        "e2fsck -f -n disk.img >log 2>&1 || { cat log; false; }; debugfs -R 'cat three' disk.img 2>/dev/null",
        exact=False,
    ),
    "a partition by its offset": Scenario(
        """
        mkdir tree m; echo one >tree/one; truncate -s 8M fs.img; mkfs.ext4 -q -d tree fs.img
        truncate -s 1M disk.img; cat fs.img >>disk.img; truncate -s 12M disk.img
        """,
        """
        mount -o loop,offset=1M,sizelimit=8M disk.img m; cat m/one; echo two >m/two; umount m
        dd if=disk.img of=fs.img bs=1M skip=1 count=8 status=none
        e2fsck -f -n fs.img >log 2>&1 || { cat log; false; }
        debugfs -R 'cat two' fs.img 2>/dev/null
        """,
        exact=False,
    ),
    "for reading": Scenario(
        "truncate -s 16M disk.img; mkfs.ext4 -q -F disk.img; mkdir m",
        "mount -o loop,ro disk.img m; ls m; ! touch m/new 2>/dev/null; umount m",
        exact=False,
    ),
    "a write is in the image when it is synced": Scenario(
        "truncate -s 16M disk.img; mkfs.ext4 -q -F disk.img; mkdir m",
        """
        mount -o loop disk.img m; echo 'this is in the image' >m/one; sync -f m
        grep -c -a 'this is in the image' disk.img; umount m
        """,
        exact=False,
    ),
}
_MOUNT = "{before}\n{during}\n{after}"


@pytest.mark.parametrize("scenario", MOUNTS)
@pytest.mark.parametrize("sandbox", ["own", "grant"])
def test_mount_as_with_the_real_one(world: World, place: Path, sandbox: str, scenario: str) -> None:
    real = world.run(Way(_MOUNT, "false"), MOUNTS[scenario], place)
    assert real.code == 0, real.out + real.err
    ours = world.run(Way(_MOUNT, "false", sandbox), MOUNTS[scenario], place)
    assert ours[:3] == real[:3]


@pytest.mark.parametrize("sandbox", ["own", "grant"])
def test_mount_names_what_the_real_one_does(world: World, place: Path, sandbox: str) -> None:
    """`mount -o loop` has the kernel unbind at the umount (AUTOCLEAR), and libmount then lists the image."""
    look = """
    mount -o loop disk.img m
    d=$(grep -sl "$PWD/disk.img" /sys/block/loop*/loop/backing_file | cut -d / -f 4); test -n "$d"
    """
    scenario = Scenario("truncate -s 16M disk.img; mkfs.ext4 -q -F disk.img; mkdir m", f"{look}{NAMED_BY}umount m")
    real = world.run(Way(_MOUNT, "false"), scenario, place)
    assert real.code == 0, real.out + real.err
    ours = world.run(Way(_MOUNT, "false", sandbox), scenario, place)
    words = [re.sub(r"\S*/disk.img", "disk.img", found.out) for found in (ours, real)]
    assert (ours.code, words[0], ours.err) == (real.code, words[1], real.err)
