"""The client's side of a lease: room to put objects without waiting (`shmplasma.leases` has the argument).

The order of the steps is that of the table there: BUSY, EPOCH, room, fill, publish, BUSY off.  One thread at
a time is between the first and the last; another one that wants to put meanwhile goes by the store, as does
whoever finds no room.  So do finalizers that put something while their own thread is at it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt

from shmplasma.layout import ALIGNMENT, CONTROL_BYTES, ControlWord
from shmplasma.leases import BUSY_WORD
from shmplasma.replies import Leased
from shmplasma.segment import Attachment

__all__ = ["MAX_OBJECT_BYTES", "LeaseWriter"]

MAX_OBJECT_BYTES: Final = 1 << 16
"""Larger objects are created by a round trip: from about here on the copy takes as long."""

_PUTS_AFTER_REFUSAL: Final = 64
"""How many puts go by the store before a client asks again for a lease that it did not get."""


class LeaseWriter:
    """Puts objects into a lease.

    Parameters
    ----------
    attachment : Attachment
        The segment.
    board : int
        The client's first board.
    ask : callable
        ``ask(needed_bytes)`` asks the store for a lease.
    populate : callable
        ``populate(offset, size_bytes)`` has pages mapped before they are filled.

    Notes
    -----
    Thread-safe: `take` refuses while another thread is between `take` and `leave`.
    """

    def __init__(
        self,
        attachment: Attachment,
        board: int,
        ask: Callable[[int], Leased],
        populate: Callable[[int, int], None],
    ) -> None:
        layout = attachment.layout
        self._board = attachment.board(board)
        self._words = attachment.words
        self._epoch_word = (layout.control + board * CONTROL_BYTES) // 8 + ControlWord.EPOCH
        self._ask = ask
        self._populate = populate
        self._lock = threading.Lock()
        self._memory: npt.NDArray[np.uint8] = np.frombuffer(attachment.write_map, np.uint8)
        self._data = layout.data
        self._epoch = -1
        self._cursor = self._end = self._objects = self._pause = 0

    def take(self, size_bytes: int) -> int:
        """Take room for an object, and stay busy until `leave`.

        Returns
        -------
        int
            The object's offset; -1 when it must go by the store, and then nothing is to be left.
        """
        if size_bytes > MAX_OBJECT_BYTES or not self._lock.acquire(blocking=False):
            return -1
        self._board[BUSY_WORD] = 1
        offset = self._cursor
        if (
            self._words[self._epoch_word] != self._epoch
            or offset + size_bytes > self._end
            or not self._objects
        ):
            if not self._renew(size_bytes):
                return -1
            offset = self._cursor
        self._cursor = (offset + size_bytes + ALIGNMENT - 1) & -ALIGNMENT
        self._objects -= 1
        return offset

    def room(self, offset: int, size_bytes: int) -> npt.NDArray[np.uint8]:
        """Return the bytes that `take` has given, for filling."""
        start = offset - self._data
        return self._memory[start : start + size_bytes]

    def leave(self) -> None:
        """Be busy no more.  What was taken and not published goes back with the next that is."""
        self._board[BUSY_WORD] = 0
        self._lock.release()

    def _renew(self, size_bytes: int) -> bool:
        """Get a lease with room for an object; if there is none, leave and return False."""
        try:
            self._board[BUSY_WORD] = 0  # nothing was taken, and the store may have to wait for it
            self._cursor = self._end = 0
            if self._pause:
                self._pause -= 1
            else:
                lease = self._ask(size_bytes)
                if lease.size_bytes:
                    self._populate(lease.offset, lease.size_bytes)
                else:
                    self._pause = _PUTS_AFTER_REFUSAL
                self._cursor, self._end = lease.offset, lease.offset + lease.size_bytes
                self._objects, self._epoch = lease.objects, lease.epoch
            self._board[BUSY_WORD] = 1
            if self._end and self._words[self._epoch_word] == self._epoch:
                return True
        except BaseException:
            self.leave()
            raise
        self.leave()
        return False
