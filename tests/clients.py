"""What tests with real clients have in common."""

from __future__ import annotations

from shmplasma import ObjectID, PlasmaClient

__all__ = ["MISSING", "figure", "new_id"]

MISSING = ObjectID(20 * b"?")
"""No object has this id for long."""


def new_id() -> ObjectID:
    """Return an id that nothing has."""
    return ObjectID.from_random()


def figure(client: PlasmaClient, name: str) -> int:
    """Return one of the figures in the store's description of itself."""
    (line,) = (line for line in client.debug_string().splitlines() if line.startswith(f"{name}: "))
    return int(line.removeprefix(f"{name}: "))
