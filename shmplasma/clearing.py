"""Where to make one extent by letting objects go that have a copy elsewhere: the plan.  Pure.

Free room is enough, or nearly, and lies in pieces, and between some of them lie only objects that can be had again.  To let
these go costs nothing now, and a read later if they are wanted; to move them, or others, costs at least as much, and at
once.  So of all stretches that are long enough the one goes in which least is lost.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import itemgetter

__all__ = ["cheapest_stretch"]


def cheapest_stretch(
    free: Iterable[tuple[int, int]], goods: Iterable[tuple[int, int, int, int]], wanted: int
) -> list[int]:
    """Choose objects whose going makes a free extent of `wanted` bytes, together with what is free between them.

    Parameters
    ----------
    free : iterable of (offset, size)
        Free extents.
    goods : iterable of (offset, size, entry, price)
        Extents of objects that may go; none overlaps another one, or a free one.
    wanted : int
        At least 1.

    Returns
    -------
    list of int
        The entries of those that are the cheapest together; empty when there is no such stretch.

    Notes
    -----
    O(n log n) for n extents of both kinds.

    Examples
    --------
    >>> cheapest_stretch([(0, 10), (30, 10)], [(10, 20, 7, 20), (40, 30, 8, 30)], 40)
    [7]
    """
    pieces = [(offset, size, -1, 0) for offset, size in free]
    pieces += goods
    pieces.sort(key=itemgetter(0))
    best: list[int] = []
    least = -1
    first, start, end, price = 0, 0, -1, 0
    for last, (offset, size, _, cost) in enumerate(pieces):
        if offset != end:
            first, start, price = last, offset, 0
        end = offset + size
        price += cost
        while end - (start + pieces[first][1]) >= wanted:
            start += pieces[first][1]
            price -= pieces[first][3]
            first += 1
        if end - start >= wanted and (least < 0 or price < least):
            least = price
            best = [piece[2] for piece in pieces[first : last + 1] if piece[2] >= 0]
    return best
