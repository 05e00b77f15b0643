"""Lists of objects, as the store sends them and as users see them: the fields of all objects at once, by NumPy."""

from __future__ import annotations

import sys
from typing import Final, TypedDict

import numpy as np

from shmplasma.layout import ENTRY_BYTES, ID_BYTES, EntryState, EntryWord
from shmplasma.objects import ObjectID, object_ids
from shmplasma.replies import Listing

__all__ = ["ObjectInfo", "described"]

_FIELDS: Final = {
    "state": (np.uint8, EntryWord.STATE * 8 + (0 if sys.byteorder == "little" else 7)),
    "id": (f"V{ID_BYTES}", EntryWord.ID * 8),
    "data_size": (np.uint64, EntryWord.DATA_SIZE * 8),
    "metadata_size": (np.uint64, EntryWord.METADATA_SIZE * 8),
    "created_ns": (np.uint64, EntryWord.CREATED_NS * 8),
    "construct_ns": (np.uint64, EntryWord.CONSTRUCT_NS * 8),
    "keep": (np.uint64, EntryWord.KEEP * 8),
}
_ENTRY: Final = np.dtype(
    {
        "names": list(_FIELDS),
        "formats": [kind for kind, _ in _FIELDS.values()],
        "offsets": [offset for _, offset in _FIELDS.values()],
        "itemsize": ENTRY_BYTES,
    }
)
_SECOND: Final = np.uint64(10**9)


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
    entries = np.frombuffer(listing.entries, _ENTRY)
    is_created = entries["state"] == EntryState.CREATED
    took = (entries["construct_ns"] // _SECOND).astype(np.int64)
    fields = zip(
        object_ids(entries["id"].tolist()),
        entries["data_size"].tolist(),
        entries["metadata_size"].tolist(),
        np.frombuffer(listing.holders, np.uint32).tolist(),
        (entries["created_ns"] // _SECOND).tolist(),
        np.where(is_created, -1, took).tolist(),
        np.where(is_created, "created", "sealed").astype(object).tolist(),
        (entries["keep"] != 0).tolist(),
        strict=True,
    )
    return {
        object_id: {
            "data_size": data_size,
            "metadata_size": metadata_size,
            "ref_count": holders,
            "create_time": created,
            "construct_duration": seconds,
            "state": state,
            "keep": keep,
        }
        for object_id, data_size, metadata_size, holders, created, seconds, state, keep in fields
    }
