"""What a client may tell the store by way of its outbox (see `shmplasma.messages` and `shmplasma.outbox`).  Pure.

Each of these but `Gone` may come as a request as well, and is answered then.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct
from typing import ClassVar, Final, NamedTuple, get_args

from shmplasma.messages import Empty, OneId, decode_message
from shmplasma.protocol import ONE_WAY, Frame

__all__ = [
    "CLAIM",
    "HOLD",
    "PUBLISH",
    "PUBLISH_RECORD",
    "REMOVE",
    "Abort",
    "Claim",
    "Detach",
    "Gone",
    "Lend",
    "Posted",
    "Publish",
    "Redeem",
    "Release",
    "Remove",
    "Seal",
    "decode_posted",
    "stamp_of",
]

PUBLISH: Final = Struct("<20sQQII?")
"""Object id, offset, data size, metadata size, codec, and whether it is never to be evicted."""
PUBLISH_RECORD: Final = Struct(f"<HH{PUBLISH.format.lstrip('<')}")
"""Kind, length, and that: all of a record at once (see `shmplasma.outbox.Outbox.place`)."""


class _PublishFields(NamedTuple):
    object_id: bytes
    offset: int
    data_size: int
    metadata_size: int
    codec: int
    keep: bool = False


class Publish(_PublishFields):
    """An object lies sealed in the client's lease; always in the outbox.

    A tuple: to make a dataclass would take as long as half of what the store does with it.
    """

    KIND: ClassVar[int] = 17
    __slots__ = ()

    def encode(self) -> bytes:
        """Return the body."""
        return PUBLISH.pack(*self)

    @classmethod
    def decode(cls, body: bytes) -> Publish:
        """Return the message of a body."""
        return cls._make(PUBLISH.unpack(body))


def stamp_of(time_ns: int) -> int:
    """Return a time in milliseconds of 2^20 ns, which come again after 52 days."""
    return time_ns >> _STAMP_SHIFT & _STAMPS - 1


CLAIM: Final = Struct("<20sQQIIII")
"""Object id, offset, data size, metadata size, codec, slot, stamp."""
_STAMP_SHIFT: Final = 20
_STAMPS: Final = 1 << 32
_PROMPT: Final = 4
"""What was read within so many stamps counts from then."""


class _ClaimFields(NamedTuple):
    object_id: bytes
    offset: int
    data_size: int
    metadata_size: int
    codec: int
    slot: int
    stamp: int = 0


class Claim(_ClaimFields):
    """A client creates an object in its lease, under an id that it has locked (see `shmplasma.claims`); always in the outbox.

    `slot` pins it by its offset; `stamp` says when it was created, 0 that nobody knows.  A tuple, like `Publish`, for the same reason.
    """

    KIND: ClassVar[int] = 22
    __slots__ = ()

    def created_ns(self, now_ns: int) -> int:
        """Return when the object was created, to 2 ms, as the store may hear of it only with the seal.

        It is after the record was written, so after whatever was read before that: no two objects of an id have the same time.

        Examples
        --------
        >>> claim = Claim(20 * b"a", 0, 1, 0, 0, 0, stamp_of(5_000_000_000))
        >>> 5_000_000_000 < claim.created_ns(9_000_000_000) < 5_002_100_000
        True
        """
        age = (stamp_of(now_ns) - self.stamp) % _STAMPS if self.stamp else 0
        if not _PROMPT <= age < _STAMPS // 2:  # the other half are clocks that were set back
            return now_ns
        return max(0, now_ns - ((age - 1) << _STAMP_SHIFT))

    def encode(self) -> bytes:
        """Return the body."""
        return CLAIM.pack(*self)

    @classmethod
    def decode(cls, body: bytes) -> Claim:
        """Return the message of a body."""
        return cls._make(CLAIM.unpack(body))


@dataclass(frozen=True, slots=True)
class Seal(OneId):
    """The object is complete."""

    KIND: ClassVar[int] = 4
    object_id: bytes


@dataclass(frozen=True, slots=True)
class Abort(OneId):
    """The object will not be completed."""

    KIND: ClassVar[int] = 5
    object_id: bytes


REMOVE: Final = Struct("<20sQ")
"""Object id, time of creation."""


class _RemoveFields(NamedTuple):
    object_id: bytes
    created_ns: int


class Remove(_RemoveFields):
    """A sealed object is to be deleted, if it is still the one that was created at this time (see `shmplasma.removal`).

    A tuple, like `Publish`, for the same reason.
    """

    KIND: ClassVar[int] = 23
    __slots__ = ()

    def encode(self) -> bytes:
        """Return the body."""
        return REMOVE.pack(*self)

    @classmethod
    def decode(cls, body: bytes) -> Remove:
        """Return the message of a body."""
        return cls._make(REMOVE.unpack(body))


_LEND: Final = Struct("<20sQI")


@dataclass(frozen=True, slots=True)
class Lend:
    """A reference is about to leave this client (see `shmplasma.references`); always in the outbox.

    `receivers` is how many will redeem the ticket, 0 where nobody knows.
    """

    KIND: ClassVar[int] = 40
    object_id: bytes
    ticket: int
    receivers: int

    def encode(self) -> bytes:
        """Return the body."""
        return _LEND.pack(self.object_id, self.ticket, self.receivers)

    @classmethod
    def decode(cls, body: bytes) -> Lend:
        """Return the message of a body."""
        return cls(*_LEND.unpack(body))


_REDEEM: Final = Struct("<20sQQ")


@dataclass(frozen=True, slots=True)
class Redeem:
    """A reference has arrived: this client holds the object under `number`; by the outbox."""

    KIND: ClassVar[int] = 41
    object_id: bytes
    ticket: int
    number: int

    def encode(self) -> bytes:
        """Return the body."""
        return _REDEEM.pack(self.object_id, self.ticket, self.number)

    @classmethod
    def decode(cls, body: bytes) -> Redeem:
        """Return the message of a body."""
        return cls(*_REDEEM.unpack(body))


HOLD: Final = Struct("<20sQ")
"""Object id, and the number under which it is held."""


@dataclass(frozen=True, slots=True)
class Release:
    """The client does not hold the object under `number` any more; by the outbox, or one-way."""

    KIND: ClassVar[int] = 42
    object_id: bytes
    number: int

    def encode(self) -> bytes:
        """Return the body."""
        return HOLD.pack(self.object_id, self.number)

    @classmethod
    def decode(cls, body: bytes) -> Release:
        """Return the message of a body."""
        return cls(*HOLD.unpack(body))


@dataclass(frozen=True, slots=True)
class Detach(Empty):
    """The client leaves: its unsealed objects go; buffers that it still holds stay pinned; in the outbox if no store is there to hear it."""

    KIND: ClassVar[int] = 15


@dataclass(frozen=True, slots=True)
class Gone(Empty):
    """Nothing of the client is left, neither a thread in a call nor a buffer: its last record (see `shmplasma.outbox`)."""

    KIND: ClassVar[int] = 45


Posted = Publish | Claim | Seal | Abort | Remove | Lend | Redeem | Release | Detach | Gone

_KINDS: Final[dict[int, type[Posted]]] = {cls.KIND: cls for cls in get_args(Posted)}
_PUBLISH: Final = Publish.KIND
_REMOVE: Final = Remove.KIND
_new_tuple = tuple.__new__  # a named tuple's own constructor takes three times as long


def decode_posted(kind: int, body: bytes) -> Posted:
    """Return what a record of an outbox says; raise ProtocolError when it says nothing."""
    if kind == _PUBLISH and len(body) == PUBLISH.size:  # nearly every one
        return _new_tuple(Publish, PUBLISH.unpack(body))
    if kind == _REMOVE and len(body) == REMOVE.size:
        return _new_tuple(Remove, REMOVE.unpack(body))
    return decode_message(_KINDS, Frame(kind, ONE_WAY, body))
