"""Recovery: what a store that is started again makes of the segment that a dead one has left.  Pure.

Everything is rebuilt from the table, the control lines and the boards; of the dead store's own memory nothing
is needed.  Clients go on reading meanwhile, and hold what they hold.

What a death leaves
-------------------
The store is the only writer of the table and may die between any two of its stores to memory.  x86-64 keeps
their order, and a death undoes none of them.  An entry is judged by its state and its checksum:

==================  ==========  ==================================================================================
state               verdict     what happened, and what becomes of it
==================  ==========  ==================================================================================
SEALED              complete    an object: stays
DOOMED              complete    deleted while it was pinned, perhaps being taken: stays so until its last release
any but DOOMED      marked      deleted (`shmplasma.removal`), perhaps being moved: DOOMED from now on; gone if it is SPILLED
EVICTING            complete    it was being taken, and no byte of it was given to anybody else: stays
CREATED or FREE     complete    it was being sealed, or published: stays; whoever asked for it was not answered
MOVING              complete    it was to be moved, or the journal says how to carry on (`shmplasma.moves`): stays
CREATED             begun       unsealed: stays if it has a creator, which may complete it; else it goes
EVICTING            begun       aborted: goes; where its creator still holds the buffer, at the release
SPILLED             any         in the external store alone: stays, if it says where (`shmplasma.spilling`)
any but FREE        nothing     damaged: goes; a reader that still pins it keeps its extent
FREE                otherwise   free: nobody was told that there is something
==================  ==========  ==================================================================================

An entry that goes is given up by the take protocol (EVICTING, membarrier, boards; `shmplasma.pins`), as a
reader may just have found it.

*What goes stays gone.*  A store that dies while it recovers leaves to its successor what it has done so far, and what somebody
held: an entry that is EVICTING, which is an object if it is complete.  So the checksum of an entry that goes is taken away
first (`Table.spoil`).  What is SPILLED has no extent, and another object may lie where it lay; no reader knows the state.  So it is FREE at
once, and was never EVICTING.  What is kept for who holds it has no copy: the external store has none that only such an entry names.

*Taken but not given away.*  A take frees the extents of a batch one by one, and hands out none of them before
it has changed the state of each to FREE.  So whatever is still EVICTING lies where it lay.

*Leases.*  What a client may still fill lies between the cursor of its lease and the end.  A store that
died between entering an object and moving the cursor has left an object in there; the cursor moves behind it.
Its record is not acknowledged and comes again (`shmplasma.outbox`): it lies before the cursor and is known by
that.

*Claims* (`shmplasma.claims`) leave CREATED entries that lie in leases.

*Boards* stay as they are.  The clients are held to be connected until they are, or until they end.  One that
has ended leaves when its outbox has been read: whatever it had put is there, although it died with its store.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice
from operator import le
from typing import Final, Self

from shmplasma.control import Owner
from shmplasma.layout import ALIGNMENT, BOARD_WORDS, REFERENCED, EntryState, Layout
from shmplasma.pins import Boards
from shmplasma.remains import DeadTable, Remains
from shmplasma.table import Table

__all__ = ["Findings", "examine"]

_FREE: Final = int(EntryState.FREE)
_SEALED: Final = int(EntryState.SEALED)
_SPILLED: Final = int(EntryState.SPILLED)


@dataclass(slots=True)
class Findings:
    """What is left of a store.

    Attributes
    ----------
    owners : dict
        The clients, by their first board; some may have ended.
    cached : list of int
        Entries of sealed objects that may be evicted, doomed ones included, in the order in which they were
        sealed.
    cached_bytes : int
        The sum of their extents.
    kept : set of int
        Entries of sealed objects that may not be evicted, doomed ones included.
    doomed : set of int
        Those that were deleted while they were pinned.
    created : dict
        Entries of unsealed objects, and their creators (first board).
    limbo : set of int
        Entries that are in no chain, and whose extent somebody still holds.
    referenced : list of bytes
        The ids of sealed objects, doomed ones not included, that belong to references.
    gaps : list of (offset, size)
        The extents that are free, by address.
    leases : dict
        What clients (first board) lease and have not published: cursor and end.
    copies : dict
        The containers of the external store that have copies, by entry.
    spilled : set of int
        Entries of objects that are in the external store alone.
    dropped : int
        How many entries were unsealed, torn or damaged.
    """

    owners: dict[int, Owner]
    cached: list[int] = field(default_factory=list)
    cached_bytes: int = 0
    kept: set[int] = field(default_factory=set)
    doomed: set[int] = field(default_factory=set)
    created: dict[int, int] = field(default_factory=dict)
    limbo: set[int] = field(default_factory=set)
    referenced: list[bytes] = field(default_factory=list)
    gaps: list[tuple[int, int]] = field(default_factory=list)
    leases: dict[int, tuple[int, int]] = field(default_factory=dict)
    copies: dict[int, int] = field(default_factory=dict)
    spilled: set[int] = field(default_factory=set)
    dropped: int = 0


def examine(
    layout: Layout,
    table: Table,
    boards: Boards,
    barrier: Callable[[], None],
    finish_move: Callable[[], None],
) -> Findings:
    """Take over table and boards, and say what is in them.

    Parameters
    ----------
    layout : Layout
        The segment's layout.
    table, boards
        Fresh ones, over the dead store's segment.
    barrier : callable
        Makes every client's CPU pass a full memory barrier.
    finish_move : callable
        Carries on with a move that was under way.

    Returns
    -------
    Findings
        Table and boards agree with it.

    Raises
    ------
    CommitError
        The memory of the table cannot be had any more.

    Notes
    -----
    O(n log n) in the number of entries that were ever used.
    """
    dead = table.take_over()
    finish_move()
    remains = dead.scan()
    findings = Findings(boards.recover())
    limits = layout.data, layout.data + layout.data_bytes
    whole, spilled, going = _judge(limits, table, dead, remains, boards, findings)
    used = _Extents.of(remains, whole)
    if not (used.are_apart() and _have_own_ids(remains, whole, spilled)):
        gone = _conflicting(remains, whole, spilled)
        going += gone
        whole = [entry for entry in whole if entry not in gone]
        spilled = [entry for entry in spilled if entry not in gone]
        used = _Extents.of(remains, whole)
        for entry in gone:
            findings.created.pop(entry, None)
    if going:
        findings.dropped = len(going)
        in_memory = _end_spilled(dead, remains, going)
        pinned = _give_up(table, boards, barrier, in_memory)
        for entry in in_memory:
            offset, size = remains.offsets[entry], remains.extents[entry]
            is_held = entry in pinned and size and _is_plausible(limits, offset, size)
            if is_held and used.add(offset, offset + size):
                findings.limbo.add(entry)
                if entry in remains.containers:
                    table.set_copy(entry, 0, 0)
            else:
                dead.renew(entry)
    states, created = remains.states, findings.created
    sealed = [entry for entry in whole if entry not in created] if created else whole
    for entry in sealed:
        if states[entry] == EntryState.DOOMED or table.is_marked(entry):
            findings.doomed.add(entry)
            table.set_state(entry, EntryState.DOOMED)
        elif states[entry] != _SEALED:
            table.set_state(entry, _SEALED)
    _sort_sealed(remains, findings, sealed)
    findings.spilled = set(spilled)
    findings.referenced = _referenced(remains, findings, sealed + spilled)
    staying = whole + spilled
    _find_copies(table, remains, findings, staying)
    dead.relink(staying, remains.object_ids)
    table.resume(staying, findings.limbo)
    findings.leases = _leases(findings.owners, used)
    for cursor, end in findings.leases.values():
        used.add(cursor, end)
    findings.gaps = used.gaps(*limits)
    return findings


class _Extents:
    """Extents that do not overlap, by address.

    Parameters
    ----------
    starts, ends : list of int
        Offsets in ascending order.
    """

    def __init__(self, starts: list[int], ends: list[int]) -> None:
        self._starts = starts
        self._ends = ends

    @classmethod
    def of(cls, remains: Remains, entries: list[int]) -> Self:
        """Return those of these entries."""
        offsets, extents = remains.offsets, remains.extents
        entries = [entry for entry in entries if extents[entry]]
        starts = [offsets[entry] for entry in entries]
        ends = [offsets[entry] + extents[entry] for entry in entries]
        starts.sort()
        ends.sort()
        return cls(starts, ends)

    def are_apart(self) -> bool:
        """Tell whether none overlaps another.

        That can be seen without knowing which start goes with which end.  At any address there is one extent less
        than starts up to there, less the ends up to there; if the i-th end is never above the next start, that is one at most.
        """
        return all(map(le, self._ends, islice(self._starts, 1, None)))

    def add(self, start: int, end: int) -> bool:
        """Add one if it overlaps none, and tell whether it was added."""
        at = bisect_right(self._starts, start)
        if (at and self._ends[at - 1] > start) or (
            at < len(self._starts) and self._starts[at] < end
        ):
            return False
        self._starts.insert(at, start)
        self._ends.insert(at, end)
        return True

    def end_of_last(self, start: int, end: int) -> int:
        """Return where the last one ends that begins before `end`, but not less than `start`."""
        at = bisect_left(self._starts, end)
        return max(start, self._ends[at - 1]) if at else start

    def gaps(self, start: int, end: int) -> list[tuple[int, int]]:
        """Return offset and size of what lies between them in a region, by address."""
        bounds = zip([start, *self._ends], [*self._starts, end], strict=True)
        return [(low, high - low) for low, high in bounds if low < high]


def _judge(
    limits: tuple[int, int],
    table: Table,
    dead: DeadTable,
    remains: Remains,
    boards: Boards,
    findings: Findings,
) -> tuple[list[int], list[int], list[int]]:
    """Separate what stays, in memory and in the external store, from what goes; note who creates what is unsealed."""
    whole: list[int] = []
    spilled: list[int] = []
    going: list[int] = []
    low, high = limits
    columns = zip(remains.states, remains.complete, remains.offsets, remains.extents, strict=True)
    for entry, (state, is_complete, offset, size) in enumerate(columns):
        if is_complete and state != _SPILLED:
            # As for nearly all of them.
            if low <= offset and not offset % ALIGNMENT and offset + size <= high:
                whole.append(entry)
            else:
                (going if size else whole).append(entry)
        elif state == _SPILLED:
            is_had = remains.containers.get(entry) and not table.is_marked(entry)
            (spilled if is_had else going).append(entry)
        elif state == EntryState.CREATED and dead.is_begun(entry):
            slot = table.owner(entry)
            creator = boards.owner(slot // BOARD_WORDS) if slot >= 0 else None
            if creator is not None and _is_plausible(limits, offset, size):
                findings.created[entry] = creator
                whole.append(entry)
            else:
                going.append(entry)
        elif state != _FREE:
            going.append(entry)
    return whole, spilled, going


def _end_spilled(dead: DeadTable, remains: Remains, going: list[int]) -> list[int]:
    """End those that go and are in no memory, whose state no reader knows; return the others."""
    for entry in going:
        if remains.states[entry] == _SPILLED:
            dead.renew(entry)
    return [entry for entry in going if remains.states[entry] != _SPILLED]


def _give_up(
    table: Table, boards: Boards, barrier: Callable[[], None], going: list[int]
) -> set[int]:
    """Hide the entries that go from readers, and return those that somebody pins."""
    for entry in going:
        table.spoil(entry)
        table.set_state(entry, EntryState.EVICTING)
    barrier()
    return boards.pinned_among(going)


def _is_plausible(limits: tuple[int, int], offset: int, size: int) -> bool:
    """Tell whether an extent can be one; `limits` are those of the data region."""
    if not size:
        return True
    return limits[0] <= offset and offset % ALIGNMENT == 0 and offset + size <= limits[1]


def _have_own_ids(remains: Remains, whole: list[int], spilled: list[int]) -> bool:
    """Tell whether no id is that of two objects."""
    object_ids = remains.object_ids
    return len({object_ids[each] for each in whole + spilled}) == len(whole) + len(spilled)


def _conflicting(remains: Remains, whole: list[int], spilled: list[int]) -> dict[int, None]:
    """Return what cannot be: objects that overlap another, or have an id that another has."""
    object_ids, offsets, extents = remains.object_ids, remains.offsets, remains.extents
    gone: dict[int, None] = {}
    ids: set[bytes] = set()
    end = 0
    for entry in spilled + sorted(whole, key=offsets.__getitem__):
        in_memory = remains.states[entry] != _SPILLED and extents[entry]
        if object_ids[entry] in ids or (in_memory and offsets[entry] < end):
            gone[entry] = None
            continue
        ids.add(object_ids[entry])
        if in_memory:
            end = offsets[entry] + extents[entry]
    return gone


def _sort_sealed(remains: Remains, findings: Findings, sealed: list[int]) -> None:
    """Say which of the sealed objects in memory may be evicted, and in which order."""
    keeps = remains.keeps
    findings.kept = {entry for entry in sealed if keeps[entry]}
    findings.cached = [entry for entry in sealed if not keeps[entry]]
    findings.cached_bytes = sum(map(remains.extents.__getitem__, findings.cached))
    findings.cached.sort(key=remains.sealed_ns.__getitem__)


def _referenced(remains: Remains, findings: Findings, entries: list[int]) -> list[bytes]:
    """Return the ids of those of these entries that belong to references, but for doomed ones."""
    codecs, doomed = remains.codecs, findings.doomed
    referenced = [entry for entry in entries if codecs[entry] & REFERENCED]
    return [remains.object_ids[entry] for entry in referenced if entry not in doomed]


def _find_copies(
    table: Table, remains: Remains, findings: Findings, entries: Iterable[int]
) -> None:
    """Say which objects have copies in the external store; a word that names none is made to say so."""
    if remains.containers:
        for entry in entries:
            container = remains.containers.get(entry)
            if container:
                findings.copies[entry] = container
            elif container is not None:
                table.set_copy(entry, 0, 0)  # it is damaged


def _leases(owners: dict[int, Owner], used: _Extents) -> dict[int, tuple[int, int]]:
    """Return what is left of each lease behind the last object in it."""
    leases: dict[int, tuple[int, int]] = {}
    taken = 0
    for board, owner in sorted(owners.items(), key=lambda item: item[1].lease_cursor):
        end = owner.lease_end
        cursor = used.end_of_last(owner.lease_cursor, end)
        if taken <= cursor < end and cursor % ALIGNMENT == end % ALIGNMENT == 0:
            leases[board] = cursor, end
            taken = end
    return leases
