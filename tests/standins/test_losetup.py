"""The drop-in losetup in a container's stead: a mount and a PID namespace with a /dev of its own, and loopd's socket.

What it prints is held against the real losetup, run beside it on the same devices.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import stat
import subprocess
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from support.box import (  # noqa: F401
    MIB,
    Box,
    Result,
    beside,
    box_fixture,
    granted_fixture,
    plain_fixture,
    real_fixture,
    run,
    stand_ins_fixture,
    version_fixture,
)
from support.daemon import ROOT, Daemon, bound_to, eventually
from support.scripted import Peer, Request, released

from loopd import __version__
from loopd.loop import Loop

SOURCE = ROOT / "loopd" / "losetup.py"
PARTITIONS = 16


# Setting up and detaching -----------------------------------------------------------------------------------------


def test_examples_of_the_manual(box: Box) -> None:
    page = (ROOT / "docs/man/loopd-losetup.8.rst").read_text()
    losetup, kpartx = re.findall(r"::\n\n((?:    .*\n)+)", page.partition("\nEXAMPLES\n")[2])
    assert box("sh", "-ec", "truncate -s 8M disk.img; printf 'label: gpt\\nsize=4M\\n' | sfdisk -q disk.img").code == 0
    result = box("sh", "-ec", textwrap.dedent(losetup))
    assert result.code == 0, result.err
    assert result.out.splitlines()[1].split()[5:] == [str(box.folder / "disk.img"), "1", "512"]
    assert not bound_to(box.folder)
    assert re.fullmatch(r"del devmap : loop\d+p1\n", box("sh", "-ec", textwrap.dedent(kpartx)).out)
    with (box.folder / "disk.img").open("rb") as file:
        file.seek(MIB + 1024 + 56)
        assert file.read(2) == b"\x53\xef"  # of ext4
    assert not bound_to(box.folder)


def test_find_show_and_detach(box: Box) -> None:
    device = box.attach("image")
    assert re.fullmatch(r"/dev/loop\d+", device)
    assert box("test", "-b", device).code == 0
    assert box("dd", "if=/dev/zero", f"of={device}", "bs=4096", "count=1", "conv=fsync").code == 0
    (name,) = bound_to(box.folder)
    assert device == f"/dev/{name}"
    assert box.losetup("-d", device) == Result(0, "", "")
    assert not bound_to(box.folder)
    assert box.names() == set()
    again = box.losetup("-d", device)
    assert again == Result(1, "", f"losetup: {device}: detach failed: No such file or directory\n")


def test_every_option_of_setup_reaches_the_kernel(box: Box) -> None:
    spellings = [
        ["-o", "1M", "--sizelimit", "2M", "-b", "4096", "-r", "--direct-io=off", "--loop-ref", 'a "b" \\ ö'],
        ["-o1MiB", "--sizelimit=2097152", "-b4K", "-r", "--direct-io=off", '--loop-ref=a "b" \\ ö'],
        ["--offset=0x100000", "--sizelim", "2048K", "--sec", "4096", "--read-only", "--dir=off", '--loop=a "b" \\ ö'],
    ]
    wanted = "OFFSET,SIZELIMIT,LOG-SEC,RO,DIO,REF,AUTOCLEAR,PARTSCAN"
    for options in spellings:
        device = box.attach(*options, "image")
        (row,) = json.loads(box.losetup("-l", "-J", "-O", wanted, device).out)["loopdevices"]
        assert row == {
            "offset": MIB, "sizelimit": 2 * MIB, "log-sec": 4096, "ro": True, "dio": False,
            "ref": 'a "b" \\ ö', "autoclear": False, "partscan": False,
        }  # fmt: skip
        assert box("blockdev", "--getsize64", device).out == f"{2 * MIB}\n"
        assert box.losetup("--detach", device).code == 0


def test_combined_letters_and_arguments_behind_the_file(box: Box) -> None:
    result = box.losetup("image", "-fPr", "--show")
    device = result.out.rstrip()
    assert box.losetup("-n", "-O", "RO,PARTSCAN", device).out == "1 1\n"
    assert box.losetup("-vd", device).code == 0


def test_a_read_only_file_makes_a_read_only_device(box: Box) -> None:
    (box.folder / "image").chmod(0o444)
    assert box("mount", "--bind", "image", "image").code == 0
    assert box("mount", "-o", "remount,bind,ro", "image").code == 0
    device = box.attach("image")
    assert box.losetup("-n", "-O", "RO", device).out == "1\n"


def test_without_show_nothing_is_printed(box: Box) -> None:
    assert box.losetup("-f", "image") == Result(0, "", "")
    assert len(bound_to(box.folder)) == 1


def test_the_end_of_the_file_that_fits_no_sector(box: Box) -> None:
    with (box.folder / "image").open("r+b") as file:
        file.truncate(1000)
    result = box.losetup("-f", "image")
    assert (result.code, result.out) == (0, "")
    assert "image: Warning: file does not end on a 512-byte sector boundary" in result.err


def test_several_are_detached_whatever_becomes_of_the_first(box: Box) -> None:
    first, second = box.attach("image"), box.attach("image")
    result = box.losetup("-d", "/dev/loop1048575", first, os.path.basename(second))
    assert result == Result(1, "", "losetup: /dev/loop1048575: detach failed: No such file or directory\n")
    assert not bound_to(box.folder)


def test_detach_all_leaves_others_alone(box: Box, daemon: Daemon, image: int, directory: int) -> None:
    """The other is a client of another daemon, and the host's own."""
    other = daemon.attach(image, directory).fields["devname"]
    box.attach("image")
    box.attach("image")
    assert box.losetup("-D") == Result(0, "", "")
    assert not bound_to(box.folder)
    assert bound_to(box.folder.parent / "image") == [other]
    assert box.losetup("-d", other).code == 1
    assert box.losetup("-a") == Result(0, "", "")


def test_a_grant_shows_its_own_devices_alone(granted: Box) -> None:
    mine = granted.attach("image")
    granted.environment["LOOPD_DIRECTORY"] = "/dev"
    other = granted.attach("image")
    assert granted.losetup("-n", "-O", "NAME").out.split() == [other]
    assert granted.losetup("-d", mine).code == 1
    assert granted.losetup("-D").code == 0
    del granted.environment["LOOPD_DIRECTORY"]
    assert granted.losetup("-n", "-O", "NAME").out.split() == [mine]


def test_a_device_in_use_goes_at_the_last_close(box: Box) -> None:
    device = box.attach("image")
    (name,) = bound_to(box.folder)
    path = box.dev(name)
    with (path.parent / os.readlink(path) if path.is_symlink() else path).open("rb"):
        assert box.losetup("-d", device) == Result(0, "", "")
        assert bound_to(box.folder) == [name]
    eventually(lambda: not bound_to(box.folder), "closed, it is gone")


def test_find_without_a_file_gives_a_device_that_goes_with_the_script(box: Box) -> None:
    """As pi-gen calls it: its script wants a node by that name, and then attaches its file to the next device."""
    script = 'found=$(losetup -f) && test -b "$found" && echo $found && losetup -f --show image; true'
    result = box("bash", "-c", script)
    assert result.err == ""
    found, device = result.out.splitlines()
    assert os.path.basename(found) != os.path.basename(device)
    eventually(lambda: box.losetup("-n", "-O", "NAME").out.split() == [device], "the script has ended")
    assert box("test", "-e", found).code == 1
    assert box.losetup("-d", device).code == 0
    assert box.names() == set()


def test_the_devices_end_with_the_container(box: Box) -> None:
    device = box.attach("image")
    assert box.losetup(device).code == 0
    box.close()
    eventually(lambda: not bound_to(box.folder), "PID 1 has ended")


def test_set_capacity(box: Box) -> None:
    device = box.attach("image")
    with (box.folder / "image").open("r+b") as file:
        file.truncate(8 * MIB)
    assert box("blockdev", "--getsize64", device).out == f"{4 * MIB}\n"
    assert box.losetup("-c", device) == Result(0, "", "")
    assert box("blockdev", "--getsize64", device).out == f"{8 * MIB}\n"
    assert box.losetup("--set-capacity", "loop1048575").code == 1


def test_sector_size_and_direct_io_of_an_attached_device(box: Box) -> None:
    device = box.attach("--direct-io=off", "image")
    assert box.losetup("-b", "4096", device) == Result(0, "", "")
    assert box("blockdev", "--getss", device).out == "4096\n"
    refused = box.losetup("-b", "99999999999", device)
    assert refused == Result(1, "", f"losetup: {device}: set logical block size failed: Invalid argument\n")
    assert box.losetup("--direct-io=on", device) == Result(0, "", "")
    assert box.losetup("-n", "-O", "DIO,LOG-SEC", device).out == "1 4096\n"
    assert box.losetup("--direct-io=off", device) == Result(0, "", "")
    assert box.losetup("-n", "-O", "DIO", device).out == "0\n"
    gone = box.losetup("--direct-io", "/dev/loop1048575")
    assert gone == Result(1, "", "losetup: /dev/loop1048575: set direct io failed: No such file or directory\n")


def test_no_overlap(box: Box) -> None:
    device = box.attach("-L", "-o", "1M", "--sizelimit", "1M", "image")
    assert box.attach("-L", "-o", "1M", "--sizelimit", "1M", "image") == device
    exists_already = Result(1, "", "losetup: image: overlapping loop device exists\n")
    assert box.losetup("-L", "-f", "image") == exists_already
    assert box.losetup("-Lfo1536K", "image") == exists_already
    assert box.attach("-L", "-o", "2M", "image") != device
    assert box.attach("-L", "--sizelimit", "1M", "image") != device
    assert box.losetup("-D").code == 0
    box.attach("-r", "image")
    refused = box.losetup("-Lf", "image")
    assert refused == Result(1, "", "losetup: image: overlapping read-only loop device exists\n")
    assert len(bound_to(box.folder)) == 1


def test_no_overlap_with_a_device_that_has_no_node_here(plain: Box) -> None:
    device = plain.attach("image")
    assert plain("rm", device).code == 0
    refused = plain.losetup("-L", "-f", "--show", "image")
    assert refused == Result(1, "", "losetup: image: overlapping loop device exists\n")


def test_remove(box: Box) -> None:
    device = box.attach("image")
    busy = box.losetup("--remove", device)
    assert busy == Result(1, "", f"losetup: {device}: remove failed: Device or resource busy\n")
    assert box.losetup("-d", device).code == 0
    assert box.losetup("--remove", device) == Result(0, "", "")


# What a broker cannot grant ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["/dev/loop0", "image"], ["-P", "loop0", "image"], ["image", "image"]])
def test_a_device_of_ones_choice_is_refused(plain: Box, arguments: list[str]) -> None:
    result = plain.losetup(*arguments)
    assert (result.code, result.out) == (1, "")
    assert "loopd" in result.err
    assert "-f --show FILE" in result.err
    assert not bound_to(plain.folder)


def test_a_refusal_of_loopd_is_told_with_its_reason(plain: Box) -> None:
    result = plain.losetup("-f", "--show", "-b", "500", "image")
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("losetup: image: failed to set up loop device: sector_size: expected one of 512, 1024")
    result = plain.losetup("-f", "--show", "-o", "4M", "image")
    assert result.code == 1
    assert "past the end" in result.err
    (plain.folder / "empty").touch()
    result = plain.losetup("-f", "--show", "empty")
    assert result.err.startswith("losetup: empty: failed to set up loop device: the file is empty: ")
    (plain.dev("other")).mkdir()
    plain.environment["LOOPD_DIRECTORY"] = "/dev/nowhere"
    result = plain.losetup("-f", "image")
    assert result == Result(
        1, "", "losetup: image: failed to set up loop device: /dev/nowhere: No such file or directory\n"
    )


def test_without_the_socket_it_says_what_to_do(plain: Box) -> None:
    plain.environment["LOOPD_SOCKET"] = str(plain.folder / "nowhere")
    for arguments, code in ((["-f", "image"], 1), (["-a"], 1), (["-d", "/dev/loop0"], 1), (["/dev/loop0"], 2)):
        if arguments[-1] == "/dev/loop0":
            plain("mknod", "/dev/loop0", "b", "7", "0")
        result = plain.losetup(*arguments)
        assert (result.code, result.out) == (code, ""), arguments
        assert result.err.count("\n") == 1
        assert "systemctl enable --now loopd.socket" in result.err
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as nobody:
        nobody.bind(plain.environment["LOOPD_SOCKET"])
    result = plain.losetup("-a")
    assert "systemctl restart loopd.socket" in result.err


def test_what_is_started_ends_as_usual_where_nobody_reads(plain: Box, make_image: Callable[..., int]) -> None:
    """Python ignores SIGPIPE, and a program that it starts would, too."""
    make_image()
    others = plain.folder / "others"
    others.mkdir()
    for name in ("mount", "losetup"):
        (others / name).write_text("#!/bin/sh\nkill -PIPE $$\necho it goes on\n")
        (others / name).chmod(0o755)
    plain.environment["PATH"] = f"{others}:{plain.environment['PATH']}"
    ended = 128 + signal.SIGPIPE
    for arguments in (("-t", "tmpfs", "tmpfs", "/mnt"), ("-o", "loop", "image", "/mnt")):
        result = plain("sh", "-c", '"$@"; exit $?', "sh", plain.programs / "mount", *arguments)
        assert (result.code, result.out) == (ended, ""), arguments
    plain.environment["LOOPD_SOCKET"] = str(plain.folder / "nowhere")
    plain.environment["LOOPD_LOSETUP_FALLBACK"] = str(others / "losetup")
    result = plain("sh", "-c", '"$@"; exit $?', "sh", plain.programs / "losetup", "-a")
    assert (result.code, result.out) == (ended, "")


def test_without_the_socket_it_is_the_real_one_if_asked(plain: Box, real: str) -> None:
    plain.environment["LOOPD_LOSETUP_FALLBACK"] = real
    assert "(loopd " in plain.losetup("--version").out
    plain.environment["LOOPD_SOCKET"] = str(plain.folder / "nowhere")
    assert plain.losetup("--version").out == run(real, "--version").out
    # Itself by mistake: no endless loop.
    plain.environment["LOOPD_LOSETUP_FALLBACK"] = str(plain.programs / "losetup")
    assert "systemctl enable" in plain.losetup("-a").err
    plain.environment["LOOPD_LOSETUP_FALLBACK"] = "/nonexistent/losetup"
    missing = plain.losetup("-a")
    assert missing == Result(
        1, "", "losetup: LOOPD_LOSETUP_FALLBACK: /nonexistent/losetup: No such file or directory\n"
    )


def test_an_answer_that_makes_no_sense(plain: Box) -> None:
    """Whatever a daemon of another version says, it is an error and no traceback."""
    path = str(plain.folder / "other.sock")
    plain.environment["LOOPD_SOCKET"] = path
    answers = [b"{", b"[]", b"null", b'{"error": 1}', b'{"devname": "../x"}', b"\xff", b"[" * 60000, b'{"leases": [1]}']
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(path)
        listener.settimeout(20)
        for answer in answers:
            arguments = ["-f", "image"] if b"leases" not in answer else ["-a"]
            with subprocess.Popen(
                [*plain.inside, str(plain.programs / "losetup"), *arguments], env=plain.environment,
                stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True,
            ) as process:  # fmt: skip
                _, fds, _, _ = socket.recv_fds(listener, 8192, 8)
                with socket.socket(fileno=fds[-1]) as reply:
                    reply.send(answer)
                for fd in fds[:-1]:
                    os.close(fd)
                error = process.communicate(timeout=20)[1]
            assert process.returncode == 1, answer
            assert "the answer of loopd makes no sense" in error, answer
            assert error.count("\n") == 1
        listener.setblocking(False)
        assert not bound_to(plain.folder)


# Flat names -------------------------------------------------------------------------------------------------------


def test_flat_names_lead_into_the_grant(granted: Box) -> None:
    device = granted.attach("image")
    name = os.path.basename(device)
    assert os.readlink(granted.dev(name)) == f"loopd/{name}"
    assert granted.names() == {name}
    assert granted("test", "-b", device).code == 0
    assert granted.losetup("-d", device).code == 0
    assert granted.names() == set()


def test_a_table_may_be_written_later(granted: Box) -> None:
    """Nothing of ours runs then: the names are made ahead, and those that lead nowhere go as soon as something runs."""
    device = granted.attach("-P", "image")
    name = os.path.basename(device)
    assert granted.names() == {name, *(f"{name}p{number}" for number in range(1, PARTITIONS + 1))}
    assert granted("test", "-b", f"{device}p1").code == 1
    add_partitions(name, 1, 20)
    eventually(lambda: granted("test", "-b", f"/dev/loopd/{name}p20").code == 0, "the partitions' nodes are there")
    assert granted("dd", "if=/dev/zero", f"of={device}p1", "bs=512", "count=1").code == 0
    assert granted.losetup("-a").code == 0
    assert granted("sh", "-c", f"ls {device}*").out.split() == [device, f"{device}p1", f"{device}p20"]
    assert granted("test", "-b", f"{device}p20").code == 0
    with Loop(int(name[4:])) as loop:
        loop.delete_partition(20)
    eventually(lambda: granted("test", "-e", f"/dev/loopd/{name}p20").code == 1, "the node is gone")
    assert granted.losetup("-a").code == 0
    assert granted.names() == {name, f"{name}p1"}
    assert granted.losetup("-d", device).code == 0
    assert granted.names() == set()


def add_partitions(name: str, *numbers: int) -> None:
    """What a kernel with a parser of tables does, or partprobe."""
    with Loop(int(name[4:])) as device:
        for number in numbers:
            device.add_partition(number, number * MIB // 8, MIB // 8)


def test_where_there_are_partitions_their_names_are_all(tmp_path: Path) -> None:
    """The table was there before, and the kernel has read it: with a name for each, and for no other."""
    dev, grant, socket_path = tmp_path / "dev", tmp_path / "dev/loopd", tmp_path / "loopd.sock"
    grant.mkdir(parents=True)
    nodes = ["loop7", "loop7p1", "loop7p17"]

    def attach(request: Request) -> None:
        for name in nodes:
            os.mknod(grant / name, 0o600 | stat.S_IFBLK, os.makedev(7, 7))
        request.reply({"devname": "loop7", "major": 7, "minor": 7, "partitions": nodes[1:]})

    text = (ROOT / "loopd/losetup.py").read_text().replace('DEV = "/dev"', f'DEV = "{dev}"')
    (tmp_path / "losetup").write_text(text)
    (tmp_path / "losetup").chmod(0o755)
    (tmp_path / "image").write_bytes(bytes(MIB))
    environment = {"LOOPD_SOCKET": str(socket_path), "LOOPD_DIRECTORY": str(grant)}
    with Peer(socket_path, attach):
        done = run(tmp_path / "losetup", "-P", "-f", "--show", tmp_path / "image", env=environment)
    assert done == Result(0, f"{dev}/loop7\n", "")
    assert sorted(path.name for path in dev.iterdir()) == sorted([*nodes, "loopd"])


def test_names_of_what_is_gone_are_removed(granted: Box) -> None:
    """A device that went by itself leaves its flat name until one of these programs runs."""
    device = granted.attach("image")
    assert granted("sh", "-c", f"{LOOP_CLR_FD} {device}").code == 0
    eventually(lambda: granted("test", "-e", f"/dev/loopd/{os.path.basename(device)}").code == 1, "the node is gone")
    assert granted.names() == {os.path.basename(device)}
    other = granted.attach("image")
    assert granted.names() == {os.path.basename(other)}


LOOP_CLR_FD = "python3 -c 'import fcntl, sys; fcntl.ioctl(open(sys.argv[1]), 0x4C01)'"


def test_a_node_that_the_runtime_made_is_the_flat_name(granted: Box) -> None:
    first = granted.attach("image")
    name = os.path.basename(first)
    major, minor = Path(f"/sys/block/{name}/dev").read_text().split(":")
    granted.dev(name).unlink()
    assert granted("mknod", first, "b", major, minor.strip()).code == 0
    assert granted.losetup("-n", "-O", "NAME").out == f"{first}\n"
    assert granted.losetup("-d", first).code == 0
    assert granted.names() == {name}  # the runtime's


def test_a_name_that_is_taken_is_left_alone(granted: Box) -> None:
    first = granted.attach("image")
    name = os.path.basename(first)
    assert granted.losetup("-d", first).code == 0
    # The next number is not known; so every name of the next few is taken.
    taken = [f"loop{int(name[4:]) + more}" for more in range(20)]
    for number in taken:
        granted.dev(number).write_text("mine")
    second = granted.attach("-P", "image")
    assert second == f"/dev/loopd/{os.path.basename(second)}"
    assert granted("test", "-b", second).code == 0
    assert granted.losetup("-d", second).code == 0
    assert {granted.dev(number).read_text() for number in taken} == {"mine"}


def test_the_nodes_in_its_own_dev_are_flat_already(plain: Box) -> None:
    device = plain.attach("-P", "image")
    name = os.path.basename(device)
    assert plain.names() == {name}
    add_partitions(name, 1)
    eventually(lambda: plain("test", "-b", f"{device}p1").code == 0, "the partition's node is there")


def test_devices_are_named_in_one_way(box: Box) -> None:
    names = box("bash", "-c", "losetup -f; losetup -f --show image; losetup -n -O NAME -j image").out.split()
    assert [re.sub(r"\d+", "N", name) for name in names] == ["/dev/loopN"] * 3


# Showing, beside the real one -------------------------------------------------------------------------------------


SHOW = "NAME AUTOCLEAR BACK-FILE BACK-INO BACK-MAJ:MIN MAJ:MIN OFFSET PARTSCAN RO SIZELIMIT DIO LOG-SEC".split()
NEWER = ["REF", "BACK-MAJ", "BACK-MIN", "MAJ", "MIN"]
"""Columns that came after util-linux 2.38."""


def commands(device: str, columns: list[str]) -> list[list[str]]:
    table = ["-O", ",".join(columns)]
    forms = [["-l"], ["-n", "-l"], ["--raw", "-l"], ["-J", "-l"], ["--json", *table], ["--raw", *table], table]
    forms += [["-O", column] for column in columns] + [["-n", "-O", column.lower()] for column in columns]
    forms += [["-l", "-O", "+maj:min,ro"], ["-J"], ["--raw"], []]
    found = [[*form, device] for form in forms]
    return found + [[*form, "-j", "image"] for form in (["-l"], ["-l", "-J"], [], ["-n", "-O", "RO,NAME"])]


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["-r", "-o", "512", "--sizelimit", "4096"],
        ["-P", "-b", "4096", "--direct-io=on"],
        ["-o", "1M", "--direct-io=off"],
    ],
    ids=" ".join,
)
def test_shows_what_the_real_one_shows(box: Box, real: str, version: tuple[int, ...], options: list[str]) -> None:
    device = box.attach(*options, "image")
    offers = run(real, "--help").out
    columns = SHOW + [column for column in NEWER if f" {column} " in offers]
    for command in commands(device, columns):
        theirs, ours = box(real, *command), box.losetup(*command)
        assert theirs.code == 0
        if packed(command):
            theirs = theirs._replace(out=compact(theirs.out))
        elif "-n" in command and version < (2, 42):
            # There columns are wider than what is in them, also where no headings are printed.
            theirs, ours = (result._replace(out=" ".join(result.out.split())) for result in (theirs, ours))
        assert ours == theirs, command


def test_output_all_has_the_columns_in_the_order_of_the_real_one(box: Box, real: str) -> None:
    device = box.attach("image")
    theirs = box(real, "--output-all", "--list", device).out.splitlines()[0].split()
    ours = box.losetup("--output-all", device).out.splitlines()[0].split()
    assert [column for column in ours if column in theirs] == theirs
    assert set(ours) - set(theirs) <= set(NEWER)


def packed(command: list[str]) -> bool:
    return bool({"-J", "--json", "--raw"}.intersection(command))


def compact(text: str) -> str:
    """Up to util-linux 2.40 device numbers are padded in JSON and raw, too."""
    return re.sub(r'(?<=") *(\d+:\d+) *(?=")|(?:\\x20)+(\d+:\d+)(?:\\x20)*', lambda found: found[1] or found[2], text)


def test_shows_names_that_are_no_plain_text(box: Box, real: str) -> None:
    name = 'a b\tc\nd\\x "é日本'
    (box.folder / name).write_bytes(bytes(4096))
    device = box.attach(name)
    for command in (["-l"], ["-J", "-l"], ["--raw", "-l"], ["-n", "-O", "BACK-FILE,NAME"]):
        assert box.losetup(*command, device) == box(real, *command, device), command


def test_shows_a_file_that_is_gone(box: Box, real: str) -> None:
    device = box.attach("image")
    (box.folder / "image").unlink()
    assert box.losetup(device) == box(real, device)
    assert "(deleted)" in box.losetup("-l", device).out


def test_associated_with_an_offset(box: Box, real: str) -> None:
    first, second = box.attach("image"), box.attach("-o", "1M", "image")
    (box.folder / "other").write_bytes(bytes(4096))
    box.attach("other")
    (box.folder / "link").symlink_to("image")
    for command in (["-j", "image"], ["-j", "link"], ["-j", "image", "-o", "1M"], ["-j", "image", "-o", "2M"]):
        assert sorted(box.losetup(*command).out.splitlines()) == sorted(box(real, *command).out.splitlines())
    assert box.losetup("-n", "-O", "NAME", "-j", "link").out.split() == [first, second]


def test_shows_nothing_as_the_real_one_does(plain: Box, real: str) -> None:
    for form in ([], ["-l"], ["-l", "-J"], ["-l", "--raw"], ["-n"]):
        assert plain.losetup(*form, "-j", "/nonexistent") == plain(real, *form, "-j", "/nonexistent")
    assert plain.losetup() == Result(0, "", "")
    assert plain.losetup("-a") == Result(0, "", "")


def test_all_shows_each(box: Box) -> None:
    devices = {box.attach("image"), box.attach("-o", "1M", "image")}
    assert {line.partition(":")[0] for line in box.losetup("-a").out.splitlines()} == devices
    assert set(box.losetup("-n", "-O", "NAME").out.split()) == devices
    assert {row["name"] for row in json.loads(box.losetup("-J").out)["loopdevices"]} == devices
    assert box.losetup("--output-all", "-n").out.count("\n") == 2
    assert box.losetup().out.splitlines()[0].split() == (
        "NAME SIZELIMIT OFFSET AUTOCLEAR RO BACK-FILE DIO LOG-SEC".split()
    )


def test_more_devices_than_one_reply_holds(plain: Box, tmp_path: Path) -> None:
    folder = plain.folder / ("x" * 200) / ("y" * 200) / ("z" * 200)
    folder.mkdir(parents=True)
    (folder / "image").write_bytes(bytes(512))
    for _ in range(70):
        plain.attach(folder / "image")
    assert len(plain.losetup("-n", "-O", "NAME").out.split()) == 70
    assert plain.losetup("-D").code == 0
    assert not bound_to(folder)


def test_a_device_without_a_node_is_lost(plain: Box) -> None:
    device = plain.attach("image")
    plain.dev(os.path.basename(device)).unlink()
    assert plain.losetup("-n", "-O", "NAME").out == f"{device} (lost)\n"
    assert plain.losetup("-d", device).code == 0
    assert not bound_to(plain.folder)


def test_a_node_by_another_name(plain: Box) -> None:
    device = plain.attach("image")
    (name,) = bound_to(plain.folder)
    major, minor = Path(f"/sys/block/{name}/dev").read_text().split(":")
    assert plain("mknod", "/dev/mine", "b", major, minor.strip()).code == 0
    assert plain.losetup("-n", "-O", "NAME", "/dev/mine").out == "/dev/mine\n"
    assert plain.losetup("-d", "mine").code == 0
    assert plain("test", "-e", device).code == 1


# The command line, beside the real one ----------------------------------------------------------------------------

# None of these gets as far as a device, so that the real one can be run on the host; in the box it finds none.
WRONG = """
-x|--foo|-o|--offset|--list=3|--find=x|--de|--det|--s|-o 5 -a|-r -a|-P -a|--show -a|--sizelimit 1 -l|-n|-f x y|-1|-P
-f -r|-O foo|-O NAME,foo|-O NAME,foo,RO|-O ,|-O NAME,|-O NAME,,RO|-O ,NAME|-O RO,,|-O=|-O +|-j|-b|--sizelimit|-Pr
-f -- x y|-b x -f y|-o 1x -f y|-o -5 -f y|-o 99999999999999999999 -f y|-o 1.5 -f y|-o 0x -f y|-o 09 -f y|-o 1KiBx -f y
-o 1KK -f y|-o K -f y|--sizelimit 16E -f y|--sizelimit= -f y|-o 5 -l|-o 5 -f|-o 0 -a|-o .5K -f y|-o 1,5K -f y
-o 5B -f y|-o 1R -f y|-f nofile|-f --show -r nofile|-f /|-f -f nofile|-o +5 -f nofile|-o ++5 -f y|-o 5KB5 -f y
-o 1Z -f y|--zzz=3|--li=1|-lx|-fx|--h=1|--direct-io -j x|--all --list=|-J --al= x|--off|--output|--output-a=x|--sizel
--sect=|-b= -f y
"""
# What was said otherwise before, since when, and what is said since.
SINCE = """
2.42|-J --raw|options --json and --raw cannot be combined
2.42|--raw -J -l|options --raw and --json cannot be combined
2.42|-a -d x|options --all and --detach cannot be combined
2.42|-f -D|options --find and --detach-all cannot be combined
2.42|-l -D|options --list and --detach-all cannot be combined
2.42|-f -a -d x|options --find and --all cannot be combined
2.42|-j x -a -f|options --associated and --all cannot be combined
2.42|-O NAME -f x|options --output and --find cannot be combined
2.42|-c x -J -O NAME|options --set-capacity and --output cannot be combined
2.42|--remove -f|options --remove and --find cannot be combined
2.42|-d x --remove|options --detach and --remove cannot be combined
2.42|--direct-io=foo -f y|unsupported argument: foo
2.42|--direct-io= x|unsupported argument:@
2.42|-d|no loop device specified
2.42|-n -c|no loop device specified
2.42|--remove|no loop device specified
2.42|--remove nonexistent|/dev/nonexistent: remove failed: No such file or directory
2.41|/dev/nonexistent|/dev/nonexistent: No such file or directory
2.41|nonexistent|/dev/nonexistent: No such file or directory
2.41|-|/dev/-: No such file or directory
2.41|-- -f|/dev/-f: No such file or directory
2.41|/dev/null|/dev/null: No such file or directory
2.41|-d /dev/nonexistent|/dev/nonexistent: detach failed: No such file or directory
2.41|-d /dev/null|/dev/null: detach failed: Inappropriate ioctl for device
2.41|-c nonexistent|/dev/nonexistent: set capacity failed: No such file or directory
2.41|-c /dev/null|/dev/null: set capacity failed: Inappropriate ioctl for device
2.41|--direct-io=off nonexistent|/dev/nonexistent: set direct io failed: No such file or directory
2.41|--direct-io /dev/null|/dev/null: set direct io failed: Inappropriate ioctl for device
2.41|-b 512 nonexistent|/dev/nonexistent: set logical block size failed: No such file or directory
2.41|-b 512 /dev/null|/dev/null: set logical block size failed: Inappropriate ioctl for device
"""


def said_by_both(box: Box, real: str, line: str) -> tuple[Result, Result]:
    theirs = run(real, *line.split(" "), cwd=box.folder, env=box.environment)
    # getopt(3) begins with argv[0], err(3) with its last component. Before 2.42 there was one option less.
    theirs = theirs._replace(err=theirs.err.replace(f"{real}:", "losetup:"))
    ours = box.losetup(*line.split(" "))
    if "ambiguous" in ours.err and "--remove" not in theirs.err:
        ours = ours._replace(err=ours.err.replace(" '--remove'", ""))
    return ours, theirs


@pytest.mark.parametrize("line", [line for row in WRONG.split("\n") for line in row.split("|") if line])
def test_says_what_the_real_one_says(plain: Box, real: str, line: str) -> None:
    ours, theirs = said_by_both(plain, real, line)
    # What a device is lost for is the real one's own affair, with a /dev that has none.
    theirs = theirs._replace(err=re.sub("losetup: device node .* is lost.*\n", "", theirs.err))
    assert ours == theirs
    assert ours.code == 1


@pytest.mark.parametrize("row", [row for row in SINCE.split("\n") if row])
def test_says_what_the_newest_says(plain: Box, real: str, version: tuple[int, ...], row: str) -> None:
    since, line, message = row.replace("@", " ").split("|")
    ours, theirs = said_by_both(plain, real, line)
    assert ours == Result(1, "", f"losetup: {message}\n")
    assert theirs.code == 1
    if version >= tuple(map(int, since.split("."))):
        assert theirs == ours


@pytest.mark.parametrize("form", [["-l"], ["-J", "-l"], ["--raw", "-l"], ["--output-all"], ["-J", "--output-all"]])
def test_a_list_of_what_is_not_attached(plain: Box, real: str, version: tuple[int, ...], form: list[str]) -> None:
    """A row with nothing in it, and no failure."""
    ours = plain.losetup(*form, "nonexistent")
    assert (ours.code, ours.err) == (0, "")
    assert "/dev/nonexistent" in ours.out
    if version >= (2, 41):
        assert ours == plain(real, *form, "nonexistent")


def test_sizes_are_read_as_the_real_one_reads_them(plain: Box, real: str) -> None:
    """What is too large for the file is refused by both, in words of their own; so an offset in it is looked for."""
    for text in ("512", "0x200", "01000", "1K", "1k", "1KiB", "1kb", "1KB", "1M", "1.5M", "0.5K", " 512", "2MB", "0"):
        result = plain.losetup("-f", "--show", "-o", text, "image")
        device = result.out.strip()
        assert result.code == 0, result.err
        assert plain(real, "-n", "-l", "-j", "image", "-o", text).out.split()[:1] == [device], text
        assert plain.losetup("-d", device).code == 0


def test_help_names_every_option_and_column(plain: Box, real: str) -> None:
    ours, theirs = plain.losetup("--help"), run(real, "--help")
    assert (ours.code, ours.err) == (0, "")
    word = re.compile(r"(?<![\w-])--?[a-zA-Z][a-z-]*")
    assert set(word.findall(theirs.out)) - {"-l", "-f"} <= set(word.findall(ours.out)) | {"--list"}
    for column in SHOW:
        assert f" {column} " in ours.out
    assert plain.losetup("-h") == ours


def test_the_version(plain: Box) -> None:
    result = plain.losetup("-V")
    assert result == Result(0, f"losetup from util-linux 2.42 (loopd {__version__})\n", "")
    assert plain.losetup("--vers", "--foo") == result


def test_standard_output_that_cannot_be_written(plain: Box) -> None:
    plain("mknod", "-m", "666", "/dev/full", "c", "1", "7")
    result = plain("sh", "-c", "losetup --version >/dev/full")
    assert result == Result(1, "", "losetup: write error: No space left on device\n")


def test_a_name_that_ends_with_a_newline(plain: Box, real: str) -> None:
    (plain.folder / "image").rename(plain.folder / "a\n")
    device = plain.attach("a\n")
    for form in ([], ["-l"], ["-l", "--raw"], ["-l", "-J"]):
        assert plain.losetup(*form, device) == plain(real, *form, device), form


def test_an_interrupt_leaves_no_device(plain: Box) -> None:
    path = str(plain.folder / "slow.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(path)
        listener.settimeout(20)
        with subprocess.Popen(
            [*plain.inside, str(plain.programs / "losetup"), "-f", "image"], stderr=subprocess.PIPE, text=True,
            env={**plain.environment, "LOOPD_SOCKET": path},
        ) as process:  # fmt: skip
            _, fds, _, _ = socket.recv_fds(listener, 8192, 8)
            # nsenter waits for the process that it made in the PID namespace.
            child = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
            os.kill(int(child), signal.SIGINT)
            assert process.communicate(timeout=20)[1] == ""
            assert process.returncode == 130
            with socket.socket(fileno=fds[-1]) as reply:
                assert reply.recv(1) == b""  # by which loopd knows, and takes the device away
            for fd in fds[:-1]:
                os.close(fd)


def test_what_is_dropped_is_sent_again(tmp_path: Path) -> None:
    sock = tmp_path / "loopd.sock"
    environment = {"PATH": os.environ["PATH"], "LOOPD_SOCKET": str(sock), "LOOPD_DIRECTORY": str(tmp_path)}
    with Peer(sock, *[lambda request: request.channel.close()] * 3, released) as peer:
        assert run(SOURCE, "--detach", "loop4096", env=environment) == Result(0, "", "")
        assert len({request.payload for request in peer.requests}) == 1


# As losetup's, beside it ------------------------------------------------------------------------------------------

SAME = {
    "what is written through the device is in the file": """
truncate -s 16M a.img; d=$($L -f --show a.img); printf hello | dd of=$d conv=notrunc status=none; head -c5 a.img
printf howdy | dd of=a.img conv=notrunc status=none; sync a.img; head -c5 $d; $L -d $d; echo $?; sha256sum a.img
""",
    "boot code by the device, and the table by the file": """
truncate -s 8M b.img; d=$($L -f --show b.img); head -c 440 /dev/zero | tr '\\0' x | dd of=$d conv=notrunc status=none
printf 'label-id: 7\n2048,4096\n' | sfdisk -q b.img; $L -d $d; echo $?; sha256sum b.img
""",
    "the file's name is the one that it has now": """
truncate -s 1M a.img; d=$($L -f --show a.img); show() { $L $d; $L -l -n -O BACK-FILE $d; $L -J -O BACK-FILE -j $1; }
mv a.img b.img; show b.img; $L -j a.img; truncate -s 1M a.img; $L -j a.img; rm b.img; show a.img; $L -d $d; echo $?
""",
    "detaching goes by the device": """
truncate -s 1M a.img; d=$($L -f --show a.img); mv a.img b.img; truncate -s 1M a.img
$L -d $PWD/a.img 2>/dev/null; echo $?; $L -j b.img; $L -d $d; echo $?; $L -j b.img; $L $d; echo $?
""",
    "read-only is what the kernel says": """
truncate -s 1M a.img; d=$($L -f --show a.img); ro() { $L -n -O RO $d | xargs; }; ro; blockdev --setro $d; ro
blockdev --setrw $d; ro; $L -d $d
""",
    "a device in use goes at its last close": """
truncate -s 16M a.img; mkfs.ext4 -q a.img; mkdir m; d=$($L -f --show a.img); /usr/bin/mount $d m; $L -d $d; echo $?
$L -n -O AUTOCLEAR,BACK-FILE $d | xargs; test -b $d; echo $?; echo text >m/file; umount m; sleep 0.3; $L -j a.img
e2fsck -fn a.img >/dev/null 2>&1; echo $?; debugfs -R 'cat file' a.img 2>/dev/null
""",
    "a device that is swap": """
truncate -s 16M a.img; chmod 600 a.img; mkswap a.img >/dev/null; d=$($L -f --show a.img); swapon $d || exit 9
$L -d $d; echo $?; test -b $d; echo $?; $L -n -O AUTOCLEAR -j a.img | xargs; swapoff $d; echo $?; sleep 0.3; $L -j a.img
""",
    "no overlap keeps what it finds": """
truncate -s 16M a.img; mkfs.ext4 -q a.img; mkdir m; $M a.img m; d=$($L -n -O NAME -j a.img)
clear() { $L -n -O AUTOCLEAR $d | xargs; }; clear; test "$($L -L -f --show a.img)" = $d; echo $?; clear; umount m
$L -j a.img; $L -d $d; echo $?
""",
    "several devices of a file": """
truncate -s 4M a.img; d=$($L -f --show a.img); e=$($L -f --show -o 1M a.img); $L -a 2>/dev/null | grep -c $PWD/a.img
$L -l -n -O OFFSET -j a.img | sort -n | xargs; $L -d $d; $L -d $e; echo $?; $L -j a.img
""",
}


@pytest.mark.parametrize("case", SAME)
def test_does_what_the_real_one_does(box: Box, case: str) -> None:
    theirs, ours = beside(box, SAME[case])
    assert theirs.out
    assert ours == theirs
    assert theirs.code != 9
    eventually(lambda: not bound_to(box.folder), "nothing is left")


# What cannot be written back --------------------------------------------------------------------------------------


def test_what_is_lost_is_told(box: Box) -> None:
    """The file system of a sparse image is full. The real one says nothing."""
    script = """
mkdir full; /usr/bin/mount -t tmpfs -o size=2M tmpfs full
truncate -s 16M full/disk.img; d=$($L -f --show full/disk.img)
dd if=/dev/zero of=$d bs=1M count=8 status=none; $L -d $d; echo $?; $L -j full/disk.img
"""
    theirs, ours = beside(box, script)
    assert theirs.out == "0\n"
    assert ours.out == "1\n"
    lost = "losetup: /dev/loopN: detached, but @/full/disk.img lacks what was written: "
    assert ours.err.startswith(theirs.err + lost)
    assert ours.err.count("\n") == theirs.err.count("\n") + 1


def test_the_reason_is_loopds(tmp_path: Path) -> None:
    sock = tmp_path / "loopd.sock"
    environment = {"PATH": os.environ["PATH"], "LOOPD_SOCKET": str(sock), "LOOPD_DIRECTORY": str(tmp_path)}

    def lost(request: Request) -> None:
        request.reply({"state": "released", "lost": "No space left on device"})

    with Peer(sock, lost):
        done = run(SOURCE, "--detach", "loop4096", env=environment)
    line = "/dev/loop4096: detached, but its file lacks what was written: No space left on device"
    assert done == Result(1, "", f"losetup.py: {line}\n")
