"""The man pages say all that the code has, and nothing that it does not: options, keys, codes, fields, events, and
environment variables.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree as ET

import pytest
from support.daemon import ROOT, Daemon

from loopd import __version__, losetup
from loopd.cli import loopctl as cli
from loopd.cli import table
from loopd.daemon import policy
from loopd.daemon.audit import Event
from loopd.daemon.process import STATE_DIRECTORY
from loopd.daemon.process import _options as options_of_loopd
from loopd.deviceplugin import metrics as device_plugin_metrics
from loopd.deviceplugin import options as device_plugin_options
from loopd.protocol import wire
from loopd.protocol.decode import decode
from loopd.worker import grants

MANUAL = ROOT / "docs/man"
PAGES = ("loopctl.1", "loopd.8", "loopd.toml.5", "loopd-protocol.7", "loopd-losetup.8", "loopd-device-plugin.8")
SYSTEM_PYTHON = "/usr/bin/python3"
SERVICE_MANAGER = {"LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PID", "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"}


class Entry(NamedTuple):
    """One item of a definition list: the whole term, the words of it in bold, and what is said of them."""

    term: str
    names: list[str]
    text: str


def _text(node: ET.Element) -> str:
    return " ".join("".join(node.itertext()).split())


class Page:
    """A page as docutils understands it, by the titles of its sections."""

    def __init__(self, name: str) -> None:
        command = [SYSTEM_PYTHON, "-m", "docutils", "--writer=xml", "--report=info", "--halt=info", f"{name}.rst"]
        done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=MANUAL)
        assert (done.returncode, done.stderr) == (0, "")
        self.document = ET.fromstring(done.stdout.partition("?>")[2].partition(">")[2])

    def section(self, *titles: str) -> ET.Element:
        node = self.document
        for title in titles:
            (node,) = (child for child in node.findall("section") if _text(child[0]) == title)
        return node

    def sections(self, title: str) -> list[str]:
        return [_text(child[0]) for child in self.section(title).findall("section")]

    def entries(self, *titles: str) -> list[Entry]:
        """The items of the section itself, not of those in it."""
        return [
            Entry(_text(item[0]), [_text(strong) for strong in item[0].iter("strong")], _text(item[1]))
            for listing in self.section(*titles).findall("definition_list")
            for item in listing
        ]

    def names(self, *titles: str) -> set[str]:
        return {name for entry in self.entries(*titles) for name in entry.names}


@pytest.fixture(scope="module")
def page() -> dict[str, Page]:
    return {name: Page(name) for name in PAGES}


def test_pages_are_complete_and_of_this_version(page: dict[str, Page]) -> None:
    assert {path.stem for path in MANUAL.iterdir()} == set(PAGES)
    for name, content in page.items():
        title, _, section = name.rpartition(".")
        assert _text(content.document[0]) == title
        assert content.document.findtext("docinfo/version") == f"loopd {__version__}"
        assert _text(content.document.findall("docinfo/field/field_body")[0]) == section
        assert {"SYNOPSIS" if section != "7" else "DESCRIPTION", "EXAMPLES", "SEE ALSO"} <= {
            _text(child[0]) for child in content.document.findall("section")
        }


def test_pages_refer_to_pages_that_there_are(page: dict[str, Page]) -> None:
    for content in page.values():
        for name, section in re.findall(r"\b(loop(?:d|ctl)[a-z.-]*)\((\d)\)", _text(content.document)):
            assert f"{name}.{section}" in PAGES


# Command lines ----------------------------------------------------------------------------------------------------


def options(parser: argparse.ArgumentParser) -> set[str]:
    return {option for action in parser._actions for option in action.option_strings}


def test_loopctl(page: dict[str, Page]) -> None:
    manual = page["loopctl.1"]
    assert manual.sections("VERBS") == list(cli.VERBS)
    assert manual.names("OPTIONS") == options(cli.parser())
    common = options(cli.parser()) - {"--version"}
    for verb in cli.VERBS:
        said = {name for name in manual.names("VERBS", verb) if name.startswith("-")}
        if verb == "run":
            assert not said
            assert options(cli.verb_parser(verb)) == options(cli.verb_parser("attach")) - {"--lifetime", "--json"}
        else:
            assert said | common == options(cli.verb_parser(verb)), verb


def test_loopctl_values(page: dict[str, Page]) -> None:
    """Choices and defaults of the options of loopctl."""
    manual = page["loopctl.1"]
    for verb in ("attach", "detach"):
        said = {name: entry.term + entry.text for entry in manual.entries("VERBS", verb) for name in entry.names}
        common = options(cli.parser())
        for action in cli.verb_parser(verb)._actions:
            if not action.option_strings or common.issuperset(action.option_strings):
                continue
            text = said[action.option_strings[-1]]
            assert all(re.search(rf"\b{value}\b", text) for value in action.choices or ()), text
            if type(action.default) in (int, float):
                assert re.search(rf"\b{action.default:g}\b", text), text


def test_examples_of_loopctl(page: dict[str, Page], daemon: Daemon, devices: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/loopctl").symlink_to(ROOT / ".venv/bin/loopctl")
    path = f"{tmp_path}/bin:{os.environ['PATH']}:/usr/sbin:/sbin"
    environment = {**os.environ, "LOOPD_SOCKET": daemon.path, "LOOPD_DIRECTORY": str(devices), "PATH": path}
    script = "\n".join(block.text or "" for block in page["loopctl.1"].section("EXAMPLES").findall("literal_block"))
    done = subprocess.run(
        ["sh", "-exc", script], check=False, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=60
    )
    assert done.returncode == 0, done.stderr
    shown, listed = done.stdout.split("}\n")
    assert {"size": 16 << 20, "read_only": True}.items() <= json.loads(shown + "}").items()
    assert listed.split()[: len(table.COLUMNS)][0] == "NAME"
    assert len(daemon.records("detached")) == 3
    assert list(devices.iterdir()) == []


def test_columns_of_list(page: dict[str, Page]) -> None:
    entries = [entry for entry in page["loopctl.1"].entries("VERBS", "list") if not entry.term.startswith("-")]
    assert [entry.term for entry in entries] == list(table.COLUMNS)
    (said,) = (entry.text for entry in page["loopctl.1"].entries("VERBS", "list") if "--output" in entry.names)
    for columns in (table.OWN, table.EVERYBODYS):
        assert f"has {', '.join(columns[:-1])} and {columns[-1]}" in said
    assert f"longer than {table.WIDEST} characters" in said


def test_exit_codes_of_loopctl(page: dict[str, Page]) -> None:
    said = page["loopctl.1"].names("EXIT STATUS")
    assert said == set(re.findall(r"(\d+), (?:done|refused|a wrong|interrupted)", cli.__doc__ or ""))


def test_loopd(page: dict[str, Page], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        options_of_loopd(["--help"])
    known = set(re.findall(r"(?m)^  (-\w|--[a-z-]+)|(?<=, )(--[a-z-]+)", capsys.readouterr().out))
    assert page["loopd.8"].names("OPTIONS") == {short or long for short, long in known}


def test_device_plugin(page: dict[str, Page]) -> None:
    manual = page["loopd-device-plugin.8"]
    parser = device_plugin_options.parser()
    assert manual.names("OPTIONS") >= options(parser)
    said = {name: entry for entry in manual.entries("OPTIONS") for name in entry.names}
    for action in parser._actions:
        if type(action.default) in (int, float, str) and action.default != argparse.SUPPRESS:
            text = said[action.option_strings[-1]].text
            default = action.default if type(action.default) is str else f"{action.default:g}"
            assert f"Default {default}." in text, text
    assert f"1 to {device_plugin_options.MOST}." in said["--count"].text
    assert f"at most {device_plugin_options.LONGEST} characters" in said["--resource"].text
    settings = {f"{name}=" for name in device_plugin_options.VALUES} | set(device_plugin_options.FLAGS)
    items = manual.section("OPTIONS").iter("definition_list_item")
    entry = next(item for item in items if "--resource" in _text(item[0]))
    assert {_text(strong) for strong in entry[1].iter("strong")} == settings
    assert manual.names("METRICS") == {name for name, _, _ in device_plugin_metrics.METRICS.values()}


def test_example_of_the_device_plugin(page: dict[str, Page]) -> None:
    (block,) = page["loopd-device-plugin.8"].section("EXAMPLES").findall("literal_block")
    (value,) = re.findall(r"^OPTIONS=(.*)$", block.text or "", re.MULTILINE)
    roots, others = device_plugin_options.parse(value.split()).resources
    assert (roots.name, roots.capacity, roots.devices, roots.uid) == ("loopd.alt/loop", 16, 8, 0)
    assert (others.name, others.capacity, others.devices, others.uid) == ("loopd.alt/team", 8, 1, 1000)
    assert (others.socket, others.admin_socket) == ("/run/loopd-team/sock/loopd.sock", "/run/loopd-team/admin.sock")


def test_losetup(page: dict[str, Page]) -> None:
    manual = page["loopd-losetup.8"]
    short = {f"-{key}" for key in losetup.LONG.values() if len(key) == 1}
    assert manual.names("OPTIONS") == short | {f"--{name}" for name in losetup.LONG}
    assert manual.names("COLUMNS") == set(losetup.COLUMNS)


# The configuration ------------------------------------------------------------------------------------------------


def test_configuration(page: dict[str, Page]) -> None:
    manual = page["loopd.toml.5"]
    for titles, keys, defaults in (
        ("KEYS", policy.KEYS, policy.Policy()),
        ("THE TABLE limits", policy.LIMIT_KEYS, policy.Limits()),
        ("THE TABLE allow", policy.ALLOW_KEYS, policy.Allow()),
    ):
        said = tomllib.loads("\n".join(entry.term for entry in manual.entries(titles)))
        assert said.keys() == keys.keys()
        for key, value in said.items():
            assert keys[key](value) == getattr(defaults, key), key


def test_rules(page: dict[str, Page], tmp_path: Path) -> None:
    text = "\n".join(entry.term for entry in page["loopd.toml.5"].entries("RULES"))
    rule = tomllib.loads(text)
    assert rule.keys() == policy.RULE_KEYS.keys() | {"limits", "allow"}
    (tmp_path / "loopd.toml").write_text(f"[[rule]]\n{text}\n")
    assert len(policy.load(str(tmp_path / "loopd.toml")).rules) == 1


def test_example_of_a_configuration(page: dict[str, Page], tmp_path: Path) -> None:
    (block,) = page["loopd.toml.5"].section("EXAMPLES").findall("literal_block")
    (tmp_path / "loopd.toml").write_text(block.text or "")
    loaded = policy.load(str(tmp_path / "loopd.toml"))
    assert loaded.terms("ci-1", "/a", 0, 0).limits.devices == 64
    assert loaded.terms("", "/a", 0, 0).limits.devices == 8


# The wire ---------------------------------------------------------------------------------------------------------

REPLIES: dict[str, Any] = {
    "attach": wire.Attached,
    "detach": wire.Detached,
    "list": wire.LeaseList,
    "directory": wire.Granted,
    "directories": wire.GrantList,
    "rescan": wire.Rescanned,
    "resize": wire.Resized,
    "hello": wire.Greeting,
    "metrics": wire.Measured,
}


def test_operations(page: dict[str, Page]) -> None:
    titles = [title for title in page["loopd-protocol.7"].sections("OPERATIONS") if " " not in title]
    assert titles == list(wire.OPERATIONS) == list(REPLIES)


@pytest.mark.parametrize("name", wire.OPERATIONS)
def test_request(page: dict[str, Page], name: str) -> None:
    """Each field, whether it is required, and its default."""
    manual, kind = page["loopd-protocol.7"], wire.OPERATIONS[name]
    entries = [*manual.entries("OPERATIONS", "Every request")[1:], *manual.entries("OPERATIONS", name)]
    said = {entry.names[0]: entry.term for entry in entries}
    assert said.keys() == set(kind._fields)
    for field, term in said.items():
        assert ("required" in term) == (field not in kind._field_defaults), term
        default = kind._field_defaults.get(field)
        assert term.partition(", default ")[2] == ("" if default is None else json.dumps(default)), term


@pytest.mark.parametrize("name", REPLIES)
def test_reply(page: dict[str, Page], name: str) -> None:
    assert page["loopd-protocol.7"].names("OPERATIONS", f"Reply to {name}") == set(REPLIES[name]._fields)


def test_row_of_directories(page: dict[str, Page]) -> None:
    assert page["loopd-protocol.7"].names("OPERATIONS", "A row of directories") == set(wire.GrantInfo._fields)


def test_row_of_leases(page: dict[str, Page]) -> None:
    assert page["loopd-protocol.7"].names("OPERATIONS", "A row of leases") == set(wire.LeaseInfo._fields)


def test_operation_field(page: dict[str, Page]) -> None:
    entry = page["loopd-protocol.7"].entries("OPERATIONS", "Every request")[0]
    envelope, request = decode(b'{"fd": 0, "dir_fd": 1}')
    assert isinstance(request, wire.Attach)
    assert entry.term == f'op: string, default "{envelope.op}"'


def test_codes(page: dict[str, Page]) -> None:
    assert [entry.names for entry in page["loopd-protocol.7"].entries("CODES")] == [[code.value] for code in wire.Code]


@pytest.mark.parametrize(
    "sentence",
    [
        f"a JSON object in UTF-8 of at most {wire.MAX_REQUEST} bytes",
        f"with at most {wire.MAX_FDS} file descriptors",
        f"of at most {wire.MAX_REPLY} bytes",
        f"This is version {wire.VERSION} of the protocol",
        f"At most {wire.MAX_ID} printable characters",
        f"At most {wire.MAX_REF} bytes",
        f"it owns, 1 to {wire.MAX_DEVICES}. Without it as many as it has, and {wire.DEVICES} where it is made",
        f'may take to say "released"; at most {wire.MAX_WAIT}',
        f"{', '.join(map(str, wire.SECTOR_SIZES[:-1]))} or {wire.SECTOR_SIZES[-1]}",
    ],
)
def test_limits(page: dict[str, Page], sentence: str) -> None:
    assert sentence in _text(page["loopd-protocol.7"].document)


def test_example_of_the_protocol(page: dict[str, Page]) -> None:
    request, reply, refusal = (
        part
        for block in page["loopd-protocol.7"].section("EXAMPLES").findall("literal_block")
        for part in (block.text or "").split("\n\n")
    )
    assert isinstance(decode(request.encode())[1], wire.Attach)
    assert wire.decode_reply(reply.encode()).keys() == set(wire.Attached._fields)
    with pytest.raises(wire.Refusal) as refused:
        wire.decode_reply(refusal.encode())
    assert refused.value.code is wire.Code.NOT_FOUND


# The journal and the environment ----------------------------------------------------------------------------------


def test_events(page: dict[str, Page]) -> None:
    catalog = (ROOT / "systemd/loopd.catalog").read_text()
    subjects = dict(re.findall(r"(?m)^-- ([0-9a-f]{32})\nSubject: (.*)$", catalog))
    said = {entry.term: entry.text.rstrip(".") for entry in page["loopd.8"].entries("JOURNAL", "Events")}
    assert said == {
        f"{event.name.lower()} {event.value.message_id}": subjects[event.value.message_id] for event in Event
    }


def recorded() -> set[str]:
    """The fields that the daemon's calls of `Audit.record` give, and those that it adds to each."""
    found = {"LOOPD_EVENT", "LOOPD_INSTANCE"}
    for path in (ROOT / "loopd").rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
                continue
            if call.func.attr in ("record", "_record"):
                found |= {f"LOOPD_{keyword.arg.upper()}" for keyword in call.keywords if keyword.arg}
    return found


def test_journal_fields(page: dict[str, Page]) -> None:
    assert page["loopd.8"].names("JOURNAL", "Fields") == recorded()


def variables(*places: str) -> set[str]:
    """The environment variables that the modules of these files and folders name."""
    found: set[str] = set()
    for place in places:
        alone = ROOT / f"loopd/{place}.py"
        for path in [alone] if alone.exists() else (ROOT / "loopd" / place).glob("*.py"):
            text = path.read_text()
            found |= set(re.findall(r"environ(?:\.get\(|\.pop\(|\[)\"(\w+)\"", text))
            found |= set(re.findall(r"\"(LOOPD_\w+)\"", text))
            found |= set(re.findall(r"\bvariable\(\"(\w+)\"", text))
    if "daemon" in places:  # what `systemd.daemon` reads for it: sd_listen_fds(3)
        found |= {"LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PID"}
    return found - {"LOOPD_EVENT", "LOOPD_INSTANCE"}


ALONE = ("losetup", "mountloop", "kpartx", "dmsetup", "partx")


def test_environment(page: dict[str, Page]) -> None:
    clients = {"cli", "client"}
    others = {path.parent.name for path in (ROOT / "loopd").glob("*/__init__.py")} - clients
    assert page["loopctl.1"].names("ENVIRONMENT") == variables(*clients)
    assert page["loopd.8"].names("ENVIRONMENT") == variables(*others)
    assert variables(*others) >= SERVICE_MANAGER
    assert page["loopd-losetup.8"].names("ENVIRONMENT") == variables(*ALONE)


def test_files_of_the_daemon(page: dict[str, Page]) -> None:
    said = " ".join(entry.term for entry in page["loopd.8"].entries("FILES"))
    units = " ".join(path.read_text() for path in (ROOT / "systemd").iterdir() if path.is_file())
    for path in re.findall(r"(?m)^ListenDatagram=(.*)$", units):
        assert path.replace("%i", "NAME") in said
    for path in (policy.CONFIGURATION, STATE_DIRECTORY, grants.ROOT):
        assert path in said
