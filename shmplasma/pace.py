"""How many threads copy fastest, found out while they copy.

Threads that write past the cache move two bytes for each that they copy; others move three, as a line is read before it is overwritten.
glibc writes past the cache from a size on that it makes out from what the processor says of its caches: some MiB on
one machine, 48 on another.  There two threads copied 64 MiB at 8.4 GB/s, each of them less than these 48, and one thread at
10.2; 512 MiB at 12.9 and 10.3.  Elsewhere two are faster at any size.  And where the other processor is busy, or this process may not use
it, one is as good as two.

A virtual machine may have two processors of its host at one time, and the halves of one at another: then two threads copy 45 GB/s or 25, and one
copies 25 all the time, from one second to the next.  So where one is about as good as two, two copy.

What several threads take is measured at each of their copies, so it is seen when they become slow.  One thread that was far slower than they is
tried again seldom: it would not become faster by itself, and each trial costs a copy's time.
"""

from __future__ import annotations

from typing import Final

__all__ = ["MEASURED_BYTES", "Pace"]

MEASURED_BYTES: Final = 16 << 20
"""Less is copied too fast to be measured once, and two threads were always faster at it."""
_TRIAL: Final = 6
"""The number of the first copy that one thread makes.  Those before it also wait for memory that was never touched, and tell little:
the first ones of 64 MiB by two threads took 17, 3, 2.2 and 1.8 ms."""
_SLOWER: Final = 1.125
"""So many times as slow as before a way is held to be at most, after another copy."""
_WORTH: Final = 1.15
"""So many times as fast as several threads one has to be."""
_AGAIN: Final = 16
"""One of so many copies goes the way that was slower, as that may change."""
_FAR: Final = 1.5
_SELDOM: Final = 128
"""One of so many is made by one thread where that took at least `_FAR` times as long."""


class Pace:
    """Chooses between one thread and several, for each size on its own.

    Notes
    -----
    Thread-safe; copies at the same time spoil each other's figures, which later ones make good.

    Examples
    --------
    >>> pace = Pace()
    >>> for ns in 6 * [9_000_000] + [7_000_000]:  # the last of these is made by one thread
    ...     pace.took(64 << 20, pace.threads(64 << 20, most=2), ns)
    >>> pace.threads(64 << 20, most=2)
    1
    """

    __slots__ = ("_copies", "_ns_a_byte")

    def __init__(self) -> None:
        self._copies: dict[int, int] = {}
        self._ns_a_byte: dict[tuple[int, bool], float] = {}

    def threads(self, size_bytes: int, most: int) -> int:
        """Return how many threads should copy so many bytes: 1 or `most`."""
        if size_bytes < MEASURED_BYTES or most < 2:
            return most
        size = size_bytes.bit_length()
        copies = self._copies[size] = self._copies.get(size, -1) + 1
        several = self._ns_a_byte.get((size, True))
        one = self._ns_a_byte.get((size, False))
        if several is None:
            return most
        if one is None:
            return most if copies < _TRIAL else 1
        is_slower_one = copies % (_SELDOM if one > several * _FAR else _AGAIN) == 0
        return most if (several < one * _WORTH) != is_slower_one else 1

    def took(self, size_bytes: int, threads: int, ns: int) -> None:
        """Take note of how long a copy took, in nanoseconds."""
        way = size_bytes.bit_length(), threads > 1
        now = ns / size_bytes
        before = self._ns_a_byte.get(way, now)
        # One copy may be slow for many reasons, and is fast for one.
        self._ns_a_byte[way] = min(now, before * _SLOWER)
