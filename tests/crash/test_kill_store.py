from __future__ import annotations

import pytest

from tests.crash.kill_store import measure, run


@pytest.mark.usefixtures("spawning")
def test_nothing_acknowledged_is_lost() -> None:
    """A store that dies under load comes back with all that it has acknowledged, and no client fails."""
    summary = run(times=6, n_clients=3)
    assert summary.deaths >= 6
    assert summary.counts["verified"] > 0, summary
    assert summary.counts["looked at again"] > 0, summary
    assert summary.counts["waited for"] == 6 * 4, summary


@pytest.mark.usefixtures("spawning")
def test_clients_that_die_with_the_store() -> None:
    """What clients had put that die with the store stays; what they had not sealed goes, and their pins."""
    summary = run(times=4, n_clients=1, n_victims=2)
    assert summary.counts["put by victims"] > 0, summary
    assert summary.lost_with_their_clients == 0, summary


@pytest.mark.usefixtures("spawning")
def test_many_objects() -> None:
    """A store with many small objects comes back with all of them."""
    recoveries = measure(objects=5000, times=1)
    assert len(recoveries.ready_seconds) == len(recoveries.answer_seconds) == 1, recoveries
    assert " 5000 objects" in recoveries.summaries[0], recoveries
