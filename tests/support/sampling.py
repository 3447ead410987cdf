"""Which tests `make check` and `make check-vm` leave to `make check-all` and `make check-vm-all`: a pytest plugin.

A test marked `exhaustive` is one of them. Of a test with parameters that is marked `sample(N)` about each Nth case
stays. In a table of cases these are diagonals, so that every value of a parameter occurs as long as another one has at
least N values.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "exhaustive: need not run at each change")
    config.addinivalue_line("markers", "sample(n): of its cases about each nth runs at each change")


def _rows(values: Iterable[Any], alone: bool) -> list[tuple[Any, ...]]:
    """What is given to the names of a parametrize mark, case by case."""
    return [
        tuple(value.values) if isinstance(value, type(pytest.param())) else (value,) if alone else tuple(value)
        for value in values
    ]


def _place(item: pytest.Item) -> int:
    """The sum of the places that the values of a case have among those of its parameters.

    pytest's own indices are those of the parameters of fixtures alone; of others they count the cases.
    """
    case = item.callspec  # type: ignore[attr-defined]
    place = sum(case.indices.values())
    for marker in item.iter_markers("parametrize"):
        names, values = marker.args[:2]
        names = names.replace(" ", "").split(",") if isinstance(names, str) else names
        place += _rows(values, len(names) == 1).index(tuple(case.params[name] for name in names))
        place -= sum(case.indices[name] for name in names)
    return int(place)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        sample = item.get_closest_marker("sample")
        if sample and _place(item) % sample.args[0]:
            item.add_marker("exhaustive")
