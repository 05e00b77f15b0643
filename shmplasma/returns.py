"""Returns: spilled objects on their way back to memory: room, memory behind it, and the read, in the order in which they were wanted.  Pure.

Invariants
----------
* What comes back has its extent before it is read, and no entry says so until it is whole: until then `Returns.extents` does.
* One that was deleted meanwhile leaves its entry to another object, which may want to come back, too; so each is known by its
  state word as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from shmplasma.errors import CommitError
from shmplasma.layout import ALIGNMENT, align_up
from shmplasma.room import Room
from shmplasma.table import Table
from shmplasma.transfers import Job, Part, Read

__all__ = ["Returns"]

_MAX_READS: Final = 4


@dataclass(slots=True)
class _Return:
    entry: int
    state_word: int
    size_bytes: int
    met_pins: int
    offset: int | None = None
    job: Read | None = None
    awaits_commit: bool = False


class Returns:
    """What comes back.

    Parameters
    ----------
    table, room
        The parts that it joins.
    jobs : list of Job
        Where reads are added that are to be carried out.
    """

    def __init__(self, table: Table, room: Room, jobs: list[Job]) -> None:
        self._table = table
        self._room = room
        self._jobs = jobs
        self._coming: dict[tuple[int, int], _Return] = {}
        self._reads = 0

    @property
    def are_being_read(self) -> bool:
        """Whether any is being read."""
        return self._reads > 0

    def __contains__(self, entry: int) -> bool:
        """Tell whether the object of an entry is coming."""
        return (entry, self._table.state_word(entry)) in self._coming

    def extents(self) -> Iterator[tuple[int, int]]:
        """Yield the extents that no entry names yet."""
        for each in self._coming.values():
            if each.offset is not None and each.size_bytes:
                yield each.offset, align_up(each.size_bytes, ALIGNMENT)

    # -- on the way ----------------------------------------------------------------------------

    def bring(self, entry: int) -> bool:
        """Have a spilled object brought back; tell whether it was not coming yet."""
        if entry in self:
            return False
        key = entry, self._table.state_word(entry)
        self._coming[key] = _Return(*key, self._table.size(entry), self._room.attempts.met_pins)
        return True

    def advance(self) -> int:
        """Begin to read what has room; return how much room the first one lacks."""
        for each in tuple(self._coming.values()):
            if each.offset is None:
                offset, _ = self._room.allocate(self._table.size(each.entry))
                if offset is None:
                    return align_up(self._table.size(each.entry), ALIGNMENT)  # in their order
                each.offset = offset
            if each.job is None and self._reads < _MAX_READS:
                self._read_if_ready(each)
        return 0

    def _read_if_ready(self, each: _Return) -> None:
        assert each.offset is not None
        table, size = self._table, self._table.size(each.entry)
        each.awaits_commit = size > 0 and not self._room.commitment.is_ready(each.offset, size)
        if each.awaits_commit:
            return
        number, place = table.copy_of(each.entry)
        object_id, codec = table.id_and_codec(each.entry)
        _, data_size, metadata_size = table.location(each.entry)
        part = Part(each.entry, object_id, codec, each.offset, data_size, metadata_size)
        each.job = Read(number, place, part)
        self._jobs.append(each.job)
        self._reads += 1

    @property
    def await_commit(self) -> bool:
        """Whether one of them waits for memory behind its extent."""
        return any(each.awaits_commit for each in self._coming.values())

    def commit(self) -> tuple[int, str]:
        """Commit one step of memory for an object that comes back.

        Returns
        -------
        entry : int
            Which.
        failure : str
            Why there is no memory, and it stays where it is; empty if there is.
        """
        each = next(each for each in self._coming.values() if each.awaits_commit)
        assert each.offset is not None
        try:
            if self._room.commitment.step(each.offset, self._table.size(each.entry)):
                self._read_if_ready(each)
        except CommitError as error:
            self.give_up(each.entry)
            return each.entry, str(error)
        return each.entry, ""

    # -- the end of the way --------------------------------------------------------------------

    def first_without_room(self) -> int | None:
        """Return the first that has no room; those behind it were not tried yet."""
        first = self._first_without_room
        return None if first is None else first.entry

    @property
    def were_moved_for(self) -> bool:
        """Whether objects were moved often enough in vain for the first that has no room."""
        first = self._first_without_room
        return first is not None and self._room.attempts.are_enough(first.met_pins)

    @property
    def _first_without_room(self) -> _Return | None:
        return next((each for each in self._coming.values() if each.offset is None), None)

    def give_up(self, entry: int) -> None:
        """Let an object stay in the external store that nobody waits for any more, or that finds no room."""
        key = entry, self._table.state_word(entry)
        each = self._coming.get(key)
        if each is not None and each.job is None:
            del self._coming[key]
            if each.offset is not None:
                self._room.give_back(each.offset, self._table.size(entry))

    def was_read(self, job: Read, failure: str) -> bool:
        """Take note of what came of a read; tell whether the object is in memory now."""
        each = next(each for each in self._coming.values() if each.job is job)
        del self._coming[each.entry, each.state_word]
        self._reads -= 1
        is_gone = self._table.state_word(each.entry) != each.state_word
        if failure or is_gone:
            self._room.give_back(job.part.offset, job.part.size_bytes)
            return False
        self._table.relocate(each.entry, job.part.offset)
        self._room.residents.sealed(each.entry)
        return True
