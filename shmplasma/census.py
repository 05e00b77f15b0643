"""Listing objects without a message, as far as that can be seen in the segment.

The store lists objects when it has read all outboxes; a client may do so by itself when they are read (`shmplasma.settling`).

Theory of operation
-------------------
Of each part of the table, so many entries in a row, and of the boards of all clients:

L1. the states of the entries; one that is neither FREE, CREATED nor SEALED: ask
L2. the entries
L3. whose the boards are, what stands on them, and whose they are now; not the same as before: ask
L4. the states are not what they were: L1 again, or ask

*What L2 read is of one moment.*  The fields of an entry change only while it is FREE or CREATED, and each (generation, state) pair stands for one
incarnation (`shmplasma.table`); a pair returns only when a take was given up, which changes nothing.  What changes while an object is CREATED is written before the state that
says so.  x86-64 keeps the order of loads and that of stores; so if L4 finds what L1 has found, all entries were at L1 what L2 has read.

*What was put before is there, and what was deleted is not.*  What was written is read, hence done, or seen to be under way: an object that is being taken, deleted
while it is pinned, moved, or that is in the external store is none of FREE, CREATED and SEALED.  An object that was deleted while it was on its way is SEALED for a moment
when it has arrived, and marked: that is asked for as well.

*How many hold an object* is what the store counts: the clients that have it on a board, and the one that has lent a slot for what is CREATED.  What is pinned by its offset
(`shmplasma.claims`) is the store's to tell.

Nothing is written, so an interrupt, a fork or the collector does no harm between any two steps.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable
from operator import eq
from typing import Final

from shmplasma.attachment import Attachment
from shmplasma.claims import AT_OFFSET
from shmplasma.layout import (
    BOARD_WORDS,
    CONTROL_BYTES,
    ENTRY_WORDS,
    MARK_BYTES,
    ControlWord,
    EntryState,
    EntryWord,
    HeaderWord,
    read_end,
)
from shmplasma.pins import words_on
from shmplasma.replies import Listing
from shmplasma.rows import entries_of, rows
from shmplasma.settling import Settling

__all__ = ["Census"]

_PLAIN: Final = bytes((EntryState.FREE, EntryState.CREATED, EntryState.SEALED))
_CREATED: Final = b"%c" % EntryState.CREATED
_PART: Final = 4096
"""Entries that are looked at for one part: 60 us, in which their states are not to change."""
_ATTEMPTS: Final = 3
_LINE_WORDS: Final = CONTROL_BYTES // 8


class Census:
    """Lists the objects of a store.

    Parameters
    ----------
    attachment : Attachment
        The segment.
    settling : Settling
        Has the store read what was put.

    Notes
    -----
    Thread-safe.
    """

    __slots__ = ("_layout", "_raw", "_settling", "_words")

    def __init__(self, attachment: Attachment, settling: Settling) -> None:
        self._layout = attachment.layout
        self._raw = memoryview(attachment.read_map)
        self._words = attachment.words
        self._settling = settling

    def listing(self, start: int) -> Listing | None:
        """Return a part of the list, from an entry on; None: ask the store for it.

        Notes
        -----
        O(4,096 entries), and 0.3 us for each board that was ever granted.
        """
        if not start and not self._settling.all_is_read():
            return None
        layout = self._layout
        end = read_end(self._words, HeaderWord.ENTRIES_END, layout.n_entries + 1)
        if end > layout.n_entries:  # where there is no memory nothing may be read
            return None
        stop = min(start + _PART, end)
        for _ in range(_ATTEMPTS):
            states = self._states(start, stop)
            kinds = states[::8]  # x86-64: of a word the low byte is the first
            if kinds.translate(None, _PLAIN):
                return None
            found = rows(kinds, _PART)
            if self._are_deleted(found, states, start):
                return None
            entries = entries_of(self._raw[layout.entry(start) : layout.entry(stop)], found)
            holders = self._holders(start, kinds)
            if holders is None:
                return None
            if self._states(start, stop) == states:
                counts = array("I", [holders[start + entry + 1] for row in found for entry in row])
                return Listing(stop if stop < end else 0, counts.tobytes(), entries)
        return None

    def _states(self, start: int, stop: int) -> bytes:
        """Return the state words of some entries."""
        first = self._layout.entries // 8
        states = self._words[first + start * ENTRY_WORDS : first + stop * ENTRY_WORDS : ENTRY_WORDS]
        return states.tobytes()

    def _are_deleted(self, found: Iterable[range], states: bytes, start: int) -> bool:
        """Tell whether one of the entries that were found is marked as deleted in the state that it has."""
        words = memoryview(states).cast("Q")
        marks = self._words[self._layout.marks // MARK_BYTES + start :]
        return any(
            any(map(eq, words[row.start : row.stop], marks[row.start : row.stop])) for row in found
        )

    def _holders(self, start: int, kinds: bytes) -> Counter[int] | None:
        """Return how many clients hold which entry + 1; None: ask the store."""
        owners = self._owners()
        counts = Counter[int]()
        held: dict[int, set[int]] = {}
        for owner in set(owners):
            boards = [board for board, each in enumerate(owners) if each == owner]
            words = held[owner] = words_on(self._raw, self._layout, boards) if owner else set()
            if words:
                if max(words) >= AT_OFFSET:
                    return None
                counts.update(words)
        at = kinds.find(_CREATED)
        while at >= 0:
            word = self._layout.entry(start + at) // 8 + EntryWord.OWNER
            board = (self._words[word] - 1) // BOARD_WORDS
            if not 0 <= board < len(owners) or not owners[board]:
                return None
            if start + at + 1 not in held[owners[board]]:
                counts[start + at + 1] += 1
            at = kinds.find(_CREATED, at + 1)
        return counts if self._owners() == owners else None

    def _owners(self) -> list[int]:
        """Return whose the boards are: the first board + 1 of each one's client, or 0."""
        first = self._layout.control // 8 + ControlWord.FIRST_BOARD
        end = self._words[HeaderWord.BOARDS_END]
        return self._words[first : first + end * _LINE_WORDS : _LINE_WORDS].tolist()
