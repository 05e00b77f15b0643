"""Room: which bytes of the data region an object gets, and who must leave for it.

This module joins the allocator, the watermark below which memory is committed, the eviction queue and the
take protocol of `shmplasma.pins`.  It knows nothing of clients and messages.

Invariants
----------
* Each entry of the table that holds an object of size > 0 owns one extent; free extents and these tile the
  data region (`Room.check`).
* Each sealed object is either in the eviction queue or kept, as its KEEP word says.
* An extent is handed out only when it lies below the watermark, so that no client ever writes to a page
  which the file system cannot give (that would be a SIGBUS).
* An object is freed only when no board pins it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from typing import Final, Protocol

from shmplasma.allocator import Allocator
from shmplasma.errors import CommitError
from shmplasma.eviction import Sieve
from shmplasma.layout import (
    ALIGNMENT,
    EntryState,
    HeaderWord,
    Layout,
    align_up,
    mark_end,
    read_end,
)
from shmplasma.pins import Boards
from shmplasma.table import Table

__all__ = ["COMMIT_STEP", "Memory", "Room"]

COMMIT_STEP: Final = 4 << 20
"""Bytes that are committed in one go: tmpfs clears them at about 2 GB/s, so others wait 2 ms at most."""

_AHEAD: Final = 64 << 20
"""How far the watermark runs ahead of what was ever used, while the store is idle."""


class Memory(Protocol):
    """What the room needs of the machine."""

    def commit(self, offset: int, size_bytes: int) -> None:
        """Put memory behind a part of the segment, or raise `shmplasma.errors.CommitError`."""

    def barrier(self) -> None:
        """Make every client's CPU pass a full memory barrier, if there is a way."""

    @property
    def has_barrier(self) -> bool:
        """Whether `barrier` does what it says; only then may clients pin without a message."""


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
    visited : memoryview
        The visited region: a byte an entry.
    memory : Memory
        Commits pages and issues barriers.
    """

    def __init__(
        self,
        layout: Layout,
        words: memoryview,
        table: Table,
        boards: Boards,
        visited: memoryview,
        memory: Memory,
    ) -> None:
        self._layout = layout
        self._words = words
        self._table = table
        self._boards = boards
        self._memory = memory
        self._start = layout.data
        self._end = layout.data + layout.data_bytes
        self._allocator = Allocator(self._start, self._end)
        self._queue = Sieve(visited)
        self._visited = visited
        self._cached_bytes = 0
        self._kept: set[int] = set()
        self._protected: set[int] = set()
        self.takes = 0
        self.takes_that_met_a_pin = 0
        self._watermark = self._start
        self._used_once = self._start

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
        """Bytes that are free, or would be if all that may go were evicted; O(boards)."""
        return self.free_bytes + self._evictable_bytes()

    @property
    def watermark(self) -> int:
        """The offset below which memory is committed."""
        return self._watermark

    # -- extents -------------------------------------------------------------------------------

    def lease(self, size_bytes: int) -> int | None:
        """Find an extent for a lease without evicting anything; commit it at once.

        Returns
        -------
        int or None
            Its offset; None when there is no such extent, or it lies too far above the watermark.

        Raises
        ------
        CommitError
            The file system cannot give the pages.
        """
        offset = self._allocator.allocate(size_bytes)
        if offset is None:
            return None
        end = offset + size_bytes
        try:
            if not self.commit_step(end):
                self.give_back(offset, size_bytes)
                return None
        except CommitError:
            self.give_back(offset, size_bytes)
            raise
        self._used_once = max(self._used_once, end)
        return offset

    def allocate(self, size_bytes: int) -> tuple[int | None, list[bytes]]:
        """Find an extent, evicting what is needed for it.

        Returns
        -------
        offset : int or None
            Start of the extent, or None when even evicting all that may go would not make room.
        evicted : list of bytes
            Ids of the objects that had to go.

        Notes
        -----
        The extent may lie above `watermark`; the caller commits it before it is handed out.
        O(log n) without eviction; with it, O(victims + boards).
        """
        evicted: list[bytes] = []
        if size_bytes == 0:
            return self._start, evicted
        offset = self._allocator.allocate(size_bytes)
        if offset is None:
            wanted = align_up(size_bytes, ALIGNMENT)
            if self.attainable_bytes < wanted:
                return None, evicted
            step = max(1, wanted - self.free_bytes)
            while offset is None:
                victims = self.make_room(step)
                evicted += victims
                offset = self._allocator.allocate(size_bytes)
                if not victims:
                    break
                # There are enough bytes now, but not in one piece.
                step = max(1, wanted // 16)
        if offset is not None:
            self._used_once = max(self._used_once, offset + align_up(size_bytes, ALIGNMENT))
        return offset, evicted

    def give_back(self, offset: int, size_bytes: int) -> None:
        """Free an extent that no entry owns."""
        if size_bytes:
            self._allocator.free(offset, size_bytes)

    def sealed(self, entry: int) -> None:
        """Take note that the entry's object was sealed: from now on it may be evicted, unless it is kept."""
        if self._table.is_kept(entry):
            self._kept.add(entry)
        else:
            self._queue.insert(entry)
            self._cached_bytes += self._extent_bytes(entry)

    def _forget(self, entry: int) -> None:
        """Undo `sealed`."""
        if entry in self._kept:
            self._kept.remove(entry)
        else:
            self._queue.remove(entry)
            self._cached_bytes -= self._extent_bytes(entry)

    def keep(self, entry: int, keep: bool) -> None:
        """Say of a sealed object whether it is never to be evicted; one that may be is taken for new."""
        if keep != (entry in self._kept):
            self._forget(entry)
            self._table.set_keep(entry, keep)
            self.sealed(entry)

    @property
    def kept(self) -> AbstractSet[int]:
        """The entries of sealed objects that are never evicted."""
        return self._kept

    def protect(self, entry: int, protect: bool) -> None:
        """Say of a sealed object whether it is not to be evicted for now; its place in the queue stays."""
        if protect:
            self._protected.add(entry)
        else:
            self._protected.discard(entry)

    @property
    def protected(self) -> AbstractSet[int]:
        """The entries of sealed objects that are not evicted for now."""
        return self._protected

    def read(self, entry: int) -> None:
        """Take note that the object was read."""
        self._visited[entry] = 1

    def free(self, entry: int) -> None:
        """Give back the extent and the entry of an unlinked object that nobody pins."""
        offset, data_size, metadata_size = self._table.location(entry)
        self.give_back(offset, data_size + metadata_size)
        self._table.free(entry)

    # -- taking --------------------------------------------------------------------------------

    def take(self, entries: Sequence[int]) -> list[int]:
        """Free those of these sealed objects that nobody pins; return them.

        The returned entries' ids and sizes are still what they were, until the next insertion.
        """
        table = self._table
        states = [table.state(entry) for entry in entries]
        for entry, state in zip(entries, states, strict=True):
            # A doomed one is hidden from readers already, and stays doomed for a successor of this store.
            if state != EntryState.DOOMED:
                table.set_state(entry, EntryState.EVICTING)
        self._memory.barrier()
        pinned = self._pinned(entries)
        taken: list[int] = []
        for entry, state in zip(entries, states, strict=True):
            self.takes += 1
            if entry in pinned:
                self.takes_that_met_a_pin += 1
                table.set_state(entry, state)
                continue
            self._forget(entry)
            self._protected.discard(entry)
            table.unlink(entry)
            self.free(entry)
            taken.append(entry)
        return taken

    def evict(self, size_bytes: int, objects: int = 0) -> tuple[int, list[bytes]]:
        """Take objects by the eviction policy until so many bytes, and so many objects, are gone.

        Returns
        -------
        freed_bytes : int
            Data plus metadata of what went.
        evicted : list of bytes
            Their ids.
        """
        return self._evict(self._table.size, size_bytes, objects)

    def make_room(self, size_bytes: int) -> list[bytes]:
        """Evict objects whose extents make up so many bytes; return their ids."""
        return self._evict(self._extent_bytes, size_bytes)[1]

    def _evict(
        self, measure: Callable[[int], int], size_bytes: int, objects: int = 0
    ) -> tuple[int, list[bytes]]:
        """Evict until the sum of what `measure` says of each entry, and the count, are reached.

        None goes that the others make up for.
        """
        freed, evicted = 0, list[bytes]()
        batch: list[int] = []
        batch_bytes = 0
        held = self._boards.pinned() | self._protected

        def spare() -> list[int]:
            """Take out of the batch what it does without, what would be last to go first."""
            spared: set[int] = set()
            excess = freed + batch_bytes - size_bytes
            for entry in batch[::-1]:
                if len(evicted) + len(batch) - len(spared) <= objects:
                    break
                if measure(entry) <= excess:
                    excess -= measure(entry)
                    spared.add(entry)
            left = [entry for entry in batch if entry in spared]
            batch[:] = [entry for entry in batch if entry not in spared]
            return left

        def take_batch() -> int:
            taken = self.take(batch)
            evicted.extend([self._table.object_id(entry) for entry in taken])
            batch.clear()
            return sum(map(measure, taken))

        for entry in self._queue.sweep():
            if entry in held:
                continue
            batch.append(entry)
            batch_bytes += measure(entry)
            if freed + batch_bytes >= size_bytes and len(evicted) + len(batch) >= objects:
                spared = spare()
                freed += take_batch()
                if freed >= size_bytes and len(evicted) >= objects:
                    break
                batch += spared  # somebody has pinned a victim just then
                batch_bytes = sum(map(measure, batch))
        if batch:
            freed += take_batch()
        return freed, evicted

    def _extent_bytes(self, entry: int) -> int:
        return align_up(self._table.size(entry), ALIGNMENT)

    def _pinned(self, entries: Sequence[int]) -> Iterable[int]:
        if len(entries) == 1:
            return entries if self._boards.is_pinned(entries[0]) else ()
        return self._boards.pinned()

    def _evictable_bytes(self) -> int:
        held = self._boards.pinned() | self._protected
        return self._cached_bytes - sum(
            self._extent_bytes(entry) for entry in held if entry in self._queue
        )

    # -- commitment ----------------------------------------------------------------------------

    def commit_step(self, end: int) -> bool:
        """Raise the watermark towards `end` by one step; tell whether it has arrived.

        Raises
        ------
        CommitError
            The file system cannot give the pages.
        """
        if self._watermark < end:
            stop = min(self._watermark + COMMIT_STEP, self._end)
            self._memory.commit(self._watermark, stop - self._watermark)
            self._watermark = stop
            mark_end(self._words, HeaderWord.WATERMARK, stop - self._start)
        return self._watermark >= end

    @property
    def idle_target(self) -> int:
        """Where the watermark should be while there is nothing else to do."""
        return min(self._used_once + _AHEAD, self._end)

    # -- recovering ----------------------------------------------------------------------------

    def recover(
        self,
        cached: Sequence[int],
        cached_bytes: int,
        kept: Iterable[int],
        used: Iterable[tuple[int, int]],
    ) -> None:
        """Take over the data region of a store that has died.

        Parameters
        ----------
        cached : sequence of int
            The entries that may be evicted, in the order in which they were sealed.
        cached_bytes : int
            The sum of their extents.
        kept : iterable of int
            The sealed entries that may not.
        used : iterable of (offset, size)
            All extents that are not free, by address; none overlaps another.

        Raises
        ------
        CommitError
            Memory that was there before cannot be had any more.

        Notes
        -----
        O(objects).
        """
        limit = self._end - self._start
        committed = read_end(self._words, HeaderWord.WATERMARK, limit)
        end = self._start
        gaps: list[tuple[int, int]] = []
        for offset, size in used:
            if offset > end:
                gaps.append((end, offset - end))
            end = offset + align_up(size, ALIGNMENT)
        if end < self._end:
            gaps.append((end, self._end - end))
        self._allocator.reserve(self._start, limit)
        for offset, size in gaps:
            self._allocator.free(offset, size)
        self._used_once = end
        # Where the word is unsure, what is in use is committed again, which changes nothing of it.
        if committed < limit:
            self._watermark = self._start + committed
        else:
            while not self.commit_step(end):
                pass
        self._queue.fill(cached)
        self._cached_bytes = cached_bytes
        self._kept = set(kept)

    # -- proof ---------------------------------------------------------------------------------

    def check(self, leased: Iterable[tuple[int, int]]) -> None:
        """Prove that extents, those of leases included, tile the region, and that the queue is right."""
        table = self._table
        used = list(leased)
        cached = queued = n_kept = 0
        for entry in table.entries(0, table.end):
            offset, data_size, metadata_size = table.location(entry)
            size = data_size + metadata_size
            if size:
                used.append((offset, align_up(size, ALIGNMENT)))
            is_sealed = table.state(entry) in (EntryState.SEALED, EntryState.DOOMED)
            is_cached = is_sealed and not table.is_kept(entry)
            assert is_cached == (entry in self._queue), f"entry {entry} and the queue disagree"
            assert (is_sealed and not is_cached) == (entry in self._kept), (
                f"{entry} is kept wrongly"
            )
            n_kept += is_sealed and not is_cached
            if is_cached:
                cached += align_up(size, ALIGNMENT)
                queued += 1
        self._allocator.check(used)
        self._queue.check()
        assert all(entry in self._queue or entry in self._kept for entry in self._protected)
        assert queued == len(self._queue), "the queue holds what is not there"
        assert n_kept == len(self._kept), "something is kept that is not there"
        assert cached == self._cached_bytes, "the sum of evictable bytes is wrong"
