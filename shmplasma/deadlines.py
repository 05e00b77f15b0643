"""Deadlines: which of many numbered things has its time next.  Pure.

A heap has all times that were ever set, and a dictionary those that hold.  What was forgotten, or set anew, is skipped when it comes to the top; and
sorted out when it is more than the rest, as it does not come to the top while an older one stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from typing import Final

__all__ = ["Deadlines"]

_STALE: Final = 1024
"""So many times that do not hold any more may be remembered in any case: the others are sorted anew once for as many."""


class Deadlines:
    """Times of numbered things.

    Notes
    -----
    O(log n) to set one, amortized; O(1) to forget one.

    Examples
    --------
    >>> deadlines = Deadlines()
    >>> deadlines.set(7, 100)
    >>> deadlines.set(8, 50)
    >>> deadlines.forget(8)
    >>> deadlines.next_ns, deadlines.take(99), deadlines.take(100), deadlines.next_ns
    (100, None, 7, None)
    """

    __slots__ = ("_due_ns", "_heap")

    def __init__(self) -> None:
        self._due_ns: dict[int, int] = {}
        self._heap: list[tuple[int, int]] = []

    def __bool__(self) -> bool:
        """Tell whether anything has a time."""
        return bool(self._due_ns)

    def __iter__(self) -> Iterator[int]:
        """Iterate over what has a time."""
        return iter(self._due_ns)

    def set(self, number: int, due_ns: int) -> None:
        """Give something a time, instead of any other one."""
        self._due_ns[number] = due_ns
        heappush(self._heap, (due_ns, number))
        if len(self._heap) > 2 * len(self._due_ns) + _STALE:
            self._heap = [(at_ns, each) for each, at_ns in self._due_ns.items()]
            heapify(self._heap)

    def forget(self, number: int) -> None:
        """Take the time of something away, if it has one."""
        self._due_ns.pop(number, None)

    @property
    def next_ns(self) -> int | None:
        """The first time of all; None where there is none."""
        heap = self._heap
        while heap:
            due_ns, number = heap[0]
            if self._due_ns.get(number) == due_ns:
                return due_ns
            heappop(heap)
        return None

    def take(self, now_ns: int) -> int | None:
        """Return the number whose time is the first, if it has come, and take its time away."""
        due_ns = self.next_ns
        if due_ns is None or due_ns > now_ns:
            return None
        number = heappop(self._heap)[1]
        del self._due_ns[number]
        return number

    def check(self) -> None:
        """Prove that every time comes to the top."""
        heap = set(self._heap)
        assert all((due_ns, number) in heap for number, due_ns in self._due_ns.items())
