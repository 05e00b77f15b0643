"""What a store needs of the machine beneath it: memory, barriers, locks.  Pure: the server has it, and tests have another."""

from __future__ import annotations

from typing import Protocol

from shmplasma.commitment import Pages

__all__ = ["Memory"]


class Memory(Pages, Protocol):
    """What the parts of a store ask for."""

    def barrier(self) -> None:
        """Make every client's CPU pass a full memory barrier, if there is a way."""

    def lock(self, at: int) -> bool:
        """Lock an id by its CRC-32, and tell whether nobody else has (see `shmplasma.claims`)."""

    def unlock(self) -> None:
        """Take back what was locked."""

    @property
    def has_barrier(self) -> bool:
        """Whether `barrier` does what it says; only then may clients pin without a message."""
