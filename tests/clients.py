"""What tests with real clients have in common."""

from __future__ import annotations

from shmplasma import ObjectID, PlasmaClient

__all__ = ["MISSING", "figure", "figures_of", "new_id"]

MISSING = ObjectID(20 * b"?")
"""No object has this id for long."""


def new_id() -> ObjectID:
    """Return an id that nothing has."""
    return ObjectID.from_random()


def figure(client: PlasmaClient, name: str) -> int:
    """Return one of the figures in the store's description of itself."""
    return figures_of(client)[name]


def figures_of(client: PlasmaClient) -> dict[str, int]:
    """Return all of them."""
    lines = (line.partition(": ") for line in client.debug_string().splitlines())
    return {name: int(value) for name, _, value in lines if value.isdecimal()}
