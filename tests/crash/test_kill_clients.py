from __future__ import annotations

import pytest

from tests.crash.kill_clients import run


@pytest.mark.usefixtures("spawning")
def test_nothing_is_lost_with_clients() -> None:
    """Clients that are killed leave what was acknowledged, and neither pins nor room."""
    summary = run(seconds=4, n_clients=4)
    assert summary.kills > 0, summary
    assert summary.said > 0, summary
    assert summary.counts["verified"] > 0, summary
