"""Room: which bytes of the data region an object gets, and who must leave for it.

This module joins the allocator, what is committed of the region, what lies in it and may go (`shmplasma.residents`), the take
protocol of `shmplasma.pins` and the mover.  It knows nothing of clients and messages.

Invariants
----------
* Each entry of the table that holds an object of size > 0 owns one extent; free extents and these tile the
  data region (`Room.check`).
* An extent is handed out only when it is ready (`shmplasma.commitment`), so that no client ever writes to a
  page which the file system cannot give (that would be a SIGBUS).
* An object is freed, or moved, only when no board pins it.

Free room in pieces
-------------------
Where bytes are missing, so many are evicted, in the order of the eviction policy.  Where there are enough, but in pieces,
objects are moved (`compact`).  A store that is full to the last byte would have to bring all of its pieces together for a
large object, and move nearly everything; so the mover may evict what has no other place, rather than slide, until
so much more is free than was asked for as `_SPARE` says.  Beyond that nothing is evicted but what obstructs all ways.

With an external store what has a copy is not lost when it goes.  There a stretch of such objects and free extents is
cleared (`Room.stretch`), and what is in the way is written (`shmplasma.spilling`); objects are moved where that does not help.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from itertools import islice
from typing import Final

from shmplasma.allocator import Allocator
from shmplasma.attempts import Attempts
from shmplasma.clearing import cheapest_stretch
from shmplasma.commitment import FLOOR_BYTES, Commitment
from shmplasma.errors import CommitError
from shmplasma.layout import ALIGNMENT, EntryState, Layout, align_up, alignment_of
from shmplasma.memory import Memory
from shmplasma.mover import Mover
from shmplasma.moves import Moves
from shmplasma.pins import Boards
from shmplasma.residents import Residents
from shmplasma.table import Table

__all__ = ["Room"]

_EVICTING: Final = int(EntryState.EVICTING)
_DOOMED: Final = int(EntryState.DOOMED)
_SPARE: Final = 32
"""As much of the capacity: in a store that is always full the next one then finds room, and less is moved
(`benchmarks.fragmentation`)."""

_STRIDES: Final = 64
"""What has copies makes room by so many parts of the capacity: each time costs barriers, and looks at all boards."""

_MOST_AT_ONCE: Final = 512
"""How many small objects go for one request before others have their turn: 2 ms."""

_MOST_LOOKED_AT: Final = 512
"""Objects of which some are chosen to make one extent: 1.5 ms."""


class Room:
    """The data region of a segment.

    Parameters
    ----------
    layout : Layout
        The segment's layout.
    words : memoryview
        The segment as native 8-byte words, writable.
    table : Table
        The object table.
    boards : Boards
        The pin boards.
    residents : Residents
        The sealed objects in memory.
    memory : Memory
        Commits pages and issues barriers.
    moves : Moves
        Moves objects.
    floor_bytes : int, optional
        How much free room stays committed.

    Attributes
    ----------
    doomed : set of int
        The entries of objects that go at their last release (see `shmplasma.releases`).
    commitment : Commitment
        Which parts of the region are committed.
    mover : Mover
        Compacts the region.
    attempts : Attempts
        Which compactions are worth another one.
    finish_move : callable
        Carries on with the move of a store that has died; to be called once the table is taken over.
    most_at_once : int
        How many objects are to go between two requests.
    fixed : callable
        ``fixed()`` gives offset and size of all that cannot be moved, overlaps and all.
    """

    def __init__(
        self,
        layout: Layout,
        words: memoryview,
        table: Table,
        boards: Boards,
        residents: Residents,
        memory: Memory,
        moves: Moves,
        floor_bytes: int = FLOOR_BYTES,
    ) -> None:
        self._table = table
        self._boards = boards
        self._memory = memory
        self._start = layout.data
        self._end = layout.data + layout.data_bytes
        self._allocator = Allocator(self._start, self._end)
        self.residents = residents
        self.most_at_once = _MOST_AT_ONCE
        self.doomed: set[int] = set()
        self.takes = self.takes_that_met_a_pin = self._not_displaced = 0
        self.commitment = Commitment(layout, words, self._allocator, memory, floor_bytes)
        self.finish_move = moves.finish
        self.mover = Mover(layout, table, self._allocator, moves, self, memory.barrier)
        self.attempts = Attempts()
        self._holding = self.mover.holding
        self.fixed: Callable[[], list[tuple[int, int]]] = list

    @property
    def free_bytes(self) -> int:
        """Bytes in free extents."""
        return self._allocator.free_bytes

    @property
    def largest_bytes(self) -> int:
        """Size of the largest free extent."""
        return self._allocator.largest_free_bytes

    @property
    def attainable_bytes(self) -> int:
        """Bytes that are free, or will be when the mover is done, or would be if all that may go were evicted; O(boards)."""
        evictable_bytes = self.residents.evictable_bytes(self._boards.pinned())
        return self.free_bytes + self._holding.n_bytes + evictable_bytes

    # -- extents -------------------------------------------------------------------------------

    def lease(self, size_bytes: int) -> int | None:
        """Find an extent for a lease without evicting anything; commit it at once.

        Returns
        -------
        int or None
            Its offset; None when there is no such extent, or it is too large to be committed at once.

        Raises
        ------
        CommitError
            The file system cannot give the pages.
        """
        offset = self._allocator.allocate(size_bytes)
        if offset is None:
            return None
        try:
            if not self.commitment.step(offset, size_bytes):
                self.give_back(offset, size_bytes)
                return None
        except CommitError:
            self.give_back(offset, size_bytes)
            raise
        self.commitment.hand_out(offset, size_bytes)
        return offset

    def allocate(
        self, size_bytes: int, at_most: int | None = None
    ) -> tuple[int | None, list[bytes]]:
        """Find an extent, evicting as much as it lacks, and no more because what is free lies in pieces.

        Parameters
        ----------
        size_bytes : int
            Of the extent.
        at_most : int, optional
            So many objects go at most; then there may be more to come (`may_make`).

        Returns
        -------
        offset : int or None
            Start of the extent, or None: there are too few bytes even if all goes that may, or they lie in pieces
            (`is_fragmented`).
        evicted : list of bytes
            Ids of the objects that had to go.

        Notes
        -----
        The extent need not be ready; the caller has it committed before it is handed out.
        O(log n) without eviction; with it, O(victims + boards).
        """
        evicted: list[bytes] = []
        if size_bytes == 0:
            return self._start, evicted
        offset = self._place(size_bytes)
        if offset is None:
            missing = align_up(size_bytes, ALIGNMENT) - self.free_bytes
            if missing > 0:
                held = self._boards.pinned()
                if not self.residents.may_make(missing, held):
                    return None, evicted
                if self.residents.external is not None:
                    missing = max(missing, (self._end - self._start) // _STRIDES)
                evicted = self._evict(self.residents.extent_bytes, missing, 0, at_most, held)[1]
                offset = self._place(size_bytes)
            if offset is None and self.residents.external is not None:
                evicted += self._clear_stretch(size_bytes)
                offset = self._place(size_bytes)
        if offset is not None:
            self.commitment.hand_out(offset, size_bytes)
        return offset, evicted

    def may_make(self, size_bytes: int) -> bool:
        """Tell whether too few bytes are free, and enough if all that may go were evicted; O(boards)."""
        missing = align_up(size_bytes, ALIGNMENT) - self.free_bytes
        return missing > 0 and self.residents.may_make(missing, self._boards.pinned())

    def _place(self, size_bytes: int) -> int | None:
        """Take the lowest free extent; what is large begins on a page, unless one less of its size would fit then."""
        alignment = alignment_of(size_bytes)
        if alignment > ALIGNMENT:
            found = self._allocator.next_free(self._start, size_bytes + alignment - ALIGNMENT)
            if found is not None:
                start, free = found
                offset, needed = align_up(start, alignment), align_up(size_bytes, ALIGNMENT)
                if (free - (offset - start)) // needed == free // needed:
                    self._allocator.reserve(offset, size_bytes)
                    return offset
        return self._allocator.allocate(size_bytes)

    def _clear_stretch(self, wanted: int) -> list[bytes]:
        """Let objects go that have a copy, and make one extent; return their ids."""
        chosen = self.stretch(wanted, dirty=False)
        taken = self.take(chosen, spill=True) if chosen else []
        return [self._table.object_id(entry) for entry in taken]

    def stretch(self, wanted: int, *, dirty: bool) -> list[int]:
        """Choose objects whose going makes an extent of so many bytes, those that have a copy or, if need be, any.

        Returns
        -------
        list of int
            Entries; empty where there is no such stretch, or where room lies in many small pieces, and objects are better moved.

        Notes
        -----
        O(1): it looks at `_MOST_LOOKED_AT` objects, those first that should go first, and at as many free extents.
        """
        if self.mover.is_busy:
            return []
        free = list(islice(self._allocator.free_extents(), _MOST_LOOKED_AT + 1))
        if len(free) > _MOST_LOOKED_AT:
            return []
        goods = self.residents.priced(self._boards.pinned(), _MOST_LOOKED_AT, dirty=dirty)
        return cheapest_stretch(free, goods, align_up(wanted, ALIGNMENT))

    def is_fragmented(self, size_bytes: int) -> bool:
        """Tell whether there are so many free bytes, and no extent of them."""
        wanted = align_up(size_bytes, ALIGNMENT)
        return self.largest_bytes < wanted <= self.free_bytes

    def compact(self, size_bytes: int) -> bool:
        """Have objects moved for an extent, unless that would be in vain; tell whether that is under way, for whomever."""
        if self.mover.is_busy:
            return True
        if not self.is_fragmented(size_bytes):
            return False
        self._look()
        if not self.attempts.is_promising(size_bytes, self._situation()):
            return False
        self.attempts.begin(size_bytes, self._pins_met)
        spare_bytes = size_bytes + (self._end - self._start) // _SPARE - self.free_bytes
        self.mover.begin(size_bytes, self._look, max(0, spare_bytes))
        return True

    def advance(self) -> list[bytes]:
        """Move some objects; return the ids of those that had to be evicted."""
        done = self.mover.advance()
        if done is not None:
            self.attempts.end(self._situation(), self._pins_met, done=done)
        return self.mover.take_evicted()

    @property
    def _pins_met(self) -> int:
        return self.mover.pins_met + self._not_displaced

    def _look(self) -> list[tuple[int, int]]:
        return self.attempts.look(self.fixed())

    def _situation(self) -> object:
        return self.free_bytes, self.residents.situation()

    def prepare(self, offset: int, size_bytes: int) -> bool:
        """Commit one step of an extent that an object is to be moved to; tell whether all of it is ready.

        Raises
        ------
        CommitError
            The file system cannot give the pages.
        """
        self.commitment.hand_out(offset, size_bytes)
        return self.commitment.step(offset, size_bytes)

    def give_back(self, offset: int, size_bytes: int) -> None:
        """Free an extent that no entry owns."""
        if not size_bytes:
            return
        for start, size in self._holding.claim(offset, size_bytes):
            self._allocator.free(start, size)
        self.commitment.freed()

    def free(self, entry: int) -> None:
        """Give back the extent and the entry of an unlinked object that nobody pins."""
        if self.residents.external is not None:
            self.residents.external.forget(entry)
        offset, data_size, metadata_size = self._table.location(entry)
        self.give_back(offset, data_size + metadata_size)
        self._table.free(entry)

    # -- taking --------------------------------------------------------------------------------

    def take(self, entries: Sequence[int], *, spill: bool = False) -> list[int]:
        """Free those of these sealed objects that nobody pins; return them.

        The returned entries' ids and sizes are still what they were, until the next insertion.  With `spill`
        they have copies in the external store, and stay under their ids.
        """
        table, residents = self._table, self.residents
        states = [table.state(entry) for entry in entries]
        for entry, state in zip(entries, states, strict=True):
            # A doomed one is hidden from readers already, and stays doomed for a successor of this store.
            if state != _DOOMED:
                table.set_state(entry, _EVICTING)
        self._memory.barrier()
        pinned = self.pinned(entries)
        taken: list[int] = []
        extents: list[tuple[int, int]] = []
        self.takes += len(entries)
        for entry, state in zip(entries, states, strict=True):
            if entry in pinned:
                self.takes_that_met_a_pin += 1
                table.set_state(entry, state)
                continue
            offset, data_size, metadata_size = table.location(entry)
            size = (data_size + metadata_size + ALIGNMENT - 1) & -ALIGNMENT
            residents.forget(entry, size)
            if spill:
                assert residents.external is not None, "nothing has a copy"
                table.set_state(entry, EntryState.SPILLED)
                residents.external.went(entry)
            else:
                if residents.external is not None:
                    residents.external.forget(entry)
                table.remove(entry)
                self.doomed.discard(entry)
            if size:
                extents.append((offset, size))
            taken.append(entry)
        self._give_back_all(extents)
        return taken

    def _give_back_all(self, extents: list[tuple[int, int]]) -> None:
        """Free many extents; what was sealed in a row often lies in a row, and goes as one."""
        extents.sort()
        start = end = 0
        for offset, size in extents:
            if offset != end:
                self.give_back(start, end - start)
                start = offset
            end = offset + size
        self.give_back(start, end - start)

    def evict(
        self, size_bytes: int, objects: int = 0, at_most: int | None = None
    ) -> tuple[int, list[bytes], bool]:
        """Take objects by the eviction policy until so many bytes and objects are gone, if `at_most` make that up.

        Returns
        -------
        freed_bytes : int
            Data plus metadata of what went.
        evicted : list of bytes
            Their ids.
        goes_on : bool
            Whether `at_most`, or a pause, has ended it, and more may go.
        """
        return self._evict(self._table.size, size_bytes, objects, at_most)

    def make_room(self, size_bytes: int, at_most: int | None = None) -> list[bytes]:
        """Evict objects whose extents make up so many bytes, if `at_most` do; return their ids."""
        return self._evict(self.residents.extent_bytes, size_bytes, at_most=at_most)[1]

    def _evict(
        self,
        measure: Callable[[int], int],
        size_bytes: int,
        objects: int = 0,
        at_most: int | None = None,
        held: set[int] | None = None,
    ) -> tuple[int, list[bytes], bool]:
        """Evict until the sum of what `measure` says of each entry, and the count, are reached.

        None goes that the others make up for, but what has no bytes goes in its turn, as in Plasma.  What was found `held`, which is added to, stays.
        """
        freed, evicted = 0, list[bytes]()
        batch: dict[int, int] = {}
        batch_bytes = 0
        residents = self.residents
        held = self._boards.pinned() if held is None else held
        held |= residents.busy
        held.add(self.mover.hidden)
        spill = residents.external is not None

        def spare() -> dict[int, int]:
            """Take out of the batch what it does without, what would be last to go first."""
            excess = freed + batch_bytes - size_bytes
            spared: dict[int, int] = {}
            if excess < min(batch.values()):
                return spared  # as it is with objects of one size
            for entry, size in reversed(tuple(batch.items())):
                if len(evicted) + len(batch) <= objects:
                    break
                if 0 < size <= excess:
                    excess -= size
                    spared[entry] = batch.pop(entry)
            return dict(reversed(spared.items()))

        def take_batch() -> int:
            taken = self.take(tuple(batch), spill=spill)
            evicted.extend(map(self._table.object_id, taken))
            gone = sum(batch[entry] for entry in taken)
            batch.clear()
            return gone

        chosen = 0
        for entry in residents.victims(held, at_most):
            chosen += 1
            size = batch[entry] = measure(entry)
            batch_bytes += size
            if freed + batch_bytes >= size_bytes and len(evicted) + len(batch) >= objects:
                spared = spare()
                freed += take_batch()
                if freed >= size_bytes and len(evicted) >= objects:
                    return freed, evicted, False
                batch |= spared  # somebody has pinned a victim just then
                batch_bytes = sum(batch.values())
        if batch:
            freed += take_batch()
        return freed, evicted, residents.is_paused or chosen == at_most

    def displace(self, entries: Sequence[int]) -> list[bytes]:
        """Evict these objects if all of them may go; return the ids of those that went."""
        if not all(map(self.residents.may_go, entries)):
            return []
        taken = self.take(entries, spill=self.residents.external is not None)
        self._not_displaced += len(entries) - len(taken)
        return [self._table.object_id(entry) for entry in taken]

    def pinned(self, entries: Sequence[int]) -> AbstractSet[int]:
        """Return those of these entries, and maybe others, that somebody pins or the store itself reads."""
        if len(entries) == 1:
            held = entries[0] in self.residents.busy or self._boards.is_pinned(entries[0])
            return set(entries) if held else set()
        return self._boards.pinned_among(entries) | self.residents.busy

    # -- recovering ----------------------------------------------------------------------------

    def recover(self, gaps: Iterable[tuple[int, int]]) -> None:
        """Take over the data region of a store that has died; `gaps` gives offset and size of what is free, by address.

        Notes
        -----
        O(gaps).
        """
        self._allocator.refill(gaps)
        self.commitment.recover()

    # -- proof ---------------------------------------------------------------------------------

    def check(self, leased: Iterable[tuple[int, int]]) -> None:
        """Prove that extents, those of leases included, tile the region, and what is said of residents."""
        table, external = self._table, self.residents.external
        used = [*leased, *self._holding.extents()]
        used += external.extents() if external is not None else ()
        for entry in table.entries():
            offset, data_size, metadata_size = table.location(entry)
            size = data_size + metadata_size
            if size and table.state(entry) != EntryState.SPILLED:
                used.append((offset, align_up(size, ALIGNMENT)))
        self._allocator.check(used)
        self.residents.check()
        self.commitment.check()
