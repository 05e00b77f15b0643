"""Deleting few objects without a message, while the store looks into the outboxes anyway.

To delete is to wait: when it returns, nobody finds the object any more.  A request and its reply cost each side two system calls and what
goes with them; a record of the outbox and a look at ACKNOWLEDGED cost neither any.

Theory of operation
-------------------
========================================================  =======================================================
client                                                    store
========================================================  =======================================================
D1. have all outboxes been read (A1 of                    G1. reads record n: a sealed object of this id and time
    `shmplasma.absence`)?  no: `Delete`                       of creation is DOOMED
D2. the object's state, and when it was created:          G2. ACKNOWLEDGED = n
    not sealed, or gone: nothing is to be done            G3. barrier, pins, and the object goes or stays DOOMED
D3. record n, `Remove`, to its outbox
D4. LOOKING is not its store's number: `Post`
D5. ACKNOWLEDGED is n or more?  looks for so long as
    to wake somebody takes; then asks `Flush`
D6. is this object still there, sealed?  asks `Remove`
========================================================  =======================================================

*What was put before is deleted.*  It was read at D1, so it is in the table at D2, or has gone.  That is why the store reads no other
outbox before it carries out a `Remove`, as it does for a `Delete`.

*Nothing else is.*  A time of creation belongs to one object of an id (`shmplasma.table`), and moves with it.  So whatever is done late, or twice, or
asked for once more, nobody's new object under the same id goes with the old one: not after an interrupt, nor by the successor of a store that
has died between G1 and G2, nor at D6.

*Whoever is told finds nothing.*  The store writes DOOMED before ACKNOWLEDGED, and x86-64 keeps the order of stores, and that of loads.
So who sees ACKNOWLEDGED, and whom he tells, sees DOOMED, or what came after it, and asks the store; that does G3 before anything else.
G3 is the take of `shmplasma.pins`, with DOOMED for T1.

*What the store leaves is seen.*  A record is answered by nothing but ACKNOWLEDGED, and an object that is hidden by a move is left alone.  So the client
looks again at D6, and asks for what is there, or cannot be seen, by a request that waits as long as the move takes.

*Nobody waits for a store that sleeps.*  LOOKING says that the store reads the outboxes again within some microseconds; it is cleared before the
store sleeps, with no barrier, so a record may be written that it does not see.  Then D5 ends with a request, before which the store reads
the record.  A store that has died leaves LOOKING set, which costs as much; its successor has another number.

*An interrupt*, or an error, before D5 has ended leaves a record that will be carried out, and a `Post` says that it is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from shmplasma.absence import Absence
from shmplasma.layout import EntryState
from shmplasma.link import Link
from shmplasma.posted import Remove
from shmplasma.replies import Done

__all__ = ["Removal"]

_REMOVE: Final = Remove.KIND
_FEW: Final = 8
"""More than these go by one message, which takes less time than their records."""
_IS_THERE: Final = (int(EntryState.SEALED), int(EntryState.MOVING), int(EntryState.SPILLED))
_IN_BETWEEN: Final = int(EntryState.EVICTING)
"""It is about to go, or was found pinned and stays."""


class Removal:
    """Deletes objects as far as that takes no request.

    Parameters
    ----------
    link : Link
        By which the store is told.
    absence : Absence
        Sees what there is, and what the store has done.

    Notes
    -----
    Thread-safe.
    """

    __slots__ = ("_absence", "_link")

    def __init__(self, link: Link, absence: Absence) -> None:
        self._link = link
        self._absence = absence

    def delete(self, object_ids: Sequence[bytes]) -> bool:
        """Delete sealed objects; False means: have the store asked for it.

        Raises
        ------
        NotConnectedError
            The store has gone.
        """
        link, absence = self._link, self._absence
        if not 0 < len(object_ids) <= _FEW or not link.may_look or not absence.are_read:
            return False
        # Inside another call to ask is refused, whatever the store does meanwhile.
        if link.channel.is_entered:
            return False
        removals: list[Remove] = []
        for object_id in object_ids:
            seen = absence.look_up(object_id)
            if seen is None or seen[0] == _IN_BETWEEN:
                return False
            if seen[0] in _IS_THERE:
                removals.append(Remove(object_id, seen[1]))
        if not removals:
            return link.channel.is_quiet
        link.post_and_wait(_REMOVE, [removal.encode() for removal in removals])
        for removal in removals:
            seen = absence.look_up(removal.object_id)
            is_in_doubt = seen is None or seen[0] in _IS_THERE or seen[0] == _IN_BETWEEN
            if is_in_doubt and (seen is None or seen[1] == removal.created_ns):
                link.call(removal, Done)
        return True
