"""`loopctl directory --cdi`: what is in the specification, where it is written, and when it is not.

Runtimes read it in a virtual machine: tests/vm/inside/test_cdi.py.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.daemon import eventually, require
from support.install import install
from support.world import UID, World, as_user, world_fixture  # noqa: F401

from loopd.cli import cdi
from loopd.cli.output import Failure
from loopd.protocol import wire
from loopd.protocol.wire import Granted

Command = Callable[..., str]

PARTS = cdi.Parts("/run/loopd/loopd.sock", 991, "/usr/bin/loopctl", "/usr/lib/loopd")
GRANTED = Granted("/run/loopd-dev/0-build", (4096, 4100), False)
STAND_INS = {"losetup", "mount", "kpartx", "dmsetup", "partx", "partprobe"}

# The rules of SPEC.md and of the library that runtimes read specifications with. Unknown fields are errors there.
NAME = r"[A-Za-z0-9]([A-Za-z0-9_.:-]*[A-Za-z0-9])?"
LABEL = "[A-Za-z]([A-Za-z0-9-]*[A-Za-z0-9])?"
KIND = rf"{LABEL}(\.{LABEL})*/{LABEL}"


def has(value: Any, **fields: type) -> None:
    """An object of exactly these fields; those that end with _ may be missing."""
    assert type(value) is dict
    assert {name for name in fields if not name.endswith("_")} <= set(value) <= {name.rstrip("_") for name in fields}
    for name, field in value.items():
        assert type(field) is fields.get(name, fields.get(f"{name}_")), name


def check(spec: Any) -> dict[str, Any]:
    """Hold a specification against the format; the edits of its one device."""
    has(spec, cdiVersion=str, kind=str, devices=list)
    assert re.fullmatch(KIND, spec["kind"])
    assert len(spec["kind"].partition("/")[0]) <= 253
    assert len(spec["kind"].partition("/")[2]) <= 63
    (device,) = spec["devices"]
    has(device, name=str, containerEdits=dict)
    assert re.fullmatch(NAME, device["name"])
    edits: dict[str, Any] = device["containerEdits"]
    has(edits, env=list, mounts=list, deviceNodes_=list, additionalGids_=list)
    for variable in edits["env"]:
        assert re.fullmatch("[A-Z_]+=.*", variable)
    for mount in edits["mounts"]:
        has(mount, hostPath=str, containerPath=str, options=list)
        assert mount["hostPath"].startswith("/")
        assert mount["containerPath"].startswith("/")
        assert {type(option) for option in mount["options"]} == {str}
    for node in edits.get("deviceNodes", ()):
        has(node, path=str, type=str, major=int, minor=int, fileMode=int, permissions=str)
        assert node["type"] == "b"
        assert set(node["permissions"]) <= set("rwm")
        assert 0 <= node["minor"] < 1 << 20
    for gid in edits.get("additionalGids", ()):
        assert type(gid) is int
        assert 0 < gid < 1 << 32
    # The lowest version that has what is used, for a runtime refuses those that it does not know yet.
    assert spec["cdiVersion"] == ("0.7.0" if "additionalGids" in edits else "0.5.0")
    return edits


# What is in it ------------------------------------------------------------------------------------------------


def test_roots() -> None:
    spec = cdi.specification(0, "build", GRANTED, PARTS)
    edits = check(spec)
    assert spec["kind"] == "loopd.alt/loop"
    assert spec["devices"][0]["name"] == "build"
    assert edits["env"] == ["LOOPD_SOCKET=/run/loopd/loopd.sock", "LOOPD_DIRECTORY=/dev/loopd"]
    assert {(mount["hostPath"], mount["containerPath"]) for mount in edits["mounts"]} == {
        ("/run/loopd", "/run/loopd"),
        ("/run/loopd-dev/0-build", "/dev/loopd"),
        ("/usr/bin/loopctl", "/usr/bin/loopctl"),
        ("/usr/lib/loopd", "/usr/lib/loopd"),
    }
    assert edits["additionalGids"] == [991]


def test_every_mount_is_read_only() -> None:
    """And no device opens through one but the directory's. The two programs can be run."""
    parts = PARTS._replace(stand_ins="/usr/lib/loopd/bin")
    for mount in check(cdi.specification(0, "build", GRANTED, parts))["mounts"]:
        options = set(mount["options"])
        assert {"bind", "ro", "nosuid"} <= options
        assert ("nodev" in options) == (mount["containerPath"] != "/dev/loopd")
        assert ("noexec" in options) == (mount["containerPath"] in ("/dev/loopd", "/run/loopd"))


def test_nodes_of_its_own_numbers_and_of_no_other() -> None:
    """Each gives a rule of the device cgroup: without `m`, and for exactly one device."""
    nodes = check(cdi.specification(0, "build", GRANTED, PARTS))["deviceNodes"]
    assert [(node["path"], node["major"], node["minor"]) for node in nodes] == [
        ("/dev/loop4096", 7, 4096 << _shift()),
        ("/dev/loop4100", 7, 4100 << _shift()),
    ]
    assert {(node["permissions"], node["fileMode"]) for node in nodes} == {("rw", 0o600)}


def _shift() -> int:
    """Bits of a minor that are a partition's, by a device that is there."""
    attribute = next(Path("/sys/block").glob("loop[1-9]*/dev"), None)
    if attribute is None:
        pytest.skip("there is no loop device but loop0")
    return (int(attribute.read_text().partition(":")[2]) // int(attribute.parts[3][4:])).bit_length() - 1


def test_a_users() -> None:
    """A rootless runtime makes no nodes, and knows the host's groups by other numbers."""
    granted = Granted("/run/loopd-dev/1000-build", (4096,), True)
    spec = cdi.specification(1000, "build", granted, PARTS)
    edits = check(spec)
    assert spec["kind"] == "loopd.alt/loop-1000"
    assert set(edits) == {"env", "mounts"}
    assert ("/run/loopd-dev/1000-build", "/dev/loopd") in {
        (mount["hostPath"], mount["containerPath"]) for mount in edits["mounts"]
    }


def test_the_stand_ins() -> None:
    edits = check(cdi.specification(0, "build", GRANTED, PARTS._replace(stand_ins="/usr/lib/loopd/bin")))
    assert edits["mounts"][-1]["hostPath"] == "/usr/lib/loopd/bin"
    assert edits["mounts"][-1]["containerPath"] == "/usr/local/sbin"


def test_an_instances_socket() -> None:
    """It has another folder on the host, and is where loopctl looks for it in the container."""
    edits = check(cdi.specification(0, "build", GRANTED, PARTS._replace(socket="/run/loopd-x/sock/x.sock", gid=None)))
    assert edits["mounts"][0]["hostPath"] == "/run/loopd-x/sock"
    assert edits["mounts"][0]["containerPath"] == "/run/loopd"
    assert edits["env"][0] == "LOOPD_SOCKET=/run/loopd/x.sock"
    assert "additionalGids" not in edits


def test_one_file() -> None:
    """`make zipapp`"""
    edits = check(cdi.specification(0, "build", GRANTED, PARTS._replace(program="/opt/loopctl", library=None)))
    assert {mount["hostPath"] for mount in edits["mounts"]} == {"/run/loopd", GRANTED.path, "/opt/loopctl"}


@pytest.mark.parametrize("remade", [True, None])
def test_refused_without_max_loop(remade: bool | None) -> None:
    told = cdi.refusal(GRANTED._replace(remade=remade))
    assert told is not None
    assert "loop.max_loop=8 on the kernel's command line" in told
    assert "--force" in told
    assert cdi.refusal(GRANTED) is None


# The file -----------------------------------------------------------------------------------------------------


def test_any_path_is_quoted(tmp_path: Path) -> None:
    odd = '/run/a "b" \\\n{}é/loopd.sock'
    folder = tmp_path / "cdi"
    cdi.write(str(folder), 0, "a", cdi.specification(0, "a", GRANTED, PARTS._replace(socket=odd)))
    spec = json.loads((folder / "loopd-0-a.json").read_bytes())
    assert check(spec)["mounts"][0]["hostPath"] == os.path.dirname(odd)
    with pytest.raises(Failure, match="UTF-8"):
        cdi.write(str(folder), 0, "a", cdi.specification(0, "a", GRANTED, PARTS._replace(socket="/\udcff/s")))
    assert json.loads((folder / "loopd-0-a.json").read_bytes()) == spec


@pytest.mark.parametrize("umask", [0o077, 0])
def test_modes(tmp_path: Path, umask: int) -> None:
    """Every user's runtime reads it, and only its owner writes it."""
    before = os.umask(umask)
    try:
        cdi.write(str(tmp_path / "cdi"), 0, "build", cdi.specification(0, "build", GRANTED, PARTS))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "cdi").stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "cdi/loopd-0-build.json").stat().st_mode) == 0o644
    assert [path.name for path in (tmp_path / "cdi").iterdir()] == ["loopd-0-build.json"]


def test_no_link_is_followed(tmp_path: Path) -> None:
    folder, other = tmp_path / "cdi", tmp_path / "other"
    folder.mkdir()
    other.write_text("another's")
    (folder / "loopd-0-build.json").symlink_to(other)
    cdi.write(str(folder), 0, "build", cdi.specification(0, "build", GRANTED, PARTS))
    assert other.read_text() == "another's"
    assert not (folder / "loopd-0-build.json").is_symlink()
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(OSError, match="Not a directory"):
        cdi.write(str(tmp_path / "link"), 0, "build", {})
    (folder / "loopd-0-build.json").unlink()
    (folder / "loopd-0-build.json").symlink_to(other)
    assert cdi.remove([str(folder)], 0, "build") == [str(folder / "loopd-0-build.json")]
    assert other.read_text() == "another's"


@pytest.mark.parametrize(("owner", "mode"), [(UID, 0o755), (0, 0o775), (0, 0o1777)])
def test_a_folder_that_others_write_to(tmp_path: Path, owner: int, mode: int) -> None:
    """Who writes there says what root's containers get."""
    folder = tmp_path / "cdi"
    folder.mkdir()
    folder.chmod(mode)
    os.chown(folder, owner, owner)
    with pytest.raises(Failure, match="root's alone"):
        cdi.write(str(folder), 0, "build", {})
    assert not list(folder.iterdir())


def test_an_error_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "loopd-0-build.json").mkdir()
    tmp_path.chmod(0o755)
    with pytest.raises(IsADirectoryError):
        cdi.write(str(tmp_path), 0, "build", {})
    assert [path.name for path in tmp_path.iterdir()] == ["loopd-0-build.json"]


def test_what_names_other_numbers_goes(tmp_path: Path) -> None:
    """A file in a folder that outlives the boot: its numbers are another directory's by now."""
    folder = tmp_path / "cdi"
    cdi.write(str(folder), 0, "build", cdi.specification(0, "build", GRANTED, PARTS))
    assert cdi.remove([str(folder)], 0, "build", unless=GRANTED.numbers) == []
    assert cdi.remove([str(folder)], 0, "build", unless=(4096, 4101)) == [str(folder / "loopd-0-build.json")]
    (folder / "loopd-0-build.json").write_text("[]")
    assert cdi.remove([str(folder)], 0, "build", unless=GRANTED.numbers) == [str(folder / "loopd-0-build.json")]
    assert cdi.remove([str(folder), str(tmp_path / "none")], 0, "build") == []


# The command --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prefix() -> Iterator[Path]:
    """An installation that every user reaches."""
    folder = Path(tempfile.mkdtemp(prefix="loopd-test-", dir="/tmp"))
    folder.chmod(0o755)
    install("DESTDIR=/", f"PREFIX={folder}", "MANUAL=")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def loopctl(world: World, prefix: Path) -> Command:
    """The installed one."""

    def call(*arguments: object, uid: int = 0, code: int = 0, **env: str) -> str:
        command = [*as_user(uid), f"{prefix}/bin/loopctl", *map(str, arguments)]
        done = world.run(command, check=False, **env)
        assert done.returncode == code, done.stderr
        return done.stdout.rstrip("\n") if code == 0 else done.stderr

    return call


def asked(world: World, name: str) -> Granted:
    """What the daemon says of root's directory."""

    def known() -> dict[str, Any] | None:
        fields = world.daemon.ask(wire.Directory(name, 0), []).fields
        return fields if "remade" in fields else None

    fields = eventually(known, "the daemon knows whether max_loop is in force")
    return Granted(fields["path"], tuple(fields["numbers"]), fields["remade"])


def test_root_has_a_specification_written(world: World, loopctl: Command, prefix: Path) -> None:
    folder = world.folder / "cdi"
    assert loopctl("directory", "--cdi", "--cdi-dir", folder, "--force", "build") == "loopd.alt/loop=build"
    edits = check(json.loads((folder / "loopd-0-build.json").read_text()))
    granted = asked(world, "build")
    assert len(granted.numbers) == 8
    assert [node["path"] for node in edits["deviceNodes"]] == [f"/dev/loop{number}" for number in granted.numbers]
    assert {(mount["hostPath"], mount["containerPath"]) for mount in edits["mounts"]} == {
        (os.path.dirname(world.daemon.path), "/run/loopd"),
        (granted.path, "/dev/loopd"),
        (f"{prefix}/bin/loopctl", f"{prefix}/bin/loopctl"),
        (f"{prefix}/lib/loopd", f"{prefix}/lib/loopd"),
    }
    assert "additionalGids" not in edits  # everybody may write to this socket

    os.chmod(world.daemon.path, 0o660)
    os.chown(world.daemon.path, 0, UID)
    loopctl("directory", "--cdi", "--cdi-dir", folder, "--force", "--losetup", "build")
    edits = check(json.loads((folder / "loopd-0-build.json").read_text()))
    assert edits["additionalGids"] == [UID]
    stand_ins = {mount["containerPath"]: Path(mount["hostPath"]) for mount in edits["mounts"]}["/usr/local/sbin"]
    assert {path.name for path in stand_ins.iterdir()} == STAND_INS

    assert loopctl("directory", "build") == granted.path
    assert (folder / "loopd-0-build.json").exists()
    loopctl("directory", "--remove", "--cdi-dir", folder, "build")
    assert not list(folder.iterdir())
    assert not Path(granted.path).exists()


def test_what_it_brings_works(world: World, loopctl: Command, prefix: Path) -> None:
    """The mounts and the environment, as a runtime makes them, and nothing else of the host's."""
    folder = world.folder / "cdi"
    loopctl("directory", "--cdi", "--cdi-dir", folder, "--force", "--losetup", "build")
    edits = check(json.loads((folder / "loopd-0-build.json").read_text()))
    command = ["bwrap", "--unshare-pid", "--unshare-net", "--die-with-parent", "--clearenv", "--setenv", "PATH"]
    command += ["/usr/local/sbin:/usr/bin:/bin:/usr/sbin", "--ro-bind", "/usr", "/usr"]
    command += ["--symlink", "usr/bin", "/bin", "--symlink", "usr/lib", "/lib", "--symlink", "usr/lib64", "/lib64"]
    command += ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/run", "--tmpfs", "/tmp"]
    for mount in edits["mounts"]:
        # --ro-bind sets nodev
        bind = "--dev-bind" if "nodev" not in mount["options"] else "--ro-bind"
        command += [bind, mount["hostPath"], mount["containerPath"]]
    for variable in edits["env"]:
        command += ["--setenv", *variable.split("=", 1)]
    require(shutil.which("bwrap"), "needs bubblewrap")
    script = (
        "truncate -s 1M /tmp/a /tmp/b; loopctl attach /tmp/a; loopctl list -n -o NAME; losetup -f --show /tmp/b; "
        "command -v mount"
    )
    path = f"PATH={prefix}/bin:$PATH; {script}"
    attached, listed, flat, mount = world.run([*command, "sh", "-ec", path]).stdout.split()
    numbers = asked(world, "build").numbers
    assert attached == f"/dev/loopd/{listed}"
    assert {int(re.findall(r"\d+$", device)[0]) for device in (attached, flat)} < set(numbers)
    assert mount == "/usr/local/sbin/mount"
    bound = [Path(f"/sys/block/loop{number}/loop") for number in numbers]
    eventually(lambda: not any(path.exists() for path in bound), "the devices have ended with their container")


def test_it_is_refused_without_max_loop(world: World, loopctl: Command) -> None:
    folder = world.folder / "cdi"
    remade = asked(world, "build").remade
    told = loopctl("directory", "--cdi", "--cdi-dir", folder, "build", code=1) if remade is not False else None
    if told is None:
        assert loopctl("directory", "--cdi", "--cdi-dir", folder, "build") == "loopd.alt/loop=build"
    else:
        assert "max_loop is not in force" in told
        assert "loop.max_loop=8 on the kernel's command line" in told
        assert not folder.exists()


def test_a_user_has_one_written(world: World, loopctl: Command) -> None:
    """For a rootless runtime, where such runtimes look; max_loop is no matter, for it has no nodes."""
    runtime = world.work / "run"
    runtime.mkdir()
    os.chown(runtime, UID, UID)
    name = loopctl("directory", "--cdi", "build", uid=UID, XDG_RUNTIME_DIR=str(runtime))
    assert name == f"loopd.alt/loop-{UID}=build"
    file = runtime / f"cdi/loopd-{UID}-build.json"
    edits = check(json.loads(file.read_text()))
    assert not {"deviceNodes", "additionalGids"} & set(edits)
    assert file.stat().st_uid == UID
    loopctl("directory", "--remove", "build", uid=UID, XDG_RUNTIME_DIR=str(runtime))
    assert not file.exists()


def test_root_has_one_written_for_a_user(world: World, loopctl: Command) -> None:
    folder = world.folder / "cdi"
    os.chmod(world.daemon.path, 0o660)  # root alone may ask
    name = loopctl("directory", "--cdi", "--cdi-dir", folder, "--user", UID, "build")
    assert name == f"loopd.alt/loop-{UID}=build"
    edits = check(json.loads((folder / f"loopd-{UID}-build.json").read_text()))
    path = world.grants / f"{UID}-build"
    assert str(path) in {mount["hostPath"] for mount in edits["mounts"]}
    assert "deviceNodes" not in edits
    # The directory is the user's to enter.
    world.run([*as_user(UID), "ls", str(path)])
    assert loopctl("directory", "--user", UID, "build") == str(path)
    loopctl("directory", "--remove", "--cdi-dir", folder, "--user", UID, "build")
    assert not list(folder.iterdir())
    assert not path.exists()
    assert "only root" in loopctl("directory", "--user", "root", "build", uid=UID, code=1)
    assert "no user nobody-here" in loopctl("directory", "--user", "nobody-here", "build", code=1)


def test_a_directory_that_is_gone_leaves_its_specification_to_be_removed(world: World, loopctl: Command) -> None:
    """As after a boot, for one in /etc/cdi."""
    folder = world.folder / "cdi"
    loopctl("directory", "--cdi", "--cdi-dir", folder, "--force", "build")
    loopctl("directory", "--remove", "build")
    loopctl("directory", "--remove", "--cdi-dir", folder, "build")
    assert not list(folder.iterdir())
    assert "build" in loopctl("directory", "--remove", "--cdi-dir", folder, "build", code=1)


def test_one_with_a_device_in_it_keeps_its_specification(world: World, loopctl: Command) -> None:
    folder = world.folder / "cdi"
    loopctl("directory", "--cdi", "--cdi-dir", folder, "--force", "build")
    device = loopctl("attach", "--directory", world.grants / "0-build", world.image())
    loopctl("directory", "--remove", "--cdi-dir", folder, "build", code=1)
    assert (folder / "loopd-0-build.json").exists()
    loopctl("detach", device)
    loopctl("directory", "--remove", "--cdi-dir", folder, "build")


def test_no_container_gets_the_administrators_socket(world: World, loopctl: Command) -> None:
    folder = world.folder / "cdi"
    told = loopctl("--socket", world.daemon.admin, "directory", "--cdi", "--cdi-dir", folder, "build", code=1)
    assert "administrator's" in told
    assert not folder.exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--losetup"], "--losetup needs --cdi"),
        (["--force"], "--force needs --cdi"),
        (["--cdi-dir", "/x"], "--cdi-dir needs --cdi"),
        (["--cdi", "--remove"], "a specification goes by itself"),
        (["--cdi", "--admin"], "--cdi goes with neither --json nor --admin"),
        (["--cdi", "--json"], "--cdi goes with neither --json nor --admin"),
    ],
)
def test_wrong_options(loopctl: Command, options: list[str], told: str) -> None:
    assert told in loopctl("directory", *options, "build", code=2)


def test_names_that_a_runtime_does_not_take(world: World, loopctl: Command) -> None:
    assert "ends with ." in loopctl("directory", "--cdi", "--cdi-dir", world.folder / "cdi", "--force", "a.", code=1)


def test_a_tree_is_no_installation(world: World) -> None:
    done = world.ctl("directory", "--cdi", "--cdi-dir", world.folder / "cdi", "--force", "build", check=False)
    assert done.returncode == 1
    assert "`make install`, or a package" in done.stderr


def test_the_home_of_another_user(world: World) -> None:
    """As setpriv(1) leaves it."""
    home = world.work / "roots"
    (home / ".config").mkdir(parents=True)
    home.chmod(0o700)
    os.chown(home, 0, 0)
    done = world.run([*as_user(UID), "loopctl", "directory", "plain"], HOME=str(home), XDG_CONFIG_HOME="")
    assert done.stdout.strip().endswith(f"/{UID}-plain")
