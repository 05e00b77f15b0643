"""Unsealed objects: who is writing what, and how all that goes of a client that leaves.  Pure.

Invariants
----------
* An unsealed object has exactly one creator; only that one may seal or abort it.
* What a client leaves behind goes at once where it is little, else by and by between requests (`Room.most_at_once`), so that nobody waits for
  another one's hundred thousand objects.  Nobody sees a difference: an object goes at once when somebody wants its id (`Unsealed.is_left`), and all
  of them before anybody is refused, or anything is evicted, for want of their room or entries (`Unsealed.finish`).
* Nothing goes before the record is acknowledged by which it came, and who has pinned it by a record that is unread (`shmplasma.unread`) keeps
  its extent: it is EVICTING, then comes a barrier, then the boards are read.
* A client that has ended keeps its boards, without its pins, until the last of them has gone: an entry's OWNER is a slot of a board, by which a
  successor of this store knows whose object it is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import islice

from shmplasma.layout import EntryState
from shmplasma.memory import Memory
from shmplasma.pins import Boards
from shmplasma.releases import Releases
from shmplasma.requests import Create
from shmplasma.room import Room
from shmplasma.table import Table

__all__ = ["Unsealed"]


class Unsealed:
    """All unsealed objects.

    Parameters
    ----------
    table, boards, room, releases
        The parts of the store that it joins.
    memory : Memory
        Issues barriers.
    """

    def __init__(
        self, table: Table, boards: Boards, room: Room, releases: Releases, memory: Memory
    ) -> None:
        self._table = table
        self._boards = boards
        self._room = room
        self._releases = releases
        self._memory = memory
        self._creators: dict[int, int] = {}
        self._of_client: dict[int, set[int]] = {}
        self._recovered: set[int] = set()
        self._left: dict[int, None] = {}
        self._ended: set[int] = set()

    # -- who writes what -----------------------------------------------------------------------

    @property
    def creators(self) -> Mapping[int, int]:
        """Who writes each of them, by their entries."""
        return self._creators

    def of(self, client: int) -> Collection[int]:
        """Return the entries that a client is writing."""
        return self._of_client.get(client, ())

    def add(self, client: int, entry: int) -> None:
        """Take note of an object that was created."""
        self._creators[entry] = client
        self._of_client.setdefault(client, set()).add(entry)

    def forget(self, entry: int) -> None:
        """Take note that an object is sealed, or goes."""
        client = self._creators.pop(entry)
        self._recovered.discard(entry)  # what comes now under its number is another object
        own = self._of_client[client]
        own.remove(entry)
        if not own:
            del self._of_client[client]
            self._left.pop(client, None)
            if client in self._ended:
                self._ended.remove(client)
                self._boards.revoke(client)

    def is_repeated(self, client: int, entry: int, request: Create) -> bool:
        """Tell whether a store that has died had granted this request, and could not say so any more."""
        if self._creators.get(entry) != client or entry not in self._recovered:
            return False
        _, data_size, metadata_size = self._table.location(entry)
        sizes = request.data_size, request.metadata_size
        if self._table.owner(entry) != request.slot or (data_size, metadata_size) != sizes:
            return False  # another thread's, which may come before the one that was granted
        self._recovered.discard(entry)
        return True

    def recover(self, creators: Mapping[int, int]) -> None:
        """Take over what clients of a store that has died were writing."""
        for entry, client in creators.items():
            self.add(client, entry)
        self._recovered = set(creators)

    # -- going ---------------------------------------------------------------------------------

    def abort(self, entries: Sequence[int]) -> None:
        """Remove objects; the extent of one that is pinned waits until its writer, or who has it from a `Seal` that is unread, lets go."""
        table = self._table
        for entry in entries:
            self.forget(entry)
            table.set_state(entry, EntryState.EVICTING)
            table.unlink(entry)
        self._memory.barrier()
        pinned = self._room.pinned(entries)
        for entry in entries:
            if entry not in pinned:
                self._room.free(entry)
        if not pinned.isdisjoint(entries):
            self._releases.leave(pinned & set(entries))

    def leave(self, client: int, *, at_once: bool = True) -> None:
        """Remove all that a client is writing, or begin with it, at once or with the next `advance`; it seals none of it any more."""
        if client in self._of_client and client not in self._left:
            self._left[client] = None
            if at_once:
                self._abort_some(client)

    def end(self, client: int) -> None:
        """Take the boards of a client back that has ended, when nothing is left of what it was writing; its pins have gone."""
        if client in self._left:
            self._ended.add(client)
        else:
            self._boards.revoke(client)

    @property
    def are_left(self) -> bool:
        """Whether there is something that `advance` has to remove."""
        return bool(self._left)

    def is_left(self, entry: int) -> bool:
        """Tell whether this is an object that is about to be removed."""
        return bool(self._left) and self._creators.get(entry) in self._left

    def advance(self) -> None:
        """Remove some of what clients have left behind."""
        self._abort_some(next(iter(self._left)))

    def finish(self) -> None:
        """Remove all of it."""
        while self._left:
            self.advance()

    def _abort_some(self, client: int) -> None:
        self.abort(tuple(islice(self._of_client[client], self._room.most_at_once)))

    # -- proof ---------------------------------------------------------------------------------

    def check(self) -> None:
        """Prove the module's invariants."""
        found = {entry: client for client, own in self._of_client.items() for entry in own}
        assert found == self._creators, "creators and their unsealed objects disagree"
        assert self._recovered <= found.keys(), "what was recovered is not there"
        assert self._left.keys() <= self._of_client.keys(), (
            "nothing is left of a client that leaves"
        )
        assert self._ended <= self._left.keys(), "a client that has ended keeps its boards"
        state = self._table.state
        for entry in range(self._table.end):
            created = state(entry) == EntryState.CREATED
            assert created == (entry in found), f"entry {entry} has no creator or is not CREATED"
