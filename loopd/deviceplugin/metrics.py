"""What this program counts, as a file for node_exporter's textfile collector.

Changes when something else is counted. The collector reads the format of Prometheus, in which the name behind TYPE is
that of the samples, with _total.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Figures(NamedTuple):
    """Of one resource."""

    resource: str
    capacity: int
    grants: int
    healthy: bool
    allocations: int
    failures: int


METRICS = {
    "capacity": ("loopd_device_plugin_capacity", "gauge", "Containers that may have the resource at a time."),
    "grants": ("loopd_device_plugin_grants", "gauge", "Grants that are there."),
    "healthy": ("loopd_device_plugin_healthy", "gauge", "1 while loopd answers."),
    "allocations": ("loopd_device_plugin_allocations_total", "counter", "Grants that were made for a container."),
    "failures": ("loopd_device_plugin_failures_total", "counter", "Requests of the kubelet's that were refused."),
}


def text(figures: Sequence[Figures]) -> str:
    """The file."""
    return "".join(_lines(figures))


def _lines(figures: Sequence[Figures]) -> Iterable[str]:
    for field, (name, kind, told) in METRICS.items():
        yield f"# HELP {name} {told}\n# TYPE {name} {kind}\n"
        for each in figures:
            yield f'{name}{{resource="{each.resource}"}} {int(getattr(each, field))}\n'


def write(path: str, figures: Sequence[Figures]) -> None:
    """Write the file in one step."""
    folder, name = os.path.split(path)
    begun = os.path.join(folder, f".{name}.{os.getpid()}")
    fd = os.open(begun, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "w", encoding="ascii") as file:
            file.write(text(figures))
            os.fchmod(fd, 0o644)
        os.replace(begun, path)
    except BaseException:
        os.unlink(begun)
        raise
