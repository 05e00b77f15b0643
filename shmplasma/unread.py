"""Getting what was put and not read: an object that the store has not entered yet, by the record that says where it lies.

Whoever puts an object writes a record (`shmplasma.outbox`), and often tells somebody else at once, who looks for the object before the
store has read that.  He need not wait for it: the record says all that the table will say.

Theory of operation
-------------------
======================================================  ==========================================================
client that looks for an object                         store, for a record (`shmplasma.posts`)
======================================================  ==========================================================
G1. the last record under the id that is unread, in     S1. the object is in the table, or its room in limbo
    the only outbox that has any, makes it readable     S2. ACKNOWLEDGED = n + 1
G2. the id is in no chain, or its entry is that of G1   S3. what was entered may go from here on: its state is
G3. a slot of its own says where it lies                    EVICTING, then come the membarrier, and the boards
G4. G1 once more: the same? there is the object
    else: the slot is 0 again; look in the table, or ask
======================================================  ==========================================================

*What a record makes readable.*  A `Publish` says where its object lies.  A `Seal` does not: that says the `Claim` before it in the same outbox, if that is
unread; else the object has an entry, CREATED, whose creator is the client of that outbox.  Records of references say nothing of this.
What was aborted is not readable; so if the last record under the id is another one, the store is left to say what is there.  A CREATED object goes by a record of
its creator, or when he leaves or ends; his records are read before that, but another thread of his may write a `Seal` even then, which is
going to be refused.

*Where it lies nobody else writes.*  Before S1 the extent is its putter's lease, which ends only when his records are read: also when he has left, or was killed, or has
posted what nobody may.

*Who passes G4 has pinned the object before anybody can take it.*  x86-64 keeps the order of stores, and that of loads, but G4 may pass G3.  G4 reads
ACKNOWLEDGED, and then the record that has the place.  If it found ACKNOWLEDGED to be n at most then S2 was not visible yet; the membarrier of S3 comes
later, so G3 is visible when the boards are read.  The word tells the entry by itself (`shmplasma.offset_pins`).  What has an entry, CREATED, may go before
its `Seal` is read (`shmplasma.unsealed`); its state word is part of what is compared at G4, and returns no more than that of any
object.  So if G4 finds it EVICTING was not visible yet, and the membarrier comes later here as well.

*A record that is refused*, as its id is taken, leaves its room in limbo, whose boards are read after S2 (`Publishing.note_refused`).

*A board that has changed hands.*  Its outbox is cleared before its ACKNOWLEDGED is 0 again.  So if G1 finds that of the next client, it finds no record
there, or one of that client: `places` tells of ids and numbers, and a number begins anew with each client.  Therefore the record says whose it is, and one of
another id makes nothing readable; one of this id is as good as the one that was meant.  If G4 finds that of the next client, and his record is the one of
G1, byte for byte, it was not read before G3 either: the pin was there before it was.

*What was deleted is not found.*  To delete an object is to find it in the table.  As long as record n is unread what it has made does not leave the table.  So who finds the
id in no chain at G2, and record n unread at G4, looked before S1, hence before anybody could delete the object.

*A store that dies* between S1 and S2 leaves a record that was carried out.  Its successor acknowledges it before anything goes
(`Posts.acknowledge_published`).  What was refused, and is not acknowledged, is read once more, and refused once more.  While there is no store
what was put is found all the same.

An interrupt, or the collector, between two steps leaves at most a pin, which goes with its owner.  A fork leaves the child none, as
`shmplasma.pins` says.  The word of a record is its putter's, whose bytes are wanted; whatever it says, only the segment is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from struct import Struct
from typing import Final, NamedTuple, TypeAlias
from zlib import crc32

from shmplasma.absence import Absence
from shmplasma.attachment import Attachment
from shmplasma.layout import (
    BOARD_WORDS,
    CONTROL_BYTES,
    ENTRY_BYTES,
    ID_BYTES,
    OUTBOX_BYTES,
    STATE_MASK,
    ControlWord,
    EntryState,
    HeaderWord,
)
from shmplasma.offset_pins import pin_word
from shmplasma.outbox import RECORD_BYTES, RECORDS, read_record
from shmplasma.pinning import BoardPool, Located
from shmplasma.posted import CLAIM, PUBLISH, PUBLISH_RECORD, Abort, Claim, Publish, Seal

__all__ = ["Made", "Places", "Unread"]

Places: TypeAlias = dict[bytes, tuple[int, int]]
"""By id, whose outbox has the last record of an object, by its board, and how many records it has with that one."""

_PUBLISH: Final = Publish.KIND
_CLAIM: Final = Claim.KIND
_SEAL: Final = Seal.KIND
_LIVES: Final = frozenset({_PUBLISH, _CLAIM, _SEAL, Abort.KIND})
"""The kinds of record by which an object comes, becomes readable, or goes unread."""
_CREATED: Final = int(EntryState.CREATED)
_ENTRY: Final = Struct("@Q20sIQQQ32xQ")
"""An entry's state word, id, codec, offset, data size, metadata size, and the slot + 1 that its creator lent."""
_NAME: Final = Struct("@QHH20s")
"""Number, kind and length of a record, and the id with which its body begins."""
_WHOLE: Final = Struct(f"<Q{PUBLISH_RECORD.format.lstrip('<')}")
"""A record that is a `Publish`, with its number."""
_INSERTIONS: Final = int(HeaderWord.INSERTIONS)
_BOARDS_END: Final = int(HeaderWord.BOARDS_END)
_LINE_WORDS: Final = CONTROL_BYTES // 8
_OUTBOX_WORDS: Final = OUTBOX_BYTES // 8
_RECORD_WORDS: Final = RECORD_BYTES // 8
_MASK: Final = RECORDS - 1
_MOST_BOARDS: Final = 100
_MOST: Final = 64
"""At so many outboxes and records is looked; beyond that it takes less to ask."""
_SEVERAL: Final = -1, 0
"""The place of what several clients have put, or one has put and another one aborts."""


class Made(NamedTuple):
    """What a record makes readable.

    Attributes
    ----------
    word : int
        What pins it in a slot.
    at, state : int
        Where in the segment (8-byte words) the state of its entry is, and which; -1 and 0 as long as it has none.
    offset, data_size, metadata_size, codec : int
        As ever.
    """

    word: int
    at: int
    state: int
    offset: int
    data_size: int
    metadata_size: int
    codec: int


class Unread:
    """Finds and pins what was put and not read.

    Parameters
    ----------
    attachment : Attachment
        The segment.
    absence : Absence
        Sees what is not in the table.
    boards : BoardPool
        The client's boards.
    find : callable
        ``find(object_id)`` returns the byte of the segment at which an object's entry begins, whatever its state; -1 if none is seen.

    Notes
    -----
    Thread-safe.  This is the way of what is put by one process, told to another, and got by that; so its functions are flat.
    """

    __slots__ = (
        "_absence",
        "_boards",
        "_buckets",
        "_counts",
        "_data",
        "_end",
        "_entries",
        "_find",
        "_first_boards",
        "_map",
        "_mask",
        "_n_boards",
        "_outboxes",
        "_words",
    )

    def __init__(
        self,
        attachment: Attachment,
        absence: Absence,
        boards: BoardPool,
        find: Callable[[bytes], int],
    ) -> None:
        layout = attachment.layout
        self._absence = absence
        self._boards = boards
        self._find = find
        self._map = memoryview(attachment.read_map)
        self._words = attachment.words
        self._n_boards, self._outboxes = layout.n_boards, layout.outboxes
        self._counts = layout.control // 8 + ControlWord.ACKNOWLEDGED
        self._first_boards = layout.control // 8 + ControlWord.FIRST_BOARD
        self._buckets, self._mask = layout.buckets // 8, layout.n_buckets - 1
        self._entries = layout.entries
        self._data, self._end = layout.data, layout.segment_bytes

    def places(self) -> Places | None:
        """Return where what was written and is not read tells of objects; None if that is too much to look at.

        An object that is not in it, and not in the table after that, was not put when it was looked for (`shmplasma.absence`).

        Notes
        -----
        0.2 us for each board that is granted, and 0.5 us for each record.
        """
        words, raw = self._words, self._map
        n_boards = words[_BOARDS_END]
        if n_boards > _MOST_BOARDS:
            return None
        places: Places = {}
        left = _MOST
        count, outbox = self._counts, self._outboxes >> 3
        for board in range(n_boards):
            number = words[count]
            at = outbox + (number & _MASK) * _RECORD_WORDS
            while words[at] == number + 1 and left >= 0:
                _, kind, _, object_id = _NAME.unpack_from(raw, at << 3)
                number += 1
                if kind in _LIVES:
                    before = places.get(object_id)
                    alone = before is None or before[0] == board
                    places[object_id] = (board, number) if alone else _SEVERAL
                left -= 1
                at = outbox + (number & _MASK) * _RECORD_WORDS
            # Where more was read than was seen, what came after it was not seen (A1 there).
            if words[count] > number or left < 0:
                return None
            count += _LINE_WORDS
            outbox += _OUTBOX_WORDS
        return places

    def has(self, object_id: bytes, places: Places) -> bool:
        """Tell whether an object was put, and was not read when it was not found in the table; otherwise as `take`."""
        place = places.get(object_id)
        if place is None:
            return False
        is_new = self._absence.is_free(object_id)
        made = self.made_by(*place, object_id)
        return made is not None and (is_new or made.at >= 0)

    def take(self, object_id: bytes, places: Places) -> Located | None:
        """Pin an object that was put and not read; None if it was not, or that cannot be seen.

        Parameters
        ----------
        object_id : bytes
            An object that was not found in the table.
        places : dict
            As `places` has returned it.
        """
        place = places.get(object_id)
        if place is None:
            return None
        board, n_posted = place
        published = self.published(board, n_posted)
        if published is None:
            return self._take_created(object_id, board, n_posted)
        if published[0] != object_id:
            return None
        _, offset, data_size, metadata_size, codec = published
        words = self._words
        hash32 = crc32(object_id)
        # Mostly the chain is empty, which is seen at a glance.
        insertions = words[_INSERTIONS]
        if (
            words[self._buckets + (hash32 & self._mask)]
            or insertions & 1
            or words[_INSERTIONS] != insertions
        ) and not self._absence.is_free(object_id):
            return None
        pin = self._boards.take_one()
        if pin is None:
            return None
        pin.board.words[pin.word] = pin_word(hash32, offset)
        if self.published(board, n_posted) != published:
            return None  # and the pin goes
        return offset, data_size, metadata_size, codec, pin

    def _take_created(self, object_id: bytes, board: int, n_posted: int) -> Located | None:
        """Pin what was sealed, by G1 to G4."""
        made = self.made_by(board, n_posted, object_id)
        if made is None or (made.at < 0 and not self._absence.is_free(object_id)):
            return None
        pin = self._boards.take_one()
        if pin is None:
            return None
        pin.board.words[pin.word] = made.word
        if self.made_by(board, n_posted, object_id) != made:
            return None
        return made.offset, made.data_size, made.metadata_size, made.codec, pin

    def published(self, board: int, n_posted: int) -> tuple[bytes, int, int, int, int] | None:
        """Return what the last of so many records has published; None if it has not, is read, or that cannot be seen.

        What has no bytes lies nowhere, and is left to the store.

        Returns
        -------
        object_id, offset, data_size, metadata_size, codec
        """
        if not 0 <= board < self._n_boards or (
            self._words[self._counts + board * _LINE_WORDS] >= n_posted
        ):
            return None
        at = self._outboxes + board * OUTBOX_BYTES + (n_posted - 1 & _MASK) * RECORD_BYTES
        number, kind, length, object_id, offset, data_size, metadata_size, codec, _ = (
            _WHOLE.unpack_from(self._map, at)
        )
        size = data_size + metadata_size
        if (
            number != n_posted
            or kind != _PUBLISH
            or length != PUBLISH.size
            or not size
            or not self._data <= offset <= self._end - size
        ):
            return None
        return object_id, offset, data_size, metadata_size, codec

    def made_by(self, board: int, n_posted: int, object_id: bytes) -> Made | None:
        """Return what the last of so many records makes readable; otherwise as `published`."""
        published = self.published(board, n_posted)
        if published is not None:
            return self._unentered(*published) if published[0] == object_id else None
        if not 0 <= board < self._n_boards:
            return None
        read = self._words[self._counts + board * _LINE_WORDS]
        outbox = self._outboxes + board * OUTBOX_BYTES
        if n_posted <= read:
            return None
        record = read_record(self._map, n_posted - 1, outbox)
        if record is None or record[0] != _SEAL or record[1][:ID_BYTES] != object_id:
            return None
        claimed: Made | None = None
        for number in range(read, n_posted - 1):
            record = read_record(self._map, number, outbox)
            if record is None:
                return None
            kind, body = record
            if kind in _LIVES and body[:ID_BYTES] == object_id:
                if kind != _CLAIM or len(body) != CLAIM.size or claimed is not None:
                    return None
                claimed = self._unentered(*CLAIM.unpack(body)[:5])
                size = claimed.data_size + claimed.metadata_size
                if not size or not self._data <= claimed.offset <= self._end - size:
                    return None
        return self._created_by(board, object_id) if claimed is None else claimed

    @staticmethod
    def _unentered(
        object_id: bytes, offset: int, data_size: int, metadata_size: int, codec: int
    ) -> Made:
        """Return what a record describes."""
        word = pin_word(crc32(object_id), offset)
        return Made(word, -1, 0, offset, data_size, metadata_size, codec)

    def _created_by(self, board: int, object_id: bytes) -> Made | None:
        """Return what the client of a board has in the table, and not sealed; its first board is meant."""
        at = self._find(object_id)
        if at < 0:
            return None
        state, found, codec, offset, data_size, metadata_size, slot = _ENTRY.unpack_from(
            self._map, at
        )
        owner = (slot - 1) // BOARD_WORDS
        if (
            found != object_id
            or state & STATE_MASK != _CREATED
            or not data_size + metadata_size
            or not 0 <= owner < self._n_boards
            or self._words[self._first_boards + owner * _LINE_WORDS] != board + 1
        ):
            return None
        word = (at - self._entries) // ENTRY_BYTES + 1
        return Made(word, at // 8, state, offset, data_size, metadata_size, codec)

    def lying_at(self, at: int) -> Iterator[tuple[bytes, int, int]]:
        """Yield id, offset and data size of what was put and not read, and covers an offset."""
        for object_id, place in (self.places() or {}).items():
            made = self.made_by(*place, object_id)
            if made is not None and made.offset <= at < made.offset + made.data_size:
                yield object_id, made.offset, made.data_size
