"""Holding: what of the data region a compaction keeps for itself, neither free nor an object's.  Pure.

Invariants
----------
* Of the range that is being emptied all that is free is *held*: the allocator hands out none of it, and what
  becomes free in it meanwhile is held as well (`Holding.claim`).
* An extent that an object is being copied to, its *target*, is kept until the object has arrived.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from shmplasma.allocator import Allocator
from shmplasma.layout import ALIGNMENT, align_up

__all__ = ["Holding"]


class Holding:
    """What one compaction holds.

    Parameters
    ----------
    allocator : Allocator
        Has what is free.
    give_back : callable
        ``give_back(offset, size_bytes)`` frees an extent, of which `claim` may keep a part.
    """

    def __init__(self, allocator: Allocator, give_back: Callable[[int, int], None]) -> None:
        self._allocator = allocator
        self._give_back = give_back
        self._held: Allocator | None = None
        self._range = 0, 0
        self._targets: dict[int, int] = {}

    # -- all of it -----------------------------------------------------------------------------

    def extents(self) -> list[tuple[int, int]]:
        """Return offset and size of all that is neither free nor an object's."""
        held = [] if self._held is None else list(self._held.free_extents())
        return [*held, *self._targets.items()]

    @property
    def n_bytes(self) -> int:
        """Bytes that will be free again when the compaction is done."""
        held = 0 if self._held is None else self._held.free_bytes
        return held + sum(self._targets.values())

    # -- the range that is being emptied -------------------------------------------------------

    def claim(self, offset: int, size_bytes: int) -> list[tuple[int, int]]:
        """Hold what has become free in the range; return the rest, as offset and size."""
        end = offset + align_up(size_bytes, ALIGNMENT)
        low, high = self._range
        first, last = max(offset, low), min(end, high)
        if self._held is None or first >= last:
            return [(offset, size_bytes)]
        self._held.free(first, last - first)
        rest = (offset, first - offset), (last, end - last)
        return [(start, size) for start, size in rest if size]

    def hold(self, low: int, high: int) -> Iterator[None]:
        """Take what is free in a range out of the allocator; yield after each extent."""
        self._held = held = Allocator(low, high)
        held.reserve(low, high - low)
        self._range = low, high
        position = low
        while (found := self._allocator.next_free(position, 1)) is not None and found[0] < high:
            offset, size = found
            size = min(size, high - offset)
            self._allocator.reserve(offset, size)
            held.free(offset, size)
            position = offset + size
            yield

    def let_go(self) -> None:
        """Give back what is held of the range."""
        held, self._held = self._held, None
        if held is not None:
            for offset, size in held.free_extents():
                self._give_back(offset, size)

    # -- targets -------------------------------------------------------------------------------

    def take(self, target: int, size: int) -> bool:
        """Take an extent out of what is held, for a target; tell whether it is there."""
        assert self._held is not None, "it is taken out of what is held"
        found = self._held.next_free(target, size)
        if found is None or found[0] != target:
            return False
        self._held.reserve(target, size)
        return True

    def keep(self, target: int, size: int) -> None:
        """Keep an extent that was allocated, or taken, until an object has arrived there."""
        self._targets[target] = size

    def arrived(self, target: int) -> None:
        """Take note that the extent is an object's now."""
        del self._targets[target]

    def give_up(self, target: int) -> None:
        """Give back an extent if no object has arrived there."""
        if target in self._targets:
            self._give_back(target, self._targets.pop(target))
