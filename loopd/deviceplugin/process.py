"""The program: looks at the kubelet each second, at loopd and the pods each interval, and ends at SIGTERM.

Changes when there is another thing to look at.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Sequence

import grpc

from loopd.cli.output import Failure, clean
from loopd.client import api as client
from loopd.deviceplugin import kubelet, options
from loopd.deviceplugin.grants import Grants, Places
from loopd.deviceplugin.kubelet import Endpoint
from loopd.deviceplugin.metrics import Figures, write
from loopd.deviceplugin.service import Service

SECOND = 1.0


def say(text: str) -> None:
    """One line to the journal."""
    print(f"loopd-device-plugin: {clean(text)}", file=sys.stderr, flush=True)


class Sayings:
    """Says what goes wrong once, and not each second."""

    def __init__(self) -> None:
        self._said: dict[str, str] = {}

    def of(self, subject: str, text: str | None) -> None:
        """What there is to say about it now, None where it works."""
        if text is None:
            self._said.pop(subject, None)
        elif self._said.get(subject) != text:
            self._said[subject] = text
            say(f"{subject}: {text}")


class Plugin:
    """One resource."""

    def __init__(self, resource: options.Resource, chosen: options.Options, sayings: Sayings) -> None:
        self._resource = resource
        self._sayings = sayings
        self._grants = Grants(resource, Places(chosen.nodes, chosen.cdi_dir), chosen.grace)
        self._service = Service(self._grants, say)
        self._left = 0
        self.endpoint = Endpoint(self._service, chosen.plugins)

    def register(self) -> None:
        """Where the kubelet is another than before."""
        told: str | None = None
        try:
            if self.endpoint.keep():
                say(f"{self._resource.name}: registered with the kubelet")
        except grpc.RpcError as error:
            told = kubelet.reason(error)
        except (OSError, RuntimeError) as error:
            told = str(error)
        self._sayings.of(f"{self._resource.name}: registering", told)

    def look(self, used: frozenset[tuple[str, str]] | None) -> Figures:
        """Whether loopd answers, and which grants have to go."""
        healthy = self._grants.front.answers()
        if healthy != self._service.healthy:
            say(f"{self._resource.name}: loopd {'answers' if healthy else 'does not answer'}")
        self._service.tell(healthy)
        if healthy:
            own = None if used is None else frozenset(ident for name, ident in used if name == self._resource.name)
            told: str | None = None
            try:
                self._left = self._grants.sweep(own)
            except (client.Error, Failure, OSError) as error:
                told = str(error)
            self._sayings.of(f"{self._resource.name}: tidying up", told)
        service = self._service
        return Figures(
            self._resource.name, self._resource.capacity, self._left, healthy, service.allocations, service.failures
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until SIGTERM or SIGINT; the exit status."""
    chosen = options.parse(arguments)
    os.umask(0o077)
    ending = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ending.set())
    try:
        os.makedirs(chosen.nodes, mode=0o700, exist_ok=True)
    except OSError as error:
        say(f"{error.filename}: {error.strerror}")
        return 1
    sayings = Sayings()
    plugins = [Plugin(resource, chosen, sayings) for resource in chosen.resources]
    due = 0.0
    try:
        while not ending.is_set():
            if time.monotonic() >= due:
                _look(plugins, chosen, sayings)
                due = time.monotonic() + chosen.interval
            for plugin in plugins:
                plugin.register()
            ending.wait(min(SECOND, chosen.interval))
    finally:
        for plugin in plugins:
            plugin.endpoint.close()
    return 0


def _look(plugins: list[Plugin], chosen: options.Options, sayings: Sayings) -> None:
    used, told = None, None
    try:
        used = kubelet.used(chosen.pods)
    except grpc.RpcError as error:
        told = kubelet.reason(error)
    except ValueError as error:
        told = str(error)
    sayings.of(f"{chosen.pods}: which pods have what", told)
    figures = [plugin.look(used) for plugin in plugins]
    if chosen.textfile is not None:
        told = None
        try:
            write(chosen.textfile, figures)
        except OSError as error:
            told = error.strerror
        sayings.of(chosen.textfile, told)
