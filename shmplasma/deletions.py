"""Deleting sealed objects in two steps, so that who deletes does not wait for what follows.  Pure.

Invariants
----------
* A deletion begins by making the object DOOMED: nobody finds it any more who does not ask the store.  That may be answered.
* It ends by a take (`shmplasma.pins`): what nobody pins goes, and the rest waits for its last release (`shmplasma.releases`).
* Between the two nothing else is done but to begin more deletions.  A store that dies there leaves DOOMED objects, as one does that waits for
  their releases, and its successor ends what it has begun.
"""

from __future__ import annotations

from collections.abc import Iterable

from shmplasma.layout import EntryState
from shmplasma.lifecycle import Lifecycle
from shmplasma.posted import Remove
from shmplasma.table import NO_ENTRY, Table

__all__ = ["Deletions"]


class Deletions:
    """Deletes objects.

    Parameters
    ----------
    table, objects
        The parts of the store that it joins.

    Attributes
    ----------
    begun : set of int
        The entries for which `end` is due; the same set for as long as this lives.
    """

    def __init__(self, table: Table, objects: Lifecycle) -> None:
        self._table = table
        self._objects = objects
        self.begun: set[int] = set()

    def delete(self, object_ids: Iterable[bytes]) -> None:
        """Delete sealed objects: at once where nobody pins them, else at their last release."""
        self.begin(object_ids)
        self.end()

    def begin(self, object_ids: Iterable[bytes]) -> None:
        """Delete sealed objects as far as others can see; `end` is to follow."""
        begun, table, objects = self.begun, self._table, self._objects
        for object_id in object_ids:
            if begun and table.find(object_id) in begun:
                continue
            entry = objects.find_sealed(object_id)
            if entry != NO_ENTRY:
                begun.add(entry)
                table.set_state(entry, EntryState.DOOMED)
            elif (spilled := objects.find_spilled(object_id)) != NO_ENTRY:
                objects.drop(spilled)

    def begin_one(self, message: Remove) -> None:
        """Do so with an object if it is still the one that its client has seen."""
        entry = self._table.find(message.object_id)
        if entry != NO_ENTRY and self._table.created_ns(entry) == message.created_ns:
            self.begin((message.object_id,))

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
