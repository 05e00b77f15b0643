"""What all messages between a client and the store have in common, and the conversation that they make.  Pure.

Each message is a frozen dataclass with ``encode() -> bytes`` and ``decode(body)``; its `KIND` goes into the
frame's header.  `shmplasma.requests` and `shmplasma.posted` have those that a client sends, `shmplasma.replies` those of the store.
Numbers are little-endian; an object id is 20 bytes.

The conversation
----------------
A connection begins with `Hello`, answered by `Welcome` or `Failed`.  After that each request gets exactly one
reply under its request id.  `AnswerNow` and `Post` are always one-way, `Hold`, `Release` and `SetOptions` at times; what
`shmplasma.posted` has is mostly not sent at all, but a record of the outbox.

A `Get` that waits is answered when all of its objects are there, or when its client sends `AnswerNow` (its
time is over, or it was interrupted): then with those that are.  Time is thus kept by the client alone.
"""

from __future__ import annotations

from struct import error
from typing import ClassVar, Protocol, Self, TypeVar

from shmplasma.errors import ProtocolError
from shmplasma.layout import ID_BYTES
from shmplasma.protocol import Frame

__all__ = ["Empty", "Message", "OneId", "decode_message"]

MessageT_co = TypeVar("MessageT_co", bound="Message", covariant=True)


class Message(Protocol):
    """What all messages have in common."""

    KIND: ClassVar[int]

    def encode(self) -> bytes:
        """Return the body."""

    @classmethod
    def decode(cls, body: bytes) -> Self:
        """Return the message of a body; any exception of `struct` or a ValueError means a bad one."""


class Empty:
    """A message without a body."""

    __slots__ = ()

    def encode(self) -> bytes:
        """Return the body."""
        return b""

    @classmethod
    def decode(cls, body: bytes) -> Self:
        """Return the message of a body."""
        if body:
            raise ValueError("this message has no body")
        return cls()


class OneId:
    """A message whose body is an object id."""

    __slots__ = ()
    object_id: bytes

    def encode(self) -> bytes:
        """Return the body."""
        return self.object_id

    @classmethod
    def decode(cls, body: bytes) -> Self:
        """Return the message of a body."""
        if len(body) != ID_BYTES:
            raise ValueError("an object id has 20 bytes")
        message = cls.__new__(cls)
        object.__setattr__(message, "object_id", body)
        return message


def decode_message(kinds: dict[int, type[MessageT_co]], frame: Frame) -> MessageT_co:
    """Return the message in a frame.

    Parameters
    ----------
    kinds : dict
        The classes that may come, by their kind.
    frame : Frame
        What came.

    Raises
    ------
    ProtocolError
        The kind is unknown or the body is not one of this kind.
    """
    try:
        return kinds[frame.kind].decode(frame.body)
    except KeyError:
        raise ProtocolError(f"no message of the kind {frame.kind} may come here") from None
    except (error, ValueError, IndexError) as reason:
        name = kinds[frame.kind].__name__
        raise ProtocolError(f"a malformed {name}: {reason}") from reason
