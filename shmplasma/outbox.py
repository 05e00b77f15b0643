"""Outboxes: what clients tell the store without asking, kept where the death of a store does not reach.

A put, a seal or an abort is one record in the client's outbox, a ring of `RECORDS` records in the segment, and
one empty message which says that there is something in it.  Messages that a store has not read die with it;
records stay.  A store that recovers the segment handles all that was not acknowledged.

::

    client                                              store, at a message, a recovery, or the client's end
    1. record n is handled (n < ACKNOWLEDGED + RECORDS)  1. a = ACKNOWLEDGED
    2. write kind, length and body to place n % RECORDS  2. number at place a % RECORDS is a + 1?  no: done
    3. write number n + 1 there                          3. copy the record, carry it out
    4. send the message                                  4. ACKNOWLEDGED = a + 1, and again

Why nothing is lost, and nothing done twice
    x86-64 keeps the order of stores, and what a killed process has stored stays in the segment; so a record
    whose number is there is whole.  A store that dies between 3 and 4 leaves a record that was carried out:
    its successor sees that by the record itself (see `shmplasma.recovery`).  An interrupt between a client's
    3 and 4 leaves a record that is handled with the next one, or at the client's end; one between 3 and its
    own counting is noticed at the next `append`, which finds the number there already.

A record is the client's to write at any time, as a message is; so it is copied before it is looked at.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from shmplasma.layout import OUTBOX_BYTES

__all__ = ["RECORDS", "Outbox", "read_record"]

_RECORD_BYTES: Final = 64
RECORDS: Final = OUTBOX_BYTES // _RECORD_BYTES
_MASK: Final = RECORDS - 1
_CONTENT: Final = Struct("@HH52s")
_RECORD: Final = Struct("@QHH52s")
_WORDS: Final = _RECORD_BYTES // 8


class Outbox:
    """The client's end.

    Parameters
    ----------
    page : memoryview
        The client's outbox as native 8-byte words, writable.
    acknowledged : memoryview
        The one word in which the store counts.

    Notes
    -----
    Not thread-safe: the caller holds a lock.
    """

    __slots__ = ("_acknowledged", "_count", "_raw", "_words")

    def __init__(self, page: memoryview, acknowledged: memoryview) -> None:
        self._words = page
        self._raw = page.cast("B")
        self._acknowledged = acknowledged
        self._count = int(acknowledged[0])

    def append(self, kind: int, body: bytes) -> bool:
        """Write a record; False when the ring is full and the store must handle something first."""
        count = self._count
        at = (count & _MASK) * _WORDS
        if self._words[at] == count + 1:  # an interrupt came before it was counted
            count = self._count = count + 1
            at = (count & _MASK) * _WORDS
        if count - self._acknowledged[0] >= RECORDS:
            return False
        _CONTENT.pack_into(self._raw, at * 8 + 8, kind, len(body), body)
        self._words[at] = count + 1
        self._count = count + 1
        return True


def read_record(page: memoryview, acknowledged: int) -> tuple[int, bytes] | None:
    """Return kind and body of the next record, or None when there is none.

    Parameters
    ----------
    page : memoryview
        The bytes of an outbox.
    acknowledged : int
        How many records were handled.

    Examples
    --------
    >>> page, counter = memoryview(bytearray(OUTBOX_BYTES)), memoryview(bytearray(8)).cast("Q")
    >>> Outbox(page.cast("Q"), counter).append(5, b"body")
    True
    >>> read_record(page, 0)
    (5, b'body')
    >>> read_record(page, 1)
    """
    number, kind, length, body = _RECORD.unpack_from(page, (acknowledged & _MASK) * _RECORD_BYTES)
    if number != acknowledged + 1:
        return None
    return kind, body[:length]
