"""The module of SELinux policy, systemd/selinux/loopd.cil: compiled by secilc, as semodule(8) does, and what it allows.

No policy is loaded: that would be the host's. What the module allows is asked of the compiler: with a `neverallow` of
it there is no policy.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.daemon import ROOT, require
from support.install import install

sys.path.insert(0, str(ROOT / "tests/vm/inside"))
from recipes import recipe  # of the tests in virtual machines

SOURCE = ROOT / "systemd/selinux"
MODULE = SOURCE / "loopd.cil"

# A policy as small as the compiler takes it, with the names of Fedora's and container-selinux's that the module needs
# or must not touch.
FILE = "getattr open read write append ioctl lock create unlink link rename setattr relabelfrom relabelto map mounton"
SOCKET = "create bind connect sendto read write getattr"
BASE = f"""
(mls true)
(class dir ({FILE} search add_name remove_name rmdir))
(class file ({FILE}))
(class blk_file ({FILE}))
(class sock_file ({FILE}))
(class fd (use))
(class unix_dgram_socket ({SOCKET}))
(class unix_stream_socket ({SOCKET} connectto))
(classorder (dir file blk_file sock_file fd unix_dgram_socket unix_stream_socket))
(sensitivity s0)
(sensitivityorder (s0))
(category c0)
(categoryorder (c0))
(sensitivitycategory s0 (c0))
(user system_u)
(userlevel system_u (s0))
(userrange system_u ((s0) (s0 (c0))))
(role object_r)
(role system_r)
(userrole system_u object_r)
(userrole system_u system_r)
(typeattribute file_type)
(typeattribute non_security_file_type)
(typeattribute non_auth_file_type)
(typeattribute pidfile)
(type init_t)
(roletype system_r init_t)
(type container_t)
(type another_t)
(type unconfined_service_t)
(type var_run_t)
(type fixed_disk_device_t)
(typeattributeset file_type (var_run_t fixed_disk_device_t))
(sid kernel)
(sidorder (kernel))
(sidcontext kernel (system_u system_r init_t ((s0) (s0))))
(allow init_t file_type (dir (search)))
"""

ALLOWED = {
    ("loopd_run_t", "dir"): "getattr open read search",
    ("loopd_run_t", "sock_file"): "getattr write",
    ("unconfined_service_t", "unix_dgram_socket"): "sendto",
    ("unconfined_service_t", "fd"): "use",
    ("loopd_dev_t", "dir"): "getattr ioctl lock open read search",
    ("loopd_dev_t", "blk_file"): "append getattr ioctl lock open read write",
}
"""All that a container may, by type and class."""


@pytest.fixture(autouse=True)
def base(tmp_path: Path) -> Path:
    require(os.access("/usr/bin/secilc", os.X_OK), "needs secilc")
    path = tmp_path / "base.cil"
    path.write_text(BASE)
    return path


def compiled(base: Path, more: str = "") -> str | None:
    """What the compiler has to say about the module with that base and these statements; None if it makes a policy."""
    other = base.with_name("more.cil")
    other.write_text(more)
    policy, contexts = base.with_name("policy"), base.with_name("file_contexts")
    command: list[str | Path] = ["secilc", "--mls=true", f"--output={policy}", f"--filecontext={contexts}"]
    command += [base, other, MODULE]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode == 0:
        assert policy.stat().st_size > 0
        return None
    return done.stdout + done.stderr


def never(kind: str, name: str, permissions: str, source: str = "container_t") -> str:
    return f"(neverallow {source} {kind} ({name} ({permissions})))\n"


def test_it_compiles(base: Path) -> None:
    assert compiled(base) is None


@pytest.mark.parametrize(("kind", "name"), ALLOWED)
def test_what_a_container_may(base: Path, kind: str, name: str) -> None:
    for permission in ALLOWED[kind, name].split():
        assert "neverallow check failed" in (compiled(base, never(kind, name, permission)) or ""), permission


def test_what_a_container_may_not(base: Path) -> None:
    """Nothing else of these types, nothing of any other, and no other domain anything."""
    rules = "".join(never(kind, name, f"not ({allowed})") for (kind, name), allowed in ALLOWED.items() if name != "fd")
    others = "container_t another_t init_t var_run_t fixed_disk_device_t"
    for name in ("dir", "file", "blk_file", "sock_file", "fd", "unix_dgram_socket", "unix_stream_socket"):
        rules += "".join(never(kind, name, "all") for kind in others.split())
        for kind in ("loopd_run_t", "loopd_dev_t", "unconfined_service_t"):
            rules += never(kind, name, "all") if (kind, name) not in ALLOWED else ""
            rules += never(kind, name, "all", source="another_t")
    assert compiled(base, rules) is None


def test_another_domain_gets_the_same(base: Path) -> None:
    rule = never("loopd_dev_t", "blk_file", "write", source="another_t")
    assert compiled(base, rule) is None
    assert "neverallow check failed" in (compiled(base, rule + "(call loopd_client (another_t))") or "")


@pytest.mark.parametrize("run", ["/run", "/var/run"])
def test_labels_of_files(base: Path, run: str) -> None:
    assert compiled(base) is None
    lines = [line.split() for line in base.with_name("file_contexts").read_text().splitlines()]

    def label(path: str) -> list[str]:
        return [context.split(":")[2] for pattern, context in lines if re.fullmatch(pattern, path)]

    for path in ("/loopd", "/loopd/loopd.sock", "/loopd-team/sock", "/loopd-team/sock/loopd.sock"):
        assert label(run + path) == ["loopd_run_t"], path
    for path in ("/loopd-dev", "/loopd-dev/0-build", "/loopd-dev/0-build/loop4096"):
        assert label(run + path) == ["loopd_dev_t"], path
    for path in ("/loopd-admin/admin.sock", "/loopd-team", "/loopd-team/admin.sock", "/loopd-nodes/loop0"):
        assert label(run + path) == [], path


def test_the_recipe_finds_the_files(base: Path, tmp_path: Path) -> None:
    """With programs of their names that write down what they are given; the drop-in is looked at by systemd itself."""
    require(os.geteuid() == 0, "needs root: a mount namespace")
    install(f"DESTDIR={tmp_path}/tree")
    programs, units, calls = tmp_path / "bin", tmp_path / "units", tmp_path / "calls"
    units.mkdir()
    programs.mkdir()
    for name in ("semodule", "restorecon", "systemctl"):
        (programs / name).write_text(f'#!/bin/sh\necho "{name} $*" >>{calls}\n')
        (programs / name).chmod(0o755)
    script = f"""
        mount --bind {tmp_path}/tree/usr/local /usr/local; mount --bind {units} /etc/systemd/system
        PATH={programs}:$PATH; {recipe("SELinux")}
        export SYSTEMD_UNIT_PATH={units}:/usr/local/lib/systemd/system:
        systemd-analyze verify --man=no loopd.service loopd@team.service
    """
    done = subprocess.run(["unshare", "--mount", "sh", "-euc", script], check=False, capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if "FileDescriptorStorePreserve" not in line]
    assert (done.returncode, said) == (0, [])
    module, *rest = calls.read_text().splitlines()
    assert (tmp_path / "tree" / module.partition("=/")[2]).read_bytes() == MODULE.read_bytes()
    assert [line.split()[0] for line in rest] == ["systemctl", "restorecon", "systemctl"]
    for unit in ("loopd.service", "loopd@.service"):
        drop_in = (units / f"{unit}.d/selinux.conf").read_text()
        assert re.findall(r"^\w+=.*", drop_in, re.MULTILINE) == ["ExecStartPre=-+/usr/sbin/restorecon /run/loopd-dev"]
