"""What was measured: ratios first, absolute times second, the spread of the rounds with both. Table, JSON and plot.

Owns no measurement. A ratio is the median of what the rounds gave, each against the reference of the same round.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Rounds = Sequence[Sequence[float]]


class Row(NamedTuple):
    """One figure. `reach` is the most that the ratio should be, or the value where there is no ratio."""

    section: str
    what: str
    value: float
    unit: str
    against: str = ""
    reference: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    reach: float | None = None

    @property
    def reached(self) -> bool | None:
        """Whether the figure is what it should be; None where there is no such thing."""
        measured = self.value if self.ratio is None else self.ratio
        return None if self.reach is None else measured <= self.reach


def quantile(values: Iterable[float], percent: float) -> float:
    """The value that so many percent of the values do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def compared(
    section: str, what: str, rounds: Rounds, against: str, reference: Rounds, percent: float = 50, *,
    unit: str = "ms", reach: float | None = None,
) -> Row:  # fmt: skip
    """A quantile of what was measured against the same of the reference, round by round."""
    ratios = [quantile(a, percent) / quantile(b, percent) for a, b in zip(rounds, reference, strict=True)]
    value, other = (quantile([one for part in parts for one in part], percent) for parts in (rounds, reference))
    name = f"{what}, p{percent:g}"
    return Row(section, name, value, unit, against, other, statistics.median(ratios), min(ratios), max(ratios), reach)


def alone(
    section: str, what: str, rounds: Rounds, percent: float = 50, *, unit: str = "ms", reach: float | None = None
) -> Row:
    """A quantile with nothing to compare it with; the spread is that of the rounds."""
    found = [quantile(part, percent) for part in rounds]
    return Row(
        section, f"{what}, p{percent:g}", quantile([one for part in rounds for one in part], percent), unit,
        low=min(found), high=max(found), reach=reach,
    )  # fmt: skip


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(rows: Sequence[Row]) -> str:
    """The rows for people."""
    lines = [("", "ratio", "(spread)", "reach", "", "measured", "against")]
    section = ""
    for row in rows:
        if row.section != section:
            section = row.section
            lines.append((f"-- {section}", "", "", "", "", "", ""))
        spread = "" if row.low is None else f"({_number(row.low)}-{_number(row.high)})"
        against = f"{row.against} {_number(row.reference)}".rstrip()
        mark = {None: "", True: "yes", False: "NO"}[row.reached]
        measured = f"{_number(row.value)} {row.unit}"
        lines.append((row.what, _number(row.ratio), spread, _number(row.reach), mark, measured, against))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
                     for line in lines)  # fmt: skip


def save(path: Path, machine: dict[str, Any], rows: Sequence[Row]) -> None:
    """Everything as JSON."""
    found = [{**row._asdict(), "reached": row.reached} for row in rows]
    path.write_text(json.dumps({"machine": machine, "rows": found}, indent=1) + "\n")


def load(path: Path) -> list[Row]:
    """The rows of a JSON file that `save` wrote."""
    rows = json.loads(path.read_text())["rows"]
    return [Row(**{name: value for name, value in row.items() if name in Row._fields}) for row in rows]


def write_into(page: Path, rows: Sequence[Row]) -> None:
    """Put the table into a page that has a place for it."""
    if page.exists():
        page.write_text(re.sub(r"(?s)(?<=```text\n).*?(?=```)", lambda _: table(rows) + "\n", page.read_text()))


def plot(path: Path, rows: Sequence[Row]) -> None:
    """Every ratio with its spread, and what it should be, as a PNG."""
    import matplotlib as mpl  # noqa: PLC0415  # takes half a second, and only the plot needs it

    mpl.use("agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    shown = [row for row in reversed(rows) if row.ratio is not None]
    figure, axes = plt.subplots(figsize=(10, 1.2 + 0.3 * len(shown)), layout="constrained")
    for place, row in enumerate(shown):
        assert row.ratio is not None
        axes.barh(place, row.ratio - 1, left=1, color="tab:red" if row.reached is False else "tab:blue")
        if row.low is not None:
            axes.plot([row.low, row.high], [place, place], color="black", linewidth=1)
        if row.reach is not None:
            axes.plot([row.reach] * 2, [place - 0.45, place + 0.45], color="tab:green", linewidth=2)
        axes.text(max(row.high or row.ratio, 1), place, f"  {_number(row.ratio)}", va="center", fontsize=8)
    axes.set_yticks(range(len(shown)), [f"{row.what}  /  {row.against}" for row in shown], fontsize=8)
    axes.set_xscale("log")
    axes.set_xlim(left=0.02)  # what is hardly anything need not be told apart
    axes.set_xlabel("ratio (line: spread of the rounds; green: to reach)")
    axes.margins(x=0.1, y=0.01)
    figure.savefig(path, dpi=110)
