"""What the store says of its objects: lists, notifications, and a text for people.  Pure; changes nothing."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from shmplasma.layout import EntryState, Layout
from shmplasma.lifecycle import Lifecycle
from shmplasma.pins import Boards
from shmplasma.references import References
from shmplasma.replies import NOTIFICATION, Listing
from shmplasma.room import Room
from shmplasma.table import Table

__all__ = ["describe", "list_objects", "notification", "printable", "sealed_notifications"]

_SEALED: Final = frozenset(
    (EntryState.SEALED, EntryState.DOOMED, EntryState.MOVING, EntryState.SPILLED)
)
_LIST_OBJECTS: Final = 4096
"""Objects that one `Listing` covers at most: half a megabyte."""
_LIST_ENTRIES: Final = 1 << 16
"""Entries that are looked at for one: a millisecond, if there is nothing in them."""


def list_objects(table: Table, holders: Mapping[int, int], start: int) -> Listing:
    """Return what there is from an entry on, sealed or not.

    Parameters
    ----------
    table : Table
        The object table.
    holders : mapping of int to int
        How many clients hold each entry; 0 for those that are missing.
    start : int
        The first entry.
    """
    stop = start + _LIST_ENTRIES
    listed, entries = table.listed(start, stop, _LIST_OBJECTS)
    counts = array("I", [holders.get(entry, 0) for entry in listed])
    if not start and len(listed) == len(table):
        next_start = 0
    else:
        next_start = listed[-1] + 1 if len(listed) == _LIST_OBJECTS else stop
    return Listing(next_start if next_start < table.end else 0, counts.tobytes(), entries)


def notification(object_id: bytes, data_size: int, metadata_size: int) -> bytes:
    """Return what a subscriber gets for one object; sizes are -1 for one that has gone."""
    record = NOTIFICATION.pack(object_id, data_size, metadata_size)
    return len(record).to_bytes(8, "little") + record


def sealed_notifications(
    summaries: Iterable[tuple[int, bytes, int, int]], told: set[bytes]
) -> bytes:
    """Return a notification for each object that is sealed, wherever it lies, in a row, and note of which: 44 bytes and 0.5 us each."""
    pack, length, sealed = NOTIFICATION.pack, NOTIFICATION.size.to_bytes(8, "little"), _SEALED
    parts = []
    for state, object_id, data_size, metadata_size in summaries:
        if state in sealed:
            told.add(object_id)
            parts.append(length + pack(object_id, data_size, metadata_size))
    return b"".join(parts)


def describe(
    layout: Layout,
    table: Table,
    boards: Boards,
    room: Room,
    objects: Lifecycle,
    references: References,
    clients: Sequence[str],
    n_waiting: int,
) -> str:
    """Return the store's figures, one a line."""
    held = boards.pinned()
    return "\n".join(
        (
            f"capacity bytes: {layout.capacity}",
            f"free bytes: {room.free_bytes}",
            f"largest free extent: {room.largest_bytes}",
            f"largest free extent of all free bytes: {room.largest_bytes / (room.free_bytes or 1):.0%}",
            f"committed bytes: {room.commitment.committed_bytes}",
            f"trims: {room.commitment.trims}",
            f"pinned bytes: {objects.bytes_of(held)}",
            f"unsealed bytes: {objects.unsealed_bytes}",
            f"leased bytes: {objects.leased_bytes}",
            f"kept bytes: {room.residents.kept_bytes}",
            f"objects: {len(table)}",
            f"pinned objects: {len(held)}",
            f"objects that wait for a release: {objects.releases.n_waiting}",
            f"requests that wait for room: {n_waiting}",
            f"referenced objects: {len(references)}",
            f"references: {references.n_holds}",
            f"references on their way: {len(references.tickets)}",
            f"evictions: {objects.evictions}",
            *_spilling(objects),
            f"takes: {room.takes}",
            f"takes that met a pin: {room.takes_that_met_a_pin}",
            f"compactions: {room.mover.compactions}",
            f"moves: {room.mover.moves}",
            f"moved bytes: {room.mover.moved_bytes}",
            f"moves that met a pin: {room.mover.pins_met}",
            f"clients: {', '.join(clients)}",
        )
    )


def printable(text: str) -> str:
    """Return a client's name or command as it may stand in a line for people, whatever it is."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _spilling(objects: Lifecycle) -> list[str]:
    """Return the figures of the external store, if there is one."""
    spilling = objects.spilling
    if spilling is None:
        return []
    return [
        f"spilled bytes: {spilling.spilled_bytes}",
        f"bytes in memory with a copy: {spilling.clean_bytes}",
        f"objects written out: {spilling.written}",
        f"objects brought back: {spilling.restored}",
    ]
