"""Leases: room that a client fills on its own and announces afterwards.

A lease is one extent of the data region.  Its client takes room from its beginning, object after object,
and sends one `Publish` for each, one-way.  The store keeps a cursor: what lies before it has been
published, or was skipped and given back; what lies behind it is the client's.

Theory of operation
-------------------
Three words decide who owns what lies behind the cursor.  BUSY is the first word of the client's first
board; only the client writes it.  EPOCH is in the board's control line; only the store writes it.  Messages
are handled in the order in which they were sent.

=====================================================  =======================================================
client, for each object                                store, to recall
=====================================================  =======================================================
1. BUSY = 1                                            1. EPOCH = EPOCH + 1
2. read EPOCH; another than the lease's: BUSY = 0, and  2. membarrier
   ask for a new lease                                 3. read BUSY; until it is 0 the lease stays as it is
3. take room, fill it                                  4. read the client's outbox
4. send `Publish`                                      5. what lies behind the cursor is free
5. BUSY = 0
=====================================================  =======================================================

Between the client's store (1) and load (2) its CPU may let the load go first, which the membarrier forbids
from the other side: a client whose 1 is not seen by the store's 3 sees the new EPOCH in its 2.  So when the
store reads BUSY = 0 after the barrier, every object that the client took room for has been sent (4 comes
before 5, and stores are not reordered), and the client takes no more.  Reading its outbox brings the cursor
behind the last of them.  A client that is busy is asked again in the store's next turn; it finds the new
EPOCH at its next object at the latest.

Invariants
----------
* Nothing that was published is refused for want of room: the extent is the lease's, and so many entries of
  the table are set aside as the lease may publish objects.
* How many objects a lease of a store that has died had published is known no more.  So each may publish as many as its rest has
  room for, and all together as many as the table has entries for, which is no fewer than they had left.
* A lease ends when all that its client has posted was read, and no sooner.  A client that leaves has it recalled, as another one of its
  threads may be in the midst of an object; what is left of it goes at the latest with the connection.
* What a client publishes outside its lease, before the cursor, or too often costs it its connection.
* Leases take at most an eighth of the capacity, one at most a 64th, and none is granted where one would be too small to
  help.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from shmplasma.control import Control
from shmplasma.errors import ProtocolError
from shmplasma.layout import ALIGNMENT, BOARD_WORDS, Layout, align_up

__all__ = ["BUSY_WORD", "MIN_LEASE_BYTES", "Leases", "largest_object"]

BUSY_WORD: Final = 0
"""The board's word that is not a slot."""

MIN_LEASE_BYTES: Final = 1 << 14
_MAX_LEASE_BYTES: Final = 1 << 22
"""A round trip takes as long as filling 20 small objects or copying 1 MB.  A lease for larger objects has room for one to three."""
_SHARE_OF_ONE: Final = 64
_SHARE_OF_ALL: Final = 8
_PATIENCE: Final = 1000
"""Turns of the store's loop, some 20 ms in all, that a busy client gets to finish an object."""
_BYTES_AN_OBJECT: Final = 128
"""A lease may publish so many objects as it has room for at this size, the smallest that objects often have."""
_MAX_OBJECTS: Final = 8192
"""But not more than this: each of them has an entry of the table set aside, with memory behind it."""
_OBJECTS: Final = 3
"""So many objects of the size that is asked for fit into a lease, where its share of the capacity allows."""
_CACHED_BYTES: Final = 1 << 23
"""Of objects that are larger than a third of this not so many: what is deleted soon is to be written again while caches have it.  8 MiB each, with
one, two, three and four of them in a lease, and caches of 32 MiB, GB/s: 32 to 38, 34 to 38, 28 to 34, 25 to 38, and in the slowest of ten turns
31, 18, 19, 19.  The next lease is asked for ahead, so that one object to each is put without waiting as well."""
_FEWEST_OBJECTS: Final = 2


def largest_object(capacity: int) -> int:
    """Return how large an object may be at most for which a store of this capacity grants a lease."""
    return capacity // _SHARE_OF_ONE & -ALIGNMENT


@dataclass(slots=True)
class _Lease:
    """One client's lease.  Offsets are from the start of the segment.

    Attributes
    ----------
    board : int
        The client's first board: where BUSY is.
    start, end : int
        The extent.
    cursor : int
        Behind the last published object.
    objects_left : int
        How many it may still publish.
    recalled : bool
        Whether EPOCH was raised.
    idle : bool
        Whether BUSY was seen 0 after that.
    asked : int
        How often BUSY was looked at.
    """

    board: int
    start: int
    end: int
    cursor: int
    objects_left: int
    recalled: bool = False
    idle: bool = False
    asked: int = 0


class Leases:
    """The store's view of all leases.  Pure bookkeeping: extents and entries are its caller's.

    Parameters
    ----------
    layout : Layout
        The segment's layout.
    words : memoryview
        The segment as native 8-byte words, writable.
    control : Control
        The boards' control lines.

    Attributes
    ----------
    held_bytes : int
        Bytes that are leased and not published.
    objects_left : int
        Entries of the table that must be left to leases, and no more than that can be published.

    Notes
    -----
    O(1) for each operation on a lease.
    """

    def __init__(self, layout: Layout, words: memoryview, control: Control) -> None:
        self._layout = layout
        self._words = words
        self._control = control
        self._of_client: dict[int, _Lease] = {}
        self._used: dict[int, int] = {}
        self._promised = 0
        self.held_bytes = 0
        self.objects_left = 0

    # -- granting ------------------------------------------------------------------------------

    def size_for(self, client: int, needed_bytes: int) -> int:
        """Return how large a lease this client should get next; 0 for none.

        It is twice as large as all before together, which were used up, from `MIN_LEASE_BYTES` to 4 MiB; or more, to
        have room for three objects of the size that is needed now, or for fewer if they are large.
        """
        capacity, least = self._layout.capacity, self.least_for(needed_bytes)
        each = align_up(max(needed_bytes, 1), ALIGNMENT)
        wanted = max(1, min(_OBJECTS, _CACHED_BYTES // each)) * each
        size = max(min(2 * self.used_bytes(client), _MAX_LEASE_BYTES), wanted, least)
        size = min(size, capacity // _SHARE_OF_ONE, capacity // _SHARE_OF_ALL - self.held_bytes)
        return size & -ALIGNMENT if size >= least else 0

    def least_for(self, needed_bytes: int) -> int:
        """Return how large a lease for objects of this size is at least, unless room is short."""
        each = align_up(max(needed_bytes, 1), ALIGNMENT)
        most = min(_CACHED_BYTES, largest_object(self._layout.capacity))
        return max(MIN_LEASE_BYTES, max(1, min(_FEWEST_OBJECTS, most // each)) * each)

    def used_bytes(self, client: int) -> int:
        """Return how much this client was leased since its leases began small."""
        return self._used.get(client, 0)

    def grant(self, client: int, board: int, offset: int, size_bytes: int) -> tuple[int, int]:
        """Take note of a lease; return the number of objects it may publish, and its epoch."""
        assert client not in self._of_client
        objects = self.objects_for(size_bytes)
        self._of_client[client] = _Lease(board, offset, offset + size_bytes, offset, objects)
        self._used[client] = min(self.used_bytes(client) + size_bytes, _MAX_LEASE_BYTES)
        self.held_bytes += size_bytes
        self._promised += objects
        self.objects_left += objects
        self._control.lease(board, offset, offset + size_bytes)
        return objects, self._control.epoch(board)

    def restore(self, client: int, board: int, cursor: int, end: int, free_entries: int) -> None:
        """Take over a lease of a store that has died, as far as it is not published, and as the table has entries."""
        objects = min((end - cursor) // ALIGNMENT, _MAX_OBJECTS)
        self._of_client[client] = _Lease(board, cursor, end, cursor, objects)
        # The end stands there already, and must not be missed by yet another store if this one dies here.
        self._control.advance(board, cursor)
        self.held_bytes += end - cursor
        self._promised += objects
        self.objects_left = min(self._promised, free_entries)

    @staticmethod
    def objects_for(size_bytes: int) -> int:
        """Return how many objects a lease of this size may publish."""
        return min(size_bytes // _BYTES_AN_OBJECT, _MAX_OBJECTS)

    # -- publishing ----------------------------------------------------------------------------

    def publish(self, client: int, offset: int, size_bytes: int) -> tuple[int, int]:
        """Move the cursor behind an object; return the extent that was skipped before it.

        Returns
        -------
        start, size : int
            What lies between the last object and this one, to be given back; size 0 if nothing.

        Raises
        ------
        ProtocolError
            It does not lie in what is left of this client's lease, or no entry is left for it.
        """
        lease = self._of_client.get(client)
        end = offset + (size_bytes + ALIGNMENT - 1 & -ALIGNMENT)  # the hot path of putting
        if (
            lease is None
            or offset < lease.cursor
            or end > lease.end
            or offset % ALIGNMENT
            or size_bytes < 0
            or not lease.objects_left
            or not self.objects_left
        ):
            raise ProtocolError(f"an object of {size_bytes} bytes at {offset} outside of its lease")
        skipped = lease.cursor
        lease.cursor = end
        lease.objects_left -= 1
        self.held_bytes -= end - skipped
        self._promised -= 1
        self.objects_left -= 1
        return skipped, offset - skipped

    def note_published(self, client: int) -> None:
        """Write the cursor down, if there is a lease, now that the object is in the table: a successor is not to miss it."""
        lease = self._of_client.get(client)
        if lease is not None:
            self._control.advance(lease.board, lease.cursor)

    def was_published(self, client: int, offset: int) -> bool:
        """Tell whether an object that a client announces again lies behind it already."""
        lease = self._of_client.get(client)
        return lease is None or offset < lease.cursor

    # -- taking back ---------------------------------------------------------------------------

    def recall(self) -> None:
        """Raise the epoch of all leases; a barrier has to follow, then `note_idle`."""
        for client in self._of_client:
            self.recall_of(client)

    def recall_of(self, client: int) -> None:
        """Raise the epoch of one client's lease, if it has one; otherwise as `recall`."""
        lease = self._of_client.get(client)
        if lease is not None and not lease.recalled:
            lease.recalled = True
            self._control.raise_epoch(lease.board)

    def note_idle(self) -> None:
        """See which recalled leases are at rest; all outboxes have to be read after that."""
        first = self._layout.boards // 8
        for lease in self._of_client.values():
            if lease.recalled and not lease.idle:
                lease.asked += 1
                lease.idle = not self._words[first + lease.board * BOARD_WORDS + BUSY_WORD]

    @property
    def are_recalled(self) -> bool:
        """Whether any lease was recalled that has not come back."""
        return any(lease.recalled for lease in self._of_client.values())

    @property
    def worth_waiting(self) -> bool:
        """Whether a recalled lease may still come back soon; a client that was stopped is not waited for."""
        return any(lease.recalled and lease.asked < _PATIENCE for lease in self._of_client.values())

    def take_idle(self) -> list[tuple[int, int]]:
        """End the leases that are at rest, and return what is left of them as (start, size)."""
        idle = [client for client, lease in self._of_client.items() if lease.idle]
        for client in idle:
            self._used[client] = 0  # it begins small again
        return [self.end(client) for client in idle]

    def check(self) -> None:
        """Prove that the sums are right."""
        leases = self._of_client.values()
        assert self.held_bytes == sum(lease.end - lease.cursor for lease in leases)
        assert self._promised == sum(lease.objects_left for lease in leases)
        assert self.objects_left <= self._promised, "entries are set aside for nobody"
        assert all(lease.start <= lease.cursor <= lease.end for lease in leases)

    def end(self, client: int) -> tuple[int, int]:
        """End a lease whose client has left, or has asked for another; return what is left of it."""
        lease = self._of_client.pop(client, None)
        if lease is None:
            return 0, 0
        left = lease.end - lease.cursor
        self.held_bytes -= left
        self._promised -= lease.objects_left
        self.objects_left = min(self.objects_left, self._promised)
        self._control.lease(lease.board, 0, 0)
        return lease.cursor, left

    def forget(self, client: int) -> tuple[int, int]:
        """End the lease of a client that has left."""
        self._used.pop(client, None)
        return self.end(client)

    def extents(self) -> list[tuple[int, int]]:
        """Return what is leased and not published, as (start, size)."""
        return [
            (lease.cursor, lease.end - lease.cursor)
            for lease in self._of_client.values()
            if lease.end > lease.cursor
        ]
