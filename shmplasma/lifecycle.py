r"""The life of an object: create, seal, abort, delete, evict.

::

    create            seal              delete, evict, need of room, and nobody pins it
    ------> CREATED ------> SEALED ------------------------------------------------------> gone
               |                \-- delete while pinned: doomed; goes at its last release
               \-- abort, or the creator leaves: unlinked; its extent waits for the writer to let go

Invariants
----------
* An unsealed object has exactly one creator (`shmplasma.unsealed`); only that one may seal or abort it.
* What is deleted or aborted while somebody holds it is left to `shmplasma.releases`, until it goes at the last release.
* What a lease covers beyond its cursor is used space without an object (see `shmplasma.publishing`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from zlib import crc32

from shmplasma.denials import Claimed, MakesRoom, NoRoom, Refused, existing
from shmplasma.errors import CommitError
from shmplasma.layout import EntryState, Layout
from shmplasma.leases import Leases
from shmplasma.memory import Memory
from shmplasma.pins import Boards
from shmplasma.posted import Claim, Publish
from shmplasma.recovery import Findings, examine
from shmplasma.releases import Releases
from shmplasma.replies import Failed, Failure
from shmplasma.requests import Create
from shmplasma.room import Room
from shmplasma.spilling import Spilling
from shmplasma.table import NO_ENTRY, Table
from shmplasma.unsealed import Unsealed

__all__ = ["Lifecycle"]


class Lifecycle:
    """What becomes of objects, and why.

    Parameters
    ----------
    layout : Layout
        The segment's layout.
    words : memoryview
        The segment as native 8-byte words, writable.
    table, boards, room, leases
        The parts that it joins.
    memory : Memory
        Issues barriers.
    gone : callable
        ``gone(object_id)`` is told of each sealed object that leaves.

    Attributes
    ----------
    releases : Releases
        What waits for a release.
    unsealed : Unsealed
        What is being written.
    spilling : Spilling or None
        Where objects go instead, if there is an external store.
    evictions : int
        How many objects were evicted.
    """

    def __init__(
        self,
        layout: Layout,
        words: memoryview,
        table: Table,
        boards: Boards,
        room: Room,
        leases: Leases,
        memory: Memory,
        gone: Callable[[bytes], None],
    ) -> None:
        self._layout = layout
        self._table = table
        self._boards = boards
        self._room = room
        self._residents = room.residents
        room.fixed = self._fixed
        self._memory = memory
        self._gone = gone
        self._leases = leases
        self.releases = Releases(words, table, boards, room, memory, gone)
        self.unsealed = Unsealed(table, boards, room, self.releases, memory)
        self._creators = self.unsealed.creators
        # Its sets, which are looked at often.
        self._doomed = self.releases.doomed
        self._limbo = self.releases.limbo
        self.evictions = 0
        self.spilling: Spilling | None = None

    # -- asking --------------------------------------------------------------------------------

    def find_sealed(self, object_id: bytes) -> int:
        """Return the entry of a sealed object, or `NO_ENTRY`."""
        entry = self._table.find(object_id)
        if entry == NO_ENTRY:
            return NO_ENTRY
        state = self._table.state(entry)
        if state == EntryState.MOVING:
            self._room.mover.reveal(entry)
            state = EntryState.SEALED
        if state == EntryState.SEALED:
            if not self._table.is_marked(entry):
                return entry
            self._table.set_state(entry, EntryState.DOOMED)  # its record is still to be read
            self.releases.doom({entry})
        elif state != EntryState.DOOMED:
            return NO_ENTRY
        # What comes by message may be faster than the wake-up.  Others stay as they were found.
        elif not self._boards.is_pinned(entry):
            self.releases.take({entry})
        return entry if self._table.find(object_id) == entry else NO_ENTRY

    def find_spilled(self, object_id: bytes) -> int:
        """Return the entry of an object that is in the external store alone, or `NO_ENTRY`."""
        entry = self._table.find(object_id)
        if entry == NO_ENTRY or self._table.state(entry) != EntryState.SPILLED:
            return NO_ENTRY
        if self._table.is_marked(entry):
            self.drop(entry)
            return NO_ENTRY
        return entry

    def contains(self, object_id: bytes) -> bool:
        """Tell whether there is a sealed object of this id: readable, hidden by a move, or in the external store."""
        if self.is_hidden(object_id):
            return not self._table.is_marked(self._room.mover.hidden)
        if self.find_sealed(object_id) != NO_ENTRY:
            return True
        return self.find_spilled(object_id) != NO_ENTRY

    def is_hidden(self, object_id: bytes) -> bool:
        """Tell whether this object is hidden by a move: `find_sealed` would have to wait for it."""
        hidden = self._room.mover.hidden
        return hidden != NO_ENTRY and self._table.object_id(hidden) == object_id

    def held_by(self, client: int) -> set[int]:
        """Return the entries that a client pins or has not sealed yet."""
        return self._boards.held_by(client).union(self.unsealed.of(client))

    def bytes_of(self, entries: Iterable[int]) -> int:
        """Return the sum of data and metadata sizes; what clients made up does not count."""
        return sum(self._table.sizes(entries).values())

    @property
    def unsealed_bytes(self) -> int:
        """Bytes of objects that are being written."""
        return self.bytes_of(self._creators)

    @property
    def leased_bytes(self) -> int:
        """Bytes that are leased and not published."""
        return self._leases.held_bytes

    # -- create ------------------------------------------------------------------------

    def create(
        self,
        client: int,
        request: Create,
        limit_bytes: int,
        now_ns: int,
        *,
        for_nothing: bool = False,
    ) -> int:
        """Make a new object, pinned for its writer in the request's slot, and return its entry.

        Its memory need not be ready: the caller waits for it to be committed before the writer is told.  With
        `for_nothing` it is known that a lock of the id would be for nothing.

        Raises
        ------
        Refused
            The id exists.
        Claimed
            It may be about to.
        MakesRoom
            There will be some.
        NoRoom
            There is none, or the client would exceed `limit_bytes` (0: none).
        """
        object_id = request.object_id
        size = request.size_bytes
        if self.exists(object_id):
            entry = self._table.find(object_id)
            if not self.unsealed.is_repeated(client, entry, request):
                raise existing(object_id)
            self._boards.pin(request.slot, entry)
            return entry
        self.refuse_what_cannot_come(client, size, limit_bytes)
        if not (for_nothing or self._memory.lock(crc32(object_id))):
            raise Claimed
        try:
            offset = self._allocate(size)
            if offset is None:
                raise NoRoom(size, may_come=True)
            entry = self._insert(request, offset, size, now_ns)
        finally:
            self._memory.unlock()
        self.unsealed.add(client, entry)
        self._boards.pin(request.slot, entry)
        return entry

    def refuse_what_cannot_come(self, client: int, size_bytes: int, limit_bytes: int) -> None:
        """Raise NoRoom for a creation that finds none whoever lets go of some: beyond its client's limit, or the capacity."""
        if limit_bytes:
            held = self.bytes_of(self.held_by(client))
            if held + size_bytes > limit_bytes:
                raise NoRoom(size_bytes, limit_bytes=limit_bytes, held_bytes=held)
        # The region is the capacity in whole cache lines, which users are not to notice.
        if size_bytes > self._layout.capacity:
            raise NoRoom(size_bytes)

    def claim(self, client: int, message: Claim, now_ns: int) -> bool:
        """Enter an object that a client creates in its lease, pinned already; tell whether its id is new.

        If it is not, see `reject`.
        """
        if self.exists(message.object_id):
            self.reject(message, now_ns)
            return False
        object_id, offset, data_size, metadata_size, codec, slot, _ = message
        created_ns = message.created_ns(now_ns)
        entry = self._table.insert(
            object_id, codec, offset, data_size, metadata_size, created_ns, owner=slot + 1
        )
        self.unsealed.add(client, entry)
        return True

    def reject(self, message: Claim | Publish, now_ns: int) -> None:
        """Keep room in a lease for who pins what was put there, which is no object, until `Releases.settle` and as long as he does."""
        object_id, offset, data_size, metadata_size, codec = message[:5]
        if data_size + metadata_size:
            entry = self._table.insert(
                object_id, codec, offset, data_size, metadata_size, now_ns, EntryState.EVICTING
            )
            self._limbo.add(entry)

    def exists(self, object_id: bytes) -> bool:
        """Tell whether an id is taken, sealed or not."""
        entry = self._table.find(object_id)
        if entry != NO_ENTRY and self.unsealed.is_left(entry):
            self.unsealed.abort([entry])
            return False
        if entry != NO_ENTRY and (self._doomed or self._table.is_marked(entry)):
            # Which let go of it, if it has waited for that.
            self.find_sealed(object_id)
            self.find_spilled(object_id)
            entry = self._table.find(object_id)
        return entry != NO_ENTRY

    def _allocate(self, size_bytes: int) -> int | None:
        """Find an extent, evicting what is needed when what was released meanwhile has gone."""
        if size_bytes > self._room.largest_bytes:
            self.releases.wake()
            self.unsealed.finish()
        reserved = 0 if self.spilling is None else self.spilling.reserved_for(size_bytes)
        if reserved and self._room.attainable_bytes < size_bytes + reserved:
            return None
        offset, evicted = self._room.allocate(size_bytes, self._room.most_at_once)
        if evicted or self._residents.is_paused:
            self.note_evicted(evicted)
            if offset is None and self._room.may_make(size_bytes):
                raise MakesRoom
        return offset

    def _insert(self, request: Create, offset: int, size: int, now_ns: int) -> int:
        """Insert the object, evicting one if the table is full; on failure free its extent."""
        text = (
            f"the object table is full ({self._layout.n_entries} objects, all of them in use); "
            "release, delete or cache objects, or start the store with a larger -m"
        )
        may_come = True
        for _ in range(2):
            try:
                # What is committed for the objects of leases stays theirs.
                if not self._table.free_entries:
                    self.releases.wake()
                    self.unsealed.finish()
                if not self._table.prepare(self._leases.objects_left + 1):
                    if self.spilling is not None:
                        break
                    self.note_evicted(self._room.evict(0, objects=1)[1])
                    continue
                entry = self._table.insert(
                    request.object_id,
                    request.codec,
                    offset,
                    request.data_size,
                    request.metadata_size,
                    now_ns,
                    owner=request.slot + 1,
                    keep=request.keep,
                )
            except CommitError as error:
                text, may_come = str(error), False
                break
            return entry
        self._room.give_back(offset, size)
        raise NoRoom(size, text, may_come=may_come)

    def _fixed(self) -> list[tuple[int, int]]:
        """Return offset and size of all that cannot be moved now."""
        entries = self._boards.pinned() | self._residents.busy | self._creators.keys()
        entries |= self._doomed | self._limbo
        table = self._table
        extents = [
            (table.location(entry)[0], size)
            for entry, size in table.sizes(entries).items()
            if table.state(entry) != EntryState.SPILLED
        ]
        returning = () if self.spilling is None else self.spilling.extents()
        return [*extents, *self._leases.extents(), *returning]

    # -- seal, abort ---------------------------------------------------------------------------

    def seal(self, client: int, object_id: bytes, now_ns: int) -> int:
        """Seal an object of this client and return its entry.

        Raises
        ------
        Refused
            This client is not writing such an object.
        """
        entry = self._own(client, object_id)
        self.unsealed.forget(entry)
        self._table.seal(entry, now_ns)
        self._residents.sealed(entry)
        return entry

    def abort(self, client: int, object_id: bytes) -> None:
        """Remove an object that this client has not sealed.

        Raises
        ------
        Refused
            This client is not writing such an object.
        """
        self.unsealed.abort([self._own(client, object_id)])

    def _own(self, client: int, object_id: bytes) -> int:
        entry = self._table.find(object_id)
        if self._creators.get(entry) == client and not self.unsealed.is_left(entry):
            return entry
        sealed = self.find_sealed(object_id)
        if sealed != NO_ENTRY and sealed in self._boards.held_by(client):
            text = f"object {object_id.hex()} is sealed already"
            raise Refused(Failed(Failure.SEALED, text))
        why = "create it first" if sealed == NO_ENTRY else "it is sealed already"
        text = f"this client has no unsealed object {object_id.hex()}; {why}"
        raise Refused(Failed(Failure.NOT_FOUND, text))

    # -- drop, evict ---------------------------------------------------------------------------

    def drop(self, entry: int) -> None:
        """Delete an object that is in the external store alone."""
        if self.spilling is not None:
            self.spilling.drop(entry)
        self._table.remove(entry)
        self._gone(self._table.object_id(entry))

    def keep(self, client: int, object_ids: Iterable[bytes], keep: bool) -> None:
        """Say of objects, sealed or this client's own, whether they are never to be evicted.

        Raises
        ------
        Refused
            One of them is not there; nothing is changed.
        """
        # To look for one may let go of others; nothing takes their entries meanwhile.
        entries: list[int] = []
        for object_id in dict.fromkeys(object_ids):
            entry = self.find_sealed(object_id)
            if entry == NO_ENTRY:
                entry = self._table.find(object_id)
                if self.find_spilled(object_id) == NO_ENTRY and self._creators.get(entry) != client:
                    text = f"there is no object {object_id.hex()}, or another client is writing it"
                    raise Refused(Failed(Failure.NOT_FOUND, text))
            entries.append(entry)
        for entry in entries:
            if not self._table.holds(entry):
                continue  # it was deleted, and its last release came while others of these were looked for
            if entry in self._creators or self._table.state(entry) == EntryState.SPILLED:
                self._table.set_keep(entry, keep)
            else:
                self._residents.keep(entry, keep)

    def evict(self, size_bytes: int) -> tuple[int, bool]:
        """Evict at least so many bytes if possible, or begin with it.

        Returns
        -------
        freed_bytes : int
            Data plus metadata of what went.
        goes_on : bool
            Whether to try again for the rest.
        """
        if size_bytes <= 0:
            return 0, False
        freed, evicted, goes_on = self._room.evict(size_bytes, at_most=self._room.most_at_once)
        self.note_evicted(evicted)
        return freed, goes_on

    def note_evicted(self, object_ids: Iterable[bytes]) -> None:
        """Take note of objects that were evicted, and tell of them."""
        for object_id in object_ids:
            self.evictions += 1
            if self.spilling is None:
                self._gone(object_id)
        self.releases.note_gone()

    # -- recovering ----------------------------------------------------------------------------

    def recover(self) -> Findings:
        """Take over what a store that has died has left in the segment; nothing goes before `Releases.settle`.

        Returns
        -------
        Findings
            The clients in it are known by the numbers of their first boards.

        Raises
        ------
        CommitError
            Memory that was there before cannot be had any more.
        """
        memory = self._memory
        found = examine(
            self._layout, self._table, self._boards, memory.barrier, self._room.finish_move
        )
        self._room.recover(found.gaps)
        self._residents.recover(found.cached, found.cached_bytes, found.kept)
        for client, (cursor, end) in found.leases.items():
            self._leases.restore(client, client, cursor, end, self._table.free_entries)
        self._table.prepare(self._leases.objects_left)
        self.unsealed.recover(found.created)
        if self.spilling is not None:
            self.spilling.recover(found.copies, found.spilled)
        self.releases.recover(found.doomed, found.limbo)
        return found

    # -- proof ---------------------------------------------------------------------------------

    def check(self) -> None:
        """Prove the module's invariants, and those of the parts."""
        self._table.check()
        self._boards.check()
        self._leases.check()
        self._room.check(self._leases.extents())
        assert self._table.free_entries >= self._leases.objects_left, "a lease may find no entry"
        self.unsealed.check()
        self.releases.check()
        if self.spilling is not None:
            self.spilling.check()
