"""A room in which objects come, go, are pinned and are moved, a slice at a time, beside a dict of their contents."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from shmplasma.layout import ALIGNMENT, EntryState, align_up
from shmplasma.table import NO_ENTRY
from tests.unit.test_room import Storeroom

LINES = 64
NUMBERS = st.integers(0, 1000)
SIZES = st.integers(1, 6 * ALIGNMENT) | st.integers(1, 30 * ALIGNMENT)


class MoverMachine(RuleBasedStateMachine):
    """A room, what lies in it, and a request for room that waits for objects to be moved."""

    @initialize(
        slice_bytes=st.sampled_from([1, 200, 1 << 20]),
        piece_bytes=st.sampled_from([64, 256]),
        sizes=st.lists(SIZES, min_size=5, max_size=40),
        step=st.integers(1, 4),
    )
    def start(self, slice_bytes: int, piece_bytes: int, sizes: list[int], step: int) -> None:
        """Begin with a room in which some objects have gone."""
        self.place = Storeroom(LINES * ALIGNMENT)
        self.room = self.place.room
        self.room.mover.slice_bytes = slice_bytes
        self.place.moves.piece_bytes = piece_bytes
        self.contents: dict[int, bytes] = {}
        self.pins: dict[int, tuple[int, int]] = {}
        self.wanted = 0
        self.put(sizes)
        self.take(0, step)

    # -- what happens to objects -------------------------------------------------------------------

    @rule(sizes=st.lists(SIZES, min_size=1, max_size=20))
    def put(self, sizes: list[int]) -> None:
        """Put objects for which there is an extent."""
        for size in sizes:
            if self.room.largest_bytes < align_up(size, ALIGNMENT):
                continue
            number = self.place.n_objects
            entry = self.place.put(size)
            mark = f"{number};".encode()
            content = (mark * (size // len(mark) + 1))[:size]
            offset = self.place.table.location(entry)[0]
            self.place.raw[offset : offset + size] = content
            self.contents[entry] = content

    @precondition(lambda self: self.contents)
    @rule(which=NUMBERS, step=st.integers(1, 4))
    def take(self, which: int, step: int) -> None:
        """Delete some of those objects that nobody pins or moves."""
        entries = sorted(self.contents)[which % len(self.contents) :: step]
        pinned = {entry for entry, _ in self.pins.values()}
        entries = [e for e in entries if e not in pinned and e != self.room.mover.hidden]
        for entry in self.room.take(entries):
            del self.contents[entry]

    @precondition(lambda self: self.contents)
    @rule(which=NUMBERS)
    def pin(self, which: int) -> None:
        """Find an object and pin it, as readers do."""
        entry = sorted(self.contents)[which % len(self.contents)]
        slot = next(slot for slot in range(1, 500) if slot not in self.pins)
        if self.place.table.state(entry) == EntryState.SEALED:
            self.place.boards.pin(slot, entry)
            self.pins[slot] = entry, self.place.table.location(entry)[0]

    @precondition(lambda self: self.contents)
    @rule(which=NUMBERS)
    def pin_too_late(self, which: int) -> None:
        """Pin an object between its lookup and the next barrier: the move of it must be given up."""
        entry = sorted(self.contents)[which % len(self.contents)]
        if self.place.table.state(entry) != EntryState.SEALED:
            return
        offset = self.place.table.location(entry)[0]
        word = self.place.table.state_word(entry)

        def at_barrier() -> None:
            # It has read state and offset before, and its second look at the state is still to come.
            slot = next(slot for slot in range(1, 500) if slot not in self.pins)
            now = self.place.table.state_word(entry)
            if now >> 8 == word >> 8 and entry in self.contents:
                self.place.boards.pin(slot, entry)
                self.pins[slot] = entry, offset

        self.place.memory.at_barrier = at_barrier

    @precondition(lambda self: self.pins)
    @rule(which=NUMBERS)
    def release(self, which: int) -> None:
        """Let go of an object."""
        slot = sorted(self.pins)[which % len(self.pins)]
        del self.pins[slot]
        self.place.boards.pin(slot, -1)

    @rule(size=SIZES)
    def lease(self, size: int) -> None:
        """Take an extent that no entry of the table names."""
        if self.room.largest_bytes >= align_up(size, ALIGNMENT):
            offset, _ = self.room.allocate(size)
            assert offset is not None
            self.place.unnamed.append((offset, size))

    @precondition(lambda self: self.place.unnamed)
    @rule(which=NUMBERS)
    def end_lease(self, which: int) -> None:
        """Give such an extent back."""
        self.room.give_back(*self.place.unnamed.pop(which % len(self.place.unnamed)))

    # -- compacting --------------------------------------------------------------------------------

    @precondition(lambda self: not self.room.mover.is_busy)
    @rule(share=st.integers(0, 1000), spare_lines=st.sampled_from([0, 0, 1, 5]))
    def ask(self, share: int, spare_lines: int) -> None:
        """Ask for an extent where there are bytes enough, and none as large."""
        largest, free = self.room.largest_bytes // ALIGNMENT, self.room.free_bytes // ALIGNMENT
        if largest < free:
            self.wanted = largest + 1 + share * (free - largest - 1) // 1000
            spare_bytes = spare_lines * ALIGNMENT
            self.room.mover.begin(self.wanted * ALIGNMENT, self.place.pinned_extents, spare_bytes)

    @precondition(lambda self: self.room.mover.is_busy)
    @rule(slices=st.integers(1, 30))
    def advance(self, slices: int) -> None:
        """Move objects for a while."""
        mover, table = self.room.mover, self.place.table
        for _ in range(slices):
            free, had_hook = self.room.free_bytes, self.place.memory.at_barrier is not None
            done = mover.advance()
            for object_id in mover.take_evicted():
                assert table.find(object_id) == NO_ENTRY
            for entry in [e for e in self.contents if not table.holds(e)]:
                del self.contents[entry]
            if done is None:
                continue
            largest = self.room.largest_bytes >= self.wanted * ALIGNMENT
            assert done == largest
            if not done and not had_hook and free >= self.wanted * ALIGNMENT:
                assert self.largest_gap() < self.wanted * ALIGNMENT, "nothing is in the way"
            return

    @precondition(lambda self: self.room.mover.is_busy)
    @rule()
    def cancel(self) -> None:
        """Want it no more."""
        mover = self.room.mover
        mover.cancel()
        while mover.is_busy:
            mover.advance()
            self.place.check()

    @precondition(lambda self: self.room.mover.hidden != NO_ENTRY)
    @rule()
    def reveal(self) -> None:
        """Want to read the object that is hidden, at once."""
        entry = self.room.mover.hidden
        self.room.mover.reveal(entry)
        assert self.place.table.state(entry) == EntryState.SEALED

    def largest_gap(self) -> int:
        """Return the largest distance between what cannot be moved."""
        start = self.place.layout.data
        fixed = self.place.pinned_extents()
        extents = sorted({(offset, align_up(size, ALIGNMENT)) for offset, size in fixed})
        ends = [start, *(offset + size for offset, size in extents)]
        starts = [*(offset for offset, _ in extents), start + LINES * ALIGNMENT]
        return max(after - before for before, after in zip(ends, starts, strict=True))

    # -- what always holds -------------------------------------------------------------------------

    @invariant()
    def tiles_the_room(self) -> None:
        """Let table, boards, allocator and mover prove that they agree."""
        self.place.check()

    @invariant()
    def keeps_every_byte(self) -> None:
        """Find each object's content where the table says, but for one that is on its way."""
        table = self.place.table
        for entry, content in self.contents.items():
            if entry != self.room.mover.hidden:
                offset, size, _ = table.location(entry)
                assert bytes(self.place.raw[offset : offset + size]) == content
                assert table.state(entry) == EntryState.SEALED

    @invariant()
    def moves_nothing_under_a_pin(self) -> None:
        """Find what is pinned where it was when it was pinned."""
        for entry, offset in self.pins.values():
            assert self.place.table.location(entry)[0] == offset


TestMoverMachine = MoverMachine.TestCase
TestMoverMachine.settings = settings(deadline=None, stateful_step_count=50)
