from __future__ import annotations

import pytest

from shmplasma import system
from tests.crash.hammer_hand_over import run


@pytest.mark.parametrize("kill", [False, True])
@pytest.mark.usefixtures("spawning")
def test_no_wrong_byte_from_process_to_process(kill: bool) -> None:
    """What is handed over stays what it is while memory is used anew all around, also across the deaths of the store."""
    counts = run(seconds=3, n_rings=1, kill=kill)
    assert counts["wrong"] == 0, counts
    assert counts["handed over"] > 0, counts
    assert counts["taken by a hint"] > 0 or not system.fast_path_available(), counts
    assert counts["stores killed"] > 0 or not kill, counts
