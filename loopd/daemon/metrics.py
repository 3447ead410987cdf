"""Metrics: what the daemon counts, and how that reads as OpenMetrics text.

Counts what happens, and looks up the rest when somebody asks. An idle daemon exits between two scrapes: so the counts
are saved at an exit in good order, and go on with the next start. After a crash they start anew, which `_created`
tells. Decides nothing.
"""

from __future__ import annotations

import bisect
import contextlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from loopd import __version__
from loopd.protocol.wire import Code

BOUNDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Of the histogram, in seconds: an attach takes about a millisecond, and is given up after `request_timeout`."""


class Gauges(NamedTuple):
    """What is looked up, not counted."""

    leases: dict[str, int]
    """By state."""
    stuck: int
    """Children that hang and have not been reaped."""


class Metrics:
    """The counts of one daemon."""

    def __init__(self, service: str, path: str) -> None:
        """`service` names the daemon among several of a host; what an earlier one of it saved at `path` goes on."""
        self._service = service
        self._path = path
        self.started = self.created = time.time()
        self.attaches = [0] * (len(BOUNDS) + 1)
        self.seconds = 0.0
        self.refusals = dict.fromkeys((code.value for code in Code), 0)
        self.dropped = self.retries = self.stuck = 0
        self._load()

    def attached(self, seconds: float) -> None:
        """A device was delivered, so long after its request was looked at."""
        self.attaches[bisect.bisect_left(BOUNDS, seconds)] += 1
        self.seconds += seconds

    def refused(self, code: Code) -> None:
        """A request was refused, or its reply could not be delivered."""
        self.refusals[code.value] += 1

    # Over an exit -----------------------------------------------------------------------------------------------------

    def _load(self) -> None:
        try:
            with open(self._path, encoding="utf-8") as file:
                saved = json.load(file)
            # A crash must not bring these numbers back a second time: counters would fall, and not to 0.
            os.unlink(self._path)
            attaches = [int(count) for count in saved["attaches"]]
            if saved["bounds"] == list(BOUNDS) and len(attaches) == len(self.attaches):
                self.attaches, self.seconds = attaches, float(saved["seconds"])
                self.refusals.update((code, int(saved["refusals"].get(code, 0))) for code in self.refusals)
                self.dropped, self.retries, self.stuck = (int(saved[n]) for n in ("dropped", "retries", "stuck"))
                self.created = float(saved["created"])
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            pass  # there is none, or it is another version's: the counts start anew

    def save(self) -> None:
        """Keep the counts for the next start. Where that fails they start anew, and nothing else is lost."""
        saved = {
            "created": self.created,
            "bounds": BOUNDS,
            "attaches": self.attaches,
            "seconds": self.seconds,
            "refusals": self.refusals,
            "dropped": self.dropped,
            "retries": self.retries,
            "stuck": self.stuck,
        }
        with contextlib.suppress(OSError):
            with open(f"{self._path}.new", "w", encoding="utf-8") as file:
                json.dump(saved, file)
            os.rename(f"{self._path}.new", self._path)

    # As text ----------------------------------------------------------------------------------------------------------

    def text(self, gauges: Gauges) -> str:
        """Everything, in OpenMetrics 1.0. Parsers of Prometheus's older format read it too, as node_exporter's for its
        textfile collector: there is no type that only OpenMetrics knows, and no time stamp.
        """
        families = (*self._gauges(gauges), *self._counters(), self._histogram())
        return "".join("".join(f"{line}\n" for line in family) for family in families) + "# EOF\n"

    def _gauges(self, gauges: Gauges) -> Iterator[list[str]]:
        yield self._family(
            "loopd_build_info", "gauge", "Always 1; the version is a label.", [("", {"version": __version__}, 1)]
        )
        yield self._family(
            "loopd_start_time_seconds", "gauge", "When this process started.", [("", {}, round(self.started, 3))]
        )
        yield self._family(
            "loopd_leases", "gauge", "Devices that are attached, or detached and still open somewhere (held).",
            [("", {"state": state}, count) for state, count in gauges.leases.items()],
        )  # fmt: skip
        yield self._family(
            "loopd_stuck_workers", "gauge", "Worker processes that hang now, most likely on a client's file.",
            [("", {}, gauges.stuck)],
        )  # fmt: skip

    def _counters(self) -> Iterator[list[str]]:
        for name, text, counts in (
            ("loopd_attaches", "Devices delivered.", [({}, sum(self.attaches))]),
            (
                "loopd_refusals",
                "Requests refused, by the code of the refusal.",
                [({"code": code}, count) for code, count in self.refusals.items()],
            ),
            ("loopd_dropped_requests", "Requests dropped unanswered.", [({}, self.dropped)]),
            ("loopd_number_retries", "Device numbers that were lost to somebody else.", [({}, self.retries)]),
            ("loopd_stuck_requests", "Requests whose worker process was killed because it hung.", [({}, self.stuck)]),
        ):
            samples = [
                (suffix, labels, value)
                for labels, count in counts
                for suffix, value in (("_total", count), ("_created", round(self.created, 3)))
            ]
            yield self._family(name, "counter", text, samples)

    def _histogram(self) -> list[str]:
        samples: list[tuple[str, dict[str, str], float]] = []
        below = 0
        for bound, count in zip((*BOUNDS, "+Inf"), self.attaches, strict=True):
            below += count
            samples.append(("_bucket", {"le": str(bound)}, below))
        samples += [("_sum", {}, round(self.seconds, 6)), ("_count", {}, below)]
        samples += [("_created", {}, round(self.created, 3))]
        text = "From a request's head of the queue to its reply, of what was attached."
        return self._family("loopd_attach_duration_seconds", "histogram", text, samples)

    def _family(
        self, name: str, kind: str, text: str, samples: Iterable[tuple[str, dict[str, str], float]]
    ) -> list[str]:
        lines = [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
        if name.endswith("_seconds"):
            lines.append(f"# UNIT {name} seconds")
        for suffix, labels, value in samples:
            pairs = ",".join(f'{key}="{_escaped(text)}"' for key, text in {"service": self._service, **labels}.items())
            lines.append(f"{name}{suffix}{{{pairs}}} {value}")
        return lines


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
