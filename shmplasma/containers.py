"""Containers: what the external store holds, and which of it is still wanted.  Pure bookkeeping.

A container is written once, with one object or many, and is deleted as a whole when no entry of the table *names* it any
more, that is, has its copy in it.  One of which less than half is named is *sparse*; it waits to be emptied, or that was
tried (`shmplasma.spilling` does it, and says why).

Invariants
----------
* Every container that is known is named by at least one entry, but between `wrote` and the first `name`.
* `total_bytes` is the sum of their sizes, headers and what is named no more included.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Containers"]


@dataclass(slots=True)
class _Container:
    """One container: its size, and what each entry that names it takes there, in bytes."""

    size_bytes: int
    entries: dict[int, int] = field(default_factory=dict)
    named_bytes: int = 0
    was_emptied: bool = False

    @property
    def is_sparse(self) -> bool:
        return 2 * self.named_bytes < self.size_bytes and not self.was_emptied


class Containers:
    """The containers of one store, by number.

    Attributes
    ----------
    total_bytes : int
        How much they are together.

    Notes
    -----
    O(1) for what concerns one entry.
    """

    def __init__(self) -> None:
        self.total_bytes = 0
        self._known: dict[int, _Container] = {}
        self._sparse: set[int] = set()
        self._next = 1

    def new_number(self) -> int:
        """Return a number that no container has."""
        number, self._next = self._next, self._next + 1
        return number

    def wrote(self, number: int, size_bytes: int) -> None:
        """Take note of a container that has been written; `name` is to follow."""
        self._known[number] = _Container(size_bytes)
        self.total_bytes += size_bytes

    def name(self, number: int, entry: int, size_bytes: int) -> None:
        """Take note of an entry that has its copy there, of so many bytes."""
        container = self._known[number]
        container.entries[entry] = size_bytes
        container.named_bytes += size_bytes

    def unname(self, number: int, entry: int) -> bool:
        """Forget that an entry has its copy there; tell whether the container is to be deleted."""
        container = self._known[number]
        container.named_bytes -= container.entries.pop(entry)
        if container.entries:
            self._note_if_sparse(number)
            return False
        del self._known[number]
        self._sparse.discard(number)
        self.total_bytes -= container.size_bytes
        return True

    def entries(self, number: int) -> tuple[int, ...]:
        """Return the entries that name a container."""
        container = self._known.get(number)
        return () if container is None else tuple(container.entries)

    # -- sparse ones ---------------------------------------------------------------------------

    def _note_if_sparse(self, number: int) -> None:
        if self._known[number].is_sparse:
            self._sparse.add(number)

    def first_sparse(self) -> int | None:
        """Return one of which less than half is named, and that was not emptied yet; None if there is none."""
        return next(iter(self._sparse), None)

    def empty(self, number: int) -> None:
        """Take note that this one is being emptied."""
        self._sparse.discard(number)
        self._known[number].was_emptied = True

    def was_emptied(self, number: int) -> bool:
        """Tell whether what comes back from there is to forget its copy."""
        container = self._known.get(number)
        return container is not None and container.was_emptied

    # -- recovering ----------------------------------------------------------------------------

    def recover(self, number: int, entry: int, size_bytes: int) -> None:
        """Take over a copy of a store that has died; how large its container is `tidy` hears."""
        if number not in self._known:
            self.wrote(number, 0)
            self._next = max(self._next, number + 1)
        self.name(number, entry, size_bytes)
        self._known[number].size_bytes += size_bytes
        self.total_bytes += size_bytes

    def damaged(self, found: Mapping[int, int]) -> tuple[int, ...]:
        """Return those that are not among the containers that there are, or are shorter than what is named of them."""
        return tuple(
            number
            for number, container in self._known.items()
            if found.get(number, 0) < container.named_bytes
        )

    def tidy(self, found: Mapping[int, int]) -> tuple[int, ...]:
        """Take note of the containers that there are, and of their sizes in bytes; return those that nobody names."""
        for number, size_bytes in found.items():
            self._next = max(self._next, number + 1)
            container = self._known.get(number)
            if container is not None:
                self.total_bytes += size_bytes - container.size_bytes
                container.size_bytes = size_bytes
                self._note_if_sparse(number)
        return tuple(number for number in found if number not in self._known)

    def check(self, named: Mapping[int, Mapping[int, int]]) -> None:
        """Prove that the containers are these, and named by these entries with so many bytes."""
        known = {number: each.entries for number, each in self._known.items()}
        assert known == named, "a container is named by others than is known"
        for number, each in self._known.items():
            assert each.named_bytes == sum(each.entries.values()), f"container {number}"
            assert (number in self._sparse) == each.is_sparse, f"container {number} waits or not"
        assert self._sparse <= self._known.keys(), "what is not there is to be emptied"
        assert self.total_bytes == sum(each.size_bytes for each in self._known.values())
