"""The recipes of the documents, for the tests to run: what a reader copies, and nothing else.

Standard library only, and nothing of the VM: the tests on the machine read recipes too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

DOCS = Path(__file__).resolve().parents[3] / "docs"


def recipe(section: str, language: str = "sh", page: str = "containers.md", **placeholders: str) -> str:
    """The block in that language under the heading `section`, of which there must be one.

    A placeholder stands in capitals where the reader puts in something of his own, and is replaced by its value:
    recipe("Docker", IMAGE="builder").
    """
    found = [text for heading, kind, text in blocks(page) if (heading, kind) == (section, language)]
    assert len(found) == 1, f"{page}, {section!r}: {len(found)} blocks of {language}"
    text = found[0]
    for name, value in placeholders.items():
        assert re.search(rf"\b{name}\b", text), f"{page}, {section!r}: there is no {name}"
        text = re.sub(rf"\b{name}\b", value.replace("\\", r"\\\\"), text)
    return text


def blocks(page: str) -> Iterator[tuple[str, str, str]]:
    """Each block of code: the heading that it is under, its language, its text."""
    heading, language, code = "", None, ""
    for line in (DOCS / page).read_text().splitlines(keepends=True):
        if line.startswith("```"):
            if language is not None:
                yield heading, language, code
            language, code = (line[3:].strip(), "") if language is None else (None, "")
        elif language is not None:
            code += line
        elif line.startswith("#"):
            heading = line.lstrip("#").strip()
