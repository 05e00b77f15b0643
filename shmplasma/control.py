"""Control lines: what the store writes down of each board, for its client and for a successor.

A line is one cache line of the segment, written by the store alone and mapped read-only by the clients.  Its
client reads EPOCH (`shmplasma.leases`) and ACKNOWLEDGED (`shmplasma.outbox`).  The rest says whose board it is,
what that client leases, and whether it holds references, so that a store which is started after this one has died can keep these.

Invariants
----------
* A board whose FIRST_BOARD is 0, or whose owner's half of CHECK does not fit, is nobody's.
* Each half of CHECK is written after the words that it covers: the low half PID, START_TIME and FIRST_BOARD, the
  high half LEASE_END.  A store that dies while it writes a lease leaves a board without one.
* LEASE_CURSOR moves only forward in a lease; it is in no checksum, being written at each publication.  Its lowest bit, which no cursor
  has, says that the client holds references (`shmplasma.holders`): it changes by a single store, so that no death takes the rest along.
"""

from __future__ import annotations

from struct import Struct
from typing import Final, NamedTuple
from zlib import crc32

from shmplasma.layout import CONTROL_BYTES, ControlWord, Layout

__all__ = ["Control", "Owner"]

_OWNER: Final = Struct("@QQQQ")
_LEASE: Final = Struct("@QQ")
_HALF: Final = (1 << 32) - 1
_LINE_WORDS: Final = CONTROL_BYTES // 8
_ACKNOWLEDGED: Final = int(ControlWord.ACKNOWLEDGED)
_LEASE_CURSOR: Final = int(ControlWord.LEASE_CURSOR)
_HOLDS: Final = 1


class Owner(NamedTuple):
    """Whose a board is, and what that client leases.

    Attributes
    ----------
    pid, start_time : int
        The client's process, as the store sees it; 0 where it cannot see it.
    first_board : int
        The board by which the client is known.
    lease_cursor, lease_end : int
        The part of its lease that is not published; meaningful on its first board.
    holds : bool
        Whether it holds references; likewise.
    """

    pid: int
    start_time: int
    first_board: int
    lease_cursor: int
    lease_end: int
    holds: bool = False


class Control:
    """All control lines of a segment.  Words are native and 8 bytes long.

    Parameters
    ----------
    layout : Layout
        The segment's layout.
    words : memoryview
        The segment as native 8-byte words, writable.
    """

    def __init__(self, layout: Layout, words: memoryview) -> None:
        self._words = words
        self._first = layout.control // 8
        self._limits = layout.data, layout.data + layout.data_bytes
        self._holders: set[int] = set()

    def claim(self, board: int, owner: Owner) -> None:
        """Write down whose a board is; a first board begins with nothing acknowledged."""
        line = self._line(board)
        words = self._words
        words[line + ControlWord.PID] = owner.pid
        words[line + ControlWord.START_TIME] = owner.start_time
        words[line + ControlWord.FIRST_BOARD] = owner.first_board + 1
        words[line + ControlWord.LEASE_CURSOR] = owner.lease_cursor | owner.holds
        words[line + ControlWord.LEASE_END] = owner.lease_end
        words[line + ControlWord.CHECK] = self._owner_check(board) | self._lease_check(board)

    def clear(self, board: int) -> None:
        """Make a board nobody's."""
        self._holders.discard(board)
        line = self._line(board)
        self._words[line + ControlWord.FIRST_BOARD] = 0
        self._words[line + ControlWord.LEASE_END] = 0
        self._words[line + ControlWord.ACKNOWLEDGED] = 0

    def owner(self, board: int) -> Owner | None:
        """Return whose a board is, or None if it is nobody's or the line is damaged."""
        line = self._line(board)
        words = self._words
        first_board = words[line + ControlWord.FIRST_BOARD]
        check = words[line + ControlWord.CHECK]
        if not first_board or check & _HALF != self._owner_check(board):
            return None
        word = words[line + ControlWord.LEASE_CURSOR]
        holds, cursor = bool(word & _HOLDS), word & ~_HOLDS
        end = words[line + ControlWord.LEASE_END]
        low, high = self._limits
        if check & ~_HALF != self._lease_check(board) or not low <= cursor <= end <= high:
            cursor = end = 0
        return Owner(
            words[line + ControlWord.PID],
            words[line + ControlWord.START_TIME],
            first_board - 1,
            cursor,
            end,
            holds,
        )

    def _owner_check(self, board: int) -> int:
        line = self._line(board)
        words = self._words
        pid, start_time = words[line + ControlWord.PID], words[line + ControlWord.START_TIME]
        return crc32(_OWNER.pack(board, pid, start_time, words[line + ControlWord.FIRST_BOARD]))

    def _lease_check(self, board: int) -> int:
        end = self._words[self._line(board) + ControlWord.LEASE_END]
        return crc32(_LEASE.pack(board, end)) << 32

    # -- lease ---------------------------------------------------------------------------------

    def epoch(self, board: int) -> int:
        """Return the epoch of the board's lease."""
        return int(self._words[self._line(board)])

    def raise_epoch(self, board: int) -> None:
        """Let the lease of a board be one that is not to be used any more."""
        self._words[self._line(board)] += 1

    def lease(self, board: int, cursor: int, end: int) -> None:
        """Write down what the client of a first board leases; `end` 0 for nothing."""
        line = self._line(board)
        # In between there is no lease: a successor would take the objects of one for those of the other.
        self._words[line + ControlWord.LEASE_END] = 0
        self.advance(board, cursor)
        self._words[line + ControlWord.LEASE_END] = end
        check = self._words[line + ControlWord.CHECK] & _HALF
        self._words[line + ControlWord.CHECK] = check | self._lease_check(board)

    def advance(self, board: int, cursor: int) -> None:
        """Move the cursor of a lease."""
        at = self._first + board * _LINE_WORDS + _LEASE_CURSOR
        self._words[at] = cursor | (board in self._holders)

    # -- references ----------------------------------------------------------------------------

    def note_holder(self, board: int, *, holds: bool) -> None:
        """Write down whether the client of a first board holds references."""
        (self._holders.add if holds else self._holders.discard)(board)
        at = self._first + board * _LINE_WORDS + _LEASE_CURSOR
        self._words[at] = self._words[at] & ~_HOLDS | holds

    # -- outbox --------------------------------------------------------------------------------

    def acknowledged(self, board: int) -> int:
        """Return how many records of the client's outbox have been handled."""
        return int(self._words[self._first + board * _LINE_WORDS + _ACKNOWLEDGED])

    def acknowledge(self, board: int, count: int) -> None:
        """Set how many records of the client's outbox have been handled."""
        self._words[self._first + board * _LINE_WORDS + _ACKNOWLEDGED] = count

    def _line(self, board: int) -> int:
        return self._first + board * _LINE_WORDS
