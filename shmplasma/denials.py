"""Denials: what is raised for a request that is not granted, on its way to where the client is answered.  Pure."""

from __future__ import annotations

from shmplasma.replies import Failed, Failure

__all__ = ["Claimed", "MakesRoom", "NoRoom", "Refused", "existing"]


class Refused(Exception):  # noqa: N818 - not an error of ours: an answer on its way to the client
    """A request that cannot be granted; carries the reply."""

    def __init__(self, failed: Failed) -> None:
        super().__init__(failed.text)
        self.failed = failed


class Claimed(Exception):  # noqa: N818 - as `Refused`
    """Somebody has the lock of the id: he may be about to create the object (see `shmplasma.claims`)."""


class MakesRoom(Exception):  # noqa: N818 - as `Refused`
    """Some objects have gone for a request, and more are to go: ask again in the next turn."""


class NoRoom(Exception):  # noqa: N818 - as `Refused`
    """There is no room for a request; `shmplasma.refusals` has the words for it.

    Attributes
    ----------
    requested_bytes : int
        What was asked for.
    text : str
        The reason, if it is another than that the store is full.
    may_come : bool
        Whether there may be room when others let go of some.
    limit_bytes, held_bytes : int
        The client's limit and what it holds, if that is the reason; else 0.
    """

    def __init__(
        self,
        requested_bytes: int,
        text: str = "",
        *,
        may_come: bool = False,
        limit_bytes: int = 0,
        held_bytes: int = 0,
    ) -> None:
        super().__init__(text)
        self.requested_bytes = requested_bytes
        self.text = text
        self.may_come = may_come
        self.limit_bytes = limit_bytes
        self.held_bytes = held_bytes


def existing(object_id: bytes) -> Refused:
    """Return the refusal of an id that is taken."""
    text = (
        f"object {object_id.hex()} exists already; use another id, or delete it first (if it was never "
        "sealed, its writer can abort it)"
    )
    return Refused(Failed(Failure.EXISTS, text))
