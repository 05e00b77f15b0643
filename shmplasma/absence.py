"""Telling that an object is not there without a message, as far as that can be seen in the segment.

A negative answer says that nothing was put under the id whose put was over when the question was asked.  The store gives it when it has
read all outboxes; a client may give it when it sees that the store had read them already.

Theory of operation
-------------------
======================================================  ==========================================================
client that asks                                        store, for a record of an outbox (`shmplasma.outbox`)
======================================================  ==========================================================
A1. for each board b that is granted:                   R1. a = ACKNOWLEDGED
    n = ACKNOWLEDGED of b                               R2. copy record a
    while place n has the number n + 1: n = n + 1       R3. insert the object (`shmplasma.table`)
    ACKNOWLEDGED of b is n at most; else A1 again       R4. ACKNOWLEDGED = a + 1
    until ACKNOWLEDGED of b is n at least: wait
A2. i = INSERTIONS; i is odd: ask
A3. follow the chain; the id is there: ask
A4. INSERTIONS is not i: A2 again, or ask
======================================================  ==========================================================

Whoever finds anything else than this, or has waited for some time, asks the store.  Mostly there is nothing to wait for; nor is there where none of the records
that are unread is about the id (`shmplasma.unread`), as then it does not matter when they are read.

*What was put before is in the table at A2.*  A put is over when its record has its number, and whoever knows of that, by whatever way, sees
the number: x86-64 keeps the order of stores, and that of loads.  Its writer had its board before, so BOARDS_END, which is raised before a
board is granted, and falls when all was read that its client had written, covers it.  ACKNOWLEDGED only grows while a board has the same client.  The place of record n is written again only when
that was read; so if ACKNOWLEDGED is n at most after the last look at a place, record n had not been written at that look, hence none after it, as records are written
in their order: n were.  When they are read they are in the table, as R3 comes before R4.  Without the second look at ACKNOWLEDGED the ring may have gone round in between, and the number at
the place be a later one.  If a board has changed hands meanwhile, all that its former client had written was read before, and what the
new one writes was not over when the question was asked; its count, which begins anew, is waited for in vain at worst.

*What is in the table is found*, as `shmplasma.claims` argues: A2 to A4 are its C2 to C4.  An id that is found settles nothing, whatever the
state of its entry: an object may be unsealed, deleted while it is pinned, on its way to another place, or in the external store.

*What is not there does not come back.*  Records that were read are not read again, and what a store that dies has left in no chain is no
object (`shmplasma.table`).  So the answer is right whether or not a store lives; a client gives it only while its connection has not
ended, since otherwise nobody who waits for an object like that would ever hear that the store has gone.

An interrupt, a fork, or the collector between two steps does no harm: nothing is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import Final
from zlib import crc32

from shmplasma.attachment import Attachment
from shmplasma.layout import ENTRY_BYTES, STATE_MASK, HeaderWord
from shmplasma.outbox import unread

__all__ = ["NOWHERE", "Absence"]

NOWHERE: Final = (-1, 0)
"""State and time of an object that is in no chain."""

_ENTRY: Final = Struct("@Q20s28xQQ")
"""An entry's state word, its id, the next one in its chain, and when it was created."""
_SHIFT: Final = ENTRY_BYTES.bit_length() - 1
_INSERTIONS: Final = int(HeaderWord.INSERTIONS)
_BOARDS_END: Final = int(HeaderWord.BOARDS_END)
_ATTEMPTS: Final = 4
"""How often a chain is followed: the store may insert objects meanwhile, some microseconds apart."""
_MOST_BOARDS: Final = 100
"""To look at so many outboxes takes as long as to ask: 20 us."""


class Absence:
    """Sees that objects are not there.

    Parameters
    ----------
    attachment : Attachment
        The segment.

    Notes
    -----
    Thread-safe.
    """

    __slots__ = ("_buckets", "_entries", "_layout", "_longest", "_map", "_mask", "_words")

    def __init__(self, attachment: Attachment) -> None:
        layout = self._layout = attachment.layout
        self._map = attachment.read_map
        self._words = attachment.words
        self._mask = layout.n_buckets - 1
        self._buckets = layout.buckets // 8
        # What changes under the feet of a reader, or is damaged, might lead in a circle.
        self._longest = layout.n_entries
        # Chains count entries from 1.
        self._entries = layout.entries - ENTRY_BYTES

    def unread(self) -> list[tuple[int, int]] | None:
        """Return what the store has to read so that it has read all that is written now, for `is_read`; None: ask the store.

        Notes
        -----
        0.2 us for each board that is granted, and 0.1 us for each record.
        """
        end = self._words[_BOARDS_END]
        return unread(self._words, self._layout, end) if end <= _MOST_BOARDS else None

    def is_read(self, wanted: Sequence[tuple[int, int]]) -> bool:
        """Tell whether the store has read what `unread` has returned."""
        words = self._words
        return all(words[count] >= least for count, least in wanted)

    def is_free(self, object_id: bytes) -> bool:
        """Tell whether an id is in no chain of the table; False means: it is, or that cannot be seen."""
        return self.look_up(object_id) == NOWHERE

    def look_up(self, object_id: bytes) -> tuple[int, int] | None:
        """Return `EntryState` and time of creation (ns since 1970) of an object.

        `NOWHERE` says that it is in no chain, None that this cannot be seen.
        """
        words = self._words
        bucket = self._buckets + (crc32(object_id) & self._mask)
        for _ in range(_ATTEMPTS):
            insertions = words[_INSERTIONS]
            if insertions & 1:
                break
            entry = words[bucket]
            steps = self._longest
            seen = NOWHERE
            while entry and steps:
                word, found, entry, created_ns = _ENTRY.unpack_from(
                    self._map, (entry << _SHIFT) + self._entries
                )
                if found == object_id:
                    seen = word & STATE_MASK, created_ns
                    break
                steps -= 1
            if words[_INSERTIONS] == insertions:
                return seen if steps else None
        return None
