"""The stand-ins as they are installed: one file each, for whatever Python there is, however they are found in PATH."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.box import STAND_INS, Box, Result, box_fixture, granted_fixture, plain_fixture, run, stand_ins_fixture  # noqa: F401
from support.daemon import ROOT, bound_to, eventually, require
from test_kpartx import prepared
from test_losetup import add_partitions
from test_partx import denied_fixture  # noqa: F401

sys.path.insert(0, str(ROOT / "tests/vm/inside"))
from recipes import recipe

NAMES = sorted(pair.partition(":")[2] for pair in STAND_INS)
MODULES = sorted({pair.partition(":")[0] for pair in STAND_INS})


# One file ---------------------------------------------------------------------------------------------------------


def test_each_is_one_file(stand_ins: Path) -> None:
    """They import nothing of the package, and need no newer grammar than that of Python 3.8."""
    assert sorted(path.name for path in stand_ins.iterdir()) == NAMES
    for path in stand_ins.iterdir():
        text = path.read_text()
        assert text.startswith("#!/bin/sh\n")
        assert not re.search(r"(?m)^\s*(from|import) loopd", text)
        assert os.access(path, os.X_OK)
        ast.parse(text, feature_version=(3, 8))
        assert run("sh", "-n", path) == Result(0, "", "")


def test_the_trees_files_run_as_they_are() -> None:
    for name in ("losetup.py", "mountloop.py"):
        path = ROOT / "loopd" / name
        assert path.read_text().startswith("#!/usr/bin/python3 -IS\n")
        assert os.access(path, os.X_OK)


def test_nothing_is_missing_in_them(stand_ins: Path, tmp_path: Path) -> None:
    """Whatever they use is in the one file, be it used ever so rarely."""
    for path in stand_ins.iterdir():
        text = path.read_text()
        rarely = re.search(r"(?s)^RARELY = r'''(.*?)'''$", text, re.MULTILINE)
        # Annotations are not looked at when a program runs, and what they name is not packed.
        bare = ast.unparse(WithoutAnnotations().visit(ast.parse(text + (rarely[1] if rarely else ""))))
        (tmp_path / f"{path.name}_.py").write_text(bare)
    ruff = shutil.which("ruff", path=f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}")
    require(ruff, "needs ruff")
    done = run(ruff, "check", "--isolated", "--select", "F821", "--target-version", "py38", tmp_path)
    assert (done.code, done.out) == (0, "All checks passed!\n")


class WithoutAnnotations(ast.NodeTransformer):
    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.returns = None
        self.generic_visit(node)
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        if node.value is None:
            return None
        return ast.copy_location(ast.Assign([node.target], self.visit(node.value)), node)


def test_two_things_of_one_name_are_refused(tmp_path: Path) -> None:
    """They would be one in the packed file."""
    package = tmp_path / "loopd"
    package.mkdir()
    (package / "common.py").write_text(
        '"""What is shared."""\n\ndef put():\n    return helper()\n\ndef helper():\n    return 1\n'
    )
    (package / "tool.py").write_text(
        '"""A tool."""\n\nfrom __future__ import annotations\n\nfrom loopd.common import put\n\n'
        "def helper():\n    return 2\n\nput()\n"
    )
    script = tmp_path / "systemd/packaging/stand_ins.py"
    script.parent.mkdir(parents=True)
    shutil.copy(ROOT / "systemd/packaging/stand_ins.py", script)
    done = run(sys.executable, script, tmp_path / "out", "tool:tool")
    assert done.code == 1
    assert "tool: {'helper'} are defined in common, too" in done.err


# The interpreter --------------------------------------------------------------------------------------------------


def interpreters(first: int, last: int) -> list[str]:
    """The Python 3 of these minor versions that are here, in PATH or of pyenv's."""
    pyenv = shutil.which("pyenv")
    folder = Path(run(pyenv, "root").out.strip()) / "versions" if pyenv else Path("/nonexistent")
    found = set()
    for minor in range(first, last + 1):
        for name in (shutil.which(f"python3.{minor}"), *folder.glob(f"3.{minor}.*/bin/python3.{minor}")):
            result = run(name, "-c", "import sys; print(sys.executable)") if name else Result(1, "", "")
            found |= {result.out.strip()} if result.code == 0 else set()
    return sorted(found)


def instead_of_the_python(box: Box, path: str) -> None:
    """Have another file in the place of /usr/bin/python3."""
    assert box("mount", "--bind", path, os.path.realpath("/usr/bin/python3")).code == 0
    require(box("test", "-e", "/usr/local/bin/python3").code, "there is a Python in /usr/local/bin")


@pytest.mark.parametrize("name", NAMES)
def test_without_python_it_says_so(plain: Box, name: str) -> None:
    """Were the interpreter looked up by the kernel, the shell would go on to the real program, without a word."""
    instead_of_the_python(plain, "/dev/null")
    result = plain("sh", "-c", f"{name} --version")
    said = f"{name}: the stand-in of loopd needs Python 3.8 or later: /usr/bin/python3 or /usr/local/bin/python3\n"
    assert result == Result(1, "", said)


def test_an_old_python_is_told_of(plain: Box) -> None:
    old = interpreters(6, 7)
    require(old, "needs Python 3.6 or 3.7")
    for path in old:
        version = run(path, "-c", "import sys; print('%d.%d' % sys.version_info[:2])").out.strip()
        said = f": the stand-in of loopd needs Python 3.8 or later, and {path} is {version}\n"
        for name in NAMES:
            text = (plain.programs / name).read_text().replace("/usr/bin/python3 ", f"{path} ")
            (plain.programs / f"{version}-{name}").write_text(text)
            (plain.programs / f"{version}-{name}").chmod(0o755)
            assert plain(f"{version}-{name}") == Result(1, "", f"{version}-{name}{said}")


def test_a_python_that_is_elsewhere_will_do(plain: Box) -> None:
    """As in the images named python: they have it in /usr/local/bin alone."""
    (plain.folder / "local").mkdir()
    (plain.folder / "local/python3").write_text('#!/bin/sh\nexec /usr/bin/env -i "$0.real" "$@"\n')
    shutil.copy(os.path.realpath("/usr/bin/python3"), plain.folder / "local/python3")
    instead_of_the_python(plain, "/dev/null")
    assert plain("mount", "--version").code == 1
    assert plain("/usr/bin/mount", "--bind", plain.folder / "local", "/usr/local/bin").code == 0
    assert plain("losetup", "--version").out.startswith("losetup from util-linux ")


def test_runs_on_each_interpreter_that_is_here(box: Box) -> None:
    paths = interpreters(8, 20)
    assert paths
    assert (
        box(
            "bash", "-c", "truncate -s 8M disk.img; printf 'label: gpt\\nsize=1M\\nsize=2M\\n' | sfdisk -q disk.img"
        ).code
        == 0
    )
    for path in paths:

        def tool(name: str, *arguments: str, path: str = path) -> Result:
            return box(path, "-IS", box.programs / name, *arguments)

        device = tool("losetup", "-f", "--show", "-P", "disk.img").out.strip()
        assert tool("losetup", "-j", "disk.img").out.startswith(f"{device}: "), path
        assert '"offset": 0' in tool("losetup", "-l", "-J", "-O", "OFFSET", device).out
        assert "BACK-FILE" in tool("losetup", "--output-all").out
        assert tool("losetup", "-c", device) == Result(0, "", "")
        assert tool("partprobe", "-s", device).out == f"{device}: gpt partitions 1 2\n"
        assert tool("partx", "-d", device).code == 0
        assert tool("kpartx", "-av", device).out.count("add map ") == 2
        assert tool("dmsetup", "ls").out.count("\n") == 2
        assert tool("kpartx", "-d", device) == Result(0, "", "")
        assert tool("losetup", "-f").out.startswith("/dev/loop")
        assert tool("losetup", "-d", device) == Result(0, "", "")
        assert box("sh", "-c", "mkdir -p m; mkfs.ext4 -q -F image").code == 0
        assert tool("mount", "-o", "loop", "image", "m") == Result(0, "", "")
        assert box("umount", "m").code == 0


# PATH and environment ---------------------------------------------------------------------------------------------


def test_a_second_copy_in_path_is_not_the_real_one(plain: Box) -> None:
    """Another version, even: each would take the other for the real one, and run it for ever."""
    second = plain.folder / "second"
    second.mkdir()
    for name in NAMES:
        text = (plain.programs / name).read_text()
        (second / name).write_text(text.replace('"""\n', '"""\n# another version\n', 1))
        (second / name).chmod(0o755)
    (second / "old").mkdir()
    shutil.copy(ROOT / "loopd/mountloop.py", second / "old/mount")
    plain.environment["PATH"] = f"{plain.programs}:{second}:{second}/old:{plain.environment['PATH']}"
    assert plain("timeout", "10", "mount", "--version").out.startswith("mount from util-linux")
    assert plain("timeout", "10", "partx", "--show", "nothing").err.startswith("partx: ")


@pytest.mark.parametrize(("name", "arguments"), [("mount", ["-l"]), ("partx", ["-s", "x"]), ("partprobe", ["x"])])
def test_a_wrapper_between_ends_in_an_error(plain: Box, name: str, arguments: list[str]) -> None:
    """It stands for the real program, and calls what is first in PATH."""
    wrappers = plain.folder / "wrappers"
    wrappers.mkdir()
    (wrappers / name).write_text(f'#!/bin/sh\n{name} "$@"\n')
    (wrappers / name).chmod(0o755)
    plain.environment["PATH"] = f"{plain.programs}:{wrappers}:{plain.environment['PATH']}"
    result = plain("timeout", "30", name, *arguments)
    assert result.code in (1, 32)
    assert result.out == ""
    assert (
        result.err == f"{name}: what this program takes for the real {name} runs this one again: have a look at PATH\n"
    )


def test_a_program_that_mount_starts_may_mount(plain: Box) -> None:
    """One of these in another is no wrapper."""
    helper = plain.folder / "bin/inner"
    helper.write_text("#!/bin/sh\nmount -t tmpfs tmpfs m2\n")
    helper.chmod(0o755)
    others = plain.folder / "others"
    others.mkdir()
    (others / "mount").write_text('#!/bin/sh\n[ "$1" = outer ] && exec inner\nexec /usr/bin/mount "$@"\n')
    (others / "mount").chmod(0o755)
    (plain.folder / "m2").mkdir()
    plain.environment["PATH"] = f"{plain.programs}:{others}:{plain.environment['PATH']}"
    assert plain("mount", "outer") == Result(0, "", "")
    assert plain("findmnt", "-n", "-o", "FSTYPE", "m2").out == "tmpfs\n"


def test_the_fallback_of_losetup_may_lead_back(plain: Box) -> None:
    wrapper = plain.folder / "wrapper"
    wrapper.write_text('#!/bin/sh\nexec losetup "$@"\n')
    wrapper.chmod(0o755)
    plain.environment |= {"LOOPD_SOCKET": "/nonexistent", "LOOPD_LOSETUP_FALLBACK": str(wrapper)}
    result = plain("timeout", "10", "losetup", "-a")
    assert (result.code, result.out) == (1, "")
    assert "systemctl enable --now loopd.socket" in result.err


def test_they_work_through_sudo(box: Box) -> None:
    """It has a PATH of its own, and takes LOOPD_* away: the container's are PID 1's."""
    require(shutil.which("sudo"), "needs sudo")
    script = f"""
/usr/bin/mount -t tmpfs tmpfs /usr/local/sbin; cp {box.programs}/* /usr/local/sbin; mkdir -p m
printf 'Defaults secure_path=/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin\\nroot ALL=(ALL) NOPASSWD: ALL\\n' >sudoers
chown 0:0 sudoers; chmod 440 sudoers; /usr/bin/mount --bind sudoers /etc/sudoers; mkfs.ext4 -q -F image
sudo -n sh -c 'echo "${{LOOPD_SOCKET-none}}"'; d=$(sudo -n losetup -f --show image); losetup -n -O BACK-FILE $d
sudo -n losetup -d $d; sudo -n mount -o loop image m; findmnt -n -o FSTYPE m; sudo -n umount m; sudo -n kpartx -l image
"""
    result = box("bash", "-c", script)
    assert result.err == ""
    assert result.out == f"none\n{box.folder}/image\next4\n"


def test_the_own_environment_comes_first(plain: Box) -> None:
    plain.environment["LOOPD_SOCKET"] = ""
    assert "at /run/loopd/loopd.sock: " in plain("losetup", "-a").err
    del plain.environment["LOOPD_SOCKET"]
    assert plain("losetup", "-a") == Result(0, "", "")


def test_make_installs_them(tmp_path: Path, stand_ins: Path) -> None:
    done = subprocess.run(
        ["make", "-s", "-C", str(ROOT), "install", f"DESTDIR={tmp_path}", "MANUAL="],
        check=False, capture_output=True, text=True, env={**os.environ, "MAKEFLAGS": ""},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    installed = tmp_path / "usr/local/lib/loopd/bin"
    assert sorted(os.listdir(installed)) == NAMES
    for name in NAMES:
        assert (installed / name).read_bytes() == (stand_ins / name).read_bytes()


# What the document says -------------------------------------------------------------------------------------------

CONTAINERS = {
    "with `b 7:* rw` and `CAP_SYS_ADMIN`": [],
    "with `b 7:* rw` alone": ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"],
    "rootless, in a user namespace": ["unshare", "--user", "--map-root-user", "--mount", "--propagation=unchanged"],
}
"""What each column of the table takes away from a container; the first two have a device cgroup, too."""
FILLED = (
    "mkfs.ext4 -q -F $d; echo text >text; debugfs -w -R 'write text text' $d; debugfs -R 'cat text' $d | grep -x text"
)
CALLS = {
    "`losetup`, and `mkfs`, `dd`, `debugfs -w`, mtools on its device": f"""
d=$(losetup -f --show image); {FILLED}; dd if=$d of=copy bs=1M status=none; cmp copy image; losetup -d $d
mkfs.vfat -n BOOT image >/dev/null; d=$(losetup -f --show image)
mcopy -i $d text ::text; mtype -i $d ::text; losetup -d $d
""",
    "`kpartx`, and the same on `/dev/mapper/loopNpM`": f"""
d=/dev/mapper/$(kpartx -asv maps.img | cut -d' ' -f3 | head -1); {FILLED}; kpartx -dsv maps.img
""",
    "`losetup -P`, and the same on `/dev/loopNpM`": f"d=${{disk}}p1; {FILLED}",
    "`mount DEVICE`, `mount -o loop`": """
mkfs.ext4 -q -F image; mkdir -p m; d=$(losetup -f --show image); mount $d m; umount m; losetup -d $d
mount -o loop image m; umount m
""",
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_what_works_in_which_container(denied: Path, granted: Box, container: str) -> None:
    """The table at the beginning of docs/losetup.md."""
    for program in ("mkfs.vfat", "mcopy", "mkfs.ext4", "setpriv"):
        require(shutil.which(program, path=granted.environment["PATH"]), f"needs {program}")
    rows = re.findall(r"(?m)^\| (.*) \|$", (ROOT / "docs/losetup.md").read_text().partition("\n\nWith an image")[0])
    head, _, *table = [row.split(" | ") for row in rows]
    assert head[1:] == list(CONTAINERS)
    assert [row[0] for row in table] == list(CALLS)
    assert granted("bash", "-c", prepared("gpt") + prepared("gpt", "maps.img")).code == 0
    disk = granted.attach("-P", "disk.img")
    add_partitions(os.path.basename(disk), 1)
    node = f"/dev/loopd/{os.path.basename(disk)}p1"
    eventually(lambda: granted("test", "-b", node).code == 0, "the partition has its node")
    inside = list(granted.inside)
    if "rootless" not in container:
        granted.inside[:0] = ["sh", "-c", f'echo $$ >{denied}/cgroup.procs; exec "$@"', "sh"]
    for call, script in CALLS.items():
        said = table[list(CALLS).index(call)][1 + list(CONTAINERS).index(container)]
        result = granted(*CONTAINERS[container], "bash", "-ec", f"disk={disk}; {script}")
        assert {"works": True, "is refused": False}[said] == (result.code == 0), (call, result)
    granted.inside = inside
    assert granted.losetup("-D").code == 0
    eventually(lambda: not bound_to(granted.folder), "nothing is left")


def test_the_call_of_kpartx(granted: Box) -> None:
    assert granted("bash", "-c", prepared("dos")).code == 0
    result = granted("sh", "-ec", recipe("kpartx and dmsetup", page="losetup.md"))
    assert result.code == 0
    assert re.sub(r"\d+", "N", result.err) == "loop deleted : /dev/loopN\n"
    assert re.sub(r"\d+p", "Np", result.out) == "del devmap : loopNp2\ndel devmap : loopNp1\n"
    assert not bound_to(granted.folder)
