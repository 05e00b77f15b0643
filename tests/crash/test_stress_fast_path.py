from __future__ import annotations

import pytest

from tests.crash.stress_fast_path import run


@pytest.mark.usefixtures("spawning")
def test_no_wrong_byte_under_eviction_and_reuse() -> None:
    """Readers beside writers, deletes and evictions see no byte of another object, and all room comes back."""
    summary = run(seconds=3, n_readers=2, n_writers=2)
    assert summary.counts["wrong words"] == 0, summary
    assert summary.counts["hits"] > 0, summary
    assert summary.counts["looked at again"] > 0, summary
    assert summary.evictions > 0, summary
    assert summary.takes > summary.takes_that_met_a_pin > 0, summary
