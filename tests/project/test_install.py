"""`make install` and `make uninstall`: what they put where, that it runs there, and that nothing stays."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import tomllib
from pathlib import Path

import pytest
from support.install import (  # noqa: F401
    PLUGIN_MODULES,
    PLUGIN_PAGE,
    SYSTEM_PYTHON,
    files,
    imported,
    install,
    make,
    no_import,
    prefix_fixture,
)

from loopd import __version__

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
STAND_INS = ("losetup", "mount", "kpartx", "dmsetup", "partx", "partprobe")
"""Programs that are installed to be bind-mounted alone, each under the name of what it stands in for."""


def test_files_of_the_package(tmp_path: Path) -> None:
    install(f"DESTDIR={tmp_path}", "PREFIX=/usr")
    found = files(tmp_path)
    modules = {f"usr/lib/loopd/{path.relative_to(ROOT)}" for path in (ROOT / "loopd").rglob("*.py")} - PLUGIN_MODULES
    tag = subprocess.check_output([SYSTEM_PYTHON, "-c", "import sys; print(sys.implementation.cache_tag, end='')"])
    compiled = {f"{os.path.dirname(name)}/__pycache__/{Path(name).stem}.{tag.decode()}.pyc" for name in modules}
    stand_ins = {f"usr/lib/loopd/bin/{name}" for name in STAND_INS}
    pages = {f"usr/share/man/man{path.stem[-1]}/{path.stem}" for path in (ROOT / "docs/man").iterdir()}
    pages.remove(PLUGIN_PAGE)
    assert found == modules | compiled | stand_ins | pages | {
        "usr/lib/python3/dist-packages/loopd",
        "usr/bin/loopctl",
        "usr/sbin/loopd",
        "usr/lib/loopd/loopd/py.typed",
        "usr/lib/modprobe.d/loopd.conf",
        "usr/lib/systemd/catalog/loopd.catalog",
        "usr/lib/systemd/system/loopd-admin.socket",
        "usr/lib/systemd/system/loopd-admin@.socket",
        "usr/lib/systemd/system/loopd-directory@.service",
        "usr/lib/systemd/system/loopd-metrics.service",
        "usr/lib/systemd/system/loopd-metrics.timer",
        "usr/lib/systemd/system/loopd.service",
        "usr/lib/systemd/system/loopd.socket",
        "usr/lib/systemd/system/loopd@.service",
        "usr/lib/systemd/system/loopd@.socket",
        r"usr/lib/systemd/system/run-loopd\x2ddev.mount",
        "usr/lib/sysusers.d/loopd.conf",
        "usr/lib/tmpfiles.d/loopd.conf",
        "usr/lib/udev/rules.d/00-loopd.rules",
        "usr/share/bash-completion/completions/loopctl",
        "usr/share/doc/loopd/no-sys-admin.conf",
        "usr/share/doc/loopd/selinux.conf",
        "usr/share/fish/vendor_completions.d/loopctl.fish",
        "usr/share/selinux/packages/loopd.cil",
        "usr/share/zsh/site-functions/_loopctl",
    }
    link = Path(os.readlink(tmp_path / "usr/lib/python3/dist-packages/loopd"))
    assert link == Path("../../loopd/loopd")
    for name in found - compiled - {"usr/lib/python3/dist-packages/loopd"}:
        text = (tmp_path / name).read_text()
        assert "@PREFIX@" not in text, name
        assert str(tmp_path) not in text, name


def test_files_of_the_device_plugin(tmp_path: Path) -> None:
    """Beside loopd's, of which it has none."""
    done = make("install-device-plugin", f"DESTDIR={tmp_path}", "PREFIX=/usr")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr in ("", "make: missing: python3-grpcio, without which it does not start\n")
    found = {name for name in files(tmp_path) if "__pycache__" not in name}
    unit = "usr/lib/systemd/system/loopd-device-plugin.service"
    assert found == PLUGIN_MODULES | {PLUGIN_PAGE, unit, "usr/sbin/loopd-device-plugin"}
    assert "\nExecStart=/usr/sbin/loopd-device-plugin $OPTIONS\n" in (tmp_path / unit).read_text()
    for name in found:
        assert str(tmp_path) not in (tmp_path / name).read_text(), name


def test_everybody_can_read_it_whatever_the_umask(tmp_path: Path) -> None:
    install(f"DESTDIR={tmp_path}", umask=0o077)
    for path in (tmp_path / "usr").rglob("*"):
        program = path.is_dir() or path.parent.name in {"bin", "sbin"}
        assert stat.S_IMODE(path.stat().st_mode) == (0o755 if program else 0o644), path


def test_the_library_is_the_system_s_python_s(tmp_path: Path) -> None:
    install(f"DESTDIR={tmp_path}")
    found = imported(f"mount --bind {tmp_path}/usr/local /usr/local")
    assert re.fullmatch(r"/usr/local/lib/python3\.\d+/dist-packages", found)


def test_another_module_of_the_name_stays(tmp_path: Path) -> None:
    other = tmp_path / "usr/lib/python3/dist-packages/loopd"
    other.mkdir(parents=True)
    for command in ("install", "uninstall"):
        done = make(command, f"DESTDIR={tmp_path}", "PREFIX=/usr")
        assert done.returncode == 0
        assert ("something else of that name" in done.stderr) == (command == "install")
        assert list(other.iterdir()) == []


@pytest.mark.parametrize("program", ["sbin/loopd", "bin/loopctl"])
def test_program_runs_compiled_and_isolated(prefix: Path, tmp_path: Path, program: str) -> None:
    # What an ordinary `python3` would take from the environment or the working directory.
    (tmp_path / "json.py").write_text("raise SystemExit('not the json that was meant')\n")
    (tmp_path / "loopd").mkdir()
    before = files(prefix)
    shebang = (prefix / program).read_text().splitlines()[0]
    assert shebang.startswith(f"#!{SYSTEM_PYTHON} ")
    ran = subprocess.run(
        [*shebang[2:].split(), "-v", str(prefix / program), "--version"],
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin"},
    )
    assert (ran.returncode, __version__ in ran.stdout) == (0, True), ran.stderr
    assert f"{prefix}/lib/loopd/loopd/__pycache__/" in ran.stderr  # -v names each module's file
    assert re.findall(rf"code object from '{prefix}.*\.py'", ran.stderr) == []  # compiled each time anew
    assert files(prefix) == before
    assert subprocess.check_output([str(prefix / program), "--version"], cwd=tmp_path, text=True) == ran.stdout


def test_programs_are_those_of_the_package(prefix: Path) -> None:
    assert make("install-device-plugin", "DESTDIR=/", f"PREFIX={prefix}").returncode == 0
    for name, entry in PROJECT["scripts"].items():
        (program,) = prefix.glob(f"*bin/{name}")
        module, _, function = entry.partition(":")
        assert f"from {module} import {function}\n" in program.read_text()


@pytest.mark.parametrize("program", ["sbin/loopd", "bin/loopctl"])
def test_program_without_its_library_says_so(prefix: Path, program: str) -> None:
    """As in a container with the program bound into it, and not the library."""
    (prefix / "lib/loopd").rename(prefix / "lib/elsewhere")
    ran = subprocess.run([prefix / program, "--version"], check=False, capture_output=True, text=True, cwd="/")
    said = f"its library is not here: bind {prefix}/lib/loopd into the container, too"
    assert (ran.returncode, ran.stdout, ran.stderr) == (1, "", f"{Path(program).name}: {said}\n")


@pytest.mark.parametrize("name", STAND_INS)
def test_stand_in_runs_alone(prefix: Path, tmp_path: Path, name: str) -> None:
    alone = tmp_path / "alone" / name
    alone.parent.mkdir()
    alone.write_bytes((prefix / "lib/loopd/bin" / name).read_bytes())
    alone.chmod(0o755)
    ran = subprocess.run([alone, "--version"], check=False, capture_output=True, text=True, env={}, cwd="/")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.startswith(name)
    assert os.listdir(alone.parent) == [name]


def test_pages_are_in_their_sections(prefix: Path) -> None:
    for path in (prefix / "share/man").rglob("*.*"):
        name, _, section = path.name.rpartition(".")
        assert path.parent.name == f"man{section}"
        assert re.search(rf'(?im)^\.TH "?{name}"? "?{section}"? ', path.read_text()), path


def python_without(module: str, path: Path) -> Path:
    """An interpreter that has all of the system's modules but this one."""
    path.write_text(f'#!/bin/sh\ncase "$*" in *"import {module}"*) exit 1;; esac\nexec {SYSTEM_PYTHON} "$@"\n')
    path.chmod(0o755)
    return path


def test_packages_are_never_installed(tmp_path: Path) -> None:
    """Also not where the running system is what loopd is installed into: DESTDIR is empty."""
    called = tmp_path / "called"
    (tmp_path / "bin").mkdir()
    for name in ("apt-get", "apt", "dnf", "pip"):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\necho $0 $* >>{called}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    python = python_without("docutils", tmp_path / "python")
    prefix = tmp_path / "prefix"
    path = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    in_namespace = ["unshare", "--mount", "sh", "-ec", 'mount -t tmpfs tmpfs /run; exec "$@"', "sh"]  # no systemd runs
    command = [*in_namespace, "make", "-s", "-C", str(ROOT), "install", f"PREFIX={prefix}", f"PYTHON={python}"]
    environment = os.environ | {"MAKEFLAGS": ""} | path
    done = subprocess.run(
        command, check=False, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == no_import(prefix) + "make: the man pages are left out: they need python3-docutils\n"
    assert (prefix / "lib/systemd/system/loopd.service").exists()
    assert not called.exists()


def test_a_missing_library_is_told_of(tmp_path: Path) -> None:
    done = make("install", f"DESTDIR={tmp_path}/root", f"PYTHON={python_without('systemd', tmp_path / 'python')}")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == "make: missing: python3-systemd, without which loopd does not start\n"


def test_what_cannot_make_pages_installs_the_rest(tmp_path: Path) -> None:
    python = python_without("docutils", tmp_path / "python")
    done = make("install", f"DESTDIR={tmp_path}/root", f"PYTHON={python}")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == "make: the man pages are left out: they need python3-docutils\n"
    found = files(tmp_path / "root")
    assert "usr/local/lib/systemd/system/loopd.service" in found
    assert not [name for name in found if "/man/" in name]
    # A container has loopctl bound into it, and its own Python.
    for program, interpreter in (("sbin/loopd", python), ("bin/loopctl", "/usr/bin/python3")):
        assert (tmp_path / "root/usr/local" / program).read_text().startswith(f"#!{interpreter} -IS\n")


def test_python_that_is_too_old_is_told_of(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    done = make("install", f"DESTDIR={tmp_path}/root", f"PYTHON={python}")
    assert done.returncode != 0
    assert "Python 3.11" in done.stderr
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize("service", ["loopd.service", "loopd@.service"])
def test_unit_starts_what_was_installed(prefix: Path, service: str) -> None:
    unit = (prefix / "lib/systemd/system" / service).read_text()
    (program,) = re.findall(r"^ExecStart=(\S+)", unit, re.MULTILINE)
    assert os.access(program, os.X_OK)


def test_upgrade_leaves_no_module_of_the_old_version(prefix: Path) -> None:
    before = files(prefix)
    folders = [prefix / "lib/loopd", *(path for path in (prefix / "lib/loopd").rglob("*") if path.is_dir())]
    inodes = [folder.stat().st_ino for folder in folders]
    (prefix / "lib/loopd/loopd/gone.py").write_text("")
    install("DESTDIR=/", f"PREFIX={prefix}")
    assert files(prefix) == before
    assert [folder.stat().st_ino for folder in folders] == inodes, "containers have them bind-mounted"


def test_uninstall_takes_away_what_install_brought_and_nothing_else(tmp_path: Path) -> None:
    other = tmp_path / "usr/local/lib/systemd/system/other.service"
    other.parent.mkdir(parents=True)
    other.touch()
    install(f"DESTDIR={tmp_path}")
    assert make("install-device-plugin", f"DESTDIR={tmp_path}").returncode == 0
    assert make("uninstall", f"DESTDIR={tmp_path}").returncode == 0
    assert files(tmp_path) == {"usr/local/lib/systemd/system/other.service"}


def test_where_nothing_can_be_installed_it_is_said(tmp_path: Path) -> None:
    (tmp_path / "id").symlink_to("/usr/bin/id")
    done = make("for-demo", "FOR_DEMO=no-such-program:its-package", env={"PATH": str(tmp_path)})
    assert done.returncode != 0
    assert "please install (Debian's names): its-package" in done.stderr
