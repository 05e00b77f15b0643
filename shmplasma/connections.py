"""A client's connection as the store sees it: whole messages in, replies out, never waiting.

Invariants
----------
* Before it has introduced itself, nothing is read but its first message, which is short.
* What waits to be sent is in order, and of it at most `_MAX_UNREAD_BYTES`, what is replayed not counted: beyond that `StalledError`.
* What is replayed waits as a memoryview, of which the rest is no copy; all else as bytes.
* The selector looks for writing exactly while something waits, and for reading unless the connection is paused.
* Errors of the socket go to the caller, which decides what is to become of the client.
"""

from __future__ import annotations

import selectors
import socket
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from shmplasma.protocol import MAX_REQUEST_BYTES, Frame, FrameDecoder

__all__ = ["Connection", "StalledError", "close_socket"]

_READ_BYTES: Final = 1 << 16
_FIRST_BYTES: Final = 1024
"""Longest body of a first message: a `Hello` has a fourth of it."""
_HELLO_SECONDS: Final = 10.0
"""How long a client may take to introduce itself."""
_PAUSE_BYTES: Final = 1 << 16
"""Beyond what the socket takes (208 KiB): more than any but the longest replies."""
_PATIENCE_SECONDS: Final = 10.0
"""How long a client may leave its replies lying there."""
_MAX_UNREAD_BYTES: Final = 16 << 20
"""What may wait for a client in any case: two of the longest replies, or 380,000 notifications."""
_PIECE_BYTES: Final = 1 << 20
"""So much is sent at most before others have their turn, who reads as fast as it is sent included: 0.3 ms."""

_READ: Final = selectors.EVENT_READ
_WRITE: Final = selectors.EVENT_WRITE


class StalledError(Exception):
    """A client has kept the store waiting for too long: it does not read, or does not say who it is."""


def close_socket(sock: socket.socket) -> None:
    """Close a socket; an error of a close says nothing that anybody could do."""
    with suppress(OSError):
        sock.close()


class Connection:
    """A client's socket and what is on its way through it.

    Parameters
    ----------
    client : int
        The client's number.
    pid : int
        The process at the other end; 0 if it is invisible here.
    sock : socket.socket
        Its socket, which is registered with `selector`, for reading, and ended by `hang_up`.
    selector : selectors.BaseSelector
        The loop's.

    Attributes
    ----------
    frames : deque of Frame
        Messages that were read and are to be handled.
    paused_at : float or None
        Since when nothing is read from it, or when it last read anything itself (monotonic, in seconds).

    Raises
    ------
    OSError
        It cannot be served.
    """

    __slots__ = (
        "_decoder",
        "_hello_by",
        "_out",
        "_out_bytes",
        "_selector",
        "_sock",
        "client",
        "frames",
        "paused_at",
        "pid",
    )

    def __init__(
        self, client: int, pid: int, sock: socket.socket, selector: selectors.BaseSelector
    ) -> None:
        self.client = client
        self.pid = pid
        self.frames: deque[Frame] = deque()
        self.paused_at: float | None = None
        self._sock = sock
        self._selector = selector
        self._decoder = FrameDecoder(_FIRST_BYTES)
        self._hello_by: float | None = time.monotonic() + _HELLO_SECONDS
        self._out: deque[bytes | memoryview] = deque()
        self._out_bytes = 0
        sock.setblocking(False)
        selector.register(sock, _READ, self)

    def hang_up(self, last: bytes = b"") -> None:
        """End the connection, with a last message if the socket takes it and it breaks into no other."""
        if last and not self._out:
            with suppress(OSError):
                self._sock.send(last)
        with suppress(KeyError):  # a change of what it is watched for has failed
            self._selector.unregister(self._sock)
        close_socket(self._sock)

    # -- reading -------------------------------------------------------------------------------

    @property
    def is_incomplete(self) -> bool:
        """Whether part of a message was read."""
        return self._decoder.incomplete

    def read(self) -> bool:
        """Take in what the socket holds; tell whether the client may send more.

        Raises
        ------
        ProtocolError
            This is no message.
        OSError
            The connection has failed.
        """
        try:
            data = self._sock.recv(
                _READ_BYTES if self._hello_by is None else self._decoder.missing_bytes
            )
        except BlockingIOError:
            return True
        if data:
            self.frames += self._decoder.feed(data)
            if self._hello_by is not None and self.frames:
                self._decoder = FrameDecoder(MAX_REQUEST_BYTES)
                self._hello_by = None
        return bool(data)

    # -- writing -------------------------------------------------------------------------------

    @property
    def is_slow(self) -> bool:
        """Whether so much waits for it that it should ask for nothing more."""
        return self._out_bytes > _PAUSE_BYTES

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send a message with descriptors, if some are given; what the socket does not take waits for `flush`.

        Raises
        ------
        StalledError
            Too much waits for it already.
        OSError
            The connection has failed.
        """
        if not self._out:
            try:
                sent = socket.send_fds(self._sock, [data], fds) if fds else self._sock.send(data)
            except BlockingIOError:
                sent = 0
            if sent == len(data):
                return
            if fds and not sent:
                raise StalledError("it asks for a descriptor and does not read")
            data = data[sent:]
        elif fds:
            raise StalledError("it asks for a descriptor and does not read")
        self._out_bytes += len(data)
        self._wait_with(data)
        if self._out_bytes > _MAX_UNREAD_BYTES:
            raise StalledError(f"it does not read: {self._out_bytes} bytes wait for it")

    def replay(self, data: bytes) -> None:
        """Have `flush` send what may be long, and is not to be the reason why its reader is dropped.

        Raises
        ------
        OSError
            The connection has failed.
        """
        self._wait_with(memoryview(data))

    def _wait_with(self, data: bytes | memoryview) -> None:
        self._out.append(data)
        if len(self._out) == 1:
            self._watch(_READ | _WRITE)

    def flush(self) -> None:
        """Send of what waits as much as the socket takes, or a piece of what is long; when that was all, a pause ends.

        Raises
        ------
        OSError
            The connection has failed.
        """
        out = self._out
        while out:
            try:
                sent = self._sock.send(out[0][:_PIECE_BYTES])
            except BlockingIOError:
                return
            if isinstance(out[0], bytes):
                self._out_bytes -= sent
            if self.paused_at is not None:
                self.paused_at = time.monotonic()
            if sent < len(out[0]):
                out[0] = out[0][sent:]
                return
            out.popleft()
        self.paused_at = None
        self._watch(_READ)

    def send_no_more(self) -> None:
        """Forget what waits to be sent, as nobody reads it any more; go on reading.

        Raises
        ------
        OSError
            The connection has failed.
        """
        self._out.clear()
        self._out_bytes = 0
        self.paused_at = None
        self._watch(_READ)

    def pause(self) -> None:
        """Read nothing more from it until all that waits is sent.

        Raises
        ------
        OSError
            The connection has failed.
        """
        self.paused_at = time.monotonic()
        self._watch(_WRITE)

    @property
    def owes_nothing(self) -> bool:
        """Whether the client has introduced itself, and reads what it is sent."""
        return self._hello_by is None and self.paused_at is None

    def is_awaited(self, now: float) -> bool:
        """Tell whether something is awaited of the client that it should do soon.

        Parameters
        ----------
        now : float
            The time, as `time.monotonic` has it.

        Raises
        ------
        StalledError
            It has not done so for too long.
        """
        if self._hello_by is not None:
            if now > self._hello_by:
                raise StalledError(f"it has not introduced itself within {_HELLO_SECONDS:.0f} s")
            return True
        if self.paused_at is None:
            return False
        since = now - self.paused_at
        if since > _PATIENCE_SECONDS:
            raise StalledError(
                f"it does not read: {self._out_bytes} bytes have waited for {since:.0f} s"
            )
        return True

    def _watch(self, events: int) -> None:
        self._selector.modify(self._sock, events, self)
