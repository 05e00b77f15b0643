from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmplasma.layout import STAGE_BYTES, EntryState, HeaderWord, Layout, align_up
from shmplasma.moves import Moves
from shmplasma.remains import DeadTable
from shmplasma.table import Table
from tests.conversation import RecordedMemory, name, new_segment
from tests.crash.damage import Clock, Death, Dying

CAPACITY = 1 << 16


def dying(view: memoryview, clock: Clock) -> Any:
    """Return a view that stands for a memoryview, and can die at a write."""
    return Dying(view, clock)


class Shelf:
    """A segment with one sealed object, and the moves of a store that can die."""

    def __init__(self, offset: int, size_bytes: int) -> None:
        self.layout = Layout.plan(CAPACITY, 4096)
        self.words, self.raw = new_segment(self.layout)
        self.clock = Clock()
        self.table = Table(
            self.layout, dying(self.words, self.clock), dying(self.raw, self.clock), self.commit
        )
        self.moves = self.new_moves(self.table)
        self.offset = self.layout.data + offset
        self.content = bytes(n * 7 % 251 for n in range(size_bytes))
        self.entry = self.table.insert(name(1), 3, self.offset, size_bytes - 5, 5, 1_000)
        self.raw[self.offset : self.offset + size_bytes] = self.content
        self.table.seal(self.entry, 2_000)
        self.word = self.table.state_word(self.entry)

    def commit(self, offset: int, size_bytes: int) -> None:
        """Have memory, as a test always has."""
        RecordedMemory().commit(offset, size_bytes)

    def new_moves(self, table: Table) -> Moves:
        """Return what moves objects in pieces of some lines."""
        moves = Moves(dying(self.words, self.clock), dying(self.raw, self.clock), table)
        moves.piece_bytes = 4096
        return moves

    def move(self, target: int) -> None:
        """Move the object, the way that there is room for."""
        size = align_up(len(self.content), 64)
        if abs(target - self.offset) >= size:
            for _ in self.moves.copy(self.offset, target, size):
                assert self.read() == self.content
            self.table.set_state(self.entry, EntryState.MOVING)
            self.moves.arrive(self.entry, target)
        else:
            self.table.set_state(self.entry, EntryState.MOVING)
            for _ in self.moves.slide(self.entry, target):
                assert self.table.state(self.entry) == EntryState.MOVING

    def recover(self) -> DeadTable:
        """Return the table as another store finds it, which has carried on with the move."""
        table = Table(self.layout, self.words, self.raw, self.commit)
        dead = table.take_over()
        self.new_moves(table).finish()
        return dead

    def read(self) -> bytes:
        """Return what lies where the table says."""
        offset, data_size, metadata_size = self.table.location(self.entry)
        return bytes(self.raw[offset : offset + data_size + metadata_size])

    def is_whole(self, dead: DeadTable) -> bool:
        """Tell whether a successor finds the object, complete and with its bytes."""
        return dead.scan().complete[self.entry] and self.read() == self.content


MOVES = [
    (0, 700, 6400),
    (6400, 700, 0),
    (64, 6000, 0),
    (64, 12_000, 0),
    (2048, 9000, 0),
    (4160, 9000, 0),
]
"""Offset, size and target: disjoint both ways, and overlapping by all but little, with and without the stage."""


@pytest.mark.parametrize(("offset", "size", "target"), MOVES)
def test_a_moved_object_is_the_same_elsewhere(offset: int, size: int, target: int) -> None:
    """Id, codec, sizes and bytes stay, and the generation rises."""
    shelf = Shelf(offset, size)
    shelf.move(shelf.layout.data + target)
    table = shelf.table
    assert table.location(shelf.entry) == (shelf.layout.data + target, size - 5, 5)
    assert shelf.read() == shelf.content
    assert table.id_and_codec(shelf.entry) == (name(1), 3)
    assert table.state_word(shelf.entry) == shelf.word + 256
    assert shelf.words[HeaderWord.MOVE_ENTRY] == 0
    assert shelf.is_whole(shelf.recover())


@pytest.mark.parametrize(("offset", "size", "target"), MOVES)
def test_a_death_at_each_write_of_a_move(offset: int, size: int, target: int) -> None:
    """A successor finds every byte, at the old place or at the new one; so does the one after it."""
    number = Shelf(offset, size).clock.writes
    while True:
        shelf = Shelf(offset, size)
        shelf.clock.dies_at = number
        try:
            shelf.move(shelf.layout.data + target)
        except Death:
            # The next one dies as well, somewhere.
            shelf.clock.dies_at = shelf.clock.writes + number % 7
            mortal = Table(
                shelf.layout,
                dying(shelf.words, shelf.clock),
                dying(shelf.raw, shelf.clock),
                shelf.commit,
            )
            try:
                mortal.take_over()
                shelf.new_moves(mortal).finish()
            except Death:
                pass
            shelf.clock.dies_at = None
            assert shelf.is_whole(shelf.recover()), f"it died at its write {number}"
            number += 1
        else:
            break
    assert number > 10


@given(
    st.integers(0, 30).map(lambda n: n * 64),
    st.integers(1, 9000),
    st.integers(0, 30).map(lambda n: n * 64),
)
def test_any_slide(offset: int, size: int, target: int) -> None:
    """By whatever distance an object slides down, its bytes are the same."""
    low, high = sorted((offset, target))
    shelf = Shelf(high + 64, size + 5)
    shelf.move(shelf.layout.data + low)
    assert shelf.read() == shelf.content


@pytest.mark.parametrize("word", range(HeaderWord.MOVE_ENTRY, HeaderWord.MOVE_CHECK + 1))
@pytest.mark.parametrize("n_pieces", [1, 3])
def test_a_damaged_journal_moves_nothing(word: int, n_pieces: int) -> None:
    """What nobody can vouch for is lost; no wrong byte is served, and nothing else is touched."""
    for bit in range(64):
        shelf = Shelf(64 + STAGE_BYTES, 9000)
        shelf.table.set_state(shelf.entry, EntryState.MOVING)
        slide = shelf.moves.slide(shelf.entry, shelf.layout.data + 64)
        for _ in range(n_pieces):
            next(slide)
        shelf.words[word] ^= 1 << bit
        before = bytes(shelf.raw[shelf.layout.data + 20_000 :])
        dead = shelf.recover()
        assert not dead.scan().complete[shelf.entry]
        assert not dead.is_begun(shelf.entry)
        assert bytes(shelf.raw[shelf.layout.data + 20_000 :]) == before


def test_a_journal_of_the_past_moves_nothing() -> None:
    """A store that dies when the object has arrived, and before the journal is cleared, has moved it once."""
    shelf = Shelf(64, 6000)
    shelf.move(shelf.layout.data)
    shelf.words[HeaderWord.MOVE_ENTRY] = shelf.entry + 1
    assert shelf.is_whole(shelf.recover())
    assert shelf.words[HeaderWord.MOVE_ENTRY] == 0
