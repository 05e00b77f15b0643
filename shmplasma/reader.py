"""Reading without a message: finds sealed objects in the segment and pins them, all in this process.

`shmplasma.pins` owns the argument why this is right.  What the code here must keep to is the order: state
word, then the other fields, then the pin, then the state word again; each of them one load or one store, as
`struct` and ``memoryview`` do them for aligned native words.  A `FastReader` says only "here it is, pinned" or
"ask the store", never "it is not there".

This is the hot path.  Its loops are flat and repeat each other, because a call of a Python function costs as
much as all the loads of a lookup.
"""

from __future__ import annotations

from collections.abc import Iterable
from struct import Struct
from typing import Any, Final

import pyarrow as pa

from shmplasma.attachment import Attachment
from shmplasma.layout import ENTRY_BYTES, STATE_MASK, EntryState, Layout
from shmplasma.objects import ObjectID
from shmplasma.pinning import BoardPool, Located, Pin

__all__ = ["FastReader"]

_ENTRY: Final = Struct("@Q20sIQQQQ")
"""An entry's first cache line: state word, id, codec, offset, data size, metadata size, next."""
_SEALED: Final = int(EntryState.SEALED)
_SHIFT: Final = ENTRY_BYTES.bit_length() - 1


class FastReader:
    """Looks objects up in the table and pins them.

    Parameters
    ----------
    layout : Layout
        The segment's layout.
    attachment : Attachment
        The segment.
    address : int
        Where its read-only mapping begins.
    boards : BoardPool
        This client's boards.

    Notes
    -----
    Thread-safe: what threads share are lists of slots, which are popped and appended to in single steps.
    """

    __slots__ = (
        "_address",
        "_board",
        "_boards",
        "_buckets",
        "_entries",
        "_longest",
        "_map",
        "_mask",
        "_visited",
        "_words",
    )

    def __init__(
        self,
        layout: Layout,
        attachment: Attachment,
        address: int,
        boards: BoardPool,
    ) -> None:
        self._map = attachment.read_map
        self._words = attachment.words
        self._visited = attachment.visited
        self._address = address
        self._mask = layout.n_buckets - 1
        self._buckets = layout.buckets // 8
        # What changes under the feet of a reader, or is damaged, might lead in a circle.
        self._longest = layout.n_entries
        # Chains count entries from 1.
        self._entries = layout.entries - ENTRY_BYTES
        self._boards = boards
        self._board = boards.with_room()

    def contains(self, object_id: ObjectID) -> bool:
        """Tell whether the object is sealed; False means: ask the store."""
        wanted = object_id.id_bytes
        words, entries = self._words, self._entries
        entry = words[self._buckets + (object_id.hash32 & self._mask)]
        steps = self._longest
        while entry:
            at = (entry << _SHIFT) + entries
            word, found, _, _, _, _, following = _ENTRY.unpack_from(self._map, at)
            if found == wanted:
                # Both were read in one incarnation if the word is still the same.
                return word & STATE_MASK == _SEALED and bool(words[at >> 3] == word)
            steps -= 1
            entry = following if steps else 0
        return False

    def buffers(self, object_ids: Iterable[ObjectID]) -> tuple[list[Any], list[int]]:
        """Pin objects and return buffers over their data.

        Returns
        -------
        items : list of pyarrow.Buffer or None
            None for what the store must be asked for.
        misses : list of int
            The positions of those.
        """
        words, map_, mask, longest = self._words, self._map, self._mask, self._longest
        buckets, entries, address = self._buckets, self._entries, self._address
        visited, board = self._visited, self._board
        unpack, foreign_buffer = _ENTRY.unpack_from, pa.foreign_buffer
        items: list[Any] = []
        misses: list[int] = []
        for object_id in object_ids:
            wanted = object_id.id_bytes
            entry = words[buckets + (object_id.hash32 & mask)]
            steps = longest
            while entry:
                at = (entry << _SHIFT) + entries
                word, found, _, offset, data_size, _, following = unpack(map_, at)
                if found != wanted:
                    steps -= 1
                    entry = following if steps else 0
                    continue
                if word & STATE_MASK == _SEALED:
                    try:
                        slot = board.free.pop()
                    except IndexError:
                        pin = self._boards.take(1)[0]
                        self._board = board = pin.board
                        slot = pin.word
                    else:
                        pin = Pin()
                        pin.board, pin.word = board, slot
                    board.words[slot] = entry
                    if words[at >> 3] == word:
                        visited[entry - 1] = 1
                        items.append(foreign_buffer(address + offset, data_size, pin))
                        break
                entry = 0
            else:
                misses.append(len(items))
                items.append(None)
        return items, misses

    def find(self, object_ids: Iterable[ObjectID]) -> tuple[list[Located | None], list[int]]:
        """Pin objects and return where they are; otherwise as `buffers`."""
        words, map_, mask, longest = self._words, self._map, self._mask, self._longest
        buckets, entries, visited = self._buckets, self._entries, self._visited
        board, unpack = self._board, _ENTRY.unpack_from
        items: list[Located | None] = []
        misses: list[int] = []
        for object_id in object_ids:
            wanted = object_id.id_bytes
            entry = words[buckets + (object_id.hash32 & mask)]
            steps = longest
            while entry:
                at = (entry << _SHIFT) + entries
                word, found, codec, offset, data_size, metadata_size, following = unpack(map_, at)
                if found != wanted:
                    steps -= 1
                    entry = following if steps else 0
                    continue
                if word & STATE_MASK == _SEALED:
                    try:
                        slot = board.free.pop()
                    except IndexError:
                        pin = self._boards.take(1)[0]
                        self._board = board = pin.board
                        slot = pin.word
                    else:
                        pin = Pin()
                        pin.board, pin.word = board, slot
                    board.words[slot] = entry
                    if words[at >> 3] == word:
                        visited[entry - 1] = 1
                        items.append((offset, data_size, metadata_size, codec, pin))
                        break
                entry = 0
            else:
                misses.append(len(items))
                items.append(None)
        return items, misses
