"""Deleting sealed objects in two steps, so that who deletes does not wait for what follows.  Pure.

Invariants
----------
* A deletion begins by making the object DOOMED: nobody finds it any more who does not ask the store.  That may be answered.
* It ends by a take (`shmplasma.pins`): what nobody pins goes, and the rest waits for its last release (`shmplasma.releases`).
* What a move hides is deleted when it can be seen again.  It is marked (`shmplasma.removal`), so a successor of this store knows of it.
* Between the two nothing else is done but to begin more deletions, and to grant a lease that was asked for ahead, if nothing has to go for it
  (`shmplasma.dispatch.Dispatch.goes_first`): its client has put, deletes and puts again, and is not to wait for the barrier, which takes 5 to 70 us.
  A store that dies there leaves DOOMED objects, as one does that waits for their releases, and its successor ends what it has begun.
"""

from __future__ import annotations

from collections.abc import Iterable

from shmplasma.layout import EntryState
from shmplasma.lifecycle import Lifecycle
from shmplasma.mover import Mover
from shmplasma.posted import Remove
from shmplasma.table import NO_ENTRY, Table

__all__ = ["Deletions"]


class Deletions:
    """Deletes objects.

    Parameters
    ----------
    table, objects, mover
        The parts of the store that it joins.

    Attributes
    ----------
    begun : set of int
        The entries for which `end` is due; the same set for as long as this lives.
    """

    def __init__(self, table: Table, objects: Lifecycle, mover: Mover) -> None:
        self._table = table
        self._objects = objects
        self._mover = mover
        self._hidden: list[Remove] = []
        self.begun: set[int] = set()

    def delete(self, object_ids: Iterable[bytes]) -> None:
        """Delete sealed objects: at once where nobody pins them, else at their last release."""
        self.begin(object_ids)
        self.end()

    def begin(self, object_ids: Iterable[bytes]) -> None:
        """Delete sealed objects as far as others can see; `end` is to follow."""
        for object_id in object_ids:
            entry = self._table.find(object_id)
            if entry != NO_ENTRY:
                self._begin(entry, object_id)

    def begin_one(self, message: Remove) -> None:
        """Do so with an object if it is still the one that its client has seen; with one that is hidden by a move, after that."""
        object_id, created_ns = message
        entry = self._table.find(object_id)
        if entry != NO_ENTRY and self._table.created_ns(entry) == created_ns:
            if entry == self._mover.hidden:
                self._hidden.append(message)
            else:
                self._begin(entry, object_id)

    def look_again(self) -> None:
        """Delete what was hidden by a move, and is not any more."""
        if self._hidden and self._mover.hidden == NO_ENTRY:
            messages, self._hidden = self._hidden, []
            for message in messages:
                self.begin_one(message)
            self.end()

    def _begin(self, entry: int, object_id: bytes) -> None:
        begun, table, objects = self.begun, self._table, self._objects
        if table.state(entry) == EntryState.SEALED:  # nearly always
            table.set_state(entry, EntryState.DOOMED)
            begun.add(entry)
        elif entry in begun:
            return
        elif (entry := objects.find_sealed(object_id)) != NO_ENTRY:
            table.set_state(entry, EntryState.DOOMED)
            begun.add(entry)
        elif (entry := objects.find_spilled(object_id)) != NO_ENTRY:
            objects.drop(entry)

    def end(self) -> None:
        """Give back what was deleted, where nobody pins it, and wait for the last release of the rest."""
        if self.begun:
            entries = set(self.begun)
            self.begun.clear()
            releases = self._objects.releases
            releases.take(entries)
            if entries:
                releases.doom(entries)

    def check(self) -> None:
        """Prove that nothing is half done."""
        assert not self.begun, "what was deleted has not gone"
        assert self._mover.is_busy or not self._hidden, "what was hidden is not deleted"
