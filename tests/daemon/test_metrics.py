"""What the daemon counts: that it is what happened, that it goes on over an exit, and that it reads as OpenMetrics."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import promql_parser
import pytest
import yaml
from prometheus_client import Metric
from prometheus_client import parser as older
from prometheus_client.openmetrics import parser as newer
from support.daemon import ROOT, eventually, exists, require
from support.install import install
from support.untouched import pair, send
from support.world import Served

from loopd.cli import verbs
from loopd.client import api as client
from loopd.daemon.numbers import Numbers
from loopd.loop import Loop, LoopControl
from loopd.protocol import wire
from loopd.protocol.wire import Code

ALERTS = ROOT / "docs/alerts.yml"
LINES = re.compile(r"^(\w+)\{([^}]*)\} (\S+)$", re.MULTILINE)


@pytest.fixture
def start_served(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    require(os.geteuid() == 0, "needs root: loop devices")
    with contextlib.ExitStack() as stack:

        def start(*options: str) -> Served:
            directory = tmp_path / "loopd"
            directory.mkdir(exist_ok=True)
            served = Served(directory, list(options), [], {})
            served.start()
            stack.callback(served.stop)
            return served

        yield start


@pytest.fixture
def served(start_served: Callable[..., Served]) -> Served:
    return start_served()


def start_again(daemon: Served) -> None:
    """As the service manager, whose sockets are there all the time."""
    for path in (daemon.path, daemon.admin):
        Path(path).unlink()
    daemon.start()


def text(daemon: Served) -> str:
    return client.Client(daemon.admin).metrics()


def parsed(exposition: str) -> list[Metric]:
    """By the parser of Prometheus's own client, which is strict."""
    return list(newer.text_string_to_metric_families(exposition))  # type: ignore[no-untyped-call]


def values(exposition: str) -> dict[str, float]:
    """The samples by name and labels, without that of the service."""
    found = {}
    for name, labels, value in LINES.findall(exposition):
        others = ",".join(pair for pair in labels.split(",") if not pair.startswith("service="))
        found[f"{name}{{{others}}}" if others else name] = float(value)
    return found


def counts(daemon: Served) -> dict[str, float]:
    """What is not 0, without times and what depends on speed."""
    found = values(text(daemon)).items()
    return {name: value for name, value in found if value and not re.search(r"_seconds|_created|build_info", name)}


def test_it_is_openmetrics_and_the_older_format_too(served: Served, image: int, directory: int) -> None:
    served.attach(image, directory)
    served.ask(wire.Detach("loop4095", 0), [])
    exposition = text(served)
    families = parsed(exposition)
    assert exposition.endswith("\n# EOF\n")
    for family in families:
        assert family.documentation, family.name
        assert family.name.startswith("loopd_")
        assert family.samples
        for sample in family.samples:
            assert sample.labels["service"] == "loopd"
            assert sample.timestamp is None
    (histogram,) = (family for family in families if family.type == "histogram")
    assert histogram.unit == "seconds"
    again = {s.name: s.value for f in older.text_string_to_metric_families(exposition) for s in f.samples}
    assert again == {s.name: s.value for f in families for s in f.samples}
    # All that there is to be told apart is there from the first scrape on: a rate needs a zero to begin with.
    (refusals,) = (family for family in families if family.name == "loopd_refusals")
    assert {s.labels["code"] for s in refusals.samples} == {code.value for code in Code}


def test_what_is_counted(served: Served, image: int, make_image: Callable[..., int], directory: int) -> None:
    before = time.time()
    assert counts(served) == {}
    first = served.attach(image, directory)
    served.attach(make_image(name="second"), directory)
    assert served.ask(wire.Detach("loop4095", 0), []).code == "not-found"
    assert served.ask(b"{", []).code == "malformed"
    assert served.ask(b"[]", []).code == "malformed"
    assert counts(served) == {
        'loopd_leases{state="bound"}': 2,
        "loopd_attaches_total": 2,
        'loopd_refusals_total{code="malformed"}': 2,
        'loopd_refusals_total{code="not-found"}': 1,
    }
    exposition = values(text(served))
    assert exposition["loopd_attach_duration_seconds_count"] == 2
    assert exposition['loopd_attach_duration_seconds_bucket{le="+Inf"}'] == 2
    buckets = [value for name, value in exposition.items() if "_bucket" in name]
    assert buckets == sorted(buckets)
    recorded = [int(record["LOOPD_DURATION_USEC"]) for record in served.records("attached")]
    assert abs(exposition["loopd_attach_duration_seconds_sum"] * 1e6 - sum(recorded)) < 10
    assert before - 60 < exposition["loopd_start_time_seconds"] < time.time()
    served.ask(wire.Detach(first.fields["devname"], 0, wait=5), [])
    assert counts(served)['loopd_leases{state="bound"}'] == 1


def test_a_device_that_is_detached_and_open(served: Served, image: int, directory: int, devices: Path) -> None:
    name = served.attach(image, directory).fields["devname"]
    with (devices / name).open("rb"):
        served.ask(wire.Detach(name, 0), [])
        assert counts(served)['loopd_leases{state="held"}'] == 1


def test_dropped_requests(start_served: Callable[..., Served], tmp_path: Path) -> None:
    """Those of an account that has as many under way as it may have: told to nobody but the journal and this."""
    configuration = tmp_path / "loopd.toml"
    configuration.write_text("limits.requests = 1\n")
    served = start_served("--config", str(configuration))
    reply = served.attach(os.open(_sparse(tmp_path), os.O_RDWR), None, deliver=("fd",))
    waiting = wire.encode_request(wire.Detach(reply.fields["devname"], 0, wait=60))
    ours, theirs = pair()
    with ours, theirs:
        send(served.path, waiting, [theirs.fileno()]).close()
        eventually(lambda: served.records("held"), "it waits")
        for _ in range(4):
            served.ask(waiting, [], reply=False)
        eventually(lambda: served.records("shed"), "some were dropped")
    reply.close()  # the last close of the device: nothing is under way any more

    def recorded() -> int:
        return sum(int(record["LOOPD_COUNT"]) for record in served.records("shed"))

    # What asks for it may itself be dropped, and is sent again.
    eventually(lambda: values(text(served)).get("loopd_dropped_requests_total") == recorded(), "counted")


def _sparse(folder: Path) -> Path:
    path = folder / "sparse"
    path.write_bytes(b"")
    os.truncate(path, 1 << 20)
    return path


def test_numbers_lost_to_somebody_else(
    served: Served, image: int, make_image: Callable[..., int], directory: int
) -> None:
    """The host binds what was made ahead of need: another is taken, and each that was lost is counted."""

    name = served.attach(image, directory).fields["devname"]
    first = int(name.removeprefix("loop")) + 1
    following = [f"loop{number}" for number in range(first, first + 64)]
    most = Numbers.AHEAD
    ahead = eventually(lambda: len(new := [*filter(exists, following)]) >= most and new, "numbers were made ahead")
    other = make_image(name="other")
    with contextlib.ExitStack() as stack:
        for devname in ahead:
            with contextlib.suppress(OSError):  # the daemon's probe, which comes and goes
                loop = Loop(int(devname.removeprefix("loop")))
                stack.callback(loop.close)
                loop.configure(other, autoclear=True)
        reply = served.attach(make_image(name="second"), directory)
        assert reply.code is None
        assert reply.fields["devname"] not in ahead
        assert Numbers.AHEAD - 1 <= counts(served)["loopd_number_retries_total"] <= len(ahead)
    with LoopControl() as control:  # what the host was faster with is the host's to remove
        for devname in ahead:
            with contextlib.suppress(OSError):
                control.remove(int(devname.removeprefix("loop")))


def test_a_helper_that_hangs(start_served: Callable[..., Served], tmp_path: Path, image: int, directory: int) -> None:
    """Stopped by a signal, as one that waits for a file system: written off, and another one serves."""
    configuration = tmp_path / "loopd.toml"
    configuration.write_text("request_timeout = 1\n")
    served = start_served("--config", str(configuration))
    served.hello()
    stopped = [pid for pid in served.family() if pid != served.pid]
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    try:
        assert served.ask(wire.Attach(0, 1, 2), [image, directory], timeout=20).code is None
        found = counts(served)
        assert found["loopd_stuck_requests_total"] == len(served.records("stuck")) >= 1
        assert found['loopd_refusals_total{code="timeout"}'] == found["loopd_stuck_requests_total"]
        assert "loopd_stuck_workers" not in found  # SIGKILL ends one that is only stopped
    finally:
        for pid in stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def listens(port: int) -> bool:
    with socket.socket() as client_socket:
        return client_socket.connect_ex(("127.0.0.1", port)) == 0


def test_node_exporter_reads_it(served: Served, image: int, directory: int, tmp_path: Path) -> None:
    """Debian's own: every family has its help and its type, and there is nothing besides."""
    program = shutil.which("prometheus-node-exporter")
    require(program, "needs prometheus-node-exporter")
    served.attach(image, directory)
    (tmp_path / "files").mkdir()
    (tmp_path / "files/loopd-admin.prom").write_text(verbs.prometheus(text(served)) + "\n")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = [str(program), f"--collector.textfile.directory={tmp_path}/files", "--collector.disable-defaults"]
    command += ["--collector.textfile", f"--web.listen-address=127.0.0.1:{port}"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE) as exporter:
        try:
            eventually(lambda: listens(port), "it listens", 30)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
                scraped = answer.read().decode()
        finally:
            exporter.terminate()
    families = {
        family.name: family for family in older.text_string_to_metric_families(scraped)
        if family.name.startswith("loopd_")
    }  # fmt: skip
    assert {family.type for family in families.values()} == {"gauge", "counter", "histogram"}
    assert not [name for name in families if name.endswith("_created")]
    assert not [family.name for family in families.values() if "Metric read from" in family.documentation]
    assert {(s.name, s.value) for s in families["loopd_attaches"].samples} == {("loopd_attaches_total", 1.0)}
    assert "node_textfile_scrape_error 0" in scraped


def test_only_the_administrator_is_told(served: Served) -> None:
    assert served.ask(wire.Metrics(0), []).code == "not-permitted"
    command = [sys.executable, "-m", "loopd.cli", "--socket", served.admin, "metrics"]
    printed = subprocess.check_output([*command, "--openmetrics"], cwd=ROOT, text=True)
    assert parsed(printed)
    assert printed.splitlines() == text(served).splitlines()
    printed = subprocess.check_output(command, cwd=ROOT, text=True)
    assert printed.splitlines() == verbs.prometheus(text(served)).splitlines()
    with pytest.raises(client.NotPermitted):
        client.Client(served.path).metrics()
    offered = [client.Client(path).hello().operations for path in (served.admin, served.path)]
    assert offered == [tuple(wire.OPERATIONS), tuple(name for name in wire.OPERATIONS if name != "metrics")]


# Over the end of the daemon -------------------------------------------------------------------------------------------


def one_of_each(served: Served, image: int, directory: int) -> dict[str, float]:
    name = served.attach(image, directory).fields["devname"]
    served.ask(b"{", [])
    served.ask(wire.Detach(name, 0, wait=5), [])
    return counts(served)


@pytest.mark.parametrize("end", ["idle", "SIGTERM"])
def test_counts_go_on_after_an_exit_in_good_order(
    start_served: Callable[..., Served], image: int, directory: int, end: str
) -> None:
    served = start_served(*(["--idle-timeout=2"] if end == "idle" else []))
    before = one_of_each(served, image, directory)
    created = values(text(served))["loopd_attaches_created"]
    if end == "idle":
        assert served.wait() == 0
    else:
        served.kill(signal.SIGTERM)
    saved = served.state / "metrics.loopd"
    assert saved.exists()
    start_again(served)
    after = values(text(served))
    assert {name: after[name] for name in before} == before
    assert after["loopd_attaches_created"] == created
    assert after["loopd_start_time_seconds"] > created
    assert not saved.exists()


def test_counts_start_anew_after_a_crash(served: Served, image: int, directory: int) -> None:
    one_of_each(served, image, directory)
    served.kill(signal.SIGTERM)
    start_again(served)
    created = values(text(served))["loopd_attaches_created"]
    served.kill(signal.SIGKILL)
    start_again(served)
    assert counts(served) == {}
    assert values(text(served))["loopd_attaches_created"] > created


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"attaches": [1], "bounds": []}', b"\xff", b"null"])
def test_saved_counts_that_make_no_sense(served: Served, content: bytes) -> None:
    served.state.mkdir()
    (served.state / "metrics.loopd").write_bytes(content)
    assert counts(served) == {}


def test_counts_of_an_instance_have_its_name(start_served: Callable[..., Served]) -> None:
    served = start_served(r"--instance=a\x2db")
    (family, *_) = parsed(text(served))
    assert family.samples[0].labels["service"] == r"loopd@a\x2db"
    served.kill(signal.SIGTERM)
    assert json.loads((served.state / r"metrics.loopd@a\x2db").read_text())["dropped"] == 0


# node_exporter --------------------------------------------------------------------------------------------------------


def command_of_the_unit(prefix: Path) -> list[str]:
    """The command of the installed unit, unquoted as systemd does it."""
    unit = (prefix / "lib/systemd/system/loopd-metrics.service").read_text().replace("\\\n", "")
    (line,) = re.findall(r"(?m)^ExecStart=(.*)", unit)
    return [word.replace("$$", "$").replace("%%", "%") for word in shlex.split(line)]


def test_the_unit_writes_a_file_for_each_socket(served: Served, tmp_path: Path) -> None:
    """Complete ones, for everybody to read; one that cannot be asked fails the unit, and no other."""
    prefix, run, files = tmp_path / "prefix", tmp_path / "run", tmp_path / "files"
    install("DESTDIR=/", f"PREFIX={prefix}")
    command = [word.replace("/run/", f"{run}/") for word in command_of_the_unit(prefix)]
    for name in ("loopd-admin", "loopd-team", "loopd-silent"):
        (run / name).mkdir(parents=True)
    for name in ("loopd-admin", "loopd-team"):
        (run / name / "admin.sock").symlink_to(served.admin)
    files.mkdir()
    (files / "loopd-gone.prom").touch()
    (files / "other.prom").touch()

    def write() -> int:
        environment = {"PATH": "/usr/bin:/bin", "TEXTFILES": str(files)}
        return subprocess.run(command, check=False, env=environment, umask=0o022, capture_output=True).returncode

    assert write() == 0
    assert sorted(os.listdir(files)) == ["loopd-admin.prom", "loopd-team.prom", "other.prom"]
    for name in ("loopd-admin", "loopd-team"):
        assert (files / f"{name}.prom").read_text().startswith("# HELP loopd_build_info ")
        assert stat.S_IMODE((files / f"{name}.prom").stat().st_mode) == 0o644
    files.rename(tmp_path / "no collector")
    assert write() == 0, "there is nobody to write for"
    (tmp_path / "no collector").rename(files)
    (files / "loopd-admin.prom").unlink()
    (files / "loopd-admin.prom").symlink_to(tmp_path)
    (files / "loopd-team.prom").unlink()
    (files / "loopd-team.prom").symlink_to(tmp_path / "victim")
    (tmp_path / "victim").write_text("another's")
    before = sorted(os.listdir(tmp_path))
    assert write() == 0
    assert sorted(os.listdir(files)) == ["loopd-admin.prom", "loopd-team.prom", "other.prom"]
    assert not any(path.is_symlink() for path in files.iterdir()), "links are replaced"
    assert (sorted(os.listdir(tmp_path)), (tmp_path / "victim").read_text()) == (before, "another's")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as closed:
        closed.bind(str(run / "loopd-silent/admin.sock"))
    (files / "loopd-team.prom").unlink()
    assert write() == 1
    assert (files / "loopd-team.prom").exists()
    assert not (files / "loopd-silent.prom").exists()


# The example alerts ---------------------------------------------------------------------------------------------------


def test_alerts_ask_for_metrics_that_there_are(served: Served) -> None:
    families = parsed(text(served))
    names = {sample.name for family in families for sample in family.samples}
    rules = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
    assert len(rules) >= 5
    for rule in rules:
        assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}
        asked = set(re.findall(r"\bloopd_\w+", rule["expr"]))
        assert asked <= names, rule["alert"]
        assert asked or "node_textfile_mtime_seconds" in rule["expr"]
        assert promql_parser.parse(rule["expr"]) is not None
        for code in re.findall(r'code=~?"([^"]+)"', rule["expr"]):
            assert set(code.split("|")) <= {each.value for each in Code}
