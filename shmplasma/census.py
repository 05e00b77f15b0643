"""Listing objects without a message, as far as that can be seen in the segment.

The store lists objects when it has read all outboxes; a client may do so by itself when they are read (`shmplasma.settling`).

Theory of operation
-------------------
Of each part of the table, so many entries in a row, and of the boards of all clients:

L1. the states of the entries; one that is neither FREE, CREATED nor SEALED: ask
L2. those entries that are not FREE
L3. whose the boards are, what stands on them, and whose they are now; not the same as before: ask
L4. their states are not what they were: L1 again, or ask

*What L2 read is of one moment.*  The fields of an entry change only while it is FREE or CREATED, and each (generation, state) pair stands for one
incarnation (`shmplasma.table`); a pair returns only when a take was given up, which changes nothing.  What changes while an object is CREATED is written before the state that
says so.  x86-64 keeps the order of loads and that of stores; so if L4 finds what L1 has found, the entries were at L1 what L2 has read.

*What was put before is there, and what was deleted is not.*  What was written is read, hence done, or seen to be under way: an object that is being taken, deleted
while it is pinned, moved, or that is in the external store is none of FREE, CREATED and SEALED.  An object that was deleted while it was on its way is SEALED for a moment
when it has arrived, and marked: that is asked for as well.

*How many hold an object* is what the store counts: the clients that have it on a board, and the one that has lent a slot for what is CREATED.  What is pinned by its offset
(`shmplasma.offset_pins`) is the store's to tell.

Nothing is written, so an interrupt, a fork or the collector does no harm between any two steps.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable
from typing import Final

import numpy as np

from shmplasma.attachment import Attachment
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
from shmplasma.offset_pins import AT_OFFSET
from shmplasma.pins import words_on
from shmplasma.replies import Listing
from shmplasma.settling import Settling

__all__ = ["Census"]

_PART: Final = 4096
"""Entries that are looked at for one part, in which time the states of those with objects are not to change."""
_ATTEMPTS: Final = 3
_CREATED: Final = int(EntryState.CREATED)
_FREE: Final = int(EntryState.FREE)
_SEALED: Final = int(EntryState.SEALED)
_OWNER: Final = int(EntryWord.OWNER)
_FIRST_BOARD: Final = int(ControlWord.FIRST_BOARD)
_ENTRIES_USED: Final = HeaderWord.ENTRIES_USED
_BOARDS_END: Final = int(HeaderWord.BOARDS_END)
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

    __slots__ = ("_entries", "_layout", "_marks", "_raw", "_settling", "_states", "_words")

    def __init__(self, attachment: Attachment, settling: Settling) -> None:
        layout = self._layout = attachment.layout
        self._raw = memoryview(attachment.read_map)
        self._words = attachment.words
        self._settling = settling
        words = np.frombuffer(attachment.read_map, np.uint64)
        first, count = layout.entries // 8, layout.n_entries
        entries = words[first : first + count * ENTRY_WORDS].reshape(count, ENTRY_WORDS)
        self._entries, self._states = entries, entries[:, EntryWord.STATE]
        self._marks = words[layout.marks // MARK_BYTES :][:count]

    def listing(self, start: int) -> Listing | None:
        """Return a part of the list, from an entry on; None: ask the store for it.

        Notes
        -----
        O(4,096 entries), 5 ns for each, and 0.3 us for each board that is granted.
        """
        if not start and not self._settling.all_is_read():
            return None
        n_entries = self._layout.n_entries
        end = read_end(self._words, _ENTRIES_USED, n_entries + 1)
        if end > n_entries:
            # Damaged, or being written: where there is no memory nothing may be read.
            return None
        attempts = 0
        while attempts < _ATTEMPTS:
            stop = min(start + _PART, end)
            states = self._states[start:stop].copy()
            (found,) = (states.astype(np.uint8) != _FREE).nonzero()
            if not found.size:
                if stop == end:
                    return Listing(0, b"", b"")
                start = stop
                continue
            states = states[found]
            kinds = states.astype(np.uint8)
            found += start
            if kinds.max() > _SEALED or np.count_nonzero(self._marks[found] == states):
                return None
            entries = self._entries[found].tobytes()
            holders = self._holders(found[kinds == _CREATED].tolist())
            if holders is None:
                return None
            if self._states[found].tobytes() == states.tobytes():
                counts = array("I", [holders.get(entry, 0) for entry in found.tolist()])
                return Listing(stop if stop < end else 0, counts.tobytes(), entries)
            attempts += 1
        return None

    def _holders(self, created: Iterable[int]) -> Counter[int] | None:
        """Return how many clients hold which entry, of which these are CREATED; None: ask the store."""
        owners = self._owners()
        boards: dict[int, list[int]] = {}
        for board, owner in enumerate(owners):
            if owner:
                boards.setdefault(owner, []).append(board)
        counts = Counter[int]()
        held: dict[int, set[int]] = {}
        for owner, own in boards.items():
            words = words_on(self._raw, self._layout, own)
            if words:
                if max(words) >= AT_OFFSET:
                    return None
                held[owner] = {word - 1 for word in words}
                counts.update(held[owner])
        for entry in created:
            slot = self._words[self._layout.entry(entry) // 8 + _OWNER] - 1
            board = slot // BOARD_WORDS
            if not 0 <= board < len(owners) or not owners[board]:
                return None
            if entry not in held.get(owners[board], ()):
                counts[entry] += 1
        return counts if self._owners() == owners else None

    def _owners(self) -> list[int]:
        """Return whose the boards are: the first board + 1 of each one's client, or 0."""
        first = self._layout.control // 8 + _FIRST_BOARD
        end = self._words[_BOARDS_END]
        return self._words[first : first + end * _LINE_WORDS : _LINE_WORDS].tolist()
