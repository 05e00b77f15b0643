"""Where to make room by moving objects: the plan, not the moves.  Pure.

Free room is enough and lies in pieces.  There are two ways to make one piece of it, in a range that holds nothing which
has to stay where it is:

* empty a *window* of the wanted size, moving what is in it to free extents elsewhere.  The best window is the one with
  the most free room in it already, as the least has to be moved.  An object that fits into no extent elsewhere spoils it.
* slide all objects of a *run* of extents down, so that its free room comes together at its end.  The best run is the one
  with the fewest bytes between its extents.  It always succeeds, but the objects move by less than their length.

Both are found in one pass over the free extents with two pointers: O(n) for n free extents and ranges.  What lies
between the extents need not be known for that.  Generators yield now and then, so that others get their turn;
what they find may be outdated when they have found it, and whoever uses it looks again.

All positions are in lines of `ALIGNMENT` bytes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Generator, Iterable, Sequence
from itertools import accumulate
from operator import sub
from typing import Final

__all__ = ["Range", "Search", "best_run", "best_window", "movable_ranges"]

Range = tuple[int, int]
"""From the first line to before the second."""

Search = Generator[None, None, Range | None]
"""A search that yields while it goes on, and returns what it has found."""

_LOOKS: Final = 2048
"""Free extents between two yields: 1 ms."""

_BEYOND: Final = 1 << 62
"""A line that no segment has."""


def movable_ranges(start: int, end: int, fixed: Iterable[Range]) -> list[Range]:
    """Return the ranges of ``[start, end)`` between what is fixed; O(n log n).

    Examples
    --------
    >>> movable_ranges(0, 100, [(50, 60), (0, 10), (55, 70)])
    [(10, 50), (70, 100)]
    """
    ranges: list[Range] = []
    position = start
    for first, last in sorted(fixed):
        if first == last:  # an object of no bytes is in nobody's way
            continue
        if first > position:
            ranges.append((position, first))
        position = max(position, last)
    if position < end:
        ranges.append((position, end))
    return ranges


def best_window(
    ends: Sequence[int], sizes: Sequence[int], ranges: Iterable[Range], wanted: int
) -> Search:
    """Find the window of `wanted` lines in one of the ranges that has the most free lines in it.

    Parameters
    ----------
    ends, sizes : sequence of int
        The free extents, by address.
    ranges : iterable of Range
        Where it may lie.
    wanted : int
        At least 1.

    Returns
    -------
    Range or None
        It begins where a free extent begins, or ends where one ends, or is the first of its range; None when no range
        is as long.
    """
    before = [0, *accumulate(sizes)]
    yield
    starts = [*map(sub, ends, sizes), _BEYOND]
    yield
    best: Range | None = None
    most, count = -1, len(ends)
    for low, high in ranges:
        if high - low < wanted:
            continue
        first, last = bisect_left(starts, low), bisect_left(starts, high, hi=count)
        ending = (end - wanted for end in ends[first:last])
        for candidates in ((low,), starts[first:last], ending):
            left, right = bisect_left(ends, low + 1), bisect_left(ends, low + wanted + 1)
            for looked, begin in enumerate(candidates):
                stop = begin + wanted
                if low <= begin and stop <= high:
                    while left < count and ends[left] <= begin:
                        left += 1
                    while right < count and ends[right] <= stop:
                        right += 1
                    free = before[right] - before[left]
                    if starts[right] < stop:
                        free += stop - starts[right]
                    if starts[left] < begin:
                        free -= begin - starts[left]
                    if free > most:
                        most, best = free, (begin, stop)
                if looked % _LOOKS == _LOOKS - 1:
                    yield
    return best


def best_run(
    ends: Sequence[int], sizes: Sequence[int], ranges: Iterable[Range], wanted: int
) -> Search:
    """Find the run of free extents in one of the ranges that has `wanted` free lines and the fewest others between them.

    Parameters and yields are those of `best_window`; free extents do not reach out of the ranges, as what is fixed is used.

    Returns
    -------
    Range or None
        From the start of the first extent to the end of the last; None when no range has as many free lines.
    """
    before = [0, *accumulate(sizes)]
    yield
    best: Range | None = None
    least = 0
    for low, high in ranges:
        first, last = bisect_left(ends, low + 1), bisect_left(ends, high + 1)
        for stop in range(first, last):
            while before[stop + 1] - before[first + 1] >= wanted:
                first += 1
            free = before[stop + 1] - before[first]
            if free >= wanted:
                begin = ends[first] - sizes[first]
                between = ends[stop] - begin - free
                if best is None or between < least:
                    least, best = between, (begin, ends[stop])
            if stop % _LOOKS == _LOOKS - 1:
                yield
    return best
