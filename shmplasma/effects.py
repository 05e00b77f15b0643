"""What the store's state machine wants done: the server carries it out.  Pure."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

__all__ = ["Adopt", "Await", "Descriptor", "Drop", "Effect", "Forget", "HandOver", "Replay", "Send"]


class Descriptor(Enum):
    """A file descriptor that goes along with a message."""

    SEGMENT = "segment"
    WAKE = "wake"
    """The wake-up pipe; after it comes a description of the segment's file, by which the client locks ids, if there is one."""


class Send(NamedTuple):
    """Send these bytes to a client, in order, with a descriptor if one is named."""

    client: int
    data: bytes
    descriptor: Descriptor | None = None


class Replay(NamedTuple):
    """Send a new subscriber these notifications, however many, in its own time; what is sent after them waits behind them."""

    client: int
    data: bytes


class Drop(NamedTuple):
    """Close the client's connection; what was sent before is out as far as the socket took it."""

    client: int
    reason: str


class Adopt(NamedTuple):
    """Let a connection go on under the number of a client which it has shown to be."""

    client: int
    number: int


class Await(NamedTuple):
    """Tell when the process has ended that this client, whose connection has, was of, or that nobody can tell."""

    client: int
    pid: int
    start_time: int


class Forget(NamedTuple):
    """Forget a client that has said that nothing of it is left, unless it has a connection, which then ends."""

    client: int


class HandOver(NamedTuple):
    """Leave segment and socket to another store: handle what was sent, and end."""

    client: int


Effect = Send | Replay | Drop | Adopt | Await | Forget | HandOver
