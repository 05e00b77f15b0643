"""Transfers: what an external store is asked to do, for the loop that decides it and the threads that do it.  Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["Delete", "Job", "Part", "Read", "Write"]


class Part(NamedTuple):
    """An object in the segment, on its way out or in."""

    entry: int
    object_id: bytes
    codec: int
    offset: int
    data_size: int
    metadata_size: int

    @property
    def size_bytes(self) -> int:
        """Bytes of data and metadata."""
        return self.data_size + self.metadata_size

    def contents(self, raw: memoryview) -> memoryview:
        """Return data and metadata, as they lie in the segment."""
        return raw[self.offset : self.offset + self.size_bytes]


@dataclass(frozen=True, slots=True)
class Write:
    """Write these objects to a container of this number; the result is where each is in it."""

    number: int
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Read:
    """Read an object from its place in a container to its extent."""

    number: int
    place: int
    part: Part


@dataclass(frozen=True, slots=True)
class Delete:
    """Delete containers."""

    numbers: tuple[int, ...]


Job = Write | Read | Delete
