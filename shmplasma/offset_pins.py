"""Pins by offset: how somebody holds an object whose entry he does not know.

A slot mostly says which entry it pins (`shmplasma.pins`).  Who has an object before the store has entered it knows where it lies, and no entry: its
creator (`shmplasma.claims`), and who has it from a record that the store has not read (`shmplasma.unread`, `shmplasma.hints`).  His
slot says where the object lies, and in which chain of the table it will be::

    bit 63   62 to 40                      39 to 0
    1        low bits of the id's CRC-32   offset / 64

So it is understood without a list of who has what: as soon as the object is in the table it is found by following that chain, and a store that is
started again finds it the same way.  An object that is pinned does not move, so it is at that offset as long as the slot says so.
A word at whose offset no such object lies counts for nothing, as any other word that a client makes up.
"""

from __future__ import annotations

from struct import Struct
from typing import Final
from zlib import crc32

from shmplasma.layout import (
    ALIGNMENT,
    ENTRY_WORDS,
    ID_BYTES,
    MAX_SEGMENT_BYTES,
    STATE_MASK,
    EntryState,
    EntryWord,
    Layout,
)

__all__ = ["AT_OFFSET", "OffsetPins", "offset_of", "pin_word"]

AT_OFFSET: Final = 1 << 63
"""In a slot: what follows is no entry."""

_SHIFT: Final = ALIGNMENT.bit_length() - 1
_LINE_BITS: Final = MAX_SEGMENT_BYTES.bit_length() - 1 - _SHIFT
_LINES: Final = (1 << _LINE_BITS) - 1
_HASHES: Final = (1 << 63 - _LINE_BITS) - 1
_ID: Final = int(EntryWord.ID)
_ID_WORDS: Final = Struct("@QQQ")
_OFFSET: Final = int(EntryWord.OFFSET)
_DATA_SIZE: Final = int(EntryWord.DATA_SIZE)
_METADATA_SIZE: Final = int(EntryWord.METADATA_SIZE)
_NEXT: Final = int(EntryWord.NEXT)
_SPILLED: Final = int(EntryState.SPILLED)


def pin_word(hash32: int, offset: int) -> int:
    """Return what a slot holds that pins the object at an offset of the segment, whose id has this CRC-32.

    Examples
    --------
    >>> hex(pin_word(1, 0x40))
    '0x8000010000000001'
    """
    return AT_OFFSET | (hash32 & _HASHES) << _LINE_BITS | offset >> _SHIFT


def offset_of(word: int) -> int:
    """Return the offset in such a word.

    Examples
    --------
    >>> offset_of(pin_word(0xFFFF_FFFF, 4096))
    4096
    """
    return (word & _LINES) << _SHIFT


class OffsetPins:
    """Finds what such words pin.

    Parameters
    ----------
    layout : Layout
        Where the table lies.
    words : memoryview
        The segment as native 8-byte words.
    """

    __slots__ = ("_buckets", "_entries", "_longest", "_mask", "_words")

    def __init__(self, layout: Layout, words: memoryview) -> None:
        self._words = words
        self._buckets = layout.buckets // 8
        self._mask = layout.n_buckets - 1
        self._longest = layout.n_entries
        # Chains count entries from 1.
        self._entries = layout.entries // 8 - ENTRY_WORDS

    def entry(self, word: int) -> int:
        """Return the entry of the object that a word pins, -1 if there is none; O(1) expected, 1 us."""
        words = self._words
        offset = offset_of(word)
        entry = words[self._buckets + (word >> _LINE_BITS & self._mask)]
        steps = 0
        while entry and steps < self._longest:
            at = self._entries + entry * ENTRY_WORDS
            if words[at + _OFFSET] == offset and self._has_bytes(at):
                return int(entry) - 1
            entry = words[at + _NEXT]
            steps += 1
        return -1

    def offset(self, entry: int) -> int:
        """Return where the object of an entry lies, -1 if it has no bytes in memory."""
        at = self._entries + (entry + 1) * ENTRY_WORDS
        return int(self._words[at + _OFFSET]) if self._has_bytes(at) else -1

    def word(self, entry: int) -> int:
        """Return what pins the object of an entry by its offset, 0 if it has no bytes in memory."""
        offset = self.offset(entry)
        if offset < 0:
            return 0
        at = self._entries + (entry + 1) * ENTRY_WORDS + _ID
        object_id = _ID_WORDS.pack(*self._words[at : at + 3])[:ID_BYTES]
        return pin_word(crc32(object_id), offset)

    def _has_bytes(self, at: int) -> bool:
        """Tell whether the object of the entry at a word has bytes in memory; what has none lies nowhere."""
        words = self._words
        return bool(
            words[at] & STATE_MASK != _SPILLED
            and (words[at + _DATA_SIZE] or words[at + _METADATA_SIZE])
        )
