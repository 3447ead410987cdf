"""Directories that the administrator makes for another user, on the administrator's socket."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.daemon import grants_at
from support.kept import Kept, start_kept_fixture  # noqa: F401  # a fixture

from loopd.protocol import wire
from loopd.worker.nodes import READ, SEARCH, WRITE, access_list

UID = 54321


@pytest.fixture
def grants(tmp_path: Path) -> Iterator[Path]:
    with grants_at(tmp_path / "grants") as path:
        yield path


def made(kept: Kept, name: str, **fields: int | bool) -> tuple[Path, list[int]]:
    reply = kept.admin(wire.Directory(name, 0, **fields))  # type: ignore[arg-type]  # of each kind
    assert reply.code is None, reply.fields
    return Path(reply.fields["path"]), reply.fields.get("numbers", [])


def test_another_users(start_kept: Callable[..., Kept], grants: Path) -> None:
    """It is that user's to look into, and nobody else's."""
    kept = start_kept(f"--grant-directory={grants}")
    path, numbers = made(kept, "build", uid=UID, devices=2)
    assert path == grants / f"{UID}-build"
    assert len(numbers) == 2
    rights = os.getxattr(path, "system.posix_acl_access")
    assert rights == access_list(UID, READ | WRITE | SEARCH, READ | SEARCH)
    assert made(kept, "build", uid=UID) == (path, numbers)
    other, _ = made(kept, "build")
    assert other == grants / f"{os.getuid()}-build"
    made(kept, "build", uid=UID, remove=True)
    assert not path.exists()
    assert other.exists()
    kept.end()


def test_nobody_but_the_administrator(start_kept: Callable[..., Kept], grants: Path) -> None:
    kept = start_kept(f"--grant-directory={grants}")
    path, _ = made(kept, "build", uid=UID)
    for uid in (UID, os.getuid()):
        for remove in (False, True):
            reply = kept.ask(wire.Directory("build", 0, uid=uid, remove=remove), [])
            assert reply.code == "not-permitted"
            assert "on the admin socket" in reply.fields["error"]["message"]
    assert path.exists()
    kept.end()


@pytest.mark.parametrize("uid", ["-1", "4294967295", "1.5", "true", '"0"'])
def test_what_is_no_user(start_kept: Callable[..., Kept], grants: Path, uid: str) -> None:
    kept = start_kept(f"--grant-directory={grants}")
    payload = b'{"op":"directory","name":"build","reply_fd":0,"uid":%s}' % uid.encode()
    reply = kept.ask(payload, [])
    assert reply.code == "malformed"
    assert "a user's number" in reply.fields["error"]["message"]
    kept.end()


def test_the_limit_on_numbers_is_for_others(start_kept: Callable[..., Kept], grants: Path) -> None:
    policy = "limits.new_numbers = 8\nlimits.new_numbers_per_minute = 0\n"
    kept = start_kept(f"--grant-directory={grants}", policy=policy)
    for index in range(3):
        made(kept, f"admin{index}")
    codes = [kept.ask(wire.Directory(f"other{index}", 0), []).code for index in range(2)]
    assert codes == [None, "quota"]
    made(kept, "admin3")
    kept.end()
