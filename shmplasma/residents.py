"""Residents: the sealed objects in memory, which of them may go for others, in which order, and at what price.  Pure.

This module knows nothing of extents: `shmplasma.room` takes what has to go, and gives its room to others.

Invariants
----------
* Each sealed object in memory is either in the eviction queue or kept, as its KEEP word says.
* What is protected is one or the other, and stays while it is; what is busy is read by the store itself.
* The bytes of what is evictable, kept and protected are counted as it comes and goes: nothing is summed over objects whenever room is looked for.

What has a copy in an external store is not lost when it goes; then what has none may not go at all, and what is kept may.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from itertools import chain, islice
from typing import Final, Protocol

from shmplasma.eviction import NO_PAUSE, PAUSE, Sieve
from shmplasma.layout import ALIGNMENT, EntryState, align_up
from shmplasma.table import Table

__all__ = ["External", "Residents"]

_ROUND_UP: Final = ALIGNMENT - 1
_IS_SEALED: Final = (EntryState.SEALED, EntryState.DOOMED, EntryState.MOVING)

_READ_SHIFT: Final = 2
"""One that was read since the hand passed it is worth four times as much as one that was not."""
_DIRTY_SHIFT: Final = 3
"""One that is not even being written costs eight times as much as one that has a copy."""
_PASSED_AT_ONCE: Final = 16384
"""How many objects are passed before others have their turn: 2 ms."""
_PASSED_A_PIN: Final = 8
"""And so many for each one that is pinned: each turn looks at all of these, which takes as long."""
_LOOKED_AT: Final = 256
"""Objects that are looked at before all that are pinned are: 0.1 ms."""
_KEPT_PRICE: Final = 1 << 62
"""More than all others together: what is kept is written last."""


class External(Protocol):
    """What is asked of `shmplasma.spilling`, where there is an external store."""

    @property
    def clean_bytes(self) -> int:
        """Bytes of extents of objects that have a copy."""

    @property
    def copies(self) -> Mapping[int, int]:
        """The objects in memory that have a copy, and their extents' sizes in bytes."""

    def is_clean(self, entry: int) -> bool:
        """Tell whether an object has a copy."""

    def victims(self) -> Iterator[int]:
        """Yield objects that have a copy, in the order in which they should go."""

    def went(self, entry: int) -> None:
        """Take note that such an object is in memory no more."""

    def forget(self, entry: int) -> None:
        """Take note that an object goes for good."""

    def came(self, size_bytes: int) -> None:
        """Take note of an object in memory, of so many bytes, that may be written."""

    def extents(self) -> Iterator[tuple[int, int]]:
        """Yield the extents of objects that come back."""


class Residents:
    """The sealed objects in memory.

    Parameters
    ----------
    table : Table
        The object table.
    visited : memoryview
        The visited region: a byte an entry.

    Attributes
    ----------
    external : External or None
        What has the copies, if there is an external store.
    busy : set of int
        Entries that the store itself reads: they are neither taken nor moved.
    is_paused : bool
        Whether `victims` has ended because many were passed that were read lately or are not to go, and goes on when it is
        called again.  After two rounds in which nothing went it has ended.
    pauses : int
        How often in a row `to_write` has ended so, and is to be called again; 0 if it has not.
    """

    def __init__(self, table: Table, visited: memoryview) -> None:
        self._table = table
        self._visited = visited
        self._queue = Sieve(visited)
        self._cached_bytes = 0
        self._kept_bytes = 0
        self._kept: set[int] = set()
        self._protected: set[int] = set()
        self._protected_bytes = self._protected_cached_bytes = 0
        self._in_vain = 0
        self.is_paused = False
        self.pauses = 0
        self.busy: set[int] = set()
        self.external: External | None = None

    # -- coming, staying, going ----------------------------------------------------------------

    def sealed(self, entry: int) -> None:
        """Take note that the entry's object was sealed: from now on it may be evicted, unless it is kept."""
        size_bytes = self._table.size(entry)
        if not self._table.is_kept(entry):
            self.cached(entry, size_bytes)
            return
        if self.external is not None:
            self.external.came(size_bytes)
        self._kept.add(entry)
        self._kept_bytes += size_bytes

    def cached(self, entry: int, size_bytes: int) -> None:
        """As `sealed`, of an object of so many bytes that is not kept."""
        if self.external is not None:
            self.external.came(size_bytes)
        self._queue.insert(entry)
        self._cached_bytes += size_bytes + _ROUND_UP & -ALIGNMENT

    def forget(self, entry: int, extent_bytes: int) -> None:
        """Undo `sealed`."""
        self._in_vain = 0
        if entry in self._protected:
            self.protect(entry, False)
        if entry in self._kept:
            self._kept.remove(entry)
            self._kept_bytes -= self._table.size(entry)
        else:
            self._queue.remove(entry)
            self._cached_bytes -= extent_bytes

    def keep(self, entry: int, keep: bool) -> None:
        """Say of a sealed object whether it is never to be evicted; one that may be is taken for new."""
        if keep != (entry in self._kept):
            is_protected = entry in self._protected
            self.forget(entry, self.extent_bytes(entry))
            self._table.set_keep(entry, keep)
            self.sealed(entry)
            if is_protected:
                self.protect(entry, True)

    @property
    def kept(self) -> AbstractSet[int]:
        """The entries of sealed objects that are never evicted."""
        return self._kept

    @property
    def kept_bytes(self) -> int:
        """Data and metadata of these objects, in bytes; O(1)."""
        return self._kept_bytes

    def protect(self, entry: int, protect: bool) -> None:
        """Say of a sealed object whether it is not to be evicted for now; its place in the queue stays.

        Where there is an external store nothing has to be said: there it is not lost.  Nor of what an earlier store has
        spilled, which is not in memory.
        """
        if self.external is not None or protect == (entry in self._protected):
            return
        is_cached = entry in self._queue
        if not (is_cached or entry in self._kept):
            return
        if protect:
            self._protected.add(entry)
        else:
            self._protected.remove(entry)
        sign = 1 if protect else -1
        self._protected_bytes += sign * self._table.size(entry)
        if is_cached:
            self._protected_cached_bytes += sign * self.extent_bytes(entry)

    @property
    def protected_bytes(self) -> int:
        """Data and metadata of objects that are not evicted for now, in bytes; O(1)."""
        return self._protected_bytes

    def read(self, entry: int) -> None:
        """Take note that the object was read."""
        self._visited[entry] = 1

    def was_read(self, entry: int) -> bool:
        """Tell whether the object was read since this was asked, or the hand has passed it."""
        was_read = bool(self._visited[entry])
        self._visited[entry] = 0
        return was_read

    # -- who may go ----------------------------------------------------------------------------

    def to_write(self, *, by_and_by: bool) -> Iterator[int]:
        """Return what may be written: in the order of the eviction policy, and then what is kept; for whom nobody waits `pauses` says more."""
        pauses, self.pauses = self.pauses, 0
        return self._to_write(_PASSED_AT_ONCE, pauses) if by_and_by else self._to_write()

    def _to_write(self, at_once: int = NO_PAUSE, pauses: int = 0) -> Iterator[int]:
        for entry in self._queue.sweep(at_once):
            if entry != PAUSE:
                yield entry
            elif pauses * at_once <= 2 * len(self._queue):
                self.pauses = pauses + 1
                return
            else:
                break
        yield from tuple(self._kept)

    def victims(self, held: AbstractSet[int], at_most: int | None) -> Iterator[int]:
        """Yield the objects that may go and are not held, in the order in which they should; see `is_paused`.

        Where others are to have their turn there are `at_most` of them; else as many as there are.
        """
        self.is_paused = False
        if self.external is not None:
            victims = self.external.victims()
        elif at_most is None:
            victims = self._cached_victims(self._queue.sweep(), 0)
        else:
            at_once = _PASSED_AT_ONCE + _PASSED_A_PIN * len(held)
            victims = self._cached_victims(self._queue.sweep(at_once), at_once)
        return islice((entry for entry in victims if entry not in held), at_most)

    def _cached_victims(self, entries: Iterator[int], at_once: int) -> Iterator[int]:
        for entry in entries:
            if entry == PAUSE:
                self._in_vain += at_once
                self.is_paused = self._in_vain <= 2 * len(self._queue)
                if not self.is_paused:
                    self._in_vain = 0
                return
            if entry not in self._protected:
                yield entry

    def may_go(self, entry: int) -> bool:
        """Tell whether an object may go, if nobody pins it."""
        external = self.external
        may_go = entry in self._queue if external is None else external.is_clean(entry)
        return may_go and entry not in self._protected

    def evictable_bytes(self, pinned: AbstractSet[int]) -> int:
        """Bytes of the extents of all that may go, but for what is pinned; O(pinned), however much is protected."""
        external = self.external
        if external is not None:
            copies = external.copies
            return external.clean_bytes - sum(copies[entry] for entry in pinned if entry in copies)
        queue, protected = self._queue, self._protected
        if 2 * len(queue) <= 3 * len(pinned):  # then what is not pinned is summed up faster
            unpinned = (e for e in queue if e not in pinned and e not in protected)
            return sum(map(self.extent_bytes, unpinned))
        held = queue.queued(pinned - protected if protected else pinned)
        sizes = self._table.sizes(held).values()
        evictable_bytes = self._cached_bytes - self._protected_cached_bytes
        return evictable_bytes - sum(size + _ROUND_UP & -ALIGNMENT for size in sizes)

    def may_make(self, size_bytes: int, pinned: AbstractSet[int]) -> bool:
        """Tell whether so many bytes are evictable; O(pinned) only where those that go next do not make them up."""
        found = 0
        for entry in islice(self._queue.upcoming(), 0 if self.external else _LOOKED_AT):
            if entry not in pinned and entry not in self._protected:
                found += self.extent_bytes(entry)
                if found >= size_bytes:
                    return True
        return size_bytes <= self.evictable_bytes(pinned)

    def situation(self) -> object:
        """Return what changes whenever something else may go."""
        return self._cached_bytes, 0 if self.external is None else self.external.clean_bytes

    def priced(
        self, held: AbstractSet[int], most: int, *, dirty: bool
    ) -> list[tuple[int, int, int, int]]:
        """Return what may go, where there is an external store, and what it costs.

        Parameters
        ----------
        held : set of int
            Entries that stay.
        most : int
            How many objects are looked at, those first that should go first.
        dirty : bool
            Whether to count what has no copy yet, or is being written, as well.

        Returns
        -------
        list of (offset, size, entry, price)
        """
        table, external = self._table, self.external
        assert external is not None, "nothing has a copy"
        copies = external.copies
        candidates = chain(self._queue, self._kept) if dirty else iter(copies)
        goods = []
        for entry in islice(candidates, most):
            size = self.extent_bytes(entry)
            if not size or entry in held or table.state(entry) != EntryState.SEALED:
                continue
            if entry in self.busy and not dirty:
                continue
            price = size << _READ_SHIFT if self._visited[entry] else size
            if entry not in copies and entry not in self.busy:
                price <<= _DIRTY_SHIFT
                if entry in self._kept:
                    price += _KEPT_PRICE
            goods.append((table.location(entry)[0], size, entry, price))
        return goods

    def largest_bytes(self) -> int:
        """Return how many bytes the largest object takes up; O(objects)."""
        return max(map(self.extent_bytes, chain(self._queue, self._kept)), default=0)

    def extent_bytes(self, entry: int) -> int:
        """Return how many bytes an object takes up."""
        return (self._table.size(entry) + ALIGNMENT - 1) & -ALIGNMENT  # a call less

    # -- recovering ----------------------------------------------------------------------------

    def recover(self, cached: Sequence[int], cached_bytes: int, kept: Iterable[int]) -> None:
        """Take over what a store that has died leaves.

        Parameters
        ----------
        cached : sequence of int
            The entries that may be evicted, in the order in which they were sealed.
        cached_bytes : int
            The sum of their extents.
        kept : iterable of int
            The sealed entries that may not.
        """
        self._queue.fill(cached)
        self._cached_bytes = cached_bytes
        self._kept = set(kept)
        self._kept_bytes = sum(map(self._table.size, self._kept))

    # -- proof ---------------------------------------------------------------------------------

    def check(self) -> None:
        """Prove the invariants."""
        table, queue = self._table, self._queue
        cached_bytes = kept_bytes = n_cached = n_kept = 0
        for entry in table.entries():
            is_sealed = table.state(entry) in _IS_SEALED
            is_cached = is_sealed and not table.is_kept(entry)
            assert is_cached == (entry in queue), f"entry {entry} and the queue disagree"
            is_kept = is_sealed and not is_cached
            assert is_kept == (entry in self._kept), f"{entry} is kept wrongly"
            if is_kept:
                kept_bytes += table.size(entry)
                n_kept += 1
            if is_cached:
                cached_bytes += align_up(table.size(entry), ALIGNMENT)
                n_cached += 1
        queue.check()
        assert all(entry in queue or entry in self._kept for entry in self._protected)
        protected_bytes = sum(map(table.size, self._protected))
        assert protected_bytes == self._protected_bytes, "the sum of protected bytes is wrong"
        protected_bytes = sum(self.extent_bytes(each) for each in self._protected if each in queue)
        assert protected_bytes == self._protected_cached_bytes, "that of evictable ones is wrong"
        assert n_cached == len(queue), "the queue holds what is not there"
        assert n_kept == len(self._kept), "something is kept that is not there"
        assert cached_bytes == self._cached_bytes, "the sum of evictable bytes is wrong"
        assert kept_bytes == self._kept_bytes, "the sum of kept bytes is wrong"
