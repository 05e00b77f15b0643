"""Outboxes: what clients tell the store without asking, kept where the death of a store does not reach.

A put, a seal, an abort, a deletion, or a word about a reference is one record in the client's outbox, a ring of `RECORDS`
records in the segment, and at times an empty message which says that there is something in it.  Messages that a store has not read die with
it; records stay.  A store that recovers the segment handles all that was not acknowledged.

::

    client                                              store: before it handles a request of the client or says
                                                        that something is not there, and when it polls
    1. record n is handled (n < ACKNOWLEDGED + PLACES)   1. a = ACKNOWLEDGED
    2. write kind, length and body to place n % RECORDS  2. number at place a % RECORDS is a + 1?  no: done
    3. write number n + 1 there                          3. copy the record, carry it out
    4. POLLED, and n + 1 is not ACKNOWLEDGED +           4. ACKNOWLEDGED = a + 1, and again
       ANNOUNCED_AT: done
    5. send the message

Why nothing is lost, and nothing done twice
    x86-64 keeps the order of stores, and what a killed process has stored stays in the segment; so a record
    whose number is there is whole.  A store that dies between 3 and 4 leaves a record that was carried out:
    its successor sees that by the record itself (see `shmplasma.recovery`).  An interrupt between a client's
    3 and 4 leaves a record that is handled with the next one, or at the client's end; none comes between 3 and its
    own counting, as Python looks for signals where something was called, or jumps back, and nowhere else.

What is spared of step 1
    ACKNOWLEDGED lies in a line that the store writes for each record, and only grows.  So a client that has seen how much is
    handled need not look again before it has written so many records that, with no more of them handled, there would be something to do.
    Where it has told the store so in step 4, or found it reading that far behind, that is when the ring may be full.

A client that ends
    closes its connection, and so tells a store that lives.  Of one that has died nobody would tell its successor, which waits for
    its clients for as long as their processes live.  So the last record of each client says that nothing of it is left, and one before it that it
    leaves, if no store has answered that; places of the ring are kept for them, as nobody waits for the store any more.  The last one is not
    acknowledged: a store that dies before it has taken back what the client had leaves it to be read again.

When the message is spared
    An object that is not sealed is of no use to others, and whoever looks for one under its id sees that a record is unread (`shmplasma.absence`,
    `shmplasma.claims`); so of its creation, and when that was, the store hears with the seal.
    A store that has just read a record will read the next ones within a millisecond, unasked, and says so in
    the header's POLLED word; clients then send a message only when so many records wait that the store may sleep too
    long for the ring.  Before it goes to sleep for longer, the store clears POLLED, issues a barrier and
    reads all outboxes once more: a record written before the barrier is seen by this reading; the client of
    one after it sees POLLED cleared, and sends.  The client's write of the record and its look at POLLED may
    pass each other in its CPU; the barrier forbids that, as it does for pins (see `shmplasma.pins`).  While
    somebody waits for an object, or for room, or is to be told of each, the store does not poll; nor does it
    for a while after somebody has missed what was in an outbox and woken the store for that (`shmplasma.settling`).
    A store that dies polling leaves POLLED set; its successor clears it, and issues a
    barrier, before its first reading.  POLLED is the number of the store that has set it, counted from 1, and a client is silent only to
    the one that it is connected to: its first word to a successor is a message, by which it notices.

A record is the client's to write at any time, as a message is; so it is copied before it is looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct
from typing import Final

from shmplasma.layout import CONTROL_BYTES, OUTBOX_BYTES, ControlWord, HeaderWord, Layout

__all__ = [
    "ANNOUNCED_AT",
    "MISSED",
    "PLACES",
    "RECORDS",
    "RECORD_BYTES",
    "Outbox",
    "Polling",
    "is_written",
    "read_record",
    "unread",
]

RECORD_BYTES: Final = 64
RECORDS: Final = OUTBOX_BYTES // RECORD_BYTES
ANNOUNCED_AT: Final = RECORDS // 2
"""How many records may wait for a store that looks by itself before a message wakes it."""
PLACES: Final = RECORDS - 2
"""For all that a client writes but its last two records: that it leaves, and that nothing of it is left."""
_FRUITLESS: Final = 2
"""How often a store looks in vain before it has itself be told."""
MISSED: Final = b"m"
"""What is written into the store's wake-up pipe by who misses what may be in an outbox."""
_MASK: Final = RECORDS - 1
_ATTEMPTS: Final = 4
"""How often it is looked for the end of what is written: the store may read meanwhile, some microseconds a record."""
_INCARNATIONS: Final = 1 << 32
_CONTENT: Final = Struct("@HH52s")
_RECORD: Final = Struct("@QHH52s")
_WORDS: Final = RECORD_BYTES // 8


class Outbox:
    """The client's end.

    Parameters
    ----------
    page : memoryview
        The client's outbox as native 8-byte words, writable.
    acknowledged : memoryview
        The one word in which the store counts.
    polled : memoryview
        The header's POLLED word; where barriers do not reach this process, one that is always 0.
    incarnation : memoryview
        The header's INCARNATION word.

    Attributes
    ----------
    raw : memoryview
        The outbox as bytes.
    written : int
        How many records were written.

    Notes
    -----
    Not thread-safe (see `shmplasma.shared_outbox`).
    """

    __slots__ = (
        "_acknowledged",
        "_incarnation",
        "_look_at",
        "_polled",
        "_store",
        "_words",
        "raw",
        "written",
    )

    def __init__(
        self,
        page: memoryview,
        acknowledged: memoryview,
        polled: memoryview,
        incarnation: memoryview,
    ) -> None:
        self._words = page
        self.raw = page.cast("B")
        self._acknowledged = acknowledged
        self._polled = polled
        self._incarnation = incarnation
        self.written = int(acknowledged[0])
        self._look_at = self.written + ANNOUNCED_AT - 1
        self.connected()

    def connected(self) -> None:
        """Take note that the store of now is the one that this client is connected to."""
        self._store = self._incarnation[0] % _INCARNATIONS + 1

    def append(
        self, kind: int, body: bytes, *, is_urgent: bool = True, is_last: bool = False
    ) -> int:
        """Write a record.

        Parameters
        ----------
        kind, body
            What.
        is_urgent : bool, optional
            Whether the store is to be told of it before it is told of the next one.
        is_last : bool, optional
            Whether it may have a place that is kept for the last ones.

        Returns
        -------
        int
            How many there are with this one; below 0 if the store is to be told that there is one, and 0 if it was not written: the ring is
            full, and the store has to handle something first.
        """
        count, lags = self.written, False
        if count >= self._look_at:
            unread = self._look()
            if unread >= (RECORDS if is_last else PLACES):
                return 0
            lags = unread == ANNOUNCED_AT - 1
        at = (count & _MASK) * _WORDS
        _CONTENT.pack_into(self.raw, at * 8 + 8, kind, len(body), body)
        self._words[at] = self.written = count = count + 1
        return -count if lags or (is_urgent and self._polled[0] != self._store) else count

    def _look(self) -> int:
        """Return how many records wait for the store, and see when that is to be asked again: where the store is to be told, or the ring may be full."""
        handled = self._acknowledged[0]
        unread = self.written - handled
        self._look_at = handled + (PLACES if unread >= ANNOUNCED_AT - 1 else ANNOUNCED_AT - 1)
        return unread

    def has(self, kind: int, body: bytes, since: int) -> bool:
        """Tell whether such a record was written after so many others; not if others have been written over it."""
        return (kind, body) in (read_record(self.raw, each) for each in range(since, self.written))

    @property
    def read(self) -> int:
        """How many of them the store has handled."""
        return int(self._acknowledged[0])


class Polling:
    """The store's end of POLLED: whether it looks by itself.

    Parameters
    ----------
    words : memoryview
        The segment as native 8-byte words, writable.
    barrier : callable
        Makes every client's CPU pass a full memory barrier.
    possible : bool
        Whether there is such a barrier; else every record is announced.
    """

    __slots__ = ("_barrier", "_fruitless", "_number", "_possible", "_words", "is_on")

    def __init__(self, words: memoryview, barrier: Callable[[], None], *, possible: bool) -> None:
        self._words = words
        self._barrier = barrier
        self._possible = possible
        self._fruitless = 0
        self.is_on = False
        self._number = words[HeaderWord.INCARNATION] % _INCARNATIONS + 1

    def succeed(self) -> None:
        """Take over from a store that has died: no client is silent to this one before it has come back."""
        self._words[HeaderWord.INCARNATION] = self._number
        self._number = self._number % _INCARNATIONS + 1
        self.stop()

    def found(self, count: int) -> None:
        """Take note of how many records a look has found; after too many in vain, `stop` is due."""
        self._fruitless = 0 if count else self._fruitless + 1

    @property
    def is_fruitless(self) -> bool:
        """Whether there is nothing to be had by looking any more."""
        return self._fruitless >= _FRUITLESS

    def start(self) -> None:
        """Let clients be silent: all outboxes will be read soon, again and again, until `stop`."""
        self._fruitless = 0
        if self._possible and not self.is_on:
            self.is_on = True
            self._words[HeaderWord.POLLED] = self._number

    def stop(self) -> None:
        """Have clients announce their records again; all outboxes are to be read after this."""
        self.is_on = False
        self._words[HeaderWord.POLLED] = 0
        self._barrier()


def is_written(words: memoryview, start: int, acknowledged: int) -> bool:
    """Tell whether there is a next record in the outbox that begins at byte `start` of the segment.

    `words` is the segment as native 8-byte words.
    """
    return bool(words[(start >> 3) + (acknowledged & _MASK) * _WORDS] == acknowledged + 1)


def unread(words: memoryview, layout: Layout, n_boards: int) -> list[tuple[int, int]] | None:
    """Return what the store has to read in the outboxes of the first boards so that it has read all that is written there now.

    `words` is the segment as native 8-byte words.  `shmplasma.absence` has the argument.

    Returns
    -------
    list of (int, int), or None
        A word of the segment, and what it has to say at least, for each outbox in which something is unread; None if that cannot be seen.
    """
    count = layout.control // 8 + ControlWord.ACKNOWLEDGED
    outbox = layout.outboxes // 8
    found = []
    for _ in range(n_boards):
        read = words[count]
        if words[outbox + (read & _MASK) * _WORDS] == read + 1 or words[count] != read:
            end = _end(words, count, outbox)
            if end < 0:
                return None
            found.append((count, end))
        count += CONTROL_BYTES // 8
        outbox += OUTBOX_BYTES // 8
    return found


def _end(words: memoryview, count: int, outbox: int) -> int:
    """Return how many records were ever written to an outbox, by its count and its first word; -1 if that cannot be seen."""
    for _ in range(_ATTEMPTS):
        end = words[count]
        while words[outbox + (end & _MASK) * _WORDS] == end + 1:
            end += 1
        # If it was read, its place may have been written again before this has looked there.
        if words[count] <= end:
            return int(end)
    return -1


def read_record(raw: memoryview, acknowledged: int, start: int = 0) -> tuple[int, bytes] | None:
    """Return kind and body of the next record, or None when there is none.

    Parameters
    ----------
    raw : memoryview
        Bytes, with an outbox in them.
    acknowledged : int
        How many records were handled.
    start : int, optional
        Where the outbox begins.

    Examples
    --------
    >>> page, zero = memoryview(bytearray(OUTBOX_BYTES)), memoryview(bytearray(8)).cast("Q")
    >>> Outbox(page.cast("Q"), zero, zero, zero).append(5, b"body")
    -1
    >>> read_record(page, 0)
    (5, b'body')
    >>> read_record(page, 1)
    """
    at = start + (acknowledged & _MASK) * RECORD_BYTES
    number, kind, length, body = _RECORD.unpack_from(raw, at)
    if number != acknowledged + 1:
        return None
    return kind, body[:length]
