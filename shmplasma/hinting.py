"""The client's side of hints: tells who waits of what is put, and takes what others put (`shmplasma.hints` has the argument).

The steps are those of the table there.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from struct import Struct
from typing import Final, NamedTuple
from weakref import WeakValueDictionary
from zlib import crc32

from shmplasma import system
from shmplasma.attachment import Attachment
from shmplasma.claims import pin_word
from shmplasma.ear import Ear, address_of
from shmplasma.hints import HINT, TAKEN, wanted_at, wanted_word
from shmplasma.layout import (
    BOARD_WORDS,
    CONTROL_BYTES,
    ENTRY_BYTES,
    ID_BYTES,
    OUTBOX_BYTES,
    STATE_MASK,
    ControlWord,
    EntryState,
)
from shmplasma.objects import ObjectID
from shmplasma.outbox import Outbox, is_written, read_record
from shmplasma.owned_socket import OwnedSocket
from shmplasma.pinning import BoardPool, Located, NamedPin, Pin
from shmplasma.posted import CLAIM, PUBLISH, Claim, Publish, Seal
from shmplasma.spin import Spin

__all__ = ["Hints"]

_PUBLISH: Final = Publish.KIND
_CLAIM: Final = Claim.KIND
_SEAL: Final = Seal.KIND
_CREATED: Final = int(EntryState.CREATED)
_ENTRY: Final = Struct("@Q20sIQQQ32xQ")
"""An entry's state word, id, codec, offset, data size, metadata size, and the slot + 1 that its creator lent."""
_LINE_WORDS: Final = CONTROL_BYTES // 8
_LOOK_NS: Final = 100_000
"""How long a record is looked for that was hinted at early: a small object is put in half of that."""


class _Put(NamedTuple):
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


class Hints:
    """What a client says of what it puts, and hears of what others put.

    Parameters
    ----------
    attachment : Attachment
        The segment.
    board : int
        The client's first board.
    boards : BoardPool
        All of them.
    outbox : Outbox
        The client's.
    find : callable
        ``find(object_id)`` returns the byte of the segment at which an object's entry begins, whatever its state; -1 if none is seen.

    Notes
    -----
    Thread-safe.
    """

    __slots__ = (
        "_addresses",
        "_board",
        "_boards",
        "_counts",
        "_data",
        "_end",
        "_entries",
        "_find",
        "_first_boards",
        "_is_alone",
        "_map",
        "_mouth",
        "_n_boards",
        "_outbox",
        "_outboxes",
        "_pids",
        "_pins",
        "_spin",
        "_token",
        "_words",
    )

    def __init__(
        self,
        attachment: Attachment,
        board: int,
        boards: BoardPool,
        outbox: Outbox,
        find: Callable[[bytes], int],
    ) -> None:
        self._find = find
        self._board = board
        self._outbox = outbox
        self._boards = boards
        self._token = attachment.token
        self._addresses: dict[int, bytes] = {}
        self._map = memoryview(attachment.read_map)
        self._words = attachment.words
        layout = attachment.layout
        self._n_boards, self._outboxes = layout.n_boards, layout.outboxes
        self._counts = layout.control // 8 + ControlWord.ACKNOWLEDGED
        self._entries = layout.entries
        self._data, self._end = layout.data, layout.segment_bytes
        self._spin = Spin()
        self._first_boards = layout.control // 8 + ControlWord.FIRST_BOARD
        self._pids = layout.control // 8 + ControlWord.PID
        # Who is woken on the putter's only processor keeps him from going on.
        self._is_alone = system.processors() < 2
        self._mouth: OwnedSocket | None = None
        self._pins: WeakValueDictionary[int, NamedPin] = WeakValueDictionary()

    def tell_early(self, object_id: ObjectID) -> int:
        """Hint at the next record, if somebody waits for an object that is about to be put.

        Returns
        -------
        int
            Until when he looks for it, by `time.monotonic_ns`; 0 if there is no such hint.
        """
        word = self._words[wanted_at(object_id.hash32)]
        if not word or self._is_alone or self._is_ours(word):
            return 0
        until_ns = time.monotonic_ns() + _LOOK_NS
        self._hint(word, self._outbox.written + 1)
        return until_ns

    def tell(self, object_id: ObjectID, looks_until_ns: int, n_posted: int) -> None:
        """Tell who waits for an object that it was put, if somebody does, and let him have it before this process goes on.

        Parameters
        ----------
        object_id : ObjectID
            The object.
        looks_until_ns : int
            As `tell_early` returned it.
        n_posted : int
            How many records there are with the one that makes it readable.
        """
        word = self._words[wanted_at(object_id.hash32)]
        if not word:
            return
        if time.monotonic_ns() > looks_until_ns:
            self._hint(word, n_posted)
        if not self._is_ours(word):
            self._spin.give_way()

    def _is_ours(self, word: int) -> bool:
        """Tell whether a get is one of this process, which does not look while another thread goes on."""
        board = (word & 0xFFFF_FFFF) - 1
        return bool(self._words[self._pids + board * _LINE_WORDS] == os.getpid())

    def _hint(self, word: int, n_posted: int) -> None:
        """Hint at the last of so many records, to the get that a word names."""
        request_id, board = word >> 32, (word & 0xFFFF_FFFF) - 1
        try:
            if self._mouth is None:
                self._mouth = OwnedSocket(socket.AF_UNIX, socket.SOCK_DGRAM)
            if board not in self._addresses:
                self._addresses[board] = address_of(self._token, board)
            hint = HINT.pack(request_id, self._board, n_posted)
            self._mouth.sendto(hint, socket.MSG_DONTWAIT, self._addresses[board])
        except OSError:  # nobody listens, or somebody who has much to read: the store tells him
            return

    def listen(self) -> Ear | None:
        """Return what hears hints for this client; None where that cannot be had."""
        try:
            return Ear(self._token, self._board)
        except OSError:
            return None

    def expect(self, object_id: bytes) -> NamedPin | None:
        """Return a pin for an object that somebody may hint at; None if there is no free slot."""
        pin = self._boards.take_one(NamedPin)
        if pin is not None:
            pin.object_id, pin.offset, pin.data_size = object_id, 0, 0
            self._pins[pin.slot] = pin
        return pin

    def is_there(self, hint: bytes) -> bool:
        """Tell whether the record is there that a hint says, or comes while this process looks for it."""
        _, board, n_posted = HINT.unpack(hint)
        if board >= self._n_boards:
            return False
        words, outbox = self._words, self._outboxes + board * OUTBOX_BYTES
        if is_written(words, outbox, n_posted - 1):
            return True
        for _ in self._spin.looks(_LOOK_NS):
            if is_written(words, outbox, n_posted - 1):
                return True
        os.sched_yield()  # where processes wait for processors nobody looks, and the putter may be one of them
        return is_written(words, outbox, n_posted - 1)

    def take(self, hint: bytes, pin: NamedPin, lent: Pin) -> Located | None:
        """Pin what a hint says; None if it is not there, or not to be had without the store.

        Parameters
        ----------
        hint : bytes
            As heard.
        pin : NamedPin
            For the object that the get waits for.
        lent : Pin
            The slot that it has lent.
        """
        request_id, board, n_posted = HINT.unpack(hint)
        words = self._words
        put = self._put_by(board, n_posted, pin.object_id) if board < self._n_boards else None
        if put is None:
            return None
        size = put.data_size + put.metadata_size
        # What has no bytes lies nowhere.
        if not size or not self._data <= put.offset <= self._end - size:
            return None
        pin.board.words[pin.word] = put.word
        lent.board.words[lent.word] = TAKEN | put.offset
        if words[wanted_at(crc32(pin.object_id))] != wanted_word(request_id, self._board) or (
            put.at >= 0 and words[put.at] != put.state
        ):
            pin.clear()
            lent.clear()
            return None
        if put.at < 0:  # whose entry the word does not tell
            pin.offset, pin.data_size = put.offset, put.data_size
        return put.offset, put.data_size, put.metadata_size, put.codec, pin

    def _put_by(self, board: int, n_posted: int, object_id: bytes) -> _Put | None:
        """Return what the last of so many records makes readable; None if it does not, or that cannot be seen."""
        read = self._words[self._counts + board * _LINE_WORDS]
        outbox = self._outboxes + board * OUTBOX_BYTES
        if n_posted <= read:
            return None
        record = read_record(self._map, n_posted - 1, outbox)
        if record is None or record[1][:ID_BYTES] != object_id:
            return None
        kind, body = record
        if kind == _PUBLISH and len(body) == PUBLISH.size:
            _, offset, data_size, metadata_size, codec, _ = PUBLISH.unpack(body)
            return _Put(pin_word(offset), -1, 0, offset, data_size, metadata_size, codec)
        if kind != _SEAL:
            return None
        claimed: _Put | None = None
        for number in range(read, n_posted - 1):
            record = read_record(self._map, number, outbox)
            if record is None:
                return None
            kind, body = record
            if body[:ID_BYTES] == object_id:
                if kind != _CLAIM or len(body) != CLAIM.size or claimed is not None:
                    return None
                _, offset, data_size, metadata_size, codec, _ = CLAIM.unpack(body)
                claimed = _Put(pin_word(offset), -1, 0, offset, data_size, metadata_size, codec)
        return self._created_by(board, object_id) if claimed is None else claimed

    def _created_by(self, board: int, object_id: bytes) -> _Put | None:
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
            or not 0 <= owner < self._n_boards
            or self._words[self._first_boards + owner * _LINE_WORDS] != board + 1
        ):
            return None
        word = (at - self._entries) // ENTRY_BYTES + 1
        return _Put(word, at // 8, state, offset, data_size, metadata_size, codec)

    def taken_at(self, at: int) -> Iterator[NamedPin]:
        """Yield the pins of what was taken and covers an offset."""
        for pin in list(self._pins.values()):
            if pin.offset <= at < pin.offset + pin.data_size:
                yield pin
