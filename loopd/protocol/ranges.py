"""Device numbers as text: ``4096-4102,4160``.

Changes when that text does: it is in the links beside the grants, and people read it.
"""

from __future__ import annotations

from typing import Iterable


def text(numbers: Iterable[int]) -> str:
    """The text of these numbers, in their order."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ",".join("-".join(map(str, run)) for run in runs)


def numbers(text: str) -> tuple[int, ...]:
    """The numbers of such a text. ValueError for any other."""
    runs = (run.partition("-") for run in text.split(","))
    return tuple(number for first, _, last in runs for number in range(int(first), int(last or first) + 1))
