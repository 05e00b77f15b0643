"""The client's end of a socket: what waits for one that is full, who reads, and what becomes of a reply that nobody waits for."""

from __future__ import annotations

import errno
import socket
import threading
import time
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any

import pytest

from shmplasma.posted import Release
from shmplasma.protocol import MAX_REQUEST_BYTES, Frame, FrameDecoder, encode_frame
from shmplasma.replies import Number
from shmplasma.requests import Flush, Post
from shmplasma.transport import Channel
from tests.processes import until

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
    sending = threading.Thread(target=channel.request, args=(Flush.KIND, 7, b"", []))
    sending.start()
    frames = read_until(theirs, Flush.KIND)
    sending.join(10)
    assert not sending.is_alive()
    assert {frame.kind for frame in frames[:-1]} == {Post.KIND}
    assert frames[-1] == Frame(Flush.KIND, 7, b"")


def test_an_announcement_while_another_thread_sends_comes_after_that(
    pair: tuple[Channel, socket.socket],
) -> None:
    """By whoever sends something next, at the latest."""
    channel, theirs = pair
    with channel._sending:
        channel.announce()
    channel.offer([])
    assert [frame.kind for frame in read_until(theirs, Post.KIND)] == [Post.KIND]


def test_what_is_said_inside_another_call_comes_after_what_that_sends(
    pair: tuple[Channel, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for no lock that its own thread has."""
    channel, theirs = pair
    push, inside = channel._push, [Release.KIND]

    def interrupted(*arguments: Any) -> bool:
        if inside:
            channel.send(inside.pop(), b"")
        return push(*arguments)

    monkeypatch.setattr(channel, "_push", interrupted)
    channel.send(Flush.KIND, b"")
    kinds = {frame.kind for frame in read_until(theirs, Release.KIND)}
    assert kinds == {Flush.KIND, Release.KIND}


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


@pytest.fixture
def pair() -> Iterator[tuple[Channel, socket.socket]]:
    """Give a channel, and the other end."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Channel(ours), theirs


def answer(theirs: socket.socket, request_id: int) -> None:
    """Reply to a request."""
    theirs.sendall(encode_frame(Number.KIND, request_id, b"reply"))


def test_a_follower_that_stands_in_a_signal_handler_holds_up_nobody(
    pair: tuple[Channel, socket.socket],
) -> None:
    """Whoever has led leaves the lead to any of the others."""
    channel, theirs = pair
    stands, leads, follows = (channel.new_request() for _ in range(3))
    heard: list[int] = []

    def wait(request_id: int) -> None:
        if channel.wait(request_id, time.monotonic() + 10) is not None:
            heard.append(request_id)

    channel._waiters[stands] = SimpleQueue()  # whose thread does not look
    leader = threading.Thread(target=wait, args=(leads,))
    leader.start()
    until(channel._reading.locked, "somebody leads")
    follower = threading.Thread(target=wait, args=(follows,))
    follower.start()
    until(lambda: follows in channel._waiters, "somebody follows")
    answer(theirs, leads)
    leader.join()
    answer(theirs, follows)
    follower.join()
    assert heard == [leads, follows]
    assert channel._waiters.keys() == {stands}


class Meanwhile(dict[int, Any]):
    """Requests that are given up; another thread goes on when one is looked for that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.happens: Callable[[], None] | None = None

    def _look(self, found: Any) -> Any:
        happens, self.happens = self.happens, None
        if happens is not None:
            assert found is None
            happens()
        return found

    def get(self, key: int, default: Any = None) -> Any:
        """Look for one."""
        return self._look(super().get(key, default))

    def pop(self, key: int, default: Any = None) -> Any:
        """Look for one, and take it out."""
        return self._look(super().pop(key, default))


def read(channel: Channel) -> None:
    """Read what is there."""
    channel.read_until(time.monotonic(), lambda: False)


def test_a_reply_that_is_handed_out_while_it_is_given_up(
    pair: tuple[Channel, socket.socket],
) -> None:
    """Who reads or who gives up disposes of it, one of them, and nothing of it stays."""
    channel, theirs = pair
    request_id = channel.new_request()
    disposed: list[Frame] = []
    given_up = channel._given_up = Meanwhile()
    given_up.happens = lambda: channel.give_up(request_id, disposed.append)
    answer(theirs, request_id)
    read(channel)
    assert disposed == [Frame(Number.KIND, request_id, b"reply")]
    assert not given_up
    assert not channel._replies


def test_an_interrupt_before_a_reply_is_disposed_of(pair: tuple[Channel, socket.socket]) -> None:
    """Who reads next does it."""
    channel, theirs = pair
    request_id = channel.new_request()
    disposed: list[Frame | None] = []

    def dispose(frame: Frame) -> None:
        disposed.append(frame)
        if len(disposed) == 1:
            raise KeyboardInterrupt

    channel.give_up(request_id, dispose)
    answer(theirs, request_id)
    with pytest.raises(KeyboardInterrupt):
        read(channel)
    read(channel)
    assert len(disposed) == 2
    assert not channel._given_up
    assert not channel._replies


def test_a_request_that_was_not_taken_to_be_sent(
    pair: tuple[Channel, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one whose sending is interrupted it is known whether there will be a reply."""
    channel, theirs = pair
    taken: list[None] = []

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(channel, "_push", interrupted)
        with pytest.raises(KeyboardInterrupt):
            channel.request(Flush.KIND, 1, b"", taken)
    assert not taken
    sock = channel._sock
    channel._sock = SimpleSocket(interrupted)  # type: ignore[assignment]  # it only sends
    with pytest.raises(KeyboardInterrupt):
        channel.request(Flush.KIND, 2, b"", taken)
    assert taken
    channel._sock = sock
    channel.announce()
    assert read_until(theirs, Post.KIND)[0] == Frame(Flush.KIND, 2, b"")


@pytest.mark.parametrize("number", [errno.ENOBUFS, errno.ENOMEM])
def test_a_system_that_is_short_of_memory(pair: tuple[Channel, socket.socket], number: int) -> None:
    """A message for which there is no memory is sent when there is some, once, and before what comes after it."""
    channel, theirs = pair
    sock = channel._sock
    refusals = [number] * 3

    def send(data: bytes, flags: int) -> int:
        if refusals:
            raise OSError(refusals.pop(), "no memory")
        return sock.send(data, flags)

    channel._sock = SimpleSocket(send)  # type: ignore[assignment]  # it only sends
    channel.request(Flush.KIND, 1, b"", [])
    refusals.append(number)
    channel.announce()
    assert [frame.kind for frame in read_until(theirs, Post.KIND)] == [Flush.KIND, Post.KIND]
    assert not channel.error


class SimpleSocket:
    """What a channel sends by."""

    def __init__(self, send: Callable[..., object]) -> None:
        self.send = send
