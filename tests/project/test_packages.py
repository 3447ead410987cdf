"""`make deb`, `make rpm`, `make zipapp` and `pip install .`: what is in them, and that it runs. (The deb is installed,
upgraded and removed in the VM: tests/vm/inside/test_package.py.)
"""

from __future__ import annotations

import ast
import itertools
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from support.daemon import ROOT, Daemon
from support.install import PLUGIN_MODULES, PLUGIN_PAGE, files, imported, install, make, prefix_fixture  # noqa: F401

from loopd import __version__
from loopd.cli import loopctl as cli
from loopd.protocol import wire

SOCKETS = ("loopd.socket", "loopd-admin.socket")


def run(*command: str | Path, check: bool = True, **options: Path | dict[str, str]) -> str:
    """What the command says, on standard output or error."""
    done = subprocess.run(
        command, check=False, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        **options,
    )  # type: ignore[call-overload]  # fmt: skip
    assert done.returncode == 0 or not check, done.stdout
    return str(done.stdout)


def built(target: str, products: str) -> Path:
    """The one file of that pattern in build/ that the target makes."""
    for product in (ROOT / "build").glob(products):
        product.unlink()
    done = make(target)
    assert done.returncode == 0, done.stderr
    (made,) = (ROOT / "build").glob(products)
    return made


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """What `make install` brings, without what depends on the interpreter."""
    tree = tmp_path_factory.mktemp("installed")
    install(f"DESTDIR={tree}", "PREFIX=/usr", "SITE=")
    return {name for name in files(tree) if "__pycache__" not in name}


def public(site: str) -> set[str]:
    """The files of python3-loopd: the client and the kernel's interface, in the place that the policies name."""
    client = [path for name in ("client", "protocol") for path in (ROOT / "loopd" / name).glob("*.py")]
    modules = [*client, *(ROOT / "loopd" / name for name in ("__init__.py", "loop.py", "py.typed"))]
    return {f"{site}/{path.relative_to(ROOT)}" for path in modules}


def beside(package: Path) -> Path:
    """The package of the library that was built with a package of the daemon."""
    return package.with_name(f"python3-{package.name}")


def without_docs(names: set[str]) -> set[str]:
    """Each system puts the README and the pages in a place of its own, and compresses manuals."""
    return {
        name.removesuffix(".gz") for name in names if not name.startswith(("usr/share/doc/", "usr/share/licenses/"))
    }


# The Debian package ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deb() -> Path:
    return built("deb", "loopd_*_all.deb")


@pytest.fixture(scope="module")
def unpacked(deb: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = tmp_path_factory.mktemp("deb")
    run("dpkg-deb", "--raw-extract", deb, tree)
    return tree


@pytest.fixture(scope="module")
def library(deb: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = tmp_path_factory.mktemp("library")
    run("dpkg-deb", "--raw-extract", beside(deb), tree)
    return tree


def test_lintian_finds_no_error(deb: Path, tmp_path: Path) -> None:
    """In both packages and in their source."""
    (built_in,) = (path for path in (ROOT / "build/deb").iterdir() if path.is_dir())
    source = tmp_path / built_in.name
    shutil.copytree(built_in, source, symlinks=True)
    run("make", "-f", "debian/rules", "clean", cwd=source)
    run("dpkg-source", "--build", ".", cwd=source)
    (description,) = tmp_path.glob("*.dsc")
    said = run("lintian", "--no-user-dirs", "--allow-root", "--fail-on=none", deb, beside(deb), description)
    assert [line for line in said.splitlines() if line.startswith("E: ")] == []


def test_what_the_deb_is_built_with_is_named(deb: Path) -> None:
    """`make deb` asks for each of Build-Depends, and says what is missing where it cannot install it."""
    (built_in,) = (path for path in (ROOT / "build/deb").iterdir() if path.is_dir())
    (line,) = re.findall(r"^Build-Depends: (.*)", (built_in / "debian/control").read_text(), re.MULTILINE)
    asked = run("make", "-s", "-C", ROOT, "--eval=print: ; @echo $(FOR_DEB)", "print").split()
    provider = {"debhelper-compat": "debhelper", "dh-sequence-installsysusers": "debhelper"}
    provider |= {"dh-sequence-python3": "dh-python"}
    names = {name.split()[0] for name in line.split(", ")} - {"python3"}  # make's own
    assert {provider.get(name, name) for name in names} == {pair.partition(":")[2] for pair in asked} - {"dpkg-dev"}


def test_the_deb_is_of_a_version_that_says_so_itself(deb: Path, unpacked: Path) -> None:
    version = run("dpkg-deb", "--field", deb, "Version").strip()
    assert version.partition("+")[0] == __version__
    assert deb.name == f"loopd_{version}_all.deb"
    assert f'__version__ = "{version}"' in (unpacked / "usr/lib/loopd/loopd/__init__.py").read_text()


def test_what_is_built_again_upgrades(tmp_path: Path) -> None:
    """By the commit and by what is not committed yet; the version is plain at its tag, and where there is no git."""
    tree = tmp_path / "tree"
    tree.mkdir()
    sources = ("LICENSE", "Makefile", "README.md", "docs", "loopd", "pyproject.toml", "systemd")
    run("cp", "-R", *(ROOT / name for name in sources), tree)

    def version() -> str:
        return run("make", "-s", "-C", tree, "--eval=print: ; @echo $(VERSION)", "print", env=plain).strip()

    def git(*arguments: str, at: str = "") -> None:
        who = [f"GIT_{role}_{what}" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")]
        run("git", "-C", tree, *arguments, env=plain | dict.fromkeys(who, "test") | {"GIT_COMMITTER_DATE": at})

    plain = {name: value for name, value in os.environ.items() if name != "MAKEFLAGS" and not name.startswith("GIT_")}
    assert version() == __version__
    git("init", "--quiet")
    git("add", "--all")
    git("commit", "--quiet", "--message=one", at="2026-11-29T14:30:05Z")
    found = [__version__, version()]
    assert re.fullmatch(re.escape(__version__) + r"\+git20261129143005\.[0-9a-f]{7,}", found[1])
    git("commit", "--quiet", "--allow-empty", "--message=two", at="2026-11-29T14:30:06Z")
    found.append(version())
    (tree / "README.md").write_text("Changed.\n")
    found.append(version())
    for older, newer in itertools.pairwise(found):
        assert older != newer
        run("dpkg", "--compare-versions", older, "lt", newer)
    git("commit", "--quiet", "--all", "--message=three", at="2026-11-29T14:30:07Z")
    git("tag", f"v{__version__}")
    assert version() == __version__


def test_the_library_is_the_system_s_python_s(library: Path) -> None:
    """`import loopd` finds python3-loopd, which needs nothing of the daemon's package."""
    site = "/usr/lib/python3/dist-packages"
    assert imported(f"mount -t overlay -o lowerdir={library}/usr:/usr overlay /usr") == site
    found = {name for name in files(library) if not name.startswith(("DEBIAN/", "usr/share/doc/"))}
    assert found == public(site.lstrip("/"))
    assert "py3compile -p python3-loopd" in (library / "DEBIAN/postinst").read_text()


def test_files_of_the_deb(unpacked: Path, installed: set[str]) -> None:
    """What `make install` brings, and what Debian wants beside it; compiled where it is installed."""
    found = {name for name in files(unpacked) if not name.startswith("DEBIAN/")}
    extra = {"usr/share/python3/runtime.d/loopd.rtupdate", "usr/share/lintian/overrides/loopd"}
    control = (unpacked / "DEBIAN/control").read_text()
    assert "Depends: python3-systemd, systemd," in control
    assert "Recommends: python3-loopd," in control
    named = {name.replace("zsh/site-functions", "zsh/vendor-completions") for name in installed}
    assert without_docs(found) == without_docs(named) | extra
    pages = {f"usr/share/doc/loopd/docs/{path.relative_to(ROOT / 'docs')}" for path in (ROOT / "docs").rglob("*.md")}
    assert {*pages, "usr/share/doc/loopd/README.md", "usr/share/doc/loopd/copyright"} <= found


def test_what_the_deb_is_tested_with(
    start_daemon: Callable[..., Daemon], prefix: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """debian/tests, which autopkgtest runs on an installed package, beside a daemon that is started by hand."""
    grants = tmp_path_factory.mktemp("grants")
    grants.chmod(0o711)
    run("mount", "-t", "tmpfs", "-o", "mode=0711", "tmpfs", grants)
    try:
        daemon = start_daemon(f"--grant-directory={grants}")
        environment = {"PATH": f"{prefix}/bin:{os.environ['PATH']}:/usr/sbin:/sbin", "LOOPD_SOCKET": daemon.path}
        environment |= {"AUTOPKGTEST_TMP": str(tmp_path), "PYTHONPATH": f"{prefix}/lib/loopd"}
        tests = ROOT / "systemd/packaging/debian/tests"
        (command,) = re.findall(r"^Test-Command: (.*)", (tests / "control").read_text(), re.MULTILINE)
        assert run("sh", "-euc", command, env=environment).strip() == __version__
        assert re.search(r"disk\.img: 11/\d+ files", run(tests / "attach", env=environment))
        assert list(grants.glob("[!.]*")) == []
        daemon.stop()
    finally:
        run("umount", "--lazy", grants)


def test_what_the_deb_does_with_units(unpacked: Path) -> None:
    """Sockets are enabled and started, and stopped with the removal alone; a service that runs is restarted."""
    postinst, prerm = ((unpacked / "DEBIAN" / name).read_text() for name in ("postinst", "prerm"))
    for socket in SOCKETS:
        assert f"deb-systemd-helper enable '{socket}'" in postinst
    assert "deb-systemd-invoke start 'loopd-admin.socket' 'loopd.socket'" in postinst
    restarted = [line for line in postinst.splitlines() if "restart" in line and "deb-systemd" in line]
    assert [line.split()[2] for line in restarted] == ["'loopd.service'", "'loopd@*.service'"]
    assert postinst.index("systemd-sysusers") < postinst.index("deb-systemd-invoke start")
    for line in prerm.splitlines():
        if line.startswith("if ") and "systemd" in line:
            assert '[ "$1" = remove ]' in line


def test_the_device_plugin_is_a_package_of_its_own(deb: Path, tmp_path: Path) -> None:
    """Without it nobody needs python3-grpcio."""
    package = deb.with_name(deb.name.replace("loopd_", "loopd-device-plugin_"))
    run("dpkg-deb", "--raw-extract", package, tmp_path)
    found = {name for name in files(tmp_path) if not name.startswith(("DEBIAN/", "usr/share/"))}
    unit = "usr/lib/systemd/system/loopd-device-plugin.service"
    assert found == {*PLUGIN_MODULES, unit, "usr/sbin/loopd-device-plugin"}
    assert (tmp_path / f"{PLUGIN_PAGE}.gz").exists()
    version = run("dpkg-deb", "--field", deb, "Version").strip()
    needs = run("dpkg-deb", "--field", package, "Depends")
    assert f"loopd (= {version}), python3-grpcio" in needs
    assert "grpc" not in run("dpkg-deb", "--field", deb, "Depends")
    postinst = (tmp_path / "DEBIAN/postinst").read_text()
    assert "deb-systemd-helper enable 'loopd-device-plugin.service'" in postinst
    assert "py3compile -p loopd-device-plugin /usr/lib/loopd" in postinst
    said = run("lintian", "--no-user-dirs", "--allow-root", "--fail-on=none", package)
    assert [line for line in said.splitlines() if line.startswith("E: ")] == []


# The RPM package ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rpm() -> Path:
    return built("rpm", "loopd-*.noarch.rpm")


def test_rpmlint_finds_no_error(rpm: Path) -> None:
    said = run(
        *("rpmlint", "-c", ROOT / "systemd/packaging/rpmlint.toml", rpm, beside(rpm)),
        *(ROOT / "build/rpm/loopd.spec",),
        check=False,
    )
    assert "2 packages and 1 specfiles checked; 0 errors" in said, said


def test_the_library_has_an_rpm_of_its_own(rpm: Path) -> None:
    names = run("rpm", "-qpl", beside(rpm)).splitlines()
    site = "usr/lib/python3/dist-packages"  # rpm's %{python3_sitelib}, here of Debian's Python
    assert {name.lstrip("/") for name in names if name.endswith((".py", ".typed"))} == public(site)
    assert "/usr/share/doc/python3-loopd/api.md" in {re.sub(r"(loopd)-0[^/]*", r"\1", name) for name in names}
    assert "python3-loopd" in run("rpm", "-qp", "--recommends", rpm)
    assert "python(abi) = " in run("rpm", "-qp", "--requires", beside(rpm))


def test_files_of_the_rpm(rpm: Path, installed: set[str]) -> None:
    found = {line.split(maxsplit=8)[8].lstrip("/") for line in run("rpm", "-qplv", rpm).splitlines() if line[0] != "d"}
    found = {name for name in found if "__pycache__" not in name}
    found = {name.partition(" -> ")[0] for name in found}
    assert without_docs(found) == without_docs(installed)
    assert "usr/share/doc/loopd/README.md" in found
    assert "usr/share/doc/loopd/no-sys-admin.conf" in found
    assert "python3-systemd" in run("rpm", "-qp", "--requires", rpm).split()
    owners = set(run("rpm", "-qp", "--queryformat", "[%{FILEUSERNAME}:%{FILEGROUPNAME}\n]", rpm).splitlines())
    assert owners == {"root:root"}
    folders = run("rpm", "-qplv", rpm).splitlines()
    assert any(line.startswith("d") and line.endswith(" /usr/lib/loopd") for line in folders)
    assert not any(line.startswith("d") and line.endswith(" /usr/lib") for line in folders)


def test_fedora_has_one_folder_for_programs(rpm: Path, tmp_path: Path) -> None:
    """Since Fedora 42 %{_sbindir} is /usr/bin, and /usr/sbin a link to it."""
    for source in (ROOT / "build/rpm").glob("loopd*.*"):
        if source.is_file():
            shutil.copy(source, tmp_path)
    places = {"_topdir": tmp_path, "_sourcedir": tmp_path, "_sbindir": "/usr/bin", "dist": ".fc42"}
    defined = [word for name, value in places.items() for word in ("--define", f"{name} {value}")]
    run("rpmbuild", "-bb", "--nodeps", *defined, tmp_path / "loopd.spec", env=os.environ | {"MAKEFLAGS": ""})
    (package,) = tmp_path.glob("RPMS/noarch/loopd-*.fc42.noarch.rpm")
    names = run("rpm", "-qpl", package).split()
    assert "/usr/bin/loopd" in names
    assert [name for name in names if name.startswith("/usr/sbin")] == []


def scriptlet(rpm: Path, name: str) -> str:
    return run("rpm", "-qp", "--queryformat", f"%{{{name}}}", rpm)


STAGES = {"first": 1, "upgrade": 2, "removal": 0}


@pytest.mark.parametrize("stage", STAGES)
def test_what_the_rpm_does_with_units(rpm: Path, tmp_path: Path, stage: str) -> None:
    """The scriptlets are run, with programs of systemd's names that write down how they are called."""
    calls = tmp_path / "calls"
    for name in (
        "systemctl",
        "systemd-sysusers",
        "systemd-tmpfiles",
        "journalctl",
        "udevadm",
        "loopctl",
        "rm",
        "rmdir",
    ):
        (tmp_path / name).write_text(f'#!/bin/sh\necho "{name} $*" >>{calls}\n')
        (tmp_path / name).chmod(0o755)
    # As on a system that runs systemd, whatever this one runs.
    run_folder = tmp_path / "run"
    (run_folder / "systemd/system").mkdir(parents=True)
    order = {
        "first": "POSTIN",
        "upgrade": "POSTIN PREUN POSTUN",
        "removal": "PREUN POSTUN",
    }
    for name in order[stage].split():
        # In an upgrade the old package's scriptlets are told that one version stays.
        left = 1 if stage == "upgrade" and name in ("PREUN", "POSTUN") else STAGES[stage]
        script = scriptlet(rpm, name).replace("/run/", f"{run_folder}/")
        subprocess.run(
            ["/bin/sh", "-euc", script, "scriptlet", str(left)], check=True, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}
        )
    called = calls.read_text().splitlines()
    changing = [
        line for line in called
        if line.startswith("systemctl ") and line.split()[1] not in ("daemon-reload", "--quiet")
    ]  # fmt: skip
    restart = "systemctl try-restart loopd.service loopd@*.service"
    if stage == "first":
        assert changing == ["systemctl --no-reload preset loopd.socket loopd-admin.socket"]
        assert called[0] == "systemd-sysusers loopd.conf"
    elif stage == "upgrade":
        assert changing == [restart]
    else:
        assert changing == [
            "systemctl is-active loopd-metrics.timer",
            "systemctl stop loopd-directory@*.service",
            "systemctl --no-reload disable --now loopd-metrics.timer loopd.socket loopd-admin.socket",
            "systemctl --no-reload disable loopd@.socket loopd-admin@.socket loopd-directory@.service",
            "systemctl stop loopd@*.socket loopd-admin@*.socket",
            r"systemctl stop loopd.service loopd@*.service run-loopd\x2ddev.mount",
            "systemctl clean --what=fdstore loopd.service loopd@*.service",
        ]


# The client in one file -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def zipapp() -> Path:
    return built("zipapp", "loopctl")


def interpreters() -> list[str]:
    """The system's, the tests' own, and the oldest that is supported where it is to be had."""
    oldest = [*Path.home().glob(".pyenv/versions/3.8.*/bin/python"), Path(shutil.which("python3.8") or "")]
    found = ["/usr/bin/python3", sys.executable, *(str(path) for path in oldest if path.is_file())]
    return [path for path in found if subprocess.run([path, "-V"], check=False, capture_output=True).returncode == 0]


def test_grammar_and_modules_are_those_of_python_3_8(zipapp: Path) -> None:
    """What an interpreter of that age would not understand; the names of its library are ruff's and mypy's to check."""
    with zipfile.ZipFile(zipapp) as archive:
        for name in archive.namelist():
            if name.endswith(".py"):
                ast.parse(archive.read(name), name, feature_version=(3, 8))
        assert {"__main__.py", "loopd/cli/loopctl.py", "loopd/client/api.py"} <= set(archive.namelist())


@pytest.mark.parametrize("interpreter", interpreters())
def test_one_file_client_attaches(
    zipapp: Path, interpreter: str, daemon: Daemon, image: int, tmp_path: Path, devices: Path
) -> None:
    """Alone in a directory, without the rest of the package in reach."""
    alone = tmp_path / "bin/loopctl"
    alone.parent.mkdir()
    alone.write_bytes(zipapp.read_bytes())
    ctl = [interpreter, "-IS", str(alone), "--socket", daemon.path]
    assert run(*ctl, "--version").strip() == f"loopctl {__version__}"
    content = run(*ctl, "run", "--directory", devices, tmp_path / "image", "--", "sh", "-c", "echo mine >{}; echo {}")
    assert Path(content.strip()).parent == devices
    assert os.pread(image, 5, 0) == b"mine\n"
    for verb in cli.VERBS:
        assert f"loopctl {verb}" in run(*ctl, verb, "--help")
    # The verbs that load modules of their own.
    assert run(*ctl, "doctor", check=False).startswith("OK    socket: ")
    assert run(*ctl, "list") == ""
    refused = subprocess.run([*ctl, "detach", "loop4095"], check=False, capture_output=True, text=True)
    assert (refused.returncode, "no device loop4095 of yours" in refused.stderr) == (1, True)
    assert os.listdir(alone.parent) == ["loopctl"]


def test_one_file_client_in_a_container(
    zipapp: Path, daemon: Daemon, image: int, tmp_path: Path, devices: Path
) -> None:
    """Bind-mounted alone into a root directory that has nothing else of loopd."""
    root = ["--ro-bind", "/usr", "/usr", "--symlink", "usr/bin", "/bin", "--symlink", "usr/lib", "/lib"]
    root += ["--symlink", "usr/lib64", "/lib64", "--proc", "/proc", "--dev", "/dev"]
    container = ["bwrap", "--unshare-pid", "--unshare-net", *root, "--clearenv", "--setenv", "PATH", "/usr/bin"]
    container += ["--ro-bind", str(zipapp), "/run/loopctl", "--ro-bind", str(daemon.directory), "/run/loopd"]
    container += ["--bind", str(tmp_path / "image"), "/image", "--dev-bind", str(devices), "/nodes"]
    run(*container, "/run/loopctl", "run", "--directory", "/nodes", "/image", "--", "sh", "-c", "echo mine >{}")
    assert os.pread(image, 5, 0) == b"mine\n"


# pip ------------------------------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_pip_install(tmp_path: Path, daemon: Daemon) -> None:
    """From a copy of the tree into an environment of its own, with programs that run."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "loopd", source / "loopd", ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    bin_ = tmp_path / "venv/bin"
    run(bin_ / "pip", "--quiet", "--disable-pip-version-check", "install", ".", cwd=source, env=environment)
    configuration = tmp_path / "loopd.toml"
    for text, ending in (("limits.devices = 3\n", 0), ("limits.gadgets = 3\n", 1)):
        configuration.write_text(text)
        command = [str(bin_ / "loopd"), "--check-config", "--config", str(configuration)]
        assert subprocess.run(command, check=False, capture_output=True, env=environment).returncode == ending
    assert run(bin_ / "loopd", "--version", cwd=tmp_path, env=environment).strip() == f"loopd {__version__}"
    assert run(bin_ / "loopctl", "--version", cwd=tmp_path, env=environment).strip() == f"loopctl {__version__}"
    hello = run(bin_ / "loopctl", "--socket", daemon.path, "hello", cwd=tmp_path, env=environment)
    assert hello.startswith(f"loopd {__version__}, protocol {wire.VERSION}\n")
    assert len(list((tmp_path / "venv").glob("lib/*/site-packages/loopd/py.typed"))) == 1
    assert f"Version: {__version__}\n" in run(bin_ / "pip", "show", "loopd", env=environment)
