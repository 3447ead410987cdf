"""A node of Kubernetes for tests: loopd, a stand-in for the kubelet, the device plugin, and the containers of pods."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from support.daemon import ROOT, eventually
from support.kept import Kept

from loopd.protocol import wire

KIND = "loopd.alt/loop"
LOCALHOST = "localhost"


class StandIn:
    """The stand-in for a kubelet, by its standard input and output."""

    def __init__(self, folder: Path, authority: str = LOCALHOST) -> None:
        self._waiting: dict[int, Future[Any]] = {}
        self._number = 0
        self._lock = threading.Lock()
        command = [sys.executable, str(ROOT / "tests/support/kubelet.py"), str(folder), authority]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self.ask("state")  # it is there

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            found = json.loads(line)
            self._waiting.pop(found["number"]).set_result(found["answer"])

    def start(self, do: str, **values: Any) -> Future[Any]:
        """Have it do something; its answer comes later."""
        future: Future[Any] = Future()
        assert self.process.stdin is not None
        with self._lock:
            self._number += 1
            self._waiting[self._number] = future
            self.process.stdin.write(json.dumps({"number": self._number, "do": do, **values}) + "\n")
            self.process.stdin.flush()
        return future

    def ask(self, do: str, **values: Any) -> Any:
        return self.start(do, **values).result(60)

    def kill(self) -> None:
        """End it without a word; its sockets stay."""
        self.process.kill()
        self.process.wait()
        self._reader.join()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()


class Node:
    """One node. The plugin and the kubelet are started by the test."""

    def __init__(self, folder: Path, daemon: Kept, prefix: Path, grants: Path) -> None:
        self.folder = folder
        self.daemon = daemon
        self.prefix = prefix
        self.grants_at = grants
        self.nodes = folder / "nodes"
        self.cdi = folder / "cdi"
        self.log = folder / "plugin.log"
        self.kubelet: StandIn | None = None
        self.plugin: subprocess.Popen[bytes] | None = None

    def start_kubelet(self, authority: str = LOCALHOST) -> StandIn:
        self.kubelet = StandIn(self.folder, authority)
        return self.kubelet

    def start_plugin(self, *options: str, interval: float = 0.1, grace: float = 3600) -> None:
        command = [
            *(sys.executable, str(self.prefix / "sbin/loopd-device-plugin"), "--force"),
            *("--socket", self.daemon.path, "--admin-socket", self.daemon.path + ".admin"),
            *("--plugin-directory", str(self.folder / "device-plugins"), "--node-directory", str(self.nodes)),
            *("--pod-resources", str(self.folder / "pod-resources/kubelet.sock"), "--cdi-dir", str(self.cdi)),
            *("--interval", str(interval), "--grace", str(grace), *options),
        ]
        with self.log.open("ab") as log:
            self.plugin = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def stop_plugin(self, number: int = signal.SIGTERM) -> int:
        assert self.plugin is not None
        self.plugin.send_signal(number)
        status = self.plugin.wait(20)
        self.plugin = None
        return status

    def told(self) -> str:
        """What the plugin has said."""
        return self.log.read_text() if self.log.exists() else ""

    def listed(self, kind: str = KIND) -> dict[str, str]:
        """The devices that the kubelet was told of, with their health."""
        assert self.kubelet is not None
        found: dict[str, str] = self.kubelet.ask("state")["plugins"].get(kind, {}).get("devices", {})
        return found

    def ready(self, kind: str = KIND, health: str = "Healthy") -> dict[str, str]:
        """The same, once all of them are well."""

        def well() -> dict[str, str]:
            found = self.listed(kind)
            return found if set(found.values()) == {health} else {}

        found: dict[str, str] = eventually(well, f"the devices are {health}", 30)
        return found

    def allocate(self, *containers: str | list[str], kind: str = KIND) -> Any:
        """What the plugin answers for containers that get these ids; an error is a dictionary."""
        assert self.kubelet is not None
        ids = [[each] if isinstance(each, str) else each for each in containers]
        return self.kubelet.ask("allocate", resource=kind, containers=ids)

    def pods(self, *pods: list[str], kind: str = KIND) -> None:
        """Have the kubelet list these pods, each with the ids that it has."""
        assert self.kubelet is not None
        self.kubelet.ask("pods", pods=[[(kind, ident) for ident in pod] for pod in pods])

    def grants(self) -> dict[str, dict[str, Any]]:
        """The directory grants that there are, by the names of their folders."""
        found: dict[str, dict[str, Any]] = {}
        while True:
            reply = self.daemon.admin(wire.Directories(0, after=list(found)[-1] if found else ""))
            assert reply.code is None, reply.fields
            found.update((f"{row['uid']}-{row['name']}", row) for row in reply.fields["directories"])
            if not reply.fields["more"]:
                return found

    def left(self) -> set[str]:
        """What a grant leaves somewhere, but for what loopd itself tells."""
        return {path.name for folder in (self.nodes, self.cdi) if folder.exists() for path in folder.iterdir()}

    def close(self) -> None:
        if self.plugin is not None:
            assert self.stop_plugin() == 0, self.told()
        if self.kubelet is not None:
            self.kubelet.kill()
        for row in self.grants().values():
            for number in row["numbers"]:
                self.daemon.admin(wire.Detach(f"loop{number}", 0, force=True, wait=5))
            reply = self.daemon.admin(wire.Directory(row["name"], 0, remove=True, uid=row["uid"]))
            assert reply.code is None, reply.fields


class Container:
    """A container as the answer to Allocate has it, with an image of its own: what is in it is bubblewrap's."""

    def __init__(self, node: Node, answer: dict[str, Any], uid: int = 0) -> None:
        self.answer = answer
        self.work = node.folder / f"work-{len(list(node.folder.glob('work-*')))}"
        self.work.mkdir(mode=0o777)
        self.work.chmod(0o777)
        command = ["bwrap", "--unshare-pid", "--unshare-net", "--die-with-parent", "--clearenv", "--cap-drop", "ALL"]
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID", "--setenv", "PATH"]
        command += [f"{node.prefix}/bin:/usr/local/sbin:/usr/bin:/bin:/usr/sbin", "--ro-bind", "/usr", "/usr"]
        command += ["--symlink", "usr/bin", "/bin", "--symlink", "usr/lib", "/lib", "--symlink", "usr/lib64", "/lib64"]
        command += ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/run", "--tmpfs", "/tmp"]
        command += ["--bind", str(self.work), "/work", "--chdir", "/work"]
        for folder in (node.prefix, node.prefix / "bin", node.prefix / "lib"):  # else they are root's alone
            command += ["--perms", "0755", "--dir", str(folder)]
        for mount in answer["mounts"]:
            assert mount["read_only"]
            command += ["--dev-bind", mount["host_path"], mount["container_path"]]
        for name, value in answer["envs"].items():
            command += ["--setenv", name, value]
        if uid:
            command += ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
        self._command = command

    @property
    def numbers(self) -> list[int]:
        """The numbers of the devices that it may open."""
        return [int(device["container_path"].removeprefix("/dev/loop")) for device in self.answer["devices"]]

    def run(self, script: str) -> str:
        command = [*self._command, "sh", "-ec", script]
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    @contextlib.contextmanager
    def attached(self) -> Iterator[int]:
        """While it runs with a device attached; the number of it."""
        script = "truncate -s 8M disk.img; loopctl attach disk.img; exec cat"
        command = [*self._command, "sh", "-ec", script]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            device = process.stdout.readline().strip()
            assert device.startswith("/dev/loopd/loop"), device
            yield int(device.removeprefix("/dev/loopd/loop"))
        finally:
            process.communicate(timeout=20)
