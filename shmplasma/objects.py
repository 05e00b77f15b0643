"""Object ids: what a user names an object by."""

from __future__ import annotations

import os
from collections.abc import Iterable
from struct import iter_unpack
from typing import Final
from zlib import crc32

from shmplasma.layout import ID_BYTES

__all__ = ["ObjectID", "fresh_id", "is_fresh", "object_ids"]

_DRAWN_AT_ONCE: Final = 64
"""A system call takes as long as half a put, whether it brings one id or these."""
_MARK: Final = b"\xf5\x9a\x1c\xe7"
"""How the ids end that nobody chose: any four bytes that are unlikely in one that somebody did."""
_random: list[ObjectID] = []
_fresh: list[ObjectID] = []


def _draw_anew() -> None:
    """Draw other ids than the parent, in a forked child: also when a signal handler forks in the middle of `_draw`, which fills its parent's list then."""
    global _random, _fresh
    _random, _fresh = [], []


os.register_at_fork(after_in_child=_draw_anew)


class ObjectID:
    """The name of an object: 20 bytes.

    Parameters
    ----------
    object_id : bytes
        Exactly 20 bytes.

    Raises
    ------
    ValueError
        `object_id` is not bytes, or not 20 of them.

    Notes
    -----
    Immutable, hashable, picklable, weakly referable; safe to share between threads.

    Examples
    --------
    >>> ObjectID(20 * b"a")
    ObjectID(6161616161616161616161616161616161616161)
    >>> ObjectID(20 * b"a") == ObjectID(20 * b"a")
    True
    >>> ObjectID(b"short")
    Traceback (most recent call last):
    ...
    ValueError: an object id has 20 bytes, not 5; ObjectID.from_random() makes one
    """

    __slots__ = ("__weakref__", "hash32", "id_bytes")

    id_bytes: bytes
    hash32: int

    def __init__(self, object_id: bytes) -> None:
        if not isinstance(object_id, bytes):
            raise ValueError(  # noqa: TRY004 - as Plasma does
                f"an object id is made of {ID_BYTES} bytes, not of {type(object_id).__name__}"
            )
        if len(object_id) != ID_BYTES:
            raise ValueError(
                f"an object id has {ID_BYTES} bytes, not {len(object_id)}; "
                "ObjectID.from_random() makes one"
            )
        self.id_bytes = object_id
        # The table's hash.  Python's own differs between processes; CRC-32 is stable, in C, and
        # spreads the ids that people choose by hand (repeated letters, counters) over the buckets.
        self.hash32 = crc32(object_id)

    @staticmethod
    def from_random() -> ObjectID:
        """Return a fresh id from the system's random source; collisions are not to be expected."""
        try:
            return _random.pop()
        except IndexError:
            return _draw(_random, ID_BYTES)

    def binary(self) -> bytes:
        """Return the 20 bytes."""
        return self.id_bytes

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ObjectID):
            return NotImplemented
        return self.id_bytes == other.id_bytes

    def __hash__(self) -> int:
        return hash(self.id_bytes)

    def __reduce__(self) -> tuple[type[ObjectID], tuple[bytes]]:
        return ObjectID, (self.id_bytes,)

    def __repr__(self) -> str:
        return f"ObjectID({self.id_bytes.hex()})"


def _draw(pool: list[ObjectID], n_random: int, tail: bytes = b"") -> ObjectID:
    """Return an id of so many random bytes and a tail, and put more of the kind into a pool."""
    drawn = os.urandom(_DRAWN_AT_ONCE * n_random)
    ids = object_ids([name + tail for (name,) in iter_unpack(f"{n_random}s", drawn)])
    own = ids.pop()  # not shared: another thread may take all that are
    pool.extend(ids)
    return own


def object_ids(names: Iterable[bytes]) -> list[ObjectID]:
    """Return ids of names that are known to have 20 bytes; not to check that takes half as long.

    Examples
    --------
    >>> object_ids([20 * b"a"]) == [ObjectID(20 * b"a")]
    True
    """
    new, ids = ObjectID.__new__, []
    for name in names:
        object_id = new(ObjectID)
        object_id.id_bytes, object_id.hash32 = name, crc32(name)
        ids.append(object_id)
    return ids


def fresh_id() -> ObjectID:
    """Return an id for an object that is put under none; it has 16 random bytes, and a mark (see `shmplasma.claims`).

    Examples
    --------
    >>> is_fresh(fresh_id().binary()), is_fresh(ObjectID.from_random().binary())
    (True, False)
    """
    try:
        return _fresh.pop()
    except IndexError:
        return _draw(_fresh, ID_BYTES - len(_MARK), _MARK)


def is_fresh(object_id: bytes) -> bool:
    """Tell whether an id may be one of `fresh_id`."""
    return object_id.endswith(_MARK)
