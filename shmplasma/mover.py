"""The mover: makes one free extent of many, in slices between requests.  Pure.

`shmplasma.compaction` says where, `shmplasma.moves` how one object moves; this module has what is free in the chosen
range held (`shmplasma.holding`), finds out what lies in it, and moves that, as far as nobody pins it just then.  Nothing that can be seen
of the store is ever out of order between two slices; so a compaction may be given up at any of them.

Invariants
----------
* At most one object is hidden (MOVING) between two slices: one that slides onto itself.  Whoever wants it waits
  (`Mover.hidden`), or has the slide carried to its end at once (`Mover.reveal`).  After each that was hidden then, a slice ends with
  none hidden: so none waits for a whole run, and the compaction can be given up.
* A slice copies `SLICE_BYTES`, or less and does other work that takes as long.
* What was found, or copied, in one slice is copied on, or moved, in a later one only if its state word says that it is the same object still.  One that begins before
  what is held leaves room there when it goes, and its entry; the next object may have both.

Ways and means
--------------
First a window is emptied.  Where some of its objects fit into no extent elsewhere, they are evicted, if they are no more
than may be spared, or another window is tried, without them.  When `_WINDOWS` were tried, a run is slid together instead.
Where no run has room enough, because what cannot be moved splits it, and more would have to be evicted than may be spared, whatever else
can be moved is slid together, so that the objects of the window find larger extents; what then still has no place is evicted, and only that.
An object that is pinned is tried again, and then taken for one that cannot be moved, and another plan is made.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from heapq import merge
from typing import Final, Protocol

from shmplasma.allocator import Allocator
from shmplasma.compaction import Range, best_run, best_window, movable_ranges
from shmplasma.errors import CommitError
from shmplasma.holding import Holding
from shmplasma.layout import ALIGNMENT, GENERATION_SHIFT, EntryState, Layout, align_up
from shmplasma.moves import Moves
from shmplasma.table import NO_ENTRY, Table

__all__ = ["SLICE_BYTES", "Mover"]

SLICE_BYTES: Final = 2 << 20
"""Copied between two turns of the loop: 2 ms where the store touches the pages for the first time, else 0.4 ms."""

_OBJECT_COST: Final = SLICE_BYTES // 32
"""Of a slice, for each object: taking it, and the books, take about 40 us."""
_EXTENT_COST: Final = SLICE_BYTES // 128
"""The same for a free extent that is held."""
_SCAN: Final = 1024
"""Entries that are looked at, and sorted, in one go: 0.3 ms."""
_BATCH: Final = 32
"""Objects that share a barrier and a look at the boards."""
_TRIES: Final = 8
"""How often an object that is found pinned is tried before another plan is made."""
_ALL: Final = 1 << 62
"""More bytes than any store has."""
_PLANS: Final = 16
_WINDOWS: Final = 8
"""How many of them look for a window, where a run would do as well: to slide one moves ten times as much, or more."""

_Object = tuple[int, int, int, int]
"""Offset, size of the extent, state word and entry."""


class Ground(Protocol):
    """What the mover needs of the room."""

    def prepare(self, offset: int, size_bytes: int) -> bool:
        """Commit one step of an extent; tell whether all of it may be written to.  May raise `CommitError`."""

    def give_back(self, offset: int, size_bytes: int) -> None:
        """Free an extent, of which `Holding.claim` may keep a part."""

    def pinned(self, entries: Sequence[int]) -> AbstractSet[int]:
        """Return those of these entries, and maybe others, that cannot be moved now."""

    def displace(self, entries: Sequence[int]) -> list[bytes]:
        """Evict these objects if all of them may go; return the ids of those that went."""


class Mover:
    """Compacts the data region for one request at a time.

    Parameters
    ----------
    layout : Layout
        The segment's layout.
    table, allocator, moves
        The parts that it works on.
    ground : Ground
        The room that it is a part of.
    barrier : callable
        Makes every client's CPU pass a full memory barrier.

    Attributes
    ----------
    slice_bytes : int
        How much a slice copies.
    holding : Holding
        What belongs to the compaction.
    hidden : int
        The entry of the object that nobody can read just now, or `NO_ENTRY`.
    compactions, moves, moved_bytes, pins_met : int
        What was done since the store started.

    Notes
    -----
    Not safe to share between threads.
    """

    def __init__(
        self,
        layout: Layout,
        table: Table,
        allocator: Allocator,
        moves: Moves,
        ground: Ground,
        barrier: Callable[[], None],
    ) -> None:
        self._start = layout.data
        self._end = layout.data + layout.data_bytes
        self._table = table
        self._allocator = allocator
        self._moves = moves
        self._ground = ground
        self._barrier = barrier
        self._work: Generator[None, None, bool] | None = None
        self._unwanted = False
        self.holding = Holding(allocator, ground.give_back)
        self._slide: Iterator[int] = iter(())
        self._spent = 0
        self._spare_bytes = 0
        self._evicted: list[bytes] = []
        self.slice_bytes = SLICE_BYTES
        self.hidden = NO_ENTRY
        self.compactions = 0
        self.moves = 0
        self.moved_bytes = 0
        self.pins_met = 0

    # -- driving -------------------------------------------------------------------------------

    @property
    def is_busy(self) -> bool:
        """Whether there is a compaction to be advanced."""
        return self._work is not None

    def begin(
        self, size_bytes: int, fixed: Callable[[], Iterable[tuple[int, int]]], spare_bytes: int = 0
    ) -> None:
        """Begin to make a free extent.

        Parameters
        ----------
        size_bytes : int
            How large it is to be.
        fixed : callable
            ``fixed()`` gives offset and size of all that cannot be moved just then, overlaps and all.
        spare_bytes : int, optional
            How many bytes may be evicted that have no other place, rather than slide a run together.
        """
        assert self._work is None, "there is a compaction under way"
        self.compactions += 1
        self._unwanted = False
        self._spare_bytes = spare_bytes
        self._work = self._compact(align_up(size_bytes, ALIGNMENT) // ALIGNMENT, fixed)

    def advance(self) -> bool | None:
        """Do one slice; None if there are more, or it is given up, else whether there is such an extent now.

        All that was held is free then, and nobody else has had a chance to take it.
        """
        assert self._work is not None, "there is no compaction"
        if self._unwanted and self.hidden == NO_ENTRY:
            self._work.close()
            self._work = None
            return None
        try:
            next(self._work)
        except StopIteration as end:
            self._work = None
            return bool(end.value)
        return None

    def cancel(self) -> None:
        """Give the compaction up at the next opportunity."""
        self._unwanted = True

    def reveal(self, entry: int) -> None:
        """Make a hidden object readable now, however long that takes."""
        if entry == self.hidden:
            for _ in self._slide:
                pass
            self.hidden = NO_ENTRY

    def take_evicted(self) -> list[bytes]:
        """Return the ids of the objects that had to go since this was last asked."""
        evicted, self._evicted = self._evicted, []
        return evicted

    # -- the compaction ------------------------------------------------------------------------

    def _compact(
        self, wanted: int, fixed: Callable[[], Iterable[tuple[int, int]]]
    ) -> Generator[None, None, bool]:
        """Make a free extent of so many lines; tell whether there is one."""
        stuck: set[int] = set()
        homeless: set[int] = set()
        try:
            for plan in range(_PLANS):
                if self._allocator.largest_free_bytes >= wanted * ALIGNMENT:
                    break
                if self._allocator.free_bytes < wanted * ALIGNMENT:
                    return False
                ranges = self._ranges(fixed(), stuck)
                if all(high - low < wanted for low, high in ranges):
                    if not stuck:
                        return False
                    stuck.clear()  # what was pinned again and again may be free by now
                    yield
                    continue
                lines = self._allocator.free_lines()
                run = yield from best_run(*lines, ranges, wanted)
                around = ranges
                if run is not None:
                    around = self._ranges(fixed(), stuck | homeless) if plan < _WINDOWS else []
                window = yield from best_window(*lines, around, wanted)
                if window is None:
                    assert run is not None, "a range is long enough"
                    stuck.update((yield from self._close_up(run)))
                elif run is None:
                    stuck.update((yield from self._clear(window, fixed, stuck)))
                else:
                    pinned, left = yield from self._empty(window, self._spare_bytes)
                    stuck.update(pinned)
                    if left and not (pinned or self._displace(left, self._spare_bytes)):
                        homeless.update(entry for *_, entry in left)
            return self._allocator.largest_free_bytes >= wanted * ALIGNMENT
        finally:
            self.holding.let_go()

    def _ranges(self, fixed: Iterable[tuple[int, int]], stuck: Iterable[int]) -> list[Range]:
        """Return where nothing lies that cannot be moved, in lines."""
        table = self._table
        extents = [
            *fixed,
            *((table.location(e)[0], table.size(e)) for e in stuck if table.holds(e)),
        ]
        lines = [
            (offset // ALIGNMENT, align_up(offset + size, ALIGNMENT) // ALIGNMENT)
            for offset, size in extents
        ]
        return movable_ranges(self._start // ALIGNMENT, self._end // ALIGNMENT, lines)

    def _clear(
        self, window: Range, fixed: Callable[[], Iterable[tuple[int, int]]], stuck: Iterable[int]
    ) -> Generator[None, None, Iterable[int]]:
        """Empty a window where no run can be slid together; return the entries that are in the way."""
        pinned, homeless = yield from self._empty(window, _ALL)
        if pinned or not homeless or self._displace(homeless, self._spare_bytes):
            return pinned
        for low, high in self._ranges(fixed(), stuck):
            if high <= window[0] or low >= window[1]:
                yield from self._close_up((low, high))
        pinned, homeless = yield from self._empty(window, _ALL)
        if not pinned:
            self._displace(homeless, _ALL)
        return {*pinned, *(entry for *_, entry in homeless)}

    def _displace(self, homeless: Iterable[_Object], most: int) -> bool:
        """Evict objects that have no place elsewhere, if they are no more than `most` bytes; tell whether any has gone."""
        there = [each for each in homeless if self._is_there(each)]
        size_bytes = sum(size for _, size, *_ in there)
        evicted = (
            self._ground.displace([entry for *_, entry in there]) if size_bytes <= most else []
        )
        self._spare_bytes -= size_bytes if evicted else 0
        self._evicted += evicted
        return bool(evicted)

    def _empty(
        self, window: Range, most: int
    ) -> Generator[None, None, tuple[list[int], list[_Object]]]:
        """Move all out of a window; return what was pinned, and what has no place elsewhere.

        Nothing more is done when the latter is more than `most` bytes.
        """
        low, high = (line * ALIGNMENT for line in window)
        pinned: list[_Object] = []
        homeless: list[_Object] = []
        try:
            yield from self._hold(low, high)
            # Large ones first: small ones find a place in what is left.
            found = yield from self._objects(low, high, lambda each: -each[1])
            for _ in range(_TRIES):
                pinned = yield from self._evacuate(found, homeless, most)
                if not pinned or sum(size for _, size, *_ in homeless) > most:
                    break
                found = iter(pinned)
                yield
            return [entry for *_, entry in pinned], homeless
        finally:
            self.holding.let_go()

    def _evacuate(
        self, objects: Iterator[_Object], homeless: list[_Object], most: int
    ) -> Generator[None, None, list[_Object]]:
        """Move objects to wherever there is room, and return those that were pinned."""
        batch: list[tuple[_Object, int]] = []
        pinned: list[_Object] = []
        most -= sum(size for _, size, *_ in homeless)
        try:
            for each in objects:
                size = each[1]
                if not self._is_there(each):
                    continue
                target = self._allocator.allocate(size)
                if target is None or not (yield from self._prepare(target, size)):
                    homeless.append(each)
                    most -= size
                    if most < 0:
                        break
                    continue
                batch.append((each, target))
                yield from self._copy(each, target)
                if len(batch) == _BATCH:
                    pinned += self._switch(batch)
                yield from self._spend(_OBJECT_COST)
            pinned += self._switch(batch)
        finally:
            self._give_up(batch)
        return pinned

    def _close_up(self, run: Range) -> Generator[None, None, list[int]]:
        """Slide all objects of a range down; return one that was pinned, which has ended it."""
        low, high = (line * ALIGNMENT for line in run)
        try:
            yield from self._hold(low, high)
            cursor = low
            for each in (yield from self._objects(low, high, lambda each: each[0])):
                offset, size, _, entry = each
                for _ in range(_TRIES):
                    if offset == cursor or not self._is_there(each):
                        break
                    if (yield from self._shift(each, cursor)):
                        break
                    yield
                where = self._table.location(entry)[0] if self._table.holds(entry) else 0
                if where == cursor:
                    cursor += size
                elif where == offset:
                    return [entry]
            return []
        finally:
            self.holding.let_go()

    def _shift(self, each: _Object, target: int) -> Generator[None, None, bool]:
        """Move an object down within what is held; tell whether it has arrived."""
        offset, size, word, entry = each
        gap, cost = min(offset - target, size), _OBJECT_COST
        if not self.holding.take(target, gap):
            return False  # something without an entry, a lease, has come there before the range was held
        if not (yield from self._prepare(target, gap)):
            return False
        if gap == size:
            batch = [(each, target)]
            try:
                yield from self._copy(each, target)
                self._switch(batch)
            finally:
                self._give_up(batch)
        elif not self._is_there(each) or self._hide([entry]):
            self.holding.give_up(target)
        else:
            self.hidden = entry
            self._slide = self._slide_down(each, target)
            for piece in self._slide:
                for _ in self._spend(piece):
                    cost = self.slice_bytes
                    yield
        yield from self._spend(cost)
        return self._is_there((target, size, word + (1 << GENERATION_SHIFT), entry))

    def _copy(self, each: _Object, target: int) -> Iterator[None]:
        """Copy an object as long as it is there: where it was there may be no memory any more when it has gone."""
        offset, size, *_ = each
        pieces = self._moves.copy(offset, target, size)
        while self._is_there(each) and (piece := next(pieces, 0)):
            yield from self._spend(piece)

    def _slide_down(self, each: _Object, target: int) -> Iterator[int]:
        """Carry a hidden object to its new place, and note that it has arrived."""
        offset, size, _, entry = each
        yield from self._moves.slide(entry, target)
        self.hidden = NO_ENTRY
        self.holding.arrived(target)
        self._ground.give_back(target + size, offset - target)
        self._count(size)

    # -- the steps -----------------------------------------------------------------------------

    def _hold(self, low: int, high: int) -> Iterator[None]:
        """Hold what is free in a range."""
        for _ in self.holding.hold(low, high):
            yield from self._spend(_EXTENT_COST)

    def _spend(self, cost: int) -> Iterator[None]:
        """Yield when the slice is used up."""
        self._spent += cost
        if self._spent >= self.slice_bytes:
            self._spent = 0
            yield

    def _objects(
        self, low: int, high: int, key: Callable[[_Object], int]
    ) -> Generator[None, None, Iterator[_Object]]:
        """Find the objects in a range, in order; none at all if one of them cannot be moved."""
        parts: list[list[_Object]] = []
        for start in range(0, self._table.end, _SCAN):
            found = list(self._table.sealed_between(low, high, start, start + _SCAN))
            if any(entry == NO_ENTRY for *_, entry in found):
                return iter(())
            word = self._table.state_word
            part = [
                (offset, align_up(size, ALIGNMENT), word(entry), entry)
                for offset, size, entry in found
            ]
            part.sort(key=key)
            parts.append(part)
            yield from self._spend(SLICE_BYTES // 4)
        return merge(*parts, key=key)

    def _is_there(self, each: _Object) -> bool:
        """Tell whether an object that was found is where it was, SEALED, and no other one has come there."""
        offset, _, word, entry = each
        return self._table.state_word(entry) == word and self._table.location(entry)[0] == offset

    def _prepare(self, target: int, size: int) -> Generator[None, None, bool]:
        """Have memory behind an extent that was allocated; if there is none, tell so and give it back."""
        self.holding.keep(target, size)
        try:
            while not self._ground.prepare(target, size):
                yield
        except CommitError:
            self.holding.give_up(target)
            return False
        except GeneratorExit:
            self.holding.give_up(target)
            raise
        return True

    def _hide(self, entries: Sequence[int]) -> set[int]:
        """Take objects out of sight, as in a take; return those that somebody pins, which are seen again."""
        for entry in entries:
            self._table.set_state(entry, EntryState.MOVING)
        self._barrier()
        pinned = set(self._ground.pinned(entries)).intersection(entries)
        for entry in pinned:
            self._table.set_state(entry, EntryState.SEALED)
        self.pins_met += len(pinned)
        return pinned

    def _switch(self, batch: list[tuple[_Object, int]]) -> list[_Object]:
        """Let objects be where they were copied to; empties the batch and returns those that were pinned."""
        there = [pair for pair in batch if self._is_there(pair[0])]
        pinned = self._hide([entry for (*_, entry), _ in there]) if there else set()
        left: list[_Object] = []
        for each, target in there:
            offset, size, _, entry = each
            if entry in pinned:
                left.append(each)
                continue
            self._moves.arrive(entry, target)
            self.holding.arrived(target)
            self._ground.give_back(offset, size)
            self._count(size)
        self._give_up(batch)
        return left

    def _give_up(self, batch: list[tuple[_Object, int]]) -> None:
        """Give back the new places of what has not moved there."""
        for _, target in batch:
            self.holding.give_up(target)
        batch.clear()

    def _count(self, size: int) -> None:
        self.moves += 1
        self.moved_bytes += size
