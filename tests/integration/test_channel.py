"""The client's end of a socket that is full: what waits for it, and what does not."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from shmplasma.posted import Release
from shmplasma.protocol import MAX_REQUEST_BYTES, Frame, FrameDecoder
from shmplasma.requests import Flush, Post
from shmplasma.transport import Channel

_MOST: int = 100_000


@pytest.fixture
def ends() -> Iterator[tuple[Channel, socket.socket]]:
    """Give a channel whose socket is full of announcements, and the other end."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        channel = Channel(ours)
        for _ in range(_MOST):
            channel.announce()
            if not channel.offer([]):
                break
        yield channel, theirs


def read_until(theirs: socket.socket, kind: int) -> list[Frame]:
    """Return what comes until there is such a message."""
    theirs.settimeout(10)
    decoder = FrameDecoder(MAX_REQUEST_BYTES)
    frames: list[Frame] = []
    while not any(frame.kind == kind for frame in frames):
        frames += decoder.feed(theirs.recv(1 << 16))
    return frames


def test_an_announcement_waits_for_nothing(ends: tuple[Channel, socket.socket]) -> None:
    """What is sent afterwards comes whole, and behind it."""
    channel, theirs = ends
    for _ in range(100):
        channel.announce()
    sending = threading.Thread(target=channel.request, args=(Flush.KIND, 7, b""))
    sending.start()
    frames = read_until(theirs, Flush.KIND)
    sending.join(10)
    assert not sending.is_alive()
    assert {frame.kind for frame in frames[:-1]} == {Post.KIND}
    assert frames[-1] == Frame(Flush.KIND, 7, b"")


@pytest.mark.parametrize("way", ["itself", "by whoever announces something"])
def test_what_a_finalizer_says_is_not_left_behind(
    ends: tuple[Channel, socket.socket], way: str
) -> None:
    """Nobody may ever send anything again: so it is waited for, also if somebody else sends it."""
    channel, theirs = ends
    if way == "itself":
        sending = threading.Thread(target=channel.send_soon, args=(Release.KIND, b"said"))
    else:
        with channel._sending:  # somebody is sending
            channel.send_soon(Release.KIND, b"said")
        sending = threading.Thread(target=channel.announce)
    sending.start()
    sending.join(0.05)
    assert sending.is_alive()
    frames = read_until(theirs, Release.KIND)
    sending.join(10)
    assert not sending.is_alive()
    assert [frame.body for frame in frames if frame.kind == Release.KIND] == [b"said"]
