from __future__ import annotations

import array
import fcntl
import selectors
import socket
import termios
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from shmplasma.connections import Connection, StalledError
from shmplasma.errors import ProtocolError
from shmplasma.protocol import PROTOCOL_VERSION, encode_frame
from shmplasma.requests import MAX_NAME_BYTES, Get, Hello, Role

HELLO = encode_frame(
    Hello.KIND, 1, Hello(PROTOCOL_VERSION, Role.CLIENT, MAX_NAME_BYTES * "n").encode()
)
LONG_BODY = Get(True, [bytes(20)] * 10_000, range(10_000)).encode()
LONG = encode_frame(Get.KIND, 2, LONG_BODY)


@pytest.fixture
def ends() -> Iterator[tuple[Connection, socket.socket, socket.socket]]:
    """Give a connection as the store has it, its socket, and the client's."""
    ours, theirs = socket.socketpair()
    with selectors.DefaultSelector() as selector, ours, theirs:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        connection = Connection(1, 0, ours, selector)
        yield connection, ours, theirs
        connection.hang_up()


def unread(sock: socket.socket) -> int:
    """Return how many bytes a socket holds."""
    count = array.array("i", [0])
    fcntl.ioctl(sock, termios.FIONREAD, count)
    return count[0]


def read_first(connection: Connection) -> None:
    """Read until the first message is there."""
    while not connection.frames:
        assert connection.read()


def test_before_the_introduction_nothing_else_is_read(
    ends: tuple[Connection, socket.socket, socket.socket],
) -> None:
    """Of all that a stranger sends, the store takes its first message; the rest is read after that."""
    connection, ours, theirs = ends
    theirs.sendall(HELLO + LONG)
    read_first(connection)
    assert unread(ours) == len(LONG)
    assert [frame.kind for frame in connection.frames] == [Hello.KIND]
    while len(connection.frames) < 2:
        assert connection.read()
    assert connection.frames[1].body == LONG_BODY


def test_a_first_message_is_short(ends: tuple[Connection, socket.socket, socket.socket]) -> None:
    """Of a stranger's long message not more than the header is read."""
    connection, ours, theirs = ends
    theirs.sendall(LONG)
    with pytest.raises(ProtocolError, match="limit"):
        read_first(connection)
    assert unread(ours) == len(LONG_BODY)


@pytest.mark.parametrize("sent", [b"", HELLO[:5], HELLO[:-1]])
def test_an_introduction_takes_not_for_ever(
    ends: tuple[Connection, socket.socket, socket.socket], sent: bytes
) -> None:
    """Who stops before the end of its first message is given 10 s."""
    connection, ours, theirs = ends
    theirs.sendall(sent)
    while unread(ours):
        connection.read()
    now = time.monotonic()
    assert connection.is_awaited(now)
    with pytest.raises(StalledError, match="not introduced itself within 10 s"):
        connection.is_awaited(now + 11)
    theirs.sendall(HELLO[len(sent) :])
    read_first(connection)
    assert not connection.is_awaited(now + 11)


def test_who_does_not_read_is_awaited(
    ends: tuple[Connection, socket.socket, socket.socket],
) -> None:
    """A pause lasts until all is sent, and is too long when nothing is read for 10 s."""
    connection, _, theirs = ends
    theirs.sendall(HELLO)
    read_first(connection)
    size = 8 << 20
    connection.send(bytes(size))
    assert connection.is_slow
    connection.pause()
    now = time.monotonic()
    assert connection.is_awaited(now)
    with pytest.raises(StalledError, match="does not read"):
        connection.is_awaited(now + 11)
    connection.paused_at = now - 11
    size -= len(theirs.recv(1 << 20))
    connection.flush()
    assert connection.is_awaited(now), "it has read something"
    assert not connection.owes_nothing
    while size:
        size -= len(theirs.recv(1 << 20))
        connection.flush()
    assert not connection.is_awaited(now + 11)
    assert connection.owes_nothing


def test_who_is_waited_for_is_not_read_from(
    ends: tuple[Connection, socket.socket, socket.socket],
) -> None:
    """Until it reads, or reads no more."""
    connection, ours, theirs = ends
    theirs.sendall(HELLO)
    read_first(connection)
    connection.send(bytes(8 << 20))
    connection.pause()
    assert connection._selector.get_key(ours).events == selectors.EVENT_WRITE
    connection.send_no_more()
    assert connection._selector.get_key(ours).events == selectors.EVENT_READ
    assert connection.owes_nothing
    assert not connection.is_slow


def test_a_last_message_breaks_into_no_other() -> None:
    """It is left out where another one is half sent."""
    ours, theirs = socket.socketpair()
    with selectors.DefaultSelector() as selector, theirs:
        connection = Connection(1, 0, ours, selector)
        connection.send(bytes(8 << 20))
        received = theirs.recv(1 << 20)
        connection.hang_up(b"last")
        while piece := theirs.recv(1 << 20):
            received += piece
    assert received == bytes(len(received))


def test_what_waits_has_an_end(ends: tuple[Connection, socket.socket, socket.socket]) -> None:
    """For one who does not read, neither bytes without end nor descriptors wait."""
    connection, ours, _ = ends
    connection.send(bytes(9 << 20))
    with pytest.raises(StalledError, match="descriptor"):
        connection.send(b"reply", [ours.fileno()])
    with pytest.raises(StalledError, match="bytes wait for it"):
        connection.send(bytes(9 << 20))


def test_a_descriptor_does_not_wait_for_a_full_socket(
    ends: tuple[Connection, socket.socket, socket.socket],
) -> None:
    """It goes with the first byte of its message or not at all."""
    connection, ours, _ = ends
    with suppress(BlockingIOError):
        while True:
            ours.send(bytes(1 << 16))
    with pytest.raises(StalledError, match="descriptor"):
        connection.send(b"reply", [ours.fileno()])


def test_what_is_replayed_is_nobodys_fault(
    ends: tuple[Connection, socket.socket, socket.socket],
) -> None:
    """However long, it waits to be read, in its place, and of what comes after it as much may wait as in any case."""
    connection, _, theirs = ends
    replayed, later = bytes(range(256)) * (20 << 12), bytes(15 << 20)
    connection.send(b"welcome")
    connection.replay(replayed)
    connection.send(b"later")
    connection.send(later)
    received = bytearray()
    while len(received) < len(replayed):
        connection.flush()
        received += theirs.recv(1 << 20)
    with pytest.raises(StalledError, match="bytes wait for it"):
        connection.send(bytes(2 << 20))
    assert received[:7] == b"welcome"
    expected = b"welcome" + replayed + b"later"
    while len(received) < len(expected):
        connection.flush()
        received += theirs.recv(1 << 20)
    assert received[: len(expected)] == expected


def test_who_has_read_all_that_was_replayed_has_nothing_to_wait_for(
    ends: tuple[Connection, socket.socket, socket.socket],
) -> None:
    """What is sent after it goes at once."""
    connection, _, theirs = ends
    size = 2 << 20
    connection.replay(bytes(size))
    while size:
        connection.flush()
        size -= len(theirs.recv(1 << 20))
    connection.flush()
    connection.send(b"later")
    assert theirs.recv(100) == b"later"
    assert not connection.is_slow
