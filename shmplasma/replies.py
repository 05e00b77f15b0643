"""What the store sends to a client (see `shmplasma.messages`).  Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from struct import Struct, pack, unpack
from typing import ClassVar, Final, get_args

from shmplasma.errors import Holder
from shmplasma.layout import ENTRY_BYTES
from shmplasma.messages import Empty, decode_message
from shmplasma.protocol import Frame

__all__ = [
    "ABSENT",
    "NOTIFICATION",
    "Created",
    "Done",
    "Failed",
    "Failure",
    "Found",
    "Leased",
    "Listing",
    "Number",
    "Objects",
    "Reply",
    "Text",
    "Welcome",
    "decode_reply",
]


class Failure(IntEnum):
    """Why a request was refused."""

    EXISTS = 1
    NOT_FOUND = 2
    FULL = 3
    OVER_QUOTA = 4
    SEALED = 5
    VERSION = 6
    NO_BOARD = 7
    DROPPED = 8
    """Not an answer: the last that a client hears, under the request id 0."""
    EXTERNAL = 9


_WELCOME: Final = Struct("<16sI??")


@dataclass(frozen=True, slots=True)
class Welcome:
    """What a client needs to attach; the path is a file name, and need be no UTF-8."""

    KIND: ClassVar[int] = 64
    token: bytes
    board: int
    fast_path: bool
    reclaimed: bool
    segment_kind: str
    segment_path: str

    def encode(self) -> bytes:
        """Return the body."""
        text = f"{self.segment_kind}\0{self.segment_path}".encode(errors="surrogateescape")
        return _WELCOME.pack(self.token, self.board, self.fast_path, self.reclaimed) + text

    @classmethod
    def decode(cls, body: bytes) -> Welcome:
        """Return the message of a body."""
        token, board, fast_path, reclaimed = _WELCOME.unpack_from(body)
        text = body[_WELCOME.size :].decode(errors="surrogateescape")
        segment_kind, segment_path = text.split("\0")
        return cls(token, board, fast_path, reclaimed, segment_kind, segment_path)


@dataclass(frozen=True, slots=True)
class Done(Empty):
    """It was done."""

    KIND: ClassVar[int] = 65


_FAILED: Final = Struct("<H10QB")
_HOLDER: Final = Struct("<IQdBB")
"""Pid, held bytes, age in seconds, and the lengths of name and command, which follow."""


def _cut(text: str) -> bytes:
    """Return as much of a text as fits 255 bytes."""
    return text.encode(errors="replace")[:255].decode(errors="ignore").encode()


@dataclass(frozen=True, slots=True)
class Failed:
    """It was refused.

    Attributes
    ----------
    failure : Failure
        Why.
    text : str
        The fact and the remedy.
    holders : sequence of Holder
        At most 255, whose names and commands are cut at 255 bytes.
    requested_bytes, free_bytes, ..., spillable_bytes : int
        The store's room at that moment, for a failure that is about room; else 0.
    limit_bytes, held_bytes : int
        The client's limit and what it holds, if that is the reason; else 0.
    """

    KIND: ClassVar[int] = 66
    failure: Failure
    text: str
    holders: Sequence[Holder] = ()
    requested_bytes: int = 0
    free_bytes: int = 0
    largest_bytes: int = 0
    pinned_bytes: int = 0
    unsealed_bytes: int = 0
    leased_bytes: int = 0
    kept_bytes: int = 0
    spillable_bytes: int = 0
    limit_bytes: int = 0
    held_bytes: int = 0

    def encode(self) -> bytes:
        """Return the body."""
        parts = [
            _FAILED.pack(
                self.failure,
                self.requested_bytes,
                self.free_bytes,
                self.largest_bytes,
                self.pinned_bytes,
                self.unsealed_bytes,
                self.leased_bytes,
                self.kept_bytes,
                self.spillable_bytes,
                self.limit_bytes,
                self.held_bytes,
                len(self.holders),
            )
        ]
        for holder in self.holders:
            name, command = _cut(holder.name), _cut(holder.command)
            sizes = len(name), len(command)
            figures = holder.pid, holder.held_bytes, holder.age_seconds
            parts += [_HOLDER.pack(*figures, *sizes), name, command]
        return b"".join(parts) + self.text.encode(errors="replace")  # it may name a file

    @classmethod
    def decode(cls, body: bytes) -> Failed:
        """Return the message of a body."""
        failure, *figures, n_holders = _FAILED.unpack_from(body)
        at = _FAILED.size
        holders: list[Holder] = []
        for _ in range(n_holders):
            pid, held_bytes, age_seconds, *sizes = _HOLDER.unpack_from(body, at)
            at += _HOLDER.size
            texts: list[str] = []
            for size in sizes:
                texts.append(body[at : at + size].decode())
                at += size
            holders.append(Holder(texts[0], pid, texts[1], held_bytes, age_seconds))
        if at > len(body):
            raise ValueError("a holder's name is missing")
        return cls(Failure(failure), body[at:].decode(), holders, *figures)


_OFFSET: Final = Struct("<Q")


@dataclass(frozen=True, slots=True)
class Created:
    """Where the new object's bytes go."""

    KIND: ClassVar[int] = 67
    offset: int

    def encode(self) -> bytes:
        """Return the body."""
        return _OFFSET.pack(self.offset)

    @classmethod
    def decode(cls, body: bytes) -> Created:
        """Return the message of a body."""
        return cls(*_OFFSET.unpack(body))


@dataclass(frozen=True, slots=True)
class Leased:
    """A lease: an extent, how many objects it may publish, and its epoch; none if its size is 0."""

    KIND: ClassVar[int] = 72
    offset: int
    size_bytes: int
    objects: int
    epoch: int

    def encode(self) -> bytes:
        """Return the body."""
        return pack("<4Q", self.offset, self.size_bytes, self.objects, self.epoch)

    @classmethod
    def decode(cls, body: bytes) -> Leased:
        """Return the message of a body."""
        return cls(*unpack("<4Q", body))


Found = tuple[int, int, int, int]
"""Offset, data size, metadata size (bytes) and codec of a sealed object."""
ABSENT: Final[Found] = (0, 0, 0, 0)
"""Stands for an object that is not there: no object lies at offset 0."""
_FOUND: Final = Struct("<QQQI")


@dataclass(frozen=True, slots=True)
class Objects:
    """Where the objects of a get are, in its order; those found are pinned in their slots."""

    KIND: ClassVar[int] = 68
    found: Sequence[Found]

    def encode(self) -> bytes:
        """Return the body."""
        return b"".join([_FOUND.pack(*found) for found in self.found])

    @classmethod
    def decode(cls, body: bytes) -> Objects:
        """Return the message of a body."""
        return cls(list(_FOUND.iter_unpack(body)))


@dataclass(frozen=True, slots=True)
class Number:
    """A count, a size, a board or a truth value."""

    KIND: ClassVar[int] = 69
    value: int

    def encode(self) -> bytes:
        """Return the body."""
        return pack("<q", self.value)

    @classmethod
    def decode(cls, body: bytes) -> Number:
        """Return the message of a body."""
        return cls(*unpack("<q", body))


_PART: Final = Struct("<QI")
"""Where the next part begins, and how many objects this one has."""


@dataclass(frozen=True, slots=True)
class Listing:
    """A part of the list: objects as the table has them, and how many hold them.

    `next_start` is where the next part begins, 0 after the last; `holders` has four bytes, `entries` `ENTRY_BYTES` for
    each object, in the machine's byte order.
    """

    KIND: ClassVar[int] = 70
    next_start: int
    holders: bytes
    entries: bytes

    def encode(self) -> bytes:
        """Return the body."""
        head = _PART.pack(self.next_start, len(self.holders) // 4)
        return b"".join((head, self.holders, self.entries))

    @classmethod
    def decode(cls, body: bytes) -> Listing:
        """Return the message of a body."""
        next_start, n_objects = _PART.unpack_from(body)
        end = _PART.size + n_objects * 4
        if len(body) != end + n_objects * ENTRY_BYTES:
            raise ValueError(f"{len(body)} bytes for {n_objects} objects")
        return cls(next_start, body[_PART.size : end], body[end:])


@dataclass(frozen=True, slots=True)
class Text:
    """A text for people."""

    KIND: ClassVar[int] = 71
    text: str

    def encode(self) -> bytes:
        """Return the body."""
        return self.text.encode()

    @classmethod
    def decode(cls, body: bytes) -> Text:
        """Return the message of a body."""
        return cls(body.decode())


NOTIFICATION: Final = Struct("<20sqq")
"""On a subscriber's connection: id, data size, metadata size, both -1 for an object that has gone.  There
a u64 that counts bytes takes the place of a frame's header, as in Plasma."""

Reply = Welcome | Done | Failed | Created | Objects | Number | Listing | Text | Leased

_KINDS: Final[dict[int, type[Reply]]] = {cls.KIND: cls for cls in get_args(Reply)}


def decode_reply(frame: Frame) -> Reply:
    """Return the reply in a frame; raise ProtocolError when it holds none."""
    return decode_message(_KINDS, frame)
