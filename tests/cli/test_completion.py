"""Completion in bash, tried in a real one, and in zsh and fish, held against the options of loopctl."""

from __future__ import annotations

import argparse
import os
import pty
import re
import select
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.daemon import ROOT, Daemon, Reply

from loopd.cli import loopctl as cli
from loopd.cli.table import COLUMNS

FOLDER = ROOT / "systemd/completion"
LOOPCTL = ROOT / ".venv/bin/loopctl"
# compopt works in a completion that is under way, and there is none: the keys below have it.
CALL = """
source "$1"; shift
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
compopt() { :; }
_loopctl
printf '%s\\n' "${COMPREPLY[@]}"
"""


def options(parser: argparse.ArgumentParser) -> set[str]:
    return {option for action in parser._actions for option in action.option_strings}


def choices(verb: str) -> dict[str, list[str]]:
    """The options of a verb that take one of a few words, by every name."""
    found = {}
    for action in cli.verb_parser(verb)._actions:
        words = [str(word) for word in action.choices or ()]
        if action.dest == "lifetime":
            words = [word for word in (action.metavar or "").split("|") if word.islower()]  # type: ignore[union-attr]
        if words:
            found.update(dict.fromkeys(action.option_strings, words))
    return found


def bash(*words: str, environment: dict[str, str] | None = None, cwd: Path = ROOT) -> list[str]:
    """What bash would offer for the last of the words of a command line, called as bash calls it."""
    command = ["bash", "--norc", "-c", CALL, "bash", str(FOLDER / "loopctl.bash"), "loopctl", *words]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=cwd, env={**os.environ, **(environment or {})}
    )
    assert (done.returncode, done.stderr) == (0, "")
    return sorted(done.stdout.split())


def test_bash_verbs() -> None:
    top = {"--version", *options(cli.parser())} - {"-h"}
    assert set(bash("")) == top | set(cli.VERBS)
    assert bash("res") == ["rescan", "resize"]
    assert bash("--socket", "/run/x", "--admin", "--timeout", "5", "de") == ["detach"]


@pytest.mark.parametrize("verb", cli.VERBS)
def test_bash_options(verb: str) -> None:
    assert set(bash(verb, "-")) == options(cli.verb_parser(verb)) - {"-h"}
    assert set(bash("--admin", verb, "-")) == options(cli.verb_parser(verb)) - {"-h"}


@pytest.mark.parametrize("verb", ["attach", "run"])
def test_bash_values(verb: str) -> None:
    assert choices(verb).keys() >= {"--deliver", "--direct-io", "-b", "--sector-size"}
    for option, words in choices(verb).items():
        assert bash(verb, option, "") == sorted(words)
        assert bash(verb, option, words[-1]) == [words[-1]]
        if option.startswith("--"):
            assert bash(verb, option, "=", "") == bash(verb, option, "=") == sorted(words)
    for option in ("--offset", "--ref", "--timeout"):
        assert bash(verb, option, "") == []


def test_bash_columns() -> None:
    names = ["all", *COLUMNS]
    for option in ("-o", "--output"):
        assert bash("list", option, "") == sorted(names)
        assert bash("list", option, "S") == ["SECTOR", "SIZE", "SIZELIMIT", "STATE"]
        assert bash("list", option, "NAME,RE") == ["NAME,REF"]
    assert bash("attach", "-o", "") == []
    for shell in ("zsh", "fish"):
        assert f" {' '.join(names)}\n" in (FOLDER / f"loopctl.{shell}").read_text()


def test_bash_behind_the_image() -> None:
    assert "--lock" in bash("run", "disk.img", "--l")
    assert "mkdir" in bash("run", "disk.img", "--", "mkdi")
    assert bash("run", "disk.img", "--", "mkdir", "-") == []


def test_bash_directories(tmp_path: Path) -> None:
    (tmp_path / "nodes").mkdir()
    (tmp_path / "note").touch()
    assert bash("attach", "-d", "no", cwd=tmp_path) == ["nodes"]


def test_bash_devices(daemon: Daemon, image: int, directory: int) -> None:
    """The devices that one has are offered where one is asked for."""
    replies: list[Reply] = [daemon.attach(image, directory) for _ in range(2)]
    names = sorted(reply.fields["devname"] for reply in replies)
    environment = {"LOOPD_SOCKET": daemon.path, "PATH": f"{LOOPCTL.parent}:{os.environ['PATH']}"}
    for verb in ("detach", "rescan", "resize"):
        assert bash(verb, "", environment=environment) == names
        assert bash(verb, names[0], environment=environment) == names[:1]


def typed(keys: str, until: str, tmp_path: Path) -> str:
    """What an interactive bash shows when these keys are pressed."""
    main, replica = pty.openpty()
    environment = {
        "PATH": os.environ["PATH"],
        "TERM": "dumb",
        "PS1": "$ ",
        "INPUTRC": "/dev/null",
        "HOME": str(tmp_path),
    }
    shell = subprocess.Popen(
        ["bash", "--norc", "--noprofile", "-i"], stdin=replica, stdout=replica, stderr=replica,
        cwd=tmp_path, env=environment, start_new_session=True,
    )  # fmt: skip
    os.close(replica)
    shown = ""
    try:
        os.write(main, f"source {FOLDER}/loopctl.bash\n{keys}".encode())
        deadline = time.monotonic() + 20
        while until not in shown.replace("\r", "").replace("\x07", "") and time.monotonic() < deadline:
            if select.select([main], [], [], 0.5)[0]:
                shown += os.read(main, 4096).decode(errors="replace")
    finally:
        shell.kill()
        shell.wait()
        os.close(main)
    return shown.replace("\r", "").replace("\x07", "")


@pytest.mark.parametrize(
    ("keys", "shown"),
    [
        ("loopctl att\t", "loopctl attach "),
        ("loopctl attach --sec\t", "loopctl attach --sector-size "),
        ("loopctl attach --deliver mo\t", "loopctl attach --deliver mount "),
        ("loopctl attach disk.i\t", "loopctl attach disk.img "),
        ("loopctl run --directory no\t", "loopctl run --directory nodes/"),
        ("loopctl run disk.img -- setpri\t", "loopctl run disk.img -- setpriv "),
        ("loopctl list -o NAME,BACK\t", "loopctl list -o NAME,BACK-FILE"),
        ("loopctl detach disk.i\t", "loopctl detach disk.img "),
    ],
)
def test_keys_in_a_real_bash(keys: str, shown: str, tmp_path: Path) -> None:
    (tmp_path / "disk.img").touch()
    (tmp_path / "nodes").mkdir()
    assert shown in typed(keys, shown, tmp_path)


# zsh and fish -----------------------------------------------------------------------------------------------------


def zsh() -> dict[str, tuple[set[str], dict[str, list[str]]]]:
    """The options of each verb and the words that they take, as the file has them."""
    text = (FOLDER / "loopctl.zsh").read_text()
    lists = dict(re.findall(r"(?ms)^    (\w+)=\(\n(.*?)^    \)", text))
    assert re.findall(r"(?m)^        '(\w+):", lists["verbs"]) == list(cli.VERBS)
    found = {}
    for verbs, arm in re.findall(r"(?ms)^                ([a-z|]+)\)(.*?) ;;$", text):
        whole = arm + lists["common"] + (lists["image"] if "$image" in arm else "")
        specs = re.findall(
            r"'?(?:\([-\w ]*\)')?\{?((?:-\w,)?-?-[a-z-]+)\}?'?\[[^]]*\](?::[\w ]+:(?:\(([\w ]+)\))?)?", whole
        )
        names = {name for group, _ in specs for name in group.split(",")}
        words = {name: values.split() for group, values in specs if values for name in group.split(",")}
        for verb in verbs.split("|"):
            found[verb] = (names, words)
    return found


def fish() -> dict[str, tuple[set[str], dict[str, list[str]]]]:
    found: dict[str, tuple[set[str], dict[str, list[str]]]] = {verb: (set(), {}) for verb in cli.VERBS}
    text = (FOLDER / "loopctl.fish").read_text()
    assert re.findall(r"not __fish_seen_subcommand_from \$verbs\" -a (\w+)", text) == list(cli.VERBS)
    image = ""
    for line in text.splitlines():
        image = line.removeprefix("for verb in ") if line.startswith("for ") else "" if line == "end" else image
        names = {f"-{name}" for name in re.findall(r" -s (\w)", line)} | {
            f"--{name}" for name in re.findall(r" -l ([a-z-]+)", line)
        }
        condition = re.search(r"-n ['\"]__fish_seen_subcommand_from ([^'\"]+)['\"]", line)
        if not line.strip().startswith("complete") or "not __fish" in line or not names:
            continue
        verbs = (condition[1].replace("$verb", image) if condition else " ".join(cli.VERBS)).split()
        values = re.search(r" -x -a '([\w ]+)'", line)
        for verb in verbs:
            found[verb][0].update(names)
            found[verb][1].update({name: values[1].split() for name in names if values})
    return found


@pytest.mark.parametrize("read", [zsh, fish])
def test_other_shells(read: Callable[[], dict[str, tuple[set[str], dict[str, list[str]]]]]) -> None:
    found = read()
    assert found.keys() == cli.VERBS.keys()
    for verb, (names, words) in found.items():
        assert names == options(cli.verb_parser(verb)), verb
        assert words == choices(verb), verb


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_syntax(shell: str) -> None:
    """The shells that are here take the files; bash always is."""
    program = shutil.which(shell)
    assert program or shell != "bash"
    if program:
        done = subprocess.run([program, "-n", FOLDER / f"loopctl.{shell}"], check=False, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
