from __future__ import annotations

from tests.crash.replace_store import run


def test_nothing_is_lost_when_a_store_is_replaced() -> None:
    """Clients lose no object and no blocked get to three upgrades in a row."""
    summary = run(3)
    assert summary.lost == 0, summary
    assert summary.blocked == 3, summary
    assert summary.puts > 0, summary
