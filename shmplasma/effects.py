"""What the store's state machine wants done: the server carries it out.  Pure."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

__all__ = ["Descriptor", "Drop", "Effect", "Send"]


class Descriptor(Enum):
    """A file descriptor that goes along with a message."""

    SEGMENT = "segment"
    WAKE = "wake"


class Send(NamedTuple):
    """Send these bytes to a client, in order, with a descriptor if one is named."""

    client: int
    data: bytes
    descriptor: Descriptor | None = None


class Drop(NamedTuple):
    """Close the client's connection; what was sent before is out as far as the socket took it."""

    client: int
    reason: str


Effect = Send | Drop
