"""The client's side of hints: tells who waits of what is put, and takes what others put (`shmplasma.hints` has the argument).

The steps are those of the table there.
"""

from __future__ import annotations

import os
import socket
import time
from typing import Final
from zlib import crc32

from shmplasma import system
from shmplasma.attachment import Attachment
from shmplasma.ear import Ear, address_of
from shmplasma.hints import HINT, TAKEN, wanted_at, wanted_word
from shmplasma.layout import CONTROL_BYTES, OUTBOX_BYTES, ControlWord
from shmplasma.objects import ObjectID
from shmplasma.offset_pins import pin_word
from shmplasma.outbox import Outbox, is_written
from shmplasma.owned_socket import OwnedSocket
from shmplasma.pinning import Located, Pin
from shmplasma.spin import Spin
from shmplasma.unread import Unread

__all__ = ["Hints"]

_LINE_WORDS: Final = CONTROL_BYTES // 8
_LOOK_NS: Final = 100_000
"""How long a record is looked for that was hinted at early: a small object is put in half of that."""


class Hints:
    """What a client says of what it puts, and hears of what others put.

    Parameters
    ----------
    attachment : Attachment
        The segment.
    board : int
        The client's first board.
    outbox : Outbox
        The client's.
    unread : Unread
        Knows what a record makes readable.

    Notes
    -----
    Thread-safe.
    """

    __slots__ = (
        "_addresses",
        "_board",
        "_early",
        "_is_alone",
        "_mouth",
        "_n_boards",
        "_outbox",
        "_outboxes",
        "_pids",
        "_spin",
        "_token",
        "_unread",
        "_words",
    )

    def __init__(
        self,
        attachment: Attachment,
        board: int,
        outbox: Outbox,
        unread: Unread,
    ) -> None:
        self._board = board
        self._outbox = outbox
        self._unread = unread
        self._token = attachment.token
        self._addresses: dict[int, bytes] = {}
        self._words = attachment.words
        layout = attachment.layout
        self._n_boards, self._outboxes = layout.n_boards, layout.outboxes
        self._spin = Spin()
        self._pids = layout.control // 8 + ControlWord.PID
        # Who is woken on the putter's only processor keeps him from going on.
        self._is_alone = system.processors() < 2
        self._early = 0, 0, 0  # the latest: whom, at which record, and until when he looks
        self._mouth: OwnedSocket | None = None

    def tell_early(self, object_id: ObjectID, n_ahead: int = 1) -> None:
        """Hint at a record that is to come, if somebody waits for an object that is about to be made.

        Parameters
        ----------
        object_id : ObjectID
            The object.
        n_ahead : int, optional
            Which of the next records makes it readable.
        """
        word = self._words[wanted_at(object_id.hash32)]
        if not word or self._is_alone or self._is_ours(word):
            return
        n_posted = self._outbox.written + n_ahead
        self._early = word, n_posted, time.monotonic_ns() + _LOOK_NS
        self._hint(word, n_posted)

    def tell(self, object_id: ObjectID, n_posted: int) -> None:
        """Tell who waits for an object that it is there, if somebody does, and let him have it before this process goes on.

        Parameters
        ----------
        object_id : ObjectID
            The object.
        n_posted : int
            How many records there are with the one that makes it readable.
        """
        word = self._words[wanted_at(object_id.hash32)]
        if not word:
            return
        whom, n_hinted, until_ns = self._early
        if (whom, n_hinted) != (word, n_posted) or time.monotonic_ns() > until_ns:
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

    def take(self, hint: bytes, object_id: bytes, pin: Pin, lent: Pin) -> Located | None:
        """Pin what a hint says; None if it is not there, or not to be had without the store.

        Parameters
        ----------
        hint : bytes
            As heard.
        object_id : bytes
            What the get waits for.
        pin : Pin
            For the object.
        lent : Pin
            The slot that it has lent.
        """
        request_id, board, n_posted = HINT.unpack(hint)
        words, unread, hash32 = self._words, self._unread, crc32(object_id)
        published = unread.published(board, n_posted)
        if published is not None and published[0] == object_id:
            _, offset, data_size, metadata_size, codec = published
            word, at, state = pin_word(hash32, offset), -1, 0
        else:
            made = unread.made_by(board, n_posted, object_id)
            if made is None:
                return None
            word, at, state, offset, data_size, metadata_size, codec = made
        pin.board.words[pin.word] = word
        lent.board.words[lent.word] = TAKEN
        if words[wanted_at(hash32)] != wanted_word(request_id, self._board) or (
            at >= 0 and words[at] != state
        ):
            pin.clear()
            lent.clear()
            return None
        return offset, data_size, metadata_size, codec, pin
