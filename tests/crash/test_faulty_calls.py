from __future__ import annotations

import pytest

from tests.crash.faulty_calls import ERRORS, run
from tests.crash.tracer import SUPPORTED

pytestmark = [
    pytest.mark.skipif(not SUPPORTED, reason="tracing is written for 64-bit x86 Linux"),
    pytest.mark.timeout(900),  # each starts a dozen of programs; what hangs is killed much sooner
]


def test_a_call_that_fails_costs_one_client_at_most() -> None:
    """Whichever call fails, a store refuses to start or goes on serving, and leaves nothing behind."""
    summary = run(ERRORS, step=67)
    assert not summary.failures, summary
    assert summary.longest > 100, summary
    assert len(summary.calls) >= 5, summary
    assert summary.outcomes["served"] > 0, summary


@pytest.mark.parametrize(
    ("call", "outcomes"),
    [
        # Served: a segment that some other store has left is locked to be swept up, or left alone.
        ("flock", {"refused to start", "served"}),
        ("fallocate", {"refused to start", "served", "served, and one client was refused"}),
        ("accept4", {"served", "served, and one client was refused"}),
        ("sendmsg", {"served, and one client was refused"}),
        ("unlink", {"served", "ended with a message"}),
    ],
)
def test_each_fault_of_a_call_ends_as_it_should(call: str, outcomes: set[str]) -> None:
    """A call that fails leads to nothing else than what a user of it can expect."""
    summary = run(["ENOMEM"], [call], step=4 if call == "fallocate" else 1)
    assert not summary.failures, summary
    assert summary.calls[call] > 0, summary
    assert set(summary.outcomes) <= outcomes, summary
