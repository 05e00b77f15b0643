"""Segments that no store will ever want again, and who removes them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from shmplasma import Store
from shmplasma.orphans import sweep
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
        # First: one that is stopped is continued by the system when its owner ends, and leaves nothing.
        os.kill(int(pid), signal.SIGKILL)
        owner.kill()
        until(lambda: has_ended(int(pid)), "the store has ended")
        assert segment.exists()
        kept = segment_of(other.process.pid)
        with Store("1MB"):
            assert not segment.exists()
            assert not Path(path).parent.exists()
            assert kept.exists(), "a living store's segment stays"


SWEEPER = """
    import os, sys
    from shmplasma.orphans import sweep
    from shmplasma.segment import Segment

    directory, scratch = sys.argv[1:]
    for _ in range(40):
        made = Segment.create(100_000, directory=directory, scratch=scratch)
        print(*sweep(directory), sep="\\n")
        assert os.path.exists(made.name.path), "another has removed what is in use"
        made.close()  # and not unlinked, as if its store had been killed
"""


def test_many_that_sweep_together(tmp_path: Path) -> None:
    """Each orphan is removed by one of them, and none removes what another has just made."""
    arguments = str(tmp_path), str(tmp_path / "private" / "store")
    program = [sys.executable, "-c", textwrap.dedent(SWEEPER), *arguments]
    sweepers = [subprocess.Popen(program, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    removed = [path for each in sweepers for path in each.communicate()[0].split()]
    assert [each.returncode for each in sweepers] == [0] * len(sweepers)
    removed += sweep(str(tmp_path))
    assert len(removed) == len(set(removed)) == 4 * 40
    assert not list(tmp_path.iterdir())
