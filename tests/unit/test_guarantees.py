"""What docs/guarantees.md says of itself: for each promise, which module keeps it and which test shows it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]


def promises() -> list[list[str]]:
    """Return the rows of the tables under "What is promised": when, then, by, shown by."""
    text = (PROJECT / "docs" / "guarantees.md").read_text()
    text = text.partition("## What is promised")[2].partition("\n## ")[0]
    rows = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return [row for row in rows if row[0].strip() not in ("when", "---")]


@pytest.mark.parametrize("row", promises(), ids=lambda row: row[0].strip())
def test_a_promise_names_its_module_and_its_test(row: list[str]) -> None:
    """Whoever doubts it finds both; a test that was renamed or removed leaves no promise behind."""
    _, _, by, shown_by = row
    modules = [
        name for each in re.findall(r"\(([^()]*)\)", by) for name in re.findall("`(.+?)`", each)
    ]
    programs = [name.split()[0] for name in re.findall("`(.+?)`", shown_by)]
    assert programs
    for name in modules:
        assert (PROJECT / "shmplasma" / f"{name}.py").exists(), name
    places = ("", "tests/crash", "tests/integration", "tests/unit", "tests/stateful")
    for name in programs:
        file = name if name.endswith(".py") else f"{name}.py"
        assert any((PROJECT / place / file).exists() for place in places), name
