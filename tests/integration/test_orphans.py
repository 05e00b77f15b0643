"""Segments that no store will ever want again, and who removes them."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from shmplasma import Store
from tests.processes import Child, until

OWNER = """
    import sys, time
    import shmplasma

    store = shmplasma.Store("1MB")
    print(store.process.pid, store.store_socket_name, flush=True)
    time.sleep(600)
"""


def segment_of(pid: int) -> Path:
    """Return the segment that a store process has mapped."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if "/shmplasma-" in line:
            return Path(line.split()[-1])
    raise AssertionError("it has none")


def has_ended(pid: int) -> bool:
    """Tell whether a process has no memory any more."""
    try:
        return not Path(f"/proc/{pid}/maps").read_text()
    except FileNotFoundError:
        return True


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="it is looked for in /proc")
def test_an_orphan_is_swept_up() -> None:
    """What an embedded store left that was killed with its owner goes when the next store starts."""
    with Store("1MB") as other, Child(OWNER) as owner:
        pid, _, path = owner.hear().partition(" ")
        segment = segment_of(int(pid))
        os.kill(int(pid), signal.SIGSTOP)  # it is not to notice its owner's end
        owner.kill()
        os.kill(int(pid), signal.SIGKILL)
        until(lambda: has_ended(int(pid)), "the store has ended")
        assert segment.exists()
        kept = segment_of(other.process.pid)
        with Store("1MB"):
            assert not segment.exists()
            assert not Path(path).parent.exists()
            assert kept.exists(), "a living store's segment stays"
