"""Large objects find room among small ones, which are moved for them, while processes hold and read what they can."""

from __future__ import annotations

import pytest

from tests.crash.hammer_room import run


@pytest.mark.parametrize("kill", [False, True])
@pytest.mark.usefixtures("spawning")
def test_nothing_that_is_held_changes(kill: bool) -> None:
    """All bytes of what is held are right, though other objects are moved or go all the time; and no room gets lost."""
    counts = run(4, kill=kill)
    assert counts["wrong"] == 0, counts
    assert counts["sealed, large"] > 0, counts
    assert counts["put, small"] > 0, counts
    # What a store has done its successor does not know.
    assert counts["moved"] > 0 or kill, counts
    assert counts["stores killed"] > 0 or not kill, counts
