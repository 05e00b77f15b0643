"""The object table: a chained hash table of fixed-size entries that lies in the segment.

The store is its only writer.  Clients read it while it changes, so the order of the writes is part of the
contract:

* The fields of an entry change only while its state is FREE or CREATED, with one exception: NEXT, which
  changes when the successor in the chain goes.
* An entry is linked into its chain when its fields are complete, and its state is set after that.
* An entry that leaves is unlinked first and freed afterwards; its own NEXT stays, so that a reader who
  stands on it still finds the rest of the chain.  A reader may be led astray by a reuse in this moment and
  miss an object; it never finds a wrong one, because it reads the state word before the id and again
  after its pin (`shmplasma.pins` owns that argument), and a miss only sends it to the store.
* Every (generation, state) pair stands for one incarnation of the entry: freeing it raises the generation.

`Table.check` proves the structure.  Complexity: O(1) expected for each operation; no Python object is kept
for an object of the store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from struct import Struct
from typing import Final
from zlib import crc32

from shmplasma.layout import (
    ENTRY_BYTES,
    ENTRY_WORDS,
    GENERATION_SHIFT,
    ID_FIELD,
    STATE_MASK,
    EntryState,
    EntryWord,
    Layout,
)

__all__ = ["NO_ENTRY", "Table"]

NO_ENTRY: Final = -1

_ID: Final = EntryWord.ID * 8
_STATE: Final = int(EntryWord.STATE)
_OFFSET: Final = int(EntryWord.OFFSET)
_DATA_SIZE: Final = int(EntryWord.DATA_SIZE)
_METADATA_SIZE: Final = int(EntryWord.METADATA_SIZE)
_NEXT: Final = int(EntryWord.NEXT)
_CREATED_NS: Final = int(EntryWord.CREATED_NS)
_CONSTRUCT_NS: Final = int(EntryWord.CONSTRUCT_NS)

_CREATED: Final = int(EntryState.CREATED)

_FIELDS: Final = Struct("@20sIQQQQQQ")
"""All of an entry but its state, in the order of `EntryWord`."""


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
        self._mask = layout.n_buckets - 1
        self._free: list[int] = []
        self._used_once = 0
        self._committed = 0
        self._linked = 0

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
        return self.id_and_codec(entry)[0]

    def id_and_codec(self, entry: int) -> tuple[bytes, int]:
        """Return the entry's id and the codec that its creator named."""
        start = self._layout.entries + entry * ENTRY_BYTES + _ID
        object_id, codec = ID_FIELD.unpack_from(self._raw, start)
        return object_id, codec

    def location(self, entry: int) -> tuple[int, int, int]:
        """Return offset, data size and metadata size in bytes."""
        at = self._entries_word + entry * ENTRY_WORDS
        words = self._words
        return words[at + _OFFSET], words[at + _DATA_SIZE], words[at + _METADATA_SIZE]

    def size(self, entry: int) -> int:
        """Return data plus metadata in bytes."""
        at = self._entries_word + entry * ENTRY_WORDS
        return int(self._words[at + _DATA_SIZE] + self._words[at + _METADATA_SIZE])

    def times(self, entry: int) -> tuple[int, int]:
        """Return the time of creation (ns since 1970) and the nanoseconds from then to the seal."""
        at = self._entries_word + entry * ENTRY_WORDS
        return self._words[at + _CREATED_NS], self._words[at + _CONSTRUCT_NS]

    @property
    def end(self) -> int:
        """The index above all entries that were ever used."""
        return self._used_once

    def holds(self, entry: int) -> bool:
        """Tell whether this is an entry with an object; false for any number that a client makes up."""
        return 0 <= entry < self._used_once and self.state(entry) != EntryState.FREE

    def entries(self, start: int, stop: int) -> Iterator[int]:
        """Iterate over the entries that hold an object, by index from `start` to below `stop`."""
        words = self._words
        for entry in range(start, min(stop, self._used_once)):
            if words[self._entries_word + entry * ENTRY_WORDS] & STATE_MASK != EntryState.FREE:
                yield entry

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
    ) -> int:
        """Add an object, CREATED or SEALED, and return its entry, or `NO_ENTRY` when the table is full.

        The caller has made sure that the id is not there.

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
            if entry == self._committed:
                self._grow()
        at = self._entries_word + entry * ENTRY_WORDS
        words = self._words
        bucket = self._buckets_word + (crc32(object_id) & self._mask)
        following = words[bucket]
        _FIELDS.pack_into(
            self._raw,
            at * 8 + _ID,
            object_id,
            codec,
            offset,
            data_size,
            metadata_size,
            following,
            now_ns,
            0,
        )
        words[bucket] = entry + 1
        words[at] = words[at] >> GENERATION_SHIFT << GENERATION_SHIFT | state
        if self._free:
            self._free.pop()
        else:
            self._used_once += 1
        self._linked += 1
        return entry

    def set_state(self, entry: int, state: int) -> None:
        """Change the state and keep the generation."""
        at = self._entries_word + entry * ENTRY_WORDS
        self._words[at] = self._words[at] >> GENERATION_SHIFT << GENERATION_SHIFT | state

    def seal(self, entry: int, now_ns: int) -> None:
        """Make a created object readable; its fields never change again."""
        at = self._entries_word + entry * ENTRY_WORDS
        self._words[at + _CONSTRUCT_NS] = max(0, now_ns - self._words[at + _CREATED_NS])
        self.set_state(entry, EntryState.SEALED)

    def unlink(self, entry: int) -> None:
        """Take the entry out of its chain: its id can be used anew, its memory not yet."""
        words = self._words
        link = self._buckets_word + (crc32(self.object_id(entry)) & self._mask)
        while words[link] != entry + 1:
            link = self._entries_word + (words[link] - 1) * ENTRY_WORDS + _NEXT
        words[link] = words[self._entries_word + entry * ENTRY_WORDS + _NEXT]
        self._linked -= 1

    def free(self, entry: int) -> None:
        """Give an unlinked entry back: state FREE under the next generation."""
        at = self._entries_word + entry * ENTRY_WORDS
        generation = self._words[at] >> GENERATION_SHIFT
        self._words[at] = (generation + 1) << GENERATION_SHIFT | EntryState.FREE
        self._free.append(entry)

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
        if self.free_entries < count:
            return False
        while len(self._free) + self._committed - self._used_once < count:
            self._grow()
        return True

    def _grow(self) -> None:
        """Commit the next page of entries, and as much of the visited bytes as belongs to them."""
        layout = self._layout
        step = min(layout.page_bytes // ENTRY_BYTES, layout.n_entries - self._committed)
        self._commit(layout.entry(self._committed), step * ENTRY_BYTES)
        self._commit(layout.visited + self._committed, step)
        self._committed += step

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
