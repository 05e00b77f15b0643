from __future__ import annotations

import random
import sys
from typing import get_args

import pytest

from shmplasma.protocol import Frame
from shmplasma.requests import Request, decode_request
from tests.crash.mutated_frames import requests_of_all_kinds, run


@pytest.mark.usefixtures("spawning")
@pytest.mark.skipif(sys.platform != "linux", reason="it looks at the store by /proc")
def test_mutated_frames_harm_nobody_else() -> None:
    """Whatever is sent costs its sender the connection: others notice nothing, and all comes back."""
    summary = run(count=2000, seed=1)
    assert summary.honest["wrong bytes"] == 0, summary
    assert summary.honest["reads"] > 0, summary
    assert summary.honest["looked at again"] > 0, summary
    assert summary.attackers["frames"] >= 2000, summary
    assert summary.attackers["messages with descriptors"] > 0, summary
    assert summary.attackers["connections that never read"] > 0, summary
    kinds = {f"kind {cls.KIND}" for cls in get_args(Request)}
    assert kinds <= set(summary.attackers), "not every kind of request was mutated"
    assert sum(summary.drops.values()) >= summary.attackers["drops"] > 0, summary
    assert len(summary.drops) > 10, "only few of the checks were met"
    assert summary.after.fds == summary.before.fds, summary
    assert summary.after.rss_bytes < summary.warm.rss_bytes + (64 << 20), summary


def test_corpus_is_of_valid_requests() -> None:
    """What is mutated is what clients send: a request of each kind, which the store can decode."""
    requests = requests_of_all_kinds(random.Random(1), board=3)
    assert {type(request) for request in requests} == set(get_args(Request))
    for request in requests:
        decoded = decode_request(Frame(request.KIND, 1, request.encode()))
        assert decoded.encode() == request.encode(), request
