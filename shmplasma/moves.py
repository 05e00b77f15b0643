"""Moves: how a sealed object gets to another place while clients read it, and while the store may die.  Pure.

Contents of a sealed object never change, so its bytes may be copied at leisure while clients go on reading the old
ones.  What a client must never see is an entry that says one place while it takes the other for its own; what a
successor must never find is an object with neither.

Readers
-------
A move is a take (`shmplasma.pins`) whose object stays::

    M1  copy the bytes to a free extent
    M2  state[e] = MOVING           a state that readers do not know: they ask the store
    M3  membarrier, read all boards
    M4a somebody pins e: state[e] = SEALED as it was; the copy is given up
    M4b nobody: offset[e] = the new place, CHECK; state[e] = SEALED under generation + 1; then the old extent is free

The argument is that of the take.  A reader that passes its re-check before M2 was visible is seen by M3.  One that read
the state word before M2, and re-checks after M4b, finds another generation: without that it would read under the old
offset what is somebody else's by then.  One that reads the word after M4b reads the new offset after it, and M1 came before.

*Where old and new place overlap*, M1 cannot come first: the copy destroys the original.  Then M2 and M3 come first, and
the object is hidden until the copy is done.

A death between any two writes
------------------------------
M4b writes more than one word, and a copy onto itself must not be begun anew.  So both are written down before: the
journal is five words of the header, of which MOVE_ENTRY is written last and cleared when the move is done.  While it is
set, a successor carries on where MOVE_DONE says, and repeats M4b, whose every write may be repeated.  It needs no barrier for
that: M3 has passed, nobody pins the object, and whoever has looked since has found it MOVING.  An object that is MOVING without a
journal lies where it lay.  Before an object is copied onto itself its own checksum goes: from then on nobody but a
whole journal vouches for it.

MOVE_DONE counts the lines that are copied.  A piece is no longer than the gap between old and new place, so it destroys nothing
of itself, only what earlier pieces have copied; it may be copied any number of times, until MOVE_DONE says that it is
there.  Where the gap is so small that pieces would be tiny, a piece goes by way of `STAGE_BYTES` in the header: MOVE_DONE says
in a bit of its own that the piece lies there, before it is written over its own original.

Invariants
----------
* One object is on its way at a time; only sealed objects are that nobody pins.
* MOVE_CHECK covers the entry, its id and sizes, source and target, and MOVE_DONE has a checksum of its own: a flipped bit
  loses the object at worst, and passes no wrong bytes off as it.
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct
from typing import Final
from zlib import crc32

from shmplasma.layout import (
    ALIGNMENT,
    STAGE_BYTES,
    STAGE_START,
    EntryState,
    HeaderWord,
    align_up,
)
from shmplasma.table import Table

__all__ = ["PIECE_BYTES", "Moves"]

PIECE_BYTES: Final = 1 << 20
"""As much is copied in one go at most: 0.2 to 0.8 ms, where the store has not touched the pages before."""

_ENTRY: Final = int(HeaderWord.MOVE_ENTRY)
_SOURCE: Final = int(HeaderWord.MOVE_SOURCE)
_TARGET: Final = int(HeaderWord.MOVE_TARGET)
_DONE: Final = int(HeaderWord.MOVE_DONE)
_CHECK: Final = int(HeaderWord.MOVE_CHECK)

_JOURNAL: Final = Struct("@QQQ")
_COUNT: Final = Struct("@Q")
_SHIFT: Final = ALIGNMENT.bit_length() - 1
_STAGED: Final = 1 << 42
"""Above the number of lines of any segment; above it is the checksum."""
_PRESENT: Final = 1 << 32


class Moves:
    """Changes the place of sealed objects in the segment.  Sizes are those of extents, in whole lines.

    Parameters
    ----------
    words, raw : memoryview
        The segment as native 8-byte words and as bytes, writable.
    table : Table
        The object table.

    Attributes
    ----------
    piece_bytes : int
        As much is copied in one go at most; whole lines.

    Notes
    -----
    Who may be moved, and where to, is the caller's affair; so are M2 and M3.  Not safe to share between threads.
    """

    def __init__(self, words: memoryview, raw: memoryview, table: Table) -> None:
        self._words = words
        self._raw = raw
        self._table = table
        self.piece_bytes = PIECE_BYTES

    def copy(self, source: int, target: int, size_bytes: int) -> Iterator[int]:
        """Copy an extent to another one, apart from it, piece by piece (M1); yield the length of each."""
        raw, done = self._raw, 0
        while done < size_bytes:
            piece = min(self.piece_bytes, size_bytes - done)
            raw[target + done : target + done + piece] = raw[source + done : source + done + piece]
            done += piece
            yield piece

    def arrive(self, entry: int, target: int) -> None:
        """Make a MOVING object, which was copied to its new place, readable there (M4b)."""
        source, size = self._extent(entry)
        self._begin(entry, source, target, size)
        self._end(entry, target)

    def slide(self, entry: int, target: int) -> Iterator[int]:
        """Move a MOVING object down by less than its length, piece by piece; yield the length of each.

        When all pieces have been yielded it has arrived.
        """
        source, size = self._extent(entry)
        self._begin(entry, source, target, 0)
        self._table.spoil(entry)
        yield from self._go_on(source, target, size, 0)
        self._end(entry, target)

    def finish(self) -> None:
        """Carry on with the move of a store that has died, if there is one; the table has been taken over."""
        words, table = self._words, self._table
        entry, source, target = words[_ENTRY] - 1, words[_SOURCE], words[_TARGET]
        if (
            table.holds(entry)
            and table.state(entry) == EntryState.MOVING
            and words[_CHECK] == self._check(entry, source, target)
        ):
            size = align_up(table.size(entry), ALIGNMENT)
            done = words[_DONE]
            copied = (done & (_STAGED - 1)) << _SHIFT
            if done == _sealed(done & (2 * _STAGED - 1)) and copied <= size:
                for _ in self._go_on(source, target, size, copied, staged=bool(done & _STAGED)):
                    pass
                table.relocate(entry, target)
            else:
                table.spoil(entry)  # nobody knows which of its bytes are its own
        words[_ENTRY] = 0

    def _extent(self, entry: int) -> tuple[int, int]:
        offset, data_size, metadata_size = self._table.location(entry)
        return offset, align_up(data_size + metadata_size, ALIGNMENT)

    def _begin(self, entry: int, source: int, target: int, done: int) -> None:
        words = self._words
        words[_SOURCE] = source
        words[_TARGET] = target
        words[_DONE] = _sealed(done >> _SHIFT)
        words[_CHECK] = self._check(entry, source, target)
        words[_ENTRY] = entry + 1

    def _check(self, entry: int, source: int, target: int) -> int:
        start = _JOURNAL.pack(entry, source, target)
        return _PRESENT | crc32(self._table.identity(entry), crc32(start))

    def _end(self, entry: int, target: int) -> None:
        self._table.relocate(entry, target)
        self._words[_ENTRY] = 0

    def _go_on(
        self, source: int, target: int, size: int, done: int, *, staged: bool = False
    ) -> Iterator[int]:
        """Copy what is left, and write down how far it has got."""
        words, raw, gap = self._words, self._raw, source - target
        while done < size:
            if staged or gap < min(STAGE_BYTES, size - done):
                piece = min(STAGE_BYTES, size - done)
                if not staged:
                    raw[STAGE_START : STAGE_START + piece] = raw[
                        source + done : source + done + piece
                    ]
                    words[_DONE] = _sealed(done >> _SHIFT | _STAGED)
                raw[target + done : target + done + piece] = raw[STAGE_START : STAGE_START + piece]
                staged = False
            else:
                piece = min(gap, self.piece_bytes, size - done)
                raw[target + done : target + done + piece] = raw[
                    source + done : source + done + piece
                ]
            done += piece
            words[_DONE] = _sealed(done >> _SHIFT)
            yield piece


def _sealed(count: int) -> int:
    """Return a number of lines, with or without the bit for what is staged, under a checksum of 21 bits."""
    return count | crc32(_COUNT.pack(count)) >> 11 << 43
