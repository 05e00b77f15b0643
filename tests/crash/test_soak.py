from __future__ import annotations

import sys
from collections import Counter

import pytest

from tests.crash.soak import Sample, Summary, run


@pytest.mark.usefixtures("spawning")
@pytest.mark.skipif(sys.platform != "linux", reason="it looks at the store by /proc")
def test_churn_at_a_full_store_leaves_it_in_order() -> None:
    """Clients that come, go and are killed at a full store read no wrong word, and leave nothing there."""
    summary = run(seconds=6, sample_seconds=0.3)
    counts = summary.counts
    assert counts["wrong words"] == 0, summary
    assert counts["killed"] > 0, summary
    assert counts["processes that ended"] > 0, summary
    assert counts["clients"] >= counts["processes that ended"], summary
    assert counts["reads"] > 0, summary
    assert summary.evictions > 0, summary
    assert summary.fds_after == summary.fds_before, summary
    assert {sample.values["names"] for sample in summary.samples} == {1}, summary
    early, late = summary.trend("RSS bytes")
    assert late < early + (64 << 20), summary
    early, late = summary.trend("shared bytes")
    assert late < early + (16 << 20), summary


def _summary(*values: int) -> Summary:
    samples = [Sample(second, {"names": value}) for second, value in enumerate(values)]
    return Summary(Counter(), 0, 0, 0, samples)


def test_growth_is_not_flat() -> None:
    """What the second tenth had is compared with what the last tenth has, whatever came before and between."""
    assert _summary(*[0] * 2, *[1] * 9, *[5] * 7, *[1] * 3).is_flat("names")
    assert not _summary(*[1] * 19, *[2] * 2).is_flat("names")
    assert _summary(*[1] * 19, *[2] * 2).trend("names") == (1, 2)
