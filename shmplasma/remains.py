"""The table that a dead store has left: what is in it, and how it is mended for the successor.  Pure.

`shmplasma.recovery` judges what is found here (by the checksums of `shmplasma.checks`) and says what stays; then the
chains are made to hold just that, and `shmplasma.table.Table.resume` goes on with it.

Readers may be under way meanwhile.  A chain that is right already is not touched, so that they go on finding what is in it;
in one that is written anew they may miss something for a moment, or go round in it, which they notice, and they ask
the store.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import add
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
    STATE_MASK,
    EntryWord,
    Layout,
)

__all__ = ["DeadTable", "Remains"]

_STATE: Final = int(EntryWord.STATE)
_CODEC: Final = EntryWord.ID + 2
_OFFSET: Final = int(EntryWord.OFFSET)
_DATA_SIZE: Final = int(EntryWord.DATA_SIZE)
_METADATA_SIZE: Final = int(EntryWord.METADATA_SIZE)
_NEXT: Final = int(EntryWord.NEXT)
_CREATED_NS: Final = int(EntryWord.CREATED_NS)
_CONSTRUCT_NS: Final = int(EntryWord.CONSTRUCT_NS)
_CHECK: Final = int(EntryWord.CHECK)
_KEEP: Final = int(EntryWord.KEEP)
_COPY: Final = int(EntryWord.COPY)
_COPY_CHECK: Final = int(EntryWord.COPY_CHECK)

_FIELDS: Final = Struct("@8x48s72x")
"""Words 1 to 6 of a whole entry, in one piece."""
_PAGE_BYTES: Final = 4096
_NO_HEADS: Final = bytes(_PAGE_BYTES)
_ALL_ONES: Final = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Remains:
    """What a store that has died left in its entries; believed only as far as the verdicts go.

    Each list has an item for each entry that was ever used.  Columns can be filled and compared in bulk, which
    is five times as fast as an object an entry.

    Attributes
    ----------
    states : list of int
        The `EntryState` of each.
    complete : list of bool
        Whether its checksum says that it is a sealed object; so does a FREE one's that was about to be.
    object_ids : list of bytes
        20 bytes each.
    codecs : list of int
        How the object is encoded.
    offsets, extents : list of int
        Where data and metadata begin, and how many bytes they take, in whole lines of `ALIGNMENT`.
    sealed_ns : list of int
        When it was sealed, or created.
    keeps : list of int
        Not zero if it is never to be evicted.
    containers : dict
        Of those whose entry speaks of a copy: which container of the external store has it, or 0 if that is
        damaged.
    """

    states: list[int]
    complete: list[bool]
    object_ids: list[bytes]
    codecs: list[int]
    offsets: list[int]
    extents: list[int]
    sealed_ns: list[int]
    keeps: list[int]
    containers: dict[int, int]


class DeadTable:
    """A dead store's table, as its successor finds it.

    Parameters
    ----------
    layout : Layout
        Where the table lies.
    words, raw : memoryview
        The segment as native 8-byte words and as bytes, writable.
    end : int
        The index above all entries that were ever used.
    """

    def __init__(self, layout: Layout, words: memoryview, raw: memoryview, end: int) -> None:
        self._words = words
        self._raw = raw
        self._end = end
        self._entries = layout.entries
        self._entries_word = layout.entries // 8
        self._buckets_word = layout.buckets // 8
        self._mask = layout.n_buckets - 1

    def scan(self) -> Remains:
        """Return what is left in the entries; O(entries), 1 us each."""
        start = self._entries
        region = bytes(self._raw[start : start + self._end * ENTRY_BYTES])
        words = memoryview(region).cast("Q")

        def column(word: int) -> list[int]:
            return words[word::ENTRY_WORDS].tolist()

        state_words = column(_STATE)
        fields = [each for (each,) in _FIELDS.iter_unpack(region)]
        seeds = [word >> GENERATION_SHIFT << 1 & 0xFFFF_FFFF | 1 for word in state_words]
        checksums = map(crc32, fields, seeds)
        data_sizes, metadata_sizes = column(_DATA_SIZE), column(_METADATA_SIZE)
        containers: dict[int, int] = {}
        copies = column(_COPY)
        for entry, copy in enumerate(copies if any(copies) else ()):
            if copy:
                sizes = data_sizes[entry], metadata_sizes[entry]
                check = words[entry * ENTRY_WORDS + _COPY_CHECK]
                is_whole = check == copy_check(fields[entry], *sizes, copy)
                containers[entry] = copy >> 32 if is_whole else 0
        return Remains(
            [word & STATE_MASK for word in state_words],
            [check == PRESENT | crc for check, crc in zip(column(_CHECK), checksums, strict=True)],
            [each[:ID_BYTES] for each in fields],
            [word >> 32 for word in column(_CODEC)],
            column(_OFFSET),
            [
                data_size + metadata_size + ALIGNMENT - 1 & -ALIGNMENT
                for data_size, metadata_size in zip(data_sizes, metadata_sizes, strict=True)
            ],
            list(map(add, column(_CREATED_NS), column(_CONSTRUCT_NS))),
            column(_KEEP),
            containers,
        )

    def is_begun(self, entry: int) -> bool:
        """Tell whether the checksum says that this is an object which is not sealed."""
        at = self._entries_word + entry * ENTRY_WORDS
        words = self._words
        seed = check_seed(words[at] >> GENERATION_SHIFT, sealed=False)
        fields = self._raw[at * 8 + 8 : at * 8 + 8 + CHECKED_BYTES]
        return bool(words[at + _CHECK] == PRESENT | crc32(fields, seed))

    def renew(self, entry: int) -> None:
        """Free an entry that is in no chain, under a new generation."""
        at = self._entries_word + entry * ENTRY_WORDS
        generation = (self._words[at] >> GENERATION_SHIFT) + 1
        # A damaged one may be the last that there is.
        self._words[at] = generation << GENERATION_SHIFT & _ALL_ONES

    def relink(self, entries: Sequence[int], object_ids: Sequence[bytes]) -> None:
        """Have the chains hold these entries, and no others.

        Parameters
        ----------
        entries : sequence of int
            Whose ids differ.
        object_ids : sequence of bytes
            The id that each entry of the table has, or had.

        Notes
        -----
        O(entries), and a copy and a comparison of the buckets.
        """
        words, mask, end = self._words, self._mask, self._end
        first = self._entries_word
        following = words[first + _NEXT : first + end * ENTRY_WORDS : ENTRY_WORDS].tolist()
        start = self._buckets_word * 8
        strays = bytearray(self._raw[start : start + (mask + 1) * 8])
        heads = memoryview(strays).cast("Q")
        buckets = [crc32(object_ids[entry]) & mask for entry in entries]
        missing = dict(zip(entries, buckets, strict=True))
        wrong: set[int] = set()
        for bucket in set(buckets):
            head, heads[bucket] = heads[bucket], 0
            while head:
                # One that was passed already is not missing any more, so nothing leads round for ever.
                if missing.pop(head - 1, None) != bucket:
                    wrong.add(bucket)
                    break
                head = following[head - 1]
        wrong.update(missing.values())
        chains: dict[int, list[int]] = {bucket: [] for bucket in wrong}
        if wrong:
            for entry, bucket in zip(entries, buckets, strict=True):
                if bucket in wrong:
                    chains[bucket].append(entry)
        # Most of the buckets may be empty, hence are to be looked at by the page.
        for at in range(0, len(strays), _PAGE_BYTES):
            if strays[at : at + _PAGE_BYTES] != _NO_HEADS:
                page = heads[at // 8 : (at + _PAGE_BYTES) // 8].tolist()
                chains.update((bucket, []) for bucket, head in enumerate(page, at // 8) if head)
        for bucket, chain in chains.items():
            words[self._buckets_word + bucket] = 0
            head = 0
            for entry in chain:
                words[first + entry * ENTRY_WORDS + _NEXT] = head
                head = entry + 1
            words[self._buckets_word + bucket] = head
