from __future__ import annotations

import pytest

from shmplasma import system
from tests.crash.hammer_new import run


@pytest.mark.parametrize("kill", [False, True])
@pytest.mark.usefixtures("spawning")
def test_no_wrong_byte_of_what_was_just_put(kill: bool) -> None:
    """What is found by its record stays what it is while memory is used anew all around, also across the deaths of the store."""
    counts = run(seconds=3, n_pairs=2, kill=kill)
    assert counts["wrong"] == 0, counts
    assert counts["deleted and found"] == 0, counts
    assert counts["got"] > 0, counts
    assert counts["found by their records"] > 0 or not system.fast_path_available(), counts
    assert counts["stores killed"] > 0 or not kill, counts
