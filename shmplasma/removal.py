"""Deleting without waiting: a mark says that an object is deleted, and a record has the store take it away.

To delete is to make sure that nobody finds the object any more.  A reader finds it by its state word, which only the store may write, so he looks at one
word more, of which each client may write any: the *mark* of the entry.

Theory of operation
-------------------
==========================================================  =====================================================
client that deletes                                         reader, without a message (`shmplasma.reader`)
==========================================================  =====================================================
D1. w = state[e], of the object's id; not SEALED: ask       R1. w = state[e]; not SEALED: ask
D2. time of creation of e                                   R2. id, offset, sizes of e
D3. slot = e + 1                                            R3. slot = e + 1
D4. state[e] == w?  no: slot = 0, ask                       R4. state[e] == w?  no: ask
D5. mark[e] == w?  yes: slot = 0, done                      R5. mark[e] == w?  yes: ask
D6. record n, `Remove`, to its outbox                           (a `contains` has no R3, and R5 before R4)
D7. mark[e] = w
D8. slot = 0
D9. `Post`, if it is to be announced
==========================================================  =====================================================

The store deletes an object for its record, or earlier, if it is asked for one that is marked (`shmplasma.lifecycle`).  Whatever is not as expected
is asked for, by a request that waits for the store.

*Whoever is told finds nothing.*  Who begins to look after D7 was visible, which it is to everybody whom the client tells when it has returned,
reads the mark at R5.  It is w: only who holds the object by D3 and D4 writes there, and as long as he does, by the argument of
`shmplasma.pins`, the entry has this object and no other; so nobody overwrites the mark of an object by that of one which was there before.  And if
another object has taken the entry since, then R4 fails, or R1 has read that object's word.  So either R5 sees the mark, or the object
has gone.  Asked, the store sees the mark as well, after D7 as the reader did, before it says that the object is there.

*Nothing else is deleted.*  Each (generation, state) is of one object (`shmplasma.table`), so a mark says nothing of what comes after it in the entry.
A time of creation belongs to one object of an id, and moves with it.  So whatever is done late, or twice, nobody's new object
under the same id goes with the old one: not after an interrupt, nor by the successor of a store that has died half way.

*What was put before is deleted.*  An object that is found SEALED is the last that was put under its id: who puts another while it can be found
asks the store, which reads his outbox first.  One that is not found, or is not SEALED, may be about to be: then
nothing is to be done only if the store had read all that was put (A1 of `shmplasma.absence`) before that was seen; else the store is asked.

*A mark is kept.*  It lies in the segment, as the record does.  A store that moves the object to the next generation moves its mark first, while nobody
pins it, hence nobody else writes there (`Table.relocate`).  A successor takes a marked object for a doomed one (`shmplasma.recovery`), so a record that
was read while a move hid its object need not be read again.

*A mark has its record.*  D6 comes before D7, and x86-64 keeps the order of stores; so who sees a mark knows that the store will read, or has read, that the
object is deleted, and D5 has nothing to do.  A client that dies, or is interrupted, before D7 has not returned: its record is carried out
soon.  One that dies before D8 leaves its pin to its end.

*Nothing goes for a mark that somebody makes up* but what he could have deleted anyway.

*Room comes back soon, not at once.*  Before it evicts anything for an object or a lease, and before it refuses one, the store reads all outboxes; so
no object has to go because one that was deleted before is still there.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Final

from shmplasma.absence import Absence
from shmplasma.layout import EntryState
from shmplasma.link import Link
from shmplasma.pinning import Pin
from shmplasma.posted import REMOVE, Remove
from shmplasma.reader import FastReader, Held
from shmplasma.settling import Settling

__all__ = ["Removal"]

_REMOVE: Final = Remove.KIND
_FEW: Final = 24
"""More than these go by one message.  Measured, in us: 16 objects 213 by records and 395 by a message, 32 of them 396 and 296."""
_NOTHING_TO_DELETE: Final = (
    -1,
    int(EntryState.FREE),
    int(EntryState.CREATED),
    int(EntryState.DOOMED),
)
"""What an object is that is in no chain (`absence.NOWHERE`), not sealed, or deleted already."""


class Removal:
    """Deletes objects as far as that takes no request.

    Parameters
    ----------
    link : Link
        By which the store is told.
    absence : Absence
        Sees what there is not.
    settling : Settling
        Has the store read what was put.
    reader : FastReader
        Finds and holds what there is.
    marks : memoryview
        The marks region, writable, as native 8-byte words.

    Notes
    -----
    Thread-safe.
    """

    __slots__ = ("_absence", "_link", "_marks", "_reader", "_settling")

    def __init__(
        self,
        link: Link,
        absence: Absence,
        settling: Settling,
        reader: FastReader,
        marks: memoryview,
    ) -> None:
        self._link = link
        self._absence = absence
        self._settling = settling
        self._reader = reader
        self._marks = marks

    def delete(self, object_ids: Sequence[bytes]) -> Sequence[bytes]:
        """Delete sealed objects; return those which the store is to be asked to delete.

        Raises
        ------
        NotConnectedError
            The store has gone.
        RuntimeError
            A call of this thread was interrupted while it wrote a record.
        """
        # Inside another call to ask is refused, whatever is there and whatever the store does meanwhile.
        if len(object_ids) > _FEW or self._link.channel.is_entered:
            return object_ids
        held = [self._reader.hold(object_id) for object_id in object_ids]
        rest: Sequence[bytes] = ()
        if None in held:
            settled = self._settling.settle(once=True)  # before a record of this client is unread
            if settled:
                pairs = zip(object_ids, held, strict=True)
                held = [each or self._reader.hold(object_id) for object_id, each in pairs]
            pairs = zip(object_ids, held, strict=True)
            rest = [object_id for object_id, each in pairs if each is None]
            if settled is not None and self._is_nothing(rest):
                rest = ()
        try:
            for object_id in object_ids:
                self._delete(object_id, held.pop(0))
        except BaseException:
            with suppress(ConnectionError):
                self._link.channel.announce()
            raise
        return rest

    def _delete(self, object_id: bytes, held: Held | None) -> None:
        """Delete what is held, unless it is deleted."""
        if held is not None:
            entry, word, created_ns, pin = held
            if self._marks[entry] != word:
                del held
                held_by = [pin]
                del pin
                body = REMOVE.pack(object_id, created_ns)
                self._link.post(_REMOVE, body, partial(self._mark, entry, word, held_by))

    def _mark(self, entry: int, word: int, held_by: list[Pin], _: int) -> None:
        """Mark an object that is held, and let go of it; its record is written."""
        self._marks[entry] = word
        held_by.clear()

    def _is_nothing(self, object_ids: Sequence[bytes]) -> bool:
        """Tell whether none of these is a sealed object, after `Settling.settle`."""
        seen = map(self._absence.look_up, object_ids)
        return (
            all(each is not None and each[0] in _NOTHING_TO_DELETE for each in seen)
            and self._link.channel.is_quiet
        )
