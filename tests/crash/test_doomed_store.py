from __future__ import annotations

from tests.crash.doomed_store import run


def test_a_store_that_dies_at_a_write() -> None:
    """Real clients go on with the next store wherever the first one died, and find what they were promised."""
    summary = run(start=3, step=31)
    assert summary.deaths >= 3, summary
