"""Commitment: behind which parts of the data region there is memory.  Pure.

The region is divided into granules of `Layout.granule_bytes`.  Memory is committed, and given back, by granules: ahead
of need while the store is idle, when an extent is to be handed out, and after that never until it is given back.

Which granules
--------------
First fit hands out the lowest free addresses first.  So of the granules that are wholly free the lowest
stay committed (`floor_bytes` of them), and are committed ahead of need (at most 64 MiB of them); what lies above is
given back when it was not used for a while.  The two never undo each other, as the second is no more than the first.

*Used for a while*: an idle sweep passes over a granule that was handed out since the last one, and clears the mark,
as SIEVE does with objects.  Sweeps begin a period apart (`shmplasma.trims`); so a granule stays for one period at least
after its last use, and a store that fills and empties faster than that keeps all its memory.

Invariants
----------
* An extent is handed out only when all its granules are *ready*: committed by this store, and not given back since.
* *Ready* is taken away before the memory is, and *backed* (there may be memory) is noted before the memory is
  committed.  So nothing that fails in between makes a hole pass for memory, or hides memory from a sweep.
* A granule is given back only when the allocator says that all of it is free: nothing of it is used, leased or in
  limbo.
* The last granule is left alone where it is shorter than the others.

*A store that dies* takes all this with it.  Its successor takes nothing for ready, and all that was ever committed
(WATERMARK in the header, written before the commit) for backed.  Whatever it hands out it commits once more, which changes
nothing where there is memory; what it does not need it gives back.  So no death between a hole and the note of it can
lead to a SIGBUS.

*What clients remember.*  A client maps the pages of a granule for writing once (`shmplasma.writable`); a hole
takes the mapping away.  TRIMS in the header is raised before a hole is made, and a client that finds another number than before
forgets what it has mapped.  It looks when it has been given an extent, which nobody takes from it meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Protocol

from shmplasma.allocator import Allocator
from shmplasma.errors import CommitError
from shmplasma.layout import HeaderWord, Layout, mark_end, recover_end

__all__ = ["COMMIT_STEP", "FLOOR_BYTES", "Commitment", "Pages"]

COMMIT_STEP: Final = 4 << 20
"""Bytes that are committed in one go: tmpfs clears them at about 2 GB/s, so others wait 2 ms at most."""

_TRIM_STEP: Final = 16 << 20
"""Bytes that are given back in one go: 2 ms."""

_LOOKS_A_STEP: Final = 128
"""Free extents that a sweep looks at in one go: 2 ms."""

_LOOKS_AHEAD: Final = 1024
"""Free extents of a granule or more that are looked at for what to commit ahead of need, the lowest: 2 ms."""

_AHEAD: Final = 64 << 20
"""How much free room is committed ahead of need, while the store is idle."""

FLOOR_BYTES: Final = _AHEAD
"""How much free room stays committed, unless the operator says otherwise."""


class Pages(Protocol):
    """What is needed of the machine."""

    def commit(self, offset: int, size_bytes: int) -> None:
        """Put memory behind a part of the segment, or raise `shmplasma.errors.CommitError`."""

    def punch(self, offset: int, size_bytes: int) -> bool:
        """Give the memory behind whole pages of the segment back; tell whether that can be done here."""


class Commitment:
    """Which granules of the data region are committed.

    Parameters
    ----------
    layout : Layout
        The segment's layout.
    words : memoryview
        The segment as native 8-byte words, writable.
    allocator : Allocator
        Knows what is free.
    pages : Pages
        Commits and punches.
    floor_bytes : int
        How much free room stays committed.

    Notes
    -----
    Takes three bytes a granule.  Not safe to share between threads.
    """

    def __init__(
        self,
        layout: Layout,
        words: memoryview,
        allocator: Allocator,
        pages: Pages,
        floor_bytes: int = FLOOR_BYTES,
    ) -> None:
        self._words = words
        self._allocator = allocator
        self._pages = pages
        self._start = layout.data
        self._end = layout.data + layout.data_bytes
        self._granule = layout.granule_bytes
        n_granules = -(-layout.data_bytes // self._granule)
        self._ready = bytearray(n_granules)
        self._backed = bytearray(n_granules)
        self._recent = bytearray(n_granules)
        self._ever = 0
        self._floor = floor_bytes // self._granule
        self._ahead = min(_AHEAD, floor_bytes) // self._granule
        self._ahead_half = self._start
        self.is_ahead = False
        """Whether as much is committed ahead of need as should be, as far as is known."""
        self.is_stirred = False
        """Whether anything was committed or freed since the last sweep began, or was passed over by it."""
        self._keeps_all = False

    @property
    def committed_bytes(self) -> int:
        """Bytes of the data region behind which there is, or may be, memory; O(granules), 10 us a GiB."""
        total = self._backed.count(1) * self._granule
        return total - (self._short if self._backed[-1] else 0)

    @property
    def trims(self) -> int:
        """How often memory was given back since there is this segment, counting steps."""
        return int(self._words[HeaderWord.TRIMS])

    @property
    def _short(self) -> int:
        """By how much the last granule is shorter than the others."""
        return -(self._end - self._start) % self._granule

    # -- committing ----------------------------------------------------------------------------

    def is_ready(self, offset: int, size_bytes: int) -> bool:
        """Tell whether an extent of at least 1 byte may be handed out."""
        return self._ready.find(0, *self._span(offset, size_bytes)) < 0

    def step(self, offset: int, size_bytes: int) -> bool:
        """Commit one step of an extent that is to be handed out; tell whether it is ready.

        Raises
        ------
        CommitError
            The file system cannot give the pages.
        """
        first, last = self._span(offset, size_bytes)
        missing = self._ready.find(0, first, last)
        if missing >= 0:
            try:
                # Beyond the extent as well: the next one will lie there.
                self._commit(missing, len(self._ready))
            except CommitError:
                self._commit(missing, last)
            self.is_ahead = False
        return self._ready.find(0, first, last) < 0

    def _commit(self, first: int, last: int) -> None:
        """Commit one step of a range that begins with a granule which is not ready."""
        last = min(last, first + max(1, COMMIT_STEP // self._granule))
        ready = self._ready.find(1, first, last)
        last = last if ready < 0 else ready
        offset, size = self._extent(first, last)
        end = offset + size - self._start
        if end > self._ever:
            self._ever = end
            mark_end(self._words, HeaderWord.WATERMARK, end)
        self._backed[first:last] = b"\1" * (last - first)
        self._pages.commit(offset, size)
        self._ready[first:last] = b"\1" * (last - first)
        self.is_stirred = True

    def hand_out(self, offset: int, size_bytes: int) -> None:
        """Take note that an extent is taken out of the free room."""
        first, last = self._span(offset, size_bytes)
        self._recent[first:last] = b"\1" * (last - first)
        if offset + size_bytes > self._ahead_half:
            self.is_ahead = False

    def freed(self) -> None:
        """Take note that an extent has become free room."""
        self.is_stirred = True

    def step_ahead(self) -> None:
        """Commit one step ahead of need, or find that there is nothing to do until more room is handed out.

        Raises
        ------
        CommitError
            The file system cannot give the pages.
        """
        position, left, looks = self._start, self._ahead, 0
        self._ahead_half = self._end
        while left and looks < _LOOKS_AHEAD and (found := self._free_granules(position)):
            position, first, last = found
            looks += 1
            last = min(last, first + left)
            missing = self._ready.find(0, first, last)
            if missing >= 0:
                self._commit(missing, last)
                return
            if left > self._ahead // 2 >= left - (last - first):
                self._ahead_half = self._start + (first + left - self._ahead // 2) * self._granule
            left -= last - first
        self.is_ahead = True

    def commit_all(self) -> Iterator[int]:
        """Commit the whole region; yield how much is ready, after each step.

        Raises
        ------
        CommitError
            The file system cannot give the pages.
        """
        size = self._end - self._start
        while not self.step(self._start, size):
            yield self._ready.count(1) * self._granule
        yield size

    # -- giving back ---------------------------------------------------------------------------

    def sweep(self, *, all_of_it: bool) -> Iterator[int]:
        """Give back free room above the floor, by steps; yield the bytes of each.

        Parameters
        ----------
        all_of_it : bool
            Also what was handed out since the last sweep.

        Notes
        -----
        Anything may be allocated and freed between two steps.  O(free extents of a granule or more).
        """
        self.is_stirred = False
        position, spared, looks = self._start, self._floor, 0
        while not self._keeps_all and (found := self._free_granules(position)):
            position, first, last = found
            kept = min(spared, last - first)
            spared -= kept
            looks += 1
            run = self._run(first + kept, last, all_of_it=all_of_it)
            if run is not None:
                # The rest of the extent is for the next step, which asks again what is free.
                position = self._start + run[1] * self._granule
                yield self._give_back(*run)
            elif not looks % _LOOKS_A_STEP:
                yield 0

    def _run(self, first: int, last: int, *, all_of_it: bool) -> tuple[int, int] | None:
        """Return the first granules of a free range that are to be given back in one go, if there are any."""
        while (first := self._backed.find(1, first, last)) >= 0:
            stop = min(last, first + max(1, _TRIM_STEP // self._granule))
            stop = _find(self._backed, 0, first, stop)
            if all_of_it:
                return first, stop
            if not self._recent[first]:
                return first, _find(self._recent, 1, first, stop)
            stop = _find(self._recent, 0, first, stop)
            self._recent[first:stop] = bytes(stop - first)
            self.is_stirred = True
            first = stop
        return None

    def _give_back(self, first: int, last: int) -> int:
        """Make a hole of free granules, and return how many bytes that was."""
        offset, size = self._extent(first, last)
        self._ready[first:last] = bytes(last - first)
        self._words[HeaderWord.TRIMS] += 1
        if not self._pages.punch(offset, size):
            self._keeps_all = True  # as the machine takes nothing back
            return 0
        self._backed[first:last] = bytes(last - first)
        return size

    # -- granules ------------------------------------------------------------------------------

    def _span(self, offset: int, size_bytes: int) -> tuple[int, int]:
        """Return the granules that an extent touches."""
        start = offset - self._start
        return start // self._granule, -(-(start + size_bytes) // self._granule)

    def _extent(self, first: int, last: int) -> tuple[int, int]:
        """Return offset and size of granules."""
        offset = self._start + first * self._granule
        return offset, min(self._start + last * self._granule, self._end) - offset

    def _free_granules(self, position: int) -> tuple[int, int, int] | None:
        """Return where the first free extent of a granule or more beyond a position ends, and the granules that it covers.

        It may cover none.
        """
        found = self._allocator.next_free(position, self._granule)
        if found is None:
            return None
        offset, size = found
        first = -(-(offset - self._start) // self._granule)
        last = (offset + size - self._start) // self._granule
        return offset + size, first, max(first, last)

    # -- recovering ----------------------------------------------------------------------------

    def recover(self) -> None:
        """Take over the region of a store that has died: nothing is ready, and much may be backed."""
        limit = self._end - self._start
        ever = recover_end(self._words, HeaderWord.WATERMARK, limit)
        last = -(-ever // self._granule)
        self._ever = min(last * self._granule, limit)
        mark_end(self._words, HeaderWord.WATERMARK, self._ever)
        self._backed[:last] = b"\1" * last
        self.is_stirred = True

    # -- proof ---------------------------------------------------------------------------------

    def check(self) -> None:
        """Prove that whatever is ready is noted as backed, and lies below the mark for a successor."""
        for granule, ready in enumerate(self._ready):
            assert self._backed[granule] >= ready, f"granule {granule} is ready without memory"
        last = self._backed.rfind(1)
        end = sum(self._extent(last, last + 1)) - self._start if last >= 0 else 0
        assert end <= self._ever, "a successor would not know of memory that is committed"


def _find(flags: bytearray, value: int, first: int, last: int) -> int:
    """Return the first place of a value in a range, or the range's end."""
    found = flags.find(value, first, last)
    return last if found < 0 else found
