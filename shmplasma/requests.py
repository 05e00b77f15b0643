"""What a client sends to the store (see `shmplasma.messages`).  Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from struct import Struct, pack, unpack
from typing import ClassVar, Final, NamedTuple, get_args

from shmplasma.layout import ID_BYTES
from shmplasma.messages import Empty, OneId, decode_message
from shmplasma.posted import (
    HOLD,
    Abort,
    Claim,
    Detach,
    Lend,
    Publish,
    Redeem,
    Release,
    Remove,
    Seal,
)
from shmplasma.protocol import Frame

__all__ = [
    "MAX_HOLDS",
    "MAX_KEPT_IDS",
    "MAX_NAME_BYTES",
    "AnswerNow",
    "AskLease",
    "Attach",
    "Bequeath",
    "Contains",
    "Create",
    "Debug",
    "Delete",
    "Evict",
    "Flush",
    "Get",
    "Grow",
    "Hello",
    "Hold",
    "Keep",
    "List",
    "Post",
    "Request",
    "Role",
    "SetOptions",
    "Trim",
    "decode_request",
    "holds_told",
]


class Role(IntEnum):
    """What a connection is for."""

    CLIENT = 0
    SUBSCRIBER = 1
    SUCCESSOR = 2
    """A store that is to take this one's place; the reply comes when it may."""


_HELLO: Final = Struct("<HHI")


MAX_KEPT_IDS: Final = 2048
"""All objects of a `Keep` are looked at in one turn of the loop: 2 us each."""
MAX_HOLDS: Final = 2048
"""A turn of the loop hears of one `Hold` of a client: 2 us for each of its references."""
MAX_NAME_BYTES: Final = 255
"""Of a client, in UTF-8: it stands in the descriptions that others read."""


def _name(text: bytes) -> str:
    if len(text) > MAX_NAME_BYTES:
        raise ValueError(f"a name has at most {MAX_NAME_BYTES} bytes")
    return text.decode()


@dataclass(frozen=True, slots=True)
class Hello:
    """The first message: who connects, and for what.

    `reclaim` is the first board + 1 of a client whose store has died, and who wants to go on; else 0.
    """

    KIND: ClassVar[int] = 1
    version: int
    role: Role
    name: str
    reclaim: int = 0

    def encode(self) -> bytes:
        """Return the body."""
        head = _HELLO.pack(self.version, self.role, self.reclaim)
        return head + self.name.encode()

    @classmethod
    def decode(cls, body: bytes) -> Hello:
        """Return the message of a body."""
        version, role, reclaim = _HELLO.unpack_from(body)
        return cls(version, Role(role), _name(body[_HELLO.size :]), reclaim)


@dataclass(frozen=True, slots=True)
class Attach(Empty):
    """Ask for the segment's file descriptor, by a client that cannot see its name."""

    KIND: ClassVar[int] = 2


_CREATE: Final = Struct("<20sqqII?q")


class _CreateFields(NamedTuple):
    object_id: bytes
    data_size: int
    metadata_size: int
    codec: int
    slot: int
    keep: bool = False
    timeout_ns: int = 0


class Create(_CreateFields):
    """Ask for a new object; `slot` will pin it for the writer, and with `keep` it is never evicted.

    `timeout_ns` says how long to wait for room: 0 not at all, -1 without an end.

    A tuple, like `Publish`, for the same reason.
    """

    KIND: ClassVar[int] = 3
    __slots__ = ()

    @property
    def size_bytes(self) -> int:
        """Bytes of data and metadata."""
        return self.data_size + self.metadata_size

    def encode(self) -> bytes:
        """Return the body."""
        return _CREATE.pack(*self)

    @classmethod
    def decode(cls, body: bytes) -> Create:
        """Return the message of a body."""
        create = cls._make(_CREATE.unpack(body))
        if create.timeout_ns < -1:
            raise ValueError("a timeout that is none")
        return create


_GET_FLAGS: Final = (0, 1, 3)
"""Whether it waits, and as well whether it may be hinted at."""


@dataclass(frozen=True, slots=True)
class Get:
    """Ask where objects are and pin them, each in a slot of its own, waiting for them or not.

    One that waits for a single object may be `hinted` at it by whoever puts that (see `shmplasma.hints`).
    """

    KIND: ClassVar[int] = 6
    wait: bool
    object_ids: Sequence[bytes]
    slots: Sequence[int]
    hinted: bool = False

    def encode(self) -> bytes:
        """Return the body."""
        count = len(self.object_ids)
        flags = self.wait | self.hinted << 1
        return b"".join((pack(f"<BI{count}I", flags, count, *self.slots), *self.object_ids))

    @classmethod
    def decode(cls, body: bytes) -> Get:
        """Return the message of a body."""
        flags, count = body[0], int.from_bytes(body[1:5], "little")
        ids = 5 + 4 * count
        if len(body) != ids + ID_BYTES * count or flags not in _GET_FLAGS:
            raise ValueError("the lengths of ids and slots differ, or flags that no get has")
        wait, hinted = bool(flags & 1), bool(flags & 2)
        if hinted and count != 1:
            raise ValueError("a get of several objects is hinted at none")
        slots = unpack(f"<{count}I", body[5:ids])
        return cls(
            wait,
            [body[at : at + ID_BYTES] for at in range(ids, len(body), ID_BYTES)],
            slots,
            hinted,
        )


@dataclass(frozen=True, slots=True)
class AnswerNow:
    """Answer the get of that request id with what is there; refuse the create of that id that waits."""

    KIND: ClassVar[int] = 7
    request_id: int

    def encode(self) -> bytes:
        """Return the body."""
        return pack("<I", self.request_id)

    @classmethod
    def decode(cls, body: bytes) -> AnswerNow:
        """Return the message of a body."""
        return cls(*unpack("<I", body))


@dataclass(frozen=True, slots=True)
class Contains(OneId):
    """Ask whether a sealed object is there."""

    KIND: ClassVar[int] = 8
    object_id: bytes


def _ids(body: bytes) -> list[bytes]:
    if len(body) % ID_BYTES:
        raise ValueError("not a whole number of ids")
    return [body[at : at + ID_BYTES] for at in range(0, len(body), ID_BYTES)]


@dataclass(frozen=True, slots=True)
class Delete:
    """Delete sealed objects, those in use at their last release."""

    KIND: ClassVar[int] = 9
    object_ids: Sequence[bytes]

    def encode(self) -> bytes:
        """Return the body."""
        return b"".join(self.object_ids)

    @classmethod
    def decode(cls, body: bytes) -> Delete:
        """Return the message of a body."""
        return cls(_ids(body))


@dataclass(frozen=True, slots=True)
class Evict:
    """Evict at least so many bytes, if possible."""

    KIND: ClassVar[int] = 10
    size_bytes: int

    def encode(self) -> bytes:
        """Return the body."""
        return pack("<q", self.size_bytes)

    @classmethod
    def decode(cls, body: bytes) -> Evict:
        """Return the message of a body."""
        return cls(*unpack("<q", body))


@dataclass(frozen=True, slots=True)
class List:
    """Ask for the objects from an entry on."""

    KIND: ClassVar[int] = 11
    start: int

    def encode(self) -> bytes:
        """Return the body."""
        return pack("<Q", self.start)

    @classmethod
    def decode(cls, body: bytes) -> List:
        """Return the message of a body."""
        return cls(*unpack("<Q", body))


@dataclass(frozen=True, slots=True)
class SetOptions:
    """Name this client and limit the bytes that it may hold; a limit of 0 is the store's default."""

    KIND: ClassVar[int] = 12
    limit_bytes: int
    name: str

    def encode(self) -> bytes:
        """Return the body."""
        return pack("<Q", self.limit_bytes) + self.name.encode()

    @classmethod
    def decode(cls, body: bytes) -> SetOptions:
        """Return the message of a body."""
        (limit_bytes,) = unpack("<Q", body[:8])
        return cls(limit_bytes, _name(body[8:]))


@dataclass(frozen=True, slots=True)
class Debug(Empty):
    """Ask for a description of the store's state."""

    KIND: ClassVar[int] = 13


_LEASE: Final = Struct("<Q?")
_TICKET: Final = Struct("<Q")


@dataclass(frozen=True, slots=True)
class AskLease:
    """Ask for a lease that has room for an object of this size; what is left of the last one goes back.

    Nothing is evicted for one that is asked for `ahead`, as nobody may need it.
    """

    KIND: ClassVar[int] = 16
    needed_bytes: int
    ahead: bool = False

    def encode(self) -> bytes:
        """Return the body."""
        return _LEASE.pack(self.needed_bytes, self.ahead)

    @classmethod
    def decode(cls, body: bytes) -> AskLease:
        """Return the message of a body."""
        return cls(*_LEASE.unpack(body))


@dataclass(frozen=True, slots=True)
class Flush(Empty):
    """Ask for an answer, which comes when all that was sent before has been handled."""

    KIND: ClassVar[int] = 18


@dataclass(frozen=True, slots=True)
class Post(Empty):
    """There is something in the client's outbox (`shmplasma.outbox`); one-way."""

    KIND: ClassVar[int] = 19


@dataclass(frozen=True, slots=True)
class Hold:
    """What this client holds, up to `MAX_HOLDS` references, and the ticket that this uses up, 0 for none.

    A client that comes back to a store ends with a Hold of nothing: it holds no more than it has said.
    """

    KIND: ClassVar[int] = 43
    ticket: int
    holds: Sequence[tuple[bytes, int]]

    def encode(self) -> bytes:
        """Return the body."""
        return _TICKET.pack(self.ticket) + b"".join(HOLD.pack(*hold) for hold in self.holds)

    @classmethod
    def decode(cls, body: bytes) -> Hold:
        """Return the message of a body."""
        (ticket,) = _TICKET.unpack(body[:8])
        if len(body) > 8 + MAX_HOLDS * HOLD.size:
            raise ValueError(f"it holds more than {MAX_HOLDS} references")
        return cls(ticket, [*HOLD.iter_unpack(body[8:])])


def holds_told(holds: Sequence[tuple[bytes, int]]) -> list[Hold]:
    """Return what tells of any number of references."""
    return [Hold(0, holds[start : start + MAX_HOLDS]) for start in range(0, len(holds), MAX_HOLDS)]


@dataclass(frozen=True, slots=True)
class Bequeath:
    """Lend up to `MAX_HOLDS` objects, by one ticket, to a child that is about to be forked."""

    KIND: ClassVar[int] = 44
    ticket: int
    object_ids: Sequence[bytes]

    def encode(self) -> bytes:
        """Return the body."""
        return _TICKET.pack(self.ticket) + b"".join(self.object_ids)

    @classmethod
    def decode(cls, body: bytes) -> Bequeath:
        """Return the message of a body."""
        (ticket,) = _TICKET.unpack(body[:8])
        object_ids = _ids(body[8:])
        if len(object_ids) > MAX_HOLDS:
            raise ValueError(f"it lends more than {MAX_HOLDS} objects")
        return cls(ticket, object_ids)


@dataclass(frozen=True, slots=True)
class Keep:
    """Say of up to `MAX_KEPT_IDS` objects whether they are never to be evicted; all of them have to be there."""

    KIND: ClassVar[int] = 20
    keep: bool
    object_ids: Sequence[bytes]

    def encode(self) -> bytes:
        """Return the body."""
        return pack("<?", self.keep) + b"".join(self.object_ids)

    @classmethod
    def decode(cls, body: bytes) -> Keep:
        """Return the message of a body."""
        if body[0] > 1:
            raise ValueError("neither to keep nor not to")
        if len(body) > 1 + MAX_KEPT_IDS * ID_BYTES:
            raise ValueError(f"it is to keep more than {MAX_KEPT_IDS} objects")
        return cls(bool(body[0]), _ids(body[1:]))


@dataclass(frozen=True, slots=True)
class Trim(Empty):
    """Ask for memory that is committed and not used to be given back to the system."""

    KIND: ClassVar[int] = 21


@dataclass(frozen=True, slots=True)
class Grow(Empty):
    """Ask for one more board."""

    KIND: ClassVar[int] = 14


Request = (
    Hello
    | Attach
    | Create
    | Seal
    | Abort
    | Get
    | AnswerNow
    | Contains
    | Delete
    | Evict
    | List
    | SetOptions
    | Debug
    | Grow
    | Detach
    | AskLease
    | Publish
    | Claim
    | Flush
    | Post
    | Keep
    | Lend
    | Redeem
    | Release
    | Remove
    | Hold
    | Bequeath
    | Trim
)

_KINDS: Final[dict[int, type[Request]]] = {cls.KIND: cls for cls in get_args(Request)}


def decode_request(frame: Frame) -> Request:
    """Return the request in a frame; raise ProtocolError when it holds none."""
    return decode_message(_KINDS, frame)
