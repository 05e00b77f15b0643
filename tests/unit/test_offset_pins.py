"""Pins by offset: what they say, and which entry they mean."""

from __future__ import annotations

from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmplasma.layout import ALIGNMENT, MAX_SEGMENT_BYTES, EntryState, EntryWord, Layout
from shmplasma.offset_pins import AT_OFFSET, OffsetPins, offset_of, pin_word
from shmplasma.table import Table
from tests.conversation import name, new_segment

LAYOUT = Layout.plan(1 << 20, 4096)
OFFSET = LAYOUT.data + 640


class Pinned:
    """A table and the pins of what is in it."""

    def __init__(self) -> None:
        self.words, raw = new_segment(LAYOUT)
        self.table = Table(LAYOUT, self.words, raw, lambda _, __: None)
        self.pins = OffsetPins(LAYOUT, self.words)

    def put(self, object_id: bytes, offset: int = OFFSET, size_bytes: int = 100) -> int:
        """Enter an object and return its entry."""
        return self.table.insert(object_id, 0, offset, size_bytes, 0, 1, EntryState.SEALED)


@pytest.fixture
def pinned() -> Pinned:
    """Return an empty table."""
    return Pinned()


@given(st.integers(0, (1 << 32) - 1), st.integers(0, MAX_SEGMENT_BYTES // ALIGNMENT - 1))
def test_a_word_tells_the_offset(hash32: int, line: int) -> None:
    """It is no entry + 1, and no other word."""
    word = pin_word(hash32, line * ALIGNMENT)
    assert offset_of(word) == line * ALIGNMENT
    assert AT_OFFSET <= word < 1 << 64


def test_each_object_is_found_by_its_word(pinned: Pinned) -> None:
    """And its word by its entry."""
    entries = [pinned.put(name(n), LAYOUT.data + n * ALIGNMENT) for n in range(1000)]
    for number, entry in enumerate(entries):
        word = pin_word(crc32(name(number)), LAYOUT.data + number * ALIGNMENT)
        assert pinned.pins.entry(word) == entry
        assert pinned.pins.word(entry) == word
        assert pinned.pins.offset(entry) == LAYOUT.data + number * ALIGNMENT


def test_a_word_at_whose_offset_nothing_lies_means_nothing(pinned: Pinned) -> None:
    """Nor does one of another chain."""
    word = pin_word(crc32(name(1)), OFFSET)
    assert pinned.pins.entry(word) == -1
    entry = pinned.put(name(1))
    assert pinned.pins.entry(word) == entry
    assert pinned.pins.entry(pin_word(crc32(name(1)) + 1, OFFSET)) == -1
    assert pinned.pins.entry(pin_word(crc32(name(1)), OFFSET + 64)) == -1
    pinned.table.remove(entry)
    assert pinned.pins.entry(word) == -1


def test_what_has_no_bytes_in_memory_lies_nowhere(pinned: Pinned) -> None:
    """An object without bytes, and one that is in the external store alone and says where it was."""
    word = pin_word(crc32(name(1)), OFFSET)
    empty = pinned.put(name(1), size_bytes=0)
    assert pinned.pins.entry(word) == pinned.pins.offset(empty) == -1
    assert pinned.pins.word(empty) == 0
    pinned.table.remove(empty)
    spilled = pinned.put(name(1))
    pinned.table.set_state(spilled, EntryState.SPILLED)
    assert pinned.pins.entry(word) == pinned.pins.offset(spilled) == -1
    assert pinned.pins.word(spilled) == 0


def test_a_chain_that_is_damaged_has_an_end(pinned: Pinned) -> None:
    """It is followed for so many steps as there are entries."""
    entry = pinned.put(name(1))
    pinned.words[LAYOUT.entry(entry) // 8 + EntryWord.NEXT] = entry + 1
    assert pinned.pins.entry(pin_word(crc32(name(1)), OFFSET + 64)) == -1
