"""The object table: a chained hash table of fixed-size entries that lies in the segment.

The store is its only writer.  Clients read it while it changes, so the order of the writes is part of the contract:

* The fields of an entry change only while its state is FREE or CREATED, with these exceptions: NEXT, which changes when the successor in
  the chain goes; KEEP, and the words that say where a copy is, which no reader looks at; and OFFSET, which changes while the state is MOVING
  or SPILLED and nobody pins the object; after that it is SEALED under the next generation (`shmplasma.moves`).
* An entry is linked into its chain when its fields are complete, and its state is set after that.
* An entry that leaves is freed first and unlinked at once after that: what is in no chain is no object, also for the successor
  of a store that dies in between.  Its own NEXT stays, so that a reader who stands on it still finds the rest of the chain.
  A reader may be led astray by a reuse in this moment and miss an object; it never finds a wrong one, because it reads the
  state word before the id and again after its pin (`shmplasma.pins` owns that argument), and a miss only sends it to the store.
* INSERTIONS is raised before an entry is used anew, and is odd while a successor writes the chains: who finds it even, and the
  same after he has followed a chain, has missed nothing (`shmplasma.claims` owns that argument).
* Every (generation, state) pair stands for one incarnation of the entry: freeing it raises the generation.
* ENTRIES_USED is raised before an entry above it is used, and falls when all are free: whoever knows that an object was entered finds it below.
* CREATED_NS is that of no other object under the same id: what is entered at one time is told apart by nanoseconds (see `shmplasma.removal`).
* A mark says by a state word which object is deleted; it moves with the object to the next generation.
* The checksum of an entry is written before the state that it goes with (`shmplasma.checks`).

A store that begins with the table of a dead one takes it over, and has it mended (`shmplasma.remains`).

`Table.check` proves the structure.  Complexity: O(1) expected for each operation; no Python object is kept for an object of the store.
"""

from __future__ import annotations

import re
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from struct import Struct
from typing import Final
from zlib import crc32

from shmplasma.checks import CHECKED_BYTES, PRESENT, check_seed, copy_check
from shmplasma.layout import (
    ALIGNMENT,
    ENTRY_BYTES,
    ENTRY_WORDS,
    GENERATION_SHIFT,
    ID_BYTES,
    ID_FIELD,
    STATE_MASK,
    EntryState,
    EntryWord,
    HeaderWord,
    Layout,
    mark_end,
    recover_end,
)
from shmplasma.remains import DeadTable

__all__ = ["NO_ENTRY", "Table"]

NO_ENTRY: Final = -1

_ID: Final = EntryWord.ID * 8
_OFFSET: Final = int(EntryWord.OFFSET)
_DATA_SIZE: Final = int(EntryWord.DATA_SIZE)
_METADATA_SIZE: Final = int(EntryWord.METADATA_SIZE)
_NEXT: Final = int(EntryWord.NEXT)
_CREATED_NS: Final = int(EntryWord.CREATED_NS)
_CONSTRUCT_NS: Final = int(EntryWord.CONSTRUCT_NS)
_CHECK: Final = int(EntryWord.CHECK)
_OWNER: Final = int(EntryWord.OWNER)
_KEEP: Final = int(EntryWord.KEEP)
_INSERTIONS: Final = int(HeaderWord.INSERTIONS)
_COPY: Final = int(EntryWord.COPY)
_COPY_CHECK: Final = int(EntryWord.COPY_CHECK)

_FREE: Final = int(EntryState.FREE)
_CREATED: Final = int(EntryState.CREATED)
_SEALED: Final = int(EntryState.SEALED)
_EVICTING: Final = int(EntryState.EVICTING)
_SPILLED: Final = int(EntryState.SPILLED)

_STATE_BYTE: Final = 0 if sys.byteorder == "little" else 7
"""Where in a state word the state is."""
_IN_CHAINS: Final = re.compile(b"[^%c%c]+" % (_FREE, _EVICTING))
"""In a row of states, those of entries that can be found, one after the other."""

_OBJECT: Final = Struct("@20sIQQQ")
"""Words 1 to 6 of an entry: id, codec, offset, data size, metadata size."""
_SUMMARY: Final = Struct("@Q20s12xQQ72x")
"""An entry's state word, id, data size and metadata size."""
_RECORD: Final = Struct("@48sQQQQQQ24x")
"""All of an entry but its state: these, words 7 to 12, and no copy in an external store."""
_ALL_ONES: Final = (1 << 64) - 1
_MARKED_AT_ONCE: Final = 128  # so that few insertions have to say how far entries are used


class Table:
    """The store's view of the object table.

    Parameters
    ----------
    layout : Layout
        Where the table lies.
    words, raw : memoryview
        The segment as native 8-byte words and as bytes, writable.
    commit : callable
        ``commit(offset, size_bytes)`` makes sure that memory stands behind this part of the segment; it
        raises `shmplasma.errors.CommitError` where it cannot.

    Notes
    -----
    An entry is named by its index.  Not thread-safe: the store's loop is its only user.
    """

    def __init__(
        self,
        layout: Layout,
        words: memoryview,
        raw: memoryview,
        commit: Callable[[int, int], None],
    ) -> None:
        self._words = words
        self._raw = raw
        self._commit = commit
        self._layout = layout
        self._entries_word = layout.entries // 8
        self._buckets_word = layout.buckets // 8
        self._marks_word = layout.marks // 8
        self._mask = layout.n_buckets - 1
        self._free = array("I")
        self._used_once = self._committed = self._marked = self._linked = self._insertions = 0
        self._now_ns = self._later = 0

    def __len__(self) -> int:
        """Return the number of objects that can be found."""
        return self._linked

    # -- finding and reading -------------------------------------------------------------------

    def find(self, object_id: bytes) -> int:
        """Return the entry of an id, in any state, or `NO_ENTRY`."""
        words, raw = self._words, self._raw
        entry = words[self._buckets_word + (crc32(object_id) & self._mask)] - 1
        while entry >= 0:
            at = self._entries_word + entry * ENTRY_WORDS
            start = at * 8 + _ID
            if raw[start : start + 20] == object_id:
                return entry
            entry = words[at + _NEXT] - 1
        return NO_ENTRY

    def state(self, entry: int) -> int:
        """Return the entry's `EntryState` as a plain int."""
        return int(self._words[self._entries_word + entry * ENTRY_WORDS]) & STATE_MASK

    def state_word(self, entry: int) -> int:
        """Return generation and state in one number."""
        return int(self._words[self._entries_word + entry * ENTRY_WORDS])

    def object_id(self, entry: int) -> bytes:
        """Return the 20 bytes of the entry's id."""
        start = (self._entries_word + entry * ENTRY_WORDS) * 8 + _ID
        return bytes(self._raw[start : start + ID_BYTES])

    def id_and_codec(self, entry: int) -> tuple[bytes, int]:
        """Return the entry's id and the codec that its creator named."""
        start = self._layout.entries + entry * ENTRY_BYTES + _ID
        object_id, codec = ID_FIELD.unpack(self._raw[start : start + ID_FIELD.size])
        return object_id, codec

    def location(self, entry: int) -> tuple[int, int, int]:
        """Return offset, data size and metadata size in bytes."""
        at, words = self._entries_word + entry * ENTRY_WORDS, self._words
        return words[at + _OFFSET], words[at + _DATA_SIZE], words[at + _METADATA_SIZE]

    def size(self, entry: int) -> int:
        """Return data plus metadata in bytes."""
        at = self._entries_word + entry * ENTRY_WORDS
        return int(self._words[at + _DATA_SIZE] + self._words[at + _METADATA_SIZE])

    def sizes(self, entries: Iterable[int]) -> dict[int, int]:
        """Return data plus metadata in bytes of those of these numbers that are entries with an object; 0.15 us each."""
        words, first, end = self._words, self._entries_word, self._used_once
        return {
            entry: words[at + _DATA_SIZE] + words[at + _METADATA_SIZE]
            for entry in entries
            if 0 <= entry < end and words[at := first + entry * ENTRY_WORDS] & STATE_MASK != _FREE
        }

    def created_ns(self, entry: int) -> int:
        """Return the time of creation, in ns since 1970: no other object under this id has the same."""
        return int(self._words[self._entries_word + entry * ENTRY_WORDS + _CREATED_NS])

    def is_marked(self, entry: int) -> bool:
        """Tell whether a client has deleted the object and told so in its outbox (see `shmplasma.removal`)."""
        sealed = self.state_word(entry) >> GENERATION_SHIFT << GENERATION_SHIFT | _SEALED
        return bool(self._words[self._marks_word + entry] == sealed)

    def is_kept(self, entry: int) -> bool:
        """Tell whether the object is never to be evicted."""
        return bool(self._words[self._entries_word + entry * ENTRY_WORDS + _KEEP])

    def owner(self, entry: int) -> int:
        """Return the slot of the object's creator, -1 where there is none."""
        return int(self._words[self._entries_word + entry * ENTRY_WORDS + _OWNER]) - 1

    @property
    def end(self) -> int:
        """The index above all entries that hold an object."""
        return self._used_once

    def holds(self, entry: int) -> bool:
        """Tell whether this is an entry with an object; false for any number that a client makes up."""
        return 0 <= entry < self._used_once and self.state(entry) != EntryState.FREE

    def entries(self) -> Iterator[int]:
        """Iterate over the entries that hold an object, by index."""
        return filter(self.holds, range(self._used_once))

    def listed(self, start: int, stop: int, at_most: int) -> tuple[list[int], bytes]:
        """Return which of the entries `start` to below `stop` have objects that can be found, and these entries in a row.

        No more than so many; 10 ns for each entry, and 0.5 us for each row of entries with an object.
        """
        first = self._layout.entries + start * ENTRY_BYTES
        last = self._layout.entries + min(stop, self._used_once) * ENTRY_BYTES
        states = bytes(self._raw[first + _STATE_BYTE : last : ENTRY_BYTES])
        raw = self._raw[first:last]
        found, parts = list[int](), []
        for row in _IN_CHAINS.finditer(states):
            low, high = row.span()
            high = min(high, low + at_most - len(found))
            found += range(start + low, start + high)
            parts.append(raw[low * ENTRY_BYTES : high * ENTRY_BYTES])
            if len(found) == at_most:
                break
        return found, b"".join(parts)

    def summaries(self, start: int, stop: int) -> Iterator[tuple[int, bytes, int, int]]:
        """Iterate over state, id, data size and metadata size of entries that were ever used, by index; 0.1 us each."""
        first = self._layout.entries + start * ENTRY_BYTES
        entries = self._raw[first : self._layout.entries + min(stop, self._used_once) * ENTRY_BYTES]
        for word, object_id, data_size, metadata_size in _SUMMARY.iter_unpack(entries):
            yield word & STATE_MASK, object_id, data_size, metadata_size

    def sealed_between(
        self, low: int, high: int, start: int, stop: int
    ) -> Iterator[tuple[int, int, int]]:
        """Iterate over what has a byte in ``[low, high)``, as offset, size in bytes, and entry; -1 for what is not SEALED.

        The entries from `start` to below `stop` are looked at, 0.1 us each.
        """
        words = self._words
        first = self._entries_word + start * ENTRY_WORDS
        last = self._entries_word + min(stop, self._used_once) * ENTRY_WORDS
        columns = [
            words[first + word : last + word : ENTRY_WORDS].tolist()
            for word in (_OFFSET, _DATA_SIZE, _METADATA_SIZE)
        ]
        for entry, (offset, data_size, metadata_size) in enumerate(
            zip(*columns, strict=True), start
        ):
            size = data_size + metadata_size
            if size and offset < high and offset + size > low:
                state = self.state(entry)
                if state not in (_FREE, _SPILLED):
                    yield offset, size, entry if state == _SEALED else NO_ENTRY

    # -- changing ------------------------------------------------------------------------------

    def insert(
        self,
        object_id: bytes,
        codec: int,
        offset: int,
        data_size: int,
        metadata_size: int,
        now_ns: int,
        state: int = _CREATED,
        owner: int = 0,
        *,
        keep: bool = False,
    ) -> int:
        """Add an object, CREATED or SEALED, and return its entry, or `NO_ENTRY` when the table is full.

        The caller has made sure that the id is not there.  One that is EVICTING is in limbo, and in no chain.  `owner` is the slot + 1 of who creates it, `keep`
        whether it is never to be evicted.

        Raises
        ------
        CommitError
            The table cannot grow, for want of memory.
        """
        if self._free:
            entry = self._free[-1]
        else:
            entry = self._used_once
            if entry == self._layout.n_entries:
                return NO_ENTRY
            if entry == self._marked:
                self._mark()
        if now_ns == self._now_ns:  # what is read in one go is entered at one time
            self._later += 1
            now_ns += self._later
        else:
            self._now_ns, self._later = now_ns, 0
        at = self._entries_word + entry * ENTRY_WORDS
        words = self._words
        generation = words[at] >> GENERATION_SHIFT
        bucket = self._buckets_word + (crc32(object_id) & self._mask)
        words[_INSERTIONS] = self._insertions = (self._insertions + 2) & _ALL_ONES
        fields = _OBJECT.pack(object_id, codec, offset, data_size, metadata_size)
        check = PRESENT | crc32(fields, check_seed(generation, state == _SEALED))
        self._raw[at * 8 + 8 : at * 8 + 128] = _RECORD.pack(
            fields, words[bucket], now_ns, 0, check, owner, _ALL_ONES if keep else 0
        )
        if state != _EVICTING:
            words[bucket] = entry + 1
            self._linked += 1
        words[at] = generation << GENERATION_SHIFT | state
        if self._free:
            self._free.pop()
        else:
            self._used_once += 1
        return entry

    def set_state(self, entry: int, state: int) -> None:
        """Change the state and keep the generation."""
        at = self._entries_word + entry * ENTRY_WORDS
        self._words[at] = self._words[at] >> GENERATION_SHIFT << GENERATION_SHIFT | state

    def set_keep(self, entry: int, keep: bool) -> None:
        """Say whether the object is never to be evicted: one word, in no checksum, so that it may change."""
        self._words[self._entries_word + entry * ENTRY_WORDS + _KEEP] = _ALL_ONES if keep else 0

    def seal(self, entry: int, now_ns: int) -> None:
        """Make a created object readable; its fields never change again."""
        at = self._entries_word + entry * ENTRY_WORDS
        words = self._words
        words[at + _CONSTRUCT_NS] = max(0, now_ns - words[at + _CREATED_NS])
        generation = words[at] >> GENERATION_SHIFT
        fields = self._raw[at * 8 + 8 : at * 8 + 8 + CHECKED_BYTES]
        words[at + _CHECK] = PRESENT | crc32(fields, check_seed(generation, sealed=True))
        words[at] = generation << GENERATION_SHIFT | _SEALED

    # -- copies in the external store ----------------------------------------------------------

    def copy_of(self, entry: int) -> tuple[int, int]:
        """Return container and place of the object's copy in the external store; container 0 for none."""
        copy = self._words[self._entries_word + entry * ENTRY_WORDS + _COPY]
        return copy >> 32, (copy & 0xFFFF_FFFF) * ALIGNMENT

    def set_copy(self, entry: int, container: int, place: int) -> None:
        """Write down that a sealed object has a copy, or, with container 0, that it has none."""
        at = self._entries_word + entry * ENTRY_WORDS
        words = self._words
        copy = container << 32 | place // ALIGNMENT
        words[at + _COPY] = 0
        if container:
            fields = self._raw[at * 8 + 8 : at * 8 + 32]
            sizes = words[at + _DATA_SIZE], words[at + _METADATA_SIZE]
            words[at + _COPY_CHECK] = copy_check(fields, *sizes, copy)
            words[at + _COPY] = copy

    def identity(self, entry: int) -> bytes:
        """Return what a move leaves alone: generation and state, id, codec and sizes."""
        start = self._layout.entries + entry * ENTRY_BYTES
        return bytes(self._raw[start : start + 32]) + bytes(self._raw[start + 40 : start + 56])

    def spoil(self, entry: int) -> None:
        """Take the checksum away: a successor that knows no better is not to believe in this object."""
        self._words[self._entries_word + entry * ENTRY_WORDS + _CHECK] = 0

    def relocate(self, entry: int, offset: int) -> None:
        """Say of a MOVING or SPILLED object where it lies now, and make it readable there; may be repeated."""
        at = self._entries_word + entry * ENTRY_WORDS
        words = self._words
        words[at + _OFFSET] = offset
        generation = (words[at] >> GENERATION_SHIFT) + 1
        if self.is_marked(entry):  # nobody pins it, so nobody is marking it either
            words[self._marks_word + entry] = generation << GENERATION_SHIFT | _SEALED
        fields = self._raw[at * 8 + 8 : at * 8 + 8 + CHECKED_BYTES]
        words[at + _CHECK] = PRESENT | crc32(fields, check_seed(generation, sealed=True))
        words[at] = generation << GENERATION_SHIFT | _SEALED

    # -- leaving -------------------------------------------------------------------------------

    def unlink(self, entry: int) -> None:
        """Take the entry out of its chain: its id can be used anew; what was not freed keeps its memory."""
        words = self._words
        link = self._buckets_word + (crc32(self.object_id(entry)) & self._mask)
        while (head := words[link]) != entry + 1:
            link = self._entries_word + (head - 1) * ENTRY_WORDS + _NEXT
        words[link] = words[self._entries_word + entry * ENTRY_WORDS + _NEXT]
        self._linked -= 1

    def free(self, entry: int) -> None:
        """Give an entry back, in a chain or not: state FREE under the next generation."""
        at = self._entries_word + entry * ENTRY_WORDS
        generation = self._words[at] >> GENERATION_SHIFT
        self._words[at] = (generation + 1) << GENERATION_SHIFT | _FREE
        self._free.append(entry)
        if len(self._free) == self._used_once > _MARKED_AT_ONCE:  # all are free: begin anew
            self._free = array("I")
            self._used_once = self._marked = 0
            mark_end(self._words, HeaderWord.ENTRIES_USED, 0)

    def remove(self, entry: int) -> None:
        """Give back the entry of an object that can be found."""
        self.free(entry)
        self.unlink(entry)

    @property
    def free_entries(self) -> int:
        """How many more objects the table can take."""
        return len(self._free) + self._layout.n_entries - self._used_once

    def prepare(self, count: int) -> bool:
        """Commit memory for so many more entries; tell whether there are as many.

        Raises
        ------
        CommitError
            There is no memory for them.
        """
        while len(self._free) + self._committed - self._used_once < count:
            if self.free_entries < count:
                return False
            self._grow()
        return True

    def _mark(self) -> None:
        """Say that some more entries may be used."""
        if self._marked == self._committed:
            self._grow()
        self._marked = min(self._marked + _MARKED_AT_ONCE, self._committed)
        mark_end(self._words, HeaderWord.ENTRIES_USED, self._marked)

    def _grow(self) -> None:
        """Commit the next page of entries."""
        step = self._layout.page_bytes // ENTRY_BYTES
        step = min(step, self._layout.n_entries - self._committed)
        self._commit_entries(self._committed, step)
        self._committed += step
        mark_end(self._words, HeaderWord.ENTRIES_END, self._committed)

    def _commit_entries(self, first: int, count: int) -> None:
        for start, size in self._layout.columns:
            self._commit(start + first * size, count * size)

    # -- recovering ----------------------------------------------------------------------------

    def take_over(self) -> DeadTable:
        """Take over the table of a store that has died, still without its objects.

        Returns
        -------
        DeadTable
            Says what is in it, and mends it; `resume` is to follow.

        Raises
        ------
        CommitError
            Its memory cannot be had.
        """
        layout = self._layout
        end = recover_end(self._words, HeaderWord.ENTRIES_END, layout.n_entries)
        if end:
            self._commit_entries(0, end)
        mark_end(self._words, HeaderWord.ENTRIES_END, end)
        mark_end(self._words, HeaderWord.ENTRIES_USED, end)
        self._committed = self._used_once = self._marked = end
        self._insertions = self._words[_INSERTIONS] | 1
        self._words[_INSERTIONS] = self._insertions
        return DeadTable(layout, self._words, self._raw, end)

    def resume(self, entries: Sequence[int], limbo: set[int]) -> None:
        """Go on with a table that is mended: these entries are in its chains, those in limbo in none, all others are free."""
        self._linked = len(entries)
        taken = limbo.union(entries)
        self._free = array("I", [e for e in range(self._used_once - 1, -1, -1) if e not in taken])
        self._insertions = (self._insertions + 1) & _ALL_ONES
        self._words[_INSERTIONS] = self._insertions

    # -- proof ---------------------------------------------------------------------------------

    def check(self) -> None:
        """Prove that each object is found under its id, and that every entry is accounted for."""
        free = set(self._free)
        assert len(free) == len(self._free), "an entry is free twice"
        reachable: set[int] = set()
        for bucket in range(self._mask + 1):
            entry = self._words[self._buckets_word + bucket] - 1
            while entry >= 0:
                assert entry not in reachable, f"entry {entry} is in two chains or in a loop"
                reachable.add(entry)
                assert entry not in free, f"entry {entry} is free"
                assert entry < self._used_once, f"entry {entry} was never used"
                assert crc32(self.object_id(entry)) & self._mask == bucket, "a wrong chain"
                assert self.state(entry) != EntryState.FREE, f"entry {entry} is linked but free"
                entry = self._words[self._entries_word + entry * ENTRY_WORDS + _NEXT] - 1
        assert len(reachable) == self._linked, "the number of objects is wrong"
        for entry in range(self._used_once):
            assert (self.state(entry) == EntryState.FREE) == (entry in free), f"entry {entry} leaks"
