"""The short form of `tests.crash.kill_spilling_store`."""

from __future__ import annotations

import pytest

from tests.crash.kill_spilling_store import run


@pytest.mark.usefixtures("spawning")
def test_nothing_is_lost_when_a_store_that_spills_is_killed() -> None:
    """Clients notice a pause, and find every object that was acknowledged, wherever it was."""
    summary = run(times=4, n_clients=3)
    assert summary.kills == 4
    assert summary.gets >= summary.puts > 0
    assert summary.spilled > 0
