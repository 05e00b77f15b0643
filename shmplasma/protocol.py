"""Frames: how messages are told apart in a byte stream.  Pure; no socket is seen here.

A frame is a header and a body::

    length of the body   request id   kind
    u32                  u32          u16 + 2 bytes of zeros        (little endian)

The request id is chosen by the client and comes back with the one reply that every request gets; 0 marks a
one-way message.  A reply to a request that was given up is recognized by its id and discarded.

Invariants
----------
* What is decoded does not depend on how the stream was cut.
* Bytes that are no frame raise `ProtocolError`, and nothing else; after that the decoder is of no more use.
* A decoder never holds more than one incomplete frame beside what it was just fed, hence at most
  `limit_bytes`.
"""

from __future__ import annotations

from struct import Struct
from typing import Final, NamedTuple

from shmplasma.errors import ProtocolError

__all__ = [
    "MAX_REPLY_BYTES",
    "MAX_REQUEST_BYTES",
    "ONE_WAY",
    "PROTOCOL_VERSION",
    "Frame",
    "FrameDecoder",
    "encode_frame",
    "split_frames",
]

PROTOCOL_VERSION: Final = 10
ONE_WAY: Final = 0

MAX_REQUEST_BYTES: Final = 2 << 20
"""Longest body that a store accepts: a get of 65,536 ids takes 1.6 MB, and nothing else as much."""
MAX_REPLY_BYTES: Final = 8 << 20
"""Longest body that a client accepts."""

_HEADER: Final = Struct("<IIHH")
_HEADER_BYTES: Final = _HEADER.size


class Frame(NamedTuple):
    """One message, undecoded."""

    kind: int
    request_id: int
    body: bytes


_new_tuple = tuple.__new__  # a named tuple's own constructor takes three times as long


def encode_frame(kind: int, request_id: int, body: bytes) -> bytes:
    """Return the bytes of one frame."""
    return _HEADER.pack(len(body), request_id, kind, 0) + body


def split_frames(data: bytes | bytearray, limit_bytes: int) -> tuple[list[Frame], int, int]:
    """Return the frames that some bytes begin with.

    Parameters
    ----------
    data : bytes-like
        A stream from the beginning of a frame on.
    limit_bytes : int
        Longest body that is accepted.

    Returns
    -------
    frames : list of Frame
        In order.
    consumed : int
        How many bytes they take.
    needed : int
        How many bytes must be there from there on before there can be another frame.

    Raises
    ------
    ProtocolError
        The bytes are no frames.
    """
    frames: list[Frame] = []
    start, end = 0, len(data)
    while end - start >= _HEADER_BYTES:
        length, request_id, kind, zeros = _HEADER.unpack_from(data, start)
        if length > limit_bytes or zeros:
            raise ProtocolError(
                f"not a frame: kind {kind} with {length} bytes (the limit is {limit_bytes})"
            )
        stop = start + _HEADER_BYTES + length
        if stop > end:
            return frames, start, _HEADER_BYTES + length
        body = bytes(data[start + _HEADER_BYTES : stop])
        frames.append(_new_tuple(Frame, (kind, request_id, body)))
        start = stop
    return frames, start, _HEADER_BYTES


class FrameDecoder:
    """Cuts a byte stream into frames.

    Parameters
    ----------
    limit_bytes : int
        Longest body that is accepted.
    """

    __slots__ = ("_buffer", "_limit", "_needed")

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._buffer = bytearray()
        self._needed = _HEADER_BYTES

    def feed(self, data: bytes) -> list[Frame]:
        """Take the next bytes of the stream and return the frames that they complete, in order.

        Raises
        ------
        ProtocolError
            The bytes are no frame.

        Notes
        -----
        O(bytes fed), however small the pieces are.
        """
        if not self._buffer:
            frames, consumed, self._needed = split_frames(data, self._limit)
            if consumed < len(data):
                self._buffer += data[consumed:]
            return frames
        self._buffer += data
        if len(self._buffer) < self._needed:
            return []
        frames, consumed, self._needed = split_frames(self._buffer, self._limit)
        del self._buffer[:consumed]
        return frames

    @property
    def missing_bytes(self) -> int:
        """How many bytes are needed before anything more can be decoded, at least 1."""
        return self._needed - len(self._buffer)

    @property
    def incomplete(self) -> bool:
        """Whether a frame has begun that has not ended: a stream must not end here."""
        return bool(self._buffer)
