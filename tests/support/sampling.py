"""Which tests `make check` and `make check-vm` leave to `make check-all` and `make check-vm-all`: a pytest plugin.

A test marked `exhaustive` is one of them. Of a test with parameters that is marked `sample(N)` about each Nth case
stays. In a table of cases these are diagonals, so that every value of every parameter occurs, as long as another one
has at least N values.
"""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "exhaustive: need not run at each change")
    config.addinivalue_line("markers", "sample(n): of its cases about each nth runs at each change")


def _place(item: pytest.Item) -> int:
    """The place of a case among those of its test: of names that get their values together the first one counts."""
    indices: dict[str, int] = dict(item.callspec.indices)  # type: ignore[attr-defined]
    for marker in item.iter_markers("parametrize"):
        names = marker.args[0]
        for name in (names.replace(" ", "").split(",") if isinstance(names, str) else names)[1:]:
            del indices[name]
    return sum(indices.values())


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        sample = item.get_closest_marker("sample")
        if sample and _place(item) % sample.args[0]:
            item.add_marker("exhaustive")
