"""Recovery: what a store that is started again makes of the segment that a dead one has left.  Pure.

Everything is rebuilt from the table, the control lines and the boards; of the dead store's own memory nothing
is needed.  Clients go on reading meanwhile, and hold what they hold.

What a death leaves
-------------------
The store is the only writer of the table and may die between any two of its stores to memory.  x86-64 keeps
their order, and a death undoes none of them.  An entry is judged by its state and its checksum (``verdict``):

==================  ==========  ==================================================================================
state               verdict     what happened, and what becomes of it
==================  ==========  ==================================================================================
SEALED              complete    an object: stays
DOOMED              complete    deleted while it was pinned, perhaps being taken: stays so until its last release
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

*Taken but not given away.*  A take frees the extents of a batch one by one, and hands out none of them before
it has changed the state of each to FREE.  So whatever is still EVICTING lies where it lay.

*Leases.*  What a client may still fill lies between the cursor of its lease and the end.  A store that
died between entering an object and moving the cursor has left an object in there; the cursor moves behind it.
Its record is not acknowledged and comes again (`shmplasma.outbox`): it lies before the cursor and is known by
that.

*Boards* stay as they are.  The clients are held to be connected until they are, or until they end.  One that
has ended leaves when its outbox has been read: whatever it had put is there, although it died with its store.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from operator import attrgetter

from shmplasma.control import Owner
from shmplasma.layout import ALIGNMENT, BOARD_WORDS, EntryState, Layout, align_up
from shmplasma.pins import Boards
from shmplasma.table import Remains, Table, Verdict

__all__ = ["Findings", "examine"]


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
    used : list of (offset, size)
        All extents that are not free, by address.
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
    used: list[tuple[int, int]] = field(default_factory=list)
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
    end = table.take_over()
    finish_move()
    findings = Findings(boards.recover())
    limits = layout.data, layout.data + layout.data_bytes
    spilled: list[Remains] = []
    whole, going = _judge(limits, table, boards, findings, spilled)
    kept, going = _without_conflicts(whole, spilled, going)
    for remains in going:
        findings.created.pop(remains.entry, None)
    findings.copies = {each.entry: each.container for each in kept if each.container}
    findings.spilled = {each.entry for each in kept if each.state == EntryState.SPILLED}
    elsewhere = [each for each in kept if each.state == EntryState.SPILLED]
    kept = [each for each in kept if each.state != EntryState.SPILLED]
    extents = [(remains.offset, remains.size_bytes) for remains in kept if remains.size_bytes]
    _give_up(limits, table, boards, barrier, findings, going, extents)
    for remains in kept:
        if remains.state == EntryState.DOOMED:
            findings.doomed.add(remains.entry)
        elif remains.entry not in findings.created and remains.state != EntryState.SEALED:
            table.set_state(remains.entry, EntryState.SEALED)
    sealed = [remains for remains in kept if remains.entry not in findings.created]
    findings.kept = {remains.entry for remains in sealed if remains.keep}
    cached = [remains for remains in sealed if not remains.keep]
    cached.sort(key=attrgetter("sealed_ns"))
    findings.cached = [remains.entry for remains in cached]
    findings.cached_bytes = sum(align_up(remains.size_bytes, ALIGNMENT) for remains in cached)
    kept += elsewhere
    objects = [(remains.object_id, remains.entry) for remains in kept]
    entries = [remains.entry for remains in kept]
    table.relink(objects, set(range(end)).difference(entries, findings.limbo))
    extents.sort()
    findings.leases = _leases(findings.owners, extents)
    leased = [(cursor, stop - cursor) for cursor, stop in findings.leases.values()]
    findings.used = sorted(extents + leased)
    return findings


def _judge(
    limits: tuple[int, int],
    table: Table,
    boards: Boards,
    findings: Findings,
    spilled: list[Remains],
) -> tuple[list[Remains], list[Remains]]:
    """Separate what stays from what goes, and note the creators of what is unsealed."""
    whole: list[Remains] = []
    going: list[Remains] = []
    low, high = limits
    for remains in table.scan():
        if remains.state == EntryState.SPILLED and remains.container:
            spilled.append(remains)
            continue
        stays = remains.verdict is Verdict.COMPLETE and remains.state != EntryState.SPILLED
        offset, size = remains.offset, remains.size_bytes
        if stays and low <= offset and not offset % ALIGNMENT and offset + size <= high:
            whole.append(remains)  # as nearly all of them do
            continue
        if remains.verdict is Verdict.BEGUN and remains.state == EntryState.CREATED:
            creator = boards.owner(remains.slot // BOARD_WORDS) if remains.slot >= 0 else None
            stays = creator is not None
            if creator is not None:
                findings.created[remains.entry] = creator
        (whole if stays and _is_plausible(limits, remains) else going).append(remains)
    return whole, going


def _give_up(
    limits: tuple[int, int],
    table: Table,
    boards: Boards,
    barrier: Callable[[], None],
    findings: Findings,
    going: list[Remains],
    extents: list[tuple[int, int]],
) -> None:
    """Free the entries that go; those that somebody pins keep their extents until the release."""
    if not going:
        return
    for remains in going:
        table.set_state(remains.entry, EntryState.EVICTING)
    barrier()
    pinned = boards.pinned()
    for remains in going:
        held = remains.entry in pinned and remains.size_bytes and _is_plausible(limits, remains)
        if held and _is_clear(extents, remains):
            findings.limbo.add(remains.entry)
            extents.append((remains.offset, remains.size_bytes))
        else:
            table.renew(remains.entry)
    findings.dropped = len(going)


def _is_plausible(limits: tuple[int, int], remains: Remains) -> bool:
    """Tell whether an extent can be one; `limits` are those of the data region."""
    offset, size = remains.offset, remains.size_bytes
    if not size:
        return True
    return limits[0] <= offset and offset % ALIGNMENT == 0 and offset + size <= limits[1]


def _without_conflicts(
    found: Iterable[Remains], spilled: Iterable[Remains], going: list[Remains]
) -> tuple[list[Remains], list[Remains]]:
    """Let go as well what cannot be: objects that overlap, or have an id that another has."""
    kept: list[Remains] = []
    ids: set[bytes] = set()
    for remains in spilled:
        (going if remains.object_id in ids else kept).append(remains)
        ids.add(remains.object_id)
    end = 0
    for remains in sorted(found, key=attrgetter("offset", "size_bytes")):
        object_id, size = remains.object_id, remains.size_bytes
        if object_id in ids or (size and remains.offset < end):
            going.append(remains)
            continue
        ids.add(object_id)
        kept.append(remains)
        if size:
            end = remains.offset + align_up(size, ALIGNMENT)
    return kept, going


def _is_clear(extents: Iterable[tuple[int, int]], remains: Remains) -> bool:
    """Tell whether an extent overlaps none of these; seldom asked."""
    end = remains.offset + align_up(remains.size_bytes, ALIGNMENT)
    return all(
        end <= offset or remains.offset >= offset + align_up(size, ALIGNMENT)
        for offset, size in extents
    )


def _leases(owners: dict[int, Owner], extents: list[tuple[int, int]]) -> dict[int, tuple[int, int]]:
    """Return what is left of each lease behind the last object in it; `extents` are sorted."""
    leases: dict[int, tuple[int, int]] = {}
    taken = 0
    for board, owner in sorted(owners.items(), key=lambda item: item[1].lease_cursor):
        cursor, end = owner.lease_cursor, owner.lease_end
        # Only the last extent that begins before the cursor can reach into the lease.
        at = max(0, bisect_left(extents, (cursor, 0)) - 1)
        while at < len(extents) and extents[at][0] < end:
            offset, size = extents[at]
            cursor = max(cursor, offset + align_up(size, ALIGNMENT))
            at += 1
        if taken <= cursor < end and cursor % ALIGNMENT == end % ALIGNMENT == 0:
            leases[board] = cursor, end
            taken = end
    return leases
