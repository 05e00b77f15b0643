"""The store's loop."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from shmplasma.segment import Segment
from shmplasma.server import Server
from shmplasma.store import ObjectStore

A_CENTURY_NS = 100 * 365 * 86_400 * 10**9


@pytest.mark.parametrize("due", ["next_due_ns", "deadline_ns"])
def test_sleeps_however_far_off_the_next_thing_to_do_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, due: str
) -> None:
    """What is due in more seconds than the system waits for at once does not end the store."""
    monkeypatch.setattr(ObjectStore, due, time.time_ns() + A_CENTURY_NS)
    with Segment.create(10**6) as segment, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        server = Server(listener, segment, socket_path="")
        server.stop()  # so that it wakes up at once
        assert server._sleep()
        server.close()
