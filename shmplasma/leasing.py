"""The client's side of a lease: room to put objects without waiting (`shmplasma.leases` has the argument).

The order of the steps is that of the table there: BUSY, EPOCH, room, fill, publish, BUSY off.  One thread at
a time is between the first and the last; another one that wants to put meanwhile goes by the store, as does
whoever finds no room.  So do finalizers that put something while their own thread is at it.

Who is at it has the one token out of its list.  `del` takes it or fails, at once, in a fifth of the time that a lock takes so; and no interrupt comes
between that and the next instructions, as Python looks for signals where something was called, or jumps back, and nowhere else.  Another item always stays,
as a list that gets empty gives its memory back, and the token could not be put back where there is none.  Whoever has it puts it back in a ``finally`` of his
own, not by a function, before the first line of which an interrupt may come.

Most puts are of small values under fresh ids, which come to one `bytes`.  `put_bytes` does for these what `put` does for any object, in one piece: it
repeats the steps, as each call of a function would take a tenth of the time.

An interrupt leaves a hole at worst: room is taken before it is filled, and the store skips what was not published.

Whoever uses a lease up asks for the next one and does not wait: the store ends the one, as its client has done, and grants the other, while
the client goes on with something else.  A lease that has come like this is one in which nothing was put yet: it may have been recalled, which
EPOCH says.  Its pages are mapped granule by granule, 60 us each, where a whole lease would take 1 ms; each by the put before the first that
needs it, when it has told of its object, so that nobody waits for an object while pages are mapped.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Final

from shmplasma.attachment import Attachment
from shmplasma.layout import ALIGNMENT, CONTROL_BYTES, ControlWord, align_up
from shmplasma.leases import BUSY_WORD, largest_object
from shmplasma.link import Link
from shmplasma.payloads import Payload
from shmplasma.replies import Leased
from shmplasma.requests import AskLease
from shmplasma.shared_outbox import SharedOutbox

__all__ = ["LARGE_BYTES", "MAX_OBJECT_BYTES", "LeaseWriter", "fill"]

MAX_OBJECT_BYTES: Final = 1 << 24
"""Larger objects are created by a round trip, of which the copy takes some: between two copies, which empty the caches of both
processes, it takes 0.3 ms, where a copy of 8 MiB takes 0.4 and one of 64 MiB 5."""
LARGE_BYTES: Final = 1 << 18
"""From about here on the copy takes as long as a round trip.  So larger objects are created by one, and nothing is leased
for them that may not be used, until a client has put some."""

_LARGE_BEFORE_A_LEASE: Final = 4
"""How many large objects a client has created by a round trip before it leases room for as many."""

_PUTS_AFTER_REFUSAL: Final = 64
"""How many puts go by the store before a client asks again for a lease that it did not get."""

_ROUND_UP: Final = ALIGNMENT - 1


class LeaseWriter:
    """Puts objects into a lease.

    Parameters
    ----------
    attachment : Attachment
        The segment.
    board : int
        The client's first board.
    link : Link
        To the store.
    outbox : SharedOutbox
        The client's.
    populate : callable
        ``populate(offset, size_bytes)`` has pages mapped before they are filled.

    Attributes
    ----------
    board : memoryview
        The client's first board; BUSY is in it.
    token : list
        Has one item fewer while somebody is at it.

    Notes
    -----
    Thread-safe: whoever comes while another thread has entered has to go by the store.
    """

    def __init__(
        self,
        attachment: Attachment,
        board: int,
        link: Link,
        outbox: SharedOutbox,
        populate: Callable[[int, int], None],
    ) -> None:
        layout = attachment.layout
        self.board = attachment.board(board)
        self._words = attachment.words
        self._epoch_word = (layout.control + board * CONTROL_BYTES) // 8 + ControlWord.EPOCH
        self._link = link
        self._outbox = outbox
        self._awaited: list[Callable[[], Leased | None]] = []
        self._populate = populate
        self.token: list[None] = [None, None]
        self._memory = memoryview(attachment.write_map)
        self._data = layout.data
        self._epoch = -1
        self._granule = layout.granule_bytes
        self._cursor = self._end = self._mapped = self._objects = self._pause = 0
        self._large_created = 0
        self._largest = min(MAX_OBJECT_BYTES, largest_object(layout.capacity))

    def put(
        self,
        object_id: bytes,
        payload: Payload,
        metadata: bytes | bytearray,
        threads: int,
        codec: int,
        keep: bool,
    ) -> bool:
        """Put an object under a fresh id.

        Parameters
        ----------
        object_id : bytes
            Nobody else has it.
        payload : Payload
            Its data.
        metadata : bytes or bytearray
            Kept beside it.
        threads : int
            As for `Payload.fill`.
        codec : int
            How to read it.
        keep : bool
            Whether it is never to be evicted.

        Returns
        -------
        bool
            False when the object must go by the store.

        Notes
        -----
        An interrupt ends the put and leaves neither the token away nor BUSY behind; whether the object is put is not known.
        """
        data_size, size = payload.size_bytes, payload.size_bytes + len(metadata)
        entered = [False]
        try:
            offset = self.enter(entered, size)
            if offset < 0:
                return False
            fill(self.take(size), payload, metadata, threads)
            self._link.publish((object_id, offset, data_size, len(metadata), codec, keep))
            self.look_ahead(size)
            return True
        finally:
            if entered[0]:
                self.board[BUSY_WORD] = 0
                self.token.append(None)

    def enter(self, entered: list[bool], size_bytes: int) -> int:
        """Be busy with a lease that has room for an object, and return where that begins; -1 if the object must go by the store.

        `entered` is ``[False]``, and True if BUSY is to be 0 again, and the token to be put back, whatever comes of it, an interrupt included.
        """
        if size_bytes > LARGE_BYTES:
            if size_bytes > self._largest:
                return -1
            if self._large_created < _LARGE_BEFORE_A_LEASE:
                self._large_created += 1
                return -1
        if not self.hold(entered):
            return -1
        self.board[BUSY_WORD] = 1
        if (
            self._words[self._epoch_word] == self._epoch
            and self._cursor + size_bytes <= self._mapped
            and self._objects
        ) or self._prepare(size_bytes):
            return self._cursor
        return -1

    def hold(self, entered: list[bool]) -> bool:
        """Keep other threads out, unless one is in; tell whether that was so.  Otherwise as `enter`."""
        try:
            del self.token[1]
        except IndexError:
            return False
        entered[0] = True
        return True

    def take(self, size_bytes: int) -> memoryview:
        """Take the room that `enter` has found, and return it."""
        start = self._cursor - self._data
        self._cursor = (self._cursor + size_bytes + _ROUND_UP) & -ALIGNMENT
        self._objects -= 1
        return self._memory[start : start + size_bytes]

    def look_ahead(self, size_bytes: int) -> None:
        """See to room for another object like the last one, if that has none; to be called when the last one is announced."""
        if self._cursor + size_bytes > self._mapped or not self._objects:
            self._make_ready(size_bytes)

    def put_bytes(self, object_id: bytes, data: bytes, codec: int, keep: bool) -> bool:
        """Put up to `LARGE_BYTES` without metadata; otherwise as `put`."""
        size_bytes, board = len(data), self.board
        try:
            del self.token[1]
        except IndexError:
            return False
        try:
            board[BUSY_WORD] = 1
            offset = self._cursor
            end = offset + size_bytes
            if (
                self._words[self._epoch_word] != self._epoch
                or end > self._mapped
                or not self._objects
            ):
                if not self._prepare(size_bytes):
                    return False
                offset = self._cursor
                end = offset + size_bytes
            cursor = self._cursor = (end + _ROUND_UP) & -ALIGNMENT
            self._objects -= 1
            start = self._data
            self._memory[offset - start : end - start] = data
            count = self._outbox.publish(object_id, offset, size_bytes, 0, codec, keep)
            if count < 0:
                self._link.announce()
            elif not count:  # the store is asked to read some
                self._link.publish((object_id, offset, size_bytes, 0, codec, keep))
            if cursor + size_bytes > self._mapped or not self._objects:
                self._make_ready(size_bytes)
            return True
        finally:
            board[BUSY_WORD] = 0
            self.token.append(None)

    def _prepare(self, size_bytes: int) -> bool:
        """Have a lease with room for an object, whose pages are mapped; tell whether there is one."""
        if (
            self._words[self._epoch_word] != self._epoch
            or self._cursor + size_bytes > self._end
            or not self._objects
        ) and not self._renew(size_bytes):
            return False
        if self._cursor + size_bytes > self._mapped:
            self._map(self._cursor, size_bytes)
        return True

    def _map(self, offset: int, size_bytes: int) -> None:
        """Have the pages of an object mapped, and those of the rest of its last granule."""
        self._populate(offset, size_bytes)
        end = align_up(offset + size_bytes - self._data, self._granule)
        self._mapped = min(self._data + end, self._end)

    def _drop(self) -> None:
        """Put nothing into the lease any more, and let the store have it, which may wait for that."""
        self._cursor = self._end = self._mapped = self._objects = 0
        self.board[BUSY_WORD] = 0

    def isolate(self) -> None:
        """Put nothing into what was leased or asked for so far: in a forked child, where it is its parent's."""
        self._awaited.clear()
        self._drop()

    def _make_ready(self, size_bytes: int) -> None:
        """Have the next pages mapped for another object like the last one, or ask for the next lease if this one has no room."""
        if self._objects and self._cursor + size_bytes <= self._end:
            with suppress(OSError):  # the last one is put; whoever needs the pages tries again
                self._map(self._cursor, size_bytes)
        else:
            self._drop()
            self._link.begin(AskLease(size_bytes, ahead=True), Leased, self._awaited)

    def _get(self, size_bytes: int) -> Leased:
        """Return the lease that was asked for, if it has room for an object; else ask for another one."""
        if self._awaited:
            lease = self._awaited[0]()  # an interrupt leaves it to the next put
            self._awaited.clear()
            if lease is not None and lease.size_bytes >= size_bytes:
                return lease
        return self._link.call(AskLease(size_bytes), Leased)

    def _renew(self, size_bytes: int) -> bool:
        """Get a lease with room for an object, and be busy with it; tell whether there is one."""
        self._drop()
        large = size_bytes > LARGE_BYTES
        if self._pause and not large:
            self._pause -= 1
            return False
        lease = self._get(size_bytes)
        if not lease.size_bytes:
            if large:
                self._large_created = -_PUTS_AFTER_REFUSAL
            else:
                self._pause = _PUTS_AFTER_REFUSAL
            return False
        self._cursor, self._end = lease.offset, lease.offset + lease.size_bytes
        self._objects, self._epoch = lease.objects, lease.epoch
        self.board[BUSY_WORD] = 1
        # It may have been recalled since it was granted, and its memory be given back by now.
        return bool(self._words[self._epoch_word] == self._epoch)


def fill(room: memoryview, payload: Payload, metadata: bytes | bytearray, threads: int) -> None:
    """Fill the room of an object: data, then metadata."""
    if metadata:
        room[payload.size_bytes :] = metadata
        room = room[: payload.size_bytes]
    payload.fill(room, threads)
