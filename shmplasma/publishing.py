"""Publishing: objects that clients put into leases.  Pure.

A lease is granted, objects are entered from it, it is recalled, and what is left of it goes back.
`shmplasma.leases` has the argument about who owns what of it; here it gets its extent and its entries.

In a full store
---------------
There a lease is room that others have to leave.  A put that evicts for itself waits for it: 0.4 ms for 100 KB, which
take 20 us to fill.  So objects go for many puts at once, and some of these may never come.  How much goes for nothing
has limits:

* A lease has room for the object at hand, or for twice of what its client was leased since it began small, and is never
  more than `Leases` allows: 4 MiB or four of these objects, and a 64th of the capacity.  Who puts one object evicts for one object.
* Nothing goes for a lease while there is room for the object at hand, which is created there: a store that its clients
  fill to the last byte loses nothing.
* After that, with each grant, the store begins to evict for the next lease, a few objects between two requests, until as much is free
  as the client was leased before this one, but no more than the next one may take.  That is done once for each lease: room
  which others take meanwhile is not made anew.
* So beyond what was put there is room for two leases of that client at most.  A lease comes back before anybody finds
  the store full, and what is free already is for everybody.

A lease is one extent.  What was put by one lease lies in a row and was sealed in a row, and the policy evicts in that
order; so what goes mostly coalesces.  Where objects stay in between (they were read, or are held), the lease is the
largest gap, if that is large enough for the object at hand; what else is free counts for the next one, so that gaps do not add
up.  Such a put takes a round trip, as it would without leases, but no eviction of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from shmplasma.denials import existing
from shmplasma.errors import CommitError
from shmplasma.layout import ALIGNMENT, EntryState, align_up
from shmplasma.leases import MIN_LEASE_BYTES, Leases
from shmplasma.lifecycle import Lifecycle
from shmplasma.memory import Memory
from shmplasma.posted import Claim, Publish
from shmplasma.replies import Leased
from shmplasma.requests import AskLease
from shmplasma.room import Room
from shmplasma.table import Table

__all__ = ["Publishing"]

_SEALED: Final = int(EntryState.SEALED)

_SCATTERED_LEASES: Final = 4
"""Free room for as many leases, in pieces that are too small for one, from which on nothing is evicted for a lease."""
_MOST_AT_ONCE: Final = MIN_LEASE_BYTES // ALIGNMENT
"""How many objects go for a lease while its client waits: what the smallest lease may take."""
_SLICE: Final = 32
"""How many go ahead of need between two requests: 0.3 ms."""


class Publishing:
    """All leases, and what becomes of the objects in them.

    Parameters
    ----------
    table, room, leases, objects
        The parts of the store that it joins.
    memory : Memory
        Issues barriers.

    Attributes
    ----------
    leases : Leases
        What is leased to whom.
    are_awaited : bool
        Whether an object that comes back waits until leases were taken back: none is granted meanwhile.
    """

    def __init__(
        self,
        table: Table,
        room: Room,
        leases: Leases,
        objects: Lifecycle,
        memory: Memory,
    ) -> None:
        self._table = table
        self._room = room
        self._residents = room.residents
        self.leases = leases
        self._objects = objects
        self._memory = memory
        self.are_awaited = False
        self._ahead = 0
        self._evictions = 0

    def lease(self, client: int, board: int, request: AskLease) -> Leased:
        """Give back what is left of a client's lease and grant it a new one, of size 0 if none is to be had.

        Where much is free, in pieces that are too small for it, nothing is evicted, as there is room for objects that are
        created one by one, and they are moved for larger ones.
        """
        room, leases, needed_bytes = self._room, self.leases, request.needed_bytes
        room.give_back(*leases.end(client))
        size, used = leases.size_for(client, needed_bytes), leases.used_bytes(client)
        none = Leased(0, 0, 0, 0)
        spilling = self._objects.spilling
        reserved = 0 if spilling is None else spilling.reserved_for(size)
        if not size or (reserved and room.attainable_bytes < size + reserved):
            return none
        smallest, ahead = leases.least_for(needed_bytes), min(size, used)
        try:
            if not self._table.prepare(leases.objects_left + leases.objects_for(size)):
                return none
            if room.largest_bytes < smallest:
                if request.ahead:
                    return none
                self._objects.releases.wake()  # nothing goes for want of what was released meanwhile, or left
                self._objects.unsealed.finish()
                smallest = align_up(max(MIN_LEASE_BYTES, needed_bytes), ALIGNMENT)
                lacks_room = self._is_full or room.largest_bytes < align_up(needed_bytes, ALIGNMENT)
                if lacks_room and room.free_bytes < _SCATTERED_LEASES * size:
                    size = min(size, max(smallest, 2 * used))
                    # What is free may lie in pieces: another one is to come to them in any case.
                    self._evict(max(size, room.free_bytes + smallest), _MOST_AT_ONCE)
            size = min(size, room.largest_bytes)
            offset = room.lease(size) if size >= smallest else None
            while offset is None and size // 2 >= smallest:
                size = size // 2 & -ALIGNMENT
                offset = room.lease(size)
        except CommitError:
            return none
        if offset is None:
            return none
        if room.free_bytes >= ahead:
            self._evictions = self._objects.evictions
        self._ahead = ahead if self._is_full and self._objects.spilling is None else 0
        objects, epoch = leases.grant(client, board, offset, size)
        return Leased(offset, size, objects, epoch)

    @property
    def _is_full(self) -> bool:
        """Whether objects were evicted since there was room for another lease."""
        return self._objects.evictions > self._evictions

    # -- evicting ahead ------------------------------------------------------------------------

    @property
    def is_to_evict(self) -> bool:
        """Whether `evict_ahead` has something to do."""
        return self._ahead > 0

    def evict_ahead(self) -> None:
        """Evict some objects for the next lease."""
        evicted = self._evict(self._ahead, _SLICE)
        # There is nothing that may go, or as much is free.
        if not (evicted or self._residents.is_paused) or self._ahead <= self._room.free_bytes:
            self._ahead = 0

    def _evict(self, free_bytes: int, at_most: int) -> int:
        """Evict until so many bytes are free, but not more than so many objects; return how many."""
        missing = free_bytes - self._room.free_bytes
        evicted = self._room.make_room(missing, at_most) if missing > 0 else []
        self._objects.note_evicted(evicted)
        return len(evicted)

    # -- publishing ----------------------------------------------------------------------------

    def publish(
        self, client: int, message: Publish, now_ns: int, withdraw: Callable[[bytes], None]
    ) -> int:
        """Enter an object that a client has written to its lease; return its entry.

        Parameters
        ----------
        client : int
            Who has written it.
        message : Publish
            What he says of it.
        now_ns : int
            The time.
        withdraw : callable
            Is told the id before the object is refused; from then on nobody whom the store has named takes it (`shmplasma.hints`).

        Raises
        ------
        Refused
            The id exists; `note_refused` is to follow.
        ProtocolError
            It is not in the client's lease.
        """
        object_id, offset, data_size, metadata_size, codec, keep = message
        size = data_size + metadata_size
        start, skipped = self.leases.publish(client, offset, size)
        if skipped:
            self._room.give_back(start, skipped)
        if self._objects.exists(object_id):
            withdraw(object_id)
            self._objects.reject(message, now_ns)
            raise existing(object_id)
        entry = self._table.insert(
            object_id, codec, offset, data_size, metadata_size, now_ns, _SEALED, keep=keep
        )
        self.leases.note_published(client)
        if keep:
            self._residents.sealed(entry)
        else:
            self._residents.cached(entry, size)
        return entry

    def claim(self, client: int, message: Claim, now_ns: int) -> None:
        """Enter an object that a client creates in its lease.

        Raises
        ------
        Refused
            The id exists; `note_refused` is to follow.
        ProtocolError
            It is not in the client's lease.
        """
        offset, size = message.offset, message.data_size + message.metadata_size
        start, skipped = self.leases.publish(client, offset, size)
        if skipped:
            self._room.give_back(start, skipped)
        if not self._objects.claim(client, message, now_ns):
            raise existing(message.object_id)
        self.leases.note_published(client)

    def note_refused(self, client: int) -> None:
        """Give back the room of what was refused, when nobody pins it; its record is acknowledged.

        A successor of a store that dies before this takes the room for a part of the lease, and reads the record again if that is not
        acknowledged.
        """
        self.leases.note_published(client)
        self._objects.releases.settle()

    def recall(self) -> bool:
        """Ask for all leases back; tell whether some may come back soon."""
        self.leases.recall()
        self._memory.barrier()
        return self.leases.worth_waiting

    def recall_of(self, client: int) -> None:
        """Ask for the lease of one client back, and see whether it is at rest; as after `Leases.note_idle`."""
        self.leases.recall_of(client)
        self._memory.barrier()
        self.leases.note_idle()

    def take_idle(self) -> None:
        """Take back the recalled leases that were at rest when all outboxes were read; who awaits them looks again after this."""
        self.are_awaited = False
        for start, size in self.leases.take_idle():
            self._room.give_back(start, size)

    def end(self, client: int) -> None:
        """Take back the lease of a client that has left."""
        self._room.give_back(*self.leases.forget(client))
