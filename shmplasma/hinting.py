"""The client's side of hints: tells who waits of what is put, and takes what others put (`shmplasma.hints` has the argument).

The steps are those of the table there.
"""

from __future__ import annotations

import socket
from contextlib import suppress
from typing import Final
from weakref import WeakValueDictionary
from zlib import crc32

from shmplasma.attachment import Attachment
from shmplasma.claims import pin_word
from shmplasma.ear import Ear, address_of
from shmplasma.hints import HINT, TAKEN, wanted_at, wanted_word
from shmplasma.layout import CONTROL_BYTES, OUTBOX_BYTES, ControlWord
from shmplasma.objects import ObjectID
from shmplasma.outbox import read_record
from shmplasma.owned_socket import OwnedSocket
from shmplasma.pinning import BoardPool, Located, NamedPin, Pin
from shmplasma.posted import PUBLISH, Publish
from shmplasma.protocol import Frame

__all__ = ["Hints"]

_PUBLISH: Final = Publish.KIND
_LINE_WORDS: Final = CONTROL_BYTES // 8


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
        "_map",
        "_mouth",
        "_n_boards",
        "_outboxes",
        "_taken",
        "_token",
        "_words",
    )

    def __init__(self, attachment: Attachment, board: int, boards: BoardPool) -> None:
        self._board = board
        self._boards = boards
        self._token = attachment.token
        self._addresses: dict[int, bytes] = {}
        self._map = memoryview(attachment.read_map)
        self._words = attachment.words
        layout = attachment.layout
        self._n_boards, self._outboxes = layout.n_boards, layout.outboxes
        self._counts = layout.control // 8 + ControlWord.ACKNOWLEDGED
        self._data, self._end = layout.data, layout.segment_bytes
        self._mouth: OwnedSocket | None = None
        self._taken: WeakValueDictionary[int, NamedPin] = WeakValueDictionary()

    def tell(self, object_id: ObjectID, n_posted: int) -> None:
        """Tell who waits for an object that it was put, if somebody does: his `Publish` was the last of so many records."""
        word = self._words[wanted_at(object_id.hash32)]
        if word:
            request_id, board = word >> 32, (word & 0xFFFF_FFFF) - 1
            # Nobody may listen, or somebody who has much to read: then the store tells him.
            with suppress(OSError):
                if self._mouth is None:
                    self._mouth = OwnedSocket(socket.AF_UNIX, socket.SOCK_DGRAM)
                hint = HINT.pack(request_id, self._board, n_posted)
                if board not in self._addresses:
                    self._addresses[board] = address_of(self._token, board)
                self._mouth.sendto(hint, socket.MSG_DONTWAIT, self._addresses[board])

    def listen(self) -> Ear | None:
        """Return what hears hints for this client; None where that cannot be had."""
        try:
            return Ear(self._token, self._board)
        except OSError:
            return None

    def take(self, hint: Frame, object_id: bytes, lent: Pin) -> Located | None:
        """Pin what a hint says; None if it is not there, or not to be had without the store.

        Parameters
        ----------
        hint : Frame
            As heard.
        object_id : bytes
            What the get waits for.
        lent : Pin
            The slot that it has lent.
        """
        request_id, board, n_posted = HINT.unpack(hint.body)
        record = None
        if board < self._n_boards and n_posted > self._words[self._counts + board * _LINE_WORDS]:
            record = read_record(self._map, n_posted - 1, self._outboxes + board * OUTBOX_BYTES)
        if record is None or record[0] != _PUBLISH or len(record[1]) != PUBLISH.size:
            return None
        found, offset, data_size, metadata_size, codec, _ = PUBLISH.unpack(record[1])
        size = data_size + metadata_size
        # What has no bytes lies nowhere.
        if found != object_id or not size or not self._data <= offset <= self._end - size:
            return None
        pin = self._boards.take_named()
        if pin is None:
            return None
        pin.object_id, pin.data_size = object_id, data_size
        pin.board.words[pin.word] = word = pin_word(offset)
        lent.board.words[lent.word] = TAKEN | offset
        wanted = wanted_word(request_id, self._board)
        if self._words[wanted_at(crc32(object_id))] != wanted:
            lent.clear()
            return None
        self._taken[word] = pin
        return offset, data_size, metadata_size, codec, pin

    def taken_at(self, word: int) -> NamedPin | None:
        """Return the pin that has written this word, if that pins what was taken."""
        return self._taken.get(word)
