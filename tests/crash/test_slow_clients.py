from __future__ import annotations

import sys

import pytest

from tests.crash.slow_clients import run


@pytest.mark.usefixtures("spawning")
@pytest.mark.skipif(sys.platform != "linux", reason="it looks at the store by /proc")
def test_slow_clients_harm_nobody_else() -> None:
    """Who never reads, or never says who it is, is dropped with a reason; others get all answers meanwhile."""
    summary = run(seconds=1, n_half_open=100, n_deaf=1, patience_seconds=60)
    assert summary.wrong == 0, summary
    assert summary.alone.count > 0, summary
    assert summary.beside.count > 0, summary
    assert summary.asked["half headers"] == 100, summary
    assert summary.asked["deaf clients dropped"] == 1, summary
    assert summary.unread_drops == 1, summary
    assert summary.stranger_drops == 50, summary
    assert sum(summary.drops.values()) == 51, "somebody else was dropped"
    assert summary.after.fds == summary.before.fds, summary
    assert summary.peak_bytes < summary.before.rss_bytes + (256 << 20), summary
