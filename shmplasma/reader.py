"""Reading without a message: finds sealed objects in the segment and pins them, all in this process.

`shmplasma.pins` owns the argument why this is right.  What the code here must keep to is the order: state
word, then the other fields, then the pin, then the state word again; each of them one load or one store, as
`struct` and ``memoryview`` do them for aligned native words.  A `FastReader` says only "here it is, pinned" or
"ask the store", never "it is not there".

This is the hot path.  Its functions are flat and repeat each other, because a call of a Python function costs as
much as all the loads of a lookup; and they unpack only the fields that they need, as each takes 10 ns.
"""

from __future__ import annotations

from struct import Struct
from typing import Any, Final
from zlib import crc32

from pyarrow import foreign_buffer

from shmplasma.attachment import Attachment
from shmplasma.layout import ENTRY_BYTES, STATE_MASK, EntryState, EntryWord, Layout
from shmplasma.objects import ObjectID
from shmplasma.pinning import BoardPool, Located, Pin, PinBoard

__all__ = ["FastReader", "Held"]

Held = tuple[int, int, int, Pin]
"""An object that is pinned: entry, state word, time of creation (ns since 1970), pin."""

_NAME: Final = Struct("@Q20s")
"""An entry's state word and id, with which its first cache line begins."""
_DATA: Final = Struct("@Q20s4xQQ")
"""Those, offset and data size."""
_WHERE: Final = Struct("@Q20sIQQQ")
"""Those, the codec before the offset, and the metadata size after the data size."""
_HELD: Final = Struct("@Q20s28xQQ")
"""Those two, the next entry of the chain, and when it was created."""
_NEXT: Final = int(EntryWord.NEXT)
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
        "_marks",
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
        self._marks = attachment.marks
        self._address = address
        first = layout.buckets // 8
        self._buckets = attachment.words[first : first + layout.n_buckets]
        self._mask = layout.n_buckets - 1
        # What changes under the feet of a reader, or is damaged, might lead in a circle.
        self._longest = layout.n_entries
        # Chains count entries from 1.
        self._entries = layout.entries - ENTRY_BYTES
        self._boards = boards
        self._board = boards.with_room()

    def contains(self, object_id: ObjectID) -> bool:
        """Tell whether the object is sealed; False means: ask the store."""
        wanted = object_id.id_bytes
        words = self._words
        entry = self._buckets[object_id.hash32 & self._mask]
        steps = 0
        while entry:
            at = (entry << _SHIFT) + self._entries
            word, found = _NAME.unpack_from(self._map, at)
            if found == wanted:
                # All were read in one incarnation if the word is still the same.
                return (
                    word & STATE_MASK == _SEALED
                    and self._marks[entry - 1] != word
                    and bool(words[at >> 3] == word)
                )
            steps += 1
            entry = words[(at >> 3) + _NEXT] if steps < self._longest else 0
        return False

    def buffer(self, object_id: ObjectID) -> Any:
        """Pin an object and return a `pyarrow.Buffer` over its data; None means: ask the store."""
        wanted = object_id.id_bytes
        words = self._words
        entry = self._buckets[object_id.hash32 & self._mask]
        steps = 0
        while entry:
            at = (entry << _SHIFT) + self._entries
            word, found, offset, data_size = _DATA.unpack_from(self._map, at)
            if found == wanted:
                if word & STATE_MASK != _SEALED:
                    return None
                board = self._board
                try:
                    slot = board.free.pop()
                except IndexError:
                    board, slot, pin = self._another()
                else:
                    pin = Pin()
                    pin.board, pin.word = board, slot
                board.words[slot] = entry
                if words[at >> 3] != word or self._marks[entry - 1] == word:
                    return None
                self._visited[entry - 1] = 1
                return foreign_buffer(self._address + offset, data_size, pin)
            steps += 1
            entry = words[(at >> 3) + _NEXT] if steps < self._longest else 0
        return None

    def locate(self, object_id: ObjectID) -> Located | None:
        """Pin an object and return where it is; None means: ask the store."""
        wanted = object_id.id_bytes
        words = self._words
        entry = self._buckets[object_id.hash32 & self._mask]
        steps = 0
        while entry:
            at = (entry << _SHIFT) + self._entries
            word, found, codec, offset, data_size, metadata_size = _WHERE.unpack_from(self._map, at)
            if found == wanted:
                if word & STATE_MASK != _SEALED:
                    return None
                board = self._board
                try:
                    slot = board.free.pop()
                except IndexError:
                    board, slot, pin = self._another()
                else:
                    pin = Pin()
                    pin.board, pin.word = board, slot
                board.words[slot] = entry
                if words[at >> 3] != word or self._marks[entry - 1] == word:
                    return None
                self._visited[entry - 1] = 1
                return offset, data_size, metadata_size, codec, pin
            steps += 1
            entry = words[(at >> 3) + _NEXT] if steps < self._longest else 0
        return None

    def hold(self, object_id: bytes) -> Held | None:
        """Pin an object that is to be deleted; None means: ask the store."""
        words = self._words
        entry = self._buckets[crc32(object_id) & self._mask]
        steps = 0
        while entry:
            at = (entry << _SHIFT) + self._entries
            word, found, following, created_ns = _HELD.unpack_from(self._map, at)
            if found == object_id:
                pins = self._boards.take_free(1) if word & STATE_MASK == _SEALED else ()
                if not pins:
                    return None
                (pin,) = pins
                pin.board.words[pin.word] = entry
                return (entry - 1, word, created_ns, pin) if words[at >> 3] == word else None
            steps += 1
            entry = following if steps < self._longest else 0
        return None

    def find(self, object_id: bytes) -> int:
        """Return the byte of the segment at which an object's entry begins, whatever its state; -1 if none is seen."""
        words = self._words
        entry = self._buckets[crc32(object_id) & self._mask]
        steps = 0
        while entry and steps < self._longest:
            at = (entry << _SHIFT) + self._entries
            if _NAME.unpack_from(self._map, at)[1] == object_id:
                return at
            steps += 1
            entry = words[(at >> 3) + _NEXT]
        return -1

    def _another(self) -> tuple[PinBoard, int, Pin]:
        """Return a slot of another board, as this one is full, and go on with that board."""
        (pin,) = self._boards.take(1)
        self._board = pin.board
        return pin.board, pin.word, pin
