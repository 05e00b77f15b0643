"""Publishing: objects that clients put into leases.  Pure.

A lease is granted, objects are entered from it, it is recalled, and what is left of it goes back.
`shmplasma.leases` has the argument about who owns what of it; here it gets its extent and its entries.
"""

from __future__ import annotations

from typing import Final

from shmplasma.errors import CommitError
from shmplasma.layout import ALIGNMENT, EntryState
from shmplasma.leases import MIN_LEASE_BYTES, Leases
from shmplasma.lifecycle import Lifecycle, existing
from shmplasma.replies import Leased
from shmplasma.requests import Publish
from shmplasma.room import Memory, Room
from shmplasma.table import NO_ENTRY, Table

__all__ = ["Publishing"]

_SEALED: Final = int(EntryState.SEALED)

_SCATTERED_BYTES: Final = 16 * MIN_LEASE_BYTES
"""Free room in small pieces from which on nothing is evicted for a lease."""


class Publishing:
    """All leases, and what becomes of the objects in them.

    Parameters
    ----------
    table, room, leases, objects
        The parts of the store that it joins.
    memory : Memory
        Issues barriers.
    """

    def __init__(
        self, table: Table, room: Room, leases: Leases, objects: Lifecycle, memory: Memory
    ) -> None:
        self._table = table
        self._room = room
        self._leases = leases
        self._objects = objects
        self._memory = memory

    def lease(self, client: int, board: int, needed_bytes: int) -> Leased:
        """Give back what is left of a client's lease and grant it a new one, of size 0 if none is to be had.

        In a full store a lease is as small as can be, and evicts what lies in its way.  Where much is free, in pieces that
        are too small for it, nothing is evicted, as there is room for objects that are created one by one.
        """
        self._room.give_back(*self._leases.end(client))
        size = self._leases.size_for(client, needed_bytes)
        none = Leased(0, 0, 0, 0)
        if not size:
            return none
        smallest = max(MIN_LEASE_BYTES, 4 * needed_bytes)
        wanted = self._leases.objects_left + self._leases.objects_for(size)
        try:
            if not self._table.prepare(wanted):
                return none
            offset = self._room.lease(size)
            while offset is None and size // 2 >= smallest:
                size = size // 2 & -ALIGNMENT
                offset = self._room.lease(size)
            if (
                offset is None
                and smallest == MIN_LEASE_BYTES > self._room.largest_bytes
                and self._room.free_bytes < _SCATTERED_BYTES
            ):
                size = smallest
                self._objects.note_evicted(self._room.make_room(size))
                offset = self._room.lease(size)
        except CommitError:
            return none
        if offset is None:
            return none
        objects, epoch = self._leases.grant(client, board, offset, size)
        return Leased(offset, size, objects, epoch)

    def publish(self, client: int, message: Publish, now_ns: int) -> int:
        """Enter an object that a client has written to its lease; return its entry.

        Raises
        ------
        Refused
            The id exists; the room goes back.
        ProtocolError
            It is not in the client's lease.
        """
        object_id, offset, data_size, metadata_size, codec, keep = message
        size = data_size + metadata_size
        start, skipped = self._leases.publish(client, offset, size)
        if skipped:
            self._room.give_back(start, skipped)
        if self._objects.exists(object_id):
            self._room.give_back(offset, size)
            self._leases.note_published(client)
            raise existing(object_id)
        entry = self._table.insert(
            object_id, codec, offset, data_size, metadata_size, now_ns, _SEALED, keep=keep
        )
        self._leases.note_published(client)
        self._room.sealed(entry)
        return entry

    def was_published(self, client: int, offset: int) -> bool:
        """Tell whether a store that has died had entered the object that a client wrote there."""
        return self._leases.was_published(client, offset)

    def is_repeated(self, client: int, message: Publish) -> bool:
        """Tell whether a store that has died had entered this object, and could not say so any more.

        Raises
        ------
        Refused
            It had refused it, because the id exists.
        """
        if not self._leases.was_published(client, message.offset):
            return False
        entry = self._table.find(message.object_id)
        if entry != NO_ENTRY and self._table.origin(entry) != message.offset:
            raise existing(message.object_id)
        return True

    def recall(self) -> bool:
        """Ask for all leases back; tell whether some may come back soon."""
        self._leases.recall()
        self._memory.barrier()
        return self._leases.worth_waiting

    @property
    def are_recalled(self) -> bool:
        """Whether leases were recalled that have not come back."""
        return self._leases.are_recalled

    def note_idle(self) -> None:
        """See which recalled leases are at rest; all outboxes are to be read after this."""
        self._leases.note_idle()

    def take_idle(self) -> None:
        """Take back the recalled leases that were at rest when all outboxes were read."""
        for start, size in self._leases.take_idle():
            self._room.give_back(start, size)

    def end(self, client: int) -> None:
        """Take back the lease of a client that has left."""
        self._room.give_back(*self._leases.forget(client))
