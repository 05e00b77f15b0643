"""Runs the examples of README.md and docs/*.md: each ```python block is a test.

Each block stands alone: pytest-randomly shuffles them, so none may count on what another has defined.
Programs, whose last part stands under ``if __name__ == "__main__"``, are only defined here: tests/integration/test_programs.py runs them.
"""

from __future__ import annotations

from doctest import ELLIPSIS, NORMALIZE_WHITESPACE
from importlib.util import find_spec

import pytest
from sybil import Sybil
from sybil.integration.pytest import SybilItem
from sybil.parsers.markdown import PythonCodeBlockParser

pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(doctest_optionflags=ELLIPSIS | NORMALIZE_WHITESPACE)],
    patterns=["README.md", "docs/*.md"],
).pytest()

_NO_TORCH = find_spec("torch") is None

collect_ignore = ["shmplasma/torch.py"] if _NO_TORCH else []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the examples of what is not installed everywhere; none is tried again, for which Sybil's items lack a method."""
    for item in items:
        if isinstance(item, SybilItem):
            item.add_marker(pytest.mark.flaky(reruns=0))
        if _NO_TORCH and item.path.name == "pytorch.md":
            item.add_marker(pytest.mark.skip(reason="PyTorch is not installed"))
