"""Releases that somebody waits for: what goes with the last one, and the word by which it wakes the store.  Pure.

Invariants
----------
* A doomed object is sealed and was pinned when it was deleted: the store still gives it to readers, its id is taken, and it goes
  at the last release.  Its state is one that readers do not know, so that they ask the store, which looks
  first whether the last release has come.
* One that is being deleted is DOOMED and not counted yet, between the answer to who deletes it and the barrier.
* A limbo entry was aborted while its writer still held the buffer, or is that of a record that was refused: it is in no chain, and
  its extent is not free.
* While anything is doomed or in limbo, or anybody waits for room, the header's WAKE word is set, so that the
  release of a pin wakes the store.  The word is set, then comes a barrier, then the boards are read once more: a release before the
  barrier is seen by this reading, one after it sees the word.
* A client wakes the store once for each number that it finds in the word: a byte in the pipe costs a release as much as a get.
  The store sets another number whenever it has emptied the pipe, before it reads the boards.  So of a release that finds the
  number for which its client has written a byte already, that byte is still in the pipe, or the store sees the release when it
  reads the boards after a barrier.
* Who misses what was put writes bytes of another kind into the pipe (`shmplasma.settling`).  They stand for no release, but where there were so many that
  the pipe may have been full, a release may have found no room in it; then the boards are read as well.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Set as AbstractSet

from shmplasma.layout import EntryState, HeaderWord
from shmplasma.memory import Memory
from shmplasma.pins import Boards
from shmplasma.room import Room
from shmplasma.table import Table

__all__ = ["Releases"]


class Releases:
    """Who and what waits for a release.

    Parameters
    ----------
    words : memoryview
        The segment as native 8-byte words, writable.
    table, boards, room
        The parts that it joins.
    memory : Memory
        Issues barriers.
    gone : callable
        ``gone(object_id)`` is told of each sealed object that leaves.

    Attributes
    ----------
    doomed, limbo : set of int
        The entries that wait; the same sets for as long as this lives, and no others' to change, but that `Room.take` takes
        what goes out of the first.
    """

    def __init__(
        self,
        words: memoryview,
        table: Table,
        boards: Boards,
        room: Room,
        memory: Memory,
        gone: Callable[[bytes], None],
    ) -> None:
        self._words = words
        self._table = table
        self._boards = boards
        self._room = room
        self._memory = memory
        self._gone = gone
        self.doomed = room.doomed
        self.limbo = boards.limbo
        self._room_is_awaited = False
        self._number = 0

    @property
    def n_waiting(self) -> int:
        """How many entries wait for somebody to let go of them."""
        return len(self.doomed) + len(self.limbo)

    @property
    def are_awaited(self) -> bool:
        """Whether releases have to wake the store."""
        return self._room_is_awaited or bool(self.doomed or self.limbo)

    # -- waiting -------------------------------------------------------------------------------

    def doom(self, entries: set[int]) -> None:
        """Have objects that are DOOMED go at their last release; `take` has met a pin of each."""
        self.doomed |= entries
        self._await()

    def leave(self, entries: AbstractSet[int]) -> None:
        """Have the extents of aborted objects go when their writers let go; they are EVICTING, and in no chain any more."""
        self.limbo |= entries
        self._await()

    def await_room(self, *, wanted: bool) -> None:
        """Say whether somebody waits for room, so that releases wake the store.

        Room has to be looked for once more after this: see the WAKE word.
        """
        if wanted != self._room_is_awaited:
            self._room_is_awaited = wanted
            if wanted:
                self._raise_wake_word()
            else:
                self._lower_wake_word()

    def recover(self, doomed: set[int], limbo: set[int]) -> None:
        """Take over what a store that has died has waited for; `settle` is to follow."""
        self.doomed |= doomed
        self.limbo |= limbo

    def settle(self) -> None:
        """Let go what nobody pins, and have releases of the rest wake the store."""
        if self.doomed or self.limbo:
            self._await()
        else:
            self._lower_wake_word()

    def _await(self) -> None:
        self._raise_wake_word()
        self.wake()

    def woken(self) -> None:
        """Have clients wake the store anew: the pipe was emptied, and the boards are to be read after this."""
        if self.are_awaited:
            self._raise_wake_word()

    def _raise_wake_word(self) -> None:
        self._number += 1
        self._words[HeaderWord.WAKE] = self._number
        self._memory.barrier()

    def _lower_wake_word(self) -> None:
        if not self.are_awaited:
            self._words[HeaderWord.WAKE] = 0

    # -- going ---------------------------------------------------------------------------------

    def wake(self) -> None:
        """Let go what waited for a release and is pinned no more."""
        if not (self.doomed or self.limbo):
            return
        pinned = self._boards.pinned_among(self.doomed | self.limbo)
        self.take(self.doomed - pinned)
        for entry in self.limbo - pinned:
            self.limbo.remove(entry)
            self._room.free(entry)
        self._lower_wake_word()

    def take(self, entries: set[int]) -> None:
        """Remove those of these sealed objects that nobody pins, from the store and from the set."""
        for entry in self._room.take(list(entries)) if entries else ():
            entries.discard(entry)
            self._gone(self._table.object_id(entry))
        self.note_gone()

    def note_gone(self) -> None:
        """Take note that objects have gone, by whatever way: doomed ones may be among them."""
        self._lower_wake_word()

    # -- proof ---------------------------------------------------------------------------------

    def check(self) -> None:
        """Prove the module's invariants."""
        for entry in range(self._table.end):
            state = self._table.state(entry)
            limbo = state == EntryState.EVICTING
            assert limbo == (entry in self.limbo), f"entry {entry} is being taken for ever"
            doomed = state == EntryState.DOOMED
            assert doomed == (entry in self.doomed), f"entry {entry} is doomed for ever"
        word = self._words[HeaderWord.WAKE]
        assert bool(word) == self.are_awaited, "nobody will wake the store, or for nothing"
