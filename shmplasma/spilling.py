r"""Spilling: objects that make room by going to an external store, and come back when they are asked for.  Pure.

::

           write                 need of room                  get
    DIRTY -------> CLEAN ----------------------> SPILLED ---------------> CLEAN
    SEALED         SEALED, with a copy           no extent, a copy        at another place

A sealed object never changes, so it is written while readers read it; what is CLEAN makes room at once and by the
take protocol (`shmplasma.room`), as an eviction does, but that its entry stays and says SPILLED.  Readers do not know
that state and ask the store.

Who asks for room and finds none (a creator, or an object that comes back) states a *demand*: then objects are
written until what is free, clean or being written meets it.  Above the high-water mark they are written ahead of
any demand.  The eviction policy says which; what is kept goes last.  The clean ones go in the order in which they
were written, and one that was read since gets another chance.  Where there are bytes enough, but no extent, the stretch is
cleared that loses least, of what is free, clean or, once it has been written, dirty; where objects are too many and too small to
be chosen so, or none may go, some are moved.

A full external store
---------------------
Where it may hold so much only, the last of it, room for two objects as large as any that is there, is left to objects that
come back: those that have to make way for them may have no copy.  Once that was needed, as much of what is clean as the largest takes
that was written is left to them in memory, and what is put has to do without.  So what is put cannot make unreadable what was put
before; who gets one object after the other finds all of them.

Half-dead containers
--------------------
A container is deleted when no entry names it; one of many small objects may so outlive most of them.  When less than half of it
is named it is *emptied*: what is in memory too forgets that it has a copy, what is not comes back and does then; so
all are written anew, with others.  Thus the external store holds at most twice what is named, and what is being
emptied; each byte that is written for that was paid for by one that was deleted.  No state is needed for it that a death could leave behind.
One container at a time is emptied, when there is room for what comes back.

What a death leaves
-------------------
Where the copy is stands in the entry (`Table.set_copy`), under a checksum of its own.  It is written after the
container, so that what it names is whole.  A take for want of room that is cut short leaves EVICTING: the object is
still where it was (`shmplasma.recovery`).  `Table.relocate` writes words that a SPILLED entry has no use for, and
the state last.  A container that no entry names is nobody's: it is deleted by the next store.

Invariants
----------
* `busy` entries are being written: nobody takes or moves them, though all may read them.
* A container is deleted when no entry names it.  One of which less than half is named waits to be emptied, or was tried.
* A failed write leaves objects as they are; who waits for room is told why.  A failed read fails those who wait for
  that object, and leaves it SPILLED.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from shmplasma.containers import Containers
from shmplasma.layout import ALIGNMENT, EntryState, align_up
from shmplasma.pins import Boards
from shmplasma.returns import Returns
from shmplasma.room import Room
from shmplasma.table import Table
from shmplasma.transfers import Delete, Job, Part, Read, Write

__all__ = ["HEADER_BYTES", "ExternalLimits", "Spilling"]

HEADER_BYTES: Final = 128
"""Before each object in a container."""
_CONTAINER_BYTES: Final = 8 << 20
"""Small objects are written together, up to so many bytes."""
_CONTAINER_OBJECTS: Final = 256
_MAX_WRITES: Final = 4
_AHEAD_BYTES: Final = 64 << 20
"""At most so much is clean ahead of need, whatever the high-water mark says."""
_ALL: Final = 1 << 62
"""More bytes than any store has."""


@dataclass(frozen=True, slots=True)
class ExternalLimits:
    """How an external store is used.

    Attributes
    ----------
    max_bytes : int
        How much it may hold, what was deleted in containers that are still there included; 0 for no limit.
    high_water : float
        The share of the capacity above which objects are written ahead of need.
    """

    max_bytes: int = 0
    high_water: float = 0.8


@dataclass(slots=True)
class Spilling:
    """What is written, what is clean, and what is in the external store alone.

    Parameters
    ----------
    table, boards, room
        The parts that it joins.
    capacity : int
        The store's, in bytes.
    limits : ExternalLimits
        How the external store is used.

    Attributes
    ----------
    jobs : list of Job
        What is to be carried out, outside the loop.
    returns : Returns
        What comes back.
    failure : str
        Why the last write failed; empty if it did not.
    failures : int
        How many writes have failed: who has waited for one of them does not ask for more.
    spilled_bytes : int
        Bytes of objects that are in the external store alone.
    written, restored : int
        How many objects were written, and how many came back.
    """

    table: Table
    boards: Boards
    room: Room
    capacity: int
    limits: ExternalLimits
    jobs: list[Job] = field(default_factory=list)
    returns: Returns = field(init=False)
    failure: str = ""
    failures: int = 0
    spilled_bytes: int = 0
    restored: int = 0
    written: int = 0
    _clean: OrderedDict[int, int] = field(default_factory=OrderedDict)
    _clean_bytes: int = 0
    _containers: Containers = field(default_factory=Containers)
    _emptying: int = 0
    _is_fruitless: bool = False
    _has_failed: bool = False
    _writes: int = 0
    _writing_bytes: int = 0
    _being_stored: int = 0
    _demand: int = 0
    _stretched_for: int = 0
    _scattered: int = 0
    _lacking: int = 0
    _largest: int = 0
    _largest_stored: int = 0

    def __post_init__(self) -> None:
        self.returns = Returns(self.table, self.room, self.jobs)
        self.room.residents.external = self

    # -- what the room asks --------------------------------------------------------------------

    @property
    def clean_bytes(self) -> int:
        """Bytes of extents that can be free at once, but for those that are pinned."""
        return self._clean_bytes

    @property
    def copies(self) -> Mapping[int, int]:
        """The objects in memory that have a copy, and their extents' sizes in bytes."""
        return self._clean

    def is_clean(self, entry: int) -> bool:
        """Tell whether an object in memory has a copy."""
        return entry in self._clean

    def victims(self) -> Iterator[int]:
        """Yield the clean objects in the order in which they should go; each may be removed meanwhile."""
        offered: set[int] = set()
        for _ in range(2 * len(self._clean)):
            if not self._clean:
                return
            entry = next(iter(self._clean))
            self._clean.move_to_end(entry)  # if it stays, the others come first from now on
            if entry in offered or self.room.residents.was_read(entry):
                continue
            # What is deleted and still held goes at its last release.
            if self.table.state(entry) == EntryState.SEALED:
                offered.add(entry)
                yield entry

    def reserved_for(self, size_bytes: int) -> int:
        """Return how much of what is clean is left to what comes back when so much is put; 0 if it has room outside."""
        largest = max(self._largest, HEADER_BYTES + align_up(size_bytes, ALIGNMENT))
        goes = size_bytes and (self.spilled_bytes or size_bytes > self.room.free_bytes)
        return self._largest_stored if goes and self._left_bytes < 2 * largest else 0

    @property
    def _left_bytes(self) -> int:
        """How much the external store may still hold."""
        return (self.limits.max_bytes or _ALL) - self._containers.total_bytes - self._being_stored

    def came(self, size_bytes: int) -> None:
        """Take note of an object in memory, of so many bytes, that may be written."""
        self._largest = max(self._largest, HEADER_BYTES + align_up(size_bytes, ALIGNMENT))
        self.look_again()

    def went(self, entry: int) -> None:
        """Take note that a clean object is in memory no more."""
        self._clean_bytes -= self._clean.pop(entry)
        self.spilled_bytes += self.table.size(entry)

    def forget(self, entry: int) -> None:
        """Take note that an object goes for good; its entry is about to be freed."""
        number, _ = self.table.copy_of(entry)
        if entry in self._clean:
            self._clean_bytes -= self._clean.pop(entry)
        if number:
            self._unname(entry, number)

    def _stored_bytes(self, entry: int) -> int:
        return HEADER_BYTES + align_up(self.table.size(entry), ALIGNMENT)

    def _unname(self, entry: int, number: int) -> None:
        if self._containers.unname(number, entry):
            self.jobs.append(Delete((number,)))

    # -- emptying containers -------------------------------------------------------------------

    def _empty_one(self) -> None:
        """Begin to empty a container of which less than half is named, if none is being emptied."""
        number = self._containers.first_sparse()
        if number is None:
            return
        table, before = self.table, self._containers.entries(self._emptying)
        if any(entry in self.returns for entry in before):
            return
        entries = self._containers.entries(number)
        spilled = [entry for entry in entries if table.state(entry) == EntryState.SPILLED]
        coming = sum(align_up(table.size(entry), ALIGNMENT) for entry in spilled)
        if coming > self.room.attainable_bytes:
            return
        self._containers.empty(number)
        self._emptying = number
        for entry in entries:
            if table.state(entry) in (EntryState.SEALED, EntryState.MOVING):
                self._forget_copy(entry)
        for entry in spilled:
            self.bring(entry)

    def _forget_copy(self, entry: int) -> None:
        number, _ = self.table.copy_of(entry)
        self.table.set_copy(entry, 0, 0)
        self._clean_bytes -= self._clean.pop(entry)
        self._unname(entry, number)
        self.look_again()

    # -- writing -------------------------------------------------------------------------------

    def look_again(self) -> None:
        """Take note that there may be something to write, or to clear, where there was nothing."""
        self._is_fruitless = False
        self._stretched_for = self._scattered = 0

    def demand(self, size_bytes: int) -> bool:
        """State that somebody wants room; tell whether there may be so much, in one piece, now or when jobs are done."""
        wanted = align_up(size_bytes, ALIGNMENT)
        self._demand = max(self._demand, wanted)
        self.advance()
        return self.is_under_way and not self._is_to_be_moved_for(wanted)

    @property
    def is_under_way(self) -> bool:
        """Whether objects are being written, or read: what is may make room for others after that."""
        return self._writes > 0 or self.returns.are_being_read

    def advance(self) -> None:
        """Begin to read what is wanted back, and to write what that demands, or others, or what is due ahead of need."""
        lacking = self._lacking = self.returns.advance()
        if not self._has_failed:
            self._demand = max(self._demand, lacking)
        self._write_ahead()
        if self._demand <= self.room.largest_bytes:
            self._demand = 0
        elif self._demand != self._stretched_for and self._demand <= self.room.attainable_bytes:
            self._write_stretch()
        is_left_to_move = not self.is_under_way or self._is_to_be_moved_for(lacking)
        if lacking and is_left_to_move and not self.returns.were_moved_for:
            self.room.compact(lacking)
        self._empty_one()

    def _write_ahead(self) -> None:
        """Begin to write what makes the bytes that are wanted, if what is clean does not."""
        wanted = 0
        if not self.failure:
            used = self.capacity - self.room.free_bytes
            wanted = min(used - int(self.limits.high_water * self.capacity), _AHEAD_BYTES)
        if self._demand > self.room.largest_bytes:
            wanted = max(wanted, self._demand - self.room.free_bytes)
            # For the next one as well, for which there may be no room any more.
            if self._lacking and self.limits.max_bytes:
                wanted = max(wanted, self._largest_stored - self.room.free_bytes)
        residents, missing = self.room.residents, 0
        if wanted > 0 and self._writes < _MAX_WRITES and not self._is_fruitless:
            # What is pinned makes no room, clean or not.
            clean_bytes = self.room.attainable_bytes - self.room.free_bytes
            missing = wanted - clean_bytes - self._writing_bytes
        candidates = residents.to_write(by_and_by=self._demand <= self.room.largest_bytes)
        left = self._write(candidates, missing) if missing > 0 else 0
        self._is_fruitless |= left > 0 and self._writes < _MAX_WRITES and not residents.pauses

    def _write_stretch(self) -> None:
        """Begin to write what lies in the way of one extent: there are bytes enough, but what is clean lies scattered."""
        if self._writes >= _MAX_WRITES or self.room.mover.is_busy:
            return
        self._stretched_for = self._demand
        chosen = self.room.stretch(self._demand, dirty=True)
        n_writes = self._writes
        self._write(chosen, _ALL)
        # Nothing may go, or nothing more can be written.
        if self._writes == n_writes and self.room.residents.busy.isdisjoint(chosen):
            self._scattered = self._demand

    def _is_to_be_moved_for(self, size_bytes: int) -> bool:
        """Tell whether there are bytes enough, and what can go makes no extent of them, written or not."""
        return 0 < self._scattered <= size_bytes <= self.room.attainable_bytes

    def _write(self, candidates: Iterable[int], size_bytes: int) -> int:
        """Begin to write objects of so many bytes, as far as there are any and the limit allows; return how many are left."""
        held = self.boards.pinned()
        batch: list[Part] = []
        batch_bytes = 0
        left = self._left_bytes
        if left == self.limits.max_bytes:
            self._largest_stored = 0
            if left < 3 * self._largest:  # which may have been deleted
                self._largest = HEADER_BYTES + self.room.residents.largest_bytes()
        for entry in candidates:
            if self._writes >= _MAX_WRITES or size_bytes <= 0:
                break
            if entry in held or entry in self._clean or entry in self.room.residents.busy:
                continue
            if self.table.state(entry) != EntryState.SEALED:
                continue
            size = align_up(self.table.size(entry), ALIGNMENT)
            reserve = 0 if self._lacking else 2 * self._largest
            if HEADER_BYTES + size + reserve > left:
                self.failure = (
                    f"the external store may hold {self.limits.max_bytes} bytes, which it does, but for what others "
                    "need to come back; delete objects, or start the store with a larger --max-spill-bytes"
                )
                continue
            self._largest_stored = max(self._largest_stored, HEADER_BYTES + size)
            left -= HEADER_BYTES + size
            object_id, codec = self.table.id_and_codec(entry)
            batch.append(Part(entry, object_id, codec, *self.table.location(entry)))
            self.room.residents.busy.add(entry)
            batch_bytes += size
            size_bytes -= size
            if batch_bytes >= _CONTAINER_BYTES or len(batch) >= _CONTAINER_OBJECTS:
                self._begin(batch, batch_bytes)
                batch, batch_bytes = [], 0
        if batch:
            self._begin(batch, batch_bytes)
        return size_bytes

    def _begin(self, batch: list[Part], size_bytes: int) -> None:
        self.jobs.append(Write(self._containers.new_number(), tuple(batch)))
        self._writes += 1
        self._writing_bytes += size_bytes
        self._being_stored += size_bytes + HEADER_BYTES * len(batch)

    def wrote(self, job: Write, places: Iterable[int], failure: str) -> None:
        """Take note of what came of a write; whoever waits for room is to be served after this."""
        sizes = [align_up(self.table.size(part.entry), ALIGNMENT) for part in job.parts]
        self._writes -= 1
        self._writing_bytes -= sum(sizes)
        stored = sum(sizes) + HEADER_BYTES * len(sizes)
        self._being_stored -= stored
        self.look_again()
        self._demand = 0  # whom this does not serve states it again
        self.room.residents.busy.difference_update(part.entry for part in job.parts)
        self.failure = failure
        if failure:
            self.failures += 1
            self._has_failed = True
            return
        self._containers.wrote(job.number, stored)
        for part, size, place in zip(job.parts, sizes, places, strict=True):
            self.table.set_copy(part.entry, job.number, place)
            self._containers.name(job.number, part.entry, HEADER_BYTES + size)
            self._clean[part.entry] = size
            self._clean_bytes += size
            self.written += 1

    # -- coming back ---------------------------------------------------------------------------

    def bring(self, entry: int) -> None:
        """Have a spilled object brought back."""
        if self.returns.bring(entry):
            self.look_again()
            self.returns.advance()

    def stuck(self) -> int | None:
        """Return the first object that finds no room, if none is being made; those behind it were not tried yet."""
        is_moved_for = self.room.mover.is_busy and not self.returns.were_moved_for
        if (self.is_under_way or is_moved_for) and not self._has_failed:
            return None
        entry = self.returns.first_without_room()
        self._has_failed &= entry is not None
        return entry

    def give_up(self, entry: int) -> None:
        """Let an object stay in the external store that is `stuck`."""
        self._has_failed = False
        self.returns.give_up(entry)

    def extents(self) -> Iterator[tuple[int, int]]:
        """Yield the extents that no entry names yet."""
        return self.returns.extents()

    def was_read(self, job: Read, failure: str) -> bool:
        """Take note of what came of a read; tell whether the object is in memory now."""
        if not self.returns.was_read(job, failure):
            return False
        entry, size = job.part.entry, job.part.size_bytes
        self._clean[entry] = extent = align_up(size, ALIGNMENT)
        self._clean_bytes += extent
        self.spilled_bytes -= size
        self.restored += 1
        if self._containers.was_emptied(job.number):
            self._forget_copy(entry)
        return True

    def drop(self, entry: int) -> None:
        """Forget a spilled object, which is deleted; its entry is about to be freed."""
        self.returns.give_up(entry)
        self.spilled_bytes -= self.table.size(entry)
        self.forget(entry)

    # -- recovering ----------------------------------------------------------------------------

    def recover(self, copies: Mapping[int, int], spilled: Iterable[int]) -> None:
        """Take over what a store that has died has written.

        Parameters
        ----------
        copies : mapping
            The container that has a copy, by entry.
        spilled : iterable of int
            The entries of what is there alone.
        """
        alone = set(spilled)
        for entry, number in copies.items():
            size = align_up(self.table.size(entry), ALIGNMENT)
            self._containers.recover(number, entry, HEADER_BYTES + size)
            self._largest_stored = max(self._largest_stored, HEADER_BYTES + size)
            if entry in alone:
                self.spilled_bytes += self.table.size(entry)
            else:
                self._clean[entry] = size
                self._clean_bytes += size
        self.came(max(self._largest_stored - HEADER_BYTES, self.room.residents.largest_bytes()))

    def tidy(self, found: Mapping[int, int]) -> int:
        """Delete those of these containers that no entry names, and number the next ones above all of them.

        An object in memory whose copy is not there any more, or not whole (the external store is at another place, or lost what
        it had), is to be written anew before it goes.  One that was there alone stays, and is an error for who asks for it;
        return how many these are.

        Parameters
        ----------
        found : mapping
            The size in bytes of each container that there is, by number.
        """
        n_lost = 0
        for number in self._containers.damaged(found):
            for entry in self._containers.entries(number):
                if entry in self._clean:
                    self._forget_copy(entry)
                else:
                    n_lost += 1
        unnamed = self._containers.tidy(found)
        if unnamed:
            self.jobs.append(Delete(unnamed))
        return n_lost

    def check(self) -> None:
        """Prove that what is said of copies is what the table says."""
        table = self.table
        named: dict[int, dict[int, int]] = {}
        for entry in table.entries():
            number, _ = table.copy_of(entry)
            state = table.state(entry)
            if number and state != EntryState.CREATED:
                named.setdefault(number, {})[entry] = self._stored_bytes(entry)
            if state in (EntryState.SEALED, EntryState.DOOMED, EntryState.MOVING):
                assert bool(number) == (entry in self._clean), f"entry {entry} is clean or not"
            else:
                assert entry not in self._clean, f"entry {entry} is clean, and no object"
        self._containers.check(named)
        assert sum(self._clean.values()) == self._clean_bytes, "the sum of clean bytes is wrong"
