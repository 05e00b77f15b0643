"""Which object goes next when room is needed: SIEVE over entry indices.

SIEVE (Zhang, Yang, Yue, Vigfusson and Rashmi, "SIEVE is Simpler than LRU: an Efficient Turn-Key
Eviction Algorithm for Web Caches", NSDI '24) keeps a queue in order of insertion, a visited bit for
each entry, and a hand.  A read sets the bit and moves nothing, so readers need neither a lock nor a
message.  To find a victim the hand walks from the oldest entry towards the newest and, past the
newest, starts again with the oldest.  It clears the bit of a visited entry and leaves that one
where it is; the first one without is the victim, and the hand stays behind it.  What survives thus
keeps its place, while newcomers are sifted soon: that is what beats LRU on most traces.

The queue is a doubly linked ring in two arrays of 4-byte links.  Node 0 is the ring's joint,
between the newest and the oldest; entry i is node i + 1.

Invariants
----------
* ``newer[older[n]] == older[newer[n]] == n`` for each node n in the ring; all other links are
  `_NOWHERE`.
* The hand is the node to be looked at next.  On node 0 it has passed the newest.
* The visited bytes are a hint that any client may write: every value is lawful, and none can lead
  to more than a bad choice of victim, or a sweep of two rounds.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

__all__ = ["NO_PAUSE", "PAUSE", "Sieve"]

PAUSE: Final = -1
"""What a sweep yields instead of an entry when it has passed as many as it is to pass at once."""

NO_PAUSE: Final = 1 << 32
"""More than there are entries."""
_NOWHERE: Final = 0xFFFF_FFFF
"""The links of a node outside the ring; as an index it is beyond any array."""
_GROWTH: Final = 1024
"""New entries mostly come in order, so that links are made for many of them at once."""


class Sieve:
    """A queue of entries with the SIEVE policy.

    Parameters
    ----------
    visited : memoryview
        One writable byte an entry (format ``B``), shared with the readers, who write 1 when they
        read the entry; any value but 0 means visited.  Its length is the number of entries.

    Notes
    -----
    `insert`, `remove` and ``in`` take O(1).  Memory is about 8.5 bytes an entry, up to the highest
    index ever inserted.  Not safe to share between threads; `visited` may change at any time.

    Examples
    --------
    >>> visited = memoryview(bytearray(3))
    >>> sieve = Sieve(visited)
    >>> for index in range(3):
    ...     sieve.insert(index)
    >>> visited[0] = 1
    >>> victim = next(sieve.sweep())
    >>> sieve.remove(victim)
    >>> victim, list(sieve), visited[0]
    (1, [0, 2], 0)
    """

    __slots__ = ("_hand", "_length", "_newer", "_older", "_visited")

    def __init__(self, visited: memoryview) -> None:
        self._visited = visited
        self._newer = array("I", [0])
        self._older = array("I", [0])
        self._hand = 0
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __contains__(self, index: int) -> bool:
        return 0 <= index < len(self._newer) - 1 and self._newer[index + 1] != _NOWHERE

    def queued(self, indices: Iterable[int]) -> list[int]:
        """Return those of these that are in the queue; 50 ns each, where ``in`` takes 100."""
        newer, end = self._newer, len(self._newer) - 1
        return [each for each in indices if 0 <= each < end and newer[each + 1] != _NOWHERE]

    def __iter__(self) -> Iterator[int]:
        """Yield the entries from the oldest to the newest; the queue must not change meanwhile."""
        node = self._newer[0]
        while node:
            yield node - 1
            node = self._newer[node]

    def upcoming(self) -> Iterator[int]:
        """Yield the entries from the hand to the newest; the queue must not change meanwhile."""
        node = self._hand or self._newer[0]
        while node:
            yield node - 1
            node = self._newer[node]

    def insert(self, index: int) -> None:
        """Put an entry at the new end of the queue, not visited.

        Parameters
        ----------
        index : int
            An entry that is not queued, from 0 to ``len(visited) - 1``.

        Raises
        ------
        ValueError
            There is no such entry, or it is queued already.
        """
        if index < 0:
            raise ValueError(f"there is no entry {index} below 0")
        newer, older = self._newer, self._older
        node = index + 1
        try:
            if newer[node] != _NOWHERE:
                raise ValueError(f"entry {index} is in the queue already")
            self._visited[index] = 0
        except IndexError:
            if index >= len(self._visited):
                text = f"there is no entry {index} among {len(self._visited)}"
                raise ValueError(text) from None
            self._visited[index] = 0
            size = min(node + _GROWTH, len(self._visited)) + 1
            missing = array("I", [_NOWHERE]) * (size - len(newer))
            newer.extend(missing)
            older.extend(missing)
        newest = older[0]
        newer[newest] = older[0] = node
        older[node] = newest
        newer[node] = 0
        self._length += 1

    def fill(self, indices: Sequence[int]) -> None:
        """Fill an empty queue with entries, the oldest first; what was visited stays so.

        Notes
        -----
        O(n), and five times as fast as `insert` one by one.
        """
        assert not self._length, "the queue is not empty"
        size = max(indices, default=-1) + 2
        newer = array("I", [_NOWHERE]) * size
        older = array("I", [_NOWHERE]) * size
        last = 0
        for index in indices:
            newer[last] = index + 1
            older[index + 1] = last
            last = index + 1
        newer[last] = 0
        older[0] = last
        self._newer, self._older = newer, older
        self._length = len(indices)

    def remove(self, index: int) -> None:
        """Take an entry out of the queue; a hand that is on it moves to the next newer one.

        Parameters
        ----------
        index : int
            An entry that is queued.

        Raises
        ------
        ValueError
            The entry is not queued.
        """
        node, newers, olders = index + 1, self._newer, self._older
        if not 0 < node < len(newers) or newers[node] == _NOWHERE:
            raise ValueError(f"entry {index} is not in the queue")
        older, newer = olders[node], newers[node]
        newers[older], olders[newer] = newer, older
        newers[node] = olders[node] = _NOWHERE
        if self._hand == node:
            self._hand = newer
        self._length -= 1

    def sweep(self, at_once: int = NO_PAUSE) -> Iterator[int]:
        """Move the hand, for two rounds at most, and yield each entry that it would evict.

        Parameters
        ----------
        at_once : int, optional
            How many entries are passed before a `PAUSE`; by default there is none.

        Yields
        ------
        int
            A candidate, still queued, with the hand behind it.  `remove` it to evict it; one that
            is left in place (somebody has it pinned) is not offered again by this sweep.  Or `PAUSE`.

        Notes
        -----
        Any entry may be removed before the next candidate is taken, and the sweep may be dropped at
        any point: the hand stays, and the next sweep goes on from there.  A sweep to its end offers
        every entry but those that are read again while it runs.  It takes O(1) for each entry
        passed, and remembers those that were left in place.
        """
        left_in_place: set[int] = set()
        newer, visited = self._newer, self._visited
        for _ in range(2):
            all_offered = True
            for passed in range(self._length):
                if passed and not passed % at_once:
                    yield PAUSE
                node = self._hand or newer[0]
                if not node:
                    return
                self._hand = newer[node]
                index = node - 1
                if visited[index]:
                    visited[index] = 0
                    all_offered = False
                elif index not in left_in_place:
                    yield index
                    if newer[node] != _NOWHERE:
                        left_in_place.add(index)
            if all_offered:
                return

    def check(self) -> None:
        """Prove the invariants of the module.

        Raises
        ------
        AssertionError
            Something is wrong: a bug of this module.
        """
        newer, older = self._newer, self._older
        assert len(newer) == len(older) <= len(self._visited) + 1, "there are links of no entry"
        queued = list(self)
        ring = [0, *(index + 1 for index in queued)]
        assert len(set(ring)) == len(ring) == self._length + 1, "the length is wrong"
        for node, following in zip(ring, [*ring[1:], 0], strict=True):
            assert newer[node] == following, f"node {node} has a wrong newer one"
            assert older[following] == node, f"node {following} has a wrong older one"
        for links in (newer, older):
            assert links.count(_NOWHERE) == len(links) - len(ring), "a node outside has links"
        assert self._hand in ring, "the hand is on a node outside the queue"
