"""Upkeep: what a store does between requests because somebody waits, one short step at a time.  Pure.

First comes what he waits for himself, last what is only to be ready when somebody asks.  What nobody waits for is left to an idle store:
memory is committed ahead of need (`shmplasma.commitment`), and given back when it was not used for a while (`shmplasma.trims`).
"""

from __future__ import annotations

from collections.abc import Sequence

from shmplasma.effects import Effect
from shmplasma.jobs import Jobs
from shmplasma.parts import Parts

__all__ = ["Upkeep"]


class Upkeep:
    """What there is to do for a store that handles no request.

    Parameters
    ----------
    parts : Parts
        The parts of the store.
    jobs : Jobs
        What the external store is to do.
    """

    def __init__(self, parts: Parts, jobs: Jobs) -> None:
        self._room = parts.room
        self._objects = parts.objects
        self._deletions = parts.deletions
        self._publishing = parts.publishing
        self._answers = parts.answers
        self._creations = parts.creations
        self._jobs = jobs
        self._trims = parts.trims
        self._outgoing = parts.outgoing

    @property
    def has_urgent_work(self) -> bool:
        """Whether a creator waits for memory to be committed, or a client for it to be given back, or objects are moved, removed or listed."""
        return (
            self._creations.await_memory
            or self._room.mover.is_busy
            or bool(self._trims)
            or self._objects.unsealed.are_left
            or self._publishing.is_to_evict
            or self._jobs.await_commit
            or self._outgoing.is_listing
        )

    def advance(self, now_ns: int) -> Sequence[Effect]:
        """Do one step of the urgent work; answer who has waited for it.

        Room that this makes is whose who waits for it, if `offer_room` is called before another request is handled.
        """
        if self._outgoing.is_listing:  # what has an end comes first
            self._outgoing.advance()
        elif self._creations.await_memory:
            self._creations.advance()
        elif self._jobs.await_commit:
            self._jobs.commit(now_ns)
        elif self._room.mover.is_busy:
            self._objects.note_evicted(self._room.advance())
            self._deletions.look_again()
            self._answers.look_again()
        elif self._objects.unsealed.are_left:
            self._objects.unsealed.advance()
        elif self._trims:
            self._trims.advance()
        else:
            self._publishing.evict_ahead()
        return self._outgoing.take()
