from __future__ import annotations

from tests.crash.flipped_bits import run


def test_no_wrong_byte_after_damage() -> None:
    """A store on a damaged segment comes up, is in order, and serves nothing but what was put."""
    outcomes = run(300, seed=7)
    assert outcomes.total() == 300
    assert outcomes["some objects lost"] > 0, outcomes
    assert outcomes["all objects"] > 0, outcomes
