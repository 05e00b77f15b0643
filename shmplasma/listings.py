"""Lists of objects, as the store sends them and as users see them."""

from __future__ import annotations

from struct import Struct
from typing import Final, TypedDict

from shmplasma.layout import STATE_MASK, EntryState
from shmplasma.objects import ObjectID, object_ids
from shmplasma.replies import Listing

__all__ = ["ObjectInfo", "described"]

_ENTRY: Final = Struct("@Q20s12xQQ8xQQ16xQ24x")
"""An entry's state word, id, data size, metadata size, when it was created, nanoseconds from then to the seal, and KEEP."""
_CREATED: Final = int(EntryState.CREATED)
_SECOND: Final = 10**9


class ObjectInfo(TypedDict):
    """What `PlasmaClient.list` says of an object.

    Sizes are bytes, `create_time` is in seconds since 1970, `construct_duration` in seconds (-1 until it is
    sealed), `ref_count` the number of clients that hold it, `state` "created" or "sealed"; `keep` says whether it
    is never evicted.
    """

    data_size: int
    metadata_size: int
    ref_count: int
    create_time: int
    construct_duration: int
    state: str
    keep: bool


def described(listing: Listing) -> dict[ObjectID, ObjectInfo]:
    """Return what a part of the list says, by id; O(objects), 0.5 us each."""
    entries = list(_ENTRY.iter_unpack(listing.entries))
    ids = object_ids(entry[1] for entry in entries)
    holders = memoryview(listing.holders).cast("I")
    objects: dict[ObjectID, ObjectInfo] = {}
    for object_id, n_holders, entry in zip(ids, holders, entries, strict=True):
        word, _, data_size, metadata_size, created_ns, construct_ns, keep = entry
        is_created = word & STATE_MASK == _CREATED
        objects[object_id] = {  # a call would take 0.5 us more
            "data_size": data_size,
            "metadata_size": metadata_size,
            "ref_count": n_holders,
            "create_time": created_ns // _SECOND,
            "construct_duration": -1 if is_created else construct_ns // _SECOND,
            "state": "created" if is_created else "sealed",
            "keep": keep != 0,
        }
    return objects
